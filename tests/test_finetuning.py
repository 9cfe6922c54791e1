"""Fine-tuning: exact gradients, exact masks, honest bookkeeping, nothing lost on failure."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.errors import CaptureError, ConfigError, DataError, ScoringError, SoundnessError
from secateurs.finetuning import (
    LR_SCHEDULES,
    OPTIMIZERS,
    EpochRow,
    Finetune,
    distillation_loss,
    finetune,
)
from secateurs.masks import check_masks

Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def classifier(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def blobs(sizes: tuple[int, ...] = (8, 8, 4), dtype: torch.dtype = torch.float32) -> Pairs:
    """Three separable classes, in batches of the given sizes."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for size in sizes:
        y = torch.randint(0, 3, (size,), generator=generator)
        x = torch.randn(size, 4, generator=generator) + 2 * F.one_hot(y, 4)
        pairs.append((x.to(dtype), y))
    return pairs


def accuracy(pairs: Pairs) -> Any:
    def evaluate(model: nn.Module) -> float:
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
        return hits / sum(len(y) for _, y in pairs)

    return evaluate


def scripted(values: list[float]) -> Any:
    """An evaluation that answers from a list."""
    answers = iter(values)
    return lambda model: next(answers)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def n_hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


# --- training is the textbook loop -----------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_equals_a_loop_by_hand(name: str) -> None:
    model, pairs = classifier(), blobs()
    twin = copy.deepcopy(model)
    config = Finetune(
        epochs=3,
        optimizer=name,
        lr=0.02,
        momentum=0.9 if name == "sgd" else 0.0,
        weight_decay=0.01,
        clip_norm=0.5,
    )
    result = finetune(model, pairs, F.cross_entropy, config)

    optimizer: torch.optim.Optimizer
    if name == "adam":
        optimizer = torch.optim.Adam(twin.parameters(), lr=0.02, weight_decay=0.01)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
    means = []
    for _ in range(3):
        total = 0.0
        for x, y in pairs:
            optimizer.zero_grad()
            loss = F.cross_entropy(twin(x), y)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
            total += loss.item() * len(y)
        means.append(total / 20)
    assert same(weights(model), weights(twin))
    assert [row.train_loss for row in result.history] == pytest.approx(means, abs=1e-6)
    assert [row.epoch for row in result.history] == [1, 2, 3]
    assert result.steps == 9
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("full_batch", [False, True])
def test_masks_are_held_and_the_rest_learns(name: str, full_batch: bool) -> None:
    model, pairs = classifier(), blobs()
    masks = {"0.weight": torch.rand(6, 4) > 0.5, "2.weight": torch.rand(3, 6) > 0.3}
    config = Finetune(epochs=20, optimizer=name, lr=0.05, weight_decay=0.001, full_batch=full_batch)
    result = finetune(model, pairs, F.cross_entropy, config, masks=masks)
    check_masks(model, masks)
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert n_hooks(model) == 0


def test_a_leak_is_reported() -> None:
    """The checker at the end sees entries that the hooks cannot know about."""
    model, pairs = nn.Linear(4, 3), blobs((4,))

    def swap(row: EpochRow) -> None:
        model.weight = nn.Parameter(torch.ones(3, 4))

    masks = {"weight": torch.zeros(3, 4, dtype=torch.bool)}
    with pytest.raises(SoundnessError, match="weight"):
        finetune(model, pairs, F.cross_entropy, Finetune(), masks=masks, progress=swap)


# --- full batch ------------------------------------------------------------------------------


def test_full_batch_is_the_exact_gradient_with_a_ragged_last_batch() -> None:
    """SGD with lr 1 makes the step equal to minus the gradient of the mean over all samples."""
    pairs = blobs((8, 8, 3), torch.float64)
    model = classifier(torch.float64)
    x, y = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    loss = F.cross_entropy(model(x), y)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    config = Finetune(epochs=1, optimizer="sgd", lr=1.0, full_batch=True)
    result = finetune(model, pairs, F.cross_entropy, config)
    for old, new, gradient in zip(before, model.parameters(), expected, strict=True):
        assert torch.allclose(old - new, gradient, rtol=0, atol=1e-14)
    assert result.steps == 1
    assert result.history[0].train_loss == pytest.approx(loss.item(), abs=1e-14)


