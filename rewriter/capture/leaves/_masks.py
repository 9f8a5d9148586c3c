"""The masks of attentions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def float_masks(
    mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype, mask_name: str, padding_name: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return an attention mask and a padding mask as torch's modules take them: as floats, boolean ones and others.

    Arguments:
        mask: which position may attend to which.
        padding: which positions are none.
        dtype: of the results.
        mask_name: as messages call `mask`.
        padding_name: as messages call `padding`.
    """
    padding = F._canonical_mask(
        mask=padding,
        mask_name=padding_name,
        other_type=F._none_or_dtype(mask),
        other_name=mask_name,
        target_type=dtype,
    )
    mask = F._canonical_mask(
        mask=mask, mask_name=mask_name, other_type=None, other_name="", target_type=dtype, check_other=False
    )
    return mask, padding
