"""finetune.py: the schedule, the flow loss, the warm start, exact resume, and the main job end to end."""
import itertools
import json
import math
import shutil
import signal
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dit
import evaluate
import finetune
import sample
import train_vae
from dit import MODELS, LightningDiTConfig, LightningDiT
from experiments import timebins
from finetune import PRESETS, Config, detail_weight, flow_loss, warm_start_difference
from support import data, ranks, runs, text, weights
from support.weights import load_davae, load_dit


def tiny_dit(D=0):
    torch.manual_seed(0)
    model = LightningDiT(LightningDiTConfig(C=4, D=D, p=1, grid=4, E=32, depth=2, A=2, num_classes=5))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)              # a fresh DiT computes 0, which would prove nothing
    return model


# ---------------------------------------------------------------- the method


def test_detail_weight_ramps_from_zero_through_half_to_one():
    N = 1000
    assert detail_weight(0, N) == 0
    assert detail_weight(N, N) == 1
    assert detail_weight(5 * N, N) == 1
    assert detail_weight(N // 2, N) == pytest.approx(0.5)
    values = [detail_weight(n, N) for n in range(N + 1)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert detail_weight(N // 3, N) == pytest.approx(math.sin(math.pi / 6 * (N // 3) / (N / 3)) ** 2)


def test_without_a_ramp_details_count_fully_from_the_first_step():
    assert [detail_weight(n, 0) for n in (0, 1, 100)] == [1, 1, 1]


def test_flow_loss_is_zero_at_the_true_velocity():
    z_all = torch.randn(4, 8, 2, 2)
    y = torch.zeros(4).long()

    def oracle(x, t, y):                               # v* = (z - x_t) / (1 - t)
        return (z_all - x) / (1 - t.view(-1, 1, 1, 1))

    loss, parts = flow_loss(oracle, z_all, (y,), 0.3, Config(D=4))
    assert max(loss.abs(), parts["base"], parts["detail"]) < 1e-5


class Loss:
    """flow_loss for a fixed prediction v of 4 base and 8 detail channels, and the target."""

    def __init__(self, w, cosine):
        torch.manual_seed(1)
        z_all = torch.randn(4, 12, 3, 3)
        self.v = torch.randn(4, 12, 3, 3)
        y = torch.zeros(4).long()
        torch.manual_seed(2)
        self.loss, parts = flow_loss(lambda x, t, y: self.v, z_all, (y,), w, Config(D=8, cosine=cosine))
        self.base, self.detail = parts["base"], parts["detail"]
        torch.manual_seed(2)
        torch.randn(4)                                 # the times
        self.target = z_all - torch.randn_like(z_all)
        self.squares = (self.v - self.target).square()


def test_at_weight_zero_the_squared_error_covers_only_the_base_channels():
    at_zero = Loss(w=0.0, cosine=0.0)
    assert torch.allclose(at_zero.loss, at_zero.squares[:, :4].mean())
    assert torch.equal(at_zero.loss, at_zero.base)


def test_at_weight_one_it_is_the_plain_mean_and_in_between_a_weighted_mean():
    at_one = Loss(w=1.0, cosine=0.0)
    assert torch.allclose(at_one.loss, at_one.squares.mean())
    between = Loss(w=0.25, cosine=0.0)
    m = torch.tensor([1.0] * 4 + [0.25] * 8).view(1, 12, 1, 1)
    weighted = (between.squares * m).mean() * 12 / m.sum()         # as in the authors' code
    assert torch.allclose(between.loss, weighted)
    assert torch.allclose(between.detail, between.squares[:, 4:].mean())


def test_the_cosine_term_covers_all_channels_at_any_weight():
    with_cosine = Loss(w=0.0, cosine=1.0)
    without = Loss(w=0.0, cosine=0.0)
    v, target = with_cosine.v, with_cosine.target
    cosine = 1 - (v * target).sum(1) / (v.norm(dim=1) * target.norm(dim=1))
    assert torch.allclose(with_cosine.loss - without.loss, cosine.mean(), atol=1e-6)


def test_ema_follows_the_closed_form():
    model = torch.nn.Linear(3, 2)
    ema = torch.nn.Linear(3, 2)
    start = [p.detach().clone() for p in ema.parameters()]
    for _ in range(5):
        finetune.ema_update(ema, model, 0.9)
    for p, m, s in zip(ema.parameters(), model.parameters(), start, strict=True):
        assert torch.allclose(p, m + 0.9**5 * (s - m), atol=1e-6)


def test_only_frozen_weights_that_autocast_would_round_are_kept_in_bfloat16():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model.table = torch.nn.Parameter(torch.randn(6, 4))            # as in Sana: in no matrix product
    model.requires_grad_(False)
    model[1].requires_grad_(True)
    ema = deepcopy(model)
    ranks.share_frozen(model, ema, rounded=True)
    assert model[0].weight.dtype == torch.bfloat16
    others = (model[0].bias, model[1].weight, model[2].weight, model.table)
    assert {p.dtype for p in others} == {torch.float32}
    assert ema[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert ema[1].weight.data_ptr() != model[1].weight.data_ptr()


def test_the_average_begins_as_a_copy_that_shares_what_is_frozen():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model[0].requires_grad_(False)
    ema = ranks.copy_but_frozen(model).requires_grad_(False)
    model, ema = model.double(), ema.double()
    assert model[0].weight.data_ptr() == ema[0].weight.data_ptr()
    trained, averages = ([p.data_ptr() for p in one[1:].parameters()] for one in (model, ema))
    assert not set(trained) & set(averages)
    assert all(map(torch.equal, model.state_dict().values(), ema.state_dict().values()))
    assert model[1].weight.requires_grad and not model[0].weight.requires_grad


def test_the_average_has_the_tables_and_running_statistics_of_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    ema = deepcopy(model).eval()
    ranks.share_frozen(model, ema, rounded=False)
    model(torch.randn(8, 4) + 5)
    finetune.ema_update(ema, model, 0.9)
    assert ema[1].running_mean.data_ptr() == model[1].running_mean.data_ptr()
    assert ema[1].running_mean.abs().min() > 0 and ema[1].weight.data_ptr() != model[1].weight.data_ptr()


def test_warm_start_difference_is_zero_unless_P_new_or_O_new_is_random():
    base = tiny_dit()
    model = deepcopy(base)
    model.expand_channels(12)
    z = torch.randn(4, 4, 4, 4)
    y = torch.arange(4)
    assert warm_start_difference(base, model, z, (y,)) == (0.0, 0.0)
    random_P_new = deepcopy(model)
    torch.nn.init.normal_(random_P_new.P_new.weight, std=0.02)
    of_base, _ = warm_start_difference(base, random_P_new, z, (y,))
    assert of_base > 1e-3
    random_O_new = deepcopy(model)
    torch.nn.init.normal_(random_O_new.O_new.weight, std=0.02)
    _, of_details = warm_start_difference(base, random_O_new, z, (y,))
    assert of_details > 1e-3


def test_gradients_reach_P_new_at_step_zero_and_O_new_once_the_weight_is_positive():
    model = tiny_dit()
    model.expand_channels(12)
    z_all = torch.randn(4, 16, 4, 4)
    y = torch.arange(4)

    def gradients(w, cosine=0.0):
        model.zero_grad()
        loss, _ = flow_loss(model, z_all, (y,), w, Config(D=12, cosine=cosine))
        loss.backward()
        return model.P_new.weight.grad.abs().max(), model.O_new.weight.grad.abs().max()

    p_new, o_new = gradients(w=0.0)
    assert p_new > 0 and o_new == 0
    assert min(gradients(w=detail_weight(1, 1000))) > 0
    _, o_new = gradients(w=0.0, cosine=1.0)
    assert o_new > 0                              # the unscheduled cosine term trains the details from step 0


def test_sigma_weighting_matches_the_authors(monkeypatch):
    """sigma on SD3's grid, shifted by 4 (ends at 0.01187); weight sigma^2 min((1 - sigma) / sigma, 5)."""
    t, weight = finetune.draw_time(200_000, "paper", torch.device("cpu"))
    assert (weight == 1).all()
    assert torch.logit(t).std() == pytest.approx(1.0, abs=0.01)
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.tensor([-50.0, 0.0, 2.0, 50.0]))
    t, weight = finetune.draw_time(4, "sigma", torch.device("cpu"))
    sigma = 1 - t.double()
    assert torch.equal(t, 1 - finetune.sd3_sigmas(torch.device("cpu"))[[0, 500, 880, 999]])
    assert sigma[0] == 1
    assert sigma[3] == pytest.approx(0.01187, abs=1e-5)
    assert sigma[1] == pytest.approx(4 * 0.501 / (1 + 3 * 0.501), abs=1e-3)
    assert (weight - sigma**2 * ((1 - sigma) / sigma).clamp(max=5)).abs().max() < 1e-6


def test_uniform_times_are_uniform_and_weigh_the_same():
    t, weight = finetune.draw_time(200_000, "uniform", torch.device("cpu"))
    assert (weight == 1).all() and 0 <= t.min() and t.max() < 1
    shares = torch.histc(t, 10, 0, 1) / len(t)
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.005)


def test_logged_errors_leave_out_the_weight_of_the_times():
    z_all = torch.randn(4, 6, 3, 3)

    def off_by_three(x, t):
        return (z_all - x) / (1 - t.view(-1, 1, 1, 1)) + 3

    _, parts = flow_loss(off_by_three, z_all, (), 0.3, Config(D=2, weighting="sigma"))
    assert (parts["base"].item(), parts["detail"].item()) == pytest.approx((9, 9), rel=1e-3)


def test_sigma_weighted_loss_is_the_error_of_the_denoised_latent():
    """sum_c m_c |x_hat - z|^2 min((1 - sigma) / sigma, 5) / (C + w D), the authors' x_hat = x - sigma v."""
    C, D, w = 4, 2, 0.3
    z_all = torch.randn(4, C + D, 3, 3)
    v = torch.randn(4, C + D, 3, 3)
    seen = {}

    def model(x, t):
        seen.update(x=x, t=t)
        return v

    torch.manual_seed(1)
    loss, _ = flow_loss(model, z_all, (), w, Config(D=D, cosine=0.0, weighting="sigma"))
    sigma = 1 - seen["t"]
    denoised = seen["x"] + sigma.view(-1, 1, 1, 1) * v              # plus, since v is data - noise here
    m = torch.tensor([1.0] * C + [w] * D).view(1, -1, 1, 1)
    squares = ((denoised - z_all) ** 2 * m).sum((1, 2, 3)) / ((C + w * D) * 9)     # per image
    ref = squares * ((1 - sigma) / sigma).clamp(max=5)
    assert loss.item() == pytest.approx(ref.mean().item(), rel=1e-4)


# ---------------------------------------------------------------- the script


def test_a_run_logs_both_losses_and_its_warm_start_and_saves_pictures_and_vae(tiny_run, read_log):
    rows = read_log(tiny_run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all({"loss", "base", "detail", "w"} <= set(row) for row in rows)
    assert [row["w"] for row in rows] == [detail_weight(n, 4) for n in range(3)]
    run = Path(tiny_run)
    assert json.loads((run / "summary.json").read_text())["warm_start"] == 0.0
    for name in ("warm_start", "samples", "samples_base_only", "loss"):
        assert (run / f"{name}.png").exists()
    assert (run / "vae" / "model.safetensors").exists()


def test_ema_and_model_are_saved_separately(tiny_run):
    folder = runs.latest_checkpoint(tiny_run)
    model = load_file(folder / "model.safetensors")
    ema = load_file(folder / "ema.safetensors")
    assert model.keys() == ema.keys()
    assert any(not torch.equal(model[key], ema[key]) for key in model)


def test_a_run_keeps_a_copy_of_the_vae_it_was_trained_on(tiny_vae, tiny_run):
    vae = load_davae(tiny_vae)
    copy = load_davae(Path(tiny_run) / "vae")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(vae.encode(x), copy.encode(x))


def optimizer_state(cfg):
    """{parameter's index: its tensors} of the optimizer in a run's newest checkpoint."""
    state = torch.load(runs.latest_checkpoint(cfg.out) / "train_state.pt", weights_only=True)
    return state["opt"]["state"]


def test_ten_steps_and_ten_resumed_equal_twenty_bit_for_bit(finetune_config, same_weights, tmp_path):
    straight = finetune_config(tmp_path / "straight", steps=20)
    halves = replace(straight, out=str(tmp_path / "halves"))
    finetune.main(straight)
    finetune.main(replace(halves, steps=10))
    finetune.main(halves)
    assert same_weights(straight, halves, names=("model", "ema"))
    resumed = optimizer_state(halves)
    for i, state in optimizer_state(straight).items():
        assert torch.equal(state["exp_avg_sq"], resumed[i]["exp_avg_sq"])


KILLED_IN_A_SAVE = """
def save(*args):
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""


def test_a_run_stopped_by_ctrl_c_or_killed_in_a_save_resumes_bit_for_bit(
        finetune_config, same_weights, tmp_path, launch, interrupt):
    straight = finetune_config(tmp_path / "a", steps=400, save_every=1000)
    broken = replace(straight, out=str(tmp_path / "b"))
    step = interrupt(finetune.main, broken, signal.SIGINT)
    assert not Path(broken.out, f"samples_{step:06d}.png").exists()        # only seconds may be left
    process = launch(finetune.main, replace(broken, steps=step + 1), KILLED_IN_A_SAVE)
    assert process.wait() == -signal.SIGKILL
    assert runs.step_of(broken.out) == step
    for cfg in (straight, broken):
        finetune.main(replace(cfg, steps=step + 2))
    assert same_weights(straight, broken, names=("model", "ema"))


def test_a_run_cut_off_before_its_first_step_starts_over_and_checks_its_warm_start(
        finetune_config, tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "a", steps=1)
    with monkeypatch.context() as cut_off:
        cut_off.setattr(ranks, "heed_signals", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune.main(cfg)
    assert runs.step_of(cfg.out) == 0
    assert finetune.main(cfg)["warm_start"] == 0.0


def test_accumulated_micro_batches_make_one_optimizer_step(finetune_config, tmp_path):
    cfg = finetune_config(tmp_path / "a", micro_batch=2, steps=1)
    finetune.main(cfg)
    assert {state["step"].item() for state in optimizer_state(cfg).values()} == {1.0}


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(
        finetune_config, tmp_path, monkeypatch, read_log):
    def loss_without_noise(model, z_all, cond, w, cfg):
        loss = (model(0.5 * z_all, torch.full((len(z_all),), 0.5), *cond) - z_all).square().mean()
        return loss, {"loss": loss, "base": loss, "detail": loss}

    monkeypatch.setattr(finetune, "flow_loss", loss_without_noise)
    monkeypatch.setattr(finetune, "report", lambda *args: None)
    monkeypatch.setattr(finetune, "draw_samples", lambda *args: None)
    norms = []
    for micro_batch in (8, 2):
        cfg = finetune_config(
            tmp_path / f"{micro_batch}", steps=1, label_dropout=0.0, micro_batch=micro_batch)
        finetune.main(cfg)
        norms.append(read_log(cfg.out)[0]["gnorm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.fixture
def watched(finetune_config, tmp_path, monkeypatch):
    """watched(name, **changes) -> what a run passes to its loss (labels), to AdamW and to `generate`."""
    flow_loss = finetune.flow_loss
    monkeypatch.setattr(finetune, "report", lambda *args: None)     # it takes longer than everything else

    def run(name, **changes):
        cfg = finetune_config(tmp_path / name, **changes)
        seen = SimpleNamespace(cfg=cfg, labels=[], seeds=[], norms=[], settings=[], drawn=[])

        def loss(model, z_all, cond, *args):
            seen.labels += cond[0].tolist()
            seen.seeds.append(torch.initial_seed())
            return flow_loss(model, z_all, cond, *args)

        def before_update(opt, *args):
            [group] = opt.param_groups
            seen.settings.append({name: value for name, value in group.items() if name != "params"})
            seen.norms.append(torch.nn.utils.get_total_norm([p.grad for p in group["params"]]).item())

        def draw(model, *args):
            seen.drawn.append(deepcopy(model.state_dict()))
            raise RuntimeError("the picture is of no interest")

        monkeypatch.setattr(finetune, "flow_loss", loss)
        monkeypatch.setattr(finetune, "generate", draw)
        hook = register_optimizer_step_pre_hook(before_update)
        try:
            finetune.main(cfg)
        finally:
            hook.remove()
        return seen

    return run


def test_label_dropout_and_gradient_clipping_follow_the_flags(watched):
    null = 10
    some = watched("some", steps=1, label_dropout=1.0, clip=1e-3)
    assert set(some.labels) == {null} and some.norms == [pytest.approx(1e-3, rel=1e-2)]
    none = watched("none", steps=1, label_dropout=0.0, clip=0.0)
    assert max(none.labels) < null and min(none.norms) > 1e-2


def test_adamw_follows_the_flags_without_weight_decay_and_the_ema_draws_the_pictures(watched):
    seen = watched("run", steps=2, warmup=2, ema=0.5, beta1=0.8, beta2=0.7)
    assert [group["weight_decay"] for group in seen.settings] == [0, 0]
    assert [group["betas"] for group in seen.settings] == [(0.8, 0.7)] * 2
    assert [group["lr"] for group in seen.settings] == pytest.approx([seen.cfg.lr / 2, seen.cfg.lr])
    checkpoint = runs.latest_checkpoint(seen.cfg.out)
    ema, model = (load_file(checkpoint / f"{name}.safetensors") for name in ("ema", "model"))
    assert not all(torch.equal(ema[name], model[name]) for name in ema)
    assert seen.drawn
    for drawn in seen.drawn:
        assert all(torch.equal(drawn[name], ema[name]) for name in ema)


def test_every_micro_batch_has_its_own_seed_and_the_average_follows_the_step_just_taken(watched):
    seen = watched("run", steps=2, micro_batch=4, ema=0.0)
    assert len(set(seen.seeds)) == 4                               # two micro-batches in each of two steps
    checkpoint = runs.latest_checkpoint(seen.cfg.out)
    ema, model = (load_file(checkpoint / f"{name}.safetensors") for name in ("ema", "model"))
    assert all(torch.equal(ema[name], model[name]) for name in ema)


def test_a_model_from_scratch_depends_on_the_runs_seed_alone():
    starts = []
    for before, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(before)
        cfg = Config(D=0, E=32, depth=1, A=2, image_size=16, seed=seed)
        starts.append(finetune.initial_dit(cfg, SimpleNamespace(C=4, f=4), classes=5)[1].P.weight)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_a_run_starts_from_the_requested_weights_of_its_base(make_dit, tmp_path):
    saved = {"ema": make_dit(), "model": make_dit(seed=1)}
    about = {"script": "finetune.py", "model": {"kind": "LightningDiT"} | asdict(saved["ema"].cfg)}
    weights = {name: model.state_dict() for name, model in saved.items()}
    runs.save_folder(tmp_path / "base" / "step_000001", weights, about)
    for asked, name in (("", "ema"), ("ema", "ema"), ("model", "model")):
        cfg = Config(base=str(tmp_path / "base"), base_weights=asked, D=12, image_size=16)
        for start in finetune.initial_dit(cfg, SimpleNamespace(C=4, f=4), classes=5):
            assert all(torch.equal(value, start.get_parameter(k)) for k, value in weights[name].items())


@pytest.mark.parametrize("zero_init", [True, False])
def test_the_new_layers_start_at_zero_unless_zero_init_is_off(make_dit, zero_init):
    cfg = Config(base="base", D=12, image_size=16, zero_init=zero_init)
    base, model = finetune.initial_dit(cfg, SimpleNamespace(C=4, f=4), 5, known={"base": make_dit()})
    assert base.P_new is None and torch.equal(base.P.weight, model.P.weight)
    assert [layer.weight.any().item() for layer in (model.P_new, model.O_new)] == [not zero_init] * 2


def test_adapters_are_unscaled_at_any_rank():
    sizes = dit.MMDiTConfig(C=4, E=24, A=2, depth=2, dual=1, context=12, pooled=6, pos_size=8)
    for rank in (2, 8):
        cfg = Config(base="base", text="text", D=4, image_size=16, lora=rank)
        known = {"base": dit.MMDiT(sizes)}
        _, model = finetune.initial_dit(cfg, SimpleNamespace(C=4, f=2), 0, known)
        assert (model.cfg.lora, model.cfg.alpha) == (rank, rank)
        assert {layer.scale for layer in model.modules() if isinstance(layer, dit.LoRA)} == {1.0}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, here g++")
def test_compiled_blocks_give_the_same_losses_and_tensor_names(finetune_config, tmp_path, read_log):
    def train(compile):
        cfg = finetune_config(tmp_path / str(compile), compile=compile, checkpointing=True)
        finetune.main(cfg)
        names = load_file(runs.latest_checkpoint(cfg.out) / "model.safetensors").keys()
        return [row["loss"] for row in read_log(cfg.out)], names

    losses, names = train(compile=False)
    compiled_losses, compiled_names = train(compile=True)
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    assert compiled_names == names


def test_mismatched_channels_or_a_missing_vae_are_refused(finetune_config, tiny_run, tmp_path):
    with pytest.raises(SystemExit, match="--D=96, but .* has 12 detail channels"):
        finetune.main(finetune_config(tmp_path / "a", D=96))
    with pytest.raises(SystemExit, match="takes 4 base and 12 detail channels; wanted a base model"):
        finetune.main(finetune_config(tmp_path / "b", base=tiny_run))
    with pytest.raises(SystemExit, match="no such file or folder"):
        finetune.main(finetune_config(tmp_path / "c", vae="nowhere"))


def test_latents_that_do_not_match_the_statistics_cause_a_warning(capsys):
    z_all = torch.randn(16, 12, 4, 4)
    finetune.check_statistics(z_all, 4, "run")
    assert "WARNING" not in capsys.readouterr().out
    z_all[:, 4:] *= 5
    finetune.check_statistics(z_all, 4, "run")
    base, detail, warning = capsys.readouterr().out.splitlines()
    assert "base mean" in base and "detail mean" in detail and warning.startswith("WARNING")


def test_presets_set_existing_fields_and_distinct_folders():
    for name, values in PRESETS.items():
        assert Config(**{"preset": name, **values}).out == values["out"]
    assert len({v["out"] for v in PRESETS.values()}) == len(PRESETS)


# ---------------------------------------------------------------- SD3.5


@pytest.fixture
def photos(tmp_path):
    """A folder of eight 32-pixel images, six of them with a caption."""
    folder = tmp_path / "photos"
    folder.mkdir()
    drawn = data.Procedural(64, 8, 0)
    captions = 2 * ["a fox", "snow", "an owl", ""]
    for i, caption in enumerate(captions):
        pixels, _ = drawn.image(i)
        Image.fromarray(pixels).resize((32, 32)).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(caption)
    return str(folder)


def test_sd3_goes_from_captions_to_a_diffusers_folder(sd3_folder, photos, tmp_path, read_log):
    small = dict(data_dir=photos, image_size=32, batch_size=4, log_every=1)
    vae = train_vae.Config(
        preset="tiny", out=str(tmp_path / "vae"), base=str(sd3_folder), D=4, perceptual="none", gan=0.0,
        stats=8, steps=2, **small)
    train_vae.main(vae)
    captions = text.TextConfig(
        encoders=str(sd3_folder), out=str(tmp_path / "text"), data_dir=photos, t5_tokens=24)
    text.main_text(captions)
    values = PRESETS["sd35m-1024"] | small | dict(
        out=str(tmp_path / "run"), vae=vae.out, base=str(sd3_folder), text=captions.out, t5_tokens=24,
        D=4, lora=4, N=2, steps=3, micro_batch=2, save_every=2, sample_steps=2, lr=1e-2)
    cfg = Config(preset="sd35m-1024", **values)
    assert finetune.main(cfg)["warm_start"] == 0.0
    trained = sum(file.stat().st_size for file in runs.latest_checkpoint(cfg.out).glob("*.safetensors"))
    assert trained < (tmp_path / "run" / "frozen" / "model.safetensors").stat().st_size
    finetune.main(replace(cfg, steps=4))                           # resumes, adapters and all
    assert [row["step"] for row in read_log(cfg.out)] == [1, 2, 3, 4]

    check_that_the_run_keeps_the_text_of_its_pictures(cfg, captions.out)
    check_training_of_every_weight(replace(cfg, out=str(tmp_path / "whole"), lora=0, steps=1))
    check_sampling(cfg, tmp_path)
    check_evaluation(cfg)
    check_export(cfg, tmp_path / "exported")


def check_that_the_run_keeps_the_text_of_its_pictures(cfg, folder):
    gone = Path(folder).rename(f"{folder}, gone")
    out = sample.main(sample.Config(run=cfg.out, n=3, steps=1))
    assert set(text.TextCache(Path(cfg.out) / "captions").rows) == {"", "a fox", "snow", "an owl"}
    assert len(list(out.glob("images/*"))) == 3
    gone.rename(folder)


def check_training_of_every_weight(cfg):
    finetune.main(cfg)
    saved = load_dit(runs.latest_checkpoint(cfg.out), "model")
    start = load_dit(cfg.base)
    assert torch.equal(saved.pos_embed, start.pos_embed)
    assert not (Path(cfg.out) / "frozen").exists()                 # no weights are frozen
    moved = [not torch.equal(p, saved.get_parameter(name)) for name, p in start.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)


def check_sampling(cfg, folder):
    drawn = sample.Config(
        run=cfg.out, prompts="a fox|two owls", text=cfg.base, n=3, steps=2, height=32, width=48,
        out=str(folder / "images"), weights="model")
    assert Image.open(sample.main(drawn) / "images/000002.png").size == (48, 32)
    with pytest.raises(SystemExit, match="no embedding of 'two owls'"):
        sample.main(replace(drawn, text="", out=str(folder / "other")))
    with pytest.raises(SystemExit, match="32x44 pixels: both must be multiples of 8"):
        sample.main(replace(drawn, width=44, out=str(folder / "other2")))


def check_evaluation(cfg):
    entry = evaluate.main(evaluate.Config(
        run=cfg.out, data_dir=cfg.data_dir, images=4, n=2, batch_size=2, steps=2, features="none"))
    assert entry["reconstruction"]["DA-VAE"]["images"] == 4
    assert not any(entry["generation"].values())
    with pytest.raises(SystemExit, match="wanted a class-conditional run"):
        timebins.main(timebins.Config(run=cfg.out, data_dir=cfg.data_dir, images=4))


def check_export(cfg, exported):
    from diffusers import SD3Transformer2DModel
    weights.main_export(weights.ExportConfig(run=cfg.out, out=str(exported), weights="model"))
    theirs = SD3Transformer2DModel.from_pretrained(exported / "transformer").eval()
    ours = load_dit(runs.latest_checkpoint(cfg.out), "model")
    z_all = torch.randn(2, 8, 8, 8)
    t = torch.tensor([0.25, 0.5])
    context, pooled = text.TextCache(cfg.text)(["a fox", ""])
    with torch.no_grad():
        v = ours(z_all, t, context, pooled)
        ref = -theirs(z_all, context, pooled, 1000 * (1 - t)).sample
        base = load_dit(cfg.base)(z_all[:, :4], t, context, pooled)
    assert v[:, 4:].abs().max() > 1e-3
    assert (v - ref).abs().max() / ref.abs().max() < 5e-6
    assert (v[:, :4] - base).abs().max() > 1e-3                    # it has learned something
    assert load_davae(exported / "vae").D == 4
    assert (exported / "lora" / "adapter_config.json").exists()
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        weights.main_export(weights.ExportConfig(run=cfg.out, out=str(exported)))


def test_pictures_are_drawn_after_the_checkpoint_is_written(finetune_config, tmp_path, monkeypatch):
    def crash(*args, **kwargs):
        raise KeyError("no fault of memory, disk or matplotlib")

    monkeypatch.setattr(finetune, "generate", crash)
    cfg = finetune_config(tmp_path / "run")
    with pytest.raises(KeyError):
        finetune.main(cfg)
    assert runs.step_of(cfg.out) == 3


@pytest.mark.parametrize("classes, drawn", [([], {0}), (["cat", "dog"], {0, 1})])
def test_pictures_show_only_the_classes_of_the_images_however_many_the_base_has(
        classes, drawn, tmp_path, monkeypatch):
    def generate(ema, vae, indices, settings, text):
        labels.update(sample.sample_labels(indices, settings["classes"]).tolist())
        return torch.zeros(len(indices), 3, 8, 8), torch.zeros(len(indices), 3, 4, 4)

    labels = set()
    monkeypatch.setattr(finetune, "generate", generate)
    cfg = Config(out=str(tmp_path), image_size=16)
    about = {"config": asdict(cfg), "classes": classes, "model": {"C": 4, "D": 12, "num_classes": 1000}}
    ema = SimpleNamespace(cfg=SimpleNamespace(num_classes=1000))
    finetune.draw_samples(SimpleNamespace(cfg=cfg, rank=0), 1, ema, None, about, None)
    assert labels == drawn and (tmp_path / "samples.png").exists()


def test_a_failed_picture_costs_no_checkpoint(finetune_config, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory for a picture")

    monkeypatch.setattr(finetune, "generate", fail)
    monkeypatch.setattr(finetune, "sample_flow", fail)
    cfg = finetune_config(tmp_path / "run")
    assert finetune.main(cfg)["warm_start"] == 0.0
    assert runs.step_of(cfg.out) == 3
    err = capsys.readouterr().err
    assert "warm_start.png not drawn: no memory for a picture; nothing else is lost" in err
    assert "samples not drawn" in err


def test_pictures_and_the_warm_start_check_use_at_most_micro_batch_rows(
        finetune_config, tmp_path, monkeypatch):
    rows = []
    forward = finetune.MODELS["LightningDiT"][1].forward

    def watched(self, z_all, *args, **kwargs):
        rows.append(len(z_all))
        return forward(self, z_all, *args, **kwargs)

    monkeypatch.setattr(finetune.MODELS["LightningDiT"][1], "forward", watched)
    finetune.main(finetune_config(tmp_path / "run", batch_size=8, micro_batch=4, steps=1))
    assert max(rows) == 4


def test_a_run_shorter_than_log_every_logs_its_last_step_and_prints_its_table(
        finetune_config, tmp_path, read_log, capsys):
    cfg = finetune_config(tmp_path / "run", steps=2, log_every=100)
    assert "detail" in finetune.main(cfg)
    assert [row["step"] for row in read_log(cfg.out)] == [2]
    assert "DA-VAE DiT" in capsys.readouterr().out


@pytest.mark.parametrize("changes,sentence", [
    (dict(image_size=100), "--image_size=100: .* give --image_size=96"),
    (dict(image_size=32), "--image_size=32: .* takes 4x4 tokens of 2x2 latent .* give --image_size=64"),
    (dict(D=28), "--D=28, but .* has 12 detail channels; give that, or 0"),
    (dict(base="", model="Lightning"), "--model='Lightning': wanted LightningDiT or MMDiT"),
    (dict(base="", model="MMDiT"), "--model=MMDiT is conditioned on text; give it with --text="),
    (dict(base="", lora=4), "--lora=4 is for a pretrained model, and there is none: give --base="),
    (dict(base="", zero_init=False), "--zero_init=False is for a pretrained model, and there is none"),
    (dict(lora=4), "a LightningDiT takes neither text nor adapters; leave"),
])
def test_sizes_and_flags_that_do_not_fit_are_refused_before_encoding(
        finetune_config, tmp_path, changes, sentence, monkeypatch):
    monkeypatch.setattr(finetune, "latent_source", lambda *args: pytest.fail("latents were asked for"))
    with pytest.raises(SystemExit, match=sentence):
        finetune.main(finetune_config(tmp_path / "run", **changes))


def test_the_cosines_gradient_does_not_explode_at_zero_velocity():
    """A DiT from scratch starts at v = 0, where 1 - cos(v, v*) has the gradient -v* / (|v*| eps)."""
    class Zero(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.v = torch.nn.Parameter(torch.zeros(4, 8, 4, 4))

        def forward(self, x, t, y):
            return self.v

    norms = []
    for cosine in (0.0, 1.0):
        model = Zero()
        torch.manual_seed(0)
        cfg = finetune.Config(D=0, cosine=cosine)
        loss, _ = finetune.flow_loss(model, torch.randn(4, 8, 4, 4), (torch.zeros(4),), 1.0, cfg)
        loss.backward()
        norms.append(model.v.grad.norm().item())
    assert norms[1] < 30 * norms[0]                # with an eps of 1e-8, a hundred million times


def test_a_custom_transformer_trains_widens_and_samples(finetune_config, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "Linear", (LinearConfig, Linear))
    base = finetune_config(tmp_path / "base", model="Linear", base="", D=0, N=0)
    wide = finetune_config(tmp_path / "wide", base=base.out)
    finetune.main(base)
    assert finetune.main(wide)["warm_start"] == 0.0
    assert sample.main(sample.Config(run=wide.out, n=2, steps=2, batch_size=2)).exists()
    assert runs.read_config(runs.latest_checkpoint(wide.out))["model"]["kind"] == "Linear"


@dataclass
class LinearConfig:
    C: int
    D: int = 0
    p: int = 1
    E: int = 32
    num_classes: int = 10


class Linear(torch.nn.Module):
    """The smallest transformer: P and O, with time and class between them; no adaLN, one block."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.P = torch.nn.Conv2d(cfg.C, cfg.E, cfg.p, stride=cfg.p)
        self.label = torch.nn.Embedding(cfg.num_classes + 1, cfg.E)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(cfg.E, cfg.E)])
        self.O = torch.nn.Linear(cfg.E, cfg.p**2 * cfg.C)
        self.P_new, self.O_new = dit.widen(self.P, self.O, cfg.D) if cfg.D else (None, None)

    def expand_channels(self, D):
        self.P_new, self.O_new = dit.widen(self.P, self.O, D)
        self.cfg = replace(self.cfg, D=D)

    def forward(self, z_all, t, y):
        z, z_d = z_all[:, :self.cfg.C], z_all[:, self.cfg.C:]
        x = self.P(z) if self.P_new is None else self.P(z) + self.P_new(z_d)
        x = x.flatten(2).transpose(1, 2) + self.label(y)[:, None] * t[:, None, None].float()
        x = torch.relu(self.blocks[0](x))
        heads = [self.O] if self.O_new is None else [self.O, self.O_new]
        return torch.cat([dit.unpatchify(O(x), self.cfg.p, *z_all.shape[2:]) for O in heads], dim=1)


def test_dropout_of_your_own_model_is_off_in_the_warm_start_check_and_on_in_training(
        finetune_config, tmp_path, monkeypatch):
    widened, rates = finetune.initial_dit, []

    def with_dropout(*args):
        models = widened(*args)
        for model in models:
            model.blocks[0].register_forward_hook(
                lambda block, _, x: rates.append(block.training) or F.dropout(x, 0.5, block.training))
        return models

    monkeypatch.setattr(finetune, "initial_dit", with_dropout)
    assert finetune.main(finetune_config(tmp_path / "run", steps=1))["warm_start"] == 0.0
    assert set(rates) == {False, True}


@pytest.mark.parametrize("part", ["P_new", "O_new"])
def test_a_warm_start_that_is_nan_or_differs_from_the_base_is_refused(
        finetune_config, tmp_path, monkeypatch, part):
    widened = finetune.initial_dit
    value = {"P_new": float("nan"), "O_new": 0.1}[part]

    def spoilt(*args):
        base, model = widened(*args)
        torch.nn.init.constant_(getattr(model, part).weight, value)
        return base, model

    monkeypatch.setattr(finetune, "initial_dit", spoilt)
    with pytest.raises(SystemExit, match="the widened model differs from the base model"):
        finetune.main(finetune_config(tmp_path / "run"))


@pytest.mark.parametrize("first", [(0.1, 0.0), (0.0, 0.1), (math.nan, 0.0)])
def test_a_difference_in_any_micro_batch_of_the_warm_start_check_is_refused(first, monkeypatch):
    found = iter([first, (0.0, 0.0)])
    monkeypatch.setattr(finetune, "warm_start_difference", lambda *args: next(found))
    run = SimpleNamespace(cfg=Config(micro_batch=2, out="run"), rank=0)
    model, vae = torch.nn.Module(), SimpleNamespace(C=4)
    z, y = torch.zeros(4, 4, 2, 2), torch.zeros(4)
    with pytest.raises(SystemExit, match="the widened model differs from the base model"):
        finetune.prove_warm_start(None, model, vae, z, y, lambda y, drop: (), run)


def test_the_warm_start_picture_shows_both_models_from_the_same_noise_and_labels(
        make_dit, make_davae, monkeypatch):
    base, model = make_dit(), make_dit()
    model.expand_channels(12)
    drawn = []

    def condition(y, drop):
        return torch.full_like(y, 5) if drop else y,

    monkeypatch.setattr(finetune.figures, "save_grid", lambda x, *args: drawn.append(x))
    cfg = Config(D=12, micro_batch=4, sample_steps=2, cfg=2.0, dtype="float32")
    finetune.draw_warm_start(base, model, make_davae(), torch.zeros(3, 4, 4, 4), torch.arange(3), condition,
                             SimpleNamespace(rank=0, cfg=cfg))
    x, = drawn
    assert torch.equal(x[:3], x[3:]) and x.std() > 0.1
