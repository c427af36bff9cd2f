"""Do the tests bite? Break the code one line at a time, in a copy, and see them fail.

    python -m tests.mutants                  run all mutants
    python -m tests.mutants --only nucleus   those whose file, text or tests hold "nucleus"

Exits 1 if a mutant survives, if its text does not occur exactly once in its file any more, or if its tests
fail before anything was broken or cannot be run at all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.http.mutants import SERVER_MUTANTS
from tests.mutants import Mutant
from tests.mutants.admin import ADMIN_MUTANTS
from tests.mutants.aligners import ALIGNER_MUTANTS
from tests.mutants.bank import BANK_MUTANTS
from tests.mutants.bench import BENCH_MUTANTS
from tests.mutants.calibration import CALIBRATION_MUTANTS
from tests.mutants.engine import ENGINE_MUTANTS
from tests.mutants.evaluation import EVALUATION_MUTANTS
from tests.mutants.filling import FILLING_MUTANTS
from tests.mutants.hot_loading import HOT_LOADING_MUTANTS
from tests.mutants.models import MODEL_MUTANTS
from tests.mutants.prefill import PREFILL_MUTANTS
from tests.mutants.resampling import RESAMPLING_MUTANTS
from tests.mutants.start import START_MUTANTS
from tests.mutants.tenants import TENANT_MUTANTS
from tests.mutants.training_loop import TRAINING_LOOP_MUTANTS
from tests.mutants.training_stages import TRAINING_STAGES_MUTANTS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ["ram_core", "server", "tests", "pyproject.toml"]
MUTANTS = [
    *RESAMPLING_MUTANTS,
    *ENGINE_MUTANTS,
    *MODEL_MUTANTS,
    *BANK_MUTANTS,
    *HOT_LOADING_MUTANTS,
    *PREFILL_MUTANTS,
    *FILLING_MUTANTS,
    *START_MUTANTS,
    *EVALUATION_MUTANTS,
    *BENCH_MUTANTS,
    *TENANT_MUTANTS,
    *ADMIN_MUTANTS,
    *ALIGNER_MUTANTS,
    *CALIBRATION_MUTANTS,
    *TRAINING_STAGES_MUTANTS,
    *TRAINING_LOOP_MUTANTS,
    *(Mutant(*fields) for fields in SERVER_MUTANTS),
]
_PASSED, _FAILED = 0, 1
_PROCESSES = multiprocessing.get_context("fork")


def _import_slow_libraries() -> None:
    """Once, for all the processes that are forked from this one: none of them is ever broken."""
    import openai  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401


def _be_pytest(tree: Path, tests: tuple[str, ...]) -> None:
    """What a forked process does: forget this checkout, and run `tests` of the copy in silence."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in COPIED]:
        del sys.modules[name]
    # Python takes a cached file for the source of the same second and size.
    sys.dont_write_bytecode = True
    # Plugins are imported already, which pytest would like to have done itself.
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    sys.exit(pytest.main(["-x", "--timeout=60", *quiet, *tests]))


def _pytest(tree: Path, tests: tuple[str, ...]) -> int | None:
    process = _PROCESSES.Process(target=_be_pytest, args=(tree, tests))
    process.start()
    process.join()
    return process.exitcode


def fate(mutant: Mutant, tree: Path) -> str:
    """What becomes of one mutant in `tree`, which is left as it was."""
    path = tree / mutant.file
    before = path.read_text()
    if before.count(mutant.old) != 1:
        return f"text occurs {before.count(mutant.old)} times"
    path.write_text(before.replace(mutant.old, mutant.new))
    try:
        code = _pytest(tree, mutant.tests)
    finally:
        path.write_text(before)
    return {_PASSED: "SURVIVED", _FAILED: "killed"}.get(code, f"pytest could not run ({code})")


def copy_tree(target: Path) -> None:
    """The sources, without what caches left in them."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)


def main() -> int:
    """Run the chosen mutants; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="run mutants whose name or tests hold it"
    )
    only = parser.parse_args().only
    chosen = [
        mutant for mutant in MUTANTS if only in mutant.name or any(only in test for test in mutant.tests)
    ]
    print(f"{len(chosen)} mutants", flush=True)
    _import_slow_libraries()
    num_wrong = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        for tests in sorted({mutant.tests for mutant in chosen}):
            if _pytest(tree, tests) != _PASSED:
                print(f"{' '.join(tests)} fails as it is: a mutant there would prove nothing")
                return 1
        for mutant in chosen:
            start_s = time.monotonic()
            verdict = fate(mutant, tree)
            num_wrong += verdict != "killed"
            print(f"{verdict:10} {time.monotonic() - start_s:5.1f} s  {mutant.name}", flush=True)
    print(f"{len(chosen) - num_wrong} killed, {num_wrong} not")
    return 1 if num_wrong or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
