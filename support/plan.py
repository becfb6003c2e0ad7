"""What a training run would take: sizes, FLOPs, memory, disk, from shapes alone."""
import kernels
from support.config import flags


def estimate(cfg, model, inputs, texts, add_lora):
    """Print what `finetune.py` with these settings would be.  Returns {parameters, trained, tokens, forward,
    step}.

    model, inputs: a widened transformer and one image's inputs, on the meta device;  texts: tokens of text
    add_lora: puts in the adapters, where cfg asks for them
    Memory is per GPU: weights, gradients, AdamW and EMA exactly; an upper bound of what the backward pass
    keeps.
    """
    forward, _, _ = kernels.cost(model, inputs)                # as it is sampled from, without adapters
    if cfg.lora:
        add_lora(model, cfg.lora, cfg.lora)
    _, step, kept = kernels.cost(model, inputs)

    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    channels, side, _ = inputs[0].shape[1:]
    tokens = (side // model.cfg.p) ** 2
    if cfg.checkpointing:                                    # the input of every block, and one block in full
        kept = kept / model.cfg.depth + (tokens + texts) * model.cfg.E * model.cfg.depth

    # bytes: float32 weights, gradients, two moments, EMA for what is trained, bfloat16 for what is frozen
    states = (trained * 20 + (total - trained) * 2) / 2**30
    activations = 2 * kept * cfg.micro_batch / 2**30           # bfloat16
    latents = channels * side**2 * 2 * (1 + cfg.flip) / 2**20  # float16, both orientations
    saved = 8 * (trained + (trained if cfg.lora else total)) / 2**30

    reads = [path for path in (cfg.data_dir, cfg.vae, cfg.base, cfg.text) if path]
    frozen = "frozen/, " if cfg.lora else ""
    print("\n".join(flags(cfg)))
    print(f"model   {type(model).__name__}: {total:,} parameters, {trained:,} trained, {total - trained:,} frozen")
    print(f"tokens  {tokens} for {cfg.image_size} x {cfg.image_size} pixels (the original {4 * tokens}), {texts} of text")
    print(f"FLOPs   {forward / 1e9:,.1f} G an image forward; {step * cfg.batch_size / 1e12:,.1f} T a step of "
          f"{cfg.batch_size}")
    print(f"memory  {states:.1f} GiB of states, {activations:.1f} GiB of activations at micro_batch {cfg.micro_batch}; "
          "and the VAE")
    print(f"disk    {latents:.2f} MiB of cached latents an image; {saved:.1f} GiB a checkpoint")
    print(f"reads   {', '.join(reads)}")
    print(f"writes  {cfg.out}/: log.jsonl, pictures, vae/, {frozen}and the two newest step_*/")
    return dict(parameters=total, trained=trained, tokens=tokens, forward=forward, step=step)
