"""Measure a run: how well it gives held-out images back, and how far its samples are from them.

    python evaluate.py out/tiny                            # a run of finetune.py: both
    python evaluate.py out/photos-vae --data_dir=photos/eval --perceptual=squeeze \\
        --lpips_trunk=squeezenet1_1.pth                    # a run of train_vae.py: reconstruction
    torchrun --nproc_per_node=8 -- evaluate.py out/imagenet512 --data_dir=imagenet/val --images=50000 \\
        --n=50000 --inception_weights=inception.pth --reference=VIRTUAL_imagenet512.npz
    python evaluate.py compare out/photos out/other        # the latest measurements of two runs, side by side

Reconstruction: the base channels alone, enlarged; DA-VAE; and the base VAE on the full-size image, with r^2
times the tokens (r = 2: four times). Generation: samples, and the same latents through the base decoder
alone, enlarged (bilinear: Tab. S2's row). Both go to <run>/metrics.json, with all settings and hashes of
weights and images. The metrics are in support/metrics.py; the paper's analyses are scripts of their own,
in experiments/.
"""
import dataclasses
import json
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import sample
from davae import LAYOUT
from support import config, data, metrics, ranks, runs, weights
from support.config import field
from support.figures import print_table
from support.metrics import FeatureNetwork, distances, moments, upsampled
from support.ranks import gather
from support.runs import hash_of


@dataclass
class Config(sample.Config):       # run, steps, cfg, device and the rest of how samples are drawn
    out: str = field("", "the JSON file; empty: <run>/metrics.json")
    n: int = field(1000, "samples to draw, for a run of finetune.py", within=(1, 10_000_000))
    data_dir: str = field("", "held-out images; empty: procedural ones, for a run that was trained on such")
    images: int = field(1000, "held-out images to use, spread over the folder", within=(1, 10_000_000))
    whole: bool = field(False, "reconstruct the images of data_dir at their own sizes, and nothing else")
    perceptual: str = field("none", "LPIPS network as a metric", choices=("none", "vgg", "squeeze"))
    lpips_trunk: str = field("", "local weight file of that network; also the trunk of --features=squeeze")
    features: str = field("auto", "the network of distances; auto: what the other flags and the data allow",
                          choices=("auto", "inception", "squeeze", "probe", "none"))
    reference: str = field("", "npz to measure samples against: mu and sigma, or images arr_0; empty: the "
                               "held-out images")
    keep_reference: str = field("", "npz to keep the statistics of the held-out images in, for --reference=")
    inception_weights: str = field("", "torch-fidelity's pt_inception-2015-12-05-6726825d.pth")
    clip: str = field("", "folder of a CLIP model, to score samples of a model of texts against the prompts")


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

    def settings(self):
        """Which they are, with hashes of their weights."""
        lpips_hash = hash_of(self.lpips) if self.lpips is not None else None
        return {"features": self.features.described, "lpips_hash": lpips_hash}


def load(folder, which="ema", device="auto"):
    """The Run in a folder.

    which: "ema" or "model", of the transformer's weights.   device: auto, cpu or cuda.
    """
    rank, world, device = ranks.setup(device)
    checkpoint = runs.latest_checkpoint(folder)
    saved = runs.read_config(checkpoint)
    if saved["script"] == "finetune.py":
        dit, vae, _ = weights.load_run(folder, which, device)
    else:
        dit = None
        vae = weights.load_davae(folder).to(device, memory_format=LAYOUT[device.type])
    return Run(folder, checkpoint, saved, vae, dit, rank, world, device)


def provenance(run):
    """What the numbers of any measurement depend on, beside its flags: weights, versions, machine."""
    machine = f"{torch.get_num_threads()} CPU threads"
    if run.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    return {
        "checkpoint": str(run.checkpoint),
        "image_size": run.config["config"]["image_size"],
        "vae_hash": hash_of(run.vae),
        "dit_hash": hash_of(run.dit) if run.dit is not None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processes": run.world,
        "ran_on": machine,
    }


def load_rulers(cfg, features, run):
    """The Rulers that cfg's flags ask for.   features: which network, as of cfg.features."""
    own = run.config["config"]
    network = metrics.feature_network(features, own["data_dir"], own["image_size"], run.device,
                                      cfg.inception_weights, cfg.lpips_trunk)
    lpips = None
    if cfg.perceptual != "none":
        lpips = metrics.make_lpips(cfg.perceptual, cfg.lpips_trunk).to(run.device)
    return Rulers(network, lpips)


