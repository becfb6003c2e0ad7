"""Shared by all kernel files: which variant computes an operation, and how not to import Triton too early.

Environment variable KERNELS:
    auto      the default. On CUDA, before a model is trained or sampled from, each operation is tried once at
              the model's sizes, and the fastest correct variant is used from then on: choose.py.
              Operations that were not tried, and everything on a CPU, run in plain PyTorch
    ref       plain PyTorch, the specifications
    triton    all kernels, untried: on CUDA; on the CPU, where they are interpreted (TRITON_INTERPRET=1); on
              "meta", where they are only counted

How to read a kernel. It is one short function that a GPU runs thousands of times in parallel. Each run, a
"program", finds out which part of the result it owns, loads the inputs of that part, computes, and stores:

    row = tl.program_id(0)                which program this is
    e = tl.arange(0, BLOCK)               a "tile", the indices 0 .. BLOCK - 1; its sides are powers of two
    inside = e < E                        its mask: which of these indices exist in the tensor
    at = row * E + e                      their offsets in memory; a kernel knows no shapes
    x = tl.load(x_ptr + at, inside, 0.0)  a tile of values, zeros outside; x_ptr is the tensor's address
    tl.store(y_ptr + at, x, inside)       writes them, and nothing outside

    E: tl.constexpr                       constants in capitals are compiled in: another value, another kernel
    ACC                                   the dtype of the arithmetic, float32; the tensors may be bfloat16
    kernel[grid](arguments)               launches one program for each point of the grid

Tiles live in registers: work between loads and stores costs no memory traffic. That is the gain, because the
operations between matrix products are limited by the bytes they move and not by their arithmetic.
"""
import contextlib
import functools
import os
from dataclasses import dataclass, field

import torch

