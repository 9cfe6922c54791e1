"""A new start for a sparse network: weights whose size suits the inputs that each unit has left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from secateurs.controls import FRESH
from secateurs.errors import choose
from secateurs.masks import apply_masks_
from secateurs.masks.sets import by_tensor

__all__ = ["INITS", "FreshRow", "reinitialise_sparse_"]

INITS = ("module", "kaiming_normal", "kaiming_uniform")
"""What the weights of linear layers and convolutions are drawn from."""


@dataclass(frozen=True)
class FreshRow:
    """What was done to one parameter.

    Attributes:
        tensor: its name.
        done: "scaled" (drawn, and scaled by the inputs that are kept), "drawn" or "left".
        why: in words.
    """

    tensor: str
    done: str
    why: str


def reinitialise_sparse_(
    model: nn.Module, masks: Mapping[str, Tensor], seed: int = 0, *, init: str = "module"
) -> tuple[FreshRow, ...]:
    """Draw all weights anew, in place, each row to suit the inputs that it keeps; apply the masks.

    A dense initialisation gives a unit with n inputs weights of a variance c / n. In a sparse
    network it reads only k of them, its output has k / n of the variance, and over many layers the
    signal dies out. Here the weights of a unit have the variance c / k, so that outputs and
    gradients vary as in the dense network. Rows without any input left stay zero.

        module            what `reset_parameters` of the module draws, times sqrt(n / k)
        kaiming_normal    N(0, 2 / k) for linear layers and convolutions, others as "module"
        kaiming_uniform   uniform with the variance 2 / k, likewise

    Scaled are the weights of linear layers, convolutions (also transposed and in groups), recurrent
    layers and cells (inputs and hidden units on their own), and the input projections of
    `nn.MultiheadAttention`. What else has `reset_parameters` is drawn and not scaled (biases,
    norms, embeddings); what has none, or is parametrized, is left as it was.

    Args:
        model: changed in place.
        masks: as in `apply_masks_`; what they do not name is dense.
        seed: of the new weights. The caller's random state is left as it was.
        init: one of `INITS`.

    Returns:
        One row for each parameter, in the order of the model.

    Raises:
        ConfigError: masks do not fit the model; nothing is changed then.

    Example:
        >>> layer = nn.Linear(100, 1000, bias=False)
        >>> mask = torch.zeros(1000, 100, dtype=torch.bool)
        >>> mask[:, :10] = True
        >>> reinitialise_sparse_(layer, {"weight": mask}, init="kaiming_normal")[0].done
        'scaled'
        >>> abs(float(layer.weight.detach()[:, :10].var()) - 2 / 10) < 0.01
        True

    References:
        Evci et al., Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win, 2022,
        arXiv:2010.03533. There all weights are normal with 2 / k, as "kaiming_normal".
    """
    choose(init, INITS, "init")
    apply_masks_(model, masks)  # an error comes before anything is drawn
    kept = by_tensor(model, masks)
    rows: dict[str, FreshRow] = {}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed + FRESH)
        for path, module in reversed(list(model.named_modules())):  # parents have the last word
            rows.update(_drawn(path, module))
        done: set[int] = set()
        for path, module in model.named_modules():
            for name, weight in _matrices(module):
                full = f"{path}.{name}" if path else name
                if full not in rows or rows[full].done == "left":
                    continue
                if id(weight) not in done:
                    _draw_and_scale_(module, name, weight, kept.get(id(weight)), init)
                    done.add(id(weight))
                rows[full] = FreshRow(full, "scaled", "each row by the inputs that it keeps")
    apply_masks_(model, masks)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return tuple(rows[name] for name in names)


def _drawn(path: str, module: nn.Module) -> Iterator[tuple[str, FreshRow]]:
    """Draw the tensors of one module, and say what was done to each of its parameters."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    kind = type(module).__name__
    if not callable(reset):
        done, why = "left", f"{kind} has no reset_parameters()"
    elif is_parametrized(module) or _old_norm(module):
        done, why = "left", f"{kind} computes it from other parameters"
    else:
        reset()
        done, why = "drawn", f"by {kind}.reset_parameters()"
    for name, _ in module.named_parameters(recurse=False):
        full = f"{path}.{name}" if path else name
        yield full, FreshRow(full, done, why)
    if is_parametrized(module):
        for name, _ in module.parametrizations.named_parameters():  # type: ignore[union-attr]
            full = f"{path}.parametrizations.{name}" if path else f"parametrizations.{name}"
            yield full, FreshRow(full, "left", why)


def _old_norm(module: nn.Module) -> bool:
    """Whether a hook makes the weight of other parameters (older weight and spectral norms)."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    lengths = (name for name in names if name.endswith("_g"))
    return any(n[:-2] + "_v" in names for n in lengths) or any(n.endswith("_orig") for n in names)


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a module whose rows sum over inputs."""
    plain = isinstance(module, (nn.Linear, _ConvNd))
    recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    for name, tensor in module.named_parameters(recurse=False):
        if (
            (plain and name == "weight")
            or (recurrent and name.startswith("weight"))
            or (isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"))
        ):
            yield name, tensor


def _draw_and_scale_(
    module: nn.Module, name: str, weight: Tensor, mask: Tensor | None, init: str
) -> None:
    """Weights of a module, by the inputs that each row keeps."""
    keep = torch.ones_like(weight) if mask is None else mask.to(weight)
    if isinstance(module, _ConvTransposeNd):  # (in, out / groups, *k): rows of each group
        shape = (module.groups, weight.shape[0] // module.groups, *weight.shape[1:])
        keep = keep.view(shape)
        over = [1, *range(3, len(shape))]
    else:
        over = list(range(1, weight.dim()))
    full = math.prod(keep.shape[d] for d in over)
    k = keep.sum(over, keepdim=True).clamp(min=1).expand(keep.shape).reshape(weight.shape)
    if init == "module" or not isinstance(module, (nn.Linear, _ConvNd)):
        weight.mul_((full / k).sqrt())
    elif init == "kaiming_normal":
        weight.normal_().mul_((2 / k).sqrt())
    else:
        weight.uniform_(-1, 1).mul_((6 / k).sqrt())
