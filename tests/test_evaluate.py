"""evaluate.py: rows that mean what they say, files that lose nothing, rankings of comparable runs only."""
import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from support import config, data, figures, measurements, metrics, plan, ranks, runs
from support.latents import open_training_set
from support.metrics import FeatureNetwork, frechet_distance, moments
from support.weights import load_davae, load_dit


make_probe = functools.cache(metrics.make_probe)


@pytest.fixture(autouse=True)
def one_probe(monkeypatch):
    """The probe takes a second to make and is always the same."""
    monkeypatch.setattr(metrics, "make_probe", make_probe)


def stand_in(**parts):
    """A Run as `load` makes it, with only what a test needs."""
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
    monkeypatch.setattr(evaluate.sample, "text_of", lambda *args: SimpleNamespace(need=lambda prompts: None))
    monkeypatch.setattr(evaluate.sample, "prepare", lambda *args: None)

    def generate(dit, vae, indices, *args):                    # sample i has the colour i
        i = torch.tensor(list(indices)).view(-1, 1, 1, 1)
        return i.expand(-1, 3, 4, 4).float(), torch.zeros(len(i), 3, 2, 2)

    monkeypatch.setattr(evaluate.sample, "generate", generate)

    def clip(x, texts):
        seen.extend((int(i), text) for i, text in zip(x[:, 0, 0, 0], texts) if i)
        return x[:, 0, 0, 0]

    monkeypatch.setattr(metrics, "clip_scorer", lambda *args: (clip, "hash"))
    plan = evaluate.plan_generation(cfg, run, NOTHING, [])
    table = evaluate.generation(cfg, run, NOTHING, plan, torch.zeros(2, 0))
    assert seen == [(1, "b"), (2, "c"), (3, "a"), (4, "b")] and table["samples"]["CLIP"] == 2.0
    assert plan.settings["clip"] == "hash"


def test_a_text_model_draws_the_held_out_captions_unless_prompts_are_given(monkeypatch):
    run = stand_in(config={"config": {"image_size": 64, "text": "out/text", "shift": 1.0, "cfg": 4.0,
                                      "grid": "plain"},
                           "model": {"C": 4, "D": 4}, "classes": [], "captions": ["of training"]})
    monkeypatch.setattr(evaluate.sample, "text_of", lambda *args: SimpleNamespace(need=lambda prompts: None))
    for captions, prompts, drawn in ((["a fox", "snow"], "", ["a fox", "snow"]),
                                     (["a fox"], "an owl", ["an owl"]), ([], "", ["of training"])):
        plan = evaluate.plan_generation(evaluate.Config(prompts=prompts), run, NOTHING, captions)
        assert plan.settings["prompts"] == drawn


PROBE = evaluate.Rulers(FeatureNetwork("Probe", "Probe, sha256 0", pool), lpips=None)


@pytest.mark.parametrize("sharp,recognised", [(8, 8), (4, 6), (0, 0)])
def test_samples_are_sharp_above_zero_and_recognised_if_the_largest_of_ten_is_their_class(
        monkeypatch, sharp, recognised):
    i = torch.arange(8)
    labels = torch.tensor([7, 2, 4]).repeat(3)[:8]
    logits = torch.randn(8, 11).clamp(-2, 2)
    logits[i, torch.where(i < recognised, labels, labels + 1)] = 3.0
    logits[:, 10] = torch.where(i < 8 - sharp, -9.0, 9.0)
    f = torch.randn(8, 12)
    parts = [(f[part], logits[part], torch.zeros(len(part))) for part in i.split(3)]
    monkeypatch.setattr(evaluate, "draw_and_measure", lambda *args: ({"samples": parts}, None))
    plan = evaluate.Plan({"classes": [7, 2, 4]}, text=None, clip=None, reference=None, real=None)
    row = evaluate.generation(evaluate.Config(n=8), stand_in(), PROBE, plan, torch.randn(9, 12))["samples"]
    assert (row["judged sharp"], row["class recognised"]) == (sharp / 8, recognised / 8)


def test_speed_covers_sampling_and_decoding_on_all_ranks_after_the_first_batch(monkeypatch):
    clock = [0.0]

    def generate(dit, vae, indices, *args):
        slow = 0 in indices or len(indices) < 2                # warming up; another size, compiled anew
        clock[0] += 100.0 if slow else 0.5 * len(indices)
        return torch.zeros(len(indices), 3, 4, 4), torch.zeros(len(indices), 3, 2, 2)

    def measure(x):
        clock[0] += 1000.0
        return pool(x)

    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(evaluate.sample, "generate", generate)
    monkeypatch.setattr(evaluate.sample, "prepare", lambda *args: None)
    run = stand_in(vae=SimpleNamespace(D=1, r=2), dit=SimpleNamespace(cfg=SimpleNamespace(D=1)), world=4)
    rulers = evaluate.Rulers(FeatureNetwork("Probe", "Probe, sha256 0", measure), lpips=None)
    plan = evaluate.Plan({}, text=None, clip=None, reference=None, real=None)
    cfg = evaluate.Config(batch_size=2)
    _, speed = evaluate.draw_and_measure(cfg, run, rulers, plan, range(0, 20, 4))
    assert speed == 4 / 0.5                                    # each of four ranks: two images in a second
    assert evaluate.draw_and_measure(cfg, run, rulers, plan, range(0, 8, 4))[1] is None

    # compiled, the last batch is filled up, and what fills it is not measured
    cfg = evaluate.Config(batch_size=2, compile=True)
    measured, _ = evaluate.draw_and_measure(cfg, run, rulers, plan, range(0, 20, 4))
    assert [len(f) for f, _, _ in measured["samples"]] == [2, 2, 1]


