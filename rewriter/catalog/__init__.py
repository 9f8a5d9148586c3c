"""The catalog: one family of parametrizations per file; importing it registers all of them by name."""

from __future__ import annotations

from rewriter.catalog._mask import Mask as Mask
from rewriter.catalog._pruning import GlobalL1 as GlobalL1
from rewriter.catalog._pruning import GlobalRandom as GlobalRandom
from rewriter.catalog._pruning import L1Unstructured as L1Unstructured
from rewriter.catalog._pruning import LnStructured as LnStructured
from rewriter.catalog._pruning import RandomStructured as RandomStructured
from rewriter.catalog._pruning import RandomUnstructured as RandomUnstructured
from rewriter.catalog._sparse_patterns import NM as NM
from rewriter.catalog._sparse_patterns import BlockSparse as BlockSparse
