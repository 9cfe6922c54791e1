"""Seeing, and changing, the activations at sites of the model during a plain run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.errors import ScoringError
from secateurs.types import Site

__all__ = ["Key", "Visit", "into_site_units", "key_of", "recomputing", "site_index", "site_values"]

Key = tuple[str, int, str, int, int]
"""(module, call, side, position, dim): sites of several targets may share one gate."""


def key_of(site: Site) -> Key:
    """What two sites must share to be the same place."""
    return site.module, site.call, site.side, site.position, site.dim


Visit = Callable[[Key, Any], Any]


@contextmanager
def site_values(
    model: nn.Module, sites: Sequence[Site], visit: Visit, again: Visit | None = None
) -> Iterator[dict[str, int]]:
    """Call `visit(key, tensor)` at each distinct site of every run; its result replaces the tensor.

    Activation checkpointing runs parts of the model once more inside the backward pass: there
    `again` is called instead, which must do to the tensor what `visit` did; None for nothing.

    Yields the calls of each module, to be cleared before each run. Hooks are gone at the end.

    Raises:
        ScoringError: a module that is called several times is run again by checkpointing, so that
            nobody can tell which of its calls that is.
    """
    keys: dict[str, list[Key]] = {}
    for key in dict.fromkeys(key_of(site) for site in sites):
        keys.setdefault(key[0], []).append(key)
    calls: dict[str, int] = {}

    def before(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            repeated = recomputing()
            if not repeated:
                calls[path] = calls.get(path, -1) + 1
            elif calls.get(path, 0) > 0:
                raise ScoringError(
                    f"{path} is called {calls[path] + 1} times and run again by activation "
                    "checkpointing; switch checkpointing off for scoring"
                )
            changed = list(args)
            for key in keys[path]:
                if key[2] == "input" and key[1] == calls[path] and key[3] < len(changed):
                    changed[key[3]] = act(repeated, key, changed[key[3]])
            return tuple(changed)

        return hook

    def after(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            wanted = [k for k in keys[path] if k[2] == "output" and k[1] == calls[path]]
            if not wanted:
                return output
            leaves, spec = pytree.tree_flatten(output)
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            for key in wanted:
                place = places[key[3]]
                leaves[place] = act(recomputing(), key, leaves[place])
            return pytree.tree_unflatten(leaves, spec)

        return hook

    def act(repeated: bool, key: Key, value: Any) -> Any:
        if not repeated:
            return visit(key, value)
        return value if again is None else again(key, value)

    with ExitStack() as stack:
        for path in keys:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(before(path)).remove)
            stack.callback(module.register_forward_hook(after(path)).remove)
        yield calls


def recomputing() -> bool:
    """Whether this runs inside a backward pass: activation checkpointing runs the model again."""
    return bool(torch._C._current_graph_task_id() != -1)


def site_index(site: Site) -> tuple[Tensor, Tensor]:
    """(positions along the dim, unit of each), int64."""
    index = torch.from_numpy(np.ascontiguousarray(site.index))
    return index, torch.from_numpy(np.ascontiguousarray(site.unit))


def into_site_units(rows: Tensor, site: Site, out: Tensor) -> Tensor:
    """Add values at the positions of a site to its units, in place.

    Args:
        rows: (..., size) values along the dim of the site.
        site: which position belongs to which unit.
        out: (..., n_units) of the same dtype and device.
    """
    index, unit = site_index(site)
    return out.index_add_(-1, unit.to(out.device), rows[..., index.to(rows.device)])
