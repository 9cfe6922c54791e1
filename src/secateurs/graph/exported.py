"""Reads an exported graph module into a `Tape`, regions included."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from secateurs.batches import (
    batch_size,
    named_outputs,
    tensors,
)
from secateurs.graph.records import Record, Ref, Tape, Value
from secateurs.graph.tape import operator_facts
from secateurs.types import Inputs

__all__ = [
    "Ids", "attribute_of", "is_free", "output_leaves", "region_of", "samples_in", "tape_of",
]  # fmt: skip

Ids = Mapping[str, "int | tuple[int | None, ...]"]
"""Graph node -> its value or values; a node of a region is called "region/node"."""

REGIONS = frozenset(
    "wrap_with_set_grad_enabled wrap_with_autocast tag_activation_checkpoint wrap".split()
)
"""Operators that run a graph as it stands: what it computes does not depend on them."""


def attribute_of(module: nn.Module, path: str) -> Any:
    owner: Any = module
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def samples_in(inputs: Inputs) -> int:
    """The batch size, 1 when no input has dimensions."""
    return batch_size(inputs) if any(t.dim() for t in tensors(inputs)) else 1


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
        Tape([], [], (), "torch.export", samples_in(example_inputs)),
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
        if found and isinstance(attribute_of(owner, str(x.target)), fx.GraphModule):  # type: ignore[union-attr]
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
        meta = attribute_of(module, str(node.target))
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
        body = attribute_of(module, name)
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


def _is_attribute(model: nn.Module, path: str) -> bool:
    """Whether a tensor is held by the model, as neither parameter nor buffer."""
    try:
        return isinstance(attribute_of(model, path), torch.Tensor)
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
