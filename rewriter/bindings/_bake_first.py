"""Tools of torch that cannot work on a module with computed tensors say so in one line."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from rewriter.errors import RewriterError
from rewriter.sites._site import Site


def bake_first(module: nn.Module, tool: str) -> RewriterError:
    """Return the error for a `tool` that needs plain tensors."""
    sites = (child.spec for child in module.modules() if isinstance(child, Site))
    shown = next((f"{spec.name} = {' >> '.join(spec.chain)}" for spec in sites), "a tensor")
    return RewriterError(f"{tool} needs plain tensors, and {shown} is computed: bake first")


def refuse_script(self: Any) -> NoReturn:
    """Stand in for torch.jit.script's hook."""
    raise bake_first(self, "torch.jit.script of a model that keeps its class (module capture)")


def refuse_package(self: Any, *_: Any) -> NoReturn:
    """Stand in for torch.package's hook."""
    raise bake_first(self, "torch.package")


def refuse_quantization(module: nn.Module, name: str, value: Any) -> None:
    """Refuse the attribute by which torch.ao.quantization chooses the modules that it replaces.

    Raises:
        RewriterError: it is set.
    """
    if name == "qconfig" and value is not None:
        raise bake_first(module, f"torch.ao.quantization of the {type(module).__name__}")


def refuse_quantized(module: nn.Module, value: Any) -> None:
    """Refuse a quantized tensor of torchao in the place of a computed one: its chain cannot give it.

    Raises:
        RewriterError: it is one.
    """
    if type(value).__module__.partition(".")[0] == "torchao":
        raise bake_first(module, f"torchao's quantize_ of the {type(module).__name__}")
