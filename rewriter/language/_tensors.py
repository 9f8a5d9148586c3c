"""What selectors know about a tensor."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a selector sees of one tensor of a model, under one of its names.

    Arguments:
        name: fully qualified, such as ``blocks.0.fc.weight``.
        module_classes: names of the owner's class and its base classes, see `class_names`.
        kind: parameter or buffer.
        shape: in elements per dimension.
        dtype: without ``torch.``, such as ``float32``.
    """

    name: str
    module_classes: tuple[str, ...] = ()
    kind: Literal["parameter", "buffer"] = "parameter"
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    requires_grad: bool = True

    @property
    def owner(self) -> str:
        """The path of the module that owns the tensor; empty for the root."""
        return self.name.rpartition(".")[0]

    @property
    def tensor(self) -> str:
        """The tensor's own name in its module, such as ``weight``."""
        return self.name.rpartition(".")[2]

    @property
    def ndim(self) -> int:
        return len(self.shape)


def class_names(cls: type) -> tuple[str, ...]:
    """Return every name under which a spec may select modules of class `cls`, base classes too.

    For each class: its bare name, where it is defined, and every shorter dotted name under which the packages
    above export it (``Linear``, ``torch.nn.modules.linear.Linear``, ``torch.nn.Linear``).
    """
    names: dict[str, None] = {}
    for base in cls.__mro__[:-1]:
        names[base.__qualname__] = names[base.__name__] = None
        package = base.__module__
        names[f"{package}.{base.__qualname__}"] = None
        while "." in package:
            package = package.rpartition(".")[0]
            if getattr(sys.modules.get(package), base.__name__, None) is base:
                names[f"{package}.{base.__name__}"] = None
    return tuple(names)
