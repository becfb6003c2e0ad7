"""Norm and modulation, and the residual before them: between the matrix products of an adaLN-Zero block.

    norm_modulate        h     = norm(x) * (1 + scale) + shift

    norm_modulate_twice  the same with two shifts and scales: h, h2

    add_norm_modulate    x_new = x + gate * y                              y: output of the preceding branch
                         h     = norm(x_new) * (1 + scale) + shift

norm is RMSNorm with a learned weight, or LayerNorm without one (weight=None).

Shapes:    x, y, x_new, h (B, L, E);  gate, shift, scale (B, E), perhaps views of one (B, 6E);  weight (E,)
Used by:   dit.Block, and dit.JointBlock for both streams: norm_modulate before the attention,
           norm_modulate_twice before two attentions, add_norm_modulate between attention and MLP;
           dit.DiT.velocity: norm_modulate before the heads.
Rounding:  x_new is rounded to its dtype (bfloat16 under autocast); everything else stays float32 until h is
           rounded once, to the same dtype.
Bytes, U = B*L*E elements:
    forward   reads x, y, writes x_new, h: 4 U; without y 2 U. Separate PyTorch operations: about 20 U
    backward  reads dx_new, dh, x_new, y, writes dx, dy: 6 U; without y 3 U.
              The same pass computes all column sums over a few rows; a second, small kernel adds these
Measured:  H200, bfloat16, graphs of ten calls, where a copy runs at 4.25 TB/s (2026-11-26; U's bytes / time):
                                                   forward              backward
           128 x 256 x 1152, RMSNorm, with y       77 us, 3.9 TB/s      133 us, 3.4 TB/s
           the same, without y                     47 us, 3.2 TB/s       81 us, 2.8 TB/s
           20 x 1024 x 1536, LayerNorm             35 us, 3.6 TB/s       85 us, 2.2 TB/s
           Eight warps instead of two made the first backward 1.2 times as slow: they wait in every sum
"""
from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kernels import (
    at_least_float32, cdiv, contiguous_rows, jit, operation, operator, pointer, power_of_2, precision)

if TYPE_CHECKING:                                          # else at the first launch, see kernels.jit
    import triton.language as tl

EPS = 1e-6
AT_ONCE = 2        # tokens per program of the forward
ROWS = 32          # tokens per program of the backward: its 3 sums in float32 cost 3 % of the other bytes
STAGES = 3         # of its loop over them: while one step computes, the next two are already being loaded
COLUMNS = 128      # channels per program of the kernel that adds the partial sums


