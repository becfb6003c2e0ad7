"""Make images with a run of finetune.py: Euler's method on the flow from noise (t = 0) to data (t = 1).

    python sample.py out/tiny --n=100 --cfg=2
    python sample.py out/sd35m-1024 --prompts="a red fox|a lighthouse" --text=sd3.5-medium --height=1024 --width=1536
    python sample.py text sd3.5-medium --out=out/text --data_dir=photos     # only encode texts: captions, or --prompts=
    python sample.py export out/sd35m-1024 --out=exported                   # back to the formats that other programs read
    torchrun --nproc_per_node=8 -- sample.py out/imagenet512 --n=50000 --steps=249 --cfg=4 --cfg_start=0.2 --shift=0.3

Writes to --out: 000000.png ..., grid.png (one row per class), base_preview.png (the same latents through the base decoder
alone), samples.npz (arr_0, uint8 NHWC, as guided-diffusion's evaluator reads it) and settings.json. A folder that is
half full is continued. Image i depends on (seed, i) only, not on the batch size or the number of processes.

Texts are encoded once, into a folder of safetensors shards, by the three encoders of a diffusers SD3.5 folder (transformers
is needed for that alone); training and sampling read the shards, so T5 and the transformer never share a GPU.
"""
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import tree_map
from tqdm import tqdm

from dit import MMDiT, merge_lora
from support import config, data, figures, ranks, runs
from support.config import field
from support.text import TextConfig, main_text, read_prompts, text_for
from support.weights import ExportConfig, load_run, main_export


@dataclass
class Config:
    run: str = field("out/tiny", "a run of finetune.py, or one of its step folders")
    out: str = field("", "folder for the images; empty: <run>/samples")
    n: int = field(50, "images")
    batch_size: int = field(50, "images per forward pass and process")
    seed: int = field(0, "of the noise")
    classes: tuple = field((), "class ids to draw, in turn; empty: all of them")
    prompts: str = field("", "SD3.5: texts separated by |, or a file with one a line; empty: the first the run was trained on")
    negative: str = field("", "SD3.5: the text that guidance leads away from")
    text: str = field("", "SD3.5: text shards, or a diffusers SD3.5 folder whose encoders make them first; empty: the run's")
    height: int = field(0, "pixels, SD3.5 only; 0: the run's image_size")
    width: int = field(0, "see height")
    steps: int = field(50, "Euler steps = model evaluations (LightningDiT's '250 steps' are 249)")
    shift: float = field(-1.0, "s of shift_time, 1: an even grid; negative: what the run was set up with")
    grid: str = field("", "plain, or sd3: shifted twice at the end, as diffusers does; empty: what the run was set up with")
    cfg: float = field(-1.0, "guidance scale, 1: none; negative: what the run was set up with")
    cfg_start: float = field(0.0, "guidance is on where cfg_start <= t <= cfg_end")
    cfg_end: float = field(1.0, "see cfg_start")
    cfg_channels: int = field(0, "guide the first channels only; 0: all. 3 reproduces LightningDiT's published figures")
    slg: float = field(0.0, "SD3.5: scale of skip-layer guidance, of blocks 7, 8, 9 in early steps; Stability AI uses 2.5")
    compile: bool = field(False, "torch.compile the transformer's blocks and the decoder: for many images on a GPU; not run")
    graph: bool = field(False, "record the Euler loop as one CUDA graph, for small batches, bound by launches; not run")
    weights: str = field("ema", "ema or model")
    device: str = field("auto", "auto, cpu or cuda")

# ---------------------------------------------------------------- the sampler

AHEAD = 256         # steps x images whose modulations are computed at once: 0.1 GB for LightningDiT-XL, 0.3 GB for SD3.5 Medium

def shift_time(t, s):
    """t' = s t / (1 - t + s t): s < 1 spends more steps near the noise, s = 1 changes nothing, 0 and 1 stay.

    SD3's "shift 3.0" is s = 1/3 here, where time runs the other way; LightningDiT's 0.3 is 0.3.
    """
    return s * t / (1 - t + s * t)

def time_grid(steps, shift=1.0, twice=False):
    """steps + 1 floats from 0 to 1, computed in float64 and kept as Python numbers, so that no step waits for a GPU.

    twice: as diffusers' SD3 scheduler, which shifts the last of its 1000 training times once more with the whole grid:
    the last step is then shorter than on the plain grid, and begins at the same t (0.991 with SD3's shift) for any `steps`.
    """
    if twice:
        even = torch.linspace(0, shift_time(0.999, shift), steps, dtype=torch.float64)
        return shift_time(even, shift).tolist() + [1.0]
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()

