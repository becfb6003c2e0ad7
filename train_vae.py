"""Stage 1: train a DA-VAE on a frozen base VAE (or, with D = 0, a plain base VAE).

    python train_vae.py tiny                                        # built-in images, on a CPU
    python train_vae.py photos --base=taef2_folder --data_dir=photos/train
    torchrun --nproc_per_node=8 train_vae.py imagenet512            # Tab. S1, on 8 GPUs

Writes to --out: log.jsonl, loss.png, recon.png (input, base only, DA-VAE, error), step_*/ and summary.json.
To resume, run the same command again.
"""
import dataclasses
import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from davae import DAVAE, AutoencoderKL, DAVAEConfig, KLConfig, PlainVAE, align_loss, base_image, group_mean
from kernels import choose
from support import buckets, checks, config, data, figures, held_out, identity, levels, ranks, runs, stages
from support.bases import compile_levels
from support.config import field
from support.fit import check_fit, fit_new_blocks
from support.metrics import make_lpips, psnr
from support.vf import Teacher, vf_loss
from support.weights import load_davae, load_measured


@dataclass
class Config:
    preset: str = field("tiny", "a name in PRESETS")
    out: str = field("", "the run's folder")
    device: str = field("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = field("auto", "for autocast; auto: bfloat16 if the hardware has instructions for it",
                       choices=("auto", "float32", "bfloat16"))
    seed: int = field(0, "for the weights, the data order and every random draw", within=(0, 2**64 - 1))
    # data
    data_dir: str = field("procedural", "a folder of images or tar shards; procedural: built-in images")
    val_dir: str = field("", "held-out images; empty: built-in ones, or training images")
    image_size: int = field(512, "pixels; images are resized and cropped to this square", within=(1, 16_384))
    images: int = field(4096, "number of built-in images", within=(1, 10_000_000))
    buckets: float = field(1.0, "shapes up to n:1, of area image_size^2; 1: squares only", within=(1, 16))
    crop: tuple = field((), "train on random square crops, of one of these sides per step; empty: no crop",
                        within=(1, 16_384), count=(0, 12))
    halvings: int = field(0, "before cropping, halve images up to this many times, at random", within=(0, 6))
    flip: bool = field(True, "mirror half of the images")
    # model (Sec. 3.1, Fig. S1)
    base: str = field("", "the frozen base VAE, no DA-VAE: path or org/name; D = 0: initial weights or empty")
    D: int = field(96, "detail channels; 0 trains the base VAE itself", within=(0, 4096))
    r: int = field(2, "full side / base image's: 2 in the paper, or 4, 8; D = 0: in seven of eight steps, "
                      "images are shrunk by r", within=(1, 64))
    train: str = field("all", "all; decoder: all but the detail encoder (the authors' SD3 script); up: only "
                              "up block and decoder; blocks: only down and up block",
                       choices=("all", "decoder", "up", "blocks"))
    detail_dropout: float = field(0.1, "probability per image of training without details", within=(0, 1))
    detail_noise: float = field(0.0, "the most noise on the details that are decoded, in stds", at_least=0)
    keep_levels: tuple = field((), "instead of detail_dropout: each image keeps one of these numbers of "
                                   "details (DC-AE 1.5)", within=(0, 4096), count=(0, 256))
    rescale: bool = field(False, "divide surviving details by 1 - detail_dropout, as the authors' code does")
    fit: str = field("closed", "how the new blocks start. closed: least squares; random: as in the paper; "
                               "pixels: details are pixels of the full-size latent",
                     choices=("closed", "random", "pixels"))
    fit_align: float = field(1.0, "fit=closed: details start aligned to z, whatever --align; 1: fully, for D "
                                  "well above C; 0: not", within=(0, 1))
    C: int = field(16, "D = 0, no base given: latent channels", within=(1, 4096))
    widths: tuple = field((128, 256, 512, 512), "D = 0, no base given: channels per level, full size first",
                          within=(1, 8192), count=(1, 12))
    blocks: int = field(2, "D = 0, no base given: residual blocks per level", within=(1, 100))
    groups: int = field(32, "D = 0, no base given: groups of each GroupNorm", within=(1, 8192))
    attn: tuple = field((), "D = 0, no base given: levels with attention", within=(0, 11), count=(0, 12))
    quant: bool = field(False, "D = 0, no base given: 1x1 convolutions on both sides of the latent")
    # losses (Tab. S1)
    perceptual: str = field("vgg", "LPIPS's network", choices=("vgg", "squeeze", "none"))
    lpips_trunk: str = field("", "local weight file of that network, instead of torchvision's download")
    reduction: str = field("mean", "of L1, LPIPS and KL over an image; sum: as in VA-VAE, with half the KL",
                           choices=("mean", "sum"))
    kl: float = field(1e-6, "weight of the KL term", at_least=0)
    align: float = field(0.5, "lambda_align, times the adaptive ratio; 0: none; see fit_align", at_least=0)
    adaptive_align: bool = field(True, "scale the alignment by a ratio of gradient norms, as on ImageNet")
    project: str = field("mean", "what is aligned: group means, a trained 1x1 convolution, or raw details",
                         choices=("mean", "conv", "raw"))
    distance: str = field("mse", "of the alignment: squared error, or VA-VAE's of cosines (support/vf.py)",
                          choices=("mse", "vf"))
    m1: float = field(0.5, "distance=vf: margin of the cosines", within=(0, 2))
    m2: float = field(0.25, "distance=vf: margin of the cosine matrix", within=(0, 2))
    teacher: str = field("base", "target of the alignment: the base latent, or a folder with DINOv2 or MAE")
    gan: float = field(0.1, "lambda_adv, times the adaptive ratio; 0: no discriminator", at_least=0)
    disc_start: int = field(2501, "step at which the discriminator and the GAN loss start", at_least=0)
    disc_width: int = field(64, "channels of the discriminator's first layer", within=(1, 4096))
    disc_lr: float = field(1.0, "learning rate of the discriminator / of the VAE", at_least=0)
    # optimisation (Tab. S1)
    steps: int = field(100_000, "optimizer steps", at_least=1)
    batch_size: int = field(128, "images per optimizer step, over all ranks", within=(1, 1_000_000))
    micro_batch: int = field(16, "images per rank and forward pass", at_least=1)
    lr: float = field(1e-4, "learning rate of the VAE; of the discriminator, times disc_lr", at_least=0)
    beta1: float = field(0.5, "of AdamW; Tab. S1: 0.5 on ImageNet, 0.9 for SD3", within=(0, 0.999_999))
    beta2: float = field(0.9, "of AdamW; Tab. S1: 0.9 on ImageNet, 0.999 for SD3", within=(0, 0.999_999))
    warmup: int = field(0, "first steps, over which lr rises from 0", at_least=0)
    cooldown: float = field(0.0, "last fraction of the steps, over which lr falls to 0", within=(0, 1))
    clip: float = field(0.0, "gradient norm limit of the VAE; 0: none, as on ImageNet", at_least=0)
    compile: bool = field(False, "torch.compile the VAE's levels: minutes at the start; on a GPU: not run")
    stats: int = field(10_000, "training images for the latent statistics", at_least=1)
    log_every: int = field(100, "steps between lines of the log; 0: only the last", at_least=0)
    save_every: int = field(5000, "steps between checkpoints with pictures; 0: first and last", at_least=0)
    track: str = field("", "also send lines and pictures to tensorboard or wandb; both: tensorboard,wandb")


