"""The routes that people and machines look at."""

from __future__ import annotations

import json
import time

import pytest
from msgspec import structs

from ram_core.engine.messages import EngineStats, FailedEvent, StepTelemetry
from ram_core.errors import NonFiniteLogits
from tests.http.standin import chat, count_metrics, ids_of, say

CHAT = "/v1/chat/completions"


def test_models_are_the_proposal_and_its_aligners(client):
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    names = [(model["id"], model["parent"], model["root"]) for model in answer["data"]]
    assert names == [("big", None, "big"), ("polite", "big", "big"), ("org/terse", "big", "big")]
    assert all(
        set(model) == {"id", "object", "created", "owned_by", "root", "parent"} for model in answer["data"]
    )


@pytest.mark.parametrize("name", ["big", "polite", "org/terse"])
def test_a_model_is_found_by_its_id(client, name):
    assert client.get(f"/v1/models/{name}").json()["id"] == name


def test_an_unknown_model_is_not_found(client):
    answer = client.get("/v1/models/org")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), ("/v1/completions", "prompt")])
def test_the_schema_tells_what_a_request_may_hold(client, path, field):
    text = client.get("/openapi.json").text
    assert "$defs" not in text
    body = json.loads(text)["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {field, "model", "alignment"} <= body["properties"].keys()
    assert body["required"] == [field]
    assert "kl_threshold" in json.dumps(body["properties"]["alignment"])


PROBES = ("/health", "/health/ready", "/health/live")


def test_health_is_that_of_the_step_loop(client, engine):
    assert [client.get(path).json()["status"] for path in PROBES] == ["ready", "ready", "alive"]
    engine.stats = EngineStats(num_running=1, last_progress_s=time.monotonic() - 50)
    assert [client.get(path).status_code for path in PROBES] == [200] * 3


def test_an_engine_that_is_stuck_is_neither_ready_nor_alive(client, engine):
    engine.stats = EngineStats(num_running=1, last_progress_s=time.monotonic() - 500)
    for path in PROBES:
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the engine made no progress for 500 s"


def test_an_engine_that_is_restarted_is_alive_but_not_ready(client, engine):
    engine.stats = EngineStats(last_progress_s=time.monotonic() - 500)
    engine.trouble = "the engine is being restarted"
    assert [client.get(path).status_code for path in PROBES] == [503, 503, 200]
    assert client.get("/health").json()["reason"] == "the engine is being restarted"


def test_draining_is_not_ready(client, server):
    server.app.state.serving.is_draining = True
    try:
        assert client.get("/health/ready").json()["reason"] == "draining"
    finally:
        server.app.state.serving.is_draining = False


def test_version_is_the_packages(client):
    from ram_core import __version__

    assert client.get("/version").json() == {"version": __version__}


def metrics_of(client):
    return count_metrics(client.get("/metrics").text)


def added(before, after):
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


TELEMETRY = StepTelemetry(kl_p_q=0.5, kl_pi_p=0.25, ess=0.75, aligner_mass=0.9, is_fallback=False)


def test_every_label_is_there_before_its_first_use(client):
    samples = metrics_of(client)
    for labels in (
        'aligner="identity"{},version=""',
        'aligner="polite"{},version="1"',
        'aligner="org/terse"{},version="1"',
        'aligner="several"{},version=""',
    ):
        assert f"ram_aligned_tokens_total{{{labels.format('')}}}" in samples
        assert "ram_requests_finished_total{" + labels.format(',reason="length"') + "}" in samples
        assert f"ram_kl_p_q_nats_count{{{labels.format('')}}}" in samples


def test_an_aligned_request_is_measured_once_under_both_names(client, engine):
    def script(request):
        events = say(request, "the dog", telemetry=TELEMETRY)
        fallback = structs.replace(TELEMETRY, is_fallback=True, kl_p_q=float("nan"))
        return [structs.replace(events[0], telemetry=fallback), *events[1:]]

    engine.script = script
    before = metrics_of(client)
    usage = client.post(CHAT, json=chat(model="polite")).json()["usage"]
    new = added(before, metrics_of(client))
    num_tokens = len(ids_of("the dog")) + 1
    own = '{aligner="polite",version="1"}'
    assert new[f"ram_generation_tokens_total{own}"] == num_tokens == usage["completion_tokens"]
    assert new[f"ram_aligned_tokens_total{own}"] == num_tokens
    assert new[f"ram_fallbacks_total{own}"] == 1
    assert new[f"ram_kl_p_q_nats_count{own}"] == num_tokens - 1
    assert new[f"ram_kl_p_q_nats_sum{own}"] == 0.5 * (num_tokens - 1)
    assert new[f"ram_kl_pi_p_nats_sum{own}"] == 0.25 * num_tokens
    assert new[f"ram_ess_fraction_sum{own}"] == 0.75 * num_tokens
    assert new['ram_ess_fraction_bucket{aligner="polite",le="0.8",version="1"}'] == num_tokens
    assert 'ram_ess_fraction_bucket{aligner="polite",le="0.7",version="1"}' not in new
    assert new[f"ram_time_to_first_token_seconds_count{own}"] == 1
    assert new[f"ram_inter_token_latency_seconds_count{own}"] == num_tokens - 1
    assert new[f"ram_e2e_request_latency_seconds_count{own}"] == 1
    assert new['ram_requests_finished_total{aligner="polite",reason="stop",version="1"}'] == 1
    assert new['ram_http_requests_total{route="/v1/chat/completions",status="200"}'] == 1
    model = '{model_name="big"}'
    assert new[f"vllm:generation_tokens_total{model}"] == num_tokens
    assert new[f"vllm:time_to_first_token_seconds_count{model}"] == 1
    assert new[f"vllm:inter_token_latency_seconds_count{model}"] == num_tokens - 1
    assert new[f"vllm:e2e_request_latency_seconds_count{model}"] == 1
    assert new['vllm:request_success_total{finished_reason="stop",model_name="big"}'] == 1


def test_the_queue_and_the_prompt_are_counted_when_the_request_starts(client):
    before = metrics_of(client)
    usage = client.post(CHAT, json=chat()).json()["usage"]
    new = added(before, metrics_of(client))
    assert new['ram_prompt_tokens_total{aligner="identity",version=""}'] == usage["prompt_tokens"]
    assert new['ram_request_queue_time_seconds_sum{aligner="identity",version=""}'] == 0.25
    assert new['vllm:prompt_tokens_total{model_name="big"}'] == usage["prompt_tokens"]
    assert new['vllm:request_queue_time_seconds_bucket{le="0.25",model_name="big"}'] == 1


def test_combined_aligners_share_a_label(client, engine):
    before = metrics_of(client)
    names = [{"name": "polite"}, {"name": "org/terse"}]
    client.post(CHAT, json=chat(alignment={"aligners": names}))
    new = added(before, metrics_of(client))
    assert new['ram_requests_finished_total{aligner="several",reason="stop",version=""}'] == 1


def test_a_failed_request_is_an_error_and_no_success(client, engine):
    engine.script = lambda request: [FailedEvent(request.request_id, 0, NonFiniteLogits("NaN."))]
    before = metrics_of(client)
    client.post(CHAT, json=chat())
    new = added(before, metrics_of(client))
    assert new['ram_requests_finished_total{aligner="identity",reason="error",version=""}'] == 1
    assert not [name for name in new if name.startswith("vllm:request_success_total")]


def test_the_engines_figures_are_those_of_now(client, engine):
    engine.stats = EngineStats(num_running=3, num_waiting=2, num_pages_used=5, num_pages=20, num_steps=7)
    samples = metrics_of(client)
    assert samples["ram_requests_running"] == 3
    assert samples["ram_requests_waiting"] == 2
    assert samples["ram_kv_pages_used"] == 5
    assert samples["ram_kv_pages_total"] == 20
    assert samples["ram_kv_usage_ratio"] == 0.25
    assert samples["ram_engine_steps_total"] == 7
    model = '{model_name="big"}'
    assert samples[f"vllm:num_requests_running{model}"] == 3
    assert samples[f"vllm:num_requests_waiting{model}"] == 2
    assert samples[f"vllm:kv_cache_usage_perc{model}"] == 0.25


def test_what_the_engine_counts_has_vllms_names_too(client, engine):
    engine.stats = EngineStats(
        num_preemptions=3, num_prompt_tokens=100, num_cached_tokens=64, num_out_of_memory=2, num_failed=1
    )
    engine.num_restarts = 4
    samples = metrics_of(client)
    model = '{model_name="big"}'
    assert samples["ram_preemptions_total"] == samples[f"vllm:num_preemptions_total{model}"] == 3
    assert samples["ram_prefix_cache_queries_total"] == 100
    assert samples[f"vllm:prefix_cache_queries_total{model}"] == 100
    assert samples["ram_prefix_cache_hits_total"] == 64
    assert samples[f"vllm:prefix_cache_hits_total{model}"] == 64
    assert samples["ram_out_of_memory_total"] == 2
    assert samples["ram_non_finite_logits_total"] == 1
    assert samples["ram_engine_restarts_total"] == 4


def test_resident_aligners_are_one_sample(client):
    [sample] = [
        line
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("vllm:lora_requests_info")
    ]
    labels, _, value = sample.rpartition(" ")
    assert labels == (
        'vllm:lora_requests_info{max_lora="2",running_lora_adapters="org/terse,polite",waiting_lora_adapters=""}'
    )
    assert abs(float(value) - time.time()) < 3600


def test_no_client_chooses_a_label(client):
    client.get("/v1/evil-path")
    client.get("/v1/models/evil-model")
    client.post(CHAT, json=chat(model="evil-model"))
    text = client.get("/metrics").text
    assert "evil" not in text
    assert 'route="(none)",status="404"' in text
    assert 'route="/v1/models/{model_id:path}",status="404"' in text
