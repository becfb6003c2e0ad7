"""common.py: the command line's sentences, checkpoints that are whole or absent, safe reading, seeds."""
import json
import os
import pickle
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from support.config import field
from support import config, ranks, runs


@dataclass
class Config:
    preset: str = field("small", "a preset")
    out: str = field("", "folder")
    steps: int = field(10, "steps")
    lr: float = field(1e-3, "rate")
    flip: bool = field(True, "mirror")
    ch_mult: tuple = field((1, 2), "widths")


PRESETS = {"small": {"steps": 20}, "large": {"steps": 200, "lr": 0.1}}


def test_command_line_applies_preset_then_flags_with_the_fields_types():
    cfg = config.cli(Config, PRESETS, ["large", "--steps=1_000", "--flip=False", "--ch_mult=1,2,4"])
    assert cfg == Config("large", "", 1000, 0.1, False, (1, 2, 4))
    assert config.cli(Config, PRESETS, []).steps == 20
    assert config.cli(Config, None, ["anything"]).preset == "anything"


@pytest.mark.parametrize("argv,sentence", [
    (["--step=3"], "--step is not a field .did you mean steps"),
    (["--steps=3.5"], "--steps='3.5': wanted a whole number"),
    (["--flip=yes"], "--flip='yes': wanted True or False"),
    (["--lr=fast"], "--lr='fast': wanted a number"),
    (["smal"], "no preset 'smal' .did you mean small"),
    (["--steps", "3"], "'--steps' is not of the form --field=value"),
])
def test_command_line_mistakes_get_one_sentence(argv, sentence):
    with pytest.raises(SystemExit, match=sentence):
        config.cli(Config, PRESETS, argv)


def test_help_names_every_field_and_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        config.cli(Config, PRESETS, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name}" in text for name in Config.__dataclass_fields__) and "large" in text


@pytest.mark.parametrize("batch,micro,world,count", [(64, 64, 1, 1), (64, 16, 1, 4), (640, 80, 8, 1), (48, 20, 1, 3), (8, 80, 8, 1)])
def test_micro_batches_share_the_global_batch_equally(batch, micro, world, count):
    assert ranks.micro_batches(batch, micro, world) == count
    assert batch // world % count == 0 and batch // world // count <= micro


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(SystemExit, match="batch_size 7 is not 2 ranks"):
        ranks.micro_batches(7, 4, 2)


def test_reseeding_depends_on_seed_rank_and_step_only():
    def draw(*key):
        ranks.seed_step(*key)
        return torch.randn(4)

    first = draw(0, 1, 2)
    torch.randn(100)
    assert torch.equal(draw(0, 1, 2), first)
    assert all(not torch.equal(draw(*other), first) for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)))


def test_checkpoints_are_pruned_only_after_the_new_one_is_whole(tmp_path):
    for step in (1, 2, 3):
        runs.save_checkpoint(tmp_path, step, {"model": {"w": torch.full((2,), float(step))}}, {"step": step}, {"a": 1})
    assert [p.name for p in runs.checkpoints(tmp_path)] == ["step_000002", "step_000003"]
    newest = runs.latest_checkpoint(tmp_path)
    assert load_file(newest / "model.safetensors")["w"].tolist() == [3.0, 3.0]
    assert torch.load(newest / "train_state.pt", weights_only=True) == {"step": 3} and runs.read_config(newest) == {"a": 1}


def test_a_save_that_breaks_off_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    runs.save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {"step": 1}, {})

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        runs.save_checkpoint(tmp_path, 2, {"model": {"w": torch.zeros(2)}}, {"step": 2}, {})
    assert runs.step_of(tmp_path) == 1                           # the half-written one does not count
    assert load_file(runs.latest_checkpoint(tmp_path) / "model.safetensors")["w"].tolist() == [1.0, 1.0]


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(SystemExit, match="an empty run"):
        runs.latest_checkpoint(tmp_path)
    with pytest.raises(SystemExit, match="no such folder"):
        runs.latest_checkpoint(tmp_path / "nowhere")


def test_resume_refuses_another_run_and_names_both_values(tmp_path, capsys):
    out = str(tmp_path)
    saved = {"config": {"out": out, "steps": 10, "lr": 1e-3, "ch_mult": [1, 2]}}
    assert runs.resume(Config(out=out), free=set()) is None
    runs.save_checkpoint(out, 0, {}, {}, saved)
    assert runs.resume(Config(out=out, steps=11), free=set()) is None        # nothing is trained yet: it may begin again
    runs.save_checkpoint(out, 5, {}, {}, saved)
    assert runs.resume(Config(out=out, lr=0.5), free={"preset", "lr"}).name == "step_000005"
    assert "resuming with lr=0.5 (was 0.001)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="started with steps=10, now steps=11"):
        runs.resume(Config(out=out, steps=11), free={"preset", "lr"})


def test_damage_is_answered_with_what_can_be_done(tmp_path):
    runs.save_folder(tmp_path / "vae", {"model": {"w": torch.ones(2)}}, {})
    for step in (999_999, 1_000_000):
        runs.save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(2)}}, {}, {})
    for name, advice in {"vae": "or start the run afresh", "step_999999": "or start the run afresh",
                         "step_1000000": "remove .*step_1000000 to go on from .*step_999999"}.items():
        file = tmp_path / name / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(SystemExit, match=advice):
            runs.read_state_dict(file)


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


def test_truncated_weight_files_are_named(tmp_path):
    runs.save_folder(tmp_path / "a", {"model": {"w": torch.ones(1000)}}, {})
    torch.save({"w": torch.ones(1000)}, tmp_path / "b.pt")
    whole = {"a/model.safetensors": "not a whole .safetensors file", "b.pt": "not a whole .pt file"}
    for name, sentence in whole.items():
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:-900])
        (tmp_path / "a" / "SHA256SUMS").unlink(missing_ok=True)    # as in a file from elsewhere
        with pytest.raises(SystemExit, match=sentence):
            runs.read_state_dict(file)


def test_json_files_are_replaced_whole(tmp_path):
    runs.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_resuming_drops_the_log_lines_that_will_be_written_again(tmp_path):
    log = runs.Log(tmp_path, 0, 0, 30)
    for step in (10, 20, 30):
        log(step, {"loss": torch.tensor(1.0)})
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 40, "lo')                                # killed in the middle of a line
    runs.Log(tmp_path, 0, 20, 30)(30, {"loss": torch.tensor(2.0)})
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [(r["step"], r["loss"]) for r in rows] == [(10, 1.0), (20, 1.0), (30, 2.0)]
