"""A recipe and a problem through the pipeline, to a result with a report for people."""

from __future__ import annotations

import shlex
from dataclasses import replace

from secateurs.bars import Progress
from secateurs.boards import BoardLog
from secateurs.checkpoints import Checkpoints
from secateurs.distributed import Group, ranks_of
from secateurs.errors import ConfigError
from secateurs.finetuning import Finetune
from secateurs.pipeline import PruneResult, check_request, prune_stages
from secateurs.pipeline.peers import Peers
from secateurs.recipe import Recipe
from secateurs.report import check_available
from secateurs.report.data import Report
from secateurs.runner.problem import Problem
from secateurs.tasks.base import Metric
from secateurs.types import Batches, Budget, Evaluate, Graph

__all__ = ["check_recipe", "run_recipe", "suggestions"]


def check_recipe(recipe: Recipe, problem: Problem, *, group: Group = None) -> Graph:
    """Find what is wrong with a run before anything expensive; returns the graph.

    Args:
        recipe: what is to be done.
        problem: from `load_problem`, for the same group.
        group: the processes that will do it.

    Raises:
        PruningError: whatever `check_request` raises.
    """
    peers = Peers(ranks_of(group))
    peers.check(problem.model, recipe.all_stages())
    return check_request(
        problem.model, problem.train, problem.loss_fn, recipe.all_stages(),
        example_inputs=problem.example_inputs, calibration=problem.calibration,
        evaluate=_on(problem.metric, problem.validation), include=recipe.include,
        exclude=recipe.exclude, outputs=recipe.outputs or (), norm=recipe.norm, form=recipe.form,
        latency=recipe.latency, peers=peers,
    )  # fmt: skip


def run_recipe(
    recipe: Recipe,
    problem: Problem,
    *,
    out: str = "",
    progress: Progress | bool = False,
    log: BoardLog | None = None,
    checkpoint: Checkpoints | None = None,
    resume: bool = False,
    group: Group = None,
) -> PruneResult:
    """Prune a problem by its recipe.

    Args:
        recipe: what to do.
        problem: from `load_problem`.
        out: the directory of the results, for the suggestions in the report.
        progress, log, checkpoint, resume, group: as in `prune_stages`; `problem` is of this
            process then, from `load_problem(group=)`.

    Raises:
        ConfigError: the recipe asks for a comparison with controls, which is many runs.
        MissingDependencyError: the packages that draw the report are not installed.
        PruningError: whatever `prune_stages` raises.
    """
    if recipe.controls:
        raise ConfigError(
            f"this recipe compares its criterion with {', '.join(recipe.controls)}: many runs. "
            "Use secateurs.ablation.ablate, or leave control (and seeds) away for one run"
        )
    if recipe.search is not None:
        raise ConfigError(
            "this recipe searches: many runs. Use `secateurs search`, or take the block search: "
            "away for one run"
        )
    check_available()
    result = prune_stages(
        problem.model,
        problem.train,
        problem.loss_fn,
        recipe.all_stages(),
        example_inputs=problem.example_inputs,
        calibration=problem.calibration,
        evaluate=_on(problem.metric, problem.validation),
        test=_on(problem.metric, problem.test),
        include=recipe.include,
        exclude=recipe.exclude,
        outputs=recipe.outputs or (),
        norm=recipe.norm,
        maximize=recipe.maximize,
        form=recipe.form,
        seed=recipe.seed,
        latency=recipe.latency,
        progress=progress,
        log=log,
        checkpoint=checkpoint,
        resume=resume,
        group=group,
    )
    sizes = ", ".join(f"{n} {split}" for split, n in problem.sizes.items())
    notes: tuple[str, ...] = (f"samples: {sizes}",) if sizes else ()
    headline = result.report.headline
    if recipe.start == "untrained":
        headline += " Before, the network was not trained."
        whose = (
            f"as built under seed {recipe.seed}" if recipe.task else f"as {recipe.model} gave it"
        )
        notes += (
            f"start: untrained. Metrics 'before' and 'dense' are those of the untrained network, "
            f"{whose}: they say what chance gives, not what a trained dense network can do",
        )
    result.report = replace(
        result.report,
        headline=headline,
        title=problem.name,
        recipe=recipe.resolved(),
        notes=(*notes, *result.report.notes),
        next_steps=suggestions(recipe, result.report, out),
    )
    return result


