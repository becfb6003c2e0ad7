"""Importing a script or a module prints nothing, needs no optional package and is fast."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["davae", "dit", "evaluate", "finetune", "sample", "train_vae"]       # a fork may have more
SUPPORT = sorted(f"support.{path.stem}" for path in ROOT.glob("support/*.py") if path.stem != "__init__")
OPTIONAL = ("triton", "torchvision", "lpips", "torch_fidelity", "diffusers", "transformers", "matplotlib",
            "sklearn", "huggingface_hub", "tensorboard", "wandb")


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["davae", "dit", "train_vae", "finetune", "evaluate"])
def test_importing_a_script_prints_nothing_and_needs_no_optional_package(name):
    assert name in SCRIPTS
    done = run(f"import sys, {name}; print([m for m in {OPTIONAL} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_everything_besides_torch_is_fast():
    names = ", ".join(SCRIPTS + SUPPORT)
    code = f"""if True:
        import time, torch
        since = time.perf_counter()
        import {names}
        print(time.perf_counter() - since)"""
    seconds = [float(run(code).stdout) for _ in range(3)]
    assert min(seconds) < 0.9                      # 0.3 s is the goal; a busy machine takes longer
