"""What a pass is: a change of one lowered graph, with what holds after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from rewriter.sites import Site, site_path
from rewriter.sites._container import ways_to


class PassError(RuntimeError):
    """A pass left the graph in a state that it promised not to; a defect of this package."""


@dataclass
class Lowering:
    """One graph in the passes.

    Arguments:
        root: the model, with its sites attached.
        graph: the lowered graph, edited in place.
        order: the sites, each one before the sites it reads.
    """

    root: nn.Module
    graph: fx.Graph
    order: Sequence[Site]
    paths: dict[Site, str] = field(init=False)
    """Site → its path in the module tree."""
    sites: dict[str, Site] = field(init=False)
    """Tensor name → the site that computes it, for every tied name."""
    owners: frozenset[str] = field(init=False)
    """Paths of the modules at and above the owners of computed tensors."""
    _modules: dict[str, nn.Module] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.paths = {site: site_path(site) for site in self.order}
        self.sites = {name: site for site in self.order for name in site.spec.names}
        self.owners = frozenset(ways_to(self.sites))

    def module(self, path: object) -> nn.Module:
        """Return a module of the model; each one is looked up once."""
        found = self._modules.get(str(path))
        if found is None:
            found = self._modules[str(path)] = self.root.get_submodule(str(path))
        return found


@dataclass(frozen=True)
class Pass:
    """A named change of a graph.

    Arguments:
        name: as messages show it, and as `rewrite(without=…)` takes it.
        run: makes the change; returns whether there was one to make.
        ensures: raises PassError unless the pass did what it promises.
    """

    name: str
    run: Callable[[Lowering], bool]
    ensures: Callable[[Lowering], None] = lambda lowering: None


def run_passes(lowering: Lowering, passes: Sequence[Pass]) -> None:
    """Run the passes in order, and check after each one that changed something what it ensures.

    Raises:
        PassError: a condition does not hold; the message names the pass and those that ran before it.
    """
    done: list[str] = []
    for step in passes:
        try:
            if step.run(lowering):
                step.ensures(lowering)
        except PassError as problem:
            before = f" after {', '.join(done)}" if done else ""
            raise PassError(f"pass {step.name}{before}: {problem}") from problem
        done.append(step.name)


def evaluations_of(lowering: Lowering) -> dict[Site, list[fx.Node]]:
    """Return the nodes that evaluate each site, in the graph's order."""
    site_at = {path: site for site, path in lowering.paths.items()}
    found: dict[Site, list[fx.Node]] = {site: [] for site in lowering.paths}
    for node in lowering.graph.nodes:
        if node.op == "call_module" and node.target in site_at:
            found[site_at[node.target]].append(node)
    return found
