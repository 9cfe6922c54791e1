"""Tangents through layers that do not move: the same numbers, fewer products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.profiler import ProfilerActivity, profile

from secateurs.statistics.tangents import LINEAR, StillWeights

# torch loads its forward-mode rules through an entry point it has deprecated itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {}


def fixed(name: str, shape: tuple[int, ...], bias: int | None, **options: Any) -> None:
    torch.manual_seed(len(CALLS))
    weight = normal(*shape)
    b = None if bias is None else normal(bias)
    function = getattr(F, name)
    CALLS[f"{name} {bias} {options}"] = lambda x: function(x, weight, b, **options)
    CALLS[f"{name} {bias} {options} by name"] = lambda x: function(x, weight, bias=b, **options)


fixed("linear", (4, 3), 4)
fixed("linear", (4, 3), None)
for d in (1, 2, 3):
    fixed(f"conv{d}d", (4, 3, *[2] * d), 4, stride=2, padding=1)
    fixed(f"conv{d}d", (6, 1, *[2] * d), 6, groups=3)
    fixed(f"conv_transpose{d}d", (3, 4, *[2] * d), 4, stride=2)


def sample(name: str) -> Tensor:
    d = 0 if name.startswith("linear") else int(name.split("d ")[0][-1])
    return normal(5, 3, *[4] * d)


@pytest.mark.parametrize("name", CALLS)
def test_the_tangent_is_that_of_torch(name: str) -> None:
    torch.manual_seed(0)
    x = sample(name)
    v = torch.randn_like(x)
    expected = jvp(CALLS[name], (x,), (v,))
    with StillWeights():
        found = jvp(CALLS[name], (x,), (v,))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_every_function_is_tried() -> None:
    assert {f.__name__ for f in LINEAR} == {name.split()[0] for name in CALLS}


@pytest.mark.parametrize("moving", ["0.weight", "0.bias", "2.weight", "2.bias", "4.bias"])
def test_layers_that_move_are_left_to_torch(moving: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    net = net.double().requires_grad_(False)
    x, p = normal(6, 3), net.get_parameter(moving)

    def run(value: Tensor) -> Tensor:
        out: Tensor = functional_call(net, {moving: value}, (x,))
        return out

    v = torch.randn_like(p)
    with StillWeights():
        found = jvp(run, (p,), (v,))[1]
    torch.testing.assert_close(found, jvp(run, (p,), (v,))[1])
    step = 1e-6
    torch.testing.assert_close(
        found, (run(p + step * v) - run(p - step * v)) / (2 * step), rtol=1e-6, atol=1e-8
    )


def test_two_products_instead_of_three() -> None:
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).requires_grad_(False)
    x, weight = torch.randn(5, 8), net.get_parameter("0.weight")

    def products(still: bool) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            if still:
                with StillWeights():
                    run()
            else:
                run()
        return sum(e.count for e in seen.key_averages() if e.key in ("aten::mm", "aten::addmm"))

    def run() -> None:
        jvp(lambda w: functional_call(net, {"0.weight": w}, (x,)), (weight,), (weight,))

    assert products(still=True) < products(still=False)


def test_nothing_changes_without_tangents() -> None:
    x = normal(5, 3)
    name = next(iter(CALLS))
    with StillWeights():
        assert torch.equal(CALLS[name](x), CALLS[name](x))
    assert torch.equal(CALLS[name](x), CALLS[name](x))
