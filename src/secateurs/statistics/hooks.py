"""Seeing, and changing, the activations at sites of the model during a plain run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.types import Site

__all__ = ["Key", "into_site_units", "key_of", "site_index", "site_values"]

Key = tuple[str, int, str, int, int]
"""(module, call, side, position, dim): sites of several targets may share one gate."""


def key_of(site: Site) -> Key:
    """What two sites must share to be the same place."""
    return site.module, site.call, site.side, site.position, site.dim


@contextmanager
def site_values(model: nn.Module, sites: Sequence[Site], visit: Any) -> Iterator[dict[str, int]]:
    """Call `visit(key, tensor)` at each distinct site of every run; its result replaces the tensor.

    Yields the calls of each module, to be cleared before each run. Hooks are gone at the end.
    """
    keys: dict[str, list[Key]] = {}
    for key in dict.fromkeys(key_of(site) for site in sites):
        keys.setdefault(key[0], []).append(key)
    calls: dict[str, int] = {}

    def before(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            calls[path] = calls.get(path, -1) + 1
            changed = list(args)
            for key in keys[path]:
                if key[2] == "input" and key[1] == calls[path] and key[3] < len(changed):
                    changed[key[3]] = visit(key, changed[key[3]])
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
                leaves[places[key[3]]] = visit(key, leaves[places[key[3]]])
            return pytree.tree_unflatten(leaves, spec)

        return hook

    with ExitStack() as stack:
        for path in keys:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(before(path)).remove)
            stack.callback(module.register_forward_hook(after(path)).remove)
        yield calls


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
