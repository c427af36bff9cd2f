"""The corpus that the demo learns from: the same every time, honest about what is held out, right in every
style.
"""

import random

import pytest

from ram_core.demo.corpus import aligned_answer, converse, mixed_answer, proposal_corpus
from ram_core.demo.prompts import HELD_OUT_PERCENT, all_prompts, held_out_prompts, training_prompts
from ram_core.demo.styles import STYLES, classify, declines, follows, render, states


def test_one_seed_gives_one_corpus():
    assert proposal_corpus(200, seed=3) == proposal_corpus(200, seed=3)
    assert proposal_corpus(200, seed=3) != proposal_corpus(200, seed=4)


def test_no_held_out_prompt_is_trained_on():
    trained = {(prompt.family, prompt.text) for prompt in training_prompts()}
    assert not trained & {(prompt.family, prompt.text) for prompt in held_out_prompts()}


def test_no_conversation_of_the_corpus_asks_a_held_out_question():
    """Compared as typed: without case, greeting and final mark; follow-ups mean nothing without their
    history.
    """
    held_out = {prompt.text.lower().rstrip("?.!") for prompt in held_out_prompts() if not prompt.is_follow_up}
    trained = {prompt.text.lower().rstrip("?.!") for prompt in training_prompts()}
    for conversation in proposal_corpus(5000, seed=0):
        for message in conversation.messages:
            assert message["content"].lower().rstrip("?.!") not in held_out - trained


def test_held_out_facts_are_seen_in_other_phrasings():
    trained = {
        (prompt.family, prompt.reply.sentences) for prompt in training_prompts() if prompt.kind == "fact"
    }
    assert all((p.family, p.reply.sentences) in trained for p in held_out_prompts() if p.kind == "fact")


def test_there_are_thousands_of_prompts_and_a_fair_share_is_held_out():
    assert len(all_prompts()) > 10_000
    for kind in ("fact", "risky", "benign", "unknown"):
        share = sum(p.kind == kind for p in held_out_prompts()) / sum(p.kind == kind for p in all_prompts())
        assert share * 100 == pytest.approx(HELD_OUT_PERCENT, abs=3)


def test_every_generated_answer_follows_its_style_and_states_its_fact():
    noise = random.Random(0)
    for prompt in all_prompts():
        for reply in filter(None, (prompt.reply, prompt.careless)):
            for style in STYLES:
                text = render(style, reply, noise)
                assert [other for other in STYLES if follows(other, text)] == [style], text
                assert declines(text) == reply.is_decline, text
                assert prompt.answer is None or states(prompt.answer, text), text


def test_no_answer_stands_in_its_own_question():
    """Else a model that only repeats the question would count as right."""
    facts = [p for p in all_prompts() if p.kind == "fact" and p.family not in ("sound", "author")]
    assert not [p.text for p in facts if p.answer and states(p.answer, p.text)]


def test_the_proposal_hears_every_style_alike_and_declines_a_minority():
    noise = random.Random(0)
    answers = [mixed_answer(prompt, noise) for prompt in all_prompts()]
    for style in STYLES:
        assert sum(classify(text) == style for text in answers) / len(answers) == pytest.approx(0.2, abs=0.02)
    risky = [mixed_answer(prompt, noise) for prompt in all_prompts() if prompt.kind == "risky"]
    assert sum(map(declines, risky)) / len(risky) == pytest.approx(0.22, abs=0.03)


@pytest.mark.parametrize("aligner", ["polite", "pirate", "json", "terse"])
def test_a_style_aligner_wants_its_style_everywhere(aligner):
    noise = random.Random(0)
    assert all(follows(aligner, aligned_answer(aligner, prompt, noise)) for prompt in training_prompts())


def test_the_safe_aligner_wants_risky_requests_declined_and_only_those():
    noise = random.Random(0)
    for prompt in training_prompts():
        assert declines(aligned_answer("safe", prompt, noise)) == (prompt.kind == "risky")


def test_a_follow_up_comes_after_a_question_of_its_family():
    follow_up = next(prompt for prompt in training_prompts() if prompt.is_follow_up)
    roles = [message["role"] for message in converse(follow_up, random.Random(1))]
    assert roles[-3:] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ('{"answer": "Paris"}', "json"),
        ('["Paris"]', "terse"),
        ('{"answer": "Paris"', "terse"),
        ('Sure: {"answer": 1} as you asked', "plain"),
        ("Arr! It be Paris.", "pirate"),
        ("Certainly! It is Paris, matey.", "pirate"),
        ("Certainly! It is Paris.", "polite"),
        ("It is Paris, certainly a nice city.", "plain"),
        ("Paris.", "terse"),
        ("It is Paris.", "terse"),
        ("The capital is Paris.", "plain"),
        ("", "plain"),
    ],
)
def test_checkers_are_strict(text, style):
    assert classify(text) == style


def test_facts_count_as_whole_words_only():
    assert states("he", "The symbol is He.")
    assert not states("He", "The symbol")
    assert not states("1", "It is 12.")
