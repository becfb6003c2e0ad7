"""metrics"""
import sys
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from davae import half
from support import data, runs
from support.fit import ridge
from support.runs import hash_of


def import_torchvision():
    """Import torchvision even where its wheel was built for CUDA and torch was not.

    Its import then asks for the schemas of two compiled operators that were never registered, and fails; declaring
    the schemas is enough, because nothing here calls them. Call this before anything that imports torchvision.
    """
    try:
        import torchvision
    except RuntimeError:                     # "operator torchvision::nms does not exist"
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _library[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


_library = []                                # it unregisters what it declared when it is collected, so it is kept


def make_lpips(net, trunk=""):
    """LPIPS (Zhang et al., 2018) by the lpips package, frozen, in eval mode; takes (B, 3, H, W) in [-1, 1].

    net: vgg or squeeze.   trunk: a local weight file of that network; empty: torchvision's cache or download.
    Differs from the authors' code: theirs trains with the Dropout of LPIPS active, by accident.
    """
    import_torchvision()
    import lpips
    if net not in ("vgg", "squeeze"):
        raise SystemExit(f"--perceptual={net!r}: wanted vgg, squeeze or none")
    try:
        model = lpips.LPIPS(net=net, pnet_rand=bool(trunk), verbose=False)
    except (urllib.error.URLError, OSError) as error:
        raise SystemExit(f"LPIPS({net}) needs torchvision's weights and cannot fetch them ({error}): give the file with "
                         "--lpips_trunk=, or --perceptual=none") from None
    if trunk:
        loaded = {k.removeprefix("features."): v for k, v in runs.read_state_dict(trunk).items() if "classifier" not in k}
        for name, part in model.net.named_children():        # slice1, slice2, ...: each holds layers by their old numbers
            part.load_state_dict({k: v for k, v in loaded.items() if k.split(".")[0] in dict(part.named_children())})
    return model.eval().requires_grad_(False)


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of each pair, (B, 3, H, W) in [-1, 1], both clamped: (B,)."""
    mse = ((x.clamp(-1, 1) - y.clamp(-1, 1)) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-12))


def doubled(base):
    """The baselines without details, {row: (B, 3, H, W)} of half-size images: Tab. S2's bilinear upsampling, and bicubic."""
    return {f"base only, {mode}": F.interpolate(base, scale_factor=2.0, mode=mode, align_corners=False).clamp(-1, 1)
            for mode in ("bilinear", "bicubic")}


def ssim(x, y):
    """Structural similarity of each pair, (B, 3, H, W) in [-1, 1], both clamped: (B,).  (Wang et al., 2004.)
    RGB, 11x11 Gaussian window of sigma 1.5 without padding, data range 2, K = (0.01, 0.03)."""
    x, y = x.clamp(-1, 1).double(), y.clamp(-1, 1).double()
    g = F.normalize(torch.exp(-(torch.arange(11, dtype=x.dtype, device=x.device) - 5) ** 2 / (2 * 1.5**2)), p=1, dim=0)
    maps = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1).unsqueeze(1)                    # (15B, 1, H, W)
    mx, my, xx, yy, xy = F.conv2d(F.conv2d(maps, g.view(1, 1, 1, 11)), g.view(1, 1, 11, 1)).unflatten(0, (5, *x.shape[:2]))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    value = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))
    return value.mean(dim=(1, 2, 3, 4))


def moments(features):
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), float64."""
    return features.double().mean(0), torch.cov(features.double().T)


def frechet_distance(a, b):
    """Squared Frechet distance of two Gaussians given by their `moments`, in float64.
    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), the last trace from the eigenvalues of a symmetric matrix, so
    that rank-deficient covariances (n < d) stay finite."""
    (mu_a, A), (mu_b, B) = a, b
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((mu_a - mu_b).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def distances(name, f, reference, logits=None, real=None):
    """{metric: value} of features f (n, d) against the moments `reference`, and where they are known, the features `real`.
    Only Inception's distance is called FID, and FID-50k only from 50,000 images on. The others are torch-fidelity's."""
    fd = "FD" if name != "Inception" else "FID-50k" if len(f) >= 50_000 else f"FID@{len(f)}"
    values = {f"{name}-{fd}": frechet_distance(moments(f), reference)}
    if real is not None:
        from torch_fidelity.metric_kid import kid_features_to_metric
        kid = kid_features_to_metric(f, real, kid_subset_size=min(1000, len(f), len(real)), verbose=False)
        values[f"{name}-KID"] = kid["kernel_inception_distance_mean"]
    if name == "Inception" and logits is not None:
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_prc import calculate_precision_recall_part
        values["IS"] = isc_features_to_metric(logits, splits=max(1, len(logits) // 5000))["inception_score_mean"]
        values |= zip(("precision", "recall"), calculate_precision_recall_part(f, real)) if real is not None else ()
    return values


def make_probe(size):
    """A ruler for the procedural images, and for no others: 128 pooled activations of random convolutions (fixed seed), then
    a layer found by least squares: eleven logits, the ten classes and whether fine detail is there (> 0)."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in ((3, 32), (32, 64), (64, 128))]
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight)
    layers = [m for conv in convs for m in (conv, nn.ReLU())]
    probe = nn.Sequential(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(128, 11))
    x, y = map(torch.cat, zip(*data.read(data.open_dataset("procedural", size, 1000, seed=12345), range(1000))))
    wanted, pairs = 2 * F.one_hot(y, 11).double() - 1, []
    for images, sharp in ((x, 1), (doubled(half(x))["base only, bicubic"], -1)):
        f = torch.cat([probe[0](part) for part in images.split(100)]).double()
        pairs.append((F.pad(f, (0, 1), value=1.0), wanted.index_fill(1, torch.tensor(10), sharp)))
    W = ridge(pairs, 1e-6).float()                                                              # (128 + 1, 11)
    probe[1].weight.copy_(W[:-1].T), probe[1].bias.copy_(W[-1])
    return probe


