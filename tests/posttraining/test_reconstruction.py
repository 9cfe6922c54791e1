"""Least squares on the inputs that are left, against numpy on stored activations."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateurs import shrink
from secateurs.errors import ConfigError, ScoringError
from secateurs.graph import trace
from secateurs.masks import apply_masks_
from secateurs.posttraining import (
    compensate_bias,
    prune_layerwise,
    recalibrate_norms,
    reconstruct,
)
from secateurs.posttraining.inputs import passes, quiet, watch_calls
from secateurs.posttraining.layers import Call, Layer, flat, layers_of, product
from secateurs.posttraining.reconstruction import solve_rows
from secateurs.selection import select
from secateurs.testing.nets import NETS, case
from secateurs.types import Batch, Budget, Counts, Plan, Scores
from tests.posttraining.plans import Mixed, random_plan, same, tensors_of

RIDGE = 1e-3


def stored(model: nn.Module, layer: Layer, x: Any, count: int = 1) -> tuple[Tensor, Tensor]:
    """(groups, rows, in) inputs and (rows, out) outputs of a layer, all in memory."""
    rows: list[Tensor] = []
    made: list[Tensor] = []
    held = dict(model.named_parameters(remove_duplicate=False))

    def look(_: str, call: Call) -> None:
        bias = None if layer.bias is None else layer.line(held[layer.bias])
        rows.extend(layer.rows(call))
        weight = layer.matrix(held[layer.weight])
        made.extend(flat(product(r, weight, bias)) for r in layer.rows(call))

    with quiet(model):
        watch_calls(model, x, {layer.path: count}, look)
    return torch.cat(rows, 1), torch.cat(made).detach()


def textbook(
    weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor, free: Tensor, ridge: float
) -> Tensor:
    """(out, in [+ 1]) new weights by numpy least squares, one row after the other.

    The ridge becomes rows of its own: sqrt(ridge d) (w' - w) = 0.
    """
    ones = torch.ones(len(x), 1).to(x)
    wide = (x if bias is None else torch.cat([x, ones], 1)).numpy()
    old = (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).numpy()
    sizes = np.square(x.numpy()).sum(0)
    new = np.zeros_like(old)
    for row in range(len(old)):
        columns = free[row].nonzero().reshape(-1).numpy()
        mine = columns[columns < len(sizes)]
        level = np.sqrt(ridge * sizes[mine].sum() / max(1, len(mine)))
        pull = np.diag([0.0 if c == weight.shape[1] else level for c in columns])
        a = np.concatenate([wide[:, columns], pull])
        b = np.concatenate([y[:, row].numpy(), pull @ old[row, columns]])
        new[row, columns] = np.linalg.lstsq(a, b, rcond=None)[0]
    return torch.from_numpy(new)


def slow(model: nn.Module, dense: nn.Module, plan: Plan, batches: list[Batch]) -> nn.Module:
    """The repair with everything in memory, layer after layer in the order of their calls."""
    x = torch.cat([b for b, _ in batches])
    apply_masks_(model, plan.masks)
    order = passes(model, layers_of(model), [(x, None)])
    held = dict(model.named_parameters(remove_duplicate=False))
    for layer in (one for group in order.groups for one in group):
        mask = layer.matrix(plan.masks.get(layer.weight, torch.ones_like(held[layer.weight]) > 0))
        if not (~mask & mask.any(2, keepdim=True)).any():
            continue
        free = mask
        if layer.bias is not None:
            all_ = torch.ones_like(held[layer.bias]) > 0
            line = layer.line(plan.masks.get(layer.bias, all_))
            free = torch.cat([mask, line[:, :, None]], 2)
        reads = dense if layer.loop else model  # states of its own change with its weights
        inputs, _ = stored(reads, layer, x, order.calls[layer.path])
        _, wanted = stored(dense, layer, x, order.calls[layer.path])
        targets = wanted.view(len(wanted), layer.groups, -1)
        weight = layer.matrix(held[layer.weight].detach())
        bias = None if layer.bias is None else layer.line(held[layer.bias].detach())
        new = torch.stack(
            [
                textbook(
                    weight[g],
                    None if bias is None else bias[g],
                    inputs[g],
                    targets[:, g],
                    free[g],
                    RIDGE,
                )
                for g in range(layer.groups)
            ]
        )
        with torch.no_grad():
            layer.place(held[layer.weight], new[:, :, : weight.shape[2]])
            if layer.bias is not None:
                layer.place_line(held[layer.bias], new[:, :, -1])
    return model


def more(net: str) -> tuple[nn.Module, list[Batch], Plan]:
    """A network with more samples than the tests of other rooms have."""
    draw = torch.Generator().manual_seed(1)
    if net == "mixed":
        torch.manual_seed(0)
        model: nn.Module = Mixed().double()
        x = torch.randn(20, 2, 5, 5, generator=draw).double()
        plan = random_plan(trace(model, x[:2]), 0.6)
    else:
        held = case(net)
        model, plan = held.model, random_plan(held.graph, 0.6)
        shape = (20, *NETS[net].shape)
        if NETS[net].tokens:
            x = torch.randint(NETS[net].tokens, shape, generator=draw)
        else:
            x = torch.randn(shape, generator=draw).double()
    return model, [(x[:9], None), (x[9:19], None), (x[19:], None)], plan


@pytest.mark.parametrize("net", ["mlp", "cnn", "mixed", "transformer", "heads", "recurrent"])
def test_the_streamed_repair_is_least_squares_in_the_textbook(net: str) -> None:
    dense, batches, plan = more(net)
    model = copy.deepcopy(dense)
    won = reconstruct(model, dense, plan, batches, ridge=RIDGE)
    wanted = tensors_of(slow(copy.deepcopy(dense), dense, plan, batches))
    found = tensors_of(model)
    for name in won.changed:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-7, rtol=1e-7)
    assert len(won.changed) >= 2
    assert same({**found, **{n: wanted[n] for n in won.changed}}, wanted)
    assert won.after["error"] < won.before["error"]
    for name, mask in plan.masks.items():
        assert not found[name][~mask].any()


def test_the_report_of_a_layer_is_its_true_error() -> None:
    dense, batches, plan = more("mlp")
    model, x = copy.deepcopy(dense), torch.cat([b for b, _ in batches])
    won = reconstruct(model, dense, plan, batches, ridge=RIDGE)
    (last,) = [layer for layer in layers_of(dense) if layer.path == "c"]
    (_, y), (_, now) = stored(dense, last, x), stored(model, last, x)
    true = float((y - now).norm() / y.norm())
    assert won.notes[-1].startswith("c.weight: error ")
    assert won.notes[-1].endswith(f"-> {true:.4f}")
    assert won.after["outputs"] == pytest.approx(true)


def test_masked_weights_stay_masked_in_each_row_of_its_own() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    batches: list[Batch] = [(torch.randn(30, 6).double(), None)]
    masks = {n: torch.rand_like(p) > 0.5 for n, p in dense.named_parameters() if p.dim() > 1}
    plan = Plan({}, masks, {}, {n: tuple(m.shape) for n, m in masks.items()})
    model, wanted = copy.deepcopy(dense), slow(copy.deepcopy(dense), dense, plan, batches)
    reconstruct(model, dense, masks, batches, ridge=RIDGE)
    for name, found in tensors_of(model).items():
        torch.testing.assert_close(found, tensors_of(wanted)[name], atol=1e-8, rtol=1e-8)
        if name in masks:
            assert not found[~masks[name]].any()


def test_redundant_units_are_made_up_for_completely() -> None:
    """Twins: the second half of the hidden units repeats the first, and is cut."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        for p in (dense.get_parameter("0.weight"), dense.get_parameter("0.bias")):
            p[4:] = p[:4]
    keep = torch.arange(8) < 4
    masks = {
        "0.weight": keep[:, None].expand(8, 3),
        "0.bias": keep,
        "2.weight": keep[None].expand(2, 8),
    }
    x = torch.randn(40, 3).double()
    model = copy.deepcopy(dense)
    won = reconstruct(model, dense, masks, [(x, None)], ridge=1e-10)
    torch.testing.assert_close(model(x), dense(x), atol=1e-6, rtol=1e-6)
    assert won.before["outputs"] > 0.1
    assert won.after["outputs"] < 1e-6


def test_all_layers_may_answer_for_those_before_them() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    dense = dense.double()
    x = torch.randn(60, 4).double()
    plan = random_plan(trace(dense, x[:2]).only("0"), 0.5)
    some, every = copy.deepcopy(dense), copy.deepcopy(dense)
    first = reconstruct(some, dense, plan, [(x, None)])
    second = reconstruct(every, dense, plan, [(x, None)], layers="all")
    assert first.changed == ("2.weight", "2.bias")
    assert set(second.changed) == {n for n, _ in dense.named_parameters()}
    assert second.after["outputs"] < first.after["outputs"] < first.before["outputs"]


@pytest.mark.parametrize("net", ["mlp", "cnn", "recurrent", "mixed"])
def test_the_smaller_model_gets_the_same_repair(net: str) -> None:
    dense, batches, plan = more(net)
    small = shrink(dense, plan, batches[0][0][:2], form="module")
    masked = copy.deepcopy(dense)
    for model in (small, masked):
        reconstruct(model, dense, plan, batches, ridge=RIDGE)
    for x, _ in batches:
        torch.testing.assert_close(small.eval()(x), masked.eval()(x), atol=1e-6, rtol=1e-6)


def test_a_graph_form_is_told_to_be_repaired_before() -> None:
    dense, batches, plan = more("mlp")
    small = shrink(dense, plan, batches[0][0], form="graph")
    with pytest.raises(ConfigError, match="repair before shrink"):
        reconstruct(small, dense, plan, batches)


def test_an_encoder_layer_of_torch_in_eval_mode() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3)
    ).double()
    dense.eval()
    x = torch.randn(10, 5, 8).double()
    columns = torch.arange(8) < 4  # one of two heads, and half of the feed-forward
    inner = torch.arange(12) < 6
    masks = {
        "0.self_attn.out_proj.weight": columns[None].expand(8, 8),
        "0.linear2.weight": inner[None].expand(8, 12),
        "0.linear1.weight": inner[:, None].expand(12, 8),
        "0.linear1.bias": inner,
    }
    model = copy.deepcopy(dense)
    won = reconstruct(model, dense, masks, [(x[:6], None), (x[6:], None)])
    changed = {n.rpartition(".")[0] for n in won.changed}
    assert changed == {"0.self_attn.out_proj", "0.linear2"}
    assert won.after["outputs"] < 0.9 * won.before["outputs"]


