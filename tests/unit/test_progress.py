"""Long work tells where it is, on a terminal or in a log."""

from __future__ import annotations

import pytest

from ram_core.progress import Progress, terminal_progress


def test_without_a_terminal_each_stage_has_its_first_and_last_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with terminal_progress() as show:
        for stage in ("corpus", "proposal"):
            for step in range(1, 4):
                show(Progress(stage, step, 3, note=f"loss {step}"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "corpus: 1/3 loss 1",
        "corpus: 3/3 loss 3",
        "proposal: 1/3 loss 1",
        "proposal: 3/3 loss 3",
    ]
