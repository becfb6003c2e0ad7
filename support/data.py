"""data"""
import functools
import itertools
import json
import math
import os
import struct
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from support.drawings import LETTERS, SCENES, SHAPES

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error, Image.DecompressionBombError)


def center_crop(image, size):
    """The ADM centre crop (Dhariwal & Nichol, 2021): PIL image -> (size, size); ValueError if it is far too thin."""
    while min(image.size) >= 2 * size:      # 2x2 means while they fit, then bicubic: published statistics were made so
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    width, height = (round(side * (size / min(image.size))) for side in image.size)
    if width * height > 200_000_000:        # a file of 1x9000 pixels would become gigabytes here
        raise ValueError(f"{image.width}x{image.height} pixels are too thin to crop to {size}x{size}")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))


def to_rgb(image):
    """A PIL image of any mode as 8-bit RGB: 16 bits scaled (Pillow would clip them), transparency laid on white."""
    if image.mode in ("I", "F"):
        raise ValueError("its 32-bit pixels have no known range, save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(path):
    """An image file (or an animation's first frame), upright, as RGB PIL image; ValueError names file and reason."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > (Image.MAX_IMAGE_PIXELS or math.inf):     # Pillow itself would only warn
                raise ValueError(f"{file.width}x{file.height} pixels exceed PIL.Image.MAX_IMAGE_PIXELS")
            return to_rgb(ImageOps.exif_transpose(file))
    except UnidentifiedImageError:
        reason = "its bytes are no image" if os.path.getsize(path) else "the file is empty"
    except DECODING_ERRORS as error:
        reason = str(error) or type(error).__name__
    raise ValueError(f"cannot read the image {path}: {reason}")


class Dataset:
    """What scripts see: labels (N,) int64, classes (names; [] = none), captions (list or None), image(i); and these."""
    captions, bad = None, {}

    def __len__(self):
        return len(self.labels)

    def summary(self):
        """One line such as '812 images in 5 classes (cat 210, dog 190, ...), 812 captions, 3 unreadable'."""
        names = [f"{c} {n}" for c, n in zip(self.classes, np.bincount(self.labels, minlength=len(self.classes)))]
        more = ", ..." if len(names) > 10 else ""
        line = f"in {len(names)} classes ({', '.join(names[:10])}{more})" if names else "without classes"
        captions = f", {sum(map(bool, self.captions))} captions" if self.captions else ""
        return f"{len(self)} images {line}{captions}" + (f", {len(self.bad)} unreadable" if self.bad else "")


def find_files(folder, above=frozenset()):
    """{"": its files, sub-folder: all files below it}, sorted, none hidden; links are followed, but not back up."""
    above, found = above | {os.path.realpath(folder)}, {"": []}
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith((".", "__MACOSX"))]
    for entry in sorted(entries, key=lambda entry: entry.name):
        if not entry.is_dir():
            found[""].append(entry.path)
        elif os.path.realpath(entry) not in above:
            found[entry.name] = [path for paths in find_files(entry.path, above).values() for path in paths]
    return found


def read_captions(root, paths, files):
    """One caption per image ("" = none) from `metadata.jsonl` or `name.txt` beside it; None if no image has one."""
    captions, source, start = {}, os.path.join(root, "metadata.jsonl"), len(os.path.join(root, ""))
    try:
        lines = Path(source).read_text("utf-8-sig").split("\n") if source in files else []
        for row in map(json.loads, filter(str.strip, lines)):
            captions[os.path.normpath(row["file_name"])] = row["text" if "text" in row else "caption"].strip()
        for path in paths:
            source = os.path.splitext(path)[0] + ".txt"
            if source in files:
                captions[path[start:]] = Path(source).read_text("utf-8-sig").strip()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"captions in {source}: {error!r}; wanted text, or lines of {{file_name, text}}") from None
    captions = [captions.get(path[start:], "") for path in paths]
    return captions if any(captions) else None


class ImageFolder(Dataset):
    """Images below `root`, centre-cropped to `size`; sub-folders are classes, numbered as torchvision does; or none.
    An unreadable file is named once on stderr, kept in `bad` {path: reason}, and replaced by the next readable image.
    raises: ValueError if there are no images or a class is empty; also when 10 files and 1 % of all prove unreadable
    """
    def __init__(self, root, size):
        self.root, self.size, self.bad = os.fspath(root), size, {}
        if not os.path.isdir(root):
            raise ValueError(f"{root} is not a folder; give a folder of images, or 'procedural' for the built-in set")
        files = find_files(self.root)
        images = {name: [f for f in files[name] if f.lower().endswith(EXTENSIONS)] for name in files}
        loose = images.pop("")
        if any(images.values()) and loose:
            print(f"{root}: {len(loose)} images beside its class folders are left out", file=sys.stderr)
        images = images if any(images.values()) else {"": loose}
        empty = [name or root for name in images if not images[name]]
        if empty:                           # skipping them would shift the numbers of the classes after them
            raise ValueError(f"{root}: no images ({' '.join(EXTENSIONS)}) in {empty}; add some or remove these folders")
        self.classes = [name for name in images if name]
        self.paths = [path for group in images.values() for path in group]
        self.labels = np.repeat(np.arange(len(images)), [len(group) for group in images.values()])
        self.captions = read_captions(self.root, self.paths, {path for group in files.values() for path in group})

    def image(self, i):
        """Image i as uint8 (size, size, 3) with its label; if it is unreadable, the next one that is not."""
        for j in (k % len(self) for k in range(i, i + len(self))):
            try:
                if self.paths[j] not in self.bad:
                    return np.asarray(center_crop(load_image(self.paths[j]), self.size)), int(self.labels[j])
            except ValueError as error:
                reason = str(error)
                if self.bad.setdefault(self.paths[j], reason) is reason:    # else another thread was first to say so
                    print(f"{reason}; the next image takes its place", file=sys.stderr)
            if len(self.bad) >= min(len(self), max(10, len(self) / 100)):
                raise ValueError(f"{len(self.bad)} of {len(self)} images in {self.root} are unreadable, repair or "
                                 f"remove them; the first: {'; '.join(list(self.bad.values())[:3])}")


class Procedural(Dataset):
    """`length` drawn pictures of ten classes, each a function of (seed, index) alone; label = index % 10.
    Flat shapes tell the class at any blur. The textures are what bicubic halving averages out exactly (its taps weigh
    odd and even pixels alike): detail that the base latent lacks and that the shapes predict.
    """
    def __init__(self, size, length, seed=0):
        self.size, self.seed = size, seed
        self.classes, self.labels = list(SCENES), np.arange(length) % len(SCENES)
        y, x = np.mgrid[:size, :size]       # a texture says which of its paint's two colours a pixel takes
        self.textures = {"": 0 * x, "cols": x % 2, "rows": y % 2, "check": (x + y) % 2, "dots": x * y % 2,
                         "text": (np.array([*map(list, LETTERS)]) == "#")[y % 6, x % 14].astype(int)}

    def image(self, i):
        """Picture i as uint8 (size, size, 3) with its label."""
        rng, label = np.random.default_rng((self.seed, i)), int(self.labels[i])
        radius, centre = self.size * rng.uniform(0.33, 0.45), self.size * rng.uniform(0.44, 0.56, 2)
        background, *strokes = map(str.split, SCENES[self.classes[label]].split(";"))
        paints = list(dict.fromkeys(background + [stroke[1] for stroke in strokes]))
        canvas = Image.new("L", (self.size, self.size))     # each pixel holds the number of its paint
        for shape, paint, *points in strokes:
            points = [centre[k % 2] + radius * int(p) / 20 for k, p in enumerate(points)]
            getattr(ImageDraw.Draw(canvas), SHAPES[shape])(points, fill=paints.index(paint))
        names, first, second = zip(*(paint.split("#")[:2] + paint.split("#")[-1:] for paint in paints))
        colours = np.array([[[17 * int(h, 16) for h in c] for c in pair] for pair in zip(first, second)])   # (n, 2, 3)
        colours = (colours + rng.uniform(-14, 14, (len(paints), 1, 3))).clip(0, 255).astype(np.uint8)
        canvas = np.asarray(canvas)
        return colours[canvas, np.choose(canvas, [self.textures[name] for name in names])], label


def open_dataset(data_dir, size, length=6000, seed=0):
    """The data set `data_dir` means: "" or "procedural" the built-in one (length, seed), anything else a folder."""
    return Procedural(size, length, seed) if data_dir in ("", "procedural") else ImageFolder(data_dir, size)


def stack(dataset, indices, threads=8):
    """Images `indices` of a data set, read by threads: uint8 (n, S, S, 3), int64 (n,)."""
    with ThreadPoolExecutor(threads) as pool:
        images, labels = zip(*pool.map(dataset.image, indices))
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


@functools.lru_cache
def permutation(length, seed, epoch):
    return np.random.default_rng((seed, 0, epoch)).permutation(length)


def batch_plan(length, batch_size, seed, step, rank=0, world=1, flip=False):
    """(indices, flips), int64 and bool, of this rank's part of global batch `step`: a function of its arguments alone."""
    assert batch_size % world == 0, f"batch_size {batch_size} does not split over {world} ranks; give a multiple"
    part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    places = np.arange(step * batch_size, (step + 1) * batch_size)[part]
    indices = [permutation(length, seed, int(epoch))[k] for epoch, k in zip(*divmod(places, length))]
    return np.array(indices), np.random.default_rng((seed, 1, step)).random(batch_size)[part] < flip / 2


def batches(dataset, batch_size, seed, start=0, rank=0, world=1, flip=False, threads=8):
    """Endless (uint8 (batch_size / world, S, S, 3), int64 labels) from step `start`; threads read two batches ahead."""
    pool, ahead = ThreadPoolExecutor(threads), deque()
    try:
        for step in itertools.count(start):
            indices, flips = batch_plan(len(dataset), batch_size, seed, step, rank, world, flip)
            ahead.append((flips, [pool.submit(dataset.image, i) for i in indices.tolist()]))
            if len(ahead) > 2:
                flips, rows = ahead.popleft()
                images, labels = zip(*(row.result() for row in rows))
                images = np.stack(images)
                images[flips] = images[flips, :, ::-1]
                yield torch.from_numpy(images), torch.tensor(labels)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def to_tensor(x):
    """uint8 (B, H, W, 3), array or tensor -> float (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(x).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_uint8(x):
    """(B, 3, H, W) in [-1, 1] -> uint8 numpy (B, H, W, 3), rounded as guided-diffusion does; inverts `to_tensor`."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def random_crop(x, size, generator=None):
    """A random window per image: (B, 3, H, W) -> (B, 3, size, size), size <= H, W; `generator`: CPU, None = global."""
    tops, lefts = (torch.randint(side - size + 1, (len(x),), generator=generator).tolist() for side in x.shape[2:])
    return torch.stack([image[:, a:a + size, b:b + size] for image, a, b in zip(x, tops, lefts)])


def read(dataset, index, whole=0):
    """Batches (x (B, 3, H, W) in [-1, 1], y (B,)) of images `index`; whole: at their own sizes, cropped to multiples of it."""
    for i in index if whole else ():
        x = np.array(load_image(dataset.paths[i]))[None]
        (top, H), (left, W) = ((side % whole // 2, side // whole * whole) for side in x.shape[1:3])
        yield to_tensor(x[:, top:top + H, left:left + W]), torch.tensor(dataset.labels[i:i + 1])
    for k in () if whole else range(0, len(index), 10):
        x, y = stack(dataset, index[k:k + 10])
        yield to_tensor(x), y
