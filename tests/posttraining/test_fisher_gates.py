"""Derivatives of unit gates for each sample, against a loop that scales the units one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateurs as sc
from secateurs.batches import batch_size
from secateurs.errors import ConfigError, ScoringError
from secateurs.posttraining.fisher_gates import (
    GateFisher,
    any_output,
    first_samples,
    gate_fisher,
)
from secateurs.statistics.units import one_sample
from secateurs.tasks.models import TextTransformer
from secateurs.types import Graph, GroupTarget
from tests.zoo import huggingface, transformers

CASES = {c.name: c for c in [*transformers.CASES, *huggingface.CASES]}


def tiny() -> nn.Module:
    """Two layers of two heads and four neurons, in float64."""
    torch.manual_seed(0)
    net = TextTransformer(12, 5, width=8, heads=2, hidden=4, layers=2, dropout=0.1)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net.double().eval()


def texts(n: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of three samples, the last one smaller."""
    draw = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(1, 12, (n, 5), generator=draw), torch.arange(n) % 2
    return list(zip(torch.split(ids, 3), torch.split(labels, 3), strict=True))


def removed(graph: Graph, target: GroupTarget, unit: int, factor: float) -> dict[str, Tensor]:
    """Tensor name -> factors of what makes the value of a unit: outermost producers."""
    shapes = graph.detail.shapes
    found: dict[str, Tensor] = {}
    for m in target.members:
        if m.role == "producer" and m.outermost and m.learned:
            line = torch.ones(shapes[m.tensor][m.dim], dtype=torch.float64)
            line[torch.from_numpy(m.index[m.unit == unit])] = factor
            shape = [1] * len(shapes[m.tensor])
            shape[m.dim] = -1
            found[m.tensor] = line.view(shape)
    return found


def loss_with(net: nn.Module, factors: dict[str, Tensor], inputs: Tensor, label: Tensor) -> float:
    scaled = {n: p * factors[n].to(p) for n, p in net.named_parameters() if n in factors}
    out = torch.func.functional_call(net, scaled, (inputs,))
    return float(functional.cross_entropy(out, label).detach())


def test_gates_equal_differences_of_the_loss_of_each_sample() -> None:
    net, batches, h = tiny(), texts(5), 1e-5
    graph = sc.trace(net, batches[0][0])
    targets = graph.groups()
    fisher = gate_fisher(net, batches, functional.cross_entropy, targets)
    assert fisher.n_samples == 5
    assert fisher.notes == ()
    for target in targets:
        for unit in range(target.n_units):
            expected = [
                (
                    loss_with(
                        net, removed(graph, target, unit, 1 + h), ids[i : i + 1], y[i : i + 1]
                    )
                    - loss_with(
                        net, removed(graph, target, unit, 1 - h), ids[i : i + 1], y[i : i + 1]
                    )
                )
                / (2 * h)
                for ids, y in batches
                for i in range(len(y))
            ]
            wanted = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(
                fisher.rows[target.name][:, unit], wanted, atol=1e-8, rtol=1e-6
            )


