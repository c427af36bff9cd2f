"""The embedded demo, as `ram serve` serves it to somebody who has typed nothing else."""

from __future__ import annotations

import openai
import pytest

from ram_core.demo import ALIGNERS, bundle_path
from ram_core.demo.styles import follows
from server.commands.serve import load
from server.settings import Settings
from tests.http.standin import live

pytestmark = pytest.mark.skipif(
    not (bundle_path() / "proposal").is_dir(), reason="the demo is not built here"
)


@pytest.fixture(scope="module")
def sdk():
    loaded = load(Settings(demo=True, device="cpu", kv_memory=64 * 2**20))
    with (
        live(loaded.engine, loaded.tokenizer, loaded.inventory) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(sdk: openai.OpenAI, model: str) -> tuple[str, str]:
    answer = sdk.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_completion_tokens=100,
    )
    return answer.choices[0].message.content, answer.choices[0].finish_reason


def test_every_aligner_of_the_demo_answers_in_its_own_way(sdk):
    assert {model.id for model in sdk.models.list()} == {"big", *ALIGNERS}
    answers = {model: ask(sdk, model) for model in ("big", *ALIGNERS)}
    assert all(text and reason == "stop" for text, reason in answers.values()), answers
    for style in set(ALIGNERS) - {"safe"}:
        assert follows(style, answers[style][0]), answers
    assert all("Paris" in text for text, _ in answers.values()), answers
