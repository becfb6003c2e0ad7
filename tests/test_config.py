"""support/config.py: the command line's values, their ranges, and its messages."""
import dataclasses
import math
import os
import re
import shlex
from dataclasses import dataclass

import pytest

import evaluate
import finetune
import sample
import train_vae
from experiments import budget
from support import config
from support.config import cli, field, flags
from support.text import TextConfig


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


def test_the_changed_fields_are_those_given_another_value_than_the_presets():
    cfg = config.cli(Config, PRESETS, ["large", "--steps=200", "--lr=0.2", "--flip=True", "--ch_mult=1"])
    assert cfg.given == {"preset", "steps", "lr", "flip", "ch_mult"} and cfg.changed == {"lr", "ch_mult"}
    assert config.cli(Config, None, ["--steps=10", "--lr=1"]).changed == {"lr"}


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


@pytest.mark.parametrize("script, flag, sentence", [
    (sample, "--cfg_scale=3", "(did you mean cfg?)"),
    (sample, "--ckpt=a", "(did you mean run?)"),
    (evaluate, "--checkpoint=a", "(did you mean run?)"),
    (sample, "--num-samples=9", "(did you mean n?)"),
    (sample, "--num_steps=9", "(did you mean steps?)"),
    (sample, "--output_dir=a", "(did you mean out?)"),
    (finetune, "--learning_rate=1", "(did you mean lr?)"),
    (finetune, "--resolution=64", "(did you mean image_size?)"),
    (train_vae, "--train_batch_size=8", "(did you mean batch_size?)"),
    (train_vae, "--num_samples=8", "--num_samples is not a field; --help"),        # it has no n
    (finetune, "--resume", "--resume is not a field: to go on with a run, give the same command again"),
    (train_vae, "--dry_run", "finetune.py has it: python finetune.py PRESET --dry_run=True"),
    (train_vae, "--dry-run=True", "finetune.py has it"),
])
def test_flags_that_other_programs_have_lead_to_ours(script, flag, sentence):
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        config.cli(script.Config, getattr(script, "PRESETS", None), [flag])


def test_every_field_that_another_programs_flag_leads_to_exists():
    known = set()
    for script in (train_vae, finetune, sample):
        known |= {f.name for f in dataclasses.fields(script.Config)}
    assert set(config.ELSEWHERE.values()) <= known and not config.ELSEWHERE.keys() & known


def test_help_names_every_field_and_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        config.cli(Config, PRESETS, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name}" in text for name in Config.__dataclass_fields__)
    assert "large" in text


