"""support/image_folder.py: only whole images of the same settings, and what is put together from them."""
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
from support import data, image_folder, weights


def draw(run, out, n=6, **changes):
    """The folder of n samples of a run."""
    return sample.main(sample.Config(run=run, out=str(out), n=n, batch_size=4, **{"steps": 2, **changes}))


def images(out, kind="images"):
    """{file name: (H, W, 3) integers} of a folder of samples, or of their previews."""
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted((out / kind).iterdir())}


def assert_same_images(a, b):
    """Equal except for rounding, which depends on the shapes of matrix products."""
    assert a.keys() == b.keys()
    for name in a:
        assert np.abs(a[name] - b[name]).max() <= 1, name


def test_a_half_finished_folder_is_completed_and_the_npz_holds_every_image(tiny_run, tmp_path):
    out = draw(tiny_run, tmp_path / "a")
    whole = images(out)
    (out / "images/000002.png").unlink()
    (out / "images/000005.png").unlink()
    kept = (out / "images/000000.png").stat().st_mtime_ns
    draw(tiny_run, tmp_path / "a")
    assert (out / "images/000000.png").stat().st_mtime_ns == kept
    again = images(out)
    assert_same_images(again, whole)
    array = np.load(out / "samples.npz")["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (6, 64, 64, 3)
    order = image_folder.order_in_npz(6)
    for row, i in zip(array, order, strict=True):
        assert np.array_equal(row, again[f"{i:06d}.png"])
    assert (out / "grid.png").exists() and (out / "base_preview.png").exists()


def test_a_part_of_the_npz_has_its_classes_as_if_drawn_at_random(tmp_path):
    """Else guided-diffusion's Inception score, a mean over parts of the file, would flatter the samples."""
    (tmp_path / "images").mkdir()
    for i in range(200):                                   # the pixel tells the class: 20, in turn
        image_folder.save_png(np.full((1, 1, 3), i % 20, np.uint8), image_folder.path_of(tmp_path, i))
    image_folder.write_npz(tmp_path, 200)
    classes = np.load(tmp_path / "samples.npz")["arr_0"][:, 0, 0, 0]
    assert np.bincount(classes).tolist() == [10] * 20
    counts = np.stack([np.bincount(part, minlength=20) for part in classes.reshape(4, 50)])
    assert 1 < counts.var() < 3                            # in turn: 0.25; at random: 1.8


@pytest.mark.parametrize("left", ["half", "zeros", "nothing"])
def test_a_png_cut_off_by_a_crash_is_drawn_again(drawn, tiny_run, tmp_path, left):
    out = shutil.copytree(drawn, tmp_path / "a")
    path = out / "images/000003.png"
    whole = path.read_bytes()
    path.write_bytes({"half": whole[:len(whole) // 2], "zeros": bytes(len(whole)), "nothing": b""}[left])
    assert image_folder.missing(out, 9, {}) == [3]
    draw(tiny_run, out, n=9, classes=(1,))
    assert_same_images(images(out), images(drawn))


def test_two_jobs_that_write_the_same_image_at_once_leave_it_whole(tmp_path, monkeypatch):
    class Slow:
        """An image; while it is being written, another job writes the same one."""
        def __init__(self, pixels):
            self.image = Image.new("RGB", (pixels.shape[1], pixels.shape[0]))

        def save(self, file, format):
            with open(file, "wb") as half:
                half.write(b"half")
            if others:
                image_folder.save_png(others.pop(), path)
            self.image.save(file, format=format)

    path = tmp_path / "000000.png"
    others = [np.zeros((8, 8, 3), dtype=np.uint8)]
    monkeypatch.setattr(image_folder.Image, "fromarray", Slow)
    image_folder.save_png(others[0], path)
    assert not others and image_folder.is_whole(path) and images(tmp_path, ".").keys() == {"000000.png"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
                                   OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))])
def test_an_image_that_a_full_disk_refuses_is_named_and_leaves_nothing(tmp_path, monkeypatch, error):
    def half(image, file, format):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    said = f"000000.png: not written: .*{error.strerror}. Make room or give another --out, and run the comm"
    with pytest.raises(SystemExit, match=said):
        image_folder.save_png(np.zeros((8, 8, 3), dtype=np.uint8), tmp_path / "000000.png")
    assert list(tmp_path.iterdir()) == []


def cells(path, count, columns, side, scale):
    """The images (side, side, 3) of a grid made by `save_grid`, row by row."""
    sheet = np.asarray(Image.open(path)).astype(int)
    step = scale * side
    found = []
    for i in range(count):
        top, left = 2 + i // columns * (step + 14) + 12, 2 + i % columns * (step + 2)
        found.append(sheet[top:top + step:scale, left:left + step:scale])
    return found


@pytest.fixture(scope="module")
def drawn(tiny_run, tmp_path_factory):
    """A folder of nine samples of one class, of which eight are shown."""
    return draw(tiny_run, tmp_path_factory.mktemp("drawn") / "a", n=9, classes=(1,))


def never(*args, **options):
    raise AssertionError("drawn, although everything is there")


def test_the_overviews_are_assembled_from_the_folders_images(drawn, tiny_run):
    for cell, image in zip(cells(drawn / "grid.png", 8, 8, 64, 2), images(drawn).values()):
        assert np.array_equal(cell, image)
    previews = images(drawn, "previews")
    assert list(previews) == [f"{i:06d}.png" for i in range(8)]            # only of those shown
    for cell, preview in zip(cells(drawn / "base_preview.png", 8, 8, 32, 4), previews.values()):
        assert np.array_equal(cell, preview)
    dit, vae, config = weights.load_run(tiny_run)
    again = sample.settings_of(sample.Config(steps=2, classes=(1,)), config, "")
    _, base = sample.generate(dit, vae, range(4), again)
    for preview, x in zip(previews.values(), data.to_uint8(base).astype(int)):
        assert np.abs(preview - x).max() <= 1


def test_a_complete_folder_needs_no_drawing_and_no_model(drawn, tiny_run, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(drawn, tmp_path / "a")
    for name in ("grid.png", "base_preview.png", "samples.npz"):
        (out / name).unlink()
    monkeypatch.setattr(sample, "load_run", never)
    draw(tiny_run, out, n=9, classes=(1,))
    assert f"{out}: all 9 images exist, nothing to draw" in capsys.readouterr().out
    for name in ("grid.png", "base_preview.png"):
        assert (out / name).read_bytes() == (drawn / name).read_bytes()
    assert len(np.load(out / "samples.npz")["arr_0"]) == 9


def test_missing_previews_are_drawn_and_the_images_kept(drawn, tiny_run, tmp_path, capsys):
    out = shutil.copytree(drawn, tmp_path / "a")
    shutil.rmtree(out / "previews")
    before = {path: path.stat().st_mtime_ns for path in out.glob("images/*")}
    draw(tiny_run, out, n=9, classes=(1,))
    said = capsys.readouterr().out
    assert "base_preview.png lacks 8 of its images, which are drawn again" in said
    assert "0 new images, 9 in all" in said
    assert {path: path.stat().st_mtime_ns for path in out.glob("images/*")} == before
    assert_same_images(images(out, "previews"), images(drawn, "previews"))


def test_the_folder_of_images_is_a_data_set_of_the_samples_and_of_nothing_else(drawn):
    found = data.open_dataset(drawn / "images", 64)
    assert found.classes == []
    assert sorted(Path(path).name for path in found.paths) == [f"{i:06d}.png" for i in range(9)]


@pytest.mark.parametrize("classes, n, columns, shown", [
    ((3, 4), 6, 3, [0, 2, 4, 1, 3, 5]), ((3, 4, 5), 2, 1, [0, 1]),
    ((3, 4), 40, 8, [*range(0, 16, 2), *range(1, 16, 2)])])
def test_overviews_have_one_row_of_up_to_eight_per_class(classes, n, columns, shown):
    about = {"classes": [f"class {k}" for k in range(10)], "model": {"num_classes": 10}}
    found, labels = image_folder.overview(about, {"classes": classes}, n)
    assert (found, list(labels)) == (columns, shown)
    assert all(label == f"class {classes[i % len(classes)]}" for i, label in labels.items())


@pytest.mark.parametrize("classes, drawn", [(["cat", "dog"], ["cat", "dog"]), ([], ["image"])])
def test_only_trained_classes_are_drawn_from_a_run_whose_base_has_more(classes, drawn):
    about = {"classes": classes, "config": {"image_size": 64}, "model": {"num_classes": 1000}}
    settings = sample.class_settings(sample.Config(), about)
    _, labels = image_folder.overview(about, settings, len(drawn))
    assert list(labels.values()) == drawn


@pytest.mark.parametrize("classes, drawn", [([str(k) for k in range(20)], {0, 2, 4, 19}), ([], {0})])
def test_reports_draw_only_trained_classes(classes, drawn, monkeypatch):
    asked = []

    def settings_of(cfg, *args):
        asked.extend(cfg.classes)
        raise KeyError("enough")

    monkeypatch.setattr(sample, "settings_of", settings_of)
    about = {"classes": classes, "config": {"sample_steps": 2}, "model": {"num_classes": 1000}}
    with pytest.raises(KeyError, match="enough"):
        evaluate.draw_latents(evaluate.ReportConfig(), SimpleNamespace(config=about, checkpoint=""), None)
    assert drawn <= set(asked) <= set(range(max(1, len(classes))))


def test_untrained_classes_have_numbers_and_only_the_null_class_is_no_class():
    about = {"classes": ["cat", "dog"], "model": {"num_classes": 1000}}
    _, labels = image_folder.overview(about, {"classes": (1, 2, 999, 1000)}, 4)
    assert list(labels.values()) == ["dog", "class 2", "class 999", "no class"]


def test_a_folder_with_other_settings_is_refused_before_text_is_encoded(tiny_run, tmp_path, monkeypatch):
    out = draw(tiny_run, tmp_path / "a", n=1)
    monkeypatch.setattr(sample, "text_of", lambda *args: pytest.fail("T5 was loaded"))
    with pytest.raises(SystemExit, match="other settings .steps 2 -> 3"):
        draw(tiny_run, tmp_path / "a", n=1, steps=3)
    assert json.loads((out / "settings.json").read_text())["steps"] == 2


def test_a_refusal_shows_only_the_beginning_of_a_long_setting(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "settings.json").write_text(json.dumps({"prompts": ["a fox"] * 30_000, "steps": 2}))
    with pytest.raises(SystemExit, match=r"prompts \['a fox',.*\.\.\. -> \['owl'\], steps 2 -> 3") as refusal:
        image_folder.refuse_other_images(tmp_path, {"prompts": ["owl"], "steps": 3})
    assert len(str(refusal.value)) < 200 + len(str(tmp_path))


def fail(*args):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("fault", ["generate", "save_images"])
def test_settings_may_be_corrected_until_there_are_images(tiny_run, tmp_path, monkeypatch, fault):
    out = tmp_path / "a"
    with monkeypatch.context() as broken:
        broken.setattr(sample if fault == "generate" else image_folder, fault, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            draw(tiny_run, out, n=1, steps=3)
    assert (out / "settings.json").exists()
    draw(tiny_run, out, n=1, steps=2)
    assert json.loads((out / "settings.json").read_text())["steps"] == 2


@pytest.mark.parametrize("moment", ["load_run", "generate"])
def test_two_jobs_of_other_settings_that_begin_at_once_do_not_mix_their_images(
        tiny_run, tmp_path, monkeypatch, moment):
    real = getattr(sample, moment)
    others = [3]

    def meanwhile(*args, **options):
        if others:
            draw(tiny_run, tmp_path / "a", steps=others.pop())
        return real(*args, **options)

    monkeypatch.setattr(sample, moment, meanwhile)
    with pytest.raises(SystemExit, match="holds images made with other settings .steps 3 -> 2"):
        draw(tiny_run, tmp_path / "a", steps=2)
    assert json.loads((tmp_path / "a/settings.json").read_text())["steps"] == 3
    assert len(images(tmp_path / "a")) == 6


def test_previews_alone_lock_their_settings(tiny_run, tmp_path):
    out = draw(tiny_run, tmp_path / "a", n=1)
    for path in [*out.glob("*.png"), *out.glob("images/*")]:
        path.unlink()
    with pytest.raises(SystemExit, match="other settings .steps 2 -> 3"):
        draw(tiny_run, out, n=1, steps=3)


def test_a_size_that_does_not_fit_leaves_no_folder(tiny_run, tmp_path, monkeypatch):
    size = {"height": 60, "width": 64}
    real = sample.settings_of
    monkeypatch.setattr(sample, "settings_of", lambda *args: real(*args) | size)
    with pytest.raises(SystemExit, match="60x64 pixels: both must be multiples of 16"):
        draw(tiny_run, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_samples_of_a_step_folder_outlive_the_step(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = sample.Config(run=str(run / "step_000003"), n=1, steps=2)
    out = sample.main(config)
    assert out == run / "samples-step_000003" and (out / "images/000000.png").exists()
    assert image_folder.default_folder(run) == run / "samples"


def test_unrelated_images_are_not_taken_for_samples(tiny_run, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "000000.png")
    with pytest.raises(SystemExit, match="no settings.json"):
        draw(tiny_run, tmp_path)
    (tmp_path / "settings.json").write_text("")                    # a power cut
    with pytest.raises(SystemExit, match="settings.json: damaged"):
        draw(tiny_run, tmp_path)
