"""Attention over a short sequence: all keys and values of a head stay on the chip, so no running softmax is needed.

    out = softmax(q k^T / sqrt(K)) v,    q, k, v: (B, A, N, K), N <= 256 tokens

Libraries pad K = 72, LightningDiT-XL's head width, to 96 or 128. Here a width is split into a power of two and the rest,
64 + 16 (of which 8 are zeros): each product over K becomes two, and 72 costs as much as 80.
Shapes:    q, k, v (B, A, N, K), any strides with the last one 1, so also views of the packed qkv;  out (B, A, N, K)
Used by:   dit.attention, for LightningDiT's 256 tokens; longer sequences take scaled_dot_product_attention.
Rounding:  scores and softmax in float32; the probabilities are rounded to v's dtype for the second product.
Bytes, U = B*A*N*K elements:
    forward   read q, k, v, write out: 4 U; nothing else is kept for the backward
    backward  `_backward_q` takes blocks of queries, reads q, k, v, dout, writes dq and two numbers per query; `_backward_kv`
              takes blocks of keys, reads the same, writes dk, dv: 11 U, if a head's blocks find its tensors in the cache
Measured:  not run on a GPU. As compiled for Hopper in bfloat16 (Triton 3.9, K = 72, N = 256), the forward fits into 223
           registers; the two backward kernels need more than 255 and keep 1.2 and 0.7 kB per thread in local memory.
"""
from __future__ import annotations

import torch

from kernels import INTERPRETED, jit, power_of_2, precision, use_triton

BLOCK = 64         # queries of a program; keys, for dk and dv
MAX_N = 256        # tokens: a tile of BLOCK x 256 scores in float32 still fits into the registers
MIN_K = 16         # channels: the smallest product of the tensor cores

def attention_ref(q, k, v):
    """The specification."""
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) / q.shape[-1]**0.5
    return scores.softmax(-1).to(v.dtype) @ v

# ---------------------------------------------------------------- Triton
# In each kernel m counts the BLOCK rows of the program, n all N tokens; 1 is the first K1 channels, 2 the K2 of the rest.

@jit
def _rows(X, row, A, stride_b, stride_a, stride_n):
    """Pointers to the given rows of this program's head."""
    head = tl.program_id(1).to(tl.int64)
    return X + head // A * stride_b + head % A * stride_a + row * stride_n

@jit
def _load(at, inside, UP: tl.constexpr):
    x = tl.load(at, inside, 0.0)
    return x if UP is None else x.to(UP)           # tl.dot on bfloat16 is wrong in the interpreter

@jit
def _forward(Q, KEYS, V, OUT, A, qb, qa, qn, kb, ka, kn, vb, va, vn, SCALE, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr,
             K2: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    m, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_N)[:, None]
    q_, k_, v_ = _rows(Q, m, A, qb, qa, qn), _rows(KEYS, n, A, kb, ka, kn), _rows(V, n, A, vb, va, vn)
    out_ = OUT + (head * N + m) * K
    c = tl.arange(0, K1)[None, :]
    q, k, v = _load(q_ + c, m < N, UP), _load(k_ + c, n < N, UP), _load(v_ + c, n < N, UP)
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
    if K2:
        c2 = K1 + tl.arange(0, K2)[None, :]
        q2, k2 = _load(q_ + c2, (m < N) & (c2 < K), UP), _load(k_ + c2, (n < N) & (c2 < K), UP)
        v2 = _load(v_ + c2, (n < N) & (c2 < K), UP)
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee", out_dtype=ACC)
    s = tl.where(tl.arange(0, BLOCK_N)[None, :] < N, s * SCALE, -float("inf"))
    p = tl.exp(s - tl.max(s, axis=1, keep_dims=True))
    p = (p / tl.sum(p, axis=1, keep_dims=True)).to(v.dtype)
    out = tl.dot(p, v, input_precision="ieee", out_dtype=ACC)
    tl.store(out_ + c, out.to(OUT.dtype.element_ty), m < N)
    if K2:
        out = tl.dot(p, v2, input_precision="ieee", out_dtype=ACC)
        tl.store(out_ + c2, out.to(OUT.dtype.element_ty), (m < N) & (c2 < K))

