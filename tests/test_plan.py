"""support/plan.py: what a dry run says a run will cost, against independent counts."""
from dataclasses import replace

import pytest

import finetune
from dit import LightningDiTConfig, LightningDiT
from experiments import budget
from finetune import PRESETS, Config

# FLOPs of all images / (0.35 x 989 TFLOP/s) / 3600; SD3.5's blocks compute forward twice (checkpointing)
HOURS = {
    "imagenet512": "51.2 of an H100, 6.4 of eight",                # 89.6 M x 0.712 T
    "sd35m-1024": "8.9 of an H100, 1.1 of eight",                  # 1.28 M x (6.237 + 2.443) T
    "sd35m-2048": "32.4 of an H100, 4.0 of eight",                 # 0.96 M x (30.75 + 11.25) T
}


@pytest.mark.parametrize("preset, changes, forward, parameters", [
    ("imagenet512", {}, 237.4e9, 675_482_048),
    ("sd35m-1024", {}, 2.443e12, None),
    ("sd35m-2048", {}, 11.25e12, None),
    pytest.param("sd35m-2048", {"image_size": 4096}, 89.4e12, None, marks=pytest.mark.slow)])
def test_a_dry_run_counts_the_models_true_cost(preset, changes, forward, parameters, capsys):
    cfg = Config(**{"preset": preset, **PRESETS[preset]})
    numbers = finetune.main(replace(cfg, dry_run=True, **changes))
    assert numbers["forward"] == pytest.approx(forward, rel=0.005)
    if preset == "imagenet512":
        table_and_qk_norm = 256 * 1152 + 28 * 2 * 72               # included in the published count
        assert numbers["step"] == pytest.approx(712.0e9, rel=0.005)
        assert numbers["parameters"] + table_and_qk_norm == pytest.approx(parameters, abs=5000)
    else:                                                         # LoRA: no weight gradients of frozen layers
        assert 2 * forward < numbers["step"] < 3.2 * forward
    shown = capsys.readouterr().out
    assert f"{numbers['tokens']} for" in shown
    assert f"the original {4 * numbers['tokens']}" in shown
    assert f"--out={PRESETS[preset]['out']}" in shown
    assert "GiB of states" in shown
    assert "in the machine's memory for each GPU and, without --shard=True, then on it" in shown
    of_text = "2.61 MiB of encoded text a caption, 2.73 TB for a million\n"
    assert (of_text in shown) == preset.startswith("sd35m") and shown.count("encoded text") < 2
    if not changes:
        assert HOURS[preset] in shown
        job, = [job for job in budget.JOBS if job.preset == preset]
        assert (job.forward, job.step) == pytest.approx((forward, numbers["step"]), rel=0.001)
        assert (job.total, job.trained) == (numbers["parameters"], numbers["trained"])


@pytest.mark.parametrize("preset, tokens, sizes", [
    ("tiny", 16, dict(C=8, D=24, p=2, grid=4, E=192, depth=4, A=3)),
    ("photos", 64, dict(C=32, D=96, p=1, grid=8, E=256, depth=6, A=4))])
def test_a_dry_run_covers_the_models_a_preset_trains(preset, tokens, sizes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = LightningDiT(LightningDiTConfig(num_classes=10, **sizes))
    parameters = sum(p.numel() for p in model.parameters())
    cfg = Config(**{"preset": preset, **PRESETS[preset]})
    numbers = finetune.main(replace(cfg, dry_run=True))
    assert (numbers["tokens"], numbers["parameters"]) == (tokens, parameters)
    shown = capsys.readouterr().out
    assert f"--E={sizes['E']}\n" in shown and f"--depth={sizes['depth']}\n" in shown
    assert shown.index(f" out/{preset}-vae ") < shown.index(f" out/{preset}-base ") < shown.index("model ")


@pytest.mark.parametrize("changes,sentence", [
    (dict(image_size=22), "--image_size=22: wanted a multiple of 32"),
    (dict(image_size=96, p=2), "--image_size=96: wanted a multiple of 64"),
    (dict(lora=4), "--model=LightningDiT takes neither text nor adapters"),
])
def test_a_dry_run_refuses_impossible_settings(changes, sentence):
    values = dict(preset="tiny", D=32, dry_run=True, E=16, A=2, depth=1)
    with pytest.raises(SystemExit, match=sentence):
        finetune.main(finetune.Config(**{**values, **changes}))
