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
from evaluate import frechet_distance, kernel_distance, moments, ssim


def features(n, d, seed, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- distances


def test_frechet_distance_of_a_set_with_itself_is_zero_even_where_the_covariance_is_singular():
    for n, d in ((500, 16), (20, 64)):
        f = features(n, d, 0)
        assert abs(frechet_distance(moments(f), moments(f))) < 1e-5      # square roots of eigenvalues that are 0 but for rounding


def test_frechet_distance_of_two_gaussians_equals_the_closed_form():
    a = features(4000, 3, 1)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T          # exactly N(0, I) moments
    b = a * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    closed = 1 + 4 + sum((1 - s) ** 2 for s in (1, 2, 3))          # |mu|^2 + sum (sigma_a - sigma_b)^2
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(closed, rel=1e-9)
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(closed, rel=1e-9)


def test_frechet_distance_agrees_with_torch_fidelity():
    train_vae.import_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    a, b = features(600, 24, 2), features(500, 24, 3, shift=0.3, scale=1.5)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f) for f in (a, b)), verbose=False)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


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
        sharp, blurred = (probe.sharp(probe(i)[0]).squeeze(1) > 0 for i in (x, evaluate.double(evaluate.half(x))))
        correct = (probe(x)[1].argmax(1) == y).float().mean()
    assert sharp.float().mean() > 0.9 and blurred.float().mean() < 0.1 and correct > 0.9
    again = evaluate.train_probe(tmp_path / "probe.safetensors", 64)
    assert all(torch.equal(a, b) for a, b in zip(probe.state_dict().values(), again.state_dict().values()))


def test_squeezenet_features_are_named_for_what_they_are(tiny_run, tmp_path, shared):
    trunk = str(shared("weights/lpips/squeezenet1_1_features.pth"))
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), n=20, images=20, steps=2, perceptual="squeeze", lpips_trunk=trunk)
    entry = evaluate.main(cfg)
    assert {"SqueezeNet-FD", "SqueezeNet-KID"} <= set(entry["generation"]["samples"])
    assert set(entry["reconstruction"]["DA-VAE"]) == {"psnr", "ssim", "lpips", "images", "positions"}


def test_squeezenet_features_do_not_change_with_the_length_of_the_map_at_a_position(monkeypatch):
    maps = torch.rand(2, 512, 3, 3)

    class Fake(torch.nn.Module):
        def scaling_layer(self, x):
            return x

        def net(self, x):
            return [None, maps * x]
    monkeypatch.setattr(evaluate, "make_lpips", lambda *args: Fake())
    _, network = evaluate.feature_network(evaluate.Config(features="squeeze"), "", 64, procedural=False)
    (a, logits), (b, _) = network(torch.ones(2, 1, 3, 3)), network(torch.arange(1.0, 10).view(1, 1, 3, 3))
    assert torch.allclose(a, b, rtol=1e-5) and logits.shape == (2, 0)
    maps = torch.ones(2, 512, 3, 3)
    assert torch.allclose(network(torch.full((2, 1, 3, 3), 7.0))[0], torch.ones(2, 512))       # mean square over channels: 1


def test_inception_features_are_torch_fidelitys_of_the_uint8_images(tmp_path):
    train_vae.import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):              # the published weights cannot be had offline
        def load_state_dict(self, *args, **kwargs):
            pass

    torch.save({}, tmp_path / "empty.pt")
    theirs = Untrained("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "empty.pt"))
    torch.save(theirs.eval().state_dict(), tmp_path / "weights.pt")
    cfg = evaluate.Config(inception_weights=str(tmp_path / "weights.pt"))
    name, network = evaluate.feature_network(cfg, tmp_path, 32, procedural=False)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected, logits = theirs(torch.as_tensor(evaluate.data.to_uint8(x)).permute(0, 3, 1, 2))
        assert name == "Inception" and expected.shape == (2, 2048) and logits.shape == (2, 1008)
        assert all(torch.allclose(*pair) for pair in zip(network(x), (expected, logits)))


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
        evaluate.held_out(evaluate.Config(run="r"), {"data_dir": "photos/train", "seed": 0, "image_size": 64})


@pytest.mark.parametrize("changes,sentence", [(dict(features="inception"), "with --inception_weights="),
                                              (dict(features="fid"), "wanted inception"),
                                              (dict(features="probe"), "knows the procedural images only")])
def test_features_that_cannot_be_had_are_named(changes, sentence):
    with pytest.raises(SystemExit, match=sentence):
        evaluate.feature_network(evaluate.Config(**changes), Path("."), 64, procedural=False)


# ---------------------------------------------------------------- Inception metrics and references


def test_precision_and_recall_of_a_set_with_itself_are_one_and_of_distant_sets_zero():
    f, logits = features(50, 6, 1), torch.zeros(50, 4)
    same, far = (evaluate.inception_metrics(f, logits, real) for real in (f, f + 100))
    assert (same["precision"], same["recall"], far["precision"], far["recall"]) == (1, 1, 0, 0)


def test_inception_score_is_one_for_equal_guesses_and_the_number_of_classes_for_sure_and_balanced_ones():
    assert evaluate.inception_metrics(None, torch.zeros(60, 8)) == {"IS": pytest.approx(1)}         # no reals: no recall
    assert evaluate.inception_metrics(None, 100 * torch.eye(8).repeat(10, 1))["IS"] == pytest.approx(8)


def pool(x):
    """A stand-in for a feature network: the mean colour of each quadrant, and no logits."""
    f = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    return f, f[:, :0]


def test_a_reference_of_images_and_one_of_their_statistics_give_the_same_distance(tmp_path):
    arr_0 = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=arr_0)
    a, f, n = evaluate.read_reference(tmp_path / "images.npz", "Inception", pool)
    x = evaluate.data.to_tensor(arr_0)
    assert n == 60 and torch.allclose(f, pool(x)[0])
    np.savez(tmp_path / "statistics.npz", mu=f.double().numpy().mean(0), sigma=np.cov(f.double().numpy(), rowvar=False))
    b, none, n = evaluate.read_reference(tmp_path / "statistics.npz", "Inception", pool)
    assert none is None and n == 0 and abs(frechet_distance(a, b)) < 1e-6
    other = moments(features(40, 12, 0))
    assert frechet_distance(other, a) == pytest.approx(frechet_distance(other, b), rel=1e-9)


