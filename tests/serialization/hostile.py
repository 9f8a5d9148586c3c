"""Crafted model files: pickles with raw opcodes, archives with changed entries, and a canary for code that runs."""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import types
import zipfile

import torch
from torch import nn

from rewriter.serialization._save import restore_graph_module

ALARMS = frozenset(
    """
    os.exec os.fork os.posix_spawn os.remove os.rename os.rmdir os.spawn os.system pty.spawn shutil.rmtree
    socket.connect subprocess.Popen webbrowser.open
    """.split()
)
_rung: list[str] = []
_watching = False


def _hook(event, arguments):
    if _watching and (event in ALARMS or (event == "import" and arguments[0] in ("this", "antigravity"))):
        _rung.append(f"{event} {arguments!r}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def canary():
    """Fail if the body starts a process, connects, deletes files, or imports a module of ALARMS."""
    global _watching
    _rung.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert not _rung, _rung


class Script:
    """Parts of a pickle: bytes are opcodes, everything else is pickled."""

    def __init__(self, *parts):
        self.parts = parts


class Call:
    """Pickled as the call of a function, with a state for the result if one is given."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class _Pickler(pickle._Pickler):
    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Script):
            return super().save(obj, save_persistent_id)
        for part in obj.parts:
            if isinstance(part, bytes):
                self.write(part)
            else:
                self.save(part)


def write(obj, path):
    """Write `obj` as torch.save does."""
    torch.save(obj, path, pickle_module=types.SimpleNamespace(Pickler=_Pickler, __name__="crafted", dumps=pickle.dumps))
    return path


def with_state(module, **state):
    """Return `module` with entries in its state that its class does not set."""
    module.__dict__.update(state)
    return module


def graph(*nodes):
    """Return a graph as data: the input ``x``, `nodes`, and an output that returns the last node."""
    last = {"node": nodes[-1]["name"]} if nodes else {"node": "x"}
    every = [node("placeholder", "x", "x"), *nodes, node("output", "output", "output", last)]
    return {"version": 1, "nodes": every}


def node(op, name, target, *args):
    """Return one node as data."""
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {}}


def graph_module(data, **modules):
    """Return what is pickled as a graph module with these children."""
    state = vars(nn.Module()).copy()
    state["_modules"] = modules
    return Call(restore_graph_module, "Crafted", data, state)


def replaced(content: bytes, change) -> bytes:
    """Return the archive `content` with ``data.pkl`` changed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as changed:
        for entry in source.infolist():
            data = source.read(entry)
            changed.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return target.getvalue()
