"""Stage 1: train a DA-VAE on a frozen base VAE (or, with D = 0, a plain base VAE).

    python train_vae.py tiny                                        # built-in images, CPU, about a minute
    python train_vae.py photos --base=taef2_folder --data_dir=photos/train
    torchrun --nproc_per_node=8 train_vae.py photos ...             # the same on 8 GPUs

Writes to --out: log.jsonl, loss.png, recon.png (input, base only, DA-VAE, error), step_*/. The same command again resumes.
"""
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from davae import DAVAE, LAYOUT, AutoencoderKL, KLConfig, Level, Mid, align_loss, half
from support.bases import TinyBlock
from support.weights import load_davae
from support import config, data, figures, ranks, runs
from support.config import field
from support.figures import plot_losses
from support.fit import fit_new_blocks
from support.metrics import make_lpips, psnr
from support.ranks import launch


@dataclass
class Config:
    preset: str = field("tiny", "a name in PRESETS")
    out: str = field("", "the run's folder")
    device: str = field("auto", "auto, cpu or cuda")
    seed: int = field(0, "of the weights, the data order and every random draw")
    # data
    data_dir: str = field("procedural", "a folder of images, or 'procedural' for the built-in ones")
    val_dir: str = field("", "held-out images; empty: procedural ones of another seed, or the first training images")
    image_size: int = field(512, "pixels; images are resized and centre-cropped to this square")
    images: int = field(4096, "how many procedural images")
    crop: int = field(0, "train on random squares of this many pixels; 0: whole images")
    flip: bool = field(True, "mirror half of the images")
    # model
    base: str = field("", "the frozen base VAE: a file, a folder or a run; with D = 0: where to start, or empty")
    D: int = field(96, "detail channels; 0 trains the base VAE itself")
    freeze_encoder: bool = field(False, "keep the detail encoder as the base's, as the authors' SD3 script; train the rest")
    detail_dropout: float = field(0.1, "probability per image of decoding without details, in training")
    rescale: bool = field(False, "divide surviving details by 1 - detail_dropout, as the authors' code does")
    C: int = field(16, "D = 0, no base given: latent channels")
    ch: int = field(128, "D = 0, no base given: width of the first level")
    ch_mult: tuple = field((1, 2, 4, 4), "D = 0, no base given: width of each level / ch")
    blocks: int = field(2, "D = 0, no base given: residual blocks per level")
    groups: int = field(32, "D = 0, no base given: groups of each GroupNorm")
    # losses (Tab. S1)
    perceptual: str = field("vgg", "network of LPIPS: vgg, squeeze or none")
    lpips_trunk: str = field("", "local weight file of that network, instead of torchvision's download")
    kl: float = field(1e-6, "weight of the KL term, a mean over elements")
    align: float = field(0.5, "lambda_align, times the adaptive ratio")
    adaptive_align: bool = field(True, "scale the alignment by a ratio of gradient norms (ImageNet); False: not (SD3)")
    gan: float = field(0.1, "lambda_adv, times the adaptive ratio; 0: no discriminator")
    disc_start: int = field(5001, "step at which the discriminator starts, for both players")
    disc_width: int = field(64, "channels of the discriminator's first layer")
    # optimisation
    fit: bool = field(False, "start the two new blocks by least squares (D = 3C), not at random as in the paper")
    steps: int = field(100_000, "optimizer steps")
    batch_size: int = field(128, "images per optimizer step, over all ranks")
    micro_batch: int = field(16, "images per rank and forward pass")
    lr: float = field(1e-4, "learning rate of both players")
    beta1: float = field(0.5, "of AdamW; Tab. S1: 0.5 on ImageNet, 0.9 for SD3")
    beta2: float = field(0.9, "of AdamW; Tab. S1: 0.9 on ImageNet, 0.999 for SD3")
    cooldown: float = field(0.0, "last part of the steps over which lr falls to 0, as a fraction")
    clip: float = field(0.0, "gradient norm limit of the VAE; 0: none, as the authors")
    compile: bool = field(False, "torch.compile the levels of the VAE: minutes at the start, faster steps on a GPU (not run)")
    stats: int = field(10_000, "training images for the latent statistics")
    log_every: int = field(100, "steps")
    save_every: int = field(5000, "steps between checkpoints, each with a reconstruction strip")

