"""The official SDK, synchronous and asynchronous, finds nothing amiss."""

from __future__ import annotations

import asyncio

import openai
import pytest

from ram_core.engine.messages import FailedEvent
from ram_core.errors import NonFiniteLogits, QueueFull
from tests.http.standin import say

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def sdk(server, engine):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_sdk_reads_an_answer(sdk):
    answer = sdk.chat.completions.create(
        model="big", messages=MESSAGES, logprobs=True, top_logprobs=1, n=2, extra_body={"alignment": {}}
    )
    assert [choice.message.content for choice in answer.choices] == ["Hello, dog!"] * 2
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -1.0
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert answer._request_id.startswith("req_")


def test_the_sdk_reads_a_stream(sdk):
    stream = sdk.chat.completions.create(
        model="polite", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello, dog!"
    assert chunks[-1].usage.total_tokens > 0
    assert {chunk.model for chunk in chunks} == {"polite"}


def test_the_sdks_own_accumulator_agrees(sdk):
    with sdk.chat.completions.stream(model="big", messages=MESSAGES, logprobs=True, top_logprobs=1) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, dog!"
    assert final.choices[0].finish_reason == "stop"
    assert "".join(entry.token for entry in final.choices[0].logprobs.content) == "Hello, dog!"


def test_the_sdk_reads_completions(sdk):
    answer = sdk.completions.create(model="big", prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in answer.choices] == ["Hello, dog!"] * 2
    chunks = list(sdk.completions.create(model="big", prompt="a", stream=True, logprobs=1))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello, dog!"


def test_the_sdk_lists_models(sdk):
    assert [model.id for model in sdk.models.list()] == ["big", "polite", "org/terse"]
    assert sdk.models.retrieve("org/terse").id == "org/terse"


def test_the_sdk_raises_what_fits(sdk, engine):
    with pytest.raises(openai.NotFoundError) as not_found:
        sdk.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model="big", messages=MESSAGES, temperature=5)
    assert bad.value.param == "temperature"
    engine.refusal = QueueFull("The queue is full.", retry_after_s=1)
    with pytest.raises(openai.RateLimitError):
        sdk.chat.completions.create(model="big", messages=MESSAGES)


def test_the_sdk_raises_what_fails_midway(sdk, engine):
    engine.script = lambda request: [
        *say(request, "Hello", finish=None),
        FailedEvent(request.request_id, 0, NonFiniteLogits("The model returned NaN.")),
    ]
    stream = sdk.chat.completions.create(model="big", messages=MESSAGES, stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="The model returned NaN"):
        seen.extend(chunk.choices[0].delta.content for chunk in stream)


def test_the_asynchronous_sdk_reads_the_same(server, engine):
    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = [
                client.chat.completions.create(model=model, messages=MESSAGES)
                for model in ("big", "polite", "org/terse")
            ]
            texts = [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]
            stream = await client.chat.completions.create(model="big", messages=MESSAGES, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return texts, "".join(pieces)

    assert asyncio.run(talk()) == (["Hello, dog!"] * 3, "Hello, dog!")
