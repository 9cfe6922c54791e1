"""Tables of latencies: isotonic lines, pure predictions, files; no assertion on time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateurs as sc
from secateurs.allocation import allocate
from secateurs.errors import ConfigError, FileFormatError
from secateurs.latency import LatencyTable, measure_table
from secateurs.latency.measuring import rising, runtime_of
from secateurs.latency.probing import layer_times
from secateurs.latency.table import Layer, Width
from secateurs.latency.timing import timing
from secateurs.latency.work import BLOCK, ELEMENT, REST, work_curve, works_of
from secateurs.types import Budget, Graph, Scores
from tests.graphs import mlp


class Net(nn.Module):
    """A convolution, a norm, a recurrent layer, attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 40, 3, padding=1)
        self.norm = nn.BatchNorm2d(40)
        self.mix = nn.Linear(40 * 4, 24)
        self.rnn = nn.LSTM(24, 20, batch_first=True)
        self.qkv = nn.Linear(20, 3 * 16)
        self.out = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1, 6, 4)
        y = self.norm(self.conv(x)).relu().permute(0, 2, 1, 3).flatten(2)  # (batch, 6, 160)
        y, _ = self.rnn(self.mix(y).relu())
        q, k, v = self.qkv(y).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        y = self.out(y.transpose(1, 2).flatten(2)).relu()
        found: Tensor = self.head(y.mean(1))
        return found


def case() -> tuple[nn.Module, Graph, Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = Net().eval(), torch.randn(2, 1, 6, 4)
    return model, sc.trace(model, x), x


@pytest.fixture(scope="module")
def measured() -> tuple[nn.Module, Graph, Tensor, LatencyTable]:
    model, graph, x = case()
    return model, graph, x, measure_table(model, graph, x, widths=(0.5,), repeats=3)


def by_hand(graph: Graph, *layers: Layer) -> LatencyTable:
    """A table without measurements."""
    runtime = runtime_of(nn.Linear(1, 1), torch.zeros(1, 1), 1)
    dense = {t.name: t.n_units for t in graph.groups()}
    table = LatencyTable(graph, layers, runtime, (), 1.0, 0.0)
    ms = table.ms(dense)
    return replace(table, widths=(Width("dense", dense, ms, ms),))


# -- work ----------------------------------------------------------------------------------------


def test_work_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = sc.trace(model, torch.randn(5, 4))
    orders = {"0:neuron": np.arange(6)}
    work = work_curve(works_of(graph), orders, ["0", "1", "2", REST])
    for n in range(7):
        by_layer = [4 * n + ELEMENT * n, ELEMENT * n, 3 * n + ELEMENT * 3]
        assert work({"0:neuron": n}).tolist() == pytest.approx([*by_layer, sum(by_layer)])


def test_channels_of_convolutions_come_in_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU(), nn.Conv2d(40, 40, 1), nn.Flatten(1),
                          nn.Linear(40, 2))  # fmt: skip
    graph = sc.trace(model.eval(), torch.randn(2, 3, 1, 1))
    orders = {"0:channel": np.arange(40), "2:channel": np.arange(40)}
    work = work_curve(works_of(graph), orders, ["0", "2"])
    first, second = work({"0:channel": 17, "2:channel": 33}).tolist()
    assert first == 3 * 2 * BLOCK + ELEMENT * 17  # three inputs are fixed: no blocks
    assert second == 2 * BLOCK * 3 * BLOCK + ELEMENT * 33
    few = work({"0:channel": 5, "2:channel": 1}).tolist()[1]
    assert few == 5 * BLOCK + ELEMENT  # few inputs are taken one by one


def test_work_of_modules_without_times_goes_to_those_around_them() -> None:
    _, graph, _ = case()
    works = works_of(graph)
    orders = {n: np.arange(u) for n, u in graph.units.items()}
    dense = dict(graph.units)
    every = [*dict.fromkeys(w.layer for w in works), REST]
    apart = dict(zip(every, work_curve(works, orders, every)(dense), strict=True))
    assert apart[REST] == pytest.approx(sum(v for k, v in apart.items() if k != REST))
    whole, rest = work_curve(works, orders, ["", REST])(dense).tolist()
    assert whole == rest == pytest.approx(apart[REST])


