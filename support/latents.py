"""Where stage 2 gets its latents: encoded on the fly, or encoded once into a cache on disk.

    source = latent_source(vae, train_set, cfg, device, rank, world)
    for z_all, y in source(start): ...             # endless; the batches of step start, start + 1, ...

`encoded_steps` encodes each batch; `cached_steps` reads batches from `Latents`, a folder of shards that
`write_cache` wrote beforehand. Either way the step number and the seed alone determine a step's images and
which of them are mirrored. Cached latents are rounded to half precision; and with --detail_sample=True a
cache holds one sample of z_d per image, where `encoded_steps` draws a new one each time.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from support import data, files, identity, levels, ranks, runs
from support.buckets import Buckets

SHARD = 1024                                       # images per file of cached latents
AT_ONCE = 64                                       # images encoded at once, fewer of large ones


# ---------------------------------------------------------------- the stream of a training run


def latent_source(vae, train_set, cfg, device, rank, world):
    """A function: source(start) -> endless (z_all (b, C+D, h, w), y (b,)) of this rank, from step `start` on.

    z_all is on `device`, y on the CPU, where captions are looked up.
    train_set: images (in buckets or not), or `Latents`; cfg: stage 2's Config. With cfg.cache, this call
    encodes the images.
    """
    if isinstance(train_set, Latents):
        return functools.partial(cached_steps, train_set, cfg, device, rank, world)
    if not cfg.cache:
        return functools.partial(encoded_steps, vae, train_set, cfg, device, rank, world)
    folder = write_cache(vae, train_set, cfg, device, rank, world)
    in_buckets = isinstance(train_set, Buckets)
    latents = LatentsInBuckets(train_set, folder, vae, cfg.D) if in_buckets else Latents(folder, vae, cfg.D)
    wanted = sum(map(len, train_set.parts)) if in_buckets else len(train_set)
    if len(latents) != wanted:                                     # the rest is on another machine's disk
        raise SystemExit(f"{folder}: process {rank} finds {len(latents)} latents of {wanted} images; wanted "
                         "a disk that all machines share")
    return functools.partial(cached_steps, latents, cfg, device, rank, world)


def open_training_set(cfg, vae):
    """Images, or latents of images: extracted by LightningDiT's own code, or a cache of ours.

    raises: SystemExit if another VAE made that cache
    """
    if Latents.are_in(cfg.data_dir):
        latents = Latents(cfg.data_dir, vae, cfg.D)
        if latents.made_by not in ("raw", runs.hash_of(vae)):
            raise SystemExit(f"{cfg.data_dir}: these latents were made by another VAE than {cfg.vae}; give "
                             "theirs by --vae=, or the images by --data_dir=")
        return latents
    train_set = data.open_dataset(cfg.data_dir, cfg.image_size, cfg.images, cfg.seed)
    if cfg.text:                                                   # the label is the index of the caption
        train_set.labels = np.arange(len(train_set))
        train_set.classes = []
    return train_set


def check_sizes(vae, train_set, cfg):
    """Check, before anything is encoded, that everything fits together.

    raises: SystemExit if the VAE's channels, the image size or the latents on disk do not fit cfg
    """
    if cfg.D not in (0, vae.D):
        raise SystemExit(f"--D={cfg.D}, but {cfg.vae or 'the VAE'} has {vae.D} detail channels; "
                         "give that, or 0 for a base model")
    p = 1 if cfg.base else cfg.p                                   # a base model brings its own patches
    side = sides(vae, p)
    if cfg.image_size % side:
        fits = max(1, round(cfg.image_size / side)) * side
        wanted = f"{side}, with --p={cfg.p}" if cfg.p > 1 and not cfg.base else side
        raise SystemExit(f"--image_size={cfg.image_size}: {cfg.vae or 'the VAE'} takes multiples of "
                         f"{wanted}; give --image_size={fits}")
    levels.check(cfg.keep_levels, vae.C, cfg.D)
    if cfg.buckets > 1 and not cfg.text:
        raise SystemExit(f"--buckets={cfg.buckets:g}: a class-conditional model has positions for one "
                         "square grid only; leave it out, or train a text-to-image model (--text=)")
    if isinstance(train_set, Latents):
        train_set.check(cfg.image_size // vae.f, cfg.flip)


def sides(vae, p):
    """What an image's sides must be multiples of, for a transformer with patches of p x p latent pixels."""
    return vae.f * math.lcm(p, vae.base.block)


