"""The arithmetic of the comparison: intervals, DPO's loss, the divergence of a tuned model."""

import math
from statistics import fmean

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.reproduction.__main__ import interval
from benchmarks.reproduction.measures import mean_divergence
from benchmarks.reproduction.preference import ReferenceLogProbs, ReferencePreference
from ram_core.training.examples import Example, TrainingPair, collate
from ram_core.training.heads import AnswerHead

PAIRS = [TrainingPair((1, 2, 5), (6, 3), (7, 8, 9, 3)), TrainingPair((1, 4), (9, 9, 3), (5, 3))]
VOCAB = 12


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=16, intermediate_size=16, initializer_range=0.5, pad_token_id=0, **shape)
    return LlamaForCausalLM(config).eval()


def log_probs(model: LlamaForCausalLM, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """Of every token at each position of the answer, [answer, vocab], without padding or batches."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, :, :VOCAB]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def log_prob(model: LlamaForCausalLM, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    return sum(row[token].item() for row, token in zip(log_probs(model, prompt, answer), answer, strict=True))


def test_an_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == "2.00 ± 2.48"
    assert interval([4.0]) == "4"
    assert interval([1.0, math.nan]) == "–"


def test_dpo_compares_log_ratios_to_its_reference():
    model, reference = tiny_model(0), tiny_model(1)
    extra = ReferenceLogProbs(reference, PAIRS, VOCAB)
    rows = [Example(pair.prompt, pair.wanted) for pair in PAIRS]
    rows += [Example(pair.prompt, pair.proposed) for pair in PAIRS]
    batch = collate(rows) | extra.rows([0, 1])
    objective = ReferencePreference(0.3)
    with torch.no_grad():
        logits = AnswerHead(model).logits(model, batch)[:, :VOCAB]
    found = objective.token_log_probs(logits, batch)
    wanted, proposed = torch.zeros(len(rows)).index_add(0, batch["rows"], found).split(len(PAIRS))
    for at, pair in enumerate(PAIRS):
        gain = [
            log_prob(model, pair.prompt, answer) - log_prob(reference, pair.prompt, answer)
            for answer in (pair.wanted, pair.proposed)
        ]
        loss = math.log1p(math.exp(-0.3 * (gain[0] - gain[1])))
        assert objective.losses(wanted, proposed)[at].item() == pytest.approx(loss, abs=1e-4)


def test_a_divergence_is_the_mean_over_answer_tokens():
    model, reference = tiny_model(0), tiny_model(1)
    examples = [Example(pair.prompt, pair.wanted) for pair in PAIRS]
    each = [
        (one.exp() * (one - other)).sum().item()
        for example in examples
        for one, other in zip(
            log_probs(model, example.prompt, example.answer),
            log_probs(reference, example.prompt, example.answer),
            strict=True,
        )
    ]
    assert mean_divergence(model, reference, examples, VOCAB) == pytest.approx(fmean(each), abs=1e-4)
    assert mean_divergence(model, tiny_model(0), examples, VOCAB) == pytest.approx(0.0, abs=1e-6)