@pytest.mark.parametrize("arrays,sentence", [(dict(mu=[0.0]), r"wanted arr_0 \(images\), or mu and sigma; found \['mu'\]"),
                                             (dict(mu=[0.0], sigma=[[1.0]], features="Probe"), "statistics of Probe features"),
                                             (None, "not an npz file")])
def test_a_reference_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, arrays, sentence):
    path = tmp_path / "r.npz"
    path.write_text("text") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(SystemExit, match=sentence):
        evaluate.read_reference(path, "Inception", pool)


def test_a_kept_reference_measures_like_the_images_it_was_made_of(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.train_probe, "__defaults__", (5,))
    cfg = dict(run=tiny_run, out=str(tmp_path / "m.json"), n=12, images=20, steps=1)
    kept = evaluate.main(evaluate.Config(**cfg, keep_reference=str(tmp_path / "r.npz")))
    read = evaluate.main(evaluate.Config(**cfg, reference=str(tmp_path / "r.npz")))
    for row in kept["generation"]:
        assert read["generation"][row]["Probe-FD"] == pytest.approx(kept["generation"][row]["Probe-FD"], rel=1e-6)
        assert "Probe-KID" in kept["generation"][row] and "Probe-KID" not in read["generation"][row]   # needs the features
    assert kept["settings"]["reference"] == "20 images of procedural"


