"""secateurs: gradient-based pruning for PyTorch models.

    model, example_inputs -- trace    -> Graph    what can be pruned, and what cannot and why
    model, batches, loss  -- score    -> Scores   how much every unit matters
    Scores, Budget        -- allocate -> Counts   how many units each target keeps
    Scores, Counts        -- select   -> Plan     which ones, as indices and masks
    model, optimizer      -- hold_masks, finetune -> the masked model heals
    model, Plan           -- shrink   -> a smaller model, verified equal to the masked one
    optimizer, Plan       -- carry_optimizer -> its state sliced, to train the smaller model on
    before, after         -- measure, diagnose, report

`prune` is the composition of these. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateurs.allocation import Sensitivity as Sensitivity
    from secateurs.allocation import allocate as allocate
    from secateurs.allocation import preview as preview
    from secateurs.carrying import carry_optimizer as carry_optimizer
    from secateurs.checkpoints import Checkpoints as Checkpoints
    from secateurs.diagnosis import diagnose as diagnose
    from secateurs.during import prune_during as prune_during
    from secateurs.errors import PruningError as PruningError
    from secateurs.finetuning import Distillation as Distillation
    from secateurs.finetuning import Finetune as Finetune
    from secateurs.finetuning import finetune as finetune
    from secateurs.graph import trace as trace
    from secateurs.kth import kth_largest as kth_largest
    from secateurs.latency import LatencyTable as LatencyTable
    from secateurs.latency import fit_latency as fit_latency
    from secateurs.latency import measure_table as measure_table
    from secateurs.masks import apply_masks_ as apply_masks_
    from secateurs.masks import bake_masks_ as bake_masks_
    from secateurs.masks import hold_masks as hold_masks
    from secateurs.measurement import measure as measure
    from secateurs.penalties import Penalty as Penalty
    from secateurs.pipeline import Stage as Stage
    from secateurs.pipeline import prune as prune
    from secateurs.pipeline import prune_stages as prune_stages
    from secateurs.posttraining import FisherSearch as FisherSearch
    from secateurs.posttraining import LayerwiseCut as LayerwiseCut
    from secateurs.posttraining import compensate_bias as compensate_bias
    from secateurs.posttraining import prune_layerwise as prune_layerwise
    from secateurs.posttraining import recalibrate_norms as recalibrate_norms
    from secateurs.posttraining import reconstruct as reconstruct
    from secateurs.posttraining import search_masks as search_masks
    from secateurs.regrowth import Regrow as Regrow
    from secateurs.regrowth import regrow_masks as regrow_masks
    from secateurs.report.scores import plot_agreement as plot_agreement
    from secateurs.report.scores import plot_scores as plot_scores
    from secateurs.report.sensitivity import plot_sensitivity as plot_sensitivity
    from secateurs.schedules import Schedule as Schedule
    from secateurs.scores import agreement as agreement
    from secateurs.scores import combine as combine
    from secateurs.scores import load_scores as load_scores
    from secateurs.scores import save_scores as save_scores
    from secateurs.scores import subset as subset
    from secateurs.scoring import score as score
    from secateurs.searching import search as search
    from secateurs.selection import select as select
    from secateurs.sensitivities import sensitivity as sensitivity
    from secateurs.statistics.blocks import obs_update as obs_update
    from secateurs.surgery import load as load
    from secateurs.surgery import save as save
    from secateurs.surgery import shrink as shrink
    from secateurs.surgery import slice_masks as slice_masks
    from secateurs.surgery import verify as verify
    from secateurs.tickets import AtInit as AtInit
    from secateurs.tickets import TicketSearch as TicketSearch
    from secateurs.tickets import find_ticket as find_ticket
    from secateurs.tickets import prune_at_init as prune_at_init
    from secateurs.tickets import reinitialise_sparse_ as reinitialise_sparse_
    from secateurs.tickets import train_ticket as train_ticket
    from secateurs.types import Budget as Budget
    from secateurs.types import Threshold as Threshold
    from secateurs.watching import watch as watch

__version__ = "0.1.0"

_ROOMS = {
    "allocate": "allocation",
    "preview": "allocation",
    "Sensitivity": "allocation",
    "carry_optimizer": "carrying",
    "Checkpoints": "checkpoints",
    "diagnose": "diagnosis",
    "prune_during": "during",
    "PruningError": "errors",
    "Distillation": "finetuning",
    "Finetune": "finetuning",
    "finetune": "finetuning",
    "trace": "graph",
    "kth_largest": "kth",
    "fit_latency": "latency",
    "LatencyTable": "latency",
    "measure_table": "latency",
    "apply_masks_": "masks",
    "bake_masks_": "masks",
    "hold_masks": "masks",
    "measure": "measurement",
    "Penalty": "penalties",
    "prune": "pipeline",
    "prune_stages": "pipeline",
    "Stage": "pipeline",
    "compensate_bias": "posttraining",
    "FisherSearch": "posttraining",
    "LayerwiseCut": "posttraining",
    "prune_layerwise": "posttraining",
    "recalibrate_norms": "posttraining",
    "reconstruct": "posttraining",
    "search_masks": "posttraining",
    "Regrow": "regrowth",
    "regrow_masks": "regrowth",
    "plot_agreement": "report.scores",
    "plot_scores": "report.scores",
    "plot_sensitivity": "report.sensitivity",
    "Schedule": "schedules",
    "agreement": "scores",
    "combine": "scores",
    "load_scores": "scores",
    "save_scores": "scores",
    "subset": "scores",
    "score": "scoring",
    "search": "searching",
    "select": "selection",
    "sensitivity": "sensitivities",
    "obs_update": "statistics.blocks",
    "load": "surgery",
    "save": "surgery",
    "shrink": "surgery",
    "slice_masks": "surgery",
    "verify": "surgery",
    "AtInit": "tickets",
    "find_ticket": "tickets",
    "prune_at_init": "tickets",
    "reinitialise_sparse_": "tickets",
    "TicketSearch": "tickets",
    "train_ticket": "tickets",
    "Budget": "types",
    "Threshold": "types",
    "watch": "watching",
}
__all__ = sorted([*_ROOMS, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'secateurs' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"secateurs.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
