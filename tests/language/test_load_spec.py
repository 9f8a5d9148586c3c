from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType

import pytest
from pydantic import ValidationError
from torch import nn

from rewriter.errors import SpecError
from rewriter.language import Expect, Location, Per, Rule, Spec, load_spec
from rewriter.parametrizations._chain import chain

EVERY_KEY = Path(__file__).with_name("every_key.yaml")
ONE = {"reparam": 1, "rules": [{"name": "a", "select": "fc.weight", "chain": ["orthogonal"]}]}


class Double(nn.Module):
    def forward(self, X):  # type: ignore[no-untyped-def]
        return 2 * X


def test_the_spec_with_every_key_loads() -> None:
    spec = load_spec(EVERY_KEY)
    rules = {rule.name: rule for rule in spec.rules}
    assert list(rules) == [
        "recurrent-kernel", "attention", "gates", "filters", "tied-head", "affine-of", "folded", "last-block",
    ]  # fmt: skip
    assert spec.imports == {"my": "my_pkg.constraints"}
    assert [str(step) for step in rules["recurrent-kernel"].chain] == ["orthogonal(map=cayley)", "my.Scale(factor=0.9)"]
    assert rules["recurrent-kernel"].chain[1].factory is sys.modules["my_pkg.constraints"].Scale
    assert rules["attention"].expect == Expect(33, 33)
    assert rules["gates"].per == Per(dim=0, chunks=4)
    assert rules["filters"].reshape == ("out", -1)
    assert rules["tied-head"].source == "embed.weight"
    assert rules["affine-of"].chain[0].inputs == ("encoder.weight",)
    assert rules["affine-of"].chain[0].arguments == {}
    assert rules["folded"].joint == ("weight", "bias")
    assert rules["last-block"].overrides == ("attention",) and rules["last-block"].chain == ()


def test_a_spec_comes_from_a_path_a_text_a_mapping_or_a_spec(tmp_path: Path) -> None:
    spec = load_spec(ONE)
    text = json.dumps(ONE)
    path = tmp_path / "spec"
    path.write_text(text)
    assert load_spec(text) == load_spec(path) == load_spec(str(path)) == load_spec(spec) == spec
    assert load_spec(MappingProxyType(OrderedDict(ONE))) == spec
    assert load_spec(path).source == str(path) and spec.source == "<spec>"


@pytest.mark.parametrize("name", ["nowhere.yaml", "nowhere.YML", "a/b/nowhere.json"])
def test_a_path_that_does_not_exist_says_so(name: str, tmp_path: Path) -> None:
    for source in (name, Path(name), tmp_path / "other", tmp_path):
        with pytest.raises(SpecError, match=r"there is no such file|Is a directory"):
            load_spec(source)


@pytest.mark.parametrize("source", [None, 3, b"reparam: 1", ["reparam"], object()])
def test_what_is_no_spec_at_all_is_a_spec_error(source: object) -> None:
    with pytest.raises(SpecError, match="a path, YAML text or a mapping"):
        load_spec(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["", " ", "x" * 5000, "\0", "a\0.yaml", "/" + "d" * 300 + ".yaml"])
def test_odd_texts_are_spec_errors(source: str) -> None:
    with pytest.raises(SpecError):
        load_spec(source)


def test_defaults() -> None:
    rule = load_spec(ONE).rules[0]
    assert (rule.cache, rule.init, rule.batch, rule.memory) == ("forward", "keep", "auto", "keep")
    assert not rule.share and not rule.unsafe and rule.overrides == rule.joint == ()
    assert (rule.exclude, rule.per, rule.reshape, rule.source, rule.expect) == (None, None, None, None, Expect(1, None))


@pytest.mark.parametrize(
    ("written", "met", "shown"),
    [(33, [33], "33"), ("1..", [1, 3, 5, 8, 33], "1.."), ("3..8", [3, 5, 8], "3..8"), ("..5", [0, 1, 3, 5], "0..5")],
)
def test_expect_is_a_count_or_a_range(written: int | str, met: list[int], shown: str) -> None:
    expect = Expect.read(written)
    assert [count for count in (0, 1, 3, 5, 8, 33) if count in expect] == met
    assert str(expect) == shown and Expect.read(expect.written()) == expect


