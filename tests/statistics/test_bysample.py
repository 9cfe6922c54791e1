"""Scores by sample at single weights: hooks, vectorised or one by one, they are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.criteria import FINISH, Criterion, get_criterion
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.statistics.jobs import member_places
from secateurs.statistics.units import into_units, one_sample
from secateurs.testing import NETS, Case, case
from secateurs.types import Scores, Target

EVERY: list[Any] = [
    "taylor",
    "fisher",
    {"name": "taylor", "members": "all"},
    {"name": "taylor", "members": "producers", "finish": "abs"},
    {"name": "gradient", "average": "sample"},
    {"name": "snip", "average": "sample"},
]


def slow(on: Case, spec: Any, target: Target) -> Tensor:
    """One backward pass for each sample, unit by unit."""
    c: Criterion = get_criterion(spec)
    params = dict(on.model.named_parameters())
    finish = FINISH[c.finish]
    total, n = torch.zeros(target.n_units, dtype=torch.float64), 0
    for batch in on.batches:
        for i in range(len(batch[1])):
            x, y = one_sample(batch, i, len(batch[1]))
            loss = on.loss_fn(on.model(x), y)
            grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            found = dict(zip(params, grads, strict=True))
            units = torch.zeros(target.n_units, dtype=torch.float64)
            for name, member in member_places(c, target, params):
                w = params[name].detach()
                grad = found[name]
                g = torch.zeros_like(w) if grad is None else grad
                known = {"weight": w, "grad": g, "gate": w * g}
                values = c.fn({need: known[need] for need in c.needs})
                values = finish(values) if c.finish_on == "element" else values
                units += (
                    values.reshape(-1)
                    if member is None
                    else into_units(values, member, torch.zeros_like(units))
                )
            total += units if c.finish_on == "element" else finish(units)
            n += 1
    return (total / n).float()


def found(on: Case, granularity: str, **options: Any) -> dict[str, Scores]:
    return score(
        on.model, on.batches, on.loss_fn, criterion=EVERY, graph=on.graph,
        granularity=granularity, **options,
    )  # fmt: skip


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("granularity", ["weight", "structured"])
def test_equal_to_one_backward_pass_for_each_sample(net: str, granularity: str) -> None:
    on = case(net)
    for spec, scores in zip(EVERY, found(on, granularity).values(), strict=True):
        for name, values in scores.values.items():
            wanted = slow(on, spec, on.graph.targets[name])
            torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-9 * float(wanted.max()))


def test_the_oracle_sees_a_wrong_sample() -> None:
    on = case("mlp")
    right = found(on, "weight")["taylor"].values["a.weight"]
    x, y = on.batches[0]
    wrong = Case(on.model, on.graph, [(x.flip(0), y), *on.batches[1:]], on.loss_fn)
    assert not torch.allclose(right, slow(wrong, "taylor", on.graph.targets["a.weight"]))


class Stubborn(nn.Module):
    """A weight that is used by a function, and Python that looks at values."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.looks = nn.Linear(6, 5), nn.Linear(5, 3), looks

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.linear(x, self.a.weight, self.a.bias)
        if self.looks and h.sum().item() > 1e9:
            h = -h
        out: Tensor = self.c(torch.relu(h))
        return out


@pytest.mark.parametrize("looks", [False, True])
def test_what_hooks_cannot_see(looks: bool) -> None:
    model, plain = Stubborn(looks).double(), case("mlp")
    on = Case(model, trace(model, plain.batches[0][0]), plain.batches, plain.loss_fn)
    for spec, scores in zip(EVERY, found(on, "weight").values(), strict=True):
        assert any("one backward pass for each sample" in n for n in scores.notes) == looks
        for name, values in scores.values.items():
            wanted = slow(on, spec, on.graph.targets[name])
            torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("sizes", [[1, 9], [1] * 10, [1, 1, 8]])
def test_a_first_batch_of_one_sample(sizes: list[int]) -> None:
    """It cannot tell where the samples are: the next larger one does."""
    plain = case("cnn")
    x, y = (torch.cat(t) for t in zip(*plain.batches, strict=True))
    pairs = list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))
    on = Case(plain.model, plain.graph, pairs, plain.loss_fn)
    wanted = found(plain, "weight")
    for label, scores in found(on, "weight").items():
        for name, values in scores.values.items():
            torch.testing.assert_close(values, wanted[label].values[name], rtol=1e-5, atol=1e-9)


def test_one_forward_pass_for_a_batch() -> None:
    """Hooks cost no pass of their own: with the probe's, a batch is one forward."""
    on = case("cnn")
    calls: list[int] = []
    handle = on.model.register_forward_hook(lambda *_: calls.append(1))
    found(on, "weight", max_batches=1)
    first = len(calls)
    calls.clear()
    found(on, "weight")
    handle.remove()
    assert len(calls) - first == len(on.batches) - 1
