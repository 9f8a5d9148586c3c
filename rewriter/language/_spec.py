"""The spec language: each key's name, type, default and description, and the values that a spec becomes.

What one part of a spec says about another is checked in `_references`, parametrizations and their arguments in
`_arguments`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from rewriter.language._document import Document, Key, Location
from rewriter.language._forms import Forms, OrAbsent
from rewriter.language._problems import invalid
from rewriter.language._references import check_references
from rewriter.language._selector import DOTTED, WrittenSelector
from rewriter.language._step import Text, WrittenStep
from rewriter.language._value import FrozenMapping, Value, plain

PREFIX = r"^[A-Za-z_][A-Za-z0-9_]*$"
NAME = r"^\S(.*\S)?$"
_EXPECT = re.compile(r"([0-9]{1,9})?\.\.([0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Expect:
    """How many sites a rule must own: at least `minimum`, at most `maximum` (no limit: ``None``).

    >>> 5 in Expect.read("3..8"), str(Expect.read(33))
    (True, '33')
    """

    minimum: int = 1
    maximum: int | None = None

    @classmethod
    def read(cls, written: int | str) -> Expect:
        """Read ``33``, ``"1.."``, ``"3..8"`` or ``"..5"``.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(written, int):
            if written < 0:
                raise ValueError(f"a count cannot be negative, found {written}")
            return cls(written, written)
        bounds = _EXPECT.fullmatch(written.replace(" ", ""))
        if bounds is None or not (bounds[1] or bounds[2]):
            raise ValueError(f"a count is written 33, '1..', '3..8' or '..5', found {written!r}")
        minimum, maximum = int(bounds[1] or 0), int(bounds[2]) if bounds[2] else None
        if maximum is not None and maximum < minimum:
            raise ValueError(f"the least count is above the largest in {written!r}")
        return cls(minimum, maximum)

    def written(self) -> int | str:
        """Return what a spec says: a count or a range."""
        if self.minimum == self.maximum:
            return self.minimum
        return f"{self.minimum}..{'' if self.maximum is None else self.maximum}"

    def __contains__(self, count: int) -> bool:
        return self.minimum <= count and (self.maximum is None or count <= self.maximum)

    def __str__(self) -> str:
        return str(self.written())


def _version(written: int) -> int:
    if written != 1:
        raise ValueError(f"this is version {written} of the spec language, and version 1 is read")
    return written


def _unique(written: tuple[str, ...]) -> tuple[str, ...]:
    for index, name in enumerate(written):
        if name in written[:index]:
            raise ValueError(f"{name!r} is written twice")
    return written


def _shape(written: tuple[Any, ...]) -> tuple[Any, ...]:
    if any(isinstance(size, int) and (size < -1 or size == 0) for size in written):
        raise ValueError("a size of `reshape` is 'out', 'in', -1 or positive")
    if written.count(-1) > 1:
        raise ValueError("only one size of `reshape` can be -1")
    return written


_Extent = Annotated[Literal["out", "in"] | int, Forms(number=int, text=Literal["out", "in"])]


def _some(written: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    chunks = info.data.get("chunks")
    if len(set(written)) < len(written):
        raise ValueError("`only` names a chunk twice")
    if chunks is not None and max(written) >= chunks:
        raise ValueError(f"`only` counts from 0, and the last of {chunks} chunks is {chunks - 1}")
    if chunks is not None and len(written) == chunks:
        raise ValueError("`only` names all chunks; leave it out")
    return tuple(sorted(written))


class Per(Value):
    """The chain acts on equal chunks of the tensor, each on its own."""

    dim: int
    """The dimension that is cut; negative counts from the last."""
    chunks: Annotated[int, Field(ge=1)]
    """How many chunks there are."""
    only: OrAbsent[Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_some)]] = (
        Field(default=None, examples=[[0, 2]])
    )
    """The chunks that the chain acts on, counted from 0; the others stay plain."""

    def __str__(self) -> str:
        return f"dim={self.dim} chunks={self.chunks}" + (f" only={list(self.only)}" if self.only else "")


