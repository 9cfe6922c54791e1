"""The pass over the batches that all criteria share.

`Pass` gives every statistic that a job needs to one collector, runs the model forward and backward
once for each batch for all of them, and lets those that must run it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from secateurs.batches import call_model, checked_loss, model_device
from secateurs.criteria import FINISH, Criterion
from secateurs.criteria.registry import STATISTICS, Option
from secateurs.distributed import Ranks
from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics.bysample import BySample
from secateurs.statistics.collector import COLLECTORS, Collector, Request, Run, Setting
from secateurs.statistics.gates import UnitGates, probe_gates
from secateurs.statistics.gradients import ByBatch, finite_gradient
from secateurs.statistics.jobs import Job, element_scores, member_places
from secateurs.statistics.sums import Sums
from secateurs.types import GroupTarget, Site, Target

__all__ = ["Pass"]

Key = tuple[str, tuple[tuple[str, Any], ...], str]


class Pass:
    """Everything that happens on one scoring pass.

    Args:
        setting: what all collectors share.
        jobs: the criteria.
        first: the first batch, to find out which activations can be hooked; None without data.
        sums: what an interrupted pass has left, or an empty store.
    """

    def __init__(
        self, setting: Setting, jobs: Sequence[Job], first: Run | None, sums: Sums
    ) -> None:
        self.setting, self.jobs, self.sums = setting, jobs, sums
        self._shared: dict[Key, Collector] = {}
        self._scorers: dict[tuple[str, str], ByBatch | BySample | UnitGates] = {}
        self._without_gradient: dict[str, bool] = {}
        rest = {job.criterion.label: list(job.targets) for job in jobs}
        if first is not None:
            self._gate_units(first, rest)
        for key, request in self._requests(rest).items():
            text = ",".join([*(f"{k}={v}" for k, v in key[1]), key[2]])
            view = self.sums.under(f"{request.statistic}({text})/")
            self._shared[key] = COLLECTORS[request.statistic](setting, request, view)
        for key, collector in self._shared.items():
            for need in collector.depends:
                collector.others[need] = self._shared[_key(need, dict(key[1]), key[2])]
            if first is not None:
                collector.begin(first)

    # -- who collects what ---------------------------------------------------------------------

    def _gate_units(self, first: Run, rest: dict[str, list[Target]]) -> None:
        """Units whose gates can be hooked exactly: no weight gradients for these."""
        by_members: dict[str, list[Job]] = {}
        for job in self.jobs:
            c = job.criterion
            if c.needs == {"gate"} and c.finish_on == "unit":
                by_members.setdefault(c.members, []).append(job)
        for members, jobs in by_members.items():
            groups = {t.name: t for j in jobs for t in j.targets if isinstance(t, GroupTarget)}
            setting = self.setting
            sites, why = probe_gates(
                setting.model, first.batch, list(groups.values()), members, setting.params
            )
            if sites:
                self._open_gates(members, jobs, [groups[n] for n in sites], sites, rest)
            for job in jobs:
                job.notes += [
                    f"{t.name}: no gate, so by the gradients of its weights ({why[t.name]})"
                    for t in job.targets
                    if t.name in why
                ]

    def _open_gates(
        self,
        members: str,
        jobs: Sequence[Job],
        targets: Sequence[GroupTarget],
        sites: Mapping[str, Sequence[Site]],
        rest: dict[str, list[Target]],
    ) -> None:
        labels = {job.criterion.label: job for job in jobs}
        view = self.sums.under(f"gates({members})/")
        gates = UnitGates(self.setting, labels, targets, sites, view)
        self._shared["gates", (), members] = gates
        for label in labels:
            mine = [t for t in targets if t in rest[label]]
            rest[label] = [t for t in rest[label] if t not in mine]
            self._scorers |= {(label, t.name): gates for t in mine}

    def _requests(self, rest: Mapping[str, list[Target]]) -> dict[Key, Request]:
        """What is still to be collected, each statistic once; opens what scores by batch."""
        requests: dict[Key, Request] = {}
        by_sample: list[tuple[Job, Sequence[Target]]] = []
        for job in self.jobs:
            c, targets = job.criterion, rest[job.criterion.label]
            if targets and c.average == "sample":
                by_sample.append((job, targets))
            elif targets and c.average == "batch":
                scorer = ByBatch(self.setting, job, targets, self.sums.under(f"{c.label}/"))
                self._shared[c.label, (), ""] = scorer
                self._scorers |= {(c.label, t.name): scorer for t in targets}
            elif targets:
                for need in sorted(c.needs):
                    _ask(requests, need, c.options, c.members, targets)
        if by_sample:
            samples = BySample(self.setting, by_sample, self.sums.under("samples/"))
            self._shared["samples", (), ""] = samples
            self._scorers |= {
                (job.criterion.label, t.name): samples
                for job, several in by_sample
                for t in several
            }
        return requests

    # -- the pass ------------------------------------------------------------------------------

    @property
    def turns(self) -> int:
        """How many passes over the batches are needed."""
        return max((c.turn + c.repeats for c in self._shared.values()), default=1)

    def batch(self, turn: int, run: Run) -> None:
        """All statistics of one batch."""
        active = [c for c in self._shared.values() if c.turn <= turn < c.turn + c.repeats]
        together = [c for c in active if c.shares != "nothing"]
        if together:
            self._together(run, together)
        for collector in active:
            collector.alone(run)
            collector.count(run)

    def _together(self, run: Run, collectors: Sequence[Collector]) -> None:
        """One forward, and if anyone needs it one backward pass for all."""
        setting = self.setting
        backward = any(c.shares == "backward" for c in collectors)
        readers: dict[str, list[Collector]] = {}
        for collector in collectors:
            for name in collector.wants():
                readers.setdefault(name, []).append(collector)
        torch.clear_autocast_cache()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad() if backward else torch.no_grad())
            arrived = stack.enter_context(self._gradients(run, readers))
            for collector in collectors:
                stack.enter_context(collector.watch(run))
            if not backward:
                call_model(setting.model, run.inputs)
            else:
                assert setting.loss_fn is not None
                where = f"batch {run.number}"
                loss = checked_loss(setting.model, run.batch, setting.loss_fn, where)
                leaves = [leaf for c in collectors for leaf in c.leaves()]
                asked = [setting.params[n] for n in readers]
                if not loss.requires_grad:
                    raise ScoringError(
                        f"{where}: the loss does not depend on the weights through differentiable "
                        "operations; remove torch.no_grad and detach from the model and the loss"
                    )
                if leaves or asked:
                    torch.autograd.backward(loss, inputs=[*leaves, *_unique(asked)])
        for name, wanting in readers.items():
            self._without_gradient.setdefault(name, True)
            if name in arrived:
                self._without_gradient[name] = False
            else:
                for collector in wanting:
                    collector.gradient(run, name, torch.zeros_like(setting.params[name]))
        for collector in collectors:
            collector.arrived(run)

    @contextmanager
    def _gradients(
        self, run: Run, readers: Mapping[str, Sequence[Collector]]
    ) -> Iterator[set[str]]:
        """Hand each gradient to its readers the moment it is complete, then drop it.

        Yields the names that have arrived.
        """
        params, arrived = self.setting.params, set[str]()
        names: dict[int, list[str]] = {}
        for name in readers:
            names.setdefault(id(params[name]), []).append(name)

        def take(p: Tensor) -> None:
            grad, p.grad = p.grad, None
            assert grad is not None
            for name in names[id(p)]:
                finite_gradient(grad, name, f"batch {run.number}")
                arrived.add(name)
                for collector in readers[name]:
                    collector.gradient(run, name, grad)

        with ExitStack() as stack:
            for p in _unique([params[n] for n in readers]):
                p.requires_grad_(True)
                stack.callback(p.requires_grad_, False)
                stack.callback(p.register_post_accumulate_grad_hook(take).remove)
            yield arrived

    # -- many processes ------------------------------------------------------------------------

    def check_shared(self) -> None:
        """Refuse what several processes cannot find together.

        Raises:
            ConfigError: names the criteria and says why.
        """
        for (need, _, _), collector in self._shared.items():
            if collector.not_shared:
                labels = [j.criterion.label for j in self.jobs if need in j.criterion.needs]
                raise ConfigError(
                    f"{', '.join(labels)} cannot be scored by a group of processes: "
                    f"{collector.not_shared}. Score it in one process (group=None)"
                )

    def merge(self, ranks: Ranks) -> None:
        """After each pass over the batches: what all ranks have found, on every rank."""
        if ranks.size == 1:
            return
        self.sums.merge_ranks(ranks, model_device(self.setting.model))
        for told in ranks.gather(self._without_gradient):
            for name, none in told.items():
                self._without_gradient[name] = none and self._without_gradient.get(name, True)
        for collector in self._shared.values():
            collector.merged()

    def collector(self, criterion: Criterion, need: str) -> Collector:
        """What collects one statistic of a criterion that averages over the dataset."""
        return self._shared[_key(need, criterion.options, criterion.members)]

    # -- results -------------------------------------------------------------------------------

    def result(self, job: Job, target: Target) -> Tensor:
        """(n_units,) float64 scores of one target."""
        c = job.criterion
        scorer = self._scorers.get((c.label, target.name))
        if scorer is not None:
            return scorer.score(job, target)
        held = {need: self.collector(c, need) for need in c.needs}
        if c.level == "unit":
            return FINISH[c.finish](c.fn({n: held[n].unit(target) for n in held}))
        return element_scores(
            c, target, self.setting.params, lambda name: {n: held[n].element(name) for n in held}
        )

    def notes(self, job: Job) -> tuple[str, ...]:
        """What a reader of these scores should know."""
        params = self.setting.params
        used = {n for t in job.targets for n, _ in member_places(job.criterion, t, params)}
        dead = sorted(n for n in used if self._without_gradient.get(n)) if job.by_gradient else []
        c = job.criterion
        mine = {_key(n, c.options, c.members) for n in c.needs}
        if c.average == "sample":
            mine = {("samples", (), "")}
        asked = [one for key, one in self._shared.items() if key in mine]
        said = [note for one in asked for x in (one, *one.others.values()) for note in x.notes]
        none = [f"{n}: no gradient arrives in any batch, counted as 0" for n in dead]
        for target in job.targets:
            gates = self._scorers.get((c.label, target.name))
            if isinstance(gates, UnitGates) and gates.untouched(target):
                none.append(f"{target.name}: no gradient arrives in any batch, counted as 0")
        return tuple(dict.fromkeys([*job.notes, *said, *none]))

    @property
    def n_samples(self) -> int:
        """Samples seen in a pass."""
        return max((c.n_samples for c in self._shared.values()), default=0)


def _key(need: str, options: Mapping[str, Option], members: str) -> Key:
    """What two jobs must share to share a collector."""
    shaping = tuple((o, options[o]) for o in STATISTICS[need].options if o in options)
    return need, shaping, members


def _ask(
    requests: dict[Key, Request],
    need: str,
    options: Mapping[str, Option],
    members: str,
    targets: Sequence[Target],
) -> None:
    """Ask for a statistic of some targets, after what it depends on."""
    key = _key(need, options, members)
    for other in COLLECTORS[need].depends:
        _ask(requests, other, dict(key[1]), members, targets)
    request = requests.setdefault(key, Request(need, dict(key[1]), members))
    request.targets.extend(t for t in targets if t not in request.targets)


def _unique(tensors: Sequence[Tensor]) -> list[Any]:
    return list({id(t): t for t in tensors}.values())
