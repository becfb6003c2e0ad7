"""The scripts on a pretended GPU (tests/pretended_gpu.py): everything is moved where it belongs."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from support import data

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("g++")), reason="compiles a few lines with g++, on Linux")


def run(*words, cwd):
    """The output of tests/pretended_gpu.py, which must succeed."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "pretended_gpu.py"), *words], cwd=cwd,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_what_a_gpu_would_refuse_is_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import torch
gpu, cpu = torch.ones(3, device="cuda"), torch.ones(3)
generator = torch.Generator()
weight = torch.ones(3, device="cuda", requires_grad=True)
tries = dict(
    sum=lambda: gpu + cpu,
    in_place=lambda: cpu.add_(gpu),
    index_on_the_gpu=lambda: cpu[gpu.long()],
    generator=lambda: torch.randn(3, device="cuda", generator=generator),
    numpy=lambda: gpu.numpy(),
    gradient=lambda: torch.autograd.grad((weight * gpu).sum(), weight, cpu),
    fine=lambda: (gpu + 1.0 + torch.tensor(1.0))[torch.tensor([0])].cpu() + cpu[0])
for name, action in tries.items():
    try:
        action()
        print(name, "allowed")
    except (AssertionError, TypeError, RuntimeError):
        print(name, "refused")
(weight * gpu).sum().backward()
print("gradient on", weight.grad.device, weight.grad.tolist())
""")
    lines = run(str(script), cwd=tmp_path).splitlines()
    assert lines[:7] == [f"{name} refused" for name in (
        "sum", "in_place", "index_on_the_gpu", "generator", "numpy", "gradient")] + ["fine allowed"]
    assert lines[7] == "gradient on cuda:0 [1.0, 1.0, 1.0]"


def test_every_script_runs_on_a_gpu_and_a_training_step_waits_for_it_once(tmp_path):
    """Each operator takes a pretended GPU so long that the models are as small as their kind allows."""
    steps = 4
    vae = f"--images=32 --stats=16 --log_every={steps} --micro_batch=4"
    dit = f"--images=32 --vae=vae --sample_steps=2 --log_every={steps} --micro_batch=16"
    jobs = [f"train_vae.py tiny-base {vae} --out=base-vae --steps=2 --blocks=1",
            f"train_vae.py tiny {vae} --out=vae --base=base-vae --steps={steps} --disc_start=0 --train=all "
            "--adaptive_align=True --fit=closed --crop=32,64 --flip=True",
            f"finetune.py tiny-base {dit} --out=base --steps=2 --depth=2",
            f"finetune.py tiny {dit} --out=run --base=base --steps={steps}",
            "sample.py run --n=4 --steps=2 --cfg=2 --cfg_start=0.2",
            "evaluate.py run --n=8 --images=16 --steps=2"]
    out = run(*" -- ".join(jobs).split(), cwd=tmp_path)
    assert f"steps 0 to {steps}, cuda:0" in out and "warm start off by 0.0" in out
    assert (tmp_path / "run" / "samples" / "grid.png").exists()

    # of what runs in each step, only the check that the gradients are finite waits: VAE, discriminator, DiT
    rows = [line.split() for line in out.splitlines() if line.startswith("waited ")]
    waits = {words[-1]: int(words[1]) for words in rows}
    assert waits["stop_if_not_finite"] == (2 + 2 * steps) + (2 + steps)
    loops = {"main", "flow_loss", "vae_loss", "alignment", "adaptive_weight", "training_batch", "draw_time",
             "train_discriminator", "micro_batches", "ema_update", "add", "forward", "detail_posterior"}
    assert not loops & waits.keys()


@pytest.mark.slow
def test_text_to_image_runs_on_a_gpu_and_embeddings_do_not_wait_for_it(sd3_folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    drawn = data.Procedural(32, 8, 0)
    for i in range(8):
        Image.fromarray(drawn.image(i)[0]).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"drawing {i % 3}")
    steps = 3
    small = f"--data_dir={photos} --image_size=32 --batch_size=4 --log_every={steps}"
    jobs = [f"train_vae.py tiny {small} --out=vae --base={sd3_folder} --D=4 --gan=0 --stats=4 --steps=2",
            f"sample.py text {sd3_folder} --out=text --data_dir={photos} --t5_tokens=24",
            f"finetune.py sd35m-1024 {small} --out=run --vae=vae --base={sd3_folder} --text=text "
            f"--t5_tokens=24 --D=4 --lora=4 --N=2 --steps={steps} --micro_batch=2 --sample_steps=2",
            "sample.py run --n=2 --steps=2"]
    out = run(*" -- ".join(jobs).split(), cwd=tmp_path)
    assert f"steps 0 to {steps}, cuda:0" in out and "warm start, 4 latents" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("waited ")]
    waits = {words[-1]: int(words[1]) for words in rows}
    assert waits["stop_if_not_finite"] == 2 + steps
    assert not {"main", "__call__", "ahead", "read", "start", "flow_loss", "draw_time"} & waits.keys()
