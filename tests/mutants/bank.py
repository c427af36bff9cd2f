"""Breaks of what serves several aligners at once: grouped products, stacked modules, LoRA, swaps."""

from __future__ import annotations

from tests.mutants import mutants

_BANK = "tests/exactness/test_aligner_bank.py"
_LORA = "tests/exactness/test_lora.py"
_MODULES = f"{_BANK}::test_a_module_of_several_models_gives_the_logits_of_each"
_KERNEL = f"{_BANK}::test_the_kernel_gives_the_references_products_and_reads_no_slot_without_rows"
_DRAWS = f"{_BANK}::test_the_bank_draws_what_a_forward_for_each_aligner_draws"
_SWAP = f"{_BANK}::test_a_swap_leaves_running_sequences_alone_and_serves_new_ones"
_PAGES = f"{_BANK}::test_after_a_swap_no_old_page_is_found"
_SLOTS = f"{_BANK}::test_a_slot_in_use_is_neither_filled_nor_freed"
_FIT = f"{_BANK}::test_weights_of_another_architecture_leave_the_slot_free"
_PEFT = f"{_LORA}::test_logits_of_a_mixed_batch_are_those_of_pefts_models"

BANK_MUTANTS = [
    *mutants(
        "ram_core/models/grouped_linear.py",
        _MODULES,
        ("slots[end] != slots[start]", "False"),
        ("            start = end\n", "            start = end - 1\n"),
    ),
    *mutants(
        "ram_core/models/triton_grouped_linear.py",
        _KERNEL,
        ("other=0)\n        total", "other=0) * 0\n        total"),
        ("end = tl.load(offsets + slot + 1)", "end = tl.load(offsets + slot)"),
        ("own_weight = weight + slot", "own_weight = weight + 0 * slot"),
        ("tl.program_id(2) * block_m", "tl.program_id(2)"),
        ("is_deep = deep[None, :] < depth", "is_deep = deep[None, :] < depth - 1"),
        ("bias + slot * num_columns + columns", "bias + columns"),
        ("total += tl.load(place, is_own", "total += 0 * tl.load(place, is_own"),
    ),
    *mutants(
        "ram_core/models/stacked.py",
        _MODULES,
        ("        if is_linear(module):\n", "        if False:\n"),
        ("return len(shapes[0]) - axes[0] - 1", "return 1"),
        ("* module.num_embeddings", "* 0"),
        ("return stack[groups.spans[0][0]]", "return stack[0]"),
        ("own = stack[groups.slots]", "own = stack[groups.slots * 0]"),
        ("out = out * module.weight", "out = out"),
        ("return out + module.bias if", "return out if"),
        ("put(self.weight[slot]", "put(self.weight[0]"),
    ),
    *mutants(
        "ram_core/models/slot_linear.py",
        _MODULES,
        ("for start in sorted(parts)", "for start in parts"),
    ),
    *mutants(
        "ram_core/models/grouped_linear.py",
        _MODULES,
        ("return groups.logits if is_head else groups.tokens", "return groups.tokens"),
    ),
    *mutants("ram_core/models/slot_linear.py", _DRAWS, ("if not spans:", "if False:")),
    *mutants(
        "ram_core/models/stacked.py",
        _FIT,
        ("odd = sorted(self._shapes.keys() ^ weights.keys())", "odd = []"),
        ("if name in weights and weights[name].shape != shape", "if False"),
    ),
    *mutants(
        "ram_core/engine/layout.py",
        f"{_BANK}::test_a_step_has_one_forward_for_all_aligners",
        ("turns[name] += 1", "pass"),
        ("return is_long, kept.group_slot", "return is_long, 0"),
    ),
    *mutants(
        "ram_core/engine/layout.py",
        _DRAWS,
        ("group_slots += [kept.group_slot] * len(token_ids)", "group_slots += [0] * len(token_ids)"),
    ),
    *mutants(
        "ram_core/engine/load_groups.py",
        f"{_BANK}::test_models_that_say_something_else_together_take_a_forward_each",
        ("return None if worst <= limit else", "return None if True else"),
    ),
    *mutants(
        "ram_core/engine/aligner_groups.py",
        _SWAP,
        ("place.slot if self.is_stacked else -1", "0 if self.is_stacked else -1"),
        ("expected or Place(slot, next(_numbers))", "expected or Place(0, next(_numbers))"),
    ),
    *mutants(
        "ram_core/engine/aligner_groups.py",
        _PAGES,
        ('return f"{name}:{place.number}"', "return name"),
        ('return f"{name}:{place.number}"', 'return f"{name}:{place.slot}"'),
    ),
    *mutants(
        "ram_core/engine/aligner_groups.py",
        _SLOTS,
        ("            self._free.discard(slot)", "            pass"),
        ("or slot in self._used:", "or False:"),
        ("        if name in self._places:", "        if False:"),
    ),
    *mutants(
        "ram_core/models/lora.py",
        _PEFT,
        ("alpha / (rank**0.5 if self.is_rank_stabilised else rank)", "alpha / rank"),
        ("alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))", "alpha = float(self.alpha)"),
        ("* config.scale_of(module)", "* 1.0"),
    ),
    *mutants(
        "ram_core/models/lora_stack.py",
        _PEFT,
        ("rows[start:end] @ layer[0], layer[1]", "rows[start:end] @ layer[0] * 1.001, layer[1]"),
        ("a[:rank].copy_", "a[-rank:].copy_"),
        ("            if layer is not None:", "            if layer is not None and slot:"),
    ),
]  # fmt: skip
