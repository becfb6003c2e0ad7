"""The names in public checkpoints <-> ours: one state dict in, another out; nothing is read or built here.

    import_vae(sd)    VA-VAE, SD and SD3 VAEs (the original or diffusers' names), TAEF2; DC-AE: dcae_names.py
    import_dit(sd)    LightningDiT; SD3.5's transformer (the single file's or diffusers' names)
    export_*(model)   back again, the D detail channels merged with the C base channels

A format is a table of `Layer`s: our name for a layer, and the names under which the file holds it. Anything
that a table does not name is refused; what is left out on purpose is in DROPPED or TABLES, with the reason.
`sizes` are the fields of our config dataclass (KLConfig, LightningDiTConfig, MMDiTConfig) as a plain dict,
read off the keys and shapes, because the files do not hold them. `kind` is a name in BASES (support/bases.py)
or in MODELS (dit.py).

A function that finds something wrong raises ValueError with one sentence that does not name the file:
support/weights.py, which opens the files, adds the name in front.
"""
import math
import re
from typing import NamedTuple

import torch

from support.files import check_types, some, unwrapped

# ---------------------------------------------------------------- tables of layers


class Layer(NamedTuple):
    """One layer with weights, under our name and under theirs."""
    ours: str
    theirs: tuple              # more than one name if our weight is several of theirs, stacked
    swapped: bool = False          # there, the two halves of the rows are in the opposite order


PARTS = ("weight", "bias")


def import_layers(sd, layers):
    """Their names -> ours, as `layers` say; a layer missing in `sd` is skipped, and reported on loading.

    raises: ValueError naming what no layer accounts for, or a missing part of a stacked layer
    """
    ours = {}
    known = set()
    for layer in layers:
        for part in PARTS:
            names = [f"{name}.{part}" for name in layer.theirs]
            missing = [name for name in names if name not in sd]
            if len(missing) == len(names):
                continue
            need(sd, *names)
            known.update(names)
            weight = sd[names[0]] if len(names) == 1 else stacked(sd, names)
            ours[f"{layer.ours}.{part}"] = swap_halves(weight) if layer.swapped else weight
    refuse_unknown(key for key in sd if key not in known)
    return ours


def export_layers(sd, layers):
    """Our names -> theirs: the inverse of `import_layers`."""
    theirs = {}
    known = set()
    for layer in layers:
        for part in PARTS:
            name = f"{layer.ours}.{part}"
            if name not in sd:
                continue
            known.add(name)
            weight = swap_halves(sd[name]) if layer.swapped else sd[name]
            pieces = weight.chunk(len(layer.theirs))
            theirs |= {f"{their}.{part}": piece.contiguous() for their, piece in zip(layer.theirs, pieces)}
    refuse_unknown(key for key in sd if key not in known)
    return theirs


def stacked(sd, names):
    """Weights stacked, row below row.   raises: ValueError if they do not have the same shape"""
    shapes = {tuple(sd[name].shape) for name in names}
    if len(shapes) > 1 or () in shapes:
        raise ValueError(f"{some(names)} have the shapes {some(sorted(shapes))}; wanted one")
    if len({sd[name].dtype for name in names}) > 1:                # which cat refuses for one-byte floats
        return torch.cat([sd[name].float() for name in names])
    return torch.cat([sd[name] for name in names])


def refuse_unknown(keys):
    keys = list(keys)
    if keys:
        raise ValueError(f"it has layers that are not known here: {some(keys)}")


def need(sd, *names):
    """raises: ValueError if one of these names is missing."""
    missing = [name for name in names if name not in sd]
    if missing:
        raise ValueError(f"not a whole checkpoint (it lacks {some(missing)})")


def swap_halves(weight):
    """[scale, shift] rows -> [shift, scale] rows, and back."""
    first, second = weight.chunk(2)
    return torch.cat([second, first])


def count(sd, prefix):
    """How many numbers follow `prefix` in the names: levels of an encoder, blocks of a transformer."""
    return len({key.removeprefix(prefix).split(".")[0] for key in sd if key.startswith(prefix)})


