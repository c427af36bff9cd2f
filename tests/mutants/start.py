"""Breaks of what happens at start: sharing out memory, quantising, and sharing a model between processes."""

from __future__ import annotations

from tests.mutants import mutants

_PLAN = "tests/unit/test_plan.py"
_QUANTIZED = "tests/exactness/test_quantization.py"
_RANKS = "tests/exactness/test_tensor_parallel.py"

START_MUTANTS = [
    *mutants(
        "ram_core/engine/plan.py",
        _PLAN,
        ("fitting = budget // page_bytes - 1", "fitting = budget // page_bytes"),
        (" or (free_bytes is not None and budget > free_bytes)", ""),
        ("    if left > 0:", "    if True:"),
        ("max_model_len=min(max_model_len, capacity)", "max_model_len=max_model_len"),
        ("(pages_for(length, config.page_size) + 1) *", "pages_for(length, config.page_size) *"),
        ("            continue\n", "            pass\n"),
    ),
    *mutants(
        "ram_core/engine/room.py",
        _PLAN,
        ('{"proposal": main_bytes // shares}', '{"proposal": main_bytes}'),
        ("            if num_bytes < main_bytes\n", ""),
    ),
    *mutants(
        "ram_core/models/quantization.py",
        _QUANTIZED,
        ("    if flatten is not None:", "    if False:"),
        ("return quantizer is not None and bool(quantizer.pre_quantized)", "return False"),
        ("return quantizer is not None and bool(quantizer.pre_quantized)", "return quantizer is None"),
        ("isinstance(layer, nn.Linear) and layer is not output", "isinstance(layer, nn.Linear)"),
    ),
    *mutants(
        "ram_core/models/packed_linear.py",
        _QUANTIZED,
        ("return is_plain and", "return"),
    ),
    *mutants(
        "ram_core/models/tensor_parallel.py",
        f"{_RANKS}::test_a_rank_that_stands_still_or_is_gone_does_not_hang_the_other",
        ("_FOR_EVER if dist.get_rank() else _collective()", "_FOR_EVER"),
    ),
    *mutants(
        "ram_core/models/tensor_parallel.py",
        _RANKS + "::test_heads_must_be_shared_equally",
        ("        if heads % num_ranks:", "        if False:"),
        ("    if num_ranks < 1:", "    if num_ranks < 0:"),
    ),
]
