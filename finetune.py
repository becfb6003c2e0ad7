"""Stage 2, the main job: warm-start a DiT on a DA-VAE's latent (or, with D = 0, train a base DiT from scratch).

    python finetune.py                                             # preset tiny: everything from nothing, on a CPU
    python finetune.py photos --vae=out/photos-vae --data_dir=photos/train
    torchrun --nproc_per_node=8 finetune.py photos ...              # the same on 8 GPUs

What a preset needs and does not find (base VAE, DA-VAE, base DiT) is trained first. Writes to --out: log.jsonl, loss.png,
warm_start.png (step 0: base model | widened model), samples_*.png, the VAE, and step_*/ checkpoints for sample.py and
evaluate.py. The same command again resumes, or says that the run is finished.

Time, here and everywhere: t = 0 is noise, t = 1 is data, x_t = t*data + (1-t)*noise, v = data - noise.
"""
import dataclasses
import hashlib
import itertools
import json
import math
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import data
import sample
import train_vae
from common import field
from davae import load_davae
from dit import DiTConfig, LightningDiT, load_dit


@dataclass
class Config:
    preset: str = field("tiny", "a name in PRESETS")
    out: str = field("", "the run's folder")
    device: str = field("auto", "auto, cpu or cuda")
    seed: int = field(0, "of the weights, the data order and every random draw")
    # data and latents
    data_dir: str = field("procedural", "a folder of images, or 'procedural' for the built-in ones")
    image_size: int = field(512, "pixels; images are resized and centre-cropped to this square")
    images: int = field(4096, "how many procedural images")
    flip: bool = field(True, "mirror half of the images")
    vae: str = field("", "a run of train_vae.py (or, with D = 0, any base VAE)")
    cache: bool = field(True, "encode all images once, keep the latents in memory and on disk; False: encode as we go")
    detail_sample: bool = field(False, "sample z_d's posterior, as the authors' ImageNet features; False: its mode")
    # model
    D: int = field(96, "detail channels, the VAE's; 0 trains a base DiT on the base channels alone")
    base: str = field("", "the pretrained base DiT to widen: a run, or LightningDiT's weights; empty: start from scratch")
    base_weights: str = field("ema", "ema or model (the authors start from LightningDiT's 'model')")
    p: int = field(1, "no base given: patch side in latent pixels")
    E: int = field(1152, "no base given: width")
    depth: int = field(28, "no base given: blocks")
    A: int = field(16, "no base given: heads")
    qk_norm: bool = field(False, "no base given: RMSNorm on q and k")
    # loss (Sec. 3.3, Tab. S1)
    N: int = field(10_000, "steps over which the weight w(n) of the detail channels rises from 0 to 1")
    cosine: float = field(1.0, "weight of the term 1 - cos(v, v*)")
    label_dropout: float = field(0.1, "probability of training without the label, for guidance")
    # optimisation
    steps: int = field(140_000, "optimizer steps")
    batch_size: int = field(640, "images per optimizer step, over all ranks")
    micro_batch: int = field(80, "images per rank and forward pass")
    lr: float = field(2e-4, "learning rate")
    cooldown: float = field(0.0, "last part of the steps over which lr falls to 0, as a fraction")
    clip: float = field(1.0, "gradient norm limit; 0: none, as the authors")
    ema: float = field(0.999, "decay of the weight average that is sampled from")
    log_every: int = field(100, "steps")
    save_every: int = field(5000, "steps between checkpoints, each with a picture of samples")
    # sampling defaults, kept with the model
    cfg: float = field(4.0, "guidance scale of the pictures and sample.py's default")
    shift: float = field(0.3, "time shift of the pictures and sample.py's default")
    sample_steps: int = field(50, "Euler steps of the pictures")


