"""What fewer tokens save: FLOPs and seconds of a transformer's forward pass at 1, 4 and 16 times the tokens.

    python experiments/speed.py                        # LightningDiT-XL/1 at 2,048 pixels; 5 minutes on a CPU

The same image with an f16 VAE, in three ways: the VAE's own latent (16 times the tokens), a DA-VAE with
r = 2 (4 times), and one with r = 4 (once). FLOPs are counted for the whole transformer. Only its first blocks
are timed, with random weights, and scaled up; this omits the ends, a thousandth of the FLOPs. Attention grows
with the square of the tokens, so at this size 16 times the tokens cost more than 16 times the seconds.

Writes speed.json to --out.
"""
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import torch

from dit import LightningDiTConfig, LightningDiT
from experiments import shared
from kernels import counted
from sample import for_sampling
from support import figures, ranks, runs
from support.config import field


@dataclass
class Config:
    out: str = field("out", "folder for the results")
    image_size: int = field(2048, "pixels a side", within=(64, 16_384))
    blocks: int = field(2, "blocks to time, of the 28", within=(1, 28))
    repeats: int = field(3, "passes of each; the median counts", within=(1, 100))
    device: str = field("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = field("auto", "of matrix products", choices=("auto", "float32", "bfloat16"))


def flops(sizes):
    """FLOPs of a forward pass of one image, with all blocks."""
    with torch.device("meta"):
        model = LightningDiT(sizes)
        example = inputs(sizes)
    with torch.no_grad():
        _, forward = counted(lambda: model(*example))
    return forward


def inputs(sizes):
    """(z_all, t, y) of one image, random."""
    side = sizes.grid * sizes.p
    return torch.randn(1, sizes.C + sizes.D, side, side), torch.rand(1), torch.zeros(1, dtype=torch.long)


@torch.no_grad()
def seconds(sizes, cfg, device):
    """Seconds of a forward pass of one image: the median for `blocks` blocks, scaled to all of them."""
    model = LightningDiT(replace(sizes, depth=cfg.blocks)).to(device).eval()
    if ranks.in_bfloat16(cfg.dtype, device):
        for_sampling(model)                                        # rounds the weights once, as in sample.py
    batch = [x.to(device) for x in inputs(sizes)]
    times = []
    for _ in range(cfg.repeats + 1):                               # the first is slower and not counted
        since = time.time()
        with ranks.autocast(cfg.dtype, device):
            v = model(*batch)
        v.sum().item()                                             # waits for the device
        times.append(time.time() - since)
    return statistics.median(times[1:]) * sizes.depth / cfg.blocks


def main(cfg):
    _, _, device = ranks.setup(cfg.device)
    if cfg.image_size % 64:
        raise SystemExit(f"--image_size={cfg.image_size}: wanted a multiple of 64, f16 times r = 4")
    table = {}
    for name, r, D in (("DA-VAE, r = 4", 4, 480), ("DA-VAE, r = 2", 2, 96), ("the VAE's own latent", 1, 0)):
        sizes = LightningDiTConfig(D=D, grid=cfg.image_size // (16 * r))
        table[name] = {"tokens": sizes.grid**2, "GFLOPs": flops(sizes) / 1e9,
                       "seconds": seconds(sizes, cfg, device)}
    least = table["DA-VAE, r = 4"]
    for row in table.values():
        row["x tokens"] = row["tokens"] / least["tokens"]
        row["x FLOPs"] = row["GFLOPs"] / least["GFLOPs"]
        row["x seconds"] = row["seconds"] / least["seconds"]
    figures.print_table(f"LightningDiT-XL/1, {cfg.image_size} px, one pass", table)
    runs.make_folder(cfg.out)
    runs.write_json(Path(cfg.out) / "speed.json", {"settings": asdict(cfg), "table": table})
    return table


if __name__ == "__main__":
    shared.start(main, Config)
