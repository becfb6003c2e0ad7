"""Autoencoders: the pretrained base VAEs and DAVAE, which adds detail channels to one of them (arXiv 2603.22125).

    x (B, 3, H, W) --bicubic 1/2--> frozen base encoder --> z    (B, C, h, w)   what the pretrained DiT knows
    x (B, 3, H, W) ---------------> detail encoder -------> z_d  (B, D, h, w)   aligned to z, so that it shares its structure
    z_all = [z, z_d] (B, C+D, h, w) -----------------------> decoder -> x_hat (B, 3, H, W)

Keys used throughout: B batch; H W image, h w latent grid; C base channels, D detail channels; f the base VAE's
downsampling factor (DAVAE's is 2f). Pixels are RGB in [-1, 1]. Every `encode` returns normalised latents and every
`decode` takes them; the statistics are buffers (`mean`, `std`) of the module they belong to.

`load_base_vae` reads VA-VAE, SD/SD3 VAEs (single-file and diffusers names) and TAEF2 files as they are.
"""
import dataclasses
from collections import OrderedDict, namedtuple
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.groupnorm_silu import groupnorm_silu

# Of autoencoders and images. On a CPU the faster one (157 ms a step of the preset tiny, against 197); on a GPU not measured.
LAYOUT = {"cuda": torch.channels_last, "cpu": torch.contiguous_format}

# ---------------------------------------------------------------- the method: alignment, posterior, blocks

def group_mean(z_d, C):
    """Average each run of D/C adjacent detail channels: (B, D, h, w) -> (B, C, h, w).  Eq. (3).

    raises: ValueError if D is not a multiple of C.
    """
    B, D, h, w = z_d.shape
    if D % C:
        raise ValueError(f"detail channels D={D} must be a multiple of base channels C={C}, so that they form equal groups")
    return z_d.view(B, C, D // C, h, w).mean(dim=2)

def align_loss(z, z_d):
    """Mean squared distance between the grouped details and the base latent, which stays as it is.  Eq. (4).

    z: (B, C, h, w), z_d: (B, D, h, w); returns a () float32 mean over all B*C*h*w elements.
    """
    return F.mse_loss(group_mean(z_d, z.shape[1]).float(), z.detach().float())

def half(x):
    """Halve an image: (B, 3, H, W) -> (B, 3, H/2, W/2), bicubic, no antialiasing, as the authors do (method of Sec. 3.1).

    Exactly the separable 4-tap filter [-3, 19, 19, -3] / 32. Another filter (PIL's, say) would change z.
    """
    return F.interpolate(x, scale_factor=0.5, mode="bicubic", align_corners=False)

class Posterior:
    """Diagonal Gaussian over a latent: mean and clamped logvar, each (B, channels, h, w)."""

    def __init__(self, moments):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self):
        return self.mean + torch.exp(0.5 * self.logvar) * torch.randn_like(self.mean)

    def kl(self):
        """Mean over all elements of mu^2 + sigma^2 - 1 - log sigma^2 (no factor 1/2, mean not sum: the authors' scale)."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return (mean.square() + logvar.exp() - 1 - logvar).mean()

def zero_conv(c_in, c_out):
    """A 1x1 convolution without bias that starts at zero."""
    conv = nn.Conv2d(c_in, c_out, 1, bias=False)
    nn.init.zeros_(conv.weight)
    return conv

class DownBlock(nn.Module):
    """Residual pixel-unshuffle (after DC-AE): features (B, F, 2h, 2w) -> moments (B, O, h, w).

    conv3x3 to O/4 channels, then pixel-unshuffle; the shortcut is the unshuffled input itself, averaged over groups of
    adjacent channels where 4F divides into O groups (no parameters), else through a zero-initialised 1x1 convolution.
    Differs from the paper: Fig. S1 describes strided convolutions; this is what the authors' code does.
    """

    def __init__(self, width, O):
        super().__init__()
        if O % 4:
            raise ValueError(f"the down block makes {O} channels by pixel-unshuffle: wanted a multiple of 4, so D even")
        self.O = O
        self.conv = nn.Conv2d(width, O // 4, 3, padding=1)
        self.proj = zero_conv(4 * width, O) if 4 * width % O else None

    def forward(self, x):
        shortcut = F.pixel_unshuffle(x, 2)                                    # (B, 4F, h, w)
        shortcut = shortcut.unflatten(1, (self.O, -1)).mean(dim=2) if self.proj is None else self.proj(shortcut)
        return F.pixel_unshuffle(self.conv(x), 2) + shortcut                  # (B, O, h, w)

class UpBlock(nn.Module):
    """Residual pixel-shuffle, the mirror of DownBlock: latents (B, C+D, h, w) -> features (B, F, 2h, 2w).

    conv3x3 to 4F channels, then pixel-shuffle; the shortcut repeats each latent channel 4F/(C+D) times before the
    shuffle, so feature k starts as the nearest-neighbour upsampling of latent channel k // (F/(C+D)).
    Differs from the paper: Fig. S1 shuffles first and convolves after; this is what the authors' code does.
    """

    def __init__(self, channels, width):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * width, 3, padding=1)
        self.repeats, rest = divmod(4 * width, channels)
        self.proj = zero_conv(channels, 4 * width) if rest else None

    def forward(self, z_all):
        shortcut = z_all.repeat_interleave(self.repeats, dim=1) if self.proj is None else self.proj(z_all)
        return F.pixel_shuffle(self.conv(z_all) + shortcut, 2)

# ---------------------------------------------------------------- base VAEs
# Both have the same four parts, so that DAVAE can take them apart:
#   encoder (B, 3, H, W) -> features, to_moments -> latent;  from_latent -> features, decoder -> (B, 3, H, W)

class NormSiLU(nn.GroupNorm):
    """SiLU(GroupNorm(x))."""

    def forward(self, x):
        return groupnorm_silu(x, self.weight, self.bias, self.num_groups, self.eps)

class ResBlock(nn.Module):
    """conv(silu(norm(.))) twice, plus the input."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = NormSiLU(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = NormSiLU(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)

