"""docs/recipes.md: each recipe applies to a copy of this repository, runs there, and does what it says."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/recipes.md").read_text()
TITLES = re.findall(r"^## (\d\. .+)$", TEXT, re.MULTILINE)

pytestmark = pytest.mark.slow

# Extra flags for the commands of recipes.md, so that they take seconds.
TOY = {
    "train_vae.py": "--images=24 --stats=8 --batch_size=4 --log_every=1 --save_every=100 --disc_width=4",
    "finetune.py": "--images=24 --batch_size=8 --micro_batch=8 --sample_steps=2 --log_every=1 "
                   "--save_every=100",
    "sample.py": "--n=2 --classes=0,1",
    "evaluate.py": "--images=4 --n=4 --batch_size=4 --features=none",
}


class Copy:
    """A copy of the repository's tracked files in a folder, in which commands are run."""

    def __init__(self, folder):
        self.folder = folder
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        if files.returncode:
            pytest.skip("needs a git clone: its files are copied")
        for name in files.stdout.splitlines():
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)

    def run(self, *command):
        """Run a command at the top of the copy; returns what it printed."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def script(self, line, base="", vae="", steps=5):
        """Run a line of recipes.md with toy sizes; base, vae: runs that it needs but does not name."""
        words = line.split()
        at = next(i for i, word in enumerate(words) if word in TOY)
        program = [sys.executable]
        if words[0] == "torchrun":
            program += ["-m", "torch.distributed.run", *words[1:at]]
        flags = words[at + 1:]
        given = {flag.split("=")[0] for flag in flags}
        if base and "--base" not in given:
            flags.append(f"--base={base}")
        if vae and "--vae" not in given:
            flags.append(f"--vae={vae}")
        if words[at] == "finetune.py" and not base and "--base" not in given:      # a model from scratch
            flags += ["--depth=2", "--E=48"]
        return self.run(*program, words[at], *flags, f"--steps={steps}", *TOY[words[at]].split())

    def log(self, run):
        lines = (self.folder / run / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def checkpoint(self, run):
        return max((self.folder / run).glob("step_*"))

    def config(self, run):
        return json.loads((self.checkpoint(run) / "config.json").read_text())

    def own(self, run):
        """The weights of LossNetworks.own in a run's checkpoint."""
        return torch.load(self.checkpoint(run) / "train_state.pt", weights_only=True)["own"]


class Recipe:
    """A section of recipes.md."""

    def __init__(self, number):
        text = re.search(rf"(?ms)^## {number}\. .*?(?=^## |\Z)", TEXT).group()
        self.files = re.findall(r"(?ms)^`(\S+\.py)`, new:\n\n```python\n(.*?)^```", text)
        self.diff, = re.findall(r"(?ms)^```diff\n(.*?)^```", text)
        commands, = re.findall(r"(?ms)^```sh\n(.*?)^```", text)
        self.commands = commands.splitlines()

    def changed_lines(self):
        lines = self.diff.splitlines()
        return [line for line in lines if re.match(r"[+-](?!\+\+ b/|-- a/)", line)]

    def apply(self, copy):
        """Write the new files and apply the diff: its context must match, line by line."""
        for name, source in self.files:
            assert not (copy.folder / name).exists()
            (copy.folder / name).write_text(source)
        done = subprocess.run(["git", "apply", "-"], cwd=copy.folder, input=self.diff, capture_output=True,
                              text=True)
        assert done.returncode == 0, f"{done.stderr}\nthe source was changed: change docs/recipes.md, too"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{"base", "vae", "dit"}: the folders of a base VAE, a DA-VAE and a base DiT, trained for a few steps."""
    copy = Copy(tmp_path_factory.mktemp("unchanged"))
    copy.script("python train_vae.py tiny-base --out=out/base")
    copy.script("python train_vae.py tiny --out=out/vae", base="out/base")
    copy.script("python finetune.py tiny-base --out=out/dit", vae="out/vae")
    return {name: str(copy.folder / "out" / name) for name in ("base", "vae", "dit")}


@pytest.fixture
def forked(tmp_path):
    """forked(number) -> (the recipe, a copy of the repository to which it has been applied)."""
    def make(number):
        recipe = Recipe(number)
        copy = Copy(tmp_path)
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)        # the root for `git apply`
        recipe.apply(copy)
        return recipe, copy
    return make


def test_there_are_seven_recipes_and_none_changes_more_than_twenty_lines():
    assert len(TITLES) == 7
    for number in range(1, 8):
        assert 1 <= len(Recipe(number).changed_lines()) <= 20


def test_a_new_alignment_is_a_command_line_choice(forked, trained):
    recipe, copy = forked(1)
    for line in recipe.commands:
        copy.script(line, trained["base"])
    l1, mse = copy.log("out/l1"), copy.log("out/mse")
    assert l1[0]["l1"] == mse[0]["l1"]                            # the same weights, at the first step
    assert l1[0]["align"] ** 2 < mse[0]["align"]                  # by Jensen's inequality
    assert l1[-1]["l1"] != mse[-1]["l1"]                          # trained with different gradients
    assert copy.config("out/l1")["config"]["distance"] == "l1"
    with pytest.raises(AssertionError, match="wanted mse or vf or l1"):
        copy.run(sys.executable, "train_vae.py", "tiny", "--distance=l2")


def test_a_projection_in_the_loss_is_trained_resumed_averaged_and_not_exported(forked, trained):
    recipe, copy = forked(2)
    single, double = recipe.commands
    copy.script(f"{single} --micro_batch=2", trained["base"])
    copy.script(f"{double} --micro_batch=2", trained["base"])

    # the projection has changed since step 0
    first = torch.load(copy.folder / "out/projection/step_000000/train_state.pt", weights_only=True)["own"]
    last = copy.own("out/projection")
    name = "project.0.weight"
    assert not torch.equal(first[name], last[name])

    # two processes get the same result as one
    for key, weight in copy.own("out/projection-2").items():
        assert torch.allclose(weight, last[key], atol=1e-4)

    # it is saved next to the model, not in it
    with safe_open(copy.checkpoint("out/projection") / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "project" in key]            # noqa: SIM118  (not a dict)

    # onto a teacher's features, it has the teacher's width
    copy.run(sys.executable, "-c", """
