"""Per-sample gate gradients from one backward pass of a whole batch.

A gate is a factor of one on the activation of a unit; its derivative is, for each sample, the sum
over positions of activation x gradient. Neither needs weight gradients, and in-place operations
that follow spoil neither.

    Gates      multiplies each hooked activation (n, ..., size, ...) by ones (n, 1, size, 1), whose
               gradients can be taken as often as wanted
    GateSums   passes each activation on as it is and sums activation x gradient in the one backward
               pass that follows: the same numbers for less (see `_Through`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.batches import batch_size, call_model, model_device
from secateurs.criteria import FINISH
from secateurs.errors import ScoringError
from secateurs.statistics.collector import Collector, Request, Run, Setting
from secateurs.statistics.hooks import Key, into_site_units, key_of, site_values
from secateurs.statistics.jobs import Job
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters, members_of, removal_role, some_samples
from secateurs.types import Batch, GroupTarget, Inputs, Role, Site, Target

__all__ = ["GateSums", "Gates", "UnitGates", "probe_gates"]

PRODUCT_ELEMENTS = 2**17


class UnitGates(Collector):
    """Gates on units, for every criterion that needs nothing else: finished by sample or batch.

    One per choice of members. Weight gradients are never computed.
    """

    shares = "backward"

    def __init__(
        self,
        setting: Setting,
        jobs: Mapping[str, Job],
        targets: Sequence[GroupTarget],
        sites: Mapping[str, Sequence[Site]],
        sums: View,
    ) -> None:
        super().__init__(setting, Request("gate", {}, "", list(targets)), sums)
        self._jobs = jobs
        self._gates = GateSums(setting.model, sites)

    def begin(self, run: Run) -> None:
        """See what the model changes in place."""
        self._gates.probe(run.inputs)

    def watch(self, run: Run) -> AbstractContextManager[None]:
        """Put gates into the model."""
        return self._gates.running(run.n)

    def leaves(self) -> Sequence[Tensor]:
        """What makes the backward pass reach every gate."""
        return [self._gates.anchor]

    @torch.no_grad()
    def arrived(self, run: Run) -> None:
        """Fold the gate gradients of a batch into the sums of every criterion."""
        for target in self.request.groups:
            gate = self._gates.per_sample(target)  # (n, n_units)
            if not torch.isfinite(gate).all():
                raise ScoringError(
                    f"batch {run.number}: the gradient at {target.name} is not finite; check the "
                    "data, and the loss where its gradient is undefined"
                )
            self.sums.add(f"size/{target.name}", gate.abs().sum())
            for label, job in self._jobs.items():
                c, key = job.criterion, f"{label}/{target.name}"
                finish = FINISH[c.finish]
                if c.average == "sample":
                    self.sums.add(key, finish(c.fn({"gate": gate})).sum(0))
                elif c.average == "batch":
                    self.sums.add(key, finish(c.fn({"gate": gate.mean(0)})), run.n)
                else:
                    self.sums.add(key, gate.sum(0))

    def score(self, job: Job, target: Target) -> Tensor:
        """(n_units,) finished scores of one criterion."""
        c = job.criterion
        mean = self.sums[f"{c.label}/{target.name}"] / self.n_samples
        return mean if c.average != "dataset" else FINISH[c.finish](c.fn({"gate": mean}))

    def untouched(self, target: Target) -> bool:
        """Whether nothing has arrived at any unit of the target, in any batch."""
        return not self.sums[f"size/{target.name}"]


class Gates:
    """Per-sample gradients of a gate on every unit of some targets."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Sequence[Site]]) -> None:
        self._model = model
        self._sites = sites
        self._gates: dict[Key, Tensor] = {}
        self._n = 0

    @contextmanager
    def running(self, n: int) -> Iterator[None]:
        """Hook the model for one forward pass of `n` samples."""
        self._gates, self._n = {}, n
        every = [site for sites in self._sites.values() for site in sites]
        with site_values(self._model, every, self._multiply, self._multiply_again):
            yield

    def _multiply(self, key: Key, value: Tensor) -> Tensor:
        _check_samples(key, value, self._n)
        shape = [1] * value.dim()
        shape[0], shape[key[4]] = self._n, value.shape[key[4]]
        gate = torch.ones(shape, dtype=value.dtype, device=value.device, requires_grad=True)
        self._gates[key] = gate
        return value * gate

    def _multiply_again(self, key: Key, value: Tensor) -> Tensor:
        return value * self._gates[key]

    @property
    def leaves(self) -> list[Tensor]:
        """The gates of the last run, in the order in which `per_sample` wants the gradients."""
        return list(self._gates.values())

    def per_sample(self, target: GroupTarget, grads: Sequence[Tensor | None]) -> Tensor:
        """dL_i/dgate of each sample i and unit: (n, n_units) float64 on the CPU.

        Args:
            target: one of the targets.
            grads: gradient of the *mean* loss for each of `leaves`; None where none arrives.
        """
        by_key = dict(zip(self._gates, grads, strict=True))
        out = torch.zeros(self._n, target.n_units, dtype=torch.float64)
        for site in self._sites[target.name]:
            grad = by_key[key_of(site)]
            if grad is None:
                continue
            rows = grad.detach().reshape(self._n, -1).double().cpu() * self._n  # (n, size)
            into_site_units(rows, site, out)
        return out


