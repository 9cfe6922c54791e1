"""The closed loop, on machines that are made up: their times are functions of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.allocation import allocate
from secateurs.errors import BudgetError, ConfigError
from secateurs.latency import LatencyTable, fit_latency, fitting
from secateurs.latency.measuring import runtime_of
from secateurs.latency.probing import Turns
from secateurs.latency.table import Layer, Width
from secateurs.latency.work import REST, work_curve, works_of
from secateurs.types import Budget, Counts, Inputs, Plan, Scores

Machine = Callable[[int], float]
"""Parameters of a model -> milliseconds of a call."""


def n_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def setting(hidden: int = 400) -> tuple[nn.Module, Scores, Tensor, LatencyTable]:
    """An MLP, and a table that says: 10 ms for all of it, in proportion to the work."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 8)).eval()
    x = torch.randn(2, 8)
    graph = sc.trace(model, x)
    scores = Scores(graph, {n: torch.rand(u) for n, u in graph.units.items()}, "random")
    whole = float(work_curve(works_of(graph), {}, [REST])({})[0])
    layers = (Layer(REST, (0.0, whole), (0.0, 10.0)),)
    dense = Width("dense", graph.units, 10.0, 10.0)
    table = LatencyTable(graph, layers, runtime_of(model, x, 1), (dense,), 1.0, 0.0)
    return model, scores, x, table


def pretend(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> list[int]:
    """Times come from the machine, in a clock three times as slow; sizes that were timed."""
    seen: list[int] = []

    def times(
        models: Mapping[str, nn.Module], inputs: Inputs, repeats: int, min_ms: float
    ) -> Turns:
        seen.append(n_params(models["candidate"]))
        spread = [3 * (0.999 + 0.002 * i / repeats) for i in range(repeats)]
        found = {n: [machine(n_params(m)) * s for s in spread] for n, m in models.items()}
        wall = {n: [7 * ms for ms in times] for n, times in found.items()}
        return Turns(found, wall, dict.fromkeys(models, 1))

    monkeypatch.setattr(fitting, "turns", times)
    return seen


def fit(asked: float, hidden: int = 400, **options: Any) -> fitting.LatencyFit:
    model, scores, x, table = setting(hidden)
    budget = Budget(latency_ms=asked, **options.pop("limits", {}))
    round_to = options.pop("round_to", 1)

    def allocated(b: Budget) -> Counts:
        return allocate(scores, b, latency=table, round_to=round_to)

    return fit_latency(model, scores, budget, table, allocated, x, **options)


FULL = 8 * 400 + 400 + 8 * 400 + 8
MACHINES: dict[str, Machine] = {
    "as the table says": lambda n: n / FULL * 10,
    "small models slower": lambda n: 10 * (n / FULL) ** 0.5,
    "small models faster": lambda n: 10 * (n / FULL) ** 2,
    "half is fixed": lambda n: 3 + 7 * n / FULL,
    "steps": lambda n: 10 * (-(-n // 300) * 300) / (-(-FULL // 300) * 300),
}


@pytest.mark.parametrize("share", [0.35, 0.5, 0.75])
@pytest.mark.parametrize("name", MACHINES)
def test_what_is_realised_is_within_ten_percent_below(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, MACHINES[name])
    found = fit(10 * share)
    assert found.close, found.text()
    assert found.note == ""
    kept = found.counts.kept["0:neuron"]
    left = kept * 17 + 8
    assert found.chosen.realised_ms == pytest.approx(10 * MACHINES[name](left) /
                                                     MACHINES[name](FULL), rel=2e-3)  # fmt: skip
    assert 0.9 * 10 * share <= found.chosen.realised_ms <= 10 * share
    assert found.chosen.p25_ms <= found.chosen.realised_ms <= found.chosen.p75_ms
    assert found.counts.realised["latency_ms"] == found.chosen.realised_ms
    assert found.counts.asked == Budget(latency_ms=10 * share)
    assert len(found.plan.removed["0:neuron"]) == 400 - kept
    assert len(found.rounds) <= 8
    assert found.text().startswith(f"asked for {10 * share:.4g} ms of 10: predicted")
    assert found.to_dict()["kept"] == {"0:neuron": kept}


def test_a_table_that_is_right_needs_one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = pretend(monkeypatch, lambda n: n / FULL * 10)
    assert len(fit(5.0).rounds) == len(seen) == 1


def test_a_budget_above_the_dense_model_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda n: n / FULL * 10)
    found = fit(20.0)
    assert found.close
    assert found.counts.kept == {"0:neuron": 400}
    assert not found.plan.structural


def test_another_limit_may_bind_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda n: n / FULL * 10)
    found = fit(9.0, limits={"units": 0.25})
    assert found.counts.kept == {"0:neuron": 100}
    assert found.close  # nothing larger is within the limits
    with pytest.raises(BudgetError, match=r"Budget\(params=5\) allows"):
        fit(9.0, limits={"params": 5})


def test_a_budget_that_no_model_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda n: 5 + 5 * n / FULL)
    with pytest.raises(BudgetError, match=r"still takes 5\.\d+ ms .* dense model 10; ask for at "
                                          r"least latency_ms=5\.1"):  # fmt: skip
        fit(4.0)


