"""Shared fixtures: golden files, small models and runs, faults; which tests are skipped, and why."""
import dataclasses
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
SHARED = ROOT.parent / "shared"            # photos and weights that cannot be redistributed with the code

os.environ["HF_HUB_OFFLINE"] = "1"         # no test contacts the real hub; tests/test_hub.py has its own

LONGEST = ("test_ranks", "test_kernels", "test_pretended_gpu")     # first: the last would be waited for

torch.set_num_threads(1)                   # for tensors this small, threads would only wait for each other


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--house", action="store_true", help="also run the tests of this repository's own rules")


def pytest_configure(config):
    config.option.loadscopereorder = False             # xdist would begin with the files of most tests


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "house" in item.keywords and not config.getoption("--house"):
            item.add_marker(pytest.mark.skip(reason="a rule of this repository, not of a fork: --house"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# ---------------------------------------------------------------- files, and how to compare with them


@pytest.fixture
def golden():
    """golden(name) -> (weights under their original names, everything else by key, the metadata's config)."""
    def load(name):
        weights, others = {}, {}
        with safe_open(FIXTURES / f"{name}.safetensors", "pt") as f:
            config = json.loads(f.metadata()["config"])
            keys = f.keys()
            for key in keys:
                if key.startswith("sd/"):
                    weights[key.removeprefix("sd/")] = f.get_tensor(key)
                else:
                    others[key] = f.get_tensor(key)
        return weights, others, config
    return load


@pytest.fixture(scope="session")
def full_size():
    """{checkpoint: {key: shape}} of public files and of the original classes at full size."""
    return json.loads((FIXTURES / "full_size_keys.json").read_text())


@pytest.fixture
def shared():
    """shared("weights/taef2") -> its path; skips if the folder of unredistributable files is absent."""
    def path(relative):
        if not (SHARED / relative).exists():
            pytest.skip(f"needs ../shared/{relative}, which is not part of this repository")
        return SHARED / relative
    return path


@pytest.fixture(scope="session")
def error():
    """error(x, ref) -> the largest difference, relative to the largest value of ref, at least 1."""
    def relative(x, ref):
        largest = ref.abs().max().clamp(min=1)
        return ((x - ref).abs().max() / largest).item()
    return relative


@pytest.fixture(scope="session")
def same_weights():
    """same_weights(a, b, names=("model",)): do the newest checkpoints of two Configs agree, bit for bit?"""
    from support import runs

    def same(a, b, names=("model",)):
        for name in names:
            x = load_file(runs.latest_checkpoint(a.out) / f"{name}.safetensors")
            y = load_file(runs.latest_checkpoint(b.out) / f"{name}.safetensors")
            if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x):
                return False
        return True
    return same


@pytest.fixture(scope="session")
def read_log():
    """read_log(out) -> the rows of a run's log.jsonl."""
    def rows(out):
        return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return rows


# ---------------------------------------------------------------- small models with random weights


def random_weights(model, seed=0, names=""):
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if names in name:
            param.data = torch.randn(param.shape, generator=generator) * 0.15
    return model


@pytest.fixture(scope="session")
def randomise():
    """randomise(model, seed=0, names="") -> model, random in every parameter with `names` in its name.

    A fresh DiT computes 0, which would prove nothing.
    """
    return random_weights


@pytest.fixture
def kl_config():
    """The sizes of an AutoencoderKL of 8 and 16 channels: C = 4, f = 2."""
    from davae import KLConfig
    return KLConfig(C=4, widths=(8, 16), blocks=1, groups=4)


@pytest.fixture
def make_base(kl_config):
    """make_base() -> an AutoencoderKL of these sizes with random weights and statistics, always the same."""
    from davae import AutoencoderKL

    def make():
        torch.manual_seed(0)
        vae = AutoencoderKL(kl_config).eval()
        vae.mean.uniform_(-1, 1)
        vae.std.uniform_(0.5, 2)
        return vae
    return make


@pytest.fixture
def make_davae(make_base):
    """make_davae(D=12, **options) -> a DAVAE on such a base, with random statistics."""
    from davae import DAVAE, DAVAEConfig

    def make(D=12, **options):
        vae = DAVAE(make_base(), DAVAEConfig(D=D, **options)).eval()
        torch.manual_seed(1)
        vae.mean.uniform_(-1, 1)
        vae.std.uniform_(0.5, 2)
        return vae
    return make


@pytest.fixture
def make_dit():
    """make_dit(p=1, D=0, seed=0, **options) -> a random LightningDiT of C = 4, 4x4 tokens and 5 classes."""
    from dit import LightningDiTConfig, LightningDiT

    def make(p=1, D=0, seed=0, **options):
        sizes = {"E": 32, "A": 4, "depth": 2, "qk_norm": True} | options
        model = LightningDiT(LightningDiTConfig(C=4, D=D, p=p, grid=4, num_classes=5, **sizes))
        return random_weights(model, seed).eval()
    return make


@pytest.fixture
def dit_inputs():
    """dit_inputs(p, channels=4) -> (z, t, y) for such a model: three latents, the last of the null class."""
    def make(p, channels=4):
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(3, channels, 4 * p, 4 * p, generator=generator)
        return z, torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 3, 5])
    return make


