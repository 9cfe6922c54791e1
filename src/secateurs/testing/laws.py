"""What every criterion must obey, whatever it computes.

    law(criterion, make) -> None      or BrokenLaw; `make(dtype)` builds the case

A criterion is excused from a law by name only, in `check_criterion(..., excuse=...)`: noise does
not permute with the units, a score averaged over batches depends on the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateurs.criteria import CRITERIA, Criterion, get_criterion
from secateurs.errors import ConfigError, PruningError, choose
from secateurs.scoring import score
from secateurs.statistics import check_fits, make_job
from secateurs.testing.nets import NETS, Case, case
from secateurs.types import Batch, GroupTarget

__all__ = ["GRANULARITIES", "LAWS", "BrokenLaw", "Checked", "check_criterion", "obstacle"]

Make = Callable[[torch.dtype], Case]
PERMUTED = ("neuron", "channel", "hidden", "head", "head_dim", "kv_group", "expert")
"""Kinds whose units are interchangeable: shuffling them gives the same function."""
GRANULARITIES = ("structured", "embedding", "layer", "weight")


class BrokenLaw(AssertionError):
    """A criterion breaks a law; the message names both, the network and the numbers."""


@dataclass(frozen=True)
class Checked:
    """What `check_criterion` has found in order.

    Attributes:
        passed: (law, network, granularity) of everything that was checked.
        skipped: the same for what was not -> why.
    """

    passed: tuple[tuple[str, str, str], ...]
    skipped: Mapping[tuple[str, str, str], str]


def check_criterion(
    criterion: str | Mapping[str, Any] | Criterion | Callable[..., Tensor],
    *,
    nets: Iterable[str] | None = None,
    granularities: Iterable[str] = GRANULARITIES,
    excuse: Collection[str] = (),
) -> Checked:
    """Hold a criterion to every law, on every network and granularity that it claims.

    Args:
        criterion: a registered name or function, a mapping with options, or a `Criterion`.
        nets: names of `secateurs.testing.NETS`; None for all.
        granularities: what is scored there, as in `score`.
        excuse: names of laws that it need not obey.

    Returns:
        What was checked, and what was skipped and why.

    Raises:
        BrokenLaw: it breaks a law.
        ConfigError: the criterion, a network or a law is not known; or it can score nothing at all.

    Example:
        >>> checked = check_criterion("magnitude", nets=["mlp"])
        >>> ("permutes with the units", "mlp", "structured") in checked.passed
        True
    """
    found = _registered(criterion) if _is_function(criterion) else get_criterion(criterion)  # type: ignore[arg-type]
    for name in excuse:
        choose(name, LAWS, "law")
    passed: list[tuple[str, str, str]] = []
    skipped: dict[tuple[str, str, str], str] = {}
    granularities = list(granularities)
    for net in NETS if nets is None else list(nets):
        make = partial(case, net)
        for granularity in granularities:
            why = obstacle(found, make(torch.float64), granularity)
            for law, holds in LAWS.items():
                place = (law, net, granularity)
                if why or law in excuse:
                    skipped[place] = why or "excused"
                    continue
                _hold(holds, law, found, make, net, granularity)
                passed.append(place)
    if not passed:
        raise ConfigError(
            f"criterion {found.label!r} scores nothing on these networks: "
            f"{'; '.join(dict.fromkeys(skipped.values()))}"
        )
    return Checked(tuple(passed), skipped)


def obstacle(criterion: Criterion, on: Case, granularity: str) -> str:
    """Why a criterion scores nothing of this granularity here, or an empty text."""
    targets = on.graph.select(granularity)
    if not targets:
        return f"no {granularity} units in this network"
    try:
        make_job(criterion, targets, on.model, check_fits(on.model, targets), granularity)
    except ConfigError as error:
        return str(error)
    return ""


def _hold(
    holds: Callable[[Criterion, Make, str], None],
    law: str,
    criterion: Criterion,
    make: Make,
    net: str,
    granularity: str,
) -> None:
    """One law; whatever goes wrong is told with its place."""
    where = f"criterion {criterion.label!r}, law {law!r}, network {net!r}, {granularity}"
    try:
        holds(criterion, make, granularity)
    except BrokenLaw as broken:
        raise BrokenLaw(f"{where}: {broken}") from broken
    except Exception as error:
        raise BrokenLaw(f"{where}: {type(error).__name__}: {error}") from error


def _is_function(criterion: object) -> bool:
    return callable(criterion) and not isinstance(criterion, (str, Mapping, Criterion))


def _registered(fn: object) -> Criterion:
    for held in CRITERIA.values():
        if held.fn is fn:
            return held
    raise ConfigError(
        f"{getattr(fn, '__name__', fn)!r} is not registered: decorate it with @criterion(...)"
    )


# -- the laws ------------------------------------------------------------------------------


def scores(criterion: Criterion, on: Case, granularity: str, **options: Any) -> dict[str, Tensor]:
    """Scores of one criterion on a case."""
    return dict(
        score(
            on.model, on.batches, on.loss_fn, criterion=criterion, graph=on.graph,
            granularity=granularity, **options,
        ).values
    )  # fmt: skip


def _equal(got: Tensor, wanted: Tensor, name: str, rtol: float, atol: float = 1e-9) -> None:
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    if not torch.allclose(got, wanted, rtol=rtol, atol=atol + rtol * scale):
        worst = int((got - wanted).abs().argmax())
        raise BrokenLaw(
            f"unit {worst} of {name} scores {got[worst].item():.6g}, "
            f"expected {wanted[worst].item():.6g}"
        )


def finite_and_deterministic(criterion: Criterion, make: Make, granularity: str) -> None:
    """Scores are finite float32, one for each unit, and the same every time."""
    on = make(torch.float32)
    first, second = scores(criterion, on, granularity), scores(criterion, on, granularity)
    for name, values in first.items():
        n = on.graph.targets[name].n_units
        if values.shape != (n,) or values.dtype != torch.float32:
            raise BrokenLaw(
                f"{name}: expected ({n},) float32, got {tuple(values.shape)} {values.dtype}"
            )
        if not torch.isfinite(values).all():
            raise BrokenLaw(f"{name}: scores are not finite: {values.tolist()}")
        if not torch.equal(values, second[name]):
            raise BrokenLaw(f"{name}: two passes give different scores")


def precisions_agree(criterion: Criterion, make: Make, granularity: str) -> None:
    """float32 gives what float64 gives; bfloat16 is finite."""
    double = scores(criterion, make(torch.float64), granularity)
    single = scores(criterion, make(torch.float32), granularity)
    for name, values in double.items():
        _equal(single[name], values, name, rtol=2e-3)
    for name, values in scores(criterion, make(torch.bfloat16), granularity).items():
        if not torch.isfinite(values).all():
            raise BrokenLaw(f"{name}: scores in bfloat16 are not finite")


def leaves_the_model_alone(criterion: Criterion, make: Make, granularity: str) -> None:
    """Weights, gradients, buffers, modes, hooks and random state are as before, error or not."""
    on = make(torch.float32)
    on.model.train()
    first, *_, last = on.model.parameters()
    first.requires_grad_(False)
    last.grad = torch.full_like(last, 7.0)
    before = _state(on)
    scores(criterion, on, granularity)
    _same_state(before, _state(on), "scoring")
    if not criterion.needs_data:
        return

    def stop(done: int, total: int | None) -> None:
        raise PruningError("stopped")

    try:
        scores(criterion, on, granularity, progress=stop)
    except PruningError:
        pass
    else:
        raise BrokenLaw("progress is never called")
    _same_state(before, _state(on), "an exception in the middle of scoring")


def _state(on: Case) -> dict[str, list[Tensor]]:
    model = on.model
    modules = dict(model.named_modules())
    return {
        "weights or buffers": [t.clone() for t in model.state_dict().values()],
        "the tensors": [torch.tensor([id(p), p._version]) for p in model.parameters()],
        "requires_grad": [torch.tensor(p.requires_grad) for p in model.parameters()],
        "gradients": [torch.empty(0) if p.grad is None else p.grad.clone()
                      for p in model.parameters()],
        "modes": [torch.tensor(m.training) for m in modules.values()],
        "hooks": [torch.tensor([len(m._forward_hooks), len(m._forward_pre_hooks),
                                len(m._backward_hooks)]) for m in modules.values()],
        "random state": [torch.get_rng_state()],
        "kernels": [torch.tensor([torch.backends.mkldnn.enabled,
                                  torch.backends.mha.get_fastpath_enabled()])],
    }  # fmt: skip


def _same_state(
    before: Mapping[str, list[Tensor]], after: Mapping[str, list[Tensor]], what: str
) -> None:
    for name, held in before.items():
        pairs = zip(held, after[name], strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise BrokenLaw(f"{what} changes {name} of the model")


def independent_of_the_batches(criterion: Criterion, make: Make, granularity: str) -> None:
    """Scores do not depend on how the data is cut into batches, a ragged last one included."""
    on = make(torch.float64)
    x, y = (torch.cat(t) for t in zip(*on.batches, strict=True))
    whole = scores(criterion, _cut(on, x, y, [len(x)]), granularity)
    for sizes in ([4, 4, 2], [1, 9]):
        for name, values in scores(criterion, _cut(on, x, y, sizes), granularity).items():
            _equal(values, whole[name], f"{name} with batches of {sizes}", rtol=1e-5)


def _cut(on: Case, x: Tensor, y: Tensor, sizes: list[int]) -> Case:
    pairs: list[Batch] = list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))
    return Case(on.model, on.graph, pairs, on.loss_fn)


def permutes_with_the_units(criterion: Criterion, make: Make, granularity: str) -> None:
    """Shuffling the units of a layer, which computes the same, shuffles their scores."""
    if granularity != "structured":
        return
    names = [t.name for t in make(torch.float64).graph.groups() if t.kind in PERMUTED]
    straight = scores(criterion, make(torch.float64), granularity)
    for name in names:
        on = make(torch.float64)
        target = on.graph.targets[name]
        assert isinstance(target, GroupTarget)
        order = np.random.default_rng(0).permutation(target.n_units)
        _shuffle(on, target, order)
        shuffled = scores(criterion, on, granularity)
        for other, values in straight.items():
            wanted = values[torch.from_numpy(order)] if other == name else values
            _equal(shuffled[other], wanted, f"{other} after shuffling {name}", rtol=1e-5)


@torch.no_grad()
def _shuffle(on: Case, target: GroupTarget, order: np.ndarray[Any, Any]) -> None:
    """Put unit order[u] where unit u was."""
    tensors = on.model.state_dict()
    for m in target.members:
        places = [m.index[m.unit == u] for u in range(target.n_units)]
        old = torch.from_numpy(np.concatenate([places[u] for u in order]))
        new = torch.from_numpy(np.concatenate(places))
        tensor = tensors[m.tensor]
        tensor.index_copy_(m.dim, new, tensor.index_select(m.dim, old))


def same_beside_others(criterion: Criterion, make: Make, granularity: str) -> None:
    """In one pass with other criteria it gives what it gives alone."""
    on = make(torch.float64)
    others = [c for c in ("taylor", "gradient", "magnitude") if c != criterion.label]
    together = score(
        on.model, on.batches, on.loss_fn, criterion=[*others, criterion], graph=on.graph,
        granularity=granularity,
    )  # fmt: skip
    for name, values in scores(criterion, on, granularity).items():
        _equal(together[criterion.label].values[name], values, name, rtol=1e-6)


LAWS: Mapping[str, Callable[[Criterion, Make, str], None]] = {
    "finite and deterministic": finite_and_deterministic,
    "precisions agree": precisions_agree,
    "leaves the model alone": leaves_the_model_alone,
    "independent of the batches": independent_of_the_batches,
    "permutes with the units": permutes_with_the_units,
    "same beside others": same_beside_others,
}
"""Law -> its checker."""
