"""report.html shows the run's numbers and the models' pictures, and fetches nothing."""
import base64
import dataclasses
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import evaluate
import finetune
import numpy as np
import pytest
import torch
import train_vae
from PIL import Image
from support import config, data, files, page, report, runs
from support.metrics import psnr, upsampled

sys.path.append(str(Path(__file__).parent))
import browser

VOID = {"meta", "input", "img", "br", "path", "link"}


class Parsed(HTMLParser):
    """A page's elements, [(tag, attributes)], and its text; fails if tags do not match."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, words):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(words)

    def all(self, tag, **wanted):
        return [found for name, found in self.elements
                if name == tag and wanted.items() <= found.items()]


def pixels_of(uri):
    """A data URI as uint8 (H, W, 3)."""
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB"))


METRICS = [{
    "settings": {"run": "r", "n": 500, "held_out": "300 images, sha256 0", "ran_on": "an abacus", "text": "",
                 "checkpoint": "", "features": "Probe, sha256 1"},
    "reconstruction": {"base only, bilinear": {"psnr": 20.111, "ssim": 0.5, "positions": 64.0, "images": 300},
                       "DA-VAE": {"psnr": 24.444, "ssim": 0.5, "positions": 64.0, "images": 300}},
    "generation": {"samples": {"Probe-FD": 0.25, "img/s": 3.0}, "base only, bilinear": {"Probe-FD": 1.75}}}]


@pytest.fixture
def made(make_davae, tmp_path):
    """made(**changes) -> a Report: a random DA-VAE with C = 4, D = 12, drawings of 32 pixels, six samples.

    Its folder has a log, metrics and a warm-start picture.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": 10 * k, "base": 0.5 / k, "detail": 1.25 / k, "w": k / 4} for k in (1, 2, 3, 4)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    Image.fromarray(np.full((40, 60, 3), (10, 200, 30), np.uint8)).save(folder / "warm_start.png")

    def make(names=("cat", "dog", "owl"), size=32, **changes):
        vae = make_davae()
        cfg = finetune.Config(vae=str(folder / "no-vae"), base="out/base", image_size=size)
        own = dataclasses.asdict(cfg)
        about = {"script": "finetune.py", "config": own, "classes": list(names),
                 "model": {"kind": "LightningDiT", "num_classes": len(names)}}
        x = data.to_tensor(data.stack(data.Procedural(64, 5), range(5))[0])[:, :, :size, :size]
        z_all = torch.randn(6, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        settings = dict(steps=7, cfg=2.0, shift=1.0, seed=0, weights="ema")
        samples = report.Samples(z_all, list(names), settings, 1_234_567, 16)
        davae = {"stage": "DA-VAE", "steps": 900, "seconds": 50.0, "psnr": 23.456, "psnr_base": 21.0}
        own_summary = {"stage": "DA-VAE DiT", "steps": 420, "seconds": 31.0, "warm_start": 0.0, "base": 0.2,
                       "detail": 0.4}
        stages = [report.Stage("out/vae", davae, "python train_vae.py tiny", {"lr": "0.1"}),
                  report.Stage(str(folder), own_summary, "python finetune.py tiny", {"lr": "0.2"})]
        whole = report.Report(str(folder), about, vae, x, "Held-out images", samples, stages)
        return dataclasses.replace(whole, **changes)
    return make


def rendered(about, quality=100):
    return report.render(about, report.Dial(about), quality)


@pytest.fixture
def parsed(made):
    return Parsed(rendered(made()))


# ---- numbers ----

def test_the_page_shows_the_numbers_of_the_run(parsed):
    said = parsed.text
    assert "1.2 million parameters that draws images of 3 classes at 32 × 32 pixels, as 16 tokens" in said
    assert "are reconstructed at 23.46 dB with details, and at 21.00 dB from the base channels alone" in said
    assert "the base model's by at most 0.0; it was then trained for 420 steps (31 s)" in said
    assert "tokens per image, not 64 16" in said and "2 stages 81 s" in said
    assert "Base only is the frozen base decoder on its own. Every other stop goes through the DA-VAE" in said
    assert "7 Euler steps, guidance 2, time shift 1, seed 0, ema weights" in said
    assert "DA-VAE DiT, 420 steps in 31 s: loss base 0.200, detail 0.400; warm start off by 0.0" in said


PHOTOS = {"data_dir": "photos", "val_dir": "", "image_size": "32"}


@pytest.mark.parametrize("changes, said", [
    ({}, "training images are"), ({"val_dir": "others"}, "validation images are"),
    ({"image_size": "512"}, "training images at 512 pixels are"),
    ({"val_dir": "others", "image_size": "64"}, "validation images at 64 pixels are"),
    ({"data_dir": "procedural"}, "validation images are")])
def test_the_page_names_the_davaes_validation_images_and_their_size(made, changes, said):
    about = made()
    about.stages[0].settings.update(PHOTOS | changes)
    assert said in report.quality_of(about)
    images = said.removesuffix(" are")
    assert report.facts(about)[f"base only → with details, {images}"] == "21.0 → 23.5 dB"


@pytest.mark.parametrize("settings, said", [
    ({}, ""), ({"detail_dropout": "0.0", "keep_levels": ""}, "it always saw all of them. "),
    ({"detail_dropout": "0.1", "keep_levels": ""}, "except in 10% of the images, where it saw none; "),
    ({"detail_dropout": "0.1", "keep_levels": "0,4,8"}, "number of them, drawn per image from 0, 4, 8.")])
def test_the_dial_says_whether_the_davae_was_trained_with_fewer_details(made, settings, said):
    about = made()
    about.stages[0].settings.update(settings)
    assert said in report.trained_without(about) and bool(said) == bool(report.trained_without(about))


def test_the_dial_shows_the_psnr_of_the_reconstructions(made):
    about = made()
    stops, = [json.loads(found["data-stops"]) for found in Parsed(rendered(about)).all("div")
              if "data-stops" in found]
    vae, x = about.vae, about.x
    with torch.no_grad():
        z_all = vae.encode(x)
        base = upsampled(vae.decode_base(z_all[:, :4]), 2)["base only, bicubic"]
        expected = [base, *(vae.decode(z_all, keep=k) for k in (0, 4, 8)), vae.decode(z_all)]
    assert [stop["name"] for stop in stops] == ["base only", "0", "4", "8", "12"]
    assert [stop["db"] for stop in stops] == [f"{psnr(x, y).mean():.2f} dB" for y in expected]
    assert len({stop["db"] for stop in stops}) >= 4                  # this VAE uses its details


def test_curves_show_the_logged_values(parsed):
    chart, = parsed.all("figure", **{"class": "chart wide"})
    curves = {curve["name"]: curve for curve in json.loads(chart["data-chart"])["curves"]}
    assert curves["detail"]["steps"] == [10, 20, 30, 40]
    assert curves["detail"]["values"] == pytest.approx([1.25, 0.625, 0.41667, 0.3125])
    assert curves["base"]["values"][-1] == 0.125 and curves["w(n)"]["values"][-1] == 1.0
    plot, = parsed.all("div", role="slider")
    assert plot["aria-valuetext"] == "step 40 · base 0.125 · detail 0.312 · w(n) 1"


@pytest.mark.parametrize("N,said", [(1234, "it rises from 0 to 1 over N = 1,234 steps."),
                                    (0, "here 1 from the start.")])
def test_a_note_below_each_chart_explains_it(made, tmp_path, N, said):
    about = made()
    rows = [{"step": k, "l1": 0.5, "align": 0.25, "lpips": 0.125, "kl": 2.0} for k in (1, 2)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about.about["config"] |= {"vae": str(tmp_path), "N": N}
    source = report.losses_section(about)["charts"]
    notes = re.findall(r'<p class="note">(.*?)</p>\n</figure>', source)
    assert [note.split(" ")[0] for note in notes] == ["v*", "L1:", "How", "How"]
    assert f"(Eq. 12): {said}" in notes[0] and "(Eq. 4)" in notes[1]


def test_curves_skip_values_that_are_not_finite_and_empty_charts_are_omitted():
    drawn = page.chart("t", {"a": ([1, 2, 3], [float("nan"), 2.0, float("inf")]), "b": ([1], [float("nan")])})
    curves = json.loads(Parsed(drawn).all("figure")[0]["data-chart"])["curves"]
    assert [(curve["name"], curve["steps"], curve["values"]) for curve in curves] == [("a", [2], [2.0])]
    assert page.chart("t", {"b": ([1], [float("nan")])}) == ""
    assert "nan" not in page.chart("t", {"zero": ([1, 2], [0.0, 0.0])})


@pytest.mark.parametrize("top", [0.0137, 0.26, 1.0, 1.41, 7.3, 420, 140_000])
def test_a_few_round_ticks_span_half_the_axis(top):
    ticks = page.ticks(top)
    assert ticks[0] == 0 and 2 <= len(ticks) <= 6 and top / 2 <= ticks[-1] <= top
    digits = [f"{tick:.9e}".partition("e")[0].replace(".", "").rstrip("0") for tick in ticks]
    assert max(map(len, digits)) <= 2


def test_measurements_come_from_metrics_json_and_the_best_are_marked(parsed):
    cells = [(found["data-name"], found.get("class")) for found in parsed.all("td")]
    assert ("PSNR, dB ↑", "best") in cells and ("Probe-FD ↓", "best") in cells
    assert ("SSIM ↑", "best") not in cells                            # equal in all rows
    assert "20.11 0.5 64 DA-VAE 24.44 0.5 64" in parsed.text and "on an abacus" in parsed.text
    assert "500 samples variant Probe-FD ↓ samples 0.25 base only, bilinear 1.75" in parsed.text
    assert "features Probe, sha256 1" in parsed.text                  # a setting
    assert "300 held-out images variant PSNR" in parsed.text


def test_measurements_on_training_images_say_so(made, tmp_path):
    about = made()
    about.about["config"]["data_dir"] = str(tmp_path)
    for data_dir, called in ((tmp_path / "x" / "..", "training"), (tmp_path.parent, "held-out")):
        entry = METRICS[0] | {"settings": METRICS[0]["settings"] | {"data_dir": str(data_dir)}}
        (Path(about.folder) / "metrics.json").write_text(json.dumps([entry]))
        section = report.measurements_section(about)
        assert f"<caption>300 {called} images</caption>" in section["tables"]
        said = section["measured"]
        assert f"python evaluate.py {about.folder} --data_dir={data_dir}</code> on an abacus" in said
        assert ("trained on these images, so the numbers say nothing" in said) == (called == "training")


# ---- pictures ----

def test_the_pictures_show_the_models_outputs(made):
    about = made()
    parsed = Parsed(rendered(about))
    sheets = {(found["data-set"], found["data-stop"]): pixels_of(found["src"])
              for found in parsed.all("img") if "data-set" in found}
    assert len(sheets) == 11                                          # five stops of each set, and the input
    with torch.no_grad():
        full = about.vae.decode(about.samples.z_all)
        some = about.vae.decode(about.samples.z_all, keep=4)
    expected = {("held-out", "input"): about.x, ("samples", "4"): full, ("samples", "2"): some}
    for key, images in expected.items():
        strip = np.concatenate(list(data.to_uint8(images.clamp(-1, 1))), axis=1)
        assert np.array_equal(sheets[key], strip), key

    # the gallery: two samples of each class, each above its half-size preview
    shown = [found for found in parsed.all("img") if "data-set" not in found]
    assert [found["alt"] for found in shown[1:5]] == ["cat", "cat, base only"] * 2
    assert np.array_equal(pixels_of(shown[1]["src"]), data.to_uint8(full)[0])
    assert np.array_equal(pixels_of(shown[3]["src"]), data.to_uint8(full)[3])
    assert pixels_of(shown[2]["src"]).shape == (16, 16, 3)
    assert (pixels_of(shown[0]["src"]) == (10, 200, 30)).all()        # warm_start.png


def test_the_wipe_and_the_dial_show_the_right_pictures_names_and_psnr(made):
    about = made()
    dial = report.Dial(about)
    parsed = Parsed(report.render(about, dial, 100))
    with torch.no_grad():
        z_all = about.vae.encode(about.x)
        base = upsampled(about.vae.decode_base(z_all[:, :4]), 2)["base only, bicubic"]
        shown = {"base only": base, "DA-VAE": about.vae.decode(z_all), "input": about.x}
    pairs = []
    for found in parsed.all("input", name="pair"):
        pairs.append((found["data-first-name"], found["data-second-name"]))
        for side in ("first", "second"):
            sheet, = parsed.all("img", **{"data-set": "held-out", "data-stop": found[f"data-{side}"]})
            images = shown[found[f"data-{side}-name"]].clamp(-1, 1)
            strip = np.concatenate(list(data.to_uint8(images)), axis=1).astype(int)
            assert np.abs(pixels_of(sheet["src"]) - strip).max() <= 1      # rounding depends on batch size
    assert pairs == [("base only", "DA-VAE"), ("DA-VAE", "input"), ("base only", "input")]

    decibels = [json.loads(found["data-dbs"]) for found in parsed.all("figcaption") if "data-dbs" in found]
    for stop, images in ((0, base), (-1, shown["DA-VAE"])):
        assert [said[stop] for said in decibels] == [f"{value:.2f} dB" for value in psnr(about.x, images)]
    for name, labels in {"held-out": [f"image {i}, reconstructed" for i in range(1, 6)],
                         "samples": [f"sample: {label}" for label in 2 * ["cat", "dog", "owl"]]}.items():
        canvases = parsed.all("canvas", **{"data-dial": name})
        assert [(found["data-i"], found["aria-label"]) for found in canvases] == [
            (str(i), label) for i, label in enumerate(labels)]


def test_large_images_are_cropped_to_the_middle_but_measured_whole(made, monkeypatch):
    monkeypatch.setattr(report, "SIDE", 16)
    about = made()
    dial = report.Dial(about)
    parsed = Parsed(report.render(about, dial, 100))
    sheet, = parsed.all("img", **{"data-set": "held-out", "data-stop": "input"})
    assert np.array_equal(pixels_of(sheet["src"])[:, :16], data.to_uint8(about.x[:1, :, 8:24, 8:24])[0])
    assert "The middle 16 × 16 pixels are shown; PSNR is measured on whole images" in parsed.text
    assert torch.equal(dial.psnr[-1], psnr(about.x, dial.decoded[-1])) and dial.decoded[-1].shape[-1] == 32
    assert {found["width"] for found in parsed.all("canvas")} == {"16"}


@pytest.mark.parametrize("C, D, levels", [
    (8, 24, [0, 8, 16, 24]), (16, 16, [0, 16]), (4, 96, [0, 12, 28, 40, 56, 68, 84, 96])])
def test_dial_stops_keep_equally_many_details_per_group(C, D, levels):
    assert report.levels_of(C, D) == levels


def test_an_oversized_page_gets_lower_image_quality_or_is_refused(made, monkeypatch, tmp_path):
    about, path = made(), tmp_path / "report.html"
    lossless = len(rendered(about).encode())
    report.write(about, path)
    assert path.stat().st_size == lossless
    monkeypatch.setattr(report, "LARGEST", lossless - 1)
    report.write(about, path)
    assert path.stat().st_size == len(rendered(about, 90).encode()) < lossless
    monkeypatch.setattr(report, "LARGEST", 10_000)
    with pytest.raises(ValueError, match="MB even at the lowest quality.* fewer images, with --images="):
        report.write(about, path)


def test_a_page_that_a_full_disk_refuses_is_named(made, monkeypatch, tmp_path):
    def full(path, page):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(SystemExit, match="report.html: not written: .*No space left.*give another --out"):
        report.write(made(), tmp_path / "report.html")


# ---- the page itself ----

def test_the_page_is_well_formed_with_accessible_names(parsed):
    ids = [found["id"] for _, found in parsed.elements if "id" in found]
    assert len(ids) == len(set(ids)) and parsed.all("html", lang="en")
    for tag, found in parsed.elements:
        for reference in ("aria-labelledby", "for"):
            assert found.get(reference, ids[0]) in ids, (tag, found)
        if tag == "img":
            assert "alt" in found
        if tag == "a":
            assert found["href"].removeprefix("#") in ids
        if tag == "canvas":
            assert found.get("aria-label") or found.get("aria-hidden")
    inputs = parsed.all("input")
    assert {found["type"] for found in inputs} == {"range", "radio"}
    assert all("aria-label" in found for found in inputs if found.get("name") != "pair")      # in a <label>
    assert [found["id"] for found in parsed.all("section")] == [
        "dial", "wipe", "start", "samples", "losses", "measurements", "commands"]
    assert len(parsed.all("a")) == 7 and "{{" not in parsed.text


def test_nothing_is_fetched(made):
    source = rendered(made())
    for tag, found in Parsed(source).elements:
        assert not found.get("src", "data:").partition("data:")[0], (tag, found)
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"srcset", "background", "poster", "action"} & found.keys()
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", source)
    policy, = Parsed(source).all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_class_and_folder_names_cannot_inject_html(made):
    bad = """<script>alert("1")</script>"""
    worse = "' onload='alert(2)"
    about = made(names=(bad, worse, "\udcff{{run}}"))
    about = dataclasses.replace(about, shown=bad, about=about.about | {
        "config": about.about["config"] | {"data_dir": bad, "base": worse}})
    about.stages[0] = report.Stage(bad, {}, worse, {bad: bad})
    plain, parsed = Parsed(rendered(made())), Parsed(rendered(about))
    assert len(parsed.all("script")) == len(plain.all("script")) == 1
    assert not [found for _, found in parsed.elements if "onload" in found]
    assert parsed.text.count(bad) >= 5 and worse in parsed.text and "?{{run}}" in parsed.text


# ---- what a run lacks ----

def test_missing_parts_are_omitted_or_replaced_by_the_command_that_makes_them(made):
    about = made()
    folder = Path(about.folder)
    (folder / "metrics.json").unlink()
    (folder / "log.jsonl").unlink()
    (folder / "warm_start.png").unlink()
    parsed = Parsed(rendered(about))
    assert f"Not measured yet: run python evaluate.py {folder} ." in parsed.text
    about.about["config"]["data_dir"] = "photos"
    said = report.measurements_section(about)["measured"]
    assert f"python evaluate.py {folder} --data_dir=OTHER_IMAGES</code> on a folder of images that" in said
    assert "Without a feature network, no samples are drawn: add <code>--lpips_trunk=squeezenet1_1_" in said
    assert "losses" not in [found["id"] for found in parsed.all("section")] and "Losses" not in parsed.text
    assert [found for found in parsed.all("figure") if "hidden" in found]      # the number, without a picture

    about.stages[-1] = report.Stage("r", {}, "python finetune.py tiny", {})    # no summary.json
    parsed = Parsed(rendered(about))
    assert "start" not in [found["id"] for found in parsed.all("section")]
    assert "steps, not all of which are done yet" in parsed.text and "not finished yet" in parsed.text


def test_a_davae_alone_has_a_shorter_page(made):
    about = made()
    own = dataclasses.asdict(train_vae.Config(image_size=32, images=77, data_dir="procedural", base="out/b"))
    about = dataclasses.replace(about, samples=None, stages=about.stages[:1], about={
        "script": "train_vae.py", "config": own, "model": {}})
    parsed = Parsed(rendered(about))
    assert [found["id"] for found in parsed.all("section")] == ["dial", "wipe", "measurements", "commands"]
    assert "64 latent positions of 16 numbers, where the base VAE would need 256" in parsed.text
    assert "trained for 900 steps (50 s) on 77 built-in drawings" in parsed.text
    assert not [found for found in parsed.all("canvas") if found.get("data-dial") == "samples"]


def test_details_are_called_aligned_only_if_they_were_trained_to_be(made):
    about = made()
    for align, said in ((0.5, "image and aligned to the base channels."), (0.0, "on the full-size image.")):
        own = dataclasses.asdict(train_vae.Config(image_size=32, base="out/b", align=align))
        alone = dataclasses.replace(about, about={"script": "train_vae.py", "config": own})
        assert report.sentences_of_autoencoder(alone)[0].endswith(said)


def test_the_facts_compare_the_token_or_position_count_with_the_base_model(made):
    about = made()
    alone = dataclasses.replace(about, samples=None, stages=about.stages[:1])
    found, found_alone = report.facts(about), report.facts(alone)
    assert found["tokens per image, not 64"] == 16 and found["channels, base + detail"] == "4 + 12"
    assert found_alone["latent positions per image, not 256"] == 64 and "warm start" not in str(found_alone)
    assert found["training time, 2 stages"] == "81 s" and found_alone["training time, 1 stage"] == "50 s"


def test_a_checkpoint_shows_only_its_own_measurements(made):
    about = made()
    other = METRICS[0] | {"settings": METRICS[0]["settings"] | {"checkpoint": "r/step_000009", "n": 99}}
    (Path(about.folder) / "metrics.json").write_text(json.dumps([other, *METRICS]))
    (Path(about.folder) / "step_000009").mkdir()
    for step, said in (("step_000009", "99 samples"), ("step_000008", "Not measured yet")):
        of_step = dataclasses.replace(about, folder=f"{about.folder}/{step}")
        assert said in Parsed(rendered(of_step)).text


def test_thirty_thousand_prompts_of_a_measurement_do_not_fill_the_page(made):
    about = made()
    entry = METRICS[0] | {"settings": METRICS[0]["settings"] | {"prompts": ["a red fox"] * 30_000}}
    (Path(about.folder) / "metrics.json").write_text(json.dumps([entry]))
    page = rendered(about)
    assert "(all of it is in metrics.json)" in Parsed(page).text and page.count("a red fox") < 50


def test_the_latest_measurement_is_shown_and_called_out_of_date_after_more_training(made):
    about = made()
    folder = Path(about.folder)
    entries = []
    for n, step in ((99, 3), (77, 5)):
        settings = METRICS[0]["settings"] | {"n": n, "checkpoint": f"r/step_00000{step}"}
        entries.append(METRICS[0] | {"settings": settings})
    (folder / "metrics.json").write_text(json.dumps(entries))
    for newest, old in ((5, False), (8, True)):
        runs.save_folder(folder / f"step_00000{newest}", {}, {})
        section = report.measurements_section(about)
        assert "77 samples" in section["tables"] and "99 samples" not in section["tables"]
        assert ("are out of date (" in section["measured"] and "step 8" in section["measured"]) == old


# ---- commands ----

@pytest.mark.parametrize("changes, command", [
    ({}, "python finetune.py tiny"),
    ({"lr": 0.25, "keep_levels": (0, 8)}, "python finetune.py tiny --keep_levels=0,8 --lr=0.25"),
    ({"data_dir": "my photos"}, "python finetune.py tiny '--data_dir=my photos'")])
def test_a_command_is_preset_plus_changes_and_the_settings_rebuild_the_config(
        changes, command, make_dit, tmp_path):
    cfg = finetune.Config(preset="tiny", **finetune.PRESETS["tiny"] | changes)
    about = finetune.description(cfg, make_dit(), SimpleNamespace(classes=["a"]))
    stage = report.stage_in(tmp_path, json.loads(json.dumps(about)))
    assert stage.command == command
    again = config.cli(finetune.Config, finetune.PRESETS, argv=["tiny", *(
        f"--{name}={value}" for name, value in stage.settings.items())])
    assert dataclasses.asdict(again) == dataclasses.asdict(cfg)


# ---- evaluate.py report ----

def test_one_rank_can_write_the_report_alone(tiny_run, tmp_path, monkeypatch):
    """As at the end of finetune.py, where the others have already gone."""
    def unanswered(*args):
        raise AssertionError("waits for other ranks")

    for module in (evaluate, evaluate.sample.ranks):
        monkeypatch.setattr(module, "from_all", unanswered)
    monkeypatch.setattr(evaluate.sample.ranks, "wait_for_all", unanswered)
    path = tmp_path / "page.html"
    evaluate.main_report(evaluate.ReportConfig(run=tiny_run, out=str(path), images=2, n=10, device="cpu"))
    assert path.exists()


def test_the_report_shows_the_samples_and_stages_of_the_run(tiny_run, tmp_path, capsys):
    path = tmp_path / "new" / "page.html"
    evaluate.main_report(evaluate.ReportConfig(run=tiny_run, out=str(path), images=2, n=10, device="cpu"))
    assert f"wrote {path}, 0." in capsys.readouterr().out
    parsed = Parsed(path.read_text())
    sheet, = parsed.all("img", **{"data-set": "samples", "data-stop": "4"})
    run = evaluate.load(tiny_run, device="cpu")
    settings = evaluate.sample.settings_of(
        evaluate.sample.Config(steps=2, classes=tuple(range(10))), run.config, run.checkpoint)
    images, _ = evaluate.sample.generate(run.dit, run.vae, range(10), settings)
    strip = np.concatenate(list(data.to_uint8(images)), axis=1).astype(int)
    assert np.abs(pixels_of(sheet["src"]) - strip).max() <= 8         # generate may decode in bfloat16
    assert "balloon" in parsed.text and "Held-out images, 64 pixels, reconstructed" in parsed.text
    folders = [Path(stage).name for stage in re.findall(r"<h3><code>(.*?)</code>", path.read_text())]
    assert folders == ["base-vae", "vae", "base", "run"]
    assert parsed.text.count("finetune.py tiny-base ") == 1 and "base DiT, 3 steps in" in parsed.text


def test_runs_without_details_get_no_report(tiny_base, base_run):
    for run in (tiny_base, base_run):
        with pytest.raises(SystemExit, match="has no detail channels to show; wanted a run of finetune.py"):
            evaluate.main_report(evaluate.ReportConfig(run=run))


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device"), "report.html not drawn: [Errno 28] No space left"),
    (ImportError("no WebP"), "report.html not drawn: no WebP"),
    (SystemExit("give --data_dir="), "report.html not written: give --data_dir=")])
