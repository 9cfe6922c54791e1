"""A search from end to end: the folds of all candidates, the choice, the chosen network, the files.

search(recipe, out=...) -> SearchResult
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from secateurs.ablation.plan import own_files, versions
from secateurs.bars import Progress
from secateurs.errors import ConfigError, PruningError
from secateurs.pipeline import PruneResult
from secateurs.recipe import Recipe
from secateurs.runner import RESULTS, Problem, check_output, load_problem, write_results
from secateurs.scoring import score
from secateurs.searching.config import Candidate, Search
from secateurs.searching.evaluation import Judge, conclude, prepare
from secateurs.searching.page import write_search
from secateurs.searching.plan import Snapshot, StudyPlan, delete_study, open_study
from secateurs.searching.results import FoldResult, SearchResult, Trial
from secateurs.searching.samplers import ADAPTIVE, Aim
from secateurs.searching.statistics import Design, standing
from secateurs.searching.study import Evaluate, after, work
from secateurs.searching.workers import run_workers
from secateurs.sensitivities import MeasuredSensitivity, sensitivity

__all__ = ["RESULT", "Watch", "check_search", "plan_of", "search"]

Watch = Callable[[Snapshot, str], None]
"""`watch(snapshot, best)`: how far the study is, and the best candidate so far in words."""

RESULT = "search.json"
FREE = ("trials", "max_drop", "confidence", "rule", "size")  # may change: no fold depends on them
CONCLUDED = "concluded"


def search(
    recipe: Recipe,
    problem: Problem | None = None,
    *,
    out: str | Path,
    base: Path | None = None,
    workers: int = 0,
    storage: str | None = None,
    name: str = "search",
    timeout: float | None = None,
    resume: bool = False,
    force: bool = False,
    watch: Watch | None = None,
    progress: Progress | bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> SearchResult:
    """Judge every candidate by cross-validation, choose, and make the chosen network.

    What is finished is kept fold by fold: the same call goes on where an earlier one was ended.
    With the samplers "grid" and "random" the choice depends neither on the number of workers nor
    on their order or death; with "tpe" and "nsga2" and several workers it does.

    Args:
        recipe: with a block `search`.
        problem: from `load_problem`; None: loaded from the recipe, as the workers do.
        out: directory of the results.
        base: directory of the recipe file.
        workers: processes that judge; 0: this process does, on one thread.
        storage: `postgresql://...` for several machines, which all make the same call; None: an
            SQLite file in `out`.
        name: of the study in the storage.
        timeout: seconds after which no fold is begun; the choice is then among what is finished.
        resume: go on also where `out` holds the results of an earlier call (with more trials, or
            after a timeout).
        force: throw earlier folds and results away.
        watch: called while the folds are judged.
        progress: called while the chosen network is made, as in `prune_stages`.
        say: called with what a user should know at once.

    Returns:
        the choice with all statistics; `final` is None where nothing was chosen, or where another
        machine makes the chosen network.

    Raises:
        ConfigError: the recipe has no search, another search has the name, or `out` holds results.
        PruningError: no candidate was finished, or what a worker raised.
    """
    out = Path(out)
    plain, recipe = recipe, recipe.anchored(base)
    check_search(recipe, problem, out, workers, resume=resume, force=force)
    judge = prepare(recipe, problem or load_problem(recipe, base, progress=_bar(progress)), base)
    plan = plan_of(judge, plain, storage or f"sqlite:///{out.absolute()}/study.db", name)
    if force:
        delete_study(plan)
    began = time.perf_counter()
    trials = _judged(judge, plan, recipe, base, workers, timeout, watch, say)
    if not trials:
        raise ConfigError(
            f"no candidate was finished in {timeout} seconds; what was begun is kept. Call again "
            "with a longer timeout"
        )
    notes = _notes(plan, trials)
    result = judge.result(trials)
    pruned, mine = None, _claim(plan, out)
    if mine is None:
        result, pruned = conclude(judge, result, out=str(out), progress=progress)
        notes = (*notes, *_read_before(plan, result))
    else:
        notes = (*notes, f"the chosen network is made by {mine}, which reads the test split")
    seconds = round(time.perf_counter() - began, 1)
    environment = {**result.environment, "workers": max(1, workers), "search_seconds": seconds}
    curves, why = _curves(judge, result, pruned, out, progress)
    result = replace(result, notes=(*result.notes, *notes, *why), environment=environment)
    _write(judge, result, pruned, curves, out)
    return result


def check_search(
    recipe: Recipe,
    problem: Problem | None,
    out: Path,
    workers: int,
    *,
    resume: bool = False,
    force: bool = False,
) -> None:
    """Find what is wrong with a call before anything is trained.

    Raises:
        ConfigError: arguments that do not fit, or a directory with results.
    """
    if workers < 0:
        raise ConfigError(f"workers must be at least 0, got {workers}")
    if workers and problem is not None:
        raise ConfigError(
            "worker processes load the problem from the recipe: give no problem, or workers=0"
        )
    if resume and force:
        raise ConfigError("resume keeps what is finished, force throws it away: give one of them")
    check_output(out, force or resume)
    if (out / RESULT).exists() and not (force or resume):
        raise ConfigError(
            f"{out} already holds {RESULT}. Add --resume to go on (after a time limit, or with "
            "more trials), --force to start over, or choose another --out"
        )


def plan_of(judge: Judge, recipe: Recipe, storage: str, name: str) -> StudyPlan:
    """The study of a search.

    Args:
        judge: of the search.
        recipe: as it was written: its paths are the same on every machine.
        storage, name: see `search`.
    """
    asked = judge.search
    resolved = recipe.resolved()
    kept = {k: v for k, v in asked.to_dict().items() if k not in FREE}
    if asked.sampler in ADAPTIVE:  # candidates depend on what is wanted
        kept = {k: v for k, v in asked.to_dict().items() if k != "trials"}
    files = {Path(file).name: key for file, key in own_files(judge.recipe).items()}
    made_by = {**judge.made_by, "recipe": {**resolved, "search": kept}, "files": files}
    wanted = _Wanted(asked, judge.design)
    return StudyPlan(
        storage=storage,
        name=name,
        space=asked.grid_space,
        n_folds=judge.n_folds,
        sampler=asked.sampler,
        n_trials=asked.trials,
        seed=judge.recipe.seed,
        aim=Aim(wanted.names, wanted.values, wanted.limits),
        made_by={**made_by, **versions()},
    )


# --- judging --------------------------------------------------------------------------------------


def _judged(
    judge: Judge,
    plan: StudyPlan,
    recipe: Recipe,
    base: Path | None,
    workers: int,
    timeout: float | None,
    watch: Watch | None,
    say: Callable[[str], None],
) -> list[Trial]:
    follow = None if watch is None else _follow(judge, watch)
    if workers:
        ready = partial(evaluator, recipe, base)
        return run_workers(plan, ready, workers=workers, timeout=timeout, progress=follow, say=say)
    with _one_thread(), open_study(plan) as study:
        work(study, judge, stop=after(timeout), progress=follow)
        return study.trials()


def evaluator(recipe: Recipe, base: Path | None) -> Evaluate:
    """What a worker process judges with: on one thread, so that results do not depend on it."""
    torch.set_num_threads(1)
    return prepare(recipe, load_problem(recipe, base), base)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _follow(judge: Judge, watch: Watch) -> Callable[[Snapshot], None]:
    """Adds the best candidate so far, looked for when one more is finished."""
    seen, words = 0, ""

    def follow(snapshot: Snapshot) -> None:
        nonlocal seen, words
        if snapshot.done != seen:
            seen, words = snapshot.done, _best(judge, snapshot.trials)
        watch(snapshot, words)

    return follow


def _best(judge: Judge, trials: Sequence[Trial]) -> str:
    result = judge.result(trials)
    chosen = result.chosen
    if chosen is None:
        front = judge.search.goal == "pareto"
        return f"{len(result.front)} on the front" if front else "none within the limit yet"
    sizes = ", ".join(f"{v:.3g} of the {k}" for k, v in list(chosen.remaining.items())[:1])
    return f"{chosen.candidate.text}: {result.metric} {chosen.metric:.4g}, {sizes}"


@dataclass(frozen=True)
class _Wanted:
    """What an adaptive sampler makes small under a search."""

    search: Search
    design: Design

    @property
    def names(self) -> tuple[str, ...]:
        asked = self.search
        size = "latency_ms" if asked.goal == "fastest" else asked.size
        if asked.bounded:
            return (size,)
        if asked.goal == "best":
            return ("loss of the metric",)
        return ("loss of the metric", size, *(["latency_ms"] if asked.goal == "pareto" else []))

    def values(self, folds: Sequence[FoldResult]) -> list[float]:
        return [self._value(name, folds) for name in self.names]

    def _value(self, name: str, folds: Sequence[FoldResult]) -> float:
        if name == "latency_ms":
            return median(math.inf if f.latency_ms is None else f.latency_ms for f in folds)
        if name == self.search.size:
            return fmean(f.remaining.get(name, math.inf) for f in folds)
        return (-1 if self.design.maximize else 1) * fmean(f.metric for f in folds)

    def limits(self, folds: Sequence[FoldResult]) -> dict[str, float]:
        """How far the bound on the drop is above the limit."""
        if not self.search.bounded or self.search.max_drop is None:
            return {}
        design = replace(self.design, level=1 - self.search.confidence)
        upper = standing(Trial(Candidate(0, {}), tuple(folds)), design).upper
        return {"drop": math.inf if upper is None else upper - self.search.max_drop}


# --- the end --------------------------------------------------------------------------------------


def _notes(plan: StudyPlan, trials: Sequence[Trial]) -> tuple[str, ...]:
    notes = []
    if len(trials) < plan.total:
        notes.append(
            f"the time limit ended the search after {len(trials)} of {plan.total} candidates: how "
            "many there were depends on the machine"
        )
    if plan.sampler in ADAPTIVE:
        notes.append(
            f"sampler {plan.sampler}: with several workers the candidates depend on who finishes "
            "first; with one worker, or with grid and random, a search repeats itself"
        )
    return tuple(notes)


def _claim(plan: StudyPlan, out: Path) -> str | None:
    """None: the chosen network is made here; else the machine and directory that make it.

    Several machines may finish one study together; the test split is for one of them.
    """
    here = f"{socket.gethostname()}:{out.absolute()}"
    with open_study(plan) as study:
        first = str(study.store.settle(study.study_id, CONCLUDED, here))
    return None if first == here else first


def _read_before(plan: StudyPlan, result: SearchResult) -> tuple[str, ...]:
    """A note if an earlier call has chosen already, from fewer candidates."""
    if result.final is None or result.choice.candidate is None:
        return ()
    with open_study(plan) as study:
        reads: dict[str, Any] = study.store.get_study_user_attrs(study.study_id)
        before = [reads[k] for k in sorted(reads) if k.startswith(f"{CONCLUDED} ")]
        said = {"trials": len(result.trials), "choice": result.choice.candidate.text}
        if said not in before:
            study.store.settle(study.study_id, f"{CONCLUDED} {len(before)}", said)
    others = [one for one in before if one != said]
    if not others:
        return ()
    earlier = "; ".join(f"after {one['trials']} candidates for {one['choice']}" for one in others)
    return (f"the test split was read before in this search ({earlier}): it has been used more "
            "than once",)  # fmt: skip


def _write(
    judge: Judge,
    result: SearchResult,
    pruned: PruneResult | None,
    curves: MeasuredSensitivity | None,
    out: Path,
) -> None:
    """The result for people and as JSON; the chosen network, as `secateurs run` writes it."""
    out.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:  # of an earlier choice
        (out / name).unlink(missing_ok=True)
    if pruned is not None:
        assert result.choice.candidate is not None
        write_results(pruned, judge.recipe_of(result.choice.candidate), out, force=True)
    write_search(result, out, curves)
    part = out / f"{RESULT}.part"
    part.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    os.replace(part, out / RESULT)


def _curves(
    judge: Judge,
    result: SearchResult,
    pruned: PruneResult | None,
    out: Path,
    progress: Progress | bool,
) -> tuple[MeasuredSensitivity | None, tuple[str, ...]]:
    """What each target alone can lose, on validation data, and why that could not be measured."""
    if pruned is None or result.choice.candidate is None:
        return None, ()
    problem, graph = judge.problem, pruned.scores.graph
    stage = judge.recipe_of(result.choice.candidate).all_stages()[-1]
    show = _bar(progress)

    def tell(name: str, done: int, total: int) -> None:
        if show is not None:
            show(f"sensitivity: {name}", done, total)

    try:
        scores = score(
            problem.model, problem.calibration, problem.loss_fn, criterion=stage.criterion,
            graph=graph, granularity=stage.granularity,
        )  # fmt: skip
        found = sensitivity(
            problem.model, problem.validation, problem.loss_fn, scores=scores,
            cache=out / "sensitivity.json", progress=tell,
        )  # fmt: skip
    except PruningError as error:
        return None, (f"no sensitivity curves: {error}",)
    return found, ()


def _bar(progress: Progress | bool) -> Progress | None:
    return progress if callable(progress) else None
