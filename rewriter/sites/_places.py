"""The names under which modules have what belongs to their computed tensors."""

from __future__ import annotations

CONTAINER = "parametrizations"
"""The submodule with an owner's sites, where torch has its own."""
CONTEXTS = "_reparam_contexts"
"""The attribute of an owner, and of every module above one, with the model's forward contexts."""
GRAPH_OF = "_reparam_class"
"""The attribute in which the graph that a model was rewritten to has the class of the model."""
PASSED = "passed_tensors"
"""The keyword argument with the values that a graph hands to a module."""
BATCHES = "batched_evaluations"
"""The submodule of a graph with what evaluates several tensors at once."""
CAPTURED = "_reparam_captured"
"""The attribute in which a rewritten model has the graph as it was captured."""
