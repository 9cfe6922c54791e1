"""Sixty random networks: whatever is found prunable, the smaller model equals the masked one."""

from __future__ import annotations

import pytest
import torch

from tests.graph.nets import plan_of, randomized, shrunk, tolerable, units_of
from tests.graph.random_nets import random_net

SHARES = (0.9, 0.5, 0.15)
PRUNED: list[bool] = []


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_networks(first: int) -> None:
    import secateurs as sc

    for seed in range(first, first + 10):
        model, x = random_net(seed)
        randomized(model, seed)
        if seed % 5 == 4:
            model, x = model.double(), x.double()
        graph = sc.trace(model, x)
        odd = [e for e in graph.excluded if "does not fit" in e.reason or "this dim" in e.reason]
        assert not odd, seed
        plan = plan_of(model, graph, SHARES[seed % 3]) if units_of(graph) else None
        PRUNED.append(plan is not None and plan.structural)
        if plan is None:
            continue
        _, info = shrunk(model, plan, x, "graph" if seed % 6 == 0 else "auto")
        assert tolerable(info.verification), seed
        if plan.structural:
            assert info.verification.changed > 0, seed


def test_enough_of_them_lost_something() -> None:
    if len(PRUNED) < 60:
        pytest.skip("needs the tests above")
    assert sum(PRUNED) >= 0.6 * len(PRUNED)


def test_the_generator_is_seeded() -> None:
    (a, x), (b, y) = random_net(7), random_net(7)
    assert torch.equal(x, y)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(a(x), b(y))
