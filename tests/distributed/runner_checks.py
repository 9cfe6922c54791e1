"""A recipe of a built-in task in several processes: its network, its data, its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateurs.distributed import assert_same
from secateurs.errors import MissingDependencyError
from secateurs.recipe import parse_recipe
from secateurs.runner import load_problem, run_recipe
from secateurs.tasks import get_task
from tests.distributed.cases import raised, ranks

RECIPE = {
    "task": "digits-mlp", "budget": {"macs": 0.5}, "schedule": {"curve": "linear", "steps": 1},
    "finetune": {"steps": 2}, "latency": [1],
}  # fmt: skip


def check_a_task_deals_out_its_batches_and_trains_once(folder: Path) -> None:
    rank, size = ranks()
    task = get_task("digits-mlp")
    recipe = parse_recipe(RECIPE, "r.yaml", folder)
    whole = task.load(0)

    def dense(*given: Any, **options: Any) -> Any:
        assert rank == 0
        model = task.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        return model.eval(), whole, False

    def fails(*given: Any, **options: Any) -> Any:
        raise MissingDependencyError("the data is not installed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateurs.runner.problem.dense_checkpoint", fails)
        said = raised(MissingDependencyError, lambda: load_problem(recipe, group="world"))
        assert "the data is not installed" in said
        patch.setattr("secateurs.runner.problem.dense_checkpoint", dense)
        found = load_problem(recipe, group="world")
    assert_same(dict(found.model.named_parameters()), "world")
    assert not found.model.training
    assert found.sizes == whole.sizes
    assert [y.tolist() for _, y in found.train] == [
        y.tolist() for _, y in list(whole.train)[rank::size]
    ]
    assert len(list(found.validation)) == len(whole.validation)
    result = run_recipe(recipe, found, group="world")
    assert_same(result.report.to_dict(), "world")
    assert result.report.title == "digits-mlp"
