"""Experiment trackers for a run's numbers and pictures: `--track=tensorboard`, `wandb`, or both.

A tracker is a sink of the log (support/runs.py:Log): it is called with each line, (step, {name: number}).
It then also takes the pictures that the run has drawn since the last line: recon_000400.png is "recon" at
step 400. Its package is imported only if the tracker is asked for. Only rank 0 tracks.

log.jsonl has the same numbers, so a tracker that fails, because of the disk or the network, is dropped with
one sentence, and training continues. A resumed run continues the same tracker run: TensorBoard drops what an
interrupted run wrote after its checkpoint, Weights & Biases goes by the id in <out>/wandb_id.txt.
"""
import dataclasses
import importlib.util
import os
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.config import flags


def asked_for(cfg):
    """The names in `--track=a,b`.   raises: SystemExit for one that is unknown or not installed"""
    names = getattr(cfg, "track", "")
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in TRACKERS:
            raise SystemExit(f"--track={names}: wanted {' or '.join(TRACKERS)}, or several, comma-separated")
        package = TRACKERS[name].package
        if package and importlib.util.find_spec(package) is None:
            raise SystemExit(f"--track={names}: {package} is not installed: pip install {package}")
    return found


class Tracker:
    """The base of all trackers: takes lines and new pictures until it fails or is closed.

    One of your own needs `name`, open, numbers, picture and finish; add it to TRACKERS.
    """

    name = ""
    package = ""                                                   # what must be installed
    errors = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError)

    def __init__(self, cfg, start):
        self.cfg = cfg
        self.start = start
        self.step = start
        self.failed = False
        self.seen = times_of(cfg.out) if start else {}             # an earlier job has sent these
        self.attempt(self.open, Path(cfg.out))

    def __call__(self, step, line):
        self.step = step
        self.attempt(self.numbers, step, line)
        self.attempt(self.new_pictures)

    def close(self):
        """Send the pictures drawn after the last line, and finish."""
        self.attempt(self.new_pictures)
        self.attempt(self.finish)
        self.failed = True                                         # nothing more is accepted

    def new_pictures(self):
        for path, time in times_of(self.cfg.out).items():
            if self.seen.get(path) != time:
                self.seen[path] = time
                step, name = step_and_name(path, self.step)
                self.picture(step, name, path)

    def attempt(self, do, *args):
        """do(*args), unless the tracker has already failed; if it fails now, say so, once."""
        if self.failed:
            return
        try:
            do(*args)
        except self.errors as error:
            self.failed = True
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            tqdm.write(f"{self.cfg.out}: {self.name} is dropped ({reason}); training continues, and "
                       "log.jsonl has the numbers", file=sys.stderr)


NUMBERED = re.compile(r"(.+)_(\d{6,})")


def times_of(folder):
    """{picture in a run's folder: modification time}.

    Of recon.png and recon_000400.png, which are identical, the latter; not loss.png: trackers draw losses.
    """
    paths = [path for path in Path(folder).glob("*.png") if path.name != "loss.png"]
    twins = {NUMBERED.fullmatch(path.stem)[1] for path in paths if NUMBERED.fullmatch(path.stem)}
    return {path: path.stat().st_mtime_ns for path in sorted(paths) if path.stem not in twins}


def step_and_name(path, step):
    """(400, "recon") of recon_000400.png; (step, "warm_start") of warm_start.png."""
    numbered = NUMBERED.fullmatch(path.stem)
    return (int(numbered[2]), numbered[1]) if numbered else (step, path.stem)


class TensorBoard(Tracker):
    """Events in <out>/tensorboard; `tensorboard --logdir=out` shows those of all runs in out/."""

    name = "tensorboard"
    package = "tensorboard"

    def open(self, out):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(out / "tensorboard", purge_step=self.start + 1 if self.start else None)
        self.writer.add_text("settings", "\n".join(f"    {flag}" for flag in flags(self.cfg)), self.start)

    def numbers(self, step, line):
        for name, value in line.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step, name, path):
        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def finish(self):
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A wandb run in the project davae, or WANDB_PROJECT; WANDB_MODE=offline keeps it in <out>/wandb.

    wandb takes no step twice: when a resumed run repeats steps, it keeps the first numbers, which are equal.
    Online, it needs `wandb login` beforehand; offline, `wandb sync` uploads the parts of a resumed run.
    """

    name = "wandb"
    package = "wandb"

    def open(self, out):
        import wandb
        self.wandb = wandb
        self.errors = (*self.errors, wandb.Error)
        kept = out / "wandb_id.txt"
        if not kept.exists() or not self.start:
            kept.write_text(os.urandom(6).hex())
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "davae", name=out.name, id=kept.read_text().strip(),
            resume="allow", dir=out, config=dataclasses.asdict(self.cfg),
            settings=wandb.Settings(console="off"))

    def numbers(self, step, line):
        self.run.log(line, step=step)

    def picture(self, step, name, path):
        picture = self.wandb.Image(str(path), caption=f"step {step}")
        self.run.log({name: picture}, step=self.step)              # the line's step; wandb's may not go back

    def finish(self):
        self.run.finish()


TRACKERS = {tracker.name: tracker for tracker in (TensorBoard, WeightsAndBiases)}


def open_trackers(cfg, start, rank):
    """The trackers that cfg.track names, for a run that resumes at step `start`; only on rank 0, else []."""
    names = asked_for(cfg)
    return [TRACKERS[name](cfg, start) for name in names] if rank == 0 else []
