"""Whole branches go: masked equals shrunk, parameters really vanish, files and budgets agree."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.cost import cost_of_kept, dense_cost
from secateurs.errors import SoundnessError
from secateurs.graph.layers import LAYER_TARGET
from secateurs.surgery.files import load_plan
from secateurs.surgery.layers import Removed, gone_tensors, removable_modules, without_layers
from secateurs.surgery.shrinking import info_of
from secateurs.surgery.verification import difference, masked_copy
from secateurs.types import Counts, Graph, GroupTarget, Plan, Scores
from tests.graph.test_layers import CASES, FOUND, Block, nested, traced
from tests.zoo.case import randomise_

ARCHITECTURES = [
    "resnet-basic", "resnet-bottleneck", "mobilenet-v2", "mlp-mixer", "convnext", "conformer",
    "shared-block", "encoder-pre-norm", "llama", "mha",
]  # fmt: skip
FORM = {
    "resnet-basic": "module", "mobilenet-v2": "module", "mlp-mixer": "module", "mha": "module",
    "convnext": "graph", "encoder-pre-norm": "graph",
}  # fmt: skip


def layer_plan(graph: Graph, gone: Iterable[int]) -> Plan:
    """Remove these units of the layer target and nothing else."""
    target = graph.targets[LAYER_TARGET]
    values = torch.ones(target.n_units)
    gone = list(gone)
    values[gone] = 0
    scores = Scores(graph, {LAYER_TARGET: values}, "by hand")
    counts = Counts({LAYER_TARGET: target.n_units - len(gone)}, sc.Budget(units=0.5))
    return sc.select(scores, counts)


def wide(name: str) -> tuple[nn.Module, sc.types.Inputs]:
    """A case in float64."""
    model, inputs = CASES[name].build()
    to = torch.utils._pytree.tree_map
    return model.double(), to(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


@pytest.mark.parametrize("form", ["auto", "graph"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masked_equals_shrunk_and_parameters_vanish(name: str, form: str) -> None:
    model, inputs = wide(name)
    graph = sc.trace(model, inputs)
    target = graph.targets[LAYER_TARGET]
    plan = alone(graph) if target.n_units == 1 else layer_plan(graph, [target.n_units - 2])
    small = sc.shrink(model, plan, inputs, form=form)
    info = info_of(small)
    assert info.verification.error <= 1e-12
    assert info.verification.changed > 1e-3
    if form == "graph" or name in FORM:
        assert info.form == ("graph" if form == "graph" else FORM[name])
    parameters = dict(small.named_parameters())
    assert not gone_tensors(plan) & set(parameters)
    keep = np.ones(target.n_units, dtype=np.bool_)
    keep[plan.removed[LAYER_TARGET].numpy()] = False
    expected = cost_of_kept(graph, {LAYER_TARGET: keep})
    assert sum(p.numel() for p in parameters.values()) == expected.params
    assert dense_cost(sc.trace(small, inputs)).macs == expected.macs
    assert expected.macs < dense_cost(graph).macs


def alone(graph: Graph) -> Plan:
    """Remove the only unit: `select` keeps one, so the plan is written by hand."""
    target = graph.targets[LAYER_TARGET]
    assert isinstance(target, GroupTarget)
    shapes = {m.tensor: graph.detail.shapes[m.tensor] for m in target.members}
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    layers = dict(zip(target.unit_names, target.unit_tensors, strict=True))
    return Plan({}, masks, {LAYER_TARGET: torch.tensor([0])}, shapes, ("layer",), layers=layers)


@pytest.mark.parametrize("form", ["auto", "graph"])
@pytest.mark.parametrize("gone", [[0], [1]])
def test_an_inner_branch_goes_alone_and_with_the_outer_one(gone: list[int], form: str) -> None:
    model, x, graph = traced(nested)
    plan = layer_plan(graph, gone)
    small = sc.shrink(model, plan, x, form=form)
    assert info_of(small).verification.error == 0
    held = {n.split(".")[0] for n, _ in small.named_parameters()}
    assert ("b" in held, "a" in held) == (False, gone == [0])


@pytest.mark.parametrize("name", [n for n in FOUND if FOUND[n][1]])
@pytest.mark.parametrize("form", ["auto", "graph"])
def test_every_kind_of_branch(name: str, form: str) -> None:
    model, x, graph = traced(FOUND[name][0])
    plan = alone(graph) if graph.targets[LAYER_TARGET].n_units == 1 else layer_plan(graph, [0])
    small = sc.shrink(model, plan, x, form=form)
    other = torch.randn(5, 4, dtype=torch.float64)
    assert difference(masked_copy(model, plan), small, other) <= 1e-14
    assert not gone_tensors(plan) & set(dict(small.named_parameters()))


@pytest.mark.parametrize("name", ["resnet-basic", "convnext"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, inputs = CASES[name].build()
    plan = layer_plan(sc.trace(model, inputs), [0])
    small = sc.shrink(model, plan, inputs)
    sc.save(small, plan, tmp_path)
    again = sc.load(tmp_path, lambda: CASES[name].build()[0])
    assert difference(small, again, inputs) == 0
    read = load_plan(tmp_path)
    assert read.layers == plan.layers
    assert {n: m.tolist() for n, m in read.masks.items()} == {
        n: m.tolist() for n, m in plan.masks.items()
    }


def test_layers_and_channels_in_one_plan() -> None:
    model, inputs = wide("resnet-basic")
    graph = sc.trace(model, inputs)
    scores = sc.score(model, criterion="random", graph=graph, granularity=["layer", "structured"])
    for budget in (sc.Budget(params=0.4), sc.Budget(macs=0.4), sc.Budget(units=0.6)):
        counts = sc.allocate(scores, budget)
        plan = sc.select(scores, counts)
        assert plan.layers
        assert plan.kept
        assert set(plan.granularity) > {"layer"}
        for form in ("module", "graph"):
            small = sc.shrink(model, plan, inputs, form=form)
            left = sum(p.numel() for p in small.parameters()) / dense_cost(graph).params
            assert left == pytest.approx(counts.realised["params"], abs=1e-12)
            macs = dense_cost(sc.trace(small, inputs)).macs / dense_cost(graph).macs
            assert macs == pytest.approx(counts.realised["macs"], abs=1e-12)
            for quantity, amount in budget.sizes.items():
                assert counts.realised[quantity] <= amount


@pytest.mark.parametrize("quantity", ["units", "params", "macs"])
def test_budgets_of_layers_alone(quantity: str) -> None:
    model, inputs = wide("mlp-mixer")
    graph = sc.trace(model, inputs)
    scores = sc.score(model, criterion="l2_norm", graph=graph, granularity="layer")
    counts = sc.allocate(scores, sc.Budget(**{quantity: 0.8}))
    plan = sc.select(scores, counts)
    assert 0 < len(plan.layers) < 4
    assert counts.realised[quantity] <= 0.8
    assert plan.structural
    assert not plan.kept
    small = sc.shrink(model, plan, inputs)
    assert sc.slice_masks(plan) == {}
    assert sum(p.numel() for p in small.parameters()) == round(
        counts.realised["params"] * dense_cost(graph).params
    )


def test_a_later_plan_keeps_what_an_earlier_one_removed() -> None:
    model, inputs = wide("mlp-mixer")
    graph = sc.trace(model, inputs)
    first = layer_plan(graph, [1])
    scores = sc.score(
        model, criterion="l2_norm", graph=graph, granularity="structured", previous=first
    )
    plan = sc.select(scores, sc.allocate(scores, sc.Budget(units=0.7)), previous=first)
    assert plan.layers == first.layers
    small = sc.shrink(model, plan, inputs)
    assert info_of(small).verification.error <= 1e-12
    assert not gone_tensors(plan) & set(dict(small.named_parameters()))


def test_the_graph_form_trains_and_counts_no_batches_of_removed_norms() -> None:
    model, inputs = CASES["resnet-basic"].build()
    plan = layer_plan(sc.trace(model, inputs), [0])
    small = sc.shrink(model, plan, inputs, form="graph").train()
    out = small(inputs)
    out.sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert not any(n.startswith("layers.0.") for n in small.state_dict())
    assert any("num_batches_tracked" in n for n in small.state_dict())


def test_what_writes_to_the_sum_does_not_change_the_skip() -> None:
    def run(n: Block, x: Tensor) -> Tensor:
        y: Tensor = n.a(x)
        y += x
        z: Tensor = torch.relu_(y) + x
        return z

    torch.manual_seed(0)
    model = Block(run)
    randomise_(model).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    plan = alone(sc.trace(model, x))
    small = sc.shrink(model, plan, x, form="graph")
    h = model.inp(x)
    assert torch.allclose(small(x), model.out(h.relu() + h), atol=1e-14)


def test_a_module_that_does_something_else_is_refused() -> None:
    """The check behind the module form fails when a module that is needed is taken out."""
    model, inputs = CASES["resnet-basic"].build()
    plan = layer_plan(sc.trace(model, inputs), [0])
    paths = removable_modules(masked_copy(model, plan), plan, inputs)
    assert set(paths) == {f"layers.0.{n}" for n in ("conv1", "bn1", "conv2", "bn2")}
    right = {path: {"removed": n} for path, n in paths.items()}
    assert without_layers(model, plan, right, inputs)[1] == ()
    for wrong in ("layers.0", "layers.1.bn2", "layers.1.conv1"):
        with pytest.raises(SoundnessError, match="something else"):
            without_layers(model, plan, {**right, wrong: {"removed": 1}}, inputs)


def test_a_plan_that_another_use_needs_is_refused() -> None:
    """Parameters that do not make the branch zero: the sums stay, and so do their tensors."""
    model, x, graph = traced(FOUND["two in one"][0])
    plan = alone(graph)
    masks = {name: mask for name, mask in plan.masks.items() if name != "b.bias"}
    partial = Plan({}, masks, plan.removed, plan.shapes, plan.granularity, layers=plan.layers)
    for form in ("module", "graph"):
        with pytest.raises(SoundnessError):
            sc.shrink(model, partial, x, form=form)


def test_removed_returns_zeros_for_tensors_tuples_and_keywords() -> None:
    x = torch.ones(2, 3)
    assert Removed()(x).tolist() == [[0.0] * 3] * 2
    out = Removed(2)(hidden=x)
    assert out[0].sum() == 0
    assert out[1] is None


def test_products_of_zeros_that_are_left_are_noted() -> None:
    def run(n: Block, x: Tensor) -> Tensor:
        scores = torch.softmax(n.a(x) @ n.b(x).mT, dim=-1)
        y: Tensor = n.c(scores @ x)
        return x + y

    torch.manual_seed(0)
    model = Block(run)
    x = torch.randn(3, 4)
    small = sc.shrink(model, alone(sc.trace(model, x)), x)
    assert info_of(small).form == "module"
    (note,) = info_of(small).notes
    assert "still multiplies zeros" in note
    assert note.count("matmul") == 2
