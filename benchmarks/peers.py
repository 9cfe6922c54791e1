"""How each tool is asked to remove half of the units: as its own quick start says.

    {tool: {attempt: (model, inputs, names of the outputs that matter) -> smaller model}}

A tool may have several attempts, of which the best result counts. Torch-Pruning follows its README
(`BasePruner`, group magnitude, half of the channels, the final layers ignored) and, where the model
has attention, first its transformer examples (`num_heads`, whole heads or head dimensions, and the
size attributes set afterwards). The final layers are found for it: the first layers on the way back
from each output. torch-kirigami is given half of the channels, else a share of the parameters that
may remain, down to a twentieth removed: it refuses when a target is not reached.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

import secateurs as sc
from secateurs.batches import call_model, named_outputs, tensors
from secateurs.types import Inputs

__all__ = [
    "ATTEMPTS",
    "TOOLS",
    "NotForThisModel",
    "final_layers",
    "head_options",
    "is_refusal",
    "torch_pruner",
    "version_of",
]

Attempt = Callable[[nn.Module, Inputs, tuple[str, ...]], nn.Module]
RATIO = 0.5
HEAD_LAYERS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
FUSED = ("qkv", "qkv_proj")
HEADS = ("num_attention_heads", "num_heads", "n_heads")
KEY_HEADS = ("num_key_value_heads",)


def with_secateurs(model: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> nn.Module:
    """The library's own flow, by L2 norm."""
    # An engine without the keyword keeps every output whole.
    knows = "outputs" in inspect.signature(sc.trace).parameters
    more: dict[str, Any] = {"outputs": names} if knows and names else {}
    graph = sc.trace(model, inputs, **more)
    scores = sc.score(
        model, criterion="l2_norm", graph=graph, granularity=("structured", "embedding")
    )
    plan = sc.select(scores, sc.allocate(scores, sc.Budget(units=1 - RATIO)))
    return sc.shrink(model, plan, inputs)


