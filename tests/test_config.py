"""support/config.py: the command line's values and its sentences."""
from dataclasses import dataclass

import pytest

from support import config
from support.config import cli, field, flags


@dataclass
class Config:
    preset: str = field("small", "a preset")
    out: str = field("", "folder")
    steps: int = field(10, "steps")
    lr: float = field(1e-3, "rate")
    flip: bool = field(True, "mirror")
    ch_mult: tuple = field((1, 2), "widths")


PRESETS = {"small": {"steps": 20}, "large": {"steps": 200, "lr": 0.1}}


def test_command_line_applies_preset_then_flags_with_the_fields_types():
    cfg = config.cli(Config, PRESETS, ["large", "--steps=1_000", "--flip=False", "--ch_mult=1,2,4"])
    assert cfg == Config("large", "", 1000, 0.1, False, (1, 2, 4))
    assert config.cli(Config, PRESETS, []).steps == 20
    assert config.cli(Config, None, ["anything"]).preset == "anything"


@pytest.mark.parametrize("argv,sentence", [
    (["--step=3"], "--step is not a field .did you mean steps"),
    (["--steps=3.5"], "--steps='3.5': wanted a whole number"),
    (["--flip=yes"], "--flip='yes': wanted True or False"),
    (["--lr=fast"], "--lr='fast': wanted a number"),
    (["smal"], "no preset 'smal' .did you mean small"),
    (["small", "--lr", "1", "steps=3"], "'steps=3' is not of the form --field=value"),
    (["--steps", "--lr=1"], "'--steps' has no value: wanted --steps=value"),
    (["--steps"], "'--steps' has no value"),
])
def test_command_line_mistakes_get_one_sentence(argv, sentence):
    with pytest.raises(SystemExit, match=sentence):
        config.cli(Config, PRESETS, argv)


def test_help_names_every_field_and_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        config.cli(Config, PRESETS, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name}" in text for name in Config.__dataclass_fields__)
    assert "large" in text


@dataclass
class Options:
    name: str = field("", "")
    distance: str = field("mse", "", choices=("mse", "vf"))
    levels: tuple = field((1, 2), "")
    lr: float = field(1e-3, "")
    on: bool = field(False, "")


@pytest.mark.parametrize("text,value", [
    ("", ()), ("()", ()), ("8", (8,)), ("8,16", (8, 16)), ("(8, 16)", (8, 16)), ("(8,)", (8,))])
def test_tuples_are_read_in_any_of_their_forms(text, value):
    assert cli(Options, argv=[f"--levels={text}"]).levels == value


@pytest.mark.parametrize("options", [
    Options(), Options("a", "vf", (), 0.5, True), Options("b c", "mse", (3,), -1.0)])
def test_a_config_as_flags_makes_the_same_config(options):
    assert cli(Options, argv=flags(options)) == options


def test_a_value_may_follow_its_flag():
    cfg = cli(Options, argv=["run", "--lr", "-0.5", "--levels", "4,2", "--on", "True"])
    assert cfg == Options("run", "mse", (4, 2), -0.5, True)


def test_a_field_with_choices_takes_nothing_else_and_names_the_nearest():
    with pytest.raises(SystemExit, match="--distance='mce': wanted mse or vf .did you mean mse"):
        cli(Options, argv=["--distance=mce"])
