"""ranks"""
import os
import signal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils._pytree import tree_map


def setup(device="auto"):
    """Join torchrun's process group if there is one.  Returns (rank, world, device); (0, 1, device) without torchrun."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def sum_over_ranks(x):
    """x, turned in place into its sum over all ranks, which must all call this."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def wait_for_all():
    """Hold every rank here until all have come, so that none reads what rank 0 still writes."""
    if dist.is_initialized():
        dist.barrier()


ASKED = []                                 # the signals that came while `heed_signals` was on


def heed_signals(on=True):
    """Let SIGTERM and Ctrl-C only ask for an end after the step at hand; a second one ends the program at once."""
    for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, (lambda n, _: (ASKED.append(n), heed_signals(False))) if on else default)


def asked_to_stop():
    """Was any rank asked to stop?  All ranks must call this after the same step; on the CPU, so that no GPU is waited for."""
    return sum_over_ranks(torch.tensor(len(ASKED))).item() > 0


def micro_batches(batch_size, micro_batch, world):
    """How many forward passes of at most `micro_batch` images each rank accumulates for one step of `batch_size` in all."""
    per_rank, rest = divmod(batch_size, world)
    count = max(1, -(-per_rank // micro_batch))
    if rest or not per_rank or per_rank % count:
        raise SystemExit(f"batch_size {batch_size} is not {world} ranks x equal parts of at most micro_batch {micro_batch}; "
                         f"give --batch_size={max(1, round(batch_size / world / micro_batch)) * micro_batch * world}")
    return count


def seed_step(seed, part, step):
    """Reseed torch for micro-batch `part` of a step: neither resuming nor the number of ranks changes what is drawn."""
    torch.manual_seed(int(np.random.SeedSequence((seed, part, step)).generate_state(1, np.uint64)[0]))


def shard(model, device):
    """Split a model's parameters, and so its gradients and its optimizer's state, over torchrun's ranks (FSDP2), by blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    return model


def whole(state, keep=True):
    """A nested state with its sharded tensors whole, on the CPU of the ranks that `keep` it; all ranks must call this."""
    def gather(x):
        if not hasattr(x, "full_tensor"):
            return x
        x = x.full_tensor()
        return x.cpu() if keep else None
    return tree_map(gather, state)


def spread(opt_state, parameters):
    """An optimizer's state dict as `whole` made it, each tensor sharded like its parameter, if that is."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    for i, p in enumerate(parameters):
        if isinstance(p, DTensor):
            opt_state["state"][i] = {k: distribute_tensor(v.to(p.device), p.device_mesh, p.placements) if v.dim() else v
                                     for k, v in opt_state["state"][i].items()}
    return opt_state


def launch(main, cfg):
    """Run the main function of this script or of finetune.py as a program, under torchrun or not."""
    try:
        record(main)(cfg)                                          # torchrun then reports the rank that failed first
    except torch.OutOfMemoryError as error:
        less = [f"--micro_batch={cfg.micro_batch // 2} (the same batch)"] if cfg.micro_batch > 1 else []
        less += [f"--{name}=True" for name in ("checkpointing", "shard") if not getattr(cfg, name, True)]
        raise SystemExit(f"{str(error).splitlines()[0]}\nTry, in this order: {', '.join([*less, 'a smaller model'])}") from None
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(parts):
    """Batches of rows of every rank, where rank r holds rows r::world, as one CPU tensor (n, ...) in order, on all ranks."""
    ranks = [mine := torch.cat(parts).cpu()]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
    rows = torch.empty(sum(map(len, ranks)), *mine.shape[1:], dtype=mine.dtype)
    for r, part in enumerate(ranks):
        rows[r::len(ranks)] = part
    return rows
