"""Attention, by the fastest of PyTorch's backends, see choose.py.

    out = softmax(q k^T / sqrt(K)) v

Shapes:    q, k, v (B, A, N, K), any strides with the last one 1  ->  out (B, N, A, K)
Used by:   dit.Attention, dit.JointBlock, after qknorm_rope.py; davae.AttnBlock.
Measured:  128 x 16 heads of 72, 256 tokens, H200, bfloat16, graphs of ten calls (2026-11-26): cuDNN 151 us,
           with its backward 757; flash 252 and 1,157 us. A kernel of our own, with norm and rotation inside
           it, took 465 us, and 1.8 ms for the backward alone: slower than qknorm_rope.py and then cuDNN (253
           us, 0.91 ms), so there is none; see LOG.md
"""
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import operation


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
