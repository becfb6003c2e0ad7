"""plan"""
import dataclasses

import kernels

import torch

from dit import DiTConfig, LightningDiT, MMDiT, MMDiTConfig, add_lora


def dry_run(cfg):
    """Print what a run would be, from shapes alone, for the released VA-VAE + LightningDiT or SD3 models.  Returns numbers.

    Memory is per GPU: weights, gradients, AdamW and EMA exactly; an upper bound of what the backward pass keeps.
    """
    C, f, texts = (16, 16, 77 + cfg.t5_tokens) if cfg.text else (32, 32, 0)
    side = cfg.image_size // f
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(C=C)) if cfg.text else LightningDiT(DiTConfig(
            C=C, p=cfg.p, grid=side // cfg.p, E=cfg.E, depth=cfg.depth, A=cfg.A, qk_norm=cfg.qk_norm))
        if cfg.D:
            model.expand_channels(cfg.D)
        inputs = [torch.empty(1, C + cfg.D, side, side), torch.empty(1)]
        inputs += ([torch.empty(1, texts, model.cfg.context), torch.empty(1, model.cfg.pooled)] if cfg.text else
                   [torch.zeros(1, dtype=torch.long)])
        forward, _, _ = kernels.cost(model, inputs)                 # as it is sampled from, without adapters
        if cfg.lora:
            add_lora(model, cfg.lora, cfg.lora)
        _, step, kept = kernels.cost(model, inputs)
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    tokens, depth = (side // model.cfg.p) ** 2, model.cfg.depth
    if cfg.checkpointing:                          # the input of every block, and one block in full
        kept = kept / depth + (tokens + texts) * model.cfg.E * depth
    states, kept = (trained * 20 + (total - trained) * 2) / 2**30, 2 * kept * cfg.micro_batch / 2**30
    disk = ((C + cfg.D) * side**2 * 2 * (1 + cfg.flip) / 2**20, 8 * (trained + (trained if cfg.lora else total)) / 2**30)
    print(*(f"--{name}={value}" for name, value in dataclasses.asdict(cfg).items()), sep="\n")
    print(f"model   {type(model).__name__}: {total:,} parameters, {trained:,} trained, {total - trained:,} frozen\n"
          f"tokens  {tokens} for {cfg.image_size} x {cfg.image_size} pixels (the original {4 * tokens}), {texts} of text\n"
          f"FLOPs   {forward / 1e9:,.1f} G an image forward; {step * cfg.batch_size / 1e12:,.1f} T a step of {cfg.batch_size}\n"
          f"memory  {states:.1f} GiB of states, {kept:.1f} GiB of activations at micro_batch {cfg.micro_batch}; and the VAE\n"
          f"disk    {disk[0]:.2f} MiB of cached latents an image; {disk[1]:.1f} GiB a checkpoint\n"
          f"reads   {', '.join(filter(None, (cfg.data_dir, cfg.vae, cfg.base, cfg.text)))}\n"
          f"writes  {cfg.out}/: log.jsonl, pictures, vae/, {'frozen/, ' if cfg.lora else ''}and the two newest step_*/")
    return dict(parameters=total, trained=trained, tokens=tokens, forward=forward, step=step)
