"""QK-norm and rotary embedding, read straight from the qkv Linear's output, written in attention's layout.

    u = weight * x / sqrt(mean(x^2) + eps)        over the K channels of a head; skipped if weight is None
    (a, b) -> (a cos - b sin, b cos + a sin)      each adjacent pair in u; skipped if cos is None

Shapes:    qkv (B, L, 3, A, K), any strides with the last one 1;  weights (K,);  cos, sin (L, K) float32
           -> q, k, v (B, A, L, K);  q and k are new tensors, v is a view of qkv
Used by:   dit.Attention.heads: LightningDiT rotates and may normalise, SD3.5 normalises and does not rotate.
Rounding:  once, at the end; the norm's result stays in float32 between norm and rotation.
Bytes, U = B*L*A*K elements:
    forward   reads q, k from qkv, writes q, k: 4 U. Separate PyTorch operations: about 30 U
    backward  reads q, k, dq, dk, writes dq, dk: 6 U; the same pass sums the gradients of the norms'
              weights. Autograd then stacks dq, dk, dv into dqkv: 6 U more, a copy at full bandwidth
Measured:  not run on a GPU.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import (
    at_least_float32, cdiv, contiguous_rows, jit, operation, operator, pointer, power_of_2, precision)

if TYPE_CHECKING:                                          # else at the first launch, see kernels.jit
    import triton.language as tl

EPS = 1e-6
TOKENS = 8         # per program of the backward: one partial sum of K float32 for every TOKENS*A*K elements


def rope(x, cos, sin):
    """Rotate each pair of adjacent channels of x (B, A, L, K) by the angle of its token and pair; float32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


def norm_rope_ref(x, weight, cos, sin):
    """The specification for q or k: (B, L, A, K) -> (B, A, L, K)."""
    u = x.transpose(1, 2)
    if weight is not None:
        u = u.to(at_least_float32(x.dtype))
        u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS)
        u = u.to(x.dtype) * weight
    if cos is not None:
        u = rope(u, cos, sin)
    return u.to(x.dtype)


def qknorm_rope_ref(qkv, q_weight, k_weight, cos=None, sin=None):
    """The specification.  -> q, k, v"""
    q, k, v = qkv.unbind(2)
    return norm_rope_ref(q, q_weight, cos, sin), norm_rope_ref(k, k_weight, cos, sin), v.transpose(1, 2)


# ---------------------------------------------------------------- Triton


