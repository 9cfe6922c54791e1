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
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from secateurs.batches import (
    batch_size,
    clone_inputs,
    in_mode,
    named_outputs,
    preserve,
    tensors,
)
from secateurs.errors import CaptureError
from secateurs.graph.records import Record, Ref, Tape, Value
from secateurs.graph.tape import operator_facts, plain_kernels
from secateurs.types import Inputs

__all__ = ["Ids", "export_module", "is_free", "matters", "output_leaves", "region_of", "tape_of"]

Ids = Mapping[str, "int | tuple[int | None, ...]"]
"""Graph node -> its value or values; a node of a region is called "region/node"."""

REGIONS = frozenset(
    "wrap_with_set_grad_enabled wrap_with_autocast tag_activation_checkpoint wrap".split()
)
"""Operators that run a graph as it stands: what it computes does not depend on them."""


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
        if node.op != "get_attr" or isinstance(_attribute(module, node.target), nn.Module):
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


def _samples(inputs: Inputs) -> int:
    """The batch size, 1 when no input has dimensions."""
    return batch_size(inputs) if any(t.dim() for t in tensors(inputs)) else 1


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    n = _samples((*args, *kwargs.values()))
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


def tape_of(
    module: fx.GraphModule,
    model: nn.Module,
    example_inputs: Inputs,
    outputs: Iterable[str] = (),
) -> tuple[Tape, Ids]:
    """Read an exported graph module into a tape.

    Args:
        module: from `export_module`.
        model: the original, for the names of its parameters and buffers.
        example_inputs: as captured.
        outputs: names of the outputs that matter; empty for all.

    Returns:
        The tape, and for each graph node the id (or ids) of its value, for rewriting.
    """
    reader = _Reader(
        model,
        Tape([], [], (), "torch.export", _samples(example_inputs)),
        _first_names(model.named_parameters(remove_duplicate=False)),
        _first_names(model.named_buffers(remove_duplicate=False)),
    )
    reader.read(module, "", {})
    reader.tape.outputs = _outputs(module, reader.ids, outputs)
    return reader.tape, reader.ids


def _outputs(module: fx.GraphModule, ids: Ids, names: Iterable[str]) -> tuple[int, ...]:
    """Values of the outputs that matter."""
    leaves, wanted = output_leaves(module.graph, names)
    found = (ids.get(x.name) for i in wanted if isinstance(x := leaves[i], fx.Node))
    return tuple(i for i in found if isinstance(i, int))


def output_leaves(graph: fx.Graph, names: Iterable[str] = ()) -> tuple[list[Any], list[int]]:
    """What an exported graph returns, flat, and the positions of the named outputs (or of all)."""
    last = next(iter(reversed(graph.nodes)))
    leaves = list(pytree.tree_leaves(last.args[0]))
    if not (names := tuple(names)):
        return leaves, list(range(len(leaves)))
    spec = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    numbered = [torch.tensor(i) for i in range(len(leaves))]  # containers may insist on tensors
    tree = pytree.tree_unflatten(numbered, spec)
    return leaves, [int(t) for t in tensors(named_outputs(tree, names))]


def region_of(node: fx.Node, owner: nn.Module) -> tuple[str, tuple[Any, ...]] | None:
    """The name of the graph that a node runs as it stands, and what it is given.

    Args:
        node: of a graph over `owner`.
        owner: holds the graphs of regions by name.
    """
    if getattr(node.target, "__name__", "") not in REGIONS:
        return None
    for i, x in enumerate(node.args):
        found = isinstance(x, fx.Node) and x.op == "get_attr"
        if found and isinstance(_attribute(owner, str(x.target)), fx.GraphModule):  # type: ignore[union-attr]
            return str(x.target), tuple(node.args[i + 1 :])  # type: ignore[union-attr]
    return None


