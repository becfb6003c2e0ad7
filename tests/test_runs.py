"""support/runs.py: checkpoints that are whole or absent, damage, full disks, safe reading, resumed logs."""
import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import finetune
import train_vae
from support import data, figures, files, latents, ranks, runs, text, weights


# ---------------------------------------------------------------- checkpoints


def test_the_two_newest_checkpoints_are_kept_whole(tmp_path):
    for step in (1, 2, 3):
        weights = {"model": {"w": torch.full((2,), float(step))}}
        runs.save_checkpoint(tmp_path, step, weights, {"step": step}, {"a": 1})
    assert [p.name for p in runs.checkpoints(tmp_path)] == ["step_000002", "step_000003"]
    newest = runs.latest_checkpoint(tmp_path)
    assert load_file(newest / "model.safetensors")["w"].tolist() == [3.0, 3.0]
    assert torch.load(newest / "train_state.pt", weights_only=True) == {"step": 3}
    assert runs.read_config(newest) == {"a": 1}


def test_a_checkpoint_that_cannot_be_removed_is_reported_and_removed_by_the_next_save(
        tmp_path, monkeypatch, capsys):
    def busy(path):
        (path / "config.json").unlink()                            # half of it is gone
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    for step in (1, 2):
        runs.save_checkpoint(tmp_path, step, {}, {}, {})
    with monkeypatch.context() as nfs:
        nfs.setattr(shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or busy(path))
        runs.save_checkpoint(tmp_path, 3, {}, {}, {})
    assert "step_000001: not removed (Directory not empty); the next" in capsys.readouterr().err
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["step_000002", "step_000003"]
    runs.save_checkpoint(tmp_path, 4, {}, {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000004"]


def test_a_folder_without_a_config_is_not_a_checkpoint(tmp_path):
    runs.save_checkpoint(tmp_path, 1, {}, {}, {})
    (tmp_path / "step_000002").mkdir()                             # such as one that is still being copied
    assert runs.step_of(tmp_path) == 1 and runs.latest_checkpoint(tmp_path).name == "step_000001"


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    runs.save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {"step": 1}, {})

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        runs.save_checkpoint(tmp_path, 2, {"model": {"w": torch.zeros(2)}}, {"step": 2}, {})
    assert runs.step_of(tmp_path) == 1                             # the half-written one does not count
    assert load_file(runs.latest_checkpoint(tmp_path) / "model.safetensors")["w"].tolist() == [1.0, 1.0]


def test_a_run_without_checkpoints_gets_advice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="an empty run"):
        runs.latest_checkpoint(tmp_path)
    with pytest.raises(SystemExit, match="no such folder.*: make one: python finetune.py"):
        runs.latest_checkpoint(tmp_path / "nowhere")
    for name in ("tiny", "photos"):
        runs.save_checkpoint(tmp_path / name, 1, {}, None, {})
    with pytest.raises(SystemExit, match=f"no such folder.*: there are {tmp_path}/photos, {tmp_path}/tiny$"):
        runs.latest_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("given, there", [
    ("out", "out/photos, out/tiny"),                               # the folder that the runs are in
    ("out/tinny", "out/photos, out/tiny"),
    ("out/tiny/step_000007", "out/tiny"),                          # removed since
    ("tiny", "out/photos, out/tiny"),
    ("elsewhere/tiny", "out/photos, out/tiny"),
])
def test_a_folder_without_checkpoints_is_answered_with_the_runs_that_have_some(
        tmp_path, monkeypatch, given, there):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "tiny"):
        runs.save_checkpoint(f"out/{name}", 9, {}, None, {})
    for left in ("out/broken/step_000001", "out/killed/step_000002.davae-new", "step_000003"):
        Path(left).mkdir(parents=True)                             # none of them is a checkpoint
    (Path("out/killed/step_000002.davae-new") / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=f": there are {there}$"):
        runs.latest_checkpoint(given)


@dataclass
class Config:
    preset: str = "small"
    out: str = ""
    steps: int = 10
    lr: float = 1e-3
    ch_mult: tuple = (1, 2)


