"""Nine minutes on a GPU: are the kernels correct, how fast are they and the models, which goals are met.

    python -m kernels.bench [--out=bench.json] [--only=sampling]
    python -m kernels.bench --device=cpu             something else: peers.py, ours against others on a CPU
    python -m kernels.bench --rehearse               on a CPU, at toy size: its times mean nothing

In this order: the tests marked `gpu` (their last line is a row of the table); operations, each kernel against
its specification, plain and compiled; 200 training steps of LightningDiT-XL/1 at batch 128, three variants;
sampling at SD3.5 Medium's sizes; a verdict on each goal of goals.py. Weights and data are random.

The variants of a row alternate, in one process, after a warm-up; medians and quartiles are printed.
The ceilings are measured first: a bfloat16 product of 8192 x 8192 matrices, and a copy. Operations are timed
as CUDA graphs of ten calls. A section that runs out of time skips the rest; a failure becomes a line of text
in the table and does not end the run. Each row is printed, and bench.json written, as soon as it is measured:
a run that is killed leaves what it has found. For what did not fit, --only=training or --only=sampling.

Variants of models: plain is KERNELS=ref, as it is and with compiled blocks; auto is what choose.py chose for
this model, with compiled blocks. diffusers, if it is installed, is its SD3 transformer and AutoencoderKL at
the same sizes, with bfloat16 weights, as it is and compiled. Plain, not compiled, a training step takes 73
GiB: on an H100 it may run out of memory, and says so.

In a rehearsal, models are compiled without code generation, and without TRITON_INTERPRET=1 the kernels are
replaced by their specifications.
Run on an H200 in parts (2026-11-26 and 27), never as a whole: docs/results.md has what they found. Choosing
takes 20 to 30 s for each model there, so in nine minutes sampling does not get far.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch.nn.attention import SDPBackend
from torch.utils._pytree import tree_leaves

import kernels
from kernels import choose, goals, peers, trial
from kernels.attention import by
from kernels.groupnorm_silu import groupnorm_silu, groupnorm_silu_ref
from kernels.norm_modulate import add_norm_modulate, add_norm_modulate_ref, norm_modulate, norm_modulate_ref
from kernels.patch_embed import patch_embed, patch_embed_ref
from kernels.qknorm_rope import qknorm_rope, qknorm_rope_ref
from kernels.swiglu import swiglu, swiglu_ref

# Sections import project modules locally, because kernels/ itself does not depend on these.

PEAK = 989e12              # bfloat16 FLOP/s of H100 and H200 as stated by the vendor, for MFU
# Seconds after the start at which a part ends; what it spares goes to the next. Then no model is built and
# no round of measurements begun, but a round in progress, which may have to compile, takes up to a minute.
ENDS = {"tests": 120, "operations": 200, "training": 350, "sampling": 480}
TRAINING_STEPS = 67        # per variant
GRAPH_CALLS = 10           # calls of an operation in one CUDA graph
REPEAT_MS = 5              # one measurement lasts at least this long
ROUNDS = 11                # of measurements; the first two are warm-up
SLOW_ROUNDS = 7            # of images that take seconds
STEPS = 30                 # sampling steps per image, of which MEASURED are timed
MEASURED = 2


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", default="bench.json")
    parser.add_argument("--only", default="", choices=("tests", "operations", "training", "sampling"))
    args = parser.parse_args()
    if args.device == "cpu" and not args.rehearse:
        return peers.main()
    device = "cpu" if args.rehearse else "cuda"
    cuda = device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; wanted one to measure the kernels: give --device=cpu to "
                         "measure what runs on a CPU, or --rehearse for this benchmark at toy size")
    begin = time.time()
    torch._dynamo.config.recompile_limit = 64

    machine = torch.cuda.get_device_name() if cuda else "a CPU at toy size: a rehearsal, not a measurement"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    head = f"{machine}; {versions}; {time.strftime('%Y-%m-%d')}"
    print(head, flush=True)
    rows = []
    for row in measurements(args.only, cuda, begin):
        print(line_of(row), flush=True)
        rows.append(row)
        found = {"machine": head, "rows": rows, "goals": goals.verdicts(rows if cuda else [], machine)}
        pathlib.Path(args.out).write_text(json.dumps(found, indent=1))

    # once more, without what was printed in between
    print(f"\n{head}, {time.time() - begin:.0f} s\n")
    print("| what | variant | ms (quartiles) | rate | GiB |\n|---|---|---|---|---|")
    for row in rows:
        print(line_of(row))
    print(goals.table(goals.verdicts(rows if cuda else [], machine)))


def measurements(only, cuda, begin):
    """The rows of the table, one after another.

    only: the name of a part, or "" for all;  begin: time.time() at the start
    """
    if cuda and only in ("", "tests"):
        yield run_tests()
    known = {}                                             # ceilings, and seconds of earlier rows
    for section in (operations, training, sampling):
        part = section.__name__
        if only in ("", part):
            yield from rows_of(section, cuda, begin + ENDS[part], known)


def rows_of(section, cuda, deadline, known):
    """The rows of a section, up to its deadline, or to a failure outside of a measurement."""
    name = section.__name__
    device = torch.device("cuda" if cuda else "cpu")
    rounds = {"training": TRAINING_STEPS, "sampling": SLOW_ROUNDS}.get(name, ROUNDS)
    cases = section(cuda)
    try:
        while time.time() < deadline:
            with device:                                   # only here: it would slow down every operation
                case = next(cases, None)
            if case is None:
                return
            what, variants, work = case
            measured = measure(variants, cuda, deadline, cuda and section is operations, rounds)
            for variant, row in measured.items():
                row = {"section": name, "what": what, "variant": variant} | row
                if "ms" in row:
                    row |= rates(what, variant, row["ms"][0] / 1e3, work, known)
                yield row
        why = "skipped: out of time"
    except trial.failures() as error:
        why = reason(error)
    yield {"section": name, "what": f"the rest of {name}", "variant": "", "error": why}


def run_tests():
    """The row for the tests that need a GPU: pytest's last line."""
    root = pathlib.Path(__file__).parent.parent
    files = [path for path in (root / "tests").glob("test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *sorted(files)]
    if importlib.util.find_spec("xdist"):                  # most of the time, they compile
        command += ["-n", "4"]
    row = {"section": "tests", "what": "tests marked gpu", "variant": ""}
    seconds = ENDS["tests"]
    with tempfile.TemporaryFile("w+", errors="replace") as said:           # a pipe stays open till all end
        tests = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                 start_new_session=True)
        try:
            code = tests.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(tests.pid, signal.SIGKILL)           # pytest's workers too, which would use the GPU
            tests.wait()
        said.seek(0)
        lines = said.read().strip().splitlines() or ["pytest said nothing"]
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    last = lines[-1] if code is not None else f"not finished in {seconds} s: {lines[-1]}"
    return row | {"error": last, "failed": failed, "passed": code == 0}


def rates(what, name, seconds, work, known):
    """The rates {unit: number} that follow from a time; `known` remembers it for later rows.

    work: of a call, any of
        unit, work      "GB/s" or "GFLOP/s", and bytes or FLOPs; the first row with a unit is its ceiling
        images, flops   how many images, and the FLOPs of one
        batch, decode   images sampled together, and the name of the row that decodes one
    """
    known[what, name] = seconds
    found = {}
    if "unit" in work:
        rate = work["work"] / seconds
        ceiling = known.setdefault(work["unit"], rate)
        found[work["unit"]] = rate / 1e9
        found["of the ceiling"] = rate / ceiling
    if "images" in work:
        found["img/s"] = work["images"] / seconds
    if work.get("flops"):
        found["MFU"] = work["images"] * work["flops"] / seconds / PEAK
    if "decode" in work:
        decode = known.get((work["decode"], name.removesuffix(", graph")))
        if decode is not None:
            image = STEPS / MEASURED * seconds / work["batch"] + decode
            found["img/s (estimate)"] = 1 / image
    return found


def line_of(row):
    """The row as a line of the table."""
    ms = "{:.3f} ({:.3f} to {:.3f})".format(*row["ms"]) if "ms" in row else row["error"]
    shown = [key for key in row if key in ("MFU", "of the ceiling") or "/s" in key]
    rate = ", ".join(f"{row[key]:.3g} {key}" for key in shown) + ", ".join(row.get("failed", []))
    return f"| {row['what']} | {row['variant']} | {ms} | {rate} | {row.get('GiB', 0):.1f} |"


def reason(error):
    return f"{type(error).__name__}: {str(error)[:90]!r}"


# ---------------------------------------------------------------- measuring


class Variant:
    """A function to time, and its measurements."""

    def __init__(self, function):
        self.function = function
        self.calls = 1                                     # calls in one run of `function`
        self.repeats = 1                                   # runs in one measurement
        self.times = []                                    # ms of a call; the first two are warm-up
        self.GiB = None
        self.error = None

    def time(self, cuda):
        """One measurement."""
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        since = time.perf_counter()
        for _ in range(self.repeats):
            self.function()
        if cuda:
            torch.cuda.synchronize()
        ms = (time.perf_counter() - since) / self.repeats * 1e3
        self.times.append(ms / self.calls)
        self.repeats = 1 + int(REPEAT_MS / ms)
        if cuda:
            self.GiB = torch.cuda.max_memory_allocated() / 2**30

    def record(self):
        """From now on, replay a CUDA graph of GRAPH_CALLS calls, which does not wait for Python."""
        self.calls = GRAPH_CALLS
        self.repeats = 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                self.function()
        self.function = graph.replay

    def row(self):
        row = {"repeats": self.repeats, "calls": self.calls, "rounds": len(self.times)}
        if self.GiB is not None:
            row["GiB"] = self.GiB
        if self.error:
            row["error"] = self.error
        if len(self.times) > 2:
            row["ms"] = torch.tensor(self.times[2:]).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()
        elif not self.error:
            row["error"] = "skipped: out of time"
        return row


def measure(variants, cuda, deadline, graphs=False, rounds=ROUNDS):
    """{name: function} -> {name: {"ms": [median, quartiles], "GiB", ...}}, or "error" instead of "ms".

    graphs: time CUDA graphs of ten calls, without Python.
    """
    variants = {name: Variant(function) for name, function in variants.items()}
    for n in range(rounds if cuda else 3):                 # the first compiles, the second finds `repeats`
        turns = list(variants.values())
        if n % 2:
            turns.reverse()
        for variant in turns:
            if variant.error or time.time() > deadline:
                continue
            try:
                variant.time(cuda)
                if graphs and n == 0:
                    variant.record()
            except trial.failures() as error:
                variant.error = reason(error)
    return {name: variant.row() for name, variant in variants.items()}


# ---------------------------------------------------------------- operations
# Each section yields a row's name, its variants {name: function}, and the work of a call, see `rates`.


class Sizes(NamedTuple):
    """LightningDiT's batch, tokens, width and heads; SD3.5's tokens, also used as the side of an image."""
    B: int
    L: int
    E: int
    A: int
    S: int


class Case(NamedTuple):
    """A kernel, its reference, its inputs, and the work of each pass: bytes, or FLOPs of large products."""
    kernel: object
    ref: object
    inputs: list
    unit: str
    forward: int
    backward: int


def operations(cuda):
    """The ceilings; each kernel, its specification, that compiled; PyTorch's attention by three backends."""
    kernels.KERNELS = "triton"
    sizes = Sizes(B=128, L=256, E=1152, A=16, S=1024) if cuda else Sizes(B=2, L=16, E=72, A=1, S=32)
    yield from ceilings(8192 if cuda else 256)
    for case in cases(sizes):
        variants = {
            "ref": case.ref,
            "ref, compiled": torch.compile(case.ref, backend=backend(cuda), dynamic=False),
            "kernel": case.kernel,
        }
        what = f"{case.kernel.__name__} {tuple(case.inputs[0].shape)}"
        yield from both_ways(what, variants, case.inputs, case.unit, case.forward, case.backward)
    yield from norm_and_attention(sizes, cuda)
    yield from attention(sizes)


def backend(cuda):
    return "inductor" if cuda else "aot_eager"


def randn(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


def ceilings(n):
    a = randn(n, n)
    b = randn(n, n)
    yield "bfloat16 product", {"": lambda: a @ b}, {"unit": "GFLOP/s", "work": 2 * n**3}

    source = randn(8 * n * n)
    target = torch.empty_like(source)                      # negated: of a copy, the driver makes a slower one
    yield "copy", {"": lambda: torch.neg(source, out=target)}, {"unit": "GB/s", "work": 4 * len(source)}


BACKENDS = {
    "flash": by(SDPBackend.FLASH_ATTENTION),
    "cudnn": by(SDPBackend.CUDNN_ATTENTION),
    "efficient": by(SDPBackend.EFFICIENT_ATTENTION),
}


def norm_and_attention(s, cuda):
    """QK-norm, rotation and attention at LightningDiT's sizes: compiled, or the kernel and then a library."""
    B, L, _, A, _ = s
    inputs = [randn(B, L, 3, A, 72), randn(72), randn(72), randn(L, 72).float(), randn(L, 72).float()]
    variants = {}
    for name in ("flash", "cudnn"):
        def by_pytorch(*qkv_and_tables, attend=BACKENDS[name]):
            return attend(*qknorm_rope_ref(*qkv_and_tables))

        def by_kernel(*qkv_and_tables, attend=BACKENDS[name]):
            return attend(*qknorm_rope(*qkv_and_tables))

        variants[f"{name}, compiled"] = torch.compile(by_pytorch, backend=backend(cuda), dynamic=False)
        variants[f"kernel, {name}"] = by_kernel
    flops = 4 * B * A * L**2 * 72
    yield from both_ways(f"norm, rotation, attention {(B, L, 3, A, 72)}", variants, inputs,
                         "GFLOP/s", flops, 2 * flops)


def attention(s):
    """At LightningDiT's sizes, SD3.5's, and SD3.5's at twice the side."""
    for B, A, L, K in (
        (s.B, s.A, s.L, 72),
        (max(s.B // 6, 1), 24, s.S + 333, 64),
        (max(s.B // 32, 1), 24, 4 * s.S + 333, 64),
    ):
        qkv = [randn(B, L, A, K).transpose(1, 2) for _ in range(3)]
        flops = 4 * B * A * L**2 * K
        yield from both_ways(f"attention {(B, A, L, K)}", BACKENDS, qkv, "GFLOP/s", flops, 2 * flops)


def cases(s):
    B, L, E, A, S = s
    hidden = 16 * E // 3                                   # of SwiGLU: both halves
    tokens = 2 * B * L * E                                 # bytes
    tokens_sd3 = 2 * 20 * S * 1536
    image = randn(4, 128, S, S).to(memory_format=torch.channels_last)
    pixels = 2 * image.numel()
    z, z_d = randn(B, 128, 16, 16).split([32, 96], dim=1)
    tables = [randn(L, 72).float(), randn(L, 72).float()]
    norms = [randn(72), randn(72)]
    return [
        Case(add_norm_modulate, add_norm_modulate_ref,
             [randn(B, L, E), randn(B, L, E), randn(B, E), randn(B, E), randn(B, E), randn(E)],
             "GB/s", 4 * tokens, 6 * tokens),
        Case(norm_modulate, norm_modulate_ref,
             [randn(20, S, 1536), randn(20, 1536), randn(20, 1536)],
             "GB/s", 2 * tokens_sd3, 3 * tokens_sd3),
        Case(qknorm_rope, qknorm_rope_ref,
             [randn(B, L, 3, A, 72), *norms, *tables],
             "GB/s", 4 * tokens, 8 * tokens),
        Case(qknorm_rope, qknorm_rope_ref,
             [randn(20, S, 3, 24, 64), randn(64), randn(64)],
             "GB/s", 4 * tokens_sd3, 8 * tokens_sd3),
        Case(groupnorm_silu, groupnorm_silu_ref,
             [image, randn(128), randn(128)],
             "GB/s", 3 * pixels, 5 * pixels),
        Case(patch_embed, patch_embed_ref,
             [z, z_d, randn(E, 32, 1, 1), randn(E, 96, 1, 1), randn(E), randn(1, 256, E)],
             "GB/s", 512 * B * (128 + E), 512 * B * (128 + 3 * E)),
        Case(swiglu, swiglu_ref,
             [randn(B, L, E), randn(hidden, E), randn(hidden)],
             "GFLOP/s", tokens * hidden, 2 * tokens * hidden),
    ]


def both_ways(what, variants, inputs, unit, forward, backward):
    """Two rows of an operation, without and with its backward. Float32 inputs are tables, not trained."""
    leaves = [t.detach().requires_grad_(t.dtype == torch.bfloat16) for t in inputs]
    trained = [t for t in leaves if t.requires_grad]

    douts = {}                                             # of a variant's outputs: made in its first call

    def step(f):
        outputs = [t for t in tree_leaves(f(*leaves)) if t.grad_fn]
        if f not in douts:
            douts[f] = [torch.randn_like(t) for t in outputs]
        torch.autograd.grad(outputs, trained, douts[f])

    once = {name: partial(f, *inputs) for name, f in variants.items()}
    yield what, once, {"unit": unit, "work": forward}
    back = {name: partial(step, f) for name, f in variants.items()}
    yield f"{what}, and back", back, {"unit": unit, "work": forward + backward}


# ---------------------------------------------------------------- models

KINDS = {                                                  # variant: (KERNELS, are `parts` compiled?)
    "plain": ("ref", False),
    "plain, compiled": ("ref", True),
    "auto, compiled": ("auto", True),                      # not compiled, it would be chosen for once more
}
COMPILED = ("plain, compiled",)


def models(parts, f, cuda, kinds=tuple(KINDS), forward=None, recorded=None):
    """Variants of f(): plain PyTorch and what choose.py chooses, with `parts` compiled or not.

    forward:  what f() computes before any backward pass, if it has one: choose.py runs this
    recorded: makes an argument for f with which it runs as one CUDA graph; this adds as many variants again
    """
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    compile_parts = peers.switch(parts, backend(cuda))
    tables = {}                                            # compiled? -> rows, see choose.py

    def run(mode, compiled, *flow):
        kernels.KERNELS = mode
        compile_parts(False)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            if mode == "auto":
                use_table(compiled)
            compile_parts(compiled)
            f(*flow)

    def use_table(compiled):
        for op in kernels.OPERATIONS.values():
            op.chosen.clear()
        if compiled not in tables and choose.possible(device):
            tables[compiled] = choose.choose(forward or f, None, device, compiled)
        trial.adopt(tables.get(compiled, []))

    variants = {name: partial(run, *KINDS[name]) for name in kinds}
    if recorded:
        for name in kinds:
            variants[f"{name}, graph"] = partial(run, *KINDS[name], recorded())
    return variants


def training(cuda):
    """A training step of LightningDiT-XL/1 with 96 detail channels: forward, backward, fused AdamW, EMA."""
    import dit
    from finetune import ema_update
    B = 128 if cuda else 2
    cfg = dit.LightningDiTConfig(D=96) if cuda else dit.LightningDiTConfig(D=96, E=72, A=1, depth=2, grid=4)
    model = dit.LightningDiT(cfg)
    ema = dit.LightningDiT(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    z_all = torch.randn(B, 128, cfg.grid, cfg.grid)
    target = torch.randn(B, 128, cfg.grid, cfg.grid)
    t = torch.rand(B)
    y = torch.randint(1000, (B,))

    def forward():
        return (model(z_all, t, y) - target).square().mean()

    def step():
        loss = forward()
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema_update(ema, model, 0.999)

    work = {"images": B, "flops": 712e9 if cuda else 0}
    yield f"LightningDiT, batch {B}", models(model.blocks, step, cuda, forward=forward), work


def sampling(cuda):
    """DA-VAE on SD3's VAE; then SD3.5-M with guidance, on its latent (D = 16) and on the original's.

    2 of 30 Euler steps; for a single image, also as a CUDA graph. What goals.py judges comes first.
    """
    import davae
    sizes = davae.KLConfig() if cuda else davae.KLConfig(widths=(32, 32, 32, 32), blocks=1)
    vae = davae.DAVAE(davae.AutoencoderKL(sizes), davae.DAVAEConfig(D=16))
    vae = vae.to(memory_format=torch.channels_last)
    side = 1024 if cuda else 32
    batch = 10 if cuda else 3
    yield from decoding(vae, side, cuda)
    yield from sampling_sd3(side, D=16, batch=batch, cuda=cuda)
    yield from sampling_sd3(side, D=16, batch=1, cuda=cuda)
    yield from decoding(vae, 2 * side, cuda)
    yield from sampling_sd3(2 * side, D=16, batch=2, cuda=cuda)
    yield from sampling_sd3(side, D=0, batch=batch, cuda=cuda, kinds=COMPILED)
    yield from sampling_sd3(2 * side, D=0, batch=1, cuda=cuda, kinds=COMPILED)
    yield from encoding(vae, side, cuda)
    yield from encoding(vae, 2 * side, cuda)


def encoding(vae, side, cuda):
    x = torch.randn(1, 3, side, side)
    encoders = [vae.detail_encoder, vae.base.encoder]
    yield f"encode {side} px", models(encoders, partial(vae.encode, x), cuda), {"images": 1}


def decoding(vae, side, cuda):
    z_all = torch.randn(1, 32, side // 16, side // 16)
    decode = torch.no_grad()(partial(vae.decode, z_all))
    variants = models([vae.decoder], decode, cuda) | peers.decoding(side // 8, z_all.device, backend(cuda))
    yield f"decode {side} px", variants, {"images": 1}


def sampling_sd3(side, D, batch, cuda, kinds=tuple(KINDS)):
    """Time MEASURED of STEPS steps; with the time to decode, they give an estimate per image."""
    import dit
    import sample
    small = {} if cuda else dict(E=64, A=1, depth=2, dual=1, context=32)
    model = sample.for_sampling(dit.MMDiT(dit.MMDiTConfig(D=D, **small)))
    grid = sample.time_grid(STEPS, 1 / 3)[:MEASURED + 1]
    h = side // 16 if D else side // 8
    noise = torch.randn(batch, 16 + D, h, h)
    cond = [torch.randn(batch, 333, model.cfg.context), torch.randn(batch, 2048)]

    def run(flow=sample.sample_flow):
        flow(model, noise, grid, cond, cond, scale=4.0, ahead=sample.AHEAD)

    recorded = None
    if cuda and D and batch == 1:
        kinds, recorded = kinds[1:], sample.Recorded
    variants = models(model.blocks, run, cuda, kinds, recorded=recorded)
    variants |= peers.sampling(grid, noise, cond, backend(cuda))
    what = f"SD3.5-M {side} px, {h * h // 4} tokens, {MEASURED} steps of {batch}"
    yield what, variants, {"batch": batch, "decode": f"decode {side} px"}


if __name__ == "__main__":
    main()
