"""report.html: a run on a single page, in one file that fetches nothing.

    report.write(Report(...), "out/tiny/report.html")

support/report.html is the template: prose, style, script, and {{places}}. This file fills the places, with
one function per section, in the page's order. A section for which a run has nothing is left out; where it can
still be made, the page shows the command that makes it. The building blocks (pictures, curves, tables) are in
support/page.py.
"""
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from support import config, figures, files, ranks, runs
from support.data import to_uint8
from support.measurements import entries_of, out_of_date, run_folder, seen_in_training
from support.metrics import psnr, upsampled
from support.page import attribute, chart, definitions, duration, fill, img, picture, plural, scores, text

# Bytes. A larger page is rendered again at a lower WebP quality; 100 is lossless.
LARGEST = 6_000_000
QUALITIES = (100, 90, 75, 50, 25)

# Pixels a side. The dial shows the middle of larger images, pixel by pixel; larger samples are downsized.
SIDE = 384

# Images up to this side are shown enlarged, with square pixels.
SMALL = 128

# The dial has at most this many detail counts, from none to all, and this many samples.
STOPS = 8
DIALLED = 10


@dataclass
class Stage:
    """One of the training runs that led to the run on the page."""
    folder: str
    summary: dict                  # summary.json; {}: not finished, or not trained here
    command: str                   # a preset's name and what differs from it; "": not trained here
    settings: dict                 # {field of its Config: value as a string}


@dataclass
class Samples:
    """Latents that a run has sampled."""
    z_all: torch.Tensor            # (n, C+D, h, w); sample i is of names[i % len(names)]
    names: list                    # class names, or prompts
    settings: dict                 # see sample.settings_of
    parameters: int                # of the transformer
    tokens: int


@dataclass
class Report:
    """Everything that a page shows."""
    folder: str                    # the run, as given
    about: dict                    # config.json of the checkpoint
    vae: nn.Module                 # a DAVAE, in eval mode
    x: torch.Tensor                # (N, 3, H, W) in [-1, 1], to reconstruct
    shown: str                     # which images these are, in words
    samples: Samples | None        # None: a run of train_vae.py
    stages: list                   # of Stage, the run itself last


def write(report, path):
    """Write the page.   raises: ValueError if it cannot be made small enough; SystemExit if the disk refuses
    """
    dial = Dial(report)
    qualities = QUALITIES if report.x.shape[-1] <= SMALL else QUALITIES[1:]
    for quality in qualities:
        page = render(report, dial, quality)
        if len(page.encode()) <= LARGEST:
            with runs.disk_may_fail(must=True, what=path):
                files.write_text(path, page)
            return
    raise ValueError(f"{path}: {len(page) / 1e6:.1f} MB even at the lowest quality, wanted at most "
                     f"{LARGEST / 1e6:.0f} MB: show fewer images, with --images= and --n=")


def render(report, dial, quality):
    """The page as text."""
    sections = {
        "dial": dial_section(report, dial),
        "wipe": wipe_section(report, dial),
        "start": start_section(report, quality),
        "samples": samples_section(report, dial, quality),
        "losses": losses_section(report),
        "measurements": measurements_section(report),
        "commands": commands_section(report),
    }
    size = report.x.shape[-1]
    everywhere = {
        "title": text(report.folder),
        "kind": "DA-VAE and transformer" if report.samples else "DA-VAE, the autoencoder alone",
        "sentences": "\n".join(f'<p class="lead">{text(sentence)}</p>' for sentence in sentences(report)),
        "facts": definitions(facts(report), "facts"),
        "run": text(report.folder),
        "small_side": small_side(report.vae.r),
        "side": str(min(size, SIDE)),
        "pixels": "pixels" if size <= SMALL else "",
        "sheets": "\n".join(dial.sheets(quality)),
    }
    return fill((Path(__file__).parent / "report.html").read_text("utf-8"), sections, everywhere)


# ---------------------------------------------------------------- what this run is


