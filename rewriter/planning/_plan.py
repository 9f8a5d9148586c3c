"""The plan: which rule owns which tensors, how each is captured, and how far its value will move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rewriter.sites import Record


@dataclass(frozen=True)
class Site:
    """One site of a plan.

    Arguments:
        record: names, rule, chain and everything else that decides the value.
        capture: how the model's uses of the tensor are reached: ``"graph"``, ``"opened"``, ``"handed"``, ``"module"``,
            ``"export"`` or ``"unused"``.
        why: the reason for that capture, in words.
        moved: ‖new − old‖ / ‖old‖ of the value when the chain is put on; ``None`` where it has no meaning
            (`unsafe` shapes, tensors without values).
        present: whether the model has this parametrization already.
        fused: the first and the last of neighbouring steps that are evaluated as one, counted from one.
    """

    record: Record
    capture: str
    why: str
    moved: float | None
    present: bool = False
    fused: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """The site's first name."""
        return self.record.name

    @property
    def names(self) -> tuple[str, ...]:
        """All tied names."""
        return self.record.names

    @property
    def rule(self) -> str:
        """Name of the rule that owns the site."""
        return self.record.rule

    @property
    def chain(self) -> tuple[str, ...]:
        """The steps, left to right."""
        return self.record.chain

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) tensor."""
        return self.record.members[0].shape

    def to_dict(self) -> dict[str, Any]:
        """Return the site as JSON data."""
        member = self.record.members[0]
        return {
            "name": self.name,
            "names": list(self.names),
            "members": [list(member.names) for member in self.record.members],
            "rule": self.rule,
            "chain": list(self.chain),
            "shape": list(self.shape),
            "dtype": member.dtype,
            "kind": member.kind,
            "cache": self.record.cache,
            "capture": self.capture,
            "why": self.why,
            "moved": self.moved,
            "present": self.present,
            "fused": [list(group) for group in self.fused],
        }


@dataclass(frozen=True)
class Plan:
    """What `rewrite` will do to a model: its sites, in the model's order.

    Arguments:
        sites: the sites.
        source: the spec's file name.
        root: how the model as a whole is captured: ``"graph"``, ``"module"`` or ``"export"``.
        why: the reason, where that is not the graph.
    """

    sites: tuple[Site, ...]
    source: str = "<spec>"
    root: str = "graph"
    why: str = ""
    by_name: dict[str, Site] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.by_name.update({name: site for site in self.sites for name in site.names})

    def __iter__(self) -> Iterator[Site]:
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
        }

    def __str__(self) -> str:
        head = f"{len(self.sites)} sites" if len(self.sites) != 1 else "1 site"
        why = f" ({self.why})" if self.why else ""
        rows = [("site", "rule", "chain", "shape", "moved", "capture"), *map(_row, self.sites)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([f"{self.source}: {head}, captured as {self.root}{why}", "", *lines])


def _row(site: Site) -> tuple[str, ...]:
    return (
        " & ".join(" = ".join(member.names) for member in site.record.members),
        site.rule,
        " >> ".join(site.chain) + "".join(f" ({first}–{last} as one)" for first, last in site.fused),
        "×".join(map(str, site.shape)) or "scalar",
        "present" if site.present else _moved(site.moved),
        f"{site.capture}: {site.why}" if site.why and site.capture != "module" else site.capture,
    )


def _moved(moved: float | None) -> str:
    if moved is None:
        return "–"
    return "0" if moved < 1e-12 else f"{moved:.1e}"
