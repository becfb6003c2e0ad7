"""Stage 2, the main job: warm-start a DiT on a DA-VAE's latent (or, with D = 0, train a base DiT from scratch).

    python finetune.py                                             # preset tiny: everything from nothing, on a CPU
    python finetune.py photos --vae=out/photos-vae --data_dir=photos/train
    torchrun --nproc_per_node=8 finetune.py imagenet512 --data_dir=imagenet/train --base=lightningdit-xl-imagenet256-800ep.pt
    torchrun --nproc_per_node=8 finetune.py sd35m-1024 --data_dir=captioned --base=sd3.5-medium --text=out/text
    python finetune.py sd35m-1024 --dry_run=True                   # what that would take; needs no weights

What a preset needs and does not find (base VAE, DA-VAE, base DiT) is trained first. Writes to --out: log.jsonl, loss.png,
warm_start.png (base model | widened model), samples_*.png, the VAE, and step_*/ checkpoints. The same command again resumes.

Time, here and everywhere: t = 0 is noise, t = 1 is data, x_t = t*data + (1-t)*noise, v = data - noise.
"""
import dataclasses
import json
import math
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sample
import train_vae
from davae import LAYOUT
from support.weights import load_davae
from dit import DiTConfig, LightningDiT, MMDiT, add_lora, ema_update, warm_start_difference
from support.ranks import shard, spread, whole
from support.weights import load_dit
from support import config, data, figures, ranks, runs, text
from support.config import field
from support.latents import Latents, latent_source
from support.plan import dry_run


@dataclass
class Config:
    preset: str = field("tiny", "a name in PRESETS")
    out: str = field("", "the run's folder")
    device: str = field("auto", "auto, cpu or cuda")
    seed: int = field(0, "of the weights, the data order and every random draw")
    # data and latents
    data_dir: str = field("procedural", "a folder of images, 'procedural' for the built-in ones, or LightningDiT's shards")
    image_size: int = field(512, "pixels; images are resized and centre-cropped to this square")
    images: int = field(4096, "how many procedural images")
    flip: bool = field(True, "mirror half of the images")
    vae: str = field("", "a run of train_vae.py (or, with D = 0, any base VAE)")
    cache: bool = field(True, "encode all images once, keep the latents in memory and on disk; False: encode as we go")
    detail_sample: bool = field(False, "sample z_d's posterior, as the authors' ImageNet features; False: its mode")
    # model
    D: int = field(96, "detail channels, the VAE's; 0 trains a base DiT on the base channels alone")
    base: str = field("", "the pretrained base DiT to widen: a run, or LightningDiT's weights; empty: start from scratch")
    base_weights: str = field("", "ema or model, of the base's file; empty: the EMA if there is one")
    p: int = field(1, "no base given: patch side in latent pixels")
    E: int = field(1152, "no base given: width")
    depth: int = field(28, "no base given: blocks")
    A: int = field(16, "no base given: heads")
    qk_norm: bool = field(False, "no base given: RMSNorm on q and k")
    # SD3.5 (the base is an MMDiT, the images have captions)
    text: str = field("", "text shards of the captions (`python sample.py text`), or the folder of encoders that makes them")
    t5_tokens: int = field(256, "tokens given to T5")
    lora: int = field(0, "rank of the adapters, alpha = rank; 0: train every weight")
    checkpointing: bool = field(False, "recompute each block in the backward pass: less memory, a third more time")
    shard: bool = field(False, "under torchrun: split weights, gradients and optimizer over the ranks (FSDP2)")
    compile: bool = field(False, "torch.compile the blocks: a minute at the start, faster steps on a GPU (not run)")
    # loss (Sec. 3.3, Tab. S1)
    N: int = field(10_000, "steps over which the weight w(n) of the detail channels rises from 0 to 1")
    cosine: float = field(1.0, "weight of the term 1 - cos(v, v*)")
    label_dropout: float = field(0.1, "probability of training without the label or caption, for guidance")
    weighting: str = field("paper", "paper: uniform over logit-normal t; sigma: as the authors' SD3 code (see `draw_time`)")
    # optimisation
    steps: int = field(140_000, "optimizer steps")
    batch_size: int = field(640, "images per optimizer step, over all ranks")
    micro_batch: int = field(80, "images per rank and forward pass")
    lr: float = field(2e-4, "learning rate")
    cooldown: float = field(0.0, "last part of the steps over which lr falls to 0, as a fraction")
    beta2: float = field(0.95, "of AdamW; beta1 is 0.9")
    clip: float = field(1.0, "gradient norm limit; 0: none, as the authors")
    ema: float = field(0.999, "decay of the weight average that is sampled from")
    log_every: int = field(100, "steps")
    save_every: int = field(5000, "steps between checkpoints, each with a picture of samples")
    # sampling defaults, kept with the model
    cfg: float = field(4.0, "guidance scale of the pictures and sample.py's default")
    shift: float = field(0.3, "time shift of the pictures and sample.py's default")
    grid: str = field("plain", "time grid of the pictures and sample.py's default: plain, or sd3")
    sample_steps: int = field(50, "Euler steps of the pictures")
    dry_run: bool = field(False, "only print what the run would be: sizes, FLOPs, memory, disk, files")

