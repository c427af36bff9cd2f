"""Answers as chat templates continue them, limits that count, and errors that name the record."""

import pytest

from ram_core.training.config import DataConfig
from ram_core.training.encoding import Lengths, encode_answer, encode_prompt, encode_records
from ram_core.training.errors import DataError
from ram_core.training.records import Record
from tests.models import EOS, make_tokenizer

QUESTION = [{"role": "user", "content": "What is two and two?"}]
TURN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
ASKING = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def templated(tokenizer):
    """Set the tokenizer's template, for one test."""
    before = tokenizer.chat_template

    def use(template):
        tokenizer.chat_template = template
        return tokenizer

    yield use
    tokenizer.chat_template = before


def told(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_prompt_and_answer_are_the_conversation_that_the_template_writes(templated):
    tokenizer = templated(TURN + ASKING)
    prompt, answer = encode_prompt(tokenizer, QUESTION), encode_answer(tokenizer, QUESTION, "Four.")
    whole = tokenizer.apply_chat_template(
        [*QUESTION, {"role": "assistant", "content": "Four."}], return_dict=False
    )
    assert list(prompt + answer) == whole
    assert told(tokenizer, answer) == f"Four.{EOS}"


def test_what_a_template_writes_behind_the_end_is_no_part_of_the_answer(templated):
    tokenizer = templated(TURN.replace("{% endfor %}", "\n{% endfor %}") + ASKING)
    assert told(tokenizer, encode_answer(tokenizer, QUESTION, "Four.")) == f"Four.{EOS}"


def test_what_a_template_makes_of_the_answer_is_learnt(templated):
    tokenizer = templated(TURN.replace("{{ m['content'] }}", "{{ m['content'] | trim | upper }}") + ASKING)
    assert told(tokenizer, encode_answer(tokenizer, QUESTION, "  four ")) == f"FOUR{EOS}"


def test_another_token_may_end_an_answer(templated):
    # As where <|im_end|> ends a turn and <|endoftext|> a text, and only the generation config says so.
    tokenizer = templated(TURN.replace("{{ eos_token }}", "<|user|>") + ASKING)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert told(tokenizer, encode_answer(tokenizer, QUESTION, "Four.")) == f"Four.{EOS}"
    assert told(tokenizer, encode_answer(tokenizer, QUESTION, "Four.", end_ids={user})) == "Four.<|user|>"


def test_a_template_that_writes_the_answered_conversation_anew_gives_the_text_and_its_end(templated):
    # As reasoning models do, which open a thought in the prompt and take it out of the past.
    turn = TURN.replace("{{ eos_token }}", "<|user|>")
    tokenizer = templated(turn + ASKING.replace("<|assistant|>", "<|assistant|><think>"))
    answer = "Two and two are four, as ever."
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert told(tokenizer, encode_answer(tokenizer, QUESTION, answer, end_ids={user})) == f"{answer}<|user|>"


def test_a_prompt_whose_last_token_the_answer_would_change_stays_as_it_is(templated):
    tokenizer = templated("{{ messages[0]['content'] }}{% for m in messages[1:] %}{{ m['content'] }}"
                          "{{ eos_token }}{% endfor %}")  # fmt: skip
    # A token of two letters: the first ends the prompt, the second begins the answer.
    first, second = next(
        t for t in sorted(tokenizer.get_vocab()) if len(t) == 2 and t.isascii() and t.isalpha()
    )
    question = [{"role": "user", "content": first}]
    prompt, answer = encode_prompt(tokenizer, question), encode_answer(tokenizer, question, second)
    assert len(tokenizer.encode(first + second)) == 1
    assert (told(tokenizer, prompt), told(tokenizer, answer)) == (first, f"{second}{EOS}")


def test_without_a_template_contents_are_joined_by_lines(templated):
    tokenizer = templated(None)
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert told(tokenizer, encode_prompt(tokenizer, messages)) == "Be brief.\nWhat is two and two?"
    assert told(tokenizer, encode_answer(tokenizer, messages, " four")) == f" four{EOS}"


def test_a_record_that_the_template_refuses_is_named(templated):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = templated(refuses + TURN + ASKING)
    records = [
        Record(tuple(QUESTION), "Four."),
        Record(({"role": "system", "content": "Be brief."}, *QUESTION), "4", where="`data.jsonl`, line 7"),
    ]
    with pytest.raises(DataError, match=r"`data\.jsonl`, line 7: the chat template.*no system role"):
        encode_records(records, tokenizer, DataConfig())


def test_an_answer_of_which_nothing_is_left_is_refused(templated):
    tokenizer = templated(
        TURN.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}") + ASKING
    )
    with pytest.raises(DataError, match=r"line 3: .*nothing of the answer"):
        encode_records([Record(tuple(QUESTION), "so</think>", where="line 3")], tokenizer, DataConfig())


def records_of(*answers):
    return [Record(tuple(QUESTION), answer, where=f"line {at}") for at, answer in enumerate(answers, 1)]


def test_what_is_too_long_is_cut_and_counted(tokenizer):
    records = records_of("Four.", "Four, " * 40, "")
    prompt = encode_prompt(tokenizer, QUESTION)
    limits = DataConfig(max_prompt_tokens=len(prompt) - 2, max_tokens=len(prompt) + 18)
    encoded = encode_records(records, tokenizer, limits)
    assert encoded.lengths == Lengths(3, num_prompts_truncated=3, num_answers_truncated=1)
    assert [pair.prompt for pair in encoded.pairs] == [prompt[2:]] * 3
    assert encoded.pairs[0].wanted == encode_answer(tokenizer, QUESTION, "Four.")
    assert encoded.pairs[1].wanted == encode_answer(tokenizer, QUESTION, records[1].wanted)[:20]
    assert encoded.pairs[2].wanted == ()


def test_what_is_too_long_is_dropped_and_counted_if_so_asked(tokenizer):
    records = records_of("Four.", "Four, " * 40, "4")
    limits = DataConfig(max_prompt_tokens=90, max_tokens=100, too_long="drop")
    encoded = encode_records(records, tokenizer, limits)
    assert encoded.lengths == Lengths(3, num_dropped=1)
    assert [record.where for record in encoded.records] == ["line 1", "line 3"]
    assert "1 dropped" in str(encoded.lengths)


def test_nothing_left_is_an_error_that_names_the_limits(tokenizer):
    with pytest.raises(DataError, match="`max_prompt_tokens` 4"):
        encode_records(
            records_of("4"), tokenizer, DataConfig(max_prompt_tokens=4, max_tokens=5, too_long="drop")
        )


def test_both_answers_of_a_preference_are_encoded(tokenizer):
    [pair] = encode_records([Record(tuple(QUESTION), "Four.", "Five.")], tokenizer, DataConfig()).pairs
    assert (told(tokenizer, pair.wanted), told(tokenizer, pair.proposed)) == (f"Four.{EOS}", f"Five.{EOS}")


def test_progress_is_told_to_the_end(tokenizer):
    seen = []
    encode_records(records_of("a", "b"), tokenizer, DataConfig(), on_progress=seen.append)
    assert (seen[-1].step, seen[-1].steps) == (2, 2)
