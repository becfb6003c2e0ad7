"""Measure a run: how well it reconstructs held-out images, and how far its samples are from them.

    python evaluate.py out/tiny                            # a run of finetune.py: both
    python evaluate.py out/photos-vae --data_dir=photos/eval --perceptual=squeeze \\
        --lpips_trunk=squeezenet1_1.pth                    # a run of train_vae.py: reconstruction
    torchrun --nproc_per_node=8 -- evaluate.py out/imagenet512 --data_dir=imagenet/val --images=50000 \\
        --n=50000 --inception_weights=inception.pth --reference=VIRTUAL_imagenet512.npz
    python evaluate.py compare out/photos out/other        # the latest measurements of two runs, side by side
    python evaluate.py report out/tiny                     # report.html: the run on one page

Reconstruction: the base channels alone, enlarged; DA-VAE; and the base VAE on the full-size image, with r^2
times the tokens (r = 2: four times). Generation: samples, and the same latents through the base decoder
alone, enlarged (for Tab. S2's baseline, measure the base DiT). Both go to <run>/metrics.json, each as soon as
it is known, with all settings and hashes of weights and images. Impossible requests are refused at the start,
because measuring may take hours; unreadable images are left out, named and counted; samples that no metric
needs are not drawn.
The metrics are in support/metrics.py, metrics.json and `compare` in support/measurements.py; the paper's
analyses are separate scripts in experiments/.
"""
import dataclasses
import itertools
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import sample
from kernels import choose
from support import checks, config, data, image_folder, metrics, ranks, report, runs, weights
from support.config import field
from support.figures import print_table, stages_of
from support.measurements import add_entry, check_writable, compare, davae_settings
from support.measurements import read_entries, run_folder, seen_in_training, state_of, unseen_seed
from support.metrics import FeatureNetwork, distances, moments, upsampled
from support.ranks import autocast, from_all, gather, this_rank
from support.runs import hash_of


@dataclass
class Config(sample.Config):       # run, steps, cfg, device and the other flags of sampling
    out: str = field("", "the JSON file; empty: <run>/metrics.json")
    n: int = field(1000, "samples to draw, for a run of finetune.py", within=(1, 10_000_000))
    # what is measured
    data_dir: str = field("", "held-out images; empty: procedural ones, for a run that was trained on them")
    images: int = field(1000, "held-out images to use, spread over the folder", within=(1, 10_000_000))
    whole: bool = field(False, "only reconstruct the images of data_dir, at their own sizes")
    perceptual: str = field("none", "LPIPS network as a metric", choices=("none", "vgg", "squeeze"))
    lpips_trunk: str = field("", "local weight file of that network; also the trunk of --features=squeeze")
    features: str = field("auto", "network for the distances; auto: the best that other flags and data allow",
                          choices=("auto", "inception", "squeeze", "probe", "none"))
    reference: str = field("", "npz to measure samples against: mu and sigma, or images arr_0; empty: the "
                               "held-out images")
    keep_reference: str = field("", "npz in which to save the held-out images' statistics, for --reference=")
    inception_weights: str = field("", "torch-fidelity's pt_inception-2015-12-05-6726825d.pth")
    clip: str = field("", "folder of a CLIP model, to score a text model's samples against their prompts")


# ---------------------------------------------------------------- what is measured, and with what


@dataclass
class Run:
    """A run of finetune.py or train_vae.py, and this process among the ranks that measure it."""
    folder: str
    checkpoint: Path
    config: dict                   # the checkpoint's config.json: script, config, model, classes
    vae: nn.Module
    dit: nn.Module | None          # None: a run of train_vae.py
    rank: int
    world: int
    device: torch.device


