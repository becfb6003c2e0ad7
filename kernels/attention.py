"""Attention over a short sequence, from the qkv Linear's output to the next Linear's input, without copies.

    q, k = norm and rotation of each head, as in qknorm_rope.py
    out  = softmax(q k^T / sqrt(K)) v                            N <= 256 tokens

One kernel keeps all keys and values of a head on the chip, so no running softmax is needed.
Libraries pad K = 72, LightningDiT-XL's head width, to 96 or 128. Here a width is split into a power of two
and the rest, 64 + 16 (8 of the 16 are zeros): each product over K becomes two, and 72 costs as much as 80.

Shapes:    qkv (B, N, 3, A, K), any strides with the last one 1;  weights (K,) or None;
           cos, sin (N, K) float32 or None  ->  out (B, N, A, K)
Used by:   dit.Attention. For more tokens than LightningDiT's 256, `separately`: qknorm_rope and then `sdpa`,
           PyTorch's attention with the backend that was measured to be the fastest (choose.py).
Rounding:  q, k once, after the rotation; scores and softmax are float32;
           the probabilities are rounded to v's dtype for the second product.
Bytes, U = B*N*A*K elements:
    forward   reads q, k, v, writes out: 4 U; saves nothing else for the backward. Separate operations: 10 U
    backward  first by blocks of queries: reads q, k, v, dout, writes dq and three numbers per query;
              then by blocks of keys: reads the same, writes dk, dv.
              11 U, if a head's blocks find its tensors in the cache. Separate operations: 25 U
    Norm and rotation are recomputed for each block that needs them: 2 to 4 % of its products' arithmetic.
Measured:  not run on a GPU. Compiled for Hopper in bfloat16 (Triton 3.9, K = 72, N = 256, no norm), the
           forward uses 192 registers in 4 warps, so that two programs share a multiprocessor; the backward
           uses all 255 in 8 warps and spills 0.2 (queries) and 0.3 kB (keys) per thread to local memory. With
           norm and rotation the forward also uses 255, and spills 0.4 kB (Triton 3.6).
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import (
    FLOPS, INTERPRETED, at_least_float32, cdiv, contiguous_rows, jit, operation, operator, pointer,
    power_of_2, precision)
from kernels.qknorm_rope import EPS, qknorm_rope, qknorm_rope_ref, rotate, rotate_back

if TYPE_CHECKING:                                          # else at the first launch, see kernels.jit
    import triton.language as tl

BLOCK = 64         # queries of a program; keys, for dk and dv
MAX_N = 256        # tokens: a tile of BLOCK x 256 scores in float32 still fits into the registers
# In float32, without tensor cores: 256 compiles for minutes and then needs 288 kB of shared memory, where
# there are 227 (Triton 3.7.1, the gradients of keys).
MAX_N_FLOAT32 = 64
MIN_K = 17         # channels: both parts are at least 16, the smallest product of the tensor cores
MAX_K = 128        # q, k, v and dout of a head must fit on the chip


# ---------------------------------------------------------------- PyTorch's attention, any of its backends


def by(backend):
    """PyTorch's attention with this backend only.  raises: RuntimeError if it does not support the shapes"""

    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend


@operation(
    images=3, flash=by(SDPBackend.FLASH_ATTENTION), cudnn=by(SDPBackend.CUDNN_ATTENTION),
    efficient=by(SDPBackend.EFFICIENT_ATTENTION), math=by(SDPBackend.MATH))
def sdpa(q, k, v):
    """softmax(q k^T / sqrt(K)) v, three (B, A, N, K) -> (B, N, A, K), with the backend that PyTorch picks."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# ---------------------------------------------------------------- the specification


def attention_ref(qkv, q_weight=None, k_weight=None, cos=None, sin=None):
    """The specification."""
    q, k, v = qknorm_rope_ref(qkv, q_weight, k_weight, cos, sin)  # (B, A, N, K)
    scores = (q @ k.transpose(-1, -2)).to(at_least_float32(q.dtype)) / q.shape[-1]**0.5
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def separately(qkv, q_weight=None, k_weight=None, cos=None, sin=None):
    """Used where the kernel is not: norm and rotation, then PyTorch's attention."""
    return sdpa(*qknorm_rope(qkv, q_weight, k_weight, cos, sin))


def takes(qkv, *_):
    """Does the kernel support this many tokens at this precision, and heads of this width?"""
    most = MAX_N if INTERPRETED or qkv.element_size() == 2 else MAX_N_FLOAT32
    return qkv.shape[1] <= most and MIN_K <= qkv.shape[4] <= MAX_K


