"""What each of two processes does in `test_processes.py`: train on its half, compare."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from secateurs.errors import SoundnessError
from secateurs.masks import check_masks, hold_masks
from tests.masks.nets import adam

N = 4  # samples of each process


def net() -> nn.Sequential:
    """Rows that two processes cannot share equally: 5 and 3, and one bias on one process only."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def masks(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.rand(p.shape, generator=generator) < 0.6 for n, p in model.named_parameters()}


def batch(step: int) -> Tensor:
    return torch.randn(2 * N, 4, generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, x: Tensor) -> None:
    torch.autograd.backward((model(x) - x.sum(1, keepdim=True)).square().mean())


def train(model: nn.Module, optimizer: Optimizer, rows: slice) -> dict[str, Tensor]:
    """Dense steps, masked ones with accumulation and clipping; the dense gradient of one."""
    given = masks(net())
    for step in range(2):  # moments of the dense model
        backward(model, batch(step)[rows])
        optimizer.step()
        optimizer.zero_grad()
    with hold_masks(model, optimizer, given, check_every=1) as held:
        for step in range(2, 6):
            with held.dense_gradients() as dense:
                for part in (step, step + 100):
                    backward(model, batch(part)[rows])
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            if step == 3:
                held.grow({**given, "2.weight": torch.zeros(3, 5, dtype=torch.bool)})
            if step == 4:
                held.replace(given)
        held.check()
        assert held.masks.keys() == given.keys()
    check_masks(model, given)
    return {name: full(gradient) for name, gradient in dense.items()}


def full(tensor: Tensor) -> Tensor:
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach()


def compare(kind: str, rank: int) -> None:
    single = net()
    whole = train(single, adam(single), slice(None))
    model: nn.Module = net()
    if kind == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        for layer in (model[0], model[2], model):  # type: ignore[index]
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = adam(model)
    dense = train(model, optimizer, slice(rank * N, (rank + 1) * N))
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    for (name, a), b in zip(single.named_parameters(), plain.parameters(), strict=True):
        mine = full(b)
        assert torch.allclose(a, mine, rtol=0, atol=1e-6), f"{kind} {name}"
        removed = ~masks(single)[name]
        assert not mine[removed].any(), f"{kind} {name}"
        for moment in ("exp_avg", "exp_avg_sq"):
            state = full(optimizer.state[b][moment])
            assert not state[removed].any(), f"{kind} {moment} {name}"
        gradient = dense[name]
        if kind == "ddp":  # of this process
            dist.all_reduce(gradient)
            gradient /= 2
        assert torch.allclose(whole[name], gradient, rtol=0, atol=1e-6), f"{kind} gradient {name}"
    found_leak(plain, optimizer)


def found_leak(model: nn.Module, optimizer: Optimizer) -> None:
    """Each process sees what its own shard lets through."""
    weight = model.get_parameter("0.weight")
    off = torch.zeros(weight.shape, dtype=torch.bool)
    with hold_masks(model, optimizer, {"0.weight": off}) as held, torch.no_grad():
        weight.add_(1.0)
        try:
            held.check()
        except SoundnessError:
            return
    raise AssertionError("a leak was not found")


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for kind in ("ddp", "fsdp"):
            compare(kind, rank)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
