"""Scores on every architecture of the zoo: gates on activations against gradients of weights.

Two ways to the same derivative that share nothing: the hooks that gate a unit where it is made or
read, and the sum of weight x gradient over the parameters that alone remove it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

from secateurs.batches import batch_size, tensors
from secateurs.criteria import Criterion
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.types import KINDS, GroupTarget, Scores, Target

from .test_zoo import CASES, NO_DOUBLE, built

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # Keras
COUPLED = {"hf_clip"}
"""Each image meets each text, so that no sample has a loss of its own."""


def by_weights(**fields: Any) -> Criterion:
    """-w dL/dw over the parameters that alone remove a unit; no gate can serve it."""
    return Criterion(
        "by_weights", lambda s: -s["weight"] * s["grad"], frozenset({"weight", "grad"}), "test",
        linear=True, members="removal", label=f"by_weights{fields.get('average', '')}", **fields,
    )  # fmt: skip


PAIRS = {
    "directional": by_weights(finish="abs"),
    "taylor": by_weights(finish="square", average="sample"),
}


def loss(outputs: Any, labels: Tensor) -> Tensor:
    """A mean over samples that gives every entry of every output a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for t in tensors(outputs):
        if t.is_floating_point() and t.dim():
            first = t.transpose(0, 1) if t.dim() > 2 and t.shape[1] == len(labels) else t
            rows = first.reshape(len(labels), -1).double()  # a sequence may come first
            total = total + (rows.square() * torch.linspace(0.5, 1.5, rows.shape[1])).mean()
    return total


def scored(name: str) -> dict[str, Scores]:
    model, inputs = built(name, torch.float32 if name in NO_DOUBLE else torch.float64)
    graph = trace(model, inputs, outputs=CASES[name][0].outputs)
    batches = [(inputs, torch.zeros(batch_size(inputs)))]
    return score(
        model, batches, loss, criterion=[*PAIRS, *PAIRS.values()], graph=graph,
        granularity=["structured", "embedding"],
    )  # fmt: skip


def two_roles(target: Target, params: dict[str, Any]) -> bool:
    """Whether one parameter makes a unit in one place and reads it in another (a tied table).

    Scaling it removes the unit twice, so that the derivative by weights counts both; a gate is one.
    """
    assert isinstance(target, GroupTarget)
    made = {id(params[m.tensor]) for m in target.members if m.learned and m.role == "producer"}
    read = [params.get(f"{s.module}.weight") for s in target.sites if s.role == "consumer"]
    return any(id(p) in made for p in read)


def difference(a: Scores, b: Scores, leave: Collection[str] = ()) -> float:
    """The largest difference, relative to the largest score of the target."""
    worst = 0.0
    for name, values in a.values.items():
        if name in leave:
            continue
        wanted = b.values[name]
        worst = max(worst, float((values - wanted).abs().max() / wanted.abs().max().clamp(1e-30)))
    return worst


@pytest.mark.parametrize("name", CASES)
def test_gates_are_the_derivatives_of_the_weights(name: str) -> None:
    found = scored(name)
    params = dict(built(name)[0].named_parameters(remove_duplicate=False))
    tied = [t.name for t in found["taylor"].graph.groups(KINDS) if two_roles(t, params)]
    limit = 1e-3 if name in NO_DOUBLE else 1e-6
    assert any(v.any() for v in found["directional"].values.values())
    for label, other in PAIRS.items():
        if label == "taylor" and name in COUPLED:
            assert any("samples that act on each other" in n for n in found[label].notes)
        else:
            assert difference(found[label], found[other.label], tied) <= limit


def test_most_units_need_no_gradient_of_a_weight() -> None:
    gated = whole = 0
    for name in ("resnet-bottleneck", "hf_llama", "hf_vit", "mobilenet-v2", "hf_bart"):
        found = scored(name)["directional"]
        whole += len(found.graph.groups())
        gated += len(found.graph.groups()) - sum("no gate" in note for note in found.notes)
    assert whole - gated == 1  # the hidden size of BART, which is removed at its readers


def test_the_comparison_sees_a_wrong_gate() -> None:
    found = scored("plain-cnn")
    right, other = found["directional"], found[PAIRS["directional"].label]
    first = next(iter(right.values))
    wrong = Scores(right.graph, {**right.values, first: right.values[first].flip(0)}, "wrong")
    assert difference(right, other) <= 1e-6 < difference(wrong, other)
