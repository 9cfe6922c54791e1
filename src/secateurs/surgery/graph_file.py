"""The graph form as JSON: a list of operator calls that can only name operators of ATen, the padded
norms of secateurs, and regions: graphs of their own under `no_grad` or autocast.

Read without running anything: each entry is checked against an allow-list, so a hostile file can at
worst describe another network.
"""

from __future__ import annotations

import json
import operator
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

import secateurs.graph.padded  # noqa: F401  (registers its operators)
from secateurs.errors import FileFormatError
from secateurs.masks import named_tensors
from secateurs.surgery.graph_form import PrunedGraph, region_module
from secateurs.surgery.rewriter import DENSE

__all__ = ["graph_from_dict", "graph_to_dict"]

PLAIN = {
    f.__name__: f
    for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
        operator.mod, operator.neg, operator.eq, operator.ne, operator.lt, operator.le,
        operator.gt, operator.ge, torch.sym_max, torch.sym_min, torch.sym_float, torch.sym_not,
    )
}  # fmt: skip
REGIONS = {
    name: getattr(torch.ops.higher_order, name)
    for name in ("wrap_with_set_grad_enabled", "wrap_with_autocast")
}
OWN = {
    str(op): op
    for name in (
        "padded_layer_norm", "padded_rms_norm", "padded_group_norm", "padded_var",
        "padded_var_mean", "kept_share",
    )
    if (op := getattr(torch.ops.secateurs, name).default)
}  # fmt: skip
FORBIDDEN = re.compile(
    r"from_file|set_data|set_|resize|_resize|print|record_stream|data_ptr|_unsafe_(?!view$)|_cuda|"
    r"_nested|sym_storage|unsafe_storage|_storage|pin_memory|_pin_memory|_debug|_assert_async"
)
"""ATen operators that touch files or memory that is not theirs, or skip checks."""
NAMED = {
    **{f"dtype:{str(d)[6:]}": d for d in vars(torch).values() if isinstance(d, torch.dtype)},
    **{f"layout:{k}": getattr(torch, k) for k in ("strided", "sparse_coo")},
    **{
        f"format:{str(f)[6:]}": f
        for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
    },
}
BY_VALUE = {(type(v), v): k for k, v in NAMED.items()}


def graph_to_dict(model: PrunedGraph) -> dict[str, Any]:
    """The graphs and the list of tensors of a graph form.

    Raises:
        FileFormatError: an operator or argument has no portable form.
    """
    tensors: dict[str, dict[str, Any]] = {
        name: {"parameter": isinstance(t, nn.Parameter), "requires_grad": t.requires_grad}
        for name, t in named_tensors(model).items()
    }
    first: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        if first.setdefault(id(tensor), name) != name:
            tensors[name]["same_as"] = first[id(tensor)]
    stored = set(model.state_dict())
    constants = {
        name: {"dtype": str(t.dtype)[6:], "shape": list(t.shape), "data": t.reshape(-1).tolist()}
        for name, t in model.named_buffers(remove_duplicate=False)
        if name not in stored
    }
    captured = model.secateurs_captured
    codegen = captured.graphs["eval"]._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    return {
        "format": 1,
        "tensors": tensors,
        "constants": constants,
        "arguments": list(codegen.pytree_info.orig_args),
        "in_spec": pytree.treespec_dumps(captured.in_spec),
        "out_spec": pytree.treespec_dumps(captured.out_spec),
        "sizes": [list(shape) for shape in captured.sizes],
        "graphs": {mode: _nodes(graph) for mode, graph in captured.graphs.items()},
        "regions": {
            path: _nodes(module.graph)
            for path, module in model.named_modules()
            if isinstance(module, fx.GraphModule)
        },
    }


def _nodes(graph: fx.Graph) -> list[dict[str, Any]]:
    return [
        {
            "op": n.op,
            "name": n.name,
            "target": n.target if isinstance(n.target, str) else _target_name(n),
            "args": [_encode(a) for a in n.args],
            "kwargs": {k: _encode(v) for k, v in n.kwargs.items()},
            **({"dense": n.meta[DENSE]} if DENSE in n.meta else {}),
        }
        for n in graph.nodes
    ]


def _target_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        return str(node.target)
    name = getattr(node.target, "__name__", "")
    if str(node.target) in OWN:
        return str(node.target)
    if PLAIN.get(name, REGIONS.get(name)) is node.target:
        return name
    raise FileFormatError(f"operator {node.target} has no portable form; export the model instead")


def _encode(x: Any) -> Any:
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        return {"float": repr(x)}
    if isinstance(x, fx.Node):
        return {"node": x.name}
    if isinstance(x, list):
        return [_encode(i) for i in x]
    if isinstance(x, tuple):
        return {"tuple": [_encode(i) for i in x]}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    if (type(x), x) in BY_VALUE:
        return {"named": BY_VALUE[(type(x), x)]}
    raise FileFormatError(f"argument {x!r} has no portable form; export the model instead")


