"""support/stages.py: what a run needs first, which folders that goes into, and all stages by one command."""
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import finetune
import train_vae
from support import config, figures, identity, runs, stages
from support.weights import load_davae, save_base_vae

SMALL = dict(image_size=16, flip=False, steps=2, batch_size=4, micro_batch=4, save_every=0, dtype="float32")
VAE = SMALL | dict(D=12, perceptual="none", gan=0.0, crop=(), halvings=0, stats=8, cooldown=0.0)
DIT = SMALL | dict(E=32, depth=1, A=2, N=2, sample_steps=2)


@pytest.mark.parametrize("argv, command", [
    (["tiny"], "python finetune.py tiny"), (["tiny-base"], "python train_vae.py tiny"),
    (["photos", "--data_dir=my photos"], "python finetune.py photos '--data_dir=my photos'"),
    (["klein"], "python finetune.py klein-1024"),
    (["tiny", "--D=32"], ""), (["tiny", "--out=out/mine"], ""), (["vavae"], "")])
def test_what_follows_a_vae_is_the_preset_that_is_trained_on_its_folder(argv, command):
    cfg = config.cli(train_vae.Config, train_vae.PRESETS, argv)
    assert stages.follow(cfg, train_vae.makers()) == ([command] if command else [])


@pytest.fixture
def toys(monkeypatch, tmp_path, make_base):
    """The presets of photos at toy size, in an empty working folder with a base VAE in weights/base."""
    monkeypatch.chdir(tmp_path)
    for presets, name, small in (
            (train_vae.PRESETS, "photos", VAE), (finetune.PRESETS, "photos-base", DIT | {"D": 0}),
            (finetune.PRESETS, "photos", DIT | {"D": 12})):
        monkeypatch.setitem(presets, name, presets[name] | small)
    save_base_vae(make_base(), "weights/base")


def picture(seed):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (16 + seed % 5, 20, 3), dtype=np.uint8))


def photos(folder, seed=0, classes=("cats", "dogs"), n=6):
    for k, name in enumerate(classes):
        Path(folder, name).mkdir(parents=True)
        for i in range(n):
            picture(seed + 10 * k + i).save(f"{folder}/{name}/{i}.png")


def whole_job(*flags):
    cfg = config.cli(finetune.Config, finetune.PRESETS, ["photos", "--base_vae=weights/base", *flags])
    finetune.main(cfg)
    return cfg


def folders(cfg):
    return [stage.out for _, stage in stages.missing(cfg, finetune.MAKER, finetune.makers())]


# ---------------------------------------------------------------- which stages, and where


def test_a_preset_needs_its_whole_chain_in_order_and_each_run_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = finetune.Config(preset="tiny", **finetune.PRESETS["tiny"])
    assert folders(tiny) == ["out/tiny-base-vae", "out/tiny-vae", "out/tiny-base", "out/tiny"]


def test_stage_1_also_plans_its_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-base", "tiny"):
        small = dict(steps=1, images=8, stats=4, batch_size=2, save_every=0)
        monkeypatch.setitem(train_vae.PRESETS, name, train_vae.PRESETS[name] | small)
    train_vae.main(config.cli(train_vae.Config, train_vae.PRESETS, ["tiny"]))
    said = capsys.readouterr().out
    assert said.index("base VAE    out/tiny-base-vae") < said.index("DA-VAE      out/tiny-vae")
    assert runs.read_summary("out/tiny-vae")["steps"] == 1


def test_a_da_vae_is_the_same_whether_or_not_its_job_made_its_base(tmp_path, monkeypatch, same_weights):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-base", "tiny"):
        small = dict(steps=1, images=8, stats=4, batch_size=2, save_every=0)
        monkeypatch.setitem(train_vae.PRESETS, name, train_vae.PRESETS[name] | small)
    one_job = config.cli(train_vae.Config, train_vae.PRESETS, ["tiny"])
    train_vae.main(one_job)
    alone = config.cli(train_vae.Config, train_vae.PRESETS, ["tiny", "--out=out/alone"])
    train_vae.main(alone)
    assert same_weights(one_job, alone)


def test_a_plan_includes_only_what_presets_make(finetune_config, tmp_path):
    assert folders(finetune_config(tmp_path / "run")) == [str(tmp_path / "run")]


