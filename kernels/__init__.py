"""What every kernel file needs: when to use Triton, and how to compile without importing Triton before the first launch.

Environment variable KERNELS: `ref`, the default, is plain PyTorch, the specifications, because no kernel has been measured on
a GPU; `triton` is all kernels, on CUDA, on the CPU where they are interpreted (TRITON_INTERPRET=1), on "meta" for counting.
"""
import os

import torch

KERNELS, INTERPRETED = os.environ.get("KERNELS", "ref"), os.environ.get("TRITON_INTERPRET") == "1"
if KERNELS not in ("ref", "triton"):
    raise SystemExit(f"KERNELS={KERNELS!r}: wanted ref or triton")

FLOPS = {}      # of the operators with products in them, from the shapes of their inputs: for torch.utils.flop_counter

def use_triton(x):
    """Whether an operation on x is one of the kernels, see above."""
    return KERNELS == "triton" and (x.is_cuda or x.is_meta or INTERPRETED)

class jit:
    """triton.jit at the first launch; until then `tl` in the kernel's file is only a name."""

    def __init__(self, fn):
        self.fn, self.compiled = fn, None

    def compile(self):
        if self.compiled is None:
            os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")             # fused multiply-adds; Triton 3.9 warns if unset
            import triton
            names = self.fn.__globals__
            names["tl"] = triton.language
            for name in set(self.fn.__code__.co_names) & names.keys():
                if isinstance(names[name], jit):               # a function that this kernel calls
                    names[name] = names[name].compile()
            self.compiled = triton.jit(self.fn)
        return self.compiled

    def __getitem__(self, grid):
        return self.compile()[grid]

def operator(schema, shapes):
    """Decorator: fill(*outputs, *inputs) becomes torch.ops.davae.<schema>; shapes(*inputs) makes the outputs, empty."""
    def register(fill):
        def run(*inputs):
            out = shapes(*inputs)
            fill(*(out if isinstance(out, tuple) else (out,)), *inputs)
            return out
        name, _, rest = schema.partition("(")
        op = torch.library.custom_op(f"davae::{name}", run, mutates_args=(), schema=f"({rest}")
        op.register_fake(shapes)
        return op
    return register

def power_of_2(n):
    """The smallest power of two that is not below n: what tl.arange can count."""
    return 1 << (n - 1).bit_length()

def precision(*tensors):
    """The dtype kernels compute in: float32, or float64 if any tensor is (gradcheck)."""
    import triton.language as tl
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32

def cost(model, inputs):
    """(FLOPs of a forward pass, of a forward and backward pass, numbers kept for the backward pass but no parameters).

    Counted, 2 per multiply-add, by running `model(*inputs)`; on the meta device that takes neither memory nor time.
    """
    from torch.utils.flop_counter import FlopCounterMode           # here, because it imports triton
    kept = {}
    forward, backward = (FlopCounterMode(display=False, custom_mapping=FLOPS) for _ in range(2))
    keep = lambda x: (x, kept.update({x.untyped_storage()._cdata: x.numel()}))[0]             # noqa: E731
    with forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        v = model.train()(*inputs)
    with backward:
        v.sum().backward()
    for p in model.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
        p.grad = None
    forward, backward = forward.get_total_flops(), backward.get_total_flops()
    return forward, forward + backward, sum(kept.values())
