"""What a thing is, whatever its place: digests by which what was kept is known to belong to what is there.

    of_files(paths, root)      images, tokenizers, weights: their names and contents
    of_source(source, part)    pretrained weights: a run of ours, a file, a folder
    of_run(checkpoint)         all weights by which a run of finetune.py draws

Caches, samples and runs keep the digests of what they were made from. They are used again where it has the
same digest today, wherever it lies.
"""
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from support import files, hub, runs

ALL_BYTES = 512 << 20      # so many bytes are read whole; of more, as many are read in pieces
PIECE = 64 << 10
AT_MOST = 1000             # and no more than so many files


def of_files(paths, root):
    """Sixteen digits of files: their names below the folder `root`, sizes and contents.

    Up to ALL_BYTES are read whole. Of more, AT_MOST files, evenly spread, are read in pieces, evenly spread;
    of the other files, the time of the last change counts in place of the contents.
    A file that cannot be read counts as that.
    """
    paths = [os.fspath(path) for path in paths]
    sizes = [os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths]
    chosen = set(paths)
    allowance = ALL_BYTES
    if sum(sizes) > ALL_BYTES:
        count = min(len(paths), AT_MOST)
        chosen = {paths[i] for i in np.linspace(0, len(paths) - 1, count).astype(int)}
        allowance = ALL_BYTES // count

    def describe(path, size):
        try:
            content = digest_of(path, size, allowance) if path in chosen else os.stat(path).st_mtime_ns
        except OSError:
            content = "unreadable"
        return f"{os.path.relpath(path, root)}\0{size}\0{content}\n"

    with ThreadPoolExecutor(8) as pool:
        lines = list(pool.map(describe, paths, sizes))
    return of_text("".join(lines))


def digest_of(path, size, allowance):
    """SHA-256 of a file, or of pieces of it, from its first byte to its last, of `allowance` bytes in all."""
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
    """Sixteen digits of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def of_source(source, part=""):
    """Sixteen digits of the weights that a path leads to; None if there is nothing.

    source: a run or checkpoint folder of ours, a weight file, a folder of weight files; or the name of one of
            them on Hugging Face, which is fetched: it has the digest of what it is the name of
    part:   the folder in a diffusers pipeline that matters: vae or transformer
    """
    try:
        path = Path(hub.local(source, part))
    except SystemExit:                                             # the load will say why
        return None
    if not source or not path.exists():
        return None
    if path.is_dir() and runs.checkpoints(path):
        path = runs.checkpoints(path)[-1]
    if part and (path / part).is_dir() and not (path / "SHA256SUMS").exists():
        path = path / part
    if path.is_file():
        return of_files([path], path.parent)
    sums = path / "SHA256SUMS"
    if sums.exists():                                              # a checkpoint of ours has them already
        lines = sums.read_text().splitlines()
        return of_text("\n".join(line for line in lines if line.endswith(".safetensors")))
    weights = [file for file in sorted(path.iterdir()) if files.is_weights(file) or files.is_shard(file)]
    return of_files(weights, path)


def of_parts(cfg, vae, train_set):
    """What a run of finetune.py is made of, but for its texts: {part: digest}, for runs.py:Run.made_of."""
    return {
        "images": train_set.fingerprint,
        "captions": of_text(json.dumps(train_set.captions)) if cfg.text else None,
        "classes": None if cfg.text else train_set.classes,
        "vae": runs.hash_of(vae),
        "base": of_source(cfg.base, "transformer"),
    }


def of_run(checkpoint):
    """Sixteen digits of the transformer's weights, of those that adapters leave alone, and of the VAE's."""
    folders = (checkpoint, Path(checkpoint).parent / "frozen", Path(checkpoint).parent / "vae")
    return of_text(" ".join(str(of_source(folder)) for folder in folders))
