"""Norms measured again: the statistics of all data at once, whatever the batches were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, DataError, ScoringError
from secateurs.posttraining import recalibrate_norms
from secateurs.testing.nets import case
from secateurs.types import Batch
from tests.posttraining.plans import Mixed, random_plan, same, tensors_of


def together(batches: list[Batch]) -> Tensor:
    return torch.cat([x for x, _ in batches])


def by_training(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Population statistics from one train-mode run over all data: what each norm then sees."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str) -> object:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].movedim(1, -1).flatten(0, -2)
            seen[path] = rows.mean(0), rows.var(0, correction=0)

        return look

    trained = copy.deepcopy(model).train()
    for path, module in trained.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(hook(path))  # type: ignore[arg-type]
    with torch.no_grad():
        trained(x)
    return seen


@pytest.mark.parametrize("net", ["cnn", "mixed"])
def test_ragged_batches_give_what_one_batch_of_all_data_gives(net: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 2, 5, 5).double()
    model = Mixed().double() if net == "mixed" else case("cnn").model
    batches = [(x[:6], None), (x[6:9], None), (x[9:], None)]
    wanted = by_training(model, x)
    recalibrate_norms(model, batches)
    assert len(wanted) >= 2
    for path, (mean, variance) in wanted.items():
        norm = model.get_submodule(path)
        torch.testing.assert_close(norm.running_mean, mean, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(norm.running_var, variance, atol=1e-10, rtol=1e-10)


def test_a_pass_in_train_mode_would_depend_on_the_batches() -> None:
    """The checker fails on the usual way, an average over batches."""
    held = case("cnn")
    wanted = by_training(held.model, together(held.batches))
    usual = copy.deepcopy(held.model).train()
    for m in usual.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
    for x, _ in held.batches:
        usual(x)
    gap = usual.get_submodule("outer_norm").running_var - wanted["outer_norm"][1]  # type: ignore[operator]
    assert gap.abs().max() > 1e-3


def test_removed_channels_keep_zeros_and_the_rest_of_the_model_its_state() -> None:
    held = case("cnn")
    plan = random_plan(held.graph)
    model, before = held.model.train(), tensors_of(held.model)
    model.head.eval()  # type: ignore[union-attr]
    state = torch.random.get_rng_state()
    won = recalibrate_norms(model, held.batches, masks=plan, loss_fn=held.loss_fn)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.head.training  # type: ignore[union-attr]
    for name, mask in plan.masks.items():
        now = tensors_of(model)[name]
        assert not now[~mask].any()
        if "running" not in name:
            assert torch.equal(now[mask], before[name][mask])
    assert set(won.changed) == {n for n in before if "running" in n}
    assert won.samples == 10
    assert won.before["loss"] != won.after["loss"]
    assert all(p.grad is None for p in model.parameters())


def test_an_instance_norm_gets_the_mean_over_the_samples() -> None:
    x = torch.tensor([[[1.0, 3.0]], [[2.0, 10.0]]])  # two samples: means 2, 6; variances 1, 16
    norm = nn.InstanceNorm1d(1, track_running_stats=True)
    recalibrate_norms(nn.Sequential(norm), [(x[:1], None), (x[1:], None)])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.running_mean.item() == 4.0
    assert norm.running_var.item() == 8.5


class Twice(nn.Module):
    """One norm called twice, another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.idle = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.norm(x) + 10)
        return out


def test_a_norm_that_is_called_twice_or_never_is_told_of() -> None:
    model = Twice()
    won = recalibrate_norms(model, [(torch.tensor([[1.0], [3.0]]), None)])
    old = 1 / (1 + model.norm.eps) ** 0.5
    torch.testing.assert_close(model.norm.running_mean, torch.tensor([(2 + 10 + 2 * old) / 2]))
    assert "idle: never called" in won.notes[0]
    assert "called 2 times" in won.notes[1]
    assert model.idle.running_var.item() == 1.0  # type: ignore[union-attr]


def test_a_model_without_running_statistics_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave it away"):
        recalibrate_norms(nn.Sequential(nn.Linear(2, 2)), [(torch.ones(1, 2), None)])
    with pytest.raises(ConfigError, match="leave it away"):
        recalibrate_norms(nn.BatchNorm1d(2, track_running_stats=False), [(torch.ones(1, 2), None)])


def test_whatever_fails_the_model_is_as_before() -> None:
    held = case("cnn")
    before = tensors_of(held.model)
    bad = [*held.batches, (torch.full((2, 2, 5, 5), float("nan")).double(), held.batches[0][1][:2])]
    with pytest.raises(ScoringError, match="norm: activations are not finite"):
        recalibrate_norms(held.model, bad, masks=random_plan(held.graph))
    assert same(tensors_of(held.model), before)

    def fails(model: nn.Module) -> float:
        raise RuntimeError("no data")

    with pytest.raises(ScoringError, match="evaluate fails"):
        recalibrate_norms(held.model, held.batches, evaluate=fails)
    assert same(tensors_of(held.model), before)


def test_the_dense_model_may_be_compared_with() -> None:
    held = case("cnn")
    dense = copy.deepcopy(held.model)
    won = recalibrate_norms(
        held.model, held.batches, masks=random_plan(held.graph), dense=dense, max_batches=2
    )
    assert won.samples == 8
    assert 0 < won.before["outputs"] != won.after["outputs"]
    with pytest.raises(ConfigError, match="one object"):
        recalibrate_norms(held.model, held.batches, dense=held.model)
    with pytest.raises(ConfigError, match="max_batches"):
        recalibrate_norms(held.model, held.batches, max_batches=0)


def test_a_norm_that_no_sample_reaches_is_an_error() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.norm(x[:0])])

    net = Idle()
    with pytest.raises(DataError, match="norm: no sample reached"):
        recalibrate_norms(net, [(torch.ones(3, 2), None)])
    assert net.norm.running_mean is not None
    assert net.norm.running_mean.tolist() == [0.0, 0.0]
