"""What a candidate is worth on a fold, and what comes of all of them.

prepare(recipe, problem) -> Judge
judge(candidate, fold) -> FoldResult        for the study; the order does not matter
judge.result(trials) -> SearchResult        the choice
conclude(judge, result) -> SearchResult, PruneResult     the test split, once
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from secateurs.asked.dotted import set_value
from secateurs.bars import Progress
from secateurs.batches import preserve
from secateurs.errors import ConfigError, PruningError
from secateurs.latency import compare_latency
from secateurs.measurement import measure
from secateurs.pipeline import PruneResult, Stage, check_request
from secateurs.pipeline.entry import cut_stages
from secateurs.recipe import Recipe, parse_recipe
from secateurs.report.assemble import metrics_of, stored_bytes
from secateurs.report.gather import environment
from secateurs.runner import Problem, run_recipe
from secateurs.searching.choice import decide, front, judge
from secateurs.searching.config import Candidate, Search
from secateurs.searching.folding import Ground, Part, lay, seed_of
from secateurs.searching.results import Final, FoldResult, SearchResult, Trial
from secateurs.searching.statistics import Design
from secateurs.surgery.shrinking import slice_masks
from secateurs.types import Batches, Budget, Plan

__all__ = ["Judge", "conclude", "prepare", "with_values"]

KEPT_OUT = (
    "task", "model", "data", "loss", "metric", "fit", "maximize", "seed", "seeds", "search",
    "latency", "full_data", "control",
)  # fmt: skip
N_CHECKED = 50


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe of a candidate: without the search, and with its values.

    Raises:
        ConfigError: a key or value does not fit the recipe.

    Example:
        >>> recipe = parse_recipe({"task": "digits-cnn", "budget": {"macs": 0.5}})
        >>> with_values(recipe, {"budget.macs": 0.25}).budget
        Budget(macs=0.25)
    """
    data = recipe.model_dump(mode="json", exclude_unset=True, exclude={"search", "fit"})
    for key, value in values.items():
        set_value(data, key, value, "search.space")
    return parse_recipe(data, f"candidate {Candidate(0, values).text}")


