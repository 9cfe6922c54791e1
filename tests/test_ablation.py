"""A criterion beside its controls: the rule on hand-made rows, and runs that are not repeated."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from secateurs.ablation import (
    Comparison,
    Row,
    ablate,
    check_ablation,
    compare,
    controlled,
    difference,
    verdict,
)
from secateurs.ablation.rows import read_row, row_file, write_row
from secateurs.controls import CONTROLS
from secateurs.errors import ConfigError, FileFormatError, ScoringError
from secateurs.pipeline import prune_stages
from secateurs.recipe import Recipe, parse_recipe
from secateurs.runner import Problem, load_problem, run_recipe
from tests.pools import inline_pool

# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "mean", "error", "outcome"),
    [
        # differences .3 .4 .5: sd .1, error .1 / sqrt 3
        ([0.9, 0.9, 0.9], [0.6, 0.5, 0.4], 0.4, 0.1 / math.sqrt(3), "better"),
        ([0.6, 0.5, 0.4], [0.9, 0.9, 0.9], -0.4, 0.1 / math.sqrt(3), "worse"),
        # differences 0 1 2: mean 1, error 1 / sqrt 3, twice that is 1.15
        ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], 1.0, 1 / math.sqrt(3), "unclear"),
        # pairing: the seeds differ much, the pairs little
        ([0.1, 0.5, 0.91], [0.0, 0.41, 0.8], 0.1, 0.01 / math.sqrt(3), "better"),
        ([0.9, 0.8, 0.7], [0.9, 0.8, 0.7], 0.0, 0.0, "equal"),
        ([0.9, 0.95, 0.7], [0.8, 0.85, 0.6], 0.1, 0.0, "no spread"),  # .1 but for rounding
        ([0.9, 0.8], [0.1, 0.1], 0.75, 0.05, "too few"),
        ([0.9], [0.1], 0.8, None, "too few"),
    ],
)
def test_the_rule(
    ours: list[float], theirs: list[float], mean: float, error: float | None, outcome: str
) -> None:
    found = difference(list(zip(ours, theirs, strict=True)))
    assert found.mean == pytest.approx(mean)
    assert found.error == (error if error is None else pytest.approx(error))
    assert found.outcome == outcome
    turned = {"better": "worse", "worse": "better"}
    other = difference(list(zip(ours, theirs, strict=True)), maximize=False)
    assert other.outcome == turned.get(outcome, outcome)
    assert other.mean == found.mean


def test_two_errors_are_not_more_than_two_errors() -> None:
    # differences 0 0 3 have mean 1 and error sqrt(3) / sqrt(3) = 1; shifted by 1 the mean is 2
    assert difference([(1, 0), (1, 0), (4, 0)]).outcome == "unclear"
    assert difference([(1.01, 0), (1.01, 0), (4.01, 0)]).outcome == "better"


def row(control: str | None, seed: int, test: float, cut: float = 0.5, kept: int = 8) -> Row:
    return Row(
        control=control, seed=seed, dense=0.95, test=test, after_cut=cut, kept={"a": kept},
        units={"a": 100}, reached={"macs": 0.1}, metric="accuracy", dense_weights=f"d{seed}",
        seconds=1.0,
    )  # fmt: skip


def rows(control: str | None, tests: Iterable[float], cuts: Iterable[float] = ()) -> list[Row]:
    found = list(cuts)
    return [row(control, i, t, found[i] if found else 0.5) for i, t in enumerate(tests)]


REAL = rows(None, [0.90, 0.91, 0.89])
HIGH, NEAR, LOW = [0.95, 0.97, 0.96], [0.91, 0.90, 0.895], [0.6, 0.7, 0.5]


def compared(control: str, tests: list[float]) -> Comparison:
    found = compare([*REAL, *rows(control, tests)], control, method="taylor")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("control", "tests", "text"),
    [
        ("shuffle", LOW, "taylor knows more than per-layer density"),
        ("shuffle", NEAR, "not shown that taylor knows more than per-layer density"),
        ("shuffle", HIGH, "not shown that taylor knows more than per-layer density"),
        ("random", LOW, "taylor beats chance"),
        ("random", NEAR, "not shown that taylor beats chance"),
        ("random", HIGH, "taylor is worse than chance"),
        ("invert", LOW, "the order of the scores matters"),
        ("invert", NEAR, "no sign that the scores carry information here"),
        ("invert", HIGH, "the scores carry no information here"),
        ("random-labels", LOW, "the labels are used"),
        ("random-labels", NEAR, "no sign that the labels are used"),
        ("random-labels", HIGH, "the labels do not help"),
        ("reinit", LOW, "the inherited weights matter"),
        ("reinit", NEAR, "no sign that the inherited weights matter, only the structure"),
        ("reinit", HIGH, "the structure matters, not the inherited weights"),
    ],
)
def test_what_a_control_says(control: str, tests: list[float], text: str) -> None:
    found = compared(control, tests)
    assert found.text.startswith(text)
    assert found.seeds == (0, 1, 2)
    assert found.shown is (tests is LOW)
    assert (found.after_cut is None) == (control == "reinit")


@pytest.mark.parametrize(
    ("tests", "knows", "text"),
    [
        (LOW, True, "taylor knows more"),
        (NEAR, False, "not shown"),
        (HIGH, False, "not shown"),
        ([0.90, 0.91, 0.89], False, "within two standard errors (exactly the same in all 3 seeds)"),
        ([0.80, 0.81, 0.79], None, "no verdict: the difference is +0.1 in all 3 seeds"),
        ([0.1, 0.2], None, "no verdict: it needs at least three seeds, and there are 2"),
        ([0.1], None, "no verdict: it needs at least three seeds, and there is 1"),
    ],
)
def test_the_verdict(tests: list[float], knows: bool | None, text: str) -> None:
    others = [compared("invert", LOW), compared("shuffle", tests)]
    found, words = verdict(others, "taylor", {})
    assert found is knows
    assert text in words


def test_no_verdict_without_the_shuffle() -> None:
    others = [compared("invert", LOW)]
    assert verdict(others, "taylor", {}) == (
        None,
        "no verdict on per-layer density: that needs the control shuffle (it was not asked for)",
    )
    assert "shuffle (out of memory)" in verdict(others, "t", {"shuffle": "out of memory"})[1]


def test_only_seeds_with_both_runs_are_compared() -> None:
    some = [row("invert", 1, 0.5), row("invert", 7, 0.1)]
    found = compare([*REAL, *some], "invert", method="taylor")
    assert found is not None
    assert found.seeds == (1,)
    assert found.test.mean == pytest.approx(0.41)
    assert compare([*REAL, row("invert", 7, 0.1)], "invert", method="taylor") is None


def test_what_training_healed_is_told() -> None:
    real = rows(None, [0.90, 0.91, 0.89], cuts=[0.8, 0.81, 0.82])
    found = compare([*real, *rows("shuffle", NEAR, cuts=[0.2, 0.3, 0.2])], "shuffle", method="t")
    assert found is not None
    assert found.text.startswith("not shown")
    assert found.text.endswith("Right after the last cut t is better: +0.577 ± 0.034")


def test_other_numbers_per_layer_leave_no_verdict() -> None:
    """A shuffled run that keeps other numbers differs in density as well."""
    shuffled = rows("shuffle", LOW)
    within = [replace(r, kept={"a": 9}) for r in shuffled]  # a hundredth of the units
    found = compare([*REAL, *within], "shuffle", method="taylor")
    assert found is not None
    assert found.text.startswith("taylor knows more")
    beyond = [*shuffled[:2], replace(shuffled[2], kept={"a": 10})]
    found = compare([*REAL, *beyond], "shuffle", method="taylor")
    assert found is not None
    assert found.text.startswith(
        "no verdict on per-layer density: taylor is better, but with seed 2 it kept 8 of 100 units "
        "of a, and the shuffled run 10"
    )
    assert verdict([found], "taylor", {})[0] is None


# --- rows on disk --------------------------------------------------------------------------------


def test_a_row_is_read_back_and_checked(tmp_path: Path) -> None:
    file = row_file(tmp_path, None, 3)
    assert file == tmp_path / "rows" / "criterion-seed3.json"
    made_by = {"recipe": {"budget": {"macs": 0.3}}, "torch": "2"}
    assert read_row(file, made_by) is None
    write_row(row(None, 3, 0.9), made_by, file)
    assert read_row(file, made_by) == row(None, 3, 0.9)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    now = {"recipe": {"budget": {"macs": 0.2}}, "torch": "2", "files": "x"}
    with pytest.raises(ConfigError) as caught:
        read_row(file, now)
    assert (
        "was made by another recipe or program: files was nothing, is x; recipe.budget.macs was "
        "0.3, is 0.2. Add --force" in str(caught.value)
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 1}', '{"format": 2, "made_by": {}, "row": {}}',
     '{"format": 1, "made_by": {}, "row": {"seed": 1}}'],
)  # fmt: skip
def test_a_damaged_row_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "shuffle-seed0.json"
    file.write_text(text)
    with pytest.raises(FileFormatError, match=r"shuffle-seed0\.json is no finished run.*Delete it"):
        read_row(file, {})


# --- recipes -------------------------------------------------------------------------------------

NETS = """
import os
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))