@pytest.mark.parametrize("data_dir, base_vae, home", [
    ("my_photos", "weights/taef2", "out/my_photos-taef2"),
    ("/data/imagenette/train", "madebyollin/taef2", "out/imagenette-taef2"),
    ("my_photos/", "sd3.5-medium", "out/my_photos-sd3.5-medium"),
    ("../photos", "vae/diffusion_pytorch_model.safetensors", "out/photos-diffusion_pytorch_model"),
    (".", "taef2", "out/images-taef2"),
])
def test_a_whole_jobs_folders_are_named_after_its_images_and_base(data_dir, base_vae, home):
    flags = [f"--data_dir={data_dir}", f"--base_vae={base_vae}", "--lpips_trunk=squeeze.pth"]
    cfg = config.cli(finetune.Config, finetune.PRESETS, ["photos", *flags])
    stages.settle(cfg)
    assert (cfg.out, cfg.vae, cfg.base) == (f"{home}/photos", f"{home}/photos-vae", f"{home}/photos-base")
    (_, _, vae), (_, _, base) = stages.stages_of(cfg, finetune.makers())
    assert (vae.base, vae.lpips_trunk, vae.data_dir) == (base_vae, "squeeze.pth", data_dir)
    assert (base.vae, base.D, base.base_vae) == (vae.out, 0, base_vae)


def test_folders_given_on_the_command_line_are_kept():
    cfg = config.cli(finetune.Config, finetune.PRESETS,
                     ["photos", "--base_vae=taef2", "--out=out/here", "--vae=out/photos-vae"])
    stages.settle(cfg)
    assert (cfg.out, cfg.vae, cfg.base) == ("out/here", "out/photos-vae", "out/procedural-taef2/photos-base")


def test_a_whole_job_takes_its_text_encoders_from_its_base():
    flags = ["sd35m-1024", "--data_dir=captioned", "--base=sd35", "--base_vae=sd35"]
    cfg = config.cli(finetune.Config, finetune.PRESETS, flags)
    stages.settle(cfg)
    home = "out/captioned-sd35"
    assert (cfg.out, cfg.vae, cfg.base) == (f"{home}/sd35m-1024", f"{home}/sd35m-vae", "sd35")
    assert cfg.text == "sd35"
    cfg = config.cli(finetune.Config, finetune.PRESETS, [*flags, "--text=out/text"])
    stages.settle(cfg)
    assert cfg.text == "out/text"


def test_neither_script_trains_in_a_folder_with_a_run_of_the_other(
        tiny_vae, tiny_run, davae_config, finetune_config, tmp_path, monkeypatch):
    before = sorted(Path(tiny_vae).rglob("*")), sorted(Path(tiny_run).rglob("*"))
    jobs = [(finetune, finetune_config(tiny_vae), "vae: holds a run of train_vae.py, with which finetune.py"),
            (train_vae, davae_config(tiny_run), "run: holds a run of finetune.py, with which train_vae.py")]
    for script, cfg, said in jobs:
        for steps in (1, 3, 9):                                    # fewer than the run has, as many, and more
            with pytest.raises(SystemExit, match=f"{said} cannot go on; give another --out, or rename that"):
                script.main(dataclasses.replace(cfg, steps=steps))
    assert before == (sorted(Path(tiny_vae).rglob("*")), sorted(Path(tiny_run).rglob("*")))

    # also where a preset's stage would go, and where nothing is trained yet
    monkeypatch.chdir(tmp_path)
    runs.save_checkpoint("out/tiny-vae", 0, {}, None, {"script": "finetune.py", "config": {}})
    cfg = config.cli(finetune.Config, finetune.PRESETS, ["tiny"])
    cfg.after = {}
    with pytest.raises(SystemExit, match="^out/tiny-vae: holds a run of finetune.py, with which train_v"):
        stages.make_missing(cfg, finetune.makers())


# ---------------------------------------------------------------- the whole job