def shape(sd, name, axes):
    """A weight's shape.   raises: ValueError if it is missing, empty, or has another number of axes"""
    need(sd, name)
    if sd[name].ndim != axes or 0 in sd[name].shape:
        raise ValueError(f"{name} is {tuple(sd[name].shape)}; wanted {axes} axes, none of them 0 long")
    return sd[name].shape


# ---------------------------------------------------------------- the model in a checkpoint


FRONTS = {                   # components of a prefix that a model's names may have: who adds them
    "first_stage_model": "latent diffusion, SD3's single file: the autoencoder",
    "model": "Lightning modules; SD3's single file",
    "diffusion_model": "below `model` in SD3's single file: the transformer",
    "net": "Lightning modules",
    "vae": "pipelines that are saved as one file: the autoencoder",
    "transformer": "pipelines that are saved as one file",
    "uvit": "trainings of DC-AE 1.0's U-ViT",
}

DROPPED = {                  # first components of other names, which may accompany the model's
    "loss": "perceptual loss and discriminator of VA-VAE's training",
    "foundation_model": "the DINOv2 that VA-VAE was aligned to",
    "linear_proj": "its projection, used in training only",
    "logvar": "a training-only scalar",
    "model": "the transformer in an SD3 single-file checkpoint",
    "text_encoders": "the text encoders in an SD3 single-file checkpoint",
    "model_ema": "latent diffusion's average of the same weights, whose names have lost their dots",
}


def bare(sd, marks):
    """The one model in a checkpoint that has one of the names `marks`, without its prefix and DROPPED.

    Names without the model's prefix belong to other models.
    raises: ValueError if there are two such models, or if a weight is not in floating point
    """
    sd = unwrapped(sd)
    fronts = set()
    for key in sd:
        for mark in marks:
            if f".{key}".endswith(f".{mark}"):
                fronts.add(key.removesuffix(mark))
    if len(fronts) > 1:
        raise ValueError(f"it holds {len(fronts)} models, whose names begin with "
                         f"{some(repr(front) for front in sorted(fronts))}; wanted one: save it by itself")
    for front in fronts:
        if set(front.split(".")[:-1]) <= set(FRONTS):
            sd = {key.removeprefix(front): weight for key, weight in sd.items() if key.startswith(front)}
        sd = {key: weight for key, weight in sd.items() if key.split(".")[0] not in DROPPED}
    check_types(sd)
    return sd


# ---------------------------------------------------------------- base VAEs


def import_vae(sd):
    """A public autoencoder -> (kind, state dict in our names without the statistics, sizes)."""
    sd = bare(sd, ("encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.11.pool.0.weight",
                   "encoder.layers.11.pool.0.weight"))
    if "encoder.layers.11.pool.0.weight" in sd:                # its one file on Hugging Face
        sd = two_files_of_taef2(sd)
    if "encoder.11.pool.0.weight" in sd:                       # only TAEF2 has wide blocks
        return "TAEF2", import_taef2(sd), {}
    ours = import_kl(sd)
    return "AutoencoderKL", ours, kl_sizes(ours)


# A residual block's and an attention's layers: LDM's names, which are ours too, and diffusers'
RESIDUAL = [("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"),
            ("nin_shortcut", "conv_shortcut")]
