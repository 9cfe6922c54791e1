"""Dense networks to prune: training them by their recipe, and keeping them in a cache."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from secateurs.errors import FileFormatError
from secateurs.finetuning import EpochRow, finetune
from secateurs.tasks.base import Data, Task
from secateurs.tensorfiles import read_tensors, write_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["cache_dir", "checksum", "dense_checkpoint", "kept", "train_dense", "trained_once"]

Progress = Callable[[EpochRow], object]


def train_dense(
    task: Task, data: Data, seed: int, *, progress: Progress | None = None
) -> nn.Module:
    """Build the network of a task and train it by its recipe; the result is in eval mode.

    Args:
        task: what to build and how to train it.
        data: from `task.load`; only `data.train` is read, in its order.
        seed: of the initialisation. The caller's random state is left as it was.
        progress: called after each epoch.

    Raises:
        ScoringError: the loss is not finite.
    """
    model = _built(task, seed)
    config = task.train_recipe.finetune
    finetune(model, data.train, task.loss_fn, config, seed=seed, progress=progress)
    return model.eval()


def _built(task: Task, seed: int) -> nn.Module:
    """A new network on the CPU; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return task.build()


def dense_checkpoint(
    task: Task, seed: int, *, full_data: bool = False, progress: Progress | None = None
) -> tuple[nn.Module, Data, bool]:
    """The trained dense network of a task, from the cache if it was trained before.

    The cache is the folder `$SECATEURS_CACHE`, by default `~/.cache/secateurs`. A file is named
    after task, seed, and a hash of what decides the weights (recipe, training data, source and
    initial weights of the network, versions of torch and secateurs). A damaged file is reported by
    a warning, and the network is trained again.

    Args:
        task: from `get_task`.
        seed: of split, order of the samples and initialisation.
        full_data: as in `Task.load`.
        progress: as in `train_dense`.

    Returns:
        The network in eval mode, its data, and whether the weights came from the cache.

    Raises:
        MissingDependencyError: the data is not installed; names the command.
    """
    data = task.load(seed, full_data=full_data)
    model, cached = trained_once(task, data, seed, str(seed), progress=progress)
    return model, data, cached


def trained_once(
    task: Task, data: Data, seed: int, label: str, *, progress: Progress | None = None
) -> tuple[nn.Module, bool]:
    """The network trained on `data.train`, and whether it came from the cache.

    Args:
        task: what to build and how to train it.
        data: from `task.load`, or a part of it.
        seed: of the initialisation.
        label: in the name of the cache file.
        progress: as in `train_dense`.
    """
    path = cache_dir() / f"{task.name}-{label}-{_fingerprint(task, data)}.safetensors"
    return kept(
        path,
        task.name,
        lambda: _built(task, 0),
        lambda: train_dense(task, data, seed, progress=progress),
    )


def kept(
    path: Path, name: str, build: Callable[[], nn.Module], train: Callable[[], nn.Module]
) -> tuple[nn.Module, bool]:
    """The network of a cache file, or a newly trained one that is kept there; and whether kept.

    Of several processes that ask for the same file one trains, and the others wait for it.

    Args:
        path: the cache file; its name says everything that decides the weights.
        name: of the network, for messages.
        build: a network of the same architecture, to be filled from the file.
        train: the trained network.
    """
    with _alone(path):
        if path.exists():
            try:
                return _restore(build, path), True
            except FileFormatError as error:
                warnings.warn(f"cache file {error}; training {name} again", stacklevel=4)
        model = train()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            state = model.state_dict()
            write_tensors(path, state, {"sha256": checksum(state)})
        except OSError as error:
            warnings.warn(f"{path} cannot be written: {error}; not cached", stacklevel=4)
    return model, False


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process of this machine at a time is here for the same file.

    The system frees the place of a process that is killed. Where files cannot be locked, several
    may be here: they do the same work, with the same result.
    """
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    try:  # not beside the file: the cache holds networks only
        file = Path(tempfile.gettempdir(), f"secateurs-{name}.lock").open("a")  # noqa: SIM115
    except OSError:
        yield
        return
    with file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_dir() -> Path:
    """`$SECATEURS_CACHE`, by default `~/.cache/secateurs`."""
    default = Path.home() / ".cache" / "secateurs"
    return Path(os.environ.get("SECATEURS_CACHE") or default).expanduser()


def _fingerprint(task: Task, data: Data) -> str:
    """Hash of what decides the weights besides the seed."""
    model = _built(task, 0)
    versions = torch.__version__, version("secateurs")
    digest = hashlib.sha256(repr((task.train_recipe, str(model), versions)).encode())
    source = getattr(sys.modules.get(type(model).__module__), "__file__", None)
    if source is not None:
        digest.update(Path(source).read_bytes())
    digest.update(checksum(model.state_dict()).encode())  # they may be pretrained
    for inputs, targets in data.train:
        digest.update(inputs.numpy())
        digest.update(targets.numpy())
    return digest.hexdigest()[:12]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names and values: the file format itself would not notice a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _restore(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    """The network with the weights of a cache file, in eval mode."""
    tensors, texts = read_tensors(path)
    if checksum(tensors) != texts.get("sha256"):
        raise FileFormatError(f"{path} is damaged: its checksum does not match")
    model = build()
    model.load_state_dict(tensors)
    return model.eval()
