"""Ctrl-C for a process under test."""

from __future__ import annotations

import signal

__all__ = ["hears_ctrl_c"]


def hears_ctrl_c() -> None:
    """For `preexec_fn`: a background job of a shell ignores SIGINT, and passes that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
