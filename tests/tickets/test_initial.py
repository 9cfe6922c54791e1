"""Pruning before training against slow loops, and against the layer collapse of magnitude."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateurs.allocation import allocate
from secateurs.errors import BudgetError, ConfigError, DataError
from secateurs.masks import apply_masks_
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.testing.nets import case
from secateurs.tickets import METHODS, prune_at_init
from secateurs.tickets.initial import _windows
from secateurs.types import Batch, Budget, Graph
from tests.tickets.nets import data, graph_of, matrices, mlp

Saliency = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def slow(weights: Mapping[str, Tensor], keep: int, n: int, saliency: Saliency, back: bool
         ) -> dict[str, Tensor]:  # fmt: skip
    """The published loop: saliency of the masked network, the best stay, fewer every time."""
    masks = {name: torch.ones_like(w) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    for i in range(1, n + 1):
        found = saliency(weights, masks)
        flat = torch.cat([found[name].reshape(-1) for name in weights]).float()
        if not back:
            gone = torch.cat([masks[name].reshape(-1) for name in weights]) == 0
            flat[gone] = float("-inf")
        stay = keep if i == n else round(total * (keep / total) ** (i / n))
        best = torch.zeros(total, dtype=torch.float64)
        best[flat.argsort(descending=True, stable=True)[:stay]] = 1
        sizes = [w.numel() for w in weights.values()]
        pieces = torch.split(best, sizes)
        masks = {
            name: piece.reshape(w.shape)
            for (name, w), piece in zip(weights.items(), pieces, strict=True)
        }
    return {name: mask.bool() for name, mask in masks.items()}


def forward(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The networks of `mlp`, by hand."""
    *inner, last = weights.values()
    for w in inner:
        x = torch.relu(x @ w.T)
    return x @ last.T


def gradients(batches: list[Batch], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean cross-entropy over all samples."""
    leaves = {name: w.clone().requires_grad_(True) for name, w in weights.items()}
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    loss = functional.cross_entropy(forward(x, leaves), y)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


BATCHES = data(10, 5, 3, (4, 4, 2))


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return all(bool((found[name] == expected[name]).all()) for name in expected)


@pytest.mark.parametrize("iterations", [1, 7])
def test_snip_is_the_published_loop(iterations: int) -> None:
    model = mlp(5, 9, 8, 3)

    def saliency(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        now = {name: w * masks[name] for name, w in weights.items()}
        return {name: (now[name] * g).abs() for name, g in gradients(BATCHES, now).items()}

    plan = prune_at_init(
        model, BATCHES, functional.cross_entropy, budget=Budget(units=0.2), iterations=iterations,
        graph=graph_of(model, BATCHES[0][0]),
    )  # fmt: skip
    assert same(plan.masks, slow(matrices(model), 28, iterations, saliency, back=False))


def force_saliency(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given weights times the dense gradient of the masked network."""
    now = {name: w * masks[name] for name, w in weights.items()}
    return {name: (weights[name] * g).abs() for name, g in gradients(BATCHES, now).items()}


def test_force_is_the_published_loop_and_lets_weights_return() -> None:
    model = mlp(5, 9, 8, 3)
    graph = graph_of(model, BATCHES[0][0])
    plan = prune_at_init(
        model, BATCHES, functional.cross_entropy, budget=Budget(units=28), method="force",
        iterations=8, graph=graph,
    )  # fmt: skip
    weights = matrices(model)
    assert same(plan.masks, slow(weights, 28, 8, force_saliency, back=True))
    assert sum(int(mask.sum()) for mask in plan.masks.values()) == 28
    never = slow(weights, 28, 8, force_saliency, back=False)
    assert not same(plan.masks, never)


def synflow_saliency(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """|w| dR/d|w| / R for inputs of ones."""
    leaves = {n: (w * masks[n]).abs().requires_grad_(True) for n, w in weights.items()}
    total = forward(torch.ones(4, 5, dtype=torch.float64), leaves).sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    flow = [w.detach() * g / total.detach() for w, g in zip(leaves.values(), found, strict=True)]
    return dict(zip(leaves, flow, strict=True))


def test_synflow_is_the_published_loop() -> None:
    model = mlp(5, 9, 8, 3)
    plan = prune_at_init(
        model, budget=Budget(units=0.3), method="synflow", iterations=20,
        graph=graph_of(model, BATCHES[0][0]),
    )  # fmt: skip
    assert same(plan.masks, slow(matrices(model), 42, 20, synflow_saliency, back=False))
    assert METHODS["synflow"] == 100


def test_grasp_removes_the_largest_product_with_the_gradient_of_the_norm() -> None:
    model = mlp(5, 6, 3)
    weights = {n: w.requires_grad_(True) for n, w in matrices(model).items()}
    x, y = torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES])
    loss = functional.cross_entropy(forward(x, weights), y)
    grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    norm = torch.stack([(g * g).sum() for g in grads]).sum() / 2
    flow = torch.autograd.grad(norm, list(weights.values()))
    kept = torch.cat([(w * h).reshape(-1) for w, h in zip(weights.values(), flow, strict=True)])
    expected = torch.zeros(48, dtype=torch.bool)
    expected[kept.detach().argsort(descending=True)[:12]] = True
    plan = prune_at_init(
        model, BATCHES, functional.cross_entropy, budget=Budget(units=0.25), method="grasp",
        graph=graph_of(model, x),
    )  # fmt: skip
    assert torch.cat([plan.masks[n].reshape(-1) for n in weights]).equal(expected)


DEEP = [6, *[8] * 11, 4]


