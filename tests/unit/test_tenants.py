"""Who may call: keys, the tenants' file, what edits it, and what is written about use."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from ram_core.errors import InvalidRequest, UnknownModel
from server.cli import app
from server.openai.body import validate
from server.openai.convert import ModelNames, names_for, to_ask
from server.openai.schema import ChatRequest, CompletionRequest
from server.settings import Settings, SettingsError
from server.tenants import usage
from server.tenants.access import Need, bearer_key, is_loopback, need_of
from server.tenants.book import TenantBook, TenantsError, parse_tenants, read_tenants
from server.tenants.editing import add_tenant, remove_tenant, rotate_key
from server.tenants.keys import Seal, id_of, new_key
from server.tenants.policy import Limits, Tenant
from server.tenants.tenants import Tenants
from server.tenants.usage import UsageLog, UsageLogError, UsageRecord, timestamp

NAMES = ModelNames("big", ("polite", "acme-a", "acme-b"), "polite")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tenants.toml"


def find(path, key, now_s=0.0):
    found = TenantBook(read_tenants(path)).find(key.encode(), now_s)
    return found and found[0].name


# Keys.


def test_a_seal_fits_its_key_alone_and_tells_nothing_of_it():
    key, key_id = new_key()
    seal = Seal.of(key.encode())
    assert seal.fits(key.encode())
    assert not seal.fits(key.encode() + b"x")
    assert not seal.fits("schlüssel".encode())
    assert Seal.of(key.encode()) != seal
    assert Seal.parse(str(seal)) == seal
    assert key.split("-", 2)[2] not in str(seal)
    assert id_of(key.encode()) == key_id


@pytest.mark.parametrize("key", [b"", b"ram", b"ram-", b"sk-012345678901-x", b"ram-01-x", b"ram-\xff" * 9])
def test_what_is_no_key_of_ours_has_no_id(key):
    assert id_of(key) == ""


@pytest.mark.parametrize("text", ["", "blake2b:00:11", "md5:" + "00" * 16 + ":" + "11" * 32, "blake2b:zz:yy"])
def test_what_is_no_seal_is_refused(text):
    with pytest.raises(ValueError, match="not a sealed key"):
        Seal.parse(text)


def test_a_key_of_the_settings_may_be_given_sealed():
    assert Seal.of_setting("s3cret").fits(b"s3cret")
    assert Seal.of_setting(str(Seal.of(b"s3cret"))).fits(b"s3cret")


# The door.


@pytest.mark.parametrize(
    ("path", "need"),
    [
        ("/health", Need.NOTHING),
        ("/health/live", Need.NOTHING),
        ("/version", Need.NOTHING),
        ("/metrics", Need.METRICS),
        ("/v1/models", Need.TENANT),
        ("/", Need.TENANT),
        ("/docs", Need.TENANT),
        ("/anything/new", Need.TENANT),
        ("/health/", Need.TENANT),
        ("/health/../v1/models", Need.TENANT),
        ("//health", Need.TENANT),
        ("/HEALTH", Need.TENANT),
        ("/version;/v1/models", Need.TENANT),
    ],
)
def test_what_is_not_open_by_its_exact_name_needs_a_key(path, need):
    assert need_of(path) is need


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"authorization", b"Bearer abc")], b"abc"),
        ([(b"authorization", b"bearer  abc ")], b"abc"),
        ([(b"authorization", "Bearer schlüssel".encode())], "schlüssel".encode()),
        ([(b"authorization", b"Basic abc")], None),
        ([(b"authorization", b"abc")], None),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"x-api-key", b"abc")], None),
        ([(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")], None),
    ],
)
def test_the_key_is_a_bearers(headers, key):
    assert bearer_key(headers) == key


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("testclient", False),
    ],
)
def test_loopback_is_this_machine_alone(host, is_own):
    assert is_loopback(host) is is_own


# The file.


def test_a_tenants_table_is_read_with_its_defaults():
    tenants = parse_tenants(
        '[tenants.acme]\naligners = "acme-*"\nmodels = []\npriority = -1\nlog = "full"\n'
        "[tenants.acme.limits]\nrequests_per_minute = 5\nqueue_share = 0.5\n[tenants.other]\n"
    )
    acme, other = tenants
    assert acme.aligners == ("acme-*",)
    assert acme.models == ()
    assert (acme.priority, acme.log) == (-1, "full")
    assert acme.limits == Limits(requests_per_minute=5, queue_share=0.5)
    assert other == Tenant(name="other")
    assert (other.log, other.aligners, other.models) == ("usage", ("*",), ("*",))


HASH = f"blake2b:{'00' * 16}:{'11' * 32}"
A_KEY = f'{{id = "0123456789ab", hash = "{HASH}"}}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tenants = ", "not valid TOML"),
        ("tenants = 5", "must be a table"),
        ("[tenant.acme]", "`tenant` is not a known field"),
        ("[tenants]\nacme = 5", "`tenants.acme`"),
        ("[tenants.acme]\nname = 'x'", "without a `name`"),
        ("[tenants.'a b']", "`tenants.a b.name`: a tenant's name"),
        ("[tenants.acme]\nlimit = 5", "`tenants.acme.limit`"),
        ("[tenants.acme]\nlog = 'all'", "`tenants.acme.log`"),
        ("[tenants.acme]\naligners = 5", "`tenants.acme.aligners`"),
        ("[tenants.acme.limits]\nmax_n = 0", "`tenants.acme.limits.max_n`"),
        ("[tenants.acme.limits]\nmax_n = true", "`tenants.acme.limits.max_n`"),
        ("[tenants.acme.limits]\nqueue_share = 1.5", "`tenants.acme.limits.queue_share`"),
        ("[tenants.acme]\nkeys = [{id = '0123456789ab', hash = 'abc'}]", "`tenants.acme.keys[0].hash`"),
        (f"[tenants.acme]\nkeys = [{{id = 'x', hash = '{HASH}'}}]", "`tenants.acme.keys[0].id`"),
        (f"[tenants.acme]\nkeys = [{A_KEY}, {A_KEY}, {A_KEY}]", "`tenants.acme.keys`"),
        (
            f"[tenants.acme]\nkeys = [{A_KEY.removesuffix('}')}, expires = 2030-01-01T00:00:00}}]",
            "needs its zone",
        ),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line_with_its_place(text, reason):
    with pytest.raises(TenantsError) as error:
        parse_tenants(text)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_two_keys_of_one_id_are_refused():
    with pytest.raises(TenantsError, match="id `0123456789ab`"):
        TenantBook(parse_tenants(f"[tenants.a]\nkeys = [{A_KEY}]\n[tenants.b]\nkeys = [{A_KEY}]"))


def test_the_environments_key_is_that_of_the_tenant_default():
    book = TenantBook((Tenant(name="acme"),), Seal.of(b"s3cret"))
    assert book.find(b"s3cret", 0.0)[0].name == "default"
    assert book.find(b"s3cre", 0.0) is None
    with pytest.raises(TenantsError, match="`default`"):
        TenantBook((Tenant(name="default"),), Seal.of(b"s3cret"))


def test_nobody_comes_in_where_there_are_no_keys():
    assert TenantBook().find(b"", 0.0) is None
    assert TenantBook().find(b"ram-0123456789ab-x", 0.0) is None


# Changes to the file.


def test_a_key_is_shown_once_and_only_its_seal_is_kept(file):
    key = add_tenant(file, "acme")
    assert find(file, key) == "acme"
    assert key.split("-", 2)[2] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(TenantsError, match="rotate"):
        add_tenant(file, "acme")
    with pytest.raises(TenantsError, match="a tenant's name"):
        add_tenant(file, "a b")


def test_changes_keep_comments_and_everything_else(file):
    key = add_tenant(file, "acme")
    more = "# Few.\n[tenants.acme.limits]\nmax_n = 2  # why\n\n[tenants.b]\nlog = 'none'\n"
    text = f"# Ours.\n{file.read_text()}{more}"
    file.write_text(text)
    add_tenant(file, "c")
    assert file.read_text().startswith(text)
    new = rotate_key(file, "acme", keep_s=60)
    for line in ("# Ours.", "# Few.", "max_n = 2  # why", "log = 'none'"):
        assert line in file.read_text()
    assert find(file, key) == find(file, new) == "acme"
    remove_tenant(file, "acme")
    assert [tenant.name for tenant in read_tenants(file)] == ["b", "c"]
    assert "# Ours." in file.read_text()


@pytest.mark.parametrize("keys", [f"keys = [\n  # old\n  {A_KEY}, # laptop\n]", f"keys = [{A_KEY}]", None])
def test_a_key_is_added_however_the_others_are_written(file, keys):
    tables = f'[[tenants.acme.keys]]\nid = "0123456789ab"\nhash = "{HASH}"\n[tenants.acme.limits]\nmax_n = 1'
    file.write_text(f"[tenants.acme]\n{keys or tables}\n")
    new = rotate_key(file, "acme", keep_s=60)
    assert [key.id for key in read_tenants(file)[0].keys] == ["0123456789ab", id_of(new.encode())]
    assert ("# laptop" in file.read_text()) == ("# laptop" in (keys or ""))


def test_two_keys_are_valid_at_once_and_no_third(file):
    now = datetime(2030, 1, 1, tzinfo=UTC)
    first = add_tenant(file, "acme")
    second = rotate_key(file, "acme", keep_s=60, now=now)
    assert [find(file, key, now.timestamp() + 59) for key in (first, second)] == ["acme"] * 2
    assert [find(file, key, now.timestamp() + 60) for key in (first, second)] == [None, "acme"]
    third = rotate_key(file, "acme", keep_s=3600, now=now)
    assert [find(file, key, now.timestamp()) for key in (first, second, third)] == [None, "acme", "acme"]
    fourth = rotate_key(file, "acme", keep_s=0, now=now)
    assert [find(file, key, now.timestamp()) for key in (second, third, fourth)] == [None, None, "acme"]


def test_a_file_that_cannot_be_used_is_left_as_it_is(file):
    file.write_text("[tenants.acme]\nlimit = 5\n")
    for change in (add_tenant, remove_tenant, lambda *words: rotate_key(*words, keep_s=0)):
        with pytest.raises(TenantsError, match=r"`tenants\.acme\.limit`"):
            change(file, "b")
    assert file.read_text() == "[tenants.acme]\nlimit = 5\n"
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(TenantsError, match="No such file"):
        remove_tenant(file.parent / "none.toml", "acme")


def test_a_link_stays_a_link(file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "real.toml"
    target.write_text("")
    file.symlink_to(target)
    key = add_tenant(file, "acme")
    assert file.is_symlink()
    assert find(target, key) == "acme"


def test_editors_wait_for_each_other(file):
    threads = [threading.Thread(target=add_tenant, args=(file, f"t{number}")) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tenant.name for tenant in read_tenants(file)) == [f"t{number}" for number in range(8)]


def test_the_command_does_all_of_it(file):
    def ram(*words):
        place = [] if "admin-key" in words else ["--file", str(file)]
        result = CliRunner().invoke(app, ["tenant", *words, *place])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.stdout, result.stderr

    code, key, _ = ram("add", "acme")
    assert (code, find(file, key.strip())) == (0, "acme")
    code, new, _ = ram("rotate", "acme", "--keep-hours", "0")
    assert (find(file, key.strip()), find(file, new.strip())) == (None, "acme")
    assert ram("list")[1] == f"acme  {id_of(new.strip().encode())}\n"
    assert ram("remove", "acme") == (0, "", "")
    code, _, errors = ram("remove", "acme")
    assert (code, errors.count("\n")) == (1, 1)
    assert "there is no tenant `acme`" in errors
    key, setting = ram("admin-key")[1].splitlines()
    assert Seal.of_setting(setting.removeprefix("RAM_ADMIN_KEY=")).fits(key.encode())


# A running server's tenants.


def test_without_keys_anybody_may_call():
    tenants = Tenants(Settings())
    assert tenants.is_open
    assert tenants.find(None).tenant.name == ""
    assert tenants.find(b"whatever").is_anybody
    assert Tenants(Settings(api_key=SecretStr(""))).is_open


def test_with_a_key_or_a_file_nobody_else_may(file):
    tenants = Tenants(Settings(api_key="s3cret", admin_key="4dmin"))
    assert tenants.find(b"s3cret").tenant.name == "default"
    assert tenants.find(b"4dmin") is tenants.find(None) is None
    assert tenants.is_admin(b"4dmin")
    assert not tenants.is_admin(b"s3cret")
    assert not tenants.is_admin(None)
    assert not Tenants(Settings(api_key="s3cret")).is_admin(b"")
    file.write_text("")
    assert Tenants(Settings(tenants_file=file)).find(b"") is None


def test_a_secret_is_not_shown_by_the_settings():
    assert "s3cret" not in repr(Settings(api_key="s3cret", admin_key="s3cret"))


@pytest.mark.parametrize("text", ["[tenants.acme]\nlimit = 1", "["])
def test_a_file_that_is_wrong_at_the_start_is_one_line(file, text):
    file.write_text(text)
    with pytest.raises(SettingsError) as error:
        Tenants(Settings(tenants_file=file))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sealed_key_that_is_none_is_one_line():
    with pytest.raises(SettingsError, match="`admin_key`: not a sealed key"):
        Tenants(Settings(admin_key="blake2b:00:11"))


def test_a_file_that_has_become_wrong_changes_nothing(file, caplog):
    key = add_tenant(file, "acme").encode()
    tenants = Tenants(Settings(tenants_file=file))
    file.write_text("[tenants.acme]\nlimit = 5\n[tenants.b]\n")
    with caplog.at_level(logging.ERROR):
        tenants.reload()
    assert tenants.find(key).tenant.name == "acme"
    (record,) = caplog.records
    assert "`tenants.acme.limit`" in record.getMessage()
    file.unlink()
    tenants.reload()
    assert tenants.find(key).tenant.name == "acme"


def test_who_stays_keeps_what_it_has_used_and_who_goes_is_gone(file):
    key, other = add_tenant(file, "acme").encode(), add_tenant(file, "b").encode()
    text = file.read_text()
    file.write_text(f"{text}[tenants.acme.limits]\nrequests_per_minute = 10\n")
    tenants = Tenants(Settings(tenants_file=file), clock=lambda: 0.0)
    ledger = tenants.find(key).ledger
    ledger.requests.take(4)
    assert ledger.headers()["x-ratelimit-remaining-requests"] == "6"
    remove_tenant(file, "b")
    file.write_text(file.read_text().replace("= 10", "= 20"))
    tenants.reload()
    assert tenants.find(key).ledger is ledger
    assert ledger.headers()["x-ratelimit-remaining-requests"] == "16"
    assert tenants.find(other) is None


# What a tenant may name.


def chat(**fields):
    return validate(ChatRequest, {"messages": [{"role": "user", "content": "Hi"}], **fields})


def test_a_tenant_sees_what_fits_its_patterns():
    names = names_for(Tenant(name="acme", aligners=["acme-*"], models=[]), NAMES)
    assert (names.aligners, names.default_aligner, names.has_proposal) == (("acme-a", "acme-b"), "", False)
    own = names_for(Tenant(name="b"), NAMES)
    assert (own.aligners, own.default_aligner, own.has_proposal) == (NAMES.aligners, "polite", True)


@pytest.mark.parametrize(
    ("fields", "aligner"),
    [
        ({}, "acme-b"),
        ({"model": "acme-a"}, "acme-a"),
        ({"model": "big"}, None),
        ({"model": "big", "alignment": {"aligner": "acme-a"}}, "acme-a"),
        ({"alignment": {"aligner": "identity"}}, None),
    ],
)
def test_the_tenants_default_comes_after_the_requests_words(fields, aligner):
    names = names_for(Tenant(name="acme", default_aligner="acme-b"), NAMES)
    asked = to_ask(chat(**fields), names).aligners
    assert [each.name for each in asked] == ([aligner] if aligner else [])


def test_the_tenants_default_comes_before_the_servers():
    assert names_for(Tenant(name="acme"), NAMES).default_aligner == "polite"
    assert names_for(Tenant(name="acme", default_aligner="acme-a"), NAMES).default_aligner == "acme-a"
    assert names_for(Tenant(name="acme", aligners=["acme-*"]), NAMES).default_aligner == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "big"},
        {},
        {"alignment": {"aligner": "identity"}},
        {"model": "acme-a", "alignment": {"strength": 0}},
        {"model": "acme-a", "alignment": {"resampling": "proposal"}},
    ],
)
def test_a_tenant_without_the_proposal_cannot_have_it_alone(fields):
    names = names_for(Tenant(name="acme", aligners=["acme-*"], models=[]), NAMES)
    assert to_ask(chat(model="acme-a"), names).model == "acme-a"
    with pytest.raises(UnknownModel):
        to_ask(chat(**fields), names)


LIMITS = Limits(max_tokens=8, max_n=2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 9}, "max_tokens"),
        ({"max_completion_tokens": 9}, "max_completion_tokens"),
        ({"n": 3}, "n"),
    ],
)
def test_what_is_over_a_limit_is_named(fields, param):
    with pytest.raises(InvalidRequest) as refused:
        to_ask(chat(**fields), NAMES, LIMITS)
    assert refused.value.param == param


def test_what_is_not_asked_for_is_within_the_limits():
    assert to_ask(chat(), NAMES, LIMITS).sampling.max_tokens == 8
    assert to_ask(chat(max_tokens=8, n=2), NAMES, LIMITS).num_choices == 2
    assert to_ask(validate(CompletionRequest, {"prompt": "a"}), NAMES, LIMITS).sampling.max_tokens == 8


# The usage log.

RECORD = UsageRecord(
    timestamp(0.5), "acme", "0123456789ab", "cmpl-1", "polite", "polite", 3, 1, 5, "stop", 200, 0.25
)


def test_a_record_is_a_line(tmp_path):
    path = tmp_path / "usage.jsonl"
    log = UsageLog(path, pytest.fail)
    log.write(RECORD)
    log.write(RECORD)
    first, second = path.read_text().splitlines()
    assert json.loads(first) == json.loads(second)
    assert json.loads(first)["time"] == "1970-01-01T00:00:00.500Z"
    assert json.loads(first)["completion_tokens"] == 5
    assert "answers" not in json.loads(first)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    log.close()


def test_reopening_follows_a_rotation(tmp_path):
    path, old = tmp_path / "usage.jsonl", tmp_path / "usage.jsonl.1"
    log = UsageLog(path, pytest.fail)
    log.write(RECORD)
    path.rename(old)
    log.write(RECORD)
    log.reopen()
    log.write(RECORD)
    assert [len(file.read_text().splitlines()) for file in (old, path)] == [2, 1]
    path.unlink()
    path.mkdir()
    log.reopen()
    log.write(RECORD)
    log.close()


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(UsageLogError, match="cannot be opened: Is a directory"):
        UsageLog(tmp_path, pytest.fail)


def test_a_full_disk_is_counted_and_told_about_once_a_minute(caplog):
    now_s, errors = [0.0], []
    log = UsageLog("/dev/full", lambda: errors.append(1), clock=lambda: now_s[0])
    for moment in (0.0, 30.0, 59.0, 61.0):
        now_s[0] = moment
        log.write(RECORD)
    log.close()
    assert len(errors) == 4
    assert len(caplog.records) == 2
    assert os.strerror(errno.ENOSPC) in caplog.text


def test_a_line_cut_short_spoils_no_other(tmp_path, monkeypatch):
    path, errors = tmp_path / "usage.jsonl", []
    log = UsageLog(path, lambda: errors.append(1))
    write = os.write
    monkeypatch.setattr(usage.os, "write", lambda file, data: write(file, data[:7]))
    log.write(RECORD)
    monkeypatch.undo()
    log.write(RECORD)
    log.close()
    torn, whole = path.read_text().splitlines()
    assert (len(torn), len(errors)) == (7, 1)
    assert json.loads(whole)["tenant"] == "acme"
    path.write_text(torn)
    log = UsageLog(path, pytest.fail)
    log.write(RECORD)
    log.close()
    assert path.read_text().splitlines() == [torn, whole]
