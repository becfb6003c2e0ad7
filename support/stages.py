"""What a run depends on: the stages its preset names, where they are kept, and about how long they take.

    base VAE -> DA-VAE -> base DiT, on the DA-VAE's base channels -> DA-VAE DiT

A preset's `vae` and `base` are folders of other presets, which are trained if they do not exist yet. The
training scripts are passed in as Makers, because nothing in support/ imports a script.
"""
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from support import checks, config, data, ranks, runs
from support.latents import Latents


@dataclass
class Maker:
    """A training script.

    makes: what it makes without details (D = 0), and with them
    main(cfg): the script itself;  trial(cfg, n, device, known, classes): see train_vae.py:trial
    """
    script: str
    makes: tuple[str, str]
    presets: dict
    Config: type
    main: Callable
    trial: Callable


# ---------------------------------------------------------------- where the stages are kept


def settle(cfg):
    """If cfg names a base VAE, move its preset's folders into one specific to its images and that base.

    Folders given on the command line stay. Captions are encoded by the base's own encoders.
    """
    if not getattr(cfg, "base_vae", ""):
        return
    given = getattr(cfg, "given", ())
    if cfg.text and "text" not in given:
        cfg.text = cfg.base
    for flag in {"out", "vae", "base"} - set(given):
        setattr(cfg, flag, at_home(getattr(cfg, flag), cfg))


def at_home(folder, cfg):
    """A preset's folder; for a run with its own base VAE, out/photos -> out/<images>-<base>/photos."""
    base_vae = getattr(cfg, "base_vae", "")
    if not base_vae or not folder.startswith("out/"):
        return folder
    images = [name for name in Path(cfg.data_dir).parts[-2:] if name not in ("/", "..", "train")]
    base = Path(base_vae)
    base = base.stem if base.suffix in (".safetensors", ".pt", ".pth", ".ckpt") else base.name
    return f"out/{images[-1] if images else 'images'}-{base}/{folder.removeprefix('out/')}"


def preset_of(run, cfg, maker):
    """The Config of a run that cfg needs, if its folder is that of one of `maker`'s presets; else None."""
    for preset, values in maker.presets.items():
        home = {key: at_home(values[key], cfg) for key in ("out", "vae", "base") if key in values}
        if os.path.realpath(home["out"]) != os.path.realpath(run):
            continue
        same = {field: getattr(cfg, field) for field in ("device", "data_dir", "track")}
        if cfg.dtype != "auto":                        # else the preset's
            same["dtype"] = cfg.dtype
        stage = maker.Config(**{"preset": preset, **values, **home, **same})
        take_base(stage, cfg)
        return stage
    return None


def take_base(stage, cfg):
    """Pass cfg's base VAE and its LPIPS weights on to a stage that is trained before it."""
    base_vae = getattr(cfg, "base_vae", "")
    if base_vae and hasattr(stage, "base_vae"):
        stage.base_vae = base_vae
    elif base_vae and stage.D:
        stage.base = base_vae
    if getattr(cfg, "lpips_trunk", "") and hasattr(stage, "lpips_trunk"):
        stage.lpips_trunk = cfg.lpips_trunk


def make_missing(cfg, makers):
    """Train (or finish) the runs that cfg names and that presets make, and announce them.

    A finished run must match what its preset would now make of cfg.data_dir, unless the user named it: then
    it is used as it is.
    raises: SystemExit saying what differs
    """
    for flag, maker, stage in stages_of(cfg, makers):
        stage.after = getattr(cfg, "after", {})
        stage.needed_by = cfg.out
        if not runs.is_finished(stage) and ranks.this_rank() == 0:
            step = runs.step_of(stage.out)
            state = "does not exist yet" if step < 0 else f"is at step {step} of {stage.steps}"
            print(f"\n{cfg.out} needs {stage.out}, which {state}: running\n"
                  f"    {config.command(maker.script, stage, maker.presets)}")
        try:
            maker.main(stage)
        except runs.Differs as difference:
            anew = "; or rename the folder of images to train everything anew"
            raise SystemExit(f"{difference}; or give --{flag}={stage.out} to use it as it is"
                             f"{anew if getattr(cfg, 'base_vae', '') else ''}") from None


