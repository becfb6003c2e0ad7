"""Each kernel against its specification evaluated in float64: on the GPU where there is one, else in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so the interpreted tests run in a process of their own, started by the one
test of this file that an ordinary session runs. By hand: TRITON_INTERPRET=1 pytest tests/test_kernels.py
"""
import contextlib
import importlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import davae
import dit
import kernels

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPS = sorted(p.stem for p in (ROOT / "kernels").glob("[!_]*.py") if p.stem != "bench")
ROUNDING = 2**-8        # one unit in bfloat16's last place: the interpreter truncates where the GPU rounds to the nearest


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", "triton")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])


if not INTERPRETED:
    def test_no_kernel_is_on_by_itself_and_a_wrong_name_is_refused():
        env = {k: v for k, v in os.environ.items() if k != "KERNELS"}
        for extra, said in (({}, "ref"), ({"KERNELS": "triton"}, "triton"), ({"KERNELS": "tirton"}, "wanted ref or triton")):
            done = subprocess.run([sys.executable, "-c", "import kernels; print(kernels.KERNELS)"], cwd=ROOT, env=env | extra,
                                  capture_output=True, text=True)
            assert said in done.stdout + done.stderr

    def test_all_kernels_pass_in_the_interpreter():
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(Path(__file__))], cwd=ROOT,
                              env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_importing_the_kernels_does_not_import_triton():
        code = f"import sys; {'; '.join(f'import kernels.{op}' for op in OPS)}; print('triton' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == "False", done.stdout + done.stderr

    @pytest.mark.parametrize("op", OPS)
    def test_every_kernel_compiles_for_hopper_into_wide_loads_and_its_matrix_products(op, monkeypatch):
        """At LightningDiT-XL's sizes, in bfloat16. No GPU is needed: a launch is replaced by a compilation for sm_90."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile
        types, compiled = {torch.bfloat16: "*bf16", torch.float32: "*fp32", int: "i32", float: "fp32"}, {}

        def launch(self, grid):
            def run(*args, num_warps=4, **constants):
                f = self.compile()
                names = [p.name for p in f.params if not p.is_constexpr]
                signature = {n: types[x.dtype if isinstance(x, torch.Tensor) else type(x)] for n, x in zip(names, args)}
                given = dict(zip(names, args))             # for multiples of 16 and for ones Triton looks when it launches
                constants |= {n: 1 for n, x in given.items() if isinstance(x, int) and x == 1}
                aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(given.get(p.name, 1.5) for p in f.params)
                           if isinstance(x, torch.Tensor) or x % 16 == 0}
                source = ASTSource(f, signature | {n: "constexpr" for n in constants}, constants, aligned)
                compiled[f.__name__] = compile(source, GPUTarget("cuda", 90, 32), {"num_warps": num_warps})
            return run

        monkeypatch.setattr(kernels.jit, "__getitem__", launch)
        monkeypatch.setattr(importlib.import_module(f"kernels.{op}"), "use_triton", lambda x: True)
        run(both(op)[0], op, MAKE[op](**AT_FULL_SIZE[op], dtype=torch.bfloat16, device="cpu"))
        assert len(compiled) >= (1 if op == "patch_embed" else 2)              # whose backward is matrix products
        for kernel in compiled.values():
            assert kernel.metadata.shared <= 227 * 1024
            assert len(re.findall(r"ld\.global\S*\.[bu]16 ", kernel.asm["ptx"])) <= 2        # one bfloat16 a load: a row's
            assert ("wgmma" in kernel.asm["ptx"]) == (op in ("attention", "patch_embed"))

    def test_the_benchmark_times_ten_recorded_calls_at_once_and_says_what_fails(monkeypatch):
        from kernels import bench
        calls, replays = [], []
        for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda: 0)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: (replays.append(1), time.sleep(0.01))))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())

        def fails():
            raise RuntimeError("no kernel image")

        rows = bench.measure({"works": lambda: calls.append(1), "fails": fails}, True, time.time() + 60, graphs=True)
        assert len(calls) == 1 + 10 and len(replays) == 10                     # compiling, recording; ten rounds of one replay
        assert 1.0 <= rows["works"]["ms"][0] < 5 and "no kernel image" in rows["fails"]["error"]        # 10 ms for ten calls

    @pytest.mark.parametrize("section", ["operations", "training", "sampling"])
    def test_what_the_benchmark_measures_runs_at_toy_size(section):
        from kernels import bench
        rows = 0
        for what, variants, _ in getattr(bench, section)(False):
            next(iter(variants.values()))()                        # plain PyTorch: nothing is compiled here
            rows += 1
        assert rows == {"operations": 24, "training": 1, "sampling": 5}[section]


# ---------------------------------------------------------------- inputs, by kernel: name -> (op, ref, inputs)


def randn(*shape, dtype, device, seed=0):
    """The same values for every dtype and device, up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def norm_modulate(B, L, E, rms=True, residual=True, transposed=False, **like):
    x, y = (randn(L, B, E, seed=i, **like).transpose(0, 1) if transposed else randn(B, L, E, seed=i, **like) for i in (1, 2))
    shift, scale, gate, *_ = randn(B, 6 * E, seed=3, **like).chunk(6, dim=-1)
    weight = randn(E, seed=4, **like) + 1
    return [x, shift, scale, weight if rms else None, *([y, gate] if residual else [None, None])]


