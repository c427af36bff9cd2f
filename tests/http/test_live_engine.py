"""The whole house: the server around a real engine that runs a tiny model."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import tomlkit
import torch

from ram_core.engine.config import AlignerSource, EngineConfig
from ram_core.engine.thread import EngineThread
from ram_core.models.vocabulary import load_tokenizer
from server.tenants.editing import add_tenant
from tests.http.standin import PATIENCE_S, LiveServer, chat, chunks_of, live
from tests.models import save_pair

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    num_threads = torch.get_num_threads()
    # Such a small model is slower on more threads, far slower on a busy machine.
    torch.set_num_threads(1)
    proposal, aligners = save_pair(tmp_path_factory.mktemp("pair"))
    config = EngineConfig(
        proposal=str(proposal),
        aligners=tuple(AlignerSource(f"{name}@1", str(path)) for name, path in aligners.items()),
        device="cpu",
        kv_memory_bytes=4 * 2**20,
        max_batch=4,
        max_queue=8,
    )
    engine = EngineThread.start(config)
    with live(engine, load_tokenizer(str(proposal))) as running:
        yield running
    assert engine.trouble == "the engine was closed"
    torch.set_num_threads(num_threads)


@pytest.fixture
def client(server: LiveServer):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


def text_of(client: httpx.Client, **fields) -> str:
    answer = client.post(CHAT, json=chat(**{"max_tokens": 8, "seed": 1, "ignore_eos": True, **fields}))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def is_idle(server: LiveServer) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        stats = server.engine._engine.stats
        if not (stats.num_running or stats.num_waiting or stats.num_pages_used):
            return True
        time.sleep(0.005)
    return False


def test_a_stream_and_a_plain_answer_say_the_same(client):
    for model in ("big", "polite"):
        whole = text_of(client, model=model)
        fields = {"max_tokens": 8, "seed": 1, "ignore_eos": True, "model": model, "stream": True}
        chunks = chunks_of(client.post(CHAT, json=chat(**fields)).text)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


def test_an_aligner_changes_the_answer_and_the_identity_does_not(client):
    alone = text_of(client)
    assert text_of(client, alignment={"aligner": "identity"}) == alone
    assert text_of(client, model="polite", alignment={"strength": 0, "proposal_top_p": 1}) == alone
    answers = {text_of(client, model=name) for name in ("big", "polite", "terse")}
    assert len(answers) == 3


def test_a_seeded_answer_is_the_same_in_company(client):
    alone = [text_of(client, seed=seed, model="polite") for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: text_of(client, seed=seed, model="polite"), range(4)))
    assert together == alone
    assert len(set(alone)) > 1


def test_greedy_log_probs_are_those_of_the_most_probable(client):
    fields = {"temperature": 0, "logprobs": True, "top_logprobs": 2, "max_tokens": 4, "ignore_eos": True}
    answer = client.post(CHAT, json=chat(**fields)).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 4 == answer["usage"]["completion_tokens"]
    for entry in entries:
        assert entry["token"] == entry["top_logprobs"][0]["token"]
        assert entry["top_logprobs"][0]["logprob"] > entry["top_logprobs"][1]["logprob"]


def test_telemetry_is_real(client):
    body = chat(model="polite", max_tokens=4, ignore_eos=True, alignment={"telemetry": True, "strength": 2})
    answer = client.post(CHAT, json=body).json()
    summary = answer["alignment"]
    assert summary["aligners"] == [{"name": "polite", "version": "1", "strength": 2.0}]
    assert summary["tokens"] == 4 == len(answer["choices"][0]["alignment"])
    assert summary["mean_kl_p_q"] > 0
    assert 0 < summary["mean_ess"] <= 1


def test_a_gate_at_zero_always_falls_back(client):
    body = chat(
        model="polite", max_tokens=4, ignore_eos=True, alignment={"telemetry": True, "kl_threshold": -1}
    )
    assert client.post(CHAT, json=body).json()["alignment"]["fallbacks"] == 4


def test_several_choices_differ_and_end(client):
    chunks = chunks_of(
        client.post(CHAT, json=chat(n=3, max_tokens=6, ignore_eos=True, seed=5, stream=True)).text
    )
    texts = ["", "", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert len(set(texts)) == 3
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons.count("length") == 3


def test_a_stop_string_ends_the_answer_and_frees_its_place(client, server):
    whole = text_of(client, max_tokens=30)
    stop = whole[10:12]
    cut = text_of(client, max_tokens=30, stop=[stop])
    assert cut == whole[: whole.index(stop)]
    assert is_idle(server)


def test_hanging_up_frees_slot_and_pages(client, server):
    with client.stream("POST", CHAT, json=chat(n=2, stream=True, ignore_eos=True)) as answer:
        next(answer.iter_lines())
        assert server.engine.stats.num_running + server.engine.stats.num_waiting
    assert is_idle(server)


def test_a_prompt_beyond_the_context_is_refused(client):
    answer = client.post(CHAT, json=chat("dog " * 500))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    answer = client.post("/v1/completions", json={"prompt": [10**30]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    answer = client.post("/v1/completions", json={"prompt": ""})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_a_full_queue_refuses_and_keeps_nothing(client, server):
    body = {"prompt": "Hi", "n": 5, "max_tokens": 100, "ignore_eos": True}
    answer = client.post("/v1/completions", json={**body, "prompt": ["Hi"] * 4})
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert is_idle(server)
    assert client.post("/v1/completions", json={**body, "max_tokens": 2}).status_code == 200


def test_the_official_sdk_talks_to_the_real_engine(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        stream = sdk.chat.completions.create(
            model="terse",
            messages=[{"role": "user", "content": "Hi"}],
            max_completion_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "alignment": {"telemetry": True}},
        )
        chunks = list(stream)
    assert chunks[-1].usage.completion_tokens == 5
    [summary] = [chunk.model_extra["alignment"] for chunk in chunks if "alignment" in chunk.model_extra]
    assert summary["tokens"] == 5


def test_no_nan_ever_leaves(client):
    body = chat(
        model="polite",
        max_tokens=3,
        logprobs=True,
        top_logprobs=5,
        ignore_eos=True,
        alignment={"resampling": "candidates", "telemetry": True},
    )
    text = client.post(CHAT, json=body).text

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} left the server")

    entries = json.loads(text, parse_constant=refuse)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [-9999.0] * 3


def test_a_crowd_of_which_half_hangs_up_leaves_nothing_behind(server):
    def visit(number: int) -> int:
        body = chat(
            f"visitor {number}",
            model=("big", "polite", "terse")[number % 3],
            n=1 + number % 2,
            seed=number,
            max_tokens=10 + number,
            ignore_eos=True,
            stream=number % 4 > 0,
            stop=["e"] if number % 5 == 0 else None,
        )
        with (
            httpx.Client(base_url=server.url, timeout=60) as client,
            client.stream("POST", CHAT, json=body) as answer,
        ):
            if answer.status_code == 200 and number % 2:
                next(answer.iter_lines())
            else:
                answer.read()
            return answer.status_code

    with ThreadPoolExecutor(12) as pool:
        statuses = set(pool.map(visit, range(48)))
    assert statuses <= {200, 429}
    assert 200 in statuses
    assert is_idle(server)
    assert server.engine._streams.num_open == 0


def test_after_a_hang_up_everybody_sees_an_idle_engine(client, server):
    with client.stream("POST", CHAT, json=chat(stream=True, ignore_eos=True)) as answer:
        next(answer.iter_lines())
    assert is_idle(server)
    time.sleep(0.1)
    assert server.engine.stats.num_running == 0


EXTREMES = [
    {"temperature": 1e-300},
    {"temperature": 1e-300, "model": "polite"},
    {"temperature": 2, "top_p": 1e-300},
    {"top_k": 2**31 - 1, "min_p": 1},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"stop_token_ids": [10**30, -5]},
    {"stop_token_ids": list(range(300))},
    {"stop": ["x" * 4096]},
    {"model": "polite", "alignment": {"strength": 100}},
    {"model": "polite", "alignment": {"strength": -100, "resampling": "nucleus"}},
    {"model": "polite", "alignment": {"candidates": 256, "resampling": "candidates"}},
    {"model": "polite", "alignment": {"candidates": 1, "resampling": "candidates"}, "temperature": 1e-300},
    {"model": "polite", "alignment": {"proposal_temperature": 1e-300}},
    {"model": "polite", "alignment": {"proposal_temperature": 100, "proposal_top_p": 1}},
    {"model": "polite", "alignment": {"proposal_top_k": 2**31 - 1, "proposal_top_p": 1e-300}},
    {"model": "polite", "alignment": {"kl_threshold": 1e308}},
    {"model": "polite", "alignment": {"kl_threshold": -1e308, "eos_priority": True}},
    {"model": "polite", "alignment": {"resampling": "proposal"}},
    {"alignment": {"aligners": [{"name": "polite", "strength": 100}, {"name": "terse", "strength": -100}]}},
]


@pytest.mark.parametrize("fields", EXTREMES, ids=lambda fields: json.dumps(fields)[:70])
def test_what_is_extreme_but_valid_is_answered(client, fields):
    body = {"max_tokens": 2, "ignore_eos": True, "logprobs": True, "top_logprobs": 20, "n": 2, **fields}
    body["alignment"] = {"telemetry": True, **body.get("alignment", {})}
    answer = client.post(CHAT, json=chat(**body))
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        assert len(choice["logprobs"]["content"]) <= 2
    assert client.get("/health/ready").status_code == 200


def test_tenants_share_prefixes_only_if_they_are_told_to(tmp_path):
    """a and b are of one group; c is of none, d of another, and e was of it before the file changed."""
    proposal, _ = save_pair(tmp_path, aligners=())
    path = tmp_path / "tenants.toml"
    keys = {name: add_tenant(path, name) for name in "abcde"}

    def put_into_groups(groups: dict[str, str]) -> None:
        document = tomlkit.parse(path.read_text())
        for name in keys:
            document["tenants"][name].pop("prefix_group", None)
            if name in groups:
                document["tenants"][name]["prefix_group"] = groups[name]
        path.write_text(tomlkit.dumps(document))

    put_into_groups({"a": "ours", "b": "ours", "d": "theirs", "e": "ours"})
    engine = EngineThread.start(EngineConfig(proposal=str(proposal), device="cpu", kv_memory_bytes=2**20))
    with (
        live(engine, load_tokenizer(str(proposal)), tenants_file=path) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):

        def num_cached(tenant: str, **fields: str) -> int:
            body = chat("the dog " * 30, max_tokens=1, **fields)
            answer = client.post(CHAT, json=body, headers={"Authorization": f"Bearer {keys[tenant]}"})
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert num_cached("a") == 0
        assert num_cached("b") > 16
        assert num_cached("e") > 16
        assert [num_cached("c"), num_cached("d"), num_cached("b", cache_salt="s")] == [0, 0, 0]
        put_into_groups({"a": "ours", "b": "ours", "d": "theirs"})
        server.app.state.serving.tenants.reload()
        assert num_cached("e") == 0


def test_when_the_engine_ends_running_streams_are_told(tmp_path):
    proposal, _ = save_pair(tmp_path, aligners=())
    engine = EngineThread.start(EngineConfig(proposal=str(proposal), device="cpu", kv_memory_bytes=2**20))
    with live(engine, load_tokenizer(str(proposal))) as server, httpx.Client(timeout=30) as client:
        url = f"{server.url}{CHAT}"
        with client.stream("POST", url, json=chat(stream=True, ignore_eos=True)) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine._inbox.put(None)
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert rest[-1] == "data: [DONE]"
        assert client.get(f"{server.url}/health/ready").status_code == 503
        assert client.post(url, json=chat()).status_code == 503
