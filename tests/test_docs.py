"""README.md and docs/: the names and links in them exist, and the commands they show run."""
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.config import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md"))]

# The commands of recipes.md need the recipes' changes: tests/test_recipes.py applies and runs them.
WITH_COMMANDS = [page for page in PAGES if page.name != "recipes.md"]

# ---------------------------------------------------------------- each command, and its toy size


# A preset's own folder would be trained to its last step, so it is written with a dot: ./out/...
PHOTO_VAE = "--steps=2 --batch_size=2 --micro_batch=2 --stats=8"
PHOTO_DIT = "--steps=2 --batch_size=4 --micro_batch=4 --sample_steps=2"
VAE = f"{PHOTO_VAE} --images=32"                                   # a number of built-in images
DIT = f"{PHOTO_DIT} --images=32"
DRAW = "--n=4 --batch_size=2 --steps=2"
MEASURE_VAE = "--images=8"
MEASURE = f"{MEASURE_VAE} --n=8 --batch_size=4 --steps=2"
LOOK = "--images=12"

# Run before the first command of a page.
BEFORE = {
    "python train_vae.py tiny-base": VAE,
    "python train_vae.py tiny": f"{VAE} --base=./out/tiny-base-vae",
    "python finetune.py tiny-base": f"{DIT} --vae=./out/tiny-vae",
    "python train_vae.py photos --base=weights/taef2 --data_dir=my_photos":
        f"{PHOTO_VAE} --image_size=256 --crop=64 --perceptual=none --out=out/my-vae",
    "python finetune.py photos-base --data_dir=my_photos":
        f"{PHOTO_DIT} --vae=out/my-vae --out=out/my-base --E=32 --depth=1",
}

# {command as shown: the flags added to it}, without those that a page says are "not run".
TOY = {
    "python finetune.py": f"{DIT} --vae=./out/tiny-vae --base=./out/tiny-base",
    "python finetune.py --steps=900": f"{DIT} --vae=./out/tiny-vae --base=./out/tiny-base --steps=4",
    "python sample.py out/tiny": DRAW,
    "python sample.py out/tiny/step_000420": f"{DRAW} --run=out/tiny/step_000002 --out=out/some-samples",
    "python evaluate.py out/tiny": MEASURE,
    "python evaluate.py out/tiny-vae": MEASURE_VAE,
    "python evaluate.py out/tiny-base": MEASURE,
    "python evaluate.py compare out/tiny out/tiny-base": "",
    "python evaluate.py report out/tiny --out=docs/demo.html": "--images=2 --n=4",
    "python train_vae.py tiny --align=0 --out=out/no-align": f"{VAE} --base=./out/tiny-base-vae",
    "python docs/walkthrough.py": f"{LOOK} --steps=2 --out=printed",
    "python experiments/sensitivity.py out/tiny-vae --images=200": LOOK,
    "python experiments/knockout.py out/tiny-vae --images=200": LOOK,
    "python experiments/levels.py out/tiny-vae --images=200": LOOK,
    "python train_vae.py tiny --keep_levels=0,8,16,24 --out=out/levels": f"{VAE} --base=./out/tiny-base-vae",
    "python experiments/levels.py out/levels --other=out/tiny-vae": LOOK,
    "python finetune.py tiny --vae=out/levels --keep_levels=0,8,16,24 --out=out/tiny-levels":
        f"{DIT} --base=./out/tiny-base",
    "python sample.py out/tiny-levels --keep=8": DRAW,
    "python experiments/losses.py out/tiny": LOOK,
    "python experiments/timebins.py out/tiny --images=500": f"{LOOK} --bins=2",
    "python experiments/spectrum.py out/tiny-vae --other=out/no-align": LOOK,
    "python experiments/latents.py out/tiny-vae --other=out/no-align": LOOK,
    "python experiments/tsne.py out/tiny-vae --other=out/no-align": LOOK,
    "python experiments/sizes.py out/tiny-vae --sizes=32,0 --images=100": LOOK,
    "python train_vae.py photos --base=weights/taef2 --data_dir=photos/train "
    "--lpips_trunk=squeezenet1_1_features.pth": f"{PHOTO_VAE} --image_size=256 --crop=64",
    "python train_vae.py photos-quick --base=weights/taef2 --data_dir=photos/train":
        f"{PHOTO_VAE} --image_size=256 --crop=64",
    "python experiments/sizes.py out/photos-vae --other=out/photos-quick-vae --data_dir=kodak --images=24 "
    "--sizes=0 --tiled=2048 --lpips_trunk=squeezenet1_1_features.pth": "--tiled=256 --halvings=0",
    "python train_vae.py tiny-base --out=out/drawings-base --r=1 --C=32 --groups=4 --steps=1500 "
    "--dtype=bfloat16": VAE,
    "python train_vae.py tiny --base=out/drawings-base --out=out/drawings-vae --D=96 --fit=closed "
    "--train=all --detail_dropout=0 --lr=3e-4 --warmup=20 --steps=300 --gan=0.1 --disc_start=100 --disc_lr=1 "
    "--dtype=bfloat16": VAE,
    "python experiments/sizes.py out/drawings-vae --sizes=48,0 --tiled=256 --halvings=0 --images=10": LOOK,
    "python finetune.py photos --data_dir=my_photos --base_vae=weights/taef2 "
    "--lpips_trunk=squeezenet1_1_features.pth": f"{PHOTO_DIT} --vae=out/my-vae --base=out/my-base",
    "python sample.py out/my_photos-taef2/photos": DRAW,
    "python finetune.py photos-base --data_dir=photos/train":
        f"{PHOTO_DIT} --vae=./out/photos-vae --E=32 --depth=1",
    "python finetune.py photos --data_dir=photos/train":
        f"{PHOTO_DIT} --vae=./out/photos-vae --base=./out/photos-base",
    "python sample.py out/photos": DRAW,
    "python evaluate.py out/photos-vae --data_dir=photos/eval --whole=True --perceptual=squeeze "
    "--lpips_trunk=squeezenet1_1_features.pth": "",
    "python evaluate.py out/photos --data_dir=photos/eval --lpips_trunk=squeezenet1_1_features.pth": MEASURE,
    "python evaluate.py out/photos-vae --data_dir=kodak --whole=True --perceptual=squeeze "
    "--lpips_trunk=squeezenet1_1_features.pth": "",
    "python experiments/sizes.py out/photos-vae --data_dir=kodak --images=6 "
    "--lpips_trunk=squeezenet1_1_features.pth": "--sizes=64,0 --halvings=0",
    "python experiments/budget.py": "",
    "python finetune.py imagenet512 --dry_run=True": "",
    "python finetune.py sd35m-1024 --dry_run=True": "",
    "python finetune.py sd35m-2048 --dry_run=True": "",
    "python finetune.py klein-1024 --dry_run=True": "",
    "python finetune.py klein-2048 --dry_run=True": "",
}

