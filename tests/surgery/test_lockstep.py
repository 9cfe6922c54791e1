"""Node by node: which operator is at fault. Regions, free sizes, and one capture for many plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import secateurs as sc
from secateurs.errors import CaptureError, ConfigError, FileFormatError, SoundnessError
from secateurs.surgery.graph_form import Captures, PrunedGraph, graph_form
from secateurs.surgery.lockstep import first_fault
from secateurs.surgery.shrinking import info_of
from secateurs.surgery.sizes import other_sizes
from secateurs.surgery.verification import masked_copy
from secateurs.types import Plan
from tests.graph.nets import Net, gap, outputs, plan_of, randomized, rows, sequence


def branches(n: Any, x: Tensor) -> Tensor:
    h = F.relu(n.a(x))
    y: Tensor = n.c(n.b(h) + n.n(h))
    return y


@pytest.fixture
def made() -> tuple[nn.Module, Plan, Captures, PrunedGraph]:
    net = randomized(Net(branches, a=nn.Linear(6, 8), b=nn.Linear(8, 8), n=nn.LayerNorm(8),
                         c=nn.Linear(8, 4)))  # fmt: skip
    plan = plan_of(net, sc.trace(net, rows()))
    captures = Captures.of(net, rows())
    return net, plan, captures, graph_form(captures, plan)


Made = tuple[nn.Module, Plan, Captures, PrunedGraph]


def test_equal_graphs_have_no_fault(made: Made) -> None:
    net, plan, captures, small = made
    assert first_fault(captures, plan, small, rows()) is None
    found = sc.verify(net, small, plan, rows(), lockstep=True, captures=captures)
    assert found.ok
    assert not found.fault


def test_a_wrong_weight_is_named(made: Made) -> None:
    net, plan, captures, small = made
    with torch.no_grad():
        small.get_parameter("b.bias")[0] += 1
    found = first_fault(captures, plan, small, rows())
    assert found is not None
    assert found.node == "b_bias"
    message = r"First node at fault: b_bias, b\.bias: its values differ by"
    with pytest.raises(SoundnessError, match=message):
        sc.verify(net, small, plan, rows())


def test_a_wrong_node_is_named_with_its_module(made: Made) -> None:
    _, plan, captures, small = made
    graph = small.secateurs_captured.graphs["eval"]
    node = next(n for n in graph.nodes if "padded_layer_norm" in str(n.target))
    node.args = (*node.args[:-1], 5)  # of 8
    found = first_fault(captures, plan, small, rows())
    assert found is not None
    assert found.node == "layer_norm"
    assert found.where.startswith("layer_norm in n")
    assert "its values differ by" in found.text()


def test_a_node_that_does_not_run_is_named(made: Made) -> None:
    net, plan, captures, small = made
    graph = small.secateurs_captured.graphs["eval"]
    node = next(n for n in graph.nodes if "linear" in str(n.target))
    node.args = (node.args[0], node.args[1].args, *node.args[2:])
    found = first_fault(captures, plan, small, rows())
    assert found is not None
    assert found.node == "linear"
    assert "it does not run: " in found.what
    small.get_submodule("b").weight = nn.Parameter(torch.zeros(3, 5))
    message = r"First node at fault: b_weight, b\.weight: its shape is \(3, 5\)"
    with pytest.raises(SoundnessError, match=message):
        sc.verify(net, small, plan, rows(), captures=captures)


def test_one_capture_for_many_plans(made: Made) -> None:
    net, plan, captures, small = made
    before = {name: t.clone() for name, t in net.state_dict().items()}
    for units in (0.75, 0.25):
        other = plan_of(net, sc.trace(net, rows()), units)
        less = sc.shrink(net, other, rows(), form="graph", captures=captures)
        assert info_of(less).verification.ok
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    again = graph_form(captures, plan)
    assert gap(small, again, rows()) == 0
    assert again.get_parameter("a.weight") is not small.get_parameter("a.weight")


# -- regions ---------------------------------------------------------------------------------


def regions(n: Any, x: Tensor) -> Tensor:
    h = n.a(x)
    with torch.no_grad():
        y = n.b(h).view(-1, 2, 4).flatten(1) * 2
    z = checkpoint(n.d, h + y, use_reentrant=False)
    with torch.autocast("cpu", torch.bfloat16):
        w = n.e(z).reshape(-1, 8)
    out: Tensor = n.c(w.float())
    return out


def test_regions_are_rewritten_inside_and_kept(tmp_path: Path) -> None:
    net = randomized(Net(regions, a=nn.Linear(6, 8), b=nn.Linear(8, 8), d=nn.Linear(8, 8),
                         e=nn.Linear(8, 8), c=nn.Linear(8, 4)))  # fmt: skip
    graph = sc.trace(net, rows())
    plan = plan_of(net, graph)
    small = sc.shrink(net, plan, rows(), form="graph")
    info = info_of(small)
    assert info.verification.ok
    assert isinstance(small, PrunedGraph)
    assert "_assert" not in str(small.secateurs_captured.graphs["eval"])
    small(rows()).sum().backward()
    assert small.get_parameter("b.weight").grad is None  # no_grad stays
    assert small.get_parameter("a.weight").grad is not None
    assert list(small.state_dict()) == list(net.state_dict())
    sc.save(small, plan, tmp_path / "out")
    loaded = sc.load(tmp_path / "out")
    assert torch.equal(outputs(small, rows())[0], outputs(loaded, rows())[0])
    assert list(loaded.state_dict()) == list(small.state_dict())
    loaded.train()(rows()).sum().backward()
    assert loaded.get_parameter("b.weight").grad is None


def test_an_operator_without_portable_form_is_named(tmp_path: Path) -> None:
    torch.library.define("secateurs_test::twice", "(Tensor x) -> Tensor", tags=torch.Tag.pointwise)
    torch.library.impl("secateurs_test::twice", "CompositeImplicitAutograd", lambda x: 2 * x)
    net = randomized(Net(lambda n, x: n.c(torch.ops.secateurs_test.twice(n.a(x))),
                         a=nn.Linear(6, 8), c=nn.Linear(8, 4)))  # fmt: skip
    plan = plan_of(net, sc.trace(net, rows()), 0.5) if sc.trace(net, rows()).units else None
    assert plan is not None
    small = sc.shrink(net, plan, rows(), form="graph")
    with pytest.raises(FileFormatError, match=r"operator secateurs_test\.twice\.default"):
        sc.save(small, plan, tmp_path / "out")


# -- sizes -----------------------------------------------------------------------------------


def test_lengths_are_free_where_the_model_lets_them() -> None:
    net = randomized(Net(
        lambda n, ids: n.h(n.m(n.e(ids), n.e(ids), n.e(ids), need_weights=False)[0]),
        e=nn.Embedding(11, 8), m=nn.MultiheadAttention(8, 2, batch_first=True), h=nn.Linear(8, 3),
    ))  # fmt: skip
    ids = torch.randint(0, 11, (2, 6))
    plan = plan_of(net, sc.trace(net, ids))
    small = sc.shrink(net, plan, ids, form="graph")
    assert info_of(small).notes == ()
    masked = masked_copy(net, plan)
    for shape in ((1, 6), (5, 6), (2, 9), (3, 4)):
        assert gap(masked, small, torch.randint(0, 11, shape)) < 1e-6


def test_code_that_depends_on_a_length_is_said() -> None:
    net = Net(
        lambda n, x: n.h(n.a(x) * (2.0 if x.shape[1] > 4 else 1.0)), a=nn.Linear(4, 8),
        h=nn.Linear(8, 3),
    )  # fmt: skip
    plan = plan_of(net, sc.trace(randomized(net), sequence()))
    captures = Captures.of(net, sequence())
    small = graph_form(captures, plan)
    notes = other_sizes(masked_copy(net, plan), small, captures)
    assert len(notes) == 1
    assert "with 4 steps instead of 5" in notes[0]


def hidden_too(n: Any, h: Tensor) -> dict[str, Tensor]:
    return {"y": n.c(h), "hidden": h, "aside": h[:, :4] + h[:, 4:]}


def test_named_outputs_are_compared_and_others_may_shrink() -> None:
    net = randomized(Net(
        lambda n, x: hidden_too(n, F.relu(n.a(x))), a=nn.Linear(6, 8), c=nn.Linear(8, 4)
    ))  # fmt: skip
    assert not sc.trace(net, rows()).units
    graph = sc.trace(net, rows(), outputs=["y"])
    plan = plan_of(net, graph)
    small = sc.shrink(net, plan, rows(), form="graph")
    assert small(rows())["hidden"].shape == (3, 4)  # on the way to y
    assert small(rows())["aside"] is None
    assert "outputs that were not named" in info_of(small).notes[-1]
    assert info_of(small).verification.error < 1e-6
    with torch.no_grad():
        small.get_parameter("c.bias")[0] += 1
    with pytest.raises(SoundnessError, match="c_bias"):
        sc.verify(net, small, plan, rows())
    with pytest.raises(CaptureError):
        Captures.of(net, sequence())


def test_a_lockstep_of_a_module_form_is_refused(made: Made) -> None:
    net, plan, _, _ = made
    small = sc.shrink(net, plan, rows(), form="module")
    with pytest.raises(ConfigError, match="compares the nodes of a graph form, and this is a"):
        sc.verify(net, small, plan, rows(), lockstep=True)
