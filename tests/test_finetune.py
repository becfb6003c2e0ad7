"""finetune.py: the schedule, the flow loss, the warm start, exact resume, and the main job end to end."""
import json
import math
import shutil
import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import davae
import evaluate
import finetune
import sample
import train_vae
from dit import DiTConfig, LightningDiT
from finetune import PRESETS, Config, detail_weight, flow_loss, warm_start_difference
from support import data, ranks, runs, text, weights
from support.weights import load_davae, load_dit


def tiny_dit(D=0):
    torch.manual_seed(0)
    model = LightningDiT(DiTConfig(C=4, D=D, p=1, grid=4, E=32, depth=2, A=2, num_classes=5))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)              # a fresh DiT computes 0, which would prove nothing
    return model


# ---------------------------------------------------------------- the method


def test_detail_weight_is_zero_half_and_one_at_the_start_middle_and_end_of_the_ramp():
    N = 1000
    assert detail_weight(0, N) == 0 and detail_weight(N, N) == 1 and detail_weight(5 * N, N) == 1
    assert detail_weight(N // 2, N) == pytest.approx(0.5)
    values = [detail_weight(n, N) for n in range(N + 1)]
    assert all(a < b for a, b in zip(values, values[1:]))
    assert detail_weight(N // 3, N) == pytest.approx(math.sin(math.pi / 6 * (N // 3) / (N / 3)) ** 2)


def test_flow_loss_is_zero_at_the_true_velocity():
    z_all, y = torch.randn(4, 8, 2, 2), torch.zeros(4).long()

    def oracle(x, t, y):                               # v* = (z - x_t) / (1 - t)
        return (z_all - x) / (1 - t.view(-1, 1, 1, 1))

    loss, base, detail = flow_loss(oracle, z_all, (y,), C=4, w=0.3)
    assert max(loss.abs(), base, detail) < 1e-5


def losses(w, cosine, v=None):
    """flow_loss of a fixed prediction v, and the target it was compared with, for the same draws."""
    torch.manual_seed(1)
    z_all, v = torch.randn(4, 12, 3, 3), torch.randn(4, 12, 3, 3) if v is None else v
    torch.manual_seed(2)
    result = flow_loss(lambda x, t, y: v, z_all, (torch.zeros(4).long(),), 4, w, cosine)
    torch.manual_seed(2)
    torch.randn(4)                                     # the times
    return result, v, z_all - torch.randn_like(z_all)


def test_at_weight_zero_the_squared_error_is_that_of_the_base_channels_alone():
    (loss, base, _), v, target = losses(w=0.0, cosine=0.0)
    assert torch.allclose(loss, (v - target)[:, :4].square().mean()) and torch.equal(loss, base)


def test_at_weight_one_it_is_the_plain_mean_and_between_a_weighted_mean_over_channels():
    (loss, base, detail), v, target = losses(w=1.0, cosine=0.0)
    assert torch.allclose(loss, (v - target).square().mean())
    (loss, base, detail), v, target = losses(w=0.25, cosine=0.0)
    m = torch.tensor([1.0] * 4 + [0.25] * 8).view(1, 12, 1, 1)
    assert torch.allclose(loss, ((v - target).square() * m).mean() * 12 / m.sum())      # as in the authors' code
    assert torch.allclose(detail, (v - target)[:, 4:].square().mean())


def test_the_cosine_term_sees_all_channels_whatever_the_weight():
    (with_cosine, *_), v, target = losses(w=0.0, cosine=1.0)
    (without, *_), _, _ = losses(w=0.0, cosine=0.0)
    cosine = 1 - (v * target).sum(1) / (v.norm(dim=1) * target.norm(dim=1))
    assert torch.allclose(with_cosine - without, cosine.mean(), atol=1e-6)


def test_ema_follows_the_closed_form():
    model, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    start = [p.detach().clone() for p in ema.parameters()]
    for _ in range(5):
        finetune.ema_update(ema, model, 0.9)
    for p, m, s in zip(ema.parameters(), model.parameters(), start):
        assert torch.allclose(p, m + 0.9**5 * (s - m), atol=1e-6)


def test_warm_start_difference_is_zero_and_the_check_fails_with_a_random_P_new():
    base = tiny_dit()
    model = deepcopy(base)
    model.expand_channels(12)
    z, y = torch.randn(4, 4, 4, 4), torch.arange(4)
    assert warm_start_difference(base, model, z, (y,)) == (0.0, 0.0)
    broken = deepcopy(model)
    torch.nn.init.normal_(broken.P_new.weight, std=0.02)
    assert warm_start_difference(base, broken, z, (y,))[0] > 1e-3
    torch.nn.init.normal_(model.O_new.weight, std=0.02)
    assert warm_start_difference(base, model, z, (y,))[1] > 1e-3


def test_gradients_reach_P_new_at_step_zero_and_O_new_as_soon_as_the_weight_is_positive():
    model = tiny_dit()
    model.expand_channels(12)
    z_all, y = torch.randn(4, 16, 4, 4), torch.arange(4)

    def gradients(w, cosine=0.0):
        model.zero_grad()
        flow_loss(model, z_all, (y,), 4, w, cosine)[0].backward()
        return model.P_new.weight.grad.abs().max(), model.O_new.weight.grad.abs().max()

    p_new, o_new = gradients(w=0.0)
    assert p_new > 0 and o_new == 0
    assert min(gradients(w=detail_weight(1, 1000))) > 0
    assert gradients(w=0.0, cosine=1.0)[1] > 0         # the unscheduled cosine term trains the details from step 0


def test_sigma_weighting_is_the_authors(monkeypatch):
    """sigma on SD3's grid shifted by 4 (ends at 0.01187), weight sigma^2 min((1 - sigma) / sigma, 5)."""
    t, weight = finetune.draw_time(200_000, "paper", torch.device("cpu"))
    assert (weight == 1).all() and torch.logit(t).std() == pytest.approx(1.0, abs=0.01)
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.tensor([-50.0, 0.0, 2.0, 50.0]))
    t, weight = finetune.draw_time(4, "sigma", torch.device("cpu"))
    sigma = 1 - t.double()
    assert sigma[0] == 1 and sigma[3] == pytest.approx(0.01187, abs=1e-5)
    assert sigma[1] == pytest.approx(4 * 0.501 / (1 + 3 * 0.501), abs=1e-3)
    assert (weight - sigma**2 * ((1 - sigma) / sigma).clamp(max=5)).abs().max() < 1e-6


def test_sigma_weighted_loss_is_the_error_of_the_denoised_latent():
    """Closed form: sum_c m_c sigma^2 |v - v*|^2 min((1-sigma)/sigma, 5) / (C + w D), against the authors' x_hat = x - sigma v."""
    z_all, v, w, C = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3), 0.3, 4
    seen = {}

    def model(x, t):
        seen.update(x=x, t=t)
        return v

    torch.manual_seed(1)
    loss, _, _ = flow_loss(model, z_all, (), C, w, cosine=0.0, weighting="sigma")
    sigma = (1 - seen["t"]).view(-1, 1, 1, 1)
    denoised = seen["x"] + sigma * v                                # v is data - noise here
    m = torch.tensor([1.0] * 4 + [w] * 2).view(1, -1, 1, 1)
    ref = ((denoised - z_all) ** 2 * m).sum((1, 2, 3)) / ((C + w * 2) * 9) * ((1 - sigma) / sigma).clamp(max=5).flatten()
    assert loss.item() == pytest.approx(ref.mean().item(), rel=1e-4)


