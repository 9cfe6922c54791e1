"""Front end: one real run of the model -> `Tape`. Light, and free in the Python that it accepts.

The model is called once, in eval mode, below autograd: there every operator of ATen passes by
whole (a linear layer, an attention, an LSTM), under the name and with the arguments that
`torch.export` would give it. What the Python code does between the operators is of no concern, so
branches on values, loops and lists are fine; sizes are those of the example.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateurs.batches import (
    batch_size,
    call_model,
    clone_inputs,
    in_mode,
    named_outputs,
    preserve,
    tensors,
    to_device,
)
from secateurs.errors import CaptureError
from secateurs.graph.records import Record, Ref, Tape, Value, refs
from secateurs.types import Inputs

__all__ = ["plain_kernels", "record_run"]

TORCH = str(Path(torch.__file__).parent)
OURS = (str(Path(__file__).parent), str(Path(__file__).parents[1] / "batches.py"))


def record_run(model: nn.Module, example_inputs: Inputs, outputs: Iterable[str] = ()) -> Tape:
    """Run the model once on the example inputs and write down every operator call.

    The model is run as a copy that shares its tensors, so that nothing it caches on itself stays.

    Args:
        model: any module; on the meta device the run costs neither time nor memory.
        example_inputs: a tensor, a tuple or a dict.
        outputs: names of the outputs that matter; empty for all.

    Raises:
        CaptureError: the model refuses the inputs or returns no tensor.
        ConfigError: an output that the model does not have.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    inputs = clone_inputs(example_inputs)
    if device is not None and device.type == "meta":
        inputs = to_device(inputs, device)
    runner = _shared_copy(model)
    with (
        preserve(model), _attributes_of(runner), in_mode(runner, training=False),
        plain_kernels(runner),
    ):  # fmt: skip
        try:
            with torch.inference_mode(), _Recorder(runner, inputs) as recorder:
                found = call_model(runner, inputs)
        except Exception as error:
            raise CaptureError(f"the model refuses example_inputs: {error}") from error
    if not tensors(found):
        raise CaptureError(f"the model returns {type(found).__name__}, no tensor")
    return recorder.tape(named_outputs(found, outputs))


def _shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules over the same tensors; the model itself if it cannot be copied."""
    held: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        other = copy.deepcopy(model, held)
    except Exception:  # an open handle, a cached output: run the model itself, and tidy up
        return model
    return other if _tensors_of(other) == _tensors_of(model) else model


@contextmanager
def _attributes_of(model: nn.Module) -> Iterator[None]:
    """What a run sets on modules (caches, weights made anew by a hook) is taken off again."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, held in before:
            attributes.clear()
            attributes.update(held)


