"""Breaks of the engine: planning, sequences, limits, the runner, the step loop and its thread."""

from __future__ import annotations

from tests.mutants import mutants

_SCHEDULER = "tests/unit/test_scheduler.py"
_LIMITS = "tests/unit/test_limits.py"
_THREAD = "tests/unit/test_thread.py"
_ENGINE = "tests/exactness/test_engine.py"
_GREEDY = f"{_ENGINE}::test_every_way_of_batching_gives_the_plain_forwards_greedy_tokens[llama]"
_SEEDED = f"{_ENGINE}::test_a_seeded_request_draws_the_same_alone_in_a_batch_and_after_preemption[product]"
_NOISE = f"{_ENGINE}::test_a_seeded_request_draws_with_the_noise_of_its_seed_and_positions"
_STOPS = f"{_ENGINE}::test_stop_tokens_and_limits_end_a_text"
_CHOICES = f"{_ENGINE}::test_choices_of_one_request_differ_and_the_first_is_that_of_a_single_one"
_STARTS = f"{_ENGINE}::test_a_request_starts_once_however_often_it_is_preempted"
_BAD = f"{_ENGINE}::test_a_request_with_bad_logits_fails_alone"
_TOP = f"{_ENGINE}::test_each_request_of_a_batch_is_told_as_many_alternatives_as_it_asked_for"

