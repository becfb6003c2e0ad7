"""train_vae.py: the losses against formulas and hand counts, the discriminator, exact resume."""
import contextlib
import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import evaluate
import finetune
import sample
import train_vae
from davae import DAVAE, AutoencoderKL, DAVAEConfig, Posterior, align_loss
from support import config, data, figures, held_out, metrics, ranks, runs
from support.dcae import Head
from support.metrics import psnr
from support.weights import load_davae
from train_vae import PRESETS, Config, PatchGAN, adaptive_weight, hinge_loss, learning_rate, vae_loss


# ---------------------------------------------------------------- losses


def test_hinge_loss_equals_its_formula():
    real = torch.tensor([2.0, 0.0])
    fake = torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, fake).item() == 0.5 * ((0 + 1) / 2 + (0 + 2) / 2)


def test_adaptive_weight_is_the_clamped_ratio_of_gradient_norms():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    a = (3 * w).sum()                                               # gradient (3, 3)
    b = (w * torch.tensor([0.0, 4.0])).sum()                        # gradient (0, 4)
    ratio = 3 * math.sqrt(2) / (4 + 1e-4)
    assert math.isclose(adaptive_weight(a, b, w, 1e4).item(), ratio, rel_tol=1e-6)
    assert adaptive_weight(a, b, w, 0.5).item() == 0.5
    assert not adaptive_weight(a, b, w, 1e4).requires_grad


def test_adaptive_weights_are_limited_as_published(kl_config, monkeypatch):
    """The alignment's by 1e8, as in VA-VAE's code; the GAN's by 1e4, as in taming-transformers."""
    found = []

    def weight(nll, loss, layer, limit):
        found.append((layer, limit))
        return torch.tensor(1.0)

    monkeypatch.setattr(train_vae, "adaptive_weight", weight)
    vae = DAVAE(AutoencoderKL(kl_config), DAVAEConfig(D=12)).train()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    nets = SimpleNamespace(lpips=None, teacher=None, disc=torch.nn.Conv2d(3, 1, 4))
    vae_loss(vae, vae(x), x, Config(D=12), nets, gan_on=True)
    (first, of_alignment), (last, of_gan) = found
    assert first is vae.down.conv.weight and last is vae.decoder.conv_out.weight
    assert (of_alignment, of_gan) == (1e8, 1e4)


def test_a_teacher_sees_the_image_and_not_its_reconstruction():
    x = torch.randn(2, 3, 12, 12)
    rec = SimpleNamespace(x_hat=-x, z=torch.zeros(2, 4, 3, 3), z_d=torch.randn(2, 4, 3, 3))
    seen = []
    nets = SimpleNamespace(own={"project": torch.nn.Identity()},
                           teacher=lambda *args: seen.append(args) or rec.z_d + 1)
    assert train_vae.alignment(rec, x, Config(project="conv"), nets)["align"].item() == pytest.approx(1)
    (image, side), = seen
    assert image is x and side == 3


def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_is_named():
    one = torch.tensor(1.0)
    inf = torch.tensor(float("inf"))
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.zeros(2, 2)
    model.bias.grad = torch.tensor([0.0, float("inf")])
    with pytest.raises(SystemExit, match="step 7: loss 1.0, gradient norm inf, first bad parameter bias"):
        ranks.stop_if_not_finite(inf, one, model, 7)
    with pytest.raises(SystemExit, match="the model was not updated. .* to go on from the last checkpoint$"):
        ranks.stop_if_not_finite(inf, one, model, 7)
    with pytest.raises(SystemExit, match="loss inf, gradient norm 1.0"):
        ranks.stop_if_not_finite(one, inf, torch.nn.Linear(2, 2), 7)
    ranks.stop_if_not_finite(one, one, model, 7)


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_gradients_are_clipped_bit_for_bit_as_by_torch(limit):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model[1].requires_grad_(False)
    theirs = copy.deepcopy(model)
    for one in (model, theirs):
        one(torch.tensor([[1.0, 2.0, 3.0]])).square().sum().backward()
    norm = ranks.clip_gradients(model, limit, torch.tensor(1.0), 7)
    assert norm > 0.5
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf))
    for p, q in zip(model[0].parameters(), theirs[0].parameters()):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("bad", ["vae.down.conv.weight", "own.project.weight"])
