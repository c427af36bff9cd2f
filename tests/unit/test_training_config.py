"""One file and single values over it; what cannot be is refused by its name."""

import re
from pathlib import Path

import pytest

from ram_core.training.config import FitConfig, TrainConfig, parse_setting, read_config
from ram_core.training.errors import ConfigError


def read(tmp_path, text, *settings):
    path = tmp_path / "train.toml"
    path.write_text(text)
    return read_config(path, [parse_setting(setting) for setting in settings])


def test_a_file_is_read_and_a_flag_wins_over_it(tmp_path):
    config = read(
        tmp_path,
        'output = "out"\n[fit]\nepochs = 2\nmodel = "small"\n',
        "fit.epochs=3",
        "package.license=my own",
    )
    assert (config.fit.epochs, config.fit.model, config.package.license) == (3, "small", "my own")


def test_no_file_is_needed():
    config = read_config(None, [("output", "out")])
    assert config == TrainConfig(output="out")
    assert config.fit == FitConfig()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("fit.learning_rate=0", "learning_rate"),
        ("fit.learning_rate=nan", "learning_rate"),
        ("fit.optimizer=adam", "fit.optimizer"),
        ("fit.batch_size=0", "batch_size"),
        ("fit.lora.rank=-1", "rank"),
        ("data.too_long=cut", "too_long"),
        ("data.max_prompt_tokens=4096", "max_prompt_tokens"),
        ("fit.objective=dpo", "objective"),
        ("synthesize.top_p=2", "top_p"),
        ("package.candidates=0", "candidates"),
        ("synthesize.top_p=0", "top_p"),
        ("package.name=my one", "name"),
        ("package.version=-", "version"),
        ("package.strength=1e9", "strength"),
        ("package.kl_threshold=-1", "kl_threshold"),
        ("package.kl_threshold=inf", "kl_threshold"),
        ("unknown=1", "unknown"),
        ("output.deep=1", "output"),
        ("seed=many", "seed"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(tmp_path, setting, named):
    with pytest.raises(ConfigError, match=named):
        read(tmp_path, 'output = "out"\n', setting)


def test_a_broken_file_a_missing_one_and_a_flag_without_a_value_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.toml"):
        read(tmp_path, "output = ")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_setting("fit.epochs")


def test_the_config_in_the_docs_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    [text] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    config = read(tmp_path, text)
    assert (config.output, config.fit.micro_batch_size) == ("runs/polite", 8)
    objectives = re.findall(
        r"^\| `([a-z-]+)` \| (?:the paper|your answer|what is served)", page, re.MULTILINE
    )
    assert [read(tmp_path, text, f"fit.objective={name}").fit.objective for name in objectives] == objectives
    assert len(objectives) == 4
