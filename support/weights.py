"""weights"""
import dataclasses
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from davae import DAVAE, LAYOUT, AutoencoderKL, KLConfig
from dit import DiTConfig, LightningDiT, MMDiT, MMDiTConfig, merge_lora
from support import runs
from support.bases import TAEF2
from support.config import field
from support.formats import (
    export_diffusers,
    export_lightningdit,
    export_lora,
    import_dit,
    import_kl,
    import_taef2,
)
from support.runs import latest_checkpoint, read_config, read_state_dict


def load_davae(source):
    """A DAVAE in eval mode, from a run or step folder of train_vae.py; any base VAE file gives its D = 0 form."""
    if not (Path(source).is_dir() and (list(Path(source).glob("step_*")) or _is_ours(source))):
        return DAVAE(load_base_vae(source), D=0).eval()
    checkpoint = latest_checkpoint(source)
    config = read_config(checkpoint)["model"]
    base = config.pop("base")
    with torch.device("meta"):
        vae = DAVAE(TAEF2() if base.pop("kind") == "TAEF2" else AutoencoderKL(KLConfig(**base)), **config)
    vae.load_state_dict(read_state_dict(checkpoint / "model.safetensors"), strict=True, assign=True)
    return vae.eval()


def _is_ours(folder):
    return (path := Path(folder) / "config.json").exists() and "base" in json.loads(path.read_text()).get("model", {})


def load_base_vae(source):
    """A pretrained base VAE in eval mode, float32, its sizes read off the keys and shapes.

    source: a file (VA-VAE .pt, SD3 single-file or VAE-only .safetensors), a folder (diffusers; TAEF2's encoder and
    decoder files; a run of train_vae.py) or a state dict. Built on the meta device and assigned, strictly.
    raises: SystemExit with one sentence that says what the source looks like and what was wanted.
    """
    config = {}
    if not isinstance(source, dict) and Path(source).is_dir():
        folder = Path(source)
        if list(folder.glob("step_*")) or _is_ours(folder):
            return load_davae(folder).base
        if (folder / "vae").is_dir():                                            # a whole diffusers pipeline
            source = folder = folder / "vae"
        config = json.loads(path.read_text()) if (path := folder / "config.json").exists() else {}
        if (folder / "taef2_encoder.pth").exists():
            source = {f"{part}.{k}": v for part in ("encoder", "decoder")
                      for k, v in read_state_dict(folder / f"taef2_{part}.pth").items()}
    sd = read_state_dict(source)
    sd = sd.get("state_dict", sd)
    if "encoder.11.pool.0.weight" in sd:
        module, sd = TAEF2, import_taef2(sd)
    else:
        sd = import_kl(sd, where="state dict" if isinstance(source, dict) else source)
        cfg = dataclasses.replace(kl_config(sd), groups=config.get("norm_num_groups", 32))
        sd.update(_pipeline_statistics(cfg, config, source))
        module = lambda: AutoencoderKL(cfg)                                      # noqa: E731
    with torch.device("meta"):
        vae = module()
    vae.load_state_dict(sd, strict=True, assign=True)
    return vae.float().eval()


def _pipeline_statistics(cfg, config, source):
    """Per-channel mean and std by which the pretrained pipeline normalises: z -> (z - mean) / std.

    From a diffusers config.json, or VA-VAE's latents_stats.pt, beside the weights. A bare 16-channel file is taken for
    SD3's; another one without its statistics gets 0 and 1, and says so: a DiT that was trained on it expects the real ones.
    """
    path = Path("" if isinstance(source, dict) else source)
    stats = (path if path.is_dir() else path.parent) / "latents_stats.pt"
    if not isinstance(source, dict) and stats.exists():
        return {k: v.float().flatten() for k, v in read_state_dict(stats).items() if k in ("mean", "std")}
    shift, scale = (0.0609, 1.5305) if cfg.C == 16 and not cfg.quant else (0.0, 1.0)
    shift, scale = config.get("shift_factor") or shift, config.get("scaling_factor") or scale
    if (shift, scale) == (0.0, 1.0) and not isinstance(source, dict):
        print(f"{source}: no latents_stats.pt beside it; its latents stay as they are. Put that file of the pretrained "
              "LightningDiT there to warm-start from it")
    return {"mean": torch.full((cfg.C,), shift), "std": torch.full((cfg.C,), 1 / scale)}


def kl_config(sd):
    """Read an AutoencoderKL's sizes off a state dict in our names."""
    levels, blocks = (len({k[len(prefix):].split(".")[0] for k in sd if k.startswith(prefix)})
                      for prefix in ("encoder.down.", "encoder.down.0.block."))
    ch, attn = sd["encoder.conv_in.weight"].shape[0], [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in sd]
    ch_mult = [sd[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels)]
    return KLConfig(sd["from_latent.0.weight"].shape[1], ch, ch_mult, blocks, attn, quant="to_moments.1.weight" in sd)


