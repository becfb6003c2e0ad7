"""Do the details arrange images as the base latents do?  Fig. 3 of the paper: t-SNE, coloured by class.

    python experiments/tsne.py out/tiny-vae --other=out/no-align

Writes tsne.json: how often a latent's nearest neighbour is of the same class; and tsne.png: a panel each for
the base latents, the details, and a second DA-VAE's details, each with its own axes. This trains a DA-VAE
without alignment: `python train_vae.py tiny --align=0 --out=out/no-align`.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import torch

from experiments import shared


def tsne(z, y):
    """(points (N, 2), how often the nearest other latent is of the same class).

    z: latents (N, K, h, w).   y: (N,), their classes.
    """
    from sklearn.manifold import TSNE
    z = z.flatten(1)                                                               # (N, K*h*w)
    nearest = torch.cdist(z, z).fill_diagonal_(torch.inf).argmin(1)
    points = TSNE(perplexity=min(30, len(z) / 4), random_state=0).fit_transform(z.numpy())
    return points, (y[nearest] == y).float().mean().item()


def main(cfg):
    held = shared.open_run(cfg)
    if len(held.x) < 2:
        raise SystemExit(f"--images={cfg.images}: {len(held.x)} can be read, neighbours need at least 2")
    table, panels = {}, []
    for name, z in held.groups.items():
        points, same = tsne(z, held.y)
        curves = {}
        for k, label in enumerate(held.classes[:10] or [""]):
            curves[label] = points[held.y == k].T.tolist()
        table[name] = {"nearest of same class": same}
        panels.append((name, "", ".", curves))
    return shared.write("tsne", cfg, held.run, table, panels)


if __name__ == "__main__":
    shared.start(main)
