"""Scores from the user's own training: an onlooker at the steps of an optimizer.

    model, optimizer, Graph -- watch -> Watching, and at any time Watching.scores()

The criteria are those of a training window (`movement`, `gradient_window`, `gradient_ema`). Where
`score` trains a copy for them, `watch` looks at weights and gradients just before each step of a
real optimizer, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateurs.criteria import CRITERIA, Criterion, get_criterion
from secateurs.errors import ConfigError
from secateurs.masks.states import parameters_of, skips
from secateurs.statistics import Job, Sums, check_fits, make_job
from secateurs.statistics.ablation import same_name
from secateurs.statistics.gradients import finite_gradient
from secateurs.statistics.jobs import element_scores, member_places
from secateurs.statistics.window import FOLDS, full_precision
from secateurs.types import Graph, Plan, Scores, Target

__all__ = ["Watching", "watch"]

One = str | Mapping[str, Any] | Criterion
Found = TypeVar("Found", Scores, dict[str, Scores])
Held = Scores | dict[str, Scores]


class Watching(Generic[Found]):
    """What has been seen so far; `watch` makes it.

    Attributes:
        steps: optimizer steps seen.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, graph: Graph, jobs: Sequence[Job], alone: bool
    ) -> None:
        self.steps = 0
        self._model, self._optimizer, self._graph = model, optimizer, graph
        self._jobs, self._alone = jobs, alone
        self._params = check_fits(model, [t for job in jobs for t in job.targets])
        self._names = same_name(self._params)
        self._sums = {job.criterion.label: Sums() for job in jobs}
        self._used = {job.criterion.label: self._read(job) for job in jobs}
        if not self._trained() & {name for names in self._used.values() for name in names}:
            raise ConfigError(
                "the optimizer trains none of the weights that are to be scored; give the "
                "optimizer of this model, made after its parameters were"
            )

    def scores(self, previous: Plan | None = None) -> Found:
        """Scores of the steps so far: `Scores`, or {label: Scores} for a list of criteria.

        Args:
            previous: units and weights that it removed score `-inf`.

        Raises:
            ConfigError: no step has been seen.
        """
        if not self.steps:
            raise ConfigError(
                "no optimizer step has been seen yet; ask for scores after optimizer.step()"
            )
        found: Any = {job.criterion.label: self._scores(job, previous) for job in self._jobs}
        result: Found = next(iter(found.values())) if self._alone else found
        return result

    def look(self) -> None:
        """Take in one step: called just before the weights change."""
        if skips(self._optimizer):
            return
        scale = getattr(self._optimizer, "grad_scale", None)
        trained = self._trained()
        for job in self._jobs:
            (need,) = job.criterion.needs
            sums = self._sums[job.criterion.label]
            for name in self._used[job.criterion.label]:
                p = self._params[name]
                if name not in trained or (p.grad is None and name not in sums):
                    continue
                grad = torch.zeros_like(p) if p.grad is None else p.grad.detach()
                dense = grad.to_dense() if grad.is_sparse else grad
                g = full_precision(finite_gradient(dense, name, f"step {self.steps}"))
                g = g if scale is None else g / scale.to(g.device)
                FOLDS[need].fold(sums, name, full_precision(p), g, job.criterion.options)
        self.steps += 1

    def _trained(self) -> set[str]:
        """Names of the parameters that the optimizer trains."""
        held = parameters_of(self._optimizer)
        return {self._names[name] for name, p in self._params.items() if id(p) in held}

    def _read(self, job: Job) -> list[str]:
        """Names of the parameters that one criterion reads, each once."""
        c = job.criterion
        every = [n for t in job.targets for n, _ in member_places(c, t, self._params)]
        return list(dict.fromkeys(self._names[name] for name in every))

    def _scores(self, job: Job, previous: Plan | None) -> Scores:
        c = job.criterion
        (need,) = c.needs
        sums, trained = self._sums[c.label], self._trained()

        def stats(name: str) -> dict[str, Tensor]:
            first = self._names[name]
            if first not in sums:  # no gradient ever: said in the notes
                return {need: torch.zeros_like(self._params[name]).detach()}
            return {need: FOLDS[need].read(sums[first], self.steps, c.options)}

        values, not_scored = {}, dict(job.not_scored)
        for target in job.targets:
            inside = {self._names[n] for n, _ in member_places(c, target, self._params)}
            if not inside & trained:
                not_scored[target.name] = "the optimizer trains none of its weights"
                continue
            score = element_scores(c, target, self._params, stats).to(torch.float32)
            values[target.name] = score.masked_fill(_gone(target, previous), float("-inf"))
        notes = [f"{self.steps} optimizer steps"]
        for name in self._used[c.label]:
            if name not in trained:
                notes.append(f"{name}: not trained by this optimizer, counted as 0")
            elif name not in sums:
                notes.append(f"{name}: no gradient arrives in any step, counted as 0")
        return Scores(self._graph, values, c.label, tuple(notes), not_scored=not_scored)


