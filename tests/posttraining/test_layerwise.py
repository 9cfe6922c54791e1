"""Layer-wise pruning against a slow loop with explicit inverses, brute force, and the criteria."""

from __future__ import annotations

import copy
import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from secateurs import hold_masks, score
from secateurs.errors import ConfigError, ScoringError
from secateurs.graph import trace
from secateurs.masks import check_masks
from secateurs.posttraining import prune_layerwise
from secateurs.posttraining.choosing import sparsegpt, split, wanda_mask
from secateurs.posttraining.layerwise import prune_to_counts, whole_weights
from secateurs.testing.nets import case
from secateurs.types import Batch
from tests.posttraining.plans import Mixed, random_plan, same, tensors_of

METHODS: tuple[Literal["sparsegpt", "wanda", "magnitude"], ...] = (
    "sparsegpt",
    "wanda",
    "magnitude",
)


def slow(
    weight: Tensor, gram: Tensor, keep: list[int], block: int, damping: float
) -> tuple[Tensor, Tensor]:
    """SparseGPT as the paper derives it: column by column, the inverse of what is left made anew.

    Args:
        weight: (out, in).
        gram: (in, in).
        keep: how many weights stay in each block of columns.
    """
    n = len(gram)
    h = gram + damping * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(n)]
    w, mask = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for number, low in enumerate(range(0, n, block)):
        columns = range(low, min(low + block, n))
        ranked = sorted(
            (
                (float(w[r, j] ** 2 / inverses[j][0, 0]), r, j)
                for r in range(len(w))
                for j in columns
            ),
            reverse=True,
        )
        for _, r, j in ranked[: keep[number]]:
            mask[r, j] = True
        for j in columns:
            for r in range(len(w)):
                if not mask[r, j]:
                    step = w[r, j] / inverses[j][0, 0]
                    w[r, j:] -= step * inverses[j][0]
                    w[r, j] = 0.0
    return w, mask