def test_a_graph_without_structure_is_refused() -> None:
    with pytest.raises(ConfigError, match="was made by hand"):
        works_of(mlp().graph)


# -- lines ---------------------------------------------------------------------------------------


def pooled(values: list[float]) -> list[float]:
    """Isotonic regression by its min-max formula."""
    n = len(values)
    return [
        max(min(float(np.mean(values[a : b + 1])) for b in range(i, n)) for a in range(i + 1))
        for i in range(n)
    ]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 20).map(float), min_size=1, max_size=9))
def test_times_are_made_to_rise(values: list[float]) -> None:
    work, ms = rising(np.arange(len(values)).astype(float), np.array(values))
    assert work == tuple(range(len(values)))
    assert ms == pytest.approx(pooled(values))


def test_equal_work_is_averaged() -> None:
    assert rising(np.array([2.0, 1.0, 2.0]), np.array([5.0, 1.0, 7.0])) == ((1, 2), (1, 6))


def test_prediction_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = sc.trace(model, torch.randn(5, 4))
    per = 4 + ELEMENT
    table = by_hand(graph, Layer("0", (per * 2, per * 4), (1.0, 3.0)), Layer(REST, (1.0,), (0.5,)))
    found = [table.ms({"0:neuron": n}) for n in range(7)]
    assert found == pytest.approx([0.5, 1.5, 1.5, 2.5, 3.5, 3.5, 3.5])  # none: no time at all
    assert table.ms({}) == table.dense_ms == 3.5
    for wrong in ({"0:neuron": 7}, {"1:neuron": 1}, {"0.weight": 3}):
        with pytest.raises(ConfigError, match="must be a structural target"):
            table.ms(wrong)


# -- measured ------------------------------------------------------------------------------------


def test_a_table_names_its_layers_and_adds_up(
    measured: tuple[nn.Module, Graph, Tensor, LatencyTable],
) -> None:
    model, graph, x, table = measured
    names = [layer.name for layer in table.layers]
    assert {"conv", "norm", "mix", "rnn", "qkv", "out", "head"} <= set(names)
    assert names[-1] == REST
    assert [w.name for w in table.widths] == ["dense", "0.5", "mixed", "mixed, the other way round",
                                              "fewest"]  # fmt: skip
    assert table.widths[0].kept == graph.units
    assert set(table.widths[-1].kept.values()) == {1}
    assert table.dense_ms == table.widths[0].ms > 0
    assert (table.runtime.batch_size, table.runtime.inputs) == (2, ((2, 1, 6, 4),))
    assert (table.runtime.threads, table.runtime.dtype, table.runtime.device) == (
        1, "float32", "cpu")  # fmt: skip
    for width in table.widths:
        assert width.predicted_ms == table.ms(width.kept)
    with timing({"a": model}, 1):
        assert set(layer_times(model, x, lambda: 0.0)) == set(names) - {REST} | {""}


def test_predictions_never_fall_when_a_count_rises(
    measured: tuple[nn.Module, Graph, Tensor, LatencyTable],
) -> None:
    _, graph, _, table = measured
    units = graph.units
    curve = table.curve(graph, {n: np.arange(u) for n, u in units.items()})
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        counts = {n: int(torch.randint(1, u + 1, (), generator=g)) for n, u in units.items()}
        more = {n: int(torch.randint(c, units[n] + 1, (), generator=g)) for n, c in counts.items()}
        assert curve(counts) <= curve(more) <= curve(units)
        assert curve(counts) == curve(counts)


def test_a_table_is_a_limit_for_every_allocation(
    measured: tuple[nn.Module, Graph, Tensor, LatencyTable],
) -> None:
    _, graph, _, table = measured
    g = torch.Generator().manual_seed(0)
    scores = Scores(graph, {n: torch.rand(u, generator=g) for n, u in graph.units.items()}, "r")
    least, most = table.ms(dict.fromkeys(graph.units, 1)), table.ms(graph.units)
    for method in ("uniform", "global"):
        asked = (least + most) / 2
        counts = allocate(scores, Budget(latency_ms=asked), method=method, latency=table)
        assert counts.realised["latency_ms"] <= asked
        for name, count in counts.kept.items():
            if count < graph.units[name]:
                # The prediction is that of the units in the order of their scores.
                more = {**counts.kept, name: count + 1}
                orders = {
                    n: torch.sort(v, descending=True, stable=True).indices.numpy()
                    for n, v in scores.values.items()
                }
                assert table.curve(graph, orders)(more) > asked
    everything = allocate(scores, Budget(latency_ms=2 * most), latency=table)
    assert everything.kept == graph.units