def test_large_images_are_measured_a_few_at_a_time():
    x = torch.zeros(1, 1, 1, 1).expand(10, 3, 2, 2**20)            # of two megapixels each
    parts = list(evaluate.large_enough([(x, torch.zeros(10), list(range(10)))], None, 1))
    assert [numbers for _, numbers in parts] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert [len(x) for x, _ in parts] == [2, 2, 2, 2, 2]


# ---------------------------------------------------------------- the script


def test_evaluate_names_its_features_and_adds_to_existing_entries(tiny_run, tmp_path):
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


def test_hashes_change_with_one_weight_or_one_name_but_not_with_the_object():
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    b.load_state_dict(a.state_dict())
    assert runs.hash_of(a) == runs.hash_of(b) != runs.hash_of(torch.nn.Sequential(a))
    b.bias.data[0] += 1e-6
    assert runs.hash_of(a) != runs.hash_of(b)


@pytest.fixture
def photos(tmp_path):
    """photos(count, unreadable) -> a folder of that many images, those numbered `unreadable` truncated."""
    def make(count, unreadable=()):
        rng = np.random.default_rng(0)
        folder = tmp_path / "photos"
        folder.mkdir()
        for i in range(count):
            path = folder / f"{i:02d}.png"
            Image.fromarray(rng.integers(0, 256, (80, 64, 3), dtype=np.uint8)).save(path)
            if i in unreadable:
                path.write_bytes(path.read_bytes()[:500])
        return str(folder)
    return make


def test_the_recorded_checkpoint_is_measured_even_if_training_adds_one(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    recorded = runs.latest_checkpoint(run)

    def read_config(folder):
        if not (run / "step_000099").exists():
            shutil.copytree(recorded, run / "step_000099")
        return json.loads((folder / "config.json").read_text())

    def load_run(source, *args):
        loaded.append(source)
        return None, None, {}

    loaded = []
    monkeypatch.setattr(runs, "read_config", read_config)
    monkeypatch.setattr(evaluate.weights, "load_run", load_run)
    assert evaluate.load(str(run), device="cpu").checkpoint == recorded == loaded[0]
    assert runs.latest_checkpoint(run).name == "step_000099"


def test_all_ranks_measure_the_run_and_checkpoint_that_rank_0_finds(tiny_run, monkeypatch):
    def from_all(x):
        return [("run of rank 0", Path("step of rank 0"))]

    def load(*args):
        raise KeyError(args)

    monkeypatch.setattr(evaluate, "from_all", from_all)
    monkeypatch.setattr(evaluate, "load", load)
    with pytest.raises(KeyError) as found:
        evaluate.main(evaluate.Config(run=tiny_run, device="cpu"))
    assert found.value.args[0] == ("run of rank 0", "ema", "cpu", Path("step of rank 0"))


def test_the_probe_of_drawings_does_not_judge_other_images_unless_told_to(tiny_run, photos):
    run, folder = evaluate.load(tiny_run, device="cpu"), photos(2)
    for data_dir, features, name in (("", "auto", "Probe"), ("procedural", "auto", "Probe"),
                                     (folder, "auto", ""), (folder, "probe", "Probe")):
        cfg = evaluate.Config(data_dir=data_dir)
        assert evaluate.load_rulers(cfg, features, run).features.name == name


def test_a_weight_file_of_vgg_for_lpips_is_not_taken_for_squeezenets(tiny_run, monkeypatch):
    monkeypatch.setattr(evaluate.metrics, "make_lpips", lambda name, trunk: torch.nn.Linear(1, 1))
    run = evaluate.load(tiny_run, device="cpu")
    rulers = evaluate.load_rulers(evaluate.Config(perceptual="vgg", lpips_trunk="vgg16.pth"), "auto", run)
    assert rulers.features.name == "Probe" and rulers.lpips is not None


def test_a_run_made_from_a_step_that_was_removed_since_is_still_evaluated(tiny_run, tmp_path):
    """Its images and its seed are the same at every step; see also reliability.md: any step is a run."""
    own = evaluate.load(tiny_run, device="cpu").config["config"]
    vae = shutil.copytree(own["vae"], tmp_path / "vae")
    gone = str(vae / "step_000001")
    assert measurements.lineage(own | {"vae": gone})[1] == measurements.lineage(own)[1]
    assert measurements.davae_settings(own | {"vae": gone}) == measurements.davae_settings(own)
    step = str(runs.latest_checkpoint(vae))
    assert figures.stages_of([step]) == figures.stages_of([own["vae"]])[:-1] + [step]
    assert plan.latent_of(step, {}, "LightningDiT") == plan.latent_of(own["vae"], {}, "LightningDiT")


def test_two_processes_measure_the_same_as_one_even_if_one_can_read_none_of_its_images(
        tiny_run, tmp_path, photos, launch):
    """Samples and images are shared out; rows come back in order, so that labels match their samples."""
    cfg = evaluate.Config(
        run=tiny_run, out=str(tmp_path / "two.json"), n=11, images=13, steps=2, batch_size=4, device="cpu",
        features="probe", data_dir=str(photos(13, unreadable=(1, 2, 3, 5, 7, 9, 11))))
    process = launch(evaluate.main, cfg, ranks=2)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    two, = json.loads((tmp_path / "two.json").read_text())
    one = evaluate.main(replace(cfg, out=str(tmp_path / "one.json")))
    assert two["settings"]["processes"] == 2 and one["settings"]["held_out"] == two["settings"]["held_out"]
    assert one["settings"]["held_out"].startswith("6 images") and one["settings"]["left_out"] == 7
    assert two["settings"]["left_out"] == 7
    for section in ("reconstruction", "generation"):
        for row, values in one[section].items():
            values.pop("img/s", None)
            for metric, value in values.items():
                assert two[section][row][metric] == pytest.approx(value, rel=1e-3, abs=1e-4), (row, metric)


def test_only_one_of_two_processes_reads_the_reference(tiny_run, tmp_path, launch):
    images = data.Procedural(64, 12, seed=5)
    np.savez(tmp_path / "r.npz", arr_0=np.stack([images.image(i)[0] for i in range(12)]))
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), n=4, images=4, steps=1, device="cpu",
                          features="probe", reference=str(tmp_path / "r.npz"))
    process = launch(evaluate.main, cfg, "if RANK: script.metrics.read_reference = None", ranks=2)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    two, = json.loads((tmp_path / "m.json").read_text())
    assert two["settings"]["reference"].startswith("12 images, sha256 ")
    assert two["settings"]["reference_kind"] == "images"
    one = evaluate.main(replace(cfg, out=str(tmp_path / "one.json")))
    assert one["settings"]["reference"] == two["settings"]["reference"]
    for metric in ("Probe-FD", "Probe-KID"):
        assert two["generation"]["samples"][metric] == pytest.approx(
            one["generation"]["samples"][metric], rel=1e-3)


