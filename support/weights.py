"""Load models from files, and export them.  Three entry points, and a fourth for runs:

    load_base_vae(source)       a base VAE: public files, diffusers' folders, or a run of train_vae.py
    load_davae(source)          a DAVAE: a run of train_vae.py; any other base VAE becomes a PlainVAE
    load_dit(source)            a transformer: our checkpoints, LightningDiT's or USiT's file, SD3.5's file or
                                folder, FLUX.2's or Sana's folder
    load_run(run)               a run of finetune.py: its transformer, its VAE, its config.json

    main_export(cfg)            `python sample.py export`: a run of finetune.py in the public formats

A source is a file, a folder, a name on Hugging Face (support/hub.py) or a state dict. Loading finds and reads
the files, converts their names to ours (support/formats.py), builds the module on the "meta" device, where it
costs neither memory nor random numbers, and fills it strictly. If a source is wrong, a SystemExit says why in
one sentence that begins with its name.
"""
import contextlib
import math
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from davae import DAVAE, DAVAEConfig, PlainVAE
from dit import MODELS, LightningDiT, MMDiT, USiT, merge_lora, rope_table, sincos_table
from support import diffusers_dit, formats, hub, runs
from support.bases import BASES
from support.config import field
from support.dcae_names import import_dcae, is_dcae, published_scales
from support.diffusers_dit import (
    KINDS,
    DiffusersDiT,
    export_adapters,
    export_transformer,
    import_transformer,
    refuse_bare,
)
from support.files import NEW, check_diffusers_config, fill, pick_weights, read_json, some
from support.flux2 import import_flux2, is_flux2
from support.runs import latest_checkpoint, read_config, read_state_dict
from support.usit import export_usit, import_usit, is_usit

MODELS |= diffusers_dit.MODELS

# ---------------------------------------------------------------- base VAEs


def load_base_vae(source):
    """A pretrained base VAE in eval mode, float32, its sizes inferred from the keys and shapes.

    source: a file (VA-VAE's .pt, SD3's single file, a VAE or DC-AE alone), a folder (diffusers' VAE or whole
    pipeline; DC-AE's own; TAEF2's two files; a run of train_vae.py), the name of either on Hugging Face, or a
    state dict.
    raises: SystemExit saying what the source looks like and what was wanted
    """
    source = find_vae(source)
    if is_ours(source):
        return load_davae(source).base

    name = name_of(source)
    with one_sentence(name):
        sd, folder = read_vae(source)
        if is_dcae(sd):
            kind = "DCAE"
            config = read_diffusers_config(folder, "AutoencoderDC")
            sd, settings = import_dcae(sd, config)
            sd |= dcae_statistics(settings, config, folder, name)
        elif is_flux2(sd):
            kind = "AutoencoderKLFlux2"
            config = read_diffusers_config(folder, kind)
            check_diffusers_config(config, {"patch_size": [2, 2]})
            sd, settings = import_flux2(sd, stated(config, "batch_norm_eps", 1e-4))
            sd |= statistics(0.0, 1.0, settings["C"])              # the pipeline's are in two layers
        else:
            config = read_diffusers_config(folder, "AutoencoderKL")
            kind, sd, settings = formats.import_vae(sd)
        if kind.startswith("AutoencoderKL"):
            check_diffusers_config(config, {
                "act_fn": "silu",                                  # not visible in keys or shapes
                "latent_channels": settings["C"],
                "block_out_channels": settings["widths"],
                "layers_per_block": settings["blocks"],
            })
            settings["groups"] = groups_of(settings["widths"], config)
        if kind == "AutoencoderKL":
            sd |= latent_statistics(settings, config, folder, name)
        elif kind == "TAEF2":
            sd |= statistics(0.0, 1.0, channels=32)
        with torch.device("meta"):
            vae = BASES[kind].build(settings)
        fill(vae, sd)
    return vae.eval()


def find_vae(source):
    """The VAE's folder in a diffusers pipeline or an export of ours; any other source as it is.

    A name on the hub is downloaded (support/hub.py).
    """
    source = hub.local(source, "vae")
    if isinstance(source, dict) or runs.checkpoints(source):
        return source
    inside = Path(source) / "vae"
    return inside if inside.is_dir() else Path(source)


