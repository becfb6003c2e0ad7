"""Shared fixtures: where the small golden files are, and which tests are skipped, with the reason."""
import json
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