@dataclass
class Rulers:
    """The networks that images are measured with."""
    features: FeatureNetwork
    lpips: nn.Module | None        # None: LPIPS is not measured

    def least(self):
        """The smallest image side, in pixels, that they can measure: SSIM's window, or the networks'."""
        deep = self.lpips is not None or self.features.name == "SqueezeNet"
        return checks.SMALLEST["squeeze"] if deep else data.SMALLEST

    def settings(self):
        """Which networks these are, with hashes of their weights."""
        lpips_hash = hash_of(self.lpips) if self.lpips is not None else None
        return {"features": self.features.described, "lpips_hash": lpips_hash}


def load(folder, which="ema", device="auto", checkpoint=None):
    """The Run in a folder.

    which: "ema" or "model", of the transformer's weights.   device: auto, cpu or cuda.
    checkpoint: one of its step folders; None: the newest
    raises: SystemExit if it is not a run of either script
    """
    rank, world, device = ranks.setup(device)
    checkpoint = checkpoint or runs.latest_checkpoint(folder)
    saved = runs.read_config(checkpoint)
    script = saved.get("script")
    if script not in ("finetune.py", "train_vae.py"):
        raise SystemExit(f"{folder}: weights of {script or 'no training script'}; wanted a run of "
                         "finetune.py or of train_vae.py")
    if script == "finetune.py":
        dit, vae, _ = weights.load_run(checkpoint, which, device)
    else:
        dit = None
        vae = weights.load_davae(checkpoint).to(device, memory_format=torch.channels_last)
    return Run(folder, checkpoint, saved, vae, dit, rank, world, device)


def provenance(run):
    """What the numbers of any measurement depend on, besides its flags: weights, versions, machine."""
    machine = f"{torch.get_num_threads()} CPU threads"
    if run.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    return {
        "checkpoint": str(run.checkpoint),
        "weights_sha256": state_of(run.checkpoint),
        "image_size": run.config["config"]["image_size"],
        "vae_hash": hash_of(run.vae),
        "dit_hash": hash_of(run.dit) if run.dit is not None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processes": run.world,
        "ran_on": machine,
    }


def load_rulers(cfg, features, run):
    """The Rulers that cfg's flags ask for.   features: which network, as in cfg.features."""
    own = run.config["config"]
    images = own["data_dir"]
    if features == "auto" and cfg.data_dir not in ("", "procedural"):
        images = cfg.data_dir                          # drawings saved as files: --features=probe
    squeeze = "" if cfg.perceptual == "vgg" else cfg.lpips_trunk           # the file is that network's
    network = metrics.feature_network(features, images, own["image_size"], run.device,
                                      cfg.inception_weights, squeeze)
    lpips = None
    if cfg.perceptual != "none":
        lpips = metrics.make_lpips(cfg.perceptual, cfg.lpips_trunk).to(run.device)
    return Rulers(network, lpips)


def held_out(run, data_dir, images, whole=False):
    """(data set, indices) of `images` images that the run has not seen, spread evenly; if `whole`, of all.

    They have the size that the run was trained at.   data_dir: a folder; empty: drawings of another seed.
    raises: SystemExit if it is empty and the run was not trained on drawings, or if images < 1
    """
    own = run.config["config"]
    if not data_dir and (whole or own["data_dir"] != "procedural"):
        raise SystemExit(f"{run.folder} was trained on {own['data_dir']}: give held-out images with "
                         "--data_dir=")
    if images < 1:
        raise SystemExit(f"--images={images}: wanted at least 1")
    dataset = data.open_dataset(data_dir, own["image_size"], images, unseen_seed(own))
    n = len(dataset) if whole else min(images, len(dataset))
    return dataset, np.linspace(0, len(dataset) - 1, n).astype(int).tolist()


# ---------------------------------------------------------------- reconstruction