def check_statistics(z_all, C, out):
    """Print mean and standard deviation of base and detail latents; warn where they are not near 0 and 1."""
    groups = {"base": z_all[:, :C]}
    if z_all.shape[1] > C:
        groups["detail"] = z_all[:, C:]
    for name, z in groups.items():
        mean = z.mean().item()
        std = z.std().item()
        tqdm.write(f"{out}: latents of the first batch: {name} mean {mean:.2f} std {std:.2f}")
        if not (abs(mean) < 0.5 and 0.5 < std < 2):
            tqdm.write("WARNING: wanted about 0 and 1, by the VAE's statistics: other images, another VAE?")


def encoded_steps(vae, train_set, cfg, device, rank, world, start):
    """Encode the images, one step after another."""
    batches = data.batches(train_set, cfg.batch_size, cfg.seed, start, rank, world, flip=cfg.flip)
    for step, (images, y) in enumerate(batches, start):
        ranks.seed_step(cfg.seed, rank, step, 1)   # a separate random stream for samples of z_d
        z_all = encode(vae, images, cfg, device)
        yield z_all[:, :vae.C + cfg.D], y


def cached_steps(latents, cfg, device, rank, world, start):
    """Read the latents, one step after another: the same images and flips as in `encoded_steps`.

    A thread reads one step ahead. From its pinned memory, a GPU copies while Python goes on.
    """
    def read(step):
        plan = latents.plan(cfg.batch_size, cfg.seed, step, rank, world, cfg.flip)
        batch = latents.batch(*plan)
        return [x.pin_memory() for x in batch] if device.type == "cuda" else batch

    pool = ThreadPoolExecutor(1)
    ahead = pool.submit(read, start)
    try:
        for step in itertools.count(start + 1):
            z_all, y = ahead.result()              # or the error of this step
            ahead = pool.submit(read, step)
            yield z_all.to(device, non_blocking=True), y
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def encode(vae, images, cfg, device):
    """Normalised latents (b, C+D, h, w) of uint8 images (b, H, W, 3), in parts that fit into memory."""
    latents = []
    for part in images.split(ranks.at_once(AT_ONCE, *images.shape[1:3])):
        x = data.to_tensor(part.to(device))
        with ranks.autocast(cfg.dtype, device):
            latents.append(vae.encode(x, sample=cfg.detail_sample).float().contiguous())
    return torch.cat(latents)


# ---------------------------------------------------------------- reading the cache


