"""FLUX.2's VAE: how its latents are normalised, and its names in public files; the class is in bases.py."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.formats import bare, import_kl, kl_sizes, need


class Blocks(nn.Module):
    """Statistics of C channels at each pixel of a 2x2 block: number 4c + 2i + j is channel c, pixel i, j."""

    def __init__(self, C):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4 * C))
        self.register_buffer("std", torch.ones(4 * C))

    def per_channel(self):
        """mean and std, ready to broadcast over (B, 4C, h/2, w/2)."""
        return self.mean[:, None, None], self.std[:, None, None]

    @staticmethod
    def unshuffle(x):
        """(B, C, h, w) -> (B, 4C, h/2, w/2).   raises: ValueError if h or w is odd"""
        h, w = x.shape[2:]
        if h % 2 or w % 2:
            raise ValueError(f"a latent of {h}x{w} pixels: FLUX.2's are made of 2x2 blocks, so both sides of "
                             "the base image must be multiples of 2 f")
        return F.pixel_unshuffle(x, 2)


class NormaliseBlocks(Blocks):
    """Mean and logvar of raw latents -> of normalised ones: (B, 2C, h, w) -> (B, 2C, h, w)."""

    def forward(self, moments):
        shift, scale = self.per_channel()
        mean, logvar = moments.chunk(2, dim=1)
        mean = (self.unshuffle(mean) - shift) / scale
        logvar = self.unshuffle(logvar) - 2 * scale.log()
        return torch.cat([F.pixel_shuffle(mean, 2), F.pixel_shuffle(logvar, 2)], dim=1)


class UnnormaliseBlocks(Blocks):
    """Normalised latents -> raw ones: (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, z):
        shift, scale = self.per_channel()
        return F.pixel_shuffle(self.unshuffle(z) * scale + shift, 2)


# ---------------------------------------------------------------- its file


STATISTICS = ("bn.running_mean", "bn.running_var")     # of unshuffled latents, (4C,) each
COUNTER = "bn.num_batches_tracked"                     # an integer, not needed here
BESIDE = {                                             # in its authors' file, these are in the halves
    "encoder.quant_conv": "quant_conv",
    "decoder.post_quant_conv": "post_quant_conv",
}


def is_flux2(sd):
    """Does the state dict have an autoencoder's names, and the statistics of a BatchNorm as well?"""
    names = [f".{key}" for key in sd]
    marks = (".decoder.conv_in.weight", f".{STATISTICS[0]}")
    return all(any(name.endswith(mark) for name in names) for mark in marks)


def import_flux2(sd, eps):
    """FLUX.2's VAE -> (state dict in our names, sizes): diffusers' names, or its authors', which are LDM's.

    eps: of the BatchNorm: std = sqrt(running_var + eps)
    raises: ValueError with one sentence if something is missing
    """
    sd = bare({key: weight for key, weight in sd.items() if not key.endswith(COUNTER)}, STATISTICS[:1])
    need(sd, *STATISTICS)
    mean = sd["bn.running_mean"].float()
    std = (sd["bn.running_var"].float() + eps).sqrt()
    sd = {lifted(key): weight for key, weight in sd.items() if key not in STATISTICS}
    kl = import_kl(sd)
    sizes = kl_sizes(kl)

    ours = {}
    for key, weight in kl.items():
        if key.startswith("from_latent."):                 # where ours has one more layer, the first
            _, number, part = key.split(".")
            key = f"from_latent.{int(number) + 1}.{part}"
        ours[key] = weight
    last = 2 if sizes["quant"] else 1
    for layer in (f"to_moments.{last}", "from_latent.0"):
        ours |= {f"{layer}.mean": mean, f"{layer}.std": std}
    return ours, sizes


def lifted(key):
    """A name in the authors' file as LDM's, where the convolutions next to the latent are in neither half."""
    layer, _, part = key.rpartition(".")
    return f"{BESIDE[layer]}.{part}" if layer in BESIDE else key
