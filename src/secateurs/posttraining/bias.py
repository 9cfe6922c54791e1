"""What removed units said on average, said by the biases of those that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError
from secateurs.graph.records import Record, Ref, Tape, refs
from secateurs.masks import named_tensors
from secateurs.posttraining.cut import Cut
from secateurs.posttraining.inputs import Passes, inputs_of, passes, quiet, watch_calls
from secateurs.posttraining.layers import Call, Layer, layers_of
from secateurs.posttraining.lost import left_out
from secateurs.posttraining.measuring import Judge, checked_finite, restoring
from secateurs.posttraining.won import Won
from secateurs.types import Batches, Evaluate, Graph, LossFn, Plan

__all__ = ["compensate_bias"]


def compensate_bias(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan | Mapping[str, Tensor],
    batches: Batches,
    *,
    graph: Graph | None = None,
    loss_fn: LossFn | None = None,
    evaluate: Evaluate | None = None,
    max_batches: int | None = None,
) -> Won:
    """Fold the mean of what layers do not get any more into their biases; say what that won.

        b += (W * removed) mean(x)

    with weights W and inputs x of the dense model, over all samples and positions. So the mean of
    what a layer with removed inputs makes is that of the dense one, as long as its other inputs
    are. In a convolution with padding the borders see fewer inputs than the middle; one bias
    cannot tell them apart, and gets the mean over all positions, borders included. Weights that a
    recurrent layer reads its own states with are left: the error would come back in each step.

    This is the cheap repair, one run over the data. `reconstruct` solves biases itself, against the
    norms as they were: use one of the two, not both.

    A layer without a bias that feeds a batch norm, and nothing else, gets it through the running
    mean of that norm, which is lowered by as much. State-dict keys never change.

    Args:
        model: a copy of the dense one to be masked, or the smaller model in either form. Changed in
            place; on any exception it is as before.
        dense: the model before the cut; not changed.
        plan: what is removed, or masks by tensor name.
        batches: re-iterable of `(inputs, targets)`; a few hundred samples will do.
        graph: from `trace`, to find the batch norms behind layers without a bias, if the plan has
            been loaded from a file.
        loss_fn, evaluate: if given, measured before and after.
        max_batches: use at most that many batches.

    Returns:
        What it won; `notes` names the layers that were left, and why.

    Raises:
        ConfigError: the plan does not fit, or nothing that can be seen has lost inputs.
        ScoringError: activations that are not finite.

    Example:
        >>> import copy
        >>> dense = nn.Linear(2, 1)
        >>> model, x = copy.deepcopy(dense), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> won = compensate_bias(
        ...     model, dense, {"weight": torch.tensor([[True, False]])}, [(x, None)]
        ... )
        >>> bool(torch.isclose(model(x).mean(), dense(x).mean())), won.changed
        (True, ('bias',))

    References:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019,
        arXiv:1906.04721: the same for what quantisation changes.
    """
    outputs = plan.outputs if isinstance(plan, Plan) else ()
    judge = Judge(dense, batches, loss_fn, evaluate, max_batches, outputs)
    cut = Cut(model, dense, plan)
    detail = getattr(graph if graph is not None else plan, "detail", None)
    with restoring(model):
        cut.apply_(model)
        judge.start(model)
        theirs = named_tensors(dense)
        lost = [x for x in layers_of(dense) if cut.touches(x, theirs[x.weight])]
        layers = [x for x in lost if not x.loop]
        notes = left_out(dense, cut)
        notes += [
            f"{x.name}: states feed themselves, one mean does not fit; left" for x in lost if x.loop
        ]
        order = passes(dense, layers, batches, max_batches)
        notes += order.notes
        means = _means(dense, order, batches, max_batches)
        heirs = _norms_behind(getattr(getattr(detail, "labels", None), "tape", None), layers)
        changed: list[str] = []
        for layer in layers:
            if layer.name in means:
                taken, note = _fold(model, dense, cut, layer, means[layer.name], heirs)
                changed += taken
                notes += note
            elif layer.path in order.calls and any(layer in group for group in order.groups):
                notes.append(f"{layer.name}: no sample reaches it, left")
        if not layers:
            raise ConfigError(
                "compensate_bias found no layer that has lost inputs"
                + "".join(f"\n  {note}" for note in notes)
            )
        return judge.won(model, "means of removed inputs moved into biases", changed, notes)


def _means(
    dense: nn.Module, order: Passes, batches: Batches, max_batches: int | None
) -> dict[str, Tensor]:
    """Layer name -> (groups, in) float64 mean inputs of the dense model."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    layers = [layer for group in order.groups for layer in group]

    def look(path: str, call: Call) -> None:
        for layer in (x for x in layers if x.path == path):
            for x in layer.rows(call):
                line = x.sum(1, dtype=torch.float64)
                sums[layer.name] = sums[layer.name] + line if layer.name in sums else line
                rows[layer.name] = rows.get(layer.name, 0) + x.shape[1]

    with quiet(dense):
        for inputs in inputs_of(batches, dense, max_batches) if layers else ():
            watch_calls(dense, inputs, order.calls, look)
    return {name: total / rows[name] for name, total in sums.items()}


