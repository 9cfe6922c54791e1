"""What a cut layer by layer can see of a model: the rest is left whole, and named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from secateurs.allocation.problem import MissedBudget
from secateurs.errors import ConfigError
from secateurs.pipeline.stage import Stage
from secateurs.posttraining.layerwise import whole_weights
from secateurs.types import Batches, Exclusion, Graph

__all__ = ["naming_whole", "only_seen"]

BY = "layerwise: "
"""How the reasons begin."""


def only_seen(graph: Graph, model: nn.Module, batches: Batches) -> Graph:
    """The graph without the weights that `prune_layerwise` leaves whole; they are excluded.

    Raises:
        ConfigError: it can see none of them.
    """
    weights = [t.name for t in graph.select("weight")]
    found = whole_weights(model, batches)
    whole = {name: found[name] for name in weights if name in found}
    if weights and len(whole) == len(weights):
        reasons = "".join(f"\n  {name}: {why}" for name, why in whole.items())
        raise ConfigError(f"layerwise= can see no layer of this model: leave it away{reasons}")
    targets = {name: target for name, target in graph.targets.items() if name not in whole}
    excluded = [Exclusion(name, BY + why) for name, why in whole.items()]
    return replace(graph, targets=targets, excluded=(*graph.excluded, *excluded))


@contextmanager
def naming_whole(stage: Stage, graph: Graph) -> Iterator[None]:
    """A budget that is missed layer by layer is told with the weights that are left whole."""
    try:
        yield
    except MissedBudget as error:
        whole = [e for e in graph.excluded if e.reason.startswith(BY)]
        if stage.layerwise is None or not whole:
            raise
        names = ", ".join(f"{e.name} ({e.reason.removeprefix(BY)})" for e in whole)
        raise MissedBudget(f"{error}; layerwise leaves whole: {names}", error.nearest) from error
