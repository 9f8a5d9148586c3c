from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy
import pytest
import torch

# `pytest --hypothesis-profile=thorough` draws eight times as many examples.
hypothesis.settings.register_profile("reparam", max_examples=25, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("reparam"), max_examples=200)
hypothesis.settings.load_profile("reparam")

# pytest-xdist runs one process per core. More threads in each process only compete with the other processes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seed torch, numpy and random before each test, and restore their states after it."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        yield
    random.setstate(python)
    numpy.random.set_state(arrays)


@pytest.fixture(params=["graph", "module"])
def capture(request: pytest.FixtureRequest) -> str:
    """Each binding of a rewritten model in turn."""
    return str(request.param)


@pytest.fixture
def spec() -> Callable[..., dict[str, Any]]:
    """A spec with one rule."""

    def make(select: Any, *chain: Any, **options: Any) -> dict[str, Any]:
        return {"reparam": 1, "rules": [{"name": "rule", "select": select, "chain": list(chain), **options}]}

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse test ids with an address, which differ between processes of pytest-xdist; let the command line warn."""
    found = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if found:
        raise pytest.UsageError("give these tests ids without addresses (`ids=`):\n  " + "\n  ".join(found))
    for item in items:
        if item.path.parent.name in ("cli", "docs", "demo"):  # the command prints warnings, and these tests read them
            item.add_marker(pytest.mark.filterwarnings("default::UserWarning"))
