"""Every member of the catalog's first part keeps the laws of a parametrization."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewriter.errors import RewriterError
from rewriter.parametrizations._registry import construct, find
from rewriter.testing import check_parametrization

ORTHOGONAL = [
    ("orthogonal", shape, {"map": map, "trivialization": trivialization})
    for map in ("matrix_exp", "cayley", "householder")
    for trivialization in (True, False)
    for shape in ((4, 4), (5, 2), (2, 3))
]
MEMBERS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    *ORTHOGONAL,
    ("symmetric", (4, 4), {}),
    ("symmetric", (3, 3), {"lower": True}),
    ("skew", (4, 4), {}),
    ("skew", (3, 3), {"lower": True}),
    ("triangular", (4, 3), {}),
    ("triangular", (3, 4), {"upper": True, "strict": True}),
    ("triangular", (3, 3), {"unitriangular": True}),
    ("diagonal", (4, 3), {}),
    ("block_diagonal", (4, 6), {"blocks": 2}),
    ("centred", (4, 3), {}),
    ("special_orthogonal", (4, 4), {}),
    ("special_orthogonal", (3, 3), {"map": "cayley", "trivialization": False}),
    ("stiefel", (6, 3), {}),
    ("stiefel", (3, 6), {"map": "cayley"}),
    ("stiefel", (7, 2), {"map": "matrix_exp"}),
    ("grassmann", (6, 3), {}),
    ("grassmann", (2, 5), {"map": "cayley"}),
    ("almost_orthogonal", (5, 3), {"radius": 0.3}),
    ("almost_orthogonal", (3, 5), {"radius": 0.3, "f": "tanh", "map": "cayley"}),
    ("weight_norm", (4, 3), {}),
    ("weight_norm", (2, 4, 3), {"dim": -1}),
    ("weight_norm", (4, 3), {"dim": None}),
    ("weight_norm", (4,), {}),
    ("spectral_norm", (4, 3), {}),
    ("spectral_norm", (2, 4, 3), {"dim": 1}),
    ("conv_spectral_norm", (4, 3, 3, 3), {"input_size": [5, 6], "padding": 1, "stride": 2}),
    ("conv_spectral_norm", (4, 2, 3), {"input_size": [7], "dilation": 2, "groups": 2}),
    ("sphere", (4, 3), {}),
    ("sphere", (4, 3), {"radius": 2.0, "dim": 0}),
    ("simplex", (4, 3), {}),
    ("positive", (4, 3), {}),
    ("positive", (4, 3), {"map": "exp", "eps": 0.1}),
    ("interval", (4, 3), {"low": -1.0, "high": 2.0}),
    ("interval", (4, 3), {"low": -1.0}),
    ("interval", (4, 3), {"high": 1.0}),
    ("psd", (4, 4), {}),
    ("psd", (4, 4), {"rank": 2}),
    ("psd", (4, 4), {"rank": 2, "fixed": True}),
    ("spd", (4, 4), {"eps": 0.1}),
    ("correlation", (4, 4), {}),
    ("gl_plus", (4, 4), {}),
    ("gl_plus", (3, 3), {"map": "cayley"}),
    ("sl", (4, 4), {}),
    ("hurwitz_stable", (4, 4), {"decay": 0.3}),
    ("poincare_ball", (4, 3), {}),
    ("poincare_ball", (4, 3), {"curvature": 0.5, "dim": 0}),
    ("lorentz", (4, 3), {}),
]
COMPLEX = [
    *[member for member in ORTHOGONAL if member[2]["map"] != "householder"],
    ("symmetric", (4, 4), {}),
    ("skew", (4, 4), {}),
    ("special_orthogonal", (4, 4), {}),
    ("weight_norm", (4, 3), {}),
    ("spectral_norm", (4, 3), {}),
    ("sphere", (4, 3), {}),
    ("psd", (4, 4), {"rank": 2}),
    ("psd", (4, 4), {"rank": 3, "fixed": True}),
    ("spd", (4, 4), {}),
]
# The power method finds the norm to some digits only, so that its image is no exact set.
APPROXIMATE = {name: ("right inverse", "projection") for name in ("spectral_norm", "conv_spectral_norm")}


def title(member: tuple[str, tuple[int, ...], dict[str, Any]]) -> str:
    name, shape, arguments = member
    return "-".join([name, "x".join(map(str, shape)), *(f"{key}={value}" for key, value in arguments.items())])


@pytest.mark.parametrize("member", MEMBERS, ids=title)
def test_laws_hold_in_double_precision(member: tuple[str, tuple[int, ...], dict[str, Any]]) -> None:
    name, shape, arguments = member
    check_parametrization(name, shape, arguments=arguments, skip=APPROXIMATE.get(name, ()))


@pytest.mark.parametrize("member", COMPLEX, ids=title)
def test_laws_hold_for_complex_weights(member: tuple[str, tuple[int, ...], dict[str, Any]]) -> None:
    name, shape, arguments = member
    check_parametrization(name, shape, dtype=torch.complex128, arguments=arguments, skip=APPROXIMATE.get(name, ()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("member", MEMBERS, ids=title)
def test_laws_hold_in_lower_precision(member: tuple[str, tuple[int, ...], dict[str, Any]], dtype: torch.dtype) -> None:
    name, shape, arguments = member
    slow = ("scripting", "export", "hard points", "batching")
    check_parametrization(name, shape, dtype=dtype, arguments=arguments, skip=(*slow, *APPROXIMATE.get(name, ())))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("orthogonal", {"map": "householder"}),
        ("stiefel", {}),
        ("simplex", {}),
        ("positive", {}),
        ("correlation", {}),
        ("gl_plus", {}),
        ("poincare_ball", {}),
    ],
)
def test_families_of_real_tensors_refuse_complex_ones(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(RewriterError, match=r"real|complex"):
        check_parametrization(name, (3, 3), dtype=torch.complex128, arguments=arguments)


@pytest.mark.parametrize(
    "name",
    ["symmetric", "skew", "special_orthogonal", "psd", "spd", "correlation", "gl_plus", "hurwitz_stable"],
)
def test_families_of_square_matrices_say_which_shape_they_found(name: str) -> None:
    with pytest.raises(RewriterError, match=r"square.*\[3, 4\]"):
        check_parametrization(name, (3, 4))


@pytest.mark.parametrize("member", MEMBERS, ids=title)
def test_a_tensor_without_values_is_built_and_evaluated(
    member: tuple[str, tuple[int, ...], dict[str, Any]],
) -> None:
    name, shape, arguments = member
    weight = torch.empty(*shape, device="meta")
    step = construct(find(name), weight, arguments)
    try:
        stored = step.right_inverse(weight)  # type: ignore[operator]
    except NotImplementedError:
        stored = (weight, weight) if name == "hurwitz_stable" else weight
    assert step(*(stored if isinstance(stored, tuple) else (stored,))).shape == weight.shape
