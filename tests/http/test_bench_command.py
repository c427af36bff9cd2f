"""`ram bench` as it is typed, against our own server with an engine that says what the test wrote."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ram_core.engine.messages import FailedEvent, StartedEvent
from ram_core.errors import EngineUnavailable
from server.cli import app
from tests.http.standin import LiveServer, say

ROOT = Path(__file__).parents[2]
RUN = (
    "--requests",
    "6",
    "--warmup",
    "2",
    "--concurrency",
    "2",
    "--prompt-tokens",
    "8",
    "--output-tokens",
    "11",
)


def bench(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `ram bench`, run in this process."""
    result = CliRunner().invoke(app, ["bench", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_is_told_and_kept(server: LiveServer, engine, tmp_path):
    path = tmp_path / "run.json"
    code, out, err = bench("--url", server.url, *RUN, "--slo", "e2e=60s", "--json", str(path))
    assert (code, err) == (0, "")
    assert "6 of 6" in out
    assert "TTFT, ms" in out
    assert "100.0%" in out
    result = read_json(path)
    assert result["settings"]["models"] == {"big": 1.0}
    assert result["summary"]["num_ok"] == 6
    assert result["summary"]["tokens_from"] == "usage"
    assert result["summary"]["goodput"]["num_good"] == 6
    assert result["environment"]["python"]
    assert [request["index"] for request in result["requests"]] == list(range(6))
    assert all(request["chunk_times_s"] for request in result["requests"])
    assert len(engine.requests) == 8
    assert {request.sampling.max_tokens for request in engine.requests} == {11}
    assert all(request.sampling.ignore_eos for request in engine.requests)


def test_what_the_server_counted_is_what_is_told(server: LiveServer, engine, tmp_path):
    """Usage of six answers of the same text; the prompt's count is the server's, with its template."""
    path = tmp_path / "run.json"
    bench("--url", server.url, *RUN, "--json", str(path))
    records = read_json(path)["requests"]
    num_tokens = len(say(engine.last, "Hello, dog!"))
    assert {record["output_tokens"] for record in records} == {num_tokens}
    measured = sorted(len(request.prompt_ids) for request in engine.requests[2:])
    assert sorted(record["prompt_tokens"] for record in records) == measured


def test_a_mix_is_broken_down_by_model_and_markdown_is_markdown(server: LiveServer, engine):
    words = ("--model", "big", "--model", "polite=2", "--requests", "20", "--markdown")
    code, out, _ = bench("--url", server.url, *RUN[2:], *words)
    assert code == 0
    assert "**By model, times in ms**" in out
    rows = {line.split(" | ")[0]: line for line in out.splitlines() if line.startswith("| ")}
    assert {"| big", "| polite"} <= rows.keys()
    assert rows["| TTFT, ms"].count("|") == 9
    assert "╇" not in out


def test_an_open_loop_tells_its_rate_and_its_lag(server: LiveServer, engine, tmp_path):
    path = tmp_path / "run.json"
    code, out, _ = bench("--url", server.url, "--rate", "200", *RUN[:4], "--json", str(path))
    assert code == 0
    assert "200.00 asked" in out
    assert "Sent late by" in out
    result = read_json(path)
    assert result["schedule"]["lag_s"]["count"] == 6
    assert result["settings"]["concurrency"] is None


def test_failures_are_shown_and_decide_the_exit_code(server: LiveServer, engine, tmp_path):
    turns = itertools.cycle([say, _say_and_break])

    def script(request):
        return [StartedEvent(request.request_id, 0.0), *next(turns)(request, "Hello")]

    engine.script = script
    path = tmp_path / "run.json"
    words = ("--url", server.url, *RUN, "--json", str(path))
    code, out, _ = bench(*words)
    assert code == 1
    assert "3 of 6" in out
    assert "error event" in out
    summary = read_json(path)["summary"]
    assert sum(summary["failures"].values()) == 3
    assert summary["ttft_s"]["count"] == 3
    assert bench(*words, "--allow-failures", "0.5")[0] == 0
    assert bench(*words, "--allow-failures", "0.49")[0] == 1


def _say_and_break(request, text):
    return [*say(request, text, finish=None), FailedEvent(request.request_id, 0, EngineUnavailable("Gone."))]


def test_a_refusal_from_the_start_is_one_line(server: LiveServer, engine):
    engine.refusal = EngineUnavailable("The engine is gone.")
    code, out, err = bench("--url", server.url, *RUN)
    assert (code, out) == (1, "")
    assert err.startswith("ram: No request of the warm-up succeeded: HTTP 503")
    assert "The engine is gone." in err
    assert err.count("\n") == 1


def test_secrets_are_not_kept(server: LiveServer, engine, tmp_path):
    path = tmp_path / "run.json"
    words = ("--api-key", "k3y-s3cret", "--header", "X-Token: h3ader-s3cret", "--json", str(path))
    assert bench("--url", server.url, *RUN, *words)[0] == 0
    assert "s3cret" not in path.read_text()
    assert read_json(path)["settings"]["headers"] == ["X-Token"]


@pytest.mark.parametrize(("name", "magic"), [("run.png", b"\x89PNG\r\n"), ("run.svg", b"<?xml")])
def test_a_plot_is_of_the_kind_that_its_name_says(server: LiveServer, engine, tmp_path, name, magic):
    path = tmp_path / name
    words = ("--model", "big", "--model", "polite", "--plot", str(path))
    assert bench("--url", server.url, *RUN, *words)[0] == 0
    assert path.read_bytes().startswith(magic)
    assert path.stat().st_size > 10_000


def test_without_matplotlib_the_extra_is_named_before_anything_is_sent(
    server: LiveServer, engine, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = bench("--url", server.url, *RUN, "--plot", str(tmp_path / "run.png"))
    assert code == 1
    assert err == "ram: Plots need matplotlib: pip install 'ram-server[bench]'.\n"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rate", "0"], "`rate` is above 0"),
        (["--concurrency", "0"], "`concurrency` is above 0"),
        (["--requests", "0"], "`requests` is above 0"),
        (["--duration", "-1"], "`duration` is above 0"),
        (["--slo", "p99=5"], "An SLO is one of"),
        (["--prompt-tokens", "zipf:3"], "A length is"),
        (["--model", "a=zero"], "A model is"),
        (["--extra-body", "[1]"], "JSON object"),
        (["--extra-body", "{"], "no JSON"),
        (["--header", "x"], "A header is"),
        (["--allow-failures", "2"], "a share from 0 to 1"),
        (["--plot", "x.pdf"], "ends with .png or .svg"),
        (["--json", "/no/such/directory/x.json"], "no directory"),
        (["--timeout", "0"], "`timeout` is above 0"),
        (["--data", "/no/such/file"], "Cannot read conversations"),
        (["--tokenizer", "/no/such/directory"], "Cannot read a tokenizer"),
        (["--url", "localhost"], "A URL begins with"),
    ],
)
def test_a_bad_flag_gets_one_line_and_nothing_is_sent(server: LiveServer, engine, words, reason):
    code, out, err = bench("--url", server.url, *words)
    assert (code, out) == (1, "")
    assert reason in err
    assert err.count("\n") == 1
    assert engine.requests == []


def test_two_results_side_by_side(server: LiveServer, engine, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    for path, seed in ((first, "0"), (second, "1")):
        assert bench("--url", server.url, *RUN, "--seed", seed, "--json", str(path))[0] == 0
    changed = read_json(second)
    changed["summary"]["ttft_s"]["p50"] = 3 * read_json(first)["summary"]["ttft_s"]["p50"]
    second.write_text(json.dumps(changed))
    code, out, _ = bench("compare", str(first), str(second), "--markdown")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("| TTFT p50"))
    assert row.endswith("| 3.000 |")
    assert "Settings differ: seed is 0, then 1." in out
    assert out.count("Settings differ") == 1


def test_only_results_are_compared(tmp_path):
    (tmp_path / "x.json").write_text('{"format": "other"}')
    code, _, err = bench("compare", str(tmp_path / "x.json"), str(tmp_path / "y.json"))
    assert code == 1
    assert "is no result of `ram bench --json`" in err
    (tmp_path / "x.json").unlink()
    assert "Cannot read" in bench("compare", str(tmp_path / "x.json"), str(tmp_path / "y.json"))[2]


def test_the_client_never_loads_torch(server: LiveServer, engine, tmp_path):
    """In a process of its own: a hundred megabytes and some seconds less beside the server it measures."""
    heavy = ["torch", "transformers", "fastapi", "openai"]
    code = (
        "import sys; from server.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {heavy} if name in sys.modules])"
    )
    words = ["bench", "--url", server.url, *RUN]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OPENAI_API_KEY": "k3y"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""
