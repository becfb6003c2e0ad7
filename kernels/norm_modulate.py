"""Gated residual, norm and modulation: everything between two matrix products of an adaLN-Zero block, in one kernel.

    x_new = x + gate * y                              y: what the branch before computed; left out if there is none
    h     = norm(x_new) * (1 + scale) + shift         RMSNorm with a learned weight, or LayerNorm without (weight=None)

Shapes:    x, y, x_new, h (B, L, E);  gate, shift, scale (B, E), also as views of one (B, 6E);  weight (E,)
Used by:   dit.Block, twice: its second residual is left to the norm of the block after it; dit.JointBlock, both streams.
Rounding:  x_new is rounded to its dtype (under autocast bfloat16), all else stays in float32 until h is rounded to it, once.
Bytes, U = B*L*E elements:
    forward   read x, y, write x_new, h: 4 U (2 U without y). Separate PyTorch operations: about 20 U
    backward  read dx_new, dh, x_new, y, write dx, dy: 6 U, and in the same pass all five column sums, of a few rows each;
              a second, small kernel adds these
Measured:  not run on a GPU.
"""
from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F

from kernels import jit, operator, power_of_2, precision, use_triton

EPS = 1e-6
ROWS = 16          # tokens per program of the backward: its 3 partial sums in float32 cost 6 % of the other bytes in bf16
COLUMNS = 128      # of the kernel that adds the partial sums

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
    sum_dh, sum_dhn = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for i in tl.range(ROWS, num_stages=3):         # the next two rows are on their way
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

@jit
def _finish(SUM_DH, SUM_DHN, SUM_DXY, SCALE, WEIGHT, DSHIFT, DSCALE, DGATE, DWEIGHT, stride_scale, E: tl.constexpr,
            PARTS: tl.constexpr, COLUMNS: tl.constexpr, RESIDUAL: tl.constexpr, RMS: tl.constexpr, ACC: tl.constexpr):
    """COLUMNS channels of one image: its partial sums added, as gradients. With S = sum over tokens of dh * n,
    dscale = weight * S, and the image's share in dweight is (1 + scale) * S."""
    b, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = e < E
    dshift, S, dgate = tl.zeros((COLUMNS,), ACC), tl.zeros((COLUMNS,), ACC), tl.zeros((COLUMNS,), ACC)
    for i in range(PARTS):
        at = (b * PARTS + i) * E + e
        dshift += tl.load(SUM_DH + at, inside, 0.0)
        S += tl.load(SUM_DHN + at, inside, 0.0)
        if RESIDUAL:
            dgate += tl.load(SUM_DXY + at, inside, 0.0)
    at = b * E + e
    tl.store(DSHIFT + at, dshift.to(DSHIFT.dtype.element_ty), inside)
    if RESIDUAL:
        tl.store(DGATE + at, dgate.to(DGATE.dtype.element_ty), inside)
    if RMS:
        tl.store(DWEIGHT + at, (1 + tl.load(SCALE + b * stride_scale + e, inside, 0.0).to(ACC)) * S, inside)
        S = S * tl.load(WEIGHT + e, inside, 0.0).to(ACC)
    tl.store(DSCALE + at, S.to(DSCALE.dtype.element_ty), inside)

# ---------------------------------------------------------------- PyTorch operators

