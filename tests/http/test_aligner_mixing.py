"""Several aligners at once, presets and contrasts: the law that is drawn from, and who may ask for it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from ram_core.models.vocabulary import load_tokenizer
from server.tenants.editing import add_tenant
from tests.http.house import CHAT, House, Models, house, make_models, put_preset
from tests.http.standin import chat

TOP_K = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tenants_file(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    keys = {name: add_tenant(file, name) for name in ("acme", "globex", "root")}
    text = file.read_text().replace("[tenants.acme]", '[tenants.acme]\naligners = ["contrast"]')
    file.write_text(text.replace("[tenants.globex]", '[tenants.globex]\naligners = ["tuned", "untuned"]'))
    return file, keys


@pytest.fixture(scope="module")
def running(models, tenants_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("aligners")
    for name, model in (("tuned", "one"), ("untuned", "two"), ("other", "three")):
        (root / name).mkdir()
        models.put(model, root / name / "1")
    put_preset(root / "contrast" / "1", tuned=1.5, untuned=-1.5)
    put_preset(root / "all" / "1", contrast=0.5, other=2.0, tuned=0.25)
    file, keys = tenants_file
    with house(models, root, preload=(), tenants_file=file) as each:
        each.keys = keys
        yield each


def law(
    models: Models, prompt_ids: list[int], exponents: dict[str, float], temperature: float
) -> torch.Tensor:
    """The first token's log-probabilities: (p · Π q^β)^(1/T) on the proposal's `TOP_K` best, in float64."""

    def log_probs(directory) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        with torch.no_grad():
            return model(torch.tensor([prompt_ids])).logits[0, -1].log_softmax(-1)

    scores = log_probs(models.proposal)
    inside = scores.topk(TOP_K).indices
    for model, exponent in exponents.items():
        scores = scores + exponent * log_probs(models.small[model])
    table = torch.full_like(scores, -math.inf)
    table[inside] = scores[inside] / temperature
    return table.log_softmax(-1)


MIXES = {
    "product of two": (
        {"aligners": [{"name": "tuned", "strength": 0.5}, {"name": "other", "strength": 1.25}]},
        {"one": 0.5, "three": 1.25},
    ),
    "proxy tuning": (
        {"aligners": [{"name": "tuned", "strength": 2.0}, {"name": "untuned", "strength": -2.0}]},
        {"one": 2.0, "two": -2.0},
    ),
    "1/β of a GenARM": ({"aligners": [{"name": "other"}], "strength": 1 / 0.4}, {"three": 2.5}),
    "a preset": ({"aligner": "contrast"}, {"one": 1.5, "two": -1.5}),
    "a preset of presets, weighed": (
        {"aligners": [{"name": "all", "strength": 2.0}, {"name": "untuned", "strength": 1.0}]},
        {"one": 2.0, "two": -0.5, "three": 4.0},
    ),
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_law_is_the_weighted_product(models, running, name, temperature):
    words, exponents = MIXES[name]
    body = chat(
        max_tokens=1,
        temperature=temperature,
        logprobs=True,
        top_logprobs=TOP_K,
        alignment={**words, "proposal_top_k": TOP_K, "proposal_top_p": 1.0},
    )
    answer = running.client.post(CHAT, json=body, headers=_as(running, "root"))
    assert answer.status_code == 200, answer.text
    tokenizer = load_tokenizer(str(models.proposal))
    prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = law(models, prompt_ids, exponents, temperature).topk(TOP_K).values
    told = answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert [entry["logprob"] for entry in told] == pytest.approx(expected.tolist(), abs=2e-4)


def _as(running: House, tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {running.keys[tenant]}"}


def ask(running: House, tenant: str, **fields):
    return running.client.post(CHAT, json=chat(max_tokens=1, **fields), headers=_as(running, tenant))


def test_a_tenant_may_use_a_preset_without_its_parts(running):
    for fields in ({"model": "contrast"}, {"alignment": {"aligners": [{"name": "contrast", "strength": 2}]}}):
        answer = ask(running, "acme", **fields)
        assert running.versions_of(answer) == "contrast@1"
    told = ask(running, "acme", model="contrast", alignment={"telemetry": True})
    assert "tuned" not in told.text
    listed = running.client.get("/v1/models", headers=_as(running, "acme")).json()["data"]
    assert [model["id"] for model in listed] == ["big", "contrast"]


def test_what_a_tenant_may_not_use_does_not_exist_wherever_it_is_named(running):
    def body_of(name: str, hidden: str) -> str:
        answer = ask(running, name, alignment={"aligners": [{"name": hidden}]})
        assert answer.status_code == 404
        return answer.text.replace(hidden, "NAME")

    assert body_of("acme", "tuned") == body_of("acme", "nobody") == body_of("globex", "contrast")
    for model in ("tuned", "big:tuned", "nobody"):
        assert ask(running, "acme", model=model).status_code == 404
        assert running.client.get(f"/v1/models/{model}", headers=_as(running, "acme")).status_code == 404
    mixed = [{"name": "tuned"}, {"name": "untuned", "strength": -1}]
    assert running.versions_of(ask(running, "globex", alignment={"aligners": mixed})) == "tuned@1, untuned@1"


def test_a_preset_without_one_of_its_parts_says_nothing_of_them(running):
    put_preset(running.root / "contrast" / "2", tuned=1.0, secret=1.0)
    running.wait(lambda service: service.add("contrast", "contrast/2"))
    running.promote("contrast", "2")
    answer = ask(running, "acme", model="contrast")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "aligner_unavailable")
    assert "secret" not in answer.text
    running.do(lambda service: service.rollback("contrast"))
    assert running.versions_of(ask(running, "acme", model="contrast")) == "contrast@1"
