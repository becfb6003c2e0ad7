"""Transformers of diffusers as backbones, wrapped rather than rewritten: FLUX.2 (klein) and Sana.

    python finetune.py klein-1024 --base=FLUX.2-klein-base-4B --data_dir=captioned --text=out/text

diffusers' own class computes everything between the first layer and the last. These two are taken out of it,
leaving identities in their places, and become P and O. So P_new and O_new are added as in dit.py:

    x = P(z) + P_new(z_d)          x = net(x, sigma, text)          v_all = -[O(x), O_new(x)]

and at step 0 the velocity is that of diffusers' model, to the last bit (float32). A class here specifies its
model: the names of diffusers' class, of the two layers and of those that get adapters; its blocks; and, in
`features`, how it is called: positions, guidance, the scale of its time. diffusers' time runs the other way,
sigma = 1 - t, and its models predict noise - data: `forward` converts both, and nothing else does.

Dimension key and time are dit.py's. Only these models need diffusers (0.42.1 was read and compared).
The comparison used small models with random weights; pretrained ones were not run.
"""
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.diffusers_text import class_of
from support.files import some

# ---------------------------------------------------------------- what is the same for all


@dataclass
class DiffusersConfig:
    """Everything that fixes a wrapped transformer's shapes; saved with its weights."""
    C: int = 32                 # base channels
    D: int = 0                  # detail channels, 0 before expand_channels
    p: int = 1                  # patch side, latent pixels
    context: int = 4096         # width of the text tokens
    guidance: float = 4.0       # of a guidance-distilled model, which takes the scale as an input
    lora: int = 0               # rank of the adapters, 0: none
    alpha: float = 256.0        # their scale is alpha / rank
    net: dict = field(default_factory=dict)        # diffusers' own config.json; defaults for the rest

    @property
    def E(self):
        return self.net["num_attention_heads"] * self.net["attention_head_dim"]

    @property
    def depth(self):
        return self.net["num_layers"] + self.net.get("num_single_layers", 0)


