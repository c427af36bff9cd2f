"""One-line breaks of evaluation that its tests must notice."""

from __future__ import annotations

from tests.mutants import Mutant

_ANSWERING = ("tests/unit/test_evaluation_answering.py",)
_JUDGES = ("tests/unit/test_evaluation_judges.py",)
_REPORT = ("tests/unit/test_evaluation_report.py",)
_HELD_OUT = ("tests/exactness/test_held_out_perplexity.py",)
_COMMAND = ("tests/http/test_eval_command.py",)

EVALUATION_MUTANTS = [
    Mutant("ram_core/evaluation/answering.py", "seed=first_seed + index", "seed=first_seed", _ANSWERING),
    Mutant("ram_core/evaluation/answering.py", "top_p=nucleus.proposal_top_p", "top_p=1.0", _ANSWERING),
    Mutant(
        "ram_core/evaluation/answering.py", "setting.sampling.max_tokens or room, room", "9, 9", _ANSWERING
    ),
    Mutant("ram_core/evaluation/held_out.py", "proposal_top_p=1.0, proposal_top_k=0", "", _HELD_OUT),
    Mutant("ram_core/evaluation/held_out.py", "*example.answer[:-1])", "*example.answer[1:])", _HELD_OUT),
    Mutant("ram_core/evaluation/held_out.py", "logits.log_probs(self.cut, targets)", "log_probs", _HELD_OUT),
    Mutant("ram_core/evaluation/held_out.py", "group.lane(model)[1]", "0", _HELD_OUT),
    Mutant("ram_core/evaluation/held_out.py", "if not self.is_closed:", "if False:", _HELD_OUT),
    Mutant("ram_core/evaluation/preferences.py", "+ pull / (4 * count)", "", _JUDGES),
    Mutant("ram_core/evaluation/preferences.py", "(share + pull / 2) / (1 + pull)", "share", _JUDGES),
    Mutant("ram_core/evaluation/preferences.py", "np.tanh(differences / spread)", "0 * differences", _JUDGES),
    Mutant("ram_core/evaluation/judges.py", "if is_same else 0.5", "if True else 0.5", _JUDGES),
    Mutant(
        "ram_core/evaluation/judges.py",
        "case.messages, case.baseline, case.answer",
        "case.messages, case.answer, case.baseline",
        _JUDGES,
    ),
    Mutant("ram_core/evaluation/judges.py", "not math.isfinite(score)", "False", _JUDGES),
    Mutant("ram_core/evaluation/report.py", "on_answers(answers[-1])", "pass", _REPORT),
    Mutant("ram_core/evaluation/report.py", "failure = str(error)", "raise", _REPORT),
    Mutant(
        "ram_core/evaluation/report.py",
        "answers[0].texts, strict=True",
        "answers[index].texts, strict=True",
        _COMMAND,
    ),
    Mutant(
        "ram_core/evaluation/report.py",
        "None if isinstance(value, float) and not math.isfinite(value) else value",
        "value",
        _REPORT,
    ),
    Mutant(
        "ram_core/evaluation/report.py", "if len(answer) > place]", "if len(answer) > place + 1]", _REPORT
    ),
    Mutant("ram_core/evaluation/frontier.py", "if point.quality.value > best:", "if True:", _REPORT),
    Mutant(
        "ram_core/evaluation/sweep.py",
        "sweep.strengths or (manifest.strength,)",
        "sweep.strengths or (1.0,)",
        _REPORT,
    ),
    Mutant("server/judging.py", "asyncio.Semaphore(self.concurrency)", "asyncio.Semaphore(99)", _COMMAND),
    Mutant(
        "server/judging.py",
        "ask(client, case, case.baseline, case.answer)",
        "ask(client, case, case.answer, case.baseline)",
        _COMMAND,
    ),
    Mutant("server/judging.py", "said[-1].upper()", "said[0].upper()", _COMMAND),
    Mutant("server/judging.py", "if first != second:", "if True:", _COMMAND),
    Mutant("server/judging.py", "if value is not None}", "}", _COMMAND),
    Mutant("server/commands/evaluate.py", "    if report.failure:", "    if False:", _COMMAND),
]
