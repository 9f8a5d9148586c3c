from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("reparam", deadline=None)
hypothesis.settings.load_profile("reparam")


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Each test starts from one seed and leaves the generator as it found it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
