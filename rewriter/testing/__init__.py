"""Checks for the tests of a parametrization: its laws, and whether a tensor is in its space."""

from __future__ import annotations

from rewriter.testing._check import LawError, Report, check_parametrization
from rewriter.testing._laws import LAWS
from rewriter.testing._space import on_space

__all__ = ["LAWS", "LawError", "Report", "check_parametrization", "on_space"]