@torch.no_grad()
def _fold(
    model: nn.Module,
    dense: nn.Module,
    cut: Cut,
    layer: Layer,
    mean: Tensor,
    heirs: Mapping[str, str],
) -> tuple[list[str], list[str]]:
    """Names of what took the means of one layer, or a note."""
    mine, theirs = named_tensors(model), named_tensors(dense)
    weight = theirs[layer.weight].detach()
    lost = layer.matrix(weight.masked_fill(cut.mask(layer.weight, weight), 0)).double()
    delta = (lost @ mean.to(lost.device)[:, :, None])[:, :, 0]  # (groups, out)
    checked_finite(delta, layer.name)
    name, sign = (layer.bias, 1.0) if layer.bias else (heirs.get(layer.weight), -1.0)
    if name is None:
        return [], [
            f"{layer.name}: no bias, and no batch norm alone behind it that the graph knows; left"
        ]
    full = torch.zeros_like(theirs[name], dtype=torch.float64)
    if layer.bias:
        layer.place_line(full, delta)
    else:
        full.copy_(delta.reshape(-1))
    full.masked_fill_(~cut.mask(name, full), 0)
    mine[name].add_((sign * cut.own(name, full)).to(mine[name]))
    return [name], [] if layer.bias else [f"{layer.name}: no bias; {name} took its mean"]


def _norms_behind(tape: Tape | None, layers: Sequence[Layer]) -> dict[str, str]:
    """Weight -> running mean of the batch norm that reads what it makes, and nothing else does."""
    if tape is None:
        return {}
    names = {v.id: v.name for v in tape.values if v.source in ("parameter", "buffer")}
    readers: dict[int, list[Record]] = {}
    for record in tape.records:
        for ref in set(refs((record.args, record.kwargs))):
            readers.setdefault(ref.id, []).append(record)
    ids = {name: i for i, name in names.items()}
    found: dict[str, str] = {}
    for layer in layers:
        makers = readers.get(ids.get(layer.weight, -1), [])
        if len(makers) != 1 or len(makers[0].outputs) != 1:
            continue
        made = makers[0].outputs[0]
        after = readers.get(made, [])
        if len(after) != 1 or made in tape.outputs:
            continue
        norm = after[0]
        mean = _argument(norm, 3, "running_mean")
        first = _argument(norm, 0, "input")
        if norm.op != "batch_norm" or not isinstance(mean, Ref) or first != Ref(made):
            continue
        if len(readers[mean.id]) == 1 and mean.id in names:
            found[layer.weight] = names[mean.id]
    return found


def _argument(record: Record, position: int, name: str) -> Any:
    return record.args[position] if len(record.args) > position else record.kwargs.get(name)
