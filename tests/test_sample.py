"""sample.py: the integrator against closed forms, guidance against the original code, the images."""
import errno
import itertools
import json
import math
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import finetune
import sample
from dit import LightningDiTConfig, LightningDiT, LoRA, MMDiT, MMDiTConfig, add_lora
from finetune import flow_loss
from sample import guided_velocity, sample_flow, sample_labels, sample_noise, shift_time, time_grid
from support import config, image_folder, levels, ranks, text, weights
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
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    y = torch.zeros(2).long()
    for ts in (time_grid(1), time_grid(7), time_grid(13, 0.3)):
        x = sample_flow(lambda x, t, y: z - noise, noise, ts, (y,))
        assert (x - z).abs().max() < 1e-14


def test_euler_on_a_linear_field_equals_the_product_of_its_factors():
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    ts = time_grid(9, 0.5)
    x = sample_flow(lambda x, t, y: -2 * x, noise, ts, (torch.zeros(2).long(),))
    factor = math.prod(1 - 2 * (b - a) for a, b in itertools.pairwise(ts))
    assert torch.allclose(x, factor * noise, rtol=1e-13)


def test_a_shift_keeps_the_ends_and_1_is_the_identity():
    assert time_grid(10, 1.0) == pytest.approx(np.linspace(0, 1, 11), abs=1e-15)
    ts = time_grid(249, 0.3)                                       # LightningDiT's "250 steps"
    assert ts[0] == 0 and ts[-1] == 1
    assert all(a < b for a, b in itertools.pairwise(ts))
    assert shift_time(0.5, 0.3) == pytest.approx(0.2308, abs=1e-4)
    assert sum(t < 0.2 for t in ts[:-1]) == 114           # evaluations below 0.2, the authors' interval start
    assert shift_time(shift_time(0.37, 0.3), 1 / 0.3) == pytest.approx(0.37)


@pytest.mark.parametrize("scale,interval,guided", [
    (1.0, (0.0, 1.0), 0), (4.0, (0.0, 1.0), 249), (4.0, (0.2, 1.0), 135), (4.0, (2.0, 3.0), 0)])
def test_the_unconditional_pass_runs_only_where_guidance_is_on(scale, interval, guided):
    model = Counting()
    y = torch.tensor([0, 1, 2])
    null = torch.tensor([5, 5, 5])
    sample_flow(model, torch.zeros(3, 2, 1, 1), time_grid(249, 0.3), (y,), (null,), scale, interval)
    assert len(model.rows) == 249
    assert sum(model.rows) == 3 * (249 + guided)


def test_guidance_is_on_at_both_ends_of_its_interval():
    model = Counting()
    y, null = torch.tensor([1, 2]), torch.tensor([5, 5])
    sample_flow(model, torch.zeros(2, 1, 1, 1), time_grid(4), (y,), (null,), 2.0, (0.25, 0.5))
    assert model.rows == [2, 4, 4, 2]                              # steps begin at 0, 0.25, 0.5 and 0.75


def test_guidance_scale_0_draws_without_the_class():
    noise = torch.randn(2, 3, 1, 1)
    y, null = torch.tensor([1, 2]), torch.tensor([5, 5])
    x = sample_flow(Counting(), noise, time_grid(3), (y,), (null,), 0.0)
    assert torch.allclose(x, sample_flow(Counting(), noise, time_grid(3), (null,)), atol=1e-6)


def test_guidance_scale_1_is_the_conditional_model_in_one_pass():
    model = Counting()
    noise = torch.randn(3, 2, 4, 4)
    y = torch.tensor([1, 2, 3])
    null = torch.tensor([5, 5, 5])
    one = sample_flow(model, noise, time_grid(5), (y,), scale=1.0)
    assert model.rows == [3] * 5
    x = noise
    for a, b in itertools.pairwise(time_grid(5)):
        x = x + (b - a) * model(x, torch.full((3,), a, dtype=torch.float64), y)
    assert torch.equal(one, x)
    v, _ = guided_velocity(model, noise, torch.zeros(3), (y,), (null,), 1.0)
    assert torch.allclose(v, model(noise, torch.zeros(3), y), atol=1e-6)


def test_guidance_pushes_away_from_the_unconditional_velocity():
    x = torch.zeros(2, 3, 1, 1)
    t = torch.full((2,), 0.5)
    y = torch.tensor([1, 2])
    null = torch.tensor([5, 5])
    v, _ = guided_velocity(Counting(), x, t, (y,), (null,), 3.0)
    assert v.flatten().tolist() == [3.0] * 3 + [6.0] * 3
    first_only, c = guided_velocity(Counting(), x, t, (y,), (null,), 3.0, channels=1)
    assert c.flatten().tolist() == [1.0] * 3 + [2.0] * 3
    assert first_only.flatten().tolist() == [3.0, 1.0, 1.0, 6.0, 2.0, 2.0]


