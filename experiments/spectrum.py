"""Do the details have the spatial structure of the base latent, or are they noise?  Fig. S5 of the paper.

The power of base and detail latents by spatial frequency: white noise is flat, images fall off.

    python experiments/spectrum.py out/tiny-vae --other=out/no-align

Writes spectrum.json and spectrum.png: one curve each for base, details, and the second DA-VAE's details.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import torch

from experiments import shared


def spectrum(z):
    """Radially averaged power of latents (N, K, h, w): [frequencies, power at them].

    Frequencies are in cycles per latent pixel. The mean is subtracted per image and channel; each channel's
    power, averaged over images, is normalised to a mean of 1 over the other frequencies (white noise: 1
    everywhere); then it is averaged over channels and over rings of width 1 / min(h, w), up to 1/2.
    """
    h, w = z.shape[2:]
    side = min(h, w)
    z = z.double() - z.double().mean((2, 3), keepdim=True)
    power = torch.fft.fft2(z).abs().square().mean(0)                               # (K, h, w)
    power = power / power.sum((1, 2), keepdim=True).clamp_min(1e-30) * (h * w - 1)

    radius = torch.hypot(torch.fft.fftfreq(h).view(-1, 1), torch.fft.fftfreq(w).view(1, -1))       # (h, w)
    ring = (radius * side).round()
    rings = torch.arange(1, side // 2 + 1)
    return [(rings / side).tolist(), [power[:, ring == k].mean().item() for k in rings]]


def main(cfg):
    held = shared.open_run(cfg)
    curves = {name: spectrum(z) for name, z in held.groups.items()}
    xlabel, ylabel = "spatial frequency [cycles per latent pixel]", "power (1: the mean over frequencies)"
    return shared.write("spectrum", cfg, held.run, panels=[(xlabel, ylabel, "o-", curves)])


if __name__ == "__main__":
    shared.start(main)
