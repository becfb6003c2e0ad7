"""SiLU(GroupNorm(x)) on channels_last images: what stands before every convolution of the autoencoder.

    n = (x - mean) / sqrt(var + eps), over each group of C / groups channels and all pixels of an image
    u = weight * n + bias,    out = u * sigmoid(u)

Shapes:    x, out (B, C, H, W), C fastest in memory (other layouts are copied into that one first);  weight, bias (C,)
Used by:   davae.NormSiLU, before every 3x3 convolution of an AutoencoderKL but the first.
Two passes, forward and backward alike: statistics (mean and sum of squared deviations per tile and channel; a tile is all
channels of a few pixels, so that memory is read in order), combined by a few small PyTorch operations; then apply.
Bytes, U = B*C*H*W elements:
    forward   read x twice, write out: 3 U. Separate PyTorch operations: 6 U, with a strided GroupNorm for channels_last
    backward  read x, dout twice, write dx: 5 U; u is recomputed, and nothing but x and the statistics is kept
Measured:  not run on a GPU.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import jit, operator, power_of_2, precision, use_triton

TILES = 4          # per program of the statistics
ELEMENTS = 8192    # of a tile, padding included

def groupnorm_silu_ref(x, weight, bias, groups=32, eps=1e-6):
    """The specification."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))

# ---------------------------------------------------------------- Triton

@jit
def _moments(X, MEAN, M2, N, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
             ACC: tl.constexpr):
    """Mean and sum of squared deviations, per channel, of TILES * PIXELS pixels; tiles are merged as Chan et al. do (1979).

    Deviations are taken from each tile's own mean: sum(x^2) - N mean^2 would cancel where the mean is large.
    """
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    count = tl.zeros((1, 1), ACC)
    mean, m2 = tl.zeros((1, BLOCK), ACC), tl.zeros((1, BLOCK), ACC)
    for i in range(TILES):
        first = (part * TILES + i) * PIXELS
        pixel = first + tl.arange(0, PIXELS)[:, None]
        inside = (pixel < N) & (c < C)
        new = tl.minimum(tl.maximum(N - first, 0), PIXELS).to(ACC)
        x = tl.load(X + (b * N + pixel) * C + c, inside, 0.0).to(ACC)
        tile_mean = tl.sum(x, axis=0, keep_dims=True) / tl.maximum(new, 1.0)
        d = tl.where(inside, x - tile_mean, 0.0)
        total = tl.maximum(count + new, 1.0)
        d_mean = tile_mean - mean
        m2 += tl.sum(d * d, axis=0, keep_dims=True) + d_mean * d_mean * (count * new / total)
        mean += d_mean * (new / total)
        count += new
    at = (b * tl.num_programs(0) + part) * C + c
    tl.store(MEAN + at, mean, c < C)
    tl.store(M2 + at, m2, c < C)