def test_a_base_model_has_only_the_upsampled_rows(tiny_base, tmp_path):
    cfg = evaluate.Config(run=tiny_base, out=str(tmp_path / "m.json"), n=10, images=10, steps=1)
    entry = evaluate.main(cfg)
    assert list(entry["generation"]) == ["base only, bilinear", "base only, bicubic"]


def test_squeezenet_features_are_named_as_such(tiny_run, tmp_path, shared):
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


def cli(*flags):
    return config.cli(evaluate.Config, argv=list(flags))


def test_given_flags_of_samples_are_refused_where_none_are_drawn(tiny_vae, photo_run, tmp_path, monkeypatch):
    run, folder = photo_run
    out, images = f"--out={tmp_path / 'm.json'}", f"--data_dir={folder}"
    monkeypatch.setattr(evaluate, "reconstruction", never)
    said = f"^leave out --n, --steps: no samples are drawn, because {tiny_vae} is a run of train_vae.py$"
    with pytest.raises(SystemExit, match=said):
        evaluate.main(cli(tiny_vae, out, "--images=4", "--steps=50", "--n=1000"))  # even if it is the default
    with pytest.raises(SystemExit, match="leave out --weights: .* because --whole=True only reconstructs"):
        evaluate.main(cli(run, out, images, "--whole=True", "--weights=model"))
    with pytest.raises(SystemExit, match="leave out --cfg: .* no network measures them: give --lpips_trunk="):
        evaluate.main(cli(run, out, images, "--images=4", "--cfg=2"))
    with pytest.raises(SystemExit, match="--images=4: --whole=True measures all images of .*photos; leave"):
        evaluate.main(cli(run, out, images, "--images=4", "--whole=True"))
    with pytest.raises(SystemExit, match="leave out --n, --seed: .* is a run of train_vae.py"):
        evaluate.main_report(config.cli(evaluate.ReportConfig, argv=[tiny_vae, "--n=4", "--seed=1"]))
    assert not (tmp_path / "m.json").exists()


def test_flags_that_count_for_reconstructions_are_not_refused(tiny_vae, tmp_path):
    flags = ("--images=4", "--device=cpu", "--dtype=float32", "--features=none")
    entry = evaluate.main(cli(tiny_vae, f"--out={tmp_path / 'm.json'}", *flags))
    assert entry["reconstruction"]["DA-VAE"]["images"] == 4


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


def test_held_out_drawings_are_new_to_every_stage(tmp_path):
    """Also to the base VAE, which the run knows only through its DA-VAE."""
    made_from = {"vae": {"seed": 4, "base": str(tmp_path / "base-vae")}, "base-vae": {"seed": 1},
                 "base-dit": {"seed": 2, "vae": str(tmp_path / "vae"), "base": ""}}
    for name, settings in made_from.items():
        runs.save_folder(tmp_path / name / "step_000001", {}, {"config": settings})
    own = dict(data_dir="procedural", seed=3, image_size=16, images=40, base=str(tmp_path / "base-dit"),
               vae=str(tmp_path / "vae" / "step_000001"))
    seen = set()
    for seed in (1, 2, 3, 4):
        trained = open_training_set(SimpleNamespace(**own | {"seed": seed}, text=""), None)
        seen |= {trained.image(i)[0].tobytes() for i in range(40)}
    dataset, index = evaluate.held_out(stand_in(config={"config": own}), "", 40)
    assert len(seen) == 160 and len(index) == 40
    assert [i for i in index if dataset.image(i)[0].tobytes() in seen] == []