def test_absorb_alone_is_a_spec() -> None:
    assert load_spec("reparam: 1\nabsorb: true\n") == Spec(reparam=1, absorb=True)


def test_a_spec_can_be_made_of_its_values() -> None:
    rule = Rule(name="a", select="fc.weight", chain=("orthogonal",))  # type: ignore[arg-type]
    assert Spec(reparam=1, rules=(rule,)) == load_spec(ONE) == load_spec(Spec(reparam=1, rules=(rule,)))
    with pytest.raises(ValidationError, match=r"rules\[0\] has the name 'a' already"):
        Spec(reparam=1, rules=(rule, rule))
    with pytest.raises(ValidationError, match="missing key 'rules'"):
        Spec(reparam=1)
    with pytest.raises(ValidationError, match="unknown parametrization 'ortogonal'"):
        Rule(name="a", select="fc.weight", chain=("ortogonal",))  # type: ignore[arg-type]


def test_a_chain_from_python_may_contain_modules() -> None:
    double = Double()
    rule = {"name": "a", "select": "x", "chain": ["orthogonal", double]}
    spec = load_spec({"reparam": 1, "rules": [rule]})
    step = spec.rules[0].chain[1]
    assert step.module is double and step.name == "Double" and step.factory is None and str(step) == "Double"
    assert load_spec(spec.to_dict()) == spec


def test_a_composed_chain_from_python_is_its_steps() -> None:
    first, second, third = Double(), Double(), Double()
    composed = chain(first, second)
    written = [composed, [composed, third], [third, composed, "orthogonal"], third, nn.Sequential(third)]
    rules = [{"name": f"r{i}", "select": "x", "chain": chain} for i, chain in enumerate(written)]
    spec = load_spec({"reparam": 1, "rules": rules})
    assert [[step.module for step in rule.chain] for rule in spec.rules] == [
        [first, second], [first, second, third], [third, first, second, None], [third], [written[-1]],
    ]  # fmt: skip


def test_a_module_elsewhere_than_in_a_chain_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"rules\[0\]\.select: .* found an object of class Double"):
        load_spec({"reparam": 1, "rules": [{"name": "a", "select": Double(), "chain": ["identity"]}]})


def test_a_mapping_reports_paths() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec({"reparam": 1, "rules": [{"name": "a", "select": "x", "chain": [{"orthogonal": {"map": "caley"}}]}]})
    (found,) = caught.value.diagnostics
    assert (found.line, found.path) == (None, "rules[0].chain[0].orthogonal.map")
    assert str(caught.value).startswith("<spec>: rules[0].chain[0].orthogonal.map: `map` must be")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {3: 4}, {1, 2}, object(), b"x", 1 + 2j])
def test_values_that_no_text_has_are_errors_in_mappings(value: object) -> None:
    for key in ("select", "expect", "share", "reshape"):
        with pytest.raises(SpecError):
            load_spec({"reparam": 1, "rules": [{"name": "a", "select": "x", "chain": ["identity"], key: value}]})


def test_a_mapping_inside_itself_is_an_error() -> None:
    rule: dict[str, object] = {"name": "a", "select": "x"}
    rule["chain"] = [{"orthogonal": rule}]
    with pytest.raises(SpecError, match="nested more than"):
        load_spec({"reparam": 1, "rules": [rule]})


