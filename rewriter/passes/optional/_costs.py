"""When evaluating equal chains together is faster than one after the other: measured, not guessed.

Forward and backward of 4 and of 48 square matrices on 2 CPU cores, one after the other against together (torch 2.13):

===========  ==========  ==========  ==========  ==========
map          16 × 16     32 × 32     64 × 64     128 × 128
===========  ==========  ==========  ==========  ==========
householder  1.8×, 50×   1.9×, 8×    1.8×, 3×    2×, noisy
cayley       1.6×, 5×    1.7×, 4×    1.5×, 2×    1.3×, 1.3×
matrix_exp   1.9×, 10×   2.1×, 8×    1.7×, 2×    1.4×, 1.1×
elementwise  1.4×, 3×    1.3×, 2.5×  1.3×, 2×    1.4×, 1.4×
===========  ==========  ==========  ==========  ==========

A batch of exponentials is scaled for the largest of its matrices, which can cost the others what the batch gains; and
where the gain is small, evaluating each tensor where it is used is kinder to the cache than all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

_LARGEST = {
    ("cpu", "matrix_exp"): 32 * 32,
    ("cpu", ""): 64 * 64,
    # Not measured: on an accelerator small chains wait for their launches, whatever the map.
    ("", ""): 256 * 256,
}
"""(device, map) → the most elements of one tensor with which a batch pays; an empty string stands for all others."""

_FEWEST = 4


def pays(count: int, stored: Tensor, steps: Sequence[nn.Module]) -> bool:
    """Return whether `count` sites like this one are faster together.

    Arguments:
        count: how many sites there are.
        stored: the stored tensor of one.
        steps: its chain.
    """
    device = stored.device.type
    maps = [str(getattr(step, "map", "")) for step in steps] or [""]
    elements = stored.numel()
    return count >= _FEWEST and all(elements <= _largest(device, name) for name in maps)


def _largest(device: str, name: str) -> int:
    return next(_LARGEST[key] for key in ((device, name), (device, ""), ("", "")) if key in _LARGEST)
