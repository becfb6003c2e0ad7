"""Attention over a short sequence, from the output of the qkv Linear to the input of the next: one kernel, no copies.

    q, k = norm and rotation of each head, as in qknorm_rope.py;    out = softmax(q k^T / sqrt(K)) v,    N <= 256 tokens

All keys and values of a head stay on the chip, so no running softmax is needed. Libraries pad K = 72, LightningDiT-XL's head
width, to 96 or 128. Here a width is split into a power of two and the rest, 64 + 16 (of which 8 are zeros): each product over
K becomes two, and 72 costs as much as 80.
Shapes:    qkv (B, N, 3, A, K), any strides with the last one 1;  weights (K,) or None;  cos, sin (N, K) float32 or None
           ->  out (B, N, A, K)
Used by:   dit.attention, for LightningDiT's 256 tokens; others take qknorm_rope and scaled_dot_product_attention.
Rounding:  q, k once, after the rotation; scores and softmax in float32; the probabilities to v's dtype for the second product.
Bytes, U = B*N*A*K elements:
    forward   read q, k, v, write out: 4 U; nothing else is kept for the backward. Separate operations: 10 U
    backward  first for blocks of queries: reads q, k, v, dout, writes dq and three numbers per query; then for blocks of keys:
              reads the same, writes dk, dv: 11 U, if a head's blocks find its tensors in the cache.
              Separate operations: 25 U
Norm and rotation are computed again for each block that needs them: 2 to 4 % of the arithmetic of its products.
Measured:  not run on a GPU. As compiled for Hopper in bfloat16 (Triton 3.9, K = 72, N = 256, no norm), the forward takes 192
           registers in 4 warps, so that two programs share a multiprocessor; the backward takes all 255 in 8 warps and keeps
           0.2 (queries) and 0.3 kB (keys) per thread in local memory.
"""
from __future__ import annotations

import torch

from kernels import FLOPS, INTERPRETED, jit, operator, power_of_2, precision, use_triton
from kernels.qknorm_rope import EPS, qknorm_rope_ref, rotate, rotate_back

BLOCK = 64         # queries of a program; keys, for dk and dv
MAX_N = 256        # tokens: a tile of BLOCK x 256 scores in float32 still fits into the registers
MIN_K = 17         # channels: both parts are at least 16, the smallest product of the tensor cores

def attention_ref(qkv, q_weight=None, k_weight=None, cos=None, sin=None):
    """The specification."""
    q, k, v = qknorm_rope_ref(qkv, q_weight, k_weight, cos, sin)                          # (B, A, N, K)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) / q.shape[-1]**0.5
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)

# ---------------------------------------------------------------- Triton
# In each kernel m counts the BLOCK rows of the program, n all N tokens; 1 is the first K1 channels, 2 the K2 of the rest.

@jit
def _head(X, part, A, stride_b, stride_part, stride_a):
    """Where q (part 0), k (1) or v (2) of this program's head begins."""
    head = tl.program_id(1).to(tl.int64)
    return X + head // A * stride_b + part * stride_part + head % A * stride_a

@jit
def _load(X, row, stride, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, UP: tl.constexpr):
    """Both parts of the channels of the given rows, zeros outside."""
    c1, c2 = tl.arange(0, K1)[None, :], K1 + tl.arange(0, K2)[None, :]
    x1 = tl.load(X + row * stride + c1, row < N, 0.0)
    x2 = tl.load(X + row * stride + c2, (row < N) & (c2 < K), 0.0)
    if UP is not None:                             # tl.dot on bfloat16 is wrong in the interpreter
        x1, x2 = x1.to(UP), x2.to(UP)
    return x1, x2

@jit
def _store(X, row, stride, x1, x2, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr):
    c1, c2 = tl.arange(0, K1)[None, :], K1 + tl.arange(0, K2)[None, :]
    tl.store(X + row * stride + c1, x1.to(X.dtype.element_ty), row < N)
    tl.store(X + row * stride + c2, x2.to(X.dtype.element_ty), (row < N) & (c2 < K))

@jit
def _dot(a1, a2, b1, b2, ACC: tl.constexpr):
    """a b^T, over all channels."""
    s = tl.dot(a1, tl.trans(b1), input_precision="ieee", out_dtype=ACC)
    return tl.dot(a2, tl.trans(b2), s, input_precision="ieee", out_dtype=ACC)

