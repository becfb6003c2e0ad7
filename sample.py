"""Draw images with a run of finetune.py: Euler's method on the flow from noise (t = 0) to data (t = 1).

    python sample.py                                    # the newest run in out/
    python sample.py out/tiny --n=100 --cfg=2
    python sample.py out/sd35m-1024 --prompts="a red fox|a lighthouse" --text=sd3.5-medium \\
        --height=1024 --width=1536
    python sample.py text sd3.5-medium --out=out/text --data_dir=photos     # only encode captions
    python sample.py export out/sd35m-1024 --out=exported                   # to other programs' formats
    torchrun --nproc_per_node=8 -- sample.py out/imagenet512 --n=50000 --steps=249 --cfg=4 \\
        --cfg_start=0.2 --shift=0.3

Writes to --out: images/000000.png ..., grid.png (one row per class), base_preview.png (the same latents
through the base decoder alone), samples.npz (arr_0, uint8 NHWC in a random order, for guided-diffusion's
evaluator) and settings.json. Other programs' FID wants the folder images/. Only images missing there are
drawn, so an interrupted run can be resumed. Image i depends only on (seed, i), not on the batch size or the
number of processes. Prompts are encoded first, see support/text.py.
"""
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from tqdm import tqdm

from dit import merge_lora
from kernels import choose
from support import config, identity, image_folder, levels, ranks, runs
from support import text as texts
from support.config import field
from support.measurements import run_folder
from support.weights import ExportConfig, main_export, load_run


@dataclass
class Config:
    run: str = field("", "a run of finetune.py, or one of its step folders; empty: the newest in out/")
    out: str = field("", "folder for the images; empty: <run>/samples, or <run>/samples-<step folder>")
    n: int = field(50, "number of images", within=(1, 10_000_000))
    batch_size: int = field(50, "images per forward pass and process", at_least=1)
    seed: int = field(0, "seed of the noise", within=(0, 2**64 - 1))
    # what is drawn
    classes: tuple = field((), "class ids to draw, in turn; empty: those of the run's images", at_least=0)
    prompts: str = field("", "text: prompts separated by |, or a file, one per line; empty: captions",
                         text=True)
    negative: str = field("", "text: the prompt that guidance steers away from", text=True)
    text: str = field("", "text: its shards, or a folder of encoders to make them; empty: the run's")
    height: int = field(0, "pixels, text only; 0: the run's image_size", within=(0, 16_384))
    width: int = field(0, "see height", within=(0, 16_384))
    # how it is drawn (App.): Euler steps and guidance
    steps: int = field(50, "Euler steps (LightningDiT's '250' are 249); not taken from the run",
                       within=(1, 1_000_000))
    shift: float = field(-1.0, "s of shift_time, 1: an even grid; negative: the run's own", within=(-1, 1000))
    grid: str = field("", "sd3: its end is shifted twice, as in diffusers; empty: the run's own",
                      choices=("", "plain", "sd3"))
    cfg: float = field(-1.0, "guidance scale; 1: none, 0: no class or prompt; negative: the run's own",
                       within=(-1, 1000))
    cfg_start: float = field(0.0, "guidance is on where cfg_start <= t <= cfg_end", within=(0, 1))
    cfg_end: float = field(1.0, "see cfg_start", within=(0, 1))
    keep: int = field(-1, "how many details (D = 0: channels) to draw and decode; negative: all",
                      within=(-1, 4096))
    cfg_channels: int = field(0, "guide only the first channels; 0: all. 3 reproduces LightningDiT's figures",
                              at_least=0)
    slg: float = field(0.0, "SD3.5: scale of skip-layer guidance (blocks 7, 8, 9); Stability AI uses 2.5",
                       at_least=0)
    # hardware, speed and weights
    compile: bool = field(False, "torch.compile blocks and decoder: for many images on a GPU")
    graph: bool = field(False, "record the Euler loop as one CUDA graph, for small batches; not timed")
    weights: str = field("ema", "which weights of the run", choices=("ema", "model"))
    device: str = field("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = field("auto", "for autocast; auto: bfloat16 if the hardware has instructions for it",
                       choices=("auto", "float32", "bfloat16"))


