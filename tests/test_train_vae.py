"""train_vae.py: the losses against closed forms and by hand, the discriminator, exact resume."""
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train_vae
from davae import DAVAE, AutoencoderKL
from support import metrics, runs
from support.metrics import psnr
from support.weights import load_davae
from train_vae import PRESETS, Config, PatchGAN, adaptive_weight, hinge_loss, learning_rate, vae_loss


# ---------------------------------------------------------------- losses


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake).item() == 0.5 * ((0 + 1) / 2 + (0 + 2) / 2)


def test_adaptive_weight_is_the_ratio_of_gradient_norms_and_is_clamped():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    a, b = (3 * w).sum(), (w * torch.tensor([0.0, 4.0])).sum()
    assert math.isclose(adaptive_weight(a, b, w, 1e4).item(), 3 * math.sqrt(2) / (4 + 1e-4), rel_tol=1e-6)
    assert adaptive_weight(a, b, w, 0.5).item() == 0.5
    assert not adaptive_weight(a, b, w, 1e4).requires_grad


def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update_and_is_named():
    model, one, inf = torch.nn.Linear(2, 2), torch.tensor(1.0), torch.tensor(float("inf"))
    model.weight.grad, model.bias.grad = torch.zeros(2, 2), torch.tensor([0.0, float("inf")])
    with pytest.raises(SystemExit, match="step 7: loss 1.0, gradient norm inf, first bad parameter bias"):
        train_vae.stop_if_not_finite(inf, one, model, 7)
    with pytest.raises(SystemExit, match="loss inf, gradient norm 1.0"):
        train_vae.stop_if_not_finite(one, inf, torch.nn.Linear(2, 2), 7)
    train_vae.stop_if_not_finite(one, one, model, 7)


def test_patch_discriminator_has_the_published_layers():
    disc = PatchGAN(64)
    convs = [m for m in disc if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convs] == [
        (3, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 1), (512, 1, 1)]
    by_hand = (48 * 64 + 64) + 16 * (64 * 128 + 128 * 256 + 256 * 512) + 2 * (128 + 256 + 512) + (16 * 512 + 1)
    assert sum(p.numel() for p in disc.parameters()) == by_hand == 2_765_633


def test_psnr_by_hand_and_clamped():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 1.0)])
    assert torch.allclose(psnr(x, y), torch.tensor([20.0, 10 * math.log10(4)]), atol=1e-4)
    assert torch.equal(psnr(x + 1, x + 5), psnr(x + 1, x + 1))


def test_vae_loss_is_the_sum_of_its_terms_with_adaptive_weights(kl_config):
    torch.manual_seed(0)
    vae = DAVAE(AutoencoderKL(kl_config), 12).train()
    cfg, x = Config(D=12, gan=0.1, align=0.5, kl=1e-6), torch.rand(2, 3, 32, 32) * 2 - 1
    disc, rec = PatchGAN(4).eval(), vae(x)
    loss, parts = vae_loss(vae, rec, x, cfg, None, disc)
    assert torch.allclose(parts["l1"], (rec.x_hat - x).abs().mean())
    grad = {k: torch.autograd.grad(v, w, retain_graph=True)[0].norm() for k, v, w in (
        ("l1 at down", (rec.x_hat - x).abs().mean(), vae.down.conv.weight), ("l1 at last", (rec.x_hat - x).abs().mean(), vae.last_conv.weight),
        ("align", train_vae.align_loss(rec.z, rec.z_d), vae.down.conv.weight), ("g", -disc(rec.x_hat).mean(), vae.last_conv.weight))}
    a_w, d_w = grad["l1 at down"] / (grad["align"] + 1e-4), grad["l1 at last"] / (grad["g"] + 1e-4)
    expected = parts["l1"] + 1e-6 * parts["kl"] + 0.5 * a_w * parts["align"] + 0.1 * d_w * parts["g"]
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_learning_rate_is_constant_then_falls_to_zero():
    cfg = Config(lr=2.0, steps=100, cooldown=0.2)
    assert [learning_rate(n, cfg) for n in (0, 80, 90, 100)] == [2.0, 2.0, 1.0, 0.0]
    assert learning_rate(99, replace(cfg, cooldown=0.0)) == 2.0


