"""Choose the variant of each operation: by trying them on this machine, at the model's sizes.

On a GPU, before anything is trained or sampled (KERNELS=auto, the default):

    1. the model runs once, and its calls of each operation are recorded: shapes, strides, dtypes, and which
       arguments are trained. A choice is made per operation, dtype and shape, but not per batch size: the
       usual one decides for all. Nothing is chosen for shapes that did not occur, nor for small ones: below
       SMALLEST, a GPU takes some microseconds and trying takes longer than it could ever save
    2. each variant runs forward, and backward where something is trained; correct variants are timed, and the
       fastest is chosen: trial.py, in separate processes, on rank 0. The variants are
           plain       PyTorch, as in the specification
           compiled    the same through torch.compile, as one operation
           kernel      this project's Triton
           flash, cudnn, efficient, math       the backends of PyTorch's attention
           cublas      GELU inside the matrix product
       With --compile, the model around an operation is compiled: plain is then what the compiler makes of the
       specification; the others are opaque to it
    3. every process runs each chosen variant once more, and checks it. One that fails anywhere becomes plain
       everywhere

The table is printed, and saved as kernels.json in the run's folder. Times are also cached in the user's cache
folder, da-vae/kernels.json: the same call on the same card, with the same driver, torch, triton and kernels,
is not timed again. Step 3 is never skipped.

If all are small, there is no table. On an H200 (2026-11-27), LightningDiT-XL's six operations took 29 s, the
eight of SD3's decoder 27 s and the twelve of SD3.5-M 23 s.
"""
import hashlib
import json
import os
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import kernels
from kernels.trial import SLOW, Trial, adopt, guarded, judge, key_of, lacks_memory
from kernels.trial import names_of, try_apart, untried, variants_of

SMALLEST = 2 * 1024 * 1536     # elements of a result: of one image of 1,024 pixels in SD3.5, with guidance

# ---------------------------------------------------------------- called by the scripts


def before_training(run, device, shape, forward):
    """Choose for a model that is about to be trained.

    run:      a runs.Run; its cfg gives the output folder, and says whether the model is compiled
    shape:    of a micro-batch
    forward:  takes zeros of that shape and a zero (int64) for each row, and computes what a step does
    """
    from support import ranks                              # here: kernels/ otherwise needs no support/
    if not possible(device):
        return
    x = torch.zeros(shape, device=device)
    labels = torch.zeros(len(x), dtype=torch.long, device=device)

    def step():
        with ranks.autocast(run.cfg.dtype, device):
            forward(x, labels)

    choose(step, run.cfg.out, device, run.cfg.compile)


def before_sampling(out, device, compiled, forward):
    """Choose for a model that is about to be sampled from: forward() draws a batch of images.

    out: the folder of kernels.json, or None
    """
    if possible(device):
        choose(forward, out, device, compiled)


def possible(device):
    return kernels.KERNELS == "auto" and (device.type == "cuda" or kernels.INTERPRETED)


def choose(forward, out, device, compiled=False):
    """Try the operations that forward() calls, and adopt the choices; on all ranks.  Returns the table."""
    from support import ranks, runs

    # the model's calls; rank 0 makes the table
    calls = recorded(forward, device)
    if not calls:
        return []
    rows = look_up_or_try(calls, device, compiled) if ranks.this_rank() == 0 else None
    rows = ranks.from_all(rows)[0]
    adopt(rows)

    # a variant that fails in any process is used in none
    for rank, failed in enumerate(ranks.from_all(confirm(rows, device))):
        for number, why in failed.items():
            row = rows[number]
            row["left_out"][row["chosen"]] = f"{why} (in process {rank})"
            row["chosen"] = "plain"
    adopt(rows)

    if ranks.this_rank() == 0:
        about = machine(device)
        print(table(about, rows, compiled))
        if out is not None:
            runs.make_folder(out)
            with runs.disk_may_fail():
                found = {"machine": about, "compiled": compiled, "rows": rows}
                runs.write_json(Path(out) / "kernels.json", found)
    return rows


# ---------------------------------------------------------------- 1. record a model's calls


def recorded(forward, device):
    """The calls (see trial.py) that forward() makes to operations with several variants."""
    calls = {}

    def watch(op, arguments, result):
        first = result if isinstance(result, torch.Tensor) else result[0]
        if first.numel() < SMALLEST or len(names_of(op, arguments)) == 1:
            return
        call = described(op, arguments)
        which = (op.name, key_of(call))
        # of two calls with the same key, the one with more trained arguments
        if which not in calls or trained(call) > trained(calls[which]):
            calls[which] = call

    # No backward pass follows, so nothing is kept for one: a batch that only fits with a kernel, which is not
    # chosen yet, must get through.
    keep_nothing = torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x)
    kernels.WATCH = watch
    try:
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpus), torch.compiler.set_stance("force_eager"), keep_nothing:
            forward()
    finally:
        kernels.WATCH = None
    if device.type == "cuda":
        torch.cuda.empty_cache()                           # another process needs the memory
    return list(calls.values())


def described(op, arguments):
    x = arguments[0]
    layouts = [layout(x) if isinstance(x, torch.Tensor) else x for x in arguments]
    return {"op": op.name, "device": x.device.type, "autocast": kernels.autocast_of(x), "arguments": layouts}


def layout(x):
    return {
        "shape": list(x.shape), "stride": list(x.stride()), "dtype": kernels.name_of(x.dtype),
        "trained": x.requires_grad and torch.is_grad_enabled(), "weight": isinstance(x, torch.nn.Parameter)}


