"""experiments/: each finds what was planted for it, and writes its numbers and pictures."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train_vae
from davae import half
from experiments import shared
from experiments.knockout import knockout
from experiments.latents import latents
from experiments.losses import losses
from experiments.sensitivity import sensitivity
from experiments.sizes import decodings, measure, strips, summarise, views
from experiments.sizes import Config as SizesConfig
from experiments.spectrum import spectrum
from experiments.timebins import timebins
from experiments.tsne import tsne
from sample import sample_noise
from support import runs
from support.levels import seen_of_all
from support.metrics import psnr, upsampled
from support.weights import load_davae


def test_the_spectrum_of_white_noise_is_flat_and_that_of_a_cosine_peaks_at_its_frequency():
    f, power = spectrum(torch.randn(400, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 3)
    assert f == [k / 16 for k in range(1, 9)] and power == pytest.approx([1] * 8, abs=0.05)
    f, power = spectrum(torch.cos(2 * torch.pi * 5 / 16 * torch.arange(16)).expand(1, 1, 16, 16))
    assert f[np.argmax(power)] == 5 / 16 and sum(power) == pytest.approx(max(power), rel=1e-6)


def test_zero_random_and_true_details_score_the_same_if_the_decoder_ignores_details(tiny_vae):
    vae, x = load_davae(tiny_vae), torch.rand(4, 3, 64, 64) * 2 - 1

    def scores():
        rows = sensitivity(vae, x)
        assert list(rows) == ["full details", "zero details", "random details"]
        return {psnr(x, y).mean().item() for y in rows.values()}

    with torch.no_grad():
        assert len(scores()) == 3
        decode, mean = vae.decode, vae.encode(x)[:, vae.C:].mean()
        detail = torch.arange(vae.C + vae.D).view(1, -1, 1, 1) >= vae.C
        vae.decode = lambda z_all: decode(torch.where(detail, mean, z_all))
        assert len(scores()) == 1


@torch.no_grad()
def test_sensitivitys_three_rows_are_true_details_raw_zeros_and_seeded_noise(make_davae):
    """Zeros are in the decoder's own units, which are not a latent's."""
    vae = make_davae()
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    z_all = vae.encode(x)
    noise = torch.cat([z_all[:, :4], sample_noise(0, range(3), (12, 4, 4))], dim=1)
    expected = [vae.decode(z_all), vae.decode(z_all, keep=0), vae.decode(noise)]
    for y, wanted in zip(sensitivity(vae, x).values(), expected, strict=True):
        assert torch.allclose(y, wanted.clamp(-1, 1), atol=1e-5)
    assert (vae.decode(z_all, keep=0) - vae.decode(z_all * seen_of_all(0, 4, 12))).abs().max() > 1e-3


def test_random_details_differ_from_image_to_image_whatever_the_batch(tiny_vae, tmp_path):
    """In batches of ten, twelve images get the noise of numbers 0 to 11."""
    Config = config_of("sensitivity")
    found = module("sensitivity").main(Config(run=tiny_vae, out=str(tmp_path), images=12))
    held = shared.open_run(shared.Config(run=tiny_vae, images=12))
    together = sensitivity(held.run.vae, held.x)["random details"]
    assert found["table"]["random details"]["psnr"] == pytest.approx(
        psnr(held.x, together).mean().item(), abs=1e-4)


@torch.no_grad()
def test_experiments_look_at_the_runs_base_and_details_and_the_other_runs_details(
        tiny_vae, make_davae, monkeypatch, tmp_path, error):
    theirs = make_davae(D=8, r=4)                  # f = 8, but still the same images
    load = shared.weights.load_davae
    monkeypatch.setattr(shared.weights, "load_davae", lambda path: theirs if path == "a/b" else load(path))
    held = shared.open_run(shared.Config(run=tiny_vae, other="a/b", images=12, device="cpu"))
    ours = load(tiny_vae).encode(held.x)
    assert list(held.groups) == ["base", "detail", "detail of b"]
    for z, wanted in zip(held.groups.values(), (ours[:, :4], ours[:, 4:], theirs.encode(held.x)[:, 4:])):
        assert error(z, wanted) < 1e-3             # normalised by statistics of three steps
    assert torch.equal(held.z_all, torch.cat([held.groups["base"], held.groups["detail"]], dim=1))

    monkeypatch.setattr(shared, "open_run", lambda cfg: held)
    (_, _, _, curves), = module("spectrum").main(shared.Config(run=tiny_vae, out=str(tmp_path)))["panels"]
    assert curves == {name: spectrum(z) for name, z in held.groups.items()}


def test_the_worst_group_is_the_one_whose_removal_costs_most(tiny_vae, tmp_path, monkeypatch):
    found = [10.0, 14.0, 15.0, 16.0, 20.0], [1.0, 3.0, -0.5, 2.0]
    monkeypatch.setattr(module("knockout"), "knockout", lambda *_: found)
    made = module("knockout").main(shared.Config(run=tiny_vae, out=str(tmp_path), images=2))
    decibels = {row: numbers["psnr"] for row, numbers in made["table"].items()}
    assert decibels == {"all details": 20, "none": 10, "all but group 1, the worst": 17}
    curves = [panel[3] for panel in made["panels"]]
    assert curves == [{"one group": [[0, 1, 2, 3], found[1]]}, {"k": [[0, 3, 6, 9, 12], found[0]]}]


@torch.no_grad()
def test_each_size_is_compared_with_the_base_vae_on_the_same_pixels(make_davae):
    vae, other = make_davae(), make_davae(D=8)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    base = upsampled(vae.decode_base(vae.encode_base(x)), 2)["base only, bicubic"]
    expected = {"base only": base, "start": other.decode(other.encode(x)),
                "trained": vae.decode(vae.encode(x)), "full size": vae.base.decode(vae.base.encode(x))}
    found = decodings(vae, {"start": other}, "float32", x)
    assert list(found) == list(expected)
    assert all(torch.allclose(found[name], y.clamp(-1, 1), atol=1e-5) for name, y in expected.items())


def test_knockout_finds_the_one_group_the_decoder_looks_at():
    """C = 2, D = 6, groups {0, 1, 2} and {3, 4, 5}; the decoder shows detail channel 4 and nothing else."""
    vae = SimpleNamespace(C=2, D=6, decode=lambda z_all: z_all[:, 6:7].expand(-1, 3, -1, -1))
    z_all = torch.rand(4, 8, 2, 2) - 0.5
    kept, lost = knockout(vae, z_all[:, 6:7].expand(-1, 3, -1, -1) + 0.01, z_all, torch.zeros(1, 6, 1, 1))
    assert len(lost) == 2 and lost[0] == 0 and lost[1] > 20
    assert len(kept) == 3 and kept[0] == kept[1] < kept[2] == pytest.approx(46.02, abs=0.01)


def test_loss_by_time_is_zero_for_an_oracle_and_the_known_error_for_one_off_by_t():
    z_all = torch.randn(600, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    offset = torch.tensor([1.0, 2.0, 2.0]).view(1, 3, 1, 1)

    def curves(wrong):
        def oracle(x, t, y):                       # v* = (z - x_t) / (1 - t): the label gives the data away
            s = t.view(-1, 1, 1, 1)
            return (z_all[y] - x) / (1 - s) + wrong * s * offset

        found = timebins(oracle, z_all, torch.arange(600), C=1)
        assert found["base"][0] == pytest.approx([0.05 + 0.1 * k for k in range(10)])
        return torch.tensor([found["base"][1], found["detail"][1]])

    right, (base, detail) = curves(0.0), curves(1.0)
    assert right.shape == (2, 10) and right.max() < 1e-4
    square = torch.tensor([10 * (((k + 1) / 10) ** 3 - (k / 10) ** 3) / 3 for k in range(10)])
    assert torch.allclose(base[1:], square[1:], rtol=0.06)                     # the mean of t^2 in a bin
    assert torch.allclose(detail, 4 * base, rtol=1e-2, atol=1e-3)


def test_smoothed_losses_keep_a_line_and_flatten_noise(tmp_path):
    rows = [{"step": 10 * k, "base": 3.0 - k, "detail": (-1.0) ** k} for k in range(30)]
    rows.append({"step": 300, "psnr": 1.0})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = losses(tmp_path)
    base, detail = found["base"], found["detail"]
    assert list(base) == ["as logged", "mean of 7"] and base["as logged"][0][-1] == 290
    assert base["mean of 7"][1][3:-3] == pytest.approx(base["as logged"][1][3:-3])
    assert base["mean of 7"][1][0] == 1.5
    assert max(map(abs, detail["mean of 7"][1])) < 0.3 and min(map(abs, detail["as logged"][1])) == 1
    with pytest.raises(SystemExit, match="wanted the log of a DA-VAE run of finetune.py"):
        losses(tmp_path / "elsewhere")


def test_tsne_separates_distinct_classes_and_counts_same_class_neighbours():
    y = torch.arange(60) // 25                     # 25, 25 and 10 of them
    noise = torch.randn(60, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    apart = torch.eye(3)[y].view(60, 3, 1, 1) * 10 + noise
    points, same = tsne(apart, y)
    _, same_in_noise = tsne(torch.randn(60, 3, 1, 1), y)
    assert same == 1 > same_in_noise
    parts = [points[y == k] for k in range(3)]                                 # (25, 2) or (10, 2)
    spread, centres = max(p.std(0).max() for p in parts), [p.mean(0) for p in parts]
    assert all(np.linalg.norm(centres[i] - centres[i - 1]) > 3 * spread for i in range(3))


def test_principal_components_show_the_one_direction_in_which_the_latents_vary():
    gradient = torch.linspace(-1, 1, 4).view(1, 1, 1, 4).expand(2, 1, 4, 4)
    noise = 1e-3 * torch.randn(2, 6, 4, 4)
    z_all = gradient * torch.tensor([1.0, 2, 3, 4, 5, 6]).view(1, 6, 1, 1) + noise
    first = latents(z_all[:, :3], 2, (8, 8))[:, 0]
    assert first.shape == (2, 8, 8) and (first[:, :, 0] * first[:, :, -1]).max() < 0
    expected = gradient[:, 0] / gradient.std() / 2
    assert torch.allclose(first[:, ::2, ::2].abs(), expected.abs(), atol=0.02)


def test_each_colour_deviates_by_a_half_around_grey_whatever_the_mean_of_the_latents():
    z = torch.randn(20, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    z = z * torch.tensor([5.0, 4, 3, 2, 1]).view(1, 5, 1, 1) + 7
    colours = latents(z, 20, (6, 6))
    assert colours.mean((0, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(colours.std((0, 2, 3)), torch.full((3,), 0.5))
    for k in range(3):                             # red is the direction of most variance, and so on
        assert torch.corrcoef(torch.stack([colours[:, k].flatten(), z[:, k].flatten()]))[0, 1].abs() > 0.95


def test_every_size_is_cropped_from_the_middle_or_made_from_the_whole_image():
    x = torch.rand(1, 3, 80, 112) * 2 - 1
    found = views(x, SizesConfig(sizes=(16, 32, 128, 0), tiled=256), f=8, least=11)
    assert list(found) == ["16", "32", "whole", "tiled 256", "1/2", "1/4"]
    assert len(found["16"]) == 5 * 7 and torch.equal(found["whole"], x)
    assert torch.equal(found["16"][0], x[0, :, :16, :16])                      # all of it, none twice
    assert torch.equal(found["16"][5 * 7 - 1], x[0, :, 64:, 96:])
    assert torch.equal(found["32"][0], x[0, :, 24:56, 8:40]) and len(found["32"]) == 3
    tile = found["tiled 256"]
    assert torch.equal(tile[:, :, 88:168, 72:184], x)
    assert torch.equal(tile[:, :, 168:248, 72:184], x.flip(2))                 # no seam, so no new detail
    assert torch.equal(found["1/4"], half(half(x))[:, :, 2:18, 2:26])
    assert list(views(x, SizesConfig(sizes=(16, 0), tiled=104), f=8, least=17)) == ["whole", "1/2", "1/4"][:2]


def test_only_a_model_that_is_worse_on_whole_images_is_further_behind_on_them():
    def decode(x):
        noise = torch.full_like(x, 0.1)
        size = 1 if x.shape[-1] < 64 else 3
        return {"alike": x + 2 * noise, "learned its size": x + 2 * size * noise, "full size": x + noise}

    scores = {}
    for x in (torch.rand(3, 1, 3, 96, 96) - 0.5) / 2:
        measure(decode, views(x, SizesConfig(sizes=(32, 0), halvings=0), 8, 11), None, scores)
    table = summarise(scores)
    assert [table[f"{size}, alike"]["crops"] for size in ("32", "whole")] == [27, 3]
    assert table["32, full size"]["psnr"] == pytest.approx(26.02, abs=0.01)
    behind = {row: numbers["dB behind"] for row, numbers in table.items()}
    assert behind["32, alike"] == pytest.approx(6.02, abs=0.01) == behind["whole, alike"]
    assert behind["32, learned its size"] == pytest.approx(6.02, abs=0.01)
    assert behind["whole, learned its size"] == pytest.approx(15.56, abs=0.01)


def test_lpips_by_size_is_relative_to_full_size():
    def lpips(x, y):
        return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    scores = {}
    measure(lambda x: {"trained": x + 0.3, "full size": x + 0.2}, {"whole": torch.rand(2, 3, 16, 16)}, lpips,
            scores)
    assert summarise(scores)["whole, trained"]["lpips ratio"] == pytest.approx(1.5)


def test_strips_of_three_sizes_show_the_same_pixels():
    x = torch.rand(1, 3, 96, 160)
    found = views(x, SizesConfig(sizes=(32, 48, 64, 0), tiled=256), 8, 11)
    rows = strips(measure(lambda x: {"negative": -x}, found, None, {}), 32)
    assert list(rows) == ["32", "64", "tiled 256"]
    for strip in rows.values():
        assert torch.equal(strip["input"], x[:, :, 32:64, 64:96])
        assert torch.equal(-strip["negative"], strip["input"])


# ---------------------------------------------------------------- as scripts

PICTURES = {"sensitivity": "_images.png", "knockout": ".png", "spectrum": ".png", "losses": ".png",
            "timebins": ".png", "latents": "_images.png", "tsne": ".png", "sizes": "_images.png",
            "levels": "_images.png"}


def module(name):
    return import_module(f"experiments.{name}")


def config_of(name):
    return getattr(module(name), "Config", shared.Config)


@pytest.mark.parametrize("name", PICTURES)
def test_each_experiment_writes_its_numbers_and_figures(tiny_run, tiny_vae, tmp_path, name):
    cfg = config_of(name)(run=tiny_run, out=str(tmp_path / "new"), images=12, other=tiny_vae)
    returned = module(name).main(cfg)
    assert Image.open(tmp_path / "new" / f"{name}{PICTURES[name]}").width >= 700
    found = json.loads((tmp_path / "new" / f"{name}.json").read_text())
    assert found["settings"]["images"] == 12 and len(found["settings"]["vae_hash"]) == 16
    assert "pictures" not in found
    assert set(found) == set(returned) and ("table" in found or "panels" in found or name == "latents")
    if name == "tsne":
        assert [panel[0] for panel in found["panels"]] == ["base", "detail", "detail of vae"]


def test_results_of_a_step_lie_in_the_run_because_steps_are_removed(tiny_vae, tmp_path):
    vae = shutil.copytree(tiny_vae, tmp_path / "vae")
    step = runs.latest_checkpoint(vae)
    module("spectrum").main(shared.Config(run=str(step), images=12))
    assert (vae / "spectrum.json").exists() and not (step / "spectrum.json").exists()


def test_an_experiment_that_cannot_run_says_what_is_wanted(tiny_vae, tiny_base):
    with pytest.raises(SystemExit, match="--levels=500: wanted numbers of detail channels, 0 to 12"):
        module("levels").main(config_of("levels")(run=tiny_vae, images=4, levels=(500,)))
    with pytest.raises(SystemExit, match="wanted a class-conditional run of finetune.py"):
        module("timebins").main(config_of("timebins")(run=tiny_vae, images=4))
    base = str(Path(tiny_vae).parent / "base-vae")
    for cfg in (shared.Config(run=base), shared.Config(run=tiny_vae, other=base, images=2)):
        with pytest.raises(SystemExit, match="base-vae: has no detail channels"):
            module("spectrum").main(cfg)
    with pytest.raises(SystemExit, match="its transformer makes no details"):
        module("timebins").main(config_of("timebins")(run=tiny_base, images=4))


@pytest.mark.parametrize("name", ["sensitivity", "knockout", "spectrum", "timebins", "latents", "tsne",
                                  "sizes"])
def test_one_image_is_enough_or_refused(tiny_run, tmp_path, name):
    Config = config_of(name)
    if name in ("sensitivity", "tsne"):                                # for distances and neighbours
        with pytest.raises(SystemExit, match="at least 2"):
            module(name).main(Config(run=tiny_run, out=str(tmp_path), images=1))
    found = module(name).main(Config(run=tiny_run, out=str(tmp_path), images=2 if name == "tsne" else 1,
                                     **({"features": "none"} if name == "sensitivity" else {})))
    assert "NaN" not in json.dumps(found)


def test_unreadable_images_are_left_out_of_an_experiment(tiny_vae, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    cfg = shared.Config(run=tiny_vae, out=str(tmp_path / "out"), data_dir=str(tmp_path), images=9)
    (tmp_path / "1.png").write_bytes(b"half")
    assert shared.open_run(cfg).x.shape == (2, 3, 64, 64) and "1.png" in capsys.readouterr().err
    for i in (0, 2):
        (tmp_path / f"{i}.png").write_bytes(b"half")
    with pytest.raises(SystemExit, match="none of 3 images can be read"):
        shared.open_run(cfg)


def test_sizes_shows_the_closed_form_that_a_run_began_with_and_kept(davae_config, tmp_path, capsys):
    """Its row equals step 0 of that run; images keep their own size."""
    run = tmp_path / "run"
    train_vae.main(davae_config(run, fit="closed", gan=0.0, steps=1, save_every=0))
    for i, (width, height) in enumerate([(64, 64), (90, 70)]):
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    cfg = SizesConfig(run=str(run), out=str(tmp_path), data_dir=str(tmp_path / "photos"), sizes=(32, 0))
    table = module("sizes").main(cfg)["table"]
    assert list(table)[:4] == ["32, base only", "32, closed form", "32, trained", "32, full size"]
    started = module("sizes").main(replace(cfg, run=str(run / "step_000000")))["table"]
    assert started["whole, trained"] == table["whole, closed form"] != table["whole, trained"]

    (run / "step_000000").rename(tmp_path / "start")
    capsys.readouterr()
    table = module("sizes").main(cfg)["table"]
    assert "whole, closed form" not in table and table["whole, trained"]["crops"] == 2
    assert "no rows 'closed form'; wanted" in capsys.readouterr().out
    beside = module("sizes").main(replace(cfg, other=str(tmp_path / "start")))["table"]
    assert beside["whole, start"] == started["whole, trained"]
    assert beside["whole, trained"] == table["whole, trained"]
    assert "no rows" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="90 pixels; wanted multiples of 4, 11 or more"):
        module("sizes").main(replace(cfg, sizes=(64, 90)))
    with pytest.raises(SystemExit, match="as large as any of --sizes; give less"):
        module("sizes").main(replace(cfg, sizes=(128,), halvings=0))


def test_speed_counts_the_algebras_flops_and_gives_times_as_ratios(tmp_path, monkeypatch):
    """Per block: 8 E^2 L for attention's products, 4 E L^2 for attention, 6 E hidden L for the MLP."""
    speed = module("speed")
    monkeypatch.setattr(speed, "seconds", lambda sizes, cfg, device: float(sizes.grid))
    table = speed.main(speed.Config(out=str(tmp_path), image_size=256))
    assert [row["tokens"] for row in table.values()] == [16, 64, 256]
    assert [row["x seconds"] for row in table.values()] == [1, 2, 4]
    E, hidden, L = 1152, 3072, 256
    blocks = 28 * (8 * E**2 * L + 4 * E * L**2 + 6 * E * hidden * L)
    assert table["the VAE's own latent"]["GFLOPs"] * 1e9 == pytest.approx(blocks, rel=0.03)       # and adaLN
    monkeypatch.undo()
    cfg = speed.Config(blocks=1, repeats=1, device="cpu", dtype="float32")
    small = speed.LightningDiTConfig(grid=2, E=32, A=2, depth=1)
    once = speed.seconds(small, cfg, torch.device("cpu"))
    assert 0 < once < 1
    with pytest.raises(SystemExit, match="wanted a multiple of 64"):
        speed.main(speed.Config(image_size=96))


def test_each_experiment_has_a_test():
    folder = Path(shared.__file__).parent
    others = {"shared", "ablation", "budget", "speed"}
    assert {path.stem for path in folder.glob("*.py")} - others == set(PICTURES)


@pytest.mark.parametrize("name", ["losses", "sensitivity"])        # with the common Config; with its own
def test_each_experiment_has_its_own_help(tmp_path, name):
    """Run as a script from a folder other than the repository's root."""
    script = Path(shared.__file__).parent / f"{name}.py"
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(module(name).__doc__) and "--run=out/tiny-vae" in done.stdout
