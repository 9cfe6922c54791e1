"""Curves against models that are cut by hand; nothing of the model is left changed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.allocation.curves import Sensitivity
from secateurs.errors import ConfigError, FileFormatError, ScoringError
from secateurs.masks import apply_masks_, named_tensors
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.sensitivities import MeasuredSensitivity, runs, sensitivity
from secateurs.sensitivities.cache import weights_mark
from secateurs.surgery import shrink
from secateurs.testing.nets import Case, case
from secateurs.types import (
    Batch,
    Budget,
    Counts,
    Graph,
    GroupTarget,
    Scores,
    WeightTarget,
)

FRACTIONS = (0.2, 0.5, 0.8)


def mean_loss(model: nn.Module, made: Case) -> float:
    total, n = 0.0, 0
    with torch.no_grad():
        for inputs, targets in made.batches:
            size = len(targets)
            outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
            total, n = total + size * float(made.loss_fn(outputs, targets)), n + size
    return total / n


def cut_by_hand(made: Case, scores: Scores, name: str, n_gone: int) -> nn.Module:
    """A copy in which everything of the lowest units is zero, found member by member."""
    model = copy.deepcopy(made.model).eval()
    tensors, target = named_tensors(model), made.graph.targets[name]
    values = scores.values[name].tolist()
    # Of equal scores the larger index goes first.
    gone = sorted(range(len(values)), key=lambda u: (values[u], -u))[:n_gone]
    with torch.no_grad():
        if not isinstance(target, GroupTarget):
            tensors[name].view(-1)[gone] = 0
            return model
        for member in target.members:
            for position, unit in zip(member.index, member.unit, strict=True):
                if unit in gone and member.masked:
                    tensors[member.tensor].select(member.dim, int(position)).zero_()
    return model


@pytest.mark.parametrize(
    ("net", "granularity"),
    [
        ("mlp", "structured"), ("cnn", "structured"), ("recurrent", "structured"),
        ("transformer", ["structured", "layer"]), ("mlp", "weight"), ("recurrent", "weight"),
    ],
)  # fmt: skip
def test_a_curve_is_the_loss_of_copies_that_are_cut_by_hand(net: str, granularity: Any) -> None:
    made = case(net)
    scores = score(made.model, made.batches, made.loss_fn, graph=made.graph, criterion="magnitude",
                   granularity=granularity)  # fmt: skip
    before = weights_mark(made.model)
    found = sensitivity(made.model, made.batches, made.loss_fn, scores=scores, fractions=FRACTIONS)
    assert weights_mark(made.model) == before
    dense = mean_loss(copy.deepcopy(made.model).eval(), made)
    assert found.dense == pytest.approx(dense, rel=1e-5)
    assert set(found.curves) | set(found.left_out) == set(scores.values)
    for name, curve in found.curves.items():
        n = len(scores.values[name])
        gone = sorted({min(n - 1, max(1, round(f * n))) for f in FRACTIONS})
        assert curve.removed == (0.0, *(g / n for g in gone))
        expected = [mean_loss(cut_by_hand(made, scores, name, g), made) - dense for g in gone]
        assert curve.drop[1:] == pytest.approx(expected, abs=1e-5), name


def test_a_curve_is_the_metric_of_the_small_model() -> None:
    made = case("cnn")
    inputs = torch.cat([x for x, _ in made.batches])
    labels = torch.cat([y for _, y in made.batches])

    def evaluate(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            outputs = model.eval()(inputs)
        return {"gap": float(outputs.std()), "accuracy": float((outputs.argmax(1) == labels).sum())}

    scores = score(made.model, graph=made.graph, criterion="magnitude", granularity="channel")
    for maximize, sign, word in ((True, 1, "drop"), (False, -1, "rise")):
        found = sensitivity(
            made.model, scores=scores, evaluate=evaluate, maximize=maximize, fractions=(0.5,)
        )
        assert found.measure == f"{word} of gap"
        assert found.errors == {}
        for name, curve in found.curves.items():
            n = len(scores.values[name])
            plan = select(scores, Counts({name: n - round(n / 2)}, Budget(units=0.5)))
            small = shrink(made.model, plan, made.batches[0][0])
            expected = sign * (evaluate(made.model)["gap"] - evaluate(small)["gap"])
            assert curve.drop[1] == pytest.approx(expected, abs=1e-5)


def test_errors_are_those_of_paired_samples() -> None:
    net = nn.Linear(2, 1, bias=False)
    net.weight.data.copy_(torch.tensor([[1.0, 3.0]]))
    graph = Graph({"weight": WeightTarget("weight", (1, 2))})
    x, y = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]), torch.zeros(3, 1)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = sensitivity(net, batches, functional.l1_loss, graph=graph, granularity="weight",
                        criterion="magnitude", fractions=(0.5,))  # fmt: skip
    # The losses fall from 1, 3, 5 to 0: the mean rise is -3, its standard error 2 / sqrt(3).
    assert found.curves["weight"].drop == (0.0, -3.0)
    assert found.errors["weight"] == pytest.approx((0.0, 2 / math.sqrt(3)))
    assert found.n_samples == 3


def test_without_losses_of_samples_there_are_no_errors_and_a_note() -> None:
    made = case("mlp")

    def largest(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none").max()

    found = sensitivity(made.model, made.batches, largest, graph=made.graph, criterion="magnitude")
    assert found.errors == {}
    assert (
        "no standard errors: the loss is not a mean over samples that can be taken one by one"
        in found.notes
    )


def test_the_model_is_whole_after_an_exception() -> None:
    made = case("cnn")
    calls: list[int] = []

    def breaks(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 25:
            raise ZeroDivisionError("planted")
        return made.loss_fn(outputs, targets)

    before, mode = weights_mark(made.model), made.model.training
    with pytest.raises(ZeroDivisionError, match="planted"):
        sensitivity(made.model, made.batches, breaks, graph=made.graph, criterion="magnitude")
    assert weights_mark(made.model) == before
    assert made.model.training == mode


def test_weights_that_changed_are_noticed() -> None:
    net = case("mlp").model
    before = weights_mark(net)
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] *= -1
    assert weights_mark(net) != before


class Shuffled:
    """Batches that come in another order, in other batches, every time."""

    def __init__(self, batches: list[Batch]) -> None:
        self.x = torch.cat([x for x, _ in batches])
        self.y = torch.cat([y for _, y in batches])
        self.turn = 0

    def __iter__(self) -> Iterator[Batch]:
        self.turn += 1
        order = torch.from_numpy(np.random.default_rng(self.turn).permutation(len(self.x)))
        for i in range(0, len(order), 4):
            yield self.x[order[i : i + 4]], self.y[order[i : i + 4]]


def test_batches_that_are_too_many_to_be_held_are_read_again_in_any_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = case("mlp")
    scores = score(made.model, graph=made.graph, criterion="magnitude", granularity="neuron")
    held = sensitivity(made.model, made.batches, made.loss_fn, scores=scores)
    monkeypatch.setattr(runs, "HELD", 0)
    shuffled = Shuffled(made.batches)
    again = sensitivity(made.model, shuffled, made.loss_fn, scores=scores)
    assert shuffled.turn > 2
    for name, curve in held.curves.items():
        assert again.curves[name].drop == pytest.approx(curve.drop, abs=1e-6)
        assert again.errors[name] == pytest.approx(held.errors[name], abs=1e-6)


def test_what_went_earlier_costs_nothing() -> None:
    made = case("mlp")
    first = score(made.model, graph=made.graph, criterion="magnitude", granularity="neuron")
    plan = select(first, Counts({"a:neuron": 4}, Budget(units=0.5)))
    apply_masks_(made.model, plan.masks)
    scores = score(made.model, graph=made.graph, criterion="magnitude", granularity="neuron",
                   previous=plan)  # fmt: skip
    found = sensitivity(made.model, made.batches, made.loss_fn, scores=scores,
                        fractions=(0.25, 0.75))  # fmt: skip
    curve = found.curves["a:neuron"]
    assert curve.removed == (0.0, 0.5, 0.75)
    assert curve.drop[1] == 0.0
    assert curve.drop[2] != 0.0


# --- the cache -----------------------------------------------------------------------------------


def counted(made: Case) -> tuple[list[int], Callable[[Any, Any], Tensor]]:
    calls: list[int] = []

    def loss(outputs: Any, targets: Any) -> Tensor:
        calls.append(1)
        return made.loss_fn(outputs, targets)

    return calls, loss


def test_a_call_that_was_interrupted_goes_on_target_by_target(tmp_path: Path) -> None:
    made, cache = case("mlp"), tmp_path / "curves" / "mlp.json"
    scores = score(made.model, graph=made.graph, criterion="magnitude", granularity="neuron")
    whole = sensitivity(made.model, made.batches, made.loss_fn, scores=scores)

    def stop(name: str, done: int, total: int) -> None:
        assert total == 2
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(made.model, made.batches, made.loss_fn, scores=scores, cache=cache,
                    progress=stop)  # fmt: skip
    assert list(json.loads(cache.read_text())["curves"]) == ["a:neuron"]
    calls, loss = counted(made)
    resumed = sensitivity(made.model, made.batches, loss, scores=scores, cache=cache)
    half = len(calls)
    assert resumed == whole
    again = sensitivity(made.model, made.batches, loss, scores=scores, cache=cache)
    assert again == whole
    assert 0 < len(calls) - half < half  # the uncut model alone is run again
    assert Sensitivity.from_dict(json.loads(cache.read_text())).curves == whole.curves
    assert [f.name for f in cache.parent.iterdir()] == ["mlp.json"]


@pytest.mark.parametrize("change", ["weights", "data", "fractions", "order", "loss"])
def test_a_stale_cache_is_measured_again_with_a_note(tmp_path: Path, change: str) -> None:
    made, cache = case("mlp"), tmp_path / "mlp.json"
    scores = score(made.model, graph=made.graph, criterion="magnitude", granularity="neuron")
    options: dict[str, Any] = {"scores": scores, "fractions": (0.25, 0.5)}
    first = sensitivity(made.model, made.batches, made.loss_fn, cache=cache, **options)
    batches, loss = list(made.batches), made.loss_fn
    if change == "weights":
        with torch.no_grad():
            next(made.model.parameters()).mul_(0.5)
        note = "another weights"
    elif change == "data":
        batches, note = batches[:-1], "number of batches, number of samples"
    elif change == "fractions":
        options["fractions"], note = (0.5, 0.75), "for another fractions"
    elif change == "order":
        flipped = {name: -line for name, line in scores.values.items()}
        options["scores"] = Scores(scores.graph, flipped, "flipped")
        note = "for another order of its units"
    else:
        loss, note = (lambda o, t: 2 * made.loss_fn(o, t)), "uncut value"
    expected = sensitivity(made.model, batches, loss, **options)
    found = sensitivity(made.model, batches, loss, cache=cache, **options)
    assert any(note in n for n in found.notes), found.notes
    assert found.curves == expected.curves
    assert found.curves != first.curves
    again = sensitivity(made.model, batches, loss, cache=cache, **options)
    assert again == expected


def test_curves_of_other_targets_stay_in_the_cache(tmp_path: Path) -> None:
    made, cache = case("mlp"), tmp_path / "mlp.json"
    options: dict[str, Any] = {"graph": made.graph, "criterion": "magnitude", "cache": cache}
    neurons = sensitivity(made.model, made.batches, made.loss_fn, **options)
    weights = sensitivity(made.model, made.batches, made.loss_fn, granularity="weight", **options)
    assert set(weights.curves) == {"a.weight", "b.weight", "c.weight"}
    held = MeasuredSensitivity.from_dict(json.loads(cache.read_text()))
    assert held.curves == {**neurons.curves, **weights.curves}
    before = cache.stat().st_mtime_ns
    assert sensitivity(made.model, made.batches, made.loss_fn, **options) == neurons
    assert cache.stat().st_mtime_ns == before  # nothing was measured


@pytest.mark.parametrize("text", ["no json", "{}", '{"curves": {}, "made_by": {}, "orders": {}}'])
def test_another_file_is_left_alone(tmp_path: Path, text: str) -> None:
    made, cache = case("mlp"), tmp_path / "mine.json"
    cache.write_text(text)
    with pytest.raises(FileFormatError, match=r"mine.json holds no sensitivity curves.*Delete it"):
        sensitivity(made.model, made.batches, made.loss_fn, graph=made.graph, cache=cache)
    assert cache.read_text() == text


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": ()}, r"in \(0, 1\), got none"),
        ({"fractions": (0.5, 1.0)}, r"in \(0, 1\), got 1.0"),
        ({"fractions": (50.0,)}, "got 50.0. Did you mean 0.5?"),
        ({"batches": None}, "needs data: give batches and loss_fn, or evaluate"),
        ({"granularity": "head"}, "can score nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    made = case("mlp")
    given = {"batches": made.batches, "loss_fn": made.loss_fn, "graph": made.graph, **options}
    with pytest.raises(ConfigError, match=message):
        sensitivity(made.model, **given)


def test_targets_of_one_unit_have_no_curve() -> None:
    made = case("cnn")
    with pytest.raises(ConfigError, match="every target has one unit"):
        sensitivity(made.model, made.batches, made.loss_fn, graph=made.graph, granularity="layer")
    both = sensitivity(made.model, made.batches, made.loss_fn, graph=made.graph,
                       granularity=["channel", "layer"])  # fmt: skip
    assert list(both.left_out.values()) == ["it has one unit, which must stay"]


def test_a_loss_that_breaks_names_the_target() -> None:
    made = case("mlp")
    dense = made.model(made.batches[0][0])[0, 0].item()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        far = (outputs[:, 0] - dense).abs().min() > 1e-6
        return outputs.mean() * (float("inf") if far else 1.0)

    with pytest.raises(ScoringError, match=r"a:neuron with \d of 8 units removed: the rise"):
        sensitivity(made.model, made.batches[:1], loss, graph=made.graph, criterion="magnitude",
                    granularity="neuron", fractions=(0.9,))  # fmt: skip
    with pytest.raises(ScoringError, match="the metric of the uncut model is nan"):
        sensitivity(made.model, graph=made.graph, criterion="magnitude",
                    evaluate=lambda _: float("nan"))  # fmt: skip


# --- words ---------------------------------------------------------------------------------------


def test_everything_survives_json() -> None:
    made = case("mlp")
    found = sensitivity(made.model, made.batches, made.loss_fn, graph=made.graph)
    data = json.loads(json.dumps(found.to_dict()))
    assert MeasuredSensitivity.from_dict(data) == found
    del data["dense"]
    with pytest.raises(ConfigError, match="needs dense"):
        MeasuredSensitivity.from_dict(data)