PRESETS = {
    # 17.4 dB on 1,000 held-out images at full size; 26 s on 2 cores (2026-11-27)
    "tiny-base": dict(
        out="out/tiny-base-vae", D=0, C=8, widths=(16, 16, 32), blocks=1, groups=16, image_size=64,
        flip=False, perceptual="none", gan=0.0, stats=512, steps=800, batch_size=8, lr=3e-3, beta1=0.9,
        beta2=0.99, cooldown=0.5, log_every=50, save_every=0, dtype="float32"),

    # 20.52 dB, against 17.00 dB from the base channels alone, same images; 27 s on 2 cores (2026-11-27); on
    # four other base VAEs 19.7 to 19.9 dB. The discriminator starts with the VAE and learns slowly: later, it
    # would win within 100 steps
    "tiny": dict(
        out="out/tiny-vae", base="out/tiny-base-vae", D=24, image_size=64, flip=False, perceptual="none",
        train="decoder", fit="random", stats=512, align=0.05, adaptive_align=False, gan=0.3, disc_start=0,
        disc_lr=0.1, disc_width=16, steps=750, batch_size=4, lr=3e-3, cooldown=0.5, log_every=50,
        save_every=0),

    # TAEF2, 165 photos of 512 pixels; imagenette128: 27.47 dB, LPIPS .026 (full size 27.44, .025; base only
    # 22.45, .160); 11 minutes, 2 cores (2026-11-25)
    "photos": dict(
        out="out/photos-vae", base="taef2", D=96, image_size=512, crop=(64, 128, 256), halvings=2,
        detail_dropout=0.0, perceptual="squeeze", gan=0.0, align=0.05, adaptive_align=False, stats=100,
        steps=400, batch_size=4, micro_batch=4, lr=1e-5, warmup=20, beta1=0.9, beta2=0.999, cooldown=0.5,
        log_every=20, save_every=200),

    # Tab. S1; not run
    "imagenet512": dict(
        out="out/imagenet512-vae", base="vavae-imagenet256-f16d32-dinov2.pt", D=96, image_size=512,
        data_dir="imagenet/train", fit="random", micro_batch=8),

    # Tab. S1; kl: its 1e-7 times half of D x 64 x 64, as SD3's KL is a sum; clip: authors' code; not run
    "sd35m": dict(
        out="out/sd35m-vae", base="sd3.5-medium", D=16, image_size=1024, data_dir="captioned", flip=False,
        kl=3.3e-3, align=1.0, adaptive_align=False, steps=10_000, batch_size=16, micro_batch=2, beta1=0.9,
        beta2=0.999, clip=1.0, detail_dropout=0.0, fit="random"),
}
# FLUX.2's VAE, trained like sd35m: the same 1e-7, but six times the details; not run
PRESETS["klein"] = PRESETS["sd35m"] | dict(
    out="out/klein-vae", base="FLUX.2-klein-base-4B", D=96, fit="closed", kl=2.0e-2)
