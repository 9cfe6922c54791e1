"""What cannot go together in one stage; each problem is one sentence with its way out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateurs.allocation import ALLOCATORS, BY_SIZE
from secateurs.controls import CONTROLS
from secateurs.criteria import get_combination
from secateurs.errors import choose
from secateurs.regrowth import RULES
from secateurs.tickets.initial import check_at_init
from secateurs.types import Budget, expand_granularity

if TYPE_CHECKING:
    from secateurs.pipeline.stage import Stage

__all__ = ["REPAIRS", "TRIES", "WHOLE_CUTS", "late_starts", "problems", "unread_by"]

REPAIRS = ("bias", "reconstruct", "norms")
"""What `repair` may name, see `secateurs.pipeline.repairing`."""
TRIES = 20
"""Steps at most towards `Budget(metric_drop=)` without sizes; `Schedule(steps=)` says otherwise."""
WHOLE_CUTS = ("at_init", "ticket", "fisher_masks")
"""Fields that each say how the whole cut of a stage is made, in place of steps."""
NEVER_TOO = {
    "threshold": None, "schedule": None, "control": None, "max_drop": None, "allow_missed": False,
    "prepare": None, "penalty": None, "repair": (), "homogeneous": False, "layerwise": None,
}  # fmt: skip
"""Fields that none of `WHOLE_CUTS` reads, and their defaults."""
NOR: Mapping[str, Mapping[str, Any]] = {
    "at_init": {"round_to": "auto", "criterion": "taylor", "allocation": "uniform"},
    "ticket": {"round_to": "auto", "regrow": None},
    "fisher_masks": {"criterion": "taylor", "allocation": "uniform", "regrow": None},
}
"""One of `WHOLE_CUTS` -> what it does not read besides."""


def unread_by(name: str) -> dict[str, Any]:
    """Fields that one of `WHOLE_CUTS` does not read, and their defaults."""
    return {**NEVER_TOO, **NOR[name]}


def problems(stage: Stage) -> Iterator[str]:
    """What is wrong between the fields of a stage whose single fields are right.

    Raises:
        ConfigError: a name is unknown; or, of `at_init`, what it does not know.
    """
    if stage.control is not None:
        yield from _control_problems(stage, stage.control)
    yield from _start_problems(stage)
    yield from _guard_problems(stage)
    yield from _clock_problems(stage)
    yield from _penalty_problems(stage)
    yield from _repair_problems(stage)
    yield from _regrow_problems(stage)
    yield from _layerwise_problems(stage)


def _start_problems(stage: Stage) -> Iterator[str]:
    """What keeps a cut that one method decides as a whole from working."""
    name = stage.decided_by
    if name is None:
        return
    several = [other for other in WHOLE_CUTS if getattr(stage, other) is not None]
    if len(several) > 1:
        yield f"{' and '.join(several)} each say how the whole cut is made: give one of them"
    if stage.at_init is not None:
        check_at_init(stage.at_init.method, stage.at_init.iterations, None, stage.granularity)
    elif stage.fisher_masks is not None:
        yield from _fisher_problems(stage)
    else:
        if stage.finetune is None or 0 in (stage.finetune.epochs, stage.finetune.steps):
            yield "ticket= trains the network in every round: give finetune="
        elif stage.finetune.distills:
            yield "ticket= trains without a teacher: leave distill and hidden away"
    unread = unread_by(name)
    if given := [field for field, default in unread.items() if getattr(stage, field) != default]:
        yield f"{name}= decides the whole cut and does not read {', '.join(given)}: leave it away"
    if stage.wants_drop or stage.wants_latency or not isinstance(stage.budget, Budget):
        yield f"{name}= needs a budget in units, params, macs or bytes alone"


def _fisher_problems(stage: Stage) -> Iterator[str]:
    """What masks by Fisher information are not for."""
    if "weight" in expand_granularity(stage.granularity):
        yield "fisher_masks= cuts units, no single weights: take another granularity"
    if stage.wants_drop:
        yield (
            'fisher_masks= cuts once, to a size; metric_drop and "auto" go down in steps: give a '
            "size, as in Budget(macs=0.5), and try several (`secateurs search` does), or leave "
            "fisher_masks away"
        )
    if stage.wants_latency:
        yield (
            "fisher_masks= makes one model and times none, so latency_ms could be missed: give "
            "a budget in macs, or leave fisher_masks away"
        )


def late_starts(stages: Sequence[Stage]) -> Iterator[str]:
    """Stages that want a whole network although something is cut already."""
    for number, stage in enumerate(stages[1:], start=2):
        if stage.decided_by is not None:
            yield (
                f"stage {number}: {stage.decided_by} begins with a whole network: make it the "
                "first stage"
            )


def _control_problems(stage: Stage, control: str) -> Iterator[str]:
    """A control must change what it claims, and nothing else."""
    choose(control, CONTROLS, "control")
    rule = None if stage.threshold is None else stage.threshold.rule
    if control in ("random", "invert") and rule not in (None, "quantile"):
        yield (
            f"control={control!r} changes the values that threshold {rule!r} looks at, so "
            'another number of units would go; use a budget, "quantile" or control="shuffle"'
        )
    if control == "random-labels" and rule == "permutation":
        yield (
            'control="random-labels" scores on shuffled labels, and so does threshold '
            "'permutation': nothing would stay; use another threshold or a budget"
        )
    criterion = get_combination(stage.criterion)
    if control == "random-labels" and not criterion.sees_labels:
        yield (
            f'control="random-labels" changes nothing: criterion {criterion.label!r} does not '
            "see the targets"
        )


def _penalty_problems(stage: Stage) -> Iterator[str]:
    """What keeps a penalty from working."""
    if stage.penalty is None:
        return
    if stage.prepare is None or 0 in (stage.prepare.epochs, stage.prepare.steps):
        yield "penalty= works while the network trains before the cut: give prepare="
    if expand_granularity(stage.granularity) == {"weight"}:
        yield "penalty= makes structural units small, and only single weights are pruned"
    if stage.penalty.rule == "growing":
        known = isinstance(stage.budget, Budget) and stage.budget.sizes
        if not known or stage.wants_drop or stage.wants_latency:
            yield (
                "Penalty('growing') must know which units go before they are cut: give a "
                "budget in units, params, macs or bytes alone, or take group_lasso"
            )
        if stage.allocation == "sensitivity":
            yield (
                "Penalty('growing') chooses units before the training, and "
                "allocation='sensitivity' measures again after it: take another allocation"
            )


def _repair_problems(stage: Stage) -> Iterator[str]:
    """What keeps a repair from working."""
    given: Any = stage.repair
    if isinstance(given, str):
        yield f"repair is a list: repair=({given!r},)"
        return
    for name in stage.repair:
        choose(name, REPAIRS, "repair")
    if stage.repair and stage.schedule is not None and stage.schedule.every is not None:
        yield (
            f"repair= mends a model between cut and training, and Schedule(every="
            f"{stage.schedule.every!r}) cuts inside one: leave every away"
        )
    if stage.repair and stage.control == "reinit":
        yield 'control="reinit" trains from fresh weights: there is nothing to repair'


def _regrow_problems(stage: Stage) -> Iterator[str]:
    """What keeps masks from moving."""
    if stage.regrow is None:
        return
    if expand_granularity(stage.granularity) != {"weight"}:
        yield "regrow= moves single weights: it needs granularity='weight'"
    if stage.finetune is None or 0 in (stage.finetune.epochs, stage.finetune.steps):
        yield "regrow= moves masks while the network trains: give finetune="
    if stage.schedule is not None and stage.schedule.every is not None:
        yield (
            f"regrow= and Schedule(every={stage.schedule.every!r}) both move masks inside one "
            "training: leave one of them away"
        )


def _guard_problems(stage: Stage) -> Iterator[str]:
    """What is wrong with the guard and with what may be missed."""
    drop: Any = stage.max_drop
    number = isinstance(drop, (int, float)) and not isinstance(drop, bool)
    if drop is not None and not (number and 0 <= drop < math.inf):
        yield (
            f"max_drop={drop!r}: how much worse the metric may get, at least 0, in the unit "
            "of the metric (0.01 is one point of accuracy)"
        )
    if drop is not None and stage.wants_drop:
        yield (
            "max_drop and a budget that limits the drop of the metric say the same twice: "
            "leave max_drop away"
        )
    allowed: Any = stage.allow_missed
    if not isinstance(allowed, bool):
        yield f"allow_missed must be True or False, got {allowed!r}"
    if stage.allow_missed and stage.threshold is not None:
        yield "allow_missed is for a budget; a threshold has no size to miss"
    if stage.control == "reinit" and (drop is not None or stage.wants_drop):
        yield (
            'control="reinit" starts again from fresh weights after the last cut, and with a '
            "limit on the drop of the metric no cut is known to be the last"
        )
    curve = None if stage.schedule is None else stage.schedule.curve
    if stage.searches and curve not in (None, "exponential"):
        yield (
            f"a budget without sizes has no end that a curve could lead to, got curve "
            f'{curve!r}: write Schedule("exponential", steps={TRIES}), where steps is the most '
            "that will be tried"
        )


def _clock_problems(stage: Stage) -> Iterator[str]:
    """What cannot be done inside one fine-tuning."""
    if stage.schedule is None or stage.schedule.every is None:
        return
    what = f"Schedule(every={stage.schedule.every!r}) cuts inside one fine-tuning"
    if stage.finetune is None or 0 in (stage.finetune.epochs, stage.finetune.steps):
        yield f"{what}: give finetune="
    elif stage.finetune.patience is not None:
        yield f"{what}, which patience could stop before the last cut: leave patience away"
    if stage.max_drop is not None or stage.wants_drop:
        yield (
            f"{what}; a limit on the drop of the metric needs steps that heal on their own, "
            "to go back to: leave every away"
        )
    if stage.control == "reinit":
        yield f'{what}; control="reinit" trains after the last cut: leave every away'


def unread_criterion(allocation: str) -> str:
    """What to say of a criterion beside `layerwise` and an allocation by sizes."""
    others = ", ".join(name for name in ALLOCATORS if name not in BY_SIZE)
    return (
        f"layerwise chooses weights without it, and allocation={allocation!r} goes by sizes: leave "
        f"it away, or take an allocation that reads scores ({others})"
    )


def _layerwise_problems(stage: Stage) -> Iterator[str]:
    """What a cut layer by layer cannot be combined with."""
    how = stage.layerwise
    if how is None or stage.decided_by is not None:
        return  # what decides the whole cut does not read it, which is said already
    if expand_granularity(stage.granularity) != {"weight"}:
        yield "layerwise= cuts single weights: it needs granularity='weight'"
    if stage.threshold is not None:
        yield (
            "layerwise= cuts each layer to a number of weights, and a threshold gives none: give a "
            "budget, as in Budget(units=0.5), or leave layerwise away"
        )
    if stage.unscored and stage.criterion != "taylor":
        yield f"criterion={stage.criterion!r}: {unread_criterion(stage.allocation)}"
    if stage.unscored and not stage.steps.rescore:
        yield (
            f"Schedule(rescore=False): with layerwise= and allocation={stage.allocation!r} nothing "
            "is scored: leave rescore away"
        )
    if stage.steps.every is not None:
        yield (
            f"layerwise= solves a model between two trainings, and Schedule(every="
            f"{stage.steps.every!r}) cuts inside one: leave every away"
        )
    if stage.control not in (None, "reinit"):
        yield (
            f"control={stage.control!r} changes scores, and layerwise= chooses weights without "
            "them: compare with criterion='random' and no layerwise, or take control='reinit'"
        )
    if how.method != "sparsegpt":
        return
    if "bias" in stage.repair:
        yield (
            "repair=('bias',) adds what removed weights said, and layerwise= by 'sparsegpt' has "
            "those that stay make up for it already: leave bias away, or take method='wanda'"
        )
    if stage.regrow is not None and RULES[stage.regrow.rule].dense:
        yield (
            f"Regrow({stage.regrow.rule!r}) brings weights back with their values from before the "
            "cut, and layerwise= by 'sparsegpt' has the others make up for them: take 'rigl' or "
            "'set', or method='wanda'"
        )
