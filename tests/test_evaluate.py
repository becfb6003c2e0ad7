"""evaluate.py: metrics against closed forms and torch-fidelity, rows that mean what they say, files that lose nothing."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from support.weights import load_davae
from support.metrics import distances, frechet_distance, moments, ssim
from support import data, metrics, runs


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


@pytest.mark.parametrize("n,m,d", [(600, 500, 24), (20, 30, 64)])              # the second: covariances of rank 19 and 29
def test_frechet_distance_agrees_with_torch_fidelity(n, m, d):
    metrics.import_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    a, b = features(n, d, 2), features(m, d, 3, shift=0.3, scale=1.5)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(f) for f in (a, b)), verbose=False)
    ours = frechet_distance(moments(a), moments(b))
    assert np.isfinite(ours) and ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_distances_have_their_own_names_and_kid_is_zero_for_equal_gaussians_only():
    a, b, c = features(800, 8, 4), features(800, 8, 5), features(800, 8, 6, shift=0.5)
    near, far = (distances("SqueezeNet", f, moments(a), real=a) for f in (b, c))
    assert set(near) == {"SqueezeNet-FD", "SqueezeNet-KID"} and abs(near["SqueezeNet-KID"]) < 0.02 < far["SqueezeNet-KID"]
    assert far["SqueezeNet-FD"] == frechet_distance(moments(c), moments(a))
    assert set(distances("Probe", b, moments(a))) == {"Probe-FD"}              # a reference of statistics alone: no KID


@pytest.mark.parametrize("n,name", [(49_999, "Inception-FID@49999"), (50_000, "Inception-FID-50k")])
def test_only_fifty_thousand_samples_are_called_fid_50k(n, name):
    f = features(n, 2, 0)
    assert list(distances("Inception", f, moments(f))) == [name]


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


def no_features(x):
    return x.new_empty(len(x), 0), x.new_empty(len(x), 0)


def stand_in(**parts):
    """A run as `load` makes it, as far as a test needs one; without a feature network."""
    return evaluate.SimpleNamespace(**{**dict(device=torch.device("cpu"), lpips=None, settings={}, rank=0, world=1, features="",
                                              network=no_features, config={"model": {}}, checkpoint=""), **parts})


def test_reconstruction_rows_are_what_their_names_say(tiny_vae, monkeypatch):
    vae, x = load_davae(tiny_vae), torch.rand(5, 3, 64, 64) * 2 - 1
    run = stand_in(vae=vae)
    monkeypatch.setattr(metrics, "feature_network", lambda run: ("Inception", pool, "Inception, sha256 0"))
    table, real = evaluate.reconstruction(run, x.split(2))
    assert list(table) == ["base only, bilinear", "base only, bicubic", "DA-VAE", "base VAE, full size"]
    assert [row["positions"] for row in table.values()] == [64, 64, 64, 256]
    with torch.no_grad():
        full, small = vae.decode(vae.encode(x)), vae.base.decode(vae.encode_base(x))
        bilinear = torch.nn.functional.interpolate(small, size=(64, 64), mode="bilinear", align_corners=False)
        base = vae.base.decode(vae.base.encode(x))
    for row, y in (("DA-VAE", full), ("base VAE, full size", base), ("base only, bilinear", bilinear)):
        assert table[row]["psnr"] == pytest.approx(metrics.psnr(x, y).mean().item(), rel=1e-5)    # whatever the batches
        expected = frechet_distance(moments(pool(y.clamp(-1, 1))[0]), moments(pool(x)[0]))         # rFID
        assert table[row]["Inception-FID@5"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert torch.equal(real, pool(x)[0]) and run.settings["held_out"].startswith("5 images, sha256 ")


# ---------------------------------------------------------------- the script


def test_evaluate_names_its_features_and_adds_to_what_is_there(tiny_run, tmp_path):
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "metrics.json"), n=20, images=20, steps=2, batch_size=10)
    evaluate.main(cfg)
    evaluate.main(cfg)
    evaluate.main(evaluate.Config(**{**cfg.__dict__, "steps": 3}))
    entries = json.loads((tmp_path / "metrics.json").read_text())
    assert [e["settings"]["steps"] for e in entries] == [2, 3]             # the same settings replace, others are added
    rows = entries[0]["generation"]
    assert set(rows) == {"samples", "base only, bilinear", "base only, bicubic"}
    assert set(rows["samples"]) == {"Probe-FD", "Probe-KID", "judged sharp", "class recognised", "img/s"}
    assert not any("FID" in key for row in rows.values() for key in row)
    settings = entries[0]["settings"]
    assert settings["cfg"] == 2.0 and settings["torch"] == torch.__version__ and settings["batch_size"] == 10
    assert settings["held_out"] == settings["reference"] == entries[1]["settings"]["held_out"]
    assert settings["dit_hash"] == entries[1]["settings"]["dit_hash"] and len(settings["vae_hash"]) == 16


def test_hashes_change_with_one_weight_and_with_one_name_but_not_with_the_place():
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    b.load_state_dict(a.state_dict())
    assert runs.hash_of(a) == runs.hash_of(b) != runs.hash_of(torch.nn.Sequential(a))
    b.bias.data[0] += 1e-6
    assert runs.hash_of(a) != runs.hash_of(b)


def test_two_processes_measure_what_one_does(tiny_run, tmp_path):
    """Samples and images are shared out; rows come back in order, so that labels still belong to their samples."""
    flags = [tiny_run, "--n=11", "--images=13", "--steps=2", "--batch_size=4", "--device=cpu"]
    script, entries = [str(Path(evaluate.__file__))], []
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"])):
        done = subprocess.run([sys.executable, *launch, *script, *flags, f"--out={tmp_path / name}.json"], capture_output=True,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        entries.append(json.loads((tmp_path / f"{name}.json").read_text())[0])
    one, two = entries
    assert two["settings"]["processes"] == 2 and one["settings"]["held_out"] == two["settings"]["held_out"]
    for section in ("reconstruction", "generation"):
        for row, values in one[section].items():
            values.pop("img/s", None)
            for metric, value in values.items():
                assert two[section][row][metric] == pytest.approx(value, rel=1e-3, abs=1e-4), (row, metric)


def test_a_base_model_alone_has_the_upsampled_rows_only(tiny_base, tmp_path):
    entry = evaluate.main(evaluate.Config(run=tiny_base, out=str(tmp_path / "m.json"), n=10, images=10, steps=1))
    assert list(entry["generation"]) == ["base only, bilinear", "base only, bicubic"]


def test_the_probe_sees_lost_detail():
    with torch.no_grad():
        probe, again = metrics.make_probe(64), metrics.make_probe(64)
        x, y = next(data.read(data.open_dataset("procedural", 64, 100, seed=77), range(100)))
        for kind in ("bilinear", "bicubic"):
            sharp, blurred = (probe(i)[:, 10] > 0 for i in (x, metrics.doubled(evaluate.half(x))[f"base only, {kind}"]))
            assert sharp.float().mean() > 0.9 and blurred.float().mean() < 0.1
    assert (probe(x)[:, :10].argmax(1) == y).float().mean() > 0.9
    assert runs.hash_of(probe) == runs.hash_of(again)


def test_squeezenet_features_are_named_for_what_they_are(tiny_run, tmp_path, shared):
    trunk = str(shared("weights/lpips/squeezenet1_1_features.pth"))
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), n=20, images=20, steps=2, perceptual="squeeze", lpips_trunk=trunk)
    entry = evaluate.main(cfg)
    assert {"SqueezeNet-FD", "SqueezeNet-KID"} <= set(entry["generation"]["samples"])
    assert set(entry["reconstruction"]["DA-VAE"]) == {"psnr", "ssim", "lpips", "images", "positions", "SqueezeNet-FD"}


def feature_network(data_dir="photos", **changes):
    config = {"config": {"data_dir": data_dir, "image_size": 64}}
    return metrics.feature_network(evaluate.SimpleNamespace(cfg=evaluate.Config(**changes), config=config, device="cpu"))


def test_squeezenet_features_do_not_change_with_the_length_of_the_map_at_a_position(monkeypatch):
    maps = torch.rand(2, 512, 3, 3)

    class Fake(torch.nn.Module):
        def scaling_layer(self, x):
            return x

        def net(self, x):
            return [None, maps * x]
    monkeypatch.setattr(evaluate, "make_lpips", lambda *args: Fake())
    _, network, _ = feature_network(features="squeeze")
    (a, logits), (b, _) = network(torch.ones(2, 1, 3, 3)), network(torch.arange(1.0, 10).view(1, 1, 3, 3))
    assert torch.allclose(a, b, rtol=1e-5) and logits.shape == (2, 0)
    maps = torch.ones(2, 512, 3, 3)
    assert torch.allclose(network(torch.full((2, 1, 3, 3), 7.0))[0], torch.ones(2, 512))       # mean square over channels: 1


def test_inception_features_are_torch_fidelitys_of_the_uint8_images(tmp_path):
    metrics.import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):              # the published weights cannot be had offline
        def load_state_dict(self, *args, **kwargs):
            pass

    torch.save({}, tmp_path / "empty.pt")
    theirs = Untrained("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "empty.pt"))
    torch.save(theirs.eval().state_dict(), tmp_path / "weights.pt")
    name, network, described = feature_network(inception_weights=str(tmp_path / "weights.pt"))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected, logits = theirs(torch.as_tensor(data.to_uint8(x)).permute(0, 3, 1, 2))
        assert described.startswith("Inception, sha256 ") and name == "Inception" and expected.shape == (2, 2048) and logits.shape == (2, 1008)
        assert all(torch.allclose(*pair) for pair in zip(network(x), (expected, logits)))


def test_a_vae_run_gets_reconstruction_only(tiny_vae, tmp_path):
    entry = evaluate.main(evaluate.Config(run=tiny_vae, out=str(tmp_path / "m.json"), images=8))
    assert "generation" not in entry and np.isfinite(entry["reconstruction"]["DA-VAE"]["ssim"])


def test_whole_images_are_measured_at_their_own_size(tiny_vae, tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a", (33, 50)), ("b", (64, 16))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    dataset = data.open_dataset(tmp_path, 0)
    shapes = [tuple(x.shape[2:]) for x, _ in data.read(dataset, [0, 1], whole=8)]
    assert shapes == [(32, 48), (64, 16)]
    entry = evaluate.main(evaluate.Config(run=tiny_vae, out=str(tmp_path / "m.json"), data_dir=str(tmp_path), whole=True))
    assert entry["reconstruction"]["DA-VAE"]["images"] == 2
    with pytest.raises(SystemExit, match="give held-out images with --data_dir="):
        evaluate.main(evaluate.Config(run=tiny_vae, whole=True))


def test_a_photo_run_asks_for_held_out_images():
    with pytest.raises(SystemExit, match="was trained on photos/train: give held-out images with --data_dir="):
        evaluate.held_out(evaluate.Config(run="r"), {"data_dir": "photos/train", "seed": 0, "image_size": 64})


@pytest.mark.parametrize("changes,sentence", [(dict(features="inception"), "with --inception_weights="),
                                              (dict(features="fid"), "wanted inception"),
                                              (dict(features="probe"), "knows the procedural images only")])
def test_features_that_cannot_be_had_are_named(changes, sentence):
    with pytest.raises(SystemExit, match=sentence):
        feature_network(**changes)


# ---------------------------------------------------------------- Inception metrics and references


def inception(f, logits, real=None):
    return distances("Inception", f, moments(f), logits, real)


def test_precision_and_recall_of_a_set_with_itself_are_one_and_of_distant_sets_zero():
    f, logits = features(50, 6, 1), torch.zeros(50, 4)
    same, far = (inception(f, logits, real) for real in (f, f + 100))
    assert (same["precision"], same["recall"], far["precision"], far["recall"]) == (1, 1, 0, 0)


def test_inception_score_is_one_for_equal_guesses_and_the_number_of_classes_for_sure_and_balanced_ones():
    f = features(80, 6, 1)
    assert inception(f[:60], torch.zeros(60, 8))["IS"] == pytest.approx(1)
    sure = inception(f, 100 * torch.eye(8).repeat(10, 1))
    assert sure["IS"] == pytest.approx(8) and "recall" not in sure                                  # no reals: no recall


def pool(x):
    """A stand-in for a feature network: the mean colour of each quadrant, and no logits."""
    f = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    return f, f[:, :0]


def test_a_reference_of_images_and_one_of_their_statistics_give_the_same_distance(tmp_path):
    arr_0 = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=arr_0)
    a, f, named = metrics.read_reference(tmp_path / "images.npz", "Inception, sha256 0", pool)
    x = data.to_tensor(arr_0)
    assert named.startswith("60 images, sha256 ") and torch.allclose(f, pool(x)[0])
    np.savez(tmp_path / "statistics.npz", mu=f.double().numpy().mean(0), sigma=np.cov(f.double().numpy(), rowvar=False))
    b, none, other = metrics.read_reference(tmp_path / "statistics.npz", "Inception, sha256 0", pool)
    assert none is None and other.startswith("? images, sha256 ") and other[-16:] != named[-16:] and abs(frechet_distance(a, b)) < 1e-6
    other = moments(features(40, 12, 0))
    assert frechet_distance(other, a) == pytest.approx(frechet_distance(other, b), rel=1e-9)


@pytest.mark.parametrize("arrays,sentence", [(dict(mu=[0.0]), r"wanted arr_0 \(images\), or mu and sigma, .* found \['mu'\]"),
                                             (dict(mu=[0.0], sigma=[[1.0]], features="Probe, sha256 0"), "Probe, sha256 0"),
                                             (None, "not an npz file")])
def test_a_reference_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, arrays, sentence):
    path = tmp_path / "r.npz"
    path.write_text("text") if arrays is None else np.savez(path, **arrays)
    with pytest.raises(SystemExit, match=sentence):
        metrics.read_reference(path, "Inception", pool)


def test_a_kept_reference_measures_like_the_images_it_was_made_of(tiny_run, tmp_path):
    cfg = dict(run=tiny_run, out=str(tmp_path / "m.json"), n=12, images=20, steps=1)
    kept = evaluate.main(evaluate.Config(**cfg, keep_reference=str(tmp_path / "r.npz")))
    read = evaluate.main(evaluate.Config(**cfg, reference=str(tmp_path / "r.npz")))
    for row in kept["generation"]:
        assert read["generation"][row]["Probe-FD"] == pytest.approx(kept["generation"][row]["Probe-FD"], rel=1e-6)
        assert "Probe-KID" in kept["generation"][row] and "Probe-KID" not in read["generation"][row]   # needs the features
    assert kept["settings"]["reference"].startswith("20 images, ") and read["settings"]["reference"].startswith("20 images, ")


def test_clip_scores_are_the_cosines_that_transformers_own_logits_hold(tmp_path, sd3_folder):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    tokenizer, small = CLIPTokenizer.from_pretrained(sd3_folder / "tokenizer"), dict(hidden_size=16, intermediate_size=32)
    torch.manual_seed(0)
    small |= dict(num_hidden_layers=2, num_attention_heads=2)
    model = CLIPModel(CLIPConfig(text_config=dict(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1, **small),
                                 vision_config=dict(image_size=28, patch_size=14, **small), projection_dim=8)).eval()
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), tokenizer)
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    score, _ = metrics.clip_scorer(tmp_path, "cpu")
    x, texts = torch.rand(3, 3, 40, 40) * 2 - 1, ["a fox", "the sea, a house and a very long road", "fog"]
    with torch.no_grad():
        inputs = processor(text=texts, images=list(data.to_uint8(x)), return_tensors="pt", padding=True)
        cosines = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
        assert cosines.std() > 1e-3 and torch.allclose(score(x, texts), 100 * cosines.clamp_min(0), atol=1e-4)
    with pytest.raises(SystemExit, match="wanted a local folder of a CLIP model"):
        metrics.clip_scorer(tmp_path / "nowhere", "cpu")


def test_each_sample_is_scored_against_its_own_prompt(monkeypatch):
    of_details = evaluate.SimpleNamespace(D=1, cfg=evaluate.SimpleNamespace(D=1))
    run = stand_in(vae=of_details, dit=of_details, cfg=evaluate.Config(n=5, batch_size=2, clip="folder"),
                   settings={"held_out": "", "features": ""})
    seen = []
    monkeypatch.setattr(evaluate.sample, "settings_of", lambda *args: {"prompts": ["a", "b", "c"]})
    monkeypatch.setattr(evaluate.sample, "text_of", lambda *args: "a cache of texts")
    monkeypatch.setattr(evaluate.sample, "generate", lambda dit, vae, indices, *args: (
        torch.tensor(list(indices)).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).float(), torch.zeros(len(indices), 3, 2, 2)))

    def clip(x, texts):
        seen.extend((int(i), text) for i, text in zip(x[:, 0, 0, 0], texts) if i)
        return x[:, 0, 0, 0]

    monkeypatch.setattr(metrics, "clip_scorer", lambda *args: (clip, "hash"))
    table = evaluate.generation(run, torch.zeros(2, 1))
    assert seen == [(1, "b"), (2, "c"), (3, "a"), (4, "b")] and table["samples"]["CLIP"] == 2.0 and run.settings["clip"] == "hash"


# ---------------------------------------------------------------- two runs side by side


def entry(tmp_path, name, fid, **settings):
    settings = {"n": 10, "image_size": 64, "held_out": "9 images", "reference": "9 images", "features": "Inception, sha256 0",
                **settings}
    (tmp_path / name).mkdir()
    runs.write_json(tmp_path / name / "metrics.json", [{"settings": {k: v for k, v in settings.items() if v is not None},
                      "reconstruction": {"DA-VAE": {"psnr": 20 + fid}},
                      "generation": {"samples": {f"Inception-FID@{settings['n']}": fid}}}])
    return str(tmp_path / name)


def test_compare_marks_the_better_of_equal_settings_and_refuses_to_rank_fid_at_10_against_fid_at_20(tmp_path):
    a, b, c = entry(tmp_path, "a", 5.0), entry(tmp_path, "b", 7.0), entry(tmp_path, "c", 9.0, n=20)
    _, psnr, fid, differ = evaluate.compare(a, b)
    assert psnr.split() == "DA-VAE psnr 25 27*".split() and fid.split() == "samples Inception-FID 5* 7".split()
    assert differ == "they differ in: "
    _, psnr, fid, differ = evaluate.compare(a, c)
    assert fid.endswith("not ranked: n 10 / 20") and "*" not in fid and "*" in psnr        # n is of samples, not of images
    assert differ == "they differ in: n 10 / 20"
    with pytest.raises(SystemExit, match="make it with: python evaluate.py"):
        evaluate.compare(a, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("changes,ranked", [(dict(held_out="8 images"), {"fid"}), (dict(reference="8 images"), {"psnr"}),
                                            (dict(steps=9), {"fid", "psnr"}), (dict(features="Inception, sha256 1"), {"psnr"}), (dict(held_out=None), {"fid"})])
def test_compare_ranks_by_what_a_metric_depends_on_and_by_nothing_unknown(tmp_path, changes, ranked):
    _, psnr, fid, differ = evaluate.compare(entry(tmp_path, "a", 5.0), entry(tmp_path, "b", 7.0, **changes))
    assert {name for name, line in (("psnr", psnr), ("fid", fid)) if "*" in line} == ranked and next(iter(changes)) in differ
    _, psnr, fid, _ = evaluate.compare(*(entry(tmp_path, name, fid, held_out=None) for name, fid in (("c", 1.0), ("d", 2.0))))
    assert "*" not in psnr and psnr.endswith("not ranked: held_out unknown / unknown") and "*" in fid


# ---------------------------------------------------------------- the paper's analyses


def spectrum(z):
    run = stand_in(z_all=z, groups={"base": z})
    (_, _, _, curves), = evaluate.spectrum(run)["panels"]
    return map(torch.tensor, curves["base"])


def test_the_spectrum_of_white_noise_is_flat_and_of_a_cosine_has_its_peak_at_that_frequency():
    f, power = spectrum(torch.randn(400, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 3)
    assert f.tolist() == [k / 16 for k in range(1, 9)] and torch.allclose(power, torch.ones(8), atol=0.05)
    f, power = spectrum(torch.cos(2 * torch.pi * 5 / 16 * torch.arange(16)).expand(1, 1, 16, 16))
    assert f[power.argmax()] == 5 / 16 and power.sum() == pytest.approx(power.max().item(), rel=1e-6)


def test_zero_random_and_true_details_score_the_same_where_the_decoder_ignores_details(tiny_vae, monkeypatch):
    vae, x = load_davae(tiny_vae), torch.rand(4, 3, 64, 64) * 2 - 1
    run = stand_in(vae=vae, x=x, zero=(-vae.mean / vae.std).view(1, -1, 1, 1))
    monkeypatch.setattr(metrics, "feature_network", lambda run: ("", no_features, ""))
    with torch.no_grad():
        scores = {row["psnr"] for row in evaluate.sensitivity(run)["table"].values()}
        assert len(scores) == 3
        decode, mean = vae.decode, vae.encode(x)[:, vae.C:].mean()
        vae.decode = lambda z_all: decode(torch.cat([z_all[:, :vae.C], torch.full_like(z_all[:, vae.C:], mean)], dim=1))
        assert len({row["psnr"] for row in evaluate.sensitivity(run)["table"].values()}) == 1


def test_knock_out_finds_the_one_group_that_the_decoder_looks_at():
    """C = 2, D = 6, groups {0, 1, 2} and {3, 4, 5}; the decoder shows detail channel 4 and nothing else."""
    vae = evaluate.SimpleNamespace(C=2, D=6, decode=lambda z_all: z_all[:, 6:7].expand(-1, 3, -1, -1))
    z_all = torch.rand(4, 8, 2, 2) - 0.5
    run = stand_in(vae=vae, z_all=z_all, x=z_all[:, 6:7].expand(-1, 3, -1, -1) + 0.01, zero=torch.zeros(1, 6, 1, 1))
    (_, _, _, lost), (_, _, _, kept) = evaluate.knockout(run)["panels"]
    assert lost["one group"][0] == [0, 1] and lost["one group"][1][0] == 0 and lost["one group"][1][1] > 20
    assert kept["k"][0] == [0, 3, 6] and kept["k"][1][0] == kept["k"][1][1] < kept["k"][1][2] == pytest.approx(46.02, abs=0.01)


def test_loss_by_time_is_zero_for_the_oracle_and_the_known_error_where_it_is_off_by_t():
    z_all = torch.randn(600, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    offset = torch.tensor([1.0, 2.0, 2.0]).view(1, 3, 1, 1)

    def curves(wrong):
        def oracle(x, t, y):                       # v* = (z - x_t) / (1 - t): the label gives the data away
            s = t.view(-1, 1, 1, 1)
            return (z_all[y] - x) / (1 - s) + wrong * s * offset

        run = stand_in(dit=oracle, config={"model": {}, "classes": []}, classes=[], z_all=z_all, y=torch.arange(600),
                       vae=evaluate.SimpleNamespace(C=1, D=2))
        (_, _, _, found), = evaluate.timebins(run)["panels"]
        assert found["base"][0] == pytest.approx([0.05 + 0.1 * k for k in range(10)])
        return torch.tensor([found["base"][1], found["detail"][1]])

    right, (base, detail) = curves(0.0), curves(1.0)
    assert right.shape == (2, 10) and right.max() < 1e-4
    square = torch.tensor([10 * (((k + 1) / 10) ** 3 - (k / 10) ** 3) / 3 for k in range(10)])     # the mean of t^2 in a bin
    assert torch.allclose(base[1:], square[1:], rtol=0.06) and torch.allclose(detail, 4 * base, rtol=1e-2, atol=1e-3)


def test_smoothed_losses_keep_a_line_and_flatten_noise(tmp_path):
    rows = [{"step": 10 * k, "base": 3.0 - k, "detail": (-1.0) ** k} for k in range(30)] + [{"step": 300, "psnr": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = stand_in(checkpoint=tmp_path / "step_000300")
    (_, label, _, base), (_, _, _, detail) = evaluate.losses(run)["panels"]
    assert label.startswith("base") and list(base) == ["as logged", "mean of 7"] and base["as logged"][0][-1] == 290
    assert base["mean of 7"][1][3:-3] == pytest.approx(base["as logged"][1][3:-3]) and base["mean of 7"][1][0] == 1.5
    assert max(map(abs, detail["mean of 7"][1])) < 0.3 and min(map(abs, detail["as logged"][1])) == 1
    with pytest.raises(SystemExit, match="wanted the log of a DA-VAE run of finetune.py"):
        evaluate.losses(stand_in(checkpoint=tmp_path / "elsewhere" / "step_000300"))


def test_tsne_keeps_apart_what_is_apart_and_counts_neighbours_of_the_same_class():
    y = torch.arange(60) // 25                     # 25, 25 and 10 of them
    apart = torch.eye(3)[y].view(60, 3, 1, 1) * 10 + torch.randn(60, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    run = stand_in(y=y, classes=["a", "b", "c"], groups={"base": apart, "detail": torch.randn(60, 3, 1, 1)})
    found = evaluate.tsne(run)
    assert found["table"]["base"]["nearest of same class"] == 1 > found["table"]["detail"]["nearest of same class"]
    (name, _, _, curves), _ = found["panels"]
    points = [np.array(curves[c]).T for c in "abc"]                                             # (25, 2) or (10, 2)
    spread, centres = max(p.std(0).max() for p in points), [p.mean(0) for p in points]
    assert name == "base" and all(np.linalg.norm(centres[i] - centres[i - 1]) > 3 * spread for i in range(3))


def test_principal_components_show_the_one_direction_in_which_the_latents_vary():
    gradient = torch.linspace(-1, 1, 4).view(1, 1, 1, 4).expand(2, 1, 4, 4)
    noise = 1e-3 * torch.randn(2, 6, 4, 4)
    z_all = gradient * torch.tensor([1.0, 2, 3, 4, 5, 6]).view(1, 6, 1, 1) + noise
    run = stand_in(x=torch.zeros(2, 3, 8, 8), groups={"base": z_all[:, :3], "detail": z_all[:, 3:]})
    pictures = evaluate.latents(run)["pictures"]
    first = pictures["base, PCA"][:, 0]
    assert first.shape == (2, 8, 8) and (first[:, :, 0] * first[:, :, -1]).max() < 0
    expected = gradient[:, 0] / gradient.std() / 2
    assert torch.allclose(first[:, ::2, ::2].abs(), expected.abs(), atol=0.02)


@pytest.mark.parametrize("name,files", [("sensitivity", ["_images.png"]), ("knockout", [".png"]), ("spectrum", [".png"]), ("losses", [".png"]),
                                        ("timebins", [".png"]), ("latents", ["_images.png"]), ("tsne", [".png"])])
def test_each_analysis_writes_its_numbers_and_figures(tiny_run, tiny_vae, tmp_path, name, files):
    evaluate.analyse(name, evaluate.Config(run=tiny_run, out=str(tmp_path / "new"), images=12, other=tiny_vae))
    for file in files:
        assert Image.open(tmp_path / "new" / f"analysis_{name}{file}").width >= 700
    found = json.loads((tmp_path / "new" / f"analysis_{name}.json").read_text())
    assert found["settings"]["images"] == 12 and ("pictures" in found) is False
    if name == "tsne":
        assert [panel[0] for panel in found["panels"]] == ["base", "detail", "detail of vae"]


def test_an_analysis_that_cannot_be_made_says_what_is_wanted(tiny_vae):
    with pytest.raises(SystemExit, match="wanted one of sensitivity, knockout, spectrum, losses, timebins, latents, tsne, then"):
        evaluate.analyse("spektrum", evaluate.Config())
    with pytest.raises(SystemExit, match="wanted a class-conditional run of finetune.py"):
        evaluate.analyse("timebins", evaluate.Config(run=tiny_vae, images=4))
    with pytest.raises(SystemExit, match="has no detail channels"):
        evaluate.analyse("spectrum", evaluate.Config(run=str(Path(tiny_vae).parent / "base-vae")))
