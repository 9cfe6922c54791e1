"""`shrink`: the smaller model, in the user's own class where that is provably the same function.

Two forms. "module": a copy of the user's module with sliced tensors and corrected size attributes;
accepted only if it equals the masked model numerically. "graph": the captured operators with
rewritten sizes, which also works when the Python code has sizes written into it. Both are verified.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from secateurs.batches import call_model, clone_inputs, in_mode, preserve
from secateurs.errors import ConfigError, PruningError, SoundnessError, choose
from secateurs.masks import named_tensors
from secateurs.surgery.graph_form import graph_form
from secateurs.surgery.slicing import fix_sizes, observe_sizes, slice_module_, sliced
from secateurs.surgery.verification import Verification, masked_copy, train_note, verify
from secateurs.types import Inputs, Plan

__all__ = ["INFO", "ShrinkInfo", "info_of", "shrink", "slice_masks"]

INFO = "_secateurs_info"


@dataclass(frozen=True)
class ShrinkInfo:
    """How a smaller model was made; found on the model by `info_of`.

    Attributes:
        form: "module" or "graph".
        verification: the comparison with the masked model.
        attributes: {module path: {size attribute: new value}} of the module form.
        notes: what a user should know (why not the module form, eval only).
    """

    form: Literal["module", "graph"]
    verification: Verification
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def info_of(small: nn.Module) -> ShrinkInfo:
    """The `ShrinkInfo` of a result of `shrink`.

    Raises:
        ConfigError: the model did not come from `shrink`.
    """
    found = getattr(small, INFO, None)
    if not isinstance(found, ShrinkInfo):
        raise ConfigError(f"this {type(small).__name__} was not made by secateurs.shrink")
    return found


def shrink(
    model: nn.Module,
    plan: Plan,
    example_inputs: Inputs,
    *,
    form: str = "auto",
) -> nn.Module:
    """Return a smaller model that computes what the masked model computes; `model` is not changed.

    Removed units are sliced away; weights that are only masked become zeros. The result is compared
    with the masked model on the example inputs before it is returned.

    Args:
        model: the dense model (its masked entries may or may not be zero already).
        plan: from `select`.
        example_inputs: a tensor, a tuple or a dict.
        form: "module", "graph" or "auto" (module if it equals the masked model, else graph).

    Raises:
        ConfigError: unknown form, or a plan for another model.
        SoundnessError: the result differs from the masked model, or the module form was insisted
            on and does not equal it.
        CaptureError: the graph form is needed and the model cannot be captured.

    Example:
        >>> import torch, secateurs as sc
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(2, 4)
        >>> scores = sc.score(net, criterion="l2_norm", graph=sc.trace(net, x))
        >>> plan = sc.select(scores, sc.allocate(scores, sc.Budget(units=0.5)))
        >>> shrink(net, plan, x)[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    choose(form, ["auto", "module", "graph"], "form")
    _check_shapes(model, plan)
    notes: tuple[str, ...] = ()
    if form in ("auto", "module"):
        try:
            return _module_form(model, plan, example_inputs)
        except PruningError as error:
            reason = str(error)
        except Exception as error:  # the user's own forward on smaller tensors: anything can come
            reason = f"{type(error).__name__}: {error}"
        if form == "module":
            raise SoundnessError(
                f"the module form does not work here: {reason}. "
                'form="graph" rewrites sizes that are written into the code'
            )
        notes = (f"graph form, because the module form does not work here: {reason}",)
    return _graph_form(model, plan, example_inputs, notes)


def _check_shapes(model: nn.Module, plan: Plan) -> None:
    have = named_tensors(model)
    wrong = [
        f"{name}: the plan has {tuple(shape)}, the model "
        f"{tuple(have[name].shape) if name in have else 'none'}"
        for name, shape in plan.shapes.items()
        if name not in have or tuple(have[name].shape) != tuple(shape)
    ]
    if wrong:
        raise ConfigError("the plan was made for another model:\n  " + "\n  ".join(sorted(wrong)))


def _module_form(model: nn.Module, plan: Plan, example_inputs: Inputs) -> nn.Module:
    small = masked_copy(model, plan)
    slice_module_(small, plan.kept)
    attributes = fix_sizes(small, model, plan.kept)

    def run() -> None:
        with preserve(small), in_mode(small, training=False), torch.no_grad():
            call_model(small, clone_inputs(example_inputs))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for path, sizes in observe_sizes(small, run).items():
            attributes[path] = {**attributes.get(path, {}), **sizes}
    found = verify(model, small, plan, example_inputs, strict=False)
    if not found.comparable or not found.ok:
        raise SoundnessError(found.text())
    notes = train_note(masked_copy(model, plan), small, example_inputs)
    if math.isinf(found.changed):
        notes += (found.text(),)
    setattr(small, INFO, ShrinkInfo("module", found, attributes, notes))
    return small


def _graph_form(
    model: nn.Module, plan: Plan, example_inputs: Inputs, notes: tuple[str, ...]
) -> nn.Module:
    small = graph_form(masked_copy(model, plan), plan.kept, example_inputs)
    found = verify(model, small, plan, example_inputs)
    if not found.comparable:
        notes = (*notes, found.text())
    notes = (*notes, *small.secateurs_captured.notes)
    setattr(small, INFO, ShrinkInfo("graph", found, {}, notes))
    return small


def slice_masks(plan: Plan) -> dict[str, Tensor]:
    """The weight masks of a plan for the smaller model, so that holding goes on.

    Returns:
        tensor name -> bool mask of the *small* shape; only those that still remove something.
    """
    small = {name: sliced(mask, plan.kept.get(name, {})) for name, mask in plan.masks.items()}
    return {name: mask for name, mask in small.items() if not bool(mask.all())}