ATTENTION = [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of old diffusers

# Ours, LDM's (VA-VAE; SD3's single file below first_stage_model.) and diffusers' name of each single layer.
# {i} counts levels from full size down, {back} from the latent up, as diffusers does in its decoder.
# Ours differ from LDM's next to the latent, where DAVAE must be able to leave layers out: with `quant` there
# is a 1x1 convolution on each side, and then {conv_in} is 1, else 0.
KL_SINGLE = [
    ("encoder.conv_in", "encoder.conv_in", "encoder.conv_in"),
    ("encoder.down.{i}.resample.conv",
     "encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsamplers.0.conv"),
    ("encoder.norm_out", "encoder.norm_out", "encoder.conv_norm_out"),
    ("to_moments.0", "encoder.conv_out", "encoder.conv_out"),
    ("to_moments.1", "quant_conv", "quant_conv"),
    ("from_latent.0", "post_quant_conv", "post_quant_conv"),
    ("from_latent.{conv_in}", "decoder.conv_in", "decoder.conv_in"),
    ("decoder.up.{i}.resample.conv",
     "decoder.up.{i}.upsample.conv", "decoder.up_blocks.{back}.upsamplers.0.conv"),
    ("decoder.norm_out", "decoder.norm_out", "decoder.conv_norm_out"),
    ("decoder.conv_out", "decoder.conv_out", "decoder.conv_out"),
]

# Our name of each block (also LDM's), diffusers', and the layers in it. {j} counts the blocks of a level.
KL_BLOCKS = [
    ("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}", RESIDUAL),
    ("encoder.down.{i}.attn.{j}", "encoder.down_blocks.{i}.attentions.{j}", ATTENTION),
    ("encoder.mid.block_1", "encoder.mid_block.resnets.0", RESIDUAL),
    ("encoder.mid.attn_1", "encoder.mid_block.attentions.0", ATTENTION),
    ("encoder.mid.block_2", "encoder.mid_block.resnets.1", RESIDUAL),
    ("decoder.mid.block_1", "decoder.mid_block.resnets.0", RESIDUAL),
    ("decoder.mid.attn_1", "decoder.mid_block.attentions.0", ATTENTION),
    ("decoder.mid.block_2", "decoder.mid_block.resnets.1", RESIDUAL),
    ("decoder.up.{i}.block.{j}", "decoder.up_blocks.{back}.resnets.{j}", RESIDUAL),
    ("decoder.up.{i}.attn.{j}", "decoder.up_blocks.{back}.attentions.{j}", ATTENTION),
]


def kl_layers(levels, blocks, quant, diffusers):
    """The table of an AutoencoderKL with so many levels, each of at most so many residual blocks."""
    rows = [(ours, theirs if diffusers else ldm) for ours, ldm, theirs in KL_SINGLE]
    for ours, theirs, leaves in KL_BLOCKS:
        for leaf, their_leaf in leaves:
            rows.append((f"{ours}.{leaf}", f"{theirs}.{their_leaf}" if diffusers else f"{ours}.{leaf}"))
    if not quant:
        rows = [(ours, theirs) for ours, theirs in rows if "quant_conv" not in theirs]

    layers = {}
    for i in range(levels):
        for j in range(blocks):
            numbers = {"i": i, "back": levels - 1 - i, "j": j, "conv_in": int(quant)}
            for ours, theirs in rows:                 # those without {i} and {j} come out the same every time
                layers[ours.format(**numbers)] = theirs.format(**numbers)
    return [Layer(ours, (theirs,)) for ours, theirs in layers.items()]


def import_kl(sd):
    """LDM's or diffusers' names of an AutoencoderKL -> ours."""
    check_kl(sd)
    diffusers = any(".mid_block." in key for key in sd)
    if diffusers:
        sd = {new_name(key): weight for key, weight in sd.items()}
    level = "encoder.down_blocks." if diffusers else "encoder.down."
    block = "0.resnets." if diffusers else "0.block."
    blocks = count(sd, level + block) + 1                 # the decoder has one more than the encoder
    ours = import_layers(sd, kl_layers(count(sd, level), blocks, "quant_conv.weight" in sd, diffusers))
    return {key: as_conv(key, weight) for key, weight in ours.items()}


def new_name(key):
    """A diffusers name as it is now: old versions called attention's layers otherwise."""
    return ".".join(OLD_ATTENTION.get(word, word) for word in key.split("."))


def as_conv(key, weight):
    """diffusers' attention has Linear layers (F, F); here they are 1x1 convolutions, (F, F, 1, 1)."""
    return weight[:, :, None, None] if "attn" in key and weight.ndim == 2 else weight


def check_kl(sd):
    """raises: ValueError if the names are not an autoencoder's, or of one that AutoencoderKL cannot be."""
    parts = {key.split(".")[0] for key in sd}
    known = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    foreign = [key for key in sd if key.split(".")[0] not in known]
    if foreign or "encoder.conv_in.weight" not in sd:
        held = some(foreign or sd) or "nothing"
        raise ValueError(f"not an autoencoder (it holds {held}); wanted VA-VAE, an SD or SD3 VAE, TAEF2, or "
                         "DC-AE")
    if ("quant_conv" in parts) != ("post_quant_conv" in parts):
        raise ValueError("an autoencoder with one of quant_conv and post_quant_conv; wanted both, or neither")
    if not any(".mid.attn_1." in key or ".mid_block.attentions.0." in key for key in sd):
        raise ValueError("an autoencoder without attention in its middle; wanted one with it")
    channels = shape(sd, "encoder.conv_in.weight", 4)[1]
    if channels != 3:
        raise ValueError(f"an autoencoder for images of {channels} channels; wanted 3, RGB")


def kl_sizes(ours):
    """The fields of KLConfig, except `groups`, from an AutoencoderKL's state dict in our names."""
    levels = range(count(ours, "encoder.down."))
    return {
        "C": shape(ours, "from_latent.0.weight", 4)[1],
        "widths": [shape(ours, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels],
        "blocks": count(ours, "encoder.down.0.block."),
        "attn": [i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in ours],
        "quant": "to_moments.1.weight" in ours,
    }


def export_kl(vae, diffusers=False):
    """Our AutoencoderKL -> LDM's names (VA-VAE; SD3 without its prefix), or diffusers'; no statistics."""
    cfg = vae.cfg
    sd = {key: value for key, value in vae.state_dict().items() if key not in ("mean", "std")}
    theirs = export_layers(sd, kl_layers(len(cfg.widths), cfg.blocks + 1, cfg.quant, diffusers))
    for key, weight in theirs.items():
        if ".attentions." in key and weight.ndim == 4:            # see `as_conv`
            theirs[key] = weight[:, :, 0, 0]
    return theirs


def two_files_of_taef2(sd):
    """taef2.safetensors -> the names of the two .pth files, whose decoder also counts the tanh before it."""
    theirs = {}
    for key, weight in sd.items():
        match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", key)
        if match:
            half, number, rest = match.groups()
            key = f"{half}.{int(number) + (half == 'decoder')}.{rest}"
        theirs[key] = weight
    return theirs


def import_taef2(sd):
    """TAEF2's two Sequentials, encoder.0 to .14 and decoder.0 to .19 -> the four parts of a BaseVAE."""
    names = {}
    for i in range(14):
        names[f"encoder.{i}"] = f"encoder.{i + 1}"       # ours begins with a layer from [-1, 1] to [0, 1]
    names["encoder.14"] = "to_moments"                    # the last convolution, to 32 channels
    names["decoder.1"] = "from_latent.1"                 # the first, from 32; number 0 is the tanh before it
    for i in range(3, 20):
        names[f"decoder.{i}"] = f"decoder.{i - 2}"       # so that the ReLU after it is our decoder's number 0

    ours = {}
    for key, weight in sd.items():
        layer = ".".join(key.split(".")[:2])                          # encoder.11 of encoder.11.pool.0.weight
        if layer not in names:
            raise ValueError(f"it has layers that are not known here: {key}")
        ours[names[layer] + key.removeprefix(layer)] = weight
    return ours


# ---------------------------------------------------------------- LightningDiT


# ours, LightningDiT's
LIGHTNINGDIT = {
    "P": "x_embedder.proj",
    "t_embedder.0": "t_embedder.mlp.0",
    "t_embedder.2": "t_embedder.mlp.2",
    "y_embedder": "y_embedder.embedding_table",
    "norm_final": "final_layer.norm_final",
    "adaLN_final": "final_layer.adaLN_modulation.1",                       # number 0 is the SiLU
    "O": "final_layer.linear",
}

# of each block, below blocks.{i}.
LIGHTNINGDIT_BLOCK = {
    "norm1": "norm1", "attn.qkv": "attn.qkv", "attn.q_norm": "attn.q_norm", "attn.k_norm": "attn.k_norm",
    "attn.proj": "attn.proj", "norm2": "norm2", "mlp.w12": "mlp.w12", "mlp.w3": "mlp.w3",             # SwiGLU
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",                                                      # or GELU
    "adaLN": "adaLN_modulation.1",
}

TABLES = ["pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"]   # saved there, computed here

RELEASED_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}       # of LightningDiT's released widths


def lightningdit_layers(depth):
    layers = [Layer(ours, (theirs,)) for ours, theirs in LIGHTNINGDIT.items()]
    for i in range(depth):
        for ours, theirs in LIGHTNINGDIT_BLOCK.items():
            layers.append(Layer(f"blocks.{i}.{ours}", (f"blocks.{i}.{theirs}",)))
    return layers


def import_lightningdit(sd):
    """LightningDiT's names -> ours, without TABLES."""
    sd = {key: value for key, value in sd.items() if key not in TABLES}
    return import_layers(sd, lightningdit_layers(count(sd, "blocks.")))


def export_lightningdit(model):
    """Our LightningDiT -> its original names, with in_channels C + D.  The inverse of the import if D = 0."""
    theirs = export_layers(merge_details(model), lightningdit_layers(model.cfg.depth))
    tables = zip(TABLES, (model.pos_embed, model.rope_cos, model.rope_sin))
    return theirs | {name: table for name, table in tables if table is not None}


def lightningdit_sizes(sd):
    """The fields of LightningDiTConfig from LightningDiT's own names and shapes.

    raises: ValueError saying what `sd` looks like instead, or which unsupported variant it is
    """
    needed = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight",
              "blocks.0.attn.qkv.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight")
    if any(key not in sd for key in needed):
        raise ValueError(f"this looks like {looks_like(sd)}; "
                         "wanted a LightningDiT, SD3.5's transformer, a USiT, or a run of ours")
    E, C, p, _ = shape(sd, "x_embedder.proj.weight", 4)
    if shape(sd, "blocks.0.adaLN_modulation.1.weight", 2)[0] != 6 * E:
        raise ValueError("this LightningDiT was trained with wo_shift (no shift in its adaLN), "
                         "which is not supported here")
    if shape(sd, "final_layer.linear.weight", 2)[0] != p * p * C:
        raise ValueError("its head does not predict as many channels as come in (learn_sigma?), wanted a "
                         "velocity only")
    swiglu = "blocks.0.mlp.w3.weight" in sd
    last = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    return {
        "C": C,
        "p": p,
        "grid": math.isqrt(shape(sd, "pos_embed", 3)[1]),
        "E": E,
        "depth": count(sd, "blocks."),
        "A": lightningdit_heads(sd, E),
        "hidden": shape(sd, last, 2)[1],
        "num_classes": shape(sd, "y_embedder.embedding_table.weight", 2)[0] - 1,  # the last row is "no class"
        "swiglu": swiglu,
        "qk_norm": "blocks.0.attn.q_norm.weight" in sd,
        "rms_norm": "blocks.0.norm1.weight" in sd,
        "rope": "feat_rope.freqs_cos" in sd,
    }