def held_out(run, data_dir, images, whole=False):
    """(data set, indices) of `images` images that the run has not seen, spread evenly; if `whole`, of all.

    They have the size that the run was trained at.   data_dir: a folder; empty: drawings of another seed.
    raises: SystemExit where it is empty and the run was trained on something else than drawings.
    """
    own = run.config["config"]
    if not data_dir and (whole or own["data_dir"] != "procedural"):
        raise SystemExit(f"{run.folder} was trained on {own['data_dir']}: give held-out images with "
                         "--data_dir=")
    dataset = data.open_dataset(data_dir or "procedural", own["image_size"], images, own["seed"] + 1)
    n = len(dataset) if whole else min(images, len(dataset))
    return dataset, np.linspace(0, len(dataset) - 1, n).astype(int).tolist()


# ---------------------------------------------------------------- reconstruction


def reconstruction(vae, batches, rulers, device):
    """`image_table` of what the VAE gives back, each row with its number of latent positions."""
    positions = {}

    def decodings(x):
        rows = {}
        if vae.D:
            z_all = vae.encode(x)                                                  # (B, C+D, H/f, W/f)
            rows |= upsampled(vae.decode_base(z_all[:, :vae.C]), vae.r)
            rows["DA-VAE"] = vae.decode(z_all).clamp(-1, 1)
            positions.update(dict.fromkeys(rows, z_all[0, 0].numel()))
        z_full = vae.base.encode(x)                                                # (B, C, r*H/f, r*W/f)
        rows["base VAE, full size"] = vae.base.decode(z_full).clamp(-1, 1)
        positions["base VAE, full size"] = z_full[0, 0].numel()
        return rows

    table, real, description = image_table(decodings, batches, rulers, device)
    for row in table:
        table[row]["positions"] = positions[row]
    return table, real, description


@torch.no_grad()
def image_table(decodings, batches, rulers, device):
    """Score what becomes of images: ({row: averages}, the images' features (N, d), which images they are).

    decodings: function of x (B, 3, H, W) -> {row: what became of x}, each (B, 3, H, W) in [-1, 1].
    batches: this rank's share of the images, in [-1, 1].
    """
    digests, real, measured = [], [], {}
    for x in batches:
        x = x.to(device)
        digests.append(torch.tensor([int(hash_of(image)[:15], 16) for image in data.to_uint8(x)]))
        real.append(rulers.features(x)[0])
        for row, y in decodings(x).items():
            measured.setdefault(row, []).append((pair_scores(x, y, rulers.lpips), rulers.features(y)[0]))

    # all ranks' images, in their order
    digests = gather(digests)
    real = gather(real)
    table = {}
    for row, parts in measured.items():
        scores = gather([scores for scores, _ in parts])                           # (N, 2 or 3)
        f = gather([f for _, f in parts])                                          # (N, d)
        table[row] = dict(zip(("psnr", "ssim", "lpips"), scores.mean(0).tolist()))
        table[row]["images"] = len(f)
        if rulers.features.name:
            table[row] |= distances(rulers.features.name, f, moments(real))        # Inception's: the rFID
    return table, real, f"{len(real)} images, sha256 {hash_of(digests)}"


def pair_scores(x, y, lpips=None):
    """PSNR, SSIM and, with its network, LPIPS of each pair, (B, 3, H, W): (B, 2 or 3), float64."""
    scores = [metrics.psnr(x, y), metrics.ssim(x, y)]
    if lpips is not None:
        scores.append(lpips(x, y).flatten())
    return torch.stack([score.double() for score in scores], dim=1)


# ---------------------------------------------------------------- generation


