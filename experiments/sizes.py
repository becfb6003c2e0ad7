"""Is a DA-VAE as good on whole images as on crops?  How far it is behind its base VAE, by size.

Each image is measured in crops, whole, halved, and, with --tiled=, repeated by mirroring to that size:

    base only     the base channels alone, bicubically enlarged
    closed form   the run's step 0, if it began in closed form and still has it (--save_every=0 keeps it)
    trained       the run
    <other>       another DA-VAE on that base, named by its folder: --other=out/photos-quick-vae, just a start
    full size     the base VAE on all pixels, r^2 times the positions: the closed form's source of details

A model that has also learned the size of its training images is further behind full size at other sizes.

    python experiments/sizes.py out/tiny-vae --sizes=32,0 --images=100

Writes sizes.json (for each size and decoding, means over crops; dB behind full size, ratio to its LPIPS) and
sizes_images.png (the same pixels, in the middle of the first images, at three of the sizes). With
--sizes=48,0 --tiled=256, it is the picture in docs/closed_form.md.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import numpy as np
import torch
from tqdm import tqdm

import evaluate
from davae import base_image
from experiments import shared
from support import checks, data, figures, metrics, ranks, runs, weights
from support.config import field
from support.measurements import run_folder
from train_vae import reconstruct


@dataclass
class Config(shared.Config):
    sizes: tuple = field((64, 128, 256, 512, 0), "sides of crops in pixels; 0: whole images as they are",
                         within=(0, 16_384), count=(1, 12))
    halvings: int = field(2, "also whole images halved, up to this many times", within=(0, 6))
    tiled: int = field(0, "also whole images repeated to squares of this side; 0: off", within=(0, 16_384))
    shown: int = field(2, "images in the picture", within=(0, 100))
    lpips_trunk: str = field("", "local weight file of SqueezeNet, to measure LPIPS as well")
    dtype: str = field("auto", "of the VAEs' matrix products", choices=("auto", "float32", "bfloat16"))


def views(x, cfg, f, least):
    """One image (1, 3, H, W) at each size: {size: (n, 3, h, w)}, sides multiples of f and at least `least`.

    Sizes for which the image is too small or, tiled, too large are left out.
    """
    found = {str(side): crops(x, side) for side in cfg.sizes if side}
    if 0 in cfg.sizes:
        found["whole"] = x
    if cfg.tiled:
        found[f"tiled {cfg.tiled}"] = tiled(x, cfg.tiled)
    for n in range(1, cfg.halvings + 1):
        if min(x.shape[2:]) >= 2**n * f:
            small = base_image(x, 2**n)
            H, W = small.shape[2:]
            found[f"1/{2**n}"] = middle(small, H // f * f, W // f * f)
    return {size: view for size, view in found.items() if len(view) and min(view.shape[2:]) >= least}


def crops(x, side):
    """As many crops as fit side by side around the middle: (1, 3, H, W) -> (n, 3, side, side), n perhaps 0.

    There are an odd number of rows and of columns, so crop n // 2 is in the middle.
    """
    H, W = [pixels // side - (pixels // side + 1) % 2 for pixels in x.shape[2:]]
    if min(H, W) < 1:
        return x.new_empty(0, 3, side, side)
    grid = middle(x, H * side, W * side).view(3, H, side, W, side)
    return grid.permute(1, 3, 0, 2, 4).flatten(0, 1)


def middle(x, height, width):
    """(B, 3, H, W) -> (B, 3, height, width), contiguous."""
    top = (x.shape[2] - height) // 2
    left = (x.shape[3] - width) // 2
    return x[:, :, top:top + height, left:left + width].contiguous()


def tiled(x, side):
    """An image surrounded by its mirror images: (1, 3, H, W) -> (1, 3, side, side); none if it is larger."""
    H, W = x.shape[2:]
    if max(H, W) > side:
        return x[:0]
    top = (side - H) // 2
    left = (side - W) // 2
    around = (0, 0), (0, 0), (top, side - H - top), (left, side - W - left)
    return torch.from_numpy(np.pad(x.numpy(), around, mode="symmetric"))


@torch.no_grad()
def decodings(vae, others, dtype, x):
    """{name: x (B, 3, H, W) decoded}, in [-1, 1].   others: {name: DAVAE}, further decodings"""
    rows = {}
    with ranks.autocast(dtype, x.device):
        rows["base only"], trained = reconstruct(vae, x)
        for name, other in others.items():
            rows[name] = other.decode(other.encode(x))
        rows["trained"] = trained
        rows["full size"] = vae.base.decode(vae.base.encode(x))
    return {name: y.float().clamp(-1, 1) for name, y in rows.items()}


def measure(decode, found, lpips, scores):
    """Add an image's scores to `scores`, {size: {name: [{metric: (n,)}]}}; above 512 pixels view by view.

    returns {size: {name: (1, 3, h, w)}}: the middle crop, decoded, and as "input" itself
    """
    shown = {}
    for size, view in found.items():
        at_once = max(1, 512**2 // view[0, 0].numel())
        part, place = divmod(len(view) // 2, at_once)
        rows = scores.setdefault(size, {})
        for k, x in enumerate(view.split(at_once)):
            decoded = decode(x)
            for name, y in decoded.items():
                rows.setdefault(name, []).append(evaluate.pair_scores(x, y, lpips))
            if k == part:
                shown[size] = {name: y[place][None].cpu() for name, y in (decoded | {"input": x}).items()}
    return shown


def summarise(scores):
    """The table {"size, name": numbers}, means over all crops of the scores from `measure`."""
    table = {}
    for size, rows in scores.items():
        crops = sum(len(part["psnr"]) for part in rows["full size"])
        means = {}
        for name, parts in rows.items():
            means[name] = {metric: torch.cat([part[metric] for part in parts]).mean().item()
                           for metric in parts[0]}
        full = means["full size"]
        for name, mean in means.items():
            row = mean | {"crops": crops, "dB behind": full["psnr"] - mean["psnr"]}
            if "lpips" in mean:
                row["lpips ratio"] = mean["lpips"] / full["lpips"]
            table[f"{size}, {name}"] = row
    return table


def strips(shown, side):
    """{size: {name: (1, 3, side, side)}}: the same pixels of `measure`'s result, at three of the sizes."""
    sizes = [size for size, rows in shown.items() if "/" not in size and min(rows["input"].shape[2:]) >= side]
    found = {}
    for k in sorted({0, len(sizes) // 2, len(sizes) - 1} if sizes else ()):
        found[sizes[k]] = {name: middle(y, side, side) for name, y in shown[sizes[k]].items()}
    return found


def draw(pictures, path):
    """Draw the `strips` of some images: for each size a row per image, a column per decoding."""
    cells = {}
    for size in pictures[0]:
        for i, found in enumerate(pictures):
            for name, y in found[size].items():
                cells[size, name, i] = y
    x = torch.cat(list(cells.values()))
    labels = [f"{size}, {name}" for size, name, _ in cells]
    columns = len(found[size])
    figures.save_grid(x, path, columns, max(1, 192 // x.shape[-1]), labels)


def others(run, other):
    """{name: DAVAE} to compare: the closed form that the run began with, if it still has it, and --other."""
    found = {}
    step = run_folder(run.folder) / "step_000000"
    if run.dit is None and run.config["config"].get("fit") == "closed" and step.exists():
        found["closed form"] = weights.load_davae(step)
    elif not other:
        print(f"{run.folder}: no rows 'closed form'; wanted --fit=closed, and step_000000 kept "
              "(--save_every=0), or --other=, a run of photos-quick")
    if other:
        found[Path(other).name] = weights.load_davae(other)
    return {name: vae.to(run.device, memory_format=torch.channels_last) for name, vae in found.items()}


def images_of(run, cfg):
    """Held-out images one by one, (1, 3, H, W); files at their own size, cropped as the base requires."""
    dataset, index = evaluate.held_out(run, cfg.data_dir, cfg.images)
    whole = run.vae.f * run.vae.base.block if dataset.paths else 0
    for batch, _, _ in data.read(dataset, index, whole):
        yield from batch.split(1)


def main(cfg):
    run = evaluate.load(cfg.run, cfg.weights, cfg.device)
    runs.make_folder(shared.folder_of(cfg))
    f = run.vae.f * run.vae.base.block
    if not run.vae.D:
        raise SystemExit(f"{cfg.run}: has no detail channels to look at; wanted a DA-VAE, or a DiT on one")
    lpips = metrics.make_lpips("squeeze", cfg.lpips_trunk).to(run.device) if cfg.lpips_trunk else None
    least = checks.SMALLEST["squeeze"] if cfg.lpips_trunk else data.SMALLEST
    for side in filter(None, (*cfg.sizes, cfg.tiled)):
        if side % f or side < least:
            raise SystemExit(f"--sizes, --tiled: {side} pixels; wanted multiples of {f}, {least} or more")
    beside = others(run, cfg.other)
    window = min([128, run.config["config"]["image_size"], *filter(None, cfg.sizes)])

    decode = partial(decodings, run.vae, beside, cfg.dtype)
    scores, pictures = {}, []
    for x in tqdm(images_of(run, cfg), desc="images", mininterval=1):
        found = {size: view.to(run.device) for size, view in views(x, cfg, f, least).items()}
        shown = strips(measure(decode, found, lpips, scores), window)
        if len(pictures) < cfg.shown and shown and (not pictures or shown.keys() == pictures[0].keys()):
            pictures.append(shown)
    if not scores:
        raise SystemExit(f"{cfg.data_dir}: no readable image is as large as any of --sizes; give less")
    table = shared.write("sizes", cfg, run, summarise(scores))
    if pictures:
        draw(pictures, shared.folder_of(cfg) / "sizes_images.png")
    return table


if __name__ == "__main__":
    shared.start(main, Config)