EXEMPT = r"pip install|pytest|python -m kernels.bench --device=cpu"      # test_bench.py runs kernels.bench
COMMAND = r"(\w+=\w+ )*(python|torchrun|pip|pytest) .*"


# ---------------------------------------------------------------- reading the pages


def blocks(page):
    """[(the last line before it, its lines)] of a page's fenced blocks, continued lines joined."""
    found, inside, before = [], None, ""
    for line in page.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            if inside is None:
                inside = []
            else:
                found.append((before, inside))
                inside, before = None, ""
        elif inside is not None:
            inside.append(line)
        elif line.strip():
            before = line
    return found


def commands(page):
    """[(command, is it marked not run?)] of a page, without comments and exempt commands."""
    found = []
    for before, lines in blocks(page):
        not_run = "not run" in f"{before} {lines[:1]}"
        for line in lines:
            if line.startswith("    "):                            # printed by a job that makes a stage
                continue
            for part in re.sub(r"\s#.*", "", line).split("&&"):
                command = " ".join(part.split())
                if re.fullmatch(COMMAND, command) and not re.match(EXEMPT, command):
                    found.append((command, not_run))
    return found


def parse(command):
    """(script, its Config with these flags).   raises: SystemExit for an unknown field, preset or value"""
    words = [word for word in shlex.split(command) if word != "--"]
    while "=" in words[0]:                                         # KERNELS=triton
        words.pop(0)
    starter, *words = words
    while starter == "torchrun" and words[0].startswith("--"):
        words.pop(0)
    if words[0] == "-m":
        source = (ROOT / f"{words[1].replace('.', '/')}.py").read_text()
        assert all(flag.split("=")[0] in source for flag in words[2:])
        return words[1], words[2:]

    script, *flags = words
    assert (ROOT / script).exists(), f"{command}: no such script"
    if script.startswith("docs"):
        return script, flags                                       # no module; runs in the slow test
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if script == "evaluate.py" and flags[0] == "compare":
        return script, flags[1:]
    if script == "evaluate.py" and flags[0] == "report":
        return script, cli(module.ReportConfig, argv=flags[1:])
    if script == "sample.py" and flags[0] in ("text", "export"):
        from support import text, weights
        Config = {"text": text.TextConfig, "export": weights.ExportConfig}[flags.pop(0)]
        return script, cli(Config, argv=flags)
    Config = getattr(module, "Config", None) or module.shared.Config
    return script, cli(Config, getattr(module, "PRESETS", None), argv=flags)


