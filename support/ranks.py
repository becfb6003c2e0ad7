"""Several processes as one: torchrun's set-up, signals, seeds, micro-batches, sums over ranks, FSDP2.

Everything here also works without torchrun: there is then a single rank, 0 in a world of 1.
"""
import contextlib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

# ---------------------------------------------------------------- a program's beginning and end


def launch(main, cfg):
    """Run a script's `main(cfg)` as a program, under torchrun or not.

    Running out of GPU or machine memory, Ctrl-C, missing permissions, and any ValueError raised by this
    project end it with one sentence instead of a traceback. So does the end of another process; torchrun's
    report then ends with the sentence of the process that ended first.
    """

    def program(cfg):
        try:
            run_main(main, cfg)
        except SystemExit as end:
            tell_torchrun(end.code)
            raise

    record(program)(cfg)                   # tells torchrun of other errors
    if dist.is_initialized():
        dist.destroy_process_group()


def launch_alone(main, cfg):
    """`launch` a main that one process does: under torchrun, rank 0 works as if alone, and the others end."""
    if int(os.environ.pop("RANK", 0)) == 0:                # without it, `setup` waits for no other
        launch(main, cfg)


def run_main(main, cfg):
    """main(cfg), with the sentences of `launch`."""
    try:
        with memory_may_run_out(smaller(cfg)):
            main(cfg)
        wait_for_all()                     # rank 0 may still write a report; NCCL is left by all at once
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and raised_here(error):
            raise SystemExit(str(error)) from None
        if isinstance(error, PermissionError) and error.filename:
            raise SystemExit(f"{error.filename}: {error.strerror}; wanted a file or folder that this "
                             "user may use: change its permissions, or name another") from None
        if re.search(LOST, str(error)):
            print(f"rank {this_rank()} ends, because it has lost another one: see what that one says, "
                  "or check the network", file=sys.stderr)
            raise SystemExit(1) from None
        raise
    except KeyboardInterrupt:
        print("\nstopped; what was saved is intact", file=sys.stderr)
        raise SystemExit(130) from None                # what shells report for Ctrl-C


# How gloo says that another process has ended, or can no longer be reached.
LOST = "gloo.*(Connection closed by peer|Connection reset by peer|Broken pipe)"


def tell_torchrun(sentence):
    """Let torchrun's report name this process, and say why it has ended.

    torchrun takes the earliest time in these files for the cause, in whole seconds, and now for a process
    without one: hence the second before.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and isinstance(sentence, str):
        about = {"timestamp": str(int(time.time()) - 1)}
        with open(file, "w") as f:
            json.dump({"message": {"message": sentence, "extraInfo": about}}, f)


# How torch, NumPy and Linux say that something does not fit into memory, or that its size overflows.
TOO_LARGE = ("can't allocate memory|cannot allocate memory|not enough memory|can't start new thread|"
             "size calculation overflowed|multiplication overflow|array is too big|"
             "maximum allowed|too large to convert|too large to fit")


def out_of_memory(error):
    """Does an error say that memory has run out, or that a size exceeds any memory?"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):            # the machine's, a GPU's
        return True
    return re.search(TOO_LARGE, str(error), re.IGNORECASE) is not None


@contextlib.contextmanager
def memory_may_run_out(advice):
    """End with a sentence where it does, a GPU's or the machine's.   advice: what to try, in order"""
    try:
        yield
    except (MemoryError, OSError, OverflowError, RuntimeError, ValueError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0].rpartition("CPUAllocator: ")[2] or "out of memory"
        raise SystemExit(f"{reason}\nTry, in this order: {', '.join(advice)}") from None


def smaller(cfg):
    """The flags, out of those that its Config has, that reduce a run's memory, in the order to try them."""
    advice = []
    for name in ("micro_batch", "batch_size"):
        size = getattr(cfg, name, 1)
        if size > 1 and not advice:
            same = " (the same batch)" if name == "micro_batch" else ""
            advice.append(f"--{name}={size // 2}{same}")
    for name in ("checkpointing", "shard"):
        if not getattr(cfg, name, True):
            advice.append(f"--{name}=True")
    return [*advice, "smaller images", "a smaller model"]


def raised_here(error):
    """Was an error raised by this project's own code (its messages are sentences), and not by a library?"""
    project = Path(__file__).resolve().parent.parent
    last = traceback.extract_tb(error.__traceback__)[-1]
    return project in Path(last.filename).resolve().parents and "site-packages" not in last.filename


