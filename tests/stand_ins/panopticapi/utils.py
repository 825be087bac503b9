"""Segment ids and the colours that stand for them: red + 256 * green + 65536 * blue."""

import numpy as np

_BASE = np.array([1, 256, 65536])


def rgb2id(color):
    return (np.asarray(color, dtype=np.int64) @ _BASE).astype(np.int32)


def id2rgb(ids):
    return (np.asarray(ids)[..., None] // _BASE % 256).astype(np.uint8)
