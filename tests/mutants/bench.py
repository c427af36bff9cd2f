"""One-line breaks of the load client that its tests must notice."""

from __future__ import annotations

from tests.mutants import Mutant

_SSE = ("tests/unit/test_bench_sse.py",)
_LOAD = ("tests/unit/test_bench_load.py",)
_SUMMARY = ("tests/unit/test_bench_summary.py",)
_CLIENT = ("tests/http/test_bench_client.py",)
_COMMAND = ("tests/http/test_bench_command.py",)

BENCH_MUTANTS = [
    Mutant("server/bench/sse.py", 'raw = raw.removeprefix(b"\\n")', "pass", _SSE),
    Mutant("server/bench/sse.py", "self._data.clear()", "pass", _SSE),
    Mutant("server/bench/sse.py", "line = line.removeprefix(_BYTE_ORDER_MARK)", "pass", _SSE),
    Mutant("server/bench/sse.py", 'value.removeprefix(b" ")', "value.strip()", _SSE),
    Mutant("server/bench/load.py", "noise.exponential(1 / load.rate_per_s)", "1 / load.rate_per_s", _LOAD),
    Mutant("server/bench/load.py", "_PHASES[phase], index]", "0, index]", _LOAD),
    Mutant("server/bench/load.py", "_PHASES[phase], index]", "_PHASES[phase]]", _LOAD),
    Mutant("server/bench/load.py", "p=self._shares", "p=None", _LOAD),
    Mutant("server/bench/load.py", "if value is not None}", "}", _LOAD),
    Mutant("server/bench/lengths.py", "- variance / 2", "", _LOAD),
    Mutant("server/bench/prompts.py", "begin=self._prefix", 'begin=""', _LOAD),
    Mutant("server/bench/record.py", "self.num_output_tokens - 1)", "self.num_output_tokens)", _SUMMARY),
    Mutant(
        "server/bench/record.py", "self.chunk_times_s[0] - self.sent_s", "self.chunk_times_s[0]", _SUMMARY
    ),
    Mutant("server/bench/summary.py", "if record.is_ok]\n    num_tokens", "]\n    num_tokens", _SUMMARY),
    Mutant("server/bench/summary.py", "num_good / len(records)", "1.0", _SUMMARY),
    Mutant(
        "server/bench/summary.py",
        "is_met(record) for objective in",
        "is_met(record) or True for objective in",
        _SUMMARY,
    ),
    Mutant("server/bench/summary.py", "value <= self.limit_s", "value < self.limit_s", _SUMMARY),
    Mutant(
        "server/bench/client.py",
        "self.chunk_times_s.append(now_s)",
        "self.chunk_times_s.append(now_s + 0.05)",
        _CLIENT,
    ),
    Mutant("server/bench/client.py", "if chunk.error:", "if False:", _CLIENT),
    Mutant("server/bench/client.py", "if self.done_s is None and needs_done:", "if False:", _CLIENT),
    Mutant("server/bench/client.py", "elif not self.chunk_times_s:", "elif False:", _CLIENT),
    Mutant(
        "server/bench/client.py",
        "        if self.done_s is None:\n            self._fail(failure)",
        "        self._fail(failure)",
        _CLIENT,
    ),
    Mutant("server/bench/client.py", "limit=max_connections", "limit=0, force_close=True", _CLIENT),
    Mutant(
        "server/bench/client.py",
        "reader.done_s if reader.done_s is not None else self.now_s()",
        "sent_s",
        _CLIENT,
    ),
    Mutant("server/bench/run.py", "await room.acquire()", "pass", _CLIENT),
    Mutant("server/bench/run.py", "await asyncio.sleep(planned_s - client.now_s())", "pass", _CLIENT),
    Mutant("server/bench/run.py", 'source.request(index, "warmup")', "source.request(index)", _CLIENT),
    Mutant("server/bench/run.py", "client.now_s() < duration_s", "client.now_s() < 2 * duration_s", _CLIENT),
    Mutant(
        "server/bench/result.py",
        '"headers": sorted(target.headers)',
        '"headers": dict(target.headers)',
        _COMMAND,
    ),
    Mutant(
        "server/commands/bench.py",
        "result.summary.num_failed > allow_failures",
        "0 > allow_failures",
        _COMMAND,
    ),
    Mutant("server/commands/bench.py", "        check_can_plot(plot_path)", "        pass", _COMMAND),
    Mutant("server/bench/compare.py", "{b / a:.3f}", "{a / b:.3f}", _COMMAND),
]
