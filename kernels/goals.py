"""Speed goals for one H200 (in brackets below: an H100), and whether the rows of bench.py meet them.

A goal is met, missed, or not measured, if it needs another program to compare with or its row is missing.
Ratios are of medians, from one process on one card; "ours" is the variant with KERNELS=auto and --compile.
"""

OURS = "auto, compiled"
COMPILED = "plain, compiled"
TRAINING = "LightningDiT, batch 128"
SAMPLING = "SD3.5-M 1024 px, 1024 tokens, 2 steps of 10"
LARGE = "SD3.5-M 2048 px, 4096 tokens, 2 steps of 2"
NATIVE = "SD3.5-M 1024 px, 4096 tokens, 2 steps of 10"
LARGE_NATIVE = "SD3.5-M 2048 px, 16384 tokens, 2 steps of 1"
SINGLE = "SD3.5-M 1024 px, 1024 tokens, 2 steps of 1"
STEP_FLOOR = 6.2           # ms: the arithmetic of one such step with guidance, at 790 TFLOP/s
MEMORY_BOUND = ("norm_modulate", "add_norm_modulate", "qknorm_rope", "groupnorm_silu")

# name: (what, what bench.py lacks to measure it, or a function of (Rows, is it an H100?) -> (met?, text))
GOALS = {}


def goal(name, what):
    """Decorator: this function of (rows, h100) returns (met?, number as text), or None if not measured."""
    def add(function):
        GOALS[name] = (what, function)
        return function
    return add


def elsewhere(name, what, needs):
    GOALS[name] = (what, needs)


def verdicts(rows, machine):
    """[{"goal", "what", "verdict", "number"}] from bench.py's rows; machine: the card's name."""
    rows = Rows(rows)
    found = []
    for name, (what, function) in GOALS.items():
        verdict, number = "not measured", function
        if callable(function):
            answer = function(rows, "H100" in machine)
            number = "its row is missing"
            if answer is not None:
                met, number = answer
                verdict = "met" if met else "missed"
        found.append({"goal": name, "what": what, "verdict": verdict, "number": number})
    return found


def table(found):
    lines = ["| | goal | verdict | number |", "|---|---|---|---|"]
    for row in found:
        lines.append(f"| {row['goal']} | {row['what']} | {row['verdict']} | {row['number']} |")
    return "\n".join(["", *lines])


class Rows:
    """The rows, indexed by what was measured and its variant."""

    def __init__(self, rows):
        self.rows = {(row["what"], row["variant"]): row for row in rows}

    def get(self, what, variant, name):
        """A number of a row, or None; ms is the median."""
        value = self.rows.get((what, variant), {}).get(name)
        return value[0] if name == "ms" and value is not None else value

    def ratio(self, what, variant, other):
        """How many times as long the other variant takes, or None."""
        return divided(self.get(what, other, "ms"), self.get(what, variant, "ms"))

    def least_ms(self, what, *variants):
        """The fastest variant's median, or None if none was measured."""
        found = [self.get(what, variant, "ms") for variant in variants]
        return min((ms for ms in found if ms is not None), default=None)

    def starting_with(self, operation, back):
        """Names of an operation's rows, with or without its backward."""
        names = {what for what, _ in self.rows if what.startswith(f"{operation} (")}
        return sorted(what for what in names if what.endswith(", and back") == back)


def divided(a, b):
    return None if a is None or b is None else a / b


def at_least(value, wanted, text):
    return None if value is None else (value >= wanted, text.format(value))


def at_most(value, wanted, text):
    return None if value is None else (value <= wanted, text.format(value))


# ---------------------------------------------------------------- the goals

elsewhere("G1", "training step against the original code: 1.35x", "the original code is not part of this")


@goal("G2", "training step against plain PyTorch, compiled: 1.15x")
def step_against_compiler(rows, h100):
    return at_least(rows.ratio(TRAINING, OURS, COMPILED), 1.15, "{:.2f}x")


@goal("G3", "MFU of the training step: 48 % [43 %]")
def utilisation(rows, h100):
    return at_least(rows.get(TRAINING, OURS, "MFU"), 0.43 if h100 else 0.48, "{:.1%}")


@goal("G4", "training: 670 [590] img/s")
def training_speed(rows, h100):
    return at_least(rows.get(TRAINING, OURS, "img/s"), 590 if h100 else 670, "{:.0f} img/s")


