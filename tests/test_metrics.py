"""support/metrics.py: against closed forms, torch-fidelity and transformers; and what is refused."""
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from davae import half
from support import data, metrics, runs
from support.metrics import FeatureNetwork, distances, frechet_distance, moments, ssim


def features(n, d, seed, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- distances


def test_frechet_distance_of_a_set_to_itself_is_zero_even_if_its_covariance_is_singular():
    for n, d in ((500, 16), (20, 64)):
        f = features(n, d, 0)
        distance = frechet_distance(moments(f), moments(f))
        assert abs(distance) < 1e-5                # square roots of eigenvalues that are 0 up to rounding


def test_frechet_distance_of_two_gaussians_equals_the_closed_form():
    a = features(4000, 3, 1)
    whiten = torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T
    a = (a - a.mean(0)) @ whiten                                           # its moments are N(0, I)'s exactly
    b = a * torch.tensor([1.0, 2.0, 3.0]).double() + torch.tensor([1.0, 0.0, -2.0]).double()
    closed = 1 + 4 + sum((1 - s) ** 2 for s in (1, 2, 3))          # |mu|^2 + sum (sigma_a - sigma_b)^2
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(closed, rel=1e-9)
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("n,m,d", [(600, 500, 24), (20, 30, 64)])  # the second: covariances of rank 19 and 29
def test_frechet_distance_agrees_with_torch_fidelity(n, m, d):
    metrics.import_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    a, b = features(n, d, 2), features(m, d, 3, shift=0.3, scale=1.5)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f) for f in (a, b)), verbose=False)
    ours = frechet_distance(moments(a), moments(b))
    assert np.isfinite(ours) and ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_moments_of_float32_features_are_computed_in_float64():
    f = features(300, 8, 0, shift=1000).float()
    for ours, exact in zip(moments(f), moments(f.double())):
        assert ours.dtype == torch.float64 and torch.equal(ours, exact)


def test_distances_are_named_by_network_and_kid_is_small_for_equal_gaussians():
    a, b, c = features(400, 8, 4), features(400, 8, 5), features(400, 8, 6, shift=0.5)
    near, far = (distances("SqueezeNet", f, moments(a), real=a) for f in (b, c))
    assert set(near) == {"SqueezeNet-FD", "SqueezeNet-KID"}
    assert abs(near["SqueezeNet-KID"]) < 0.02 < far["SqueezeNet-KID"]
    assert far["SqueezeNet-FD"] == frechet_distance(moments(c), moments(a))
    assert set(distances("Probe", b, moments(a))) == {"Probe-FD"}    # a reference of statistics only: no KID


@pytest.mark.parametrize("n,name", [(49_999, "Inception-FID@49999"), (50_000, "Inception-FID-50k")])
def test_only_fifty_thousand_samples_are_called_fid_50k(n, name):
    f = features(n, 2, 0)
    assert list(distances("Inception", f, moments(f))) == [name]


# ---------------------------------------------------------------- image metrics


def test_ssim_is_one_for_equal_images_and_known_for_constant_ones():
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64))
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    c1 = 0.02**2
    assert ssim(a, b).item() == pytest.approx((2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1), rel=1e-6)


