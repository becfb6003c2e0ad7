"""support/checks.py: settings that do not fit together are refused, and others are not."""
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

import evaluate
import finetune
import sample
import train_vae
from davae import AutoencoderKL, KLConfig, PlainVAE
from support import checks, config, runs, stages


def test_a_base_with_fewer_classes_than_the_images_is_refused(make_dit):
    cfg = SimpleNamespace(base="base", vae="vae", text="", lora=0, image_size=16, data_dir="photos")
    vae = SimpleNamespace(C=4, f=4)
    for classes in (1, 5):
        checks.check_base(cfg, vae, make_dit(), classes)
    with pytest.raises(SystemExit, match="base: has 5 classes; photos has 6"):
        checks.check_base(cfg, vae, make_dit(), 6)


@pytest.mark.parametrize("changes, refused", [
    (dict(lora=4), "--lora=4 is for a pretrained model, and there is none: give --base=, or --lora=0"),
    (dict(zero_init=False), "--zero_init=False is for .* or --zero_init=True"), (dict(), ""),
    (dict(base="b", lora=4), ""), (dict(base="b", zero_init=False), ""),
    (dict(shard=True), "--shard=True splits the model over several processes: start it with torchrun")])
def test_flags_that_would_do_nothing_are_refused(changes, refused, tmp_path):
    cfg = finetune.Config(vae="vae", out=str(tmp_path), **changes)
    if not refused:
        return checks.before_finetuning(cfg, world=1)
    with pytest.raises(SystemExit, match=refused):
        checks.before_finetuning(cfg, world=1)
    if not cfg.shard:                                              # a run of before there was this check
        runs.save_folder(tmp_path / "step_000001", {}, {"config": {}})
        checks.before_finetuning(cfg, world=1)


def test_an_empty_vae_is_named_before_anything_is_loaded():
    cfg = config.cli(finetune.Config, finetune.PRESETS, ["tiny", "--vae="])
    with pytest.raises(SystemExit, match="--vae= is empty: wanted a run of train_vae.py, or the weights of"):
        checks.before_finetuning(cfg, world=1)


def test_sizes_on_the_command_line_are_for_a_model_from_scratch():
    def check(*flags):
        checks.before_finetuning(config.cli(finetune.Config, finetune.PRESETS, ["tiny", *flags]), world=1)

    check()                                                        # the preset's own are no flags
    check("--base=", "--E=64", "--model=USiT")
    with pytest.raises(SystemExit, match="--E=64 is for a model from scratch, and out/tiny-base is"):
        check("--E=64")
    with pytest.raises(SystemExit, match="--model=USiT is for .* leave out --model, or give --base="):
        check("--model=USiT")


@pytest.mark.parametrize("flags, refused", [
    ("tiny --keep_mean=shown", "--keep_mean=shown changes nothing without --keep_levels=: leave out --kee"),
    ("tiny-base --N=100", "--N=100 changes nothing without --D="), ("tiny --t5_tokens=77", "--t5_tokens=77"),
    ("tiny-base --zero_init=False", "--zero_init"), ("tiny --base= --base_weights=ema", "--base_weights=ema"),
    ("tiny --keep_mean=shown --keep_levels=0,24", ""), ("tiny --N=100 --zero_init=False", ""),
    ("tiny-base --N=10000 --keep_mean=all", ""), ("photos-dcae15 --keep_mean=shown", "")])
def test_flags_of_fine_tuning_that_others_leave_without_effect_are_refused(flags, refused, tmp_path):
    cfg = config.cli(finetune.Config, finetune.PRESETS, [*flags.split(), f"--out={tmp_path}"])
    if not refused:
        return checks.before_finetuning(cfg, world=1)
    with pytest.raises(SystemExit, match=refused):
        checks.before_finetuning(cfg, world=1)
    runs.save_folder(tmp_path / "step_000001", {}, {"config": {}})             # a run from before this check
    checks.before_finetuning(cfg, world=1)


@pytest.mark.parametrize("grid, sentence", [
    ({"grid": 4}, "takes 4x4 tokens of 2x2 latent pixels; with a-vae give --image_size=64"),
    ({}, "takes whole tokens of 2x2 latent pixels; with a-vae give --image_size=64")])
def test_an_image_size_that_makes_no_whole_tokens_is_refused(monkeypatch, grid, sentence):
    monkeypatch.setattr(checks, "check_text", lambda *args: None)
    cfg = SimpleNamespace(base="a-base", vae="a-vae", text="captions", image_size=72)
    base = SimpleNamespace(cfg=SimpleNamespace(C=4, D=0, p=2, **grid))
    with pytest.raises(SystemExit, match=f"--image_size=72: a-base {sentence}"):
        checks.check_base(cfg, SimpleNamespace(C=4, f=8), base, 0)


def test_a_setting_that_the_model_from_scratch_lacks_is_refused_not_ignored():
    cfg = config.cli(finetune.Config, finetune.PRESETS, ["tiny-base", "--model=USiT", "--qk_norm=True"])
    with pytest.raises(SystemExit, match="--qk_norm=True: USiT has no such setting; leave it out"):
        finetune.new_dit(cfg, 8, 8, 10)


