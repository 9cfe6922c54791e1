"""The Fisher of linear and convolution layers as a Kronecker product of two small matrices.

For one layer y = W a (+ b), with g the gradient of the loss of one sample with respect to y:

    F ~ A (x) S      A = E[sum_t a_t a_t'],  S = E_t[g_t g_t']

t runs over the positions at which the layer is used: the pixels of a convolution, whose inputs are
unfolded into patches, the steps of a sequence, the calls of a layer that is called several times.
A is summed over positions and S is their mean: Grosse and Martens' assumptions for convolutions
(homogeneous and uncorrelated gradients). For one position and one sample the product is exact.

What is kept depends on who asks. A weight needs the diagonals of A and S, and no more. A unit, a
set R of output rows, needs A only inside of W_R A W_R' = E[sum_t y_t y_t']_RR, the second moments
of the outputs themselves, so that nothing is ever unfolded for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.errors import ScoringError
from secateurs.statistics.collector import Collector, Request, Run, Setting, register_statistic
from secateurs.statistics.hooks import recomputing
from secateurs.statistics.sums import View
from secateurs.statistics.units import Parameters, members_of
from secateurs.types import GroupTarget, Member, Target, WeightTarget

__all__ = ["Kronecker", "patches"]

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PATCH_ELEMENTS = 2**24
"""Patches are made for so many elements at a time."""


def patches(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    """What each output position of a layer reads: (groups, positions, columns), in parts.

    The columns are in the order of `weight.reshape(out, columns)`.

    Args:
        layer: linear or convolution.
        x: its input, with samples in front.
    """
    if isinstance(layer, nn.Linear):
        yield x.reshape(1, -1, x.shape[-1])
        return
    kernel = layer.kernel_size
    step = max(1, PATCH_ELEMENTS // max(1, x[:1].numel() * _volume(kernel)))
    for part in torch.split(x, step):
        shifted = torch.stack(list(_shifts(layer, part)), 2)  # (n, C, K, *positions)
        flat = shifted.flatten(3).permute(1, 2, 0, 3)  # (C, K, n, positions)
        yield flat.reshape(layer.groups, -1, flat.shape[2] * flat.shape[3]).mT


def _volume(sizes: Sequence[int]) -> int:
    out = 1
    for size in sizes:
        out *= size
    return out


def _shifts(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """For each kernel offset, what the outputs read there: (n, C, *positions)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    spans = [
        (size - dilation * (k - 1) - 1) // stride + 1
        for size, k, dilation, stride in zip(
            padded.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True
        )
    ]
    for offset in product(*(range(k) for k in layer.kernel_size)):
        place = tuple(
            slice(o * d, o * d + s * (n - 1) + 1, s)
            for o, d, s, n in zip(offset, layer.dilation, layer.stride, spans, strict=True)
        )
        yield padded[(slice(None), slice(None), *place)]


def _input_squares(layer: Layer, x: Tensor) -> Tensor:
    """(groups, columns) sums over samples and positions of squared inputs: no patches are made."""
    squares = x.square()
    if isinstance(layer, nn.Linear):
        return squares.reshape(1, -1, x.shape[-1]).sum(1)
    each = [s.transpose(0, 1).flatten(1).sum(1) for s in _shifts(layer, squares)]
    return torch.stack(each, 1).reshape(layer.groups, -1)  # (C, K) -> (groups, C / groups * K)


def _rows(layer: Layer, y: Tensor) -> Tensor:
    """(positions, out): an output or its gradient, one row for each position."""
    if isinstance(layer, nn.Linear):
        return y.reshape(-1, y.shape[-1])
    return y.transpose(0, 1).flatten(1).mT


