"""bake for ExportedPrograms: the chains go out of the graph again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from rewriter._originals import NOTHING_COMPUTED, check_originals
from rewriter.errors import PlanError
from rewriter.language._glob import Glob
from rewriter.parametrizations._registry import suggestion
from rewriter.program._insert import Edited, _fake
from rewriter.program._recognise import sites_of_program, unknown_chains
from rewriter.program._sites import ProgramSite, evaluate, note, placeholder_values


def bake_program(
    program: ExportedProgram, *, only: Sequence[str] | None = None, keep: str = "value", inplace: bool = False
) -> ExportedProgram:
    """Return the program with its computed tensors as plain ones; see `rewriter.bake`.

    Raises:
        PlanError: a pattern of `only` matches nothing, there is no original to put back, or a chain is not known.
    """
    sites = sites_of_program(program)
    unknown = unknown_chains(program, sites) if only is None else {}
    if unknown:
        raise PlanError(
            f"{', '.join(unknown)} of the program cannot be baked: {'; '.join(dict.fromkeys(unknown.values()))}. "
            "Use bake on the model, in eval mode, and export what it returns"
        )
    if not sites:
        warnings.warn(NOTHING_COMPUTED.format("bake"), stacklevel=5)
    chosen = _chosen(sites, only)
    edited = Edited(program, share=inplace)
    known = placeholder_values(program)
    values = {site.name: evaluate(program, site, known) for site in sites}
    if keep == "original":
        values.update({site.name: _originals(site, known) for site in chosen})
    left = {slot.name: slot.before for site in sites for member in site.members for slot in member.slots}
    for site in reversed(chosen):
        _restore(edited, site, values[site.name], left)
    return edited.finish()


def _chosen(sites: list[ProgramSite], only: Sequence[str] | None) -> list[ProgramSite]:
    if only is None:
        return sites
    chosen: dict[int, ProgramSite] = {}
    for pattern in [only] if isinstance(only, str) else only:
        glob = Glob(pattern)
        found = [site for site in sites if site.rule == pattern or any(map(glob.matches, site.names))]
        labelled = [site for site in sites if pattern in site.labels and site not in found]
        for site in labelled:
            if len(site.chain) > 1:
                raise PlanError(
                    f"only={pattern!r} is one step of {' >> '.join(site.chain)}, which computes {site.name}; a program "
                    "is baked by whole chains: name the rule or the tensor, or bake the step before it is exported"
                )
        found += labelled
        if not found:
            rules = sorted({site.rule for site in sites})
            names = [name for site in sites for name in (*site.names, *filter(None, site.labels))]
            raise PlanError(
                f"only={pattern!r} is neither a rule or label of the program nor matches a parametrized tensor; "
                f"its rules are {', '.join(map(repr, rules)) or 'none'}" + suggestion(pattern, [*rules, *names])
            )
        chosen.update((id(site), site) for site in found)
    return [site for site in sites if id(site) in chosen]


def _originals(site: ProgramSite, known: dict[str, Tensor]) -> list[Tensor]:
    originals = [known[name] for name in site.originals]
    check_originals(site.name, site.chain, originals, site.members)
    return originals


def _restore(edited: Edited, site: ProgramSite, values: Sequence[Tensor], left: dict[str, str]) -> None:
    names = set(site.names)
    nodes = {node.name: node for node in edited.graph.nodes}
    trained = any(
        isinstance(tensor := edited.state.get(str(spec.target)), nn.Parameter) and tensor.requires_grad
        for spec in edited.specs
        if spec.arg.name in site.originals
    )
    for member, value in zip(site.members, values, strict=True):
        grad = member.requires_grad if site.frozen or not site.originals else trained
        with torch.inference_mode(False):
            plain = value.detach().clone(memory_format=torch.contiguous_format)
            tensor = nn.Parameter(plain, grad) if member.kind == "parameter" else plain
        by_user = {name: slot for slot in member.slots for name in slot.used}
        reads: dict[str, fx.Node] = {}
        for slot in reversed(member.slots):
            reads[slot.name] = _placeholder(edited, slot.name, slot.before, tensor, left)
            persistent = member.persistent if member.kind == "buffer" else None
            _specify(edited, reads[slot.name], slot.target, member.kind, persistent)
            held = edited.state if member.kind == "parameter" or member.persistent else edited.constants
            held[slot.target] = tensor
        computed = nodes[member.value]
        for user in list(computed.users):
            slot = by_user.get(user.name, member.slots[0])
            if note(user).get("part") not in names:
                user.replace_input_with(computed, reads[slot.name])
    _erase(edited, site)


def _placeholder(edited: Edited, name: str, before: str, tensor: Tensor, left: dict[str, str]) -> fx.Node:
    node: fx.Node
    placeholders = edited.placeholders()
    while before and before not in placeholders and before in left:
        before = left[before]
    anchor = placeholders.get(before)
    if anchor is None:
        last = list(placeholders.values())[-1]
        with edited.graph.inserting_after(last):
            node = edited.graph.placeholder(name)
    else:
        with edited.graph.inserting_before(anchor):
            node = edited.graph.placeholder(name)
    node.name = name
    node.target = name
    node.meta["val"] = _fake(edited, tensor)
    return node


def _specify(edited: Edited, node: fx.Node, target: str, kind: str, persistent: bool | None) -> None:
    order = [placeholder.name for placeholder in edited.graph.find_nodes(op="placeholder")]
    spec = InputSpec(
        InputKind.PARAMETER if kind == "parameter" else InputKind.BUFFER,
        TensorArgument(node.name),
        target,
        persistent,
    )
    edited.specs.insert(order.index(node.name), spec)


def _erase(edited: Edited, site: ProgramSite) -> None:
    names = set(site.names)
    for node in reversed(list(edited.graph.nodes)):
        ours = note(node).get("part") in names or ("site" in note(node) and node.name == site.members[0].value)
        if ours:
            target, op = str(node.target), node.op
            edited.graph.erase_node(node)
            if op == "get_attr" and not edited.graph.find_nodes(op="get_attr", target=target):
                delattr(edited.module, target)
    for name in (*site.aliases, *site.stored):
        node = edited.placeholders()[name]
        edited.graph.erase_node(node)
        spec = next(spec for spec in edited.specs if spec.arg.name == name)
        edited.specs.remove(spec)
        edited.state.pop(str(spec.target), None)
        edited.constants.pop(str(spec.target), None)
