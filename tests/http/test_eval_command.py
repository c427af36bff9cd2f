"""`ram eval` as it is typed: on the demo's models, with judges in Python and behind a real HTTP server."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from typer.testing import CliRunner

from ram_core.demo import bundle_path
from ram_core.demo.judging import held_out_records
from ram_core.evaluation.judges import Case, JudgeError
from ram_core.progress import ignore_progress
from ram_core.training.records import record_of
from server.cli import app
from server.judging import EndpointJudge
from tests.models import make_tokenizer, save_model

PIRATE = ("eval", "pirate", "--demo", "--max-prompts", "12", "--max-tokens", "24", "--seed", "1")
QUESTION = ({"role": "user", "content": "Who?"},)
CASES = [Case(QUESTION, "Arr, me!", "Me."), Case(QUESTION, "Arr!", "Myself."), Case(QUESTION, "I.", "I.")]

Reply = Callable[["JudgeServer", str, str], str | int]


class JudgeServer(ThreadingHTTPServer):
    """Says what `reply` makes of two answers: a text, or the status of a refusal."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.num_running = self.max_running = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.num_running += 1
            self.server.max_running = max(self.server.max_running, self.server.num_running)
        asked = body["messages"][-1]["content"]
        first, second = (
            re.search(rf"<answer_{name}>\n(.*?)\n</answer_{name}>", asked, re.DOTALL) for name in "ab"
        )
        assert first
        assert second
        said = self.server.reply(self.server, first[1], second[1])
        with self.server.lock:
            self.server.num_running -= 1
        if isinstance(said, int):
            self._send(said, {"error": {"message": "the judge is out"}})
        else:
            message = {"role": "assistant", "content": said}
            self._send(200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("retry-after-ms", "1")
        # A client that has heard enough hangs up.
        with contextlib.suppress(ConnectionError):
            self.end_headers()
            self.wfile.write(raw)

    def log_message(self, *words: object) -> None:
        """Not into the tests' output."""


@contextlib.contextmanager
def judge_server(reply: Reply) -> Iterator[JudgeServer]:
    with JudgeServer(reply) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def sounds_like_a_pirate(text: str) -> bool:
    return "arr" in text.lower() or " be " in text


def likes_pirates(server: JudgeServer, first: str, second: str) -> str:
    is_first, is_second = map(sounds_like_a_pirate, (first, second))
    verdict = "C" if is_first == is_second else "A" if is_first else "B"
    return f"[[A]] would be hasty. It is [[{verdict}]]."


def ram(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `ram`, run in this process."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_a_judge_behind_http_is_asked_in_both_orders_and_everything_is_written(tmp_path: Path) -> None:
    outputs = ("--json", f"{tmp_path}/r.json", "--answers", f"{tmp_path}/a.jsonl", "--plots", f"{tmp_path}/p")
    with judge_server(likes_pirates) as server:
        asked = ("--judge-url", server.url, "--judge-model", "wise", "--judge-criteria", "piracy")
        code, out, err = ram(*PIRATE, *asked, *outputs, "--strengths", "0.5,1", "--plot-format", "svg")
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    proposal, half, full = report["rows"]
    assert (proposal["label"], half["strength"], full["strength"]) == ("proposal", 0.5, 1.0)
    assert full["judged"]["agreement"] == 1.0
    assert full["held_out"]["perplexity"] < proposal["held_out"]["perplexity"]
    assert report["sources"]["proposal"] == str(bundle_path() / "proposal")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 12
    alone, _, aligned = (
        [sounds_like_a_pirate(line["answer"]) for line in lines[start : start + 12]] for start in (0, 12, 24)
    )
    wins = [0.5 + (now - before) / 2 for now, before in zip(aligned, alone, strict=True)]
    assert full["judged"]["win_rate"]["value"] == pytest.approx(fmean(wins))
    assert fmean(wins) > 0.5
    num_different = sum(
        aligned["answer"] != alone["answer"]
        for start in (12, 24)
        for aligned, alone in zip(lines[start : start + 12], lines[:12], strict=True)
    )
    assert len(server.bodies) == 2 * num_different
    assert server.bodies[0]["model"] == "wise"
    assert "piracy" in server.bodies[0]["messages"][0]["content"]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["frontier.svg", "kl_by_position.svg"]
    for word in ("win rate", "equal length", "KL(π‖p)", "self-BLEU", "pirate × 0.5", "judged by wise"):
        assert word in out
    assert "100% of pairs got the same verdict" in out


def test_a_judge_that_refuses_leaves_the_answers_the_table_and_a_clear_error(tmp_path: Path) -> None:
    with judge_server(lambda server, first, second: 401) as server:
        asked = ("--judge-url", server.url, "--judge-model", "wise")
        code, out, err = ram(*PIRATE, *asked, "--answers", f"{tmp_path}/a.jsonl", "--json", f"{tmp_path}/r")
    assert code == 1
    assert f"the judge `wise` at {server.url} failed: Error code: 401" in err
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 24
    assert "pirate × 1" in out
    assert "win rate" not in out
    assert "401" in json.loads((tmp_path / "r").read_text())["failure"]


def test_a_judge_in_python_and_the_demos_own_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corsair.py").write_text(
        "from ram_core.demo.judging import pirate\n"
        "class Judge:\n"
        "    def score(self, messages, answer, wanted):\n"
        "        assert wanted\n"
        "        return pirate(messages, answer, wanted)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    code, out, err = ram(*PIRATE, "--judge", "corsair:Judge")
    assert code == 0, err
    assert "judged by corsair:Judge" in out
    assert "score" in out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("eval", "--proposal", "x", "--demo"), "not both"),
        (("eval", "--proposal", "x"), "at least one aligner"),
        (("eval", "rude", "--demo"), "no aligner `rude`"),
        ((*PIRATE, "--judge", "nothing:here"), "no judge `nothing:here`"),
        ((*PIRATE, "--judge", "a:b", "--judge-model", "c"), "not both"),
        ((*PIRATE, "--judge-url", "http://127.0.0.1:1"), "--judge-model"),
        ((*PIRATE, "--strengths", "1,much"), "`strengths`: could not convert"),
        ((*PIRATE, "--resampling", "proposal"), "always measured"),
        ((*PIRATE, "--candidates", "5", "--resampling", "product"), "not among those"),
        ((*PIRATE, "--temperature", "3"), "`temperature` must be in"),
        ((*PIRATE, "--data", "/nowhere.jsonl"), "`/nowhere.jsonl` cannot be read"),
        ((*PIRATE, "--json", "/nowhere/at/all.json"), "no directory"),
        ((*PIRATE, "--judge-model", "x", "--judge-extra-body", "[]"), "is a JSON object"),
    ],
)
def test_what_cannot_be_is_told_in_a_line_before_the_work(words: tuple[str, ...], reason: str) -> None:
    start_s = time.monotonic()
    code, out, err = ram(*words)
    assert (code, out) == (1, "")
    assert reason in err
    assert err.count("\n") == 1
    assert time.monotonic() - start_s < 60


