"""SiLU(GroupNorm(x)) on channels_last images: it precedes every convolution of the autoencoder.

    n   = (x - mean) / sqrt(var + eps)         mean, var: over C / groups channels and all pixels of an image
    u   = weight * n + bias
    out = u * sigmoid(u)

Forward and backward each make two passes over memory. The first computes statistics per tile and channel,
which a small kernel (in the backward a few PyTorch operations) combines into those of a group; the second
applies them. A tile is all channels of a few pixels, so that memory is read in order.

Shapes:    x, out (B, C, H, W), C fastest in memory (other layouts are first copied into this one);
           weight, bias (C,)
Used by:   davae.NormSiLU, before every 3x3 convolution of an AutoencoderKL but the first.
Bytes, U = B*C*H*W elements:
    forward   reads x twice, writes out: 3 U.
              Separate PyTorch operations: 6 U, with a strided GroupNorm for channels_last
    backward  reads x, dout twice, writes dx: 5 U; only x and the statistics are kept, u is recomputed
Measured:  4 x 128 x 1024 x 1024, H200, bfloat16, graphs of ten calls, where a copy runs at 4.25 TB/s
           (2026-11-26): forward 0.78 ms, 4.1 TB/s; backward 1.59 ms, 3.4 TB/s. Without a backward, compiled
           PyTorch takes 0.80 ms for one such image, the kernel 0.21; for 512 x 128 x 128, 52 and 23 us
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels import at_least_float32, cdiv, jit, operation, operator, power_of_2, precision

if TYPE_CHECKING:                                          # else at the first launch, see kernels.jit
    import triton.language as tl

ELEMENTS = 4096    # per tile, padding included
TILES = 8          # the fewest per program that computes moments; more, if a batch has more than
PROGRAMS = 512     # times as many: every program leaves moments, which have to be merged
BACK_TILES = 16    # per program of the backward's sums, which are merged faster
MERGED = 2048      # statistics that are merged at once


def groupnorm_silu_ref(x, weight, bias, groups=32, eps=1e-6):
    """The specification."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


# ---------------------------------------------------------------- Triton
# N = H W pixels. A tile is PIXELS x BLOCK: a few pixels of one image, and all C channels.