def sentences(report):
    """What the run is, in three sentences."""
    if report.samples is None:
        return sentences_of_autoencoder(report)
    vae, own, model, samples = report.vae, report.about["config"], report.about["model"], report.samples
    side = small_side(vae.r)
    kind = plural(model.get("num_classes", 0), "class")
    drawn = "images" if kind == "1 class" else f"images of {kind}"
    if own.get("text"):
        drawn = "images from text prompts"
    before = "from random weights"
    if own["base"]:
        before = f"from {own['base']}, which drew images at {side} with as many tokens"
    _, run = summaries(report)
    trained = "It was trained for"
    if "warm_start" in run:
        trained = ("Before its first step, its output differed from the base model's by at most "
                   f"{run['warm_start']}; it was then trained for")
    return [
        f"A {model['kind']} with {samples.parameters / 1e6:.1f} million parameters that draws {drawn} at "
        f"{own['image_size']} × {own['image_size']} pixels, as {plural(samples.tokens, 'token')} each; it "
        f"started {before}.",
        f"To the {vae.C} base channels, computed on the image at {side}, it adds {vae.D} detail channels "
        f"from a DA-VAE, computed on the image at full size{quality_of(report)}.",
        f"{trained} {length_of(report)}."]


def sentences_of_autoencoder(report):
    vae, own = report.vae, report.about["config"]
    positions = (own["image_size"] // vae.f)**2
    aligned = " and aligned to the base channels" if own["align"] else ""
    return [
        f"A DA-VAE: to the {vae.C} channels of a frozen base VAE, {own['base']}, which sees the image at "
        f"{small_side(vae.r)}, it adds {vae.D} detail channels, computed on the full-size image{aligned}.",
        f"An image of {own['image_size']} × {own['image_size']} pixels becomes {positions} latent positions "
        f"of {vae.C + vae.D} numbers, where the base VAE would need {positions * vae.r**2} positions of "
        f"{vae.C}{quality_of(report)}.",
        f"It was trained for {length_of(report)}."]


def quality_of(report):
    """The DA-VAE's validation scores, as the end of a sentence."""
    davae, _ = summaries(report)
    if "psnr" not in davae:
        return ""
    return (f"; {validated_on(report)} are reconstructed at {davae['psnr']:.2f} dB with details, and at "
            f"{davae['psnr_base']:.2f} dB from the base channels alone")


def validated_on(report):
    """The images that support/held_out.py:validation_images chose for the DA-VAE, in words."""
    settings = davae_of(report).settings
    images = "validation images"
    if not settings.get("val_dir") and settings.get("data_dir", "procedural") != "procedural":
        images = "training images"
    size = settings.get("image_size", "")
    if size not in ("", str(report.about["config"]["image_size"])):
        images += f" at {size} pixels"
    return images


def length_of(report):
    """How long the run was trained, and on what."""
    own = report.about["config"]
    _, run = summaries(report)
    images = own["data_dir"]
    if images == "procedural":
        images = f"{own['images']:,} built-in drawings"
    if "seconds" not in run:
        return f"{own['steps']:,} steps, not all of which are done yet, on {images}"
    return f"{run['steps']:,} steps ({duration(run['seconds'])}) on {images}"


def small_side(r):
    """The size of the base image, in words."""
    return "half size" if r == 2 else f"1/{r} of the side length"


def summaries(report):
    """summary.json of the DA-VAE and of the run itself; {} where one is missing."""
    return davae_of(report).summary, report.stages[-1].summary


def davae_of(report):
    """The Stage that trained the DA-VAE; an empty one if it is not known."""
    if report.samples is None:
        return report.stages[-1]
    trained = [stage for stage in report.stages if stage.summary.get("stage") == "DA-VAE"]
    return trained[-1] if trained else Stage("", {}, "", {})


def facts(report):
    """The run's key figures: {what it is: number}."""
    vae = report.vae
    davae, run = summaries(report)
    what, count = "latent positions", (report.x.shape[-1] // vae.f)**2
    if report.samples:
        what, count = "tokens", report.samples.tokens
    found = {f"{what} per image, not {count * vae.r**2}": count,
             "channels, base + detail": f"{vae.C} + {vae.D}"}
    if "psnr" in davae:
        name = f"base only → with details, {validated_on(report)}"
        found[name] = f"{davae['psnr_base']:.1f} → {davae['psnr']:.1f} dB"
    if "warm_start" in run:
        found["difference at the warm start"] = run["warm_start"]
    seconds = [stage.summary["seconds"] for stage in report.stages if "seconds" in stage.summary]
    if seconds:
        found[f"training time, {plural(len(seconds), 'stage')}"] = duration(sum(seconds))
    return found


# ---------------------------------------------------------------- the detail dial


class Dial:
    """Images at every stop: the base alone, enlarged; then with the first k details, for each k in `levels`.

    x: (N, 3, H, W) the images; decoded: their reconstructions, one (N, 3, H, W) in [-1, 1] per stop
    psnr: (stops, N) of these, in dB
    samples: the samples' latents, decoded likewise; [] if none were drawn
    """

    def __init__(self, report):
        vae = report.vae
        self.x = report.x
        self.levels = levels_of(vae.C, vae.D)
        with torch.no_grad():
            few = ranks.at_once(4, report.x.shape[2], 2 * report.x.shape[3])
            z_all = torch.cat([vae.encode(part.to(vae.mean)) for part in report.x.split(few)])
        self.decoded = decode_at_stops(vae, z_all, self.levels)
        self.psnr = torch.stack([psnr(self.x, y) for y in self.decoded])
        self.samples = []
        if report.samples:
            self.samples = decode_at_stops(vae, report.samples.z_all, self.levels)

    def stops(self):
        """[{"name", "what", "db"}] of the stops, in the page's words."""
        names = ["base only", *map(str, self.levels)]
        said = ["base channels only", *(f"{k} of {self.levels[-1]} details" for k in self.levels)]
        decibels = [f"{mean:.2f} dB" for mean in self.psnr.mean(1).tolist()]
        return [{"name": name, "what": what, "db": db} for name, what, db in zip(names, said, decibels)]

    def sheets(self, quality):
        """<img>s for the script: for both sets, one per stop with the images side by side; and the input."""
        named = {("held-out", "input"): self.x}
        for k, images in enumerate(self.decoded):
            named["held-out", k] = images
        for k, images in enumerate(self.samples):
            named["samples", k] = images[:DIALLED]
        for (name, stop), images in named.items():
            strip = np.concatenate(list(to_uint8(middle(images))), axis=1)          # (H, N * W, 3)
            yield f'<img alt="" data-set="{name}" data-stop="{stop}" src="{picture(strip, quality)}">'


def levels_of(C, D):
    """0, C, 2C, ... D details; at most STOPS of these, evenly spaced."""
    levels = range(0, D + 1, C)
    chosen = np.linspace(0, len(levels) - 1, min(STOPS, len(levels))).round()
    return [levels[int(k)] for k in chosen]


@torch.no_grad()
def decode_at_stops(vae, z_all, levels):
    """[(N, 3, H, W) in [-1, 1]]: the base alone, enlarged; then the first k details, for each k in `levels`.

    In float32, and a few images at a time, because the decoder's activations dominate memory.
    """
    side = vae.f * z_all.shape[-1]
    parts = z_all.split(ranks.at_once(4, side, 2 * side))          # float32 takes twice the memory
    bases = [upsampled(vae.decode_base(z[:, :vae.C]), vae.r)["base only, bicubic"] for z in parts]
    stops = [torch.cat(bases).cpu()]
    for k in levels:
        images = [vae.decode(z, keep=k).clamp(-1, 1) for z in parts]
        stops.append(torch.cat(images).cpu())
    return stops


def middle(x):
    """The middle of images that are too large for the page: (B, 3, H, W), at most SIDE pixels a side."""
    top = max(0, x.shape[2] - SIDE) // 2
    left = max(0, x.shape[3] - SIDE) // 2
    return x[:, :, top:top + SIDE, left:left + SIDE]


def dial_section(report, dial):
    stops = dial.stops()
    n = len(stops)
    mean = dial.psnr.mean(1).tolist()
    low, high = min(mean), max(mean)

    # a stop's dot is in the middle of its column, 8 to 70 % of the way up
    left = [100 * (k + 0.5) / n for k in range(n)]
    up = [8 + 62 * (y - low) / max(high - low, 0.1) for y in mean]
    path = " L".join(f"{x:.2f} {100 - y:.2f}" for x, y in zip(left, up))
    dots = [f'<span class="dot" style="left:{x:.2f}%;bottom:{y:.2f}%"><b>{value:.1f}</b></span>'
            for x, y, value in zip(left, up, mean)]

    cut = ""
    if report.x.shape[-1] > SIDE:
        cut = f" The middle {SIDE} × {SIDE} pixels are shown; PSNR is measured on whole images."
    return {
        "stops": attribute(stops),
        "stop_count": str(n),
        "last_stop": str(n - 1),
        "what": stops[-1]["what"],
        "db": stops[-1]["db"],
        "image_count": str(len(report.x)),
        "dial_path": f"M{path}",
        "dial_dots": "".join(dots),
        "dial_names": "".join(f"<span>{stop['name']}</span>" for stop in stops),
        "trained_without": trained_without(report),
        "shown": text(report.shown),
        "cut": cut,
        "dial_images": "\n".join(dial_images(dial)),
        "dial_samples": "\n".join(dial_samples(report)),
        "dial_without": "" if report.samples else "hidden",
    }


def trained_without(report):
    """Was the DA-VAE trained to work without some of its details?  A sentence; "" if it is not known."""
    settings = davae_of(report).settings
    if "detail_dropout" not in settings:
        return ""
    levels = settings.get("keep_levels", "").replace(",", ", ")
    dropout = float(settings["detail_dropout"])
    if levels:
        return f"In training, this one saw a random number of them, drawn per image from {text(levels)}."
    if dropout:
        return (f"In training, this one saw all of them, except in {dropout:.0%} of the images, where it saw "
                "none; the stops in between are new to it.")
    return ("This one was not; it always saw all of them. Stops with few details may look worse than "
            "<i>base only</i>, which says nothing about the last stop.")


def dial_images(dial):
    """A <figure> for each reconstructed image, with its PSNR."""
    for i, values in enumerate(dial.psnr.T.tolist()):
        decibels = [f"{value:.2f} dB" for value in values]
        yield (f'<figure>{canvas(dial.x, "held-out", i, f"image {i + 1}, reconstructed")}<figcaption '
               f'class="number" data-dbs="{attribute(decibels)}">{decibels[-1]}</figcaption></figure>')


def dial_samples(report):
    """A <figure> for each sample, with its name."""
    if report.samples:
        names = report.samples.names
        for i in range(min(DIALLED, len(report.samples.z_all))):
            name = names[i % len(names)]
            yield (f'<figure>{canvas(report.x, "samples", i, f"sample: {name}")}<figcaption>{text(name)}'
                   "</figcaption></figure>")


def canvas(x, name, i, alt):
    """A <canvas> on which the dial draws image i of a set."""
    side = min(x.shape[-1], SIDE)
    return (f'<canvas width="{side}" height="{side}" data-dial="{name}" data-i="{i}" role="img" '
            f'aria-label="{text(alt)}"></canvas>')


# ---------------------------------------------------------------- the wipe


def wipe_section(report, dial):
    names = {"0": "base only", str(len(dial.levels)): "DA-VAE", "input": "input"}
    base, full, given = names
    pairs = []
    for first, second in ((base, full), (full, given), (base, given)):
        checked = "" if pairs else " checked"
        pairs.append(
            f'<label class="choice"><input type="radio" name="pair"{checked} data-first="{first}" '
            f'data-second="{second}" data-first-name="{names[first]}" data-second-name="{names[second]}">'
            f"{names[first]} and {names[second]}</label>")
    side = min(report.x.shape[-1], SIDE)
    thumbs = []
    for i in range(len(report.x)):
        checked = "" if thumbs else " checked"
        thumbs.append(
            f'<label><input type="radio" name="image" value="{i}"{checked} aria-label="image {i + 1}">'
            f'<canvas width="{side}" height="{side}" data-i="{i}" aria-hidden="true"></canvas></label>')
    return {"pairs": "\n".join(pairs), "thumbs": "\n".join(thumbs)}


# ---------------------------------------------------------------- the warm start


def start_section(report, quality):
    """The difference measured at the warm start, and its picture; None for a run without one."""
    _, run = summaries(report)
    if "warm_start" not in run:
        return None
    path = run_folder(report.folder) / "warm_start.png"
    shown = ""
    if path.exists():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        shown = img(pixels, quality, "two rows that show the same samples")
    return {"warm_start": text(run["warm_start"]), "start_picture": shown,
            "start_without": "" if shown else "hidden"}


# ---------------------------------------------------------------- samples


def samples_section(report, dial, quality):
    """The samples of each class, each above the preview of its latent; None if none were drawn."""
    if not report.samples:
        return None
    names, settings = report.samples.names, report.samples.settings
    full = to_uint8(reduced(dial.samples[-1], SIDE))
    base = to_uint8(reduced(dial.samples[0], min(full.shape[1], SIDE) // report.vae.r))
    figures = []
    for k, name in enumerate(names[:len(full)]):
        pictures = [f"<div>{img(full[i], quality, name)}{img(base[i], quality, f'{name}, base only')}</div>"
                    for i in range(k, len(full), len(names))]
        figures.append(f'<figure><figcaption>{text(name)}</figcaption><div class="pair">{"".join(pictures)}'
                       "</div></figure>")
    return {
        "classes": "\n".join(figures),
        "drawn": text(f"{settings['steps']} Euler steps, guidance {settings['cfg']:g}, time shift "
                      f"{settings['shift']:g}, seed {settings['seed']}, {settings['weights']} weights."),
    }


def reduced(x, side):
    """(B, 3, H, W), downsized to at most `side` pixels a side."""
    if x.shape[-1] <= side:
        return x
    return F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


# ---------------------------------------------------------------- losses


# for each chart: its title, {key in log.jsonl: its name on the page}, and an explanation
FLOW = ("Flow loss: mean (v − v*)² of base and detail channels; w(n), the weight of the details",
        {"base": "base", "detail": "detail", "w": "w(n)"},
        "v* = data − noise is the velocity that the transformer learns to predict. w(n) is the weight of "
        "the details' squared error at step n (Eq. 12): {rise}.")
AUTOENCODER = [
    ("DA-VAE: mean |x − x̂| and the alignment loss",
     {"align": "align", "l1": "L1"},
     "L1: mean absolute pixel error, on a scale from −1 to 1. align: by default the mean squared difference "
     "between the mean of each detail group and its base channel (Eq. 4)."),
    ("DA-VAE: LPIPS",
     {"lpips": "LPIPS"},
     "How different the image and its reconstruction look to a network trained on photos; 0: no difference."),
    ("DA-VAE: KL divergence of the details",
     {"kl": "KL"},
     "How far the distribution of a detail, N(μ, σ²), is from N(0, 1): the mean of μ² + σ² − 1 − log σ². Its "
     "weight is small; it only keeps the details from growing without bound."),
]


def losses_section(report):
    """Curves of the run and, for a run of finetune.py, of its DA-VAE; None if nothing was logged."""
    charts = []
    davae = run_folder(report.folder)
    if report.samples:
        own = report.about["config"]
        title, names, note = FLOW
        rise = f"it rises from 0 to 1 over N = {own['N']:,} steps" if own["N"] else "here 1 from the start"
        charts.append(chart(title, logged(davae, names), wide=True, note=note.format(rise=rise)))
        davae = run_folder(own["vae"])
    for title, names, note in AUTOENCODER:
        charts.append(chart(title, logged(davae, names), note=note))
    charts = "\n".join(filter(None, charts))
    return {"charts": charts} if charts else None


def logged(run, names):
    """{name on the page: (steps, values)} of those of these numbers that a run has logged."""
    if not (run / "log.jsonl").exists():
        return {}
    log = figures.read_log(run)
    return {name: log[key] for key, name in names.items() if key in log}


# ---------------------------------------------------------------- measurements


def measurements_section(report):
    """The latest entry of metrics.json, with its settings; only the command if there is none."""
    entries = entries_of(report.folder)
    if not entries:
        return {"measured": not_measured(report), "tables": "", "settings": "", "settings_without": "hidden"}
    entry = entries[-1]
    settings = entry["settings"]
    seen = seen_in_training(settings.get("data_dir", ""), report.about["config"])
    count, _, _ = settings.get("held_out", "").partition(" ")
    counts = {"reconstruction": f"{count} {'training' if seen else 'held-out'} images".strip(),
              "generation": f"{settings.get('n', 0):,} samples"}
    tables = [scores(counts[name], entry[name]) for name in counts if entry.get(name)]
    known = {name: in_short(value) for name, value in settings.items() if value not in ("", None)}
    machine = text(settings.get("ran_on", "an unknown machine"))
    command = measuring(report, settings.get("data_dir", ""))
    said = (f"Measured with {command} on {machine}. Arrows show which direction is better; the best number "
            "in each column is bold.")
    if seen:
        said += " The run was trained on these images, so the numbers say nothing about others."
    stale = out_of_date(report.folder, entry)
    if stale:
        said += f" These numbers are out of date ({text(stale)})."
    return {"measured": said, "tables": "\n".join(tables), "settings": definitions(known, "settings"),
            "settings_without": ""}


def in_short(setting):
    """A setting as text, cut where it is long: 30,000 prompts would fill the page."""
    whole = str(setting)
    return whole if len(whole) <= 500 else f"{whole[:500]}... (all of it is in metrics.json)"


def measuring(report, data_dir):
    """The command that measures the run on such images."""
    words = ["python", "evaluate.py", report.folder]
    if data_dir:
        words.append(f"--data_dir={data_dir}")
    return f"<code>{text(shlex.join(words))}</code>"


def not_measured(report):
    """How to measure the run; if it was trained on a folder, also with which images and networks."""
    if report.about["config"]["data_dir"] == "procedural":
        return f"Not measured yet: run {measuring(report, '')}."
    lacking = "no samples are drawn" if report.samples else "no distances are computed"
    return (f"Not measured yet: run {measuring(report, 'OTHER_IMAGES')} on a folder of images that were not "
            f"trained on. Without a feature network, {lacking}: add "
            "<code>--lpips_trunk=squeezenet1_1_features.pth</code> (SqueezeNet-FD) or "
            "<code>--inception_weights=</code> (FID).")


# ---------------------------------------------------------------- the commands


def stage_in(folder, saved):
    """The Stage in a folder.   saved: config.json of its newest checkpoint; {} if it was not trained here"""
    settings = {name: config.show(value) for name, value in saved.get("config", {}).items()}
    return Stage(str(folder), runs.read_summary(folder), saved.get("command", ""), settings)


def commands_section(report):
    """For every stage: its folder, its result, the command, and all its settings."""
    items = []
    for stage in report.stages:
        result = "not finished yet"
        if stage.summary:
            result = (f"{stage.summary['stage']}, {stage.summary['steps']:,} steps in "
                      f"{duration(stage.summary['seconds'])}: {figures.result_of(stage.summary)}")
        below = (f"<pre>{text(stage.command)}</pre>\n<details><summary>All settings</summary>"
                 f"{definitions(stage.settings, 'settings')}</details>")
        if not stage.command:
            result = "weights that were provided, or a run that is no longer here"
            below = ""
        items.append(f'<li><h3><code>{text(stage.folder)}</code></h3>\n<p class="note">{text(result)}</p>'
                     f"{below}</li>")
    return {"stages": "\n".join(items)}
