"""Measure a run: reconstruction of held-out images, and the distance of its samples from them.

    python evaluate.py out/tiny                                     # a run of finetune.py: both
    python evaluate.py out/photos-vae --data_dir=photos/eval --perceptual=squeeze --lpips_trunk=squeezenet1_1.pth
    python evaluate.py out/imagenet512 --data_dir=val --features=inception --inception_weights=inception.pth --n=50000

Reconstruction has three rows: the base channels alone, doubled; the DA-VAE; and the base VAE on the full-size image, which
takes four times the tokens. Distances are named for the features they were computed on. Everything, with every setting,
is added to <run>/metrics.json.
"""
import dataclasses
import json
import platform
from dataclasses import dataclass
from pathlib import Path

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
    out: str = field("", "the JSON file; empty: <run>/metrics.json")
    n: int = field(1000, "samples to draw, for a run of finetune.py")
    data_dir: str = field("", "held-out images; empty: procedural ones of another seed, if the run was trained on such")
    images: int = field(1000, "held-out images to use, spread evenly over the folder")
    whole: bool = field(False, "reconstruct the images of data_dir at their own sizes, and nothing else")
    perceptual: str = field("none", "LPIPS network as a metric: vgg, squeeze or none")
    lpips_trunk: str = field("", "local weight file of that network; also the trunk of --features=squeeze")
    features: str = field("auto", "inception, squeeze, probe or none; auto: what the other flags and the data allow")
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
def reconstruction(vae, batches, lpips=None):
    """{row: {psnr, ssim, lpips, images, latent positions}}, averages over images of batches (B, 3, H, W) in [-1, 1]."""
    sums = {}
    for x in batches:
        base, full = reconstruct(vae, x)
        rows = {"base VAE, full size": vae.base.decode(vae.base.encode(x)).clamp(-1, 1)}
        if vae.D:
            rows = {"base only, doubled": base, "DA-VAE": full, **rows}
        for name, y in rows.items():
            values = {"psnr": psnr(x, y), "ssim": ssim(x, y)}
            if lpips is not None:
                values["lpips"] = lpips(x, y).flatten()
            for metric, v in values.items():
                sums.setdefault(name, {}).setdefault(metric, []).append(v.double().cpu())
        positions = x.shape[2] // vae.f * (x.shape[3] // vae.f)
    table = {name: {metric: torch.cat(v).mean().item() for metric, v in row.items()} for name, row in sums.items()}
    for name, row in table.items():
        row["images"] = sum(map(len, sums[name]["psnr"]))
        row["positions"] = positions * (4 if vae.D and name == "base VAE, full size" else 1)
    return table


# ---------------------------------------------------------------- distances between sets of features


def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians fitted to two feature sets (n, d), in float64.

    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), the last trace from the eigenvalues of a symmetric matrix, so
    that rank-deficient covariances (n < d) stay finite. Covariances are unbiased.
    """
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def kernel_distance(a, b, subsets=100, size=1000, seed=0):
    """KID (Binkowski et al., 2018): unbiased MMD^2, kernel (x.y/d + 1)^3, mean over random subsets of (n, d) features."""
    a, b, d = a.double(), b.double(), a.shape[1]
    m, generator, values = min(size, len(a), len(b)), torch.Generator().manual_seed(seed), []

    def kernel(x, y):
        return (x @ y.T / d + 1) ** 3

    for _ in range(subsets):
        x, y = (s[torch.randperm(len(s), generator=generator)[:m]] for s in (a, b))
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        values.append((xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean())
    return torch.stack(values).mean().item()


# ---------------------------------------------------------------- features, each named for what it is


class Probe(nn.Module):
    """A small network trained on the procedural images to name the class and to tell whether fine detail is there.

    Features are its 128 pooled activations. An honest ruler for the built-in images, and for nothing else.
    """

    def __init__(self, classes=10):
        super().__init__()
        widths = (3, 32, 64, 128)
        self.body = nn.Sequential(*(layer for i, o in zip(widths, widths[1:])
                                    for layer in (nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())))
        self.label, self.sharp = nn.Linear(128, classes), nn.Linear(128, 1)

    def forward(self, x):
        return self.body(x).mean(dim=(2, 3))


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
        h = probe(torch.cat([x, blurred]))
        sharp = torch.cat([torch.ones(len(x)), torch.zeros(len(x))])
        loss = (F.cross_entropy(probe.label(h), torch.cat([y, y]))
                + F.binary_cross_entropy_with_logits(probe.sharp(h).squeeze(1), sharp))
        opt.zero_grad()
        loss.backward()
        opt.step()
    save_file(probe.state_dict(), path)
    return probe.eval()


def feature_network(cfg, run, size, procedural):
    """(name, function (B, 3, H, W) in [-1, 1] -> (B, d)); the name goes before every distance computed with it."""
    kind = cfg.features
    if kind == "auto":
        kind = "inception" if cfg.inception_weights else "squeeze" if cfg.lpips_trunk else "probe" if procedural else "none"
    if kind == "none":
        return None, None
    if kind == "probe":
        if not procedural:
            raise SystemExit("--features=probe knows the procedural images only; give --inception_weights or --lpips_trunk")
        probe = train_probe(Path(run) / "probe.safetensors", size)
        return "Probe", probe
    if kind == "squeeze":
        net = make_lpips("squeeze", cfg.lpips_trunk)
        return "SqueezeNet", lambda x: net.net(net.scaling_layer(x))[-1].mean(dim=(2, 3))
    if kind != "inception" or not cfg.inception_weights:
        raise SystemExit(f"--features={kind!r}: wanted inception (with --inception_weights=), squeeze, probe or none")
    common.read_state_dict(cfg.inception_weights)          # refuses a file that holds code; torch-fidelity would run it
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=cfg.inception_weights)
    return "Inception", lambda x: net(torch.as_tensor(data.to_uint8(x)).permute(0, 3, 1, 2))[0]


@torch.no_grad()
def features_of(network, images, batch=100):
    return torch.cat([network(x) for x in images.split(batch)])


def generation(dit, vae, real, cfg, config, settings):
    """{row: distances} of n samples, of the same latents through the base decoder alone, and of the VAE's round trip."""
    name, network = feature_network(cfg, cfg.run, real.shape[-1], config["config"]["data_dir"] == "procedural")
    if network is None:
        return {}
    pairs = [sample.generate(dit, vae, range(k, min(k + cfg.batch_size, cfg.n)), settings)
             for k in tqdm(range(0, cfg.n, cfg.batch_size), desc="sampling", mininterval=1)]
    full, base = (torch.cat(p).cpu() for p in zip(*pairs))
    rows = {"samples": full}
    if dit.cfg.D:
        rows["same latents, base only, doubled"] = double(base)
        rows["round trip of the real images"] = torch.cat([reconstruct(vae, x)[1] for x in real.split(10)])
    elif full.shape[-1] < real.shape[-1]:
        rows["samples"] = double(full)
    reference, table = features_of(network, real), {}
    labels = sample.sample_labels(range(cfg.n), settings["classes"])
    fd = "FD" if name != "Inception" else "FID-50k" if cfg.n >= 50_000 else f"FID@{cfg.n}"
    for row, x in rows.items():
        f = features_of(network, x)
        table[row] = {f"{name}-{fd}": frechet_distance(f, reference), f"{name}-KID": kernel_distance(f, reference)}
        if name == "Probe":
            table[row]["judged sharp"] = (network.sharp(f) > 0).float().mean().item()
            if len(x) == cfg.n and row != "round trip of the real images":
                table[row]["class recognised"] = (network.label(f).argmax(1) == labels).float().mean().item()
    return table


