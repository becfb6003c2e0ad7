"""train_vae.py: the losses against closed forms and by hand, the discriminator, exact resume."""
import json
import math
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_vae
from davae import DAVAE, AutoencoderKL, KLConfig
from support.weights import load_davae
from train_vae import PRESETS, Config, PatchGAN, adaptive_weight, hinge_loss, learning_rate, vae_loss
from support.metrics import psnr
from support import fit, metrics, ranks, runs


def small(out, **changes):
    """A base VAE of 8 channels on 16-pixel images: a step takes milliseconds."""
    values = dict(preset="tiny-base", out=str(out), D=0, C=4, ch=8, ch_mult=(1, 2), blocks=1, groups=4, image_size=16, images=32,
                  flip=False, perceptual="none", gan=0.0, stats=16, steps=4, batch_size=4, lr=1e-3, log_every=1, save_every=100)
    return Config(**{**values, **changes})


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "base"
    train_vae.main(small(out))
    return str(out)


def detail(base_run, out, **changes):
    return small(out, **{**dict(D=12, base=base_run, preset="tiny", gan=0.1, disc_start=3, disc_width=4, image_size=64), **changes})


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


def test_vae_loss_is_the_sum_of_its_terms_with_adaptive_weights():
    torch.manual_seed(0)
    vae = DAVAE(AutoencoderKL(KLConfig(C=4, ch=8, ch_mult=(1, 2), blocks=1, groups=4)), 12).train()
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


def test_training_writes_log_pictures_statistics_and_a_whole_checkpoint(base_run, tmp_path):
    summary = train_vae.main(detail(base_run, tmp_path / "run"))
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
def test_compiled_levels_give_the_same_losses_and_the_same_names(base_run, tmp_path):
    rows, names = [], []
    for compile in (False, True):
        cfg = detail(base_run, tmp_path / str(compile), steps=3, disc_start=2, image_size=32, compile=compile)
        train_vae.main(cfg)
        rows.append([json.loads(line) for line in open(f"{cfg.out}/log.jsonl")])
        names.append(sorted(load_file(runs.latest_checkpoint(cfg.out) / "model.safetensors")))
    assert "d_w" in rows[1][2] and names[0] == names[1]
    for key in ("l1", "kl", "align"):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[0]], rel=1e-4)


def test_the_discriminator_is_untouched_before_its_start_and_trained_after(base_run, tmp_path):
    cfg = detail(base_run, tmp_path / "run", steps=3)
    torch.manual_seed(cfg.seed)
    start = PatchGAN(4).state_dict()

    def saved():
        return torch.load(runs.latest_checkpoint(cfg.out) / "train_state.pt", weights_only=True)["disc"]

    train_vae.main(cfg)
    assert all(torch.equal(v, start[k]) for k, v in saved().items())
    train_vae.main(replace(cfg, steps=5))
    assert not torch.equal(saved()["0.weight"], start["0.weight"])


