"""support/ranks.py: batches and seeds that do not depend on the ranks, signals, memory, runs of several processes."""
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
import train_vae
from support import ranks, runs


@pytest.mark.parametrize("batch,micro,world,count", [(64, 64, 1, 1), (64, 16, 1, 4), (640, 80, 8, 1), (48, 20, 1, 3), (8, 80, 8, 1)])
def test_micro_batches_share_the_global_batch_equally(batch, micro, world, count):
    assert ranks.micro_batches(batch, micro, world) == count
    assert batch // world % count == 0 and batch // world // count <= micro


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(SystemExit, match="batch_size 7 is not 2 ranks"):
        ranks.micro_batches(7, 4, 2)


def test_reseeding_depends_on_seed_rank_and_step_only():
    def draw(*key):
        ranks.seed_step(*key)
        return torch.randn(4)

    first = draw(0, 1, 2)
    torch.randn(100)
    assert torch.equal(draw(0, 1, 2), first)
    assert all(not torch.equal(draw(*other), first) for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)))


def test_sigterm_finishes_the_step_saves_and_exits_with_zero(same_weights, davae_config, tmp_path, interrupt):
    straight, stopped = (davae_config(tmp_path / name, steps=300, image_size=16, gan=0.0) for name in "ab")
    step = interrupt(train_vae.main, stopped, signal.SIGTERM)
    for cfg in (straight, stopped):
        train_vae.main(replace(cfg, steps=step + 2, cooldown=0.0))
    assert same_weights(straight, stopped)


def test_out_of_memory_is_answered_with_the_flags_to_try_in_order(vae_config, tmp_path):
    def main(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(SystemExit, match="(?s)Tried to allocate 20 GiB.*--micro_batch=8 .*, a smaller model"):
        ranks.launch(main, vae_config(tmp_path))


# ---------------------------------------------------------------- several processes


def losses_of(out):
    return [{k: v for k, v in json.loads(line).items() if k not in ("img/s", "GB")} for line in open(Path(out) / "log.jsonl")]


def test_two_processes_lose_what_one_does_and_resume_each_others_runs(davae_config, tmp_path, launch):
    one, two = (davae_config(tmp_path / name, micro_batch=2, image_size=32, crop=24, disc_start=1, steps=3) for name in "ab")
    process = launch(train_vae.main, two, ranks=2)
    out, err = process.communicate()
    assert process.returncode == 0 and "batch 4 = 2 ranks x 2 x 1" in out, err[-3000:]
    train_vae.main(one)
    for a, b in zip(losses_of(one.out), losses_of(two.out), strict=True):
        assert a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=2e-3, abs_tol=1e-5) for k in a), (a, b)
    train_vae.main(replace(two, steps=4))                          # two, then one
    process = launch(train_vae.main, replace(one, steps=4), ranks=2)                               # one, then two
    out, err = process.communicate()
    assert process.returncode == 0 and losses_of(one.out)[-1]["step"] == losses_of(two.out)[-1]["step"] == 4, err[-3000:]


@pytest.mark.parametrize("fault, sentence", [
    ("raise ZeroDivisionError('a rank that dies')", "ZeroDivisionError: a rank that dies"),
    ("loss = loss * torch.tensor(float('nan'))", "first bad parameter")])
def test_one_rank_that_fails_ends_all_within_seconds_and_says_why(davae_config, tmp_path, launch, fault,
                                                                  sentence):
    cfg = davae_config(tmp_path / "a", micro_batch=2, image_size=16, steps=100_000, gan=0.0, log_every=10_000)
    process = launch(train_vae.main, cfg, f"""
original, count = script.vae_loss, []
def vae_loss(*args):
    loss, parts = original(*args)
    count.append(1)
    if RANK == 1 and len(count) == 5:
        {fault}
    return loss, parts
script.vae_loss = vae_loss""", ranks=2)
    start = time.time()
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and sentence in err and runs.step_of(cfg.out) == 0, err[-3000:]
    assert time.time() - start < 40, "of which 10 are for Python to start"


def test_two_processes_lose_what_one_does_and_one_continues_their_run(finetune_config, tmp_path):
    one, two = (finetune_config(tmp_path / name, steps=2, micro_batch=2) for name in ("one", "two"))
    flags = [f"--{k}={v}" for k, v in two.__dict__.items() if k != "preset"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, finetune.__file__, "tiny", *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "batch 8 = 2 ranks x 2 x 2" in done.stdout and done.stdout.count("batch 8 =") == 1      # rank 0 prints
    finetune.main(one)
    rows = [[json.loads(line) for line in open(Path(cfg.out) / "log.jsonl")] for cfg in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert all(math.isclose(a[k], b[k], rel_tol=1e-4) for k in ("loss", "base", "detail", "gnorm")), (a, b)
    finetune.main(replace(two, steps=3))
    assert [json.loads(line)["step"] for line in open(tmp_path / "two" / "log.jsonl")] == [1, 2, 3]


def test_a_model_sharded_over_two_processes_trains_and_saves_like_a_whole_one(
        finetune_config, tmp_path, launch):
    whole, shards = (finetune_config(tmp_path / name, steps=2, micro_batch=2) for name in ("whole", "shards"))
    process = launch(finetune.main, replace(shards, shard=True), ranks=2)
    out, err = process.communicate()
    assert process.returncode == 0 and out.count("max |v - v_base| = 0.0") == 1, err[-3000:]
    finetune.main(whole)
    process = launch(finetune.main, replace(whole, steps=3, shard=True), ranks=2)                  # whole, then sharded
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    finetune.main(replace(shards, steps=3))                                                        # and the other way round
    for step in (2, 3):
        for name in ("model", "ema"):
            a, b = (load_file(Path(cfg.out) / f"step_{step:06d}" / f"{name}.safetensors") for cfg in (whole, shards))
            assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=3e-4) for k in a)
    with pytest.raises(SystemExit, match="start it with torchrun"):
        finetune.main(replace(whole, out=str(tmp_path / "one"), shard=True))
