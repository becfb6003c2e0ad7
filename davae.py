"""The method's autoencoder: a frozen base VAE plus detail channels next to its latent (arXiv 2603.22125).

    x (B, 3, H, W) --bicubic 1/r--> frozen base encoder --> z    (B, C, h, w)   what the pretrained DiT knows
    x (B, 3, H, W) ---------------> detail encoder -------> z_d  (B, D, h, w)   aligned to z by Eq. (3), (4)
    z_all = [z, z_d] (B, C+D, h, w) ----------------------> decoder -> x_hat (B, 3, H, W)

The method comes first: `align_loss`, the two new blocks, `DAVAE`. Then what it builds on: `BaseVAE`, the
interface that every base implements, and `AutoencoderKL`, the one base written out here (VA-VAE, SD3's VAE).
Weight files are read in support/weights.py; other bases are in support/bases.py.

Dimension key:  B batch   H W image   h w latent grid   C base channels   D detail channels   F `width`
                r ratio of full to base image, 2 in the paper   f downsampling factor; a DAVAE's is r * f_base
Pixels are RGB in [-1, 1]. Every `encode` returns normalised latents and every `decode` takes them; the
statistics are the buffers `mean` and `std` of the module that makes the latent.
"""
import dataclasses
from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.attention import sdpa
from kernels.groupnorm_silu import groupnorm_silu
from support import levels
from support.fit import LatentHead


@dataclass
class DAVAEConfig:
    """What a DAVAE adds to its base VAE; saved with the weights. To add an option, add a field here."""
    D: int = 96                   # detail channels, a multiple of C
    r: int = 2                    # side of the full image / side of the base image; a power of two
    detail_dropout: float = 0.1   # probability of decoding an image without details, in training only
    detail_noise: float = 0.0     # the most noise on what the decoder sees of them, in stds, in training only
    rescale: bool = False         # divide the surviving details by 1 - detail_dropout, as the authors do
    latent_shortcut: bool = False  # the down block's shortcut reads the base's own latent (support/fit.py)

    def __post_init__(self):
        if self.D < 1:
            raise ValueError(f"D={self.D} detail channels: wanted at least 1; for none, use PlainVAE")
        if self.r < 2 or self.r & (self.r - 1):
            raise ValueError(f"r={self.r}: wanted 2, 4, 8, ...: the base image is made by repeated halving")


# ---------------------------------------------------------------- the method: alignment


def group_mean(z_d, C):
    """Means of D/C adjacent details: (B, D, h, w) -> (B, C, h, w).  Eq. (3).  raises: ValueError if D % C"""
    check_groups(C, z_d.shape[1])
    return z_d.unflatten(1, (C, -1)).mean(dim=2)


def check_groups(C, D):
    """raises: ValueError if D detail channels do not form C equal groups."""
    if D % C:
        raise ValueError(f"detail channels D={D} must be a multiple of base channels C={C}, "
                         "so that they form equal groups")


def align_loss(z, z_d):
    """Mean squared error between the details' group means and the base latent, which is detached.  Eq. (4).

    z: (B, C, h, w) normalised, z_d: (B, D, h, w) raw; returns a () float32 mean over all B*C*h*w elements.
    """
    return F.mse_loss(group_mean(z_d, z.shape[1]).float(), z.detach().float())


# ------------------------------------------------------------ the method: base image, posterior, new blocks


def half(x):
    """Halve an image: (B, 3, H, W) -> (B, 3, H/2, W/2), bicubic without antialiasing.  Sec. 3.1.

    Exactly the separable 4-tap filter [-3, 19, 19, -3] / 32. Another filter (PIL's, say) would change z.
    """
    return F.interpolate(x, scale_factor=0.5, mode="bicubic", align_corners=False)


