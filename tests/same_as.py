"""Does this tree compute exactly what another commit computes?  On this machine's CPU, float32, bit for bit.

    python tests/same_as.py main                  # exits 0 if all is equal, else 1 and says what is not
    python tests/same_as.py main --keep=folder    # keeps main's results there: next time only this tree runs

Both trees run COMMANDS, the tiny preset cut short, each in a temporary folder, and are compared by what they
leave there: weights, latents, optimizers, losses, metrics and pixels, but not times or settings. Each stage
builds on those before it, so look at the first that differs. Modules may move from commit to commit, so only
the command line is used. A renamed tensor or number counts as a difference.

Needs torch-fidelity, for the metrics of samples. Takes 50 s a tree on one thread (2026-11-25).
"""
import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"base-vae": "base VAE", "vae": "DA-VAE", "base-dit": "base DiT", "dit": "DA-VAE DiT"}  # folder: stage
TRAIN = "--steps=20 --save_every=20 --log_every=1 --images=64 --device=cpu"
COMMANDS = [
    f"train_vae.py tiny-base --out=base-vae {TRAIN} --stats=32",
    f"train_vae.py tiny --out=vae --base=base-vae {TRAIN} --stats=32 --disc_start=10 --adaptive_align=True",
    f"finetune.py tiny-base --out=base-dit --vae=vae {TRAIN} --sample_steps=5",
    f"finetune.py tiny --out=dit --vae=vae --base=base-dit {TRAIN} --sample_steps=5 --N=10",
    "sample.py dit --n=8 --steps=5 --device=cpu",
    "evaluate.py base-vae --images=8 --features=none --device=cpu",
    "evaluate.py vae --images=8 --features=none --device=cpu",
    "evaluate.py dit --images=8 --n=8 --steps=5 --features=probe --device=cpu",
]
FILES = {                                          # in a run's folder: kind of result
    "**/*.safetensors": "weights, latents",        # of the first and the last step, the VAE's copy, the cache
    "step_*/train_state.pt": "train state",
    "log.jsonl": "losses",
    "summary.json": "metrics",
    "metrics.json": "metrics",
    "**/*.png": "pixels",
    "**/*.npz": "pixels",
}
# "seconds" and "img/s" differ from run to run; "settings" are not results; "results" in a train
# state are copies of numbers in the log and in summary.json, now made at another moment of the save.
IGNORED = ("seconds", "img/s", "settings", "results")
THREADS = os.environ.get("OMP_NUM_THREADS", "1")   # with more, sums are split and rounded differently
SHOWN = 5                                          # how many differences of each stage and kind are printed


# ---------------------------------------------------------------- run

def run_commands(tree, folder):
    """Run COMMANDS of the project in `tree`, with `folder` as working directory.

    raises: SystemExit with the end of the output of the command that failed
    """
    settings = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": THREADS, "KERNELS": "ref"}
    older = "dtype:" not in (Path(tree) / "sample.py").read_text()         # this commit knows only float32
    for command in COMMANDS:
        script, *arguments = f"{command}{'' if older else ' --dtype=float32'}".split()
        since = time.time()
        done = subprocess.run([sys.executable, tree / script, *arguments], cwd=folder, env=settings,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout[-3000:]}\nin {tree}, this failed: python {command}")
        print(f"{time.time() - since:7.1f} s  {script} {arguments[0]}", flush=True)


def run_commit(commit, folder):
    """`run_commands` in a git worktree of `commit`, which is removed afterwards, whatever happened."""
    with tempfile.TemporaryDirectory() as parent:
        tree = Path(parent) / commit[:12]
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            run_commands(tree, folder)
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*arguments):
    """What git prints in this tree.   raises: SystemExit with git's own words"""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout.strip()


# ---------------------------------------------------------------- collect

def collect(folder):
    """{"stage: kind": {name: tensor or number}} of all that COMMANDS left in `folder`.

    raises: SystemExit if a stage left nothing of a kind, so that no kind drops out of the comparison unseen
    """
    results = {f"{stage}: {kind}": {} for stage in RUNS.values() for kind in FILES.values()}
    for run, stage in RUNS.items():
        for pattern, kind in FILES.items():
            for path in sorted((folder / run).glob(pattern)):
                if path.name == "loss.png":
                    continue                       # a plot of the losses, which are compared themselves
                name = str(path.relative_to(folder / run))
                name = re.sub("latents-[0-9a-f]+", "latents", name)   # the hash covers the VAE's tensor names
                results[f"{stage}: {kind}"].update(leaves(read(path), name))
    missing = [key for key, values in results.items() if not values]
    if missing:
        raise SystemExit(f"found nothing to compare of {', '.join(missing)}: FILES must name its files")
    return results


