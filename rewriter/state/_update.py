"""Arguments of a step changed while a model is trained."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter._bake import _chosen, _present
from rewriter._given import check_model
from rewriter.bindings import RewrittenModule
from rewriter.bindings.graph import lower_again, refuse_edited
from rewriter.context._fingerprint import settings_of
from rewriter.context._random import nothing_drawn
from rewriter.errors import RewriterError
from rewriter.language import Step, load_spec
from rewriter.parametrizations._registry import arguments_of, construct, names
from rewriter.sites import Chunked, Site
from rewriter.sites._bridge import copy_of
from rewriter.sites._steps import apply_steps


@dataclass
class _Change:
    """What an update does to one step, worked out before any step changes.

    Arguments:
        site: the site.
        index: of the step.
        shown: the step with its new arguments.
        settings: modules of the step with the attributes to set.
        buffers: buffers of the step with their new contents.
    """

    site: Site
    index: int
    shown: str
    settings: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def apply(self) -> None:
        """Change the step."""
        for module, settings in self.settings:
            module.__dict__.update(settings)
        for buffer, content in self.buffers:
            buffer.copy_(content)
        record, index = self.site.spec, self.index
        chain = (*record.chain[:index], self.shown, *record.chain[index + 1 :])
        self.site.spec = replace(record, chain=chain)
        self.site.hoisted, self.site.fused = 0, ()
        self.site.policy.invalidate()


def update(model: nn.Module, site_or_rule: str, **arguments: Any) -> None:
    """Change arguments of a step in place; its parameters, and the optimizer over them, stay.

    >>> import torch, rewriter
    >>> rule = {"name": "p", "select": "0.weight", "chain": [{"l1_unstructured": {"amount": 1}}]}
    >>> model = rewriter.rewrite(torch.nn.Sequential(torch.nn.Linear(3, 3)), {"reparam": 1, "rules": [rule]})
    >>> update(model, "p", amount=5)
    >>> int((rewriter.state.get_value(model, "0.weight") == 0).sum())
    5

    The step is constructed twice for the value that it gives now, with the old and with the new arguments. Attributes
    and buffers in which the two differ become those of the new one: a mask is chosen again, a scale or a probability
    changes. The new value follows from the same stored tensors.

    Arguments:
        model: a rewritten model, or one that contains rewritten models.
        site_or_rule: a rule's name, a glob of tensor names, or the label of a step.
        arguments: of the step, as in a spec. Exactly one step of each chain has to take them, or have the label.

    Raises:
        RewriterError: the step stores other tensors with these arguments, or was given as a module; the model is as it
            was.
    """
    check_model(model, "update", programs=False, wrapped=True)
    if not arguments:
        raise RewriterError(f"update needs at least one argument to change at {site_or_rule!r}")
    every = _present(model)
    labelled, sites = _chosen(every, [site_or_rule])
    steps = [(site, _one_step(site, arguments, site_or_rule)) for site in sites]
    steps += [(site, site.spec.labels.index(label)) for site, label in labelled]
    _refuse_partly_shared(every, steps)
    changes = [_change(site, index, arguments) for site, index in steps]
    graphs = [
        module for module in model.modules() if isinstance(module, RewrittenModule) and module.without is not None
    ]
    for graph in graphs:
        refuse_edited(graph)
    for change in changes:
        change.apply()
    for graph in graphs:
        if any(change.site in graph.sites for change in changes):
            lower_again(graph)


def _one_step(site: Site, arguments: Mapping[str, Any], chosen: str) -> int:
    """Return the index of the step that takes the arguments."""
    record = site.spec
    known = {index: _parameters(site, index) for index in range(len(record.chain))}
    taking = [index for index, taken in known.items() if arguments.keys() <= set(taken)]
    where = f"{record.name}: {' >> '.join(record.chain)}"
    wanted = ", ".join(arguments)
    if not taking:
        shown = "; ".join(f"{record.chain[index]} takes {', '.join(taken) or 'none'}" for index, taken in known.items())
        raise RewriterError(f"{where}: no step takes {wanted} ({shown})")
    if len(taking) > 1:
        raise RewriterError(
            f"{where}: several steps take {wanted}; label one of them in the spec, and give update the label in place "
            f"of {chosen!r}"
        )
    return taking[0]


def _parameters(site: Site, index: int) -> list[str]:
    step = _part(site.steps[index])
    try:
        found = _read(site, index, {}).factory
    except RewriterError:
        found = None
    return list(arguments_of(type(step) if found is None else found))


def _part(step: nn.Module) -> nn.Module:
    return step[0] if isinstance(step, Chunked) else step


def _read(site: Site, index: int, arguments: Mapping[str, Any]) -> Step:
    """Return a step of a site as the spec language reads it, with some arguments changed.

    Raises:
        RewriterError: the step has no name in the language, or does not take the arguments.
    """
    name, _, rest = site.spec.chain[index].partition("(")
    given = {**_arguments(rest.removesuffix(")")), **arguments}
    rule = {"name": "update", "select": "**", "chain": [{name: given}]}
    prefix, dot, _ = name.partition(".")
    imports = {prefix: type(_part(site.steps[index])).__module__} if dot and prefix not in ("torch", "geotorch") else {}
    return load_spec({"reparam": 1, "imports": imports, "rules": [rule]}).rules[0].chain[0]


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments that a printed step shows.

    >>> _arguments("map=cayley, dims=(0, 1), eps=1e-12, dim=None")
    {'map': 'cayley', 'dims': (0, 1), 'eps': 1e-12, 'dim': None}
    """
    found: dict[str, Any] = {}
    for part in _top_level(text):
        key, _, shown = part.partition("=")
        try:
            found[key.strip()] = ast.literal_eval(shown)
        except (ValueError, SyntaxError):
            found[key.strip()] = shown
    return found