def correlated(n: int, rows: int = 40, seed: int = 0) -> Tensor:
    """(rows, n) inputs that depend on each other."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=draw, dtype=torch.float64)
    return torch.randn(rows, n, generator=draw, dtype=torch.float64) @ mix


@pytest.mark.parametrize(("block", "keep"), [(7, [12]), (3, [6, 6, 1]), (1, [2] * 7)])
def test_sparsegpt_is_the_slow_loop(block: int, keep: list[int]) -> None:
    x = correlated(7)
    w = torch.randn(4, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = torch.ones(1, 4, 7, dtype=torch.bool)
    total = sum(keep)
    new, mask = sparsegpt(w[None], (x.T @ x)[None], whole, total, block=block, damping=0.01)
    sizes = [int(m.sum()) for m in torch.split(mask[0], block, 1)]
    wanted, right = slow(w, x.T @ x, sizes, block, 0.01)
    assert torch.equal(mask[0], right)
    torch.testing.assert_close(new[0], wanted, atol=1e-9, rtol=1e-9)
    assert int(mask.sum()) == total
    other, _ = slow(w, x.T @ x, sizes, block, 0.5)  # the checker fails on another damping
    assert (new[0] - other).abs().max() > 1e-3


def test_each_block_keeps_its_share_exactly() -> None:
    x = correlated(10)
    left = torch.rand(1, 6, 10, generator=torch.Generator().manual_seed(0)) > 0.3
    w = torch.randn(1, 6, 10, dtype=torch.float64).masked_fill(~left, 0)
    for keep in (0, 1, 7, 20, int(left.sum())):
        new, mask = sparsegpt(w, (x.T @ x)[None], left, keep, block=4, damping=0.01)
        assert int(mask.sum()) == keep
        assert not (mask & ~left).any()
        assert not new[~mask].any()
        for low in (0, 4, 8):
            share = keep * int(left[:, :, low : low + 4].sum()) / int(left.sum())
            assert abs(int(mask[:, :, low : low + 4].sum()) - share) <= 1


def test_one_removal_of_a_row_is_the_best_of_brute_force() -> None:
    """With the last column first in order, one weight goes: the best choice, the best answer."""
    x = correlated(4)
    h = x.T @ x
    w = torch.tensor([[0.1, 2.0, -1.5, 1.0]], dtype=torch.float64)
    new, mask = sparsegpt(w[None], h[None], torch.ones(1, 1, 4) > 0, 3, block=4, damping=1e-12)
    assert mask[0, 0].tolist() == [False, True, True, True]
    best = None
    for gone in itertools.combinations(range(4), 1):
        kept = [j for j in range(4) if j not in gone]
        answer = torch.linalg.lstsq(x[:, kept], x @ w[0]).solution
        loss = float((x[:, kept] @ answer - x @ w[0]).square().sum())
        best = min(best, (loss, gone, answer), key=lambda t: t[0]) if best else (loss, gone, answer)
    assert best is not None
    assert best[1] == (0,)
    torch.testing.assert_close(new[0, 0, 1:], best[2], atol=1e-6, rtol=1e-6)


def test_wanda_is_the_criterion_of_the_same_name_row_by_row() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.randn(12, 6).double()
    graph = trace(net, x)
    targets = torch.zeros(12, 3).double()
    loss = nn.functional.mse_loss
    scores = score(net, [(x, targets)], loss, criterion="wanda", granularity="weight", graph=graph)
    wanted = scores.values["0.weight"].view(5, 6)
    before = net.get_parameter("0.weight").detach().clone()
    plan, won = prune_layerwise(net, [(x[:7], None), (x[7:], None)], density=0.5, method="wanda")
    mask = plan.masks["0.weight"]
    assert mask.sum(1).tolist() == [3] * 5
    for row in range(5):
        assert set(mask[row].nonzero().view(-1).tolist()) == set(
            wanted[row].topk(3).indices.tolist()
        )
    assert torch.equal(net.get_parameter("0.weight")[mask], before[mask])  # no update
    assert won.before["error"] == 0.0 < won.after["error"]


def test_wanda_gives_what_rounding_leaves_to_the_best_next_weights() -> None:
    weight = torch.tensor([[[5.0, 4.0, 1.0], [9.0, 3.0, 2.0]]])
    whole = torch.ones(1, 2, 3) > 0
    mask = wanda_mask(weight, torch.eye(3)[None], whole, 3)  # one each, and 4 beats 3
    assert mask.tolist() == [[[True, True, False], [True, False, False]]]
    assert int(wanda_mask(weight, torch.eye(3)[None], whole, 6).sum()) == 6
    left = torch.tensor([[[True, False, False], [True, True, True]]])
    mask = wanda_mask(weight, torch.eye(3)[None], left, 3)  # shares 0.75 and 2.25
    assert mask.tolist() == [[[True, False, False], [True, True, False]]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", ["mlp", "cnn", "mixed", "transformer", "recurrent"])
def test_counts_are_exact_in_every_network(
    net: str, method: Literal["sparsegpt", "wanda", "magnitude"]
) -> None:
    if net == "mixed":
        torch.manual_seed(0)
        model: nn.Module = Mixed().double()
        batches: list[Batch] = [(torch.randn(6, 2, 5, 5).double(), None)]
    else:
        held = case(net)
        model, batches = held.model, held.batches
    before = tensors_of(model)
    plan, won = prune_layerwise(model, batches, density=0.4, method=method)
    layers = [n for n, p in model.named_parameters() if p.dim() > 1 and n != "table.weight"]
    assert set(plan.masks) == set(won.changed) == set(layers)
    for name, mask in plan.masks.items():
        assert int(mask.sum()) == round(0.4 * mask.numel())
        assert torch.equal(plan.removed[name], (~mask).view(-1).nonzero().view(-1))
    check_masks(model, plan.masks)
    now = tensors_of(model)
    for name in before.keys() - set(layers):
        assert torch.equal(now[name], before[name])
    if net == "transformer":
        assert "table.weight: no layer whose inputs can be seen; left whole" in won.notes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hold_masks(model, optimizer, plan.masks) as kept:
        kept.check()


def test_later_layers_see_what_earlier_ones_left() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x = torch.randn(30, 5).double()
    plan, _ = prune_layerwise(net, [(x[:11], None), (x[11:], None)], density=0.5, block=3)
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        for i in (0, 2):
            inputs = fresh[:i](x)
            weight = fresh.get_parameter(f"{i}.weight")
            sizes = [int(m.sum()) for m in torch.split(plan.masks[f"{i}.weight"], 3, 1)]
            new, mask = slow(weight.detach(), inputs.T @ inputs, sizes, 3, 0.01)
            assert torch.equal(mask, plan.masks[f"{i}.weight"])
            weight.copy_(new)
    for name, found in tensors_of(net).items():
        torch.testing.assert_close(found, tensors_of(fresh)[name], atol=1e-8, rtol=1e-8)


def test_sparsegpt_loses_less_than_wanda_and_that_less_than_magnitude() -> None:
    torch.manual_seed(0)
    scales = torch.linspace(0.1, 3, 20).double()
    x = correlated(20, 200) * scales
    net = nn.Sequential(nn.Linear(20, 10)).double()
    errors = {}
    for method in METHODS:
        _, won = prune_layerwise(copy.deepcopy(net), [(x, None)], density=0.5, method=method)
        errors[method] = won.after["error"]
        plain = won.notes[0].split("smallest weights: ")[1].rstrip(")")
    assert plain == f"{errors['magnitude']:.4f}"
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_removed_units_stay_removed_and_the_plan_goes_on() -> None:
    held = case("mlp")
    earlier = random_plan(held.graph)
    model = copy.deepcopy(held.model)
    plan, _ = prune_layerwise(model, held.batches, density=0.5, previous=earlier)
    for name in ("a.weight", "b.weight", "c.weight"):
        left = earlier.masks[name]
        assert int(plan.masks[name].sum()) == round(0.5 * int(left.sum()))
        assert not (plan.masks[name] & ~left).any()
    assert plan.kept == earlier.kept
    assert torch.equal(plan.removed["a:neuron"], earlier.removed["a:neuron"])
    assert plan.granularity == ("neuron", "weight")
    check_masks(model, plan.masks)


def test_layers_may_be_named_with_a_density_of_their_own() -> None:
    held = case("mlp")
    model = copy.deepcopy(held.model)
    plan, _ = prune_layerwise(model, held.batches, density={"a.weight": 0.25, "c.weight": 0.5})
    assert {n: int(m.sum()) for n, m in plan.masks.items()} == {"a.weight": 12, "c.weight": 10}
    plan, won = prune_layerwise(model, held.batches, density=0.25, exclude="c")
    assert set(plan.masks) == {"a.weight", "b.weight"}
    assert "c.weight: excluded by the user: c" in won.notes


def test_a_shared_projection_gets_one_mask() -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(3, 5, 4).double()
    plan, _ = prune_layerwise(net, [((x, x, x), None)], density=0.5)
    assert [int(m.sum()) for m in torch.split(plan.masks["in_proj_weight"], 4)] == [8, 8, 8]
    assert int(plan.masks["out_proj.weight"].sum()) == 8


def test_bad_options_are_refused_and_failures_change_nothing() -> None:
    held = case("mlp")
    before = tensors_of(held.model)
    with pytest.raises(ConfigError, match=r"density must be in \(0, 1\], got 50. Did you mean 0.5"):
        prune_layerwise(held.model, held.batches, density=50)
    with pytest.raises(ConfigError, match=r"Did you mean 'a.weight'"):
        prune_layerwise(held.model, held.batches, density={"a.weigth": 0.5})
    with pytest.raises(ConfigError, match="unknown method"):
        prune_layerwise(held.model, held.batches, density=0.5, method="obs")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="block must be a whole number, at least 1, got 0"):
        prune_layerwise(held.model, held.batches, density=0.5, block=0)
    bad = [*held.batches, (torch.full((1, 6), float("nan")).double(), None)]
    with pytest.raises(ScoringError, match="not finite"):
        prune_layerwise(held.model, bad, density=0.5)
    assert same(tensors_of(held.model), before)


def test_a_module_under_two_names_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.all = nn.Sequential(self.a, nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.all(x)
            return out

    plan, won = prune_layerwise(Twice(), [(torch.randn(20, 4), None)], density=0.5)
    assert {name: int(mask.sum()) for name, mask in plan.masks.items()} == {
        "a.weight": 8,
        "all.2.weight": 4,
    }
    assert not any("tied" in note for note in won.notes)


def test_why_nothing_is_left_to_prune() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(ConfigError, match=r"tied to 1\.weight"):
        prune_layerwise(net, [(torch.ones(2, 4), None)], density=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_tiny_layer_keeps_a_weight(
    method: Literal["sparsegpt", "wanda", "magnitude"],
) -> None:
    net, x = nn.Linear(4, 1, bias=False), torch.randn(8, 4)
    plan, _ = prune_layerwise(net, [(x, None)], density=0.1, method=method)  # 0.4 weights
    assert int(plan.masks["weight"].sum()) == 1
    assert int((net.weight != 0).sum()) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 23, 48])
def test_products_of_one_tensor_share_its_count(
    method: Literal["sparsegpt", "wanda", "magnitude"], count: int
) -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(9, 5, 4).double()
    out_before = net.out_proj.weight.detach().clone()
    plan, won = prune_to_counts(net, [((x, x, x), None)], {"in_proj_weight": count}, method=method)
    assert set(plan.masks) == set(won.changed) == {"in_proj_weight"}
    parts = [int(m.sum()) for m in torch.split(plan.masks["in_proj_weight"], 4)]
    assert sum(parts) == count
    assert max(parts) - min(parts) <= 1
    assert int((net.in_proj_weight != 0).sum()) == count
    assert torch.equal(net.out_proj.weight, out_before)


def test_shares_of_a_count() -> None:
    assert split(7, [4, 2, 1]) == [4, 2, 1]
    assert split(4, [100, 100, 1]) == [1, 2, 1]  # 1.99, 1.99, 0.02, and one at least
    assert split(2, [1, 1, 1]) == [1, 1, 0]
    assert split(0, [3, 0]) == [0, 0]
    assert split(3, [0, 3, 3]) == [0, 2, 1]
    with pytest.raises(ConfigError, match="7 weights cannot stay of 6"):
        split(7, [3, 3])


def test_counts_are_those_asked_or_an_error() -> None:
    held = case("mlp")
    model = copy.deepcopy(held.model)
    first, _ = prune_to_counts(model, held.batches, {"a.weight": 20}, why="budget units=0.5")
    assert first.reasons == {
        "a.weight": "28 of 48 weight units removed layer by layer: sparsegpt, budget units=0.5"
    }
    told: list[tuple[int, int]] = []
    second, _ = prune_to_counts(
        model, held.batches, {"a.weight": 11, "b.weight": 7}, previous=first,
        progress=lambda done, n: told.append((done, n)),
    )  # fmt: skip
    assert {n: int(m.sum()) for n, m in second.masks.items()} == {"a.weight": 11, "b.weight": 7}
    assert not (second.masks["a.weight"] & ~first.masks["a.weight"]).any()
    assert told == [(1, 2), (2, 2)]
    before = tensors_of(model)
    with pytest.raises(ConfigError, match="12 weights cannot stay of 11"):
        prune_to_counts(model, held.batches, {"a.weight": 12}, previous=second)
    with pytest.raises(ConfigError, match=r"Did you mean 'a.weight'"):
        prune_to_counts(model, held.batches, {"a.weigth": 12})
    assert same(tensors_of(model), before)


def test_a_layer_that_was_to_be_pruned_and_is_not_called() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    net, batches = Idle(), [(torch.randn(8, 4), None)]
    before = tensors_of(net)
    assert whole_weights(net, batches) == {
        "idle.weight": "its module is not called in the first batch"
    }
    assert same(tensors_of(net), before)
    with pytest.raises(
        ConfigError, match=r"exclude=.*\n  idle.weight: its module is not called in the first batch"
    ):
        prune_to_counts(net, batches, {"used.weight": 3, "idle.weight": 3})
    assert same(tensors_of(net), before)
    plan, _ = prune_layerwise(net, batches, density=0.5)
    assert set(plan.masks) == {"used.weight"}
    assert plan.reasons["used.weight"].endswith("layer by layer: sparsegpt, density 0.5")


class Looping(nn.Module):
    """Calls a layer once for small batches, three times for larger ones."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 if len(x) < 20 else 3):
            x = torch.relu(self.again(x))
        out: Tensor = self.last(x)
        return out