@torch.no_grad()
def test_three_channel_guidance_equals_the_original_code(golden, error):
    weights, recorded, config = golden("lightningdit_qknorm")
    model = load_dit(weights)
    x, t, y = recorded["in/x"][:3], recorded["in/t_cfg"][:3], recorded["in/y"][:3]
    null = torch.full_like(y, config["num_classes"])
    v, _ = guided_velocity(model, x, t, (y,), (null,), config["cfg_scale"], channels=3)
    assert error(v, recorded["out/cfg_3channel"][:3]) < 5e-6
    on_all_channels, _ = guided_velocity(model, x, t, (y,), (null,), config["cfg_scale"])
    assert (v - on_all_channels).abs().max() > 0.1


@torch.no_grad()
def test_guidance_interval_equals_the_original_code(golden, error):
    """Outside the interval the result is conditional.

    The original still doubles the batch there: it skips only the sum, not the work.
    """
    weights, recorded, config = golden("lightningdit_qknorm")
    model = load_dit(weights)
    x, y = recorded["in/x"][:3], recorded["in/y"][:3]
    null = torch.full_like(y, config["num_classes"])
    now = recorded["in/t_cfg"][0].item()
    ts = [now, now + 1.0]                                          # one Euler step of length 1: x + v
    for start, name in ((now - 0.01, "cfg_interval_active"), (now + 0.01, "cfg_interval_cond_only")):
        v = sample_flow(model, x, ts, (y,), (null,), config["cfg_scale"], (start, 1.0), channels=3) - x
        assert error(v, recorded[f"out/{name}"][:3]) < 5e-6, name


def largest_gap(ts, sigmas):
    """The largest difference between times t and 1 - sigma of diffusers' scheduler."""
    return (1 - sigmas.double() - torch.tensor(ts, dtype=torch.float64)).abs().max()


def test_euler_on_sd3s_grid_follows_the_recorded_trajectory(golden):
    """v = 0.7 x + 0.3 sigma in SD3's direction, 28 steps, recorded from diffusers' scheduler."""
    _, recorded, _ = golden("flow_match_euler")
    for steps in (4, 28, 30, 40, 50):
        assert largest_gap(time_grid(steps, 1 / 3, twice=True), recorded[f"out/sigmas_shift3_{steps}"]) < 1e-6
    for steps in (28, 30):
        assert largest_gap(time_grid(steps, 1 / 3), recorded[f"out/sigmas_shift3_custom_{steps}"]) < 1e-6

    def velocity(x, t):
        return -(0.7 * x + 0.3 * (1 - t[0].float()))

    ts = time_grid(28, 1 / 3, twice=True)
    for n in (1, 14, 28):
        x = sample_flow(velocity, recorded["in/x0"], ts[:n + 1], ())
        assert (x - recorded[f"out/x_after_{n}"]).abs().max() < 1e-5


def test_ticks_come_once_per_step_and_change_nothing():
    steps, noise = [], torch.randn(2, 2, 1, 1)
    with_bar = sample_flow(Counting(), noise, time_grid(7), (torch.tensor([1, 2]),), tick=steps.append)
    assert steps == [1] * 7
    assert torch.equal(with_bar, sample_flow(Counting(), noise, time_grid(7), (torch.tensor([1, 2]),)))


def test_sample_noise_depends_only_on_seed_and_index():
    alone = sample_noise(3, [7], (4, 2, 2))[0]
    assert torch.equal(sample_noise(3, range(10), (4, 2, 2))[7], alone)
    assert not torch.equal(sample_noise(4, [7], (4, 2, 2))[0], alone)
    assert not torch.equal(sample_noise(2, [8], (4, 2, 2))[0], alone)       # as if only their sum counted
    assert sample_labels([0, 4, 5, 11], [2, 3, 5]).tolist() == [2, 3, 5, 5]


# ---------------------------------------------------------------- the script


def settings(run, out, **changes):
    values = dict(run=run, out=str(out), n=6, batch_size=4, steps=2)
    return sample.Config(**{**values, **changes})


def test_samples_are_the_same_in_batches_of_one_three_and_six(tiny_run, tmp_path):
    folders = [sample.main(settings(tiny_run, tmp_path / str(size), batch_size=size)) for size in (1, 3, 6)]
    one, three, six = [np.load(folder / "samples.npz")["arr_0"] for folder in folders]
    assert len(one) == 6
    for others in (three, six):                            # rounding depends on the shapes of matrix products
        assert np.abs(one.astype(int) - others).max() <= 1