# 2,048 pixels, with latents as large as those of 512; kl: those of its crops are 32 x 32; not run
PRESETS["klein-2048"] = PRESETS["klein"] | dict(
    out="out/klein-2048-vae", image_size=2048, r=4, crop=(1024,), kl=4.9e-3)
# only the closed-form start of `photos`: the one step changes nothing
PRESETS["photos-quick"] = PRESETS["photos"] | dict(
    out="out/photos-quick-vae", perceptual="none", steps=1, lr=0.0)

# the rivals: VA-VAE's distance instead of Eq. (4), DC-AE 1.5's structured latent. After 50 steps each, on
# the photos of `photos`: 30.90 and 30.24 dB on 16 others, base only 26.45 (2026-11-25); full runs: not run
PRESETS["photos-vf"] = PRESETS["photos"] | dict(
    out="out/photos-vf-vae", distance="vf", align=0.1, adaptive_align=True)
PRESETS["photos-dcae15"] = PRESETS["photos"] | dict(
    out="out/photos-dcae15-vae", keep_levels=(0, 32, 64, 96), align=0.0, fit_align=0.0)

# VA-VAE itself, f16d32: 100 epochs, then twice 15 more, each from the phase before; not run
PRESETS["vavae-1"] = dict(
    out="out/vavae-1", D=0, r=1, C=32, widths=(128, 128, 256, 256, 512), attn=(4,), quant=True,
    image_size=256, data_dir="imagenet/train", teacher="dinov2-large", project="conv", distance="vf",
    m1=0.0, m2=0.0, align=0.5, reduction="sum", gan=0.5, steps=500_000, batch_size=256,
    micro_batch=8, dtype="float32")