@jit
def rotate(u, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rotate each pair of columns of a tile (ROWS, COLUMNS) by its angle."""
    even, odd = tl.split(tl.reshape(u, (ROWS, COLUMNS // 2, 2)))
    return u * cos + tl.reshape(tl.join(-odd, even), (ROWS, COLUMNS)) * sin


@jit
def rotate_back(du, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transposed rotation, for gradients."""
    even, odd = tl.split(tl.reshape(du * sin, (ROWS, COLUMNS // 2, 2)))
    return du * cos + tl.reshape(tl.join(odd, -even), (ROWS, COLUMNS))


@jit
def _forward(
    x_ptr, weight_ptr, cos_ptr, sin_ptr,                   # read: q or k as laid out in qkv, (B, L, A, K)
    out_ptr,                                               # written: (B, A, L, K)
    L, stride_b, stride_l: tl.constexpr, stride_a: tl.constexpr,
    A: tl.constexpr, K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ACC: tl.constexpr,
):
    """One program: all heads of one token, in a tile of BLOCK_A x BLOCK_K."""
    row = tl.program_id(0)                                 # the first axis: there may be more than 65,535
    b = tl.program_id(1).to(tl.int64)
    a = tl.arange(0, BLOCK_A)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = (a < A) & (k < K)
    u = tl.load(x_ptr + b * stride_b + row * stride_l + a * stride_a + k, inside, 0.0).to(ACC)

    if NORM:
        r = tl.rsqrt(tl.sum(u * u, axis=1, keep_dims=True) / K + EPS)  # of each head
        u = u * r * tl.load(weight_ptr + k, k < K, 0.0).to(ACC)

    if ROPE:
        cos = tl.load(cos_ptr + row * K + k, k < K, 0.0).to(ACC)
        sin = tl.load(sin_ptr + row * K + k, k < K, 0.0).to(ACC)
        u = rotate(u, cos, sin, BLOCK_A, BLOCK_K)

    tl.store(out_ptr + ((b * A + a) * L + row) * K + k, u.to(out_ptr.dtype.element_ty), inside)


@jit
def _backward(
    dout_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr,         # read
    dx_ptr, dweight_ptr,                                   # written: (B, L, A, K), and sums (B, parts, K)
    L, stride_b, stride_l: tl.constexpr, stride_a: tl.constexpr,
    A: tl.constexpr, K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ACC: tl.constexpr,
):
    """One program: dx of all heads of TOKENS tokens, one after another, and the sum over them of du * n."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    a = tl.arange(0, BLOCK_A)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    if NORM:
        weight = tl.load(weight_ptr + k, k < K, 0.0).to(ACC)
        dweight = tl.zeros((1, BLOCK_K), ACC)

    for i in range(TOKENS):
        row = part * TOKENS + i
        width = tl.where(row < L, K, 0)                    # nothing, past the last token
        inside = (a < A) & (k < width)
        du = tl.load(dout_ptr + ((b * A + a) * L + row) * K + k, inside, 0.0).to(ACC)

        if ROPE:
            cos = tl.load(cos_ptr + row * K + k, k < width, 0.0).to(ACC)
            sin = tl.load(sin_ptr + row * K + k, k < width, 0.0).to(ACC)
            du = rotate_back(du, cos, sin, BLOCK_A, BLOCK_K)

        # u = weight * n,  n = r x,  dx = r (dn - n mean(dn * n))
        if NORM:
            n = tl.load(x_ptr + b * stride_b + row * stride_l + a * stride_a + k, inside, 0.0).to(ACC)
            r = tl.rsqrt(tl.sum(n * n, axis=1, keep_dims=True) / K + EPS)
            n = n * r
            dweight += tl.sum(du * n, axis=0, keep_dims=True)
            dn = du * weight
            du = r * (dn - n * (tl.sum(dn * n, axis=1, keep_dims=True) / K))

        tl.store(dx_ptr + ((b * L + row) * A + a) * K + k, du.to(dx_ptr.dtype.element_ty), inside)

    if NORM:
        tl.store(dweight_ptr + (b * tl.num_programs(1) + part) * K + k, dweight, k < K)


# ---------------------------------------------------------------- PyTorch operators
# One operator, called for q and then for k.


def _sizes(x, weight, cos):
    """The constants that both kernels are compiled for.

    Strides are constants too: 72 is not a multiple of 16, and the compiler would otherwise load 2 bytes at a
    time instead of 16.
    """
    _, _, A, K = x.shape
    return dict(
        stride_l=x.stride(1), stride_a=x.stride(2),
        A=A, K=K, BLOCK_A=power_of_2(A), BLOCK_K=power_of_2(K),
        EPS=EPS, NORM=weight is not None, ROPE=cos is not None, ACC=precision(x))


def _shape(x, weight, cos, sin):
    B, L, A, K = x.shape
    return x.new_empty(B, A, L, K)


@operator("norm_rope(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin) -> Tensor", _shape)
def _op(out, x, weight, cos, sin):
    B, L, _, _ = x.shape
    x = contiguous_rows(x)
    tables = [pointer(t, unused=x) for t in (weight, cos, sin)]
    _forward[(L, B)](x, *tables, out, L, x.stride(0), **_sizes(x, weight, cos))


def _backward_shapes(dout, x, weight, cos, sin):
    """dx (B, L, A, K) and dweight (K,) in float32, empty without a weight."""
    K = 0 if weight is None else x.shape[3]
    return x.new_empty(x.shape), x.new_empty(K, dtype=at_least_float32(x.dtype))


@operator(
    "norm_rope_backward(Tensor dout, Tensor x, Tensor? weight, Tensor? cos, Tensor? sin) -> (Tensor, Tensor)",
    _backward_shapes)
def _op_backward(dx, dweight, dout, x, weight, cos, sin):
    B, L, _, K = x.shape
    x = contiguous_rows(x)
    tables = [pointer(t, unused=x) for t in (weight, cos, sin)]
    parts = cdiv(L, TOKENS)
    dweights = dweight.new_empty(B, parts, K)              # partial sums
    _backward[(B, parts)](
        dout.contiguous(), x, *tables, dx, dweights, L, x.stride(0), TOKENS=TOKENS, **_sizes(x, weight, cos))
    if weight is not None:
        torch.sum(dweights, (0, 1), out=dweight)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grads(ctx, dout):
    """Gradients of x, weight, cos, sin; None for the tables."""
    x, weight, cos, sin = ctx.saved_tensors
    dx, dweight = _op_backward(dout, x, weight, cos, sin)
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dx, dweight, None, None


_op.register_autograd(_grads, setup_context=_save)


@operation(qknorm_rope_ref)
def qknorm_rope(qkv, q_weight, k_weight, cos=None, sin=None):
    """(B, L, 3, A, K) -> q, k, v, each (B, A, L, K).

    q and k are normalised if they have a weight, and rotated if cos is given.
    """
    q, k, v = qkv.unbind(2)
    return _op(q, q_weight, cos, sin), _op(k, k_weight, cos, sin), v.transpose(1, 2)