class Judge:
    """Judges candidates of one search, fold by fold.

    Attributes:
        recipe, search: what is searched; the mode is settled.
        ground: samples, folds and the lock of the test split.
        metric: name of the main metric.
    """

    def __init__(self, recipe: Recipe, ground: Ground, metric: str) -> None:
        self.recipe, self.search, self.ground = recipe, ground.search, ground
        self.problem = ground.problem
        self.metric = metric
        self._dense: dict[int, tuple[float, bool]] = {}

    @property
    def n_folds(self) -> int:
        """Folds of every candidate."""
        return len(self.ground.folds)

    @property
    def design(self) -> Design:
        """What the statistics must know about the folds."""
        return Design(self.n_folds, self.ground.overlap, self.ground.n_judged, self.recipe.maximize)

    @property
    def made_by(self) -> dict[str, Any]:
        """What must be equal for results to belong together: recipe and data, as JSON."""
        return {"recipe": self.recipe.resolved(), "mode": self.search.mode,
                "data": self.ground.data_key}  # fmt: skip

    def recipe_of(self, candidate: Candidate) -> Recipe:
        """What the candidate would run as."""
        return with_values(self.recipe, candidate.values)

    def __call__(self, candidate: Candidate, fold: int) -> FoldResult:
        """Prune the fold's dense network by the candidate, and judge it on the held-out part.

        The result depends on the candidate's values and the fold, not on its number or the order.

        Raises:
            PruningError: the candidate cannot be judged (its budget is out of reach, ...).
        """
        begin = time.perf_counter()
        recipe, part = self.recipe_of(candidate), self.ground.part(fold)
        dense, share = self._dense_of(part, fold)
        small, plan = self._cut(recipe, part, seed_of(recipe.seed, dict(candidate.values), fold))
        return FoldResult(
            fold=fold,
            dense=dense,
            metric=self._main(small, part.held),
            remaining=self._remaining(small, plan),
            latency_ms=self._latency(small) if self.search.goal in ("fastest", "pareto") else None,
            seconds=time.perf_counter() - begin,
            samples=part.n_held,
            share=share,
        )

    def _cut(self, recipe: Recipe, part: Part, seed: int) -> tuple[nn.Module, Plan]:
        stages, problem, inner = recipe.all_stages(), self.problem, part.inner
        evaluate = None if inner is None else lambda model: problem.metric(model, inner)
        graph = check_request(
            part.dense, part.train, problem.loss_fn, stages, example_inputs=problem.example_inputs,
            calibration=part.calibration, evaluate=evaluate, include=recipe.include,
            exclude=recipe.exclude, outputs=recipe.outputs or (), norm=recipe.norm,
            form=recipe.form,
        )  # fmt: skip
        return cut_stages(
            part.dense, part.train, problem.loss_fn, stages,
            example_inputs=problem.example_inputs, graph=graph, evaluate=evaluate,
            calibration=part.calibration, norm=recipe.norm, maximize=recipe.maximize,
            form=recipe.form, seed=seed,
        )  # fmt: skip

    def _main(self, model: nn.Module, batches: Batches) -> float:
        with preserve(model):
            return next(iter(metrics_of(model, lambda m: self.problem.metric(m, batches)).values()))

    def _dense_of(self, part: Part, fold: int) -> tuple[float, bool]:
        """Main metric of the fold's dense network, and whether it is a share of samples."""
        if fold not in self._dense:
            whole = self._main(part.dense, part.held)
            self._dense[fold] = whole, self._is_share(part, whole)
        return self._dense[fold]

    def _is_share(self, part: Part, whole: float) -> bool:
        """Whether the metric counts samples: whole numbers, and those of two halves add up."""
        sizes = part.n_held // 2, part.n_held - part.n_held // 2
        if not 0 <= whole <= 1 or not sizes[0]:
            return False
        try:
            counts = [
                self._main(part.dense, half) * n for half, n in zip(part.halves, sizes, strict=True)
            ]
        except PruningError:  # an AUC needs both classes, and a half may lack one
            return False
        counted = all(abs(c - round(c)) < 1e-4 for c in counts)
        return counted and abs(sum(counts) - whole * part.n_held) < 1e-4

    @cached_property
    def _dense_sizes(self) -> dict[str, float]:
        model = self.problem.model
        found = measure(model, self.problem.example_inputs, latency=False)
        return {"macs": found.macs, "params": found.params, "bytes": stored_bytes(model, {})}

    def _remaining(self, small: nn.Module, plan: Plan) -> dict[str, float]:
        found = measure(small, self.problem.example_inputs, latency=False)
        left = {
            "macs": found.macs, "params": found.nonzeros,
            "bytes": stored_bytes(small, slice_masks(plan)),
        }  # fmt: skip
        return {name: left[name] / dense for name, dense in self._dense_sizes.items() if dense}

    def _latency(self, small: nn.Module) -> float:
        sizes = self.recipe.latency[:1] or None
        rows = compare_latency({"small": small}, self.problem.example_inputs, sizes)
        return rows["small"][0].median_ms

    def result(self, trials: Sequence[Trial]) -> SearchResult:
        """The statistics of all candidates, and the choice; the test split stays unread."""
        maximize = self.recipe.maximize
        found = judge(trials, self.search, self.design)
        return SearchResult(
            title=self.problem.name,
            metric=self.metric,
            maximize=maximize,
            settings=self.search.to_dict(),
            recipe=self.recipe.resolved(),
            trials=tuple(sorted(trials, key=lambda t: t.candidate.number)),
            standings=tuple(found),
            front=tuple(front(found, maximize)),
            choice=decide(found, self.search, metric=self.metric, maximize=maximize),
            notes=(self._mode_note(), *self.ground.notes),
            environment=environment(self.recipe.seed),
        )

    def _mode_note(self) -> str:
        n, k = self.ground.n_judged, self.n_folds
        if self.search.mode == "refit":
            return (
                f"mode refit: training and validation samples were pooled, and each of {k} folds "
                f"trained and pruned a dense network of its own; {n} samples judged"
            )
        return (
            f"mode fixed: the given dense network, pruned {k} times with other seeds and judged on "
            f"{k} disjoint parts of the {n} validation samples; how much the training data matters "
            "is not seen"
        )


