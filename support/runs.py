"""Run folders: atomic checkpoints, resuming, one job at a time, the log, disks that fail.

    out/tiny/   step_000300/ step_000600/ (the two newest checkpoints), log.jsonl, pictures, summary.json at
                the end, .lock meanwhile; of finetune.py also vae/, frozen/, captions/; of buckets sizes.npz
    step_*/     model.safetensors, ema.safetensors, train_state.pt, config.json, SHA256SUMS

`Run` is how the two training scripts handle their folder. It does not own the training loop: it says which
steps are left and when a checkpoint is due, and writes what it is given.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
from filelock import Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from support import files, hub, ranks, trackers

# ---------------------------------------------------------------- a run, as a training script sees it

# Fields of a Config that are not compared: they change a model by rounding, micro_batch also by other draws.
NO_EFFECT = {"preset", "out", "device", "dtype", "cache", "micro_batch", "checkpointing", "shard", "compile",
             "log_every", "save_every", "track", "dry_run"}

# Fields with the location of what a run is made of: its content is compared (`made_of`). val_dir: nothing is.
SOURCES = {"data_dir", "val_dir", "vae", "base", "base_vae", "text", "lpips_trunk", "teacher"}

# Fields that only matter for a run's pictures, and the flag of sample.py for each.
OF_PICTURES = {"cfg": "cfg", "shift": "shift", "grid": "grid", "sample_steps": "steps"}

# What a run is made of, and the field with its location.
PARTS = {
    "images": "data_dir",
    "captions": "data_dir",
    "classes": "data_dir",
    "vae": "vae",
    "base": "base",
    "statistics": "base",
    "teacher": "teacher",
    "lpips": "lpips_trunk",
    "texts": "text",
}


class Differs(SystemExit):
    """The run in a folder is not the one that was asked for."""


class Run:
    """A run's folder, held by this job: where it resumes, which steps are left, when it saves.

    cfg:  the script's Config; out, steps, save_every, log_every and batch_size are read here
    free: names of fields that may change when a run resumes; none may once it is finished
    raises: SystemExit if another job trains here; Differs if any other field was changed
    """

    def __init__(self, cfg, free, rank):
        trackers.asked_for(cfg)                        # a missing package is reported before all else
        self.cfg = cfg
        self.rank = rank
        self.done = is_finished(cfg)                   # all steps are done, and nothing more is written
        self.lock = None if self.done else hold(cfg.out, rank)     # while this object lives
        self.checkpoint = resume(cfg, () if self.done else free)   # the step folder to resume from, or None
        self.start = 0                                 # the first step of this job
        self.results = {}                              # numbers for the summary; saved in each checkpoint
        self.parts = read_config(self.checkpoint).get("made_of", {}) if self.checkpoint else {}
        self.seconds = 0.0                             # of training, before this job
        self.since = time.time()
        self.needed_by = getattr(cfg, "needed_by", "")     # the run that this is a stage of, or ""
        self.ends_early = False                        # see `save_due`
        self.must_save = False
        self.unreadable = False                        # the next step's images: see `read`
        if self.done:
            self.start = cfg.steps
        elif self.checkpoint:
            state = self.train_state()
            self.start = state["step"]
            self.seconds = state["seconds"]
            self.results = state["results"]
        ranks.must_agree(f"{cfg.out}, the step it is at", self.start)
        self.log = Log(cfg.out, rank, self.start, cfg.steps, cfg.log_every, cfg.batch_size)
        self.trackers = [] if self.done else trackers.open_trackers(cfg, self.start, rank)
        self.log.sinks += self.trackers

    def train_state(self):
        """What the checkpoint holds besides the weights: optimizers, step, seconds."""
        state = read_state_dict(self.checkpoint / "train_state.pt")
        files.refuse_not_finite(state, self.checkpoint / "train_state.pt")
        return state

    def must_be_made_of(self, **parts):
        """Store with each checkpoint what the run is made of: {images, vae, base ...: digest}.

        A part that no longer exists is None, and is not compared. Other images or captions are only reported.
        classes: the list of their names
        raises: Differs if any other part is not the one that the run was started with
        """
        for name, new in parts.items():
            ranks.must_agree(f"{self.cfg.out}, {name}", new)
            old = self.parts.get(name)
            if None in (old, new) or old == new:
                continue
            place = f"--{PARTS[name]}={getattr(self.cfg, PARTS[name])}"
            sentence = f"{self.cfg.out} was started with other {name} than {place} has now"
            if name == "classes":
                sentence += f" ({files.some(old, 20)}; now {files.some(new, 20)})"
            if name in ("images", "captions") and not self.done:
                if self.rank == 0:
                    tqdm.write(f"{sentence}; training continues with these")
                continue
            raise Differs(f"{sentence}: give the original{self.or_another(name)}")
        self.parts |= {name: new for name, new in parts.items() if new is not None}

    def or_another(self, name):
        """The alternative, for the end of that sentence; "" for a stage, where `make_missing` gives it."""
        if self.needed_by:
            return ""
        kept = [f"--{flag}={getattr(self.cfg, flag)}" for flag in ("vae", "base") if
                name == "images" and getattr(self.cfg, flag, "")]
        on_these = f" (with {' '.join(kept)} on what was made before)" if kept else ""
        return f", or another --out to start afresh{on_these}"

    def describe(self, train_set, parameters, sizes, accumulate, world, device):
        """Print what is trained on what, on rank 0."""
        if self.rank > 0:
            return
        cfg = self.cfg
        parameters = list(parameters)
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        each = cfg.batch_size // world // accumulate
        print(f"{cfg.out}: {train_set.summary()}\n"
              f"  {trained:,} trained of {total:,} parameters; {sizes}; "
              f"batch {cfg.batch_size} = {world} ranks x {each} x {accumulate}; "
              f"steps {self.start} to {cfg.steps}, {device}, "
              f"{'bfloat16' if ranks.in_bfloat16(cfg.dtype, device) else 'float32'}")

    def steps(self, stream):
        """Yield (step, batch) for every step that is left.

        Meanwhile, a signal only requests a stop: the program then ends here, after the current step.
        """
        cfg = self.cfg
        self.since = time.time()
        self.log.since = self.since
        bar = tqdm(range(self.start, cfg.steps), initial=self.start, total=cfg.steps, desc=cfg.out,
                   disable=self.rank > 0, mininterval=1)
        after = getattr(cfg, "after", {}).get(cfg.out)     # seconds of the stages to come, see stages.py:plan
        ranks.heed_signals()
        for step, batch in zip(bar, self.read(stream)):
            yield step, batch
            if after:
                left = after + (cfg.steps - step - 1) * (time.time() - self.since) / (step + 1 - self.start)
                bar.set_postfix_str(f"all stages {tqdm.format_interval(left)}", refresh=False)
            if self.ends_early and not self.unreadable:
                if self.rank == 0:
                    tqdm.write(f"{cfg.out}: stopped after step {step + 1}; run the same command to resume")
                self.close_trackers()
                raise SystemExit(0)
        ranks.heed_signals(False)

    def read(self, stream):
        """The batches of a stream, read a step ahead: if one cannot be read, all training is saved first."""
        before = []
        try:
            for batch in stream:
                yield from before
                before = [batch]
        except (SystemExit, ValueError) as error:
            if not ranks.raised_here(error):
                raise
            self.unreadable = True
            yield from before                          # for the last step: `save_due` then lets it be saved
            self.close_trackers()
            raise SystemExit(f"{error}; then run the same command again: it goes on from step "
                             f"{step_of(self.cfg.out)}, the last one saved") from None

    def save_due(self, done):
        """Is a checkpoint due after `done` steps: by save_every (0: never), as the last, or before a stop?

        A stop: by a signal, or if the next images cannot be read. All ranks must ask after each step, because
        it may come to any of them. It sets ends_early: there may be only seconds left, so no pictures are
        drawn.
        """
        last = done == self.cfg.steps
        self.must_save = ranks.asked_to_stop(self.unreadable) or last
        self.ends_early = self.must_save and not last
        return self.must_save or is_due(done, self.cfg.save_every)

    def save(self, done, weights, state, config):
        """Write step_<done>/, on rank 0.

        If the disk refuses, the last save waits for room; after others but the first, training continues.
        weights: {file name: state dict};  state: optimizers and the like;  config: see save_folder
        """
        state = {"step": done, "seconds": self.elapsed(), "results": self.results} | state
        last = self.must_save or done == self.cfg.steps        # also if a resumed run has only this left
        if self.rank == 0:
            for pause in PAUSES if last else [0]:
                with disk_may_fail(must=last or done == 0, pause=pause):
                    save_checkpoint(self.cfg.out, done, weights, state, config | {"made_of": self.parts})
                    break
        ranks.wait_for_all()

    def elapsed(self):
        """Seconds of training, all jobs together."""
        return self.seconds + time.time() - self.since

    def finish(self, stage):
        """Wait for all ranks, write summary.json, release the folder.  Returns the summary."""
        ranks.wait_for_all()
        summary = {"stage": stage, "steps": self.cfg.steps, "seconds": self.elapsed(), **self.results}
        if self.rank == 0:
            with disk_may_fail(must=True):
                write_json(Path(self.cfg.out) / "summary.json", summary)
        self.close_trackers()
        self.lock.release()
        return summary

    def close_trackers(self):
        for tracker in self.trackers:
            tracker.close()

    def summary(self, report=None):
        """The summary of a finished run; prints that it is finished.

        report(cfg): prints more, for a run that is not a stage of another
        """
        if self.rank == 0:
            more = "" if self.needed_by else "; to continue, give more --steps or another --out"
            print(f"{self.cfg.out}: finished at step {self.cfg.steps}{more}")
            if report and not self.needed_by:
                report(self.cfg)
        return read_summary(self.cfg.out)


def is_due(done, every):
    """Is something that happens every `every` steps (0: never) due after `done` steps?"""
    return every > 0 and done % every == 0


def is_finished(cfg):
    """Has the run in cfg.out done its last step, cfg.steps or more, and written its summary?"""
    step = step_of(cfg.out)
    return step >= cfg.steps and read_summary(cfg.out).get("steps") == step


def read_summary(run):
    """The summary.json of a run; {} if there is none, or if a power cut damaged it."""
    try:
        return dict(json.loads((Path(run) / "summary.json").read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return {}


def hold(run, rank):
    """Reserve a run's folder for this job, while the returned lock lives.

    raises: SystemExit if it is taken, or cannot be written to
    """
    if not run:
        raise SystemExit("--out= is empty: wanted the run's folder")
    new = not os.path.lexists(run)
    make_folder(run)
    lock = files.FolderLock(run, new)
    try:
        with disk_may_fail(must=True):
            if rank == 0:
                lock.acquire()
                files.mend(run)                        # after a job that was killed while it saved
    except Timeout:
        raise SystemExit(f"{run}: another process is training here; wait, or give another --out") from None
    ranks.wait_for_all()                               # all resume from what rank 0 has mended
    return lock


def resume(cfg, free):
    """The checkpoint that cfg.out resumes from; None before step 1.

    raises: Differs if a setting differs from the run's; a changed one in `free` is only printed
    """
    if step_of(cfg.out) < 1:
        return None
    if step_of(cfg.out) > cfg.steps:
        raise Differs(f"{cfg.out} is already at step {step_of(cfg.out)}, now steps={cfg.steps} is asked for: "
                      f"give --steps={step_of(cfg.out)} or more, or another --out to start afresh")
    latest = checkpoints(cfg.out)[-1]
    saved = read_config(latest)["config"]
    before = {f.name: f.default for f in dataclasses.fields(cfg)}      # for fields newer than the run
    sampled = {"cache"} if saved.get("detail_sample") else set()       # it decides how often z_d is sampled
    for name, new in dataclasses.asdict(cfg).items():
        old = saved.get(name, before[name])
        if name in (NO_EFFECT | SOURCES) - sampled or json.dumps(old) == json.dumps(new):
            continue
        if name in OF_PICTURES and is_finished(cfg):
            raise Differs(f"{cfg.out} is finished with {name}={old}, which only its pictures depend on; to "
                          f"draw with {new}: python sample.py {cfg.out} --{OF_PICTURES[name]}={new}")
        if name not in free:
            afresh = "" if getattr(cfg, "needed_by", "") else ", or another --out to start afresh"
            raise Differs(f"{cfg.out} was started with {name}={old}, now {name}={new} is asked for: "
                          f"give --{name}={old} to resume{afresh}")
        if ranks.this_rank() == 0:
            tqdm.write(f"resuming with {name}={new} (was {old})")
    return latest


# ---------------------------------------------------------------- the log


class Log:
    """One aligned line to the terminal and <run>/log.jsonl every few steps (0: never), and at the last.

        log.add({"loss": loss, "base": base})      # once or more per step: () tensors of this rank
        log.row(step, lr=lr)                       # after each step; writes a line if one is due
        log.sinks.append(tracker)                  # tracker(step, {name: number}) is called with each line

    A line has, for each name, the mean over the latest step in which it was added, averaged over the ranks
    (which must all add the same names), and the numbers given to `row`. A metric that is added every k steps
    appears in the next line. Lines after `start`, left by an interrupted run, are dropped.
    """

    def __init__(self, run, rank, start, total, every, batch_size):
        self.path = Path(run) / "log.jsonl"
        self.rank = rank
        self.start = start
        self.total = total
        self.every = every
        self.batch_size = batch_size
        self.since = time.time()
        self.added = {}             # name -> the values of this step
        self.means = {}             # name -> the mean over its latest step; none of this waits for the device
        self.latest = {}            # the numbers of the last line
        self.sinks = [self.to_terminal, self.to_file]
        if rank == 0 and self.path.exists():
            kept = [json.dumps(row) + "\n" for row in files.read_rows(self.path) if row["step"] <= start]
            if "".join(kept) != self.path.read_text(errors="replace"):
                with disk_may_fail():
                    files.write_text(self.path, "".join(kept))

    def add(self, numbers):
        """Add this rank's values of a micro-batch, {name: () tensor}; a line shows their mean."""
        for name, value in numbers.items():
            self.added.setdefault(name, []).append(value.detach())

    def row(self, step, **numbers):
        """End a step; write a line if one is due.  numbers: the same on all ranks; None is left out."""
        for name, values in self.added.items():
            self.means[name] = sum(values) / len(values)
        self.added = {}
        if step != self.total and not is_due(step, self.every):
            return
        line = self.averaged()
        line |= {name: float(value) for name, value in numbers.items() if value is not None}
        line["img/s"] = (step - self.start) * self.batch_size / (time.time() - self.since)
        if torch.cuda.is_initialized():
            line["GB"] = torch.cuda.max_memory_allocated() / 1e9
        self.latest = line
        self.means = {}
        if self.rank == 0:
            for sink in self.sinks:
                sink(step, line)

    def averaged(self):
        """The means over all ranks, as floats."""
        if not self.means:
            return {}
        values = torch.stack([value.float() for value in self.means.values()])
        world = ranks.sum_over_ranks(torch.ones_like(values[:1]))
        values = ranks.sum_over_ranks(values) / world
        return dict(zip(self.means, values.tolist()))

    def to_terminal(self, step, line):
        cells = []
        for name, value in line.items():
            plain = value == 0 or 1e-3 <= abs(value) < 1e4
            cells.append(f"{name} {value:>8.4f}" if plain else f"{name} {value:>8.1e}")
        tqdm.write(f"step {step:>{len(str(self.total))}}/{self.total} | " + " | ".join(cells))

    def to_file(self, step, line):
        with disk_may_fail(), open(self.path, "a") as f:
            f.write(json.dumps({"step": step, **line}) + "\n")


