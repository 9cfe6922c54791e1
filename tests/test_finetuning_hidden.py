"""Hidden states: compared where the student has them, whether it is masked or shrunk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from secateurs import allocate, prune, score, select, shrink, trace
from secateurs.errors import ConfigError, DataError
from secateurs.finetuning import (
    Distillation,
    Finetune,
    distillation,
    finetune,
    hidden_loss,
    hidden_points,
)
from secateurs.masks import apply_masks_
from secateurs.schedules import Schedule
from secateurs.types import Budget, Graph, Plan

X = torch.linspace(-1, 1, 24).reshape(6, 4)
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


class Residual(nn.Module):
    """A convolution, a residual block with batch norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        out: Tensor = self.head(F.relu(y + self.block(y)).mean((2, 3)))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 2))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, X),
    "residual": (Residual, torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(1))),
    "recurrent": (Recurrent, X.reshape(2, 3, 4)),
    "encoder": (encoder, X.reshape(2, 3, 4)),
}


def has_heads(model: nn.Module) -> bool:
    return any(isinstance(m, nn.MultiheadAttention) for m in model.modules())


def cut(model: nn.Module, x: Tensor, share: float = 0.5) -> tuple[Graph, Plan]:
    """Half of all units but heads, which no module of PyTorch can have fewer of."""
    graph = trace(model, x).only(exclude="re::head$") if has_heads(model) else trace(model, x)
    scores = score(model, graph=graph, criterion="l2_norm")
    return graph, select(scores, allocate(scores, Budget(units=share), round_to=1))


@pytest.mark.parametrize("name", NETS)
def test_a_masked_and_a_shrunk_student_are_as_far_from_the_teacher(name: str) -> None:
    torch.manual_seed(2)
    build, x = NETS[name]
    teacher = build()
    graph, plan = cut(teacher, x)
    masked = copy.deepcopy(teacher)
    apply_masks_(masked, plan.masks)
    small = shrink(masked, plan, x, form="module")

    found = []
    for student in (masked, small):
        student.eval()
        with Distillation(
            teacher, student, weight=0.0, hidden=2.0, graph=graph, plan=plan
        ) as distill:
            objective = distill.objective(lambda out, _: out.sum() * 0.0, x)
            found.append(objective(student(x), None).item())
            assert len(distill.points) == len(hidden_points(graph))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    # What is left of the first family computes what the teacher computes; later ones differ, since
    # they read less. The encoder has one family that can be seen.
    assert (found[0] > 1e-4) == (name != "encoder")


def test_the_loss_by_hand_over_two_layers() -> None:
    teacher = mlp()
    graph, plan = cut(teacher, X)
    student = copy.deepcopy(teacher)
    apply_masks_(student, plan.masks)
    with torch.no_grad():  # kept units of the dense layers, relu of each
        first_t, first_s = teacher[:2](X), student[:2](X)
        second_t, second_s = teacher[:4](X), student[:4](X)
    wanted = 0.0
    for dense, pruned, producer in ((first_t, first_s, "0.bias"), (second_t, second_s, "2.bias")):
        kept = plan.masks[producer]
        away = (dense[:, kept] - pruned[:, kept]).square().sum() / dense[:, kept].square().sum()
        wanted += away.item() / 2
    with Distillation(teacher, student, weight=0.0, hidden=1.0, graph=graph, plan=plan) as distill:
        loss = distill.objective(lambda out, _: out.sum() * 0.0, X)(student(X), None)
    assert loss.item() == pytest.approx(wanted, abs=1e-6)


def test_outputs_and_hidden_states_and_task_are_mixed() -> None:
    teacher, student = mlp(), mlp()
    with torch.no_grad():
        student.get_parameter("4.weight").add_(0.5)
    graph = trace(teacher, X)

    def total(weight: float, hidden: float) -> float:
        with Distillation(teacher, student, weight=weight, hidden=hidden, graph=graph) as distill:
            return float(distill.objective(F.cross_entropy, X)(student(X), LABELS).item())

    task = F.cross_entropy(student(X), LABELS).item()
    assert total(weight=0.0, hidden=0.0) == pytest.approx(task)
    assert total(weight=0.0, hidden=3.0) == pytest.approx(task)  # the hidden layers are equal
    away = total(weight=1.0, hidden=0.0)
    assert away > 0
    assert total(weight=0.25, hidden=1.0) == pytest.approx(0.75 * task + 0.25 * away)


