"""What a parametrized site remembers about its origin: plain data that survives copies and pickles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rewriter.sites._layout import Layout


@dataclass(frozen=True)
class Member:
    """One tensor that a site computes.

    Arguments:
        names: every name it has in the model; more than one for tied tensors.
        kind: ``"parameter"`` or ``"buffer"``.
        shape: its shape.
        dtype: its dtype's name, such as ``"float32"``.
        persistent: whether a buffer is part of the state dict.
        requires_grad: whether it was trained.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    persistent: bool
    requires_grad: bool

    @property
    def tensor(self) -> str:
        """The attribute's name at the first owner."""
        return self.names[0].rpartition(".")[2]


@dataclass(frozen=True)
class SiteSpec:
    """How a site is computed, and what it replaced.

    Arguments:
        members: the tensors computed; one, but for a `joint` rule.
        rule: name of the rule that owns the site.
        chain: its steps, as printed.
        labels: the steps' labels, `None` where there is none.
        options: everything else that decides the value, printed; two sites with equal `chain` and `options` are
            the same parametrization.
        cache: ``"forward"``, ``"never"`` or ``"version"``.
        stored: for each step, how many stored tensors it reads.
        carries: for each step, which of its arguments is the previous step's result.
        inputs: for each step, names of the further tensors of the model that it reads.
        source: the tensor that the chain starts from, where it is not stored (`from`).
        layout: the view that the chain works on.
        outer: whether the one tensor that the chain stores has the tensor's own shape rather than the view's, or that
            of the chunks that the chain works on. The other chunks are one more stored tensor, the last.
        batch: ``"auto"``, ``"never"`` or ``"always"``.
        memory: ``"keep"`` or ``"recompute"``.
        trainable: whether its parameters are trained; ``None`` if the tensor decided that.
        gather: whether the chain runs on whole tensors although the stored ones are distributed over processes.
        listed: whether the first right inverse gives a sequence, of which torch numbers even a single tensor.
    """

    members: tuple[Member, ...]
    rule: str
    chain: tuple[str, ...]
    labels: tuple[str | None, ...]
    options: str
    cache: str
    stored: tuple[int, ...]
    carries: tuple[int, ...]
    inputs: tuple[tuple[str, ...], ...]
    source: str | None
    layout: Layout
    outer: bool
    batch: str = "auto"
    memory: str = "keep"
    trainable: bool | None = None
    gather: bool = False
    listed: bool = False
    simple: bool = field(init=False, repr=False, compare=False)
    """Whether the first step takes all stored tensors as they are, and each other step only the result before it."""

    def __post_init__(self) -> None:
        alone = self.source is None and not any(self.inputs) and len(self.members) == 1 and self.layout.plain
        simple = alone and not self.outer and not self.gather and not any(self.stored[1:])
        object.__setattr__(self, "simple", simple)

    @property
    def name(self) -> str:
        """The site's first name."""
        return self.members[0].names[0]

    def original_names(self, count: int) -> tuple[str, ...]:
        """Return the names of so many originals: those that torch gives them."""
        return ("original",) if count == 1 and not self.listed else tuple(f"original{index}" for index in range(count))

    @property
    def names(self) -> tuple[str, ...]:
        """All names of all members."""
        return tuple(name for member in self.members for name in member.names)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the model's tensors that the site takes as arguments, in order."""
        source = (self.source,) if self.source is not None else ()
        return source + tuple(name for names in self.inputs for name in names)

    def noted(self) -> dict[str, Any]:
        """Return what torch.export notes at each node of the chain in a program."""
        return {
            "exported": {
                "rule": self.rule,
                "chain": list(self.chain),
                "labels": list(self.labels),
                "options": self.options,
                "members": {member.names[0]: list(member.shape) for member in self.members},
            }
        }

    @property
    def identity(self) -> tuple[tuple[str, ...], str]:
        """Equal for two parametrizations that are the same."""
        return (self.chain, self.options)