def guided_velocity(model, x, t, cond, uncond, scale, channels=None, **known):
    """(v, c): v = u + scale * (c - u) on the first `channels` channels (None: all), c on the others; c is unguided.

    x: (B, C+D, h, w), t: (B,); cond and uncond: tuples of (B, ...) tensors, what the model takes after x and t (labels; or
    text tokens and pooled text). One batch of 2B, c first. known: passed on to the model.
    """
    c, u = model(torch.cat([x, x]), torch.cat([t, t]), *map(torch.cat, zip(cond, uncond)), **known).chunk(2)
    k = channels or x.shape[1]
    return torch.cat([u[:, :k] + scale * (c[:, :k] - u[:, :k]), c[:, k:]], dim=1), c

def look_ahead(model, times, y, rows):
    """For one time after the other, {"mods": the model's modulations at it for y (B, ...)}, so many times at once that `rows`
    rows are computed; {} each time, without computing anything, where rows is 0."""
    group = max(1, rows // len(y))
    for some in (times[k:k + group] for k in range(0, len(times), group)):
        if rows:
            t = torch.cat([torch.full((len(y),), now, dtype=torch.float64, device=y.device) for now in some])
            mods = model.modulations(t, torch.cat([y] * len(some)))
        yield from ({"mods": tree_map(lambda m: m[i * len(y):][:len(y)], mods)} if rows else {} for i in range(len(some)))

@torch.no_grad()
def sample_flow(model, noise, ts, cond, uncond=None, scale=1.0, interval=(0.0, 1.0), channels=None, slg=0.0, skip=(7, 8, 9),
                ahead=0):
    """Integrate dx/dt = v(x, t) from noise by Euler's method on the grid `ts`, guided where interval[0] <= t <= interval[1].

    noise: (B, C+D, h, w); ts: increasing floats, 0 to 1; cond, uncond: see guided_velocity; returns the latent at ts[-1],
    float32. Outside the interval, and with scale 1, the unconditional pass is not computed at all: len(ts) - 1 passes of B
    plus one per guided step. slg: skip-layer guidance (Stability AI, for SD3.5), v += slg * (c - c without the blocks
    `skip`) in steps 0.01 N < n < 0.2 N: one more pass in each of them. ahead: see look_ahead's rows; 0, as models that are
    no DiT or are sharded need it: none. Nothing here waits for the device, so that a CUDA graph can record it.
    """
    x, N, guided = noise, len(ts) - 1, [scale != 1.0 and interval[0] <= t <= interval[1] for t in ts[:-1]]
    ys = [torch.cat([c[-1] for c in conds]) if ahead else x for conds in ((cond,), (cond, uncond or cond))]
    known = [look_ahead(model, [t for t, on in zip(ts, guided) if on == kind], y, ahead) for kind, y in enumerate(ys)]
    for n, (now, following) in enumerate(zip(ts[:-1], ts[1:])):
        t = torch.full((len(x),), now, dtype=torch.float64, device=x.device)
        if guided[n]:
            v, c = guided_velocity(model, x, t, cond, uncond, scale, channels, **next(known[1]))
        else:
            v = c = model(x, t, *cond, **next(known[0]))
        if slg and 0.01 * N < n < 0.2 * N:
            v = v + slg * (c - model(x, t, *cond, skip=skip))
        x = x + (following - now) * v
    return x

class Recorded:
    """sample_flow as one CUDA graph, recorded by the first call and replayed by those whose shapes and numbers are the same."""
    graph = None

    def __call__(self, model, noise, ts, cond, uncond, *rest):
        tensors, n = [noise, *cond, *uncond], 1 + len(cond)
        call = [x.shape for x in tensors], ts, rest
        if self.graph is None:
            first = sample_flow(model, noise, ts, cond, uncond, *rest)     # compiles, and sets up what may not be recorded
            self.call, self.inputs, self.graph = call, [x.clone() for x in tensors], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.x = sample_flow(model, self.inputs[0], ts, self.inputs[1:n], self.inputs[n:], *rest)
            return first
        if call != self.call:
            return sample_flow(model, noise, ts, cond, uncond, *rest)
        for x, new in zip(self.inputs, tensors):
            x.copy_(new)
        self.graph.replay()
        return self.x.clone()

def sample_noise(seed, indices, shape):
    """Standard normal (len(indices), *shape), row i from a generator seeded with (seed, indices[i]) alone.

    NumPy's, because torch's CPU generator keeps 32 bits of a seed: too few for one seed per pair.
    """
    rows = [np.random.default_rng((seed, int(i))).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))