class Fixed(nn.Module):
    """Sizes in the code: only the graph form can be smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 24)
        self.b = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        found: Tensor = self.b(torch.cat([y[:, :12], y[:, 12:24]], 1).view(len(x), 24))
        return found


def test_the_graph_form_is_timed_by_the_modules_of_its_nodes() -> None:
    torch.manual_seed(0)
    model, x = Fixed().eval(), torch.randn(3, 6)
    graph = sc.trace(model, x)
    assert graph.units
    table = measure_table(model, graph, x, widths=(0.5,), repeats=3)
    assert {"a", "b"} <= {layer.name for layer in table.layers}


# -- files ---------------------------------------------------------------------------------------


def test_a_saved_table_predicts_the_same(
    measured: tuple[nn.Module, Graph, Tensor, LatencyTable], tmp_path: Path
) -> None:
    _, graph, _, table = measured
    path = table.save(tmp_path / "table.json")
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    _, again, _ = case()
    back = LatencyTable.load(path, again)
    assert (back.layers, back.runtime, back.widths) == (table.layers, table.runtime, table.widths)
    assert back.ms(dict.fromkeys(graph.units, 2)) == table.ms(dict.fromkeys(graph.units, 2))
    fewer = again.only(include="hidden")
    assert len(fewer.units) == 1
    assert LatencyTable.load(path, fewer).ms({}) == table.ms({})


def test_a_table_of_another_model_is_refused(
    measured: tuple[nn.Module, Graph, Tensor, LatencyTable], tmp_path: Path
) -> None:
    model, _, _, table = measured
    path = table.save(tmp_path / "table.json")
    longer = sc.trace(model, torch.randn(2, 1, 9, 4))
    other = sc.trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4))
    for graph in (longer, other):
        with pytest.raises(ConfigError, match="for another model, or for inputs of another shape"):
            LatencyTable.load(path, graph)
        with pytest.raises(ConfigError, match="for another model, or for inputs of another shape"):
            table.curve(graph, {})


def _first(data: dict[str, Any], **change: Any) -> None:
    data["layers"][0].update(change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("layers"),
        lambda d: d.update(format=2),
        lambda d: d.update(widths=[]),
        lambda d: _first(d, ms=[1.0, float("nan")], work=[1.0, 2.0]),
        lambda d: _first(d, ms=[2.0, 1.0], work=[1.0, 2.0]),
        lambda d: _first(d, ms=[1.0], work=[1.0, 2.0]),
        lambda d: _first(d, ms=[], work=[]),
        lambda d: d["runtime"].update(batch="two"),
    ],
)
def test_a_damaged_file_is_refused(
    measured: tuple[nn.Module, Graph, Tensor, LatencyTable],
    damage: Callable[[dict[str, Any]], Any],
    tmp_path: Path,
) -> None:
    _, graph, _, table = measured
    data = table.to_dict()
    damage(data := json.loads(json.dumps(data)))
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FileFormatError):
        LatencyTable.load(path, graph)
    with pytest.raises(FileFormatError, match="not a latency table"):
        LatencyTable.load(tmp_path / "missing.json", graph)


def test_options_that_are_refused() -> None:
    model, graph, x = case()
    with pytest.raises(ConfigError, match="repeats must be >= 3"):
        measure_table(model, graph, x, repeats=2)
    with pytest.raises(ConfigError, match=r"widths in \(0, 1\)"):
        measure_table(model, graph, x, widths=(1.0,))
    with pytest.raises(ConfigError, match="granularity 'expert' can be pruned"):
        measure_table(model, graph, x, granularity="expert")