class Latents(data.Dataset):
    """Latents on disk as a data set: the shards of `write_cache`, or those that LightningDiT's code extracts.

    <folder>/*.safetensors, each with latents, latents_flip (n, C+D, h, w) and labels (n,). LightningDiT's are
    raw, and are normalised here with the VAE's statistics; ours are already normalised, as their headers say.
    D: how many detail channels to read; 0 for a base model
    raises: SystemExit, naming the file, if a shard is incomplete, differs from the first, or lacks channels
    """

    def __init__(self, folder, vae, D):
        self.folder = folder
        self.files = sorted(Path(folder).glob("*.safetensors"))
        if not self.files:
            raise SystemExit(f"{folder}: has no shards of latents (*.safetensors)")
        others = data.find_files(folder)[""]
        self.left_out = data.endings(path for path in others if Path(path) not in self.files)
        kinds = [check_shard(path) for path in self.files]
        for path, kind in zip(self.files, kinds):
            if kind != kinds[0]:
                raise SystemExit(f"{path}: latents of (C+D, h, w), VAE = {kind}; wanted {kinds[0]}, as in "
                                 f"{self.files[0].name}; move one of them away")
        self.shards = [load_file(path) for path in self.files]     # memory-mapped: read on use
        self.place = []                                            # image i -> (its shard, its row there)
        for n, shard in enumerate(self.shards):
            self.place += [(n, row) for row in range(len(shard["labels"]))]
        self.labels = torch.cat([shard["labels"].long() for shard in self.shards]).numpy()
        self.classes = [str(label) for label in range(self.labels.max() + 1)]

        self.channels = vae.C + D
        self.size, self.made_by = kinds[0]                         # (C+D, h, w); a VAE's hash, or "raw"
        if self.size[0] < self.channels:
            raise SystemExit(f"{self.files[0]}: latents of {self.size[0]} channels; wanted {self.channels}, "
                             f"{vae.C} base channels, then {D} detail channels; give another --data_dir")
        self.mean = torch.zeros(self.channels)
        self.std = torch.ones(self.channels)
        if self.made_by == "raw":
            self.mean, self.std = statistics(vae, self.channels)

    @functools.cached_property
    def fingerprint(self):
        """Digest of the shards."""
        return identity.of_files(self.files, self.folder)

    @staticmethod
    def are_in(folder):
        """Does a *.safetensors in it hold `latents`?  Or is one broken, in a folder without images?"""
        if folder in ("", "procedural") or not Path(folder).is_dir():
            return False
        broken = False
        for path in Path(folder).glob("*.safetensors"):
            names = names_in(path)
            if names is None:
                broken = True
            elif "latents" in names:
                return True
        if not broken:                                             # do not list millions of images for it
            return False
        below = itertools.chain.from_iterable(data.find_files(folder).values())
        return not any(map(data.is_image, below))

    def check(self, side, flip):
        """raises: SystemExit if the latents are not side x side, or mirrored ones are missing"""
        h, w = self.size[1:]
        if (h, w) != (side, side):
            raise SystemExit(f"{self.files[0]}: latents of {h}x{w}; wanted {side}x{side}, from --image_size "
                             "and the VAE")
        for path, shard in zip(self.files, self.shards):
            if flip and "latents_flip" not in shard:
                raise SystemExit(f"{path}: has no mirrored latents (latents_flip); give --flip=False")

    def batch(self, indices, flipped):
        """(z_all (n, C+D, h, w) float32, labels (n,)) of images `indices`, mirrored where `flipped`.

        raises: SystemExit, naming the file, if a latent is not finite
        """
        rows = []
        for i, flip in zip(indices, flipped):
            n, row = self.place[i]
            latents = self.shards[n]["latents_flip" if flip else "latents"]
            rows.append(latents[row, :self.channels].float())
            if not rows[-1].isfinite().all():
                raise SystemExit(f"{self.files[n]}: latents of row {row} are not finite; remove this file "
                                 "and encode its images again")
        z_all = (torch.stack(rows) - self.mean[:, None, None]) / self.std[:, None, None]
        return z_all, torch.from_numpy(self.labels[indices])


class LatentsInBuckets:
    """The latents of images in buckets, one folder per bucket, with the methods that `cached_steps` uses."""

    def __init__(self, images, folder, vae, D):
        self.images = images
        self.parts = [Latents(folder / part.name, vae, D) for part in images.parts]

    def __len__(self):
        return sum(map(len, self.parts))

    def plan(self, *args):
        return self.images.plan(*args)

    def batch(self, indices, flipped):
        """Like `Latents.batch`; the images are all of one bucket."""
        part = self.parts[self.images.bucket[indices[0]]]
        return part.batch(self.images.place[indices], flipped)


def names_in(path):
    """The names of a safetensors file's tensors; None if it is broken."""
    try:
        with safe_open(path, "pt") as f:
            return set(f.keys())
    except (OSError, SafetensorError):
        return None


