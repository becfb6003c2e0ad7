"""Stage 2, the main job: warm-start a DiT on a DA-VAE's latent (with D = 0: train a base DiT from scratch).

    python finetune.py                                  # preset tiny: everything from scratch, on a CPU
    python finetune.py photos --data_dir=my_photos --base_vae=weights/taef2     # your photos, a real VAE
    torchrun --nproc_per_node=8 finetune.py imagenet512 --data_dir=imagenet/train \\
        --base=lightningdit-xl-imagenet256-800ep.pt
    torchrun --nproc_per_node=8 finetune.py sd35m-1024 --data_dir=captioned --base=sd3.5-medium \\
        --text=out/text
    python finetune.py sd35m-1024 --dry_run=True        # what that would take; needs no weights

Earlier stages that a preset needs and that do not exist (base VAE, DA-VAE, base DiT) are trained first.
Writes to --out: log.jsonl, loss.png, warm_start.png (base model | widened model), samples_*.png, the VAE,
step_*/ and summary.json. To resume, run the same command again.

Time, here and everywhere: t = 0 is noise, t = 1 is data, x_t = t*data + (1-t)*noise, v = data - noise.
"""
import dataclasses
import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dit import MODELS, add_lora, kind_of, warm_start_difference
from kernels import choose, cost, counted, specifications
from sample import Config as SampleConfig
from sample import generate, sample_flow, sample_noise, settings_of, shift_time, time_grid
from support import buckets, checks, config, figures, identity, levels, plan, ranks, runs, stages
from support.config import field
from support.latents import check_sizes, check_statistics, latent_source, open_training_set, sides
from support.text import Conditioner
from support.weights import load_davae, load_dit, load_measured