def norm_modulate_ref(x, shift, scale, weight=None):
    """The specification.  -> h"""
    if weight is None:
        n = F.layer_norm(x, x.shape[-1:], eps=EPS)
    else:
        n = x.to(at_least_float32(x.dtype))
        n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + EPS)
        n = n.to(x.dtype) * weight
    return (n * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def norm_modulate_twice_ref(x, shift, scale, shift2, scale2):
    """The specification, for a LayerNorm with two modulations.  -> (h, h2)"""
    n = F.layer_norm(x, x.shape[-1:], eps=EPS)
    h = n * (1 + scale[:, None]) + shift[:, None]
    h2 = n * (1 + scale2[:, None]) + shift2[:, None]
    return h.to(x.dtype), h2.to(x.dtype)


def add_norm_modulate_ref(x, y, gate, shift, scale, weight=None):
    """The specification, with a residual.  -> (x_new, h)"""
    x_new = x + gate[:, None] * y
    return x_new, norm_modulate_ref(x_new, shift, scale, weight)


# ---------------------------------------------------------------- Triton
# RESIDUAL: y and gate are given.  RMS: a weight is given.  Pointers to missing tensors are never read.


@jit
def _forward(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr,  # read
    x_new_ptr, h_ptr,                                          # written
    L, stride_gate, stride_shift, stride_scale,
    E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr,
    RESIDUAL: tl.constexpr, RMS: tl.constexpr, ACC: tl.constexpr,
):
    """One program: ROWS tokens of one image, all their E channels: a tile of ROWS x BLOCK."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    b = tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BLOCK)[None, :]
    inside = (row < L) & (e < E)
    at = (b * L + row) * E + e

    # x_new = x + gate * y
    x = tl.load(x_ptr + at, inside, 0.0).to(ACC)
    if RESIDUAL:
        gate = tl.load(gate_ptr + b * stride_gate + e, e < E, 0.0).to(ACC)
        y = tl.load(y_ptr + at, inside, 0.0).to(ACC)
        x = (x + gate * y).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + at, x, inside)
        x = x.to(ACC)                                      # the rounded sum is what the backward will read

    # h = norm(x_new) * (1 + scale) + shift
    factor = 1 + tl.load(scale_ptr + b * stride_scale + e, e < E, 0.0).to(ACC)
    if RMS:
        factor = factor * tl.load(weight_ptr + e, e < E, 0.0).to(ACC)
    shift = tl.load(shift_ptr + b * stride_shift + e, e < E, 0.0).to(ACC)
    n, _ = _normalise(x, inside, E, EPS, RMS)
    h = n * factor + shift
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), inside)


@jit
def _backward(
    dx_new_ptr, dh_ptr, x_new_ptr, y_ptr,                  # read
    gate_ptr, scale_ptr, weight_ptr,                       # read
    dx_ptr, dy_ptr,                                        # written
    sum_dh_ptr, sum_dhn_ptr, sum_dxy_ptr,                  # written, all (B, parts, E)
    L, stride_gate, stride_scale,
    E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EPS: tl.constexpr,
    RESIDUAL: tl.constexpr, RMS: tl.constexpr, ACC: tl.constexpr,
):
    """One program: dx and dy of ROWS tokens of one image, and the sums over them of dh, dh * n and dx * y."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    e = tl.arange(0, BLOCK)[None, :]
    inside = e < E

    # h = n * factor + shift,  dn = dh * factor
    factor = 1 + tl.load(scale_ptr + b * stride_scale + e, inside, 0.0).to(ACC)
    if RMS:
        factor = factor * tl.load(weight_ptr + e, inside, 0.0).to(ACC)

    if RESIDUAL:
        gate = tl.load(gate_ptr + b * stride_gate + e, inside, 0.0).to(ACC)
        sum_dxy = tl.zeros((1, BLOCK), ACC)
    sum_dh = tl.zeros((1, BLOCK), ACC)
    sum_dhn = tl.zeros((1, BLOCK), ACC)

    for i in tl.range(ROWS, num_stages=STAGES):
        row = part * ROWS + i
        real = e < tl.where(row < L, E, 0)                 # nothing, past the last token
        at = (b * L + row) * E + e
        x = tl.load(x_new_ptr + at, real, 0.0).to(ACC)
        dh = tl.load(dh_ptr + at, real, 0.0).to(ACC)
        n, r = _normalise(x, real, E, EPS, RMS)            # recomputed, which is cheaper than loading it
        dx = _dx_of_norm(dh * factor, n, r, E, RMS)
        if RESIDUAL:
            dx = dx + tl.load(dx_new_ptr + at, real, 0.0).to(ACC)
            y = tl.load(y_ptr + at, real, 0.0).to(ACC)
            tl.store(dy_ptr + at, (dx * gate).to(dy_ptr.dtype.element_ty), real)
            sum_dxy += tl.where(real, dx * y, 0.0)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), real)
        sum_dh += dh
        sum_dhn += dh * n

    at = (b * tl.num_programs(1) + part) * E + e
    tl.store(sum_dh_ptr + at, sum_dh, inside)
    tl.store(sum_dhn_ptr + at, sum_dhn, inside)
    if RESIDUAL:
        tl.store(sum_dxy_ptr + at, sum_dxy, inside)


@jit
def _normalise(x, real, E: tl.constexpr, EPS: tl.constexpr, RMS: tl.constexpr):
    """(n, r): the tokens x, normalised but without the weight, and 1 / their standard deviations."""
    if not RMS:
        x = tl.where(real, x - tl.sum(x, axis=1, keep_dims=True) / E, 0.0)
    r = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / E + EPS)
    return x * r, r


@jit
def _dx_of_norm(dn, n, r, E: tl.constexpr, RMS: tl.constexpr):
    """dx = r (dn - n mean(dn * n)), and for LayerNorm also less the mean of dn."""
    dx = dn - n * (tl.sum(dn * n, axis=1, keep_dims=True) / E)
    if not RMS:
        dx = dx - tl.sum(dn, axis=1, keep_dims=True) / E
    return dx * r


