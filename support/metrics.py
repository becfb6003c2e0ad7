"""Image metrics: PSNR, SSIM, LPIPS; Frechet and kernel distances of features; the CLIP score.

    images         psnr, ssim, make_lpips, and `upsampled`, the baselines without details
    sets of them   feature_network (Inception, SqueezeNet, a probe for the built-in drawings), distances
    prompts        clip_scorer

Images are (B, 3, H, W), RGB, in [-1, 1]. Only the instructive parts are hand-written: SSIM, the Frechet
distance, the probe. Inception, KID, IS, precision and recall are torch-fidelity's, LPIPS is the lpips
package's, CLIP is transformers'. Not run with the published weights of Inception and CLIP.
"""
import math
import sys
import urllib.error
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError

from support import data, files, hub, ranks, runs
from support.fit import ridge
from support.runs import hash_of


def import_torchvision():
    """Import torchvision even if its wheel was built for CUDA and torch's was not.

    Its import then asks for the schemas of two compiled operators that were never registered, and fails.
    Declaring the schemas is enough, because nothing here calls them. Call this before any import of lpips,
    torch-fidelity or transformers, which import torchvision themselves.
    """
    try:
        import torchvision
    except RuntimeError:                     # "operator torchvision::nms does not exist"
        for name in list(sys.modules):
            if name.split(".")[0] == "torchvision":
                del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        import torchvision
    return torchvision


_kept = []                                   # when garbage-collected, a library unregisters its declarations


# ---------------------------------------------------------------- two images


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of each pair, (B, 3, H, W) in [-1, 1], both clamped: (B,)."""
    error = (x.clamp(-1, 1) - y.clamp(-1, 1)) / 2              # of images in [0, 1], whose peak is 1
    mse = error.square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-12))


def ssim(x, y):
    """Structural similarity of each pair, (B, 3, H, W) in [-1, 1], both clamped: (B,), float64.

    Wang et al. (2004): on RGB, 11x11 Gaussian window of sigma 1.5 without padding, data range 2,
    K = (0.01, 0.03).
    """
    return torch.stack([ssim_of_a_pair(*pair) for pair in zip(x, y, strict=True)])


def ssim_of_a_pair(x, y):
    """() for two images (3, H, W); one pair at a time, so that the maps stay in a CPU's cache."""
    x = x.clamp(-1, 1).double()              # in float32, E[x^2] - E[x]^2 of a flat area is rounding error
    y = y.clamp(-1, 1).double()
    mx, my, xx, yy, xy = local_means(torch.stack([x, y, x * x, y * y, x * y]))      # each (3, H-10, W-10)

    c1 = (0.01 * 2) ** 2
    c2 = (0.03 * 2) ** 2
    alike = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    scale = (mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)
    return (alike / scale).mean()


def local_means(maps):
    """Means of maps (..., H, W) under the Gaussian window -> (..., H-10, W-10).

    One dimension at a time, as a sum of eleven shifted maps: CPUs have no fast float64 convolution.
    """
    window = [math.exp(-offset**2 / (2 * 1.5**2)) for offset in range(-5, 6)]
    for dim in (-2, -1):
        size = maps.shape[dim] - 10
        total = torch.zeros_like(maps.narrow(dim, 0, size))
        for i, weight in enumerate(window):
            total.add_(maps.narrow(dim, i, size), alpha=weight / sum(window))
        maps = total
    return maps


def make_lpips(net, trunk=""):
    """LPIPS (Zhang et al., 2018) from the lpips package, frozen, in eval mode.

    It takes two batches (B, 3, H, W) in [-1, 1] and returns (B, 1, 1, 1).
    net: vgg or squeeze.   trunk: a local weight file of that network; empty: torchvision's cache or download.
    Differs from the authors' code: theirs trains with the Dropout of LPIPS active, by accident.
    raises: SystemExit if there is no such network, or its weights cannot be obtained.
    """
    if net not in ("vgg", "squeeze"):
        raise SystemExit(f"--perceptual={net!r}: wanted vgg, squeeze or none")
    import_torchvision()
    import lpips
    try:
        with warnings.catch_warnings():                  # lpips uses torchvision's deprecated arguments
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            model = lpips.LPIPS(net=net, pnet_rand=bool(trunk), verbose=False)
    except (urllib.error.URLError, OSError) as error:
        raise SystemExit(f"LPIPS({net}) needs torchvision's weights of that network and cannot fetch them "
                         f"({error}): give their file by --lpips_trunk= (docs/recipes.md, your own photos); "
                         "train_vae.py and evaluate.py also run without, by --perceptual=none") from None
    if trunk:
        load_trunk(model.net, net, trunk)
    return model.eval().requires_grad_(False)