def base_image(x, r):
    """The image that the base VAE sees: (B, 3, H, W) -> (B, 3, H/r, W/r), halved log2(r) times.

    Differs from the paper, which has only r = 2: in one step, bicubic without antialiasing would skip pixels.
    """
    return base_image(half(x), r // 2) if r > 1 else x


class Posterior:
    """Diagonal Gaussian over a latent: mean and clamped logvar, each (B, channels, h, w)."""

    def __init__(self, moments):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self):
        return self.mean + torch.exp(0.5 * self.logvar) * torch.randn_like(self.mean)

    def kl(self):
        """Mean over all elements of mu^2 + sigma^2 - 1 - log sigma^2 (the authors' scale: no 1/2, no sum)."""
        mean = self.mean.float()
        logvar = self.logvar.float()
        return (mean.square() + logvar.exp() - 1 - logvar).mean()


def zero_conv(c_in, c_out, bias=False):
    """A 1x1 convolution that starts at zero."""
    conv = nn.Conv2d(c_in, c_out, 1, bias=bias)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class DownBlock(nn.Module):
    """Residual pixel-unshuffle (after DC-AE): features (B, F, r*h, r*w) -> moments of z_d (B, O = 2D, h, w).

    main path: conv3x3 to O/r^2 channels, pixel-unshuffle by r
    shortcut:  pixel-unshuffle by r to F*r^2 channels, then to O: if they divide into O equal groups, by the
               mean of each group of adjacent channels (no parameters; SD3), else by a zero-initialised 1x1
               convolution (VA-VAE)
    head:      if given (ours, support/fit.py), the shortcut reads head(features), C channels, and always ends
               in the 1x1 convolution, with a bias
    Differs from the paper: Fig. S1 describes strided convolutions; this follows the authors' code.
    """

    def __init__(self, width, O, r=2, head=None):
        super().__init__()
        if O % (r * r):
            raise ValueError(f"the down block makes {O} channels by pixel-unshuffle: wanted a multiple of "
                             f"{r * r}, so D must be a multiple of {r * r // 2}")
        self.O = O
        self.r = r
        self.conv = nn.Conv2d(width, O // r**2, 3, padding=1)
        self.head = nn.Identity() if head is None else head
        parameter_free = head is None and width * r**2 % O == 0
        c_in = width if head is None else head.C
        self.proj = None if parameter_free else zero_conv(c_in * r**2, O, bias=head is not None)

    def shortcut(self, x):
        pixels = F.pixel_unshuffle(self.head(x), self.r)                      # (B, F*r^2, h, w); head: C*r^2
        if self.proj is not None:
            return self.proj(pixels)                                          # (B, O, h, w)
        return pixels.unflatten(1, (self.O, -1)).mean(dim=2)                  # (B, O, h, w)

    def forward(self, x):
        return F.pixel_unshuffle(self.conv(x), self.r) + self.shortcut(x)     # (B, O, h, w)


class UpBlock(nn.Module):
    """Residual pixel-shuffle, the mirror of DownBlock: latents (B, C+D, h, w) -> features (B, F, r*h, r*w).

    main path: conv3x3 to F*r^2 channels, pixel-shuffle by r
    shortcut:  repeat each latent channel to reach F*r^2 channels, pixel-shuffle by r; if F*r^2 is not a
               multiple of C+D, a zero-initialised 1x1 convolution replaces the repetition
    Differs from the paper: Fig. S1 shuffles first and convolves afterwards; this follows the authors' code.
    """

    def __init__(self, channels, width, r=2):
        super().__init__()
        self.r = r
        self.conv = nn.Conv2d(channels, width * r**2, 3, padding=1)
        self.repeats, rest = divmod(width * r**2, channels)
        self.proj = zero_conv(channels, width * r**2) if rest else None

    def shortcut(self, z_all):
        if self.proj is not None:
            return self.proj(z_all)                                           # (B, F*r^2, h, w)
        return z_all.repeat_interleave(self.repeats, dim=1)                   # (B, F*r^2, h, w)

    def forward(self, z_all):
        return F.pixel_shuffle(self.conv(z_all) + self.shortcut(z_all), self.r)      # (B, F, r*h, r*w)


# ---------------------------------------------------------------- the method: DA-VAE


@dataclass
class Reconstruction:
    """The outputs of one training pass, for the losses."""
    x_hat: torch.Tensor               # (B, 3, H, W)
    posterior: Posterior              # of z_d; of z if there are no details
    z_d: torch.Tensor                 # (B, D, h, w) raw, sampled; (B, C, h, w) if there are no details
    z: torch.Tensor = None            # (B, C, h, w) normalised; None if there are no details


class DAVAE(nn.Module):
    """A frozen base VAE on the small image, D detail channels from the full one, one decoder.  Sec. 3.1.

    The detail encoder starts as a copy of the base encoder, tapped before its latent head; the decoder as a
    copy of the base decoder, entered after its latent stem. The down and up blocks replace head and stem.

    base: a BaseVAE; it is frozen in place, not copied, and `train` keeps it in eval mode
    Differs from the authors' code in two points. Details that survive dropout are not multiplied by 1/(1-p)
    unless `rescale`: the decoder would then see z_d at one scale in training and at another afterwards.
    Alignment and decoder use normalised base latents for every base, as in their SD3 code; their ImageNet
    code uses raw ones. With `detail_noise`, the decoder also learns to forgive the transformer's errors.
    raises: ValueError unless D is a multiple of both C and r^2 / 2
    """

    def __init__(self, base, cfg):
        super().__init__()
        check_groups(base.C, cfg.D)
        self.cfg = cfg
        self.C = base.C
        self.D = cfg.D
        self.r = cfg.r
        self.f = base.f * cfg.r
        self.base = base.requires_grad_(False)
        self.detail_encoder = deepcopy(base.encoder).requires_grad_(True)
        head = LatentHead(base) if cfg.latent_shortcut else None
        self.down = DownBlock(base.width, 2 * cfg.D, cfg.r, head)
        self.up = UpBlock(base.C + cfg.D, base.width, cfg.r)
        self.decoder = deepcopy(base.decoder).requires_grad_(True)
        self.register_buffer("mean", torch.zeros(cfg.D))           # of z_d, measured on training images
        self.register_buffer("std", torch.ones(cfg.D))

    def train(self, mode=True):
        super().train(mode).base.eval()                            # frozen: no dropout, no new statistics
        return self

    def forward(self, x, keep=None):
        """One training pass, with sampled details: (B, 3, H, W) -> Reconstruction.

        keep: (B,) number of details of each image that the decoder sees (support/levels.py); None: dropout
        """
        z = self.encode_base(x)                                    # (B, C, h, w)
        posterior = self.detail_posterior(x)
        z_d = posterior.sample()                                   # (B, D, h, w); alignment sees all of it
        if keep is not None:
            seen = levels.seen(keep, self.C, self.D)
        else:                                                      # detail dropout: per image, all or none
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.cfg.detail_dropout
            seen = kept / (1 - self.cfg.detail_dropout if self.cfg.rescale else 1)
        noisy = z_d
        if self.cfg.detail_noise:                                  # not in the paper; RAE, Zheng et al., 2025
            s = self.cfg.detail_noise * torch.rand(len(x), 1, 1, 1, device=x.device)
            std = z_d.detach().std(dim=(0, 2, 3), correction=0, keepdim=True)
            noisy = z_d + (s * std * torch.randn_like(z_d)).to(z_d.dtype)
        return Reconstruction(self.decode_raw(z, noisy * seen.to(z_d.dtype)), posterior, z_d, z)

    @torch.no_grad()
    def encode_base(self, x):
        """Normalised base latent: (B, 3, H, W) -> (B, C, h, w); the base VAE's latent of the small image."""
        return self.base.encode(base_image(x, self.r))

    def detail_posterior(self, x):
        """Posterior of the raw detail latent: (B, 3, H, W) -> two (B, D, h, w)."""
        return Posterior(self.down(self.detail_encoder(x)))

    @torch.no_grad()
    def encode(self, x, sample=False):
        """Normalised latent z_all = [z, z_d]: (B, 3, H, W) in [-1, 1] -> (B, C+D, H/f, W/f).

        z is the mode; z_d is the mode or, with `sample`, a sample of its posterior, as in the authors'
        ImageNet features. Differs from the authors' code, whose wrapper adds unit Gaussian noise to z_d
        here, which their trainer never does.
        raises: ValueError if a side of the image is not a multiple of f
        """
        check_sides(x, self.f)
        z = self.encode_base(x)
        posterior = self.detail_posterior(x)
        z_d = posterior.sample() if sample else posterior.mean
        return torch.cat([z, normalise(z_d, self.mean, self.std)], dim=1)

    def decode(self, z_all, keep=None):
        """Image of a normalised latent: (B, C+D, h, w) -> (B, 3, f*h, f*w), nominally in [-1, 1].

        keep: use only this many details (support/levels.py); the others become zero, not their mean
        """
        z, z_d = z_all.split([self.C, self.D], dim=1)
        z_d = unnormalise(z_d, self.mean, self.std)
        if keep is not None:
            z_d = z_d * levels.seen(keep, self.C, self.D).to(z_d)
        return self.decode_raw(z, z_d)

    def decode_raw(self, z, z_d):
        """Image of a normalised base latent and raw details, as in training."""
        return self.decoder(self.up(torch.cat([z, z_d], dim=1)))

    def decode_base(self, z):
        """The free preview: the frozen base decoder on the base channels, (B, C, h, w) -> the small image."""
        return self.base.decode(z)

    @torch.no_grad()
    def measure(self, images, total=lambda x: x):  # total: sums a tensor over the ranks that share the images
        """Set the details' per-channel statistics from their modes on batches of training images."""
        measure_channels(self, (self.detail_posterior(x).mean for x in images), total)

    def config(self):
        """What `load_davae` needs to rebuild this module, as JSON."""
        return {"base": base_config(self.base)} | dataclasses.asdict(self.cfg)


class PlainVAE(nn.Module):
    """A base VAE alone, at full size and trainable, with a DAVAE's interface: D = 0, r = 1, z_all = z."""
    D = 0
    r = 1

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(True)
        self.C = base.C
        self.f = base.f

    def forward(self, x, keep=None):
        """One training pass, with a sampled latent: (B, 3, H, W) -> Reconstruction; see DAVAE.forward."""
        posterior = self.base.posterior(x)
        z = posterior.sample()
        seen = z if keep is None else z * levels.seen(keep, self.C, self.C).to(z)
        return Reconstruction(self.decoder(self.base.from_latent(seen)), posterior, z)

    @property
    def decoder(self):
        return self.base.decoder

    @torch.no_grad()
    def encode(self, x, sample=False):
        """Normalised mode of the latent: (B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f)."""
        check_sides(x, self.f)
        return self.base.encode(x)

    def decode(self, z, keep=None):
        """Image of a normalised latent; see DAVAE.decode."""
        if keep is not None:
            seen = levels.seen(keep, self.C, self.C).to(z)
            z = z * seen + normalise(0 * z, self.base.mean, self.base.std) * (1 - seen)
        return self.base.decode(z)

    decode_base = decode

    @torch.no_grad()
    def measure(self, images, total=lambda x: x):
        """Set the base's statistics; see DAVAE.measure."""
        measure_channels(self.base, (self.base.posterior(x).mean for x in images), total)

    def config(self):
        return {"base": base_config(self.base), "D": 0}


# ---------------------------------------------------------------- small helpers for both


def normalise(z, mean, std):
    return (z - mean[:, None, None]) / std[:, None, None]


def unnormalise(z, mean, std):
    return z * std[:, None, None] + mean[:, None, None]


def measure_channels(module, batches, total):
    """Set a module's per-channel mean and (unbiased) std from batches of raw latents (B, channels, h, w)."""
    sums = module.mean.new_zeros(3, len(module.mean), dtype=torch.float64)  # count, sum, sum of squares
    for raw in batches:
        x = raw.double().movedim(1, 0).flatten(1)                             # (channels, B*h*w)
        sums += torch.stack([torch.ones_like(x).sum(1), x.sum(1), x.square().sum(1)])
    count, first, second = total(sums)
    variance = (second - first.square() / count) / (count - 1).clamp_min(1)
    module.mean.copy_(first / count)
    module.std.copy_(variance.clamp_min(1e-12).sqrt())                        # 0 for plain grey images


def check_sides(x, f):
    """raises: ValueError if a side of the images x is not a multiple of f."""
    H, W = x.shape[2:]
    if H % f or W % f:
        raise ValueError(f"image of {W}x{H} pixels: both sides must be multiples of {f}")


def base_config(base):
    """A base VAE's settings, plus its name in support/bases.py:BASES."""
    return {"kind": type(base).__name__} | base.config()


# ---------------------------------------------------------------- what a base VAE must offer


class BaseVAE(nn.Module):
    """What DAVAE requires of a base. Your own class sets four parts and returns its settings as a dict:

        encoder      images (B, 3, H, W) in [-1, 1] -> features (B, width, H/f, W/f)
        to_moments   features -> mean and logvar of the latent (B, 2C, H/f, W/f)
        from_latent  latent (B, C, h, w) -> features (B, width, h, w)
        decoder      features -> images (B, 3, f*h, f*w)
        config()     its settings as JSON, from which `build` rebuilds the module

    DAVAE copies `encoder` and `decoder`, and trains the copies (in training mode: any Dropout in them is on);
    its new blocks replace the other two. `from_latent` is a convolution or a Sequential that ends in one. Any
    later layers belong to `decoder`: the up block, which is linear, could not replace them. (So
    AutoencoderKL's decoder begins with Mid, and TAEF2's with a ReLU.)
    Found by its name in support/bases.py:BASES. One without a posterior overrides `posterior` and `encode`.
    mean, std (C,): the statistics with which the pretrained pipeline normalises latents
    """
    block = 1              # both sides of a latent must be multiples of this; 2 for FLUX.2's VAE

    def __init__(self, C, f, width):
        super().__init__()
        self.C = C
        self.f = f
        self.width = width
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))

    def posterior(self, x):
        """Posterior of the raw latent of x."""
        return Posterior(self.to_moments(self.encoder(x)))

    def encode(self, x):
        """Normalised mode of the latent: (B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f)."""
        return normalise(self.posterior(x).mean, self.mean, self.std)

    def decode(self, z):
        """Image of a normalised latent: (B, C, h, w) -> (B, 3, f*h, f*w), nominally in [-1, 1]."""
        return self.decoder(self.from_latent(unnormalise(z, self.mean, self.std)))

    def config(self):
        return {}

    @classmethod
    def build(cls, config):
        return cls(**config)


