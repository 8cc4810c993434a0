"""Groups for ``pytest -n 2 --dist loadgroup``: what shares a fixture runs in one process."""

from __future__ import annotations

import pytest

SHARED = {
    "test_web_demo": "web",
    "test_web_refusals": "web",
    "test_mutants": "damaged",
    "test_bisect": "damaged",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file in one worker, and files with one bundle or page in the same."""
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group(SHARED.get(name, name)))
