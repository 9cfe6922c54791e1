"""Ctrl-C in a training that leaves checkpoints: finish the step, write one, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupt", "interrupts_wait"]


class Interrupt:
    """Whether Ctrl-C was pressed."""

    asked = False


@contextmanager
def interrupts_wait() -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C is only noted, for who asks; a second one interrupts at once.

    Outside the main thread, and where a program handles Ctrl-C in its own way, nothing changes.
    """
    noted = Interrupt()
    usual = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or usual is not signal.default_int_handler:
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, usual)
