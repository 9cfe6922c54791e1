"""Find what can be pruned: `trace(model, example_inputs) -> Graph`.

The flow inside: a front end captures one run as a `Tape` of operator records (`capture`), rules
interpret it over labels (`rules`, which lists the others, and `labels`), and the components of the
labels become targets with members, sites, costs, and reasons for what is left whole (`units`).
"""

from __future__ import annotations

from torch import nn

from secateurs.graph import across, contractions, elementwise, moves  # noqa: F401  (rules)
from secateurs.graph.capture import export_module, tape_of
from secateurs.graph.rules import interpret
from secateurs.graph.units import find_targets
from secateurs.types import Graph, Inputs

__all__ = ["trace"]


def trace(model: nn.Module, example_inputs: Inputs) -> Graph:
    """Return everything in `model` that can be pruned, and what cannot and why.

    The model is captured in eval mode and left as it was: weights, gradients, buffers, mode, hooks
    and random state.

    Args:
        model: any module that `torch.export` can capture.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords); a batch of two or more
            samples keeps the batch size dynamic.

    Raises:
        CaptureError: the model refuses the inputs, returns no tensor or cannot be captured.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = trace(net, torch.randn(2, 4))
        >>> graph.units
        {'0:neuron': 8}
        >>> graph.excluded[0].name, graph.excluded[0].reason
        ('2:neuron', "it is part of the model's output")
    """
    module = export_module(model, example_inputs, training=False)
    tape, _ = tape_of(module, model, example_inputs)
    labels = interpret(tape)
    found = find_targets(labels, model)
    return Graph(
        targets=found.targets,
        excluded=found.excluded,
        costs=found.costs,
        front_end=tape.front_end,
        unknown_ops=tuple(sorted(labels.unknown)),
        detail=found.detail,
    )
