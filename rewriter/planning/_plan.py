"""The plan: which rule owns which tensors, how each is captured, how far its value moves, and the built sites."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rewriter._copy import copied
from rewriter._frozen import trained_rest
from rewriter._html import html_table
from rewriter.capture import Capture
from rewriter.errors import PlanError, listing
from rewriter.language import Spec
from rewriter.planning._build import Measures
from rewriter.planning._gates import gates_hint
from rewriter.planning._module_table import ModuleTable
from rewriter.planning._origin import Origin
from rewriter.planning._resolve import Claim
from rewriter.planning._survey import Entry
from rewriter.planning._table import TensorTable
from rewriter.sites import Site, SiteSpec, site_path


@dataclass(frozen=True)
class PlannedSite:
    """One site of a plan.

    Arguments:
        spec: names, rule, chain and everything else that decides the value.
        capture: how the model's uses of the tensor are reached: ``"graph"``, ``"inlined"``, ``"called"``, ``"module"``,
            ``"export"`` or ``"unused"``.
        why: the reason for that capture, in words.
        moved: ‖new − old‖ / ‖old‖ of the value when the chain is put on; ``None`` where it has no meaning
            (`unsafe` shapes, tensors without values).
        zeros: which part of the entries of the value is zero.
        present: whether the model has this parametrization already.
        fused: the first and the last of neighbouring steps that are evaluated as one, counted from one.
    """

    spec: SiteSpec
    capture: str
    why: str
    moved: float | None
    present: bool = False
    fused: tuple[tuple[int, int], ...] = ()
    zeros: float | None = None

    @property
    def name(self) -> str:
        """The site's first name."""
        return self.spec.name

    @property
    def names(self) -> tuple[str, ...]:
        """All tied names."""
        return self.spec.names

    @property
    def rule(self) -> str:
        """Name of the rule that owns the site."""
        return self.spec.rule

    @property
    def chain(self) -> tuple[str, ...]:
        """The steps, left to right."""
        return self.spec.chain

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) tensor."""
        return self.spec.members[0].shape

    def to_dict(self) -> dict[str, Any]:
        """Return the site as JSON data."""
        member = self.spec.members[0]
        return {
            "name": self.name,
            "names": list(self.names),
            "members": [list(member.names) for member in self.spec.members],
            "rule": self.rule,
            "chain": list(self.chain),
            "shape": list(self.shape),
            "dtype": member.dtype,
            "kind": member.kind,
            "cache": self.spec.cache,
            "capture": self.capture,
            "why": self.why,
            "moved": self.moved,
            "zeros": self.zeros,
            "present": self.present,
            "fused": [list(group) for group in self.fused],
            "trainable": self.spec.trainable,
        }


Pair = tuple[Claim, Site]


@dataclass(frozen=True, eq=False)
class Plan:
    """What `rewrite` does to a model. The sites are built and proven; the model is as it was.

    A plan prints as a table, iterates over its sites and has them as JSON data (`to_dict`). `rewrite(model, plan)`
    executes it.

    Arguments:
        spec: the rules.
        table: the tensors of the model.
        capture: the captured graph, or the reason why there is none.
        new: claims with the sites built for them, each before the sites that it reads.
        present: claims on sites that the model has already.
        measures: what was measured of the value of each new site.
        origin: the model that was given to `plan`, with its fingerprint and the arguments.
    """

    spec: Spec
    table: TensorTable
    capture: Capture
    new: tuple[Pair, ...] = ()
    present: tuple[Pair, ...] = ()
    measures: Mapping[Site, Measures] = field(default_factory=dict)
    origin: Origin | None = None

    @property
    def model(self) -> Any:
        """The model that the plan works on: the given one, or its copy with what other tools did absorbed."""
        return self.table.model

    @property
    def entries(self) -> list[Entry]:
        """The model's tensors."""
        return self.table.entries

    @property
    def absorbed(self) -> Sequence[tuple[Entry, Site]]:
        """Sites of tensors that other tools computed."""
        return self.table.absorbed

    @property
    def existing(self) -> list[Site]:
        """The sites that the model has already, whether or not a rule of this spec owns them."""
        fresh = {id(site) for _, site in self.absorbed}
        sites = dict.fromkeys(entry.site for entry in self.entries if entry.site is not None)
        return [site for site in sites if id(site) not in fresh]

    @functools.cached_property
    def sites(self) -> tuple[PlannedSite, ...]:
        """The sites, in the model's order."""
        built = {id(claim.entries[0]): (site, False) for claim, site in self.new}
        built |= {id(claim.entries[0]): (site, True) for claim, site in self.present}
        built |= {id(entry): (site, False) for entry, site in self.absorbed}
        new = {site for _, site in self.new}
        sites = []
        for entry in self.entries:
            if id(entry) in built:
                site, present = built[id(entry)]
                how, why = self.table.reached(self.capture, site)
                fused = tuple((start + 1, stop) for start, stop in getattr(site, "fused", ()))
                moved, zeros = self.measures.get(site, Measures()) if site in new else Measures(0.0)
                sites.append(PlannedSite(site.spec, how, why, moved, present, fused, zeros))
        return tuple(sites)

    @functools.cached_property
    def frozen(self) -> tuple[str, ...]:
        """Names of the trained parameters that ``trainable: rewritten`` freezes; a checkpoint has no such."""
        if self.spec.trainable != "rewritten" or self.model is None:
            return ()
        sites = [site for _, site in (*self.present, *self.absorbed)]
        replaced = [entry.tensor for claim, _ in self.new for entry in claim.entries]
        replaced += [entry.tensor for entry, _ in self.absorbed]
        rest = trained_rest(self.model, sites, replaced)
        return tuple(f"{path}.{name}" if path else name for path, _, name, _ in rest)

    @functools.cached_property
    def added(self) -> tuple[str, ...]:
        """Names of the trained parameters that an optimizer built before ``rewrite(…, inplace=True)`` lacks."""
        names: list[str] = []
        for claim, site in self.new:
            kept = [_form(entry.tensor) for entry in claim.entries if isinstance(entry.tensor, nn.Parameter)]
            for name, parameter in site.named_parameters():
                if name in site.original_names and _form(parameter) in kept:
                    kept.remove(_form(parameter))
                elif parameter.requires_grad:
                    names.append(f"{site_path(site)}.{name}")
        return tuple(names)

    @functools.cached_property
    def by_name(self) -> dict[str, PlannedSite]:
        """The sites by each of their names."""
        return {name: site for site in self.sites for name in site.names}

    @property
    def source(self) -> str:
        """The spec's file name."""
        return self.spec.source

    @property
    def root(self) -> str:
        """How the model as a whole is captured: ``"graph"``, ``"module"`` or ``"export"``."""
        return self.capture.root

    @property
    def why(self) -> str:
        """The reason for the capture, where that is not the graph."""
        return self.capture.why

    def copy(self) -> Plan:
        """Return the plan on a copy of its model, with sites of its own."""
        same = [*self.spec.rules, *([self.table.call] if isinstance(self.table, ModuleTable) else ())]
        found = copied((self.table, self.capture, self.new, self.present), self.model, same)
        return Plan(self.spec, *found, origin=self.origin)

    def require_same(self, other: Plan, reason: str) -> None:
        """Refuse to execute this plan in the place of `other`, if its sites or chains are not the same.

        Raises:
            PlanError: says why the plan was made again, and what differs.
        """
        here, there = self._decided(), other._decided()
        for name in [*there, *here]:
            if here.get(name) != there.get(name):
                was, now = there.get(name, "no site"), here.get(name, "no site")
                raise PlanError(f"the plan no longer fits ({reason}): {name} was {was} and would be {now}; plan again")

    def _decided(self) -> dict[str, str]:
        sites = [site for _, site in (*self.new, *self.present)] + [site for _, site in self.absorbed]
        return {
            name: f"{' >> '.join(site.spec.chain)} by rule {site.spec.rule!r} {site.spec.options}".rstrip()
            for site in sites
            for name in site.spec.names
        }

    def __iter__(self) -> Iterator[PlannedSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return {
            "spec": self.source,
            "root": self.root,
            "why": self.why,
            "sites": [site.to_dict() for site in self.sites],
            "frozen": list(self.frozen),
            "added": list(self.added),
        }

    def __str__(self) -> str:
        rows = [_HEAD, *map(_row, self.sites)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        notes = list(self._notes())
        return "\n".join([self._title(), "", *lines, *[""][: len(notes)], *notes])

    def _title(self) -> str:
        count = f"{len(self.sites)} sites" if len(self.sites) != 1 else "1 site"
        why = f" ({self.why})" if self.why else ""
        return f"{self.source}: {count}, captured as {self.root}{why}"

    def _notes(self) -> Iterator[str]:
        reasons: dict[str, list[str]] = {}
        for site in self.sites:
            if site.why and site.capture != "module":
                reasons.setdefault(f"{site.capture}: {site.why}", []).append(site.name)
        for reason, names in reasons.items():
            yield f"{reason} ({listing(names)})" if len(reasons) > 1 else reason
        if any(site.moved for site in self.sites):
            yield "moved: the norm of the change, divided by the norm of the old value"
        if self.added:
            yield f"new trained parameters, which an optimizer built before lacks: {len(self.added)}"
        if self.spec.trainable == "rewritten" and self.model is not None:
            yield f"other trained parameters, which are frozen until bake: {len(self.frozen)}"
        hints = (gates_hint(site.name, site.shape, site.chain) for site in self.sites if site.spec.layout.plain)
        yield from dict.fromkeys(filter(None, hints))

    def _repr_html_(self) -> str:
        return html_table(self._title(), _HEAD, map(_row, self.sites), self._notes())


_HEAD = ("site", "rule", "chain", "shape", "moved", "capture")


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _row(site: PlannedSite) -> tuple[str, ...]:
    layout = site.spec.layout
    return (
        " & ".join(" = ".join(member.names) for member in site.spec.members),
        site.rule,
        " >> ".join(site.chain)
        + "".join(f" ({first}–{last} as one)" for first, last in site.fused)
        + (f" on chunks {', '.join(map(str, layout.only))} of {layout.chunks}" if layout.only else "")
        + (f" on each of {layout.chunks} chunks" if layout.chunks and not layout.only else "")
        + {None: "", True: " (trained)", False: " (frozen)"}[site.spec.trainable],
        "×".join(map(str, site.shape)) or "scalar",
        "present" if site.present else _moved(site.moved) + _sparsity(site.zeros),
        site.capture,
    )


def _sparsity(zeros: float | None) -> str:
    return "" if zeros is None or zeros < 0.005 else f" ({zeros:.0%} zeros)"


def _moved(moved: float | None) -> str:
    if moved is None:
        return "–"
    return "0" if moved < 1e-12 else f"{moved:.1e}"
