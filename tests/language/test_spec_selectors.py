from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from rewriter.language import Rule, Selector, TensorInfo, class_names, load_spec

LINEAR = TensorInfo("blocks.0.fc.weight", class_names(nn.Linear), "parameter", (64, 32), "float32", True)
BUFFER = TensorInfo("bn.running_mean", class_names(nn.BatchNorm1d), "buffer", (8,), "float64", False)


class Wide(nn.Linear):
    class Inner(nn.Conv2d):
        pass


def test_a_tensor_knows_its_owner_and_its_own_name() -> None:
    assert (LINEAR.owner, LINEAR.tensor, LINEAR.ndim) == ("blocks.0.fc", "weight", 2)
    assert (TensorInfo("weight").owner, TensorInfo("weight").tensor) == ("", "weight")


@pytest.mark.parametrize(
    ("written", "linear", "buffer"),
    [
        ("**.weight", True, False),
        ({"path": "blocks.*.fc.weight"}, True, False),
        ({"path": "blocks.*.fc"}, False, False),
        ({"path": "blocks.*.fc", "tensor": "weight"}, True, False),
        ({"path": "blocks.*.fc.weight", "tensor": "weight"}, True, False),
        ({"path": "blocks.*.fc", "tensor": "bias"}, False, False),
        ({"tensor": "running_*"}, False, True),
        ({"regex": r"blocks\.\d+\.fc\.weight"}, True, False),
        ({"regex": r"blocks\.\d+"}, False, False),
        ({"module": "Linear"}, True, False),
        ({"module": "torch.nn.Linear"}, True, False),
        ({"module": "torch.nn.modules.linear.Linear"}, True, False),
        ({"module": "Module"}, True, True),
        ({"module": "linear"}, False, False),
        ({"module": "torch.nn.modules.batchnorm._BatchNorm"}, False, True),
        ({"kind": "buffer"}, False, True),
        ({"kind": "parameter"}, True, False),
        ({"ndim": 2}, True, False),
        ({"ndim": "<2"}, False, True),
        ({"shape": [64, 32]}, True, False),
        ({"shape": [">=64", "*"]}, True, False),
        ({"shape": [">64", "*"]}, False, False),
        ({"shape": ["<=8"]}, False, True),
        ({"shape": ["!=64", "==32"]}, False, False),
        ({"shape": ["*"]}, False, True),
        ({"shape": []}, False, False),
        ({"dtype": "float32"}, True, False),
        ({"dtype": "torch.double"}, False, True),
        ({"requires_grad": False}, False, True),
        ({"module": "Linear", "ndim": 1}, False, False),
        (["bn.**", {"module": "Linear", "ndim": 2}], True, True),
        (["nothing", "bn.*"], False, True),
    ],
)
def test_a_selector_means_the_tensors_its_predicates_describe(written: Any, linear: bool, buffer: bool) -> None:
    selector = load_spec(
        {"reparam": 1, "rules": [{"name": "a", "select": written, "chain": ["orthogonal"]}]}
    ).rules[0].select  # fmt: skip
    assert (selector.matches(LINEAR), selector.matches(BUFFER)) == (linear, buffer)


def test_subclasses_answer_to_all_their_base_classes() -> None:
    names = class_names(Wide)
    assert {"Wide", "Linear", "torch.nn.Linear", "torch.nn.modules.linear.Linear", "torch.nn.Module"} <= set(names)
    assert f"{__name__}.Wide" in names
    assert {"Inner", "Wide.Inner", f"{__name__}.Wide.Inner", "torch.nn.Conv2d"} <= set(class_names(Wide.Inner))
    assert "object" not in names


def test_a_joint_rule_selects_by_the_owner() -> None:
    spec = load_spec({
        "reparam": 1,
        "rules": [
            {"name": "a", "select": "blocks.*.fc", "joint": ["weight", "bias"], "chain": ["identity"]},
            {"name": "b", "select": {"module": "Linear", "path": "blocks.*.fc"}, "joint": ["weight", "bias"],
             "except": ["blocks.1.fc"], "chain": ["identity"]},
        ],
    })  # fmt: skip
    assert all(rule.select.matches(LINEAR) for rule in spec.rules)
    excluded = spec.rules[1].exclude
    assert excluded is not None
    assert excluded.matches(TensorInfo("blocks.1.fc.weight")) and not excluded.matches(LINEAR)


def test_each_entry_of_a_list_is_a_selector_with_its_place() -> None:
    spec = load_spec("""\
reparam: 1
rules:
  - name: a
    select:
      - "head.*"
      - {tensor: bias, shape: [3, "*"], requires_grad: true}
    chain: [identity]
""")
    selector = spec.rules[0].select
    first, second = selector.alternatives
    assert (str(first), str(spec.rules[0].where("select", 0))) == ("head.*", "<spec>:5:9")
    assert str(second) == "{tensor: bias, shape: [3, *], requires_grad: true}"
    assert spec.rules[0].where("select", 1).line == 6
    assert str(selector) == f"[{first}, {second}]"


def test_selectors_compare_by_what_is_written_and_pickle() -> None:
    def select(*alternatives: Any) -> Selector:
        return Rule(name="a", select=alternatives, chain=("orthogonal",)).select  # type: ignore[arg-type]

    written = ["a.*", {"module": "Linear", "regex": "a+", "shape": (">=3",)}]
    assert select(*written) == select(*written) == pickle.loads(pickle.dumps(select(*written)))
    assert select(*written) != select("a.*") == select({"path": "a.*"})
    assert hash(select(*written)) == hash(select(*written))


def test_every_dtype_of_the_language_is_one_of_torch() -> None:
    from rewriter.language._selector import DTYPES

    for name, canonical in DTYPES.items():
        if hasattr(torch, name):
            assert str(getattr(torch, name)) == f"torch.{canonical}"