def test_resume_refuses_changed_settings_naming_both_values(tmp_path, capsys):
    out = str(tmp_path)
    saved = {"config": {"out": out, "steps": 10, "lr": 1e-3, "ch_mult": [1, 2]}}
    assert runs.resume(Config(out=out), free=set()) is None
    runs.save_checkpoint(out, 0, {}, {}, saved)                   # nothing is trained yet: it may restart
    assert runs.resume(Config(out=out, steps=11), free=set()) is None
    runs.save_checkpoint(out, 5, {}, {}, saved)
    assert runs.resume(Config(out=out, lr=0.5), free={"preset", "lr"}).name == "step_000005"
    assert "resuming with lr=0.5 (was 0.001)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="started with steps=10, now steps=11"):
        runs.resume(Config(out=out, steps=11), free={"preset", "lr"})


@pytest.mark.parametrize("field, new, flag", [
    ("cfg", 3.0, "--cfg=3.0"), ("shift", 0.5, "--shift=0.5"), ("grid", "sd3", "--grid=sd3"),
    ("sample_steps", 9, "--steps=9")])
def test_other_pictures_of_a_finished_run_are_left_to_sample(tmp_path, field, new, flag):
    cfg = finetune.Config(out=str(tmp_path), steps=5)
    runs.save_checkpoint(tmp_path, 5, {}, {}, {"config": asdict(cfg)})
    assert runs.resume(replace(cfg, **{field: new}), free={field}).name == "step_000005"     # not finished
    runs.write_json(tmp_path / "summary.json", {"steps": 5})
    said = f"is finished with {field}=.*: python sample.py {tmp_path} {flag}$"
    with pytest.raises(runs.Differs, match=said):
        runs.resume(replace(cfg, **{field: new}), free=())


def test_a_field_newer_than_the_run_counts_as_its_default(tmp_path):
    saved = {"config": {"out": str(tmp_path), "steps": 10}}
    runs.save_checkpoint(tmp_path, 5, {}, {}, saved)
    assert runs.resume(Config(out=str(tmp_path)), free=set()).name == "step_000005"
    with pytest.raises(SystemExit, match="started with lr=0.001, now lr=0.5"):
        runs.resume(Config(out=str(tmp_path), lr=0.5), free=set())


OTHER = {str: "other", bool: None, int: 77, float: 0.77, tuple: (77,)}         # not the default of any field
PLACES = {"preset", "data_dir", "val_dir", "vae", "base", "base_vae", "text", "lpips_trunk", "teacher"}
HOW = {"device", "dtype", "cache", "micro_batch", "checkpointing", "shard", "compile", "log_every",
       "save_every", "track", "dry_run"}


@pytest.mark.parametrize("script", [train_vae, finetune])
def test_changing_any_setting_that_affects_training_is_refused(script, tmp_path):
    cfg = script.Config(out=str(tmp_path))
    settings = asdict(cfg)
    runs.save_checkpoint(tmp_path, 1, {}, {}, {"config": settings})
    passed = set()
    for name in settings.keys() - {"out"}:
        with contextlib.suppress(runs.Differs):
            runs.resume(replace(cfg, **{name: OTHER[type(settings[name])]}), free=())
            passed.add(name)
    assert passed == (PLACES | HOW) & settings.keys()


@pytest.mark.parametrize("detail_sample", [True, False])
def test_another_cache_is_refused_only_where_it_decides_how_details_are_sampled(detail_sample, tmp_path):
    cfg = finetune.Config(out=str(tmp_path), detail_sample=detail_sample)
    runs.save_checkpoint(tmp_path, 1, {}, {}, {"config": asdict(cfg)})
    assert runs.resume(cfg, free=()).name == "step_000001"
    if not detail_sample:
        assert runs.resume(replace(cfg, cache=False), free=()).name == "step_000001"
        return
    with pytest.raises(SystemExit, match="started with cache=True, now cache=False is asked for: give"):
        runs.resume(replace(cfg, cache=False), free=())


