"""Transformers that denoise latents, and the surgery that gives a pretrained one more channels.

LightningDiT (Yao et al., 2025; class-conditional, pretrained on VA-VAE latents) is written out in full. The method is
`widen` and `expand_channels`: next to the patch embedder P and the output head O stand P_new and O_new for the D detail
channels, all zero, so that the widened model starts as an exact copy of the pretrained one (Sec. 3.2):

    tokens = P(z) + P_new(z_d)          v_all = [O(x), O_new(x)]

    model = load_dit("lightningdit-xl-imagenet256-800ep.pt", weights="model")
    model.expand_channels(96)           # v, v_d = model(z_all, t, y).split([32, 96], dim=1)

Dimension key:  B batch   h w latent grid   p patch side   L tokens = h*w/p^2   E width   A heads   K width per head
                C base channels   D detail channels   z_all = [z, z_d] is (B, C+D, h, w), normalised, base first
Paper symbols:  P, O patch embedder and output head of the base;  P_new, O_new are its P', O' for the details
Time:           t = 0 is noise, t = 1 is data, x_t = t*data + (1-t)*noise, and the model predicts v = data - noise.
"""
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import read_config, read_state_dict

# ---------------------------------------------------------------- widening: the method


def widen(in_proj, out_proj, D):
    """Zero-initialised companions of a transformer's first and last layer, for D new channels.  P', O' of Sec. 3.2.

    in_proj:  the patch embedder, a Conv2d C -> E whose stride is its kernel;  add P_new(z_d) to its output
    out_proj: the head, a Linear E -> p*p*C;  concatenate O_new(x), unpatchified by itself, after its channels
    returns:  P_new (no bias: in_proj has it) and O_new, on the device and in the dtype of in_proj

    Zeros do not stall the training: the base loss reaches P_new through the whole model, the detail loss reaches O_new.
    """
    like = dict(device=in_proj.weight.device, dtype=in_proj.weight.dtype)
    k = in_proj.kernel_size
    P_new = nn.Conv2d(D, in_proj.out_channels, k, stride=k, bias=False, **like)
    O_new = nn.Linear(out_proj.in_features, k[0] * k[1] * D, **like)
    for param in (*P_new.parameters(), *O_new.parameters()):
        nn.init.zeros_(param)
    return P_new, O_new


# ---------------------------------------------------------------- small pieces, one equation each


def timestep_embedding(t, width=256):
    """[cos(t f_k), sin(t f_k)] with f_k = 10000^(-k / (width/2)).  (B,) -> (B, width) float32.

    t stays in [0, 1]. Most DiTs multiply it by 1000 first; LightningDiT was trained without that.
    """
    half = width // 2
    f = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulate(x, shift, scale):
    """x * (1 + scale) + shift, the same for every token.  x: (B, L, E); shift, scale: (B, E)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def attention(q, k, v):
    """softmax(q k^T / sqrt(K)) v over all tokens.  q, k, v: (B, A, L, K) -> (B, A, L, K)."""
    return F.scaled_dot_product_attention(q, k, v)


def rope(x, cos, sin):
    """Rotate each pair of adjacent channels: (a, b) -> (a cos - b sin, b cos + a sin).

    x: (B, A, L, K); cos, sin: (L, K) float32, so the result is float32 whatever x is.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


def unpatchify(x, p):
    """Tokens back to a latent.  (B, L, p*p*C), channel fastest -> (B, C, h, w), h = w = p * sqrt(L)."""
    B, L, _ = x.shape
    g = math.isqrt(L)
    x = x.view(B, g, g, p, p, -1)                  # row, column, row in patch, column in patch, channel
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, g * p, g * p)


def grid_positions(grid):
    """Row and column of each token, row-major.  Two (L,) float64 tensors: only the finished tables are rounded."""
    i = torch.arange(grid, dtype=torch.float64, device="cpu")
    return i.repeat_interleave(grid), i.repeat(grid)