@jit
def _times(p, x1, x2, ACC: tl.constexpr):
    """p x, both parts of the channels."""
    x1 = tl.dot(p, x1, input_precision="ieee", out_dtype=ACC)
    return x1, tl.dot(p, x2, input_precision="ieee", out_dtype=ACC)

@jit
def _load_qk(X, row, stride, WEIGHT, COS, SIN, ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr,
                 K2: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, UP: tl.constexpr,
                 ACC: tl.constexpr):
    """Rows of q or k, normalised and rotated."""
    x1, x2 = _load(X, row, stride, N, K, K1, K2, UP)
    u1, u2 = x1.to(ACC), x2.to(ACC)
    if NORM:
        w1, w2 = _load(WEIGHT, 0 * row, 0, N, K, K1, K2, ACC)
        r = tl.rsqrt((tl.sum(u1 * u1, axis=1, keep_dims=True) + tl.sum(u2 * u2, axis=1, keep_dims=True)) / K + EPS)
        u1, u2 = u1 * r * w1, u2 * r * w2
    if ROPE:
        cos1, cos2 = _load(COS, row, K, N, K, K1, K2, ACC)
        sin1, sin2 = _load(SIN, row, K, N, K, K1, K2, ACC)
        u1, u2 = rotate(u1, cos1, sin1, ROWS, K1), rotate(u2, cos2, sin2, ROWS, K2)
    return u1.to(x1.dtype), u2.to(x2.dtype)

@jit
def _store_qk(DX, dx1, dx2, X, row, dstride, stride, WEIGHT, DWEIGHT, COS, SIN, ROWS: tl.constexpr, N: tl.constexpr,
              K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
              ACC: tl.constexpr):
    """Gradients of such rows, back through rotation and norm, and for the norm's weight the sum over them of du * n."""
    if ROPE:
        cos1, cos2 = _load(COS, row, K, N, K, K1, K2, ACC)
        sin1, sin2 = _load(SIN, row, K, N, K, K1, K2, ACC)
        dx1, dx2 = rotate_back(dx1, cos1, sin1, ROWS, K1), rotate_back(dx2, cos2, sin2, ROWS, K2)
    if NORM:
        n1, n2 = _load(X, row, stride, N, K, K1, K2, ACC)
        w1, w2 = _load(WEIGHT, 0 * row, 0, N, K, K1, K2, ACC)
        r = tl.rsqrt((tl.sum(n1 * n1, axis=1, keep_dims=True) + tl.sum(n2 * n2, axis=1, keep_dims=True)) / K + EPS)
        n1, n2 = n1 * r, n2 * r
        part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0) + tl.zeros((1, 1), tl.int32)
        dw1, dw2 = tl.sum(dx1 * n1, axis=0, keep_dims=True), tl.sum(dx2 * n2, axis=0, keep_dims=True)
        _store(DWEIGHT + part * K, 0 * part, 0, dw1, dw2, N, K, K1, K2)
        dx1, dx2 = dx1 * w1, dx2 * w2
        mean = (tl.sum(dx1 * n1, axis=1, keep_dims=True) + tl.sum(dx2 * n2, axis=1, keep_dims=True)) / K
        dx1, dx2 = r * (dx1 - n1 * mean), r * (dx2 - n2 * mean)
    _store(DX, row, dstride, dx1, dx2, N, K, K1, K2)

@jit
def _forward(QKV, Q_WEIGHT, K_WEIGHT, COS, SIN, OUT, SCALE, sb, sn: tl.constexpr, s3: tl.constexpr, sa: tl.constexpr,
             A: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, BLOCK: tl.constexpr,
             BLOCK_N: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, UP: tl.constexpr,
             ACC: tl.constexpr):
    m, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_N)[:, None]
    q_, k_, v_ = _head(QKV, 0, A, sb, s3, sa), _head(QKV, 1, A, sb, s3, sa), _head(QKV, 2, A, sb, s3, sa)
    q1, q2 = _load_qk(q_, m, sn, Q_WEIGHT, COS, SIN, BLOCK, N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)
    k1, k2 = _load_qk(k_, n, sn, K_WEIGHT, COS, SIN, BLOCK_N, N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)
    v1, v2 = _load(v_, n, sn, N, K, K1, K2, UP)
    s = _dot(q1, q2, k1, k2, ACC)
    s = tl.where(tl.arange(0, BLOCK_N)[None, :] < N, s * SCALE, -float("inf"))
    p = tl.exp(s - tl.max(s, axis=1, keep_dims=True))
    p = (p / tl.sum(p, axis=1, keep_dims=True)).to(v1.dtype)
    out1, out2 = _times(p, v1, v2, ACC)
    _store(_head(OUT, 0, A, N * A * K, 0, K), m, A * K, out1, out2, N, K, K1, K2)