@dataclass
class Config:
    preset: str = field("tiny", "a name in PRESETS")
    out: str = field("", "the run's folder")
    device: str = field("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = field("auto", "for autocast; auto: bfloat16 if the hardware has instructions for it",
                       choices=("auto", "float32", "bfloat16"))
    seed: int = field(0, "for the weights, the data order and every random draw", within=(0, 2**64 - 1))
    # data and latents (Sec. 3.1)
    data_dir: str = field("procedural", "a folder of images, tar shards or latents; procedural: built in")
    image_size: int = field(512, "pixels; images are resized and cropped to this square", within=(1, 16_384))
    images: int = field(4096, "number of built-in images", within=(1, 10_000_000))
    buckets: float = field(1.0, "shapes up to n:1, of area image_size^2; 1: squares only", within=(1, 16))
    flip: bool = field(True, "mirror half of the images")
    vae: str = field("", "a run of train_vae.py (or, with D = 0, any base VAE)")
    base_vae: str = field("", "a base VAE: train all stages on it and on data_dir, in out/<images>-<base>/")
    lpips_trunk: str = field("", "for stage 1: weights of LPIPS's network, instead of torchvision's download")
    cache: bool = field(True, "encode all images once and keep the latents on disk; False: encode as we go")
    detail_sample: bool = field(False, "sample z_d, as in the authors' ImageNet features; False: its mode")
    # model (Sec. 3.2)
    D: int = field(96, "detail channels of the VAE; 0: a base DiT, on the base channels", within=(0, 4096))
    base: str = field("", "the DiT to widen: a run, released weights or their org/name; empty: none")
    base_weights: str = field("", "which to load; empty: the EMA, if any", choices=("", "ema", "model"))
    model: str = field("LightningDiT", "no base given: a name in dit.py:MODELS, such as USiT")
    p: int = field(1, "no base given: patch side in latent pixels", within=(1, 64))
    E: int = field(1152, "no base given: width", within=(1, 65_536))
    depth: int = field(28, "no base given: blocks", within=(1, 1000))
    A: int = field(16, "no base given: heads", within=(1, 1024))
    qk_norm: bool = field(False, "no base given: RMSNorm on q and k")
    zero_init: bool = field(True, "P_new and O_new start at zero; False: at random, without the warm start")
    # text to image (the images have captions), such as SD3.5
    text: str = field("", "shards of encoded captions (`python sample.py text`), or a folder of encoders")
    t5_tokens: int = field(256, "tokens given to T5", within=(1, 4096))
    lora: int = field(0, "rank of the adapters, alpha = rank; 0: train every weight", within=(0, 8192))
    checkpointing: bool = field(False, "recompute blocks in the backward pass: less memory, more time")
    shard: bool = field(False, "under torchrun: split weights and optimizer over the ranks (FSDP2)")
    compile: bool = field(False, "torch.compile the blocks: after a minute, twice as fast on a GPU")
    # loss (Sec. 3.3, Tab. S1)
    N: int = field(10_000, "steps over which the weight w(n) of the details rises from 0 to 1", at_least=0)
    cosine: float = field(1.0, "weight of the term 1 - cos(v, v*)", at_least=0)
    label_dropout: float = field(0.1, "probability of training without a label or caption", within=(0, 1))
    weighting: str = field("paper", "of times, see `draw_time`", choices=("paper", "sigma", "uniform"))
    keep_levels: tuple = field((), "each image shows one of these numbers of details; empty: all "
                                   "(DC-AE 1.5, Eq. 2)", within=(0, 4096), count=(0, 256))
    keep_mean: str = field("all", "error averaged over all channels (Eq. 2), or those shown (their code)",
                           choices=("all", "shown"))
    # optimisation (Tab. S1)
    steps: int = field(140_000, "optimizer steps", at_least=1)
    batch_size: int = field(640, "images per optimizer step, over all ranks", within=(1, 1_000_000))
    micro_batch: int = field(80, "images per rank and forward pass", at_least=1)
    lr: float = field(2e-4, "learning rate", at_least=0)
    warmup: int = field(0, "first steps, over which lr rises from 0", at_least=0)
    cooldown: float = field(0.0, "last fraction of the steps, over which lr falls to 0", within=(0, 1))
    beta1: float = field(0.9, "of AdamW", within=(0, 0.999_999))
    beta2: float = field(0.95, "of AdamW", within=(0, 0.999_999))
    clip: float = field(1.0, "gradient norm limit; 0: none, as the authors on ImageNet", at_least=0)
    ema: float = field(0.999, "decay of the weight average used for sampling", within=(0, 1))
    log_every: int = field(100, "steps between lines of the log; 0: only the last", at_least=0)
    save_every: int = field(5000, "steps between checkpoints with pictures; 0: first and last", at_least=0)
    # sampling defaults, kept with the model
    cfg: float = field(4.0, "guidance scale for the pictures; sample.py's default", within=(0, 1000))
    shift: float = field(0.3, "time shift for the pictures; sample.py's default", within=(0.001, 1000))
    grid: str = field("plain", "time grid for the pictures; sample.py's default", choices=("plain", "sd3"))
    sample_steps: int = field(50, "Euler steps for the pictures", within=(1, 1_000_000))
    track: str = field("", "also send lines and pictures to tensorboard or wandb; both: tensorboard,wandb")
    dry_run: bool = field(False, "only print what the run would take: sizes, FLOPs, memory, disk, files")


