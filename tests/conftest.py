"""Shared fixtures: where the small golden files are, and which tests are skipped, with the reason."""
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"            # real photos and weights that cannot be redistributed with this repository


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def golden():
    """golden(name) -> (weights under their original names, everything else by its key, the metadata's config)."""
    def load(name):
        with safe_open(ROOT / "tests" / "fixtures" / f"{name}.safetensors", "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}
            config = json.loads(f.metadata()["config"])
        weights = {k.removeprefix("sd/"): v for k, v in tensors.items() if k.startswith("sd/")}
        return weights, {k: v for k, v in tensors.items() if not k.startswith("sd/")}, config
    return load


@pytest.fixture
def shared():
    """shared("weights/taef2") -> its path; skips where the folder of unredistributable files is absent."""
    def path(relative):
        if not (SHARED / relative).exists():
            pytest.skip(f"needs ../shared/{relative}, which is not part of this repository")
        return SHARED / relative
    return path


# ---------------------------------------------------------------- runs of a few steps, made once and read by several files


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """The folder of a DA-VAE (C = 4, D = 12, f = 4) trained for three steps on 64-pixel procedural images."""
    import train_vae
    runs = tmp_path_factory.mktemp("runs")
    small = dict(image_size=64, images=64, flip=False, perceptual="none", gan=0.0, stats=32, steps=3, batch_size=4, lr=1e-3,
                 log_every=1, save_every=100)
    train_vae.main(train_vae.Config(preset="tiny-base", out=str(runs / "base-vae"), D=0, C=4, ch=8, ch_mult=(1, 2, 2), blocks=1,
                                    groups=4, **small))
    train_vae.main(train_vae.Config(preset="tiny", out=str(runs / "vae"), D=12, base=str(runs / "base-vae"), **small))
    return str(runs / "vae")


@pytest.fixture(scope="session")
def tiny_base(tiny_vae):
    """The folder of a base DiT trained for three steps on the base channels of `tiny_vae`."""
    import finetune
    out = str(Path(tiny_vae).parent / "base")
    finetune.main(finetune.Config(preset="tiny-base", out=out, vae=tiny_vae, D=0, E=32, depth=2, A=2, p=2, **DIT))
    return out


@pytest.fixture(scope="session")
def tiny_run(tiny_vae, tiny_base):
    """The folder of a DiT widened from `tiny_base` and trained for three steps."""
    import finetune
    out = str(Path(tiny_vae).parent / "run")
    finetune.main(finetune.Config(preset="tiny", out=out, vae=tiny_vae, D=12, base=tiny_base, **DIT))
    return out


DIT = dict(image_size=64, images=64, flip=False, steps=3, batch_size=8, micro_batch=8, lr=1e-3, N=4, log_every=1, save_every=100,
           sample_steps=2, cfg=2.0, shift=1.0)


# ---------------------------------------------------------------- faults, injected for real


@pytest.fixture
def launch(tmp_path):
    """launch(main, cfg, fault="", ranks=1) -> Popen of a program that runs the script's main after the lines `fault`."""
    started = []

    def start(main, cfg, fault="", ranks=1):
        module, program = main.__module__, tmp_path / f"program{len(started)}.py"
        program.write_text(f"import os, signal, sys, torch, {module} as script\nfrom support import ranks, runs\nRANK = int(os.environ.get('RANK', 0))\n"
                           f"torch.set_num_threads({torch.get_num_threads()})\n{fault}\nvalues = {dataclasses.asdict(cfg)}\n"
                           f"ranks.launch(script.main, script.Config(**values))\n")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        started.append(subprocess.Popen([sys.executable, *torchrun, str(program)], text=True, cwd=tmp_path,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=os.environ | {"PYTHONPATH": str(ROOT)}))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def interrupt(launch):
    """interrupt(main, cfg, number): run it until it has logged a few steps, send that signal; returns the step it stopped at."""
    def run(main, cfg, number):
        process, log = launch(main, cfg), Path(cfg.out) / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
        step = int(max(Path(cfg.out).glob("step_*")).name[5:])
        assert process.returncode == 0 and 2 < step < cfg.steps and f"stopped after step {step}" in out, err
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
        if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ---------------------------------------------------------------- Stable Diffusion 3.5 in miniature, as diffusers makes it


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """A StableDiffusion3Pipeline of small random parts (three text encoders, MMDiT, VAE of f2 and 4 channels), saved."""
    from support.metrics import import_torchvision
    import_torchvision()
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel,
                              T5TokenizerFast)
    letters = "abcdefghijklmnopqrstuvwxyz,"
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "!", *letters, *(f"{a}</w>" for a in letters)]

    def clip(width, layers, pad, act):
        ids = {token: i for i, token in enumerate(vocabulary)}
        config = CLIPTextConfig(vocab_size=len(ids), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                                num_attention_heads=2, projection_dim=width, bos_token_id=0, eos_token_id=1,
                                pad_token_id=ids[pad], hidden_act=act)
        return CLIPTextModelWithProjection(config), CLIPTokenizer(ids, [], pad_token=pad, model_max_length=77)

    torch.manual_seed(0)
    (clip_l, tok_l), (clip_g, tok_g) = clip(16, 2, "<|endoftext|>", "quick_gelu"), clip(8, 3, "!", "gelu")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((a, -3.0) for a in letters)]
    t5 = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    transformer = SD3Transformer2DModel(sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=4,
                                        pos_embed_max_size=24, attention_head_dim=16, num_attention_heads=3,
                                        caption_projection_dim=48, joint_attention_dim=40, pooled_projection_dim=24,
                                        dual_attention_layers=(0, 1), qk_norm="rms_norm")
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
                        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, use_quant_conv=False,
                        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609)
    for param in transformer.parameters():
        param.data = torch.randn(param.shape) * 0.15
    folder = tmp_path_factory.mktemp("sd3")
    StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=clip_l,
        text_encoder_2=clip_g, text_encoder_3=t5, tokenizer=tok_l, tokenizer_2=tok_g,
        tokenizer_3=T5TokenizerFast(pieces, extra_ids=0)).save_pretrained(folder)
    return folder