def test_training_brings_the_hidden_states_closer_and_leaves_the_teacher_alone() -> None:
    teacher = mlp()
    graph, plan = cut(teacher, X)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.5)
    before = copy.deepcopy(teacher.state_dict())
    config = Finetune(epochs=30, lr=0.02, hidden=1.0, hidden_at=("2",))
    teaching = distillation(teacher, config, graph=graph, plan=plan)
    done = finetune(
        student, [(X, LABELS)], lambda out, _: out.sum() * 0.0, config,
        masks=plan.masks, teacher=teaching,
    )  # fmt: skip
    assert done.history[-1].train_loss < 0.1 * done.history[0].train_loss
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_prune_maps_hidden_states_by_the_plan_of_each_cut() -> None:
    batches = [(X, LABELS), (X + 0.1, LABELS)]
    for schedule in (Schedule("linear", 2), Schedule("linear", 2, every="2 steps")):
        result = prune(
            mlp(), batches, F.cross_entropy, example_inputs=X, budget=Budget(units=0.5),
            criterion="l2_norm", schedule=schedule,
            finetune=Finetune(epochs=4, distill=0.5, hidden=1.0),
        )  # fmt: skip
        assert result.plan.n_removed >= 4


def test_a_new_plan_is_followed() -> None:
    teacher = mlp()
    graph, plan = cut(teacher, X)
    distill = Distillation(teacher, mlp(), hidden=1.0, graph=graph)
    assert not distill.points[0].removed
    distill.plan = plan
    assert distill.points[0].removed[1].tolist() == plan.removed["0:neuron"].tolist()