def test_full_batch_over_batches_equals_one_big_batch() -> None:
    pairs = blobs((5, 5, 2), torch.float64)
    big = [(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))]
    a = classifier(torch.float64)
    b = copy.deepcopy(a)
    options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "clip_norm": 0.3}
    finetune(a, pairs, F.cross_entropy, Finetune(steps=6, full_batch=True, **options))
    finetune(b, big, F.cross_entropy, Finetune(epochs=6, **options))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


# --- how long, how fast ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"epochs": 0}, {"steps": 0}])
def test_zero_is_no_training_but_masks_and_evaluation(options: dict[str, int]) -> None:
    model, pairs = classifier(), blobs()
    masks = {"0.bias": torch.zeros(6, dtype=torch.bool)}
    kept = model.get_parameter("2.weight").detach().clone()
    config = Finetune(**options)  # type: ignore[arg-type]
    result = finetune(model, pairs, F.cross_entropy, config, masks=masks, evaluate=scripted([0.25]))
    assert (result.history, result.steps) == ((), 0)
    assert (result.best_metric, result.best_epoch, result.final_metric) == (0.25, 0, 0.25)
    assert torch.equal(model.get_parameter("2.weight"), kept)
    check_masks(model, masks)


def test_steps_go_over_several_passes_and_stop_inside_one() -> None:
    result = finetune(classifier(), blobs(), F.cross_entropy, Finetune(steps=5))
    assert result.steps == 5
    assert [row.epoch for row in result.history] == [1, 2]


def lrs_seen(config: Finetune, pairs: Any) -> list[float]:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, a, k: seen.append(opt.param_groups[0]["lr"]))
    finetune(model, pairs, F.cross_entropy, config, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    return seen


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
@pytest.mark.parametrize(
    "options", [{"epochs": 2}, {"steps": 4}, {"epochs": 4, "full_batch": True}]
)
def test_lr_schedules(name: str, factors: list[float], options: dict[str, Any]) -> None:
    seen = lrs_seen(Finetune(lr_schedule=name, **options), blobs((4, 4)))
    assert seen == pytest.approx([0.5 * f for f in factors], abs=1e-12)


@pytest.mark.parametrize("name", sorted(LR_SCHEDULES))
def test_lr_schedules_start_at_one_and_never_rise(name: str) -> None:
    values = [LR_SCHEDULES[name](i / 20) for i in range(20)]
    assert values[0] == 1
    assert values == sorted(values, reverse=True)


def test_the_history_tells_the_lr_of_the_first_step() -> None:
    config = Finetune(epochs=2, lr=0.1, lr_schedule="linear")
    result = finetune(classifier(), blobs((4, 4)), F.cross_entropy, config)
    assert [row.lr for row in result.history] == pytest.approx([0.1, 0.05])


class Unsized:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(blobs())


def test_a_schedule_over_unsized_batches_wants_steps() -> None:
    finetune(classifier(), Unsized(), F.cross_entropy, Finetune(epochs=2))
    finetune(classifier(), Unsized(), F.cross_entropy, Finetune(steps=2, lr_schedule="cosine"))
    stream = torch.utils.data.DataLoader(_Stream(), batch_size=None)
    for batches in (Unsized(), stream):
        with pytest.raises(ConfigError, match="give steps="):
            finetune(
                classifier(), batches, F.cross_entropy, Finetune(epochs=2, lr_schedule="cosine")
            )


class _Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(blobs())


# --- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maximize", "values", "best"),
    [(True, [0.1, 0.5, 0.5, 0.4], (0.5, 2)), (False, [0.9, 0.2, 0.3, 0.2], (0.2, 2))],
)
def test_early_stop(maximize: bool, values: list[float], best: tuple[float, int]) -> None:
    result = finetune(
        classifier(),
        blobs(),
        F.cross_entropy,
        Finetune(epochs=9, patience=2),
        evaluate=scripted(values),
        maximize=maximize,
    )
    assert result.stopped_early
    assert (result.best_metric, result.best_epoch) == best
    assert len(result.history) == 4
    assert result.final_metric == values[-1]