def stages_of(cfg, makers):
    """[(flag, Maker, Config)] of the runs that cfg names by --vae and --base and that presets make.

    A finished run that the user named is left out: it is used, whatever it was made of.
    """
    found = []
    for flag in ("vae", "base"):
        run = getattr(cfg, flag, "")
        named = flag in getattr(cfg, "given", ())
        if not run or (named and runs.read_summary(run).get("steps") == runs.step_of(run)):
            continue
        for maker in makers:
            stage = preset_of(run, cfg, maker)
            if stage is not None:
                found.append((flag, maker, stage))
    return found


def follow(run, makers):
    """[the command of the first preset that is trained on this run of train_vae.py], [] if there is none.

    On a DA-VAE, a preset of finetune.py with as many details; on a base VAE, another VAE.
    run: the Config of the run
    """
    flag = "vae" if run.D else "base"
    for maker in makers:
        for preset, values in maker.presets.items():
            if values.get(flag) == run.out and (run.D == 0 or values["D"] == run.D):
                cfg = maker.Config(**{"preset": preset, **values, "data_dir": run.data_dir})
                return [config.command(maker.script, cfg, maker.presets)]
    return []


# ---------------------------------------------------------------- the plan


def missing(cfg, maker, makers):
    """[(Maker, Config)] of the unfinished runs that cfg, a run of `maker`, needs, then cfg's own, in the
    order of training.
    """
    found = []
    for _, other, stage in stages_of(cfg, makers):
        if not runs.is_finished(stage):
            found += [entry for entry in missing(stage, other, makers) if entry not in found]
    return [*found, (maker, cfg)]


def check_script(run, script):
    """raises: SystemExit if the checkpoints in a run's folder are another script's than this one"""
    steps = runs.checkpoints(run)
    found = runs.read_config(steps[-1]).get("script", script) if steps else script
    if found != script:
        raise SystemExit(f"{run}: holds a run of {found}, with which {script} cannot go on; give another "
                         "--out, or rename that folder")


def check_base_vae(cfg, stages):
    """raises: SystemExit if a DA-VAE is to be trained on a preset's base VAE that does not exist"""
    if getattr(cfg, "base_vae", None) != "":           # the user's own: checked when it is loaded
        return
    made = [stage.out for _, stage in stages]
    for maker, stage in stages:
        needed = maker.makes[1] == "DA-VAE" and stage.D > 0
        if needed and stage.base not in made and "/" not in stage.base and not Path(stage.base).exists():
            begun = ""
            if runs.checkpoints(stage.out):
                begun = (f" (it is at step {runs.step_of(stage.out)} of {stage.steps}; to use it as it is, "
                         "rename its folder and pass that as --vae=)")
            raise SystemExit(f"{stage.out} cannot be trained{begun}: its base VAE, {stage.base}, is missing; "
                             "give one with --base_vae=FILE, FOLDER or org/name (docs/recipes.md, your own "
                             "photos)")


def before_dry_run(cfg, makers):
    """Print the stages to be trained before cfg.  Returns (`known_stages`, number of classes of the images).

    If the images are not here, ImageNet's 1,000 classes are assumed.
    """
    settle(cfg)
    stages = missing(cfg, makers[-1], makers)
    if len(stages) > 1:
        show(stages, {}, 0)
    classes = 1000
    if cfg.data_dir == "procedural" or Path(cfg.data_dir).is_dir() and not Latents.are_in(cfg.data_dir):
        images = data.open_dataset(cfg.data_dir, cfg.image_size, cfg.images, cfg.seed)
        classes = len(images.classes)
        print(f"{cfg.out}: {images.summary()}")
    known = known_stages(cfg, makers)
    if cfg.base in known:
        for name in ("p", "E", "depth", "A"):          # the widened model has its base's
            setattr(cfg, name, getattr(known[cfg.base], name))
    return known, max(1, classes)


def known_stages(cfg, makers):
    """{folder: Config} of all runs that cfg needs and that presets make, whether they exist or not."""
    found = {}
    for _, _, stage in stages_of(cfg, makers):
        found |= known_stages(stage, makers) | {stage.out: stage}
    return found


