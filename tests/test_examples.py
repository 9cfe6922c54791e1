"""Every example runs as its reader would run it: as a script, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("[!_]*.py"))
TIMEOUT_S = 300  # an example should take less than 20 s; this only ends one that hangs


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(script: Path, folder: Path, *by: str) -> subprocess.CompletedProcess[str]:
    """Run a script with `folder` as its working directory."""
    return subprocess.run(
        [sys.executable, *by, str(script)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"} if by else None,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("script", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example_runs(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout, "an example should print what it found"


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    script = next(path for path in EXAMPLES if path.stem.endswith("many_processes"))
    one, two = run(script, tmp_path), run(script, tmp_path, *TORCHRUN)
    assert two.returncode == 0, two.stderr
    told = [[line for line in d.stdout.splitlines() if "samples" not in line] for d in (one, two)]
    assert told[0] == told[1]
    assert "process 1 of 2: 539 samples" in two.stdout


def test_an_example_that_fails_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("print('so far')\nraise SystemExit('broken on purpose')\n")
    done = run(script, tmp_path)
    assert (done.returncode, done.stdout) == (1, "so far\n")
    assert "broken on purpose" in done.stderr