PRESETS = {
    "tiny-base": dict(out="out/tiny-base-vae", D=0, C=8, ch=16, ch_mult=(1, 1, 2), blocks=1, groups=16, image_size=64,
                      flip=False, perceptual="none", gan=0.0, stats=1024, steps=800, batch_size=8, lr=3e-3, beta1=0.9,
                      beta2=0.99, cooldown=0.5, log_every=50, save_every=400),
    # 17.3 dB on 1,000 held-out images at full size; 41 s on 2 cores (2026-11-21)
    "tiny": dict(out="out/tiny-vae", base="out/tiny-base-vae", D=24, image_size=64, flip=False, perceptual="none", stats=1024,
                 align=0.05, adaptive_align=False, gan=0.1, disc_start=650, disc_width=16, steps=750, batch_size=8, lr=3e-3,
                 cooldown=0.5, log_every=50, save_every=375),
    # 19.05 dB against 16.99 dB of the base channels alone, same images; 75 s on 2 cores (2026-11-21)
    "photos": dict(out="out/photos-vae", base="taef2", D=96, image_size=128, crop=64, freeze_encoder=True, perceptual="none",
                   gan=0.0, align=0.05, adaptive_align=False, fit=True, stats=500, steps=1000, batch_size=8, micro_batch=8,
                   lr=1e-4, beta1=0.9, beta2=0.99, cooldown=0.5, log_every=100, save_every=500),
    # TAEF2, imagenette128: 26.23 dB against 22.46 dB of the base channels alone; 25 CPU-minutes, 2 cores (2026-11-21)
    "imagenet512": dict(out="out/imagenet512-vae", base="vavae-imagenet256-f16d32-dinov2.pt", D=96, image_size=512,
                        data_dir="imagenet/train"),                                                     # Tab. S1; not run
    "sd35m": dict(out="out/sd35m-vae", base="sd3.5-medium", D=16, image_size=1024, data_dir="captioned", flip=False, kl=1e-7,
                  align=1.0, adaptive_align=False, steps=10_000, batch_size=16, micro_batch=2, beta1=0.9,
                  beta2=0.999, detail_dropout=0.0),                                                     # Tab. S1; not run
}
MAY_CHANGE = {"preset", "device", "data_dir", "val_dir", "base", "lpips_trunk", "micro_batch", "lr", "steps", "cooldown",
              "clip", "compile", "log_every", "save_every"}      # on resume; anything else would be another run

# ---------------------------------------------------------------- losses

class PatchGAN(nn.Sequential):
    """The discriminator of pix2pix and taming: one real/fake logit per overlapping patch, (B, 3, H, W) -> (B, 1, h, w)."""

    def __init__(self, width=64):
        layers, widths = [], (3, width, 2 * width, 4 * width, 8 * width, 1)
        for i, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
            layers.append(conv := nn.Conv2d(c_in, c_out, 4, stride=2 if i < 3 else 1, padding=1, bias=i in (0, 4)))
            nn.init.normal_(conv.weight, 0.0, 0.02)
            if i in (0, 4):
                nn.init.zeros_(conv.bias)
            else:
                layers.append(bn := nn.BatchNorm2d(c_out))
                nn.init.normal_(bn.weight, 1.0, 0.02)
            layers += [nn.LeakyReLU(0.2)] * (i < 4)
        super().__init__(*layers)

