"""Make images with a run of finetune.py: Euler's method on the flow from noise (t = 0) to data (t = 1).

    python sample.py out/tiny --n=100 --cfg=2
    torchrun --nproc_per_node=8 sample.py out/imagenet512 --n=50000 --steps=249 --cfg=4 --cfg_start=0.2 --shift=0.3

Writes to --out: 000000.png ..., grid.png (one row per class), base_preview.png (the same latents through the base decoder
alone), samples.npz (arr_0, uint8 NHWC, as guided-diffusion's evaluator reads it) and settings.json. A folder that is
half full is continued. Image i depends on (seed, i) only, not on the batch size or the number of processes.
"""
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import common
import data
from common import field
from davae import load_davae
from dit import load_dit


@dataclass
class Config:
    run: str = field("out/tiny", "a run of finetune.py, or one of its step folders")
    out: str = field("", "folder for the images; empty: <run>/samples")
    n: int = field(50, "images")
    batch_size: int = field(50, "images per forward pass and process")
    seed: int = field(0, "of the noise")
    classes: tuple = field((), "class ids to draw, in turn; empty: all of them")
    steps: int = field(50, "Euler steps = model evaluations (LightningDiT's '250 steps' are 249)")
    shift: float = field(-1.0, "s of shift_time, 1: an even grid; negative: what the run was set up with")
    cfg: float = field(-1.0, "guidance scale, 1: none; negative: what the run was set up with")
    cfg_start: float = field(0.0, "guidance is on where cfg_start <= t <= cfg_end")
    cfg_end: float = field(1.0, "see cfg_start")
    cfg_channels: int = field(0, "guide the first channels only; 0: all. 3 reproduces LightningDiT's published figures")
    weights: str = field("ema", "ema or model")
    device: str = field("auto", "auto, cpu or cuda")


# ---------------------------------------------------------------- the sampler


def shift_time(t, s):
    """t' = s t / (1 - t + s t): s < 1 spends more steps near the noise, s = 1 changes nothing, 0 and 1 stay.

    LightningDiT's s = 0.3 is 1/0.3 = 3.33 in SD3's convention, where time runs the other way.
    """
    return s * t / (1 - t + s * t)


def time_grid(steps, shift=1.0):
    """steps + 1 floats from 0 to 1, computed in float64 and kept as Python numbers, so that no step waits for a GPU."""
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


def guided_velocity(model, x, t, y, null, scale, channels=None):
    """Classifier-free guidance v = u + scale * (c - u) on the first `channels` channels (None: all), c on the others.

    x: (B, C+D, h, w), t: float, y: (B,) labels, null: the label that stands for none. One batch of 2B, c first.
    """
    c, u = model(torch.cat([x, x]), torch.full((2 * len(x),), t, device=x.device),
                 torch.cat([y, torch.full_like(y, null)])).chunk(2)
    k = channels or x.shape[1]
    return torch.cat([u[:, :k] + scale * (c[:, :k] - u[:, :k]), c[:, k:]], dim=1)


@torch.no_grad()
def sample_flow(model, noise, ts, y, null, scale=1.0, interval=(0.0, 1.0), channels=None):
    """Integrate dx/dt = v(x, t) from noise by Euler's method on the grid `ts`, guided where interval[0] <= t <= interval[1].

    noise: (B, C+D, h, w); ts: increasing floats, 0 to 1; returns the latent at ts[-1], float32. Outside the interval, and
    with scale 1, the unconditional pass is not computed at all: len(ts) - 1 passes of B plus one per guided step.
    """
    x = noise
    for t, t_next in zip(ts[:-1], ts[1:]):
        if scale != 1.0 and interval[0] <= t <= interval[1]:
            v = guided_velocity(model, x, t, y, null, scale, channels)
        else:
            v = model(x, torch.full((len(x),), t, device=x.device), y)
        x = x + (t_next - t) * v
    return x


