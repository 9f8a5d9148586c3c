"""What a rewritten model consists of while it runs."""

from __future__ import annotations

from rewriter.runtime._assign import assign_value, check_shape
from rewriter.runtime._chunked import Chunked
from rewriter.runtime._graph_module import RewrittenModule
from rewriter.runtime._graph_owners import open_graph_owners
from rewriter.runtime._inverse import Inverse, invert_chain, right_inverse
from rewriter.runtime._late_changes import refuse_replaced
from rewriter.runtime._layout import Layout, layout_of
from rewriter.runtime._mixed import refuse_mixed
from rewriter.runtime._owner import attach, detach, open_path, open_root, release
from rewriter.runtime._owner_class import plain_class
from rewriter.runtime._places import CONTAINER, HANDED
from rewriter.runtime._record import Member, Record
from rewriter.runtime._scope import Session
from rewriter.runtime._sites import site_path, sites_of
from rewriter.runtime._tensor import ParametrizedTensor

__all__ = [
    "CONTAINER",
    "HANDED",
    "Chunked",
    "Inverse",
    "Layout",
    "Member",
    "ParametrizedTensor",
    "Record",
    "RewrittenModule",
    "Session",
    "assign_value",
    "attach",
    "check_shape",
    "detach",
    "invert_chain",
    "layout_of",
    "open_graph_owners",
    "open_path",
    "open_root",
    "plain_class",
    "refuse_mixed",
    "refuse_replaced",
    "release",
    "right_inverse",
    "site_path",
    "sites_of",
]