PRESETS = {
    "tiny-base": dict(out="out/tiny-base", vae="out/tiny-vae", D=0, p=2, E=192, depth=6, A=3, image_size=64, flip=False,
                      steps=600, batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.98, cfg=2.0, shift=1.0,
                      sample_steps=20, log_every=25, save_every=600),
    "tiny": dict(out="out/tiny", vae="out/tiny-vae", base="out/tiny-base", D=24, N=100, image_size=64, flip=False, steps=500,
                 batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.98, cfg=2.0, shift=1.0, sample_steps=20,
                 log_every=25, save_every=500),
    # both: every class recognised, 58 % of samples judged sharp by the probe (60 % of the VAE's round trips); under 3 minutes
    # together on 2 cores (2026-11-21)
    "photos-base": dict(out="out/photos-base", vae="out/photos-vae", D=0, E=256, depth=6, A=4, image_size=128, steps=800,
                        batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.99, cfg=2.5, shift=1.0, log_every=50,
                        save_every=400),
    "photos": dict(out="out/photos", vae="out/photos-vae", base="out/photos-base", D=96, N=200, image_size=128, steps=500,
                   batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.99, cfg=2.5, shift=1.0, log_every=50,
                   save_every=250),      # both: not run at this length
}
MAY_CHANGE = {"preset", "device", "data_dir", "vae", "base", "cache", "micro_batch", "lr", "steps", "cooldown", "clip",
              "log_every", "save_every", "cfg", "shift", "sample_steps"}      # on resume; anything else would be another run

# ---------------------------------------------------------------- the method


def detail_weight(n, N):
    """w(n): 0 at step n = 0, 1/2 at N/2, 1 from N on; half a cosine.  Eq. (12).

    Differs from the paper: its text keeps w low for N steps and ramps after; its code, and this, ramp over the N steps.
    """
    return 0.5 * (1 - math.cos(math.pi * min(n / N, 1.0))) if N else 1.0


def flow_loss(model, z_all, y, C, w, cosine=1.0):
    """Rectified-flow loss at logit-normal times, with weight w on the detail channels.  Eq. (13).

    mse    = (C * base + w * D * detail) / (C + w * D): the weighted mean over channels of (v - v*)^2
    loss   = mse + cosine * mean over positions of 1 - cos(v, v*), the cosine over all C + D channels, unweighted
    z_all: (B, C+D, h, w), y: (B,); returns (loss, base, detail), () float32, the halves detached and unweighted.
    Differs from the paper, like the authors' code: w(n) scales the squared error only, so details learn from step 0.
    """
    D = z_all.shape[1] - C
    t = torch.sigmoid(torch.randn(len(z_all), device=z_all.device))           # (B,), 0 noise, 1 data
    noise = torch.randn_like(z_all)
    s = t.view(-1, 1, 1, 1)
    target = z_all - noise                                                    # v*
    v = model(s * z_all + (1 - s) * noise, t, y).float()
    error = (v - target).square()                                             # (B, C+D, h, w)
    base = error[:, :C].mean()
    detail = error[:, C:].mean() if D else torch.zeros_like(base)
    loss = (C * base + w * D * detail) / (C + w * D)
    loss = loss + cosine * (1 - F.cosine_similarity(v, target, dim=1)).mean()
    return loss, base.detach(), detail.detach()


def drop_labels(y, null, p):
    """Each label becomes `null` with probability p, so that one model also learns the unconditional velocity."""
    return torch.where(torch.rand(len(y), device=y.device) < p, null, y)


@torch.no_grad()
def warm_start_difference(base, model, z, y):
    """Largest |change| of the base velocity and largest |detail velocity| of a widened model, for random z_d and t.

    z: (B, C, h, w), y: (B,). Both are 0.0 at step 0: the details neither disturb the base nor move yet.  Sec. 3.2.
    """
    B, C, h, w = z.shape
    t = torch.rand(B, device=z.device)
    z_d = torch.randn(B, model.cfg.D, h, w, device=z.device)
    v = model(torch.cat([z, z_d], dim=1), t, y)
    return (v[:, :C] - base(z, t, y)).abs().max().item(), v[:, C:].abs().max().item()


# ---------------------------------------------------------------- latents


