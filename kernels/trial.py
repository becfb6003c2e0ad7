"""Try one call of an operation: which of its variants are correct, and how long they take.

A call is plain data, as recorded by choose.py, so that another process can try it:

    {"op", "device", "autocast": a dtype or "", "arguments": [numbers, None, and for tensors
        {"shape", "stride", "dtype", "trained": does it get a gradient, "weight": is it a parameter}]}

So is the result, its row in the table:

    {"call", "ms": {variant: ms of a call}, "left_out": {variant: why}, "chosen": variant}

A variant is correct if it is at most twice as far from the specification in float32 as plain PyTorch in the
call's own dtypes, plus one rounding: the rule of tests/test_kernels.py. (For a call in float32, the
specification is in float64.) This must hold for each output and, if anything is trained, each gradient.

Why in other processes: a kernel with an illegal memory access takes down everything that its process has on
the GPU, and one that never ends cannot be stopped from within. In another process, it costs a line in the
table. And several processes compile at once.
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
PROCESSES = 4          # the most that are started for the same calls, one after another
AT_ONCE = 6            # the most at the same time
POLL = 0.01            # seconds between two looks at what a process has written
COMMAND = [sys.executable, "-m", "kernels.trial"]


# ---------------------------------------------------------------- a call's operation and its variants


def key_of(call):
    """`kernels.key` of the call's first argument."""
    first = call["arguments"][0]
    return call["device"], call["autocast"], getattr(torch, first["dtype"]), *first["shape"][1:]


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
        with torch.autocast(self.device.type, enabled=False):                  # as in training
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


def judged(call, device, compiled, known, say):
    """A call's row, without times, and {variant: function} of those that are correct.

    known:   {variant: why it is left out}
    say:     called with the name of each variant before it runs for the first time
    """
    row = {"call": call, "ms": {}, "left_out": dict(known), "chosen": "plain"}
    right = {}
    trial, why = guarded(device, lambda: Trial(call, device))
    if why:
        row["left_out"]["all"] = why
        return row, right

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
    return row, right


def timed(row, right, device):
    """The row, with the times of the correct variants and the fastest of them chosen."""
    trial, why = guarded(device, lambda: Trial(row["call"], device)) if right else (None, "")
    if why:
        row["left_out"]["all"] = why
    if trial is not None:
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


# ---------------------------------------------------------------- in separate processes


