"""The callback for the `Trainer` of transformers, and a loop with Accelerate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from secateurs import Budget, Schedule, shrink
from secateurs.during import prune_during
from secateurs.errors import ConfigError

pytest.importorskip("accelerate", reason="pip install 'secateurs[huggingface]'")

from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from secateurs.integrations.transformers import Pruning, own_loss

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of transformers and accelerate

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(5, 30, (24, 6), generator=GENERATOR)
LABELS = (TOKENS[:, 0] > 17).long()
SCHEDULE = Schedule("cubic", steps=2, every="1 epoch")


def bert() -> nn.Module:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[i], "labels": LABELS[i]}


class InOrder(Trainer):
    """The samples in their order, so that a loop by hand can read them too."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(TOKENS)


def trainer(folder: Path, callback: Pruning, model: nn.Module, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=4, per_device_train_batch_size=8, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=0.01, logging_strategy="no",
        lr_scheduler_type="constant", weight_decay=0.1, save_strategy="epoch",
        **options,
    )  # fmt: skip
    return InOrder(model=model, args=arguments, train_dataset=Rows(), callbacks=[callback])


def test_heads_and_neurons_are_cut_and_removed(tmp_path: Path) -> None:
    model = bert()
    pruning = Pruning(budget=Budget(macs=0.6), criterion="taylor", schedule=SCHEDULE)
    trainer(tmp_path, pruning, model).train()
    plan = pruning.plan
    assert plan is not None
    assert set(plan.granularity) >= {"head", "neuron"}
    for name, mask in plan.masks.items():
        assert not dict(model.named_parameters())[name][~mask].any(), name
    small = shrink(model.eval(), plan, {"input_ids": TOKENS})
    got = small(input_ids=TOKENS).logits
    torch.testing.assert_close(got, model(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_resumed_training_ends_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "budget": Budget(params=0.3), "granularity": "weight", "criterion": "taylor",
        "schedule": Schedule("cubic", steps=3, every="1 epoch"),
    }  # fmt: skip
    whole = bert()
    trainer(tmp_path, Pruning(**options), whole).train()
    assert (tmp_path / "checkpoint-6" / "secateurs.state").is_file()
    again = bert()
    resumed = trainer(tmp_path, Pruning(**options), again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_gradient_accumulation_counts_steps_not_batches(tmp_path: Path) -> None:
    seen: list[int] = []
    pruning = Pruning(
        budget=Budget(units=0.5), criterion="l2_norm", schedule=SCHEDULE,
        told=lambda cuts: seen.append(cuts.steps),
    )  # fmt: skip
    trainer(tmp_path, pruning, bert(), gradient_accumulation_steps=2).train()
    assert seen == [0, 2]  # three batches are two steps


def test_a_checkpoint_without_cuts_is_refused(tmp_path: Path) -> None:
    plain = trainer(tmp_path, Pruning(budget=Budget(units=0.5), criterion="l2_norm"), bert())
    plain.pop_callback(Pruning)
    plain.train()
    pruning = Pruning(budget=Budget(units=0.5), criterion="l2_norm")
    with pytest.raises(ConfigError, match=r"holds no secateurs\.state"):
        trainer(tmp_path, pruning, bert()).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-6")
        )


def test_a_model_without_a_loss_of_its_own_needs_one() -> None:
    with pytest.raises(ConfigError, match="Give loss_fn="):
        own_loss({"logits": torch.ones(1)}, None)


def test_accelerate_needs_nothing_of_its_own(tmp_path: Path) -> None:
    """Prepared models and optimizers go in as they are; the cuts are one more thing to save."""
    from accelerate import Accelerator

    X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    Y = (X.sum(1) > 0).long()

    def train(
        epochs: int, folder: Path | None, start: int = 0, save_after: int = -1
    ) -> dict[str, Tensor]:
        torch.manual_seed(2)
        net: nn.Module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        loader = DataLoader(TensorDataset(X, Y), batch_size=8)
        model, optimizer, data = accelerator.prepare(net, adam, loader)
        with prune_during(
            model, optimizer, n_steps=8, steps_per_epoch=2, budget=Budget(params=0.4),
            granularity="weight", batches=[(X, Y)], loss_fn=F.cross_entropy,
            schedule=Schedule("cubic", steps=3, every="1 epoch"),
        ) as cuts:  # fmt: skip
            accelerator.register_for_checkpointing(cuts)
            if start:
                accelerator.load_state(str(folder))
            for epoch in range(start, epochs):
                for inputs, targets in data:
                    with accelerator.accumulate(model):
                        accelerator.backward(F.cross_entropy(model(inputs), targets))
                        optimizer.step()
                        optimizer.zero_grad()
                if epoch == save_after:
                    accelerator.save_state(str(folder))
        assert cuts.steps == 8
        accelerator.free_memory()
        return dict(net.state_dict())

    whole = train(4, tmp_path / "half", save_after=1)
    resumed = train(4, tmp_path / "half", start=2)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert sum(int((v == 0).sum()) for v in whole.values()) == 114 - int(0.4 * 114)


def begin(pruning: Pruning, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """As the `Trainer` does at the start of a training."""
    arguments: Any = SimpleNamespace(
        gradient_accumulation_steps=1, world_size=1, output_dir="", resume_from_checkpoint=None
    )
    state: Any = SimpleNamespace(max_steps=12, global_step=0)
    loader = DataLoader(Rows(), batch_size=8, shuffle=True)
    control: Any = None
    pruning.on_train_begin(
        arguments, state, control, model=model, optimizer=optimizer, train_dataloader=loader
    )


def test_the_batches_that_are_kept_do_not_change_those_that_are_read() -> None:
    model = bert()
    pruning = Pruning(2, budget=Budget(macs=0.6), criterion="taylor", schedule=SCHEDULE)
    before = torch.get_rng_state()
    begin(pruning, torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert torch.get_rng_state().equal(before)


def test_a_training_after_one_that_has_failed_begins_anew() -> None:
    model = bert()
    pruning = Pruning(2, budget=Budget(macs=0.6), criterion="taylor", schedule=SCHEDULE)
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    begin(pruning, first, model)
    assert first._optimizer_step_post_hooks
    begin(pruning, second, model)  # nobody has called on_train_end
    assert not first._optimizer_step_post_hooks
    assert second._optimizer_step_post_hooks


@pytest.mark.parametrize("n", [0, 1.5, True])
def test_a_wrong_number_of_batches_is_refused(n: Any) -> None:
    with pytest.raises(ConfigError, match="n_batches must be a whole number"):
        Pruning(n)
