"""What a pass is: a change of one graph, with what must hold before it and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from rewriter.runtime import HANDED, ParametrizedTensor, Session
from rewriter.runtime._places import META as META
from rewriter.runtime._sites import ways_to


class PassError(RuntimeError):
    """A pass left the graph in a state that it promised not to; a defect of this package."""


@dataclass
class Rewriting:
    """One model on its way through the passes.

    Arguments:
        root: the model, with the sites attached.
        graph: its graph, edited in place.
        paths: site → where it is in the module tree.
        sites: tensor name → the site that computes it, for every tied name.
        session: of the rewritten model.
        order: the sites, each one before the sites it reads.
    """

    root: nn.Module
    graph: fx.Graph
    paths: dict[ParametrizedTensor, str]
    sites: dict[str, ParametrizedTensor]
    session: Session
    order: Sequence[ParametrizedTensor] = ()
    holders: frozenset[str] = field(init=False)
    _modules: dict[str, nn.Module] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.holders = frozenset(ways_to(self.sites))

    def module(self, path: object) -> nn.Module:
        """Return a module of the model that was there before the passes, looked up once."""
        found = self._modules.get(str(path))
        if found is None:
            found = self._modules[str(path)] = self.root.get_submodule(str(path))
        return found


@dataclass(frozen=True)
class Pass:
    """A named change of a graph.

    Arguments:
        name: as it shows in messages.
        run: makes the change, returns whether there was one.
        ensures: raises PassError unless the pass did what it promises.
    """

    name: str
    run: Callable[[Rewriting], bool]
    ensures: Callable[[Rewriting], None] = lambda rewriting: None


def run_passes(rewriting: Rewriting, passes: Sequence[Pass]) -> None:
    """Run the passes in order, and see after each that it did what it promises.

    Raises:
        PassError: a condition does not hold; the message names the pass and those that ran before it.
    """
    done: list[str] = []
    for step in passes:
        try:
            step.run(rewriting)
            step.ensures(rewriting)
        except PassError as problem:
            before = f" after {', '.join(done)}" if done else ""
            raise PassError(f"pass {step.name}{before}: {problem}") from problem
        done.append(step.name)


def note(node: fx.Node) -> dict[str, Any]:
    """Return our entry in the node's metadata; empty where there is none."""
    entry: dict[str, Any] = node.meta.get(META, {})
    return entry


def call_note(node: fx.Node, given: tuple[Any, ...]) -> dict[str, Any]:
    """Return the entry of a call that is about to become one of a function, for putting the call back.

    Arguments:
        node: the call.
        given: its arguments in the order of the module's forward, as the function will get them.
    """

    def position(value: object) -> int:
        return next(index for index, argument in enumerate(given) if argument is value)

    return {
        **note(node),
        "opened": str(node.target),
        "arity": len(given),
        "positional": len(node.args),
        "keywords": {name: position(value) for name, value in node.kwargs.items()},
    }


def unhand(node: fx.Node) -> None:
    """Make a call that is handed values one that is not: what kept the call one, a hook, may be gone."""
    if HANDED in node.kwargs:
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != HANDED}
        keep_place(node)


def keep_place(node: fx.Node) -> None:
    """Take our entry out of the node's metadata, but for the node's place in an expanded call."""
    place = {name: value for name, value in note(node).items() if name in ("part", "result")}
    node.meta.pop(META, None)
    if place:
        node.meta[META] = place


def reads_of(rewriting: Rewriting) -> list[fx.Node]:
    """Return the nodes that read a selected tensor from its old place."""
    return [node for node in rewriting.graph.nodes if node.op == "get_attr" and node.target in rewriting.sites]


def evaluations_of(rewriting: Rewriting) -> dict[ParametrizedTensor, list[fx.Node]]:
    """Return the nodes that evaluate each site, in the graph's order."""
    site_at = {path: site for site, path in rewriting.paths.items()}
    found: dict[ParametrizedTensor, list[fx.Node]] = {site: [] for site in rewriting.paths}
    for node in rewriting.graph.nodes:
        if node.op == "call_module" and node.target in site_at:
            found[site_at[node.target]].append(node)
    return found
