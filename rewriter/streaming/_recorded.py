"""What a checkpoint contains, read one tensor at a time: stored tensors, recorded chains and the values of chains."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from rewriter.errors import ModelFileError, RewriterError
from rewriter.language import Spec, load_spec
from rewriter.planning import dtype_name
from rewriter.sites import CONTAINER
from rewriter.streaming._checkpoint import CHAINS, Checkpoint, read_tensor
from rewriter.streaming._groups import Group, groups_of, recorded_forms
from rewriter.streaming._plan import CheckpointPlan, planned

_SITE = re.compile(rf"((?:.+\.)?){CONTAINER}\.([^.]+)")
_STEP = re.compile(r"([\w.]+)(?:\((.*)\))?", re.DOTALL)
_ARGUMENT = re.compile(r"(?:^|, )(\w+)=")


@dataclass(frozen=True)
class Tensors(Mapping[str, Tensor]):
    """Tensors that are read or evaluated each time that they are asked for, so that none of them stays in memory."""

    readers: Mapping[str, Callable[[], Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint contains.

    Arguments:
        stored: the tensors of its files, by each of their names.
        values: the plain tensors, by each of their names; those of chains that are not known are left out.
        chains: the chain of each computed tensor as text, by its first name.
        computed: all names of the computed tensors.
        unknown: the first names of those whose chain is not known.
    """

    stored: Tensors
    values: Tensors
    chains: Mapping[str, str]
    computed: tuple[str, ...]
    unknown: tuple[str, ...]


def contents_of(checkpoint: Checkpoint, spec: Spec | None = None) -> Contents:
    """Return what a checkpoint contains; no tensor is read yet.

    Arguments:
        checkpoint: the files.
        spec: of its chains. Without it they are read from the record, if that has all that they take.

    Raises:
        PlanError: the checkpoint was not rewritten with the spec.
    """
    stored = {name: partial(read_tensor, found) for name, found in checkpoint.tensors.items()}
    stored |= {name: stored[kept] for name, kept in checkpoint.aliases.items()}
    groups = groups_of(checkpoint)
    recorded = recorded_chains(checkpoint)
    chains = _texts(recorded, groups)
    plan = None
    if chains:
        plan = planned(checkpoint, spec) if spec is not None else _recorded_plan(checkpoint, recorded, list(chains))
    values: dict[str, Callable[[], Tensor]] = {}
    for name, group in groups.items():
        if group.plain:
            values.update(dict.fromkeys(group.names, partial(read_tensor, group.state[""])))
        elif plan is not None:
            values.update(dict.fromkeys(group.names, partial(plan.sources.tensor, name)))
    computed = tuple(name for group in groups.values() if not group.plain for name in group.names)
    return Contents(Tensors(stored), Tensors(values), chains, computed, () if plan is not None else tuple(chains))


def described_tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Describe the plain tensors from headers, with the recorded chains; stored tensors of other chains by themselves.

    Raises:
        ModelFileError: a record is damaged.
    """
    chains, forms = recorded_chains(checkpoint), recorded_forms(checkpoint)
    rows: list[dict[str, Any]] = []
    for name, group in groups_of(checkpoint).items():
        if group.plain:
            rows.append(_row(group.names, group.state[""].shape, dtype_name(group.state[""].dtype)))
        elif name in chains and name in forms:
            chain = list(map(str, chains[name]["chain"]))
            rows += [_row(one.names, one.infos[0].shape, one.infos[0].dtype, chain) for one in forms[name]]
        else:
            rows += [_row([one.name], one.shape, dtype_name(one.dtype)) for one in group.state.values()]
    return rows


def _row(names: Sequence[str], shape: Sequence[int], dtype: str, chain: list[str] | None = None) -> dict[str, Any]:
    kind = "tensor" if chain is None else "computed"
    unknown = dict.fromkeys(("requires_grad", "rule", "cache"))
    return {"names": list(names), "kind": kind, "shape": list(shape), "dtype": dtype, "chain": chain, **unknown}


def recorded_chains(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return the identity of each recorded chain, by the first name of the tensor that it computes.

    Raises:
        ModelFileError: the record is damaged.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for path, record in checkpoint.recorded(CHAINS).items():
        match = _SITE.fullmatch(path)
        if record is None:  # an absorbed chain
            continue
        if match is None or not isinstance(record, Mapping) or not isinstance(record.get("chain"), list):
            raise ModelFileError(f"{checkpoint.path}: the record of the chain at {path!r} is damaged")
        found[match[1] + match[2]] = record
    return found


def _texts(chains: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Group]) -> dict[str, str]:
    computed = [name for name, group in groups.items() if not group.plain]
    return {
        name: " >> ".join(map(str, chains[name]["chain"])) if name in chains else "a chain that is not recorded"
        for name in computed
    }


def _recorded_plan(
    checkpoint: Checkpoint, chains: Mapping[str, Mapping[str, Any]], computed: Sequence[str]
) -> CheckpointPlan | None:
    """Return the plan of the recorded chains; None if one of them is not recorded with all that it takes.

    What was read back from the text is right: `planned` refuses a chain of another identity.
    """
    if any(name not in chains or chains[name].get("options") for name in computed):
        return None
    try:
        return planned(checkpoint, _spec({name: chains[name]["chain"] for name in computed}))
    except (RewriterError, ValueError):
        return None


def _spec(chains: Mapping[str, list[Any]]) -> Spec:
    same: dict[str, list[str]] = {}
    for name, chain in chains.items():
        same.setdefault(repr(chain), []).append(name)
    rules = [
        {
            "name": f"recorded {number}",
            "select": [{"regex": re.escape(name)} for name in names],
            "chain": [_step(str(text)) for text in chains[names[0]]],
        }
        for number, names in enumerate(same.values(), 1)
    ]
    return load_spec({"reparam": 1, "rules": rules})


def _step(text: str) -> Any:
    """Return a step as a spec has it.

    >>> _step("symmetric"), _step("lora(r=2, init_lora_weights=pissa)")
    ('symmetric', {'lora': {'r': 2, 'init_lora_weights': 'pissa'}})
    """
    match = _STEP.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no step")
    return {match[1]: dict(_arguments(match[2]))} if match[2] else match[1]


def _arguments(text: str) -> Iterator[tuple[str, Any]]:
    _, *parts = _ARGUMENT.split(text)
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        try:
            yield key, ast.literal_eval(value)
        except (ValueError, SyntaxError):
            yield key, value
