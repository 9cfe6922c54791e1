"""The ground of a search: what each fold prunes, trains and judges with.

    lay(recipe, problem, search, base) -> Ground      ground.part(fold) -> Part

Two modes. "refit": the samples of training and validation are pooled, and each fold trains a dense
network of its own on its training part: cross-validation of everything that follows the choice.
"fixed": the dense network is given and has seen the training data, so only validation data can
judge; its folds are judged by networks that were pruned with the training data and other seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateurs.errors import ConfigError, DataError
from secateurs.imports import import_function
from secateurs.pipeline.request import random_state
from secateurs.recipe import Recipe
from secateurs.runner import Problem
from secateurs.searching.config import Folds, Search
from secateurs.searching.holdout import LockedSplit, check_copies, copies, sample_keys
from secateurs.searching.splits import Fold, Samples, divide, gather
from secateurs.surgery.verification import copied
from secateurs.tasks import Data, get_task
from secateurs.tasks.base import CALIBRATION_BATCH, N_CALIBRATION
from secateurs.tasks.training import cache_dir, checksum, kept, trained_once
from secateurs.types import Batches, IntArray

__all__ = ["Ground", "Part", "lay", "seed_of"]

INNER = 0.15
"""Share of a fold's training part that decides when to stop, where the recipe needs that."""