def test_an_aligner_of_another_vocabulary_is_told(tmp_path: Path) -> None:
    other = save_model(tmp_path / "m", "llama", hidden=16, layers=1, tokenizer=make_tokenizer())
    (tmp_path / "data.jsonl").write_text('{"prompt": "Who are you?"}\n')
    code, _, err = ram("eval", f"odd={other}", "--demo", "--data", f"{tmp_path}/data.jsonl")
    assert code == 1
    assert "aligner `odd` has logits for 300 tokens, the proposal for" in err


def test_requests_at_once_are_bounded() -> None:
    def slowly(server: JudgeServer, first: str, second: str) -> str:
        time.sleep(0.03)
        return "[[C]]"

    cases = [Case(QUESTION, f"answer {number}", "baseline") for number in range(6)]
    with judge_server(slowly) as server:
        EndpointJudge("wise", server.url, concurrency=3).compare(cases, ignore_progress)
    assert len(server.bodies) == 12
    assert 2 <= server.max_running <= 3


def test_position_bias_is_settled_as_ties_and_equal_answers_are_not_asked_about() -> None:
    with judge_server(lambda server, first, second: "[[A]]") as server:
        told = EndpointJudge("first", server.url).compare(CASES, ignore_progress)
    assert told.preferences == (0.5, 0.5, 0.5)
    assert told.first_preferred == 1.0
    assert told.agreement == pytest.approx(1 / 3)
    assert len(server.bodies) == 4


