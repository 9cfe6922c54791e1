"""`prune` by several processes: as one process with all of the data, and alike on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from secateurs.boards import BoardLog
from secateurs.distributed import assert_same
from secateurs.errors import BudgetError, ConfigError, DataError, RankError, ScoringError
from secateurs.finetuning import Finetune
from secateurs.penalties import Penalty
from secateurs.pipeline import PruneResult, Stage, prune, prune_stages
from secateurs.posttraining import FisherSearch, LayerwiseCut
from secateurs.regrowth import Regrow
from secateurs.schedules import Schedule
from secateurs.tickets import AtInit, TicketSearch
from secateurs.types import Budget, Threshold
from tests.distributed.cases import data_of, joined, raised, ranks, samples, sharded

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(77))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(),
                         nn.Linear(12, 2))  # fmt: skip


def cnn() -> nn.Module:
    """With running statistics, and a dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 8, 3, padding=1),
                         nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1),
                         nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                         nn.Linear(36, 2))  # fmt: skip


def size_of_outputs(model: nn.Module) -> float:
    return float(model(X).square().mean())


def share_of_zeros(model: nn.Module) -> float:
    """A metric that gets worse with every cut, whatever the data."""
    return float((model[0].weight == 0).float().mean())  # type: ignore[index]


def run(model: nn.Module, batches: Any, group: Any, **options: Any) -> PruneResult:
    options = {"budget": Budget(units=0.5), "evaluate": size_of_outputs, **options}
    if not {"at_init", "ticket"} & {*options}:
        options.setdefault("round_to", 1)
    return prune(model, batches, options.pop("loss", mse_loss), example_inputs=X[:1],
                 maximize=False, group=group, **options)  # fmt: skip


def facts(result: PruneResult) -> dict[str, Any]:
    """All that must be the same on every rank."""
    report = result.report.to_dict()
    return {
        "weights": dict(result.model.state_dict()), "work": dict(result.masked.state_dict()),
        "masks": result.masks, "plan": result.plan, "report": report, "scores": result.scores,
        "kept": dict(result.counts.kept), "mode": result.model.training,
        "history": [[(r.train_loss, r.metric) for r in h.history] for h in result.history],
    }  # fmt: skip


SHORT = Finetune(epochs=2, lr=0.02)
LIKE_ONE: Mapping[str, dict[str, Any]] = {
    "in steps": {"schedule": Schedule("cubic", steps=3), "finetune": SHORT},
    "inside one training": {
        "granularity": "weight", "schedule": Schedule("linear", steps=2, every="1 epochs"),
        "finetune": Finetune(epochs=3, lr=0.02, lr_schedule="cosine"), "criterion": "snip",
    },
    "masks that move": {
        "granularity": "weight", "schedule": Schedule("one_shot", steps=1),
        "finetune": Finetune(epochs=4, lr=0.02), "regrow": Regrow("rigl", every=2, until=1.0),
    },
    "a penalty before": {
        "prepare": SHORT, "penalty": Penalty("growing", strength=0.1),
        "schedule": Schedule("one_shot", steps=1), "criterion": "l2_norm",
    },
    "a teacher": {
        "schedule": Schedule("one_shot", steps=1),
        "finetune": Finetune(epochs=2, lr=0.02, distill=0.5, restore_best=True, accumulate=2),
    },
    "back from a step": {
        "budget": Budget(metric_drop=0.4), "schedule": Schedule("exponential", steps=4),
        "finetune": SHORT, "evaluate": share_of_zeros,
    },
    "permuted": {"control": "shuffle", "schedule": Schedule("one_shot", steps=1)},
}  # fmt: skip


def check_prune_equals_that_of_one_process(folder: Path) -> None:
    """Ranks with fewer batches, and with none; every way to train and to cut."""
    rank, size = ranks()
    parts = data_of(size)
    for name, options in LIKE_ONE.items():
        if size > 2 and name not in ("in steps", "a penalty before"):
            continue
        dense = mlp()
        alone = run(mlp(), joined(parts), None, **options)
        mine = run(dense, parts[rank], "world", **options)
        assert_same(facts(mine), "world", what=name)
        for tensor, mask in alone.plan.masks.items():
            assert mask.equal(mine.plan.masks[tensor]), (name, tensor)
        ours, theirs = mine.masked.state_dict(), alone.masked.state_dict()
        for tensor, value in theirs.items():
            assert torch.allclose(value, ours[tensor], rtol=0, atol=1e-5), (name, tensor)
        assert [s.rolled_back for s in mine.report.steps] == [
            s.rolled_back for s in alone.report.steps
        ]
        assert mine.report.headline == alone.report.headline, name
        for tensor, value in mlp().state_dict().items():
            assert dense.state_dict()[tensor].equal(value)


