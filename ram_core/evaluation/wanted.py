"""The wanted answers of a bench's records, as its models read them."""

from __future__ import annotations

from ram_core.evaluation.answering import Bench
from ram_core.training.encoding import encode_answer
from ram_core.training.examples import Example


def wanted_examples(bench: Bench) -> list[Example]:
    """The wanted answers that there are and that fit into the context, behind their prompts, in their order.

    Raises:
        DataError: the chat template refuses one.
    """
    engine = bench.engine.engine
    examples = [
        Example(
            prompt,
            encode_answer(bench.tokenizer, record.messages, record.wanted, end_ids=engine.bank.eos_ids),
        )
        for prompt, record in zip(bench.prompts, bench.records, strict=True)
        if record.wanted
    ]
    return [example for example in examples if example.num_tokens <= engine.limits.max_model_len]