def test_a_run_names_the_parameter_whose_gradient_is_not_finite(davae_config, tmp_path, monkeypatch, bad):
    cfg = davae_config(tmp_path / "a", steps=1, image_size=16, gan=0.0, project="conv",
                       adaptive_align=False)
    make = train_vae.LossNetworks.__init__

    def with_a_bad_gradient(nets, cfg, vae, device):
        make(nets, cfg, vae, device)
        named = dict(torch.nn.ModuleDict({"vae": vae, "own": nets.own}).named_parameters())
        named[bad].register_hook(lambda gradient: gradient * math.inf)

    monkeypatch.setattr(train_vae.LossNetworks, "__init__", with_a_bad_gradient)
    with pytest.raises(SystemExit, match=f"step 0: .* first bad parameter {bad};"):
        train_vae.main(cfg)


def test_the_layer_that_makes_the_latent_is_the_first_convolution_of_any_head():
    conv = torch.nn.Conv2d(8, 4, 3)
    for head in (conv, torch.nn.Sequential(conv, torch.nn.Conv2d(4, 4, 1)), Head(8, 4, True)):
        vae = SimpleNamespace(D=0, base=SimpleNamespace(to_moments=head))
        assert train_vae.first_conv(vae) is getattr(head, "conv", conv)


def test_a_discriminator_loss_that_is_not_finite_stops_before_the_update():
    torch.manual_seed(0)
    judge = PatchGAN(4)
    before = {name: p.clone() for name, p in judge.named_parameters()}
    opt = torch.optim.AdamW(judge.parameters(), lr=1.0)
    x = torch.rand(2, 3, 32, 32)
    log = SimpleNamespace(add=lambda numbers: None)
    with pytest.raises(SystemExit, match="step 9: loss nan, .* first bad parameter discriminator.0.weight; "
                                         "the discriminator was not updated, but the VAE was") as stop:
        train_vae.train_discriminator(judge, opt, [(x, x * math.nan)], contextlib.nullcontext(), log, 9)
    assert "the model was not updated" not in str(stop.value)
    assert all(torch.equal(p, before[name]) for name, p in judge.named_parameters())


def test_discriminator_gradients_are_averaged_over_ranks_only_in_the_last_pass(monkeypatch):
    asked = []
    monkeypatch.setattr(ranks, "synchronise", lambda model, on: asked.append(on))
    judge = PatchGAN(4)
    opt = torch.optim.AdamW(judge.parameters())
    x = torch.rand(1, 3, 32, 32)
    log = SimpleNamespace(add=lambda numbers: None)
    train_vae.train_discriminator(judge, opt, [(x, -x)] * 3, contextlib.nullcontext(), log, 0)
    assert asked == [False, False, True]


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(
        davae_config, tmp_path, monkeypatch, read_log):
    monkeypatch.setattr(Posterior, "sample", lambda self: self.mean)          # so nothing is random any more
    norms = []
    for micro_batch in (4, 1):
        cfg = davae_config(tmp_path / f"{micro_batch}", steps=1, gan=0.0, detail_dropout=0.0, align=0.0,
                           adaptive_align=False, micro_batch=micro_batch)
        train_vae.main(cfg)
        norms.append(read_log(cfg.out)[0]["gnorm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_pairs_of_all_micro_batches_weigh_one_step_of_the_discriminator():
    x = torch.rand(2, 3, 32, 32)
    log = SimpleNamespace(add=lambda numbers: None)
    norms = []

    def before_update(opt, *args):
        group, = opt.param_groups
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in group["params"]]).item())

    for pairs in (1, 3):
        torch.manual_seed(0)
        judge = PatchGAN(4)
        opt = torch.optim.AdamW(judge.parameters())
        with register_optimizer_step_pre_hook(before_update):
            train_vae.train_discriminator(judge, opt, [(x, -x)] * pairs, contextlib.nullcontext(), log, 0)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_discriminator_learns_to_rate_images_above_their_reconstructions():
    torch.manual_seed(0)
    judge = PatchGAN(4)
    opt = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    x = torch.rand(4, 3, 32, 32)
    pairs = [(x, F.avg_pool2d(x, 3, 1, 1))]                        # a blurred copy
    log = SimpleNamespace(add=lambda numbers: None)
    for step in range(10):
        train_vae.train_discriminator(judge, opt, pairs, contextlib.nullcontext(), log, step)
    with torch.no_grad():
        real, fake = (judge(images).mean() for images in pairs[0])
    assert real > fake + 0.5


