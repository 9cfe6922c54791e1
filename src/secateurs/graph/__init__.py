"""Find what can be pruned: `trace(model, example_inputs) -> Graph`.

The flow inside: a front end captures one run as a `Tape` of operator records (`capture`), rules
interpret it over labels (`rules`, which lists the others, and `labels`), and the components of the
labels become targets with members, sites, costs, and reasons for what is left whole (`units`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateurs.batches import call_model, clone_inputs, in_mode, model_device, preserve, tensors
from secateurs.errors import CaptureError
from secateurs.graph import (  # noqa: F401  (their rules register themselves)
    attention,
    contractions,
    convolutions,
    elementwise,
    indexing,
    joining,
    moves,
    norms,
    products,
    recurrent,
    reductions,
)
from secateurs.graph.capture import export_module, tape_of
from secateurs.graph.commute import failing_moves
from secateurs.graph.labels import Labels, Options
from secateurs.graph.records import Tape, refs
from secateurs.graph.rules import interpret, register_rule
from secateurs.graph.tape import record_run
from secateurs.graph.units import Found, find_targets, tensor_costs
from secateurs.types import Exclusion, Graph, Inputs, WeightTarget

__all__ = ["register_rule", "trace"]


def trace(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    outputs: Sequence[str] = (),
    heads: Literal["head", "head_dim"] = "head",
    norm: Literal["exact", "pin"] = "exact",
) -> Graph:
    """Return everything in `model` that can be pruned, and what cannot and why.

    The model is run once, in eval mode, and left as it was: weights, gradients, buffers, mode,
    hooks and random state. Where a run cannot be recorded it is captured by `torch.export`; where
    that fails, too, only single weights can be pruned, and `notes` says why.

    Args:
        model: any module. On the meta device nothing is computed: a model larger than the memory
            can be planned.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords).
        outputs: names of the outputs that matter ("logits", "0", "features.2"); what else the model
            returns may change its shape. Empty: all matter.
        heads: what attention keeps of channels viewed as heads x head size: "head", whole heads;
            "head_dim", the same positions of every head.
        norm: "exact": units that a layer norm, RMS norm or mean counts may go, and it goes on to
            count them as the zeros that they are in the masked model. "pin": they stay.

    Raises:
        CaptureError: the model refuses the inputs or returns no tensor.
        ConfigError: it has no output of that name.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = trace(net, torch.randn(2, 4))
        >>> graph.units
        {'0:neuron': 8}
        >>> graph.excluded[0].name, graph.excluded[0].reason
        ('2:neuron', "it is part of the model's output")
    """
    tape, notes = _captured(model, example_inputs, outputs)
    shapes = pytree.tree_map_only(
        torch.Tensor, lambda t: torch.empty_like(t, device="meta"), example_inputs
    )
    if tape is None:
        return replace(_masks_only(model, tuple(outputs), notes), inputs=shapes)
    labels = interpret(tape, Options(heads, norm))
    found = find_targets(labels, model)
    while _pin_what_cannot_follow(labels, found):
        found = find_targets(labels, model)
    return Graph(
        targets=found.targets,
        excluded=found.excluded,
        costs=found.costs,
        front_end=tape.front_end,
        unknown_ops=tuple(sorted(labels.unknown)),
        outputs=tuple(outputs),
        notes=notes,
        device=model_device(model).type,
        detail=found.detail,
        inputs=shapes,
    )


def _captured(
    model: nn.Module, inputs: Inputs, outputs: Sequence[str]
) -> tuple[Tape | None, tuple[str, ...]]:
    """A tape from the first front end that can make one, and notes if it is not the usual one.

    Raises:
        CaptureError: the model itself refuses the inputs.
    """
    try:
        return record_run(model, inputs, outputs), ()
    except CaptureError as error:
        first = error
    with preserve(model), in_mode(model, training=False), torch.no_grad():
        try:
            output = call_model(model, clone_inputs(inputs))
        except Exception:
            raise first from first.__cause__
    if not tensors(output):
        raise first
    try:
        module = export_module(model, inputs, training=False)
        tape, _ = tape_of(module, model, inputs, tuple(outputs))
    except CaptureError as second:
        return None, (
            f"single weights only: the structure cannot be captured, neither by recording a run "
            f"({first}) nor by torch.export ({second})",
        )
    return tape, (f"captured by torch.export, because a run cannot be recorded: {first}",)


def _masks_only(model: nn.Module, outputs: tuple[str, ...], notes: tuple[str, ...]) -> Graph:
    """A graph of single weights, of a model whose structure is not known."""
    named = dict(model.named_parameters())
    weights = {n: WeightTarget(n, tuple(p.shape)) for n, p in named.items() if p.dim() > 1}
    owners = dict.fromkeys(name.rpartition(".")[0] or name for name in named)
    why = "the model's structure cannot be captured; its single weights can be masked"
    return Graph(
        targets=weights,
        excluded=tuple(Exclusion(owner, why) for owner in owners),
        costs=tuple(tensor_costs(model)),
        front_end="none",
        outputs=outputs,
        notes=notes,
        device=model_device(model).type,
    )


def _pin_what_cannot_follow(labels: Labels, found: Found) -> bool:
    """Try a random cut on every operator that moves data; pin the labels of those that fail.

    Returns:
        Whether something was pinned, so that the units must be found again.
    """
    rng = np.random.default_rng(0)
    gone = np.zeros(labels.n_atoms, dtype=bool)
    for family in found.detail.families:
        gone[rng.permutation(family)[len(family) // 2 :]] = True
    removed = gone[found.detail.component]
    failing = failing_moves(labels, removed)
    for record, why in failing:
        for factor in labels.factors(next(refs(record.args))):
            if removed[factor.labels].any():
                labels.pin(factor.labels, f"{record.op} cannot follow a cut: {why}", record.where)
    return bool(failing)
