"""Breaks of what loads and frees aligners while the engine serves."""

from __future__ import annotations

from tests.mutants import mutants

_HOT = "tests/exactness/test_hot_loading.py"
_KEPT = "tests/exactness/test_kept_memory.py"
_AHEAD = "tests/unit/test_read_ahead.py"
_RESIDENTS = "tests/unit/test_residents.py"
_BROKEN = f"{_HOT}::test_what_is_broken_changes_nothing"
_SIZE = f"{_HOT}::test_what_takes_too_much_memory_changes_nothing"
_FREEING = f"{_HOT}::test_freeing_waits_for_the_steps_that_may_still_read"
_STRAIGHT = f"{_HOT}::test_what_is_read_straight_into_a_slot_is_what_transformers_would_load"
_DTYPES = f"{_HOT}::test_weights_of_another_dtype_are_rounded_as_transformers_does"
_LEAK = f"{_HOT}::test_many_that_come_and_go_leave_nothing"
_PAGES = f"{_HOT}::test_pages_of_a_namesake_that_went_are_never_found"
_TWICE = f"{_HOT}::test_orders_may_come_twice_or_for_nothing"
_DEFAULT = f"{_HOT}::test_steps_do_not_depend_on_the_default_dtype"
_LOWEST = "lowest = torch.zeros(len(is_covered) + 1, dtype=torch.float32)"
_BEFORE = f"{_HOT}::test_one_that_is_to_go_before_it_came_goes"
_RECORDED = f"{_HOT}::test_a_group_that_went_takes_its_recorded_steps_along"
_MAPPED = f"{_HOT}::test_nothing_is_served_from_files_that_are_mapped_into_memory"
_CUT_OFF = f"{_HOT}::test_a_file_that_is_cut_off_while_it_is_read_is_an_error_and_no_more"
_AS_IT_WAS = f"{_HOT}::test_a_load_leaves_the_process_as_it_was"

_PACED = f"{_HOT}::test_a_load_paces_itself_while_sequences_run_and_only_then"