def test_patience_not_used_up_is_no_early_stop() -> None:
    config = Finetune(epochs=3, patience=2)
    evaluate = scripted([0.1, 0.0, 0.2])
    result = finetune(classifier(), blobs(), F.cross_entropy, config, evaluate=evaluate)
    assert not result.stopped_early
    assert result.best_epoch == 3


@pytest.mark.parametrize("restore", [False, True])
def test_restore_best(restore: bool) -> None:
    model, after = classifier(), []
    mask = {"0.weight": torch.rand(6, 4) > 0.5}
    result = finetune(
        model,
        blobs(),
        F.cross_entropy,
        Finetune(epochs=3, lr=0.05, restore_best=restore),
        masks=mask,
        evaluate=scripted([0.1, 0.9, 0.3]),
        progress=lambda row: after.append(weights(model)),
    )
    assert same(weights(model), after[1] if restore else after[2])
    assert not same(after[1], after[2])
    assert (result.best_metric, result.final_metric) == (0.9, 0.3)
    check_masks(model, mask)


def test_evaluation_sees_eval_mode_and_a_dict_counts_by_its_first_entry() -> None:
    model = classifier()
    model[1].eval()  # the user's own choice, given back at the end
    modes: list[tuple[bool, bool]] = []

    def evaluate(m: nn.Module) -> dict[str, float]:
        modes.append((m.training, torch.is_grad_enabled()))
        return {"f1": 0.5, "accuracy": 0.75}

    with torch.no_grad():  # a caller's no_grad does not stop training
        result = finetune(model, blobs(), F.cross_entropy, Finetune(epochs=2), evaluate=evaluate)
    assert modes == [(False, False)] * 2
    assert result.final_metric == 0.5
    assert [m.training for m in model] == [True, False, True]


def test_training_uses_train_mode_and_a_seed_repeats_dropout() -> None:
    start = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()

    def run(seed: int) -> dict[str, Tensor]:
        model = copy.deepcopy(start)
        state = torch.get_rng_state()
        finetune(model, blobs(), F.cross_entropy, Finetune(epochs=2), seed=seed)
        assert not model.training
        assert torch.equal(torch.get_rng_state(), state)
        return weights(model)

    assert same(run(3), run(3))
    assert not same(run(3), run(4))  # dropout was active


def test_learns_a_separable_problem() -> None:
    pairs = blobs((16, 16, 16))
    config = Finetune(epochs=30, lr=0.05, lr_schedule="cosine")
    result = finetune(classifier(), pairs, F.cross_entropy, config, evaluate=accuracy(pairs))
    assert result.final_metric is not None
    assert result.final_metric > 0.95
    assert result.seconds > 0


# --- distillation ----------------------------------------------------------------------------


def test_distillation_value_by_hand() -> None:
    """T = 2, logits (2, 0) against (0, 0): p = softmax(1, 0), KL(p || 1/2) x 4."""
    p = 1 / (1 + math.exp(-1))
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    got = distillation_loss(
        torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), torch.tensor([1]), temperature=2.0
    )
    assert got.item() == pytest.approx(expected, abs=1e-6)


def test_distillation_matches_batchmean_and_both_layouts_of_classes() -> None:
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    reference = F.kl_div(
        (student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean"
    )
    got = distillation_loss(student, teacher, torch.zeros(5, dtype=torch.long), 3.0)
    assert got.item() == pytest.approx(reference.item() * 9, abs=1e-6)
    # a language model (batch, time, classes), and (batch, classes, time) as in cross_entropy
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    labels = torch.zeros(2, 5, dtype=torch.long)
    last = distillation_loss(student, teacher, labels)
    second = distillation_loss(student.transpose(1, 2), teacher.transpose(1, 2), labels)
    flat = distillation_loss(student.reshape(10, 3), teacher.reshape(10, 3), labels.flatten())
    assert last.item() == pytest.approx(flat.item(), abs=1e-6)
    assert second.item() == pytest.approx(flat.item(), abs=1e-6)
    labels[:, 2:] = -100  # padding does not count
    kept = distillation_loss(student[:, :2], teacher[:, :2], labels[:, :2])
    assert distillation_loss(student, teacher, labels).item() == pytest.approx(kept.item())


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ((4, 1), torch.zeros(4, dtype=torch.long)),  # a single logit has no softmax
        ((4,), torch.zeros(4)),
        ((4, 3), torch.zeros(4, 3)),  # regression, soft labels
    ],
)
def test_other_outputs_use_the_squared_error(shape: tuple[int, ...], targets: Tensor) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    expected = (student - teacher).square().mean().item()
    assert distillation_loss(student, teacher, targets).item() == pytest.approx(expected)