def setup(device="auto"):
    """Join torchrun's process group, if there is one.  Returns (rank, world, device).

    device: auto, cpu or cuda; auto takes a GPU if there is one. Matrix products in float32 may use TF32.
    """
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1    # else not torchrun's
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise SystemExit(f"--device=cuda: {torch.cuda.device_count()} GPUs that torch can use, wanted at "
                             f"least {local + 1}; give --device=cpu, or install torch for CUDA")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if "RANK" in os.environ and not dist.is_initialized():
        # after a restart by torchrun, the addresses that are stored are those of dead processes
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    if dist.is_initialized() and not PATIENT:
        PATIENT.append(dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    return int(os.environ.get("RANK", 0)), world, device


def in_bfloat16(dtype, device):
    """Should matrix products be computed in bfloat16?

    dtype: a Config's; auto means yes on CUDA, and on CPUs with bfloat16 instructions (others emulate them,
    which is slower than float32)
    """
    if dtype == "auto" and device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    if dtype == "auto":
        return True
    return dtype == "bfloat16"


def autocast(dtype, device, **options):
    """The autocast context for models, see `in_bfloat16`. Weights, norms and losses stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(dtype, device), **options)


def layout(width, device):
    """The memory layout, also for its images, in which an autoencoder of so many channels trains fastest.

    On a CPU with AVX-512, 16 channels (tiny) take 1.25 times as long in channels_last, 64 (TAEF2) 0.85 times
    (Zen 4, 2026-11-25); with AVX2, 64 take 1.6 times as long (Zen 3, 2026-11-27). Not measured on a GPU.
    """
    if device.type == "cpu" and (width < 64 or torch.backends.cpu.get_cpu_capability() != "AVX512"):
        return torch.contiguous_format
    return torch.channels_last


def at_once(most, height, width):
    """How many images of this size may go through an autoencoder at once: at most `most`, at least one.

    Without gradients, SD3's decoder takes 14 GiB for four of 1,024 pixels (kernels: 10; H200, 2026-11-27).
    """
    return max(1, min(most, 2**22 // (height * width)))


def this_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------- signals

ASKED = []                                 # the signals received while `heed_signals` was on


def heed_signals(on=True):
    """Let SIGTERM and Ctrl-C request a stop after the current step; a Ctrl-C after either stops at once.

    A second SIGTERM changes nothing: torchrun forwards its own to ranks that may have received it themselves.
    """

    def ask(number, frame):
        if not ASKED and this_rank() == 0:     # not print: the signal may have interrupted one
            os.write(2, b"\nstopping after the step at hand, which is saved; Ctrl-C stops at once\n")
        ASKED.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, ask if on else signal.SIG_DFL)
    signal.signal(signal.SIGINT, ask if on else signal.default_int_handler)


def asked_to_stop(must=False):
    """Was any rank asked to stop, or `must` any?  All ranks must call this after the same step.

    The sum is computed on the CPU, so that nothing waits for a GPU.
    """
    return sum_over_ranks(torch.tensor(len(ASKED) + must)).item() > 0


# ---------------------------------------------------------------- sums over ranks


def sum_over_ranks(x):
    """x, replaced in place by its sum over all ranks, which must all call this."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_patiently(x):
    """`sum_over_ranks` after work that may have taken some ranks much longer than others."""
    wait_for_all()
    return sum_over_ranks(x)


def average_gradients(parameters):
    """Average over ranks the gradients that DDP does not see; all ranks must call this."""
    if dist.is_initialized():
        for p in parameters:
            if p.grad is not None:
                p.grad = sum_over_ranks(p.grad) / dist.get_world_size()


# One group of all ranks, in which they wait for each other as long as it takes. The default group times out
# after minutes, which is right for a step, but wrong while one rank still draws, encodes or writes.
PATIENT = []


def wait_for_all():
    """Hold every rank here until all arrive: after work of unequal length, or work of rank 0 alone."""
    for group in PATIENT:
        dist.barrier(group)


@contextlib.contextmanager
def all_cores():
    """Let torch use all cores of this job for what one process computes while the others wait for it.

    torchrun gives each process one thread. A number that the user has set (OMP_NUM_THREADS) stays.
    """
    before = torch.get_num_threads()
    if before == 1 and world_size() > 1:
        mine = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count()))     # Linux
        torch.set_num_threads(len(mine(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def my_share(count):
    """This rank's share of 0 to count - 1, padded with higher numbers so that all ranks have equally many.

    For work that all ranks must do equally often, such as passes through a sharded model.
    """
    world = world_size()
    return list(range(this_rank(), world * math.ceil(count / world), world))


def from_all(x):
    """[x of rank 0, of rank 1, ...], on all ranks, which must all call this.

    x: anything that can be pickled, with its tensors on the CPU
    """
    if not dist.is_initialized():
        return [x]
    per_rank = [None] * world_size()
    dist.all_gather_object(per_rank, x, PATIENT[0])
    return per_rank


def must_agree(what, mine):
    """raises: SystemExit in every process, unless all see the same `mine`; what: its name in the sentence"""
    seen = from_all(mine)
    for other, theirs in enumerate(seen):
        if theirs != seen[0]:
            raise SystemExit(f"{what}: process {other} sees {theirs}, process 0 {seen[0]}; wanted the same "
                             "files on every machine, and runs and latents on a disk that all share")


def gather(parts, numbers):
    """All ranks' rows as one CPU tensor (n, ...), on all ranks, which must all call this.

    The rows are sorted by their numbers, however they were distributed over the ranks.
    parts: batches of this rank's rows, [] if it has none.   numbers: one number for each of its rows.
    If no rank has any rows, the result is a tensor (0,).
    """
    mine = torch.cat(parts).cpu() if parts else torch.empty(0)
    if len(mine) != len(numbers):
        raise ValueError(f"{len(mine)} rows and {len(numbers)} numbers, wanted one for each row")
    rows, order = [], []
    for theirs, their_numbers in from_all((mine, list(numbers))):
        order += their_numbers
        if len(theirs):                                        # an empty tensor has another shape
            rows.append(theirs)
    if not rows:
        return torch.empty(0)
    return torch.cat(rows)[np.argsort(order, kind="stable")]


# ---------------------------------------------------------------- micro-batches


def accumulation(batch_size, micro_batch, world):
    """How many passes, of at most `micro_batch` images, each rank makes for a step of `batch_size` images.

    raises: SystemExit if it does not divide evenly, with the nearest batch size that does
    """
    def count(n):
        """Passes of a rank with n images; 0 if these do not make equal parts."""
        parts = math.ceil(n / micro_batch)
        return 0 if n == 0 or n % parts else parts

    per_rank, rest = divmod(batch_size, world)
    if rest or not count(per_rank):
        near = sorted(range(1, 2 * per_rank + 2), key=lambda n: abs(n * world - batch_size))
        raise SystemExit(f"batch_size {batch_size} is not {world} ranks x equal parts of at most micro_batch "
                         f"{micro_batch}; give --batch_size={world * next(filter(count, near))}")
    return count(per_rank)


def micro_batches(model, count, *batch, seed, step):
    """The micro-batches of this rank's batch, in order: tuples with a chunk of each tensor in `batch`.

    Each has its own random numbers: at one size of micro-batches, these depend on neither resuming nor the
    number of ranks. The model's gradients are averaged over the ranks only in the last one's backward pass.
    """
    chunks = [x.chunk(count) for x in batch]
    for i, part in enumerate(zip(*chunks)):
        seed_step(seed, this_rank() * count + i, step)
        synchronise(model, i == count - 1)
        yield part


def seed_step(seed, part, step, *purpose):
    """Reseed torch for micro-batch `part` (over all ranks) of a step.   purpose: selects another stream"""
    torch.manual_seed(seed_of(seed, part, step, *purpose))


def generator(seed, part, step):
    """A generator (CPU) that begins with the random numbers of micro-batch `part` of a step."""
    return torch.Generator().manual_seed(seed_of(seed, part, step))


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def synchronise(model, on):
    """Let the next backward pass average gradients over the ranks, or not; no effect on a single process."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif hasattr(model, "set_requires_gradient_sync"):         # sharded
        model.set_requires_gradient_sync(on)


def clip_gradients(model, limit, loss, step):
    """Scale a model's gradients down to a norm of at most `limit` (0: none).  Returns the norm before that.

    The norm is checked first: to scale by one that is not finite would spoil every gradient, and hide which
    parameter's was bad.
    raises: SystemExit as `stop_if_not_finite`
    """
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    seen = whole(norm)                                         # sharded, if the model is
    stop_if_not_finite(seen, loss, model, step)
    nn.utils.clip_grads_with_norm_(model.parameters(), limit or math.inf, norm)
    return seen


def stop_if_not_finite(norm, loss, model, step, so_far="the model was not updated"):
    """Stop before the update if the loss or the gradient norm is not finite.   so_far: what this step did

    Ranks share gradients, so they stop together; if only one rank's loss is bad, its exit takes the others
    down.
    A step waits for the device only here, where images, unlike cached latents, are copied to it, and where
    captions are read, at the start of each micro-batch.
    raises: SystemExit naming the first bad parameter
    """
    if torch.isfinite(norm + loss):
        return
    bad = "none"
    named = [] if torch.isfinite(norm) else model.named_parameters()       # the same branch on all ranks
    for name, p in named:
        if p.grad is not None and not whole(p.grad.norm()).isfinite():     # of all shards
            bad = name
            break
    raise SystemExit(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}, first bad parameter "
                     f"{bad}; {so_far}. Lower --lr, or --clip (0 is none), and run again to go on from the "
                     "last checkpoint")


# ---------------------------------------------------------------- models on several GPUs


def replicated(model):
    """`model`, such that its backward passes average gradients over the ranks (DDP); alone, as it is.

    All ranks start with rank 0's weights and buffers. Buffers are not compared again: only those of the
    discriminator's BatchNorm change, and it does not read them while it trains.
    """
    if world_size() == 1:
        return model
    # torch.compile would cut each compiled block into pieces of DDP's buckets, to send gradients before the
    # block's backward pass ends: LightningDiT-XL's into three. Blocks are small enough as they are.
    torch._dynamo.config.optimize_ddp = False
    takes = inspect.signature(DistributedDataParallel).parameters
    new = "forward_sync_buffers"                       # its name in torch 2.13
    return DistributedDataParallel(model, **{new if new in takes else "broadcast_buffers": False})


def shard(model, device):
    """Split a transformer's parameters over torchrun's ranks, and so its gradients and optimizer state.

    Blocks are gathered one at a time, for their forward and their backward pass; adaLN's layers are units of
    their own, because all of them run before the first block does.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        for name, part in list(block.named_modules()):
            if name.rpartition(".")[2] == "adaLN":
                fully_shard(part, mesh=mesh)
        fully_shard(block, mesh=mesh)
    # The model itself too: it would stay gathered after a forward pass without a backward, and an EMA that
    # has drawn samples could no longer be updated.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def copy_but_frozen(model):
    """A copy of `model` that has its frozen weights in common with it, wherever both are moved."""
    return deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def share_frozen(model, ema, rounded):
    """Let the EMA share the model's frozen weights and its buffers, tables or the statistics of a BatchNorm.

    rounded: frozen weights become bfloat16 where autocast would cast them
    """
    for layer in model.modules():
        if rounded and isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.bfloat16()
    for p, e in zip(model.parameters(), ema.parameters()):
        if not p.requires_grad:
            e.data = p.data
    for name, buffer in model.named_buffers():
        place, _, leaf = name.rpartition(".")
        setattr(ema.get_submodule(place), leaf, buffer)


def is_sharded(model):
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def unless_sharded(sharded, forgiving):
    """`forgiving`, a context that lets a rank go on after a failure; none around passes of a sharded model.

    The others would wait for this rank in the middle of the pass, where nothing can tell them. So it ends.
    """
    return contextlib.nullcontext() if sharded else forgiving


def whole(state, keep=True):
    """A nested state with its sharded tensors gathered: on the CPU of ranks that `keep` them, else None.

    All ranks must call this. Everything that is not sharded stays as it is.
    """

    def gathered(x):
        if not hasattr(x, "full_tensor"):
            return x
        x = x.full_tensor()
        return x.cpu() if keep else None

    return tree_map(gathered, state)


def load_optimizer(opt, state):
    """Load a state dict made by `whole`, each tensor sharded and laid out in memory like its parameter.

    A fused step pairs numbers by their memory offset, and CPU and GPU runs may use different layouts.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor
    parameters = [p for group in opt.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):
        moments = state["state"].get(i, {})
        for name, value in moments.items():
            if not value.dim():                                # the step counter: a copy, not mapped
                moments[name] = value.clone()
            elif isinstance(p, DTensor):
                moments[name] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
            else:
                moments[name] = torch.empty_like(p).copy_(value)
    opt.load_state_dict(state)