def reconstruction(vae, batches, rulers, device, dtype="float32"):
    """`image_table` of the VAE's reconstructions, each row with its number of latent positions.

    dtype: of the VAE's products, as in cfg.dtype; its outputs are measured in float32
    """
    pixels = []

    def decodings(x):
        pixels.extend([x[0, 0].numel()] * len(x))
        rows = {}
        with autocast(dtype, device):
            z_full = vae.base.encode(x)                                            # (B, C, r*H/f, r*W/f)
            full = vae.base.decode(z_full)
            if vae.D:
                z_all = vae.encode(x)                                              # (B, C+D, H/f, W/f)
                base = vae.decode_base(z_all[:, :vae.C])
                rows["DA-VAE"] = vae.decode(z_all).float().clamp(-1, 1)
        if vae.D:
            rows = upsampled(base.float(), vae.r) | rows
        rows["base VAE, full size"] = full.float().clamp(-1, 1)
        return rows

    table, real, description = image_table(decodings, batches, rulers, device)
    mean = np.mean(list(itertools.chain(*from_all(pixels))))           # over images, which may differ in size
    for name, row in table.items():
        f = vae.base.f if name == "base VAE, full size" else vae.f
        row["positions"] = float(mean / f**2)
    return table, real, description


@torch.no_grad()
def image_table(decodings, batches, rulers, device):
    """Score decoded images: ({row: averages}, the originals' features (N, d), which images they are).

    decodings: function of x (B, 3, H, W) -> {row: x as decoded}, each (B, 3, H, W) in [-1, 1].
    batches: this rank's share of the images, possibly none: (x in [-1, 1], the numbers of its images).
    raises: SystemExit if all ranks together have too few images
    """
    numbers, digests, real = [], [], []
    measured, columns = {}, {}
    for x, some in batches:
        x = x.to(device)
        numbers += some
        digests.append(torch.tensor([int(hash_of(image)[:15], 16) for image in data.to_uint8(x)]))
        real.append(rulers.features(x)[0])
        for row, y in decodings(x).items():
            scores = pair_scores(x, y, rulers.lpips)
            columns |= dict.fromkeys(scores)
            measured.setdefault(row, []).append((torch.stack([*scores.values()], 1), rulers.features(y)[0]))

    # all ranks' images, in order
    digests = gather(digests, numbers)
    real = gather(real, numbers)
    least = 2 if rulers.features.name else 1
    if len(real) < least:
        raise SystemExit(f"{len(real)} images can be measured, wanted at least {least}")
    names, columns = (dict.fromkeys(itertools.chain(*from_all(list(found)))) for found in (measured, columns))
    table = {}
    for row in names:
        parts = measured.get(row, [])
        scores = gather([scores for scores, _ in parts], numbers)                  # (N, columns)
        f = gather([f for _, f in parts], numbers)                                 # (N, d)
        table[row] = dict(zip(columns, scores.mean(0).tolist()))
        table[row]["images"] = len(f)
        if rulers.features.name and this_rank() == 0:                              # the others wait
            with ranks.all_cores():
                table[row] |= distances(rulers.features.name, f, moments(real))    # of Inception: the rFID
    return table, real, f"{len(real)} images, sha256 {hash_of(digests)}"


def pair_scores(x, y, lpips=None):
    """{"psnr", "ssim" and, with its network, "lpips": (B,) float64} of pairs of images (B, 3, H, W)."""
    scores = {"psnr": metrics.psnr(x, y), "ssim": metrics.ssim(x, y)}
    if lpips is not None:
        scores["lpips"] = lpips(x, y).flatten()
    return {name: score.double() for name, score in scores.items()}


# ---------------------------------------------------------------- generation


@dataclass
class Plan:
    """How samples are drawn and what they are measured against, known before anything is measured."""
    settings: dict                 # see sample.settings_of, and which reference and CLIP model
    text: Callable | None          # see sample.text_of
    clip: Callable | None          # see metrics.clip_scorer
    reference: tuple | None        # moments of --reference=; None: the held-out images take its place
    real: torch.Tensor | None      # features (N, d) of its images, where it has any


