"""Replays give what full runs give, and refuse what they cannot know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.masks import named_tensors
from secateurs.scoring import score
from secateurs.sensitivities import runs, sensitivity
from secateurs.sensitivities.replay import CannotReplay, Recording, Replay
from secateurs.testing.nets import NETS, case
from secateurs.types import Graph, WeightTarget

ROOM = 2**24


class Chain(nn.Module):
    """Everything that memory can do: in place, views, constants, a skip that is written over."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.norm(self.a(x)))
        z = self.b(y)
        y += z  # the cut reaches what was made before it
        y = y.view(2, -1, 4).flatten(0, 1) * torch.tensor(0.5)
        out: Tensor = self.c(torch.cat([y, self.a(x).relu_()], 1))
        return out


def recorded(net: nn.Module, x: Tensor) -> Recording:
    recording = Recording(ROOM)
    with torch.no_grad(), recording:
        net(x)
    return recording


@pytest.mark.parametrize("name", ["a.weight", "b.weight", "norm.bias", "c.weight"])
def test_a_replay_is_a_run(name: str) -> None:
    torch.manual_seed(0)
    net, x = Chain().eval(), torch.randn(6, 4)
    recording, tensor = recorded(net, x), named_tensors(net)[name]
    with torch.no_grad():
        dense = net(x)
        replay = Replay(recording, [tensor])
        for _ in range(2):
            tensor.add_(0.5)
            with replay:
                again = net(x)
            replay.check_end()
            assert torch.equal(again, net(x))
            assert not torch.equal(again, dense)


def test_only_what_is_reached_is_computed_again() -> None:
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(5)]).eval()
    recording = recorded(net, torch.ones(2, 3))
    last = Replay(recording, [net.get_parameter("4.weight")])
    assert sum(last._again) < len(recording.steps) / 3
    with pytest.raises(CannotReplay, match="every operator is reached"):
        Replay(recording, net.parameters())


class Counts(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 3), nn.Linear(3, 3), how
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.a(x.relu())
        if self.how == "item":
            y = y * y.sum().item()
        elif self.how == "buffer":
            self.get_buffer("seen").add_(1)
        elif self.how == "longer" and self.calls > 1:
            y = y + 1
        elif self.how == "other":
            y = x.exp() * self.calls + y
        elif self.how == "shorter" and self.calls == 1:
            y = y.relu()
        out: Tensor = self.b(y)
        return out if self.how != "shorter" else y


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("item", "reads a changed value into Python"),
        ("buffer", "changes something that is older than itself"),
        ("longer", "calls aten.add"),
        ("other", "called with something else"),
        ("shorter", "calls .* where|shorter than"),
    ],
)
def test_a_run_that_cannot_be_foreseen_is_refused(how: str, message: str) -> None:
    net, x = Counts(how).eval(), torch.randn(2, 3)
    recording = recorded(net, x)

    def replayed() -> None:
        replay = Replay(recording, [net.a.weight])
        with replay:
            net(x)
        replay.check_end()

    with torch.no_grad(), pytest.raises(CannotReplay, match=message):
        replayed()


def test_a_run_that_is_too_large_is_not_recorded() -> None:
    net, x = Chain().eval(), torch.randn(6, 4)
    recording = Recording(100)
    with torch.no_grad(), recording:
        out = net(x)
    assert not recording.complete
    assert recording.steps == []
    assert torch.equal(out, net(x))


@pytest.mark.parametrize("net", NETS)
def test_curves_are_the_same_with_and_without_replays(
    net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case(net)
    scores = score(made.model, graph=made.graph, criterion="magnitude")
    monkeypatch.setattr(runs, "RECORDED", 0)
    full = sensitivity(made.model, made.batches, made.loss_fn, scores=scores)
    monkeypatch.setattr(runs, "RECORDED", ROOM)
    monkeypatch.setattr(runs, "WORTH", float("inf"))  # whenever it is sound
    used: list[int] = []
    plain = Replay.check_end

    def check_end(self: Replay) -> None:
        used.append(1)
        plain(self)

    monkeypatch.setattr(Replay, "check_end", check_end)
    again = sensitivity(made.model, made.batches, made.loss_fn, scores=scores)
    assert again == full
    assert used or net == "heads"  # what is cut there is read by the first operator


def test_a_replay_that_gives_other_outputs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("mlp")
    scores = score(made.model, graph=made.graph, criterion="magnitude")
    monkeypatch.setattr(runs, "RECORDED", 0)
    full = sensitivity(made.model, made.batches, made.loss_fn, scores=scores)
    monkeypatch.setattr(runs, "RECORDED", ROOM)
    monkeypatch.setattr(runs, "WORTH", float("inf"))
    plain: Any = Replay.__torch_dispatch__

    def wrong(self: Replay, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = plain(self, func, types, args, kwargs)
        return out + 1 if self._next == len(self._steps) else out

    monkeypatch.setattr(Replay, "__torch_dispatch__", wrong)
    assert sensitivity(made.model, made.batches, made.loss_fn, scores=scores) == full


def test_a_model_that_changes_its_course_later_is_run_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first batch can be replayed; in the second the cut changes what the code does."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            if len(x) == 3 and not bool(y.all()):
                y = y * 2
            out: Tensor = self.b(y)
            return out

    torch.manual_seed(1)
    net = Forked().eval()
    graph = Graph({"b.weight": WeightTarget("b.weight", (2, 4)),
                   "a.weight": WeightTarget("a.weight", (4, 2))})  # fmt: skip
    batches = [(torch.randn(n, 2), torch.randint(2, (n,))) for n in (5, 3, 3, 5)]
    scores = score(net, graph=graph, criterion="magnitude", granularity="weight")
    loss = nn.functional.cross_entropy
    monkeypatch.setattr(runs, "RECORDED", 0)
    full = sensitivity(net, batches, loss, scores=scores)
    monkeypatch.setattr(runs, "RECORDED", ROOM)
    monkeypatch.setattr(runs, "WORTH", float("inf"))
    assert sensitivity(net, batches, loss, scores=scores) == full
