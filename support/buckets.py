"""Images that are not square: sorted into buckets by aspect ratio, each batch from a single bucket.

    shaped = sort(images, cfg, multiple)           # before data.batches or latents.latent_source

--buckets=2 lets a bucket be up to twice as wide as high, or twice as high as wide. Its sides are multiples of
what the models take, and its area is that of the --image_size square, except that one side is rounded: all
buckets have about the same number of tokens, and need about the same memory per batch. An image goes to the
bucket with the nearest aspect ratio, is resized to cover it, and is cropped equally on both sides.

Which images step n reads follows from (seed, n), as in support/data.py, so a resumed run continues exactly,
and ranks share a batch. In an epoch each bucket gives as many full batches as its images fill, and the
batches of all buckets are shuffled. Leftover images wait, and come first in the bucket's next batch, an epoch
later: every batch is full, no image is left out, and none is read more often than others. A bucket with fewer
images than a batch gives one every few epochs, in which images repeat; the printed table names such buckets.
"""
import contextlib
import functools
import io
import itertools
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support import data, files, identity, photos, ranks, runs

HEAD = 64 << 10            # bytes to read of an image in a shard, to find its size


# ---------------------------------------------------------------- from a data set to buckets


def sort(images, cfg, multiple):
    """`images` as `Buckets`, whose table rank 0 prints; unchanged if cfg.buckets is 1.  Called by all ranks.

    cfg: of either training script;  multiple: what both sides of an image must be multiples of
    raises: SystemExit if there are no image files or no other shape; ValueError if too many are unreadable
    """
    if cfg.buckets == 1:
        if ranks.this_rank() == 0:
            say_if_enlarged(images, cfg)
        return images
    given = f"--buckets={cfg.buckets:g}"
    if images.paths is None:
        raise SystemExit(f"{given}: the images of --data_dir={cfg.data_dir} have one shape; give a folder of "
                         "images, or leave out --buckets")
    if cfg.compile:
        raise SystemExit(f"{given}: --compile=True compiles for one shape; leave out one of them")
    shapes = shapes_of(cfg.image_size, multiple, cfg.buckets)
    if len(shapes) == 1:
        raise SystemExit(f"{given}: in multiples of {multiple}, the square is the only shape of about "
                         f"{cfg.image_size}x{cfg.image_size} pixels; raise --buckets or --image_size")
    sizes = kept_sizes(images, cfg) if ranks.this_rank() == 0 else None
    sizes = ranks.from_all(sizes)[0]
    found = Buckets(images, shapes, nearest(shapes, sizes), cfg.data_dir)
    if ranks.this_rank() == 0:
        print(table(found, sizes, cfg, multiple))
    return found


def shapes_of(side, multiple, most):
    """[(height, width)] of the buckets, from the tallest to the widest; the square is among them.

    Sides are multiples of `multiple`, neither more than `most` times the other. Given the shorter side, the
    longer one brings the area nearest to side^2: off by at most multiple / (2 * side) of it.
    raises: ValueError unless side is a multiple
    """
    if side % multiple:
        raise ValueError(f"image_size {side}: buckets need a multiple of {multiple}")
    shapes = {(side, side)}
    for short in range(multiple, side, multiple):
        long = round(side**2 / short / multiple) * multiple
        if long <= most * short:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes, key=ratio)


def ratio(shape):
    """Width / height of (height, width)."""
    return shape[1] / shape[0]


def shortest(cfg, multiple):
    """The shortest side of any bucket, or of the square if there are none."""
    if cfg.buckets == 1:
        return cfg.image_size
    return min(itertools.chain.from_iterable(shapes_of(cfg.image_size, multiple, cfg.buckets)))


def nearest(shapes, sizes):
    """For each image, which shape has the nearest aspect ratio, on a log scale: (N,) int64, or -1.

    shapes: from `shapes_of`;  sizes: from `read_sizes`, where (0, 0) gives -1
    """
    logs = np.log([ratio(shape) for shape in shapes])
    between = (logs[1:] + logs[:-1]) / 2
    known = np.maximum(sizes, 1)                   # log(0) would warn
    found = np.searchsorted(between, np.log(known[:, 1] / known[:, 0]))
    return np.where(sizes[:, 0] > 0, found, -1)


def cropped_away(sizes, shapes):
    """Which fraction of each image (height, width) is cropped to fit its shape: both (N, 2) -> (N,)."""
    off = np.log(sizes[:, 1] / sizes[:, 0]) - np.log(shapes[:, 1] / shapes[:, 0])
    return 1 - np.exp(-np.abs(off))


