"""How good is an image decoded from the first k details?  Fig. 3 of DC-AE 1.5, for any trained DA-VAE.

Held-out images are decoded with the first 0, C, 2C, ... D details in the order of support/levels.py, one more
of every group each time, and zero for the others; no decoder is trained for this.

    python experiments/levels.py out/tiny-vae --images=200

Writes levels.json (PSNR and SSIM at each level), levels.png and levels_images.png. --other= names a second
DA-VAE, for example one trained with --keep_levels, to compare.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import torch

from experiments import shared
from support import weights
from support.config import field
from support.levels import check
from support.metrics import psnr, ssim, upsampled


@dataclass
class Config(shared.Config):
    levels: tuple = field((), "numbers of details; empty: 0, C, 2C, ... D", within=(0, 4096), count=(0, 256))


@torch.no_grad()
def decode_levels(vae, x, levels):
    """{"base only": ..., "k details": images (B, 3, H, W)} of x (B, 3, H, W), for each k of `levels`."""
    z_all = vae.encode(x)
    base = vae.decode_base(z_all[:, :vae.C])
    rows = {"base only": upsampled(base, vae.r)["base only, bicubic"]}
    for k in levels:
        rows[f"{k} details"] = vae.decode(z_all, keep=k).clamp(-1, 1)
    return rows


def scores(vae, x, levels, device):
    """{row: {"PSNR": dB, "SSIM": ...}}: means over the images x (N, 3, H, W)."""
    found = {}
    for part in x.split(10):
        part = part.to(device)
        for row, y in decode_levels(vae, part, levels).items():
            found.setdefault(row, []).append(torch.stack([psnr(y, part), ssim(y, part)], dim=1).cpu())
    means = {row: torch.cat(parts).mean(0).tolist() for row, parts in found.items()}
    return {row: dict(zip(("PSNR", "SSIM"), mean)) for row, mean in means.items()}


def main(cfg):
    held = shared.open_run(cfg)
    vae, device = held.run.vae, held.run.device
    levels = check(cfg.levels or tuple(range(0, vae.D + 1, vae.C)), vae.C, vae.D, "--levels")
    tables = {Path(cfg.run).name: scores(vae, held.x, levels, device)}
    if cfg.other:
        other = weights.load_davae(cfg.other).to(device)
        check(levels, other.C, other.D, "--levels")
        tables[Path(cfg.other).name] = scores(other, held.x, levels, device)

    table = {f"{name}, {row}": found for name, rows in tables.items() for row, found in rows.items()}
    curves = {name: [list(levels), [rows[f"{k} details"]["PSNR"] for k in levels]]
              for name, rows in tables.items()}
    first = held.x[:6]
    pictures = {**decode_levels(vae, first.to(device), levels), "input": first}
    return shared.write("levels", cfg, held.run, table=table, pictures=pictures,
                        panels=[("details", "PSNR (dB)", "o-", curves)])


if __name__ == "__main__":
    shared.start(main, Config)
