"""Several commands in turn, one JSON each; or the results as they stand in README.md.

python -m benchmarks                              # all of them
python -m benchmarks decode context --quick       # some; other options go to each
python -m benchmarks report                       # write results/*.json into README.md and docs
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report

NAMES = (
    "products",
    "resampling",
    "decode",
    "first_token",
    "long_prompt",
    "aligners",
    "context",
    "prefix_cache",
    "overhead",
    "http",
    "delivery",
    "fairness",
    "hot_loading",
    "training",
)
RESULTS = Path(__file__).parent / "results"
PAGES = (Path(__file__).parent / "README.md", Path(__file__).parents[1] / "docs" / "reproduction.md")


def main(arguments: list[str]) -> int:
    """Run what is named; 1 if any of it failed."""
    if arguments == ["report"]:
        for page in PAGES:
            report.rewrite(page, RESULTS)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--device", default="cpu", help="names the files of results, too")
    parser.add_argument("--models", type=Path, help="keep the checkpoints here, and find them here")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON files go")
    options, others = parser.parse_known_intermixed_args(arguments)
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no command is called {', '.join(sorted(unknown))}")
    options.results.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.names or NAMES:
            path = options.results / f"{name}-{options.device.partition(':')[0]}.json"
            shared = ["--device", options.device, "--models", str(options.models or scratch)]
            print(f"== {name}", flush=True)
            began = time.perf_counter()
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path), *shared, *others]
            if subprocess.run(command, check=False).returncode:
                failed.append(name)
            print(f"== {name}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
