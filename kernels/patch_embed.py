"""The widened patch embedder: tokens from both latents and the position embedding, in one kernel.

    tokens = P(z) + P_new(z_d) + pos

P and P_new are p x p convolutions with stride p: together one matrix product over C p p + D p p numbers.

Shapes:    z (B, C, h, w), z_d (B, D, h, w), any strides, so they may be slices of one z_all;
           weight (E, C, p, p), weight_new (E, D, p, p), bias (E,), pos (1, L, E)
           ->  tokens (B, L, E), row-major, L = h w / p^2
Used by:   dit.Transformer.tokens, once widened.
Rounding:  summed in float32, with bias and pos, and rounded once, to the convolutions' dtype: bfloat16 under
           autocast.
Bytes:     the forward reads the latents and the weights and writes B L E tokens, with no intermediates. Two
           convolutions, an addition and the position embedding move about ten times as much.
           LightningDiT at batch 128: 0.09 GB, 0.03 % of a training step. This kernel exists because it is
           the method's first layer, not because it makes a model faster.
Backward:  plain PyTorch, matrix products on the latents cut into patches: the weights' gradients reduce over
           all B L tokens, and the library does such a matrix product best. It reads dtokens once for bias and
           pos and once for each weight; dz and dz_d are computed only if needed.
Measured:  LightningDiT at batch 128, H200, bfloat16, graphs of ten calls (2026-11-26): 55 us, 2.8 times what
           its bytes take. The position embedding and the weights are read again for every 64 tokens
"""
from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels import FLOPS, INTERPRETED, cdiv, jit, operation, operator, power_of_2, precision

if TYPE_CHECKING:                                          # else at the first launch, see kernels.jit
    import triton.language as tl

BLOCK_L = 64       # tokens of a program
BLOCK_E = 64       # outputs of a tile
STAGES = 3         # tiles: while one is multiplied, the weights of the next two are already being loaded,
STAGED = 256       # if a patch has at most this many numbers; for more, there is no memory on the chip
LARGEST = 640      # numbers of a patch, both latents' padded, of which one tile of weights still fits


def patch_embed_ref(z, z_d, weight, weight_new, bias, pos):
    """The specification."""
    p = weight.shape[-1]
    x = F.conv2d(z, weight, bias, stride=p) + F.conv2d(z_d, weight_new, stride=p)
    return (x.flatten(2).transpose(1, 2) + pos).to(x.dtype)


# ---------------------------------------------------------------- Triton


@jit
def _forward(
    z_ptr, z_d_ptr, weight_ptr, weight_new_ptr, bias_ptr, pos_ptr,  # read
    out_ptr,                                                        # written
    L, columns,                                                     # tokens of an image, and of one row
    z_stride_b, z_stride_c, z_stride_h, z_stride_w,
    z_d_stride_b, z_d_stride_c, z_d_stride_h, z_d_stride_w,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr,
):
    """One program: BLOCK_L tokens of one image, all outputs, BLOCK_E at a time. Latents are read once."""
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    c = tl.arange(0, BLOCK_C)                              # of the C P P numbers of a patch of z
    d = tl.arange(0, BLOCK_D)
    z = _patches_of(z_ptr + b * z_stride_b, token, c[None, :], L, columns,
                    z_stride_c, z_stride_h, z_stride_w, C, P)
    z_d = _patches_of(z_d_ptr + b * z_d_stride_b, token, d[None, :], L, columns,
                      z_d_stride_c, z_d_stride_h, z_d_stride_w, D, P)

    for first in tl.range(0, E, BLOCK_E, num_stages=STAGES):
        e = first + tl.arange(0, BLOCK_E)[None, :]
        weight = tl.load(weight_ptr + e * (C * P * P) + c[:, None], (e < E) & (c[:, None] < C * P * P), 0.0)
        weight_new = tl.load(
            weight_new_ptr + e * (D * P * P) + d[:, None], (e < E) & (d[:, None] < D * P * P), 0.0)
        if UPCAST:                                         # tl.dot on bfloat16 is wrong in the interpreter
            product = tl.dot(z.to(ACC), weight.to(ACC), input_precision="ieee", out_dtype=ACC)
            product = tl.dot(z_d.to(ACC), weight_new.to(ACC), product, input_precision="ieee", out_dtype=ACC)
        else:
            product = tl.dot(z, weight, input_precision="ieee", out_dtype=ACC)
            product = tl.dot(z_d, weight_new, product, input_precision="ieee", out_dtype=ACC)

        inside = (token < L) & (e < E)
        bias = tl.load(bias_ptr + e, e < E, 0.0).to(ACC)
        pos = tl.load(pos_ptr + token * E + e, inside, 0.0).to(ACC)
        out = product + bias + pos
        tl.store(out_ptr + (b * L + token) * E + e, out.to(out_ptr.dtype.element_ty), inside)


@jit
def _patches_of(
    x_ptr, token, number, L, columns, stride_c, stride_h, stride_w, C: tl.constexpr, P: tl.constexpr,
):
    """(BLOCK_L, BLOCK_C): each token's P x P patch of an image x, in the order of a convolution's weight."""
    row = token // columns * P + number // P % P
    column = token % columns * P + number % P
    at = number // (P * P) * stride_c + row * stride_h + column * stride_w
    return tl.load(x_ptr + at, (token < L) & (number < C * P * P), 0.0)


# ---------------------------------------------------------------- PyTorch operators