def test_twenty_steps_equal_ten_and_resumed_ten_bit_for_bit(base_run, tmp_path):
    straight, halves = (detail(base_run, tmp_path / name, disc_start=6, steps=20, crop=32) for name in ("straight", "halves"))
    train_vae.main(straight)
    train_vae.main(replace(halves, steps=10))
    train_vae.main(halves)
    a, b = (runs.latest_checkpoint(cfg.out) for cfg in (straight, halves))
    weights = [load_file(p / "model.safetensors") for p in (a, b)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    states = [torch.load(p / "train_state.pt", weights_only=True) for p in (a, b)]
    assert all(torch.equal(states[0]["disc"][k], states[1]["disc"][k]) for k in states[0]["disc"])


# ---------------------------------------------------------------- faults


def same_weights(a, b):
    states = [load_file(runs.latest_checkpoint(cfg.out) / "model.safetensors") for cfg in (a, b)]
    return all(torch.equal(states[0][k], states[1][k]) for k in states[0])


DIE = "os.kill(os.getpid(), signal.SIGKILL)"
KILLED_SAVES = {
    "in the middle of a file": f"""
write = runs.save_file
def save_file(state, path):
    write(state, path)
    if 'step_000002' in str(path):
        open(path, 'rb+').truncate(os.path.getsize(path) // 2)
        {DIE}
runs.save_file = save_file""",
    "before the rename": f"""
rename = os.replace
def replace(a, b):
    {DIE} if str(b).endswith('step_000002') else rename(a, b)
os.replace = replace""",
    "before the old one is pruned": f"""
remove = runs.shutil.rmtree
def rmtree(path, **kw):
    {DIE} if str(path).endswith('step_000000') and os.path.isdir(str(path)[:-1] + '2') else remove(path, **kw)
runs.shutil.rmtree = rmtree"""}


@pytest.mark.parametrize("moment", KILLED_SAVES)
def test_a_run_killed_in_a_save_goes_on_as_if_nothing_had_been(base_run, tmp_path, launch, moment):
    straight, killed = (detail(base_run, tmp_path / name, save_every=1, image_size=32, disc_start=1) for name in "ab")
    process = launch(train_vae.main, killed, KILLED_SAVES[moment])
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert runs.step_of(killed.out) == (2 if "pruned" in moment else 1)
    train_vae.main(straight)
    train_vae.main(killed)
    assert same_weights(straight, killed) and not list((tmp_path / "b").glob("*.tmp"))
    assert [p.name for p in runs.checkpoints(killed.out)] == ["step_000003", "step_000004"]


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_still_gets_one(base_run, tmp_path):
    cfg = detail(base_run, tmp_path / "a", steps=1, image_size=16, gan=0.0)
    first = train_vae.main(cfg)
    (tmp_path / "a" / "summary.json").unlink()
    again = train_vae.main(cfg)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def test_sigterm_finishes_the_step_saves_and_exits_with_zero(base_run, tmp_path, interrupt):
    straight, stopped = (detail(base_run, tmp_path / name, steps=300, image_size=16, gan=0.0) for name in "ab")
    step = interrupt(train_vae.main, stopped, signal.SIGTERM)
    for cfg in (straight, stopped):
        train_vae.main(replace(cfg, steps=step + 2, cooldown=0.0))
    assert same_weights(straight, stopped)


def test_two_jobs_do_not_train_in_one_folder(base_run, tmp_path):
    lock = runs.hold(tmp_path / "a", 0)
    with pytest.raises(SystemExit, match="another process is training here"):
        train_vae.main(detail(base_run, tmp_path / "a"))
    del lock
    train_vae.main(detail(base_run, tmp_path / "a", steps=1, image_size=16))


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt", "config.json"])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_it_is_offered(base_run, tmp_path, name):
    cfg = detail(base_run, tmp_path / "a", steps=2, save_every=1, image_size=16, gan=0.0)
    train_vae.main(cfg)
    file = tmp_path / "a" / "step_000002" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"step_000002/{name}: damaged, .* to go on from .*step_000001"):
        train_vae.main(replace(cfg, steps=3))
    runs.shutil.rmtree(file.parent)
    train_vae.main(replace(cfg, steps=3))                          # as it said
    assert runs.step_of(cfg.out) == 3


def test_a_disk_too_small_shows_at_step_zero_in_one_sentence(base_run, small_disk, launch):
    process = launch(train_vae.main, detail(base_run, small_disk(100) / "run", image_size=16))
    out, err = process.communicate()
    assert process.returncode == 1 and "not written: " in err and "Make room" in err and "Traceback" not in err


def test_a_disk_that_fills_up_stops_no_training_and_the_next_save_tries_again(base_run, small_disk, monkeypatch, capsys):
    disk, validate = small_disk(4000), train_vae.validate

    def filling(vae, val, out, step):                              # full when step 2 is saved, empty again at step 3
        (disk / "filler").unlink(missing_ok=True)
        if step == 2:
            with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as f:
                while True:
                    f.write(bytes(4096))
        return validate(vae, val, out, step)

    monkeypatch.setattr(train_vae, "validate", filling)
    train_vae.main(detail(base_run, disk / "run", save_every=1, image_size=16, steps=3, gan=0.0))
    assert "training goes on, and the next save tries again" in capsys.readouterr().err
    assert [p.name for p in runs.checkpoints(disk / "run")] == ["step_000001", "step_000003"]


