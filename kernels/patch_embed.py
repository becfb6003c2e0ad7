"""The widened patch embedder: both latents and the position embedding to tokens, in one kernel.

    tokens = P(z) + P_new(z_d) + pos          P and P_new are p x p convolutions with stride p:  one product over C p p + D p p

Shapes:    z (B, C, h, w), z_d (B, D, h, w), any strides, so also the two slices of one z_all;  weight (E, C, p, p),
           weight_new (E, D, p, p), bias (E,), pos (1, L, E)  ->  tokens (B, L, E), row-major, L = h w / p^2
Used by:   dit.DiT.tokens, once widened.
Rounding:  summed in float32, with bias and pos, and rounded once, to the convolutions' dtype: bfloat16 under autocast.
Bytes:     forward reads the latents and the weights, and writes B L E tokens, nothing in between; two convolutions, an addition
           and the position embedding move about ten times as much. LightningDiT at batch 128: 0.09 GB, 0.03 % of a training
           step. This kernel is here because it is the method's first layer, not because a model gets faster by it.
Backward:  plain PyTorch, matrix products on the latents cut into patches: the weights' gradients reduce over all B L tokens,
           which is a matrix product as the library does it best. Reads dtokens once for bias and pos and once for each weight;
           dz and dz_d are computed only if asked for.
Measured:  not run on a GPU.
"""
from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F

from kernels import FLOPS, INTERPRETED, jit, operator, power_of_2, precision, use_triton

BLOCK = 64         # tokens and outputs of a tile

def patch_embed_ref(z, z_d, weight, weight_new, bias, pos):
    """The specification."""
    p = weight.shape[-1]
    x = F.conv2d(z, weight, bias, stride=p) + F.conv2d(z_d, weight_new, stride=p)
    return (x.flatten(2).transpose(1, 2) + pos).to(x.dtype)

# ---------------------------------------------------------------- Triton

@jit
def _forward(Z, Z_D, WEIGHT, WEIGHT_NEW, BIAS, POS, OUT, L, w, zb, zc, zh, zw, db, dc, dh, dw,
             C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
             BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr):
    """BLOCK_L tokens of one image times BLOCK_E outputs; pixel by pixel of the patch, all C and all D channels at once."""
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    row, column = token // w * P, token % w * P
    c, d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    inside = (token < L) & (e < E)
    acc = tl.load(BIAS + e, e < E, 0.0).to(ACC) + tl.load(POS + token * E + e, inside, 0.0).to(ACC)
    for i in tl.static_range(P):
        for j in tl.static_range(P):
            pixel = Z + b * zb + (row + i) * zh + (column + j) * zw
            z = tl.load(pixel + c[None, :] * zc, (token < L) & (c[None, :] < C), 0.0)
            weight = tl.load(WEIGHT + ((e * C + c[:, None]) * P + i) * P + j, (e < E) & (c[:, None] < C), 0.0)
            pixel = Z_D + b * db + (row + i) * dh + (column + j) * dw
            z_d = tl.load(pixel + d[None, :] * dc, (token < L) & (d[None, :] < D), 0.0)
            weight_new = tl.load(WEIGHT_NEW + ((e * D + d[:, None]) * P + i) * P + j, (e < E) & (d[:, None] < D), 0.0)
            if UPCAST:                             # tl.dot on bfloat16 is wrong in the interpreter
                z, weight, z_d, weight_new = z.to(ACC), weight.to(ACC), z_d.to(ACC), weight_new.to(ACC)
            acc = tl.dot(z, weight, acc, input_precision="ieee", out_dtype=ACC)
            acc = tl.dot(z_d, weight_new, acc, input_precision="ieee", out_dtype=ACC)
    tl.store(OUT + (b * L + token) * E + e, acc.to(OUT.dtype.element_ty), inside)

# ---------------------------------------------------------------- PyTorch operators

def _patches(z, p):
    """(B, C, h, w) -> (B L, C p p), the order of a convolution's weight."""
    return F.unfold(z, p, stride=p).transpose(1, 2).flatten(0, 1) if p > 1 else z.permute(0, 2, 3, 1).flatten(0, 2)

def _image(patches, like, p):
    """The inverse of `_patches`."""
    B, C, h, w = like.shape
    return patches.view(B, h // p, w // p, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)

def _shape(z, z_d, weight, weight_new, bias, pos):
    (B, _, h, w), (E, _, p, _) = z.shape, weight.shape
    dtype = reduce(torch.promote_types, [t.dtype for t in (z, z_d, weight, weight_new)])
    return z.new_empty(B, (h // p) * (w // p), E, dtype=dtype)

@operator("patch_embed(Tensor z, Tensor z_d, Tensor weight, Tensor weight_new, Tensor bias, Tensor pos) -> Tensor", _shape)
def _op(out, z, z_d, weight, weight_new, bias, pos):
    (B, L, _), (E, C, p, _), D, same = out.shape, weight.shape, z_d.shape[1], torch.promote_types(z.dtype, weight.dtype)
    z, z_d, weight, weight_new = (t.to(same) for t in (z, z_d, weight.contiguous(), weight_new.contiguous()))
    _forward[(-(-E // BLOCK), -(-L // BLOCK), B)](
        z, z_d, weight, weight_new, bias.contiguous(), pos.contiguous(), out, L, z.shape[3] // p, *z.stride(), *z_d.stride(),
        C=C, D=D, E=E, P=p, BLOCK_L=BLOCK, BLOCK_E=BLOCK, BLOCK_C=max(16, power_of_2(C)), BLOCK_D=max(16, power_of_2(D)),
        UPCAST=INTERPRETED, ACC=precision(z))

def _save(ctx, inputs, output):
    z, z_d, weight, weight_new, bias, pos = inputs
    ctx.save_for_backward(z, z_d, weight, weight_new)
    ctx.dtypes = bias.dtype, pos.dtype

def _grads(ctx, dtokens):
    z, z_d, weight, weight_new = ctx.saved_tensors
    p, (bias, pos) = weight.shape[-1], ctx.dtypes
    dpos = dtokens.sum(0, keepdim=True)
    rows = dtokens.flatten(0, 1).to(torch.promote_types(z.dtype, weight.dtype))           # (B L, E)
    dz = [_image(rows @ W.flatten(1).to(rows.dtype), x, p).to(x.dtype) if needed else None
          for x, W, needed in zip((z, z_d), (weight, weight_new), ctx.needs_input_grad)]
    dweight = [(rows.T @ _patches(x, p).to(rows.dtype)).view_as(W).to(W.dtype) for x, W in ((z, weight), (z_d, weight_new))]
    return *dz, *dweight, dpos.sum((0, 1)).to(bias), dpos.to(pos)

_op.register_autograd(_grads, setup_context=_save)

FLOPS[torch.ops.davae.patch_embed] = lambda z, z_d, weight, *_, **__: 2 * z[0] * z[2] * z[3] * (z[1] + z_d[1]) * weight[0]

def patch_embed(z, z_d, weight, weight_new, bias, pos):
    """P(z) + P_new(z_d) + pos: (B, C, h, w), (B, D, h, w) -> (B, L, E)."""
    if not use_triton(z):
        return patch_embed_ref(z, z_d, weight, weight_new, bias, pos)
    if not z.is_meta and torch.is_autocast_enabled(z.device.type):                         # what it would do to a convolution
        dtype = torch.get_autocast_dtype(z.device.type)
        z, z_d, weight, weight_new = (t.to(dtype) for t in (z, z_d, weight, weight_new))
    return _op(z, z_d, weight, weight_new, bias, pos)
