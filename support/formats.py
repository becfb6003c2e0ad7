"""formats"""
import math

import torch

from dit import SIZES, DiTConfig, MMDiTConfig, rope_table, sincos_table

DROPPED = {                  # first components of keys that a base VAE checkpoint may carry beside the autoencoder
    "loss": "perceptual loss and discriminator of VA-VAE's training",
    "foundation_model": "the DINOv2 that VA-VAE was aligned to",
    "linear_proj": "its projection, used in training only",
    "logvar": "a training-only scalar",
    "model": "the transformer in an SD3 single-file checkpoint",
    "text_encoders": "the text encoders in an SD3 single-file checkpoint",
}


# diffusers' names of the same layers, the original ones; the last four are diffusers' own old spellings
KL_DIFFUSERS = ((".down_blocks.", ".down."), (".mid_block.attentions.0.group_norm.", ".mid.attn_1.norm."),
             (".mid_block.attentions.0.", ".mid.attn_1."), (".mid_block.resnets.0.", ".mid.block_1."),
             (".mid_block.resnets.1.", ".mid.block_2."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
             (".upsamplers.0.", ".upsample."), (".conv_shortcut.", ".nin_shortcut."), (".conv_norm_out.", ".norm_out."),
             (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".proj_out."),
             (".query.", ".q."), (".key.", ".k."), (".value.", ".v."), (".proj_attn.", ".proj_out."))


def _parts(quant):
    """Where original names keep the layers beside the latent, and where we do."""
    return {"encoder.conv_out.": "to_moments.0.", "quant_conv.": "to_moments.1.", "post_quant_conv.": "from_latent.0.",
            "decoder.conv_in.": f"from_latent.{int(quant)}."}


def _moved(key, parts):
    part = next((p for p in parts if key.startswith(p)), "")
    return parts.get(part, "") + key.removeprefix(part)


def import_kl(sd, where="state dict"):
    """Original (LDM) or diffusers names of an AutoencoderKL -> ours; pure, and only DROPPED is left out."""
    prefix = "first_stage_model."
    if any(k.startswith(prefix) for k in sd):
        sd = {k.removeprefix(prefix): v for k, v in sd.items() if k.startswith(prefix)}
    sd = {k: v for k, v in sd.items() if k.split(".")[0] not in DROPPED}
    foreign = [k for k in sd if k.split(".")[0] not in ("encoder", "decoder", "quant_conv", "post_quant_conv")]
    if foreign or "encoder.conv_in.weight" not in sd:
        keys = ", ".join((foreign or list(sd))[:3]) or "no keys"
        raise SystemExit(f"{where}: not an autoencoder (it holds {keys}, ...); wanted VA-VAE, an SD or SD3 VAE, or TAEF2")
    if any(".mid_block." in k for k in sd):
        sd = _from_diffusers(sd)
    sd = {_moved(k, _parts("quant_conv.weight" in sd)): v for k, v in sd.items()}
    return {k.replace(".downsample.", ".resample.").replace(".upsample.", ".resample."): v for k, v in sd.items()}


def export_kl(vae, diffusers=False):
    """Our AutoencoderKL -> original names (VA-VAE, SD3 without its prefix), or diffusers'; without the statistics."""
    parts, theirs = {ours: name for name, ours in _parts(vae.cfg.quant).items()}, {}
    for k, v in ((k, v) for k, v in vae.state_dict().items() if k not in ("mean", "std")):
        k = _moved(k, parts)
        k = k.replace(".resample.", ".downsample." if k.startswith("encoder.") else ".upsample.")
        if diffusers:
            for new, old in KL_DIFFUSERS[:-4]:
                k = k.replace(old, new)
            if k.startswith("decoder.up."):
                _, _, i, rest = k.split(".", 3)
                k = f"decoder.up_blocks.{len(vae.cfg.ch_mult) - 1 - int(i)}.{rest}"
            v = v[:, :, 0, 0] if ".attentions." in k and v.ndim == 4 else v
        theirs[k] = v
    return theirs


def _from_diffusers(sd):
    """diffusers names -> original names: the decoder's levels are counted from the other end, attention is linear."""
    levels = len({k.split(".")[2] for k in sd if k.startswith("encoder.down_blocks.")})
    original = {}
    for k, v in sd.items():
        if k.startswith("decoder.up_blocks."):
            _, _, i, rest = k.split(".", 3)
            k = f"decoder.up.{levels - 1 - int(i)}.{rest}"
        for theirs, ours in KL_DIFFUSERS:
            k = k.replace(theirs, ours)
        original[k] = v[:, :, None, None] if ".mid.attn_1." in k and v.ndim == 2 else v
    return original


def import_taef2(sd):
    """TAEF2's two Sequentials, `encoder.i` and `decoder.i`, -> our four parts; statistics stay 0 and 1."""
    ours = {"mean": torch.zeros(32), "std": torch.ones(32)}
    for k, v in sd.items():
        part, i, rest = k.split(".", 2)
        i = int(i)
        if part == "encoder":                # ours has an affine layer in front
            ours[f"to_moments.{rest}" if i == 14 else f"encoder.{i + 1}.{rest}"] = v
        else:                                # theirs counts the clamp, a convolution and a ReLU as 0, 1, 2
            ours[f"from_latent.1.{rest}" if i == 1 else f"decoder.{i - 3}.{rest}"] = v
    return ours


def import_dit(sd):
    """Released names of either model -> (our state dict, its config).  raises: ValueError saying what `sd` looks like."""
    prefix = "model.diffusion_model."              # beside it, a single-file checkpoint may hold the VAE and text encoders
    if any(k.startswith(prefix) for k in sd):
        sd = {k.removeprefix(prefix): v for k, v in sd.items() if k.startswith(prefix)}
    if "transformer_blocks.0.attn.to_q.weight" in sd:
        return import_diffusers(sd)
    if "joint_blocks.0.x_block.attn.qkv.weight" in sd:
        ours = {_rename(k, SD3_RENAME): v for k, v in sd.items()}
        return ours, _mmdit_config(ours)
    return import_lightningdit(sd)


RENAME = [("x_embedder.proj.", "P."), ("final_layer.linear.", "O."), ("final_layer.norm_final.", "norm_final."),
          ("final_layer.adaLN_modulation.1.", "adaLN_final."), (".adaLN_modulation.1.", ".adaLN."),
          ("t_embedder.mlp.", "t_embedder."), ("y_embedder.embedding_table.", "y_embedder.")]    # upstream, ours


TABLES = ["pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"]     # upstream saves them; ours come from a formula


def import_lightningdit(sd):
    """Upstream LightningDiT names -> (our state dict, DiTConfig).  Drops `TABLES`, once they are seen to be ours."""
    cfg = _dit_config(sd)
    ours = [sincos_table(cfg.grid, cfg.E), *(rope_table(cfg.grid, cfg.E // cfg.A) if cfg.rope else ())]
    for name, table in zip(TABLES, ours):
        # Upstream computes the RoPE angles in float32, up to 1e-6 off; another formula would be off by 0.1.
        tolerance = max(1e-5, torch.finfo(sd[name].dtype).eps)
        if sd[name].shape != table.shape or (sd[name].float().cpu() - table).abs().max() > tolerance:
            raise ValueError(f"the table {name} {tuple(sd[name].shape)} is not the one LightningDiT computes for a "
                             f"{cfg.grid}x{cfg.grid} grid; only tokens at whole positions 0, 1, 2 ... can be loaded")
    return {_rename(k, RENAME): v for k, v in sd.items() if k not in TABLES}, cfg


def export_lightningdit(model):
    """Our model -> upstream names, of a stock LightningDiT with in_channels C + D.  Inverse of the import if D = 0."""
    sd = {_rename(k, RENAME, back=True): v for k, v in merged(model).items()}
    tables = [model.pos_embed, model.rope_cos, model.rope_sin]
    return sd | {name: table for name, table in zip(TABLES, tables) if table is not None}


def merged(model):
    """Our state dict with P_new inside P and O_new inside O, as one wider layer each."""
    sd, p = {k: v.detach() for k, v in model.state_dict().items()}, model.cfg.p
    if model.cfg.D:
        sd["P.weight"] = torch.cat([sd["P.weight"], sd.pop("P_new.weight")], dim=1)       # (E, C+D, p, p)
        for name in ("weight", "bias"):            # rows run over (p, p, C): the channels meet inside each pixel
            heads = [sd[f"O.{name}"], sd.pop(f"O_new.{name}")]
            sd[f"O.{name}"] = torch.cat([o.unflatten(0, (p**2, -1)) for o in heads], dim=1).flatten(0, 1)
    return sd


def _rename(key, pairs, back=False):
    """`key` with every (upstream, ours) replaced, or replaced back; without a leading dot, only where a key begins."""
    for pair in pairs:
        old, new = pair[::-1] if back else pair
        key = key.replace(old, new) if old.startswith(".") or key.startswith(old) else key
    return key


def _dit_config(sd):
    """DiTConfig from the names and shapes of an upstream state dict."""
    needed = ["x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight",
              "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"]
    if any(k not in sd for k in needed):
        raise ValueError(f"this looks like {_looks_like(sd)}; wanted a LightningDiT, SD3.5's transformer, or a run of ours")
    E, C, p, _ = sd["x_embedder.proj.weight"].shape
    swiglu = "blocks.0.mlp.w3.weight" in sd
    if sd["blocks.0.adaLN_modulation.1.weight"].shape[0] != 6 * E:
        raise ValueError("this LightningDiT was trained with wo_shift (no shift in its adaLN), which is left out here")
    if sd["final_layer.linear.weight"].shape[0] != p * p * C:
        raise ValueError("its head does not predict as many channels as come in (learn_sigma?), wanted a velocity only")
    qk_norm, rope_on = "blocks.0.attn.q_norm.weight" in sd, "feat_rope.freqs_cos" in sd
    A = {width: heads for _, width, heads in SIZES.values()}.get(E)
    if qk_norm or rope_on:
        A = E // sd["blocks.0.attn.q_norm.weight" if qk_norm else "feat_rope.freqs_cos"].shape[-1]
    if A is None:
        raise ValueError(f"neither a RoPE table, nor q_norm, nor a released width tells the number of heads (E={E})")
    return DiTConfig(C=C, p=p, grid=math.isqrt(sd["pos_embed"].shape[1]), E=E, A=A,
                     depth=sum(k.endswith(".attn.qkv.weight") for k in sd),
                     hidden=sd[f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"].shape[1],
                     num_classes=sd["y_embedder.embedding_table.weight"].shape[0] - 1,
                     swiglu=swiglu, qk_norm=qk_norm, rms_norm="blocks.0.norm1.weight" in sd, rope=rope_on)


def _looks_like(sd):
    """A few words for a state dict that is not a LightningDiT's."""
    signs = {"a LoRA": ("lora_",), "an incomplete SD3 transformer": ("joint_blocks.", "transformer_blocks."),
             "an autoencoder": ("encoder.", "decoder."), "one file of our own checkpoint": ("P.weight",)}
    found = (what for what, parts in signs.items() if any(part in k for k in sd for part in parts))
    return next(found, f"something else (it holds {', '.join(map(str, list(sd)[:4]))} ...)")


SD3_RENAME = [("x_embedder.proj.", "P."), ("final_layer.linear.", "O."), ("final_layer.adaLN_modulation.1.", "adaLN_final."),
              (".adaLN_modulation.1.", ".adaLN."), ("t_embedder.mlp.", "t_embedder."), ("y_embedder.mlp.", "y_embedder."),
              ("joint_blocks.", "blocks."), (".x_block.", ".x."), (".context_block.", ".text."),
              (".ln_q.", ".q_norm."), (".ln_k.", ".k_norm.")]           # the single-file names, ours


DIFFUSERS = {"P": "pos_embed.proj", "O": "proj_out", "context_embedder": "context_embedder", "adaLN_final": "norm_out.linear",
             **{f"{e}_embedder.{2 * i}": f"time_text_embed.{name}_embedder.linear_{i + 1}"
                for e, name in (("t", "timestep"), ("y", "text")) for i in (0, 1)}}


DIFFUSERS_BLOCK = {          # our layer of a block: the diffusers layers that it stacks
    "x.adaLN": "norm1.linear", "x.mlp.fc1": "ff.net.0.proj", "x.mlp.fc2": "ff.net.2",
    "text.adaLN": "norm1_context.linear", "text.mlp.fc1": "ff_context.net.0.proj", "text.mlp.fc2": "ff_context.net.2",
    "text.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "text.attn.proj": "attn.to_add_out",
    "text.attn.q_norm": "attn.norm_added_q", "text.attn.k_norm": "attn.norm_added_k"}


for _a in ("attn", "attn2"):
    DIFFUSERS_BLOCK |= {f"x.{_a}.qkv": f"{_a}.to_q {_a}.to_k {_a}.to_v", f"x.{_a}.proj": f"{_a}.to_out.0",
                        f"x.{_a}.q_norm": f"{_a}.norm_q", f"x.{_a}.k_norm": f"{_a}.norm_k"}


def _diffusers_layers(depth):
    """(our layer, its diffusers layers, halves swapped?): diffusers has scale before shift in its two 2-way adaLN layers."""
    last = f"blocks.{depth - 1}.text.adaLN"
    layers = DIFFUSERS | {f"blocks.{i}.{ours}": " ".join(f"transformer_blocks.{i}.{name}" for name in theirs.split())
                          for i in range(depth) for ours, theirs in DIFFUSERS_BLOCK.items()}
    return [(ours, theirs.split(), ours in ("adaLN_final", last)) for ours, theirs in layers.items()]


def import_diffusers(sd):
    """diffusers' SD3Transformer2DModel names -> (our state dict, MMDiTConfig).  Nothing is dropped."""
    sd, ours = dict(sd), {"pos_embed": sd["pos_embed.pos_embed"]}
    del sd["pos_embed.pos_embed"]
    for layer, theirs, swapped in _diffusers_layers(sum(k.endswith(".attn.to_q.weight") for k in sd)):
        for name in ("weight", "bias"):
            if f"{theirs[0]}.{name}" in sd:
                w = torch.cat([sd.pop(f"{t}.{name}") for t in theirs])
                ours[f"{layer}.{name}"] = torch.cat(w.chunk(2)[::-1]) if swapped else w
    if sd:
        raise ValueError(f"an SD3 transformer with layers that are not known here: {', '.join(list(sd)[:3])} ...")
    return ours, _mmdit_config(ours)


def export_sd3(model):
    """Our MMDiT without adapters -> the single-file names, for channels C + D.  Inverse of the import if D = 0."""
    return {"model.diffusion_model." + _rename(k, SD3_RENAME, back=True): v for k, v in merged(model).items()}


def export_lora(model):
    """Adapters under peft's names, and beside them the trained first and last layer, merged as in `export_diffusers`."""
    ours, lora = merged(model), {}
    for layer, theirs, _ in _diffusers_layers(model.cfg.depth):
        for ab in ("A", "B"):
            parts = ours.get(f"{layer}.{ab}", ())
            lora |= {f"base_model.model.{t}.lora_{ab}.weight": w.contiguous() for t, w in zip(theirs, parts)}
    heads = {f"base_model.model.{DIFFUSERS[k]}.{n}": ours[f"{k}.{n}"] for k in "PO" for n in ("weight", "bias")}
    return lora | heads


def export_diffusers(model):
    """Our MMDiT without adapters -> the state dict of a stock SD3Transformer2DModel with in_channels = C + D."""
    ours, theirs = merged(model), {"pos_embed.pos_embed": model.pos_embed}
    for layer, names, swapped in _diffusers_layers(model.cfg.depth):
        for name in ("weight", "bias"):
            if f"{layer}.{name}" in ours:
                w = ours[f"{layer}.{name}"]
                w = torch.cat(w.chunk(2)[::-1]) if swapped else w
                theirs |= {f"{n}.{name}": part.contiguous() for n, part in zip(names, w.chunk(len(names)))}
    return theirs


def _mmdit_config(ours):
    """MMDiTConfig from the names and shapes of a state dict in our names."""
    if "blocks.0.x.attn.q_norm.weight" not in ours and "blocks.0.x.attn.qkv.weight" in ours:
        raise ValueError("this looks like SD3-medium (its attention has no QK-norm); wanted SD3.5-Medium or -Large")
    E, C, p, _ = ours["P.weight"].shape
    depth, dual = (sum(k.endswith(f"{name}.qkv.weight") for k in ours) for name in ("x.attn", "x.attn2"))
    return MMDiTConfig(C=C, p=p, E=E, depth=depth, A=E // len(ours["blocks.0.x.attn.q_norm.weight"]), dual=dual,
                       pooled=ours["y_embedder.0.weight"].shape[1],
                       context=ours["context_embedder.weight"].shape[1], pos_size=math.isqrt(ours["pos_embed"].shape[1]))
