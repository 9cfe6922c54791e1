"""The one pass over the batches that all criteria share.

A `Job` is one criterion on the targets that it can score. `Pass.batch` computes each statistic
once for all jobs: one forward and backward pass for everything that streams, one for each sample
where hooks cannot see a per-sample gradient, one for each unit where removal itself is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.batches import batch_size, call_model, checked_loss
from secateurs.criteria import FINISH, Criterion
from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics.activations import Activations
from secateurs.statistics.gates import Gates, probe_gates
from secateurs.statistics.removals import Removals
from secateurs.statistics.units import Parameters, into_units, members_of, noise, one_sample
from secateurs.types import Batch, GroupTarget, LossFn, Target, WeightTarget

__all__ = ["Job", "Pass", "make_job"]


@dataclass
class Job:
    """One criterion on the targets that it can score, and its running sums."""

    criterion: Criterion
    targets: list[Target]
    not_scored: dict[str, str]
    fast: list[GroupTarget] = field(default_factory=list)
    slow: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, target: Target, values: Tensor, weight: float) -> None:
        """Add finished unit scores to the running sum."""
        have = self.sums.get(target.name)
        self.sums[target.name] = (
            weight * values if have is None else have.add_(values, alpha=weight)
        )

    @property
    def backward(self) -> bool:
        return bool(self.criterion.needs & {"grad", "gate"})


def make_job(
    criterion: Criterion,
    targets: Sequence[Target],
    params: Parameters,
    granularity: str | Iterable[str],
) -> Job:
    """Sort the targets into those that the criterion can score and those that it cannot, and why.

    Raises:
        ConfigError: it can score none.
    """
    reasons = {t.name: _obstacle(criterion, t, params) for t in targets}
    job = Job(
        criterion,
        [t for t in targets if not reasons[t.name]],
        {name: reason for name, reason in reasons.items() if reason},
    )
    if not job.targets:
        why = "; ".join(f"{n}: {r}" for n, r in list(job.not_scored.items())[:3])
        raise ConfigError(
            f"criterion {criterion.label!r} can score nothing at granularity {granularity!r}: "
            f"{why or 'the graph has no such targets'}"
        )
    return job


def _obstacle(criterion: Criterion, target: Target, params: Parameters) -> str:
    """Why this criterion cannot score this target, or an empty text."""
    if not criterion.covers(target.kind):
        return f"{criterion.name} is not defined for {target.kind} units"
    if isinstance(target, WeightTarget) or criterion.needs == {"noise"}:
        return ""
    if criterion.needs == {"act"}:
        return "" if target.sites else "no activation can be seen from outside"
    members = members_of(target, criterion.members, params)
    owned = {int(u) for m in members for u in m.unit}
    if len(owned) < target.n_units:
        return f"no learned {criterion.members} member for {target.n_units - len(owned)} units"
    return ""


class Pass:
    """Everything that happens on one pass over the batches."""

    def __init__(
        self,
        model: nn.Module,
        params: Parameters,
        jobs: list[Job],
        loss_fn: LossFn | None,
        alive: Mapping[str, Tensor],
    ) -> None:
        self.model, self.params, self.jobs, self.loss_fn = model, params, jobs, loss_fn
        self.alive = alive
        self.n_samples = 0
        self._mean_grad: dict[str, Tensor] = {}
        self._gates: dict[str, Gates] = {}
        self._acts: Activations | None = None
        self._removals: dict[tuple[Any, ...], Removals] = {}
        self._without_gradient: set[str] = set()

    def open_removals(self, max_seconds: float, n_batches: int) -> None:
        """Share one measurement among the jobs that need the same."""
        shared: dict[tuple[Any, float, str], dict[str, Target]] = {}
        for job in self.jobs:
            key = _removal_key(job.criterion)
            if key is not None:
                shared.setdefault(key, {}).update((t.name, t) for t in job.targets)
        for key, targets in shared.items():
            self._removals[key] = Removals(
                self.model,
                self.params,
                list(targets.values()),
                self.alive,
                measure=key[0],
                step=key[1],
                members=key[2],
                max_seconds=max_seconds,
                n_batches=n_batches,
            )
        acts = {t.name: t for j in self.jobs if "act" in j.criterion.needs for t in j.targets}
        if acts:
            groups = [t for t in acts.values() if isinstance(t, GroupTarget)]
            self._acts = Activations(self.model, groups)

    def batch(self, number: int, batch: Batch) -> None:
        """All statistics of one batch."""
        n = batch_size(batch[0])
        if number == 0:
            self._choose_paths(batch)
        self._together(number, batch, n)
        for removals in self._removals.values():
            removals.batch(number, batch, n, self.loss_fn)
        slow = [job for job in self.jobs if job.slow]
        if slow:
            for i in range(n):
                where = f"batch {number}, sample {i}"
                single = one_sample(batch, i, n)
                grads = self._gradients(single, where, self._names(slow, "slow"))[0]
                for job in slow:
                    for target in job.slow:
                        job.add(target, self._element_scores(job.criterion, target, grads), 1.0)
        self.n_samples += n

    def _choose_paths(self, batch: Batch) -> None:
        """For per-sample criteria: which targets hooks can do exactly, and which go one by one."""
        for job in self.jobs:
            c = job.criterion
            if not job.backward or c.average != "sample":
                continue
            groups = [t for t in job.targets if isinstance(t, GroupTarget)]
            slow = {t.name: "single weights" for t in job.targets if isinstance(t, WeightTarget)}
            if c.needs == {"gate"} and c.finish_on == "unit":
                sites, why = probe_gates(self.model, batch, groups, c.members, self.params)
                slow |= why
                job.fast = [t for t in groups if t.name in sites]
                if sites:
                    self._gates[c.label] = Gates(self.model, sites)
            else:
                slow |= {t.name: f"{c.name} needs single elements" for t in groups}
            job.slow = [t for t in job.targets if t.name in slow]
            job.notes += [
                f"{t.name}: scored one sample at a time ({slow[t.name]})" for t in job.slow
            ]

    def _names(self, jobs: Sequence[Job], which: str) -> list[str]:
        """Parameters whose gradients these jobs need."""
        names: dict[str, None] = {}
        for job in jobs:
            for target in getattr(job, which):
                names |= dict.fromkeys(_tensors(job.criterion, target, self.params))
        return list(names)

    def _together(self, number: int, batch: Batch, n: int) -> None:
        """The one forward and backward pass that all streaming statistics share."""
        whole = [j for j in self.jobs if j.backward and j.criterion.average != "sample"]
        hooks: list[Any] = [gates.running(n) for gates in self._gates.values()]
        if self._acts is not None:
            hooks.append(self._acts.running(number))
        if not whole and not hooks:
            return
        names = self._names(whole, "targets")
        grads, gate_grads = self._gradients(batch, f"batch {number}", names, hooks)
        for name, grad in grads.items():
            add = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
            have = self._mean_grad.get(name)
            self._mean_grad[name] = n * add if have is None else have.add_(add, alpha=n)
        for job in self.jobs:
            if job in whole and job.criterion.average == "batch":
                for target in job.targets:
                    job.add(target, self._element_scores(job.criterion, target, grads), n)
            for target in job.fast:
                gate = self._gates[job.criterion.label].per_sample(
                    target, gate_grads[job.criterion.label]
                )  # (n, n_units)
                if not torch.isfinite(gate).all():
                    raise ScoringError(
                        f"batch {number}: the gradient at {target.name} is not finite; check the "
                        "data, and the loss where its gradient is undefined"
                    )
                finish = FINISH[job.criterion.finish]
                job.add(target, finish(job.criterion.fn({"gate": gate})).sum(0), 1.0)

    def _gradients(
        self, batch: Batch, where: str, names: Sequence[str], hooks: Sequence[Any] = ()
    ) -> tuple[dict[str, Tensor], dict[str, list[Tensor | None]]]:
        """Gradients of the mean loss: by parameter name, and by criterion for its gates."""
        backward = bool(names or self._gates)
        with ExitStack() as stack:
            for name in names:
                stack.callback(self.params[name].requires_grad_, False)
                self.params[name].requires_grad_(True)
            stack.enter_context(torch.enable_grad() if backward else torch.no_grad())
            for hook in hooks:
                stack.enter_context(hook)
            if not backward:
                call_model(self.model, batch[0])
                return {}, {}
            assert self.loss_fn is not None
            loss = checked_loss(self.model, batch, self.loss_fn, where)
            gates = {label: g.leaves for label, g in self._gates.items()} if hooks else {}
            flat = [self.params[n] for n in names] + [x for xs in gates.values() for x in xs]
            if not loss.requires_grad:
                raise ScoringError(
                    f"{where}: the loss does not depend on the weights through differentiable "
                    "operations; remove torch.no_grad and detach from the model and the loss"
                )
            every = list(torch.autograd.grad(loss, flat, allow_unused=True))
        return self._by_name(names, every, where), _split(gates, every[len(names) :])

    def _by_name(
        self, names: Sequence[str], grads: Sequence[Tensor | None], where: str
    ) -> dict[str, Tensor]:
        found = {}
        for name, grad in zip(names, grads, strict=False):
            if grad is None:
                self._without_gradient.add(name)
                grad = torch.zeros_like(self.params[name])
            if not torch.isfinite(grad).all():
                raise ScoringError(
                    f"{where}: the gradient of {name} is not finite; check the data, and the "
                    "loss where its gradient is undefined"
                )
            found[name] = grad
        return found

    @torch.no_grad()
    def _element_scores(
        self, criterion: Criterion, target: Target, grads: Mapping[str, Tensor]
    ) -> Tensor:
        """(n_units,) float64 finished scores from weights and gradients."""
        finish = FINISH[criterion.finish]

        def contribution(name: str) -> Tensor:
            weight = self.params[name].detach()
            stats = {"weight": weight}
            if name in grads:
                stats |= {"grad": grads[name], "gate": weight * grads[name]}
            return criterion.fn({need: stats[need] for need in criterion.needs})

        if isinstance(target, WeightTarget):
            return finish(contribution(target.name)).reshape(-1).double().cpu()
        out = torch.zeros(target.n_units, dtype=torch.float64)
        for member in members_of(target, criterion.members, self.params):
            values = contribution(member.tensor)
            into_units(finish(values) if criterion.finish_on == "element" else values, member, out)
        return finish(out) if criterion.finish_on == "unit" else out

    def result(self, job: Job, target: Target, seed: int) -> Tensor:
        """(n_units,) float64 scores of one target."""
        c = job.criterion
        finish = FINISH[c.finish]
        if target.name in job.sums:
            return job.sums[target.name] / self.n_samples
        if "noise" in c.needs:
            return finish(c.fn({"noise": noise(target, f"{seed}/{c.options.get('seed', 0)}")}))
        if "act" in c.needs:
            assert self._acts is not None
            assert isinstance(target, GroupTarget)
            return finish(c.fn({"act": self._acts.result(target)}))
        key = _removal_key(c)
        if key is not None:
            need = next(iter(c.needs))
            return finish(c.fn({need: self._removals[key].result(target)}))
        return self._element_scores(c, target, self._mean_grad)

    def finish(self) -> None:
        """Turn sums of gradients into means; call once, after the last batch."""
        for grad in self._mean_grad.values():
            grad.div_(self.n_samples)

    def notes(self, job: Job) -> tuple[str, ...]:
        """What a reader of these scores should know."""
        used = {n for t in job.targets for n in _tensors(job.criterion, t, self.params)}
        dead = sorted(self._without_gradient & used) if job.backward else []
        return (*job.notes, *(f"{name}: no gradient arrives, counted as 0" for name in dead))


def _split(
    groups: Mapping[str, Sequence[Tensor]], flat: Sequence[Tensor | None]
) -> dict[str, list[Tensor | None]]:
    """Cut a flat list into lists as long as those of `groups`."""
    out, at = {}, 0
    for label, items in groups.items():
        out[label] = list(flat[at : at + len(items)])
        at += len(items)
    return out


def _tensors(criterion: Criterion, target: Target, params: Parameters) -> list[str]:
    if isinstance(target, WeightTarget):
        return [target.name]
    return [m.tensor for m in members_of(target, criterion.members, params)]


def _removal_key(criterion: Criterion) -> tuple[Any, float, str] | None:
    """What is measured unit by unit: (measure, step, members), or None."""
    if "jvp_output" in criterion.needs:
        return "jvp_output", 1.0, criterion.members
    if "ablation" in criterion.needs:
        options = criterion.options
        return options.get("of", "loss"), float(options.get("step", 1.0)), criterion.members
    return None
