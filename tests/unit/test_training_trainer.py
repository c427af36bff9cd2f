"""The loops: batches point at the right tokens, training learns, repeats, and stops when it must."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ram_core.training.examples import Example
from ram_core.training.trainer import (
    RunawayAscentError,
    TrainingSettings,
    collate,
    length_grouped,
    train_aligner,
    warm_up,
)

WANTED = [Example((1, 2, prompt), (prompt, 3)) for prompt in range(4, 12)]
PROPOSED = [Example(example.prompt, (13, 3)) for example in WANTED]


def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            pad_token_id=0,
        )
    )


def log_prob(model, example):
    """Log-probability of the answer, one example at a time and without any packing."""
    ids = torch.tensor([example.prompt + example.answer])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
    first = len(example.prompt) - 1
    return sum(log_probs[first + at, token].item() for at, token in enumerate(example.answer))


def test_a_batch_points_at_where_answers_are_predicted():
    batch = collate([Example((5, 6), (7,)), Example((8,), (9, 10, 11))])
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch.input_ids.flatten()[batch.positions].tolist() == [6, 8, 9, 10]
    assert batch.targets.tolist() == [7, 9, 10, 11]
    assert batch.rows.tolist() == [0, 1, 1, 1]


def test_an_epoch_sees_every_example_once_in_batches_of_like_length():
    lengths = [random.Random(i).randrange(5, 90) for i in range(500)]
    batches = list(length_grouped(lengths, 16, random.Random(0)))
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)


def test_padding_changes_nothing():
    """The reported loss of a mixed batch equals the one-by-one log-probabilities."""
    model, reports = tiny_model(), []
    wanted = [Example((1, 2), (4, 3)), Example((1, 2, 5, 6, 7, 8), (9, 10, 3))]
    expected = -sum(log_prob(model, example) for example in wanted) / 5
    train_aligner(model, wanted, wanted, TrainingSettings(steps=1, batch_size=2), reports.append)
    assert reports[0].loss == pytest.approx(expected, rel=1e-4)


def test_warm_up_learns_its_answers():
    model = tiny_model()
    warm_up(model, WANTED, TrainingSettings(steps=150, batch_size=8, learning_rate=1e-2), lambda _: None)
    assert all(log_prob(model, example) > -0.5 for example in WANTED)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "muon"])
def test_an_aligner_learns_what_is_wanted_and_unlearns_what_was_proposed(optimizer):
    model, reports = tiny_model(), []
    before = log_prob(model, PROPOSED[0])
    settings = TrainingSettings(steps=100, batch_size=8, learning_rate=5e-3, optimizer=optimizer)
    train_aligner(model, WANTED, PROPOSED, settings, reports.append)
    assert all(log_prob(model, example) > -0.5 for example in WANTED)
    assert log_prob(model, PROPOSED[0]) < before
    assert [report.step for report in reports] == list(range(1, 101))
    assert reports[-1].proposed < reports[0].proposed


def test_training_repeats_itself():
    models = [tiny_model(), tiny_model()]
    for model in models:
        train_aligner(model, WANTED, PROPOSED, TrainingSettings(steps=10, batch_size=3), lambda _: None)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_runaway_ascent_is_stopped_with_advice():
    settings = TrainingSettings(steps=500, batch_size=8, learning_rate=1e-2, ascent_weight=50.0)
    with pytest.raises(RunawayAscentError, match="`ascent_weight`"):
        train_aligner(tiny_model(), WANTED, PROPOSED, settings, lambda _: None)


def test_unpaired_answers_are_refused():
    with pytest.raises(ValueError, match="pair up"):
        train_aligner(tiny_model(), WANTED, PROPOSED[1:], TrainingSettings(steps=1), lambda _: None)