def qknorm_rope(B, L, A, K, norm=True, rope=True, spare=0, **like):
    qkv = randn(B, L, 3, A, K + spare, seed=1, **like)[..., :K]
    weights = [randn(K, seed=i, **like) + 1 for i in (2, 3)] if norm else [None, None]
    angle = randn(L, K, seed=4, **like).to(torch.promote_types(like["dtype"], torch.float32))
    return [qkv, *weights, *([angle.cos(), angle.sin()] if rope else [None, None])]


def groupnorm_silu(B, C, H, W, groups, offset=0, channels_last=True, **like):
    x = randn(B, H, W, C, seed=1, **like).permute(0, 3, 1, 2) + offset
    x = x if channels_last else x.contiguous()
    return [x, randn(C, seed=2, **like) + 1, randn(C, seed=3, **like), groups]


def patch_embed(B, C, D, h, w, p, E, **like):
    z, z_d = randn(B, C + D, h, w, seed=1, **like).split([C, D], dim=1)
    weights = [randn(E, n, p, p, seed=2 + n, **like) for n in (C, D)]
    return [z, z_d, *weights, randn(E, seed=4, **like), randn(1, h * w // p**2, E, seed=5, **like)]


def attention(B, N, A, K, **rest):
    """Under LightningDiT's sizes the scores of random q and k would be one-hot: a norm keeps them near 1."""
    return qknorm_rope(B, N, A, K, **rest)


def swiglu(B, L, E, H, transposed=False, **like):
    x = randn(L, B, E, seed=1, **like).transpose(0, 1) if transposed else randn(B, L, E, seed=1, **like)
    return [x, randn(2 * H, E, seed=2, **like) / E**0.5, randn(2 * H, seed=3, **like)]


MAKE = dict(swiglu=swiglu, norm_modulate=norm_modulate, qknorm_rope=qknorm_rope, patch_embed=patch_embed, groupnorm_silu=groupnorm_silu,
            attention=attention)
NO_GRAD = {"qknorm_rope": (3, 4), "attention": (3, 4), "groupnorm_silu": (3,)}               # positions of tables and numbers
CASES = [
    ("attention", dict(B=1, N=77, A=2, K=72)),     # 77 tokens: two blocks, the second not full; 72 = 64 + 8
    ("attention", dict(B=2, N=16, A=1, K=64, norm=False)),
    ("attention", dict(B=1, N=5, A=2, K=24, rope=False, spare=8)),
    ("attention", dict(B=1, N=70, A=1, K=72, norm=False, rope=False)),
    ("norm_modulate", dict(B=2, L=19, E=72)),      # 19 tokens: the last program of the backward is not full
    ("norm_modulate", dict(B=1, L=5, E=33, transposed=True)),
    ("norm_modulate", dict(B=2, L=7, E=40, rms=False)),
    ("norm_modulate", dict(B=2, L=7, E=64, residual=False)),
    ("norm_modulate", dict(B=2, L=3, E=24, rms=False, residual=False)),
    ("qknorm_rope", dict(B=2, L=9, A=3, K=72)),    # 9 tokens: one more than a program of the backward takes
    ("qknorm_rope", dict(B=1, L=5, A=2, K=64, spare=8)),
    ("qknorm_rope", dict(B=2, L=3, A=1, K=8, norm=False)),
    ("qknorm_rope", dict(B=2, L=10, A=2, K=64, rope=False)),               # SD3.5
    ("patch_embed", dict(B=2, C=5, D=19, h=9, w=10, p=1, E=72)),           # 90 tokens: the second tile is not full
    ("patch_embed", dict(B=1, C=4, D=12, h=6, w=8, p=2, E=33)),
    ("swiglu", dict(B=2, L=37, E=24, H=64)),       # 74 tokens: the second program of the backward is not full
    ("swiglu", dict(B=1, L=9, E=16, H=300, transposed=True)),              # 300 channels: more than a program takes
    ("groupnorm_silu", dict(B=2, C=96, H=25, W=21, groups=32)),            # 525 pixels: three runs of tiles, the last not full
    ("groupnorm_silu", dict(B=1, C=64, H=5, W=3, groups=32, channels_last=False)),
    ("groupnorm_silu", dict(B=2, C=6, H=3, W=4, groups=2)),
]
AT_FULL_SIZE = dict(attention=dict(B=1, N=256, A=16, K=72), norm_modulate=dict(B=1, L=256, E=1152), swiglu=dict(B=1, L=8, E=72, H=3072),
                    qknorm_rope=dict(B=1, L=256, A=16, K=72), patch_embed=dict(B=1, C=32, D=96, h=16, w=16, p=1, E=1152),
                    groupnorm_silu=dict(B=1, C=512, H=8, W=8, groups=32))
REGISTERED = {                                     # kernel: its torch operator, and that operator's arguments among the inputs
    "attention": ("attention", lambda *args: args),
    "norm_modulate": ("norm_modulate", lambda *args: args),
    "qknorm_rope": ("norm_rope", lambda qkv, weight, _, cos, sin: (qkv.detach()[:, :, 0].requires_grad_(), weight, cos, sin)),
    "patch_embed": ("patch_embed", lambda *args: args),
    "groupnorm_silu": ("groupnorm_silu", lambda *args: (*args, 1e-5)),
    "swiglu": ("swiglu", lambda x, weight, bias: ((x @ weight.T).detach().requires_grad_(), bias)),
}
TINY = [
    ("attention", dict(B=1, N=3, A=1, K=20)),
    ("attention", dict(B=1, N=2, A=2, K=18, norm=False, rope=False)),
    ("norm_modulate", dict(B=2, L=3, E=5)),
    ("norm_modulate", dict(B=1, L=2, E=3, rms=False, residual=False)),
    ("qknorm_rope", dict(B=1, L=3, A=2, K=4)),
    ("patch_embed", dict(B=1, C=2, D=3, h=2, w=4, p=2, E=3)),
    ("groupnorm_silu", dict(B=1, C=4, H=2, W=3, groups=2)),
    ("swiglu", dict(B=1, L=3, E=4, H=5)),
]


def name(case):
    return case[0] + "-" + "-".join(f"{k}{v}" for k, v in case[1].items())


def both(op):
    module = importlib.import_module(f"kernels.{op}")
    return getattr(module, op), getattr(module, op + "_ref")


def leaves_of(op, inputs, dtype=None):
    """New tensors with the same values and strides, those that are not tables with requires_grad."""
    return [t.detach().to(dtype or t.dtype).requires_grad_(i not in NO_GRAD.get(op, ())) if isinstance(t, torch.Tensor) else t
            for i, t in enumerate(inputs)]


def run(f, op, inputs, dtype=None):
    """[outputs, gradients of every input that has one]; the gradients of the outputs are fixed, and not contiguous."""
    inputs = leaves_of(op, inputs, dtype)
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    outputs = f(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    douts = [randn(*o.shape[::-1], dtype=o.dtype, device=o.device, seed=9 + i).permute(*range(o.dim() - 1, -1, -1))
             for i, o in enumerate(outputs)]
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, leaves, douts))]