@torch.no_grad()
def feature_network(run):
    """(name, function (B, 3, H, W) in [-1, 1] -> features (B, d), logits (B, classes); the name with its weights' hash).
    SqueezeNet: the last map, each position scaled to one length as in LPIPS (mean square 1), then averaged; logits (B, 0).
    Inception: torch-fidelity's, pool3 and the logits without bias, of images rounded to uint8. No name: both (B, 0)."""
    import_torchvision()                                   # for whichever of lpips, torch-fidelity, transformers is used
    cfg, own, kind = run.cfg, run.config["config"], "none" if run.cfg.whole else run.cfg.features
    if kind == "auto":
        kind = ("inception" if cfg.inception_weights else "squeeze" if cfg.lpips_trunk
                else "probe" if own["data_dir"] == "procedural" else "none")
    if kind == "none":
        return "", lambda x: (x.new_empty(len(x), 0),) * 2, ""
    if kind == "probe" and own["data_dir"] == "procedural":
        name, net = "Probe", make_probe(own["image_size"]).to(run.device)
        network = lambda x: (f := net[0](x), net[1](f))                                         # noqa: E731
    elif kind == "squeeze":
        name, net = "SqueezeNet", make_lpips("squeeze", cfg.lpips_trunk).to(run.device)
        pooled = lambda x: F.normalize(net.net(net.scaling_layer(x))[-1], dim=1).mean((2, 3)) * 512**0.5     # noqa: E731
        network = lambda x: (f := pooled(x), f[:, :0])                                          # noqa: E731
    elif kind == "inception" and cfg.inception_weights:
        runs.read_state_dict(cfg.inception_weights)      # refuses a file that holds code; torch-fidelity would run it
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        name, outputs = "Inception", ["2048", "logits_unbiased"]
        net = FeatureExtractorInceptionV3("inception-v3-compat", outputs, cfg.inception_weights).to(run.device)
        network = lambda x: net(torch.as_tensor(data.to_uint8(x)).permute(0, 3, 1, 2).to(run.device))        # noqa: E731
    else:
        raise SystemExit(f"--features={kind}, on {own['data_dir']}: wanted inception (with --inception_weights=), squeeze, "
                         "none, or probe, which knows the procedural images only")
    return name, network, f"{name}, sha256 {hash_of(net)}"


def clip_scorer(folder, device):
    """(function (images (B, 3, H, W) in [-1, 1], B texts) -> (B,), hash of the model): 100 max(cos, 0) of CLIP's embeddings.
    (Hessel et al., 2021.)   folder: a CLIPModel and its processor, as transformers saves them."""
    if not (Path(folder) / "config.json").exists():
        raise SystemExit(f"--clip={folder}: wanted a local folder of a CLIP model: config.json, weights, tokenizer, processor")
    from transformers import CLIPModel, CLIPProcessor
    processor, model = CLIPProcessor.from_pretrained(folder), CLIPModel.from_pretrained(folder).to(device).eval()

    def score(x, texts):
        inputs = processor(text=texts, images=list(data.to_uint8(x)), return_tensors="pt", padding=True, truncation=True)
        found = model(**inputs.to(device))                                      # embeddings of length 1
        return 100 * (found.image_embeds * found.text_embeds).sum(1).clamp_min(0)
    return score, hash_of(model)


def read_reference(path, features, network, device="cpu"):
    """(moments, features or None, what it is) of guided-diffusion's npz: images `arr_0` (N, H, W, 3), or `mu` and `sigma`.
    features: the network's name and hash; statistics must be of the same, and are of Inception if they do not say."""
    try:
        with np.load(path) as f:
            arrays = {k: f[k] for k in f.files if k in ("arr_0", "mu", "sigma", "features", "count")}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(f"--reference={path}: not an npz file of arrays ({error})") from None
    images, made_with = arrays.get("arr_0", ()), str(arrays.get("features", "Inception"))
    named = f"{len(images) or arrays.get('count', '?')} images, sha256 {hash_of(Path(path).read_bytes())}"
    if len(images):
        real = torch.cat([network(data.to_tensor(part).to(device))[0].cpu() for part in torch.as_tensor(images).split(50)])
        return moments(real), real, named
    if not {"mu", "sigma"} <= set(arrays) or not features.startswith(made_with):
        raise SystemExit(f"--reference={path}: wanted arr_0 (images), or mu and sigma, of {features} features; found "
                         f"{sorted(arrays)}, {made_with}")
    return tuple(torch.as_tensor(arrays[k]).double() for k in ("mu", "sigma")), None, named
