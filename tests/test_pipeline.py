"""`prune` and `prune_stages`: what they promise, and that a failure leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs import selection
from secateurs.errors import (
    BudgetError,
    CaptureError,
    ConfigError,
    DataError,
    PruningError,
    ScoringError,
)
from secateurs.finetuning import Finetune, loop
from secateurs.masks import check_masks, hold_masks
from secateurs.pipeline import PruneResult, Stage, prune, prune_stages
from secateurs.pipeline import run as run_room
from secateurs.schedules import Schedule
from secateurs.surgery import load
from secateurs.surgery.shrinking import info_of
from secateurs.types import Batch, Budget, Counts, Threshold


class Net(nn.Module):
    """4 -> 16 -> 8 -> 2, with a batch norm (buffers) and dropout (randomness)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(16, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.first(x)).relu())
        out: Tensor = self.last(self.second(hidden).relu())
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def data(n: int = 64, size: int = 16) -> list[Batch]:
    """Two classes that a line separates."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] + x[:, 1] > 0).long()
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True))


def accuracy(model: nn.Module) -> float:
    hits = [float((model(x).argmax(1) == y).float().mean()) for x, y in data()]
    return sum(hits) / len(hits)


BATCHES = data()
X = BATCHES[0][0]
HALF = Budget(units=0.5)
QUICK = Schedule("linear", steps=2)
HEAL = Finetune(epochs=1, lr=0.01)


def run(model: nn.Module | None = None, batches: Any = BATCHES, **options: Any) -> PruneResult:
    """`prune` with defaults for everything that a test does not care about."""
    loss_fn = options.pop("loss_fn", F.cross_entropy)
    if not {"budget", "threshold"} & set(options):
        options["budget"] = HALF
    if "budget" in options:
        options.setdefault("schedule", QUICK)
    return prune(
        model or net(), batches, loss_fn, **{"example_inputs": X, "finetune": HEAL, **options}
    )


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit the same weights and buffers."""
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


# --- the model that comes in stays as it was -----------------------------------------------------


