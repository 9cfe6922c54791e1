"""The database of a study: Optuna's own storage, made safe for workers that can die at any moment.

What Optuna gives: atomic numbers for trials, attributes, and a heartbeat. What is added here:

- every transaction on SQLite takes the write lock first, so that two processes cannot take the
  same trial (Optuna reads and then writes, which only a server database makes safe by itself);
- a silent trial goes back to the queue under its own number, with all that it has stored. Optuna's
  retry fails it and adds a copy: if the process that does this dies in between, the trial is lost;
- a worker that died between taking a trial and its first heartbeat is found, too;
- attributes that the first writer settles, whoever comes second.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs.errors import ConfigError, MissingDependencyError

try:
    import optuna
    import sqlalchemy as sql
    from optuna.exceptions import (
        ExperimentalWarning,
        StorageInternalError,
        UpdateFinishedTrialError,
    )
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise MissingDependencyError(
        "a search needs Optuna: pip install 'secateurs[search]'"
    ) from error

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Connection, Engine

__all__ = [
    "FrozenTrial",
    "StorageInternalError",
    "Store",
    "TrialState",
    "UpdateFinishedTrialError",
    "open_store",
    "optuna",
    "storage_url",
]

ATTEMPTS = 20  # two processes that make the tables at once: one of them meets half of them
BUSY_SECONDS = 60  # that a process waits for the lock of SQLite

HEARTLESS = """
SELECT t.trial_id FROM trials t LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id
WHERE t.study_id = :study AND t.state = 'RUNNING' AND h.trial_id IS NULL
"""
SETTLE = """
INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (:study, :key, :value)
ON CONFLICT DO NOTHING
"""


class Store(RDBStorage):
    """Optuna's storage on SQLite or PostgreSQL; use `open_store`."""

    def __init__(self, url: str, *, interval: int, grace: int) -> None:
        arguments = {"timeout": BUSY_SECONDS} if url.startswith("sqlite") else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(
                url,
                {"connect_args": arguments, "pool_pre_ping": True},
                heartbeat_interval=interval,
                grace_period=grace,
            )
        self.interval = interval
        prepare = _prepare_sqlite if self.engine.name == "sqlite" else _prepare_postgresql
        prepare(self.engine)
        self.engine.dispose()  # connections from before are without what was just prepared

    def get_heartbeat_interval(self) -> None:
        """None: Optuna itself neither beats nor fails silent trials; `revive` puts them back."""

    def settle(self, study_id: int, key: str, value: Any) -> Any:
        """Store an attribute of a study unless there is one; returns the one that holds.

        Of several processes that do this at once, one wins and all get the same answer.
        """
        row = {"study": study_id, "key": key, "value": json.dumps(value)}
        with self.engine.begin() as connection:
            connection.execute(sql.text(SETTLE), row)
        return self.get_study_user_attrs(study_id)[key]

    def revive(self, study_id: int) -> list[int]:
        """Put trials back whose worker is silent for longer than the grace; returns their ids.

        A trial without a heartbeat gets one, and is put back if no second follows in time. Trials
        that wait get one, too: whoever takes one is not silent from the first moment on.
        """
        with self.engine.begin() as connection:
            rows = connection.execute(sql.text(HEARTLESS), {"study": study_id}).all()
        for row in rows:
            self.record_heartbeat(row[0])
        for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,)):
            self.record_heartbeat(trial._trial_id)
        stale = self._get_stale_trial_ids(study_id)
        for trial_id in stale:
            self.record_heartbeat(trial_id)
            self.put_back(trial_id)
        return stale

    def close(self) -> None:
        """Give the connections back."""
        self.remove_session()
        self.engine.dispose()

    def put_back(self, trial_id: int) -> None:
        """Let a trial that has begun wait for a worker; nothing happens if it is finished."""
        with suppress(UpdateFinishedTrialError):
            self.set_trial_state_values(trial_id, TrialState.WAITING)


def _prepare_sqlite(engine: Engine) -> None:
    """Readers beside one writer, and the lock at the beginning of each transaction."""

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # or the driver begins transactions as it likes
        connection.execute("PRAGMA synchronous=NORMAL")  # safe from kill -9, and much faster

    def begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    sql.event.listen(engine, "connect", connected)
    sql.event.listen(engine, "begin", begun)


def _prepare_postgresql(engine: Engine) -> None:
    """One time zone: the heartbeats of machines are compared without it."""

    def connected(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET TIME ZONE 'UTC'")
        connection.commit()

    sql.event.listen(engine, "connect", connected)


def storage_url(storage: str) -> URL:
    """The storage as a URL that Optuna reads; PostgreSQL always through psycopg 3.

    Raises:
        ConfigError: no URL, or neither SQLite in a file nor PostgreSQL.

    Example:
        >>> storage_url("postgresql://ann@db/search").drivername
        'postgresql+psycopg'
    """
    rule = "storage must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        url = sql.make_url(storage)
    except sql.exc.ArgumentError as error:
        raise ConfigError(f"{rule}, got {storage!r}") from error
    kind = url.get_backend_name()
    if kind == "postgres":  # the word that hosting services use
        kind = "postgresql"
    if kind == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite" or not url.database or url.database == ":memory:":
        raise ConfigError(f"{rule}, got {url.render_as_string(hide_password=True)!r}")
    return url


def open_store(storage: str, *, interval: int = 5, grace: int = 30, create: bool = True) -> Store:
    """The storage, with its tables.

    Args:
        storage: see `storage_url`.
        interval: seconds between heartbeats.
        grace: seconds without one after which a worker counts as dead.
        create: False refuses an SQLite file that is not there.

    Raises:
        ConfigError: it cannot be reached or is no database.
        MissingDependencyError: the driver of PostgreSQL is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = storage_url(storage)
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite":
        file = Path(str(url.database))
        if not create and not file.exists():
            raise ConfigError(f"there is no study yet: {file} does not exist")
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        engine = sql.create_engine(url)
        with engine.connect() as connection:
            connection.execute(sql.text("SELECT 1"))
        engine.dispose()
    except ImportError as error:
        raise MissingDependencyError(
            f"{shown} needs a driver: pip install 'secateurs[postgresql]'"
        ) from error
    except sql.exc.SQLAlchemyError as error:
        raise ConfigError(f"storage {shown} cannot be opened: {_first_line(error)}") from error
    address = url.render_as_string(hide_password=False)
    return _patiently(lambda: Store(address, interval=interval, grace=grace), shown)


def _patiently(make: Callable[[], Store], shown: str) -> Store:
    """Try again while another process makes the same tables."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return make()
        except (sql.exc.SQLAlchemyError, StorageInternalError) as error:
            if attempt == ATTEMPTS:
                raise ConfigError(
                    f"storage {shown} cannot be used: {_first_line(error)}"
                ) from error
            time.sleep(0.1)
    raise AssertionError


def _first_line(error: BaseException) -> str:
    inner = getattr(error, "orig", None) or error.__cause__ or error
    return str(inner).strip().splitlines()[0] if str(inner).strip() else type(inner).__name__