def plan(cfg, makers, rank, device):
    """Print what will be trained, where, and about how long it takes here; once, before training starts.

    Prints nothing for a run that needs no other. Times come from three or more passes of each stage on noise,
    which do not affect the training. For text-conditional models, whose transformers may not fit here, only
    the order is printed. Sets cfg.after: {run's folder: seconds of what follows it}, for the progress bars.
    raises: SystemExit if cfg's folder holds a run of the other script, or --images= has no effect
    """
    planned = hasattr(cfg, "after")                    # as a stage of another run
    if not planned:
        settle(cfg)
    check_script(cfg.out, makers[-1].script)
    if planned:
        return
    checks.check_images(cfg)
    cfg.after = {}
    stages = missing(cfg, makers[-1], makers)
    if len(stages) < 2 or runs.is_finished(cfg) or rank > 0:
        return
    check_base_vae(cfg, stages)
    classes = 0
    if not Latents.are_in(cfg.data_dir):
        images = data.open_dataset(cfg.data_dir, cfg.image_size, cfg.images, cfg.seed)
        classes = len(images.classes)
        print(f"{cfg.out}: {images.summary()}")

    known, times, size = {}, {}, 0
    timed = [] if getattr(cfg, "text", "") else stages
    if timed:
        print("timing a few steps of each stage", flush=True)
    for maker, stage in timed:
        try:
            passes = ranks.accumulation(stage.batch_size, stage.micro_batch, ranks.world_size())
            n = stage.batch_size // ranks.world_size() // passes
            model, step = maker.trial(stage, n, device, known, classes)
        except (SystemExit, ValueError) as refusal:
            raise refused(refusal, maker, stage, cfg) from None
        known[stage.out] = model
        left = stage.steps - max(0, runs.step_of(stage.out))
        times[stage.out] = left * passes * seconds_of(step, device)
        size += 3 * 16 * sum(p.numel() for p in model.parameters())       # weights, average, AdamW; 3 saves
    show(stages, times, size)
    later = 0.0
    for _, stage in reversed(timed):
        cfg.after[stage.out] = later
        later += times[stage.out]


def refused(refusal, maker, stage, cfg):
    """Why a stage cannot be trained; if it is another's and of its flags, also how to give it others."""
    if stage is cfg or not str(refusal).startswith("--"):
        return refusal
    flag = "vae" if maker.makes[stage.D > 0] == "DA-VAE" else "base"
    command = config.command(maker.script, stage, maker.presets)
    return SystemExit(f"{refusal}\n({stage.out} refuses, which {cfg.out} needs. It takes no flags of "
                      f"this command: train it first, with what you change, by\n    {command}\n"
                      f"and then give --{flag}={stage.out})")


def seconds_of(step, device):
    """Seconds per call of step(): the mean over a third of a second, and over at least three calls.

    Three warm-up calls come first: the first call of a shape is slower, and crops may have three sizes.
    """

    def finished():
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.time()

    for _ in range(3):
        since = finished()
    now, count = since, 0
    while count < 3 or now - since < 0.3:
        now = finished()
        count += 1
    return (now - since) / count


def show(stages, times, size):
    """Print the plan as a table.   times: {folder: seconds}, {} if unknown; size: bytes of checkpoints"""
    width = max(len(stage.out) for _, stage in stages) + 2
    print(f"{'to train':<12}{'folder':<{width}}{'steps':>8}   about")
    for maker, stage in stages:
        told = minutes(times[stage.out]) if times else "not timed"
        print(f"{maker.makes[stage.D > 0]:<12}{stage.out:<{width}}{stage.steps:>8}   {told}")
    if times:
        total = minutes(sum(times.values()))
        folder = Path(stages[-1][1].out).absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        print(f"about {total} of training in all, estimated from a few steps on noise; "
              f"at most {size / 1e9:.1f} GB of checkpoints, {free / 1e9:.0f} GB free", flush=True)


def minutes(seconds):
    """A time in words, no more precise than it is known."""
    if seconds < 90:
        return f"{max(1, round(seconds / 5)) * 5} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