class DiffusersDiT(nn.Module):
    """Velocity of a latent, given the time and a text, by one of diffusers' transformers.

    z_all:   (B, C+D, h, w) normalised, base channels first; h and w multiples of p
    t:       (B,) in [0, 1], 0 noise, 1 data
    context: (B, T, cfg.context) text tokens;  beside: what else the model takes of a text, see subclasses
    returns: v (B, C+D, h, w) float32
    raises:  ValueError for a latent of another shape, or if diffusers' config is of an unsupported model
    """
    theirs = ""                # its class in diffusers
    first = ""                 # the names, there, of its first and last layer
    last = ""
    p = 1                      # patch side; for a Linear first layer, as its pipeline packs latents
    width_of_text = ""         # the name of cfg.context in diffusers' config
    mark = ""                  # a weight that no other transformer here has
    lora_targets = ()          # the layers of each block that get an adapter
    checkpointing = False      # True: recompute each block in the backward pass, to save memory

    def __init__(self, cfg):
        super().__init__()
        self.net = class_of(self.theirs).from_config(cfg.net)
        self.cfg = replace(cfg, D=0, net=settings_of(self.net))
        self.P = take(self.net, self.first)
        self.O = take(self.net, self.last)
        self.check(cfg.p**2 * cfg.C)
        self.P_new, self.O_new = None, None
        self.net.enable_gradient_checkpointing()                   # `forward` says when
        if cfg.D:
            self.expand_channels(cfg.D)
        if cfg.lora:
            from dit import add_lora                               # here, as dit.py is above support/
            add_lora(self, cfg.lora, cfg.alpha)

    def expand_channels(self, D):
        """See dit.py:Transformer.expand_channels."""
        from dit import Transformer
        Transformer.expand_channels(self, D)

    def check(self, numbers):
        """raises: ValueError unless the first layer takes, and the last gives, so many numbers per patch"""
        comes = self.P.in_features if isinstance(self.P, nn.Linear) else self.P.weight[0].numel()
        if (comes, self.O.out_features) != (numbers, numbers):
            raise ValueError(f"this {self.theirs} takes {comes} numbers per patch and predicts "
                             f"{self.O.out_features}; wanted {numbers} of both, for a velocity only")

    @property
    def blocks(self):
        return list(self.net.transformer_blocks)

    def forward(self, z_all, t, context, beside, skip=()):
        B, channels, h, w = z_all.shape
        p = self.cfg.p
        if channels != self.cfg.C + self.cfg.D or h % p or w % p:
            raise ValueError(f"z_all is {tuple(z_all.shape)}, wanted (B, {self.cfg.C + self.cfg.D}, h, w) "
                             f"with h and w multiples of {p}")
        if skip:
            raise ValueError(f"skip-layer guidance is for SD3.5; {type(self).__name__} cannot skip blocks")
        self.net.gradient_checkpointing = self.checkpointing and self.training

        # tokens in float32: the net rounds the time to their type, and bfloat16 cannot hold thousandths
        x = self.tokens(z_all).float()
        x = self.features(x, 1 - t, context, beside, h // p, w // p)                  # (B, L, E)
        return -self.heads(x, h, w)

    def tokens(self, z_all):
        """P(z) + P_new(z_d): (B, L, E) from a Linear, (B, E, h/p, w/p) from a convolution."""
        z, z_d = z_all.split([self.cfg.C, self.cfg.D], dim=1)
        x = self.P(self.packed(z))
        if self.cfg.D:
            x = x + self.P_new(self.packed(z_d))
        return x

    def packed(self, z):
        """What the first layer takes: a convolution the latent, a Linear row-major patches (B, L, p*p*C)."""
        if isinstance(self.P, nn.Conv2d):
            return z
        return F.pixel_unshuffle(z, self.cfg.p).flatten(2).transpose(1, 2)     # pixels fastest, then channels

    def unpacked(self, x, h, w):
        """The inverse of `packed` for a Linear: (B, L, p*p*C) -> (B, C, h, w)."""
        p = self.cfg.p
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (h // p, w // p)), p)

    def heads(self, x, h, w):
        """[O(x), O_new(x)], each unpacked separately: (B, L, E) -> (B, C+D, h, w) float32."""
        v = self.unpacked(self.O(x), h, w)                                            # (B, C, h, w)
        if self.cfg.D:
            v = torch.cat([v, self.unpacked(self.O_new(x), h, w)], dim=1)
        return v.float()

    def features(self, x, sigma, context, beside, rows, columns):
        """x through the net: the input of its last layer, (B, L, E).  sigma: (B,), 1 is noise, 0 data."""
        raise NotImplementedError


# ---------------------------------------------------------------- FLUX.2


# FLUX.2-klein-4B's config.json, where it differs from diffusers' defaults; klein-base-4B has the same
KLEIN_4B = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, attention_head_dim=128,
                joint_attention_dim=7680, guidance_embeds=False)


@dataclass
class Flux2Config(DiffusersConfig):
    """Defaults: FLUX.2-klein-4B, on the latents of support/flux2.py or TAEF2."""
    p: int = 2
    context: int = 7680         # three layers of Qwen3-4B
    net: dict = field(default_factory=lambda: dict(KLEIN_4B))


class Flux2(DiffusersDiT):
    """Flux2Transformer2DModel: two kinds of blocks, on text and image tokens first apart, then together.

    beside: (B, any), not read
    """
    theirs = "Flux2Transformer2DModel"
    first, last = "x_embedder", "proj_out"
    p = 2
    width_of_text = "joint_attention_dim"
    mark = "double_stream_modulation_img.linear.weight"
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.linear_out",
                    "attn.to_qkv_mlp_proj", "attn.to_out")

    @property
    def blocks(self):
        return [*self.net.transformer_blocks, *self.net.single_transformer_blocks]

    def features(self, x, sigma, context, beside, rows, columns):
        # a position has four numbers: time, row, column, place in the text
        zero = torch.arange(1, device=x.device)
        row = torch.arange(rows, device=x.device)
        column = torch.arange(columns, device=x.device)
        place = torch.arange(context.shape[1], device=x.device)
        guidance = None
        if self.cfg.net["guidance_embeds"]:
            guidance = torch.full_like(sigma, self.cfg.guidance)
        return self.net(
            x, context, sigma, guidance=guidance, return_dict=False,
            img_ids=torch.cartesian_prod(zero, row, column, zero),                    # (L, 4)
            txt_ids=torch.cartesian_prod(zero, zero, zero, place))[0]                 # (T, 4)


