"""Importing a script or a module prints nothing, needs no optional package and is fast."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ["davae", "dit", "evaluate", "finetune", "sample", "train_vae"]       # a fork may have more
SUPPORT = sorted(f"support.{path.stem}" for path in ROOT.glob("support/*.py") if path.stem != "__init__")
OPTIONAL = ("triton", "torchvision", "lpips", "torch_fidelity", "diffusers", "transformers", "matplotlib",
            "sklearn", "huggingface_hub", "tensorboard", "wandb")


# torch takes seconds to import, once; each answer then comes from a child that has imported nothing else.
ONCE_EACH = """
import os, sys, time, torch
for lines in {programs}:
    if os.fork() == 0:
        exec(lines)
        sys.stdout.flush()
        os._exit(0)
    _, status = os.wait()
    if status:
        sys.exit(1)
"""


def run_each(programs):
    """What each program prints in a process of its own, in which torch has been imported."""
    done = subprocess.run([sys.executable, "-c", ONCE_EACH.format(programs=programs)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_a_script_prints_nothing_and_needs_no_optional_package():
    names = ["davae", "dit", "train_vae", "finetune", "evaluate"]
    assert set(names) < set(SCRIPTS)
    found = f"[m for m in {OPTIONAL} if m in sys.modules]"
    printed = run_each([f"import {name}; print({name!r}, {found})" for name in names])
    assert printed == [f"{name} []" for name in names]


def test_importing_everything_besides_torch_is_fast():
    program = f"""if True:
        since = time.process_time()
        import {", ".join(SCRIPTS + SUPPORT)}
        print(time.process_time() - since)"""
    seconds = [float(line) for line in run_each([program] * 3)]
    assert min(seconds) < 0.9                      # of the CPU; 0.3 s is the goal
