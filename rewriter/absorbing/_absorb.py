"""absorb: what other tools did to a model becomes sites of this package."""

from __future__ import annotations

from torch import nn

from rewriter._given import check_model
from rewriter.language import Spec


def absorb(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return `model` with the tensors that other tools compute taken over.

    >>> import torch, rewriter
    >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    >>> new = rewriter.absorb(torch.nn.Sequential(layer))
    >>> list(new.state_dict())[1:]
    ['0.parametrizations.weight.original0', '0.parametrizations.weight.original1']

    Taken over are torch.nn.utils.parametrize, the hooks of torch.nn.utils.weight_norm and spectral_norm,
    torch.nn.utils.prune, and PEFT's LoRA layers and ``target_parameters``. Their stored tensors stay the same
    objects; their classes, hooks and wrappers go. A site that was taken over is owned by a rule named after its
    source, such as ``absorbed:torch.parametrize``. A model that nobody has touched comes back as it is.

    Arguments:
        model: any module. A PeftModel comes back as its base model.
        inplace: change the model itself rather than a copy.

    Raises:
        PlanError: a layer cannot be taken over; says which, and what else to do.
        CaptureError: the model cannot be copied.
    """
    from rewriter._rewrite import rewrite

    check_model(model, "absorb")
    return rewrite(model, Spec(reparam=1, absorb=True), inplace=inplace)
