"""Whether the originals of a chain can be put back in the places of the tensors that it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rewriter.errors import PlanError
from rewriter.planning import dtype_name


class Replaced(Protocol):
    """What is known of a tensor that a chain computes."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> str: ...


NOTHING_COMPUTED = "{} found no computed tensor: the model was not rewritten, or is baked already"


def check_originals(name: str, chain: Sequence[str], originals: Sequence[Tensor], replaced: Sequence[Replaced]) -> None:
    """Refuse to put stored tensors in the places of what they were made of, where these had another form.

    Raises:
        PlanError: says what is stored.
    """
    stored = [(list(original.shape), dtype_name(original.dtype)) for original in originals]
    if stored != [(list(member.shape), member.dtype) for member in replaced]:
        shown = ", ".join(f"{dtype}{shape}" for shape, dtype in stored) or "nothing"
        raise PlanError(
            f"{name}: {' >> '.join(chain)} stores {shown}, which is not the tensor it replaced; bake with keep='value'"
        )
