"""What every kernel file needs: when to use Triton, and how to compile without importing Triton before the first launch."""
import os

import torch


def use_triton(x):
    """On CUDA, or on the CPU where Triton interprets its kernels (TRITON_INTERPRET=1).  KERNELS=ref: never."""
    return os.environ.get("KERNELS") != "ref" and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")



class jit:
    """triton.jit at the first launch; until then `tl` in the kernel's file is only a name."""

    def __init__(self, fn):
        self.fn, self.compiled = fn, None

    def __getitem__(self, grid):
        if self.compiled is None:
            import triton
            import triton.language as tl
            self.fn.__globals__["tl"] = tl
            self.compiled = triton.jit(self.fn)
        return self.compiled[grid]


def power_of_2(n):
    """The smallest power of two that is not below n: what tl.arange can count."""
    return 1 << (n - 1).bit_length()


def precision(*tensors):
    """The dtype kernels compute in: float32, or float64 if any tensor is (gradcheck)."""
    import triton.language as tl
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32
