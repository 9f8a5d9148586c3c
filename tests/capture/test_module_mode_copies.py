"""Threads, copies, pickles and classes with a mind of their own, of models that keep their class."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import bake
from tests.module_mode import SITES, Count, Step, Untraceable, halved, rewritten

# Threads and copies


def test_a_copy_computes_its_own_values_after_the_original_is_gone(x: Tensor) -> None:
    new = rewritten()
    copied = copy.deepcopy(new)
    shallow = copy.copy(new)
    assert torch.equal(shallow(x), new(x))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(3)
    expected = halved(copied)(x)
    gone = weakref.ref(new.body[0])
    del new, shallow
    gc.collect()
    assert gone() is None
    assert torch.equal(copied(x), expected)
    assert copied(x).requires_grad


def test_pickles_keep_the_class_and_the_ties(x: Tensor) -> None:
    new = rewritten()
    loaded = pickle.loads(pickle.dumps(new))
    assert isinstance(loaded, Untraceable)
    assert torch.equal(loaded(x), new(x))
    assert loaded.tied.parametrizations.weight is loaded.parametrizations.weight
    Count.total = 0
    loaded(x)
    assert Count.total == SITES


def test_conversions_and_modes_reach_the_chains(x: Tensor) -> None:
    new = rewritten(chain=["spectral_norm"])
    new.double().eval()
    assert new.weight.dtype == torch.float64
    assert new(x.double()).dtype == torch.float64
    before = copy.deepcopy(new.state_dict())
    new(x.double())
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())
    new.train()
    new(x.double())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())


# Classes with a mind of their own


class Guarded(Step):
    """Says no to most things."""

    def __init_subclass__(cls, *, allowed: bool, **rest: Any) -> None:
        raise TypeError("no subclasses")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("no other class")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "nickname":
            return "guarded"
        return super().__getattr__(name)


class Slotted(Step):
    __slots__ = ("extra",)


class CopiedByHand(Step):
    def __deepcopy__(self, memo: Any) -> CopiedByHand:
        clone = type(self).__new__(type(self))
        nn.Module.__init__(clone)
        clone.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k.startswith("_m")}, memo))
        clone._parameters = copy.deepcopy(self._parameters, memo)
        return clone


class Reduced(Step):
    def __reduce__(self) -> Any:
        return type(self).__new__, (type(self),), self.__dict__


class WithMeta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class MetaStep(Step, metaclass=WithMeta):
    pass


@pytest.mark.parametrize("kind", [Guarded, Slotted, CopiedByHand, Reduced, MetaStep])
def test_classes_with_a_mind_of_their_own(kind: Any, x: Tensor) -> None:
    model = kind()
    new = rewritten(model)
    assert isinstance(new, kind)
    expected = torch.tanh(x @ (model.weight / 2))
    for one in (new, copy.deepcopy(new)):
        Count.total = 0
        torch.testing.assert_close(one(x), expected)
        assert Count.total == 1
    plain = bake(new)
    assert type(plain) is kind
    torch.testing.assert_close(plain(x), expected)


def test_attributes_made_up_by_the_class_are_still_made_up() -> None:
    assert rewritten(Guarded()).nickname == "guarded"


def test_no_class_is_left_behind() -> None:
    class Alone(Step):
        pass

    plain = bake(rewritten(Alone()))
    gc.collect()
    assert type(plain) is Alone
    assert not Alone.__subclasses__()
    assert not any(name.startswith("_reparam") for module in plain.modules() for name in module.__dict__)