def test_another_training_seed_is_measured_on_the_same_drawings(tmp_path):
    found = {measurements.unseen_seed({"seed": seed}) for seed in (0, 2, 1000)}
    assert found == {1} and measurements.unseen_seed({"seed": 1}) == 2


@pytest.mark.parametrize("images,whole,index", [
    (3, False, [0, 7, 14]), (99, False, list(range(15))), (3, True, list(range(15)))])
def test_held_out_images_of_a_folder_are_spread_over_its_classes(tmp_path, images, whole, index):
    for i in range(15):
        (tmp_path / f"class {i // 5}").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / f"class {i // 5}" / f"{i % 5}.png")
    run = stand_in(config={"config": {"data_dir": "photos/train", "seed": 0, "image_size": 16}})
    dataset, found = evaluate.held_out(run, str(tmp_path), images, whole)
    assert found == index and {dataset.labels[i] for i in found} == {0, 1, 2}


@pytest.mark.parametrize("which", ["ema", "model"])
def test_the_requested_weights_are_measured_and_shown(tiny_run, tmp_path, monkeypatch, which):
    loaded = []
    monkeypatch.setattr(evaluate, "held_out", lambda run, *args: loaded.append(run) or 1 / 0)
    cfg = dict(run=tiny_run, weights=which, out=str(tmp_path / "out"))
    for script, given in ((evaluate.main, evaluate.Config(**cfg)),
                          (evaluate.main_report, evaluate.ReportConfig(**cfg))):
        with pytest.raises(ZeroDivisionError):
            script(given)
    ema, model = (runs.hash_of(load_dit(runs.latest_checkpoint(tiny_run), name)) for name in ("ema", "model"))
    assert ema != model
    assert [runs.hash_of(run.dit) for run in loaded] == [{"ema": ema, "model": model}[which]] * 2


@pytest.fixture
def photo_run(tiny_run, photos, tmp_path):
    """(a run that claims to be trained on a folder of photos, that folder)."""
    folder = photos(4)
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("samples"))
    step = runs.latest_checkpoint(run)
    about = json.loads((step / "config.json").read_text())
    about["config"]["data_dir"] = folder
    (step / "config.json").write_text(json.dumps(about))
    (step / "SHA256SUMS").unlink()
    return str(run), folder


def test_a_metric_of_your_own_keeps_its_name(monkeypatch):
    usual = evaluate.pair_scores

    def with_brightness(x, y, lpips):
        return usual(x, y, lpips) | {"brightness": (y - x).mean((1, 2, 3)).double()}

    monkeypatch.setattr(evaluate, "pair_scores", with_brightness)
    x = torch.rand(4, 3, 16, 16) - 0.5
    table, _, _ = evaluate.image_table(lambda x: {"lighter": x + 0.25}, [(x, range(4))], NOTHING, "cpu")
    assert list(table["lighter"]) == ["psnr", "ssim", "brightness", "images"]
    assert table["lighter"]["brightness"] == pytest.approx(0.25)


NOT_DRAWN = ("no samples are drawn, because no network measures them: give --lpips_trunk= (SqueezeNet-FD) or "
             "--inception_weights= (FID), or --features=none to draw for img/s alone")


def test_samples_no_network_measures_are_drawn_only_if_asked_for(photo_run, monkeypatch, capsys):
    run, folder = photo_run
    cfg = evaluate.Config(run=run, data_dir=folder, n=6, batch_size=3, steps=1, images=4)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.sample, "generate", never)
        entry = evaluate.main(cfg)
    said = capsys.readouterr().out
    assert said.splitlines()[0] == NOT_DRAWN                               # before the measuring
    assert "generation" not in entry and entry["reconstruction"]["DA-VAE"]["images"] == 4

    cfg.features = "none"
    assert evaluate.main(cfg)["generation"]["samples"]["img/s"] > 0
    assert NOT_DRAWN not in capsys.readouterr().out
    cfg.features, cfg.reference = "auto", "r.npz"
    with pytest.raises(SystemExit, match="wanted a network to measure distances with"):
        evaluate.main(cfg)
    cfg.reference, cfg.clip = "", "folder"
    with pytest.raises(SystemExit, match="draws classes, not texts"):
        evaluate.main(cfg)
    assert NOT_DRAWN not in capsys.readouterr().out


def test_the_table_says_whether_the_run_was_trained_on_its_images(photo_run, tmp_path, capsys):
    run, folder = photo_run
    others = tmp_path / "others"
    shutil.copytree(folder, others)
    again = f"{others}/../photos"
    for data_dir, kind in ((folder, "training"), (again, "training"), (str(others), "held-out")):
        evaluate.main(evaluate.Config(run=run, data_dir=data_dir, images=2))
        said = capsys.readouterr().out
        assert f"\n{kind} images ({data_dir})" in said
        warned = f"{run}: was trained on these images; the numbers say nothing about others" in said
        assert warned == (kind == "training")