@jit
def _finish(
    sum_dh_ptr, sum_dhn_ptr, sum_dxy_ptr, scale_ptr, weight_ptr,  # read; sums are (B, PARTS, E)
    dshift_ptr, dscale_ptr, dgate_ptr, dweight_ptr,               # written, all (B, E)
    stride_scale,
    E: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr, RMS: tl.constexpr, ACC: tl.constexpr,
):
    """One program: COLUMNS channels of one image; adds its partial sums into gradients.

    With S = sum over tokens of dh * n:
    dscale = weight * S, and this image's share of dweight is (1 + scale) * S.
    """
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = e < E

    dshift = tl.zeros((COLUMNS,), ACC)
    S = tl.zeros((COLUMNS,), ACC)
    dgate = tl.zeros((COLUMNS,), ACC)
    for i in range(PARTS):
        at = (b * PARTS + i) * E + e
        dshift += tl.load(sum_dh_ptr + at, inside, 0.0)
        S += tl.load(sum_dhn_ptr + at, inside, 0.0)
        if RESIDUAL:
            dgate += tl.load(sum_dxy_ptr + at, inside, 0.0)

    at = b * E + e
    tl.store(dshift_ptr + at, dshift.to(dshift_ptr.dtype.element_ty), inside)
    if RESIDUAL:
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), inside)
    if RMS:
        scale = tl.load(scale_ptr + b * stride_scale + e, inside, 0.0).to(ACC)
        tl.store(dweight_ptr + at, (1 + scale) * S, inside)
        S = S * tl.load(weight_ptr + e, inside, 0.0).to(ACC)
    tl.store(dscale_ptr + at, S.to(dscale_ptr.dtype.element_ty), inside)


# ---------------------------------------------------------------- PyTorch operators
# One operator for both functions: without a residual, y and gate are None.