def test_distillation_reads_logits_of_structured_outputs() -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    y = torch.zeros(4, dtype=torch.long)
    plain = distillation_loss(student, teacher, y).item()
    noise = torch.randn(7)
    assert distillation_loss(
        {"aux": noise, "logits": student}, {"aux": noise, "logits": teacher}, y
    ).item() == pytest.approx(plain)
    assert distillation_loss((student, noise), (teacher, noise), y).item() == pytest.approx(plain)
    square, labels = torch.randn(2, 3, 3), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(DataError, match="dimension 1 or 2"):
        distillation_loss(square, square, labels)
    with pytest.raises(DataError, match="one shape"):
        distillation_loss(student, teacher[:2], y)


def test_the_gradient_of_distillation_moves_the_student_towards_the_teacher() -> None:
    torch.manual_seed(3)
    teacher, student = classifier(), classifier()
    pairs = [(x, torch.randint(0, 3, y.shape)) for x, y in blobs()]  # labels say nothing
    teacher.train()
    before = weights(teacher)

    def away() -> float:
        return sum(distillation_loss(student(x), teacher(x), y).item() for x, y in pairs)

    start = away()
    config = Finetune(epochs=60, lr=0.02, distill=1.0)
    finetune(student, pairs, F.cross_entropy, config, teacher=teacher)
    assert away() < 0.1 * start
    assert same(weights(teacher), before)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_distill_weighs_the_two_losses() -> None:
    """One SGD step with lr 1: the update is linear in the weight."""
    teacher, pairs = classifier(torch.float64), blobs((8,), torch.float64)
    start = classifier(torch.float64)
    steps = []
    for weight in (0.0, 0.25, 1.0):
        model = copy.deepcopy(start)
        config = Finetune(optimizer="sgd", lr=1.0, distill=weight)
        finetune(model, pairs, F.cross_entropy, config, teacher=teacher if weight else None)
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(steps[1], 0.75 * steps[0] + 0.25 * steps[2], rtol=0, atol=1e-12)


def test_the_teacher_runs_in_eval_mode_without_gradients() -> None:
    seen: list[tuple[bool, bool]] = []
    teacher = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).train()
    teacher[0].register_forward_hook(
        lambda module, args, out: seen.append((module.training, torch.is_grad_enabled()))
    )
    finetune(classifier(), blobs(), F.cross_entropy, Finetune(distill=0.5), teacher=teacher)
    assert seen == [(False, False)] * 3
    assert [m.training for m in teacher] == [True, True]


def test_a_teacher_that_refuses_the_inputs_is_named() -> None:
    with pytest.raises(CaptureError, match="epoch 1, batch 0: the teacher"):
        finetune(
            classifier(),
            blobs(),
            F.cross_entropy,
            Finetune(distill=0.5),
            teacher=nn.Linear(9, 3),
        )


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("full_batch", [False, True])
def test_a_loss_that_is_not_finite_gives_the_model_back_as_it_was(full_batch: bool) -> None:
    model, pairs = classifier(), blobs()
    pairs[1] = (torch.full_like(pairs[1][0], math.nan), pairs[1][1])
    model.eval()
    before = weights(model)
    masks = {"0.weight": torch.zeros(6, 4, dtype=torch.bool)}
    with pytest.raises(ScoringError, match=r"epoch 1, batch 1: the loss is nan.*from before"):
        finetune(
            model, pairs, F.cross_entropy, Finetune(epochs=2, full_batch=full_batch), masks=masks
        )
    assert same(weights(model), before)
    assert not model.training
    assert n_hooks(model) == 0
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_diverge_in_the_last_step_are_noticed() -> None:
    model = nn.Linear(4, 3)
    before = weights(model)
    pairs = [(x * 1e3, y) for x, y in blobs((4,))]
    with pytest.raises(ScoringError, match="epoch 1: weights are not finite"):
        finetune(model, pairs, F.cross_entropy, Finetune(optimizer="sgd", lr=1e38))
    assert same(weights(model), before)