def test_a_job_survives_a_failed_report(error, said, monkeypatch, capsys, report_at_the_end):
    def fail(cfg, text):
        raise error

    monkeypatch.setattr(evaluate, "main_report", fail)
    report_at_the_end(SimpleNamespace(out="r", D=12, device="cpu"), None)
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_finetuning_ends_with_a_report_of_its_own_run(
        finetune_config, tmp_path, monkeypatch, report_at_the_end):
    jobs = []
    monkeypatch.setattr(evaluate, "report_at_the_end", lambda job, text: jobs.append(job))
    finetune.main(finetune_config(tmp_path / "run"))
    monkeypatch.setattr(evaluate, "main_report", lambda cfg, text: jobs.append(cfg.run))
    report_at_the_end(jobs[0], None)
    report_at_the_end(SimpleNamespace(out="r", D=0), None)            # a base DiT gets no report
    assert jobs[1:] == [str(tmp_path / "run")] == [jobs[0].out]


@pytest.mark.parametrize("given, val_dir, shown, colour", [
    ("mine", "val", "Held-out images, 16 pixels", 30), ("", "val", "Held-out images, 16 pixels", 20),
    ("train", "val", "Training images, 16 pixels (for others: evaluate.py report --data_dir=)", 10),
    ("", "", "Training images, 16 pixels (for others: evaluate.py report --data_dir=)", 10)])
