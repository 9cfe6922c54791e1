"""Fine-tuning: train a model, masked or not, while the cut heals.

    finetune(model, batches, loss_fn, Finetune(epochs=3), masks=plan.masks) -> FinetuneResult

The reference loop: plain, checked, in place. `Finetune` says how to train and is a recipe block;
everything that is an object (masks, teacher, evaluation) is an argument. A user with a loop of
their own needs only `hold_masks` from the room before.
"""

from secateurs.finetuning.clock import Clock, clock_of
from secateurs.finetuning.config import (
    LR_SCHEDULES,
    OPTIMIZERS,
    EpochRow,
    Finetune,
    FinetuneResult,
)
from secateurs.finetuning.distillation import Distillation, distillation, distillation_loss
from secateurs.finetuning.hidden import HiddenPoint, hidden_loss, hidden_points
from secateurs.finetuning.loop import finetune
from secateurs.finetuning.parts import Part, Training
from secateurs.finetuning.sharing import counted, has_unused, wrapped
from secateurs.finetuning.state import restore_, snapshot

__all__ = [
    "LR_SCHEDULES",
    "OPTIMIZERS",
    "Clock",
    "Distillation",
    "EpochRow",
    "Finetune",
    "FinetuneResult",
    "HiddenPoint",
    "Part",
    "Training",
    "clock_of",
    "counted",
    "distillation",
    "distillation_loss",
    "finetune",
    "has_unused",
    "hidden_loss",
    "hidden_points",
    "restore_",
    "snapshot",
    "wrapped",
]
