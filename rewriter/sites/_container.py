"""The sites of a module, and where they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from torch import nn

from rewriter.errors import RewriterError
from rewriter.sites._places import CONTAINER, CONTEXTS, GRAPH_OF
from rewriter.sites._site import Site


class Sites(nn.ModuleDict):
    """The sites of one owner, by tensor name.

    A tied tensor's site is one module under several owners. State dicts name it under each, as they name tied
    tensors; where torch asks for every name that a tensor has, it is given the first only: `functional_call` puts
    tensors in for all the names in turn, and would afterwards put back what it had put in itself.
    """

    owned_elsewhere: set[str]

    def __init__(self) -> None:
        super().__init__()
        # Here and below: Module.__setattr__ and its like look for parameters and hooks, which takes time in big models.
        self.__dict__["owned_elsewhere"] = set()

    def place(self, tensor: str, site: Site) -> None:
        """Add the site that computes `tensor`."""
        if site.owned:
            self.owned_elsewhere.add(tensor)
        site.__dict__["owned"] = True
        self._modules[tensor] = site

    def __getattr__(self, name: str) -> Any:
        try:  # graphs come here for every site
            return self.__dict__["_modules"][name]
        except KeyError:
            return super().__getattr__(name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        if remove_duplicate:
            yield from super().named_modules(memo, prefix, True)
            return
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None and name not in self.owned_elsewhere:
                yield from module.named_modules(memo, f"{prefix}.{name}" if prefix else name, False)


def sites_of(owner: nn.Module) -> dict[str, Site]:
    """Return the sites of `owner`, by tensor name; a joint site under each of its tensors."""
    children = owner._modules  # a ScriptModule has no `get` for them
    container = children[CONTAINER] if CONTAINER in children else None  # noqa: SIM401
    found: dict[str, Site] = {}
    for key, site in container._modules.items() if container is not None else ():
        if isinstance(site, Site):
            members = site.spec.members
            found.update({key: site} if len(members) == 1 else {member.tensor: site for member in members})
    return found


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that `module` had before its tensors were parametrized."""
    kind: Any = type(module)
    plain: type[nn.Module] = getattr(kind, "_reparam_plain", kind)
    return plain


def computed_slots(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where the tensors were that sites compute: a dict of parameters or buffers, empty under the name."""
    for owner in model.modules():
        for name in sites_of(owner):
            slots: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            yield from ((tensors, name) for tensors in slots if name in tensors)


def refuse_override(name: str) -> NoReturn:
    """Refuse a tensor in the place of a computed one.

    Raises:
        RewriterError: always.
    """
    raise RewriterError(
        f"{name} is computed by a chain, and functional_call cannot put another value in its place: give it the "
        f"originals, such as 'parametrizations.{name}.original', or call it on bake(model)"
    )


def site_path(site: Site) -> str:
    """Return where a site is in the module tree of its model."""
    return path_for(site.spec.name)


def path_for(name: str) -> str:
    """Return where the site of the tensor called `name` is in the module tree.

    >>> path_for("encoder.fc.weight"), path_for("weight")
    ('encoder.fc.parametrizations.weight', 'parametrizations.weight')
    """
    owner, _, tensor = name.rpartition(".")
    return f"{owner}.{CONTAINER}.{tensor}" if owner else f"{CONTAINER}.{tensor}"


def ways_to(names: Iterable[str]) -> set[str]:
    """Return the paths of all modules in which one looks for what has these names, the root among them.

    >>> sorted(ways_to(["encoder.fc.weight", "encoder.norm.bias"]))
    ['', 'encoder', 'encoder.fc', 'encoder.norm']
    """
    ways: set[str] = set()
    for name in names:
        way = name.rpartition(".")[0]
        while way not in ways:
            ways.add(way)
            way = way.rpartition(".")[0]
    return ways


def called_sites(module: nn.Module) -> list[Site]:
    """Return the sites in `module` whose values it takes in a call, in the order in which it expects them."""
    found = (site for site in module.modules() if isinstance(site, Site))
    return [site for site in found if site.spec.cache != "never"]


def refuse_mixed(modules: Iterable[nn.Module]) -> None:
    """Refuse modules of ours that torch's parametrizations gave another class, which their copies would not have.

    Raises:
        RewriterError: there is one.
    """
    for module in modules:
        if module.__dict__.keys().isdisjoint((CONTEXTS, GRAPH_OF)) or CONTAINER not in module._modules:
            continue
        for name, child in module._modules[CONTAINER]._modules.items():  # type: ignore[union-attr]
            if not isinstance(child, Site):
                raise RewriterError(
                    f"{name} of {type(module).__name__} is parametrized by torch.nn.utils.parametrize, which a copy "
                    "would lose: remove that and name the tensor in the spec, or register it before the model is "
                    "rewritten, which takes it over"
                )
