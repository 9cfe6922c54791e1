"""Retraining-free pruning from end to end."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateurs as sc
from secateurs.batches import batch_size
from secateurs.errors import BudgetError, ConfigError
from secateurs.masks import apply_masks_, check_masks
from secateurs.posttraining import fisher_search, reconstruct
from secateurs.posttraining.fisher_gates import any_output
from secateurs.posttraining.fisher_search import search_masks
from secateurs.posttraining.won import Won
from tests.posttraining.plans import same, tensors_of
from tests.posttraining.test_fisher_gates import CASES, texts, tiny


def test_every_step_is_reported_and_the_result_shrinks() -> None:
    net, batches = tiny(), texts(24)
    dense, x = copy.deepcopy(net), batches[0][0]
    graph = sc.trace(net, x)
    told: list[Won] = []
    found = search_masks(
        net, batches, functional.cross_entropy, graph=graph, budget=sc.Budget(macs=0.6),
        evaluate=lambda m: {"mean": float(m(x).mean())}, progress=told.append,
    )  # fmt: skip
    assert found.counts.realised["macs"] <= 0.6
    assert found.fisher.n_samples == 24
    assert tuple(told) == found.won
    assert found.won[0].what == "units cut"
    assert set(found.won[0].before) == {"outputs", "loss", "mean"}
    assert len(found.text().splitlines()) == len(found.won)
    for won, following in zip(found.won, found.won[1:], strict=False):
        assert following.before["loss"] == won.after["loss"]
        assert following.after["loss"] <= following.before["loss"]
    check_masks(net, found.plan.masks)
    small = sc.shrink(net, found.plan, x)
    sc.verify(net, small, found.plan, x)
    kept = {n: graph.targets[n].n_units - len(r) for n, r in found.plan.removed.items()}
    assert all(found.counts.kept[n] == k for n, k in kept.items())
    changed = {n for n, p in net.state_dict().items() if not torch.equal(p, dense.state_dict()[n])}
    assert changed <= {*found.plan.masks, *found.won[-1].changed}
    assert found.scales == {}


def test_scales_are_told() -> None:
    net, batches = tiny(), texts(24)
    graph = sc.trace(net, batches[0][0])
    found = search_masks(
        net, batches, functional.cross_entropy, graph=graph, budget=sc.Budget(macs=0.6),
        tune="scales",
    )  # fmt: skip
    assert found.won[-1].what == "kept units scaled"
    assert found.scales
    with pytest.raises(ConfigError, match="tune"):
        search_masks(
            net, batches, functional.cross_entropy, graph=graph, budget=sc.Budget(macs=0.6),
            tune="scale",  # type: ignore[arg-type]
        )  # fmt: skip


def test_the_plain_search_is_the_diagonal_and_nothing_else() -> None:
    net, batches = tiny(), texts(12)
    graph = sc.trace(net, batches[0][0])
    dense = copy.deepcopy(net)
    found = search_masks(
        net, batches, functional.cross_entropy, graph=graph, budget=sc.Budget(macs=0.6),
        rearrange=False, tune=None, n_samples=10,
    )  # fmt: skip
    assert len(found.won) == 1
    assert found.scales == {}
    assert found.won[0].samples == 10
    for name, gone in found.plan.removed.items():
        line = found.fisher.diagonal(name)
        stays = torch.ones(len(line), dtype=torch.bool)
        stays[gone] = False
        assert line[gone].max() <= line[stays].min()
    apply_masks_(dense, found.plan.masks)
    assert same(tensors_of(dense), tensors_of(net))


@pytest.mark.parametrize("name", ["encoder-pre-norm", "hf_bert", "hf_llama_gqa"])
def test_other_transformers(name: str) -> None:
    net, inputs = CASES[name].build()
    graph = sc.trace(net, inputs, outputs=CASES[name].outputs)
    n = batch_size(inputs)

    def loss(outputs: object, _: object) -> Tensor:
        logits = getattr(outputs, "logits", outputs)
        assert isinstance(logits, Tensor)
        return logits.logsumexp(-1).mean()

    found = search_masks(
        net, [(inputs, torch.zeros(n))], loss, graph=graph, budget=sc.Budget(macs=0.8),
        granularity=("head", "kv_group", "neuron"),
        importance=any_output(outputs=CASES[name].outputs),
    )  # fmt: skip
    assert found.counts.realised["macs"] <= 0.8
    assert found.plan.n_removed
    small = sc.shrink(net, found.plan, inputs)
    sc.verify(net, small, found.plan, inputs)
    assert len(set(found.notes)) == len(found.notes)


def test_channels_of_convolutions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 2),
    ).eval()  # fmt: skip
    x, y = torch.randn(16, 1, 6, 6), torch.arange(16) % 2
    graph = sc.trace(net, x)
    found = search_masks(
        net, [(x, y)], functional.cross_entropy, graph=graph, budget=sc.Budget(macs=0.4)
    )
    assert found.counts.realised["macs"] <= 0.4
    sc.verify(net, sc.shrink(net, found.plan, x), found.plan, x)


def test_a_step_that_loses_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = tiny(), texts(12)
    graph = sc.trace(net, batches[0][0])

    def spoils(model: nn.Module, *args: object, **kwargs: object) -> Won:
        won = reconstruct(model, *args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            dict(model.named_parameters())["head.weight"].mul_(-50.0)
        return replace(won, after={**won.after, "loss": 99.0})

    monkeypatch.setattr(fisher_search, "reconstruct", spoils)
    found = search_masks(
        net, batches, functional.cross_entropy, graph=graph, budget=sc.Budget(macs=0.6)
    )
    assert found.scales == {}
    assert "not taken, since the loss would be higher" in found.notes[-1]
    assert torch.equal(net.state_dict()["head.weight"], tiny().state_dict()["head.weight"])


def test_the_model_is_put_back_when_it_fails() -> None:
    net, batches = tiny(), texts(6)
    graph = sc.trace(net, batches[0][0])
    before = tensors_of(net)

    def stop(_: Won) -> None:
        raise KeyboardInterrupt

    for budget, progress, error in (
        (sc.Budget(macs=0.6), stop, KeyboardInterrupt),
        (sc.Budget(macs=0.01), None, BudgetError),
    ):
        with pytest.raises(error):
            search_masks(
                net, batches, functional.cross_entropy, graph=graph, budget=budget,
                progress=progress,
            )  # fmt: skip
        assert same(before, tensors_of(net))
    with pytest.raises(ConfigError, match="no structural targets"):
        search_masks(
            net, batches, functional.cross_entropy, graph=graph, budget=sc.Budget(macs=0.6),
            granularity="channel",
        )  # fmt: skip
