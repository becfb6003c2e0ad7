"""At which times is the velocity of the details hard to predict, and that of the base?

The mean (v - v*)^2 of base and detail channels by time t, on held-out latents: t is uniform in each bin, and
each latent is used once per bin. This resolves what Fig. S3 (experiments/losses.py) averages over t.

    python experiments/timebins.py out/tiny --images=500

Writes timebins.json and timebins.png. The run must be a class-conditional one of finetune.py.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import torch

from experiments import shared
from support.config import field


@dataclass
class Config(shared.Config):
    bins: int = field(10, "bins of t between 0 and 1", within=(1, 10_000))


@torch.no_grad()
def timebins(dit, z_all, y, C, bins=10, device="cpu"):
    """{"base", "detail": [middles of the bins, mean (v - v*)^2]} of a transformer on latents.

    z_all: (N, C+D, h, w).   y: (N,), their classes.
    t = 0 is noise, t = 1 is data; x_t = t*data + (1-t)*noise and v* = data - noise.
    """
    generator = torch.Generator().manual_seed(0)
    middles = [(k + 0.5) / bins for k in range(bins)]
    base, detail = [], []
    for k in range(bins):
        errors = []
        for z, labels in zip(z_all.split(50), y.split(50)):
            t = (k + torch.rand(len(z), generator=generator)) / bins               # (B,)
            noise = torch.randn(z.shape, generator=generator)
            s = t.view(-1, 1, 1, 1)
            x_t = s * z + (1 - s) * noise
            v = dit(x_t.to(device), t.to(device), labels.to(device)).float().cpu()
            errors.append((v - (z - noise)).square())
        error = torch.cat(errors)                                                  # (N, C+D, h, w)
        base.append(error[:, :C].mean().item())
        detail.append(error[:, C:].mean().item())
    return {"base": [middles, base], "detail": [middles, detail]}


def main(cfg):
    held = shared.open_run(cfg)
    run = held.run
    if run.dit is None or run.config["config"].get("text") or held.classes != run.config["classes"]:
        raise SystemExit(f"{cfg.run}: wanted a class-conditional run of finetune.py, and held-out images of "
                         "its classes")
    if not run.dit.cfg.D:
        raise SystemExit(f"{cfg.run}: its transformer makes no details; wanted one widened by some")
    curves = timebins(run.dit, held.z_all, held.y, run.vae.C, cfg.bins, run.device)
    xlabel = f"time t, bins of {1 / cfg.bins:.3g} (0: noise, 1: data)"
    return shared.write("timebins", cfg, run, panels=[(xlabel, "mean (v - v*)^2", "o-", curves)])


if __name__ == "__main__":
    shared.start(main, Config)