def prepare(recipe: Recipe, problem: Problem, base: Path | None = None) -> Judge:
    """Check a search and read its data; nothing is pruned or trained yet.

    Args:
        recipe: with a block `search`.
        problem: from `load_problem`.
        base: directory of the recipe file.

    Raises:
        ConfigError: there is no search, a candidate is no valid recipe, or the mode does not fit.
        DataError: the data cannot be divided, or the test split occurs in other data.
    """
    search = recipe.search
    if search is None:
        raise ConfigError(
            "this recipe has no search; add for example\n"
            "search: {space: {budget.macs: [0.5, 0.3, 0.2, 0.1]}, max_drop: 0.01}"
        )
    if recipe.controls:
        raise ConfigError("a search chooses by folds, not by controls: leave control and seeds")
    stages = [stage for one in _recipes(recipe, search) for stage in one.all_stages()]
    ground = lay(recipe, problem, decides=any(map(_decides, stages)), base=base)
    problem = ground.problem  # its test split is locked
    with preserve(problem.model):
        names = metrics_of(problem.model, lambda m: problem.metric(m, problem.validation))
    return Judge(recipe, ground, next(iter(names)))


def _recipes(recipe: Recipe, search: Search) -> Iterator[Recipe]:
    """The recipes of the candidates, each checked: all of a grid, else a sample of the space."""
    for key in search.space:
        if key.partition(".")[0] in KEPT_OUT:
            raise ConfigError(f"search.space.{key}: {key!r} cannot be searched")
    space = search.grid_space
    tried = space.grid() if search.sampler == "grid" else space.sampled(N_CHECKED, 0)
    for candidate in tried:
        yield with_values(recipe, candidate.values)


def _decides(stage: Stage) -> bool:
    """Whether pruning looks at a metric along the way."""
    trains = any(
        config is not None and (config.patience is not None or config.restore_best)
        for config in (stage.prepare, stage.finetune)
    )
    limited = stage.max_drop is not None or not isinstance(stage.budget, (Budget, type(None)))
    return trains or limited or stage.wants_drop


def conclude(
    judge: Judge, result: SearchResult, *, out: str = "", progress: Progress | bool = False
) -> tuple[SearchResult, PruneResult | None]:
    """Make the chosen network, and read the test split: once, here.

    The problem's own dense network is pruned by the chosen recipe, as `secateurs run` would.

    Args:
        judge: of the search.
        result: from `judge.result`; without a choice nothing is made and the test stays unread.
        out: directory of the results, for suggestions in the report.
        progress: as in `prune_stages`.

    Raises:
        DataError: the test split was read before.
    """
    candidate = result.choice.candidate
    if candidate is None:
        return result, None
    problem, lock = judge.problem, judge.ground.lock
    use = lock.unlock("the final figures of the search")

    def metric(model: nn.Module, batches: Batches) -> dict[str, float]:
        if batches is not lock:
            return problem.metric(model, batches)
        with use:
            return problem.metric(model, batches)

    try:
        pruned = run_recipe(
            judge.recipe_of(candidate), replace(problem, metric=metric), out=out, progress=progress
        )
    finally:
        use.close()
    rows = {row.name: row for row in pruned.report.rows}
    test, validation = rows[f"test {result.metric}"], rows[f"validation {result.metric}"]
    assert test.before is not None
    assert test.after is not None
    sign = 1 if result.maximize else -1
    limit = judge.search.max_drop
    final = Final(
        metric=result.metric,
        validation_dense=validation.before,
        validation=validation.after,
        test_dense=test.before,
        test=test.after,
        remaining=judge._remaining(pruned.model, pruned.plan),
        samples=dict(problem.sizes),
        within=None if limit is None else sign * (test.before - test.after) <= limit + 1e-12,
    )
    return replace(result, final=final), pruned
