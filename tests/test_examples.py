"""Every example runs as its reader would run it: as a script, in an empty folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("[!_]*.py"))
TIMEOUT_S = 300  # an example should take less than 20 s; this only ends one that hangs


def run(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with `folder` as its working directory."""
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
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


def test_an_example_that_fails_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("print('so far')\nraise SystemExit('broken on purpose')\n")
    done = run(script, tmp_path)
    assert (done.returncode, done.stdout) == (1, "so far\n")
    assert "broken on purpose" in done.stderr
