"""What the ops compute, as it is written down."""

import torch
import torch.nn.functional as F


def sequential_scan(u, delta, A, B, delta_bias=None, delta_softplus=False):
    """The recurrence, one step after the other, in float64."""
    u, delta, A, B = (t.double() for t in (u, delta, A, B))
    if delta_bias is not None:
        delta = delta + delta_bias.double().unsqueeze(-1)
    if delta_softplus:
        delta = torch.log1p(torch.exp(-delta.abs())) + delta.clamp(min=0)
    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    states = []
    for t in range(u.shape[2]):
        dt = delta[:, :, t, None]
        h = torch.exp(dt * A) * h + dt * B[:, None, :, t] * u[:, :, t, None]
        states.append(h)
    return torch.stack(states, dim=-1)


def dilated_convolutions(h, kernels, alpha):
    return sum(
        a * F.conv2d(F.pad(h, (k,) * 4, mode='replicate'), kernel, dilation=k, groups=h.shape[1])
        for a, kernel, k in zip(alpha, kernels, (1, 3, 5))
    )


def relative_error(value, truth):
    """Largest difference over the largest true value."""
    difference = (value.double() - truth.double()).abs().max()
    return (difference / truth.double().abs().max().clamp(min=1e-30)).item()
