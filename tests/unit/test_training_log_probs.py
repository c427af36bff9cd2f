"""What is kept of the proposal is what it says, one answer at a time; a restart repeats nothing."""

import numpy as np
import pytest
import torch

from ram_core.progress import ignore_progress
from ram_core.training import log_probs
from ram_core.training.examples import TrainingPair
from ram_core.training.heads import AnswerHead
from ram_core.training.log_probs import LogProbsCache
from tests.models import make_model

VOCAB = 290
PAIRS = [
    TrainingPair(tuple(range(10, 12 + 3 * index)), tuple(range(40 + index, 43 + 2 * index)), (5,))
    for index in range(7)
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(log_probs, "_MAX_ANSWER_POSITIONS", 25)


@pytest.fixture(scope="module")
def model():
    return make_model("llama", std=0.2)


def new_cache(directory, pairs=PAIRS, proposal="one", top_k=4):
    return LogProbsCache(directory, pairs, top_k=top_k, vocab_size=VOCAB, proposal=proposal)


def test_every_answer_token_has_what_the_proposal_says_by_itself(model, tmp_path):
    cache = new_cache(tmp_path / "cache")
    cache.prepare()
    for process in range(2):
        cache.fill(model, ignore_progress, process=process, num_processes=2)
    found = cache.open()
    for index, pair in enumerate(PAIRS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([pair.prompt + pair.wanted])).logits[0]
        alone = logits[len(pair.prompt) - 1 : -1, :VOCAB].log_softmax(-1)
        rows = found.rows([index])
        torch.testing.assert_close(rows["proposal_log_probs"], alone.topk(4).values, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            alone.gather(-1, rows["proposal_ids"]), rows["proposal_log_probs"], atol=1e-4, rtol=0
        )
        wanted = torch.tensor(pair.wanted)[:, None]
        torch.testing.assert_close(
            rows["proposal_target_log_probs"], alone.gather(-1, wanted)[:, 0], atol=1e-4, rtol=0
        )
    both = found.rows([5, 2])["proposal_ids"]
    assert torch.equal(both, torch.cat([found.rows([index])["proposal_ids"] for index in (5, 2)]))


def test_what_was_interrupted_goes_on_where_it_was(model, tmp_path, monkeypatch):
    """A cache whose second chunk broke off has its first; the rest alone is computed again."""
    forwards = []
    logits = AnswerHead.logits

    def count(head, *arguments):
        if len(forwards) == 1:
            raise KeyboardInterrupt
        forwards.append(1)
        return logits(head, *arguments)

    monkeypatch.setattr(AnswerHead, "logits", count)
    cache = new_cache(tmp_path / "cache")
    cache.prepare()
    with pytest.raises(KeyboardInterrupt):
        cache.fill(model, ignore_progress)
    again = new_cache(tmp_path / "cache")
    again.prepare()
    forwards += [1]
    again.fill(model, ignore_progress)
    whole = new_cache(tmp_path / "whole")
    whole.prepare()
    num_again = len(forwards) - 2
    whole.fill(model, ignore_progress)
    assert num_again == len(forwards) - 2 - num_again - 1 > 0
    np.testing.assert_array_equal(again.open().log_probs, whole.open().log_probs)


@pytest.mark.parametrize("change", [{"proposal": "two"}, {"top_k": 3}, {"pairs": PAIRS[1:]}])
def test_another_corpus_or_proposal_begins_anew(model, tmp_path, change):
    cache = new_cache(tmp_path / "cache")
    cache.prepare()
    cache.fill(model, ignore_progress)
    other = new_cache(tmp_path / "cache", **change)
    other.prepare()
    assert not np.load(tmp_path / "cache" / "is_done.npy").any()
