"""A scoring pass that was interrupted: its sums and how far it came, in one file.

The file is replaced whole, so that a crash while it is written leaves the one before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from secateurs.batches import tensors
from secateurs.errors import ConfigError, FileFormatError
from secateurs.statistics.jobs import Job
from secateurs.statistics.stream import Pass
from secateurs.tensorfiles import as_bytes, read_tensors, write_tensors
from secateurs.types import Batch

__all__ = ["Progressed", "fingerprint", "read_partial", "write_partial"]

Progressed = tuple[int, int]
"""(turn, batches of it that are done)."""


def fingerprint(jobs: Sequence[Job], run: Pass, first: Batch | None, **asked: object) -> str:
    """A text that changes with anything that the sums depend on: weights, criteria, first batch."""
    held = {
        "criteria": {j.criterion.label: [t.name for t in j.targets] for j in jobs},
        "alive": {n: _hash([units]) for n, units in run.setting.alive.items()},
        "weights": _hash(run.setting.model.state_dict().values()),
        "first batch": None if first is None else _hash(tensors(first)),
        "seed": run.setting.seed,
        **asked,
    }
    return json.dumps(held, sort_keys=True, default=str)


def _hash(held: object) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors(list(held)):  # type: ignore[call-overload]
        found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(as_bytes(tensor.cpu()).numpy().data)
    return found.hexdigest()


def write_partial(path: Path, run: Pass, done: Progressed, marks: str) -> None:
    """Write the sums of a pass and how far it came."""
    texts = {"fingerprint": marks, "turn": str(done[0]), "batches": str(done[1])}
    write_tensors(path, run.sums.state(), texts)


def read_partial(path: Path, run: Pass, marks: str) -> Progressed:
    """Take in what an interrupted pass has left; how far it came.

    Raises:
        ConfigError: it belongs to other weights, criteria or data.
        FileFormatError: it is damaged.
    """
    try:
        state, texts = read_tensors(path)
        before = json.loads(texts["fingerprint"])
        done = int(texts["turn"]), int(texts["batches"])
    except (FileFormatError, KeyError, ValueError) as error:
        raise FileFormatError(
            f"{path} is no partial scoring pass, or damaged: {error}. Delete it to start again"
        ) from error
    now = json.loads(marks)
    other = [name for name in now if before.get(name) != now[name]]
    if other:
        raise ConfigError(
            f"{path} belongs to another pass: {', '.join(other)} differ. "
            "Delete it to start again, or name another file"
        )
    run.sums.load({k: v.to(_device(run)) for k, v in state.items()})
    return done


def _device(run: Pass) -> torch.device:
    return next((p.device for p in run.setting.params.values()), torch.device("cpu"))