@torch.no_grad()
def generation(cfg, run, rulers, real, described):
    """Draw cfg.n samples and measure them: ({row: metrics}, the settings that they depend on).

    real: features (N, d) of the held-out images; described: which these are. cfg.reference takes their place.
    A run with D = 0 on a DA-VAE has the enlarged rows only: Tab. S2's model of half the size with upsampling.
    """
    settings = sample.settings_of(cfg, run.config, run.checkpoint)
    reference = moments(real)
    if cfg.reference:
        reference, real, described = metrics.read_reference(cfg.reference, rulers.features, run.device)
    settings["reference"] = described
    text = sample.text_of(cfg, run.config, settings, Path(cfg.run), run.rank, run.device)
    clip = None
    if cfg.clip:
        if text is None:
            raise SystemExit(f"--clip={cfg.clip}: {cfg.run} draws classes, not texts")
        clip, settings["clip"] = metrics.clip_scorer(cfg.clip, run.device)

    measured, speed = draw_and_measure(cfg, run, rulers, settings, text, clip)
    table = {}
    for row, parts in measured.items():
        f = gather([f for f, _, _ in parts])                                       # (n, d)
        logits = gather([logits for _, logits, _ in parts])                        # (n, classes)
        scores = gather([scores for _, _, scores in parts])                        # (n,)
        table[row] = {}
        if rulers.features.name:
            table[row] |= distances(rulers.features.name, f, reference, logits, real)
        if rulers.features.name == "Probe":
            labels = sample.sample_labels(range(cfg.n), settings["classes"])
            table[row]["judged sharp"] = (logits[:, 10] > 0).float().mean().item()
            table[row]["class recognised"] = (logits[:, :10].argmax(1) == labels).float().mean().item()
        if clip is not None:
            table[row]["CLIP"] = scores.mean().item()
        if speed is not None:
            table[row]["img/s"] = speed
    return table, settings


def draw_and_measure(cfg, run, rulers, settings, text, clip):
    """Draw this rank's samples: ({row: [(features, logits, CLIP scores) of each batch]}, img/s of all ranks).

    img/s: sampling and both decoders, after a batch of warm-up; None if there was no second batch.
    """
    mine = range(run.rank, cfg.n, run.world)
    prompts = settings["prompts"] if text else [""]
    flow = sample.prepare(run.dit, run.vae, cfg, run.device)
    measured, seconds = {}, []
    for k in tqdm(range(0, len(mine), cfg.batch_size), desc="sampling", disable=run.rank > 0, mininterval=1):
        indices = mine[k:k + cfg.batch_size]
        start = time.perf_counter()
        full, base = sample.generate(run.dit, run.vae, indices, settings, text, flow)
        full, base = full.cpu(), base.cpu()                    # waits for the GPU, before the clock is read
        seconds.append(time.perf_counter() - start)

        texts = [prompts[i % len(prompts)] for i in indices]
        for row, x in sample_rows(run.dit, run.vae, full, base).items():
            x = x.to(run.device)
            scores = x.new_empty(len(x)) if clip is None else clip(x, texts)
            measured.setdefault(row, []).append((*rulers.features(x), scores))
    if len(seconds) == 1:
        return measured, None
    return measured, (len(mine) - cfg.batch_size) * run.world / sum(seconds[1:])


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
    run = load(cfg.run, cfg.weights, cfg.device)
    out = Path(cfg.out or Path(cfg.run) / "metrics.json")
    for path in filter(None, (out, cfg.keep_reference)):       # before the work, and not after it
        runs.make_room_for(path)
    dataset, index = held_out(run, cfg.data_dir, cfg.images, cfg.whole)
    if run.world > min(len(index), cfg.n):
        raise SystemExit(f"{run.world} processes, {len(index)} images, {cfg.n} samples: wanted at least "
                         "one for each process")
    rulers = load_rulers(cfg, "none" if cfg.whole else cfg.features, run)

    # everything that the numbers depend on
    settings = dataclasses.asdict(cfg) | provenance(run) | rulers.settings()
    if cfg.whole:
        settings["image_size"] = "whole"

    # reconstruction: every process takes each world-th image
    mine = index[run.rank::run.world]
    batches = (x for x, _, _ in data.read(dataset, mine, run.vae.f if cfg.whole else 0))
    batches = tqdm(batches, desc=str(run.checkpoint), disable=run.rank > 0, mininterval=1)
    table, real, settings["held_out"] = reconstruction(run.vae, batches, rulers, run.device)
    entry = {"settings": settings, "reconstruction": table}

    # generation
    if run.dit is not None and not cfg.whole:
        entry["generation"], more = generation(cfg, run, rulers, real, settings["held_out"])
        settings |= more

    # the files, and two tables
    if run.rank:
        return entry
    if cfg.keep_reference:
        mu, sigma = moments(real)
        np.savez(cfg.keep_reference, mu=mu, sigma=sigma, features=rulers.features.described, count=len(real))
    print_table(f"held-out images ({cfg.data_dir or 'procedural'})", entry["reconstruction"])
    print_table(f"{cfg.n} samples", entry.get("generation", {}))
    add_entry(out, entry)
    return entry


