"""bases"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from davae import BaseVAE


class TinyBlock(nn.Module):
    """TAEF2's residual block: three 3x3 convolutions, ReLU; `wide` ones first add a 1x1 bottleneck of 4x the width."""

    def __init__(self, width=64, wide=False):
        super().__init__()
        self.pool = nn.Sequential(nn.Conv2d(width, 4 * width, 1, bias=False), nn.GroupNorm(4, 4 * width), nn.ReLU(),
                                  nn.Conv2d(4 * width, width, 1, bias=False)) if wide else None
        self.conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
                                  nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Apply(nn.Module):
    """A function as a layer without weights."""

    def __init__(self, f):
        super().__init__()
        self.forward = f


class TAEF2(BaseVAE):
    """The tiny autoencoder of FLUX.2's latents: f8, 32 channels, no posterior.  (B, 3, H, W) <-> (B, 32, H/8, W/8)

    Its files work on [0, 1] pixels; the functions at both ends keep this project's [-1, 1].
    """

    def __init__(self, C=32, width=64):
        super().__init__(C, 8)

        conv = partial(nn.Conv2d, width, width, 3, padding=1, bias=False)

        def blocks(n, wide=False):
            return [TinyBlock(width, wide) for _ in range(n)]

        self.encoder = nn.Sequential(
            Apply(lambda x: 0.5 * x + 0.5), nn.Conv2d(3, width, 3, padding=1), *blocks(1), conv(stride=2), *blocks(3),
            conv(stride=2), *blocks(3), conv(stride=2), *blocks(3, wide=True))
        self.to_moments = nn.Conv2d(width, C, 3, padding=1)
        self.from_latent = nn.Sequential(Apply(lambda z: 3 * torch.tanh(z / 3)), nn.Conv2d(C, width, 3, padding=1), nn.ReLU())
        self.decoder = nn.Sequential(*blocks(3, wide=True), nn.Upsample(scale_factor=2), conv(), *blocks(3),
                                     nn.Upsample(scale_factor=2), conv(), *blocks(3), nn.Upsample(scale_factor=2), conv(),
                                     *blocks(1), nn.Conv2d(width, 3, 3, padding=1), Apply(lambda x: 2 * x - 1))
        self.encoder.width = self.decoder.width = width

    def encode(self, x):
        return self.normalise(self.to_moments(self.encoder(x)))

    def decode(self, z):
        return super().decode(z).clamp(-1, 1)