@overload  # a text is a sequence of texts, but the first that fits is taken
def watch(  # type: ignore[overload-overlap]
    model: nn.Module,
    optimizer: Optimizer,
    *,
    graph: Graph,
    criterion: One = "movement",
    granularity: str | Iterable[str] = "structured",
) -> AbstractContextManager[Watching[Scores]]: ...


@overload
def watch(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    graph: Graph,
    criterion: Sequence[One],
    granularity: str | Iterable[str] = "structured",
) -> AbstractContextManager[Watching[dict[str, Scores]]]: ...


def watch(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    graph: Graph,
    criterion: One | Sequence[One] = "movement",
    granularity: str | Iterable[str] = "structured",
) -> AbstractContextManager[Watching[Any]]:
    """A context that looks at every step of `optimizer` and scores the units from what it saw.

    What counts is the gradient as the step will use it: after accumulation over several batches,
    clipping and masks (`hold_masks`), and in true size under a gradient scaler; steps that the
    scaler leaves out do not count. A step with a closure counts at the first call of the closure.
    Nothing is changed, and the hook is gone at the end, also after an exception. It keeps one
    tensor of the size of each parameter that the criterion reads.

    Args:
        model: the model that is trained.
        optimizer: of some or all of its parameters.
        graph: from `trace`.
        criterion: `movement`, `gradient_window` or `gradient_ema`, or a list of these; their
            options `epochs` and `lr` are for `score`.
        granularity: kinds of units, or "structured".

    Returns:
        A context manager that gives a `Watching`: `scores()` during or after the training.

    Raises:
        ConfigError: another criterion, or an optimizer that trains nothing of what is scored.
        ScoringError: in a step, if a gradient is not finite.

    Example:
        >>> from secateurs.types import WeightTarget
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> graph = Graph({"weight": WeightTarget("weight", (1, 2))})
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with watch(net, optimizer, graph=graph, granularity="weight") as watching:
        ...     net(torch.tensor([[1.0, 1.0]])).sum().backward()  # the gradient is 1, 1
        ...     optimizer.step()
        >>> watching.scores().values["weight"]
        tensor([-3.,  4.])
    """
    alone = isinstance(criterion, (str, Mapping, Criterion))
    asked: Any = [criterion] if alone else criterion
    chosen = [_windowed(get_criterion(c)) for c in asked]
    labels = [c.label for c in chosen]
    if not labels or len(set(labels)) < len(labels):
        raise ConfigError(f"criteria must be named, each once; got {labels}")
    targets = graph.select(granularity)
    params = check_fits(model, targets)
    jobs = [make_job(c, targets, model, params, granularity) for c in chosen]
    return _watching(Watching(model, optimizer, graph, jobs, alone), optimizer)


@contextmanager
def _watching(held: Watching[Any], optimizer: Optimizer) -> Iterator[Watching[Any]]:
    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            held.look()
            return None
        seen = _after_first(closure, held.look)
        if len(args) > 1:
            return (args[0], seen, *args[2:]), kwargs
        return args, {**kwargs, "closure": seen}

    handle = optimizer.register_step_pre_hook(before)
    try:
        yield held
    finally:
        handle.remove()


def _after_first(closure: Callable[[], Any], look: Callable[[], None]) -> Callable[[], Any]:
    """The closure, and a look at the gradients that its first call has made."""
    calls: list[int] = []

    def seen() -> Any:
        result = closure()
        if not calls:
            look()
        calls.append(1)
        return result

    return seen


def _windowed(c: Criterion) -> Criterion:
    """The criterion, if a window of training can be watched for it.

    Raises:
        ConfigError: it needs something else, or has options that only `score` knows.
    """
    if len(c.needs) != 1 or not c.needs <= FOLDS.keys():
        known = [k for k, v in CRITERIA.items() if len(v.needs) == 1 and v.needs <= FOLDS.keys()]
        raise ConfigError(
            f"criterion {c.label!r} is not made of training steps; use score for it, or watch "
            f"with one of: {', '.join(known)}"
        )
    usual = CRITERIA[c.name].options if c.name in CRITERIA else {}
    extra = [o for o in ("epochs", "lr") if o in usual and c.options.get(o) != usual[o]]
    if extra:
        raise ConfigError(
            f"criterion {c.label!r}: {' and '.join(extra)} are for the copy that score trains; "
            "watch looks at your own training, leave them out"
        )
    return c


def _gone(target: Target, previous: Plan | None) -> Tensor:
    """(n_units,) True for units that were removed earlier."""
    if previous is None:
        return torch.zeros(target.n_units, dtype=torch.bool)
    return previous.gone(target)
