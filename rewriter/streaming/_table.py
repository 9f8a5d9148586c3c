"""A TensorTable of names, shapes and dtypes: what planning needs of a checkpoint, without a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from rewriter.capture import Capture
from rewriter.errors import Diagnostic, PlanError
from rewriter.language import Spec, Step, TensorInfo
from rewriter.planning import Entry, dtype_name
from rewriter.planning._problems import Problems
from rewriter.planning._resolve import Claim
from rewriter.sites import Site

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
HINT = "or name the model, which is made without memory: --model package.module:factory"
_NEEDS_MODEL = ("module", "kind", "requires_grad")


class HeaderTable:
    """The tensors of a checkpoint, as the headers have them; see `planning.TensorTable`.

    Arguments:
        entries: the plain tensors, without values.
    """

    model = None
    foreign: Sequence[tuple[Entry, str]] = ()
    absorbed: Sequence[tuple[Entry, Site]] = ()

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries

    def refuse(self, claims: Sequence[Claim], problems: Problems) -> None:
        """Refuse kernels of convolutions for a step that has to know whether they are transposed ones."""
        for claim in claims:
            steps = [step for step in claim.rule.chain if claim.entries[0].infos[0].ndim > 2 and _asks_for_owner(step)]
            if steps:
                problems.about(
                    claim,
                    "chain",
                    f"a kernel, and {steps[0]} takes another dimension for a transposed convolution, which names and "
                    "shapes do not tell",
                    f"say which: `dim: 0`, or `dim: 1` for a transposed one; {HINT}",
                )

    def capture(self, owners: Sequence[str]) -> Capture:
        """Return that nothing is captured."""
        return Capture("checkpoint")

    def reached(self, way: Capture, site: Site) -> tuple[str, str]:
        """Return that a checkpoint has no uses of its tensors."""
        return "checkpoint", ""


def _asks_for_owner(step: Step) -> bool:
    factory = step.factory
    return factory is not None and "transposed" in inspect.signature(factory).parameters and "dim" not in step.arguments


def entry_of(names: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
    """Return a tensor without values, on the meta device; its owner is a module that says nothing."""
    infos = [TensorInfo(name, (), "parameter", shape, dtype_name(dtype)) for name in names]
    # Planning refuses the statistics of torch's norms; here their names are all that is known of them.
    owner: nn.Module = nn.BatchNorm1d(1, affine=False) if infos[0].tensor in _STATISTICS else nn.Module()
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return Entry(infos, [(owner.eval(), infos[0].tensor)], tensor)


def refuse_modules(spec: Spec) -> None:
    """Refuse selectors that ask what only a model can answer.

    Raises:
        PlanError: lists their places.
    """
    problems: list[Diagnostic] = []
    for rule in spec.rules:
        for key, selector in (("select", rule.select), ("except", rule.exclude)):
            for alternative in selector.alternatives if selector is not None else ():
                asked = [word for word in _NEEDS_MODEL if getattr(alternative, word) is not None]
                if asked:
                    problems.append(
                        rule.where(key).diagnose(
                            f"rule {rule.name!r}: {key} {alternative} asks for `{asked[0]}`, and a checkpoint has "
                            "only names, shapes and dtypes",
                            f"select by names and shapes, {HINT}",
                        )
                    )
    if problems:
        raise PlanError.of(problems)
