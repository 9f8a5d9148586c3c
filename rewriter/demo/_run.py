"""The demo, from the data to the files."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rewriter
from rewriter.demo._digits import load_digits
from rewriter.demo._network import PixelRNN
from rewriter.demo._train import (
    accuracy,
    distance_from_orthogonal,
    evaluations_per_forward,
    seconds_per_step,
    train,
)
from rewriter.errors import ModelFileError, NumericError
from rewriter.export import export_model
from rewriter.serialization import check_writable, save_model, written_atomically

SPEC = "orthogonal_rnn.yaml"
ARTEFACTS = ("rewritten.pt", "baked.pt", "scripted.pt", SPEC, "report.json")

_FIXED_SECONDS = 6.0
_CHECKS = 20
_FEWEST_STEPS, _MOST_STEPS = 20, 3000
_TOLERANCE = 1e-4


class Progress(Protocol):
    """Shows the progress of a part of the demo."""

    def __call__(self, part: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Variant:
    """The measurements of one variant of the network; ``None`` for what is not measured.

    Arguments:
        accuracy: share of the test images that are classified correctly.
        orthogonality: the largest ‖WᵀW − I‖ during training of the rewritten network; for others, after training.
        evaluations: evaluations of the chain per forward.
        step_seconds: time of one forward and backward.
        training_seconds: time of the training.
    """

    accuracy: float | None = None
    orthogonality: float | None = None
    evaluations: int | None = None
    step_seconds: float | None = None
    training_seconds: float | None = None


@dataclass(frozen=True)
class Report:
    """The measurements of the demo.

    Arguments:
        steps: number of training steps of each variant.
        rewritten: the network with the spec.
        plain: without the spec.
        cached, torch: with torch's parametrize, inside and outside of ``parametrize.cached()``. Both train equally, so
            only `cached` is trained.
        difference_baked, difference_scripted: largest difference of a logit from the rewritten network.
        plan: the plan as JSON data.
    """

    seed: int
    steps: int
    rewritten: Variant
    plain: Variant
    cached: Variant
    torch: Variant
    difference_baked: float
    difference_scripted: float
    total_seconds: float
    plan: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return it as flat JSON data: ``accuracy`` of the rewritten network, ``accuracy_plain``, and so on."""
        document = asdict(self)
        for name in ("rewritten", "plain", "cached", "torch"):
            suffix = "" if name == "rewritten" else f"_{name}"
            measured = document.pop(name)
            document |= {key + suffix: value for key, value in measured.items() if value is not None}
        return document