# ---------------------------------------------------------------- the sampler


@torch.no_grad()
def sample_flow(model, noise, ts, cond, uncond=None, scale=1.0, interval=(0.0, 1.0), channels=None, slg=0.0,
                skip=(7, 8, 9), ahead=0, mask=None, tick=None):
    """Integrate dx/dt = v(x, t) from noise (t = 0) to data (t = 1) by Euler's method, with guidance.

    noise:    (B, C+D, h, w)
    mask:     (1, C+D, 1, 1) of 1 and 0, channels that take part (support/levels.py); None: all
    ts:       increasing floats from 0 to 1, see time_grid
    cond, uncond, scale: see guided_velocity
    interval: guidance is on where interval[0] <= t <= interval[1]
    channels: guide only so many first channels; None: all
    slg:      skip-layer guidance (Stability AI, for SD3.5): v += slg * (c - c without the blocks `skip`) in
              steps 0.01 N < n < 0.2 N, at one extra pass per step
    ahead:    rows of modulations_ahead
    tick:     called with 1 after each step, like the `update` of a progress bar
    returns the latent at ts[-1], float32

    Outside the interval, and with scale 1, the unconditional pass is not computed at all. Nothing here waits
    for the device, so a CUDA graph can record it.
    """
    x = noise if mask is None else noise * mask
    N = len(ts) - 1
    guided = [scale != 1.0 and interval[0] <= t <= interval[1] for t in ts[:-1]]
    known = modulations_ahead(model, ts[:-1], guided, cond, uncond, ahead)

    for n in range(N):
        t = torch.full((len(x),), ts[n], dtype=torch.float64, device=x.device)
        extra = next(known)
        if guided[n]:
            v, c = guided_velocity(model, x, t, cond, uncond, scale, channels, **extra)
        else:
            v = model(x, t, *cond, **extra)
            c = v
        if slg and 0.01 * N < n < 0.2 * N:
            v = v + slg * (c - model(x, t, *cond, skip=skip))
        if mask is not None:
            v = v * mask
        x = x + (ts[n + 1] - ts[n]) * v
        if tick is not None:
            tick(1)
    return x


def guided_velocity(model, x, t, cond, uncond, scale, channels=None, **extra):
    """(v, c): c is the velocity without guidance, v with it.  Ho & Salimans, 2022.

        v = u + scale * (c - u) on the first `channels` channels (None: all), v = c on the others

    x: (B, C+D, h, w), t: (B,); cond, uncond: the model's arguments after x and t that give c and u: tuples
    of (B, ...) tensors (labels; or text tokens and pooled text). Both passes are one batch of 2B, c first.
    """
    both = [torch.cat(pair) for pair in zip(cond, uncond)]
    c, u = model(torch.cat([x, x]), torch.cat([t, t]), *both, **extra).chunk(2)
    k = channels or x.shape[1]
    return torch.cat([u[:, :k] + scale * (c[:, :k] - u[:, :k]), c[:, k:]], dim=1), c


def shift_time(t, s):
    """t' = s t / (1 - t + s t): s < 1 spends more steps near the noise, s = 1 changes nothing, 0 and 1 stay.

    SD3's "shift 3.0" is s = 1/3 here, where time runs the other way; LightningDiT's 0.3 is 0.3.
    """
    return s * t / (1 - t + s * t)


def time_grid(steps, shift=1.0, twice=False):
    """steps + 1 floats from 0 to 1, computed in float64; Python numbers, so that no step waits for a GPU.

    twice: as in diffusers' SD3 scheduler, which shifts the last of its 1000 training times, and then shifts
    it again with the whole grid. So from two steps on, the last always begins at the same t (0.991 with SD3's
    shift): it is shorter than on the plain grid of fewer than 334 steps.
    """
    if twice:
        even = torch.linspace(0, shift_time(0.999, shift), steps, dtype=torch.float64)
        return shift_time(even, shift).tolist() + [1.0]
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return shift_time(even, shift).tolist()