def seed_of(*parts: Any) -> int:
    """A seed from plain data: the same parts give the same seed, in any process and order.

    Example:
        >>> seed_of({"a": 1, "b": 2}, 0) == seed_of({"b": 2, "a": 1}, 0) != seed_of({"a": 1}, 0)
        True
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@dataclass(frozen=True, eq=False)
class Part:
    """One fold, ready for pruning.

    Attributes:
        dense: network to prune, in eval mode; has seen none of `held`.
        train, calibration: to heal and to score with.
        inner: for decisions during pruning (when to stop); None where none are asked for.
        held: to judge on.
        halves: `held` in two.
        n_held: samples in `held`.
    """

    dense: nn.Module
    train: Batches
    calibration: Batches
    inner: Batches | None
    held: Batches
    halves: tuple[Batches, Batches]
    n_held: int


@dataclass(eq=False)
class Ground:
    """Samples and folds of a search; networks are trained when they are asked for.

    Attributes:
        search: with its mode settled.
        folds: over `samples`.
        samples: the pool ("refit") or the validation data ("fixed").
        lock: of the test split.
        notes: what a reader should know.
        data_key: a hash of all samples.
    """

    search: Search
    problem: Problem
    folds: list[Fold]
    samples: Samples
    held_batch: int
    lock: LockedSplit
    notes: tuple[str, ...]
    data_key: str
    groups: Sequence[Any] | None = None
    decides: bool = False
    train_dense: Callable[[list[Any], list[Any], int], nn.Module] | None = None
    _part: tuple[int, Part] | None = field(default=None, repr=False)

    @property
    def overlap(self) -> float:
        """Mean share of held-out over training samples; 0 where the dense network is given."""
        if self.search.mode == "fixed":
            return 0.0
        return float(np.mean([len(f.held) / len(np.unique(f.train)) for f in self.folds]))

    @property
    def n_judged(self) -> int:
        """Different samples in all held-out parts."""
        return len(np.unique(np.concatenate([f.held for f in self.folds])))

    def part(self, number: int) -> Part:
        """What a fold prunes and judges with; the last one stays in memory."""
        if self._part is None or self._part[0] != number:
            make = self._refit_part if self.search.mode == "refit" else self._fixed_part
            self._part = number, make(self.folds[number])
        return self._part[1]

    def _refit_part(self, fold: Fold) -> Part:
        order = np.random.default_rng([self.search.folds.seed, fold.number]).permutation(fold.train)
        train, inner = self._without_inner(order) if self.decides else (order, None)
        batches = self.samples.batches(train)
        first = self.samples.batches(train[:N_CALIBRATION], CALIBRATION_BATCH)
        assert self.train_dense is not None
        return Part(
            dense=self.train_dense(batches, first, fold.number),
            train=batches,
            calibration=first,
            inner=None if inner is None else self.samples.batches(inner, self.held_batch),
            **self._held(fold.held),
        )

    def _fixed_part(self, fold: Fold) -> Part:
        return Part(
            dense=copied(self.problem.model).eval(),
            train=self.problem.train,
            calibration=self.problem.calibration,
            inner=self.samples.batches(fold.train, self.held_batch) if self.decides else None,
            **self._held(fold.held),
        )

    def _held(self, held: IntArray) -> dict[str, Any]:
        some = partial(self.samples.batches, size=self.held_batch)
        middle = max(1, len(held) // 2)
        rest = held[middle:] if len(held) > 1 else held
        return {
            "held": some(held), "halves": (some(held[:middle]), some(rest)), "n_held": len(held)
        }  # fmt: skip

    def _without_inner(self, order: IntArray) -> tuple[IntArray, IntArray]:
        """Training samples, and those that decide when to stop; none (and no group) in both."""
        units = order
        if self.groups is not None:
            names = {name: i for i, name in enumerate(dict.fromkeys(map(str, self.groups)))}
            units = np.array([names[str(self.groups[i])] for i in order])
        several = list(dict.fromkeys(units.tolist()))
        chosen = np.isin(units, several[: max(1, round(INNER * len(several)))])
        if chosen.all():
            raise DataError("a fold has too few samples to decide when to stop; lower folds.k")
        return order[~chosen], np.array(list(dict.fromkeys(order[chosen].tolist())), np.int64)


def lay(
    recipe: Recipe,
    problem: Problem,
    *,
    decides: bool = False,
    base: Path | None = None,
) -> Ground:
    """Read the data, lock the test split, look for copies, and divide.

    Args:
        recipe: with a search.
        problem: from `load_problem`.
        decides: whether pruning takes decisions by a metric along the way.
        base: directory of the recipe, where the user's own files are looked for.

    Raises:
        ConfigError: the mode cannot be had.
        DataError: test samples occur in other data, or the data cannot be divided.
    """
    assert recipe.search is not None
    search = _settled(recipe, recipe.search)
    with random_state(seed_of(recipe.seed, "read")):
        keys = {
            name: sample_keys(getattr(problem, name))
            for name in ("train", "validation", "test", "calibration")
        }
        validation = gather(problem.validation, "validation")
        samples = validation
        if search.mode == "refit":
            samples = gather(problem.train, "training").joined(validation)
    notes = list(
        check_copies(
            keys["test"],
            {"training": keys["train"], "validation": keys["validation"],
             "calibration": keys["calibration"]},
            allowed=search.copies == "note",
        )
    )  # fmt: skip
    kept_rows = np.arange(samples.n)
    if search.mode == "fixed":
        seen = copies(keys["validation"], keys["train"])
        kept_rows = np.setdiff1d(kept_rows, seen)
        if seen:
            notes.append(
                f"{len(seen)} validation samples are exact copies of training samples, which the "
                "dense network has seen: they judge nothing"
            )
    groups = _groups(search.folds, problem, search.mode, samples.n, base)
    labels = samples.labels
    folds = divide(
        len(kept_rows), search.folds,
        None if labels is None else labels[kept_rows],
        None if groups is None else [groups[int(i)] for i in kept_rows],
    )  # fmt: skip
    folds = [Fold(f.number, kept_rows[f.train], kept_rows[f.held]) for f in folds]
    if search.mode == "refit":
        notes += _twins(samples.keys, folds)
    everything = hashlib.sha256(b"".join(key for part in keys.values() for key in part))
    ground = Ground(
        search=search, problem=problem, folds=folds, samples=samples,
        held_batch=validation.batch_size, lock=LockedSplit(problem.test), notes=tuple(notes),
        data_key=everything.hexdigest()[:16], groups=groups, decides=decides,
    )  # fmt: skip
    ground.problem = replace(problem, test=ground.lock)
    if search.mode == "refit":
        ground.train_dense = _trainer(recipe, ground.problem, base)
    return ground


def _settled(recipe: Recipe, search: Search) -> Search:
    """The search with the mode that "auto" means."""
    can = recipe.task is not None or recipe.fit is not None
    mode = search.mode if search.mode != "auto" else "refit" if can else "fixed"
    if mode == "refit" and not can:
        raise ConfigError(
            "search.mode: refit trains new dense networks, and this recipe names no way to: add "
            "fit: module:function, where fit(batches) returns a trained network, or mode: fixed"
        )
    if mode == "fixed" and search.folds.kind == "bootstrap":
        raise ConfigError(
            "folds: bootstrap resamples what the dense network is trained on, and here it is "
            "given (mode: fixed); take kind: stratified or kfold"
        )
    return search.with_mode(mode)


def _twins(keys: Sequence[bytes], folds: Sequence[Fold]) -> list[str]:
    """A note where held-out samples have an exact copy in the training part of their fold."""
    found = sum(
        len(copies([keys[i] for i in f.held], [keys[i] for i in f.train])) for f in folds
    )  # fmt: skip
    return [
        f"{found} held-out samples have an exact copy in the training part of their fold: the "
        "metrics of the folds are a little too good, for dense and smaller networks alike"
    ] if found else []  # fmt: skip


def _groups(
    folds: Folds, problem: Problem, mode: str, n: int, base: Path | None
) -> Sequence[Any] | None:
    """The group of each sample that is divided."""
    if folds.kind != "grouped":
        return None
    given: Any = problem.groups
    if folds.groups is not None:
        given = import_function(folds.groups, "folds.groups", base)()
    names = ("train", "validation") if mode == "refit" else ("validation",)
    if given is None or not isinstance(given, Mapping) or any(name not in given for name in names):
        got = "nothing" if given is None else f"a {type(given).__name__}"
        raise DataError(
            'grouped folds need the group of each sample: let data() return "groups": '
            '{"train": [...], "validation": [...]}, or name a function that returns this in '
            f"folds: {{kind: grouped, groups: module:function}}; got {got}"
        )
    found = [group for name in names for group in given[name]]
    if len(found) != n:
        raise DataError(f"groups has {len(found)} entries for {n} samples; one each is needed")
    return found


def _trainer(
    recipe: Recipe, problem: Problem, base: Path | None
) -> Callable[[list[Any], list[Any], int], nn.Module]:
    """`train(batches, calibration, fold)`: a dense network, from the cache if it was trained."""
    if recipe.task is not None:
        task = get_task(recipe.task)
        example = problem.example_inputs
        assert isinstance(example, torch.Tensor)

        def by_task(batches: list[Any], first: list[Any], fold: int) -> nn.Module:
            data = Data(batches, first, [], [], example, {})
            seed = seed_of(recipe.seed, "dense", fold)
            return trained_once(task, data, seed, f"{recipe.seed}-fold{fold}")[0]

        return by_task

    assert recipe.fit is not None
    fit, source = import_function(recipe.fit, "fit", base), recipe.fit

    def by_function(batches: list[Any], first: list[Any], fold: int) -> nn.Module:
        seed = seed_of(recipe.seed, "dense", fold)
        digest = hashlib.sha256(json.dumps([source, recipe.model, seed]).encode())
        for text in (torch.__version__, version("secateurs"), *_sources(fit)):
            digest.update(text.encode())
        for key in sample_keys(batches):
            digest.update(key)
        digest.update(checksum(problem.model.state_dict()).encode())
        path = cache_dir() / f"{problem.name}-fold{fold}-{digest.hexdigest()[:12]}.safetensors"

        def train() -> nn.Module:
            with random_state(seed):
                found = fit(batches)
            _check_fitted(found, problem.model, source)
            return copied(found).eval()

        return kept(path.with_name(path.name.replace(":", "-")), problem.name,
                    lambda: copied(problem.model), train)[0]  # fmt: skip

    return by_function


def _sources(function: Callable[..., Any]) -> list[str]:
    """The file of a user's function: another text may train another network."""
    code = getattr(function, "__code__", None)
    file = Path(code.co_filename) if code is not None else None
    return [file.read_text(encoding="utf-8")] if file is not None and file.is_file() else []


def _check_fitted(found: Any, model: nn.Module, source: str) -> None:
    if not isinstance(found, nn.Module):
        raise ConfigError(
            f"fit: {source} returned {type(found).__name__}; it must return the network that it "
            "trained on the batches"
        )
    if found is model:
        raise ConfigError(f"fit: {source} must build a new network, not train the given one on")
    shapes = [{n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (found, model)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"fit: {source} must return a network of the architecture of model:")
