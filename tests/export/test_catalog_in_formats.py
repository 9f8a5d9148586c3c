"""Every member of the catalog, baked, in every format that other programs run."""

from __future__ import annotations

import pytest
import torch

from benchmarks.serving import INPUT, Stack, catalog, differences, families, nodes_of, rewritten
from rewriter import bake
from tests.members import members

FORMATS = [
    "torchscript",
    pytest.param("pt2", marks=pytest.mark.slow),
    pytest.param("onnx", marks=pytest.mark.slow),
    pytest.param("aoti", marks=pytest.mark.slow),
]


def test_the_stack_has_the_whole_catalog():
    assert catalog() == members()
    assert sorted(name for family in families().values() for name in family) == sorted(members())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_every_baked_member_gives_the_values_of_the_rewritten_model(tmp_path, format):
    pytest.importorskip("onnxruntime") if format == "onnx" else None
    new = rewritten(catalog())
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    baked = bake(new)
    torch.testing.assert_close(baked(INPUT), new(INPUT), atol=1e-5, rtol=1e-5)
    assert max(differences(baked, format, tmp_path)) <= 1e-5
    assert all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in baked.state_dict(keep_vars=True).values()
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in new.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_a_baked_export_has_the_operations_of_the_plain_model():
    new = rewritten(catalog())
    plain = Stack([*new.get_submodule("layers")._modules])
    assert nodes_of(bake(new)) == nodes_of(plain)