@pytest.fixture(scope="session")
def stock():
    """A small SD3Transformer2DModel with SD3.5-Medium's dual blocks, QK-norm and odd position table."""
    from support.metrics import import_torchvision
    import_torchvision()
    from diffusers import SD3Transformer2DModel
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=4, pos_embed_max_size=21,
        attention_head_dim=16, num_attention_heads=3, caption_projection_dim=48, joint_attention_dim=40,
        pooled_projection_dim=24, dual_attention_layers=(0, 1), qk_norm="rms_norm")
    return random_weights(model.eval())


@pytest.fixture
def sd3_inputs():
    """sd3_inputs(channels=4, h=16, w=24) -> (z, t, context, pooled) for `stock`: two latents and texts."""
    def make(channels=4, h=16, w=24):
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(2, channels, h, w, generator=generator)
        context = torch.randn(2, 7, 40, generator=generator)
        pooled = torch.randn(2, 24, generator=generator)
        return z, torch.linspace(0, 1, 2), context, pooled
    return make


@pytest.fixture
def widened(stock):
    """widened(spoil=None) -> `stock` as our MMDiT, 6 channels wider, random where names have `spoil`."""
    from support.weights import load_dit

    def make(spoil=None):
        model = load_dit(stock.state_dict())
        model.expand_channels(6)
        return random_weights(model, seed=3, names=spoil) if spoil else model
    return make


# ---------------------------------------------------------------- runs of a few steps, made once


@pytest.fixture(scope="session", autouse=True)
def report_at_the_end():
    """Runs end without their report, which would take longer than they do; yields the real function."""
    import evaluate
    real = evaluate.report_at_the_end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "report_at_the_end", lambda job, text: None)
        yield real


@pytest.fixture(scope="session", autouse=True)
def plot_losses():
    """Runs end without loss.png, which takes as long as all the rest of them; yields the real function."""
    from support import figures
    real = figures.plot_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_losses", lambda run: None)
        yield real


@pytest.fixture(scope="session", autouse=True)
def validation_on_few_images():
    """Sixty-four images would be most of the work of runs this short."""
    from support import held_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out.validation_images, "__defaults__", (8,))
        yield


@pytest.fixture(scope="session")
def vae_config():
    """vae_config(out, **changes) -> train_vae's Config of a base VAE of 8 channels on 16-pixel images.

    A step takes milliseconds.
    """
    import train_vae

    def make(out, **changes):
        values = dict(
            preset="tiny-base", out=str(out), D=0, C=4, widths=(8, 16), blocks=1, groups=4,
            image_size=16, images=32, flip=False, perceptual="none", gan=0.0, stats=16,
            steps=4, batch_size=4, lr=1e-3, log_every=1, save_every=100, dtype="float32")
        return train_vae.Config(**{**values, **changes})
    return make


