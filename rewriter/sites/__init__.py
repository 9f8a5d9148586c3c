"""Sites: computed tensors as modules, with their originals and their chain."""

from __future__ import annotations

from rewriter.sites._assign import assign_value, check_shape
from rewriter.sites._chunked import Chunked
from rewriter.sites._container import plain_class, refuse_mixed, site_path, sites_of
from rewriter.sites._inverse import Inverse, invert_chain, right_inverse
from rewriter.sites._layout import Layout, layout_of
from rewriter.sites._places import CONTAINER, PASSED
from rewriter.sites._site import Site
from rewriter.sites._spec import Member, SiteSpec

__all__ = [
    "CONTAINER",
    "PASSED",
    "Chunked",
    "Inverse",
    "Layout",
    "Member",
    "Site",
    "SiteSpec",
    "assign_value",
    "check_shape",
    "invert_chain",
    "layout_of",
    "plain_class",
    "refuse_mixed",
    "right_inverse",
    "site_path",
    "sites_of",
]
