"""support/measurements.py: which of two numbers is better; earlier measurements are kept."""
import json
import threading

import pytest

from support import measurements


HIGHER = ("psnr", "ssim", "IS", "Inception-IS", "precision", "recall", "judged sharp", "class recognised",
          "CLIP")
LOWER = ("lpips", "FD", "FID", "Inception-FID", "KID", "VGG-KID")


@pytest.mark.parametrize("metrics, larger_is_better", [(HIGHER, True), (LOWER, False)])
def test_every_metric_is_ranked_and_its_better_number_starred(metrics, larger_is_better):
    for metric in metrics:
        assert metric.endswith(measurements.HIGHER_IS_BETTER + measurements.LOWER_IS_BETTER)
        assert measurements.better(metric, 2.0, 1.0) == ("* " if larger_is_better else " *"), metric
        assert measurements.better(metric, 1.0, 2.0) == (" *" if larger_is_better else "* "), metric
        assert measurements.better(metric, 1.0, 1.0) == measurements.better(metric, 1.0, float("nan")) == "  "


def test_checking_that_a_path_is_writable_changes_no_file(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    measurements.check_writable(path)
    assert list(path.parent.iterdir()) == []
    mine = path.with_name("metrics.json.try")                      # a user's own file
    for kept in (path, mine):
        kept.write_text("[1]")
    measurements.check_writable(path)
    assert sorted(path.parent.iterdir()) == [path, mine]
    assert path.read_text() == mine.read_text() == "[1]"


@pytest.mark.parametrize("change, same", [
    (dict(out="elsewhere", data_dir="elsewhere", weights_sha256="1", checkpoint="x", run="y"), True),
    (dict(seed=1), False), (dict(steps=9), False), (dict(cfg=2.0), False), (dict(held_out="9 images"), False),
    (dict(lpips_hash="1"), False), (dict(model="1"), False)])
def test_a_measurement_replaces_only_the_same_one_wherever_it_was_made(tmp_path, change, same):
    path = tmp_path / "metrics.json"
    settings = dict(run="a", seed=0, steps=4, cfg=1.0, held_out="8 images", lpips_hash="0", model="0")
    drawn = {"generation": {"FID": 3}}
    measurements.add_entry(path, {"settings": settings, "reconstruction": {"psnr": 1}} | drawn)
    measurements.add_entry(path, {"settings": settings | change, "reconstruction": {"psnr": 2}})
    entries = json.loads(path.read_text())
    assert [entry["reconstruction"]["psnr"] for entry in entries] == ([2] if same else [1, 2])
    assert entries[0]["generation"] == {"FID": 3}                  # not measured again, so kept


def test_two_measurements_that_are_added_at_once_are_both_kept(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    entries = [{"settings": {"cfg": cfg}, "reconstruction": {"psnr": cfg}} for cfg in (1.0, 2.0)]
    other = threading.Thread(target=measurements.add_entry, args=(path, entries[1]))
    real = measurements.read_entries

    def while_the_other_comes(path):
        found = real(path)
        if threading.current_thread() is not other:
            other.start()
            other.join(0.5)                                        # it waits for its turn, or is done
        return found

    monkeypatch.setattr(measurements, "read_entries", while_the_other_comes)
    measurements.add_entry(path, entries[0])
    other.join()
    assert json.loads(path.read_text()) == entries


@pytest.mark.parametrize("metric, section, differs", [
    ("lpips", "reconstruction", "perceptual"), ("lpips", "reconstruction", "lpips_hash"),
    ("CLIP", "generation", "clip"), ("CLIP", "generation", "prompts")])
def test_numbers_of_different_networks_or_prompts_are_not_ranked(tmp_path, metric, section, differs):
    for name, number in (("a", 1.0), ("b", 2.0), ("c", 2.0)):
        settings = dict(image_size=64, held_out="8 images", n=4, reference="", perceptual="vgg",
                        lpips_hash="0", clip="L", prompts=["a fox"])
        settings |= {differs: "another"} if name == "c" else {}
        (tmp_path / name).mkdir()
        measurements.add_entry(tmp_path / name / "metrics.json",
                               {"settings": settings, section: {"DA-VAE": {metric: number}}})
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert "*" in measurements.compare(a, b)[1]
    assert "*" not in measurements.compare(a, c)[1]
