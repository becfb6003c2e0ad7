"""What the paper's runs would take, on eight GPUs and on more: hours, disk, traffic, dollars.  docs/paper.md.

None of these runs has been made. FLOPs are counted from the models' shapes; the fraction of a GPU's peak that
is reached, prices and bandwidths are assumptions, and each is a flag: give your own figures.

    python experiments/budget.py
    python experiments/budget.py --price=2 --dit=45 --captioned=500000

Prints the tables of docs/paper.md. Bytes are counted in powers of ten; a GPU-day is 24 hours of one GPU.
"""
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import finetune
import train_vae
from support import config, plan
from support.config import field

POSITIVE = (1e-6, 1e12)
IMAGENET = 1_281_167               # images in ImageNet's training set
VALIDATION = 50_000                # in its validation set, and for FID-50k
MJHQ = 30_000                      # prompts of MJHQ-30K
MACHINE = 8                        # GPUs with a fast network between them, in one machine
BUCKET = 25 * 2**20                # bytes that DDP sums at once, its default
LOWEST = (20, 10)                  # % of the peak, for transformers and for autoencoders: see docs/paper.md
HIGHEST = (50, 35)


@dataclass
class Config:
    peak: float = field(989.0, "TFLOP/s of a GPU: an H100 SXM in dense bfloat16, by its data sheet",
                        within=POSITIVE)
    dit: float = field(35.0, "% of it that a transformer reaches, between 20 and 50", within=(0.1, 100))
    vae: float = field(20.0, "% of it that an autoencoder reaches, between 10 and 35", within=(0.1, 100))
    price: float = field(3.0, "dollars per GPU-hour; list prices of 2026, on demand: 2 to 5",
                         within=POSITIVE)
    storage: float = field(23.0, "dollars per month for a terabyte of object storage", within=POSITIVE)
    nvlink: float = field(300.0, "GB/s that a GPU sends inside a machine, of 450 on paper", within=POSITIVE)
    network: float = field(40.0, "GB/s that a GPU sends to another machine, of 50 on paper", within=POSITIVE)
    latency: float = field(5.0, "microseconds of waiting per hop of a collective", within=POSITIVE)
    captioned: int = field(100_000, "captioned images of the SD3.5 runs; the paper's stage 1 has as many",
                           within=(1, 10**12))
    kb512: float = field(115.0, "KB of an ImageNet image, on average", within=POSITIVE)
    kb1024: float = field(500.0, "KB of a JPEG of 1,024 pixels; four times that at 2,048", within=POSITIVE)
    decode: float = field(40.0, "megapixels/s of JPEG that a CPU core decodes and crops", within=POSITIVE)
    gpus: tuple = field((8, 64, 512), "GPUs in the table of steps", within=(1, 2**20), count=(1, 12))
    images: tuple = field((1_300_000, 100_000_000, 1_000_000_000), "images in the table of data sets",
                          within=(1, 10**15), count=(1, 12))


# ---------------------------------------------------------------- the jobs, counted


