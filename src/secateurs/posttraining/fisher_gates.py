"""The Fisher information of unit gates, from the gradient of each sample.

A gate is a factor of one on a unit; `rows[target][i, u]` is the derivative of the loss of sample i
with respect to the gate of unit u. Removing the units R sets their gates to zero. Near a trained
model the loss then rises by about half of the mean over samples of (sum of rows[i, u], u in R)^2:
the empirical Fisher information stands for the second derivative (Kwon et al., A Fast Post-Training
Pruning Framework for Transformers, 2022, arXiv:2204.09656).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.batches import (
    batch_size,
    checked_loss,
    in_mode,
    iterate,
    model_device,
    named_outputs,
    preserve,
    tensors,
)
from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics.collector import call_with
from secateurs.statistics.gates import GateSums, probe_gates
from secateurs.statistics.units import check_fits, members_of, one_sample, some_samples
from secateurs.types import Batch, Batches, Graph, GroupTarget, LossFn, Scores

__all__ = ["GateFisher", "any_output", "check_n_samples", "first_samples", "gate_fisher"]


@dataclass(frozen=True, eq=False)
class GateFisher:
    """Derivatives of the loss of each sample with respect to the gates of units.

    Attributes:
        rows: target -> (n_samples, n_units) float64 on the CPU: eight bytes for each number.
        notes: targets for which every sample had a backward pass of its own, and why.

    Example:
        >>> fisher = GateFisher({"fc": torch.tensor([[1.0, -1.0], [2.0, -2.0]])})
        >>> fisher.diagonal("fc").tolist()
        [2.5, 2.5]
        >>> fisher.lost("fc", torch.tensor([True, True]))  # one makes up for the other
        0.0
    """

    rows: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def n_samples(self) -> int:
        """Samples that were seen."""
        return len(next(iter(self.rows.values())))

    def diagonal(self, name: str) -> Tensor:
        """(n_units,) mean over the samples of the squared derivative of each gate."""
        return self.rows[name].square().mean(0)

    def block(self, name: str) -> Tensor:
        """(n_units, n_units): the mean of the products of each two gates of a target."""
        rows = self.rows[name]
        return rows.T @ rows / len(rows)

    def lost(self, name: str, gone: Tensor) -> float:
        """gone' I gone, I the block of a target: twice what removing these units is to cost.

        Args:
            name: a target.
            gone: (n_units,) bool, True for units that go.
        """
        return float(self.rows[name][:, gone].sum(1).square().mean())

    def scores(self, graph: Graph) -> Scores:
        """The diagonal as scores of `graph`, which `allocate` and `select` take."""
        values = {name: self.diagonal(name).float() for name in self.rows}
        return Scores(graph, values, "fisher of gates", self.notes, self.n_samples)


def any_output(seed: int = 0, *, outputs: Sequence[str] = (), centered: bool = True) -> LossFn:
    """A "loss" whose Fisher information says how much units move the outputs, whatever the labels.

    Of most samples that a network has learned the loss is near zero, and so are its derivatives: a
    few samples decide. A step of one length in a random direction of the outputs says of every
    sample, on average, the sum of the squared derivatives of all its outputs. (Of two logits that
    is their difference, for every sample; random signs would see nothing of every second one.)

    Args:
        seed: of the directions, which are drawn for each call.
        outputs: the parts of the model's output that matter, as in `trace`; empty for all.
        centered: take the mean of the last dimension off first, which a softmax does not see; False
            for outputs that are no logits.

    Returns:
        A function of outputs (targets are not looked at), the mean over the samples.

    Raises:
        ScoringError: the model returns no floating-point tensor (when it is called).
    """
    draw = torch.Generator().manual_seed(seed)

    def projection(made: Any, _: Any) -> Tensor:
        parts = tensors(named_outputs(made, outputs))
        found = [t for t in parts if t.is_floating_point() and t.dim()]
        if not found:
            raise ScoringError("the model returns no floating-point tensor with samples")
        total = found[0].new_zeros(())
        for out in found:
            way = torch.randn(out.shape, generator=draw, dtype=torch.float64)
            size = out.shape[-1] if out.dim() > 1 else 1  # (n,) is one output for each sample
            way = way if out.dim() > 1 else way[:, None]
            if centered and size > 1:
                way, size = way - way.mean(-1, keepdim=True), size - 1
            way = way * (size**0.5 / way.norm(dim=-1, keepdim=True))
            total = total + (way.view(out.shape).to(out) * out).sum() / len(out)
        return total

    return projection


def first_samples(batches: Batches, n_samples: int, device: torch.device) -> list[Batch]:
    """The first `n_samples` samples in their batches; the last batch may be cut, none is moved.

    Raises:
        ConfigError: fewer than one sample is asked for.
        DataError: there are no batches, or not of `(inputs, targets)`.
    """
    check_n_samples(n_samples)
    held: list[Batch] = []
    left = n_samples
    for batch in iterate(batches, device):
        n = batch_size(batch[0])
        held.append(batch if n <= left else some_samples(batch, slice(0, left), n))
        left -= min(n, left)
        if left == 0:
            break
    return held


def check_n_samples(n_samples: int) -> None:
    """Raise unless there is a sample.

    Raises:
        ConfigError: fewer than one is asked for.
    """
    if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
        raise ConfigError(f"n_samples must be a whole number, at least 1, got {n_samples!r}")


def gate_fisher(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    targets: Sequence[GroupTarget],
    *,
    n_samples: int = 512,
    seed: int = 0,
) -> GateFisher:
    """The derivative of the loss of each sample with respect to the gate of each unit.

    One backward pass for each batch covers all targets whose units can be seen in plain calls of
    modules. The others (attention inside `nn.MultiheadAttention`, layers of a library's own kind)
    take one for each sample; `notes` names them.

    Args:
        model: in eval mode for the time of the call, and left exactly as it was.
        batches: re-iterable of `(inputs, targets)`.
        loss_fn: mean over the samples.
        targets: structural targets of the model's graph.
        n_samples: the first so many samples are used.
        seed: of models that draw random numbers.

    Raises:
        ConfigError: nothing to look at, or targets of another model.
        DataError, CaptureError: batches that do not fit the model.
        ScoringError: a loss or derivative that is not finite, or none that depends on any unit.
    """
    if not targets:
        raise ConfigError("there are no structural targets; use a granularity that the graph has")
    params = check_fits(model, targets)
    held = first_samples(batches, n_samples, model_device(model))
    with _differentiable(model, seed):
        checked_loss(model, held[0], loss_fn)
        sites, slow = probe_gates(model, held[0], targets, "removal", params)
        seen = [t for t in targets if t.name in sites]
        gates = GateSums(model, sites)
        if seen:
            gates.probe(held[0][0])
        rows: dict[str, list[Tensor]] = {t.name: [] for t in targets}
        for number, batch in enumerate(held):
            if seen:
                _backward(model, batch, loss_fn, gates, number)
            for target in seen:
                rows[target.name].append(gates.per_sample(target))
            single = [t for t in targets if t.name in slow]
            for name, part in _one_by_one(model, batch, loss_fn, single, number).items():
                rows[name].append(part)
    found = {name: torch.cat(parts) for name, parts in rows.items()}
    _check(found)
    notes = [f"{n}: one backward pass for each sample ({why})" for n, why in slow.items()]
    return GateFisher(found, tuple(notes))


def _check(rows: Mapping[str, Tensor]) -> None:
    for name, found in rows.items():
        if not torch.isfinite(found).all():
            raise ScoringError(
                f"{name}: the derivative of a gate is not finite; check the data, and the loss "
                "where its gradient is undefined"
            )
    if not any(found.any() for found in rows.values()):
        raise ScoringError(
            "the loss of no sample depends on any unit: its gradient is zero everywhere. A loss "
            "that is saturated (all samples perfectly learned) says nothing; use other samples"
        )


def _backward(
    model: nn.Module, batch: Batch, loss_fn: LossFn, gates: GateSums, number: int
) -> None:
    """One forward and backward pass of the mean loss with the gates in place."""
    with torch.enable_grad(), gates.running(batch_size(batch[0])):
        loss = checked_loss(model, batch, loss_fn, f"batch {number}")
        if loss.requires_grad:
            torch.autograd.backward(loss, inputs=[gates.anchor])
    gates.anchor.grad = None


def _one_by_one(
    model: nn.Module, batch: Batch, loss_fn: LossFn, targets: Sequence[GroupTarget], number: int
) -> dict[str, Tensor]:
    """Target -> (n, n_units): the same derivatives by scaling weights, sample by sample."""
    n = batch_size(batch[0])
    rows = {t.name: torch.zeros(n, t.n_units, dtype=torch.float64) for t in targets}
    device = model_device(model)
    for i in range(n if targets else 0):
        gates = {t.name: torch.ones(t.n_units, device=device, requires_grad=True) for t in targets}
        inputs, wanted = one_sample(batch, i, n)
        with torch.enable_grad():
            outputs = call_with(model, _scaled(model, targets, gates), inputs)
            loss = loss_fn(outputs, wanted).reshape(())
            if not torch.isfinite(loss.detach()):
                raise ScoringError(f"batch {number}, sample {i}: the loss is {loss.item()}")
            grads = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
        for name, grad in zip(gates, grads, strict=True):
            if grad is not None:
                rows[name][i] = grad.double().cpu()
    return rows


def _scaled(
    model: nn.Module, targets: Sequence[GroupTarget], gates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Parameters with the members that remove a unit multiplied by its gate."""
    params = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for target in targets:
        for member in members_of(target, "removal", params):
            weight = found.get(member.tensor, params[member.tensor].detach())
            index, unit = (
                torch.from_numpy(np.ascontiguousarray(a)).to(weight.device)
                for a in (member.index, member.unit)
            )
            line = torch.ones(weight.shape[member.dim], dtype=weight.dtype, device=weight.device)
            line = line.index_put((index,), gates[target.name][unit].to(weight.dtype))
            shape = [1] * weight.dim()
            shape[member.dim] = -1
            found[member.tensor] = weight * line.view(shape)
    return found


@contextmanager
def _differentiable(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode in which every gate can be differentiated; all is put back at the end."""
    mha = torch.backends.mha
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(preserve(model))
        stack.enter_context(in_mode(model, training=False))
        for p in model.parameters():
            stack.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)  # it would pass by the hooks
        torch.manual_seed(seed)
        yield
