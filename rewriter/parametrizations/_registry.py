"""Names of parametrizations: the catalog, what users register, ``torch.*`` and ``geotorch.*``."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, TypeVar

import torch

from rewriter.parametrizations._chain import compose

T = TypeVar("T", bound=Callable[..., torch.nn.Module])

INJECTED = frozenset({"weight", "size", "transposed", "chosen_mask"})
"""Constructor arguments that no spec gives: the site fills in the tensor, its shape and whether its owner is a
transposed convolution, and ``plan_sites`` the mask."""

FAMILIES = (
    "adapters",
    "almost_orthogonal",
    "arithmetic",
    "bounded",
    "conv_spectral_norm",
    "entry_adapters",
    "factored",
    "hurwitz",
    "invertible",
    "linear_spaces",
    "mask",
    "orthogonal",
    "plumbing",
    "pruning",
    "psd",
    "quantization",
    "scaling_adapters",
    "spectral_norm",
    "stiefel",
    "vectors",
    "weight_norm",
)
"""The files of the catalog; importing one registers its members. `find` and `names` import all."""

_registered: dict[str, Callable[..., torch.nn.Module]] = {}


def register(name: str) -> Callable[[T], T]:
    """Make a parametrization class (or a factory of one) usable in specs under `name`.

    >>> import torch, rewriter
    >>> @rewriter.register("double")
    ... class Double(torch.nn.Module):
    ...     def forward(self, X):
    ...         return 2 * X

    The site fills in constructor arguments with these names: ``weight`` is the tensor that is parametrized, ``size``
    its shape, and ``transposed`` says whether the layer is a transposed convolution. A spec can give all others. The
    class gets ``>>``, unless it has one.

    Arguments:
        name: snake_case, without dots.

    Raises:
        ValueError: the name is taken by another class, or is no identifier.
    """
    if not isinstance(name, str):
        raise TypeError('register takes the name for specs: write @register("name") above the class')
    if not name.isidentifier():
        raise ValueError(f"a parametrization's name must be an identifier, not {name!r}")

    def bind(factory: T) -> T:
        owner = _registered.get(name)
        if owner is not None and _identity(owner) != _identity(factory):
            raise ValueError(f"the name {name!r} is taken by {_identity(owner)}; choose another one")
        _registered[name] = factory
        if isinstance(factory, type) and not hasattr(factory, "__rshift__"):
            setattr(factory, "__rshift__", compose)  # noqa: B010
        return factory

    return bind


def find(name: str, imports: Mapping[str, ModuleType] | None = None) -> Callable[..., torch.nn.Module]:
    """Return the class or factory that `name` stands for.

    Arguments:
        name: a registered name, or ``prefix.Class`` with `prefix` one of `imports`, ``torch`` or ``geotorch``.

    Raises:
        LookupError: nothing has this name; the message suggests the near miss.
    """
    _load_catalog()
    if name in _registered:
        return _registered[name]
    prefix, dot, attribute = name.partition(".")
    if not dot:
        raise LookupError(f"unknown parametrization {name!r}" + suggestion(prefix, names(imports)))
    module = _namespace(prefix, imports or {})
    found: Any = module
    for part in attribute.split("."):
        found = None if part.startswith("__") else getattr(found, part, None)
    if not callable(found):
        candidates = [f"{prefix}.{key}" for key in dir(module) if isinstance(getattr(module, key, None), type)]
        there = f" ({module.__name__} has no {attribute!r})" if prefix in (imports or {}) else ""
        raise LookupError(f"unknown parametrization {name!r}{there}" + suggestion(name, candidates))
    factory: Callable[..., torch.nn.Module] = found
    return factory


def names(imports: Mapping[str, ModuleType] | None = None) -> list[str]:
    """Return all registered names, sorted, with the prefixes of `imports` as ``prefix.…``."""
    _load_catalog()
    return sorted(_registered) + [f"{prefix}.…" for prefix in sorted(imports or {})]


def arguments_of(factory: Callable[..., torch.nn.Module]) -> dict[str, inspect.Parameter]:
    """Return the arguments of `factory` that a spec may give, by name, in order."""
    return {name: parameter for name, parameter in _signature(factory).parameters.items() if name not in INJECTED}


def construct(
    factory: Callable[..., torch.nn.Module],
    weight: torch.Tensor,
    arguments: Mapping[str, Any],
    transposed: bool = False,
) -> torch.nn.Module:
    """Build the parametrization for one tensor, and give it those of `INJECTED` that its constructor has.

    A module whose constructor does not get the tensor is moved to the tensor's device and dtype.

    Arguments:
        factory: the class, or a function that makes the module.
        weight: the tensor.
        arguments: those of the spec, and those of ``plan_sites``.
        transposed: the tensor is the kernel of a transposed convolution.
    """
    wanted = _signature(factory).parameters
    site = {"weight": weight, "size": weight.shape, "transposed": transposed}
    module = factory(**{name: value for name, value in site.items() if name in wanted}, **arguments)
    if "weight" not in wanted and (module._parameters or module._buffers or module._modules):
        module.to(weight.device, weight.dtype if weight.is_floating_point() else None)
    return module


def suggestion(word: str, candidates: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest candidates, or nothing."""
    near = difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


def _namespace(prefix: str, imports: Mapping[str, ModuleType]) -> ModuleType:
    if prefix in imports:
        return imports[prefix]
    if prefix == "torch":
        return importlib.import_module("rewriter.parametrizations._torch")
    if prefix == "geotorch":
        try:
            return importlib.import_module("rewriter.parametrizations._geotorch")
        except ModuleNotFoundError as missing:
            raise LookupError("geotorch is not installed; run `pip install geotorch`") from missing
    known = [*imports, "torch", "geotorch"]
    raise LookupError(
        f"unknown prefix {prefix!r}{suggestion(prefix, known)} (import it: `imports: {{{prefix}: your_package}}`)"
    )


def _load_catalog() -> None:
    for family in FAMILIES:
        importlib.import_module(f"rewriter.parametrizations._{family}")


@functools.lru_cache(maxsize=1024)
def _signature(factory: Callable[..., torch.nn.Module]) -> inspect.Signature:
    # The signature of torch.nn.Module is ``(*args, **kwargs)``, and its constructor takes no argument.
    if getattr(factory, "__init__", None) is torch.nn.Module.__init__:
        return inspect.Signature()
    return inspect.signature(factory)


def _identity(factory: Callable[..., torch.nn.Module]) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"