def test_diagonal_block_and_what_is_lost_agree() -> None:
    rows = torch.tensor([[1.0, 2.0, -1.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    fisher = GateFisher({"fc": rows})
    block = fisher.block("fc")
    assert block.tolist() == [[0.5, 1.0, -0.5], [1.0, 6.5, 0.5], [-0.5, 0.5, 1.0]]
    assert fisher.diagonal("fc").tolist() == [0.5, 6.5, 1.0]
    gone = torch.tensor([True, False, True])
    assert fisher.lost("fc", gone) == float(gone.double() @ block @ gone.double()) == 0.5


@pytest.mark.parametrize("name", ["encoder-post-norm", "hf_bert", "hf_llama_gqa", "hf_gpt2"])
def test_one_backward_pass_for_all_equals_one_for_each_sample(name: str) -> None:
    net, inputs = CASES[name].build()
    graph = sc.trace(net, inputs, outputs=CASES[name].outputs)
    targets = graph.groups()

    def loss(outputs: object, _: object) -> Tensor:
        logits = getattr(outputs, "logits", outputs)
        assert isinstance(logits, Tensor)
        return logits.square().flatten(1).mean(1).mean()

    n = batch_size(inputs)
    fisher = gate_fisher(net, [(inputs, torch.zeros(n))], loss, targets)
    for i in range(n):
        one, _ = one_sample((inputs, torch.zeros(n)), i, n)
        alone = gate_fisher(net, [(one, torch.zeros(1))], loss, targets)
        for target in targets:
            got, want = fisher.rows[target.name][i], alone.rows[target.name][0]
            torch.testing.assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=1e-4)


def test_attention_of_the_framework_is_done_sample_by_sample_and_says_so() -> None:
    net, inputs = CASES["encoder-pre-norm"].build()
    assert isinstance(inputs, Tensor)
    graph = sc.trace(net, inputs)
    batches = [(inputs, torch.zeros(len(inputs), dtype=torch.int64))]
    heads = graph.groups("head")
    fisher = gate_fisher(net, batches, functional.cross_entropy, heads)
    assert len(fisher.notes) == 2
    assert "one backward pass for each sample" in fisher.notes[0]
    # A head's contribution through its value projection: the derivative of a loop over weights.
    member = next(m for m in heads[0].members if "in_proj_weight" in m.tensor)
    weight = dict(net.named_parameters())[member.tensor]
    assert fisher.rows[heads[0].name].shape == (len(inputs), heads[0].n_units)
    assert weight.grad is None
    assert all(p.requires_grad for p in net.parameters())


def test_the_model_comes_back_as_it_was() -> None:
    net, batches = tiny().train(), texts(4)
    graph = sc.trace(net, batches[0][0])
    before = {n: p.clone() for n, p in net.state_dict().items()}
    state = torch.random.get_rng_state()
    gate_fisher(net, batches, functional.cross_entropy, graph.groups())
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
    assert net.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_directions_of_any_output_give_the_squared_derivatives_of_all_outputs() -> None:
    jacobian = torch.tensor([[1.0, -2.0], [0.5, 3.0], [2.0, 0.0]])  # outputs, units
    n, wanted = 100_000, jacobian.T @ jacobian
    gate = torch.ones(n, 2, requires_grad=True)
    (g,) = torch.autograd.grad(any_output(1, centered=False)(gate @ jacobian.T, None) * n, gate)
    # (a s)^2 (b s)^2 is 3d / (d + 2) |a|^2 |b|^2 at most, on average over directions s of length
    # sqrt(d), here d = 3: five standard errors, entry by entry. Largest 0.28, of an entry of 13.
    norms = jacobian.norm(dim=0)
    bound = 5 * (9 / 5 / n) ** 0.5 * torch.outer(norms, norms)
    assert ((g.T @ g / n - wanted).abs() < bound).all()
    assert (bound < wanted.abs()).all()  # so that zero in place of any entry is found out


def test_of_two_logits_every_sample_tells_the_difference() -> None:
    gate = torch.ones(20, 1, requires_grad=True)
    logits = torch.cat([3.0 * gate, -1.0 * gate], 1)  # the difference is 4 times the gate
    (grad,) = torch.autograd.grad(any_output()(logits, None) * 20, gate)
    torch.testing.assert_close(grad.abs(), torch.full((20, 1), 4.0 / 2**0.5))
    (alone,) = torch.autograd.grad(any_output(centered=False)(2.0 * gate[:, 0], None) * 20, gate)
    assert (alone.abs() == 2.0).all()


def test_any_output_does_not_see_what_a_softmax_does_not_see() -> None:
    x = torch.tensor([[1.0, 4.0]])
    first, second = (any_output(3)(x + shift, None) for shift in (0.0, 100.0))
    assert torch.allclose(first, second, atol=1e-4)
    parts = {"logits": x, "states": torch.ones(1, 3)}
    assert torch.equal(any_output(3, outputs=["logits"])(parts, None), first)
    with pytest.raises(ScoringError, match="no floating-point tensor"):
        any_output()(torch.tensor([1]), None)


def test_the_last_batch_is_cut() -> None:
    held = first_samples(texts(8), 5, torch.device("cpu"))
    assert [len(y) for _, y in held] == [3, 2]
    with pytest.raises(ConfigError, match="n_samples must be a whole number, at least 1, got 0"):
        first_samples(texts(2), 0, torch.device("cpu"))


def _constant(out: Tensor, _: Tensor) -> Tensor:
    return out.sum() * 0.0


def _wild(out: Tensor, _: Tensor) -> Tensor:
    return torch.sqrt((out * 0.0).abs()).sum()  # zero, with an infinite derivative


@pytest.mark.parametrize(
    ("loss", "message"), [(_constant, "depends on any unit"), (_wild, "is not finite")]
)
def test_losses_without_a_derivative(
    loss: Callable[[Tensor, Tensor], Tensor], message: str
) -> None:
    net, batches = tiny(), texts(2)
    graph = sc.trace(net, batches[0][0])
    with pytest.raises(ScoringError, match=message):
        gate_fisher(net, batches, loss, graph.groups())
    with pytest.raises(ConfigError, match="no structural targets"):
        gate_fisher(net, batches, loss, [])
