"""The embedded demo: a small proposal and its aligners, the corpus they learn from, and how both are rebuilt.

Importing this package is cheap: torch is imported by `ram_core.demo.build` and `ram_core.demo.evaluate` only.
"""

from importlib.resources import files
from pathlib import Path

ALIGNERS = ("polite", "pirate", "json", "terse", "safe")
"""Names of the aligners that the bundle carries, each a directory under `aligners/`."""
PARTS = ("proposal", "aligner-base", "aligners")
"""What lies in a bundle: `aligner-base` is the model that every aligner began as."""


def bundle_path() -> Path:
    """Directory of the shipped bundle: its `PARTS`, all Hugging Face directories."""
    return Path(str(files(__package__))) / "bundle"
