"""What is wrong with a request, found before anything expensive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from typing import Literal

import torch
from torch import nn

from secateurs.batches import call_model, check_batches, in_mode, preserve
from secateurs.controls import resets
from secateurs.criteria import get_combination
from secateurs.errors import BudgetError, CaptureError, ConfigError, choose
from secateurs.filters import Patterns
from secateurs.finetuning import clock_of
from secateurs.graph import trace
from secateurs.latency import resize_batch
from secateurs.pipeline.fitting import late_starts
from secateurs.pipeline.peers import ALONE, Peers
from secateurs.pipeline.regrowing import mixed_stages
from secateurs.pipeline.resolving import check_budget
from secateurs.pipeline.seeing import naming_whole, only_seen
from secateurs.pipeline.stage import Stage
from secateurs.posttraining import FisherSearch, LayerwiseCut
from secateurs.schedules import Schedule
from secateurs.statistics import check_fits, make_job
from secateurs.tickets import AtInit, TicketSearch
from secateurs.tickets.lottery import rewind_step
from secateurs.types import Batches, Budget, Evaluate, Graph, Inputs, LossFn, Scores, Threshold

__all__ = ["NORMS", "check_request", "given", "random_state"]

NORMS = ("exact", "plain", "pin")


def check_request(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    stages: Sequence[Stage],
    *,
    example_inputs: Inputs,
    evaluate: Evaluate | None = None,
    test: Evaluate | None = None,
    calibration: Batches | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    outputs: Sequence[str] = (),
    norm: str = "exact",
    form: str = "auto",
    latency: Sequence[int] | None = None,
    peers: Peers = ALONE,
) -> Graph:
    """Find what is wrong with a request before anything expensive; returns the filtered graph.

    Arguments and errors as `prune_stages`; `peers` are the processes that run it.
    """
    with peers.ranks.agreed("prune"):
        _check_arguments(model, loss_fn, stages, evaluate, test, norm, form)
    of_first = () if calibration is not None else stages
    batches = peers.shown(model, batches, loss_fn, of_first)
    if calibration is not None:
        calibration = peers.shown(model, calibration, loss_fn, stages)
    with peers.ranks.agreed("prune"):
        graph = _check_together(
            model, batches, loss_fn, stages, example_inputs, evaluate, calibration, include,
            exclude, outputs, norm, latency,
        )  # fmt: skip
    peers.probe(model, batches, loss_fn, stages)
    return graph


def _check_arguments(
    model: nn.Module,
    loss_fn: LossFn,
    stages: Sequence[Stage],
    evaluate: Evaluate | None,
    test: Evaluate | None,
    norm: str,
    form: str,
) -> None:
    """Whether each argument is what it should be."""
    if not stages:
        raise ConfigError("no stage is given")
    choose(form, ["auto", "module", "graph"], "form")
    choose(norm, NORMS, "norm")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, function in (("loss_fn", loss_fn), ("evaluate", evaluate), ("test", test)):
        if not callable(function) and (function is not None or name == "loss_fn"):
            raise ConfigError(f"{name} must be a function, got {function!r}")


def _check_together(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    stages: Sequence[Stage],
    example_inputs: Inputs,
    evaluate: Evaluate | None,
    calibration: Batches | None,
    include: Patterns | None,
    exclude: Patterns | None,
    outputs: Sequence[str],
    norm: str,
    latency: Sequence[int] | None,
) -> Graph:
    """Whether model, data and stages fit each other; returns the filtered graph."""
    for stage in stages:
        check_budget(stage, evaluate is not None)
        _check_training(stage, model, batches, evaluate)
        _check_clock(stage, batches, calibration)
        _check_repairs(stage, model)
    for problem in (*mixed_stages(stages), *late_starts(stages)):
        raise ConfigError(problem)
    check_batches(model, batches, loss_fn)
    if calibration is not None:
        check_batches(model, calibration, loss_fn)
    graph = trace(
        model, example_inputs, outputs=outputs, heads=_heads(stages),
        norm="pin" if norm == "pin" else "exact",
    ).only(include, exclude, model)  # fmt: skip
    if any(stage.layerwise is not None for stage in stages):
        graph = only_seen(graph, model, batches if calibration is None else calibration)
    for stage in stages:
        with naming_whole(stage, graph):
            _check_reachable(stage, model, graph)
    if latency is not None and isinstance(latency, (int, str)):
        raise ConfigError(f"latency must be a list of batch sizes, got {latency!r}")
    with preserve(model), in_mode(model, training=False), torch.no_grad():
        for size in latency or ():
            try:
                call_model(model, resize_batch(example_inputs, size))
            except ConfigError:
                raise
            except Exception as error:
                raise CaptureError(
                    f"latency: the model refuses example_inputs at batch size {size}: {error}"
                ) from error
    return graph


def _heads(stages: Sequence[Stage]) -> Literal["head", "head_dim"]:
    """Whether attention is cut by heads or by positions that all heads share: not by both."""
    kinds: set[str] = set()
    for stage in stages:
        asked = stage.granularity
        kinds |= {asked} if isinstance(asked, str) else set(asked)
    if {"head", "head_dim"} <= kinds:
        raise ConfigError(
            'granularity "head" and "head_dim" are two views of the same weights; choose one'
        )
    return "head_dim" if "head_dim" in kinds else "head"


def _check_training(
    stage: Stage, model: nn.Module, batches: Batches, evaluate: Evaluate | None
) -> None:
    """What fine-tuning and controls of a stage need from the model and the data."""
    if stage.control == "reinit":
        resets(model)
    for name, config in (("prepare", stage.prepare), ("finetune", stage.finetune)):
        if config is None or config.steps == 0 or config.epochs == 0:
            continue
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(
                f"{name}: no parameter of the model requires a gradient: nothing to train. "
                f"Unfreeze some, or leave {name} away"
            )
        if evaluate is None and (config.patience is not None or config.restore_best):
            raise ConfigError(f"{name}: patience and restore_best need evaluate=")
        try:
            clock = clock_of(config, batches)
            if name == "finetune" and stage.ticket is not None:
                rewind_step(config, batches, stage.ticket.rewind)
            if name == "prepare" and stage.penalty is not None:
                stage.penalty.at(0, clock.n_steps)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


def _check_repairs(stage: Stage, model: nn.Module) -> None:
    """Whether there is something to repair."""
    measured = any(getattr(m, "running_mean", None) is not None for m in model.modules())
    if "norms" in stage.repair and not measured:
        raise ConfigError(
            "repair: the model has no norm with running statistics; leave 'norms' away"
        )


def _check_clock(stage: Stage, batches: Batches, calibration: Batches | None) -> None:
    """Whether all cuts of a schedule fall inside its fine-tuning."""
    if stage.steps.every is None:
        return
    assert stage.finetune is not None
    clock = clock_of(stage.finetune, batches, needs=f"Schedule(every={stage.steps.every!r})")
    assert clock.n_steps is not None
    stage.steps.cuts(clock.n_steps, clock.per_epoch, clock.cycles)
    if calibration is None and getattr(batches, "persistent_workers", False):
        raise ConfigError(
            f"Schedule(every={stage.steps.every!r}) scores in the middle of an epoch, and a loader "
            "with persistent_workers would start over: give calibration= with other batches"
        )


def _check_reachable(stage: Stage, model: nn.Module, graph: Graph) -> None:
    """Whether there is something to prune, the criterion sees it, and the budget can be reached."""
    targets = graph.select(stage.granularity)
    if not targets:
        found = sorted({t.kind for t in graph.targets.values()})
        reasons = "; ".join(f"{e.name}: {e.reason}" for e in graph.excluded[:3])
        raise ConfigError(
            f"nothing of granularity {stage.granularity!r} can be pruned in this model; "
            f"it has {', '.join(found) or 'no prunable part'}{'. ' * bool(reasons)}{reasons}"
        )
    asked, params = get_combination(stage.judged_by), check_fits(model, targets)
    if stage.at_init is not None or not stage.unscored:
        for part in asked.parts:
            job = make_job(part, targets, model, params, stage.granularity)
        targets = job.targets
    if stage.threshold is not None:
        return
    if stage.allocation == "sensitivity":  # its curves are not measured yet
        stage = replace(stage, allocation="uniform", layerwise=None)
    blank = Scores(graph, {t.name: torch.zeros(t.n_units) for t in targets}, asked.label)
    if stage.searches:
        stage.allocated(blank, Budget(**{stage.smallest_in: 1.0}))
        counts = stage.fewest(blank)
    elif isinstance(stage.budget, Budget) and not stage.budget.sizes:
        return  # only time is limited, and that is measured later
    else:
        counts = stage.allocated(blank, stage.asked_along(1.0, graph))
    if stage.wants_latency:
        return
    if all(counts.kept[t.name] == t.n_units for t in targets):
        raise BudgetError(
            f"{given(stage.budget)} removes nothing: the dense model is within it already"
        )


def given(
    asked: Budget
    | Threshold
    | Schedule
    | AtInit
    | TicketSearch
    | FisherSearch
    | LayerwiseCut
    | str
    | None,
) -> str:
    """A budget, threshold, schedule, ... with the fields that were given."""
    if isinstance(asked, str):
        return f"budget={asked!r}"
    plain = {f.name: f.default for f in fields(asked)} if asked is not None else {}
    shown = {name: value for name, value in vars(asked).items() if _says(value, plain[name])}
    inner = ", ".join(f"{k}={v!r}" for k, v in shown.items())
    return f"{type(asked).__name__}({inner})"


def _says(value: object, default: object) -> bool:
    """Whether a field is worth showing: neither left out, nor a switch left as it is."""
    if value is None:
        return default is not None and default is not MISSING
    return not isinstance(value, bool) or value is not default


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """A random state of its own, so that neither run nor caller depends on the other's."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be a whole number from 0 to 2**32 - 1, got {seed!r}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
