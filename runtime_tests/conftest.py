"""Order and threads of a test run in several processes (``-n 2 --dist loadfile``)."""

from __future__ import annotations

import os

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before anything imports torch; children inherit it.
    share = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

# Seven minutes in one test: whoever gets it last lets the other processes wait.
LONGEST = "test_kernel_cuda.py"


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of below: xdist's own starts with the files of the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that the short ones fill up the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != LONGEST, item.path not in slow))
