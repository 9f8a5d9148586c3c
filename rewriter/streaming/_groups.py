"""Which plain tensors a checkpoint stands for: those it stores, and those that chains compute from what it stores."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch

from rewriter.context import Contexts
from rewriter.errors import ModelFileError, PlanError
from rewriter.language import Spec
from rewriter.planning import Entry, resolve
from rewriter.planning._build import build, describe
from rewriter.planning._chain import BuildError, Chain
from rewriter.planning._prepare import reads_of
from rewriter.sites import CONTAINER, Site
from rewriter.streaming._checkpoint import FORMS, Checkpoint
from rewriter.streaming._header import Stored
from rewriter.streaming._table import entry_of

_KEY = re.compile(rf"((?:.+?\.)??){CONTAINER}\.([^.]+)\.(.+)")
Form = tuple[tuple[int, ...], torch.dtype]


@dataclass
class Group:
    """What a checkpoint stores of one tensor.

    Arguments:
        names: the tensor's, more than one if it is tied.
        state: the stored tensors, by the names that they have in the site. A plain tensor has the one name ``""``.
    """

    names: list[str]
    state: dict[str, Stored]

    @property
    def plain(self) -> bool:
        """Whether the value itself is stored."""
        return "" in self.state

    @property
    def form(self) -> dict[str, Form]:
        """Shapes and dtypes of the stored tensors."""
        return {name: (stored.shape, stored.dtype) for name, stored in self.state.items()}


def groups_of(checkpoint: Checkpoint) -> dict[str, Group]:
    """Return the stored tensors by the plain tensor that they belong to, in the order of the files.

    A tensor that is stored under several names is one group with several names.
    """
    found: dict[str, Group] = {}
    keys: dict[str, Stored] = dict(checkpoint.tensors)
    keys.update({alias: checkpoint.tensors[kept] for alias, kept in checkpoint.aliases.items()})
    for key, stored in keys.items():
        match = _KEY.fullmatch(key)
        name, part = (match[1] + match[2], match[3]) if match else (key, "")
        found.setdefault(name, Group([name], {})).state[part] = stored
    once: dict[tuple[tuple[str, str], ...], Group] = {}
    for name, group in found.items():
        first = once.setdefault(tuple((part, stored.name) for part, stored in sorted(group.state.items())), group)
        if first is not group:
            first.names.append(name)
    for name, group in found.items():
        if group.plain and len(group.state) > 1:
            raise ModelFileError(f"{checkpoint.path} has {name!r} as a plain tensor and as {CONTAINER} of it")
    return {group.names[0]: group for group in once.values()}


def entries_of(checkpoint: Checkpoint, groups: Mapping[str, Group], spec: Spec) -> list[Entry]:
    """Return the plain tensors: stored, recorded by `apply`, or with the form from which the spec's chain stores this.

    Raises:
        PlanError: no rule of the spec computes a tensor from what is stored for it.
        ModelFileError: the record of a tensor is damaged.
    """
    entries = {
        name: entry_of(group.names, group.state[""].shape, group.state[""].dtype)
        for name, group in groups.items()
        if group.plain
    }
    entries |= {entry.name: entry for members in recorded_forms(checkpoint).values() for entry in members}
    waiting = {name: group for name, group in groups.items() if name not in entries}
    while waiting:
        made = {name: entry for name, group in waiting.items() if (entry := _entry(group, spec, entries)) is not None}
        if not made:
            raise PlanError(_unknown(checkpoint, list(waiting)))
        entries.update(made)
        waiting = {name: group for name, group in waiting.items() if name not in made}
    order = {name: index for index, name in enumerate(groups)}
    return sorted(entries.values(), key=lambda entry: order.get(entry.name, len(order)))


def recorded_forms(checkpoint: Checkpoint) -> dict[str, list[Entry]]:
    """Return the computed tensors that `apply` recorded, by the first name of each site.

    Raises:
        ModelFileError: the record of a tensor is damaged.
    """
    found: dict[str, list[Entry]] = {}
    for name, record in checkpoint.recorded(FORMS).items():
        try:
            found[name] = [
                entry_of(one["names"], tuple(map(int, one["shape"])), getattr(torch, one["dtype"])) for one in record
            ]
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as problem:
            raise ModelFileError(f"{checkpoint.path}: the record of {name!r} is damaged") from problem
    return found


def _unknown(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"{checkpoint.path}: no rule of the spec computes {shown} from what is stored under {CONTAINER}; give the spec "
        "that the model was rewritten with, and if it is that one, the model: --model package.module:factory"
    )


def _entry(group: Group, spec: Spec, known: Mapping[str, Entry]) -> Entry | None:
    for shape, dtype in _candidates(group):
        entry = entry_of(group.names, shape, dtype)
        site = _site(entry, spec, known)
        # Other shapes may be reshaped to the same: what is stored does not tell which was.
        unclear = site is not None and not site.spec.layout.plain and not site.spec.outer
        if site is not None and not unclear and stored_form(site) == group.form:
            return entry
    return None


def stored_form(site: Site) -> dict[str, Form]:
    """Return shapes and dtypes of what a state dict has of a site."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in site.state_dict().items()}


@torch.no_grad()
def _site(entry: Entry, spec: Spec, known: Mapping[str, Entry]) -> Site | None:
    """Return the site that the spec would put in the place of a tensor."""
    claims, _ = resolve(spec, [entry])
    for claim in claims:
        inputs = {name: known[name].tensor for name in reads_of(claim.rule) if name in known}
        if len(inputs) < len(set(reads_of(claim.rule))):
            continue
        try:
            with torch.random.fork_rng(devices=[]):
                chain = Chain(claim, {name: tensor for name, tensor in inputs.items() if tensor is not None})
                return build(claim, describe(claim.rule), Contexts(), chain=chain)
        except BuildError:
            continue
    return None


def _candidates(group: Group) -> Iterator[Form]:
    """Yield the forms that the plain tensor may have, the likely ones first."""
    originals = [stored for part, stored in sorted(group.state.items()) if re.fullmatch(r"original\d*", part)]
    stored = [*originals, *(one for one in group.state.values() if one not in originals)]
    dtypes = dict.fromkeys(one.dtype for one in stored)
    shapes: dict[tuple[int, ...], None] = {}
    with contextlib.suppress(ValueError):
        shapes[tuple(numpy.broadcast_shapes(*(one.shape for one in originals)))] = None
    shapes.update(dict.fromkeys(one.shape for one in originals))
    for one, other in itertools.permutations(originals, 2):
        if len(one.shape) >= 2 and len(other.shape) >= 2:
            (a, b), (c, d) = one.shape[-2:], other.shape[-2:]
            shapes.update(dict.fromkeys([(a, d), (a, c), (b, d), (a * c, b * d)]))
    yield from itertools.product(shapes, dtypes)
