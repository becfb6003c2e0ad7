"""Gated residual, norm and modulation: everything between two matrix products of an adaLN-Zero block, in one kernel.

    x_new = x + gate * y                              y: what the branch before computed; left out if there is none
    h     = norm(x_new) * (1 + scale) + shift         RMSNorm with a learned weight, or LayerNorm without (weight=None)

Shapes:    x, y, x_new, h (B, L, E);  gate, shift, scale (B, E), also as views of one (B, 6E);  weight (E,)
Used by:   dit.Block, twice: its second residual is left to the norm of the block after it; dit.JointBlock, both streams.
Rounding:  x_new is rounded to its dtype (under autocast bfloat16), all else stays in float32 until h is rounded to it, once.
Bytes, U = B*L*E elements:
    forward   read x, y, write x_new, h: 4 U (2 U without y). Separate PyTorch operations: about 20 U
    backward  read dx_new, dh, x_new, y, write dx, dy: 6 U, and in the same pass all five column sums
Measured:  not run on a GPU.
"""
from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F

from kernels import jit, power_of_2, precision, use_triton

EPS = 1e-6
ROWS = 16          # tokens per program of the backward: its 3 partial sums in float32 cost 6 % of the other bytes in bf16

def norm_modulate_ref(x, shift, scale, weight=None, y=None, gate=None):
    """The specification.  -> (x_new, h)"""
    if y is not None:
        x = x + gate[:, None] * y
    if weight is None:
        n = F.layer_norm(x, x.shape[-1:], eps=EPS)
    else:
        n = x.to(torch.promote_types(x.dtype, torch.float32))
        n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + EPS)
        n = n.to(x.dtype) * weight
    return x, (n * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)

# ---------------------------------------------------------------- Triton

@jit
def _forward(X, Y, GATE, SHIFT, SCALE, WEIGHT, X_NEW, H, L, stride_gate, stride_shift, stride_scale,
             E: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr, RMS: tl.constexpr,
             ACC: tl.constexpr):
    """One token per program."""
    token = tl.program_id(0).to(tl.int64)
    b = token // L
    e = tl.arange(0, BLOCK)
    inside = e < E
    x = tl.load(X + token * E + e, inside, 0.0).to(ACC)
    if RESIDUAL:
        gate = tl.load(GATE + b * stride_gate + e, inside, 0.0).to(ACC)
        y = tl.load(Y + token * E + e, inside, 0.0).to(ACC)
        x = (x + gate * y).to(X_NEW.dtype.element_ty)
        tl.store(X_NEW + token * E + e, x, inside)
        x = x.to(ACC)                              # the rounded sum is what the backward will read
    if RMS:
        n = x * tl.rsqrt(tl.sum(x * x) / E + EPS) * tl.load(WEIGHT + e, inside, 0.0).to(ACC)
    else:
        x = tl.where(inside, x - tl.sum(x) / E, 0.0)
        n = x * tl.rsqrt(tl.sum(x * x) / E + EPS)
    scale = tl.load(SCALE + b * stride_scale + e, inside, 0.0).to(ACC)
    shift = tl.load(SHIFT + b * stride_shift + e, inside, 0.0).to(ACC)
    tl.store(H + token * E + e, (n * (1 + scale) + shift).to(H.dtype.element_ty), inside)

@jit
def _backward(DX_NEW, DH, X_NEW, Y, GATE, SCALE, WEIGHT, DX, DY, SUM_DH, SUM_DHN, SUM_DXY, L, stride_gate, stride_scale,
              E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr,
              RMS: tl.constexpr, ACC: tl.constexpr):
    """ROWS tokens of one image per program: their dx, dy, and sums over them of dh, dh * n and dx * y."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e = tl.arange(0, BLOCK)
    inside = e < E
    factor = 1 + tl.load(SCALE + b * stride_scale + e, inside, 0.0).to(ACC)           # dn = dh * (1 + scale) * weight
    if RMS:
        factor = factor * tl.load(WEIGHT + e, inside, 0.0).to(ACC)
    if RESIDUAL:
        gate = tl.load(GATE + b * stride_gate + e, inside, 0.0).to(ACC)
        sum_dxy = tl.zeros((BLOCK,), ACC)
    sum_dh = tl.zeros((BLOCK,), ACC)
    sum_dhn = tl.zeros((BLOCK,), ACC)
    for i in range(ROWS):
        row = part * ROWS + i
        real = e < tl.where(row < L, E, 0)
        at = (b * L + row) * E + e
        n = tl.load(X_NEW + at, real, 0.0).to(ACC)
        dh = tl.load(DH + at, real, 0.0).to(ACC)
        if not RMS:
            n = tl.where(real, n - tl.sum(n) / E, 0.0)
        r = tl.rsqrt(tl.sum(n * n) / E + EPS)                                          # cheaper again than to be read
        n = n * r
        dn = dh * factor
        dx = dn - n * (tl.sum(dn * n) / E)
        if not RMS:
            dx = dx - tl.sum(dn) / E
        dx = dx * r
        if RESIDUAL:
            dx = dx + tl.load(DX_NEW + at, real, 0.0).to(ACC)
            y = tl.load(Y + at, real, 0.0).to(ACC)
            tl.store(DY + at, (dx * gate).to(DY.dtype.element_ty), real)
            sum_dxy += tl.where(real, dx * y, 0.0)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), real)
        sum_dh += dh
        sum_dhn += dh * n
    at = (b * tl.num_programs(1) + part) * E + e
    tl.store(SUM_DH + at, sum_dh, inside)
    tl.store(SUM_DHN + at, sum_dhn, inside)
    if RESIDUAL:
        tl.store(SUM_DXY + at, sum_dxy, inside)

# ---------------------------------------------------------------- PyTorch operators

def _rows(t):
    """(B, E) with contiguous rows: itself if it is a chunk of a wider tensor."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()