@goal("G5", "memory-bound kernels: 85 % of the copy rate, with the backward 75 %")
def bandwidth(rows, h100):
    worst = []
    for back, wanted in ((False, 0.85), (True, 0.75)):
        for operation in MEMORY_BOUND:
            for what in rows.starting_with(operation, back):
                rate = rows.get(what, "kernel", "of the ceiling")
                if rate is None:
                    return None
                worst.append((rate / wanted, f"{rate:.0%}: {what}"))
    if not worst:
        return None
    lowest, text = min(worst)
    return lowest >= 1, text


@goal("G6", "norm, rotation, attention, 256 tokens, against PyTorch, compiled: 1.5x, with the backward 1.3x")
def short_attention(rows, h100):
    found = []
    for back in (False, True):
        for what in rows.starting_with("norm, rotation, attention", back):
            ours = rows.least_ms(what, "kernel, flash", "kernel, cudnn")
            found.append(divided(rows.least_ms(what, "flash, compiled", "cudnn, compiled"), ours))
    if len(found) != 2 or None in found:
        return None
    return found[0] >= 1.5 and found[1] >= 1.3, "{:.2f}x, {:.2f}x".format(*found)


@goal("G7", "peak memory of the training step: 50 GB")
def memory(rows, h100):
    GiB = rows.get(TRAINING, OURS, "GiB")
    return None if GiB is None else at_most(GiB * 2**30 / 1e9, 50, "{:.1f} GB")


elsewhere("G8", "LightningDiT's sampler of 250 steps with an interval against the original: 1.6x",
          "the original code is not part of this")


@goal("G9", "SD3.5-M + DA-VAE, 1024 px, batch 10, 30 steps, guidance, decoding: 3.0 img/s")
def sampling_speed(rows, h100):
    return at_least(rows.get(SAMPLING, OURS, "img/s (estimate)"), 3.0, "{:.2f} img/s, from 2 steps")


@goal("G10", "the same against diffusers with 4096 tokens: 5.0x, compiled 4.2x")
def against_native_tokens(rows, h100):
    return against_diffusers(rows, NATIVE, 5.0, 4.2)


@goal("G11", "the same against diffusers with 1024 tokens: 1.35x, compiled 1.08x")
def against_the_same_tokens(rows, h100):
    return against_diffusers(rows, SAMPLING, 1.35, 1.08)


def against_diffusers(rows, what, wanted, wanted_compiled):
    """Images per second, ours of SAMPLING, over those of diffusers in a row, as it is and compiled."""
    ours = rows.get(SAMPLING, OURS, "img/s (estimate)")
    ratio = divided(ours, rows.get(what, "diffusers", "img/s (estimate)"))
    compiled = divided(ours, rows.get(what, "diffusers, compiled", "img/s (estimate)"))
    if ratio is None or compiled is None:
        return None
    return ratio >= wanted and compiled >= wanted_compiled, f"{ratio:.2f}x, {compiled:.2f}x"


@goal("G12", "2048 px: 0.58 img/s, and 7x diffusers with 16384 tokens")
def large_images(rows, h100):
    speed = rows.get(LARGE, OURS, "img/s (estimate)")
    ratio = divided(speed, rows.get(LARGE_NATIVE, "diffusers", "img/s (estimate)"))
    if ratio is None:
        return None
    return speed >= 0.58 and ratio >= 7, f"{speed:.2f} img/s, {ratio:.1f}x"


@goal("G13", "VAE decoder at 1024 px: 36 ms, and 2.5x diffusers")
def decoding(rows, h100):
    ms = rows.get("decode 1024 px", OURS, "ms")
    ratio = rows.ratio("decode 1024 px", OURS, "diffusers")
    if ratio is None:
        return None
    return ms <= 36 and ratio >= 2.5, f"{ms:.1f} ms, {ratio:.2f}x"


@goal("G14", "one image at 1024 px: a step takes 1.75 times its arithmetic")
def latency(rows, h100):
    ms = rows.get(SINGLE, f"{OURS}, graph", "ms")
    return None if ms is None else at_most(ms / 2 / STEP_FLOOR, 1.75, "{:.2f} times")


@goal("G15", "patch embedder: 1.3 times its bytes' time, with the backward 3x plain PyTorch")
def patch_embedder(rows, h100):
    forward = rows.starting_with("patch_embed", False)
    back = rows.starting_with("patch_embed", True)
    if not forward or not back:
        return None
    times = divided(1.0, rows.get(forward[0], "kernel", "of the ceiling"))
    ratio = rows.ratio(back[0], "kernel", "ref")
    if times is None or ratio is None:
        return None
    return times <= 1.3 and ratio >= 3, f"{times:.2f} times, {ratio:.2f}x"


elsewhere("G16", "8 GPUs against one: 95 % of 8x", "needs 8 GPUs")
