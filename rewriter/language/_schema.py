"""The spec language's grammar as Pydantic models; validation and the JSON Schema both come from here.

What belongs to the whole spec (names, `overrides`) and to the registry (parametrizations and their arguments)
is checked in `_references` and `_arguments`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rewriter.language._glob import Glob
from rewriter.language._predicates import DTYPES, Extent, read_regex
from rewriter.language._unions import ModuleForm, forms

ABSENT: Any = None
"""The default of a key that has none: never validated, so that an explicit null is an error."""

RESERVED = ("label", "inputs")
"""Keys of a step that are the compiler's, not the constructor's."""

_EXPECT = re.compile(r"([0-9]{1,9})?\.\.([0-9]{1,9})?")
_PREFIX = r"^[A-Za-z_][A-Za-z0-9_]*$"
_DOTTED = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
_LABEL = r"^[A-Za-z_][A-Za-z0-9_-]*$"
_NAME = r"^\S(.*\S)?$"
PATTERNS = {
    _PREFIX: "a name of letters, digits and _",
    _DOTTED: "a dotted name such as torch.nn.Linear",
    _LABEL: "a label of letters, digits, _ and -",
    _NAME: "a name on one line without spaces around it",
}
"""What the text of each pattern is called."""


def _version(written: int) -> int:
    if written != 1:
        raise ValueError(f"this is version {written} of the spec language, and version 1 is read")
    return written


def _single(written: Any) -> Any:
    if isinstance(written, dict) and len(written) != 1:
        raise PydanticCustomError(
            "step_keys", "a step names one parametrization, found {count}", {"count": len(written)}
        )
    return written


def _glob(written: str) -> str:
    Glob(written)
    return written


def _regex(written: str) -> str:
    read_regex(written)
    return written


def _extent(written: Any) -> Any:
    Extent.read(written)
    return written


def _dtype(written: str) -> str:
    if written.removeprefix("torch.") not in DTYPES:
        raise PydanticCustomError("unknown_choice", "must be a dtype such as 'float32'", {"choices": list(DTYPES)})
    return written


def _once(written: list[str]) -> list[str]:
    seen: set[str] = set()
    for name in written:
        if name in seen:
            raise ValueError(f"{name!r} stands here twice")
        seen.add(name)
    return written


def read_expect(written: int | str) -> tuple[int, int | None]:
    """Read ``33``, ``"1.."``, ``"3..8"`` or ``"..5"`` as the least and the largest count.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(written, int):
        if written < 0:
            raise ValueError(f"a count cannot be negative, found {written}")
        return written, written
    bounds = _EXPECT.fullmatch(written.replace(" ", ""))
    if bounds is None or not (bounds[1] or bounds[2]):
        raise ValueError(f"a count is written 33, '1..', '3..8' or '..5', found {written!r}")
    minimum, maximum = int(bounds[1] or 0), int(bounds[2]) if bounds[2] else None
    if maximum is not None and maximum < minimum:
        raise ValueError(f"the least count is above the largest in {written!r}")
    return minimum, maximum


def _expect(written: Any) -> Any:
    read_expect(written)
    return written


def _reshape(written: list[Any]) -> list[Any]:
    if any(isinstance(size, int) and (size < -1 or size == 0) for size in written):
        raise ValueError("a size of `reshape` is 'out', 'in', -1 or positive")
    if written.count(-1) > 1:
        raise ValueError("only one size of `reshape` can be -1")
    return written


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


Text = Annotated[str, Field(min_length=1, max_length=1000)]
GlobText = Annotated[str, AfterValidator(_glob)]
Size = Annotated[
    Annotated[int, Tag("<number>")] | Annotated[str, Tag("<text>")],
    forms("number", "text"),
    AfterValidator(_extent),
]


class SelectorPredicates(_Strict):
    """Predicates that must all hold."""

    path: GlobText = Field(default=ABSENT, examples=["blocks.*.attn.{q,k,v}.weight"])
    """A dotted glob over the full name: `*` inside a segment, `**` across segments, `{a,b}` alternates. With
    a `tensor` key, or in a rule with `joint`, it may name the owning module instead."""
    regex: Annotated[str, AfterValidator(_regex)] = Field(default=ABSENT)
    """A Python regular expression that matches the full name from start to end."""
    module: Annotated[str, Field(pattern=_DOTTED)] = Field(default=ABSENT, examples=["Linear", "torch.nn.Linear"])
    """The owning module's class, bare or dotted; subclasses match."""
    tensor: GlobText = Field(default=ABSENT, examples=["weight"])
    """A glob over the tensor's own name in its module."""
    kind: Literal["parameter", "buffer"] = Field(default=ABSENT)
    """Whether the tensor is a parameter or a buffer."""
    ndim: Size = Field(default=ABSENT, examples=[2, ">=2"])
    """The number of dimensions, or a comparison."""
    shape: list[Size] = Field(default=ABSENT, examples=[[">=64", "*"]])
    """One entry for each dimension: a size, `*`, or a comparison such as `>=64`, `<=8`, `==4`, `!=1`."""
    dtype: Annotated[str, AfterValidator(_dtype)] = Field(default=ABSENT, examples=["float32"])
    """The dtype, with or without `torch.`."""
    requires_grad: bool = Field(default=ABSENT)
    """Whether the tensor requires a gradient."""

    @model_validator(mode="after")
    def _says_something(self) -> SelectorPredicates:
        if not self.model_fields_set:
            raise ValueError("a selector without predicates would match everything; write `**` if that is meant")
        return self


