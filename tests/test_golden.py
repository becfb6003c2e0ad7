"""The first four steps of each stage reproduce the golden losses (float32, made on 2026-11-27).

The last bits of a float32 loss depend on the processor, and AdamW's first steps follow even the signs of
gradients that are only rounding error: at the presets' learning rates, numbers differ by up to 8 % between
processors. At these small rates they agree to 5e-6 (AVX2 and SSE4), and one update changes them by 4e-4.
`python tests/same_as.py COMMIT` compares every bit, on one machine.
"""
import json
from pathlib import Path

import pytest

import finetune
import train_vae

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "golden_losses.json").read_text())
SHORT = dict(steps=4, save_every=4, log_every=1, images=16, device="cpu", dtype="float32", lr=1e-5)


def log_of(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The four stages of the tiny preset as it was when the goldens were made, four steps each."""
    folder = tmp_path_factory.mktemp("golden")
    out = {name: str(folder / name) for name in GOLDEN}

    def train(script, preset, stage, **changes):
        values = script.PRESETS[preset] | SHORT | changes
        script.main(script.Config(**values | dict(preset=preset, out=out[stage])))

    train(train_vae, "tiny-base", "base VAE", stats=16)
    train(train_vae, "tiny", "DA-VAE", base=out["base VAE"], stats=16, gan=0.1, disc_start=2, disc_lr=0.01,
          adaptive_align=True, fit="random", train="all", batch_size=8)
    train(finetune, "tiny-base", "base DiT", vae=out["DA-VAE"], sample_steps=2, cosine=0.0)
    train(finetune, "tiny", "DA-VAE DiT", vae=out["DA-VAE"], base=out["base DiT"], sample_steps=2, N=3,
          cosine=0.0)
    return out


@pytest.mark.parametrize("stage", GOLDEN)
def test_the_losses_of_the_first_steps_match_the_goldens(runs, stage):
    for row, golden in zip(log_of(runs[stage]), GOLDEN[stage], strict=True):
        logged = {name: row[name] for name in golden}
        assert logged == pytest.approx(golden, rel=5e-5, abs=1e-6)
