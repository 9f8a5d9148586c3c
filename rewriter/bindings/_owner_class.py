"""The classes of the modules that own parametrized tensors.

Each is a subclass of the module's own, of the same name, in which the tensors' names are properties. It lives as long
as its instances.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from rewriter._torch import saved_tensor_hooks
from rewriter.bindings._bake_first import refuse_package, refuse_quantization, refuse_quantized, refuse_script
from rewriter.bindings._late_changes import guarded_methods, refuse_late_change
from rewriter.bindings._linear import linear_forward
from rewriter.bindings._pretrained import is_pretrained, methods_of
from rewriter.bindings._recurrent import LIST_OF_WEIGHTS, one_list_a_call
from rewriter.bindings._shell import Shell
from rewriter.context._checkpoint import graph_task
from rewriter.context._forward import Contexts, ForwardContext
from rewriter.errors import ModelFileError, RewriterError
from rewriter.serialization._names import loadable
from rewriter.sites._assign import assign_attribute
from rewriter.sites._container import called_sites, refuse_mixed, refuse_override, sites_of
from rewriter.sites._loading import converting, converting_owner
from rewriter.sites._places import CONTAINER, CONTEXTS, PASSED
from rewriter.sites._site import Site


@loadable(builds=[Shell], home="rewriter.io")
def only_load_model_reads_this_module(plain: Any, tensors: Sequence[str]) -> nn.Module:
    """Make a shell that becomes an owner once its state is read: the first half of copying or unpickling one."""
    known = isinstance(plain, type) and issubclass(plain, nn.Module)
    if not known:
        raise ModelFileError(f"the file is damaged: {plain!r} owns tensors and is no module")

    def become(shell: nn.Module, state: dict[str, Any]) -> None:
        shell.__class__ = owner_class(plain, tuple(tensors))
        plain.__setstate__(shell, state)

    made = owner_class(plain, tuple(tensors))
    if made.__basicsize__ != Shell.__basicsize__:  # slots: a shell cannot become one
        return made.__new__(made)  # type: ignore[no-any-return]
    return Shell(become)


# The classes live as long as their instances: none is left behind once a model is baked.
_owner_classes: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[tuple[str, ...], Any]]
_owner_classes = weakref.WeakKeyDictionary()
_making = threading.Lock()


def owner_class(plain: Any, tensors: tuple[str, ...]) -> Any:
    """Return the subclass of `plain` in which `tensors` are computed."""
    with _making:
        made = _owner_classes.get(plain)
        if made is None:
            made = _owner_classes[plain] = weakref.WeakValueDictionary()
        found = made.get(tensors)
        if found is None:
            found = made[tensors] = _subclass(plain, _owner_body(plain, tensors))
        return found


class _Owner(type):
    """The kind of these classes: calling one makes what calling the class of the same name makes, of which none is."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        plain = vars(cls).get("_reparam_plain")
        return super().__call__(*args, **kwargs) if plain is None else plain(*args, **kwargs)


def _subclass(plain: Any, body: dict[str, Any]) -> Any:
    """Return a subclass of `plain` without running what `plain` does when somebody writes a subclass of it."""
    if type(plain) is not type:
        return type(plain)(plain.__name__, (plain,), body)
    made: Any = _Owner(plain.__name__, (nn.Module,), body)
    try:
        made.__bases__ = (plain,)
    except TypeError:  # slots
        made = _Owner(plain.__name__, (plain,), body)
    return made


def _owner_body(plain: Any, tensors: tuple[str, ...]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "_reparam_plain": plain,
        "load_state_dict": converting(plain.load_state_dict),
        "_load_from_state_dict": converting_owner(plain._load_from_state_dict),
        **guarded_methods(plain),
        **_methods(plain, tensors),
        "forward": functools.wraps(plain.forward)(_forward_of(plain, tensors)),
    }
    body.update({tensor: _value_property(tensor) for tensor in tensors})
    if tensors:
        body[CONTAINER] = child_property(CONTAINER)
    if is_pretrained(plain):
        body.update(methods_of(plain))
    if issubclass(plain, nn.RNNBase):
        body.update(LIST_OF_WEIGHTS)
    return body


def _forward_of(plain: Any, tensors: tuple[str, ...]) -> Callable[..., Any]:
    """Return a forward that begins a forward of the model, where none is running."""
    run = one_list_a_call(plain.forward) if issubclass(plain, nn.RNNBase) else plain.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A forward may come here at every time step: inside a running one this has to cost next to nothing.
        contexts: Contexts | None = self.__dict__.get(CONTEXTS)
        if contexts is not None and PASSED not in kwargs and (is_compiling() or not saved_tensor_hooks(True)):
            running = contexts.running
            if running.context is not None:
                return run(self, *args, **kwargs) if kwargs else run(self, *args)
            if not is_compiling() and graph_task() is None:  # a forward of which no region runs again
                running.context = begun = ForwardContext()
                try:
                    result = run(self, *args, **kwargs)
                finally:
                    running.context = None
                if begun.versions:
                    begun.check_writes()
                return result
        passed = kwargs.pop(PASSED, None)
        if contexts is None:  # a copy made by the class's own means
            contexts = _shared_contexts(self)
        if passed is None:
            context = contexts.context
            if context is not None and contexts.running.context is context:
                return run(self, *args, **kwargs)
            if context is None:
                context = ForwardContext()
        else:
            context = ForwardContext()
            context.values.update(zip(called_sites(self), passed, strict=True))
        with contexts.begin(context):
            result = run(self, *args, **kwargs)
        if context.versions:
            context.check_writes()
        return result

    if plain.forward is nn.Linear.forward and "weight" in tensors:
        return linear_forward(forward, "bias" not in tensors)
    return forward