def _top_level(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets."""
    depth, start = 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            yield text[start:index]
            start = index + 1
    if text[start:].strip():
        yield text[start:]


def _refuse_partly_shared(every: Mapping[Site, Any], steps: Sequence[tuple[Site, int]]) -> None:
    changed = {id(site) for site, _ in steps}
    modules = {id(site.steps[index]): site for site, index in steps}
    for other in every:
        shared = next((modules[id(step)] for step in other.steps if id(step) in modules), None)
        if shared is not None and id(other) not in changed:
            raise RewriterError(
                f"{shared.spec.name} has a step that it shares (`share: true`) with {other.spec.name}: update the "
                f"rule {shared.spec.rule!r} as a whole"
            )


@torch.no_grad()
def _change(site: Site, index: int, arguments: Mapping[str, Any]) -> _Change:
    record, step = site.spec, site.steps[index]
    where = f"{record.name}: {record.chain[index]}"
    shown = ", ".join(f"{key}={value}" for key, value in arguments.items())
    name = record.chain[index].partition("(")[0]
    if record.rule.startswith("absorbed:"):
        raise RewriterError(f"{where} was absorbed, and its arguments are unknown: bake it, and rewrite it with a rule")
    if "." not in name and name not in names():
        raise RewriterError(
            f"{where} was given as a module from Python: set its attribute, then call rewriter.state.invalidate(model)"
        )
    old, new = _read(site, index, {}), _read(site, index, arguments)
    if new.factory is None or _is_planned(site, index, new.factory):
        raise RewriterError(
            f"{where}: its arguments are decided with all tensors and masks of the rule: bake it, and rewrite it"
        )
    change = _Change(site, index, str(new))
    parts = list(step) if isinstance(step, Chunked) else [step]
    values = _given_by(site, index)
    chunks = values.unbind(0) if isinstance(step, Chunked) else [values]
    for part, value in zip(parts, chunks, strict=True):
        try:
            made = [_made(one, value) for one in (old, new)]
        except Exception as problem:
            raise RewriterError(f"{where} cannot be changed to {shown}: {problem}") from problem
        _compare(change, f"{where} cannot be changed to {shown} in place", part, *made)
    if not change.settings and not change.buffers and old.arguments != new.arguments:
        raise RewriterError(
            f"{where}: {shown} only decides where a trained parameter starts; set the parameter, or assign a value "
            "with rewriter.state.set_value"
        )
    return change


def _is_planned(site: Site, index: int, factory: Any) -> bool:
    """Whether the rule decided the arguments of a step for all its sites, or after the masks beside it."""
    if not hasattr(factory, "plan_sites"):
        return False
    neighbours = [step for near, step in enumerate(site.steps) if abs(near - index) == 1]
    return getattr(factory, "plans_alone", True) or any(getattr(_part(step), "masks", False) for step in neighbours)


def _given_by(site: Site, index: int) -> Tensor:
    """Return the value that a step gives now, in evaluation mode."""
    clone = copy_of(site)
    with nothing_drawn():
        value = apply_steps(site.spec, clone.steps[: index + 1], clone.originals, site.read_inputs())
    first: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return first


def _made(step: Step, value: Tensor) -> nn.Module:
    assert step.factory is not None
    with nothing_drawn():
        return construct(step.factory, value, step.arguments)


def _compare(change: _Change, where: str, step: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Note in which attributes and buffers two steps differ; refuse ones that store other tensors."""
    stored = [{name: tensor.shape for name, tensor in _tensors(one)} for one in (old, new)]
    kinds = [{name: type(module) for name, module in one.named_modules()} for one in (old, new)]
    if stored[0] != stored[1] or kinds[0] != kinds[1]:
        differing = [name for name in {**stored[0], **stored[1]} if stored[0].get(name) != stored[1].get(name)]
        shapes = [f"{name} of shape {[list(one.get(name, ())) for one in stored]}" for name in differing]
        shown = ", ".join(shapes) or "of another class"
        raise RewriterError(
            f"{where}: the step would store other tensors (now and then: {shown}); bake it, and rewrite "
            "it with the new arguments"
        )
    modules, before = dict(step.named_modules()), dict(old.named_modules())
    for path, module in new.named_modules():
        own = settings_of(before[path])
        settings = {key: value for key, value in settings_of(module).items() if not _same(value, own.get(key))}
        if settings:
            change.settings.append((modules[path], settings))
    buffers, olds = dict(step.named_buffers()), dict(old.named_buffers())
    for name, buffer in new.named_buffers():
        if not torch.equal(buffer, olds[name]):
            change.buffers.append((buffers[name], buffer))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(type(one) is type(other) and one == other)
