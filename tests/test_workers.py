"""Worker processes: one thread, and an end from outside is told."""

from __future__ import annotations

import os

import pytest
import torch

from secateurs.errors import PruningError
from secateurs.workers import worker_pool


def test_a_worker_has_one_thread() -> None:
    with worker_pool(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1


def test_a_worker_that_is_gone_is_told() -> None:
    with pytest.raises(PruningError, match="ended from outside"), worker_pool(1) as pool:
        pool.submit(os._exit, 9).result()