@jit
def _backward(QKV, Q_WEIGHT, K_WEIGHT, COS, SIN, DOUT, DQKV, DWEIGHT, TOP, PART, DELTA, SCALE, sb, sn: tl.constexpr,
              s3: tl.constexpr, sa: tl.constexpr, A: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K1: tl.constexpr,
              K2: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr,
              ROPE: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr, KEYS: tl.constexpr):
    """ds = p * (dp - delta), dp = dout v^T, delta = sum over keys of p * dp. Without KEYS, rows are queries:
    dq = ds k / sqrt(K). With KEYS, they are keys, and all is transposed:  dv = p^T dout,  dk = ds^T q / sqrt(K)."""
    m, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_N)[:, None]
    head, column = tl.program_id(1).to(tl.int64) * N, tl.arange(0, BLOCK_N)[None, :]
    q_, k_, v_ = _head(QKV, 0, A, sb, s3, sa), _head(QKV, 1, A, sb, s3, sa), _head(QKV, 2, A, sb, s3, sa)
    size = A * K                                   # of a row of dout; dqkv's are three times that
    dout_, dq_ = _head(DOUT, 0, A, N * size, 0, K), _head(DQKV, 0, A, 3 * N * size, size, K)
    dk_, dv_ = _head(DQKV, 1, A, 3 * N * size, size, K), _head(DQKV, 2, A, 3 * N * size, size, K)
    queries, keys = n if KEYS else m, m if KEYS else n
    MANY_Q: tl.constexpr = BLOCK_N if KEYS else BLOCK
    MANY_K: tl.constexpr = BLOCK if KEYS else BLOCK_N
    q1, q2 = _load_qk(q_, queries, sn, Q_WEIGHT, COS, SIN, MANY_Q, N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)
    k1, k2 = _load_qk(k_, keys, sn, K_WEIGHT, COS, SIN, MANY_K, N, K, K1, K2, EPS, NORM, ROPE, UP, ACC)
    v1, v2 = _load(v_, keys, sn, N, K, K1, K2, UP)
    dout1, dout2 = _load(dout_, queries, size, N, K, K1, K2, UP)
    if KEYS:
        s, dp = _dot(k1, k2, q1, q2, ACC), _dot(v1, v2, dout1, dout2, ACC)
        s = tl.where(m < N, s * SCALE, -float("inf"))
        p = tl.exp(s - tl.load(TOP + head + column, column < N, float("inf")))            # 0 past the last query, and key
        p = p * tl.load(PART + head + column, column < N, 0.0)
        ds = (p * (dp - tl.load(DELTA + head + column, column < N, 0.0)) * SCALE).to(k1.dtype)
        dv1, dv2 = _times(p.to(k1.dtype), dout1, dout2, ACC)
        _store(dv_, m, 3 * size, dv1, dv2, N, K, K1, K2)
        dk1, dk2 = _times(ds, q1, q2, ACC)
        _store_qk(dk_, dk1, dk2, k_, m, 3 * size, sn, K_WEIGHT, DWEIGHT, COS, SIN, BLOCK, N, K, K1, K2, EPS, NORM, ROPE, ACC)
    else:
        s, dp = _dot(q1, q2, k1, k2, ACC), _dot(dout1, dout2, v1, v2, ACC)
        s = tl.where(column < N, s * SCALE, -float("inf"))
        top = tl.max(s, axis=1, keep_dims=True)
        p = tl.exp(s - top)
        part = 1 / tl.sum(p, axis=1, keep_dims=True)
        p = p * part
        delta = tl.sum(p * dp, axis=1, keep_dims=True)
        ds = (p * (dp - delta) * SCALE).to(k1.dtype)
        tl.store(TOP + head + m, top, m < N)
        tl.store(PART + head + m, part, m < N)     # log(sum(exp(s))) instead would cost float32 two of its digits
        tl.store(DELTA + head + m, delta, m < N)
        dq1, dq2 = _times(ds, k1, k2, ACC)
        _store_qk(dq_, dq1, dq2, q_, m, 3 * size, sn, Q_WEIGHT, DWEIGHT, COS, SIN, BLOCK, N, K, K1, K2, EPS, NORM, ROPE, ACC)