@jit
def _backward_q(Q, KEYS, V, DOUT, DQ, LSE, DELTA, A, qb, qa, qn, kb, ka, kn, vb, va, vn, SCALE, N: tl.constexpr,
                K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
                UP: tl.constexpr, ACC: tl.constexpr):
    """ds = p * (dp - delta), dp = dout v^T, delta = sum over keys of p * dp;  dq = ds k / sqrt(K)."""
    head = tl.program_id(1).to(tl.int64)
    m, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_N)[:, None]
    q_, k_, v_ = _rows(Q, m, A, qb, qa, qn), _rows(KEYS, n, A, kb, ka, kn), _rows(V, n, A, vb, va, vn)
    at, dout_ = (head * N + m) * K, DOUT + (head * N + m) * K
    c = tl.arange(0, K1)[None, :]
    q, k, v, dout = _load(q_ + c, m < N, UP), _load(k_ + c, n < N, UP), _load(v_ + c, n < N, UP), _load(dout_ + c, m < N, UP)
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee", out_dtype=ACC)
    if K2:
        c2 = K1 + tl.arange(0, K2)[None, :]
        q2, dout2 = _load(q_ + c2, (m < N) & (c2 < K), UP), _load(dout_ + c2, (m < N) & (c2 < K), UP)
        k2, v2 = _load(k_ + c2, (n < N) & (c2 < K), UP), _load(v_ + c2, (n < N) & (c2 < K), UP)
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee", out_dtype=ACC)
        dp = tl.dot(dout2, tl.trans(v2), dp, input_precision="ieee", out_dtype=ACC)
    s = tl.where(tl.arange(0, BLOCK_N)[None, :] < N, s * SCALE, -float("inf"))
    top = tl.max(s, axis=1, keep_dims=True)
    lse = top + tl.log(tl.sum(tl.exp(s - top), axis=1, keep_dims=True))
    p = tl.exp(s - lse)
    delta = tl.sum(p * dp, axis=1, keep_dims=True)
    ds = (p * (dp - delta) * SCALE).to(k.dtype)
    tl.store(LSE + head * N + m, lse, m < N)
    tl.store(DELTA + head * N + m, delta, m < N)
    tl.store(DQ + at + c, tl.dot(ds, k, input_precision="ieee", out_dtype=ACC).to(DQ.dtype.element_ty), m < N)
    if K2:
        dq = tl.dot(ds, k2, input_precision="ieee", out_dtype=ACC)
        tl.store(DQ + at + c2, dq.to(DQ.dtype.element_ty), (m < N) & (c2 < K))

