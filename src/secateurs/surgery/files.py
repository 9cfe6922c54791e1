"""Portable files: a directory with `model.safetensors` and `plan.json`, no pickle anywhere.

`plan.json` says what was removed from which dense shapes; the module form is rebuilt from the
user's factory by slicing those tensors and setting the recorded sizes, without capturing anything.
The graph form stores its operators in `graph.json` and needs no factory. Tensors with many zeros
are stored as a bitmask and their values, which is what makes a sparse model smaller on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.errors import ConfigError, FileFormatError, SoundnessError
from secateurs.masks import named_tensors
from secateurs.surgery.graph_file import graph_from_dict, graph_to_dict
from secateurs.surgery.graph_form import PrunedGraph
from secateurs.surgery.layers import REMOVED, replace_module_
from secateurs.surgery.patching import PATCHED
from secateurs.surgery.shrinking import INFO, ShrinkInfo, info_of, slice_masks
from secateurs.surgery.slicing import set_size_, slice_module_, takes_size
from secateurs.surgery.storage import (
    BUFFER,
    MASK,
    stored_tensors,
    unpack,
    unpack_bits,
)
from secateurs.surgery.verification import Verification
from secateurs.tensorfiles import read_tensors, write_tensors
from secateurs.types import Plan

__all__ = ["load", "load_plan", "plan_from_dict", "plan_to_dict", "save"]

FORMAT = 1
LARGEST = 2**34
"""Entries of the largest tensor whose mask is read."""
MODEL, PLAN, GRAPH = "model.safetensors", "plan.json", "graph.json"


def save(small: nn.Module, plan: Plan, directory: str | Path, *, force: bool = False) -> Path:
    """Write a result of `shrink` and its plan to a directory.

    Args:
        small: from `shrink` (fine-tuned since, if you like).
        plan: the plan it was made with.
        directory: created; must be empty of earlier results unless `force`.
        force: overwrite earlier results.

    Returns:
        The directory.

    Raises:
        ConfigError: the directory holds results already, or the model is no result of `shrink`.
    """
    info = info_of(small)
    out = Path(directory)
    if not force and any((out / name).exists() for name in (MODEL, PLAN)):
        raise ConfigError(f"{out} already holds a pruned model; choose another or pass force=True")
    out.mkdir(parents=True, exist_ok=True)
    description = {
        **plan_to_dict(plan),
        "form": info.form,
        "attributes": {k: dict(v) for k, v in info.attributes.items()},
        "verification": info.verification.to_dict(),
        "notes": list(info.notes),
        "settled": info.settled,
        "training": small.training,
        "other_mode": [p for p, m in small.named_modules() if m.training != small.training],
        "frozen": [n for n, p in small.named_parameters() if not p.requires_grad],
    }
    _check_state(small)
    if isinstance(small, PrunedGraph):
        _write_text(out / GRAPH, json.dumps(graph_to_dict(small)))
    else:
        (out / GRAPH).unlink(missing_ok=True)  # of an earlier result
    stored = stored_tensors(small, slice_masks(plan))
    write_tensors(out / MODEL, stored)
    _write_text(out / PLAN, json.dumps(description, indent=1))
    return out


def _check_state(small: nn.Module) -> None:
    held = small.state_dict()
    other = sorted(name for name, value in held.items() if not isinstance(value, Tensor))
    if other:
        raise ConfigError(f"only tensors can be saved without pickle; the state dict holds {other}")


def load(directory: str | Path, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Rebuild a saved smaller model; its outputs are bit-identical to those of the saved one.

    Args:
        directory: written by `save`.
        factory: builds the dense model's class with the original sizes (weights are ignored).
            Not needed for the graph form.

    Raises:
        FileFormatError: a file is missing, truncated, of another version or inconsistent.
        ConfigError: the module form was saved and no factory is given.
        SoundnessError: the factory builds another architecture than the plan was made for.
    """
    path = Path(directory)
    description = _read_json(path / PLAN)
    plan = plan_from_dict(description, path / PLAN)
    tensors, _ = read_tensors(path / MODEL)
    state = unpack(tensors, path / MODEL)
    if description.get("form") == "graph":
        model: nn.Module = graph_from_dict(_read_json(path / GRAPH), state, path / GRAPH)
    else:
        if factory is None:
            raise ConfigError(
                f"{path} holds the module form: pass factory=, a function that builds the dense "
                "model, as in load(directory, MyNet)"
            )
        model = factory()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"factory must return a torch module, got {type(model).__name__}")
        _check_architecture(model, plan)
        slice_module_(model, plan.kept)
        _set_attributes(model, description.get("attributes", {}), path / PLAN)
    _fill(model, state, path / MODEL)
    _fill_buffers(model, tensors, path / MODEL)
    _set_modes(model, description, path / PLAN)
    setattr(model, INFO, _info(description, path / PLAN))
    return model


