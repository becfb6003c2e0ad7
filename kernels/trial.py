"""Try one call of an operation: which of its variants are correct, and how long they take.

A call is plain data, as recorded by choose.py, so that another process can try it:

    {"op", "device", "autocast": a dtype or "", "arguments": [numbers, None, and for tensors
        {"shape", "stride", "dtype", "trained": does it get a gradient, "weight": is it a parameter}]}

So is the result, its row in the table:

    {"call", "ms": {variant: ms of a call}, "left_out": {variant: why}, "chosen": variant}

A variant is correct if it is at most twice as far from the specification in float32 as plain PyTorch in the
call's own dtypes, plus one rounding: the rule of tests/test_kernels.py. (For a call in float32, the
specification is in float64.) This must hold for each output and, if anything is trained, each gradient.

Why another process: a kernel with an illegal memory access takes down everything that its process has on the
GPU, and one that never ends cannot be stopped from within. In another process, it costs a line in the table.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import kernels
from kernels import attention, groupnorm_silu, linear_gelu, norm_modulate, patch_embed, qknorm_rope, swiglu

FILES = (attention, groupnorm_silu, linear_gelu, norm_modulate, patch_embed, qknorm_rope, swiglu)

LARGEST = 2**28        # elements of a first argument: of a larger batch, only a part is tried, to save memory
ROUNDS = 5             # of timing; 1 in the interpreter, which is slow
ROUND_MS = 3           # a variant's launches in one round take about this long
REPEATS = 20           # the most calls in one round: at most some 1000 launches wait in a GPU's queue
SLEEP = 1_000_000      # a GPU's cycles, 0.6 ms: Python's launches of a call, forward and backward, take less
SLEEPS = 5             # the most tries; a variant that waits for the GPU can never queue up
PATIENCE = 180         # seconds per variant, in the process that tries; more counts as failed
SLOW = "did not end within"
PROCESSES = 4          # the most that are started, one after another
COMMAND = [sys.executable, "-m", "kernels.trial"]


# ---------------------------------------------------------------- a call's operation and its variants


def key_of(call):
    """`kernels.key` of the call's first argument."""
    first = call["arguments"][0]
    return call["device"], getattr(torch, first["dtype"]), *first["shape"][1:]


def variants_of(op):
    """{name: function}; an operation with a kernel also has a compiled specification."""
    if "kernel" in op.variants and "compiled" not in op.variants:
        op.variants["compiled"] = by_compiler(op.variants["plain"])
    return op.variants


def names_of(op, arguments):
    """The variants for these arguments; only plain, if the kernel does not support them."""
    return list(variants_of(op)) if op.takes(*arguments) else ["plain"]


def by_compiler(function):
    """The function, compiled when it first meets a size."""
    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False         # train_vae.py runs backward through a graph twice
    return torch.compile(function, backend="aot_eager" if kernels.INTERPRETED else "inductor", dynamic=False)


def adopt(rows):
    """From now on, use the chosen variants."""
    for row in rows:
        op = kernels.OPERATIONS[row["call"]["op"]]
        if row["chosen"] == "plain":
            op.chosen.pop(key_of(row["call"]), None)
        else:
            op.chosen[key_of(row["call"])] = variants_of(op)[row["chosen"]]


# ---------------------------------------------------------------- correct or wrong