def reacts(model: nn.Module, plan_masks: Mapping[str, Tensor]) -> bool:
    """Whether the output of the masked network depends on its input at all."""
    apply_masks_(model, plan_masks)
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()  # a path must not be closed by a ReLU
        a, b = (model(x * torch.ones(1, 6, dtype=torch.float64)) for x in (1.0, 2.0))
    return not torch.equal(a, b)


def narrow() -> tuple[nn.Module, Graph]:
    """Deep and narrow, with layers of very different size of weights."""
    model = mlp(*DEEP)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.mul_(0.3 if i % 3 == 1 else 1.0)
    return model, graph_of(model, torch.ones(1, 6))


def test_magnitude_collapses_and_synflow_does_not() -> None:
    model, graph = narrow()
    scores = score(model, criterion="magnitude", graph=graph, granularity="weight")
    counts = allocate(scores, Budget(units=0.05), method="global")
    cut_off = [n for n, k in counts.kept.items() if k == 1]
    assert len(cut_off) >= 3  # held by min_keep alone
    assert not reacts(model, select(scores, counts).masks)

    model, graph = narrow()
    plan = prune_at_init(
        model, budget=Budget(units=0.05), method="synflow", graph=graph, iterations=50
    )
    assert sum(int(m.sum()) for m in plan.masks.values()) == int(0.05 * 720)
    assert not any("layer collapse" in reason for reason in plan.reasons.values())
    assert reacts(model, plan.masks)


class Branches(nn.Module):
    """Two layers side by side, one of which hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet = nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.loud(x) + 1e-6 * self.quiet(x)
        return out


def test_a_layer_that_would_be_empty_is_named() -> None:
    model = Branches().double()
    graph = graph_of(model, BATCHES[0][0])
    plan = prune_at_init(
        model, BATCHES, functional.cross_entropy, budget=Budget(units=6), graph=graph
    )
    assert [int(m.sum()) for m in plan.masks.values()] == [5, 1]
    assert "layer collapse" not in plan.reasons["loud.weight"]
    assert plan.reasons["quiet.weight"].endswith(
        "layer collapse: by its scores the layer would be empty, min_keep=1 leaves 1 of 15"
    )


def test_batch_norm_in_train_mode_exact_params_and_an_untouched_model() -> None:
    net = case("cnn")
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    dense = sum(p.numel() for p in net.model.parameters())
    for method in ("snip", "grasp", "force"):
        plan = prune_at_init(
            net.model, net.batches, net.loss_fn, budget=Budget(params=0.4), method=method,
            graph=net.graph, iterations=None if method == "grasp" else 3,
        )  # fmt: skip
        gone = sum(int((~mask).sum()) for mask in plan.masks.values())
        assert dense - gone == int(0.4 * dense)
    assert all(torch.equal(before[k], v) for k, v in net.model.state_dict().items())


def test_structure_can_be_pruned_before_training_too() -> None:
    net = case("mlp")
    plan = prune_at_init(
        net.model, net.batches, net.loss_fn, budget=Budget(params=0.5), iterations=3,
        granularity="structured", graph=net.graph,
    )  # fmt: skip
    assert plan.structural
    assert plan.granularity == ("neuron",)


def test_windows_of_batches_go_round() -> None:
    batches = data(6, 5, 3, (1, 2, 3))
    windows = _windows(batches, 2)
    sizes = [[len(y) for _, y in next(windows) or ()] for _ in range(4)]
    assert sizes == [[1, 2], [3, 1], [2, 3], [1, 2]]
    model = mlp(5, 9, 3)
    plan = prune_at_init(
        model, batches, functional.cross_entropy, budget=Budget(units=0.5), method="force",
        iterations=3, batches_per_iteration=2, graph=graph_of(model, batches[0][0]),
    )  # fmt: skip
    assert sum(int(m.sum()) for m in plan.masks.values()) == 36


def test_excluded_layers_stay_whole_and_the_model_is_traced() -> None:
    model = mlp(5, 9, 8, 3)
    plan = prune_at_init(
        model, BATCHES, functional.cross_entropy, budget=Budget(units=0.1), exclude="4"
    )
    assert set(plan.masks) == {"0.weight", "2.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "snap"}, "unknown method 'snap'. Did you mean 'snip'"),
        ({"iterations": 0}, "iterations must be a whole number"),
        ({"batches_per_iteration": 1.5}, "batches_per_iteration must be"),
        ({"method": "grasp", "iterations": 3}, "grasp is one cut"),
        ({"method": "force", "granularity": "neuron"}, "force judges single weights"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, object], message: str) -> None:
    model = mlp(5, 4, 3)
    with pytest.raises(ConfigError, match=message):
        prune_at_init(
            model, BATCHES, functional.cross_entropy, budget=Budget(units=0.5), **options  # type: ignore[arg-type]
        )  # fmt: skip


def test_errors_of_data_and_budget() -> None:
    model = mlp(5, 4, 3)
    with pytest.raises(ConfigError, match="give graph=, example_inputs= or batches"):
        prune_at_init(model, budget=Budget(units=0.5), method="synflow")
    with pytest.raises(DataError, match="only once"):
        prune_at_init(
            model, (b for b in BATCHES), functional.cross_entropy, budget=Budget(units=0.5)
        )
    with pytest.raises(BudgetError):
        prune_at_init(model, BATCHES, functional.cross_entropy, budget=Budget(units=1))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with pytest.raises(BudgetError, match="synflow, iteration 1 of 100: nothing flows"):
        prune_at_init(
            model, budget=Budget(units=0.5), method="synflow", example_inputs=BATCHES[0][0]
        )