def test_images_only_the_vae_or_its_base_was_trained_on_count_as_seen_and_so_does_one_class_of_them(tmp_path):
    own = {"data_dir": str(tmp_path / "a"), "vae": str(tmp_path / "vae")}
    settings = {"data_dir": str(tmp_path / "b"), "base": str(tmp_path / "base")}
    runs.save_folder(tmp_path / "vae" / "step_000001", {}, {"config": settings})
    runs.save_folder(tmp_path / "base" / "step_000001", {}, {"config": {"data_dir": str(tmp_path / "d")}})
    seen = [name for name in ("a", "b", "b/cat", "c", "d", "bb", ".")
            if measurements.seen_in_training(str(tmp_path / name), own)]
    assert seen == ["a", "b", "b/cat", "d"]
    assert not measurements.seen_in_training("", {"data_dir": "procedural"})
    assert not measurements.seen_in_training("photos", {"data_dir": ""})


def test_the_sampling_bar_covers_the_steps_of_all_batches(tiny_run, tmp_path, monkeypatch):
    bars = []
    progress_bar = evaluate.sample.progress_bar

    def keep(*args):
        bars.append(progress_bar(*args))
        return bars[-1]

    monkeypatch.setattr(evaluate.sample, "progress_bar", keep)
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), n=5, batch_size=2, steps=3, images=2)
    evaluate.main(cfg)
    bar, = bars
    assert (bar.total, bar.n) == (9, 9)


def test_a_kept_reference_measures_like_the_images_it_was_made_from(tiny_run, tmp_path):
    cfg = dict(run=tiny_run, out=str(tmp_path / "m.json"), n=12, images=20, steps=1)
    kept = evaluate.main(evaluate.Config(**cfg, keep_reference=str(tmp_path / "r.npz")))
    read = evaluate.main(evaluate.Config(**cfg, reference=str(tmp_path / "r.npz")))
    for row, with_images in kept["generation"].items():
        with_statistics = read["generation"][row]
        assert with_statistics["Probe-FD"] == pytest.approx(with_images["Probe-FD"], rel=1e-6)
        assert "Probe-KID" in with_images and "Probe-KID" not in with_statistics          # needs the features
    for entry in (kept, read):
        assert entry["settings"]["reference"].startswith("20 images, ")


# ---------------------------------------------------------------- many ranks, some with nothing


@pytest.mark.parametrize("shares", [                       # for each rank: (batches of rows, their numbers)
    [([[5, 7]], [5, 7]), ([[1], [6, 9]], [1, 6, 9])],
    [([[0, 4, 8]], [0, 4, 8]), ([], []), ([[2]], [2])],
    [([], []), ([[3, 1]], [3, 1])]])
def test_gathered_rows_are_in_order_whichever_rank_had_them(monkeypatch, shares):
    everything = []
    monkeypatch.setattr(ranks, "from_all", lambda x: everything.append(x) or everything)
    for parts, numbers in shares:
        batches = [torch.tensor(part).view(-1, 1).short() * 10 for part in parts]
        rows = ranks.gather(batches, numbers)
    assert rows.flatten().tolist() == [10 * i for i in sorted(sum((n for _, n in shares), []))]
    assert rows.shape[1:] == (1,) and rows.dtype == torch.int16
    with pytest.raises(ValueError, match="1 rows and 2 numbers"):
        ranks.gather([torch.zeros(1)], [0, 1])


def test_gathering_nothing_gives_no_rows():
    assert len(ranks.gather([], [])) == 0


# ---------------------------------------------------------------- checked before, saved at once


def never(*args, **kwargs):
    raise AssertionError("measured, although it could have been refused before")


@pytest.mark.parametrize("flags,sentence", [
    (dict(n=1), "--n: 1, wanted at least 2"), (dict(images=1), "--images: 1, wanted at least 2"),
    (dict(images=0), "--images=0: wanted at least 1"), (dict(n=0), "--n: 0, wanted at least 2"),
    (dict(reference="nowhere.npz"), "--reference=nowhere.npz: no such file"),
    (dict(features="none", reference="r.npz"), "wanted a network to measure distances with"),
    (dict(clip="folder"), "draws classes, not texts"), (dict(graph=True), "--graph=True needs a GPU"),
    (dict(classes=(11,)), "class 11 asked for"), (dict(out="."), "folder|directory"),
    (dict(out=__file__), "not a list of measurements"), (dict(keep_reference=__file__), "not an npz file"),
    (dict(out=f"{__file__}/m.json"), "m.json: ")])
