"""The images that stage 1 reads besides its batches: to fit new blocks, to measure latents, to validate."""
import math

import torch
from tqdm import tqdm

from support import data
from support.measurements import unseen_seed


def fitting_images(cfg, vae, train_set, device, rank):
    """Images for the closed form: evenly spaced training images, 20 latent pixels for each of its unknowns.

    Yields batches (B, 3, H, W) in [-1, 1], of at most 16 images and one megapixel, but at least one image.
    """
    unknowns = 9 * (vae.C + vae.D) + 1                             # of the up block, for each feature
    n = math.ceil(20 * unknowns * vae.f**2 / cfg.image_size**2)
    index = torch.linspace(0, len(train_set) - 1, min(n, len(train_set))).long()
    size = min(16, max(1, 1024**2 // cfg.image_size**2))
    title = f"{cfg.out}: fitting the new blocks"
    for part in tqdm(index.split(size), desc=title, disable=rank > 0, mininterval=1):
        x, _ = data.stack(train_set, part.tolist())
        yield data.to_tensor(x).to(device)


def statistics_images(cfg, train_set, device, rank, world):
    """Batches of this rank's share of cfg.stats training images.

    They are evenly spaced, because a folder's images come class by class; of the built-in set, which is in no
    particular order, they are the first.
    """
    n = min(cfg.stats, len(train_set))
    index = range(n)
    if cfg.data_dir != "procedural":
        index = torch.linspace(0, len(train_set) - 1, n).long().tolist()
    mine = index[rank::world]
    title = f"{cfg.out}: measuring the latents"
    for k in tqdm(range(0, len(mine), cfg.micro_batch), desc=title, disable=rank > 0, mininterval=1):
        x, _ = data.stack(train_set, mine[k:k + cfg.micro_batch])
        yield data.to_tensor(x).to(device)


def in_words(cfg, n):
    """A description of the n `validation_images`, for a sentence."""
    kind = "held-out" if cfg.val_dir or cfg.data_dir == "procedural" else "training"
    return f"{n} {kind} images of {cfg.image_size} pixels"


def validation_images(cfg, train_set, n=64):
    """(N, 3, H, W) in [-1, 1]: evenly spaced held-out images, or training images if --val_dir is empty.

    At most n images and four megapixels, but at least 8 images. The built-in set needs no --val_dir: its
    held-out images are those of a seed that neither this run nor its base was trained with.
    """
    n = min(n, max(8, 2048**2 // cfg.image_size**2))
    held_out = train_set
    if cfg.val_dir or cfg.data_dir == "procedural":
        held_out = data.open_dataset(cfg.val_dir or cfg.data_dir, cfg.image_size, n, unseen_seed(vars(cfg)))
    index = torch.linspace(0, len(held_out) - 1, min(n, len(held_out))).long()
    batches = [x for x, _, _ in data.read(held_out, index.tolist())]
    if not batches:
        raise SystemExit(f"{cfg.val_dir or cfg.data_dir}: none of the {len(index)} images for validation can "
                         "be read")
    return torch.cat(batches)


def share(n, rank, world):
    """Which of n validation images a rank measures: rank 0, which also draws its own, at least four of them.

    The others share the rest; with few images, some have none.
    """
    numbers = torch.arange(n)
    first = max(4, math.ceil(n / world))
    return [numbers[:first], *numbers[first:].tensor_split(max(1, world - 1))][rank]