def check_the_last_steps_of_a_descent_were_undone(folder: Path) -> None:
    """So that the comparison above goes through a roll-back."""
    rank, size = ranks()
    result = run(mlp(), data_of(size)[rank], "world", **LIKE_ONE["back from a step"])
    undone = [step.rolled_back for step in result.report.steps]
    assert True in undone
    assert False in undone


ONCE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "repair: norms": ("cnn", {"repair": ("bias", "norms")}),
    "sensitivity": ("cnn", {"allocation": "sensitivity"}),
    "at_init: snip": ("mlp", {"at_init": AtInit("snip"), "granularity": "weight",
                              "finetune": SHORT}),
    "layerwise: sparsegpt": ("mlp", {"layerwise": LayerwiseCut(), "granularity": "weight",
                                     "schedule": Schedule("cubic", steps=2), "finetune": SHORT}),
    "fisher masks": ("cnn", {"fisher_masks": FisherSearch(),
                             "budget": Budget(macs=0.6)}),
}  # fmt: skip


def check_what_rank_0_does_is_told_to_the_others(folder: Path) -> None:
    """Its weights, plan and notes; the report says whose data it was."""
    rank, size = ranks()
    for name, (kind, options) in ONCE.items():
        if "at_init" not in options and "fisher_masks" not in options:
            options = {"schedule": Schedule("one_shot", steps=1), **options}
        batches = data_of(size)[rank]
        result = run({"cnn": cnn, "mlp": mlp}[kind](), batches, "world", **options)
        assert_same(facts(result), "world", what=name)
        assert f"{name}: by the calibration data of process 0 of {size}" in result.report.notes
        assert result.plan.n_removed


def check_every_rank_gets_the_same_where_its_own_data_differs(folder: Path) -> None:
    """Running statistics and dropout of each rank, shuffled labels, times."""
    rank, size = ranks()
    batches = data_of(size)[rank]
    cases: dict[str, dict[str, Any]] = {
        "statistics": {"schedule": Schedule("cubic", steps=2), "finetune": SHORT, "test": lambda m:
                       {"rank": float(rank)}, "latency": [1]},
        "labels": {"control": "random-labels", "schedule": Schedule("one_shot", steps=1)},
        "null": {"budget": None, "threshold": Threshold("permutation", fdr=0.5),
                 "criterion": "snip"},
        "inside": LIKE_ONE["inside one training"],
    }  # fmt: skip
    for name, options in cases.items():
        try:
            result = run(cnn(), batches, "world", **options)
        except BudgetError as error:  # nothing beats its null, on all ranks alike
            assert name == "null"
            assert_same(str(error), "world")
            continue
        assert_same(facts(result), "world", what=name)
        if name == "statistics":
            (row,) = [r for r in result.report.rows if r.name == "test rank"]
            assert (row.before, row.after) == (0.0, 0.0)  # what rank 0 says
            assert result.report.notes[0] == (
                f"made by {size} processes, each with its part of the data; times are those of "
                "process 0"
            )


class Spare(nn.Sequential):
    """Holds a parameter that nobody uses."""

    def __init__(self) -> None:
        super().__init__(*mlp().children())
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:5]:
            x = layer(x)
        return x


def check_a_parameter_without_gradient_is_no_obstacle(folder: Path) -> None:
    rank, size = ranks()
    parts = data_of(size)
    options = {"finetune": SHORT, "schedule": Schedule("cubic", steps=2), "include": ["0:*", "2:*"]}
    mine = run(Spare(), parts[rank], "world", **options)
    alone = run(Spare(), joined(parts), None, **options)
    assert_same(facts(mine), "world")
    for name, value in alone.masked.state_dict().items():
        assert torch.allclose(value, mine.masked.state_dict()[name], rtol=0, atol=1e-5)


def check_two_stages_with_calibration_of_their_own(folder: Path) -> None:
    rank, size = ranks()
    parts = data_of(size)
    stages = [
        Stage(Budget(units=0.6), granularity="weight", schedule=Schedule("one_shot", steps=1)),
        Stage(Budget(macs=0.6), schedule=Schedule("cubic", steps=2), finetune=SHORT, max_drop=0.5),
    ]
    calibration = [samples([3], 50 + r) for r in range(size)]

    def both(batches: Any, calibration: Any, group: Any) -> PruneResult:
        return prune_stages(
            mlp(), batches, mse_loss, stages, example_inputs=X[:1], calibration=calibration,
            evaluate=size_of_outputs, maximize=False, group=group,
        )  # fmt: skip

    mine = both(parts[rank], calibration[rank], "world")
    alone = both(joined(parts), [batch for part in calibration for batch in part], None)
    assert_same(facts(mine), "world")
    for tensor, mask in alone.plan.masks.items():
        assert mask.equal(mine.plan.masks[tensor]), tensor