def latent_source(vae, train_set, cfg, device):
    """A function (start, rank, world) -> endless (z_all (b, C+D, h, w), y (b,)) batches, from a cache or encoded as we go."""
    channels = vae.C + cfg.D

    def encode(x):
        return vae.encode(data.to_tensor(x).to(device), sample=cfg.detail_sample)

    if not cfg.cache:
        def stream(start, rank, world):
            for x, y in data.batches(train_set, cfg.batch_size, cfg.seed, start, rank, world, flip=cfg.flip):
                yield encode(x)[:, :channels], y.to(device)
        return stream
    path = cache_file(vae, train_set, cfg)
    if not path.exists():
        write_cache(path, encode, train_set, cfg)
    with safe_open(path, "pt", device=str(device)) as f:
        latents, labels = f.get_tensor("latents")[:, :, :channels], f.get_tensor("labels")    # (orientations, images, ...)

    def stream(start, rank, world):
        for step in itertools.count(start):
            k, flipped = data.batch_plan(len(labels), cfg.batch_size, cfg.seed, step, rank, world, cfg.flip)
            yield latents[flipped.astype(int), k].float(), labels[k]
    return stream


def cache_file(vae, train_set, cfg):
    """<vae or out>/latents-<hash>.safetensors; the hash covers the VAE's weights and all that fixes the images."""
    digest = hashlib.sha256(json.dumps([cfg.data_dir, cfg.image_size, len(train_set), cfg.seed * (cfg.data_dir == "procedural"),
                                        cfg.flip, cfg.detail_sample]).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    folder = Path(cfg.vae) if Path(cfg.vae).is_dir() and common.checkpoints(cfg.vae) else Path(cfg.out)
    return folder / f"latents-{digest.hexdigest()[:12]}.safetensors"


def write_cache(path, encode, train_set, cfg):
    """Encode every image, and its mirror image with cfg.flip, to half precision: `latents` (1 or 2, n, C+D, h, w), `labels`."""
    index, encoded, labels = range(len(train_set)), [[], []][:1 + cfg.flip], []
    for k in tqdm(range(0, len(index), 64), desc=f"encoding {path}", mininterval=1):
        x, y = data.stack(train_set, index[k:k + 64])
        labels.append(y)
        for flipped, part in enumerate(encoded):
            part.append(encode(x.flip(2) if flipped else x).half().cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": torch.stack([torch.cat(part) for part in encoded]), "labels": torch.cat(labels)}, f"{path}.tmp")
    Path(f"{path}.tmp").replace(path)


# ---------------------------------------------------------------- set-up


def make_if_missing(run, cfg):
    """Train (or finish) the base DiT or VAE `run` if it is the folder of a preset here or in train_vae.py."""
    train_vae.make_if_missing(run, cfg)
    preset = next((name for name, values in PRESETS.items() if values["out"] == run), None)
    if preset and common.step_of(run) < PRESETS[preset]["steps"]:
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
    source = common.latest_checkpoint(cfg.base) if Path(cfg.base).is_dir() and common.checkpoints(cfg.base) else cfg.base
    base = load_dit(source, cfg.base_weights)
    if (base.cfg.C, base.cfg.D) != (vae.C, 0):
        raise SystemExit(f"{cfg.base}: takes {base.cfg.C} base and {base.cfg.D} detail channels; wanted a base model of "
                         f"{cfg.vae}'s {vae.C} channels")
    if base.cfg.num_classes < num_classes:
        raise SystemExit(f"{cfg.base}: has {base.cfg.num_classes} classes; {cfg.data_dir} has {num_classes}")
    model = deepcopy(base)
    if cfg.D:
        model.expand_channels(cfg.D)
    return model, base


def prove_warm_start(base, model, vae, z, y, cfg):
    """Print how far the widened model is from the base model (0.0) and save samples of both, base channels, side by side."""
    change, detail = warm_start_difference(base, model, z, y)
    tqdm.write(f"{cfg.out}: warm start, {len(z)} latents, random details: max |v - v_base| = {change}, max |v_d| = {detail}")
    if max(change, detail) > 1e-5:
        raise SystemExit("the widened model is not the base model: P_new or O_new is not zero")
    null = base.cfg.num_classes
    labels = torch.arange(8, device=z.device) % null
    noise = sample.sample_noise(cfg.seed, range(8), (vae.C + cfg.D, *z.shape[2:])).to(z.device)
    ts = sample.time_grid(cfg.sample_steps, cfg.shift)
    rows = [sample.sample_flow(m, noise[:, :k], ts, labels, null, cfg.cfg)[:, :vae.C]
            for m, k in ((base, vae.C), (model, vae.C + cfg.D))]
    with torch.no_grad():
        x = vae.decode_base(torch.cat(rows)).clamp(-1, 1)
    labels = ["base model"] * 8 + ["widened, step 0"] * 8
    data.save_grid(x, Path(cfg.out) / "warm_start.png", 8, max(1, 96 // x.shape[-1]), labels)
    return change


def save_samples(ema, vae, cfg, classes, step):
    """samples_<step>.png: four images of each of the first ten classes, each column the same noise."""
    n = min(10, ema.cfg.num_classes)
    settings = dict(seed=cfg.seed, classes=list(range(n)), steps=cfg.sample_steps, shift=cfg.shift, cfg=cfg.cfg,
                    cfg_start=0.0, cfg_end=1.0, cfg_channels=0)
    images, base = sample.generate(ema, vae, range(4 * n), settings)
    labels = [classes[k] if k < len(classes) else str(k) for k in range(n)] * 4
    files = {"samples": images, "samples_base_only": base} if cfg.D else {"samples": images}
    for name, x in files.items():
        for file in (f"{name}_{step:06d}.png", f"{name}.png"):
            data.save_grid(x, Path(cfg.out) / file, n, max(1, 128 // x.shape[-1]), labels)


def final_table(cfg):
    """The stages behind this run, in the order they were trained, as aligned lines."""
    base_vae = common.read_config(common.checkpoints(cfg.vae)[-1])["config"]["base"] if common.checkpoints(cfg.vae) else ""
    runs = [base_vae, cfg.vae, cfg.base, cfg.out]
    print(f"\n{'stage':<12}{'folder':<22}{'steps':>8}{'seconds':>9}  result")
    for run in runs:
        if not run or not (Path(run) / "summary.json").exists():
            continue
        s = json.loads((Path(run) / "summary.json").read_text())
        if "psnr" in s:
            result = (f"base only {s['psnr_base']:.2f} dB -> DA-VAE {s['psnr']:.2f} dB" if s["stage"] == "DA-VAE"
                      else f"{s['psnr']:.2f} dB")
        else:
            result = f"loss base {s['base']:.3f}" + (f", detail {s['detail']:.3f}; warm start off by {s['warm_start']}"
                                                     if "warm_start" in s else "")
        print(f"{s['stage']:<12}{run:<22}{s['steps']:>8}{s['seconds']:>9.0f}  {result}")


# ---------------------------------------------------------------- the loop


def main(cfg):
    """Train, draw and save as `cfg` says.  Returns the summary of the finished run, which is also in summary.json."""
    summary_file = Path(cfg.out) / "summary.json"
    if common.step_of(cfg.out) >= cfg.steps and summary_file.exists():
        print(f"{cfg.out}: finished at step {common.step_of(cfg.out)}; give more --steps or another --out to go on")
        return json.loads(summary_file.read_text())
    rank, world, device = common.setup(cfg.device)
    accumulate = common.micro_batches(cfg.batch_size, cfg.micro_batch, world)
    make_if_missing(cfg.vae, cfg)
    vae = load_davae(cfg.vae).to(device).requires_grad_(False)
    if cfg.D not in (0, vae.D):
        raise SystemExit(f"--D={cfg.D}, but {cfg.vae} has {vae.D} detail channels; give that, or 0 for a base model")
    train_set = data.open_dataset(cfg.data_dir, cfg.image_size, cfg.images, cfg.seed)

    # model and EMA: from the newest checkpoint if there is one
    resumed, base = common.checkpoints(cfg.out)[-1:], None
    if resumed:
        common.check_resume(common.read_config(resumed[0])["config"], cfg, MAY_CHANGE)
        dit, ema = load_dit(resumed[0], "model"), load_dit(resumed[0], "ema")
    else:
        dit, base = initial_dit(cfg, vae, max(1, len(train_set.classes)))
        ema = deepcopy(dit)
    dit, ema = dit.to(device).train(), ema.to(device).eval().requires_grad_(False)
    opt = torch.optim.AdamW(dit.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start, seconds, extra = 0, 0.0, {}
    if resumed:
        state = torch.load(resumed[0] / "train_state.pt", map_location=device, weights_only=True)
        opt.load_state_dict(state["opt"])
        start, seconds, extra = state["step"], state["seconds"], state["extra"]
    model = DistributedDataParallel(dit) if world > 1 else dit
    config = {"script": "finetune.py", "config": dataclasses.asdict(cfg), "model": dataclasses.asdict(dit.cfg),
              "classes": train_set.classes}

    since = time.time()
    if rank == 0:
        print(f"{cfg.out}: {train_set.summary()}\n  {sum(p.numel() for p in dit.parameters()):,} parameters; C={vae.C} "
              f"D={cfg.D} p={dit.cfg.p}, {dit.cfg.grid**2} tokens; batch {cfg.batch_size} = {world} ranks x "
              f"{cfg.batch_size // world // accumulate} x {accumulate}; steps {start} to {cfg.steps}, {device}")
        common.save_folder(Path(cfg.out) / "vae", {"model": vae.state_dict()}, {"source": cfg.vae, "model": vae.config()})
    stream = latent_source(vae, train_set, cfg, device)(start, rank, world)
    log = common.Log(cfg.out, rank, start, cfg.steps)

    def save(step):
        save_samples(ema, vae, cfg, train_set.classes, step)
        state = {"step": step, "seconds": seconds + time.time() - since, "opt": opt.state_dict(), "extra": extra}
        common.save_checkpoint(cfg.out, step, {"model": dit.state_dict(), "ema": ema.state_dict()}, state, config)

    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc=cfg.out, disable=rank > 0, mininterval=1)
    for n, (z_all, y) in zip(bar, stream):
        if n == 0 and rank == 0:
            z, z_d = z_all[:, :vae.C], z_all[:, vae.C:]
            tqdm.write(f"{cfg.out}: latents of the first batch: base mean {z.mean():.2f} std {z.std():.2f}"
                       + (f", detail mean {z_d.mean():.2f} std {z_d.std():.2f}" if cfg.D else ""))
            if base is not None and cfg.D:
                extra["warm_start"] = prove_warm_start(base.to(device), dit, vae, z[:16], y[:16], cfg)
        common.seed_step(cfg.seed, rank, n)
        for group in opt.param_groups:
            group["lr"] = lr = train_vae.learning_rate(n, cfg)
        w = detail_weight(n, cfg.N)
        y = drop_labels(y, dit.cfg.num_classes, cfg.label_dropout)

        # accumulate over micro-batches, synchronise gradients on the last one only
        for i, (z_part, y_part) in enumerate(zip(z_all.chunk(accumulate), y.chunk(accumulate))):
            model.require_backward_grad_sync = i == accumulate - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, base_loss, detail_loss = flow_loss(model, z_part, y_part, vae.C, w, cfg.cosine)
            (loss / accumulate).backward()
        norm = nn.utils.clip_grad_norm_(dit.parameters(), cfg.clip or math.inf)
        common.stop_if_not_finite(norm, dit, n)
        opt.step()
        opt.zero_grad(set_to_none=True)
        common.ema_update(ema, dit, cfg.ema)

        if (n + 1) % cfg.log_every == 0:
            halves = {"base": base_loss.item(), "detail": detail_loss.item(), "w": w} if cfg.D else {"base": base_loss.item()}
            extra.update(halves)
            log(n + 1, loss=loss.item(), **halves, gnorm=norm.item(), lr=lr,
                **{"img/s": (n + 1 - start) * cfg.batch_size / (time.time() - since)})
        if rank == 0 and ((n + 1) % cfg.save_every == 0 or n + 1 == cfg.steps):
            save(n + 1)

    summary = {"stage": "DA-VAE DiT" if cfg.D else "base DiT", "steps": cfg.steps, "seconds": seconds + time.time() - since,
               **extra}
    if rank == 0:
        train_vae.plot_losses(cfg.out)
        common.write_json(summary_file, summary)
        final_table(cfg)
        pictures = sorted(p.name for p in Path(cfg.out).glob("*.png") if not p.stem[-6:].isdigit())
        print(f"\npictures in {cfg.out}: {', '.join(pictures)}\nnext: python sample.py {cfg.out}; python evaluate.py {cfg.out}")
    return summary


if __name__ == "__main__":
    main(common.cli(Config, PRESETS))
