"""Breaks of what an admin may do, and of what keeps everybody else from it."""

from __future__ import annotations

from tests.mutants import mutants

_ACCESS = "tests/unit/test_admin_access.py"
_DOOR = "tests/http/test_admin_door.py"
_API = "tests/http/test_admin_api.py"
_REFUSALS = "tests/http/test_admin_refusals.py"
_CLI = "tests/http/test_aligner_remote_cli.py"

ADMIN_MUTANTS = [
    *mutants(
        "server/tenants/access.py",
        _ACCESS,
        ('if path.startswith("/metrics"):', 'if path == "/metrics":'),
        ("path.startswith(_ADMIN_PATHS)", "path in _ADMIN_PATHS"),
        ("return need is not Need.TENANT", "return True"),
        ("return need is not Need.ADMIN", "return True"),
        ("if path.startswith(_LORA_PATHS) and not self.has_lora_api:", "if False:"),
        ("if client is None or not is_loopback(client):", "if client is None:"),
        ('if name != "localhost" and not is_loopback(name):', "if False:"),
        ("return origin is None or", "return True or"),
    ),
    *mutants(
        "server/middleware.py",
        _DOOR,
        ("is_let_in = self._tenants.is_admin(key)", "is_let_in = True"),
        ("return None if _is_from_here(scope) else not_from_afar()", "return None"),
        ("if not self._doors.leads_to(path, _port(scope)):", "if False:"),
    ),
    *mutants(
        "server/commands/serve.py",
        _DOOR,
        ("serving.doors.admin_port = listeners[1]", "_ = listeners[1]"),
        ("        _check_admin_port(settings, listener, admin_listener)\n", ""),
        ("    if port == listener.getsockname()[1]:", "    if False:"),
    ),
    *mutants("server/routes/aligners.py", _DOOR, ("if not request.state.is_admin:", "if False:")),
    *mutants(
        "server/routes/aligners.py",
        _API,
        ("asyncio.timeout(wait_s)", "asyncio.timeout(60)"),
        ("raise Conflict(str(error)) from None", "return True"),
        ("status_code=201 if is_done else 202", "status_code=201"),
        ("service.load(key.name, key.version, is_pinned=body.pin)", "service.load(key.name, key.version)"),
        ("kl_threshold=body.gate", "kl_threshold=body.kl_threshold"),
        ("is_pinned=body.pinned,", ""),
    ),
    *mutants("server/routes/aligner_views.py", _API, ("time.time() - idle_s", "status.last_used_s")),
    *mutants(
        "server/routes/lora.py",
        _API,
        ("service.promote(key.name, key.version)", "service.load(key.name, key.version)"),
    ),
    *mutants("server/openai/admin_schema.py", _REFUSALS, ('extra="forbid"', 'extra="ignore"')),
    *mutants(
        "server/aligners/known.py",
        _REFUSALS,
        ("directory = resolve_below(root, path)", "directory = root / path"),
        (" and directory.resolve().is_relative_to(root.resolve())", ""),
        ("if files.keys().isdisjoint(CONFIG_FILES):", "if False:"),
        ("directory = fetch_from_hub(hub_id)", "directory = resolve_source(hub_id, with_weights=True)"),
    ),
    *mutants(
        "server/aligners/service.py",
        _API,
        ("        if is_waiting:", "        if True:"),
        ("        if is_waiting:", "        if False:"),
    ),
    *mutants(
        "server/aligners/service.py",
        _REFUSALS,
        ("before.directory.resolve() != known.directory.resolve()", "False"),
    ),
    *mutants(
        "server/commands/aligner_remote.py",
        _CLI,
        ("typer.Exit(0 if is_done else NOT_YET)", "typer.Exit(0)"),
        ("float(weight or 1)", "1.0"),
    ),
    *mutants(
        "server/figures.py",
        _CLI,
        ("(*labels, outcome)) for outcome in OUTCOMES", '(*labels, "stop")) for _ in (0,)'),
        ("float(child._sum.get()) / count", "float(child._sum.get())"),
    ),
    *mutants("server/commands/admin_client.py", _CLI, ("if _is_seal(key):", "if False:")),
]
