"""Breaks of what reads a prompt before its request comes."""

from __future__ import annotations

from tests.mutants import mutants

_TRAFFIC = "tests/unit/test_scheduler_properties.py"
_SCHEDULER = "tests/unit/test_scheduler.py"
_PREFILL = "tests/exactness/test_prefill.py"
_SAME = f"{_PREFILL}::test_the_answer_is_the_same"
_HTTP = "tests/http/test_reading_ahead.py"
_TIED = "tests/exactness/test_tied_embedding.py"

PREFILL_MUTANTS = [
    *mutants(
        "ram_core/engine/scheduler.py",
        (_TRAFFIC, _PREFILL),
        ("= own.pages, own.num_computed, own.num_named", "= own.pages, 0, 0"),
        ("        for lane in before.values():\n            self.kv.give_back(lane)\n", ""),
        ("sequence.num_in_flight += draws and not sequence.is_prefill", "sequence.num_in_flight += draws"),
        (
            "        self.kv.name_pages(row)\n        if row.keeps_end:\n            return\n",
            "        self.kv.name_pages(row)\n",
        ),
        ("if not (is_same and prefill.slot", "if not (prefill.slot"),
        ("prefill.slot >= 0 and self.kv.has_room(sequence, found)", "prefill.slot >= 0"),
        ("is_same and prefill.slot >= 0 and", "is_same and"),
        ("            lane.num_computed = start\n", "            pass\n"),
        ("        self.narrow({lane.model for lane in row.lanes if lane.is_expected})\n", ""),
        (
            "                prefill.lanes.remove(lane)\n                self.kv.give_back(lane)\n",
            "                prefill.lanes.remove(lane)\n",
        ),
        ("                prefill.lanes.remove(lane)\n", ""),
        ("elif not self._queue and self.kv.has_free({lane.pool: num_pages}):", "elif not self._queue:"),
        ("            self.kv.reserve(prefill, len(prefill.token_ids))\n", ""),
        ("if is_alone or not each.is_expecting]", "]"),
        ("        rows += [self._row(sequence, 0) for sequence in here if sequence.is_read]\n", ""),
        (
            "reading = [sequence for sequence in here if sequence.num_pending]\n"
            "        rows += [self._row(sequence, 0) for sequence in here if sequence.is_read]\n",
            "rows += [self._row(sequence, 0) for sequence in here if sequence.is_read]\n"
            "        reading = [sequence for sequence in here if sequence.num_pending]\n",
        ),
        ("            self.remove(prefill)\n            return False", "            return False"),
        ("                self.remove(prefill)\n", "                pass\n"),
        ("            self._prefills.pop(sequence.request.request_id, None)\n", ""),
        ("self.running[self.running.index(prefill)] = sequence", "self.running.append(sequence)"),
        ("None if self._queue else self._prefixes_with_room(sequence)", "[[]]"),
        ("*self.waiting, *self._prefills.values()", "*self.waiting"),
        ("return None if sequence.index else self._prefills", "return self._prefills"),
    ),
    *mutants(
        "ram_core/engine/scheduler.py",
        _PREFILL,
        ("bool(self._queue) or is_reading or self.is_busy", "bool(self._queue) or self.is_busy"),
        ("bool(self._queue) or is_reading or self.is_busy", "bool(self._queue) or bool(self.running)"),
        ("None if self._queue else self._prefixes_with_room(sequence)", "self._prefixes_with_room(sequence)"),
        ("        if self._drop_prefill():\n            return True\n", ""),
        ("            if self._drop_prefill():\n                continue\n", ""),
        (
            "self._prefills.setdefault(sequence.request.request_id, sequence)",
            "self._prefills[sequence.request.request_id] = sequence",
        ),
        (
            "        sequence.num_cached, sequence.end_logits = prefill.num_cached, prefill.end_logits",
            "        sequence.num_cached, sequence.end_logits = own.num_computed, prefill.end_logits",
        ),
        (
            "            self.remove(sequence)\n            return\n        self._leave",
            "            pass\n        self._leave",
        ),
    ),
    *mutants(
        "ram_core/engine/scheduler.py",
        "tests/exactness/test_hot_loading.py",
        ("any(not sequence.is_prefill for sequence in self.running)", "False"),
    ),
    *mutants(
        "ram_core/engine/sequence.py",
        _PREFILL,
        ("self.num_pending > (0 if self.is_prefill else 1)", "self.num_pending > 1"),
        ("self.may_draw and not self.is_prefill", "self.may_draw"),
    ),
    *mutants(
        "ram_core/engine/reading.py",
        _SCHEDULER,
        ("spare = min(left - sum(own), ", "spare = min(left, "),
        ("min(left - sum(own), self._max_chunk_tokens)", "left - sum(own)"),
    ),
    *mutants(
        "ram_core/engine/rows.py",
        _SAME,
        ("self.num_tokens == 1 and not (self.keeps_end or self.knows_end)", "self.num_tokens == 1"),
    ),
    *mutants(
        "ram_core/engine/runner.py",
        _PREFILL,
        ("self._graphs is not None and ends is None", "self._graphs is not None"),
        ("        if not sequence.is_continued:\n    ", ""),
        ("            ends.forget()", "            pass"),
    ),
    *mutants("ram_core/engine/prompt_ends.py", _SAME, ("line.clone()", "line * 0")),
    *mutants(
        "ram_core/engine/engine.py",
        _PREFILL,
        ("                self._scheduler.remove(row.sequence)\n", "                pass\n"),
        ("            elif row.keeps_end:", "            elif False:"),
        ("return [] if sequence.is_prefill else [sequence]", "return [sequence]"),
        ("return one_thread() if is_beside and", "return one_thread() if False and"),
        ("is_beside and all(row.sequence.is_prefill for row in rows)", "is_beside"),
        ("and self._turnover.is_loading", ""),
        ("if sequence.has_started or sequence.is_prefill:", "if sequence.has_started:"),
        ("                self.handle(Cancel(request.request_id))\n", ""),
    ),
    *mutants("ram_core/models/cores.py", _PREFILL, ("        torch.set_num_threads(before)", "        pass")),
    *mutants(
        "server/routes/shared.py",
        _HTTP,
        ("                engine.forget(request.request_id)", "                pass"),
        ("            engine.prefill(replace(", "            break\n            engine.prefill(replace("),
    ),
    *mutants(
        "server/aligners/service.py",
        _HTTP,
        ("                if self._executor.is_loading:\n", "                if False:\n"),
        ("            on_loading=self._tell_loading,", "            on_loading=lambda: None,"),
    ),
    *mutants(
        "ram_core/engine/streams.py", _HTTP, ("        with suppress(RamError):\n", "        if True:\n")
    ),
    *mutants(
        "ram_core/models/tied_embedding.py",
        _TIED,
        ("        embedding.padding_idx = None\n", ""),
        ('        del embedding._parameters["weight"]\n', ""),
        ('        del vars(module)["rows"]', "        pass"),
    ),
    *mutants(
        "ram_core/models/packed_linear.py",
        _TIED,
        ("is_lookup(embedding) and embedding.weight is child.weight", "embedding.weight is child.weight"),
        ("is_lookup(embedding) and embedding.weight is child.weight", "is_lookup(embedding)"),
        ("return self._panels[ids // PANEL, :, ids % PANEL]", "return self._panels[ids // PANEL, :, 0]"),
    ),
    *mutants("ram_core/models/stacked.py", _TIED, ("        take_rows_of(embedding, owner)", "        pass")),
]
