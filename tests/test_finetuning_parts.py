"""Parts of a training: when they are called, and what they see then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, SoundnessError
from secateurs.finetuning import Finetune, Part, Training, finetune

BATCHES = [(torch.ones(2, 3), torch.zeros(2, 1)), (2 * torch.ones(1, 3), torch.ones(1, 1))]
MASK = {"weight": torch.tensor([[True, True, False]])}


class Witness(Part):
    """Writes down each call with the gradient or weight of the masked entry and one beside it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, list[bool]]] = []
        self.training: Training | None = None

    def start(self, training: Training) -> None:
        self.training = training
        self._note("start", -1, training.model.get_parameter("weight"))

    def begin(self, steps: int) -> None:
        self._note("begin", steps, None)

    def gradients(self, steps: int) -> None:
        assert self.training is not None
        self._note("gradients", steps, self.training.model.get_parameter("weight").grad)

    def stepped(self, steps: int) -> None:
        assert self.training is not None
        self._note("stepped", steps, self.training.model.get_parameter("weight"))

    def _note(self, call: str, steps: int, tensor: Tensor | None) -> None:
        zero = [] if tensor is None else (tensor == 0).reshape(-1).tolist()
        self.seen.append((call, steps, zero))


def test_a_part_is_called_around_every_step_and_sees_what_is_masked() -> None:
    torch.manual_seed(0)
    witness = Witness()
    loss = nn.functional.mse_loss
    config = Finetune(epochs=1, clip_norm=1e-3)
    finetune(nn.Linear(3, 1), BATCHES, loss, config, masks=MASK, parts=[witness])
    kept = [False, False, True]
    assert witness.seen == [
        ("start", -1, kept),
        ("begin", 0, []), ("gradients", 0, kept), ("stepped", 1, kept),
        ("begin", 1, []), ("gradients", 1, kept), ("stepped", 2, kept),
    ]  # fmt: skip
    assert witness.training is not None
    assert witness.training.n_steps == 2


def test_with_accumulation_a_step_is_one_call() -> None:
    witness = Witness()
    config = Finetune(epochs=2, accumulate=2)
    finetune(nn.Linear(3, 1), BATCHES, nn.functional.mse_loss, config, parts=[witness])
    calls = [call for call, _, _ in witness.seen]
    assert calls == ["start", *["begin", "gradients", "stepped"] * 2]


def test_a_gradient_that_a_part_adds_is_used() -> None:
    class Push(Part):
        def start(self, training: Training) -> None:
            self.model = training.model

        def gradients(self, steps: int) -> None:
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(1.0)

    layer = nn.Linear(3, 1)
    before = layer.weight.detach().clone()
    config = Finetune(epochs=1, optimizer="sgd", lr=0.5)
    finetune(layer, BATCHES, nn.functional.mse_loss, config, parts=[Push()])
    torch.testing.assert_close(layer.weight.detach(), before - 2 * 0.5)


def test_only_the_first_of_several_metrics_has_to_be_a_number() -> None:
    def metrics(model: nn.Module) -> dict[str, object]:
        return {"accuracy": 0.75, "confusion": torch.eye(2)}

    layer, loss, config = nn.Linear(3, 1), nn.functional.mse_loss, Finetune(epochs=1)
    evaluate: Any = metrics
    assert finetune(layer, BATCHES, loss, config, evaluate=evaluate).final_metric == 0.75
    for answer in (None, "good", {"accuracy": "good"}):
        evaluate = lambda model, answer=answer: answer  # noqa: E731
        with pytest.raises(ConfigError, match="must return a number, or a dict whose first"):
            finetune(layer, BATCHES, loss, config, evaluate=evaluate)


def test_a_part_that_brings_a_removed_weight_back_is_found_where_it_happens() -> None:
    class Leak(Part):
        def start(self, training: Training) -> None:
            self.weight = training.model.get_parameter("weight")

        def begin(self, steps: int) -> None:
            if steps == 1:
                self.weight.data[0, 2] = 1.0

    def train(check_every: int | None) -> int:
        config = Finetune(epochs=3, check_every=check_every)
        loss = nn.functional.mse_loss
        return finetune(nn.Linear(3, 1), BATCHES, loss, config, masks=MASK, parts=[Leak()]).steps

    with pytest.raises(SoundnessError, match="weight"):
        train(check_every=1)
    assert train(check_every=None) == 6  # zeroed by the next step: nothing is left at the end