def load_trunk(module, net, path):
    """Fill an LPIPS network from torchvision's weight file, ignoring its classifier.   net: vgg or squeeze

    raises: SystemExit naming the file and what is missing, superfluous or not finite
    """
    state = runs.read_state_dict(path)
    features = nn.ModuleDict()
    for part in module.children():                          # slice1, slice2, ...: layers keep their numbers
        features.update(part.named_children())
    try:
        sd = files.unwrapped(files.pick_weights(state))
        layers = {k.removeprefix("features."): v for k, v in sd.items() if not k.startswith("classifier.")}
        files.fill(nn.ModuleDict({"features": features}), {f"features.{k}": v for k, v in layers.items()})
    except ValueError as error:
        wanted = {"vgg": "VGG-16", "squeeze": "SqueezeNet 1.1"}[net]
        raise SystemExit(f"{path}: {error}; wanted torchvision's file of {wanted} (--lpips_trunk, for LPIPS "
                         f"with {net})") from None


def upsampled(base, r):
    """The baselines without details: {row: (B, 3, r*H, r*W)} of base images (B, 3, H, W), clamped to [-1, 1].

    Bilinear is Tab. S2's upsampling; bicubic is a little sharper.   r: full side / base side.
    """
    rows = {}
    for mode in ("bilinear", "bicubic"):
        x = F.interpolate(base, scale_factor=float(r), mode=mode, align_corners=False)
        rows[f"base only, {mode}"] = x.clamp(-1, 1)
    return rows


# ---------------------------------------------------------------- two sets of images, by their features


