"""support/ranks.py: batches and seeds for any number of ranks, signals, memory, several processes."""
import copy
import errno
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import davae
import evaluate
import finetune
import sample
import train_vae
from support import held_out, latents, ranks, runs


@pytest.mark.parametrize("batch,micro,world,count", [
    (64, 64, 1, 1), (64, 16, 1, 4), (640, 80, 8, 1), (48, 20, 1, 3), (8, 80, 8, 1)])
def test_micro_batches_share_the_global_batch_equally(batch, micro, world, count):
    assert ranks.accumulation(batch, micro, world) == count
    assert batch // world % count == 0
    assert batch // world // count <= micro


def test_a_refused_batch_size_comes_with_the_nearest_that_divides():
    for batch, micro, world in ((7, 4, 2), (100, 32, 8), (1, 8, 4), (13, 5, 1)):
        with pytest.raises(SystemExit, match=f"batch_size {batch} is not {world} ranks") as refused:
            ranks.accumulation(batch, micro, world)
        ranks.accumulation(int(str(refused.value).rpartition("=")[2]), micro, world)
    for batch, micro, world, nearest in ((50, 8, 3, 48), (100, 32, 8, 96), (13, 5, 1, 12), (1, 8, 4, 4)):
        with pytest.raises(SystemExit, match=f"give --batch_size={nearest}$"):
            ranks.accumulation(batch, micro, world)


def test_an_autoencoder_gets_at_most_four_megapixels_or_one_image_at_once():
    assert [ranks.at_once(8, side, side) for side in (64, 1024, 2048, 8192)] == [8, 4, 1, 1]
    assert ranks.at_once(64, 512, 1024) == 8


def test_a_number_of_processes_that_torchrun_did_not_set_is_no_number_of_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")                          # as in some clusters' containers
    monkeypatch.delenv("RANK", raising=False)
    assert ranks.setup("cpu")[:2] == (0, 1)


def test_reseeding_depends_only_on_seed_part_and_step():
    def draw(*key):
        ranks.seed_step(*key)
        return torch.randn(4)

    first = draw(0, 1, 2)
    torch.randn(100)
    assert torch.equal(draw(0, 1, 2), first)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(draw(*other), first)


@pytest.mark.parametrize("saved,now", [(torch.contiguous_format, torch.channels_last),
                                       (torch.channels_last, torch.contiguous_format)])