# ---------------------------------------------------------------- Triton: rows of a head
# Every tile of q, k, v and of their gradients is a pair: x1, the first K1 channels, and x2, K2 for the rest.
# `row` holds the row indices, (ROWS, 1). Rows from N on and channels from K on are zero and never written.


@jit
def _head(x_ptr, part, A, stride_b, stride_part, stride_a):
    """Where q (part 0), k (1) or v (2) of this program's head begins."""
    head = tl.program_id(1).to(tl.int64)                   # of B * A
    return x_ptr + head // A * stride_b + part * stride_part + head % A * stride_a


@jit
def _load(
    x_ptr, row, stride,
    N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, UP: tl.constexpr,
):
    """Both parts of these rows, (ROWS, K1) and (ROWS, K2); in the dtype UP, if given."""
    c1 = tl.arange(0, K1)[None, :]
    c2 = K1 + tl.arange(0, K2)[None, :]
    x1 = tl.load(x_ptr + row * stride + c1, row < N, 0.0)
    x2 = tl.load(x_ptr + row * stride + c2, (row < N) & (c2 < K), 0.0)
    if UP is not None:
        x1 = x1.to(UP)
        x2 = x2.to(UP)
    return x1, x2


@jit
def _store(
    x_ptr, row, stride, x1, x2,
    N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
):
    c1 = tl.arange(0, K1)[None, :]
    c2 = K1 + tl.arange(0, K2)[None, :]
    tl.store(x_ptr + row * stride + c1, x1.to(x_ptr.dtype.element_ty), row < N)
    tl.store(x_ptr + row * stride + c2, x2.to(x_ptr.dtype.element_ty), (row < N) & (c2 < K))


@jit
def _dot(a1, a2, b1, b2, ACC: tl.constexpr):
    """a b^T, over all channels: (ROWS_A, ROWS_B)."""
    s = tl.dot(a1, tl.trans(b1), input_precision="ieee", out_dtype=ACC)
    return tl.dot(a2, tl.trans(b2), s, input_precision="ieee", out_dtype=ACC)


@jit
def _times(p, x1, x2, ACC: tl.constexpr):
    """p x, for both parts of the channels."""
    y1 = tl.dot(p, x1, input_precision="ieee", out_dtype=ACC)
    y2 = tl.dot(p, x2, input_precision="ieee", out_dtype=ACC)
    return y1, y2


@jit
def _sum(x1, x2):
    """Sum over all channels: (ROWS, 1)."""
    return tl.sum(x1, axis=1, keep_dims=True) + tl.sum(x2, axis=1, keep_dims=True)


@jit
def _load_qk(
    x_ptr, row, stride, weight_ptr, cos_ptr, sin_ptr,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr,
):
    """Rows of q or k, normalised and rotated, both parts."""
    x1, x2 = _load(x_ptr, row, stride, N, K, K1, K2, UP)
    u1 = x1.to(ACC)
    u2 = x2.to(ACC)
    if NORM:
        w1, w2 = _load(weight_ptr, 0 * row, 0, N, K, K1, K2, ACC)
        r = tl.rsqrt(_sum(u1 * u1, u2 * u2) / K + EPS)
        u1 = u1 * r * w1
        u2 = u2 * r * w2
    if ROPE:
        cos1, cos2 = _load(cos_ptr, row, K, N, K, K1, K2, ACC)
        sin1, sin2 = _load(sin_ptr, row, K, N, K, K1, K2, ACC)
        u1 = rotate(u1, cos1, sin1, ROWS, K1)
        u2 = rotate(u2, cos2, sin2, ROWS, K2)
    return u1.to(x1.dtype), u2.to(x2.dtype)


@jit
def _store_qk(
    dx_ptr, dx1, dx2, x_ptr, row, dstride, stride, weight_ptr, dweight_ptr, cos_ptr, sin_ptr,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, ACC: tl.constexpr,
):
    """Gradients of such rows, back through rotation and norm; and this program's share of dweight.

    With u = weight * n and n = r x:
    dweight = sum over rows of du * n,  dn = weight * du,  dx = r (dn - n mean(dn * n))
    """
    if ROPE:
        cos1, cos2 = _load(cos_ptr, row, K, N, K, K1, K2, ACC)
        sin1, sin2 = _load(sin_ptr, row, K, N, K, K1, K2, ACC)
        dx1 = rotate_back(dx1, cos1, sin1, ROWS, K1)
        dx2 = rotate_back(dx2, cos2, sin2, ROWS, K2)
    if NORM:
        n1, n2 = _load(x_ptr, row, stride, N, K, K1, K2, ACC)
        w1, w2 = _load(weight_ptr, 0 * row, 0, N, K, K1, K2, ACC)
        r = tl.rsqrt(_sum(n1 * n1, n2 * n2) / K + EPS)
        n1 = n1 * r
        n2 = n2 * r

        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        program = program + tl.zeros((1, 1), tl.int32)     # as a tile: `_store` takes a column of rows
        dw1 = tl.sum(dx1 * n1, axis=0, keep_dims=True)     # (1, K1)
        dw2 = tl.sum(dx2 * n2, axis=0, keep_dims=True)
        _store(dweight_ptr + program * K, 0 * program, 0, dw1, dw2, N, K, K1, K2)

        dx1 = dx1 * w1
        dx2 = dx2 * w2
        mean = _sum(dx1 * n1, dx2 * n2) / K
        dx1 = r * (dx1 - n1 * mean)
        dx2 = r * (dx2 - n2 * mean)
    _store(dx_ptr, row, dstride, dx1, dx2, N, K, K1, K2)


