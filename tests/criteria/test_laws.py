"""Laws that every criterion obeys; a criterion without a row fails."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs import testing
from secateurs.criteria import CRITERIA, get_criterion
from secateurs.errors import ConfigError, ScoringError
from secateurs.scoring import score
from secateurs.statistics import check_fits, make_job
from secateurs.testing import NETS, BrokenLaw, check_criterion
from secateurs.testing.laws import GRANULARITIES, obstacle
from tests.criteria.rows import LAWS
from tests.graphs import CASES, Case


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


RESCALED = [n for n in LAWS if LAWS[n].rescaling is not None]
WITH_DATA = [label for label in LAWS if get_criterion(asked(label)).needs_data]


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


# -- the laws of secateurs.testing, on networks with units of every kind -----------------------


def excused(label: str) -> set[str]:
    """Laws that a row says do not hold."""
    row = LAWS[label]
    laws = {"independent of the batches": row.partition, "permutes with the units": row.permutes}
    return {name for name, holds in laws.items() if not holds}


def granularities(label: str, net: str) -> list[str]:
    """What a criterion scores there; what runs the model for each weight does so once."""
    c, on = get_criterion(asked(label)), built(net)
    if NETS[net].tokens and not LAWS[label].tokens:
        return []
    found = [g for g in GRANULARITIES if not obstacle(c, on, g)]
    slow = c.cost == "per unit" and net != "mlp"
    return [g for g in found if g != "weight" or not slow]


built = functools.cache(testing.case)
PLACES = [(label, net) for label in LAWS for net in NETS if granularities(label, net)]


@pytest.mark.parametrize(("label", "net"), PLACES)
def test_every_law(label: str, net: str) -> None:
    check_criterion(
        asked(label), nets=[net], granularities=granularities(label, net), excuse=excused(label)
    )


@pytest.mark.parametrize("label", [n for n in LAWS if excused(n)])
def test_an_excuse_is_needed(label: str) -> None:
    """Each law from which a criterion is excused is one that it breaks, somewhere."""
    for law in excused(label):
        others = set(testing.LAWS) - {law}
        broken = 0
        for net in ("mlp", "cnn"):
            if granularities(label, net):
                try:
                    check_criterion(asked(label), nets=[net], excuse=others)
                except BrokenLaw:
                    broken += 1
        assert broken, law


# -- and what only we know of each -------------------------------------------------------------


@pairs(CASES)
def test_signs(label: str, name: str) -> None:
    for values in run(CASES[name](torch.float32), label).values():
        assert LAWS[label].signed or (values >= 0).all()


@pairs(["residual"], WITH_DATA)
def test_what_is_not_finite_is_named(label: str, name: str) -> None:
    case = CASES[name]()
    x, y = case.batches[1]
    bad = Case(case.model, case.graph, [case.batches[0], (x * float("nan"), y)], case.loss_fn)
    with pytest.raises(ScoringError, match="batch 1"):
        run(bad, label)


@pairs(["mlp", "conv"])
def test_half_precision_is_near(label: str, name: str) -> None:
    error = LAWS[label].half
    near = run(CASES[name](torch.bfloat16), label)
    for target, values in run(CASES[name](torch.float64), label).items():
        assert torch.isfinite(near[target]).all()
        if error is not None:
            scale = values.abs().max().item()
            torch.testing.assert_close(near[target], values, rtol=error, atol=error * scale)


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
