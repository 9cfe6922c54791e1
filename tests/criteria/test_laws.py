"""Laws that every criterion obeys; a criterion without a row fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.criteria import CRITERIA, get_criterion
from secateurs.errors import ConfigError, ScoringError
from secateurs.scoring import score
from secateurs.statistics import check_fits, make_job
from secateurs.types import Batch
from tests.criteria.rows import LAWS
from tests.graphs import CASES, Case, mlp


def asked(label: str) -> dict[str, Any]:
    name, _, rest = label.rstrip(")").partition("(")
    return {"name": name, **dict([rest.split("=")] if rest else [])}


def covered(label: str, names: Iterable[str]) -> list[str]:
    """The cases in which a criterion can score something."""
    found = []
    for name in names:
        case, c = CASES[name](), get_criterion(asked(label))
        try:
            make_job(c, case.graph.groups(), case.model, check_fits(case.model, []), "structured")
        except ConfigError:
            continue
        found.append(name)
    return found


def pairs(names: Iterable[str], labels: Iterable[str] = LAWS) -> pytest.MarkDecorator:
    """Every criterion on every case that it can score."""
    every = [(label, name) for label in labels for name in covered(label, names)]
    return pytest.mark.parametrize(("label", "name"), every)


EVERY = pytest.mark.parametrize("label", LAWS)
WITH_DATA = [label for label in LAWS if get_criterion(asked(label)).needs_data]
RESCALED = [n for n in LAWS if LAWS[n].rescaling is not None]


def run(case: Case, label: str, **options: Any) -> dict[str, Tensor]:
    return dict(
        score(
            case.model,
            case.batches,
            case.loss_fn,
            criterion=asked(label),
            graph=case.graph,
            **options,
        ).values
    )


def test_every_criterion_has_a_law() -> None:
    assert {asked(label)["name"] for label in LAWS} == set(CRITERIA)


@pairs(CASES)
def test_finite_and_deterministic(label: str, name: str) -> None:
    case = CASES[name](torch.float32)
    first, second = run(case, label), run(case, label)
    assert first.keys() <= {g.name for g in case.graph.groups()}
    for target in [g for g in case.graph.groups() if g.name in first]:
        values = first[target.name]
        assert values.dtype == torch.float32
        assert values.shape == (target.n_units,)
        assert torch.isfinite(values).all()
        assert LAWS[label].signed or (values >= 0).all()
        assert torch.equal(values, second[target.name])


@pairs(CASES)
def test_single_and_double_precision_agree(label: str, name: str) -> None:
    double, single = run(CASES[name](torch.float64), label), run(CASES[name](torch.float32), label)
    for target, values in double.items():
        scale = values.abs().max().item()
        torch.testing.assert_close(single[target], values, rtol=1e-3, atol=1e-4 * scale)


@pairs(["mlp", "conv"])
def test_half_precision_is_near(label: str, name: str) -> None:
    error = LAWS[label].half
    near = run(CASES[name](torch.bfloat16), label)
    for target, values in run(CASES[name](torch.float64), label).items():
        assert torch.isfinite(near[target]).all()
        if error is not None:
            scale = values.abs().max().item()
            torch.testing.assert_close(near[target], values, rtol=error, atol=error * scale)


def state(case: Case) -> tuple[Any, ...]:
    """Everything that scoring must leave alone."""
    m = case.model
    return (
        [t.clone() for t in m.state_dict().values()],
        [(id(p), p._version, p.requires_grad) for p in m.parameters()],
        [None if p.grad is None else p.grad.clone() for p in m.parameters()],
        [x.training for x in m.modules()],
        [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in m.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )


def unchanged(before: Any, after: Any) -> bool:
    if isinstance(before, (tuple, list)):
        return len(before) == len(after) and all(map(unchanged, before, after))
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    return bool(before == after)


def unusual(case: Case) -> Case:
    """Train mode in one place, a frozen parameter, a gradient that the user wants to keep."""
    case.model.train()
    next(case.model.children()).eval()
    first, *_, last = case.model.parameters()
    first.requires_grad_(False)
    last.grad = torch.full_like(last, 7.0)
    return case


@pairs(CASES)
def test_state_is_untouched(label: str, name: str) -> None:
    case = unusual(CASES[name]())
    before = state(case)
    run(case, label)
    assert unchanged(before, state(case))


def test_the_state_checker_sees_changes() -> None:
    case = mlp()
    before = state(case)
    next(case.model.parameters()).data[0, 0] += 1
    assert not unchanged(before, state(case))
    before = state(case)
    case.model.register_forward_hook(lambda *_: None)
    assert not unchanged(before, state(case))


@pairs(["residual"], WITH_DATA)
def test_state_is_untouched_after_an_exception(label: str, name: str) -> None:
    case = unusual(CASES[name]())
    before = state(case)

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(case, label, progress=stop)
    x, y = case.batches[1]
    bad = Case(case.model, case.graph, [case.batches[0], (x * float("nan"), y)], case.loss_fn)
    with pytest.raises(ScoringError, match="batch 1"):
        run(bad, label)
    assert unchanged(before, state(case))


@pairs(["conv", "residual"], [n for n in LAWS if LAWS[n].permutes])
def test_scores_permute_with_the_units(label: str, name: str) -> None:
    """Shuffling the units of a layer shuffles their scores, and nothing else."""
    case = CASES[name]()
    straight = run(case, label)
    target = case.graph.groups()[0]
    order = torch.tensor([2, 0, 3, 1, *range(4, target.n_units)])
    with torch.no_grad():
        tensors = case.model.state_dict()
        for m in target.members:
            tensor, unit, index = tensors[m.tensor], torch.tensor(m.unit), torch.tensor(m.index)
            each = len(unit) // target.n_units  # positions of one unit are consecutive here
            moved = index.reshape(target.n_units, each)[order].reshape(-1)
            tensor.index_copy_(m.dim, index, tensor.index_select(m.dim, moved))
            assert unit.equal(torch.arange(target.n_units).repeat_interleave(each))
    shuffled = run(case, label)
    torch.testing.assert_close(shuffled[target.name], straight[target.name][order])
    for other in straight.keys() - {target.name}:
        torch.testing.assert_close(shuffled[other], straight[other])


@pairs(["mlp"], RESCALED)
def test_rescaling_a_unit(label: str, name: str) -> None:
    """A relu unit made a times larger and read a times smaller computes the same function."""
    power = LAWS[label].rescaling
    assert power is not None
    case, unit, a = CASES[name](), "2:neuron", 3.0
    before = run(case, label)[unit]
    net = case.model
    assert isinstance(net, nn.Sequential)
    with torch.no_grad():
        for p in net[2].parameters():
            p.mul_(a)
        next(net[4].parameters()).div_(a)
    torch.testing.assert_close(run(case, label)[unit], before * a**power, rtol=1e-5, atol=1e-7)


def recut(case: Case, sizes: list[int]) -> Case:
    x, y = (torch.cat(t) for t in zip(*case.batches, strict=True))
    pairs: list[Batch] = list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))
    return Case(case.model, case.graph, pairs, case.loss_fn)


@pairs(["conv", "lstm", "residual"])
def test_independent_of_the_cut_into_batches(label: str, name: str) -> None:
    case = CASES[name]()
    whole = run(recut(case, [10]), label)
    for sizes in ([4, 4, 2], [1, 9], [1] * 10):
        parts = run(recut(case, sizes), label)
        equal = all(torch.allclose(parts[t], whole[t], rtol=1e-5, atol=1e-9) for t in whole)
        assert equal == LAWS[label].partition


@pytest.mark.parametrize("name", ["conv", "residual"])
def test_one_pass_for_many_gives_the_same(name: str) -> None:
    case = CASES[name]()
    labels = [label for label in LAWS if covered(label, [name])]
    together = score(
        case.model, case.batches, case.loss_fn, criterion=list(map(asked, labels)), graph=case.graph
    )
    assert list(together) == labels
    for label in labels:
        for target, values in run(case, label).items():
            torch.testing.assert_close(together[label].values[target], values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("label", [n for n in LAWS if get_criterion(asked(n)).covers("weight")])
def test_single_weights(label: str) -> None:
    """At weight granularity there is one score for each element."""
    case = mlp()
    found = run(case, label, granularity="weight")
    assert found.keys() == {"0.weight", "2.weight", "4.weight"}
    for name, values in found.items():
        assert values.shape == (case.model.get_parameter(name).numel(),)
        assert torch.isfinite(values).all()