class Kronecker(Collector):
    """1/2 w' F w of every unit, or 1/2 w' ([F^-1]_uu)^-1 w, with F = A (x) S for each layer.

    Options: `compensate` is "none" or "others" (the inverse), `damping` is what is added to the
    diagonals before they are inverted, in units of their mean.
    """

    shares = "backward"

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._inverse = request.options["compensate"] == "others"
        self._damping = float(request.options["damping"])
        self._wanted: dict[str, set[str]] = {}
        for target in request.targets:
            if isinstance(target, WeightTarget):
                need = {"A", "S"} if self._inverse else {"diag A", "diag S"}
                self._wanted.setdefault(target.name, set()).update(need)
            else:
                for m in _row_members(target, request.members, setting.params, setting.model):
                    many = self._inverse or len(m.unit) != len(set(m.unit.tolist()))
                    need = {"S", "Z"} if many else {"diag S", "diag Z"}
                    self._wanted.setdefault(m.tensor, set()).update(need)
        self._anchors: list[Tensor] = []

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """Why there are no factors for a target."""
        if isinstance(target, WeightTarget):
            return _blocked(model, target.name)
        if members not in ("producers", "all", "removal"):
            return f"units are rows of their layers, and members={members!r} are not"
        for m in members_of(target, members, params):
            if why := _is_row(m, params) and _blocked(model, m.tensor):
                return str(why)
        rows = _row_members(target, members, params, model)
        missing = target.n_units - len({int(u) for m in rows for u in m.unit})
        return f"no rows of a linear or convolution layer for {missing} units" if missing else ""

    # -- the pass ------------------------------------------------------------------------------

    @contextmanager
    def _hooked(self, run: Run) -> Iterator[None]:
        self._anchors = []
        with ExitStack() as stack:
            for name in self._wanted:
                for layer in _owners(self.setting.model, name):
                    hook = self._hook(run, name, layer)
                    handle = layer.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def watch(self, run: Run) -> Any:
        """Put a zero on the output of each layer, so that its gradient is computed."""
        return self._hooked(run)

    def leaves(self) -> Sequence[Tensor]:
        """The zeros."""
        return self._anchors

    def _hook(self, run: Run, name: str, layer: Any) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Any:
            if recomputing() or not torch.is_grad_enabled():
                return None
            x: Tensor = args[0] if args else kwargs["input"]
            if isinstance(layer, nn.Linear) and x.dim() < 2:
                raise ScoringError(f"{name}: the input has no samples, shape {tuple(x.shape)}")
            if not isinstance(layer, nn.Linear) and x.dim() != len(layer.kernel_size) + 2:
                raise ScoringError(
                    f"{name}: the input has no samples in front, shape {tuple(x.shape)}"
                )
            seen = self._inputs(name, layer, x.detach(), y.detach())
            anchor = torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
            self._anchors.append(anchor)
            out = y + anchor
            take = functools.partial(self._take, run, name, layer, seen)
            out.register_hook(take)  # type: ignore[no-untyped-call]
            return out

        return hook

    @torch.no_grad()
    def _inputs(self, name: str, layer: Layer, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Sums over one call, kept aside until a gradient proves that the loss depends on it."""
        wanted, found = self._wanted[name], {}
        if "diag A" in wanted:
            found["diag A"] = _input_squares(layer, _wide(x))
        if "A" in wanted:
            found["A"] = sum((p.mT @ p for p in patches(layer, _wide(x))), torch.zeros(()).to(x))
        rows = _rows(layer, _wide(y))
        if "diag Z" in wanted:
            found["diag Z"] = torch.einsum("to,to->o", rows, rows)
        if "Z" in wanted:
            found["Z"] = rows.mT @ rows
        return found

    @torch.no_grad()
    def _take(self, run: Run, name: str, layer: Layer, seen: dict[str, Tensor], g: Tensor) -> None:
        """The output gradient of one call has arrived."""
        rows = _rows(layer, _wide(g.detach())) * run.n  # of the loss of each sample
        if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
            raise ScoringError(
                f"batch {run.number}: the gradient at the output of {name.rpartition('.')[0]} is "
                "not finite; check the data, and the loss where its gradient is undefined"
            )
        wanted = self._wanted[name]
        if "diag S" in wanted:
            seen["diag S"] = torch.einsum("to,to->o", rows, rows)
        if "S" in wanted:
            seen["S"] = rows.mT @ rows
        for key, value in seen.items():
            self.sums.add(f"{name}/{key}", value)
        count = torch.tensor(float(len(rows)), dtype=torch.float64)
        self.sums.add(f"{name}/positions", count)

    # -- results -------------------------------------------------------------------------------

    def _mean(self, name: str, key: str) -> Tensor:
        """A or Z: summed over the positions of a sample; S: their mean. float64 on the CPU."""
        n = self.sums[f"{name}/positions"] if key.endswith("S") else self.n_samples
        return self.sums[f"{name}/{key}"].double().cpu() / n

    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64 predicted increase of the loss; 0 where no gradient arrived."""
        if isinstance(target, WeightTarget):
            return self._weights(target)
        setting = self.setting
        members = _row_members(target, self.request.members, setting.params, setting.model)
        out = torch.zeros(target.n_units, dtype=torch.float64)
        for m in members:
            if f"{m.tensor}/positions" in self.sums:
                self._add_rows(m, out)
            else:
                self._unreached(m.tensor)
        return out / 2

    def _unreached(self, name: str) -> None:
        note = f"{name}: no gradient arrives in any batch, counted as 0"
        if note not in self.notes:
            self.notes.append(note)

    def _add_rows(self, m: Member, out: Tensor) -> None:
        """tr(S_RR W_R A W_R') of every unit, or with ([S^-1]_RR)^-1 for S_RR."""
        index, unit = torch.from_numpy(m.index), torch.from_numpy(m.unit)
        if not self._inverse and len(m.unit) == len(set(m.unit.tolist())):
            each = self._diagonal(m.tensor, "S") * self._diagonal(m.tensor, "Z")
            out.index_add_(0, unit, each[index])
            return
        s, z = self._mean(m.tensor, "S"), self._mean(m.tensor, "Z")
        if not s.any():
            return
        inverse = _inverted(s, self._damping) if self._inverse else None
        for u in sorted(set(m.unit.tolist())):
            rows = index[unit == u]
            here = rows[:, None], rows[None]
            block = s[here] if inverse is None else torch.linalg.inv(inverse[here])
            out[u] += (block * z[here]).sum()

    def _diagonal(self, name: str, key: str) -> Tensor:
        """A diagonal, from the whole matrix if another target keeps that."""
        if f"{name}/diag {key}" in self.sums:
            return self._mean(name, f"diag {key}")
        return self._mean(name, key).diagonal(dim1=-2, dim2=-1)

    def _weights(self, target: WeightTarget) -> Tensor:
        """1/2 w_ij^2 S_ii A_jj, or 1/2 w_ij^2 / ([S^-1]_ii [A^-1]_jj)."""
        weight = self.setting.params[target.name].detach().double().cpu()
        name, layer = target.name, _owners(self.setting.model, target.name)[0]
        if f"{name}/positions" not in self.sums:
            self._unreached(name)
            return torch.zeros(target.n_units, dtype=torch.float64)
        groups = getattr(layer, "groups", 1)
        if self._inverse:
            s, a = self._mean(name, "S"), self._mean(name, "A")
            size = len(s) // groups
            blocks = [
                s[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(groups)
            ]
            s_line = torch.stack([_inverted(b, self._damping).diagonal() for b in blocks])
            a_line = torch.stack([_inverted(b, self._damping).diagonal() for b in a])
            scale = 1 / (s_line[:, :, None] * a_line[:, None])
        else:
            s_line = self._diagonal(name, "S").reshape(groups, -1)
            scale = s_line[:, :, None] * self._diagonal(name, "A")[:, None]
        # (groups, out / groups, columns) -> the order of the weight
        return (weight.square().reshape(scale.shape) * scale).reshape(-1) / 2


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _inverted(matrix: Tensor, damping: float) -> Tensor:
    """(M + damping * mean(diag M) I)^-1; of zeros: infinite on the diagonal."""
    level = matrix.diagonal().mean()
    if level == 0:
        return torch.eye(len(matrix), dtype=matrix.dtype) * float("inf")
    damped = matrix + damping * level * torch.eye(len(matrix), dtype=matrix.dtype)
    inverse: Tensor = torch.linalg.inv(damped)
    return inverse


def _owners(model: nn.Module, name: str) -> list[Any]:
    """The modules that hold a parameter, under whatever name."""
    parameter = model.get_parameter(name)
    return [m for m in model.modules() if any(p is parameter for p in m._parameters.values())]


def _blocked(model: nn.Module, name: str) -> str:
    """Why a parameter has no factors, or an empty text."""
    parameter = model.get_parameter(name)
    for path, module in model.named_modules():
        for own, p in module._parameters.items():
            if p is not parameter:
                continue
            kind = type(module)
            known = any(isinstance(module, k) and kind.forward is k.forward for k in LAYERS)
            if own != "weight" or not known:
                return f"no Kronecker factors for {own} of {kind.__name__} {path}".rstrip()
            parent = model.get_submodule(path.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                return f"{path} is read inside of {type(parent).__name__}, not called"
    return ""


def _is_row(m: Member, params: Parameters) -> bool:
    return m.role == "producer" and m.dim == 0 and params[m.tensor].dim() > 1


def _row_members(
    target: GroupTarget, members: str, params: Parameters, model: nn.Module
) -> list[Member]:
    """Members that are output rows of a linear or convolution layer."""
    chosen = members_of(target, members, params)
    return [m for m in chosen if _is_row(m, params) and not _blocked(model, m.tensor)]


register_statistic("kronecker", Kronecker)