def test_a_compiled_model_meets_one_size_of_batch_and_draws_the_same_images(tiny_run, tmp_path, monkeypatch):
    sizes = []
    real = sample.generate

    def generate(dit, vae, indices, *args):
        sizes.append(len(indices))
        return real(dit, vae, indices, *args)

    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "prepare", lambda *args: sample.sample_flow)       # without compiling
    wanted = sample.main(settings(tiny_run, tmp_path / "plain", n=5, batch_size=2))
    found = sample.main(settings(tiny_run, tmp_path / "compiled", n=5, batch_size=2, compile=True))
    assert sizes == [2, 2, 1, 2, 2, 2]
    with np.load(wanted / "samples.npz") as a, np.load(found / "samples.npz") as b:
        assert len(b["arr_0"]) == 5 and np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
    sample.main(settings(tiny_run, tmp_path / "few", n=1, batch_size=2, compile=True))
    assert sizes[6:] == [1]


def test_a_batch_is_drawn_while_the_images_of_the_one_before_are_written(tiny_run, tmp_path, monkeypatch):
    batches = []
    second = threading.Event()
    generate, save_png = sample.generate, image_folder.save_png

    def drawing(*args):
        batches.append(args[2])
        if len(batches) == 2:
            second.set()
        return generate(*args)

    def writing(image, path):
        assert second.wait(60), "written before the second batch has begun"
        save_png(image, path)

    monkeypatch.setattr(sample, "generate", drawing)
    monkeypatch.setattr(image_folder, "save_png", writing)
    out = sample.main(settings(tiny_run, tmp_path / "a", n=6, batch_size=2))
    assert len(list((out / "images").iterdir())) == 6


def test_a_disk_that_refuses_an_image_ends_the_command_with_one_sentence(tiny_run, tmp_path, monkeypatch):
    def full(self, file, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit, match="000000.png: not written: .* No space left on device"):
        sample.main(settings(tiny_run, tmp_path / "a", n=1))


def test_the_bar_counts_the_euler_steps_of_all_batches(tiny_run, tmp_path, monkeypatch):
    bars = []

    def keep(**options):
        bars.append(tqdm(**options))
        return bars[-1]

    monkeypatch.setattr(sample, "tqdm", keep)
    out = sample.main(settings(tiny_run, tmp_path / "a", steps=3))         # six images, four at a time
    bar, = bars
    assert (bar.total, bar.n, bar.desc) == (6, 6, f"{out}: 6 images")


@pytest.mark.parametrize("changes,sentence", [
    (dict(n=0), "n=0"),
    (dict(steps=0), "steps=0"),
    (dict(shift=0.0), "shift=0.0"),
    (dict(cfg=float("nan")), "cfg=nan"),
    (dict(classes=(-1,)), "class -1 asked for"),
    (dict(cfg_channels=-1), "--cfg_channels=-1: the model has 16 channels"),
    (dict(cfg_channels=17), "--cfg_channels=17: the model has 16 channels"),
    (dict(cfg_start=0.6, cfg_end=0.5), "--cfg_start=0.6 --cfg_end=0.5: none of the steps .* begins"),
    (dict(cfg_start=0.6, cfg_end=0.5, cfg=1.0), "for none, give --cfg=1 alone"),
    (dict(cfg_start=0.5, steps=1), r"none of the steps \(1\) begins between them"),
    (dict(classes=(10, 99)), "class 99 asked for; the model has classes 0 to 9")])
def test_impossible_settings_get_one_sentence(tiny_run, tmp_path, changes, sentence):
    with pytest.raises(SystemExit, match=sentence):
        sample.main(settings(tiny_run, tmp_path / "a", **changes))


@pytest.mark.parametrize("text, flag, kind", [
    ("", "--slg=2.5", "classes"), ("", "--height=64", "classes"), ("captions", "--classes=3", "text")])
def test_flags_for_another_kind_of_model_are_refused_not_ignored(text, flag, kind):
    about = {"config": dict(text=text, shift=1.0, cfg=2.0, grid="plain", image_size=64),
             "model": dict(C=4, D=12, num_classes=10), "captions": ["a fox"], "classes": []}
    with pytest.raises(SystemExit, match=f"{flag.split('=')[0]}= is not for step_9, which draws from {kind}"):
        sample.settings_of(config.cli(sample.Config, argv=[flag]), about, "step_9")
    sample.settings_of(config.cli(sample.Config, argv=[]), about, "step_9")


