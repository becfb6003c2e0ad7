"""Random command lines for the four scripts: none ends in a traceback or leaves half a file.

Each is a valid line, small enough to train or draw in less than a second, with a few of its fields changed.
It runs in its own process (tests/fuzz_server.py), in a copy of a folder with runs, photos and odd files.
"""
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
import finetune
import sample
import train_vae
from support.config import field
from support.text import TextConfig
from support.weights import ExportConfig

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits memory as Linux does")


# ---------------------------------------------------------------- valid lines

TRAIN = {"image_size": 32, "images": 8, "steps": 1, "batch_size": 2, "micro_batch": 2}
VAE = TRAIN | {"stats": 8, "perceptual": "none", "disc_width": 2, "disc_start": 0, "gan": 0.1}
DIT = TRAIN | {"sample_steps": 1}
BASE_VAE = VAE | {"preset": "tiny-base", "C": 4, "widths": "8,16", "blocks": 1, "groups": 4, "gan": 0}
DAVAE = VAE | {"preset": "tiny", "base": "base", "D": 12}
BASE_DIT = DIT | {"preset": "tiny-base", "vae": "vae", "E": 16, "A": 2, "depth": 1, "p": 2}
DAVAE_DIT = DIT | {"preset": "tiny", "vae": "vae", "base": "dit0", "D": 12}
SMALL = {"E": 16, "A": 2, "depth": 1}
MEASURED = {"n": 2, "images": 4, "steps": 1, "features": "none"}
PHOTOS = {"data_dir": "photos"}


def of_photos(flags):
    """Flags of training on the folder of photos, not on a number of drawings."""
    return {name: value for name, value in flags.items() if name != "images"} | PHOTOS


@dataclasses.dataclass
class Two:
    """What `evaluate.py compare` takes, without flag names."""
    a: str = field("", "a run")
    b: str = field("", "another")


# (script and command, its Config, the flags of a valid line)
LINES = [
    ("train_vae.py", train_vae.Config, BASE_VAE | {"out": "new"}),
    ("train_vae.py", train_vae.Config, DAVAE | {"out": "new"}),
    ("train_vae.py", train_vae.Config, DAVAE | {"out": "vae", "steps": 2}),                    # resumes
    ("train_vae.py", train_vae.Config, of_photos(DAVAE) | {"out": "new", "crop": 24}),
    ("finetune.py", finetune.Config, BASE_DIT | {"out": "new"}),
    ("finetune.py", finetune.Config, DAVAE_DIT | {"out": "new"}),
    ("finetune.py", finetune.Config, DAVAE_DIT | {"out": "dit", "steps": 2}),                  # resumes
    ("finetune.py", finetune.Config, of_photos(DAVAE_DIT) | {"out": "new", "cache": False}),
    ("finetune.py", finetune.Config, DAVAE_DIT | {"out": "new", "dry_run": True} | SMALL),
    ("sample.py", sample.Config, {"run": "dit", "n": 2, "steps": 1}),
    ("sample.py", sample.Config, {"run": "dit", "n": 3, "steps": 2, "out": "new", "classes": "2,10"}),
    ("sample.py text", TextConfig, {"encoders": "empty", "out": "new", "prompts": "a fox|a hen"}),
    ("sample.py export", ExportConfig, {"run": "dit", "out": "new"}),
    ("evaluate.py", evaluate.Config, {"run": "vae", "images": 4, "features": "none"}),
    ("evaluate.py", evaluate.Config, {"run": "dit", "out": "new.json"} | MEASURED),
    ("evaluate.py", evaluate.Config, {"run": "dit"} | MEASURED | PHOTOS),
    ("evaluate.py", evaluate.Config, {"run": "dit", "whole": True} | PHOTOS),
    ("evaluate.py compare", Two, {"a": "dit", "b": "vae"}),
]

# These make the folder's contents.
FIRST = [
    ("train_vae.py", BASE_VAE | {"out": "base"}),
    ("train_vae.py", DAVAE | {"out": "vae"}),
    ("finetune.py", BASE_DIT | {"out": "dit0"}),
    ("finetune.py", DAVAE_DIT | {"out": "dit"}),
    ("sample.py", {"run": "dit", "n": 2, "steps": 1}),
    ("evaluate.py", {"run": "dit"} | MEASURED),
    ("evaluate.py", {"run": "vae", "images": 4, "features": "none"}),
]


def as_argv(command, flags):
    """(script, arguments) of a command and its flags."""
    script, *words = command.split()
    if words == ["compare"]:
        return script, [*words, *map(str, flags.values())]
    return script, words + [f"--{name}={value}" for name, value in flags.items()]


# ---------------------------------------------------------------- values for the changed fields

