"""`secateurs demo`: one full run, and that what it shows is what it measured."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secateurs.cli.demo import CRITERIA, SEEDS, control_row
from secateurs.report.data import Report
from secateurs.report.words import change, quantity
from secateurs.surgery.files import load
from secateurs.tasks import dense_checkpoint, get_task
from tests.cli.signals import hears_ctrl_c

COMMAND = [sys.executable, "-c", "from secateurs.cli import main; main()", "demo"]


@pytest.mark.slow
def test_the_demo_shows_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        [*COMMAND, "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors", "plan.json", "recipe.yaml", "report.json", "report.html"
    }  # fmt: skip

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (out / "report.json").read_text()
    report = Report.from_dict(json.loads(text, parse_constant=refuse))
    shown = " ".join(done.stdout.split())
    rows = {row.name: row for row in report.rows}
    for name in ("test accuracy", "parameters", "MACs", "bytes on disk"):
        row = rows[name]
        cells = quantity(row.before, row.unit), quantity(row.after, row.unit), change(row).text
        assert " ".join([name, *cells]) in shown

    macs = rows["MACs"]
    assert (macs.before or 0) >= 5 * (macs.after or math.inf)
    by_name = {c.name: c for c in report.controls}
    assert set(by_name) == set(CRITERIA) == {"taylor", "magnitude", "random"}
    assert all(c.seeds == SEEDS for c in report.controls)
    method = by_name["taylor"]
    assert method.role == "method"
    assert (method.difference or -1) >= -0.01
    for control in report.controls:
        line = rf"{control.name} +{100 * (control.mean or 0):.2f} %"
        assert re.search(line, done.stdout)

    # the model that was written is the one that was measured, and what seed 0 of the controls gave
    task = get_task("digits-cnn")
    dense, data, cached = dense_checkpoint(task, 0)
    assert cached
    small = load(out, task.build)
    row = rows["test accuracy"]
    assert row.before == task.metric(dense, data.test)["accuracy"]
    assert row.after == task.metric(small, data.test)["accuracy"]
    assert (out / "model.safetensors").stat().st_size == rows["bytes on disk"].after

    again = subprocess.run(
        [*COMMAND, "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stdout) == (2, "")
    assert "Add --force" in again.stderr


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_and_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))
    with subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path / "demo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hears_ctrl_c,
    ) as process:
        while not list((tmp_path / "cache").glob("*.safetensors")):  # the workers are training
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    assert err.strip() == "secateurs: interrupted"
    assert not (tmp_path / "demo").exists()


def test_a_control_row() -> None:
    row = control_row("random", {0: (0.90, 0.80), 1: (0.92, 0.86), 2: (0.94, 0.92)})
    assert row.mean == pytest.approx(0.86)
    assert row.difference == pytest.approx(-0.06)
    assert row.standard_error == pytest.approx(0.06 / math.sqrt(3))
    assert row.difference_error == pytest.approx(0.04 / math.sqrt(3))
    assert (row.seeds, row.role) == ((0, 1, 2), "control")
    single = control_row("taylor", {5: (0.9, 0.8)})
    assert (single.standard_error, single.difference_error, single.role) == (None, None, "method")
