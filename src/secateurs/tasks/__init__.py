"""Ready-made problems on real data, for the command line, the documentation and the benchmarks.

    task = get_task("digits-cnn")
    model, data, from_cache = dense_checkpoint(task, seed=0)
    task.metric(model, data.validation)

`TASKS` is the one list of them; `available(task)` says what must be installed for it. Nothing is
downloaded when a task runs.
"""

from secateurs.tasks import catalogue as catalogue  # fills the registry
from secateurs.tasks.base import TASKS, Data, Metric, Task, TrainRecipe, available, get_task, task
from secateurs.tasks.data import Source, Splits
from secateurs.tasks.training import dense_checkpoint, train_dense

__all__ = [
    "TASKS",
    "Data",
    "Metric",
    "Source",
    "Splits",
    "Task",
    "TrainRecipe",
    "available",
    "dense_checkpoint",
    "get_task",
    "task",
    "train_dense",
]
