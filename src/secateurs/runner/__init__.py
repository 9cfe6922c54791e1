"""Run a recipe: from names to a model and data, through the pipeline, to a directory of results.

    Recipe -> Problem (model, data, loss, metric) -> PruneResult -> files

Used by the command line, the benchmarks and the examples. Everything that can be wrong with a
recipe is found before anything expensive.
"""

from secateurs.runner.problem import Problem, load_problem
from secateurs.runner.results import (
    RESULTS,
    check_output,
    is_complete,
    is_finished,
    write_results,
)
from secateurs.runner.run import check_recipe, run_recipe, suggestions

__all__ = [
    "RESULTS",
    "Problem",
    "check_output",
    "check_recipe",
    "is_complete",
    "is_finished",
    "load_problem",
    "run_recipe",
    "suggestions",
    "write_results",
]
