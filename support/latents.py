"""latents"""
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from support import data, ranks, runs

SHARD = 1024                                       # images per file of cached latents


class Latents(data.Dataset):
    """Latents on disk as a data set: the shards of `write_cache`, or those that LightningDiT's own code extracts.

    <folder>/*.safetensors, each with latents, latents_flip (n, C+D, h, w) and labels (n,). LightningDiT's are raw, and are
    normalised here by the VAE's statistics; ours already are, and say so.   raises: SystemExit if the channels are others
    """

    def __init__(self, folder, vae, D):
        paths = sorted(Path(folder).glob("*.safetensors"))
        self.shards = [load_file(path) for path in paths]          # mapped: read as they are used
        self.labels = torch.cat([shard["labels"] for shard in self.shards]).numpy()
        self.classes = [str(k) for k in range(self.labels.max() + 1)]
        self.place = [(n, i) for n, shard in enumerate(self.shards) for i in range(len(shard["labels"]))]
        self.mean, self.std = torch.zeros(vae.C + vae.D), torch.ones(vae.C + vae.D)
        if "vae" not in (safe_open(paths[0], "pt").metadata() or {}):
            self.mean, self.std = (torch.cat([getattr(m, name).cpu() for m in (vae.base, vae)[:1 + (vae.D > 0)]])
                                   for name in ("mean", "std"))
        self.channels = vae.C + D
        if (found := self.shards[0]["latents"].shape[1]) < self.channels:
            raise SystemExit(f"{folder}: latents of {found} channels; wanted {self.channels}, base first")

    def batch(self, indices, flipped):
        """(z_all (n, C+D, h, w) float32, labels (n,)) of images `indices`, mirrored where `flipped`."""
        rows = [self.shards[n]["latents_flip" if flip else "latents"][i, :self.channels]
                for (n, i), flip in zip((self.place[k] for k in indices), flipped)]
        mean, std = (x[:self.channels, None, None] for x in (self.mean, self.std))
        return (torch.stack(rows).float() - mean) / std, torch.from_numpy(self.labels[indices])


def latent_source(vae, train_set, cfg, device, rank, world):
    """A function start -> endless (z_all (b, C+D, h, w), y (b,)) batches of this rank, from a cache or encoded as we go."""
    def encode(x):
        return vae.encode(data.to_tensor(x).to(device), sample=cfg.detail_sample).contiguous()

    def encoded(start):
        stream = data.batches(train_set, cfg.batch_size, cfg.seed, start, rank, world, flip=cfg.flip)
        for step, (x, y) in enumerate(stream, start):
            ranks.seed_step(cfg.seed, rank, step)                 # of z_d's samples, where they are wanted
            yield encode(x)[:, :vae.C + cfg.D], y.to(device)

    def cached(start):
        for step in itertools.count(start):
            plan = data.batch_plan(len(latents), cfg.batch_size, cfg.seed, step, rank, world, cfg.flip)
            yield tuple(x.to(device) for x in latents.batch(*plan))

    latents = train_set
    if not isinstance(train_set, Latents):
        if not cfg.cache:
            return encoded
        folder = write_cache(vae, encode, train_set, cfg, rank, world)
        ranks.wait_for_all()
        latents = Latents(folder, vae, cfg.D)
    return cached


def write_cache(vae, encode, train_set, cfg, rank, world):
    """Encode what is missing of <vae or out>/latents-<hash>, in shards as `Latents` reads them, half; returns the folder.

    Each rank writes its own. The hash covers the VAE's weights and all that fixes images and labels, which each header names;
    so a cache of another VAE or of other images is never read.   raises: SystemExit if the disk is too small.
    """
    about = dict(data_dir=cfg.data_dir, image_size=cfg.image_size, images=len(train_set), crop="centre", flip=cfg.flip,
                 seed=cfg.seed if cfg.data_dir == "procedural" else None, detail="sample" if cfg.detail_sample else "mode",
                 labels="image numbers" if cfg.text else "classes", dtype="float16", normalised=True)
    digest = hashlib.sha256()
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    header = {"vae": digest.hexdigest(), "about": json.dumps(about)}
    key = hashlib.sha256("".join(header.values()).encode()).hexdigest()[:12]
    folder = (Path(cfg.vae) if Path(cfg.vae).is_dir() and runs.checkpoints(cfg.vae) else Path(cfg.out)) / f"latents-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {n: folder / f"{n:05d}.safetensors" for n in range(-(-len(train_set) // SHARD))}
    missing = [n for n in files if not files[n].exists()]
    images = min(SHARD * len(missing), len(train_set))
    size = images * (vae.C + vae.D) * (cfg.image_size // vae.f) ** 2 * 2 * (1 + cfg.flip)
    if size > (free := shutil.disk_usage(folder).free):
        raise SystemExit(f"{folder}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB of latents to write; give --cache=False")
    if missing and rank == 0:
        print(f"{folder}: {images} images to encode, {size / 1e9:.2f} GB of latents; {free / 1e9:.0f} GB free")
    for n in tqdm([n for n in missing if n % world == rank], desc="encoding", disable=rank > 0, mininterval=1):
        shard = {name: [] for name in ("labels", "latents", "latents_flip")[:2 + cfg.flip]}
        for k in range(n * SHARD, min((n + 1) * SHARD, len(train_set)), 64):
            x, y = data.stack(train_set, range(k, min(k + 64, (n + 1) * SHARD, len(train_set))))
            for part, z in zip(shard.values(), (y, x, x.flip(2))):
                part.append(z if part is shard["labels"] else encode(z).half().cpu())
        temporary = files[n].with_suffix(f".tmp{rank}")
        save_file({name: torch.cat(part) for name, part in shard.items()}, temporary, header)
        temporary.replace(files[n])
    return folder