def _rows(t):
    """(B, E) with contiguous rows: itself if it is a chunk of a wider tensor."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()

def _shapes(x, shift, scale, weight, y, gate):
    """x_new and h. Without y, x_new is x, which an operator may not return: it returns an empty tensor in its place."""
    dtype = reduce(torch.promote_types, [t.dtype for t in (x, y, gate) if t is not None])
    h = x.new_empty(x.shape, dtype=dtype)
    return h.new_empty(0 if y is None else x.shape), h

@operator("norm_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? y, Tensor? gate) -> (Tensor, Tensor)",
          _shapes)
def _op(x_new, h, x, shift, scale, weight, y, gate):
    (B, L, E), x, shift, scale = x.shape, x.contiguous(), _rows(shift), _rows(scale)
    # Where there is no y (or no weight), x stands in for the pointers that are not read.
    y, gate = (x, x[:, 0]) if y is None else (y.contiguous(), _rows(gate))
    _forward[(B * L,)](x, y, gate, shift, scale, x if weight is None else weight.contiguous(), x_new, h, L, gate.stride(0),
                       shift.stride(0), scale.stride(0), E=E, BLOCK=power_of_2(E), EPS=EPS, RESIDUAL=x_new.numel() > 0,
                       RMS=weight is not None, ACC=precision(x), num_warps=8 if E > 1024 else 4)

def _backward_shapes(dx_new, dh, x_new, scale, weight, y, gate, dtype):
    """dx (B, L, E), dy like y, dshift, dscale, dgate (B, E), dweight (E,) float32; empty if there is no y or no weight."""
    (B, L, E), new = x_new.shape, x_new.new_empty
    dy, dgate = [new(0 if y is None else t.shape, dtype=t.dtype) for t in ((x_new, scale) if y is None else (y, gate))]
    dweight = new(0 if weight is None else E, dtype=torch.promote_types(x_new.dtype, torch.float32))
    return new(B, L, E, dtype=dtype), dy, new(B, E, dtype=scale.dtype), new(B, E, dtype=scale.dtype), dgate, dweight

@operator("norm_modulate_backward(Tensor dx_new, Tensor dh, Tensor x_new, Tensor scale, Tensor? weight, Tensor? y, "
          "Tensor? gate, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _backward_shapes)
def _op_backward(dx, dy, dshift, dscale, dgate, dweight, dx_new, dh, x_new, scale, weight, y, gate, dtype):
    B, L, E = x_new.shape
    sums, per_image = dweight.new_empty(3, B, -(-L // ROWS), E), dweight.new_empty(B, E)    # the images' shares in dweight
    x_new, dh, scale, rms = x_new.contiguous(), dh.contiguous(), _rows(scale), weight is not None
    weight = weight.contiguous() if rms else x_new
    y, gate, dx_new = (x_new, x_new[:, 0], x_new) if y is None else (y.contiguous(), _rows(gate), dx_new.contiguous())
    same = dict(E=E, RESIDUAL=dy.numel() > 0, RMS=rms, ACC=precision(x_new))
    _backward[(B, sums.shape[2])](
        dx_new, dh, x_new, y, gate, scale, weight, dx, dy, *sums, L, gate.stride(0), scale.stride(0), BLOCK=power_of_2(E),
        ROWS=ROWS, EPS=EPS, num_warps=8 if E > 1024 else 4, **same)
    _finish[(B, -(-E // COLUMNS))](
        *sums, scale, weight, dshift, dscale, dgate, per_image, scale.stride(0), PARTS=sums.shape[2], COLUMNS=COLUMNS, **same)
    if rms:
        torch.sum(per_image, 0, out=dweight)

def _save(ctx, inputs, output):
    x, shift, scale, weight, y, gate = inputs
    ctx.save_for_backward(x if y is None else output[0], scale, weight, y, gate)
    ctx.dtypes = x.dtype, shift.dtype

def _grads(ctx, dx_new, dh):
    weight, y = ctx.saved_tensors[2:4]
    dx, dy, dshift, dscale, dgate, dweight = _op_backward(dx_new, dh, *ctx.saved_tensors, ctx.dtypes[0])
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dx, dshift.to(ctx.dtypes[1]), dscale, dweight, *((None, None) if y is None else (dy, dgate))

_op.register_autograd(_grads, setup_context=_save)

def norm_modulate(x, shift, scale, weight=None, y=None, gate=None):
    """x_new = x + gate * y;  h = norm(x_new) * (1 + scale) + shift.  -> (x_new, h), both (B, L, E)"""
    if not use_triton(x):
        return norm_modulate_ref(x, shift, scale, weight, y, gate)
    x_new, h = _op(x, shift, scale, weight, y, gate)
    return (x if y is None else x_new), h
