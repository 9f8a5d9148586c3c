"""The base class of the catalog: arguments as fields, registration, flags, precision and membership in a space."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._chain import compose
from rewriter.parametrizations._registry import INJECTED, register
from rewriter.parametrizations.maths._checks import REQUIREMENTS
from rewriter.parametrizations.maths._precision import wide_dtype, widen


class WideBuffers(nn.Module):
    """A module whose buffers stay at least float32 when it is converted, if `wide_buffers` says so."""

    wide_buffers = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WideBuffers:
        parts = list(self.modules()) if self.wide_buffers else []
        before = [dict(part._buffers) for part in parts]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part, buffers in zip(parts, before, strict=True):
            for name, buffer in buffers.items():
                now = part._buffers[name]
                if buffer is not None and now is not None and now.dtype != wide_dtype(now.dtype):
                    part._buffers[name] = buffer.to(now.device, wide_dtype(now.dtype))
        return self


class Parametrization(WideBuffers):
    """A member of the catalog.

    A member declares its constructor arguments as annotated class attributes, in order and with their defaults. They
    become attributes of the instance, the signature that `reparam catalog` and the spec language read, and the text
    of ``repr``. `build` makes buffers, parameters and inner modules from them.

    >>> class Double(Parametrization):
    ...     times: int = 1
    ...     def forward(self, X: Tensor) -> Tensor:
    ...         return X * 2**self.times
    >>> Double(2)(torch.ones(1)), Double(times=3)
    (tensor([4.]), Double(times=3))

    ``class Foo(Parametrization, name="foo")`` also registers the class under that name. The argument ``weight`` (the
    tensor that the site computes) exists for all members; the site fills it in. A weight or an argument that does not
    fit raises RewriterError.

    Class attributes, each of which any other parametrization may declare too:
        guarantee, cost, reference: text for `reparam catalog`.
        takes: what the weight must be, words of `REQUIREMENTS`.
        batched: forward and right inverse act on a stack of tensors as on each of them.
        together: a class method that takes several such steps and the stored tensors of each, of any shapes, and
            returns a function, or ``None``. As long as none of these objects and settings changes, the function
            returns the value of each in one call, or ``None``, and then nothing has changed. It is asked for chains
            of one step, and not for subclasses, which may have another forward.
        stateful: forward changes buffers in train mode.
        random: forward draws random numbers in train mode.
        freezes_original: the original is not trained.
        preserves_dtype, preserves_shape: the value has the dtype and the shape of the input.
        chain_input: which input of forward comes from the step before; the others are stored.
        contains: a method ``contains(tensor, tolerance)`` for `rewriter.testing.on_space`, if forward after the
            right inverse does not answer.
        wide_buffers: buffers stay float32 when the model is converted to float16 or bfloat16, because rounding
            would move a base point off its manifold.
    """

    name = ""
    guarantee = ""
    cost = ""
    reference = ""
    takes: ClassVar[tuple[str, ...]] = ()
    batched = False
    stateful = False
    random = False
    freezes_original = False
    fields: ClassVar[Mapping[str, inspect.Parameter]] = {}
    signature_of_fields = inspect.Signature()
    if TYPE_CHECKING:
        shape: tuple[int, ...] | None
        dtype: torch.dtype
        device: torch.device
    __rshift__ = compose

    def __init_subclass__(cls, name: str = "", **named: Any) -> None:
        super().__init_subclass__(**named)
        fields = dict(cls.fields)
        for field, annotation in inspect.get_annotations(cls).items():
            if str(annotation).startswith("ClassVar"):
                continue
            default = cls.__dict__.get(field, inspect.Parameter.empty)
            if field in cls.__dict__:
                delattr(cls, field)
            kind = inspect.Parameter.KEYWORD_ONLY if field in INJECTED else inspect.Parameter.POSITIONAL_OR_KEYWORD
            fields[field] = inspect.Parameter(field, kind, default=default, annotation=annotation)
        cls.fields = dict(sorted(fields.items(), key=lambda field: field[1].kind))
        cls.signature_of_fields = inspect.Signature([*cls.fields.values()])
        cls.__annotations__ = {}  # TorchScript would read them as types of its own
        weight = inspect.Parameter("weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
        own = inspect.Signature([*cls.fields.values(), weight]) if "__init__" not in cls.__dict__ else None
        setattr(cls, "__signature__", own)  # noqa: B010
        if name:
            cls.name = name
            register(name)(cls)

    def __init__(self, *positional: Any, weight: Tensor | None = None, **named: Any) -> None:
        super().__init__()
        given = self.signature_of_fields.bind(*positional, **named)
        given.apply_defaults()
        self.shape = None
        if weight is not None:
            for kind in self.takes:
                REQUIREMENTS[kind](self.name, weight)
            # Module.__setattr__ looks for parameters in every value, which takes time for thousands of sites.
            self.__dict__.update(shape=tuple(weight.shape), dtype=weight.dtype, device=weight.device)
        choices = _choices(type(self))  # type: ignore[arg-type]
        for field, value in given.arguments.items():
            if value not in choices.get(field, (value,)) and value != self.fields[field].default:
                *first, last = map(str, choices[field])
                raise RewriterError(f"{self.name}: {field} must be {', '.join(first)} or {last}, not {value!r}")
            if str(self.fields[field].annotation).startswith("float") and isinstance(value, int):
                value = float(value)
            setattr(self, field, value)
        self.build(weight)

    def build(self, weight: Any) -> None:
        """Check the arguments, which are attributes by now, and make buffers and parameters.

        Arguments:
            weight: the tensor that the site computes; ``None`` where Python code gives none.
        """

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments that a spec may give, as they are now."""
        return {field: getattr(self, field, None) for field in self.fields if field not in INJECTED}

    def noise(self, *shape: int) -> Tensor:
        """Return standard normal numbers of this shape, or of the weight's, in at least float32."""
        if self.shape is None:
            raise RewriterError(f"{self.name}: a sample needs the weight that the site fills in")
        return torch.randn(shape or self.shape, dtype=wide_dtype(self.dtype), device=self.device)

    def extra_repr(self) -> str:
        shown = (
            f"{field}={value}"
            for field, value in self.arguments().items()
            if not isinstance(value, Tensor) and value is not None and value != self.fields[field].default
        )
        return ", ".join(shown)


