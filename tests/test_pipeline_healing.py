"""What a stage does around its cuts: repairs, masks that move, training before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs import prune
from secateurs.boards import BoardLog
from secateurs.checkpoints import Checkpoints
from secateurs.errors import ConfigError
from secateurs.finetuning import Finetune
from secateurs.penalties import Penalty
from secateurs.pipeline import Stage, prune_stages, repairing
from secateurs.pipeline.onlooking import work_of
from secateurs.pipeline.run import Run
from secateurs.posttraining import Won
from secateurs.recipe import parse_recipe
from secateurs.regrowth import Regrow
from secateurs.schedules import Schedule
from secateurs.surgery import verify
from secateurs.tickets import (
    AtInit,
    TicketSearch,
    find_ticket,
    prune_at_init,
    reinitialise_sparse_,
    train_ticket,
)
from secateurs.types import Budget

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()
BATCHES = [(x, y) for x, y in zip(torch.split(X, 16), torch.split(Y, 16), strict=True)]
ONCE = Schedule("one_shot", 1)
WEIGHTS: dict[str, Any] = {"granularity": "weight", "criterion": "magnitude", "schedule": ONCE}


def mlp(norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    middle = [nn.BatchNorm1d(24)] if norm else []
    return nn.Sequential(nn.Linear(6, 24), *middle, nn.ReLU(), nn.Linear(24, 2))


def loss_of(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return F.cross_entropy(model(X), Y).item()


def run(model: nn.Module, **options: Any) -> Any:
    return prune(model, BATCHES, F.cross_entropy, example_inputs=X, **options)


def test_a_repair_brings_the_cut_model_back_to_the_dense_one() -> None:
    model = mlp()
    away = {}
    for repair in ((), ("bias",), ("reconstruct",)):
        result = run(
            model, budget=Budget(units=0.5), criterion="l2_norm", schedule=ONCE, repair=repair
        )
        with torch.no_grad():
            away[repair] = (result.model(X) - model(X)).square().mean().item()
    assert away["reconstruct",] < 0.5 * away[()]
    assert away["bias",] < away[()]


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        ({"schedule": Schedule("linear", 2), "finetune": Finetune(steps=4, lr=0.1)}, (True, False)),
        ({"schedule": ONCE, "prepare": Finetune(steps=4, lr=0.1)}, (False,)),
        ({"schedule": Schedule("linear", 2)}, (True, True)),
    ],
)
def test_a_repair_undoes_no_training(
    options: dict[str, Any], dense: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = mlp(), []

    def look(run: Any, whole: nn.Module) -> Won:
        like_dense = all(map(torch.equal, whole.parameters(), model.parameters()))
        cut = {n: w * run.cut_plan.masks.get(n, 1) for n, w in whole.named_parameters()}
        assert all(torch.equal(w, cut[n]) for n, w in run.work.named_parameters())
        seen.append(like_dense)
        return Won("looked", {}, {}, 0, 0.0, (), ())

    monkeypatch.setitem(repairing.DO, "reconstruct", look)
    run(model, budget=Budget(units=0.5), criterion="l2_norm", repair=("reconstruct",), **options)
    assert tuple(seen) == dense


@pytest.mark.parametrize("cut", [{"at_init": AtInit("snip")}, WEIGHTS])
def test_what_comes_back_begins_where_it_was_before_the_cut(
    cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = mlp(), []
    true = Run.heal

    def heal(self: Run, stage: Stage, recut: Any = None, before: Any = None) -> Any:
        given.append(before)
        return true(self, stage, recut, before)

    monkeypatch.setattr(Run, "heal", heal)
    run(
        model, budget=Budget(params=0.4), finetune=Finetune(steps=4), regrow=Regrow("dpf", every=2),
        **{"granularity": "weight", **cut},
    )  # fmt: skip
    (before,) = given
    assert all(torch.equal(before[n], w) for n, w in model.named_parameters())


def test_norms_are_measured_again_and_the_report_says_what_it_won() -> None:
    result = run(
        mlp(norm=True), budget=Budget(units=0.5), criterion="l2_norm",
        schedule=Schedule("linear", 2), repair=("reconstruct", "norms"),
        evaluate=lambda m: -loss_of(m),
    )  # fmt: skip
    notes = [note for note in result.report.notes if note.startswith("after cut")]
    assert [note.split(":")[0] for note in notes] == ["after cut 1", "after cut 1", "after cut 2",
                                                      "after cut 2"]  # fmt: skip
    assert "->" in notes[0]


@pytest.mark.parametrize("rule", ["rigl", "set", "dpf", "dns"])
def test_masks_that_moved_are_those_of_the_plan(rule: str) -> None:
    result = run(
        mlp(), budget=Budget(params=0.3), finetune=Finetune(epochs=10, lr=0.02),
        regrow=Regrow(rule, every=4), **WEIGHTS,
    )  # fmt: skip
    still = run(mlp(), budget=Budget(params=0.3), finetune=Finetune(epochs=10, lr=0.02), **WEIGHTS)
    plan = result.plan
    assert (
        plan.n_removed == still.plan.n_removed == sum(int((~m).sum()) for m in plan.masks.values())
    )
    assert any(not torch.equal(plan.masks[n], still.plan.masks[n]) for n in plan.masks)
    for name, mask in plan.masks.items():
        weight = dict(result.model.named_parameters())[name]
        assert not weight[~mask].any()
        assert plan.removed[name].tolist() == (~mask).reshape(-1).nonzero().reshape(-1).tolist()
    assert any(note.startswith(f"{rule}: masks moved") for note in result.report.notes)


def test_the_best_epoch_has_the_masks_of_its_own_time() -> None:
    """Of eight epochs the first was the best: all is as after a training of one."""

    def after(epochs: int, best: bool) -> Any:
        calls = iter([0.5, 0.5, 0.9, *[0.1] * 20])
        return run(
            mlp(), budget=Budget(params=0.3), evaluate=lambda m: next(calls),
            finetune=Finetune(epochs=epochs, lr=0.02, restore_best=best),
            regrow=Regrow("set", every=3, until=1.0, curve="constant"), **WEIGHTS,
        )  # fmt: skip

    result, one, last = after(8, True), after(1, False), after(8, False)
    for name, mask in result.plan.masks.items():
        weight = result.masked.get_parameter(name)
        assert torch.equal(mask, one.plan.masks[name])
        assert torch.equal(weight, one.masked.get_parameter(name))
        assert not torch.equal(mask, last.plan.masks[name])
        assert not weight[~mask].any()


def test_weights_that_moved_and_then_structure() -> None:
    heal = Finetune(epochs=2, lr=0.01)
    stages = [
        Stage(Budget(params=0.5), finetune=heal, regrow=Regrow("rigl", every=2), **WEIGHTS),
        Stage(Budget(units=0.5), criterion="l2_norm", schedule=ONCE, finetune=heal),
    ]
    result = prune_stages(mlp(), BATCHES, F.cross_entropy, stages, example_inputs=X)
    assert result.model.get_submodule("0").out_features == 12
    with pytest.raises(ConfigError, match="put the weights first"):
        prune_stages(mlp(), BATCHES, F.cross_entropy, stages[::-1], example_inputs=X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repair": ("bais",)}, "Did you mean 'bias'"),
        ({"repair": "bias"}, "repair is a list"),
        ({"repair": ("norms",)}, "no norm with running statistics"),
        (
            {"repair": ("bias",), "schedule": Schedule("linear", 2, every="2 steps"),
             "finetune": Finetune(epochs=4)},
            "leave every away",
        ),
        ({"regrow": Regrow("set")}, "granularity='weight'"),
        ({"regrow": Regrow("set"), **WEIGHTS}, "give finetune="),
        ({"repair": ("bias",), "control": "reinit", "finetune": Finetune()}, "nothing to repair"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_the_first_cut(
    options: dict[str, Any], message: str
) -> None:
    given = {"criterion": "l2_norm", "budget": Budget(units=0.5), **options}
    with pytest.raises(ConfigError, match=message):
        run(mlp(), **given)


def test_all_of_it_from_a_recipe() -> None:
    recipe = parse_recipe(
        {
            "task": "digits-mlp",
            "stages": [
                {
                    "granularity": "weight", "budget": {"params": 0.3},
                    "schedule": {"curve": "one_shot", "steps": 1},
                    "finetune": {"epochs": 2, "distill": 0.5},
                    "regrow": {"rule": "rigl", "every": 50},
                },
                {
                    "budget": {"macs": 0.25}, "prepare": {"epochs": 1},
                    "penalty": {"rule": "growing", "strength": 1.0},
                    "repair": ["reconstruct"],
                    "finetune": {"epochs": 2, "hidden": 1.0, "hidden_at": ["layers.1"]},
                },
            ],
        }
    )  # fmt: skip
    first, second = recipe.all_stages()
    assert first.regrow == Regrow("rigl", every=50)
    assert second.repair == ("reconstruct",)
    assert second.prepare == Finetune(epochs=1)
    assert second.penalty is not None
    assert second.finetune is not None
    assert second.finetune.hidden_at == ("layers.1",)
    assert parse_recipe(recipe.resolved()).resolved() == recipe.resolved()


# --- from the start ------------------------------------------------------------------------------

TRAIN = Finetune(epochs=3, lr=0.02)


def test_a_stage_prunes_at_initialisation_and_trains() -> None:
    for method in ("snip", "synflow", "force"):
        result = run(
            mlp(), budget=Budget(params=0.3), granularity="weight", finetune=TRAIN,
            at_init=AtInit(method, iterations=3),
        )  # fmt: skip
        alone = prune_at_init(
            mlp(), BATCHES, F.cross_entropy, method=method, iterations=3, example_inputs=X,
            budget=Budget(params=0.3),
        )  # fmt: skip
        assert set(result.plan.masks) == set(alone.masks)
        for name, mask in alone.masks.items():
            assert torch.equal(result.plan.masks[name], mask)
            assert not dict(result.model.named_parameters())[name][~mask].any()
        (row,) = result.report.steps
        assert (row.step, row.fraction) == (1, 1.0)
        assert row.remaining["params"] == pytest.approx(0.3, abs=0.01)
        assert result.counts.kept == {n: int(m.sum()) for n, m in alone.masks.items()}
        assert result.history[0].steps == 12


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_what_is_left_at_initialisation_is_drawn_anew(granularity: str) -> None:
    how = AtInit("snip", reinitialise=True)
    given: dict[str, Any] = {"budget": Budget(params=0.3), "granularity": granularity, "seed": 4}
    result = run(mlp(norm=True), at_init=how, **given)
    plain = run(mlp(norm=True), at_init=AtInit("snip"), **given)
    assert {n: r.tolist() for n, r in result.plan.removed.items()} == {
        n: r.tolist() for n, r in plain.plan.removed.items()
    }
    by_hand = mlp(norm=True)
    rows = reinitialise_sparse_(by_hand, plain.plan.masks, seed=4)
    for name, weight in by_hand.state_dict().items():
        assert torch.equal(result.masked.state_dict()[name], weight)
    assert not torch.equal(
        by_hand.get_parameter("0.weight"), plain.masked.get_parameter("0.weight")
    )
    verify(by_hand, result.model, result.plan, X)
    assert [row.done for row in rows].count("scaled") == 2
    (note,) = (note for note in result.report.notes if "drawn anew" in note)
    assert note.startswith("after the cut 2 parameters were drawn anew and scaled")
    assert note.endswith("4 drawn as their modules do it")
    assert not any("drawn anew" in note for note in plain.report.notes)


def test_weights_that_cannot_be_drawn_anew_are_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    result = run(
        nn.Sequential(Scaled(), mlp()), budget=Budget(params=0.3), granularity="weight",
        at_init=AtInit(reinitialise=True),
    )  # fmt: skip
    left = "0.scale was not drawn anew: Scaled has no reset_parameters()"
    assert left in result.report.notes
    assert torch.equal(result.masked.get_parameter("0.scale"), torch.ones(6))


def test_a_stage_finds_a_ticket_and_trains_it() -> None:
    given: dict[str, Any] = {"granularity": "weight", "criterion": "magnitude"}
    result = run(
        mlp(), budget=Budget(params=0.3), finetune=TRAIN, seed=4,
        ticket=TicketSearch(rounds=2, rewind=0.25), **given,
    )  # fmt: skip
    model = mlp()
    ticket = find_ticket(
        model, BATCHES, F.cross_entropy, train=TRAIN, rounds=2, rewind=0.25, seed=4,
        budget=Budget(params=0.3), allocation="uniform", example_inputs=X, **given,
    )  # fmt: skip
    train_ticket(model, ticket, BATCHES, F.cross_entropy, train=TRAIN, seed=4)
    for name, weight in model.state_dict().items():
        assert torch.equal(result.masked.state_dict()[name], weight)
    assert len(result.report.steps) == 1
    assert result.history[0].steps == 9  # from step 3 of 12
    notes = [note for note in result.report.notes if "ticket" in note]
    assert [note.split(":")[0] for note in notes] == [
        "ticket, round 1 of 2", "ticket, round 2 of 2", "the ticket is trained from step 3; reset"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at_init": AtInit("force")}, "force judges single weights"),
        ({"at_init": AtInit(), "criterion": "magnitude"}, "does not read criterion"),
        ({"at_init": AtInit(), "schedule": ONCE}, "does not read schedule"),
        ({"at_init": AtInit(), "allocation": "global"}, "does not read allocation"),
        ({"at_init": AtInit(), "budget": Budget(metric_drop=0.1)}, "units, params, macs or bytes"),
        ({"at_init": AtInit(), "ticket": TicketSearch(), "finetune": TRAIN}, "give one of them"),
        ({"ticket": TicketSearch()}, "give finetune="),
        ({"ticket": TicketSearch(), "finetune": TRAIN, "schedule": ONCE}, "not read schedule"),
        ({"ticket": TicketSearch(), "finetune": Finetune(distill=0.5)}, "without a teacher"),
        ({"ticket": TicketSearch(rewind=12), "finetune": TRAIN}, "nothing would be trained after"),
        ({"ticket": "yes", "finetune": TRAIN}, "must be a TicketSearch"),
    ],
)
def test_what_cannot_start_is_said_before(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(mlp(), **{"budget": Budget(params=0.3), **options})


def test_drawing_anew_is_a_switch() -> None:
    with pytest.raises(ConfigError, match="reinitialise must be True or False, got 'yes'"):
        AtInit(reinitialise="yes")  # type: ignore[arg-type]


def test_only_the_first_stage_starts() -> None:
    late = Stage(Budget(params=0.3), at_init=AtInit())
    with pytest.raises(ConfigError, match="stage 2: at_init begins with a whole network"):
        prune_stages(mlp(), BATCHES, F.cross_entropy, [late, late], example_inputs=X)


# --- what a run shows ----------------------------------------------------------------------------

LOGGED: dict[str, list[Stage]] = {
    "rounds": [
        Stage(
            Budget(units=0.5), criterion="l2_norm", schedule=Schedule("linear", 2), finetune=TRAIN,
            prepare=TRAIN, penalty=Penalty("group_lasso"),
        )
    ],
    "within": [
        Stage(
            Budget(units=0.5), criterion="l2_norm", schedule=Schedule("linear", 2, every="3 steps"),
            finetune=TRAIN,
        )
    ],
    "ticket": [
        Stage(Budget(units=0.5), finetune=TRAIN, ticket=TicketSearch(rounds=2, rewind=2),
              granularity="weight"),
    ],
}  # fmt: skip


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), what a reader of the folder sees."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder))
    seen.Reload()
    return {t: [(e.step, e.value) for e in seen.Scalars(t)] for t in seen.Tags()["scalars"]}


@pytest.mark.parametrize("case", LOGGED)
def test_a_log_sees_every_training_and_cut_and_changes_nothing(case: str, tmp_path: Path) -> None:
    def whole(**options: Any) -> Any:
        return prune_stages(
            mlp(), BATCHES, F.cross_entropy, LOGGED[case], example_inputs=X,
            evaluate=lambda m: -loss_of(m), **options,
        )  # fmt: skip

    told: list[tuple[str, int, int]] = []
    plain = whole()
    with BoardLog(tmp_path) as log:
        result = whole(log=log, progress=lambda *now: told.append(now))
    for name, weight in plain.masked.state_dict().items():
        assert torch.equal(result.masked.state_dict()[name], weight)
    seen = logged(tmp_path)
    trained, cuts = {"rounds": (36, 2), "within": (12, 2), "ticket": (32, 1)}[case]
    assert [step for step, _ in seen["train/learning rate"]] == list(range(trained))
    key = "kept units/0:neuron" if case != "ticket" else "kept units/0.weight"
    assert len(seen[key]) == cuts
    assert len(seen["train/loss"]) == {"rounds": 9, "within": 3, "ticket": 10}[case]
    total = work_of(LOGGED[case][0], BATCHES)
    assert total == trained + cuts == told[-1][2]
    done = [n for _, n, _ in told]
    assert done == sorted(done)
    assert done[-1] == total
    assert done[-2] >= total - 1
    assert sum("% zeros" in what for what, _, _ in told) == len(seen["train/loss"])


class Stopped(BaseException):
    """In place of a crash."""


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_goes_on_with_its_log(first: bool, tmp_path: Path) -> None:
    """Also when only the resumed part has one."""

    def go(stop: int, folder: Path | None, **options: Any) -> Any:
        calls = 0

        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Stopped
            return F.cross_entropy(outputs, targets)

        if folder is None:
            return prune_stages(mlp(), BATCHES, loss, LOGGED["rounds"], example_inputs=X, **options)
        with BoardLog(folder) as log:
            return prune_stages(
                mlp(), BATCHES, loss, LOGGED["rounds"], example_inputs=X, log=log, **options
            )

    expected = go(0, tmp_path / "whole")
    kept = Checkpoints(tmp_path / "kept", every=1)
    board = tmp_path / "board"
    with pytest.raises(Stopped):
        go(24, board if first else None, checkpoint=kept)
    result = go(0, board, checkpoint=kept, resume=True)
    for name, weight in expected.masked.state_dict().items():
        assert torch.equal(result.masked.state_dict()[name], weight)
    whole, found = logged(tmp_path / "whole"), logged(board)
    for tag in ("train/loss", "train/learning rate"):
        mine, others = dict(found[tag]), dict(whole[tag])
        if not first:
            others = {step: value for step, value in others.items() if step >= min(mine)}
        assert mine == others
        assert max(mine) == (36 if tag == "train/loss" else 35)
        assert mine  # at steps that the whole run has too


def test_the_bar_knows_how_long_it_takes_when_epochs_are_slow() -> None:
    """Two epochs an hour apart are enough; rich would forget the first after half a minute."""
    from rich.progress import Progress as RichProgress

    clock = [0.0]
    left = {}
    for period in (30.0, float("inf")):
        clock[0] = 0.0
        shown = RichProgress(
            get_time=lambda: clock[0], speed_estimate_period=period, auto_refresh=False
        )
        task = shown.add_task("t", total=10)
        for done in (0, 1, 2):
            shown.update(task, completed=done)
            clock[0] += 3600
        left[period] = shown.tasks[0].time_remaining
    assert left[30.0] is None
    assert left[float("inf")] == 8 * 3600


def test_a_step_that_removes_nothing_has_nothing_to_repair() -> None:
    result = run(
        mlp(), budget=Budget(units=22), criterion="l2_norm", schedule=Schedule("linear", 6),
        repair=("reconstruct",), round_to=1,
    )  # fmt: skip
    repaired = [note for note in result.report.notes if note.startswith("after cut")]
    assert result.plan.n_removed == 2
    assert len(repaired) == 2
