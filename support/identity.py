"""Digests that identify files by their contents, not their location.

    of_files(paths, root)      images, tokenizers, weights: their names and contents
    of_source(source, part)    pretrained weights: a run of ours, a file, a folder
    of_run(checkpoint)         all weights that a run of finetune.py samples with

Caches, samples and runs store the digests of what they were made from. They are reused only where those
digests still match, even if the files have moved.
"""
import hashlib
import itertools
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from support import files, hub, runs

ALL_BYTES = 512 << 20      # up to this many bytes, everything is read; beyond, pieces of this total size
PIECE = 64 << 10
AT_MOST = 1000             # the most files that pieces are read from

# What config.json next to a base VAE may say about the statistics of its latents.
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "model_name")


def of_files(paths, root):
    """Sixteen-digit digest of files: their names relative to the folder `root`, sizes and contents.

    Up to ALL_BYTES in total, files are read whole. Beyond that, evenly spaced pieces of AT_MOST evenly spaced
    files are read; for the other files, the modification time stands in for the contents.
    A file that cannot be read counts as "unreadable".
    """
    paths = [os.fspath(path) for path in paths]
    sizes, times = zip(*in_threads(size_and_time, paths)) if paths else ((), ())
    chosen = set(paths)
    allowance = ALL_BYTES
    if sum(sizes) > ALL_BYTES:
        count = min(len(paths), AT_MOST)
        chosen = {paths[i] for i in np.linspace(0, len(paths) - 1, count).astype(int)}
        allowance = ALL_BYTES // count

    def describe(number):
        path, size, content = paths[number], sizes[number], times[number]
        if path in chosen:
            try:                                   # a moment's failure would be another digest, another cache
                content = files.read_again(digest_of, path, size, allowance)
            except OSError:
                content = "unreadable"
        return f"{os.path.relpath(path, root)}\0{size}\0{content}\n"

    return of_text("".join(in_threads(describe, range(len(paths)))))


def size_and_time(path):
    """The size of a file (of anything else 0), and the time in ns at which it was last changed."""
    try:
        found = files.read_again(os.stat, path)
    except OSError:
        return 0, "unreadable"
    return found.st_size if stat.S_ISREG(found.st_mode) else 0, found.st_mtime_ns


def in_threads(function, items):
    """[function(x) for x in items], by eight threads, which wait for the disk at once.

    Each takes many items at a time: for a small file, a task of its own would cost more than the reading.
    """
    parts = [items[k:k + 256] for k in range(0, len(items), 256)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda part: [function(x) for x in part], parts)
        return list(itertools.chain.from_iterable(found))


def digest_of(path, size, allowance):
    """SHA-256 of a file; of a file above `allowance` bytes, of evenly spaced pieces of that total size."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        if size <= allowance:
            for block in iter(lambda: f.read(1 << 20), b""):
                digest.update(block)
        else:
            for start in np.linspace(0, size - PIECE, max(2, allowance // PIECE)).astype(int).tolist():
                f.seek(start)
                digest.update(f.read(PIECE))
    return digest.hexdigest()


def of_text(text):
    """Sixteen-digit digest of a string."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def of_source(source, part=""):
    """Sixteen-digit digest of the weights that a path leads to; None if there are none.

    source: a run or checkpoint folder of ours, a weight file, a folder of weight files; or a name on Hugging
            Face, which is downloaded: the digest is that of the downloaded files
    part:   the subfolder of a diffusers pipeline to look at: vae or transformer
    """
    path = place_of(source, part)
    if path is None:
        return None
    if path.is_file():
        return of_files([path], path.parent)
    sums = path / "SHA256SUMS"
    if sums.exists():                                              # a checkpoint of ours has them already
        lines = sums.read_text().splitlines()
        return of_text("\n".join(line for line in lines if line.endswith(".safetensors")))
    weights = [file for file in sorted(path.iterdir()) if files.is_weights(file) or files.is_shard(file)]
    return of_files(weights, path)


def place_of(source, part=""):
    """The weight file, or the folder of weights, that `of_source` looks at; None if there is none."""
    try:
        path = Path(hub.local(source, part))
    except SystemExit:                                             # loading it will say why
        return None
    if not source or not path.exists():
        return None
    if path.is_dir() and runs.checkpoints(path):
        path = runs.checkpoints(path)[-1]
    if part and (path / part).is_dir() and not (path / "SHA256SUMS").exists():
        path = path / part
    return path


def of_statistics(source):
    """Sixteen-digit digest of what files next to a base VAE's weights say about normalising its latents.

    See support/weights.py:latent_statistics.   None if there are no weights
    """
    path = place_of(source, "vae")
    if path is None:
        return None
    folder = path if path.is_dir() else path.parent
    config = files.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    stated = [config.get(name) for name in STATISTICS]
    return of_text(json.dumps(stated) + of_files([folder / "latents_stats.pt"], folder))


def of_vae_parts(cfg, train_set):
    """What a run of train_vae.py is made of: {part: digest}, for support/runs.py:Run.must_be_made_of."""
    return {
        "images": train_set.fingerprint,
        "base": of_source(cfg.base, "vae"),
        "statistics": of_statistics(cfg.base),
        "teacher": "base" if cfg.teacher == "base" else of_source(cfg.teacher),
        "lpips": of_source(cfg.lpips_trunk) if cfg.perceptual != "none" else None,
    }


def of_parts(cfg, vae, train_set):
    """What a run of finetune.py is made of, except its text encoders: {part: digest}, for must_be_made_of."""
    return {
        "images": train_set.fingerprint,
        "captions": of_text(json.dumps(train_set.captions)) if cfg.text else None,
        "classes": None if cfg.text else train_set.classes,
        "vae": runs.hash_of(vae),
        "base": of_source(cfg.base, "transformer"),
    }


def of_run(checkpoint):
    """Sixteen-digit digest of the transformer's weights, those frozen under LoRA included, and the VAE's."""
    folders = (checkpoint, Path(checkpoint).parent / "frozen", Path(checkpoint).parent / "vae")
    return of_text(" ".join(str(of_source(folder)) for folder in folders))