def read_vae(source):
    """(state dict of a public VAE, the folder with its config.json; None for a dict)."""
    if isinstance(source, dict):
        return pick_weights(source), None
    halves = [source / name for name in hub.TAEF2]
    missing = [half.name for half in halves if not half.exists()]
    if source.name in hub.TAEF2 or len(missing) == 1:
        lacks = f"has no {missing[0]}" if len(missing) == 1 else "one half of TAEF2"
        raise ValueError(f"{lacks}; wanted a folder with its two files, {' and '.join(hub.TAEF2)}")
    if missing:
        sd = pick_weights(read_state_dict(source), name=source)
        return sd, source if source.is_dir() else source.parent
    sd = {}
    for half in halves:
        part = pick_weights(read_state_dict(half), name=source)
        sd |= {f"{half.stem.removeprefix('taef2_')}.{key}": weight for key, weight in part.items()}
    return sd, source


def read_diffusers_config(folder, wanted):
    """Diffusers' config.json in this folder; {} if there is none, or if another program wrote it.

    raises: ValueError if it describes another class than `wanted`
    """
    if folder is None or not (folder / "config.json").exists():
        return {}
    config = read_json(folder / "config.json")
    if config.get("_class_name", wanted) != wanted:
        raise ValueError(f"its config.json describes diffusers' {config['_class_name']}; wanted {wanted}")
    return config if "_class_name" in config else {}


def groups_of(widths, config):
    """Groups of every GroupNorm, not visible in keys or shapes: config.json's; else 32, as in public VAEs."""
    groups = config.get("norm_num_groups", 32)
    if type(groups) is not int or groups < 1:
        raise ValueError(f"its config.json has norm_num_groups={groups!r}; wanted a whole number above 0")
    if any(width % groups for width in widths):
        raise ValueError(f"its levels of {widths} channels do not divide into {groups} groups; "
                         "wanted diffusers' config.json next to it, with the right norm_num_groups")
    return groups


