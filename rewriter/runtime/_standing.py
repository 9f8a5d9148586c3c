"""The forward of a graph whose kept values all hold: they are looked at in one go, and given to what reads them.

Looking at the values one by one, each where the graph evaluates it, finds everything in cold memory, between one
matrix product and the next. Where nothing that the graph does on the way to a value can change it, looking at all of
them before it starts comes to the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from rewriter.runtime._holding import Kept
from rewriter.runtime._hooks import hooks_for_all, hooks_of
from rewriter.runtime._places import STANDING
from rewriter.runtime._sites import ways_to
from rewriter.runtime._tracers import ordinary
from rewriter.runtime._watch import Watch


class Start(NamedTuple):
    """What a graph reads before it does anything that could change it.

    Arguments:
        sites: paths of the sites whose kept values it takes.
        tensors: names of the parameters and buffers that it reads.
        called: paths of the other modules that it calls up to the last of all these.
        code: writes the forward that is given the values of the sites and the tensors ahead of the model's arguments.
    """

    sites: Sequence[str]
    tensors: Sequence[str]
    called: Sequence[str]
    code: Callable[[], Callable[..., Any]]


class Held(NamedTuple):
    """Values that hold together.

    Arguments:
        modules: of the model that has them.
        kept: the values of all sites, with all that they and the tensors depend on.
        values: one for each site, a tuple for a joint one; then the tensors.
        forward: the graph's code, which is given them.
    """

    modules: dict[str, Any]
    kept: Kept
    values: tuple[Any, ...]
    forward: Callable[..., Any]


class Standing:
    """Whether what a graph reads is known to be as it was, in one look.

    Arguments:
        model: whose graph it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.held: Held | None = None
        self.hooks: list[dict[Any, Any]] = []
        self.sites: list[Any] = list(map(model.get_submodule, start_of(model).sites))

    def end(self) -> None:
        """Let go of the values: one of them was dropped, or no longer holds."""
        self.held = None

    def note(self, model: nn.Module) -> None:
        """Take note of a forward in which each value was looked at by itself.

        The second in a row that finds the same values is followed by those that look at all of them together.
        """
        found = [site.holding.kept.get("value") for site in self.sites]
        if not found or None in found or any(self.hooks):
            return
        if all(kept.noted for kept in found):
            self._begin(model, start_of(model))
        for kept in found:
            kept.noted = True

    def _begin(self, model: nn.Module, start: Start) -> None:
        module_at = model.get_submodule
        self.sites = list(map(module_at, start.sites))
        found = [site.holding.standing() for site in self.sites]
        if not found or None in found:
            return
        called = list(map(module_at, start.called))
        self.hooks = [*chain.from_iterable(map(hooks_of, (*self.sites, *called))), *hooks_for_all()]
        read = [(module_at(path), name) for path, _, name in (name.rpartition(".") for name in start.tensors)]
        slots = {id(slot): slot for owner, _ in read for slot in (owner._parameters, owner._buffers) if slot}
        ways = [module_at(way)._modules for way in ways_to((*start.sites, *start.called, *start.tensors))]
        common = Watch(places=[*ways, *slots.values()], empty=[*self.hooks, *map(_OwnForward, called)])
        together = Kept.joined(found, common)
        if together is None:  # nor will it be another time
            self.sites = []
            return
        values = (*(kept.value for kept in found), *(getattr(owner, name) for owner, name in read))
        self.held = Held(model._modules, together, values, start.code())
        for kept in found:
            kept.within.add(self)


class _OwnForward:
    """True once somebody gave a module a forward in place of that of its class.

    Arguments:
        module: which has none.
    """

    __slots__ = ("state",)

    def __init__(self, module: nn.Module) -> None:
        self.state = vars(module)

    def __bool__(self) -> bool:
        return "forward" in self.state


def start_of(model: Any) -> Start:
    """Return how the graph of a model begins, as its modules are now."""
    from rewriter.passes import start_of_graph

    return start_of_graph(model)


def given_what_holds(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a graph with sites whose values are kept, made to look at them in one go."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not ordinary():
            return forward(self, *args, **kwargs)
        standing: Standing | None = self.__dict__.get(STANDING)
        held = None if standing is None else standing.held
        if standing is not None and held is not None:
            if held.modules is self._modules and held.kept.holds(()):
                return held.forward(self, *held.values, *args, **kwargs)
            standing.end()
        result = forward(self, *args, **kwargs)
        if standing is None:
            standing = self.__dict__[STANDING] = Standing(self)
        standing.note(self)
        return result

    return run
