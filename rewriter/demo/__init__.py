"""The demo: a recurrent network with an orthogonal kernel reads handwritten digits pixel by pixel."""

from __future__ import annotations

from rewriter.demo._network import PixelRNN
from rewriter.demo._run import ARTEFACTS, Report, run_demo
from rewriter.demo._table import table_of

__all__ = ["ARTEFACTS", "PixelRNN", "Report", "run_demo", "table_of"]