def test_impossible_measurements_are_refused_before_measuring(
        tiny_run, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.setattr(evaluate, "reconstruction", never)
    monkeypatch.setattr(evaluate, "draw_and_measure", never)
    values = dict(run=tiny_run, out=str(tmp_path / "m.json"), n=4, images=4, steps=1) | flags
    with pytest.raises(SystemExit, match=sentence):
        evaluate.main(evaluate.Config(**values))
    assert not list(tmp_path.iterdir())


def test_a_diverged_model_is_caught_by_one_batch_of_one_step(tiny_run, tmp_path, monkeypatch):
    asked = []

    def generate(dit, vae, indices, settings, *args):
        asked.append((len(indices), settings["steps"]))
        return torch.full((3, 3, 64, 64), float("nan")), torch.zeros(3, 3, 32, 32)

    monkeypatch.setattr(evaluate.sample, "generate", generate)
    monkeypatch.setattr(evaluate, "reconstruction", never)
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), n=7, batch_size=3, images=4)
    with pytest.raises(SystemExit, match="draws NaN; it diverged"):
        evaluate.main(cfg)
    assert asked == [(3, 1)]


@pytest.mark.parametrize("content", [
    b"", b'[{"settings": {"n": 1', b"\0" * 80, b"{}", b"[1]", b"[{}]", b"\xff[]"])
def test_a_damaged_metrics_json_is_named_before_measuring_and_left_unchanged(
        tiny_vae, tmp_path, monkeypatch, content):
    monkeypatch.setattr(evaluate, "load", never)
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(SystemExit, match="m.json: not a list of measurements"):
        evaluate.main(evaluate.Config(run=tiny_vae, out=str(tmp_path / "m.json"), images=4))
    assert (tmp_path / "m.json").read_bytes() == content


