"""The names in DC-AE's public files -> ours, and the sizes they imply; nothing is read or built here.

    is_dcae(sd)                 is it one?
    import_dcae(sd, config)     the original's names (efficientvit, DC-Gen), or those of diffusers
    published_scales(settings)  the scale of its latents, if a file does not state it

Like support/formats.py for the other autoencoders: one dict in, another out, nothing left over.
"""
import re
from itertools import zip_longest

from support.dcae import HEAD
from support.files import check_diffusers_config, unwrapped
from support.formats import bare, need, refuse_unknown, shape, stacked

# ---------------------------------------------------------------- names

# A layer of a block, or a Down or Up, number {block} of a stage: encoder.stages.3.op_list.1.main.conv1.conv
IN_A_STAGE = re.compile(r"(?P<half>encoder|decoder)\.(stages|down_blocks|up_blocks)\.(?P<stage>\d+)"
                        r"\.(op_list\.)?(?P<block>\d+)\.(?P<layer>.+)")

# The layers in it: theirs -> ours. First the original's names, then diffusers' where they differ.
LAYERS = {
    "main.conv1.conv": "conv1",
    "main.conv2.conv": "conv2",
    "main.conv2.norm": "norm",
    "main.conv": "conv",                                 # of a Down by a strided convolution
    "main.conv.conv": "conv",
    "context_module.main.qkv.conv": "attn.qkv",
    "context_module.main.aggreg.0.0": "attn.nearby.0",
    "context_module.main.aggreg.0.1": "attn.nearby.1",
    "context_module.main.proj.conv": "attn.proj",
    "context_module.main.proj.norm": "attn.norm",
    "local_module.main.inverted_conv.conv": "glu.expand",
    "local_module.main.depth_conv.conv": "glu.depth",
    "local_module.main.point_conv.conv": "glu.point",
    "local_module.main.point_conv.norm": "glu.norm",

    "conv1": "conv1",
    "conv2": "conv2",
    "norm": "norm",
    "conv": "conv",
    "attn.to_qkv": "attn.qkv",                           # to_q, to_k and to_v, stacked
    "attn.to_qkv_multiscale.0.proj_in": "attn.nearby.0",
    "attn.to_qkv_multiscale.0.proj_out": "attn.nearby.1",
    "attn.to_out": "attn.proj",
    "attn.norm_out": "attn.norm",
    "conv_out.conv_inverted": "glu.expand",
    "conv_out.conv_depth": "glu.depth",
    "conv_out.conv_point": "glu.point",
    "conv_out.norm": "glu.norm",
}

# The layers outside the stages. `.main` appears if there is a shortcut as well, the second `.conv` if the
# layer halves or doubles the size.
ENDS = {
    "encoder.project_in.conv": "encoder.conv_in",
    "encoder.project_in.conv.conv": "encoder.conv_in.conv",
    "encoder.project_out.main.op_list.0.conv": "to_moments.conv",
    "encoder.project_out.op_list.0.conv": "to_moments.conv",
    "decoder.project_in.main.conv": "from_latent.conv",
    "decoder.project_in.conv": "from_latent.conv",
    "decoder.project_out.op_list.0": "decoder.norm_out",
    "decoder.project_out.op_list.2.conv": "decoder.conv_out",
    "decoder.project_out.op_list.2.conv.conv": "decoder.conv_out.conv",

    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_in.conv": "encoder.conv_in.conv",
    "encoder.conv_out": "to_moments.conv",
    "decoder.conv_in": "from_latent.conv",
    "decoder.norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
    "decoder.conv_out.conv": "decoder.conv_out.conv",
}

# Every DC-AE has one of these, which shows the prefix of its names (`support/formats.py:bare`)
MARKS = ("decoder.conv_in.weight", "decoder.project_in.conv.weight", "decoder.project_in.main.conv.weight")

# What no other autoencoder has: a block directly below a stage of the encoder; the original's project_in
SIGN = re.compile(r"(^|\.)encoder\.(down_blocks\.\d+\.\d+|project_in)\.")


def is_dcae(sd):
    """Are these the names of a DC-AE, with whatever prefix?"""
    return any(SIGN.search(key) for key in unwrapped(sd))


