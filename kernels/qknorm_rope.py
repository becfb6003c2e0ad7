"""QK-norm and rotary embedding, read straight from the output of the qkv Linear and written as attention wants it.

    u = norm(x) = weight * x / sqrt(mean(x^2) + eps)            over the K channels of a head; left out if weight is None
    (a, b) -> (a cos - b sin, b cos + a sin)                    on each pair of adjacent channels of u

Shapes:    qkv (B, L, 3, A, K), any strides with the last one 1;  weights (K,);  cos, sin (L, K) float32
           -> q, k, v (B, A, L, K);  q and k are written anew, v is a view of qkv
Replaces:  dit.Attention.heads after the Linear: RMSNorm twice, dit.rope twice, and the casts back to qkv's dtype.
Rounding:  once, at the end; the norm's result stays in float32 between norm and rotation.
Bytes, U = B*L*A*K elements:
    forward   reads q, k from qkv, writes q, k: 4 U. Separate PyTorch operations: about 30 U
    backward  reads q, k, dq, dk, writes dq, dk: 6 U; autograd then stacks dq, dk, dv into dqkv: 6 U more, a copy at full
              bandwidth. The gradients of the norms' weights are summed in the same pass.
Measured:  not run on a GPU.
"""
from __future__ import annotations

import torch

from kernels import jit, power_of_2, precision, use_triton

EPS = 1e-6
TOKENS = 8         # per program of the backward: one partial sum of K float32 for every TOKENS*A*K elements


def norm_rope_ref(x, weight, cos, sin):
    """The specification for q or k: (B, L, A, K) -> (B, A, L, K)."""
    u = x.transpose(1, 2)
    if weight is not None:
        u = u.to(torch.promote_types(x.dtype, torch.float32))
        u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS)
        u = u.to(x.dtype) * weight
    a, b = u.unflatten(-1, (-1, 2)).unbind(-1)
    return (u * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin).to(x.dtype)


def qknorm_rope_ref(qkv, q_weight, k_weight, cos, sin):
    """The specification.  -> q, k, v"""
    q, k, v = qkv.unbind(2)
    return norm_rope_ref(q, q_weight, cos, sin), norm_rope_ref(k, k_weight, cos, sin), v.transpose(1, 2)


# ---------------------------------------------------------------- Triton