def marked() -> Net:
    """A model with everything that must survive: gradients, mixed modes, a frozen part, a hook."""
    model = net().train()
    model.norm.eval()
    model.second.bias.requires_grad_(False)
    for i, p in enumerate(model.parameters()):
        if p.requires_grad:
            p.grad = torch.full_like(p, float(i))
    model.second.register_forward_hook(lambda *_: None)
    return model


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a caller could miss."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "identity": [id(p) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [[len(getattr(m, h)) for h in hooks] for m in model.modules()],
        "tensor_hooks": [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def changes(before: dict[str, Any], model: nn.Module) -> list[str]:
    now = state_of(model)
    return [name for name in before if not equal(before[name], now[name])]


def _tamper_weight(model: Net) -> None:
    with torch.no_grad():
        model.first.weight.add_(1)


@pytest.mark.parametrize(
    ("tamper", "name"),
    [
        (_tamper_weight, "tensors"),
        (lambda m: setattr(m.first.weight, "grad", None), "grads"),
        (lambda m: m.norm.train(), "modes"),
        (lambda m: m.first.weight.requires_grad_(False), "requires_grad"),
        (lambda m: m.first.register_forward_hook(lambda *_: None), "hooks"),
        (lambda m: torch.rand(1), "random"),
    ],
)
def test_the_comparison_notices_every_kind_of_change(tamper: Any, name: str) -> None:
    model = marked()
    before = state_of(model)
    assert changes(before, model) == []
    tamper(model)
    assert changes(before, model) == [name]


class Refuses(nn.Module):
    """Returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> str:
        return f"{self.layer(x).sum()}"


def _late_bad_label() -> list[Batch]:
    (x, y), *rest = data()
    return [(x, y), *rest[:-1], (rest[-1][0], rest[-1][1] + 7)]


def _one_shot() -> Iterator[Batch]:
    yield from data()


class Exhausted:
    """Looks re-iterable, but hands out one generator."""

    def __init__(self) -> None:
        self.source = _one_shot()

    def __iter__(self) -> Iterator[Batch]:
        return self.source


def _nan_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) * float("nan")


BEFORE_SCORING: dict[str, tuple[dict[str, Any], type[PruningError], str]] = {
    "budget as a number": ({"budget": 0.5}, ConfigError, r"as in Budget\(macs=0.5\); got 0.5"),
    "budget of everything": ({"budget": Budget(macs=1.0)}, BudgetError, "removes nothing"),
    "budget too small": ({"budget": Budget(macs=1)}, BudgetError, "allows 1 of"),
    "neither budget nor threshold": ({"budget": None}, ConfigError, "exactly one of budget"),
    "both": ({"threshold": Threshold("mean"), "budget": HALF}, ConfigError, "exactly one of"),
    "criterion": ({"criterion": "tailor"}, ConfigError, "Did you mean 'taylor'"),
    "criterion option": (
        {"criterion": {"name": "taylor", "finsh": "abs"}}, ConfigError, "Did you mean 'finish'",
    ),
    "criterion for weights": (
        {"criterion": "activation_mean", "granularity": "weight"}, ConfigError, "can score nothing",
    ),
    "granularity": ({"granularity": "chanel"}, ConfigError, "Did you mean 'channel'"),
    "granularity not there": ({"granularity": "head"}, ConfigError, "it has neuron, weight"),
    "allocation": ({"allocation": "unifrm"}, ConfigError, "Did you mean 'uniform'"),
    "allocation of a threshold": (
        {"threshold": Threshold("mean"), "allocation": "global"}, ConfigError, "distributes a",
    ),
    "control": ({"control": "rndom"}, ConfigError, "Did you mean 'random'"),
    "control without effect": (
        {"control": "random-labels", "criterion": "magnitude"}, ConfigError, "changes nothing",
    ),
    "control of a threshold": (
        {"control": "random", "threshold": Threshold("mean")}, ConfigError, "use a budget",
    ),
    "form": ({"form": "modul"}, ConfigError, "Did you mean 'module'"),
    "option": ({"shedule": QUICK}, ConfigError, "Did you mean 'schedule'"),
    "min_keep": ({"min_keep": 0}, ConfigError, "min_keep must be a whole number"),
    "round_to": ({"round_to": 2.0}, ConfigError, "round_to must be a whole number"),
    "round_to kind": ({"round_to": {"neurn": 8}}, ConfigError, "Did you mean 'neuron'"),
    "homogeneous": ({"homogeneous": "yes"}, ConfigError, "homogeneous must be True or False"),
    "exclude": ({"exclude": ["first", "secnd"]}, ConfigError, "Did you mean 'second'"),
    "exclude everything": ({"exclude": "*"}, ConfigError, "leave no target"),
    "include the output": ({"include": "last:neuron"}, ConfigError, "part of the model's output"),
    "seed": ({"seed": -1}, ConfigError, "seed must be"),
    "latency": ({"latency": [0]}, ConfigError, "at least 1"),
    "latency number": ({"latency": 4}, ConfigError, "list of batch sizes"),
    "schedule": ({"schedule": 5}, ConfigError, "schedule must be a Schedule"),
    "finetune": ({"finetune": {"epochs": 1}}, ConfigError, "finetune must be a Finetune"),
    "patience": ({"finetune": Finetune(epochs=1, patience=1)}, ConfigError, "need evaluate"),
    "loss no function": ({"loss_fn": "mse"}, ConfigError, "loss_fn must be a function"),
    "evaluate no function": ({"evaluate": 0.9}, ConfigError, "evaluate must be a function"),
    "loss vector": (
        {"loss_fn": lambda o, t: F.cross_entropy(o, t, reduction="none")}, ScoringError,
        r"scalar tensor, got shape \(16,\)",
    ),
    "loss float": ({"loss_fn": lambda o, t: 1.0}, ScoringError, "scalar tensor, got float"),
    "loss nan": ({"loss_fn": _nan_loss}, ScoringError, "the loss is nan"),
    "labels": ({"batches": [(X, torch.full((16,), 7))]}, DataError, "out of bounds"),
    "labels missing": ({"batches": [X]}, DataError, "expected a pair"),
    "empty": ({"batches": []}, DataError, "batches is empty"),
    "generator": ({"batches": _one_shot()}, DataError, "read only once"),
    "not batches": ({"batches": 5}, DataError, "batches is a int"),
    "empty calibration": ({"calibration": []}, DataError, "batches is empty"),
    "wrong shape": (
        {"batches": [(X[:, :2], torch.zeros(16).long())]}, CaptureError, "refuses the inputs",
    ),
    "example inputs": ({"example_inputs": X[:, :2]}, CaptureError, "refuses example_inputs"),
    "no example inputs": ({"example_inputs": None}, CaptureError, "refuses example_inputs"),
    "evaluate raises": ({"evaluate": lambda m: 1 // 0}, ScoringError, "ZeroDivisionError"),
    "evaluate None": ({"evaluate": lambda m: None}, ScoringError, "metric = None"),
    "evaluate text": ({"evaluate": lambda m: "0.9"}, ScoringError, "metric = '0.9'"),
    "evaluate nan": ({"evaluate": lambda m: {"auc": float("nan")}}, ScoringError, "auc = nan"),
    "evaluate vector": ({"evaluate": lambda m: torch.ones(2)}, ScoringError, "finite number"),
    "evaluate {}": ({"evaluate": lambda m: {}}, ConfigError, "empty dict"),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_SCORING)
def test_bad_input_is_an_error_before_anything_expensive(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*_: Any, **__: Any) -> None:
        raise AssertionError("scoring has begun")

    monkeypatch.setattr(run_room, "score", score)
    options, kind, text = BEFORE_SCORING[case]
    model = marked()
    before = state_of(model)
    with pytest.raises(kind, match=text):
        run(model, **options)
    assert changes(before, model) == []


def _raise(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


def _fails_at(n: int, error: BaseException) -> Callable[[nn.Module], float]:
    """An `evaluate` that fails at its n-th call."""
    calls = []

    def evaluate(_: nn.Module) -> float:
        calls.append(1)
        if len(calls) == n:
            raise error
        return 0.5

    return evaluate


LATER: dict[str, tuple[dict[str, Any], type[BaseException], str]] = {
    "threshold above everything": (
        {"threshold": Threshold("value", value=1e9)}, BudgetError, "would leave too little",
    ),
    "threshold below everything": (
        {"threshold": Threshold("value", value=-1.0)}, BudgetError, "removes nothing",
    ),
    "a label of a later batch": ({"batches": _late_bad_label()}, DataError, "batch 3"),
    "exhausted": ({"batches": Exhausted()}, DataError, "batches is empty"),
    "no gradient": (
        {"loss_fn": lambda o, t: F.cross_entropy(o.detach(), t)}, ScoringError, "does not depend",
    ),
    "diverging": ({"finetune": Finetune(steps=20, lr=1e30)}, ScoringError, "smaller lr"),
    "evaluate after a cut": ({"evaluate": _fails_at(2, OSError("disk"))}, ScoringError, "disk"),
    "Ctrl-C in evaluate": (
        {"evaluate": _fails_at(4, KeyboardInterrupt("now"))}, KeyboardInterrupt, "now",
    ),
    "Ctrl-C in progress": (
        {"progress": _raise(KeyboardInterrupt("now"))}, KeyboardInterrupt, "now",
    ),
    "test raises": ({"test": _raise(OSError("no file"))}, ScoringError, "no file"),
    "graph form": ({"form": "graph", "test": _raise(OSError("late"))}, ScoringError, "late"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_a_later_failure_leaves_the_model_unchanged_too(case: str) -> None:
    options, kind, text = LATER[case]
    model = marked()
    before = state_of(model)
    with pytest.raises(kind, match=text):
        run(model, **options)
    assert changes(before, model) == []


@pytest.mark.parametrize("form", ["module", "graph"])
def test_success_leaves_the_model_unchanged(form: str) -> None:
    model = marked()
    before = state_of(model)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*BATCHES, strict=True))),
        batch_size=16,
        shuffle=True,  # draws from the global random state each time it is iterated
    )
    result = run(model, loader, form=form, evaluate=accuracy, latency=[2])
    assert changes(before, model) == []
    assert not same_state(result.masked, model)


def test_no_model_output_and_what_is_no_model() -> None:
    with pytest.raises(CaptureError, match="returns str, no tensor"):
        run(Refuses())
    with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, got function"):
        prune(net, BATCHES, F.cross_entropy, example_inputs=X, budget=HALF)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no stage"):
        prune_stages(net(), BATCHES, F.cross_entropy, [], example_inputs=X)


def test_a_model_that_cannot_be_copied() -> None:
    model = net()
    model.extra = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(CaptureError, match="must be copyable"):
        run(model)


def test_a_model_in_which_nothing_can_be_pruned_names_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"nothing of granularity.*part of the model's output"):
        run(nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(ConfigError, match=r"it has no prunable part$"):
        run(nn.Sequential(nn.ReLU()), finetune=None)


def test_the_second_stage_is_checked_before_the_first_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_room, "score", _raise(AssertionError("scoring has begun")))
    first = Stage(HALF, finetune=HEAL)
    for second, text in [
        (Stage(Budget(macs=1)), "allows 1 of"),
        (Stage(HALF, granularity="head"), "it has neuron"),
        (Stage(HALF, granularity="weight", criterion="activation_mean"), "can score nothing"),
        (Stage(HALF, finetune=Finetune(epochs=1, restore_best=True)), "need evaluate"),
    ]:
        with pytest.raises(PruningError, match=text):
            prune_stages(net(), BATCHES, F.cross_entropy, [first, second], example_inputs=X)


def test_a_learning_rate_schedule_needs_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def __iter__(self) -> Iterator[Batch]:
            return iter(data())

    config = Finetune(epochs=1, lr_schedule="cosine")
    with monkeypatch.context() as patch:
        patch.setattr(run_room, "score", _raise(AssertionError("scoring has begun")))
        with pytest.raises(ConfigError, match="have no length"):
            run(batches=Endless(), finetune=config)
    assert run(batches=Endless(), finetune=Finetune(steps=2, lr_schedule="cosine")).history


# --- the same run twice --------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_model_whatever_the_global_state() -> None:
    loader: Any = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*BATCHES, strict=True))),
        batch_size=16,
        shuffle=True,
    )
    found = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        model = net()
        torch.manual_seed(noise)
        found.append(run(model, loader, seed=seed))
    first, second, other = found
    assert same_state(first.model, second.model)
    assert all(torch.equal(first.plan.masks[k], m) for k, m in second.plan.masks.items())
    assert first.report.steps == second.report.steps
    assert not same_state(first.masked, other.masked)  # dropout and order differ


# --- schedules and budgets -----------------------------------------------------------------------


def spied(
    monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[PruneResult, list[dict[str, set[int]]], list[Counts]]:
    """A run with the units removed after every step, and the counts."""
    removed: list[dict[str, set[int]]] = []
    all_counts: list[Counts] = []
    select = selection.select

    def spy(scores: Any, counts: Counts, **kwargs: Any) -> Any:
        plan = select(scores, counts, **kwargs)
        removed.append({k: set(v.tolist()) for k, v in plan.removed.items()})
        all_counts.append(counts)
        return plan

    monkeypatch.setattr(run_room, "select", spy)
    return run(**options), removed, all_counts


@pytest.mark.parametrize(
    "options",
    [
        {"budget": Budget(units=0.25)},
        {"budget": Budget(macs=0.3), "allocation": "global"},
        {"budget": Budget(params=0.3), "criterion": "random"},
        {"budget": Budget(units=0.2), "granularity": "weight", "allocation": "global_normalized"},
        {"threshold": Threshold("mean"), "granularity": "weight"},
    ],
    ids=str,
)
def test_each_step_keeps_less_and_removed_units_never_come_back(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options["schedule"] = Schedule("cubic", steps=4)
    result, removed, _ = spied(monkeypatch, **options)
    assert len(removed) == len(result.report.steps) == 4
    for earlier, later in pairwise(removed):
        assert all(units <= later[name] for name, units in earlier.items())
    for name in ("units", "params"):
        line = [step.remaining[name] or 0 for step in result.report.steps]
        assert line == sorted(line, reverse=True)
        assert line[-1] < line[0] < 1
    check_masks(result.masked, result.plan.masks)


def cost(h1: int, h2: int) -> dict[str, int]:
    """Parameters, multiply-adds and units of a 3 -> h1 -> h2 -> 2 network, by hand."""
    return {
        "params": 3 * h1 + h1 + h1 * h2 + h2 + h2 * 2 + 2,
        "macs": 3 * h1 + h1 * h2 + h2 * 2,
        "units": h1 + h2,
    }


@pytest.mark.parametrize("quantity", ["params", "macs", "units"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("amount", [0.9, 0.61, 0.4, 0.25, 20])
def test_a_budget_is_kept_and_used_up_to_one_unit(
    quantity: str, allocation: str, amount: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
    dense = cost(7, 5)[quantity]
    if amount == 20 and quantity == "units":
        amount = 6
    limit = amount * dense if isinstance(amount, float) else amount
    batch = [(torch.randn(8, 3), torch.arange(8) % 2)]
    result = prune(
        model, batch, F.cross_entropy, example_inputs=batch[0][0], allocation=allocation,
        budget=Budget(**{quantity: amount}), schedule=QUICK,
    )  # fmt: skip
    h1, h2 = result.model[0].out_features, result.model[2].out_features  # type: ignore[index]
    assert result.report.reached[quantity] == pytest.approx(cost(h1, h2)[quantity] / dense)
    assert sum(p.numel() for p in result.model.parameters()) == cost(h1, h2)["params"]
    assert cost(h1, h2)[quantity] <= limit
    bigger = [cost(h1 + 1, h2)] * (h1 < 7) + [cost(h1, h2 + 1)] * (h2 < 5)
    assert bigger
    assert all(c[quantity] > limit for c in bigger)


def test_a_threshold_is_applied_again_to_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without training magnitudes stay, so each step removes what is below the mean of the rest."""
    first, last = nn.Linear(2, 8, bias=False), nn.Linear(8, 2)
    model = nn.Sequential(first, nn.ReLU(), last)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([1.0, 1, 1, 1, 2, 2, 4, 8])[:, None].expand(8, 2))
        last.weight.fill_(1.0)
    batch = [(torch.randn(8, 2), torch.arange(8) % 2)]
    result = prune(
        model, batch, F.cross_entropy, example_inputs=batch[0][0], threshold=Threshold("mean"),
        criterion="magnitude", schedule=Schedule("linear", steps=3),
    )  # fmt: skip
    # mean of all 2.5 -> {4, 8}; mean of those 6 -> {8}; the mean of one is itself
    assert [s.remaining["units"] for s in result.report.steps] == [2 / 8, 1 / 8, 1 / 8]
    assert [s.fraction for s in result.report.steps] == [None] * 3
    assert result.plan.removed["0:neuron"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert result.report.met


def test_a_threshold_that_becomes_too_high_stops_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing that was trained is lost when the scores fall under a fixed threshold later."""
    finetune = loop.finetune

    def shrinking(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        done = finetune(model, *args, **kwargs)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.01)
        return done

    monkeypatch.setattr(run_room, "finetune", shrinking)
    result = run(
        threshold=Threshold("value", value=0.05), criterion="magnitude", granularity="weight",
        schedule=Schedule("linear", steps=3),
    )  # fmt: skip
    assert not result.report.met
    assert len(result.report.steps) == 1
    (note,) = [n for n in result.report.notes if n.startswith("stopped after step 1 of 3")]
    assert "would leave too little" in note
    check_masks(result.masked, result.plan.masks)


def test_a_stage_without_effect_is_noted() -> None:
    stages = [Stage(Budget(units=0.3), schedule=QUICK), Stage(Budget(units=0.9), schedule=QUICK)]
    result = prune_stages(net(), BATCHES, F.cross_entropy, stages, example_inputs=X)
    assert "stage 2 removed nothing: Budget(units=0.9) was met before it" in result.report.notes


# --- weights, then structure ---------------------------------------------------------------------


def test_weight_masks_survive_inside_the_structure_that_is_kept() -> None:
    stages = [
        Stage(Budget(units=0.5), granularity="weight", criterion="magnitude", schedule=QUICK,
              finetune=HEAL, allocation="global"),
        Stage(Budget(units=0.5), granularity="neuron", schedule=QUICK, finetune=HEAL),
    ]  # fmt: skip
    model = net()
    first = prune_stages(model, BATCHES, F.cross_entropy, stages[:1], example_inputs=X)
    both = prune_stages(model, BATCHES, F.cross_entropy, stages, example_inputs=X)
    kept = both.plan.kept["second.weight"]
    assert (len(kept[0]), len(kept[1])) == (4, 8)
    inside = first.plan.masks["second.weight"][kept[0]][:, kept[1]]
    small = both.model.get_parameter("second.weight")
    assert small.shape == (4, 8)
    assert 0 < int((~inside).sum()) < inside.numel()
    assert (small[~inside] == 0).all()
    assert torch.equal(both.masks["second.weight"], inside)
    check_masks(both.model, both.masks)
    assert len(both.report.steps) == 4
    assert both.report.asked.keys() == {"stage 1", "stage 2"}


@pytest.mark.parametrize("form", ["module", "graph"])
def test_masks_go_on_holding_after_shrink(form: str) -> None:
    stages = [Stage(HALF, granularity="weight"), Stage(HALF)]
    result = prune_stages(net(), BATCHES, F.cross_entropy, stages, example_inputs=X, form=form)
    assert info_of(result.model).form == form
    assert result.masks
    model = result.model.train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    with hold_masks(model, sgd, result.masks):
        for x, y in BATCHES:
            sgd.zero_grad()
            loss: Any = F.cross_entropy(model(x), y)
            loss.backward()
            sgd.step()
    check_masks(model, result.masks)
    assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_weights_by_a_parameter_budget(tmp_path: Path) -> None:
    model = net()
    result = run(model, granularity="weight", budget=Budget(params=0.3))
    total = sum(p.numel() for p in model.parameters())
    left = sum(int((p != 0).sum()) for p in result.model.parameters())
    assert left <= 0.3 * total < left + 1 + sum(int((p == 0).sum()) for p in model.parameters())
    for name, mask in result.plan.masks.items():
        assert (result.model.get_parameter(name)[~mask] == 0).all()
    rows = {r.name: r for r in result.report.rows}
    assert rows["non-zeros"].after == left
    assert rows["parameters"].after == total
    assert (rows["bytes on disk"].after or 0) < (rows["bytes on disk"].before or 0)


def test_a_weight_run_is_smaller_on_disk_by_the_number_it_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    result = run(model, granularity="weight", budget=Budget(units=0.1), finetune=None)
    rows = {r.name: r for r in result.report.rows}
    out = result.save(tmp_path / "out")
    size = (out / "model.safetensors").stat().st_size
    assert rows["bytes on disk"].after == size
    assert size < 0.4 * (rows["bytes on disk"].before or 0)
    again = load(out, lambda: copy.deepcopy(model))
    assert same_state(again, result.model)


def test_saving(tmp_path: Path) -> None:
    result = run()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        result.save(tmp_path / "file")
    out = result.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors", "plan.json", "report.json", "report.html"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="already holds"):
        result.save(out)
    result.save(out, force=True)
    assert same_state(load(out, net), result.model)


# --- mode, metrics, form -------------------------------------------------------------------------


def test_the_result_has_the_mode_of_each_module() -> None:
    model = net().train()
    model.norm.eval()
    small = run(model, form="module").model
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert run(model, form="graph").model.training
    assert not run(net(), form="graph").model.training


def test_the_test_split_is_touched_once_for_each_model_and_last() -> None:
    calls: list[str] = []
    seen: list[nn.Module] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        calls.append("validation")
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        return {"accuracy": accuracy(model), "other": 1.0}

    def test(model: nn.Module) -> float:
        calls.append("test")
        seen.append(model)
        return accuracy(model)

    model = net()
    result = run(model, evaluate=evaluate, test=test)
    assert calls.count("test") == 2
    assert "test" not in calls[: calls.index("test")]
    assert calls.index("test") >= 1 + 2 * len(result.report.steps)  # dense, then every step twice
    assert seen[0] is model
    assert seen[1] is result.model
    assert [r.name for r in result.report.rows[:3]] == [
        "test metric", "validation accuracy", "validation other"
    ]  # fmt: skip
    assert result.report.metric == "accuracy"


def test_metrics_may_be_numbers_of_any_kind() -> None:
    for value in (1, torch.tensor([0.5]), torch.ones(1).numpy()[0]):
        rows = run(evaluate=lambda _, v=value: v, finetune=None).report.rows
        assert rows[0].before == float(value)


def test_regression_where_less_is_better() -> None:
    batches = [(x, x.sum(1, keepdim=True)) for x, _ in BATCHES]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    def error(m: nn.Module) -> dict[str, float]:
        return {"mse": sum(F.mse_loss(m(x), y).item() for x, y in batches) / len(batches)}

    best = Finetune(epochs=4, lr=0.05, restore_best=True)
    result = run(model, batches, loss_fn=F.mse_loss, evaluate=error, maximize=False, finetune=best)
    assert result.report.metric_better == "lower"
    row = result.report.rows[0]
    assert (row.name, row.better) == ("validation mse", "lower")
    assert row.before == pytest.approx(error(model)["mse"])
    assert row.after == pytest.approx(error(result.model)["mse"], rel=1e-4)
    for done, step in zip(result.history, result.report.steps, strict=True):
        assert done.best_metric == min(r.metric or 0 for r in done.history)
        assert step.metric_healed == pytest.approx(done.best_metric)
    assert result.report.headline.startswith("Asked: at most 50.0% of the units may remain. ")
    assert f"validation mse {row.before:.4g} -> {row.after:.4g}" in result.report.headline


# --- networks and inputs of other kinds ----------------------------------------------------------


class Two(nn.Module):
    """Two inputs and an optional scale."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 12), nn.Linear(3, 12)
        self.out = nn.Linear(12, 2)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
        hidden = (self.left(a) + self.right(b)).relu()
        out: Tensor = self.out(hidden)
        return out if scale is None else out * scale


@pytest.mark.parametrize("kind", ["tuple", "dict", "list"])
def test_a_model_with_several_inputs(kind: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 4), torch.randn(16, 3)
    y = (a[:, 0] > b[:, 0]).long()
    inputs: Any = {"a": a, "b": b} if kind == "dict" else (a, b)
    batch: Any = [a, b] if kind == "list" else inputs
    result = run(
        Two(),
        [(batch, y)],
        example_inputs=inputs,
        evaluate=lambda m: m(a, b).mean(),
        latency=[1, 3],
    )
    assert result.model.get_parameter("left.weight").shape == (6, 4)
    assert result.model.get_parameter("right.weight").shape == (6, 3)
    assert [r.name for r in result.report.rows][-2:] == ["latency, batch 1", "latency, batch 3"]


class Recurrent(nn.Module):
    """An LSTM and a classifier on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.lstm(x)[0][:, -1])
        return out


def test_an_lstm() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 5, 3)
    result = run(Recurrent(), [(x, (x[:, -1, 0] > 0).long())], example_inputs=x)
    assert result.model.get_submodule("lstm").hidden_size == 4
    assert result.model(x).shape == (16, 2)


def test_a_frozen_model_is_pruned_but_not_trained() -> None:
    model = net().requires_grad_(False)
    result = run(model, finetune=None)
    assert not any(p.requires_grad for p in result.model.parameters())
    assert result.report.steps[-1].metric_healed is None
    assert result.history == []
    with pytest.raises(ConfigError, match="no parameter of the model requires a gradient"):
        run(model)
    assert run(model, finetune=Finetune(epochs=0)).history[0].steps == 0


# --- controls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["random", "shuffle", "invert", "random-labels"])
def test_a_control_cuts_as_much_but_other_units(control: str) -> None:
    model = net()
    plain = run(model, finetune=None, schedule=Schedule("linear", steps=1))
    other = run(model, finetune=None, schedule=Schedule("linear", steps=1), control=control)
    assert plain.counts.kept == other.counts.kept
    assert plain.report.reached == other.report.reached
    a, b = plain.plan.removed["first:neuron"], other.plan.removed["first:neuron"]
    assert not torch.equal(a, b)
    if control == "invert":
        assert not set(a.tolist()) & set(b.tolist())


def test_reinit_keeps_the_structure_of_the_cut_and_starts_again() -> None:
    model = net()
    plain = run(model, finetune=None)
    fresh = run(model, finetune=None, control="reinit")
    assert {k: v.tolist() for k, v in plain.plan.removed.items()} == {
        k: v.tolist() for k, v in fresh.plan.removed.items()
    }
    a, b = plain.model.get_parameter("first.weight"), fresh.model.get_parameter("first.weight")
    assert a.shape == b.shape
    assert not (a == b).any()
    check_masks(fresh.masked, fresh.plan.masks)


def test_reinit_of_weights_keeps_the_zeros() -> None:
    result = run(granularity="weight", control="reinit", finetune=HEAL)
    check_masks(result.model, result.masks)


def test_reinit_needs_modules_that_can_start_again() -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shift

    with pytest.raises(ConfigError, match=r"missing on the model \(Odd\)"):
        run(Odd(), control="reinit")
    run(Odd(), finetune=None)


def test_progress_counts_every_step() -> None:
    seen: list[tuple[str, int, int]] = []
    run(progress=lambda *told: seen.append(told))
    steps = [told for told in seen if told[0].startswith(("prune", "measure"))]
    assert len(BATCHES) == 4  # two cuts, each with four steps of healing
    assert steps == [
        ("prune: cut 1 of 2", 0, 10),
        ("prune: cut 2 of 2", 5, 10),
        ("measure", 10, 10),
    ]
    assert any(what.startswith("score: batch 1 of ") for what, _, _ in seen)
    assert any(what.startswith("heal after cut 1 of 2: epoch 1 of 1, ") for what, _, _ in seen)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_progress_true_draws_a_bar_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    run(progress=True)
    assert capsys.readouterr().out == ""


def test_stage_defaults() -> None:
    assert Stage(HALF).steps == Schedule("cubic", steps=5)
    assert Stage(threshold=Threshold("mean")).steps == Schedule("one_shot", steps=1)
    assert replace(Stage(HALF), schedule=QUICK).steps == QUICK


# --- what may be pruned, and in which sizes ------------------------------------------------------


def test_include_and_exclude() -> None:
    model = net()
    for options in ({"exclude": "first"}, {"exclude": model.norm}, {"include": "*second:neuron"}):
        result = run(model, budget=Budget(units=0.5), **options)
        assert set(result.plan.removed) == {"second:neuron"}
        left = {e.name: e.reason for e in result.report.excluded}
        assert left["first:neuron"].startswith("excluded by the user: ")
        assert isinstance(result.model, Net)
        assert result.model.first.weight.shape == (16, 4)
        assert result.model.second.weight.shape == (4, 16)


class Blocks(nn.Module):
    """Three blocks of one size: 4 + (4 -> 12 -> 4)."""

    def __init__(self) -> None:
        super().__init__()
        pairs = [(nn.Linear(4, 12), nn.Linear(12, 4)) for _ in range(3)]
        self.blocks = nn.ModuleList(nn.Sequential(a, nn.ReLU(), b) for a, b in pairs)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


@pytest.mark.parametrize("asked", [Budget(macs=0.4), Threshold("mean")], ids=["budget", "mean"])
def test_homogeneous_blocks_keep_one_size(asked: Budget | Threshold) -> None:
    torch.manual_seed(0)
    model = Blocks()
    key = "budget" if isinstance(asked, Budget) else "threshold"

    def sizes(**options: Any) -> list[int]:
        result = run(model, granularity="neuron", criterion="l2_norm", **{key: asked}, **options)
        assert isinstance(result.model, Blocks)
        return [b.get_parameter("0.bias").numel() for b in result.model.blocks]

    method = {"allocation": "global"} if key == "budget" else {}
    assert len(set(sizes(**method))) > 1
    assert len(set(sizes(homogeneous=True, **method))) == 1


def test_rounded_counts_are_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 128, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    batches = [(x[:, :, None], y) for x, y in data()]
    options: dict[str, Any] = {"example_inputs": batches[0][0], "schedule": Schedule("one_shot", 1)}
    asked = Budget(units=0.4)  # 51 of 128
    result = prune(model, batches, F.cross_entropy, budget=asked, **options)
    assert result.counts.kept == {"0:channel": 48}
    note = (
        "counts rounded: 1 of 1 targets keep multiples of 16 units (round_to='auto'; "
        "round_to=1 turns it off)"
    )
    assert note in result.report.notes
    result = prune(model, batches, F.cross_entropy, budget=asked, round_to=1, **options)
    assert result.counts.kept == {"0:channel": 51}
    assert not [n for n in result.report.notes if "rounded" in n]