def test_a_tiny_bert() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    dense: nn.Module = BertModel(config, add_pooling_layer=False)
    dense.eval()
    ids = torch.randint(20, (24, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    graph = trace(dense, inputs)
    plan = random_plan(graph.only(["*:neuron", "*:head"]), 0.5)
    model = copy.deepcopy(dense)
    won = reconstruct(model, dense, plan, [(inputs, None)])
    assert len(won.changed) == 8  # two layers: weight and bias behind heads and behind neurons
    assert won.after["outputs"] < won.before["outputs"]
    assert won.after["error"] < won.before["error"]


class Tied(nn.Module):
    """A table that is used again to score the words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.table(ids)))
        return out


def test_a_tied_weight_is_left_and_told_of() -> None:
    dense = Tied()
    masks = {"table.weight": (torch.arange(4) < 2)[None].expand(7, 4)}
    masks["head.weight"] = masks["table.weight"]
    with pytest.raises(ConfigError, match=r"head.weight: tied to table.weight"):
        reconstruct(copy.deepcopy(dense), dense, masks, [(torch.arange(7)[:, None], None)])


def test_parameters_that_no_layer_reads_are_told_of() -> None:
    held = case("experts")
    plan = random_plan(held.graph)
    model = copy.deepcopy(held.model)
    with pytest.raises(ConfigError, match="up: the inputs that a Experts multiplies"):
        reconstruct(model, held.model, plan, held.batches)


def test_siblings_share_one_pass_and_others_do_not() -> None:
    held = case("heads")
    order = passes(held.model, layers_of(held.model), held.batches)
    paths = [[layer.path for layer in group] for group in order.groups]
    assert paths == [["q", "k", "v"], ["o"], ["head"]]
    assert order.calls == {"q": 1, "k": 1, "v": 1, "o": 1, "head": 1}


def test_changes_in_place_part_siblings() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            x.relu_()
            out: Tensor = y + self.b(x)
            return out

    model = InPlace()
    order = passes(model, layers_of(model), [(torch.randn(3, 2), None)])
    assert [len(group) for group in order.groups] == [1, 1]


class Louder(nn.Linear):
    """Not only a product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_module_that_does_more_than_its_product_is_left_and_told_of() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(3, 4), Louder(4, 4), nn.Linear(4, 2))
    masks = {f"{i}.weight": torch.rand(n, 4) > 0.5 for i, n in ((1, 4), (2, 2))}
    model = copy.deepcopy(dense)
    won = reconstruct(model, dense, masks, [(torch.randn(20, 3), None)])
    assert "1.weight: its module does more than multiply and add, left" in won.notes
    assert set(won.changed) == {"2.weight", "2.bias"}


def test_shuffled_batches_leave_the_random_state_alone() -> None:
    dense, batches, plan = more("cnn")
    x = torch.cat([b for b, _ in batches])
    data = torch.utils.data.TensorDataset(x, torch.zeros(len(x)))
    loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True)
    state = torch.random.get_rng_state()
    reconstruct(copy.deepcopy(dense), dense, plan, loader)
    compensate_bias(copy.deepcopy(dense), dense, plan, loader)
    recalibrate_norms(copy.deepcopy(dense), loader)
    prune_layerwise(copy.deepcopy(dense), loader, density=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_solving_rows_with_nothing_free_and_dead_inputs() -> None:
    gram = torch.zeros(3, 3).double()
    gram[2, 2] = 4.0  # dead inputs and a bias, four rows
    cross = torch.tensor([[0.0, 0.0, 8.0], [0.0, 0.0, 8.0]]).double()
    free = torch.tensor([[True, True, True], [False, False, False]])
    change = solve_rows(gram, cross, free, 1e-4, bias=True)
    assert change.tolist() == [[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]


def test_too_few_rows_are_told_of_and_bad_options_refused() -> None:
    dense, batches, plan = more("mlp")
    won = reconstruct(copy.deepcopy(dense), dense, plan, [(batches[0][0][:3], None)])
    assert "3 rows for 9 inputs: take more data" in won.notes[0]
    with pytest.raises(ConfigError, match="ridge must be above 0"):
        reconstruct(copy.deepcopy(dense), dense, plan, batches, ridge=0.0)
    with pytest.raises(ConfigError, match="Did you mean 'all'"):
        reconstruct(copy.deepcopy(dense), dense, plan, batches, layers="al")  # type: ignore[arg-type]


def test_whatever_fails_the_model_is_as_before() -> None:
    dense, batches, plan = more("cnn")
    model = copy.deepcopy(dense).train()
    before = tensors_of(model)
    bad = [*batches, (torch.full((2, 2, 5, 5), float("nan")).double(), None)]
    with pytest.raises(ScoringError, match="not finite"):
        reconstruct(model, dense, plan, bad)
    assert same(tensors_of(model), before)
    state, origin = torch.random.get_rng_state(), tensors_of(dense)
    reconstruct(model, dense, plan, batches)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(tensors_of(dense), origin)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_what_is_left_answers_for_a_layer_that_went_whole() -> None:
    held = case("transformer")
    (target,) = held.graph.groups("layer")
    scores = Scores(held.graph, {target.name: torch.arange(2.0)}, "by hand")
    plan = select(scores, Counts({target.name: 1}, Budget(units=0.5)))
    model = copy.deepcopy(held.model)
    with pytest.raises(ConfigError, match='layers="all" takes those'):
        reconstruct(model, held.model, plan, held.batches)
    won = reconstruct(model, held.model, plan, held.batches, layers="all")
    assert won.after["outputs"] < 0.5 * won.before["outputs"]
    for name, mask in plan.masks.items():
        assert not tensors_of(model)[name][~mask].any()


def test_float32_sums_are_good_enough() -> None:
    dense, batches, plan = more("mlp")
    wide, narrow = copy.deepcopy(dense), copy.deepcopy(dense).float()
    reconstruct(wide, dense, plan, batches)
    few = [(x.float(), y) for x, y in batches]
    reconstruct(narrow, copy.deepcopy(dense).float(), plan, few)
    for x, _ in batches:
        torch.testing.assert_close(narrow(x.float()).double(), wide(x), atol=1e-3, rtol=1e-3)