def sincos_table(grid, E):
    """[sin(col w), cos(col w), sin(row w), cos(row w)], w_j = 10000^(-j / (E/4)): the fixed embedding, (1, L, E)."""
    row, col = grid_positions(grid)
    w = 10000 ** (-torch.arange(E // 4, dtype=torch.float64, device="cpu") / (E // 4))
    parts = [f(torch.outer(n, w)) for n in (col, row) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()[None]


def rope_table(grid, K):
    """cos and sin of the rotary angles: the row turns the first K/2 channels, the column the rest.  Two (L, K) tensors.

    Opposite axis order to `sincos_table`, and LightningDiT uses both. Frequencies 10000^(-2j / (K/2)), one per pair.
    """
    f = 10000 ** (-2 * torch.arange(K // 4, dtype=torch.float64, device="cpu") / (K // 2))
    angle = torch.cat([torch.outer(n, f.repeat_interleave(2)) for n in grid_positions(grid)], dim=1)
    return angle.cos().float(), angle.sin().float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, then times a learned scale."""

    def __init__(self, E, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(E))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


# ---------------------------------------------------------------- LightningDiT

SIZES = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16),      # name: depth, E, A
         "1p0B": (24, 1536, 24), "1p6B": (28, 1792, 28)}


@dataclass
class DiTConfig:
    """Everything that fixes a LightningDiT's shapes; saved with its weights. Defaults: the released XL/1."""
    C: int = 32                 # base channels
    D: int = 0                  # detail channels, 0 before expand_channels
    p: int = 1                  # patch side, latent pixels
    grid: int = 16              # tokens per side: the latent is (grid * p) x (grid * p)
    E: int = 1152               # width
    depth: int = 28             # blocks
    A: int = 16                 # attention heads
    hidden: int = 0             # width inside the MLP; 0: int(8/3 E) with swiglu, 4 E without
    num_classes: int = 1000     # labels 0 .. num_classes-1; num_classes itself is "no class"
    swiglu: bool = True         # else a GELU (tanh) MLP
    qk_norm: bool = False       # RMSNorm on each head's q and k
    rms_norm: bool = True       # else LayerNorm without learned scale
    rope: bool = True           # rotate q and k; the position embedding is added either way

    def __post_init__(self):
        if self.E % (4 * self.A):
            raise ValueError(f"E={self.E} with A={self.A} heads: E must be a multiple of 4*A, for the position tables")
        if self.qk_norm and not self.rms_norm:
            raise ValueError("qk_norm without rms_norm is left out: set rms_norm=True")
        self.hidden = self.hidden or (int(2 / 3 * int(4 * self.E)) if self.swiglu else 4 * self.E)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.A = cfg.A
        self.qkv = nn.Linear(cfg.E, 3 * cfg.E)
        self.q_norm = RMSNorm(cfg.E // cfg.A) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.E // cfg.A) if cfg.qk_norm else nn.Identity()
        self.proj = nn.Linear(cfg.E, cfg.E)

    def forward(self, x, tables):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.A, -1)).permute(2, 0, 3, 1, 4)       # each (B, A, L, K)
        q, k = self.q_norm(q), self.k_norm(k)
        if tables is not None:
            q, k = rope(q, *tables), rope(k, *tables)
        x = attention(q.to(v.dtype), k.to(v.dtype), v)                                    # (B, A, L, K)
        return self.proj(x.transpose(1, 2).flatten(2))                                    # (B, L, E)


class SwiGLU(nn.Module):
    """w3(SiLU(a) * b), where w12 computes a and b side by side (Shazeer, 2020)."""

    def __init__(self, E, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(E, 2 * hidden), nn.Linear(hidden, E)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class MLP(nn.Module):
    def __init__(self, E, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(E, hidden), nn.Linear(hidden, E)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def token_norm(cfg):
    """The norm in front of attention, MLP and output heads."""
    return RMSNorm(cfg.E) if cfg.rms_norm else nn.LayerNorm(cfg.E, eps=1e-6, elementwise_affine=False)


class Block(nn.Module):
    """x += gate1 Attn(mod1(norm1(x)));  x += gate2 MLP(mod2(norm2(x))).  adaLN-Zero (Peebles & Xie, 2023)."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn = token_norm(cfg), Attention(cfg)
        self.norm2, self.mlp = token_norm(cfg), (SwiGLU if cfg.swiglu else MLP)(cfg.E, cfg.hidden)
        self.adaLN = nn.Linear(cfg.E, 6 * cfg.E)

    def forward(self, x, c, tables):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(c).chunk(6, dim=-1)     # each (B, E)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), tables)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))     # (B, L, E)


class LightningDiT(nn.Module):
    """Velocity of a latent, given the time and a class.

    z_all:   (B, C+D, h, w) normalised, base channels first; h = w = cfg.grid * cfg.p
    t:       (B,) in [0, 1], 0 noise, 1 data
    y:       (B,) int64 in 0 .. num_classes; num_classes is the null class. Dropping labels is the caller's business
    returns: v (B, C+D, h, w) float32
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.P = nn.Conv2d(cfg.C, cfg.E, cfg.p, stride=cfg.p)
        self.t_embedder = nn.Sequential(nn.Linear(256, cfg.E), nn.SiLU(), nn.Linear(cfg.E, cfg.E))
        self.y_embedder = nn.Embedding(cfg.num_classes + 1, cfg.E)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm_final = token_norm(cfg)
        self.adaLN_final = nn.Linear(cfg.E, 2 * cfg.E)
        self.O = nn.Linear(cfg.E, cfg.p * cfg.p * cfg.C)
        self.P_new, self.O_new = widen(self.P, self.O, cfg.D) if cfg.D else (None, None)
        self.init_weights()
        self.build_tables(self.P.weight.device)

    def forward(self, z_all, t, y):
        cfg = self.cfg
        wanted = (cfg.C + cfg.D, cfg.grid * cfg.p, cfg.grid * cfg.p)
        if tuple(z_all.shape[1:]) != wanted:
            raise ValueError(f"z_all is {tuple(z_all.shape)}, wanted (B, C+D, h, w) with (C+D, h, w) = {wanted}")
        x = self.P(z_all[:, :cfg.C])                                # (B, E, h/p, w/p)
        if cfg.D:
            x = x + self.P_new(z_all[:, cfg.C:])
        x = x.flatten(2).transpose(1, 2) + self.pos_embed           # (B, L, E)
        c = self.t_embedder(timestep_embedding(t)) + self.y_embedder(y)
        c = F.silu(c)                                               # (B, E), every adaLN starts with this SiLU
        tables = (self.rope_cos, self.rope_sin) if cfg.rope else None
        for block in self.blocks:
            x = block(x, c, tables)                                 # (B, L, E)
        shift, scale = self.adaLN_final(c).chunk(2, dim=-1)
        x = modulate(self.norm_final(x), shift, scale)              # (B, L, E), read by both heads
        v = unpatchify(self.O(x), cfg.p)                            # (B, C, h, w)
        if cfg.D:
            v = torch.cat([v, unpatchify(self.O_new(x), cfg.p)], dim=1)     # (B, C+D, h, w)
        return v.float()

    def expand_channels(self, D):
        """Add D detail channels without changing what the model computes: for any z_d, v is as before and v_d is 0."""
        if self.cfg.D:
            raise ValueError(f"already expanded by D={self.cfg.D} channels; load the base model to start from it again")
        if D < 1:
            raise ValueError(f"D={D} detail channels asked for, wanted at least 1")
        self.P_new, self.O_new = widen(self.P, self.O, D)
        self.cfg = replace(self.cfg, D=D)

    def init_weights(self):
        # Linear layers: Xavier-uniform, zero bias.
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        # Patch embedder: the same, as the Linear (C p p) -> E that it is.
        nn.init.xavier_uniform_(self.P.weight.view(self.cfg.E, -1))
        nn.init.zeros_(self.P.bias)
        # Conditioning: small, so that no time or class starts out special.
        for weight in (self.y_embedder.weight, self.t_embedder[0].weight, self.t_embedder[2].weight):
            nn.init.normal_(weight, std=0.02)
        # adaLN and heads: zero, so that every block starts as the identity and the velocity as 0. So are P_new, O_new.
        zero = [*(block.adaLN for block in self.blocks), self.adaLN_final, self.O]
        for layer in zero + ([self.P_new, self.O_new] if self.cfg.D else []):
            for param in layer.parameters():
                nn.init.zeros_(param)

    def build_tables(self, device):
        """Position tables from their formulas: never saved, and the only tensors to make after loading from "meta"."""
        cfg = self.cfg
        cos, sin = rope_table(cfg.grid, cfg.E // cfg.A) if cfg.rope else (None, None)
        for name, table in {"pos_embed": sincos_table(cfg.grid, cfg.E), "rope_cos": cos, "rope_sin": sin}.items():
            self.register_buffer(name, None if table is None else table.to(device), persistent=False)


# ---------------------------------------------------------------- weights: loading, upstream names in and out


def load_dit(source, weights=None):
    """Build the transformer that a checkpoint holds; sizes and options are read off it.

    source:  one of our checkpoint folders (config.json beside ema/model.safetensors), or LightningDiT's weights as
             released: a file, a folder with one file, or a dict
    weights: "ema" or "model" to insist on one of them; None takes the EMA if there is one
    returns: LightningDiT on the CPU, float32, in eval mode
    raises:  SystemExit saying what the file looks like, if it is something else
    """
    name = "the given dict" if isinstance(source, dict) else source
    if weights not in (None, "ema", "model"):
        raise ValueError(f"weights={weights!r}, wanted 'ema', 'model' or None")
    try:
        own = None if isinstance(source, dict) else _read_own(Path(source), weights)
        sd, cfg = own or import_lightningdit(pick_weights(read_state_dict(source), weights))
    except ValueError as error:
        raise SystemExit(f"{name}: {error}") from None
    with torch.device("meta"):                     # no memory, no random numbers: the weights come next
        model = LightningDiT(cfg)
    sd = {k: w.to("cpu", torch.float32, copy=True) for k, w in sd.items()}      # its own, whoever holds the source
    model.load_state_dict(sd, strict=True, assign=True)
    model.build_tables("cpu")
    return model.eval()


def _read_own(folder, weights):
    """(state dict, DiTConfig) of one of our checkpoint folders; None if it is not one."""
    config = read_config(folder) if (folder / "config.json").exists() else {}
    if "model" not in config:
        return None
    unknown = sorted(set(config["model"]) - {f.name for f in fields(DiTConfig)})
    if unknown:
        raise ValueError(f"config.json describes another model (it has {', '.join(unknown[:4])}), wanted a DiT")
    files = [folder / f"{name}.safetensors" for name in ([weights] if weights else ["ema", "model"])]
    found = [f for f in files if f.exists()]
    if not found:
        raise ValueError(f"config.json is there, but not {' or '.join(f.name for f in files)}")
    return read_state_dict(found[0]), DiTConfig(**config["model"])


def pick_weights(state, weights=None):
    """The state dict in a checkpoint: its `ema`, `model`, `state_dict` or itself, in this order; `weights` insists."""
    if not isinstance(state, dict):
        raise ValueError(f"holds one {type(state).__name__}, wanted a state dict")
    names = [weights] if weights else ["ema", "model", "state_dict"]
    found = [state[n] for n in names if isinstance(state.get(n), dict)]
    if weights and not found:
        raise ValueError(f"no {weights!r} weights in here, the file holds {', '.join(list(state)[:4])} ...")
    wrappers = ("module.", "_orig_mod.")           # put in front of the names by DDP and torch.compile
    sd = found[0] if found else state
    while any(k.startswith(wrappers) for k in sd):
        sd = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in sd.items()}
    return sd


RENAME = [("x_embedder.proj.", "P."), ("final_layer.linear.", "O."), ("final_layer.norm_final.", "norm_final."),
          ("final_layer.adaLN_modulation.1.", "adaLN_final."), (".adaLN_modulation.1.", ".adaLN."),
          ("t_embedder.mlp.", "t_embedder."), ("y_embedder.embedding_table.", "y_embedder.")]    # upstream, ours
TABLES = ["pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"]     # upstream saves them; ours come from a formula


def import_lightningdit(sd):
    """Upstream LightningDiT names -> (our state dict, DiTConfig).  Drops `TABLES`, once they are seen to be ours."""
    cfg = _config_of(sd)
    ours = [sincos_table(cfg.grid, cfg.E), *(rope_table(cfg.grid, cfg.E // cfg.A) if cfg.rope else ())]
    for name, table in zip(TABLES, ours):
        # Upstream computes the RoPE angles in float32, up to 1e-6 off; another formula would be off by 0.1.
        tolerance = max(1e-5, torch.finfo(sd[name].dtype).eps)
        if sd[name].shape != table.shape or (sd[name].float().cpu() - table).abs().max() > tolerance:
            raise ValueError(f"the table {name} {tuple(sd[name].shape)} is not the one LightningDiT computes for a "
                             f"{cfg.grid}x{cfg.grid} grid; only tokens at whole positions 0, 1, 2 ... can be loaded")
    return {_rename(k, RENAME): v for k, v in sd.items() if k not in TABLES}, cfg


def export_lightningdit(model):
    """Our model -> upstream LightningDiT names, details merged into one wider layer.  Inverse of the import if D = 0.

    A widened model becomes a stock LightningDiT with in_channels = C + D, equal up to float32 rounding.
    """
    sd, cfg = {k: v.detach() for k, v in model.state_dict().items()}, model.cfg
    if cfg.D:
        sd["P.weight"] = torch.cat([sd["P.weight"], sd.pop("P_new.weight")], dim=1)       # (E, C+D, p, p)
        for name in ("weight", "bias"):            # rows run over (p, p, C): the channels meet inside each pixel
            heads = [sd[f"O.{name}"], sd.pop(f"O_new.{name}")]
            sd[f"O.{name}"] = torch.cat([o.unflatten(0, (cfg.p**2, -1)) for o in heads], dim=1).flatten(0, 1)
    sd = {_rename(k, [(ours, upstream) for upstream, ours in RENAME]): v for k, v in sd.items()}
    tables = [model.pos_embed, model.rope_cos, model.rope_sin]
    return sd | {name: table for name, table in zip(TABLES, tables) if table is not None}


def _rename(key, pairs):
    """`key` with the first matching part replaced."""
    return next((key.replace(a, b) for a, b in pairs if a in key), key)


def _config_of(sd):
    """DiTConfig from the names and shapes of an upstream state dict."""
    needed = ["x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight",
              "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"]
    if any(k not in sd for k in needed):
        raise ValueError(f"this looks like {_looks_like(sd)}; wanted a LightningDiT, or one of our checkpoint folders")
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
                     depth=1 + max(int(k.split(".")[1]) for k in sd if k.startswith("blocks.")),
                     hidden=sd[f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"].shape[1],
                     num_classes=sd["y_embedder.embedding_table.weight"].shape[0] - 1,
                     swiglu=swiglu, qk_norm=qk_norm, rms_norm="blocks.0.norm1.weight" in sd, rope=rope_on)


def _looks_like(sd):
    """A few words for a state dict that is not a LightningDiT's."""
    signs = {"a LoRA": ("lora_",), "an SD3 transformer": ("joint_blocks.", "transformer_blocks."),
             "an autoencoder": ("encoder.", "decoder."), "one file of our own checkpoint": ("P.weight",)}
    for what, parts in signs.items():
        if any(part in k for k in sd for part in parts):
            return what
    return f"something else (it holds {', '.join(map(str, list(sd)[:4]))} ...)"