PRESETS = {
    # base loss 0.301; 18 s, 2 cores (2026-11-27)
    "tiny-base": dict(
        out="out/tiny-base", vae="out/tiny-vae", D=0, p=2, E=192, depth=4, A=3, image_size=64, images=2048,
        flip=False, steps=450, batch_size=32, micro_batch=32, lr=1.5e-3, cooldown=0.5, ema=0.98, cfg=2.0,
        shift=1.0, sample_steps=20, log_every=25, save_every=450),

    # evaluate.py's probe: all classes recognised, 94 % sharp, 0 % without details; 35 s, 2 cores (2026-11-27)
    "tiny": dict(
        out="out/tiny", vae="out/tiny-vae", base="out/tiny-base", D=24, N=200, image_size=64, images=2048,
        flip=False, steps=420, batch_size=32, micro_batch=32, lr=1.5e-3, cooldown=0.5, ema=0.98, cfg=2.0,
        shift=1.0, sample_steps=20, log_every=25, save_every=420),

    # base loss 0.97, about 20 CPU-minutes (2026-11-25)
    "photos-base": dict(
        out="out/photos-base", vae="out/photos-vae", D=0, E=256, depth=6, A=4, image_size=128, flip=False,
        steps=600, batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.99, cfg=2.5, shift=1.0,
        log_every=50, save_every=600),

    # 40 photos, 7.5 min, 2 cores: detail loss 0.20, 43 of 50 samples sharp, but memorised (2026-11-26)
    "photos": dict(
        out="out/photos", vae="out/photos-vae", base="out/photos-base", D=96, N=200, image_size=128,
        flip=False, steps=600, batch_size=64, micro_batch=64, lr=1e-3, cooldown=0.5, ema=0.99, cfg=2.5,
        shift=1.0, log_every=50, save_every=600),

    # Tab. S1; not run
    "imagenet512": dict(
        out="out/imagenet512", vae="out/imagenet512-vae", base="lightningdit-xl-imagenet256-800ep.pt",
        base_weights="model", data_dir="imagenet/train", image_size=512, D=96, clip=0.0, compile=True),

    # Tab. S1; clip and beta2 from the authors' code; not run
    "sd35m-1024": dict(
        out="out/sd35m-1024", vae="out/sd35m-vae", base="sd3.5-medium", text="out/text", data_dir="captioned",
        image_size=1024, D=16, p=2, lora=256, checkpointing=True, cosine=0.0, N=5000, steps=10_000,
        batch_size=128, micro_batch=16, lr=1e-4, beta2=0.999, clip=0.5, flip=False, save_every=1000, cfg=2.5,
        shift=1 / 3, grid="sd3", sample_steps=30),
}
# the rivals' VAEs (see train_vae.py) and, for DC-AE 1.5's, its training too: only 50 steps of each were run
PRESETS["photos-vf"] = PRESETS["photos"] | dict(out="out/photos-vf", vae="out/photos-vf-vae")
PRESETS["photos-dcae15"] = PRESETS["photos"] | dict(
    out="out/photos-dcae15", vae="out/photos-dcae15-vae", keep_levels=(0, 32, 64, 96), N=0)
# Tab. S1, but with the batch size of the authors' script for 2,048 pixels; not run
PRESETS["sd35m-2048"] = PRESETS["sd35m-1024"] | dict(
    out="out/sd35m-2048", image_size=2048, batch_size=96, micro_batch=6)

# FLUX.2 klein (support/diffusers_dit.py), undistilled; FLUX.2's own shift; klein-2048: r = 4; not run
PRESETS["klein-1024"] = PRESETS["sd35m-1024"] | dict(
    out="out/klein-1024", vae="out/klein-vae", base="FLUX.2-klein-base-4B", text="out/klein-text",
    model="Flux2", t5_tokens=512, D=96, lora=128, micro_batch=4, cfg=4.0, shift=0.18, grid="plain",
    sample_steps=50)
PRESETS["klein-2048"] = PRESETS["klein-1024"] | dict(
    out="out/klein-2048", vae="out/klein-2048-vae", image_size=2048)

# DC-AE 1.5's recipe for USiT-H, with a DA-VAE on DC-AE f32c32: 64 tokens; clip and flip are ours; not run
PRESETS["usit-base"] = dict(
    out="out/usit-base", vae="out/usit-vae", D=0, model="USiT", data_dir="imagenet/train", image_size=512,
    steps=500_000, batch_size=1024, micro_batch=128, lr=1e-4, warmup=5000, beta1=0.99, beta2=0.99, ema=0.9999,
    weighting="uniform", cosine=0.0, cfg=1.5, shift=1.0)
# the same, with D, N and steps from Tab. S1; not run
PRESETS["usit"] = PRESETS["usit-base"] | dict(out="out/usit", base="out/usit-base", D=96, steps=140_000)

# On resume, only these fields may differ, and those listed in runs.py (NO_EFFECT, SOURCES).
MAY_CHANGE = {"steps", "lr", "warmup", "cooldown", "clip", "cfg", "shift", "grid", "sample_steps"}


# ---------------------------------------------------------------- the method


def detail_weight(n, N):
    """w(n): 0 at step n = 0, 1/2 at N/2, 1 from N on; half a cosine.  Eq. (12).

    Differs from the paper: its text keeps w low for N steps, then ramps; its code, and this, ramp over N.
    """
    if N == 0:
        return 1.0
    return 0.5 * (1 - math.cos(math.pi * min(n / N, 1.0)))


