"""The laws tell a wrong criterion from a right one, and say where it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from secateurs.criteria import CRITERIA, STATISTICS, Criterion, criterion
from secateurs.criteria.registry import Statistic
from secateurs.errors import ConfigError
from secateurs.statistics import COLLECTORS, Collector, Run, register_statistic
from secateurs.testing import LAWS, NETS, BrokenLaw, case, check_criterion
from secateurs.types import KINDS, Target

Stats = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def _restore_registries() -> Iterator[None]:
    registries: list[dict[str, Any]] = [CRITERIA, STATISTICS, COLLECTORS]
    before = [dict(held) for held in registries]
    yield
    for held, values in zip(registries, before, strict=True):
        held.clear()
        held.update(values)


def own(fn: Callable[[Stats], Tensor], needs: str = "weight", **fields: Any) -> Criterion:
    return Criterion("own", fn, frozenset({needs}), "user", **fields)


def test_the_networks_have_units_of_every_kind() -> None:
    found = {t.kind for name in NETS for t in case(name).graph.targets.values()}
    assert found == set(KINDS)


def test_a_sound_criterion_passes_everywhere() -> None:
    checked = check_criterion(own(lambda s: s["weight"] * s["weight"]), nets=["mlp", "heads"])
    assert {law for law, _, _ in checked.passed} == set(LAWS)
    assert ("finite and deterministic", "heads", "layer") in checked.passed
    assert checked.skipped["precisions agree", "mlp", "layer"] == "no layer units in this network"


def test_a_registered_function_is_enough() -> None:
    @criterion("mine", needs={"grad"}, family="user", finish="abs")
    def mine(stats: Stats) -> Tensor:
        """A criterion of a user."""
        return stats["grad"]

    assert check_criterion(mine, nets=["mlp"]).passed
    with pytest.raises(ConfigError, match="'<lambda>' is not registered"):
        check_criterion(lambda s: s["grad"])


def stateful() -> Callable[[Stats], Tensor]:
    calls = []

    def fn(stats: Stats) -> Tensor:
        calls.append(1)
        return stats["weight"].abs() + len(calls)

    return fn


def writes(stats: Stats) -> Tensor:
    stats["weight"].mul_(2)
    return stats["weight"].abs()


def first_is_best(stats: Stats) -> Tensor:
    w = stats["weight"]
    rows = torch.arange(len(w), dtype=w.dtype).flip(0)
    return w.abs() * rows.reshape(-1, *[1] * (w.dim() - 1))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (own(stateful()), "finite and deterministic.*two passes give different"),
        (own(lambda s: s["weight"] / 0 * 0), "finite and deterministic.*is nan"),
        (own(first_is_best), "permutes with the units.*after shuffling"),
        (own(lambda s: s["grad"], "grad", average="batch", finish="square"),
         r"independent of the batches.*with batches of \[4, 4, 2\]"),
        (own(lambda s: s["weight"] + 1e7 - 1e7), "precisions agree"),
        (own(lambda s: s["nothing"]), "KeyError"),
    ],
)  # fmt: skip
def test_a_wrong_criterion_is_named(bad: Criterion, message: str) -> None:
    with pytest.raises(BrokenLaw, match=f"criterion 'own', law .*{message}"):
        check_criterion(bad, nets=["mlp"])


def test_a_criterion_that_writes_into_the_weights() -> None:
    bad = own(writes)
    with pytest.raises(BrokenLaw, match=r"weights or buffers|two passes"):
        check_criterion(bad, nets=["mlp"])
    only = {law for law in LAWS if law != "leaves the model alone"}
    with pytest.raises(BrokenLaw, match="scoring changes weights or buffers of the model"):
        check_criterion(bad, nets=["mlp"], excuse=only)


class Rude(Collector):
    """Leaves a hook behind."""

    shares = "forward"

    def begin(self, run: Run) -> None:
        self.setting.model.register_forward_hook(lambda *_: None)

    def unit(self, target: Target) -> Tensor:
        return torch.arange(target.n_units, dtype=torch.float64)


def test_a_statistic_that_leaves_hooks() -> None:
    summary = Statistic("unit", "forward", False, True, "the number of the unit")
    register_statistic("rude", Rude, summary)
    only = {law for law in LAWS if law != "leaves the model alone"}
    with pytest.raises(BrokenLaw, match="scoring changes hooks of the model"):
        check_criterion(own(lambda s: s["rude"], "rude"), nets=["mlp"], excuse=only)


def test_registering_statistics() -> None:
    with pytest.raises(ConfigError, match="already registered"):
        register_statistic("act", Rude)
    with pytest.raises(ConfigError, match="has no description"):
        register_statistic("new", Rude)
    summary = Statistic("unit", "forward", False, True, "x")
    STATISTICS["described"] = summary
    with pytest.raises(ConfigError, match="is described already"):
        register_statistic("described", Rude, summary)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown law 'permute'"):
        check_criterion("taylor", excuse=["permute"])
    with pytest.raises(ConfigError, match=r"unknown network 'mpl'\. Did you mean 'mlp'"):
        check_criterion("taylor", nets=["mpl"])
    with pytest.raises(ConfigError, match=r"scores nothing.*no layer|scores nothing.*not defined"):
        check_criterion(own(lambda s: s["weight"], granularities=("expert",)), nets=["mlp"])
