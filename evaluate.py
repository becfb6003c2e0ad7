"""Measure a run: reconstruction of held-out images, and the distance of its samples from them.

    python evaluate.py out/tiny                                     # a run of finetune.py: both
    python evaluate.py out/photos-vae --data_dir=photos/eval --perceptual=squeeze --lpips_trunk=squeezenet1_1.pth
    python evaluate.py out/imagenet512 --reference=VIRTUAL_imagenet512.npz --inception_weights=inception.pth --n=50000
    python evaluate.py compare out/photos out/other                 # the latest measurements of two runs, side by side
    python evaluate.py analyse sensitivity out/tiny-vae             # one of the paper's figures, and its numbers

Reconstruction has three rows: the base channels alone, doubled; the DA-VAE; and the base VAE on the full-size image, which
takes four times the tokens. Generation sets the samples beside the same latents through the base decoder, doubled (Tab. S2's
upsampling); distances are named for their features. Both are added, with every setting, to <run>/metrics.json. Analyses
(sensitivity, spectrum, timebins, latents) write analysis_<name>.json and PNGs into the run's folder.
"""
import dataclasses
import json
import platform
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import common
import data
import sample
from common import field
from davae import half, load_davae
from train_vae import import_torchvision, make_lpips, psnr, reconstruct


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


# ---------------------------------------------------------------- reconstruction


def ssim(x, y):
    """Structural similarity of each pair, (B, 3, H, W) in [-1, 1], both clamped: (B,).  (Wang et al., 2004.)

    RGB, 11x11 Gaussian window of sigma 1.5 without padding, data range 2, K = (0.01, 0.03).
    """
    x, y = x.clamp(-1, 1).double(), y.clamp(-1, 1).double()
    g = torch.exp(-(torch.arange(11, dtype=x.dtype, device=x.device) - 5) ** 2 / (2 * 1.5**2))
    rows, columns = ((g / g.sum()).view(shape).expand(3, 1, *shape[2:]) for shape in ((1, 1, 11, 1), (1, 1, 1, 11)))

    def blur(image):
        return F.conv2d(F.conv2d(image, rows, groups=3), columns, groups=3)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.mean(dim=(1, 2, 3))


@torch.no_grad()
def image_table(decodings, batches, lpips=None):
    """{row: {psnr, ssim, lpips, images}}, averages over images; decodings(x (B, 3, H, W)) yields (row, what became of x)."""
    parts = {}
    for x in batches:
        for name, y in decodings(x):
            values = [psnr(x, y), ssim(x, y)] + ([lpips(x, y).flatten()] if lpips is not None else [])
            parts.setdefault(name, []).append(torch.stack([v.double().cpu() for v in values]))
    rows = {name: torch.cat(values, dim=1) for name, values in parts.items()}                  # (metrics, images)
    return {name: {**dict(zip(("psnr", "ssim", "lpips"), row.mean(1).tolist())), "images": row.shape[1]}
            for name, row in rows.items()}


def reconstruction(vae, batches, lpips=None):
    """image_table of batches (B, 3, H, W) in [-1, 1] as the VAE gives them back, with the number of latent positions."""
    def decodings(x):
        positions["base VAE, full size"] = tokens = x.shape[2] // vae.base.f * (x.shape[3] // vae.base.f)
        if vae.D:
            positions["base only, doubled"] = positions["DA-VAE"] = tokens // 4
            yield from zip(("base only, doubled", "DA-VAE"), reconstruct(vae, x))
        yield "base VAE, full size", vae.base.decode(vae.base.encode(x)).clamp(-1, 1)

    positions = {}
    table = image_table(decodings, batches, lpips)
    return {name: {**row, "positions": positions[name]} for name, row in table.items()}


# ---------------------------------------------------------------- distances between sets of features


