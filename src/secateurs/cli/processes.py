"""Verbs that work in several processes, as torchrun starts them: one speaks for all."""

from __future__ import annotations

import io
import os
import sys
from contextlib import ExitStack, redirect_stderr, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from secateurs.distributed import Ranks

__all__ = ["SEVERAL", "begin", "end", "hush", "n_processes", "speak"]

SEVERAL = ("run", "finetune")
"""Verbs that several processes do together."""
SAID, SPEAKERS, HEARD = "secateurs/said", "secateurs/speakers", "secateurs/heard/"
PATIENCE = timedelta(seconds=3)
"""How long to wait whether another process says what has happened."""
SOON = timedelta(seconds=1)
"""How long the one that has said it waits until the others know."""

_quiet = ExitStack()
_store: Any = None


def n_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdecimal() else 1


def _rank() -> int:
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdecimal() else 0


def hush() -> None:
    """Until `begin` every process meets the same errors: the first one tells them."""
    if n_processes() > 1 and _rank():
        _quiet.enter_context(redirect_stderr(io.StringIO()))


def begin() -> Ranks:
    """The processes that torchrun has started, from now on a group; or this one alone.

    Tensors on GPUs travel by nccl, the others by gloo; each process has its own GPU.
    """
    from secateurs.distributed import ranks_of
    from secateurs.errors import ConfigError

    global _store
    if n_processes() == 1:
        return ranks_of(None)
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    _quiet.close()
    if missing := [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={n_processes()}, but {', '.join(missing)} not set: start with torchrun, "
            "or unset WORLD_SIZE for a run in one process"
        )
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://"))
        backend = "gloo"
        if torch.cuda.is_available() and dist.is_nccl_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        _store = store
    return ranks_of("world")


def speak(text: str, error: BaseException | None = None) -> None:
    """Say on stderr why all end: once, the first process if it knows."""
    from secateurs.errors import RankError

    if _store is None:
        if not (n_processes() > 1 and _rank()):
            print(text, file=sys.stderr)
        return
    lost = isinstance(error, RankError) and error.lost
    with suppress(RuntimeError):  # nobody has, or torchrun is gone with its store
        if _rank() or lost:
            _store.wait([SAID], PATIENCE)
            _store.set(f"{HEARD}{_rank()}", "yes")
            return
    with suppress(RuntimeError):
        if _store.add(SPEAKERS, 1) > 1:
            return
    print(text, file=sys.stderr, flush=True)
    with suppress(RuntimeError):  # the store may end with this process: let the others hear
        _store.set(SAID, "yes")
        others = [f"{HEARD}{rank}" for rank in range(n_processes()) if rank != _rank()]
        _store.wait(others, SOON)


def end(code: int) -> NoReturn:
    """End this process; without cleaning up behind a group, which aborts it now and then."""
    _quiet.close()
    if _store is None:
        sys.exit(code)
    import torch.distributed as dist

    if code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