def test_sampling_from_a_vae_run_is_refused(tiny_vae, tmp_path):
    with pytest.raises(SystemExit, match="holds a checkpoint of train_vae.py; wanted a run of finetune.py"):
        sample.main(settings(tiny_vae, tmp_path / "a"))


def test_the_unconditional_class_can_be_drawn(tiny_run, tmp_path):
    out = sample.main(settings(tiny_run, tmp_path / "a", n=2, classes=(10,)))
    assert len(list(out.glob("images/*"))) == 2
    assert json.loads((out / "settings.json").read_text())["classes"] == [10]


def test_the_decoder_sees_a_few_images_at_a_time(tiny_run):
    dit, vae, config = weights.load_run(tiny_run)
    settings = sample.settings_of(sample.Config(steps=2), config, "")
    threes = [sample.generate(dit, vae, range(k, k + 3), settings) for k in (0, 3, 6)]
    seen = []
    vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    together = sample.generate(dit, vae, range(9), settings)
    assert seen == [8, 1]
    for kind in (0, 1):                                    # images, and their previews from the base channels
        assert torch.allclose(together[kind], torch.cat([three[kind] for three in threes]), atol=1e-5)


def settings_from(cfg, text=""):
    """Settings for a run with images of 16 pixels and latents of 4 + 12 channels."""
    own = {"cfg": 1.0, "shift": 1.0, "grid": "plain", "image_size": 16, "text": text}
    about = {"config": own, "model": {"C": 4, "D": 12, "num_classes": 5}}
    return sample.settings_of(cfg, about, "")


def test_a_guidance_or_a_number_of_details_of_0_is_not_taken_for_the_default():
    given = settings_from(sample.Config(cfg=0.0, keep=0, classes=(1,)))
    assert (given["cfg"], given["keep"]) == (0.0, 0)
    default = settings_from(sample.Config(classes=(1,)))
    assert default["cfg"] == 1.0 and "keep" not in default


def test_the_settings_of_images_name_the_encoders_of_their_text(tiny_run, tmp_path, monkeypatch):
    def stop(out, settings):
        if "texts" in settings:
            raise KeyError(settings["texts"])

    monkeypatch.setattr(image_folder, "refuse_other_images", stop)
    for found, named in ((SimpleNamespace(made_by="encoders e"), "encoders e"), (None, "None")):
        monkeypatch.setattr(sample, "text_of", lambda *args, found=found: found)
        with pytest.raises(KeyError, match=named):
            sample.main(settings(tiny_run, tmp_path / "a"))


@torch.no_grad()
def test_samples_have_their_own_noise_and_class_and_the_guidance_asked_for(make_dit, make_davae):
    dit, vae = make_dit(D=12), make_davae()
    cfg = sample.Config(classes=(1, 3), seed=5, steps=5, shift=0.5, cfg=3.0, cfg_start=0.2, cfg_end=0.6,
                        cfg_channels=2, keep=4, dtype="float32")
    images, previews = sample.generate(dit, vae, [3, 6], settings_from(cfg))

    y, null = torch.tensor([3, 1]), torch.tensor([5, 5])           # samples 3 and 6 of 1, 3, 1, 3, ...
    noise, ts = sample_noise(5, [3, 6], (16, 4, 4)), time_grid(5, 0.5)
    assert [0.2 <= t <= 0.6 for t in ts[:-1]] == [False, False, True, True, False]
    z = sample_flow(dit, noise, ts, (y,), (null,), 3.0, (0.2, 0.6), 2, mask=levels.seen_of_all(4, 4, 12))
    assert torch.allclose(images, vae.decode(z, 4).clamp(-1, 1), atol=1e-5)
    assert torch.allclose(previews, vae.decode_base(z[:, :4]).clamp(-1, 1), atol=1e-5)
    assert min(x.abs().lt(1).float().mean() for x in (images, previews)) > 0.5


@torch.no_grad()
def test_samples_get_their_own_prompt_the_negative_one_and_skip_layer_guidance(make_dit, make_davae):
    dit, vae = make_dit(D=12), make_davae()
    cfg = sample.Config(prompts="a fox|snow", negative="rain", slg=2.5, width=24, dtype="float32")

    def flow(dit, noise, ts, cond, uncond, **options):
        assert (cond, uncond) == (("snow", "a fox"), ("rain", "rain"))
        assert options["slg"] == 2.5
        return noise

    images, _ = sample.generate(dit, vae, [3, 6], settings_from(cfg, "texts"), text=tuple, flow=flow)
    noise = sample_noise(0, [3, 6], (16, 4, 6))
    assert torch.allclose(images, vae.decode(noise).clamp(-1, 1), atol=1e-5)


