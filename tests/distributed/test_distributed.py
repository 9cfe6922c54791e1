"""Several processes give what one gives; and when one of them is gone, the others say so."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from secateurs.distributed import (
    assert_same,
    global_threshold,
    load_sharded,
    newest,
    on_first,
    plain,
    ranks_of,
    save_sharded,
)
from secateurs.errors import ConfigError, FileFormatError
from tests.distributed.cases import adam, masks, net, steps
from tests.distributed.checks import CHECKS, FOR_TWO, run_checks
from tests.distributed.dying import LAST, hang, run_and_die, score_and_die, train_and_die
from tests.distributed.launch import Worker, launch
from tests.distributed.resuming_checks import run_and_be_killed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two processes, then four, run all checks."""
    home = tmp_path_factory.mktemp("ranks")
    found = {2: home / "two", 4: home / "four"}
    for size, folder in found.items():
        launch(run_checks, size, folder)
    return found


EVERY = [(c.__name__, n) for c in CHECKS for n in (2, 4) if n == 2 or c.__name__ not in FOR_TWO]


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_ranks(name: str, size: int, folders: dict[int, Path]) -> None:
    for rank in range(size):
        file, crash = folders[size] / f"{name}.{rank}", folders[size] / f"{rank}.error"
        said = file.read_text() if file.exists() else "not reached"
        crashed = crash.read_text() if crash.exists() else ""
        assert said == "", f"rank {rank}: {said} {crashed}"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_goes_on_from_a_checkpoint_of_four(kind: str, folders: dict[int, Path]) -> None:
    model = net()
    optimizer = adam(model)
    last = newest(folders[4] / kind)
    assert last is not None
    held, extra = load_sharded(last, model, optimizer, group=None)
    assert extra["steps"] == 6
    assert all(held[n].equal(m) for n, m in masks().items())
    steps(model, optimizer, held, range(6, 9))
    whole = net()
    steps(whole, adam(whole), masks(), range(9))
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_the_newest_is_the_last_by_name(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for name in ("step-100", "step-20", "step-3", "step-101.part"):  # in the order of writing
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").touch()
    (tmp_path / "step-200").mkdir()  # not complete
    assert newest(tmp_path) == tmp_path / "step-100"


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    assert launch(run_and_die, 2, tmp_path, timeout=20, limit=60) == [1, -9]
    said = (tmp_path / "0.error").read_text()
    assert "RankError: rank 0 of 2: another process of the group is gone" in said
    assert "from the last checkpoint" in said
    assert str(newest(tmp_path / "checkpoints")).endswith("step-4")


@pytest.mark.parametrize("what", ["train", "cut"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(what: str, tmp_path: Path) -> None:
    """Without leave of any rank; a rank that is left for a moment cannot harm the checkpoints."""
    worker = partial(run_and_be_killed, what=what)
    assert launch(worker, 2, tmp_path, timeout=20, limit=60)[0] == -9
    for error in tmp_path.glob("*.error"):
        error.unlink()
    codes = launch(worker, 2, tmp_path, timeout=20, limit=60)
    assert codes == [0, 0], [error.read_text() for error in tmp_path.glob("*.error")]


FRESH = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it torchrun hands the addresses of the first attempt to the second (pytorch 135712)."""


def test_torchrun_starts_again_after_a_killed_rank(tmp_path: Path) -> None:
    """The first attempt ends at step 5; the second goes on from the checkpoint of step 4."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "--max-restarts=1", "-m", "tests.distributed.dying", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **FRESH}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert end["start"] == 4
    whole = net()
    steps(whole, adam(whole), masks(), range(LAST))
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(end["state"][name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("worker", [score_and_die, train_and_die])
def test_a_killed_rank_ends_the_others(worker: Worker, tmp_path: Path) -> None:
    assert launch(worker, 2, tmp_path, timeout=20, limit=60) == [1, -9]
    assert "RankError: rank 0 of 2: another process" in (tmp_path / "0.error").read_text()


def test_a_rank_that_hangs_ends_the_others(tmp_path: Path) -> None:
    assert launch(hang, 2, tmp_path, timeout=3, limit=60) == [1, 1]
    said = (tmp_path / "0.error").read_text()
    assert "did not come within the timeout of the group" in said


# -- a single process ------------------------------------------------------------------------------


def test_a_single_process_needs_no_group() -> None:
    ranks = ranks_of(None)
    assert (ranks.rank, ranks.size, ranks.gather("x"), ranks.add_up(2, 3)) == (0, 1, ["x"], [2, 3])
    rows = torch.ones(2, 3)
    assert ranks.sum(rows) is rows
    assert ranks.join(rows, [2]) is rows
    assert on_first(None, lambda: 5) == 5
    with pytest.raises(ConfigError, match="torchrun"):
        ranks_of("world")


def test_an_error_of_a_single_process_passes_through() -> None:
    with pytest.raises(KeyError, match="k"), ranks_of(None).agreed("work"):
        raise KeyError("k")


def test_other_things_are_refused() -> None:
    with pytest.raises(ConfigError, match="only tensors and plain values"):
        assert_same({"a": object()}, None)
    with pytest.raises(ConfigError, match="k must be a whole number"):
        global_threshold({"a": torch.ones(1)}, 0, None)
    with pytest.raises(ConfigError, match="floating-point"):
        global_threshold({"a": torch.ones(1).int()}, 1, None)


def test_plain_takes_wrappers_away() -> None:
    model = nn.Linear(2, 1)
    assert plain(nn.DataParallel(model)) is model


def test_damaged_and_missing_parts_are_one_clear_error(tmp_path: Path) -> None:
    model = net()
    path = save_sharded(tmp_path / "c", model, adam(model), group=None)
    (part,) = path.glob("*.distcp")
    content = part.read_bytes()
    for damage in (content[: len(content) // 2], b"x" * len(content), None):
        part.unlink() if damage is None else part.write_bytes(damage)
        what = "is missing" if damage is None else "is damaged"
        with pytest.raises(FileFormatError, match=f"{part.name} {what}: take an earlier"):
            load_sharded(path, model, adam(model), group=None)
    (path / "hashes.json").unlink()
    with pytest.raises(FileFormatError, match="c holds no complete checkpoint of save_sharded"):
        load_sharded(path, model, adam(model), group=None)


def test_a_single_changed_bit_is_found(tmp_path: Path) -> None:
    """torch reads such a file without a word: the weight would be another one."""
    model = net()
    path = save_sharded(tmp_path / "c", model, adam(model), group=None)
    for file in sorted(p for p in path.iterdir() if p.name != "hashes.json"):
        content = file.read_bytes()
        at = len(content) // 2
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(FileFormatError, match=f"{file.name} is damaged"):
            load_sharded(path, model, adam(model), group=None)
        file.write_bytes(content)
    load_sharded(path, model, adam(model), group=None)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    model = net()
    with pytest.raises(FileFormatError, match="cannot be written: rank 0: OSError"):
        save_sharded(tmp_path / "c", model, adam(model), group=None)
    assert list(tmp_path.iterdir()) == []