@dataclass
class _Reader:
    """Reads the nodes of a graph, and of the regions in it, into one tape."""

    model: nn.Module
    tape: Tape
    parameters: dict[str, str]
    buffers: dict[str, str]
    ids: dict[str, int | tuple[int | None, ...]] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)

    def add(self, meta: torch.Tensor, source: Any, name: str) -> int:
        shape = tuple(_hint(s) for s in meta.shape)
        self.tape.values.append(Value(len(self.tape.values), shape, meta.dtype, source, name))
        return len(self.tape.values) - 1

    def argument(self, x: Any, prefix: str) -> Any:
        """An argument as a record has it."""
        if isinstance(x, fx.Node):
            if prefix + x.name in self.symbols:
                return self.symbols[prefix + x.name]
            found = self.ids.get(prefix + x.name)
            if isinstance(found, tuple):
                return tuple(None if i is None else Ref(i) for i in found)
            return None if found is None else Ref(found)
        if isinstance(x, (list, tuple)):
            return type(x)(self.argument(i, prefix) for i in x)
        return x

    def read(self, module: fx.GraphModule, prefix: str, given: dict[str, Any]) -> Any:
        """Append all operator calls of a graph; return what it returns, as arguments.

        Args:
            module: the graph.
            prefix: "" or "region/".
            given: placeholder -> argument, in a region.
        """
        uses = Counter(
            found[0] for n in module.graph.nodes if (found := region_of(n, module)) is not None
        )
        for node in module.graph.nodes:
            key = prefix + node.name
            if node.op == "placeholder":
                self.placeholder(node, key, given)
            elif node.op == "get_attr":
                self.attribute(module, node, key)
            elif node.op == "output":
                return self.argument(node.args[0], prefix)
            elif node.target is operator.getitem and self.part(node, key, prefix):
                continue
            elif (region := region_of(node, module)) is not None and uses[region[0]] == 1:
                self.region(module, node, prefix, *region)
            else:
                self.call(node, key, prefix)
        return None

    def placeholder(self, node: fx.Node, key: str, given: dict[str, Any]) -> None:
        meta = node.meta.get("val")
        if node.name in given:
            if isinstance(given[node.name], Ref):
                self.ids[key] = given[node.name].id
            elif isinstance(given[node.name], int):
                self.symbols[key] = given[node.name]
        elif isinstance(meta, torch.Tensor):
            self.ids[key] = self.add(meta, "input", node.name)
        else:
            self.symbols[key] = _hint(meta) if meta is not None else 0

    def attribute(self, module: fx.GraphModule, node: fx.Node, key: str) -> None:
        meta = _attribute(module, str(node.target))
        if not isinstance(meta, torch.Tensor):
            return  # the graph of a region
        target = str(node.target)
        name = self.parameters.get(target) or self.buffers.get(target) or target
        if name in self.parameters:
            source = "parameter"
        elif name in self.buffers:
            source = "buffer"
        else:
            source = "attribute" if _is_attribute(self.model, name) else "constant"
        if name not in self.stored:
            self.stored[name] = self.add(meta, source, name)
        self.ids[key] = self.stored[name]

    def part(self, node: fx.Node, key: str, prefix: str) -> bool:
        """One tensor of several; False if nothing is known of them."""
        whole, index = node.args
        found = self.ids.get(prefix + whole.name) if isinstance(whole, fx.Node) else None
        if not isinstance(found, tuple) or not isinstance(index, int):
            return False
        one = found[index]
        if one is not None:
            self.ids[key] = one
        elif node.meta.get("val") is not None:
            self.symbols[key] = _hint(node.meta["val"])
        return True

    def region(
        self, module: fx.GraphModule, node: fx.Node, prefix: str, name: str, given: tuple[Any, ...]
    ) -> None:
        body = _attribute(module, name)
        inputs = [n.name for n in body.graph.nodes if n.op == "placeholder"]
        arguments = (self.argument(x, prefix) for x in given)
        returned = self.read(body, f"{prefix}{name}/", dict(zip(inputs, arguments, strict=True)))
        leaves = returned if isinstance(returned, (list, tuple)) else (returned,)
        self.ids[prefix + node.name] = tuple(x.id if isinstance(x, Ref) else None for x in leaves)

    def call(self, node: fx.Node, key: str, prefix: str) -> None:
        """Append one operator call."""
        meta = node.meta.get("val")
        made: tuple[int, ...] = ()
        if meta is None and node.users:  # several results, described where they are taken apart
            parts = {
                n.args[1]: n.meta["val"]
                for n in node.users
                if n.target is operator.getitem and isinstance(n.args[1], int) and "val" in n.meta
            }
            meta = [parts.get(i) for i in range(max(parts, default=-1) + 1)]
        if isinstance(meta, torch.Tensor):
            made = (self.add(meta, "op", key),)
            self.ids[key] = made[0]
        elif isinstance(meta, (list, tuple)):
            found = tuple(
                self.add(m, "op", f"{key}[{i}]") if isinstance(m, torch.Tensor) else None
                for i, m in enumerate(meta)
            )
            self.ids[key] = found
            made = tuple(i for i in found if i is not None)
        elif meta is not None:
            self.symbols[key] = _hint(meta)
        op, inplace, pointwise = operator_facts(node.target)
        given = (
            node.args[:1] if op == "type_as" else node.args
        )  # of the second only the type is read
        module, call = _module_call(node)
        self.tape.records.append(
            Record(
                op=op,
                fn=node.target,  # type: ignore[arg-type]
                args=tuple(self.argument(a, prefix) for a in given),
                kwargs={k: self.argument(v, prefix) for k, v in node.kwargs.items()},
                outputs=made,
                inplace=inplace,
                pointwise=pointwise,
                module=module,
                call=call,
                line=_user_line(node),
                name=key,
                index=len(self.tape.records),
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


def _attribute(module: nn.Module, path: str) -> Any:
    owner: Any = module
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _is_attribute(model: nn.Module, path: str) -> bool:
    """Whether a tensor is held by the model, as neither parameter nor buffer."""
    try:
        return isinstance(_attribute(model, path), torch.Tensor)
    except AttributeError:
        return False


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
