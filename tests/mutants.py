"""Do the tests bite? Break the code one line at a time, in a copy, and see them fail.

    python -m tests.mutants                  run all mutants
    python -m tests.mutants --only nucleus   those whose file, text or tests hold "nucleus"

Exits 1 if a mutant survives, if its text does not occur exactly once in its file any more, or if its tests
fail before anything was broken or cannot be run at all.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ["ram_core", "server", "tests", "pyproject.toml"]
_PASSED, _FAILED = 0, 1


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; one of `tests` (paths, as pytest takes them) must notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.file}: {self.old.strip()}  →  {self.new.strip()}".replace("\n", "⏎")


def _resampling(module: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    return [
        Mutant(f"ram_core/resampling/{module}.py", old, new, (f"tests/exactness/{tests}.py",))
        for old, new in changes
    ]


MUTANTS = [
    *_resampling(
        "noise",
        "test_noise",
        ("return (x >> bits) & ((1 << (64 - bits)) - 1)", "return x >> bits"),
        ("key = _mix((key ^ position) + _GOLDEN)", "key = _mix(key + position + _GOLDEN)"),
        ("key = _mix((key ^ int(purpose)) + _GOLDEN)", "key = _mix(key + _GOLDEN)"),
        ("bits = _mix(key[:, None] + lanes * _GOLDEN)", "bits = key[:, None] + lanes * _GOLDEN"),
        ("torch.arange(1, num_lanes + 1", "torch.arange(num_lanes"),
        ("CANDIDATES = 2", "CANDIDATES = 1 + 2"),
    ),
    *_resampling(
        "nucleus",
        "test_nucleus",
        ("(key > prefix)", "(key >= prefix)"),
        ("(already < rest)", "(already <= rest)"),
        ("from_bin_up.gather(-1, last_bin + 1)", "from_bin_up.gather(-1, last_bin)"),
        ("bins = units.new_zeros(len(units), _NUM_BINS + 1).scatter_add_(1, digit, units * is_open)",
         "bins = units.new_zeros(len(units), _NUM_BINS + 1).scatter_add_(1, digit, units)"),
        ("for shift in (2 * _DIGIT_BITS, _DIGIT_BITS, 0):", "for shift in (2 * _DIGIT_BITS, _DIGIT_BITS):"),
        ("units = (p.double() * UNITS).long()", "units = (p.double() * 2.0**23).long()"),
        ("clamp(min=1).minimum(total)", "minimum(total)"),
        ("return keep | (top_p >= 1)[:, None]", "return keep"),
        ("torch.where(top_k > 0, top_k, p.shape[-1])", "torch.where(top_k > 1, top_k, p.shape[-1])"),
        ("return p >= min_p[:, None]", "return p > min_p[:, None]"),
        ("keep = log_p > -torch.inf", "keep = p > 0"),
        ("        p = log_p.masked_fill(~keep, -torch.inf).softmax(-1)\n", ""),
    ),
    *_resampling(
        "modes",
        "test_resampling_candidates",
        ("right=True", "right=False"),
        ("cumulative = (mass.double() * UNITS).long().cumsum(-1)",
         "cumulative = (mass.double() * UNITS).float().cumsum(-1)"),
        ("temperature[:, None] * count.log()", "count.log()"),
        ("(log_p / temperature[:, None]).masked_fill", "log_p.masked_fill"),
        (".masked_fill(~nucleus, -torch.inf).softmax(-1)\n    noise", ".softmax(-1)\n    noise"),
        ("< num_candidates[:, None]", "<= num_candidates[:, None]"),
        ("Purpose.CANDIDATES, max_candidates", "Purpose.TOKEN, max_candidates"),
        ("count.log(), log_weight, count > 0", "(count > 0).log(), log_weight, count > 0"),
    ),
    *_resampling(
        "modes",
        "test_resampling_worked_step",
        ("return (log_p + log_weight).masked_fill", "return log_weight.masked_fill"),
        ("return log_weight.masked_fill(~nucleus, -torch.inf)", "return log_weight"),
    ),
    *_resampling(
        "logits",
        "test_resampling_rows",
        ("logits = logits[:, :vocab_size].float()", "logits = logits.float()"),
        ("logits = logits[:, :vocab_size].float()", "logits = logits[:, :vocab_size]"),
        ("is_bad = ~top.isfinite()", "is_bad = top.isnan()"),
        ("is_bad = is_bad | ~logits.amax(-1).isfinite()", "is_bad = ~logits.amax(-1).isfinite()"),
        ("logits = logits.masked_fill(is_bad[:, None], 0.0)", "logits = logits + 0"),
        ("is_bad[term.rows] |= own.is_bad", "is_bad[term.rows] = own.is_bad"),
    ),
    *_resampling(
        "logits",
        "test_resampling_laws",
        ("_LOG_FLOOR = -100.0", "_LOG_FLOOR = -1e4"),
        ("term.strength.abs()", "term.strength"),
        ("1 / num_terms[term.rows])", "0.0)"),
        ("log_q.amax(-1, keepdim=True) > -torch.inf", "log_q.amax(-1, keepdim=True) < 1"),
        ("log_q = log_q.masked_fill(~allowed, -torch.inf)", "log_q = log_q + 0"),
        ("is_usual = (exponent > 0)", "is_usual = (exponent >= 0)"),
    ),
    *_resampling(
        "step",
        "test_resampling_laws",
        ("kl_p_q > params.kl_threshold", "kl_p_q >= params.kl_threshold"),
        ("is_fallback = is_aligned & (is_gated | is_empty)", "is_fallback = is_aligned & is_gated"),
        ("torch.where(is_active, scores, log_p), is_empirical", "scores, is_empirical"),
        ("torch.where(strength > 0, strength * aligner.log_q, 0.0)", "strength * aligner.log_q"),
        ("== Mode.CANDIDATES) & ~is_greedy & ~is_gated", "== Mode.CANDIDATES) & ~is_gated"),
        ("== Mode.CANDIDATES) & ~is_greedy & ~is_gated", "== Mode.CANDIDATES) & ~is_greedy"),
        ("strength > 0, strength * aligner.log_q", "strength > 0, aligner.log_q"),
        ("proposed = log_p.argmax(-1)", "proposed = scores.argmax(-1)"),
        ("params.proposal_temperature.clamp(min=_MIN_TEMPERATURE)", "params.proposal_temperature"),
        ("log_p / params.proposal_temperature.clamp(min=_MIN_TEMPERATURE)[:, None]", "log_p"),
        ("is_forced = has_priority & torch.isin", "is_forced = torch.isin"),
        ("law.argmax(-1), drawn", "scores.argmax(-1), drawn"),
        ("torch.where(is_active, exact, log_p)", "torch.where(is_active, scores, log_p)"),
        ("torch.where(is_active, exact, log_p)", "exact"),
        ("_MIN_TEMPERATURE = 1e-5", "_MIN_TEMPERATURE = 0.0"),
    ),
    *_resampling(
        "step",
        "test_resampling_worked_step",
        ("law = scores / torch.where(is_greedy, 1.0, params.temperature)[:, None]",
         "law = scores / params.temperature.clamp(min=1e-5)[:, None]"),
        ("log_law.masked_fill(aligned.is_empirical[:, None], torch.nan)", "log_law.clone()"),
        ("torch.where(is_nucleus_mode, score_nucleus(log_weight, nucleus), product)", "product"),
        ("uniform_noise(params.seed, params.position, Purpose.TOKEN)",
         "uniform_noise(params.seed, params.position, Purpose.CANDIDATES)"),
    ),
    *_resampling(
        "step",
        "test_resampling_rows",
        ("is_bad = is_bad | aligner.is_bad", "is_bad = is_bad & aligner.is_bad"),
        ("is_bad = is_bad | is_empty", "pass"),
        ("scores = scores.masked_fill(is_empty[:, None], 0.0)", "pass"),
        ("torch.where(is_aligned, x, 0.0)", "x"),
    ),
    *_resampling(
        "telemetry",
        "test_resampling_rows",
        ("total.clamp(min=0.0)", "total"),
        ("torch.where(a > 0, terms, 0.0)", "terms"),
        (".sum(-1, dtype=torch.float64).float()", ".sum(-1)"),
        ("weighted.sum(-1) ** 2 / square", "weighted.sum(-1) / square"),
        ("mass = log_p.masked_fill(~nucleus, -torch.inf).softmax(-1)", "mass = log_p.softmax(-1)"),
        ("(log_q.exp() * nucleus).sum(-1)", "log_q.exp().sum(-1)"),
    ),
    *_resampling(
        "params",
        "test_resampling_laws",
        ("a.eos_priority and not a.is_identity and not s.ignore_eos", "a.eos_priority and not a.is_identity"),
        ("has_proposal_top_p=any(a.proposal_top_p < 1 for a in alignment)", "has_proposal_top_p=False"),
        ("max_candidates=max(drawn, default=0)", "max_candidates=min(drawn, default=0)"),
        ("has_min_p=any(s.min_p for s in sampling)", "has_min_p=all(s.min_p for s in sampling)"),
    ),
]  # fmt: skip


def _pytest(tree: Path, tests: tuple[str, ...]) -> int:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


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
    print(f"{len(chosen)} mutants")
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
