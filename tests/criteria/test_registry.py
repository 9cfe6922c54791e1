"""The registry: names, options, reductions, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from secateurs.criteria import CRITERIA, STATISTICS, criterion, get_criterion
from secateurs.errors import ConfigError


@pytest.fixture(autouse=True)
def _restore_registry() -> Iterator[None]:
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_documents_itself(name: str) -> None:
    c = CRITERIA[name]
    assert c.name == c.label == name
    assert c.summary.endswith((".", ";"))
    assert c.formula
    assert c.reference
    assert set(c.allowed) <= set(c.options)


@pytest.mark.parametrize("name", CRITERIA)
def test_functions_are_pure(name: str) -> None:
    c = CRITERIA[name]
    stats = {need: torch.linspace(-1, 1, 6).reshape(2, 3) for need in c.needs}
    before = {k: v.clone() for k, v in stats.items()}
    first, second = c.fn(stats), c.fn(stats)
    assert torch.equal(first, second)
    assert first.shape == (2, 3)
    assert all(torch.equal(stats[k], before[k]) for k in stats)


@pytest.mark.parametrize("name", [n for n, c in CRITERIA.items() if c.needs & {"grad", "gate"}])
def test_those_that_say_so_are_linear_in_the_gradient(name: str) -> None:
    c = CRITERIA[name]
    torch.manual_seed(0)
    weight, grad = torch.randn(2, 50, dtype=torch.float64)

    def at(g: Tensor) -> Tensor:
        known = {"weight": weight, "grad": g, "gate": weight * g}
        return c.fn({need: known[need] for need in c.needs})

    assert torch.allclose(at(grad), at(torch.ones_like(grad)) * grad) == c.linear


def test_names_mappings_and_criteria_give_the_same() -> None:
    by_name = get_criterion("finite_difference", step=0.5)
    by_map = get_criterion({"name": "finite_difference", "step": 0.5})
    assert by_name == by_map == get_criterion(by_map)
    assert by_name.options == {"step": 0.5, "of": "loss"}
    assert get_criterion("finite_difference", step=1.0).label == "finite_difference"


def test_a_variant_changes_what_is_needed() -> None:
    assert get_criterion("directional").needs == {"gate"}
    assert get_criterion("directional").needs_loss
    output = get_criterion("directional", of="output")
    assert output.needs == {"jvp_output"}
    assert output.needs_data
    assert not output.needs_loss
    assert not get_criterion("finite_difference", of="output").needs_loss


def test_reductions_are_options_of_every_criterion() -> None:
    c = get_criterion("taylor", average="dataset", members="all", finish="abs")
    assert (c.average, c.members, c.finish) == ("dataset", "all", "abs")
    assert c.label == "taylor(average=dataset, members=all, finish=abs)"
    assert CRITERIA["taylor"].average == "sample"


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("tailor", {}, "unknown criterion 'tailor'. Did you mean 'taylor'"),
        ("taylor", {"step": 1}, "unknown option of criterion 'taylor' 'step'"),
        ("finite_difference", {"stp": 1.0}, "Did you mean 'step'"),
        ("finite_difference", {"step": 0.0}, r"step must be in \[1e-06, 1\], got 0.0"),
        ("finite_difference", {"step": float("nan")}, "step must be a finite number"),
        ("finite_difference", {"step": "big"}, "step must be a finite number, got 'big'"),
        ("finite_difference", {"step": True}, "step must be a finite number, got True"),
        ("directional", {"of": "los"}, "Did you mean 'loss'"),
        ("taylor", {"finish": "abbs"}, "finish of criterion 'taylor'"),
        ("magnitude", {"average": "sample"}, "needs? grad or gate"),
        ({"criterion": "taylor"}, {}, "has no name"),
        (3, {}, "got int"),
    ],
)
def test_what_is_refused(spec: Any, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_criterion(spec, **options)


def fn(stats: Mapping[str, Tensor]) -> Tensor:
    """A criterion of a user."""
    return next(iter(stats.values()))


def test_registering() -> None:
    criterion("mine", needs={"weight", "grad"}, family="user")(fn)
    assert get_criterion("mine").summary == "A criterion of a user."
    with pytest.raises(ConfigError, match="already registered"):
        criterion("mine", needs={"weight"}, family="user")(fn)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (set[str](), "needs nothing"),
        ({"weight", "act"}, "all of one level"),
        ({"wait"}, "Did you mean 'weight'"),
    ],
)
def test_registering_nonsense(needs: set[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        criterion("mine", needs=needs, family="user")(fn)


def test_statistics_are_documented() -> None:
    assert all(s.summary for s in STATISTICS.values())
