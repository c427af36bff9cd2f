"""One-line breaks of measures, coverage, calibration and stress that their tests must notice."""

from __future__ import annotations

from tests.mutants import Mutant

_MEASURES = ("tests/unit/test_evaluation_measures.py",)
_COVERAGE = ("tests/unit/test_evaluation_coverage.py",)
_CALIBRATION = ("tests/unit/test_evaluation_calibration.py",)
_STRESS = ("tests/unit/test_evaluation_stress.py",)
_CONVERT = ("tests/unit/test_server_convert.py",)
_PACK = ("tests/unit/test_aligner_verification.py",)

CALIBRATION_MUTANTS = [
    Mutant(
        "ram_core/evaluation/measures.py",
        "key=lambda other: abs(other - length)",
        "key=lambda other: 0",
        _MEASURES,
    ),
    Mutant(
        "ram_core/evaluation/measures.py",
        "self._second[gram] if owner == index else largest",
        "largest",
        _MEASURES,
    ),
    Mutant("ram_core/evaluation/measures.py", "elif count > self._second[gram]:", "elif False:", _MEASURES),
    Mutant(
        "ram_core/evaluation/measures.py", "num_matches or _SMOOTHED_MATCHES", "num_matches or 1", _MEASURES
    ),
    Mutant(
        "ram_core/evaluation/measures.py", "random.Random(seed).sample", "random.Random(0).sample", _MEASURES
    ),
    Mutant("ram_core/evaluation/measures.py", "math.ceil(0.95 * len(ordered)) - 1", "-1", _MEASURES),
    Mutant("ram_core/evaluation/measures.py", "self_bleu(spoken,", "self_bleu(words,", _MEASURES),
    Mutant("ram_core/evaluation/coverage.py", "if num_texts[gram] > 1)", "if count > 1)", _COVERAGE),
    Mutant(
        "ram_core/evaluation/coverage.py", 'finish_reason == "length"', 'finish_reason == "stop"', _COVERAGE
    ),
    Mutant(
        "ram_core/evaluation/coverage.py", "if low < length <= high", "if low <= length <= high", _COVERAGE
    ),
    Mutant(
        "ram_core/evaluation/coverage.py", "len(both) / len(wanted)", "len(both) / len(answers)", _COVERAGE
    ),
    Mutant(
        "ram_core/evaluation/recommendation.py",
        "return fmean(lost) <= error",
        "return fmean(lost) <= 0",
        _CALIBRATION,
    ),
    Mutant(
        "ram_core/evaluation/recommendation.py",
        "(gate.kl_pi_p, -gate.kl_threshold)",
        "(-gate.kl_pi_p, -gate.kl_threshold)",
        _CALIBRATION,
    ),
    Mutant(
        "ram_core/evaluation/recommendation.py",
        "(gate.kl_pi_p, -gate.kl_threshold)",
        "(gate.kl_pi_p, gate.kl_threshold)",
        _CALIBRATION,
    ),
    Mutant("ram_core/evaluation/calibration.py", "    snapshot.require_unchanged()\n", "", _CALIBRATION),
    Mutant(
        "ram_core/evaluation/calibration.py",
        "if math.isfinite(step.kl_p_q)]",
        "]",
        _CALIBRATION,
    ),
    Mutant(
        "ram_core/evaluation/calibration.py",
        "self._settings[setting.label] = setting",
        "self._settings[setting.label] = self.setting(setting.label)",
        _CALIBRATION,
    ),
    Mutant("server/commands/calibrate.py", "    report.require_sound()\n", "", _CALIBRATION),
    Mutant("ram_core/evaluation/stress.py", "value < bar", "value <= bar", _STRESS),
    Mutant("ram_core/evaluation/stress.py", "supported=held[-1].supported", "supported=1.0", _STRESS),
    Mutant(
        "ram_core/evaluation/stress.py",
        "manifest.strength if self._strength is None else self._strength",
        "manifest.strength",
        _STRESS,
    ),
    Mutant("ram_core/evaluation/ladders.py", "ours & theirs", "ours | theirs", _STRESS),
    Mutant("ram_core/evaluation/ladders.py", "judges.get(rung.judge or judge)", "judges.get(judge)", _STRESS),
    Mutant("server/openai/convert.py", '"num_candidates": lease.num_candidates,', "", _CONVERT),
    Mutant("ram_core/aligners/pack.py", '    "candidates",\n', "", _PACK),
]
