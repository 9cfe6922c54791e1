"""The same on PostgreSQL: a real server of Debian's package, for this test only."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sql

from secateurs.searching.plan import open_study
from secateurs.searching.study import after, study_trials, work
from tests.search.studies import PATIENCE, expected, make_plan, prepare, watch
from tests.search.test_study import abandoned, kill_two_of_three, race

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
pytestmark = pytest.mark.skipif(
    not BINARIES, reason="no PostgreSQL server: apt-get install postgresql"
)

Database = Callable[[], str]


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """A server that listens on a socket in its own folder, and on no port; gives the folder.

    It refuses to run as root, who becomes the user of the package.
    """
    folder = Path(tempfile.mkdtemp(prefix="secateurs-"))
    binaries = BINARIES[-1].parent
    become: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        become = ["runuser", "-u", "postgres", "--"]

    def run(*command: str) -> None:
        done = subprocess.run(
            [*become, *command],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    settings = f"-k {folder} -c listen_addresses='' -c fsync=off"
    control = (str(binaries / "pg_ctl"), "-D", data, "-w")
    try:
        run(str(binaries / "initdb"), "-D", data, "-A", "trust", "-U", "ann", "--no-sync")
        run(*control, "-l", str(folder / "log"), "-o", settings, "start")
        yield folder
        run(*control, "-m", "fast", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def storage(server: Path, request: pytest.FixtureRequest) -> str:
    """The URL of a database that is empty."""
    name = request.node.name
    engine = sql.create_engine(f"postgresql+psycopg://ann@/postgres?host={server}")
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(
            f"CREATE DATABASE {name}"
        )
    engine.dispose()
    return f"postgresql://ann@/{name}?host={server}"


def test_kill_two_of_three(storage: str, tmp_path: Path) -> None:
    kill_two_of_three(make_plan(storage), tmp_path)


def test_race(storage: str, tmp_path: Path) -> None:
    race(storage, tmp_path)


def test_a_dead_worker_of_a_machine_in_another_time_zone(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats are compared in one zone: it is found in time, and a live one is left alone."""
    plan = replace(make_plan(storage), grace=2)
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")
    with open_study(plan) as far:
        far.store.record_heartbeat(abandoned(far)._trial_id)
        monkeypatch.setenv("PGTZ", "America/Lima")
        with open_study(plan) as near:
            assert near.store.revive(near.study_id) == []
            work(near, prepare(tmp_path), stop=after(PATIENCE))
            assert near.trials() == expected(plan)
    assert watch(plan).running == 0
    assert study_trials(storage, plan.name) == expected(plan)
