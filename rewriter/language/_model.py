"""What a spec says, once it is read and found correct: immutable values that the plan works from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rewriter.language._frozen import FrozenMapping
from rewriter.language._location import Key, Location
from rewriter.language._selectors import Selector

if TYPE_CHECKING:
    from torch import nn

Cache = Literal["forward", "never", "version"]
Init = Literal["keep", "sample", "raw"]
Batch = Literal["auto", "never", "always"]
Memory = Literal["keep", "recompute"]


@dataclass(frozen=True, slots=True)
class Expect:
    """How many sites a rule must own: at least `minimum`, at most `maximum` (no limit: ``None``)."""

    minimum: int = 1
    maximum: int | None = None

    def __contains__(self, count: int) -> bool:
        return self.minimum <= count and (self.maximum is None or count <= self.maximum)

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return str(self.minimum)
        return f"{self.minimum}..{'' if self.maximum is None else self.maximum}"


@dataclass(frozen=True, slots=True)
class Per:
    """The chain acts on each of `chunks` equal parts along dimension `dim` on its own."""

    dim: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Step:
    """One parametrization of a chain, by name or as a module given from Python.

    Arguments:
        name: as the spec writes it (``orthogonal``, ``my.Scale``); an instance's class name.
        arguments: of the constructor, already checked against its signature.
        label: what this step is called, so that it can be baked or removed alone.
        inputs: names of further tensors of the model that ``forward`` takes.
        module: the instance, where Python gave one.
        factory: what constructs the module; ``None`` for an instance.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=FrozenMapping)
    label: str | None = None
    inputs: tuple[str, ...] = ()
    module: nn.Module | None = None
    factory: Callable[..., nn.Module] | None = field(default=None, compare=False, repr=False)
    location: Location = field(default=Location(), compare=False, repr=False)

    def __str__(self) -> str:
        if not self.arguments:
            return self.name
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.arguments.items())})"


@dataclass(frozen=True, slots=True)
class Rule:
    """Which tensors get which chain, and how; see the spec language for each key."""

    name: str
    select: Selector
    chain: tuple[Step, ...]
    exclude: Selector | None = None
    expect: Expect = Expect()
    overrides: tuple[str, ...] = ()
    cache: Cache = "forward"
    init: Init = "keep"
    share: bool = False
    unsafe: bool = False
    per: Per | None = None
    reshape: tuple[Literal["out", "in"] | int, ...] | None = None
    source: str | None = None
    joint: tuple[str, ...] = ()
    batch: Batch = "auto"
    memory: Memory = "keep"
    location: Location = field(default=Location(), compare=False, repr=False)
    places: Mapping[tuple[Key, ...], Location] = field(default_factory=dict, compare=False, repr=False)

    def where(self, *path: Key) -> Location:
        """Return where a key of this rule is written, such as ``where("except", 0)``.

        The nearest enclosing place that was written; the rule's own for a key left to its default.
        """
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.location


@dataclass(frozen=True, slots=True)
class Spec:
    """A spec that is well formed: what `load_spec` returns and `plan` resolves against a model."""

    rules: tuple[Rule, ...]
    imports: Mapping[str, str] = field(default_factory=FrozenMapping)
    source: str = field(default="<spec>", compare=False)
    absorb: bool = False

    def __str__(self) -> str:
        return f"{self.source}: {len(self.rules)} rules" + (", absorb" if self.absorb else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the plain mapping that loads to an equal spec; instances stand for themselves."""
        from rewriter.language._write import write

        return write(self)