def test_images_default_to_validation_then_training_images(given, val_dir, shown, colour, tmp_path):
    folders = {}
    for name, value in (("train", 10), ("val", 20), ("mine", 30)):
        folders[name] = str(tmp_path / name)
        Path(folders[name]).mkdir()
        for i in range(3):
            Image.new("RGB", (16, 16), (value, value, value)).save(tmp_path / name / f"{i}.png")
    stage_1 = {"config": {"val_dir": folders.get(val_dir, ""), "seed": 0}}
    runs.save_folder(tmp_path / "vae" / "step_000001", {}, stage_1)
    own = {"data_dir": folders["train"], "image_size": 16, "seed": 0, "vae": str(tmp_path / "vae")}
    run = SimpleNamespace(config={"config": own}, dit=object(), folder="r")
    x, said = evaluate.images_to_show(evaluate.ReportConfig(data_dir=folders.get(given, ""), images=2), run)
    assert said == shown and x.shape == (2, 3, 16, 16)
    assert (data.to_uint8(x) == colour).all()


def test_samples_are_named_by_class_prompt_or_number():
    run = SimpleNamespace(config={"classes": ["cat", "dog"], "model": {"num_classes": 1000}})
    assert evaluate.names_of(run, {"classes": (1, 5)}, 4) == ["dog", "class 5"]
    assert evaluate.names_of(run, {"classes": (0,)}, 2) == ["sample 1", "sample 2"]
    assert evaluate.names_of(run, {"prompts": ["a cat"]}, 2) == ["a cat"]