def test_one_command_goes_from_photos_and_a_base_vae_to_da_vae_samples(toys, capfd):
    photos("mine")
    done = whole_job("--data_dir=mine")
    said, bar = capfd.readouterr()

    plan = [line.split("  ")[0] for line in said[said.index("to train"):].splitlines()[1:4]]
    assert plan == ["DA-VAE", "base DiT", "DA-VAE DiT"]
    assert "out/mine-base/photos: 12 images in 2 classes (cats 6, dogs 6)" in said
    assert "of training in all" in said and "GB free" in said
    assert "all stages 00:0" in bar                                # the first stage and those after it
    assert "max |v - v_base| = 0.0" in said + bar
    for run in ("photos-vae", "photos-base", "photos"):
        assert runs.read_summary(f"out/mine-base/{run}")["steps"] == 2
    assert Path("out/mine-base/photos/samples.png").exists()
    assert "python sample.py out/mine-base/photos\n" in said
    assert "python evaluate.py out/mine-base/photos --data_dir=HELD_OUT_IMAGES" in said
    assert "out/mine-base/photos needs out/mine-base/photos-vae, which does not exist yet: running\n" in said
    assert "    python train_vae.py photos --out=out/mine-base/photos-vae --data_dir=mine --base=" in said
    assert "give more --steps" not in said                         # no such hint for stages within the plan

    whole_job("--data_dir=mine")                                   # nothing is left to do, so no plan
    said, _ = capfd.readouterr()
    assert "finished at step 2; to continue, give more --steps" in said and "to train " not in said
    assert "next: python sample.py out/mine-base/photos\n" in said
    assert folders(dataclasses.replace(done, out="out/mine-base/other")) == ["out/mine-base/other"]

    model = {"model": identity.of_run(runs.latest_checkpoint(done.out))}   # samples of this state of the run
    Path(done.out, "samples").mkdir()
    runs.write_json(f"{done.out}/samples/settings.json", model)
    assert figures.folder_of_samples(done.out) == ""
    whole_job("--data_dir=mine", "--steps=3")                      # those of the next need another folder
    assert figures.folder_of_samples(done.out) == f" --out={done.out}/samples_3"

    picture(99).save("mine/cats/new.png")
    with pytest.raises(SystemExit, match="other images than --data_dir=mine has now: give the original, or .*"
                                         "--out .* --vae=out/mine-base/photos-vae .*on what was made before"):
        whole_job("--data_dir=mine", "--steps=3")


def test_other_photos_get_other_folders_or_are_refused_if_named_the_same(toys, capfd):
    photos("mine")
    photos("others", seed=50)
    photos("elsewhere/mine", seed=50, classes=("cats", "dogs"))
    whole_job("--data_dir=mine")
    first = runs.hash_of(load_davae("out/mine-base/photos-vae"))
    whole_job("--data_dir=others")
    assert runs.hash_of(load_davae("out/others-base/photos-vae")) != first
    assert runs.hash_of(load_davae("out/mine-base/photos-vae")) == first
    with pytest.raises(SystemExit, match="out/mine-base/photos was started with other vae than|other images"):
        whole_job("--data_dir=elsewhere/mine")
    with pytest.raises(SystemExit, match="photos-vae was started with other images than .*give the original; "
                                         "or give --vae=.* or rename the folder of images"):
        whole_job("--data_dir=elsewhere/mine", "--out=out/new")
    assert runs.hash_of(load_davae("out/mine-base/photos-vae")) == first


def test_a_folder_with_captions_but_no_classes_gives_an_unconditional_model(toys, capfd):
    Path("flat").mkdir()
    for i in range(12):
        picture(i).save(f"flat/{i}.png")
        Path(f"flat/{i}.txt").write_text(f"drawing {i}")
    whole_job("--data_dir=flat")
    said, _ = capfd.readouterr()
    assert "12 images without classes, 12 captions" in said
    assert runs.read_config(runs.latest_checkpoint("out/flat-base/photos"))["model"]["num_classes"] == 1


def test_a_preset_without_its_base_vae_names_the_flag_that_gives_one(toys):
    photos("mine")
    cfg = config.cli(finetune.Config, finetune.PRESETS, ["photos", "--data_dir=mine"])
    with pytest.raises(SystemExit, match="its base VAE, taef2, is missing; give one with --base_vae="):
        finetune.main(cfg)
    assert not Path("out").exists()
    runs.save_checkpoint("out/photos-vae", 1, {}, None, {})
    cfg = config.cli(finetune.Config, finetune.PRESETS, ["photos", "--data_dir=mine"])
    with pytest.raises(SystemExit, match="is at step 1 of 2; to use it as it is, rename .* as --vae="):
        finetune.main(cfg)


