"""evaluate.py: metrics against closed forms and torch-fidelity, rows that mean what they say, files that lose nothing."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
import train_vae
from davae import load_davae
from evaluate import frechet_distance, kernel_distance, ssim


def features(n, d, seed, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- distances


def test_frechet_distance_of_a_set_with_itself_is_zero_even_where_the_covariance_is_singular():
    for n, d in ((500, 16), (20, 64)):
        f = features(n, d, 0)
        assert abs(frechet_distance(f, f)) < 1e-5      # square roots of eigenvalues that are 0 but for rounding


def test_frechet_distance_of_two_gaussians_equals_the_closed_form():
    a = features(4000, 3, 1)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T          # exactly N(0, I) moments
    b = a * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    closed = 1 + 4 + sum((1 - s) ** 2 for s in (1, 2, 3))          # |mu|^2 + sum (sigma_a - sigma_b)^2
    assert frechet_distance(a, b) == pytest.approx(closed, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(closed, rel=1e-9)


def test_frechet_distance_agrees_with_torch_fidelity():
    train_vae.import_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    a, b = features(600, 24, 2), features(500, 24, 3, shift=0.3, scale=1.5)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f) for f in (a, b)), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_kernel_distance_is_unbiased_and_agrees_with_torch_fidelity():
    train_vae.import_torchvision()
    from torch_fidelity.metric_kid import kid_features_to_metric
    a, b, c = features(800, 8, 4), features(800, 8, 5), features(800, 8, 6, shift=0.5)
    assert abs(kernel_distance(a, b, subsets=20, size=400)) < 0.02 < kernel_distance(a, c, subsets=20, size=400)
    theirs = kid_features_to_metric(a, c, kid_subsets=1, kid_subset_size=800, verbose=False)["kernel_inception_distance_mean"]
    assert kernel_distance(a, c, subsets=1) == pytest.approx(theirs, rel=1e-9)     # one subset holds everything: same value


# ---------------------------------------------------------------- image metrics


def test_ssim_is_one_for_equal_images_and_by_hand_for_constant_ones():
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64))
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    c1 = 0.02**2
    assert ssim(a, b).item() == pytest.approx((2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1), rel=1e-6)


def test_ssim_falls_with_noise_but_not_with_its_sign():
    x, noise = torch.rand(1, 3, 32, 32) - 0.5, 0.1 * torch.randn(1, 3, 32, 32)
    small, large = ssim(x, x + noise).item(), ssim(x, x + 3 * noise).item()
    assert 1 > small > large > 0 and ssim(x, x - noise).item() == pytest.approx(small, abs=0.05)


def test_reconstruction_rows_are_what_their_names_say(tiny_vae):
    vae, x = load_davae(tiny_vae), torch.rand(5, 3, 64, 64) * 2 - 1
    table = evaluate.reconstruction(vae, x.split(2))
    assert list(table) == ["base only, doubled", "DA-VAE", "base VAE, full size"]
    assert [row["positions"] for row in table.values()] == [64, 64, 256]
    with torch.no_grad():
        full = evaluate.psnr(x, vae.decode(vae.encode(x))).mean().item()
        base = evaluate.psnr(x, vae.base.decode(vae.base.encode(x))).mean().item()
    assert table["DA-VAE"]["psnr"] == pytest.approx(full, rel=1e-5)        # an average over images, whatever the batches
    assert table["base VAE, full size"]["psnr"] == pytest.approx(base, rel=1e-5)


# ---------------------------------------------------------------- the script


def test_evaluate_names_its_features_and_adds_to_what_is_there(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.train_probe, "__defaults__", (10,))       # steps: enough for a number, not for a good one
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "metrics.json"), n=20, images=20, steps=2)
    evaluate.main(cfg)
    evaluate.main(cfg)
    evaluate.main(evaluate.Config(**{**cfg.__dict__, "steps": 3}))
    entries = json.loads((tmp_path / "metrics.json").read_text())
    assert [e["settings"]["steps"] for e in entries] == [2, 3]             # the same settings replace, others are added
    rows = entries[0]["generation"]
    assert set(rows["samples"]) == {"Probe-FD", "Probe-KID", "judged sharp", "class recognised"}
    assert not any("FID" in key for row in rows.values() for key in row)
    assert entries[0]["settings"]["cfg"] == 2.0 and entries[0]["settings"]["torch"] == torch.__version__


def test_the_probe_sees_lost_detail(tmp_path):
    probe = evaluate.train_probe(tmp_path / "probe.safetensors", 64, steps=40)
    dataset = evaluate.data.open_dataset("procedural", 64, 100, seed=77)
    x, y = evaluate.data.stack(dataset, range(100))
    x = evaluate.data.to_tensor(x)
    with torch.no_grad():
        sharp, blurred = (probe.sharp(probe(i)).squeeze(1) > 0 for i in (x, evaluate.double(evaluate.half(x))))
        correct = (probe.label(probe(x)).argmax(1) == y).float().mean()
    assert sharp.float().mean() > 0.9 and blurred.float().mean() < 0.1 and correct > 0.9
    again = evaluate.train_probe(tmp_path / "probe.safetensors", 64)
    assert all(torch.equal(a, b) for a, b in zip(probe.state_dict().values(), again.state_dict().values()))


def test_squeezenet_features_are_named_for_what_they_are(tiny_run, tmp_path, shared):
    trunk = str(shared("weights/lpips/squeezenet1_1_features.pth"))
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), n=20, images=20, steps=2, perceptual="squeeze", lpips_trunk=trunk)
    entry = evaluate.main(cfg)
    assert {"SqueezeNet-FD", "SqueezeNet-KID"} <= set(entry["generation"]["samples"])
    assert set(entry["reconstruction"]["DA-VAE"]) == {"psnr", "ssim", "lpips", "images", "positions"}


def test_inception_features_are_torch_fidelitys_of_the_uint8_images(tmp_path):
    train_vae.import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):              # the published weights cannot be had offline
        def load_state_dict(self, *args, **kwargs):
            pass

    torch.save({}, tmp_path / "empty.pt")
    theirs = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pt")).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    cfg = evaluate.Config(inception_weights=str(tmp_path / "weights.pt"))
    name, network = evaluate.feature_network(cfg, tmp_path, 32, procedural=False)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = theirs(torch.as_tensor(evaluate.data.to_uint8(x)).permute(0, 3, 1, 2))[0]
        assert name == "Inception" and torch.allclose(network(x), expected) and expected.shape == (2, 2048)


def test_a_vae_run_gets_reconstruction_only(tiny_vae, tmp_path):
    entry = evaluate.main(evaluate.Config(run=tiny_vae, out=str(tmp_path / "m.json"), images=8))
    assert "generation" not in entry and np.isfinite(entry["reconstruction"]["DA-VAE"]["ssim"])


def test_whole_images_are_measured_at_their_own_size(tiny_vae, tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a", (33, 50)), ("b", (64, 16))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    shapes = [tuple(x.shape[2:]) for x in evaluate.whole_images(tmp_path, 8)]
    assert shapes == [(32, 48), (64, 16)]
    entry = evaluate.main(evaluate.Config(run=tiny_vae, out=str(tmp_path / "m.json"), data_dir=str(tmp_path), whole=True))
    assert entry["reconstruction"]["DA-VAE"]["images"] == 2
    with pytest.raises(SystemExit, match="needs a folder of images"):
        evaluate.main(evaluate.Config(run=tiny_vae, whole=True))


def test_a_photo_run_asks_for_held_out_images():
    with pytest.raises(SystemExit, match="was trained on photos/train: give held-out images with --data_dir="):
        evaluate.held_out(evaluate.Config(run="r"), {"data_dir": "photos/train", "seed": 0}, 64)


@pytest.mark.parametrize("changes,sentence", [(dict(features="inception"), "with --inception_weights="),
                                              (dict(features="fid"), "wanted inception"),
                                              (dict(features="probe"), "knows the procedural images only")])
def test_features_that_cannot_be_had_are_named(changes, sentence):
    with pytest.raises(SystemExit, match=sentence):
        evaluate.feature_network(evaluate.Config(**changes), Path("."), 64, procedural=False)
