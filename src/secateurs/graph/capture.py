"""Front end: `torch.export` -> `Tape`. Captures one mode (eval or train) of a model.

`export_module` runs the exporter and returns its graph module; `tape_of` reads that module into
records. Both leave the user's model as it was. Other front ends produce the same `Tape`.

A region (a part under `no_grad`, autocast or checkpointing) is a graph of its own inside the graph:
its operators are read into the same tape, between those around it.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from secateurs.batches import (
    clone_inputs,
    in_mode,
    preserve,
    tensors,
)
from secateurs.errors import CaptureError
from secateurs.graph.exported import (
    Ids,
    attribute_of,
    is_free,
    output_leaves,
    region_of,
    samples_in,
    tape_of,
)
from secateurs.graph.tape import plain_kernels
from secateurs.types import Inputs

__all__ = ["Ids", "export_module", "is_free", "matters", "output_leaves", "region_of", "tape_of"]


def export_module(model: nn.Module, example_inputs: Inputs, *, training: bool) -> fx.GraphModule:
    """Capture `model` in one mode as a graph of operators, with dynamic sizes where it can be.

    Free are the batch and, for sequences, the length: of integer inputs all dimensions longer than
    1, of floating-point inputs the first, and the second if they have three.

    The graph module owns the model's own parameters, under their names.

    Raises:
        CaptureError: the model refuses the inputs, returns no tensor, or cannot be exported.
    """
    inputs = clone_inputs(example_inputs)
    args, kwargs = _call_arguments(inputs)
    with preserve(model), in_mode(model, training=training), plain_kernels(model):
        try:
            with torch.no_grad():
                output = model(*args, **kwargs)
        except Exception as error:
            raise CaptureError(f"the model refuses example_inputs: {error}") from error
        if not tensors(output):
            raise CaptureError(f"the model returns {type(output).__name__}, no tensor")
        try:
            module = _export(model, args, kwargs).module(check_guards=False)
        except Exception as error:
            mode = "train" if training else "eval"
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            clash = sorted(set(dir(fx.GraphModule)) & {n for n, _ in model.named_children()})
            hint = f"; rename the submodule {clash[0]!r}, a name torch.fx reserves" if clash else ""
            if "data-dependent" in first:
                hint = "; its Python code branches on, or sizes by, the values of tensors"
            raise CaptureError(
                f"torch.export cannot capture the model in {mode} mode: {first}{hint}"
            ) from error
    assert isinstance(module, fx.GraphModule)
    module.graph.eliminate_dead_code(is_impure_node=matters)
    _own_constants_(module, model)
    module.recompile()
    _settle_sizes_(module, args, kwargs)
    return module


def matters(node: fx.Node) -> bool:
    """Whether a node without users must stay: it is overwritten, or it is the interface."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    schema = getattr(node.target, "_schema", None)
    return node.is_impure() if schema is None else bool(schema.is_mutable)


def _settle_sizes_(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Where sizes depend on the values of tensors, note those of the example inputs."""
    if not any(_unknown(n.meta.get("val")) for n in module.graph.nodes):
        return

    class Sizes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if _unknown(node.meta.get("val")):
                node.meta["val"] = pytree.tree_map_only(
                    torch.Tensor, lambda t: torch.empty_like(t, device="meta"), result
                )
            return result

    with torch.no_grad(), preserve(module):
        flat = pytree.tree_leaves((args, kwargs))
        Sizes(module).run(*flat, enable_io_processing=False)


def _unknown(meta: Any) -> bool:
    """Whether something captured has a size that only a run can tell."""
    sizes: list[Any] = [s for t in tensors(meta) for s in t.shape]
    sizes += [s for s in pytree.tree_leaves(meta) if isinstance(s, torch.SymInt)]
    return any(isinstance(s, torch.SymInt) and s.node.hint is None for s in sizes)


def _own_constants_(module: fx.GraphModule, model: nn.Module) -> None:
    """Constants of the capture become buffers of its own that are not part of the state dict.

    Where one is a parameter that the model reads past its registration (Keras does), it gets its
    name back.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    known = {(t.data_ptr(), t.shape, t.stride()): (name, t) for name, t in named if t.numel()}
    for node in module.graph.nodes:
        if node.op != "get_attr" or isinstance(attribute_of(module, node.target), nn.Module):
            continue
        path, _, attribute = node.target.rpartition(".")
        owner = module.get_submodule(path)
        value = owner.__dict__.get(attribute)
        if not isinstance(value, torch.Tensor):
            continue
        found = None
        if value.numel() and not value.is_meta:
            found = known.get((value.data_ptr(), value.shape, value.stride()))
        if found is not None:
            node.target = found[0]
            _register(module, *found)
        else:
            delattr(owner, attribute)
            owner.register_buffer(attribute, value.detach().clone(), persistent=False)


def _register(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a parameter or buffer under its name, modules on the way included."""
    *path, attribute = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(attribute, tensor)
    elif attribute not in module._buffers:
        module.register_buffer(attribute, tensor)


def _call_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    n = samples_in((*args, *kwargs.values()))
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments

    def spec(dims: Any) -> dict[str, Any]:
        return {name: pytree.tree_map(dims, value) for name, value in bound.items()}

    def lengths(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.dim():
            return None
        free = {0} if x.shape[0] == n else set()
        if not x.is_floating_point():
            free = set(range(x.dim()))
        elif x.dim() == 3:
            free = {0, 1}
        return _auto(x, free)

    def batch(x: Any) -> Any:
        found = isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == n
        return _auto(x, {0}) if found else None

    tries = [spec(lengths), spec(batch), None]
    unrolled = any(isinstance(m, nn.RNNBase) for m in model.modules())  # its length is fixed then
    if unrolled or tries[0] == tries[1]:
        tries.pop(0)
    with warnings.catch_warnings():
        # Exporting a recurrent layer warns about its cached weight list; nothing is lost.
        warnings.filterwarnings("ignore", message=".*_flat_weights.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        with _quiet():
            for sizes in tries[:-1]:
                try:
                    return torch.export.export(
                        model, args, kwargs, dynamic_shapes=sizes, strict=False
                    )
                except Exception:  # perhaps only the free sizes are at fault
                    continue
            return torch.export.export(model, args, kwargs, strict=False)


def _auto(x: torch.Tensor, dims: set[int]) -> dict[int, Any] | None:
    """Dimensions that may be free, if the model lets them."""
    return {d: torch.export.Dim.AUTO for d in sorted(dims) if x.shape[d] > 1} or None


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints whole graphs before it raises; the error is enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
