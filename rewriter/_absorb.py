"""absorb: the tensors that other tools compute become sites of this package."""

from __future__ import annotations

from torch import nn

from rewriter._given import check_model
from rewriter._rewrite import rewrite
from rewriter.language import Spec


def absorb(model: nn.Module, *, inplace: bool = False, capture: str = "auto") -> nn.Module:
    """Return `model` with the tensors that other tools compute as sites.

    >>> import torch, rewriter
    >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    >>> new = rewriter.absorb(torch.nn.Sequential(layer))
    >>> list(new.state_dict())[1:]
    ['0.parametrizations.weight.original0', '0.parametrizations.weight.original1']

    The tools are torch.nn.utils.parametrize, the hooks of torch.nn.utils.weight_norm and spectral_norm,
    torch.nn.utils.prune, and PEFT's LoRA layers and ``target_parameters``. Their stored tensors stay the same
    objects; their classes, hooks and wrappers go. The rule of such a site is named after the tool, such as
    ``absorbed:torch.parametrize``. A model without them comes back as it is.

    Arguments:
        model: any module. A PeftModel comes back as its base model.
        inplace: change the model itself, without a copy.
        capture: how to capture the model, as for `rewrite`.

    Raises:
        PlanError: a layer cannot be absorbed; says which, and what else to do. The model is as it was.
        CaptureError: the model cannot be copied, or not be captured as asked.
    """
    check_model(model, "absorb", programs=False)
    return rewrite(model, Spec(reparam=1, absorb=True), inplace=inplace, capture=capture)
