"""`sensitivity`: each target alone is masked more and more, and the data seen each time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateurs.allocation.curves import Curve
from secateurs.bars import Progress, bar
from secateurs.batches import check_batches, in_mode, preserve
from secateurs.criteria import Combination, CriterionLike
from secateurs.errors import ConfigError, ScoringError
from secateurs.masks import named_tensors
from secateurs.scoring import score
from secateurs.selection import order_of, select
from secateurs.sensitivities.cache import Cache, order_mark, weights_mark
from secateurs.sensitivities.found import MeasuredSensitivity
from secateurs.sensitivities.runs import Cuts, LossRuns, MetricRuns, PutBack, Runs
from secateurs.statistics.units import check_fits
from secateurs.types import Batches, Budget, Counts, Evaluate, Graph, LossFn, Scores

__all__ = ["FRACTIONS", "sensitivity"]

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9)


def sensitivity(
    model: nn.Module,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    *,
    scores: Scores | None = None,
    criterion: CriterionLike | Combination = "taylor",
    graph: Graph | None = None,
    granularity: str | Iterable[str] = "structured",
    evaluate: Evaluate | None = None,
    maximize: bool = True,
    fractions: Sequence[float] = FRACTIONS,
    max_batches: int | None = None,
    cache: str | Path | None = None,
    progress: Progress | bool = False,
) -> MeasuredSensitivity:
    """How much worse the model gets when each target alone loses its lowest-scoring units.

    The drop at a fraction is the loss of the model with these units masked minus that of the uncut
    model (the mean over the samples of `batches`), or with `evaluate` the metric of the uncut model
    minus that of the masked one, the other way round if smaller is better. Nothing is trained in
    between. A target of n units loses the whole number nearest to each fraction, at least one and
    at most n - 1; its curve states the fractions that result.

    Each pair of target and fraction takes one pass over the data. What a cut does not reach, the
    network before it, is computed once for all fractions of a target where that is faster and
    gives the same outputs bit by bit; a batch is read once for all of them.

    Args:
        model: seen in eval mode, and left exactly as it was, also after an exception.
        batches: validation data, re-iterable `(inputs, targets)`; not needed where neither the
            criterion nor the measure sees them.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the samples.
        scores: which units go first; None scores by `criterion` on the same `batches`. Give scores
            made on other batches to keep the two apart.
        criterion, graph, granularity: as in `score`; of no use beside `scores`.
        evaluate: measure the drop of this metric instead of the rise of the loss.
        maximize: whether a larger metric is better.
        fractions: of each target's units, in (0, 1).
        max_batches: use at most that many batches.
        cache: a JSON file for finished curves. They are kept target by target, so that a call that
            was interrupted goes on; curves of other weights, data sizes, units or fractions are
            measured again, with a note.
        progress: True for a bar, or called with (target, targets done, targets in all).

    Returns:
        A `MeasuredSensitivity`: `.recommendation()` says what follows, `allocate` takes it, and
        `plot_sensitivity` draws it.

    Raises:
        ConfigError: fractions out of range, no data to measure with, or nothing to measure.
        ScoringError: a loss or metric is not finite.

    Example:
        >>> from secateurs.types import WeightTarget
        >>> net = nn.Linear(4, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[4.0, 1.0, 2.0, 3.0]]))
        >>> found = sensitivity(net, [(torch.ones(2, 4), torch.full((2, 1), 10.0))],
        ...     torch.nn.functional.l1_loss, criterion="magnitude", granularity="weight",
        ...     graph=Graph({"weight": WeightTarget("weight", (1, 4))}), fractions=(0.25, 0.5))
        >>> found.curves["weight"]
        Curve(removed=(0.0, 0.25, 0.5), drop=(0.0, 1.0, 3.0))

    Reference: Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710.
    """
    _check_fractions(fractions)
    if evaluate is None and (batches is None or loss_fn is None):
        raise ConfigError(
            "sensitivity needs data: give batches and loss_fn, or evaluate for a metric"
        )
    if evaluate is None:
        assert batches is not None
        check_batches(model, batches, loss_fn)
    if scores is None:
        scores = score(
            model, batches, loss_fn, criterion=criterion, graph=graph, granularity=granularity,
            max_batches=max_batches,
        )  # fmt: skip
    check_fits(model, [scores.graph.targets[name] for name in scores.values])
    with ExitStack() as stack:
        for context in (preserve(model), in_mode(model, training=False), torch.no_grad()):
            stack.enter_context(context)
        runs: Runs
        if evaluate is not None:
            runs = MetricRuns(model, evaluate, maximize)
        else:
            assert batches is not None
            assert loss_fn is not None
            runs = LossRuns(model, batches, loss_fn, max_batches)
        shown = stack.enter_context(bar("sensitivity")) if progress is True else progress
        return _measured(model, runs, scores, fractions, cache, shown or None)


def _measured(
    model: nn.Module,
    runs: Runs,
    scores: Scores,
    fractions: Sequence[float],
    cache: str | Path | None,
    progress: Progress | None,
) -> MeasuredSensitivity:
    """All curves, from the cache or from runs."""
    stored = Cache(cache, _made_by(model, runs), runs.dense)
    left_out = {n: f"not scored: {why}" for n, why in scores.not_scored.items()}
    units = {name: len(values) for name, values in scores.values.items()}
    wanted = {name: _wanted(values, fractions) for name, values in scores.values.items()}
    left_out |= {n: "it has one unit, which must stay" for n, gone in wanted.items() if not gone}
    found: MeasuredSensitivity | None = None
    curves: dict[str, Curve] = {}
    errors: dict[str, tuple[float, ...]] = {}
    orders: dict[str, str] = {}
    for i, (name, gone) in enumerate(wanted.items()):
        if progress is not None:
            progress(name, i, len(wanted))
        if not gone:
            continue
        removed = _shares(scores.values[name], gone)
        orders[name] = order_mark(order_of(scores.values[name])[-gone[-1] :])
        known = stored.get(name, orders[name], removed)
        curves[name], error = known or _curve(model, runs, scores, name, gone, removed)
        errors |= {} if error is None else {name: error}
        found = MeasuredSensitivity(
            curves, runs.measure, scores.criterion, dense=runs.dense, units=units, errors=errors,
            n_samples=runs.n_samples, left_out=left_out, notes=scores.notes,
        )  # fmt: skip
        if known is None:
            stored.put(found, orders)
    if found is None:
        raise ConfigError(
            "there is nothing to measure: every target has one unit, or no score. "
            "Choose a finer granularity"
        )
    if progress is not None:
        progress("done", len(wanted), len(wanted))
    notes = dict.fromkeys((*scores.notes, *runs.notes, *stored.notes))
    return replace(found, notes=tuple(notes))


def _curve(
    model: nn.Module,
    runs: Runs,
    scores: Scores,
    name: str,
    gone: Sequence[int],
    removed: tuple[float, ...],
) -> tuple[Curve, tuple[float, ...] | None]:
    """One target, measured; what was removed earlier costs nothing."""
    n = len(scores.values[name])
    counts = [Counts({name: n - g}, Budget(units=(n - g) / n)) for g in gone]
    masks = tuple(dict(select(scores, c).masks) for c in counts)
    with _restored(model, masks[-1]) as put_back:
        points = runs.drops(Cuts(masks, put_back))
    for g, (drop, _) in zip(gone, points, strict=True):
        if not math.isfinite(drop):
            raise ScoringError(
                f"{name} with {g} of {n} units removed: the {runs.measure} is {drop}. "
                "Leave this fraction away, or exclude the target"
            )
    blank = [0.0] * (len(removed) - len(points))
    spread = [error for _, error in points if error is not None]
    known = len(spread) == len(points)
    curve = Curve(removed, (*blank, *(drop for drop, _ in points)))
    return curve, (*blank, *spread) if known else None


def _wanted(values: Tensor, fractions: Sequence[float]) -> list[int]:
    """Units that are gone at each cut, ascending: some stay, and more go than went earlier."""
    n, earlier = len(values), int(values.isneginf().sum())
    gone = {min(n - 1, max(1, round(f * n))) for f in fractions}
    return sorted(g for g in gone if g > earlier)


def _shares(values: Tensor, gone: Sequence[int]) -> tuple[float, ...]:
    """Fractions of the dense units along the curve: none, what went earlier, each cut."""
    earlier = int(values.isneginf().sum())
    return tuple(dict.fromkeys(g / len(values) for g in (0, earlier, *gone)))


@contextmanager
def _restored(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[PutBack]:
    """Keep a copy of what masks touch; gives a function that puts it back, as the end does."""
    held = named_tensors(model)
    copies = [(held[name], held[name].detach().clone()) for name in masks]

    def put_back() -> None:
        for tensor, copy in copies:
            tensor.copy_(copy)

    try:
        yield put_back
    finally:
        put_back()


def _check_fractions(fractions: Sequence[float]) -> None:
    wrong = [f for f in fractions if not isinstance(f, (int, float)) or not 0 < f < 1]
    if wrong or not fractions:
        got = f"got {wrong[0]!r}" if wrong else "got none"
        hint = f". Did you mean {wrong[0] / 100:g}?" if wrong and _percent(wrong[0]) else ""
        raise ConfigError(f"fractions are shares of a target's units in (0, 1), {got}{hint}")


def _percent(value: object) -> bool:
    return isinstance(value, (int, float)) and 1 < value < 100


def _made_by(model: nn.Module, runs: Runs) -> dict[str, object]:
    """What the curves depend on besides the units that go."""
    return {
        "weights": weights_mark(model),
        "measure": runs.measure,
        "number of batches": runs.n_batches,
        "number of samples": runs.n_samples,
    }