def _shape(z, z_d, weight, weight_new, bias, pos):
    B, _, h, w = z.shape
    E, _, p, _ = weight.shape
    dtype = reduce(torch.promote_types, [t.dtype for t in (z, z_d, weight, weight_new)])
    return z.new_empty(B, (h // p) * (w // p), E, dtype=dtype)


@operator(
    "patch_embed(Tensor z, Tensor z_d, Tensor weight, Tensor weight_new, Tensor bias, Tensor pos) -> Tensor",
    _shape)
def _op(out, z, z_d, weight, weight_new, bias, pos):
    B, L, _ = out.shape
    E, C, p, _ = weight.shape
    D = z_d.shape[1]
    dtype = torch.promote_types(z.dtype, weight.dtype)
    z = z.to(dtype)
    z_d = z_d.to(dtype)
    weight = weight.contiguous().to(dtype)
    weight_new = weight_new.contiguous().to(dtype)
    block_c, block_d = _blocks(z, z_d, p)
    _forward[(cdiv(L, BLOCK_L), B)](
        z, z_d, weight, weight_new, bias.contiguous(), pos.contiguous(), out,
        L, z.shape[3] // p, *z.stride(), *z_d.stride(),
        C=C, D=D, E=E, P=p,
        BLOCK_L=BLOCK_L, BLOCK_E=BLOCK_E, BLOCK_C=block_c, BLOCK_D=block_d,
        STAGES=STAGES if block_c + block_d <= STAGED else 1, UPCAST=INTERPRETED, ACC=precision(z))


def _blocks(z, z_d, p):
    """The numbers of a p x p patch of each latent, padded to what a product takes."""
    return [max(16, power_of_2(x.shape[1] * p * p)) for x in (z, z_d)]


def _patches(z, p):
    """(B, C, h, w) -> (B L, C p p), in the order of a convolution's weight."""
    if p == 1:
        return z.permute(0, 2, 3, 1).flatten(0, 2)
    return F.unfold(z, p, stride=p).transpose(1, 2).flatten(0, 1)


def _image(patches, like, p):
    """The inverse of `_patches`: (B L, C p p) -> (B, C, h, w), the shape of `like`."""
    B, C, h, w = like.shape
    patches = patches.view(B, h // p, w // p, C, p, p)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)


def _dz(dtokens, weight, z):
    """Gradient of a latent, from dtokens (B L, E)."""
    patches = dtokens @ weight.flatten(1).to(dtokens.dtype)  # (B L, C p p)
    return _image(patches, z, weight.shape[-1]).to(z.dtype)


def _dweight(dtokens, weight, z):
    """Gradient of a convolution's weight, from dtokens (B L, E)."""
    patches = _patches(z, weight.shape[-1]).to(dtokens.dtype)  # (B L, C p p)
    return (dtokens.T @ patches).view_as(weight).to(weight.dtype)


def _save(ctx, inputs, output):
    z, z_d, weight, weight_new, bias, pos = inputs
    ctx.save_for_backward(z, z_d, weight, weight_new)
    ctx.bias_dtype = bias.dtype
    ctx.pos_dtype = pos.dtype


def _grads(ctx, dtokens):
    """Gradients of z, z_d, weight, weight_new, bias, pos; None for a latent that needs none."""
    z, z_d, weight, weight_new = ctx.saved_tensors
    dpos = dtokens.sum(0, keepdim=True)                    # (1, L, E)
    dbias = dpos.sum((0, 1))                               # (E,)
    rows = dtokens.flatten(0, 1).to(torch.promote_types(z.dtype, weight.dtype))  # (B L, E)
    dz = _dz(rows, weight, z) if ctx.needs_input_grad[0] else None
    dz_d = _dz(rows, weight_new, z_d) if ctx.needs_input_grad[1] else None
    dweight = _dweight(rows, weight, z)
    dweight_new = _dweight(rows, weight_new, z_d)
    return dz, dz_d, dweight, dweight_new, dbias.to(ctx.bias_dtype), dpos.to(ctx.pos_dtype)


_op.register_autograd(_grads, setup_context=_save)


def _flops(z, z_d, weight, *_, **__):
    """From shapes: two per multiply-add."""
    B, C, h, w = z
    D = z_d[1]
    E = weight[0]
    return 2 * B * h * w * (C + D) * E


FLOPS[torch.ops.davae.patch_embed] = _flops


def takes(z, z_d, weight, weight_new, bias, pos):
    """Does the kernel support products of this precision and size, and is there a position for each token?

    Float32 products do not use tensor cores: 128 channels with 2x2 patches would spill 72 kB per thread to
    local memory (Triton 3.6, as compiled).
    """
    p = weight.shape[-1]
    if pos.shape[1] != z.shape[2] // p * (z.shape[3] // p):
        return False
    if INTERPRETED:
        return True
    if z.element_size() == 2 or not z.is_meta and torch.is_autocast_enabled(z.device.type):
        return sum(_blocks(z, z_d, p)) <= LARGEST
    return (z.shape[1] + z_d.shape[1]) * p * p <= 64


@operation(patch_embed_ref, images=2, takes=takes)
def patch_embed(z, z_d, weight, weight_new, bias, pos):
    """P(z) + P_new(z_d) + pos: (B, C, h, w), (B, D, h, w) -> (B, L, E)."""
    if not z.is_meta and torch.is_autocast_enabled(z.device.type):  # as it would for a convolution
        dtype = torch.get_autocast_dtype(z.device.type)
        z = z.to(dtype)
        z_d = z_d.to(dtype)
        weight = weight.to(dtype)
        weight_new = weight_new.to(dtype)
    return _op(z, z_d, weight, weight_new, bias, pos)