def lightningdit_heads(sd, E):
    """The number of heads: q_norm and the RoPE table are one head wide; else E must be a released width."""
    for name, axes in (("blocks.0.attn.q_norm.weight", 1), ("feat_rope.freqs_cos", 2)):
        if name in sd:
            return E // shape(sd, name, axes)[-1]
    if E not in RELEASED_HEADS:
        raise ValueError("neither a RoPE table, nor q_norm, nor a released width tells the number of heads "
                         f"(E={E})")
    return RELEASED_HEADS[E]


def looks_like(sd):
    """A few words for a state dict that is not of a transformer known here."""
    signs = {
        "a LoRA": ["lora_"],
        "an incomplete SD3 transformer": ["joint_blocks.", "transformer_blocks."],
        "an autoencoder": ["encoder.", "decoder."],
        "one file of our own checkpoint": ["P.weight"],
    }
    for what, pieces in signs.items():
        if any(piece in str(key) for key in sd for piece in pieces):
            return what
    return f"something else (it holds {some(sd)})"


# ---------------------------------------------------------------- SD3.5's transformer


# ours, the single file's (below model.diffusion_model.), diffusers'
MMDIT = [
    ("P", "x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.0", "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.2", "t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.0", "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.2", "y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embedder", "context_embedder", "context_embedder"),
    ("adaLN_final", "final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("O", "final_layer.linear", "proj_out"),
]

# of each block: below blocks.{i}., joint_blocks.{i}., transformer_blocks.{i}.; where diffusers has three,
# ours is stacked
MMDIT_BLOCK = [
    ("x.adaLN", "x_block.adaLN_modulation.1", "norm1.linear"),
    ("x.attn.qkv", "x_block.attn.qkv", "attn.to_q attn.to_k attn.to_v"),
    ("x.attn.q_norm", "x_block.attn.ln_q", "attn.norm_q"),
    ("x.attn.k_norm", "x_block.attn.ln_k", "attn.norm_k"),
    ("x.attn.proj", "x_block.attn.proj", "attn.to_out.0"),
    ("x.attn2.qkv", "x_block.attn2.qkv", "attn2.to_q attn2.to_k attn2.to_v"),
    ("x.attn2.q_norm", "x_block.attn2.ln_q", "attn2.norm_q"),
    ("x.attn2.k_norm", "x_block.attn2.ln_k", "attn2.norm_k"),
    ("x.attn2.proj", "x_block.attn2.proj", "attn2.to_out.0"),
    ("x.mlp.fc1", "x_block.mlp.fc1", "ff.net.0.proj"),
    ("x.mlp.fc2", "x_block.mlp.fc2", "ff.net.2"),
    ("text.adaLN", "context_block.adaLN_modulation.1", "norm1_context.linear"),
    ("text.attn.qkv", "context_block.attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    ("text.attn.q_norm", "context_block.attn.ln_q", "attn.norm_added_q"),
    ("text.attn.k_norm", "context_block.attn.ln_k", "attn.norm_added_k"),
    ("text.attn.proj", "context_block.attn.proj", "attn.to_add_out"),
    ("text.mlp.fc1", "context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("text.mlp.fc2", "context_block.mlp.fc2", "ff_context.net.2"),
]


def mmdit_layers(depth, diffusers):
    """The table of an MMDiT of `depth` blocks under the single file's or diffusers' names."""
    rows = list(MMDIT)
    for i in range(depth):
        for ours, single, theirs in MMDIT_BLOCK:
            theirs = " ".join(f"transformer_blocks.{i}.{name}" for name in theirs.split())
            rows.append((f"blocks.{i}.{ours}", f"joint_blocks.{i}.{single}", theirs))
    if not diffusers:
        return [Layer(ours, (single,)) for ours, single, _ in rows]
    # the two adaLN layers without a gate: shift before scale in ours and the single file, but after it
    # in diffusers
    swapped = ("adaLN_final", f"blocks.{depth - 1}.text.adaLN")
    return [Layer(ours, tuple(theirs.split()), ours in swapped) for ours, _, theirs in rows]


def import_sd3(sd):
    """The single file's names, without their prefix -> ours."""
    rest = {key: value for key, value in sd.items() if key != "pos_embed"}
    ours = import_layers(rest, mmdit_layers(count(rest, "joint_blocks."), diffusers=False))
    return with_position_table(ours, sd, "pos_embed")


def import_diffusers(sd):
    """The names of diffusers' SD3Transformer2DModel -> ours."""
    rest = {key: value for key, value in sd.items() if key != "pos_embed.pos_embed"}
    ours = import_layers(rest, mmdit_layers(count(rest, "transformer_blocks."), diffusers=True))
    return with_position_table(ours, sd, "pos_embed.pos_embed")


def with_position_table(ours, sd, name):
    """The position table comes from the file, unlike LightningDiT's: no formula is known to give it."""
    need(sd, name)
    return ours | {"pos_embed": sd[name]}


def mmdit_sizes(ours):
    """The fields of MMDiTConfig from the names and shapes of a state dict in our names."""
    need(ours, "P.weight", "blocks.0.x.attn.qkv.weight", "y_embedder.0.weight", "context_embedder.weight")
    if "blocks.0.x.attn.q_norm.weight" not in ours:
        raise ValueError("this looks like SD3-medium (its attention has no QK-norm); wanted SD3.5-Medium or "
                         "-Large")
    E, C, p, _ = shape(ours, "P.weight", 4)
    return {
        "C": C,
        "p": p,
        "E": E,
        "depth": count(ours, "blocks."),
        "A": E // shape(ours, "blocks.0.x.attn.q_norm.weight", 1)[0],
        "dual": sum(key.endswith(".x.attn2.qkv.weight") for key in ours),
        "context": shape(ours, "context_embedder.weight", 2)[1],
        "pooled": shape(ours, "y_embedder.0.weight", 2)[1],
        "pos_size": math.isqrt(shape(ours, "pos_embed", 3)[1]),
    }


def export_sd3(model):
    """Our MMDiT without adapters -> the single file's names, for C + D channels.  The inverse if D = 0."""
    ours = merge_details(model)
    table = ours.pop("pos_embed")
    theirs = {"pos_embed": table} | export_layers(ours, mmdit_layers(model.cfg.depth, diffusers=False))
    return {f"model.diffusion_model.{name}": weight for name, weight in theirs.items()}


def export_diffusers(model):
    """Our MMDiT without adapters -> the names of a stock SD3Transformer2DModel with in_channels = C + D."""
    ours = merge_details(model)
    table = ours.pop("pos_embed")
    theirs = export_layers(ours, mmdit_layers(model.cfg.depth, diffusers=True))
    return {"pos_embed.pos_embed": table} | theirs


def export_lora(model):
    """Adapters under peft's names, separate for q, k and v; and the first and last layer, which were trained
    too, merged as in `export_diffusers`."""
    ours = merge_details(model)
    lora = {}
    for layer in mmdit_layers(model.cfg.depth, diffusers=True):
        for matrix in ("A", "B"):
            if f"{layer.ours}.{matrix}" in ours:                       # (parts, r, in) or (parts, out, r)
                for name, weight in zip(layer.theirs, ours[f"{layer.ours}.{matrix}"]):
                    lora[f"base_model.model.{name}.lora_{matrix}.weight"] = weight.contiguous()
    for ours_name, theirs in (("P", "pos_embed.proj"), ("O", "proj_out")):
        for part in PARTS:
            lora[f"base_model.model.{theirs}.{part}"] = ours[f"{ours_name}.{part}"]
    return lora


# ---------------------------------------------------------------- transformers, of either kind


def import_dit(sd):
    """A released transformer -> (kind, state dict in our names, sizes, tables).

    tables: {name in TABLES: tensor} that a LightningDiT's file holds and ours computes; for an MMDiT, none
    raises: ValueError saying what `sd` looks like instead
    """
    sd = bare(sd, ("x_embedder.proj.weight", "pos_embed.proj.weight"))
    if "transformer_blocks.0.attn.to_q.weight" in sd:
        ours = import_diffusers(sd)
        return "MMDiT", ours, mmdit_sizes(ours), {}
    if "joint_blocks.0.x_block.attn.qkv.weight" in sd:
        ours = import_sd3(sd)
        return "MMDiT", ours, mmdit_sizes(ours), {}
    sizes = lightningdit_sizes(sd)
    tables = {name: sd[name] for name in TABLES if name in sd}
    return "LightningDiT", import_lightningdit(sd), sizes, tables


def merge_details(model):
    """A transformer's state dict with P_new inside P and O_new inside O, as one wider layer each."""
    sd = {name: weight.detach() for name, weight in model.state_dict().items()}
    if model.cfg.D:
        sd["P.weight"] = torch.cat([sd["P.weight"], sd.pop("P_new.weight")], dim=1)           # (E, C+D, p, p)
        for part in PARTS:                 # rows run over (p, p, C): channels are joined within a pixel
            heads = [sd[f"O.{part}"], sd.pop(f"O_new.{part}")]
            pixels = [head.unflatten(0, (model.cfg.p**2, -1)) for head in heads]          # (p*p, C or D, ...)
            sd[f"O.{part}"] = torch.cat(pixels, dim=1).flatten(0, 1)                        # (p*p*(C+D), ...)
    return sd
