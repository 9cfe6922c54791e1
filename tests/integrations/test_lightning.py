"""The Lightning callback: cuts like a loop written by hand, through checkpoints too."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from secateurs import Budget, Schedule, shrink
from secateurs.during import prune_during
from secateurs.errors import ConfigError

lightning = pytest.importorskip("lightning", reason="pip install 'secateurs[lightning]'")
from secateurs.integrations.lightning import Pruning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # Lightning's own, of many kinds

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
OPTIONS: dict[str, Any] = {
    "budget": Budget(params=0.4),
    "granularity": "weight",
    "criterion": "taylor",
    "schedule": Schedule("cubic", steps=3, every="1 epoch"),
    "batches": [(X, Y)],
    "loss_fn": F.cross_entropy,
}


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def trainer(callback: Any, folder: Path, epochs: int = 4, **options: Any) -> Any:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return lightning.Trainer(
        max_epochs=epochs, callbacks=[callback], default_root_dir=folder, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def by_hand(epochs: int = 4) -> nn.Module:
    model = Classifier()
    adamw = model.configure_optimizers()
    with prune_during(model.net, adamw, n_steps=4 * epochs, steps_per_epoch=4, **OPTIONS):
        for _ in range(epochs):
            for inputs, targets in loader():
                F.cross_entropy(model.net(inputs), targets).backward()  # type: ignore[no-untyped-call]
                adamw.step()
                adamw.zero_grad()
    return model


def test_cuts_like_a_loop_by_hand(tmp_path: Path) -> None:
    model, pruning = Classifier(), Pruning("net", **OPTIONS)
    trainer(pruning, tmp_path).fit(model, loader())
    wanted = by_hand().state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())
    assert pruning.plan is not None
    zeros = sum(int((p == 0).sum()) for p in model.net.parameters())
    assert zeros == pruning.plan.n_removed == 114 - int(0.4 * 114)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_units_can_be_removed_after_the_training(tmp_path: Path) -> None:
    pruning = Pruning("net", budget=Budget(units=4), criterion="l2_norm", example_inputs=X)
    model = Classifier()
    trainer(pruning, tmp_path).fit(model, loader())
    assert pruning.plan is not None
    small = shrink(model.net, pruning.plan, X)
    assert small.get_submodule("0").out_features == 4


def test_a_resumed_training_ends_the_same(tmp_path: Path) -> None:
    class Stop(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                raise RuntimeError("power cut")

    first = trainer(Pruning("net", **OPTIONS), tmp_path)
    first.callbacks.append(Stop())
    with pytest.raises(RuntimeError, match="power cut"):
        first.fit(Classifier(), loader())

    model, pruning = Classifier(), Pruning("net", **OPTIONS)
    trainer(pruning, tmp_path).fit(
        model, loader(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True
    )
    wanted = by_hand().state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())


def test_a_trainer_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give max_epochs or max_steps"):
        trainer(Pruning("net", **OPTIONS), tmp_path, epochs=-1).fit(Classifier(), loader())


def test_the_peer_renames_the_state_and_we_do_not(tmp_path: Path) -> None:
    """The peer is Lightning's own callback, while its training lasts."""
    from lightning.pytorch.callbacks import ModelPruning

    model = Classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = ModelPruning("l1_unstructured", amount=0.6, make_pruning_permanent=False)
        trainer(peer, tmp_path).fit(model, loader())
    assert "net.0.weight_orig" in model.state_dict()
    ours = Classifier()
    trainer(Pruning("net", **OPTIONS), tmp_path).fit(ours, loader())
    assert set(ours.state_dict()) == set(Classifier().state_dict())
