"""`shrink`: the smaller model, in the user's own class where that is provably the same function.

Two forms. "module": a copy of the user's module with sliced tensors and corrected size attributes;
accepted only if it equals the masked model numerically and call by call. "graph": the captured
operators with rewritten sizes, which also works when the Python code has sizes written into it.
Both are verified.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from secateurs.batches import call_model, clone_inputs, in_mode, preserve
from secateurs.errors import ConfigError, PruningError, SoundnessError, choose
from secateurs.graph.capture import output_leaves
from secateurs.masks import named_tensors
from secateurs.surgery.agreement import disagreement
from secateurs.surgery.graph_form import Captures, graph_form
from secateurs.surgery.layers import (
    gone_tensors,
    removable_modules,
    remove_modules_,
    without_layers,
)
from secateurs.surgery.patching import patch_sizes
from secateurs.surgery.settling import has_padded, settle
from secateurs.surgery.sizes import fixed_sizes, input_sizes, other_sizes
from secateurs.surgery.slicing import fix_sizes, observe_sizes, sliced, sliced_copy
from secateurs.surgery.verification import (
    TOLERANCE,
    Verification,
    compare,
    copied,
    difference,
    masked_copy,
    train_note,
    verify,
)
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
        settled: None, or how far the outputs moved when norms were made plain (`norm="plain"`):
            the verification is that of the exact model before.
    """

    form: Literal["module", "graph"]
    verification: Verification
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settled: float | None = None


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
    norm: str = "exact",
    captures: Captures | None = None,
) -> nn.Module:
    """Return a smaller model that computes what the masked model computes; `model` is not changed.

    Removed units are sliced away; weights that are only masked become zeros. The result is compared
    with the masked model on the example inputs before it is returned.

    Args:
        model: the dense model (its masked entries may or may not be zero already).
        plan: from `select`.
        example_inputs: a tensor, a tuple or a dict.
        form: "module", "graph" or "auto" (module if it equals the masked model, else graph).
        norm: what norms and means over removed units count: "exact", all that the dense model had,
            as the masked model does; "plain", what is left, which is verified as exact first and
            then changed: by how much is in the notes.
        captures: of this model, to save capturing it once more for the graph form.

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
    choose(norm, ["exact", "plain"], "norm")
    _check_shapes(model, plan)
    small = _exact(model, plan, example_inputs, form, captures)
    if norm == "plain" and has_padded(small):
        return _plain(model, plan, example_inputs, form, small)
    return small


def _exact(
    model: nn.Module, plan: Plan, example_inputs: Inputs, form: str, captures: Captures | None
) -> nn.Module:
    notes: tuple[str, ...] = ()
    masked = masked_copy(model, plan)
    if form in ("auto", "module"):
        reason = ""
        for patched in (False, True):
            try:
                return _module_form(model, masked, plan, example_inputs, patched)
            except PruningError as error:
                reason = reason or str(error)
            except Exception as error:  # the user's forward on smaller tensors: anything can come
                reason = reason or f"{type(error).__name__}: {error}"
        if form == "module":
            raise SoundnessError(
                f"the module form does not work here: {reason}. "
                'form="graph" rewrites sizes that are written into the code'
            )
        notes = (f"graph form, because the module form does not work here: {reason}",)
    return _graph_form(model, masked, plan, example_inputs, notes, captures)


def _plain(
    model: nn.Module, plan: Plan, example_inputs: Inputs, form: str, exact: nn.Module
) -> nn.Module:
    """Norms that count what is left; in the user's class if that is the same function."""
    small, settled = settle(exact, example_inputs)
    info = info_of(exact)
    plain = _without_dense(info.attributes)
    info = replace(info, attributes=plain, settled=settled.difference)
    if info.form == "graph" and form == "auto":
        try:
            own, attributes = _sliced_module(model, masked_copy(model, plan), plan, example_inputs)
            own, _ = settle(own, example_inputs)
            if difference(small, own, example_inputs, plan.outputs) <= TOLERANCE[torch.float32]:
                small = own
                plain = _without_dense(attributes)
                info = replace(info, form="module", attributes=plain, notes=())
            else:
                info = replace(info, notes=(*info.notes, "plain norms do not change that"))
        except Exception as error:  # the user's forward on smaller tensors: anything can come
            why = f"plain norms do not change that: {type(error).__name__}: {error}"
            info = replace(info, notes=(*info.notes, why))
    setattr(small, INFO, replace(info, notes=(*info.notes, settled.text())))
    return small


