"""Images, from files or drawn: cropped to squares, and batched so that a resumed run continues exactly.

A data set is a folder of images (`ImageFolder`) or of tar shards (`ImageShards`), or any class that fulfils
the contract in `Dataset`.
Pixels are uint8 (S, S, 3) while they are read and batched; `to_tensor` turns them into (B, 3, S, S) in
[-1, 1] for the models.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, features
from tqdm import tqdm

from support import identity, shards
from support.captions import read_captions, shown
from support.drawings import SCENES, draw, make_textures
from support.photos import load_image

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp",
    ".dib", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi",
)
if features.check("avif"):                  # some builds of Pillow lack it
    EXTENSIONS += (".avif",)

THREADS = 8                                 # that read images, on each rank
SMALLEST = 11                               # pixels, the side of SSIM's window: no smaller image is measured


# ---------------------------------------------------------------- the contract of a data set


class Dataset:
    """What the scripts need of a data set. To use your own, subclass this and return it from `open_dataset`.

    Yours must have:
        labels       (N,) int64 numpy array: the class of each image, zeros if there are no classes. N is the
                     length of the data set. Training on captions puts the numbers 0 to N - 1 here, to find
                     the caption of each image.
        image(i)     (pixels, label) of image i: a uint8 array (S, S, 3), RGB, S being the run's image_size;
                     and the int in labels[i] at that time. The same i gives the same pixels every time.
                     Several threads call it at once.

    It may override these defaults:
        exact(i)     as image(i), but None if image i cannot be read; image(i) may return another instead
        classes      list of the classes' names, that of label k at k; [] if there are none
        captions     list of N strings, "" where an image has none; None if no image has one
        paths        N image files, or other names, needed to `read` whole images; None if there are none
        load(i)      image i uncropped, a PIL image in RGB; here from paths[i]
        bad          {path: reason} of the files found unreadable so far
        faults       which of them are not among its images, as a dict with these keys
        fingerprint  a digest of images and labels
        left_out     {ending: count} of the files in its folder that it does not use
        summary()    one line that describes the data set, printed when a run starts
    """

    classes = []
    captions = None
    paths = None
    faults = {}
    left_out = {}

    @functools.cached_property
    def bad(self):
        return {}

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        raise NotImplementedError(f"{type(self).__name__} has no image(i); wanted: uint8 (S, S, 3), label")

    @functools.cached_property
    def fingerprint(self):
        """A digest of images and labels: data sets with the same digest have the same images.

        Here of the labels and sixteen images. It identifies the cache of latents.
        """
        digest = hashlib.sha256(np.asarray(self.labels, dtype=np.int64).tobytes())
        for i in np.linspace(0, len(self) - 1, 16).astype(int).tolist():
            pixels, _ = self.image(i)
            digest.update(pixels.tobytes())
        return digest.hexdigest()[:16]

    def plan(self, *args):
        """Which images a step reads: see `batch_plan`; support/buckets.py has another plan."""
        return batch_plan(len(self), *args)

    def exact(self, i):
        return self.image(i)

    def load(self, i):
        return load_image(self.paths[i])

    def report(self, path, reason, then):
        """Record a file in `bad` and name it on stderr, unless another thread has done so already.

        then: what becomes of it, a clause
        """
        if shown(path) not in reason:
            reason = f"cannot use the image {shown(path)}: {reason}"
        if self.bad.setdefault(path, reason) is reason:
            tqdm.write(f"{reason}; {then}", file=sys.stderr)

    def refuse_if_many_are_bad(self, name):
        """raises: ValueError if at least 10 images and 1 % of all, or all there are, have proved unreadable

        name: of the data set
        """
        found = [reason for path, reason in list(self.bad.items()) if path not in self.faults]
        if len(found) >= min(len(self), max(10, len(self) / 100)):
            raise ValueError(f"{len(found)} of {len(self)} images in {name} are unreadable, "
                             f"repair or remove them; the first: {'; '.join(found[:3])}")

    def summary(self):
        """One line such as '812 images in 5 classes (cat 210, dog 190, ...), 812 captions, 3 unreadable; left
        out: 20 .pdf, 3 .safetensors'.
        """
        line = f"{len(self)} images without classes"
        if self.classes:
            counts = np.bincount(self.labels, minlength=len(self.classes))
            names = [f"{shown(name)} {counts[k]}" for k, name in enumerate(self.classes)]
            more = ", ..." if len(names) > 10 else ""
            line = f"{len(self)} images in {len(names)} classes ({', '.join(names[:10])}{more})"
        if self.captions:
            line += f", {len(list(filter(None, self.captions)))} captions"
        if self.bad:
            line += f", {len(self.bad)} unreadable"
        if self.left_out:
            line += f"; left out: {listed(self.left_out)}"
        return line


def open_dataset(data_dir, size, length=6000, seed=0):
    """The data set that `data_dir` names: "" or "procedural" the built-in one, else a folder or its shards.

    size: of the square images; length, seed: of the built-in set
    raises: ValueError if it is not a folder, or has no images
    """
    if data_dir in ("", "procedural"):
        return Procedural(size, length, seed)
    if has_shards(data_dir):
        return ImageShards(data_dir, size)
    return ImageFolder(data_dir, size)


# ---------------------------------------------------------------- one image


def center_crop(image, height, width=None):
    """The centre crop of ADM (Dhariwal & Nichol, 2021): a PIL image of any size -> (height, width).

    No width: square. The published reference statistics of ImageNet were made with it: 2x2 means as long as
    the image still covers the crop, then bicubic until it just covers it, then the middle.
    raises: ValueError if the image is far too thin
    """
    width = width or height
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = max(width / image.width, height / image.height)
    wide = round(image.width * scale)
    high = round(image.height * scale)
    if wide * high > 200_000_000:           # 1x9000 pixels would become gigabytes here
        raise ValueError(f"{image.width}x{image.height} pixels are too thin to crop to {width}x{height}")
    left = (wide - width) // 2
    top = (high - height) // 2
    return image.resize((wide, high), Image.BICUBIC).crop((left, top, left + width, top + height))


# ---------------------------------------------------------------- a folder of images


def find_files(folder, above=frozenset()):
    """The files below a folder, {"": those in itself, sub-folder: all those below it}, sorted by name.

    Hidden ones, and those of operating systems, are left out. Links are followed, except to a folder that
    contains them (`above`: the real paths of those), which would be an endless loop.
    """
    above = above | {os.path.realpath(folder)}
    found = {"": []}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if shards.is_hidden(entry.name):
            continue
        # for a link to itself, is_dir would raise, and isdir does not
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        if not is_folder:
            found[""].append(entry.path)
        elif os.path.realpath(entry) not in above:
            inside = find_files(entry.path, above)
            found[entry.name] = list(itertools.chain.from_iterable(inside.values()))
    return found


def is_image(path):
    return path.lower().endswith(EXTENSIONS)


def endings(paths):
    """{ending: count} of files, in lower case, the most frequent first."""
    found = Counter(os.path.splitext(path)[1].lower() for path in paths)
    return {ending or "without an ending": count for ending, count in found.most_common()}


def listed(counts):
    """'20 .pdf, 3 .safetensors, 2 without an ending', of at most ten {ending: count}."""
    hints = {".heic": " (convert to .jpg)"}
    parts = [f"{count} {shown(ending)}{hints.get(ending, '')}" for ending, count in counts.items()]
    return ", ".join(parts[:10]) + (", ..." if len(parts) > 10 else "")


class ImageFiles(Dataset):
    """Image files of any size, centre-cropped to `size`: what folders and shards have in common.

    An unreadable image is named once on stderr, recorded in `bad`, and replaced by the next readable one. If
    at least 10 images and 1 % of all prove unreadable, that is a ValueError.
    """

    def image(self, i):
        """Image i as uint8 (size, size, 3) with its label; if it is unreadable, the next one that is not."""
        for j in range(i, i + len(self)):
            j = j % len(self)               # after the last image comes the first
            row = self.exact(j, "the next image takes its place")
            if row is not None:
                return row
            self.refuse_if_many_are_bad(self.root)

    def exact(self, i, then="it is left out"):
        """Image i as uint8 (size, size, 3) with its label; None if it is unreadable.

        then: what becomes of it, as in `report`
        """
        path = self.paths[i]
        if path in self.bad:
            return None
        try:
            return np.asarray(center_crop(self.load(i), self.size)), int(self.labels[i])
        except ValueError as error:
            self.report(path, str(error), then)


class ImageFolder(ImageFiles):
    """The images below `root`, centre-cropped to `size`.

    Sub-folders are classes, numbered in the order of their names as torchvision does; a folder without
    sub-folders has no classes. Files that are not images, captions or lists of captions are counted in
    `left_out`.
    raises: ValueError if there are no images or a class is empty
    """
    by_folder = ()                          # the class of each image by its folder

    def __init__(self, root, size):
        self.root = os.fspath(root)
        self.size = size
        self.bad = {}
        if os.path.isfile(root):
            raise ValueError(f"{shown(root)} is a file, not a folder; give the folder of the images, and "
                             "unpack an archive first")
        if not os.path.isdir(root):
            raise ValueError(f"{shown(root)} is not a folder; "
                             "give a folder of images, or 'procedural' for the built-in set")
        try:
            files = find_files(self.root)
        except OSError as error:
            raise ValueError(f"cannot read the folder {shown(error.filename)}: {error.strerror}") from None
        groups = self.group(files)
        self.classes = [name for name in groups if name]
        self.paths = list(itertools.chain.from_iterable(groups.values()))
        self.by_folder = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
        self.labels = self.by_folder.copy()
        self.point_deeper()

        others = [path for path in itertools.chain.from_iterable(files.values()) if not is_image(path)]
        captions, used = read_captions(self.root, self.paths, others)
        self.captions = captions if any(captions) else None
        self.left_out = endings(path for path in others if path not in used)
        if ".txt" in self.left_out:
            self.left_out[".txt without an image"] = self.left_out.pop(".txt")

    def group(self, files):
        """Files as from `find_files` -> {class: its images}, or {"": images} if there are no classes."""
        groups = {name: list(filter(is_image, paths)) for name, paths in files.items()}
        loose = groups.pop("")
        if not any(groups.values()):
            groups = {"": loose}
            files = {"": list(itertools.chain.from_iterable(files.values()))}
        elif loose:
            print(f"{shown(self.root)}: {len(loose)} images next to its class folders are left out",
                  file=sys.stderr)
        empty = []
        for name in groups:
            if not groups[name]:
                found = listed(endings(files[name])) or "nothing"
                empty.append(f"{(name or self.root)!r} ({found})")
        if empty:                           # skipping them would shift the numbers of the classes after them
            more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
            raise ValueError(f"{shown(self.root)}: no images ({' '.join(EXTENSIONS)}) in "
                             f"{', '.join(empty[:10])}{more}; add some or remove these folders")
        return groups

    def point_deeper(self):
        """Say so if all classes are folders of folders: perhaps the inner ones were meant as the classes."""
        root = self.root.rstrip("/")
        if self.classes and not any(os.path.dirname(os.path.dirname(path)) == root for path in self.paths):
            print(f"{shown(root)}: all images of its classes lie in folders of their own; if those are the "
                  f"classes, give {shown(os.path.join(root, self.classes[0]))}", file=sys.stderr)

    @functools.cached_property
    def fingerprint(self):
        """A digest of the files themselves, whose names include the class's folder.

        Labels that do not follow from these names, as a subclass may make them, are in it, too.
        """
        digest = identity.of_files(self.paths, self.root)
        for named in (self.by_folder, np.arange(len(self))):       # numbers: of captions
            if np.array_equal(self.labels, named):
                return digest
        labels = np.asarray(self.labels, dtype=np.int64)
        return identity.of_text(digest + hashlib.sha256(labels.tobytes()).hexdigest())


# ---------------------------------------------------------------- a folder of tar shards


def has_shards(folder):
    """Is it a folder of tar shards, with *.tar files in it and no loose images?

    raises: ValueError for shards that cannot be read where they are
    """
    folder = os.fspath(folder)
    if re.match(r"\w+://|pipe:", folder) or re.search(r"\{.*\}.*\.tar", folder):
        raise ValueError(f"{shown(folder)}: wanted a folder on this machine, because *.tar are read by "
                         "seeking; copy or mount it first, with tools of your own")
    if os.path.isfile(folder) and folder.endswith(".tar"):
        raise ValueError(f"{shown(folder)}: wanted the folder that it is in, whose *.tar are read together")
    if not os.path.isdir(folder):
        return False
    try:
        names = [name for name in os.listdir(folder) if name.endswith((".tar", ".tar.gz", ".tgz"))]
        if not names or any(map(is_image, itertools.chain.from_iterable(find_files(folder).values()))):
            return False
    except OSError:                         # ImageFolder will say what is wrong
        return False
    if not any(name.endswith(".tar") for name in names):
        raise ValueError(f"{shown(folder)}: its shards are compressed, and cannot be read by seeking; unpack "
                         "them to .tar (gunzip *.tar.gz)")
    return True


class ImageShards(ImageFiles):
    """The images in the *.tar of a folder, in webdataset's layout (support/shards.py), as if in a folder.

    Incomplete samples and truncated shards are counted in `bad`, and the first three of them named.
    raises: ValueError if there are no images
    """

    def __init__(self, root, size):
        self.root = os.fspath(root)
        self.size = size
        self.index = shards.read_index(self.root, EXTENSIONS)
        self.left_out = self.index.left_out
        self.faults = self.index.faults
        self.bad = dict(self.faults)
        for name, reason in list(self.bad.items())[:3]:
            print(f"{shown(os.path.join(self.root, name))}: {reason}", file=sys.stderr)
        if len(self.bad) > 3:
            print(f"{shown(self.root)}: and {len(self.bad) - 3} more like these", file=sys.stderr)
        if not len(self.index):
            raise ValueError(f"{shown(self.root)}: no images in its {len(self.index.tars)} shards "
                             f"({listed(self.left_out) or 'nothing whole'}); wanted NAME.jpg or the like, "
                             "NAME without dots, and NAME.cls or NAME.txt")
        self.labels, self.classes = shards.classes_of(self.index)
        captions = list(self.index.captions)
        self.captions = captions if any(captions) else None
        self.paths = self.index.names
        if not self.classes and self.captions is None:
            self.point_to_classes()

    def point_to_classes(self):
        """Say so if no image has a class, but shards or folders in them seem to be meant as the classes."""
        inside = {os.path.dirname(name).partition("/")[2] for name in self.paths}
        what = ""
        if len(inside) > 1:
            what = f"the {len(inside)} folders in its shards ({', '.join(sorted(inside)[:3])}, ...)"
        elif all(re.fullmatch(r"n\d{8}\.tar", name) for name in self.index.tars):          # ImageNet's own
            what = f"its {len(self.index.tars)} shards ({', '.join(self.index.tars[:3])}, ...)"
        if what:
            print(f"{shown(self.root)}: no image has a class. If {shown(what)} are the classes, unpack each "
                  "into a folder of its own, or add NAME.cls next to each image", file=sys.stderr)

    def load(self, i):
        try:
            raw = self.index.read(i)
        except OSError as error:
            raise ValueError(f"cannot read {shown(self.paths[i])}: {error.strerror}") from None
        return load_image(self.paths[i], raw)

    def summary(self):
        return f"{super().summary()}; in {len(self.index.tars)} shards"

    @functools.cached_property
    def fingerprint(self):
        """A digest of all images' names, sizes and classes, and of at most a thousand shards' contents."""
        index = self.index
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for array in (index.names.text, index.size, self.labels):
            digest.update(np.ascontiguousarray(array))
        every = math.ceil(len(index.tars) / identity.AT_MOST)
        tars = [os.path.join(self.root, name) for name in index.tars[::every]]
        return identity.of_text(digest.hexdigest() + identity.of_files(tars, self.root))


# ---------------------------------------------------------------- the built-in set


class Procedural(Dataset):
    """`length` drawn pictures of ten classes, each a function of (seed, index) alone; label = index % 10."""

    def __init__(self, size, length, seed=0):
        self.size = size
        self.seed = seed
        self.classes = list(SCENES)
        self.labels = np.arange(length) % len(SCENES)
        self.textures = make_textures(size)

    def image(self, i):
        """Picture i as uint8 (size, size, 3) with its label."""
        scene = list(SCENES.values())[i % len(SCENES)]
        rng = np.random.default_rng((self.seed, i))
        return draw(scene, self.size, self.textures, rng), int(self.labels[i])


# ---------------------------------------------------------------- batches


def collate(rows):
    """[(image, label)] as `Dataset.image` gives them -> uint8 array (n, S, S, 3), int64 tensor (n,)."""
    images = np.stack([image for image, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    return images, labels


def stack(dataset, indices):
    """Images `indices` of a data set, read by threads: uint8 (n, S, S, 3), int64 (n,)."""
    with ThreadPoolExecutor(THREADS) as pool:
        images, labels = collate(list(pool.map(dataset.image, indices)))
    return torch.from_numpy(images), labels


@functools.lru_cache(maxsize=4)             # for a large set, each takes megabytes; a batch needs one or two
def epoch_order(length, seed, epoch):
    """The order in which an epoch takes the images: a permutation of 0 to length - 1."""
    return np.random.default_rng((seed, 0, epoch)).permutation(length)


def batch_plan(length, batch_size, seed, step, rank=0, world=1, flip=False):
    """Which images this rank reads at a step, and which of them it mirrors.

    Imagine all epochs in a row, each a random order of all images. Step n takes places n * batch_size to
    (n + 1) * batch_size of that row, and each rank an equal part of them: so a batch may begin in one epoch
    and end in the next, and no image is left out. The flips are drawn for a step's whole batch.

    Nothing is carried over between steps; everything follows from (seed, step): a run resumed at step 1000
    reads what it would have read anyway, without saved state, and two ranks together read what one would.
    Returns: indices (batch_size / world,) int64, flips (batch_size / world,) bool; numpy
    raises: ValueError if the batch does not split over the ranks
    """
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} does not split over {world} ranks; give a multiple")
    part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    indices = []
    for place in range(step * batch_size, (step + 1) * batch_size)[part]:
        epoch, k = divmod(place, length)
        indices.append(epoch_order(length, seed, epoch)[k])
    chances = np.random.default_rng((seed, 1, step)).random(batch_size)[part]
    return np.array(indices), chances < flip / 2                    # flip=True: half of them


def batches(dataset, batch_size, seed, start=0, rank=0, world=1, flip=False, threads=THREADS):
    """This rank's batches without end, as `batch_plan` gives them from step `start` on.

    Yields tensors, uint8 (batch_size / world, S, S, 3) and int64 labels (batch_size / world,). Threads
    read two batches ahead of the one requested.
    """
    pool = ThreadPoolExecutor(threads)
    ahead = deque()
    try:
        for step in itertools.count(start):
            indices, flips = dataset.plan(batch_size, seed, step, rank, world, flip)
            ahead.append((flips, [pool.submit(dataset.image, i) for i in indices.tolist()]))
            if len(ahead) > 2:
                flips, futures = ahead.popleft()
                images, labels = collate([future.result() for future in futures])
                images[flips] = images[flips, :, ::-1]              # mirrored
                yield torch.from_numpy(images), labels
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read(dataset, index, whole=0):
    """Images `index` of a data set in order, as batches: x (B, 3, H, W) in [-1, 1], labels y (B,), numbers.

    numbers: list of the B images' places in the data set. Unreadable images are left out and counted on
    stderr, and not replaced: a batch may be smaller for it, and an empty one is not yielded.
    whole: if given, each image keeps its own size and is a batch by itself, cropped to sides that are
    multiples of `whole`; an image that is then smaller than SMALLEST is left out, too.
    raises: ValueError if whole images are asked of a data set that has none
    """
    if whole and dataset.paths is None:
        raise ValueError(f"whole images are read from files, but {type(dataset).__name__} has none; "
                         "give a folder of images")
    at_once = 1 if whole else 10
    get = functools.partial(exact_whole, dataset, whole) if whole else dataset.exact
    count = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for k in range(0, len(index), at_once):
            part = index[k:k + at_once]
            found = [(i, row) for i, row in zip(part, pool.map(get, part)) if row is not None]
            if found:
                x, y = collate([row for _, row in found])
                yield to_tensor(x), y, [i for i, _ in found]
            count += len(found)
    if count < len(index):
        tqdm.write(f"left out of {len(index)} images to look at or measure: {len(index) - count}", sys.stderr)


def exact_whole(dataset, multiple, i):
    """Image i at its own size, cut to multiples: uint8 (H, W, 3), label; None if that is not possible."""
    path = dataset.paths[i]
    if path in dataset.bad:
        return None
    try:
        image = np.array(dataset.load(i))
        x = crop_to_multiple(image, multiple)
        if min(x.shape[:2]) < SMALLEST:
            least = -(-SMALLEST // multiple) * multiple
            raise ValueError(f"{image.shape[1]}x{image.shape[0]} pixels are too small, the smallest image "
                             f"that is measured has {least}x{least}")
        return x, int(dataset.labels[i])
    except ValueError as error:
        dataset.report(path, str(error), "it is left out")


# ---------------------------------------------------------------- pixels


def crop_to_multiple(x, multiple):
    """The middle of an image (H, W, 3), as large as it can be with sides that are multiples of `multiple`."""
    H, W = x.shape[:2]
    top = H % multiple // 2
    left = W % multiple // 2
    return x[top:top + H // multiple * multiple, left:left + W // multiple * multiple]


def random_crop(x, size, generator=None):
    """A random window of each image: (B, 3, H, W) -> (B, 3, size, size), size <= H, W.

    generator: of the CPU; None is torch's global one, which training reseeds at each step
    """
    B, _, H, W = x.shape
    tops = torch.randint(H - size + 1, (B,), generator=generator).tolist()
    lefts = torch.randint(W - size + 1, (B,), generator=generator).tolist()
    windows = [image[:, a:a + size, b:b + size] for image, a, b in zip(x, tops, lefts, strict=True)]
    return torch.stack(windows)


def to_tensor(x):
    """uint8 (B, H, W, 3), array or tensor -> float (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(x).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_uint8(x):
    """(B, 3, H, W) in [-1, 1] -> uint8 numpy (B, H, W, 3): the inverse of `to_tensor`.

    Rounded and clamped as guided-diffusion does.
    """
    x = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous().cpu().numpy()
