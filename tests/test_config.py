"""support/config.py: the command line's values and its sentences."""
from dataclasses import dataclass

import pytest

from support import config
from support.config import field


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
    (["--steps", "3"], "'--steps' is not of the form --field=value"),
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
