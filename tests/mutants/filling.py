"""Breaks of what has an aligner read the prompts that wait for it while its weights come."""

from __future__ import annotations

from tests.mutants import mutants

_COMES = "tests/exactness/test_reading_as_weights_come.py"
_COMES_SAME = f"{_COMES}::test_the_answer_is_the_same"
_FILLING = "tests/unit/test_filling.py"
_HTTP = "tests/http/test_reading_ahead.py"

FILLING_MUTANTS = [
    *mutants(
        "ram_core/engine/prompt_ends.py",
        _COMES_SAME,
        ("if lane and not row.keeps_end:", "if False:"),
        ("[row.lanes[lane].strength]", "[1.0]"),
        ("row.keeps_end or row.knows_end for row", "row.keeps_end for row"),
        (
            "            if not row.keeps_end:\n                row.sequence.end_logits.clear()",
            "            row.sequence.end_logits.clear()",
        ),
    ),
    *mutants(
        "ram_core/models/filling.py",
        _FILLING,
        ("            self._num_there += 1\n", "            self._num_there += 2\n"),
        ("if self._is_void or self._num_there <= place:", "if self._num_there <= place:"),
        ("if self._is_void or self._num_there <= place:", "if self._is_void:"),
        ("lambda: self._is_void or self._num_there > place", "lambda: self._num_there > place"),
        ("                self._require()\n                raise", "                raise"),
        ("                raise\n        self._require()\n", "                raise\n"),
        (
            "                hooks.callback(leaf.register_forward_pre_hook(waiting_for(place)).remove)",
            "                leaf.register_forward_pre_hook(waiting_for(place))",
        ),
        ("            left_s = deadline_s - time.monotonic()", "            left_s = 99.0"),
    ),
    *mutants(
        "ram_core/models/model_stack.py",
        _COMES,
        (
            "            filling.give_up()\n            raise\n        del self._fillings[slot]",
            "            del self._fillings[slot]\n            raise\n        del self._fillings[slot]",
        ),
        ("            filling.give_up()\n", ""),
        ("        del self._fillings[slot]\n", ""),
        ("                filling.bring()\n", "                pass\n"),
        ("return leaves | {embedding: leaves[embedding.head] for embedding in tied}", "return leaves"),
        ("if any(slot == used for used, _ in tokens.spans or ()):", "if False:"),
        ("if any(slot == used for used, _ in tokens.spans or ()):", "if True:"),
    ),
    *mutants(
        "ram_core/engine/turnover.py",
        _COMES,
        ("        self._scheduler.narrow({pages})\n", ""),
        ("            book.drop({pages})\n", "            pass\n"),
        ("        group.renounce(newcomer.name)\n", ""),
        ("if group.is_empty and self._bank", "if False and self._bank"),
        ("            self._forget(group)\n\n    def _welcome", "            pass\n\n    def _welcome"),
        ("                lane.is_expected = False\n", "                pass\n"),
        ("        self._welcome()\n", ""),
        ("        self._scheduler.narrow(pages)\n", ""),
        (
            "                    self._renounce()\n                    self._outcomes",
            "                    self._outcomes",
        ),
        (
            "            self._renounce()\n            self._outcomes.append(AlignerFreed",
            "            self._outcomes.append(AlignerFreed",
        ),
        ("if expected.order.aligner in self._abandoned or newcomer.name", "if newcomer.name"),
        ("            if term.aligner == newcomer.name\n", ""),
        (
            "replace(self._bank.lane(newcomer.group, term), is_expected=True)",
            "self._bank.lane(newcomer.group, term)",
        ),
    ),
    *mutants(
        "ram_core/engine/aligner_groups.py",
        _COMES,
        ("        self._places[name] = expected or Place", "        self._places[name] = Place"),
    ),
    *mutants(
        "ram_core/engine/newcomers.py",
        _COMES,
        ("if share.num_parts == 1 and self._terms", "if self._terms"),
    ),
    *mutants(
        "ram_core/engine/engine.py",
        _COMES,
        ("            return [LaunchedStep(())], []\n", "            return [], []\n"),
        ("                self._scheduler.take_back(row)\n", "                pass\n"),
        ("        sequence.lanes += self._turnover.expected_lanes(sequence)\n", ""),
        ("= () if request.alignment.is_identity else request.alignment.terms", "= request.alignment.terms"),
    ),
    *mutants(
        "ram_core/engine/load_share.py",
        "tests/unit/test_load_share.py",
        ("done >= _LEAST_READ and ", ""),
        ("took_s * (1 - done) <= _SOON_S * done", "True"),
        ("took_s * (1 - done) <= _SOON_S * done", "took_s <= _SOON_S"),
        ("            self.on_soon = None\n", ""),
    ),
    *mutants(
        "ram_core/engine/streams.py",
        _HTTP,
        ("self.limits.check(replace(request, alignment=AlignmentParams()))", "self.limits.check(request)"),
    ),
    *mutants(
        "server/routes/shared.py",
        _HTTP,
        ("engine.prefill(replace(request, alignment=aligned(ask, lease)))", "engine.prefill(request)"),
    ),
]
