"""The prose of README, docs/ and the commands' help: short sentences, without the words that the style guide bans."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import signature

import pytest

from rewriter.cli._app import app
from tests.docs.pages import CHECKOUT, PAGES

LONGEST = 30
BANNED = re.compile(
    r"\b(?:anew|heed\w*|told|whoever|lest|as ever|so does|in one go|on the way|what comes of|where there is one"
    r"|leaves to|let go)\b|(?:^|[.!?] )Of\b",
    re.I,
)
GENERATED = {"benchmarks"}
"""Tables of numbers that `benchmarks/run.py` writes."""


def sentences(page: str) -> Iterator[str]:
    """Yield the sentences of a page: of its paragraphs, list items, headings and table cells, without code."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "\n\n", page, flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^\s*(?:[-*] |\d+\. |#+ |\|[-|: ]+\|$)", "\n\n", text, flags=re.M)
    for part in re.split(r"\n\s*\n|\|", text):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(part.split())):
            if sentence:
                yield sentence


def test_sentences_are_separated() -> None:
    page = "# One two\n\nA `b c` d. Then\nthis!\n\n- item one\n- item [two](x.md)\n\n"
    page += "| a b | c |\n|---|---|\n| d | e |\n```python\nx = 1\n```\n"
    assert list(sentences(page)) == [
        "One two", "A code d.", "Then this!", "item one", "item two", "a b", "c", "d", "e",
    ]  # fmt: skip


def texts() -> dict[str, str]:
    """Return the pages, and all the help of each command, by name."""
    found = {name: PAGES[name].read_text() for name in sorted(PAGES.keys() - GENERATED)}
    found["CONTRIBUTING"] = (CHECKOUT / "CONTRIBUTING.md").read_text()
    for command in app.registered_commands:
        hints = [
            parameter.annotation.__metadata__[0].help for parameter in signature(command.callback).parameters.values()
        ]
        found[f"reparam {command.callback.__name__}"] = "\n\n".join([command.callback.__doc__, *filter(None, hints)])
    return found


TEXTS = texts()


@pytest.mark.parametrize("name", TEXTS)
def test_sentences_are_short(name: str) -> None:
    long = [sentence for sentence in sentences(TEXTS[name]) if len(sentence.split()) > LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("name", TEXTS)
def test_banned_words_are_absent(name: str) -> None:
    found = [sentence for sentence in sentences(TEXTS[name]) if BANNED.search(sentence)]
    assert not found, "\n".join(found)