KERNELS = os.environ.get("KERNELS", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if KERNELS not in ("auto", "ref", "triton"):
    raise SystemExit(f"KERNELS={KERNELS!r}: wanted auto, ref or triton")

# For torch.utils.flop_counter: operators with products in them -> FLOPs, from their inputs' shapes.
FLOPS = {}


# ---------------------------------------------------------------- which variant computes an operation


@dataclass
class Operation:
    """What choose.py knows about an operation."""
    name: str
    ref: object                # the specification
    variants: dict             # name -> function: "plain", "kernel" and whatever else computes the same
    images: int                # how many of the first arguments have one row per image
    takes: object              # arguments -> whether the kernel supports them
    chosen: dict = field(default_factory=dict)     # `key` of the first argument -> a variant


OPERATIONS = {}                # name -> Operation
WATCH = None                   # called with each operation, its inputs and result, while choose.py watches


def operation(ref=None, images=1, plain=None, takes=None, **others):
    """Decorator: turns a kernel into an operation that one of its variants computes, see KERNELS.

    ref:    the specification; without one, the decorated function is it, and only `others` are added
    plain:  what is used instead of the kernel, if not the specification
    """

    def register(function):
        variants = {"plain": plain or ref or function} | others
        if ref is not None:
            variants["kernel"] = function
        takes_all = takes or (lambda *_: True)
        op = Operation(function.__name__, ref or function, variants, images, takes_all)
        OPERATIONS[op.name] = op

        @functools.wraps(function)
        def run(x, *others):
            if KERNELS == "auto":
                compute = op.chosen.get(key(x), variants["plain"]) if op.chosen else variants["plain"]
            elif forced(x) and "kernel" in variants and takes_all(x, *others):
                compute = variants["kernel"]
            else:
                compute = variants["plain"]
            result = compute(x, *others)
            if WATCH is not None:
                WATCH(op, (x, *others), result)
            return result

        return run

    return register


def key(x):
    """What a choice depends on: device, autocast, and the first argument's dtype and shape but its batch."""
    return x.device.type, autocast_of(x), x.dtype, *x.shape[1:]


def autocast_of(x):
    """The name of the dtype in which autocast computes products of x, or ""."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return ""
    return name_of(torch.get_autocast_dtype(device))


def name_of(dtype):
    """As `torch` spells it: getattr(torch, name) is the dtype."""
    return str(dtype).removeprefix("torch.")


def forced(x):
    """Is it KERNELS=triton, where Triton can run?"""
    return KERNELS == "triton" and (x.is_cuda or x.is_meta or INTERPRETED)


@contextlib.contextmanager
def specifications():
    """A context in which everything is plain PyTorch: for results that must be equal to the last bit.

    Compiled modules, too, run as they are written: under autocast, compiled code rounds at other points.
    """
    global KERNELS
    before = KERNELS
    KERNELS = "ref"
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        KERNELS = before


# ---------------------------------------------------------------- from a function to an operator


class jit:
    """Decorator: triton.jit at the first launch; until then, `tl` in the kernel's file is only a name."""

    def __init__(self, fn):
        self.fn = fn
        self.compiled = None

    def __getitem__(self, grid):
        """kernel[grid](...) launches."""
        return self.compile()[grid]

    def compile(self):
        if self.compiled is None:
            # Fused multiply-adds; Triton 3.9 warns if this is not set.
            os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
            import triton
            names = self.fn.__globals__
            names["tl"] = triton.language
            for name in set(self.fn.__code__.co_names) & names.keys():
                if isinstance(names[name], jit):           # a function that the kernel calls
                    names[name] = names[name].compile()
            self.compiled = triton.jit(self.fn)
        return self.compiled


def operator(schema, shapes):
    """Decorator: turns fill(*outputs, *inputs), which launches kernels, into torch.ops.davae.<schema>.

    shapes(*inputs) makes the empty outputs. Autograd and torch.compile see one opaque operator.
    """
    name, parenthesis, rest = schema.partition("(")

    def register(fill):

        def run(*inputs):
            outputs = shapes(*inputs)
            with torch.cuda.device_of(inputs[0]):              # Triton launches on the current GPU
                if isinstance(outputs, tuple):
                    fill(*outputs, *inputs)
                else:
                    fill(outputs, *inputs)
            return outputs

        op = torch.library.custom_op(f"davae::{name}", run, mutates_args=(), schema=parenthesis + rest)
        op.register_fake(shapes)
        return op

    return register


# ---------------------------------------------------------------- before a launch


def cdiv(n, size):
    """How many blocks of this size cover n."""
    return -(-n // size)


def power_of_2(n):
    """The smallest power of two that is at least n: the only sizes that tl.arange takes."""
    return 1 << (n - 1).bit_length()


def precision(*tensors):
    """The dtype that kernels compute in: float32, or float64 if any tensor is (gradcheck)."""
    import triton.language as tl
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def at_least_float32(dtype):
    """The dtype of statistics and partial sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def contiguous_rows(t):
    """t, if its last dimension is contiguous (a chunk of a wider tensor is), else a copy that is."""
    return t if t.stride(-1) == 1 else t.contiguous()


def pointer(t, unused):
    """t, contiguous. A kernel needs a pointer even for a missing tensor: if t is None, it gets `unused`."""
    return unused if t is None else t.contiguous()


# ---------------------------------------------------------------- what a model costs


def cost(model, inputs):
    """The cost of a forward and backward pass, counted by running `model(*inputs)`.

    On the meta device, this takes neither memory nor time.
    returns: FLOPs of the forward pass, FLOPs of both passes (2 per multiply-add), and how many numbers are
             kept for the backward pass, not counting parameters
    """
    kept = {}                                              # storage -> numbers: shared storage counts once

    def keep(x):
        kept[storage(x)] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        v, forward = counted(lambda: model.train()(*inputs))
    _, backward = counted(lambda: v.sum().backward())

    for p in model.parameters():
        kept.pop(storage(p), None)
        p.grad = None

    return forward, forward + backward, sum(kept.values())


def counted(function):
    """(what a function of no arguments returns, its FLOPs)"""
    from torch.utils.flop_counter import FlopCounterMode   # here, because it imports triton
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    with counter:
        result = function()
    return result, counter.get_total_flops()


def storage(x):
    """A number that tensors share if they are views of the same memory."""
    return x.untyped_storage()._cdata
