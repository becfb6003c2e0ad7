"""How do base and detail loss fall while w(n) rises?  Fig. S3 of the paper.

    python experiments/losses.py out/tiny

Reads the log of a run of finetune.py; no images are needed. Writes losses.json and losses.png: both losses
over the steps, as logged and smoothed.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import numpy as np

import evaluate
from experiments import shared
from support.figures import read_log


def losses(folder):
    """{"base", "detail": {curve: [steps, mean (v - v*)^2]}} of a run's log.jsonl: as logged, and smoothed.

    Smoothed: the mean over neighbouring log lines, a fifth of all lines; fewer at the ends.
    raises: SystemExit unless it is the log of a DA-VAE run of finetune.py.
    """
    curves = read_log(folder) if (folder / "log.jsonl").exists() else {}
    if "detail" not in curves:
        raise SystemExit(f"{folder}/log.jsonl: wanted the log of a DA-VAE run of finetune.py, with at least "
                         "one line")
    found = {}
    for name in ("base", "detail"):
        steps, logged = curves[name]
        window = np.ones(len(logged) // 10 * 2 + 1)
        sums = np.convolve(logged, window, "same")
        counts = np.convolve(np.ones(len(logged)), window, "same")
        found[name] = {
            "as logged": [steps, logged],
            f"mean of {len(window)}": [steps, (sums / counts).tolist()],
        }
    return found


def main(cfg):
    run = evaluate.load(cfg.run, cfg.weights, cfg.device)
    found = losses(run.checkpoint.parent)
    panels = [("step", f"{name}: mean (v - v*)^2", "-", curves) for name, curves in found.items()]
    return shared.write("losses", cfg, run, panels=panels)


if __name__ == "__main__":
    shared.start(main)
