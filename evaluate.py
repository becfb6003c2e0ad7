"""Measure a run: reconstruction of held-out images, and the distance of its samples from them; and the paper's analyses.

    python evaluate.py out/tiny                                     # a run of finetune.py: both
    python evaluate.py out/photos-vae --data_dir=photos/eval --perceptual=squeeze --lpips_trunk=squeezenet1_1.pth
    torchrun --nproc_per_node=8 -- evaluate.py out/imagenet512 --data_dir=imagenet/val --images=50000 --n=50000 \\
        --inception_weights=inception.pth --reference=VIRTUAL_imagenet512.npz
    python evaluate.py compare out/photos out/other                 # the latest measurements of two runs, side by side
    python evaluate.py analyse tsne out/tiny-vae --other=out/no-align       # one of the paper's figures, and its numbers

Reconstruction: base channels alone, doubled; DA-VAE; base VAE on the full-size image, with four times the tokens. Generation:
samples, and the same latents through the base decoder alone, doubled (bilinear: Tab. S2's row). Both go to <run>/metrics.json,
with all settings and hashes of weights and images. Analyses write analysis_<name>.json and PNGs into the run's folder.
"""
import dataclasses
import json
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sample
from davae import LAYOUT
from support.weights import load_davae
from support import config, data, figures, ranks, runs, weights
from support.config import field
from support.figures import plot, print_table
from support.metrics import (
    clip_scorer,
    distances,
    doubled,
    feature_network,
    make_lpips,
    moments,
    psnr,
    read_reference,
    ssim,
)
from support.ranks import gather
from support.runs import hash_of


@dataclass
class Config(sample.Config):
    out: str = field("", "the JSON file; empty: <run>/metrics.json (of an analysis: the folder, <run>)")
    n: int = field(1000, "samples to draw, for a run of finetune.py")
    data_dir: str = field("", "held-out images; empty: procedural ones of another seed, if the run was trained on such")
    images: int = field(1000, "held-out images to use, spread evenly over the folder")
    whole: bool = field(False, "reconstruct the images of data_dir at their own sizes, and nothing else")
    perceptual: str = field("none", "LPIPS network as a metric: vgg, squeeze or none")
    lpips_trunk: str = field("", "local weight file of that network; also the trunk of --features=squeeze")
    features: str = field("auto", "inception, squeeze, probe or none; auto: what the other flags and the data allow")
    reference: str = field("", "npz to measure samples against: mu and sigma, or images arr_0; empty: the held-out images")
    keep_reference: str = field("", "npz to keep the statistics of the held-out images in, for --reference= of other runs")
    inception_weights: str = field("", "torch-fidelity's pt_inception-2015-12-05-6726825d.pth")
    clip: str = field("", "folder of a CLIP model, to score samples of a model of texts against their prompts")
    other: str = field("", "analyses of latents: a second DA-VAE, for example one trained with --align=0")

@torch.no_grad()
def image_table(run, decodings, batches):
    """({row: averages over images}, features of the images (n, d)); settles run.features, notes it and the images' hash.
    decodings(x (B, 3, H, W)) yields (row, what became of x); batches: this rank's share of the images, in [-1, 1]."""
    run.features, run.network, run.settings["features"] = feature_network(run)
    seen, parts, table = [], {}, {}
    for x in (x.to(run.device) for x in batches):
        seen.append((torch.tensor([int(hash_of(image)[:15], 16) for image in data.to_uint8(x)]), run.network(x)[0]))
        for row, y in decodings(x):
            scores = [psnr(x, y), ssim(x, y)] + ([run.lpips(x, y).flatten()] if run.lpips is not None else [])
            parts.setdefault(row, []).append((torch.stack([s.double() for s in scores], dim=1), run.network(y)[0]))
    digits, real = map(gather, zip(*seen))
    run.settings["held_out"] = f"{len(real)} images, sha256 {hash_of(digits)}"
    for row, batches in parts.items():
        scores, f = map(gather, zip(*batches))
        table[row] = {**dict(zip(("psnr", "ssim", "lpips"), scores.mean(0).tolist())), "images": len(f)}
        table[row] |= distances(run.features, f, moments(real)) if run.features else {}
    return table, real