def test_a_resumed_run_keeps_the_seconds_and_results_of_earlier_jobs(tmp_path):
    @dataclass
    class Small(Config):
        save_every: int = 0
        log_every: int = 1
        batch_size: int = 4

    cfg = Small(out=str(tmp_path))
    state = {"step": 3, "seconds": 100.0, "results": {"warm_start": 0.5}}
    runs.save_checkpoint(tmp_path, 3, {}, state, {"config": asdict(cfg), "made_of": {"vae": "abc"}})
    run = runs.Run(cfg, (), 0)
    assert run.start == 3 and 100 <= run.elapsed() < 110
    run.log.since -= 2.0
    run.log.row(7)
    assert run.log.latest["img/s"] == pytest.approx((7 - 3) * 4 / 2, rel=0.1)      # in this job's steps
    with pytest.raises(runs.Differs, match="started with other vae than"):
        run.cfg.vae = "another"
        run.must_be_made_of(vae="def")
    assert run.finish("DiT")["warm_start"] == 0.5


def test_a_signal_in_the_last_step_does_not_keep_a_run_from_finishing(monkeypatch):
    run = object.__new__(runs.Run)
    run.cfg, run.unreadable = SimpleNamespace(steps=9, save_every=0), False
    monkeypatch.setattr(ranks, "asked_to_stop", lambda must: True)
    assert run.save_due(8) and run.ends_early and run.must_save
    assert run.save_due(9) and not run.ends_early and run.must_save


def test_changed_captions_are_reported_and_refused_for_a_finished_run(capsys):
    run = object.__new__(runs.Run)
    run.cfg, run.rank, run.done, run.needed_by = SimpleNamespace(out="a", data_dir="b"), 0, False, "c"
    run.parts = {"captions": "1"}
    run.must_be_made_of(captions="2")
    said = capsys.readouterr().out
    assert "a was started with other captions than --data_dir=b has now; training continues" in said
    assert run.parts == {"captions": "2"}
    run.done = True
    with pytest.raises(runs.Differs, match="started with other captions"):
        run.must_be_made_of(captions="3")


def test_json_files_are_replaced_whole(tmp_path):
    runs.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_file_is_unchanged_until_the_new_one_is_flushed_to_disk(tmp_path, monkeypatch):
    def fail(number):
        raise OSError(5, "Input/output error")

    runs.write_json(tmp_path / "x.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        runs.write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_two_jobs_that_write_a_file_at_once_leave_it_whole(tmp_path, monkeypatch):
    path, fsync = tmp_path / "settings.json", os.fsync

    def slow(number):
        monkeypatch.setattr(os, "fsync", fsync)
        runs.write_json(path, {"a": 2})                            # another job, meanwhile
        fsync(number)

    monkeypatch.setattr(os, "fsync", slow)
    runs.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_others_may_read_a_checkpoint_as_the_umask_says(tmp_path):
    runs.save_folder(tmp_path / "a", {"model": {"x": torch.zeros(1)}}, {}, {"opt": {}})
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~files.UMASK) and "model.safetensors" in modes


def test_a_checkpoint_is_flushed_before_it_replaces_the_previous_one(tmp_path, monkeypatch):
    final, flushed, moved = tmp_path / "step_000005", set(), []
    fsync, rename = os.fsync, os.replace

    def noted(number):
        flushed.add(os.fstat(number).st_ino)
        fsync(number)

    def checked(a, b):
        if str(b) == str(final):
            inside = {file.name: file.stat().st_ino for file in Path(a).iterdir()}
            assert set(inside) == {"model.safetensors", "train_state.pt", "config.json", "SHA256SUMS"}
            assert set(inside.values()) <= flushed
            moved.append((tmp_path / "step_000005.davae-old" / "model.safetensors").exists())
        rename(a, b)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    for value in (1.0, 2.0):
        runs.save_folder(final, {"model": {"w": torch.full((2,), value)}}, {}, {"step": 5})
    assert moved == [False, True]

    monkeypatch.setattr(torch, "save", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs.save_folder(final, {"model": {"w": torch.zeros(2)}}, {}, {"step": 5})
    assert [path.name for path in tmp_path.iterdir()] == [final.name]          # a full disk needs the space
    assert load_file(final / "model.safetensors")["w"].tolist() == [2.0, 2.0]


def test_resuming_drops_the_log_lines_that_will_be_written_again(tmp_path, read_log):
    log = runs.Log(tmp_path, 0, 0, 30, every=10, batch_size=1)
    for step in (10, 20, 30):
        log.add({"loss": torch.tensor(1.0)})
        log.row(step)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 40, "lo')                                # killed in the middle of a line
    resumed = runs.Log(tmp_path, 0, 20, 30, every=10, batch_size=1)
    resumed.add({"loss": torch.tensor(2.0)})
    resumed.row(30)
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]