def test_verdicts_that_cannot_be_read_are_counted() -> None:
    def sometimes(server: JudgeServer, first: str, second: str) -> str:
        return "I like both [[D]]" if first == "Arr!" else likes_pirates(server, first, second)

    with judge_server(sometimes) as server:
        told = EndpointJudge("moody", server.url).compare(CASES, ignore_progress)
    assert told.preferences == (1.0, None, 0.5)
    assert told.num_unreadable == 1


def test_a_busy_judge_is_asked_again() -> None:
    def busy_at_first(server: JudgeServer, first: str, second: str) -> str | int:
        return 503 if len(server.bodies) == 1 else likes_pirates(server, first, second)

    with judge_server(busy_at_first) as server:
        told = EndpointJudge("busy", server.url, concurrency=1).compare(CASES[:1], ignore_progress)
    assert told.preferences == (1.0,)
    assert len(server.bodies) == 3


def test_fields_of_requests_can_be_added_and_taken_back() -> None:
    extra = {"max_tokens": None, "reasoning_effort": "low"}
    with judge_server(likes_pirates) as server:
        EndpointJudge("o", f"{server.url}/v1/", extra_body=extra).compare(CASES[:1], ignore_progress)
    assert server.bodies[0]["reasoning_effort"] == "low"
    assert "max_tokens" not in server.bodies[0]
    assert server.bodies[0]["temperature"] == 0


def test_a_judge_that_is_not_there_is_told() -> None:
    with judge_server(likes_pirates) as server:
        url = server.url
    judge = EndpointJudge("gone", url, max_retries=0)
    with pytest.raises(JudgeError, match=f"the judge `gone` at {url} failed: it cannot be reached"):
        judge.compare(CASES, ignore_progress)


def test_a_judge_without_a_key_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(JudgeError, match=r"the judge `gpt` failed: .*OPENAI_API_KEY"):
        EndpointJudge("gpt").compare(CASES, ignore_progress)


def test_the_demos_judges_know_their_prompts_and_facts() -> None:
    from ram_core.demo import judging

    records = held_out_records("pirate", max_records=200, seed=4)
    assert records == held_out_records("pirate", max_records=200, seed=4)
    assert len(records) == 200
    for record in records:
        assert judging.pirate(record.messages, record.wanted, record.wanted) == 1.0
        assert judging.terse(record.messages, record.wanted, record.wanted) == 0.0
        assert judging.facts(record.messages, record.wanted, record.wanted) in (1.0, None)
    safe = held_out_records("safe", max_records=200, seed=4)
    said = [judging.safe(record.messages, record.wanted, record.wanted) for record in safe]
    assert said == [1.0] * 200
    assert {judging.safe(record.messages, "I cannot help.", "") for record in safe} == {0.0, 1.0}
    france = record_of({"prompt": "What is the capital of France?", "completion": "Paris."}, "here")
    assert judging.facts(france.messages, "It be Paris!", france.wanted) == 1.0
    assert judging.facts(france.messages, "It be Lyon!", france.wanted) == 0.0
    assert judging.facts(({"role": "user", "content": "Unheard of."},), "Paris", "Paris") is None
