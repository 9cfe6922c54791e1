"""The graph form is a full citizen: it trains, copies, saves, takes any batch, is pruned again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.errors import SoundnessError
from secateurs.surgery.graph_form import PrunedGraph
from secateurs.surgery.rewriter import removed_atoms
from secateurs.surgery.shrinking import info_of
from secateurs.types import Plan
from tests.graph.nets import (
    Net,
    gap,
    image,
    outputs,
    plan_of,
    randomized,
    rows,
    sequence,
    shrunk,
    tolerable,
    traced,
)


def conv_net() -> nn.Module:
    """Batch norm, dropout, sizes written into the code, a constant, an unused layer."""
    return randomized(
        Net(
            lambda n, x: {
                "y": n.h(
                    n.drop(F.relu(n.bn(n.a(x)))).view(-1, 8, 36).mean(2) * torch.tensor(1.5)
                )
            },
            a=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), drop=nn.Dropout(0.2),
            h=nn.Linear(8, 4), unused=nn.Linear(2, 2),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, Plan, PrunedGraph]:
    model = conv_net()
    plan = plan_of(model, sc.trace(model, image()))
    small = sc.shrink(model, plan, image())
    assert isinstance(small, PrunedGraph)
    return model, plan, small


Made = tuple[nn.Module, Plan, PrunedGraph]


def test_why_the_graph_form(made: Made) -> None:
    info = info_of(made[2])
    assert info.form == "graph"
    assert len(info.notes) == 1
    assert "module form does not work here" in info.notes[0]


def test_state_dict_and_modes(made: Made) -> None:
    model, _, small = made
    assert list(small.state_dict()) == list(model.state_dict())
    assert small.get_parameter("a.weight").shape == (4, 3, 3, 3)
    assert small.training is model.training


def test_any_batch_size(made: Made) -> None:
    model, plan, small = made
    masked = copy.deepcopy(model)
    sc.apply_masks_(masked, plan.masks)
    for batch in (1, 2, 7):
        assert gap(masked, small, image(batch)) < 1e-6


def test_a_deep_copy_is_independent(made: Made) -> None:
    small = made[2]
    twin = copy.deepcopy(small)
    assert gap(small, twin, image()) == 0
    with torch.no_grad():
        twin.get_parameter("a.weight").zero_()
    assert gap(small, twin, image()) > 0


def test_training(made: Made) -> None:
    small = copy.deepcopy(made[2]).train()
    x, target = image(8), torch.arange(8) % 4
    torch.manual_seed(0)
    first, second = small(x)["y"], small(x)["y"]
    assert not torch.equal(first, second)  # dropout draws
    before = {n: t.clone() for n, t in small.named_buffers()}
    optimizer = torch.optim.Adam(small.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(small(x)["y"], target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = dict(small.named_buffers())
    assert not torch.equal(before["bn.running_mean"], after["bn.running_mean"])
    assert after["bn.num_batches_tracked"] == before["bn.num_batches_tracked"] + 20
    small.eval()
    assert torch.equal(small(x)["y"], small(x)["y"])


def test_train_mode_has_its_own_constants() -> None:
    """Both captures call their first constant by the same name."""
    net = Net(
        lambda n, x: n.c(F.relu(n.a(x))) * torch.tensor(3.0 if n.training else 2.0),
        a=nn.Linear(6, 8), c=nn.Linear(8, 4),
    )  # fmt: skip
    plan = plan_of(net, traced(net, rows()))
    small, _ = shrunk(net, plan, rows(), "graph")
    ratio = small.train()(rows()) / small.eval()(rows())
    assert torch.allclose(ratio, torch.full_like(ratio, 1.5))
    assert list(small.state_dict()) == list(net.state_dict())


def test_a_train_mode_that_cannot_be_captured_is_said() -> None:
    net = Net(
        lambda n, x: n.c(F.relu(n.a(x))) * (float(x.sum()) if n.training else 1.0),
        a=nn.Linear(6, 8), c=nn.Linear(8, 4),
    )  # fmt: skip
    plan = plan_of(net, traced(net, rows()))
    small, info = shrunk(net, plan, rows(), "graph")
    assert info.notes[0].startswith("eval only, so dropout and batch norm rest in train mode: ")
    assert small.train()(rows()).shape == (3, 4)


def test_a_fixed_batch_size_is_said() -> None:
    net = Net(lambda n, x: n.c(n.a(x).view(3, 8)), a=nn.Linear(6, 8), c=nn.Linear(8, 4))
    plan = plan_of(net, traced(net, rows()))
    _, info = shrunk(net, plan, rows(), "graph")
    assert info.notes == ("the batch size is fixed to 3: it is written into the code",)
    _, info = shrunk(net, plan_of(net, traced(net, rows(3))), rows(3), "auto")
    assert info.form == "graph"
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    _, info = shrunk(plain, plan_of(plain, traced(plain, rows(1))), rows(1), "graph")
    assert "pass an example of two samples or more" in info.notes[0]


def test_awkward_names() -> None:
    net = Net(
        lambda n, x: n.captured(n.graphs(F.relu(n.get_submodule("0")(x)))) * n.forwards,
        captured=nn.Linear(8, 4), graphs=nn.Linear(8, 8),
        forwards=nn.Parameter(torch.ones(4)), **{"0": nn.Linear(6, 8)},
    )  # fmt: skip
    plan = plan_of(net, traced(net, rows()))
    small, info = shrunk(net, plan, rows(), "graph")
    assert tolerable(info.verification)
    assert set(small.state_dict()) == set(net.state_dict())


def test_a_non_persistent_buffer_stays_one() -> None:
    net = Net(lambda n, x: n.c(n.a(x) * n.scale), a=nn.Linear(6, 8), c=nn.Linear(8, 4))
    net.register_buffer("scale", torch.ones(8), persistent=False)
    plan = plan_of(net, traced(net, rows()))
    assert "scale" in plan.kept
    for form in ("module", "graph"):
        small, _ = shrunk(net, plan, rows(), form)
        assert "scale" not in small.state_dict()
        assert small.get_buffer("scale").shape == (4,)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_a_second_round(form: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2))
    plan = plan_of(net, traced(net, rows()))
    once, _ = shrunk(net, plan, rows(), form)
    again = plan_of(once, sc.trace(once, rows()))
    twice, info = shrunk(once, again, rows())
    assert tolerable(info.verification)
    assert twice.get_parameter("0.weight").shape == (2, 6)
    third, info = shrunk(once, again, rows(), "graph")
    assert gap(twice, third, rows()) < 1e-6
    sc.save(third, again, tmp_path / "third")
    assert gap(third, sc.load(tmp_path / "third"), rows()) == 0


def test_other_captures_see_it_as_a_module(made: Made) -> None:
    program = torch.export.export(made[2].eval(), (image(),), strict=False)
    assert torch.allclose(program.module()(image())["y"], outputs(made[2], image())[0])


def test_a_plan_that_cuts_a_unit_in_two_is_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = traced(net, rows())
    labels = graph.detail.labels
    with pytest.raises(SoundnessError, match="together with what depends on it"):
        removed_atoms(labels, {"0.weight": {0: torch.arange(4)}})
    both = {"2.weight": {0: torch.arange(1)}, "2.bias": {0: torch.arange(1)}}
    with pytest.raises(SoundnessError, match="left whole in this capture"):
        removed_atoms(labels, both)


def test_squeezing_a_dimension_that_shrank_to_one() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y: Tensor = net.c(net.a(x).mean((2, 3), keepdim=True).squeeze()).squeeze(1)
        return y

    net = Net(forward, a=nn.Conv2d(3, 8, 1), c=nn.Linear(8, 5))
    plan = plan_of(net, traced(net, image()), 0.01)
    small, info = shrunk(net, plan, image())
    assert small.get_parameter("a.weight").shape[0] == 1
    assert info.form == "graph"
    assert tolerable(info.verification)


def test_lstm_trains_in_graph_form() -> None:
    net = Net(lambda n, x: n.h(n.r(x)[0][:, -1]), r=nn.LSTM(4, 6, 2, batch_first=True, dropout=0.1),
              h=nn.Linear(6, 2))  # fmt: skip
    plan = plan_of(net, traced(net, sequence(6)))
    small, _ = shrunk(net, plan, sequence(6), "graph")
    small.train()
    optimizer = torch.optim.Adam(small.parameters(), lr=0.05)
    target = torch.arange(6) % 2
    torch.manual_seed(0)
    first = last = 0.0
    for step in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(small(sequence(6)), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        first, last = (loss.item(), 0.0) if step == 0 else (first, loss.item())
    assert last < 0.8 * first
