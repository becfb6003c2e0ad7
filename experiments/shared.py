"""Shared by all experiments: the command line, a run with its held-out latents, and where results go.

An experiment is one short script that answers one question with numbers and a picture. Copy the pattern for
one of your own:

    1. the docstring: which figure or table, what it answers, the command, what it writes
    2. one function with the science, which takes tensors or a model and returns numbers or images
    3. main: open the run, call that function, write what it found

Each writes into the run's folder, or into --out=: <name>.json with its settings and numbers, <name>.png with
its curves, <name>_images.png with its pictures. A run of finetune.py works for all of them.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import evaluate
from support import config, data, figures, ranks, runs, weights
from support.config import field
from support.measurements import run_folder


@dataclass
class Config:
    run: str = field("out/tiny-vae", "a run of train_vae.py or finetune.py, or one of its step folders")
    out: str = field("", "folder for the results; empty: the run's")
    data_dir: str = field("", "held-out images; empty: procedural ones, for a run trained on those")
    images: int = field(1000, "held-out images to use, spread over the folder", within=(1, 10_000_000))
    other: str = field("", "a second DA-VAE to compare, for example one trained with --align=0")
    weights: str = field("ema", "which weights of a transformer", choices=("ema", "model"))
    device: str = field("auto", "where to compute", choices=("auto", "cpu", "cuda"))


@dataclass
class HeldOut:
    """A run, and its DA-VAE's latents of held-out images; all tensors on the CPU."""
    run: evaluate.Run
    x: torch.Tensor                # (N, 3, H, W) in [-1, 1]
    y: torch.Tensor                # (N,)
    classes: list                  # class names; empty: the images have none
    z_all: torch.Tensor            # (N, C+D, h, w), normalised
    groups: dict                   # {"base": z, "detail": z_d, "detail of <other>": the second DA-VAE's z_d}


@torch.no_grad()
def open_run(cfg):
    """The HeldOut of a run; images that cannot be read are skipped and counted.

    raises: SystemExit if the run or the second DA-VAE has no detail channels, or no image can be read.
    """
    run = evaluate.load(cfg.run, cfg.weights, cfg.device)
    runs.make_folder(folder_of(cfg))
    if not run.vae.D:
        raise SystemExit(f"{cfg.run}: has no detail channels to look at; wanted a DA-VAE, or a DiT on one")
    dataset, index = evaluate.held_out(run, cfg.data_dir, cfg.images)
    batches = list(data.read(dataset, index))
    if not batches:
        raise SystemExit(f"{cfg.data_dir}: none of {len(index)} images can be read; wanted held-out images")
    x = torch.cat([images for images, _, _ in batches])
    y = torch.cat([labels for _, labels, _ in batches])

    z_all = encode(run.vae, x, run.device)
    groups = {"base": z_all[:, :run.vae.C], "detail": z_all[:, run.vae.C:]}
    if cfg.other:
        vae = weights.load_davae(cfg.other).to(run.device)
        if not vae.D:
            raise SystemExit(f"--other={cfg.other}: has no detail channels to look at; wanted a DA-VAE")
        groups[f"detail of {Path(cfg.other).name}"] = encode(vae, x, run.device)[:, vae.C:]
    return HeldOut(run, x, y, dataset.classes, z_all, groups)


def folder_of(cfg):
    """Where an experiment writes: cfg.out, or the run's folder, also if cfg.run is one of its steps."""
    return Path(cfg.out or run_folder(cfg.run))


def encode(vae, x, device):
    """z_all (N, C+D, h, w) of images x (N, 3, H, W), ten at a time."""
    return torch.cat([vae.encode(part.to(device)).cpu() for part in x.split(10)])


def zero_details(vae):
    """The raw z_d = 0 of detail dropout in normalised units: (1, D, 1, 1)."""
    return (-vae.mean / vae.std).view(1, -1, 1, 1)


def write(name, cfg, run, table=None, panels=None, pictures=None, **settings):
    """Print and write the results of an experiment.  Returns the content of <name>.json.

    table: {row: {column: number}}.
    panels: curves, each panel (x label, y label, line style, {curve: [x, y]}).
    pictures: {row: images (n, 3, H, W) in [-1, 1]}, the same n in each.
    settings: what else the numbers depend on, besides cfg and the run.
    """
    folder = folder_of(cfg)
    runs.make_folder(folder)
    found = {"settings": dataclasses.asdict(cfg) | evaluate.provenance(run) | settings}
    if table:
        figures.print_table(name, table)
        found["table"] = table
    if panels:
        figures.plot(panels, folder / f"{name}.png")
        found["panels"] = panels
    if pictures:
        labels = [row for row, images in pictures.items() for _ in images]
        x = torch.cat([images.cpu() for images in pictures.values()])
        columns = len(next(iter(pictures.values())))
        figures.save_grid(x, folder / f"{name}_images.png", columns, max(1, 144 // x.shape[-1]), labels)
    runs.write_json(folder / f"{name}.json", found)
    print(f"\nwrote {folder}/{name}.json and its pictures")
    return found


def start(main, Config=Config):
    """Run an experiment's main with a Config from the command line."""
    if Config.__module__ == __name__:                  # --help prints the docstring of the Config's module
        Config = type("Config", (Config,), {"__module__": main.__module__})
    try:
        ranks.launch(main, config.cli(Config))
    except ImportError as error:                       # scikit-learn, torch-fidelity, lpips, matplotlib
        raise SystemExit(f"{error}; install what is missing with: pip install -r requirements.txt") from None
