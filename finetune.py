"""Stage 2, the main job: warm-start a DiT on a DA-VAE's latent (or, with D = 0, train a base DiT from scratch).

    python finetune.py                                             # preset tiny: everything from nothing, on a CPU
    python finetune.py photos --vae=out/photos-vae --data_dir=photos/train
    torchrun --nproc_per_node=8 finetune.py imagenet512 --data_dir=imagenet/train --base=lightningdit-xl-imagenet256-800ep.pt
    torchrun --nproc_per_node=8 finetune.py sd35m-1024 --data_dir=captioned --base=sd3.5-medium --text=out/text
    python finetune.py sd35m-1024 --dry_run=True                   # what that would take; needs no weights

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
import shutil
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import data
import sample
import train_vae
from common import field
from davae import load_davae
from dit import DiTConfig, LightningDiT, MMDiT, MMDiTConfig, add_lora, load_dit


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
    "tiny-base": dict(out="out/tiny-base", vae="out/tiny-vae", D=0, p=2, E=192, depth=6, A=3, image_size=64, flip=False,
                      steps=600, batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.98, cfg=2.0, shift=1.0,
                      sample_steps=20, log_every=25, save_every=600),
    "tiny": dict(out="out/tiny", vae="out/tiny-vae", base="out/tiny-base", D=24, N=100, image_size=64, flip=False, steps=500,
                 batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.98, cfg=2.0, shift=1.0, sample_steps=20,
                 log_every=25, save_every=500),
    # every class recognised, 58 % judged sharp by the probe (60 % of the VAE's round trips); 3 minutes, 2 cores (2026-11-21)
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
              "checkpointing", "compile", "log_every", "save_every", "cfg", "shift", "grid", "sample_steps", "dry_run"}
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


def drop_labels(y, null, p):
    """Each label becomes `null` with probability p, so that one model also learns the unconditional velocity."""
    return torch.where(torch.rand(len(y), device=y.device) < p, null, y)


@torch.no_grad()
def warm_start_difference(base, model, z, cond):
    """Largest |change| of the base velocity and largest |detail velocity| of a widened model, for random z_d and t.

    z: (B, C, h, w); cond: see flow_loss. Both are 0.0 at step 0: details neither disturb the base nor move yet.  Sec. 3.2.
    """
    B, C, h, w = z.shape
    t = torch.rand(B, device=z.device)
    z_d = torch.randn(B, model.cfg.D, h, w, device=z.device)
    v = model(torch.cat([z, z_d], dim=1), t, *cond)
    return (v[:, :C] - base(z, t, *cond)).abs().max().item(), v[:, C:].abs().max().item()


# ---------------------------------------------------------------- latents

SHARD = 1024                                       # images per file of cached latents


def latent_source(vae, train_set, cfg, device, rank, world):
    """A function start -> endless (z_all (b, C+D, h, w), y (b,)) batches of this rank, from a cache or encoded as we go."""
    channels = vae.C + cfg.D

    def encode(x):
        return vae.encode(data.to_tensor(x).to(device), sample=cfg.detail_sample)

    def encoded(start):
        for x, y in data.batches(train_set, cfg.batch_size, cfg.seed, start, rank, world, flip=cfg.flip):
            yield encode(x)[:, :channels], y.to(device)

    def cached(start):
        for step in itertools.count(start):
            k, flipped = data.batch_plan(len(train_set), cfg.batch_size, cfg.seed, step, rank, world, cfg.flip)
            rows = [(shards[i // SHARD], int(flip), i % SHARD) for i, flip in zip(k.tolist(), flipped)]
            z_all = torch.stack([shard["latents"][flip, i, :channels] for shard, flip, i in rows])
            yield z_all.to(device).float(), torch.stack([shard["labels"][i] for shard, _, i in rows]).to(device)

    if not cfg.cache:
        return encoded
    folder = cache_folder(vae, train_set, cfg)
    write_cache(folder, vae, encode, train_set, cfg, rank, world)
    common.wait_for_all()
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]       # mapped: read as they are used
    return cached


def cache_folder(vae, train_set, cfg):
    """<vae or out>/latents-<hash>; the hash covers the VAE's weights and all that fixes the images and their labels."""
    digest = hashlib.sha256(json.dumps([cfg.data_dir, cfg.image_size, len(train_set), cfg.seed * (cfg.data_dir == "procedural"),
                                        cfg.flip, cfg.detail_sample, bool(cfg.text)]).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    folder = Path(cfg.vae) if Path(cfg.vae).is_dir() and common.checkpoints(cfg.vae) else Path(cfg.out)
    return folder / f"latents-{digest.hexdigest()[:12]}"


def write_cache(folder, vae, encode, train_set, cfg, rank, world):
    """Encode the shards that are not there yet, each rank its own: `latents` (1 or 2, n, C+D, h, w) half, `labels` (n,).

    The second orientation, with cfg.flip, is the mirror image.   raises: SystemExit if the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {n: folder / f"{n:05d}.safetensors" for n in range(-(-len(train_set) // SHARD))}
    missing = [n for n in files if not files[n].exists()]
    images = min(SHARD * len(missing), len(train_set))
    size = images * (vae.C + vae.D) * (cfg.image_size // vae.f) ** 2 * 2 * (1 + cfg.flip)
    if size > (free := shutil.disk_usage(folder).free):
        raise SystemExit(f"{folder}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB of latents to write; give --cache=False")
    if missing and rank == 0:
        print(f"{folder}: {images} images to encode, {size / 1e9:.2f} GB of latents; {free / 1e9:.0f} GB free")
    for n in tqdm([n for n in missing if n % world == rank], desc="encoding", disable=rank > 0, mininterval=1):
        encoded, labels = [[], []][:1 + cfg.flip], []
        for k in range(n * SHARD, min((n + 1) * SHARD, len(train_set)), 64):
            x, y = data.stack(train_set, range(k, min(k + 64, (n + 1) * SHARD, len(train_set))))
            labels.append(y)
            for flipped, part in enumerate(encoded):
                part.append(encode(x.flip(2) if flipped else x).half().cpu())
        temporary = files[n].with_suffix(f".tmp{rank}")
        save_file({"latents": torch.stack([torch.cat(part) for part in encoded]), "labels": torch.cat(labels)}, temporary)
        temporary.replace(files[n])


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


class Conditioner:
    """What a model takes after z_all and t, given y: (labels,), or the text embeddings of the captions of images y.
    With probability p a label becomes the null class, a caption "". Makes a captioned data set's labels its image numbers."""

    def __init__(self, dit, train_set, cfg, device, rank):
        self.dit, self.captions, self.text = dit, train_set.captions, None
        if cfg.text:
            if not self.captions:
                raise SystemExit(f"{cfg.data_dir}: has no captions; wanted name.txt beside each image, or metadata.jsonl")
            train_set.labels = np.arange(len(train_set))
            self.text = sample.text_for(cfg.text, self.captions, cfg.out, rank, device, cfg.t5_tokens)

    def __call__(self, y, p):
        if not self.text:
            return (drop_labels(y, self.dit.cfg.num_classes, p),)
        dropped = (torch.rand(len(y)) < p).tolist()
        return self.text(["" if drop else self.captions[i] for i, drop in zip(y.tolist(), dropped)])


def share_frozen(dit, ema):
    """Let the EMA use the model's own frozen matrices, in bfloat16 on a GPU, as autocast would see them anyway."""
    for p, e in zip(dit.parameters(), ema.parameters()):
        if not p.requires_grad:
            p.data = e.data = p.data.bfloat16() if p.is_cuda and p.ndim > 1 else p.data


def prove_warm_start(base, model, vae, z, cond, uncond, cfg):
    """Print how far the widened model is from the base model (0.0) and save samples of both, base channels, side by side."""
    with torch.autocast(z.device.type, torch.bfloat16, enabled=z.is_cuda):
        change, detail = warm_start_difference(base, model, z, cond)
    tqdm.write(f"{cfg.out}: warm start, {len(z)} latents, random details: max |v - v_base| = {change}, max |v_d| = {detail}")
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
    data.save_grid(x, Path(cfg.out) / "warm_start.png", len(noise), max(1, 96 // x.shape[-1]), labels)
    return change


def save_samples(ema, vae, cfg, config, step, text):
    """samples_<step>.png: four images of each of the first ten classes (or prompts), each column the same noise."""
    n = min(10, len(config["classes"]) if cfg.text else ema.cfg.num_classes)
    settings = sample.settings_of(sample.Config(steps=cfg.sample_steps, seed=cfg.seed, classes=tuple(range(n))), config, "")
    images, base = sample.generate(ema, vae, range(4 * n), settings, text)
    labels = [config["classes"][k][:24] if k < len(config["classes"]) else str(k) for k in range(n)] * 4
    for name, x in {"samples": images, "samples_base_only": base}.items() if cfg.D else [("samples", images)]:
        for file in (f"{name}_{step:06d}.png", f"{name}.png"):
            data.save_grid(x, Path(cfg.out) / file, n, max(1, 128 // x.shape[-1]), labels)


def dry_run(cfg):
    """Print what a run would be, from shapes alone, for the released VA-VAE + LightningDiT or SD3 models.  Returns numbers.

    Memory is per GPU: weights, gradients, AdamW and EMA exactly; an upper bound of what the backward pass keeps.
    """
    C, f, texts = (16, 16, 77 + cfg.t5_tokens) if cfg.text else (32, 32, 0)
    side = cfg.image_size // f
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(C=C)) if cfg.text else LightningDiT(DiTConfig(
            C=C, p=cfg.p, grid=side // cfg.p, E=cfg.E, depth=cfg.depth, A=cfg.A, qk_norm=cfg.qk_norm))
        if cfg.D:
            model.expand_channels(cfg.D)
        inputs = [torch.empty(1, C + cfg.D, side, side), torch.empty(1)]
        inputs += ([torch.empty(1, texts, model.cfg.context), torch.empty(1, model.cfg.pooled)] if cfg.text else
                   [torch.zeros(1, dtype=torch.long)])
        forward, _, _ = sample.cost(model, inputs)                 # as it is sampled from, without adapters
        if cfg.lora:
            add_lora(model, cfg.lora, cfg.lora)
        _, step, kept = sample.cost(model, inputs)
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    tokens, depth = (side // model.cfg.p) ** 2, model.cfg.depth
    if cfg.checkpointing:                          # the input of every block, and one block in full
        kept = kept / depth + (tokens + texts) * model.cfg.E * depth
    states, kept = (trained * 20 + (total - trained) * 2) / 2**30, 2 * kept * cfg.micro_batch / 2**30
    disk = ((C + cfg.D) * side**2 * 2 * (1 + cfg.flip) / 2**20, 8 * (trained + (trained if cfg.lora else total)) / 2**30)
    print(*(f"--{name}={value}" for name, value in dataclasses.asdict(cfg).items()), sep="\n")
    print(f"model   {type(model).__name__}: {total:,} parameters, {trained:,} trained, {total - trained:,} frozen\n"
          f"tokens  {tokens} for {cfg.image_size} x {cfg.image_size} pixels (the original {4 * tokens}), {texts} of text\n"
          f"FLOPs   {forward / 1e9:,.1f} G an image forward; {step * cfg.batch_size / 1e12:,.1f} T a step of {cfg.batch_size}\n"
          f"memory  {states:.1f} GiB of states, {kept:.1f} GiB of activations at micro_batch {cfg.micro_batch}; and the VAE\n"
          f"disk    {disk[0]:.2f} MiB of cached latents an image; {disk[1]:.1f} GiB a checkpoint\n"
          f"reads   {', '.join(filter(None, (cfg.data_dir, cfg.vae, cfg.base, cfg.text)))}\n"
          f"writes  {cfg.out}/: log.jsonl, pictures, vae/, {'frozen/, ' if cfg.lora else ''}and the two newest step_*/")
    return dict(parameters=total, trained=trained, tokens=tokens, forward=forward, step=step)


# ---------------------------------------------------------------- the loop


def main(cfg):
    """Train, draw and save as `cfg` says.  Returns the summary of the finished run, which is also in summary.json."""
    if cfg.dry_run:
        return dry_run(cfg)
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
    dit.checkpointing = cfg.checkpointing
    for block in dit.blocks if cfg.compile else ():                # in place: no name in a checkpoint changes
        block.compile()
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    opt = torch.optim.AdamW(trained.values(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0.0, fused=True)
    start, seconds, extra = 0, 0.0, {}
    if resumed:
        state = torch.load(resumed[0] / "train_state.pt", map_location=device, weights_only=True)
        opt.load_state_dict(state["opt"])
        start, seconds, extra = state["step"], state["seconds"], state["extra"]
    model = DistributedDataParallel(dit, broadcast_buffers=False) if world > 1 else dit
    condition = Conditioner(dit, train_set, cfg, device, rank)
    config = {"script": "finetune.py", "config": dataclasses.asdict(cfg), "model": dataclasses.asdict(dit.cfg), "classes":
              list(dict.fromkeys(filter(None, train_set.captions)))[:8] if cfg.text else train_set.classes}
    since = time.time()
    if rank == 0:
        print(f"{cfg.out}: {train_set.summary()}\n  {sum(p.numel() for p in trained.values()):,} trained of "
              f"{sum(p.numel() for p in dit.parameters()):,} parameters; C={vae.C} D={cfg.D} p={dit.cfg.p}, "
              f"{(cfg.image_size // vae.f // dit.cfg.p)**2} tokens; batch {cfg.batch_size} = {world} ranks x "
              f"{cfg.batch_size // world // accumulate} x {accumulate}; steps {start} to {cfg.steps}, {device}")
        common.save_folder(Path(cfg.out) / "vae", {"model": vae.state_dict()}, {"source": cfg.vae, "model": vae.config()})
        if cfg.lora and not resumed:
            frozen = {k: v for k, v in dit.state_dict().items() if k not in trained}
            common.save_folder(Path(cfg.out) / "frozen", {"model": frozen}, {"source": cfg.base})
    share_frozen(dit, ema)
    stream = latent_source(vae, train_set, cfg, device, rank, world)(start)
    log = common.Log(cfg.out, rank, start, cfg.steps)

    def save(step):
        save_samples(ema, vae, cfg, config, step, condition.text)
        state = {"step": step, "seconds": seconds + time.time() - since, "opt": opt.state_dict(), "extra": extra}
        weights = {name: {k: v for k, v in m.state_dict().items() if k in trained or not cfg.lora}
                   for name, m in (("model", dit), ("ema", ema))}
        common.save_checkpoint(cfg.out, step, weights, state, config)

    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc=cfg.out, disable=rank > 0, mininterval=1)
    for n, (z_all, y) in zip(bar, stream):
        if n == 0 and rank == 0:
            z, z_d = z_all[:, :vae.C], z_all[:, vae.C:]
            tqdm.write(f"{cfg.out}: latents of the first batch: base mean {z.mean():.2f} std {z.std():.2f}"
                       + (f", detail mean {z_d.mean():.2f} std {z_d.std():.2f}" if cfg.D else ""))
            if base is not None and cfg.D:
                extra["warm_start"] = prove_warm_start(base.to(device), dit, vae, z[:16], condition(y[:16], 0.0),
                                                       condition(y[:16], 1.0), cfg)
        base = None                                                # its memory is wanted
        common.seed_step(cfg.seed, rank, n)
        for group in opt.param_groups:
            group["lr"] = lr = train_vae.learning_rate(n, cfg)
        w, cond = detail_weight(n, cfg.N), condition(y, cfg.label_dropout)

        # accumulate over micro-batches, synchronise gradients on the last one only
        for i, (z_part, *parts) in enumerate(zip(z_all.chunk(accumulate), *(c.chunk(accumulate) for c in cond))):
            model.require_backward_grad_sync = i == accumulate - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, base_loss, detail_loss = flow_loss(model, z_part, parts, vae.C, w, cfg.cosine, cfg.weighting)
            (loss / accumulate).backward()
        norm = nn.utils.clip_grad_norm_(trained.values(), cfg.clip or math.inf)
        common.stop_if_not_finite(norm, dit, n)                    # the one place where a step waits for the device
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

    common.wait_for_all()
    summary = {"stage": "DA-VAE DiT" if cfg.D else "base DiT", "steps": cfg.steps, "seconds": seconds + time.time() - since,
               **extra}
    if rank == 0:
        train_vae.plot_losses(cfg.out)
        common.write_json(summary_file, summary)
        train_vae.final_table([cfg.vae, cfg.base, cfg.out])
        pictures = sorted(p.name for p in Path(cfg.out).glob("*.png") if not p.stem[-6:].isdigit())
        print(f"\npictures in {cfg.out}: {', '.join(pictures)}\nnext: python sample.py {cfg.out}; python evaluate.py {cfg.out}")
    return summary


if __name__ == "__main__":
    main(common.cli(Config, PRESETS))