def _check_samples(key: Key, value: Tensor, n: int) -> None:
    if value.shape[0] != n:
        raise ScoringError(
            f"{key[0]}: {key[2]} of shape {tuple(value.shape)} does not begin with the {n} samples "
            "of the batch, though it did in the first batch. Give batches of one size"
        )


class GateSums:
    """Per-sample gradients of a gate on every unit, from the one backward pass of a run.

    Nothing is multiplied, and a copy is made only where the model changes an activation in place.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Sequence[Site]]) -> None:
        self._model = model
        self._sites = sites
        self._every = [site for group in sites.values() for site in group]
        self._rows: dict[Key, Tensor] = {}
        self._n = 0
        self._spoiled: dict[Key, tuple[bool, bool]] = {}
        self.anchor = torch.zeros((), requires_grad=True)

    @torch.no_grad()
    def probe(self, inputs: Inputs) -> None:
        """Find out which activations are changed in place, before or behind the gate."""
        held: dict[Key, tuple[Tensor, int, Tensor, int]] = {}

        def visit(key: Key, value: Tensor) -> Tensor:
            out = value.clone()
            held[key] = value, _version(value), out, _version(out)
            return out

        with site_values(self._model, self._every, visit):
            call_model(self._model, inputs)
        for key, (value, before, out, after) in held.items():
            changed = value.is_inference() or _version(value) != before
            self._spoiled[key] = changed, _version(out) != after

    @contextmanager
    def running(self, n: int) -> Iterator[None]:
        """Hook the model for one forward pass of `n` samples, and one backward pass."""
        self._rows, self._n = {}, n
        # It is a leaf on every path to a gate: who differentiates to it passes by all of them.
        device = model_device(self._model)
        self.anchor = torch.zeros((), requires_grad=True, device=device)

        def visit(key: Key, value: Tensor) -> Tensor:
            _check_samples(key, value, n)
            return again(key, value)

        def again(key: Key, value: Tensor) -> Tensor:
            spoiled = self._spoiled.get(key, (True, True))  # not seen in the probe: be careful
            found: Tensor = _Through.apply(  # type: ignore[no-untyped-call]
                value, self.anchor, key, self._rows, *spoiled
            )
            return found

        with site_values(self._model, self._every, visit, again):
            yield

    def per_sample(self, target: GroupTarget) -> Tensor:
        """dL_i/dgate of each sample i and unit: (n, n_units) float64 on the CPU.

        The backward pass was that of the *mean* loss.
        """
        out = torch.zeros(self._n, target.n_units, dtype=torch.float64)
        for site in self._sites[target.name]:
            rows = self._rows.get(key_of(site))
            if rows is not None:  # else no gradient arrives there
                into_site_units(rows.double().cpu() * self._n, site, out)
        return out


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class _Through(torch.autograd.Function):
    """The identity, which on the way back sums activation x gradient over the positions."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, anchor: Tensor, key: Key, rows: dict[Key, Tensor],
        own: bool, copy: bool,
    ) -> Tensor:  # fmt: skip
        """The value, or a copy of it; `own`: the one that is kept for the sum is a copy as well."""
        ctx.save_for_backward(value.clone() if own else value)
        ctx.key, ctx.rows = key, rows
        return value.clone() if copy else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, as it came."""
        (value,) = ctx.saved_tensors
        (grad,) = grads
        key: Key = ctx.key
        with torch.no_grad():
            ctx.rows[key] = _sum_positions(value, grad, key[4])
        return (grad if ctx.needs_input_grad[0] else None), None, None, None, None, None


def _sum_positions(value: Tensor, grad: Tensor, dim: int) -> Tensor:
    """(n, size): sum over all positions of value x gradient, at least in float32.

    Args:
        value, grad: (n, ..., size, ...).
        dim: the one that holds the units.
    """
    half = value.dtype in (torch.float16, torch.bfloat16)
    others = [d for d in range(value.dim()) if d not in (0, dim)]
    if half:
        value = value.float()
    if not others:
        return value * grad
    # A few samples at a time: their product stays in the cache of the processor.
    n, size = value.shape[0], value.shape[dim]
    step = max(1, PRODUCT_ELEMENTS // max(value[0].numel(), 1))
    product = torch.empty((min(step, n), *value.shape[1:]), dtype=value.dtype, device=value.device)
    rows = torch.empty((n, size), dtype=value.dtype, device=value.device)
    for low in range(0, n, step):
        high = min(low + step, n)
        part = product[: high - low]
        torch.mul(value[low:high], grad[low:high], out=part)
        torch.sum(part, others, out=rows[low:high])
    return rows


def probe_gates(
    model: nn.Module,
    batch: Batch,
    targets: Sequence[GroupTarget],
    which: str,
    params: Parameters,
) -> tuple[dict[str, tuple[Site, ...]], dict[str, str]]:
    """Which targets the fast path covers exactly, and why the others must go sample by sample.

    A target is covered when every member that counts has an exact site, the site's module is
    called as often as there are sites, and its tensor begins with the samples of the batch
    (checked with the whole batch and with one sample; in train mode, where batch norm refuses one,
    with two).

    Returns:
        (target name -> its sites, target name -> reason).
    """
    sites: dict[str, tuple[Site, ...]] = {}
    slow: dict[str, str] = {}
    for target in targets:
        found, reason = _exact_sites(target, which, params)
        if reason:
            slow[target.name] = reason
        else:
            sites[target.name] = found
    n = batch_size(batch[0])
    runs: list[tuple[Inputs, int]] = [(batch[0], n)]
    fewer = 2 if any(m.training for m in model.modules()) else 1
    if n > fewer:
        runs.append((some_samples((batch[0], None), slice(0, fewer), n)[0], fewer))
    for inputs, size in runs:
        shapes, calls = _observe(model, inputs, [s for group in sites.values() for s in group])
        for name, group in list(sites.items()):
            reason = _unseen(group, shapes, calls, size)
            if reason:
                slow[name] = reason
                del sites[name]
    return sites, slow


def _exact_sites(
    target: GroupTarget, which: str, params: Parameters
) -> tuple[tuple[Site, ...], str]:
    """The sites that stand for the chosen members, or the reason why there are none."""
    roles: Mapping[str, Role] = {"removal": removal_role(target), "consumers": "consumer"}
    if which not in roles:
        return (), f"members={which!r} has no activation site"
    sites = tuple(s for s in target.sites if s.role == roles[which])
    if not sites:
        return (), f"no {roles[which]} activation can be seen from outside"
    inexact = next((s.module for s in sites if not s.gate_exact), None)
    if inexact is not None:
        return (), f"the units of {inexact} also act on themselves inside it"
    for member in members_of(target, which, params):
        home = member.tensor.rpartition(".")[0]
        if not any(s.module == home for s in sites):
            return (), f"no activation can be seen for {member.tensor}"
    return sites, ""


def _observe(
    model: nn.Module, inputs: Inputs, sites: Sequence[Site]
) -> tuple[dict[Key, tuple[int, ...]], dict[str, int]]:
    """Shape of the tensor at each site, and the last call number of each module."""
    shapes: dict[Key, tuple[int, ...]] = {}

    def look(key: Key, value: Tensor) -> Tensor:
        shapes[key] = tuple(value.shape) if isinstance(value, Tensor) else ()
        return value

    with torch.no_grad(), site_values(model, sites, look) as calls:
        call_model(model, inputs)
    return shapes, dict(calls)


def _unseen(
    sites: Sequence[Site], shapes: Mapping[Key, tuple[int, ...]], calls: Mapping[str, int], n: int
) -> str:
    """Why these sites cannot be used, or an empty text."""
    for site in sites:
        shape = shapes.get(key_of(site))
        if shape is None:
            return f"{site.module} is not reached through its call"
        if site.dim == 0 or not shape or shape[0] != n:
            return f"the {site.side} of {site.module} does not begin with the samples"
        known = {s.call for s in sites if s.module == site.module}
        if known != set(range(calls[site.module] + 1)):
            return f"{site.module} is called {calls[site.module] + 1} times"
    return ""