def plan_generation(cfg, run, rulers, captions):
    """The Plan that cfg's flags ask for.   raises: SystemExit if they ask for something unavailable

    captions: of the held-out images; a text-conditioned model draws them if --prompts is empty
    """
    about = run.config | ({"captions": captions} if captions else {})
    settings = sample.settings_of(cfg, about, run.checkpoint)
    if cfg.graph and run.device.type != "cuda":
        raise SystemExit("--graph=True needs a GPU; leave it out")
    text = sample.text_of(cfg, run.config, settings, run_folder(cfg.run), run.rank, run.device)
    settings["reference_kind"] = "images"
    plan = Plan(settings, text, clip=None, reference=None, real=None)
    if cfg.clip:
        if text is None:
            raise SystemExit(f"--clip={cfg.clip}: {cfg.run} draws classes, not texts")
        plan.clip, settings["clip"] = metrics.clip_scorer(cfg.clip, run.device)
    if cfg.reference:
        size = (settings["height"], settings["width"])
        name, kind = None, "images"
        if run.rank == 0:                                      # the only one that computes distances
            found = metrics.read_reference(cfg.reference, rulers.features, run.device, size)
            plan.reference, plan.real, name = found
            if plan.real is None:                              # then there are fewer metrics, see `distances`
                kind = "statistics"
        settings["reference"], settings["reference_kind"] = from_all((name, kind))[0]
    return plan


@torch.no_grad()
def rehearse(cfg, run, rulers, plan):
    """Draw one batch in one step and measure it, so that any failure (memory, sizes) comes early."""
    one_step = dataclasses.replace(plan, settings=plan.settings | {"steps": 1, "cfg_start": 0.0})
    draw(run, rulers, one_step, range(min(cfg.batch_size, cfg.n)), sample.sample_flow)


@torch.no_grad()
def generation(cfg, run, rulers, plan, real):
    """Draw cfg.n samples and measure them: {row: metrics}.

    real: features (N, d) of the held-out images.
    A run with D = 0 on a DA-VAE has only the enlarged rows: Tab. S2's model of half the size with upsampling.
    """
    reference = plan.reference
    if cfg.reference:
        real = plan.real
    elif rulers.features.name and run.rank == 0:
        with ranks.all_cores():
            reference = moments(real)
    mine = range(run.rank, cfg.n, run.world)
    measured, speed = draw_and_measure(cfg, run, rulers, plan, mine)
    table = {}
    for row, parts in measured.items():
        f = gather([f for f, _, _ in parts], mine)                                 # (n, d)
        logits = gather([logits for _, logits, _ in parts], mine)                  # (n, classes)
        scores = gather([scores for _, _, scores in parts], mine)                  # (n,)
        table[row] = {}
        if rulers.features.name and run.rank == 0:                                 # the others wait
            with ranks.all_cores():
                table[row] |= distances(rulers.features.name, f, reference, logits, real)
        if rulers.features.name == "Probe":
            labels = sample.sample_labels(range(cfg.n), plan.settings["classes"])
            table[row]["judged sharp"] = (logits[:, 10] > 0).float().mean().item()
            table[row]["class recognised"] = (logits[:, :10].argmax(1) == labels).float().mean().item()
        if plan.clip is not None:
            table[row]["CLIP"] = scores.mean().item()
        if speed is not None:
            table[row]["img/s"] = speed
    return table


