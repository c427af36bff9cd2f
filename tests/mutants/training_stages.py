"""Breaks of how training data becomes token ids, answers and aligners, and of when a stage is done again."""

from __future__ import annotations

from tests.mutants import mutants

_ENCODING = "tests/unit/test_training_encoding.py"
_SYNTHESIS = "tests/unit/test_training_synthesis.py"
_PACKAGING = "tests/unit/test_training_packaging.py"
_STAGES = "tests/unit/test_training_stages.py"

TRAINING_STAGES_MUTANTS = [
    *mutants(
        "ram_core/training/encoding.py",
        _ENCODING,
        ("return continued[:length]", "return continued"),
        ("ends = {*end_ids, ", "ends = {"),
        ("        end = next((token for token in behind if token in ends), end)\n", ""),
        ("if not whole.startswith(asked.rendered):", "if False:"),
        ("if whole_ids[: len(asked.ids)] == asked.ids:", "if True:"),
        ("        if length == 1:", "        if False:"),
        ("pair.prompt[-data.max_prompt_tokens :]", "pair.prompt[: data.max_prompt_tokens]"),
        ("room = data.max_tokens - len(prompt)", "room = data.max_tokens"),
        ('if pair == whole or data.too_long == "truncate":', "if True:"),
        ('f"{record.where}: {error}" if record.where else str(error)', "str(error)"),
    ),
    *mutants(
        "ram_core/training/records.py",
        "tests/unit/test_training_records.py",
        ("            text.encode()\n", "            pass\n"),
        (
            "said = [record.messages, record.wanted, record.rejected]",
            "said = [record.messages, record.wanted]",
        ),
    ),
    *mutants(
        "ram_core/training/synthesis.py",
        _SYNTHESIS,
        ("    _cut_half_line(path)\n", ""),
        ('f"{seed} {index}"', 'f"{index}"'),
        ('f"{seed} {index}"', 'f"{seed} {len(str(index))}"'),
        ("for index in sorted(answers)", "for index in answers"),
        ("indices[start : start + block]", "indices[:block]"),
        ("            if pair.proposed:\n", "            if True:\n"),
        ("            if answer.index in answers:\n", "            if False:\n"),
        ("        if stray := ", "        if False and not "),
    ),
    *mutants(
        "ram_core/training/packaging.py",
        _PACKAGING,
        ('f"{target.name}.{word}partial"', 'f"{target.name}.{word}new"'),
        ("        judge.require_sound(aside)\n    return manifest", "    return manifest"),
        ("    if old.exists() and not target.exists():", "    if False:"),
        ("        if path.suffix in _SUFFIXES and ", "        if "),
        ("    if is_adapter(str(source)):", "    if False:"),
        ("        if read_manifest(target) != manifest:", "        if False:"),
        ('    if "/" in manifest.name:', "    if False:"),
    ),
    *mutants(
        "ram_core/training/stages.py",
        _STAGES,
        ("        if record.inputs != inputs:\n            # An", "        if False:\n            # An"),
        (' or stage == "package"', ""),
        (" or stage in self._restarted:", ":"),
        ("        if record is None and product.exists():", "        if False:"),
        ('not in FREE_FIELDS | {"model"}', 'not in {"model"}'),
        ("        if record is not None and record.is_done:\n", "        if record is not None:\n"),
        ('proposal=str(self._layout.warmup / "model")', "proposal=config.warmup.model"),
        (
            "    lock = only_run_in(Path(config.output)) if group.is_main else nullcontext()",
            "    lock = nullcontext()",
        ),
    ),
    *mutants(
        "ram_core/training/stages.py",
        "tests/http/test_train_launch.py",
        ("PartialState(cpu=not torch.accelerator.is_available(), ", "PartialState("),
        ("        if not self._group.is_main:\n            return {}\n", ""),
    ),
    *mutants(
        "ram_core/training/inputs.py",
        _STAGES,
        ("        if not record.wanted:", "        if False:"),
        ("    if context >= data.max_tokens:", "    if True:"),
        ("        check_same_vocabulary(", "        (lambda *_, **__: None)("),
    ),
]