def check_shard(path):
    """((C+D, h, w), hash of the VAE or "raw") of a shard; reads only its header and labels.

    raises: SystemExit saying how it differs from what `Latents` expects
    """
    wanted = "wanted latents (n, C+D, h, w) of floating point and labels (n,), n > 0"
    names = names_in(path)
    if names is None:
        raise SystemExit(f"{path}: is truncated, or not a safetensors file; remove it and make it again")
    if not {"latents", "labels"} <= names:
        raise SystemExit(f"{path}: holds {', '.join(sorted(names)[:5]) or 'nothing'}; {wanted}")
    with safe_open(path, "pt") as f:
        shapes = {name: tuple(f.get_slice(name).get_shape()) for name in names}
        dtype = f.get_slice("latents").get_dtype()
        labels = f.get_tensor("labels")
    size = shapes["latents"]
    mirrored = shapes.get("latents_flip", size)
    fits = len(size) == 4 and size[0] > 0 and shapes["labels"] == size[:1] and mirrored == size
    if not fits or dtype not in ("F16", "BF16", "F32", "F64"):
        raise SystemExit(f"{path}: latents {size} of {dtype}, latents_flip {mirrored}, labels "
                         f"{shapes['labels']}; {wanted}")
    if labels.min() < 0 or not torch.equal(labels, labels.long().to(labels.dtype)):
        raise SystemExit(f"{path}: labels from {labels.min()} to {labels.max()}; wanted whole numbers, 0 or "
                         "more")
    return size[1:], header_of(path).get("vae", "raw")


def header_of(path):
    """The metadata of a safetensors file; {} if it has none."""
    with safe_open(path, "pt") as f:
        return f.metadata() or {}


def statistics(vae, channels):
    """Mean and std of the first `channels` channels of z_all, base first, on the CPU: (channels,) each."""
    parts = [vae.base, vae] if vae.D else [vae.base]
    mean = torch.cat([part.mean.cpu() for part in parts])
    std = torch.cat([part.std.cpu() for part in parts])
    return mean[:channels], std[:channels]


# ---------------------------------------------------------------- writing the cache


def write_cache(vae, train_set, cfg, device, rank, world):
    """Encode the shards missing from <vae or out>/latents-<hash>, for `Latents` to read; returns the folder.

    The ranks share the missing shards; each bucket has its own subfolder. If another job writes the same
    cache, this one waits, and then finds it there.
    Latents are stored in half precision, with cfg.flip also those of the mirrored images. The hash covers
    the VAE's weights, the images, the labels and everything else that the latents depend on, and each file's
    header holds all of that; so a cache made with another VAE or other images is never read by mistake.
    raises: SystemExit if the disk is too small, or the ranks see different images
    """
    header = describe(vae, train_set, cfg, device)
    others = [r for r, other in enumerate(ranks.from_all(header)) if other != header]
    if others:
        raise SystemExit(f"{cfg.data_dir}: process {rank} has other images, or another VAE, than process "
                         f"{others[0]}; copies on several machines must have the same files, with the same "
                         "modification times (cp -p, rsync -a)")
    folder = cache_folder(cfg, header)
    runs.make_folder(folder, "--cache=False")
    shards = planned_shards(train_set, folder)
    with files.one_job_at_a_time(folder) if rank == 0 else contextlib.nullcontext():
        ranks.wait_for_all()                                       # until rank 0 has its turn
        missing = [n for n, (file, _, _) in enumerate(shards) if not is_whole(file, header)]
        check_space(vae, sum(len(shards[n][2]) for n in missing), cfg, folder, rank)
        missing = ranks.from_all(missing)[0]                       # when all have seen what is missing

        mine = missing[rank::world]
        for n in tqdm(mine, desc="encoding", disable=rank > 0 or not mine, mininterval=1):
            file, images, numbers = shards[n]
            file.parent.mkdir(exist_ok=True)
            shard = encode_shard(vae, images, numbers, n, cfg, device)
            with runs.disk_may_fail(must=True, what=file, instead="--cache=False"):
                files.save_whole(shard, file, file.with_suffix(f".tmp{rank}"), header)
        ranks.wait_for_all()                                       # until all have written
    return folder


