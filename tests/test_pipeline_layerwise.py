"""Cuts layer by layer as a stage: what `prune_layerwise` does to what was allocated."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.allocation import ALLOCATORS, BY_SIZE, allocate
from secateurs.errors import BudgetError, ConfigError
from secateurs.finetuning import Finetune, finetune
from secateurs.masks import check_masks
from secateurs.pipeline import PruneResult, Stage, prune, prune_stages
from secateurs.pipeline import layerwise as room
from secateurs.posttraining import (
    FisherSearch,
    LayerwiseCut,
    compensate_bias,
    prune_layerwise,
    reconstruct,
)
from secateurs.regrowth import Regrow
from secateurs.schedules import Schedule
from secateurs.testing.nets import case
from secateurs.tickets import AtInit, TicketSearch
from secateurs.types import Batch, Budget, Counts, Exclusion, Graph, Plan, Scores, Threshold
from tests.posttraining.plans import Mixed

HALF = Budget(units=0.5)
HEAL = Finetune(epochs=2, lr=0.01)


def correlated(rows: int, n: int) -> Tensor:
    """(rows, n) inputs that depend on each other, so that weights can make up for others."""
    draw = torch.Generator().manual_seed(2)
    return torch.randn(rows, n, generator=draw) @ torch.randn(n, n, generator=draw)


X = correlated(64, 6)


def mlp(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    norms = [nn.BatchNorm1d(24)] if norm else []
    return nn.Sequential(
        nn.Linear(6, 24), *norms, nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2)
    ).eval()


def said(model: nn.Module) -> list[Batch]:
    """What a network says of its inputs: it has learned all of that."""
    with torch.no_grad():
        return [(x, model(x)) for x in torch.split(X, 16)]


BATCHES = said(mlp())


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(F.mse_loss(model(x), y)) for x, y in BATCHES)


def run(model: nn.Module | None = None, **options: Any) -> PruneResult:
    given = {
        "example_inputs": X, "budget": HALF, "granularity": "weight", "layerwise": LayerwiseCut(),
        **options,
    }  # fmt: skip
    return prune(model or mlp(), given.pop("batches", BATCHES), F.mse_loss, **given)


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


def timeless(text: str) -> str:
    return re.sub(r"[\d.]+ s\)", "s)", text)


def blank(graph: Graph) -> Scores:
    """Scores that say nothing: for allocations that do not look at them."""
    return Scores(graph, {t.name: torch.zeros(t.n_units) for t in graph.select("weight")}, "")


def by_hand(
    model: nn.Module,
    counts: Counts,
    how: Mapping[str, Any],
    previous: Plan | None = None,
    samples: Any = BATCHES,
) -> Plan:
    """Counts as densities of what is left."""
    tensors = dict(model.named_parameters())
    left = {
        name: tensors[name].numel() if previous is None else int(previous.masks[name].sum())
        for name in counts.kept
    }
    density = {name: n / left[name] for name, n in counts.kept.items()}
    return prune_layerwise(model, samples, density=density, previous=previous, **how)[0]


def same_masks(result: PruneResult, masks: Mapping[str, Tensor]) -> bool:
    return result.plan.masks.keys() == masks.keys() and all(
        torch.equal(mask, masks[name]) for name, mask in result.plan.masks.items()
    )


# --- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", sorted(BY_SIZE))
@pytest.mark.parametrize(
    "how",
    [
        {}, {"block": 5, "damping": 0.1}, {"method": "wanda"}, {"method": "magnitude"},
    ],
)  # fmt: skip
def test_a_stage_allocates_prunes_and_heals(how: dict[str, Any], allocation: str) -> None:
    """Bit for bit what three calls by hand give; on the calibration data."""
    dense, before = mlp(), copy.deepcopy(mlp().state_dict())
    others = [(torch.randn(9, 6), torch.zeros(9, 2))]
    options: dict[str, Any] = {
        "layerwise": LayerwiseCut(**how),
        "allocation": allocation,
        "seed": 5,
    }
    cut = run(dense, batches=others, calibration=BATCHES, budget=Budget(params=0.4), **options)
    healed = run(finetune=HEAL, budget=Budget(params=0.4), **options)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())

    model, graph = mlp(), sc.trace(mlp(), X)
    counts = allocate(blank(graph), Budget(params=0.4), method=allocation)
    plan = by_hand(model, counts, how)
    assert cut.counts.kept == counts.kept
    assert same_masks(cut, plan.masks)
    assert same(cut.masked, model)
    assert {n: r.tolist() for n, r in cut.plan.removed.items()} == {
        n: r.tolist() for n, r in plan.removed.items()
    }
    finetune(model, BATCHES, F.mse_loss, HEAL, masks=plan.masks, seed=5)
    assert same_masks(healed, plan.masks)
    assert same(healed.masked, model)
    check_masks(healed.model, healed.masks)
    assert (cut.report.reached["params"] or 1.0) <= 0.4
    assert cut.plan.detail is cut.scores.graph.detail  # for what reads the structure later
    (row,) = cut.report.steps  # one step, unless a schedule says otherwise
    assert row.fraction == 1.0


def test_the_methods_differ() -> None:
    """Or the test above would not see which one was taken."""
    options: list[dict[str, Any]] = [
        {}, {"block": 5}, {"damping": 0.1}, {"method": "wanda"}, {"method": "magnitude"},
    ]  # fmt: skip
    models = [run(layerwise=LayerwiseCut(**how)).masked for how in options]
    assert not any(same(a, b) for i, a in enumerate(models) for b in models[:i])


@pytest.mark.parametrize("allocation", ["global", "lamp", "sensitivity"])
def test_scores_say_how_many_stay_where(allocation: str) -> None:
    graph = sc.trace(mlp(), X)
    result = run(allocation=allocation, criterion="magnitude")
    scores = sc.score(mlp(), criterion="magnitude", graph=graph, granularity="weight")
    curves = None
    if allocation == "sensitivity":
        curves = sc.sensitivity(mlp(), BATCHES, F.mse_loss, scores=scores)
    counts = allocate(scores, HALF, method=allocation, sensitivity=curves)
    assert result.counts.kept == counts.kept != run().counts.kept
    model = mlp()
    assert same_masks(result, by_hand(model, counts, {}).masks)
    assert same(result.masked, model)
    assert result.scores.criterion == "magnitude"
    assert result.counts.thresholds == {}  # other weights than the lowest went
    assert all(row.histogram is None for row in result.report.targets)  # nor by them


def test_nothing_is_scored_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*arguments: Any, **options: Any) -> Scores:
        raise AssertionError("scored")

    monkeypatch.setattr("secateurs.pipeline.run.score", score)
    result = run()
    assert result.scores.criterion == ""
    assert [row.histogram for row in result.report.targets] == [None] * 3
    with pytest.raises(AssertionError, match="scored"):
        run(allocation="global")


def test_a_schedule_goes_on_from_what_is_left() -> None:
    """Each step looks at the healed model, and takes more from what is left."""
    schedule = Schedule("linear", 3)
    result = run(schedule=schedule, finetune=HEAL, seed=5)
    model, graph = mlp(), sc.trace(mlp(), X)
    plan: Plan | None = None
    for step, units in enumerate((1 - 0.5 / 3, 1 - 1 / 3, 0.5)):
        asked = Budget(units=units)
        counts = allocate(blank(graph), asked)
        plan = by_hand(model, counts, {}, plan)
        finetune(model, BATCHES, F.mse_loss, HEAL, masks=plan.masks, seed=5 + step)
    assert plan is not None
    assert same_masks(result, plan.masks)
    assert same(result.masked, model)
    assert len(result.report.steps) == 3
    notes = [n for n in result.report.notes if "pruned by" in n]
    assert [n[:11] for n in notes] == ["after cut 1", "after cut 2", "after cut 3"]


class Attending(nn.Module):
    """Three projections in one tensor, and a level of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, time, 6) -> (n, 2)"""
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("net", ["cnn", "mixed", "transformer", "recurrent", "attending"])
def test_counts_are_those_allocated_in_every_network(net: str, method: Any) -> None:
    torch.manual_seed(0)
    batches: Any
    if net == "mixed":
        model: nn.Module = Mixed()
        batches = [(torch.randn(6, 2, 5, 5), None), (torch.randn(3, 2, 5, 5), None)]
    elif net == "attending":
        model = Attending()
        batches = [(torch.randn(9, 4, 6), None)]
    else:
        held = case(net)
        model, batches = held.model, held.batches
    x = batches[0][0]
    result = prune(
        model.eval(), batches, lambda out, _: out.square().mean(), example_inputs=x,
        budget=Budget(units=0.41), granularity="weight", layerwise=LayerwiseCut(method),
    )  # fmt: skip
    targets = result.scores.graph.targets
    weights = {t.name: t.n_units for t in targets.values() if t.kind == "weight"}
    assert result.counts.kept.keys() == weights.keys()
    assert sum(result.counts.kept.values()) == int(0.41 * sum(weights.values()))
    for name, kept in result.counts.kept.items():
        mask = result.plan.masks[name]
        assert int(mask.sum()) == kept
        assert int((result.masked.get_parameter(name) != 0).sum()) == kept
        assert torch.equal(result.plan.removed[name], (~mask).view(-1).nonzero().view(-1))
    sc.verify(result.masked, result.model, result.plan, x)


def test_structure_first_and_weights_of_what_is_left() -> None:
    units = Stage(Budget(units=0.5), criterion="l2_norm", schedule=Schedule("one_shot", 1))
    weights = Stage(Budget(params=0.25), granularity="weight", layerwise=LayerwiseCut())
    result = prune_stages(mlp(), BATCHES, F.mse_loss, [units, weights], example_inputs=X)
    first = prune_stages(mlp(), BATCHES, F.mse_loss, [units], example_inputs=X)
    for name, gone in first.plan.removed.items():
        assert torch.equal(result.plan.removed[name], gone)
    assert {n: {d: r.tolist() for d, r in k.items()} for n, k in result.plan.kept.items()} == {
        n: {d: r.tolist() for d, r in k.items()} for n, k in first.plan.kept.items()
    }
    model = copy.deepcopy(first.masked)
    plan = by_hand(model, result.counts, {}, first.plan)
    assert same_masks(result, {**first.plan.masks, **plan.masks})
    assert same(result.masked, model)
    assert result.plan.granularity == ("neuron", "weight")
    sc.verify(result.masked, result.model, result.plan, X)
    small = result.model.get_parameter("2.weight")
    assert small.shape == (8, 12)
    assert int((small != 0).sum()) == result.counts.kept["2.weight"] < small.numel()


def test_weights_first_and_structure_of_what_is_left() -> None:
    stages = [
        Stage(HALF, granularity="weight", layerwise=LayerwiseCut("wanda"), finetune=HEAL),
        Stage(Budget(units=0.5), schedule=Schedule("one_shot", 1)),
    ]
    result = prune_stages(mlp(), BATCHES, F.mse_loss, stages, example_inputs=X)
    first = run(layerwise=LayerwiseCut("wanda"), finetune=HEAL)
    for name, mask in first.plan.masks.items():
        assert not (result.plan.masks[name] & ~mask).any()
    sc.verify(result.masked, result.model, result.plan, X)


def test_sparsegpt_loses_less_than_magnitude_and_what_was_won_is_told() -> None:
    lost = {}
    for method in ("sparsegpt", "magnitude"):
        result = run(layerwise=LayerwiseCut(method), evaluate=loss_of, maximize=False)
        lost[method] = loss_of(result.model)
        note = next(n for n in result.report.notes if n.startswith("after cut 1"))
        found = re.fullmatch(
            rf"after cut 1: pruned by {method}: error 0 -> [\d.]+, outputs 0 -> [\d.]+, "
            r"metric 0 -> ([\d.]+) \(64 samples, s\)",
            timeless(note),
        )
        assert found is not None, note
        assert float(found[1]) == pytest.approx(lost[method], rel=1e-3)
        assert sum(n.startswith("2.weight: error ") for n in result.report.notes) == 1
    assert lost["sparsegpt"] < lost["magnitude"]
    reason = result.plan.reasons["0.weight"]
    assert reason == "72 of 144 weight units removed layer by layer: magnitude, budget units=0.5"


# --- what cannot be seen -------------------------------------------------------------------------


class Odd(nn.Module):
    """Two layers that share a weight, a weight of no layer, a recurrent layer of two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.free = nn.Parameter(torch.randn(6, 6))
        self.deep = nn.GRU(6, 6, num_layers=2, batch_first=True)
        self.plain = nn.Linear(6, 20)
        self.head = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(torch.relu(self.first(x))) @ self.free
        out: Tensor = self.head(torch.relu(self.plain(self.deep(x[:, None])[0][:, 0])))
        return out


