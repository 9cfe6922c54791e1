"""Worker processes for a study: replaced when they die, stopped with the lead.

    run_workers(plan, prepare, workers=3) -> [Trial]

The lead only watches the storage and its processes. A worker that ends with an error of its own
ends the search with that error; one that is killed from outside is replaced, and its candidate goes
on from its last finished fold. Workers whose lead is gone put their candidate back and end.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from threading import Thread
from types import FrameType

from secateurs.errors import PruningError
from secateurs.searching.plan import Study, StudyPlan, open_study
from secateurs.searching.results import Trial
from secateurs.searching.study import Evaluate, Watch, after, work

__all__ = ["Prepare", "run_workers"]

Prepare = Callable[[], Evaluate]
"""Makes `evaluate` in a worker: a function of a module, or a `partial` of one (it is pickled).

It sets the number of threads, too: the study itself needs no torch."""

REPLACED = 3  # times that a worker is replaced, on average, before something is wrong
POLL_SECONDS = 0.5
STOP_SECONDS = 10  # until a worker that does not stop is killed


class _Stopped(BaseException):
    """SIGTERM: end now, but put the candidate back."""


@dataclass(eq=False)
class _Worker:
    token: str
    number: int
    process: SpawnProcess
    words: Connection


def run_workers(
    plan: StudyPlan,
    prepare: Prepare,
    *,
    workers: int,
    timeout: float | None = None,
    progress: Watch | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Trial]:
    """Judge all candidates of a study in worker processes.

    Args:
        plan: of the study.
        prepare: makes `evaluate` in each worker.
        workers: processes.
        timeout: seconds after which no fold is begun; what is finished then is returned.
        progress: called a few times a second.
        say: called with a sentence when a worker died.

    Returns:
        the finished trials, by number.

    Raises:
        PruningError: workers were ended from outside too often.
        Exception: what ended a worker.
        KeyboardInterrupt: Ctrl-C; all that is finished is kept.
    """
    stop = after(timeout)
    begin = time.monotonic()
    left = REPLACED * workers
    live: list[_Worker] = []
    with open_study(plan) as study:

        def start(number: int) -> None:
            seconds = None if timeout is None else timeout - (time.monotonic() - begin)
            live.append(_start(plan, prepare, number, seconds))

        try:
            for number in range(1, workers + 1):
                start(number)
            while live:
                wait([worker.process.sentinel for worker in live], timeout=POLL_SECONDS)
                if progress is not None:
                    progress(study.snapshot())
                for worker in [w for w in live if not w.process.is_alive()]:
                    live.remove(worker)
                    if not _died(worker):
                        continue
                    held = study.release(worker.token)
                    again = left > 0 and not stop()
                    say(_obituary(worker, study, held, again))
                    if again:
                        left -= 1
                        start(worker.number)
        finally:
            _end(live, study)
        trials = study.trials()
        if len(trials) < plan.total and not stop():
            raise PruningError(
                f"workers were ended from outside {REPLACED * workers + workers} times, perhaps "
                f"because memory ran out; {len(trials)} of {plan.total} candidates are finished "
                "and kept. The same command goes on; try fewer --workers"
            )
        return trials


def _died(worker: _Worker) -> bool:
    """False: it was done. True: it was ended from outside.

    Raises:
        Exception: what ended it.
    """
    worker.process.join()
    error = None
    if worker.words.poll():
        with suppress(EOFError):
            error = worker.words.recv()
    worker.words.close()
    if error is not None:
        raise error
    return worker.process.exitcode != 0


def _obituary(worker: _Worker, study: Study, held: list[int], again: bool) -> str:
    code = worker.process.exitcode or 0
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    at = "".join(f", at candidate {number}" for number in held)
    then = "another one takes its place" if again else "it is not replaced"
    return f"worker {worker.number} was ended from outside ({how}){at}; {then}"


def _end(live: list[_Worker], study: Study) -> None:
    """Stop all workers; those that do not listen are killed."""
    for worker in live:
        worker.process.terminate()
    limit = time.monotonic() + STOP_SECONDS
    for worker in live:
        worker.process.join(max(0.0, limit - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        study.release(worker.token)
    live.clear()


def _start(plan: StudyPlan, prepare: Prepare, number: int, seconds: float | None) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    token = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
    process = context.Process(
        target=_work, args=(plan, prepare, token, seconds, theirs), name=f"worker {number}"
    )
    process.start()
    theirs.close()
    return _Worker(token, number, process, ours)


# --- in the worker --------------------------------------------------------------------------------


def _work(
    plan: StudyPlan, prepare: Prepare, token: str, seconds: float | None, words: Connection
) -> None:
    """The whole life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the lead, which stops us
    signal.signal(signal.SIGTERM, _stop)
    os.dup2(2, 1)  # what the user's functions print is no data
    Thread(target=_end_with_lead, daemon=True).start()
    try:
        evaluate = prepare()
        with open_study(plan) as study:
            work(study, evaluate, worker=token, stop=after(seconds))
    except _Stopped:
        sys.exit(128 + signal.SIGTERM)
    except BaseException as error:
        words.send(_portable(error))
        sys.exit(1)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the candidate is being put back
    raise _Stopped


def _end_with_lead() -> None:
    lead = multiprocessing.parent_process()
    assert lead is not None
    lead.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _portable(error: BaseException) -> BaseException:
    """The error as it is, if it can travel, with the place where it happened."""
    place = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"In a worker:\n{place}")
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = PruningError(f"a worker failed: {type(error).__name__}: {error}")
        error.add_note(f"In a worker:\n{place}")
    return error