def test_a_read_only_disk_is_one_sentence_and_the_run_goes_on(base_run, small_disk, monkeypatch, capsys):
    run, loss = small_disk(4000) / "run", train_vae.vae_loss
    commands = iter([["true"], ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", run], ["true"], ["umount", run]])

    def mounting(*args):                                           # steps 2 and 3 find a read-only disk where the run was
        subprocess.run(next(commands), check=True)
        return loss(*args)

    monkeypatch.setattr(train_vae, "vae_loss", mounting)
    train_vae.main(detail(base_run, run, save_every=1, image_size=16, steps=4, gan=0.0))
    assert capsys.readouterr().err.count("Read-only file system") >= 2
    assert [p.name for p in runs.checkpoints(run)] == ["step_000001", "step_000004"]
    subprocess.run(["mount", "-o", "remount,ro", run.parent], check=True)
    with pytest.raises(SystemExit, match="not written: .*Read-only file system"):
        train_vae.main(detail(base_run, run.parent / "other", image_size=16))


def test_out_of_memory_is_answered_with_the_flags_to_try_in_order(base_run, tmp_path):
    def main(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(SystemExit, match="(?s)Tried to allocate 20 GiB.*--micro_batch=8 .*, a smaller model"):
        ranks.launch(main, small(tmp_path))


def losses_of(out):
    return [{k: v for k, v in json.loads(line).items() if k not in ("img/s", "GB")} for line in open(Path(out) / "log.jsonl")]


def test_two_processes_lose_what_one_does_and_resume_each_others_runs(base_run, tmp_path, launch):
    one, two = (detail(base_run, tmp_path / name, micro_batch=2, image_size=32, crop=24, disc_start=1, steps=3) for name in "ab")
    process = launch(train_vae.main, two, ranks=2)
    out, err = process.communicate()
    assert process.returncode == 0 and "batch 4 = 2 ranks x 2 x 1" in out, err[-3000:]
    train_vae.main(one)
    for a, b in zip(losses_of(one.out), losses_of(two.out), strict=True):
        assert a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=2e-3, abs_tol=1e-5) for k in a), (a, b)
    train_vae.main(replace(two, steps=4))                          # two, then one
    process = launch(train_vae.main, replace(one, steps=4), ranks=2)                               # one, then two
    out, err = process.communicate()
    assert process.returncode == 0 and losses_of(one.out)[-1]["step"] == losses_of(two.out)[-1]["step"] == 4, err[-3000:]


@pytest.mark.parametrize("fault, sentence", [
    ("raise ZeroDivisionError('a rank that dies')", "ZeroDivisionError: a rank that dies"),
    ("loss = loss * torch.tensor(float('nan'))", "first bad parameter")])
def test_one_rank_that_fails_ends_all_within_seconds_and_says_why(base_run, tmp_path, launch, fault, sentence):
    cfg = detail(base_run, tmp_path / "a", micro_batch=2, image_size=16, steps=100_000, gan=0.0, log_every=10_000)
    process = launch(train_vae.main, cfg, f"""
original, count = script.vae_loss, []
def vae_loss(*args):
    loss, parts = original(*args)
    count.append(1)
    if RANK == 1 and len(count) == 5:
        {fault}
    return loss, parts
script.vae_loss = vae_loss""", ranks=2)
    start = time.time()
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and sentence in err and runs.step_of(cfg.out) == 0, err[-3000:]
    assert time.time() - start < 40, "of which 10 are for Python to start"


def test_the_same_command_again_says_that_it_is_finished(base_run, capsys):
    before = runs.latest_checkpoint(base_run).stat().st_mtime
    train_vae.main(small(base_run))
    assert "finished at step 4" in capsys.readouterr().out and runs.latest_checkpoint(base_run).stat().st_mtime == before


def test_resuming_with_another_model_is_refused(base_run):
    with pytest.raises(SystemExit, match="started with C=4, now C=8"):
        train_vae.main(small(base_run, C=8, steps=9))


def test_presets_name_fields_and_their_own_folders():
    for name, values in PRESETS.items():
        assert Config(**{"preset": name, **values}).out == values["out"]
    assert len({v["out"] for v in PRESETS.values()}) == len(PRESETS)


# ---------------------------------------------------------------- a start for the new blocks


def test_ridge_is_least_squares_over_all_batches():
    X, Y = torch.randn(60, 5).double(), torch.randn(60, 3).double()
    parts = list(zip(X.split(7), Y.split(7)))
    assert torch.allclose(fit.ridge(parts, 0.0), torch.linalg.lstsq(X, Y).solution)
    l = 0.1 * X.square().sum(0).mean()
    assert torch.allclose(fit.ridge(parts, 0.1), torch.linalg.solve(X.T @ X + l * torch.eye(5), X.T @ Y))


@torch.no_grad()
def test_fitted_blocks_start_with_three_quarters_of_the_full_size_latent_and_find_the_rest():
    torch.manual_seed(0)
    vae = DAVAE(AutoencoderKL(KLConfig(C=4, ch=8, ch_mult=(1, 2), blocks=1, groups=4)), 12).train()
    head = vae.base.to_moments[0]
    head.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0       # a 1x1 head: the shortcut can be exact
    x = torch.nn.functional.interpolate(torch.rand(40, 3, 8, 8) * 2 - 1, scale_factor=4, mode="bicubic")
    z_full = vae.base.encode(x)                                                      # (40, 4, 16, 16)
    target = vae.base.from_latent(vae.base.posterior(x).mean)

    def left_over(z_d):
        return ((vae.up(torch.cat([vae.encode_base(x), z_d], dim=1)) - target).square().mean() / target.var()).item()

    fit.fit_new_blocks(vae, x.split(8))
    posterior, corners = vae.detail_posterior(x), [z_full[:, :, 0::2, 0::2], z_full[:, :, 0::2, 1::2], z_full[:, :, 1::2, 0::2]]
    for k, corner in enumerate(corners):                                             # channel c is in group c
        assert (posterior.mean[:, k::3] - corner).square().mean() < 0.01 * corner.var()
    assert (posterior.logvar == -6).all()
    assert left_over(posterior.mean) < 0.2 * left_over(torch.zeros_like(posterior.mean))
    with pytest.raises(SystemExit, match="needs D = 3C"):
        fit.fit_new_blocks(DAVAE(vae.base, 8), x.split(8))


def test_a_fitted_run_resumes_without_fitting_again(base_run, tmp_path, monkeypatch):
    run = detail(base_run, tmp_path / "a", fit=True, gan=0.0, steps=2)
    train_vae.main(run)
    monkeypatch.setattr(fit, "fit_new_blocks", None)
    train_vae.main(replace(run, steps=3))
    assert runs.step_of(run.out) == 3


@pytest.mark.slow
@torch.no_grad()
def test_fitted_blocks_beat_the_base_alone_on_photos_before_any_training(shared):
    photos = train_vae.data.open_dataset(str(shared("data/imagenette128/train")), 128, 0, 0)
    held_out = train_vae.data.open_dataset(str(shared("data/imagenette128/eval")), 128, 0, 0)
    vae = DAVAE(load_davae(shared("weights/taef2")).base, 96)
    pick = lambda d, n: train_vae.data.to_tensor(train_vae.data.stack(d, torch.linspace(0, len(d) - 1, n).long().tolist())[0])
    fit.fit_new_blocks(vae, pick(photos, 256).split(16))
    x = pick(held_out, 32)
    base, full = train_vae.reconstruct(vae.eval(), x)
    assert psnr(full, x).mean() > psnr(base, x).mean() + 0.7
