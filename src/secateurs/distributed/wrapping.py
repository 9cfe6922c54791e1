"""Models as DistributedDataParallel and fully_shard (FSDP2) wrap them.

plain(model)        the module inside of DDP, torch.compile: names without "module."
whole(model)        for a while every rank holds the full weights of an FSDP2 model
full_state(model)   the full state dict on rank 0, empty on the others
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secateurs.distributed.groups import is_dtensor
from secateurs.errors import ConfigError

__all__ = ["full_state", "is_sharded", "plain", "reshard", "whole"]


def plain(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel: what is scored, traced, shrunk and saved.

    Any other model is returned as it is; an FSDP2 model has its own names already.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> plain(net) is net
        True

    Raises:
        ConfigError: the model is wrapped by the older FullyShardedDataParallel.
    """
    while isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        model = model.module
    if _modules_of(model, "FullyShardedDataParallel"):
        raise ConfigError(
            "FullyShardedDataParallel flattens the parameters, so that no unit can be found in "
            "them; shard with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of the model lives in parts on several ranks (FSDP2).

    Example:
        >>> is_sharded(nn.Linear(2, 1))
        False
    """
    return bool(_modules_of(model, "FSDPModule")) or any(map(is_dtensor, model.parameters()))


def reshard(model: nn.Module) -> None:
    """Let go of full weights that an FSDP2 model may still hold from its last run.

    After a forward pass without backward the root keeps them, and names ordinary parameters.
    """
    for part in _modules_of(model, "FSDPModule"):
        part.reshard()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Let every rank hold the full weights of an FSDP2 model, without its hooks, for a while.

    Inside, the model is an ordinary module with ordinary parameters: any rank may run it as often
    as it likes, alone. Gradients and changes made inside are dropped. Called by all ranks. Other
    models pass through untouched. Costs the memory of the full weights on each rank.

    Raises:
        ConfigError: the model is sharded in another way than by `fully_shard`, or by one that casts
            its weights.
    """
    reshard(model)
    parts = _modules_of(model, "FSDPModule")
    if not parts and is_sharded(model):
        raise ConfigError(
            "the parameters are sharded, but not by torch.distributed.fsdp.fully_shard; only "
            "data-parallel sharding can be scored"
        )
    with ExitStack() as stack:
        for part in parts:
            _check_precision(part)
        for part in parts:
            stack.enter_context(_without_hooks(part))
        full: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                if p is None or not is_dtensor(p):
                    continue
                if id(p) not in full:  # a tied one is gathered once, and stays tied
                    held: Any = p.detach()
                    full[id(p)] = nn.Parameter(held.full_tensor(), requires_grad=p.requires_grad)
                stack.callback(module._parameters.__setitem__, name, p)
                module._parameters[name] = full[id(p)]
        yield


def _modules_of(model: nn.Module, kind: str) -> list[Any]:
    """The modules of a class of torch.distributed.fsdp; none where nobody has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [m for m in model.modules() if isinstance(m, getattr(fsdp, kind))]


def _check_precision(part: Any) -> None:
    policy = part._get_fsdp_state()._mp_policy
    if policy.param_dtype is not None:
        raise ConfigError(
            f"fully_shard casts the weights to {policy.param_dtype} (MixedPrecisionPolicy); score "
            "the model before it is sharded, or shard it without param_dtype"
        )


@contextmanager
def _without_hooks(part: Any) -> Iterator[None]:
    """Take away the hooks that gather and shard the weights around each run."""
    state = part._get_fsdp_state()
    before = part._forward_pre_hooks.copy(), part._forward_hooks.copy()
    part._forward_pre_hooks.pop(state._pre_forward_hook_handle.id, None)
    part._forward_hooks.pop(state._post_forward_hook_handle.id, None)
    try:
        yield
    finally:
        for hooks, held in zip((part._forward_pre_hooks, part._forward_hooks), before, strict=True):
            hooks.clear()
            hooks.update(held)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The full state dict, on the CPU, of rank 0; empty on the other ranks. Called by all ranks.

    Names are those of the plain model, for DDP and FSDP2. Load it into a dense model of the same
    class to shrink and save it there.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: Any = get_model_state_dict(model, options=options)
    return dict(found)