# ---------------------------------------------------------------- the script


def test_a_run_logs_both_halves_proves_its_warm_start_and_holds_all_that_sampling_needs(tiny_run):
    rows = [json.loads(line) for line in open(Path(tiny_run) / "log.jsonl")]
    assert [r["step"] for r in rows] == [1, 2, 3] and all({"loss", "base", "detail", "w"} <= set(r) for r in rows)
    assert [r["w"] for r in rows] == [detail_weight(n, 4) for n in range(3)]
    summary = json.loads((Path(tiny_run) / "summary.json").read_text())
    assert summary["warm_start"] == 0.0
    assert all((Path(tiny_run) / f"{name}.png").exists() for name in ("warm_start", "samples", "samples_base_only", "loss"))
    assert (Path(tiny_run) / "vae" / "model.safetensors").exists()


def test_ema_and_model_are_saved_apart(tiny_run):
    folder = runs.latest_checkpoint(tiny_run)
    model, ema = (load_file(folder / f"{name}.safetensors") for name in ("model", "ema"))
    assert model.keys() == ema.keys() and any(not torch.equal(model[k], ema[k]) for k in model)


def test_a_run_carries_the_vae_that_it_was_trained_on(tiny_vae, tiny_run):
    vae, copy = load_davae(tiny_vae), load_davae(Path(tiny_run) / "vae")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(vae.encode(x), copy.encode(x))


def test_twenty_steps_equal_ten_and_resumed_ten_bit_for_bit(finetune_config, tmp_path):
    straight, halves = (finetune_config(tmp_path / name, steps=20) for name in ("straight", "halves"))
    finetune.main(straight)
    finetune.main(replace(halves, steps=10))
    finetune.main(halves)
    a, b = (runs.latest_checkpoint(cfg.out) for cfg in (straight, halves))
    for name in ("model", "ema"):
        x, y = (load_file(p / f"{name}.safetensors") for p in (a, b))
        assert all(torch.equal(x[k], y[k]) for k in x)
    opt = [torch.load(p / "train_state.pt", weights_only=True)["opt"]["state"] for p in (a, b)]
    assert all(torch.equal(opt[0][i]["exp_avg_sq"], opt[1][i]["exp_avg_sq"]) for i in opt[0])