def test_an_optimizer_saved_in_one_memory_layout_resumes_in_another(saved, now):
    """As between a GPU, which trains narrow VAEs in channels_last, and a CPU, which does not."""
    def step(opt, seed):
        for group in opt.param_groups:
            for p in group["params"]:                              # a gradient is laid out like its parameter
                generator = torch.Generator().manual_seed(seed)
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        opt.step()

    layer, other = [torch.nn.Conv2d(3, 5, 3).to(memory_format=layout) for layout in (saved, now)]
    opt, resumed = [torch.optim.AdamW(each.parameters(), lr=0.1, fused=True) for each in (layer, other)]
    step(opt, 1)
    other.load_state_dict(layer.state_dict())
    ranks.load_optimizer(resumed, copy.deepcopy(opt.state_dict()))
    step(opt, 2)
    step(resumed, 2)
    for a, b in zip(layer.parameters(), other.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux which files are mapped")
def test_a_resumed_optimizer_does_not_keep_the_checkpoints_file_open(tmp_path):
    layer = torch.nn.Linear(3, 5)
    opt, resumed = [torch.optim.AdamW(layer.parameters()) for _ in range(2)]
    layer(torch.ones(3)).sum().backward()
    opt.step()
    torch.save(opt.state_dict(), tmp_path / "train_state.pt")
    state = runs.read_state_dict(tmp_path / "train_state.pt")
    assert str(tmp_path) in Path("/proc/self/maps").read_text()    # weight files are mapped, not read
    ranks.load_optimizer(resumed, state)
    del state
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert resumed.state_dict()["state"][0]["step"] == 1


def test_sigterm_finishes_the_step_saves_and_exits_with_zero(davae_config, same_weights, tmp_path, interrupt):
    straight = davae_config(tmp_path / "a", steps=300, image_size=16, gan=0.0)
    stopped = replace(straight, out=str(tmp_path / "b"))
    step = interrupt(train_vae.main, stopped, signal.SIGTERM)
    for cfg in (straight, stopped):
        train_vae.main(replace(cfg, steps=step + 2, cooldown=0.0))
    assert same_weights(straight, stopped)


def test_one_ctrl_c_asks_to_stop_and_a_second_stops_at_once(monkeypatch):
    monkeypatch.setattr(ranks, "ASKED", [])
    try:
        ranks.heed_signals()
        assert not ranks.asked_to_stop()
        signal.raise_signal(signal.SIGINT)
        assert ranks.asked_to_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        ranks.heed_signals(False)


SIGNALLED = """
import signal
from support import ranks
ranks.heed_signals()
for _ in range(3):
    signal.raise_signal(signal.SIGTERM)
    assert ranks.asked_to_stop()
print("saved")
signal.raise_signal(signal.SIGINT)
"""


def test_a_second_sigterm_which_torchrun_forwards_does_not_stop_at_once_but_ctrl_c_does(fork):
    out, err = fork(SIGNALLED).communicate(timeout=120)
    assert out == "saved\n" and err.endswith("KeyboardInterrupt\n")
    assert err.count("stopping after the step at hand, which is saved; Ctrl-C stops at once") == 1


def test_all_ranks_stop_if_one_is_asked_to(monkeypatch):
    monkeypatch.setattr(ranks, "ASKED", [])
    monkeypatch.setattr(ranks, "sum_over_ranks", lambda x: x + 1)              # another rank was asked
    assert ranks.asked_to_stop()


@pytest.mark.parametrize("count, world", [(7, 3), (2, 4), (8, 4), (0, 2)])
def test_ranks_get_equal_shares_that_together_hold_each_number_once(monkeypatch, count, world):
    shares = []
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(ranks, "this_rank", lambda rank=rank: rank)
        shares.append(ranks.my_share(count))
    assert len(set(map(len, shares))) == 1
    together = sorted(sum(shares, []))
    assert together == list(range(len(together))) and count <= len(together) < count + world


def test_micro_batch_seeds_are_distinct_and_the_same_for_any_number_of_ranks(monkeypatch):
    def seeds(world):
        found = []
        for rank in range(world):
            monkeypatch.setattr(ranks, "this_rank", lambda rank=rank: rank)
            for _ in ranks.micro_batches(None, 4 // world, torch.zeros(8 // world), seed=1, step=5):
                found.append(torch.initial_seed())
        return found

    assert seeds(1) == seeds(2) == seeds(4) and len(set(seeds(4))) == 4


@pytest.mark.parametrize("dtype, device, has, wanted", [
    ("auto", "cuda", {}, True), ("auto", "cpu", {}, False), ("auto", "cpu", {"avx512_bf16": True}, True),
    ("auto", "cpu", {"amx_bf16": True, "avx512_bf16": False}, True), ("bfloat16", "cpu", {}, True),
    ("float32", "cuda", {}, False), ("float32", "cpu", {"amx_bf16": True}, False)])
def test_bfloat16_is_used_if_asked_for_or_if_auto_finds_support(monkeypatch, dtype, device, has, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert ranks.in_bfloat16(dtype, torch.device(device)) == wanted


def test_out_of_memory_suggests_flags_to_try_in_order(vae_config, tmp_path):
    def main(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(SystemExit, match="(?s)Tried to allocate 20 GiB.*--micro_batch=8 .*, a smaller model"):
        ranks.launch(main, vae_config(tmp_path))


HUGE = {
    "torch": lambda: torch.empty(10**15),
    "torch's sizes": lambda: torch.empty(10**10, 10**10),
    "numpy": lambda: np.empty(10**15),
    "numpy's sizes": lambda: np.empty((10**10, 10**10)),
    "python": lambda: bytearray(10**15),
    "python's sizes": lambda: len(range(10**30)),
}


@pytest.mark.parametrize("kind", HUGE)
def test_running_out_of_machine_memory_gives_the_same_advice(kind, vae_config, tmp_path):
    sentence = "(?s)^[^\\n]{10,200}\nTry, in this order: --micro_batch=8"
    with pytest.raises(SystemExit, match=sentence) as stop:
        ranks.launch(lambda cfg: HUGE[kind](), vae_config(tmp_path))
    assert "enforce fail" not in str(stop.value)


def test_other_errors_of_the_same_types_keep_their_traceback():
    for error in (RuntimeError("shapes differ"), OSError("no device"), OverflowError("math range error")):
        def main(cfg, error=error):
            raise error
        with pytest.raises(type(error)):
            ranks.launch(main, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_missing_gpu_gets_one_sentence(vae_config, tmp_path):
    with pytest.raises(SystemExit, match="--device=cuda: 0 GPUs that torch can use, wanted at least 1"):
        train_vae.main(vae_config(tmp_path / "run", device="cuda"))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_under_torchrun_one_process_exports_and_writes_the_report(rank, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")                          # the other process is not there to answer
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["sample.py", "export", tiny_run, f"--out={tmp_path}/exported"])
    runpy.run_path(sample.__file__, run_name="__main__")
    monkeypatch.setenv("RANK", rank)
    evaluate.command_line(["report", tiny_run, f"--out={tmp_path}/report.html", "--images=1", "--n=1"])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == ({"exported", "report.html"} if rank == "0" else set())


COMPILED = """
import warnings, torch
from support import ranks
ranks.setup("cpu")
graphs = []
def count(graph, inputs):
    graphs.append(graph)
    return graph.forward
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(800, 800) for _ in range(24))
    def forward(self, x):
        for layer in self.layers:                                  # 61 MB; DDP's buckets have 25
            x = layer(x)
        return x
block = Block()
block.compile(backend=count, dynamic=False)
with warnings.catch_warnings(action="error", category=FutureWarning):
    model = ranks.replicated(torch.nn.Sequential(block))
model(torch.ones(2, 800)).sum().backward()
print(f"rank {ranks.this_rank()}: {len(graphs)} graph", flush=True)
torch.distributed.destroy_process_group()
"""


def test_a_compiled_block_stays_one_graph_in_several_processes(fork):
    out, err = fork(COMPILED, ranks=2).communicate(timeout=120)
    assert "rank 0: 1 graph\n" in out and "rank 1: 1 graph\n" in out, err[-3000:]


def test_one_process_computes_with_all_cores_while_the_others_wait(monkeypatch):
    threads = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    for world, set_by_user, then in ((8, 1, 64), (8, 4, 4), (1, 1, 1)):
        monkeypatch.setattr(ranks, "world_size", lambda world=world: world)
        threads.append(set_by_user)
        with ranks.all_cores():
            assert threads[-1] == then
        assert threads[-1] == set_by_user


# ---------------------------------------------------------------- train_vae.py in two processes


def test_two_processes_have_the_same_losses_as_one_and_resume_each_others_runs(
        davae_config, tmp_path, launch, read_log):
    one = davae_config(tmp_path / "a", micro_batch=1, image_size=32, crop=(24,), disc_start=1, steps=3,
                       project="conv")
    two = replace(one, out=str(tmp_path / "b"))
    process = launch(train_vae.main, two, ranks=2)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert "batch 4 = 2 ranks x 1 x 2" in out
    train_vae.main(one)
    for a, b in zip(read_log(one.out), read_log(two.out), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"img/s", "GB"}:
            assert math.isclose(a[name], b[name], rel_tol=2e-3, abs_tol=1e-5), (name, a, b)
    a, b = [json.loads((Path(cfg.out) / "summary.json").read_text()) for cfg in (one, two)]
    assert (a["psnr"], a["psnr_base"]) == pytest.approx((b["psnr"], b["psnr_base"]), abs=0.01)
    a, b = [load_file(runs.latest_checkpoint(cfg.out) / "model.safetensors") for cfg in (one, two)]
    assert torch.allclose(a["mean"], b["mean"], atol=2e-3) and torch.allclose(a["std"], b["std"], rtol=2e-3)

    train_vae.main(replace(two, steps=4))                          # two, then one
    process = launch(train_vae.main, replace(one, steps=4), ranks=2)  # one, then two
    _, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert read_log(one.out)[-1]["step"] == read_log(two.out)[-1]["step"] == 4


@pytest.mark.parametrize("n", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("world", [1, 2, 8, 64])
def test_ranks_share_the_validation_images_of_which_rank_0_can_draw_four(n, world):
    shares = [held_out.share(n, rank, world).tolist() for rank in range(world)]
    assert sum(shares, []) == list(range(n)) and len(shares[0]) >= min(4, n)


def test_a_rank_without_validation_images_says_nothing(davae_config, tmp_path, launch, read_log):
    cfg = davae_config(tmp_path / "run", image_size=16, gan=0.0, steps=1)
    few = "held_out.validation_images.__defaults__ = (1,)"
    _, err = launch(train_vae.main, cfg, few, ranks=2).communicate()
    assert "not drawn" not in err and read_log(cfg.out)[-1]["step"] == 1, err[-3000:]
    assert "psnr" in json.loads((Path(cfg.out) / "summary.json").read_text())


FAILS_ON_RANK_1 = """
original, count = script.vae_loss, []
def vae_loss(*args):
    loss, parts = original(*args)
    count.append(1)
    if RANK == 1 and len(count) == 5:
        {fault}
    return loss, parts
script.vae_loss = vae_loss
"""


@pytest.mark.parametrize("fault, sentence", [
    pytest.param("raise ZeroDivisionError('a rank that dies')", "ZeroDivisionError: a rank that dies",
                 marks=pytest.mark.slow),
    ("loss = loss * torch.tensor(float('nan'))", "first bad parameter")])
def test_one_failing_rank_ends_all_within_seconds_and_says_why(
        davae_config, tmp_path, launch, fault, sentence):
    cfg = davae_config(tmp_path / "a", micro_batch=2, image_size=16, steps=100_000, gan=0.0, log_every=10_000)
    process = launch(train_vae.main, cfg, FAILS_ON_RANK_1.format(fault=fault), ranks=2)
    start = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert sentence in err, err[-3000:]
    assert runs.step_of(cfg.out) == 0
    assert time.time() - start < 40


UNREADABLE_ON_RANK_1 = """
from support import data
read = data.load_image
calls = []
def load_image(path, raw=None):
    calls.append(path)
    if RANK == 1 and len(calls) > 30:
        raise ValueError("it is gone")
    return read(path, raw)
data.load_image = load_image
"""


def test_images_that_one_rank_can_no_longer_read_cost_no_step(davae_config, tmp_path, launch, read_log):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    cfg = davae_config(tmp_path / "a", data_dir=str(tmp_path / "photos"), micro_batch=2, image_size=16,
                       steps=100_000, gan=0.0)
    process = launch(train_vae.main, cfg, UNREADABLE_ON_RANK_1, ranks=2)
    out, err = process.communicate(timeout=600)
    last = read_log(cfg.out)[-1]["step"]
    assert process.returncode == 1 and runs.step_of(cfg.out) == last > 2, err[-3000:]
    assert f"goes on from step {last}, the last one saved" in err and f"stopped after step {last}" in out


# ---------------------------------------------------------------- finetune.py in two processes


def test_two_processes_have_the_same_losses_as_one_and_one_resumes_their_run(
        finetune_config, tmp_path, read_log):
    one = finetune_config(tmp_path / "one", steps=2, micro_batch=2)
    two = replace(one, out=str(tmp_path / "two"))
    scratch = ("model", "p", "E", "depth", "A", "qk_norm")         # for a model that has no base
    flags = [f"--{name}={value}" for name, value in asdict(two).items() if name not in ("preset", *scratch)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, finetune.__file__, "tiny", *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "batch 8 = 2 ranks x 2 x 2" in done.stdout
    assert done.stdout.count("batch 8 =") == 1                     # only rank 0 prints
    finetune.main(one)
    for a, b in zip(read_log(one.out), read_log(two.out), strict=True):
        for name in ("loss", "base", "detail", "gnorm"):
            assert math.isclose(a[name], b[name], rel_tol=1e-4), (name, a, b)

    finetune.main(replace(two, steps=3))
    assert [row["step"] for row in read_log(two.out)] == [1, 2, 3]


def test_a_model_sharded_over_two_processes_trains_and_saves_like_a_whole_one(
        finetune_config, tmp_path, launch):
    whole = finetune_config(tmp_path / "whole", steps=2, micro_batch=2)
    shards = replace(whole, out=str(tmp_path / "shards"), save_every=1)   # draws with the EMA in between
    process = launch(finetune.main, replace(shards, shard=True), ranks=2)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert out.count("max |v - v_base| = 0.0") == 1
    finetune.main(whole)

    process = launch(finetune.main, replace(whole, steps=3, shard=True), ranks=2)      # whole, then sharded
    _, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    finetune.main(replace(shards, steps=3))                        # and the other way round
    for step in ("step_000002", "step_000003"):
        for name in ("model.safetensors", "ema.safetensors"):
            a = load_file(Path(whole.out) / step / name)
            b = load_file(Path(shards.out) / step / name)
            assert a.keys() == b.keys()
            assert all(torch.allclose(a[k], b[k], rtol=0, atol=3e-4) for k in a)
    with pytest.raises(SystemExit, match="start it with torchrun"):
        finetune.main(replace(whole, out=str(tmp_path / "one"), shard=True))


NO_MEMORY_ON_RANK_1 = """
usual = script.generate
def generate(model, *args):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    if RANK == 1:
        model.blocks[1].register_forward_pre_hook(fail)
    return usual(model, *args)
script.generate = generate
"""


def test_a_rank_that_cannot_draw_with_a_sharded_model_ends_all_after_the_save(
        finetune_config, tmp_path, launch):
    cfg = finetune_config(tmp_path / "run", steps=2, micro_batch=4, shard=True)
    process = launch(finetune.main, cfg, NO_MEMORY_ON_RANK_1, ranks=2)
    _, err = process.communicate(timeout=100)                      # the others' collective: half an hour
    assert process.returncode != 0 and runs.step_of(cfg.out) == 2
    assert "CUDA out of memory\nTry, in this order: --micro_batch=2" in err, err[-3000:]


SHARDED = """
from torch.distributed.fsdp import fully_shard
from support import ranks
rank, world, device = ranks.setup("cpu")
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
model(torch.ones(2, 4)).sum().backward()
if rank == 1:
    model[1].weight.grad.to_local().fill_(float("inf"))
try:
    ranks.clip_gradients(model, 1.0, torch.tensor(1.0), 3)
except SystemExit as stop:
    print(f"rank {rank}: {stop}", flush=True)
torch.distributed.destroy_process_group()
"""


def test_all_ranks_name_the_parameter_of_which_one_ranks_shard_is_bad(fork):
    out, err = fork(f"import torch\n{SHARDED}", ranks=2).communicate(timeout=120)
    for rank in (0, 1):
        sentence = "step 3: loss 1.0, gradient norm inf, first bad parameter 1.weight"
        assert f"rank {rank}: {sentence}" in out, err


def test_our_own_value_errors_become_a_sentence_and_others_keep_their_traceback():
    with pytest.raises(SystemExit, match="D=7 must be a multiple of base channels C=2"):
        ranks.launch(lambda cfg: davae.group_mean(torch.zeros(1, 7, 1, 1), 2), None)
    with pytest.raises(json.JSONDecodeError):
        ranks.launch(lambda cfg: json.loads("{"), None)


def test_a_file_that_may_not_be_read_or_written_gives_one_sentence_with_its_name():
    def main(cfg):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "weights/vae")

    with pytest.raises(SystemExit, match="^weights/vae: Permission denied; wanted .* this user may use"):
        ranks.launch(main, None)


def test_torchruns_report_ends_with_the_sentence_of_the_process_that_ended_first(tmp_path, monkeypatch):
    files = [tmp_path / "refuses.json", tmp_path / "has_lost_it.json", tmp_path / "killed.json"]
    lost = RuntimeError("[gloo/tcp/pair.cc:553] Connection closed by peer [::1]:33998.")
    for file, error in zip(files, (SystemExit("--p=3: wanted 2"), lost)):
        def main(cfg, error=error):
            raise error

        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        with pytest.raises(SystemExit):
            ranks.launch(main, None)

    failures = {}
    for rank, file in enumerate(reversed(files)):
        failures[rank] = ProcessFailure(rank, 10 + rank, 1, str(file))
    report = ChildFailedError("finetune.py", failures).format_msg()
    assert report.partition("Root Cause")[2].count("traceback : --p=3: wanted 2\n") == 1


def test_losing_another_process_gives_one_line_and_no_traceback(capsys):
    def main(cfg):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:33998.")

    with pytest.raises(SystemExit) as end:
        ranks.launch(main, None)
    assert end.value.code == 1 and end.value.__suppress_context__
    assert capsys.readouterr().err.startswith("rank 0 ends, because it has lost another one")


def test_ctrl_c_outside_training_gives_one_sentence_and_no_traceback(capsys):

    def main(cfg):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        ranks.launch(main, None)
    assert end.value.code == 130 and end.value.__suppress_context__
    assert "what was saved is intact" in capsys.readouterr().err


def test_gradients_outside_ddp_are_averaged_over_two_processes(davae_config, tmp_path, launch):
    """Instead of training, each rank sets its own gradient, averages it and writes it to a file."""
    fault = f"""
ranks.setup("cpu")
p = torch.nn.Parameter(torch.zeros(2))
p.grad = torch.tensor([1.0, 2.0]) * (RANK + 1)
ranks.average_gradients([p])
torch.save(p.grad, {str(tmp_path)!r} + f"/grad{{RANK}}.pt")
script.main = lambda cfg: None"""
    process = launch(train_vae.main, davae_config(tmp_path / "run"), fault, ranks=2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    for rank in (0, 1):
        assert torch.load(tmp_path / f"grad{rank}.pt").tolist() == [1.5, 3.0]


# ---------------------------------------------------------------- slow ranks


SLOW = """
import time
from datetime import timedelta
from support import figures, held_out, image_folder, latents
join = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda *a, **given: join(*a, timeout=timedelta(seconds=8), **given)

def slow(module, name, rank):
    # on one rank, the first call of a function takes longer than the others wait
    function = getattr(module, name)
    waits = [9] if RANK == rank else []

    def slowly(*args, **options):
        if waits:
            time.sleep(waits.pop())
        return function(*args, **options)
    setattr(module, name, slowly)

"""

# The slow work in each script: pictures, checkpoints, validation, statistics, caches, metrics.
SLOW_PARTS = {
    "train_vae": ["figures, 'save_grid', 0", "runs, 'save_folder', 0", "script, 'reconstruct', 1",
                  "held_out, 'statistics_images', 1", "figures, 'plot_losses', 0"],
    "finetune": ["latents, 'encode_shard', 0", "runs, 'save_folder', 0", "script, 'generate', 1",
                 "figures, 'save_grid', 0", "figures, 'plot_losses', 0"],
    "sample": ["image_folder, 'save_png', 1", "image_folder, 'write_npz', 0", "figures, 'save_grid', 0"],
    "evaluate": ["script, 'pair_scores', 1", "script, 'draw_and_measure', 0", "script, 'add_entry', 0"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_PARTS)
def test_no_rank_times_out_while_another_draws_measures_encodes_or_writes(
        davae_config, finetune_config, tiny_run, tmp_path, launch, name):
    configs = {
        "train_vae": (train_vae, davae_config(tmp_path / "v", image_size=16, gan=0.0, steps=2)),
        "finetune": (finetune, finetune_config(tmp_path / "run", steps=2, micro_batch=4)),
        "sample": (sample, sample.Config(run=tiny_run, out=str(tmp_path / "images"), n=4, steps=2)),
        "evaluate": (evaluate, evaluate.Config(run=tiny_run, out=str(tmp_path / "m.json"), n=8, images=8,
                                               steps=2)),
    }
    script, cfg = configs[name]
    fault = SLOW + "\n".join(f"slow({part})" for part in SLOW_PARTS[name])
    process = launch(script.main, cfg, fault, ranks=2)
    _, err = process.communicate()
    assert process.returncode == 0, err[-3000:]


BUSY_AT_THE_END = """
import time
leave = torch.distributed.destroy_process_group
def destroy():
    print(f"rank {RANK} leaves: {time.time()}", flush=True)
    leave()
torch.distributed.destroy_process_group = destroy
def main(cfg):
    ranks.setup("cpu")
    time.sleep(4 * (RANK == 0))
script.main = main
"""


def test_no_process_leaves_the_group_before_the_others(davae_config, tmp_path, launch):
    out, err = launch(train_vae.main, davae_config(tmp_path / "run"), BUSY_AT_THE_END, ranks=2).communicate()
    left = [float(line.rpartition(" ")[2]) for line in out.splitlines() if "leaves" in line]
    assert len(left) == 2 and abs(left[0] - left[1]) < 2, err[-3000:]


# ---------------------------------------------------------------- machines that do not see the same files


APART = """
from support import latents
def other(module, name, change):
    usual = getattr(module, name)
    if RANK == 1:
        setattr(module, name, lambda *args, **options: change(usual(*args, **options)))
"""


@pytest.mark.parametrize("fault, said", [
    ("script.data.Dataset.fingerprint = property(lambda self: f'images {RANK}')",
     "run, images: process 1 sees images 1, process 0 images 0; wanted the same files on every machine"),
    ("other(runs, 'resume', lambda found: None)", "run, the step it is at: process 1 sees 0, process 0 1;"),
], ids=["images", "checkpoints"])
def test_training_does_not_start_where_the_machines_see_other_files(
        davae_config, tmp_path, launch, fault, said):
    cfg = davae_config(tmp_path / "run", steps=1)
    if "resume" in fault:
        train_vae.main(cfg)
        cfg = replace(cfg, steps=2)
    _, err = launch(train_vae.main, cfg, APART + fault, ranks=2).communicate()
    assert said in err
    assert runs.step_of(cfg.out) < 2


def test_latents_that_are_on_another_machines_disk_are_missed(finetune_config, tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "run", images=40)             # a cache that no other test uses
    monkeypatch.setattr(latents, "SHARD", 8)
    write = latents.write_cache

    def half_of_it(*args):
        folder = write(*args)
        sorted(folder.glob("*.safetensors"))[-1].unlink()
        return folder

    monkeypatch.setattr(latents, "write_cache", half_of_it)
    with pytest.raises(SystemExit, match="process 0 finds .* latents of .* images; wanted a disk"):
        finetune.main(cfg)


def test_a_restart_by_torchrun_does_not_use_the_addresses_of_the_processes_before(monkeypatch):
    """Each attempt has its own names in the store that outlives it."""
    seen = {}
    monkeypatch.setattr(ranks, "PATIENT", [None])
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda kind, **options: seen.update(options))
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 0, 1)]))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        ranks.setup("cpu")
        seen["store"].set("address", "here")
    assert store.get("0/address") == store.get("1/address") == b"here"