LARGE = ["64", "100", "1000", "4096", "16384", "99999", "1000000", "1000000000", "2147483648",
         "9223372036854775807", "18446744073709551616", f"1{'0' * 30}", "-9223372036854775809", "9" * 5000]
ODD_NUMBERS = ["1e3", "1_0", "0x10", "\u0663", "\u00b2", " 4 ", "+2", "-0", "NaN", "inf", "-inf", "1e400",
               "1e300", "1e-300", "0.5", "1.0", "0.999", "1e-9", "-0.1", "", "None", "two"]
TUPLES = ["", "()", "0", "-1", "8", "8,16", "(8, 16)", "16,8,4", "8," * 13, "1,1", "9,9,9", "1000000000",
          ",", "a,b", "8;16", "1.5,2", f"1{'0' * 30}", "0," * 5000]
PLACES = ["", "new", "base", "vae", "vae/step_000001", "dit0", "dit", "dit/vae", "dit/step_000001", "photos",
          "mixed", "text.txt", "broken.pt", "broken.safetensors", "image.png", "empty", "nowhere", "link",
          "loop", "text.txt/below", "new/below/that", "dit/", "./dit", ".", "..", "../beside", "procedural"]
ODD_NAMES = ["~", " ", "-", "two words", "n\new", "\u0444\u043e\u0442\u043e/\u00e9", "\u202e", "a" * 300,
             "\u00e9" * 200, "x/" * 3000, "\0", "a\0b", "\udcff", "/dev/null/below", "/proc/nothing",
             "a|b|c", "|", "%s{}", "a" * 3000]
WORDS = ["--nonsense=1", "--", "-", "-n=2", "--=1", "words", "--lr", "--seed", "n=2", "--step=1", "=",
         "\udcff", "--\u00fcnicode=1", "--help", "9" * 400]


def usual_values(name, field):
    """A strategy of strings that are plausible for a field; only combinations of them make no sense."""
    if field.metadata["choices"]:
        return st.sampled_from(field.metadata["choices"])
    if name == "compile":                                          # compiling would take minutes
        return st.just("False")
    return {
        int: st.integers(0, 9).map(str) | st.sampled_from(["8", "12", "16", "24", "36", "40", "63"]),
        float: st.sampled_from(["0", "1", "0.5", "0.999", "2", "1e-3", "1e6"]) | st.floats(0, 1).map(str),
        bool: st.sampled_from(["True", "False"]),
        tuple: st.sampled_from(["8", "8,16", "16,8,4", "4,8", "1,1", "2,10", "0", "3,3,3", ""]),
    }.get(type(field.default), st.sampled_from(PLACES))


def odd_values(field):
    """A strategy of strings that a field should not be given, mostly close to its type."""
    names = st.sampled_from(PLACES + ODD_NAMES) | st.text(max_size=20)
    numbers = st.sampled_from(LARGE) | st.sampled_from(ODD_NUMBERS) | st.integers(-2, 40).map(str)
    return {
        int: numbers | st.integers().map(str),
        float: numbers | st.floats().map(str),
        bool: st.sampled_from(["true", "1", "", "no"]),
        tuple: st.sampled_from(TUPLES) | st.lists(st.integers(-1, 33), max_size=4).map(str),
    }.get(type(field.default), names)


@st.composite
def command_lines(draw):
    """(script, arguments): a valid line with some changes."""
    command, Config, flags = draw(st.sampled_from(LINES))
    flags = dict(flags)
    fields = {f.name: f for f in dataclasses.fields(Config)}
    few = min(len(fields), draw(st.sampled_from([1, 1, 2, 2, 3, 4])))
    usual = draw(st.booleans())                # odd values rarely let a line get far
    for name in draw(st.lists(st.sampled_from(list(fields)), min_size=few, max_size=few, unique=True)):
        values = usual_values(name, fields[name]) if usual else odd_values(fields[name])
        flags[name] = draw(values)
    script, argv = as_argv(command, flags)
    if draw(st.integers(0, 19)) == 7:
        argv.insert(draw(st.integers(0, len(argv))), draw(st.sampled_from(WORDS)))
    return script, argv


# ---------------------------------------------------------------- running them


SECONDS = 5                    # of CPU time, after which a line is cut off; some may rightly take hours