def double(x):
    return F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=False).clamp(-1, 1)


# ---------------------------------------------------------------- the script


def held_out(cfg, trained_on, size):
    """(N, 3, H, W) in [-1, 1]: cfg.images images that the run was not trained on."""
    if not cfg.data_dir and trained_on["data_dir"] != "procedural":
        raise SystemExit(f"{cfg.run} was trained on {trained_on['data_dir']}: give held-out images with --data_dir=")
    dataset = data.open_dataset(cfg.data_dir or "procedural", size, cfg.images, trained_on["seed"] + 1)
    index = torch.linspace(0, len(dataset) - 1, min(cfg.images, len(dataset))).long().tolist()
    return data.to_tensor(data.stack(dataset, index)[0])


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
    _, _, device = common.setup(cfg.device)
    checkpoint = common.latest_checkpoint(cfg.run)
    config = common.read_config(checkpoint)
    trained_on = config["config"]
    if config["script"] == "finetune.py":
        dit, vae, _ = sample.load_run(cfg.run, cfg.weights, device)
    else:
        dit, vae = None, load_davae(cfg.run).to(device)
    if cfg.whole and not cfg.data_dir:
        raise SystemExit("--whole=True needs a folder of images: give --data_dir=")
    real = None if cfg.whole else held_out(cfg, trained_on, trained_on["image_size"])
    batches = whole_images(cfg.data_dir, vae.f) if cfg.whole else real.split(10)
    lpips = make_lpips(cfg.perceptual, cfg.lpips_trunk).to(device) if cfg.perceptual != "none" else None

    settings = {**dataclasses.asdict(cfg), "checkpoint": str(checkpoint), "torch": torch.__version__,
                "python": platform.python_version(), "image_size": "whole" if cfg.whole else trained_on["image_size"]}
    entry = {"settings": settings}
    batches = (x.to(device) for x in tqdm(batches, desc=f"reconstructing with {checkpoint}", mininterval=1))
    entry["reconstruction"] = reconstruction(vae, batches, lpips)
    print_table(f"held-out images ({cfg.data_dir or 'procedural'})", entry["reconstruction"])
    if dit is not None and not cfg.whole:
        settings.update(sample.settings_of(cfg, config, checkpoint))
        entry["generation"] = generation(dit, vae, real, cfg, config, settings)
        print_table(f"{cfg.n} samples", entry["generation"])

    path = Path(cfg.out or Path(cfg.run) / "metrics.json")
    entries = json.loads(path.read_text()) if path.exists() else []
    common.write_json(path, [e for e in entries if e["settings"] != entry["settings"]] + [entry])
    print(f"\nadded to {path}")
    return entry


if __name__ == "__main__":
    main(common.cli(Config))