# ---- in a browser ----

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium: apt-get install chromium")

SAID = "document.querySelector('.says output').textContent"
READ = "document.querySelector('.read').textContent"
WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def picture(selector):
    return f"document.querySelector({json.dumps(selector)}).toDataURL()"


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_dial_wipe_and_curves_respond_to_mouse_and_keys_in_a_browser(made, tmp_path, width, scheme):
    path = tmp_path / "report.html"
    about = made(names=("a name of a class that is very very long", "x" * 60, "owl"))
    report.write(about, path)
    with browser.Browser(width, scheme=scheme) as b:
        b.open(path)
        assert not b.look(WIDE), "it scrolls sideways"

        # the dial: a click at its left end, then a key
        full, sample = b.look(picture("[data-dial=held-out]")), b.look(picture("[data-dial=samples]"))
        assert b.look(SAID).startswith("12 of 12 details")
        b.click(".dial input", across=0.01)
        assert b.look(SAID).startswith("base channels only")
        assert b.look(picture("[data-dial=held-out]")) != full
        assert b.look(picture("[data-dial=samples]")) != sample
        b.press("End")
        assert b.look(SAID).startswith("12 of 12 details") and b.look(picture("[data-dial=held-out]")) == full
        assert "12 of 12" in b.look("document.querySelector('.dial input').getAttribute('aria-valuetext')")

        # the wipe: to a quarter, then another image, another pair
        b.click(".wipe", across=0.25)
        assert 20 < float(b.look("document.querySelector('.wipe').style.cssText.match(/[0-9]+/)[0]")) < 30
        before = b.look(picture(".wipe canvas"))
        b.click(".thumbs label:nth-child(2)")
        assert b.look(picture(".wipe canvas")) != before
        b.click(".choice:nth-of-type(2)")
        assert b.look("document.querySelector('.tag.first').textContent") == "DA-VAE"

        # the curves
        b.click(".plot", across=0.5)
        assert b.look(READ) == "step 20 · base 0.25 · detail 0.625 · w(n) 0.5"
        b.press("ArrowRight")
        assert b.look(READ).startswith("step 30")
        assert not b.look(WIDE) and not b.complaints


@pytest.mark.slow
@needs_browser
def test_the_browser_test_notices_console_logs_and_overflow(made, tmp_path):
    path = tmp_path / "report.html"
    source = rendered(made())
    path.write_text(source.replace("async function start() {", "async function start() { console.log('hm');"))
    with browser.Browser(390) as b:
        b.open(path)
        assert len(b.complaints) == 1 and "hm" in b.complaints[0]
    path.write_text(source.replace("<main>", "<main><div style='width: 900px'>wide</div>"))
    with browser.Browser(390) as b:
        b.open(path)
        assert b.look(WIDE)


# ---- docs/demo.html ----

DEMO = Path(__file__).parent.parent / "docs/demo.html"


@pytest.mark.house
def test_the_demo_is_small_fetches_nothing_and_has_current_style_and_script():
    source = DEMO.read_text()
    assert DEMO.stat().st_size < 3_000_000 and not re.search(r"https?:|url\(", source)
    template = Path(report.__file__).with_name("report.html").read_text()
    for part in ("style", "script"):
        pattern = f"<{part}>.*?</{part}>"
        assert re.search(pattern, source, re.S)[0] == re.search(pattern, template, re.S)[0]
    assert Parsed(source).text.startswith("out/tiny · DA-VAE")