class Machine:
    """The server, and the folder of which each line gets a copy."""

    def __init__(self, folder):
        self.folder = folder
        self.count = 0
        self.template = folder / "template"
        self.template.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(folder / "torch")}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fuzz_server.py"), str(ROOT)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout.readline() == "ready\n"
        self.fill()

    def fill(self):
        """Fill the template."""
        here = self.template
        for number in range(6):
            path = here / "photos" / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 36), (40 * number, 90, 200)).save(path)
        shutil.copytree(here / "photos" / "a", here / "mixed")
        (here / "mixed" / "0.png").write_bytes(b"no image")
        (here / "image.png").write_bytes((here / "photos" / "a" / "0.png").read_bytes())
        (here / "text.txt").write_text("a red fox\na hen\n")
        (here / "broken.pt").write_bytes(b"\x80\x02}q\x00" * 9)
        (here / "broken.safetensors").write_bytes(b"\xff" * 99)
        (here / "empty").mkdir()
        (here / "link").symlink_to("dit")
        (here / "loop").symlink_to("loop")
        for command, flags in FIRST:
            result = self.ask(*as_argv(command, flags), here, cpu=60)
            assert (result["end"], result["code"]) == ("exit", 0), result
        assert (here / "dit" / "step_000001").exists()

    def ask(self, script, argv, folder, cpu):
        request = {"script": script, "argv": argv, "folder": str(folder), "cpu": cpu}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def check(self, script, argv):
        """Run a line in a new folder.   raises: AssertionError if it misbehaves"""
        self.count += 1
        above = self.folder / str(self.count)
        here = above / "work"
        shutil.copytree(self.template, here, symlinks=True)
        before = files_of(above)
        result = self.ask(script, argv, here, cpu=SECONDS)
        line = shlex.join([script, *argv])
        changed = {path for path, state in files_of(above).items() if before.get(path) != state}
        outside = [path for path in changed if not may_write(path, argv, above)]
        torn = [step for step in above.glob("**/step_*") if step.name[5:].isdigit() and not is_whole(step)]
        half = [path for path in changed if re.search(r"\.(tmp|part|davae-new|davae-old)\d*(/|$)", path)]
        shutil.rmtree(above)

        assert result["end"] in ("exit", "cut"), f"{line}\n{result['end']}: {result['err']}"
        assert "Traceback" not in result["err"], f"{line}\n{result['err']}"
        if result["end"] == "cut":
            assert asks_for_much(argv), f"{line}\ntakes more than {SECONDS} s"
        else:
            assert result["code"] == 0 or is_a_sentence(result["code"]), f"{line}\n{result['code']!r}"
            assert not half, f"{line}\nleaves {half}"
        assert not torn, f"{line}\nleaves {torn} without SHA256SUMS"
        assert not outside, f"{line}\nwrites {outside}"
        return result


def files_of(folder):
    """{path below the folder: (size, time)} of all files in it."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            state = os.lstat(path)
            found[os.path.relpath(path, folder)] = (state.st_size, state.st_mtime_ns)
    return found


def is_a_sentence(code):
    """Is it a string of at most two lines, the second being advice?"""
    return isinstance(code, str) and 10 < len(code) < 1500 and code.count("\n") <= 1


def asks_for_much(argv):
    """Does a line hold a number that justifies a long run: a million steps, images of 4096 pixels?"""
    values = [text.partition("=")[2] for text in argv]
    numbers = [number for value in values if re.fullmatch(r"[\d_,() ]+", value)
               for number in re.findall(r"[\d_]+", value)]
    return any(int(number.strip("_") or 0) > 32 for number in numbers)


def is_whole(step):
    return (step / "SHA256SUMS").exists() or not step.is_dir()


def may_write(path, argv, above):
    """May a line write to this path?

    It may write to --out and below, also with a suffix, and to its hidden lock; below the run, where that is
    the default of --out; to --keep_reference; to the latent cache in the VAE's folder; and to out/, where
    presets write.
    """
    path = re.sub(r"/\.([^/]+)\.lock$", r"/\1", path)
    given = dict(text.removeprefix("--").partition("=")[::2] for text in argv)
    if "latents-" in path or path.startswith("work/out/"):
        return True
    places = [given.get("out") or given.get("run", "dit"), given.get("keep_reference", "")]
    real = os.path.realpath(above / path)
    for place in filter(None, places):
        allowed = os.path.realpath(above / "work" / place)
        if real.startswith(allowed):
            return True
    return False


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("fuzz"))
    yield machine
    machine.process.kill()


OPTIONS = dict(deadline=None, database=None, derandomize=True, phases=[Phase.generate],
               suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("command,Config,flags", LINES)
def test_the_unchanged_lines_are_valid(machine, command, Config, flags):
    result = machine.check(*as_argv(command, flags))
    if command != "sample.py text":                        # there are no encoders here
        assert (result["end"], result["code"]) == ("exit", 0), result


@settings(max_examples=40, **OPTIONS)
@given(line=command_lines())
def test_forty_random_command_lines_end_in_success_or_one_sentence(machine, line):
    machine.check(*line)


@pytest.mark.slow
@settings(max_examples=300, **OPTIONS)
@given(line=command_lines())
def test_three_hundred_random_lines_end_in_success_or_one_sentence(machine, line):
    machine.check(*line)