@dataclass
class Job:
    """One of the paper's runs. FLOPs are per image, 2 per multiply-add; tests/test_budget.py counts them."""
    preset: str                    # of finetune.py
    vae: str                       # the preset of train_vae.py
    encode: float                  # DAVAE.encode: the base on the small image, the details on the full one
    decode: float
    vae_step: float                # of train_vae.py, both players: losses, gradients of adaptive weights
    forward: float                 # of the transformer
    step: float                    # forward and backward, without what --checkpointing recomputes
    vae_total: int                 # the DA-VAE's parameters, frozen base included
    vae_trained: int
    total: int                     # the transformer's
    trained: int
    blocks: int
    passes: int                    # of the transformer, per sample: the paper's steps and guidance
    measured: int                  # images reconstructed, and as many samples; 0: none, as in the paper
    text: float = 0.0              # to encode a caption: 2 FLOPs per parameter and token
    text_bytes: int = 0            # of a caption's embeddings: (333, 4096) and (2048,) in bfloat16

    @property
    def cfg(self):
        return finetune.Config(**{"preset": self.preset, **finetune.PRESETS[self.preset]})

    @property
    def vae_cfg(self):
        return train_vae.Config(**{"preset": self.vae, **train_vae.PRESETS[self.vae]})

    @property
    def again(self):
        """FLOPs of the forward pass that the backward pass recomputes."""
        return self.forward if self.cfg.checkpointing else 0.0

    def latent_bytes(self):
        """Bytes of an image in the cache: float16, with its mirror image if the run mirrors."""
        channels, f = LATENTS[self.vae]
        return 2 * (1 + self.cfg.flip) * channels * (self.cfg.image_size // f) ** 2

    def image_bytes(self, cfg):
        if self.vae == "imagenet512":
            return 1e3 * cfg.kb512
        return 1e3 * cfg.kb1024 * (self.cfg.image_size / 1024) ** 2


# DA-VAE: C + D, f
LATENTS = {"imagenet512": (128, 32), "sd35m": (32, 16)}

# T5-XXL's encoder (4.76 B) on 256 tokens; CLIP-G's and CLIP-L's text parts (0.69 and 0.12 B) on 77
TEXT = 2 * (4.76e9 * 256 + 0.81e9 * 77)
TEXT_BYTES = 2 * (333 * 4096 + 2048)

JOBS = [
    # 249 steps; guidance is on from t = 0.2, which shift 0.3 makes late: another 135 passes
    Job("imagenet512", "imagenet512", encode=0.695e12, decode=1.016e12, vae_step=6.92e12,
        forward=0.2374e12, step=0.712e12, vae_total=142_199_766, vae_trained=72_363_699,
        total=675_183_104, trained=675_183_104, blocks=28, passes=249 + 135, measured=VALIDATION),
    Job("sd35m-1024", "sd35m", encode=5.997e12, decode=10.475e12, vae_step=50.68e12,
        forward=2.443e12, step=6.237e12, vae_total=168_046_382, vae_trained=84_226_699,
        total=2_488_341_760, trained=245_368_448, blocks=24, passes=60, measured=MJHQ, text=TEXT,
        text_bytes=TEXT_BYTES),
    Job("sd35m-2048", "sd35m", encode=30.995e12, decode=48.496e12, vae_step=50.68e12,
        forward=11.251e12, step=30.75e12, vae_total=168_046_382, vae_trained=84_226_699,
        total=2_488_341_760, trained=245_368_448, blocks=24, passes=60, measured=0, text=TEXT,
        text_bytes=TEXT_BYTES),
]


# ---------------------------------------------------------------- formulas


def gather(size, gpus, cfg):
    """Seconds of an all-gather, or of a reduce-scatter, of `size` bytes over so many GPUs.

    First between machines, where each GPU sends its eighth; then inside each machine. An all-reduce is two.
    """
    inside = min(gpus, MACHINE)
    machines = gpus / inside
    between = size / inside * (machines - 1) / machines / (cfg.network * 1e9)
    return between + size * (inside - 1) / inside / (cfg.nvlink * 1e9)


def sent(size, gpus):
    """Bytes that each GPU sends in an all-gather, or in a reduce-scatter, of `size` bytes."""
    return size * (gpus - 1) / gpus


def waits(collectives, gpus, cfg):
    """Seconds that so many collectives wait for their hops, assuming a tree."""
    return collectives * cfg.latency * 1e-6 * math.log2(gpus)


def compute_seconds(job, images, cfg):
    """(seconds of a step on one GPU with this many images, seconds of its backward pass)"""
    rate = cfg.peak * 1e12 * cfg.dit / 100
    step = (job.step + job.again) * images / rate
    return step, step - job.forward * images / rate


def ddp(job, images, gpus, cfg):
    """(bytes sent, seconds of a step) with DistributedDataParallel.

    Gradients, float32, are summed while the backward pass runs; only traffic beyond it, and the last bucket,
    is waited for.
    """
    size = 4 * job.trained
    compute, backward = compute_seconds(job, images, cfg)
    traffic = 2 * gather(size, gpus, cfg) + waits(2 * math.ceil(size / BUCKET), gpus, cfg)
    last = 2 * gather(min(BUCKET, size), gpus, cfg) + waits(2, gpus, cfg)
    return 2 * sent(size, gpus), compute + max(0.0, traffic - backward) + last


def fsdp(job, images, gpus, cfg):
    """(bytes sent, seconds of a step) with `--shard=True` (FSDP2).

    All parameters, float32, frozen ones too, are gathered for the forward and again for the backward pass;
    gradients are scattered. The first block is waited for.
    """
    compute, _ = compute_seconds(job, images, cfg)
    traffic = 2 * gather(4 * job.total, gpus, cfg) + gather(4 * job.trained, gpus, cfg)
    traffic += waits(3 * 2 * job.blocks, gpus, cfg)                    # adaLN is gathered separately
    first = gather(4 * job.total / job.blocks, gpus, cfg) + waits(1, gpus, cfg)
    bytes_sent = 2 * sent(4 * job.total, gpus) + sent(4 * job.trained, gpus)
    return bytes_sent, compute + max(0.0, traffic - compute) + first


def hours(flops, part, cfg):
    """GPU-hours for so many FLOPs at `part` % of the peak."""
    return plan.gpu_hours(flops, part / 100, cfg.peak * 1e12)


# ---------------------------------------------------------------- tables


def table(head, rows):
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def assumptions(cfg):
    rows = [[f"`--{f.name}=`", config.show(getattr(cfg, f.name)), f.metadata["help"]]
            for f in dataclasses.fields(cfg)]
    return table(["flag", "here", "what it is"], rows)


def counted(cfg):
    """The cost of an image, in TFLOP and bytes."""
    lines = {
        "DA-VAE encodes, TFLOP": lambda job: f"{job.encode / 1e12:.2f}",
        "DA-VAE decodes, TFLOP": lambda job: f"{job.decode / 1e12:.2f}",
        "step of train_vae.py, TFLOP": lambda job: f"{job.vae_step / 1e12:.1f}",
        "transformer, one pass, TFLOP": lambda job: f"{job.forward / 1e12:.2f}",
        "step of finetune.py, TFLOP": lambda job: f"{(job.step + job.again) / 1e12:.2f}",
        "encoders of its text, TFLOP": lambda job: f"{job.text / 1e12:.2f}" if job.text else "",
        "its latents on disk": lambda job: size_of(job.latent_bytes()),
        "its text's embeddings on disk": lambda job: size_of(job.text_bytes),
    }
    rows = [[name, *map(value, JOBS)] for name, value in lines.items()]
    return table(["of one image", *(job.preset for job in JOBS)], rows)


def stages(job, cfg):
    """[(what, images, FLOPs of transformers, of autoencoders, bytes on disk)] of a job, from raw data on.

    Autoencoder and transformer count three checkpoints each: as many as exist while one is written.
    """
    run, vae = job.cfg, job.vae_cfg
    images = IMAGENET if job.vae == "imagenet512" else cfg.captioned
    found = [("raw images", 0, 0, 0, images * job.image_bytes(cfg))]

    def texts(what, count):
        return what, count, count * job.text, 0, count * job.text_bytes

    if run.preset != "sd35m-2048":                                 # it reuses those of 1,024 pixels
        trained_on = vae.batch_size * vae.steps
        saved = 4 * job.vae_total + 8 * job.vae_trained
        found.append((f"`train_vae.py {job.vae}`", trained_on, 0, trained_on * job.vae_step, 3 * saved))
        if job.text:
            found.append(texts("`sample.py text`", images))

    encoded = images * (1 + run.flip)
    found.append(("`finetune.py`, encoding", encoded, 0, encoded * job.encode, images * job.latent_bytes()))
    kept = job.trained if run.lora else job.total
    saved = 3 * 8 * (job.trained + kept) + 4 * (job.total - job.trained)                    # and frozen/
    work = plan.work(run, job.forward, job.step)
    found.append((f"`finetune.py {job.preset}`", run.batch_size * run.steps, work, 0, saved))

    n = job.measured
    if n:                                                          # in four rows: at most twice the DA-VAE's
        found.append(("`evaluate.py`, reconstructions", n, 0, 2 * n * (job.encode + job.decode), 0))
        if job.text:
            found.append(texts("`evaluate.py`, prompts", n))
        found.append(("`evaluate.py`, samples", n, n * job.passes * job.forward, n * job.decode, 0))
    return found


def runs(job, cfg):
    """A job's stages on eight GPUs, one after another."""
    rows, sums = [], [0.0] * 5
    for what, images, dit, vae, disk in stages(job, cfg):
        numbers = [(hours(dit, of_dit, cfg) + hours(vae, of_vae, cfg)) / MACHINE
                   for of_dit, of_vae in ((cfg.dit, cfg.vae), HIGHEST, LOWEST)]
        numbers += [numbers[0] * MACHINE * cfg.price, disk / 1e9]
        sums = [a + b for a, b in zip(sums, numbers)]
        speed = f"{images / numbers[0] / 3600:,.0f}" if images else ""
        rows.append([what, f"{images:,}" if images else "", speed, *shown(numbers)])
    rows.append(["**together**", "", "", *shown(sums)])
    return table([job.preset, "images", "images/s", "hours on 8", "between", "dollars", "disk, GB"], rows)


def shown(numbers):
    """Hours, their range, dollars, GB, as `runs` prints them."""
    expected, shortest, longest, dollars, disk = numbers
    if not expected:
        return ["", "", "", f"{disk:,.0f}"]
    return [short(expected), f"{short(shortest)} to {short(longest)}", f"{dollars:,.0f}",
            f"{disk:,.0f}" if disk else ""]


def short(x):
    """A number with about three digits."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def steps(job, cfg):
    """A step on more and more GPUs, each with as many images as in the preset; or with its batch split."""
    each = job.cfg.batch_size / MACHINE
    rows = []
    for gpus in cfg.gpus:
        row = [gpus, f"{each * gpus:,.0f}"]
        for step in (ddp, fsdp):
            compute, _ = compute_seconds(job, each, cfg)
            traffic, seconds = step(job, each, gpus, cfg)
            row += [f"{traffic / 1e9:.1f}", f"{seconds:.3f}", f"{100 * compute / seconds:.0f} %"]
        row.append(split(job, gpus, cfg))
        rows.append(row)
    return table([job.preset, "images a step", "DDP: GB sent", "seconds", "efficiency", "FSDP2: GB sent",
                  "seconds", "efficiency", "the paper's batch, DDP"], rows)


def split(job, gpus, cfg):
    """Efficiency if the preset's batch is split over so many GPUs."""
    if job.cfg.batch_size % gpus:
        return f"{job.cfg.batch_size} does not divide"
    images = job.cfg.batch_size // gpus
    compute, _ = compute_seconds(job, images, cfg)
    return f"{100 * compute / ddp(job, images, gpus, cfg)[1]:.0f} %"


def data_sets(job, cfg):
    """What data sets of these sizes take: on disk, encoded once, or encoded in every pass over them."""
    rows = []
    for images in cfg.images:
        encode = hours(images * job.encode, cfg.vae, cfg) + hours(images * job.text, cfg.dit, cfg)
        once = encode + hours(images * job.encode * job.cfg.flip, cfg.vae, cfg)
        train = hours(images * (job.step + job.again), cfg.dit, cfg)
        cache = images * (job.latent_bytes() + job.text_bytes)
        stored = [images * one for one in (job.image_bytes(cfg), job.latent_bytes(), job.text_bytes)]
        month = f"{cache / 1e12 * cfg.storage:,.0f}"
        rows.append([f"{images:,}", *map(size_of, stored), days(once, cfg), month, days(encode, cfg),
                     days(train, cfg)])
    return table([f"{job.preset}, images", "JPEG", "latents", "texts", "encoded once: GPU-days, dollars",
                  "kept a month: dollars", "on the fly, each pass: GPU-days, dollars",
                  "trained on, each pass: GPU-days, dollars"], rows)


def days(gpu_hours, cfg):
    return f"{short(gpu_hours / 24)}, {gpu_hours * cfg.price:,.0f}"


def streams(cfg):
    """What a machine with eight GPUs reads, from the cache and on the fly."""
    rows = []
    for job in JOBS:
        train = hours(job.step + job.again, cfg.dit, cfg)
        encode = hours(job.encode, cfg.vae, cfg) + hours(job.text, cfg.dit, cfg)
        cached = MACHINE / 3600 / train                            # images/s
        fly = MACHINE / 3600 / (train + encode)
        one = job.latent_bytes() / (1 + job.cfg.flip) + job.text_bytes
        pixels = job.cfg.image_size ** 2
        rows.append([job.preset, f"{cached:,.0f}", f"{cached * one / 1e6:,.0f}", f"{fly:,.0f}",
                     f"{fly * job.image_bytes(cfg) / 1e6:,.0f}", f"{fly * pixels / 1e6 / cfg.decode:,.1f}"])
    return table(["eight GPUs", "from the cache: images/s", "MB/s", "on the fly: images/s", "MB/s",
                  "CPU cores that decode"], rows)


def size_of(count):
    """Bytes in readable units; "" for none."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f} B" if count else ""


def tables(cfg):
    """{name: lines} of every table, as docs/paper.md has them."""
    found = {"assumptions": assumptions(cfg), "counted": counted(cfg)}
    found |= {f"runs {job.preset}": runs(job, cfg) for job in JOBS}
    found |= {f"steps {job.preset}": steps(job, cfg) for job in JOBS[:2]}
    found |= {f"data {job.preset}": data_sets(job, cfg) for job in JOBS[:2]}
    return found | {"streams": streams(cfg)}


def main(cfg):
    for lines in tables(cfg).values():
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main(config.cli(Config))
