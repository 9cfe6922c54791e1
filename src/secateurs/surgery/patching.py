"""A second attempt at the module form: sizes that attention modules of users write down.

Modules that hold sliced projections as direct children, and an integer attribute of one of the
names below, get it scaled by what is left of their first projection. That is a guess about the
user's code: the result counts only if it equals the masked model numerically and call by call.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from secateurs.surgery.slicing import size_of

__all__ = ["PATCHED", "patch_sizes"]

HEADS = frozenset("num_heads n_heads n_head num_attention_heads".split())
KEY_HEADS = frozenset("num_key_value_heads num_kv_heads".split())
WIDTHS = frozenset("all_head_size embed_dim inner_dim hidden_size split_size attn_dim".split())
PATCHED = HEADS | KEY_HEADS | WIDTHS
"""Attributes of users' modules that may be set."""


def patch_sizes(model: nn.Module, dense: nn.Module) -> dict[str, dict[str, int]]:
    """Scale the attributes of modules whose projections were sliced, in place.

    Returns:
        {module path: {attribute: new value}}, only those that changed.
    """
    changed: dict[str, dict[str, int]] = {}
    before = dict(dense.named_modules())
    for path, module in model.named_modules():
        known = [a for a in sorted(PATCHED) if size_of(module, a) is not None]
        if type(module).__module__.startswith("torch.nn") or not known:
            continue
        widths = {
            name: (old, new)
            for name, child in module.named_children()
            if (old := _width(before[f"{path}.{name}".lstrip(".")])) and (new := _width(child))
        }
        if not widths:
            continue
        first = next(iter(widths.values()))
        keys = next((w for name, w in widths.items() if name.startswith("k")), first)
        for attribute in known:
            value = size_of(module, attribute)
            assert value is not None
            size = _scaled(attribute, value, *(keys if attribute in KEY_HEADS else first))
            if size is not None and size != value:
                setattr(module, attribute, size)
                changed.setdefault(path, {})[attribute] = size
    return changed


def _scaled(attribute: str, value: int, old: int, new: int) -> int | None:
    """The attribute for a projection that went from `old` to `new` outputs; None if unrelated."""
    if attribute in WIDTHS and old not in (value, 2 * value, 3 * value):
        return None
    fits = value > 0 and old % value == 0 and value * new % old == 0
    return value * new // old if fits and value * new >= old else None


def _width(module: Any) -> int | None:
    """Outputs of a projection."""
    if isinstance(module, nn.Linear):
        return int(module.weight.shape[0])
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return int(module.weight.shape[1]) if conv1d else None