# The cosine clamps norms to at least this. A LightningDiT from scratch starts at v = 0, where PyTorch's 1e-8
# makes the gradient 1e8: unless clipped, it stays in AdamW's second moments for a long time (LOG.md).
COSINE_EPS = 0.1


def flow_loss(model, z_all, cond, w, cfg):
    """Rectified-flow loss at random times, with weight w on the detail channels.  Eq. (13).

        mse  = (C * base + w * D * detail) / (C + w * D)    means of (v - v*)^2, times `draw_time`'s weight
        loss = mse + cosine * (1 - cos(v, v*))              cos over all channels; mean over positions

    z_all: (B, C+D, h, w) normalised; cond: a tuple of (B, ...), labels, or text tokens and pooled text
    cfg:   D, cosine, weighting, keep_levels and keep_mean are read
    returns (loss, {"loss", "base", "detail"}: () float32, detached; the errors unweighted, of shown channels)
    Differs from the paper, as the authors' code does: w(n) does not scale the cosine: details learn at once.
    """
    D = cfg.D
    C = z_all.shape[1] - D

    # x_t on the straight line from noise to data, and its velocity v*
    t, weight = draw_time(len(z_all), cfg.weighting, z_all.device)            # (B,), (B,)
    noise = torch.randn_like(z_all)
    s = t.view(-1, 1, 1, 1)
    x_t = s * z_all + (1 - s) * noise
    target = z_all - noise                                                    # v*

    weight = weight.view(-1, 1, 1, 1)
    if cfg.keep_levels:                                                       # DC-AE 1.5: support/levels.py
        model, target, weight, shown = levels.hide_some(model, target, weight, w, cfg)

    v = model(x_t, t, *cond).float()
    error = (v - target).square()                                             # (B, C+D, h, w)
    errors = (weight * error).mean((0, 2, 3))                                 # (C+D,)
    loss = (errors[:C].sum() + w * errors[C:].sum()) / (C + w * D)
    if cfg.cosine:
        loss = loss + cfg.cosine * (1 - F.cosine_similarity(v, target, dim=1, eps=COSINE_EPS)).mean()

    parts = {"loss": loss.detach(), "base": error[:, :C].mean().detach()}
    if D:
        parts["detail"] = error[:, C:].mean().detach()
    if cfg.keep_levels:                                                       # the hidden ones' error is 0
        parts |= levels.means_of_shown(parts, shown, C)
    return loss, parts


def draw_time(B, weighting, device):
    """(t (B,), weight of the squared error at t (B,)); t = 0 is noise, 1 data.

    paper: t = sigmoid(N(0, 1)), weight 1.
    uniform: t uniform in [0, 1], weight 1: as SiT and USiT are trained.
    sigma: the authors' for SD3.5. u = sigmoid(N(0, 1)) picks one of `sd3_sigmas`, and t = 1 - sigma. The loss
           is (sigma (v - v*))^2, the squared error of the denoised latent, times min(t / sigma, 5). (Theirs
           also truncates the time to thousandths, and rounds sigma to bfloat16.)
    """
    if weighting == "uniform":
        return torch.rand(B, device=device), torch.ones(B, device=device)
    u = torch.sigmoid(torch.randn(B, device=device))
    if weighting == "paper":
        return u, torch.ones_like(u)
    sigma = sd3_sigmas(device)[(1000 * u).long().clamp_max(999)]
    ratio = (1 - sigma) / sigma
    return 1 - sigma, sigma.square() * ratio.clamp_max(5)


def sd3_sigmas(device):
    """The 1000 noise levels sigma = 1 - t that the authors train SD3.5 at, from 1 down: (1000,)."""
    even = torch.linspace(1, 1 - shift_time(0.999, 1 / 3), 1000, device=device)     # SD3's last, shifted by 3
    return 4 * even / (1 + 3 * even)                                                # all, shifted by 4


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, for every trained parameter."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    averages = [e for e, _ in pairs]
    newest = [p for _, p in pairs]
    torch._foreach_lerp_(averages, newest, 1 - decay)