def moments(features):
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), float64.

    raises: ValueError if n < 2; n < d is allowed, the covariance is then singular
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} images have no covariance, wanted at least 2: give more, or "
                         "measure without --features")
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(a, b):
    """Squared Frechet distance of two Gaussians given by their `moments`, in float64.

    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), the last trace from the eigenvalues of a
    symmetric matrix, so that rank-deficient covariances (n < d) stay finite. NaN if moments are not finite
    (images of NaN, from a model that diverged).
    """
    mu_a, A = a
    mu_b, B = b
    if not torch.isfinite(A.sum() + B.sum()):
        return math.nan
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T                         # A^1/2, (d, d)
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((mu_a - mu_b).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def distances(name, f, reference, logits=None, real=None):
    """{metric: value} of features f (n, d) against a reference set.

    name: the network's, a prefix of the metrics. Only Inception's distance is called FID: FID-50k from 50,000
          images on, FID@n below.
    reference: the set's `moments`.   logits (n, classes): for the Inception score.
    real: the set's features (N, d) if known; KID, precision and recall need them.
    Precision and recall use each image's three nearest neighbours, so they need at least 4 images.
    raises: ValueError if n or N is below 2.
    """
    values = {f"{name}-{_frechet_name(name, len(f))}": frechet_distance(moments(f), reference)}
    if real is not None:
        import_torchvision()
        from torch_fidelity.metric_kid import kid_features_to_metric
        kid = kid_features_to_metric(f, real, kid_subset_size=min(1000, len(f), len(real)), verbose=False)
        values[f"{name}-KID"] = kid["kernel_inception_distance_mean"]
    if name == "Inception" and logits is not None:
        import_torchvision()
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_prc import calculate_precision_recall_part
        score = isc_features_to_metric(logits, splits=max(1, len(logits) // 5000))
        values["IS"] = score["inception_score_mean"]
        if real is not None and min(len(f), len(real)) > 3:
            values["precision"], values["recall"] = calculate_precision_recall_part(f, real)
    return values


def _frechet_name(name, n):
    if name != "Inception":
        return "FD"
    return "FID-50k" if n >= 50_000 else f"FID@{n}"


# ---------------------------------------------------------------- the networks that make features


@dataclass
class FeatureNetwork:
    """network(x) -> features (B, d), logits (B, classes) of images (B, 3, H, W) in [-1, 1].

    name: Inception, SqueezeNet or Probe, a prefix of the distances. "": no network; both outputs are (B, 0).
    described: the name and the hash of the weights; distances are comparable only if these are the same.
    """
    name: str
    described: str
    forward: Callable

    def __call__(self, x):
        return self.forward(x)


def feature_network(kind, data_dir, image_size, device, inception_weights="", lpips_trunk=""):
    """The requested FeatureNetwork.

    kind: inception, squeeze, probe, none; or auto, the best that the given weights and the images allow.
    data_dir, image_size: of the images; the probe needs the built-in drawings ("procedural")
    raises: SystemExit if that network is not available.
    """
    if kind == "auto":
        kind = _what_can_be_had(data_dir, inception_weights, lpips_trunk)
    if kind == "none":
        return FeatureNetwork("", "", no_features)
    if kind == "probe" and data_dir == "procedural":
        return probe_features(image_size, device)
    if kind == "squeeze":
        return squeezenet_features(lpips_trunk, device)
    if kind == "inception" and inception_weights:
        return inception_features(inception_weights, device)
    raise SystemExit(f"--features={kind}, on {data_dir}: wanted inception (with --inception_weights=), "
                     "squeeze, none, or probe, which knows the procedural images only")


def _what_can_be_had(data_dir, inception_weights, lpips_trunk):
    if inception_weights:
        return "inception"
    if lpips_trunk:
        return "squeeze"
    return "probe" if data_dir == "procedural" else "none"


def no_features(x):
    """Stand-in for a feature network: features and logits (B, 0)."""
    empty = x.new_empty(len(x), 0)
    return empty, empty


def probe_features(image_size, device):
    """`make_probe` as a FeatureNetwork."""
    probe = make_probe(image_size).to(device)

    def forward(x):
        f = probe[0](x)                                            # (B, 128)
        return f, probe[1](f)                                      # (B, 11)
    return FeatureNetwork("Probe", f"Probe, sha256 {hash_of(probe)}", forward)


def squeezenet_features(trunk, device):
    """SqueezeNet's last feature map, normalised at each position as in LPIPS (mean square 1), then averaged.

    It has no logits.   trunk: see `make_lpips`.
    """
    lpips = make_lpips("squeeze", trunk).to(device)

    def forward(x):
        last = lpips.net(lpips.scaling_layer(x))[-1]               # (B, 512, h, w)
        f = F.normalize(last, dim=1).mean((2, 3)) * 512**0.5       # (B, 512)
        return f, f[:, :0]
    return FeatureNetwork("SqueezeNet", f"SqueezeNet, sha256 {hash_of(lpips)}", forward)


def inception_features(weights, device):
    """torch-fidelity's Inception: pool3 (B, 2048) and the logits without bias (B, 1008).

    Images are rounded to uint8 first.   weights: its file pt_inception-2015-12-05-6726825d.pth.
    """
    weights = hub.local(weights)
    state = runs.read_state_dict(weights)      # refuses a file that holds code; torch-fidelity would run it
    files.refuse_not_finite(state, weights)
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    outputs = ["2048", "logits_unbiased"]
    inception = FeatureExtractorInceptionV3("inception-v3-compat", outputs, weights).to(device)

    def forward(x):
        images = torch.as_tensor(data.to_uint8(x)).permute(0, 3, 1, 2)             # uint8 (B, 3, H, W)
        return inception(images.to(device))
    return FeatureNetwork("Inception", f"Inception, sha256 {hash_of(inception)}", forward)


@torch.no_grad()
def make_probe(image_size):
    """A feature network for the built-in drawings, and no other images: (B, 3, H, W) -> (B, 11).

    128 pooled activations of random convolutions (of a fixed seed), then a layer fitted by least squares:
    eleven logits, for the ten classes and for whether fine detail is present (> 0). It is fitted on 1,000
    drawings with their detail and the same without: halved as DA-VAE does for its base, and enlarged again.
    """
    torch.manual_seed(0)
    layers = []
    for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.ReLU()]
    for conv in layers[::2]:
        nn.init.kaiming_normal_(conv.weight)
    probe = nn.Sequential(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(128, 11))

    drawings = data.open_dataset("procedural", image_size, 1000, seed=12345)
    batches = list(data.read(drawings, range(1000)))
    sharp = torch.cat([x for x, _, _ in batches])                                   # (1000, 3, H, W)
    small = F.interpolate(sharp, scale_factor=0.5, mode="bicubic", align_corners=False)
    blurred = upsampled(small, 2)["base only, bicubic"]
    classes = 2 * F.one_hot(torch.cat([y for _, y, _ in batches]), 11).double() - 1  # (1000, 11) of +-1

    pairs = []
    for images, detail in ((sharp, 1), (blurred, -1)):
        f = torch.cat([probe[0](part) for part in images.split(100)]).double()      # (1000, 128)
        wanted = classes.clone()
        wanted[:, 10] = detail
        pairs.append((F.pad(f, (0, 1), value=1.0), wanted))                 # a column of ones for the bias
    W = ridge(pairs, 1e-6).float()                                                  # (128 + 1, 11)
    probe[1].weight.copy_(W[:-1].T)
    probe[1].bias.copy_(W[-1])
    return probe


# ---------------------------------------------------------------- reference sets and prompts


@torch.no_grad()
def read_reference(path, network, device="cpu", size=None):
    """(moments, features or None, description) of an npz in guided-diffusion's format.

    It holds images `arr_0`, which go through the FeatureNetwork; or `mu` and `sigma`; or all three: mu and
    sigma then give the moments, as in guided-diffusion's evaluator, and the images give the features.
    Statistics must be of the same network; without an entry `features`, which ours have, they are assumed to
    be Inception's. If there are images too, statistics of another network are ignored.
    size: (H, W) of what will be measured. If the reference's images have another size, a warning says so: it
    affects the distances, even Inception's, which resizes.
    raises: SystemExit saying what was found.
    """
    arrays = read_npz(path)
    images = arrays.get("arr_0")
    made_with = str(arrays.get("features", "Inception"))
    statistics = {"mu", "sigma"} <= set(arrays) and made_with in (network.name, network.described)
    if not statistics and images is None:
        raise SystemExit(f"--reference={path}: wanted arr_0 (images), or mu and sigma, of "
                         f"{network.described} features; found {sorted(arrays)}, {made_with}")
    if images is not None:
        check_images(images, path)
    if statistics:
        check_statistics(arrays["mu"], arrays["sigma"], network, path, device)

    real, reference = None, None
    if images is not None:
        named = f"{len(images)} images, sha256 {runs.sha256(path)[:16]}"
        parts = torch.as_tensor(images).split(50)
        real = torch.cat([network(data.to_tensor(part).to(device))[0].cpu() for part in parts])
        reference = moments(real)
    if statistics:
        count = arrays.get("count", "?") if images is None else f"mu and sigma beside {len(images)}"
        named = str(arrays.get("images", f"{count} images, sha256 {runs.sha256(path)[:16]}"))
        reference = (torch.as_tensor(arrays["mu"]).double(), torch.as_tensor(arrays["sigma"]).double())
    say_other_size(path, images, arrays.get("image_size"), size)
    return reference, real, named


# What NumPy, zipfile and zlib raise for files that are truncated, damaged, locked, or hold Python objects.
NOT_ARRAYS = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def read_npz(path, flag="reference"):
    """The arrays of a reference that are used here, {name: array}.

    flag: the one that gave the path.   raises: SystemExit if it is not an npz file
    """
    known = {"arr_0", "mu", "sigma", "features", "count", "images", "image_size"}
    if not Path(path).is_file():
        what = "a folder, wanted an npz file" if Path(path).is_dir() else "no such file"
        raise SystemExit(f"--{flag}={path}: {what}")
    try:
        file = np.load(path)
        if isinstance(file, np.ndarray):
            raise ValueError(f"one array of shape {file.shape}: save it with np.savez(FILE, arr_0=images)")
        with file:
            arrays = {name: file[name] for name in file.files if name in known}
    except NOT_ARRAYS as error:
        reason = error
        if "allow_pickle" in str(error):                       # NumPy advises running the file's code
            reason = "pickled Python objects, which are not loaded, or not a NumPy file at all"
        raise SystemExit(f"--{flag}={path}: not an npz file of arrays ({reason})") from None
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}


def check_images(images, path):
    """raises: SystemExit unless a reference's images are uint8 (N, H, W, 3), saying how to convert them."""
    shape = images.shape
    if images.dtype == np.uint8 and images.ndim == 4 and shape[3] == 3 and len(images) > 1 and images.size:
        return
    advice = []
    if images.dtype.kind == "f":
        advice.append("(255 * x).round() of values in [0, 1] or (127.5 * x + 127.5).round() of [-1, 1]")
    if images.ndim == 4 and shape[3] not in (3, 4) and shape[1] in (1, 3, 4):
        advice.append("x.transpose(0, 2, 3, 1)")
    if images.ndim == 4 and (shape[3] == 4 or shape[1] == 4 and shape[3] != 3):
        advice.append("x[..., :3]")
    if images.ndim == 3 or images.ndim == 4 and 1 in (shape[1], shape[3]):
        advice.append("np.stack of three times a grey x, axis -1")
    if images.dtype != np.uint8:
        advice.append("x.astype(np.uint8) of values from 0 to 255")
    convert = f"; to convert: {', '.join(advice)}" if advice else ""
    raise SystemExit(f"--reference={path}: arr_0 is {images.dtype} {shape}, wanted at least two images, "
                     f"uint8 (N, H, W, 3){convert}")


def check_statistics(mu, sigma, network, path, device):
    """raises: SystemExit unless mu and sigma are a mean and a covariance of the network's features."""
    d = network(torch.zeros(1, 3, 64, 64, device=device))[0].shape[1]
    found = f"--reference={path}: mu is {mu.dtype} {mu.shape}, sigma {sigma.dtype} {sigma.shape}"
    numbers = mu.dtype.kind in "fiu" and sigma.dtype.kind in "fiu"
    if not numbers or mu.shape != (d,) or sigma.shape != (d, d):
        raise SystemExit(f"{found}; wanted mean ({d},) and covariance ({d}, {d}) of {network.described}")
    wrong = ""
    sigma = sigma.astype(np.float64)
    if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        wrong = "not finite everywhere"
    elif not sigma.any():
        wrong = "sigma is zero everywhere"
    elif abs(sigma - sigma.T).max() > 1e-3 * abs(sigma).max() or sigma.diagonal().min() < 0:
        wrong = "sigma is not symmetric, or has negative variances"
    if wrong:
        raise SystemExit(f"{found}; {wrong}: not a mean and covariance, make the file again")


def say_other_size(path, images, stored, size):
    """Warn, on rank 0, if a reference's images differ in size (H, W) from those that are measured."""
    found = None
    if images is not None:
        found = images.shape[1:3]
    elif stored is not None:
        found = (int(stored), int(stored))
    if size is not None and found not in (None, tuple(size)) and ranks.this_rank() == 0:
        print(f"--reference={path}: images of {found[0]}x{found[1]} pixels, samples of {size[0]}x{size[1]}; "
              "distances include that difference", file=sys.stderr)


def keep_reference(path, real, network, images, image_size):
    """Write the moments of features (N, d) for `read_reference`; the file is whole or absent.

    images: which these are, as read_reference will report;  image_size: their side, in pixels
    raises: SystemExit if the disk refuses it
    """
    mu, sigma = moments(real)
    refused = runs.disk_may_fail(must=True, what=path, instead="another --keep_reference")
    with refused, files.renamed_when_whole(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, mu=mu, sigma=sigma, features=network.described, count=len(real), images=images,
                 image_size=image_size)


def check_kept(path, network, count, image_size):
    """raises: SystemExit if `keep_reference` must not overwrite the file.

    It may only replace statistics of at most `count` images, of the same network and image size.
    """
    if not Path(path).exists():
        return
    old = read_npz(path, "keep_reference")
    same = str(old.get("features")) == network.described and str(old.get("image_size")) == str(image_size)
    if not same or "arr_0" in old or int(old["count"]) > count:
        raise SystemExit(f"--keep_reference={path}: exists, with {old.get('count', 'other')} images of "
                         f"{old.get('features', 'unknown')} features; give another name, or remove it")


def clip_scorer(folder, device):
    """(score, hash of the model): score(x (B, 3, H, W) in [-1, 1], B prompts) -> (B,).

    100 max(cos, 0) of CLIP's embeddings (Hessel et al., 2021).
    folder: a CLIPModel and its processor, as transformers saves them, or their name on Hugging Face.
    raises: SystemExit if it is not such a folder.
    """
    folder = hub.local(folder, "clip")
    if not (Path(folder) / "config.json").exists():
        raise SystemExit(f"--clip={folder}: wanted a local folder of a CLIP model: config.json, weights, "
                         "tokenizer, processor")
    import_torchvision()
    from transformers import CLIPModel, CLIPProcessor
    try:
        processor = CLIPProcessor.from_pretrained(folder)
        model, loaded = CLIPModel.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SystemExit(f"--clip={folder}: not a whole CLIP model and processor ({reason})") from None
    if loaded["missing_keys"]:                       # transformers would fill them with random numbers
        some = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise SystemExit(f"--clip={folder}: lacks weights ({some}, ...); wanted a whole CLIPModel")
    if len(processor.tokenizer) < model.config.text_config.vocab_size:       # or build an empty tokenizer
        raise SystemExit(f"--clip={folder}: its tokenizer knows {len(processor.tokenizer)} words, the model "
                         f"{model.config.text_config.vocab_size}; wanted tokenizer.json, or vocab.json")
    model = model.to(device).eval()

    def score(x, texts):
        images = list(data.to_uint8(x))
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
        found = model(**inputs.to(device))                                          # embeddings of length 1
        cosine = (found.image_embeds * found.text_embeds).sum(1)                    # (B,)
        return 100 * cosine.clamp_min(0)
    return score, hash_of(model)
