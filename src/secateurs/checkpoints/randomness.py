"""The state of every source of random numbers that a training may draw from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["generators_of", "random_state", "set_random_state"]


def random_state(*loaders: Any) -> dict[str, Any]:
    """States of torch (all devices in use), numpy, Python, and generators that loaders hold.

    Args:
        *loaders: batches; of a DataLoader its `generator` and those of its samplers count.
    """
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": (version, np.array(words, dtype=np.int64), gauss),
        "generators": [g.get_state() for g in generators_of(*loaders)],
    }


def set_random_state(state: Mapping[str, Any], *loaders: Any) -> None:
    """Put back what `random_state` gave, for the same loaders."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    for generator, held in zip(generators_of(*loaders), state["generators"], strict=True):
        generator.set_state(held)


def generators_of(*loaders: Any) -> list[torch.Generator]:
    """The generators of loaders, their samplers and batch samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batched = getattr(loader, "batch_sampler", None)
        places = (loader, getattr(loader, "sampler", None), batched,
                  getattr(batched, "sampler", None))  # fmt: skip
        for place in places:
            generator = getattr(place, "generator", None)
            if isinstance(generator, torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())