class AttnBlock(nn.Module):
    """Single-head self-attention over all h*w positions, plus the input."""

    def __init__(self, width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        B, width, h, w = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)                # (B, hw, width)
        return x + self.proj_out(y.transpose(1, 2).reshape(B, width, h, w))

def down(width):
    """3x3 convolution of stride 2 on an image padded by one row below and one column on the right."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2)))

def up(width):
    """Nearest-neighbour doubling, then a 3x3 convolution."""
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(width, width, 3, padding=1)))

class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where `attn`, and the change of resolution."""

    def __init__(self, c_in, c_out, blocks, attn, groups):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out, groups) for j in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out, groups) for _ in range(blocks if attn else 0))
        self.resample = nn.Identity()

    def forward(self, x):
        for j, block in enumerate(self.block):
            x = self.attn[j](block(x)) if self.attn else block(x)
        return self.resample(x)

class Mid(nn.Sequential):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, width, groups):
        super().__init__(OrderedDict(block_1=ResBlock(width, width, groups), attn_1=AttnBlock(width, groups),
                                     block_2=ResBlock(width, width, groups)))

@dataclass
class KLConfig:
    """Sizes of an AutoencoderKL; the public ones are read off the checkpoint."""
    C: int = 16                       # latent channels
    ch: int = 128                     # width of the first level
    ch_mult: tuple = (1, 2, 4, 4)     # width of each level / ch; f = 2^(levels - 1)
    blocks: int = 2                   # residual blocks per level (one more in the decoder)
    attn: tuple = ()                  # levels with attention after each residual block
    quant: bool = False               # 1x1 convolutions on both sides of the latent (VA-VAE)
    groups: int = 32                  # of every GroupNorm

    def __post_init__(self):
        self.ch_mult, self.attn = tuple(self.ch_mult), tuple(self.attn)       # JSON knows lists only

