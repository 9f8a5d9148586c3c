"""What a pass is: a change of one lowered graph, with what holds after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter.sites import Site, site_path
from rewriter.sites._container import ways_to

SAMPLES = 8
"""How many sites of a kind a pass looks at when it proves that a value stays the same."""


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


def is_linear_by(node: fx.Node, weight: fx.Node) -> bool:
    """Say whether a node is a linear call by position whose weight is `weight`, which it takes as nothing else."""
    if node.op != "call_function" or node.target is not F.linear or node.kwargs or len(node.args) < 2:
        return False
    return node.args[1] is weight and weight not in (node.args[0], *node.args[2:])


def few_of_each(sites: Iterable[Site]) -> Iterator[Site]:
    """Return the first few sites of every chain over tensors of every form, where steps are hoisted or fused.

    What is proven is about code, the same for all of them: whether a step's declarations are true. The numbers of
    one site more, which training is about to change, would prove nothing more, and evaluating thousands takes longer
    than everything else that a pass does.
    """
    seen: Counter[object] = Counter()
    for site in (site for site in sites if site.hoisted or site.fused):
        forms = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in site.originals)
        form = (site.spec.identity, site.fused, site.hoisted, forms)
        seen[form] += 1
        if seen[form] <= SAMPLES:
            yield site


def same_values(why_not: Callable[[Site, Sequence[Tensor]], str]) -> Callable[[Lowering], None]:
    """Return what a pass ensures that leaves all values as they are.

    Arguments:
        why_not: a site and the tensors that it reads → in which way its value is another; nothing where it is not.
    """

    def ensure(lowering: Lowering) -> None:
        for site in few_of_each(lowering.order):
            problem = why_not(site, site.read_inputs())
            if problem:
                raise PassError(f"{site.spec.name}: {problem}")

    return ensure
