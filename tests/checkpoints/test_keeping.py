"""A folder of checkpoints: when, how many, which one is next, and what is refused."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from secateurs.checkpoints import (
    UNREPEATABLE,
    Checkpoints,
    batch_mark,
    files,
    random_state,
    set_random_state,
)
from secateurs.errors import ConfigError, FileFormatError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def test_the_newest_stay(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "c", keep=2)
    assert kept.latest() is None
    for step in (1, 2, 3):
        kept.save(step, {"step": step})
    assert names(tmp_path / "c") == [f"checkpoint-0000000{n}.safetensors" for n in (2, 3)]
    found = Checkpoints(tmp_path / "c").latest()
    assert found is not None
    assert (found.step, found.state) == (3, {"step": 3})
    kept.clear()
    assert not (tmp_path / "c").exists()


HOLDS = """
import sys, time
from secateurs.checkpoints import Checkpoints
kept = Checkpoints(sys.argv[1])
kept.save(1, 1)
print("held", flush=True)
time.sleep(600)
"""


def test_another_process_is_kept_out_until_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateurs.checkpoints.keeping.WAIT", 0.1)
    mine, refused = Checkpoints(tmp_path), "another process writes its checkpoints to"
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match=refused):
                mine.begin({}, resume=True)
            with pytest.raises(ConfigError, match=refused):
                mine.save(2, 2)
            with pytest.raises(ConfigError, match=refused):
                mine.clear()
            assert len(mine.files) == 1
            assert mine.latest() is not None  # reading is free
        finally:
            other.kill()
    found = mine.begin({}, resume=True)
    assert found is not None
    assert found.step == 1
    mine.save(2, 2)
    Checkpoints(tmp_path).clear()  # the same process may have several
    assert not tmp_path.exists()


def test_a_folder_that_cannot_be_locked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("secateurs.checkpoints.keeping.FileLock.acquire", fails)
    said: list[str] = []
    kept = Checkpoints(tmp_path, say=said.append)
    kept.save(1, 1)
    kept.save(2, 2)
    assert len(said) == 1
    assert "cannot be locked" in said[0]


def test_when_one_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("secateurs.checkpoints.keeping.time.monotonic", lambda: now[0])
    steps, seconds = Checkpoints(tmp_path / "a", every=3), Checkpoints(tmp_path / "b")
    both = Checkpoints(tmp_path / "c", every=3, seconds=5)
    assert [steps.due(n) for n in (1, 2, 3, 4)] == [False, False, True, True]
    steps.save(4, None)
    assert [steps.due(n) for n in (6, 7)] == [False, True]
    now[0] += 5
    assert (steps.due(5), seconds.due(5), both.due(1)) == (False, False, True)
    now[0] += 55
    assert seconds.due(0)


def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        kept.save(step, step)
    newest = kept.files[-1]
    newest.write_bytes(newest.read_bytes()[:-9])
    said: list[str] = []
    again = Checkpoints(tmp_path, keep=2, say=said.append)
    found = again.latest()
    assert found is not None
    assert found.step == 1
    assert newest.name in said[0]
    assert found.path.name in said[0]
    with pytest.warns(UserWarning, match=newest.name):
        Checkpoints(tmp_path).latest()
    again.save(3, 3)  # the damaged one goes, not the last good one
    assert names(tmp_path) == [f"checkpoint-0000000{n}.safetensors" for n in (1, 3)]


def test_when_all_are_damaged_nothing_starts_again_by_itself(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, 1).write_bytes(b"torn")
    with pytest.raises(FileFormatError, match=r"no checkpoint in .* is whole"):
        kept.latest()


def test_what_a_killed_write_has_left_is_removed(tmp_path: Path) -> None:
    part = tmp_path / "checkpoint-00000001.safetensors.part"
    part.write_bytes(b"half")
    kept = Checkpoints(tmp_path)
    assert kept.latest() is None
    kept.save(1, 1)
    assert names(tmp_path) == ["checkpoint-00000001.safetensors"]


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, torch.ones(3))

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(files, "write", refuse)
        with pytest.raises(FileFormatError, match="No space left on device"):
            kept.save(2, torch.ones(3))
    found = kept.latest()
    assert found is not None
    assert found.step == 1
    kept.save(2, torch.ones(3))
    assert names(tmp_path) == ["checkpoint-00000002.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "c").save(1, 1)


def test_another_run_is_refused_and_named(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, 1, {"stage": {"lr": 0.1, "curve": "cubic"}, "seed": 3})
    with pytest.raises(ConfigError, match=r"another run: stage.lr was 0.1 and is 0.2; seed was 3"):
        kept.latest({"stage": {"lr": 0.2, "curve": "cubic"}, "seed": 4})
    assert kept.latest({"stage": {"lr": 0.1, "curve": "cubic"}, "seed": 3})


def test_begin(tmp_path: Path) -> None:
    said: list[str] = []
    kept = Checkpoints(tmp_path, say=said.append)
    assert kept.begin({}, resume=False) is None
    assert kept.begin({}, resume=True) is None
    assert "starting from the beginning" in said[0]
    kept.save(1, "state", {})
    assert kept.begin({}, resume=True)
    with pytest.raises(ConfigError, match="resume=True"):
        kept.begin({}, resume=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"every": 0}, "every"), ({"keep": 0}, "keep"), ({"keep": None}, "keep"),
     ({"every": 1.5}, "every"), ({"seconds": -1}, "seconds"), ({"seconds": "1"}, "seconds")],
)  # fmt: skip
def test_figures_out_of_range(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Checkpoints(tmp_path, **options)


# --- random states and data ----------------------------------------------------------------------


def drawn(loader: Any) -> list[Any]:
    """Numbers from every source."""
    return [
        torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(),  # noqa: NPY002
        [batch[0].tolist() for batch in loader],
    ]  # fmt: skip


def test_every_source_of_random_numbers_is_put_back() -> None:
    loader = DataLoader(
        TensorDataset(torch.arange(6.0)), shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    state = random_state(loader)
    first = drawn(loader)
    assert drawn(loader) != first
    set_random_state(state, loader)
    assert drawn(loader) == first


class LateSampler(RandomSampler):
    """Makes its generator when it is first read, as that of accelerate does."""

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(3)
        yield from super().__iter__()


def late_loader() -> DataLoader[Any]:
    data = TensorDataset(torch.arange(6.0))
    return DataLoader(data, sampler=LateSampler(data))


def test_a_generator_made_while_looking_is_unmade() -> None:
    loader, untouched = late_loader(), late_loader()
    state = random_state(loader)
    first = drawn(loader)
    set_random_state(state, loader)
    assert drawn(loader) == first
    set_random_state(state, loader)
    torch.manual_seed(0)
    twice = [drawn(loader)[-1], drawn(loader)[-1]]
    torch.manual_seed(0)
    assert twice == [drawn(untouched)[-1], drawn(untouched)[-1]]


def test_a_generator_still_to_be_made_gets_the_state_that_was_held() -> None:
    loader, fresh = late_loader(), late_loader()
    drawn(loader)
    state = random_state(loader)
    second = drawn(loader)
    set_random_state(state, fresh)
    assert drawn(fresh) == second


def test_the_state_of_other_loaders_is_refused() -> None:
    with pytest.raises(ConfigError, match="have 0 places for generators, the state is of batches"):
        set_random_state(random_state(late_loader()), [])


def test_the_mark_of_data_does_not_depend_on_random_states_and_changes_none() -> None:
    x = torch.arange(24.0).reshape(12, 2)
    own = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(x, x), batch_size=5, shuffle=True, generator=own)
    before = random_state(loader)
    mark = batch_mark(loader)
    after = random_state(loader)
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["generators"][0], after["generators"][0])
    drawn(loader)
    assert batch_mark(loader) == mark
    assert batch_mark(DataLoader(TensorDataset(x + 1, x), batch_size=5, shuffle=True)) != mark
    assert mark.startswith("3 batches, the first ")


def test_data_that_does_not_repeat_is_told(tmp_path: Path) -> None:
    source = np.random.default_rng()

    class Streams:
        def __iter__(self) -> Any:
            yield torch.from_numpy(source.normal(size=3)), torch.zeros(3)

    mark = batch_mark(Streams())
    assert mark == f"batches, the first {UNREPEATABLE}"
    said: list[str] = []
    Checkpoints(tmp_path, say=said.append).keeper({"data": mark}, resume=False)
    assert "will not end bit for bit" in said[0]


def test_a_file_of_another_version_is_neither_passed_over_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, {})
    with monkeypatch.context() as newer:
        newer.setattr(files, "VERSION", "2")
        kept.save(2, {})
    with pytest.raises(FileFormatError, match="version '2'; this version reads"):
        kept.latest()
    assert names(tmp_path) == [f"checkpoint-0000000{n}.safetensors" for n in (1, 2)]


def test_a_file_that_the_system_does_not_give_is_passed_over_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path)
    newest = [kept.save(1, {}), kept.save(2, {})][-1]
    opened = Path.open

    def refused(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == newest:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", refused)
        with pytest.warns(UserWarning, match="Permission denied"):
            found = kept.latest()
    assert found is not None
    assert found.step == 1
    kept.save(2, {})
    assert newest.exists()


def test_a_folder_that_is_a_link_is_emptied_and_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "disk")
    kept = Checkpoints(tmp_path / "c")
    kept.save(1, {})
    kept.clear()
    assert names(tmp_path) == ["c", "disk"]
    assert names(tmp_path / "disk") == []


def test_a_batch_of_one_entry_of_a_column_has_a_mark() -> None:
    table = torch.arange(6.0).reshape(2, 3)
    assert "1 batches" in batch_mark([(table[:1], table[:1, 2])])
