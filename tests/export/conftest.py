from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def compiles_alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a compiler cache of its own, and nothing that an earlier test compiled.

    Processes that share a cache wait for each other's locks.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    torch.compiler.reset()
