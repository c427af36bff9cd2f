"""Markers come from the folder a test lives in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.told import TABLE

# Tiny tensors: threads cost more than they bring, ruinously so on a busy machine.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Kernels are then run by Triton's interpreter; Triton reads this once, when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

FOLDERS = {"unit", "exactness", "http", "faults", "load", "gpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = Path(item.path).relative_to(Path(__file__).parent).parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of all faults that were injected."""
    if TABLE and terminalreporter.config.getoption("capture") == "no":
        terminalreporter.write_sep("=", "faults")
        for line in TABLE.lines():
            terminalreporter.write_line(line)