# ---------------------------------------------------------------- Triton: forward and backward
# In each kernel, m indexes the program's BLOCK rows, and n all N tokens (BLOCK_N, a power of two).
# Strides are those of qkv, (B, N, 3, A, K): of an image, a token, from q to k to v, and of a head.


@jit
def _forward(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,  # read
    out_ptr,                                                # written: (B, N, A, K)
    scale,                                                  # 1 / sqrt(K)
    stride_b, stride_n: tl.constexpr, stride_part: tl.constexpr, stride_a: tl.constexpr,
    A: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr,
):
    """One program: BLOCK queries of one head of one image, with all keys."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    n = tl.arange(0, BLOCK_N)[:, None]
    q_ptr = _head(qkv_ptr, 0, A, stride_b, stride_part, stride_a)
    k_ptr = _head(qkv_ptr, 1, A, stride_b, stride_part, stride_a)
    v_ptr = _head(qkv_ptr, 2, A, stride_b, stride_part, stride_a)
    q1, q2 = _load_qk(q_ptr, m, stride_n, q_weight_ptr, cos_ptr, sin_ptr,
                      BLOCK, N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)
    k1, k2 = _load_qk(k_ptr, n, stride_n, k_weight_ptr, cos_ptr, sin_ptr,
                      BLOCK_N, N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)
    v1, v2 = _load(v_ptr, n, stride_n, N, K, K1, K2, UP)

    # p = softmax(q k^T / sqrt(K))
    s = _dot(q1, q2, k1, k2, ACC)                          # (BLOCK, BLOCK_N)
    s = tl.where(tl.arange(0, BLOCK_N)[None, :] < N, s * scale, -float("inf"))
    p = tl.exp(s - tl.max(s, axis=1, keep_dims=True))
    p = (p / tl.sum(p, axis=1, keep_dims=True)).to(v1.dtype)

    # out = p v
    out1, out2 = _times(p, v1, v2, ACC)
    _store(_head(out_ptr, 0, A, N * A * K, 0, K), m, A * K, out1, out2, N, K, K1, K2)


# The backward:  dp = dout v^T,  delta = sum over keys of p * dp,  ds = p * (dp - delta) / sqrt(K),
#                dq = ds k,  dk = ds^T q,  dv = p^T dout.


@jit
def _load_qkv_dout(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dout_ptr, queries, keys,
    stride_b, stride_n, stride_part, stride_a, A: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr,
):
    """This program's head: q and dout of QUERIES rows, k and v of KEYS rows, both parts of each."""
    q_ptr = _head(qkv_ptr, 0, A, stride_b, stride_part, stride_a)
    k_ptr = _head(qkv_ptr, 1, A, stride_b, stride_part, stride_a)
    v_ptr = _head(qkv_ptr, 2, A, stride_b, stride_part, stride_a)
    q1, q2 = _load_qk(q_ptr, queries, stride_n, q_weight_ptr, cos_ptr, sin_ptr,
                      QUERIES, N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)
    k1, k2 = _load_qk(k_ptr, keys, stride_n, k_weight_ptr, cos_ptr, sin_ptr,
                      KEYS, N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)
    v1, v2 = _load(v_ptr, keys, stride_n, N, K, K1, K2, UP)
    dout1, dout2 = _load(_head(dout_ptr, 0, A, N * A * K, 0, K), queries, A * K, N, K, K1, K2, UP)
    return q1, q2, k1, k2, v1, v2, dout1, dout2


