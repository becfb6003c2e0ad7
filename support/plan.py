"""What a training run would take: sizes, FLOPs, memory, disk, hours, from shapes alone."""
import dataclasses

import torch

from support.config import flags

# Transformer: channels and f of the VAE whose latents the pretrained one knows
LATENTS = {
    "LightningDiT": (32, 16),      # VA-VAE
    "USiT": (32, 32),              # DC-AE
    "MMDiT": (16, 8),              # SD3's VAE
    "Flux2": (32, 8),              # FLUX.2's VAE, or TAEF2
    "Sana": (32, 32),              # DC-AE
}

# Of an H100 SXM, dense bfloat16, as its data sheet says; and which part of that a transformer may reach:
# assumed, lowest, highest, because this code has not run on a GPU. LightningDiT's authors report 285 img/s
# a GPU, which is 0.20; the best that is published of a DiT, one of 7 B parameters, is 0.52.
PEAK = 989e12
REACHED = (0.35, 0.20, 0.50)


def gpu_hours(flops, reached=REACHED[0], peak=PEAK):
    """Hours of one GPU for so many FLOPs, at `reached` of its peak FLOP/s."""
    return flops / (peak * reached) / 3600


def published(cfg, MODELS, new_dit, vaes):
    """(model, inputs, r) of what `cfg` would train: of cfg.model's published sizes; with texts, SD3.5's.

    Made where the caller says: on "meta", without memory.
    MODELS: dit.py's; new_dit: finetune.py's, for models of classes; vaes: train_vae.py's PRESETS, of which
    the one that makes cfg.vae says r
    raises: SystemExit if the images do not divide into tokens
    """
    r = 2
    for values in vaes.values():
        if values["out"] == cfg.vae:
            r = values.get("r", 2)
    kind = cfg.model
    if cfg.text and not (kind in MODELS and takes_text(MODELS[kind][0])):
        kind = "MMDiT"
    C, f = LATENTS.get(kind, LATENTS["LightningDiT"])
    f = r * f
    if cfg.text:
        ModelConfig, Model = MODELS[kind]
        model = Model(ModelConfig(C=C, D=cfg.D))
        cond = text_inputs(kind, model.cfg, cfg.t5_tokens)
    else:
        model = new_dit(cfg, C, f, num_classes=1000)
        cond = [torch.zeros(1, dtype=torch.long)]
    if cfg.image_size % (f * model.cfg.p):
        raise SystemExit(f"--image_size={cfg.image_size}: wanted a multiple of {f * model.cfg.p}")
    side = cfg.image_size // f
    return model, [torch.empty(1, C + cfg.D, side, side), torch.empty(1), *cond], r


def takes_text(ModelConfig):
    """Does the transformer of this config draw from texts?"""
    return "context" in {f.name for f in dataclasses.fields(ModelConfig)}


def text_inputs(kind, cfg, tokens):
    """A text of so many tokens, as a transformer takes it: beside its tokens a vector, or which count."""
    clip = 77 if kind == "MMDiT" else 0                            # CLIP's tokens are before T5's
    return [torch.empty(1, clip + tokens, cfg.context), torch.empty(1, getattr(cfg, "pooled", tokens))]


def show(cfg, model, inputs, r, forward, step, kept):
    """Print what `finetune.py` with these settings would be.

    model, inputs, r: see `published`
    forward, step: FLOPs of an image; kept: numbers that the backward pass keeps of an image
    returns {parameters, trained, tokens, forward, step}
    Memory is per GPU: exact for weights, gradients, AdamW and EMA;
    for what the backward pass keeps an upper bound. Hours are arithmetic, not a measurement.
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

    # bytes: float32 weights, gradients, two moments, EMA for what is trained, bfloat16 for what is frozen
    states = (trained * 20 + frozen * 2) / 2**30
    start = total * 4 * (3 if cfg.base else 2) / 2**30         # model, average and base, before they share
    activations = 2 * kept * cfg.micro_batch / 2**30           # bfloat16
    latents = channels * side**2 * 2 * (1 + cfg.flip) / 2**20  # float16, both orientations
    saved = 8 * (trained + (trained if cfg.lora else total)) / 2**30

    reads = [path for path in (cfg.data_dir, cfg.vae, cfg.base, cfg.text) if path]
    writes = "log.jsonl, pictures, vae/, " + ("frozen/, " if cfg.lora else "") + "and the two newest step_*/"
    print("\n".join(flags(cfg)))
    print(f"model   {type(model).__name__}: {total:,} parameters, {trained:,} trained, {frozen:,} frozen")
    print(f"tokens  {tokens} for {cfg.image_size} x {cfg.image_size} pixels (the original {r * r * tokens}), "
          f"{texts} of text")
    print(f"FLOPs   {forward / 1e9:,.1f} G an image forward; {step * cfg.batch_size / 1e12:,.1f} T a step of "
          f"{cfg.batch_size}")
    print(f"memory  {states:.1f} GiB of states, {activations:.1f} GiB of activations at micro_batch "
          f"{cfg.micro_batch}; and the VAE; before the first step {start:.1f} GiB of weights")
    once = f"; {frozen * 4 / 2**30:.1f} GiB once in frozen/" if cfg.lora else ""
    print(f"disk    {latents:.2f} MiB of cached latents an image; {saved:.1f} GiB a checkpoint{once}")
    print(f"        {latents * 2**20 / 1e6:.2f} TB of latents for a million images; {3 * saved:.1f} GiB of "
          "checkpoints, three while one is written")
    print(f"hours   {hours_line(cfg, forward, step)}")
    print(f"reads   {', '.join(reads)}")
    print(f"writes  {cfg.out}/: {writes}")
    return dict(parameters=total, trained=trained, tokens=tokens, forward=forward, step=step)


def work(cfg, forward, step):
    """FLOPs of all steps; with checkpointing, blocks are computed twice."""
    again = forward if cfg.checkpointing else 0
    return (step + again) * cfg.batch_size * cfg.steps


def hours_line(cfg, forward, step):
    """What `show` says of time."""
    expected, longest, shortest = (gpu_hours(work(cfg, forward, step), part) for part in REACHED)
    return (f"{expected:,.1f} of an H100, {expected / 8:,.1f} of eight, if {REACHED[0]:.0%} of its "
            f"{PEAK / 1e12:.0f} TFLOP/s is reached (assumed; {REACHED[1]:.0%}: {longest:,.1f}, "
            f"{REACHED[2]:.0%}: {shortest:,.1f}); the VAE's: experiments/budget.py")
