"""DC-AE, the deep compression autoencoder (arXiv 2410.10733), and DC-AE 1.5 (arXiv 2508.00413): its layers.

An autoencoder of f = 32, 64 or 128, without a posterior. One idea makes this possible: wherever features
change size, a parameter-free shortcut bypasses the convolution. On the way down, pixels become channels, and
groups of adjacent channels are averaged; on the way up, each channel is repeated, and channels become pixels.
The convolutions need to learn only the residual.

    encoder   x (B, 3, H, W) -> conv_in, stages of blocks, each but the last ending in a Down -> (B, F, h, w)
    latent    Head -> z (B, C, h, w) -> Stem
    decoder   (B, F, h, w) -> stages, each but the last beginning with an Up; norm, activation, conv_out -> x

A stage has ResBlocks at high resolution, EfficientViT blocks at low; 1.5 has ResBlocks only, and no shortcuts
next to the latent: they would tie together latent channels, which 1.5 trains to be in order of importance.

Dimension key:  B batch   H W image   h w latent grid   C latent channels   F width of a stage

The published files (names of mit-han-lab's and dc-ai's repositories on Hugging Face). The scale is that of
the diffusion models on them, z = scale * raw: in/mix from scripts/convert_dcae_to_diffusers.py of diffusers,
sana from DC-Gen's dc_ae.py, 1.5 from the list of diffusion models in DC-Gen. Parameters in millions, with
Head and Stem. Blocks before the bar are ResBlocks, after it EfficientViT.

    file                        blocks of the stages                  scale            parameters
                                encoder          decoder                               encoder  decoder
    dc-ae-f32c32-in/mix-1.0     0 4 8|2 2 2      0 5 10|2 2 2         0.3189 / 0.4552    123.2    200.2
    dc-ae-f64c128-in/mix-1.0    0 4 8|2 2 2 2    0 5 10|2 2 2 2       0.2889 / 0.4538    264.6    412.3
    dc-ae-f128c512-in/mix-1.0   0 4 8|2 2 2 2 2  0 5 10|2 2 2 2 2     0.4883 / 0.3620    415.7    705.0
    dc-ae-f32c32-sana-1.0/1.1   2 2 2|3 3 3      3 3 3|3 3 3          0.41407            153.0    159.2
    dc-ae-lite-f32c32-sana-1.1  2 2 2|3 3 3      0 3 5 4 4 4          0.41407            153.0    268.2
    dc-ae-1.5-f32c128           0 5 10 4 4 4     0 5 10 4 4 4         not published      228.6    295.0
    dc-ae-1.5-f64c128           0 5 10 4 4 4 4   0 5 10 4 4 4 4       0.5935             306.5    408.3

The widths are 128 256 512 512 1024 1024, then 2048 2048 (1.5: 1024). All norms are RMSNorm, all activations
SiLU, except in decoders: those of in/mix have BatchNorm and ReLU in their ResBlocks, and those of in/mix and
Sana (not lite) a ReLU before conv_out. Sana's attention also reads 5x5 neighbourhoods, its encoder
downsamples by strided convolutions, its decoder upsamples to nearest neighbours (lite's does not).

The autoencoder made of these parts is `support/bases.py:DCAE`; the names in files: support/dcae_names.py.
"""
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

HEAD = 32                    # channels of an attention head, in all published files


@dataclass
class DCAEConfig:
    """Sizes of a DC-AE, stage by stage from full size down; read off the file. Defaults: f32c32-in-1.0."""
    C: int = 32                                           # latent channels
    widths: tuple = (0, 256, 512, 512, 1024, 1024)        # 0: neither half has blocks; f = 2^(stages - 1)
    encoder_blocks: tuple = (0, 4, 8, 2, 2, 2)            # if none in the first stage, conv_in halves
    decoder_blocks: tuple = (0, 5, 10, 2, 2, 2)           # if none in the first stage, conv_out doubles
    encoder_vit: tuple = (3, 4, 5)                        # stages of EfficientViT blocks
    decoder_vit: tuple = (3, 4, 5)
    nearby: bool = False                                  # attention also reads 5x5 neighbourhoods
    batch_norm: tuple = (1, 2)                            # stages of the decoder with BatchNorm and ReLU
    strided: bool = False                                 # downsample by convolutions of stride 2
    nearest: bool = False                                 # upsample to nearest neighbours
    ends: bool = True                                     # shortcuts next to the latent
    relu: bool = True                                     # the decoder's last activation; else SiLU

    def __post_init__(self):
        for f in fields(self):
            if type(f.default) is tuple:
                setattr(self, f.name, tuple(getattr(self, f.name)))         # JSON has only lists
        if not len(self.widths) == len(self.encoder_blocks) == len(self.decoder_blocks):
            raise ValueError(f"an encoder of {len(self.encoder_blocks)} stages, a decoder of "
                             f"{len(self.decoder_blocks)}, {len(self.widths)} widths; wanted equally many")
        if 0 in self.widths[1:] + self.encoder_blocks[1:] + self.decoder_blocks[1:]:
            raise ValueError("a stage without blocks; only the one at full size may be empty")
        for a, b in zip(self.widths, self.widths[1:]):
            if 4 * a % b:
                raise ValueError(f"a stage of {a} channels before one of {b}; wanted four times the first to "
                                 "be a multiple of the second, for the shortcut between them")
        if self.ends and self.widths[-1] % self.C:
            raise ValueError(f"a last stage of {self.widths[-1]} channels does not divide into C={self.C} "
                             "groups, whose means are the latent's shortcut")
        unequal = [self.widths[i] for i in self.encoder_vit + self.decoder_vit if self.widths[i] % HEAD]
        if unequal:
            raise ValueError(f"a stage of {unequal[0]} channels does not divide into heads of {HEAD}")


