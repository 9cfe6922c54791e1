"""What a user may ask for as a criterion: one, or several whose scores are combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateurs.criteria.registry import Criterion, get_criterion
from secateurs.errors import ConfigError, choose

__all__ = ["Combination", "CriterionLike", "get_combination"]

CriterionLike = str | Mapping[str, Any] | Criterion
HOWS = ("rank", "sum", "product")


@dataclass(frozen=True)
class Combination:
    """One criterion, or several whose scores become one.

    Attributes:
        parts: the criteria.
        how: "rank", "sum" or "product" (see `secateurs.scores.combine`); None for one criterion.
        weights: of the parts; None for equal.
    """

    parts: tuple[Criterion, ...]
    how: Literal["rank", "sum", "product"] | None = None
    weights: tuple[float, ...] | None = None

    @property
    def label(self) -> str:
        """The name with what was changed, or "rank(taylor, magnitude)"."""
        if self.how is None:
            return self.parts[0].label
        labels = [part.label for part in self.parts]
        if self.weights is not None:
            labels = [f"{w:g}*{label}" for w, label in zip(self.weights, labels, strict=True)]
        return f"{self.how}({', '.join(labels)})"

    @property
    def needs_loss(self) -> bool:
        """Whether any part needs targets and a loss."""
        return any(part.needs_loss for part in self.parts)

    @property
    def sees_labels(self) -> bool:
        """Whether any part looks at the targets."""
        return any("labels" in part.sees for part in self.parts)


def get_combination(spec: CriterionLike | Combination) -> Combination:
    """What a criterion argument asks for.

    Args:
        spec: as in `get_criterion`, or `{"combine": "rank", "of": ["taylor", "magnitude"],
            "weights": [2, 1]}`, where each part is given as in `get_criterion`.

    Raises:
        ConfigError: an unknown name, option or way to combine, or weights that do not fit.

    Example:
        >>> get_combination({"combine": "rank", "of": ["taylor", "magnitude"]}).label
        'rank(taylor, magnitude)'
        >>> get_combination("taylor").label
        'taylor'
    """
    if isinstance(spec, Combination):
        return spec
    if not isinstance(spec, Mapping) or "combine" not in spec:
        return Combination((get_criterion(spec),))
    for key in spec:
        choose(key, ("combine", "of", "weights"), "key of a combination")
    how = choose(str(spec["combine"]), HOWS, "combine")
    of, weights = spec.get("of"), spec.get("weights")
    if not isinstance(of, Sequence) or isinstance(of, str) or len(of) < 2:
        raise ConfigError(
            'a combination needs two or more criteria: {"combine": "rank", "of": '
            f'["taylor", "magnitude"]}}; got of={of!r}'
        )
    if weights is not None:
        numbers = isinstance(weights, Sequence) and all(
            isinstance(w, (int, float)) and not isinstance(w, bool) for w in weights
        )
        if not numbers or len(weights) != len(of):
            raise ConfigError(f"weights must be {len(of)} numbers, one for each part: {weights!r}")
        if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ConfigError(f"weights must be finite, not negative and not all 0: {weights!r}")
    return Combination(
        tuple(get_criterion(part) for part in of),
        how,  # type: ignore[arg-type]
        None if weights is None else tuple(map(float, weights)),
    )
