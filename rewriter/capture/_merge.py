"""One graph of the two programs that torch.export makes of a model in train mode and in eval mode."""

from __future__ import annotations

import collections
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from rewriter._given import kind_of
from rewriter._torch import HigherOrderOperator, OpOverload, pytree
from rewriter.capture import _expectations as expectations
from rewriter.capture._examples import Call
from rewriter.errors import CaptureError

CONSTANT = "reparam_constant_"
"""How the names begin of the buffers for tensors that a forward writes as numbers."""

_PLAIN = (tuple, list, dict)


class Differs(Exception):
    """Train mode and eval mode do different things."""


class Merging:
    """Writes two programs into one graph, in which ``self.training`` decides where they differ.

    Arguments:
        model: the model.
        call: the example inputs.
        program: the program in the mode that the model is in.
    """

    def __init__(self, model: nn.Module, call: Call, program: ExportedProgram) -> None:
        self.model = model
        self.call = call
        self.program = program
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.reads: dict[str, fx.Node] = {}
        self.leaves: list[fx.Node] = []

    def graph_of(self, first: ExportedProgram, second: ExportedProgram | None) -> fx.Graph:
        """Return the graph of `first`, the program in train mode, and of `second`, the one in eval mode."""
        self._make_inputs()
        env = self._placeholders(first)
        other = None if second is None else self._placeholders(second)
        if second is None:
            flag = self._read("training")
            self.graph.call_function(expectations.expect_mode, (flag, bool(self.model.training)))
            nodes: Any = None
        else:
            nodes = list(second.graph.nodes)
        results = self._body(first.graph_module, list(first.graph.nodes), env, second, nodes, other)
        self._output(first, results)
        self.graph.lint()
        return self.graph

    def _make_inputs(self) -> None:
        signature = inspect.signature(self.model.forward)
        try:
            bound = signature.bind(*self.call.args, **self.call.kwargs)
        except TypeError as problem:
            raise CaptureError(
                f"the example inputs do not fit {type(self.model).__name__}.forward: {problem}"
            ) from None
        inputs: dict[str, fx.Node] = {}
        absent: list[tuple[fx.Node, Any]] = []
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if name in bound.arguments:
                    raise CaptureError(f"capture='export' needs arguments with names; {name} has none")
                continue
            if name not in bound.arguments:
                inputs[name] = self.graph.placeholder(name, default_value=parameter.default)
                absent.append((inputs[name], parameter.default))
            elif absent:
                inputs[name] = self.graph.placeholder(name, default_value=None)
            else:
                inputs[name] = self.graph.placeholder(name)
        for node, default in absent:
            self.graph.call_function(expectations.expect_value, (node, default, str(node.target)))
        names = list(bound.arguments)
        flat, _ = pytree.tree_flatten_with_path((tuple(self.call.args), dict(self.call.kwargs)))
        for path, _leaf in flat:
            key = path[1]
            name = names[key.idx] if isinstance(key, pytree.SequenceKey) else key.key  # type: ignore[attr-defined]
            self.leaves.append(self._leaf(inputs[name], path[2:]))

    def _leaf(self, node: fx.Node, path: Sequence[Any]) -> fx.Node:
        for key in path:
            if isinstance(key, pytree.SequenceKey):
                node = self.graph.call_function(operator.getitem, (node, key.idx))
            elif isinstance(key, pytree.MappingKey):
                node = self.graph.call_function(operator.getitem, (node, key.key))
            else:
                raise CaptureError(f"capture='export' takes tensors in lists, tuples and dicts, not {key}")
        return node

    def _placeholders(self, program: ExportedProgram) -> dict[str, Any]:
        env: dict[str, Any] = {}
        leaves = iter(self.leaves)
        nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        for spec in program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                env[node.name] = leaf = next(leaves)
                if program is self.program:
                    self._expect(leaf, node, spec.arg)
            elif node.users:
                env[node.name] = self._stored(program, spec.kind, str(spec.target))
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
            raise CaptureError("the exported program returns changes of its inputs or buffers, which is not supported")
        return env

    def _expect(self, leaf: fx.Node, node: fx.Node, argument: Any) -> None:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shape = [_fixed(size) for size in value.shape]
            self.graph.call_function(expectations.expect_shape, (leaf, shape, node.name))
        elif hasattr(argument, "value"):
            self.graph.call_function(expectations.expect_value, (leaf, argument.value, node.name))

    def _stored(self, program: ExportedProgram, kind: InputKind, target: str) -> fx.Node:
        if kind in (InputKind.PARAMETER, InputKind.BUFFER):
            return self._read(target)
        tensor = program.constants[target]
        if not isinstance(tensor, Tensor):
            raise CaptureError(f"the model holds {target}, {kind_of(tensor)}, which is no tensor")
        name = CONSTANT + "".join(letter if letter.isalnum() else "_" for letter in target)
        self.constants[name] = tensor
        return self._read(name)

    def _read(self, target: str) -> fx.Node:
        if target not in self.reads:
            self.reads[target] = self.graph.create_node("get_attr", target)
        return self.reads[target]

    def _body(self, owner: Any, nodes: list[fx.Node], env: dict[str, Any], second: Any, others: Any, other: Any) -> Any:
        """Copy the nodes of one graph, merged with those of another one; return the results of the first one."""
        rest = collections.deque(node for node in others or () if node.op not in ("placeholder", "get_attr"))
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            if others and _is_counter(node) and not (rest and _same_counter(node, rest[0], env, other)):
                flag = self._flag(node)
                amount = (flag, self._merged(node, node.args[0], None, env, None), node.args[1])
                self.graph.call_function(expectations.add_in_training, amount)
                continue
            while others and rest and _is_layout(rest[0]) and not _is_layout(node):
                self._lay_out(rest.popleft(), other, env)
            if others and _is_layout(node) and not (rest and _is_layout(rest[0])):
                self._lay_out(node, env, other)
                continue
            twin = rest.popleft() if rest else None
            if others and (twin is None or (twin.op, _name(twin)) != (node.op, _name(node))):
                raise Differs(f"train mode calls {_name(node)} where eval mode calls {twin and _name(twin)}")
            if node.op == "output":
                return self._merged(node, node.args[0], twin and twin.args[0], env, other)
            if isinstance(node.target, HigherOrderOperator):
                self._region(owner, node, env, second, twin, other)
                continue
            if node.target is operator.getitem and type(env[node.all_input_nodes[0].name]) is tuple:
                results: Any = self._merged(node, node.args[0], twin and twin.args[0], env, other)
                index: Any = node.args[1]
                env[node.name] = results[index]
                if twin is not None:
                    other[twin.name] = env[node.name]
                continue
            if twin is not None and (len(node.args) != len(twin.args) or node.kwargs.keys() != twin.kwargs.keys()):
                _spell_out(node)
                _spell_out(twin)
            args = self._merged(node, node.args, twin and twin.args, env, other)
            kwargs = self._merged(node, node.kwargs, twin and twin.kwargs, env, other)
            copied = self.graph.create_node(node.op, node.target, tuple(args), kwargs, node.name)
            env[node.name] = copied
            if twin is not None:
                other[twin.name] = copied
        return None

    def _lay_out(self, node: fx.Node, env: dict[str, Any], other: dict[str, Any]) -> None:
        """Copy a change of layout that only one of the graphs has, for both."""
        before = env[node.all_input_nodes[0].name]
        env[node.name] = after = self.graph.create_node(node.op, node.target, (before, *node.args[1:]), node.kwargs)
        other.update({name: after for name, value in other.items() if value is before})

    def _region(
        self, owner: Any, node: fx.Node, env: dict[str, Any], second: Any, twin: fx.Node | None, other: Any
    ) -> None:
        """Write the operations of a ``no_grad`` block into the graph, between two changes of the grad mode."""
        if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled":
            raise CaptureError(
                f"the graph has a region of its own kind ({getattr(node.target, '__name__', node.target)}), "
                "which cannot be rewritten; use capture='module'"
            )
        enabled, inner, *operands = node.args
        body = getattr(owner, str(inner.target))  # type: ignore[union-attr]
        inside = dict(zip((n.name for n in body.graph.find_nodes(op="placeholder")), operands, strict=True))
        first = {name: env[read.name] for name, read in inside.items()}
        their_nodes, theirs, their_body = None, None, None
        if twin is not None:
            _, their_inner, *their_operands = twin.args
            their_body = getattr(second.graph_module if hasattr(second, "graph_module") else second,
                                 str(their_inner.target))  # type: ignore[union-attr]  # fmt: skip
            their_nodes = list(their_body.graph.nodes)
            names = (n.name for n in their_body.graph.find_nodes(op="placeholder"))
            theirs = {name: other[read.name] for name, read in zip(names, their_operands, strict=True)}  # type: ignore[union-attr]
        before = self.graph.call_function(expectations.begin_grad_mode, (enabled,))
        results = self._body(body, list(body.graph.nodes), first, their_body, their_nodes, theirs)
        self.graph.call_function(expectations.end_grad_mode, (before,))
        env[node.name] = tuple(results)
        if twin is not None:
            other[twin.name] = env[node.name]

    def _merged(self, node: fx.Node, one: Any, two: Any, env: dict[str, Any], other: Any) -> Any:
        if isinstance(one, fx.Node):
            found = env[one.name]
            if other is not None and (not isinstance(two, fx.Node) or other[two.name] != found):
                raise Differs(f"{node.name} takes other values in train mode than in eval mode")
            return found
        if isinstance(one, (tuple, list)):
            if other is not None and (not isinstance(two, (tuple, list)) or len(two) != len(one)):
                raise Differs(f"{node.name} takes other arguments in train mode than in eval mode")
            parts = [
                self._merged(node, part, None if other is None else two[i], env, other) for i, part in enumerate(one)
            ]
            return tuple(parts) if isinstance(one, tuple) else parts
        if isinstance(one, dict):
            if other is not None and (not isinstance(two, dict) or list(two) != list(one)):
                raise Differs(f"{node.name} takes other arguments in train mode than in eval mode")
            return {
                key: self._merged(node, part, None if other is None else two[key], env, other)
                for key, part in one.items()
            }
        if other is None or (type(one) is type(two) and one == two):
            return one
        if isinstance(two, fx.Node):
            raise Differs(f"{node.name} takes other arguments in train mode than in eval mode")
        flag = self._flag(node)
        if one is True and two is False:
            return flag
        return self.graph.call_function(expectations.by_mode, (flag, one, two))

    def _flag(self, node: fx.Node) -> fx.Node:
        """Return the node that reads the training flag of the module which an operation belongs to."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0].split("@")[0] if stack else ""
        try:
            self.model.get_submodule(path)
        except AttributeError:
            path = ""
        # The flag of the module itself, since modes of submodules may be set on their own.
        return self._read(f"{path}.training" if path else "training")

    def _output(self, program: ExportedProgram, results: Any) -> None:
        spec = program.call_spec.out_spec
        assert spec is not None
        if _is_plain(spec):
            self.graph.output(pytree.tree_unflatten(list(results), spec))
            return
        try:
            structure = pytree.treespec_dumps(spec)
        except Exception as problem:
            raise CaptureError(f"the model returns a structure that torch has no name for: {problem}") from problem
        self.graph.output(self.graph.call_function(expectations.rebuild, (list(results), structure)))


def _fixed(size: Any) -> int | None:
    """Return a size that is fixed, also if it was to vary and the forward fixes it; None if it varies."""
    if isinstance(size, int):
        return size
    found = size.node.shape_env.simplify(size.node.expr)
    return int(found) if found.is_number else None


def _is_counter(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.add_.Tensor and not node.users and isinstance(node.args[1], int)


def _same_counter(node: fx.Node, twin: fx.Node, env: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether eval mode counts as well, as a forward's own counter does and a batch norm's does not."""
    if not _is_counter(twin) or twin.args[1] != node.args[1]:
        return False
    mine, theirs = node.all_input_nodes[0], twin.all_input_nodes[0]
    return env[mine.name] is other[theirs.name]


def _is_layout(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.contiguous.default


def _spell_out(node: fx.Node) -> None:
    """Write the default arguments of an operation: torch.export leaves out a dropout of 0."""
    if not isinstance(node.target, OpOverload):
        return
    args, kwargs = list(node.args), dict(node.kwargs)
    for argument in node.target._schema.arguments[len(args) :]:
        if not argument.has_default_value() and argument.name not in kwargs:
            return
        value = kwargs.pop(argument.name, argument.default_value)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    node.args, node.kwargs = tuple(args), kwargs


def _name(node: fx.Node) -> str:
    return str(node.target)


def _is_plain(spec: Any) -> bool:
    return spec.is_leaf() or (spec.type in _PLAIN and all(map(_is_plain, spec.children())))