def sample_noise(seed, indices, shape):
    """Standard normal (len(indices), *shape), row i from a generator seeded with (seed, indices[i]) alone.

    From NumPy, because torch's CPU generator keeps only 32 bits of a seed: too few for one seed per pair.
    """
    rows = []
    for i in indices:
        generator = np.random.default_rng((seed, int(i)))
        rows.append(generator.standard_normal(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


def sample_labels(indices, classes):
    """Labels of the samples `indices`: the classes in turn, so that any n is as balanced as possible."""
    return torch.tensor([classes[int(i) % len(classes)] for i in indices])


# ---------------------------------------------------------------- the sampler, faster

# Steps x images whose modulations are computed at once: 0.1 GB for LightningDiT-XL, 0.3 GB for SD3.5 Medium.
AHEAD = 256


def modulations_ahead(model, ts, guided, cond, uncond, rows):
    """Yield the model's extra arguments for each step: {"mods": its modulations}, or {} if rows is 0.

    Modulations depend only on time and condition (dit.py:DiT.modulations), so they are computed for many
    steps at once, about `rows` rows at a time. Guided steps use those of both cond and uncond.
    """
    if not rows:
        for _ in ts:
            yield {}
        return
    plain = [t for t, on in zip(ts, guided) if not on]
    doubled = [t for t, on in zip(ts, guided) if on]
    known = {False: look_ahead(model, plain, cond[-1], rows)}
    if doubled:
        known[True] = look_ahead(model, doubled, torch.cat([cond[-1], uncond[-1]]), rows)
    for on in guided:
        yield {"mods": next(known[on])}


def look_ahead(model, times, y, rows):
    """Yield the model's modulations for y (B, ...) at each time in turn, computed `rows` rows at once."""
    B = len(y)
    group = max(1, rows // B)
    for k in range(0, len(times), group):
        some = times[k:k + group]
        t = [torch.full((B,), now, dtype=torch.float64, device=y.device) for now in some]
        mods = model.modulations(torch.cat(t), torch.cat([y] * len(some)))
        for i in range(len(some)):
            yield rows_of(mods, i * B, (i + 1) * B)


def rows_of(mods, first, end):
    return tree_map(lambda m: m[first:end], mods)


class Recorded:
    """sample_flow as one CUDA graph: the first call records it, and all calls like the first replay it.

    A call with other shapes or numbers runs sample_flow itself. `tick` is called once, for all steps.
    """

    def __init__(self):
        self.graph = None

    def __call__(self, model, noise, ts, cond, uncond, tick=None, **options):
        x = self.integrate(model, noise, ts, cond, uncond, **options)
        if tick is not None:
            tick(len(ts) - 1)
        return x

    def integrate(self, model, noise, ts, cond, uncond, mask=None, **options):
        given = (noise, cond, uncond, mask)                    # tensors, or None for no mask
        call = ([getattr(x, "shape", None) for x in tree_leaves(given)], ts, options)
        if self.graph is None:
            return self.record(call, given, model, ts, options)
        if call != self.call:
            return sample_flow(model, noise, ts, cond, uncond, mask=mask, **options)
        for x, new in zip(tree_leaves(self.inputs), tree_leaves(given)):
            if x is not None:
                x.copy_(new)
        self.graph.replay()
        return self.x.clone()

    def record(self, call, given, model, ts, options):
        def run(noise, cond, uncond, mask):
            return sample_flow(model, noise, ts, cond, uncond, mask=mask, **options)

        first = run(*given)                                # compiles, and sets up what cannot be recorded
        self.call = call
        self.inputs = tree_map_only(torch.Tensor, torch.clone, given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.x = run(*self.inputs)
        self.graph = graph
        return first


@torch.no_grad()
def for_sampling(dit):
    """Merge adapters and round weights to bfloat16, in place. Without adapters, velocities do not change."""
    if getattr(dit.cfg, "lora", 0):
        dit = merge_lora(dit)
    for layer in dit.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.bfloat16()
    return dit


def prepare(dit, vae, cfg, device):
    """Prepare the models, in place, for many batches (cfg.compile, cfg.graph).  Returns `generate`'s flow."""
    if cfg.graph and device.type != "cuda":
        raise SystemExit("--graph=True needs a GPU; leave it out")
    if ranks.in_bfloat16(cfg.dtype, device):
        for_sampling(dit)
    if cfg.compile:
        for part in [*dit.blocks, vae.decoder]:
            part.compile(dynamic=False)
    return Recorded() if cfg.graph else sample_flow


def batches(numbers, cfg):
    """Yield (numbers of a batch, those to draw): at most cfg.batch_size; in a smaller last one, fewer.

    A model is compiled, or recorded, anew for each size, which takes minutes. So then, a smaller last batch
    is filled up with more of its last number, whose images are dropped.
    """
    size = min(cfg.batch_size, len(numbers)) if cfg.compile or cfg.graph else 0
    for k in range(0, len(numbers), cfg.batch_size):
        batch = list(numbers[k:k + cfg.batch_size])
        yield batch, batch + batch[-1:] * (size - len(batch))


# ---------------------------------------------------------------- images of a run


def generate(dit, vae, indices, s, text=None, flow=sample_flow, tick=None):
    """(images, previews) in [-1, 1]: samples `indices` through the full decoder and the base decoder.

    s: see `settings_of`; text: a TextCache, for a text-conditioned model
    flow: see `prepare`; tick: see `sample_flow`
    raises: SystemExit as in `check_fit`
    """
    device = dit.P.weight.device
    check_fit(dit, vae, s)
    noise = sample_noise(s["seed"], indices, (vae.C + dit.cfg.D, s["height"] // vae.f, s["width"] // vae.f))
    keep = s.get("keep")
    mask = None if keep is None else levels.seen_of_all(keep, vae.C, dit.cfg.D).to(device)
    ts = time_grid(s["steps"], s["shift"], s["grid"] == "sd3")
    cond, uncond = conditions(dit, indices, s, text)
    # A sharded model's layers are whole only while it runs; a user's own transformer may have no adaLN.
    ahead = AHEAD if hasattr(dit, "modulations") and not ranks.is_sharded(dit) else 0

    # A graph would keep addresses in autocast's cache of rounded weights, which is freed with this context.
    autocast = ranks.autocast(s.get("dtype", "auto"), device, cache_enabled=flow is sample_flow)
    with torch.no_grad(), autocast:
        z_all = flow(dit, noise.to(device), ts, cond, uncond, scale=s["cfg"],
                     interval=(s["cfg_start"], s["cfg_end"]), channels=s["cfg_channels"] or None,
                     slg=s.get("slg", 0.0), ahead=ahead, mask=mask, tick=tick)
        # a few at a time: the decoder has the largest activations
        parts = z_all.split(ranks.at_once(8, s["height"], s["width"]))
        base = torch.cat([vae.decode_base(z[:, :vae.C]) for z in parts]).float().clamp(-1, 1)
        if not dit.cfg.D and (vae.D or keep is None):              # a base DiT has only the base channels
            return base, base
        full = torch.cat([vae.decode(z, keep) for z in parts]).float().clamp(-1, 1)
    return full, base


def check_fit(dit, vae, s):
    """raises: SystemExit where height or width do not fit the model, or `keep` has nothing to hide"""
    if "keep" in s and not dit.cfg.D and vae.D:
        raise SystemExit(f"--keep={s['keep']}: the model has no details, only a DA-VAE's base channels; "
                         "leave it out")
    side = vae.f * dit.cfg.p
    if min(s["height"], s["width"]) < side or s["height"] % side or s["width"] % side:
        raise SystemExit(f"{s['height']}x{s['width']} pixels: both must be multiples of {side}")


def conditions(dit, indices, s, text=None):
    """(cond, uncond) of samples `indices`, for `sample_flow`: labels, or text tokens and pooled text."""
    if text is not None:
        prompts = [s["prompts"][i % len(s["prompts"])] for i in indices]
        return text(prompts), text([s["negative"]] * len(prompts))
    y = sample_labels(indices, s["classes"]).to(dit.P.weight.device)
    null = torch.full_like(y, dit.cfg.num_classes)
    return (y,), (null,)


OF_CLASSES = ("classes",)                                          # flags of class-conditional models only
OF_TEXT = ("prompts", "negative", "text", "height", "width", "slg")


def settings_of(cfg, about, checkpoint):
    """Everything the images depend on, with the run's own defaults filled in.

    about: config.json of the checkpoint
    raises: SystemExit on impossible values, and on flags for another kind of model
    """
    own = about["config"]
    kind, others = ("text", OF_CLASSES) if own.get("text") else ("classes", OF_TEXT)
    for name in others:
        if name in getattr(cfg, "given", ()):
            raise SystemExit(f"--{name}= is not for {checkpoint}, which draws from {kind}; leave it out")
    s = {}
    for name in ("steps", "seed", "weights", "dtype", "cfg_start", "cfg_end", "cfg_channels"):
        s[name] = getattr(cfg, name)
    s["shift"] = own["shift"] if cfg.shift < 0 else cfg.shift
    s["cfg"] = own["cfg"] if cfg.cfg < 0 else cfg.cfg
    s["grid"] = cfg.grid or own["grid"]
    if cfg.n < 1 or cfg.steps < 1 or s["shift"] == 0 or not s["cfg"] < float("inf"):
        raise SystemExit(f"n={cfg.n}, steps={cfg.steps}, shift={s['shift']}, cfg={s['cfg']}: wanted n and "
                         "steps of at least 1, shift above 0 and a finite cfg")
    starts = time_grid(s["steps"], s["shift"], s["grid"] == "sd3")[:-1]
    if not any(cfg.cfg_start <= t <= cfg.cfg_end for t in starts):
        raise SystemExit(f"--cfg_start={cfg.cfg_start} --cfg_end={cfg.cfg_end}: none of the steps "
                         f"({s['steps']}) begins between them, so guidance would never be on; for none, give "
                         "--cfg=1 alone")
    C, D = about["model"]["C"], about["model"]["D"]
    if cfg.keep >= 0:
        s["keep"] = levels.check((cfg.keep,), C, D, "--keep")[0]
    channels = C + D
    if not 0 <= cfg.cfg_channels <= channels:
        raise SystemExit(f"--cfg_channels={cfg.cfg_channels}: the model has {channels} channels; wanted how "
                         "many of them to guide, or 0 for all")
    if own.get("text"):
        return s | text_settings(cfg, about, checkpoint)
    return s | class_settings(cfg, about)


def text_settings(cfg, about, checkpoint):
    size = about["config"]["image_size"]
    prompts = texts.read_prompts(cfg.prompts) or about.get("captions")
    if not prompts:
        raise SystemExit(f"{checkpoint}: draws from text: give --prompts=")
    return {"height": cfg.height or size, "width": cfg.width or size, "prompts": prompts,
            "negative": cfg.negative, "slg": cfg.slg}


def class_settings(cfg, about):
    known = about["model"]["num_classes"]
    classes = list(cfg.classes) or list(range(image_folder.trained_classes(about)))
    if max(classes) > known or min(classes) < 0:
        wrong = max(classes) if max(classes) > known else min(classes)
        raise SystemExit(f"class {wrong} asked for; the model has classes 0 to {known - 1} ({known} draws "
                         "without a class)")
    size = about["config"]["image_size"]
    return {"classes": classes, "height": size, "width": size}


def text_of(cfg, about, settings, out, rank, device):
    """The `text` of `generate`: a TextCache of the first cfg.n prompts; None for a class-conditional model.

    Without --text=, it is the run's own copy if that has all the prompts, else what the run was trained with.
    raises: SystemExit if a prompt is missing, or has an embedding of another width than the model takes
    """
    own = about["config"]
    if not own.get("text"):
        return None
    count = len(settings["prompts"])
    if rank == 0 and cfg.prompts and count > cfg.n:
        print(f"--prompts= has {count} prompts, of which the first {cfg.n} are drawn; --n={count} draws all")
    prompts = [*settings["prompts"][:cfg.n], settings["negative"]]
    kept = run_folder(cfg.run) / "captions"
    folder = cfg.text or (kept if texts.has(kept, prompts) else own["text"])
    text = texts.text_for(folder, prompts, out, device, own["t5_tokens"])
    text.need(prompts)
    text.check_widths(about["model"])
    trained_with = about.get("made_of", {}).get("texts")
    if rank == 0 and trained_with not in (None, text.made_by):
        print(f"WARNING: {text.folder} was made by {text.made_by}; the run was trained with {trained_with}: "
              "expect poor images")
    return text


# ---------------------------------------------------------------- the script


def main(cfg):
    """Draw cfg.n images into a folder.  Returns that folder."""
    rank, world, device = ranks.setup(cfg.device)
    # what rank 0 found counts: a run that is still training adds checkpoints meanwhile, and removes old ones
    run = cfg.run or runs.newest_run()
    cfg.run, checkpoint = ranks.from_all((run, runs.latest_checkpoint(run)))[0]
    about = runs.read_config(checkpoint)
    if about.get("script") != "finetune.py":
        script = about.get("script")
        raise SystemExit(f"{cfg.run}: holds a checkpoint of {script}; wanted a run of finetune.py")
    settings = settings_of(cfg, about, checkpoint)
    out = Path(cfg.out or image_folder.default_folder(cfg.run))

    settings["model"] = identity.of_run(checkpoint)
    image_folder.refuse_other_images(out, settings)

    # encode text before loading the transformer: T5 is the larger of the two
    text = text_of(cfg, about, settings, out, rank, device)
    settings["texts"] = text.made_by if text else None
    image_folder.refuse_other_images(out, settings)

    # the images still missing, as rank 0 sees them, since all ranks must agree
    columns, shown = image_folder.overview(about, settings, cfg.n)
    todo = ranks.from_all(image_folder.missing(out, cfg.n, shown) if rank == 0 else None)[0]
    if not todo:
        if rank == 0:
            print(f"{out}: all {cfg.n} images exist, nothing to draw")
        return image_folder.put_together(out, cfg.n, columns, shown, rank)
    again = [i for i in todo if rank == 0 and image_folder.is_whole(image_folder.path_of(out, i))]
    if again:
        print(f"{out}: base_preview.png lacks {len(again)} of its images, which are drawn again")

    dit, vae, _ = load_run(checkpoint, cfg.weights, device)
    check_fit(dit, vae, settings)
    flow = prepare(dit, vae, cfg, device)
    image_folder.make_folder(out, settings, rank)
    batch = range(min(cfg.batch_size, cfg.n))
    guided = settings | {"steps": 1, "cfg_start": 0.0}             # guidance doubles the rows of a step
    choose.before_sampling(out, device, cfg.compile, lambda: generate(dit, vae, batch, guided, text))

    # each rank takes every world-th image
    mine = todo[rank::world]
    start = time.time()
    bar = progress_bar(f"{out}: {len(todo)} images", len(mine), cfg, rank)
    with bar, ThreadPoolExecutor(8) as pool:
        written = []
        for numbers, drawn in batches(mine, cfg):
            images, previews = generate(dit, vae, drawn, settings, text, flow, bar.update)
            image_folder.refuse_other_images(out, settings, drawing=True)
            image_folder.wait_for(written)
            # A PNG of 1,024 pixels takes half a second: it is written while the next batch is drawn.
            written = image_folder.save_images(pool, out, numbers, images, previews, shown)
        image_folder.wait_for(written)

    speed = len(mine) / max(1e-9, time.time() - start)
    ranks.wait_for_all()
    if rank == 0:
        print(f"{out}: {len(todo) - len(again)} new images, {cfg.n} in all; {speed:.2g} img/s here; look at "
              f"{out}/grid.png")
    return image_folder.put_together(out, cfg.n, columns, shown, rank)


def progress_bar(title, images, cfg, rank):
    """A bar over the Euler steps of all batches of this rank's images, shown by rank 0; see `tick`."""
    batches = -(-images // cfg.batch_size)                         # rounded up
    return tqdm(total=batches * cfg.steps, desc=title, unit="step", disable=rank > 0, mininterval=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["text"]:
        ranks.launch(texts.main_text, config.cli(texts.TextConfig, argv=sys.argv[2:]))
    elif sys.argv[1:2] == ["export"]:
        ranks.launch_alone(main_export, config.cli(ExportConfig, argv=sys.argv[2:]))
    else:
        ranks.launch(main, config.cli(Config))