@pytest.mark.parametrize("n,key", [(49_999, "Inception-FID@49999"), (50_000, "Inception-FID-50k")])
def test_only_fifty_thousand_samples_are_called_fid_50k(n, key, monkeypatch):
    class Run:                                                     # draws nothing: every sample is the same noise
        cfg = evaluate.Config(n=n, batch_size=n)
        vae = device = None
        config = {"config": {"data_dir": "photos"}, "model": {}}
        class dit:
            class cfg:
                D = 0
    x = torch.rand(100, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(evaluate, "feature_network", lambda *args: ("Inception", lambda x: (pool(x)[0], torch.zeros(len(x), 2))))
    monkeypatch.setattr(evaluate.sample, "generate", lambda dit, vae, indices, s, text: [x.repeat(len(indices) // 100 + 1, 1, 1, 1)[:len(indices)]] * 2)
    monkeypatch.setattr(evaluate, "inception_metrics", lambda *args: {})
    assert key in evaluate.generation(Run, x, {"classes": [0]})["samples"]


# ---------------------------------------------------------------- two runs side by side


def entry(tmp_path, name, fid, **settings):
    n = settings.get("n", 10)
    (tmp_path / name).mkdir()
    common.write_json(tmp_path / name / "metrics.json", [{"settings": {"n": n, "image_size": 64, **settings},
                      "reconstruction": {"DA-VAE": {"psnr": 20 + fid}}, "generation": {"samples": {f"Inception-FID@{n}": fid}}}])
    return str(tmp_path / name)


def test_compare_marks_the_better_of_equal_settings_and_refuses_to_rank_fid_at_10_against_fid_at_20(tmp_path):
    a, b, c = entry(tmp_path, "a", 5.0), entry(tmp_path, "b", 7.0), entry(tmp_path, "c", 9.0, n=20)
    _, psnr, fid = evaluate.compare(a, b)
    assert psnr.split() == "DA-VAE psnr 25 27*".split() and fid.split() == "samples Inception-FID 5* 7".split()
    _, psnr, fid = evaluate.compare(a, c)
    assert fid.endswith("not ranked: n 10 / 20") and "*" not in fid and "*" in psnr        # n is of samples, not of images
    with pytest.raises(SystemExit, match="make it with: python evaluate.py"):
        evaluate.compare(a, str(tmp_path / "nowhere"))


# ---------------------------------------------------------------- the paper's analyses


def test_the_spectrum_of_white_noise_is_flat_and_of_a_cosine_has_its_peak_at_that_frequency():
    f, power = evaluate.radial_power(torch.randn(400, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 3)
    assert f.tolist() == [k / 16 for k in range(1, 9)] and torch.allclose(power, torch.ones(8).double(), atol=0.05)
    wave = torch.cos(2 * torch.pi * 5 / 16 * torch.arange(16)).expand(1, 1, 16, 16)
    f, power = evaluate.radial_power(wave)
    assert f[power.argmax()] == 5 / 16 and power.sum() == pytest.approx(power.max().item(), rel=1e-6)


def test_zero_random_and_true_details_score_the_same_where_the_decoder_ignores_details(tiny_vae):
    vae, x = load_davae(tiny_vae), torch.rand(4, 3, 64, 64) * 2 - 1
    run = evaluate.SimpleNamespace(vae=vae, x=x, device=torch.device("cpu"), lpips=None)
    with torch.no_grad():
        scores = {row["psnr"] for row in evaluate.sensitivity(run)["table"].values()}
        assert len(scores) == 3
        decode, mean = vae.decode, vae.encode(x)[:, vae.C:].mean()
        vae.decode = lambda z_all: decode(torch.cat([z_all[:, :vae.C], torch.full_like(z_all[:, vae.C:], mean)], dim=1))
        assert len({row["psnr"] for row in evaluate.sensitivity(run)["table"].values()}) == 1


def test_loss_by_time_is_zero_for_the_oracle_and_the_known_error_where_it_is_off_by_t():
    z_all, C = torch.randn(600, 3, 2, 2, generator=torch.Generator().manual_seed(0)), 1
    offset = torch.tensor([1.0, 2.0, 2.0]).view(1, 3, 1, 1)

    def oracle(x, t, z, wrong):                    # v* = (z - x_t) / (1 - t): the condition gives the data away
        s = t.view(-1, 1, 1, 1)
        return (z - x) / (1 - s) + wrong.view(-1, 1, 1, 1) * s * offset

    right, off = (evaluate.loss_by_time(oracle, z_all, [z_all, torch.full((600,), w)], C) for w in (0.0, 1.0))
    assert right.shape == (10, 2) and right.max() < 1e-4
    square = torch.tensor([10 * (((k + 1) / 10) ** 3 - (k / 10) ** 3) / 3 for k in range(10)])     # the mean of t^2 in a bin
    assert torch.allclose(off[1:, 0], square[1:], rtol=0.06) and torch.allclose(off[:, 1], 4 * off[:, 0], rtol=1e-2, atol=1e-3)


def test_principal_components_show_the_one_direction_in_which_the_latents_vary():
    gradient = torch.linspace(-1, 1, 4).view(1, 1, 1, 4).expand(2, 1, 4, 4)
    noise = 1e-3 * torch.randn(2, 6, 4, 4)
    run = evaluate.SimpleNamespace(x=torch.zeros(2, 3, 8, 8), vae=evaluate.SimpleNamespace(C=3, D=3),
                                   z_all=gradient * torch.tensor([1.0, 2, 3, 4, 5, 6]).view(1, 6, 1, 1) + noise)
    pictures = evaluate.latents(run)["pictures"]
    first = pictures["base, PCA"][:, 0]
    assert first.shape == (2, 8, 8) and (first[:, :, 0] * first[:, :, -1]).max() < 0
    expected = gradient[:, 0] / gradient.std() / 2
    assert torch.allclose(first[:, ::2, ::2].abs(), expected.abs(), atol=0.02)


@pytest.mark.parametrize("name,files", [("sensitivity", ["_images.png"]), ("spectrum", [".png"]), ("timebins", [".png"]),
                                        ("latents", ["_images.png"])])
def test_each_analysis_writes_its_numbers_and_figures(tiny_run, tmp_path, name, files):
    evaluate.analyse(name, evaluate.Config(run=tiny_run, out=str(tmp_path / "new"), images=12))
    for file in files:
        assert Image.open(tmp_path / "new" / f"analysis_{name}{file}").width >= 700
    found = json.loads((tmp_path / "new" / f"analysis_{name}.json").read_text())
    assert found["settings"]["images"] == 12 and ("pictures" in found) is False


def test_an_analysis_that_cannot_be_made_says_what_is_wanted(tiny_vae):
    with pytest.raises(SystemExit, match="wanted one of sensitivity, spectrum, timebins, latents, then a run"):
        evaluate.analyse("spektrum", evaluate.Config())
    with pytest.raises(SystemExit, match="wanted a class-conditional run of finetune.py"):
        evaluate.analyse("timebins", evaluate.Config(run=tiny_vae, images=4))
    with pytest.raises(SystemExit, match="has no detail channels"):
        evaluate.analyse("spectrum", evaluate.Config(run=str(Path(tiny_vae).parent / "base-vae")))