def table(found, sizes, cfg, multiple):
    """What `sort` prints: each bucket, its number of images, and how much of them is cut off."""
    shapes = found.shapes[found.bucket]
    known = found.bucket >= 0
    lost = np.zeros(len(sizes))
    lost[known] = cropped_away(sizes[known], shapes[known])
    square = cropped_away(sizes[known], np.ones((1, 2)))
    lines = [f"{cfg.out}: {len(found.parts)} buckets of about {cfg.image_size}x{cfg.image_size} pixels, "
             f"multiples of {multiple}, sides up to {cfg.buckets:g}:1",
             "  height x width   images   cut off"]
    for part in found.parts:
        lines.append(f"  {part.name:>14} {len(part):>8} {lost[part.members].mean():>9.1%}")
    lines.append(f"  cut off in all {lost[known].mean():.1%}, of squares {square.mean():.1%}")
    if not known.all():
        lines.append(f"  {(~known).sum()} unreadable images are in none")
    small = [part.name for part in found.parts if len(part) < cfg.batch_size]
    if small:
        lines.append(f"  fewer than a batch of {cfg.batch_size}, in which they come more than once: "
                     f"{', '.join(small)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- sizes, from the headers of images


def kept_sizes(images, cfg):
    """`read_sizes`, kept in the run's sizes.npz: a start with the same images reads only unreadable ones."""
    path = Path(cfg.out) / "sizes.npz"
    known = None
    absent_or_damaged = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)
    with contextlib.suppress(*absent_or_damaged), np.load(path) as kept:
        if str(kept["images"]) == images.fingerprint:
            known = kept["sizes"]
    sizes = read_sizes(images, cfg.data_dir, known)
    with runs.disk_may_fail(), files.renamed_when_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, images=images.fingerprint, sizes=sizes)
    return sizes


def read_sizes(images, name, known=None):
    """(N, 2) int64: height and width of each image, turned upright; (0, 0) if it cannot be read.

    name: of the data set;  known: such sizes, of which only the (0, 0) are read
    raises: ValueError if at least 10 images and 1 % of all cannot be read
    """
    sizes = np.zeros((len(images), 2), dtype=np.int64) if known is None else known
    unknown = np.flatnonzero(sizes[:, 0] == 0)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(functools.partial(size_of, images), unknown.tolist())
        title = f"sizes of the images in {name}"
        for i, size in zip(unknown, tqdm(found, title, len(unknown), mininterval=1, delay=2)):
            sizes[i] = size
    lost = (sizes[:, 0] == 0).sum()
    if lost >= min(len(images), max(10, len(images) / 100)):
        raise ValueError(f"{lost} of {len(images)} images in {name} are unreadable, repair or remove them")
    return sizes


def size_of(images, i):
    """(height, width) of image i, from its header, or else from its pixels; (0, 0) if it is unreadable."""
    try:
        if isinstance(images, data.ImageFiles):
            return said_size(images, i)
    except photos.DECODING_ERRORS:
        pass                                       # the header may be longer; if not, `load` will say why
    try:
        image = images.load(i)
        return image.height, image.width
    except ValueError as error:
        images.report(images.paths[i], str(error), "it is in no bucket")
        return 0, 0


def said_size(images, i):
    """(height, width) of image i as its header says.   raises: one of photos.DECODING_ERRORS"""
    if isinstance(images, data.ImageShards):
        return size_in_header(io.BytesIO(images.index.read(i, HEAD)))
    return size_in_header(images.paths[i])


def say_if_enlarged(images, cfg, most=100):
    """A line if some images (of at most `most` looked at) are smaller than what they are resized to."""
    if not isinstance(images, data.ImageFiles):
        return
    sizes = []
    for i in np.linspace(0, len(images) - 1, min(most, len(images))).astype(int):
        with contextlib.suppress(*photos.DECODING_ERRORS):
            sizes.append(said_size(images, i))
    small = [size for size in sizes if min(size) < cfg.image_size]
    if small:
        height, width = min(small, key=min)
        print(f"{cfg.data_dir}: {len(small)} of {len(sizes)} images looked at are smaller than --image_size="
              f"{cfg.image_size} (one has {width}x{height} pixels), and are enlarged: their details blur")


def size_in_header(source):
    """(height, width) of an image file, rotated as its EXIF data says."""
    with Image.open(source) as file:
        quarter_turn = photos.orientation(file) in (5, 6, 7, 8)
        if quarter_turn and file.format != "TIFF":                 # Pillow itself turns a TIFF, and its size
            return file.width, file.height
        return file.height, file.width