PRESETS = {
    "tiny-base": dict(out="out/tiny-base", vae="out/tiny-vae", D=0, p=2, E=192, depth=4, A=3, image_size=64, flip=False,
                      steps=650, batch_size=32, micro_batch=32, lr=1e-3, cooldown=0.5, ema=0.98, cfg=2.0, shift=1.0,
                      sample_steps=20, log_every=25, save_every=650),
    "tiny": dict(out="out/tiny", vae="out/tiny-vae", base="out/tiny-base", D=24, N=200, image_size=64, flip=False, steps=600,
                 batch_size=32, micro_batch=32, lr=1e-3, cooldown=0.5, ema=0.98, cfg=2.0, shift=1.0, sample_steps=20,
                 log_every=25, save_every=600),
    # every class recognised, 31 % judged sharp by evaluate.py's probe, none without details; 83 s, 2 cores (2026-11-21)
    "photos-base": dict(out="out/photos-base", vae="out/photos-vae", D=0, E=256, depth=6, A=4, image_size=128, flip=False,
                        steps=600, batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.99, cfg=2.5, shift=1.0,
                        log_every=50, save_every=600),
    "photos": dict(out="out/photos", vae="out/photos-vae", base="out/photos-base", D=96, N=200, image_size=128, flip=False,
                   steps=300, batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.99, cfg=2.5, shift=1.0,
                   log_every=50, save_every=300),     # textures and scenes of the class, few objects: README (2026-11-21)
    "imagenet512": dict(out="out/imagenet512", vae="out/imagenet512-vae", base="lightningdit-xl-imagenet256-800ep.pt",
                        base_weights="model", data_dir="imagenet/train", image_size=512, D=96, clip=0.0),     # Tab. S1; not run
    "sd35m-1024": dict(out="out/sd35m-1024", vae="out/sd35m-vae", base="sd3.5-medium", text="out/text", data_dir="captioned",
                       image_size=1024, D=16, p=2, lora=256, checkpointing=True, cosine=0.0, N=5000, steps=10_000,
                       batch_size=128, micro_batch=16, lr=1e-4, beta2=0.999, clip=0.5, flip=False, save_every=1000,
                       cfg=2.5, shift=1 / 3, grid="sd3", sample_steps=30),
}   # Tab. S1; clip and beta2 of SD3.5 from the authors' code; not run
PRESETS["sd35m-2048"] = PRESETS["sd35m-1024"] | dict(out="out/sd35m-2048", image_size=2048, batch_size=96, micro_batch=6)
MAY_CHANGE = {"preset", "device", "data_dir", "vae", "base", "text", "cache", "micro_batch", "lr", "steps", "cooldown", "clip",
              "checkpointing", "shard", "compile", "log_every", "save_every", "cfg", "shift", "grid", "sample_steps", "dry_run"}
# ---------------------------------------------------------------- the method

def detail_weight(n, N):
    """w(n): 0 at step n = 0, 1/2 at N/2, 1 from N on; half a cosine.  Eq. (12).

    Differs from the paper: its text keeps w low for N steps and ramps after; its code, and this, ramp over the N steps.
    """
    return 0.5 * (1 - math.cos(math.pi * min(n / N, 1.0))) if N else 1.0