def test_the_recorded_checkpoint_is_drawn_from_even_if_training_adds_one(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    loaded = []

    def text_of(*args):                                            # takes minutes, and the run trains on
        shutil.copytree(run / "step_000003", run / "step_000099")

    def load_run(source, *args):
        loaded.append(source)
        return weights.load_run(source, *args)

    monkeypatch.setattr(sample, "text_of", text_of)
    monkeypatch.setattr(sample, "load_run", load_run)
    sample.main(settings(str(run), tmp_path / "a", n=1))
    assert loaded == [run / "step_000003"]


def test_all_ranks_draw_from_the_run_and_checkpoint_that_rank_0_finds(tiny_run, tmp_path, monkeypatch):
    run, asked = shutil.copytree(tiny_run, tmp_path / "run"), []
    (run / "step_000003").rename(run / "step_000007")              # what this rank sees, a moment later

    def from_all(x):
        asked.append(x)
        return [(tiny_run, Path(tiny_run) / "step_000003") if len(asked) == 1 else [0]]

    def load_run(source, *args):
        raise KeyError(source)

    monkeypatch.setattr(sample, "load_run", load_run)
    monkeypatch.setattr(ranks, "from_all", from_all)
    monkeypatch.setattr(ranks, "setup", lambda device: (1, 2, torch.device("cpu")))
    with pytest.raises(KeyError, match="runs.*/run/step_000003"):
        sample.main(settings(str(run), tmp_path / "a", n=1))
    assert asked[0] == (str(run), run / "step_000007")


def test_the_rehearsal_has_the_rows_of_a_guided_step(tiny_run, tmp_path, monkeypatch):
    rows = []

    def before_sampling(out, device, compiled, forward):
        real = sample.sample_flow

        def flow(model, noise, *args, **options):
            model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
            return real(model, noise, *args, **options)

        with monkeypatch.context() as watched:
            watched.setattr(sample.generate, "__defaults__", (None, flow, None))
            forward()
        raise KeyError("enough")

    monkeypatch.setattr(sample.choose, "before_sampling", before_sampling)
    with pytest.raises(KeyError, match="enough"):
        sample.main(settings(tiny_run, tmp_path / "a", cfg=2.0, cfg_start=0.2))
    assert rows == [8]                                             # twice the batch of four, in one step


def test_two_processes_share_the_missing_images_and_load_the_weights_asked_for(
        tiny_run, tmp_path, monkeypatch):
    loaded, drawn, looked = [], [], []
    todo = [0, 2, 3, 5, 6, 7, 8]

    def load_run(run, weights, device):
        loaded.append(weights)
        return SimpleNamespace(cfg=SimpleNamespace(p=1)), SimpleNamespace(f=4), None

    def generate(dit, vae, indices, *rest):
        drawn.append(indices)
        return [torch.zeros(len(indices), 3, 8, 8)] * 2

    for name, fake in dict(load_run=load_run, generate=generate).items():
        monkeypatch.setattr(sample, name, fake)
    monkeypatch.setattr(sample, "prepare", lambda *args: None)
    monkeypatch.setattr(image_folder, "put_together", lambda *args: None)
    monkeypatch.setattr(image_folder, "missing", lambda *args: looked.append("rank 0") or todo)
    monkeypatch.setattr(ranks, "from_all", lambda x: [todo if x is None else x])
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "setup", lambda device, rank=rank: (rank, 2, torch.device("cpu")))
        sample.main(settings(tiny_run, tmp_path / "a", n=9, batch_size=3, weights="model"))
    assert drawn == [[0, 3, 6], [8], [2, 5, 7]]
    assert loaded == ["model", "model"]
    assert looked == ["rank 0"]                                    # a network disk has to open every image


# ---------------------------------------------------------------- text for samples


@pytest.fixture
def text_of(tmp_path):
    """text_of(drawn, made_of=(), model=(), **flags) -> sample.text_of of a run trained on "", a and b.

    Its text was in <tmp_path>/shards; the run itself is <tmp_path>/run.
    """
    def shard(folder, prompts, encoders="e"):
        folder.mkdir(parents=True)
        vectors = [torch.full((len(prompts), *size), 1.0) for size in ((8, 6), (5,))]
        header = {"encoders": encoders, "t5_tokens": "24"}
        text.write_shard(folder / "text_00000.safetensors", prompts, *vectors, header)
        return str(folder)

    def find(drawn, made_of=(), model=(), **flags):
        about = {"config": {"text": str(tmp_path / "shards"), "t5_tokens": 24}, "model": dict(model),
                 "made_of": dict(made_of)}
        cfg = sample.Config(run=str(tmp_path / "run"), **flags)
        return sample.text_of(cfg, about, {"prompts": drawn, "negative": ""}, "", 0, torch.device("cpu"))

    shard(tmp_path / "shards", ["", "a", "b"])
    find.shard = shard
    return find