# ------------------------------------------------------------ AutoencoderKL: VA-VAE, the VAEs of SD and SD3


@dataclass
class KLConfig:
    """Sizes of an AutoencoderKL; for public ones, inferred from the checkpoint. Defaults: SD3's VAE, f8."""
    C: int = 16                                 # latent channels
    widths: tuple = (128, 256, 512, 512)        # channels per level, full size first; f = 2^(levels - 1)
    blocks: int = 2                             # residual blocks per level (one more in the decoder)
    attn: tuple = ()                            # levels with attention after each residual block
    quant: bool = False                         # 1x1 convolutions on both sides of the latent (VA-VAE)
    groups: int = 32                            # of every GroupNorm

    def __post_init__(self):
        self.widths = tuple(self.widths)        # JSON only has lists
        self.attn = tuple(self.attn)
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"a level of {width} channels does not divide into {self.groups} groups")
        for level in self.attn:
            if level not in range(len(self.widths)):
                raise ValueError(f"attn={level}: wanted 0 to {len(self.widths) - 1}, a level for each width")


class NormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x))."""

    def forward(self, x):
        return groupnorm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); if the width changes, a 1x1 convolution adapts x."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = NormSiLU(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = NormSiLU(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(self.norm1(x))
        return self.conv2(self.norm2(h)) + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all h*w positions, plus the input."""

    def __init__(self, width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        # Flash attention needs contiguous rows, so the 1x1 convolutions are computed as Linear layers. In
        # another layout a CPU would hold all (h*w)^2 scores at once: 1 GB at 1,024 pixels.
        y = self.norm(x).flatten(2).transpose(1, 2).contiguous().unsqueeze(1)  # (B, 1, h*w, width), one head
        q, k, v = [F.linear(y, conv.weight.flatten(1), conv.bias) for conv in (self.q, self.k, self.v)]
        y = sdpa(q, k, v).squeeze(2)                                           # (B, h*w, width)
        y = F.linear(y, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if `attn`; then `resample`."""

    def __init__(self, c_in, c_out, blocks, attn, groups):
        super().__init__()
        self.block = nn.ModuleList()
        for j in range(blocks):
            self.block.append(ResBlock(c_in if j == 0 else c_out, c_out, groups))
        self.attn = nn.ModuleList(AttnBlock(c_out, groups) for _ in range(blocks if attn else 0))
        self.resample = nn.Identity()      # if another resolution follows, the encoder or decoder replaces it

    def forward(self, x):
        for j, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        return self.resample(x)


def halving(width):
    """3x3 convolution of stride 2 on an image padded by one row below and one column on the right."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                     conv=nn.Conv2d(width, width, 3, stride=2)))


def doubling(width):
    """Nearest-neighbour doubling, then a 3x3 convolution."""
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2.0),
                                     conv=nn.Conv2d(width, width, 3, padding=1)))