def errors(results, truth):
    assert len(results) == len(truth)
    relative = [(a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in zip(results, truth)]
    return [e.nan_to_num(nan=float("inf")).item() for e in relative]           # max() would pass over a NaN


# ---------------------------------------------------------------- the claims


@pytest.mark.parametrize("case", CASES, ids=name)
def test_float32_forward_and_every_gradient_are_within_1e_6_of_the_specification_in_float64(case, device):
    op, sizes = case
    kernel, ref = both(op)
    inputs = MAKE[op](**sizes, dtype=torch.float32, device=device)
    results = run(kernel, op, inputs)
    assert {r.dtype for r in results} == {torch.float32}
    assert max(errors(results, run(ref, op, inputs, torch.float64))) <= 1e-6


@pytest.mark.parametrize("case", CASES, ids=name)
def test_bfloat16_is_at_most_twice_as_wrong_as_plain_pytorch_in_bfloat16(case, device):
    op, sizes = case
    kernel, ref = both(op)
    inputs = MAKE[op](**sizes, dtype=torch.bfloat16, device=device)
    results, plain = run(kernel, op, inputs), run(ref, op, inputs)
    assert [r.dtype for r in results] == [r.dtype for r in plain]
    truth = run(ref, op, inputs, torch.float64)
    for ours, theirs in zip(errors(results, truth), errors(plain, truth)):
        assert ours <= 2 * theirs + ROUNDING


@pytest.mark.parametrize("case", TINY, ids=name)
def test_gradcheck_in_float64(case, device):
    op, sizes = case
    inputs = leaves_of(op, MAKE[op](**sizes, dtype=torch.float64, device=device))
    assert torch.autograd.gradcheck(both(op)[0], inputs, fast_mode=True)


def test_groupnorm_statistics_do_not_cancel_where_the_mean_is_a_hundred_times_the_deviation(device):
    kernel, ref = both("groupnorm_silu")
    inputs = groupnorm_silu(B=1, C=32, H=9, W=60, groups=4, offset=100, dtype=torch.float32, device=device)
    results, truth = (run(f, "groupnorm_silu", inputs, dtype) for f, dtype in ((kernel, None), (ref, torch.float64)))
    # Half a unit in 100's last place is 4e-6 deviations; the variance as E[x^2] - mean^2 would be off by 1e-3.
    assert max(errors(results, truth)) <= 2e-5


def test_attention_between_opposite_queries_and_keys_stays_finite_where_the_last_block_is_not_full(device):
    """All scores are about -120: exp(0 - -120) of what stands beyond the last key would be infinite in float32."""
    kernel, ref = both("attention")
    qkv = 1 + 0.1 * randn(1, 5, 3, 1, 24, seed=1, dtype=torch.float32, device=device)
    inputs = [qkv, torch.full((24,), 5.0, device=device), torch.full((24,), -5.0, device=device), None, None]
    results, truth = (run(f, "attention", inputs, dtype) for f, dtype in ((kernel, None), (ref, torch.float64)))
    assert max(errors(results, truth)) <= 1e-4


@pytest.mark.parametrize("op", OPS)
def test_the_torch_operator_keeps_its_promises_to_the_compiler(op, device):
    sizes = dict(CASES)[op]                        # the last case of each kernel
    inputs = leaves_of(op, MAKE[op](**sizes, dtype=torch.float32, device=device))
    both(op)                                       # registers the operator
    operator, args = REGISTERED[op]
    torch.library.opcheck(getattr(torch.ops.davae, operator), args(*inputs))


@pytest.mark.parametrize("op", OPS)
def test_kernels_ref_turns_triton_off(op, device, monkeypatch):
    kernel, ref = both(op)
    inputs = MAKE[op](**dict(CASES)[op], dtype=torch.float32, device=device)
    monkeypatch.setattr(kernels.jit, "__getitem__", lambda *_: pytest.fail("Triton was launched"))
    monkeypatch.setattr(kernels, "KERNELS", "ref")
    assert all(map(torch.equal, run(kernel, op, inputs), run(ref, op, inputs)))


def test_every_kernel_has_cases():
    assert set(OPS) == {op for op, _ in CASES} == {op for op, _ in TINY} == set(REGISTERED)


# ---------------------------------------------------------------- the models


class Count(TorchDispatchMode):
    """Per operator: how often it ran, and the bytes of the tensors it took and gave; views and allocations left out."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, name = f(*args, **(kwargs or {})), f.name().split("::")[1].split(".")[0]
        if not any(r.alias_info and not r.alias_info.is_write for r in f._schema.returns) and name not in (
                "_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided", "promote_types"):
            tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
            self.calls[name] += 1
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors.values())
        return out


def randomise(model):
    """A fresh model's gates are zero: nothing of its blocks would be seen."""
    for i, p in enumerate(model.parameters()):
        p.data = 0.15 * randn(*p.shape, dtype=p.dtype, device="cpu", seed=i)
    return model


def on_and_off(f, monkeypatch):
    """[f() with kernels, f() without], and the names of the kernels that ran in the first."""
    with Count() as ran:
        on = f()
    monkeypatch.setattr(kernels, "KERNELS", "ref")
    monkeypatch.setattr(kernels.jit, "__getitem__", lambda *_: pytest.fail("Triton was launched"))
    return on, f(), set(ran.calls)


def test_twenty_training_steps_are_the_same_with_kernels(device, monkeypatch):
    """In float32 in the interpreter; as they are on a GPU, under bfloat16 autocast, which rounds at other places."""
    def losses():
        model = randomise(dit.LightningDiT(dit.DiTConfig(C=4, D=4, p=1, grid=2, E=72, A=1, depth=2, num_classes=3,
                                                         qk_norm=True))).to(device)
        opt, found = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for step in range(20):
            z_all, target = (randn(1, 8, 2, 2, dtype=torch.float32, device=device, seed=k) for k in (step, 100 + step))
            with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
                v = model(z_all, torch.tensor([0.8], device=device), torch.tensor([2], device=device))
            loss = (v - target).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            found.append(loss.item())
        return found

    on, off, ran = on_and_off(losses, monkeypatch)
    assert on == pytest.approx(off, rel=1e-4 if device == "cpu" else 0.03) and off[-1] < 0.9 * off[0]
    ops = {"norm_modulate", "attention", "swiglu"}
    assert ran > ops | {f"{op}_backward" for op in ops} | {"patch_embed"}


@torch.no_grad()
def test_an_mmdit_is_the_same_with_kernels(device, monkeypatch):
    model = randomise(dit.MMDiT(dit.MMDiTConfig(C=4, D=4, E=48, A=3, depth=2, dual=1, context=12, pooled=8, pos_size=6))).to(device)
    args = [randn(*shape, dtype=torch.float32, device=device) for shape in ((1, 8, 4, 6), (1,), (1, 3, 12), (1, 8))]
    on, off, ran = on_and_off(lambda: model(*args), monkeypatch)
    assert errors([on], [off.double()])[0] < 1e-5 and ran > {"norm_modulate", "norm_rope", "patch_embed"}


@torch.no_grad()
def test_an_autoencoder_decodes_the_same_with_kernels(device, monkeypatch):
    vae = randomise(davae.AutoencoderKL(davae.KLConfig(C=4, ch=8, ch_mult=(1, 2), blocks=1, groups=4))).to(device)
    z = randn(1, 4, 4, 6, dtype=torch.float32, device=device)
    on, off, ran = on_and_off(lambda: vae.decode(z), monkeypatch)
    assert errors([on], [off.double()])[0] < 1e-5 and "groupnorm_silu" in ran


def test_under_autocast_the_tokens_are_bfloat16_with_and_without_kernels(device, monkeypatch):
    seen = []
    model = randomise(dit.LightningDiT(dit.DiTConfig(C=4, D=4, p=1, grid=2, E=72, A=1, depth=2, num_classes=3))).to(device)
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend(t.dtype for t in (args[0], *out)))
    z_all = randn(2, 8, 2, 2, dtype=torch.float32, device=device)

    def velocity():
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            v = model(z_all, torch.tensor([0.2, 0.8], device=device), torch.tensor([0, 2], device=device))
        v.sum().backward()
        return v.detach()

    on, off, _ = on_and_off(velocity, monkeypatch)
    assert set(seen) == {torch.bfloat16} and on.dtype == off.dtype == torch.float32
    assert 0 < errors([on], [off.double()])[0] < 0.05