@pytest.mark.parametrize("lost", [
    b"\0" * 40 + b"\n", b'{"step": 3, "lo', b"\0\0\0{}\n", b"[1, 2]\n\xff\xfe\n", b'{"step": null}\n\n'])
def test_a_log_is_read_up_to_the_damage_of_a_power_cut(tmp_path, read_log, capsys, lost):
    whole = b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n'
    (tmp_path / "log.jsonl").write_bytes(whole + lost)
    assert figures.read_log(tmp_path)["loss"] == ([1, 2], [1.0, 2.0])
    assert "log.jsonl: " in capsys.readouterr().err
    resumed = runs.Log(tmp_path, 0, 2, 3, every=1, batch_size=1)
    resumed.add({"loss": torch.tensor(3.0)})
    resumed.row(3)
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("left", ["", "\0\0\0", '{"stage": "ba', "[]", "7"])
def test_a_summary_damaged_by_a_power_cut_is_rewritten(vae_config, tmp_path, left):
    cfg = vae_config(tmp_path, steps=1)
    before = train_vae.main(cfg)
    (tmp_path / "summary.json").write_text(left)
    figures.final_table([str(tmp_path)])                           # skips it
    after = train_vae.main(cfg)
    assert after == json.loads((tmp_path / "summary.json").read_text())
    assert after["psnr"] == pytest.approx(before["psnr"], abs=1e-4) and after["steps"] == 1


@pytest.mark.parametrize("killed", ["between the two renames", "before the former is removed"])
def test_a_checkpoint_survives_a_kill_while_it_is_replaced(tmp_path, killed):
    for value in (1.0, 2.0):
        runs.save_folder(tmp_path / "step_000005", {"model": {"w": torch.full((2,), value)}}, {"a": 1})
        assert not list(tmp_path.glob("*.davae-old"))
    if "between" in killed:
        (tmp_path / "step_000005").rename(tmp_path / "step_000005.davae-old")
    else:
        shutil.copytree(tmp_path / "step_000005", tmp_path / "step_000005.davae-old")
    runs.hold(tmp_path, 0)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_000005"]
    assert load_file(tmp_path / "step_000005" / "model.safetensors")["w"].tolist() == [2.0, 2.0]


def test_a_save_removes_what_a_killed_one_left_but_no_copy_that_a_user_made(tiny_run, tmp_path):
    kept, left = ("a.tmp", "a.old", "b.tmp"), ("a.davae-new", "a.davae-old", "b.davae-new")
    for name in ("a", *kept, *left):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    runs.save_folder(tmp_path / "a", {}, {})
    weights.main_export(weights.ExportConfig(run=tiny_run, out=str(tmp_path / "b")))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a", "b", *kept])
    assert all((tmp_path / name / "config.json").exists() for name in kept)

    # in a run, too
    step = tmp_path / "run" / "step_000001"
    runs.save_checkpoint(step.parent, 1, {}, {}, {})
    for ending in (".tmp", ".old", ".davae-new"):
        shutil.copytree(step, f"{step}{ending}")
    runs.hold(step.parent, 0)
    runs.save_checkpoint(step.parent, 2, {}, {}, {})
    steps = [path.name for path in step.parent.glob("step_*")]
    assert sorted(steps) == ["step_000001", "step_000001.old", "step_000001.tmp", "step_000002"]


# ---------------------------------------------------------------- reading what may be damaged or hostile