# ---------------------------------------------------------------- the data set, and its order


class Bucket(data.Dataset):
    """The images of one shape (height, width): those numbered `members` in `images`; root: the set's name.

    An unreadable image is replaced by the next one of the bucket. If the bucket has none that can be read,
    the next one of all images takes its place, cropped to the bucket's shape, which the batch must have.
    """

    def __init__(self, images, members, shape, root):
        self.images = images
        self.members = members
        self.shape = shape
        self.name = f"{shape[0]}x{shape[1]}"
        self.root = root
        self.labels = images.labels[members]

    def image(self, k):
        """The k-th image of the bucket, or the one in its place: uint8 (height, width, 3), label."""
        first = self.members[k]
        others = itertools.chain(range(first, len(self.images)), range(first))
        for i in itertools.chain(self.members[k:], self.members[:k], others):
            row = self.cropped(int(i))
            if row is not None:
                return row
            self.images.refuse_if_many_are_bad(self.root)

    def cropped(self, i):
        """Image i of all in the bucket's shape: uint8 (height, width, 3), label; None if it is unreadable."""
        path = self.images.paths[i]
        if path in self.images.bad:
            return None
        try:
            pixels = data.center_crop(self.images.load(i), *self.shape)
            return np.asarray(pixels), int(self.images.labels[i])
        except ValueError as error:
            self.images.report(path, str(error), "the next image takes its place")


class Buckets(data.Dataset):
    """A data set whose image(i) has the shape of its bucket, and whose `plan` keeps a batch in one bucket.

    images: a data set of files;  shapes: [(height, width)];  bucket: (N,) the number of each image's shape
    attributes: parts, the buckets that have images; bucket and place, (N,): for each image, which of them it
    is in, and where; -1 if in none
    """

    def __init__(self, images, shapes, bucket, root):
        self.images = images
        self.labels = images.labels
        used = np.unique(bucket[bucket >= 0]).tolist()
        self.shapes = np.array([shapes[n] for n in used])
        self.parts = []
        self.bucket = np.full(len(bucket), -1)
        self.place = np.full(len(bucket), -1)
        for n, which in enumerate(used):
            members = np.flatnonzero(bucket == which)
            self.parts.append(Bucket(images, members, shapes[which], root))
            self.bucket[members] = n
            self.place[members] = np.arange(len(members))

    def image(self, i):
        return self.parts[self.bucket[i]].image(int(self.place[i]))

    @functools.cached_property
    def fingerprint(self):
        """A digest of the images, and of the shape that each gets."""
        shapes = self.shapes[self.bucket] * (self.bucket >= 0)[:, None]
        return identity.of_text(self.images.fingerprint + runs.hash_of(shapes))

    def plan(self, batch_size, seed, step, rank=0, world=1, flip=False):
        """As `data.batch_plan`, but the whole batch comes from one bucket."""
        counts = tuple(len(part) for part in self.parts)
        bucket, number = batch_at(counts, batch_size, seed, step)
        own = int(np.random.SeedSequence((seed, bucket)).generate_state(1, np.uint64)[0])
        places, flips = data.batch_plan(counts[bucket], batch_size, own, number, rank, world, flip)
        return self.parts[bucket].members[places], flips


def batch_at(counts, batch_size, seed, step):
    """(bucket, which of its batches) of a step;  counts: images of each bucket.

    After e epochs, a bucket of n images has given its first e * n // batch_size batches.
    """
    epoch = step * batch_size // sum(counts)       # or a later one: leftovers wait
    while start_of(counts, batch_size, epoch + 1) <= step:
        epoch += 1
    return mixed(counts, batch_size, seed, epoch)[step - start_of(counts, batch_size, epoch)]


def start_of(counts, batch_size, epoch):
    """The step at which an epoch begins."""
    return sum(epoch * count // batch_size for count in counts)


@functools.lru_cache(maxsize=2)
def mixed(counts, batch_size, seed, epoch):
    """[(bucket, which of its batches)] of an epoch, in the order of its steps."""
    batches = []
    for bucket, count in enumerate(counts):
        first = epoch * count // batch_size
        last = (epoch + 1) * count // batch_size
        batches += [(bucket, number) for number in range(first, last)]
    order = np.random.default_rng((seed, 2, epoch)).permutation(len(batches))
    return [batches[k] for k in order]