def import_dcae(sd, config):
    """A DC-AE -> (state dict in our names without the statistics, the fields of `DCAEConfig` as a dict).

    config: diffusers' config.json, or {}. Only it states what no name or shape shows in diffusers' format:
            whether there are shortcuts next to the latent, and the last activation. Without it, both are as
            in all published files: no shortcuts if the encoder has ResBlocks only, as in 1.5; SiLU at the
            end of a decoder of ResBlocks only. The original's names do show the shortcuts.
    raises: ValueError naming layers that are not known here, or what is impossible in config.json
    """
    sd = {key: weight for key, weight in sd.items() if not key.endswith(".num_batches_tracked")}  # not read
    sd = joined(bare(sd, MARKS))
    refuse_unknown(key for key in sd if our_name(key) is None)
    ours = {}
    for key, weight in sd.items():
        name = our_name(key)
        if name in ours:
            raise ValueError(f"it holds {name} twice, under {key} and under another name")
        ours[name] = weight[:, :, None, None] if ".attn." in name and weight.ndim == 2 else weight   # Linear

    settings = dcae_sizes(ours)
    settings["ends"] = bool(settings["encoder_vit"])
    settings["relu"] = bool(settings["decoder_vit"])
    if any(".project_" in key for key in sd):
        settings["ends"] = has_shortcuts(sd)
    return ours, settings | stated_settings(config, settings)


def joined(sd):
    """The same, but with diffusers' to_q, to_k and to_v stacked again, as to_qkv.

    Their names are misleading: they are the thirds of a matrix whose rows are a head's queries, keys and
    values, then those of the next head.
    """
    found = {}
    for key, weight in sd.items():
        layer = key.removesuffix("to_q.weight").removesuffix("to_k.weight").removesuffix("to_v.weight")
        if layer == key:
            found[key] = weight
        elif f"{layer}to_qkv.weight" not in found:
            parts = [f"{layer}to_{x}.weight" for x in "qkv"]
            need(sd, *parts)
            found[f"{layer}to_qkv.weight"] = stacked(sd, parts)
    return found


def our_name(key):
    """Our name of a weight under either of its names; None if it has none."""
    layer, _, part = key.rpartition(".")
    if layer in ENDS:
        return f"{ENDS[layer]}.{part}"
    found = IN_A_STAGE.fullmatch(layer)
    if not found or found["layer"] not in LAYERS:
        return None
    return f"{found['half']}.stages.{found['stage']}.{found['block']}.{LAYERS[found['layer']]}.{part}"


def has_shortcuts(sd):
    """Do the original's names show shortcuts next to the latent?   raises: ValueError if on one side only"""
    sides = {key.split(".")[0] for key in sd if ".project_out.main." in key or ".project_in.main." in key}
    if len(sides) == 1:
        raise ValueError(f"a DC-AE with a shortcut next to the latent in its {sides.pop()} only; wanted one "
                         "on both sides, or on neither")
    return bool(sides)


# ---------------------------------------------------------------- sizes


def dcae_sizes(ours):
    """The fields of DCAEConfig, except `ends` and `relu`, from a state dict in our names."""
    encoder = read_stages(ours, "encoder")
    decoder = read_stages(ours, "decoder")
    i = first_with_blocks(encoder)
    j = first_with_blocks(decoder)
    down = shape(ours, f"encoder.stages.{i}.{encoder[i]['blocks']}.conv.weight", 4)[0]
    up = shape(ours, f"decoder.stages.{j}.0.conv.weight", 4)[0]
    pairs = zip_longest(encoder, decoder, fillvalue={"width": 0})
    return {
        "C": shape(ours, "from_latent.conv.weight", 4)[1],
        "widths": [a["width"] or b["width"] for a, b in pairs],
        "encoder_blocks": [stage["blocks"] for stage in encoder],
        "decoder_blocks": [stage["blocks"] for stage in decoder],
        "encoder_vit": [n for n, stage in enumerate(encoder) if stage["vit"]],
        "decoder_vit": [n for n, stage in enumerate(decoder) if stage["vit"]],
        "nearby": any(".attn.nearby." in key for key in ours),
        "batch_norm": [n for n, stage in enumerate(decoder) if stage["batch_norm"]],
        "strided": down == encoder[i + 1]["width"],
        "nearest": up == decoder[j]["width"],
    }