def _without_dense(attributes: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The sizes that a module has whose norms are plain."""
    return {
        path: {k: v for k, v in sizes.items() if k != "n_dense"}
        for path, sizes in attributes.items()
    }


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


def _sliced_module(
    model: nn.Module,
    masked: nn.Module,
    plan: Plan,
    example_inputs: Inputs,
    patched: bool = False,
) -> tuple[nn.Module, dict[str, dict[str, int]]]:
    """A copy of the user's module with sliced tensors and the sizes that were set.

    Args:
        patched: also scale known attributes of the user's own modules.

    Raises:
        SoundnessError: there is nothing to scale.
    """
    removable = removable_modules(masked, plan, example_inputs)
    small = sliced_copy(masked, plan.kept)
    attributes = fix_sizes(small, model, plan.kept)
    if patched:
        guesses = patch_sizes(small, model)
        if not guesses:
            raise SoundnessError("no known attribute is left to adapt")
        for path, sizes in guesses.items():
            attributes[path] = {**attributes.get(path, {}), **sizes}
    remove_modules_(small, plan, removable, attributes)

    def run() -> None:
        with preserve(small), in_mode(small, training=False), torch.no_grad():
            call_model(small, clone_inputs(example_inputs))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for path, sizes in observe_sizes(small, run).items():
            attributes[path] = {**attributes.get(path, {}), **sizes}
    return small, attributes


def _module_form(
    model: nn.Module,
    masked: nn.Module,
    plan: Plan,
    example_inputs: Inputs,
    patched: bool = False,
) -> nn.Module:
    small, attributes = _sliced_module(model, masked, plan, example_inputs, patched)
    found, _ = compare(model, masked, small, plan, example_inputs)
    if not found.comparable or not found.ok:
        raise SoundnessError(found.text())
    whole, idle = without_layers(masked, plan, attributes, example_inputs)
    if why := disagreement(whole, small, plan, example_inputs):
        raise SoundnessError(f"equal on these inputs by chance: {why}")
    notes = idle + train_note(masked, small, example_inputs, plan.outputs)
    if math.isinf(found.changed):
        notes += (found.text(),)
    setattr(small, INFO, ShrinkInfo("module", found, attributes, notes))
    return small


def _graph_form(
    model: nn.Module,
    masked: nn.Module,
    plan: Plan,
    example_inputs: Inputs,
    notes: tuple[str, ...],
    captures: Captures | None,
) -> nn.Module:
    captures = captures or Captures.of(copied(model), example_inputs)
    small = graph_form(captures, plan)
    found = verify(model, small, plan, example_inputs, captures=captures)
    if not found.comparable:
        notes = (*notes, found.text())
    sizes = input_sizes(masked, small, captures, plan.outputs)
    small.secateurs_captured = replace(small.secateurs_captured, sizes=sizes)
    if found.comparable:
        notes += other_sizes(masked, small, captures, plan.outputs)
    notes += fixed_sizes(captures.graphs["eval"], example_inputs)
    notes += small.secateurs_captured.notes
    graph = small.secateurs_captured.graphs["eval"]
    if plan.outputs and None in output_leaves(graph)[0]:
        notes += ("outputs that were not named, and are not on the way to those, are None",)
    setattr(small, INFO, ShrinkInfo("graph", found, {}, notes))
    return small


def slice_masks(plan: Plan) -> dict[str, Tensor]:
    """The weight masks of a plan for the smaller model, so that holding goes on.

    Returns:
        tensor name -> bool mask of the *small* shape; only those that still remove something.
    """
    left = {name: mask for name, mask in plan.masks.items() if name not in gone_tensors(plan)}
    small = {name: sliced(mask, plan.kept.get(name, {})) for name, mask in left.items()}
    return {name: mask for name, mask in small.items() if not bool(mask.all())}
