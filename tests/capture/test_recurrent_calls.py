"""However a recurrent layer is called, a rewritten one does what torch's does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from rewriter import rewrite

SIZE, HIDDEN = 3, 4
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "projected": {"proj_size": 2},
    "no bias": {"bias": False},
}


class Holds(nn.Module):
    """A recurrent layer, called with whatever it is given."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)


class HoldsWithState(Holds):
    """The same, called with a state too."""

    def forward(self, x: Any, state: Any) -> Any:
        return self.layer(x, state)


def _batch(layer: nn.LSTM) -> tuple[Any, ...]:
    return (torch.randn(2, 5, SIZE) if layer.batch_first else torch.randn(5, 2, SIZE),)


def _one_sequence(layer: nn.LSTM) -> tuple[Any, ...]:
    return (torch.randn(5, SIZE),)


def _packed(layer: nn.LSTM) -> tuple[Any, ...]:
    return (pack_padded_sequence(torch.randn(5, 2, SIZE), [5, 3]),)


def _from_states(layer: nn.LSTM) -> tuple[Any, ...]:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    return (*_batch(layer), (torch.randn(rows, 2, layer.proj_size or HIDDEN), torch.randn(rows, 2, HIDDEN)))


INPUTS = [_batch, _one_sequence, _packed, _from_states]


def _rewritten(plain: nn.Module, capture: str) -> nn.Module:
    return rewrite(plain, {"reparam": 1, "rules": [_RULE]}, capture=capture)


_RULE = {"name": "r", "select": "layer.weight_*", "chain": ["weight_norm"]}


def _tensors(result: Any) -> list[Tensor]:
    output, last = result
    return [output.data if isinstance(output, PackedSequence) else output, *last]


@pytest.mark.parametrize("capture", ["graph", "module"])
@pytest.mark.parametrize("inputs", INPUTS, ids=lambda inputs: inputs.__name__.strip("_"))
@pytest.mark.parametrize("form", FORMS)
def test_an_lstm_gives_what_torch_gives(form: str, inputs: Callable[[nn.LSTM], tuple[Any, ...]], capture: str) -> None:
    layer = nn.LSTM(SIZE, HIDDEN, **FORMS[form])
    given = inputs(layer)
    plain = Holds(layer) if len(given) == 1 else HoldsWithState(layer)
    model = _rewritten(plain, capture)
    for one, other in zip(_tensors(model(*given)), _tensors(plain(*given)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "x",
    [torch.randn(5, 2, SIZE + 1), torch.randn(5, 2, SIZE, dtype=torch.float64), torch.randn(1, 5, 2, SIZE)],
    ids=["features", "dtype", "dimensions"],
)
def test_a_wrong_input_is_refused_as_torch_refuses_it(x: Tensor) -> None:
    plain = Holds(nn.LSTM(SIZE, HIDDEN))
    with pytest.raises(Exception) as expected:
        plain(x)
    with pytest.raises(type(expected.value)) as found:
        _rewritten(plain, "module")(x)
    assert str(found.value) == str(expected.value)


def test_settings_of_an_lstm_that_change_later_count() -> None:
    plain = Holds(nn.LSTM(SIZE, HIDDEN, num_layers=2))
    model: Any = _rewritten(plain, "module")
    x = torch.randn(5, 2, SIZE)
    for layer in (plain.layer, model.layer):
        layer.dropout = 1.0
    torch.testing.assert_close(model(x)[0], copy.deepcopy(plain)(x)[0])


def test_a_compiled_lstm_trains() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lstm(x)[0]
            return y

    rule = {"name": "w", "select": "lstm.weight_hh_l0", "chain": ["weight_norm"]}
    new = rewrite(Net(), {"reparam": 1, "rules": [rule]}, capture="graph")
    x = torch.randn(5, 2, 8)
    compiled = torch.compile(new, backend="aot_eager")
    torch.testing.assert_close(compiled(x), new(x))
    expected = torch.autograd.grad(new(x).sum(), list(new.parameters()))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), list(new.parameters())), expected)