# ---------------------------------------------------------------- PyTorch operators

def _launch(qkv, q_weight, k_weight, cos, sin):
    """(grid, tensors, numbers, keyword arguments), what the kernels share; qkv stands in for what is None."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    (B, N, _, A, K), tables = qkv.shape, [qkv if t is None else t.contiguous() for t in (q_weight, k_weight, cos, sin)]
    K1 = power_of_2(K) // 2                        # the largest power of two below K
    sizes = dict(A=A, N=N, K=K, K1=K1, K2=max(16, power_of_2(K - K1)), BLOCK=BLOCK, BLOCK_N=max(16, power_of_2(N)), EPS=EPS)
    kind = dict(NORM=q_weight is not None, ROPE=cos is not None, UP=precision(qkv) if INTERPRETED else None, ACC=precision(qkv))
    strides = dict(zip(("sn", "s3", "sa"), qkv.stride()[1:]))                             # compiled in, see qknorm_rope.py
    return (-(-N // BLOCK), B * A), (qkv, *tables), (K**-0.5, qkv.stride(0)), dict(**strides, **sizes, **kind)

def _shape(qkv, q_weight, k_weight, cos, sin):
    return qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:])

@operator("attention(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin) -> Tensor", _shape)
def _op(out, *inputs):
    grid, tensors, numbers, sizes = _launch(*inputs)
    _forward[grid](*tensors, out, *numbers, **sizes, num_warps=4)

def _backward_shapes(dout, qkv, q_weight, k_weight, cos, sin):
    """dqkv (B, N, 3, A, K), and the gradients of both weights, (2, K) float32, empty if there are none."""
    dqkv = qkv.new_empty(qkv.shape)
    K, dtype = 0 if q_weight is None else qkv.shape[-1], torch.promote_types(qkv.dtype, torch.float32)
    return dqkv, dqkv.new_empty(2, K, dtype=dtype)

@operator("attention_backward(Tensor dout, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin)"
          " -> (Tensor, Tensor)", _backward_shapes)
def _op_backward(dqkv, dweights, dout, *inputs):
    (grid, tensors, numbers, sizes), (B, N, _, A, K), new = _launch(*inputs), dqkv.shape, dweights.new_empty
    stats, partial = new(3, B, A, N), new(2, B * A * grid[0], K) if sizes["NORM"] else new(2, 0)
    for keys in (0, 1):                            # the first leaves the statistics to the second
        _backward[grid](*tensors, dout.contiguous(), dqkv, partial[keys], *stats, *numbers, KEYS=keys, **sizes, num_warps=8)
    if sizes["NORM"]:
        torch.sum(partial, 1, out=dweights)

def _grads(ctx, dout):
    dqkv, dweights = _op_backward(dout, *ctx.saved_tensors)
    return dqkv, *(None if w is None else d.to(w.dtype) for w, d in zip(ctx.saved_tensors[1:3], dweights)), None, None

_op.register_autograd(_grads, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

# Two products forward, four backward; scores that are computed again are not counted, as PyTorch does not count its own.
FLOPS[torch.ops.davae.attention] = lambda qkv, *_, **__: 4 * qkv[0] * qkv[1]**2 * qkv[3] * qkv[4]
FLOPS[torch.ops.davae.attention_backward] = lambda _, qkv, *__, **___: 8 * qkv[0] * qkv[1]**2 * qkv[3] * qkv[4]

def attention(qkv, q_weight=None, k_weight=None, cos=None, sin=None):
    """softmax(q k^T / sqrt(K)) v of the normalised and rotated q and k: (B, N, 3, A, K) -> (B, N, A, K)."""
    if not use_triton(qkv):
        return attention_ref(qkv, q_weight, k_weight, cos, sin)
    if qkv.shape[1] > MAX_N or qkv.shape[4] < MIN_K:
        raise ValueError(f"qkv is {tuple(qkv.shape)}, wanted (B, N, 3, A, K) with N <= {MAX_N} and K >= {MIN_K}; for anything "
                         f"else use qknorm_rope and F.scaled_dot_product_attention")
    return _op(qkv, q_weight, k_weight, cos, sin)
