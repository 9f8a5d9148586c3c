"""Taking over what other tools did to a model: each source of parametrized tensors in a file of its own."""

from __future__ import annotations

from rewriter.absorbing._absorb import absorb
from rewriter.absorbing._take import Taken, held_entries, take_over, taken_over

__all__ = ["Taken", "absorb", "held_entries", "take_over", "taken_over"]