@jit
def _moments(
    x_ptr,                                                 # read: (B, N, C)
    mean_ptr, m2_ptr,                                      # written: (B, parts, C)
    N, tiles, C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    """One program: mean and m2, the sum of squared deviations from it, of tiles * PIXELS pixels, per channel.

    Sums are of d = x - the mean of its first tile: sum(x^2) - N mean^2 would cancel where the mean is large.
    They stay apart for each pixel of a tile until the end, because a sum over pixels has to go through memory
    that the threads share.
    """
    part = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    first = part * tiles * PIXELS
    count = tl.minimum(N - first, tiles * PIXELS)          # pixels of this program
    pixel = first + tl.arange(0, PIXELS)[:, None]
    x = tl.load(x_ptr + (b * N + pixel) * C + c, (pixel < N) & (c < C), 0.0).to(ACC)
    shift = tl.sum(x, axis=0, keep_dims=True) / tl.minimum(count, PIXELS).to(ACC)
    sum_d = tl.zeros((PIXELS, BLOCK), ACC)
    sum_dd = tl.zeros((PIXELS, BLOCK), ACC)

    for i in range(tiles):
        pixel = first + i * PIXELS + tl.arange(0, PIXELS)[:, None]
        inside = (pixel < N) & (c < C)
        x = tl.load(x_ptr + (b * N + pixel) * C + c, inside, 0.0).to(ACC)
        d = tl.where(inside, x - shift, 0.0)
        sum_d += d
        sum_dd += d * d

    d_mean = tl.sum(sum_d, axis=0, keep_dims=True) / count.to(ACC)
    m2 = tl.sum(sum_dd, axis=0, keep_dims=True) - d_mean * d_mean * count.to(ACC)
    at = (b * tl.num_programs(0) + part) * C + c
    tl.store(mean_ptr + at, shift + d_mean, c < C)
    tl.store(m2_ptr + at, m2, c < C)


@jit
def _merge(
    part_mean_ptr, part_m2_ptr,                            # read: (B, parts, C)
    mean_ptr, rstd_ptr,                                    # written: (B, GROUPS)
    N, per_part, parts, eps, C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: mean and 1 / std of one group of an image, from the moments of all parts and channels.

    per_part: pixels of a part; the last part has the rest of N.  Merged as in Chan et al. (1979).
    """
    group = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]                       # of the group's C // GROUPS channels
    total = tl.zeros((ROWS, BLOCK), ACC)
    for first in range(0, parts, ROWS):
        at, inside, count = _parts_of_group(b, group, first, c, N, per_part, parts, C, GROUPS, ROWS, ACC)
        total += tl.load(part_mean_ptr + at, inside, 0.0) * count
    size = N * (C // GROUPS)
    mean = tl.sum(tl.sum(total, axis=1, keep_dims=True), axis=0, keep_dims=True) / size

    total = tl.zeros((ROWS, BLOCK), ACC)
    for first in range(0, parts, ROWS):
        at, inside, count = _parts_of_group(b, group, first, c, N, per_part, parts, C, GROUPS, ROWS, ACC)
        d = tl.where(inside, tl.load(part_mean_ptr + at, inside, 0.0) - mean, 0.0)
        total += tl.load(part_m2_ptr + at, inside, 0.0) + d * d * count
    var = tl.sum(tl.sum(total, axis=1, keep_dims=True), axis=0, keep_dims=True) / size

    at = b * GROUPS + group + tl.zeros((1, 1), tl.int32)   # a tile of one
    tl.store(mean_ptr + at, mean)
    tl.store(rstd_ptr + at, tl.rsqrt(var + eps))


@jit
def _parts_of_group(
    b, group, first, c, N, per_part, parts, C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of ROWS parts from `first` on: where the group's channels stand, which exist, and a part's pixels."""
    part = first + tl.arange(0, ROWS)[:, None]
    at = (b * parts + part) * C + group * (C // GROUPS) + c
    inside = (part < parts) & (c < C // GROUPS)
    return at, inside, tl.minimum(N - part * per_part, per_part).to(ACC)


@jit
def _of_group(x_ptr, b, c, C: tl.constexpr, GROUPS: tl.constexpr):
    """For each channel of image b, the value of its group in x (B, GROUPS)."""
    return tl.load(x_ptr + b * GROUPS + c // (C // GROUPS), c < C, 0.0)


@jit
def _apply(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,       # read; statistics are (B, GROUPS)
    out_ptr,                                               # written: (B, N, C)
    N, C: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    """One program: one tile of out."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    at = (b * N + pixel) * C + c
    inside = (pixel < N) & (c < C)
    mean = _of_group(mean_ptr, b, c, C, GROUPS)
    rstd = _of_group(rstd_ptr, b, c, C, GROUPS)
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(ACC)
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(ACC)

    u = (tl.load(x_ptr + at, inside, 0.0).to(ACC) - mean) * rstd * weight + bias
    out = u / (1 + tl.exp(-u))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


@jit
def _backward_sums(
    dout_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # read
    sum_du_ptr, sum_dun_ptr,                                    # written: (B, parts, C)
    N, C: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: TILES * PIXELS pixels, the sums of du and of du * n over them, per channel."""
    part = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    mean = _of_group(mean_ptr, b, c, C, GROUPS)
    rstd = _of_group(rstd_ptr, b, c, C, GROUPS)
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(ACC)
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(ACC)
    sum_du = tl.zeros((PIXELS, BLOCK), ACC)                # apart for each pixel of a tile, as in `_moments`
    sum_dun = tl.zeros((PIXELS, BLOCK), ACC)

    for i in range(TILES):
        pixel = (part * TILES + i) * PIXELS + tl.arange(0, PIXELS)[:, None]
        at = (b * N + pixel) * C + c
        inside = (pixel < N) & (c < C)
        n = (tl.load(x_ptr + at, inside, 0.0).to(ACC) - mean) * rstd
        u = n * weight + bias

        # SiLU(u) = u s,  derivative s (1 + u (1 - s));  dout, and so du, is 0 outside
        s = 1 / (1 + tl.exp(-u))
        du = tl.load(dout_ptr + at, inside, 0.0).to(ACC) * s * (1 + u * (1 - s))
        sum_du += du
        sum_dun += du * n

    at = (b * tl.num_programs(0) + part) * C + c
    tl.store(sum_du_ptr + at, tl.sum(sum_du, axis=0, keep_dims=True), c < C)
    tl.store(sum_dun_ptr + at, tl.sum(sum_dun, axis=0, keep_dims=True), c < C)


@jit
def _backward_apply(
    dout_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,  # read
    mean_dn_ptr, mean_dnn_ptr,                                  # read: (B, GROUPS)
    dx_ptr,                                                     # written: (B, N, C)
    N, C: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):
    """One program: one tile of dx = (dn - mean(dn) - n mean(dn * n)) / sqrt(var + eps).

    dn = weight * du, and means are over the group.
    """
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    at = (b * N + pixel) * C + c
    inside = (pixel < N) & (c < C)
    mean = _of_group(mean_ptr, b, c, C, GROUPS)
    rstd = _of_group(rstd_ptr, b, c, C, GROUPS)
    mean_dn = _of_group(mean_dn_ptr, b, c, C, GROUPS)
    mean_dnn = _of_group(mean_dnn_ptr, b, c, C, GROUPS)
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(ACC)
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(ACC)

    # n, u and the derivative of SiLU(u) again
    n = (tl.load(x_ptr + at, inside, 0.0).to(ACC) - mean) * rstd
    u = n * weight + bias
    s = 1 / (1 + tl.exp(-u))
    dn = tl.load(dout_ptr + at, inside, 0.0).to(ACC) * s * (1 + u * (1 - s)) * weight
    dx = (dn - mean_dn - n * mean_dnn) * rstd
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)


# ---------------------------------------------------------------- PyTorch operators


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _empty_channels_last(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _tiling(x):
    """(tiles of an image, constants that all kernels are compiled for)"""
    _, C, H, W = x.shape
    block = power_of_2(C)
    pixels = min(max(ELEMENTS // block, 1), power_of_2(H * W))
    return cdiv(H * W, pixels), dict(C=C, PIXELS=pixels, BLOCK=block, ACC=precision(x))


def _shapes(x, weight, bias, groups, eps):
    """out (B, C, H, W) channels_last; mean and 1 / std (B, groups) float32, for the backward."""
    mean = torch.empty(len(x), groups, dtype=at_least_float32(x.dtype), device=x.device)
    return _empty_channels_last(x), mean, torch.empty_like(mean)


@operator(
    "groupnorm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor, Tensor)",
    _shapes)
def _op(out, mean, rstd, x, weight, bias, groups, eps):
    B, C, H, W = x.shape
    N = H * W
    x = _channels_last(x)
    tiles, sizes = _tiling(x)
    per_part = max(TILES, cdiv(B * tiles, PROGRAMS))
    parts = cdiv(tiles, per_part)

    part_mean, part_m2 = mean.new_empty(2, B, parts, C).unbind()
    _moments[(parts, B)](x, part_mean, part_m2, N, per_part, **sizes)
    block = power_of_2(C // groups)
    rows = min(max(MERGED // block, 1), power_of_2(parts))
    _merge[(groups, B)](
        part_mean, part_m2, mean, rstd, N, per_part * sizes["PIXELS"], parts, eps,
        C=C, GROUPS=groups, ROWS=rows, BLOCK=block, ACC=sizes["ACC"])

    _apply[(tiles, B)](x, mean, rstd, weight.contiguous(), bias.contiguous(), out, N, GROUPS=groups, **sizes)


def _backward_shapes(dout, x, mean, rstd, weight, bias):
    return _empty_channels_last(x), torch.empty_like(weight), torch.empty_like(bias)


@operator(
    "groupnorm_silu_backward(Tensor dout, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_shapes)
def _op_backward(dx, dweight, dbias, dout, x, mean, rstd, weight, bias):
    B, C, H, W = x.shape
    N = H * W
    groups = mean.shape[1]
    tiles, sizes = _tiling(x)
    parts = cdiv(tiles, BACK_TILES)
    inputs = (_channels_last(dout), _channels_last(x), mean, rstd, weight.contiguous(), bias.contiguous())

    sums = mean.new_empty(2, B, parts, C)
    _backward_sums[(parts, B)](*inputs, sums[0], sums[1], N, GROUPS=groups, TILES=BACK_TILES, **sizes)
    sums = sums.sum(2)                                     # (2, B, C), of du and du * n
    means = (sums * weight).unflatten(2, (groups, -1)).sum(3)
    means = means / (N * C // groups)                      # (2, B, groups), of dn and dn * n

    _backward_apply[(tiles, B)](*inputs, means[0], means[1], dx, N, GROUPS=groups, **sizes)
    dweight.copy_(sums[1].sum(0))
    dbias.copy_(sums[0].sum(0))


def _save(ctx, inputs, output):
    x, weight, bias, groups, eps = inputs
    out, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _grads(ctx, dout, dmean, drstd):
    """Gradients of x, weight, bias, groups, eps. No caller sees the statistics: dmean and drstd are zero."""
    dx, dweight, dbias = _op_backward(dout, *ctx.saved_tensors)
    return dx, dweight, dbias, None, None


_op.register_autograd(_grads, setup_context=_save)


@operation(groupnorm_silu_ref)
def groupnorm_silu(x, weight, bias, groups=32, eps=1e-6):
    """SiLU(GroupNorm(x)), (B, C, H, W), in channels_last."""
    out, _, _ = _op(x, weight, bias, groups, eps)
    return out
