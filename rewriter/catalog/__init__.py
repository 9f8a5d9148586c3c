"""The catalog: one family of parametrizations per file; importing it registers all of them by name."""

from __future__ import annotations

from rewriter.catalog._mask import Mask as Mask