ENGINE_MUTANTS = [
    *mutants(
        "ram_core/engine/pages.py",
        _SCHEDULER,
        ("list(range(num_pages - 1, 0, -1))", "list(range(num_pages - 1, -1, -1))"),
        ("return -(-num_tokens // page_size)", "return num_tokens // page_size"),
        ("self._free.extend(pages)", "self._free = [*pages]"),
    ),
    *mutants(
        "ram_core/engine/scheduler.py",
        _SCHEDULER,
        ("budget -= len(rows)", "pass"),
        ("budget -= row.num_tokens", "pass"),
        ("min(budget, sequence.num_pending)", "sequence.num_pending"),
        ("            if not budget:", "            if False:"),
        ("rows.sort(key=lambda row: row.num_tokens > 1)", "pass"),
        ("start + num_tokens == len(sequence.token_ids)", "True"),
        ("max(max_step_tokens, num_slots + 1)", "max_step_tokens"),
        ("self.waiting.append(sequence)", "self.waiting.appendleft(sequence)"),
        ("and self._has_room(self.waiting[0])", ""),
        ("self._pages_needed(sequence, len(sequence.token_ids) + 1)",
         "self._pages_needed(sequence, len(sequence.token_ids))"),
        ("youngest = self.running[-1]", "youngest = self.running[0]"),
        ("self.waiting.appendleft(sequence)", "self.waiting.append(sequence)"),
        ("sequence.num_computed = 0", "pass"),
        ("lane.pages = []", "pass"),
        ("self.books[lane.pool].give_back(lane.pages)", "pass"),
        ("self._free_slots.append(sequence.slot)", "pass"),
        ("        sequence.slot = -1", "        pass"),
        ("needed[lane.pool] += max", "needed[lane.pool] = max"),
        ("lane.pages += self.books", "lane.pages = self.books"),
        ("sequence.slot >= 0 and self._make_room(sequence)", "self._make_room(sequence)"),
        ("(*self.running, *self.waiting)", "self.running"),
        ("and index in (None, sequence.index)", ""),
        ("started.append(sequence)", "pass"),
        ("row.sequence.num_computed = row.start + row.num_tokens", "row.sequence.num_computed = row.start"),
    ),
    *mutants(
        "ram_core/engine/sequence.py",
        _STOPS,
        ("if token_id in self.stop_ids:", "if False:"),
        ("if token_id in self.stop_ids:",
         "if token_id in self.stop_ids and self.num_drawn < self.max_tokens:"),
        ("self.num_drawn >= self.max_tokens", "self.num_drawn > self.max_tokens"),
    ),
    *mutants(
        "ram_core/engine/limits.py",
        _LIMITS,
        ("if needed > self.num_pages:", "if needed >= self.num_pages:"),
        ("* max(lanes.values(), default=1)", ""),
        ("return request.sampling.max_tokens or room", "return room"),
        ("length + max(request.sampling.max_tokens, 1) > self",
         "length + request.sampling.max_tokens > self"),
        ("length + max(request.sampling.max_tokens, 1) > self",
         "length + max(request.sampling.max_tokens, 1) >= self"),
        ("max(request.prompt_ids) < self.vocab_size", "max(request.prompt_ids) <= self.vocab_size"),
        ("if not 0 <= min(request.prompt_ids) <=", "if not"),
        ("            if term.aligner not in self.pools:", "            if False:"),
    ),
    *mutants(
        "ram_core/engine/runner.py",
        _GREEDY,
        ("row.sequence.lanes[lane].strength)", "1.0)"),
        ("enumerate(drawing)}", "enumerate(reversed(drawing))}"),
        ("pages=row.sequence.lanes[used].pages", "pages=row.sequence.lanes[0].pages"),
        ("wants_logits=row.draws", "wants_logits=True"),
        ("start=row.start,", "start=0,"),
        ("self._pack([row for row, _ in uses], lane=[lane for _, lane in uses])",
         "self._pack([row for row, _ in uses], lane=[1 for _, lane in uses])"),
    ),
    *mutants(
        "ram_core/engine/runner.py",
        _SEEDED,
        ("self._params.put(sequence.slot,", "self._params.put(0,"),
        ("[row.sequence.slot for row in drawing]", "[index for index, _ in enumerate(drawing)]"),
        ("[len(row.sequence.token_ids) for row in drawing]", "[row.start for row in drawing]"),
    ),
    *mutants(
        "ram_core/engine/runner.py",
        _NOISE,
        ("[len(row.sequence.token_ids) for row in drawing]", "[row.sequence.num_drawn for row in drawing]"),
        ("replace(self._params.take(slots), position=positions)", "self._params.take(slots)"),
        ("seeds=[sequence.seed]", "seeds=[0]"),
    ),
    *mutants(
        "ram_core/engine/runner.py",
        _TOP,
        ("values[8 : 8 + num_top][:wanted], values[8 + num_top :][:wanted]",
         "values[8 : 8 + num_top], values[8 + num_top :]"),
        ("values[8 + num_top :][:wanted]", "values[8 + wanted :][:wanted]"),
    ),
    *mutants(
        "ram_core/engine/runner.py",
        _STOPS,
        ("telemetry=None\n                if request.alignment.is_identity\n                else",
         "telemetry="),
    ),
    *mutants(
        "ram_core/engine/runner.py",
        _BAD,
        ("is_bad=bool(is_bad)", "is_bad=False"),
    ),
    *mutants(
        "ram_core/engine/engine.py",
        _BAD,
        ("        if draw.is_bad:", "        if False:"),
    ),
    *mutants(
        "ram_core/engine/engine.py",
        _CHOICES,
        ("seed + index * _CHOICE_STRIDE", "seed"),
        ("seed + index * _CHOICE_STRIDE", "seed + index"),
        ("return (value + (1 << 63)) % (1 << 64) - (1 << 63)", "return value"),
    ),
    *mutants(
        "ram_core/engine/engine.py",
        _STOPS,
        ("frozenset() if request.sampling.ignore_eos else self.bank.eos_ids", "self.bank.eos_ids"),
        ("frozenset() if request.sampling.ignore_eos else self.bank.eos_ids", "frozenset()"),
        ("stop_ids=eos | frozenset(request.sampling.stop_token_ids)", "stop_ids=eos"),
    ),
    *mutants(
        "ram_core/engine/engine.py",
        _STARTS,
        ("sequence.index == 0 and not sequence.has_started", "sequence.index == 0"),
        ("sequence.index == 0 and not sequence.has_started", "not sequence.has_started"),
    ),
    *mutants(
        "ram_core/engine/engine.py",
        _GREEDY,
        ("self.bank.pool_of[term.aligner], term.strength", "self.bank.pool_of[term.aligner]"),
        ("            self._runner.start(sequence)", "            pass"),
    ),
    *mutants(
        "ram_core/engine/thread.py",
        _THREAD,
        ("self._num_open + request.num_choices > self._capacity",
         "self._num_open + request.num_choices >= self._capacity"),
        ("self._num_open + request.num_choices > self._capacity", "self._num_open + 1 > self._capacity"),
        ("            self._num_open += request.num_choices", "            self._num_open += 1"),
        ("            self._num_open -= 1", "            pass"),
        ("self._engine.cancel(self._request_id, choice)", "pass"),
        ("            self._cancelled.add(choice)", "            pass"),
        ("        elif event.index in self._open:", "        else:"),
        ("while not self._engine.has_work or not self._inbox.empty():", "while not self._engine.has_work:"),
        ("            self._stats = self._engine.stats\n        return True", "        return True"),
        ("            self._end = error", "            pass"),
        ("            if self._end is not None:", "            if False:"),
        ('            reason = "The engine has died."\n', ""),
        ("stream.loop.call_soon_threadsafe(stream.fail, error)", "pass"),
        ("self._num_open -= self._streams.pop(name).num_open", "self._streams.pop(name)"),
        ("            self._engine.handle(Cancel(name))", "            pass"),
        ("                self._abandon(loop)", "                raise"),
    ),
]  # fmt: skip