# ---------------------------------------------------------------- Sana


# Sana 1.6B's values that the properties above need; the rest are diffusers' defaults
SANA = dict(num_layers=20, num_attention_heads=70, attention_head_dim=32)


@dataclass
class SanaConfig(DiffusersConfig):
    """Defaults: Sana 1.6B, on DC-AE f32c32's latents."""
    context: int = 2304         # Gemma-2-2B's
    net: dict = field(default_factory=lambda: dict(SANA))


class Sana(DiffusersDiT):
    """SanaTransformer2DModel: linear attention among image tokens, cross-attention to the text.

    beside: (B, T), 1 for a token of the text and 0 for padding
    """
    theirs = "SanaTransformer2DModel"
    first, last = "patch_embed.proj", "proj_out"
    width_of_text = "caption_channels"
    mark = "caption_norm.weight"
    lora_targets = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
                    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")

    def __init__(self, cfg):
        super().__init__(cfg)
        net = self.cfg.net
        if net["patch_size"] != 1 or net["guidance_embeds"] or net["interpolation_scale"] is not None:
            raise ValueError("this Sana has patches, a guidance input (Sprint) or a position table (4K), "
                             "which are not supported here; wanted patch_size 1 and neither of the others")

    def features(self, x, sigma, context, beside, rows, columns):
        time = 1000 * self.cfg.net["timestep_scale"] * sigma
        x = self.net(x, context, time, encoder_attention_mask=beside, return_dict=False)[0]
        return x.flatten(2).transpose(1, 2)        # the net has reshaped the tokens to (B, E, h, w)


# ---------------------------------------------------------------- the parts of diffusers


def settings_of(net):
    """The config of a diffusers model, without its private entries; tuples become lists, as in JSON."""
    own = {}
    for name, value in net.config.items():
        if not name.startswith("_"):
            own[name] = list(value) if isinstance(value, tuple) else value
    return own


def take(net, name):
    """Take a layer out of a module, by its name, leaving an identity in its place."""
    parent, _, leaf = name.rpartition(".")
    holder = net.get_submodule(parent)
    layer = getattr(holder, leaf)
    setattr(holder, leaf, nn.Identity())
    return layer


# ---------------------------------------------------------------- folders of diffusers, in and out


KINDS = {Model.theirs: Model for Model in (Flux2, Sana)}           # class in diffusers -> ours


def refuse_bare(sd):
    """raises: ValueError for the weights of one of KINDS that came without their config.json"""
    for theirs, Model in KINDS.items():
        if Model.mark in sd:
            raise ValueError(f"the weights of diffusers' {theirs} alone; wanted its folder, with the "
                             "settings in config.json")


