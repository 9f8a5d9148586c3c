"""lower: from the captured graph to the graph that runs.

The captured graph is never changed. Each of its nodes is written once into a new graph:

* a read of a computed tensor becomes an evaluation of its site: a node that calls the site;
* a call of a torch.nn leaf that owns one becomes a function of its tensors (`rewriter.capture`, table of leaves);
* a call of any other module with computed tensors in it gets their values as a keyword argument;
* every other node is copied.

A site is evaluated where the captured graph reads it first, and later uses get the same node: the cache. Under
``cache: never`` each use gets an evaluation of its own. Bake, partial bake and further rules lower the captured graph
again with other sites, so no pass needs an inverse.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg

from rewriter.capture import LeafCall, Own, bind_call, has_hooks, leaf_call, reads_every_site
from rewriter.passes._infra import Lowering, Pass, PassError, evaluations_of, run_passes
from rewriter.sites import PASSED, Site
from rewriter.sites._container import called_sites


def lower(root: nn.Module, captured: fx.Graph, sites: Sequence[Site], optional: Sequence[Pass] = ()) -> fx.Graph:
    """Return the graph that evaluates `sites` and otherwise does what `captured` does.

    Arguments:
        root: the model, with the sites attached.
        captured: as traced; unchanged afterwards.
        sites: those that the model has, each one before the sites it reads.
        optional: passes to run on the result.

    Raises:
        PassError: a pass failed.
    """
    lowering = Lowering(root, fx.Graph(tracer_cls=captured._tracer_cls), sites)
    Writer(lowering, captured).write()
    run_passes(lowering, [*optional, verify_pass])
    return lowering.graph


class Writer:
    """Writes one captured graph into a lowered one.

    Arguments:
        lowering: with an empty graph.
        captured: the graph to write.
    """

    def __init__(self, lowering: Lowering, captured: fx.Graph) -> None:
        self.lowering = lowering
        self.graph = lowering.graph
        self.captured = captured
        self.written: dict[fx.Node, Any] = {}
        self.values: dict[Site, Any] = {}
        self.reads: dict[str, fx.Node] = {}

    def write(self) -> None:
        """Write all nodes."""
        self.graph._codegen = copy.deepcopy(self.captured._codegen)
        for node in self.captured.nodes:
            site = self.lowering.sites.get(node.target) if node.op == "get_attr" else None
            if site is not None:
                if node.users and site.spec.cache != "never":
                    self.written[node] = self.value(node.target)
            elif node.op == "call_module" and node.target in self.lowering.owners:
                self.written[node] = self._call(node)
            else:
                self.written[node] = self.graph.node_copy(node, self._arguments_of())

    def _arguments_of(self) -> Any:
        """Return the function that maps arguments of one node of the captured graph."""
        own: dict[fx.Node, Any] = {}  # under `cache: never`: one evaluation for this use

        def argument(node: fx.Node) -> Any:
            if node in self.written:
                return self.written[node]
            if node not in own:
                own[node] = self.value(str(node.target))
            return own[node]

        return argument

    def value(self, name: str) -> Any:
        """Return the value of the computed tensor called `name`."""
        site = self.lowering.sites[name]
        value = self.evaluation(site)
        members = site.spec.members
        if len(members) == 1:
            return value
        index = next(index for index, member in enumerate(members) if name in member.names)
        return self._member(site, value, index)

    def _member(self, site: Site, value: Any, index: int) -> Any:
        return self.graph.create_node("call_function", operator.getitem, (value, index))

    def evaluation(self, site: Site) -> Any:
        """Return the node that evaluates `site`, the one that is there if the policy allows."""
        if site in self.values:
            return self.values[site]
        sites = self.lowering.sites
        inputs = [self.value(name) if name in sites else self.read(name) for name in site.spec.reads]
        value = self.evaluate(site, inputs)
        if site.spec.cache != "never":
            self.values[site] = value
        return value

    def evaluate(self, site: Site, inputs: Sequence[Any]) -> Any:
        """Write one evaluation of `site`."""
        return self.graph.create_node("call_module", self.lowering.paths[site], tuple(inputs))

    def read(self, target: str) -> fx.Node:
        """Return the node that reads an attribute of the model."""
        if target not in self.reads:
            self.reads[target] = self.graph.create_node("get_attr", target)
        return self.reads[target]

    def _call(self, node: fx.Node) -> fx.Node:
        module = self.lowering.module(node.target)
        argument = self._arguments_of()
        args, kwargs = map_arg(node.args, argument), map_arg(node.kwargs, argument)
        leaf = inlined_leaf(module)
        if leaf is not None:
            given = bind_call(module, args, kwargs)
            args, kwargs = (*given, *self._tensors_of(module, str(node.target), leaf)), {}
            written = self.graph.create_node("call_function", leaf.function, args, kwargs, node.name, node.type)
        else:
            kwargs = {**kwargs, PASSED: [self.evaluation(site) for site in called_sites(module)]}
            written = self.graph.create_node("call_module", node.target, args, kwargs, node.name, node.type)
        written.meta = dict(node.meta)
        return written

    def _tensors_of(self, module: nn.Module, path: str, leaf: LeafCall) -> Any:
        def tensor(argument: Any) -> Any:
            if not isinstance(argument, Own):
                return argument
            target = f"{path}.{argument.name}"
            if target in self.lowering.sites:
                return self.value(target)
            return self.read(target) if _is_there(module, argument.name) else None

        return map_aggregate(leaf.arguments, tensor)


def inlined_leaf(module: nn.Module) -> LeafCall | None:
    """Return the function call that reads all of the module's computed tensors; None if there is none."""
    call = None if has_hooks(module) else leaf_call(module)
    return call if call is not None and reads_every_site(module, call) else None


def _is_there(module: nn.Module, name: str) -> bool:
    """Say whether an attribute of a module, or of one below it, has a value: an optional bias is None."""
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    slots = next(s for s in (owner._parameters, owner._buffers, owner.__dict__) if attribute in s)
    return slots[attribute] is not None


def _verify(lowering: Lowering) -> None:
    lowering.graph.lint()
    for node in lowering.graph.nodes:
        if node.op == "get_attr" and node.target in lowering.sites:
            raise PassError(f"{node.target} is still read from its old place")
    for site, nodes in evaluations_of(lowering).items():
        if site.spec.cache != "never" and len(nodes) > 1:
            raise PassError(f"{site.spec.name} is evaluated {len(nodes)} times")


verify_pass = Pass("verify", lambda lowering: True, ensures=_verify)
