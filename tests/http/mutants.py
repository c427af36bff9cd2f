"""One-line breaks of the server that its tests must notice: (file, old, new, tests that notice)."""

from __future__ import annotations

_STREAMS = ("tests/http/test_streams.py",)
_ANSWERS = ("tests/http/test_answers.py",)
_BAD_INPUT = ("tests/http/test_bad_input.py",)
_HANG_UP = ("tests/http/test_hang_up.py",)
_ERRORS = ("tests/http/test_errors.py",)
_PREFIXES = ("tests/http/test_live_engine.py::test_tenants_share_prefixes_only_if_they_are_told_to",)
_LINE = ("tests/unit/test_stream_line.py",)
_GENERATION = ("tests/unit/test_generation.py",)
_METRICS = ("tests/http/test_models_health_metrics.py",)
_CONVERT = ("tests/unit/test_server_convert.py",)
_WIRE = ("tests/faults/test_bad_wire.py",)
_SETTINGS = ("tests/unit/test_server_settings.py",)

SERVER_MUTANTS: list[tuple[str, str, str, tuple[str, ...]]] = [
    (
        "server/streaming.py",
        "            await self._generation.__aexit__()",
        "            pass",
        _HANG_UP,
    ),
    ("server/streaming.py", "        working.cancel()\n", "", _HANG_UP),
    ("server/streaming.py", "            first.result()\n", "            pass\n", _STREAMS),
    ("server/streaming.py", "            last = error_event(error)\n", "            last = b''\n", _STREAMS),
    ("server/streaming.py", 'if self._wants_usage else b""', "", _STREAMS),
    ("server/streaming.py", "timeout=settings.ping_s)", "timeout=None)", _STREAMS),
    ("server/streaming.py", ", line.watch())", ")", _HANG_UP),
    ("server/streaming.py", "        self._is_sending = False\n\n\nasync", "\n\nasync", _LINE),
    (
        "server/streaming.py",
        "self._since_s = self._now_s()\n        self._is_sending = True",
        "self._is_sending = True",
        _LINE,
    ),
    ("server/streaming.py", "sleep(min(left_s, self._send_timeout_s))", "sleep(left_s)", _LINE),
    ("server/streaming.py", "        if self._pinging is not None:", "        if False:", _LINE),
    ("server/streaming.py", "            elif self._is_sending:", "            elif False:", _LINE),
    (
        "server/connections.py",
        "            before[-1].keep_alive = False\n            return\n",
        "            pass\n",
        _WIRE,
    ),
    ("server/connections.py", "            before[-1].keep_alive = False\n", "", _WIRE),
    ("server/connections.py", "        if self._before():", "        if False:", _WIRE),
    ("server/connections.py", "elif self._has_begun and self._timer is None:", "elif False:", _WIRE),
    ("server/connections.py", "        if not self._has_begun:", "        if False:", _WIRE),
    ("server/connections.py", "else self._num_idle_bytes + len(data)", "else 0", _WIRE),
    ("server/commands/serve.py", "            connection.transport.abort()", "            pass", _HANG_UP),
    ("server/generation.py", "                if deltas:\n                    break\n", "", _GENERATION),
    ("server/generation.py", "self._arrived = arrived[::-1]", "self._arrived = arrived", _GENERATION),
    ("server/streaming.py", "if not isinstance(error, RamError):", "if False:", _STREAMS),
    ("server/generation.py", "self._streams[self._source].cancel(event.index)", "pass", _STREAMS),
    (
        "server/generation.py",
        "            if event.finish_reason is None:\n                # A stop",
        "            if False:\n                # A stop",
        _STREAMS,
    ),
    ("server/generation.py", 'if event.finish_reason != "stop":', "if True:", _ANSWERS),
    ("server/generation.py", "first * request.num_choices + index", "index", _STREAMS),
    ("server/generation.py", "text += self._detokenizer.flush()", "pass", _STREAMS),
    ("server/generation.py", "if math.isfinite(value):", "if True:", _ANSWERS),
    ("server/generation.py", "raise self._failed(event.error)", "continue", _STREAMS),
    (
        "server/generation.py",
        'self._outcome = "error"\n                raise self._failed(event',
        "raise self._failed(event",
        _METRICS,
    ),
    ("server/openai/render.py", "if math.isfinite(log_prob) else NOT_FINITE_LOG_PROB", "", _STREAMS),
    ("server/openai/render.py", "if delta.is_first:", "if True:", _STREAMS),
    ("server/openai/render.py", "table.setdefault(", "table.pop(", _ANSWERS),
    ("server/openai/body.py", "if len(raw) > max_bytes:", "if False:", _BAD_INPUT),
    ("server/openai/body.py", "int(announced) > max_bytes", "False", _BAD_INPUT),
    ("server/openai/body.py", "object_pairs_hook=_key_checker(),", "", _BAD_INPUT),
    ("server/openai/body.py", "parse_constant=_refuse_constant,", "", _BAD_INPUT),
    ("server/openai/body.py", "parse_float=_finite_float,", "", _BAD_INPUT),
    ("server/openai/body.py", 'if b"\\\\u" in raw:', "if False:", _BAD_INPUT),
    ("server/openai/body.py", "return len(path), not", "return 0, not", _BAD_INPUT),
    ("server/openai/fields.py", "not isinstance(value, bool) and", "", _BAD_INPUT),
    (
        "server/openai/fields.py",
        "is_neutral is None or not is_neutral(value)",
        "is_neutral is None",
        _BAD_INPUT,
    ),
    (
        "server/openai/schema.py",
        'ConfigDict(strict=True, extra="allow"',
        'ConfigDict(extra="allow"',
        _BAD_INPUT,
    ),
    (
        "server/openai/convert.py",
        "AskedAligner(name, strength * scale)",
        "AskedAligner(name, strength)",
        _CONVERT,
    ),
    ("server/openai/convert.py", '"kl_threshold": "kl_threshold",', "", _CONVERT),
    ("server/openai/convert.py", "0 if request.top_k == -1 else request.top_k", "request.top_k", _BAD_INPUT),
    ("server/openai/convert.py", "if model == names.proposal:", "if False:", _ANSWERS),
    ("server/openai/convert.py", "return names.default_aligner or IDENTITY", "return IDENTITY", _ERRORS),
    ("server/openai/errors.py", "math.ceil(error.retry_after_s))", "int(error.retry_after_s))", _ERRORS),
    ("server/openai/errors.py", "param=param, headers=headers)", "param=param)", _ERRORS),
    ("server/middleware.py", "if _SANE_ID.fullmatch(given)", "if given", _ERRORS),
    ("server/metrics.py", "            metric.labels(*labels)\n", "            pass\n", _METRICS),
    ("server/metrics.py", "[bisect_left(self._bounds, value)]", "[0]", _METRICS),
    ("server/metrics.py", "        self._tell()\n        self._metrics", "        self._metrics", _METRICS),
    ("server/generation.py", "num_cached_tokens += event", "num_cached_tokens = event", _ANSWERS),
    ("server/routes/shared.py", "            cache_salt=ask.cache_salt,\n", "", _ANSWERS),
    ("server/routes/shared.py", "            prefix_group=caller.tenant.prefix_group,\n", "", _PREFIXES),
    ("server/openai/render.py", "if self._is_plain and not is_over:", "if self._is_plain:", _STREAMS),
    ("server/openai/render.py", "to_json(text), frame[1]", "text.encode(), frame[1]", _STREAMS),
    ("server/metrics.py", "if not math.isnan(value):", "if True:", _METRICS),
    ("server/metrics.py", "len(self._field_names) >= MAX_FIELD_NAMES or", "", _BAD_INPUT),
    ("server/metrics.py", 'labels["reason"] != "error"', "True", _METRICS),
    ("server/serving.py", "if silent_s > self.settings.stall_s:", "if False:", _METRICS),
    (
        "server/serving.py",
        "self._loaded.engine.trouble or self.why_not_alive()",
        "self.why_not_alive()",
        _METRICS,
    ),
    ("server/serving.py", " or self._loaded.engine.trouble is not None:", ":", _METRICS),
    ("server/routes/health.py", "serving_of(request).why_not_alive()", "None", _METRICS),
    (
        "server/routes/shared.py",
        "return lease.aligners[0].name, lease.aligners[0].version",
        'return SEVERAL, ""',
        _METRICS,
    ),
    ("server/settings.py", "base = 1024 if binary else 1000", "base = 1024", _SETTINGS),
    ("server/settings.py", "for path in inside} | self.aligners", "for path in inside}", _SETTINGS),
]