def test_a_failed_generation_loses_neither_the_reconstruction_nor_earlier_measurements(
        tiny_run, tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    cfg = dict(run=tiny_run, out=str(path), n=4, images=4, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "draw_and_measure", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate.main(evaluate.Config(**cfg))
        [entry] = json.loads(path.read_text())
        assert entry["reconstruction"]["DA-VAE"]["images"] == 4 and "generation" not in entry

    whole = evaluate.main(evaluate.Config(**cfg))
    assert json.loads(path.read_text()) == [whole]                 # it replaces the unfinished one
    monkeypatch.setattr(evaluate, "draw_and_measure", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main(evaluate.Config(**cfg))
    assert json.loads(path.read_text()) == [whole]


@pytest.mark.parametrize("flags, advice", [
    (dict(), "a machine with more memory"),
    (dict(whole=True, perceptual="squeeze"),
     "--perceptual=none, smaller images, or without --whole=True, a machine with more memory")])
def test_out_of_memory_in_reconstruction_names_only_what_it_depends_on(
        tiny_vae, tmp_path, photos, monkeypatch, flags, advice):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(metrics, "make_lpips", lambda *args: torch.nn.Identity())
    monkeypatch.setattr(evaluate, "pair_scores", full)
    cfg = evaluate.Config(run=tiny_vae, out=str(tmp_path / "m.json"), data_dir=photos(4), **flags)
    cfg.device = "cpu"                                             # else its advice is --device=cpu
    with pytest.raises(SystemExit, match=f"^CUDA out of memory. Tried .*\nTry, in this order: {advice}$"):
        ranks.launch(evaluate.main, cfg)


def test_out_of_memory_in_drawing_names_the_batch_size(tiny_run, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(evaluate.sample, "generate", full)
    cfg = evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), images=4, batch_size=6)
    with pytest.raises(SystemExit, match="Try, in this order: --batch_size=3, "):
        ranks.launch(evaluate.main, cfg)


def test_a_measurement_the_disk_refuses_is_printed(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_json", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        measurements.add_entry(tmp_path / "m.json", {"settings": {"n": 1}, "reconstruction": {"psnr": 7}})
    assert json.loads(capsys.readouterr().out) == {"settings": {"n": 1}, "reconstruction": {"psnr": 7}}


def test_a_moved_run_replaces_its_own_measurement_and_a_retrained_one_does_not(tiny_vae, tmp_path):
    few = dict(images=4, features="none")
    run = tmp_path / "here"
    shutil.copytree(tiny_vae, run)
    evaluate.main(evaluate.Config(run=str(run), **few))
    run = run.rename(tmp_path / "there")
    evaluate.main(evaluate.Config(run=str(run), **few))
    step = runs.latest_checkpoint(run)
    evaluate.main(evaluate.Config(run=str(step), **few))            # a step folder: the run's file too
    [entry] = json.loads((run / "metrics.json").read_text())
    assert entry["settings"]["run"] == str(step)
    assert entry["settings"]["weights_sha256"] == runs.sha256(step / "SHA256SUMS")

    state = runs.read_state_dict(step / "model.safetensors")
    name = next(name for name, weight in state.items() if weight.dim() == 4)
    runs.save_folder(step, {"model": state | {name: state[name] + 0.1}}, runs.read_config(step))
    evaluate.main(evaluate.Config(run=str(run), **few))
    assert len(json.loads((run / "metrics.json").read_text())) == 2


# ---------------------------------------------------------------- images that cannot be read


def test_unreadable_images_are_left_out_and_the_rest_described(tiny_vae, tmp_path, photos, capsys):
    cfg = dict(run=tiny_vae, out=str(tmp_path / "m.json"), features="none", images=9)
    folder = photos(6, unreadable=(0, 4))
    some = evaluate.main(evaluate.Config(**cfg, data_dir=folder))
    assert "04.png" in capsys.readouterr().err
    assert some["settings"]["left_out"] == 2 and some["reconstruction"]["DA-VAE"]["images"] == 4
    for i in (0, 4):
        os.remove(Path(folder) / f"{i:02d}.png")
    rest = evaluate.main(evaluate.Config(**cfg, data_dir=folder))
    assert rest["settings"]["held_out"] == some["settings"]["held_out"] and rest["settings"]["left_out"] == 0
    assert rest["reconstruction"]["DA-VAE"] == some["reconstruction"]["DA-VAE"]


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_of_unreadable_images_counts_as_empty(tiny_vae, tmp_path, photos, whole):
    with pytest.raises(SystemExit, match="0 images can be measured, wanted at least "):
        evaluate.main(evaluate.Config(run=tiny_vae, out=str(tmp_path / "m.json"), whole=whole,
                                      data_dir=photos(3, unreadable=(0, 1, 2))))
    assert not (tmp_path / "m.json").exists()


def test_one_readable_image_is_enough_for_psnr_but_too_few_for_a_distance(tiny_vae, tmp_path, photos):
    cfg = dict(run=tiny_vae, out=str(tmp_path / "m.json"), data_dir=photos(3, unreadable=(0, 1)))
    with pytest.raises(SystemExit, match="1 images can be measured, wanted at least 2"):
        evaluate.main(evaluate.Config(**cfg, features="probe"))
    assert evaluate.main(evaluate.Config(**cfg))["reconstruction"]["DA-VAE"]["images"] == 1


class Narrow(torch.nn.Module):
    """Stands in for LPIPS: like it, fails on sides of less than 17 pixels."""
    def forward(self, x, y):
        return torch.nn.functional.avg_pool2d(x - y, 17).abs().mean((1, 2, 3))


@pytest.mark.parametrize("size", [(96, 8), (5, 5), (16, 17)])
def test_whole_images_too_small_for_a_metric_are_left_out(
        tiny_vae, tmp_path, photos, capsys, monkeypatch, size):
    folder = photos(2)
    Image.new("RGB", size).save(Path(folder) / "small.png")
    monkeypatch.setattr(metrics, "make_lpips", lambda *args: Narrow())
    cfg = dict(run=tiny_vae, out=str(tmp_path / "m.json"), data_dir=folder, whole=True, perceptual="squeeze")
    entry = evaluate.main(evaluate.Config(**cfg))
    assert entry["settings"]["left_out"] == 1 and "small.png" in capsys.readouterr().err
    assert entry["reconstruction"]["DA-VAE"]["images"] == 2
    assert entry["reconstruction"]["DA-VAE"]["positions"] == 80 * 64 / 8**2


# ---------------------------------------------------------------- kept references


def test_a_kept_reference_describes_its_images_and_ranks_like_them(tiny_run, tmp_path):
    cfg = dict(run=tiny_run, out=str(tmp_path / "m.json"), n=4, images=6, steps=1)
    kept = evaluate.main(evaluate.Config(**cfg, keep_reference=str(tmp_path / "r.npz")))
    with np.load(tmp_path / "r.npz") as file:
        assert str(file["images"]) == kept["settings"]["held_out"]
        assert (int(file["count"]), int(file["image_size"])) == (6, 64)
        assert str(file["features"]).startswith("Probe, sha256 ")
    read = evaluate.main(evaluate.Config(**cfg, reference=str(tmp_path / "r.npz")))
    assert read["settings"]["reference"] == kept["settings"]["reference"]      # compare may rank the two
    assert len(json.loads((tmp_path / "m.json").read_text())) == 2             # the first also has KID
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.json.lock", "m.json", "r.npz"]


@pytest.mark.parametrize("changes", [
    dict(features="Inception, sha256 0"), dict(count=7), dict(image_size=128),
    dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8))])
def test_keep_reference_overwrites_no_images_other_network_size_or_larger_set(
        tiny_run, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(evaluate, "reconstruction", never)
    own = dict(mu=np.zeros(128), sigma=np.eye(128), count=6, image_size=64)
    probe = metrics.feature_network("probe", "procedural", 64, torch.device("cpu"))
    path = tmp_path / "r.npz"
    np.savez(path, **own | dict(features=probe.described) | changes)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="r.npz: exists, with"):
        evaluate.main(evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), n=4, images=6,
                                      keep_reference=str(path)))
    assert path.read_bytes() == before


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


def test_compare_marks_the_better_run_but_does_not_rank_fid_at_10_against_fid_at_20(tmp_path):
    a, b, c = entry(tmp_path, "a", 5.0), entry(tmp_path, "b", 7.0), entry(tmp_path, "c", 9.0, n=20)
    _, psnr, fid, differ = evaluate.compare(a, b)
    assert psnr.split() == ["DA-VAE", "psnr", "25", "27*"]
    assert fid.split() == ["samples", "Inception-FID", "5*", "7"]
    assert differ == "they differ in: "
    _, psnr, fid, differ = evaluate.compare(a, c)
    assert fid.endswith("not ranked: n 10 / 20") and "*" not in fid
    assert "*" in psnr                                                      # n counts samples, not images
    assert differ == "they differ in: n 10 / 20"
    with pytest.raises(SystemExit, match="measure it with: python evaluate.py"):
        evaluate.compare(a, str(tmp_path / "nowhere"))