@jit
def _backward_queries(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,  # read
    dout_ptr,                                               # read
    dqkv_ptr, dweight_ptr,                                  # written: dq, and sums (programs, K)
    top_ptr, part_ptr, delta_ptr,                           # written: three numbers per query, (B, A, N)
    scale,                                                  # 1 / sqrt(K)
    stride_b, stride_n: tl.constexpr, stride_part: tl.constexpr, stride_a: tl.constexpr,
    A: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr,
):
    """One program: dq of BLOCK queries of one head, with all keys; and three numbers that give p and ds."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    n = tl.arange(0, BLOCK_N)[:, None]
    q1, q2, k1, k2, v1, v2, dout1, dout2 = _load_qkv_dout(
        qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dout_ptr, m, n,
        stride_b, stride_n, stride_part, stride_a, A, BLOCK, BLOCK_N,
        N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)

    # p = exp(s - top) * part is the softmax
    s = _dot(q1, q2, k1, k2, ACC)                          # (BLOCK, BLOCK_N)
    dp = _dot(dout1, dout2, v1, v2, ACC)
    s = tl.where(tl.arange(0, BLOCK_N)[None, :] < N, s * scale, -float("inf"))
    top = tl.max(s, axis=1, keep_dims=True)
    p = tl.exp(s - top)
    part = 1 / tl.sum(p, axis=1, keep_dims=True)
    p = p * part
    delta = tl.sum(p * dp, axis=1, keep_dims=True)
    ds = (p * (dp - delta) * scale).to(k1.dtype)

    head = tl.program_id(1).to(tl.int64) * N
    tl.store(top_ptr + head + m, top, m < N)
    tl.store(part_ptr + head + m, part, m < N)             # log(sum(exp(s))) would cost float32 two digits
    tl.store(delta_ptr + head + m, delta, m < N)

    # dq = ds k
    q_ptr = _head(qkv_ptr, 0, A, stride_b, stride_part, stride_a)
    dq_ptr = _head(dqkv_ptr, 0, A, 3 * N * A * K, A * K, K)
    dq1, dq2 = _times(ds, k1, k2, ACC)
    _store_qk(dq_ptr, dq1, dq2, q_ptr, m, 3 * A * K, stride_n, q_weight_ptr, dweight_ptr, cos_ptr, sin_ptr,
              BLOCK, N, K, K1, K2, EPS, NORM, ROPE, ACC)


@jit
def _backward_keys(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,  # read
    dout_ptr,                                               # read
    dqkv_ptr, dweight_ptr,                                  # written: dk, dv, and sums (programs, K)
    top_ptr, part_ptr, delta_ptr,                           # read: the same three numbers
    scale,                                                  # 1 / sqrt(K)
    stride_b, stride_n: tl.constexpr, stride_part: tl.constexpr, stride_a: tl.constexpr,
    A: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr,
):
    """One program: dk and dv of BLOCK keys of one head, with all queries. Transposed: a row is a key."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    n = tl.arange(0, BLOCK_N)[:, None]
    q1, q2, k1, k2, v1, v2, dout1, dout2 = _load_qkv_dout(
        qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dout_ptr, n, m,
        stride_b, stride_n, stride_part, stride_a, A, BLOCK_N, BLOCK,
        N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)

    # p and ds from each query's three numbers; 0 past the last query and the last key
    s = _dot(k1, k2, q1, q2, ACC)                          # (BLOCK, BLOCK_N)
    dp = _dot(v1, v2, dout1, dout2, ACC)
    s = tl.where(m < N, s * scale, -float("inf"))
    query = tl.arange(0, BLOCK_N)[None, :]
    at = tl.program_id(1).to(tl.int64) * N + query
    p = tl.exp(s - tl.load(top_ptr + at, query < N, float("inf")))
    p = p * tl.load(part_ptr + at, query < N, 0.0)
    ds = (p * (dp - tl.load(delta_ptr + at, query < N, 0.0)) * scale).to(k1.dtype)

    # dv = p^T dout,  dk = ds^T q
    k_ptr = _head(qkv_ptr, 1, A, stride_b, stride_part, stride_a)
    dk_ptr = _head(dqkv_ptr, 1, A, 3 * N * A * K, A * K, K)
    dv_ptr = _head(dqkv_ptr, 2, A, 3 * N * A * K, A * K, K)
    dv1, dv2 = _times(p.to(k1.dtype), dout1, dout2, ACC)
    _store(dv_ptr, m, 3 * A * K, dv1, dv2, N, K, K1, K2)
    dk1, dk2 = _times(ds, q1, q2, ACC)
    _store_qk(dk_ptr, dk1, dk2, k_ptr, m, 3 * A * K, stride_n, k_weight_ptr, dweight_ptr, cos_ptr, sin_ptr,
              BLOCK, N, K, K1, K2, EPS, NORM, ROPE, ACC)


