"""The state of every source of random numbers that a training may draw from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from secateurs.errors import ConfigError

__all__ = [
    "generator_states",
    "generators_of",
    "random_state",
    "set_generator_states",
    "set_random_state",
]


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
        "generators": generator_states(*loaders),
    }


def set_random_state(state: Mapping[str, Any], *loaders: Any) -> None:
    """Put back what `random_state` gave, for the same loaders."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    set_generator_states(state["generators"], *loaders)


def generator_states(*loaders: Any) -> list[torch.Tensor | None]:
    """The states of the generators that loaders hold, None where one is still to come."""
    generators = [place.generator for place in _places(*loaders)]
    return [None if g is None else g.get_state() for g in generators]


def set_generator_states(states: Sequence[torch.Tensor | None], *loaders: Any) -> None:
    """Put back what `generator_states` gave, for the same loaders.

    Samplers that make their generator when they are first read (those of accelerate) lose the one
    that was made since then, or get one whose state was held.
    """
    places = _places(*loaders)
    if len(places) != len(states):
        raise ConfigError(
            f"the batches have {len(places)} places for generators, the state is of batches with "
            f"{len(states)}: these are other loaders"
        )
    for place, state in zip(places, states, strict=True):
        if state is None:
            place.generator = None
            continue
        if place.generator is None:
            place.generator = torch.Generator()
        place.generator.set_state(state)


def generators_of(*loaders: Any) -> list[torch.Generator]:
    """The generators of loaders, their samplers and batch samplers, each once."""
    found = {id(place.generator): place.generator for place in _places(*loaders)}
    return [generator for generator in found.values() if generator is not None]


def _places(*loaders: Any) -> list[Any]:
    """The loaders, samplers and batch samplers that have a generator or can have one, each once."""
    found: dict[int, Any] = {}
    for loader in loaders:
        batched = getattr(loader, "batch_sampler", None)
        near = (loader, getattr(loader, "sampler", None), batched,
                getattr(batched, "sampler", None))  # fmt: skip
        for place in near:
            held = getattr(place, "generator", "nothing of that name")
            if held is None or isinstance(held, torch.Generator):
                found.setdefault(id(place), place)
    return list(found.values())