@jit
def _backward_kv(Q, KEYS, V, DOUT, DK, DV, LSE, DELTA, A, qb, qa, qn, kb, ka, kn, vb, va, vn, SCALE, N: tl.constexpr,
                 K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
                 UP: tl.constexpr, ACC: tl.constexpr):
    """The same with keys as rows and queries as columns:  dv = p^T dout,  dk = ds^T q / sqrt(K)."""
    head = tl.program_id(1).to(tl.int64)
    m, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_N)[:, None]
    q_, k_, v_ = _rows(Q, n, A, qb, qa, qn), _rows(KEYS, m, A, kb, ka, kn), _rows(V, m, A, vb, va, vn)
    at, dout_ = (head * N + m) * K, DOUT + (head * N + n) * K
    c = tl.arange(0, K1)[None, :]
    q, k, v, dout = _load(q_ + c, n < N, UP), _load(k_ + c, m < N, UP), _load(v_ + c, m < N, UP), _load(dout_ + c, n < N, UP)
    s = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC)
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee", out_dtype=ACC)
    if K2:
        c2 = K1 + tl.arange(0, K2)[None, :]
        q2, dout2 = _load(q_ + c2, (n < N) & (c2 < K), UP), _load(dout_ + c2, (n < N) & (c2 < K), UP)
        k2, v2 = _load(k_ + c2, (m < N) & (c2 < K), UP), _load(v_ + c2, (m < N) & (c2 < K), UP)
        s = tl.dot(k2, tl.trans(q2), s, input_precision="ieee", out_dtype=ACC)
        dp = tl.dot(v2, tl.trans(dout2), dp, input_precision="ieee", out_dtype=ACC)
    query = tl.arange(0, BLOCK_N)[None, :]
    p = tl.exp(s * SCALE - tl.load(LSE + head * N + query, query < N, float("inf")))      # 0 past the last query
    ds = (p * (dp - tl.load(DELTA + head * N + query, query < N, 0.0)) * SCALE).to(k.dtype)
    p = p.to(k.dtype)
    tl.store(DV + at + c, tl.dot(p, dout, input_precision="ieee", out_dtype=ACC).to(DV.dtype.element_ty), m < N)
    tl.store(DK + at + c, tl.dot(ds, q, input_precision="ieee", out_dtype=ACC).to(DK.dtype.element_ty), m < N)
    if K2:
        dv = tl.dot(p, dout2, input_precision="ieee", out_dtype=ACC)
        tl.store(DV + at + c2, dv.to(DV.dtype.element_ty), (m < N) & (c2 < K))
        dk = tl.dot(ds, q2, input_precision="ieee", out_dtype=ACC)
        tl.store(DK + at + c2, dk.to(DK.dtype.element_ty), (m < N) & (c2 < K))

# ---------------------------------------------------------------- PyTorch operators

def _launch(q, k, v):
    """(q, k, v with contiguous channels, the grid, positional and keyword arguments that the kernels share)."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    (B, A, N, K), K1 = q.shape, power_of_2(q.shape[3] + 1) // 2      # K1: the largest power of two that is not above K
    sizes = dict(N=N, K=K, K1=K1, K2=max(16, power_of_2(K - K1)) if K > K1 else 0, BLOCK=BLOCK, BLOCK_N=max(16, power_of_2(N)))
    return (q, k, v), (-(-N // BLOCK), B * A), (A, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], K**-0.5), dict(
        **sizes, UP=precision(q) if INTERPRETED else None, ACC=precision(q), num_warps=8)

@torch.library.custom_op("davae::attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor")
def _op(q, k, v):
    out = _op_shape(q, k, v)
    qkv, grid, strides, sizes = _launch(q, k, v)
    _forward[grid](*qkv, out, *strides, **sizes)
    return out

@_op.register_fake
def _op_shape(q, k, v):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)

@torch.library.custom_op("davae::attention_backward", mutates_args=(), schema=(
    "(Tensor dout, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)"))
def _op_backward(dout, q, k, v):
    dq, dk, dv = _op_backward_shapes(dout, q, k, v)
    lse, delta = torch.empty(2, *q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    qkv, grid, strides, sizes = _launch(q, k, v)
    dout = dout.contiguous()
    _backward_q[grid](*qkv, dout, dq, lse, delta, *strides, **sizes)
    _backward_kv[grid](*qkv, dout, dk, dv, lse, delta, *strides, **sizes)
    return dq, dk, dv

@_op_backward.register_fake
def _op_backward_shapes(dout, q, k, v):
    return tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))

_op.register_autograd(lambda ctx, dout: _op_backward(dout, *ctx.saved_tensors),
                      setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

def attention(q, k, v):
    """softmax(q k^T / sqrt(K)) v, all (B, A, N, K) of one dtype."""
    if not use_triton(q):
        return attention_ref(q, k, v)
    if not q.shape == k.shape == v.shape or q.shape[2] > MAX_N or q.shape[3] < MIN_K:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: wanted one shape (B, A, N, K) with "
                         f"N <= {MAX_N} and K >= {MIN_K}; for anything else use F.scaled_dot_product_attention")
    return _op(q, k, v)