def test_a_prompt_without_embedding_is_refused_at_once_but_only_if_it_is_drawn(text_of):
    with pytest.raises(SystemExit, match="no embedding of 'c' and 0 more"):
        text_of(["a", "b", "c"])
    assert text_of(["a", "b", "c"], n=2)(["a"])[0].shape == (1, 8, 6)


def test_only_the_prompts_that_are_drawn_and_the_negative_one_are_encoded(text_of, monkeypatch):
    asked = []

    def text_for(folder, prompts, *rest):
        asked.append(prompts)
        return text.TextCache(folder)

    monkeypatch.setattr(text, "text_for", text_for)
    text_of(["a", "b"] * 1000, n=1)
    assert asked == [["a", ""]]


def test_prompts_beyond_n_are_not_dropped_without_a_word(text_of, capsys):
    three = dict(prompts="a|b|a")                                  # as one file with three lines would be
    text_of(["a", "b", "a"], n=2, **three)
    said = "--prompts= has 3 prompts, of which the first 2 are drawn; --n=3 draws all\n"
    assert capsys.readouterr().out == said
    text_of(["a", "b", "a"], n=3, **three)
    text_of(["a", "b", "a"], n=2)                                  # captions, which nobody listed
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("trained_with, warned", [
    (None, False), ("encoders e, 24 T5 tokens", False), ("encoders x, 24 T5 tokens", True)])
def test_text_of_other_encoders_than_the_runs_causes_a_warning(text_of, trained_with, warned, capsys):
    text_of(["a"], {"texts": trained_with})
    said = capsys.readouterr().out
    assert ("made by encoders e, 24 T5 tokens; the run was trained with encoders x, 24 T5" in said) == warned
    assert said.count("\n") == warned


def test_text_of_another_width_than_the_model_takes_is_refused(text_of):
    with pytest.raises(SystemExit, match="context embeddings of width 6; the transformer takes 4096"):
        text_of(["a"], model={"context": 4096})


def test_a_run_draws_its_own_prompts_when_the_folder_of_its_text_is_gone(text_of, tmp_path):
    kept = text_of.shard(tmp_path / "run" / "captions", ["", "a"])
    assert text_of(["a"]).folder == Path(kept)
    assert text_of(["a", "b"]).folder == str(tmp_path / "shards")          # b is there alone
    shutil.rmtree(tmp_path / "shards")
    assert text_of(["a"]).folder == Path(kept)
    with pytest.raises(SystemExit, match="shards: no text_"):
        text_of(["a", "b"])
    other = text_of.shard(tmp_path / "other", ["", "a"], encoders="f")
    assert text_of(["a"], text=other).folder == other


# ---------------------------------------------------------------- SD3.5 against diffusers


@pytest.mark.parametrize("steps", [4, 28, 30, 50])
def test_sd3_time_grids_equal_diffusers_default_and_single_shift(steps):
    import_torchvision()
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    once = time_grid(steps, 1 / 3)
    twice = time_grid(steps, 1 / 3, twice=True)
    scheduler.set_timesteps(steps)
    assert largest_gap(twice, scheduler.sigmas) < 1e-6
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    assert largest_gap(once, scheduler.sigmas) < 1e-6
    assert np.abs(np.subtract(once, twice)).max() > 1e-3


def test_skip_layer_guidance_runs_an_extra_pass_only_in_early_steps():
    calls = []

    def model(x, t, y, skip=()):
        calls.append(skip)
        return x * 0 + (1.0 if skip else 3.0)

    x = sample_flow(model, torch.zeros(1, 1, 1, 1), time_grid(50), (torch.zeros(1),), slg=2.5)
    assert len(calls) == 59
    assert sum(bool(skip) for skip in calls) == 9                  # steps 1 .. 9
    assert x.item() == pytest.approx(3.0 + 9 / 50 * 2.5 * 2.0, abs=1e-5)
    calls.clear()
    sample_flow(model, torch.zeros(1, 1, 1, 1), time_grid(100), (torch.zeros(1),), slg=2.5)
    assert sum(bool(skip) for skip in calls) == 18                 # steps 2 .. 19


