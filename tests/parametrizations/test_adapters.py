from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.parametrizations._adapters import factorization
from rewriter.parametrizations._registry import construct, find

FRESH: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 2}),
    ("lora", {"r": 2, "init_lora_weights": "gaussian", "use_rslora": True}),
    ("lora", {"r": 2, "init_lora_weights": "pissa"}),
    ("lora", {"r": 2, "init_lora_weights": "olora"}),
    ("lora", {"r": 2, "init_lora_weights": "orthogonal"}),
    ("lora", {"r": 2, "init_lora_weights": False}),
    ("dora", {"r": 2, "lora_alpha": 3}),
    ("adalora", {"r": 2}),
    ("vera", {"r": 3}),
    ("loha", {"r": 2}),
    ("lokr", {"r": 1}),
    ("lokr", {"r": 1, "decompose_both": True, "init_weights": "lycoris"}),
    ("lokr", {"r": 8, "decompose_factor": 2}),
    ("ia3", {}),
    ("ia3", {"feedforward": True}),
    ("oft", {"oft_block_size": 2}),
    ("oft", {"oft_block_size": 4, "block_share": True}),
    ("hra", {"r": 2}),
    ("shira", {"r": 1, "random_seed": 3}),
    ("fourierft", {"n_frequency": 5}),
    ("trainable_tokens", {"token_indices": [0, 2]}),
    ("hira", {"r": 2}),
    ("delora", {"r": 2, "delora_lambda": 2.0}),
    ("c3a", {"block_size": 2}),
    ("c3a", {"block_size": 2, "init_weights": False}),
    ("miss", {"r": 3}),
    ("gralora", {"r": 4, "gralora_k": 2}),
    ("road", {"group_size": 2}),
    ("road", {"group_size": 2, "variant": "road_2"}),
    ("road", {"group_size": 2, "variant": "road_4"}),
]
EACH = pytest.mark.parametrize(("name", "arguments"), FRESH, ids=[f"{name}-{i}" for i, (name, _) in enumerate(FRESH)])
SHAPES = [(6, 8), (8, 4), (4, 4, 2), (6, 8, 3, 1)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(name: str, weight: Tensor, **arguments: Any) -> Any:
    return construct(find(name), weight, arguments)


def trained(adapter: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapter


@EACH
def test_a_fresh_adapter_leaves_the_value_as_it_is(name: str, arguments: dict[str, Any]) -> None:
    for shape, (dtype, tolerance) in itertools.product(SHAPES, TOLERANCE.items()):
        weight = torch.randn(shape).to(dtype)
        adapter = make(name, weight, **arguments)
        base = adapter.right_inverse(weight)
        value = adapter(base)
        assert adapter.freezes_original is True
        assert base.dtype == value.dtype == dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert name == "trainable_tokens" or all(p.dtype == wide for p in adapter.parameters())
        torch.testing.assert_close(value, weight, rtol=tolerance, atol=tolerance)


@EACH
def test_a_trained_adapter_still_takes_any_value(name: str, arguments: dict[str, Any]) -> None:
    for shape in SHAPES:
        weight, wanted = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        adapter = trained(make(name, weight, **arguments))
        torch.testing.assert_close(adapter(adapter.right_inverse(wanted)), wanted, rtol=1e-6, atol=1e-8)


@EACH
def test_scripts_and_passes_gradcheck(name: str, arguments: dict[str, Any]) -> None:
    weight = torch.randn(6, 8, dtype=torch.float64)
    adapter = trained(make(name, weight, **arguments)).eval()
    torch.testing.assert_close(torch.jit.script(adapter)(weight), adapter(weight))
    parameters = dict(adapter.named_parameters())
    if name == "dora":
        return  # no gradient flows through its norm, on purpose

    def value_of(*given: Tensor) -> Any:
        return torch.func.functional_call(adapter, dict(zip(parameters, given, strict=True)), (weight,))

    assert torch.autograd.gradcheck(value_of, tuple(parameters.values()), fast_mode=True)


@EACH
def test_autocast_does_not_round_the_value(name: str, arguments: dict[str, Any]) -> None:
    weight = torch.randn(6, 8)
    adapter = trained(make(name, weight, **arguments)).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter(weight)
    assert torch.equal(inside, adapter(weight))


def test_lora_is_the_formula_of_the_paper_on_matrices_and_kernels() -> None:
    for shape in [(6, 8), (6, 4, 3, 3)]:
        weight = torch.randn(shape)
        adapter = trained(make("lora", weight, r=2, lora_alpha=3))
        A, B = adapter.lora_A, adapter.lora_B
        torch.testing.assert_close(adapter(weight), weight + 1.5 * (B @ A).reshape(shape))
    assert make("lora", weight, r=4, lora_alpha=3, use_rslora=True).scaling == 1.5


def test_pissa_takes_the_leading_singular_triplets_out_of_the_base() -> None:
    weight = torch.randn(6, 8, dtype=torch.float64)
    adapter = make("lora", weight, r=2, lora_alpha=5, init_lora_weights="pissa")
    base = adapter.right_inverse(weight)
    expected = torch.linalg.svdvals(weight)[2:]
    torch.testing.assert_close(torch.linalg.svdvals(base)[:4], expected)
    torch.testing.assert_close(torch.linalg.svdvals(base)[4:], torch.zeros(2, dtype=torch.float64))


def test_lora_dropout_leaves_out_whole_input_features_while_training() -> None:
    weight = torch.zeros(6, 400)
    adapter = trained(make("lora", weight, r=2, lora_dropout=0.25))
    full, value = adapter.eval()(weight), adapter.train()(weight)
    dropped = (value == 0).all(dim=0)
    assert adapter.random is True
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.12)
    torch.testing.assert_close(value[:, ~dropped], full[:, ~dropped] / 0.75)
    assert make("lora", weight).random is False


def test_dora_is_the_formula_of_the_paper_with_no_gradient_through_the_norm() -> None:
    weight = torch.randn(6, 8, dtype=torch.float64)
    adapter = trained(make("dora", weight, r=2, lora_alpha=3))
    V = weight + 1.5 * adapter.lora_B @ adapter.lora_A
    norms = torch.linalg.norm(V, dim=1, keepdim=True).detach()
    by_hand = adapter.magnitude * V / norms
    value = adapter(weight)
    torch.testing.assert_close(value, by_hand)
    torch.testing.assert_close(torch.linalg.norm(value, dim=1), adapter.magnitude.abs().flatten())
    upstream = torch.randn_like(value)
    ours = torch.autograd.grad(value, list(adapter.parameters()), upstream)
    theirs = torch.autograd.grad(by_hand, list(adapter.parameters()), upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_adalora_and_vera_are_the_formulas_of_the_papers() -> None:
    weight = torch.randn(6, 8, dtype=torch.float64)
    ada = trained(make("adalora", weight, r=2, lora_alpha=4))
    by_hand = weight + ada.lora_B @ (ada.lora_A * ada.lora_E) * 4 / (2 + 1e-5)
    torch.testing.assert_close(ada(weight), by_hand)
    vera = trained(make("vera", weight, r=3))
    d, b = vera.vera_lambda_d.flatten(), vera.vera_lambda_b.flatten()
    torch.testing.assert_close(vera(weight), weight + b.diag() @ vera.vera_B @ d.diag() @ vera.vera_A)
    assert torch.equal(vera.vera_A, make("vera", weight, r=3).vera_A)
    assert not torch.equal(vera.vera_A, make("vera", weight, r=3, projection_prng_key=1).vera_A)


def test_loha_and_lokr_are_the_formulas_of_lycoris() -> None:
    weight = torch.randn(6, 8, 3, dtype=torch.float64)
    loha = trained(make("loha", weight, r=2, alpha=3))
    product = (loha.hada_w1_a @ loha.hada_w1_b) * (loha.hada_w2_a @ loha.hada_w2_b)
    torch.testing.assert_close(loha(weight), weight + 1.5 * product.reshape(weight.shape))
    full = trained(make("lokr", weight, r=8, alpha=4))
    by_hand = torch.kron(full.lokr_w1, full.lokr_w2.reshape(3, 4, 3)) * 0.5
    torch.testing.assert_close(full(weight), weight + by_hand.reshape(weight.shape))  # PEFT's order of entries
    low = trained(make("lokr", weight, r=1, alpha=2, decompose_both=True, decompose_factor=4))
    first = low.lokr_w1 if low.lokr_w1 is not None else low.lokr_w1_a @ low.lokr_w1_b
    second = low.lokr_w2_a @ low.lokr_w2_b
    torch.testing.assert_close(low(weight), weight + 2 * torch.kron(first, second).reshape(weight.shape))


@given(dimension=st.integers(1, 400), factor=st.just(-1) | st.integers(1, 40))
def test_factorization_is_that_of_lycoris(dimension: int, factor: int) -> None:
    def lycoris() -> tuple[int, int]:
        if factor > 0 and dimension % factor == 0:
            return factor, dimension // factor
        limit, m, n, total = factor if factor != -1 else dimension, 1, dimension, dimension + 1
        while m < n:
            new = m + 1
            while dimension % new != 0:
                new += 1
            if new + dimension // new > total or new > limit:
                break
            m, n = new, dimension // new
        return (m, n) if m <= n else (n, m)

    assert factorization(dimension, factor) == lycoris()


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_rank_and_module_dropout_take_rows_or_everything_while_training(name: str) -> None:
    weight = torch.zeros(400, 6)
    adapter = trained(make(name, weight, r=2, rank_dropout=0.25))
    full, value = adapter.eval()(weight), adapter.train()(weight)
    dropped = (value == 0).all(dim=1)
    factor = 1.0 if name == "lokr" else 1 / (~dropped).float().mean()
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.12)
    torch.testing.assert_close(value[~dropped], full[~dropped] * factor)
    whole = trained(make(name, weight, r=2, module_dropout=0.5))
    seen = {bool((whole(weight) == 0).all()) for _ in range(40)}
    assert seen == {True, False}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotations_keep_the_singular_values(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    expected = torch.linalg.svdvals(weight.flatten(1))
    for name, arguments in [
        ("oft", {"oft_block_size": 2}),
        ("hra", {"r": 2}),
        ("hra", {"r": 3, "apply_GS": True, "init_weights": False}),
    ]:
        adapter = trained(make(name, weight, **arguments))
        value = adapter(weight)
        torch.testing.assert_close(torch.linalg.svdvals(value.flatten(1)), expected)
        torch.testing.assert_close(adapter.right_inverse(value), weight)


def test_oft_and_hra_are_the_formulas_of_the_papers() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    oft = trained(make("oft", weight, oft_block_size=2))
    eye, q = torch.eye(2, dtype=torch.float64), oft.oft_R.detach()[:, 0]
    blocks = [(eye - s) @ torch.linalg.inv(eye + s) for s in (torch.tensor([[0, x], [-x, 0]]) for x in q)]
    torch.testing.assert_close(oft(weight), weight @ torch.block_diag(*blocks).T)
    hra = trained(make("hra", weight, r=2))
    H = torch.eye(4, dtype=torch.float64)
    for u in hra.hra_u.T:
        H = H @ (torch.eye(4, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u))
    torch.testing.assert_close(hra(weight), weight @ H)


def test_sparse_adapters_change_only_their_entries() -> None:
    weight = torch.randn(6, 8)
    shira = trained(make("shira", weight, r=1))
    assert (shira(weight) != weight).sum() == 14
    tokens = trained(make("trainable_tokens", weight, token_indices=[1, 4]))
    assert (tokens(weight) != weight).all(dim=1).nonzero().flatten().tolist() == [1, 4]


def test_fourierft_is_the_inverse_transform_of_its_spectrum() -> None:
    weight = torch.randn(6, 8, dtype=torch.float64)
    adapter = trained(make("fourierft", weight, n_frequency=4, scaling=2.0))
    chosen = torch.randperm(48, generator=torch.Generator().manual_seed(777))[:4]
    spectrum = torch.zeros(6, 8, dtype=torch.float64)
    spectrum[chosen // 8, chosen % 8] = adapter.fourierft_spectrum.detach()
    torch.testing.assert_close(adapter(weight), weight + 2 * torch.fft.ifft2(spectrum).real)


def test_hira_and_delora_are_the_formulas_of_the_papers() -> None:
    weight = torch.randn(6, 8, dtype=torch.float64)
    hira = trained(make("hira", weight, r=2))
    torch.testing.assert_close(hira(weight), weight + weight * (hira.hira_B @ hira.hira_A))
    delora = trained(make("delora", weight, r=2, delora_lambda=3.0))
    A, B = delora.delora_A, delora.delora_B
    diagonal = torch.diag_embed(delora.delora_lambda / 2 / (A.norm(dim=1) * B.norm(dim=0)))
    torch.testing.assert_close(delora(weight), weight + B @ diagonal @ A * weight.norm(dim=0))


def test_c3a_is_the_circular_convolution_of_peft() -> None:
    weight = torch.zeros(6, 4, dtype=torch.float64)
    adapter = trained(make("c3a", weight, block_size=2))
    x = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
    product = torch.einsum("inb,mnb->imb", torch.fft.ifft(x), torch.fft.fft(adapter.c3a_kernel))
    torch.testing.assert_close(adapter(weight), torch.fft.fft(product).real.flatten(1).T / 4)


def test_miss_adds_its_block_side_by_side() -> None:
    weight = torch.zeros(6, 8)
    adapter = trained(make("miss", weight, r=3))
    block = adapter.miss_block.T
    assert torch.equal(adapter(weight), torch.cat([block, block, block[:, :2]], dim=1))


def test_gralora_has_its_own_low_rank_change_in_each_tile() -> None:
    weight = torch.zeros(6, 8, dtype=torch.float64)
    adapter = trained(make("gralora", weight, r=4, alpha=2, gralora_k=2))
    A, B, delta = adapter.gralora_A, adapter.gralora_B, adapter(weight)
    for k in range(2):
        for n in range(2):
            tile = B[k, 2 * n : 2 * n + 2].T @ A[n, :, 2 * k : 2 * k + 2].T
            torch.testing.assert_close(delta[3 * k : 3 * k + 3, 4 * n : 4 * n + 4], tile / 2)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_is_the_formula_of_the_paper(variant: str) -> None:
    weight = torch.randn(8, 3, dtype=torch.float64)
    adapter = trained(make("road", weight, group_size=4, variant=variant))
    theta, alpha = adapter.road_theta, adapter.road_alpha
    if variant == "road_1":
        theta, alpha = theta.repeat(1, 1, 2, 1), alpha.repeat(1, 1, 2, 1)
    first = (alpha[:, 0] * theta[:, 0].cos()).flatten()
    second = (alpha[:, -1] * theta[:, -1].sin()).flatten()
    grouped = weight.reshape(-1, 2, 2, 3)
    partner = torch.stack((-grouped[:, 1], grouped[:, 0]), dim=1).reshape(weight.shape)
    torch.testing.assert_close(adapter(weight), weight * first[:, None] + partner * second[:, None])


def test_ia3_scales_outputs_or_inputs() -> None:
    weight = torch.randn(3, 4, 2)
    rows, columns = trained(make("ia3", weight)), trained(make("ia3", weight, feedforward=True))
    assert rows.ia3_l.shape == (3, 1, 1)
    assert columns.ia3_l.shape == (1, 4, 1)
    torch.testing.assert_close(rows(weight), weight * rows.ia3_l)
    torch.testing.assert_close(columns(weight), weight * columns.ia3_l)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lora", {"r": 0}, "rank r of one or more, not 0"),
        ("lora", {"r": 7, "init_lora_weights": "pissa"}, r"starts from 7 columns .* \[6, 8\]"),
        ("lora", {"r": 3, "init_lora_weights": "orthogonal"}, "even r, not 3"),
        ("oft", {"oft_block_size": 3}, "does not divide the 8 inputs"),
        ("hra", {"r": 3}, "even r"),
        ("hra", {"r": 9, "apply_GS": True, "init_weights": False}, "in 8 dimensions"),
        ("c3a", {"block_size": 4}, "blocks of 4 do not tile a matrix of 6 x 8"),
        ("gralora", {"r": 4, "gralora_k": 4}, "gralora_k 4 does not divide"),
        ("road", {"group_size": 4}, "does not divide the 6 outputs"),
        ("shira", {"r": 4}, "cannot choose 56 of the 48 entries"),
        ("fourierft", {"n_frequency": 0}, "cannot choose 0"),
        ("trainable_tokens", {"token_indices": [0, 6]}, r"with 6 rows: \[6\] are none"),
        ("trainable_tokens", {"token_indices": [1, 1]}, "named twice"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RewriterError, match=message):
        make(name, torch.randn(6, 8), **arguments)


@pytest.mark.parametrize(
    "name", ["lora", "dora", "adalora", "vera", "loha", "lokr", "oft", "hra", "shira", "hira", "miss"]
)
def test_a_vector_is_refused(name: str) -> None:
    with pytest.raises(RewriterError, match=r"two or more dimensions, this one has shape \[5\]"):
        make(name, torch.randn(5))