@jit
def _of_group(X, b, c, C: tl.constexpr, GROUPS: tl.constexpr):
    """For each channel of image b, the number in X (B, GROUPS) of its group."""
    return tl.load(X + b * GROUPS + c // (C // GROUPS), c < C, 0.0)

@jit
def _apply(X, MEAN, RSTD, WEIGHT, BIAS, OUT, N, C: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
           BLOCK: tl.constexpr, ACC: tl.constexpr):
    """One tile: PIXELS pixels, all channels."""
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    at, inside = (b * N + pixel) * C + c, (pixel < N) & (c < C)
    mean, rstd = _of_group(MEAN, b, c, C, GROUPS), _of_group(RSTD, b, c, C, GROUPS)
    weight, bias = tl.load(WEIGHT + c, c < C, 0.0).to(ACC), tl.load(BIAS + c, c < C, 0.0).to(ACC)
    u = (tl.load(X + at, inside, 0.0).to(ACC) - mean) * rstd * weight + bias
    tl.store(OUT + at, (u / (1 + tl.exp(-u))).to(OUT.dtype.element_ty), inside)

@jit
def _backward_sums(DOUT, X, MEAN, RSTD, WEIGHT, BIAS, SUM_DU, SUM_DUN, N, C: tl.constexpr, GROUPS: tl.constexpr,
                   PIXELS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, ACC: tl.constexpr):
    """Sums of du and du * n, per channel, over TILES * PIXELS pixels."""
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    mean, rstd = _of_group(MEAN, b, c, C, GROUPS), _of_group(RSTD, b, c, C, GROUPS)
    weight, bias = tl.load(WEIGHT + c, c < C, 0.0).to(ACC), tl.load(BIAS + c, c < C, 0.0).to(ACC)
    sum_du, sum_dun = tl.zeros((1, BLOCK), ACC), tl.zeros((1, BLOCK), ACC)
    for i in range(TILES):
        pixel = (part * TILES + i) * PIXELS + tl.arange(0, PIXELS)[:, None]
        at, inside = (b * N + pixel) * C + c, (pixel < N) & (c < C)
        n = (tl.load(X + at, inside, 0.0).to(ACC) - mean) * rstd
        u = n * weight + bias
        s = 1 / (1 + tl.exp(-u))
        du = tl.load(DOUT + at, inside, 0.0).to(ACC) * s * (1 + u * (1 - s))
        sum_du += tl.sum(du, axis=0, keep_dims=True)
        sum_dun += tl.sum(du * n, axis=0, keep_dims=True)
    at = (b * tl.num_programs(0) + part) * C + c
    tl.store(SUM_DU + at, sum_du, c < C)
    tl.store(SUM_DUN + at, sum_dun, c < C)

@jit
def _backward_apply(DOUT, X, MEAN, RSTD, WEIGHT, BIAS, MEAN_DN, MEAN_DNN, DX, N, C: tl.constexpr, GROUPS: tl.constexpr,
                    PIXELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """dx = (dn - mean(dn) - n mean(dn * n)) / sqrt(var + eps), with dn = weight * du and means over the group."""
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    at, inside = (b * N + pixel) * C + c, (pixel < N) & (c < C)
    mean, rstd = _of_group(MEAN, b, c, C, GROUPS), _of_group(RSTD, b, c, C, GROUPS)
    mean_dn, mean_dnn = _of_group(MEAN_DN, b, c, C, GROUPS), _of_group(MEAN_DNN, b, c, C, GROUPS)
    weight, bias = tl.load(WEIGHT + c, c < C, 0.0).to(ACC), tl.load(BIAS + c, c < C, 0.0).to(ACC)
    n = (tl.load(X + at, inside, 0.0).to(ACC) - mean) * rstd
    u = n * weight + bias
    s = 1 / (1 + tl.exp(-u))
    dn = tl.load(DOUT + at, inside, 0.0).to(ACC) * s * (1 + u * (1 - s)) * weight
    tl.store(DX + at, ((dn - mean_dn - n * mean_dnn) * rstd).to(DX.dtype.element_ty), inside)

# ---------------------------------------------------------------- PyTorch operators

def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)

def _tiling(x):
    """(grid over tiles, grid over runs of TILES tiles, keyword arguments of a tile)"""
    B, C, H, W = x.shape
    block = power_of_2(C)
    pixels = min(max(ELEMENTS // block, 1), power_of_2(H * W))
    tiles = -(-H * W // pixels)
    return (tiles, B), (-(-tiles // TILES), B), dict(C=C, PIXELS=pixels, BLOCK=block, ACC=precision(x), num_warps=8)

def _merge(mean, m2, per_part, N, groups, eps):
    """Moments of each part and channel, (B, parts, C), to mean and 1 / std of each group, (B, groups)."""
    parts = mean.shape[1]
    count = (N - per_part * torch.arange(parts, device=mean.device)).clamp(max=per_part).to(mean.dtype)[:, None, None]
    mean, m2 = mean.unflatten(2, (groups, -1)), m2.unflatten(2, (groups, -1))             # (B, parts, groups, C/groups)
    size = N * mean.shape[3]
    group_mean = (count * mean).sum((1, 3), keepdim=True) / size
    var = (m2 + count * (mean - group_mean).square()).sum((1, 3)) / size
    return group_mean[:, 0, :, 0].contiguous(), torch.rsqrt(var + eps)

def _shapes(x, weight, bias, groups, eps):
    """out (B, C, H, W) channels_last; mean and 1 / std (B, groups) float32, for the backward."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    mean = torch.empty(len(x), groups, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return out, mean, torch.empty_like(mean)

@operator("groupnorm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor, Tensor)", _shapes)
def _op(out, mean, rstd, x, weight, bias, groups, eps):
    (B, C, H, W), x = x.shape, _channels_last(x)
    tiles, runs, tile = _tiling(x)
    moments = mean.new_empty(2, B, runs[0], C)
    _moments[runs](x, moments[0], moments[1], H * W, TILES=TILES, **tile)
    for statistic, value in zip((mean, rstd), _merge(*moments, TILES * tile["PIXELS"], H * W, groups, eps)):
        statistic.copy_(value)
    _apply[tiles](x, mean, rstd, weight.contiguous(), bias.contiguous(), out, H * W, GROUPS=groups, **tile)

def _backward_shapes(dout, x, mean, rstd, weight, bias):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return dx, torch.empty_like(weight), torch.empty_like(bias)

@operator("groupnorm_silu_backward(Tensor dout, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias)"
          " -> (Tensor, Tensor, Tensor)", _backward_shapes)
def _op_backward(dx, dweight, dbias, dout, x, mean, rstd, weight, bias):
    (B, C, H, W), groups = x.shape, mean.shape[1]
    args = _channels_last(dout), _channels_last(x), mean, rstd, weight.contiguous(), bias.contiguous()
    tiles, runs, tile = _tiling(x)
    sums = mean.new_empty(2, B, runs[0], C)
    _backward_sums[runs](*args, sums[0], sums[1], H * W, GROUPS=groups, TILES=TILES, **tile)
    sums = sums.sum(2)                                                                    # of du and du * n, (2, B, C)
    means = (sums * weight).unflatten(2, (groups, -1)).sum(3) / (H * W * C // groups)     # of dn and dn * n, (2, B, groups)
    _backward_apply[tiles](*args, means[0], means[1], dx, H * W, GROUPS=groups, **tile)
    dweight.copy_(sums[1].sum(0)), dbias.copy_(sums[0].sum(0))

def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output[1:], *inputs[1:3])

def _grads(ctx, dout, dmean, drstd):
    """The statistics are no outputs to the caller: their gradients are zero."""
    return *_op_backward(dout, *ctx.saved_tensors), None, None

_op.register_autograd(_grads, setup_context=_save)

def groupnorm_silu(x, weight, bias, groups=32, eps=1e-6):
    """SiLU(GroupNorm(x)), (B, C, H, W), in channels_last."""
    if not use_triton(x):
        return groupnorm_silu_ref(x, weight, bias, groups, eps)
    return _op(x, weight, bias, groups, eps)[0]