def draw_time(B, weighting, device):
    """(t (B,), weight of the squared error at t (B,)); t = 0 is noise, 1 data.

    paper: t = sigmoid(N(0, 1)), weight 1.
    sigma: what the authors train SD3.5 with: the same u = sigmoid(N(0, 1)) picks sigma = 1 - t from SD3's 1000 training
    times, shifted by 4, and the error of the denoised latent, sigma^2 |v - v*|^2, weighs min(t / sigma, 5).
    Differs from the authors' code: theirs also truncates the model's time to thousandths and rounds sigma to bfloat16.
    """
    u = torch.sigmoid(torch.randn(B, device=device))
    if weighting == "paper":
        return u, torch.ones_like(u)
    if weighting != "sigma":
        raise SystemExit(f"--weighting={weighting!r}: wanted paper or sigma")
    s = torch.linspace(1, 1 - sample.shift_time(0.999, 1 / 3), 1000, device=device)[(1000 * u).long().clamp_max(999)]
    sigma = 4 * s / (1 + 3 * s)
    return 1 - sigma, sigma.square() * ((1 - sigma) / sigma).clamp_max(5)

def flow_loss(model, z_all, cond, C, w, cosine=1.0, weighting="paper"):
    """Rectified-flow loss at random times, with weight w on the detail channels.  Eq. (13).

    mse    = (C * base + w * D * detail) / (C + w * D): the weighted mean over channels of (v - v*)^2
    loss   = mse + cosine * mean over positions of 1 - cos(v, v*), the cosine over all C + D channels, unweighted
    z_all: (B, C+D, h, w); cond: a tuple of (B, ...), labels, or text tokens and pooled text; weighting: see `draw_time`
    returns (loss, base, detail), () float32, the halves detached and unweighted.
    Differs from the paper, like the authors' code: w(n) scales the squared error only, so details learn from step 0.
    """
    D = z_all.shape[1] - C
    t, weight = draw_time(len(z_all), weighting, z_all.device)                # (B,), (B,)
    noise = torch.randn_like(z_all)
    s = t.view(-1, 1, 1, 1)
    target = z_all - noise                                                    # v*
    v = model(s * z_all + (1 - s) * noise, t, *cond).float()
    error = (v - target).square()                                             # (B, C+D, h, w)
    base, detail = ((part.mean() if part.numel() else part.sum()).detach() for part in error.split([C, D], dim=1))
    mse = (weight.view(-1, 1, 1, 1) * error).mean((0, 2, 3))                  # (C+D,)
    loss = (mse[:C].sum() + w * mse[C:].sum()) / (C + w * D)
    if cosine:
        loss = loss + cosine * (1 - F.cosine_similarity(v, target, dim=1)).mean()
    return loss, base, detail

# ---------------------------------------------------------------- latents

# ---------------------------------------------------------------- set-up

def make_if_missing(run, cfg):
    """Train (or finish) the base DiT or VAE `run` if it is the folder of a preset here or in train_vae.py."""
    train_vae.make_if_missing(run, cfg)
    preset = next((name for name, values in PRESETS.items() if values["out"] == run), None)
    if preset and runs.step_of(run) < PRESETS[preset]["steps"]:
        print(f"\n{cfg.out} needs {run}, which is not there yet: running  python finetune.py {preset}")
        main(Config(**{"preset": preset, **PRESETS[preset], "device": cfg.device, "data_dir": cfg.data_dir}))

def initial_dit(cfg, vae, num_classes):
    """(model, base): the transformer at step 0, and the pretrained one it was widened from (None if from scratch)."""
    torch.manual_seed(cfg.seed)
    if not cfg.base:
        grid = cfg.image_size // vae.f // cfg.p
        return LightningDiT(DiTConfig(C=vae.C, D=cfg.D, p=cfg.p, grid=grid, E=cfg.E, depth=cfg.depth, A=cfg.A,
                                      num_classes=num_classes, qk_norm=cfg.qk_norm)), None
    make_if_missing(cfg.base, cfg)
    source = runs.latest_checkpoint(cfg.base) if Path(cfg.base).is_dir() and runs.checkpoints(cfg.base) else cfg.base
    base = load_dit(source, cfg.base_weights or None)
    if (base.cfg.C, base.cfg.D) != (vae.C, 0):
        raise SystemExit(f"{cfg.base}: takes {base.cfg.C} base and {base.cfg.D} detail channels; wanted a base model of "
                         f"{cfg.vae}'s {vae.C} channels")
    if bool(cfg.text) != isinstance(base, MMDiT) or (cfg.lora and not cfg.text):
        raise SystemExit(f"{cfg.base}: a {type(base).__name__}; an MMDiT needs --text=, a LightningDiT takes no text or lora")
    if not cfg.text and base.cfg.num_classes < num_classes:
        raise SystemExit(f"{cfg.base}: has {base.cfg.num_classes} classes; {cfg.data_dir} has {num_classes}")
    model = deepcopy(base)
    if cfg.D:
        model.expand_channels(cfg.D)
    if cfg.lora:
        add_lora(model, cfg.lora, cfg.lora)
    return model, base