def test_a_damaged_file_comes_with_advice(tmp_path):
    runs.save_folder(tmp_path / "vae", {"model": {"w": torch.ones(2)}}, {})
    for step in (999_999, 1_000_000):
        runs.save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(2)}}, {}, {})
    advice = {
        "vae": "or start the run afresh",
        "step_999999": "or start the run afresh",
        "step_1000000": "remove .*step_1000000 to resume from .*step_999999",
    }
    for name, sentence in advice.items():
        file = tmp_path / name / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(SystemExit, match=sentence):
            runs.read_state_dict(file)


@pytest.mark.parametrize("left", [0, 80])
def test_truncated_checksums_do_not_vouch_for_files_they_lack(tmp_path, left):
    runs.save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {}, {})
    sums = tmp_path / "step_000001" / "SHA256SUMS"
    sums.write_text(sums.read_text()[:left])                                   # a power cut
    with pytest.raises(SystemExit, match="model.safetensors: damaged, it does not match SHA256SUMS"):
        runs.read_state_dict(tmp_path / "step_000001")


def test_truncated_weight_files_are_named(tmp_path):
    runs.save_folder(tmp_path / "a", {"model": {"w": torch.ones(1000)}}, {})
    (tmp_path / "a" / "SHA256SUMS").unlink()                       # as with a file from elsewhere
    torch.save({"w": torch.ones(1000)}, tmp_path / "b.pt")
    whole = {"a/model.safetensors": "not a whole .safetensors file", "b.pt": "not a whole .pt file"}
    for name, sentence in whole.items():
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:-900])
        with pytest.raises(SystemExit, match=sentence):
            runs.read_state_dict(file)


def test_optimizer_moments_that_are_not_finite_are_named(tmp_path):
    state = {"step": 3, "opt": {"state": {0: {"exp_avg_sq": torch.tensor([1.0, float("nan")])}}}}
    torch.save(state, tmp_path / "train_state.pt")
    run = object.__new__(runs.Run)
    run.checkpoint = tmp_path
    with pytest.raises(SystemExit, match="train_state.pt: opt.state.0.exp_avg_sq is not finite"):
        run.train_state()


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"w": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in ("bomb.pt", "plain.pt"):
        with pytest.raises(SystemExit, match="holds more than tensors"):
            runs.read_state_dict(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt", "config.json"])
def test_a_flipped_bit_is_reported_and_the_previous_checkpoint_offered(davae_config, tmp_path, name):
    cfg = davae_config(tmp_path / "a", steps=2, save_every=1, image_size=16, gan=0.0)
    train_vae.main(cfg)
    file = tmp_path / "a" / "step_000002" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"step_000002/{name}: damaged, .* to resume from .*step_000001"):
        train_vae.main(replace(cfg, steps=3))
    shutil.rmtree(file.parent)
    train_vae.main(replace(cfg, steps=3))                          # as advised
    assert runs.step_of(cfg.out) == 3


# ---------------------------------------------------------------- killed runs


DIE = "os.kill(os.getpid(), signal.SIGKILL)"
KILLED_SAVES = {
    "in the middle of a file": f"""
write = runs.save_file
def save_file(state, path):
    write(state, path)
    if 'step_000002' in str(path):
        open(path, 'rb+').truncate(os.path.getsize(path) // 2)
        {DIE}
runs.save_file = save_file
""",
    "before the rename": f"""
rename = os.replace
def replace(a, b):
    if str(b).endswith('step_000002'):
        {DIE}
    rename(a, b)
os.replace = replace
""",
    "before the old one is pruned": f"""
remove = runs.shutil.rmtree
def rmtree(path, **kw):
    if 'step_000000' in str(path) and os.path.isdir(str(path).replace('0.davae-new', '2')):
        {DIE}
    remove(path, **kw)
runs.shutil.rmtree = rmtree
""",
}


@pytest.mark.parametrize("moment", [
    "in the middle of a file", pytest.param("before the rename", marks=pytest.mark.slow),
    pytest.param("before the old one is pruned", marks=pytest.mark.slow)])