def test_help_after_a_preset_shows_its_values(capsys):
    with pytest.raises(SystemExit):
        config.cli(Config, PRESETS, ["large", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}={config.show(value)} " in text for name, value in PRESETS["large"].items())
    assert "--preset=large" in text


def test_help_ends_without_a_traceback_when_its_pipe_is_closed(monkeypatch):
    reads, writes = os.pipe()
    os.close(reads)                                                # as head does once it has its lines
    with os.fdopen(writes, "w") as out:                            # closing it flushes what is left
        monkeypatch.setattr("sys.stdout", out)
        with pytest.raises(SystemExit) as stop:
            config.cli(Config, PRESETS, ["--help"])
    assert stop.value.code == 0


def test_help_puts_the_configs_comments_above_its_fields_even_from_a_parent_class(capsys):
    expected = {finetune.Config: ["loss (Sec. 3.3, Tab. S1)\n  --N="],
                evaluate.Config: ["what is drawn\n  --classes=", "what is measured\n"]}
    for Config, heads in expected.items():
        with pytest.raises(SystemExit):
            cli(Config, argv=["--help"])
        text = capsys.readouterr().out
        assert all(f"\n\n{head}" in text for head in heads)


@dataclass
class Options:
    name: str = field("", "")
    distance: str = field("mse", "", choices=("mse", "vf"))
    levels: tuple = field((1, 2), "")
    lr: float = field(1e-3, "")
    on: bool = field(False, "")


@pytest.mark.parametrize("text,value", [
    ("", ()), ("()", ()), ("8", (8,)), ("8,16", (8, 16)), ("(8, 16)", (8, 16)), ("(8,)", (8,))])
def test_tuples_are_read_in_any_form(text, value):
    assert cli(Options, argv=[f"--levels={text}"]).levels == value


@pytest.mark.parametrize("options", [
    Options(), Options("a", "vf", (), 0.5, True), Options("b c", "mse", (3,), -1.0)])
def test_flags_of_a_config_give_the_same_config(options):
    assert cli(Options, argv=flags(options)) == options


@pytest.mark.parametrize("changes", [
    {}, dict(steps=10, lr=1e-3), dict(out="my photos/$HOME's;x", ch_mult=(), flip=False, lr=1 / 3)])
def test_the_printed_command_gives_the_same_config_even_if_it_undoes_a_presets_value(changes):
    cfg = Config(**{"preset": "large", **PRESETS["large"], **changes})
    words = shlex.split(config.command("script.py", cfg, PRESETS))
    assert words[:2] == ["python", "script.py"] and len(words) == 3 + len(changes)
    assert cli(Config, PRESETS, words[2:]) == cfg


def test_a_value_may_follow_its_flag():
    cfg = cli(Options, argv=["run", "--lr", "-0.5", "--levels", "4,2", "--on", "True"])
    assert cfg == Options("run", "mse", (4, 2), -0.5, True)


def test_a_field_with_choices_accepts_nothing_else_and_suggests_the_nearest():
    with pytest.raises(SystemExit, match="--distance='mce': wanted mse or vf .did you mean mse"):
        cli(Options, argv=["--distance=mce"])


# ---------------------------------------------------------------- ranges

CONFIGS = (train_vae.Config, finetune.Config, sample.Config, evaluate.Config, TextConfig)


def numbers_of(Config):
    """(field, smallest, largest) of each numeric field."""
    for f in dataclasses.fields(Config):
        if type(f.default) in (int, float, tuple):
            yield f, *f.metadata["range"]


@pytest.mark.parametrize("Config", CONFIGS)
def test_every_numeric_field_has_a_range_that_includes_its_default_and_both_ends(Config):
    for f, low, high in numbers_of(Config):
        assert low > -config.LARGEST, f.name
        config.check(f, f.default, "")
        for number in (low, high):
            value = getattr(cli(Config, argv=["a run", f"--{f.name}={number}"]), f.name)
            assert value in (number, (number,)), f.name


@pytest.mark.parametrize("Config", CONFIGS)
def test_a_value_beyond_either_end_is_refused_with_the_range(Config):
    for f, low, high in numbers_of(Config):
        step = 1e-6 if isinstance(f.default, float) else 1
        for number in (low - step, high + step, -10**30, 10**30):
            with pytest.raises(SystemExit) as stop:
                cli(Config, argv=["a run", f"--{f.name}={number}"])
            assert str(stop.value).startswith(f"--{f.name}='{number}': wanted")
            assert f"{low:_} to {high:_}" in str(stop.value), f.name


@pytest.mark.parametrize("text", ["nan", "-nan", "inf", "-inf", "Infinity", "1e400"])
def test_every_float_field_refuses_a_number_that_is_not_finite(text):
    for Config in CONFIGS:
        for f, *_ in numbers_of(Config):
            if isinstance(f.default, float):
                with pytest.raises(SystemExit, match=f"--{f.name}='{text}': wanted a number, "):
                    cli(Config, argv=["a run", f"--{f.name}={text}"])


@pytest.mark.parametrize("Config,flag,wanted", [
    (train_vae.Config, "--micro_batch=0", "a whole number, 1 to 1_000_000_000"),
    (train_vae.Config, "--seed=-1", "a whole number, 0 to 18_446_744_073_709_551_615"),
    (train_vae.Config, "--widths=", "whole numbers, 1 to 12 of them, each 1 to 8_192, such as 1,2,4"),
    (train_vae.Config, "--widths=16,0", "whole numbers, 1 to 12 of them, each 1 to 8_192, such as 1,2,4"),
    (train_vae.Config, f"--widths={'8,' * 13}",
     "whole numbers, 1 to 12 of them, each 1 to 8_192, such as 1,2,4"),
    (train_vae.Config, "--detail_dropout=1.01", "a number, 0 to 1"),
    (finetune.Config, "--beta2=1", "a number, 0 to 0.999999"),
    (finetune.Config, "--shift=0", "a number, 0.001 to 1_000"),
    (finetune.Config, "--label_dropout=-0.1", "a number, 0 to 1"),
    (finetune.Config, "--steps=1000000000000", "a whole number, 1 to 1_000_000_000"),
    (sample.Config, "--classes=3,-1", "whole numbers, 0 to 1_000_000_000, such as 1,2,4"),
    (sample.Config, "--batch_size=-1", "a whole number, 1 to 1_000_000_000"),
    (sample.Config, "--height=-32", "a whole number, 0 to 16_384"),
    (sample.Config, "--width=30000", "a whole number, 0 to 16_384"),
    (sample.Config, "--cfg_channels=-1", "a whole number, 0 to 1_000_000_000"),
    (sample.Config, "--weights=foo", "ema or model"),
    (evaluate.Config, "--images=0", "a whole number, 1 to 10_000_000"),
])
def test_a_bad_value_is_answered_with_what_the_field_takes(Config, flag, wanted):
    with pytest.raises(SystemExit) as stop:
        cli(Config, argv=["a name", flag])
    name, value = flag.split("=")
    assert str(stop.value) == f"{name}={value!r}: wanted {wanted}"


@pytest.mark.parametrize("text,value", [
    ("1_000", 1000), (" 12 ", 12), ("+3", 3), ("-0", 0), ("\u0661\u0662", 12), ("007", 7)])
def test_whole_numbers_are_read_as_python_reads_them(text, value):
    assert cli(train_vae.Config, argv=["tiny", f"--gan={text}", f"--D={text}"]).D == value


@pytest.mark.parametrize("text", ["", "1e5", "0x10", "1.0", "\u00b2", "1,2", "9" * 5000])
def test_a_value_that_is_no_whole_number_is_refused_and_abbreviated(text):
    with pytest.raises(SystemExit, match="--steps=.*: wanted a whole number") as stop:
        cli(train_vae.Config, argv=["tiny", f"--steps={text}"])
    assert len(str(stop.value)) < 200


@pytest.mark.parametrize("changed,sentence", [
    (dict(steps=0), "--steps='0': wanted a whole number, 1 to"),
    (dict(lr=math.nan), "--lr='nan': wanted a number, 0 to"),
    (dict(ch=(4, 0)), "--ch='4,0': wanted whole numbers, 1 to 2 of them"),
])
def test_a_presets_values_are_checked_like_flags(changed, sentence):
    @dataclass
    class Own:
        preset: str = field("a", "")
        steps: int = field(10, "", at_least=1)
        lr: float = field(0.1, "", at_least=0)
        ch: tuple = field((1,), "", at_least=1, count=(1, 2))

    presets = {"a": {}, "b": changed}
    assert cli(Own, presets, []) == Own()
    with pytest.raises(SystemExit, match=sentence):
        cli(Own, presets, ["b"])


def test_every_preset_is_in_range():
    for script in (train_vae, finetune):
        for name in script.PRESETS:
            assert cli(script.Config, script.PRESETS, [name]).preset == name


# ---------------------------------------------------------------- file names


@pytest.mark.parametrize("name,wanted", [
    ("a\0b", "without control characters"), ("a\nb", "without control characters"),
    ("\udcff.png", "a name in UTF-8"), ("a" * 300, "each name in it of at most 240"),
    ("photos/" + "\u00e9" * 130, "each name in it of at most 240"), ("ab/" * 2000, "at most 3800 bytes")])
def test_an_impossible_file_name_gets_one_sentence(name, wanted):
    for Config in CONFIGS:
        for f in dataclasses.fields(Config):
            if f.name in ("out", "data_dir", "text", "vae", "base", "reference"):
                with pytest.raises(SystemExit, match=f"--{f.name}=.*{wanted}") as stop:
                    cli(Config, argv=["a name", f"--{f.name}={name}"])
                assert len(str(stop.value)) < 400 and "\n" not in str(stop.value)


@pytest.mark.parametrize("name", [
    "a b", "\u5199\u771f/\u3000x", "~", "C:\\photos", "-", "a" * 240, "/a//b/", "%s|*?"])
def test_unusual_names_are_accepted(name):
    assert cli(finetune.Config, argv=["tiny", f"--out={name}"]).out == name


def test_prompts_may_be_of_any_length_and_many_lines():
    prompts = "a lighthouse at dusk,\n" * 500
    assert cli(sample.Config, argv=["run", f"--prompts={prompts}"]).prompts == prompts
    with pytest.raises(SystemExit, match="--prompts='a.x00b': wanted text in UTF-8, without zero bytes"):
        cli(sample.Config, argv=["run", "--prompts=a\0b"])


def test_help_shows_the_ranges_of_numbers(capsys):
    with pytest.raises(SystemExit):
        cli(train_vae.Config, train_vae.PRESETS, ["--help"])
    shown = [line for line in capsys.readouterr().out.splitlines() if "--" in line]
    lines = {line.split("=")[0].strip(): line for line in shown}
    assert lines["--detail_dropout"].endswith("[0 to 1]")
    assert lines["--widths"].endswith("[1 to 12 of them, each 1 to 8_192]")
    assert lines["--out"].endswith("the run's folder")
    assert lines["--seed"].endswith("every random draw [0 or more]")       # below 2^64, which nobody reaches
    with pytest.raises(SystemExit):
        cli(budget.Config, argv=["--help"])
    out = capsys.readouterr().out
    assert "2 to 5 [1e-06 or more]" in out and "data sets [1 to 12 of them, each 1 or more]" in out
    assert re.search(r"--images=[\d,]+ images in the table", out)