def test_va_vae_without_its_statistics_is_refused_but_no_other_base():
    sizes = KLConfig(C=32, widths=(4,) * 5, blocks=1, attn=(4,), quant=True, groups=4)

    def check(mean=0.0, D=96, **changes):
        vae = PlainVAE(AutoencoderKL(replace(sizes, **changes)))
        vae.base.mean.fill_(mean)
        checks.check_base_vae(train_vae.Config(base="vavae.pt", D=D), vae)

    with pytest.raises(SystemExit, match="vavae.pt: has no latents_stats.pt next to it"):
        check()
    check(mean=0.1)
    check(D=0)                                                     # which measures its own
    check(C=16)
    check(quant=False)


def test_a_davae_without_a_base_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                    # what an empty name used to read
    cfg = train_vae.Config(D=12, out="run", base="", image_size=64)
    with pytest.raises(SystemExit, match="--base= is empty, and --D=12 adds details to a base VAE: give one"):
        train_vae.main(cfg)
    assert not (tmp_path / "run").exists()
    checks.before_loading(replace(cfg, D=0))
    checks.before_loading(replace(cfg, base="taef2"))
    runs.save_folder(tmp_path / "run/step_000001", {}, {"config": {}})         # a run that has its own copy
    checks.before_loading(cfg)


@pytest.mark.parametrize("flags, refused", [
    ("--detail_dropout=0.5", "--detail_dropout=0.5 changes nothing in a base VAE, .* or give --D=$"),
    ("--train=decoder", "--train=decoder changes"), ("--fit_align=0", "--fit_align=0.0 changes"),
    ("--project=conv", "--project=conv changes nothing .* or give --D= or --teacher=$"),
    ("--align=0.1 --teacher=dino", ""),                            # VA-VAE's loss
    ("--detail_dropout=0.1 --fit=closed", ""),                     # as they are in the preset
    ("--keep_levels=0,4,8 --r=4", ""),                             # a base VAE has both
    ("--detail_dropout=0.5 --D=24 --base=b", "")])
def test_flags_without_effect_on_a_base_vae_are_refused(tmp_path, flags, refused):
    argv = ["tiny-base", f"--out={tmp_path}", *flags.split()]
    cfg = config.cli(train_vae.Config, train_vae.PRESETS, argv)
    if not refused:
        return checks.before_loading(cfg)
    with pytest.raises(SystemExit, match=refused):
        checks.before_loading(cfg)


@pytest.mark.parametrize("flags, refused", [
    ("tiny --C=4", "--C=4 is for a base VAE from initial weights, and out/tiny-base-vae is used as it is: "),
    ("tiny-base --base=taef2 --widths=8,16", "--widths=8,16 is for a base VAE from initial weights, and t"),
    ("photos --quant=True", "--quant=True is for"), ("tiny-base --C=4 --widths=8,16", ""),
    ("tiny --m1=0.1", "--m1=0.1 is a margin of VA-VAE's distance, .* is mse: leave out --m1, or give --dist"),
    ("tiny --m2=0.1 --distance=vf", "")])
def test_flags_that_a_base_or_another_distance_leaves_without_effect_are_refused(flags, refused, tmp_path):
    cfg = config.cli(train_vae.Config, train_vae.PRESETS, [*flags.split(), f"--out={tmp_path}"])
    if not refused:
        return checks.before_loading(cfg)
    with pytest.raises(SystemExit, match=refused):
        checks.before_loading(cfg)


def test_no_presets_own_values_are_refused_nor_is_a_run_that_resumes(tmp_path):
    for preset in train_vae.PRESETS:
        checks.before_loading(config.cli(train_vae.Config, train_vae.PRESETS, [preset, "--D=0"]))
        checks.before_loading(config.cli(train_vae.Config, train_vae.PRESETS, [preset]))
    argv = ["tiny-base", f"--out={tmp_path}", "--detail_dropout=0.5"]
    runs.save_folder(tmp_path / "step_000001", {}, {"config": {}})             # from before this check
    checks.before_loading(config.cli(train_vae.Config, train_vae.PRESETS, argv))