class Encoder(nn.Module):
    """Image -> features after the last norm and SiLU, just before the latent head."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Level(widths[max(i - 1, 0)], w, cfg.blocks, i in cfg.attn, cfg.groups)
                                  for i, w in enumerate(widths))
        for level, w in zip(self.down[:-1], widths):
            level.resample = down(w)
        self.mid = Mid(widths[-1], cfg.groups)
        self.norm_out = NormSiLU(cfg.groups, widths[-1], eps=1e-6)
        self.width = widths[-1]

    def forward(self, x):                          # (B, 3, H, W)
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.norm_out(self.mid(x))          # (B, width, H/f, W/f)

class Decoder(nn.Module):
    """Features at the latent's resolution -> image; levels are stored as the encoder's and run from the last to the first."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.mid = Mid(widths[-1], cfg.groups)
        self.up = nn.ModuleList(Level(widths[min(i + 1, len(widths) - 1)], w, cfg.blocks + 1, i in cfg.attn, cfg.groups)
                                for i, w in enumerate(widths))
        for level, w in zip(self.up[1:], widths[1:]):
            level.resample = up(w)
        self.norm_out = NormSiLU(cfg.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.width = widths[-1]

    def forward(self, x):                                 # (B, width, H/f, W/f)
        x = self.mid(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))            # (B, 3, H, W), unbounded

class BaseVAE(nn.Module):
    """What DAVAE asks of a base: four parts, C, f, and per-channel statistics `mean`, `std` of the pretrained pipeline."""

    def __init__(self, C, f):
        super().__init__()
        self.C, self.f = C, f
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))

    def normalise(self, z):
        return (z - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)

    def encode(self, x):
        """Normalised mode of the latent: (B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f)."""
        return self.normalise(self.posterior(x).mean)

    def decode(self, z):
        """Image of a normalised latent: (B, C, h, w) -> (B, 3, f*h, f*w), nominally in [-1, 1]."""
        return self.decoder(self.from_latent(z * self.std.view(1, -1, 1, 1) + self.mean.view(1, -1, 1, 1)))

class AutoencoderKL(BaseVAE):
    """The convolutional VAE of latent diffusion; its config covers VA-VAE f16d32 and the SD3 VAE f8c16.

    Differs from both in nothing but the grouping of its parts: `to_moments` and `from_latent` hold the layers beside
    the latent (conv_out, quant_conv; post_quant_conv, conv_in), so that DAVAE can leave them out.
    """

    def __init__(self, cfg):
        super().__init__(cfg.C, 2 ** (len(cfg.ch_mult) - 1))
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.to_moments = nn.Sequential(nn.Conv2d(self.encoder.width, 2 * cfg.C, 3, padding=1))
        self.from_latent = nn.Sequential(nn.Conv2d(cfg.C, self.decoder.width, 3, padding=1))
        if cfg.quant:
            self.to_moments.append(nn.Conv2d(2 * cfg.C, 2 * cfg.C, 1))
            self.from_latent.insert(0, nn.Conv2d(cfg.C, cfg.C, 1))

    def posterior(self, x):
        """Posterior of the raw latent of x."""
        return Posterior(self.to_moments(self.encoder(x)))

# ---------------------------------------------------------------- DA-VAE

# What one training pass gives: x_hat (B, 3, H, W), the posterior, z (B, C, h, w) and z_d (B, D, h, w), None where D = 0.
Reconstruction = namedtuple("Reconstruction", "x_hat posterior z z_d", defaults=(None, None))