# ---------------------------------------------------------------- failures that do not end a run


DISK = ("No space left|Read-only|quota|File too large|Input/output error|I/O error|IoError|"
        "inline_container|PytorchStreamWriter")

PAUSES = (15, 30, 60, 120, 0)      # seconds after each attempt at the last save: only memory has its weights


@contextlib.contextmanager
def disk_may_fail(must=False, what="", instead="another --out", pause=0):
    """If the disk refuses what this block writes, say so in one sentence; exit if it `must` be written.

    what: the file, if the error might not name it;  instead: what the sentence suggests to give
    pause: wait for so many seconds instead, because the block is then tried again
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's error
        if not re.search(DISK, str(error)):
            raise
        name = f"{what}: " if what else ""
        sentence = f"{name}not written: {str(error).splitlines()[0]}. Make room"
        if must and not pause:
            raise SystemExit(f"{sentence} or give {instead}, and run the command again; what was saved is "
                             "intact") from None
        then = f"trying again in {pause} s" if pause else "training continues, and the next save tries again"
        tqdm.write(f"{sentence}; {then}", file=sys.stderr)
        time.sleep(pause)


@contextlib.contextmanager
def picture_may_fail(what):
    """If a picture fails (memory, disk, matplotlib), say so in one sentence; no weights are lost."""
    try:
        yield
    # torch.OutOfMemoryError, of a GPU, is a RuntimeError
    except (OSError, RuntimeError, MemoryError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        tqdm.write(f"{what} not drawn: {reason}; nothing else is lost", file=sys.stderr)


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(run, step, weights, train_state, config):
    """Write <run>/step_<step>/; then remove all but the two newest, and leftovers of killed saves."""
    save_folder(Path(run) / f"step_{step:06d}", weights, config, train_state)
    for old in [*checkpoints(run)[:-2], *Path(run).glob(f"step_*{files.NEW}")]:
        try:
            os.replace(old, old.with_suffix(files.NEW))        # so that half of it is not a checkpoint
            shutil.rmtree(old.with_suffix(files.NEW))
        except OSError as error:                               # such as NFS's, while it is being read
            tqdm.write(f"{old}: not removed ({error.strerror}); the next save tries again", file=sys.stderr)


def save_folder(final, weights, config, train_state=None):
    """Write a folder of weights atomically: to a temporary folder, with SHA256SUMS, flushed, then renamed.

    weights: {name: state dict} -> <name>.safetensors;  config -> config.json;  train_state -> train_state.pt
    """
    final = Path(final)
    temporary = Path(f"{final}{files.NEW}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, state in weights.items():
            tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        if train_state is not None:
            torch.save(train_state, temporary / "train_state.pt")
        write_json(temporary / "config.json", config)
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        files.write_text(temporary / "SHA256SUMS", "".join(sums))
        for path in temporary.iterdir():
            files.flush(path)
        files.replace_folder(final, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)           # a full disk needs its bytes


def checkpoints(run):
    """The complete checkpoints of a run, oldest first: those with a config.json, see `save_folder`."""
    found = [path.parent for path in Path(run).glob("step_*/config.json") if path.parent.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest_checkpoint(run):
    """The newest checkpoint of a run, or `run` itself if it is one.   raises: SystemExit if there is none"""
    if (Path(run) / "config.json").exists():
        return Path(run)
    found = checkpoints(run)
    if not found:
        what = "an empty run" if Path(run).is_dir() else "no such folder"
        others = runs_near(Path(run))
        instead = f"there are {files.some(others, 20)}" if others else "make one: python finetune.py"
        raise SystemExit(f"{run}: no checkpoint here ({what}); wanted a run or one of its step_*: {instead}")
    return found[-1]


def runs_near(folder):
    """The runs that someone who named `folder` may have meant: above, in or next to it; or else in out/."""
    near = [folder.parent, *sorted(folder.glob("*")), *sorted(folder.parent.glob("*"))]
    found = list(filter(checkpoints, near)) or filter(checkpoints, sorted(Path("out").glob("*")))
    return list(dict.fromkeys(map(str, found)))


def newest_run(parent="out"):
    """The run of finetune.py with the newest checkpoint in `parent`; prints its name.

    raises: SystemExit if there is none
    """
    steps = [*Path(parent).glob("*/step_*/config.json"), *Path(parent).glob("*/*/step_*/config.json")]
    for path in sorted(steps, key=os.path.getmtime, reverse=True):
        if read_config(path.parent).get("script") == "finetune.py":
            if ranks.this_rank() == 0:
                print(f"the newest run in {parent}: {path.parent.parent}")
            return str(path.parent.parent)
    raise SystemExit(f"{parent}: no run of finetune.py here; make one (python finetune.py), or name one")


def step_of(run):
    """The step of a run's newest checkpoint, -1 if it has none."""
    found = checkpoints(run)
    return int(found[-1].name[5:]) if found else -1


