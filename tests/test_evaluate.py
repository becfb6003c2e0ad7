"""evaluate.py: rows that mean what they say, files that lose nothing, rankings of what can be compared."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from support import data, metrics, runs
from support.metrics import FeatureNetwork, frechet_distance, moments
from support.weights import load_davae


def stand_in(**parts):
    """A Run as `load` makes it, as far as a test needs one."""
    run = dict(folder="r", checkpoint=Path("r"), config={"model": {}, "config": {}}, vae=None, dit=None,
               rank=0, world=1, device=torch.device("cpu"))
    return evaluate.Run(**run | parts)


def pool(x):
    """A stand-in for a feature network: the mean colour of each quadrant, and no logits."""
    f = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    return f, f[:, :0]


POOL = evaluate.Rulers(FeatureNetwork("Inception", "Inception, sha256 0", pool), lpips=None)
NOTHING = evaluate.Rulers(FeatureNetwork("", "", metrics.no_features), lpips=None)


def test_reconstruction_rows_are_what_their_names_say(tiny_vae):
    vae, x = load_davae(tiny_vae), torch.rand(5, 3, 64, 64) * 2 - 1
    batches = [(x[:2], [0, 4]), (x[2:4], [7, 11]), (x[4:], [12])]
    table, real, described = evaluate.reconstruction(vae, batches, POOL, torch.device("cpu"))
    assert list(table) == ["base only, bilinear", "base only, bicubic", "DA-VAE", "base VAE, full size"]
    assert [row["positions"] for row in table.values()] == [64, 64, 64, 256]
    with torch.no_grad():
        full, small = vae.decode(vae.encode(x)), vae.base.decode(vae.encode_base(x))
        bilinear = torch.nn.functional.interpolate(small, size=(64, 64), mode="bilinear", align_corners=False)
        base = vae.base.decode(vae.base.encode(x))
    for row, y in (("DA-VAE", full), ("base VAE, full size", base), ("base only, bilinear", bilinear)):
        psnr = metrics.psnr(x, y).mean().item()
        assert table[row]["psnr"] == pytest.approx(psnr, rel=1e-5)             # whatever the batches
        expected = frechet_distance(moments(pool(y.clamp(-1, 1))[0]), moments(pool(x)[0]))      # rFID
        assert table[row]["Inception-FID@5"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert torch.equal(real, pool(x)[0]) and described.startswith("5 images, sha256 ")


def test_each_sample_is_scored_against_its_own_prompt(monkeypatch):
    vae = SimpleNamespace(D=1, r=2, f=2, base=SimpleNamespace(f=1))
    run = stand_in(vae=vae, dit=SimpleNamespace(cfg=SimpleNamespace(D=1)))
    cfg, seen = evaluate.Config(n=5, batch_size=2, clip="folder"), []
    monkeypatch.setattr(evaluate.sample, "settings_of", lambda *args: {"prompts": ["a", "b", "c"]})
    monkeypatch.setattr(evaluate.sample, "text_of", lambda *args: SimpleNamespace(rows=["a", "b", "c"]))
    monkeypatch.setattr(evaluate.sample, "prepare", lambda *args: None)

    def generate(dit, vae, indices, *args):                    # sample i has the colour i
        i = torch.tensor(list(indices)).view(-1, 1, 1, 1)
        return i.expand(-1, 3, 4, 4).float(), torch.zeros(len(i), 3, 2, 2)

    monkeypatch.setattr(evaluate.sample, "generate", generate)

    def clip(x, texts):
        seen.extend((int(i), text) for i, text in zip(x[:, 0, 0, 0], texts) if i)
        return x[:, 0, 0, 0]

    monkeypatch.setattr(metrics, "clip_scorer", lambda *args: (clip, "hash"))
    plan = evaluate.plan_generation(cfg, run, NOTHING)
    table = evaluate.generation(cfg, run, NOTHING, plan, torch.zeros(2, 0))
    assert seen == [(1, "b"), (2, "c"), (3, "a"), (4, "b")] and table["samples"]["CLIP"] == 2.0
    assert plan.settings["clip"] == "hash"


# ---------------------------------------------------------------- the script


def test_evaluate_names_its_features_and_adds_to_what_is_there(tiny_run, tmp_path):
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "metrics.json"), n=20, images=20, steps=2,
                          batch_size=10)
    evaluate.main(cfg)
    evaluate.main(cfg)
    evaluate.main(evaluate.Config(**{**cfg.__dict__, "steps": 3}))
    entries = json.loads((tmp_path / "metrics.json").read_text())
    assert [e["settings"]["steps"] for e in entries] == [2, 3]   # the same settings replace, others add
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
    """Samples and images are shared out; rows come back in order, so that labels belong to their samples."""
    flags = [tiny_run, "--n=11", "--images=13", "--steps=2", "--batch_size=4", "--device=cpu"]
    script, entries = [str(Path(evaluate.__file__))], []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    for name, launch in (("one", []), ("two", torchrun)):
        done = subprocess.run([sys.executable, *launch, *script, *flags, f"--out={tmp_path / name}.json"],
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
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
    cfg = evaluate.Config(run=tiny_base, out=str(tmp_path / "m.json"), n=10, images=10, steps=1)
    entry = evaluate.main(cfg)
    assert list(entry["generation"]) == ["base only, bilinear", "base only, bicubic"]


def test_squeezenet_features_are_named_for_what_they_are(tiny_run, tmp_path, shared):
    trunk = str(shared("weights/lpips/squeezenet1_1_features.pth"))
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), n=20, images=20, steps=2,
                          perceptual="squeeze", lpips_trunk=trunk)
    entry = evaluate.main(cfg)
    assert {"SqueezeNet-FD", "SqueezeNet-KID"} <= set(entry["generation"]["samples"])
    numbers = set(entry["reconstruction"]["DA-VAE"])
    assert numbers == {"psnr", "ssim", "lpips", "images", "positions", "SqueezeNet-FD"}


def test_a_vae_run_gets_reconstruction_only(tiny_vae, tmp_path):
    entry = evaluate.main(evaluate.Config(run=tiny_vae, out=str(tmp_path / "m.json"), images=8))
    assert "generation" not in entry and np.isfinite(entry["reconstruction"]["DA-VAE"]["ssim"])


def test_whole_images_are_measured_at_their_own_size(tiny_vae, tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a", (33, 50)), ("b", (64, 16))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    dataset = data.open_dataset(tmp_path, 0)
    shapes = [tuple(x.shape[2:]) for x, _, _ in data.read(dataset, [0, 1], whole=8)]
    assert shapes == [(32, 48), (64, 16)]
    cfg = evaluate.Config(run=tiny_vae, out=str(tmp_path / "m.json"), data_dir=str(tmp_path), whole=True)
    entry = evaluate.main(cfg)
    assert entry["settings"]["image_size"] == "whole" and entry["settings"]["features"] == ""
    assert entry["reconstruction"]["DA-VAE"]["images"] == 2
    with pytest.raises(SystemExit, match="give held-out images with --data_dir="):
        evaluate.main(evaluate.Config(run=tiny_vae, whole=True))


def test_a_photo_run_asks_for_held_out_images():
    run = stand_in(config={"config": {"data_dir": "photos/train", "seed": 0, "image_size": 64}})
    with pytest.raises(SystemExit, match="trained on photos/train: give held-out images with --data_dir="):
        evaluate.held_out(run, data_dir="", images=9)


def test_a_kept_reference_measures_like_the_images_it_was_made_of(tiny_run, tmp_path):
    cfg = dict(run=tiny_run, out=str(tmp_path / "m.json"), n=12, images=20, steps=1)
    kept = evaluate.main(evaluate.Config(**cfg, keep_reference=str(tmp_path / "r.npz")))
    read = evaluate.main(evaluate.Config(**cfg, reference=str(tmp_path / "r.npz")))
    for row, with_images in kept["generation"].items():
        with_statistics = read["generation"][row]
        assert with_statistics["Probe-FD"] == pytest.approx(with_images["Probe-FD"], rel=1e-6)
        assert "Probe-KID" in with_images and "Probe-KID" not in with_statistics          # needs the features
    for entry in (kept, read):
        assert entry["settings"]["reference"].startswith("20 images, ")


# ---------------------------------------------------------------- two runs side by side


def entry(tmp_path, name, fid, **settings):
    settings = {"n": 10, "image_size": 64, "held_out": "9 images", "reference": "9 images",
                "features": "Inception, sha256 0", **settings}
    (tmp_path / name).mkdir()
    entry = {"settings": {k: v for k, v in settings.items() if v is not None},
             "reconstruction": {"DA-VAE": {"psnr": 20 + fid}},
             "generation": {"samples": {f"Inception-FID@{settings['n']}": fid}}}
    runs.write_json(tmp_path / name / "metrics.json", [entry])
    return str(tmp_path / name)


def test_compare_marks_the_better_of_equal_settings_and_refuses_to_rank_fid_at_10_against_fid_at_20(tmp_path):
    a, b, c = entry(tmp_path, "a", 5.0), entry(tmp_path, "b", 7.0), entry(tmp_path, "c", 9.0, n=20)
    _, psnr, fid, differ = evaluate.compare(a, b)
    assert psnr.split() == ["DA-VAE", "psnr", "25", "27*"]
    assert fid.split() == ["samples", "Inception-FID", "5*", "7"]
    assert differ == "they differ in: "
    _, psnr, fid, differ = evaluate.compare(a, c)
    assert fid.endswith("not ranked: n 10 / 20") and "*" not in fid
    assert "*" in psnr                                                      # n is of samples, not of images
    assert differ == "they differ in: n 10 / 20"
    with pytest.raises(SystemExit, match="make it with: python evaluate.py"):
        evaluate.compare(a, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("changes,ranked", [
    (dict(held_out="8 images"), {"fid"}), (dict(reference="8 images"), {"psnr"}),
    (dict(steps=9), {"fid", "psnr"}), (dict(features="Inception, sha256 1"), {"psnr"}),
    (dict(held_out=None), {"fid"})])
def test_compare_ranks_by_what_a_metric_depends_on_and_by_nothing_unknown(tmp_path, changes, ranked):
    _, psnr, fid, differ = evaluate.compare(entry(tmp_path, "a", 5.0), entry(tmp_path, "b", 7.0, **changes))
    assert {name for name, line in (("psnr", psnr), ("fid", fid)) if "*" in line} == ranked
    assert next(iter(changes)) in differ
    c, d = entry(tmp_path, "c", 1.0, held_out=None), entry(tmp_path, "d", 2.0, held_out=None)
    _, psnr, fid, _ = evaluate.compare(c, d)
    assert "*" not in psnr and psnr.endswith("not ranked: held_out unknown / unknown") and "*" in fid


def test_compare_and_where_the_analyses_went_are_part_of_the_command_line(tmp_path, capsys):
    a, b = entry(tmp_path, "a", 5.0), entry(tmp_path, "b", 7.0)
    evaluate.command_line(["compare", a, b])
    assert "they differ in: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="in experiments/: for example python experiments/tsne.py RUN"):
        evaluate.command_line(["analyse", "tsne", a])
    with pytest.raises(SystemExit, match="--features='fid': wanted auto or inception or squeeze or"):
        evaluate.command_line([a, "--features=fid"])
