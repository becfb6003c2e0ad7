"""Command line, torchrun set-up, checkpoints, EMA and logging; nothing about images, latents or losses belongs here."""
import dataclasses
import difflib
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# ---------------------------------------------------------------- command line


def cli(Config, presets=None, argv=None):
    """Fill the dataclass `Config` from `script.py [first field] --field=value ...`.

    The first field is positional. With `presets` (name -> {field: value}) it names one of them, whose values are
    applied before the flags. Unknown names and wrong types end the program with one sentence and the nearest names.
    """
    argv, fields = list(sys.argv[1:] if argv is None else argv), {f.name: f for f in dataclasses.fields(Config)}
    first = next(iter(fields))
    if "-h" in argv or "--help" in argv:
        print(f"{sys.modules[Config.__module__].__doc__}\nusage: [{first}] --field=value ...\n")
        print(*(f"  --{f.name}={f.default}".ljust(34) + f.metadata["help"] for f in fields.values()), sep="\n")
        print(f"\npresets: {', '.join(presets)}" if presets else "")
        raise SystemExit(0)
    values = {first: argv.pop(0)} if argv and not argv[0].startswith("-") else {}
    for arg in argv:
        name, eq, text = arg.removeprefix("--").partition("=")
        if not (arg.startswith("--") and eq):
            raise SystemExit(f"{arg!r} is not of the form --field=value; --help lists the fields")
        if name not in fields:
            raise SystemExit(f"--{name} is not a field{_nearest(name, fields)}; --help lists them all")
        values[name] = _parse(name, text, type(fields[name].default))
    if presets is None:
        return Config(**values)
    preset = values.get(first, fields[first].default)
    if preset not in presets:
        raise SystemExit(f"no preset {preset!r}{_nearest(preset, presets)}; there are {', '.join(presets)}")
    return Config(**{first: preset, **presets[preset], **values})


def _nearest(name, names):
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _parse(name, text, kind):
    try:
        if kind is bool:
            return {"True": True, "False": False}[text]
        if kind is tuple:
            return tuple(int(part) for part in text.split(",") if part)
        return kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "True or False", tuple: "whole numbers such as 1,2,4", int: "a whole number", float: "a number"}
        raise SystemExit(f"--{name}={text!r}: wanted {wanted[kind]}") from None


def field(default, help):
    """A dataclass field with its one-line explanation, which --help prints."""
    return dataclasses.field(default=default, metadata={"help": help})


# ---------------------------------------------------------------- processes and random numbers


def setup(device="auto"):
    """Join torchrun's process group if there is one.  Returns (rank, world, device); (0, 1, device) without torchrun."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def wait_for_all():
    """Hold every rank here until all have come, so that none reads what rank 0 still writes."""
    if dist.is_initialized():
        dist.barrier()


def micro_batches(batch_size, micro_batch, world):
    """How many forward passes of at most `micro_batch` images each rank accumulates for one step of `batch_size` in all."""
    per_rank, rest = divmod(batch_size, world)
    count = max(1, -(-per_rank // micro_batch))
    if rest or not per_rank or per_rank % count:
        raise SystemExit(f"batch_size {batch_size} is not {world} ranks x equal parts of at most micro_batch {micro_batch}; "
                         f"give --batch_size={max(1, round(batch_size / world / micro_batch)) * micro_batch * world}")
    return count


def seed_step(seed, rank, step):
    """Reseed torch from (seed, rank, step), so that a resumed run draws what the unbroken one would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0]))


# ---------------------------------------------------------------- logging


class Log:
    """One aligned line to the terminal and the same numbers to <run>/log.jsonl, on rank 0 only.

    Lines after step `start`, left by a run that was cut off after its last checkpoint, are dropped.
    """

    def __init__(self, run, rank, start, total):
        self.path, self.on, self.total = Path(run) / "log.jsonl", rank == 0, total
        if self.on and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))

    def __call__(self, step, **numbers):
        if not self.on:
            return
        cells = [f"{k} {v:>8.4f}" if 1e-3 <= abs(v) < 1e4 or v == 0 else f"{k} {v:>8.1e}" for k, v in numbers.items()]
        tqdm.write(f"step {step:>{len(str(self.total))}}/{self.total} | " + " | ".join(cells))
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": step, **numbers}) + "\n")


def write_json(path, obj):
    """Write JSON beside `path` and rename it into place, so that a reader never sees half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(obj, indent=1) + "\n")
    os.replace(temporary, path)


# ---------------------------------------------------------------- checkpoints


def save_folder(final, weights, config, train_state=None):
    """Write <name>.safetensors of {name: state dict}, config.json and train_state.pt aside, flush, rename: never half."""
    final, temporary = Path(final), Path(f"{final}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, state in weights.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary / f"{name}.safetensors")
    if train_state is not None:
        torch.save(train_state, temporary / "train_state.pt")
    write_json(temporary / "config.json", config)
    for path in [*temporary.iterdir(), temporary]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    return final


def save_checkpoint(run, step, weights, train_state, config, keep=2):
    """Write <run>/step_<step>/ with `save_folder`, then prune all but the `keep` newest."""
    final = save_folder(Path(run) / f"step_{step:06d}", weights, config, train_state)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run):
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in Path(run).glob("step_*") if p.name[5:].isdigit() and (p / "config.json").exists()]
    return sorted(found, key=lambda p: int(p.name[5:]))


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


def read_config(checkpoint):
    """The config.json of a checkpoint directory, as a dict."""
    return json.loads((Path(checkpoint) / "config.json").read_text())


def check_resume(saved, cfg, free):
    """Refuse to resume with other settings than the run was started with; fields named in `free` may change, aloud."""
    for name, new in dataclasses.asdict(cfg).items():
        if json.dumps(old := saved.get(name, new)) == json.dumps(new):
            continue
        if name not in free:
            raise SystemExit(f"{cfg.out} was started with {name}={old}, now {name}={new} is asked for: "
                             f"give --{name}={old} to go on, or another --out to start afresh")
        tqdm.write(f"resuming with {name}={new} (was {old})")


def read_state_dict(source):
    """Read a weight file as it is: a .safetensors or torch file, a folder holding one such file, or a dict.

    Pickles are read with weights_only=True and memory-mapped, so nothing in them runs and nothing is held twice.
    raises: SystemExit naming the file, what is wrong with it and what to do.
    """
    if isinstance(source, dict):
        return source
    path = Path(source)
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin")]
        if len(files) != 1:
            raise SystemExit(f"{path}: holds {len(files)} weight files {[p.name for p in files]}; name the one you mean")
        path = files[0]
    if not path.exists():
        raise SystemExit(f"{path}: no such file or folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        problem = ("holds more than tensors (a pickle that may run code), or is damaged, and is not opened; "
                   "save its state dict as safetensors on a machine that trusts it")
    except (EOFError, OSError, RuntimeError, SafetensorError) as error:
        problem = f"not a whole {path.suffix} file ({str(error).splitlines()[0]}); copy it again"
    raise SystemExit(f"{path}: {problem}")


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, for every parameter that is trained."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)


def stop_if_not_finite(norm, model, step):
    """Raise before the update when the gradient norm is not finite, naming the first bad parameter."""
    if not torch.isfinite(norm):
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        raise SystemExit(f"step {step}: gradient norm is {norm.item()}, first bad parameter {bad[0] if bad else 'none'}; "
                         "the weights were not touched. Lower --lr or --clip and run the same command again")