def reconstruction(run, batches):
    """`image_table` of what the VAE gives back, with the number of latent positions."""
    def decodings(x):
        z_all, rows = vae.encode(x), {}
        if vae.D:
            rows = {**doubled(vae.decode_base(z_all[:, :vae.C])), "DA-VAE": vae.decode(z_all).clamp(-1, 1)}
        rows["base VAE, full size"] = vae.base.decode(z_full := vae.base.encode(x)).clamp(-1, 1)
        positions.update({row: (z_full if "full" in row else z_all)[0, 0].numel() for row in rows})
        return rows.items()
    vae, positions = run.vae, {}
    table, real = image_table(run, decodings, batches)
    return {row: {**values, "positions": positions[row]} for row, values in table.items()}, real

@torch.no_grad()
def generation(run, real):
    """{row: distances} of cfg.n samples, and of the same latents through the base decoder alone, doubled; adds to settings.
    real: features (N, d) of the held-out images. img/s: sampling and both decoders on all ranks, after a batch of warm-up.
    A run with D = 0 on a DA-VAE has the doubled rows only: Tab. S2's model of half the size with upsampling."""
    cfg, vae, settings, parts, table, seconds = run.cfg, run.vae, run.settings, {}, {}, []
    settings.update(sample.settings_of(cfg, run.config, run.checkpoint), reference=settings["held_out"])
    reference, clip = moments(real), lambda x, texts: x.new_empty(len(x))
    if cfg.reference:
        reference, real, settings["reference"] = read_reference(cfg.reference, settings["features"], run.network, run.device)
    text = sample.text_of(cfg, run.config, settings, Path(cfg.run), run.rank, run.device)
    if cfg.clip and text is None:
        raise SystemExit(f"--clip={cfg.clip}: {cfg.run} draws classes, not texts")
    if cfg.clip:
        clip, settings["clip"] = clip_scorer(cfg.clip, run.device)
    mine, prompts = range(run.rank, cfg.n, run.world), settings["prompts"] if text else [""]
    flow = sample.prepare(run.dit, vae, cfg, run.device)
    for k in tqdm(range(0, len(mine), cfg.batch_size), desc="sampling", disable=run.rank > 0, mininterval=1):
        start, indices = time.perf_counter(), mine[k:k + cfg.batch_size]
        full, base = (x.cpu() for x in sample.generate(run.dit, vae, indices, settings, text, flow))
        seconds.append(time.perf_counter() - start)
        rows = ({"samples": full} if run.dit.cfg.D or not vae.D else {}) | (doubled(base) if vae.D else {})
        for row, x in rows.items():
            x, texts = x.to(run.device), [prompts[i % len(prompts)] for i in indices]
            parts.setdefault(row, []).append((*run.network(x), clip(x, texts)))
    for row, batches in parts.items():
        f, logits, score = map(gather, zip(*batches))
        values = table[row] = distances(run.features, f, reference, logits, real) if run.features else {}
        if run.features == "Probe":
            labels = sample.sample_labels(range(cfg.n), settings["classes"])
            values["judged sharp"] = (logits[:, 10] > 0).float().mean().item()
            values["class recognised"] = (logits[:, :10].argmax(1) == labels).float().mean().item()
        values |= {"CLIP": score.mean().item()} if cfg.clip else {}
        values |= {"img/s": (len(mine) - cfg.batch_size) * run.world / sum(seconds[1:])} if seconds[1:] else {}
    return table

# ---------------------------------------------------------------- the paper's analyses
# Each takes a run (see `load` and `look`) and returns what it found: "table", {row: numbers}; "panels", [(x label, y label,
# line style, {curve: [x, y]})]; "pictures", {row: images}.