def _on(metric: Metric, batches: Batches) -> Evaluate:
    return lambda model: metric(model, batches)


def suggestions(recipe: Recipe, report: Report, out: str) -> tuple[str, ...]:
    """Three things to try next, as commands."""
    where = out or "OUT"
    key = f"stages.{len(recipe.stages) - 1}." if recipe.stages else ""
    stage = recipe.all_stages()[-1]

    def again(name: str, *changes: str) -> str:
        sets = " ".join(f"--set {shlex.quote(key + change)}" for change in changes)
        recipe = shlex.quote(f"{where}/recipe.yaml")
        return f"secateurs run {recipe} {sets} --out {shlex.quote(f'{where}-{name}')}"

    lines = []
    sizes = stage.budget.sizes if isinstance(stage.budget, Budget) else {}
    shares = {name: amount for name, amount in sizes.items() if isinstance(amount, float)}
    if shares:
        quantity, share = next(iter(shares.items()))
        word, share = ("deeper", share / 2) if _hardly_lost(report) else (
            "less deep", min(1.5 * share, (1 + share) / 2)
        )  # fmt: skip
        change = f"budget.{quantity}={share:.3g}"
        lines.append(f"cut {word}: {again(word.replace(' ', '-'), change)}")
    else:
        config = stage.finetune or Finetune(epochs=5)
        name = "epochs" if config.steps is None else "steps"
        change = f"finetune.{name}={2 * (getattr(config, name) or 1)}"
        lines.append(f"heal longer: {again('longer', change)}")
    if stage.at_init is not None:
        chance = "at_init=null", "criterion=random", "schedule={curve: one_shot, steps: 1}"
        lines.append(f"is {stage.at_init.method} better than chance? {again('random', *chance)}")
    elif stage.fisher_masks is not None:
        chance = "fisher_masks=null", "criterion=random", "schedule={curve: one_shot, steps: 1}"
        repair = ("repair=[reconstruct]",) if stage.fisher_masks.tune == "weights" else ()
        lines.append(f"is the search better than chance? {again('random', *chance, *repair)}")
    elif stage.ticket is not None:
        lines.append(f"is the ticket better than chance? {again('random', 'criterion=random')}")
    elif stage.layerwise is not None and stage.control is None:
        changes = ["layerwise=null", "criterion=random"]
        if stage.layerwise.method == "sparsegpt" and "reconstruct" not in stage.repair:
            changes.append(f"repair=[{', '.join(['reconstruct', *stage.repair])}]")
        method = stage.layerwise.method
        lines.append(f"is {method} better than chance? {again('random', *changes)}")
    elif stage.control is None:
        control = "random" if stage.budget is not None else "shuffle"
        lines.append(f"is the criterion better than chance? {again(control, f'control={control}')}")
    else:
        lines.append(f"the criterion itself, not its control: {again('method', 'control=null')}")
    if recipe.task is None:
        lines.append(f'use it: secateurs.load("{where}", factory), factory: {recipe.model}')
    else:
        lines.append(f'use it: secateurs.load("{where}", get_task("{recipe.task}").build)')
    return tuple(lines)


def _hardly_lost(report: Report) -> bool:
    """Whether the main metric fell by no more than a hundredth of itself."""
    main = report.rows[0]
    if main.before is None or main.after is None:
        return True
    lost = main.before - main.after if main.better == "higher" else main.after - main.before
    return lost <= 0.01 * abs(main.before)