def latent_statistics(settings, config, folder, name):
    """Mean and std with which the pretrained pipeline normalises latents: z -> (z - mean) / std, per channel.

    In this order: VA-VAE's latents_stats.pt next to the weights; the numbers in diffusers' config.json; for a
    bare file of 16 channels without quant convolutions, SD3's numbers. Else 0 and 1, and a printed line says
    so, because a DiT that was trained on the latents expects the real ones.
    """
    C = settings["C"]
    if folder is not None and (folder / "latents_stats.pt").exists():
        return saved_statistics(folder / "latents_stats.pt", C)
    if any(name in config for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")):
        return stated_statistics(config, C)
    if C == 16 and not settings["quant"] and not config:
        if folder is not None:
            print(f"{name}: taken for SD3's VAE, whose latents are normalised by 0.0609 and 1 / 1.5305; "
                  "another of these sizes, such as FLUX.1's, needs its config.json next to it")
        return statistics(0.0609, 1 / 1.5305, C)
    if folder is not None:
        print(f"{name}: no latents_stats.pt next to it; its latents are not normalised. Put that file of the "
              "pretrained LightningDiT there to warm-start from it")
    return statistics(0.0, 1.0, C)


def dcae_statistics(settings, config, folder, name):
    """Mean 0 and std 1 / scale of a DC-AE's latents: z = scale * raw, as its diffusion models take them.

    In this order: the scale in diffusers' config.json; the published one of the model_name in the original's
    config.json; the published one, if all files of these sizes share it. Else 1, and a printed line says so.
    """
    C = settings["C"]
    if "scaling_factor" in config:
        return stated_statistics(config, C)
    published = published_scales(settings)
    beside = folder / "config.json" if folder is not None else None
    if beside is not None and beside.exists():
        scale = published.get(read_json(beside).get("model_name"))
        if scale is not None:
            return statistics(0.0, 1 / scale, C)
    if len(set(published.values())) == 1:
        return statistics(0.0, 1 / next(iter(published.values())), C)
    if folder is not None:
        known = " or ".join(f"{scale} ({model})" for model, scale in published.items()) or "not published"
        print(f"{name}: no config.json next to it states its scaling_factor ({known}); its latents are not "
              'normalised. To warm-start a transformer on it, put {"_class_name": "AutoencoderDC", '
              '"scaling_factor": ...} there')
    return statistics(0.0, 1.0, C)


def saved_statistics(path, C):
    """The statistics in VA-VAE's latents_stats.pt: {"mean", "std"}, (1, C, 1, 1) each."""
    saved = read_state_dict(path)
    if not isinstance(saved, dict) or "mean" not in saved or "std" not in saved:
        raise ValueError(f"{path.name} next to it has no mean and std")
    return statistics(numbers(saved, "mean", path.name), numbers(saved, "std", path.name), C)


def stated_statistics(config, C):
    """The statistics in diffusers' config.json, where null means 0 for a mean and 1 for a scale.

    SD3's pipelines compute (z - shift_factor) * scaling_factor. latents_mean and latents_std have one number
    per channel; of the pipelines with an AutoencoderKL, only SDXL's read them, if both are given, and compute
    (z - latents_mean) * scaling_factor / latents_std, without a shift (diffusers 0.42.1).
    """
    shift = stated(config, "shift_factor", 0.0)
    scale = stated(config, "scaling_factor", 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if not scale > 0:
        raise ValueError(f"its config.json has scaling_factor={scale}; wanted a number above 0")
    if mean is None and std is None:
        return statistics(shift, 1 / scale, C)
    if mean is None or std is None or shift:
        raise ValueError("its config.json has latents_mean or latents_std without the other, or with a "
                         "shift_factor; wanted both, and no shift")
    mean = numbers(config, "latents_mean", "config.json")
    return statistics(mean, numbers(config, "latents_std", "config.json") / scale, C)


def stated(config, name, null):
    """A finite number in config.json; `null` if it has none."""
    value = config.get(name)
    if value is None:
        return null
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"its config.json has {name}={value!r}; wanted a number")
    return float(value)


def numbers(values, name, file):
    """values[name], a list or a tensor of any shape, flattened."""
    try:
        return torch.as_tensor(values[name], dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{file} next to it has a {name} that is not a list of numbers") from None


def statistics(mean, std, channels):
    """{"mean", "std"}: (channels,) float32 each.

    mean, std: one number for all channels, or a tensor of one per channel
    raises:    ValueError if their count is wrong, one is not finite, or a std is not above 0
    """
    found = {}
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, torch.Tensor):
            values = torch.full((channels,), values)
        if len(values) != channels:
            raise ValueError(f"the {name} of its latents has {len(values)} numbers; wanted {channels}, "
                             "one per channel")
        if not torch.isfinite(values).all():
            raise ValueError(f"the {name} of its latents is not finite in every channel")
        found[name] = values.float()
    if not (found["std"] > 0).all():
        raise ValueError("the std of its latents is not above 0 in every channel")
    return found


# ---------------------------------------------------------------- our own autoencoders


def load_davae(source):
    """The DAVAE, or PlainVAE (D = 0), of a run or step folder of train_vae.py, in eval mode.

    Any other source that `load_base_vae` takes becomes a PlainVAE.
    raises: SystemExit saying what the source holds
    """
    source = find_vae(source)
    if not is_ours(source):
        return PlainVAE(load_base_vae(source)).eval()
    checkpoint = latest_checkpoint(source)
    config = read_config(checkpoint).get("model", {})
    if "base" not in config:
        raise SystemExit(f"{source}: holds a transformer; wanted a run of train_vae.py (or {source}/vae)")
    with one_sentence(checkpoint):
        with torch.device("meta"):
            vae = build_vae(config)
        fill(vae, read_state_dict(checkpoint / "model.safetensors"))
    return vae.eval()


def load_measured(source):
    """`load_davae` for an autoencoder whose latents a transformer, or a DAVAE, will be trained on.

    raises: SystemExit if its run is not finished: the latents' statistics are measured at the end
    """
    vae = load_davae(source)
    source = find_vae(source)
    if is_ours(source):
        checkpoint = latest_checkpoint(source)
        config = read_config(checkpoint)
        if not config.get("measured", True):
            raise SystemExit(f"{checkpoint}: the statistics of its latents are measured at the end of the "
                             "run, which is not finished; run its command again, or, to end it here, with "
                             f"--steps={int(checkpoint.name[5:])}")
    return vae


def save_base_vae(base, folder):
    """Save a base VAE, of a class in BASES, as a folder that `load_base_vae` and `load_davae` take."""
    vae = PlainVAE(base)
    runs.save_folder(folder, {"model": vae.state_dict()}, {"model": vae.config()})


def is_ours(source):
    """Is the source a run of ours, or a folder of weights with a config.json in our format?"""
    if isinstance(source, dict) or not Path(source).is_dir():
        return False
    if runs.checkpoints(source):
        return True
    path = Path(source) / "config.json"
    return path.exists() and isinstance(read_json(path).get("model"), dict)


def build_vae(config):
    """The module described by the "model" of a config.json, with new weights.   raises: ValueError"""
    base = dict(config["base"])
    kind = base.pop("kind", None)
    if kind not in BASES:
        raise ValueError(f"its base VAE is a {kind!r}; BASES has {', '.join(BASES)} (see support/bases.py)")
    try:
        module = BASES[kind].build(base)
    except TypeError as error:
        raise ValueError(f"config.json describes another {kind} ({error})") from None
    if config["D"] == 0:
        return PlainVAE(module)
    options = {name: value for name, value in config.items() if name != "base"}
    return DAVAE(module, settings_from(options, DAVAEConfig, "DAVAE"))


# ---------------------------------------------------------------- transformers


def load_dit(source, weights=None):
    """The transformer in a checkpoint, on the CPU, float32, in eval mode; its sizes are inferred.

    source:  a checkpoint folder of ours (config.json with ema and model.safetensors), or released weights of
             LightningDiT, USiT or SD3.5 (single file, diffusers): a file, a folder (a pipeline's too) or a
             dict; for FLUX.2 and Sana a folder, because only config.json has their settings
    weights: "ema" or "model" to insist on that one; None takes the EMA if there is one
    raises:  SystemExit saying what the source looks like
    """
    if weights not in (None, "ema", "model"):
        raise ValueError(f"weights={weights!r}, wanted 'ema', 'model' or None")
    name = name_of(source)
    where = find_dit(source)
    with one_sentence(name):
        if is_ours(where):
            kind, settings, sd = read_our_dit(where, weights)
        else:
            kind, settings, sd = read_public_dit(where, weights)
        Config, Model = MODELS[kind]
        with torch.device("meta"):
            model = Model(settings_from(settings, Config, kind))
        fill(model, sd)
    if hasattr(model, "build_tables"):             # position tables are made, not loaded
        model.build_tables("cpu")
    return model.eval()


def find_dit(source):
    """The transformer's folder in a diffusers pipeline, a run's newest checkpoint; else the source as it is.

    A name on the hub is downloaded (support/hub.py).
    """
    source = hub.local(source, "transformer")
    if isinstance(source, dict):
        return source
    if runs.checkpoints(source):
        return latest_checkpoint(source)
    inside = Path(source) / "transformer"
    return inside if inside.is_dir() else Path(source)


def read_our_dit(folder, weights):
    """(kind, fields of its config, state dict) of a checkpoint folder of ours."""
    settings = dict(read_config(folder)["model"])
    guess = "MMDiT" if "context" in settings else "LightningDiT"   # older checkpoints do not say
    kind = settings.pop("kind", guess)
    if kind not in MODELS:
        raise ValueError(f"its transformer is a {kind!r}; MODELS has {', '.join(MODELS)} (see dit.py)")
    settings_from(settings, MODELS[kind][0], kind)     # a wrong model is reported before missing files

    files = [folder / f"{name}.safetensors" for name in ([weights] if weights else ["ema", "model"])]
    found = [file for file in files if file.exists()]
    if not found:
        raise ValueError(f"it has config.json, but not {' or '.join(file.name for file in files)}")
    frozen = folder.parent / "frozen"     # what LoRA never changes, saved once per run
    shared = read_state_dict(frozen) if frozen.is_dir() else {}
    return kind, settings, shared | read_state_dict(found[0])


def read_public_dit(where, weights):
    """(kind, fields of its config, state dict in our names) of released weights."""
    sd = pick_weights(read_state_dict(where), weights, name_of(where))
    if is_usit(sd):
        ours, sizes = import_usit(sd)
        return "USiT", sizes, ours
    folder = None if isinstance(where, dict) or not where.is_dir() else where
    if folder is not None and (folder / "config.json").exists():
        config = read_json(folder / "config.json")
        if config.get("_class_name") in KINDS:
            return import_transformer(config, sd)
    refuse_bare(sd)
    config = read_diffusers_config(folder, "SD3Transformer2DModel")
    kind, ours, sizes, tables = formats.import_dit(sd)
    shown = {"in_channels": sizes["C"], "patch_size": sizes["p"], "num_layers": sizes["depth"]}
    check_diffusers_config(config, shown)
    if kind == "LightningDiT":
        check_tables(tables, MODELS[kind][0](**sizes))
    return kind, sizes, ours


def check_tables(tables, cfg):
    """raises: ValueError if a position table in the file is not the one that LightningDiT computes.

    Upstream computes RoPE's angles in float32, up to 1e-6 off; another formula would be off by 0.1.
    """
    ours = {"pos_embed": sincos_table(cfg.grid, cfg.E)}
    if cfg.rope:
        ours["feat_rope.freqs_cos"], ours["feat_rope.freqs_sin"] = rope_table(cfg.grid, cfg.E // cfg.A)
    for name, table in ours.items():
        if name not in tables:
            raise ValueError(f"not a whole checkpoint (it lacks {name})")
        theirs = tables[name]
        tolerance = max(1e-5, torch.finfo(theirs.dtype).eps)
        close = theirs.shape == table.shape and (theirs.float().cpu() - table).abs().max() <= tolerance
        if not close:                                              # or NaN
            raise ValueError(f"the table {name} {tuple(theirs.shape)} is not the one LightningDiT computes "
                             f"for a {cfg.grid}x{cfg.grid} grid; only tokens at whole positions 0, 1, 2 ... "
                             "are supported")


def load_run(run, weights="ema", device="cpu"):
    """(dit, vae, config) of a run of finetune.py or one of its step folders, in eval mode."""
    checkpoint = latest_checkpoint(run)
    config = read_config(checkpoint)
    if config.get("script") != "finetune.py":
        raise SystemExit(f"{run}: holds a checkpoint of {config.get('script')}; wanted a run of finetune.py")
    vae = load_davae(checkpoint.parent / "vae").to(device, memory_format=torch.channels_last)
    return load_dit(checkpoint, weights).to(device), vae, config


# ---------------------------------------------------------------- shared by all loads


def name_of(source):
    """What an error message calls a source."""
    return "the given state dict" if isinstance(source, dict) else source


@contextlib.contextmanager
def one_sentence(name):
    """Turn a ValueError inside into a SystemExit that begins with the name of what was read."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"{name}: {error}") from None


def settings_from(values, Config, kind):
    """Config(**values).   raises: ValueError naming an unknown field, or one whose value is not a number"""
    unknown = sorted(set(values) - {f.name for f in fields(Config)})
    if unknown:
        raise ValueError(f"config.json describes another model (it has {some(unknown)}), "
                         f"wanted a {kind}")
    for f in fields(Config):
        value = values.get(f.name, f.default)
        wanted = (int, float) if type(f.default) is float else (type(f.default),)
        if type(f.default) in (bool, int, float) and not (type(value) in wanted and math.isfinite(value)):
            raise ValueError(f"config.json has {f.name}={value!r}; wanted a {wanted[-1].__name__}")
    return Config(**values)


# ---------------------------------------------------------------- export


@dataclass
class ExportConfig:
    run: str = field("", "a run of finetune.py, or one of its step folders")
    out: str = field("", "a folder that does not exist yet")
    weights: str = field("ema", "ema or model", choices=("ema", "model"))


def main_export(cfg):
    """`sample.py export`: the DA-VAE, and the transformer in its public format, as one stock model.

    P_new, O_new and adapters are merged into the transformer's layers. The new folder cfg.out has:

    vae/         model.safetensors and config.json, for `load_davae`
    LightningDiT lightningdit.pt: {"ema": weights} as its own code reads it, with in_channels C + D
    USiT         usit.pt: {"ema": weights} under U-ViT's names, for C + D channels
    SD3.5        transformer/: a stock SD3Transformer2DModel folder of diffusers with in_channels C + D; with
                 adapters also lora/, the adapters alone in peft's format, for a transformer built from
                 transformer/config.json with the base's weights
    FLUX.2, Sana the same, with their own classes (support/diffusers_dit.py)
    """
    if not cfg.run:
        raise SystemExit("no run given; wanted one of finetune.py: python sample.py export RUN --out=FOLDER")
    dit, vae, about = load_run(cfg.run, cfg.weights)
    side = about["config"]["image_size"] // vae.f
    if not cfg.out or os.path.lexists(cfg.out):
        raise SystemExit(f"--out={cfg.out!r}: wanted a new folder; nothing is overwritten")
    if not isinstance(dit, (LightningDiT, MMDiT, USiT, DiffusersDiT)):
        raise SystemExit(f"{cfg.run}: a {type(dit).__name__} has no public format")
    temporary = Path(f"{Path(cfg.out)}{NEW}")
    runs.make_folder(temporary)
    try:
        with runs.disk_may_fail(must=True, what=cfg.out):
            shutil.rmtree(temporary)                               # of an earlier try, which was killed
            write_export(dit, vae, side, temporary, {"source": cfg.run})
            temporary.replace(cfg.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)               # a full disk needs its bytes
    print(f"{cfg.out}: {', '.join(sorted(path.name for path in Path(cfg.out).iterdir()))}")


def write_export(dit, vae, side, folder, source):
    """Write the contents of an export; see `main_export`.

    side: of the latents that were trained on;  source: goes into the config.json of our parts
    """
    runs.save_folder(folder / "vae", {"model": vae.state_dict()}, source | {"model": vae.config()})
    if isinstance(dit, LightningDiT):
        torch.save({"ema": formats.export_lightningdit(dit)}, folder / "lightningdit.pt")
    elif isinstance(dit, USiT):
        torch.save({"ema": export_usit(dit)}, folder / "usit.pt")
    else:
        if dit.cfg.lora:
            write_lora(dit, folder / "lora", source)
        dit = merge_lora(dit)
        if isinstance(dit, MMDiT):
            config, merged = diffusers_config(dit.cfg, side), formats.export_diffusers(dit)
        else:
            config, merged = export_transformer(dit, side * vae.f)
        runs.save_folder(folder / "transformer", {"diffusion_pytorch_model": merged}, config)


def write_lora(dit, folder, source):
    """Write a transformer's adapters in peft's format."""
    if isinstance(dit, MMDiT):
        lora = formats.export_lora(dit)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear"]
        ends = ["pos_embed.proj", "proj_out"]
    else:
        lora, targets, ends = export_adapters(dit)
    runs.save_folder(folder, {"adapter_model": lora}, source)
    runs.write_json(folder / "adapter_config.json", {
        "peft_type": "LORA",
        "r": dit.cfg.lora,
        "lora_alpha": dit.cfg.alpha,
        "target_modules": targets,
        "bias": "none",
        "modules_to_save": ends,
    })


def diffusers_config(cfg, side):
    """The config.json of the SD3Transformer2DModel equivalent to an MMDiT.

    side: of the latents that a pipeline draws if it is not told a size
    """
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": side,
        "patch_size": cfg.p,
        "in_channels": cfg.C + cfg.D,
        "out_channels": cfg.C + cfg.D,
        "num_layers": cfg.depth,
        "num_attention_heads": cfg.A,
        "attention_head_dim": cfg.E // cfg.A,
        "caption_projection_dim": cfg.E,
        "joint_attention_dim": cfg.context,
        "pooled_projection_dim": cfg.pooled,
        "pos_embed_max_size": cfg.pos_size,
        "dual_attention_layers": list(range(cfg.dual)),
        "qk_norm": "rms_norm",
    }