def load_plan(directory: str | Path) -> Plan:
    """The plan in a directory written by `save`, with its masks.

    Raises:
        FileFormatError: a file is missing, truncated or of another version.
    """
    path = Path(directory)
    plan = plan_from_dict(_read_json(path / PLAN), path / PLAN)
    tensors, _ = read_tensors(path / MODEL)
    held = {name: tuple(t.shape) for name, t in unpack(tensors, path / MODEL).items()}
    masks: dict[str, Tensor] = {}
    for name, shape in plan.shapes.items():
        index = plan.kept.get(name, {})
        small = tuple(len(index[d]) if d in index else n for d, n in enumerate(shape))
        if held.get(name, small) != small or prod(shape) > LARGEST:
            raise FileFormatError(
                f"{path / PLAN}: shape {shape} of {name} does not fit the weights"
            )
        masks[name] = torch.ones(shape, dtype=torch.bool)
        if name + MASK in tensors:
            try:
                part = unpack_bits(tensors[name + MASK], small)
            except RuntimeError as error:
                raise FileFormatError(f"{path / MODEL}: mask of {name}: {error}") from error
            masks[name] = _embed(part, shape, index)
    for name, dims in plan.kept.items():
        for dim, kept in dims.items():
            inside = torch.zeros(plan.shapes[name][dim], dtype=torch.bool)
            inside[kept] = True
            view = [-1 if d == dim else 1 for d in range(len(plan.shapes[name]))]
            masks[name] = masks[name] & inside.view(view)
    removed = dict(plan.removed)
    for name in plan.reasons:  # weights: what their mask removes, removed rows included
        if name in masks and name not in removed:
            removed[name] = (~masks[name]).reshape(-1).nonzero().reshape(-1)
    masks |= {name: mask.clone() for name, mask in plan.masks.items()}  # of layers
    return replace(plan, masks=masks, removed=removed)


def _embed(part: Tensor, shape: tuple[int, ...], kept: Any) -> Tensor:
    """A small mask back at its dense positions, removed positions False."""
    full = torch.zeros(shape, dtype=torch.bool)
    grids = torch.meshgrid(
        *[kept[d] if d in kept else torch.arange(n) for d, n in enumerate(shape)], indexing="ij"
    )
    full[grids] = part
    return full