def graph_from_dict(data: dict[str, Any], state: dict[str, Tensor], path: Path) -> PrunedGraph:
    """Rebuild a graph form; weights are filled in by the caller.

    Args:
        data: from `graph_to_dict`.
        state: tensors by name, for their shapes and dtypes.
        path: for messages.

    Raises:
        FileFormatError: unknown version, operator, tensor or argument.
    """
    try:
        if data["format"] != 1:
            raise FileFormatError(f"{path}: format {data['format']!r}; this version reads format 1")
        tree = _tree(data, state)
        specs = _spec(data["in_spec"]), _spec(data["out_spec"])
        info = _PyTreeInfo([_identifier(a) for a in data["arguments"]], *specs)
        regions = data.get("regions", {})
        for region in sorted(regions, key=lambda r: -r.count(".")):  # inner ones first
            _add_region(tree, str(region), regions[region])
        graphs = {
            mode: _graph(nodes, info)
            for mode, nodes in data["graphs"].items()
            if mode in ("eval", "train")
        }
        sizes = tuple(tuple(_size(n) for n in shape) for shape in data.get("sizes", []))
        return PrunedGraph(tree, graphs, sizes=sizes)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except Exception as error:  # damaged in any other way
        raise FileFormatError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _size(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise FileFormatError(f"size {value!r} is no number")
    return value


def _spec(text: Any) -> pytree.TreeSpec:
    """The nesting of inputs or outputs. Reading one may import what it names, so it is checked."""
    _, schema = json.loads(text)
    _check_spec(schema)
    return pytree.treespec_loads(text)


def _check_spec(schema: dict[str, Any]) -> None:
    context = schema["context"]
    if isinstance(context, str):
        with suppress(ValueError):  # a plain name
            context = json.loads(context)
    if schema["type"] == "collections.defaultdict" or not _harmless(context):
        raise FileFormatError(f"container {schema['type']!r} is not allowed")
    for child in schema["children_spec"]:
        _check_spec(child)


def _harmless(context: Any) -> bool:
    """Names and numbers, in lists: no object that could be looked up."""
    if isinstance(context, list):
        return all(_harmless(c) for c in context)
    return context is None or isinstance(context, (str, int, float))


def _tree(data: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    root = nn.Module()
    made: dict[str, Tensor] = {}
    for name, kind in data["tensors"].items():
        path, _, attribute = str(name).rpartition(".")
        owner = _owner(root, path)
        if kind.get("same_as") in made:
            tensor = made[kind["same_as"]]
        elif name in data["constants"]:
            held = data["constants"][name]
            dtype = NAMED[f"dtype:{held['dtype']}"]
            tensor = torch.tensor(held["data"], dtype=dtype).reshape(held["shape"])
        else:
            tensor = torch.empty_like(state[name])
            if kind["parameter"]:
                tensor = nn.Parameter(tensor, bool(kind["requires_grad"]))
        made[name] = tensor
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(attribute, tensor)
        else:
            owner.register_buffer(attribute, tensor, persistent=name not in data["constants"])
    return root


def _add_region(tree: nn.Module, path: str, nodes: list[dict[str, Any]]) -> None:
    """Put the graph of a region where the graph around it looks for it."""
    parent, _, name = path.rpartition(".")
    owner = _owner(tree, parent)
    held = owner._modules.get(_identifier(name)) or nn.Module()
    owner._modules[name] = region_module(held, _graph(nodes, None))


def _owner(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, made where there is none."""
    owner = root
    for part in filter(None, path.split(".")):
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    return owner


def _graph(nodes: list[dict[str, Any]], info: _PyTreeInfo | None) -> fx.Graph:
    graph = fx.Graph()
    if info is not None:
        graph.set_codegen(_PyTreeCodeGen(info))
    made: dict[str, fx.Node] = {}
    for entry in nodes:
        target = entry["target"]
        if entry["op"] == "call_function":
            target = _resolve(str(target))
        elif entry["op"] not in ("placeholder", "get_attr", "output"):
            raise FileFormatError(f"node kind {entry['op']!r} is not allowed")
        elif not all(part.isidentifier() or part.isdigit() for part in str(target).split(".")):
            raise FileFormatError(f"name {target!r} is not allowed")
        args = tuple(_decode(a, made) for a in entry["args"])
        kwargs = {_identifier(k): _decode(v, made) for k, v in entry["kwargs"].items()}
        made[entry["name"]] = graph.create_node(
            entry["op"], target, args, kwargs, name=_identifier(entry["name"])
        )
        if "dense" in entry:
            made[entry["name"]].meta[DENSE] = str(entry["dense"])
    graph.lint()
    return graph


def _identifier(name: Any) -> str:
    """Names end up in generated code, so they may only be identifiers."""
    if not isinstance(name, str) or not name.isidentifier():
        raise FileFormatError(f"name {name!r} is not allowed")
    return name


def _resolve(name: str) -> Any:
    for known in (PLAIN, REGIONS, OWN):
        if name in known:
            return known[name]
    namespace, _, rest = name.partition(".")
    op, _, overload = rest.partition(".")
    found: Any = None
    plain = op.isidentifier() and overload.isidentifier()
    if namespace == "aten" and plain and FORBIDDEN.match(op) is None:
        with suppress(AttributeError, RuntimeError):
            found = getattr(getattr(torch.ops.aten, op), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise FileFormatError(f"operator {name!r} is not allowed")
    return found


def _decode(x: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(x, list):
        return [_decode(i, made) for i in x]
    if not isinstance(x, dict):
        return x
    [(key, value)] = x.items()
    if key == "node":
        return made[value]
    if key == "tuple":
        return tuple(_decode(i, made) for i in value)
    if key == "float":
        return float(value)
    if key == "device":
        return torch.device(value)
    if key == "named":
        return NAMED[value]
    raise FileFormatError(f"argument {key!r} is not known")