# -- what is refused, and what fails ---------------------------------------------------------------


def check_prune_refuses_by_name(folder: Path) -> None:
    """Before anything expensive: the loss is only tried on one batch."""
    rank, size = ranks()
    mine = data_of(size)[rank]

    def text(kind: type[Exception], model: nn.Module, data: Any = mine, **options: Any) -> str:
        return raised(kind, lambda: run(model, data, "world", **options))

    for wrap in (DistributedDataParallel, sharded):
        assert "give every process the plain model" in text(ConfigError, wrap(mlp()))
    ticket = {"ticket": TicketSearch(rounds=2), "granularity": "weight", "finetune": SHORT,
              "allocation": "global"}  # fmt: skip
    assert "ticket= is looked for by one process" in text(ConfigError, mlp(), **ticket)
    assert "gauss_newton cannot be scored by a group" in text(
        ConfigError, mlp(), criterion="gauss_newton", prepare=SHORT
    )
    said = text(RankError, mlp(), budget=Budget(units=0.5 if rank else 0.4))
    assert "the settings of prune must be the same on every rank: stages.0.budget.units" in said
    model = mlp()
    with torch.no_grad():
        model.get_parameter("2.bias").add_(rank)
    assert "the weights must be the same on every rank: 2.bias" in text(RankError, model)
    assert "batches is empty on every rank" in text(DataError, mlp(), [])
    assert "all 2 processes have the same training data" in text(ConfigError, mlp(), data_of(2)[0])
    first_empty: Any = [] if rank == 0 else samples([2], 3)
    assert "calibration data of rank 0" in text(
        DataError, mlp(), first_empty, repair=("bias",), finetune=SHORT
    )
    synced = nn.Sequential(nn.Linear(6, 8), nn.SyncBatchNorm(8), nn.Linear(8, 2))
    assert "SyncBatchNorm" in text(ConfigError, synced, repair=("norms",), finetune=SHORT)
    assert_same("all are here", "world")


def check_an_error_on_one_rank_is_raised_on_all(folder: Path) -> None:
    """In the loss of a training, in `evaluate`, in the data; the ranks can go on together."""
    rank, size = ranks()
    parts = data_of(size)

    def failing(after: int, value: Any) -> Callable[..., Any]:
        calls = [0]

        def function(*given: Tensor) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] > after:
                raise RuntimeError("the lamp is out")
            return value(*given)

        return function

    class Torn:
        def __init__(self) -> None:
            self.reads = 0

        def __iter__(self) -> Any:
            self.reads += 1
            for batch in parts[rank]:
                if rank == 1 and self.reads > 6:
                    raise OSError("the file is torn")
                yield batch

        def __len__(self) -> int:
            return len(parts[rank])

    options: dict[str, Any] = {"finetune": SHORT, "schedule": Schedule("cubic", steps=2)}
    given = {**options, "loss": failing(9, mse_loss)}
    said = raised(Exception, partial(run, mlp(), parts[rank], "world", **given))
    assert "the lamp is out" in said
    for after in (0, 2):
        given = {**options, "evaluate": failing(after, size_of_outputs)}
        kind = ScoringError if after == 0 else RankError if rank != 1 else RuntimeError
        said = raised(kind, partial(run, mlp(), parts[rank], "world", **given))
        assert "the lamp is out" in said
        assert rank == 1 or "evaluate failed on rank 1 of" in said
    said = raised(Exception, lambda: run(mlp(), Torn(), "world", **options))
    assert "the file is torn" in said
    assert_same("all are here", "world")


def check_what_is_given_stays_and_one_rank_logs(folder: Path) -> None:
    """The model that came in is not changed; curves have the names of the plain model."""
    rank, size = ranks()
    model = cnn().train()
    before = copy.deepcopy(model.state_dict())
    where = folder / f"board-{rank}"
    with BoardLog(where) as log:
        result = run(model, data_of(size)[rank], "world", finetune=SHORT, log=log)
    assert result.model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    assert where.exists() == (rank == 0)
    if rank == 0:
        (file,) = where.iterdir()
        content = file.read_bytes()
        assert b"weights/1.weight" in content
        assert b"module." not in content
