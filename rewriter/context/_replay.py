"""Evaluating without advancing a state: to look at a value, and for a checkpointed region that runs again.

What is evaluated is a copy over the same parameters, with buffers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewriter.context._checkpoint import graph_task, reentrant_region, region_of_backward, region_of_forward
from rewriter.context._fingerprint import declares, version_of
from rewriter.context._random import devices_of, random_states, set_random_states
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from rewriter.sites._site import Site


def settled_copy(module: Any, trains: Callable[[str], bool] = lambda path: False, path: str = "") -> Any:
    """Return a copy of a module and those in it, over the same parameters and with buffers of their own.

    Arguments:
        trains: path of a module → whether it keeps its mode; otherwise it is in evaluation mode.
        path: the module's own.
    """
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update(module.__dict__)
    clone.__dict__["training"] = module.training and trains(path)
    clone.__dict__["_parameters"] = dict(module._parameters)
    clone.__dict__["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    clone.__dict__["_modules"] = {
        name: None if child is None else settled_copy(child, trains, f"{path}.{name}" if path else name)
        for name, child in module._modules.items()
    }
    return clone


def varies(step: nn.Module) -> bool:
    """Whether a step in train mode may give another value each time: it draws, or advances a state."""
    return (
        declares(step, "stateful", _may_keep_state(step))
        or declares(step, "random")
        or any(map(varies, filter(None, step._modules.values())))
    )


def note_state(site: Site) -> None:
    """Let the region that is running know that the site is evaluated in it, and with which state."""
    if not any(map(varies, site.steps)):
        return
    region = region_of_forward() or reentrant_region()
    if region is None:
        return
    found = {
        path: {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
        for path, module in site.named_modules(remove_duplicate=False)
        if module.training and (declares(module, "stateful") or _may_keep_state(module))
    }
    region.states.setdefault(site, []).append(found)


def _noted_state(site: Site) -> Mapping[str, Mapping[str, Tensor]] | None:
    """Return the state that the evaluation had which is repeated now, if it was noted.

    Raises:
        RewriterError: it was not made in this region, and drew random numbers.
    """
    region = region_of_backward()
    reentrant = reentrant_region() if region is None else None
    region = region or reentrant
    if region is None:
        return None
    states, task = region.states.get(site, []), graph_task()
    index = region.replayed.get((site, task), 0)
    if index < len(states):
        region.replayed[site, task] = index + 1
        noted: Mapping[str, Mapping[str, Tensor]] = states[index]
        return noted
    if reentrant is not None and any(part.training and declares(part, "random") for part in site.modules()):
        raise RewriterError(
            f"{site.spec.name}: its chain drew random numbers before a checkpointed region that used the value and "
            "runs again now, and a reentrant one cannot find the value; give checkpoint use_reentrant=False"
        )
    return None


def evaluated_again(site: Site, inputs: Sequence[Tensor]) -> Any:
    """Evaluate for a region that runs again: as it did before, random numbers included, and no state advances.

    Where torch says which region it is, with the state that the evaluation had then. Elsewhere a step that advances a
    state is evaluated with the one that it left, in evaluation mode; all others keep their mode. Whether a step does so
    that is of somebody else's class and does not say, shows as it runs.

    Raises:
        RewriterError: a step changes its buffers in evaluation mode too.
    """
    noted = _noted_state(site)
    if noted is not None:
        clone = site.settled(lambda path: True)
        for path, buffers in noted.items():
            clone.get_submodule(path)._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
        return clone.evaluate(*inputs)
    modules = dict(site.named_modules(remove_duplicate=False))
    settled = {path for path, module in modules.items() if declares(module, "stateful")}
    doubtful = [path for path, module in modules.items() if module.training and _may_keep_state(module)]
    if doubtful:
        settled |= _advancing(site, inputs, settled, doubtful)
    return site.settled(lambda path: path not in settled).evaluate(*inputs)


@torch.no_grad()  # so that the region does not count what is saved for a backward
def _advancing(site: Site, inputs: Sequence[Tensor], settled: set[str], doubtful: Collection[str]) -> set[str]:
    """Evaluate in vain, and return which of the doubtful modules change buffers as they run."""
    devices = devices_of([*site.originals, *inputs])
    states = random_states(devices)
    advancing = _advanced(site, inputs, settled, doubtful)
    if advancing and _advanced(site, inputs, settled | advancing, doubtful):
        raise RewriterError(
            f"{site.spec.name}: a step changes its buffers as it runs, in evaluation mode too, and a checkpointed "
            "region cannot run again with the value that it had; let it change them in train mode only, and say "
            "`stateful = True` on its class"
        )
    set_random_states(devices, states)
    return advancing


def _advanced(site: Site, inputs: Sequence[Tensor], settled: set[str], doubtful: Collection[str]) -> set[str]:
    clone = site.settled(lambda path: path not in settled)
    watched = {path: clone.get_submodule(path) for path in doubtful}
    before = {path: buffer_marks(part) for path, part in watched.items()}
    clone.evaluate(*inputs)
    return {path for path, marks in before.items() if buffers_changed(watched[path], marks)}


Marks = list[tuple[Tensor | None, int]]


def buffer_marks(module: nn.Module) -> Marks:
    """Return what `buffers_changed` compares of a module's own buffers."""
    return [(buffer, version_of(buffer)) for buffer in module._buffers.values()]


def buffers_changed(module: nn.Module, before: Marks) -> bool:
    """Whether a module's own buffers are others than they were, or were written to."""
    now = buffer_marks(module)
    return len(now) != len(before) or any(
        one is not other or version != former for (one, version), (other, former) in zip(now, before, strict=True)
    )


def _may_keep_state(module: nn.Module) -> bool:
    """Whether a module may advance a state without saying so: it is nobody's we know, and has buffers."""
    silent = "stateful" not in module.__dict__ and not hasattr(type(module), "stateful")
    return silent and bool(module._buffers) and not type(module).__module__.startswith("rewriter.")