def sensitivity(run):
    """Fig. S2: decoding with the true details, with z_d = 0 as in detail dropout, and with N(0, I) in normalised units."""
    def decodings(x):
        z, z_d = run.vae.encode(x).split([run.vae.C, run.vae.D], dim=1)
        noise = sample.sample_noise(0, range(len(x)), z_d.shape[1:]).to(x.device)
        for row, details in (("full", z_d), ("zero", run.zero.expand_as(z_d)), ("random", noise)):
            yield f"{row} details", run.vae.decode(torch.cat([z, details], dim=1)).clamp(-1, 1)
    pictures = {"input": run.x[:6], **dict(decodings(run.x[:6].to(run.device)))}
    return {"table": image_table(run, decodings, run.x.split(10))[0], "pictures": pictures}

def knockout(run):
    """PSNR lost without one group of Eq. 3's detail channels at a time, and PSNR with the first k of the D channels alone."""
    vae, width = run.vae, run.vae.D // run.vae.C
    zero, group = F.pad(run.zero, (0, 0, 0, 0, vae.C, 0)), torch.arange(-vae.C, vae.D, device=run.device) // width
    def score(lost):                                # (C+D,) bool
        pairs = zip(run.x.split(10), run.z_all.to(run.device).split(10))
        return torch.cat([psnr(x, vae.decode(zero.where(lost.view(1, -1, 1, 1), z)).cpu()) for x, z in pairs]).mean().item()
    kept = [score(group >= c) for c in range(vae.C + 1)]
    lost = [kept[-1] - score(group == c) for c in range(vae.C)]
    rows = {"all details": kept[-1], "none": kept[0], f"all but group {np.argmax(lost)}, the worst": kept[-1] - max(lost)}
    return {"table": {row: {"psnr": value} for row, value in rows.items()}, "panels": [
        (f"group of {width} detail channels left out", "PSNR lost [dB]", "o", {"one group": [list(range(vae.C)), lost]}),
        (f"first k of {vae.D} detail channels kept", "PSNR [dB]", "o-", {"k": [list(range(0, vae.D + 1, width)), kept]})]}