def test_a_metric_that_is_not_finite() -> None:
    model = classifier()
    before = weights(model)
    with pytest.raises(ScoringError, match="epoch 2: evaluate returned nan"):
        finetune(
            model,
            blobs(),
            F.cross_entropy,
            Finetune(epochs=3),
            evaluate=scripted([0.5, math.nan]),
        )
    assert same(weights(model), before)


def test_an_interrupt_leaves_masks_applied_hooks_gone_and_modes_restored() -> None:
    model = classifier().eval()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = {"0.weight": torch.rand(6, 4) > 0.5}

    def interrupt(row: EpochRow) -> None:
        raise KeyboardInterrupt

    config = Finetune(epochs=4, lr_schedule="linear")
    with pytest.raises(KeyboardInterrupt):
        finetune(
            model,
            blobs(),
            F.cross_entropy,
            config,
            masks=masks,
            optimizer=optimizer,
            progress=interrupt,
        )
    check_masks(model, masks)
    assert not same(weights(model), before)
    assert not model.training
    assert n_hooks(model) == 0
    assert len(optimizer._optimizer_step_post_hooks) == 0
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_bad_data_is_named() -> None:
    wrong_labels: Pairs = [(x, y + 5) for x, y in blobs()]
    with pytest.raises(DataError, match="epoch 1, batch 0"):
        finetune(classifier(), wrong_labels, F.cross_entropy, Finetune())
    with pytest.raises(DataError, match="read only once"):
        finetune(classifier(), iter(blobs()), F.cross_entropy, Finetune())
    with pytest.raises(DataError, match="empty"):
        finetune(classifier(), [], F.cross_entropy, Finetune())


def test_arguments_that_contradict_each_other_are_all_named() -> None:
    model = classifier()
    config = Finetune(distill=0.5, patience=1)
    with pytest.raises(ConfigError) as caught:
        finetune(model, blobs(), F.cross_entropy, config)
    assert "needs teacher=" in str(caught.value)
    assert "need evaluate=" in str(caught.value)
    with pytest.raises(ConfigError, match="without effect"):
        finetune(model, blobs(), F.cross_entropy, Finetune(), teacher=classifier())
    with pytest.raises(ConfigError, match="the model itself"):
        finetune(model, blobs(), F.cross_entropy, Finetune(distill=1), teacher=model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        finetune(model, blobs(), F.cross_entropy, Finetune())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1, "steps": 1}, "not both"),
        ({"epochs": -1}, "epochs must be a whole number"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"steps": True}, "steps must be"),
        ({"optimizer": "adan"}, "Did you mean 'adam'"),
        ({"lr_schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"lr": 0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"momentum": 0.9}, "momentum belongs to"),
        ({"optimizer": "sgd", "momentum": 1.0}, r"in \[0, 1\)"),
        ({"weight_decay": -0.1}, "at least 0"),
        ({"clip_norm": 0}, "clip_norm must be above 0"),
        ({"patience": 0}, "patience must be"),
        ({"distill": 1.5}, r"distill must be in \[0, 1\]"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"lr": "fast"}, "got 'fast'"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Finetune(**options)


def test_a_recipe_block_becomes_a_config() -> None:
    adapter = TypeAdapter(Finetune)
    block = {"epochs": 3, "lr": 0.001, "distill": 0.5}
    assert adapter.validate_python(block) == Finetune(epochs=3, lr=0.001, distill=0.5)
    assert Finetune().n_epochs == 1
    assert Finetune(steps=5).n_epochs is None
    with pytest.raises(ValidationError, match="epoch"):
        adapter.validate_python({"epoch": 3})