def hinge_loss(real, fake):
    """Discriminator's hinge loss of two logit maps: zero where real >= 1 and fake <= -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

def adaptive_weight(nll, loss, weight, limit):
    """|grad nll| / |grad loss| at one weight tensor, clamped to [0, limit]: puts both losses on one scale there.

    (Esser et al., 2021, Eq. 7.) Costs a partial backward pass for each gradient; the graph is kept.
    """
    a, = torch.autograd.grad(nll, weight, retain_graph=True)
    b, = torch.autograd.grad(loss, weight, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-4)).clamp(0.0, limit).detach()

def vae_loss(vae, rec, x, cfg, lpips, disc):
    """The generator's loss: L1 + LPIPS + KL + adaptive align + adaptive GAN (disc is None before its start).

    rec: Reconstruction of x (B, 3, H, W).  Returns (loss, {name: detached value}).  Sec. 3.1, Tab. S1.
    """
    l1 = (rec.x_hat.float() - x).abs().mean()
    nll, parts = l1, {"l1": l1}
    if lpips is not None:
        parts["lpips"] = lpips(rec.x_hat.float(), x).mean()
        nll = nll + parts["lpips"]
    parts["kl"] = rec.posterior.kl()
    loss = nll + cfg.kl * parts["kl"]
    if vae.D:
        parts["align"] = align_loss(rec.z, rec.z_d)
        weight = cfg.align
        if cfg.adaptive_align:
            parts["a_w"] = adaptive_weight(nll, parts["align"], vae.down.conv.weight, 1e8)
            weight = cfg.align * parts["a_w"]
        loss = loss + weight * parts["align"]
    if disc is not None:
        parts["g"] = -disc(rec.x_hat.float()).mean()
        parts["d_w"] = adaptive_weight(nll, parts["g"], vae.last_conv.weight, 1e4)
        loss = loss + cfg.gan * parts["d_w"] * parts["g"]
    return loss, {k: v.detach() for k, v in parts.items()}

def add_up(sums, parts, count):
    """sums[k] += parts[k] / count: the mean over a step's micro-batches, for the log, without waiting for the GPU."""
    for name, value in parts.items():
        sums[name] = sums.get(name, 0) + value / count

def learning_rate(step, cfg):
    """cfg.lr, falling linearly to 0 over the last `cooldown` part of the run."""
    return cfg.lr * min(1.0, (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps))

def stop_if_not_finite(norm, loss, model, step):
    """Raise before the update when loss or gradient norm is not finite, naming the first bad parameter.

    Ranks share gradients, so they stop together; one that lost only its loss takes the others along by ending.
    """
    if not torch.isfinite(norm + loss):
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        raise SystemExit(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}, first bad parameter "
                         f"{bad[0] if bad else 'none'}; the weights were not touched. Lower --lr or --clip and run again")

# ---------------------------------------------------------------- evaluation while training

@torch.no_grad()
def reconstruct(vae, x):
    """(base only, full): what the base channels alone show, bicubically doubled where D > 0, and the whole decode."""
    z_all = vae.encode(x)
    base = vae.decode_base(z_all[:, :vae.C])
    if vae.D:
        base = F.interpolate(base, scale_factor=2.0, mode="bicubic", align_corners=False)
    return base.clamp(-1, 1), vae.decode(z_all).clamp(-1, 1)