@torch.library.custom_op("davae::norm_modulate", mutates_args=(), schema=(
    "(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? y, Tensor? gate) -> (Tensor, Tensor)"))
def _op(x, shift, scale, weight, y, gate):
    x_new, h = _op_shapes(x, shift, scale, weight, y, gate)
    B, L, E = x.shape
    x, shift, scale = x.contiguous(), _rows(shift), _rows(scale)
    # Where there is no y (or no weight), x stands in for the pointers that are not read.
    y, gate = (x, x[:, 0]) if y is None else (y.contiguous(), _rows(gate))
    _forward[(B * L,)](
        x, y, gate, shift, scale, x if weight is None else weight.contiguous(), x_new, h, L, gate.stride(0),
        shift.stride(0), scale.stride(0), E=E, BLOCK=power_of_2(E), EPS=EPS, RESIDUAL=x_new.numel() > 0,
        RMS=weight is not None, ACC=precision(x), num_warps=8 if E > 1024 else 4)
    return x_new, h

@_op.register_fake
def _op_shapes(x, shift, scale, weight, y, gate):
    """Without y, x_new is x, which an operator may not return; it returns an empty tensor in its place."""
    dtype = reduce(torch.promote_types, [t.dtype for t in (x, y, gate) if t is not None])
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    return h.new_empty(0 if y is None else x.shape), h

@torch.library.custom_op("davae::norm_modulate_backward", mutates_args=(), schema=(
    "(Tensor dx_new, Tensor dh, Tensor x_new, Tensor scale, Tensor? weight, Tensor? y, Tensor? gate, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)"))
def _op_backward(dx_new, dh, x_new, scale, weight, y, gate, dtype):
    dx, dy, sums = _op_backward_shapes(dx_new, dh, x_new, scale, weight, y, gate, dtype)
    B, L, E = x_new.shape
    partial = sums.new_empty(len(sums), B, -(-L // ROWS), E)
    x_new, dh, scale = x_new.contiguous(), dh.contiguous(), _rows(scale)
    y, gate, dx_new = (x_new, x_new[:, 0], x_new) if y is None else (y.contiguous(), _rows(gate), dx_new.contiguous())
    _backward[(B, partial.shape[2])](
        dx_new, dh, x_new, y, gate, scale, x_new if weight is None else weight.contiguous(), dx, dy, partial[0], partial[1],
        partial[-1], L, gate.stride(0), scale.stride(0), E=E, BLOCK=power_of_2(E), ROWS=ROWS, EPS=EPS,
        RESIDUAL=dy.numel() > 0, RMS=weight is not None, ACC=precision(x_new), num_warps=8 if E > 1024 else 4)
    torch.sum(partial, 2, out=sums)
    return dx, dy, sums

@_op_backward.register_fake
def _op_backward_shapes(dx_new, dh, x_new, scale, weight, y, gate, dtype):
    """dx, dy, and the sums over tokens of dh, dh * n and, if there is a y, dx * y: (2 or 3, B, E) float32."""
    (B, L, E), n = x_new.shape, 2 if y is None else 3
    dx = torch.empty(B, L, E, dtype=dtype, device=x_new.device)
    dy = dx.new_empty(0) if y is None else torch.empty(B, L, E, dtype=y.dtype, device=x_new.device)
    return dx, dy, dx.new_empty(n, B, E, dtype=torch.promote_types(x_new.dtype, torch.float32))

def _save(ctx, inputs, output):
    x, shift, scale, weight, y, gate = inputs
    ctx.save_for_backward(x if y is None else output[0], scale, weight, y, gate)
    ctx.dtypes = x.dtype, shift.dtype

def _grads(ctx, dx_new, dh):
    """With S = sum over tokens of dh * n:  dscale = weight * S  and  dweight = sum over images of (1 + scale) * S."""
    x_new, scale, weight, y, gate = ctx.saved_tensors
    dx, dy, sums = _op_backward(dx_new, dh, x_new, scale, weight, y, gate, ctx.dtypes[0])
    dshift, S = sums[0].to(ctx.dtypes[1]), sums[1]
    dscale = (S if weight is None else S * weight).to(scale.dtype)
    dweight = None if weight is None else ((1 + scale.to(S.dtype)) * S).sum(0).to(weight.dtype)
    dy, dgate = (None, None) if y is None else (dy, sums[2].to(gate.dtype))
    return dx, dshift, dscale, dweight, dy, dgate

_op.register_autograd(_grads, setup_context=_save)

def norm_modulate(x, shift, scale, weight=None, y=None, gate=None):
    """x_new = x + gate * y;  h = norm(x_new) * (1 + scale) + shift.  -> (x_new, h), both (B, L, E)"""
    if not use_triton(x):
        return norm_modulate_ref(x, shift, scale, weight, y, gate)
    x_new, h = _op(x, shift, scale, weight, y, gate)
    return (x if y is None else x_new), h