def read(path):
    """The content of a result file: tensors and numbers, in dicts and lists."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return {f"step {row['step']}": row for row in rows}
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    return torch.from_numpy(np.array(Image.open(path)))


def leaves(value, name):
    """(name, tensor or number) of everything in nested dicts and lists, except what is IGNORED."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in IGNORED:
                yield from leaves(part, f"{name}: {key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from leaves(part, f"{name}: {i}")
    elif isinstance(value, (torch.Tensor, int, float)):
        yield name, value


def fingerprint(value):
    """A number in full, or a tensor's dtype, shape and the SHA-256 of its bytes."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    data = value.contiguous().flatten().view(torch.uint8).numpy()
    return f"{value.dtype} {tuple(value.shape)} sha256 {hashlib.sha256(data).hexdigest()}"


# ---------------------------------------------------------------- compare

def difference(old, new, old_value, new_value):
    """How two fingerprints differ, in words; old_value is None if only the old fingerprint was kept."""
    if not isinstance(new_value, torch.Tensor):
        return f"{old} there, {new} here"
    old_form, new_form = (text.split(" sha256 ")[0] for text in (old, new))
    if old_form != new_form:
        return f"{old_form} there, {new_form} here"
    if old_value is None:
        return "other bytes (only hashes were kept)"
    return f"max |difference| {(old_value.double() - new_value.double()).abs().max().item():.3g}"


def compare(old, new, old_values, new_values):
    """Print a line for each stage and kind, with its first differences.  Returns the total number of them.

    old, new: {"stage: kind": {name: fingerprint}}
    old_values, new_values: the same with the values that `collect` found; old_values may be {}
    """
    total = 0
    print(f"\n{'stage: kind of result':<32}{'compared':>9}{'differ':>8}")
    for key in new:
        there, here = old[key], new[key]
        lines = [f"only there: {name}" for name in there if name not in here]
        lines += [f"only here: {name}" for name in here if name not in there]
        common = [name for name in there if name in here]
        for name in common:
            if there[name] != here[name]:
                values = old_values.get(key, {}).get(name), new_values[key][name]
                lines.append(f"{name}: {difference(there[name], here[name], *values)}")
        print(f"{key:<32}{len(common):>9}{len(lines) or 'equal':>8}")
        for line in lines[:SHOWN]:
            print(f"    {line}")
        if len(lines) > SHOWN:
            print(f"    and {len(lines) - SHOWN} more")
        total += len(lines)
    return total


def fingerprints(results):
    """The fingerprint of each tensor and number that `collect` found, in the same dicts."""
    prints = {}
    for key, values in results.items():
        prints[key] = {name: fingerprint(value) for name, value in values.items()}
    return prints


def other_results(commit, keep):
    """(fingerprints, values) of another commit; from the folder `keep` if it has them, with values {}."""
    versions = [torch.__version__, np.__version__, PIL.__version__]
    settings = [*versions, torch.backends.cpu.get_cpu_capability(), THREADS, Path(__file__).read_text()]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    kept = Path(keep) / f"{commit}-{key[:12]}.json"
    if keep and kept.exists():
        print(f"{commit[:12]}: as kept in {kept}")
        return json.loads(kept.read_text()), {}
    print(f"{commit[:12]}:")
    with tempfile.TemporaryDirectory() as folder:
        run_commit(commit, folder)
        values = collect(Path(folder))             # stays readable when its files are gone
    prints = fingerprints(values)
    if keep:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")        # others may be writing the same file
        temporary.write_text(json.dumps(prints, indent=1))
        temporary.replace(kept)
    return prints, values


def main():
    """Returns the exit status: 0 if both trees compute the same, else 1."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("commit", help="what git calls a commit: a hash, branch or tag")
    parser.add_argument("--keep", default="", help="folder for the other commit's results, of one machine")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # so that the worktree is removed then too
    commit = git("rev-parse", "--verify", f"{arguments.commit}^{{commit}}")
    old, old_values = other_results(commit, arguments.keep)
    print("this tree:")
    with tempfile.TemporaryDirectory() as folder:
        run_commands(ROOT, folder)
        new_values = collect(Path(folder))
        total = compare(old, fingerprints(new_values), old_values, new_values)
    if total:
        print(f"\nthis tree does not compute what {commit[:12]} computes: {total} differences")
        return 1
    print(f"\nthis tree computes what {commit[:12]} computes, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