def test_arguments_arrive_as_the_constructor_wants_them() -> None:
    spec = load_spec("""\
reparam: 1
imports: {my: my_pkg.constraints}
rules:
  - name: a
    select: x
    chain:
      - my.Scale: {factor: 2}
      - my.Window: {sizes: [3, 4], names: [a], anything: {b: [1]}}
      - my.half: {times: 2, label: h}
      - my.half
      - my.Open: {whatever: 3}
      - orthogonal:
      - my.Bound: {at: b, odd: [1]}
""")
    scale, window, half, plain, _, bare, odd = spec.rules[0].chain
    assert scale.arguments == {"factor": 2.0} and isinstance(scale.arguments["factor"], float)
    assert window.arguments == {"sizes": (3, 4), "names": ["a"], "anything": {"b": [1]}}
    assert half.arguments == {"times": 2} and half.label == "h"
    assert plain.arguments == bare.arguments == {}
    assert odd.arguments == {"at": "b", "odd": [1]}
    assert load_spec(spec.to_dict()) == spec


def test_a_spec_written_out_loads_to_an_equal_spec() -> None:
    spec = load_spec(EVERY_KEY)
    plain = spec.to_dict()
    assert load_spec(plain) == spec
    assert load_spec(json.dumps(plain) + "\n") == spec
    assert load_spec(copy.deepcopy(plain)).to_dict() == plain
    rule = {
        "name": "all", "select": ["a", {"shape": [3, "*"], "requires_grad": False}], "except": {"kind": "buffer"},
        "expect": "3..8", "cache": "version", "init": "raw", "share": True, "unsafe": True, "batch": "never",
        "memory": "recompute", "per": {"dim": -1, "chunks": 2}, "reshape": ["out", "in", 3], "from": "b",
        "chain": [{"orthogonal": {"map": "cayley", "label": "q", "inputs": ["c"]}}],
    }  # fmt: skip
    assert load_spec({"reparam": 1, "absorb": True, "rules": [rule]}).to_dict()["rules"] == [rule]


def test_a_spec_is_immutable_and_survives_copies_and_pickles() -> None:
    spec = load_spec(EVERY_KEY)
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert hash(spec) == hash(load_spec(EVERY_KEY))
    with pytest.raises(ValidationError, match="frozen"):
        spec.rules[0].name = "b"
    with pytest.raises(TypeError):
        spec.rules[0].chain[0].arguments["map"] = "x"  # type: ignore[index]


def test_rules_know_where_their_keys_are_written() -> None:
    rule = load_spec(EVERY_KEY).rules[1]
    assert str(rule.location) == f"{EVERY_KEY}:10:5"
    assert (rule.where("expect").line, rule.where("expect").column) == (13, 13)
    assert rule.where("except", 0).column == 14 and rule.where("select", "ndim").line == 11
    assert str(rule.where("cache")) == str(rule.location)
    assert rule.chain[0].location.line == 14
    assert "attention" in (rule.where("name").source or "")
    assert str(load_spec(ONE).rules[0].where("select")) == "<spec> rules[0].select"
    diagnostic = rule.where("expect").diagnose("owns 3 sites", "look again")
    assert str(diagnostic).splitlines()[-2].index("^") == str(diagnostic).splitlines()[1].index("33")
    assert Location().diagnose("x").message == "x"


@pytest.mark.timeout(60)
def test_two_thousand_rules_load() -> None:
    rules = "".join(
        f"  - name: r{i}\n"
        f"    select: {{path: 'blocks.{i}.{{q,k}}.weight', module: torch.nn.Linear, shape: ['>=64', '*']}}\n"
        "    chain:\n      - orthogonal: {map: cayley}\n      - spectral_norm\n"
        for i in range(2000)
    )
    assert len(load_spec(f"reparam: 1\nrules:\n{rules}").rules) == 2000


def test_the_language_imports_neither_torch_nor_other_layers() -> None:
    code = "import sys, rewriter.language as it; it.load_spec('reparam: 1\\nrules: []\\n'); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    own = {name for name in ran.stdout.split() if name.startswith("rewriter.") and "language" not in name}
    assert own == {"rewriter.errors"} and "torch" not in ran.stdout.split()


def test_spec_errors_pickle_with_their_diagnostics() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("reparam: 2\n")
    assert pickle.loads(pickle.dumps(caught.value)).diagnostics == caught.value.diagnostics