class DAVAE(nn.Module):
    """A frozen base VAE on the half-size image, D detail channels from the full-size image, one decoder.  Sec. 3.1.

    The detail encoder starts as a copy of the base encoder (tapped before its latent head) and the decoder as a copy of
    the base decoder (entered after its latent stem). With D = 0 it is the base VAE itself, trainable, at full size.

    base: an AutoencoderKL or TAEF2; not copied.   D: detail channels, a multiple of C, and even.
    detail_dropout: probability, per image and in training only, of decoding from z alone (z_d = 0).
    Differs from the authors' code: survivors are not multiplied by 1/(1-p) unless `rescale`, because the decoder would
    then see z_d at two scales, in training and after; and alignment and decoder work on normalised base latents for
    every base, as their SD3 code does (their ImageNet code uses raw ones).
    """

    def __init__(self, base, D, detail_dropout=0.1, rescale=False):
        super().__init__()
        self.base = base.requires_grad_(D == 0)
        self.C, self.D, self.f = base.C, D, base.f * (2 if D else 1)
        self.detail_dropout, self.rescale = detail_dropout, rescale
        if D:
            group_mean(torch.empty(0, D, 1, 1), self.C)            # raises where D is not a multiple of C
            self.detail_encoder = deepcopy(base.encoder).requires_grad_(True)
            self.down = DownBlock(base.encoder.width, 2 * D)
            self.up = UpBlock(self.C + D, base.decoder.width)
            self.decoder = deepcopy(base.decoder).requires_grad_(True)
            self.register_buffer("mean", torch.zeros(D))           # of z_d, measured on training images
            self.register_buffer("std", torch.ones(D))

    @property
    def last_conv(self):
        """The layer that paints the pixels; the adaptive GAN weight compares gradients there."""
        decoder = self.decoder if self.D else self.base.decoder
        return [m for m in decoder.modules() if isinstance(m, nn.Conv2d)][-1]

    def forward(self, x):
        """One training pass, with sampled latents: (B, 3, H, W) -> Reconstruction."""
        if self.D == 0:
            posterior = self.base.posterior(x)
            return Reconstruction(self.base.decoder(self.base.from_latent(posterior.sample())), posterior)
        z, posterior = self.encode_base(x), self.detail_posterior(x)
        z_d = posterior.sample()                                   # alignment sees it before dropout
        keep = (torch.rand(len(x), 1, 1, 1, device=x.device) >= self.detail_dropout).to(z_d.dtype)
        if self.rescale:
            keep = keep / (1 - self.detail_dropout)
        return Reconstruction(self._decode(z, z_d * keep), posterior, z, z_d)

    def detail_posterior(self, x):
        """Posterior of the raw detail latent: (B, 3, H, W) -> two (B, D, h, w)."""
        return Posterior(self.down(self.detail_encoder(x)))

    @torch.no_grad()
    def encode_base(self, x):
        """Normalised base latent: (B, 3, H, W) -> (B, C, h, w), exactly what the base VAE makes of the half-size image."""
        return self.base.encode(half(x) if self.D else x)

    @torch.no_grad()
    def encode(self, x, sample=False):
        """Normalised latent z_all = [z, z_d]: (B, 3, H, W) in [-1, 1] -> (B, C+D, H/f, W/f).

        z is the mode; z_d is the mode, or a sample of its posterior where `sample` (the authors' ImageNet features).
        Differs from the authors' code: their wrapper adds unit Gaussian noise to z_d here, which their trainer never saw.
        """
        if x.shape[2] % self.f or x.shape[3] % self.f:
            raise ValueError(f"image of {x.shape[3]}x{x.shape[2]} pixels: both sides must be multiples of {self.f}")
        z = self.encode_base(x)
        if self.D == 0:
            return z
        posterior = self.detail_posterior(x)
        z_d = posterior.sample() if sample else posterior.mean
        return torch.cat([z, (z_d - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)], dim=1)

    def decode(self, z_all):
        """Image of a normalised latent: (B, C+D, h, w) -> (B, 3, f*h, f*w), nominally in [-1, 1]."""
        if self.D == 0:
            return self.base.decode(z_all)
        z, z_d = z_all.split([self.C, self.D], dim=1)
        return self._decode(z, z_d * self.std.view(1, -1, 1, 1) + self.mean.view(1, -1, 1, 1))

    def _decode(self, z, z_d):
        return self.decoder(self.up(torch.cat([z, z_d], dim=1)))

    def decode_base(self, z):
        """The free preview: the frozen base decoder on the base channels alone, (B, C, h, w) -> half-size image."""
        return self.base.decode(z)

    @torch.no_grad()
    def measure(self, images):
        """Set the normalisation statistics from batches of training images: z_d's, or with D = 0 the base's.

        Unbiased standard deviation over images and positions, per channel, of modes.
        """
        raw = torch.cat([self.detail_posterior(x).mean if self.D else self.base.posterior(x).mean for x in images])
        owner = self if self.D else self.base
        owner.mean.copy_(raw.mean((0, 2, 3)))
        owner.std.copy_(raw.transpose(0, 1).flatten(1).std(dim=1))

    def config(self):
        """What `load_davae` needs to build this module again, as JSON."""
        base = {"kind": type(self.base).__name__}
        if isinstance(self.base, AutoencoderKL):
            base.update(dataclasses.asdict(self.base.cfg))
        return {"base": base, "D": self.D, "detail_dropout": self.detail_dropout, "rescale": self.rescale}

# ---------------------------------------------------------------- loading

