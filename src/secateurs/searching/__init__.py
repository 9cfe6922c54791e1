"""Search: choose thresholds, budgets, criteria and allocation by cross-validation.

    search(recipe, out=...) ── all of the below ──> SearchResult, and files

    Search, Problem ── prepare ──> Trials to run: evaluate(candidate, fold) -> FoldResult
    run_study ── all folds of all candidates ──> [Trial]
    [Trial] ── decide ──> SearchResult: the choice in words
    conclude ── the chosen network, the test split read once

Only training and validation data are seen until the choice is made. Names are loaded when they are
used: the processes that only keep a study need no torch, and the statistics need no Optuna.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateurs.searching.evaluation import conclude as conclude
    from secateurs.searching.evaluation import prepare as prepare
    from secateurs.searching.results import SearchResult as SearchResult
    from secateurs.searching.run import search as search
    from secateurs.searching.study import run_study as run_study
    from secateurs.searching.study import study_trials as study_trials

_PLACES = {
    "SearchResult": "results",
    "conclude": "evaluation",
    "prepare": "evaluation",
    "run_study": "study",
    "search": "run",
    "study_trials": "study",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