class Mid(nn.Sequential):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, width, groups):
        super().__init__(OrderedDict(block_1=ResBlock(width, width, groups),
                                     attn_1=AttnBlock(width, groups),
                                     block_2=ResBlock(width, width, groups)))


class Encoder(nn.Module):
    """Image -> features after the last norm and SiLU, just before the latent head."""

    def __init__(self, cfg):
        super().__init__()
        widths = cfg.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        comes_in = [widths[0], *widths[:-1]]                  # level i reads the output of level i - 1
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(comes_in, widths)):
            self.down.append(Level(c_in, c_out, cfg.blocks, i in cfg.attn, cfg.groups))
        for level, width in zip(self.down[:-1], widths):      # all but the last level halve the size
            level.resample = halving(width)
        self.mid = Mid(widths[-1], cfg.groups)
        self.norm_out = NormSiLU(cfg.groups, widths[-1], eps=1e-6)

    def forward(self, x):                          # (B, 3, H, W)
        x = self.conv_in(x)                        # (B, widths[0], H, W)
        for level in self.down:
            x = level(x)
        return self.norm_out(self.mid(x))          # (B, widths[-1], H/f, W/f)


class Decoder(nn.Module):
    """Features at the latent's resolution -> image; `up` lists full size first, so it runs in reverse."""

    def __init__(self, cfg):
        super().__init__()
        widths = cfg.widths
        self.mid = Mid(widths[-1], cfg.groups)
        comes_in = [*widths[1:], widths[-1]]                  # level i reads level i + 1; the last one, mid
        self.up = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(comes_in, widths)):
            self.up.append(Level(c_in, c_out, cfg.blocks + 1, i in cfg.attn, cfg.groups))
        for level, width in zip(self.up[1:], widths[1:]):     # all but level 0 double the size
            level.resample = doubling(width)
        self.norm_out = NormSiLU(cfg.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x):                                 # (B, widths[-1], h, w)
        x = self.mid(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))            # (B, 3, f*h, f*w), unbounded


class AutoencoderKL(BaseVAE):
    """The convolutional VAE of latent diffusion; its config covers VA-VAE f16d32 and the SD3 VAE f8c16.

    Differs from both only in how the parts are grouped: `to_moments` and `from_latent` hold the layers next
    to the latent (conv_out, quant_conv; post_quant_conv, conv_in), so that DAVAE can leave them out.
    """

    def __init__(self, cfg):
        super().__init__(cfg.C, f=2 ** (len(cfg.widths) - 1), width=cfg.widths[-1])
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.to_moments = nn.Sequential(nn.Conv2d(self.width, 2 * cfg.C, 3, padding=1))
        self.from_latent = nn.Sequential(nn.Conv2d(cfg.C, self.width, 3, padding=1))
        if cfg.quant:
            self.to_moments.append(nn.Conv2d(2 * cfg.C, 2 * cfg.C, 1))
            self.from_latent.insert(0, nn.Conv2d(cfg.C, cfg.C, 1))

    def config(self):
        return dataclasses.asdict(self.cfg)

    @classmethod
    def build(cls, config):
        return cls(KLConfig(**config))