def check_statistics(z_all, C, run):
    """Print mean and standard deviation of a batch of latents, base and detail apart, and say where they are not near 0, 1."""
    for name, z in (("base", z_all[:, :C]), ("detail", z_all[:, C:]))[:2 if z_all.shape[1] > C else 1]:
        mean, std = z.mean().item(), z.std().item()
        tqdm.write(f"{run}: latents of the first batch: {name} mean {mean:.2f} std {std:.2f}")
        if not (abs(mean) < 0.5 and 0.5 < std < 2):
            tqdm.write("WARNING: wanted about 0 and 1, by the VAE's own statistics: other images, or another VAE?")

def share_frozen(dit, ema):
    """Let the EMA use the model's own frozen matrices, in bfloat16 on a GPU, as autocast would see them anyway."""
    for p, e in zip(dit.parameters(), ema.parameters()):
        if not p.requires_grad:
            p.data = e.data = p.data.bfloat16() if p.is_cuda and p.ndim > 1 else p.data

def prove_warm_start(base, model, vae, z, cond, uncond, cfg, rank):
    """Print how far the widened model is from the base model (0.0) and save samples of both, base channels, side by side."""
    with torch.autocast(z.device.type, torch.bfloat16, enabled=z.is_cuda):
        change, detail = warm_start_difference(base, model, z, cond)
    if rank == 0:
        tqdm.write(f"{cfg.out}: warm start, {len(z)} latents, random z_d: max |v - v_base| = {change}, max |v_d| = {detail}")
    if max(change, detail) > 1e-5:
        raise SystemExit("the widened model is not the base model: P_new or O_new is not zero")
    cond, uncond = ([x[:8] for x in part] for part in (cond, uncond))
    noise = sample.sample_noise(cfg.seed, range(len(cond[0])), (vae.C + cfg.D, *z.shape[2:])).to(z.device)
    ts = sample.time_grid(cfg.sample_steps, cfg.shift, cfg.grid == "sd3")
    with torch.no_grad(), torch.autocast(z.device.type, torch.bfloat16, enabled=z.is_cuda):
        rows = [sample.sample_flow(m, noise[:, :k], ts, cond, uncond, cfg.cfg)[:, :vae.C]
                for m, k in ((base, vae.C), (model, vae.C + cfg.D))]
        x = vae.decode_base(torch.cat(rows)).clamp(-1, 1)
    labels = ["base model"] * len(noise) + ["widened, step 0"] * len(noise)
    if rank == 0:
        figures.save_grid(x, Path(cfg.out) / "warm_start.png", len(noise), max(1, 96 // x.shape[-1]), labels)
    return change

def save_samples(ema, vae, cfg, config, step, text, rank):
    """samples_<step>.png: four images of each of the first ten classes (or prompts), each column the same noise."""
    n = min(10, len(config["classes"]) if cfg.text else ema.cfg.num_classes)
    settings = sample.settings_of(sample.Config(steps=cfg.sample_steps, seed=cfg.seed, classes=tuple(range(n))), config, "")
    images, base = sample.generate(ema, vae, range(4 * n), settings, text)
    labels = [config["classes"][k][:24] if k < len(config["classes"]) else str(k) for k in range(n)] * 4
    grids = {"samples": images, "samples_base_only": base} if cfg.D else {"samples": images}
    with runs.disk_may_fail():
        for name, x in grids.items() if rank == 0 else ():
            for file in (f"{name}_{step:06d}.png", f"{name}.png"):
                figures.save_grid(x, Path(cfg.out) / file, n, max(1, 128 // x.shape[-1]), labels)

# ---------------------------------------------------------------- the loop

def main(cfg):
    """Train, draw and save as `cfg` says.  Returns the summary of the finished run, which is also in summary.json."""
    if cfg.dry_run:
        return dry_run(cfg)
    summary_file = Path(cfg.out) / "summary.json"
    if runs.step_of(cfg.out) >= cfg.steps and summary_file.exists():
        print(f"{cfg.out}: finished at step {runs.step_of(cfg.out)}; give more --steps or another --out to go on")
        return json.loads(summary_file.read_text())
    rank, world, device = ranks.setup(cfg.device)
    lock = runs.hold(cfg.out, rank)                              # until this function returns
    accumulate = ranks.micro_batches(cfg.batch_size, cfg.micro_batch, world)
    if cfg.shard and world == 1:
        raise SystemExit("--shard=True splits the model over several processes: start it with torchrun")
    make_if_missing(cfg.vae, cfg)
    vae = load_davae(cfg.vae).to(device, memory_format=LAYOUT[device.type]).requires_grad_(False)
    if cfg.D not in (0, vae.D):
        raise SystemExit(f"--D={cfg.D}, but {cfg.vae} has {vae.D} detail channels; give that, or 0 for a base model")
    train_set = (Latents(cfg.data_dir, vae, cfg.D) if any(Path(cfg.data_dir).glob("*.safetensors")) else
                 data.open_dataset(cfg.data_dir, cfg.image_size, cfg.images, cfg.seed))

    # model and EMA: from the newest checkpoint if there is one
    resumed, base = runs.resume(cfg, MAY_CHANGE), None
    if resumed:
        dit, ema = load_dit(resumed, "model"), load_dit(resumed, "ema")
    else:
        dit, base = initial_dit(cfg, vae, max(1, len(train_set.classes)))
        ema = deepcopy(dit)
    condition = text.Conditioner(dit, train_set, cfg, device, rank)     # T5, if it must run, has the GPU for itself
    if cfg.shard:
        dit, ema, base = (m and shard(m, device) for m in (dit, ema, base))
    dit, ema = dit.to(device).train(), ema.to(device).eval().requires_grad_(False)
    dit.checkpointing = cfg.checkpointing
    for block in dit.blocks if cfg.compile else ():                # in place: no name in a checkpoint changes
        block.compile(dynamic=False)
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    opt = torch.optim.AdamW(trained.values(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0.0, fused=True)
    start, seconds, extra = 0, 0.0, {}
    if resumed:
        state = runs.read_state_dict(resumed / "train_state.pt")
        opt.load_state_dict(spread(state["opt"], trained.values()))
        start, seconds, extra = state["step"], state["seconds"], state["extra"]
    model = DistributedDataParallel(dit, broadcast_buffers=False) if world > 1 and not cfg.shard else dit
    config = {"script": "finetune.py", "config": dataclasses.asdict(cfg), "model": dataclasses.asdict(dit.cfg), "classes":
              list(dict.fromkeys(filter(None, train_set.captions)))[:8] if cfg.text else train_set.classes}
    if rank == 0:
        print(f"{cfg.out}: {train_set.summary()}\n  {sum(p.numel() for p in trained.values()):,} trained of "
              f"{sum(p.numel() for p in dit.parameters()):,} parameters; C={vae.C} D={cfg.D} p={dit.cfg.p}, "
              f"{(cfg.image_size // vae.f // dit.cfg.p)**2} tokens; batch {cfg.batch_size} = {world} ranks x "
              f"{cfg.batch_size // world // accumulate} x {accumulate}; steps {start} to {cfg.steps}, {device}")
    stream = latent_source(vae, train_set, cfg, device, rank, world)(start)
    log, since = runs.Log(cfg.out, rank, start, cfg.steps), time.time()

    def save(step, must):
        """By all ranks, because a sharded model needs them all; rank 0 writes."""
        if step:
            save_samples(ema, vae, cfg, config, step, condition.text, rank)
        state = {"step": step, "seconds": seconds + time.time() - since, "opt": opt.state_dict(), "extra": extra}
        weights = {name: {k: v for k, v in m.state_dict().items() if k in trained or not cfg.lora}
                   for name, m in (("model", dit), ("ema", ema))}
        frozen = {k: v for k, v in dit.state_dict().items() if k not in trained and cfg.lora and step == 0}
        state, weights, frozen = whole((state, weights, frozen), keep=rank == 0)
        if rank == 0:
            with runs.disk_may_fail(must):
                if step == 0:                                      # what no step changes
                    runs.save_folder(Path(cfg.out) / "vae", {"model": vae.state_dict()},
                                       {"source": cfg.vae, "model": vae.config()})
                if frozen:
                    runs.save_folder(Path(cfg.out) / "frozen", {"model": frozen}, {"source": cfg.base})
                runs.save_checkpoint(cfg.out, step, weights, state, config)

    if not resumed:                                                # a disk that is too small shows now, not after hours
        save(0, must=True)
    if not cfg.shard:
        share_frozen(dit, ema)                                     # after they were saved as they came
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc=cfg.out, disable=rank > 0, mininterval=1)
    ranks.heed_signals()
    for n, (z_all, y) in zip(bar, stream):
        if n == 0:
            if rank == 0:
                check_statistics(z_all, vae.C, cfg.out)
            if base is not None and cfg.D:
                z, cond, uncond = z_all[:16, :vae.C], condition(y[:16], 0.0), condition(y[:16], 1.0)
                extra["warm_start"] = prove_warm_start(base.to(device), dit, vae, z, cond, uncond, cfg, rank)
        base = None                                                # its memory is wanted
        for group in opt.param_groups:
            group["lr"] = lr = train_vae.learning_rate(n, cfg)
        w, sums = detail_weight(n, cfg.N), {}

        # accumulate over micro-batches, synchronise gradients on the last one only
        for i, (z_part, y_part) in enumerate(zip(z_all.chunk(accumulate), y.chunk(accumulate))):
            ranks.seed_step(cfg.seed, rank * accumulate + i, n)
            cond = condition(y_part, cfg.label_dropout)
            model.require_backward_grad_sync = sync = i == accumulate - 1
            if cfg.shard:
                dit.set_requires_gradient_sync(sync)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, base_loss, detail_loss = flow_loss(model, z_part, cond, vae.C, w, cfg.cosine, cfg.weighting)
            (loss / accumulate).backward()
            halves = {"base": base_loss, "detail": detail_loss} if cfg.D else {"base": base_loss}
            train_vae.add_up(sums, {"loss": loss.detach(), **halves}, accumulate)
        norm = whole(nn.utils.clip_grad_norm_(trained.values(), cfg.clip or math.inf))
        train_vae.stop_if_not_finite(norm, loss, dit, n)           # the one place where a step waits for the device
        opt.step()
        opt.zero_grad(set_to_none=True)
        ema_update(ema, dit, cfg.ema)

        if (n + 1) % cfg.log_every == 0:
            means = log(n + 1, sums, **({"w": w} if cfg.D else {}), gnorm=norm.item(), lr=lr,
                        **{"img/s": (n + 1 - start) * cfg.batch_size / (time.time() - since)})
            extra.update({name: means[name] for name in halves})
        stop, last = ranks.asked_to_stop(), n + 1 == cfg.steps
        if stop or last or (n + 1) % cfg.save_every == 0:
            save(n + 1, must=stop or last)
        if stop and not last:
            if rank == 0:
                tqdm.write(f"{cfg.out}: stopped after step {n + 1}; the same command goes on from there")
            raise SystemExit(0)
    ranks.heed_signals(False)

    ranks.wait_for_all()
    summary = {"stage": "DA-VAE DiT" if cfg.D else "base DiT", "steps": cfg.steps, "seconds": seconds + time.time() - since,
               **extra}
    if rank == 0:
        figures.plot_losses(cfg.out)
        runs.write_json(summary_file, summary)
        figures.final_table([cfg.vae, cfg.base, cfg.out])
        pictures = sorted(p.name for p in Path(cfg.out).glob("*.png") if not p.stem[-6:].isdigit())
        print(f"\npictures in {cfg.out}: {', '.join(pictures)}\nnext: python sample.py {cfg.out}; python evaluate.py {cfg.out}")
    return summary

if __name__ == "__main__":
    ranks.launch(main, config.cli(Config, PRESETS))