# ---------------------------------------------------------------- the loop


def main(cfg):
    """Train, draw and save as `cfg` says.  Returns the summary of the finished run, also in summary.json."""
    if cfg.dry_run:
        return dry_run(cfg)

    # where this runs, on which images, in which latent
    rank, world, device = ranks.setup(cfg.device)
    accumulate = ranks.accumulation(cfg.batch_size, cfg.micro_batch, world)
    checks.before_finetuning(cfg, world)
    stages.plan(cfg, makers(), rank, device)
    run = runs.Run(cfg, MAY_CHANGE, rank)
    vae = load_vae(cfg, run).to(device, memory_format=torch.channels_last).requires_grad_(False)
    train_set = open_training_set(cfg, vae)
    run.must_be_made_of(**identity.of_parts(cfg, vae, train_set))
    if run.done:
        return run.summary(figures.report)
    check_sizes(vae, train_set, cfg)

    # the transformer and its average: from the newest checkpoint, if there is one, else widened from the base
    if run.checkpoint:
        base = None
        dit = load_dit(run.checkpoint, "model")
        ema = load_dit(run.checkpoint, "ema")
    else:
        base, dit = initial_dit(cfg, vae, len(train_set.classes))
        ema = deepcopy(dit) if cfg.shard else ranks.copy_but_frozen(dit)
    condition = Conditioner(dit, train_set, cfg, device, rank)    # T5, if it must run, has the GPU to itself
    run.must_be_made_of(texts=condition.made_by)
    if cfg.shard:
        for part in (dit, ema) if base is None else (dit, ema, base):
            ranks.shard(part, device)                              # in place
    dit = dit.to(device).train()
    ema = ema.to(device).eval().requires_grad_(False)
    dit.checkpointing = cfg.checkpointing
    if cfg.compile:
        for block in dit.blocks:                                   # in place: parameters keep their names
            block.compile(dynamic=False)
    trained = [p for p in dit.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0, fused=True)
    if run.checkpoint:
        ranks.load_optimizer(opt, run.train_state()["opt"])
    model = dit if cfg.shard else ranks.replicated(dit)

    # before the first step: check the statistics, prove the warm start, save a checkpoint
    about = description(cfg, dit, train_set)
    side = cfg.image_size // vae.f
    sizes = f"C={vae.C} D={cfg.D} p={dit.cfg.p}, {(side // dit.cfg.p)**2} tokens"
    run.describe(train_set, dit.parameters(), sizes, accumulate, world, device)
    checks.say_if_details_hardly_count(cfg, detail_weight(cfg.steps - 1, cfg.N), rank)
    shape = (cfg.batch_size // world // accumulate, vae.C + cfg.D, side, side)
    choose.before_training(run, device, shape, lambda z, y: flow_loss(dit, z, condition(y, drop=0), 1.0, cfg))
    shaped = buckets.sort(train_set, cfg, sides(vae, dit.cfg.p))
    latents_at = latent_source(vae, shaped, cfg, device, rank, world)
    if not run.checkpoint:
        z_all, y = next(latents_at(0))
        if rank == 0:
            check_statistics(z_all, vae.C, cfg.out)
        if base is not None and cfg.D and cfg.zero_init:
            prove_warm_start(base.to(device), dit, vae, z_all, y, condition, run)
        save_what_stays(run, vae, dit, condition.text, about)
        save(run, 0, dit, ema, opt, about)               # a disk that is too small shows now, not after hours
    del base                                                       # to free its memory
    if not cfg.shard:
        ranks.share_frozen(dit, ema, ranks.in_bfloat16(cfg.dtype, device))
    autocast = ranks.autocast(cfg.dtype, device)
    batches = condition.ahead(latents_at(run.start))               # reads the embeddings of captions ahead
    for n, (z_all, y) in run.steps(batches):

        # learning rate, and how much the details count
        lr = learning_rate(n, cfg)
        for group in opt.param_groups:
            group["lr"] = lr
        w = detail_weight(n, cfg.N)                                                               # Eq. (12)

        # forward and backward, one micro-batch at a time
        for z_part, y_part in ranks.micro_batches(model, accumulate, z_all, y, seed=cfg.seed, step=n):
            cond = condition(y_part, drop=cfg.label_dropout)                  # for guidance
            with autocast:
                loss, parts = flow_loss(model, z_part, cond, w, cfg)                              # Eq. (13)
            (loss / accumulate).backward()
            run.log.add(parts)

        # update
        norm = ranks.clip_gradients(dit, cfg.clip, loss, n)
        opt.step()
        opt.zero_grad(set_to_none=True)
        ema_update(ema, dit, cfg.ema)

        # log; save first, then draw
        run.log.row(n + 1, w=w if cfg.D else None, gnorm=norm, lr=lr)
        if run.save_due(n + 1):
            save(run, n + 1, dit, ema, opt, about)
            if not run.ends_early:
                draw_samples(run, n + 1, ema, vae, about, condition.text)

    summary = run.finish("DA-VAE DiT" if cfg.D else "base DiT")
    if rank == 0:
        report(run, condition.text)
    return summary


def learning_rate(step, cfg):
    """cfg.lr, rising over `warmup` steps, and falling to 0 over the last fraction `cooldown` of the run."""
    rise = (step + 1) / max(1, cfg.warmup)
    fall = (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps)
    return cfg.lr * min(1.0, rise, fall)


# ---------------------------------------------------------------- before the first step


def prove_warm_start(base, model, vae, z_all, y, condition, run):
    """Print how far the widened model is from the base (0.0), and draw samples of both from the same noise.

    Both are in eval mode and in plain PyTorch (kernels round differently), on 16 latents of the first batch.
    raises: SystemExit if the models differ
    """
    cfg = run.cfg
    z, y = z_all[:16, :vae.C], y[:16]
    found = []
    for z_part, y_part in zip(z.split(cfg.micro_batch), y.split(cfg.micro_batch)):
        with specifications(), ranks.autocast(cfg.dtype, z.device):
            found.append(warm_start_difference(base, model.eval(), z_part, condition(y_part, drop=0.0)))
    change, detail = torch.tensor(found, dtype=torch.float64).amax(0).tolist()     # nan, if any of them is
    if run.rank == 0:
        tqdm.write(f"{cfg.out}: warm start, {len(z)} latents, random z_d: max |v - v_base| = {change}, "
                   f"max |v_d| = {detail}")
    if not (change <= 1e-5 and detail <= 1e-5):
        raise SystemExit("the widened model differs from the base model: P_new or O_new is not zero (in "
                         "your own model, make them with dit.py:widen), or a weight of --base is not finite")
    run.results["warm_start"] = change
    with ranks.unless_sharded(cfg.shard, runs.picture_may_fail(f"{cfg.out}/warm_start.png")):
        draw_warm_start(base, model, vae, z[:8], y[:8], condition, run)
    model.train()


@torch.no_grad()
def draw_warm_start(base, model, vae, z, y, condition, run):
    """warm_start.png: samples of the base and the widened model from the same noise, base channels only."""
    cfg = run.cfg
    noise = sample_noise(cfg.seed, range(len(y)), (vae.C + cfg.D, *z.shape[2:])).to(z.device)
    ts = time_grid(cfg.sample_steps, cfg.shift, cfg.grid == "sd3")
    rows = {"base model": [], "widened, step 0": []}
    with ranks.autocast(cfg.dtype, z.device):
        for part in torch.arange(len(y)).split(max(1, cfg.micro_batch // 2)):      # guidance doubles the rows
            cond = condition(y[part], drop=0.0)
            uncond = condition(y[part], drop=1.0)
            small = sample_flow(base, noise[part, :vae.C], ts, cond, uncond, cfg.cfg)
            wide = sample_flow(model, noise[part], ts, cond, uncond, cfg.cfg)
            rows["base model"].append(vae.decode_base(small))
            rows["widened, step 0"].append(vae.decode_base(wide[:, :vae.C]))
    if run.rank == 0:
        x = torch.cat([image for images in rows.values() for image in images]).clamp(-1, 1)
        labels = [name for name in rows for _ in y]
        figures.save_grid(x, Path(cfg.out) / "warm_start.png", len(y), math.ceil(96 / x.shape[-1]), labels)


# ---------------------------------------------------------------- set-up


def makers():
    """The scripts that train the stages of a run, this one last."""
    import train_vae
    return [train_vae.MAKER, MAKER]


def load_vae(cfg, run):
    """The VAE at cfg.vae, trained first if it is a preset's; on resume, if it is gone, the run's own copy."""
    if run.checkpoint and not Path(cfg.vae).exists():
        return load_measured(Path(cfg.out) / "vae")
    if not run.checkpoint:
        stages.make_missing(cfg, makers())
    return load_measured(cfg.vae)


def initial_dit(cfg, vae, classes, known=()):
    """(base, model): the pretrained transformer or None, and the model at step 0, widened from it.

    classes: how many the images have; known: {folder: a transformer to use instead of the run there}
    """
    torch.manual_seed(cfg.seed)
    if not cfg.base:
        return None, new_dit(cfg, vae.C, vae.f, max(1, classes))
    base = known[cfg.base] if cfg.base in known else load_dit(cfg.base, cfg.base_weights or None)
    checks.check_base(cfg, vae, base, classes)
    model = deepcopy(base)
    if cfg.D:
        model.expand_channels(cfg.D)
    if cfg.D and not cfg.zero_init:
        model.P_new.reset_parameters()
        model.O_new.reset_parameters()
    if cfg.lora:
        add_lora(model, cfg.lora, cfg.lora)
    return base, model


def trial(cfg, n, device, known, classes):
    """(this run's model at step 0, a function that runs one forward and backward pass on n noise latents).

    support/stages.py times the pass before anything is trained.
    known: {folder: model} of runs that do not exist yet; classes: how many the images have
    """
    vae = known[cfg.vae] if cfg.vae in known else load_davae(cfg.vae)
    dit = initial_dit(cfg, vae, classes, known)[1].to(device).train()
    side = cfg.image_size // vae.f
    z_all = torch.randn(n, vae.C + cfg.D, side, side, device=device)
    y = torch.zeros(n, dtype=torch.long, device=device)

    def step():
        with ranks.autocast(cfg.dtype, device):
            loss, _ = flow_loss(dit, z_all, (y,), 1.0, cfg)
        loss.backward()

    return dit, step


def new_dit(cfg, C, f, num_classes):
    """A transformer from scratch: MODELS[cfg.model], with those settings of `cfg` that its config has."""
    if cfg.model not in MODELS:
        raise SystemExit(f"--model={cfg.model!r}: wanted {' or '.join(MODELS)}")
    ModelConfig, Model = MODELS[cfg.model]
    checks.check_text(cfg, f"--model={cfg.model}", ModelConfig)
    settings = dict(C=C, D=cfg.D, p=cfg.p, grid=cfg.image_size // f // cfg.p, E=cfg.E, depth=cfg.depth,
                    A=cfg.A, num_classes=num_classes, qk_norm=cfg.qk_norm)
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    for name in sorted(settings.keys() & getattr(cfg, "given", set()) - known):
        raise SystemExit(f"--{name}={settings[name]}: {cfg.model} has no such setting; leave it out")
    return Model(ModelConfig(**{name: value for name, value in settings.items() if name in known}))


def description(cfg, dit, train_set):
    """config.json of every checkpoint: the run's and the model's settings, classes or the first captions."""
    names = {"classes": train_set.classes}
    if cfg.text:
        captions = dict.fromkeys(caption for caption in train_set.captions if caption)
        names = {"classes": [], "captions": list(captions)[:8]}
    model = {"kind": kind_of(dit)} | dataclasses.asdict(dit.cfg)
    command = config.command("finetune.py", cfg, PRESETS)
    return dict(script="finetune.py", command=command, config=dataclasses.asdict(cfg), model=model, **names)


def dry_run(cfg):
    """Print what a run would take, from shapes alone: no memory, no weights.  Returns the numbers."""
    known, classes = stages.before_dry_run(cfg, makers())
    model, inputs, r = plan.expected(cfg, known, MODELS, new_dit, classes)
    with torch.no_grad():                                          # as in sampling, without adapters
        _, forward = counted(lambda: model(*inputs))
    if cfg.lora:
        add_lora(model, cfg.lora, cfg.lora)
    _, step, kept = cost(model, inputs)
    return plan.show(cfg, model, inputs, r, forward, step, kept)


# ---------------------------------------------------------------- saving, pictures, the end


def save(run, done, dit, ema, opt, about):
    """Write a checkpoint of all weights or, with adapters, of the trained ones.  All ranks must call it."""
    if done:
        run.results |= {name: value for name, value in run.log.latest.items() if name in ("base", "detail")}
    weights = {"model": kept_weights(dit, dit, run.cfg), "ema": kept_weights(ema, dit, run.cfg)}
    weights = ranks.whole(weights, keep=run.rank == 0)
    state = ranks.whole({"opt": opt.state_dict()}, keep=run.rank == 0)
    run.save(done, weights, state, about)


def kept_weights(model, dit, cfg):
    """The weights that each checkpoint holds of `model`, which is the transformer `dit` or its average."""
    trained = {name for name, p in dit.named_parameters() if p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name in trained or not cfg.lora}


def save_what_stays(run, vae, dit, text, about):
    """Save once what no step changes: vae/, with adapters frozen/, with text the pictures' embeddings."""
    kept = kept_weights(dit, dit, run.cfg)
    frozen = {name: value for name, value in dit.state_dict().items() if name not in kept}
    frozen = ranks.whole(frozen, keep=run.rank == 0)
    if run.rank > 0:
        return
    folder = Path(run.cfg.out)
    with runs.disk_may_fail(must=True):
        made_of = {"source": run.cfg.vae, "model": vae.config()}
        runs.save_folder(folder / "vae", {"model": vae.state_dict()}, made_of)
        if frozen:
            runs.save_folder(folder / "frozen", {"model": frozen}, {"source": run.cfg.base})
        if text is not None:
            text.keep(["", *about["captions"]], folder / "captions")


def draw_samples(run, done, ema, vae, about, text):
    """samples_<done>.png: a column of four for each of the first ten classes or captions; of one alone, 16.

    The noise is the same at every save. The ranks draw equally many images, because a sharded model needs
    all ranks in every pass; at most micro_batch rows (at least 2) at a time, guidance included.
    """
    cfg = run.cfg
    names = [name[:24] for name in (about.get("captions") or about["classes"] or ["image"])[:10]]
    columns = len(names) if len(names) > 1 else 4
    n = 4 * columns
    chosen = dict(steps=cfg.sample_steps, seed=cfg.seed, classes=tuple(range(len(names))), dtype=cfg.dtype)
    settings = settings_of(SampleConfig(**chosen), about, "")
    images, previews, numbers = [], [], []
    with ranks.unless_sharded(cfg.shard, runs.picture_may_fail(f"{cfg.out}: samples")):
        for part in torch.tensor(ranks.my_share(n)).split(max(1, cfg.micro_batch // 2)):
            full, base = generate(ema, vae, part.tolist(), settings, text)
            images.append(full)
            previews.append(base)
            numbers += part.tolist()
    grids = {"samples": ranks.gather(images, numbers)}
    if cfg.D:
        grids["samples_base_only"] = ranks.gather(previews, numbers)
    with runs.picture_may_fail(f"{cfg.out}: samples"):
        for name, x in grids.items():
            if run.rank > 0 or len(x) < n:                         # a rank has failed, and said so
                continue
            figures.save_grid(
                x[:n], f"{cfg.out}/{name}_{done:06d}.png", columns, max(1, 128 // x.shape[-1]),
                names * (n // len(names)), also=f"{cfg.out}/{name}.png")
    ranks.wait_for_all()


def report(run, text):
    """Draw the losses and write report.html; unless other stages follow, print the results and next steps."""
    import evaluate                                                # here: it is a layer above this script
    with runs.picture_may_fail(f"{run.cfg.out}: loss.png"):
        figures.plot_losses(run.cfg.out)
    evaluate.report_at_the_end(run.cfg, text)
    if not run.needed_by:
        figures.report(run.cfg)


MAKER = stages.Maker("finetune.py", ("base DiT", "DA-VAE DiT"), PRESETS, Config, main, trial)

if __name__ == "__main__":
    ranks.launch(main, config.cli(Config, PRESETS))