def test_losses_are_float32_under_bfloat16_autocast(kl_config):
    vae = DAVAE(AutoencoderKL(kl_config), DAVAEConfig(D=12)).train()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    lpips = torch.nn.Conv2d(3, 1, 1)
    nets = SimpleNamespace(lpips=lambda a, b: lpips(a - b), teacher=None, disc=PatchGAN(4))
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = vae_loss(vae, vae(x), x, Config(D=12), nets, gan_on=True)
    assert {value.dtype for value in [loss, *parts.values()]} == {torch.float32}
    assert set(parts) == {"l1", "lpips", "kl", "align", "a_w", "g", "d_w"}


def test_patch_discriminator_has_the_published_layers():
    disc = PatchGAN(64)
    convs = [m for m in disc if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convs] == [
        (3, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 1), (512, 1, 1)]
    first = 48 * 64 + 64
    middle = 16 * (64 * 128 + 128 * 256 + 256 * 512)
    norms = 2 * (128 + 256 + 512)
    last = 16 * 512 + 1
    by_hand = first + middle + norms + last
    assert sum(p.numel() for p in disc.parameters()) == by_hand == 2_765_633


def test_psnr_equals_its_formula_on_clamped_images():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 1.0)])
    assert torch.allclose(psnr(x, y), torch.tensor([20.0, 10 * math.log10(4)]), atol=1e-4)
    assert torch.equal(psnr(x + 1, x + 5), psnr(x + 1, x + 1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_vae_loss_and_its_gradients_are_the_adaptively_weighted_sum_of_terms(kl_config, reduction):
    torch.manual_seed(0)
    vae = DAVAE(AutoencoderKL(kl_config), DAVAEConfig(D=12)).train()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    cfg = Config(D=12, gan=0.1, align=0.5, kl=0.01, reduction=reduction)
    disc = torch.nn.Conv2d(3, 1, 4)
    rec = vae(x)

    def lpips(a, b):
        return (a - b).square().mean((1, 2, 3), keepdim=True)

    nets = SimpleNamespace(lpips=lpips, teacher=None, disc=disc)
    loss, parts = vae_loss(vae, rec, x, cfg, nets, gan_on=True)
    terms = {
        "l1": (rec.x_hat - x).abs().mean(),
        "lpips": lpips(rec.x_hat, x).mean(),
        "kl": rec.posterior.kl(),
        "align": align_loss(rec.z, rec.z_d),
        "g": -disc(rec.x_hat).mean(),
    }
    assert all(torch.allclose(parts[name], term) for name, term in terms.items())

    def gradient(term, layer):
        return torch.autograd.grad(term, layer.weight, retain_graph=True)[0]

    nll = terms["l1"] + terms["lpips"]
    kl = terms["kl"]
    if reduction == "sum":                                          # over an image; VA-VAE halves the KL
        nll = nll * 3 * 32 * 32
        kl = kl * 12 * 8 * 8 / 2
    down, last = vae.down.conv, train_vae.last_conv(vae)
    a_w = gradient(nll, down).norm() / (gradient(terms["align"], down).norm() + 1e-4)
    d_w = gradient(nll, last).norm() / (gradient(terms["g"], last).norm() + 1e-4)
    expected = nll + 0.01 * kl + 0.5 * a_w * terms["align"] + 0.1 * d_w * terms["g"]
    assert torch.allclose(loss, expected, rtol=1e-5)
    for layer in (down, last):
        wanted = gradient(expected, layer)
        assert (gradient(loss, layer) - wanted).norm() < 1e-4 * wanted.norm()


def test_learning_rate_rises_stays_and_falls_to_zero():
    cfg = Config(lr=2.0, steps=100, cooldown=0.2)
    assert [learning_rate(n, cfg) for n in (0, 80, 90, 100)] == [2.0, 2.0, 1.0, 0.0]
    assert learning_rate(99, replace(cfg, cooldown=0.0)) == 2.0
    rising = replace(cfg, warmup=4)
    assert [learning_rate(n, rising) for n in (0, 1, 3, 4, 80, 90)] == [0.5, 1.0, 2.0, 2.0, 2.0, 1.0]


def test_adamw_has_the_betas_asked_for_and_no_weight_decay():
    opt = train_vae.adamw([torch.nn.Parameter(torch.ones(1))], Config(lr=0.1, beta1=0.8, beta2=0.7))
    group, = opt.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.8, 0.7), 0.0)


