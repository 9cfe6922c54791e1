"""Pruning before training: which weights of an untrained network are never needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Literal

from torch import nn

from secateurs.bars import Progress
from secateurs.batches import iterate, model_device
from secateurs.errors import BudgetError, ConfigError, DataError, choose
from secateurs.filters import Patterns
from secateurs.finetuning import restore_, snapshot
from secateurs.graph import trace
from secateurs.masks import apply_masks_
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.statistics.synaptic import NoFlowError
from secateurs.surgery.verification import copied
from secateurs.tickets.densities import counts_at, emptied
from secateurs.types import Batches, Budget, Counts, Graph, Inputs, LossFn, Plan, Scores

__all__ = ["METHODS", "check_at_init", "cut_at_init", "graph_of", "prune_at_init"]

METHODS: Mapping[str, int] = {"snip": 1, "grasp": 1, "synflow": 100, "force": 60}
"""Method -> cuts, when `iterations` does not say how many."""
Mode = Literal["eval", "train"]


def prune_at_init(
    model: nn.Module,
    batches: Batches | None = None,
    loss_fn: LossFn | None = None,
    *,
    budget: Budget,
    method: str = "snip",
    iterations: int | None = None,
    batches_per_iteration: int | None = None,
    granularity: str | tuple[str, ...] = "weight",
    graph: Graph | None = None,
    example_inputs: Inputs | None = None,
    exclude: Patterns | None = None,
    min_keep: int = 1,
    mode: Mode = "train",
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """What an untrained network does not need: a plan with masks and reasons.

    All weights of the network compete. In iteration i of n the N weights are cut to
    N (K / N)^(i / n), where K is what the budget keeps, and are scored anew in between.

        snip      |w dL/dw|                     w = 0 where removed before
        grasp     -w (H g), one cut; the largest decrease of the gradient norm goes
        synflow   |w| dR/d|w|                   no data; w = 0 where removed before
        force     |w0 dL/dw|                    w as masked by the last iteration, w0 as given

    `force` judges all weights every time, so that removed ones can come back; the others never
    return what was cut. Ties are decided as in `select`.

    Every target keeps `min_keep` units. One that would have lost all of them says "layer collapse"
    in its entry of `plan.reasons`: the network is cut in two there, so look for it, or take
    `synflow`, which does not do that.

    Args:
        model: untrained, and not changed.
        batches: re-iterable of `(inputs, targets)`; not needed by "synflow".
        loss_fn: `loss_fn(outputs, targets)`, mean over the samples; not needed by "synflow".
        budget: what may remain; met exactly, as by `allocate(method="global")`.
        method: one of `METHODS`.
        iterations: how many cuts; by default 1 for "snip" and "grasp", 100 for "synflow", 60 for
            "force". "snip" with several is iterative SNIP.
        batches_per_iteration: batches that each iteration scores on, the next ones every time,
            from the start again when they end; None = all of them every time.
        granularity: kinds of units; "force" knows single weights only.
        graph: from `trace`; None traces the model on `example_inputs`, or on the first batch.
        example_inputs: what the model is called with.
        exclude: what is left whole, as in `Graph.only`.
        min_keep: units that each target keeps at least.
        mode: "train": batch norms use the statistics of the batch, since their running ones mean
            nothing before training, and dropout drops; "eval" as in `score`. Not for "synflow".
        seed: of dropout and other noise.
        progress: called with (what, iterations done, all).

    Raises:
        ConfigError: an option out of range, or missing batches.
        BudgetError: the budget cannot be reached, or nothing flows through the network any more.
        DataError, CaptureError, ScoringError: as `score`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> plan = prune_at_init(net, method="synflow", budget=Budget(units=12),
        ...                      example_inputs=torch.ones(1, 4))
        >>> sum(int(mask.sum()) for mask in plan.masks.values())
        12

    References:
        Lee, Ajanthan and Torr, SNIP, 2019, arXiv:1810.02340. Verdenius, Stol and Forre, Pruning via
        Iterative Ranking of Sensitivity Statistics, 2020, arXiv:2006.00896 (SNIP in iterations).
        Wang, Zhang and Grosse, GraSP, 2020, arXiv:2002.07376. Tanaka et al., SynFlow, 2020,
        arXiv:2006.05467. de Jorge et al., Progressive Skeletonization (FORCE), 2021,
        arXiv:2006.09081.
    """
    return cut_at_init(
        model, batches, loss_fn, budget=budget, method=method, iterations=iterations,
        batches_per_iteration=batches_per_iteration, granularity=granularity,
        graph=graph_of(model, batches, graph, example_inputs, exclude), min_keep=min_keep,
        mode=mode, seed=seed, progress=progress,
    )[0]  # fmt: skip


def cut_at_init(
    model: nn.Module,
    batches: Batches | None,
    loss_fn: LossFn | None,
    *,
    budget: Budget,
    method: str,
    iterations: int | None,
    batches_per_iteration: int | None,
    granularity: str | tuple[str, ...],
    graph: Graph,
    min_keep: int = 1,
    mode: Mode = "train",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Plan, Scores, Counts]:
    """What `prune_at_init` finds, with the scores and the counts of its last iteration."""
    n = check_at_init(method, iterations, batches_per_iteration, granularity)
    if isinstance(batches, Iterator):
        raise DataError("batches can be read only once (a generator): pass a list or a DataLoader")
    work = copied(model)
    given = snapshot(work)
    windows = _windows(batches, batches_per_iteration)
    plan: Plan | None = None
    notes: dict[str, str] = {}
    for i in range(1, n + 1):
        if progress is not None:
            progress(f"{method}: iteration {i} of {n}", i - 1, n)
        window = None if method == "synflow" else next(windows)
        try:
            if method == "force":
                scores = _force(model, work, window, loss_fn, graph, mode, seed + i - 1)
            else:
                scores = score(
                    work, window, loss_fn, criterion=method, graph=graph, granularity=granularity,
                    previous=plan, mode="eval" if method == "synflow" else mode, seed=seed + i - 1,
                )  # fmt: skip
        except NoFlowError as error:
            raise BudgetError(
                f"{method}, iteration {i} of {n}: nothing flows through what is left: {error}. "
                "Keep more, or make it in more iterations"
            ) from error
        scores = replace(scores, criterion=f"{method} at initialisation ({i} of {n})")
        earlier = None if method == "force" else plan
        counts = counts_at(scores, budget, i, n, min_keep=min_keep, previous=earlier)
        notes = emptied(scores, counts, min_keep)
        plan = select(scores, counts, previous=earlier)
        restore_(work, given)
        apply_masks_(work, plan.masks)
    assert plan is not None
    said = {name: f"{plan.reasons.get(name, name)}; {note}" for name, note in notes.items()}
    return replace(plan, reasons={**plan.reasons, **said}), scores, counts


def graph_of(
    model: nn.Module,
    batches: Batches | None,
    graph: Graph | None,
    example_inputs: Inputs | None,
    exclude: Patterns | None,
) -> Graph:
    """The graph that was given, or that of the model, without what is to be left whole."""
    if graph is None:
        if example_inputs is None:
            if batches is None:
                raise ConfigError("give graph=, example_inputs= or batches: the model is traced")
            example_inputs, _ = next(iterate(batches, model_device(model), max_batches=1))
        graph = trace(model, example_inputs)
    return graph if exclude is None else graph.only(exclude=exclude, model=model)


def check_at_init(
    method: str,
    iterations: int | None,
    batches_per_iteration: int | None,
    granularity: str | tuple[str, ...] = "weight",
) -> int:
    """How many iterations there are.

    Raises:
        ConfigError: an option is out of range, or does not fit another.
    """
    choose(method, METHODS, "method")
    for name, value in (
        ("iterations", iterations),
        ("batches_per_iteration", batches_per_iteration),
    ):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}")
    if method == "grasp" and iterations not in (None, 1):
        raise ConfigError(
            f"grasp is one cut, got iterations={iterations}: it predicts the gradient norm of the "
            "network at hand. Leave iterations away, or take snip, synflow or force"
        )
    if method == "force" and granularity not in ("weight", ("weight",)):
        raise ConfigError(
            f"force judges single weights, got granularity={granularity!r}; leave it away, or take "
            "snip or synflow"
        )
    return METHODS[method] if iterations is None else iterations


def _windows(batches: Batches | None, size: int | None) -> Iterator[Batches | None]:
    """The batches of each iteration, without end."""
    if batches is None or size is None:
        while True:
            yield batches
    source = iter(batches)
    while True:
        window = list(islice(source, size))
        if len(window) < size:
            source = iter(batches)
            window += islice(source, size - len(window))
        yield window


def _force(
    model: nn.Module,
    work: nn.Module,
    batches: Batches | None,
    loss_fn: LossFn | None,
    graph: Graph,
    mode: Mode,
    seed: int,
) -> Scores:
    """|w0 g|: the weights as they were given, the dense gradient of the network as it is masked."""
    found = score(
        work, batches, loss_fn, criterion="gradient", graph=graph, granularity="weight", mode=mode,
        seed=seed,
    )  # fmt: skip
    weights = dict(model.named_parameters(remove_duplicate=False))
    values = {
        name: line * weights[name].detach().abs().reshape(-1).to(line)
        for name, line in found.values.items()
    }
    return replace(found, values=values)
