"""What a training run would take: sizes, FLOPs, memory, disk, from shapes alone."""
from support.config import flags


def show(cfg, model, channels, side, texts, forward, step, kept):
    """Print what `finetune.py` with these settings would be.

    model: on the meta device; channels, side: of the latent; texts: tokens of text
    forward, step: FLOPs of an image; kept: numbers that the backward pass keeps of an image
    returns {parameters, trained, tokens, forward, step}
    Memory is per GPU: exact for weights, gradients, AdamW and EMA;
    for what the backward pass keeps an upper bound.
    """
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = total - trained
    tokens = (side // model.cfg.p) ** 2
    if cfg.checkpointing:                                    # the input of every block, and one block in full
        kept = kept / model.cfg.depth + (tokens + texts) * model.cfg.E * model.cfg.depth

    # bytes: float32 weights, gradients, two moments, EMA for what is trained, bfloat16 for what is frozen
    states = (trained * 20 + frozen * 2) / 2**30
    activations = 2 * kept * cfg.micro_batch / 2**30           # bfloat16
    latents = channels * side**2 * 2 * (1 + cfg.flip) / 2**20  # float16, both orientations
    saved = 8 * (trained + (trained if cfg.lora else total)) / 2**30

    reads = [path for path in (cfg.data_dir, cfg.vae, cfg.base, cfg.text) if path]
    writes = "log.jsonl, pictures, vae/, " + ("frozen/, " if cfg.lora else "") + "and the two newest step_*/"
    print("\n".join(flags(cfg)))
    print(f"model   {type(model).__name__}: {total:,} parameters, {trained:,} trained, {frozen:,} frozen")
    print(f"tokens  {tokens} for {cfg.image_size} x {cfg.image_size} pixels (the original {4 * tokens}), "
          f"{texts} of text")
    print(f"FLOPs   {forward / 1e9:,.1f} G an image forward; {step * cfg.batch_size / 1e12:,.1f} T a step of "
          f"{cfg.batch_size}")
    print(f"memory  {states:.1f} GiB of states, {activations:.1f} GiB of activations at micro_batch "
          f"{cfg.micro_batch}; and the VAE")
    print(f"disk    {latents:.2f} MiB of cached latents an image; {saved:.1f} GiB a checkpoint")
    print(f"reads   {', '.join(reads)}")
    print(f"writes  {cfg.out}/: {writes}")
    return dict(parameters=total, trained=trained, tokens=tokens, forward=forward, step=step)