@pytest.mark.parametrize("fit, options", [("closed", (0.7, False)), ("pixels", (0.0, True))])
def test_details_that_start_as_pixels_are_not_aligned(make_davae, monkeypatch, fit, options):
    given = []

    def fit_new_blocks(vae, images, *options):
        given.append(options)
        return {"kept": 0.0, "told": 0.0}

    monkeypatch.setattr(train_vae, "fit_new_blocks", fit_new_blocks)
    monkeypatch.setattr(held_out, "fitting_images", lambda *args: None)
    cfg = Config(fit=fit, fit_align=0.7, dtype="float32")
    train_vae.start_in_closed_form(cfg, make_davae(), None, torch.device("cpu"), 0)
    assert given == [options]


def test_reconstructions_are_in_range_and_made_in_eval_mode_between_steps(make_davae, monkeypatch):
    vae = make_davae().train()
    for decoder in (vae.decoder, vae.base.decoder):
        torch.nn.init.constant_(decoder.conv_out.bias, 5.0)
    assert all((x == 1).all() for x in train_vae.reconstruct(vae, torch.rand(1, 3, 16, 16)))

    modes = []
    vae.detail_encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    monkeypatch.setattr(figures, "draw_reconstructions", lambda *args: None)
    run = SimpleNamespace(rank=0, cfg=Config(out="run", micro_batch=2, dtype="float32"), results={})
    train_vae.validate(run, 0, vae, torch.rand(3, 3, 16, 16))
    assert modes == [False, False] and vae.detail_encoder.training


def test_lpips_squeeze_gives_its_published_value(shared):
    lpips = metrics.make_lpips("squeeze", shared("weights/lpips/squeezenet1_1_features.pth"))
    torch.manual_seed(123)
    a = torch.rand(10, 3, 100, 100) * 2 - 1
    b = torch.rand(10, 3, 100, 100) * 2 - 1
    assert abs(lpips(a, b).mean().item() - 0.1008) < 1e-4
    assert lpips(a, a).abs().max() == 0
    assert not any(p.requires_grad for p in lpips.parameters())


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def davae_run(davae_config, plot_losses, tmp_path_factory):
    """(Config, summary) of a DA-VAE that was trained for four steps, with a plot of its losses."""
    cfg = davae_config(tmp_path_factory.mktemp("runs") / "davae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_losses", plot_losses)
        return cfg, train_vae.main(cfg)


