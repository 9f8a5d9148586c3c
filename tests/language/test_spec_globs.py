from __future__ import annotations

import contextlib
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.language._glob import Glob, GlobError

NAMES = ["rnn.weight_hh_l0", "rnn.cell.weight_hh_l1", "blocks.0.attn.q.weight", "blocks.11.attn.k.bias", "head.weight"]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("head.weight", ["head.weight"]),
        ("*.weight", ["head.weight"]),
        ("head.*", ["head.weight"]),
        ("**.weight", ["blocks.0.attn.q.weight", "head.weight"]),
        ("rnn.**.weight_hh*", ["rnn.weight_hh_l0", "rnn.cell.weight_hh_l1"]),
        ("**weight**", [name for name in NAMES if "weight" in name]),
        ("blocks.*.attn.{q,v}.weight", ["blocks.0.attn.q.weight"]),
        ("blocks.{0,11}.**", ["blocks.0.attn.q.weight", "blocks.11.attn.k.bias"]),
        ("{head,blocks.*.{attn,mlp}.{q, k}}.{weight,bias}", NAMES[2:]),
        ("rnn.weight_hh_l{,0}", ["rnn.weight_hh_l0"]),
        ("*", []),
        ("**", NAMES),
        ("HEAD.weight", []),
        ("head", []),
        ("eight", []),
    ],
)
def test_a_glob_matches_full_dotted_names(pattern: str, matched: list[str]) -> None:
    assert [name for name in NAMES if Glob(pattern).matches(name)] == matched


@pytest.mark.parametrize("name", ["a[0].b", "a?.b", "a\\b", "a,b", "a+(b)", "a^$|b"])
def test_every_other_character_stands_for_itself(name: str) -> None:
    assert Glob(name).matches(name)
    assert not Glob(name).matches("a0.b")


def test_leading_double_star_stands_for_no_segment_too() -> None:
    assert Glob("**.weight").matches("weight")
    assert Glob("a.**.weight").matches("a.weight")
    assert not Glob("**.weight").matches("my_weight")
    assert not Glob("a.**").matches("a")


@pytest.mark.parametrize(
    "pattern", ["", ".", "a.", ".a", "a..b", "{a", "a}", "{a,{b}", "{" * 40 + "}" * 40, "a" * 1001]
)
def test_a_malformed_glob_is_an_error(pattern: str) -> None:
    with pytest.raises(GlobError):
        Glob(pattern)


@pytest.mark.parametrize(
    "pattern", ["**a" * 300 + "b", "*{a,aa}" * 120 + "b", "{a*,*a}" * 100 + "b", "*a*" * 300 + "b"]
)
def test_a_glob_with_very_many_wildcards_is_an_error(pattern: str) -> None:
    with pytest.raises(GlobError, match="wildcards and braces; at most"):
        Glob(pattern)


def test_a_glob_with_many_wildcards_is_matched() -> None:
    names = [f"model.decoder.layers.{i}.self_attention.{kind}_proj.weight" for i in range(500) for kind in "qkvo"]
    glob = Glob("**.{encoder,decoder}.**.layers.{*0,*5}.**attention**.{q*,k*,v*}.{weight,*scale*,**.bias}")
    assert sum(map(glob.matches, names)) == 300


WORDS = st.sampled_from(
    ["a", "b", "ab", "*", "**", "a*", "*b", "**a", "{a,b}", "{a,ab}b", "{,a*}", "{a.b,*}", "{**.a,b}"]
)
GLOBS = st.lists(WORDS, min_size=1, max_size=5).map(".".join)
DOTTED = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=5).map(".".join)


def expand(pattern: str) -> list[str]:
    """Write out the innermost braces, until there are none."""
    close = pattern.find("}")
    if close < 0:
        return [pattern]
    start = pattern.rfind("{", 0, close)
    branches = pattern[start + 1 : close].split(",")
    return [one for branch in branches for one in expand(pattern[:start] + branch + pattern[close + 1 :])]


def reference(pattern: str, name: str) -> bool:
    """Match by trying everything, one character at a time."""

    @cache
    def match(at: int, found: int) -> bool:
        rest, left = pattern[at:], name[found:]
        if not rest:
            return not left
        if rest.startswith("**"):
            skips = rest.startswith("**.") and (at == 0 or pattern[at - 1] == ".")
            return (skips and match(at + 3, found)) or any(match(at + 2, found + n) for n in range(len(left) + 1))
        if rest[0] == "*":
            segment = len(left.partition(".")[0])
            return any(match(at + 1, found + n) for n in range(segment + 1))
        return left[:1] == rest[0] and match(at + 1, found + 1)

    return match(0, 0)


@settings(max_examples=100)
@given(GLOBS, DOTTED)
def test_globs_agree_with_trying_everything(pattern: str, name: str) -> None:
    assert Glob(pattern).matches(name) == any(reference(one, name) for one in expand(pattern))


@settings(max_examples=100)
@given(st.text("ab*{},. ", max_size=12), DOTTED)
def test_any_text_is_a_glob_or_a_glob_error(pattern: str, name: str) -> None:
    with contextlib.suppress(GlobError):
        Glob(pattern).matches(name)
