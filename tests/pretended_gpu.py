"""Run scripts as on a GPU where there is none: their tensors say that they are on cuda:0, and a CPU computes.

    python tests/pretended_gpu.py train_vae.py tiny-base --steps=20 -- finetune.py ...

Each script runs as from the command line, in one process. An operator that CUDA would refuse, because some of
its tensors are on the GPU and others on the CPU, raises AssertionError, as does a generator of the other
device. So this shows whether everything is moved where it belongs; the autocast, layout and data paths are
those of a GPU. It shows nothing of kernels (KERNELS=ref), CUDA graphs, memory, speed or rounding on a GPU.
At the end it prints how many operators ran, and how many times each line of this repository waited for the
GPU, which it does for every number that it needs on the CPU.

PyTorch for CPUs can name the device cuda, but lacks what autograd asks of it: its current stream, and how
many there are. A few lines of C++ answer that; they are compiled with g++ (10 s; Linux).
"""
import collections
import ctypes
import functools
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

DEVICE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
const Device GPU(DeviceType::CUDA, 0);

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
} guard;

struct Register {
  Register() { impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard); }
} on_loading;

struct CUDAHooks : at::CUDAHooksInterface {                 // PyTorch looks for this name
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
};
using at::CUDAHooksRegistry, at::CUDAHooksArgs, at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
"""


def load_device():
    """Compile DEVICE and load it, before torch looks for a GPU.  raises: RuntimeError if g++ refuses"""
    torch_at = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "device.cpp").write_text(DEVICE)
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "device.cpp", "-o", "device.so",
                   f"-I{torch_at}/include", f"-L{torch_at}/lib", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ cannot compile against this torch:\n{done.stderr[-2000:]}")
        ctypes.CDLL(str(torch_at / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(f"{folder}/device.so", mode=ctypes.RTLD_GLOBAL)


load_device()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}              # may have tensors of both devices
INDEXING = {aten.index.Tensor, aten.index_put_.default}           # the indices may be on the CPU
WAITS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
NUMBERS = {aten._local_scalar_dense.default, aten.equal.default}  # return no tensor

ran = collections.Counter()
waited = collections.Counter()


class OnGPU(torch.Tensor):
    """A tensor that says it is on cuda:0; its values are those of `inner`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cuda:0")

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"OnGPU({self.inner!r})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def __tensor_flatten__(self):                                 # so that modules swap their parameters
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return OnGPU(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class OnlyPretend(TorchDispatchMode):
    """Within it, what is made on or moved to `cuda` is OnGPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """Run an operator on the CPU; its result is on the GPU if its tensors are, or if it is told so."""
    tensors = tensors_of((args, kwargs))
    gpu = [x for x in tensors if isinstance(x, OnGPU)]
    wanted = kwargs.get("device")
    wanted = torch.device(wanted).type if wanted is not None else None
    on_gpu = wanted == "cuda" or (bool(gpu) and wanted is None)
    check(func, args, kwargs, tensors, gpu, on_gpu)

    to_cpu = func in COPIES and bool(gpu) and (wanted == "cpu" or not isinstance(args[0], OnGPU))
    if gpu and (func in WAITS or to_cpu):
        waited[place()] += 1
    ran["on the GPU" if on_gpu else "on the CPU"] += 1
    plain_args, plain_kwargs = mapped(lambda x: x.inner if isinstance(x, OnGPU) else x, (args, kwargs))
    if wanted == "cuda":
        plain_kwargs = plain_kwargs | {"device": torch.device("cpu")}
    out = func(*plain_args, **plain_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if func in NUMBERS or not on_gpu:
        return out
    out = mapped(OnGPU, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if gpu else out


def mapped(function, x):
    """What operators take or return, with function(tensor) for each tensor; faster than tree_map."""
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, tuple | list):
        return type(x)([mapped(function, part) for part in x])
    if isinstance(x, dict):
        return {name: mapped(function, part) for name, part in x.items()}
    return x


def tensors_of(x):
    found = []
    mapped(found.append, x)
    return found


def check(func, args, kwargs, tensors, gpu, on_gpu):
    """raises: AssertionError for what CUDA would refuse; a tensor of no dimension may be on the CPU"""
    cpu = [x for x in tensors if not isinstance(x, OnGPU) and x.dim()]
    if gpu and cpu and func not in COPIES:
        values = tensors_of((args[0], args[2:]))
        fine = func in INDEXING and not any(x is y for x in cpu for y in values)
        assert fine, (f"{func} of tensors on the GPU and on the CPU: "
                      f"{[('GPU' if isinstance(x, OnGPU) else 'CPU', tuple(x.shape)) for x in tensors]}")
    generator = kwargs.get("generator")
    assert generator is None or not on_gpu, f"{func}: a generator on the CPU for a tensor on the GPU"


def place():
    """The line of this repository that is running."""
    frame = sys._getframe(1)
    while frame:
        file = ours(frame.f_code.co_filename)
        if file:
            return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@functools.cache
def ours(file):
    """A file's path in this repository; None if it is elsewhere, or this one."""
    file = Path(os.path.abspath(file))
    if not file.is_relative_to(ROOT) or "site-packages" in file.parts:                # .venv may lie in ROOT
        return None
    return None if file == Path(__file__).resolve() else file.relative_to(ROOT)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """scaled_dot_product_attention, whose choice of a backend asks the GPU itself."""
    scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).to(value.dtype) @ value


def pretend():
    """Let torch.cuda and the few functions that look into a tensor's memory go along with it."""
    answers = dict(
        is_available=True, device_count=1, current_device=0, set_device=None, synchronize=None,
        empty_cache=None, is_initialized=True, max_memory_allocated=0, get_device_name="pretended GPU",
        is_bf16_supported=True, get_rng_state=torch.zeros(8, dtype=torch.uint8), set_rng_state=None,
        manual_seed_all=None)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    sdpa, tolist, save = F.scaled_dot_product_attention, torch.Tensor.tolist, torch.save
    F.scaled_dot_product_attention = lambda query, *args, **kwargs: (
        attention if isinstance(query, OnGPU) else sdpa)(query, *args, **kwargs)
    torch.Tensor.tolist = lambda x: tolist(x.cpu() if isinstance(x, OnGPU) else x)
    torch.Tensor.pin_memory = lambda x: x
    torch.save = lambda state, *args, **kwargs: save(
        tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, state), *args, **kwargs)
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)                     # then torch.tensor(..., device=) is seen


def few_images():
    """Validation and the report's table take all their images the same way."""
    from support import held_out
    held_out.validation_images.__defaults__ = (4,)


def main(words):
    pretend()
    sys.path.insert(0, str(ROOT))
    few_images()
    while words:
        end = words.index("--") if "--" in words else len(words)
        sys.argv, words = words[:end], words[end + 1:]
        with OnlyPretend():
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    print(*(f"{n} operators {where}" for where, n in ran.items()), sep=", ")
    for line, n in waited.most_common():
        print(f"waited {n} times: {line}")


if __name__ == "__main__":
    os.environ["KERNELS"] = "ref"
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)            # else autograd's thread for the GPU aborts the process at its end, now and then
