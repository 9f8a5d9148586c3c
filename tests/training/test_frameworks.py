"""Training loops as people write them, against the same training with the chain written by hand."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import RewriterError, bake, rewrite
from rewriter.state import get_value

STEPS = 4
SPEC: dict[str, Any] = {"reparam": 1, "rules": [{"name": "r", "select": "fc.weight", "chain": ["weight_norm"]}]}


class Net(nn.Module):
    """Returns the loss too, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.fc(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ByHand(nn.Module):
    """The same net with the formula of weight_norm in its forward: w = g · v / ‖v‖."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.v = nn.Parameter(net.fc.weight.detach().clone())
        self.g = nn.Parameter(self.v.detach().square().sum(1, keepdim=True).sqrt())
        self.bias = nn.Parameter(net.fc.bias.detach().clone())
        self.head = copy.deepcopy(net.head)

    def weight(self) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.g * self.v / self.v.square().sum(1, keepdim=True).sqrt()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(F.linear(x, self.weight(), self.bias)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 4), "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])}


def loop(model: nn.Module, batch: dict[str, Tensor], make: Callable[..., Any] = torch.optim.AdamW) -> None:
    optimizer = make(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()


def assert_trained_alike(new: nn.Module, truth: ByHand, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    site = new.get_submodule("fc.parametrizations.weight")
    pairs = {"g": site.original0, "v": site.original1, "bias": new.fc.bias, "head": new.head.weight}
    expected = {"g": truth.g, "v": truth.v, "bias": truth.bias, "head": truth.head.weight}
    torch.testing.assert_close(pairs, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(bake(new).fc.weight.detach(), truth.weight().detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_a_plain_loop(net: Net, batch: dict[str, Tensor], capture: str, make: Callable[..., Any]) -> None:
    new, truth = rewrite(net, SPEC, capture=capture), ByHand(net)
    loop(new, batch, make)
    loop(truth, batch, make)
    assert_trained_alike(new, truth)


@pytest.mark.slow
def test_a_compiled_step(net: Net, batch: dict[str, Tensor], capture: str) -> None:
    new, truth = rewrite(net, SPEC, capture=capture), ByHand(net)
    optimizer = torch.optim.SGD(new.parameters(), lr=0.05)

    @torch.compile(backend="aot_eager")
    def step(x: Tensor, labels: Tensor) -> Tensor:
        loss = new(x=x, labels=labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for _ in range(STEPS):
        step(**batch)
    loop(truth, batch, torch.optim.SGD)
    assert_trained_alike(new, truth)


@pytest.mark.slow
def test_the_trainer_of_transformers(net: Net, batch: dict[str, Tensor], capture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    new, truth = rewrite(net, SPEC, capture=capture), ByHand(net)
    rows = [{name: tensor[index] for name, tensor in batch.items()} for index in range(8)]
    arguments = arguments_in(tmp_path)
    transformers.Trainer(new, arguments, train_dataset=rows).train()
    loop(truth, batch, torch.optim.SGD)
    assert_trained_alike(new, truth)
    again = rewrite(net, SPEC, capture=capture)
    transformers.Trainer(again, arguments, train_dataset=rows).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert_trained_alike(again, truth)


@pytest.mark.slow
def test_the_trainer_trains_a_gpt2_as_torchs_own_weight_norm(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 8}
    tokens_of = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens_of)
    truth = transformers.GPT2LMHeadModel(config)
    rule = {"name": "r", "select": "**.mlp.c_fc.weight", "chain": ["weight_norm"]}
    new = rewrite(truth, {"reparam": 1, "rules": [rule]})
    nn.utils.parametrizations.weight_norm(truth.transformer.h[0].mlp.c_fc)
    tokens = torch.randint(11, (8, 6))
    labels = tokens.clone()
    labels[:, 0] = -100  # the Trainer divides the loss by the number of labels, GPT-2 by that of predictions
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    with pytest.warns(UserWarning, match="hold the tensors that the parametrizations start from"):
        transformers.Trainer(new, arguments_in(tmp_path), train_dataset=rows).train()
    loop(truth, {"input_ids": tokens, "labels": labels}, torch.optim.SGD)
    torch.testing.assert_close(dict(new.state_dict()), dict(truth.state_dict()), rtol=1e-5, atol=1e-5)


def arguments_in(folder: Path) -> Any:
    import transformers

    return transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        save_steps=2,
        disable_tqdm=True,
    )


@pytest.fixture
def accelerate() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # which a Trainer of another test may have set
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(True)


def test_accelerate_in_bfloat16(net: Net, batch: dict[str, Tensor], capture: str, accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    new, truth = rewrite(net, SPEC, capture=capture), ByHand(net)
    model, optimizer = accelerator.prepare(new, torch.optim.SGD(new.parameters(), lr=0.05))
    theirs = torch.optim.SGD(truth.parameters(), lr=0.05)
    for _ in range(STEPS):
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = truth(**batch)["loss"]
        loss.backward()
        theirs.step()
        theirs.zero_grad()
    assert_trained_alike(accelerator.unwrap_model(model), truth)


def test_accelerate_with_offloaded_parameters(net: Net, batch: dict[str, Tensor], accelerate: Any) -> None:
    new, truth = rewrite(net, SPEC, capture="module").eval(), ByHand(net)
    offloaded = accelerate.cpu_offload(copy.deepcopy(new), execution_device="cpu")
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    torch.testing.assert_close(offloaded(**batch), truth(**batch))
    with pytest.raises(RewriterError, match=r"offloaded.*remove_hook_from_submodules\(model\) before bake"):
        bake(offloaded)
    accelerate.hooks.remove_hook_from_submodules(offloaded)
    torch.testing.assert_close(bake(offloaded).fc.weight, truth.weight())


def test_accelerate_cannot_offload_a_graph_and_says_so(net: Net, accelerate: Any) -> None:
    with pytest.raises(RewriterError, match=r"fc\.forward.*capture='module'"):
        accelerate.cpu_offload(rewrite(net, SPEC, capture="graph"), execution_device="cpu")


def fit(net: nn.Module, batch: dict[str, Tensor], folder: Path, *callbacks: Any) -> Any:
    """Train with Lightning, write a checkpoint, and return the trainer."""
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, rows: list[Tensor], _: int) -> Tensor:
            return self.net(*rows)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    rows = torch.utils.data.TensorDataset(*batch.values())
    quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")}
    trainer = lightning.Trainer(
        max_epochs=STEPS, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **quiet
    )
    trainer.fit(Task(), torch.utils.data.DataLoader(rows, batch_size=8))
    trainer.save_checkpoint(folder / "end.ckpt")
    return trainer


LIGHTNING = pytest.mark.filterwarnings("ignore:.*(num_workers|logging interval|weights_only|Found keys|litlogger)")


@pytest.mark.slow
@LIGHTNING
def test_lightning(net: Net, batch: dict[str, Tensor], capture: str, tmp_path: Path) -> None:
    new, truth = rewrite(net, SPEC, capture=capture), ByHand(net)
    fit(new, batch, tmp_path)
    loop(truth, batch, torch.optim.SGD)
    assert_trained_alike(new, truth)
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    again = nn.ModuleDict({"net": rewrite(net, SPEC, capture=capture)})
    again.load_state_dict(state)
    torch.testing.assert_close(again["net"](**batch), new(**batch), rtol=0, atol=0)


@pytest.mark.slow
@LIGHTNING
@pytest.mark.parametrize("average", ["EMAWeightAveraging", "StochasticWeightAveraging", "WeightAveraging"])
def test_averages_of_lightning_keep_the_spectral_norm(
    net: Net, batch: dict[str, Tensor], capture: str, average: str, tmp_path: Path
) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    arguments = {"swa_lrs": 0.05, "swa_epoch_start": 1} if average.startswith("S") else {"use_buffers": True}
    spec = {"reparam": 1, "rules": [{"name": "r", "select": "fc.weight", "chain": ["spectral_norm"]}]}
    new = rewrite(net, spec, capture=capture)
    fit(new, batch, tmp_path, getattr(callbacks, average)(**arguments))
    weight = get_value(new, "fc.weight")
    assert 0.99 < torch.linalg.matrix_norm(weight, 2) < 1.1
    torch.testing.assert_close(bake(new).fc.weight.detach(), weight)


@pytest.mark.slow
@pytest.mark.parametrize("foreach", [False, True])
def test_the_average_of_timm_keeps_the_spectral_norm(net: Net, capture: str, foreach: bool) -> None:
    timm = importlib.util.find_spec("timm")
    if timm is None or timm.origin is None:
        pytest.skip("timm is not installed")
    path = Path(timm.origin).with_name("utils") / "model_ema.py"  # `import timm` needs torchvision
    found: Any = importlib.util.spec_from_file_location("model_ema", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    new = rewrite(net, {**SPEC, "rules": [{**SPEC["rules"][0], "chain": ["spectral_norm"]}]}, capture=capture)
    average = module.ModelEmaV3(new, decay=0.5, foreach=foreach)
    original = new.get_parameter("fc.parametrizations.weight.original")
    expected = original.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            original.add_(torch.randn_like(original))
        for _ in range(8):
            new(torch.randn(2, 4), torch.tensor([0, 1]))
        average.update(new)
        expected = (expected + original.detach()) / 2
    torch.testing.assert_close(average.module.get_parameter("fc.parametrizations.weight.original").detach(), expected)
    weight = get_value(average.module, "fc.weight")
    torch.testing.assert_close(weight / weight.norm(), expected / expected.norm())
    assert 0.99 < torch.linalg.matrix_norm(weight, 2) < 1.1
    torch.testing.assert_close(bake(average.module).fc.weight.detach(), weight)
