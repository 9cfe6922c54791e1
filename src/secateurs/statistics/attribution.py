"""Attribution by Captum: how much of the loss goes through a unit, or is owed to it.

    Conductance  integrated gradients through a unit, from an input of zeros to each sample
    Shapley      what a unit adds to a random set of other units, by sampling permutations

Captum computes; what it is asked is said here, and how its answers become one number per unit.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.batches import call_model, tensors
from secateurs.errors import ConfigError, DataError, MissingDependencyError, ScoringError
from secateurs.statistics.activations import activation_sites
from secateurs.statistics.collector import (
    Collector,
    Request,
    Run,
    Setting,
    call_with,
    generator_for,
    register_statistic,
)
from secateurs.statistics.hooks import into_site_units
from secateurs.statistics.samples import shapes_at
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters, members_of
from secateurs.types import GroupTarget, Member, Site, Target

__all__ = ["Conductance", "Shapley", "check_captum"]


AT_ONCE = 8
"""Steps of a path that run in one batch."""


def check_captum() -> None:
    """Look for Captum before a long pass.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if importlib.util.find_spec("captum") is None:
        raise MissingDependencyError(
            "attribution needs Captum; install: pip install 'secateurs[attribution]'"
        )


class _Timed(Collector):
    """Refuses, after a first piece of work, what would take too long."""

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        check_captum()
        self._asked = False

    def guard(self, seconds: float, pieces: int, what: str) -> None:
        """Judge by the time of one piece, once.

        Raises:
            ConfigError: all of them would take longer than `max_seconds`.
        """
        setting = self.setting
        estimate = seconds * pieces * setting.n_batches
        if not self._asked and estimate > setting.max_seconds:
            raise ConfigError(
                f"{what} on {setting.n_batches} batches would take about {estimate:.0f} s, more "
                f"than max_seconds={setting.max_seconds:g}. Use fewer batches (max_batches), a "
                "coarser granularity, or criterion 'taylor', which needs one backward pass for all "
                "units"
            )
        self._asked = True


class Conductance(_Timed):
    """Mean over samples of |conductance of the unit|, for the loss of each sample."""

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._sites = {t.name: activation_sites(t) for t in request.groups}

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """When no activation can be hooked, or not by Captum."""
        if not isinstance(target, GroupTarget) or not target.sites:
            return "no activation can be seen from outside"
        for site in activation_sites(target):
            if site.call:
                return f"{site.module} is called several times, of which Captum sees the last"
            if site.side == "output" and isinstance(model.get_submodule(site.module), nn.RNNBase):
                return f"Captum cannot see into the nested outputs of {site.module}"
        return ""

    def begin(self, run: Run) -> None:
        """Refuse inputs that cannot be moved, and activations that do not begin with samples.

        Raises:
            DataError: it names them.
        """
        _split(run)
        every = [site for sites in self._sites.values() for site in sites]
        for key, shape in shapes_at(self.setting.model, run, every).items():
            if shape[0] != run.n or key[4] == 0:
                raise DataError(
                    f"conductance: the {key[2]} of {key[0]} has shape {shape}, which does not "
                    f"begin with the {run.n} samples of the batch. Leave its targets out "
                    f"(graph.only(exclude={key[0]!r}))"
                )

    def alone(self, run: Run) -> None:
        """Attribute the losses of one batch to the units of every target.

        Raises:
            ConfigError: it would take longer than `max_seconds`.
            ScoringError: Captum cannot do it, or the result is not finite.
        """
        n_sites = sum(map(len, self._sites.values()))
        for target in self.request.groups:
            sites = self._sites[target.name]
            total = torch.zeros(target.n_units, dtype=torch.float64)
            for site in sites:
                started = time.perf_counter()
                rows = self._rows(run, target, site)
                self.guard(
                    time.perf_counter() - started, n_sites, f"conductance at {n_sites} sites"
                )
                per_sample = torch.zeros(run.n, target.n_units, dtype=torch.float64)
                total += into_site_units(rows, site, per_sample).abs().sum(0)
            self.sums.add(target.name, total / len(sites))

    def _rows(self, run: Run, target: GroupTarget, site: Site) -> Tensor:
        """(n, size) signed conductance along the dimension of a site."""
        from captum.attr import LayerConductance

        moved, fixed, loss = _losses(self.setting, run)
        steps = int(self.request.options["steps"])
        try:
            with torch.enable_grad():
                found: Any = LayerConductance(
                    loss, self.setting.model.get_submodule(site.module)
                ).attribute(
                    moved,
                    additional_forward_args=fixed,
                    n_steps=steps,
                    method="riemann_trapezoid",  # its steps include both ends
                    internal_batch_size=AT_ONCE * run.n if steps + 1 > AT_ONCE else None,
                    attribute_to_layer_input=site.side == "input",
                )
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise ScoringError(
                f"batch {run.number}: Captum cannot attribute the loss to {target.name} at the "
                f"{site.side} of {site.module}: {error}"
            ) from error
        value: Tensor = found[site.position] if isinstance(found, tuple) else found
        others = [d for d in range(value.dim()) if d not in (0, site.dim)]
        line = value.detach().double()
        line = (line.sum(others) if others else line).cpu()  # (n, size)
        if not torch.isfinite(line).all():
            raise ScoringError(
                f"batch {run.number}: the conductance of {target.name} is not finite"
            )
        return line

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64, the mean over all samples seen."""
        return self.sums[target.name] / self.n_samples


def _split(run: Run) -> tuple[list[int], list[int], list[Any], Any]:
    """Positions of the leaves of a batch that move along the path, and of those that only follow.

    Raises:
        DataError: no input is floating point.
    """
    leaves, spec = pytree.tree_flatten(run.batch)
    n_inputs = len(pytree.tree_leaves(run.inputs))
    rows = [
        i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() and len(x) == run.n
    ]
    moved = [i for i in rows if i < n_inputs and leaves[i].is_floating_point()]
    if not moved:
        kinds = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors(run.inputs))
        raise DataError(
            "conductance moves the inputs from zero to each sample, so it needs floating-point "
            f"inputs; got {kinds}. For tokens, use criterion 'shapley' or 'taylor'"
        )
    return moved, [i for i in rows if i not in moved], leaves, spec


def _losses(
    setting: Setting, run: Run
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, Callable[..., Tensor]]:
    """What moves, what follows, and the function from both to the sum of the samples' losses."""
    moved, fixed, leaves, spec = _split(run)

    def loss(*rows: Tensor) -> Tensor:
        now = list(leaves)
        for place, tensor in zip([*moved, *fixed], rows, strict=True):
            now[place] = tensor
        inputs, targets = pytree.tree_unflatten(now, spec)
        assert setting.loss_fn is not None
        mean = setting.loss_fn(call_model(setting.model, inputs), targets)
        return (mean * len(rows[0])).reshape(1)

    follow = tuple(leaves[i] for i in fixed)
    return tuple(leaves[i].detach() for i in moved), follow or None, loss


