"""How much work a run does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What every benchmark is given.

    Arguments:
        quick: smaller work and fewer rounds, to see that everything runs; its ratios prove nothing.
        device: ``"cpu"`` or ``"cuda"``.
        threads: among how many threads of the processor one operator is divided.
    """

    quick: bool = False
    device: str = "cpu"
    threads: int = 1

    @property
    def label(self) -> str:
        """Return the setting as the tables call it."""
        return "cuda" if self.device == "cuda" else f"cpu, {self.threads} thread{'s' * (self.threads > 1)}"

    def rounds(self, full: int) -> int:
        """Return how many rounds to run where a full run has `full`."""
        return min(full, 3) if self.quick else full

    def asked(self, ratio: float) -> float | None:
        """Return the ratio that is asked for; nothing is asked of an accelerator or of a quick run."""
        return None if self.quick or self.device != "cpu" else ratio
