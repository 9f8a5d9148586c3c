"""The demo from data to artefacts."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
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
    """What shows how far a part of the demo is."""

    def __call__(self, part: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Report:
    """What the demo measured; times in seconds, accuracies as shares.

    Arguments:
        steps: training steps, the same for both networks.
        accuracy, accuracy_plain: on the test images, with the spec and without it.
        orthogonality, orthogonality_plain: the largest ‖WᵀW − I‖ seen during training, and that of the plain
            network's kernel afterwards.
        evaluations, evaluations_torch: of the chain in one forward, here and with torch's own mechanism.
        difference_baked, difference_scripted: largest difference of a logit to the rewritten model's.
        step_seconds, step_seconds_torch, step_seconds_plain: one forward and backward.
        plan: the plan's JSON data.
    """

    seed: int
    steps: int
    accuracy: float
    accuracy_plain: float
    orthogonality: float
    orthogonality_plain: float
    evaluations: int
    evaluations_torch: int
    difference_baked: float
    difference_scripted: float
    step_seconds: float
    step_seconds_torch: float
    step_seconds_plain: float
    training_seconds: float
    training_seconds_plain: float
    total_seconds: float
    plan: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)


def run_demo(
    out: Path, *, seconds: float = 60.0, seed: int = 0, force: bool = False, progress: Progress | None = None
) -> Report:
    """Train a network with the spec and without it, bake, export, compare, and keep the artefacts in `out`.

    Arguments:
        out: a folder, made where it is missing.
        seconds: about how long it takes in all; decides the number of training steps.
        seed: decides split, initial weights and batches.
        progress: is told how far each part is.

    Raises:
        ModelFileError: an artefact is there already and `force` is not given.
        NumericError: the rewritten, baked and scripted network differ.
        RewriterError: scikit-learn is not installed.
    """
    threads = torch.get_num_threads()
    # Matrices this small gain nothing from a second thread, and lose much where the cores are busy.
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

    seconds_each = [seconds_per_step(model, data, 5) for model in (rewritten, with_torch, plain)]
    step_seconds, step_seconds_torch, step_seconds_plain = seconds_each
    steps = _affordable(seconds - _FIXED_SECONDS, step_seconds + step_seconds_plain)
    orthogonality: list[float] = []

    def watch(done: int) -> None:
        show("with the spec", done, steps)
        if done % max(1, steps // _CHECKS) == 0 or done == steps:
            orthogonality.append(distance_from_orthogonal(_kernel(rewritten)))

    training_seconds = train(rewritten, data, steps, seed, watch)
    training_seconds_plain = train(plain, data, steps, seed, lambda done: show("without it", done, steps))

    rewritten.eval()
    baked = rewriter.bake(rewritten)
    save_model(rewritten, out / "rewritten.pt", force=force)
    save_model(baked, out / "baked.pt", force=force)
    export_model(baked, out / "scripted.pt", format="torchscript", force=force)
    scripted = torch.jit.load(str(out / "scripted.pt"))  # type: ignore[no-untyped-call]
    differences = _differences(rewritten, {"baked": baked, "scripted": scripted}, data.test_images)

    report = Report(
        seed=seed,
        steps=steps,
        accuracy=accuracy(baked, data),
        accuracy_plain=accuracy(plain, data),
        orthogonality=max(orthogonality),
        orthogonality_plain=distance_from_orthogonal(_kernel(plain)),
        evaluations=evaluations_per_forward(rewritten, _chain_step(rewritten), data),
        evaluations_torch=evaluations_per_forward(with_torch, _chain_step(with_torch), data),
        difference_baked=differences["baked"],
        difference_scripted=differences["scripted"],
        step_seconds=step_seconds,
        step_seconds_torch=step_seconds_torch,
        step_seconds_plain=step_seconds_plain,
        training_seconds=training_seconds,
        training_seconds_plain=training_seconds_plain,
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
        raise ModelFileError(f"{out} cannot be made: {problem.strerror}") from problem
    for name in ARTEFACTS:
        check_writable(out / name, force)


def _spec_text() -> str:
    return (resources.files("rewriter.demo") / SPEC).read_text(encoding="utf-8")


def _silent(part: str, done: int, total: int) -> None:
    pass


def _affordable(seconds: float, step_seconds: float) -> int:
    # The optimizer adds to a step what the measurement leaves out.
    return min(_MOST_STEPS, max(_FEWEST_STEPS, int(seconds / (1.2 * step_seconds))))


def _kernel(model: nn.Module) -> Tensor:
    kernel: Tensor = getattr(model.get_submodule("cell"), "weight_hh")  # noqa: B009
    return kernel


def _chain_step(model: nn.Module) -> nn.Module:
    return model.get_submodule("cell.parametrizations.weight_hh.0")


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