def test_the_smallest_model_may_be_faster_than_the_table_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, lambda n: 10 * (n / FULL) ** 4)
    model, scores, x, table = setting()
    slow = replace(table, layers=(replace(table.layers[0], ms=(6.0, 10.0)),))

    def allocated(b: Budget) -> Counts:
        return allocate(scores, b, latency=slow)

    found = fit_latency(model, scores, Budget(latency_ms=3.0), slow, allocated, x)
    assert found.chosen.realised_ms <= 3.0
    assert found.close
    assert found.chosen.realised_ms >= 2.7


def test_steps_that_are_too_large_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda n: n / FULL * 10)
    found = fit(7.0, round_to=200)
    assert found.counts.kept == {"0:neuron": 200}
    assert not found.close
    assert "28% below what was asked for: no candidate" in found.note
    assert found.note in found.text()


def test_earlier_removals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda n: n / FULL * 10)
    model, scores, x, table = setting()
    first = sc.select(scores, Counts({"0:neuron": 390}, Budget(units=390)))
    line = scores.values["0:neuron"].clone()
    line[first.removed["0:neuron"]] = float("-inf")
    left = replace(scores, values={"0:neuron": line})

    def allocated(b: Budget) -> Counts:
        return allocate(left, b, latency=table)

    found = fit_latency(model, left, Budget(latency_ms=5.0), table, allocated, x, previous=first)
    gone: Plan = found.plan
    assert set(first.removed["0:neuron"].tolist()) <= set(gone.removed["0:neuron"].tolist())


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda n: n / FULL * 10)
    with pytest.raises(ConfigError, match="rounds >= 1"):
        fit(5.0, rounds=0)
    model, scores, x, table = setting()

    def allocated(b: Budget) -> Counts:
        return allocate(scores, b, latency=table)

    with pytest.raises(ConfigError, match=r"needs Budget\(latency_ms=...\)"):
        fit_latency(model, scores, Budget(units=0.5), table, allocated, x)
    other = replace(table, runtime=replace(table.runtime, processor="an abacus"))
    with pytest.raises(ConfigError, match="measured elsewhere: processor 'an abacus', now"):
        fit_latency(model, scores, Budget(latency_ms=5.0), other, allocated, x)
    with pytest.raises(ConfigError, match="measured elsewhere: inputs"):
        fit_latency(model, scores, Budget(latency_ms=5.0), table, allocated, torch.randn(3, 8))


def test_real_times_are_used() -> None:
    """Without a pretended machine; nothing is said about the figures."""
    model, scores, x, table = setting(hidden=64)
    table = replace(table, widths=(replace(table.widths[0], ms=1e6),))

    def allocated(b: Budget) -> Counts:
        return allocate(scores, b, latency=table)

    budget = Budget(latency_ms=1e9)
    found = fit_latency(model, scores, budget, table, allocated, x, repeats=3, rounds=1)
    (only,) = found.rounds
    assert only.candidate.runs >= 3
    assert only.candidate.median_ms > 0
    assert only.ratio == only.candidate.median_ms / only.dense.median_ms
