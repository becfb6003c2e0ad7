"""SwiGLU, with the bias of the linear layer before it: everything between the two matrix products of LightningDiT's MLP.

    [a, b] = x weight^T + bias,    out = SiLU(a) * b,    SiLU(a) = a * sigmoid(a)

The product is the library's. Its bias moves into the kernel, because the gradient of a bias is a sum over all tokens of what
the backward has just computed: it is summed there, instead of being read again.
Shapes:    x (..., E), weight (2 H, E), bias (2 H,), the upper half for b  ->  out (..., H)
Used by:   dit.SwiGLU (Shazeer, 2020).
Rounding:  the product is rounded to its dtype (under autocast bfloat16), all else stays in float32 until out is rounded.
Bytes, U = tokens * E elements, H = 8/3 E:
    forward   read the product, write out: 8 U. Separate PyTorch operations: 13 U
    backward  read the product and dout, write the product's gradient: 13 U; separate operations, with the bias': 40 U
Measured:  not run on a GPU.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import jit, operator, power_of_2, precision, use_triton

ROWS = 64          # tokens per program of the backward, ROWS_AT_ONCE of them in registers: its sums cost 3 % of the bytes
ROWS_AT_ONCE = 8
COLUMNS = 256      # of H, in both kernels

def swiglu_ref(x, weight, bias):
    """The specification."""
    a, b = F.linear(x, weight, bias).chunk(2, dim=-1)
    return F.silu(a) * b

# ---------------------------------------------------------------- Triton

@jit
def _forward(AB, BIAS, OUT, N, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """ROWS tokens times COLUMNS channels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < N) & (h < H)
    a = tl.load(AB + row * (2 * H) + h, inside, 0.0).to(ACC) + tl.load(BIAS + h, h < H, 0.0).to(ACC)
    b = tl.load(AB + row * (2 * H) + H + h, inside, 0.0).to(ACC) + tl.load(BIAS + H + h, h < H, 0.0).to(ACC)
    tl.store(OUT + row * H + h, (a / (1 + tl.exp(-a)) * b).to(OUT.dtype.element_ty), inside)

@jit
def _backward(DOUT, AB, BIAS, DAB, SUMS, N, H: tl.constexpr, ROWS: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
              COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """ROWS tokens times COLUMNS channels: their da and db, and the sums over them."""
    part = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bias_a, bias_b = tl.load(BIAS + h, h < H, 0.0).to(ACC), tl.load(BIAS + H + h, h < H, 0.0).to(ACC)
    sum_da, sum_db = tl.zeros((1, COLUMNS), ACC), tl.zeros((1, COLUMNS), ACC)
    for i in range(0, ROWS, ROWS_AT_ONCE):
        row = part * ROWS + i + tl.arange(0, ROWS_AT_ONCE)[:, None]
        inside = (row < N) & (h < H)
        a = tl.load(AB + row * (2 * H) + h, inside, 0.0).to(ACC) + bias_a
        b = tl.load(AB + row * (2 * H) + H + h, inside, 0.0).to(ACC) + bias_b
        dout = tl.load(DOUT + row * H + h, inside, 0.0).to(ACC)                        # 0 outside, and so are da and db
        s = 1 / (1 + tl.exp(-a))
        da = dout * b * s * (1 + a * (1 - s))
        db = dout * a * s
        tl.store(DAB + row * (2 * H) + h, da.to(DAB.dtype.element_ty), inside)
        tl.store(DAB + row * (2 * H) + H + h, db.to(DAB.dtype.element_ty), inside)
        sum_da += tl.sum(da, axis=0, keep_dims=True)
        sum_db += tl.sum(db, axis=0, keep_dims=True)
    tl.store(SUMS + part * (2 * H) + h, sum_da, h < H)
    tl.store(SUMS + part * (2 * H) + H + h, sum_db, h < H)

# ---------------------------------------------------------------- PyTorch operators

def _tiles(ab):
    """(number of tokens, the grid for a given number of rows a program, what both kernels share)"""
    H, N = ab.shape[-1] // 2, ab.numel() // ab.shape[-1]
    columns = min(COLUMNS, power_of_2(H))
    return N, lambda rows: (-(-N // rows), -(-H // columns)), dict(H=H, COLUMNS=columns, ACC=precision(ab))

def _shape(ab, bias):
    return ab.new_empty(*ab.shape[:-1], ab.shape[-1] // 2)

@operator("swiglu(Tensor ab, Tensor bias) -> Tensor", _shape)
def _op(out, ab, bias):
    N, grid, same = _tiles(ab)
    _forward[grid(ROWS_AT_ONCE)](ab.contiguous(), bias.contiguous(), out, N, ROWS=ROWS_AT_ONCE, **same)

def _backward_shapes(dout, ab, bias):
    return ab.new_empty(ab.shape), bias.new_empty(bias.shape)

@operator("swiglu_backward(Tensor dout, Tensor ab, Tensor bias) -> (Tensor, Tensor)", _backward_shapes)
def _op_backward(dab, dbias, dout, ab, bias):
    N, grid, same = _tiles(ab)
    sums = torch.empty(grid(ROWS)[0], ab.shape[-1], dtype=torch.promote_types(ab.dtype, torch.float32), device=ab.device)
    tensors = dout.contiguous(), ab.contiguous(), bias.contiguous(), dab, sums
    _backward[grid(ROWS)](*tensors, N, ROWS=ROWS, ROWS_AT_ONCE=ROWS_AT_ONCE, **same)
    dbias.copy_(sums.sum(0))

_op.register_autograd(lambda ctx, dout: _op_backward(dout, *ctx.saved_tensors),
                      setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

def swiglu(x, weight, bias):
    """SiLU(a) * b with [a, b] = x weight^T + bias: (..., E) -> (..., H)."""
    if not use_triton(x):
        return swiglu_ref(x, weight, bias)
    return _op(F.linear(x, weight), bias)
