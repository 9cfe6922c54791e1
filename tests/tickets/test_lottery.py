"""Lottery tickets against a loop written out by hand, bit by bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.errors import ConfigError
from secateurs.finetuning import Finetune, snapshot
from secateurs.testing.nets import case
from secateurs.tickets import Ticket, find_ticket, train_ticket
from secateurs.types import Budget
from tests.tickets.nets import data, graph_of, mlp

BATCHES = data(20, 6, 3, (8, 8, 4))
SETTING = Finetune(epochs=4, optimizer="sgd", lr=0.3, momentum=0.9, lr_schedule="cosine")
N_STEPS = 12


def ticket_of(model: nn.Module, **options: Any) -> Ticket:
    """With what the hand-written loop does."""
    return find_ticket(
        model, BATCHES, functional.cross_entropy, train=SETTING, rounds=3, budget=Budget(units=20),
        graph=graph_of(model, BATCHES[0][0]), **options,
    )  # fmt: skip


def by_hand_steps(model: nn.Module, masks: list[Tensor], start: int, stop: int) -> None:
    """Momentum SGD with masks, from one step of the cosine to another."""
    params = [p for p in model.parameters() if p.dim() > 1]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    for step in range(start, stop):
        x, y = BATCHES[(step - start) % 3]
        sgd.param_groups[0]["lr"] = 0.3 * (0.5 * (1 + math.cos(math.pi * (step / N_STEPS))))
        sgd.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(x), y))
        for p, mask in zip(params, masks, strict=True):
            assert p.grad is not None
            p.grad.mul_(mask)
        sgd.step()


def by_hand(model: nn.Module, start: int, reset: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Iterative magnitude pruning with rewinding; masks and the state of the ticket."""
    params = [p for p in model.parameters() if p.dim() > 1]
    masks = [torch.ones_like(p) for p in params]
    total = sum(p.numel() for p in params)
    by_hand_steps(model, masks, 0, start)
    origin = copy.deepcopy(model.state_dict())
    for number in (1, 2, 3):
        by_hand_steps(model, masks, start, N_STEPS)
        size = torch.cat([(p.detach().abs() * m).reshape(-1) for p, m in
                          zip(params, masks, strict=True)])  # fmt: skip
        stay = 20 if number == 3 else round(total * (20 / total) ** (number / 3))
        limit = size.sort(descending=True).values[stay - 1]
        masks = [m * (p.detach().abs() >= limit) for p, m in zip(params, masks, strict=True)]
        if reset == "weights":
            model.load_state_dict(origin)
        with torch.no_grad():
            for p, m in zip(params, masks, strict=True):
                p.mul_(m)
    return masks, model.state_dict()


@pytest.mark.parametrize(
    ("rewind", "start", "reset"), [(0, 0, "weights"), (2, 2, "weights"), (0.25, 3, "lr")]
)
def test_it_is_the_published_loop(rewind: float, start: int, reset: str) -> None:
    model = mlp(6, 12, 8, 3, bias=True)
    ticket = ticket_of(model, rewind=rewind, reset=reset)
    masks, state = by_hand(copy.deepcopy(model), start, reset)
    assert ticket.start == start
    for found, expected in zip(ticket.masks.values(), masks, strict=True):
        assert torch.equal(found, expected.bool())
    for name, expected in state.items():
        assert torch.equal(ticket.state[name], expected), name
    assert sum(int(m.sum()) for m in ticket.masks.values()) == 20


def test_training_a_ticket_goes_on_from_its_step() -> None:
    model = mlp(6, 12, 8, 3, bias=True)
    ticket = ticket_of(model, rewind=2)
    other = copy.deepcopy(model)
    done = train_ticket(other, ticket, BATCHES, functional.cross_entropy, train=SETTING)
    expected = copy.deepcopy(model)
    masks, _ = by_hand(expected, 2, "weights")
    by_hand_steps(expected, masks, 2, N_STEPS)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(snapshot(other)[name], tensor), name
    assert done.steps == 10


def test_history_and_the_model_of_the_caller() -> None:
    model = mlp(6, 12, 8, 3, bias=True)
    before = snapshot(model)
    seen: list[tuple[str, int, int]] = []
    ticket = ticket_of(
        model, evaluate=lambda m: float(m(BATCHES[0][0]).sum().detach()),
        progress=lambda what, done, total: seen.append((what, done, total)),
    )  # fmt: skip
    assert [row.trained for row in ticket.history] == [192, 90, 43]
    assert [row.kept for row in ticket.history] == [90, 43, 20]
    assert all(row.metric is not None and row.steps == N_STEPS for row in ticket.history)
    assert all(torch.equal(before[n], t) for n, t in snapshot(model).items())
    assert len(seen) == 12
    assert seen[-1][0].startswith("round 3: epoch 4")
    assert seen[-1][1:] == (2, 3)


def test_buffers_are_rewound_and_structure_can_be_a_ticket() -> None:
    net = case("cnn")
    ticket = find_ticket(
        net.model, net.batches, net.loss_fn, train=Finetune(epochs=2), rounds=2, rewind=1,
        budget=Budget(units=0.5), criterion="l2_norm", granularity="channel", graph=net.graph,
    )  # fmt: skip
    assert ticket.plan.structural
    assert int(ticket.state["norm.num_batches_tracked"]) == 1 + int(
        net.model.state_dict()["norm.num_batches_tracked"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewind": -1}, "rewind must be a step"),
        ({"rewind": 1.0}, "rewind must be a step"),
        ({"rewind": True}, "rewind must be a step"),
        ({"rewind": 12}, "rewind=12 is step 12, and the training has 12"),
        ({"reset": "weight"}, "Did you mean 'weights'"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ticket_of(mlp(6, 4, 3), **options)


def test_a_ticket_of_another_model_and_batches_without_length() -> None:
    model = mlp(6, 12, 8, 3, bias=True)
    ticket = ticket_of(model)
    loss = functional.cross_entropy
    with pytest.raises(ConfigError, match="not of this model"):
        train_ticket(mlp(6, 12, 3, bias=True), ticket, BATCHES, loss, train=SETTING)

    class Endless:
        def __iter__(self) -> Any:
            return iter(BATCHES)

    with pytest.raises(ConfigError, match=r"rewind=0\.1 needs the number of steps"):
        find_ticket(
            model, Endless(), loss, train=Finetune(epochs=1), rounds=1, rewind=0.1,
            budget=Budget(units=0.5), graph=graph_of(model, BATCHES[0][0]),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="rounds must be"):
        find_ticket(model, BATCHES, loss, train=SETTING, rounds=0, budget=Budget(units=0.5))
