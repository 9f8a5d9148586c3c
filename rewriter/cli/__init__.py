"""The `reparam` command."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from rewriter.cli import (
    _apply,
    _bake,
    _catalog,
    _demo,
    _diff,
    _draw,
    _explain,
    _inspect,
    _schema,
    _validate,
)
from rewriter.cli._app import app
from rewriter.cli._outcome import INTERRUPTED, USAGE, Outcome, error_document, exit_code

__all__ = ["app", "main"]

# In the order in which `--help` lists them.
_COMMANDS = (_apply, _bake, _catalog, _demo, _diff, _draw, _explain, _inspect, _schema, _validate)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code.

    Results go to stdout, as one JSON document with ``--json``; everything else goes to stderr. An error is a
    message, never a traceback, unless ``--debug`` asks for it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    # What a user's module prints must not end up in the document.
    aside: contextlib.AbstractContextManager[Any] = (
        contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    )
    if "--debug" not in given:
        _quiet()
    try:
        with aside:
            outcome = app(args=given or ["--help"], prog_name="reparam", standalone_mode=False)
        if outcome == INTERRUPTED:
            # Typer's translation of an interrupt.
            raise KeyboardInterrupt
        if isinstance(outcome, Outcome):
            _show(outcome, as_json)
        sys.exit(0 if given else USAGE)
    except BrokenPipeError:
        # Whoever reads has seen enough; the interpreter must not complain when it flushes at exit.
        sys.stdout = None
        sys.exit(0)
    except KeyboardInterrupt:
        _fail("interrupted", error_document(KeyboardInterrupt("interrupted"), INTERRUPTED), as_json, INTERRUPTED)
    except Exception as error:
        _report(error, as_json, debug="--debug" in given)


def _quiet() -> None:
    # torch talks to its developers, through warnings and with tracebacks of what it then raises.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True


def _show(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_finite(outcome.document), indent=2, ensure_ascii=False, allow_nan=False))
    elif outcome.text:
        from rich.console import Console

        Console(soft_wrap=isinstance(outcome.text, str), highlight=False, markup=False).print(outcome.text)
    sys.stdout.flush()


def _report(error: Exception, as_json: bool, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    if type(error).__module__.startswith(("typer", "click")):
        text = getattr(error, "format_message", lambda: "aborted")()
        code = INTERRUPTED if type(error).__name__ == "Abort" else USAGE
        context = getattr(error, "ctx", None)
        path = getattr(context, "command_path", "reparam")
        _fail(
            f"{text}\nTry `{path} --help`.",
            {"error": {"kind": "Usage", "message": text, "exit_code": code}},
            as_json,
            code,
        )
    code = exit_code(error)
    text = str(error)
    if code == 1:
        text = f"{type(error).__name__}: {text}" + ("" if debug else "\n(--debug shows where)")
    _fail(text, error_document(error, code), as_json, code)


def _fail(text: str, document: dict[str, Any], as_json: bool, code: int) -> NoReturn:
    print(text, file=sys.stderr)
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    sys.exit(code)


def _finite(value: Any) -> Any:
    # JSON knows neither NaN nor infinity.
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