def traffic_of_a_block(mode, monkeypatch):
    """(U of everything but matrix products and attention, operators) of one block of an XL/1, forward and backward, bfloat16.

    U = one pass over the tokens, B*L*E*2 bytes; an operator of ours counts as what it takes and gives. The third block's share
    is the difference of three to two. On the meta device: no arithmetic; PyTorch's attention is named there, because the one
    that it would choose for that device is none.
    """
    monkeypatch.setattr(kernels, "KERNELS", mode)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *qkv: flash(*qkv)[0])
    monkeypatch.setattr(dit, "timestep_embedding", lambda t: torch.empty(len(t), 256, dtype=torch.bfloat16, device="meta"))
    found = []
    for depth in (2, 3):
        with torch.device("meta"), Count() as count:
            model = dit.LightningDiT(dit.DiTConfig(D=96, depth=depth)).bfloat16()
            count.calls.clear(), count.bytes.clear()
            z_all = torch.empty(128, 128, 16, 16, dtype=torch.bfloat16)
            model(z_all, torch.empty(128), torch.zeros(128, dtype=torch.long)).sum().backward()
        found.append((sum(v for k, v in count.bytes.items() if "mm" not in k and "attention" not in k), sum(count.calls.values())))
    (bytes_2, calls_2), (bytes_3, calls_3) = found
    return (bytes_3 - bytes_2) / (128 * 256 * 1152 * 2), calls_3 - calls_2


