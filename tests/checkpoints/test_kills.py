"""kill -9 at any instant, go on, end bit for bit as without: at least 50 kills in each run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

KILLS = {"training": 12, "cubic": 10, "every": 10, "descent": 10, "stages": 8, "command": 6}
"""Scenario -> how often it is killed at least."""
CHAIN = 4
"""Kills at most before a run may come to its end."""


class Server:
    """The warm process: one line to it, one line back."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, folder: Path, scenario: str, kill: Any = None, **options: Any) -> dict[str, Any]:
        asked = {"scenario": scenario, "folder": str(folder), "kill": kill, **options}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert not answer["failed"], (folder / "error.txt").read_text()
        return answer


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoints.server"],
        cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()


def result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())["result"]


def whole(server: Server, folder: Path, scenario: str) -> tuple[Any, float, int]:
    """The result without interruption, its seconds, and the lines of code it takes."""
    folder.mkdir()
    seconds = server.run(folder, scenario, resume=False)["seconds"]
    found = result(folder)
    counted = folder / "counted"
    counted.mkdir()
    server.run(counted, scenario, ["line", 0], resume=False)
    assert result(counted) == found  # two runs are equal, or nothing here would mean anything
    return found, seconds, json.loads((counted / "result.json").read_text())["lines"]


def instants(draw: random.Random, seconds: float, lines: int) -> Iterator[list[Any]]:
    """How and when to kill: anywhere, and often in the midst of a write."""
    while True:
        yield ["line", draw.randint(1, lines)]
        yield ["write", draw.randint(1, 300)]
        yield ["time", draw.uniform(0, seconds)]
        yield ["line", draw.randint(1, max(1, lines // 4))]
        yield [draw.choice(["replace", "fsync"]), draw.randint(1, 6)]


@pytest.mark.parametrize("scenario", KILLS)
def test_kill_and_go_on(server: Server, tmp_path: Path, scenario: str) -> None:
    expected, seconds, lines = whole(server, tmp_path / "whole", scenario)
    draw = random.Random(scenario)
    kills, runs = 0, 0
    deaths = instants(draw, seconds, lines)
    while kills < KILLS[scenario]:
        folder = tmp_path / f"run{runs}"
        folder.mkdir()
        runs += 1
        told = []
        for attempt in range(CHAIN + 1):
            kill = next(deaths) if attempt < CHAIN else None
            answer = server.run(folder, scenario, kill, resume=attempt > 0)
            told.append((kill, answer["killed"]))
            if not answer["killed"]:
                break
            kills += 1
        assert result(folder) == expected, told


@pytest.mark.parametrize("part", ["random", "optimizer", "weights", "place"])
def test_a_part_that_is_forgotten_is_found_out(server: Server, tmp_path: Path, part: str) -> None:
    """The comparison above fails when going on forgets any part of the state."""
    folder = tmp_path / "whole"
    folder.mkdir()
    server.run(folder, "training", resume=False)
    ends = []
    for plant in (None, part):
        cut = tmp_path / f"cut-{plant}"
        cut.mkdir()
        assert server.run(cut, "training", ["step", 6], resume=False)["killed"]
        server.run(cut, "training", resume=True, plant=plant)
        ends.append(result(cut) == result(folder))
    assert ends == [True, False]