from types import SimpleNamespace
import torch
import train_vae
train_vae.Teacher = lambda folder: SimpleNamespace(to=lambda device: SimpleNamespace(width=20))
cfg = train_vae.Config(project="mlp", teacher="dino", gan=0.0, perceptual="none")
project = train_vae.LossNetworks(cfg, SimpleNamespace(D=24, C=8), "cpu").own["project"]
assert project(torch.zeros(1, 24, 4, 4)).shape[1] == 20
""")

    # a resumed run continues training it
    copy.script(f"{single} --micro_batch=2", trained["base"], steps=6)
    now = copy.own("out/projection")
    before = (last[name] - first[name]).abs().max()
    change = (now[name] - last[name]).abs().max()
    assert 0 < change < 0.003 < 0.006 < before                    # one small step, not a fresh start


def test_your_own_base_vae_can_be_trained_and_carry_a_davae(forked):
    recipe, copy = forked(3)
    write, train_base, train_vae, evaluate = recipe.commands
    assert write.startswith('python -c "')
    copy.run(sys.executable, "-c", write.removeprefix('python -c "').removesuffix('"'))
    copy.script(train_base)
    copy.script(train_vae)
    copy.run(sys.executable, *evaluate.split()[1:], "--images=4", "--features=none")
    for run in ("out/conv-base", "out/conv-vae"):
        assert copy.config(run)["model"]["base"] == {"kind": "ConvVAE", "C": 8, "width": 32}
    table = json.loads((copy.folder / "out/conv-vae/metrics.json").read_text())[-1]["reconstruction"]
    assert "DA-VAE" in table and table["DA-VAE"]["images"] == 4


def test_your_own_transformer_has_an_exact_warm_start_and_can_be_sampled(forked, trained):
    recipe, copy = forked(4)
    train_base, widen, sample, evaluate = recipe.commands
    copy.script(train_base, vae=trained["vae"])
    assert "max |v - v_base| = 0.0, max |v_d| = 0.0" in copy.script(widen, vae=trained["vae"])
    copy.script(sample)
    copy.script(evaluate)
    summary = json.loads((copy.folder / "out/vit/summary.json").read_text())
    assert summary["warm_start"] == 0.0
    model = copy.config("out/vit")["model"]
    assert (model["kind"], model["C"], model["D"], model["grid"]) == ("ViT", 8, 24, 4)
    assert Image.open(copy.folder / "out/vit/samples/images/000001.png").size == (64, 64)
    assert "samples" in json.loads((copy.folder / "out/vit/metrics.json").read_text())[-1]["generation"]

    # weights from elsewhere, as a folder
    copy.run(sys.executable, "-c", """
from dataclasses import asdict
import support.runs
from support.weights import load_dit
from vit import ViT, ViTConfig
cfg = ViTConfig(C=8, grid=4, E=48, depth=2, A=3)
weights = ViT(cfg).state_dict()
support.runs.save_folder("out/mine", {"ema": weights}, {"model": {"kind": "ViT", **asdict(cfg)}})
assert load_dit("out/mine").cfg == cfg
""")


def test_your_own_data_set_serves_both_stages(forked, trained):
    recipe, copy = forked(5)
    write, train_vae, finetune, evaluate = recipe.commands
    copy.run(sys.executable, "-c", write.removeprefix('python -c "').removesuffix('"'))
    assert "200 images in 10 classes (class 0 20," in copy.script(train_vae, trained["base"])
    assert "200 images in 10 classes (class 0 20," in copy.script(finetune)
    copy.script(evaluate)
    entry = json.loads((copy.folder / "out/npz-dit/metrics.json").read_text())[-1]
    assert entry["settings"]["data_dir"] == "images.npz" and entry["reconstruction"]["DA-VAE"]["images"] == 4


def test_a_metric_every_k_steps_is_logged_and_plotted(forked, trained):
    recipe, copy = forked(6)
    line, = recipe.commands
    line = line.replace("--ema_every=50", "--ema_every=2")
    copy.script(line, trained["dit"], trained["vae"])
    rows = copy.log("out/tiny-ema")
    assert [row["step"] for row in rows if "ema_loss" in row] == [1, 3, 5]
    shown = set().union(*rows) - {"step", "img/s", "lr", "w", "GB"}
    assert Image.open(copy.folder / "out/tiny-ema/loss.png").width == 280 * len(shown)

    # it does not change the training
    copy.script(line.replace("=2", "=100").replace("tiny-ema", "without"), trained["dit"], trained["vae"])
    assert [row["loss"] for row in copy.log("out/without")] == [row["loss"] for row in rows]


def test_a_tracker_gets_every_log_line_of_both_stages(forked, trained):
    recipe, copy = forked(7)
    train_vae, finetune = recipe.commands
    copy.script(train_vae, trained["base"])
    copy.script(finetune, trained["dit"])
    for run in ("out/tracked-vae", "out/tracked"):
        with open(copy.folder / run / "log.csv", newline="") as file:
            rows = [(int(step), name, float(value)) for step, name, value in csv.reader(file)]
        wanted = []
        for line in copy.log(run):
            step = line.pop("step")
            wanted += [(step, name, value) for name, value in line.items()]
        assert rows == wanted and rows[-1][0] == 5