def _warps(elements):
    """Few, because they wait for each other in every sum over channels."""
    return min(max(elements // 1024, 1), 8)


def _shapes(x, shift, scale, weight, y, gate):
    """x_new and h. Without y, x_new would be x, which an operator may not return; it is empty instead."""
    given = [t.dtype for t in (x, y, gate) if t is not None]
    h = x.new_empty(x.shape, dtype=reduce(torch.promote_types, given))
    x_new = h.new_empty(0 if y is None else x.shape)
    return x_new, h


@operator(
    "norm_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? y, Tensor? gate)"
    " -> (Tensor, Tensor)",
    _shapes)
def _op(x_new, h, x, shift, scale, weight, y, gate):
    B, L, E = x.shape
    x = x.contiguous()
    shift = contiguous_rows(shift)
    scale = contiguous_rows(scale)
    gate = x[:, 0] if gate is None else contiguous_rows(gate)  # not read if there is none
    rows = min(AT_ONCE, power_of_2(L))
    _forward[(cdiv(L, rows), B)](
        x, pointer(y, unused=x), gate, shift, scale, pointer(weight, unused=x), x_new, h,
        L, gate.stride(0), shift.stride(0), scale.stride(0),
        E=E, BLOCK=power_of_2(E), ROWS=rows, EPS=EPS,
        RESIDUAL=y is not None, RMS=weight is not None, ACC=precision(x),
        num_warps=_warps(rows * power_of_2(E) // 2))


def _backward_shapes(dx_new, dh, x_new, scale, weight, y, gate, dtype):
    """dx, dy (B, L, E); dshift, dscale, dgate (B, E); dweight (E,). Empty for missing arguments."""
    B, L, E = x_new.shape
    new = x_new.new_empty
    dx = new(B, L, E, dtype=dtype)
    dy = new(0) if y is None else new(y.shape, dtype=y.dtype)
    dshift = new(B, E, dtype=scale.dtype)
    dscale = new(B, E, dtype=scale.dtype)
    dgate = new(0, dtype=scale.dtype) if y is None else new(gate.shape, dtype=gate.dtype)
    dweight = new(0) if weight is None else new(E, dtype=weight.dtype)
    return dx, dy, dshift, dscale, dgate, dweight


@operator(
    "norm_modulate_backward(Tensor dx_new, Tensor dh, Tensor x_new, Tensor scale, Tensor? weight, Tensor? y,"
    " Tensor? gate, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes)
def _op_backward(dx, dy, dshift, dscale, dgate, dweight, dx_new, dh, x_new, scale, weight, y, gate, dtype):
    B, L, E = x_new.shape
    parts = cdiv(L, ROWS)
    sums = x_new.new_empty(3, B, parts, E, dtype=at_least_float32(x_new.dtype))
    sum_dh, sum_dhn, sum_dxy = sums.unbind()
    dweights = sums.new_empty(B, E)                        # the images' shares
    same = dict(E=E, RESIDUAL=y is not None, RMS=weight is not None, ACC=precision(x_new))

    x_new = x_new.contiguous()
    scale = contiguous_rows(scale)
    gate = x_new[:, 0] if gate is None else contiguous_rows(gate)  # not read if there is none
    dx_new = x_new if y is None else dx_new.contiguous()   # nor this
    y = pointer(y, unused=x_new)
    weight = pointer(weight, unused=x_new)

    _backward[(B, parts)](
        dx_new, dh.contiguous(), x_new, y, gate, scale, weight, dx, dy, sum_dh, sum_dhn, sum_dxy,
        L, gate.stride(0), scale.stride(0),
        BLOCK=power_of_2(E), ROWS=ROWS, STAGES=STAGES, EPS=EPS, num_warps=_warps(power_of_2(E)), **same)
    _finish[(B, cdiv(E, COLUMNS))](
        sum_dh, sum_dhn, sum_dxy, scale, weight, dshift, dscale, dgate, dweights,
        scale.stride(0), PARTS=parts, COLUMNS=COLUMNS, **same)
    if same["RMS"]:
        dweight.copy_(dweights.sum(0))


def _save(ctx, inputs, output):
    x, shift, scale, weight, y, gate = inputs
    x_new = x if y is None else output[0]
    ctx.save_for_backward(x_new, scale, weight, y, gate)
    ctx.set_materialize_grads(False)                       # no zeros for a missing x_new
    ctx.x_dtype = x.dtype
    ctx.shift_dtype = shift.dtype


def _grads(ctx, dx_new, dh):
    """Gradients of x, shift, scale, weight, y, gate; None for what was None."""
    x_new, scale, weight, y, gate = ctx.saved_tensors
    if y is None:
        dx_new = x_new                                     # a placeholder, not read
    elif dx_new is None:
        dx_new = torch.zeros_like(x_new)                   # x_new was not used any further
    dh = torch.zeros_like(x_new) if dh is None else dh
    dx, dy, dshift, dscale, dgate, dweight = _op_backward(
        dx_new, dh, x_new, scale, weight, y, gate, ctx.x_dtype)
    if weight is None:
        dweight = None
    if y is None:
        dy = None
        dgate = None
    return dx, dshift.to(ctx.shift_dtype), dscale, dweight, dy, dgate


_op.register_autograd(_grads, setup_context=_save)


def takes(x, *others):
    """Does each image have its own modulation? The kernel does not broadcast."""
    return all(t.shape == (len(x), x.shape[-1]) for t in others if t is not None and t.dim() == 2)


@operation(norm_modulate_ref, images=3, takes=takes)
def norm_modulate(x, shift, scale, weight=None):
    """h = norm(x) * (1 + scale) + shift: (B, L, E) -> (B, L, E)."""
    _, h = _op(x, shift, scale, weight, None, None)
    return h


@operation(norm_modulate_twice_ref, images=5, takes=takes)
def norm_modulate_twice(x, shift, scale, shift2, scale2):
    """(h, h2) of one LayerNorm without weight, modulated twice: each (B, L, E).

    The kernel computes the norm twice: that reads x once more (4 U instead of 3), but stores no n.
    """
    _, h = _op(x, shift, scale, None, None, None)
    _, h2 = _op(x, shift2, scale2, None, None, None)
    return h, h2


@operation(add_norm_modulate_ref, images=5, takes=takes)
def add_norm_modulate(x, y, gate, shift, scale, weight=None):
    """x_new = x + gate * y;  h = norm(x_new) * (1 + scale) + shift.  -> (x_new, h), both (B, L, E)"""
    return _op(x, shift, scale, weight, y, gate)
