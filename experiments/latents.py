"""What do the latents look like?  Fig. 3 of the paper: principal components as colours, next to the images.

    python experiments/latents.py out/tiny-vae --other=out/no-align

Writes latents_images.png: six images, and the first three principal components of their base latents, their
details, and the details of a second DA-VAE. Aligned details show the shapes of the base latents.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import torch
import torch.nn.functional as F

from experiments import shared


def latents(z, count, size):
    """The first `count` of the latents (N, K, h, w) as colours: (count, 3, H, W), where size is (H, W).

    Red, green and blue are the first three principal components over all latents and positions, from -2 sigma
    (-1) to 2 sigma (1).
    """
    x = z.movedim(1, 3).double() - z.mean((0, 2, 3))                               # (N, h, w, K)
    _, directions = torch.linalg.eigh(torch.cov(x.flatten(0, 2).T))         # (K, K), the largest last
    rgb = x @ directions[:, -3:].flip(1)                                           # (N, h, w, 3)
    rgb = rgb / rgb.std((0, 1, 2)) / 2
    return F.interpolate(rgb.movedim(3, 1)[:count].float(), size)


def main(cfg):
    held = shared.open_run(cfg)
    pictures = {"input": held.x[:6]}
    for name, z in held.groups.items():
        pictures[f"{name}, PCA"] = latents(z, 6, held.x.shape[2:])
    return shared.write("latents", cfg, held.run, pictures=pictures)


if __name__ == "__main__":
    shared.start(main)