# ---------------------------------------------------------------- shortcuts without parameters


def averaged(x, channels):
    """The mean of each group of adjacent channels: (B, F, h, w) -> (B, channels, h, w)."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def repeated(x, channels):
    """Each channel repeated in place: (B, F, h, w) -> (B, channels, h, w)."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


class Down(nn.Module):
    """Half the size: (B, F, 2h, 2w) -> (B, c_out, h, w).

    main path: conv3x3 and pixel-unshuffle, or, where `strided`, a conv3x3 of stride 2
    shortcut:  pixel-unshuffle, the mean of groups
    """

    def __init__(self, c_in, c_out, strided, shortcut=True):
        super().__init__()
        self.c_out = c_out
        self.strided = strided
        self.shortcut = shortcut
        if strided:
            self.conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(c_in, c_out // 4, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        if not self.strided:
            y = F.pixel_unshuffle(y, 2)                                # (B, c_out, h, w)
        if self.shortcut:
            y = y + averaged(F.pixel_unshuffle(x, 2), self.c_out)
        return y


class Up(nn.Module):
    """Twice the size: (B, F, h, w) -> (B, c_out, 2h, 2w).

    main path: conv3x3 and pixel-shuffle, or, where `nearest`, nearest neighbours and conv3x3
    shortcut:  channels repeated, pixel-shuffle
    """

    def __init__(self, c_in, c_out, nearest, shortcut=True):
        super().__init__()
        self.c_out = c_out
        self.nearest = nearest
        self.shortcut = shortcut
        self.conv = nn.Conv2d(c_in, c_out if nearest else 4 * c_out, 3, padding=1)

    def forward(self, x):
        if self.nearest:
            y = self.conv(F.interpolate(x, scale_factor=2.0))
        else:
            y = F.pixel_shuffle(self.conv(x), 2)                       # (B, c_out, 2h, 2w)
        if self.shortcut:
            y = y + F.pixel_shuffle(repeated(x, 4 * self.c_out), 2)
        return y


class Head(nn.Module):
    """The encoder's last layer, features -> latent: (B, F, h, w) -> (B, C, h, w)."""

    def __init__(self, width, C, shortcut):
        super().__init__()
        self.C = C
        self.shortcut = shortcut
        self.conv = nn.Conv2d(width, C, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return y + averaged(x, self.C) if self.shortcut else y


class Stem(nn.Module):
    """The decoder's first layer, latent -> features, linear: (B, C, h, w) -> (B, F, h, w)."""

    def __init__(self, C, width, shortcut):
        super().__init__()
        self.width = width
        self.shortcut = shortcut
        self.conv = nn.Conv2d(C, width, 3, padding=1)

    def forward(self, z):
        y = self.conv(z)
        return y + repeated(z, self.width) if self.shortcut else y


# ---------------------------------------------------------------- norms


class RMSNorm(nn.Module):
    """Each position divided by the root mean square of its channels; then a weight and a bias per channel."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):                                              # (B, F, h, w)
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + self.eps)
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class BatchNorm(nn.Module):
    """BatchNorm always in evaluation mode, with the file's statistics, which a DAVAE's training leaves alone.

    Batches of a few images would give other statistics, and the frozen base must not change at all.
    """

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


# ---------------------------------------------------------------- blocks


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))); BatchNorm and ReLU, or RMSNorm and SiLU."""

    def __init__(self, width, batch_norm=False):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU() if batch_norm else nn.SiLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = BatchNorm(width) if batch_norm else RMSNorm(width)

    def forward(self, x):
        return x + self.norm(self.conv2(self.act(self.conv1(x))))


class EViTBlock(nn.Module):
    """An EfficientViT block (arXiv 2205.14756): linear attention, then a gated convolution."""

    def __init__(self, width, nearby):
        super().__init__()
        self.attn = LinearAttention(width, nearby)
        self.glu = GatedConv(width)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.glu(x)


class LinearAttention(nn.Module):
    """Attention whose cost is linear in h*w, with ReLU in place of softmax: (B, F, h, w) -> the same.

    With `nearby` there are twice as many heads: the second half reads queries, keys and values mixed by a
    depthwise 5x5 convolution and a 1x1 one within each third of a head.
    The 3W rows of qkv are, head after head, HEAD queries, HEAD keys, HEAD values.
    """

    def __init__(self, width, nearby):
        super().__init__()
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.nearby = None
        if nearby:
            self.nearby = nn.Sequential(
                nn.Conv2d(3 * width, 3 * width, 5, padding=2, groups=3 * width, bias=False),
                nn.Conv2d(3 * width, 3 * width, 1, groups=3 * width // HEAD, bias=False),
            )
        self.proj = nn.Conv2d(2 * width if nearby else width, width, 1, bias=False)
        self.norm = RMSNorm(width)

    def forward(self, x):
        qkv = self.qkv(x)                                              # (B, 3W, h, w)
        if self.nearby is not None:
            qkv = torch.cat([qkv, self.nearby(qkv)], dim=1)            # (B, 6W, h, w)
        return self.norm(self.proj(relu_attention(qkv)))


def relu_attention(qkv):
    """Per head, at position i:  sum_j (q_i . k_j) v_j / sum_j (q_i . k_j),  q and k after ReLU, in float32.

    Summing over j first needs no (h*w)^2 scores.  (B, heads * 3 * HEAD, h, w) -> (B, heads * HEAD, h, w)
    """
    h, w = qkv.shape[2:]
    with torch.autocast(qkv.device.type, enabled=False):               # sums over all positions
        qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).flatten(2)
        q, k, v = qkv.unflatten(1, (-1, 3, HEAD)).unbind(dim=2)        # (B, heads, HEAD, h*w)
        q = F.relu(q)
        k = F.relu(k)
        values = v @ k.transpose(-1, -2)                               # (B, heads, HEAD, HEAD)
        total = k.sum(dim=-1).unsqueeze(2)                             # (B, heads, 1, HEAD)
        y = (values @ q) / (total @ q + 1e-15)                         # (B, heads, HEAD, h*w)
    return y.flatten(1, 2).unflatten(2, (h, w))


class GatedConv(nn.Module):
    """norm(point(a * silu(b))), where a and b are the halves of depth(silu(expand(x)))."""

    def __init__(self, width):
        super().__init__()
        self.expand = nn.Conv2d(width, 8 * width, 1)
        self.depth = nn.Conv2d(8 * width, 8 * width, 3, padding=1, groups=8 * width)
        self.point = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm = RMSNorm(width)

    def forward(self, x):
        a, b = self.depth(F.silu(self.expand(x))).chunk(2, dim=1)      # (B, 4W, h, w) each
        return self.norm(self.point(a * F.silu(b)))


# ---------------------------------------------------------------- encoder and decoder


class Encoder(nn.Module):
    """Image -> features just before the latent head: (B, 3, H, W) -> (B, widths[-1], H/f, W/f)."""

    def __init__(self, cfg):
        super().__init__()
        widths = cfg.widths
        if cfg.encoder_blocks[0]:
            self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        else:
            self.conv_in = Down(3, widths[1], cfg.strided, shortcut=False)
        self.stages = nn.ModuleList()
        for i, count in enumerate(cfg.encoder_blocks):
            stage = nn.Sequential()
            for _ in range(count):
                if i in cfg.encoder_vit:
                    stage.append(EViTBlock(widths[i], cfg.nearby))
                else:
                    stage.append(ResBlock(widths[i]))
            if count and i < len(widths) - 1:
                stage.append(Down(widths[i], widths[i + 1], cfg.strided))
            self.stages.append(stage)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.stages:
            x = stage(x)
        return x


class Decoder(nn.Module):
    """Features just after the latent stem -> image: (B, widths[-1], h, w) -> (B, 3, f*h, f*w), unbounded.

    `stages` are counted from full size down, like the encoder's, so the last one runs first.
    """

    def __init__(self, cfg):
        super().__init__()
        widths = cfg.widths
        self.stages = nn.ModuleList()
        for i, count in enumerate(cfg.decoder_blocks):
            stage = nn.Sequential()
            if count and i < len(widths) - 1:
                stage.append(Up(widths[i + 1], widths[i], cfg.nearest))
            for _ in range(count):
                if i in cfg.decoder_vit:
                    stage.append(EViTBlock(widths[i], cfg.nearby))
                else:
                    stage.append(ResBlock(widths[i], i in cfg.batch_norm))
            self.stages.append(stage)
        width = widths[0] if cfg.decoder_blocks[0] else widths[1]
        self.norm_out = RMSNorm(width)
        self.act = nn.ReLU() if cfg.relu else nn.SiLU()
        if cfg.decoder_blocks[0]:
            self.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        else:
            self.conv_out = Up(width, 3, cfg.nearest, shortcut=False)

    def forward(self, x):
        for stage in reversed(self.stages):
            x = stage(x)
        return self.conv_out(self.act(self.norm_out(x)))
