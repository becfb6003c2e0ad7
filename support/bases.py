"""Base VAEs other than davae.py's AutoencoderKL, and the dict of all of them.

A base of your own is a subclass of `davae.BaseVAE`, whose docstring says what it must provide: four parts
(encoder, to_moments, from_latent, decoder), C, f and width; `config()` and `build`, if it has settings; its
own `encode`, if it has no posterior. Then, in your file or here:

    BASES["Mine"] = Mine                               # the name is the class's own
    save_base_vae(Mine(...), "out/mine")               # support/weights.py

and out/mine is a base like any other: `python train_vae.py --base=out/mine`. A run of train_vae.py saves the
name as "kind" in its config.json, so BASES must have it before the run is loaded: import your file in
support/weights.py, and all scripts know it (docs/recipes.md).
"""
import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from davae import AutoencoderKL, BaseVAE, Level, Mid, normalise
from support import dcae, flux2

# ---------------------------------------------------------------- TAEF2


class TAEF2(BaseVAE):
    """The tiny autoencoder of FLUX.2's latents: f8, 32 channels.  (B, 3, H, W) <-> (B, 32, H/8, W/8)

    Its latents are already normalised: `mean` and `std` stay 0 and 1. It has no posterior: it can be the
    frozen base of a DAVAE, but cannot be trained itself.
    """

    def __init__(self, C=32, width=64):
        super().__init__(C, f=8, width=width)
        self.encoder = nn.Sequential(
            ToUnit(),
            nn.Conv2d(3, width, 3, padding=1),
            TinyBlock(width),                                            # (B, width, H, W)

            halving(width),
            TinyBlock(width),
            TinyBlock(width),
            TinyBlock(width),                                            # (B, width, H/2, W/2)

            halving(width),
            TinyBlock(width),
            TinyBlock(width),
            TinyBlock(width),                                            # (B, width, H/4, W/4)

            halving(width),
            WideBlock(width),
            WideBlock(width),
            WideBlock(width),                                            # (B, width, H/8, W/8)
        )
        self.to_moments = nn.Conv2d(width, C, 3, padding=1)
        self.from_latent = nn.Sequential(SoftClamp(), nn.Conv2d(C, width, 3, padding=1))
        self.decoder = nn.Sequential(
            nn.ReLU(),                                         # after from_latent's convolution (see BaseVAE)
            WideBlock(width),
            WideBlock(width),
            WideBlock(width),                                            # (B, width, h, w)

            nn.Upsample(scale_factor=2),
            smooth(width),
            TinyBlock(width),
            TinyBlock(width),
            TinyBlock(width),                                            # (B, width, 2h, 2w)

            nn.Upsample(scale_factor=2),
            smooth(width),
            TinyBlock(width),
            TinyBlock(width),
            TinyBlock(width),                                            # (B, width, 4h, 4w)

            nn.Upsample(scale_factor=2),
            smooth(width),
            TinyBlock(width),
            nn.Conv2d(width, 3, 3, padding=1),
            FromUnit(),                                            # (B, 3, 8h, 8w)
        )

    def posterior(self, x):
        raise SystemExit("TAEF2 has no posterior: it can be the base of a DA-VAE, but cannot be trained as "
                         "a plain VAE (D = 0)")

    def encode(self, x):
        """Latent of an image: (B, 3, H, W) in [-1, 1] -> (B, 32, H/8, W/8)."""
        return normalise(self.to_moments(self.encoder(x)), self.mean, self.std)

    def decode(self, z):
        return super().decode(z).clamp(-1, 1)

    def config(self):
        return {"C": self.C, "width": self.width}


class TinyBlock(nn.Module):
    """relu(x + conv(x)), conv being three 3x3 convolutions."""

    def __init__(self, width):
        super().__init__()
        self.conv = three_convolutions(width)

    def forward(self, x):
        return F.relu(self.conv(x) + x)


class WideBlock(nn.Module):
    """A TinyBlock on x + pool(x), where pool is four times as wide and acts on each position separately."""

    def __init__(self, width):
        super().__init__()
        self.pool = nn.Sequential(
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.GroupNorm(4, 4 * width),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )
        self.conv = three_convolutions(width)

    def forward(self, x):
        x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


