"""Scores of every unit, for many criteria from one pass over the batches.

    Graph, batches, loss, criteria  ->  Scores   {target: (n_units,) float32}, larger = keep

A criterion says which statistics it needs and in which order they are reduced; this room computes
each statistic once for all criteria that need it. A batch costs one forward and backward pass,
whatever the number of criteria; what costs more (a second derivative, a run for every unit) says
so in the registry. The model comes back as it was: weights, gradients, buffers, modes, random state
and hooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn

from secateurs.bars import bar
from secateurs.batches import check_batches, in_mode, iterate, model_device, preserve
from secateurs.criteria import Combination, Criterion, CriterionLike, get_combination
from secateurs.distributed import Group, Ranks, assert_same, plain, ranks_of, whole
from secateurs.errors import ConfigError, ScoringError, choose
from secateurs.scores import combine
from secateurs.statistics import Job, Pass, Run, Setting, Sums, check_fits, make_job
from secateurs.statistics.chosen import ChosenBatches
from secateurs.statistics.losses import loss_note
from secateurs.statistics.partial import fingerprint, read_partial, write_partial
from secateurs.statistics.together import agree, check_group, shared_batches
from secateurs.types import Batches, Graph, LossFn, Plan, Scores, Target

__all__ = ["score"]

Progress = Callable[[int, int | None], None]
SAVE_EVERY = 30.0
"""Seconds between two writings of an unfinished pass."""


class Options(TypedDict, total=False):
    """Keywords of `score` beside the criterion."""

    graph: Graph | None
    granularity: str | Iterable[str]
    previous: Plan | None
    max_batches: int | None
    sample_batches: int | None
    mode: Literal["eval", "train"]
    seed: int
    progress: Progress | bool
    max_seconds: float
    resume: str | Path | None
    group: Group


@overload  # a text is a sequence of texts, but the first that fits is taken
def score(  # type: ignore[overload-overlap]
    model: nn.Module,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    *,
    criterion: CriterionLike | Combination = "taylor",
    **options: Unpack[Options],
) -> Scores: ...


@overload
def score(
    model: nn.Module,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    *,
    criterion: Sequence[CriterionLike | Combination],
    **options: Unpack[Options],
) -> dict[str, Scores]: ...


def score(
    model: nn.Module,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    *,
    criterion: CriterionLike | Combination | Sequence[CriterionLike | Combination] = "taylor",
    graph: Graph | None = None,
    granularity: str | Iterable[str] = "structured",
    previous: Plan | None = None,
    max_batches: int | None = None,
    sample_batches: int | None = None,
    mode: Literal["eval", "train"] = "eval",
    seed: int = 0,
    progress: Progress | bool = False,
    max_seconds: float = 3600.0,
    resume: str | Path | None = None,
    group: Group = None,
) -> Scores | dict[str, Scores]:
    """Scores of every unit: larger = keep.

    Args:
        model: scored in eval mode and left exactly as it was.
        batches: re-iterable of `(inputs, targets)`; not needed by criteria that see weights only.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the samples.
        criterion: a name, a mapping with options, or a `Criterion`; several made one, such as
            `{"combine": "rank", "of": ["taylor", "magnitude"]}`; or a list of these, which share
            one pass over the batches.
        graph: from `trace`; None traces the model on the inputs of the first batch.
        granularity: kinds of units, or "structured".
        previous: units that it removed score `-inf`.
        max_batches: use at most that many batches.
        sample_batches: use that many batches, drawn at random by the seed, instead of all.
        mode: "eval", or "train" for a model whose training behaviour is meant: batch norm then
            takes the statistics of the batch (its running ones do not move), dropout drops.
        seed: of models that draw random numbers, and of random criteria.
        progress: True for a bar with the time left, or called with (batches done, all or None).
        max_seconds: criteria that run the model for every unit refuse to take longer.
        resume: a file for the unfinished pass. If it exists, the pass goes on from there, and gives
            what an uninterrupted one gives; it is removed when the pass is complete. The batches
            must come in the same order.
        group: "world", or a process group of torch.distributed: every rank gives its own part of
            the data, which may be empty, and gets the scores of all of it, as one process would
            give for the batches of rank 0, then 1, ... All ranks give the same model, wrapped by
            DDP, sharded by `fully_shard` (each then holds the full weights meanwhile), or neither;
            its buffers count as rank 0 has them. `max_batches` and `sample_batches` are of each
            rank. None: this process alone.

    Returns:
        `Scores` with one (n_units,) float32 tensor for each target; for a list of criteria
        {label: Scores}, where the label is the name with the options that differ from the
        defaults, for example `"finite_difference(step=0.5)"`.

    Raises:
        ConfigError: an unknown option, missing batches or loss, or nothing that can be scored.
        DataError, CaptureError: batches that do not fit the model.
        ScoringError: a loss, gradient or activation that is not finite.
        RankError: another rank failed or is gone, or holds other weights or settings.

    Example:
        >>> from secateurs.types import WeightTarget
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> graph = Graph({"weight": WeightTarget("weight", (1, 2))})
        >>> score(net, graph=graph, criterion="magnitude", granularity="weight").values["weight"]
        tensor([3., 4.])
        >>> list(score(net, graph=graph, criterion=["magnitude", "random"], granularity="weight"))
        ['magnitude', 'random']
    """
    ranks, given_model = ranks_of(group), model
    model = plain(model)
    alone = isinstance(criterion, (str, Mapping, Criterion, Combination))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        with ranks.agreed("score"):
            given: Any = [criterion] if alone else criterion
            asked = [get_combination(c) for c in given]
            _check_request(asked, batches, loss_fn, max_batches, sample_batches)
            chosen = list({part.label: part for c in asked for part in c.parts}.values())
            choose(mode, ["eval", "train"], "mode")
            check_group(given_model, ranks, resume)
            if mode == "train":
                _check_train_mode(model, chosen)
        data = batches if any(c.needs_data for c in chosen) else None
        stack.enter_context(whole(model))
        shared = shared_batches(model, batches, ranks)
        with ranks.agreed("score"):
            if data is not None and shared is not None:
                check_batches(model, shared, loss_fn if any(c.needs_loss for c in chosen) else None)
            found = graph if graph is not None else _trace(model, shared)
            targets = found.select(granularity)
            params = check_fits(model, targets)
            jobs = [make_job(c, targets, model, params, granularity) for c in chosen]
            chosen_batches = ChosenBatches(data, model, max_batches, sample_batches, seed, ranks)
        stack.enter_context(preserve(model))
        agree(model, jobs, previous, [mode, seed], group, ranks)
        stack.enter_context(in_mode(model, training=mode == "train"))
        stack.enter_context(_only_these_gradients(model))
        stack.enter_context(_differentiable_kernels(model))
        torch.manual_seed(seed)
        alive = _alive(targets, previous)
        setting = Setting(
            model, params, loss_fn, found, alive, seed, chosen_batches.total or 1, max_seconds
        )
        with ranks.agreed("score"):
            first = None if data is None else Run(0, chosen_batches.first(shared))
            note = loss_note(setting, first) if first is not None and mode == "eval" else ""
            run = Pass(setting, jobs, first, Sums())
            if ranks.size > 1:
                run.check_shared()
                torch.manual_seed(seed + ranks.rank)  # no rank drops what another one drops
        if data is not None:
            marks = fingerprint(
                jobs, run, first.batch if first else None,
                batches=[max_batches, sample_batches, chosen_batches.total], mode=mode,
            ) if resume is not None else ""  # fmt: skip
            shown = _shown(stack, progress if ranks.rank == 0 else callable(progress) and progress)
            _stream(run, chosen_batches, ranks, shown, resume, marks)
        with ranks.agreed("score"):
            parts = {
                job.criterion.label: _scores(found, job, run, targets, previous, note)
                for job in jobs
            }
    if ranks.size > 1:
        assert_same({label: part.values for label, part in parts.items()}, group, what="scores")
    scores = {c.label: _combined(c, parts) for c in asked}
    return next(iter(scores.values())) if alone else scores


def _combined(asked: Combination, parts: Mapping[str, Scores]) -> Scores:
    """The scores of one criterion, or those of several made one."""
    held = {part.label: parts[part.label] for part in asked.parts}
    return held[asked.label] if asked.how is None else combine(held, asked.how, asked.weights)


def _check_train_mode(model: nn.Module, chosen: Sequence[Criterion]) -> None:
    """A batch norm in train mode mixes the samples of a batch: no sample has a loss of its own."""
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    by_sample = [c.label for c in chosen if c.average == "sample"]
    if norms and by_sample:
        raise ConfigError(
            f'mode="train": {norms[0]} mixes the samples of a batch, so criteria that are finished '
            f'for each sample ({", ".join(by_sample)}) mean nothing; use mode="eval", or '
            'average="batch"'
        )


def _stream(
    run: Pass,
    batches: ChosenBatches,
    ranks: Ranks,
    progress: Progress | None,
    resume: str | Path | None,
    marks: str,
) -> None:
    """All batches, as often as needed; an unfinished pass is kept in the file `resume`."""
    path = None if resume is None else Path(resume)
    turn, skip = read_partial(path, run, marks) if path is not None and path.exists() else (0, 0)
    total = None if batches.total is None else batches.total * run.turns
    begun, saved, written = turn * (batches.total or 0), time.monotonic(), (turn, skip)
    done = (turn, skip)
    try:
        for now in range(turn, run.turns):
            with ranks.agreed("scoring the batches"):
                numbered = enumerate(islice(batches, skip, None), start=skip + 1)
                for count, (number, batch) in numbered:
                    run.batch(now, Run(number, batch))
                    done = (now, count)
                    if progress is not None:
                        progress(begun + count, total)
                    if path is not None and time.monotonic() - saved > SAVE_EVERY:
                        write_partial(path, run, done, marks)
                        saved, written = time.monotonic(), done
            run.merge(ranks)
            begun, skip = begun + (batches.total or 0), 0
            done = (now + 1, 0)
    except BaseException:
        if path is not None and done != written:
            write_partial(path, run, done, marks)
        raise
    if path is not None:
        path.unlink(missing_ok=True)


def _shown(stack: ExitStack, progress: Progress | bool) -> Progress | None:
    """The callback that was given, or one that moves a bar."""
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return None
    step = stack.enter_context(bar("score"))
    return lambda done, total: step("batches", done, total or 0)


def _check_request(
    asked: Sequence[Combination],
    batches: Batches | None,
    loss_fn: LossFn | None,
    max_batches: int | None,
    sample_batches: int | None,
) -> None:
    labels = [c.label for c in asked]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if not labels or twice:
        raise ConfigError(
            f"criteria given twice: {', '.join(twice)}" if twice else "no criterion is given"
        )
    for name, number in (("max_batches", max_batches), ("sample_batches", sample_batches)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}")
    if max_batches is not None and sample_batches is not None:
        raise ConfigError("give max_batches (the first ones) or sample_batches (random ones)")
    for c in (part for several in asked for part in several.parts):
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
    if previous is None:
        return {target.name: torch.arange(target.n_units) for target in targets}
    return {t.name: (~previous.gone(t)).nonzero().reshape(-1) for t in targets}


def _scores(
    graph: Graph,
    job: Job,
    run: Pass,
    targets: Sequence[Target],
    previous: Plan | None,
    note: str,
) -> Scores:
    """The scores of one criterion, with removed units at -inf."""
    values = {}
    for target in job.targets:
        finished = run.result(job, target).to(torch.float32)
        if not torch.isfinite(finished).all():
            unit = int((~torch.isfinite(finished)).nonzero()[0, 0])
            raise ScoringError(
                f"criterion {job.criterion.label!r}: the score of unit {unit} of {target.name} is "
                f"{finished[unit].item()}; check the weights of that target"
            )
        gone = torch.full_like(finished, float("-inf"))
        alive = run.setting.alive[target.name]
        gone[alive] = finished[alive]
        values[target.name] = gone
    return Scores(
        graph=graph,
        values=values,
        criterion=job.criterion.label,
        notes=(*run.notes(job), *([note] if note and job.criterion.needs_loss else [])),
        n_samples=run.n_samples if job.criterion.needs_data else 0,
        not_scored=job.not_scored,
    )