def moments(features):
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), float64."""
    return features.double().mean(0), torch.cov(features.double().T)


def frechet_distance(a, b):
    """Squared Frechet distance of two Gaussians given by their `moments`, in float64.

    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), the last trace from the eigenvalues of a symmetric matrix, so
    that rank-deficient covariances (n < d) stay finite.
    """
    (mu_a, A), (mu_b, B) = a, b
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((mu_a - mu_b).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def kernel_distance(a, b, subsets=100, size=1000, seed=0):
    """KID (Binkowski et al., 2018): unbiased MMD^2, kernel (x.y/d + 1)^3, mean over random subsets of (n, d) features."""
    a, b, d = a.double(), b.double(), a.shape[1]
    m, generator, values = min(size, len(a), len(b)), torch.Generator().manual_seed(seed), []
    for _ in range(subsets):
        x, y = (s[torch.randperm(len(s), generator=generator)[:m]] for s in (a, b))
        xx, yy, xy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        values.append((xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean())
    return torch.stack(values).mean().item()


def inception_metrics(features, logits, real=None):
    """{IS, precision, recall} of Inception features (n, d) and logits by torch-fidelity; the last two need real features."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_part
    values = {"IS": isc_features_to_metric(logits, splits=max(1, len(logits) // 5000))["inception_score_mean"]}
    if real is not None:
        values |= zip(("precision", "recall"), calculate_precision_recall_part(features, real))
    return values


# ---------------------------------------------------------------- features, each named for what it is


class Probe(nn.Module):
    """A small network trained on the procedural images to name the class and to tell whether fine detail is there.

    Features are its 128 pooled activations; returned with the class logits. A ruler for the built-in images and no others.
    """

    def __init__(self, classes=10):
        super().__init__()
        widths = (3, 32, 64, 128)
        self.body = nn.Sequential(*(layer for i, o in zip(widths, widths[1:])
                                    for layer in (nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())))
        self.label, self.sharp = nn.Linear(128, classes), nn.Linear(128, 1)

    def forward(self, x):
        h = self.body(x).mean(dim=(2, 3))
        return h, self.label(h)


def train_probe(path, size, steps=200):
    """The Probe for procedural images of `size` pixels, read from `path` or trained (10 s on 2 cores) and written there."""
    probe = Probe()
    if path.exists():
        probe.load_state_dict(load_file(path))
        return probe.eval()
    torch.manual_seed(0)
    opt = torch.optim.AdamW(probe.parameters(), lr=2e-3)
    stream = data.batches(data.open_dataset("procedural", size, 2048, seed=12345), 32, seed=0)
    for _, (x, y) in zip(tqdm(range(steps), desc="training the probe", mininterval=1), stream):
        x = data.to_tensor(x)
        blurred = F.interpolate(half(x), scale_factor=2.0, mode="bicubic", align_corners=False).clamp(-1, 1)
        h, logits = probe(torch.cat([x, blurred]))
        sharp = torch.cat([torch.ones(len(x)), torch.zeros(len(x))])
        loss = (F.cross_entropy(logits, torch.cat([y, y]))
                + F.binary_cross_entropy_with_logits(probe.sharp(h).squeeze(1), sharp))
        opt.zero_grad()
        loss.backward()
        opt.step()
    save_file(probe.state_dict(), path)
    return probe.eval()


def feature_network(cfg, run, size, procedural, device="cpu"):
    """(name, function (B, 3, H, W) in [-1, 1] -> features (B, d), logits (B, classes)); the name goes before every distance.

    SqueezeNet: the last map, each position scaled to one length as in LPIPS (mean square 1), then averaged; logits (B, 0).
    Inception: torch-fidelity's, pool3 and the logits without bias, of images rounded to uint8.
    """
    kind = cfg.features
    if kind == "auto":
        kind = "inception" if cfg.inception_weights else "squeeze" if cfg.lpips_trunk else "probe" if procedural else "none"
    if kind == "none":
        return None, None
    if kind == "probe":
        if not procedural:
            raise SystemExit("--features=probe knows the procedural images only; give --inception_weights or --lpips_trunk")
        return "Probe", train_probe(Path(run) / "probe.safetensors", size).to(device)
    if kind == "squeeze":
        net = make_lpips("squeeze", cfg.lpips_trunk).to(device)

        def squeeze(x):
            pooled = F.normalize(net.net(net.scaling_layer(x))[-1], dim=1).mean(dim=(2, 3)) * 512**0.5
            return pooled, pooled[:, :0]
        return "SqueezeNet", squeeze
    if kind != "inception" or not cfg.inception_weights:
        raise SystemExit(f"--features={kind!r}: wanted inception (with --inception_weights=), squeeze, probe or none")
    common.read_state_dict(cfg.inception_weights)          # refuses a file that holds code; torch-fidelity would run it
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                      feature_extractor_weights_path=cfg.inception_weights).to(device)
    return "Inception", lambda x: net(torch.as_tensor(data.to_uint8(x)).permute(0, 3, 1, 2).to(x.device))


@torch.no_grad()
def features_of(network, batches, device="cpu"):
    """(features (n, d), logits (n, classes)) of image batches, on the CPU: images are not kept, so any n fits."""
    return [torch.cat(parts) for parts in zip(*([y.cpu() for y in network(x.to(device))] for x in batches))]


def read_reference(path, name, network, device="cpu"):
    """(moments, features or None, count) of guided-diffusion's npz: images `arr_0` (N, H, W, 3) uint8, or `mu` and `sigma`."""
    try:
        with np.load(path) as f:
            arrays = {k: f[k] for k in f.files if k in ("arr_0", "mu", "sigma", "features", "count")}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(f"--reference={path}: not an npz file of arrays ({error})") from None
    if "arr_0" in arrays:
        f, _ = features_of(network, map(data.to_tensor, torch.as_tensor(arrays["arr_0"]).split(50)), device)
        return moments(f), f, len(f)
    if not {"mu", "sigma"} <= set(arrays):
        raise SystemExit(f"--reference={path}: wanted arr_0 (images), or mu and sigma; found {sorted(arrays)} of these")
    if (made_with := str(arrays.get("features", "Inception"))) != name:             # the published files do not say
        raise SystemExit(f"--reference={path}: statistics of {made_with} features; the samples' are of {name}")
    return tuple(torch.as_tensor(arrays[k]).double() for k in ("mu", "sigma")), None, int(arrays.get("count", 0))


def generation(run, real, settings):
    """{row: distances} of n samples, the same latents through the base decoder alone, and round trips; adds to the settings."""
    cfg, vae, device, procedural = run.cfg, run.vae, run.device, run.config["config"]["data_dir"] == "procedural"
    name, network = feature_network(cfg, cfg.run, real.shape[-1], procedural, device)
    if network is None:
        return {}
    if cfg.reference:
        reference, real_features, count = read_reference(cfg.reference, name, network, device)
    else:
        real_features, count = features_of(network, real.split(50), device)[0], len(real)
        reference = moments(real_features)
    if cfg.keep_reference:
        np.savez(cfg.keep_reference, mu=reference[0], sigma=reference[1], features=name, count=count)
    settings.update(features=name, reference=f"{count or ''} images of {cfg.reference or cfg.data_dir or 'procedural'}".strip())
    parts, table, fd = {}, {}, "FD" if name != "Inception" else "FID-50k" if cfg.n >= 50_000 else f"FID@{cfg.n}"

    text = sample.text_of(cfg, run.config, settings, Path(cfg.run), 0, device)
    def look(row, x):
        parts.setdefault(row, []).append(features_of(network, [x], device))

    for k in tqdm(range(0, cfg.n, cfg.batch_size), desc="sampling", mininterval=1):
        full, base = sample.generate(run.dit, vae, range(k, min(k + cfg.batch_size, cfg.n)), settings, text)
        look("samples", full if full.shape[-1] == real.shape[-1] else double(full))
        if run.dit.cfg.D:
            look("same latents, base only, doubled", double(base))
    for x in real.split(10) if run.dit.cfg.D else ():
        look("round trip of the real images", reconstruct(vae, x.to(device))[1])
    for row, pairs in parts.items():
        f, logits = (torch.cat(p) for p in zip(*pairs))
        table[row] = {f"{name}-{fd}": frechet_distance(moments(f), reference)}
        if real_features is not None:
            table[row][f"{name}-KID"] = kernel_distance(f, real_features)
        if name == "Inception":
            table[row].update(inception_metrics(f, logits, real_features))
        if name == "Probe":
            table[row]["judged sharp"] = (network.sharp(f.to(device)) > 0).float().mean().item()
            if row != "round trip of the real images":
                labels = sample.sample_labels(range(cfg.n), settings["classes"])
                table[row]["class recognised"] = (logits.argmax(1) == labels).float().mean().item()
    return table


def double(x):
    return F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=False).clamp(-1, 1)


# ---------------------------------------------------------------- the paper's analyses
# Each takes a run (config, dit or None, vae, device, lpips; held-out x, y, classes, z_all) and returns what it found: "table",
# {row: numbers}; "panels", [(x label, y label, line style, {curve: [x, y]})], lists of numbers; "pictures", {row: images}.


def sensitivity(run):
    """Fig. S2: decoding with the true details, with z_d = 0 as in detail dropout, and with N(0, I) in normalised units."""
    vae = run.vae

    def decodings(x):
        z, z_d = vae.encode(x).split([vae.C, vae.D], dim=1)
        zero = (-vae.mean / vae.std).view(1, -1, 1, 1).expand_as(z_d)           # the raw 0 that dropout shows the decoder
        noise = sample.sample_noise(0, range(len(x)), z_d.shape[1:]).to(x.device)
        for row, details in (("full details", z_d), ("zero details", zero), ("random details", noise)):
            yield row, vae.decode(torch.cat([z, details], dim=1)).clamp(-1, 1)

    table = image_table(decodings, (x.to(run.device) for x in run.x.split(10)), run.lpips)
    return {"table": table, "pictures": {"input": run.x[:6], **dict(decodings(run.x[:6].to(run.device)))}}


def radial_power(z):
    """(frequencies [cycles per latent pixel], power), each (bins,): radially averaged spectrum of latents (N, K, h, w).

    Each image's channel loses its mean; each channel's power, averaged over images, is normalised to a mean of 1 over the
    frequencies left (white noise is 1 everywhere); then rings of width 1 / min(h, w), up to 1/2, and channels are averaged.
    """
    (h, w), z = z.shape[2:], z.double()
    power = torch.fft.fft2(z - z.mean((2, 3), keepdim=True)).abs().square().mean(0)            # (K, h, w)
    power = power / power.sum((1, 2), keepdim=True).clamp_min(1e-30) * (h * w - 1)
    radius = torch.hypot(torch.fft.fftfreq(h).view(-1, 1), torch.fft.fftfreq(w).view(1, -1))
    ring, bins = (radius * min(h, w)).round(), torch.arange(1, min(h, w) // 2 + 1)
    return bins / min(h, w), torch.stack([power[:, ring == k].mean() for k in bins])


def spectrum(run):
    """Fig. S5: power of base and detail latents against spatial frequency, see `radial_power`."""
    z, z_d = run.z_all.split([run.vae.C, run.vae.D], dim=1)
    return {"panels": [("spatial frequency [cycles per latent pixel]", "power (1: the mean over frequencies)", "o-",
                        {k: [v.tolist() for v in radial_power(x)] for k, x in (("base", z), ("detail", z_d))})]}


def loss_by_time(model, z_all, cond, C, bins=10, seed=0):
    """(bins, 2): mean (v - v*)^2 on base and detail channels for t uniform in each bin, each latent once in each.

    model, z_all (N, C+D, h, w), cond: as `finetune.flow_loss` takes them.
    """
    table, generator = [], torch.Generator().manual_seed(seed)
    for k in range(bins):
        t = ((k + torch.rand(len(z_all), generator=generator)) / bins).to(z_all.device)
        noise, s = torch.randn(z_all.shape, generator=generator).to(z_all.device), t.view(-1, 1, 1, 1)
        inputs = zip(*(part.split(50) for part in (s * z_all + (1 - s) * noise, t, *cond)))
        error = (torch.cat([model(*parts).float() for parts in inputs]) - (z_all - noise)).square()
        table.append(torch.stack([error[:, :C].mean(), error[:, C:].mean()]))
    return torch.stack(table)


def timebins(run):
    """Loss by time and channel group on held-out latents, with their own labels."""
    if run.dit is None or "context" in run.config["model"] or run.classes != run.config["classes"]:
        raise SystemExit(f"{run.cfg.run}: wanted a class-conditional run of finetune.py, and held-out images of its classes")
    table = loss_by_time(run.dit, run.z_all.to(run.device), [run.y.to(run.device)], run.vae.C).T.tolist()
    curves = {k: [[(2 * i + 1) / 20 for i in range(10)], values] for k, values in zip(("base", "detail"), table)}
    return {"panels": [("time t, bins of 0.1 (0: noise, 1: data)", "mean (v - v*)^2", "o-", curves)]}


def latents(run):
    """Fig. 3: the first three principal components of base and of detail latents as RGB beside the images."""
    pictures = {"input": run.x[:6]}
    for name, z in zip(("base", "detail"), run.z_all.split([run.vae.C, run.vae.D], dim=1)):
        x = z.movedim(1, 3).double() - z.mean((0, 2, 3))                        # (N, h, w, channels)
        rgb = x @ torch.linalg.eigh(torch.cov(x.flatten(0, 2).T))[1][:, -3:].flip(1)        # shown up to 2 sigma
        pictures[f"{name}, PCA"] = F.interpolate((rgb / rgb.std((0, 1, 2)) / 2).movedim(3, 1)[:6].float(), run.x.shape[2:])
    return {"pictures": pictures}


def plot(panels, path):
    """One PNG, 900 pixels wide, of the panels that an analysis returns, which share a legend; power on a logarithmic scale."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 4.2), dpi=100, layout="constrained", squeeze=False)
    for axis, (xlabel, ylabel, style, curves) in zip(axes[0], panels):
        for name, (x, y) in curves.items():
            axis.plot(x, y, style, label=name)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if ylabel.startswith("power") else "linear")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path)
    plt.close(figure)


@torch.no_grad()
def analyse(name, cfg):
    """Run one of the analyses; write its numbers to analysis_<name>.json, curves to .png, pictures to _images.png."""
    analyses = {f.__name__: f for f in (sensitivity, spectrum, timebins, latents)}
    if name not in analyses:
        raise SystemExit(f"analyse {name!r}: wanted one of {', '.join(analyses)}, then a run")
    run, path = load(cfg), Path(cfg.out or cfg.run)
    if not run.vae.D:
        raise SystemExit(f"{cfg.run}: has no detail channels to look at; wanted a DA-VAE, or a DiT on one")
    run.x, run.y, run.classes = held_out(cfg, run.config["config"])
    run.z_all = torch.cat([run.vae.encode(x.to(run.device)).cpu() for x in run.x.split(10)])
    settings = {**dataclasses.asdict(cfg), "checkpoint": str(run.checkpoint), "images": len(run.x)}
    found = {"settings": settings, **analyses[name](run)}
    path.mkdir(parents=True, exist_ok=True)
    if "table" in found:
        print_table(name, found["table"])
    if "panels" in found:
        plot(found["panels"], path / f"analysis_{name}.png")
    if pictures := found.pop("pictures", None):
        x, labels = torch.cat([p.cpu() for p in pictures.values()]), [row for row, p in pictures.items() for _ in p]
        data.save_grid(x, path / f"analysis_{name}_images.png", len(run.x[:6]), max(1, 144 // x.shape[-1]), labels)
    common.write_json(path / f"analysis_{name}.json", found)
    print(f"\nwrote {path}/analysis_{name}*")
    return found


# ---------------------------------------------------------------- the script


def load(cfg):
    """A run of finetune.py or train_vae.py: its checkpoint, config, dit (or None) and vae; and the device and LPIPS to use."""
    device, checkpoint = common.setup(cfg.device)[2], common.latest_checkpoint(cfg.run)
    config, dit, vae = common.read_config(checkpoint), None, None
    if config["script"] == "finetune.py":
        dit, vae, _ = sample.load_run(cfg.run, cfg.weights, device)
    lpips = make_lpips(cfg.perceptual, cfg.lpips_trunk).to(device) if cfg.perceptual != "none" else None
    return SimpleNamespace(cfg=cfg, checkpoint=checkpoint, config=config, dit=dit, vae=vae or load_davae(cfg.run).to(device),
                           device=device, lpips=lpips)


def held_out(cfg, trained_on):
    """(images (N, 3, H, W) in [-1, 1], labels (N,), class names): cfg.images that the run was not trained on, at its size."""
    if not cfg.data_dir and trained_on["data_dir"] != "procedural":
        raise SystemExit(f"{cfg.run} was trained on {trained_on['data_dir']}: give held-out images with --data_dir=")
    dataset = data.open_dataset(cfg.data_dir or "procedural", trained_on["image_size"], cfg.images, trained_on["seed"] + 1)
    x, y = data.stack(dataset, torch.linspace(0, len(dataset) - 1, min(cfg.images, len(dataset))).long().tolist())
    return data.to_tensor(x), y, dataset.classes


def whole_images(folder, f):
    """Every image of a folder at its own size, cropped to multiples of f: (1, 3, H, W) in [-1, 1] each."""
    for path in data.ImageFolder(folder, 0).paths:
        x = data.to_tensor(np.array(data.load_image(path))[None])
        H, W = (side // f * f for side in x.shape[2:])
        top, left = (x.shape[2] - H) // 2, (x.shape[3] - W) // 2
        yield x[:, :, top:top + H, left:left + W]


def print_table(title, table):
    columns = sorted({c for row in table.values() for c in row})
    print(f"\n{title:<34}" + "".join(f"{c:>18}" for c in columns))
    for name, row in table.items():
        print(f"{name:<34}" + "".join(f"{row[c]:>18.4g}" if c in row else " " * 18 for c in columns))


def main(cfg):
    """Measure, print two tables and add them to metrics.json.  Returns the new entry."""
    run = load(cfg)
    if cfg.whole and not cfg.data_dir:
        raise SystemExit("--whole=True needs a folder of images: give --data_dir=")
    real = None if cfg.whole else held_out(cfg, run.config["config"])[0]
    batches = whole_images(cfg.data_dir, run.vae.f) if cfg.whole else real.split(10)
    batches = (x.to(run.device) for x in tqdm(batches, desc=f"reconstructing with {run.checkpoint}", mininterval=1))

    settings = {**dataclasses.asdict(cfg), "checkpoint": str(run.checkpoint), "torch": torch.__version__,
                "python": platform.python_version(), "image_size": "whole" if cfg.whole else run.config["config"]["image_size"]}
    entry = {"settings": settings, "reconstruction": reconstruction(run.vae, batches, run.lpips)}
    print_table(f"held-out images ({cfg.data_dir or 'procedural'})", entry["reconstruction"])
    if run.dit is not None and not cfg.whole:
        settings.update(sample.settings_of(cfg, run.config, run.checkpoint))
        entry["generation"] = generation(run, real, settings)
        print_table(f"{cfg.n} samples", entry["generation"])

    path = Path(cfg.out or Path(cfg.run) / "metrics.json")
    entries = json.loads(path.read_text()) if path.exists() else []
    common.write_json(path, [e for e in entries if e["settings"] != entry["settings"]] + [entry])
    print(f"\nadded to {path}")
    return entry


def compare(a, b):
    """Print the latest entries of two runs; * marks the better value, where all that it depends on is equal.  Returns lines."""
    higher = ("psnr", "ssim", "IS", "precision", "recall", "judged sharp", "class recognised")
    depends_on = {"reconstruction": ("data_dir", "images"), "generation": ("n", "features", "reference")}   # and image_size
    lines, entries = [f"{'':<52}{a[-14:]:>14}  {b[-14:]:>14}"], []
    for path in (Path(run) / "metrics.json" for run in (a, b)):
        if not path.exists():
            raise SystemExit(f"{path}: not there; make it with: python evaluate.py {path.parent}")
        entries.append(json.loads(path.read_text())[-1])
    for section, keys in depends_on.items():
        one, two = ({(row, re.sub(r"FID(@\d+|-50k)", "FID", metric)): value for row, values in e.get(section, {}).items()
                     for metric, value in values.items()} for e in entries)
        for row, metric in (k for k in one if k in two and k[1].endswith((*higher, "lpips", "FD", "FID", "KID"))):
            used = ("image_size", *keys) + ("perceptual",) * (metric == "lpips") + ("images",) * row.startswith("round trip")
            pairs = [(k, *(e["settings"].get(k) for e in entries)) for k in used]
            differ = [f"{k} {x} / {y}" for k, x, y in pairs if x != y]
            x, y = one[row, metric], two[row, metric]
            marks = "  " if differ or x == y else "* " if (x > y) == metric.endswith(higher) else " *"
            lines.append(f"{row:<34}{metric:>18}{x:>14.4g}{marks[0]} {y:>14.4g}{marks[1]}"
                         + (f"  not ranked: {', '.join(differ)}" if differ else ""))
    print(*lines, sep="\n")
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"] and len(sys.argv) == 4:
        compare(*sys.argv[2:])
    elif sys.argv[1:2] == ["analyse"]:
        analyse("".join(sys.argv[2:3]), common.cli(Config, argv=sys.argv[3:]))
    else:
        main(common.cli(Config))
