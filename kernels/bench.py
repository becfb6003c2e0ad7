"""Times of the kernels and of the models, against what this machine can do at most:  python -m kernels.bench [--out=bench.json]

Random weights and data; the variants of a row alternate, in one process, after a warm-up; medians with quartiles. Ceilings,
measured first: a bfloat16 product of 8192 x 8192 matrices, and a copy. Operations are timed as CUDA graphs of ten calls. A
section that has used up its time skips the rest; what fails is a line of text in the table, not the end.  --device=cpu: the
same at toy size, compiled without code generation, and without TRITON_INTERPRET=1 the kernels are their specifications: a
rehearsal, its times mean nothing.  Not run on a GPU.
"""
import argparse, importlib, json, pathlib, time
from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
import triton

import kernels

PEAK = 989e12                                      # bfloat16 FLOP/s that the maker of H100 and H200 states, for MFU
project = importlib.import_module   # imports in this house run one way, kernels first; a benchmark sits beside what it measures

def measure(variants, cuda, deadline, graphs=False):
    """For each variant {"ms": (median, quartiles), "GiB"}, or {"error"}; graphs: time recordings of ten calls, not Python."""
    rows, times = {name: {"repeats": 1, "calls": 1} for name in variants}, {name: [] for name in variants}
    for n in range(11 if cuda else 3):             # the first round compiles, the second finds how often 5 ms hold the call
        for name, row in list(rows.items())[::-1 if n % 2 else 1]:
            if "error" in row or time.time() > deadline:
                continue
            try:
                torch.cuda.reset_peak_memory_stats() if cuda else None
                since = time.perf_counter()
                for _ in range(row["repeats"]):
                    variants[name]()
                torch.cuda.synchronize() if cuda else None
                ms = (time.perf_counter() - since) / row["repeats"] * 1e3
                times[name].append(ms / row["calls"])
                row |= {"GiB": torch.cuda.max_memory_allocated() / 2**30} if cuda else {}
                row["repeats"] = 1 + int(5 / ms)
                if graphs and n == 0:
                    graph, call, row["calls"], row["repeats"] = torch.cuda.CUDAGraph(), variants[name], 10, 1
                    with torch.cuda.graph(graph):
                        for _ in range(10):
                            call()
                    variants[name] = graph.replay
            except (RuntimeError, ValueError, TypeError, AssertionError, triton.errors.TritonError) as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:90]!r}"
    return {name: row | ({"ms": torch.tensor(t[2:]).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist()} if len(t) > 2 else
            {"error": row.get("error", "skipped: out of time")}) for (name, row), t in zip(rows.items(), times.values())}

def models(parts, f, cuda, recorded=None):
    """Variants of f(): as it is, with `parts` compiled, and compiled around the kernels. recorded: a function that makes what
    f takes to do the same as one CUDA graph, in three more variants."""
    def run(stance, mode, *flow):
        kernels.KERNELS = mode
        with torch.compiler.set_stance(stance), torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, cache_enabled=False):
            f(*flow)
    for part in parts:
        part.compile(backend="inductor" if cuda else "aot_eager", dynamic=False)
    kinds = {"plain": ("force_eager", "ref"), "plain, compiled": ("default", "ref"), "kernels, compiled": ("default", "triton")}
    return {name: partial(run, *kind) for name, kind in kinds.items()} | {
        f"{name}, graph": partial(run, *kind, recorded()) for name, kind in kinds.items() if recorded}

def both_ways(what, variants, inputs, unit, forward, backward):
    """Variants of an operation, without and with their backward: rows of `operations`. inputs: tables are in float32."""
    leaves = [t.detach().requires_grad_(t.dtype == torch.bfloat16) for t in inputs]

    def step(f):
        out = [t for t in torch.utils._pytree.tree_leaves(f(*leaves)) if t.grad_fn]
        torch.autograd.grad(out, [t for t in leaves if t.requires_grad], [torch.ones_like(t) for t in out])
    yield what, {k: partial(f, *inputs) for k, f in variants.items()}, {"unit": unit, "work": forward}
    yield f"{what}, and back", {k: partial(step, f) for k, f in variants.items()}, {"unit": unit, "work": forward + backward}