def test_a_models_cost_is_the_same_with_kernels(monkeypatch):
    found = {}
    for mode in ("ref", "triton"):
        monkeypatch.setattr(kernels, "KERNELS", mode)
        with torch.device("meta"):
            inputs = torch.empty(2, 8, 4, 4), torch.empty(2), torch.zeros(2, dtype=torch.long)
            found[mode] = kernels.cost(dit.LightningDiT(dit.DiTConfig(C=4, D=4, p=2, grid=2, E=72, A=1, depth=2)), inputs)
    assert found["ref"][:2] == found["triton"][:2] and found["ref"][2] > found["triton"][2]        # FLOPs; numbers kept


def test_bytes_and_launches_of_a_block_stay_below_the_goals(monkeypatch):
    """70 U and 40 operators. An operator of ours is one to three launches: a backward, and what adds its partial sums."""
    plain, with_kernels = traffic_of_a_block("ref", monkeypatch), traffic_of_a_block("triton", monkeypatch)
    assert plain == (pytest.approx(286.6, rel=0.02), 125)
    assert with_kernels == (pytest.approx(46.5, rel=0.02), 31)


@pytest.mark.slow
@pytest.mark.parametrize("mode,goal,found", [("ref", 125, 92.9), ("triton", 70, 46.5)])
def test_bytes_of_a_compiled_block_stay_below_the_goals(mode, goal, found, monkeypatch):
    """U as above, by Inductor's own count for what it fuses, and for our operators between; from the batches 2 and 4."""
    import torch._inductor.config
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    counted = []

    def count(graph):
        for node in graph.scheduler.nodes:
            ours = "davae" in str(getattr(node.node, "op_overload", "")) and "attention" not in str(node.node.op_overload)
            if ours or not isinstance(node, ExternKernelSchedulerNode):        # the others are matrix products, attention, views
                counted.append(node.get_read_write_buffers_sizes())

    monkeypatch.setattr(kernels, "KERNELS", mode)
    monkeypatch.setattr(kernels, "INTERPRETED", True)                          # take the kernels' operators, on a CPU too,
    monkeypatch.setattr(kernels.jit, "__getitem__", lambda *_: lambda *args, **sizes: None)        # but do not run them
    update = GraphLowering._update_scheduler
    monkeypatch.setattr(GraphLowering, "_update_scheduler", lambda graph: (update(graph), count(graph)))
    block, tables, totals = dit.Block(dit.DiTConfig()).bfloat16(), dit.rope_table(16, 72), []
    for B in (2, 4):
        torch._dynamo.reset()
        counted.clear()
        x, y = (torch.randn(B, 256, 1152, dtype=torch.bfloat16, requires_grad=True) for _ in "xy")
        gate, c = (torch.randn(B, 1152, dtype=torch.bfloat16, requires_grad=True) for _ in "gc")
        with torch._inductor.config.patch(fx_graph_cache=False):
            out = torch.compile(block, dynamic=False)(x, y, gate, c, None, *tables)
            torch.autograd.backward(out, [torch.zeros_like(o) for o in out])
        totals.append(sum(counted))
    U = (totals[1] - totals[0]) / (2 * 256 * 1152 * 2)
    assert U == pytest.approx(found, rel=0.03) and U <= goal