def defined(tree):
    """{name: node} of what a module or a class defines."""
    names = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return names


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---------------------------------------------------------------- names and links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_a_page_names_exists(page):
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", page.read_text()):
        node = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            assert part in defined(node), f"{page.name} names {file}:{name}, which does not exist"
            node = defined(node)[part]


def test_the_readme_says_where_each_equation_is():
    text = README.read_text()
    assert len(re.findall(r"`\w+\.py:[\w.]+`", text)) > 15
    assert all(f"Eq. {number}" in text for number in ("3, 4", "12, 13"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_and_link_on_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}: no such heading"


@pytest.mark.house
def test_each_recipe_applies_to_the_current_sources():
    diffs = re.findall(r"(?ms)^```diff\n(.*?)^```", (ROOT / "docs/recipes.md").read_text())
    assert len(diffs) == 7
    for diff in diffs:
        done = subprocess.run(["git", "apply", "--check", "-"], cwd=ROOT, input=diff, capture_output=True,
                              text=True)
        assert done.returncode == 0, f"{done.stderr}\nthe source was changed: change docs/recipes.md, too"


@pytest.mark.house
def test_the_pictures_are_small():
    pictures = list(ROOT.glob("docs/**/*.png"))
    assert len(pictures) > 5
    assert sum(path.stat().st_size for path in pictures) < 1_000_000
    for path in pictures:
        Image.open(path).verify()


@pytest.mark.house
def test_every_picture_is_shown():
    text = " ".join(page.read_text() for page in PAGES)
    assert not [path.name for path in ROOT.glob("docs/**/*.png") if f"pictures/{path.name})" not in text]


@pytest.mark.house
def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


@pytest.mark.house
def test_the_readme_names_every_script_and_folder():
    scripts = {path.name for path in ROOT.glob("*.py")}
    rooms = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")} | {"docs/"}
    listed = re.findall(r"^(\w+(?:\.py|/))  ", README.read_text(), re.M)
    assert set(listed) == scripts | rooms


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_every_command_has_existing_fields_and_is_run_or_marked_not_run(page):
    for command, not_run in commands(page):
        assert not_run or command in TOY, f"{page.name}: {command!r} is not tested: add it to TOY"
        parse(command)


def test_every_toy_size_belongs_to_a_command_on_a_page():
    shown = {command for page in WITH_COMMANDS for command, not_run in commands(page) if not not_run}
    assert set(TOY) == shown


def run(command, flags, folder):
    """Run a command that a page shows, with flags added to it, in a folder."""
    _, script, *words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words, *shlex.split(flags)], cwd=folder, text=True,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{command} {flags}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with what the commands assume: photos, weights, and the runs before the first command."""
    from support import data
    from support.bases import TAEF2
    from support.metrics import import_torchvision
    from support.weights import save_base_vae
    folder = tmp_path_factory.mktemp("begun")

    drawings = data.open_dataset("procedural", 128, 24, 0)
    places = {"photos/train/cats": 8, "photos/train/dogs": 8, "photos/eval/cats": 4, "photos/eval/dogs": 4,
              "kodak": 2, "my_photos/cats": 6, "my_photos/dogs": 6}
    i = 0
    for place, count in places.items():
        (folder / place).mkdir(parents=True)
        for _ in range(count):
            pixels, _ = drawings.image(i % 24)
            image = Image.fromarray(pixels)
            image = image.crop((0, 0, 128, 96)) if place == "kodak" else image
            image.save(folder / place / f"{i}.png")
            i += 1

    torch.manual_seed(0)
    save_base_vae(TAEF2(), folder / "weights/taef2")
    import_torchvision()
    from torchvision.models import squeezenet1_1
    torch.save(squeezenet1_1(weights=None).features.state_dict(), folder / "squeezenet1_1_features.pth")
    for command, flags in BEFORE.items():
        run(command, flags, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_on_a_page_run_one_after_another(page, begun, tmp_path):
    folder = tmp_path / "clone"
    shutil.copytree(begun, folder)
    done = set()
    for command, not_run in commands(page):
        if not not_run and command not in done:
            run(command, TOY[command], folder)
            done.add(command)