@jit
def _forward(X, WEIGHT, COS, SIN, OUT, L, stride_b, stride_l, stride_a,
             A: tl.constexpr, K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr, EPS: tl.constexpr,
             NORM: tl.constexpr, ACC: tl.constexpr):
    """All heads of one token: a tile of BLOCK_A x BLOCK_K, both rounded up to powers of two."""
    b, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, k = tl.arange(0, BLOCK_A)[:, None], tl.arange(0, BLOCK_K)[None, :]
    inside = (a < A) & (k < K)
    u = tl.load(X + b * stride_b + row * stride_l + a * stride_a + k, inside, 0.0).to(ACC)
    if NORM:
        r = tl.rsqrt(tl.sum(u * u, axis=1, keep_dims=True) / K + EPS)
        u = u * r * tl.load(WEIGHT + k, k < K, 0.0).to(ACC)
    cos = tl.load(COS + row * K + k, k < K, 0.0).to(ACC)
    sin = tl.load(SIN + row * K + k, k < K, 0.0).to(ACC)
    even, odd = tl.split(tl.reshape(u, (BLOCK_A, BLOCK_K // 2, 2)))
    u = u * cos + tl.reshape(tl.join(-odd, even), (BLOCK_A, BLOCK_K)) * sin
    tl.store(OUT + ((b * A + a) * L + row) * K + k, u.to(OUT.dtype.element_ty), inside)


@jit
def _backward(DOUT, X, WEIGHT, COS, SIN, DX, DWEIGHT, L, stride_b, stride_l, stride_a,
              A: tl.constexpr, K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS: tl.constexpr,
              EPS: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """All heads of TOKENS tokens, one after the other: their dx, and the sum over them of du * n for dweight."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, k = tl.arange(0, BLOCK_A)[:, None], tl.arange(0, BLOCK_K)[None, :]
    if NORM:
        weight = tl.load(WEIGHT + k, k < K, 0.0).to(ACC)
        dweight = tl.zeros((1, BLOCK_K), ACC)
    for i in range(TOKENS):
        row = part * TOKENS + i
        width = tl.where(row < L, K, 0)            # nothing is read or written past the last token
        inside = (a < A) & (k < width)
        cos = tl.load(COS + row * K + k, k < width, 0.0).to(ACC)
        sin = tl.load(SIN + row * K + k, k < width, 0.0).to(ACC)
        du = tl.load(DOUT + ((b * A + a) * L + row) * K + k, inside, 0.0).to(ACC)
        even, odd = tl.split(tl.reshape(du * sin, (BLOCK_A, BLOCK_K // 2, 2)))
        du = du * cos + tl.reshape(tl.join(odd, -even), (BLOCK_A, BLOCK_K))       # the rotation, transposed
        if NORM:
            n = tl.load(X + b * stride_b + row * stride_l + a * stride_a + k, inside, 0.0).to(ACC)
            r = tl.rsqrt(tl.sum(n * n, axis=1, keep_dims=True) / K + EPS)
            n = n * r
            dweight += tl.sum(du * n, axis=0, keep_dims=True)
            dn = du * weight
            du = r * (dn - n * (tl.sum(dn * n, axis=1, keep_dims=True) / K))
        tl.store(DX + ((b * L + row) * A + a) * K + k, du.to(DX.dtype.element_ty), inside)
    if NORM:
        tl.store(DWEIGHT + (b * tl.num_programs(1) + part) * K + k, dweight, k < K)


# ---------------------------------------------------------------- PyTorch operators


def _last_contiguous(x):
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("davae::norm_rope", mutates_args=(), schema=(
    "(Tensor x, Tensor? weight, Tensor cos, Tensor sin) -> Tensor"))
def _op(x, weight, cos, sin):
    B, L, A, K = x.shape
    x, out = _last_contiguous(x), _op_shape(x, weight, cos, sin)
    _forward[(B, L)](
        x, cos if weight is None else weight.contiguous(), cos.contiguous(), sin.contiguous(), out, L, *x.stride()[:3],
        A=A, K=K, BLOCK_A=power_of_2(A), BLOCK_K=power_of_2(K), EPS=EPS, NORM=weight is not None, ACC=precision(x))
    return out


@_op.register_fake
def _op_shape(x, weight, cos, sin):
    B, L, A, K = x.shape
    return torch.empty(B, A, L, K, dtype=x.dtype, device=x.device)


@torch.library.custom_op("davae::norm_rope_backward", mutates_args=(), schema=(
    "(Tensor dout, Tensor x, Tensor? weight, Tensor cos, Tensor sin) -> (Tensor, Tensor)"))
def _op_backward(dout, x, weight, cos, sin):
    B, L, A, K = x.shape
    x, (dx, dweight) = _last_contiguous(x), _op_backward_shapes(dout, x, weight, cos, sin)
    partial = dweight.new_empty(B, -(-L // TOKENS), K)
    _backward[tuple(partial.shape[:2])](
        dout.contiguous(), x, cos if weight is None else weight.contiguous(), cos.contiguous(), sin.contiguous(), dx, partial,
        L, *x.stride()[:3], A=A, K=K, BLOCK_A=power_of_2(A), BLOCK_K=power_of_2(K), TOKENS=TOKENS, EPS=EPS,
        NORM=weight is not None, ACC=precision(x))
    if weight is not None:
        torch.sum(partial, (0, 1), out=dweight)
    return dx, dweight


@_op_backward.register_fake
def _op_backward_shapes(dout, x, weight, cos, sin):
    """dx (B, L, A, K) and dweight (K,) in float32, empty without a weight."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, dx.new_empty(0 if weight is None else x.shape[3], dtype=torch.promote_types(x.dtype, torch.float32))


def _save(ctx, inputs, output):
    x, weight, cos, sin = inputs
    ctx.save_for_backward(x, weight, cos, sin)


def _grads(ctx, dout):
    x, weight, cos, sin = ctx.saved_tensors
    dx, dweight = _op_backward(dout, x, weight, cos, sin)
    return dx, None if weight is None else dweight.to(weight.dtype), None, None


_op.register_autograd(_grads, setup_context=_save)


def qknorm_rope(qkv, q_weight, k_weight, cos, sin):
    """(B, L, 3, A, K) -> q, k, v, each (B, A, L, K), q and k normalised (unless their weight is None) and rotated."""
    if not use_triton(qkv):
        return qknorm_rope_ref(qkv, q_weight, k_weight, cos, sin)
    q, k, v = qkv.unbind(2)
    return _op(q, q_weight, cos, sin), _op(k, k_weight, cos, sin), v.transpose(1, 2)
