"""What every kernel file needs: when to use Triton, and how to compile without importing Triton before the first launch.

Environment variable KERNELS: `ref`, the default, is plain PyTorch, the specifications, because no kernel has been measured on
a GPU; `triton` is all kernels, on CUDA, on the CPU where they are interpreted (TRITON_INTERPRET=1), on "meta" for counting.
Counted: a block of LightningDiT then moves 96.7 U (goal: 70) in 58 operators (goal: 40); see tests/test_kernels.py.
"""
import os

import torch

KERNELS, INTERPRETED = os.environ.get("KERNELS", "ref"), os.environ.get("TRITON_INTERPRET") == "1"
if KERNELS not in ("ref", "triton"):
    raise SystemExit(f"KERNELS={KERNELS!r}: wanted ref or triton")

def use_triton(x):
    """Whether an operation on x is one of the kernels, see above."""
    return KERNELS == "triton" and (x.is_cuda or x.is_meta or INTERPRETED)

class jit:
    """triton.jit at the first launch; until then `tl` in the kernel's file is only a name."""

    def __init__(self, fn):
        self.fn, self.compiled = fn, None

    def compile(self):
        if self.compiled is None:
            import triton
            names = self.fn.__globals__
            names["tl"] = triton.language
            for name in set(self.fn.__code__.co_names) & {k for k, v in names.items() if isinstance(v, jit)}:
                names[name] = names[name].compile()            # a function that this kernel calls
            self.compiled = triton.jit(self.fn)
        return self.compiled

    def __getitem__(self, grid):
        return self.compile()[grid]

def power_of_2(n):
    """The smallest power of two that is not below n: what tl.arange can count."""
    return 1 << (n - 1).bit_length()

def precision(*tensors):
    """The dtype kernels compute in: float32, or float64 if any tensor is (gradcheck)."""
    import triton.language as tl
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32
