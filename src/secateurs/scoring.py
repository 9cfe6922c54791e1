"""Scores of every unit, for many criteria from one pass over the batches.

    Graph, batches, loss, criteria  ->  Scores   {target: (n_units,) float32}, larger = keep

A criterion says which statistics it needs and in which order they are reduced; this room computes
each statistic once for all criteria that need it. A batch costs one forward and backward pass,
whatever the number of criteria, plus one pass for each sample where a per-sample gradient cannot
be had from hooks, plus one pass for each unit for finite differences. The model comes back as it
was: weights, gradients, buffers, modes, random state and hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.batches import check_batches, in_mode, iterate, model_device, preserve
from secateurs.criteria import Criterion, get_criterion
from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics import Job, Pass, check_fits, make_job
from secateurs.types import Batches, Graph, LossFn, Plan, Scores, Target, WeightTarget

__all__ = ["score", "score_many"]

Progress = Callable[[int, int | None], None]
CriterionLike = str | Mapping[str, Any] | Criterion


def score(
    model: nn.Module,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    *,
    criterion: CriterionLike = "taylor",
    graph: Graph | None = None,
    granularity: str | Iterable[str] = "structured",
    previous: Plan | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    max_seconds: float = 3600.0,
) -> Scores:
    """Scores of every unit: larger = keep.

    Args:
        model: scored in eval mode and left exactly as it was.
        batches: re-iterable of `(inputs, targets)`; not needed by criteria that see weights only.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the samples.
        criterion: a name, a mapping with options, or a `Criterion`.
        graph: from `trace`; None traces the model on the inputs of the first batch.
        granularity: kinds of units, or "structured".
        previous: units that it removed score `-inf`.
        max_batches: use at most that many batches.
        seed: of models that draw random numbers, and of random criteria.
        progress: called with (batches done, batches in all or None).
        max_seconds: criteria that run the model for every unit refuse to take longer.

    Returns:
        `Scores` with one (n_units,) float32 tensor for each target.

    Raises:
        ConfigError: an unknown option, missing batches or loss, or nothing that can be scored.
        DataError, CaptureError: batches that do not fit the model.
        ScoringError: a loss, gradient or activation that is not finite.

    Example:
        >>> from secateurs.types import WeightTarget
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> graph = Graph({"weight": WeightTarget("weight", (1, 2))})
        >>> score(net, graph=graph, criterion="magnitude", granularity="weight").values["weight"]
        tensor([3., 4.])
    """
    chosen = get_criterion(criterion)
    return score_many(
        model,
        batches,
        loss_fn,
        criteria=[chosen],
        graph=graph,
        granularity=granularity,
        previous=previous,
        max_batches=max_batches,
        seed=seed,
        progress=progress,
        max_seconds=max_seconds,
    )[chosen.label]


def score_many(
    model: nn.Module,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    *,
    criteria: Iterable[CriterionLike],
    graph: Graph | None = None,
    granularity: str | Iterable[str] = "structured",
    previous: Plan | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    max_seconds: float = 3600.0,
) -> dict[str, Scores]:
    """Scores by several criteria from one pass over the batches: label of the criterion -> scores.

    The label is the name with the options that differ from the defaults, for example
    `"finite_difference(step=0.5)"`. Arguments and errors are those of `score`.
    """
    chosen = [get_criterion(c) for c in criteria]
    _check_request(chosen, batches, loss_fn, max_batches)
    if batches is not None and any(c.needs_data for c in chosen):
        check_batches(model, batches, loss_fn if any(c.needs_loss for c in chosen) else None)
    found = graph if graph is not None else _trace(model, batches)
    targets = found.select(granularity)
    params = check_fits(model, targets)
    jobs = [make_job(c, targets, params, granularity) for c in chosen]
    total = _n_batches(batches, max_batches)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(preserve(model))
        stack.enter_context(in_mode(model, training=False))
        stack.enter_context(_only_these_gradients(model))
        stack.enter_context(_differentiable_kernels(model))
        torch.manual_seed(seed)
        run = Pass(model, params, jobs, loss_fn, _alive(targets, previous))
        run.open_removals(max_seconds, total or 1)
        if any(job.criterion.needs_data for job in jobs):
            assert batches is not None
            for i, batch in enumerate(iterate(batches, model_device(model), max_batches)):
                run.batch(i, batch)
                if progress is not None:
                    progress(i + 1, total)
        run.finish()
        return {
            job.criterion.label: _scores(found, job, run, targets, previous, seed) for job in jobs
        }


def _check_request(
    chosen: Sequence[Criterion],
    batches: Batches | None,
    loss_fn: LossFn | None,
    max_batches: int | None,
) -> None:
    labels = [c.label for c in chosen]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if not labels or twice:
        raise ConfigError(
            f"criteria given twice: {', '.join(twice)}" if twice else "no criterion is given"
        )
    if max_batches is not None and max_batches < 1:
        raise ConfigError(f"max_batches must be at least 1, got {max_batches}")
    for c in chosen:
        missing = [
            name
            for name, needed, value in (
                ("batches", c.needs_data, batches),
                ("loss_fn", c.needs_loss, loss_fn),
            )
            if needed and value is None
        ]
        if missing:
            raise ConfigError(
                f"criterion {c.label!r} needs {' and '.join(missing)}; give them, or use a "
                "criterion that sees the weights only, such as 'magnitude'"
            )


def _trace(model: nn.Module, batches: Batches | None) -> Graph:
    """The graph of the model on the inputs of the first batch."""
    if batches is None:
        raise ConfigError("without batches a graph is needed: graph=trace(model, example_inputs)")
    from secateurs.graph import trace

    inputs, _ = next(iter(iterate(batches, model_device(model), max_batches=1)))
    return trace(model, inputs)


def _n_batches(batches: Batches | None, max_batches: int | None) -> int | None:
    try:
        known = len(batches)  # type: ignore[arg-type]
    except TypeError:
        return max_batches
    return known if max_batches is None else min(known, max_batches)


def _only_these_gradients(model: nn.Module) -> ExitStack:
    """Restore which parameters require a gradient; inside, none does until one is asked for."""
    stack = ExitStack()
    for p in model.parameters():
        stack.callback(p.requires_grad_, p.requires_grad)
        p.requires_grad_(False)
    return stack


def _differentiable_kernels(model: nn.Module) -> ExitStack:
    """Avoid kernels that skip hooks (fused encoder) or refuse eval-mode gradients (cuDNN RNN)."""
    stack, mha = ExitStack(), torch.backends.mha
    stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
    mha.set_fastpath_enabled(False)
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    if recurrent and model_device(model).type == "cuda":
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
    return stack


def _alive(targets: Sequence[Target], previous: Plan | None) -> dict[str, Tensor]:
    """Target name -> (n,) int64 units that were not removed earlier."""
    alive = {}
    for target in targets:
        keep = torch.ones(target.n_units, dtype=torch.bool)
        if previous is not None:
            if target.name in previous.removed:
                keep[previous.removed[target.name]] = False
            if isinstance(target, WeightTarget) and target.name in previous.masks:
                keep &= previous.masks[target.name].reshape(-1)
        alive[target.name] = keep.nonzero().reshape(-1)
    return alive


def _scores(
    graph: Graph,
    job: Job,
    run: Pass,
    targets: Sequence[Target],
    previous: Plan | None,
    seed: int,
) -> Scores:
    """The scores of one criterion, with removed units at -inf."""
    values = {}
    for target in job.targets:
        finished = run.result(job, target, seed).to(torch.float32)
        if not torch.isfinite(finished).all():
            unit = int((~torch.isfinite(finished)).nonzero()[0, 0])
            raise ScoringError(
                f"criterion {job.criterion.label!r}: the score of unit {unit} of {target.name} is "
                f"{finished[unit].item()}; check the weights of that target"
            )
        gone = torch.full_like(finished, float("-inf"))
        alive = run.alive[target.name]
        gone[alive] = finished[alive]
        values[target.name] = gone
    return Scores(
        graph=graph,
        values=values,
        criterion=job.criterion.label,
        notes=run.notes(job),
        n_samples=run.n_samples if job.criterion.needs_data else 0,
        not_scored=job.not_scored,
    )
