"""The `reparam` command."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rewriter.cli._app import app
from rewriter.cli._outcome import INTERRUPTED, USAGE, Outcome, error_document, exit_code
from rewriter.errors import printable

__all__ = ["app", "main"]

JSON_VERSION = 1
"""Of the documents of ``--json``, as docs/json.md describes them."""

# Each module registers its commands.
for _name in "init recipes apply bake merge demo inspect explain diff report draw language".split():
    importlib.import_module(f"rewriter.cli._{_name}")
_ORDER = "demo init recipes validate plan apply bake report inspect diff explain draw merge catalog schema".split()
app.registered_commands.sort(key=lambda command: _ORDER.index(getattr(command.callback, "__name__", "")))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code.

    Results go to stdout, as one JSON document with ``--json``. Everything else goes to stderr. An error is a message;
    ``--debug`` adds the traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json, debug = "--json" in given, "--debug" in given
    # The output of a user's module must not mix with the document.
    aside: contextlib.AbstractContextManager[Any] = (
        contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    )
    try:
        with aside, warnings.catch_warnings():
            _set_warnings(debug)
            outcome = app(args=given or ["--help"], prog_name="reparam", standalone_mode=False)
        if outcome == INTERRUPTED:  # Typer returns it for an interrupt.
            raise KeyboardInterrupt
        if isinstance(outcome, Outcome):
            _show(outcome, as_json)
        sys.exit(0 if given else USAGE)
    except BrokenPipeError:
        sys.stdout = None  # The interpreter would raise again when it flushes at exit.
        sys.exit(0)
    except KeyboardInterrupt:
        _fail("interrupted", error_document(KeyboardInterrupt("interrupted"), INTERRUPTED), as_json, INTERRUPTED)
    except Exception as error:
        _report(error, as_json, debug)


def _set_warnings(debug: bool) -> None:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
    warnings.simplefilter("default", UserWarning)  # A warning of a command is never its end.
    if not debug:  # These are for torch's developers.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        logging.getLogger("torch._subclasses.fake_tensor").disabled = True


def _show(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        _print_json(outcome.document)
    elif outcome.text:
        from rich.console import Console

        text = printable(outcome.text, keep="\n") if isinstance(outcome.text, str) else outcome.text
        console = Console(soft_wrap=isinstance(text, str), highlight=False, markup=False)
        if console.is_terminal:
            console.print(text)
        else:  # A file or another program gets lines of any length.
            console.width = 10_000
            with console.capture() as captured:
                console.print(text)
            print("\n".join(map(str.rstrip, captured.get().splitlines())))
    sys.stdout.flush()


def _report(error: Exception, as_json: bool, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    if type(error).__module__.startswith(("typer", "click")):
        text = getattr(error, "format_message", lambda: "aborted")().replace("Value error, ", "")
        code = INTERRUPTED if type(error).__name__ == "Abort" else USAGE
        path = getattr(getattr(error, "ctx", None), "command_path", "reparam")
        document = {"error": {"kind": "Usage", "message": text, "exit_code": code}}
        _fail(f"{text}\nTry `{path} --help`.", document, as_json, code)
    code = exit_code(error)
    text = str(error)
    if code == 1:
        text = f"{type(error).__name__}: {text}" + ("" if debug else "\n(--debug shows the traceback)")
    _fail(text, error_document(error, code), as_json, code)


def _fail(text: str, document: dict[str, Any], as_json: bool, code: int) -> NoReturn:
    try:
        print(printable(text, keep="\n\t"), file=sys.stderr)
        if as_json:
            _print_json(document)
            sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None
    sys.exit(code)


def _print_json(document: Mapping[str, Any]) -> None:
    if "$schema" not in document:
        document = {"version": JSON_VERSION, **document}
    text = json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False)
    print(printable(text, keep="\n"))


def _finite(value: Any) -> Any:
    # JSON has neither NaN nor infinity.
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