def read():
    x = torch.randn(64, 4)
    return {name: [(x, (x[:, 0] > 0).long())] for name in ("train", "validation", "test")}

def drifts():
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
    return build()

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.scale = build(), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.first(x) * self.scale

def soft():
    x = torch.randn(64, 4)
    pair = (x, {"label": (x[:, 0] > 0).long()})
    return {name: [pair] for name in ("train", "validation", "test")}

def soft_loss(outputs, targets): return nn.functional.cross_entropy(outputs, targets["label"])

def soft_metric(model, batches): return 0.5

def same():
    torch.manual_seed(0)
    return build()
"""
OWN: dict[str, Any] = {
    "model": "nets.py:build",
    "data": "nets.py:read",
    "budget": {"units": 0.5},
    "schedule": {"curve": "linear", "steps": 1},
    "finetune": {"steps": 2},
    "control": "all",
}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({k: v for k, v in {**OWN, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "controls"),
    [
        ({}, CONTROLS),
        ({"control": ["shuffle"]}, ("shuffle",)),
        ({"control": ["reinit", "shuffle"], "seeds": [4]}, ("reinit", "shuffle")),
        ({"control": "shuffle", "seeds": [0, 1]}, ("shuffle",)),
        ({"control": "shuffle"}, ()),
        ({"control": None}, ()),
    ],
)
def test_what_asks_for_a_comparison(changes: dict[str, Any], controls: tuple[str, ...]) -> None:
    asked = recipe(**changes)
    assert asked.controls == controls
    assert parse_recipe(asked.resolved()) == parse_recipe(asked.resolved())
    assert parse_recipe(asked.resolved()).controls == controls


STAGES: dict[str, Any] = {
    "budget": None, "schedule": None, "finetune": None,
    "stages": [
        {"threshold": {"rule": "quantile", "q": 0.3}, "granularity": "weight"},
        {"budget": {"units": 0.5}, "finetune": {"steps": 2}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"control": ["shufle"]}, "control: unknown control 'shufle'. Did you mean 'shuffle'?"),
        ({"control": []}, "control: an empty list; write for example control: [shuffle]"),
        ({"control": ["shuffle", "shuffle"]}, "control: shuffle is listed twice"),
        ({"seeds": []}, "seeds: an empty list; write for example seeds: [0, 1, 2]"),
        ({"seeds": [1, 1]}, "seeds: 1 is listed twice"),
        ({"seeds": [-1]}, "seeds.0: got -1"),
        ({"seeds": 3}, "seeds: got 3, should be a valid list"),
        ({"control": None, "seeds": [1, 2]}, "seeds: is for a comparison; add control: all"),
        ({**STAGES, "control": "shuffle"}, "stages: move control into a stage"),
        (
            {**STAGES, "stages": [{**STAGES["stages"][1], "control": "invert"}]},
            "stages.0.control: a comparison is of the whole run: put it beside stages",
        ),
        (
            {**STAGES, "control": None, "stages": [{**STAGES["stages"][1], "control": ["invert"]}]},
            "stages.0.control: a comparison is of the whole run: put it beside stages",
        ),
    ],
)
def test_a_faulty_comparison_is_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(**changes)
    assert text in str(caught.value)


def test_a_control_is_of_all_stages_and_a_fresh_start_of_the_last() -> None:
    asked = recipe(**STAGES)
    assert asked.controls == CONTROLS
    assert parse_recipe(asked.resolved()).control == "all"
    for control, expected in (
        (None, [None, None]),
        ("shuffle", ["shuffle", "shuffle"]),
        ("reinit", [None, "reinit"]),
    ):
        run = controlled(asked, control, 5)
        assert [stage.control for stage in run.all_stages()] == expected
        assert (run.seed, run.seeds, run.latency, run.controls) == (5, None, [], ())


def test_a_comparison_is_not_quietly_a_single_run(base: Path) -> None:
    asked = recipe().anchored(base)
    with pytest.raises(ConfigError, match=r"many runs. Use secateurs.ablation.ablate"):
        run_recipe(asked, load_problem(asked, base))
    with pytest.raises(ConfigError, match="no control to compare with"):
        check_ablation(recipe(control=None), base / "o", base=base)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs in this process; gives the names of the runs that were made."""
    from secateurs.ablation import run

    made: list[str] = []
    real = run._one

    def one(job: Any) -> Any:
        made.append(job.name)
        return real(job)

    monkeypatch.setattr(run, "worker_pool", inline_pool)
    monkeypatch.setattr(run, "_one", one)
    return made


