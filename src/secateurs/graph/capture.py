"""Front end: `torch.export` -> `Tape`. Captures one mode (eval or train) of a model.

`export_module` runs the exporter and returns its graph module; `tape_of` reads that module into
records. Both leave the user's model as it was. Other front ends produce the same `Tape`.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from secateurs.batches import batch_size, clone_inputs, in_mode, preserve, tensors
from secateurs.errors import CaptureError
from secateurs.graph.records import Record, Ref, Tape, Value
from secateurs.types import Inputs

__all__ = ["export_module", "is_free", "tape_of"]


def export_module(model: nn.Module, example_inputs: Inputs, *, training: bool) -> fx.GraphModule:
    """Capture `model` in one mode as a graph of operators, with a dynamic batch where it can be.

    The graph module owns the model's own parameters, under their names.

    Raises:
        CaptureError: the model refuses the inputs, returns no tensor, or cannot be exported.
    """
    inputs = clone_inputs(example_inputs)
    args, kwargs = _call_arguments(inputs)
    with preserve(model), in_mode(model, training=training), _plain_kernels(model):
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
    module.graph.eliminate_dead_code()
    _own_constants_(module)
    module.recompile()
    return module


def _own_constants_(module: fx.GraphModule) -> None:
    """Constants of the capture become buffers of its own that are not part of the state dict."""
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        path, _, attribute = node.target.rpartition(".")
        owner = module.get_submodule(path)
        value = owner.__dict__.get(attribute)
        if isinstance(value, torch.Tensor):
            delattr(owner, attribute)
            owner.register_buffer(attribute, value.detach().clone(), persistent=False)


def _call_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _samples(inputs: Inputs) -> int:
    """The batch size, 1 when no input has dimensions."""
    return batch_size(inputs) if any(t.dim() for t in tensors(inputs)) else 1


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    n = _samples((*args, *kwargs.values()))

    def dims(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            dynamic = x.dim() > 0 and x.shape[0] == n and n > 1
            return {0: torch.export.Dim.AUTO} if dynamic else None
        return None

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    spec = {name: pytree.tree_map(dims, value) for name, value in bound.items()}
    with warnings.catch_warnings():
        # Exporting a recurrent layer warns about its cached weight list; nothing is lost.
        warnings.filterwarnings("ignore", message=".*_flat_weights.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        with _quiet():
            try:
                return torch.export.export(model, args, kwargs, dynamic_shapes=spec, strict=False)
            except Exception:  # perhaps only the free batch size is at fault
                return torch.export.export(model, args, kwargs, strict=False)


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


@contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Capture attention as written, and keep each recurrent layer's cached weight list."""
    fast = torch.backends.mha.get_fastpath_enabled()
    flat = [(m, m._flat_weights) for m in model.modules() if isinstance(m, nn.RNNBase)]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, weights in flat:
            module._flat_weights = weights


def tape_of(
    module: fx.GraphModule, model: nn.Module, example_inputs: Inputs
) -> tuple[Tape, dict[str, int | tuple[int, ...]]]:
    """Read an exported graph module into a tape.

    Args:
        module: from `export_module`.
        model: the original, for the names of its parameters and buffers.
        example_inputs: as captured.

    Returns:
        The tape, and for each graph node the id (or ids) of its value, for rewriting.
    """
    parameters = _first_names(model.named_parameters(remove_duplicate=False))
    buffers = _first_names(model.named_buffers(remove_duplicate=False))
    tape = Tape([], [], (), "torch.export", _samples(example_inputs))
    ids: dict[str, int | tuple[int, ...]] = {}
    symbols: dict[str, int] = {}
    stored: dict[str, int] = {}

    def add(meta: Any, source: Any, name: str) -> int:
        shape = tuple(_hint(s) for s in meta.shape)
        dynamic = frozenset(d for d, s in enumerate(meta.shape) if is_free(s))
        tape.values.append(Value(len(tape.values), shape, meta.dtype, source, name, dynamic))
        return len(tape.values) - 1

    def argument(x: Any) -> Any:
        if isinstance(x, fx.Node):
            if x.name in symbols:
                return symbols[x.name]
            found = ids.get(x.name)
            if found is None:
                return None
            return Ref(found) if isinstance(found, int) else tuple(Ref(i) for i in found)
        if isinstance(x, (list, tuple)):
            return type(x)(argument(i) for i in x)
        return x

    for node in module.graph.nodes:
        if node.op == "placeholder":
            meta = node.meta.get("val")
            if isinstance(meta, torch.Tensor):
                ids[node.name] = add(meta, "input", node.name)
            else:
                symbols[node.name] = _hint(meta) if meta is not None else 0
        elif node.op == "get_attr":
            meta = _attribute(module, node.target)
            if not isinstance(meta, torch.Tensor):
                continue  # the body of a higher-order region; its operator has no rule
            name = parameters.get(node.target) or buffers.get(node.target) or node.target
            source = (
                "parameter" if name in parameters else "buffer" if name in buffers else "constant"
            )
            if name not in stored:
                stored[name] = add(meta, source, name)
            ids[node.name] = stored[name]
        elif node.op == "output":
            found = [ids.get(n.name) for n in node.all_input_nodes]
            tape.outputs = tuple(i for i in pytree.tree_leaves(found) if isinstance(i, int))
        elif node.target is operator.getitem and isinstance(ids.get(node.args[0].name), tuple):
            ids[node.name] = ids[node.args[0].name][node.args[1]]  # type: ignore[index]
        else:
            _read_call(node, tape, ids, symbols, add, argument)
    return tape, ids