def add_entry(path, entry):
    """Add a measurement to the JSON list in `path`; it replaces the one with the same settings."""
    entries = json.loads(path.read_text()) if path.exists() else []
    others = [e for e in entries if e["settings"] != entry["settings"]]
    runs.write_json(path, [*others, entry])
    print(f"\nadded to {path}")


# ---------------------------------------------------------------- compare two runs


HIGHER_IS_BETTER = ("psnr", "ssim", "IS", "precision", "recall", "judged sharp", "class recognised", "CLIP")
LOWER_IS_BETTER = ("lpips", "FD", "FID", "KID")                # img/s, images and positions are not ranked

# The settings that a number depends on: two numbers are ranked where these are known and equal.
OF_SECTION = {"reconstruction": ("image_size", "held_out"), "generation": ("image_size", "n", "reference")}
OF_METRIC = {"psnr": (), "ssim": (), "lpips": ("perceptual", "lpips_hash"), "CLIP": ("clip", "prompts")}
OF_FEATURES = ("features",)                                    # of all other metrics


def compare(a, b):
    """Print the latest entries of two runs side by side.  Returns the lines.

    * marks the better value, where all that it depends on is known and equal. The last line has every setting
    in which the two differ.
    """
    one, two = latest_entry(a), latest_entry(b)
    lines = [f"{'':<52}{a[-14:]:>14}  {b[-14:]:>14}"]
    for section, of_section in OF_SECTION.items():
        values, others = metrics_of(one, section), metrics_of(two, section)
        for (row, metric), x in values.items():
            if (row, metric) not in others or not metric.endswith(HIGHER_IS_BETTER + LOWER_IS_BETTER):
                continue
            y = others[row, metric]
            differ = differing(one, two, of_section + OF_METRIC.get(metric, OF_FEATURES))
            stars = "  " if differ else better(metric, x, y)
            line = f"{row:<34}{metric:>18}{x:>14.4g}{stars[0]} {y:>14.4g}{stars[1]}"
            lines.append(line + (f"  not ranked: {', '.join(differ)}" if differ else ""))
    everything = sorted({*one["settings"], *two["settings"]})
    lines.append(f"they differ in: {'; '.join(differing(one, two, everything))}")
    print(*lines, sep="\n")
    return lines


def better(metric, x, y):
    """"* " if x is the better value of a metric, " *" if y is, two spaces if they are equal."""
    if x == y:
        return "  "
    return "* " if (x > y) == metric.endswith(HIGHER_IS_BETTER) else " *"


def latest_entry(run):
    """The last measurement in a run's metrics.json."""
    config.check_name("compare ", run)
    path = Path(run) / "metrics.json"
    if not path.exists():
        raise SystemExit(f"{path}: not there; make it with: python evaluate.py {path.parent}")
    return json.loads(path.read_text())[-1]


def metrics_of(entry, section):
    """{(row, metric): value} of a section of an entry. FID@n and FID-50k are both FID: n is a setting."""
    values = {}
    for row, found in entry.get(section, {}).items():
        for metric, value in found.items():
            values[row, re.sub(r"FID(@\d+|-50k)", "FID", metric)] = value
    return values


def differing(one, two, names):
    """["name x / y"] of the settings in which two entries differ, or that one of them lacks."""
    found = []
    for name in names:
        x = one["settings"].get(name, "unknown")
        y = two["settings"].get(name, "unknown")
        if x != y or x == "unknown":
            found.append(f"{name} {x} / {y}")
    return found


def command_line(argv):
    """`compare A B`, or a run and flags."""
    if argv[:1] == ["analyse"]:
        raise SystemExit("the paper's analyses are scripts of their own, in experiments/: for example "
                         "python experiments/tsne.py RUN")
    try:
        if argv[:1] == ["compare"]:
            if len(argv) != 3:
                raise SystemExit("compare: wanted two runs, as in  python evaluate.py compare out/a out/b")
            compare(*argv[1:])
        else:
            ranks.launch(main, config.cli(Config, argv=argv))
    except ImportError as error:                    # torch-fidelity, transformers, lpips
        raise SystemExit(f"{error}; install what is missing with: pip install -r requirements.txt") from None


if __name__ == "__main__":
    command_line(sys.argv[1:])