def read_stages(ours, half):
    """For each stage of a half, from full size down: {"width", "blocks", "vit", "batch_norm"}.

    raises: ValueError if one is missing, except the one at full size, which has no names if it is empty
    """
    numbers = {int(key.split(".")[2]) for key in ours if key.startswith(f"{half}.stages.")}
    last = max(numbers, default=0)
    if last == 0 or last > len(numbers):
        raise ValueError(f"a DC-AE whose {half} has the stages {sorted(numbers)}; wanted two at least, and "
                         "none missing but that at full size")
    stages = []
    for i in range(last + 1):
        keys = [key for key in ours if key.startswith(f"{half}.stages.{i}.")]
        blocks = [key for key in keys if key.endswith((".conv2.weight", ".attn.proj.weight"))]
        stages.append({
            "width": shape(ours, blocks[0], 4)[0] if blocks else 0,
            "blocks": len(blocks),
            "vit": any(".attn." in key for key in keys),
            "batch_norm": any(key.endswith(".running_mean") for key in keys),
        })
    return stages


def first_with_blocks(stages):
    return 0 if stages[0]["blocks"] else 1


def stated_settings(config, settings):
    """What diffusers' config.json states about `ends` and `relu`; {} without one.

    raises: ValueError if it states something not implemented here, or contradicts the weights
    """
    if not config:
        return {}
    shown = {
        "latent_channels": settings["C"],
        "attention_head_dim": HEAD,
        "encoder_layers_per_block": settings["encoder_blocks"],
        "decoder_layers_per_block": settings["decoder_blocks"],
    }
    check_diffusers_config(config, shown)
    for i, blocks in enumerate(settings["decoder_blocks"]):
        batch_norm = i in settings["batch_norm"]
        if blocks:
            check_stage(config, "decoder_norm_types", i, "batch_norm" if batch_norm else "rms_norm")
            check_stage(config, "decoder_act_fns", i, "relu" if batch_norm else "silu")

    ends = config.get("encoder_out_shortcut", True)
    act = config.get("decoder_conv_act_fn", "relu")                 # diffusers' defaults, of older files
    if ends is not config.get("decoder_in_shortcut", True) or type(ends) is not bool:
        raise ValueError(f"its config.json has encoder_out_shortcut={ends!r}; wanted true or false, and the "
                         "same for decoder_in_shortcut")
    if act not in ("relu", "silu"):
        raise ValueError(f"its config.json has decoder_conv_act_fn={act!r}; wanted relu or silu")
    return {"ends": ends, "relu": act == "relu"}


def check_stage(config, name, i, wanted):
    """raises: ValueError if config.json states a kind other than `wanted` for stage i, or for all stages"""
    stated = config.get(name, wanted)
    kinds = stated if isinstance(stated, list) else [stated] * (i + 1)
    if len(kinds) <= i or kinds[i] != wanted:
        raise ValueError(f"its config.json has {name}={stated!r}; wanted {wanted} in stage {i}, as DC-AEs "
                         "with these weights have")


# ---------------------------------------------------------------- scales


# {(family, f, C): {name of a published file: scale of the diffusion models on it}}; sources: support/dcae.py
SCALES = {
    ("1.0", 32, 32): {"dc-ae-f32c32-in-1.0": 0.3189, "dc-ae-f32c32-mix-1.0": 0.4552},
    ("1.0", 64, 128): {"dc-ae-f64c128-in-1.0": 0.2889, "dc-ae-f64c128-mix-1.0": 0.4538},
    ("1.0", 128, 512): {"dc-ae-f128c512-in-1.0": 0.4883, "dc-ae-f128c512-mix-1.0": 0.3620},
    ("Sana", 32, 32): {"dc-ae-f32c32-sana-1.0": 0.41407, "dc-ae-f32c32-sana-1.1": 0.41407},
    ("1.5", 64, 128): {"dc-ae-1.5-f64c128": 0.5935},
}


def published_scales(settings):
    """{name: scale} of the published files that have these sizes: none, one, or several."""
    family = "1.0" if settings["encoder_vit"] else "1.5"
    if settings["nearby"]:
        family = "Sana"
    f = 2 ** (len(settings["widths"]) - 1)
    return SCALES.get((family, f, settings["C"]), {})