def ssim_by_hand(x, y):
    """The definition, window by window, in float64: deviations are taken from each window's own mean."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    bell = torch.exp(-offsets**2 / (2 * 1.5**2))
    weight = (torch.outer(bell, bell) / bell.sum() ** 2).flatten()[:, None]               # (121, 1)
    values = []
    channels = [image.double().clamp(-1, 1).flatten(0, 1)[:, None, None] for image in (x, y)]
    for pair in zip(*channels):
        a, b = (F.unfold(channel, 11)[0] for channel in pair)                             # (121, windows)
        ma, mb = (weight * a).sum(0), (weight * b).sum(0)
        va, vb = (weight * (a - ma) ** 2).sum(0), (weight * (b - mb) ** 2).sum(0)
        cov = (weight * (a - ma) * (b - mb)).sum(0)
        c1, c2 = 0.02**2, 0.06**2
        values.append(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())
    return torch.stack(values).view(len(x), 3).mean(1)


def images_for_ssim(kind):
    torch.manual_seed(0)
    grain = torch.randn(2, 3, 24, 41)
    left_white = torch.where(torch.arange(41) < 20, 1.0, -1.0).expand(2, 3, 24, 41)
    return {
        "noise": (grain / 2, grain / 2 + 0.3 * torch.randn_like(grain)),                 # also beyond [-1, 1]
        "near constant": (0.9 + 1e-4 * grain, 0.9 - 1e-4 * grain),
        "constant": (torch.full_like(grain, 0.99), torch.full_like(grain, 0.98)),
        "black and white": (left_white, (left_white + 1e-3 * grain).clamp(-1, 1)),
        "opposite": (left_white, -left_white),
        "smallest": (grain[..., :11, :11] / 3, grain[..., 11:22, :11] / 3),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["noise", "near constant", "constant", "black and white", "opposite", "smallest"])
def test_ssim_matches_its_definition_window_by_window(kind):
    x, y = images_for_ssim(kind)
    assert (ssim(x, y) - ssim_by_hand(x, y)).abs().max() < 1e-9


def test_ssim_of_a_halved_photo_matches_its_definition(shared):
    photo = np.array(Image.open(shared("data/kodak24/1.png")).convert("RGB"))
    x = data.to_tensor(photo[None, 200:264, 200:296])
    y = metrics.upsampled(half(x), 2)["base only, bilinear"]
    assert (ssim(x, y) - ssim_by_hand(x, y)).abs().max() < 1e-9


def test_ssim_of_batches_of_unequal_length_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        ssim(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16))


def test_psnr_is_twenty_for_an_error_of_a_tenth_of_the_range_and_clamps_to_it():
    x = torch.full((2, 3, 4, 4), 0.9)
    assert torch.allclose(metrics.psnr(x, x - 0.2), torch.tensor(20.0))
    assert torch.allclose(metrics.psnr(x, x + 5), metrics.psnr(x, torch.ones_like(x)))


def test_upsampled_rows_are_r_times_as_large_and_keep_constants():
    base = torch.full((2, 3, 4, 6), 0.25)
    for r in (2, 4):
        rows = metrics.upsampled(base, r)
        assert list(rows) == ["base only, bilinear", "base only, bicubic"]
        for x in rows.values():
            assert x.shape == (2, 3, 4 * r, 6 * r) and torch.allclose(x, torch.tensor(0.25))
    assert metrics.upsampled(2 * torch.ones(1, 3, 2, 2), 2)["base only, bicubic"].max() == 1     # clamped


def test_ssim_falls_with_noise_of_either_sign():
    x, noise = torch.rand(1, 3, 32, 32) - 0.5, 0.1 * torch.randn(1, 3, 32, 32)
    small, large = ssim(x, x + noise).item(), ssim(x, x + 3 * noise).item()
    assert 1 > small > large > 0 and ssim(x, x - noise).item() == pytest.approx(small, abs=0.05)


# ---------------------------------------------------------------- feature networks


def test_the_probe_detects_lost_detail():
    with torch.no_grad():
        probe, again = metrics.make_probe(64), metrics.make_probe(64)
        x, y, _ = next(data.read(data.open_dataset("procedural", 64, 100, seed=77), range(100)))
        for blurred in metrics.upsampled(half(x), 2).values():                 # bilinear, bicubic
            assert (probe(x)[:, 10] > 0).float().mean() > 0.9
            assert (probe(blurred)[:, 10] > 0).float().mean() < 0.1
    assert (probe(x)[:, :10].argmax(1) == y).float().mean() > 0.9
    assert runs.hash_of(probe) == runs.hash_of(again)


def feature_network(kind, data_dir="photos", **weights):
    return metrics.feature_network(kind, data_dir, 64, torch.device("cpu"), **weights)


def test_squeezenet_features_ignore_the_length_of_the_map_at_each_position(monkeypatch):
    maps = torch.rand(2, 512, 3, 3)

    class Fake(torch.nn.Module):
        def scaling_layer(self, x):
            return x

        def net(self, x):
            return [None, maps * x]
    monkeypatch.setattr(metrics, "make_lpips", lambda *args: Fake())
    network = feature_network("squeeze")
    assert network.name == "SqueezeNet" and network.described.startswith("SqueezeNet, sha256 ")
    (a, logits), (b, _) = network(torch.ones(2, 1, 3, 3)), network(torch.arange(1.0, 10).view(1, 1, 3, 3))
    assert torch.allclose(a, b, rtol=1e-5) and logits.shape == (2, 0)
    maps = torch.ones(2, 512, 3, 3)
    f, _ = network(torch.full((2, 1, 3, 3), 7.0))
    assert torch.allclose(f, torch.ones(2, 512))                               # mean square over channels: 1


@pytest.mark.parametrize("change, said", [
    ({"features.3.squeeze.bias": None}, "it lacks features.3.squeeze.bias"),
    ({"features.12.expand3x3.weight": torch.ones(3)}, "features.12.expand3x3.weight is .3,.; wanted"),
    ({"features.0.bias": torch.full((64,), float("nan"))}, "features.0.bias is not finite"),
    ({"features.13.bias": torch.ones(1)}, "not known here: features.13.bias"),
])
def test_a_damaged_lpips_trunk_is_refused_by_file_and_tensor(tmp_path, change, said):
    metrics.import_torchvision()
    import torchvision

    sd = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save({f"module.{name}": weight for name, weight in sd.items()}, tmp_path / "whole.pth")
    lpips = metrics.make_lpips("squeeze", tmp_path / "whole.pth")
    trunk = dict(lpips.net.named_modules())
    assert torch.equal(trunk["slice1.0"].weight, sd["features.0.weight"])
    assert torch.equal(trunk["slice7.12"].expand3x3.bias, sd["features.12.expand3x3.bias"])
    torch.save({k: v for k, v in (sd | change).items() if v is not None}, tmp_path / "trunk.pth")
    with pytest.raises(SystemExit, match=f"trunk.pth: .*{said}") as caught:
        metrics.make_lpips("squeeze", tmp_path / "trunk.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("net, other, wanted", [
    ("squeeze", "vgg11", "SqueezeNet 1.1"), ("vgg", "squeezenet1_1", "VGG-16"),
    ("squeeze", "squeezenet1_0", "SqueezeNet 1.1"), ("squeeze", None, "SqueezeNet 1.1"),
])
def test_the_trunk_of_another_network_is_refused_with_the_one_wanted(tmp_path, net, other, wanted):
    metrics.import_torchvision()
    import torchvision

    sd = {"a": torch.ones(2)}
    if other:                                        # in the right shapes, without memory for the numbers
        with torch.device("meta"):
            network = getattr(torchvision.models, other)(weights=None)
        sd = {name: torch.zeros(()).expand(weight.shape) for name, weight in network.state_dict().items()}
    torch.save(sd, tmp_path / "trunk.pth")
    said = f"trunk.pth: .*; wanted torchvision's file of {wanted} .--lpips_trunk, for LPIPS with {net}"
    with pytest.raises(SystemExit, match=said):
        metrics.make_lpips(net, tmp_path / "trunk.pth")


def test_inception_features_match_torch_fidelitys_for_uint8_images(tmp_path):
    metrics.import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):    # the published weights are not available offline
        def load_state_dict(self, *args, **kwargs):
            pass

    torch.save({}, tmp_path / "empty.pt")
    theirs = Untrained("inception-v3-compat", ["2048", "logits_unbiased"], str(tmp_path / "empty.pt"))
    torch.save(theirs.eval().state_dict(), tmp_path / "weights.pt")
    network = feature_network("auto", inception_weights=str(tmp_path / "weights.pt"))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected, logits = theirs(torch.as_tensor(data.to_uint8(x)).permute(0, 3, 1, 2))
        assert network.described.startswith("Inception, sha256 ") and network.name == "Inception"
        assert expected.shape == (2, 2048) and logits.shape == (2, 1008)
        assert all(torch.allclose(*pair) for pair in zip(network(x), (expected, logits)))


@pytest.mark.parametrize("kind,sentence", [("inception", "with --inception_weights="),
                                           ("fid", "wanted inception"),
                                           ("probe", "knows the procedural images only")])
def test_unavailable_features_are_refused(kind, sentence):
    with pytest.raises(SystemExit, match=sentence):
        feature_network(kind)


def test_features_default_to_what_weights_and_data_allow(monkeypatch):
    for kind in ("inception", "squeezenet", "probe"):
        monkeypatch.setattr(metrics, f"{kind}_features", lambda *args, kind=kind: kind)
    assert feature_network("auto", inception_weights="i", lpips_trunk="s") == "inception"
    assert feature_network("auto", lpips_trunk="s", data_dir="procedural") == "squeezenet"
    assert feature_network("auto", data_dir="procedural") == "probe"
    none = feature_network("auto")
    assert none.name == none.described == ""
    assert [f.shape for f in none(torch.zeros(2, 3, 8, 8))] == [(2, 0), (2, 0)]


# ---------------------------------------------------------------- Inception metrics and references


def inception(f, logits, real=None):
    return distances("Inception", f, moments(f), logits, real)


def test_precision_and_recall_of_a_set_with_itself_are_one_and_of_distant_sets_zero():
    f, logits = features(50, 6, 1), torch.zeros(50, 4)
    same, far = (inception(f, logits, real) for real in (f, f + 100))
    assert (same["precision"], same["recall"], far["precision"], far["recall"]) == (1, 1, 0, 0)


def test_samples_that_are_too_alike_lose_recall_and_too_varied_ones_lose_precision():
    varied, alike = features(200, 4, 1), features(200, 4, 2, scale=0.2)
    logits = torch.zeros(200, 8)
    few, many = inception(alike, logits, varied), inception(varied, logits, alike)
    assert few["precision"] == many["recall"] == 1 and max(few["recall"], many["precision"]) < 0.2


def test_inception_score_is_one_for_uniform_guesses_and_the_class_count_for_sure_balanced_ones():
    f = features(80, 6, 1)
    assert inception(f[:60], torch.zeros(60, 8))["IS"] == pytest.approx(1)
    sure = inception(f, 100 * torch.eye(8).repeat(10, 1))
    assert sure["IS"] == pytest.approx(8) and "recall" not in sure                     # no reals: no recall


def pool(x):
    """A stand-in for a feature network: the mean colour of each quadrant, and no logits."""
    f = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    return f, f[:, :0]


POOL = FeatureNetwork("Inception", "Inception, sha256 0", pool)


def test_a_reference_of_images_or_of_their_statistics_gives_the_same_distance(tmp_path):
    arr_0 = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=arr_0)
    a, f, named = metrics.read_reference(tmp_path / "images.npz", POOL)
    x = data.to_tensor(arr_0)
    assert named.startswith("60 images, sha256 ") and torch.allclose(f, pool(x)[0])
    f = f.double().numpy()
    np.savez(tmp_path / "statistics.npz", mu=f.mean(0), sigma=np.cov(f, rowvar=False))
    b, none, other = metrics.read_reference(tmp_path / "statistics.npz", POOL)
    assert none is None and other.startswith("? images, sha256 ") and other[-16:] != named[-16:]
    assert abs(frechet_distance(a, b)) < 1e-6
    other = moments(features(40, 12, 0))
    assert frechet_distance(other, a) == pytest.approx(frechet_distance(other, b), rel=1e-9)


@pytest.mark.parametrize("arrays,sentence", [
    (dict(mu=[0.0]), r"wanted arr_0 \(images\), or mu and sigma, .* found \['mu'\]"),
    (dict(mu=[0.0], sigma=[[1.0]], features="Probe, sha256 0"), "Probe, sha256 0"),
    (None, "not an npz file")])
def test_an_unusable_reference_is_refused_with_the_reason(tmp_path, arrays, sentence):
    path = tmp_path / "r.npz"
    path.write_text("text") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(SystemExit, match=sentence):
        metrics.read_reference(path, POOL)


GOOD = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
MU, SIGMA = np.zeros(12), np.eye(12)                               # as many features as POOL has


@pytest.mark.parametrize("arr_0,sentence", [
    (GOOD / 255, r"float64 \(6, 8, 8, 3\), wanted .* uint8 \(N, H, W, 3\); to convert: \(255 \* x\)"),
    (GOOD.astype(np.float32) / 127.5 - 1, r"\(127.5 \* x \+ 127.5\).round\(\) of \[-1, 1\]"),
    (GOOD.astype(np.int64), r"int64 .*x.astype\(np.uint8\)"),
    (GOOD.transpose(0, 3, 1, 2), r"\(6, 3, 8, 8\), .*x.transpose\(0, 2, 3, 1\)"),
    (GOOD[..., 0], r"\(6, 8, 8\), .*three times a grey x"), (GOOD[..., :1], "three times a grey x"),
    (np.zeros((6, 8, 8, 4), np.uint8), r"x\[..., :3\]"), (GOOD[0], r"uint8 \(8, 8, 3\), wanted at least two"),
    (GOOD[:1], r"\(1, 8, 8, 3\), wanted at least two"), (GOOD[:0], r"\(0, 8, 8, 3\), wanted at least"),
    (np.uint8(7), r"uint8 \(\), wanted at least two"), (np.zeros((6, 0, 0, 3), np.uint8), "wanted at least"),
    (np.array([None]), "not an npz file of arrays .pickled"), (np.array("a"), "wanted at least two")])
def test_images_in_the_wrong_layout_are_refused_with_a_remedy(tmp_path, arr_0, sentence):
    np.savez(tmp_path / "r.npz", arr_0=arr_0)
    with pytest.raises(SystemExit, match=sentence):
        metrics.read_reference(tmp_path / "r.npz", POOL)


def spoilt(place, value):
    changed = SIGMA.copy()
    changed[place] = value
    return changed


@pytest.mark.parametrize("mu,sigma,sentence", [
    (np.zeros(99), np.eye(99), r"mu is float64 \(99,\), .*wanted mean \(12,\) and covariance \(12, 12\)"),
    (MU[:5], SIGMA[:5, :5], r"\(5,\)"), (MU[None], SIGMA, r"\(1, 12\)"),
    (MU, SIGMA.diagonal(), r"sigma float64 \(12,\)"), (MU, spoilt((2, 3), np.nan), "not finite"),
    (MU - np.inf, SIGMA, "not finite"), (MU, 0 * SIGMA, "zero everywhere"),
    (MU, spoilt((2, 3), 0.5), "not symmetric"), (MU, spoilt((2, 2), -1), "negative variances"),
    (MU.astype(str), SIGMA, "<U32"), (MU, SIGMA * 1j, "complex128")])
def test_statistics_that_are_no_valid_mean_and_covariance_are_refused(
        tmp_path, mu, sigma, sentence):
    for arrays in ({}, {"arr_0": GOOD}):                           # with images too
        np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma, **arrays)
        with pytest.raises(SystemExit, match=sentence):
            metrics.read_reference(tmp_path / "r.npz", POOL)


@pytest.mark.parametrize("damage", [
    lambda content: content[:len(content) // 2], lambda content: b"", lambda content: content[:-30],
    lambda content: content[:300] + b"\0" * 200 + content[500:], lambda content: b"PK\3\4" + content[99:]])
def test_a_truncated_or_damaged_npz_file_is_named(tmp_path, damage):
    np.savez_compressed(tmp_path / "r.npz", arr_0=GOOD)
    content = (tmp_path / "r.npz").read_bytes()
    (tmp_path / "r.npz").write_bytes(damage(content))
    with pytest.raises(SystemExit, match="r.npz: not an npz file of arrays"):
        metrics.read_reference(tmp_path / "r.npz", POOL)


def test_anything_but_an_npz_file_is_refused_with_what_was_found(tmp_path):
    np.save(tmp_path / "r.npy", GOOD)
    wrong = {"r.npy": r"np.savez\(FILE, arr_0=images\)", "none.npz": "no such file", "": "a folder",
             "text.npz": r"not an npz file of arrays \(pickled Python objects, which are not loaded, or"}
    (tmp_path / "text.npz").write_text("text")
    for path, sentence in wrong.items():
        with pytest.raises(SystemExit, match=sentence):
            metrics.read_reference(tmp_path / path, POOL)


def test_statistics_are_preferred_to_images_if_they_are_of_this_network(tmp_path):
    path = tmp_path / "r.npz"
    np.savez(path, arr_0=GOOD, arr_1=np.arange(6), mu=MU + 7, sigma=SIGMA)
    (mu, sigma), real, named = metrics.read_reference(path, POOL)
    assert mu.tolist() == [7] * 12 and torch.equal(sigma, torch.eye(12).double())
    assert torch.allclose(real, pool(data.to_tensor(GOOD))[0]) and "6 images" in named
    other = FeatureNetwork("SqueezeNet", "SqueezeNet, sha256 0", pool)       # they are Inception's
    (mu, _), real, _ = metrics.read_reference(path, other)
    assert torch.allclose(mu, real.double().mean(0))


def test_a_reference_of_another_size_than_the_samples_warns(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", arr_0=GOOD)
    metrics.keep_reference(tmp_path / "kept.npz", features(20, 12, 0), POOL, "20 images", 8)
    for name in ("images", "kept"):
        metrics.read_reference(tmp_path / f"{name}.npz", POOL, size=(8, 8))
        assert not capsys.readouterr().err
        metrics.read_reference(tmp_path / f"{name}.npz", POOL, size=(8, 16))
        assert f"{name}.npz: images of 8x8 pixels, samples of 8x16" in capsys.readouterr().err


def test_a_failed_write_keeps_the_previous_reference(tmp_path, monkeypatch):
    path = tmp_path / "kept.npz"
    metrics.keep_reference(path, features(20, 12, 0), POOL, "20 images", 8)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(SystemExit, match="kept.npz: not written: .*No space.* give another --keep_reference"):
        metrics.keep_reference(path, features(20, 12, 1), POOL, "20 images", 8)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- few images and non-finite features


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_images_have_all_metrics_except_those_that_need_more_neighbours(n):
    f = features(n, 6, 1)
    values = distances("Inception", f, moments(f), torch.randn(n, 4), real=features(5, 6, 2))
    neighbours = {"precision", "recall"} if n > 3 else set()
    assert set(values) == {f"Inception-FID@{n}", "Inception-KID", "IS"} | neighbours
    assert all(np.isfinite(value) for value in values.values())
    assert set(distances("Inception", features(9, 6, 1), moments(f), torch.zeros(9, 4), real=f)) >= neighbours


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_have_no_moments(n):
    with pytest.raises(ValueError, match=f"{n} images have no covariance, wanted at least 2"):
        moments(torch.zeros(n, 6))


def test_kid_uses_all_images_if_there_are_fewer_than_its_subset():
    a, b = features(20, 8, 1), features(30, 8, 2, shift=2.0)
    assert distances("Probe", b, moments(a), real=a)["Probe-KID"] > 0.5
    assert distances("Probe", a[:2], moments(a), real=a)["Probe-KID"] < 0.5


def test_the_distance_of_non_finite_features_is_nan():
    a, b = features(9, 6, 1), features(9, 6, 2)
    b[3, 2] = float("nan")
    assert np.isnan(frechet_distance(moments(a), moments(b)))
    assert np.isnan(frechet_distance(moments(b), moments(a)))


# ---------------------------------------------------------------- CLIP


def save_clip(folder, sd3_folder):
    """(model, processor) of a small CLIP model with random weights, saved in a folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(sd3_folder / "tokenizer")
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1, **small)
    vision = dict(image_size=28, patch_size=14, **small)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = CLIPProcessor(images, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def test_clip_scores_are_the_cosines_in_transformers_own_logits(tmp_path, sd3_folder):
    model, processor = save_clip(tmp_path, sd3_folder)
    score, _ = metrics.clip_scorer(tmp_path, "cpu")
    x, texts = torch.rand(3, 3, 40, 40) * 2 - 1, ["a fox", "the sea, a house", "a very long road " * 9]
    with torch.no_grad():
        inputs = processor(
            text=texts, images=list(data.to_uint8(x)), return_tensors="pt", padding=True, truncation=True)
        assert inputs["input_ids"].shape[1] == 77                  # all that CLIP reads of a prompt
        cosines = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
        assert cosines.std() > 1e-3 and torch.allclose(score(x, texts), 100 * cosines.clamp_min(0), atol=1e-4)
    with pytest.raises(SystemExit, match="wanted a local folder of a CLIP model"):
        metrics.clip_scorer(tmp_path / "nowhere", "cpu")


def test_a_clip_folder_that_lacks_weights_is_refused_not_filled_with_random_ones(tmp_path, sd3_folder):
    model, _ = save_clip(tmp_path, sd3_folder)
    state = {name: weight for name, weight in model.state_dict().items() if "visual_projection" not in name}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="lacks weights .visual_projection.weight, ..."):
        metrics.clip_scorer(tmp_path, "cpu")


@pytest.mark.parametrize("file,content", [
    ("model.safetensors", b"half"), ("config.json", b"{"), ("model.safetensors", None), ("config.json", None),
    ("tokenizer.json", None)])
def test_an_incomplete_clip_folder_is_refused(tmp_path, sd3_folder, file, content):
    save_clip(tmp_path, sd3_folder)
    os.remove(tmp_path / file)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    wanted = "not a whole CLIP model and processor|its tokenizer knows 2 words|wanted a local folder of"
    with pytest.raises(SystemExit, match=wanted):
        metrics.clip_scorer(tmp_path, "cpu")
