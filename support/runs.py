"""runs"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from support.ranks import sum_over_ranks


def hold(run, rank):
    """Take a run's folder for this job, as long as the object returned lives.   raises: SystemExit if it is taken."""
    lock = FileLock(Path(run) / ".lock", blocking=False)
    try:
        with disk_may_fail(must=True):
            Path(run).mkdir(parents=True, exist_ok=True)
            return lock.acquire() if rank == 0 else lock
    except Timeout:
        raise SystemExit(f"{run}: another process is training here; wait for it, or give another --out") from None


class Log:
    """One aligned line to the terminal and to <run>/log.jsonl; lines after `start`, left by a run cut off, are dropped."""

    def __init__(self, run, rank, start, total):
        self.path, self.on, self.total = Path(run) / "log.jsonl", rank == 0, total
        if self.on and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            replace(self.path, "".join(k for k in lines if k.endswith("\n") and json.loads(k)["step"] <= start))

    def __call__(self, step, sums, **numbers):
        """sums: {name: () tensor of this rank}, averaged over the ranks, that must all call this.  Returns the averages."""
        values = sum_over_ranks(torch.stack([*sums.values(), torch.ones_like(next(iter(sums.values())))]).float())
        means = dict(zip(sums, (values / values[-1]).tolist()))
        numbers = means | numbers | ({"GB": torch.cuda.max_memory_allocated() / 1e9} if values.is_cuda else {})
        if self.on:
            cells = [f"{k} {v:>8.4f}" if 1e-3 <= abs(v) < 1e4 or v == 0 else f"{k} {v:>8.1e}" for k, v in numbers.items()]
            tqdm.write(f"step {step:>{len(str(self.total))}}/{self.total} | " + " | ".join(cells))
            with disk_may_fail(), open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **numbers}) + "\n")
        return means


def write_json(path, obj):
    replace(path, json.dumps(obj, indent=1) + "\n")


def replace(path, text):
    """Write a text beside `path` and rename it into place, so that a reader never sees half a file."""
    Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


DISK = "No space left|Read-only|quota|File too large|Input/output error|inline_container|PytorchStreamWriter|IoError|I/O error"


@contextlib.contextmanager
def disk_may_fail(must=False):
    """One sentence where the disk refuses what is written in here: then training goes on, or ends if it `must` be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:      # torch's and safetensors' writers wrap the system's error
        if not re.search(DISK, str(error)):
            raise
        sentence = f"not written: {str(error).splitlines()[0]}. Make room or give another --out"
        if must:
            raise SystemExit(f"{sentence}, and run the same command again; earlier checkpoints are whole") from None
        tqdm.write(f"{sentence}; training goes on, and the next save tries again", file=sys.stderr)


def save_folder(final, weights, config, train_state=None):
    """Write <name>.safetensors of {name: state dict}, config.json, train_state.pt and their SHA256SUMS aside, flush, rename."""
    final, temporary = Path(final), Path(f"{final}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, state in weights.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary / f"{name}.safetensors")
        if train_state is not None:
            torch.save(train_state, temporary / "train_state.pt")
        write_json(temporary / "config.json", config)
        replace(temporary / "SHA256SUMS", "".join(f"{sha256(p)}  {p.name}\n" for p in sorted(temporary.iterdir())))
        for path in temporary.iterdir():
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)               # on a full disk, its bytes are wanted


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save_checkpoint(run, step, weights, train_state, config, keep=2):
    """Write <run>/step_<step>/ with `save_folder`, then prune all but the `keep` newest, and what killed saves left."""
    save_folder(Path(run) / f"step_{step:06d}", weights, config, train_state)
    for old in [*checkpoints(run)[:-keep], *Path(run).glob("step_*.tmp")]:
        shutil.rmtree(old)


def checkpoints(run):
    """The complete checkpoints of a run, oldest first."""
    return sorted((p for p in Path(run).glob("step_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def latest_checkpoint(run):
    """The newest complete checkpoint of a run (or `run` itself, if that is one)."""
    found = [Path(run)] if (Path(run) / "config.json").exists() else checkpoints(run)
    if not found:
        raise SystemExit(f"{run}: no checkpoint here ({'an empty run' if Path(run).is_dir() else 'no such folder'}); "
                         "wanted a run folder with step_*/config.json, or one such step folder")
    return found[-1]


def step_of(run):
    """The step of a run's newest checkpoint, -1 if it has none."""
    return int(checkpoints(run)[-1].name[5:]) if checkpoints(run) else -1


def check_whole(path):
    """Refuse a file whose SHA-256 is not the one that the SHA256SUMS beside it holds, and offer the checkpoint before."""
    sums = path.parent / "SHA256SUMS"      # which `sha256sum --check` reads, too
    wanted = dict(reversed(line.split("  ", 1)) for line in sums.read_text().splitlines()) if sums.exists() else {}
    if path.name in wanted and (not path.exists() or sha256(path) != wanted[path.name]):
        steps = checkpoints(path.parent.parent)
        before = steps[:steps.index(path.parent)] if path.parent in steps else []
        raise SystemExit(f"{path}: damaged, it is not what SHA256SUMS beside it says; copy it again, or "
                         + (f"remove {path.parent} to go on from {before[-1]}" if before else "start the run afresh"))


def read_config(checkpoint):
    """The config.json of a checkpoint directory, as a dict."""
    check_whole(Path(checkpoint) / "config.json")
    return json.loads((Path(checkpoint) / "config.json").read_text())


def resume(cfg, free):
    """The checkpoint cfg.out goes on from, None before step 1. Settings not its own are refused, or if `free`, said aloud."""
    latest = checkpoints(cfg.out)[-1] if step_of(cfg.out) > 0 else None
    saved = read_config(latest)["config"] if latest else {}
    for name, new in dataclasses.asdict(cfg).items():
        if json.dumps(old := saved.get(name, new)) != json.dumps(new):
            if name not in free:
                raise SystemExit(f"{cfg.out} was started with {name}={old}, now {name}={new} is asked for: "
                                 f"give --{name}={old} to go on, or another --out to start afresh")
            tqdm.write(f"resuming with {name}={new} (was {old})")
    return latest


def read_state_dict(source):
    """Read a weight file as it is: a .safetensors or torch file, a folder holding one such file, or a dict.
    Pickles are memory-mapped, and nothing in them runs.   raises: SystemExit saying what is wrong with it."""
    if isinstance(source, dict):
        return source
    path = Path(source)
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin")]
        if len(files) != 1:
            raise SystemExit(f"{path}: holds {len(files)} weight files {[p.name for p in files]}; name the one you mean")
        path = files[0]
    check_whole(path)
    if not path.exists():
        raise SystemExit(f"{path}: no such file or folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise SystemExit(f"{path}: holds more than tensors (a pickle that may run code), or is damaged, and is not opened; "
                         "save its state dict as safetensors on a machine that trusts it") from None
    except (EOFError, OSError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"{path}: not a whole {path.suffix} file ({str(error).splitlines()[0]}); copy it again") from None


def hash_of(thing):
    """Sixteen digits of the SHA-256 of bytes, an array, or a module: every name and weight."""
    digest = hashlib.sha256()
    for name, x in thing.state_dict().items() if isinstance(thing, nn.Module) else [("", thing)]:
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if isinstance(x, torch.Tensor) else x)
    return digest.hexdigest()[:16]