def sample_labels(indices, classes):
    """Label of sample i: the classes in turn, so that any n is as balanced as it can be."""
    return torch.tensor([classes[int(i) % len(classes)] for i in indices])

# ---------------------------------------------------------------- text

# ---------------------------------------------------------------- the script

def settings_of(cfg, config, checkpoint):
    """Everything the images depend on, with the run's own defaults filled in.  raises: SystemExit on impossible values."""
    own, names = config["config"], ("steps", "seed", "weights", "cfg_start", "cfg_end", "cfg_channels")
    values = dict(checkpoint=str(checkpoint), **{k: getattr(cfg, k) for k in names},
                  shift=own["shift"] if cfg.shift < 0 else cfg.shift, cfg=own["cfg"] if cfg.cfg < 0 else cfg.cfg)
    if cfg.n < 1 or cfg.steps < 1 or values["shift"] == 0 or not values["cfg"] < float("inf"):
        raise SystemExit(f"n={cfg.n}, steps={cfg.steps}, shift={values['shift']}, cfg={values['cfg']}: wanted n and steps of "
                         "at least 1, shift above 0 and a finite cfg")
    values["grid"] = getattr(cfg, "grid", "") or own.get("grid", "plain")
    if values["grid"] not in ("plain", "sd3"):
        raise SystemExit(f"--grid={values['grid']!r}: wanted plain or sd3")
    if "context" in config["model"]:               # an MMDiT
        size = {k: getattr(cfg, k, 0) or own["image_size"] for k in ("height", "width")}
        prompts = read_prompts(getattr(cfg, "prompts", "")) or config["classes"]
        if not prompts:
            raise SystemExit(f"{checkpoint}: draws from text: give --prompts=")
        return values | size | dict(prompts=prompts, negative=getattr(cfg, "negative", ""), slg=getattr(cfg, "slg", 0.0))
    classes = list(cfg.classes) or list(range(config["model"]["num_classes"]))
    if max(classes) > config["model"]["num_classes"]:
        raise SystemExit(f"class {max(classes)} asked for; the model has classes 0 to {config['model']['num_classes'] - 1} "
                         f"({config['model']['num_classes']} draws without a class)")
    return values | dict(classes=classes, height=own["image_size"], width=own["image_size"])

def conditions(dit, indices, s, text=None):
    """(cond, uncond) of samples `indices`, as `sample_flow` takes them: labels, or text tokens and pooled text."""
    if isinstance(dit, MMDiT):
        prompts = [s["prompts"][i % len(s["prompts"])] for i in indices]
        return text(prompts), text([s["negative"]] * len(prompts))
    y = sample_labels(indices, s["classes"]).to(dit.P.weight.device)
    return (y,), (torch.full_like(y, dit.cfg.num_classes),)

@torch.no_grad()
def for_sampling(dit):
    """Merge adapters, in place, and round the weights that autocast would round in each pass: it gives the same velocities."""
    for layer in (merge_lora(dit) if isinstance(dit, MMDiT) else dit).modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.bfloat16()
    return dit

def prepare(dit, vae, cfg, device):
    """Make models ready for many batches, as cfg.compile and cfg.graph say; returns what `generate` takes as `flow`."""
    if cfg.graph and device.type != "cuda":
        raise SystemExit("--graph=True: wanted a GPU; leave it out")
    if device.type == "cuda":
        for_sampling(dit)
    for part in [*dit.blocks, vae.decoder if vae.D else vae.base.decoder] if cfg.compile else ():
        part.compile(dynamic=False)
    return Recorded() if cfg.graph else sample_flow

