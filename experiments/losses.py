"""How do base and detail loss fall while w(n) rises?  Fig. S3 of the paper.

    python experiments/losses.py out/tiny

Reads the log of a run of finetune.py; no images are needed. Writes losses.json and losses.png: both losses
over the steps, as logged and smoothed.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import numpy as np

import evaluate
from experiments import shared


def losses(log):
    """{"base", "detail": {curve: [steps, mean (v - v*)^2]}} of a log.jsonl: as logged, and smoothed.

    Smoothed: the mean of neighbouring log lines, a fifth of them all; fewer at the ends.
    raises: SystemExit unless it is a DA-VAE run's.
    """
    rows = []
    if log.exists():
        rows = [row for row in map(json.loads, log.read_text().splitlines()) if "detail" in row]
    if not rows:
        raise SystemExit(f"{log}: wanted the log of a DA-VAE run of finetune.py, with at least one line")
    steps = [row["step"] for row in rows]
    window = np.ones(len(rows) // 10 * 2 + 1)
    found = {}
    for name in ("base", "detail"):
        logged = np.array([row[name] for row in rows])
        sums = np.convolve(logged, window, "same")
        counts = np.convolve(np.ones_like(logged), window, "same")
        found[name] = {
            "as logged": [steps, logged.tolist()],
            f"mean of {len(window)}": [steps, (sums / counts).tolist()],
        }
    return found


def main(cfg):
    run = evaluate.load(cfg.run, cfg.weights, cfg.device)
    found = losses(run.checkpoint.parent / "log.jsonl")
    panels = [("step", f"{name}: mean (v - v*)^2", "-", curves) for name, curves in found.items()]
    return shared.write("losses", cfg, run, panels=panels)


if __name__ == "__main__":
    shared.start(main)