def test_a_run_stopped_by_ctrl_c_or_killed_in_a_save_goes_on_bit_for_bit(
        finetune_config, tmp_path, launch, interrupt):
    straight, broken = (finetune_config(tmp_path / name, steps=400, save_every=1000) for name in ("a", "b"))
    step = interrupt(finetune.main, broken, signal.SIGINT)
    process = launch(finetune.main, replace(broken, steps=step + 1), """
def save(*args):
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save""")
    assert process.wait() == -signal.SIGKILL and runs.step_of(broken.out) == step
    for cfg in (straight, broken):
        finetune.main(replace(cfg, steps=step + 2))
    for name in ("model", "ema"):
        x, y = (load_file(runs.latest_checkpoint(cfg.out) / f"{name}.safetensors") for cfg in (straight, broken))
        assert all(torch.equal(x[k], y[k]) for k in x)


def test_a_run_cut_off_before_its_first_step_begins_again_and_proves_its_warm_start(
        finetune_config, tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "a", steps=1)
    with monkeypatch.context() as m:
        m.setattr(ranks, "heed_signals", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune.main(cfg)
    assert runs.step_of(cfg.out) == 0
    assert finetune.main(cfg)["warm_start"] == 0.0


def test_accumulated_micro_batches_make_one_optimizer_step(finetune_config, tmp_path):
    finetune.main(finetune_config(tmp_path / "a", micro_batch=2, steps=1))
    state = torch.load(runs.latest_checkpoint(tmp_path / "a") / "train_state.pt", weights_only=True)
    assert {s["step"].item() for s in state["opt"]["state"].values()} == {1.0}


def test_a_gpus_layout_of_the_autoencoder_trains_the_same_model(finetune_config, tiny_vae, tmp_path,
                                                                monkeypatch):
    """channels_last from encoding to the cache, the warm start's picture and the samples, here on a CPU."""
    losses = []
    for layout in (torch.contiguous_format, torch.channels_last):
        monkeypatch.setitem(davae.LAYOUT, "cpu", layout)
        vae = shutil.copytree(tiny_vae, tmp_path / str(layout), ignore=shutil.ignore_patterns("latents-*"))
        finetune.main(finetune_config(f"{vae}-run", vae=str(vae)))
        losses.append([json.loads(line)["loss"] for line in open(f"{vae}-run/log.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and list(vae.glob("latents-*"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, here g++")
def test_compiled_blocks_give_the_same_losses_and_the_same_names(tiny_vae, tiny_base, tmp_path):
    rows, names = [], []
    for compile in (False, True):
        cfg = Config(preset="tiny", out=str(tmp_path / str(compile)), vae=tiny_vae, base=tiny_base, compile=compile, D=12, steps=3,
                     image_size=64, images=64, flip=False, batch_size=8, micro_batch=8, lr=1e-3, N=4, log_every=1, sample_steps=2,
                     checkpointing=True)
        finetune.main(cfg)
        rows.append([json.loads(line)["loss"] for line in open(f"{cfg.out}/log.jsonl")])
        names.append(sorted(load_file(runs.latest_checkpoint(cfg.out) / "model.safetensors")))
    assert rows[1] == pytest.approx(rows[0], rel=1e-4) and names[0] == names[1]


def test_mistakes_about_channels_get_one_sentence(finetune_config, tiny_run, tmp_path):
    with pytest.raises(SystemExit, match="--D=96, but .* has 12 detail channels"):
        finetune.main(finetune_config(tmp_path / "a", D=96))
    with pytest.raises(SystemExit, match="takes 4 base and 12 detail channels; wanted a base model"):
        finetune.main(finetune_config(tmp_path / "b", base=tiny_run))
    with pytest.raises(SystemExit, match="no such file or folder"):
        finetune.main(finetune_config(tmp_path / "c", vae="nowhere"))


def test_latents_that_are_not_what_the_statistics_say_are_noticed(capsys):
    z_all = torch.randn(16, 12, 4, 4)
    finetune.check_statistics(z_all, 4, "run")
    assert "WARNING" not in capsys.readouterr().out
    z_all[:, 4:] *= 5
    finetune.check_statistics(z_all, 4, "run")
    assert "detail mean" in capsys.readouterr().out.split("WARNING")[0]


def test_presets_name_fields_and_their_own_folders():
    for name, values in PRESETS.items():
        assert Config(**{"preset": name, **values}).out == values["out"]
    assert len({v["out"] for v in PRESETS.values()}) == len(PRESETS)


# ---------------------------------------------------------------- SD3.5


def test_sd3_goes_from_captions_to_a_folder_that_diffusers_loads(sd3_folder, tmp_path):
    from diffusers import SD3Transformer2DModel
    folder, words = tmp_path / "photos", ["a fox", "snow", "an owl", ""]
    folder.mkdir()
    drawn = data.Procedural(64, 8, 0)
    for i in range(8):
        Image.fromarray(drawn.image(i)[0]).resize((32, 32)).save(folder / f"{i}.png")
        if words[i % 4]:
            (folder / f"{i}.txt").write_text(words[i % 4])
    train_vae.main(train_vae.Config(preset="tiny", out=str(tmp_path / "vae"), base=str(sd3_folder), data_dir=str(folder), D=4,
                                    image_size=32, perceptual="none", gan=0.0, stats=8, steps=2, batch_size=4, log_every=1))
    text.main_text(text.TextConfig(encoders=str(sd3_folder), out=str(tmp_path / "text"), data_dir=str(folder), t5_tokens=24))
    cfg = Config(preset="sd35m-1024", **{**PRESETS["sd35m-1024"], **dict(
        out=str(tmp_path / "run"), vae=str(tmp_path / "vae"), base=str(sd3_folder), text=str(tmp_path / "text"), t5_tokens=24,
        data_dir=str(folder), image_size=32, D=4, lora=4, N=2, steps=3, batch_size=4, micro_batch=2, log_every=1, save_every=2,
        sample_steps=2, lr=1e-2)})
    summary = finetune.main(cfg)
    assert summary["warm_start"] == 0.0
    step = runs.latest_checkpoint(cfg.out)
    assert sum(p.stat().st_size for p in step.glob("*.safetensors")) < (tmp_path / "run/frozen/model.safetensors").stat().st_size
    finetune.main(replace(cfg, steps=4))                                                          # resumes, adapters and all
    assert [json.loads(line)["step"] for line in open(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4]

    whole = replace(cfg, out=str(tmp_path / "whole"), lora=0, steps=1)
    finetune.main(whole)                                            # every weight trained: nothing is left in a frozen/
    saved, start = load_dit(runs.latest_checkpoint(whole.out), "model"), load_dit(sd3_folder)
    assert torch.equal(saved.pos_embed, start.pos_embed) and not (tmp_path / "whole" / "frozen").exists()
    moved = [not torch.equal(p, saved.get_parameter(name)) for name, p in start.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)

    drawn = sample.Config(run=cfg.out, prompts="a fox|two owls", text=str(sd3_folder), n=3, steps=2, height=32, width=48,
                          out=str(tmp_path / "images"), weights="model")
    assert Image.open(sample.main(drawn) / "000002.png").size == (48, 32)
    with pytest.raises(SystemExit, match="no embedding of 'two owls'"):
        sample.main(replace(drawn, text="", out=str(tmp_path / "other")))
    with pytest.raises(SystemExit, match="32x44 pixels: both must be multiples of 8"):
        sample.main(replace(drawn, width=44, out=str(tmp_path / "other2")))

    entry = evaluate.main(evaluate.Config(run=cfg.out, data_dir=str(folder), images=4, n=2, batch_size=2, steps=2, features="none"))
    assert entry["reconstruction"]["DA-VAE"]["images"] == 4 and not any(entry["generation"].values())
    with pytest.raises(SystemExit, match="wanted a class-conditional run"):
        evaluate.analyse("timebins", evaluate.Config(run=cfg.out, data_dir=str(folder), images=4))

    weights.main_export(weights.ExportConfig(run=cfg.out, out=str(tmp_path / "exported"), weights="model"))
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "exported" / "transformer").eval()
    ours = load_dit(runs.latest_checkpoint(cfg.out), "model")
    z_all, t = torch.randn(2, 8, 8, 8), torch.tensor([0.25, 0.5])
    context, pooled = text.TextCache(tmp_path / "text")(["a fox", ""])
    with torch.no_grad():
        v, ref = ours(z_all, t, context, pooled), -theirs(z_all, context, pooled, 1000 * (1 - t)).sample
        assert v[:, 4:].abs().max() > 1e-3 and ((v - ref).abs().max() / ref.abs().max()) < 5e-6
        base = load_dit(sd3_folder)(z_all[:, :4], t, context, pooled)
        assert (v[:, :4] - base).abs().max() > 1e-3                                               # it did learn
    assert load_davae(tmp_path / "exported" / "vae").D == 4
    assert (tmp_path / "exported/lora/adapter_config.json").exists()
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        weights.main_export(weights.ExportConfig(run=cfg.out, out=str(tmp_path / "exported")))