def import_transformer(config, sd):
    """A folder of diffusers -> (kind, fields of its config, state dict in our names).

    config: its config.json, whose _class_name is in KINDS;  sd: its weights
    raises: ValueError naming what the config lacks
    """
    Model = KINDS[config["_class_name"]]
    wanted = ["in_channels", "num_layers", "num_attention_heads", "attention_head_dim", Model.width_of_text]
    missing = [name for name in wanted if name not in config]
    if missing:
        raise ValueError(f"its config.json lacks {some(missing)}; wanted that of a {Model.theirs}")
    net = {name: value for name, value in config.items() if not name.startswith("_")}
    settings = dict(C=net["in_channels"] // Model.p**2, p=Model.p, context=net[Model.width_of_text], net=net)
    layers = {Model.first: "P", Model.last: "O"}
    ours = {}
    for key, weight in sd.items():
        layer, _, part = key.rpartition(".")
        ours[f"{layers[layer]}.{part}" if layer in layers else f"net.{key}"] = weight
    return Model.__name__, settings, ours


def export_transformer(model, pixels=0):
    """A wrapped transformer without adapters -> (config.json, weights) of diffusers, for C + D channels.

    pixels: the side of the images that it was trained on; 0: the config keeps the original's
    """
    channels = model.cfg.p**2 * (model.cfg.C + model.cfg.D)
    config = {"_class_name": model.theirs} | model.cfg.net
    if pixels and "sample_size" in config:
        # Sana's pipeline draws images of about 32 times this, its VAE's f, and resizes them to what was asked
        config["sample_size"] = pixels // 32
    return config | {"in_channels": channels, "out_channels": channels}, merged(model)


def export_adapters(model):
    """(weights under peft's names, the adapted layers, the layers that are saved whole: first and last)."""
    theirs = merged(model)
    lora = {}
    targets = []
    for name, weight in theirs.items():
        layer, _, matrix = name.rpartition(".")
        if matrix in ("A", "B"):
            lora[f"base_model.model.{layer}.lora_{matrix}.weight"] = weight[0].contiguous()
            targets += [layer] if matrix == "A" else []
        if layer in (model.first, model.last):
            lora[f"base_model.model.{name}"] = weight
    return lora, targets, [model.first, model.last]


def merged(model):
    """The model's state dict in diffusers' names, with P_new inside P and O_new inside O."""
    sd = {name: weight.detach() for name, weight in model.state_dict().items()}
    for layer, axis in (("P", 1), ("O", 0)):
        for part in ("weight", "bias"):
            name, new = f"{layer}.{part}", f"{layer}_new.{part}"
            if new in sd:                                          # P_new has no bias: P has it
                sd[name] = torch.cat([sd[name], sd.pop(new)], axis)
    layers = {"P": model.first, "O": model.last}
    theirs = {}
    for name, weight in sd.items():
        front, _, rest = name.partition(".")
        theirs[f"{layers[front]}.{rest}" if front in layers else rest] = weight.contiguous()
    return theirs


class InPipeline(nn.Module):
    """A DA-VAE (or a PlainVAE) as the `vae` of SD3.5's, FLUX.2's or Sana's pipeline (docs/recipes.md).

        pipeline.vae = InPipeline(vae)
        pipeline.vae_scale_factor = vae.f

    It only decodes. Its latents are normalised, so the pipelines get neutral numbers to undo: FLUX.2's the
    statistics of a BatchNorm, Sana's a factor, SD3.5's a factor and a shift. Like any part of a pipeline, it
    can be moved, also to another type, and offloaded by `enable_model_cpu_offload`.
    """

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.bn = nn.BatchNorm2d(4 * (vae.C + vae.D), affine=False, eps=0.0)
        self.config = SimpleNamespace(batch_norm_eps=0.0, scaling_factor=1.0, shift_factor=0.0)

    @property
    def device(self):
        return self.bn.running_mean.device

    @property
    def dtype(self):
        return self.bn.running_mean.dtype

    def decode(self, z, return_dict=False):
        hook = getattr(self, "_hf_hook", None)                     # of offloading, which waits for `forward`
        if hook is not None:
            hook.pre_forward(self)
        return (self.vae.decode(z.to(self.dtype)),)


MODELS = {"Flux2": (Flux2Config, Flux2), "Sana": (SanaConfig, Sana)}        # support/weights.py adds them
