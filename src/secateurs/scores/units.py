"""The units that scores speak of: checked, narrowed, and lined up for several scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, ScoringError
from secateurs.filters import Patterns
from secateurs.types import Scores, Target, WeightTarget

__all__ = [
    "GONE",
    "Aligned",
    "aligned",
    "check_scores",
    "facts_of",
    "facts_text",
    "labelled",
    "ranks",
    "spoken_of",
    "subset",
]

GONE = float("-inf")
"""Score of a unit that was removed earlier."""


def check_scores(scores: Scores) -> None:
    """Check that scores are what `Scores` promises; all problems at once.

    Raises:
        ConfigError: a target that the graph does not have, another type or shape.
        ScoringError: a score is nan or inf.
    """
    wrong, bad = [], []
    for name, line in scores.values.items():
        target = scores.graph.targets.get(name)
        if target is None:
            wrong.append(f"{name}: the graph has no such target")
        elif line.dtype != torch.float32 or line.shape != (target.n_units,):
            got = f"{str(line.dtype).removeprefix('torch.')} of shape {tuple(line.shape)}"
            wrong.append(f"{name}: must be float32 of shape ({target.n_units},), got {got}")
        elif bool((line.isnan() | (line == float("inf"))).any()):
            bad.append(name)
    unknown = [name for name in scores.not_scored if name not in scores.graph.targets]
    wrong += [f"{name} (not scored): the graph has no such target" for name in unknown]
    if wrong:
        problems = "\n  ".join(sorted(wrong))
        raise ConfigError(f"scores {scores.criterion!r} do not fit their graph:\n  {problems}")
    if bad:
        names = ", ".join(sorted(bad))
        raise ScoringError(f"scores {scores.criterion!r}: nan or inf in {names}; score them again")


def spoken_of(scores: Scores, name: str) -> bool:
    """Whether a target is scored, or listed as not scored."""
    return name in scores.values or name in scores.not_scored


def facts_of(target: Target) -> dict[str, Any]:
    """Kind and shape: what must be the same for scores to mean the same units."""
    shape = target.shape if isinstance(target, WeightTarget) else (target.n_units,)
    return {"kind": target.kind, "shape": list(shape)}


def facts_text(facts: dict[str, Any] | None) -> str:
    """In words: "neuron (6,)"."""
    return "nothing" if facts is None else f"{facts['kind']} {tuple(facts['shape'])}"


def subset(
    scores: Scores,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    model: nn.Module | None = None,
) -> Scores:
    """The scores of fewer targets, with their graph narrowed in the same way.

    Args:
        scores: stay as they are.
        include, exclude, model: patterns as in `Graph.only`.

    Raises:
        ConfigError: no pattern, one that matches no target, or no scored target is left.

    Example:
        >>> from secateurs.types import Graph
        >>> graph = Graph({n: WeightTarget(n, (1, 2)) for n in ("fc.weight", "head.weight")})
        >>> scores = Scores(graph, {n: torch.ones(2) for n in graph.targets}, "magnitude")
        >>> list(subset(scores, exclude="head").values)
        ['fc.weight']
    """
    if include is None and exclude is None:
        raise ConfigError("subset needs include=, exclude= or both")
    graph = scores.graph
    spoken = {name: t for name, t in graph.targets.items() if spoken_of(scores, name)}
    replace(graph, targets=spoken).only(include, exclude, model)  # a pattern must match a score
    fewer = graph.only(include, exclude, model)
    values = {name: v for name, v in scores.values.items() if name in fewer.targets}
    if not values:
        raise ConfigError("include and exclude leave no scored target; name more in include")
    silent = {name: why for name, why in scores.not_scored.items() if name in fewer.targets}
    return replace(scores, graph=fewer, values=values, not_scored=silent)


@dataclass(frozen=True, eq=False)
class Aligned:
    """Units that all scores still have, one behind the other.

    Attributes:
        names: of the targets.
        alive: (n_units of all targets,) bool, False = removed earlier in any of the scores.
        sizes: units of each target.
        lines: for each of the scores its (n_alive,) values.
        notes: in what the scores differ.
    """

    names: tuple[str, ...]
    alive: Tensor
    sizes: tuple[int, ...]
    lines: tuple[Tensor, ...]
    notes: tuple[str, ...]


def labelled(
    several: Sequence[Scores] | Mapping[str, Scores], verb: str
) -> tuple[list[str], list[Scores]]:
    """Labels (the keys of a mapping, else the criteria) and scores of at least two."""
    parts = list(several.values()) if isinstance(several, Mapping) else list(several)
    labels = list(several) if isinstance(several, Mapping) else [""] * len(parts)
    other = [type(s).__name__ for s in parts if not isinstance(s, Scores)]
    if len(parts) < 2 or other:
        got = f"a {other[0]} among them" if other else str(len(parts))
        raise ConfigError(f"{verb} needs two or more Scores in a list or dict, got {got}")
    return [label or s.criterion for label, s in zip(labels, parts, strict=True)], parts


def aligned(labels: Sequence[str], several: Sequence[Scores]) -> Aligned:
    """The same units of all scores; labels are for messages.

    Raises:
        ConfigError: they have other targets, or no unit is left.
        ScoringError: a score is nan or inf.
    """
    for scores in several:
        check_scores(scores)
    names = _common_targets(labels, several)
    whole = [torch.cat([s.values[name].cpu() for name in names]) for s in several]
    alive = torch.stack([line != GONE for line in whole]).all(dim=0)
    if not bool(alive.any()):
        raise ConfigError("there is no unit left to compare: all were removed earlier")
    notes = []
    if any(bool((line[~alive] != GONE).any()) for line in whole):
        notes.append("units that any of the scores counts as removed earlier are left out of all")
    seen = [(label, s.n_samples) for label, s in zip(labels, several, strict=True) if s.n_samples]
    if len({n for _, n in seen}) > 1:
        counted = ", ".join(f"{label} {n:,}" for label, n in seen)
        notes.append(f"different numbers of samples: {counted}")
    sizes = tuple(len(several[0].values[name]) for name in names)
    return Aligned(names, alive, sizes, tuple(line[alive] for line in whole), tuple(notes))


def _common_targets(labels: Sequence[str], several: Sequence[Scores]) -> tuple[str, ...]:
    """The targets, which must be the same for all, with all differences in one error."""
    names = list(dict.fromkeys(name for s in several for name in s.values))
    differ = []
    for name in names:
        found = [facts_of(s.graph.targets[name]) if name in s.values else None for s in several]
        if any(facts != found[0] for facts in found):
            texts = [
                f"{label} {facts_text(facts)}" + _because(s, name)
                for label, s, facts in zip(labels, several, found, strict=True)
            ]
            differ.append(f"{name}: {', '.join(texts)}")
    if differ:
        raise ConfigError(
            "these scores are not of the same targets; score the same model with each, and take "
            "the targets that all have with subset:\n  " + "\n  ".join(sorted(differ))
        )
    if not names:
        raise ConfigError("there are no scores: no target has any")
    return tuple(names)


def _because(scores: Scores, name: str) -> str:
    return f" ({scores.not_scored[name]})" if name in scores.not_scored else ""


def ranks(line: Tensor) -> Tensor:
    """(n,) float64 ranks from 1 for the smallest; equal values share the mean of theirs."""
    _, group, sizes = torch.unique(line, return_inverse=True, return_counts=True)
    mean: Tensor = sizes.cumsum(0).double() - (sizes - 1) / 2
    return mean[group]