@pytest.fixture(scope="session")
def base_run(vae_config, tmp_path_factory):
    """The folder of that base VAE, trained for four steps."""
    import train_vae
    out = tmp_path_factory.mktemp("runs") / "base"
    train_vae.main(vae_config(out))
    return str(out)


@pytest.fixture(scope="session")
def davae_config(vae_config, base_run):
    """davae_config(out, **changes) -> train_vae's Config of 12 detail channels on `base_run`, with a GAN."""
    def make(out, **changes):
        values = dict(preset="tiny", D=12, base=base_run, gan=0.1, disc_start=3, disc_width=4, image_size=64,
                      fit="random")
        return vae_config(out, **{**values, **changes})
    return make


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """The folder of a DA-VAE (C = 4, D = 12, f = 4) trained for three steps on 64-pixel procedural images."""
    import train_vae
    runs = tmp_path_factory.mktemp("runs")
    small = dict(
        image_size=64, images=64, flip=False, perceptual="none", gan=0.0, stats=32,
        steps=3, batch_size=4, lr=1e-3, log_every=1, save_every=100, dtype="float32")
    base = train_vae.Config(
        preset="tiny-base", out=str(runs / "base-vae"), D=0, C=4, widths=(8, 16, 16), blocks=1, groups=4,
        **small)
    train_vae.main(base)
    train_vae.main(train_vae.Config(
        preset="tiny", out=str(runs / "vae"), D=12, base=base.out, fit="random", **small))
    return str(runs / "vae")


DIT = dict(
    image_size=64, images=64, flip=False, steps=3, batch_size=8, micro_batch=8, lr=1e-3, N=4, log_every=1,
    save_every=100, sample_steps=2, cfg=2.0, shift=1.0, dtype="float32")


@pytest.fixture(scope="session")
def tiny_base(tiny_vae):
    """The folder of a base DiT trained for three steps on the base channels of `tiny_vae`."""
    import finetune
    out = str(Path(tiny_vae).parent / "base")
    cfg = finetune.Config(preset="tiny-base", out=out, vae=tiny_vae, D=0, E=32, depth=2, A=2, p=2, **DIT)
    finetune.main(cfg)
    return out


@pytest.fixture(scope="session")
def finetune_config(tiny_vae, tiny_base):
    """finetune_config(out, **changes) -> finetune's Config that widens `tiny_base` and trains three steps."""
    import finetune

    def make(out, **changes):
        values = dict(preset="tiny", out=str(out), vae=tiny_vae, base=tiny_base, D=12, **DIT)
        return finetune.Config(**{**values, **changes})
    return make


