"""Helpers of the structural tests: small networks, random parameters, the flow in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.batches import call_model, in_mode, tensors
from secateurs.surgery.shrinking import ShrinkInfo, info_of
from secateurs.surgery.verification import Verification, relative_error
from secateurs.types import Graph, Inputs, Plan

STRUCTURE = ("structured", "embedding")


class Net(nn.Module):
    """A network from named parts and a function of them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self, *args, **kwargs)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases, scales and statistics: zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            draw = torch.randn(tensor.shape, generator=generator)
            if "running_var" in name:
                draw = draw.abs() + 0.5
            elif tensor.dim() > 1:
                draw = draw / tensor[0].numel() ** 0.5
            else:
                draw = 0.5 * draw + 0.1
            tensor.copy_(draw)
    return model


def traced(model: nn.Module, inputs: Inputs) -> Graph:
    """`trace` of a model with random parameters."""
    return sc.trace(randomized(model), inputs)


def units_of(graph: Graph) -> dict[str, int]:
    """Number of units of every structural family, embeddings included."""
    return {t.name: t.n_units for t in graph.groups(STRUCTURE)}


def plan_of(model: nn.Module, graph: Graph, units: float = 0.5) -> Plan:
    """A plan that keeps a share of the units of every family, chosen at random; at least one."""
    scores = sc.score(model, criterion="random", graph=graph, granularity=STRUCTURE)
    rule = sc.Threshold("quantile", q=1 - units)
    return sc.select(scores, sc.allocate(scores, rule))


def shrunk(
    model: nn.Module, plan: Plan, inputs: Inputs, form: str = "auto"
) -> tuple[nn.Module, ShrinkInfo]:
    """The smaller model and how it was made."""
    small = sc.shrink(model, plan, inputs, form=form)
    return small, info_of(small)


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that the model returns in eval mode."""
    with in_mode(model, training=False), torch.no_grad():
        return tensors(call_model(model, inputs))


def gap(a: nn.Module, b: nn.Module, inputs: Inputs) -> float:
    """Relative difference of two models' outputs."""
    return relative_error(outputs(a, inputs), outputs(b, inputs))


def tolerable(found: Verification) -> bool:
    """Compared, and equal."""
    return found.comparable and found.ok


def image(batch: int = 2, channels: int = 3, size: int = 6) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def rows(batch: int = 3, features: int = 6) -> Tensor:
    return torch.randn(batch, features, generator=torch.Generator().manual_seed(2))


def sequence(batch: int = 2, steps: int = 5, features: int = 4) -> Tensor:
    return torch.randn(batch, steps, features, generator=torch.Generator().manual_seed(3))