def _tensors_of(model: nn.Module) -> dict[str, int]:
    """Names of parameters and buffers, and which objects they are."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: id(tensor) for name, tensor in named}


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
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


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down operators as they pass, and in which module's call they do."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[Value] = []
        self.records: list[Record] = []
        self.known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.paths: dict[int, str] = {}
        self.calls: dict[str, int] = {}
        self.stack: list[tuple[str, int]] = [("", 0)]
        self.constants = 0
        self.batch = batch_size(inputs) if any(t.dim() for t in tensors(inputs)) else 1
        self.overwritten: list[tuple[Tensor, Tensor]] = []
        self.storages: dict[int, list[Tensor]] = {}
        for p in model.parameters():
            if not p.is_meta:
                self.storages.setdefault(p.untyped_storage().data_ptr(), []).append(p)
        for path, module in model.named_modules():
            self.paths[id(module)] = path
        for name, parameter in model.named_parameters():
            self.add(parameter, "parameter", name)
        for name, buffer in model.named_buffers():
            self.add(buffer, "buffer", name)
        for path, module in model.named_modules():
            for attribute, held in vars(module).items():
                if isinstance(held, Tensor) and id(held) not in self.known:
                    self.add(held, "attribute", f"{path}.{attribute}".lstrip("."))
        for i, tensor in enumerate(tensors(inputs)):
            self.add(tensor, "input", f"input_{i}")

    def __enter__(self) -> _Recorder:
        self.handles = [
            modules.register_module_forward_pre_hook(self.enter),
            modules.register_module_forward_hook(self.leave, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        with torch.no_grad():
            for parameter, value in self.overwritten:
                parameter.copy_(value)

    def enter(self, module: nn.Module, inputs: Any) -> None:
        path = self.paths.get(id(module))
        if path is not None:
            self.stack.append((path, self.calls.get(path, 0)))
            self.calls[path] = self.calls.get(path, 0) + 1

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if id(module) in self.paths and len(self.stack) > 1:
            self.stack.pop()

    def add(self, tensor: Tensor, source: Any, name: str) -> int:
        """Give a tensor object a new value."""
        ident = len(self.values)
        self.values.append(Value(ident, tuple(tensor.shape), tensor.dtype, source, name))
        self.known[id(tensor)] = (weakref.ref(tensor), ident)
        return ident

    def look_up(self, tensor: Tensor) -> int:
        """The value of a tensor; one that no operator made is a constant."""
        held = self.known.get(id(tensor))
        if held is not None and held[0]() is tensor:
            return held[1]
        self.constants += 1
        return self.add(tensor, "constant", f"constant_{self.constants}")

    def remember(self, target: Any) -> None:
        """Keep the value of a parameter that is about to be overwritten (`max_norm` does it)."""
        if isinstance(target, Tensor) and not target.is_meta:
            for own in self.storages.pop(target.untyped_storage().data_ptr(), ()):
                self.overwritten.append((own, own.detach().clone()))

    def described(self, x: Any) -> Any:
        """Arguments with `Ref`s in place of tensors."""
        if isinstance(x, Tensor):
            return Ref(self.look_up(x))
        if isinstance(x, (list, tuple)):
            return type(x)(self.described(i) for i in x)
        return x

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        op, inplace, pointwise = _facts(func)
        if inplace:
            self.remember(args[0])
        given = tuple(self.described(a) for a in args)
        named = {k: self.described(v) for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        number = len(self.records)
        name = f"{op}_{number}"
        made: tuple[int, ...] = ()
        if isinstance(result, Tensor):
            made = (self.add(result, "op", name),)
        elif isinstance(result, (list, tuple)):
            made = tuple(
                self.add(t, "op", f"{name}[{i}]")
                for i, t in enumerate(result)
                if isinstance(t, Tensor)
            )
        module, call = self.stack[-1]
        line = _user_line()
        self.records.append(
            Record(
                op, func, given, named, made, inplace, pointwise, module, call, line, name, number
            )
        )
        return result

    def tape(self, outputs: Any) -> Tape:
        """What was written down, and which values are the model's outputs."""
        found = [
            held[1]
            for tensor in _held_tensors(outputs)
            if (held := self.known.get(id(tensor))) is not None and held[0]() is tensor
        ]
        return Tape(self.values, _needed(self.records, found), tuple(found), "run", self.batch)


def _needed(records: list[Record], outputs: list[int]) -> list[Record]:
    """The records that some output depends on; all that overwrite something count as such."""
    needed = set(outputs)
    kept = []
    for record in reversed(records):
        if record.inplace or not record.outputs or not needed.isdisjoint(record.outputs):
            kept.append(record)
            needed |= {ref.id for ref in refs([record.args, record.kwargs])}
    return kept[::-1]


_FACTS: dict[Any, tuple[str, bool, bool]] = {}


def _facts(func: Any) -> tuple[str, bool, bool]:
    """Canonical name, whether it overwrites its first argument, whether it is elementwise."""
    if func not in _FACTS:
        _FACTS[func] = operator_facts(func)
    return _FACTS[func]


def operator_facts(func: Any) -> tuple[str, bool, bool]:
    """Canonical name, whether it overwrites its first argument, whether it is elementwise.

    An operator that writes into something else (`out=`) gets a name without a rule; one from
    another library keeps its namespace.
    """
    if not isinstance(func, torch._ops.OpOverload):
        return str(getattr(func, "__name__", func)), False, False
    namespace, raw = func._schema.name.split("::")
    if namespace not in ("aten", "secateurs"):  # its name may mean something else there
        return func._schema.name, False, torch.Tag.pointwise in func.tags
    inplace = raw.endswith("_") and not raw.endswith("__")
    op = raw[:-1] if inplace else raw
    if func._schema.is_mutable and not inplace and any(a.is_out for a in func._schema.arguments):
        op = f"{op}.{func._overloadname}"
    return op, inplace, torch.Tag.pointwise in func.tags


_MINE: dict[str, bool] = {}


def _user_line() -> str:
    """File and line of the innermost frame outside torch and this room."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        mine = _MINE.get(path)
        if mine is None:
            mine = _MINE[path] = path.startswith((TORCH, *OURS, "<"))
        if not mine:
            return f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _held_tensors(tree: Any) -> list[Tensor]:
    """All tensors of an output, also those inside objects that are no pytree (caches)."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo: list[Any] = [tree]
    while todo:
        for leaf in pytree.tree_leaves(todo.pop()):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif hasattr(leaf, "__dict__") and not callable(leaf) and id(leaf) not in seen:
                seen.add(id(leaf))
                todo.append(dict(vars(leaf)))
    return found
