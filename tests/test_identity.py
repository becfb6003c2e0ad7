"""support/identity.py: runs, caches and samples identify what they depend on by its contents."""
import errno
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file

import finetune
import sample
import train_vae
from support import data, files, identity, latents, metrics, runs
from support.weights import load_davae


@pytest.fixture
def photos(tmp_path):
    """A folder of four 16-pixel images in each of the classes ant, bee and cat, all different."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.bmp")
    return tmp_path / "photos"


def overwrite_in_place(photos):
    """Change the pixels of a file, but not its size and time."""
    file = photos / "bee" / "2.bmp"
    times = file.stat()
    Image.new("RGB", (16, 16), "gray").save(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def exchange_two_folders(photos):
    (photos / "ant").rename(photos / "aside")
    (photos / "cat").rename(photos / "ant")
    (photos / "aside").rename(photos / "cat")


def move_one_to_another_class(photos):
    (photos / "ant" / "0.bmp").rename(photos / "cat" / "9.bmp")


def rename_a_class(photos):
    (photos / "cat").rename(photos / "aardvark")


def mirror_one(photos):
    image = Image.open(photos / "cat" / "1.bmp")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "cat" / "1.bmp")


CHANGES = [overwrite_in_place, exchange_two_folders, move_one_to_another_class, rename_a_class, mirror_one]


# ---------------------------------------------------------------- digests


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_change_the_fingerprint_and_copies_keep_it(photos, tmp_path, change):
    before = data.open_dataset(photos, 16).fingerprint
    shutil.copytree(photos, tmp_path / "elsewhere", copy_function=shutil.copyfile)         # with other times
    assert data.open_dataset(tmp_path / "elsewhere", 16).fingerprint == before
    change(photos)
    assert data.open_dataset(photos, 16).fingerprint != before


def test_large_data_sets_are_identified_by_names_sizes_times_and_samples(photos, monkeypatch):
    monkeypatch.setattr(identity, "ALL_BYTES", 2000)
    monkeypatch.setattr(identity, "PIECE", 100)
    monkeypatch.setattr(identity, "AT_MOST", 3)                    # the first, one in the middle and the last
    files = sorted(photos.rglob("*.bmp"))
    before = identity.of_files(files, photos)
    assert identity.of_files(files, photos) == before

    content = bytearray(files[-1].read_bytes())
    content[-1] ^= 1
    files[-1].write_bytes(content)                                 # the last byte of a file read in pieces
    after = identity.of_files(files, photos)
    assert after != before
    os.utime(files[1], ns=(0, 0))                                  # a file that is not read at all
    assert identity.of_files(files, photos) != after


def test_a_disk_that_fails_for_a_moment_changes_no_fingerprint(photos, monkeypatch):
    before = data.open_dataset(photos, 16).fingerprint
    digest_of, failed = identity.digest_of, []

    def failing(path, *rest):
        if path not in failed:                                     # each file once
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest_of(path, *rest)

    monkeypatch.setattr(files, "PAUSES", (0, 0))
    monkeypatch.setattr(identity, "digest_of", failing)
    assert data.open_dataset(photos, 16).fingerprint == before and len(failed) == 12


def test_drawings_are_distinguished_by_seed_size_and_number():
    prints = {data.open_dataset("procedural", size, count, seed).fingerprint
              for size, count, seed in ((16, 20, 0), (16, 20, 1), (32, 20, 0), (16, 21, 0))}
    assert len(prints) == 4


def test_a_source_is_identified_by_its_weights(base_run, tmp_path):
    before = identity.of_source(base_run)
    shutil.copytree(base_run, tmp_path / "moved")
    assert identity.of_source(tmp_path / "moved") == before
    assert identity.of_source(runs.latest_checkpoint(base_run)) == before
    assert identity.of_source(tmp_path / "nowhere") is None and identity.of_source("") is None

    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    file = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({"w": torch.zeros(1000)}, file)
    one = identity.of_source(tmp_path / "pipeline", "vae")
    (tmp_path / "pipeline" / "text_encoder").mkdir()               # its neighbours do not matter
    assert identity.of_source(tmp_path / "pipeline", "vae") == one
    weights = torch.zeros(1000)
    weights[-1] = 1                                                # but one number among many does
    save_file({"w": weights}, file)
    assert identity.of_source(tmp_path / "pipeline", "vae") != one


def test_statistics_of_latents_are_identified_by_what_lies_next_to_the_weights(tmp_path):
    folder = tmp_path / "pipeline" / "vae"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, folder / "diffusion_pytorch_model.safetensors")
    weights = identity.of_source(tmp_path / "pipeline", "vae")
    assert identity.of_statistics(tmp_path / "nowhere") is None and identity.of_statistics("") is None

    def digest(**config):
        runs.write_json(folder / "config.json", config)
        assert identity.of_statistics(folder / "diffusion_pytorch_model.safetensors") \
            == identity.of_statistics(folder) == identity.of_statistics(tmp_path / "pipeline")
        return identity.of_statistics(folder)

    none = identity.of_statistics(folder)
    assert none is not None and digest(_diffusers_version="0.42.1") == none
    known = {none, digest(scaling_factor=0.5), digest(scaling_factor=1.5, shift_factor=0.06),
             digest(scaling_factor=1.5), digest(latents_mean=[0, 0]), digest(model_name="dc-ae-f64c128")}
    for std in (1.0, 2.0):
        torch.save({"mean": torch.zeros(2), "std": torch.full((2,), std)}, folder / "latents_stats.pt")
        known.add(digest(scaling_factor=0.5))
    assert len(known) == 8 and identity.of_source(tmp_path / "pipeline", "vae") == weights


def test_a_run_is_identified_by_its_trained_frozen_and_vae_weights(tmp_path):
    places = ("step_000001", "frozen", "vae")

    def save(place, value, **more):
        runs.save_folder(tmp_path / place, {"model": {"w": torch.full((2,), value)}}, more, more)

    for place in places:
        save(place, 0.0)
    known = {identity.of_run(tmp_path / "step_000001")}
    for place in places:
        save(place, 0.0, written="again, of the same weights")
        assert identity.of_run(tmp_path / "step_000001") in known
        save(place, 1.0)
        known.add(identity.of_run(tmp_path / "step_000001"))
    assert len(known) == 4


def test_a_text_model_depends_on_captions_and_a_class_model_on_classes():
    vae = torch.nn.Linear(1, 1)
    images = SimpleNamespace(fingerprint="f", classes=["ant"], captions=["an ant"])
    texts, labels = (SimpleNamespace(text=text, base="") for text in ("out/text", ""))
    before = identity.of_parts(texts, vae, images)
    assert before["classes"] is None and before["captions"] and before["images"] == "f"
    images.captions = ["a bee"]
    assert identity.of_parts(texts, vae, images)["captions"] != before["captions"]
    other = identity.of_parts(labels, vae, images)
    assert other["captions"] is None and other["classes"] == ["ant"] and other["vae"] == before["vae"]


# ---------------------------------------------------------------- the latent cache


@pytest.mark.parametrize("change", CHANGES)
def test_the_latent_cache_changes_with_images_and_classes(
        photos, tiny_vae, finetune_config, tmp_path, change):
    vae = load_davae(tiny_vae)
    cfg = finetune_config(tmp_path / "run", vae="", data_dir=str(photos))
    cpu = torch.device("cpu")
    before = latents.write_cache(vae, data.open_dataset(photos, 64), cfg, cpu, 0, 1)
    assert latents.write_cache(vae, data.open_dataset(photos, 64), cfg, cpu, 0, 1) == before
    moved = replace(cfg, data_dir="elsewhere")                     # the location does not matter
    assert latents.write_cache(vae, data.open_dataset(photos, 64), moved, cpu, 0, 1) == before
    change(photos)
    after = latents.write_cache(vae, data.open_dataset(photos, 64), cfg, cpu, 0, 1)
    assert after != before


def test_a_damaged_or_foreign_cache_file_is_rewritten(photos, tiny_vae, finetune_config, tmp_path):
    vae = load_davae(tiny_vae)
    cfg = finetune_config(tmp_path / "run", vae="")
    folder = latents.write_cache(vae, data.open_dataset(photos, 64), cfg, torch.device("cpu"), 0, 1)
    whole = (folder / "00000.safetensors").read_bytes()
    kept = load(whole)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"latents": torch.zeros(12, 16, 16, 16), "labels": torch.zeros(12)}, foreign)
    for content in (whole[:-10], b"", foreign.read_bytes()):
        (folder / "00000.safetensors").write_bytes(content)
        latents.write_cache(vae, data.open_dataset(photos, 64), cfg, torch.device("cpu"), 0, 1)
        again = load_file(folder / "00000.safetensors")
        assert torch.equal(again["latents"], kept["latents"]) and torch.equal(again["labels"], kept["labels"])


# ---------------------------------------------------------------- resumed and finished runs


@pytest.fixture
def class_run(photos, finetune_config, tmp_path):
    """The Config of a base DiT of three classes, trained on `photos` for two steps."""
    cfg = finetune_config(tmp_path / "run", data_dir=str(photos), D=0, p=2, E=32, depth=2, A=2, base="",
                          steps=2, batch_size=4, micro_batch=4, save_every=2)
    finetune.main(cfg)
    return cfg


def test_an_added_or_renamed_class_is_refused_on_resume_with_both_lists(class_run, photos):
    shutil.copytree(photos / "cat", photos / "dog")
    with pytest.raises(SystemExit, match=r"\(ant, bee, cat; now ant, bee, cat, dog\)"):
        finetune.main(replace(class_run, steps=3))
    shutil.rmtree(photos / "dog")
    rename_a_class(photos)
    with pytest.raises(SystemExit, match=r"\(ant, bee, cat; now aardvark, ant, bee\)"):
        finetune.main(replace(class_run, steps=3))
    (photos / "aardvark").rename(photos / "cat")
    finetune.main(replace(class_run, steps=3))


@pytest.mark.parametrize("change", [overwrite_in_place, exchange_two_folders])
def test_changed_images_are_reported_on_resume_and_refused_for_a_finished_run(
        class_run, photos, capsys, change):
    change(photos)
    with pytest.raises(SystemExit, match="started with other images than --data_dir="):
        finetune.main(class_run)
    finetune.main(replace(class_run, steps=3))
    assert "other images than --data_dir=" in capsys.readouterr().out
    finetune.main(replace(class_run, steps=3))                     # now trained on these


def test_a_run_resumes_only_with_its_own_vae(class_run, tiny_vae, tmp_path):
    shutil.copytree(tiny_vae, tmp_path / "vae")
    moved = replace(class_run, vae=str(tmp_path / "vae"), steps=3)
    finetune.main(moved)                                           # the same VAE elsewhere
    last = runs.latest_checkpoint(tmp_path / "vae")
    state = load_file(last / "model.safetensors")
    state["up.conv.bias"] += 1e-3
    config = runs.read_config(last)
    shutil.rmtree(last)
    runs.save_folder(last, {"model": state}, config)               # retrained to the same step
    with pytest.raises(SystemExit, match="started with other vae than --vae="):
        finetune.main(replace(moved, steps=4))
    shutil.rmtree(tmp_path / "vae")
    finetune.main(replace(moved, steps=4))                         # gone, but the run has a copy


def test_a_run_resumes_only_with_its_own_base(finetune_config, tiny_base, class_run, tmp_path):
    cfg = finetune_config(tmp_path / "wide", steps=1, save_every=1)
    finetune.main(cfg)
    with pytest.raises(SystemExit, match="started with other base than --base="):
        finetune.main(replace(cfg, steps=2, base=class_run.out))
    finetune.main(replace(cfg, steps=2, base="out/not-there"))     # it is in the checkpoint


def test_a_vae_resumes_only_with_its_own_lpips_weights(vae_config, tmp_path):
    metrics.import_torchvision()
    from torchvision.models import squeezenet1_1
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        torch.save(squeezenet1_1(weights=None).state_dict(), tmp_path / name / "net.pth")
    cfg = vae_config(tmp_path / "run", r=1, image_size=24, perceptual="squeeze", steps=1,
                     lpips_trunk=str(tmp_path / "mine" / "net.pth"))
    train_vae.main(cfg)
    (tmp_path / "mine").rename(tmp_path / "moved")
    train_vae.main(replace(cfg, steps=2, lpips_trunk=str(tmp_path / "moved" / "net.pth")))
    other = replace(cfg, steps=3, lpips_trunk=str(tmp_path / "other" / "net.pth"))
    with pytest.raises(SystemExit, match="started with other lpips than --lpips_trunk=.*net.pth has now"):
        train_vae.main(other)
    unused = replace(other, perceptual="none")
    assert identity.of_vae_parts(unused, SimpleNamespace(fingerprint=""))["lpips"] is None


def test_a_folder_named_base_is_not_taken_for_the_teacher(vae_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = vae_config("base", steps=1)
    train_vae.main(cfg)
    train_vae.main(replace(cfg, steps=2))                          # base/ has other weights now
    assert runs.step_of("base") == 2


def test_a_vae_resumes_only_with_the_statistics_of_its_base(golden, davae_config, tmp_path):
    """They are read once, at the start; a file that is added later would have no effect, without a word."""
    torch.save(golden("vavae_style")[0], tmp_path / "vavae.pt")
    base = str(tmp_path / "vavae.pt")
    cfg = davae_config(tmp_path / "run", base=base, D=8, image_size=32, perceptual="none", gan=0.0, steps=1)
    train_vae.main(cfg)
    torch.save({"mean": torch.zeros(8), "std": torch.full((8,), 2.0)}, tmp_path / "latents_stats.pt")
    for steps in (1, 2):                                           # finished, or to be resumed
        with pytest.raises(SystemExit, match="started with other statistics than --base=.*vavae.pt has now"):
            train_vae.main(replace(cfg, steps=steps))
    last = runs.latest_checkpoint(cfg.out)
    config = runs.read_config(last)
    del config["made_of"]["statistics"]                            # a run from before they were recorded
    runs.write_json(last / "config.json", config)
    (last / "SHA256SUMS").unlink()
    train_vae.main(replace(cfg, steps=2))


def test_a_run_resumes_wherever_it_was_moved_and_however_its_path_is_written(
        davae_config, same_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = davae_config("here", steps=1, image_size=16, gan=0.0)
    train_vae.main(cfg)
    shutil.copytree("here", "there")
    train_vae.main(replace(cfg, steps=2))
    train_vae.main(replace(cfg, steps=2, out="there/"))
    assert same_weights(replace(cfg, out="here"), replace(cfg, out="there"))
    train_vae.main(replace(cfg, steps=3, out=str(tmp_path / "there")))
    assert runs.step_of("there") == 3
    with pytest.raises(SystemExit, match="already at step 3, now steps=2"):
        train_vae.main(replace(cfg, steps=2, out="there"))


# ---------------------------------------------------------------- stages that already exist


def test_a_finished_stage_is_reused_only_if_the_preset_would_make_it(
        vae_config, davae_config, photos, tmp_path, monkeypatch):
    """A base VAE that a preset makes is refused if its images or settings differ, unless it is named."""
    monkeypatch.chdir(tmp_path)
    base = vae_config("out/base", steps=1)
    values = {name: getattr(base, name) for name in (
        "out", "D", "C", "widths", "blocks", "groups", "image_size", "images", "flip", "perceptual", "gan",
        "stats", "steps", "batch_size", "lr", "log_every", "save_every")}
    monkeypatch.setattr(train_vae.MAKER, "presets", {"tiny-base": values, "tiny": {"out": "out/v"}})

    cfg = davae_config("out/v", base="out/base", steps=1, image_size=16, gan=0.0)
    train_vae.main(cfg)                                            # makes the base first
    train_vae.main(replace(cfg, out="out/w", seed=1))              # and reuses it
    stamp = runs.latest_checkpoint("out/base").stat().st_mtime_ns

    other = replace(cfg, out="out/x", data_dir=str(photos))
    with pytest.raises(SystemExit, match="other images than .*; or give --base=out/base to use it as it is"):
        train_vae.main(other)
    other.given = {"base"}
    train_vae.main(other)
    monkeypatch.setitem(values, "lr", 0.5)
    with pytest.raises(SystemExit, match="lr=0.001, now lr=0.5 .* to resume; or give --base=out/base"):
        train_vae.main(replace(cfg, out="out/y"))
    assert runs.latest_checkpoint("out/base").stat().st_mtime_ns == stamp                  # untouched


def test_latents_are_not_made_with_an_unfinished_vae(davae_config, finetune_config, tmp_path):
    cfg = davae_config(tmp_path / "v", steps=2, save_every=1, image_size=16, gan=0.0)
    train_vae.main(cfg)
    shutil.rmtree(tmp_path / "v" / "step_000002")                  # as if killed before its last save
    with pytest.raises(SystemExit, match="statistics of its latents .* --steps=1"):
        finetune.main(finetune_config(tmp_path / "run", vae=cfg.out))
    train_vae.main(replace(cfg, steps=1))                          # as the message said
    vae = load_davae(cfg.out)
    assert vae.std.min() > 0 and not torch.equal(vae.std, torch.ones(12))


# ---------------------------------------------------------------- samples


def test_samples_of_a_retrained_model_are_not_mixed_with_earlier_ones(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("samples"))
    cfg = sample.Config(run=str(run), n=2, steps=1, classes=(1,), out=str(tmp_path / "images"), device="cpu")
    sample.main(cfg)
    shutil.copytree(run, tmp_path / "moved")
    sample.main(replace(cfg, run=str(tmp_path / "moved"), n=3))    # the same weights elsewhere

    for folder, name in ((runs.latest_checkpoint(run), "ema"), (run / "vae", "model")):
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        state = load_file(folder / f"{name}.safetensors")
        first = sorted(state)[0]
        state[first] = state[first] + 1
        runs.save_folder(folder, {name: state}, runs.read_config(folder))
        with pytest.raises(SystemExit, match="of an earlier state of the run"):
            sample.main(cfg)
        for file, content in before.items():
            (folder / file).write_bytes(content)
    sample.main(cfg)