@pytest.fixture(scope="session")
def tiny_run(tiny_vae, finetune_config, plot_losses):
    """The folder of a DiT widened from `tiny_base` and trained for three steps, with a plot of its losses."""
    import finetune
    from support import figures
    out = str(Path(tiny_vae).parent / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_losses", plot_losses)
        finetune.main(finetune_config(out))
    return out


# ---------------------------------------------------------------- faults, injected for real


FORKED = """import os, runpy, sys
for number, file in enumerate({files}, start=1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
os.chdir({cwd!r})
os.environ |= {env}
if {ranks} == 1:
    runpy.run_path({program!r}, run_name="__main__")
else:
    from torch.distributed import run
    started = ["--run-path", "--start-method={start}"]
    run.main(["--standalone", "--nproc-per-node={ranks}", *started, {program!r}])
"""

# Elsewhere, the system's own libraries may not survive a fork.
FORKS = sys.platform == "linux"
PRELOADED = ["torch.distributed.run", "torch._dynamo", "torch.distributed.tensor"]


class Forked:
    """A Python program, like Popen; on Linux forked from a process that has imported torch: it takes seconds.

    ranks: more than one are started by torchrun, in the same way
    """

    def __init__(self, folder, source, ranks=1, **env):
        program, first, out, err = [folder / name for name in ("program.py", "first.py", "out", "err")]
        program.write_text(source)
        first.write_text(FORKED.format(files=[str(out), str(err)], cwd=str(folder), env=env, ranks=ranks,
                                       start="fork" if FORKS else "spawn", program=str(program)))
        context = multiprocessing.get_context("forkserver" if FORKS else "spawn")
        context.set_forkserver_preload(PRELOADED)
        self.process = context.Process(target=runpy.run_path, args=(str(first),))
        self.process.start()
        self.printed = out, err

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        assert self.returncode is not None, f"it has not ended within {timeout} s"
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return [file.read_text() if file.exists() else "" for file in self.printed]

    def send_signal(self, number):
        os.kill(self.process.pid, number)


@pytest.fixture
def fork(tmp_path):
    """fork(source, ranks=1, **environment) -> `Forked`, killed at the end of the test."""
    started = []

    def start(source, ranks=1, **env):
        folder = tmp_path / f"process{len(started)}"
        folder.mkdir()
        started.append(Forked(folder, source, ranks, **env))
        return started[-1]

    yield start
    for forked in started:
        forked.process.kill()


PROGRAM = """import os, signal, sys, torch, evaluate, {module} as script
from support import figures, held_out, ranks, runs
evaluate.report_at_the_end = lambda job, text: None
figures.plot_losses = lambda run: None
held_out.validation_images.__defaults__ = (8,)
RANK = int(os.environ.get('RANK', 0))
torch.set_num_threads({threads})
{fault}
values = {values}
ranks.launch(script.{main}, script.{config}(**values))
"""


@pytest.fixture
def launch(fork):
    """launch(main, cfg, fault="", ranks=1) -> `Forked` of a script's main, run after the lines `fault`."""
    def start(main, cfg, fault="", ranks=1):
        return fork(PROGRAM.format(
            module=main.__module__, main=main.__name__, config=type(cfg).__name__, fault=fault,
            threads=torch.get_num_threads(), values=dataclasses.asdict(cfg)), ranks)
    return start


@pytest.fixture
def interrupt(launch):
    """interrupt(main, cfg, number) -> the step at which a run stopped after that signal."""
    def run(main, cfg, number):
        process = launch(main, cfg)
        log = Path(cfg.out) / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
        step = int(max(Path(cfg.out).glob("step_*")).name[5:])
        assert process.returncode == 0, err
        assert 2 < step < cfg.steps and f"stopped after step {step}" in out, err
        return step

    return run


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kB) -> the folder of a new tmpfs of that size."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        if not root or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ---------------------------------------------------------------- Stable Diffusion 3.5 in miniature


LETTERS = "abcdefghijklmnopqrstuvwxyz,"


def small_clip(width, layers, pad, act):
    """A random CLIP text encoder and its tokenizer of single letters."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "!", *LETTERS, *(f"{a}</w>" for a in LETTERS)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    config = CLIPTextConfig(
        vocab_size=len(ids), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=ids[pad],
        hidden_act=act)
    return CLIPTextModelWithProjection(config), CLIPTokenizer(ids, [], pad_token=pad, model_max_length=77)


def small_t5():
    """A random T5 encoder and its tokenizer of single letters."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((a, -3.0) for a in LETTERS)]
    config = T5Config(vocab_size=len(pieces), d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config), T5TokenizerFast(pieces, extra_ids=0)


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """A saved StableDiffusion3Pipeline of small random parts: text encoders, MMDiT, VAE (f = 2, C = 4)."""
    from support.metrics import import_torchvision
    import_torchvision()
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    torch.manual_seed(0)
    clip_l, tokenizer_l = small_clip(16, 2, "<|endoftext|>", "quick_gelu")
    clip_g, tokenizer_g = small_clip(8, 3, "!", "gelu")
    t5, tokenizer_t5 = small_t5()
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=4, pos_embed_max_size=24,
        attention_head_dim=16, num_attention_heads=3, caption_projection_dim=48, joint_attention_dim=40,
        pooled_projection_dim=24, dual_attention_layers=(0, 1), qk_norm="rms_norm")
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
    for param in transformer.parameters():
        param.data = torch.randn(param.shape) * 0.15
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_l, text_encoder_2=clip_g, text_encoder_3=t5,
        tokenizer=tokenizer_l, tokenizer_2=tokenizer_g, tokenizer_3=tokenizer_t5)
    folder = tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(folder)
    return folder
