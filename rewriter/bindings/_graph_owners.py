"""GraphModules that own computed tensors inside a model that keeps its class."""

from __future__ import annotations

from torch import fx, nn

from rewriter.bindings._graph_module import RewrittenModule
from rewriter.sites._container import sites_of


def open_graph_owners(root: nn.Module) -> nn.Module:
    """Let every GraphModule in `root` that owns sites read them where its graph reads the tensors; return `root`.

    A GraphModule has a class of its own that writes itself anew, so it cannot be given a subclass as other owners are:
    a module over the same tree and graph takes its place, `root`'s own included.
    """
    opened = {
        module: RewrittenModule(module, module.graph, module.graph, None)
        for module in root.modules()
        if isinstance(module, fx.GraphModule) and not isinstance(module, RewrittenModule) and sites_of(module)
    }
    for module in [*root.modules()] if opened else ():
        for name, child in module._modules.items():
            if isinstance(child, fx.GraphModule) and child in opened:
                module._modules[name] = opened[child]
    return opened.get(root, root) if isinstance(root, fx.GraphModule) else root
