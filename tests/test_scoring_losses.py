"""Anything with a scalar loss: regression, tagging, alignment, detection; and odd losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.batches import call_model
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.types import Batch, Scores

CHEAP = ["taylor", "taylor_batch", "gradient", "directional", "finite_difference"]


class Net(nn.Module):
    """A shared body, and heads that a subclass adds."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 6)
        self.head, self.box = nn.Linear(6, 3), nn.Linear(6, 4)
        self.double()

    def body(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(self.b(torch.relu(self.a(x))))
        return out


class Regressor(Net):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


class Detector(Net):
    def forward(self, image: Tensor) -> dict[str, Any]:
        h = self.body(image)  # (n, anchors, 6)
        return {"logits": self.head(h), "boxes": [self.box(h)]}


def detection(out: dict[str, Any], wanted: dict[str, Tensor]) -> Tensor:
    logits = functional.cross_entropy(out["logits"].flatten(0, 1), wanted["labels"].flatten())
    boxes = functional.smooth_l1_loss(out["boxes"][0], wanted["boxes"])
    return logits + 2 * boxes


def alignment(out: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
    """CTC over (n, steps, classes), each sample divided by its length, then the mean."""
    words, lengths = wanted
    steps = torch.full((len(out),), out.shape[1])
    losses = functional.ctc_loss(
        out.log_softmax(-1).transpose(0, 1), words, steps, lengths, reduction="none"
    )
    return (losses / lengths).mean()


def tagging(out: Tensor, tags: Tensor) -> Tensor:
    """A mean over the samples of the mean over their tokens that count."""
    each = functional.cross_entropy(out.transpose(1, 2), tags, reduction="none", ignore_index=-1)
    return (each.sum(1) / (tags >= 0).sum(1)).mean()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def samples(kind: str) -> list[Any]:
    """Six samples of each kind of problem: (inputs, targets), each with one sample in front."""
    torch.manual_seed(1)
    found: list[Any] = []
    for i in range(6):
        if kind == "regression":
            found.append((normal(1, 4), normal(1, 3)))
        elif kind == "detection":
            labels = torch.randint(3, (1, 5))
            found.append(({"image": normal(1, 5, 4)}, {"labels": labels, "boxes": normal(1, 5, 4)}))
        elif kind == "alignment":
            words = torch.randint(1, 3, (1, 2))
            found.append((normal(1, 7, 4), (words, torch.tensor([1 + i % 2]))))
        else:
            tags = torch.randint(3, (1, 5))
            tags[0, 2 + i % 3 :] = -1
            found.append((normal(1, 5, 4), tags))
    return found


def joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {k: joined([p[k] for p in parts]) for k in first}
    return tuple(joined([p[i] for p in parts]) for i in range(len(first)))


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor]]] = {
    "regression": (Regressor, functional.mse_loss),
    "detection": (Detector, detection),
    "alignment": (Regressor, alignment),
    "tagging": (Regressor, tagging),
}


def scored(kind: str, sizes: list[int]) -> dict[str, Scores]:
    make, loss_fn = PROBLEMS[kind]
    every, model = samples(kind), make()
    batches: list[Batch] = []
    for size in sizes:
        part, every = every[:size], every[size:]
        batches.append(joined(part))
    return score(model, batches, loss_fn, criterion=CHEAP, graph=trace(model, batches[0][0]))


@pytest.mark.parametrize("kind", PROBLEMS)
def test_scores_of_every_kind_of_problem(kind: str) -> None:
    whole, parts = scored(kind, [6]), scored(kind, [4, 2])
    for label, found in whole.items():
        assert {n.partition(".")[0] for n in found.values} >= {"a:neuron", "b:neuron"}
        assert found.notes == parts[label].notes or label == "taylor_batch"
        for name, values in found.values.items():
            assert torch.isfinite(values).all()
            if label != "taylor_batch":
                torch.testing.assert_close(parts[label].values[name], values)


@pytest.mark.parametrize("kind", PROBLEMS)
def test_exact_ablation_by_hand(kind: str) -> None:
    """Unit 1 of the first layer: its rows set to zero in a copy, the loss computed again."""
    make, loss_fn = PROBLEMS[kind]
    model, (inputs, targets) = make(), joined(samples(kind))
    with torch.no_grad():
        before = loss_fn(call_model(model, inputs), targets)
        for p in (model.get_parameter("a.weight"), model.get_parameter("a.bias")):
            p[1] = 0
        after = loss_fn(call_model(model, inputs), targets)
    found = scored(kind, [4, 2])["finite_difference"].values["a:neuron"]
    torch.testing.assert_close(found[1], (after - before).float())


# -- losses that are no mean over samples ----------------------------------------------------


def notes(loss_fn: Callable[[Any, Any], Tensor], kind: str = "regression") -> tuple[str, ...]:
    model, batch = PROBLEMS[kind][0](), joined(samples(kind))
    graph = trace(model, batch[0])
    return score(model, [batch], loss_fn, graph=graph, criterion="directional").notes


def test_a_mean_is_not_remarked() -> None:
    assert notes(functional.mse_loss) == ()
    assert notes(tagging, "tagging") == ()


def test_a_sum_is_remarked() -> None:
    (note,) = notes(lambda out, y: functional.mse_loss(out, y, reduction="sum"))
    assert note.startswith("the loss is a sum over samples, not a mean")


def test_a_mean_over_tokens_is_remarked() -> None:
    (note,) = notes(
        lambda out, y: functional.cross_entropy(out.transpose(1, 2), y, ignore_index=-1), "tagging"
    )
    assert "the scores depend on the batches" in note


def test_samples_that_act_on_each_other_are_remarked() -> None:
    def contrast(out: Tensor, _: Tensor) -> Tensor:
        return functional.cross_entropy(out @ out.T, torch.arange(len(out)))

    (note,) = notes(contrast)
    assert "samples that act on each other" in note


def test_criteria_without_a_loss_say_nothing_about_it() -> None:
    model, batch = Regressor(), joined(samples("regression"))

    def total(out: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(out, y, reduction="sum")

    graph = trace(model, batch[0])
    found = score(model, [batch], total, graph=graph, criterion=["magnitude", "activation_mean"])
    assert all(s.notes == () for s in found.values())
