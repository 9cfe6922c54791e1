"""The empirical Fisher in blocks of consecutive weights, and what follows from it.

    Blocks       sums of g_B g_B' over samples or batches, one matrix for each block B of a row
    obs_update   new values for the weights that stay, which make up for those that are removed

With F = damping + mean of g g', the loss near a minimum is about L + 1/2 d' F d. Removing the
weights Q demands d_Q = -w_Q; the best answer of the others in the block is

    d_K = F_KK^-1 F_KQ w_Q      which raises the loss by 1/2 w_Q' ([F^-1]_QQ)^-1 w_Q

for a single weight q by w_q^2 / (2 [F^-1]_qq). Sums of g g' merge exactly, and their inverse is
what the recursion of Woodbury gives sample by sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.batches import (
    check_batches,
    in_mode,
    iterate,
    model_device,
    preserve,
)
from secateurs.criteria import get_criterion
from secateurs.errors import ConfigError, choose
from secateurs.statistics.collector import (
    Request,
    Run,
    Setting,
    register_statistic,
)
from secateurs.statistics.jobs import Job
from secateurs.statistics.samplerows import SampleRows
from secateurs.statistics.stream import Pass
from secateurs.statistics.sums import Sums, View
from secateurs.statistics.units import Parameters
from secateurs.types import Batches, Graph, LossFn, Plan, Target, WeightTarget

__all__ = ["Blocks", "blocks_of", "obs_update", "solve_blocks"]

MAX_BYTES = 2**32
"""What the blocks of all parameters together may take."""
TOGETHER = 2**12
"""Blocks that are inverted together."""


def blocks_of(values: Tensor, block: int) -> Tensor:
    """(..., rows * blocks in a row, block): the last blocks of the rows are filled with zeros.

    Args:
        values: (..., rows, columns).
        block: consecutive columns in a block.

    Example:
        >>> blocks_of(torch.arange(1.0, 7.0).reshape(2, 3), 2).tolist()
        [[1.0, 2.0], [3.0, 0.0], [4.0, 5.0], [6.0, 0.0]]
    """
    columns = values.shape[-1]
    padded = F.pad(values, (0, -columns % block))
    return padded.reshape(*values.shape[:-2], -1, block)


def _rows_of(values: Tensor) -> Tensor:
    """(rows, columns) of a parameter: everything behind its first dimension is a row."""
    return values.reshape(len(values), -1)


def _size(shape: Sequence[int], block: int) -> int:
    """Weights in a block: no more than there are in a row."""
    return min(block, int(torch.Size(shape[1:]).numel()))


class Blocks(SampleRows):
    """Sums of g_B g_B', and w_q^2 / (2 [F^-1]_qq).

    Options: `block`, weights in a block; `gradients`, "sample" for one g for each sample or "batch"
    for one for each batch; `damping`, what is added to the diagonal, in units of its mean over the
    parameter.
    """

    def __init__(self, setting: Setting, request: Request, sums: View) -> None:
        super().__init__(setting, request, sums)
        self._block = int(request.options["block"])
        self._damping = float(request.options["damping"])
        self._by_sample = request.options["gradients"] == "sample"
        self._guard()
        self.ask_for(self.parameters() if self._by_sample else [])
        if not self._by_sample:
            self.shares = "backward"

    def _guard(self) -> None:
        wide = {n: self.setting.params[n] for n in self.parameters()}
        size = sum(
            p.numel() * _size(p.shape, self._block) * max(4, p.element_size())
            for p in wide.values()
        )
        if size > MAX_BYTES:
            raise ConfigError(
                f"the blocks of {len(wide)} parameters would take {size / 2**30:.1f} GiB, more "
                f"than {MAX_BYTES / 2**30:.0f}; use a smaller block than {self._block}, or fewer "
                "targets (graph.only)"
            )

    @classmethod
    def obstacle(cls, model: nn.Module, params: Parameters, target: Target, members: str) -> str:
        """Only weights have blocks."""
        return "" if isinstance(target, WeightTarget) else "blocks are for single weights"

    def wants(self) -> Iterable[str]:
        """With one gradient for each batch: of every weight."""
        return () if self._by_sample else self.parameters()

    @torch.no_grad()
    def gradient(self, run: Run, name: str, grad: Tensor) -> None:
        """Take the mean gradient of a batch."""
        self._fold(name, grad[None], float(run.n))

    def fold(self, run: Run, name: str, low: int, rows: Tensor) -> None:
        """Take the gradients of some samples."""
        self._fold(name, rows, 1.0)

    def _fold(self, name: str, grads: Tensor, weight: float) -> None:
        """Add outer products of (k, *shape) gradients to the blocks."""
        size = _size(grads.shape[1:], self._block)
        wide = grads if grads.dtype == torch.float64 else grads.float()
        each = blocks_of(wide.reshape(len(grads), grads.shape[1], -1), size)  # (k, blocks, size)
        each = each.transpose(0, 1)  # (blocks, k, size)
        self.sums.add(name, each.mT @ each, weight)

    # -- results -------------------------------------------------------------------------------

    def damped(self, name: str) -> Tensor | None:
        """(blocks, size, size) F of one parameter, damped; None if no gradient ever arrived."""
        if name not in self.sums:
            return None
        fisher = self.sums[name] / self.n_samples
        diagonal = fisher.diagonal(dim1=-2, dim2=-1)
        level = diagonal.sum(dtype=torch.float64) / self.setting.params[name].numel()
        if level == 0:
            return None
        diagonal.add_(float(self._damping * level))
        return fisher

    @torch.no_grad()
    def unit(self, target: Target) -> Tensor:
        """(n_units,) float64 w_q^2 / (2 [F^-1]_qq); 0 where no gradient arrived."""
        assert isinstance(target, WeightTarget)
        weight = self.setting.params[target.name].detach()
        fisher = self.damped(target.name)
        if fisher is None:
            note = f"{target.name}: no gradient arrives in any batch, counted as 0"
            self.notes += [note] if note not in self.notes else []
            return torch.zeros(target.n_units, dtype=torch.float64)
        inverse = torch.cat([_inverse_diagonal(part) for part in torch.split(fisher, TOGETHER)])
        rows = _rows_of(weight)
        lines = inverse.reshape(len(rows), -1)[:, : rows.shape[1]]
        return (rows.double().square() / lines / 2).reshape(-1).cpu()


def _inverse_diagonal(fisher: Tensor) -> Tensor:
    """(blocks, size) float64 diagonals of the inverses."""
    factor = torch.linalg.cholesky(fisher.double())
    return torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)


def solve_blocks(fisher: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """(blocks, size) weights after the removal that raises 1/2 d' F d least; removed ones are 0.

    Args:
        fisher: (blocks, size, size) positive definite.
        weight: (blocks, size) before.
        keep: (blocks, size) bool.

    Example:
        >>> f = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
        >>> solve_blocks(f, torch.tensor([[3.0, 5.0]]), torch.tensor([[True, False]]))
        tensor([[5.5000, 0.0000]])
    """
    k = keep.to(torch.float64)
    full, w = fisher.double(), weight.double()
    # The rows and columns of removed weights become those of the identity: their answer is zero.
    system = full * k[:, :, None] * k[:, None] + torch.diag_embed(1 - k)
    pull = (full @ ((1 - k) * w)[:, :, None]) * k[:, :, None]
    factor = torch.linalg.cholesky(system)
    answer = torch.cholesky_solve(pull, factor)[:, :, 0]
    return torch.where(keep, w + answer, torch.zeros_like(w)).to(weight.dtype)


def obs_update(
    model: nn.Module,
    removed: Plan | Mapping[str, Tensor],
    batches: Batches,
    loss_fn: LossFn,
    *,
    block: int = 64,
    damping: float = 0.01,
    gradients: str = "sample",
    max_batches: int | None = None,
) -> dict[str, Tensor]:
    """New weights: removed ones are exactly 0, the others of their blocks make up for them.

    With F the damped empirical Fisher of a block, Q its removed and K its kept weights,
    w_K + F_KK^-1 F_KQ w_Q: the least increase of the quadratic model 1/2 d' F d. The model is not
    changed; load the result with `model.load_state_dict(new, strict=False)`.

    Args:
        model: before anything is removed. Seen in eval mode.
        removed: masks by tensor name, True = keep, or a plan with masks.
        batches: re-iterable of `(inputs, targets)`.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the samples.
        block: consecutive weights of a row that answer together.
        damping: added to the diagonal of F, in units of its mean over the parameter.
        gradients: "sample" or "batch": over what F is averaged.
        max_batches: use at most that many batches.

    Returns:
        Tensor name -> new values, for every tensor that loses something. Biases, norms and buffers
        have nothing beside them in a row, and are only set to zero where they are removed.

    Raises:
        ConfigError: an unknown tensor, a mask that does not fit, or a value out of range.
        ScoringError: a loss or gradient that is not finite.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 5.0]]))
        >>> batches = [(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.zeros(2))]
        >>> masks = {"weight": torch.tensor([[True, False]])}
        >>> def total(y, _):
        ...     return y.mean()  # the gradient of a sample is its input: F = [[1, .5], [.5, .5]]
        >>> obs_update(net, masks, batches, total, damping=1e-9)["weight"]
        tensor([[5.5000, 0.0000]])

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon,
        1992. Singh and Alistarh, WoodFisher, 2020, arXiv:2004.14340. Kurtic et al., The Optimal
        BERT Surgeon, 2022, arXiv:2203.07259.
    """
    choose(gradients, ["sample", "batch"], "gradients of obs_update")
    if block < 1 or not damping > 0:
        raise ConfigError(f"block must be at least 1 and damping above 0, got {block}, {damping}")
    masks = removed.masks if isinstance(removed, Plan) else removed
    held = _fitting(model, masks)
    losing = {n: m for n, m in masks.items() if not m.all()}
    params = dict(model.named_parameters(remove_duplicate=False))
    targets: list[Target] = [
        WeightTarget(n, tuple(params[n].shape))
        for n in losing
        if n in params and params[n].dim() > 1
    ]
    found: dict[str, Tensor] = {}
    if targets:
        c = get_criterion("obs", block=block, damping=damping, gradients=gradients)
        blocks = _collect(model, params, Job(c, targets, {}), batches, loss_fn, max_batches)
        found = {t.name: _updated(blocks, t.name, losing[t.name], block) for t in targets}
    for name, mask in losing.items():
        if name not in found:
            found[name] = held[name].detach().clone().masked_fill_(~mask.to(held[name].device), 0)
    return {name: found[name] for name in losing}


def _fitting(model: nn.Module, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """All tensors of the model, checked against the masks."""
    held = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, mask in masks.items():
        choose(name, held, "tensor")
        if mask.shape != held[name].shape or mask.dtype != torch.bool:
            raise ConfigError(
                f"the mask of {name} must be bool of shape {tuple(held[name].shape)}, got "
                f"{str(mask.dtype)[6:]} of shape {tuple(mask.shape)}"
            )
    return held


def _collect(
    model: nn.Module,
    params: Parameters,
    job: Job,
    batches: Batches,
    loss_fn: LossFn,
    max_batches: int | None,
) -> Blocks:
    """The blocks of a whole pass, the model left as it was."""
    check_batches(model, batches, loss_fn)
    setting = Setting(model, params, loss_fn, Graph({}), {})
    device = model_device(model)
    with ExitStack() as stack:
        stack.enter_context(preserve(model))
        stack.enter_context(in_mode(model, training=False))
        for p in model.parameters():
            stack.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        runs = (Run(i, batch) for i, batch in enumerate(iterate(batches, device, max_batches)))
        first = next(runs)
        whole = Pass(setting, [job], first, Sums())
        for run in itertools.chain([first], runs):
            whole.batch(0, run)
    blocks = whole.collector(job.criterion, "blocks")
    assert isinstance(blocks, Blocks)
    return blocks


@torch.no_grad()
def _updated(blocks: Blocks, name: str, mask: Tensor, block: int) -> Tensor:
    """The new values of one parameter."""
    weight = blocks.setting.params[name].detach()
    keep = mask.to(weight.device)
    fisher = blocks.damped(name)
    if fisher is None:  # the loss does not depend on it: nothing is lost
        return weight.masked_fill(~keep, 0)
    size = _size(weight.shape, block)
    w = blocks_of(_rows_of(weight), size)
    k = ~blocks_of(_rows_of(~keep), size)  # what fills a row is kept
    parts = [torch.split(x, TOGETHER) for x in (fisher, w, k)]
    new = torch.cat([solve_blocks(*part) for part in zip(*parts, strict=True)])
    rows = _rows_of(weight)
    return new.reshape(len(rows), -1)[:, : rows.shape[1]].reshape(weight.shape)


register_statistic("blocks", Blocks)
