"""What a training run would take: sizes, FLOPs, memory, disk, hours; computed from shapes alone."""
import dataclasses
from pathlib import Path

import torch

from support import runs
from support.config import flags
from support.measurements import run_folder
from support.weights import load_davae, load_dit

# A preset's base VAE, or a transformer: channels and f of the latents that the pretrained one takes
LATENTS = {
    "taef2": (32, 8),
    "LightningDiT": (32, 16),      # VA-VAE
    "USiT": (32, 32),              # DC-AE
    "MMDiT": (16, 8),              # SD3's VAE
    "Flux2": (32, 8),              # FLUX.2's VAE, or TAEF2
    "Sana": (32, 32),              # DC-AE
}

# FLOP/s of an H100 SXM, dense bfloat16, from its data sheet; and the fraction that a transformer may reach:
# assumed, lowest, highest. Measured on one H200, LightningDiT-XL at batch 128 (2026-11-26): 0.42 with
# --compile=True, 0.20 without. LightningDiT's authors report 285 img/s per GPU, which is 0.20; the best
# published number for a DiT, one of 7 B parameters, is 0.52.
PEAK = 989e12
REACHED = (0.35, 0.20, 0.50)


def gpu_hours(flops, reached=REACHED[0], peak=PEAK):
    """Hours on one GPU for this many FLOPs, at a fraction `reached` of its peak FLOP/s."""
    return flops / (peak * reached) / 3600


def expected(cfg, stages, MODELS, new_dit, classes):
    """(model, inputs, r) of what `cfg` would train, on the device "meta", where nothing takes memory.

    Sizes come from the runs that cfg needs, if they exist; else from those runs' presets; else they are the
    published ones of cfg.model, or of SD3.5 for text to image.
    stages: {folder: Config} of the runs that presets make; MODELS: dit.py's; new_dit: finetune.py's, for
    class-conditional models; classes: how many
    raises: SystemExit if the images do not divide into tokens
    """
    kind = cfg.model
    if cfg.text and not (kind in MODELS and takes_text(MODELS[kind][0])):
        kind = "MMDiT"
    C, f, r = latent_of(cfg.vae, stages, kind)
    with torch.device("meta"):
        if cfg.text:
            ModelConfig, Model = MODELS[kind]
            model = Model(ModelConfig(C=C, D=cfg.D))
            cond = text_inputs(kind, model.cfg, cfg.t5_tokens)
        else:
            base = stages.get(cfg.base, cfg)                       # its settings are the widened model's
            model = new_dit(dataclasses.replace(base, D=cfg.D, image_size=cfg.image_size), C, f, classes)
            cond = [torch.zeros(1, dtype=torch.long)]
    if runs.checkpoints(run_folder(cfg.base)):
        model = load_dit(cfg.base).to("meta")
        if cfg.D:
            model.expand_channels(cfg.D)
    if cfg.image_size % (f * model.cfg.p):
        raise SystemExit(f"--image_size={cfg.image_size}: wanted a multiple of {f * model.cfg.p}")
    side = cfg.image_size // f
    x, t = torch.empty(1, C + cfg.D, side, side, device="meta"), torch.empty(1, device="meta")
    return model, [x, t, *cond], r


def latent_of(vae, stages, kind):
    """(C, f, r) of the latents of a DA-VAE in the folder `vae`: base channels, pixels per position, and r.

    stages: {folder: Config} of the runs that presets make; kind: of the transformer
    """
    if runs.checkpoints(run_folder(vae)):
        found = load_davae(vae)
        return found.C, found.f, found.r
    base = stages[vae].base if vae in stages else ""
    r = stages[vae].r if vae in stages else 2
    if base in stages:                                             # trained here: f doubles with each level
        C, f = stages[base].C, 2 ** (len(stages[base].widths) - 1)
    elif base and Path(base).exists():
        found = load_davae(base)
        C, f = found.C, found.f
    else:
        C, f = LATENTS.get(base) or LATENTS.get(kind, LATENTS["LightningDiT"])
    return C, r * f, r


def takes_text(ModelConfig):
    """Is the transformer of this config conditioned on text?  `context` is the width of its text tokens."""
    return "context" in {f.name for f in dataclasses.fields(ModelConfig)}


def text_inputs(kind, cfg, tokens):
    """A prompt of so many tokens as a transformer takes it: tokens, and a pooled vector or the token mask."""
    clip = 77 if kind == "MMDiT" else 0                            # CLIP's tokens come before T5's
    return [torch.empty(1, clip + tokens, cfg.context), torch.empty(1, getattr(cfg, "pooled", tokens))]


