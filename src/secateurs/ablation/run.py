"""All runs of a comparison, in worker processes; finished ones are kept and not repeated."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save as to_bytes
from torch import nn

from secateurs.ablation.plan import Job, check_ablation, versions
from secateurs.ablation.rows import Row, write_row
from secateurs.ablation.verdict import RULE, Comparison, compare, verdict
from secateurs.bars import Progress
from secateurs.criteria import get_criterion
from secateurs.errors import ConfigError, PruningError
from secateurs.recipe import Recipe
from secateurs.report.data import plain
from secateurs.runner import load_problem, run_recipe
from secateurs.surgery.storage import stored_tensors
from secateurs.tasks import dense_checkpoint, get_task
from secateurs.workers import worker_pool

__all__ = ["Ablation", "ablate"]

FORMAT = 1


@dataclass(frozen=True)
class Ablation:
    """A criterion beside its controls.

    Attributes:
        title: of the problem.
        method: what the criterion is called.
        metric: name of the test metric; the one right after the cut is its validation value.
        better: which way it is better.
        seeds: as asked.
        rows: all runs, the criterion first.
        comparisons: one for each control that was run.
        skipped: control -> why it cannot be run on this recipe.
        failed: runs that ended with an error, "control, seed" -> the error.
        knows_more: whether the criterion is shown to know more than per-layer density; None when
            no verdict is possible.
        verdict: the same in words.
        notes: what a reader should know besides.
        recipe: of the whole comparison.
        rule: when a difference counts.
    """

    title: str
    method: str
    metric: str
    better: Literal["higher", "lower"]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    skipped: dict[str, str]
    failed: dict[str, str]
    knows_more: bool | None
    verdict: str
    notes: tuple[str, ...]
    recipe: dict[str, Any]
    rule: str = RULE
    made_with: dict[str, str] = field(default_factory=versions)

    def of(self, control: str | None) -> tuple[Row, ...]:
        """The rows of one control, or of the criterion itself (None)."""
        return tuple(row for row in self.rows if row.control == control)

    def to_dict(self) -> dict[str, Any]:
        """As lists, dicts, text, numbers and None: ready for `json.dumps`."""
        return {"format": FORMAT, **plain(self, "ablation")}


def ablate(
    recipe: Recipe,
    out: Path,
    *,
    base: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Ablation:
    """Run a recipe and its controls over several seeds, and say what the differences show.

    Every run of a seed has the same data, dense network, budget, schedule and training, on one
    thread, in as many processes as there are cores. The test split is read once per run, at the
    end, and nothing is chosen by it. A run that is finished is kept as a file in `out/rows` and
    not repeated by a later call; `out/ablation.json` and `out/recipe.yaml` are written at the end.

    Args:
        recipe: with `control` a list or "all", or one name with `seeds`. Without `seeds`, three
            from `seed` on.
        out: directory of the results.
        base: directory of the recipe file, where the user's own files are looked for first.
        force: throw finished runs away and start over.
        progress: called with (what, runs done, runs in all).

    Raises:
        ConfigError: no control is asked for, or none can be run; finished runs were made by
            another recipe; the dense network of a seed is not the same in all its runs.
        FileFormatError: the file of a finished run is damaged.
        PruningError: the criterion's own run fails. A control's failure is reported instead.
    """
    recipe = recipe.anchored(base)
    todo = check_ablation(recipe, out, base=base, force=force)
    if force:
        for file in (out / "rows").glob("*-seed*.json"):
            file.unlink()
    rows, failed = dict(todo.finished), dict[str, str]()
    _work([job for job in todo.jobs if job not in rows], rows, failed, progress)
    ordered = [rows[job] for control in (None, *recipe.controls) for job in todo.jobs
               if job in rows and job.control == control]  # fmt: skip
    recipe = recipe.model_copy(update={"seeds": list(todo.seeds)})
    found = _summary(recipe, todo.problem.name, ordered, todo.skipped, failed)
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False)
    (out / "ablation.json").write_text(text + "\n", encoding="utf-8")
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return found


def _work(
    jobs: Sequence[Job],
    rows: dict[Job, Row],
    failed: dict[str, str],
    progress: Progress | None,
) -> None:
    """Run what is left; fills `rows` and `failed`."""
    done, total = len(rows), len(rows) + len(jobs)

    def tell(what: str) -> None:
        if progress is not None:
            progress(what, done, total)

    if done:
        tell(f"{done} of {total} runs are finished already")
    _check_dense(rows.values())
    with worker_pool(len(jobs)) as pool:
        if jobs and jobs[0].recipe.task is not None:
            runs = {job.seed: job.recipe for job in jobs}
            tell(f"train the dense network, {len(runs)} seeds (the first time only)")
            list(pool.map(_train, runs.values()))  # two workers must not train the same
        futures: dict[Future[Row | PruningError], Job] = {pool.submit(_one, j): j for j in jobs}
        for future in as_completed(futures):
            job, found = futures[future], future.result()
            done += 1
            tell(job.name)
            if isinstance(found, Row):
                rows[job] = found
                _check_dense(rows.values())
            elif job.control is None:
                raise type(found)(f"{job.name}: {found}") from found
            else:
                failed[job.name] = str(found)


def _train(recipe: Recipe) -> None:
    assert recipe.task is not None
    dense_checkpoint(get_task(recipe.task), recipe.seed, full_data=recipe.full_data)


def _one(job: Job) -> Row | PruningError:
    """One run in a worker; its row is on disk before anybody hears of it."""
    begin = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):  # what the user's functions print: stdout is for data
            problem = load_problem(job.recipe, job.base)
            weights = _hash(problem.model)
            report = run_recipe(job.recipe, problem).report
    except PruningError as error:
        return error
    kept = [step for step in report.steps if not step.rolled_back]
    main, cut = report.rows[0], kept[-1].metric_masked
    assert main.name.startswith("test ")
    assert main.before is not None
    assert main.after is not None
    assert cut is not None
    row = Row(
        control=job.control,
        seed=job.seed,
        dense=main.before,
        test=main.after,
        after_cut=cut,
        kept={target.name: target.n_kept for target in report.targets},
        units={target.name: target.n_units for target in report.targets},
        reached=report.reached,
        metric=main.name.removeprefix("test "),
        dense_weights=weights,
        seconds=round(time.perf_counter() - begin, 2),
    )
    write_row(row, job.made_by, job.file)
    return row


def _hash(model: nn.Module) -> str:
    return hashlib.sha256(to_bytes(stored_tensors(model, {}))).hexdigest()[:16]


def _check_dense(rows: Iterable[Row]) -> None:
    """All runs of a seed start from one network: else they are not paired."""
    first: dict[int, Row] = {}
    for row in rows:
        other = first.setdefault(row.seed, row)
        if other.dense_weights != row.dense_weights:
            names = [r.control or "the criterion" for r in (other, row)]
            raise ConfigError(
                f"with seed {row.seed} the dense network of {names[1]} is not that of {names[0]}, "
                "so the runs cannot be compared. The model function must return the same weights "
                "whenever it is called: load them from a file, or train on one thread without "
                "setting a random state of its own. Then start over with --force"
            )


def _summary(
    recipe: Recipe,
    title: str,
    rows: Sequence[Row],
    skipped: dict[str, str],
    failed: dict[str, str],
) -> Ablation:
    method = " then ".join(
        dict.fromkeys(
            get_criterion(stage.criterion).label
            if stage.layerwise is None
            else stage.layerwise.method
            for stage in recipe.all_stages()
        )
    )
    compared = partial(compare, rows, method=method, maximize=recipe.maximize)
    comparisons = [c for name in recipe.controls if (c := compared(name)) is not None]
    missing = skipped | {job.partition(",")[0]: why for job, why in failed.items()}
    knows_more, words = verdict(comparisons, method, missing)
    return Ablation(
        title=title,
        method=method,
        metric=rows[0].metric,
        better="higher" if recipe.maximize else "lower",
        seeds=tuple(recipe.seeds or ()),
        rows=tuple(rows),
        comparisons=tuple(comparisons),
        skipped=skipped,
        failed=failed,
        knows_more=knows_more,
        verdict=words,
        notes=tuple(_notes(rows)),
        recipe=recipe.resolved(),
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    real = [row for row in rows if row.control is None]
    notes = []
    if len(real) > 1 and len({row.dense_weights for row in real}) == 1:
        notes.append(
            "the dense network is the same with every seed: the seeds vary the control and the "
            "training after the cut only, so the verdict is about this one network"
        )
    return notes