def spectrum(run):
    """Fig. S5: radially averaged power of base and detail latents against spatial frequency.
    Each image's channel loses its mean; each channel's power, averaged over images, is normalised to a mean of 1 over the
    frequencies left (white noise is 1 everywhere); then rings of width 1 / min(h, w), up to 1/2, and channels are averaged."""
    curves, (h, w) = {}, run.z_all.shape[2:]
    radius = torch.hypot(torch.fft.fftfreq(h).view(-1, 1), torch.fft.fftfreq(w).view(1, -1))
    ring, bins = (radius * min(h, w)).round(), torch.arange(1, min(h, w) // 2 + 1)
    for name, z in run.groups.items():
        power = torch.fft.fft2(z.double() - z.double().mean((2, 3), keepdim=True)).abs().square().mean(0)       # (K, h, w)
        power = power / power.sum((1, 2), keepdim=True).clamp_min(1e-30) * (h * w - 1)
        curves[name] = [(bins / min(h, w)).tolist(), [power[:, ring == k].mean().item() for k in bins]]
    return {"panels": [("spatial frequency [cycles per latent pixel]", "power (1: the mean over frequencies)", "o-", curves)]}

def losses(run):
    """Fig. S3: base and detail loss of a run of finetune.py, as logged and smoothed: the mean of neighbouring log lines."""
    path = run.checkpoint.parent / "log.jsonl"
    rows = [r for r in map(json.loads, path.read_text().splitlines()) if "detail" in r] if path.exists() else []
    if not rows:
        raise SystemExit(f"{path}: wanted the log of a DA-VAE run of finetune.py, with at least one line")
    steps, window, panels = [r["step"] for r in rows], np.ones(len(rows) // 10 * 2 + 1), []
    for name in ("base", "detail"):
        raw = np.array([r[name] for r in rows])
        mean = np.convolve(raw, window, "same") / np.convolve(np.ones_like(raw), window, "same")
        curves = {"as logged": [steps, raw.tolist()], f"mean of {len(window)}": [steps, mean.tolist()]}
        panels.append(("step", f"{name}: mean (v - v*)^2", "-", curves))
    return {"panels": panels}

def timebins(run, bins=10):
    """Mean (v - v*)^2 of base and detail channels by time, t uniform in each bin, each held-out latent once in each bin."""
    if run.dit is None or "context" in run.config["model"] or run.classes != run.config["classes"]:
        raise SystemExit(f"{run.cfg.run}: wanted a class-conditional run of finetune.py, and held-out images of its classes")
    curves, generator = {"base": [[], []], "detail": [[], []]}, torch.Generator().manual_seed(0)
    for k in range(bins):
        error = []
        for z_all, y in zip(run.z_all.split(50), run.y.split(50)):
            t = (k + torch.rand(len(z_all), generator=generator)) / bins
            noise, s = torch.randn(z_all.shape, generator=generator), t.view(-1, 1, 1, 1)
            v = run.dit(*(a.to(run.device) for a in (s * z_all + (1 - s) * noise, t, y))).float().cpu()
            error.append((v - (z_all - noise)).square())
        for name, part in zip(curves, torch.cat(error).split([run.vae.C, run.vae.D], dim=1)):
            curves[name][0].append((k + 0.5) / bins)
            curves[name][1].append(part.mean().item())
    return {"panels": [("time t, bins of 0.1 (0: noise, 1: data)", "mean (v - v*)^2", "o-", curves)]}

def latents(run):
    """Fig. 3: the first three principal components of base and of detail latents as RGB beside the images."""
    pictures = {"input": run.x[:6]}
    for name, z in run.groups.items():
        x = z.movedim(1, 3).double() - z.mean((0, 2, 3))                        # (N, h, w, channels)
        rgb = x @ torch.linalg.eigh(torch.cov(x.flatten(0, 2).T))[1][:, -3:].flip(1)        # shown up to 2 sigma
        pictures[f"{name}, PCA"] = F.interpolate((rgb / rgb.std((0, 1, 2)) / 2).movedim(3, 1)[:6].float(), run.x.shape[2:])
    return {"pictures": pictures}

def tsne(run):
    """Fig. 3: t-SNE of whole latents, coloured by class; the table: how often the nearest other latent is of the same class."""
    from sklearn.manifold import TSNE
    table, panels = {}, []
    for name, z in ((name, z.flatten(1)) for name, z in run.groups.items()):
        nearest = torch.cdist(z, z).fill_diagonal_(torch.inf).argmin(1)
        table[name] = {"nearest of same class": (run.y[nearest] == run.y).float().mean().item()}
        points = TSNE(perplexity=min(30, len(z) / 4), random_state=0).fit_transform(z.numpy())         # (N, 2)
        panels.append((name, "", ".", {c: points[run.y == k].T.tolist() for k, c in enumerate(run.classes[:10] or [""])}))
    return {"table": table, "panels": panels}

@torch.no_grad()
def analyse(name, cfg):
    """Run one of the analyses; write its numbers to analysis_<name>.json, curves to .png, pictures to _images.png."""
    analyses = {f.__name__: f for f in (sensitivity, knockout, spectrum, losses, timebins, latents, tsne)}
    if name not in analyses:
        raise SystemExit(f"analyse {name!r}: wanted one of {', '.join(analyses)}, then a run")
    run, path = load(cfg), Path(cfg.out or cfg.run)
    if name != "losses":
        look(run)
    found = {"settings": run.settings, **analyses[name](run)}
    path.mkdir(parents=True, exist_ok=True)
    print_table(name, found.get("table", {}))
    if "panels" in found:
        plot(found["panels"], path / f"analysis_{name}.png")
    if pictures := found.pop("pictures", None):
        x, labels = torch.cat([p.cpu() for p in pictures.values()]), [row for row, p in pictures.items() for _ in p]
        figures.save_grid(x, path / f"analysis_{name}_images.png", len(run.x[:6]), max(1, 144 // x.shape[-1]), labels)
    runs.write_json(path / f"analysis_{name}.json", found)
    print(f"\nwrote {path}/analysis_{name}*")
    return found

def look(run):
    """Add to the run: held-out x, y and classes, their z_all, and groups {base, detail, the other VAE's detail: latents}."""
    if not run.vae.D:
        raise SystemExit(f"{run.cfg.run}: has no detail channels to look at; wanted a DA-VAE, or a DiT on one")
    dataset, index = held_out(run.cfg, run.config["config"])
    run.x, run.y = map(torch.cat, zip(*data.read(dataset, index)))
    run.zero = (-run.vae.mean / run.vae.std).view(1, -1, 1, 1)             # the raw z_d = 0 of detail dropout, normalised
    vaes = [run.vae] + ([load_davae(run.cfg.other).to(run.device)] if run.cfg.other else [])
    run.z_all, *other = (torch.cat([v.encode(x.to(run.device)).cpu() for x in run.x.split(10)]) for v in vaes)
    run.classes, run.groups = dataset.classes, {"base": run.z_all[:, :run.vae.C], "detail": run.z_all[:, run.vae.C:]}
    run.groups |= {f"detail of {Path(run.cfg.other).name}": z_all[:, run.vae.C:] for z_all in other}

def load(cfg):
    """A run of finetune.py or train_vae.py: checkpoint, config, dit (or None), vae, lpips (or None), rank, world, device.
    And settings: everything that its numbers depend on, as far as it is known by now."""
    (rank, world, device), checkpoint, dit, lpips = ranks.setup(cfg.device), runs.latest_checkpoint(cfg.run), None, None
    config = runs.read_config(checkpoint)
    if config["script"] == "finetune.py":
        dit, vae, _ = weights.load_run(cfg.run, cfg.weights, device)
    else:
        vae = load_davae(cfg.run).to(device, memory_format=LAYOUT[device.type])
    if cfg.perceptual != "none":
        lpips = make_lpips(cfg.perceptual, cfg.lpips_trunk).to(device)
    settings = {**dataclasses.asdict(cfg), "checkpoint": str(checkpoint), "torch": torch.__version__, "processes": world,
                "python": platform.python_version(), "image_size": "whole" if cfg.whole else config["config"]["image_size"],
                "ran_on": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
                **{f"{k}_hash": m and hash_of(m) for k, m in (("vae", vae), ("dit", dit), ("lpips", lpips))}}
    return SimpleNamespace(cfg=cfg, checkpoint=checkpoint, config=config, dit=dit, vae=vae, lpips=lpips, rank=rank, world=world,
                           device=device, settings=settings)

def held_out(cfg, trained_on):
    """(data set, indices): cfg.images that the run was not trained on, at its size, spread evenly; or with --whole, all."""
    if not cfg.data_dir and (cfg.whole or trained_on["data_dir"] != "procedural"):
        raise SystemExit(f"{cfg.run} was trained on {trained_on['data_dir']}: give held-out images with --data_dir=")
    dataset = data.open_dataset(cfg.data_dir or "procedural", trained_on["image_size"], cfg.images, trained_on["seed"] + 1)
    n = len(dataset) if cfg.whole else min(cfg.images, len(dataset))
    return dataset, np.linspace(0, len(dataset) - 1, n).astype(int).tolist()

def main(cfg):
    """Measure, print two tables and add them to metrics.json.  Returns the new entry.  Each rank takes its share of images."""
    run = load(cfg)
    dataset, index = held_out(cfg, run.config["config"])
    batches = (x for x, _ in data.read(dataset, index[run.rank::run.world], cfg.whole * run.vae.f))
    if run.world > min(len(index), cfg.n):
        raise SystemExit(f"{run.world} processes, {len(index)} images, {cfg.n} samples: wanted at least one for each process")
    table, real = reconstruction(run, tqdm(batches, desc=str(run.checkpoint), disable=run.rank > 0, mininterval=1))
    entry = {"settings": run.settings, "reconstruction": table}
    if run.dit is not None and not cfg.whole:
        entry["generation"] = generation(run, real)
    if cfg.keep_reference and run.rank == 0:
        mu, sigma = moments(real)
        np.savez(cfg.keep_reference, mu=mu, sigma=sigma, features=run.settings["features"], count=len(real))
    if run.rank:
        return entry
    print_table(f"held-out images ({cfg.data_dir or 'procedural'})", entry["reconstruction"])
    print_table(f"{cfg.n} samples", entry.get("generation", {}))
    path = Path(cfg.out or Path(cfg.run) / "metrics.json")
    entries = json.loads(path.read_text()) if path.exists() else []
    runs.write_json(path, [e for e in entries if e["settings"] != entry["settings"]] + [entry])
    print(f"\nadded to {path}")
    return entry

def compare(a, b):
    """Print the latest entries of two runs; * marks the better value, where all that it depends on is known and equal.
    The last line has every setting in which the two differ.  Returns the lines."""
    higher = ("psnr", "ssim", "IS", "precision", "recall", "judged sharp", "class recognised", "CLIP")
    rulers = {"psnr": (), "ssim": (), "lpips": ("perceptual", "lpips_hash"), "CLIP": ("clip", "prompts")}
    lines, entries = [f"{'':<52}{a[-14:]:>14}  {b[-14:]:>14}"], []
    for path in (Path(run) / "metrics.json" for run in (a, b)):
        if not path.exists():
            raise SystemExit(f"{path}: not there; make it with: python evaluate.py {path.parent}")
        entries.append(json.loads(path.read_text())[-1])
    def differing(keys):
        pairs = ((k, *(e["settings"].get(k, "unknown") for e in entries)) for k in keys)
        return [f"{k} {x} / {y}" for k, x, y in pairs if x != y or x == "unknown"]
    for section, keys in (("reconstruction", ("image_size", "held_out")), ("generation", ("image_size", "n", "reference"))):
        one, two = ({(row, re.sub(r"FID(@\d+|-50k)", "FID", metric)): value for row, values in e.get(section, {}).items()
                     for metric, value in values.items()} for e in entries)
        for row, metric in (k for k in one if k in two and k[1].endswith((*higher, "lpips", "FD", "FID", "KID"))):
            differ, x, y = differing((*keys, *rulers.get(metric, ("features",)))), one[row, metric], two[row, metric]
            marks = "  " if differ or x == y else "* " if (x > y) == metric.endswith(higher) else " *"
            lines.append(f"{row:<34}{metric:>18}{x:>14.4g}{marks[0]} {y:>14.4g}{marks[1]}"
                         + (f"  not ranked: {', '.join(differ)}" if differ else ""))
    lines.append(f"they differ in: {'; '.join(differing(sorted({k for e in entries for k in e['settings']})))}")
    print(*lines, sep="\n")
    return lines

if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["compare"] and len(sys.argv) == 4:
            compare(*sys.argv[2:])
        elif sys.argv[1:2] == ["analyse"]:
            analyse("".join(sys.argv[2:3]), config.cli(Config, argv=sys.argv[3:]))
        else:
            main(config.cli(Config))
    except ImportError as error:                    # torch-fidelity, transformers, scikit-learn, lpips, matplotlib
        raise SystemExit(f"{error}; install what is missing with: pip install -r requirements.txt") from None