def test_every_run_is_made_once(base: Path, inline: list[str]) -> None:
    asked = recipe(control=["shuffle", "reinit"], seeds=[3, 1])
    found = ablate(asked, base / "o", base=base)
    names = [f"{c}, seed {s}" for s in (3, 1) for c in ("the criterion", "shuffle", "reinit")]
    assert inline == names
    assert [(r.control, r.seed) for r in found.rows] == [
        (None, 3), (None, 1), ("shuffle", 3), ("shuffle", 1), ("reinit", 3), ("reinit", 1)
    ]  # fmt: skip
    assert found.knows_more is None
    assert "at least three seeds" in found.verdict
    written = json.loads((base / "o" / "ablation.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))

    # again: nothing is repeated, and the answer is the same
    assert ablate(asked, base / "o", base=base) == found
    assert inline == names
    # one row lost: that run only, and the same numbers
    lost = base / "o" / "rows" / "shuffle-seed1.json"
    before = json.loads(lost.read_text())["row"]
    lost.unlink()
    ablate(asked, base / "o", base=base)
    assert inline[6:] == ["shuffle, seed 1"]
    after = json.loads(lost.read_text())["row"]
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    # more seeds and controls: only what is new
    more = recipe(control=["shuffle", "invert", "reinit"], seeds=[3, 1, 2])
    assert check_ablation(more, base / "o", base=base).finished.keys()
    found = ablate(more, base / "o", base=base)
    assert len(inline[7:]) == 4 + 2
    assert len(found.rows) == 12
    assert found.knows_more is not None
    # the recipe that was written asks for the same
    assert parse_recipe(found.recipe).seeds == [3, 1, 2]


def test_a_row_is_what_the_run_gave(base: Path, inline: list[str]) -> None:
    asked = recipe(control=["invert"], seeds=[1])
    found = ablate(asked, base / "o", base=base)
    for control in (None, "invert"):
        (row,) = found.of(control)
        run = controlled(asked, control, 1).anchored(base)
        problem = load_problem(run, base)

        def evaluate(model: nn.Module, problem: Problem = problem) -> dict[str, float]:
            return problem.metric(model, problem.validation)

        result = prune_stages(
            problem.model, problem.train, problem.loss_fn, run.all_stages(), seed=1,
            example_inputs=problem.example_inputs,
            evaluate=evaluate,
        )  # fmt: skip
        assert row.test == problem.metric(result.model, problem.test)["accuracy"]
        assert row.dense == problem.metric(problem.model, problem.test)["accuracy"]
        assert row.after_cut == result.report.steps[-1].metric_masked
        assert row.kept == {"0:neuron": 6}
        assert row.units == {"0:neuron": 12}
        assert row.metric == "accuracy"


def test_another_recipe_is_refused_and_force_starts_over(base: Path, inline: list[str]) -> None:
    asked = recipe(control=["shuffle"], seeds=[0])
    ablate(asked, base / "o", base=base)
    other = recipe(control=["shuffle"], seeds=[0], budget={"units": 0.25})
    with pytest.raises(
        ConfigError, match=r"recipe\.budget\.units was 0\.5, is 0\.25\. Add --force"
    ):
        ablate(other, base / "o", base=base)
    (base / "nets.py").write_text(NETS + "\n# changed\n")
    with pytest.raises(ConfigError, match=r"files\..*nets\.py was"):
        ablate(asked, base / "o", base=base)
    assert len(inline) == 2
    found = ablate(other, base / "o", base=base, force=True)
    assert len(inline) == 4
    assert found.rows[0].kept == {"0:neuron": 3}


def test_results_of_a_single_run_are_left_alone(base: Path) -> None:
    (base / "o").mkdir()
    (base / "o" / "plan.json").write_text("{}")
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"a single run \(plan\.json\); choose another --out"):
            check_ablation(recipe(), base / "o", base=base, force=force)


def skipped(base: Path, **changes: Any) -> dict[str, str]:
    return check_ablation(recipe(**changes), base / "o", base=base).skipped


def test_what_cannot_be_run_is_skipped_with_its_reason(base: Path) -> None:
    assert skipped(base) == {}
    found = skipped(base, criterion="magnitude")
    assert found.keys() == {"random-labels"}
    assert "'magnitude' does not see the targets" in found["random-labels"]
    found = skipped(base, finetune=None)
    assert found.keys() == {"reinit"}
    assert "this recipe has no finetune" in found["reinit"]
    (base / "nets.py").write_text(NETS)
    found = skipped(base, model="nets.py:Odd", include="first.0:neuron")
    assert found.keys() == {"reinit"}
    assert "missing on the model (Odd)" in found["reinit"]
    found = skipped(base, budget=None, threshold={"rule": "mean"})
    assert found.keys() == {"random", "invert"}
    own = {"data": "nets.py:soft", "loss": "nets.py:soft_loss", "metric": "nets.py:soft_metric"}
    found = skipped(base, **own)
    assert found.keys() == {"random-labels"}
    assert "needs targets that are one tensor per batch" in found["random-labels"]
    with pytest.raises(ConfigError, match=r"none of the controls can be run.*\n  random-labels: "):
        skipped(base, control=["random-labels"], criterion="magnitude")


def test_a_skipped_control_is_in_the_results(base: Path, inline: list[str]) -> None:
    asked = recipe(control=["shuffle", "random-labels"], criterion="magnitude", seeds=[0])
    found = ablate(asked, base / "o", base=base)
    assert found.skipped.keys() == {"random-labels"}
    assert [c.control for c in found.comparisons] == ["shuffle"]
    assert not any("labels" in name for name in inline)


def test_a_dense_network_that_is_another_each_time_is_refused(
    base: Path, inline: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"with seed \d the dense network of .* is not that of"):
        ablate(recipe(model="nets.py:drifts", control=["shuffle"]), base / "o", base=base)
    assert not (base / "o" / "ablation.json").exists()


def test_one_dense_network_for_all_seeds_is_noted(base: Path, inline: list[str]) -> None:
    asked = recipe(model="nets.py:same", control=["shuffle"], seeds=[0, 1])
    (note,) = ablate(asked, base / "o", base=base).notes
    assert "the dense network is the same with every seed" in note
    assert ablate(recipe(control=["shuffle"], seeds=[0, 1]), base / "p", base=base).notes == ()


@pytest.mark.parametrize("control", ["invert", None])
def test_a_failed_run(
    base: Path, inline: list[str], monkeypatch: pytest.MonkeyPatch, control: str | None
) -> None:
    """A control's failure is reported and tried again; the criterion's own ends it all."""
    from secateurs.ablation import run

    real, broken = run._one, [True]

    def one(job: Any) -> Any:
        if broken and (job.control, job.seed) == (control, 1):
            return ScoringError("the loss is nan")
        return real(job)

    monkeypatch.setattr(run, "_one", one)
    asked = recipe(control=["shuffle", "invert"], seeds=[0, 1, 2])
    if control is None:
        with pytest.raises(ScoringError, match="the criterion, seed 1: the loss is nan"):
            ablate(asked, base / "o", base=base)
        assert (base / "o" / "rows" / "criterion-seed0.json").exists()
        return
    found = ablate(asked, base / "o", base=base)
    assert found.failed == {"invert, seed 1": "the loss is nan"}
    by_name = {c.control: c for c in found.comparisons}
    assert by_name["invert"].seeds == (0, 2)
    assert by_name["shuffle"].seeds == (0, 1, 2)
    broken.clear()
    assert ablate(asked, base / "o", base=base).failed == {}
    assert inline[-1] == "invert, seed 1"