def show(cfg, model, inputs, r, forward, step, kept):
    """Print what `finetune.py` would take with these settings.

    model, inputs, r: see `expected`
    forward, step: FLOPs per image; kept: numbers stored per image for the backward pass
    returns {parameters, trained, tokens, forward, step}
    Memory is per GPU: exact for weights, gradients, AdamW and EMA; an upper bound for activations kept for
    the backward pass, if compiled (LightningDiT-XL at batch 128 on an H200: 37 of 51 GiB; not compiled, 60).
    Hours are arithmetic, not a measurement.
    """
    channels, side = inputs[0].shape[1:3]
    texts = inputs[2].shape[1] if cfg.text else 0
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = total - trained
    tokens = (side // model.cfg.p) ** 2
    if cfg.checkpointing:                                    # the input of every block, and one block in full
        stream = 2 if hasattr(model, "net") else 1           # a wrapped transformer's tokens are float32
        kept = kept / model.cfg.depth + stream * (tokens + texts) * model.cfg.E * model.cfg.depth

    states, start = memory(cfg, model, trained, frozen)
    activations = 2 * kept * cfg.micro_batch / 2**30           # bfloat16
    latents = channels * side**2 * 2 * (1 + cfg.flip) / 2**20  # float16, with mirrored ones
    text = 2 * sum(x.numel() for x in inputs[2:]) / 2**20      # of a caption: bfloat16, as a GPU encodes it
    saved = 8 * (trained + (trained if cfg.lora else total)) / 2**30

    reads = [path for path in (cfg.data_dir, cfg.vae, cfg.base, cfg.text) if path]
    folders = "vae/, " + ("frozen/, " if cfg.lora else "") + ("captions/, " if cfg.text else "")
    writes = f"log.jsonl, pictures, {folders}and the two newest step_*/"
    print("\n".join(flags(cfg)))
    print(f"model   {type(model).__name__}: {total:,} parameters, {trained:,} trained, {frozen:,} frozen")
    print(f"tokens  {tokens} for {cfg.image_size} x {cfg.image_size} pixels (the original {r * r * tokens}), "
          f"{texts} of text")
    print(f"FLOPs   {forward / 1e9:,.1f} G an image forward; {step * cfg.batch_size / 1e12:,.1f} T a step of "
          f"{cfg.batch_size}")
    print(f"memory  {states:.1f} GiB of states, {activations:.1f} GiB of activations at micro_batch "
          f"{cfg.micro_batch}; and the VAE; before the first step {start:.1f} GiB of weights, "
          "in the machine's memory for each GPU and, without --shard=True, then on it")
    once = f"; {frozen * 4 / 2**30:.1f} GiB once in frozen/" if cfg.lora else ""
    print(f"disk    {latents:.2f} MiB of cached latents an image; {saved:.1f} GiB a checkpoint{once}")
    print(f"        {latents * 2**20 / 1e6:.2f} TB of latents for a million images; {3 * saved:.1f} GiB of "
          "checkpoints, three while one is written")
    if cfg.text:
        print(f"        {text:.2f} MiB of encoded text a caption, {text * 2**20 / 1e6:.2f} TB for a million")
    print(f"hours   {hours_line(cfg, forward, step)}")
    print(f"reads   {', '.join(reads)}")
    print(f"writes  {cfg.out}/: {writes}")
    return dict(parameters=total, trained=trained, tokens=tokens, forward=forward, step=step)


def memory(cfg, model, trained, frozen):
    """(GiB of states on each GPU, GiB of weights before the first step, in the machine's memory for each)."""
    # bytes: float32 weights, gradients, two moments, EMA for what is trained, bfloat16 for what is frozen;
    # float32 for tables (SD3.5's positions: 0.8 GiB)
    tables = sum(x.numel() for x in model.buffers())
    states = trained * 20 + frozen * 2 + tables * 4
    once = trained + tables                                    # of the model; the EMA shares what is frozen
    start = 3 * once + 2 * frozen if cfg.base else 2 * once
    return states / 2**30, 4 * start / 2**30


def work(cfg, forward, step):
    """FLOPs of all steps; with checkpointing, blocks compute their forward twice."""
    again = forward if cfg.checkpointing else 0
    return (step + again) * cfg.batch_size * cfg.steps


def hours_line(cfg, forward, step):
    """What `show` says about time."""
    expected, longest, shortest = (gpu_hours(work(cfg, forward, step), part) for part in REACHED)
    return (f"{expected:,.1f} of an H100, {expected / 8:,.1f} of eight, if {REACHED[0]:.0%} of its "
            f"{PEAK / 1e12:.0f} TFLOP/s is reached (assumed; {REACHED[1]:.0%}: {longest:,.1f}, "
            f"{REACHED[2]:.0%}: {shortest:,.1f}); the VAE's: experiments/budget.py")
