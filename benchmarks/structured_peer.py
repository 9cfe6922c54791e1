"""Channels by Torch-Pruning, for `structured_healing.py`: all of its criteria that fit."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.healing_common import Dense
from secateurs.finetuning import Finetune, finetune
from secateurs.macs import macs

__all__ = ["OVER", "PEERS", "Peer", "config", "with_torch_pruning"]

OVER = 1.01
"""How much more than the budget a network of the peer may have."""


@dataclass(frozen=True)
class Peer:
    """A setting of Torch-Pruning.

    Attributes:
        importance: class in `torch_pruning.importance`.
        p: of the norm, where the class has one; 0 = it has none.
        globally: rank the channels of all layers together.
        rounds: cut, fine-tune, cut, ...; the MACs fall by equal factors.
    """

    importance: str
    p: int = 0
    globally: bool = False
    rounds: int = 1


_MAGNITUDE, _TAYLOR = "GroupMagnitudeImportance", "GroupTaylorImportance"
PEERS: dict[str, Peer] = {
    "l1": Peer(_MAGNITUDE, 1),
    "l2": Peer(_MAGNITUDE, 2),
    "l2 global": Peer(_MAGNITUDE, 2, globally=True),
    "taylor": Peer(_TAYLOR),
    "taylor global": Peer(_TAYLOR, globally=True),
    "hessian": Peer("GroupHessianImportance"),
    "hessian global": Peer("GroupHessianImportance", globally=True),
    "fpgm": Peer("FPGMImportance", 2),
    "fpgm global": Peer("FPGMImportance", 2, globally=True),
    "bn scale": Peer("BNScaleImportance"),
    "bn scale global": Peer("BNScaleImportance", globally=True),
    "lamp global": Peer("LAMPImportance", 2, globally=True),
    "random": Peer("RandomImportance"),
    "l2, 3 rounds": Peer(_MAGNITUDE, 2, rounds=3),
    "taylor, 3 rounds": Peer(_TAYLOR, rounds=3),
}
"""Its LAMP ranks like "l2" within a layer, so that it is tried globally only."""


def config(steps: int, lr: float) -> Finetune:
    """The same fine-tuning for both tools."""
    return Finetune(steps=steps, optimizer="adamw", lr=lr, weight_decay=0.01, lr_schedule="cosine")


def with_torch_pruning(
    dense: Dense, setting: Peer, keep: float, lr: float, steps: int, seed: int
) -> nn.Module:
    """Cut and fine-tuned, in one or several rounds."""
    model = copy.deepcopy(dense.model)
    ends = [round(steps * (i + 1) / setting.rounds) for i in range(setting.rounds)]
    for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        model = smaller(dense, model, setting, keep ** ((i + 1) / setting.rounds), seed)
        finetune(model, dense.data.train, dense.task.loss_fn, config(end - begin, lr), seed=seed)
    return model


def smaller(dense: Dense, model: nn.Module, setting: Peer, keep: float, seed: int) -> nn.Module:
    """The widest network of the peer with at most `OVER` x `keep` of the dense MACs."""
    inputs = dense.data.example_inputs
    whole = macs(dense.model, inputs)
    low, high, best = 0.0, 1.0, None
    for _ in range(12):
        ratio = (low + high) / 2
        found = cut_at(dense, model, setting, ratio, seed)
        if macs(found, inputs) <= OVER * keep * whole:
            high, best = ratio, found
        else:
            low = ratio
    assert best is not None, "no ratio of channels meets the budget"
    return best


def cut_at(dense: Dense, model: nn.Module, setting: Peer, ratio: float, seed: int) -> nn.Module:
    """A copy with that part of the channels cut, as the README of Torch-Pruning shows."""
    tp = importlib.import_module("torch_pruning")
    model = copy.deepcopy(model).eval()
    kind = getattr(tp.importance, setting.importance)
    importance = kind(p=setting.p) if setting.p else kind()
    if setting.importance == "GroupTaylorImportance":
        for inputs, targets in dense.data.calibration:
            torch.autograd.backward(dense.task.loss_fn(model(inputs), targets))
    elif setting.importance == "GroupHessianImportance":
        accumulate(importance, dense, model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tp.pruner.BasePruner(
            model, dense.data.example_inputs, importance=importance, pruning_ratio=ratio,
            global_pruning=setting.globally, ignored_layers=[model.head], max_pruning_ratio=0.97,
            in_channel_groups={}, out_channel_groups={}, num_heads={},
        ).step()  # fmt: skip
    model.zero_grad(set_to_none=True)
    return model


def accumulate(importance: Any, dense: Dense, model: nn.Module) -> None:
    """Squared gradients sample by sample, as its importance wants them."""
    importance.zero_grad()
    inputs, targets = dense.data.calibration[0]
    for i in range(len(targets)):
        model.zero_grad()
        one = slice(i, i + 1)
        torch.autograd.backward(dense.task.loss_fn(model(inputs[one]), targets[one]))
        importance.accumulate_grad(model)
