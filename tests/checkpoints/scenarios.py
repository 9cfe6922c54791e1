"""Small runs that can be killed: each leaves checkpoints and ends with marks of its result."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from secateurs import cli
from secateurs.checkpoints import Checkpoints, keeping, tensor_mark
from secateurs.finetuning import Finetune, finetune
from secateurs.pipeline import Stage, prune_stages
from secateurs.report.data import Report
from secateurs.schedules import Schedule
from secateurs.types import Budget

__all__ = ["SCENARIOS", "Scenario", "checkpoints", "report_marks"]

Scenario = Callable[[Path, bool], Any]
"""`scenario(folder, resume)` -> marks of the result, plain values."""

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()
SGD = Finetune(epochs=2, optimizer="sgd", lr=0.1, momentum=0.9)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples with noise drawn by numpy, as augmentations do."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.from_numpy(np.random.normal(0, 0.05, 4))  # noqa: NPY002
        return X[i] + noise.float(), Y[i]


def loader(*, generator: bool = True) -> DataLoader[Any]:
    """Shuffled; the random numbers are those of its own generator, or of torch."""
    own = torch.Generator().manual_seed(5) if generator else None
    return DataLoader(Noisy(), batch_size=10, shuffle=True, generator=own)


def net() -> nn.Sequential:
    """Batch norm has buffers, dropout draws random numbers."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2),
    ).eval()  # fmt: skip


def accuracy(model: nn.Module) -> float:
    return float((model(X).argmax(1) == Y).float().mean())


def checkpoints(folder: Path) -> Checkpoints:
    """Often, so that there is much to be killed in."""
    return Checkpoints(folder / "checkpoints", every=2, say=lambda text: None)


def training(folder: Path, resume: bool) -> Any:
    """Momentum, dropout, a shuffled loader without a generator, the best epoch, patience."""
    model = net()
    config = Finetune(
        epochs=12, optimizer="sgd", lr=0.2, momentum=0.9, lr_schedule="cosine", patience=9,
        restore_best=True, accumulate=2, clip_norm=1.0,
    )  # fmt: skip
    mask = torch.rand(12, 16, generator=torch.Generator().manual_seed(1)) > 0.5
    done = finetune(
        model, loader(generator=False), F.cross_entropy, config, masks={"4.weight": mask},
        evaluate=accuracy, seed=3, checkpoint=checkpoints(folder), resume=resume,
    )  # fmt: skip
    return [tensor_mark(model.state_dict()), repr(replace(done, seconds=0.0))]


def pruned(*stages: Stage) -> Scenario:
    """A whole run of these stages."""

    def scenario(folder: Path, resume: bool) -> Any:
        result = prune_stages(
            net(), loader(), F.cross_entropy, stages, example_inputs=X, evaluate=accuracy, seed=3,
            checkpoint=checkpoints(folder), resume=resume,
        )  # fmt: skip
        return [
            tensor_mark(result.model.state_dict()),
            tensor_mark(result.masked.state_dict()),
            tensor_mark(result.masks),
            {name: units.tolist() for name, units in result.plan.removed.items()},
            [repr(replace(done, seconds=0.0)) for done in result.history],
            report_marks(result.report),
        ]

    return scenario


def report_marks(report: Report) -> Any:
    """A report without its times."""
    return _timeless(json.loads(json.dumps(report.to_dict())))


def _timeless(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_timeless(item) for item in tree]
    if isinstance(tree, dict):
        return {k: _timeless(v) for k, v in tree.items() if k not in ("created", "seconds")}
    if isinstance(tree, str):
        return re.sub(r"[\d.]+ s\)", "s)", tree)  # what a repair took
    return tree


RECIPE = """model: tests/checkpoints/scenarios.py:net
data: tests/checkpoints/scenarios.py:read
budget: {units: 0.4}
schedule: {curve: cubic, steps: 3}
finetune: {epochs: 2, lr: 0.02, restore_best: true}
latency: []
seed: 3
"""


def read() -> dict[str, Any]:
    """The data of the recipe."""
    return {"train": loader(), "validation": [(X, Y)], "test": [(X, Y)]}


def command(folder: Path, resume: bool) -> Any:
    """`secateurs run` as a user types it; what it says goes to a file."""
    keeping.SECONDS = 0.0
    os.chdir(folder)
    out = Path("out")
    Path("r.yaml").write_text(RECIPE.replace("tests/", f"{Path(__file__).parents[2]}/tests/"))
    sys.argv = ["secateurs", "run", "r.yaml", "--out", "out", *["--resume"] * resume]
    with (folder / "said").open("a") as said, redirect_stdout(said), redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                said.flush()
                raise RuntimeError((folder / "said").read_text()) from end
    report = Report.from_dict(json.loads((out / "report.json").read_text()))
    names = sorted(os.listdir(out))
    bytes_ = [(out / n).read_bytes().hex() for n in ("model.safetensors", "plan.json")]
    return [names, bytes_, report_marks(report)]


SCENARIOS: dict[str, Scenario] = {
    "training": training,
    "cubic": pruned(
        Stage(
            Budget(units=0.4), schedule=Schedule("cubic", steps=3),
            finetune=replace(SGD, restore_best=True), max_drop=0.9,
        )
    ),
    "every": pruned(
        Stage(
            Budget(units=0.4), schedule=Schedule("linear", steps=3, every="4 steps"),
            finetune=Finetune(epochs=4, lr=0.02, lr_schedule="cosine"),
        )
    ),
    "descent": pruned(
        Stage(
            Budget(metric_drop=0.1), schedule=Schedule("exponential", steps=3),
            finetune=Finetune(epochs=1, lr=0.02),
        )
    ),
    "stages": pruned(
        Stage(
            Budget(units=0.5), granularity="weight", criterion="magnitude",
            schedule=Schedule("linear", steps=2), finetune=replace(SGD, epochs=1, distill=0.5),
        ),
        Stage("auto", finetune=replace(SGD, epochs=1), schedule=Schedule("exponential", steps=2)),
    ),
    "command": command,
}  # fmt: skip