def test_skip_layer_guidance_starts_from_the_velocity_without_other_guidance():
    def model(x, t, y, skip=()):                                   # 1 for c, 0 for u; 0.5 without the blocks
        return 0 * x + (0.5 if skip else y.view(-1, 1, 1, 1))

    x = sample_flow(model, torch.zeros(1, 1, 1, 1), time_grid(10), (torch.ones(1),), (torch.zeros(1),), 3.0,
                    slg=2.0)
    assert x.item() == pytest.approx(3.0 + 0.1 * 2.0 * (1.0 - 0.5), abs=1e-6)      # in step 1 alone


@torch.no_grad()
def test_a_whole_pipeline_gives_the_same_images(sd3_folder):
    from diffusers import StableDiffusion3Pipeline
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    pipe.set_progress_bar_config(disable=True)
    noise = sample_noise(0, range(2), (4, 16, 24))
    prompts = ["a red fox, asleep", "snow"]
    negative = ["snow", ""]
    theirs = pipe(
        prompts, negative_prompt=negative, num_inference_steps=4, guidance_scale=3.5, height=32, width=48,
        latents=noise, max_sequence_length=24, output_type="np").images
    encoders = text.load_text_encoders(sd3_folder, torch.device("cpu"))
    cond = text.encode_text(encoders, prompts, 24)
    uncond = text.encode_text(encoders, negative, 24)
    z = sample_flow(load_dit(sd3_folder), noise, time_grid(4, 1 / 3, twice=True), cond, uncond, 3.5)
    x = load_base_vae(sd3_folder).decode(z)
    ours = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape == (2, 32, 48, 3)
    assert theirs.std() > 0.05
    assert np.abs(ours - theirs).max() < 1e-4


# ---------------------------------------------------------------- speed


def fresh_models():
    """A LightningDiT and an MMDiT for latents (B, 8, 4, 4), of which 4 channels are details."""
    return (LightningDiT(LightningDiTConfig(C=4, D=4, grid=4, E=32, A=4, depth=2, num_classes=5)),
            MMDiT(MMDiTConfig(C=4, D=4, E=32, A=2, depth=3, dual=1, context=12, pooled=8, pos_size=6)))


def test_neither_the_sampler_nor_the_loss_waits_for_the_device():
    """On the meta device there is nothing to read: an .item(), or an `if` on a tensor, would raise."""
    with torch.device("meta"):
        z_all = torch.empty(2, 8, 4, 4)
        labels = (torch.zeros(2, dtype=torch.long),)
        texts = (torch.empty(2, 3, 12), torch.empty(2, 8))
        lightningdit, mmdit = fresh_models()
    for model, cond in ((lightningdit, labels), (mmdit, texts)):
        x = sample_flow(model, z_all, time_grid(4, 0.3), cond, cond, 4.0, (0.2, 1.0), ahead=6)
        assert x.shape == z_all.shape
        for weighting in ("paper", "sigma"):
            loss, _ = flow_loss(model, z_all, cond, 0.5, finetune.Config(D=4, weighting=weighting))
            loss.backward()
            assert all(p.grad is not None for name, p in model.named_parameters() if "text.mlp" not in name)
            model.zero_grad(set_to_none=True)
    assert sample_flow(mmdit, z_all, time_grid(20), texts, texts, 4.0, slg=2.5, skip=(1,)).is_meta


def random_models(device="cpu"):
    """[(model, cond, uncond)]: both models with adaLN layers that are not zero, for three images."""
    torch.manual_seed(0)
    models = fresh_models()
    for model in models:
        for p in model.parameters():
            p.data = 0.2 * torch.randn(p.shape)
    labels = [(torch.tensor([0, 1, 2]),), (torch.tensor([5, 5, 5]),)]
    texts = [(torch.randn(3, 7, 12), torch.randn(3, 8)) for _ in ("cond", "uncond")]
    on_device = []
    for model, conditions in zip(models, (labels, texts), strict=True):
        cond, uncond = [tuple(x.to(device) for x in part) for part in conditions]
        on_device.append((model.to(device), cond, uncond))
    return on_device


