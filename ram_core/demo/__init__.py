"""The embedded demo: a small proposal and its aligners, the corpus they learn from, and how both are rebuilt.

Importing this package is cheap: torch is imported by `ram_core.demo.build` and `ram_core.demo.evaluate` only.
"""

from importlib.resources import files
from pathlib import Path

ALIGNERS = ("polite", "pirate", "json", "terse", "safe")
"""Names of the aligners that the bundle carries, each a directory under `aligners/`."""


def bundle_path() -> Path:
    """Directory of the shipped bundle: `proposal/` and `aligners/<name>/`, each a Hugging Face directory."""
    return Path(str(files(__package__))) / "bundle"