def read_config(checkpoint):
    """The config.json of a checkpoint directory, as a dict."""
    path = Path(checkpoint) / "config.json"
    check_whole(path)
    return files.read_json(path)


def check_whole(path):
    """raises: SystemExit, naming the previous checkpoint, if a file does not match its folder's SHA256SUMS"""
    sums = path.parent / "SHA256SUMS"                          # `sha256sum --check` reads it too
    if not sums.exists():
        return
    text = sums.read_text(errors="replace")
    wanted = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        wanted[name] = digest
    if not text.endswith("\n"):
        wanted.setdefault(path.name, "nothing: SHA256SUMS itself is cut off")
    if path.name not in wanted or (path.exists() and sha256(path) == wanted[path.name]):
        return
    steps = checkpoints(path.parent.parent)
    before = steps[:steps.index(path.parent)] if path.parent in steps else []
    instead = f"remove {path.parent} to resume from {before[-1]}" if before else "start the run afresh"
    raise SystemExit(f"{path}: damaged, it does not match SHA256SUMS; copy it again, or {instead}")


# ---------------------------------------------------------------- files


def read_state_dict(source):
    """The contents of a weight file: a .safetensors or torch file, a folder with one, shards and their index;
    or a name on Hugging Face. A dict is returned as it is.

    Pickles are memory-mapped, and no code in them runs.
    raises: SystemExit saying what is wrong with the file
    """
    if isinstance(source, dict):
        return source
    path = files.weight_file(Path(hub.local(source)))
    check_whole(path)
    return files.read(path)


def make_folder(folder, instead="another --out"):
    """Create a folder to write to, unless it exists.

    instead: what the error message suggests to give
    raises: SystemExit if it cannot be made or written to
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(f"{folder}: not written: {error.strerror}; wanted a folder to write to, give "
                         f"{instead}") from None


def write_json(path, obj):
    files.write_text(path, json.dumps(obj, indent=1) + "\n")


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_of(thing):
    """Sixteen digits of the SHA-256 of bytes, an array, or a module (every name and weight)."""
    digest = hashlib.sha256()
    named = thing.state_dict().items() if isinstance(thing, nn.Module) else [("", thing)]
    for name, x in named:
        digest.update(name.encode())
        if isinstance(x, torch.Tensor):
            x = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(x)
    return digest.hexdigest()[:16]
