"""How masks are searched by Fisher information: what a stage and a recipe can say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from secateurs.errors import choose
from secateurs.posttraining.fisher_search import Tune, check_fisher
from secateurs.posttraining.scaling import DAMPING

__all__ = ["FisherSearch"]

Importance = Literal["loss", "any_output"]


@dataclass(frozen=True)
class FisherSearch:
    """What `search_masks` is to do; fields as there, but for `importance`.

    Args:
        importance: whose derivatives say what matters: "loss", that of the run; "any_output", for a
            network that has learned nearly all of the samples (`any_output`).

    Raises:
        ConfigError: a field is out of range, or no step reads it.

    Example:
        >>> FisherSearch(tune="scales").damping
        0.01
    """

    rearrange: bool = True
    tune: Tune | None = "weights"
    importance: Importance = "loss"
    shrink: float | None = None
    damping: float = DAMPING
    n_samples: int = 512

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.importance, get_args(Importance), "importance")
        check_fisher(self.rearrange, self.tune, self.shrink, self.damping, self.n_samples)