def count_calls(module):
    """A list that grows by one entry whenever the module is called."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("rows,products", [(1, 9), (7, 8), (12, 4), (1000, 2)])
def test_modulations_computed_ahead_change_nothing_but_the_number_of_products(rows, products):
    """Of the nine steps of this grid, the three before 0.2 take batches of 3, the other six batches of 6."""
    ts = time_grid(9, 0.6)
    noise = torch.randn(3, 8, 4, 4)
    assert sum(t < 0.2 for t in ts[:-1]) == 3
    for model, cond, uncond in random_models():
        calls = count_calls(model.adaLN_final)
        step_by_step = sample_flow(model, noise, ts, cond, uncond, 4.0, (0.2, 1.0))
        assert len(calls) == 9
        assert step_by_step.std() > 0.3
        ahead = sample_flow(model, noise, ts, cond, uncond, 4.0, (0.2, 1.0), ahead=rows)
        assert len(calls) == 9 + products
        assert torch.allclose(ahead, step_by_step, atol=1e-4)


def test_weights_rounded_before_sampling_give_what_autocast_gives():
    ts = time_grid(3)
    noise = torch.randn(3, 8, 4, 4)
    for model, cond, uncond in random_models():
        bytes_before = sum(p.nbytes for p in model.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            expected = sample_flow(model, noise, ts, cond, uncond, 4.0)
            rounded = sample.for_sampling(model)
            assert torch.equal(sample_flow(rounded, noise, ts, cond, uncond, 4.0), expected)
        assert sum(p.nbytes for p in model.parameters()) < 0.52 * bytes_before


def add_adapters(model):
    """Put random adapters into an MMDiT, in place."""
    add_lora(model, r=4, alpha=8.0)
    for m in model.modules():
        if isinstance(m, LoRA):
            torch.nn.init.normal_(m.B, std=0.1)                # at their initial zero they would do nothing


def test_adapters_are_merged_for_sampling():
    _, (model, cond, uncond) = random_models()
    noise = torch.randn(3, 8, 4, 4)

    def draw():
        return sample_flow(model, noise, time_grid(3), cond, uncond, 2.0)

    with torch.autocast("cpu", torch.bfloat16):
        without = draw()
        add_adapters(model)
        adapted = draw()
        assert any(isinstance(m, LoRA) for m in model.modules())
        sample.for_sampling(model)
        merged = draw()
    assert model.cfg.lora == 0
    assert not any(isinstance(m, LoRA) for m in model.modules())
    assert (adapted - merged).abs().max() < 0.05 * (adapted - without).abs().max()


class Tape(TorchDispatchMode):
    """What torch.cuda.graph does, on a CPU.

    Records the operators that run; replay() runs them again on the same memory.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.calls.append((f, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for f, args, kwargs, recorded in self.calls:
            out = f(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(out), strict=True):
                if not isinstance(old, torch.Tensor):
                    continue
                if old.data_ptr() != new.data_ptr():               # else a view, or in place
                    old.copy_(new)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_recorded_loop_gives_the_same_latents_for_every_batch(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
        monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    ts = time_grid(9, 0.6)
    for model, cond, uncond in random_models(device):
        sample.for_sampling(model)
        recorded = sample.Recorded()
        calls = count_calls(model.blocks[0])
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            for seed in range(3):
                noise = sample_noise(seed, range(3), (8, 4, 4)).to(device)
                options = dict(interval=(0.2, 1.0), ahead=256, mask=levels.seen_of_all(2, 4, 4).to(device))
                conditions = [[x.roll(seed, 0) for x in part] for part in (cond, uncond)]
                expected = sample_flow(model, noise, ts, *conditions, scale=4.0, **options)
                before = len(calls)
                x = recorded(model, noise, ts, *conditions, scale=4.0, **options)
                assert torch.allclose(x, expected, atol=1e-3)
                assert len(calls) == before + (18 if seed == 0 else 0)     # nine steps, run and then recorded

            fewer = [noise[:2], ts, *[[x[:2] for x in part] for part in conditions]]
            x = recorded(model, *fewer, scale=4.0, **options)
            assert torch.equal(x, sample_flow(model, *fewer, scale=4.0, **options))
            for other in (dict(scale=2.0), dict(scale=4.0, mask=None)):
                x = recorded(model, noise, ts, *conditions, **options | other)
                assert torch.equal(x, sample_flow(model, noise, ts, *conditions, **options | other))

            ticks, before = [], len(calls)
            conditions = (cond, uncond)
            recorded(model, sample_noise(0, range(3), (8, 4, 4)).to(device), ts, *conditions, scale=4.0,
                     tick=ticks.append, **options)
            assert ticks == [9]
            assert len(calls) == before                                # replayed, not run


def test_a_graph_without_a_gpu_is_refused(tiny_run, tmp_path):
    with pytest.raises(SystemExit, match="needs a GPU"):
        sample.main(sample.Config(run=str(tiny_run), out=str(tmp_path / "out"), graph=True, device="cpu"))
    assert not (tmp_path / "out").exists()
