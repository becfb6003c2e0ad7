"""support/trackers.py: a run's log lines and pictures arrive once; a failing tracker ends no training."""
import importlib.util
import json
import sys

import pytest

import train_vae
from support import ranks, runs, trackers


class Recorder(trackers.Tracker):
    """Keeps what it is given in `events`; raises the error that `fault` has for a method, if any."""

    name = "recorder"
    events = []
    fault = {}

    def keep(self, method, *what):
        if method in self.fault:
            raise self.fault[method]
        self.events.append((method, *what))

    def open(self, out):
        self.keep("open", self.start)

    def numbers(self, step, line):
        self.keep("numbers", step, line)

    def picture(self, step, name, path):
        self.keep("picture", step, name)

    def finish(self):
        self.keep("finish")


@pytest.fixture
def recorder(monkeypatch):
    """The class Recorder, as one of TRACKERS."""
    monkeypatch.setitem(trackers.TRACKERS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "events", [])
    monkeypatch.setattr(Recorder, "fault", {})
    return Recorder


def of(events, method):
    return [event[1:] for event in events if event[0] == method]


# ---------------------------------------------------------------- what arrives


def test_a_tracker_gets_each_log_line_and_picture_once(vae_config, tmp_path, recorder, read_log):
    train_vae.main(vae_config(tmp_path, save_every=2, track="recorder"))
    lines = [{"step": step, **line} for step, line in of(recorder.events, "numbers")]
    assert lines == read_log(tmp_path) and [line["step"] for line in lines] == [1, 2, 3, 4]
    assert of(recorder.events, "picture") == [(0, "recon"), (2, "recon"), (4, "recon")]
    assert recorder.events[0] == ("open", 0) and recorder.events[-1] == ("finish",)


def test_a_resumed_run_sends_only_what_is_new(vae_config, tmp_path, recorder):
    train_vae.main(vae_config(tmp_path, track="recorder"))
    recorder.events.clear()
    train_vae.main(vae_config(tmp_path, steps=6, track="recorder"))
    assert recorder.events[0] == ("open", 4)
    assert [step for step, _ in of(recorder.events, "numbers")] == [5, 6]
    assert of(recorder.events, "picture") == [(6, "recon")]
    recorder.events.clear()
    train_vae.main(vae_config(tmp_path, steps=6, track="recorder"))                # already finished
    assert recorder.events == []


def test_finetune_tracks_too_and_sends_pictures_without_a_number(finetune_config, tmp_path, recorder):
    import finetune
    finetune.main(finetune_config(tmp_path, track="recorder"))
    pictures = of(recorder.events, "picture")
    assert {name for _, name in pictures} == {"warm_start", "samples", "samples_base_only"}
    assert (3, "samples") in pictures
    assert len(of(recorder.events, "numbers")) == 3


def test_a_stopped_run_draws_no_more_pictures_and_closes_its_tracker(
        vae_config, tmp_path, recorder, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(ranks, "asked_to_stop", lambda must: next(answers))
    with pytest.raises(SystemExit):
        train_vae.main(vae_config(tmp_path, track="recorder"))
    assert recorder.events[-1] == ("finish",) and ("picture", 2, "recon") not in recorder.events
    assert runs.step_of(tmp_path) == 2                             # but the step is saved


def test_only_rank_0_tracks_and_all_ranks_check_the_name(vae_config, tmp_path, recorder):
    cfg = vae_config(tmp_path, track="recorder")
    assert trackers.open_trackers(cfg, 0, rank=1) == [] and recorder.events == []
    with pytest.raises(SystemExit, match="--track=mlflow: wanted tensorboard or wandb or recorder"):
        trackers.open_trackers(vae_config(tmp_path, track="mlflow"), 0, rank=1)


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("method, lines", [("open", 0), ("numbers", 0), ("picture", 1), ("finish", 4)])
def test_a_failing_tracker_is_dropped_with_one_message_and_training_continues(
        vae_config, tmp_path, recorder, read_log, capsys, method, lines):
    recorder.fault[method] = OSError(28, "No space left on device")
    train_vae.main(vae_config(tmp_path, track="recorder"))
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4]
    assert len(of(recorder.events, "numbers")) == lines
    said = [line for line in capsys.readouterr().err.splitlines() if "recorder is dropped" in line]
    assert len(said) == 1 and "No space left on device" in said[0] and "training continues" in said[0]


def test_a_tracker_changes_no_weights(vae_config, tmp_path, recorder, same_weights):
    plain, tracked = vae_config(tmp_path / "a"), vae_config(tmp_path / "b", track="recorder")
    train_vae.main(plain)
    train_vae.main(tracked)
    assert same_weights(plain, tracked)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "tensorboard, wandb"])
def test_a_missing_package_is_named_before_anything_is_written(vae_config, tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    first = name.split(",")[0]
    with pytest.raises(SystemExit, match=f"--track={name}: {first} is not installed: pip install {first}"):
        train_vae.main(vae_config(tmp_path / "run", track=name))
    assert not (tmp_path / "run").exists()


def test_no_tracker_is_imported_unless_asked_for(vae_config, tmp_path, monkeypatch):
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)            # an import would fail
    assert train_vae.main(vae_config(tmp_path, steps=1))["steps"] == 1


# ---------------------------------------------------------------- the real ones, if installed


def test_tensorboard_reads_lines_and_pictures_and_drops_interrupted_steps(vae_config, tmp_path):
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train_vae.main(vae_config(tmp_path, steps=2, track="tensorboard"))
    cfg = vae_config(tmp_path, steps=2)
    lost = trackers.TensorBoard(cfg, 2)                            # a job that was killed after step 3
    lost(3, {"l1": 9.0})
    lost.close()
    train_vae.main(vae_config(tmp_path, track="tensorboard"))
    found = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0})
    found.Reload()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event.step for event in found.Scalars("l1")] == [1, 2, 3, 4]
    assert [event.value for event in found.Scalars("l1")] == pytest.approx([row["l1"] for row in rows])
    assert [event.step for event in found.Images("recon")] == [0, 2, 4]
    assert found.Images("recon")[0].encoded_image_string.startswith(b"\x89PNG")


def test_training_survives_tensorboard_on_a_full_disk(vae_config, tmp_path, small_disk, capsys):
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")
    disk = small_disk(64)
    cfg = vae_config(tmp_path / "run", steps=8, save_every=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(disk)
    (disk / "full").write_bytes(b"x" * (60 << 10))
    train_vae.main(vae_config(cfg.out, steps=8, save_every=1, track="tensorboard"))
    assert "tensorboard is dropped (" in capsys.readouterr().err
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
def test_wandb_offline_keeps_lines_and_pictures_of_a_resumed_run(vae_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    train_vae.main(vae_config(tmp_path, steps=2, track="wandb"))
    train_vae.main(vae_config(tmp_path, track="wandb"))
    name = (tmp_path / "wandb_id.txt").read_text()
    parts = sorted(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(parts) == 2                                         # `wandb sync` merges them into one run
    pictures = [(b"media/images/recon_2", b"step 0"), (b"media/images/recon_4", b"step 4")]
    for part, (kept, step) in zip(parts, pictures):
        content = part.read_bytes()
        assert all(word in content for word in (b"gnorm", b"img/s", b"davae", kept, step))
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/recon*.png"))) == 3