def run_demo(
    out: Path, *, seconds: float = 60.0, seed: int = 0, force: bool = False, progress: Progress | None = None
) -> Report:
    """Train with the spec, without it and with torch's parametrize; bake, export, compare, and write the files.

    Arguments:
        out: the folder for the files; it is created if it is missing.
        seconds: about how long the demo takes; determines the number of training steps.
        seed: determines split, initial weights and batches.
        progress: called after each training step.

    Raises:
        ModelFileError: a file exists and `force` is not given.
        NumericError: the rewritten, baked and scripted network differ.
        RewriterError: scikit-learn is not installed.
    """
    threads = torch.get_num_threads()
    # A second thread does not help with matrices of this size.
    torch.set_num_threads(1)
    try:
        return _run(out, seconds, seed, force, progress or _silent)
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seconds: float, seed: int, force: bool, show: Progress) -> Report:
    start = time.perf_counter()
    data = load_digits(seed)
    _prepare(out, force)
    text = _spec_text()
    spec = rewriter.load_spec(text)

    torch.manual_seed(seed)
    plain = PixelRNN()
    plan = rewriter.plan(plain, spec)
    rewritten = rewriter.rewrite(plain, spec)
    with_torch = copy.deepcopy(plain)
    parametrizations.orthogonal(with_torch.cell, "weight_hh", orthogonal_map="cayley")

    seconds_rewritten, seconds_plain = (seconds_per_step(model, data, 5) for model in (rewritten, plain))
    seconds_cached = seconds_per_step(with_torch, data, 5, cached=True)
    seconds_torch = seconds_per_step(with_torch, data, 2)
    steps = _affordable(seconds - _FIXED_SECONDS, seconds_rewritten + seconds_plain + seconds_cached)
    orthogonality: list[float] = []

    def watch(done: int) -> None:
        show("with the spec", done, steps)
        if done % max(1, steps // _CHECKS) == 0 or done == steps:
            orthogonality.append(distance_from_orthogonal(_kernel(rewritten)))

    training_seconds = train(rewritten, data, steps, seed, watch)
    training_seconds_plain = train(plain, data, steps, seed, lambda done: show("without it", done, steps))
    show_torch = partial(show, "with torch's parametrize", total=steps)
    training_seconds_cached = train(with_torch, data, steps, seed, lambda done: show_torch(done=done), cached=True)

    rewritten.eval()
    baked = rewriter.bake(rewritten)
    save_model(rewritten, out / "rewritten.pt", force=force)
    save_model(baked, out / "baked.pt", force=force)
    export_model(baked, out / "scripted.pt", format="torchscript", force=force)
    scripted = torch.jit.load(str(out / "scripted.pt"))  # type: ignore[no-untyped-call]
    differences = _differences(rewritten, {"baked": baked, "scripted": scripted}, data.test_images)

    chain, chain_torch = (model.get_submodule("cell.parametrizations.weight_hh.0") for model in (rewritten, with_torch))
    evaluations = evaluations_per_forward(rewritten, chain, data)
    evaluations_cached = evaluations_per_forward(with_torch, chain_torch, data, cached=True)
    off_plain, off_cached = (distance_from_orthogonal(_kernel(model)) for model in (plain, with_torch))
    report = Report(
        seed=seed,
        steps=steps,
        rewritten=Variant(accuracy(baked, data), max(orthogonality), evaluations, seconds_rewritten, training_seconds),
        plain=Variant(accuracy(plain, data), off_plain, None, seconds_plain, training_seconds_plain),
        cached=Variant(
            accuracy(with_torch, data), off_cached, evaluations_cached, seconds_cached, training_seconds_cached
        ),
        torch=Variant(evaluations=evaluations_per_forward(with_torch, chain_torch, data), step_seconds=seconds_torch),
        difference_baked=differences["baked"],
        difference_scripted=differences["scripted"],
        total_seconds=time.perf_counter() - start,
        plan=plan.to_dict(),
    )
    _write_text(out / SPEC, text, force)
    _write_text(out / "report.json", json.dumps(report.to_dict(), indent=2) + "\n", force)
    return report


def _prepare(out: Path, force: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ModelFileError(f"{out} cannot be created: {problem.strerror}") from problem
    for name in ARTEFACTS:
        check_writable(out / name, force)


def _spec_text() -> str:
    return (resources.files("rewriter") / "recipes" / SPEC).read_text(encoding="utf-8")


def _silent(part: str, done: int, total: int) -> None:
    pass


def _affordable(seconds: float, step_seconds: float) -> int:
    # The factor is for the optimizer, which `seconds_per_step` does not measure.
    return min(_MOST_STEPS, max(_FEWEST_STEPS, int(seconds / (1.2 * step_seconds))))


def _kernel(model: nn.Module) -> Tensor:
    kernel: Tensor = getattr(model.get_submodule("cell"), "weight_hh")  # noqa: B009
    return kernel


@torch.no_grad()
def _differences(model: nn.Module, others: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    logits = model(images)
    allowed = _TOLERANCE * max(1.0, float(logits.abs().max()))
    found = {name: float((other(images) - logits).abs().max()) for name, other in others.items()}
    wrong = {name: difference for name, difference in found.items() if not difference <= allowed}
    if wrong:
        raise NumericError(f"logits differ from the rewritten model's by more than {allowed:.1e}: {wrong}")
    return found


def _write_text(path: Path, text: str, force: bool) -> None:
    with written_atomically(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
