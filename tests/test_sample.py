"""sample.py: the integrator against closed forms, guidance against the original code, images that depend on (seed, i)."""
import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from dit import DiTConfig, LightningDiT, LoRA, MMDiT, MMDiTConfig, add_lora
from finetune import flow_loss
from sample import guided_velocity, sample_flow, sample_labels, sample_noise, shift_time, time_grid
from support import text, weights
from support.metrics import import_torchvision
from support.weights import load_base_vae, load_dit


class Counting(torch.nn.Module):
    """v = y - x for class y < 5, -x for the null class 5; counts the images it sees."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x, t, y):
        self.rows.append(len(x))
        return torch.where(y == 5, 0.0, y.float()).view(-1, 1, 1, 1) - x


# ---------------------------------------------------------------- the integrator and its guidance


def test_euler_is_exact_on_a_velocity_that_does_not_depend_on_x():
    noise, data_ = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for ts in (time_grid(1), time_grid(7), time_grid(13, 0.3)):
        x = sample_flow(lambda x, t, y: data_ - noise, noise, ts, (torch.zeros(2).long(),))
        assert (x - data_).abs().max() < 1e-14


def test_euler_on_a_linear_field_equals_the_product_of_its_factors():
    noise, ts = torch.randn(2, 3, 4, 4, dtype=torch.float64), time_grid(9, 0.5)
    x = sample_flow(lambda x, t, y: -2 * x, noise, ts, (torch.zeros(2).long(),))
    factor = np.prod([1 - 2 * (b - a) for a, b in zip(ts, ts[1:])])
    assert torch.allclose(x, factor * noise, rtol=1e-13)


def test_shift_keeps_the_ends_and_one_changes_nothing():
    assert time_grid(10, 1.0) == pytest.approx(np.linspace(0, 1, 11), abs=1e-15)
    ts = time_grid(249, 0.3)                                       # LightningDiT's "250 steps"
    assert ts[0] == 0 and ts[-1] == 1 and all(a < b for a, b in zip(ts, ts[1:]))
    assert shift_time(0.5, 0.3) == pytest.approx(0.2308, abs=1e-4)
    assert sum(t < 0.2 for t in ts[:-1]) == 114                    # evaluations below 0.2, the authors' interval start
    assert shift_time(shift_time(0.37, 0.3), 1 / 0.3) == pytest.approx(0.37)


@pytest.mark.parametrize("scale,interval,guided", [(1.0, (0.0, 1.0), 0), (4.0, (0.0, 1.0), 249), (4.0, (0.2, 1.0), 135), (4.0, (2.0, 3.0), 0)])
def test_the_unconditional_pass_runs_only_where_guidance_is_on(scale, interval, guided):
    model = Counting()
    sample_flow(model, torch.zeros(3, 2, 1, 1), time_grid(249, 0.3), (torch.tensor([0, 1, 2]),), (torch.tensor([5, 5, 5]),), scale, interval)
    assert len(model.rows) == 249 and sum(model.rows) == 3 * (249 + guided)


def test_guidance_one_equals_the_conditional_model_and_is_never_computed_twice():
    model, noise, y = Counting(), torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3])
    one = sample_flow(model, noise, time_grid(5), (y,), scale=1.0)
    assert model.rows == [3] * 5
    x = noise
    for a, b in zip(time_grid(5), time_grid(5)[1:]):
        x = x + (b - a) * model(x, torch.full((3,), a, dtype=torch.float64), y)
    assert torch.equal(one, x)
    c = model(noise, torch.zeros(3), y)
    assert torch.allclose(guided_velocity(model, noise, torch.zeros(3), (y,), (torch.full_like(y, 5),), 1.0)[0], c, atol=1e-6)


def test_guidance_pushes_away_from_the_unconditional_velocity():
    y, null, x, t = torch.tensor([1, 2]), torch.tensor([5, 5]), torch.zeros(2, 3, 1, 1), torch.full((2,), 0.5)
    assert guided_velocity(Counting(), x, t, (y,), (null,), 3.0)[0].flatten().tolist() == [3.0] * 3 + [6.0] * 3
    three, c = guided_velocity(Counting(), x, t, (y,), (null,), 3.0, channels=1)
    assert c.flatten().tolist() == [1.0] * 3 + [2.0] * 3
    assert three.flatten().tolist() == [3.0, 1.0, 1.0, 6.0, 2.0, 2.0]


@torch.no_grad()
def test_three_channel_guidance_equals_the_original_code(golden):
    weights, t, config = golden("lightningdit_qknorm")
    model, n = load_dit(weights), len(t["in/x"]) // 2
    x, time, y = t["in/x"][:n], t["in/t_cfg"][:n], t["in/y"][:n]
    null = torch.full_like(y, config["num_classes"])
    v, _ = guided_velocity(model, x, time, (y,), (null,), config["cfg_scale"], channels=3)
    assert ((v - t["out/cfg_3channel"][:n]).abs().max() / t["out/cfg_3channel"].abs().max().clamp(min=1)) < 5e-6
    assert ((v - guided_velocity(model, x, time, (y,), (null,), config["cfg_scale"])[0]).abs().max()) > 0.1     # all channels differ


@torch.no_grad()
def test_guidance_interval_equals_the_original_code(golden):
    """Its batch is doubled and it only skips the sum, not the work: outside the interval the result is conditional."""
    weights, t, config = golden("lightningdit_qknorm")
    model, n = load_dit(weights), len(t["in/x"]) // 2
    x, y, now = t["in/x"][:n], t["in/y"][:n], t["in/t_cfg"][0].item()
    null, ts = torch.full_like(y, config["num_classes"]), [now, now + 1.0]       # one Euler step of length 1: x + v
    for start, name in ((now - 0.01, "cfg_interval_active"), (now + 0.01, "cfg_interval_cond_only")):
        v = sample_flow(model, x, ts, (y,), (null,), config["cfg_scale"], (start, 1.0), channels=3) - x
        assert (v - t[f"out/{name}"][:n]).abs().max() / t[f"out/{name}"].abs().max().clamp(min=1) < 5e-6, name


def test_euler_on_sd3s_grid_follows_the_recorded_trajectory(golden):
    """v = 0.7 x + 0.3 sigma in SD3's direction, 28 steps, recorded from diffusers' scheduler."""
    _, t, _ = golden("flow_match_euler")
    for steps in (4, 28, 30, 40, 50):
        assert np.abs(1 - t[f"out/sigmas_shift3_{steps}"].double().numpy() - time_grid(steps, 1 / 3, twice=True)).max() < 1e-6
    for steps in (28, 30):
        assert np.abs(1 - t[f"out/sigmas_shift3_custom_{steps}"].double().numpy() - time_grid(steps, 1 / 3)).max() < 1e-6
    ts = time_grid(28, 1 / 3, twice=True)
    for n in (1, 14, 28):
        x = sample_flow(lambda x, t: -(0.7 * x + 0.3 * (1 - t[0].float())), t["in/x0"], ts[:n + 1], ())
        assert (x - t[f"out/x_after_{n}"]).abs().max() < 1e-5


def test_noise_of_a_sample_depends_on_seed_and_index_only():
    alone = sample_noise(3, [7], (4, 2, 2))[0]
    assert torch.equal(sample_noise(3, range(10), (4, 2, 2))[7], alone)
    assert not torch.equal(sample_noise(4, [7], (4, 2, 2))[0], alone)
    assert sample_labels([0, 4, 5, 11], [2, 3, 5]).tolist() == [2, 3, 5, 5]


# ---------------------------------------------------------------- the script


def settings(run, out, **changes):
    return sample.Config(**{**dict(run=run, out=str(out), n=6, batch_size=4, steps=2), **changes})


def images(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("0*.png"))}


def test_samples_are_the_same_in_batches_of_one_three_and_six(tiny_run, tmp_path):
    sets = [images(sample.main(settings(tiny_run, tmp_path / str(b), batch_size=b))) for b in (1, 3, 6)]
    assert len(sets[0]) == 6
    for other in sets[1:]:
        assert max(np.abs(sets[0][k].astype(int) - other[k]).max() for k in sets[0]) <= 1     # rounding of one more matmul shape


def test_a_half_finished_folder_is_continued_and_the_npz_holds_every_image(tiny_run, tmp_path):
    out = sample.main(settings(tiny_run, tmp_path / "a"))
    whole = images(out)
    (out / "000002.png").unlink()
    (out / "000005.png").unlink()
    kept = (out / "000000.png").stat().st_mtime_ns
    sample.main(settings(tiny_run, tmp_path / "a"))
    assert (out / "000000.png").stat().st_mtime_ns == kept
    again = images(out)
    assert again.keys() == whole.keys() and all(np.abs(again[k].astype(int) - whole[k]).max() <= 1 for k in whole)
    array = np.load(out / "samples.npz")["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (6, 64, 64, 3) and np.array_equal(array[5], again["000005.png"])
    assert (out / "grid.png").exists() and (out / "base_preview.png").exists()


def test_a_folder_of_other_settings_is_refused(tiny_run, tmp_path):
    out = sample.main(settings(tiny_run, tmp_path / "a", n=1))
    with pytest.raises(SystemExit, match="other settings .steps 2 -> 3"):
        sample.main(settings(tiny_run, tmp_path / "a", n=1, steps=3))
    assert json.loads((out / "settings.json").read_text())["steps"] == 2


@pytest.mark.parametrize("changes,sentence", [(dict(n=0), "n=0"), (dict(steps=0), "steps=0"), (dict(cfg=float("nan")), "cfg=nan"),
                                              (dict(classes=(10, 99)), "class 99 asked for; the model has classes 0 to 9")])
def test_impossible_settings_get_one_sentence(tiny_run, tmp_path, changes, sentence):
    with pytest.raises(SystemExit, match=sentence):
        sample.main(settings(tiny_run, tmp_path / "a", **changes))


def test_a_vae_run_is_not_sampled_from(tiny_vae, tmp_path):
    with pytest.raises(SystemExit, match="holds a checkpoint of train_vae.py; wanted a run of finetune.py"):
        sample.main(settings(tiny_vae, tmp_path / "a"))


def test_the_unconditional_class_can_be_drawn(tiny_run, tmp_path):
    out = sample.main(settings(tiny_run, tmp_path / "a", n=2, classes=(10,)))
    assert len(images(out)) == 2 and json.loads((out / "settings.json").read_text())["classes"] == [10]


def test_the_decoder_sees_a_few_images_at_a_time(tiny_run):
    dit, vae, config = weights.load_run(tiny_run)
    settings = sample.settings_of(sample.Config(steps=2), config, "")
    parts = [sample.generate(dit, vae, range(k, k + 3), settings) for k in (0, 3, 6)]
    seen = []
    vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    together = sample.generate(dit, vae, range(9), settings)
    assert seen == [8, 1]
    assert all(torch.allclose(whole, torch.cat(three), atol=1e-5) for whole, three in zip(together, zip(*parts)))


# ---------------------------------------------------------------- SD3.5 against diffusers


@pytest.mark.parametrize("steps", [4, 28, 30, 50])
def test_sd3_time_grids_equal_diffusers_default_and_single_shift(steps):
    import_torchvision()
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    assert np.abs(1 - scheduler.sigmas.double().numpy() - time_grid(steps, 1 / 3, twice=True)).max() < 1e-6
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    assert np.abs(1 - scheduler.sigmas.double().numpy() - time_grid(steps, 1 / 3)).max() < 1e-6
    assert np.abs(np.subtract(time_grid(steps, 1 / 3), time_grid(steps, 1 / 3, twice=True))).max() > 1e-3


def test_skip_layer_guidance_runs_one_more_pass_in_early_steps_only():
    calls = []

    def model(x, t, y, skip=()):
        calls.append(skip)
        return x * 0 + (1.0 if skip else 3.0)

    x = sample_flow(model, torch.zeros(1, 1, 1, 1), time_grid(50), (torch.zeros(1),), slg=2.5)
    assert sum(bool(s) for s in calls) == 9 and len(calls) == 59                                  # steps 1 .. 9
    assert x.item() == pytest.approx(3.0 + 9 / 50 * 2.5 * 2.0, abs=1e-5)


PROMPTS = ["a red fox, asleep", "snow"]


@torch.no_grad()
def test_a_whole_pipeline_gives_the_same_image(sd3_folder):
    from diffusers import StableDiffusion3Pipeline
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    pipe.set_progress_bar_config(disable=True)
    noise = sample_noise(0, range(2), (4, 16, 24))
    theirs = pipe(PROMPTS, negative_prompt=["snow", ""], num_inference_steps=4, guidance_scale=3.5, height=32, width=48,
                  latents=noise, max_sequence_length=24, output_type="np").images
    encoders = text.load_text_encoders(sd3_folder, torch.device("cpu"))
    cond, uncond = (text.encode_text(encoders, p, 24) for p in (PROMPTS, ["snow", ""]))
    z = sample_flow(load_dit(sd3_folder), noise, time_grid(4, 1 / 3, twice=True), cond, uncond, 3.5)
    ours = (load_base_vae(sd3_folder).decode(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape == (2, 32, 48, 3) and theirs.std() > 0.05
    assert np.abs(ours - theirs).max() < 1e-4


# ---------------------------------------------------------------- speed


@pytest.mark.parametrize("weighting", ["paper", "sigma"])
def test_neither_a_sampler_nor_the_loss_ever_waits_for_the_device(weighting):
    """On the meta device there is nothing to read: an .item(), or an `if` on a tensor, would raise."""
    with torch.device("meta"):
        dit = LightningDiT(DiTConfig(C=4, D=4, grid=4, E=32, A=4, depth=2, num_classes=5))
        text = MMDiT(MMDiTConfig(C=4, D=4, E=32, A=2, depth=3, dual=1, context=12, pooled=8, pos_size=6))
        z_all, y, cond = torch.empty(2, 8, 4, 4), torch.zeros(2, dtype=torch.long), (torch.empty(2, 3, 12), torch.empty(2, 8))
    for model, c in ((dit, (y,)), (text, cond)):
        v = sample_flow(model, z_all, time_grid(4, 0.3), c, c, 4.0, (0.2, 1.0), ahead=6)
        loss, _, _ = flow_loss(model, z_all, c, 4, 0.5, weighting=weighting)
        loss.backward()
        assert v.shape == z_all.shape and all(p.grad is not None for n, p in model.named_parameters() if "text.mlp" not in n)
    assert sample_flow(text, z_all, time_grid(20), cond, cond, 4.0, slg=2.5, skip=(1,)).is_meta


def random_models(device="cpu"):
    """[(model, cond, uncond)]: a LightningDiT and an MMDiT whose adaLN layers are not zero, for latents (3, 8, 4, 4)."""
    torch.manual_seed(0)
    both = [LightningDiT(DiTConfig(C=4, D=4, grid=4, E=32, A=4, depth=2, num_classes=5)),
            MMDiT(MMDiTConfig(C=4, D=4, E=32, A=2, depth=3, dual=1, context=12, pooled=8, pos_size=6))]
    for p in (p for model in both for p in model.parameters()):
        p.data = 0.2 * torch.randn(p.shape)
    labels, texts = ((torch.tensor([0, 1, 2]),), (torch.tensor([5, 5, 5]),)), [(torch.randn(3, 7, 12), torch.randn(3, 8)) for _ in "cu"]
    return [(model.to(device), *(tuple(x.to(device) for x in part) for part in conds)) for model, conds in zip(both, (labels, texts))]


@pytest.mark.parametrize("rows,products", [(1, 9), (7, 8), (12, 4), (1000, 2)])
def test_modulations_computed_ahead_change_nothing_but_the_number_of_products(rows, products):
    """Steps before 0.2 take batches of 3, the others of 6: of the nine steps of this grid three and six."""
    ts, noise = time_grid(9, 0.6), torch.randn(3, 8, 4, 4)
    assert sum(t < 0.2 for t in ts[:-1]) == 3
    for model, cond, uncond in random_models():
        calls = []
        model.adaLN_final.register_forward_hook(lambda *_: calls.append(1))
        step_by_step = sample_flow(model, noise, ts, cond, uncond, 4.0, (0.2, 1.0))
        assert len(calls) == 9 and step_by_step.std() > 0.3
        ahead = sample_flow(model, noise, ts, cond, uncond, 4.0, (0.2, 1.0), ahead=rows)
        assert len(calls) == 9 + products and torch.allclose(ahead, step_by_step, atol=1e-4)


def test_weights_rounded_before_sampling_give_what_autocast_gives():
    ts, noise = time_grid(3), torch.randn(3, 8, 4, 4)
    for model, cond, uncond in random_models():
        with torch.autocast("cpu", torch.bfloat16):
            expected = sample_flow(model, noise, ts, cond, uncond, 4.0)
            bytes_before = sum(p.nbytes for p in model.parameters())
            assert torch.equal(sample_flow(sample.for_sampling(model), noise, ts, cond, uncond, 4.0), expected)
        assert sum(p.nbytes for p in model.parameters()) < 0.52 * bytes_before


def test_adapters_are_merged_for_sampling():
    model, cond, uncond = random_models()[1]
    add_lora(model, r=4, alpha=8.0)
    for m in model.modules():
        if isinstance(m, LoRA):
            torch.nn.init.normal_(m.B, std=0.1)
    noise = torch.randn(3, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        plain, merged = (sample_flow(m, noise, time_grid(3), cond, uncond, 2.0) for m in (model, sample.for_sampling(deepcopy(model))))
        without = sample_flow(random_models()[1][0], noise, time_grid(3), cond, uncond, 2.0)
    assert any(isinstance(m, LoRA) for m in model.modules())
    assert not any(isinstance(m, LoRA) for m in sample.for_sampling(model).modules()) and model.cfg.lora == 0
    assert (plain - merged).abs().max() < 0.05 * (plain - without).abs().max()


class Tape(TorchDispatchMode):
    """What torch.cuda.graph does, on a CPU: notes the operators that run; replay() runs them again on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.calls.append((f, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for f, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(f(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():         # else a view, or in place
                    old.copy_(new)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_recorded_loop_gives_the_same_latents_for_every_batch(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
        monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    ts, args = time_grid(9, 0.6), (4.0, (0.2, 1.0), None, 0.0, (), 256)
    for model, cond, uncond in random_models(device):
        sample.for_sampling(model)
        recorded, calls = sample.Recorded(), []
        model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            for seed in range(3):
                noise = sample_noise(seed, range(3), (8, 4, 4)).to(device)
                turned = [tuple(x.roll(seed, 0) for x in part) for part in (cond, uncond)]
                expected, before = sample_flow(model, noise, ts, *turned, *args), len(calls)
                assert torch.allclose(recorded(model, noise, ts, *turned, *args), expected, atol=1e-3)
                assert len(calls) == before + (18 if seed == 0 else 0)         # nine steps, and recording them
            few = [noise[:2], ts, *([x[:2] for x in part] for part in turned)]
            assert torch.equal(recorded(model, *few, *args), sample_flow(model, *few, *args))
            other = [model, noise, ts, *turned, 2.0, *args[1:]]
            assert torch.equal(recorded(*other), sample_flow(*other))


def test_a_graph_without_a_gpu_is_refused(tiny_run, tmp_path):
    with pytest.raises(SystemExit, match="wanted a GPU"):
        sample.main(sample.Config(run=str(tiny_run), out=str(tmp_path / "out"), graph=True, device="cpu"))
    assert not (tmp_path / "out").exists()