def operations(cuda):
    """The ceilings; PyTorch's attention by each of its backends; each kernel, its specification (with PyTorch's attention),
    and that compiled. Like each section this yields what is measured, its variants, and the work of a call."""
    randn, n = partial(torch.randn, dtype=torch.bfloat16), 8192 if cuda else 256
    (a, b), (x, y) = randn(2, n, n), torch.empty(2, 16 * n * n, dtype=torch.int8)
    yield "bfloat16 product", {"": lambda: a @ b}, {"unit": "GFLOP/s", "work": 2 * n**3}
    yield "copy", {"": lambda: y.copy_(x)}, {"unit": "GB/s", "work": 2 * len(x)}
    B, L, E, A, S = (128, 256, 1152, 16, 1024) if cuda else (2, 16, 72, 1, 32)            # S: SD3.5's tokens, the image's side
    sdpa, backends, kernels.KERNELS = F.scaled_dot_product_attention, torch.nn.attention.SDPBackend, "triton"
    for shape in ((B, A, L, 72), (B // 6 or 1, 24, S + 333, 64), (B // 32 or 1, 24, 4 * S + 333, 64)):
        variants = {name: torch.nn.attention.sdpa_kernel(getattr(backends, name))(lambda *qkv: sdpa(*qkv))
                    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")}
        flops = 4 * shape[0] * shape[1] * shape[2]**2 * shape[3]
        yield from both_ways(f"PyTorch's attention {shape}", variants, randn(3, *shape), "GFLOP/s", flops, 2 * flops)
    tables, image = randn(2, L, 72).float(), randn(4, 128, S, S).to(memory_format=torch.channels_last)
    u, v, i = (2 * n for n in (B * L * E, 20 * S * 1536, image.numel()))                  # bytes of tokens, and of the image
    norm_rope = project("kernels.qknorm_rope").qknorm_rope_ref
    for op, inputs, forward, backward in [         # and the bytes, or with products in it the FLOPs, of each pass
            ("norm_modulate", [randn(B, L, E), randn(B, E), randn(B, E), randn(E), randn(B, L, E), randn(B, E)], 4 * u, 6 * u),
            ("norm_modulate", [randn(20, S, 1536), randn(20, 1536), randn(20, 1536)], 2 * v, 3 * v),
            ("swiglu", [randn(B, L, E), randn(16 * E // 3, E), randn(16 * E // 3)], u * 16 * E // 3, u * 32 * E // 3),
            ("attention", [randn(B, L, 3, A, 72), randn(72), randn(72), *tables], 2 * u * L, 4 * u * L),
            ("qknorm_rope", [randn(B, L, 3, A, 72), randn(72), randn(72), *tables], 4 * u, 12 * u),
            ("qknorm_rope", [randn(20, S, 3, 24, 64), randn(64), randn(64)], 4 * v, 12 * v),
            ("groupnorm_silu", [image, randn(128), randn(128)], 3 * i, 5 * i),
            ("patch_embed", [*randn(B, 128, 16, 16).split([32, 96], 1), *randn(E, 128, 1, 1).split([32, 96], 1), randn(E),
                             randn(1, 256, E)], 512 * B * (128 + E), 512 * B * (128 + 3 * E))]:
        module = project(f"kernels.{op}")
        ref = getattr(module, f"{op}_ref") if op != "attention" else lambda *x: sdpa(*norm_rope(*x)).transpose(1, 2)
        compiled = torch.compile(ref, backend="inductor" if cuda else "aot_eager", dynamic=False)
        variants = {"ref": ref, "ref, compiled": compiled, "kernel": getattr(module, op)}
        unit = "GFLOP/s" if op in ("swiglu", "attention") else "GB/s"
        yield from both_ways(f"{op} {tuple(inputs[0].shape)}", variants, inputs, unit, forward, backward)

def training(cuda):
    """A training step of LightningDiT-XL/1 with 96 detail channels: forward, backward, fused AdamW, EMA."""
    dit, B = project("dit"), 128 if cuda else 2
    cfg = dit.DiTConfig(D=96) if cuda else dit.DiTConfig(D=96, E=72, A=1, depth=2, grid=4)
    model, ema = dit.LightningDiT(cfg), dit.LightningDiT(cfg)
    (z_all, target), t, y = torch.randn(2, B, 128, cfg.grid, cfg.grid), torch.rand(B), torch.randint(1000, (B,))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step():
        (model(z_all, t, y) - target).square().mean().backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        dit.ema_update(ema, model, 0.999)
    yield f"LightningDiT, batch {B}", models(model.blocks, step, cuda), {"images": B, "cost": 712e9 * cuda}       # FLOPs

def sampling(cuda):
    """DA-VAE on SD3's VAE; then SD3.5-M with guidance on its latent (D = 16) and on the original's: 2 of 30 Euler steps; and
    with one image, recorded as a CUDA graph too."""
    davae, dit, sample = map(project, ("davae", "dit", "sample"))
    base = davae.AutoencoderKL(davae.KLConfig() if cuda else davae.KLConfig(ch=32, ch_mult=(1, 1, 1, 1), blocks=1))
    vae = davae.DAVAE(base, 16).to(memory_format=torch.channels_last)
    sizes, small = (((1024, 10), (2048, 2)), {}) if cuda else (((32, 1),), dict(E=64, A=1, depth=2, dual=1, context=32))
    for side, B in sizes:
        x, z_all, parts = torch.randn(1, 3, side, side), torch.randn(1, 32, side // 16, side // 16), [vae.decoder]
        yield f"encode {side} px", models([vae.detail_encoder, base.encoder], lambda: vae.encode(x), cuda), {"images": 1}
        yield f"decode {side} px", models(parts, torch.no_grad()(lambda: vae.decode(z_all)), cuda), {"images": 1}
        for D, h, n in ((16, side // 16, B), (16, side // 16, 1), (0, side // 8, B)):
            model, grid = sample.for_sampling(dit.MMDiT(dit.MMDiTConfig(D=D, **small))), sample.time_grid(30, 1 / 3)[:3]
            noise, *cond = torch.randn(n, 16 + D, h, h), torch.randn(n, 333, model.cfg.context), torch.randn(n, 2048)

            def run(flow=sample.sample_flow):
                flow(model, noise, grid, cond, cond, 4.0, (0.0, 1.0), None, 0.0, (), sample.AHEAD)
            variants = models(model.blocks, run, cuda, sample.Recorded if cuda and n == 1 else None)
            what = f"SD3.5-M {side} px, {h * h // 4} tokens, 2 steps of {n}"
            yield what, variants, {"batch": n, "decode": f"decode {side} px"}

def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", default="bench.json")
    args = parser.parse_args()
    begin, rows, known, torch._dynamo.config.recompile_limit = time.time(), [], {}, 64
    for part, limit in ((operations, 140), (training, 120), (sampling, 230)):                  # seconds
        deadline = time.time() + limit
        torch.set_default_device(args.device)
        for what, variants, work in part(args.device == "cuda"):
            torch.set_default_device(None)         # it would cost time in each operation
            cuda = args.device == "cuda"
            for name, row in measure(variants, cuda, deadline, graphs=cuda and part is operations).items():
                rows.append({"section": part.__name__, "what": what, "variant": name} | row)
                if "ms" in row:
                    known[what, name] = s = row["ms"][0] / 1e3
                    w = defaultdict(float, work)   # 15 calls of sampling, then decoding, are an image: an estimate
                    decode = known.get((w["decode"], name.removesuffix(", graph")), float("inf"))
                    done, image = w["work"] / s, 15 * s / max(w["batch"], 1) + decode
                    rates = {w["unit"]: done / 1e9, "of the ceiling": done / known.setdefault(w["unit"], done or 1),
                             "img/s": w["images"] / s, "MFU": w["images"] * w["cost"] / s / PEAK, "img/s (estimate)": 1 / image}
                    rows[-1] |= {k: v for k, v in rates.items() if v}
            torch.set_default_device(args.device)
    torch.set_default_device(None)
    where = torch.cuda.get_device_name() if cuda else "a CPU at toy size: a rehearsal, not a measurement"
    head = f"{where}; torch {torch.__version__}, triton {triton.__version__}; {time.strftime('%Y-%m-%d')}"
    pathlib.Path(args.out).write_text(json.dumps({"machine": head, "rows": rows}, indent=1))
    print(f"{head}, {time.time() - begin:.0f} s\n\n| what | variant | ms (quartiles) | rate | GiB |\n|---|---|---|---|---|")
    for r in rows:
        ms = "{:.3f} ({:.3f} to {:.3f})".format(*r["ms"]) if "ms" in r else r["error"]
        rate = ", ".join(f"{r[k]:.3g} {k}" for k in r if k in ("MFU", "of the ceiling") or "/s" in k)
        print(f"| {r['what']} | {r['variant']} | {ms} | {rate} | {r.get('GiB', 0):.1f} |")

if __name__ == "__main__":
    main()
