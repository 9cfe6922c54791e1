"""One thread per test process, a cache of its own, and a known random state for every test.

It stands here and not in tests/ so that it holds for the examples in docstrings too.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes started inherit it
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of the process above them
    os.environ["SECATEURS_CACHE"] = tempfile.mkdtemp(prefix="secateurs-tests-")
    atexit.register(shutil.rmtree, os.environ["SECATEURS_CACHE"], ignore_errors=True)

import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test draws the same numbers alone, in another order, or on another worker."""
    torch.manual_seed(0)