def test_a_run_killed_during_a_save_resumes_exactly(davae_config, same_weights, tmp_path, launch, moment):
    straight = davae_config(tmp_path / "a", save_every=1, image_size=32, disc_start=1)
    killed = replace(straight, out=str(tmp_path / "b"))
    process = launch(train_vae.main, killed, KILLED_SAVES[moment])
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert runs.step_of(killed.out) == (2 if "pruned" in moment else 1)
    train_vae.main(straight)
    train_vae.main(killed)
    assert same_weights(straight, killed)
    assert not list((tmp_path / "b").glob("*.davae-new"))
    assert [p.name for p in runs.checkpoints(killed.out)] == ["step_000003", "step_000004"]


def test_a_refused_command_leaves_no_folder_that_it_made(davae_config, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(ValueError, match="nowhere is not a folder"):
            train_vae.main(davae_config(tmp_path / name, data_dir=str(tmp_path / "nowhere")))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    lock = runs.hold(tmp_path / "run", 0)
    (tmp_path / "run" / "log.jsonl").write_text("")
    del lock
    assert (tmp_path / "run" / "log.jsonl").exists()


def test_images_that_vanish_during_training_cost_no_step_and_are_named_with_how_to_go_on(
        davae_config, tmp_path, monkeypatch, read_log):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    to_file = runs.Log.to_file

    def vanishing(log, step, line):
        to_file(log, step, line)
        if step == 2:
            shutil.rmtree(tmp_path / "photos")

    monkeypatch.setattr(runs.Log, "to_file", vanishing)
    cfg = davae_config(tmp_path / "run", data_dir=str(tmp_path / "photos"), steps=30)
    said = r"photos are unreadable.*png.*; then run the same command again: it goes on from step (\d), the"
    with pytest.raises(SystemExit, match=said) as stop:
        train_vae.main(cfg)
    last = read_log(cfg.out)[-1]["step"]
    assert runs.step_of(cfg.out) == last == int(re.search(said, str(stop.value))[1]) >= 2


def test_two_jobs_cannot_train_in_one_folder(davae_config, tmp_path):
    lock = runs.hold(tmp_path / "a", 0)
    with pytest.raises(SystemExit, match="another process is training here"):
        train_vae.main(davae_config(tmp_path / "a"))
    del lock
    train_vae.main(davae_config(tmp_path / "a", steps=1, image_size=16))


@pytest.mark.parametrize("out,sentence", [
    ("", "--out= is empty"), ("file", "not written: File exists"), ("loop", "not written: "),
    ("file/below", "not written: Not a directory"),
    ("/proc/nothing", "not written: No such file or directory")])
def test_an_unwritable_output_folder_gets_one_sentence(vae_config, tmp_path, monkeypatch, out, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit, match=sentence):
        train_vae.main(vae_config(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_intervals_of_0_save_the_first_and_last_step_and_log_the_last(vae_config, tmp_path, read_log):
    train_vae.main(vae_config(tmp_path / "a", steps=3, save_every=0, log_every=0))
    assert [path.name for path in runs.checkpoints(tmp_path / "a")] == ["step_000000", "step_000003"]
    assert [row["step"] for row in read_log(tmp_path / "a")] == [3]


@pytest.mark.parametrize("every,due", [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (7, [])])
def test_periodic_work_is_due_at_multiples_of_its_interval(every, due):
    assert [done for done in range(1, 7) if runs.is_due(done, every)] == due


# ---------------------------------------------------------------- disks


def test_too_small_a_disk_is_reported_at_step_zero(davae_config, small_disk, launch):
    process = launch(train_vae.main, davae_config(small_disk(100) / "run", image_size=32))
    out, err = process.communicate()
    assert process.returncode == 1
    assert "not written: " in err and "Make room" in err
    assert "Traceback" not in err
    assert "step 1/" not in out


def fill(file):
    """Write zeros until the disk is full."""
    with open(file, "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))


def test_training_continues_on_a_full_disk_and_the_next_save_retries(
        davae_config, small_disk, monkeypatch, capsys):
    disk = small_disk(4000)
    save = train_vae.save

    def filling(run, done, *rest, **options):      # full when step 2 is saved, empty again at step 3
        (disk / "filler").unlink(missing_ok=True)
        if done == 2:
            with pytest.raises(OSError, match="No space left"):
                fill(disk / "filler")
        save(run, done, *rest, **options)

    monkeypatch.setattr(train_vae, "save", filling)
    train_vae.main(davae_config(disk / "run", save_every=1, image_size=16, steps=3, gan=0.0))
    assert "training continues, and the next save tries again" in capsys.readouterr().err
    assert [p.name for p in runs.checkpoints(disk / "run")] == ["step_000001", "step_000003"]


def test_the_last_save_waits_until_there_is_room(davae_config, small_disk, monkeypatch, capsys):
    disk = small_disk(4000)
    save, pauses = train_vae.save, []

    def filling(run, done, *rest, **options):
        if done == 3 and not pauses:
            with pytest.raises(OSError, match="No space left"):
                fill(disk / "filler")
        save(run, done, *rest, **options)

    def waiting(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            (disk / "filler").unlink()

    monkeypatch.setattr(train_vae, "save", filling)
    monkeypatch.setattr(runs.time, "sleep", waiting)
    train_vae.main(davae_config(disk / "run", save_every=0, image_size=16, steps=3, gan=0.0))
    err = capsys.readouterr().err
    assert "Make room; trying again in 15 s" in err and "Make room; trying again in 30 s" in err
    assert pauses == [15, 30] and runs.step_of(disk / "run") == 3
    assert runs.read_summary(disk / "run")["steps"] == 3


@pytest.mark.parametrize("done, stops, attempts, ends", [
    (0, False, 1, True), (5, False, 1, False), (5, True, 5, True), (9, False, 5, True)])
def test_only_the_last_save_and_that_before_a_stop_wait_for_room(monkeypatch, done, stops, attempts, ends):
    def full(*args):
        tried.append(args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    tried = []
    run = object.__new__(runs.Run)
    run.cfg, run.rank, run.parts, run.results = SimpleNamespace(steps=9, out="out"), 0, {}, {}
    run.seconds, run.since, run.must_save = 0.0, 0.0, stops
    monkeypatch.setattr(runs, "save_checkpoint", full)
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: None)
    said = "Make room or give another --out, and run the command again"
    with pytest.raises(SystemExit, match=said) if ends else contextlib.nullcontext():
        run.save(done, {}, {}, {})
    assert len(tried) == attempts


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_disk_errors_end_training_only_for_required_writes(tmp_path, number, capsys):
    with runs.disk_may_fail():
        raise OSError(number, os.strerror(number), "file")
    assert os.strerror(number) in capsys.readouterr().err
    with pytest.raises(SystemExit, match="not written: .*what was saved is"), runs.disk_may_fail(must=True):
        raise OSError(number, os.strerror(number), "file")
    for error in (PermissionError(errno.EACCES, "Permission denied"), RuntimeError("shapes differ")):
        with pytest.raises(type(error)), runs.disk_may_fail():
            raise error


def cached(disk, vae, **changes):
    """Write the cache of latents of 40 drawn images to a disk."""
    cfg = finetune.Config(out=str(disk / "run"), vae="", D=12, image_size=64, images=40, flip=False,
                          dtype="float32", **changes)
    return latents.write_cache(vae, data.Procedural(64, 40), cfg, torch.device("cpu"), 0, 1)


def test_a_cache_of_latents_that_fills_the_disk_ends_in_one_sentence_and_resumes(
        make_davae, small_disk, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 16)
    monkeypatch.setattr(latents, "check_space", lambda *rest: None)    # another job fills the disk meanwhile
    disk, vae = small_disk(1000), make_davae(D=12)
    with pytest.raises(OSError, match="No space left"):
        fill(disk / "filler")
    (disk / "run").mkdir()
    said = "not written: .*No space left.* Make room or give --cache=False, and run the command again"
    with pytest.raises(SystemExit, match=said) as caught:
        cached(disk, vae)
    assert "00000.safetensors: not written" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(disk.glob("run/*/*.tmp*"))
    (disk / "filler").unlink()
    assert len(list(cached(disk, vae).glob("*.safetensors"))) == 3


def test_text_embeddings_that_fill_the_disk_end_in_one_sentence(small_disk):
    disk = small_disk(100)
    said = "text_00000.safetensors: not written: .*No space left.*and run the command again"
    with pytest.raises(SystemExit, match=said):
        tokens, pooled = torch.ones(1, 9, 99_999), torch.ones(1, 5)
        text.write_shard(disk / "text_00000.safetensors", ["a"], tokens, pooled, {})
    assert list(disk.iterdir()) == []


def test_an_export_that_fills_the_disk_ends_in_one_sentence_and_leaves_nothing(tiny_run, small_disk):
    disk = small_disk(300)
    said = "exported: not written: .*Make room or give another --out, and run the command again"
    with pytest.raises(SystemExit, match=said) as caught:
        weights.main_export(weights.ExportConfig(run=tiny_run, out=str(disk / "exported")))
    assert list(disk.iterdir()) == [] and "\n" not in str(caught.value)


def test_a_read_only_disk_is_reported_and_training_continues(davae_config, small_disk, monkeypatch, capsys):
    disk = small_disk(4000)
    run = disk / "run"
    loss = train_vae.vae_loss
    before_step = iter([                               # steps 2 and 3 find a read-only disk where the run was
        ["true"],
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", run],
        ["true"],
        ["umount", run],
    ])

    def mounting(*args):
        subprocess.run(next(before_step), check=True)
        return loss(*args)

    monkeypatch.setattr(train_vae, "vae_loss", mounting)
    train_vae.main(davae_config(run, save_every=1, image_size=16, steps=4, gan=0.0))
    assert capsys.readouterr().err.count("Read-only file system") >= 2
    assert [p.name for p in runs.checkpoints(run)] == ["step_000001", "step_000004"]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(SystemExit, match="not written: .*Read-only file system"):
        train_vae.main(davae_config(disk / "other", image_size=16))


def test_a_log_line_has_the_mean_over_its_step_and_the_newest_value_of_a_rarer_metric(tmp_path, read_log):
    log = runs.Log(tmp_path, 0, 0, 6, every=2, batch_size=1)
    seen = []
    log.sinks.append(lambda step, line: seen.append((step, line)))
    for step in range(6):
        for part in (0.0, 1.0):
            log.add({"loss": torch.tensor(step + part)})
        if step == 2:
            log.add({"fd": torch.tensor(7.0)})
        log.row(step + 1, lr=0.1, w=None)
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["loss"] for row in rows] == [1.5, 3.5, 5.5]        # of steps 2, 4 and 6 only
    assert [row.get("fd") for row in rows] == [None, 7.0, None]
    assert all(row["lr"] == 0.1 and "w" not in row for row in rows)
    assert [step for step, _ in seen] == [2, 4, 6] and seen[1][1]["fd"] == 7.0


# ---------------------------------------------------------------- the newest run


def a_run(folder, script, age):
    runs.save_checkpoint(folder, 1, {}, None, {"script": script})
    at = time.time() - age
    os.utime(folder / "step_000001/config.json", (at, at))


def test_the_newest_run_of_finetune_is_found_one_or_two_levels_down(tmp_path, capsys):
    a_run(tmp_path / "old", "finetune.py", 300)
    a_run(tmp_path / "vae", "train_vae.py", 10)
    assert runs.newest_run(tmp_path) == str(tmp_path / "old")
    a_run(tmp_path / "mine-taef2" / "photos", "finetune.py", 100)
    assert runs.newest_run(tmp_path) == str(tmp_path / "mine-taef2/photos")
    assert f"the newest run in {tmp_path}: " in capsys.readouterr().out


def test_without_a_run_the_command_that_makes_one_is_named(tmp_path):
    a_run(tmp_path / "vae", "train_vae.py", 0)
    with pytest.raises(SystemExit, match="no run of finetune.py here; make one .python finetune.py."):
        runs.newest_run(tmp_path)