def test_a_folder_of_documents_is_refused_before_anything_is_made(toys):
    Path("papers").mkdir()
    Path("papers/a.pdf").write_text("%PDF")
    Path("papers/b.mp4").write_text("")
    with pytest.raises(ValueError, match=r"no images .* in 'papers' \(1 .*, 1 .*\)"):
        whole_job("--data_dir=papers")
    assert not Path("out").exists()


def test_a_plan_does_not_change_the_training(toys, monkeypatch, same_weights):
    photos("mine")
    planned = whole_job("--data_dir=mine")
    Path("out").rename("planned")
    monkeypatch.setattr(stages, "missing", lambda cfg, maker, makers: [])          # so there is no plan
    torch.manual_seed(123)
    whole_job("--data_dir=mine")
    with_plan = dataclasses.replace(planned, out="planned/mine-base/photos")
    assert same_weights(planned, with_plan, names=("model", "ema"))


def test_the_report_is_written_at_the_end(toys, report_at_the_end, monkeypatch):
    monkeypatch.setattr(evaluate, "report_at_the_end", report_at_the_end)
    photos("mine")
    whole_job("--data_dir=mine")
    page = Path("out/mine-base/photos/report.html").read_text()
    assert "Training images" in page


# ---------------------------------------------------------------- how long it takes


def test_a_stage_is_timed_on_as_many_images_as_one_pass_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {}

    def trial(cfg, n, device, known, classes):
        seen[cfg.out] = n
        return torch.nn.Linear(1, 1), lambda: None

    for maker in finetune.makers():
        monkeypatch.setattr(maker, "trial", trial)
    monkeypatch.setattr(stages, "seconds_of", lambda step, device: 0.01)
    tiny = finetune.Config(preset="tiny", **finetune.PRESETS["tiny"] | {"batch_size": 12, "micro_batch": 4})
    stages.plan(tiny, finetune.makers(), 0, torch.device("cpu"))
    assert seen == {"out/tiny-base-vae": 8, "out/tiny-vae": 4, "out/tiny-base": 32, "out/tiny": 4}
    assert tiny.after["out/tiny-vae"] == pytest.approx(0.01 * (450 + 3 * 420))


def test_a_stage_that_refuses_names_the_command_that_takes_the_flags_it_advises(toys, monkeypatch):
    photos("photos")
    for presets in (train_vae.PRESETS, finetune.PRESETS):
        monkeypatch.setitem(presets, "photos", presets["photos"] | {"D": 20})
    with pytest.raises(SystemExit) as refused:
        whole_job("--data_dir=photos")
    said = str(refused.value)
    assert "--D=20: details in closed form" in said and "give --D=16 or less, or --fit=random\n(out/" in said
    assert "\n    python train_vae.py photos --out=out/photos-base/photos-vae --data_dir=photos" in said
    assert said.endswith("and then give --vae=out/photos-base/photos-vae)")


def test_what_this_commands_own_flags_cause_in_another_stage_gets_no_advice_about_other_flags():
    said = SystemExit("nope: no such file or folder")
    stage = train_vae.Config(out="out/a-vae")
    assert stages.refused(said, train_vae.MAKER, stage, finetune.Config(out="out/a")) is said
    about_flags = SystemExit("--D=5: wanted 32")
    advised = stages.refused(about_flags, train_vae.MAKER, stage, finetune.Config(out="out/a"))
    assert "and then give --vae=out/a-vae" in str(advised)


def test_step_time_is_a_mean_without_the_first_three_steps(monkeypatch):
    clock = iter([70.0, 90.0, 100.0, 100.1, 100.2, 100.6, 102.0])  # three warm-up calls, then timed ones
    monkeypatch.setattr(stages.time, "time", lambda: next(clock))
    passes = []
    assert stages.seconds_of(lambda: passes.append(1), torch.device("cpu")) == pytest.approx(0.2)
    assert len(passes) == 6


@pytest.mark.parametrize("seconds, told", [
    (0.1, "5 s"), (42, "40 s"), (89, "90 s"), (150, "2 min"), (7100, "118 min"), (9000, "2.5 h")])
def test_times_are_shown_no_more_precisely_than_they_are_known(seconds, told):
    assert stages.minutes(seconds) == told