def try_apart(calls, rows, device, compiled, at_once=AT_ONCE):
    """Fill in the rows that are None.  Returns why some still are, or "".

    Compiling takes most of the time. So up to `at_once` processes judge a share of the calls each; when all
    have, the GPU is quiet, and they take their times, one process after another.
    """
    missing = [n for n, row in enumerate(rows) if row is None]
    count = min(len(missing), at_once, max(1, os.cpu_count() // 2))
    job = {"device": str(device), "compiled": compiled, "tf32": tf32(), "parent": os.getpid()}
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for i in range(count):
                shares.append(Share(missing[i::count], calls, rows, job, Path(folder) / str(i)))
            while any(share.busy() and not share.judged for share in shares):
                for share in shares:
                    share.follow()
                time.sleep(POLL)
            for share in shares:
                share.go()
                while share.busy():
                    share.follow()
                    time.sleep(POLL)
        finally:                                           # also if Ctrl-C ends the wait
            for share in shares:
                share.end()

    # several processes need more memory than one
    short = [n for n in missing if rows[n] is not None and lacks_memory(rows[n])]
    if count > 1 and short:
        for n in short:
            rows[n] = None
        return try_apart(calls, rows, device, compiled, at_once=1)
    return next((share.why for share in shares if share.why), "")


def lacks_memory(row):
    """Did plain, the kernel or the trial itself run out of memory?

    Other variants may: attention's `math` never has enough for very many tokens.
    """
    reasons = [row["left_out"].get(name, "") for name in ("all", "plain", "kernel")]
    return any(why.startswith("OutOfMemoryError") for why in reasons)


def untried(call, why):
    return {"call": call, "ms": {}, "left_out": {"all": why}, "chosen": "plain"}


class Share:
    """Some of the calls, and the process that tries them. If it dies, another goes on without its culprit.

    Each process has a folder with its job and the lines that it writes.
    """

    def __init__(self, numbers, calls, rows, job, folder):
        self.numbers = numbers                             # of its calls and rows
        self.calls = calls
        self.rows = rows
        self.job = job
        self.folder = folder
        self.known = {n: {} for n in numbers}              # {variant: why it is left out} of each call
        self.processes = 0
        self.why = ""                                      # it gave up
        self.start()

    def start(self):
        self.place = self.folder / str(self.processes)
        self.place.mkdir(parents=True)
        self.processes += 1
        tries = [[n, self.calls[n], self.known[n]] for n in self.missing()]
        file = self.place / "job.json"
        file.write_text(json.dumps(self.job | {"tries": tries, "go": str(self.folder / "go")}))
        with open(self.place / "said", "w") as said:
            self.process = subprocess.Popen(
                [*COMMAND, str(file)], cwd=Path(__file__).parent.parent, env=os.environ | {"KERNELS": "auto"},
                stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        self.judged = False                                # has the process judged all its calls?
        self.at = None                                     # the call and variant it is at
        self.read = 0                                      # how many of its lines have been read
        self.heard = time.monotonic()                      # when the last one came

    def missing(self):
        return [n for n in self.numbers if self.rows[n] is None]

    def busy(self):
        return not self.why and bool(self.missing())

    def go(self):
        """Let this share's processes take their times."""
        (self.folder / "go").touch()
        self.heard = time.monotonic()

    def end(self):
        self.process.kill()
        self.process.wait()

    def follow(self):
        """Read what the process has written. If it has died or hangs, start another, or give up."""
        code = self.process.poll()                         # first, so that no line is missed
        lines = read_lines(self.place / "lines")
        for line in lines[self.read:]:
            self.heard = time.monotonic()
            if "starts" in line:
                self.at = line["number"], line["starts"]
            elif "row" in line:
                self.rows[line["number"]] = line["row"]
            else:
                self.judged = True
        self.read = len(lines)
        waits = self.judged and not (self.folder / "go").exists()
        patient = waits or time.monotonic() - self.heard < PATIENCE
        if not self.busy() or (code is None and patient):
            return

        self.end()
        why = f"{SLOW} {PATIENCE} s" if code is None else f"its process ended with {code}"
        last = (self.place / "said").read_text(errors="replace").strip().rpartition("\n")[2]
        why = f"{why}: {last[:120]}" if last else why
        if self.at is None:
            self.why = why
            return
        number, name = self.at
        self.known[number][name] = why
        if name == "plain":                                # this call cannot be tried at all
            self.rows[number] = untried(self.calls[number], why)
        if self.processes == PROCESSES:
            self.why = f"{PROCESSES} processes failed, the last one: {why}"
        elif self.busy():
            self.start()


def read_lines(path):
    """The complete lines that a process wrote."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def main(file):
    """The process: writes a line before each variant, one when all are judged, and one with each row."""
    from torch._inductor import config as inductor         # here, because the import takes seconds
    job = json.loads(Path(file).read_text())
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    allow_tf32(*job["tf32"])
    inductor.compile_threads = 1                           # starting others would take longer than they save
    with open(Path(file).parent / "lines", "w", buffering=1) as lines:

        def write(**what):
            if os.getppid() != job["parent"]:              # the parent is gone
                sys.exit()
            lines.write(json.dumps(what) + "\n")

        found = []
        for number, call, known in job["tries"]:
            write(number=number, starts="plain")
            row, right = judged(call, device, job["compiled"], known,
                                lambda name, number=number: write(number=number, starts=name))
            found.append((number, row, right))
        write(judged=True)
        while not Path(job["go"]).exists() and os.getppid() == job["parent"]:
            time.sleep(POLL)
        for number, row, right in found:
            write(number=number, starts="plain")
            write(number=number, row=timed(row, right, device))


if __name__ == "__main__":
    main(sys.argv[1])
