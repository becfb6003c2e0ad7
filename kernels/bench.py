"""Times of the kernels and of the models, against what this machine can do at most:  python -m kernels.bench [--out=bench.json]

Random weights and data; every row's variants alternate, forwards and backwards, in one process, after a warm-up that
compiles; the table has medians with quartiles. Ceilings, measured first: a bfloat16 product of 8192 x 8192 matrices, and a
copy. A section that has used up its time skips the rest, and what fails is a line of text in the table, not the end.
    --device=cpu    the same at toy size, where compiling stops before code generation: a rehearsal, its times mean nothing
Not run on a GPU. On a CPU it takes half a minute; TRITON_INTERPRET=1 interprets the kernels there.
"""
import argparse
import importlib
import json
import time

import torch
import torch.nn.functional as F

import kernels

PEAK = 989e12                                      # bfloat16 FLOP/s that the maker of H100 and H200 states, for MFU
LIMITS = {"ops": 110, "training": 140, "VAE": 80, "sampling": 150}                        # seconds
ROUNDS = 9


def project(name):
    """A module of the project: its imports run one way, kernels first, but a benchmark sits beside what it measures."""
    return importlib.import_module(name)


def failures():
    """What may end an entry and not the run: out of memory, a compiler's complaint (Triton's are no RuntimeError)."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return RuntimeError, ValueError, TypeError, AssertionError
    return RuntimeError, ValueError, TypeError, AssertionError, TritonError


class Bench:
    """The rows of the table, a clock, and the ceilings."""

    def __init__(self, device):
        self.device, self.cuda, self.rows, self.begin, self.failures = device, device == "cuda", [], time.time(), failures()
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for n in [8192 if self.cuda else 256] * 2)
        x = torch.empty(2**30 if self.cuda else 2**20, dtype=torch.int8, device=device)
        y = torch.empty_like(x)
        self.section("ceilings", 30)
        flops, copied = 2 * len(a)**3, 2 * len(x)
        self.flops = flops / self("bf16 product", {"": lambda: a @ b}, flops=flops)[""]
        self.bandwidth = copied / self("copy", {"": lambda: y.copy_(x)}, bytes=copied)[""]

    def section(self, name, limit):
        self.name, self.deadline = name, min(time.time() + limit, self.begin + sum(LIMITS.values()) + 30)

    def attempt(self, f):
        """(result, None), or (None, what went wrong)."""
        if time.time() > self.deadline:
            return None, "skipped: out of time"
        try:
            return f(), None
        except self.failures as error:
            return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"

    def seconds(self, f, repeats=1):
        if self.cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
        else:
            since = time.perf_counter()
        for _ in range(repeats):
            f()
        if not self.cuda:
            return (time.perf_counter() - since) / repeats
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats

    def __call__(self, what, variants, bytes=0, flops=0, images=0, model_flops=0):
        """Time each variant; add its row, with what it moved, computed or made per second.  -> {variant: median seconds}"""
        peak, repeats, times, wrong = {}, {}, {name: [] for name in variants}, {}
        for name, f in variants.items():
            _, wrong[name] = self.attempt(f)
            if not wrong[name]:
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                second, wrong[name] = self.attempt(lambda: self.seconds(f))
                repeats[name] = max(1, int(2e-3 / second)) if second else 1     # a sample is 2 ms at least
                peak[name] = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        for n in range(ROUNDS):
            for name in [name for name in variants if not wrong[name]][::-1 if n % 2 else 1]:
                took, problem = self.attempt(lambda: self.seconds(variants[name], repeats[name]))
                times[name] += [took] if took else []
                wrong[name] = None if times[name] else problem
        medians = {}
        for name in variants:
            row = dict(section=self.name, what=what, variant=name, error=wrong[name])
            if times[name]:
                low, s, high = torch.tensor(times[name]).double().quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
                medians[name], row["ms"], row["GiB"] = s, [1e3 * t for t in (s, low, high)], peak[name]
                rates = {"GB/s": bytes / s / 1e9, "TFLOP/s": flops / s / 1e12, "img/s": images / s, "MFU": model_flops / s / PEAK}
                row |= {unit: rate for unit, rate in rates.items() if rate}
                if hasattr(self, "bandwidth") and (bytes or flops):
                    row["of ceiling"] = max(bytes / s / self.bandwidth, flops / s / self.flops)
            self.rows.append(row)
        return medians

    def models(self, parts, f, extra=()):
        """Variants of f(): as it is, with `parts` compiled, and compiled around the kernels."""
        torch._dynamo.config.recompile_limit = 64
        for part in parts:
            part.compile(backend="inductor" if self.cuda else "aot_eager")

        def run(stance, mode):
            kernels.KERNELS = mode
            try:
                with torch.compiler.set_stance(stance):
                    return f()
            finally:
                kernels.KERNELS = "ref"
        return {"plain": lambda: run("force_eager", "ref"), "plain, compiled": lambda: run("default", "ref"),
                "kernels, compiled": lambda: run("default", "triton")}


def operations(bench):
    """Each kernel, its specification (for attention: PyTorch's), and that compiled; forward, and forward and backward."""
    b, e = (1, 1) if bench.cuda else (64, 16)      # toy sizes: that much smaller

    def randn(*shape):
        return torch.randn(shape, device=bench.device, dtype=torch.bfloat16)

    def angles(L, K):
        return [torch.rand(L, K, device=bench.device) for _ in range(2)]

    B, L, E, A, S = 128 // b, 256 // e, 1152 // e, 16 // e, 1024 // e
    image = randn(4, 128, S, S).contiguous(memory_format=torch.channels_last)
    u, v = 2 * B * L * E, 20 * S * 1536 // e * 2   # bytes of LightningDiT's and SD3.5's tokens
    cases = [                                      # op, inputs, bytes of the forward and the backward, FLOPs of the forward
        ("norm_modulate", [randn(B, L, E), randn(B, E), randn(B, E), randn(E), randn(B, L, E), randn(B, E)], 4 * u, 6 * u, 0),
        ("norm_modulate", [randn(20, S, 1536 // e), *(randn(20, 1536 // e) for _ in "ab")], 2 * v, 3 * v, 0),
        ("qknorm_rope", [randn(B, L, 3, A, 72), randn(72), randn(72), *angles(L, 72)], 4 * u, 12 * u, 0),
        ("qknorm_rope", [randn(20, S, 3, 24 // e + 1, 64), randn(64), randn(64)], 4 * v, 12 * v, 0),
        ("attention", list(randn(B, L, 3, A, 72).permute(2, 0, 3, 1, 4)), 0, 0, 4 * B * A * L * L * 72),
        ("groupnorm_silu", [image, randn(128), randn(128)], 3 * 2 * image.numel(), 5 * 2 * image.numel(), 0),
        ("patch_embed", [randn(B, 32, 16, 16), randn(B, 96, 16, 16), randn(E, 32, 1, 1), randn(E, 96, 1, 1), randn(E),
                         randn(1, 256, E)], 2 * B * 256 * (128 + E), 2 * B * 256 * (128 + 3 * E), 0)]
    for op, inputs, forward, backward, flops in cases:
        module = project(f"kernels.{op}")
        ref = F.scaled_dot_product_attention if op == "attention" else getattr(module, f"{op}_ref")
        compiled = torch.compile(ref, backend="inductor" if bench.cuda else "aot_eager", dynamic=False)
        functions = {"ref": ref, "ref, compiled": compiled, "kernel": getattr(module, op)}
        what = f"{op} {'x'.join(map(str, inputs[0].shape))}"
        kernels.KERNELS = "triton"                 # on a CPU that is not interpreting, the kernel is its specification
        bench(what, {name: lambda f=f: f(*inputs) for name, f in functions.items()}, bytes=forward, flops=flops)
        leaves = [t.detach().requires_grad_(t.dtype == torch.bfloat16) for t in inputs]
        trained = [t for t in leaves if t.requires_grad]

        def step(f):
            out = [t for t in (lambda o: [o] if isinstance(o, torch.Tensor) else o)(f(*leaves)) if t.requires_grad]
            torch.autograd.grad(out, trained, [torch.ones_like(t) for t in out], allow_unused=True)

        bench(f"{what}, and backward", {name: lambda f=f: step(f) for name, f in functions.items()}, bytes=forward + backward,
              flops=3.5 * flops)
        kernels.KERNELS = "ref"


def training(bench):
    """A training step of LightningDiT-XL/1 with 96 detail channels: forward, backward, fused AdamW, EMA."""
    dit, B = project("dit"), 128 if bench.cuda else 2
    cfg = dit.DiTConfig(D=96) if bench.cuda else dit.DiTConfig(C=4, D=12, grid=4, E=72, A=1, depth=2)
    with torch.device("meta"):
        inputs = torch.empty(1, cfg.C + cfg.D, cfg.grid, cfg.grid), torch.empty(1), torch.zeros(1, dtype=torch.long)
        _, flops, _ = project("sample").cost(dit.LightningDiT(cfg), inputs)
    model, ema = (dit.LightningDiT(cfg).to(bench.device) for _ in range(2))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    z_all, target = (torch.randn(B, cfg.C + cfg.D, cfg.grid, cfg.grid, device=bench.device) for _ in range(2))
    t, y = torch.rand(B, device=bench.device), torch.randint(cfg.num_classes, (B,), device=bench.device)

    def step():
        with torch.autocast(bench.device, torch.bfloat16):
            loss = (model(z_all, t, y) - target).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        project("common").ema_update(ema, model, 0.999)

    bench(f"LightningDiT, batch {B}, forward, backward, AdamW, EMA", bench.models(model.blocks, step), images=B,
          model_flops=B * flops)


def autoencoder(bench):
    """Encode and decode with a DA-VAE on SD3's VAE.  -> {pixels: {variant: seconds of decoding an image}}"""
    davae, decoded = project("davae"), {}
    base = davae.AutoencoderKL(davae.KLConfig() if bench.cuda else davae.KLConfig(ch=32, ch_mult=(1, 1, 1, 1), blocks=1))
    vae = davae.DAVAE(base, 16).to(bench.device, memory_format=torch.channels_last).eval()
    for side in (1024, 2048) if bench.cuda else (32, 64):
        x, z = (torch.randn(4 * 1024 // max(side, 1024) if bench.cuda else 1, *shape, device=bench.device)
                for shape in ((3, side, side), (32, side // 16, side // 16)))

        @torch.no_grad()
        def run(f, x):
            with torch.autocast(bench.device, torch.bfloat16):
                return f(x)

        bench(f"encode {len(x)} x {side}", bench.models([vae.detail_encoder, base.encoder], lambda: run(vae.encode, x)),
              images=len(x))
        times = bench(f"decode {len(z)} x {side}", bench.models([vae.decoder], lambda: run(vae.decode, z)), images=len(z))
        decoded[side] = {name: s / len(z) for name, s in times.items()}
    return decoded


def sampling(bench, decoded):
    """SD3.5-M with guidance: two Euler steps are timed; img/s is of 30 such steps and the decoding."""
    dit, sample, steps = project("dit"), project("sample"), 2
    small = dict(E=64, A=1, depth=3, dual=1, context=32, pooled=16, pos_size=16)
    for side in decoded:
        for D, f in ((16, 16), (0, 8)):            # DA-VAE's latent, and the original's, with four times the tokens
            B, h = (10 if side == 1024 else 2) if bench.cuda else 1, side // f
            cfg = dit.MMDiTConfig(D=D, **({} if bench.cuda else small))
            model = dit.MMDiT(cfg).to(bench.device).eval()
            noise, context, pooled = (torch.randn(B, *shape, device=bench.device)
                                      for shape in ((16 + D, h, h), (333, cfg.context), (cfg.pooled,)))

            def run():
                with torch.autocast(bench.device, torch.bfloat16):
                    sample.sample_flow(model, noise, sample.time_grid(30, 1 / 3)[:steps + 1], (context, pooled),
                                       (context, pooled), 4.0)

            times = bench(f"SD3.5-M {side} px, {h * h // 4} tokens, {steps} steps of {B}", bench.models(model.blocks, run))
            for row in bench.rows[-3:]:
                if row["variant"] in times and row["variant"] in decoded[side]:
                    row["img/s of 30 steps and decoding"] = 1 / (times[row["variant"]] / B / steps * 30 + decoded[side][row["variant"]])


def table(rows):
    """The rows as markdown."""
    lines = ["| section | what | variant | ms (quartiles) | rate | of ceiling | GiB |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        ms = "{:.3f} ({:.3f} to {:.3f})".format(*r["ms"]) if "ms" in r else r["error"]
        rate = ", ".join(f"{r[k]:.3g} {k}" for k in r if "/s" in k or k == "MFU")
        lines.append(f"| {r['section']} | {r['what']} | {r['variant']} | {ms} | {rate} | "
                     f"{format(r['of ceiling'], '.0%') if 'of ceiling' in r else ''} | {r.get('GiB', 0):.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", default="", help="a JSON file for the same numbers")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device=cpu rehearses at toy size")
    bench, decoded = Bench(args.device), {}
    for name, part in (("ops", operations), ("training", training), ("VAE", autoencoder), ("sampling", sampling)):
        bench.section(name, LIMITS[name])
        result, problem = bench.attempt(lambda: part(bench, decoded) if part is sampling else part(bench))
        decoded = result or decoded
        if problem:
            bench.rows.append(dict(section=name, what="", variant="", error=problem))
    where = torch.cuda.get_device_name() if bench.cuda else "a CPU, toy sizes: a rehearsal, not a measurement"
    head = f"{where}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {time.time() - bench.begin:.0f} s"
    if args.out:
        with open(args.out, "w") as f:
            json.dump({"machine": head, "rows": bench.rows}, f, indent=1)
    print(f"{head}\n\n{table(bench.rows)}")


if __name__ == "__main__":
    main()
