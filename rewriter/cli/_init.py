"""``reparam init``: a starter spec whose selectors match a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rewriter.cli._app import command
from rewriter.cli._console import stderr
from rewriter.cli._models import entries_of
from rewriter.cli._options import Force, ModelFile, ModelOptions, OptionalOutput
from rewriter.cli._outcome import Outcome
from rewriter.cli._recipes import write_text
from rewriter.cli._text import counted
from rewriter.errors import PlanError

if TYPE_CHECKING:
    from rewriter.planning import Entry

Job = Literal["spectral-norm", "weight-norm", "orthogonal", "lora", "prune"]


@dataclass(frozen=True)
class Rule:
    """A rule of a starter spec.

    Arguments:
        select: alternatives of the selector; the spec has those that match the model.
        chain: the one step of the chain.
        keys: further lines of the rule.
    """

    name: str
    select: Sequence[str]
    chain: str
    keys: str = ""


def _of_class(*classes: str, tensor: str = "weight") -> list[str]:
    return [f"{{module: torch.nn.{name}, tensor: {tensor}}}" for name in classes]


_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
_RECURRENT = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3, "RNN": 1, "RNNCell": 1}
_ATTENTION = ["q_proj", "v_proj", "query", "value", "c_attn", "to_q", "to_v", "qkv"]

JOBS: Mapping[Job, tuple[str, Sequence[Sequence[Rule]]]] = {
    "spectral-norm": (
        "Spectral norm: each layer has Lipschitz constant one.\n"
        "One power iteration runs per forward in train mode. Call model.eval() to measure.",
        [[Rule("layers", _of_class("Linear", *_CONVOLUTIONS, "Embedding"), "spectral_norm: {n_power_iterations: 1}")]],
    ),
    "weight-norm": (
        "Weight norm: length and direction of each filter are trained separately.\nThe values of the weights stay.",
        [[Rule("filters", _of_class("Linear", *_CONVOLUTIONS), "weight_norm: {dim: 0}")]],
    ),
    "orthogonal": (
        "Orthogonal weights: gradients neither vanish nor explode.\n"
        "Other maps: matrix_exp, householder. Add `init: sample` to start from a random orthogonal matrix.",
        [
            [
                Rule(
                    f"{name.lower()}-kernels",
                    _of_class(name, tensor='"weight_hh*"'),
                    "orthogonal: {map: cayley}",
                    f"per: {{dim: 0, chunks: {gates}}}  # one matrix for each gate" if gates > 1 else "",
                )
                for name, gates in _RECURRENT.items()
            ],
            [Rule("kernels", _of_class("Linear"), "orthogonal: {map: cayley}")],
            [Rule("kernels", _of_class(*_CONVOLUTIONS), "orthogonal: {map: cayley}", "reshape: [out, -1]")],
        ],
    ),
    "lora": (
        "LoRA: only a low-rank change of each weight is trained.\n"
        "Call model.requires_grad_(False) before the rewrite to freeze all other tensors.",
        [
            [Rule("adapters", [f'"**.{name}.weight"' for name in _ATTENTION], "lora: {r: 8, lora_alpha: 16}")],
            [Rule("adapters", _of_class("Linear"), "lora: {r: 8, lora_alpha: 16}")],
        ],
    ),
    "prune": (
        "Pruning: half of the entries of each weight are zero.\n"
        "The mask is chosen once, from the weights of MODEL, so train first. For 2:4 sparsity use n_m: {n: 2, m: 4}.",
        [[Rule("weights", _of_class("Linear", *_CONVOLUTIONS), "l1_unstructured: {amount: 0.5}")]],
    ),
}
"""For each job: what it does, and groups of rules. The first group that matches the model is used."""


@command(
    "reparam init model.pt --for spectral-norm",
    "reparam init model.pt --for lora -o spec.yaml",
)
def init(
    model_file: ModelFile,
    job: Annotated[Job, typer.Option("--for", help="What the spec does.")],
    model_options: ModelOptions,
    output: OptionalOutput = None,
    force: Force = False,
) -> Outcome:
    """Write a commented starter spec whose selectors match MODEL."""
    entries = entries_of(model_options.read(model_file))
    about, groups = JOBS[job]
    for rules in groups:
        written = [text for rule in rules if (text := _rule(rule, entries))]
        if written:
            break
    else:
        raise PlanError(f"{model_file} has no tensor for --for {job}; reparam inspect {model_file} lists its tensors")
    name = output or "spec.yaml"
    comments = [*about.split("\n"), "", f"Check it:  reparam plan {name} {model_file}"]
    head = "\n".join(f"# {line}".rstrip() for line in comments)
    text = "\n".join([head, "reparam: 1", "rules:", *written]) + "\n"
    document: dict[str, Any] = {"for": job, "text": text}
    if output is None:
        return Outcome(document, text.rstrip("\n"))
    write_text(output, text, force)
    stderr.print(f"wrote {output}; next: reparam plan {output} {model_file}")
    return Outcome({**document, "output": str(output)})


def _rule(rule: Rule, entries: Sequence[Entry]) -> str:
    """Return the rule as YAML with the alternatives that match, or "" if none does."""
    from rewriter.language import load_spec

    matching: list[str] = []
    names: dict[str, None] = {}
    for one in rule.select:
        text = f"reparam: 1\nrules:\n  - {{name: x, select: {one}, chain: [identity]}}\n"
        selector = load_spec(text).rules[0].select
        found = [entry for entry in entries if any(map(selector.matches, entry.infos))]
        if computed := [entry.name for entry in found if entry.site]:
            raise PlanError(f"{', '.join(computed)}: already computed by a chain; bake the model first")
        if found:
            matching.append(one)
            names.update(dict.fromkeys(entry.name for entry in found))
    if not matching:
        return ""
    shown = ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
    lines = [
        f"  - name: {rule.name}  # {counted(len(names), 'tensor')}: {shown}",
        "    select:",
        *(f"      - {one}" for one in matching),
        f'    # except: ["{next(reversed(names))}"]  # tensors to leave alone',
        *([f"    {rule.keys}"] if rule.keys else []),
        "    chain:",
        f"      - {rule.chain}",
    ]
    return "\n".join(lines)