class Shapley(_Timed):
    """The Shapley value of each unit in lowering the loss, by sampled permutations.

    A unit that is not in the game is removed as in an ablation: its members are zero.
    """

    def alone(self, run: Run) -> None:
        """Play one batch.

        Raises:
            ConfigError: it would take longer than `max_seconds`.
            ScoringError: a loss is not finite.
        """
        setting = self.setting
        rounds = int(self.request.options["permutations"])
        games = {t.name: self._game(run, t) for t in self.request.targets}
        if not self._asked:
            units = {t.name: len(setting.alive[t.name]) for t in self.request.targets}
            runs = sum(rounds * n + 1 for n in units.values())
            name, play = next(iter(games.items()))
            seconds = min(_timed(play, torch.ones(1, units[name])) for _ in range(2))
            self.guard(seconds, runs, f"{runs} runs for Shapley values")
        for target in self.request.targets:
            alive = setting.alive[target.name]
            found = torch.zeros(target.n_units, dtype=torch.float64)
            if len(alive):
                # The same permutations in every batch: the cut into batches does not matter.
                found[alive] = -self._played(games[target.name], target, len(alive), rounds)
            self.sums.add(target.name, found, run.n)

    def _played(
        self, play: Callable[[Tensor], Tensor], target: Target, units: int, rounds: int
    ) -> Tensor:
        """(units,) mean change of the loss as each unit joins those before it."""
        from captum.attr import ShapleyValueSampling

        named = generator_for(self.setting, "shapley", target.name)
        seed = int(torch.randint(2**31, (), generator=named))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found: Tensor = ShapleyValueSampling(play).attribute(
                torch.ones(1, units), baselines=0, n_samples=rounds
            )
        return found.reshape(-1).double()

    def _game(self, run: Run, target: Target) -> Callable[[Tensor], Tensor]:
        """The function from (1, units alive) in {0, 1} to the loss with only these units."""
        setting = self.setting
        assert isinstance(target, GroupTarget)
        assert setting.loss_fn is not None
        members = members_of(target, self.request.members, setting.params)
        alive, labels = setting.alive[target.name], run.batch[1]
        loss_fn, names = setting.loss_fn, dict[int, str]()

        @torch.no_grad()
        def play(present: Tensor) -> Tensor:
            keep = torch.ones(target.n_units)
            keep[alive] = present.reshape(-1).float()
            changed: dict[str, Tensor] = {}
            for member in members:
                param = setting.params[member.tensor]
                name = names.setdefault(id(param), member.tensor)  # tied ones go by the first
                weight = changed.get(name, param.detach())
                changed[name] = weight * _factors(member, keep, weight)
            loss = loss_fn(call_with(setting.model, changed, run.inputs), labels).reshape(1)
            if not math.isfinite(float(loss)):
                raise ScoringError(
                    f"batch {run.number}: without some units of {target.name} the loss is "
                    f"{loss.item()}; check the data and the model"
                )
            return loss.double()

        return play

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64, the mean over all samples seen."""
        return self.sums[target.name] / self.n_samples


def _factors(member: Member, keep: Tensor, weight: Tensor) -> Tensor:
    """What the entries of a member are multiplied by, of a shape that broadcasts to it."""
    line = torch.ones(weight.shape[member.dim])
    unit = torch.from_numpy(np.ascontiguousarray(member.unit))
    line[torch.from_numpy(np.ascontiguousarray(member.index))] = keep[unit]
    shape = [1] * weight.dim()
    shape[member.dim] = -1
    return line.to(weight).view(shape)


def _timed(play: Callable[[Tensor], Tensor], present: Tensor) -> float:
    started = time.perf_counter()
    play(present)
    return time.perf_counter() - started


register_statistic("conductance", Conductance)
register_statistic("shapley", Shapley)