# -- the plan as JSON ----------------------------------------------------------------------


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Everything of a plan but its weight masks, which are bits beside the weights."""
    return {
        "format": FORMAT,
        "granularity": list(plan.granularity),
        "kept": {
            name: {str(dim): index.tolist() for dim, index in dims.items()}
            for name, dims in plan.kept.items()
        },
        "removed": {
            name: units.tolist() for name, units in plan.removed.items() if name not in plan.shapes
        },
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "reasons": dict(plan.reasons),
        "layers": {
            name: {
                "tensors": list(names),
                "zero": [n for n in names if n in plan.masks and not bool(plan.masks[n].any())],
            }
            for name, names in plan.layers.items()
        },
    }


def plan_from_dict(data: dict[str, Any], path: Path) -> Plan:
    """Read and check a plan; positions must be ascending, unique and inside the shapes.

    Raises:
        FileFormatError: something does not fit; the message names it.
    """
    if type(data.get("format")) is not int or data["format"] != FORMAT:
        raise FileFormatError(
            f"{path}: format {data.get('format')!r}; this version reads format {FORMAT}"
        )
    try:
        shapes = {str(n): tuple(int(x) for x in s) for n, s in data["shapes"].items()}
        kept = {
            str(name): {int(dim): _positions(index) for dim, index in dims.items()}
            for name, dims in data["kept"].items()
        }
        removed = {str(name): _positions(units) for name, units in data["removed"].items()}
        granularity = tuple(str(g) for g in data["granularity"])
        reasons = {str(k): str(v) for k, v in data["reasons"].items()}
        layers = {
            str(name): tuple(str(n) for n in unit["tensors"])
            for name, unit in data.get("layers", {}).items()
        }
        zero = {str(n) for unit in data.get("layers", {}).values() for n in unit["zero"]}
        masks = {name: torch.zeros((), dtype=torch.bool).expand(shapes[name]) for name in zero}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileFormatError(f"{path}: not a plan: {error!r}") from error
    for name, dims in kept.items():
        for dim, index in dims.items():
            shape = shapes.get(name, ())
            inside = 0 <= dim < len(shape) and len(index) > 0
            if not inside or index.min() < 0 or index.max() >= shape[dim]:
                raise FileFormatError(f"{path}: positions of {name}, dim {dim}, outside {shape}")
            if len(index) > 1 and not bool((index[1:] > index[:-1]).all()):
                raise FileFormatError(f"{path}: positions of {name}, dim {dim}, not ascending")
    return Plan(kept, masks, removed, shapes, granularity, reasons, layers=layers)


def _positions(values: Any) -> Tensor:
    """(n,) int64 from a list of integers and nothing else."""
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise TypeError(f"{str(values)[:40]!r} is no list of integers")
    return torch.tensor(values, dtype=torch.int64)


def _info(description: dict[str, Any], path: Path) -> ShrinkInfo:
    try:
        found = description["verification"]
        verification = Verification(
            float(found["error"]),
            float(found["tolerance"]),
            str(found["dtype"]),
            bool(found["comparable"]),
            float(found["changed"]),
        )
        form: Literal["module", "graph"] = "graph" if description["form"] == "graph" else "module"
        notes = tuple(str(n) for n in description["notes"])
        settled = description.get("settled")
        settled = None if settled is None else float(settled)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: not the description of a model: {error!r}") from error
    return ShrinkInfo(form, verification, description["attributes"], notes, settled)


# -- the model ---------------------------------------------------------------------------


def _check_architecture(model: nn.Module, plan: Plan) -> None:
    have = named_tensors(model)
    wrong = [
        f"{n}: saved {tuple(s)}, factory {tuple(have[n].shape) if n in have else 'none'}"
        for n, s in plan.shapes.items()
        if n not in have or tuple(have[n].shape) != tuple(s)
    ]
    if wrong:
        raise SoundnessError(
            "factory builds another architecture than the plan was made for:\n  "
            + "\n  ".join(sorted(wrong))
        )


def _takes(module: nn.Module, attribute: str) -> bool:
    """Whether a file may set this size."""
    return takes_size(module, attribute) or (
        attribute in PATCHED and type(getattr(module, attribute, None)) is int
    )


def _set_attributes(model: nn.Module, attributes: Any, path: Path) -> None:
    modules = dict(model.named_modules())
    if not isinstance(attributes, Mapping) or not all(
        isinstance(sizes, Mapping) for sizes in attributes.values()
    ):
        raise FileFormatError(f"{path}: attributes are {{module: {{attribute: size}}}}")
    for name, sizes in attributes.items():
        for attribute, value in sizes.items():
            if attribute == REMOVED and name and name in modules and value in range(1, 100):
                replace_module_(model, name, value)
                continue
            known = name in modules and _takes(modules[name], str(attribute))
            if not known or type(value) is not int or value < 1:
                raise FileFormatError(f"{path}: attribute {name}.{attribute} = {value!r} unknown")
            set_size_(modules[name], attribute, value)


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    for name, tensor in named_tensors(model).items():
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)  # the factory's default precision
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise FileFormatError(f"{path}: weights do not fit the plan: {error}") from error


def _fill_buffers(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Buffers outside the state dict, which a factory may fill with other values."""
    held = dict(model.named_buffers(remove_duplicate=False))
    for key, value in tensors.items():
        if not key.endswith(BUFFER):
            continue
        name = key[: -len(BUFFER)]
        if name not in held or held[name].shape != value.shape:
            raise FileFormatError(f"{path}: buffer {name} does not fit the model")
        held[name].data = value.to(held[name].device)


def _set_modes(model: nn.Module, description: dict[str, Any], path: Path) -> None:
    """Train or eval mode of each module, and which parameters are frozen, as saved."""
    other, frozen = description.get("other_mode", []), description.get("frozen", [])
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    if not isinstance(other, list) or not set(map(str, other)) <= set(modules):
        raise FileFormatError(f"{path}: other_mode names modules that the model does not have")
    if not isinstance(frozen, list) or not set(map(str, frozen)) <= set(parameters):
        raise FileFormatError(f"{path}: frozen names parameters that the model does not have")
    training = bool(description.get("training", False))
    model.train(training)
    for name in other:
        modules[name].training = not training
    for name, parameter in parameters.items():
        real = parameter.is_floating_point() or parameter.is_complex()
        parameter.requires_grad_(name not in frozen and real)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist; is this a directory written by save?")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise FileFormatError(f"{path} is truncated or no JSON: {error}") from error
    if not isinstance(data, dict):
        raise FileFormatError(f"{path} holds a {type(data).__name__}, not an object")
    return data


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