def odd() -> nn.Module:
    torch.manual_seed(0)
    return Odd().eval()


def test_what_it_cannot_see_is_left_whole_and_named() -> None:
    result = run(odd())
    whole = {e.name: e.reason for e in result.report.excluded if e.reason.startswith("layerwise")}
    assert whole == {
        "first.weight": "layerwise: tied to tied.weight, which reads other inputs",
        **dict.fromkeys(
            ("free", *(f"deep.weight_{w}_l{i}" for w in ("ih", "hh") for i in (0, 1))),
            "layerwise: no layer whose inputs can be seen",
        ),
    }
    assert result.counts.kept == {"plain.weight": 60, "head.weight": 20}
    assert result.plan.masks.keys() == result.counts.kept.keys()
    for name in whole:
        assert torch.equal(result.masked.get_parameter(name), odd().get_parameter(name))


def test_a_module_that_is_not_called_is_left_whole() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.hooked, self.idle = mlp(), nn.Linear(2, 2), nn.Linear(2, 2)
            self.hooked.register_forward_hook(lambda m, args, out: out.square())

        def forward(self, x: Tensor) -> Tensor:
            x = self.hooked(self.used(x))
            out: Tensor = F.linear(x, self.idle.weight)  # used, but not by its module
            return out

    torch.manual_seed(0)
    result = run(Idle().eval())
    whole = {e.name: e.reason for e in result.report.excluded if e.reason.startswith("layerwise")}
    assert whole == {
        "hooked.weight": "layerwise: its module does more than multiply and add",
        "idle.weight": "layerwise: its module is not called in the first batch",
    }
    assert set(result.counts.kept) == {f"used.{i}.weight" for i in (0, 2, 4)}