def planned_shards(train_set, folder):
    """[(file, image set, indices of the images in it)] of a cache in `folder`."""
    places = {folder: train_set}
    if isinstance(train_set, Buckets):
        places = {folder / part.name: part for part in train_set.parts}
    shards = []
    for place, images in places.items():
        for n, start in enumerate(range(0, len(images), SHARD)):
            numbers = range(start, min(start + SHARD, len(images)))
            shards.append((place / f"{n:05d}.safetensors", images, numbers))
    return shards


def is_whole(file, header):
    """Does the file exist, complete, as a shard of this very cache?"""
    try:
        with safe_open(file, "pt") as f:
            return f.metadata() == header
    except PermissionError as error:                               # it may be whole, and another user's
        raise SystemExit(f"{file}: {error.strerror}; wanted a cache that you may read") from None
    except (OSError, SafetensorError):
        return False


def encode_shard(vae, train_set, numbers, n, cfg, device):
    """Shard n, the images `numbers`: labels (b,), latents and, with cfg.flip, latents_flip (b, C+D, h, w).

    The latents are float16.
    """
    labels, latents, mirrored = [], [], []
    ranks.seed_step(cfg.seed, n, 0)                # for samples of z_d, with cfg.detail_sample
    for k in range(0, len(numbers), AT_ONCE):
        images, y = data.stack(train_set, numbers[k:k + AT_ONCE])              # uint8 (b, H, W, 3)
        labels.append(y)
        latents.append(encode(vae, images, cfg, device).to(torch.float16).cpu())
        if cfg.flip:
            flipped = images.flip(2)                                           # the width of (b, H, W, 3)
            mirrored.append(encode(vae, flipped, cfg, device).to(torch.float16).cpu())
    shard = {"labels": torch.cat(labels), "latents": torch.cat(latents)}
    if cfg.flip:
        shard["latents_flip"] = torch.cat(mirrored)
    return shard


def describe(vae, train_set, cfg, device):
    """The header of the cache's files: everything that the latents in them depend on.

    The folder is named by a hash of this exact text: renaming or reordering a key orphans every cache.
    """
    about = {
        "images": train_set.fingerprint,
        "count": len(train_set),
        "image_size": cfg.image_size,
        "crop": "centre",
        "flip": cfg.flip,
        "detail": f"sample, seed {cfg.seed}" if cfg.detail_sample else "mode",
        "labels": "image numbers" if cfg.text else "classes",
        "dtype": "float16",
        "normalised": True,
        "bfloat16": ranks.in_bfloat16(cfg.dtype, device),
    }
    return {"vae": runs.hash_of(vae), "about": json.dumps(about)}


def cache_folder(cfg, header):
    """latents-<hash of the header>, in the VAE's run folder; in cfg.out if the VAE is not a run."""
    key = hashlib.sha256((header["vae"] + header["about"]).encode()).hexdigest()[:12]
    ours = Path(cfg.vae).is_dir() and runs.checkpoints(cfg.vae)
    return Path(cfg.vae if ours else cfg.out) / f"latents-{key}"


def check_space(vae, images, cfg, folder, rank):
    """Print the size of the latents of `images` images.   raises: SystemExit if the disk is too small"""
    side = cfg.image_size // vae.f
    orientations = 2 if cfg.flip else 1
    size = images * orientations * (vae.C + vae.D) * side**2 * 2               # bytes, of float16
    free = shutil.disk_usage(folder).free
    if size > free:
        raise SystemExit(f"{folder}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB of latents to write; "
                         "give --cache=False")
    if images and rank == 0:
        print(f"{folder}: {images} images to encode, {size / 1e9:.2f} GB of latents; "
              f"{free / 1e9:.0f} GB free")
        others = [path.name for path in folder.parent.glob("latents-*") if path != folder]
        if others:
            print(f"next to it, of other images, VAEs or settings, yours to delete: {', '.join(others)}")