def draw_and_measure(cfg, run, rulers, plan, mine):
    """Draw samples `mine`: ({row: [what `draw` returned for each batch]}, img/s of all ranks).

    img/s: sampling and both decoders, of whole batches after one to warm up; None if there was no other.
    """
    flow = sample.prepare(run.dit, run.vae, cfg, run.device)
    choose.before_sampling(None, run.device, cfg.compile, lambda: rehearse(cfg, run, rulers, plan))
    measured, seconds = {}, []
    with sample.progress_bar("sampling", len(mine), cfg, run.rank) as bar:
        for numbers, drawn in sample.batches(mine, cfg):
            found, duration = draw(run, rulers, plan, drawn, flow, bar.update)
            seconds.append(duration)
            for row, values in found.items():
                measured.setdefault(row, []).append([x[:len(numbers)] for x in values])
    full = seconds[1:len(mine) // cfg.batch_size]
    return measured, len(full) * cfg.batch_size * run.world / sum(full) if full else None


def draw(run, rulers, plan, indices, flow, tick=None):
    """({row: (features, logits, CLIP scores)} of samples `indices`, seconds of sampling and decoding).

    flow, tick: see `sample.generate`
    raises: SystemExit if the model gives NaN or infinity
    """
    start = time.perf_counter()
    full, base = sample.generate(run.dit, run.vae, indices, plan.settings, plan.text, flow, tick)
    full, base = full.cpu(), base.cpu()                        # waits for the GPU, before the clock is read
    seconds = time.perf_counter() - start
    if not full.isfinite().all():
        raise SystemExit(f"{run.checkpoint}: draws NaN; it diverged, measure an earlier checkpoint")

    prompts = plan.settings["prompts"] if plan.text else [""]
    texts = [prompts[i % len(prompts)] for i in indices]
    found = {}
    for row, x in sample_rows(run.dit, run.vae, full, base).items():
        x = x.to(run.device)
        scores = x.new_empty(len(x)) if plan.clip is None else plan.clip(x, texts)
        found[row] = (*rulers.features(x), scores)
    return found, seconds


def sample_rows(dit, vae, full, base):
    """{row: images} of a batch: the samples, unless the model has no details, and the enlarged previews."""
    rows = {}
    if dit.cfg.D or not vae.D:
        rows["samples"] = full
    if vae.D:
        rows |= upsampled(base, vae.r)
    return rows


# ---------------------------------------------------------------- the script


def main(cfg):
    """Measure, print two tables, add them to metrics.json; ranks share the images.  Returns the new entry."""
    ranks.setup(cfg.device)
    folder = cfg.run or runs.newest_run()
    cfg.run, checkpoint = from_all((folder, runs.latest_checkpoint(folder)))[0]    # rank 0's: a run may go on
    out = Path(cfg.out or run_folder(cfg.run) / "metrics.json")
    read_entries(out)                                         # a damaged file is refused now, not after hours
    run = load(cfg.run, cfg.weights, cfg.device, checkpoint)
    dataset, index = held_out(run, cfg.data_dir, cfg.images, cfg.whole)
    rulers = load_rulers(cfg, "none" if cfg.whole else cfg.features, run)
    unmeasured = cfg.features == "auto" and not rulers.features.name and not cfg.clip
    draws = run.dit is not None and not cfg.whole and not unmeasured
    checks.before_measuring(cfg, run, rulers, len(index), draws, out)

    # everything that the numbers depend on
    settings = dataclasses.asdict(cfg) | provenance(run) | rulers.settings()
    if cfg.whole:
        settings["image_size"] = "whole"
    if draws:
        captions = []
        if dataset.captions and (rulers.features.name or cfg.clip):
            captions = [dataset.captions[i] for i in index if dataset.captions[i]]
        plan = plan_generation(cfg, run, rulers, captions)
        settings |= plan.settings
        rehearse(cfg, run, rulers, plan)

    # reconstruction: each process takes every world-th image
    mine = index[run.rank::run.world]
    batches = data.read(dataset, mine, run.vae.f * run.vae.base.block if cfg.whole else 0)
    batches = tqdm(batches, desc=str(run.checkpoint), disable=run.rank > 0, mininterval=1)
    batches = large_enough(batches, dataset, rulers.least())
    with ranks.memory_may_run_out(less_memory(cfg, run.device)):
        table, real, settings["held_out"] = reconstruction(run.vae, batches, rulers, run.device, cfg.dtype)
    settings["left_out"] = len(index) - len(real)
    entry = {"settings": settings, "reconstruction": table}
    if draws and not cfg.reference:
        settings["reference"] = settings["held_out"]
    if run.rank == 0:
        seen = seen_in_training(cfg.data_dir, run.config["config"])
        print_table(f"{'training' if seen else 'held-out'} images ({cfg.data_dir or 'procedural'})", table)
        if seen:
            print(f"{cfg.run}: was trained on these images; the numbers say nothing about others")
        add_entry(out, entry)
        if cfg.keep_reference:
            size = run.config["config"]["image_size"]
            metrics.keep_reference(cfg.keep_reference, real, rulers.features, settings["held_out"], size)

    # generation: what has been measured so far is kept, whatever happens here
    if draws:
        entry["generation"] = generation(cfg, run, rulers, plan, real)
        if run.rank == 0:
            print_table(f"{cfg.n} samples", entry["generation"])
            add_entry(out, entry)
    ranks.wait_for_all()                                       # rank 0 has distances to compute meanwhile
    return entry


def large_enough(batches, dataset, least):
    """(x, numbers) of data.read's batches, in parts that fit into memory; too-small images are left out."""
    for x, _, numbers in batches:
        H, W = x.shape[2:]
        if min(H, W) >= least:
            n = ranks.at_once(len(x), H, W)
            for k in range(0, len(x), n):
                yield x[k:k + n], numbers[k:k + n]
        else:                                                  # a whole image, a batch by itself
            reason = f"{W}x{H} pixels are too small, LPIPS wants {least}"
            dataset.report(dataset.paths[numbers[0]], reason, "it is left out")


def less_memory(cfg, device):
    """What makes reconstruction take less memory; no flag sets how many images are one batch of it."""
    advice = ["--perceptual=none"] if cfg.perceptual != "none" else []
    if cfg.whole:
        advice.append("smaller images, or without --whole=True")
    return [*advice, "--device=cpu" if device.type == "cuda" else "a machine with more memory"]


# ---------------------------------------------------------------- the report


@dataclass
class ReportConfig:
    run: str = field("", "a run of either script with D > 0, or a step folder; empty: finetune.py's newest")
    out: str = field("", "the HTML file; empty: <run>/report.html")
    data_dir: str = field("", "images to reconstruct; empty: drawings of another seed, or the VAE's "
                              "validation images; the page says if those are training images")
    images: int = field(8, "images to reconstruct", within=(1, 24))
    n: int = field(20, "samples to draw, for a run of finetune.py", within=(1, 100))
    seed: int = field(0, "seed of the samples' noise", within=(0, 2**64 - 1))
    weights: str = field("ema", "which weights of the run", choices=("ema", "model"))
    device: str = field("auto", "where to compute", choices=("auto", "cpu", "cuda"))


def main_report(cfg, text=None):
    """Write the page of a run, see support/report.py.

    text: as `sample.generate` takes it; None: found here, for a text-conditioned model
    raises: SystemExit if the run has no details to show
    """
    cfg.run = cfg.run or runs.newest_run()
    run = load(cfg.run, cfg.weights, cfg.device)
    if run.dit is None:
        checks.refuse_flags_of_samples(cfg, f"{cfg.run} is a run of train_vae.py")
    if not run.vae.D or (run.dit is not None and not run.dit.cfg.D):
        raise SystemExit(f"{cfg.run}: has no detail channels to show; wanted a run of finetune.py or of "
                         "train_vae.py with D > 0")
    path = Path(cfg.out or run_folder(cfg.run) / "report.html")
    check_writable(path)
    x, shown = images_to_show(cfg, run)
    samples = draw_latents(cfg, run, text) if run.dit is not None else None
    report.write(report.Report(cfg.run, run.config, run.vae, x, shown, samples, with_their_bases(run)), path)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB: open it in a browser")


def report_at_the_end(job, text):
    """Write the report of a job of finetune.py that has just ended; failures are printed, not raised.

    job: its Config; text: see `main_report`.  Called by one process
    """
    if not job.D:
        return
    with runs.picture_may_fail(f"{job.out}/report.html"):
        try:
            main_report(ReportConfig(run=job.out, device=job.device), text)
        except SystemExit as reason:
            print(f"{job.out}/report.html not written: {reason}")


def images_to_show(cfg, run):
    """(x (N, 3, H, W) in [-1, 1], which images these are, in words)."""
    own = run.config["config"]
    folder, shown = cfg.data_dir, f"Held-out images, {own['image_size']} pixels"
    if not folder and own["data_dir"] != "procedural":
        folder = davae_settings(own).get("val_dir") or own["data_dir"]
    if seen_in_training(folder, own):
        shown = f"Training images, {own['image_size']} pixels (for others: evaluate.py report --data_dir=)"
    dataset, index = held_out(run, folder, cfg.images)
    batches = [x for x, _, _ in data.read(dataset, index)]
    if not batches:
        raise SystemExit(f"{folder}: none of {len(index)} images can be read; give others with --data_dir=")
    return torch.cat(batches), shown


def draw_latents(cfg, run, text):
    """report.Samples of up to ten classes (or the run's prompts), drawn as finetune.py draws its pictures."""
    own = run.config["config"]
    known = image_folder.trained_classes(run.config)
    classes = np.linspace(0, known - 1, min(10, known)).round().astype(int).tolist()
    chosen = sample.Config(run=cfg.run, n=cfg.n, seed=cfg.seed, weights=cfg.weights,
                           steps=own["sample_steps"], classes=tuple(classes))
    settings = sample.settings_of(chosen, run.config, run.checkpoint)
    if text is None:
        text = sample.text_of(chosen, run.config, settings, run_folder(cfg.run), run.rank, run.device)
    latents = []

    def flow(*args, **options):                                # keeps latents that `generate` only decodes
        latents.append(sample.sample_flow(*args, **options))
        return latents[-1]

    for part in torch.arange(cfg.n).split(10):
        sample.generate(run.dit, run.vae, part.tolist(), settings, text, flow)
    parameters = sum(p.numel() for p in run.dit.parameters())
    tokens = (own["image_size"] // run.vae.f // run.dit.cfg.p)**2
    return report.Samples(torch.cat(latents), names_of(run, settings, cfg.n), settings, parameters, tokens)


def names_of(run, settings, n):
    """The names of samples 0, 1, ..., in turn: by class or prompt, or by number if there is one class."""
    if "prompts" in settings:
        return settings["prompts"]
    classes = settings["classes"]
    if len(classes) == 1:
        return [f"sample {i + 1}" for i in range(n)]
    return [image_folder.name_of(k, run.config) for k in classes]


def with_their_bases(run):
    """The report.Stages that led to a run: first the runs it was built on, then the run itself."""
    own = run.config["config"]
    saved = {}
    for folder in stages_of([own.get("vae", ""), own["base"]]):
        trained = runs.checkpoints(run_folder(folder))
        saved[folder] = runs.read_config(trained[-1]) if trained else {}
    saved[run_folder(run.folder)] = run.config
    return [report.stage_in(folder, about) for folder, about in saved.items()]


def command_line(argv):
    """`compare A B`, `report RUN`, or a run and flags."""
    comparing = argv[:1] == ["compare"] and "--help" not in argv
    if comparing and len(argv) != 3:
        raise SystemExit(f"compare {' '.join(argv[1:])}: wanted two runs: python evaluate.py compare RUN RUN")
    try:
        if comparing:
            compare(*argv[1:])
        elif argv[:1] == ["report"]:
            ranks.launch_alone(main_report, config.cli(ReportConfig, argv=argv[1:]))
        else:
            ranks.launch(main, config.cli(Config, argv=argv))
    except ImportError as error:                    # torch-fidelity, transformers, lpips
        raise SystemExit(f"{error}; install what is missing with: pip install -r requirements.txt") from None


if __name__ == "__main__":
    command_line(sys.argv[1:])
