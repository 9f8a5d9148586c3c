"""The TensorTable of a module: survey, capture, and how the graph reaches each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx, nn

from rewriter.capture import (
    Call,
    Capture,
    capture,
    difference,
    export_capture,
    has_hooks,
    is_torch_leaf,
    opens_up,
)
from rewriter.errors import CaptureError
from rewriter.planning._problems import Problems
from rewriter.planning._refusals import refuse_sharded
from rewriter.planning._resolve import Claim
from rewriter.planning._survey import Entry, refuse_strays, survey
from rewriter.sites import Site
from rewriter.sites._places import GRAPH_OF


class ModuleTable:
    """What planning needs of an nn.Module; see `TensorTable`.

    Arguments:
        model: the module.
        mode: how to capture it.
        call: example inputs.
        foreign: tensors that other tools compute.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str = "auto",
        call: Call | None = None,
        foreign: Sequence[tuple[Entry, str]] = (),
    ) -> None:
        self.model, self.mode, self.call = model, mode, call
        self.entries = survey(model)
        self.foreign = foreign
        self.absorbed: Sequence[tuple[Entry, Site]] = ()
        self._uses: dict[tuple[str, str], bool] | None = None
        if isinstance(model, fx.GraphModule):
            refuse_strays(model, {entry.site for entry in self.entries})

    def refuse(self, claims: Sequence[Claim], problems: Problems) -> None:
        """Refuse tensors that FSDP shards."""
        refuse_sharded(self.model, claims, problems)

    def capture(self, owners: Sequence[str]) -> Capture:
        """Capture the model, and compare the graph with the model where there are example inputs.

        Raises:
            CaptureError: the mode asks for a graph and there is none.
        """
        model, mode = self.model, self.mode
        if mode == "export" and not is_rewritten_graph(model):
            return export_capture(model, self.call)
        way = capture(model, owners, "auto" if mode == "export" else mode)
        if self.call is None or way.graph is None or isinstance(model, fx.GraphModule):
            return way
        text = difference(model, way.graph, self.call)
        if not text:
            return way
        why = f"the traced graph is not the model: on the example inputs {text}"
        if mode == "graph":
            raise CaptureError(f"{type(model).__name__}: {why}; use capture='module'")
        return Capture("module", why=why)

    def reached(self, way: Capture, site: Site) -> tuple[str, str]:
        """Return how the graph, or the module itself, reads a site's tensor."""
        if way.root in ("module", "export"):
            return way.root, way.why or "the graph that torch.export made"
        if self._uses is None:
            self._uses = _uses_by_target(way)
        found: dict[tuple[str, str], None] = {}
        for name in site.spec.names:
            found.update(dict.fromkeys(_ways(self.model, way, self._uses, name, name.rpartition(".")[0])))
        if found:
            first = next(iter(found))
            return first if len(found) == 1 else (first[0], "; ".join(dict.fromkeys(why for _, why in found if why)))
        return "unused", "no forward of the model reads it"


def is_rewritten_graph(model: nn.Module) -> bool:
    """Whether `model` is what `rewrite` made of a captured graph."""
    return GRAPH_OF in model.__dict__


Uses = dict[tuple[str, str], bool]


def _uses_by_target(way: Capture) -> Uses:
    """Say for every read and every call of the graph whether its result is used."""
    uses: Uses = {}
    for node in way.graph.nodes if way.graph is not None else ():
        if node.op in ("get_attr", "call_module"):
            uses[node.op, node.target] = bool(node.users) or uses.get((node.op, node.target), False)
    return uses


def _how_called(model: nn.Module, path: str, name: str) -> tuple[str, str]:
    module = model.get_submodule(path)
    kind = type(module).__name__
    if has_hooks(module):
        return "called", f"{path} ({kind}) has hooks, which keep it one call"
    if opens_up(module, name.removeprefix(f"{path}.")):
        return "inlined", f"{kind} as a function of its tensors"
    if is_torch_leaf(module):
        return "called", f"{path} ({kind}) takes its tensors by name"
    return "called", f"{path} ({kind}) is one node of the graph"


def _ways(model: nn.Module, way: Capture, uses: Uses, name: str, path: str) -> Iterable[tuple[str, str]]:
    if ("get_attr", name) in uses:
        yield ("graph", "read directly") if uses["get_attr", name] else ("unused", "read, and not used")
    prefix = path
    while True:
        if ("call_module", prefix) in uses:
            if prefix in way.opaque:
                yield "called", f"{prefix or 'the root'} stays one node: {way.opaque[prefix]}"
            else:
                yield _how_called(model, prefix, name)
        if not prefix:
            return
        prefix = prefix.rpartition(".")[0]
