"""GraphModules that own computed tensors inside a model that keeps its class."""

from __future__ import annotations

from torch import fx, nn

from rewriter.bindings._graph_module import RewrittenModule
from rewriter.sites._container import sites_of


def open_graph_owners(root: nn.Module) -> nn.Module:
    """Let every GraphModule in `root` that owns sites read them where its graph reads the tensors; return `root`.

    torch.fx writes the code of a GraphModule into its class, so it cannot get a subclass as other owners do. A module
    over the same tree and graph takes its place, the root's included.
    """
    owners = {
        module: RewrittenModule(module, module.graph, module.graph, None)
        for module in root.modules()
        if isinstance(module, fx.GraphModule) and not isinstance(module, RewrittenModule) and sites_of(module)
    }
    for module in [*root.modules()] if owners else ():
        for name, child in module._modules.items():
            if isinstance(child, fx.GraphModule) and child in owners:
                module._modules[name] = owners[child]
    return owners.get(root, root) if isinstance(root, fx.GraphModule) else root
