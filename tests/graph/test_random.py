"""A thousand random networks: the smaller model always equals the masked one."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from tests.graph.random_drawer import FAMILIES, Drawer, Part, Program
from tests.graph.random_law import Outcome, check, difference, masked_by
from tests.graph.random_nets import random_net
from tests.graph.random_shrinker import minimised

N_GRAPHS = 1008
CHUNK = 126
LEAST_REMOVED = 0.60


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, N_GRAPHS, CHUNK))
def test_random_networks(first: int) -> None:
    torch.set_num_threads(1)
    outcomes = {seed: check(random_net(seed), seed) for seed in range(first, first + CHUNK)}
    failed = {seed: found for seed, found in outcomes.items() if found.failed}
    assert not failed, "\n".join(
        f"random_net({seed}): {found.kind}: {found.detail[:200]}" for seed, found in failed.items()
    )
    removed = sum(found.kind in ("equal", "vacuous") for found in outcomes.values())
    assert removed >= LEAST_REMOVED * CHUNK
    in_vain = sum(found.kind == "vacuous" for found in outcomes.values())
    assert in_vain <= 0.25 * CHUNK
    uncaptured = sum(found.kind == "uncaptured" for found in outcomes.values())
    assert uncaptured <= 0.02 * CHUNK


def small_program() -> Program:
    """linear(5, 6) - relu - linear(6, 3), written as a program, with a line too many."""
    d = Drawer(3)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d.inputs.append(("v0", x))
    d.scope["v0"] = x
    d.let(f"{d.part('nn.Linear(5, 6)')}(v0)")
    d.let("F.relu(v1)")
    d.let("torch.tanh(v2)")
    return d.program(d.let(f"{d.part('nn.Linear(6, 3)')}(v3)"))


def test_a_program_is_the_module_that_it_says() -> None:
    program = small_program()
    net = program.build()
    (x,) = [x for _, x in program.inputs]
    first, last = net.get_submodule("p0"), net.get_submodule("p1")
    assert torch.equal(net(x), last(first(x).relu().tanh()))
    assert "v2 = F.relu(v1)" in program.text()


def test_the_law_accepts_a_right_result() -> None:
    found = check(small_program(), 1)
    assert (found.kind, found.form) == ("equal", "module")
    assert found.ops["linear"] == 2
    assert found.cut["linear"] == 2


def test_the_law_rejects_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller model whose last bias is off by 1e-6."""
    import secateurs as sc

    right = sc.shrink

    def wrong(*args: object, **options: object) -> nn.Module:
        small = right(*args, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            small.get_parameter("p1.bias").add_(1e-6)
        return small

    monkeypatch.setattr(sc, "shrink", wrong)
    assert check(small_program(), 1).kind == "unsound"


def test_the_law_rejects_what_was_not_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A "smaller" model that is only masked."""
    import secateurs as sc
    from secateurs.surgery import shrinking
    from secateurs.types import Plan

    right = sc.shrink

    def masked(model: nn.Module, plan: Plan, *args: object, **options: object) -> nn.Module:
        small = right(model, plan, *args, **options)  # type: ignore[arg-type]
        new = masked_by(model, dict(plan.masks))
        setattr(new, shrinking.INFO, shrinking.info_of(small))
        return new

    monkeypatch.setattr(sc, "shrink", masked)
    assert check(small_program(), 1).kind == "unsound"


def test_the_difference_is_relative_and_sees_shapes_and_infinities() -> None:
    one = torch.tensor([1.0, 3.0])
    assert difference([one], [one + 0.4]) == pytest.approx(0.1)
    assert difference([one], [one[:1]]) == float("inf")
    assert difference([one], [one / 0]) == float("inf")


def test_a_failure_is_made_short() -> None:
    """The lines that the failure needs stay, the others go."""

    def fails(program: Program) -> bool:
        return "F.relu" in program.text() and isinstance(check(program, 1), Outcome)

    found = minimised(small_program(), fails)
    assert found.lines == ("v2 = F.relu(v1)", "v4 = self.p1(v2)")
    assert [p.name for p in found.parts] == ["p1"]


def test_the_generator_is_seeded() -> None:
    a, b = random_net(7), random_net(7)
    assert a.text() == b.text()
    model, other = a.build(), b.build()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert replace(a, inputs=()) == replace(b, inputs=())


def test_every_family_can_be_drawn() -> None:
    """Each family adds its lines to some of the first networks."""
    for name in FAMILIES:
        taken = (seed for seed in range(60) if _drawn(seed, name))
        assert list(islice(taken, 1)), name


def _drawn(seed: int, name: str) -> bool:
    d = Drawer(seed)
    shape = [(2, 6), (2, 5, 6), (2, 6, 4, 4)][seed % 3]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    d.inputs.append(("v0", x))
    d.scope["v0"] = x
    return d.attempt(FAMILIES[name].step)


def test_a_part_is_the_same_each_time() -> None:
    part = Part("p0", "nn.Linear(3, 4)", 5)
    assert torch.equal(part.make().weight, part.make().weight)