def three_convolutions(width):
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
    )


def halving(width):
    return nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)


def smooth(width):
    """The convolution after a nearest-neighbour doubling."""
    return nn.Conv2d(width, width, 3, padding=1, bias=False)


class ToUnit(nn.Module):
    """[-1, 1] -> [0, 1], the range of TAEF2's pixels."""

    def forward(self, x):
        return 0.5 * x + 0.5


class FromUnit(nn.Module):
    """[0, 1] -> [-1, 1]."""

    def forward(self, x):
        return 2 * x - 1


class SoftClamp(nn.Module):
    """Clamps latents smoothly to (-3, 3)."""

    def forward(self, z):
        return 3 * torch.tanh(z / 3)


# ---------------------------------------------------------------- FLUX.2


class AutoencoderKLFlux2(AutoencoderKL):
    """FLUX.2's VAE: an AutoencoderKL, f8, 32 channels, whose latents are normalised in blocks of 2x2 pixels.

    FLUX.2's transformer takes patches of 2x2 latent pixels. Its pipeline unshuffles them into 128 channels
    and normalises these with the running statistics of a BatchNorm in the VAE's file, so each of the four
    pixels of a block has its own statistics (diffusers 0.42.1, pipeline_flux2_klein.py).

    Here the transformer makes the patches (p = 2, support/diffusers_dit.py), and the VAE normalises: a latent
    keeps 32 channels at f8, the last layer of `to_moments` applies the pipeline's statistics, and the first
    of `from_latent` undoes them. Why not 128 channels at f16? Details come in C groups (Eq. 3): with C = 32
    there may be 32, 64 or 96 of them, with C = 128 no fewer than 128; the closed form of support/fit.py has
    (9 r^2 C)^2 moments, 16 times as many; and TAEF2 uses these very latents, at f8 with 32 channels, so both
    are bases for the same transformer. Why not normalise in the transformer? x_t mixes noise with the
    normalised latent.

    `mean` and `std` stay 0 and 1, as in TAEF2; if trained as a plain VAE (D = 0), it measures them as usual.
    """
    block = 2

    def __init__(self, cfg):
        super().__init__(cfg)
        self.to_moments = nn.Sequential(*self.to_moments, flux2.NormaliseBlocks(cfg.C))
        self.from_latent = nn.Sequential(flux2.UnnormaliseBlocks(cfg.C), *self.from_latent)


# ---------------------------------------------------------------- DC-AE


class DCAE(BaseVAE):
    """DC-AE 1.0, Sana's, and DC-AE 1.5, f32 to f128: support/dcae.py describes it and has its layers.

    It has no posterior: it can be the frozen base of a DAVAE, but cannot be trained itself. `std` is 1 / the
    scale of its latents, `mean` is 0.
    """

    def __init__(self, cfg):
        super().__init__(cfg.C, f=2 ** (len(cfg.widths) - 1), width=cfg.widths[-1])
        self.cfg = cfg
        self.encoder = dcae.Encoder(cfg)
        self.to_moments = dcae.Head(self.width, cfg.C, cfg.ends)
        self.from_latent = dcae.Stem(cfg.C, self.width, cfg.ends)
        self.decoder = dcae.Decoder(cfg)

    def posterior(self, x):
        raise SystemExit("DC-AE has no posterior: it can be the base of a DA-VAE, but cannot be trained as a "
                         "plain VAE (D = 0)")

    def encode(self, x):
        """Normalised latent of an image: (B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f)."""
        return normalise(self.to_moments(self.encoder(x)), self.mean, self.std)

    def config(self):
        return dataclasses.asdict(self.cfg)

    @classmethod
    def build(cls, config):
        return cls(dcae.DCAEConfig(**config))


# ---------------------------------------------------------------- all of them


BASES = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKLFlux2": AutoencoderKLFlux2,
    "TAEF2": TAEF2,
    "DCAE": DCAE,
}


def compile_levels(vae):
    """torch.compile the VAE, level by level.

    Not as a whole: the adaptive weights differentiate with respect to the last convolution alone, and twice.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False
    for part in vae.modules():
        if isinstance(part, Level | Mid | TinyBlock | WideBlock | dcae.ResBlock | dcae.EViTBlock):
            part.compile(dynamic=False)
