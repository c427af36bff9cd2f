"""Markers come from the folder a test lives in."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDERS = {"unit", "exactness", "http", "gpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = Path(item.path).relative_to(Path(__file__).parent).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)