def _read_call(
    node: fx.Node,
    tape: Tape,
    ids: dict[str, int | tuple[int, ...]],
    symbols: dict[str, int],
    add: Any,
    argument: Any,
) -> None:
    """Append one operator call."""
    meta = node.meta.get("val")
    if meta is not None and not tensors(meta) and not isinstance(meta, (list, tuple)):
        symbols[node.name] = _hint(meta)
    made: tuple[int, ...] = ()
    if isinstance(meta, torch.Tensor):
        ids[node.name] = add(meta, "op", node.name)
        made = (len(tape.values) - 1,)
    elif isinstance(meta, (list, tuple)):
        made = tuple(add(m, "op", f"{node.name}[{i}]") for i, m in enumerate(meta))
        ids[node.name] = made
    raw = _operator_name(node.target)
    op = raw[:-1] if raw.endswith("_") and not raw.endswith("__") else raw
    module, call = _module_call(node)
    tags = getattr(node.target, "tags", ())
    tape.records.append(
        Record(
            op=op,
            fn=node.target,  # type: ignore[arg-type]
            args=tuple(argument(a) for a in node.args),
            kwargs={k: argument(v) for k, v in node.kwargs.items()},
            outputs=made,
            inplace=raw != op,
            pointwise=torch.Tag.pointwise in tags,
            module=module,
            call=call,
            line=_user_line(node),
            name=node.name,
            index=len(tape.records),
        )
    )


def _first_names(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Every name of a tensor -> the first one; a tied tensor has several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def is_free(size: Any) -> bool:
    """Whether a captured size is symbolic (and was not fixed to a number by the model's code)."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _hint(size: Any) -> int:
    """The size for the example inputs of a possibly symbolic integer."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint)
    return int(size) if isinstance(size, (int, float)) else 0


def _operator_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[1])
    return str(getattr(target, "__name__", target))


def _attribute(module: nn.Module, path: str) -> Any:
    owner: Any = module
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _module_call(node: fx.Node) -> tuple[str, int]:
    """Innermost module path, and which of its calls this is (the exporter writes "name@1")."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [(k, v) for k, v in stack.items() if not k.startswith("_empty")]
    if not entries:
        return "", 0
    key, (path, _) = entries[-1]
    _, at, count = key.rpartition("@")
    return str(path), int(count) if at and count.isdigit() else 0


def _user_line(node: fx.Node) -> str:
    """File and line in the user's code: the last frame outside torch."""
    trace = node.meta.get("stack_trace") or ""
    frames = [ln.strip() for ln in trace.splitlines() if ln.strip().startswith("File ")]
    mine = [f for f in frames if "/torch/" not in f.split('"')[1]]
    if not mine:
        return ""
    parts = mine[-1].split('"')
    number = parts[2].split("line ")[1].split(",")[0] if "line " in parts[2] else "?"
    return f"{parts[1].rsplit('/', 1)[-1]}:{number}"
