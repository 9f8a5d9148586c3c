"""The size of a run and its device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Arguments:
        quick: smaller work and fewer rounds, to check that everything runs; the ratios are too noisy for targets.
        device: ``"cpu"`` or ``"cuda"``.
        threads: number of threads of one operator on the CPU.
    """

    quick: bool = False
    device: str = "cpu"
    threads: int = 1

    @property
    def label(self) -> str:
        """Return the setting as the tables call it."""
        return "cuda" if self.device == "cuda" else f"cpu, {self.threads} thread{'s' * (self.threads > 1)}"

    def rounds(self, full: int) -> int:
        """Return the number of rounds, `full` in a full run."""
        return min(full, 3) if self.quick else full

    def asked(self, ratio: float) -> float | None:
        """Return the target; an accelerator and a quick run have none."""
        return None if self.quick or self.device != "cpu" else ratio
