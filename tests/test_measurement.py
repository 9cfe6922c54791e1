"""Multiply-adds against formulas done by hand, fair timing, and nothing left changed."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.errors import CaptureError, ConfigError, DataError
from secateurs.measurement import (
    LatencyRow,
    compare_latency,
    macs,
    measure,
    no_gain_reason,
    resize_batch,
)

FAST: dict[str, Any] = {"repeats": 2, "min_ms": 0.01}

# --- multiply-adds -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Linear(4, 3), (2, 4), 4 * 3),
        (nn.Linear(4, 3), (2, 5, 4), 5 * 4 * 3),
        (nn.Linear(4, 3, bias=False), (1, 4), 4 * 3),
        (nn.Conv1d(3, 8, 5), (2, 3, 9), 8 * 3 * 5 * 5),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 4, 6), 8 * 3 * 9 * 24),
        (nn.Conv2d(3, 8, 3, stride=2), (2, 3, 5, 5), 8 * 3 * 9 * 4),
        (nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 4, 4), 8 * 3 * 9 * 16),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 4, 4), 6 * 9 * 16),
        (nn.ConvTranspose2d(3, 8, 2, stride=2), (2, 3, 4, 4), 8 * 3 * 4 * 16),
        (nn.Sequential(nn.Flatten(), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3)), (5, 4), 12),
    ],
)
def test_linear_and_convolution(model: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert macs(model, torch.zeros(shape)) == expected


def _recurrent(gates: int, inputs: int, hidden: int, layers: int, directions: int) -> int:
    """gates x H x (I + H) per layer and direction, the textbook count of one time step."""
    total = 0
    for layer in range(layers):
        width = inputs if layer == 0 else hidden * directions
        total += directions * gates * hidden * (width + hidden)
    return total


@pytest.mark.parametrize(("cls", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers(
    cls: Callable[..., nn.Module], gates: int, layers: int, bidirectional: bool
) -> None:
    model = cls(3, 5, layers, bidirectional=bidirectional, batch_first=True)
    expected = 7 * _recurrent(gates, 3, 5, layers, 2 if bidirectional else 1)
    assert macs(model, torch.zeros(2, 7, 3)) == expected


def test_relu_rnn() -> None:
    model = nn.RNN(3, 5, nonlinearity="relu", batch_first=True)
    assert macs(model, torch.zeros(2, 7, 3)) == 7 * 5 * (3 + 5)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_lstm_with_projection() -> None:
    model = nn.LSTM(3, 5, proj_size=2, batch_first=True)
    assert macs(model, torch.zeros(2, 7, 3)) == 7 * (4 * 5 * (3 + 2) + 5 * 2)


@pytest.mark.parametrize(
    ("cell", "gates"),
    [(nn.LSTMCell(3, 5), 4), (nn.GRUCell(3, 5), 3), (nn.RNNCell(3, 5), 1)],
)
def test_cells(cell: nn.Module, gates: int) -> None:
    assert macs(cell, torch.zeros(2, 3)) == gates * 5 * (3 + 5)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([7, 4])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        _, (h, _) = self.lstm(packed)
        return torch.as_tensor(h)


def test_packed_sequences_count_only_real_steps() -> None:
    steps = (7 + 4) / 2  # per sample
    assert macs(Packed(), torch.zeros(2, 7, 3)) == steps * 4 * 5 * (3 + 5)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention(kv_heads: int) -> None:
    heads, queries, keys, dim = 4, 5, 7, 8
    q = torch.zeros(2, heads, queries, dim)
    k = torch.zeros(2, kv_heads, keys, dim)
    assert macs(Attention(), (q, k, k.clone())) == heads * queries * keys * (dim + dim)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_layer_is_not_hidden_by_its_fast_path() -> None:
    width, steps, inner = 4, 7, 8
    layer = nn.TransformerEncoderLayer(width, 2, inner, batch_first=True)
    linear = steps * (3 * width * width + width * width + 2 * width * inner)
    attention = 2 * steps * steps * width
    before = torch.backends.mha.get_fastpath_enabled()
    assert macs(layer, torch.zeros(2, steps, width)) == linear + attention
    assert torch.backends.mha.get_fastpath_enabled() == before


class Products(nn.Module):
    def forward(self, a: Tensor, v: Tensor) -> Tensor:
        return (a @ v).sum() + v @ v + torch.einsum("ij,kj->ik", a, a).sum()


def test_vectors_and_einsum() -> None:
    a, v = torch.zeros(1, 6), torch.zeros(6)
    assert macs(Products(), (a, v)) == 6 + 6 + 6


class Tagger(nn.Module):
    def __init__(self, cls: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn = cls(3, 5, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.rnn(x)[0]))


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize(("cls", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_exported_graph_counts_like_its_module(cls: Callable[..., nn.Module], gates: int) -> None:
    model, x = Tagger(cls).eval(), torch.zeros(2, 7, 3)
    graph = torch.export.export(model, (x,)).module(check_guards=False)
    assert isinstance(graph, torch.fx.GraphModule)
    calls = [str(n.target) for n in graph.graph.nodes]
    assert any(call.startswith(f"aten.{cls.__name__.lower()}") for call in calls)
    expected = 7 * (_recurrent(gates, 3, 5, 2, 2) + 10 * 4)
    assert macs(model, x) == macs(graph, x) == expected


def test_two_calls_of_one_layer_count_twice() -> None:
    layer = nn.Linear(4, 4)
    assert macs(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(3, 4)) == 2 * 16


def test_inference_mode_of_the_caller_does_not_matter() -> None:
    model = nn.LSTM(3, 5, batch_first=True)
    with torch.inference_mode():
        assert macs(model, torch.zeros(2, 7, 3)) == 7 * 4 * 5 * (3 + 5)


def test_an_operator_without_formula_is_named() -> None:
    model, x = nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3))
    assert measure(model, x, latency=False).uncounted == ("aten::_trilinear",)
    with pytest.warns(UserWarning, match="leave out aten::_trilinear"):
        macs(model, x)


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        qkv, out = torch.zeros(12, 4), torch.zeros(4, 4)
        args = (x, x, x, 4, 2, qkv, qkv[:, 0].clone(), out, out[0])
        return torch.as_tensor(torch.ops.aten._native_multi_head_attention(*args)[0])


def test_a_fused_operator_is_named() -> None:
    found = measure(Fused(), torch.zeros(2, 3, 4), latency=False)
    assert found.uncounted == ("aten::_native_multi_head_attention",)


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(torch.ops.secateurs_test.triple(x))


def test_an_operator_of_another_library_is_named() -> None:
    def triple(x: Tensor) -> Tensor:
        return 3 * x

    torch.library.custom_op("secateurs_test::triple", triple, mutates_args=())
    found = measure(Foreign(), torch.zeros(1, 2), latency=False)
    assert found.uncounted == ("secateurs_test::triple",)


class Everyday(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.normalize(self.norm(x)).softmax(-1).cumsum(-1).lgamma()
        y = nn.functional.interpolate(y[:, None], scale_factor=2, mode="linear")
        return nn.functional.avg_pool1d(y, 2).to(torch.float64)


def test_operators_that_do_not_multiply_are_not_named() -> None:
    found = measure(Everyday(), torch.zeros(2, 4), latency=False)
    assert (found.macs, found.uncounted) == (0.0, ())


# --- the measurement -----------------------------------------------------------------------------


def test_fields_and_dict() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        next(model.parameters())[0] = 0.0
    m = measure(model, torch.zeros(2, 4), batch_sizes=(1, 8), **FAST)
    assert (m.params, m.nonzeros) == (15 + 6, 15 + 6 - 4)
    assert m.model_sparsity == pytest.approx(4 / 21)
    assert (m.param_bytes, m.buffer_bytes) == (21 * 4, 3 * 4 + 3 * 4 + 8)
    assert [row.batch_size for row in m.latency] == [1, 8]
    assert m.threads == 1
    data = json.loads(json.dumps(m.to_dict()))
    assert data["latency"][1]["batch_size"] == 8
    assert data["macs"] == 12.0


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(4, 4, bias=False)
    m = measure(nn.Sequential(layer, layer), torch.zeros(1, 4), latency=False)
    assert (m.params, m.param_bytes) == (16, 64)
    assert (m.latency, m.threads) == ((), None)


def test_model_without_parameters() -> None:
    m = measure(nn.ReLU(), torch.zeros(2, 4), latency=False)
    assert (m.params, m.macs, m.model_sparsity) == (0, 0.0, 0.0)


def test_default_batch_size_is_that_of_the_example() -> None:
    m = measure(nn.Linear(4, 3), torch.zeros(3, 4), **FAST)
    assert [row.batch_size for row in m.latency] == [3]


class Noisy(nn.Module):
    """Draws random numbers, counts its calls in a buffer, fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.fail:
            raise ValueError("refused on purpose")
        return torch.as_tensor(self.drop(self.layer(x + torch.rand_like(x))))


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_changed(fail: bool) -> None:
    torch.manual_seed(0)
    model = Noisy().train()
    model.drop.eval()
    model.fail = fail
    model.layer.weight.grad = torch.ones(3, 4)
    grad = model.layer.weight.grad
    state = copy.deepcopy(model.state_dict())
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    if fail:
        with pytest.raises(CaptureError, match="refused on purpose"):
            measure(model, torch.zeros(2, 4), **FAST)
        with pytest.raises(CaptureError, match="'a' at batch size 2"):
            compare_latency({"a": model}, torch.zeros(2, 4), threads=threads + 1, **FAST)
    else:
        measure(model, torch.zeros(2, 4), threads=threads + 1, **FAST)
    assert (model.training, model.drop.training) == (True, False)
    assert model.layer.weight.grad is grad
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Caching(nn.Module):
    """Keeps a table made in its first call, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(4)
        return torch.as_tensor(self.layer(x) * self.table)


@pytest.mark.parametrize("timed", [False, True])
def test_a_model_that_caches_can_be_trained_afterwards(timed: bool) -> None:
    model = Caching()
    x = torch.zeros(2, 4)
    with torch.inference_mode():
        if timed:
            compare_latency({"a": model}, x, **FAST)
        else:
            macs(model, x)
    model(torch.zeros(2, 4)).sum().backward()
    assert model.layer.weight.grad is not None


class Silent(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "no tensor"


def test_errors_name_what_is_wrong() -> None:
    linear, x = nn.Linear(4, 3), torch.zeros(2, 4)
    with pytest.raises(CaptureError, match="returns str, no tensor"):
        measure(Silent(), x, latency=False)
    with pytest.raises(CaptureError, match="refuses the example inputs"):
        measure(linear, torch.zeros(2, 5), latency=False)
    with pytest.raises(CaptureError, match="without a shape yet: weight, bias"):
        measure(nn.LazyLinear(3), x)
    with pytest.raises(DataError, match="no samples"):
        macs(linear, torch.zeros(0, 4))
    with pytest.raises(ConfigError, match="repeats must be >= 2"):
        measure(linear, x, repeats=1)
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        measure(linear, x, threads=0)
    with pytest.raises(ConfigError, match="batch size must be at least 1"):
        measure(linear, x, batch_sizes=(0,))


# --- latency -------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, log: list[tuple[str, int]], name: str) -> None:
        super().__init__()
        self.log, self.name = log, name

    def forward(self, x: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
        self.log.append((self.name, len(x)))
        return x


def test_candidates_take_turns() -> None:
    log: list[tuple[str, int]] = []
    models = {name: Counting(log, name) for name in "ab"}
    rows = compare_latency(models, torch.zeros(2, 4), (1, 3), repeats=4, min_ms=1e-9)
    assert [[row.batch_size for row in rows[name]] for name in "ab"] == [[1, 3], [1, 3]]
    assert all(row.runs == 4 for row in rows["a"] + rows["b"])
    warm = 2 * 4  # per model: the first call and three to estimate the time
    timed = [name for name, size in log if size == 3][warm:]
    assert "".join(timed) == "abbaabba"


def test_quartiles_are_ordered() -> None:
    rows = compare_latency({"a": nn.Linear(4, 3)}, torch.zeros(2, 4), **FAST)["a"]
    assert 0 < rows[0].p25_ms <= rows[0].median_ms <= rows[0].p75_ms


def test_resize_batch_leaves_what_is_not_per_sample() -> None:
    table = torch.arange(3.0)
    resized = resize_batch({"x": torch.tensor([[1], [2]]), "table": table, "flag": True}, 3)
    assert isinstance(resized, dict)
    assert resized["x"].tolist() == [[1], [2], [1]]
    assert resized["table"] is table
    assert resized["flag"] is True
    smaller = resize_batch((torch.tensor([5, 6]),), 1)
    assert isinstance(smaller, tuple)
    assert smaller[0].tolist() == [5]


def _row(median: float, spread: float = 0.01, batch: int = 1) -> LatencyRow:
    return LatencyRow(batch, median, median * (1 - spread), median * (1 + spread), 10)


@pytest.mark.parametrize(
    ("before", "after", "macs_after", "structural", "reason"),
    [
        (_row(2.0), _row(1.0), 5e8, True, None),
        (_row(2.0), _row(1.96, 0.001), 5e8, True, "not measurably faster"),  # under 5 %
        (_row(2.0, 0.5), _row(1.5, 0.5), 5e8, True, "not measurably faster"),  # overlap
        (_row(2.0), _row(2.0), 1e9, False, "dense kernels multiply zeros"),
        (_row(2.0), _row(2.0), 1e9, True, "hardly fell"),
        (_row(2.0), _row(2.0), 1e8, True, "memory traffic"),
        (_row(2000.0), _row(2000.0), 1e8, True, "calling each operator dominates"),
        (_row(0.1), _row(0.1), 1e8, True, "calling each operator dominates"),
        (_row(2.0), _row(3.0), 1e8, True, "^slower at batch 1"),
    ],
)
def test_no_gain_reason(
    before: LatencyRow, after: LatencyRow, macs_after: float, structural: bool, reason: str | None
) -> None:
    got = no_gain_reason(
        before, after, macs_before=1e9, macs_after=macs_after, structural=structural
    )
    assert got is None if reason is None else got is not None and re.search(reason, got)


def test_no_gain_reason_wants_one_batch_size() -> None:
    with pytest.raises(ConfigError, match="one batch size, got 1 and 8"):
        no_gain_reason(_row(1), _row(1, batch=8), macs_before=1, macs_after=1, structural=True)


def test_recurrent_helper_agrees_with_the_number_of_weights() -> None:
    model = nn.LSTM(3, 5, 2, bidirectional=True, bias=False)
    assert _recurrent(4, 3, 5, 2, 2) == sum(math.prod(p.shape) for p in model.parameters())