class Trial:
    """Random inputs for a call, and the results of its variants on them."""

    def __init__(self, call, device):
        self.op = kernels.OPERATIONS[call["op"]]
        self.device = torch.device(device)
        self.autocast = getattr(torch, call["autocast"]) if call["autocast"] else None
        self.inputs = made(call, self.op.images, self.device)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            self.names = names_of(self.op, self.inputs)
        self.douts = []                                    # gradients of the outputs
        self.laid_out = {}                                 # the same, in the layouts of outputs

        # one unit in the last place of the coarsest dtype; the kernels round at other points
        dtypes = [x.dtype for x in self.inputs if isinstance(x, torch.Tensor)]
        if self.autocast:
            dtypes.append(self.autocast)
        self.rounding = max(1e-6, max(torch.finfo(dtype).eps for dtype in dtypes) / 2)

        # how far plain PyTorch is from the truth
        plain = self.run(self.op.variants["plain"], self.inputs, self.autocast)
        self.dtypes = [x.dtype for x in plain]
        self.truth = self.exactly(torch.float64 if self.rounding == 1e-6 else torch.float32)
        self.plain_errors = errors(plain, self.truth)

    def run(self, function, inputs, autocast, keep=True):
        """[outputs, gradients of trained inputs]; the outputs' gradients are random, but always the same.

        Their layout is that of the outputs, as attention gives them in LightningDiT.
        keep: these, so that a second run does not make them again
        """
        leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        context = torch.autocast(self.device.type, autocast, enabled=autocast is not None)
        with context, torch.set_grad_enabled(bool(leaves)):
            outputs = function(*inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        if not leaves:
            return outputs
        if not self.douts:
            for i, x in enumerate(outputs):
                self.douts.append(random(x.shape, autocast or x.dtype, self.device, seed=1 + i))
        heads = [x for x in outputs if x.requires_grad]
        layouts = tuple((x.dtype, x.stride()) for x in heads)
        douts = self.laid_out.get(layouts)
        if douts is None:
            douts = [torch.empty_like(x).copy_(dout)
                     for x, dout in zip(outputs, self.douts, strict=True) if x.requires_grad]
        if keep:
            self.laid_out[layouts] = douts
        grads = torch.autograd.grad(heads, leaves, douts, materialize_grads=True)
        return [x.detach() for x in (*outputs, *grads)]

    def call(self, function):
        return self.run(function, self.inputs, self.autocast)

    def exactly(self, dtype):
        """`run` of the specification with everything in this dtype, and no products in TF32."""
        inputs = []
        for x in self.inputs:
            if isinstance(x, torch.Tensor):
                x = x.detach().to(dtype).requires_grad_(x.requires_grad)
            inputs.append(x)
        flags = tf32()
        allow_tf32(False, False)
        try:
            return self.run(self.op.ref, inputs, None, keep=False)
        finally:
            allow_tf32(*flags)

    def verdict(self, function):
        """What is wrong with a variant's results, in a few words; "" if nothing."""
        results = self.call(function)
        for x, dtype in zip(results, self.dtypes, strict=True):
            if x.dtype not in (dtype, self.autocast):      # under autocast, a norm's may be either
                return f"gives {x.dtype}, wanted {dtype}"
        for ours, theirs in zip(errors(results, self.truth), self.plain_errors, strict=True):
            if ours == float("inf"):
                return "not finite"
            if ours > 2 * theirs + self.rounding:
                return f"wrong by {ours:.1e} of the largest value, plain PyTorch by {theirs:.1e}"
        return ""


def made(call, images, device):
    """Random tensors with the shapes, strides and dtypes of the call's. Other arguments as they were.

    Weights of products are scaled so that products keep their magnitude. If the batch is too large, the first
    `images` arguments get fewer rows.
    """
    first = call["arguments"][0]["shape"]
    rows = min(first[0], max(1, LARGEST // torch.Size(first[1:]).numel()))
    inputs = []
    for i, x in enumerate(call["arguments"]):
        if isinstance(x, dict):
            shape = [rows, *x["shape"][1:]] if i < images else x["shape"]
            room = 1 + sum((n - 1) * step for n, step in zip(shape, x["stride"]))
            values = random([room], getattr(torch, x["dtype"]), device, seed=100 + i)
            if x["weight"] and len(shape) > 1:
                values *= torch.Size(shape[1:]).numel()**-0.5
            x = values.as_strided(shape, x["stride"]).requires_grad_(x["trained"])
        inputs.append(x)
    return inputs


def random(shape, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def errors(results, truth):
    """For each result the largest error, relative to the largest value; infinite if it is not finite.

    raises: ValueError if the number of results or a shape differs
    """
    found = []
    for a, b in zip(results, truth, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"a result is {tuple(a.shape)}, wanted {tuple(b.shape)}")
        worst = (a.to(b.dtype) - b).abs().max() / b.abs().max().clamp(min=1e-30)
        found.append(worst.nan_to_num(nan=float("inf"), posinf=float("inf")).item())
    return found


def tf32():
    """Whether float32 products may use TF32: in matrix products, in convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def allow_tf32(matrices, convolutions):
    torch.backends.cuda.matmul.allow_tf32 = matrices
    torch.backends.cudnn.allow_tf32 = convolutions


# ---------------------------------------------------------------- a row of the table


def attempt(call, device, compiled, known, say):
    """The row of a call: each variant is judged, and correct ones are timed.

    known:   {variant: why it is left out}
    say:     called with the name of each variant before it runs for the first time
    """
    row = {"call": call, "ms": {}, "left_out": dict(known), "chosen": "plain"}
    torch._dynamo.reset()                                  # drop what was compiled for other shapes
    trial, why = guarded(device, lambda: Trial(call, device))
    if why:
        row["left_out"]["all"] = why
        return row

    right = {}
    for name in trial.names:
        if name in known or (compiled and name == "compiled"):
            continue
        say(name)
        function = trial.op.variants[name]
        if compiled and name == "plain":                   # the others compute the same inside compiled code
            function = by_compiler(function)
        why = judge(trial, function)
        if why:
            row["left_out"][name] = why
        else:
            right[name] = function

    row["ms"], failed = times(trial, right)
    row["left_out"] |= failed
    if row["ms"]:
        row["chosen"] = min(row["ms"], key=row["ms"].get)
    return row


def judge(trial, function):
    """What is wrong with a variant, or what it raised; "" if it is correct."""
    verdict, why = guarded(trial.device, lambda: trial.verdict(function))
    return why or verdict


def guarded(device, function):
    """(its result, "") or (None, what it raised).  raises: an error, if the GPU is no longer usable"""
    try:
        return function(), ""
    except failures() as error:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def failures():
    """Everything that a kernel, its compiler and its launch are known to raise."""
    found = [ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError,
             RuntimeError, SyntaxError, TypeError, ValueError, subprocess.SubprocessError]
    try:
        from triton.errors import TritonError
        found.append(TritonError)
    except ImportError:
        pass
    return tuple(found)


def times(trial, functions):
    """({name: ms of a call}, {name: why it failed}): medians of rounds in which the functions take turns."""
    found = {name: [] for name in functions}
    repeats = dict.fromkeys(functions, 1)
    failed = {}
    for n in range(1 + (ROUNDS if trial.device.type == "cuda" else 1)):        # the first finds `repeats`
        turns = [name for name in functions if name not in failed]
        if n % 2:
            turns.reverse()
        for name in turns:
            ms, why = guarded(trial.device, lambda f=functions[name], r=repeats[name]: launches(trial, f, r))
            if why:
                failed[name] = why
                continue
            found[name].append(ms)
            repeats[name] = max(1, min(REPEATS, int(ROUND_MS / max(ms, 1e-3))))
    return {name: statistics.median(ms[1:]) for name, ms in found.items() if name not in failed}, failed


def launches(trial, function, repeats):
    """ms per call, over `repeats` in a row; on a GPU, of its own time, without Python's."""
    if trial.device.type != "cuda":
        since = time.perf_counter()
        for _ in range(repeats):
            trial.call(function)
        return (time.perf_counter() - since) / repeats * 1e3
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    cycles = SLEEP * repeats
    for _ in range(SLEEPS):
        # The GPU sleeps first, so that the launches queue up: it is often faster than Python, and would wait
        # for each. If it has reached `begin` before all are queued, it did wait, and sleeps twice as long.
        torch.cuda._sleep(cycles)
        begin.record()
        for _ in range(repeats):
            trial.call(function)
        end.record()
        waited = begin.query()
        end.synchronize()
        if not waited:
            break
        cycles *= 2
    return begin.elapsed_time(end) / repeats


# ---------------------------------------------------------------- in a separate process


def try_apart(calls, rows, device, compiled):
    """Fill in the rows that are None.  Returns why some still are, or ""."""
    known = [{} for _ in calls]
    for _ in range(PROCESSES):
        job = {"calls": calls, "rows": rows, "known": known, "device": str(device), "compiled": compiled,
               "tf32": tf32(), "parent": os.getpid()}
        with tempfile.TemporaryDirectory() as folder:
            number, name, why = in_a_process(job, Path(folder), rows)
        if None not in rows:
            return ""
        if name is None:
            return why
        known[number][name] = why
        if name == "plain":                                # this call cannot be tried at all
            rows[number] = untried(calls[number], why)
    return f"{PROCESSES} processes failed, the last one: {why}"


def untried(call, why):
    return {"call": call, "ms": {}, "left_out": {"all": why}, "chosen": "plain"}


def in_a_process(job, folder, rows):
    """Try in a new process, and collect its rows.  Returns the call and variant it ended at, and why."""
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    with open(folder / "said", "w+", errors="replace") as said:
        process = subprocess.Popen(
            [*COMMAND, str(file)], cwd=Path(__file__).parent.parent, env=os.environ | {"KERNELS": "auto"},
            stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        why = end_of(process, folder / "lines")
        said.seek(0)
        last = "".join(said).strip().rpartition("\n")[2]
    number, name = None, None
    for line in read_lines(folder / "lines"):
        number, name = line["number"], line.get("starts")
        if "row" in line:
            rows[number] = line["row"]
    return number, name, f"{why}: {last[:120]}" if last else why


def end_of(process, lines):
    """Wait for the process that tries, as long as it starts or ends a variant every PATIENCE seconds.

    Returns how it ended.
    """
    written = 0
    try:
        while True:
            try:
                return f"its process ended with {process.wait(PATIENCE)}"
            except subprocess.TimeoutExpired:
                size = lines.stat().st_size if lines.exists() else 0
                if size == written:
                    return f"{SLOW} {PATIENCE} s"
                written = size
    finally:
        process.kill()                                     # even if Ctrl-C ends the wait
        process.wait()


def read_lines(path):
    """The complete lines that the process wrote."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def main(file):
    """The process that tries: writes a line before each variant, and one with the row of each call."""
    from torch._inductor import config as inductor         # here, because the import takes a second
    job = json.loads(Path(file).read_text())
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    allow_tf32(*job["tf32"])
    inductor.compile_threads = 1                           # starting others would take longer than they save
    with open(Path(file).parent / "lines", "w", buffering=1) as lines:

        def write(number, **what):
            lines.write(json.dumps({"number": number} | what) + "\n")

        for number, call in enumerate(job["calls"]):
            row = job["rows"][number]
            if os.getppid() != job["parent"]:              # the parent is gone
                return
            if row is None:
                write(number, starts="plain")
                row = attempt(call, device, job["compiled"], job["known"][number],
                              lambda name, number=number: write(number, starts=name))
                write(number, row=row)
            adopt([row])                                   # inner operations come first


if __name__ == "__main__":
    main(sys.argv[1])
