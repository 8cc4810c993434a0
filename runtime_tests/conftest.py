"""Order and threads of a test run in several processes (``-n 2 --dist loadfile``)."""

from __future__ import annotations

import os

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before anything imports torch; children inherit it.
    share = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first where xdist, which starts with those of many tests, leaves a choice."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