def with_torch_pruning(model: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> nn.Module:
    """The quick start of the README; its torchvision example groups channels by heads."""
    fused = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    groups = {m: m.num_heads for m in fused}
    torch_pruner(model, inputs, names, out_channel_groups=groups).step()
    return model


def with_heads(model: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> nn.Module:
    """Its BERT and LLM examples: whole heads go."""
    return _transformer(model, inputs, names, heads=True)


def with_head_dims(model: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> nn.Module:
    """Its ViT and Swin examples: every head becomes narrower."""
    return _transformer(model, inputs, names, heads=False)


def with_kirigami(model: nn.Module, inputs: Inputs, names: tuple[str, ...]) -> nn.Module:
    """Half of the channels of each axis."""
    del names  # every output keeps its shape
    return _kirigami(model, inputs, share=None)


def with_kirigami_limit(share: float) -> Attempt:
    """Its README: a limit on the parameters, as a share of the dense ones."""
    return lambda model, inputs, names: _kirigami(model, inputs, share=share)


ATTEMPTS: dict[str, dict[str, Attempt]] = {
    "secateurs": {"units": with_secateurs},
    "torch-pruning": {
        "heads": with_heads,
        "head dimensions": with_head_dims,
        "channels": with_torch_pruning,
        "channels, all outputs whole": lambda model, inputs, _: with_torch_pruning(
            model, inputs, ()
        ),
    },
    "torch-kirigami": {
        "channels": with_kirigami,
        **{f"{100 * s:.0f} % of parameters": with_kirigami_limit(s) for s in (0.5, 0.75, 0.95)},
    },
}
"""Tool -> attempt -> how."""
TOOLS = tuple(ATTEMPTS)


class NotForThisModel(Exception):
    """The attempt is for another kind of model."""


def version_of(tool: str) -> str:
    return sc.__version__ if tool == "secateurs" else version(tool)


def is_refusal(error: BaseException) -> bool:
    """Whether the tool said no in its own words (else it stumbled)."""
    words = [c.__name__ for c in type(error).__mro__]
    return any(w in words for w in ("PruningError", "KirigamiError", "PlanningError"))


def torch_pruner(
    model: nn.Module,
    inputs: Inputs,
    names: tuple[str, ...] = (),
    *,
    ignored: list[nn.Module] | None = None,
    **options: Any,
) -> Any:
    """Its pruner for a model; `ignored` is `final_layers` unless it is given."""
    tp = importlib.import_module("torch_pruning")

    def outputs(found: Any) -> list[Tensor]:
        return _with_gradient(found, names)

    # Its defaults for these three are shared between calls.
    settings = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, **options}
    return tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=final_layers(model, inputs, names) if ignored is None else ignored,
        forward_fn=call_model,
        output_transform=outputs,
        **settings,
    )


def head_options(model: nn.Module, *, heads: bool = True) -> dict[str, Any]:
    """Options of `torch_pruner` for a model with attention; none for another."""
    found = _attentions(model)
    if not found:
        return {}
    return {
        "num_heads": {m: n for _, layers, ns in found for m, n in zip(layers, ns, strict=True)},
        "prune_num_heads": heads,
        "prune_head_dims": not heads,
        "head_pruning_ratio": RATIO,
    }


def _with_gradient(found: Any, names: tuple[str, ...]) -> list[Tensor]:
    held = tensors(named_outputs(found, names) if names else found)
    return [t for t in held if t.requires_grad]


def final_layers(model: nn.Module, inputs: Inputs, names: tuple[str, ...] = ()) -> list[nn.Module]:
    """The first linear, convolutional, recurrent or attention layers on the way back."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
    made: dict[Any, nn.Module] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        made.update({t.grad_fn: module for t in tensors(output) if t.grad_fn is not None})

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    try:
        todo: list[Any] = [
            t.grad_fn for t in _with_gradient(call_model(model.eval(), inputs), names)
        ]
    finally:
        for hook in hooks:
            hook.remove()
    seen, found = set(), []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            found.append(made[node])
        else:
            todo += [n for n, _ in node.next_functions]
    return found


def _attentions(model: nn.Module) -> list[tuple[nn.Module, list[nn.Linear], list[int]]]:
    """Attention modules with linear projections: module, projections, heads of each."""
    found = []
    for module in model.modules():
        queries = _number(module, HEADS)
        if queries is None:
            continue
        keys = _number(module, KEY_HEADS) or queries
        for names in (*HEAD_LAYERS, *((n,) for n in FUSED)):
            layers: list[Any] = [getattr(module, n, None) for n in names]
            if all(isinstance(m, nn.Linear) for m in layers):
                found.append((module, layers, [queries, keys, keys][: len(layers)]))
                break
    return found


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """A whole number that the module or its configuration holds under one of the names."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return None


def _transformer(
    model: nn.Module, inputs: Inputs, names: tuple[str, ...], *, heads: bool
) -> nn.Module:
    found = _attentions(model)
    if not found:
        raise NotForThisModel
    pruner = torch_pruner(model, inputs, names, **head_options(model, heads=heads))
    pruner.step()
    for module, layers, _ in found:
        left = [pruner.num_heads[m] for m in layers]
        width = layers[0].out_features // (1 if len(layers) > 1 else 3)
        new = dict.fromkeys(HEADS, left[0])
        new |= dict.fromkeys(("attention_head_size", "head_dim"), width // left[0])
        new |= dict.fromkeys(("all_head_size", "embed_dim", "inner_dim"), width)
        new["num_key_value_groups"] = left[0] // left[-1]
        for name, value in new.items():
            if isinstance(module.__dict__.get(name), int):
                setattr(module, name, value)
    return model


def _kirigami(model: nn.Module, inputs: Inputs, *, share: float | None) -> nn.Module:
    kirigami = importlib.import_module("torch_kirigami")
    pruning = importlib.import_module("torch_kirigami.pruning")
    named = inputs if isinstance(inputs, dict) else {}
    listed = () if isinstance(inputs, dict) else inputs
    args = listed if isinstance(listed, tuple) else (listed,)
    graph = kirigami.DependencyGraph.build(model.eval(), args=args, kwargs=dict(named))
    pruner = pruning.Pruner(model, graph=graph)
    budget = pruning.ChannelRatio(RATIO)
    if share is not None:
        left = int(share * sum(p.numel() for p in model.parameters()))
        budget = pruning.ParameterBudget(max_params=left)
    strategy = pruning.Greedy(pruning.GroupMagnitude(p=2))
    small, _ = pruner.prune(pruner.discover_candidates(), budget=budget, strategy=strategy)
    return small if isinstance(small, nn.Module) else model