def sample_noise(seed, indices, shape):
    """Standard normal (len(indices), *shape), row i from a generator seeded with (seed, indices[i]) alone.

    NumPy's, because torch's CPU generator keeps 32 bits of a seed: too few for one seed per pair.
    """
    rows = [np.random.default_rng((seed, int(i))).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def sample_labels(indices, classes):
    """Label of sample i: the classes in turn, so that any n is as balanced as it can be."""
    return torch.tensor([classes[int(i) % len(classes)] for i in indices])


# ---------------------------------------------------------------- the script


def load_run(run, weights="ema", device="cpu"):
    """(dit, vae, config) of a run of finetune.py or one of its step folders, in eval mode."""
    checkpoint = common.latest_checkpoint(run)
    config = common.read_config(checkpoint)
    if config.get("script") != "finetune.py":
        raise SystemExit(f"{run}: holds a checkpoint of {config.get('script')}; wanted a run of finetune.py")
    vae = load_davae(checkpoint.parent / "vae")
    return load_dit(checkpoint, weights).to(device), vae.to(device), config


def settings_of(cfg, config, checkpoint):
    """Everything the images depend on, with the run's own defaults filled in.  raises: SystemExit on impossible values."""
    own = config["config"]
    classes = list(cfg.classes) or list(range(config["model"]["num_classes"]))
    values = dict(checkpoint=str(checkpoint), weights=cfg.weights, seed=cfg.seed, steps=cfg.steps, classes=classes,
                  shift=own["shift"] if cfg.shift < 0 else cfg.shift, cfg=own["cfg"] if cfg.cfg < 0 else cfg.cfg,
                  cfg_start=cfg.cfg_start, cfg_end=cfg.cfg_end, cfg_channels=cfg.cfg_channels)
    if cfg.n < 1 or cfg.steps < 1 or values["shift"] == 0 or not values["cfg"] < float("inf"):
        raise SystemExit(f"n={cfg.n}, steps={cfg.steps}, shift={values['shift']}, cfg={values['cfg']}: wanted n and steps of "
                         "at least 1, shift above 0 and a finite cfg")
    if max(classes) > config["model"]["num_classes"]:
        raise SystemExit(f"class {max(classes)} asked for; the model has classes 0 to {config['model']['num_classes'] - 1} "
                         f"({config['model']['num_classes']} draws without a class)")
    return values


def generate(dit, vae, indices, s):
    """(images, previews): samples `indices` through the whole decoder and through the base decoder, in [-1, 1]."""
    device = next(dit.parameters()).device
    noise = sample_noise(s["seed"], indices, (vae.C + dit.cfg.D, dit.cfg.grid * dit.cfg.p, dit.cfg.grid * dit.cfg.p))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        labels = sample_labels(indices, s["classes"]).to(device)
        z_all = sample_flow(dit, noise.to(device), time_grid(s["steps"], s["shift"]), labels, dit.cfg.num_classes, s["cfg"],
                            (s["cfg_start"], s["cfg_end"]), s["cfg_channels"] or None)
    with torch.no_grad():
        base = vae.decode_base(z_all[:, :vae.C])
        return (vae.decode(z_all) if dit.cfg.D or not vae.D else base).clamp(-1, 1), base.clamp(-1, 1)


def main(cfg):
    """Draw cfg.n images into a folder.  Returns that folder."""
    rank, world, device = common.setup(cfg.device)
    dit, vae, config = load_run(cfg.run, cfg.weights, device)
    settings = settings_of(cfg, config, common.latest_checkpoint(cfg.run))
    out = Path(cfg.out or Path(cfg.run) / "samples")
    out.mkdir(parents=True, exist_ok=True)
    if (out / "settings.json").exists():
        old = json.loads((out / "settings.json").read_text())
        if old != settings:
            what = ", ".join(f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v)
            raise SystemExit(f"{out} holds images made with other settings ({what}): give another --out, or remove it")
    elif rank == 0:
        common.write_json(out / "settings.json", settings)

    todo = [i for i in range(cfg.n) if not (out / f"{i:06d}.png").exists()][rank::world]
    start, previews = time.time(), []
    for k in tqdm(range(0, len(todo), cfg.batch_size), desc=str(out), disable=rank > 0, mininterval=1):
        indices = todo[k:k + cfg.batch_size]
        images, base = generate(dit, vae, indices, settings)
        for i, image in zip(indices, data.to_uint8(images)):
            save_png(image, out / f"{i:06d}.png")
    if world > 1:
        dist.barrier()
    if rank == 0:
        print(f"{out}: {len(todo)} new images, {cfg.n} in all; {len(todo) / max(1e-9, time.time() - start):.1f} img/s here")
        write_overview(dit, vae, config, settings, out, cfg.n)
    return out


def save_png(image, path):
    """Write uint8 (H, W, 3) beside `path` and rename it, so that a folder holds whole images only."""
    temporary = path.with_suffix(".tmp")
    Image.fromarray(image).save(temporary, format="png")
    temporary.replace(path)


def write_overview(dit, vae, config, settings, out, n):
    """samples.npz of all images, and for up to ten classes x eight images grid.png and base_preview.png."""
    arrays = np.stack([np.asarray(Image.open(out / f"{i:06d}.png")) for i in range(n)])
    with open(out / "samples.npz.tmp", "wb") as f:
        np.savez(f, arr_0=arrays)
    (out / "samples.npz.tmp").replace(out / "samples.npz")
    turn, names = settings["classes"], [*config["classes"]] or ["image"]
    columns = max(1, min(8, n // len(turn)))
    indices = [row + column * len(turn) for row in range(min(10, len(turn))) for column in range(columns)]
    indices = [i for i in indices if i < n]
    labels = [(names + ["no class"])[k] for k in sample_labels(indices, turn)]
    images, base = generate(dit, vae, indices, settings)
    for name, x in (("grid.png", images), ("base_preview.png", base)):
        data.save_grid(x, out / name, columns, scale=max(1, 128 // x.shape[-1]), labels=labels)


if __name__ == "__main__":
    main(common.cli(Config))
