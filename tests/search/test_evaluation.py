"""What a candidate is judged by: folds of both modes, seeds, the lock, and the final figures."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.batches import call_model
from secateurs.criteria import CRITERIA
from secateurs.errors import BudgetError, ConfigError, DataError
from secateurs.finetuning import Finetune
from secateurs.recipe import Recipe, parse_recipe
from secateurs.runner import load_problem, run_recipe
from secateurs.searching.config import Candidate
from secateurs.searching.evaluation import Judge, conclude, prepare, with_values
from secateurs.searching.folding import seed_of
from secateurs.searching.holdout import copies, sample_keys
from secateurs.searching.results import SearchResult, Trial
from secateurs.tasks.training import kept
from tests.search import project

HALF = Candidate(0, {"budget.units": 0.5})


def recipe(search: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    block = {
        "space": {"budget.units": [0.75, 0.5]}, "max_drop": 0.3, "folds": {"k": 3},
        **(search or {}),
    }  # fmt: skip
    own = "tests.search.project"
    return parse_recipe(
        {
            "model": f"{own}:model", "data": f"{own}:data", "fit": f"{own}:fit",
            "schedule": {"curve": "one_shot", "steps": 1}, "latency": [1],
            "search": block, **changes,
        }
    )  # fmt: skip


def judge_of(search: dict[str, Any] | None = None, **changes: Any) -> Judge:
    asked = recipe(search, **changes)
    return prepare(asked, load_problem(asked))


@pytest.fixture(scope="module")
def refit() -> Judge:
    torch.manual_seed(0)
    return judge_of()


@pytest.fixture(scope="module")
def fixed() -> Judge:
    torch.manual_seed(0)
    return judge_of({"mode": "fixed"})


def keys_of(batches: Any) -> list[bytes]:
    return sample_keys(batches)


# -- the two modes --------------------------------------------------------------------------------


def test_refit_pools_training_and_validation_and_holds_each_sample_out_once(refit: Judge) -> None:
    assert refit.search.mode == "refit"
    pool = keys_of(refit.problem.train) + keys_of(refit.problem.validation)
    held: list[bytes] = []
    for fold in range(3):
        part = refit.ground.part(fold)
        mine = keys_of(part.held)
        assert part.n_held == len(mine) == 48
        assert not copies(mine, keys_of(part.train))
        assert not copies(mine, keys_of(part.calibration))
        assert sorted(mine + keys_of(part.train)) == sorted(pool)
        held += mine
    assert sorted(held) == sorted(pool)
    assert refit.design.overlap == pytest.approx(0.5)  # 48 of 96
    assert refit.design.samples == 144


def test_refit_trains_a_dense_network_for_each_fold_and_keeps_it(refit: Judge) -> None:
    first = [p.clone() for p in refit.ground.part(0).dense.parameters()]
    second = [p.clone() for p in refit.ground.part(1).dense.parameters()]
    assert not torch.equal(first[0], second[0])
    again = judge_of()  # from the cache, as another worker would
    for mine, theirs in zip(first, again.ground.part(0).dense.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_dense_network_of_a_fold_is_read_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path))
    calls = []

    def counted(batches: Any) -> nn.Module:
        calls.append(1)
        return true_fit(batches)

    true_fit = project.fit
    monkeypatch.setattr(project, "fit", counted)
    judge_of().ground.part(0)
    judge_of().ground.part(0)
    assert len(calls) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_fixed_judges_on_validation_data_only(fixed: Judge) -> None:
    held: list[bytes] = []
    for fold in range(3):
        part = fixed.ground.part(fold)
        assert part.train is fixed.problem.train
        for mine, given in zip(
            part.dense.parameters(), fixed.problem.model.parameters(), strict=True
        ):
            assert torch.equal(mine, given)
        held += keys_of(part.held)
    assert sorted(held) == sorted(keys_of(fixed.problem.validation))
    assert not copies(held, keys_of(fixed.problem.train))
    assert fixed.design.overlap == 0.0
    assert fixed.design.samples == 48


def test_fixed_is_the_mode_where_the_network_cannot_be_trained_again() -> None:
    asked = recipe(fit=None)
    judge = prepare(asked, load_problem(asked))
    assert judge.search.mode == "fixed"
    asked = recipe({"mode": "refit"}, fit=None)
    with pytest.raises(ConfigError, match="add fit: module:function"):
        prepare(asked, load_problem(asked))


def test_fixed_leaves_out_validation_samples_that_trained_the_network() -> None:
    asked = recipe({"mode": "fixed"})
    problem = load_problem(asked)
    seen = [*problem.validation, (project.points(project.N_TRAIN, 0)[0][:5], torch.zeros(5).long())]
    judge = prepare(asked, replace(problem, validation=seen))
    assert judge.design.samples == 48
    assert "5 validation samples are exact copies of training samples" in judge.ground.notes[0]


def test_a_bootstrap_needs_networks_of_its_own() -> None:
    with pytest.raises(ConfigError, match="bootstrap resamples what the dense network"):
        judge_of({"mode": "fixed", "folds": {"kind": "bootstrap", "k": 3}})
    judge = judge_of({"folds": {"kind": "bootstrap", "k": 2}})
    part = judge.ground.part(0)
    train, held = keys_of(part.train), keys_of(part.held)
    assert len(train) == 144
    assert len(set(train)) < 144
    assert not copies(held, train)
    assert len(held) + len(set(train)) == 144


@pytest.mark.parametrize("mode", ["refit", "fixed"])
def test_groups_are_never_on_both_sides(mode: str) -> None:
    judge = judge_of({"mode": mode, "folds": {"kind": "grouped", "k": 4}})
    sizes = {"refit": (96, 48), "fixed": (0, 48)}[mode]
    names = [f"t{i // 4}" for i in range(sizes[0])] + [f"v{i // 4}" for i in range(sizes[1])]
    for fold in judge.ground.folds:
        assert not {names[i] for i in fold.train} & {names[i] for i in fold.held}


def test_groups_that_are_missing_are_asked_for() -> None:
    asked = recipe({"folds": {"kind": "grouped", "k": 3}})
    problem = replace(load_problem(asked), groups=None)
    with pytest.raises(DataError, match=r'let data\(\) return "groups"'):
        prepare(asked, problem)


def test_equal_samples_on_both_sides_of_a_fold_are_told() -> None:
    asked = recipe()
    problem = load_problem(asked)
    x, labels = project.points(project.N_TRAIN, 0)
    twice = [*problem.train, (x[:6], labels[:6])]
    judge = prepare(asked, replace(problem, train=twice))
    (note,) = judge.ground.notes
    assert "held-out samples have an exact copy in the training part" in note


def test_decisions_along_the_way_never_see_the_held_out_part() -> None:
    """`restore_best` looks at a metric: on samples that are neither trained nor judged on."""
    asked = {"space": {"finetune.epochs": [1, 2]}, "max_drop": 0.3, "folds": {"k": 3}}
    more: dict[str, Any] = {"budget": {"units": 0.5}, "finetune": {"restore_best": True}}
    for mode in ("refit", "fixed"):
        part = judge_of({**asked, "mode": mode}, **more).ground.part(0)
        assert part.inner is not None
        inner = keys_of(part.inner)
        assert not copies(inner, keys_of(part.held))
        assert not copies(inner, keys_of(part.train))
    assert judge_of({**asked, "mode": "refit"}, budget={"units": 0.5}).ground.part(0).inner is None


def test_a_fit_of_another_architecture_is_refused() -> None:
    judge = judge_of(fit="tests.search.project:wrong_fit")
    with pytest.raises(ConfigError, match="architecture of model"):
        judge(HALF, 0)


# -- one candidate on one fold --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["refit", "fixed"])
def test_a_result_depends_on_candidate_and_fold_and_on_nothing_else(mode: str) -> None:
    one, two = judge_of({"mode": mode}), judge_of({"mode": mode})
    more = Candidate(1, {"budget.units": 0.75})
    first = {(c.number, f): one(c, f) for c in (HALF, more) for f in (0, 1)}
    torch.manual_seed(99)
    second = {(c.number, f): two(c, f) for f in (1, 0) for c in (more, HALF)}
    for key, found in first.items():
        assert replace(found, seconds=0.0) == replace(second[key], seconds=0.0)
    assert replace(one(replace(HALF, number=7), 0), seconds=0.0) == replace(
        first[0, 0], seconds=0.0
    )


def test_the_figures_of_a_fold_by_hand(refit: Judge) -> None:
    found, part = refit(HALF, 0), refit.ground.part(0)
    x, labels = (torch.cat([b[i] for b in part.held]) for i in (0, 1))
    right = (part.dense(x).argmax(1) == labels).double().mean().item()
    assert found.dense == pytest.approx(right)
    # 6-16-2 with 8 of 16 hidden neurons: 8 x 6 + 8 + 2 x 8 + 2 of 16 x 6 + 16 + 2 x 16 + 2
    assert found.remaining["params"] == pytest.approx(74 / 146)
    assert found.remaining["macs"] == pytest.approx(0.5)
    assert 0 < found.remaining["bytes"] < 1
    assert (found.fold, found.samples, found.share) == (0, 48, True)
    assert found.latency_ms is None


def test_latency_is_measured_where_the_goal_needs_it() -> None:
    found = judge_of({"goal": "fastest", "mode": "fixed"})(HALF, 0)
    assert found.latency_ms is not None
    assert found.latency_ms > 0


def negative_log_likelihood(model: nn.Module, batches: Any) -> dict[str, float]:
    with torch.no_grad():
        losses = [functional.cross_entropy(call_model(model, x), y).item() for x, y in batches]
    return {"loss": float(np.mean(losses))}


def test_a_loss_as_metric_is_no_share_and_drops_when_it_grows() -> None:
    asked = recipe(maximize=False)
    judge = prepare(asked, replace(load_problem(asked), metric=negative_log_likelihood))
    folds = tuple(judge(HALF, fold) for fold in range(3))
    assert not any(f.share for f in folds)
    result = judge.result([Trial(HALF, folds)])
    drop = np.mean([f.metric - f.dense for f in folds])
    assert result.standings[0].drop == pytest.approx(drop)
    assert result.metric == "loss"


def test_a_budget_out_of_reach_is_a_problem_of_the_candidate(refit: Judge) -> None:
    with pytest.raises(BudgetError):
        refit(Candidate(0, {"budget.params": 3}), 0)


def test_seeds_do_not_depend_on_the_order_of_keys() -> None:
    assert seed_of({"a": 1, "b": 2}, 3) == seed_of({"b": 2, "a": 1}, 3)
    assert len({seed_of({"a": 1}, fold) for fold in range(50)}) == 50


# -- what may be searched -------------------------------------------------------------------------


def test_values_override_the_recipe_of_a_candidate() -> None:
    found = with_values(
        recipe(), {"budget.units": 0.3, "criterion": "magnitude", "finetune.epochs": 2}
    )
    stage = found.all_stages()[0]
    assert stage.criterion == "magnitude"
    assert stage.finetune == Finetune(epochs=2)
    assert found.search is None


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"seed": [0, 1]}, "'seed' cannot be searched"),
        ({"criterion": ["taylr"]}, "Did you mean 'taylor'"),
        ({"budget.units": [0.5, 90.0]}, "Did you mean 0.9"),
        ({"finetune.epoch": [1]}, "unknown key. Did you mean 'epochs'"),
        ({"stages.0.criterion": ["taylor"]}, "stages"),
    ],
)
def test_every_candidate_is_checked_before_anything_is_trained(
    space: dict[str, Any], message: str
) -> None:
    asked = recipe({"space": space}, budget={"units": 0.5})
    with pytest.raises(ConfigError, match=message):
        prepare(asked, load_problem(asked, train=False))


def test_a_run_of_a_recipe_with_a_search_says_what_to_do() -> None:
    asked = recipe()
    with pytest.raises(ConfigError, match="secateurs search"):
        run_recipe(asked, load_problem(asked))


# -- the test split -------------------------------------------------------------------------------


def test_test_samples_in_other_data_are_refused() -> None:
    asked = recipe(data="tests.search.project:leaking")
    with pytest.raises(
        DataError,
        match=r"3 of 40 samples of the test split \(numbers 0, 5, 9\) occur in the validation data",
    ):
        prepare(asked, load_problem(asked))
    told = recipe({"copies": "note"}, data="tests.search.project:leaking")
    assert "3 of 40" in prepare(told, load_problem(told)).ground.notes[0]


def test_a_metric_that_looks_at_the_test_split_is_caught(fixed: Judge) -> None:
    def peeking(model: nn.Module, batches: Any) -> dict[str, float]:
        return true_metric(model, fixed.problem.test)

    true_metric = fixed.problem.metric
    judge = Judge(fixed.recipe, fixed.ground, "accuracy")
    judge.problem = replace(fixed.problem, metric=peeking)
    with pytest.raises(DataError, match="the test split was touched before the choice"):
        judge(HALF, 0)


def test_a_criterion_that_looks_at_the_test_split_is_caught(
    fixed: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peeking(stats: Any) -> Tensor:
        list(fixed.problem.test)
        found: Tensor = true_fn(stats)
        return found

    true_fn = CRITERIA["taylor"].fn
    monkeypatch.setitem(CRITERIA, "taylor", replace(CRITERIA["taylor"], fn=peeking))
    with pytest.raises(DataError, match=r"touched before the choice was made, by .*peeking"):
        fixed(HALF, 0)


def all_trials(judge: Judge) -> list[Trial]:
    return [
        Trial(c, tuple(judge(c, f) for f in range(judge.n_folds)))
        for c in judge.search.grid_space.grid()
    ]


def test_the_end_makes_the_chosen_network_and_reads_the_test_split_once() -> None:
    judge = judge_of()
    trials = all_trials(judge)
    result = judge.result(trials)
    assert judge.ground.lock.tried == []
    assert result.choice.candidate is not None
    assert result.final is None
    final, pruned = conclude(judge, result)
    assert pruned is not None
    assert final.final is not None
    test = project.batched(project.points(project.N_TEST, 2))
    x, labels = (torch.cat([b[i] for b in test]) for i in (0, 1))
    for model, figure in (
        (judge.problem.model, final.final.test_dense),
        (pruned.model, final.final.test),
    ):
        right = (model.eval()(x).argmax(1) == labels).double().mean().item()
        assert figure == pytest.approx(right)
    assert final.final.samples == {"train": 96, "validation": 48, "test": 40}
    assert final.final.within is (final.final.test_dense - final.final.test <= 0.3 + 1e-12)
    with pytest.raises(DataError, match="'the final figures of the search' did"):
        conclude(judge, result)
    text = json.dumps(final.to_dict(), allow_nan=False)
    assert SearchResult.from_dict(json.loads(text)).to_dict() == json.loads(text)


def test_the_chosen_network_is_that_of_a_plain_run(fixed: Judge) -> None:
    judge = judge_of({"mode": "fixed"})
    result = judge.result(all_trials(judge))
    _, pruned = conclude(judge, result)
    assert pruned is not None
    alone = judge.recipe_of(result.choice.require())
    again = run_recipe(alone, load_problem(alone))
    for mine, theirs in zip(pruned.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_without_a_choice_the_test_split_stays_unread() -> None:
    judge = judge_of({"goal": "pareto", "max_drop": None, "mode": "fixed"})
    result = judge.result(all_trials(judge))
    assert result.front
    same, nothing = conclude(judge, result)
    assert (same, nothing) == (result, None)
    assert judge.ground.lock.use is None


def test_data_and_recipe_make_a_study(fixed: Judge) -> None:
    again = judge_of({"mode": "fixed"})
    assert again.made_by == fixed.made_by
    json.dumps(fixed.made_by)
    asked = recipe({"mode": "fixed"})
    fewer = replace(load_problem(asked), validation=project.batched(project.points(40, 1)))
    assert prepare(asked, fewer).made_by["data"] != fixed.made_by["data"]


def test_a_recipe_without_a_search_is_told_how_to_write_one() -> None:
    plain = with_values(recipe(), {})
    with pytest.raises(ConfigError, match="this recipe has no search; add for example"):
        prepare(plain, load_problem(plain))


def test_healing_is_part_of_what_is_judged() -> None:
    """A fold with and without an epoch of healing, from the same dense network."""
    bare = judge_of({"space": {"budget.units": [0.25]}})
    healed = judge_of({"space": {"budget.units": [0.25]}}, finetune={"epochs": 2, "lr": 0.02})
    candidate = Candidate(0, {"budget.units": 0.25})
    one, two = bare(candidate, 0), healed(candidate, 0)
    assert one.dense == two.dense
    assert two.metric >= one.metric


def test_of_two_workers_that_need_a_network_one_trains_it(tmp_path: Path) -> None:
    calls = []

    def slow() -> nn.Module:
        calls.append(1)
        time.sleep(0.2)
        return project.untrained()

    def ask(_: int) -> tuple[nn.Module, bool]:
        return kept(tmp_path / "network.safetensors", "it", project.untrained, slow)

    with ThreadPoolExecutor(2) as pool:
        (first, _), (second, _) = pool.map(ask, range(2))
    assert len(calls) == 1
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)