def test_a_budget_that_what_is_left_whole_forbids() -> None:
    with pytest.raises(BudgetError, match=r"remain when every.*layerwise leaves whole: .*free \("):
        run(odd(), budget=Budget(params=0.3))
    result = run(odd(), budget=Budget(params=0.3), allow_missed=True)
    assert not result.report.met
    assert set(result.counts.kept.values()) == {1}
    with pytest.raises(BudgetError) as caught:  # nothing is left whole by nature
        run(budget=Budget(params=0.05))
    assert "layerwise leaves" not in str(caught.value)
    with pytest.raises(BudgetError, match="removes nothing"):
        run(budget=Budget(units=1.0))


def test_what_it_looks_at_is_the_calibration_data(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def whole_weights(model: nn.Module, batches: Any) -> dict[str, str]:
        seen.append(batches)
        return {"0.weight": "because"}

    monkeypatch.setattr("secateurs.pipeline.seeing.whole_weights", whole_weights)
    others = said(mlp())
    result = run(calibration=others)
    run()
    assert seen == [others, BATCHES]
    assert set(result.counts.kept) == {"2.weight", "4.weight"}
    assert result.report.excluded[-1] == Exclusion("0.weight", "layerwise: because")
    stages = [Stage(HALF, granularity="weight", criterion="magnitude")]
    plain = prune_stages(mlp(), BATCHES, F.mse_loss, stages, example_inputs=X)
    assert set(plain.counts.kept) == {"0.weight", "2.weight", "4.weight"}
    assert len(seen) == 2


def test_a_model_that_it_cannot_see_at_all() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free = nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.free

    with pytest.raises(ConfigError, match=r"can see no layer.*\n  free: no layer whose inputs"):
        run(Free())


def test_include_and_exclude_hold() -> None:
    result = run(exclude="2")
    assert result.plan.masks.keys() == result.counts.kept.keys() == {"0.weight", "4.weight"}
    assert torch.equal(result.masked.get_parameter("2.weight"), mlp().get_parameter("2.weight"))


def test_other_options_of_an_allocation_hold() -> None:
    assert min(run(budget=Budget(units=0.1)).counts.kept.values()) == 3
    few = run(budget=Budget(units=0.1), min_keep=10)
    assert few.counts.kept["4.weight"] == 10
    assert sum(few.counts.kept.values()) == 56
    rounded = run(round_to=8)
    assert {kept % 8 for kept in rounded.counts.kept.values()} == {0}


# --- guards, controls, repairs, masks that move --------------------------------------------------


def test_the_guard_restores_what_had_made_up_for_others() -> None:
    """SparseGPT changes weights that stay: going back must bring these, too."""
    seen: list[tuple[float, dict[str, Tensor]]] = []

    def evaluate(model: nn.Module) -> float:
        alive = float(sum(int((p != 0).sum()) for n, p in model.named_parameters() if "w" in n))
        seen.append((alive, copy.deepcopy(model.state_dict())))
        return alive

    limit = 200.0  # of 560: the steps are 420, 350 too much
    result = run(
        budget=Budget(units=0.25), schedule=Schedule("linear", 3), evaluate=evaluate,
        max_drop=limit,
    )  # fmt: skip
    assert [row.rolled_back for row in result.report.steps] == [False, True]
    kept = next(state for alive, state in seen if alive == 420)
    assert all(torch.equal(result.masked.state_dict()[n], w) for n, w in kept.items())
    assert int(sum(int(m.sum()) for m in result.plan.masks.values())) == 420
    whole = mlp().state_dict()
    mask = result.plan.masks["2.weight"]
    assert not torch.equal(kept["2.weight"][mask], whole["2.weight"][mask])
    with pytest.raises(BudgetError, match="nothing can be cut"):
        run(evaluate=evaluate, max_drop=1.0)


def test_as_small_as_a_limit_on_the_metric_allows() -> None:
    calls: dict[str, Any] = {"evaluate": loss_of, "maximize": False}
    result = run(budget=Budget(metric_drop=0.05), **calls)
    assert loss_of(result.masked) <= 0.05
    assert any(row.rolled_back for row in result.report.steps)
    kept = sum(result.counts.kept.values())
    assert 0 < kept < 560
    for name, count in result.counts.kept.items():
        assert int((result.masked.get_parameter(name) != 0).sum()) == count
    magnitude = run(
        budget=Budget(metric_drop=0.05), layerwise=None, criterion="magnitude", **calls
    )  # fmt: skip
    assert kept < sum(magnitude.counts.kept.values())
    both = run(budget=Budget(units=0.6, metric_drop=10.0), **calls)
    assert sum(both.counts.kept.values()) == 336
    auto = run(budget="auto", evaluate=lambda m: 1 / (1 + loss_of(m)))
    assert auto.report.met
    assert 1 / (1 + loss_of(auto.masked)) >= 0.99


def test_fresh_weights_under_the_same_masks() -> None:
    plain, fresh = run(finetune=HEAL), run(control="reinit", finetune=HEAL)
    assert same_masks(fresh, plain.plan.masks)
    assert not same(fresh.masked, plain.masked)
    check_masks(fresh.masked, fresh.plan.masks)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_repairs_follow_the_cut(method: Any) -> None:
    how = LayerwiseCut(method)
    plain, mended = run(layerwise=how), run(layerwise=how, repair=("reconstruct",))
    assert same_masks(mended, plain.plan.masks)
    model = copy.deepcopy(plain.masked)
    reconstruct(model, mlp(), plain.plan, BATCHES)
    assert same(mended.masked, model)
    assert not same(mended.masked, plain.masked)
    normed = run(mlp(norm=True), layerwise=how, repair=("norms",))
    assert any("norms measured again" in note for note in normed.report.notes)
    if method == "wanda":
        moved, model = run(layerwise=how, repair=("bias",)), copy.deepcopy(plain.masked)
        compensate_bias(model, mlp(), plain.plan, BATCHES)
        assert same(moved.masked, model)


@pytest.mark.parametrize(("method", "rule"), [("sparsegpt", "set"), ("wanda", "dpf")])
def test_masks_may_move_afterwards(method: Any, rule: str) -> None:
    how: dict[str, Any] = {
        "layerwise": LayerwiseCut(method),
        "finetune": Finetune(epochs=3, lr=0.05),
    }
    cut = run(layerwise=LayerwiseCut(method))
    result = run(regrow=Regrow(rule, every=2), **how)
    assert any("masks moved" in note for note in result.report.notes)
    assert not same_masks(result, cut.plan.masks)
    for name, count in cut.counts.kept.items():
        assert int(result.plan.masks[name].sum()) == count
    check_masks(result.masked, result.plan.masks)


def test_training_before_the_cut() -> None:
    prepare = Finetune(epochs=1, lr=0.05)
    result = run(prepare=prepare)
    model = mlp()
    finetune(model, BATCHES, F.mse_loss, prepare, seed=500_000)
    by_hand(model, result.counts, {})
    assert same(result.masked, model)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "structured"}, "needs granularity='weight'"),
        ({"granularity": ("weight", "neuron"), "budget": Budget(params=0.5)},
         "needs granularity='weight'"),
        ({"budget": None, "threshold": Threshold("mean")}, "a threshold gives none: give a budget"),
        ({"budget": Budget(macs=0.5)}, "save no dense multiply-adds.*Use params="),
        ({"budget": Budget(latency_ms=1.0)}, "save no time.*Use params="),
        ({"criterion": "magnitude"}, "criterion='magnitude': layerwise chooses weights without it, "
         r"and allocation='uniform' goes by sizes: leave it away, or .*\(.*global, .*\)"),
        ({"criterion": "magnitude", "allocation": "erk"}, "allocation='erk' goes by sizes"),
        ({"schedule": Schedule("linear", 2, rescore=False)}, "nothing is scored: leave rescore"),
        ({"schedule": Schedule("linear", 2, every="2 steps"), "finetune": HEAL},
         "cuts inside one: leave every away"),
        *(({"control": control, "allocation": "global"}, f"control='{control}' changes scores")
          for control in ("random", "shuffle", "invert", "random-labels")),
        ({"repair": ("bias",)}, "leave bias away, or take method='wanda'"),
        ({"regrow": Regrow("dpf"), "finetune": HEAL}, "Regrow\\('dpf'\\) brings weights back"),
        ({"regrow": Regrow("dns"), "finetune": HEAL}, "take 'rigl' or 'set', or method='wanda'"),
        ({"penalty": sc.Penalty(), "prepare": HEAL}, "only single weights are pruned"),
        ({"at_init": AtInit()}, "at_init= decides the whole cut and does not read layerwise"),
        ({"ticket": TicketSearch(), "finetune": HEAL}, "ticket= decides.*not read layerwise"),
        ({"fisher_masks": FisherSearch(), "granularity": "structured"}, "not read layerwise"),
        ({"layerwise": "wanda"}, "must be a LayerwiseCut, as in LayerwiseCut"),
        ({"layerwise": {"method": "wanda"}}, "must be a LayerwiseCut, as in LayerwiseCut"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_what_is_refused_is_said_before_the_layers_are_pruned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "prune_to_counts", None)
    for budget, message in ((Budget(units=1.0), "removes nothing"), (Budget(units=2), "at least")):
        with pytest.raises(BudgetError, match=message):
            run(budget=budget)
    with pytest.raises(TypeError):
        run()