def test_compare_shows_a_metric_of_your_own_unranked_and_no_counts(tmp_path):
    runs_compared = [entry(tmp_path, name, 5.0) for name in ("a", "b")]
    for run in runs_compared:
        found = json.loads(Path(run, "metrics.json").read_text())
        found[0]["reconstruction"]["DA-VAE"] |= {"edges": 0.5, "images": 9.0}
        runs.write_json(Path(run, "metrics.json"), found)
    lines = [line for line in evaluate.compare(*runs_compared) if line.startswith("DA-VAE")]
    assert [line.split()[1:4] for line in lines] == [["psnr", "25", "25"], ["edges", "0.5", "0.5"]]
    assert lines[1].endswith("not ranked: whether more of it is better")


@pytest.mark.parametrize("changes,ranked", [
    (dict(held_out="8 images"), {"fid"}), (dict(reference="8 images"), {"psnr"}),
    (dict(prompts=["a fox"]), {"psnr"}), (dict(classes=[3]), {"psnr"}), (dict(height=32), {"psnr"}),
    (dict(steps=9), {"fid", "psnr"}), (dict(features="Inception, sha256 1"), {"psnr"}),
    (dict(held_out=None), {"fid"})])
def test_compare_ranks_only_metrics_whose_settings_are_known_and_equal(tmp_path, changes, ranked):
    _, psnr, fid, differ = evaluate.compare(entry(tmp_path, "a", 5.0), entry(tmp_path, "b", 7.0, **changes))
    assert {name for name, line in (("psnr", psnr), ("fid", fid)) if "*" in line} == ranked
    assert next(iter(changes)) in differ
    c, d = entry(tmp_path, "c", 1.0, held_out=None), entry(tmp_path, "d", 2.0, held_out=None)
    _, psnr, fid, _ = evaluate.compare(c, d)
    assert "*" not in psnr and psnr.endswith("not ranked: held_out unknown / unknown") and "*" in fid


@pytest.fixture
def measured(tmp_path):
    """measured(name, steps, at) -> a run with these steps, of which `at` was measured."""
    def make(name, steps, at):
        for step in steps:
            runs.save_folder(tmp_path / name / f"step_{step:06d}", {"model": {"w": torch.ones(step + 1)}}, {})
        checkpoint = tmp_path / name / f"step_{at:06d}"
        settings = {"n": 10, "image_size": 64, "held_out": "9 images", "features": "",
                    "checkpoint": str(checkpoint), "weights_sha256": runs.sha256(checkpoint / "SHA256SUMS")}
        row = {"DA-VAE": {"psnr": float(at), "ssim": None}}
        runs.write_json(tmp_path / name / "metrics.json", [{"settings": settings, "reconstruction": row}])
        return str(tmp_path / name)
    return make


def test_compare_says_which_run_has_trained_since_it_was_measured(measured):
    a, b = measured("a", [300, 600], 300), measured("b", [300], 300)
    lines = evaluate.compare(a, b)
    assert [line for line in lines if "newest" in line] == [
        f"{a}: measured at step 300; its newest checkpoint is step 600"]
    runs.save_folder(f"{b}/step_000300", {"model": {"w": torch.zeros(301)}}, {})
    assert f"{b}: step 300 was trained again since it was measured" in evaluate.compare(b, a)
    assert not any("since" in line for line in evaluate.compare(measured("c", [0], 0), measured("d", [0], 0)))


def test_compare_of_a_step_folder_uses_that_step(measured):
    a, b = measured("a", [300, 600], 300), measured("b", [7], 7)
    lines = evaluate.compare(f"{a}/step_000300", b)
    assert lines[1].split() == ["DA-VAE", "psnr", "300*", "7"]
    assert not any("newest" in line for line in lines)
    with pytest.raises(SystemExit, match="no measurement of .*step_000600; measure it with"):
        evaluate.compare(f"{a}/step_000600", b)
    with pytest.raises(SystemExit, match="twice: wanted two runs"):
        evaluate.compare(a, f"{a}/")


def test_compare_ranks_no_missing_number_and_refuses_a_damaged_file(measured):
    a, b = measured("a", [3], 3), measured("b", [7], 7)
    assert "*" not in evaluate.compare(a, b)[2] and "nan" in evaluate.compare(a, b)[2]             # ssim
    Path(a, "metrics.json").write_text("[")
    with pytest.raises(SystemExit, match="a/metrics.json: not a list of measurements"):
        evaluate.compare(b, a)


@pytest.mark.parametrize("runs_given", [[], ["a"], ["a", "b", "c"]])
def test_compare_with_other_than_two_runs_shows_its_usage(runs_given):
    with pytest.raises(SystemExit, match="wanted two runs: python evaluate.py compare RUN RUN"):
        evaluate.command_line(["compare", *runs_given])


def test_compare_is_part_of_the_command_line(tmp_path, capsys):
    a, b = entry(tmp_path, "a", 5.0), entry(tmp_path, "b", 7.0)
    evaluate.command_line(["compare", a, b])
    assert "they differ in: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--features='fid': wanted auto or inception or squeeze or"):
        evaluate.command_line([a, "--features=fid"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.command_line(["compare", "--help"])
    assert "python evaluate.py compare" in capsys.readouterr().out