class Precise(Parametrization):
    """A member with one input whose `value` is computed in at least float32 and rounded once.

    Inside autocast a matrix product would round to half precision, and an orthogonal matrix would not be one.
    """

    def forward(self, X: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self.value(widen(X)).to(X.dtype)
        else:
            if X.is_meta or not torch.is_autocast_enabled(X.device.type):
                return self.value(widen(X)).to(X.dtype)
            with torch.autocast(X.device.type, enabled=False):
                return self.value(widen(X)).to(X.dtype)

    def value(self, X: Tensor) -> Tensor:
        """Return the value for X, both at least float32."""
        raise NotImplementedError

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return `value` itself: forward maps each value of its image to itself."""
        return value


class Space(Precise):
    """A member whose values form a space that one can draw from."""

    def sample(self) -> Tensor:
        """Return a random value: that of a standard normal tensor."""
        return self.forward(self.noise()).to(self.dtype)


@functools.lru_cache(maxsize=1024)
def _choices(member: type[Parametrization]) -> dict[str, tuple[Any, ...]]:
    """Return the values that a ``Literal`` argument may have, by name."""
    written = {field: str(parameter.annotation) for field, parameter in member.fields.items()}
    alone = {field: text.removesuffix(" | None") for field, text in written.items() if text.startswith("Literal[")}
    return {field: typing.get_args(eval(text, {"Literal": typing.Literal})) for field, text in alone.items()}
