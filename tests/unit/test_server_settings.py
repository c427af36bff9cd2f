"""Where a deployment's knobs come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ram_core.engine.config import AlignerSource, EngineConfig
from server.settings import Settings, SettingsError, aligner_table, load_settings, parse_size


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No file and no variable of the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAM_CONFIG", raising=False)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(monkeypatch):
    Path("ram.toml").write_text('port = 1\nhost = "file"\ndevice = "file"\n[aligners]\npolite = "/p"\n')
    monkeypatch.setenv("RAM_PORT", "2")
    monkeypatch.setenv("RAM_HOST", "environment")
    settings = load_settings(port=3)
    assert (settings.port, settings.host, settings.device) == (3, "environment", "file")
    assert settings.aligners == {"polite": "/p"}


def test_the_file_may_be_elsewhere(tmp_path, monkeypatch):
    path = tmp_path / "other.toml"
    path.write_text("port = 4")
    monkeypatch.setenv("RAM_CONFIG", str(path))
    assert load_settings().port == 4


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("1.5kb", 1500),
        ("7", 7),
        ("3G", 3_000_000_000),
        ("1KiB", 1024),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size
    assert load_settings(kv_memory=text).kv_memory == size


@pytest.mark.parametrize("text", ["2 apples", "-1", "GiB", "1e9", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_aligners_are_read_from_flags_and_from_the_environment(monkeypatch):
    assert aligner_table(["a=/x", "b=/y=z"]) == {"a": "/x", "b": "/y=z"}
    monkeypatch.setenv("RAM_ALIGNERS", "a=/x, b=/y")
    assert load_settings().aligners == {"a": "/x", "b": "/y"}
    for bad in (["a"], ["=x"], ["a="], ["a=/x", "a=/y"]):
        with pytest.raises(ValueError, match="aligner"):
            aligner_table(bad)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"port": 70000}, "`port`"),
        ({"kv_memory": "lots"}, "`kv_memory`: not a size"),
        ({"aligners": ["polite"]}, "`aligners`: an aligner is given as NAME=PATH"),
        ({"aligners": ["identity=/x"]}, "identity"),
        ({"demo": True, "proposal": "/x"}, "`demo`"),
        ({"log_level": "loud"}, "`log_level`"),
        ({"max_batch": 0}, "`max_batch`"),
        ({"tensor_parallel": 0}, "`tensor_parallel`"),
        ({"tensor_parallel": 2, "engine": "thread"}, "`tensor_parallel` needs the engine in processes"),
        ({"config": Path("nowhere.toml")}, "does not exist"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_field(flags, reason, monkeypatch):
    monkeypatch.setenv("RAM_CONFIG", "")
    with pytest.raises(SettingsError) as error:
        load_settings(**flags)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_or_misspelt_file_is_refused():
    Path("ram.toml").write_text("port = ")
    with pytest.raises(SettingsError, match="not valid TOML"):
        load_settings()
    Path("ram.toml").write_text("prot = 5")
    with pytest.raises(SettingsError, match="`prot`"):
        load_settings()


def test_engine_knobs_have_the_engines_defaults(tmp_path):
    aligners = (AlignerSource("a@1", "/x"),)
    config = load_settings(proposal=str(tmp_path)).engine_config(aligners)
    assert config == EngineConfig(proposal=str(tmp_path), aligners=aligners)


def test_every_engine_knob_can_be_set(tmp_path):
    values = {
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 77,
        "kv_memory": "1KiB",
        "page_size": 7,
        "max_batch": 5,
        "max_step_tokens": 55,
        "max_chunk_tokens": 44,
        "max_queue": 3,
        "prefix_cache": False,
        "is_overlapping": True,
        "has_static_shapes": True,
        "cuda_graphs": False,
        "attention": "torch",
        "compile": True,
        "aligner_bank": False,
        "aligner_slots": 9,
        "aligner_memory": "3MB",
        "quantization": "int8",
        "tensor_parallel": 2,
        "trust_remote_code": True,
    }
    config = load_settings(proposal=str(tmp_path), **values).engine_config()
    default = EngineConfig(proposal="")
    same = [
        field.name
        for field in dataclasses.fields(EngineConfig)
        if getattr(config, field.name) == getattr(default, field.name)
    ]
    assert same == ["aligners"]


def test_names_to_preload_are_read_from_everywhere(monkeypatch):
    assert load_settings(preload=["a", "b,c"]).preload == ("a", "b", "c")
    monkeypatch.setenv("RAM_PRELOAD", "all")
    assert load_settings().preload == ("all",)
    Path("ram.toml").write_text('preload = ["a"]\naligner_wait_s = 5\nmax_aligner_loads = 2\n')
    monkeypatch.delenv("RAM_PRELOAD")
    settings = load_settings()
    assert (settings.preload, settings.aligner_wait_s, settings.max_aligner_loads) == (("a",), 5.0, 2)
    with pytest.raises(SettingsError, match=r"`preload\.0`"):
        load_settings(preload=[5])


def test_the_proposals_name(tmp_path):
    (tmp_path / "llama").mkdir()
    assert Settings().model_name == "ram-demo"
    assert Settings(proposal=str(tmp_path / "llama")).model_name == "llama"
    assert Settings(proposal="llama/").model_name == "llama"
    assert Settings(proposal="org/llama").model_name == "org/llama"
    assert Settings(proposal="org/llama", served_model_name="big").model_name == "big"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"served_model_name": "a"}, "proposal's name"),
        ({"default_aligner": "b"}, "the aligners are: a"),
        ({"aligners_dir": Path("/nowhere")}, "not a directory"),
    ],
)
def test_names_that_cannot_work_are_refused(flags, reason):
    with pytest.raises(SettingsError, match=reason):
        _check(load_settings(proposal="org/big", **flags))


def _check(settings):
    settings.check_aligner_names(("a",))
    settings.engine_config()


def test_the_demo_is_served_where_nothing_else_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ram_core.demo.bundle_path", lambda: tmp_path)
    with pytest.raises(SettingsError, match="ram demo build"):
        load_settings().engine_config()
    for path in (tmp_path / "proposal", tmp_path / "aligners" / "polite"):
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
    for settings in (load_settings(), load_settings(demo=True)):
        assert settings.engine_config().proposal == str(tmp_path / "proposal")
        assert settings.aligner_sources() == {"polite": str(tmp_path / "aligners" / "polite")}
    own = load_settings(aligners=["polite=/own", "terse=/other"])
    assert own.aligner_sources() == {"polite": "/own", "terse": "/other"}
    assert not load_settings(proposal=str(tmp_path)).aligner_sources()


def test_a_watched_directory_leaves_room_for_one_more_aligner_unless_told(tmp_path):
    begins = (AlignerSource("a", "a"), AlignerSource("b", "b"))
    plain = load_settings(proposal=str(tmp_path))
    watching = load_settings(proposal=str(tmp_path), aligners_dir=tmp_path)
    told = load_settings(proposal=str(tmp_path), aligners_dir=tmp_path, aligner_slots=7)
    assert [each.engine_config(begins).aligner_slots for each in (plain, watching, told)] == [0, 3, 7]
