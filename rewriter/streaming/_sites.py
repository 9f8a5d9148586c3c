"""One site of a checkpoint with its tensors in memory: loaded from what is stored, or built from the plain tensors."""

from __future__ import annotations

import dataclasses
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter._torch import TorchDispatchMode
from rewriter.context import Contexts
from rewriter.errors import ModelFileError, NumericError, PlanError
from rewriter.passes import fuse, hoist
from rewriter.planning import Entry
from rewriter.planning._build import build, describe
from rewriter.planning._chain import BuildError, Chain
from rewriter.planning._plan import Pair
from rewriter.planning._prepare import reads_of
from rewriter.planning._resolve import Claim
from rewriter.planning._together import planned_together
from rewriter.sites import Site
from rewriter.streaming._checkpoint import read_tensor
from rewriter.streaming._groups import Group
from rewriter.streaming._header import Stored

_drawing = threading.Lock()


class _Drawing(TorchDispatchMode):
    """What this thread draws depends on a name alone, although torch has one generator for all threads.

    An operation that draws runs alone, with the generator in the state that this thread's last draw left.
    """

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = torch.Generator().manual_seed(zlib.crc32(name.encode())).get_state()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **(kwargs or {}))
        with _drawing, torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            drawn = function(*args, **(kwargs or {}))
            self.state = torch.get_rng_state()
            return drawn


@dataclass(frozen=True)
class Sources:
    """Where the values of the plain tensors come from.

    Arguments:
        groups: what the checkpoint stores, by the tensor's first name.
        pairs: claims and their sites without values, by each name of a computed tensor.
        entries: the plain tensors by each of their names.
    """

    groups: Mapping[str, Group]
    pairs: Mapping[str, Pair]
    entries: Mapping[str, Entry]

    def tensor(self, name: str) -> Tensor:
        """Return the value of a plain tensor, evaluated if a chain computes it."""
        first = self.entries[name].name
        if first in self.pairs:
            claim, _ = self.pairs[first]
            return self.values(self.pairs[first])[[entry.name for entry in claim.entries].index(first)]
        return read_tensor(self.groups[first].state[""])

    def inputs_of(self, pair: Pair) -> list[Stored]:
        """Return the stored tensors that a site is evaluated from, those of the sites that it reads included."""
        claim, site = pair
        found = [stored for entry in claim.entries for stored in self._stored(entry.name)]
        for name in site.spec.reads:
            first = self.entries[name].name
            found += self.inputs_of(self.pairs[first]) if first in self.pairs else self._stored(first)
        return list(dict.fromkeys(found))

    def _stored(self, name: str) -> list[Stored]:
        return list(self.groups[name].state.values()) if name in self.groups else []

    @torch.no_grad()
    def values(self, pair: Pair) -> list[Tensor]:
        """Return what a site computes in evaluation mode, one tensor for each of its members."""
        claim, _ = pair
        site = self.site(pair)
        hoist([site])  # as in a model: steps that merge are evaluated as one
        fuse([site])
        try:
            value = site.settled().evaluate(*map(self.tensor, site.spec.reads))
        except Exception as problem:
            raise NumericError(f"{claim.name}: {' >> '.join(site.spec.chain)} cannot be evaluated: {problem}") from None
        return [value] if len(site.spec.members) == 1 else list(value)

    def site(self, pair: Pair) -> Site:
        """Return a site over tensors in memory."""
        claim, _ = pair
        group = self.groups.get(claim.name)
        if group is not None and not group.plain:
            return self._loaded(pair, group)
        tensors = {
            entry.name: read_tensor(self.groups[entry.name].state[""]) if entry.name in self.groups else _numbers(entry)
            for entry in claim.entries
        }
        return _built(claim, tensors, {name: self.tensor(name) for name in reads_of(claim.rule)})

    def _loaded(self, pair: Pair, group: Group) -> Site:
        claim, site = pair
        clone = site.settled()
        state = {part: read_tensor(stored) for part, stored in group.state.items()}
        if any(tensor.is_meta for name, tensor in clone.named_buffers() if name not in state):
            # What no state dict has follows from the form of the tensor: any values do.
            random = {e.name: _numbers(e) for e in claim.entries}
            clone = _built(claim, random, {name: _numbers(self.entries[name]) for name in reads_of(claim.rule)})
        clone.load_state_dict(state, assign=True)
        return clone


def _numbers(entry: Entry) -> Tensor:
    assert entry.tensor is not None
    dtype = entry.tensor.dtype
    return torch.randn(entry.tensor.shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.no_grad()
def _built(claim: Claim, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Site:
    """Build a site from the values of its tensors. What constructors draw depends on the tensor's name alone."""
    entries = [dataclasses.replace(entry, tensor=tensors.get(entry.name, entry.tensor)) for entry in claim.entries]
    own = Claim(claim.rule, entries)
    try:
        with _Drawing(claim.name):
            chain = planned_together([own], inputs).get(id(own)) or Chain(own, inputs, copies=False)
            return build(own, describe(claim.rule), Contexts(), chain=chain)
    except BuildError as problem:
        text = f"rule {claim.rule.name!r} on {claim.name}: {problem}"
        raise PlanError.of([claim.rule.where("chain").diagnose(text)]) from problem


def check_stored(pair: Pair, group: Group, form: Mapping[str, object]) -> None:
    """Refuse stored tensors that are not those of the site.

    Raises:
        ModelFileError: says which are missing, left over, or of another form.
    """
    claim, site = pair
    if dict(form) == dict(group.form):
        return
    missing, more = sorted(form.keys() - group.form.keys()), sorted(group.form.keys() - form.keys())
    texts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has also {', '.join(more)}"] * bool(more)
    texts += [
        f"has {name} as {group.form[name]}, not {wanted}"
        for name, wanted in form.items()
        if name in group.form and group.form[name] != wanted
    ]
    raise ModelFileError(
        f"the checkpoint does not store what {' >> '.join(site.spec.chain)} by rule {site.spec.rule!r} computes "
        f"{claim.name} from: it {'; it '.join(texts)}"
    )