HOT_LOADING_MUTANTS = [
    *mutants(
        "ram_core/engine/turnover.py",
        _FREEING,
        ("self._leaving[0].last_step <= self._scheduler.kv.num_done", "True"),
        ("                self._scheduler.remove(sequence)", "                pass"),
    ),
    *mutants(
        "ram_core/engine/turnover.py",
        _BEFORE,
        ("self._abandoned.add(aligner)", "pass"),
        (
            "            turn_away(arrived.newcomers)\n"
            "            self._renounce()\n"
            "            self._outcomes.append(AlignerFreed",
            "            self._renounce()\n            self._outcomes.append(AlignerFreed",
        ),
        ("elif all(order.aligner != known.aligner", "elif all(True"),
    ),
    *mutants(
        "ram_core/engine/turnover.py",
        _RECORDED,
        (
            "                self._forget(group)\n            for book",
            "                pass\n            for book",
        ),
    ),
    *mutants(
        "ram_core/engine/turnover.py",
        _PAGES,
        ("book.drop(leaving.pages)", "book.drop(())"),
    ),
    *mutants("ram_core/engine/bank.py", _LEAK, ("            if group.is_empty:", "            if False:")),
    *mutants("ram_core/engine/bank.py", _TWICE, ("if each.name in self.group_of or", "if")),
    *mutants(
        "ram_core/engine/newcomers.py",
        _BROKEN,
        ("            turn_away(found)", "            pass"),
        ("            check_same_vocabulary(self.tokenizer, own, aligner_name=name)", "            pass"),
        ("        if limit < self.max_model_len:", "        if False:"),
    ),
    *mutants("ram_core/engine/newcomers.py", _SIZE, ("    if num_bytes > max_bytes:", "    if False:")),
    *mutants(
        "ram_core/engine/newcomers.py",
        f"{_HOT}::test_a_slot_is_filled_without_a_model_beside_it",
        ("                if weights is None:\n", "                if True:\n"),
    ),
    *mutants(
        "ram_core/engine/newcomers.py",
        f"{_HOT}::test_adapters_that_fit_no_stack_share_their_bases_weights",
        ("                return group.served.base_again()", "                return None"),
    ),
    *mutants(
        "ram_core/engine/aligner_groups.py", _BROKEN, ("self.abandon(slot)\n            raise", "raise")
    ),
    *mutants("ram_core/models/stored.py", _BROKEN, ("        if not is_finite(part):", "        if False:")),
    *mutants("ram_core/models/stored.py", _MAPPED, ("weight.data = weight.detach().clone()", "pass")),
    *mutants("ram_core/models/stored.py", _CUT_OFF, ("if not count:", "if count < 0:")),
    *mutants(
        "ram_core/models/stored.py", _DTYPES, ("self._start + at * self.dtype.itemsize", "self._start + at")
    ),
    *mutants("ram_core/models/stacked.py", _STRAIGHT, ("found[tied.get(name, name)]", "found[name]")),
    *mutants(
        "ram_core/resampling/fused.py", _DEFAULT, (_LOWEST, _LOWEST.replace(", dtype=torch.float32", ""))
    ),
    *mutants(
        "ram_core/engine/aligner_loads.py",
        _AS_IT_WAS,
        ("        torch.set_num_threads(num_threads)", "        pass"),
        ("            sys.setswitchinterval(before_s)", "            pass"),
    ),
    *mutants(
        "ram_core/engine/aligner_loads.py",
        "tests/unit/test_aligner_loads.py",
        ("        torch.get_num_threads()\n", ""),
        ("        give_way(LOADING)\n", ""),
    ),
    *mutants(
        "ram_core/engine/newcomers.py",
        _KEPT,
        ("            self._spare = group\n", "            pass\n"),
        ("spare, self._spare = self._spare, None", "spare = self._spare"),
        ("group.served.is_worth_keeping:", "True:"),
        ("            check_size(name, served.slot_bytes, max_bytes)\n", ""),
    ),
    *mutants(
        "ram_core/models/stacked.py",
        _KEPT,
        ("self._keeps_room and len(self._filled) <= 1", "self._keeps_room"),
        ('paged.device.type == "cpu" and paged.weight_bytes <= _KEPT_BYTES', 'paged.device.type == "cpu"'),
    ),
    *mutants(
        "ram_core/models/slot_linear.py",
        _KEPT,
        ("self._empty.pop() if self._empty else None", "None"),
        ("else self._tied[slot]\n        layer.weight", "else self._tied[0]\n        layer.weight"),
        ("current_groups().tokens.spans\n", "((0, ((0, len(ids)),)),)\n"),
        ("if self._keeps_room and isinstance", "if isinstance"),
    ),
    *mutants(
        "ram_core/models/stored.py",
        _KEPT,
        ("self._copy(part, at * row_size)", "self._copy(part, at)"),
        ("max(_PIECE_BYTES // least_bytes, 1) * multiple", "max(_PIECE_BYTES // least_bytes, 1)"),
    ),
    *mutants(
        "ram_core/aligners/files.py",
        _AHEAD,
        ("while is_wanted():", "while True:"),
        ("at, left = at + count, left - count", "at, left = at + count, left"),
    ),
    *mutants(
        "server/aligners/checking.py",
        _AHEAD,
        ("sorted(sizes, key=lambda path: sizes[path])", "list(sizes)"),
        ("        self._begin_reading(snapshot)\n", ""),
    ),
    *mutants(
        "ram_core/models/loading.py",
        _AHEAD,
        ("_known_skeleton(_Architecture(architecture(config), config))", "build_skeleton(config)"),
        ("            if trust_remote_code\n", "            if False\n"),
    ),
    *mutants(
        "ram_core/engine/pace.py",
        "tests/unit/test_pace.py",
        ("while self._is_busy() and", "while"),
        ("self._worked_s = (now_s - self._worked_s) * self._ratio, now_s", "_ = now_s * self._ratio, now_s"),
        ("(1 - share) / share", "1 / share"),
    ),
    *mutants(
        "ram_core/engine/load_share.py",
        _PACED,
        ("        self.pace.rest()\n", "        pass\n"),
    ),
    *mutants(
        "ram_core/engine/engine.py",
        _PACED,
        ('device == "cpu" and self._scheduler.is_busy', "True"),
    ),
    *mutants(
        "ram_core/engine/residents.py",
        _RESIDENTS,
        ("                self._parts.pop(order.aligner, None)", "                pass"),
        ("not None:\n                self._parts[order", "not self:\n                self._parts[order"),
        ("required=False", "required=True"),
        ("failed=began.failed + missing", "failed=began.failed"),
    ),
    *mutants(
        "ram_core/engine/supervisor.py",
        _RESIDENTS,
        ("if self._num_stillborn < _MAX_STILLBORN else ()", "if True else ()"),
    ),
]  # fmt: skip
