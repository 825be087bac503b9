"""What the ops compute, as it is written down."""

import torch
import torch.nn.functional as F


def exp_of_product(dt, A):
    return torch.exp(dt * A)


def sequential_scan(u, delta, A, B, delta_bias=None, delta_softplus=False, decay=exp_of_product):
    """The recurrence, one step after the other, in float64."""
    u, delta, A, B = (t.double() for t in (u, delta, A, B))
    if delta_bias is not None:
        delta = delta + delta_bias.double().unsqueeze(-1)
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    states = []
    for t in range(u.shape[2]):
        dt = delta[:, :, t, None]
        h = decay(dt, A) * h + dt * B[:, None, :, t] * u[:, :, t, None]
        states.append(h)
    return torch.stack(states, dim=-1)


def dilated_convolutions(h, kernels, alpha):
    return sum(
        a * F.conv2d(F.pad(h, (k,) * 4, mode='replicate'), kernel, dilation=k, groups=h.shape[1])
        for a, kernel, k in zip(alpha, kernels, (1, 3, 5))
    )


def scan_of_map(u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias=None, delta_softplus=True, decay=exp_of_product):
    """The fused op: recurrence over the pixels, convolutions of its states, read-out."""
    h = sequential_scan(u.flatten(2), delta.flatten(2), A, B.flatten(2), delta_bias, delta_softplus, decay)
    g = dilated_convolutions(h[:, :, 0].view(u.shape), (k1, k3, k5), alpha)
    return C * g + D.view(-1, 1, 1) * u


def positive_decay(dt, A):
    """exp(dt * A), with the magnitude of each derivative instead of the derivative."""
    value, rate, step = torch.exp(dt * A).detach(), A.abs().detach(), dt.detach()
    return value * (1 + (dt - step) * rate + step * (A - A.detach()))


def relative_error(value, truth):
    """Largest difference over the largest true value."""
    difference = (value.double() - truth.double()).abs().max()
    return (difference / truth.double().abs().max().clamp(min=1e-30)).item()