_Pattern = Annotated[GlobText, Tag("<text>")]
_Predicates = Annotated[SelectorPredicates, Tag("<mapping>")]
SelectorForm = Annotated[
    _Pattern
    | _Predicates
    | Annotated[list[Annotated[_Pattern | _Predicates, forms("text", "mapping")]], Field(min_length=1), Tag("<list>")],
    forms("text", "mapping", "list"),
]


class StepKeys(_Strict):
    """The keys of a step that are the compiler's."""

    label: Annotated[str, Field(pattern=_LABEL)] = Field(default=ABSENT)
    """What to call this step, so that it can be baked or removed alone."""
    inputs: Annotated[list[Text], Field(min_length=1)] = Field(default=ABSENT)
    """Names of further tensors of the model that the parametrization's `forward` takes."""


_STEP_SCHEMA = {
    "description": "The parametrization's name with its arguments.",
    "type": "object",
    "minProperties": 1,
    "maxProperties": 1,
    "additionalProperties": {
        "type": ["object", "null"],
        "properties": StepKeys.model_json_schema()["properties"],
    },
}

StepForm = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[
        dict[str, dict[str, Any] | None],
        BeforeValidator(_single),
        WithJsonSchema(_STEP_SCHEMA),
        Tag("<mapping>"),
    ]
    | Annotated[ModuleForm, Tag("<module>")],
    forms("text", "mapping", "module"),
]


class PerForm(_Strict):
    """The chain acts on equal chunks of the tensor, each on its own."""

    dim: int
    """The dimension that is cut; negative counts from the last."""
    chunks: Annotated[int, Field(ge=1)]
    """How many chunks there are."""


class RuleForm(_Strict):
    """Which tensors get which chain."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=_NAME)]
    """What the rule is called; unique in the spec."""
    select: SelectorForm
    """Which tensors: a dotted glob, a mapping of predicates that all hold, or a list of which one matches."""
    chain: list[StepForm]
    """Parametrizations, applied from first to last."""
    exclude: SelectorForm = Field(default=ABSENT, alias="except")
    """Which of the selected tensors are left out."""
    expect: Annotated[
        Annotated[int, Tag("<number>")] | Annotated[str, Tag("<text>")],
        forms("number", "text"),
        AfterValidator(_expect),
    ] = Field(default="1..", examples=[33, "1..", "3..8", "..5"])
    """How many sites the rule must own: a count or a range."""
    overrides: Annotated[list[str], Field(min_length=1), AfterValidator(_once)] = Field(default=ABSENT)
    """Rules that give way to this one where both select a tensor."""
    cache: Literal["forward", "never", "version"] = "forward"
    """When the chain is evaluated: once per forward, at every use, or only after a change."""
    init: Literal["keep", "sample", "raw"] = "keep"
    """How the first value is set: keep the old one, draw from the space, or store the old tensor as it is."""
    share: bool = False
    """Use one parametrization instance for all of the rule's sites."""
    unsafe: bool = False
    """Allow the chain to change the tensor's shape or dtype."""
    per: PerForm = Field(default=ABSENT)
    """Apply the chain to each chunk of the tensor on its own."""
    reshape: Annotated[
        list[
            Annotated[
                Annotated[int, Tag("<number>")] | Annotated[Literal["out", "in"], Tag("<text>")],
                forms("number", "text"),
            ]
        ],
        Field(min_length=1),
        AfterValidator(_reshape),
    ] = Field(default=ABSENT, examples=[["out", -1]])
    """The shape in which the chain sees the tensor; the result is shaped back."""
    source: Text = Field(default=ABSENT, alias="from")
    """The tensor that this one is computed from; it then has no storage of its own."""
    joint: Annotated[list[Text], Field(min_length=2), AfterValidator(_once)] = Field(default=ABSENT)
    """Tensors of one owner that one parametrization computes together."""
    batch: Literal["auto", "never", "always"] = "auto"
    """Whether equal chains of several sites are evaluated as one batch."""
    memory: Literal["keep", "recompute"] = "keep"
    """Whether the chain's intermediate results are kept for backward or computed again."""


class SpecForm(_Strict):
    """A reparam spec: which tensors of a model get which parametrizations."""

    reparam: Annotated[int, AfterValidator(_version), WithJsonSchema({"const": 1})]
    """The version of the spec language."""
    imports: dict[Annotated[str, Field(pattern=_PREFIX)], Annotated[str, Field(pattern=_DOTTED)]] = Field(
        default={}, examples=[{"my": "my_pkg.constraints"}]
    )
    """Python modules with your own parametrizations, by the prefix that chains use."""
    absorb: bool = False
    """Take over what torch's own parametrize, weight_norm, spectral_norm and prune, and PEFT did to the model."""
    rules: list[RuleForm] = Field(default=ABSENT)
    """Which tensors get which chain; each tensor belongs to one rule at most."""