def load_dit(source, weights=None):
    """Build the transformer that a checkpoint holds; sizes and options are read off it.

    source:  a checkpoint folder of ours (config.json beside ema/model.safetensors), or released weights of LightningDiT or
             SD3.5 (single-file or diffusers): a file, a folder (a diffusers pipeline's too) or a dict
    weights: "ema" or "model" to insist on one of them; None takes the EMA if there is one
    returns: LightningDiT or MMDiT on the CPU, float32, in eval mode.   raises: SystemExit saying what the file looks like
    """
    name = "the given dict" if isinstance(source, dict) else source
    if weights not in (None, "ema", "model"):
        raise ValueError(f"weights={weights!r}, wanted 'ema', 'model' or None")
    if not isinstance(source, dict) and (Path(source) / "transformer").is_dir():
        source = Path(source) / "transformer"
    try:
        own = None if isinstance(source, dict) else _read_own(Path(source), weights)
        sd, cfg = own or import_dit(pick_weights(read_state_dict(source), weights))
        with torch.device("meta"):                 # no memory, no random numbers: the weights come next
            model = MMDiT(cfg) if isinstance(cfg, MMDiTConfig) else LightningDiT(cfg)
        sd = {k: sd.pop(k).to("cpu", torch.float32, copy=True) for k in list(sd)}       # its own, one by one
        model.load_state_dict(sd, strict=True, assign=True)
    except (ValueError, KeyError, RuntimeError) as error:
        problem = error if isinstance(error, ValueError) else f"not a whole checkpoint ({str(error).splitlines()[-1].strip()})"
        raise SystemExit(f"{name}: {problem}") from None
    if isinstance(model, LightningDiT):
        model.build_tables("cpu")
    return model.eval()


def _read_own(folder, weights):
    """(state dict, config) of one of our checkpoint folders; None if it is not one."""
    config = read_config(folder) if (folder / "config.json").exists() else {}
    if "model" not in config:
        return None
    kind = MMDiTConfig if "context" in config["model"] else DiTConfig
    unknown = sorted(set(config["model"]) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"config.json describes another model (it has {', '.join(unknown[:4])}), wanted a DiT")
    files = [folder / f"{name}.safetensors" for name in ([weights] if weights else ["ema", "model"])]
    found = [f for f in files if f.exists()]
    if not found:
        raise ValueError(f"config.json is there, but not {' or '.join(f.name for f in files)}")
    frozen = folder.parent / "frozen"              # what LoRA never changes is saved once for all steps of a run
    return (read_state_dict(frozen) if frozen.is_dir() else {}) | read_state_dict(found[0]), kind(**config["model"])


def pick_weights(state, weights=None):
    """The state dict in a checkpoint: its `ema`, `model`, `state_dict` or itself, in this order; `weights` insists."""
    if not isinstance(state, dict):
        raise ValueError(f"holds one {type(state).__name__}, wanted a state dict")
    names = [weights] if weights else ["ema", "model", "state_dict"]
    found = [state[n] for n in names if isinstance(state.get(n), dict)]
    if weights and not found:
        raise ValueError(f"no {weights!r} weights in here, the file holds {', '.join(list(state)[:4])} ...")
    sd = found[0] if found else state              # DDP and torch.compile put these in front of the names
    while any(k.startswith(("module.", "_orig_mod.")) for k in sd):
        sd = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in sd.items()}
    return sd


def load_run(run, weights="ema", device=torch.device("cpu")):
    """(dit, vae, config) of a run of finetune.py or one of its step folders, in eval mode."""
    checkpoint = runs.latest_checkpoint(run)
    config = runs.read_config(checkpoint)
    if config.get("script") != "finetune.py":
        raise SystemExit(f"{run}: holds a checkpoint of {config.get('script')}; wanted a run of finetune.py")
    vae = load_davae(checkpoint.parent / "vae").to(device, memory_format=LAYOUT[device.type])
    return load_dit(checkpoint, weights).to(device), vae, config


@dataclass
class ExportConfig:
    run: str = field("", "a run of finetune.py, or one of its step folders")
    out: str = field("", "a folder that does not exist yet")
    weights: str = field("ema", "ema or model")


def main_export(cfg):
    """`sample.py export`: the DA-VAE, and the transformer under its public names with P_new, O_new and adapters merged.

    vae/: model.safetensors and config.json, as `load_davae` takes them. LightningDiT: lightningdit.pt, {"ema": weights} as
    its own code reads it, in_channels C + D. SD3.5: transformer/, a stock SD3Transformer2DModel folder of diffusers with
    in_channels C + D, and with adapters also lora/, them alone in peft's format, for the unmerged transformer.
    """
    dit, vae, config = load_run(cfg.run, cfg.weights)
    if not cfg.out or Path(cfg.out).exists():
        raise SystemExit(f"--out={cfg.out!r}: wanted a new folder; nothing is overwritten")
    out, temporary, m = Path(cfg.out), Path(f"{cfg.out}.tmp"), dit.cfg
    shutil.rmtree(temporary, ignore_errors=True)
    runs.save_folder(temporary / "vae", {"model": vae.state_dict()}, {"source": cfg.run, "model": vae.config()})
    if isinstance(dit, MMDiT):
        if m.lora:
            targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear"]
            runs.save_folder(temporary / "lora", {"adapter_model": export_lora(dit)}, {"source": cfg.run})
            adapter = dict(peft_type="LORA", r=m.lora, lora_alpha=m.alpha, target_modules=targets, bias="none")
            adapter["modules_to_save"] = ["pos_embed.proj", "proj_out"]
            runs.write_json(temporary / "lora" / "adapter_config.json", adapter)
        runs.save_folder(temporary / "transformer", {"diffusion_pytorch_model": export_diffusers(merge_lora(dit))}, dict(
            _class_name="SD3Transformer2DModel", sample_size=128, patch_size=m.p, in_channels=m.C + m.D, out_channels=m.C + m.D,
            num_layers=m.depth, num_attention_heads=m.A, attention_head_dim=m.E // m.A, caption_projection_dim=m.E,
            joint_attention_dim=m.context, pooled_projection_dim=m.pooled, pos_embed_max_size=m.pos_size,
            dual_attention_layers=list(range(m.dual)), qk_norm="rms_norm"))
    else:
        torch.save({"ema": export_lightningdit(dit)}, temporary / "lightningdit.pt")
    temporary.replace(out)
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