class Rule(Value):
    """Which tensors get which chain."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=NAME)]
    """What the rule is called; unique in the spec."""
    select: WrittenSelector
    """Which tensors: a dotted glob, a mapping of predicates that all hold, or a list of which one matches."""
    chain: tuple[WrittenStep, ...]
    """Parametrizations, applied from first to last."""
    exclude: OrAbsent[WrittenSelector] = Field(default=None, alias="except")
    """Which of the selected tensors are left out."""
    expect: Annotated[
        Expect, Forms(number=int, text=str), AfterValidator(Expect.read), PlainSerializer(Expect.written)
    ] = Field(default="1..", validate_default=True, examples=[33, "1..", "3..8", "..5"])
    """How many sites the rule must own: a count or a range."""
    overrides: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_unique)] = ()
    """Rules that give way to this one where both select a tensor."""
    cache: Literal["forward", "never", "version"] = "forward"
    """When the chain is evaluated: once per forward, at every use, or only after a change."""
    init: Literal["keep", "sample", "raw"] = "keep"
    """How the first value is set: keep the old one, draw from the space, or store the old tensor as it is."""
    share: bool = False
    """Use one parametrization instance for all of the rule's sites."""
    unsafe: bool = False
    """Allow the chain to change the tensor's shape or dtype."""
    per: OrAbsent[Per] = None
    """Apply the chain to each chunk of the tensor on its own."""
    reshape: OrAbsent[Annotated[tuple[_Extent, ...], Field(min_length=1), AfterValidator(_shape)]] = Field(
        default=None, examples=[["out", -1]]
    )
    """The shape in which the chain sees the tensor; the result is shaped back."""
    source: OrAbsent[Text] = Field(default=None, alias="from")
    """The tensor that this one is computed from; it then has no storage of its own."""
    joint: Annotated[tuple[Text, ...], Field(min_length=2), AfterValidator(_unique)] = ()
    """Tensors of one owner that one parametrization computes together."""
    batch: Literal["auto", "never", "always"] = "auto"
    """Whether equal chains of several sites are evaluated as one batch."""
    memory: Literal["keep", "recompute"] = "keep"
    """Whether the chain's intermediate results are kept for backward or computed again."""
    trainable: OrAbsent[bool] = None
    """Whether the chain's parameters are trained; by default, if the tensor was."""

    _document: Document | None = PrivateAttr(None)
    _index: int = PrivateAttr(0)

    @model_validator(mode="after")
    def _joint_rules_select_owners(self) -> Rule:
        if self.joint:
            self.select.with_owners()
            if self.exclude is not None:
                self.exclude.with_owners()
        return self

    @property
    def location(self) -> Location:
        """Where the rule is written."""
        return self.where()

    def where(self, *path: Key) -> Location:
        """Return where a key of this rule is written, such as ``where("except", 0)``.

        It is the nearest enclosing place that was written: for a key left to its default, the rule's own.
        """
        return (self._document or Document()).locate(("rules", self._index, *path))


class Spec(Value):
    """A reparam spec: which tensors of a model get which parametrizations."""

    reparam: Annotated[int, AfterValidator(_version), WithJsonSchema({"const": 1})]
    """The version of the spec language."""
    imports: Annotated[
        Mapping[str, str],
        Forms(mapping=dict[Annotated[str, Field(pattern=PREFIX)], Annotated[str, Field(pattern=DOTTED)]]),
        AfterValidator(FrozenMapping),
        PlainSerializer(plain),
    ] = Field(default={}, validate_default=True, examples=[{"my": "my_pkg.constraints"}])
    """Python modules with your own parametrizations, by the prefix that chains use."""
    absorb: bool = False
    """Take over what torch's own parametrize, weight_norm, spectral_norm and prune, and PEFT did to the model."""
    rules: tuple[Rule, ...] = ()
    """Which tensors get which chain; each tensor belongs to one rule at most."""
    trainable: Literal["as_is", "rewritten"] = "as_is"
    """What is trained: what was trained before, or only what the rules rewrite; all other parameters are frozen."""

    _document: Document | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_references(self, info: ValidationInfo) -> Spec:
        if info.context is None:  # made in Python; `load_spec` checks what is written, correct or not
            problems = list(check_references(self.to_dict()))
            if problems:
                raise invalid(problems)
        return self

    def _place(self, document: Document) -> None:
        """Let the rules and steps know that they are written in `document`."""
        self._document = document
        for index, rule in enumerate(self.rules):
            rule._document, rule._index = document, index
            for at, step in enumerate(rule.chain):
                object.__setattr__(step, "location", rule.where("chain", at))

    @property
    def source(self) -> str:
        """The spec's file, or ``<spec>``."""
        return (self._document or Document()).file

    def to_dict(self) -> dict[str, Any]:
        """Return the plain mapping that loads to an equal spec; instances stand for themselves."""
        written: dict[str, Any] = plain(self.model_dump(by_alias=True, exclude_unset=True))
        return written

    def __str__(self) -> str:
        rules = "1 rule" if len(self.rules) == 1 else f"{len(self.rules)} rules"
        absorbing = ", absorb" if self.absorb else ""
        return f"{self.source}: {rules}{absorbing}" + (", the rest frozen" if self.trainable == "rewritten" else "")

    def _repr_html_(self) -> str:
        from rewriter._html import html_table

        chains = (" >> ".join(map(str, rule.chain)) or "left alone" for rule in self.rules)
        rows = ((rule.name, str(rule.select), chain) for rule, chain in zip(self.rules, chains, strict=True))
        return html_table(str(self), ("rule", "select", "chain"), rows)