def generate(dit, vae, indices, s, text=None, flow=sample_flow):
    """(images, previews): samples `indices` through the whole decoder and through the base decoder, in [-1, 1].

    s: see `settings_of`; text: a TextCache, for an MMDiT; flow: see `prepare`.
    raises: SystemExit where height or width do not fit the model.
    """
    device, side = dit.P.weight.device, vae.f * dit.cfg.p
    if s["height"] % side or s["width"] % side:
        raise SystemExit(f"{s['height']}x{s['width']} pixels: both must be multiples of {side}")
    noise = sample_noise(s["seed"], indices, (vae.C + dit.cfg.D, s["height"] // vae.f, s["width"] // vae.f))
    ahead = 0 if hasattr(dit.P.weight, "full_tensor") else AHEAD           # a sharded model's adaLN layers are not whole
    # A graph would keep the addresses of autocast's cache of rounded weights, which goes with this context.
    low = torch.autocast(device.type, torch.bfloat16, device.type == "cuda", cache_enabled=flow is sample_flow)
    with torch.no_grad(), low:
        z_all = flow(dit, noise.to(device), time_grid(s["steps"], s["shift"], s["grid"] == "sd3"),
                     *conditions(dit, indices, s, text), s["cfg"], (s["cfg_start"], s["cfg_end"]), s["cfg_channels"] or None,
                     s.get("slg", 0.0), (7, 8, 9), ahead)
        # a few at a time: the decoder's activations are the largest there are
        base = torch.cat([vae.decode_base(z[:, :vae.C]) for z in z_all.split(8)]).float().clamp(-1, 1)
        full = torch.cat([vae.decode(z) for z in z_all.split(8)]).float().clamp(-1, 1) if dit.cfg.D or not vae.D else base
    return full, base

def text_of(cfg, config, settings, out, rank, device):
    """What `generate` takes as `text`: a TextCache of the prompts, or None for a model of classes."""
    if "context" not in config["model"]:
        return None
    own, prompts = config["config"], [*settings["prompts"], settings["negative"]]
    return text_for(cfg.text or own["text"], prompts, out, rank, device, own["t5_tokens"])

def main(cfg):
    """Draw cfg.n images into a folder.  Returns that folder."""
    rank, world, device = ranks.setup(cfg.device)
    checkpoint = runs.latest_checkpoint(cfg.run)
    config, out, text = runs.read_config(checkpoint), Path(cfg.out or Path(cfg.run) / "samples"), None
    if config.get("script") == "finetune.py":      # texts before the transformer: T5 is the larger of the two
        settings = settings_of(cfg, config, checkpoint)
        text = text_of(cfg, config, settings, out, rank, device)
    dit, vae, config = load_run(cfg.run, cfg.weights, device)
    flow = prepare(dit, vae, cfg, device)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "settings.json").exists():
        old = json.loads((out / "settings.json").read_text())
        if old != settings:
            what = ", ".join(f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v)
            raise SystemExit(f"{out} holds images made with other settings ({what}): give another --out, or remove it")
    elif rank == 0:
        runs.write_json(out / "settings.json", settings)

    todo = [i for i in range(cfg.n) if not (out / f"{i:06d}.png").exists()][rank::world]
    start = time.time()
    for k in tqdm(range(0, len(todo), cfg.batch_size), desc=str(out), disable=rank > 0, mininterval=1):
        indices = todo[k:k + cfg.batch_size]
        images, base = generate(dit, vae, indices, settings, text, flow)
        for i, image in zip(indices, data.to_uint8(images)):
            save_png(image, out / f"{i:06d}.png")
    ranks.wait_for_all()
    if rank == 0:
        print(f"{out}: {len(todo)} new images, {cfg.n} in all; {len(todo) / max(1e-9, time.time() - start):.2g} img/s here")
        write_overview(dit, vae, config, settings, out, cfg.n, text)
    return out

def save_png(image, path):
    """Write uint8 (H, W, 3) beside `path` and rename it, so that a folder holds whole images only."""
    temporary = path.with_suffix(".tmp")
    Image.fromarray(image).save(temporary, format="png")
    temporary.replace(path)

def write_overview(dit, vae, config, settings, out, n, text=None):
    """samples.npz of all images, and for up to ten classes (or prompts) x eight images grid.png and base_preview.png."""
    arrays = np.stack([np.asarray(Image.open(out / f"{i:06d}.png")) for i in range(n)])
    with open(out / "samples.npz.tmp", "wb") as f:
        np.savez(f, arr_0=arrays)
    (out / "samples.npz.tmp").replace(out / "samples.npz")
    turn = settings.get("prompts") or settings["classes"]
    classes, columns = (config["classes"] or ["image"]) + ["no class"], max(1, min(8, n // len(turn)))
    names = [t[:24] if "prompts" in settings else classes[t] for t in turn]
    indices = [i for row in range(min(10, len(turn))) for i in range(row, columns * len(turn), len(turn)) if i < n]
    images, base = generate(dit, vae, indices, settings, text)
    for name, x in (("grid.png", images), ("base_preview.png", base)):
        figures.save_grid(x, out / name, columns, max(1, 128 // x.shape[-1]), [names[i % len(turn)] for i in indices])

if __name__ == "__main__":
    commands = {"text": (main_text, TextConfig), "export": (main_export, ExportConfig)}
    command, options = commands.get("".join(sys.argv[1:2]), (main, Config))
    command(config.cli(options, argv=sys.argv[1 if command is main else 2:]))