def _methods(plain: Any, tensors: tuple[str, ...]) -> dict[str, Any]:
    """Return what an owner does otherwise than its class, where a computed tensor is meant."""

    def reduce(self: Any, protocol: int) -> Any:
        refuse_mixed([self])
        state = plain.__getstate__(self) if hasattr(plain, "__getstate__") else self.__dict__
        return (only_load_model_reads_this_module, (plain, tensors), state)

    def assign(self: Any, name: str, value: Any) -> None:
        if name in tensors:
            refuse_quantized(self, value)
            assign_attribute(sites_of(self)[name], name, value)
        else:
            if tensors:
                refuse_quantization(self, name, value)
            refuse_late_change(self, name, value)
            plain.__setattr__(self, name, value)

    def delete(self: Any, name: str) -> None:
        _refuse(tensors, name, "deleted")
        if name in self._parameters or name in self._buffers:
            # torch.nn.utils.parametrize is about to put a property into the class: not into that of all other models.
            object.__setattr__(self, "__class__", _subclass(plain, _owner_body(plain, tensors)))
        plain.__delattr__(self, name)

    def register_parameter(self: Any, name: str, param: Any) -> None:
        _refuse(tensors, name, "registered")
        _refuse(tensors, name.removesuffix("_orig"), "pruned by torch.nn.utils.prune")
        if name.startswith(f"{CONTAINER}."):
            raise RewriterError(
                f"{name} is a tensor of a chain, and parallelize_module cannot distribute it: call parallelize_module "
                "first, and rewrite the distributed model"
            )
        plain.register_parameter(self, name, param)

    def register_buffer(self: Any, name: str, tensor: Any, persistent: bool = True) -> None:
        _refuse(tensors, name, "registered")
        plain.register_buffer(self, name, tensor, persistent)

    def get_parameter(self: Any, target: str) -> Any:
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        computed = sites_of(owner).get(name)
        if computed is not None and computed.member(name).kind == "parameter":
            return getattr(owner, name)
        return plain.get_parameter(self, target)

    return {
        "__reduce_ex__": reduce,
        "__reduce_package__": refuse_package,
        "__prepare_scriptable__": refuse_script,
        "__setattr__": assign,
        "__delattr__": delete,
        "register_parameter": register_parameter,
        "register_buffer": register_buffer,
        "get_parameter": get_parameter,
    }


def _refuse(tensors: tuple[str, ...], name: str, what: str) -> None:
    if name in tensors:
        raise RewriterError(f"{name} is computed by parametrizations and cannot be {what}; bake it first")


def _shared_contexts(module: nn.Module) -> Contexts:
    sites = (site for site in module.modules() if isinstance(site, Site))
    contexts = next((site.contexts for site in sites), None) or Contexts()
    module.__dict__[CONTEXTS] = contexts
    return contexts


def child_property(name: str) -> property:
    """Return the property that finds a submodule in a third of the time of nn.Module.__getattr__."""

    def read(self: Any) -> Any:
        try:
            return self._modules[name]
        except KeyError:
            raise AttributeError(name) from None

    return property(read)


def _value_property(tensor: str) -> property:
    def read(self: Any) -> Any:
        # A forward may come here at every time step: what most reads find comes first.
        if self._parameters.get(tensor) is not None or self._buffers.get(tensor) is not None:
            refuse_override(tensor)
        site = self._modules[CONTAINER]._modules.get(tensor)
        try:
            if site is not None:
                context = site.contexts.running.context
                if context is not None:
                    value = context.known.get(site)
                    if value is None:
                        if is_compiling():
                            value = context.passing.get(site)
                        elif not saved_tensor_hooks(True):
                            value = context.passing.get(site)
                            if value is None:
                                value = context.first_value(site)
                    if value is not None:
                        return value
            else:  # one site computes several tensors and has the name of another
                site = sites_of(self)[tensor]
            return site.current_member(tensor)
        except AttributeError as problem:  # which Python would take to mean that there is no such attribute
            raise RewriterError(f"computing {tensor} of {type(self).__name__} failed: {problem}") from problem

    return property(read, doc=f"The value of `{tensor}`, computed by its chain of parametrizations.")
