"""QK-norm and rotary embedding, read straight from the qkv Linear's output, written in attention's layout.

    u = weight * x / sqrt(mean(x^2) + eps)        over the K channels of a head; skipped if weight is None
    (a, b) -> (a cos - b sin, b cos + a sin)      each adjacent pair in u; skipped if cos is None

Shapes:    qkv (B, L, 3, A, K), any strides with the last one 1;  weights (K,);  cos, sin (L, K) float32
           -> q, k, v (B, A, L, K); in memory a token's heads stand side by side, as in qkv
Used by:   dit.Attention.heads: LightningDiT rotates and may normalise, SD3.5 normalises and does not rotate.
Rounding:  once, at the end; the norm's result stays in float32 between norm and rotation.
Bytes, U = B*L*A*K elements:
    forward   reads q, k from qkv, writes q, k: 4 U; v is a view of qkv. Separate PyTorch operations: 30 U
    backward  reads dq, dk, dv, writes dqkv: 6 U; with a norm, it reads q and k again: 8 U. The same pass sums
              the gradients of the norms' weights. Separate operations stack dqkv in a pass of its own
Measured:  H200, bfloat16, graphs of ten calls, where a copy runs at 4.25 TB/s (2026-11-26; U's bytes / time):
                                                   forward              backward
           128 x 256 x 16 x 72, rotation           76 us, 4.0 TB/s      119 us, 3.8 TB/s
           the same, norm and rotation            102 us, 3.0 TB/s      304 us, 2.0 TB/s
           20 x 1024 x 24 x 64, norm               62 us, 4.0 TB/s      157 us, 3.2 TB/s
           (the last row: an earlier version.) 72 channels are padded to 128: of 16 threads, 7 compute
           nothing, which a norm shows
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import (
    at_least_float32, cdiv, contiguous_rows, jit, operation, operator, pointer, power_of_2, precision)

if TYPE_CHECKING:                                          # else at the first launch, see kernels.jit
    import triton.language as tl

EPS = 1e-6
TOKENS = 8         # per program of the backward with norms, which leaves two sums of K float32


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
# A tile is all heads of a token, BLOCK_A x BLOCK_K; memory is read and written in order.


@jit
def _rotate(u, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rotate each pair of columns of a tile (ROWS, COLUMNS) by its angle."""
    even, odd = tl.split(tl.reshape(u, (ROWS, COLUMNS // 2, 2)))
    return u * cos + tl.reshape(tl.join(-odd, even), (ROWS, COLUMNS)) * sin


@jit
def _rotate_back(du, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transposed rotation, for gradients."""
    even, odd = tl.split(tl.reshape(du * sin, (ROWS, COLUMNS // 2, 2)))
    return du * cos + tl.reshape(tl.join(odd, -even), (ROWS, COLUMNS))


@jit
def _forward(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,     # read
    q_ptr, k_ptr,                                              # written: (B, L, A, K)
    L, stride_b, stride_l: tl.constexpr, stride_part: tl.constexpr, stride_a: tl.constexpr,
    A: tl.constexpr, K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ACC: tl.constexpr,
):
    """One program: q and k of one token."""
    row = tl.program_id(0)                                 # the first axis: there may be more than 65,535
    b = tl.program_id(1).to(tl.int64)
    a = tl.arange(0, BLOCK_A)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = (a < A) & (k < K)
    at = qkv_ptr + b * stride_b + row * stride_l + a * stride_a + k
    q_head = tl.load(at, inside, 0.0).to(ACC)
    k_head = tl.load(at + stride_part, inside, 0.0).to(ACC)

    if NORM:
        q_head, _ = _normalise(q_head, K, EPS)
        k_head, _ = _normalise(k_head, K, EPS)
        q_head = q_head * tl.load(q_weight_ptr + k, k < K, 0.0).to(ACC)
        k_head = k_head * tl.load(k_weight_ptr + k, k < K, 0.0).to(ACC)

    if ROPE:
        cos = tl.load(cos_ptr + row * K + k, k < K, 0.0).to(ACC)
        sin = tl.load(sin_ptr + row * K + k, k < K, 0.0).to(ACC)
        q_head = _rotate(q_head, cos, sin, BLOCK_A, BLOCK_K)
        k_head = _rotate(k_head, cos, sin, BLOCK_A, BLOCK_K)

    at = ((b * L + row) * A + a) * K + k
    tl.store(q_ptr + at, q_head.to(q_ptr.dtype.element_ty), inside)
    tl.store(k_ptr + at, k_head.to(k_ptr.dtype.element_ty), inside)


@jit
def _normalise(u, K: tl.constexpr, EPS: tl.constexpr):
    """(n, r) of each head: n = r u, without the weight, and r = 1 / sqrt(mean(u^2) + eps)."""
    r = tl.rsqrt(tl.sum(u * u, axis=1, keep_dims=True) / K + EPS)
    return u * r, r


@jit
def _backward(
    dq_ptr, dk_ptr, dv_ptr,                                    # read: (B, L, A, K), with `dstrides`
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,     # read
    dqkv_ptr, dweights_ptr,                                    # written: (B, L, 3, A, K), (2, B, parts, K)
    L, stride_b, dstride_b, dstride_l: tl.constexpr, dstride_a: tl.constexpr,
    stride_l: tl.constexpr, stride_part: tl.constexpr, stride_a: tl.constexpr,
    A: tl.constexpr, K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ACC: tl.constexpr,
):
    """One program: dqkv of TOKENS tokens, one after another, and the sums over them for dweight."""
    part = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    a = tl.arange(0, BLOCK_A)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    if NORM:
        q_weight = tl.load(q_weight_ptr + k, k < K, 0.0).to(ACC)
        k_weight = tl.load(k_weight_ptr + k, k < K, 0.0).to(ACC)
        sum_q = tl.zeros((BLOCK_A, BLOCK_K), ACC)
        sum_k = tl.zeros((BLOCK_A, BLOCK_K), ACC)

    for i in range(TOKENS):
        row = part * TOKENS + i
        width = tl.where(row < L, K, 0)                    # nothing, past the last token
        inside = (a < A) & (k < width)
        at = b * dstride_b + row * dstride_l + a * dstride_a + k
        dq = tl.load(dq_ptr + at, inside, 0.0).to(ACC)
        dk = tl.load(dk_ptr + at, inside, 0.0).to(ACC)
        dv = tl.load(dv_ptr + at, inside, 0.0)

        if ROPE:
            cos = tl.load(cos_ptr + row * K + k, k < width, 0.0).to(ACC)
            sin = tl.load(sin_ptr + row * K + k, k < width, 0.0).to(ACC)
            dq = _rotate_back(dq, cos, sin, BLOCK_A, BLOCK_K)
            dk = _rotate_back(dk, cos, sin, BLOCK_A, BLOCK_K)
        if NORM:
            at = qkv_ptr + b * stride_b + row * stride_l + a * stride_a + k
            dq, dqn = _through_norm(dq, tl.load(at, inside, 0.0).to(ACC), q_weight, K, EPS)
            dk, dkn = _through_norm(dk, tl.load(at + stride_part, inside, 0.0).to(ACC), k_weight, K, EPS)
            sum_q += dqn
            sum_k += dkn
        at = ((b * L + row) * 3 * A + a) * K + k
        tl.store(dqkv_ptr + at, dq.to(dqkv_ptr.dtype.element_ty), inside)
        tl.store(dqkv_ptr + at + A * K, dk.to(dqkv_ptr.dtype.element_ty), inside)
        tl.store(dqkv_ptr + at + 2 * A * K, dv, inside)

    if NORM:
        at = (b * tl.num_programs(0) + part) * K + k
        tl.store(dweights_ptr + at, tl.sum(sum_q, axis=0, keep_dims=True), k < K)
        at += tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * K
        tl.store(dweights_ptr + at, tl.sum(sum_k, axis=0, keep_dims=True), k < K)


@jit
def _through_norm(dout, u, weight, K: tl.constexpr, EPS: tl.constexpr):
    """(du, dout * n) of heads u (BLOCK_A, BLOCK_K), from dout, the gradient of weight * n.

    n = r u,  dn = weight * dout,  du = r (dn - n mean(dn * n)),  dweight = sum of dout * n
    """
    n, r = _normalise(u, K, EPS)
    dn = dout * weight
    return r * (dn - n * (tl.sum(dn * n, axis=1, keep_dims=True) / K)), dout * n


# ---------------------------------------------------------------- PyTorch operators


def _sizes(qkv, q_weight, cos):
    """The constants that both kernels are compiled for.

    Strides are constants too: 72 is not a multiple of 16, and the compiler would otherwise load 2 bytes at a
    time instead of 16.
    """
    _, stride_l, stride_part, stride_a, _ = qkv.stride()
    _, _, _, A, K = qkv.shape
    return dict(
        stride_l=stride_l, stride_part=stride_part, stride_a=stride_a,
        A=A, K=K, BLOCK_A=power_of_2(A), BLOCK_K=power_of_2(K),
        EPS=EPS, NORM=q_weight is not None, ROPE=cos is not None, ACC=precision(qkv))


def _shapes(qkv, q_weight, k_weight, cos, sin):
    """q and k, both (B, L, A, K)."""
    B, L, _, A, K = qkv.shape
    return qkv.new_empty(B, L, A, K), qkv.new_empty(B, L, A, K)


@operator(
    "qknorm_rope(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin)"
    " -> (Tensor, Tensor)",
    _shapes)
def _op(q, k, qkv, q_weight, k_weight, cos, sin):
    B, L, _, _, _ = qkv.shape
    qkv = contiguous_rows(qkv)
    tables = [pointer(t, unused=qkv) for t in (q_weight, k_weight, cos, sin)]
    _forward[(L, B)](qkv, *tables, q, k, L, qkv.stride(0), num_warps=8, **_sizes(qkv, q_weight, cos))


def _backward_shapes(dq, dk, dv, qkv, q_weight, k_weight, cos, sin):
    """dqkv (B, L, 3, A, K), and both weights' gradients (2, K) in float32, empty without weights."""
    K = 0 if q_weight is None else qkv.shape[4]
    return qkv.new_empty(qkv.shape), qkv.new_empty(2, K, dtype=at_least_float32(qkv.dtype))


@operator(
    "qknorm_rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor? q_weight, Tensor? k_weight,"
    " Tensor? cos, Tensor? sin) -> (Tensor, Tensor)",
    _backward_shapes)
def _op_backward(dqkv, dweights, dq, dk, dv, qkv, q_weight, k_weight, cos, sin):
    B, L, _, _, _ = qkv.shape
    qkv = contiguous_rows(qkv)
    douts = [contiguous_rows(t.to(qkv.dtype)) for t in (dq, dk, dv)]
    if len({t.stride() for t in douts}) > 1:
        douts = [t.contiguous() for t in douts]
    dstride_b, dstride_l, dstride_a, _ = douts[0].stride()
    tables = [pointer(t, unused=qkv) for t in (q_weight, k_weight, cos, sin)]
    tokens = 1 if q_weight is None else TOKENS
    parts = cdiv(L, tokens)
    partial = dweights.new_empty(2, B, parts, dweights.shape[1])
    _backward[(parts, B)](
        *douts, qkv, *tables, dqkv, partial, L, qkv.stride(0), dstride_b,
        dstride_l=dstride_l, dstride_a=dstride_a, TOKENS=tokens, num_warps=1 if q_weight is None else 2,
        **_sizes(qkv, q_weight, cos))
    if q_weight is not None:
        torch.sum(partial, (1, 2), out=dweights)


class QKNormRope(torch.autograd.Function):
    """As one function, because v is a view of qkv, which no operator may return, and its gradient is copied
    into dqkv by the same kernel as those of q and k.
    """

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin):
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        q, k = _op(qkv, q_weight, k_weight, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        douts = [t.transpose(1, 2) for t in (dq, dk, dv)]
        dqkv, dweights = _op_backward(*douts, qkv, q_weight, k_weight, cos, sin)
        if q_weight is None:
            return dqkv, None, None, None, None
        return dqkv, dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype), None, None


@operation(qknorm_rope_ref)
def qknorm_rope(qkv, q_weight, k_weight, cos=None, sin=None):
    """(B, L, 3, A, K) -> q, k, v, each (B, A, L, K).

    q and k are normalised if they have a weight, and rotated if cos is given.
    """
    return QKNormRope.apply(qkv, q_weight, k_weight, cos, sin)
