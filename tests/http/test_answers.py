"""Plain answers, and what reaches the engine."""

from __future__ import annotations

import math

from ram_core.engine.messages import StartedEvent, StepTelemetry
from ram_core.params import AlignerTerm, Resampling
from tests.http.standin import TOKENIZER, chat, chunks_of, ids_of, say

NOT_FINITE = StepTelemetry(kl_p_q=math.inf, kl_pi_p=math.nan, ess=0.5, aligner_mass=0.25, is_fallback=True)
FINITE = StepTelemetry(kl_p_q=1.0, kl_pi_p=2.0, ess=1.0, aligner_mass=0.75, is_fallback=False)


def ask(client, body, path="/v1/chat/completions"):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_answer_has_all_that_strict_clients_read(client):
    answer = ask(client, chat())
    [choice] = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello, dog!", "refusal": None},
        "finish_reason": "stop",
        "logprobs": None,
    }
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "big"
    prompt_tokens = len(
        TOKENIZER.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    )
    completion_tokens = len(ids_of("Hello, dog!")) + 1
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_several_choices_come_in_order(client, engine):
    engine.script = lambda request: [*say(request, "dog", index=1), *say(request, "one", index=0)]
    answer = ask(client, chat(n=2))
    assert [(choice["index"], choice["message"]["content"]) for choice in answer["choices"]] == [
        (0, "one"),
        (1, "dog"),
    ]


def test_chat_log_probs_leave_out_the_end_of_text(client, engine):
    engine.script = lambda request: say(request, "dog", log_prob=math.nan)
    answer = ask(client, chat(logprobs=True, top_logprobs=3))
    log_probs = answer["choices"][0]["logprobs"]
    assert log_probs["refusal"] is None
    assert "".join(entry["token"] for entry in log_probs["content"]) == "dog"
    assert {entry["logprob"] for entry in log_probs["content"]} == {-9999.0}
    assert [len(entry["top_logprobs"]) for entry in log_probs["content"]] == [3] * len(ids_of("dog"))
    assert answer["usage"]["completion_tokens"] == len(ids_of("dog")) + 1


def test_tokens_inside_a_stop_string_are_not_told(client, engine):
    engine.script = lambda request: say(request, "dog STOP", finish=None)
    answer = ask(client, chat(logprobs=True, stop="STOP"))
    tokens = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert answer["choices"][0]["message"]["content"] == "dog "
    assert "".join(tokens).rstrip() == "dog"


def test_completion_log_probs_have_their_own_shape(client, engine):
    engine.script = lambda request: say(request, "the dog")
    answer = ask(client, {"model": "big", "prompt": "Hi", "logprobs": 2}, "/v1/completions")
    [choice] = answer["choices"]
    log_probs = choice["logprobs"]
    assert choice["text"] == "the dog" == "".join(log_probs["tokens"])
    assert log_probs["text_offset"] == [
        len("".join(log_probs["tokens"][:position])) for position in range(len(log_probs["tokens"]))
    ]
    assert log_probs["token_logprobs"] == [-0.5] * len(log_probs["tokens"])
    assert all(len(top) == 3 for top in log_probs["top_logprobs"])
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")


def test_completions_take_every_form_of_prompt(client, engine):
    ids = ids_of("dog")
    forms = {"dog": [ids], ("dog", "the"): [ids, ids_of("the")], tuple(ids): [ids]}
    for prompt, wanted in forms.items():
        engine.requests.clear()
        body = {"model": "big", "prompt": prompt if isinstance(prompt, str) else list(prompt)}
        ask(client, body, "/v1/completions")
        assert [list(request.prompt_ids) for request in engine.requests] == wanted
    engine.requests.clear()
    ask(client, {"model": "big", "prompt": [ids, [65]], "n": 2}, "/v1/completions")
    assert [list(request.prompt_ids) for request in engine.requests] == [ids, [65]]
    assert [request.num_choices for request in engine.requests] == [2, 2]


def test_completions_end_after_sixteen_tokens_and_chats_when_the_context_does(client, engine):
    ask(client, {"model": "big", "prompt": "Hi"}, "/v1/completions")
    assert engine.last.sampling.max_tokens == 16
    ask(client, chat())
    assert engine.last.sampling.max_tokens == 0
    ask(client, chat(max_completion_tokens=7))
    assert engine.last.sampling.max_tokens == 7


