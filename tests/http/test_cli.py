"""The `ram` command, in a process of its own where that matters."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from ram_core import __version__
from ram_core.engine.messages import FailedEvent, StepTelemetry
from ram_core.errors import NonFiniteLogits
from server.cli import app
from tests.http.standin import PATIENCE_S, chat, say
from tests.models import make_tokenizer, save_pair

ROOT = Path(__file__).parents[2]
RAM = [sys.executable, "-c", "from server.cli import main; main()"]


def ram(*words: str, stdin: str = "") -> tuple[int, str, str]:
    """Exit code, output and errors of the command, run in this process."""
    result = CliRunner().invoke(app, list(words), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), max_position_embeddings=4096)


def test_help_is_quick_to_load():
    heavy = ["torch", "transformers", "fastapi", "pydantic", "openai", "uvicorn"]
    code = (
        "import sys; from server.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_version(words):
    assert ram(*words) == (0, f"ram {__version__}\n", "")


def assert_one_line(result: tuple[int, str, str], reason: str) -> None:
    code, _, errors = result
    assert code == 1
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("ram: ")
    assert reason in last


def test_a_busy_port_is_one_line(pair):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(
            ram("serve", str(pair[0]), "--port", str(port)), f"Port {port} of 127.0.0.1 is in use"
        )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["/nowhere"], "`/nowhere`: no such directory"),
        (["--port", "70000"], "`port`"),
        (["--kv-memory", "lots"], "`kv_memory`"),
        (["--aligner", "polite"], "NAME=PATH"),
        (["--config", "/nowhere.toml"], "does not exist"),
        (["--host", "256.256.256.256"], "Cannot listen"),
    ],
)
def test_what_cannot_be_served_is_one_line(words, reason, monkeypatch):
    monkeypatch.setenv("RAM_CONFIG", "")
    port = [] if "--port" in words else ["--port", "0"]
    proposal = [] if words[0].startswith("/") else ["/tmp"]
    assert_one_line(ram("serve", *proposal, *words, *port), reason)


def test_another_vocabulary_is_one_line(pair, tmp_path):
    proposal, aligners = pair
    other = tmp_path / "other"
    other.mkdir()
    for path in aligners["polite"].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    make_tokenizer(290).save_pretrained(other)
    assert_one_line(ram("serve", str(proposal), "--aligner", f"other={other}", "--port", "0"), "`other`")
    code, output, _ = ram("check", str(proposal), "--aligner", f"other={other}")
    assert code == 1
    assert "cannot be served" in output


def test_check_tells_what_a_pair_needs(pair):
    proposal, aligners = pair
    code, output, _ = ram("check", str(proposal), "--aligner", f"polite={aligners['polite']}")
    assert code == 0
    assert "LlamaForCausalLM" in output
    assert "✓ can be served" in output
    code, output, _ = ram("check", str(proposal), "--aligner", "polite=/nowhere")
    assert code == 1
    assert "no such directory" in output


def serve(*words: str) -> tuple[subprocess.Popen[str], str]:
    """A serving process, ready, and its URL."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*RAM, "serve", *words, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    lines = []
    while line := process.stdout.readline():
        lines.append(line)
        if match := re.search(r"ram chat --url (http://[\d.:]+)", line):
            assert f"Ready at {match[1]}/v1" in "".join(lines)
            return process, match[1]
    raise AssertionError(f"{''.join(lines)}\n{process.stderr.read()}")


def test_a_signal_lets_running_streams_end_and_exits_cleanly(pair):
    proposal, aligners = pair
    process, url = serve(str(proposal), "--aligner", f"polite={aligners['polite']}", "--max-queue", "4")
    body = chat(model="polite", stream=True, ignore_eos=True, max_tokens=30)
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def test_when_the_grace_is_over_streams_are_told_and_the_process_ends(pair):
    process, url = serve(str(pair[0]), "--shutdown-grace-s", "0", "--drain-s", "0.2")
    body = {"prompt": "Hi", "n": 8, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE_S
            while httpx.get(f"{url}/health/ready").status_code != 503 and time.monotonic() < deadline:
                pass
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert rest[-1] == "data: [DONE]"
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


TELEMETRY = StepTelemetry(kl_p_q=0.5, kl_pi_p=0.25, ess=0.75, aligner_mass=0.9, is_fallback=False)


def test_chat_switches_aligners_and_shows_what_they_did(server, engine):
    engine.script = lambda request: say(request, "Hello, dog!", telemetry=TELEMETRY)
    typed = [
        *("Hi", "/aligner polite", "And you?", "/aligners", "/aligner rude", "/nonsense"),
        *("/clear", "/system Be kind.", "Hi", "/quit", "no"),
    ]
    code, output, errors = ram("chat", "--url", server.url, stdin="\n".join(typed))
    assert (code, errors) == (0, "")
    assert output.count("Hello, dog!") == 3
    assert "proposal alone · 9 tokens" in output
    assert "polite × 1 · product · 9 tokens" in output
    assert "KL(p‖q) 0.50 · KL(π‖p) 0.25 · ESS 0.75 · 0 fallbacks" in output
    assert "polite, org/terse" in output
    assert "No such aligner: rude" in output
    assert "No such command: /nonsense" in output
    names = [[term.aligner for term in request.alignment.terms] for request in engine.requests]
    assert names == [[], ["polite@1"], ["polite@1"]]
    lengths = [len(request.prompt_ids) for request in engine.requests]
    assert lengths[1] > lengths[0]


def test_chat_survives_an_error_and_ends_with_its_input(server, engine):
    engine.script = lambda request: [
        FailedEvent(request.request_id, 0, NonFiniteLogits("The model said NaN."))
    ]
    code, output, _ = ram("chat", "--url", server.url, "--aligner", "polite", stdin="Hi\n/help\n")
    assert code == 0
    assert "The model said NaN." in output
    assert "/quit" in output


def test_chat_without_a_server_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert_one_line(ram("chat", "--url", f"http://127.0.0.1:{port}"), "Is `ram serve` running there?")


def test_health_is_answered_while_the_model_is_loaded(pair, monkeypatch):
    from server.commands import serve as command
    from server.settings import load_settings

    is_asked, answers = threading.Event(), []

    def load_slowly(settings):
        is_asked.wait(PATIENCE_S)
        raise NonFiniteLogits("enough")

    monkeypatch.setattr(command, "load", load_slowly)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def look():
        transport = httpx.HTTPTransport(retries=20)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=PATIENCE_S
        ) as client:
            answers.extend(client.get(path).status_code for path in ("/health/live", "/health/ready"))
        is_asked.set()

    looker = threading.Thread(target=look)
    looker.start()
    with pytest.raises(NonFiniteLogits):
        command.run(load_settings(proposal=str(pair[0]), port=port))
    looker.join()
    assert answers == [200, 503]