def test_a_wrong_map_is_found() -> None:
    """A loss that compares the wrong positions is not that of the shrunk student."""
    teacher = mlp()
    graph, plan = cut(teacher, X)
    point = hidden_points(graph, plan, at="2")[0]
    dense = teacher[:2](X).detach()
    kept = plan.masks["0.bias"]
    assert hidden_loss(dense[:, kept], dense, point).item() == 0
    assert hidden_loss(dense[:, ~kept], dense, point).item() > 0.01


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"hidden": 1.0}, "give graph=trace"),
        ({"hidden": -1.0}, "hidden at least 0"),
        ({"weight": 1.5}, r"weight in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"hidden": float("inf")}, "hidden at least 0"),
    ],
)
def test_bad_weights_are_refused(options: dict[str, float], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Distillation(mlp(), mlp(), **options)  # type: ignore[arg-type]


def test_other_requests_that_cannot_work() -> None:
    teacher = mlp()
    graph = trace(teacher, X)
    with pytest.raises(ConfigError, match="'layer9' fits no module that reads units; there are 2"):
        hidden_points(graph, at=["2", "layer9"])
    with (
        pytest.raises(ConfigError, match="student="),
        Distillation(teacher, hidden=1.0, graph=graph),
    ):
        pass
    with pytest.raises(ConfigError, match="hidden_at has no effect"):
        Finetune(hidden_at=("2",))
    config = Finetune(hidden=1.0)
    with pytest.raises(ConfigError, match="give graph=trace"):
        finetune(mlp(), [(X, LABELS)], F.cross_entropy, config, teacher=teacher)
    with pytest.raises(ConfigError, match="hidden=1 needs teacher"):
        finetune(mlp(), [(X, LABELS)], F.cross_entropy, config)
    other = distillation(teacher, Finetune(hidden=2.0), graph=graph)
    with pytest.raises(ConfigError, match="hidden=1 in Finetune and 2 in the distillation"):
        finetune(mlp(), [(X, LABELS)], F.cross_entropy, config, teacher=other)
    with (
        pytest.raises(ConfigError, match="no module '2'"),
        Distillation(teacher, nn.Linear(4, 2), hidden=1.0, graph=graph),
    ):
        pass


def test_a_graph_form_does_not_show_its_hidden_states() -> None:
    teacher = mlp()
    graph, plan = cut(teacher, X)
    student = shrink(teacher, plan, X, form="graph")
    with Distillation(teacher, student, hidden=1.0, graph=graph, plan=plan) as distill:
        objective = distill.objective(F.cross_entropy, X)
        with pytest.raises(DataError, match='shrink with form="module"'):
            objective(student(X), LABELS)


def test_a_student_of_another_size_is_refused() -> None:
    teacher = mlp()
    graph, plan = cut(teacher, X)
    small = shrink(teacher, plan, X, form="module")
    with Distillation(teacher, small, weight=0.0, hidden=1.0, graph=graph) as distill:  # no plan
        objective = distill.objective(lambda out, _: out.sum(), X)
        with pytest.raises(DataError, match=r"input of 2 is \(6, 3\) in the student"):
            objective(small(X), None)


def test_checkpointing_that_hides_the_gradient_is_named() -> None:
    class Rerun(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return self.net(x)  # type: ignore[no-any-return]
            out: Tensor = checkpoint(self.net, x.requires_grad_(), use_reentrant=True)
            return out

    teacher, student = Rerun().eval(), Rerun()
    with Distillation(teacher, student, weight=0.0, hidden=1.0, graph=trace(teacher, X)) as distill:
        objective = distill.objective(F.cross_entropy, X)
        with pytest.raises(ConfigError, match="use_reentrant=False"):
            objective(student(X.clone()), LABELS)


class Blocks(nn.Module):
    """A residual stream with blocks that can go whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)
        )
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


def test_nothing_is_compared_in_layers_that_are_gone() -> None:
    teacher = Blocks()
    graph = trace(teacher, X)
    scores = score(teacher, criterion="l2_norm", graph=graph, granularity="layer")
    plan = select(scores, allocate(scores, Budget(units=0.5)))
    assert plan.layers
    masked = copy.deepcopy(teacher)
    apply_masks_(masked, plan.masks)
    losses = []
    for student in (masked, shrink(teacher, plan, X, form="module")):
        with Distillation(
            teacher, student, weight=0.0, hidden=1.0, graph=graph, plan=plan
        ) as distill:
            objective = distill.objective(lambda out, _: 0 * out.sum(), X + 1)
            losses.append(objective(student(X + 1), None).item())
            assert not any(p.site.module.startswith(tuple(plan.layers)) for p in distill.points)
    assert losses[0] == pytest.approx(losses[1])
    with pytest.raises(ConfigError, match="removes every layer whose hidden states"):
        hidden_points(graph, plan, [f"{name}.*" for name in plan.layers])


def test_a_wrapped_student_is_seen_by_its_plain_names() -> None:
    teacher = mlp()
    graph, plan = cut(teacher, X)
    config = Finetune(epochs=2, distill=0.5, hidden=1.0)
    losses = []
    for wrap in (lambda m: m, nn.DataParallel):  # names as under DistributedDataParallel
        result = finetune(
            wrap(copy.deepcopy(teacher)), [(X, LABELS)], F.cross_entropy, config,
            masks=plan.masks, teacher=distillation(teacher, config, graph=graph, plan=plan),
        )  # fmt: skip
        losses.append(result.history[-1].train_loss)
    assert losses[0] == losses[1]


def test_units_that_cannot_be_seen_are_said() -> None:
    conv: Any = Conv1D
    net = nn.Sequential(conv(8, 4), nn.ReLU(), conv(6, 8), nn.ReLU(), nn.Linear(6, 2))
    graph = trace(net, torch.ones(1, 4))
    said = "0:neuron cannot be seen from outside, so only these are compared: input of 4"
    with pytest.warns(UserWarning, match=said):
        Distillation(net, hidden=1.0, graph=graph)
    Distillation(net, hidden=1.0, graph=graph, hidden_at="4")  # what was named is there
    Distillation(net, graph=graph)
