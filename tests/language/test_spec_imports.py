from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rewriter.errors import SpecError
from rewriter.language import load_spec

TEXT = """\
reparam: 1
imports: {my: my_pkg.constraints}
rules: [{name: a, select: x, chain: [{my.Scale: {factor: 2}}]}]
"""


@pytest.mark.parametrize("allowed", [None, ["my_pkg"], {"my_pkg.constraints"}, "my_pkg", ["other", "my_pkg"]])
def test_an_allowed_import_is_usable(allowed: list[str] | None) -> None:
    assert load_spec(TEXT, allow_imports=allowed).rules[0].chain[0].name == "my.Scale"


@pytest.mark.parametrize("allowed", [[], ["my"], ["my_pkg.constraints.more"], ["my_pkg.other"], "my_pkg.con", [""]])
def test_an_import_that_was_not_allowed_does_not_run(allowed: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(TEXT, allow_imports=allowed)
    (found,) = caught.value.diagnostics
    assert (found.line, found.column) == (2, 15)
    assert "--allow-import my_pkg" in str(caught.value)
    assert not any(name.startswith("my_pkg") for name in sys.modules)


def test_a_spec_without_imports_needs_no_permission() -> None:
    text = "reparam: 1\nrules: [{name: a, select: x, chain: [orthogonal]}]\n"
    assert load_spec(text, allow_imports=()).imports == {}


def test_the_current_folder_is_no_place_to_import_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lying_about.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    before = list(sys.path)
    with pytest.raises(SpecError, match="there is no module 'lying_about'"):
        load_spec(TEXT.replace("my_pkg.constraints", "lying_about"))
    assert sys.path == before


@pytest.mark.parametrize(
    "name", ["my.os.system", "my.nn.init.zeros_", "my.__class__", "my.Scale.__init__", "my.", "my..Scale"]
)
def test_a_name_reaches_only_what_its_own_package_defines(name: str) -> None:
    with pytest.raises(SpecError):
        load_spec(TEXT.replace("{my.Scale: {factor: 2}}", name))


def test_geotorch_needs_no_import_and_its_arguments_are_checked() -> None:
    pytest.importorskip("geotorch")
    rule = {"name": "a", "select": "x", "chain": [{"geotorch.SO": {"triv": "cayley"}}]}
    step = load_spec({"reparam": 1, "rules": [rule]}, allow_imports=()).rules[0].chain[0]
    assert step.factory is not None and step.factory.__name__ == "SO"
    for chain, message in [
        ([{"geotorch.SO": {"trif": "cayley"}}], "did you mean 'triv'"),
        (["geotorch.S0"], "did you mean 'geotorch.SO'"),
        (["geotorch.parametrize.torch.load"], "unknown parametrization"),
    ]:
        with pytest.raises(SpecError, match=message):
            load_spec({"reparam": 1, "rules": [rule | {"chain": chain}]})