def test_lpips_squeeze_gives_its_published_value(shared):
    lpips = metrics.make_lpips("squeeze", shared("weights/lpips/squeezenet1_1_features.pth"))
    torch.manual_seed(123)
    a, b = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
    assert abs(lpips(a, b).mean().item() - 0.1008) < 1e-4
    assert lpips(a, a).abs().max() == 0 and not any(p.requires_grad for p in lpips.parameters())


# ---------------------------------------------------------------- the script


def test_training_writes_log_pictures_statistics_and_a_whole_checkpoint(davae_config, base_run, tmp_path):
    summary = train_vae.main(davae_config(tmp_path / "run"))
    rows = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert "d" not in rows[2] and {"l1", "kl", "align", "a_w", "g", "d_w", "d", "gnorm"} <= set(rows[3])   # GAN from step 3
    assert all((tmp_path / "run" / f).stat().st_size > 1000 for f in ("recon.png", "loss.png"))
    vae = load_davae(tmp_path / "run")
    assert vae.std.min() > 0 and (vae.std != 1).all() and summary["psnr"] > 0
    base = load_davae(base_run).base
    assert all(torch.equal(a, b) for a, b in zip(vae.base.state_dict().values(), base.state_dict().values()))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, here g++")
def test_compiled_levels_give_the_same_losses_and_the_same_names(davae_config, tmp_path):
    rows, names = [], []
    for compile in (False, True):
        cfg = davae_config(tmp_path / str(compile), steps=3, disc_start=2, image_size=32, compile=compile)
        train_vae.main(cfg)
        rows.append([json.loads(line) for line in open(f"{cfg.out}/log.jsonl")])
        names.append(sorted(load_file(runs.latest_checkpoint(cfg.out) / "model.safetensors")))
    assert "d_w" in rows[1][2] and names[0] == names[1]
    for key in ("l1", "kl", "align"):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[0]], rel=1e-4)


def test_the_discriminator_is_untouched_before_its_start_and_trained_after(davae_config, tmp_path):
    cfg = davae_config(tmp_path / "run", steps=3)
    torch.manual_seed(cfg.seed)
    start = PatchGAN(4).state_dict()

    def saved():
        return torch.load(runs.latest_checkpoint(cfg.out) / "train_state.pt", weights_only=True)["disc"]

    train_vae.main(cfg)
    assert all(torch.equal(v, start[k]) for k, v in saved().items())
    train_vae.main(replace(cfg, steps=5))
    assert not torch.equal(saved()["0.weight"], start["0.weight"])


def test_twenty_steps_equal_ten_and_resumed_ten_bit_for_bit(davae_config, tmp_path):
    straight, halves = (davae_config(tmp_path / name, disc_start=6, steps=20, crop=32) for name in ("straight", "halves"))
    train_vae.main(straight)
    train_vae.main(replace(halves, steps=10))
    train_vae.main(halves)
    a, b = (runs.latest_checkpoint(cfg.out) for cfg in (straight, halves))
    weights = [load_file(p / "model.safetensors") for p in (a, b)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    states = [torch.load(p / "train_state.pt", weights_only=True) for p in (a, b)]
    assert all(torch.equal(states[0]["disc"][k], states[1]["disc"][k]) for k in states[0]["disc"])


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_still_gets_one(davae_config, tmp_path):
    cfg = davae_config(tmp_path / "a", steps=1, image_size=16, gan=0.0)
    first = train_vae.main(cfg)
    (tmp_path / "a" / "summary.json").unlink()
    again = train_vae.main(cfg)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def test_the_same_command_again_says_that_it_is_finished(vae_config, base_run, capsys):
    before = runs.latest_checkpoint(base_run).stat().st_mtime
    train_vae.main(vae_config(base_run))
    assert "finished at step 4" in capsys.readouterr().out and runs.latest_checkpoint(base_run).stat().st_mtime == before


def test_resuming_with_another_model_is_refused(vae_config, base_run):
    with pytest.raises(SystemExit, match="started with C=4, now C=8"):
        train_vae.main(vae_config(base_run, C=8, steps=9))


def test_presets_name_fields_and_their_own_folders():
    for name, values in PRESETS.items():
        assert Config(**{"preset": name, **values}).out == values["out"]
    assert len({v["out"] for v in PRESETS.values()}) == len(PRESETS)