def test_training_writes_log_pictures_statistics_and_a_whole_checkpoint(davae_run, base_run, read_log):
    out = Path(davae_run[0].out)
    rows = read_log(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "d" not in rows[2]                                       # the discriminator starts after step 3
    assert {"l1", "kl", "align", "a_w", "g", "d_w", "d", "gnorm"} <= set(rows[3])
    assert all((out / name).stat().st_size > 1000 for name in ("recon.png", "loss.png"))
    vae = load_davae(out)
    assert vae.std.min() > 0 and (vae.std != 1).all()
    base = load_davae(base_run).base.state_dict()
    assert all(torch.equal(value, base[key]) for key, value in vae.base.state_dict().items())


def test_summary_psnrs_and_picture_rows_are_of_the_base_and_the_full_image(davae_run):
    cfg, summary = davae_run
    val = held_out.validation_images(cfg, None)
    base, full = train_vae.reconstruct(load_davae(cfg.out), val)
    assert summary["psnr_base"] == pytest.approx(psnr(base, val).mean().item(), abs=1e-3)
    assert summary["psnr"] == pytest.approx(psnr(full, val).mean().item(), abs=1e-3)
    assert abs(summary["psnr"] - summary["psnr_base"]) > 0.1

    strip = np.asarray(Image.open(Path(cfg.out) / "recon.png")).astype(int)
    for row, shown in enumerate((val, base, full, 4 * (full - val).abs() - 1)):
        top = 14 + 78 * row                                         # gap 2, label 12, image 64
        cells = [strip[top:top + 64, 66 * i + 2:66 * i + 66] for i in range(8)]
        assert np.abs(np.stack(cells) - figures.to_uint8(shown)).max() <= 1


def test_training_obeys_its_flags_for_batches_and_both_optimizers(davae_config, tmp_path, monkeypatch):
    """--crop, --flip, --clip, --warmup and --cooldown."""
    cfg = davae_config(
        tmp_path / "run", crop=(32,), flip=True, clip=1e-3, warmup=2, cooldown=0.5, disc_start=0)
    plain_loss = train_vae.vae_loss
    seen = []
    updates = []

    def loss(vae, rec, x, *args):
        seen.append(x)
        return plain_loss(vae, rec, x, *args)

    def before_update(opt, args, options):
        group, = opt.param_groups
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        updates.append((group["lr"], torch.nn.utils.get_total_norm(gradients).item()))

    monkeypatch.setattr(train_vae, "vae_loss", loss)
    with register_optimizer_step_pre_hook(before_update):
        train_vae.main(cfg)

    rates = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    assert [lr for lr, _ in updates[0::2]] == [lr for lr, _ in updates[1::2]] == pytest.approx(rates)
    assert [norm for _, norm in updates[0::2]] == pytest.approx([1e-3] * 4, rel=0.01)
    train_set = data.open_dataset("procedural", 64, 32, cfg.seed)
    for step, (x, _) in zip(range(4), data.batches(train_set, 4, cfg.seed, flip=True)):
        ranks.seed_step(cfg.seed, 0, step)
        assert torch.equal(seen[step], data.random_crop(data.to_tensor(x), 32))


def test_latents_are_measured_on_the_images_of_all_ranks(davae_config, tmp_path, monkeypatch):
    """Simulates another rank that has as many latents as this one, all of them 0."""
    cfg = davae_config(tmp_path / "run", steps=1, image_size=16, gan=0.0)
    count_alone = torch.tensor([1.0, 0.0, 0.0])[:, None]
    monkeypatch.setattr(ranks, "sum_patiently", lambda sums: sums + count_alone * sums)
    train_vae.main(cfg)
    vae = load_davae(cfg.out)
    found = vae.mean.clone()
    train_set = data.open_dataset("procedural", 16, 32, cfg.seed)
    vae.measure(held_out.statistics_images(cfg, train_set, torch.device("cpu"), 0, 1))
    assert torch.allclose(found, vae.mean / 2, atol=1e-6)


def test_a_plan_refuses_flags_that_exclude_each_other_before_it_trains_other_stages(davae_config, tmp_path):
    cfg = davae_config(tmp_path / "run", train="blocks", adaptive_align=True)
    with pytest.raises(SystemExit, match="--train=blocks"):
        train_vae.trial(cfg, 1, torch.device("cpu"), {}, None)


def test_statistics_and_closed_form_are_measured_as_latents_are_encoded_later(
        davae_config, tmp_path, monkeypatch):
    """In eval mode: a base of your own may have dropout or batch statistics."""
    plain_measure, modes = DAVAE.measure, []

    def measure(vae, *args):
        modes.append([module.training for module in vae.modules()])
        return plain_measure(vae, *args)

    def fit(vae, *args):
        modes.append([module.training for module in vae.modules()])
        return {"kept": 0.0, "told": 0.0}

    monkeypatch.setattr(DAVAE, "measure", measure)
    monkeypatch.setattr(train_vae, "fit_new_blocks", fit)
    train_vae.main(davae_config(tmp_path / "run", steps=1, gan=0.0, fit="closed"))
    assert len(modes) == 2 and not any(map(any, modes))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, here g++")
def test_compiled_levels_give_the_same_losses_and_weight_names(davae_config, tmp_path, read_log):
    def train(compile):
        cfg = davae_config(tmp_path / str(compile), steps=3, disc_start=2, image_size=32, compile=compile)
        train_vae.main(cfg)
        names = load_file(runs.latest_checkpoint(cfg.out) / "model.safetensors").keys()
        return read_log(cfg.out), names

    rows, names = train(compile=False)
    compiled_rows, compiled_names = train(compile=True)
    assert "d_w" in compiled_rows[2]
    assert compiled_names == names
    for key in ("l1", "kl", "align"):
        assert [row[key] for row in compiled_rows] == pytest.approx([row[key] for row in rows], rel=1e-4)


def discriminator_of(cfg):
    """The weights of the discriminator in a run's newest checkpoint."""
    state = torch.load(runs.latest_checkpoint(cfg.out) / "train_state.pt", weights_only=True)
    return state["disc"]


def test_the_discriminator_is_untouched_before_its_start_and_trained_after(davae_config, tmp_path):
    cfg = davae_config(tmp_path / "run", steps=3)
    torch.manual_seed(cfg.seed)
    start = PatchGAN(4).state_dict()

    train_vae.main(cfg)
    assert all(torch.equal(value, start[key]) for key, value in discriminator_of(cfg).items())
    train_vae.main(replace(cfg, steps=5))
    assert not torch.equal(discriminator_of(cfg)["0.weight"], start["0.weight"])


def test_the_discriminators_first_step_is_disc_lr_times_as_long(davae_config, tmp_path):
    moved = []
    for ratio in (1.0, 0.125):
        cfg = davae_config(tmp_path / str(ratio), steps=1, disc_start=0, disc_lr=ratio)
        torch.manual_seed(cfg.seed)
        start = PatchGAN(4).state_dict()["0.weight"]
        train_vae.main(cfg)
        moved.append((discriminator_of(cfg)["0.weight"] - start).abs().mean())
    assert moved[1] / moved[0] == pytest.approx(0.125, rel=1e-2)           # Adam's first step is about lr


def test_twenty_steps_equal_ten_plus_ten_resumed_bit_for_bit(davae_config, same_weights, tmp_path):
    straight = davae_config(tmp_path / "straight", disc_start=6, steps=20, crop=(32,))
    halves = replace(straight, out=str(tmp_path / "halves"))
    train_vae.main(straight)
    train_vae.main(replace(halves, steps=10))
    train_vae.main(halves)
    assert same_weights(straight, halves)
    resumed = discriminator_of(halves)
    assert all(torch.equal(value, resumed[key]) for key, value in discriminator_of(straight).items())


def test_the_psnr_of_a_checkpoint_is_in_the_next_line_of_the_log(davae_config, tmp_path, read_log):
    cfg = davae_config(tmp_path / "a", steps=4, save_every=2, image_size=16, gan=0.0)
    train_vae.main(cfg)
    at_two = train_vae.main(replace(cfg, out=str(tmp_path / "b"), steps=2))
    rows = read_log(cfg.out)
    assert [row["step"] for row in rows if "psnr" in row] == [3]
    for name in ("psnr", "psnr_base"):
        assert rows[2][name] == pytest.approx(at_two[name], abs=1e-4)


def test_a_run_killed_before_its_summary_still_gets_one(davae_config, tmp_path):
    cfg = davae_config(tmp_path / "a", steps=1, image_size=16, gan=0.0)
    first = train_vae.main(cfg)
    (tmp_path / "a" / "summary.json").unlink()
    again = train_vae.main(cfg)
    assert again | {"seconds": 0} == first | {"seconds": 0}


def test_the_same_command_again_says_the_run_is_finished(vae_config, base_run, capsys):
    newest = runs.latest_checkpoint(base_run)
    before = newest.stat().st_mtime
    train_vae.main(vae_config(base_run))
    assert "finished at step 4" in capsys.readouterr().out
    assert runs.latest_checkpoint(base_run) == newest
    assert newest.stat().st_mtime == before


def test_resuming_with_another_model_is_refused(vae_config, base_run):
    with pytest.raises(SystemExit, match="started with C=4, now C=8"):
        train_vae.main(vae_config(base_run, C=8, steps=9))


def test_presets_have_valid_fields_and_distinct_folders():
    for name, values in PRESETS.items():
        assert Config(**{"preset": name, **values}).out == values["out"]
    assert len({v["out"] for v in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize("name", ["sd35m", "klein", "klein-2048"])
def test_presets_weight_the_kl_summed_over_a_latent_by_1e_7(name):
    cfg = Config(**{"preset": name, **PRESETS[name]})
    side = min([cfg.image_size, *cfg.crop]) // (8 * cfg.r)         # of a latent in training
    assert cfg.kl == pytest.approx(1e-7 * 0.5 * cfg.D * side**2, rel=0.02)


@pytest.mark.parametrize("train,changed", [
    ("all", "detail_encoder decoder down up"), ("decoder", "decoder down up"), ("up", "decoder up"),
    ("blocks", "down up")])
def test_only_the_parts_named_by_train_are_trained(davae_config, tmp_path, train, changed):
    cfg = davae_config(tmp_path / train, train=train, adaptive_align=train != "up", steps=2, save_every=1)
    train_vae.main(cfg)
    before = load_file(Path(cfg.out) / "step_000001/model.safetensors")
    after = load_file(Path(cfg.out) / "step_000002/model.safetensors")
    statistics = ("mean", "std")                                   # measured after the last step
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved - set(statistics) == set(changed.split())


def test_a_davae_with_r_4_trains_resumes_and_carries_a_dit(davae_config, same_weights, tmp_path):
    sizes = dict(r=4, D=16, steps=4, image_size=64, gan=0.0)
    straight = davae_config(tmp_path / "a", **sizes)
    broken = davae_config(tmp_path / "b", **sizes | dict(steps=2))
    summary = train_vae.main(straight)
    train_vae.main(broken)
    train_vae.main(replace(broken, steps=4))
    assert same_weights(straight, broken) and {"psnr", "psnr_base"} <= summary.keys()

    small = dict(image_size=64, images=16, flip=False, steps=2, batch_size=4, micro_batch=4, log_every=1,
                 save_every=100, sample_steps=2, cfg=2.0, shift=1.0, vae=straight.out)
    sizes = dict(p=2, E=32, depth=2, A=2)
    base = finetune.Config(preset="tiny-base", out=str(tmp_path / "base"), D=0, **sizes, **small)
    run = finetune.Config(preset="tiny", out=str(tmp_path / "run"), D=16, N=2, base=base.out, **small)
    finetune.main(base)
    assert finetune.main(run)["warm_start"] == 0.0
    folder = sample.main(sample.Config(run=run.out, n=2, steps=2, batch_size=2))
    assert Image.open(folder / "images/000001.png").size == (64, 64)
    entry = evaluate.main(evaluate.Config(run=run.out, n=4, steps=2, images=4, features="none"))
    assert entry["reconstruction"]["DA-VAE"]["positions"] == 64
    assert entry["reconstruction"]["base VAE, full size"]["positions"] == 16 * 64


def test_help_says_what_r_does_without_details_and_that_they_start_aligned_whatever_align_is(capsys):
    with pytest.raises(SystemExit):
        config.cli(Config, PRESETS, ["tiny-base", "--help"])
    said = {line.split("=")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "D = 0: in seven of eight steps, images are shrunk by r" in said["--r"]
    cfg = Config(D=0, r=4)
    sides = [train_vae.training_batch(torch.zeros(1, 3, 64, 64), step, cfg).shape[-1] for step in range(16)]
    assert sides == [64, *[16] * 7] * 2

    assert "0: none; see fit_align" in said["--align"]
    assert "details start aligned to z, whatever --align" in said["--fit_align"]


def test_pictures_are_drawn_after_the_checkpoint_is_written(davae_config, tmp_path, monkeypatch):
    draw = figures.draw_reconstructions

    def crash(out, done, *args):
        if done:
            raise KeyError("no fault of memory, disk or matplotlib")
        draw(out, done, *args)

    monkeypatch.setattr(figures, "draw_reconstructions", crash)
    cfg = davae_config(tmp_path / "run", steps=3)
    with pytest.raises(KeyError):
        train_vae.main(cfg)
    assert runs.step_of(cfg.out) == 3


def test_a_failing_picture_costs_no_checkpoint(davae_config, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory for a picture")

    monkeypatch.setattr(train_vae.figures, "save_grid", fail)
    monkeypatch.setattr(train_vae.figures, "plot_losses", fail)
    cfg = davae_config(tmp_path / "run", steps=3)
    assert train_vae.main(cfg)["psnr"] > 0
    assert runs.step_of(cfg.out) == 3
    assert ("reconstructions not drawn: no memory for a picture; nothing else is lost"
            in capsys.readouterr().err)


@pytest.mark.parametrize("changes,sentence", [
    (dict(image_size=62), "--image_size=62: this VAE takes multiples of 4; give --image_size=64"),
    (dict(halvings=2), "--halvings=2 halves only images that are then cropped; give sides of crops by"),
    (dict(crop=(10,)), "--crop=10: this VAE takes multiples of 4; give --crop=8"),
    (dict(D=0, base="", r=3, image_size=96), "--r=3: wanted 1, 2, 4, 8, ...: the base image is made by"),
    (dict(crop=(32, 128)), "--crop=128 is larger than --image_size=64; give less"),
    (dict(D=0, base="", image_size=64, crop=(40,)), "--crop=40 is larger than --image_size=64 / 2; give"),
    (dict(train="up", gan=0.0), "--train=up freezes the layer whose gradients weight the alignment; give"),
    (dict(project="raw"), "--project=raw keeps the details' channels, which are not the teacher's"),
    (dict(teacher="dino", project="conv", buckets=2), "--buckets=2: the teacher takes square images"),
    (dict(teacher="dino"), "--project=mean groups details by the base's channels, and --teacher= names"),
    (dict(keep_levels=(0, 13)), "--keep_levels=0,13: wanted numbers of detail channels, 0 to 12; 13 is out"),
    (dict(train="blocks"), "--train=blocks freezes the layer whose gradients weight the GAN; give --gan=0"),
    (dict(rescale=True, detail_dropout=1.0), "--rescale=True divides by 1 - detail_dropout"),
    (dict(image_size=20), "images of 20 pixels; wanted 24 or more, or --gan=0"),
    (dict(crop=(32, 20)), "--image_size=64, --crop: images of 20 pixels; wanted 24 or more, or --gan=0"),
    (dict(gan=0.0, perceptual="squeeze", image_size=16), "images of 16 pixels; wanted 17 or more"),
])
def test_invalid_settings_get_one_sentence_before_the_first_save(davae_config, tmp_path, changes, sentence):
    with pytest.raises(SystemExit, match=sentence):
        train_vae.main(davae_config(tmp_path / "run", **changes))
    assert not list(tmp_path.glob("run/step_*"))


@pytest.mark.parametrize("D", [0, 12])
def test_a_davae_is_refused_as_a_base_and_its_own_base_is_named(davae_run, davae_config, tmp_path, D):
    made = davae_run[0]
    cfg = davae_config(tmp_path / "run", base=made.out, D=D)
    with pytest.raises(SystemExit, match=f"^{made.out}: a DA-VAE, .* that it was trained on, {made.base}$"):
        train_vae.main(cfg)
    with pytest.raises(SystemExit, match="such as the one that it was trained on$"):
        train_vae.initial_vae(replace(cfg, base=str(runs.latest_checkpoint(made.out))))


def test_crops_of_each_size_come_from_every_halving_that_holds_them():
    cfg = Config(D=24, crop=(8, 16, 32), halvings=2)
    x = torch.arange(32.0).expand(2, 3, 32, 32)                    # brighter by 1 with each pixel
    torch.manual_seed(0)
    seen = set()
    for step in range(200):
        crop = train_vae.training_batch(x, step, cfg)
        slope = crop[0, 0, 4, 4] - crop[0, 0, 4, 3]                # 2 in the halved image, 4 in the quarter
        seen.add((crop.shape[-1], round(slope.item())))
    assert seen == {(8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (32, 1)}


def test_all_micro_batches_of_a_step_crop_to_the_side_that_its_first_one_draws():
    """So that no rank waits for another one's larger images; alone, the crops are as they ever were."""
    cfg = Config(D=24, crop=(8, 16, 32), seed=3)
    x = torch.randn(2, 3, 32, 32)
    drawn = []
    for step in range(20):
        crops = []
        for part in range(4):
            ranks.seed_step(cfg.seed, part, step)
            crops.append(train_vae.training_batch(x, step, cfg))
        ranks.seed_step(cfg.seed, 0, step)
        side = train_vae.one_of(cfg.crop)
        assert torch.equal(crops[0], data.random_crop(x, side))
        assert {crop.shape[-1] for crop in crops} == {side}
        drawn.append(side)
    assert set(drawn) == set(cfg.crop)


def test_a_single_crop_size_draws_no_extra_random_number():
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    crop = train_vae.training_batch(x, 1, Config(D=24, crop=(16,)))
    torch.manual_seed(0)
    assert torch.equal(crop, data.random_crop(x, 16))


def test_networks_of_your_own_loss_are_resumed_but_not_saved_in_the_model(
        davae_config, same_weights, tmp_path, monkeypatch):
    plain_loss = train_vae.vae_loss

    class Networks(train_vae.LossNetworks):
        def __init__(self, cfg, vae, device):
            super().__init__(cfg, vae, device)
            self.own["projection"] = torch.nn.Conv2d(12, 4, 1)

    def loss_with_projection(vae, rec, x, cfg, nets, gan_on=False):
        loss, parts = plain_loss(vae, rec, x, cfg, nets, gan_on)
        return loss + (nets.own["projection"](rec.z_d) - rec.z).square().mean(), parts

    monkeypatch.setattr(train_vae, "LossNetworks", Networks)
    monkeypatch.setattr(train_vae, "vae_loss", loss_with_projection)
    straight, broken = davae_config(tmp_path / "a", steps=4), davae_config(tmp_path / "b", steps=2)
    train_vae.main(straight)
    train_vae.main(broken)
    first = runs.read_state_dict(Path(broken.out) / "step_000002/train_state.pt")["own"]
    train_vae.main(replace(broken, steps=4))
    own = []
    for cfg in (straight, broken):
        own.append(runs.read_state_dict(Path(cfg.out) / "step_000004/train_state.pt")["own"])
    assert same_weights(straight, broken)
    assert all(torch.equal(own[0][k], own[1][k]) for k in own[0])
    assert not torch.equal(own[0]["projection.weight"], first["projection.weight"])
    assert not any("projection" in k for k in load_file(Path(broken.out) / "step_000004/model.safetensors"))