# ---------------------------------------------------------------- PyTorch operators


def _grid(qkv):
    B, N, _, A, _ = qkv.shape
    return cdiv(N, BLOCK), B * A


def _sizes(qkv, q_weight, cos):
    """The constants that all kernels are compiled for, strides included, see qknorm_rope.py."""
    _, N, _, A, K = qkv.shape
    _, stride_n, stride_part, stride_a, _ = qkv.stride()
    K1 = power_of_2(K) // 2                            # the largest power of two below K
    return dict(
        stride_n=stride_n, stride_part=stride_part, stride_a=stride_a,
        A=A, N=N, K=K, K1=K1, K2=max(16, power_of_2(K - K1)),
        BLOCK=BLOCK, BLOCK_N=max(16, power_of_2(N)),
        EPS=EPS, NORM=q_weight is not None, ROPE=cos is not None, ACC=precision(qkv),
        UP=precision(qkv) if INTERPRETED else None)    # tl.dot on bfloat16 is wrong in the interpreter


def _shape(qkv, q_weight, k_weight, cos, sin):
    B, N, _, A, K = qkv.shape
    return qkv.new_empty(B, N, A, K)


@operator(
    "attention(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin) -> Tensor",
    _shape)
def _op(out, qkv, q_weight, k_weight, cos, sin):
    qkv = contiguous_rows(qkv)
    tables = [pointer(t, unused=qkv) for t in (q_weight, k_weight, cos, sin)]
    K = qkv.shape[4]
    _forward[_grid(qkv)](qkv, *tables, out, K**-0.5, qkv.stride(0), **_sizes(qkv, q_weight, cos), num_warps=4)


def _backward_shapes(dout, qkv, q_weight, k_weight, cos, sin):
    """dqkv (B, N, 3, A, K), and the gradients of both weights, (2, K) float32, empty if there are none."""
    K = 0 if q_weight is None else qkv.shape[4]
    return qkv.new_empty(qkv.shape), qkv.new_empty(2, K, dtype=at_least_float32(qkv.dtype))


@operator(
    "attention_backward(Tensor dout, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos,"
    " Tensor? sin) -> (Tensor, Tensor)",
    _backward_shapes)
def _op_backward(dqkv, dweights, dout, qkv, q_weight, k_weight, cos, sin):
    B, N, _, A, K = qkv.shape
    qkv = contiguous_rows(qkv)
    dout = dout.contiguous()
    tables = [pointer(t, unused=qkv) for t in (q_weight, k_weight, cos, sin)]
    sizes = _sizes(qkv, q_weight, cos)

    grid = _grid(qkv)
    programs = grid[0] * grid[1]
    stats = dweights.new_empty(3, B, A, N)                 # top, part, delta: from one kernel to the other
    partial = dweights.new_empty(2, programs, K if sizes["NORM"] else 0)
    _backward_queries[grid](
        qkv, *tables, dout, dqkv, partial[0], *stats, K**-0.5, qkv.stride(0), **sizes, num_warps=8)
    _backward_keys[grid](
        qkv, *tables, dout, dqkv, partial[1], *stats, K**-0.5, qkv.stride(0), **sizes, num_warps=8)
    if sizes["NORM"]:
        torch.sum(partial, 1, out=dweights)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grads(ctx, dout):
    """Gradients of qkv, q_weight, k_weight, cos, sin; None for the tables."""
    qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
    dqkv, dweights = _op_backward(dout, qkv, q_weight, k_weight, cos, sin)
    dq_weight = None if q_weight is None else dweights[0].to(q_weight.dtype)
    dk_weight = None if k_weight is None else dweights[1].to(k_weight.dtype)
    return dqkv, dq_weight, dk_weight, None, None


_op.register_autograd(_grads, setup_context=_save)


def _flops(qkv, *_, **__):
    """From shapes: two products, q k^T and p v."""
    B, N, _, A, K = qkv
    return 4 * B * N**2 * A * K


def _flops_backward(dout, qkv, *_, **__):
    """Four products; recomputed scores are not counted, though PyTorch's counter does count its own."""
    B, N, _, A, K = qkv
    return 8 * B * N**2 * A * K


FLOPS[torch.ops.davae.attention] = _flops
FLOPS[torch.ops.davae.attention_backward] = _flops_backward


@operation(attention_ref, plain=separately, takes=takes)
def attention(qkv, q_weight=None, k_weight=None, cos=None, sin=None):
    """softmax(q k^T / sqrt(K)) v of the normalised and rotated q and k: (B, N, 3, A, K) -> (B, N, A, K)."""
    return _op(qkv, q_weight, k_weight, cos, sin)