def validate(vae, val, out, step):
    """Save the strip of the first 8 images; return PSNR of base only and of the whole over `val` (N, 3, H, W)."""
    vae.eval()
    pairs = [reconstruct(vae, x) for x in val.split(32)]
    base, full = (torch.cat(p) for p in zip(*pairs))
    rows = {"input": val, "base only": base, "DA-VAE": full} if vae.D else {"input": val, "VAE": full}
    rows["4x error"] = 4 * (full - val).abs() - 1                  # 4 * |error / 2| on [0, 1], shown on [-1, 1]
    strip, labels = torch.cat([x[:8] for x in rows.values()]), [name for name in rows for _ in val[:8]]
    for name in ("recon.png", f"recon_{step:06d}.png"):
        figures.save_grid(strip, Path(out) / name, columns=len(val[:8]), scale=max(1, 96 // val.shape[-1]), labels=labels)
    vae.train()
    return {"psnr_base": psnr(base, val).mean().item(), "psnr": psnr(full, val).mean().item()}

# ---------------------------------------------------------------- set-up

def initial_vae(cfg):
    """The DAVAE at step 0; a base that is missing but is the `out` of a preset here is trained first, and says so."""
    torch.manual_seed(cfg.seed)
    if cfg.D == 0 and not cfg.base:
        return DAVAE(AutoencoderKL(KLConfig(C=cfg.C, ch=cfg.ch, ch_mult=tuple(cfg.ch_mult), blocks=cfg.blocks,
                                            groups=cfg.groups)), D=0)
    make_if_missing(cfg.base, cfg)
    return DAVAE(load_davae(cfg.base).base, cfg.D, cfg.detail_dropout, cfg.rescale)

def make_if_missing(run, cfg):
    """Train (or finish) `run` if it is the folder of one of this script's presets; anything else must exist already."""
    preset = next((name for name, values in PRESETS.items() if values["out"] == run), None)
    if preset is None:
        return
    if runs.step_of(run) < PRESETS[preset]["steps"]:
        print(f"\n{cfg.out} needs {run}, which is not there yet: running  python train_vae.py {preset}")
        main(Config(**{"preset": preset, **PRESETS[preset], "device": cfg.device, "data_dir": cfg.data_dir}))

def training_batch(x, step, cfg):
    """(B, 3, H, W) as this step sees it: cropped; for a base VAE (D = 0) mostly at half size, as DAVAE will show it images.

    Every eighth step keeps the full size, so that the base VAE also knows what four times the tokens would give it.
    """
    if cfg.D == 0 and step % 8:
        x = half(x)
    return data.random_crop(x, cfg.crop) if cfg.crop else x

def validation_images(cfg, train_set, n=64):
    """(N, 3, H, W) in [-1, 1] of evenly spaced held-out images (training images where a folder has no --val_dir)."""
    held_out = train_set
    if cfg.val_dir or cfg.data_dir == "procedural":
        held_out = data.open_dataset(cfg.val_dir or cfg.data_dir, cfg.image_size, n, cfg.seed + 1)
    index = torch.linspace(0, len(held_out) - 1, min(n, len(held_out))).long()
    return data.to_tensor(data.stack(held_out, index.tolist())[0])

# ---------------------------------------------------------------- the loop

def main(cfg):
    """Train, validate and save as `cfg` says.  Returns the summary of the finished run, which is also in summary.json."""
    summary_file = Path(cfg.out) / "summary.json"
    if runs.step_of(cfg.out) >= cfg.steps and summary_file.exists():
        print(f"{cfg.out}: finished at step {runs.step_of(cfg.out)}; give more --steps or another --out to go on")
        return json.loads(summary_file.read_text())
    rank, world, device = ranks.setup(cfg.device)
    lock = runs.hold(cfg.out, rank)                              # until this function returns
    accumulate = ranks.micro_batches(cfg.batch_size, cfg.micro_batch, world)
    train_set = data.open_dataset(cfg.data_dir, cfg.image_size, cfg.images, cfg.seed)

    # models: from the newest checkpoint if there is one
    resumed = runs.resume(cfg, MAY_CHANGE)
    vae = (load_davae(resumed) if resumed else initial_vae(cfg)).to(device, memory_format=LAYOUT[device.type]).train()
    if cfg.D and cfg.freeze_encoder:
        vae.detail_encoder.requires_grad_(False)
    if cfg.fit and cfg.D and not resumed:
        n = 50_000 * vae.f**2 // cfg.image_size**2
        index = torch.linspace(0, len(train_set) - 1, min(n, len(train_set))).long().split(16)
        fit_new_blocks(vae, (data.to_tensor(data.stack(train_set, k.tolist())[0]).to(device) for k in
                             tqdm(index, desc=f"{cfg.out}: fitting the new blocks", disable=rank > 0, mininterval=1)))
    torch.manual_seed(cfg.seed)
    disc = PatchGAN(cfg.disc_width).to(device) if cfg.gan else None
    lpips = make_lpips(cfg.perceptual, cfg.lpips_trunk).to(device) if cfg.perceptual != "none" else None
    trained = [p for p in vae.parameters() if p.requires_grad]
    adam = dict(lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0, fused=True)
    opt = torch.optim.AdamW(trained, **adam)
    opt_d = torch.optim.AdamW(disc.parameters(), **adam) if disc else None
    start, seconds, results = 0, 0.0, {}
    if resumed:
        state = runs.read_state_dict(resumed / "train_state.pt")
        opt.load_state_dict(state["opt"])
        if disc:
            disc.load_state_dict(state["disc"])
            opt_d.load_state_dict(state["opt_d"])
        start, seconds, results = state["step"], state["seconds"], state["results"]
    if cfg.compile:                  # level by level: the adaptive weights differentiate by the last convolution alone, twice
        torch._dynamo.config.recompile_limit, torch._functorch.config.donated_buffer = 64, False
        for part in (m for m in vae.modules() if isinstance(m, (Level, Mid, TinyBlock))):
            part.compile(dynamic=False)
    model = DistributedDataParallel(vae) if world > 1 else vae
    judge = DistributedDataParallel(disc) if world > 1 and disc else disc

    if rank == 0:
        print(f"{cfg.out}: {train_set.summary()}\n  {sum(p.numel() for p in trained):,} trained of "
              f"{sum(p.numel() for p in vae.parameters()):,} parameters; C={vae.C} D={vae.D} f={vae.f}; batch "
              f"{cfg.batch_size} = {world} ranks x {cfg.batch_size // world // accumulate} x {accumulate}; "
              f"steps {start} to {cfg.steps}, {device}")
    val = validation_images(cfg, train_set).to(device)
    log, since = runs.Log(cfg.out, rank, start, cfg.steps), time.time()

    def save(step):
        index = range(min(cfg.stats, len(train_set)))
        vae.measure(data.to_tensor(data.stack(train_set, index[k:k + 64])[0]).to(device) for k in index[::64])
        results.update(validate(vae, val, cfg.out, step))
        state = {"step": step, "seconds": seconds + time.time() - since, "results": results, "opt": opt.state_dict()}
        if disc:
            state.update(disc=disc.state_dict(), opt_d=opt_d.state_dict())
        runs.save_checkpoint(cfg.out, step, {"model": vae.state_dict()}, state,
                               {"script": "train_vae.py", "config": dataclasses.asdict(cfg), "model": vae.config()})

    if rank == 0 and not resumed:                                  # a disk that is too small shows now, not after hours
        with runs.disk_may_fail(must=True):
            save(0)
    stream = data.batches(train_set, cfg.batch_size, cfg.seed, start=start, rank=rank, world=world, flip=cfg.flip)
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc=cfg.out, disable=rank > 0, mininterval=1)
    ranks.heed_signals()
    for step, (x, _) in zip(bar, stream):
        for group in (opt.param_groups + (opt_d.param_groups if disc else [])):
            group["lr"] = learning_rate(step, cfg)
        gan_on = disc is not None and step >= cfg.disc_start

        # generator: accumulate over micro-batches, synchronise gradients on the last one only
        pairs, sums = [], {}
        for i, part in enumerate(data.to_tensor(x).to(device).chunk(accumulate)):
            ranks.seed_step(cfg.seed, rank * accumulate + i, step)
            part = training_batch(part, step, cfg).contiguous(memory_format=LAYOUT[device.type])
            model.require_backward_grad_sync = i == accumulate - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                rec = model(part)
                loss, parts = vae_loss(vae, rec, part, cfg, lpips, disc.requires_grad_(False) if gan_on else None)
            (loss / accumulate).backward()
            pairs.append((part, rec.x_hat.detach()))
            add_up(sums, parts, accumulate)
        norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
        stop_if_not_finite(norm, loss, vae, step)                    # the one place where a step waits for the device
        opt.step()
        opt.zero_grad(set_to_none=True)

        # discriminator: on the same reconstructions, after the generator's step
        if gan_on:
            disc.requires_grad_(True)
            for i, (part, x_hat) in enumerate(pairs):
                judge.require_backward_grad_sync = i == accumulate - 1
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    d_loss = hinge_loss(judge(part).float(), judge(x_hat.float()).float())
                (d_loss / accumulate).backward()
                add_up(sums, {"d": d_loss.detach()}, accumulate)
            opt_d.step()
            opt_d.zero_grad(set_to_none=True)

        if (step + 1) % cfg.log_every == 0:
            log(step + 1, sums, gnorm=norm.item(), lr=learning_rate(step, cfg),
                **{"img/s": (step + 1 - start) * cfg.batch_size / (time.time() - since)})
        stop, last = ranks.asked_to_stop(), step + 1 == cfg.steps
        if rank == 0 and (stop or last or (step + 1) % cfg.save_every == 0):
            with runs.disk_may_fail(must=stop or last):
                save(step + 1)
        if stop and not last:
            if rank == 0:
                tqdm.write(f"{cfg.out}: stopped after step {step + 1}; the same command goes on from there")
            raise SystemExit(0)
    ranks.heed_signals(False)

    ranks.wait_for_all()
    summary = {"stage": "DA-VAE" if vae.D else "base VAE", "steps": cfg.steps, "seconds": seconds + time.time() - since,
               **results}
    if rank == 0:
        plot_losses(cfg.out)
        runs.write_json(summary_file, summary)
        shown = f"base only {summary['psnr_base']:.2f} dB, DA-VAE" if vae.D else "base VAE"
        print(f"{cfg.out}: done in {summary['seconds']:.0f} s; {shown} {summary['psnr']:.2f} dB on {len(val)} images; "
              f"look at {cfg.out}/recon.png")
    return summary

if __name__ == "__main__":
    launch(main, config.cli(Config, PRESETS))