def trained(call):
    """How many arguments get a gradient."""
    return sum(x["trained"] for x in call["arguments"] if isinstance(x, dict))


# ---------------------------------------------------------------- 2. look up what is known, try the rest


def look_up_or_try(calls, device, compiled):
    """The rows of all calls: from the cache if known, else tried and added to it."""
    path = cache_file()
    here = machine(device) + ("; inside compiled code" if compiled else "")
    cache = read_cache(path)
    rows = [known_row(cache, here, call) for call in calls]
    missing = [n for n, row in enumerate(rows) if row is None]
    if not missing:
        return rows

    print(f"trying {len(missing)} operations on {device}, once on this machine")
    why = try_apart(calls, rows, device, compiled)
    for n in missing:
        rows[n] = rows[n] or untried(calls[n], f"not tried: {why}")
    new = {text_of(calls[n]): rows[n] for n in missing if rows[n]["ms"] and not may_pass(rows[n])}
    cache = read_cache(path)                               # another program may have written meanwhile
    write_cache(path, cache | {here: cache.get(here, {}) | new})
    return rows


def may_pass(row):
    """Is a variant left out for a reason that may be gone next time, such as memory used by others?"""
    ended = (SLOW, "its process ended with -9")            # -9: Linux, out of memory
    return lacks_memory(row) or any(why.startswith(ended) for why in row["left_out"].values())


def machine(device):
    """What times are valid for: card, driver, torch, triton, and the kernels' source."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return (f"{card}; {driver()}; torch {torch.__version__}, CUDA {torch.version.cuda}; triton "
            f"{triton_version()}; kernels {digest.hexdigest()[:12]}")


def driver():
    file = Path("/proc/driver/nvidia/version")             # not on Windows
    return file.read_text().partition("\n")[0] if file.exists() else "driver unknown"


def triton_version():
    for package in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def cache_file():
    """In the user's cache folder; by the XDG specification, a relative path is ignored."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):
        folder = os.path.expanduser("~/.cache")
    return Path(folder) / "da-vae" / "kernels.json"


def text_of(call):
    return json.dumps(call, sort_keys=True)


def read_cache(path):
    """{machine: {call: row}}; empty if there is no readable cache."""
    try:
        cache = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(cache, dict) or not all(isinstance(rows, dict) for rows in cache.values()):
        return {}
    return cache


def known_row(cache, here, call):
    """The row of a call; None if it is not in the cache, or not in trial.py's format."""
    row = cache.get(here, {}).get(text_of(call))
    if not isinstance(row, dict) or row.get("call") != call:
        return None
    ms = row.get("ms")
    left_out = row.get("left_out")
    if not isinstance(ms, dict) or not isinstance(left_out, dict) or row.get("chosen") not in ms:
        return None
    if not all(isinstance(x, float) for x in ms.values()):
        return None
    return row if ms.keys() <= variants_of(kernels.OPERATIONS[call["op"]]).keys() else None


def write_cache(path, cache):
    """Write to a temporary file, then rename: a reader finds either the old or the new cache, whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
            json.dump(cache, f, indent=1)
        os.replace(f.name, path)
    except OSError as error:
        print(f"{path}: not written ({error.strerror}); the next run tries the operations again")


# ---------------------------------------------------------------- 3. check once more, in each process


def confirm(rows, device):
    """{number of a row: why} for chosen variants that are not correct in this process."""
    failed = {}
    for number, row in enumerate(rows):
        name = row["chosen"]
        if name == "plain":
            continue
        op = kernels.OPERATIONS[row["call"]["op"]]
        function = variants_of(op)[name]
        try:
            verdict, why = guarded(device, lambda call=row["call"], f=function: judge(Trial(call, device), f))
        except RuntimeError as error:                      # the GPU is lost
            raise SystemExit(f"{op.name}: {name} was correct when tried, but has now failed: {error}; "
                             "run the same command with KERNELS=ref") from None
        if why or verdict:
            failed[number] = why or verdict
    return failed


# ---------------------------------------------------------------- the table


def table(about, rows, compiled):
    """The rows as text, with a line for each kernel that is not used."""
    names = ["plain", "compiled", "kernel", "cublas", "flash", "cudnn", "efficient", "math"]
    lines = [f"operations, ms of a call{' inside compiled code' if compiled else ''}: {about}",
             f"  {'':17} {'':30} " + " ".join(f"{name:>9}" for name in names) + "  used"]
    for row in rows:
        first = row["call"]["arguments"][0]
        shape = f"{'x'.join(map(str, first['shape']))} {first['dtype']}"
        times = [f"{row['ms'][name]:9.3f}" if name in row["ms"] else f"{'-':>9}" for name in names]
        lines.append(f"  {row['call']['op']:17} {shape:30} {' '.join(times)}  {row['chosen']}")
    for row in rows:
        lines += notes(row)
    return "\n".join(lines)


def notes(row):
    """A line for each variant that is left out; for attention's backends, only if the result is wrong."""
    op = row["call"]["op"]
    ms = row["ms"]
    lines = []
    for name, why in row["left_out"].items():
        if op != "sdpa" or name == "all" or why.startswith(("wrong", "not finite")):
            lines.append(f"  {op}: {name} is left out: {why}")
    for name in ("kernel", "cublas"):
        if name in ms and row["chosen"] != name and name not in row["left_out"]:
            lines.append(f"  {op}: {name} is left out: it takes {ms[name]:.3f} ms, {row['chosen']} "
                         f"{ms[row['chosen']]:.3f}")
    return lines