def test_text_parts_and_developer_messages_are_understood(client, engine):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    ask(client, {"model": "big", "messages": messages})
    text = TOKENIZER.decode(engine.last.prompt_ids)
    assert text == "<|bos|><|system|>Be kind.<|end|><|user|>one\ntwo<|end|><|assistant|>"


def test_a_long_text_is_encoded_like_a_short_one(client, engine):
    text = "dog " * 600
    ask(client, chat(text))
    assert text in TOKENIZER.decode(engine.last.prompt_ids)


def test_the_aligner_is_chosen_by_the_extension_or_the_model_name(client, engine):
    table = [
        ({"model": "big"}, ()),
        ({"model": "polite"}, (AlignerTerm("polite@1"),)),
        ({"model": "org/terse"}, (AlignerTerm("org/terse@1"),)),
        ({"model": "big", "alignment": {"aligner": "polite"}}, (AlignerTerm("polite@1"),)),
        ({"model": "polite", "alignment": {"aligner": "org/terse"}}, (AlignerTerm("org/terse@1"),)),
        ({"model": "polite", "alignment": {"aligner": "identity"}}, ()),
        ({"model": "polite", "alignment": {"aligners": []}}, ()),
        ({"model": "polite", "alignment": {"strength": 2}}, (AlignerTerm("polite@1", 2.0),)),
        ({"model": None}, ()),
        (
            {
                "alignment": {
                    "aligners": [{"name": "polite", "strength": 0.5}, {"name": "org/terse"}],
                    "strength": 2,
                }
            },
            (AlignerTerm("polite@1", 1.0), AlignerTerm("org/terse@1", 2.0)),
        ),
    ]
    for fields, terms in table:
        ask(client, chat(**fields))
        assert engine.last.alignment.terms == terms, fields


def test_the_extension_reaches_the_engine(client, engine):
    ask(
        client,
        chat(model="polite", alignment={"resampling": "candidates", "candidates": 4, "kl_threshold": 0.1}),
    )
    assert engine.last.alignment.resampling is Resampling.CANDIDATES
    assert engine.last.alignment.num_candidates == 4
    assert engine.last.alignment.kl_threshold == 0.1


def test_telemetry_beside_log_probs_and_never_bare_nan(client, engine):
    def script(request):
        first, *rest = say(request, "dog", telemetry=FINITE)
        return [*say(request, "H", telemetry=NOT_FINITE, finish=None), first, *rest]

    engine.script = script
    answer = ask(client, chat(model="polite", logprobs=True, alignment={"telemetry": True}))
    [choice] = answer["choices"]
    assert "alignment" not in choice
    figures = [entry["alignment"] for entry in choice["logprobs"]["content"]]
    assert figures[0] == {
        "kl_p_q": None,
        "kl_pi_p": None,
        "ess": 0.5,
        "aligner_mass": 0.25,
        "fallback": True,
    }
    num_aligned = len(ids_of("dog")) + 1
    summary = answer["alignment"]
    assert summary["tokens"] == num_aligned + 1
    assert summary["fallbacks"] == 1
    assert summary["mean_kl_p_q"] == 1.0
    assert summary["mean_ess"] == (0.5 + num_aligned) / (num_aligned + 1)


def test_telemetry_of_the_proposal_alone_is_empty(client):
    answer = ask(client, chat(alignment={"telemetry": True}))
    assert answer["alignment"]["aligners"] == []
    assert answer["alignment"]["tokens"] == 0
    assert answer["alignment"]["mean_ess"] is None
    assert answer["choices"][0]["alignment"] == [None] * len(ids_of("Hello, dog!"))


def test_a_cache_salt_reaches_the_engine_and_without_one_there_is_none(client, engine):
    for body, salt in (
        (chat(cache_salt="mine"), "mine"),
        (chat(cache_salt="x" * 256), "x" * 256),
        (chat(), ""),
    ):
        ask(client, body)
        assert engine.last.cache_salt == salt


def test_prompt_tokens_found_in_the_cache_are_summed_over_the_prompts(client, engine):
    def script(request):
        cached = 3 if request.request_id.endswith("-0") else 4
        return [StartedEvent(request.request_id, 0.0, cached), *say(request, "dog")]

    engine.script = script
    answer = ask(client, {"prompt": ["Hi", "Ho"], "max_tokens": 9}, "/v1/completions")
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 7}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    last = chunks_of(client.post("/v1/chat/completions", json=chat(**options)).text)[-1]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