@pytest.mark.parametrize("script", [train_vae, finetune])
def test_a_number_of_built_in_images_is_refused_for_a_folder_unless_a_preset_gives_it(
        script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()

    def cfg(*flags):
        return config.cli(script.Config, script.PRESETS, ["tiny", "--out=run", *flags])

    with pytest.raises(SystemExit, match="--images=9 is a number of built-in images, and all .* of photos"):
        script.main(cfg("--images=9", "--data_dir=photos"))
    allowed = [cfg("--data_dir=photos"), cfg("--images=9"), cfg("--images=9", "--data_dir=your_own.npz")]
    for _, maker, stage in stages.stages_of(cfg("--data_dir=photos"), script.makers()):
        allowed.append(stage)
        assert "--images" not in config.command(maker.script, stage, maker.presets)
    assert len(allowed) > 3
    for job in allowed:
        checks.check_images(job)
    runs.save_folder("run/step_000001", {}, {"config": {}})        # a run from before this check resumes
    checks.check_images(cfg("--images=9", "--data_dir=photos"))


@pytest.mark.parametrize("gan, start, judged", [(0.0, 0, False), (0.1, 9, False), (0.1, 8, True)])
def test_the_discriminator_counts_only_if_it_starts_before_the_end(gan, start, judged):
    assert checks.is_judged(SimpleNamespace(gan=gan, disc_start=start, steps=9)) == judged


def test_a_run_too_short_for_its_discriminator_or_its_details_says_so_in_one_line(
        davae_config, finetune_config, tmp_path, capsys):
    train_vae.main(davae_config(tmp_path / "vae", steps=1, disc_start=3))
    sentence = "vae: the discriminator starts at step 3, after this run's 1 steps: give --disc_start"
    assert capsys.readouterr().out.count(sentence) == 1
    finetune.main(finetune_config(tmp_path / "dit", steps=1, N=9))
    sentence = "dit: the details' weight w(n) rises only to 0.000 in this run's 1 steps, and to 1 at step 9"
    assert capsys.readouterr().out.count(sentence) == 1

    checks.say_if_never_judged(SimpleNamespace(gan=0.1, disc_start=8, steps=9), 0)
    checks.say_if_never_judged(SimpleNamespace(gan=0.0, disc_start=9, steps=9), 0)
    checks.say_if_never_judged(SimpleNamespace(gan=0.1, disc_start=9, steps=9), 1)         # another rank
    for D, w, rank in ((12, 0.1, 0), (0, 0.0, 0), (12, 0.0, 1)):
        checks.say_if_details_hardly_count(SimpleNamespace(D=D), w, rank)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("changes, refused", [
    (dict(image_size=12, perceptual="vgg"), "images of 12 pixels; wanted 16"),
    (dict(image_size=16, perceptual="vgg"), ""),
    (dict(image_size=20, perceptual="squeeze"), ""),
    (dict(image_size=20, gan=0.1), "images of 20 pixels; wanted 24"),
    (dict(image_size=20, gan=0.1, disc_start=9, steps=9), ""),
    (dict(image_size=24, gan=0.1), ""),
    (dict(train="up", adaptive_align=True), "--train=up freezes the layer"),
    (dict(train="up", adaptive_align=False), ""),
    (dict(train="blocks"), ""),
    (dict(detail_dropout=1.0, rescale=True), "--rescale=True divides by"),
    (dict(detail_dropout=1.0, rescale=False), ""),
])
def test_only_settings_that_do_not_fit_are_refused(make_davae, changes, refused):
    cfg = train_vae.Config(D=12, image_size=64, perceptual="none", gan=0.0, disc_start=3, steps=9, crop=())
    if not refused:
        return checks.before_training(replace(cfg, **changes), make_davae())
    with pytest.raises(SystemExit, match=refused):
        checks.before_training(replace(cfg, **changes), make_davae())


@pytest.mark.parametrize("flags, features, lpips, refused", [
    (dict(whole=True, features="squeeze"), "", None, "--features=squeeze: --whole=True computes no dista"),
    (dict(whole=True, lpips_trunk="w"), "", None, "--lpips_trunk=w: .*; leave it out, or give --perceptual="),
    (dict(whole=True, lpips_trunk="w"), "", "LPIPS", ""),
    (dict(whole=True, features="none"), "", None, ""),
    (dict(inception_weights="w", features="probe"), "Probe", None,
     "--inception_weights=w: the distances here are of Probe; leave it out"),
    (dict(inception_weights="w", lpips_trunk="v"), "Inception", None, "--lpips_trunk=v: .* of Inception"),
    (dict(inception_weights="w", lpips_trunk="v"), "Inception", "LPIPS", ""),
    (dict(features="none", lpips_trunk="w"), "", None, "--lpips_trunk=w: no distances are computed here"),
    (dict(lpips_trunk="w"), "SqueezeNet", None, ""),
])
def test_files_of_networks_that_measure_nothing_are_refused_not_ignored(flags, features, lpips, refused):
    rulers = SimpleNamespace(features=SimpleNamespace(name=features), lpips=lpips)
    if not refused:
        return checks.refuse_unused_networks(evaluate.Config(**flags), rulers)
    with pytest.raises(SystemExit, match=refused):
        checks.refuse_unused_networks(evaluate.Config(**flags), rulers)


def test_every_flag_of_sampling_but_four_is_refused_by_evaluate_where_nothing_is_drawn():
    of_sampling = {f.name for f in fields(sample.Config)} - {"run", "out", "device", "dtype"}
    assert set(checks.OF_SAMPLES) == of_sampling | {"reference", "clip"}
    for name in (*checks.OF_SAMPLES, "images", "data_dir"):
        cfg = evaluate.Config()
        cfg.given = {name}
        if name not in checks.OF_SAMPLES:
            checks.refuse_flags_of_samples(cfg, "no reason")
            continue
        with pytest.raises(SystemExit, match=f"^leave out --{name}: no samples are drawn, because so$"):
            checks.refuse_flags_of_samples(cfg, "so")
