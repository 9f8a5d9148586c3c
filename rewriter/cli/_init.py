"""``reparam init``: a starter spec whose selectors match a model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rewriter.cli._app import command
from rewriter.cli._inputs import streamed
from rewriter.cli._models import entries_of
from rewriter.cli._options import Force, ModelFile, ModelOptions, OptionalOutput
from rewriter.cli._outcome import Outcome
from rewriter.cli._recipes import written_spec
from rewriter.cli._streaming import entries as entries_of_checkpoint
from rewriter.cli._streaming import tensors_of
from rewriter.cli._text import counted
from rewriter.errors import PlanError, listing

if TYPE_CHECKING:
    from pathlib import Path

    from rewriter.planning import Entry

Job = Literal["spectral-norm", "weight-norm", "orthogonal", "lora", "prune"]


@command(
    "reparam init model.pt --for spectral-norm",
    "reparam init model.pt --for lora -o spec.yaml",
    "reparam init FOLDER --for lora",
)
def init(
    model_file: ModelFile,
    job: Annotated[Job, typer.Option("--for", help="What the spec does.")],
    model_options: ModelOptions,
    output: OptionalOutput = None,
    force: Force = False,
) -> Outcome:
    """Write a commented starter spec whose selectors match MODEL.

    MODEL can also be a folder of shards, an index or a safetensors file, of which only the headers are read.
    """
    import yaml

    starters = yaml.safe_load((resources.files("rewriter.cli") / "starters.yaml").read_text(encoding="utf-8"))
    entries = _entries(model_file, model_options)
    for rules in starters[job]["groups"]:
        written = [text for name, rule in rules.items() if (text := _rule(name, rule, entries))]
        if written:
            break
    else:
        raise PlanError(f"{model_file} has no tensor for --for {job}; reparam inspect {model_file} lists its tensors")
    model = " ".join(map(shlex.quote, [str(model_file), *model_options.words()]))
    comment = f"{starters[job]['comment']}\nCheck it:  reparam plan {output or 'spec.yaml'} {model}"
    head = [f"# {line}".rstrip() for line in comment.splitlines()]
    text = "\n".join([*head, "reparam: 1", *starters[job].get("keys", ()), "rules:", *written]) + "\n"
    return written_spec({"for": job}, text, output, force, model)


def _entries(path: Path, options: ModelOptions) -> list[Entry]:
    if not streamed(path, options.model is None):
        return entries_of(options.read(path))
    if computed := [row["names"][0] for row in tensors_of(path) if row["chain"]]:
        raise PlanError(f"{listing(computed)}: already computed by a chain; bake the checkpoint first")
    return entries_of_checkpoint(path, options)


def _rule(name: str, rule: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """Return the rule as YAML with the alternatives that match, or "" if none does."""
    from rewriter.language import load_spec

    matching: list[str] = []
    names: dict[str, None] = {}
    of_headers = not any(info.module_classes for entry in entries for info in entry.infos)
    for one in [*rule["select"], *([rule["form"]] if of_headers and "form" in rule else [])]:
        read = load_spec({"reparam": 1, "rules": [{"name": name, "select": one, "chain": ["identity"]}]})
        found = [entry for entry in entries if any(map(read.rules[0].select.matches, entry.infos))]
        if computed := [entry.name for entry in found if entry.site]:
            raise PlanError(f"{', '.join(computed)}: already computed by a chain; bake the model first")
        if found:
            matching.append(_flow(one) + ("  # embeddings, too: headers do not say" if one is rule.get("form") else ""))
            names.update(dict.fromkeys(entry.name for entry in found))
    if not matching:
        return ""
    shown = ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
    lines = [
        f"  - name: {name}  # {counted(len(names), 'tensor')}: {shown}",
        "    select:",
        *(f"      - {one}" for one in matching),
        f'    # except: ["{next(reversed(names))}"]  # tensors to leave alone',
        *([f"    {rule['key']}"] if "key" in rule else []),
        "    chain:",
        f"      - {rule['chain']}",
    ]
    return "\n".join(lines)


def _flow(selector: str | Mapping[str, Any]) -> str:
    """Return a selector as YAML on one line."""
    if isinstance(selector, str):
        return json.dumps(selector)
    pairs = (f"{key}: {json.dumps(value) if '*' in str(value) else value}" for key, value in selector.items())
    return "{" + ", ".join(pairs) + "}"
