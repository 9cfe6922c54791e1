"""How masks are found from samples, without training: what a stage and a recipe can say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from secateurs.errors import choose
from secateurs.posttraining.choosing import BLOCK, DAMPING, Method, check_layerwise
from secateurs.posttraining.fisher_search import Tune, check_fisher
from secateurs.posttraining.scaling import DAMPING as SCALES_DAMPING

__all__ = ["FisherSearch", "LayerwiseCut"]

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
    damping: float = SCALES_DAMPING
    n_samples: int = 512

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        choose(self.importance, get_args(Importance), "importance")
        check_fisher(self.rearrange, self.tune, self.shrink, self.damping, self.n_samples)


@dataclass(frozen=True)
class LayerwiseCut:
    """What `prune_layerwise` is to do; fields as there.

    Raises:
        ConfigError: a field is out of range, or the method does not read it.

    Example:
        >>> LayerwiseCut("wanda")
        LayerwiseCut(method='wanda', block=128, damping=0.01)
    """

    method: Method = "sparsegpt"
    block: int = BLOCK
    damping: float = DAMPING

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_layerwise(self.method, self.block, self.damping)
