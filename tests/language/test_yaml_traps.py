from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rewriter.errors import SpecError
from rewriter.language import _yaml as reader
from rewriter.language import load_spec
from rewriter.language._read import read

RULES = "rules: [{name: a, select: fc.weight, chain: [orthogonal]}]\n"


@pytest.fixture(params=["C", "Python"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of PyYAML's parsers, for those who have it without libyaml."""
    if request.param == "C" and not yaml.__with_libyaml__:
        pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr(reader, "_LOADER", yaml.CSafeLoader if request.param == "C" else yaml.SafeLoader)


def value(text: str) -> Any:
    document = read(f"x: {text}\n")
    assert not document.problems
    return document.data["x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3", 1e-3), ("1e5", 1e5), ("1.5E+3", 1500.0), (".5", 0.5), ("1.", 1.0), ("-0.0", 0.0), ("+3", 3),
        (".inf", float("inf")), ("-.Inf", float("-inf")), ("0o10", 8), ("0xff", 255), ("0", 0), ("-7", -7),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"), ("true", True), ("False", False),
        ("1:30", "1:30"), ("190:20:30", "190:20:30"), ("1_000", "1_000"), ("2020-01-01", "2020-01-01"), ("=", "="),
        ("'1'", "1"), ('"true"', "true"), ("''", ""), ("", None), ("~", None), ("null", None), ("none", "none"),
        ("1..", "1.."), ("3..8", "3..8"), ("..5", "..5"), ("0b11", "0b11"), ("1e", "1e"),
        ("1.2.3", "1.2.3"), ("e3", "e3"), ("|\n  on\n", "on\n"),
    ],
)  # fmt: skip
def test_scalars_mean_what_yaml_1_2_says(text: str, expected: Any) -> None:
    found = value(text)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "text", ["010", "-007", ".inf", "-.inf", ".NaN", "1e999", "9" * 30, "1" * 10_000, "!!int 3", "!x 3", "! 3"]
)
def test_scalars_that_readers_disagree_about_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        load_spec(f"reparam: {text}\n{RULES}")


def test_anchors_and_merge_keys_work_within_reason() -> None:
    spec = load_spec("""\
reparam: 1
rules:
  - &base
    name: a
    select: a.weight
    chain: &chain [orthogonal: {map: cayley}]
    cache: never
  - {<<: *base, name: b, select: b.weight}
  - {<<: [{cache: version}, *base], name: c, select: c.weight, chain: *chain}
""")
    assert [rule.cache for rule in spec.rules] == ["never", "never", "version"]
    assert spec.rules[0].chain == spec.rules[1].chain == spec.rules[2].chain


def test_an_alias_is_reported_where_it_is_used() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(f"reparam: &v 1\nabsorb: *v\n{RULES}")
    assert (caught.value.diagnostics[0].line, caught.value.diagnostics[0].column) == (2, 9)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{this}: &{this} [{','.join([f'*{before}'] * 9)}]\n" for before, this in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {" + ", ".join(f"k{i}: 1" for i in range(2000)) + "}\nb:\n" + "  - {<<: *a}\n" * 2000


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS, MERGES, "a: &a [*a]\n", "a: &a {b: *a}\n", "a: &a {<<: *a}\n", "a: " + "[" * 100_000,
        "a: " + "{a: " * 100_000, "- " * 100_000 + "\n", "? " * 10_000 + "\n", "a: [" + "x," * 120_000 + "]\n",
        "a: '" + "x" * 2**20 + "'\n", "#" * (2**20 + 1) + "\n", "a: &x " + "&y " * 1000 + "\n",
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
@pytest.mark.timeout(60)
@pytest.mark.parametrize("parser", ["C", pytest.param("Python", marks=pytest.mark.slow)], indirect=True)
def test_texts_that_explode_are_refused(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(text)
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe\x00", b"\x80abc", b"reparam: 1\n\xc3\x28", b"\x00" * 100, b"PK\x03\x04\x14\x00", b"",
        b"\xef\xbb\xbf", b"# only\n", b"---\n", b"...\n", b"\x7fELF\x02", "reparam: 1".encode("utf-16"),
    ],
)  # fmt: skip
def test_files_that_are_no_text_are_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(raw)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(str(path))


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + f"reparam: 1\n{RULES}".replace("\n", "\r\n").encode())
    assert len(load_spec(path).rules) == 1
    path.write_bytes(b"\xef\xbb\xbf" + "reparam: 1\r\n# é\r\nabsorb: 3\r\n".encode())
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    found = caught.value.diagnostics[-1]
    assert (found.line, found.column, found.source) == (3, 9, "absorb: 3")


def test_a_file_beyond_the_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(SpecError, match="larger than"):
        load_spec(path)