PRESETS["vavae-2"] = PRESETS["vavae-1"] | dict(
    out="out/vavae-2", base="out/vavae-1", align=0.1, disc_start=1, steps=75_000)
PRESETS["vavae"] = PRESETS["vavae-2"] | dict(out="out/vavae", base="out/vavae-2", m1=0.5, m2=0.25)

# On resume, only these fields may differ, and those listed in runs.py (NO_EFFECT, SOURCES).
MAY_CHANGE = {"steps", "lr", "cooldown", "clip"}


# ---------------------------------------------------------------- losses


def vae_loss(vae, rec, x, cfg, nets, gan_on=False):
    """VAE loss: L1 + LPIPS + KL + alignment + GAN, the last two with adaptive weights.  Sec. 3.1, Tab. S1.

    rec: the Reconstruction of x (B, 3, H, W); nets: LossNetworks; gan_on: has the discriminator started?
    returns (loss, {name: detached value, for the log})
    """
    x_hat = rec.x_hat.float()
    parts = {"l1": (x_hat - x).abs().mean()}
    if nets.lpips is not None:
        parts["lpips"] = nets.lpips(x_hat, x).float().mean()
    nll = parts["l1"] + parts.get("lpips", 0.0)                            # the reconstruction error
    parts["kl"] = rec.posterior.kl()
    kl = cfg.kl * parts["kl"]
    if cfg.reduction == "sum":
        nll = nll * x[0].numel()
        kl = 0.5 * kl * rec.z_d[0].numel()
    loss = nll + kl
    if checks.is_aligned(cfg):
        parts |= alignment(rec, x, cfg, nets)                              # Eq. (3), (4)
        weight = cfg.align
        if cfg.adaptive_align:
            parts["a_w"] = adaptive_weight(nll, parts["align"], first_conv(vae).weight, limit=1e8)
            weight = cfg.align * parts["a_w"]
        loss = loss + weight * parts["align"]

    if gan_on:
        parts["g"] = -nets.disc(x_hat).float().mean()
        parts["d_w"] = adaptive_weight(nll, parts["g"], last_conv(vae).weight, limit=1e4)
        loss = loss + cfg.gan * parts["d_w"] * parts["g"]

    return loss, {name: value.detach() for name, value in parts.items()}


def alignment(rec, x, cfg, nets):
    """{"align": distance of the latent from its teacher, and its terms}.  Eq. (3), (4); or VA-VAE's VF loss.

    The teacher is z, or a vision transformer's features of x. The student is the sampled z_d (if there are
    no details, the whole latent, as in VA-VAE itself), projected to the teacher's channels.
    """
    student = rec.z_d
    teacher = rec.z if nets.teacher is None else nets.teacher(x, student.shape[-1])
    if cfg.project == "conv":
        student = nets.own["project"](student)
    if cfg.distance == "mse":                                              # conv, raw: groups of one channel
        return {"align": align_loss(teacher, student)}
    if cfg.project == "mean":
        student = group_mean(student, teacher.shape[1])
    terms = vf_loss(student, teacher, cfg.m1, cfg.m2)
    return {"align": sum(terms.values())} | terms


def adaptive_weight(nll, loss, weight, limit):
    """|grad nll| / |grad loss| at one weight tensor, in [0, limit].  Esser et al., 2021, Eq. 7.

    It brings both losses to one scale there. Each gradient costs a partial backward pass; the graph is kept.
    """
    a, = torch.autograd.grad(nll, weight, retain_graph=True)
    b, = torch.autograd.grad(loss, weight, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-4)).clamp(0.0, limit).detach()


def first_conv(vae):
    """The layer that makes the latent; the alignment's adaptive weight compares gradients there."""
    layer = vae.down.conv if vae.D else vae.base.to_moments
    return next(m for m in layer.modules() if isinstance(m, nn.Conv2d))


