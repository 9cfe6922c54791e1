"""Single weights by torch.nn.utils.prune, for `unstructured.py`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from benchmarks.healing_common import Dense
from secateurs.finetuning import Finetune, finetune

__all__ = ["PEERS", "Torch", "layers_of", "n_left", "n_weights", "with_torch"]


@dataclass(frozen=True)
class Torch:
    """A setting of torch.nn.utils.prune.

    Attributes:
        pick: "l1" or "random".
        rounds: prune, fine-tune, prune, ...; the kept weights fall by equal factors.
        joined: one optimizer and one learning-rate schedule over all rounds.
        tail: with `joined`, the part of the training after the last round.
    """

    pick: str = "l1"
    rounds: int = 1
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    joined: bool = False
    tail: float = 0.5
    weight_decay: float = 0.0


LRS = (1e-3, 3e-3, 1e-2)
PEERS: dict[str, dict[str, Torch]] = {
    "one-shot": {
        **{f"cosine {lr:g}": Torch(lr=lr) for lr in LRS},
        "cosine 0.01, decay": Torch(lr=1e-2, weight_decay=0.1),
    },
    "iterative": {
        **{f"{n} rounds, cosine {lr:g}": Torch(rounds=n, lr=lr) for n in (3, 5) for lr in LRS},
        "5 rounds, cosine 0.003, decay": Torch(rounds=5, lr=3e-3, weight_decay=0.1),
    },
    "random": {f"cosine {lr:g}": Torch(pick="random", lr=lr) for lr in LRS},
    "gradual": {
        f"10 rounds, one cosine {lr:g}": Torch(rounds=10, lr=lr, joined=True) for lr in LRS[:2]
    },
}


def layers_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """What density counts: the weights of linear and convolutional layers."""
    kinds = (nn.Linear, nn.Conv2d)
    return [(m, "weight") for m in model.modules() if isinstance(m, kinds)]


def n_weights(model: nn.Module) -> int:
    """How many of them there are."""
    return sum(getattr(m, name).numel() for m, name in layers_of(model))


def n_left(model: nn.Module) -> list[int]:
    """Weights that are not zero, layer by layer."""
    return [int((getattr(m, name) != 0).sum()) for m, name in layers_of(model)]


def with_torch(dense: Dense, setting: Torch, kept: int, steps: int, seed: int) -> nn.Module:
    """Pruned by torch.nn.utils.prune and fine-tuned."""
    model = copy.deepcopy(dense.model)
    layers, total = layers_of(model), n_weights(model)
    own: list[Any] = [module for module, _ in layers]
    goals = [round(total * (kept / total) ** (i / setting.rounds)) for i in range(setting.rounds)]
    goals = [*goals[1:], kept]
    pick = {"l1": torch_prune.L1Unstructured, "random": torch_prune.RandomUnstructured}

    def cut(goal: int) -> None:
        left = sum(int(getattr(m, "weight_mask", torch.ones_like(m.weight)).sum()) for m in own)
        torch_prune.global_unstructured(
            layers, pruning_method=pick[setting.pick], amount=left - goal
        )

    def train(n: int, recut: Any = None) -> None:
        config = Finetune(
            steps=n,
            optimizer="adamw",
            lr=setting.lr,
            weight_decay=setting.weight_decay,
            lr_schedule=setting.lr_schedule,
        )
        finetune(model, dense.data.train, dense.task.loss_fn, config, seed=seed, recut=recut)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if setting.joined:
            every = int(steps * (1 - setting.tail)) // setting.rounds
            due = {i * every: goal for i, goal in enumerate(goals)}
            cut(due.pop(0))
            train(steps, lambda done: cut(due.pop(done)) if done in due else None)
        else:
            ends = [round(steps * (i + 1) / len(goals)) for i in range(len(goals))]
            for goal, begin, end in zip(goals, [0, *ends], ends, strict=False):
                cut(goal)
                train(end - begin)
    for module, name in layers:
        torch_prune.remove(module, name)  # type: ignore[no-untyped-call]
    return model
