"""Breaks of what keeps tenants apart, and within their limits."""

from __future__ import annotations

from tests.mutants import mutants

_TENANTS = "tests/unit/test_tenants.py"
_LIMITS = "tests/unit/test_rate_limits.py"
_HTTP = "tests/http/test_tenants_over_http.py"
_RUNNING = "tests/http/test_tenants_from_start_to_end.py"

TENANT_MUTANTS = [
    *mutants(
        "server/tenants/keys.py",
        _TENANTS,
        ("hmac.compare_digest(_digest(key, self.salt), self.digest)", "True"),
        ("salt = secrets.token_bytes(_SALT_BYTES)", "salt = bytes(_SALT_BYTES)"),
    ),
    *mutants(
        "server/tenants/book.py",
        _TENANTS,
        ("now_s >= entry.expires_s", "now_s > entry.expires_s"),
        ("setdefault(key.id, entry) is not entry", "setdefault(key.id, entry) is None"),
    ),
    *mutants(
        "server/tenants/access.py",
        _TENANTS,
        ("if path in _OPEN_PATHS:", "if path.startswith(tuple(_OPEN_PATHS)):"),
        ("if len(given) != 1:", "if not given:"),
        ("(mapped or address)", "address"),
    ),
    *mutants(
        "server/tenants/tenants.py",
        _TENANTS,
        ("ledger.configure(tenant.limits, self._num_places)", "pass"),
        ("ledger = before.get(tenant.name)", "ledger = None"),
    ),
    *mutants(
        "server/tenants/editing.py",
        _TENANTS,
        ("valid[-1:] if keep_s else []", "valid[-1:]"),
        ("fcntl.flock(folder, fcntl.LOCK_EX)", "pass"),
        ("    path = path.resolve()\n", ""),
        ("            _check(path, text)\n", ""),
    ),
    *mutants(
        "server/tenants/usage.py",
        _TENANTS,
        (r'b"\n" * self._is_torn + msgspec', "msgspec"),
        ("size - 1) != ", "size - 1) == "),
        ("self._clock() - self._warned_s >= _WARN_EVERY_S", "True"),
    ),
    *mutants(
        "server/openai/convert.py",
        _TENANTS,
        ("if is_identity and not names.has_proposal:", "if False:"),
        ("asked.scale and asked.strength != 0 for asked", "True for asked"),
        ("tenant.models, tenant.default_aligner)", 'tenant.models, "")'),
        ("value > limit:", "value >= limit:"),
    ),
    *mutants(
        "server/tenants/limits.py",
        _LIMITS,
        ("passed_s = max(0.0, now_s - self._at_s)", "passed_s = now_s - self._at_s"),
        ("missing > _ROUNDING", "missing > 0"),
        ("        self._is_open = False\n", ""),
        ("self._close(0, self._num_tokens - used_tokens)", "self._close(1, self._num_tokens - used_tokens)"),
        ("self._close(1, self._num_tokens)", "self._close(0, self._num_tokens)"),
        ("self._num_requests >= limit", "self._num_requests > limit"),
        ("self._num_sequences + num_sequences > self", "self._num_sequences > self"),
        ("        self._level += per_minute - self._per_minute\n", ""),
        ("min(num_tokens, bucket.per_minute)", "num_tokens"),
    ),
    *mutants(
        "server/middleware.py",
        _HTTP,
        ("return None if caller is not None else no_key(key is not None)", "return None"),
        ('self._metrics_access == "loopback" and client', "client"),
        ("MutableHeaders(scope=message).update(ledger.headers())", "pass"),
    ),
    *mutants(
        "server/routes/shared.py",
        _HTTP,
        ("            tenant=caller.tenant.name,\n", ""),
        ("            priority=caller.tenant.priority,\n", ""),
        ("            reservation.cancel()", "            pass"),
        ("names_for(caller_of(request).tenant, serving_of(request).names)", "serving_of(request).names"),
    ),
    *mutants(
        "server/accounting.py",
        _HTTP,
        (" + generation.num_completion_tokens)", ")"),
        ("return HUNG_UP if", "return 200 if"),
        ('self.caller.tenant.log != "none"', "True"),
    ),
    *mutants(
        "server/generation.py",
        _RUNNING,
        ('else "stop"\n                self._tell_end()', 'else "stop"'),
        ("self.failure = error\n        self._tell_end()", "self.failure = error"),
    ),
    *mutants(
        "server/commands/serve.py",
        _RUNNING,
        ("not settings.allow_anonymous and not", "not"),
        ("add_signal_handler(signal.SIGHUP, serving.reload)", "add_signal_handler(signal.SIGHUP, int)"),
    ),
    *mutants("server/app.py", _RUNNING, ("serving.tenants.watch()", "asyncio.sleep(0)")),
]