def test_all_calls_of_all_batches_count() -> None:
    """Also where a later batch calls a layer more often than the first."""
    torch.manual_seed(0)
    net = Looping().double()
    weight = net.again.weight.detach().clone()
    small, large = correlated(6, rows=12, seed=1), correlated(6, rows=30, seed=2)
    h, seen = large, [small, large]
    for _ in range(2):
        h = torch.relu(net.again(h)).detach()
        seen.append(h)
    gram = sum(x.T @ x for x in seen)
    assert isinstance(gram, Tensor)
    plan, _ = prune_layerwise(net, [(small, None), (large, None)], density={"again.weight": 0.5})
    new, mask = sparsegpt(
        weight[None], gram[None], torch.ones(1, 6, 6, dtype=torch.bool), 18, block=128, damping=0.01
    )
    assert plan.masks["again.weight"].equal(mask[0])
    torch.testing.assert_close(net.again.weight.detach(), new[0])


def test_what_a_cut_does_not_stand_on_is_said() -> None:
    net = nn.Linear(6, 4)
    few = prune_layerwise(copy.deepcopy(net), [(torch.randn(3, 6), None)], density=0.5)[1]
    assert "(3 rows for 6 inputs: take more data)" in " ".join(few.notes)
    enough = prune_layerwise(copy.deepcopy(net), [(torch.randn(9, 6), None)], density=0.5)[1]
    assert "take more data" not in " ".join(enough.notes)
    nothing = prune_layerwise(copy.deepcopy(net), [(torch.zeros(9, 6), None)], density=0.5)[1]
    assert "weight: its inputs are zero, cut by size only" in " ".join(nothing.notes)


def test_a_damping_that_is_too_small_is_one_clear_error() -> None:
    net = nn.Linear(6, 4)
    before = tensors_of(net)
    with pytest.raises(ScoringError, match=r"weight: its inputs say the same .* larger damping"):
        prune_layerwise(net, [(torch.ones(9, 6), None)], density=0.5, damping=1e-18)
    assert same(before, tensors_of(net))


def test_reasons_count_what_went_layer_by_layer() -> None:
    net, batches = nn.Linear(6, 4), [(torch.randn(9, 6), None)]
    first, _ = prune_layerwise(net, batches, density=0.5)
    second, _ = prune_layerwise(net, batches, density=0.5, previous=first)
    assert first.reasons["weight"].startswith("12 of 24 weight units removed")
    assert second.reasons["weight"].startswith("6 of 24 weight units removed")