def last_conv(vae):
    """The layer that outputs the pixels; the GAN's adaptive weight compares gradients there."""
    layers = [m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return layers[-1]


def hinge_loss(real, fake):
    """Discriminator's hinge loss of two logit maps: zero where real >= 1 and fake <= -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class PatchGAN(nn.Sequential):
    """The discriminator of pix2pix and taming: a real/fake logit per patch, (B, 3, H, W) -> (B, 1, h, w)."""

    def __init__(self, width=64):
        layers = []
        widths = (3, width, 2 * width, 4 * width, 8 * width, 1)
        for i, (c_in, c_out) in enumerate(zip(widths, widths[1:])):
            ends = i in (0, 4)              # the first and the last convolution have a bias instead of a norm
            conv = nn.Conv2d(c_in, c_out, 4, stride=2 if i < 3 else 1, padding=1, bias=ends)
            nn.init.normal_(conv.weight, 0.0, 0.02)
            layers.append(conv)
            if ends:
                nn.init.zeros_(conv.bias)
            else:
                norm = nn.BatchNorm2d(c_out)
                nn.init.normal_(norm.weight, 1.0, 0.02)
                layers.append(norm)
            if i < 4:
                layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers)


class LossNetworks:
    """The networks that the losses need besides the VAE: saved for resuming, and never exported with it.

    disc:  PatchGAN or None; trained against the VAE, by its own optimizer
    lpips: LPIPS or None; frozen
    teacher: a vision transformer, frozen; None: details are aligned to z
    own:   modules that a loss trains together with the VAE, such as the projection of --project=conv: they
           are in the VAE's optimizer and in train_state.pt, and their gradients are averaged over the ranks
    """

    def __init__(self, cfg, vae, device):
        torch.manual_seed(cfg.seed)
        self.disc = PatchGAN(cfg.disc_width).to(device) if cfg.gan else None
        self.lpips = None
        if cfg.perceptual != "none":
            self.lpips = make_lpips(cfg.perceptual, cfg.lpips_trunk).to(device)
        self.teacher = Teacher(cfg.teacher).to(device) if cfg.teacher != "base" else None
        self.own = nn.ModuleDict()
        if checks.is_aligned(cfg) and cfg.project == "conv":
            width = self.teacher.width if self.teacher else vae.C
            self.own["project"] = nn.Conv2d(vae.D or vae.C, width, 1, bias=False)
        self.own.to(device)

    def state_dict(self):
        state = {"own": self.own.state_dict()}
        if self.disc is not None:
            state["disc"] = self.disc.state_dict()
        return state

    def load_state_dict(self, state):
        self.own.load_state_dict(state["own"])
        if self.disc is not None:
            self.disc.load_state_dict(state["disc"])


# ---------------------------------------------------------------- the loop


def main(cfg):
    """Train, validate and save as `cfg` says.  Returns the summary of the run, as in summary.json."""
    # where this runs, and on which images
    rank, world, device = ranks.setup(cfg.device)
    accumulate = ranks.accumulation(cfg.batch_size, cfg.micro_batch, world)
    checks.before_loading(cfg)
    stages.plan(cfg, [MAKER], rank, device)
    run = runs.Run(cfg, MAY_CHANGE, rank)
    train_set = data.open_dataset(cfg.data_dir, cfg.image_size, cfg.images, cfg.seed)

    # the VAE, the networks of its losses, the optimizers: new, or from the newest checkpoint
    if not run.checkpoint:
        stages.make_missing(cfg, [MAKER])
    vae = load_davae(run.checkpoint) if run.checkpoint else initial_vae(cfg)
    run.must_be_made_of(**identity.of_vae_parts(cfg, train_set))
    if run.done:
        return run.summary()
    checks.before_training(cfg, vae)
    layout = ranks.layout(vae.base.width, device)
    vae = vae.to(device, memory_format=layout).train()
    freeze(vae, cfg.train)
    if vae.D and cfg.fit != "random" and not run.checkpoint:
        start_in_closed_form(cfg, vae, train_set, device, rank)
    nets = LossNetworks(cfg, vae, device)
    trained = [p for p in [*vae.parameters(), *nets.own.parameters()] if p.requires_grad]
    opt = adamw(trained, cfg)
    opt_d = adamw(nets.disc.parameters(), cfg) if nets.disc else None
    if run.checkpoint:
        restore(run, nets, opt, opt_d)
    if cfg.compile:
        compile_levels(vae)
    model = ranks.replicated(vae)
    judge = ranks.replicated(nets.disc) if nets.disc else None
    if nets.disc:
        nets.disc.requires_grad_(False)            # except in its own step

    # before the first step: validation images, the fastest kernels, a checkpoint (so a full disk shows now)
    val = held_out.validation_images(cfg, train_set).to(device)
    run.describe(train_set, vae.parameters(), f"C={vae.C} D={vae.D} f={vae.f}", accumulate, world, device)
    checks.say_if_never_judged(cfg, rank)
    shape = (cfg.batch_size // world // accumulate, 3, cfg.image_size, cfg.image_size)
    choose.before_training(run, device, shape, lambda x, _: vae(training_batch(x, 1, cfg)))
    if not run.checkpoint:
        save(run, 0, vae, nets, opt, opt_d)
        validate(run, 0, vae, val)

    autocast = ranks.autocast(cfg.dtype, device)
    shaped = buckets.sort(train_set, cfg, checks.multiple(cfg, vae))
    stream = data.batches(shaped, cfg.batch_size, cfg.seed, run.start, rank, world, cfg.flip)
    for step, (x, _) in run.steps(stream):

        # learning rate; the discriminator joins later
        lr = learning_rate(step, cfg)
        set_learning_rate(lr, opt)
        set_learning_rate(cfg.disc_lr * lr, opt_d)
        gan_on = nets.disc is not None and step >= cfg.disc_start

        # the VAE: forward and backward, one micro-batch at a time
        pairs = []
        images = data.to_tensor(x.to(device))
        for (part,) in ranks.micro_batches(model, accumulate, images, seed=cfg.seed, step=step):
            part = training_batch(part, step, cfg).contiguous(memory_format=layout)
            keep = levels.draw(cfg.keep_levels, len(part), device) if cfg.keep_levels else None
            with autocast:
                rec = model(part, keep)
                loss, parts = vae_loss(vae, rec, part, cfg, nets, gan_on)
            (loss / accumulate).backward()
            run.log.add(parts)
            pairs.append((part, rec.x_hat.detach()))

        # the VAE's update
        ranks.average_gradients(nets.own.parameters())
        norm = ranks.clip_gradients(nn.ModuleDict({"vae": vae, "own": nets.own}), cfg.clip, loss, step)
        opt.step()
        opt.zero_grad(set_to_none=True)

        # the discriminator, on the same reconstructions
        if gan_on:
            train_discriminator(judge, opt_d, pairs, autocast, run.log, step)

        # log; save first, then draw
        run.log.row(step + 1, gnorm=norm, lr=lr)
        if run.save_due(step + 1):
            save(run, step + 1, vae, nets, opt, opt_d)
            if not run.ends_early:
                validate(run, step + 1, vae, val)

    # the weights are final now: measure the statistics of their latents, and save both
    if run.start == cfg.steps:                     # the job was cut off between its last save and here
        validate(run, cfg.steps, vae, val)
    images = held_out.statistics_images(cfg, train_set, device, rank, world)
    with autocast:
        vae.eval().measure(images, ranks.sum_patiently)
    save(run, cfg.steps, vae, nets, opt, opt_d, measured=True)
    summary = run.finish("DA-VAE" if vae.D else "base VAE")
    if rank == 0:
        figures.report_vae(cfg, summary, held_out.in_words(cfg, len(val)), stages.follow(cfg, makers()))
    return summary


def training_batch(x, step, cfg):
    """(B, 3, H, W) as this step sees it: cropped; for a base VAE (D = 0), mostly shrunk by r as well.

    A DAVAE will show the base VAE images of the shrunk size. Every eighth step keeps the full size, so that
    the base VAE also learns to use r^2 times the tokens (r = 2: four times).
    """
    if cfg.D == 0 and step % 8:
        x = base_image(x, cfg.r)
    if not cfg.crop:
        return x
    # All take the side that the step's first micro-batch draws: ranks would else wait for the largest crop.
    one_of(cfg.crop)                               # its draw; the others make one, too, before those below
    side = one_of(cfg.crop, ranks.generator(cfg.seed, 0, step))
    fits = [n for n in range(cfg.halvings + 1) if min(x.shape[2:]) >= side * 2**n]
    return data.random_crop(base_image(x, 2 ** one_of(fits)), side)


def one_of(choices, generator=None):
    """One of `choices` at random; if there is only one, no random number is drawn."""
    return choices[0] if len(choices) == 1 else choices[torch.randint(len(choices), (), generator=generator)]


def train_discriminator(judge, opt_d, pairs, autocast, log, step):
    """One step of the discriminator on pairs of (images, their reconstructions)."""
    judge.requires_grad_(True)
    for i, (x, x_hat) in enumerate(pairs):
        ranks.synchronise(judge, i == len(pairs) - 1)
        with autocast:
            d_loss = hinge_loss(judge(x).float(), judge(x_hat.float()).float())
        (d_loss / len(pairs)).backward()
        log.add({"d": d_loss})
    norm = nn.utils.get_total_norm([p.grad for p in judge.parameters()])
    ranks.stop_if_not_finite(norm, d_loss, nn.ModuleDict({"discriminator": judge}), step,
                             "the discriminator was not updated, but the VAE was, just before")
    opt_d.step()
    opt_d.zero_grad(set_to_none=True)
    judge.requires_grad_(False)                    # the VAE's loss passes through it, but does not train it


def learning_rate(step, cfg):
    """cfg.lr, rising over `warmup` steps, and falling to 0 over the last fraction `cooldown` of the run."""
    rise = (step + 1) / max(1, cfg.warmup)
    fall = (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps)
    return cfg.lr * min(1.0, rise, fall)


# ---------------------------------------------------------------- set-up


def initial_vae(cfg, known=()):
    """The VAE at step 0.   known: {folder: a VAE to use instead of the run there}"""
    torch.manual_seed(cfg.seed)
    if cfg.D == 0 and not cfg.base:
        sizes = KLConfig(cfg.C, cfg.widths, cfg.blocks, cfg.attn, cfg.quant, cfg.groups)
        return PlainVAE(AutoencoderKL(sizes))
    given = known[cfg.base] if cfg.base in known else load_measured(cfg.base)
    checks.check_base_vae(cfg, given)
    if cfg.D == 0:
        return PlainVAE(given.base)
    vae = DAVAE(given.base, DAVAEConfig(D=cfg.D, r=cfg.r, detail_dropout=cfg.detail_dropout,
                                        detail_noise=cfg.detail_noise, rescale=cfg.rescale,
                                        latent_shortcut=cfg.fit != "random"))
    if cfg.fit != "random":
        check_fit(vae)
    return vae


def freeze(vae, train):
    """Freeze the parts of a DA-VAE that `train` leaves out, see Config."""
    if vae.D:
        vae.detail_encoder.requires_grad_(train == "all")
        vae.down.requires_grad_(train != "up")
        vae.decoder.requires_grad_(train != "blocks")


def start_in_closed_form(cfg, vae, train_set, device, rank):
    """Fit the new blocks, and print how well.  Every rank does all of it; DDP then uses rank 0's result."""
    with ranks.autocast(cfg.dtype, device):
        images = held_out.fitting_images(cfg, vae, train_set, device, rank)
        found = fit_new_blocks(vae.eval(), images, cfg.fit_align * (cfg.fit != "pixels"), cfg.fit == "pixels")
    vae.train()
    if rank == 0:
        print(f"{cfg.out}: new blocks start in closed form (docs/closed_form.md); the details keep "
              f"{found['kept']:.1%} of what z lacks of the image, and predict {found['told']:.1%} of z")


def trial(cfg, n, device, known, classes):
    """(this run's VAE at step 0, a function that runs one forward and backward pass on n images of noise).

    support/stages.py times the pass before anything is trained.
    known: {folder: model} of runs that do not exist yet; classes: unused here, finetune.py's trial needs it
    """
    vae = initial_vae(cfg, known)
    checks.before_training(cfg, vae)
    vae = vae.to(device, memory_format=ranks.layout(vae.base.width, device)).train()
    freeze(vae, cfg.train)
    nets = LossNetworks(cfg, vae, device)
    images = torch.rand(n, 3, cfg.image_size, cfg.image_size, device=device) * 2 - 1
    sides = itertools.cycle([(side,) for side in cfg.crop] or [()])

    def step():
        x = training_batch(images, 1, replace(cfg, crop=next(sides)))      # each size in turn: a fair mean
        with ranks.autocast(cfg.dtype, device):
            loss, _ = vae_loss(vae, vae(x), x, cfg, nets, gan_on=checks.is_judged(cfg))
        loss.backward()

    return vae, step


def adamw(trained, cfg):
    return torch.optim.AdamW(trained, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0, fused=True)


def set_learning_rate(lr, opt):
    for group in opt.param_groups if opt else ():
        group["lr"] = lr


# ---------------------------------------------------------------- saving, validation, the end


def save(run, done, vae, nets, opt, opt_d, measured=False):
    """Write a checkpoint, on rank 0.   measured: do the latent statistics belong to these weights?"""
    state = {"opt": opt.state_dict(), **nets.state_dict()}
    if opt_d:
        state["opt_d"] = opt_d.state_dict()
    about = {"script": "train_vae.py", "config": dataclasses.asdict(run.cfg), "model": vae.config(),
             "measured": measured, "command": config.command("train_vae.py", run.cfg, PRESETS)}
    run.save(done, {"model": vae.state_dict()}, state, about)


def restore(run, nets, opt, opt_d):
    state = run.train_state()
    nets.load_state_dict(state)
    ranks.load_optimizer(opt, state["opt"])
    if opt_d:
        ranks.load_optimizer(opt_d, state["opt_d"])


@torch.no_grad()
def reconstruct(vae, x):
    """Reconstruct x (B, 3, H, W): (from base channels only, bicubically enlarged; from all channels)."""
    z_all = vae.encode(x)
    full = vae.decode(z_all).float().clamp(-1, 1)
    if not vae.D:
        return full, full
    base = vae.decode_base(z_all[:, :vae.C]).float()
    base = F.interpolate(base, scale_factor=float(vae.r), mode="bicubic", align_corners=False)
    return base.clamp(-1, 1), full


def validate(run, done, vae, val):
    """PSNR on `val` (N, 3, H, W), base only and full, and a strip of images.  The ranks share the work."""
    vae.eval()
    mine = held_out.share(len(val), run.rank, ranks.world_size())
    images = val[mine]
    scores = []
    with runs.picture_may_fail(f"{run.cfg.out}: reconstructions"), ranks.autocast(run.cfg.dtype, val.device):
        if len(mine):
            pairs = [reconstruct(vae, x) for x in images.split(min(32, run.cfg.micro_batch))]
            base, full = (torch.cat(parts) for parts in zip(*pairs))
            scores.append(torch.stack([psnr(base, images), psnr(full, images)], dim=1))
        if run.rank == 0:
            figures.draw_reconstructions(run.cfg.out, done, vae.D, images, base, full)
    vae.train()

    scores = ranks.gather(scores, mine.tolist() if scores else [])
    if len(scores) == len(val):
        run.results["psnr_base"], run.results["psnr"] = scores.mean(0).tolist()
        if done:                                       # the next line of the log has them
            run.log.add(dict(zip(("psnr_base", "psnr"), scores.mean(0).to(val))))


def makers():
    """The scripts whose runs are trained on one of this script's."""
    import finetune                                                # here: it is a layer above this script
    return [MAKER, finetune.MAKER]


MAKER = stages.Maker("train_vae.py", ("base VAE", "DA-VAE"), PRESETS, Config, main, trial)

if __name__ == "__main__":
    ranks.launch(main, config.cli(Config, PRESETS))