def test_a_budget_that_is_met_already(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [
        Stage(Budget(units=n), granularity="weight", layerwise=LayerwiseCut()) for n in (0.3, 0.5)
    ]
    result = prune_stages(mlp(), BATCHES, F.mse_loss, stages, example_inputs=X)
    assert same(result.masked, run(budget=Budget(units=0.3)).masked)
    assert "stage 2 removed nothing: Budget(units=0.5) was met before it" in result.report.notes
    assert sum("pruned by" in note for note in result.report.notes) == 1
    monkeypatch.setattr("secateurs.pipeline.request._check_reachable", lambda *_: None)
    with pytest.raises(BudgetError, match="removes nothing: all layers stay whole"):
        run(budget=Budget(units=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sparsegtp"}, "Did you mean 'sparsegpt'"),
        ({"block": 0}, "block must be a whole number, at least 1, got 0"),
        ({"block": True}, "block must be a whole number"),
        ({"damping": 0.0}, "damping must be a number above 0, got 0.0"),
        ({"damping": "1"}, "damping must be a number above 0, got '1'"),
        ({"method": "wanda", "block": 64}, "block= is of method='sparsegpt', and method='wanda'"),
        ({"method": "magnitude", "damping": 0.5}, "damping= is of method='sparsegpt'"),
    ],
)
def test_options_are_those_of_prune_layerwise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerwiseCut(**options)
    model = mlp()
    with pytest.raises(ConfigError, match=message):
        prune_layerwise(model, [], density=0.5, **options)  # before the batches are looked at
    assert same(model, mlp())


def test_what_the_registry_says_of_scores_is_so() -> None:
    """Allocations by size give the same counts whatever the scores; all others may not."""
    graph = sc.trace(mlp(), X)
    draw = torch.Generator().manual_seed(0)
    lines = {n: torch.rand(t.n_units, generator=draw) for n, t in graph.targets.items()}
    lines = {n: line for n, line in lines.items() if graph.targets[n].kind == "weight"}
    lines["2.weight"] *= 10
    scores = replace(blank(graph), values=lines, criterion="mine")
    for method in set(ALLOCATORS) - {"sensitivity"}:  # that ranks cuts by scores
        mine = allocate(scores, HALF, method=method).kept
        none = allocate(blank(graph), HALF, method=method).kept
        assert (mine == none) == (method in BY_SIZE), method
    assert {"uniform", "uniform_plus", "erk"} == BY_SIZE
