"""Transformers that denoise latents, and the surgery that gives a pretrained one more channels.

LightningDiT (Yao et al., 2025; class-conditional, pretrained on VA-VAE latents) and MMDiT (Esser et al., 2024, in the
form of Stable Diffusion 3.5 Medium; text-conditional) are written out in full. The method is `widen` and
`expand_channels`: next to the patch embedder P and the output head O stand P_new and O_new for the D detail channels,
all zero, so that the widened model starts as an exact copy of the pretrained one (Sec. 3.2):

    tokens = P(z) + P_new(z_d)          v_all = [O(x), O_new(x)]

    model = load_dit("lightningdit-xl-imagenet256-800ep.pt", weights="model")
    model.expand_channels(96)           # v, v_d = model(z_all, t, y).split([32, 96], dim=1)

Dimension key:  B batch   h w latent grid   p patch side   L tokens = h*w/p^2   E width   A heads   K width per head
                T text tokens   C base channels   D detail channels   z_all = [z, z_d] is (B, C+D, h, w), normalised, base first
Paper symbols:  P, O patch embedder and output head of the base;  P_new, O_new are its P', O' for the details
Time:           t = 0 is noise, t = 1 is data, x_t = t*data + (1-t)*noise, and the model predicts v = data - noise.
kernels/ says in plain PyTorch, and computes faster if asked to (KERNELS=triton), what stands between the matrix products.
"""
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from common import read_config, read_state_dict
from kernels import attention as short, use_triton
from kernels.norm_modulate import add_norm_modulate, norm_modulate
from kernels.patch_embed import patch_embed
from kernels.qknorm_rope import qknorm_rope
from kernels.swiglu import swiglu

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
    for weight in (*P_new.parameters(), *O_new.parameters()):
        nn.init.zeros_(weight)
    return P_new, O_new

class DiT(nn.Module):
    """What every transformer here has: P, O, the time's embedder, the last norm; once widened, P_new, O_new (None before)."""
    checkpointing = False                          # True: recompute each block in the backward pass, to save memory

    def __init__(self, cfg, rms, blocks, **embedders):
        super().__init__()                         # the optimizer's saved state goes by this order of the layers
        self.cfg = cfg
        self.P = nn.Conv2d(cfg.C, cfg.E, cfg.p, stride=cfg.p)
        self.t_embedder = nn.Sequential(nn.Linear(256, cfg.E), nn.SiLU(), nn.Linear(cfg.E, cfg.E))
        for name, embedder in embedders.items():
            self.add_module(name, embedder)
        self.blocks = nn.ModuleList(blocks)
        self.norm_final, self.adaLN_final = Norm(cfg.E, rms), nn.Linear(cfg.E, 2 * cfg.E)
        self.O = nn.Linear(cfg.E, cfg.p * cfg.p * cfg.C)
        self.P_new, self.O_new = widen(self.P, self.O, cfg.D) if cfg.D else (None, None)

    def run(self, block, *args):
        return checkpoint(block, *args, use_reentrant=False) if self.checkpointing and self.training else block(*args)

    def tokens(self, z_all, pos):
        """P(z) + P_new(z_d) + pos, in the dtype of P(z): (B, C+D, h, w), (1, L, E) -> (B, L, E), row-major."""
        if self.cfg.D:
            x = patch_embed(*z_all.split([self.cfg.C, self.cfg.D], 1), self.P.weight, self.P_new.weight, self.P.bias, pos)
        else:
            x = self.P(z_all).flatten(2).transpose(1, 2)
            x = (x + pos).to(x.dtype)
        return x if x.is_cpu else x.contiguous()   # else all blocks would copy it; on a CPU that changes the last bits

    def condition(self, t, y):
        """(B, E): what every adaLN starts from, its SiLU included."""
        return F.silu(self.t_embedder(timestep_embedding(t)) + self.y_embedder(y))

    def modulations(self, t, y):
        """All that adaLN computes: one entry per block and the last norm's; `forward` takes it as `mods`. A third of all
        parameters are in these layers: B may count the images of many steps, for which they are then read once."""
        c = self.condition(t, y)
        return [*(block.modulations(c) for block in self.blocks), self.adaLN_final(c)]

    def velocity(self, x, mods, h, w):
        """[O(x), O_new(x)] of the final norm of x, each unpatchified by itself: -> (B, C+D, h, w) float32."""
        shift, scale = mods.chunk(2, dim=-1)
        x = norm_modulate(x, shift, scale, self.norm_final.weight)                          # (B, L, E), read by both heads
        heads = [self.O, self.O_new] if self.cfg.D else [self.O]
        return torch.cat([unpatchify(O(x), self.cfg.p, h, w) for O in heads], dim=1).float()

    def expand_channels(self, D):
        """Add D detail channels without changing what the model computes: for any z_d, v is as before and v_d is 0."""
        if self.cfg.D:
            raise ValueError(f"already expanded by D={self.cfg.D} channels; load the base model to start from it again")
        if D < 1:
            raise ValueError(f"D={D} detail channels asked for, wanted at least 1")
        self.P_new, self.O_new = widen(self.P, self.O, D)
        self.cfg = replace(self.cfg, D=D)

@torch.no_grad()
def warm_start_difference(base, model, z, cond):
    """Largest |change| of the base velocity and largest |detail velocity| of a widened model, for random z_d and t.

    z: (B, C, h, w); cond: see flow_loss. Both are 0.0 at step 0: details neither disturb the base nor move yet.  Sec. 3.2.
    """
    B, C, h, w = z.shape
    t = torch.rand(B, device=z.device)
    z_d = torch.randn(B, model.cfg.D, h, w, device=z.device)
    v = model(torch.cat([z, z_d], dim=1), t, *cond)
    return (v[:, :C] - base(z, t, *cond)).abs().max().item(), v[:, C:].abs().max().item()

# ---------------------------------------------------------------- small pieces, one equation each

def timestep_embedding(t, width=256):
    """[cos(t f_k), sin(t f_k)] with f_k = 10000^(-k / (width/2)).  (B,) -> (B, width) float32.

    LightningDiT gives it t in [0, 1] as it is; most DiTs, SD3's among them, multiply by 1000 first.
    """
    f = torch.exp(-2 * math.log(10000) / width * torch.arange(width // 2, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], dim=-1)

SHORT = {72: 256}           # K: the most tokens that the kernel takes, where kernels are on. By its design; not measured yet

def attention(qkv, *norm_rope):
    """softmax(q k^T / sqrt(K)) v over all tokens, q and k normalised and rotated as in kernels/qknorm_rope.py.

    qkv: (B, L, 3, A, K); norm_rope: the norms' weights, or None, and the tables of RoPE, if any.   -> (B, L, A, K)
    """
    if use_triton(qkv) and qkv.shape[1] <= SHORT.get(qkv.shape[4], 0):
        return short.attention(qkv, *norm_rope)
    return F.scaled_dot_product_attention(*qknorm_rope(qkv, *norm_rope)).transpose(1, 2)

def unpatchify(x, p, h, w):
    """Tokens back to a latent.  (B, L, p*p*C), channel fastest -> (B, C, h, w)."""
    x = x.view(len(x), h // p, w // p, p, p, -1)   # row, column, row in patch, column in patch, channel
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, h, w)

def grid_positions(grid):
    """Row and column of each token, row-major.  Two (L,) float64 tensors: only the finished tables are rounded."""
    i = torch.arange(grid, dtype=torch.float64, device="cpu")
    return i.repeat_interleave(grid), i.repeat(grid)

def sincos_table(grid, E, spacing=1.0):
    """[sin(col w), cos(col w), sin(row w), cos(row w)], w_j = 10000^(-j / (E/4)): the fixed embedding, (1, L, E)."""
    row, col = (spacing * n for n in grid_positions(grid))
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

def Norm(E, rms=True):
    """Holds the learned scale of an RMSNorm; or none, `weight` None, of a LayerNorm. kernels/ has the formulas, for both."""
    return nn.RMSNorm(E) if rms else nn.LayerNorm(E, elementwise_affine=False)

# ---------------------------------------------------------------- LightningDiT

SIZES = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "1p0B": (24, 1536, 24), "1p6B": (28, 1792, 28)}

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
    def __init__(self, E, A, qk_norm, proj=True):
        super().__init__()
        self.A = A
        self.qkv = nn.Linear(E, 3 * E)
        self.q_norm, self.k_norm = Norm(E // A, qk_norm), Norm(E // A, qk_norm)
        self.proj = nn.Linear(E, E) if proj else None

    def heads(self, x, attend, *tables):
        """attend(qkv (B, L, 3, A, K), the norms' weights, tables), qkv computed from x (B, L, E)."""
        return attend(self.qkv(x).unflatten(-1, (3, self.A, -1)), self.q_norm.weight, self.k_norm.weight, *tables)

    def forward(self, x, *tables):
        """tables: cos and sin of RoPE, or nothing."""
        return self.proj(self.heads(x, attention, *tables).flatten(2))                    # (B, L, E)

class SwiGLU(nn.Module):
    """w3(SiLU(a) * b), where w12 computes a and b side by side (Shazeer, 2020)."""

    def __init__(self, E, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(E, 2 * hidden), nn.Linear(hidden, E)

    def forward(self, x):
        return self.w3(swiglu(x, self.w12.weight, self.w12.bias))

class MLP(nn.Module):
    def __init__(self, E, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(E, hidden), nn.Linear(hidden, E)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

class Block(nn.Module):
    """x += gate1 Attn(mod1(norm1(x)));  x += gate2 MLP(mod2(norm2(x))).  adaLN-Zero (Peebles & Xie, 2023)."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn = Norm(cfg.E, cfg.rms_norm), Attention(cfg.E, cfg.A, cfg.qk_norm)
        self.norm2, self.mlp = Norm(cfg.E, cfg.rms_norm), (SwiGLU if cfg.swiglu else MLP)(cfg.E, cfg.hidden)
        self.adaLN = nn.Linear(cfg.E, 6 * cfg.E)

    def modulations(self, c):
        return self.adaLN(c)

    def forward(self, x, c, mods, *tables):
        mods = self.modulations(c) if mods is None else mods
        shift1, scale1, gate1, shift2, scale2, gate2 = mods.chunk(6, dim=-1)              # each (B, E)
        h = norm_modulate(x, shift1, scale1, self.norm1.weight)
        x, h = add_norm_modulate(x, self.attn(h, *tables), gate1, shift2, scale2, self.norm2.weight)
        return x + gate2[:, None] * self.mlp(h)                                           # (B, L, E)

class LightningDiT(DiT):
    """Velocity of a latent, given the time and a class.

    z_all:   (B, C+D, h, w) normalised, base channels first; h = w = cfg.grid * cfg.p
    t:       (B,) in [0, 1], 0 noise, 1 data
    y:       (B,) int64 in 0 .. num_classes; num_classes is the null class. Dropping labels is the caller's business
    mods:    modulations(t, y), if they are known
    returns: v (B, C+D, h, w) float32
    """

    def __init__(self, cfg):
        y_embedder = nn.Embedding(cfg.num_classes + 1, cfg.E)
        super().__init__(cfg, cfg.rms_norm, [Block(cfg) for _ in range(cfg.depth)], y_embedder=y_embedder)
        self.init_weights()
        self.build_tables(self.P.weight.device)

    def forward(self, z_all, t, y, mods=None):
        cfg = self.cfg
        if tuple(z_all.shape[1:]) != (wanted := (cfg.C + cfg.D, cfg.grid * cfg.p, cfg.grid * cfg.p)):
            raise ValueError(f"z_all is {tuple(z_all.shape)}, wanted (B, C+D, h, w) with (C+D, h, w) = {wanted}")
        x = self.tokens(z_all, self.pos_embed)                                            # (B, L, E)
        c = self.condition(t, y) if mods is None else None
        for i, block in enumerate(self.blocks):
            x = self.run(block, x, c, mods and mods[i], self.rope_cos, self.rope_sin)
        return self.velocity(x, mods[-1] if mods else self.adaLN_final(c), *z_all.shape[2:])

    def init_weights(self):
        # Linear layers, and the patch embedder as the Linear (C p p) -> E that it is: Xavier-uniform, zero bias.
        for m in self.modules():
            if isinstance(m, nn.Linear) or m is self.P:
                nn.init.xavier_uniform_(m.weight.view(len(m.weight), -1))
                nn.init.zeros_(m.bias)
        # Conditioning: small, so that no time or class starts out special.
        for weight in (self.y_embedder.weight, self.t_embedder[0].weight, self.t_embedder[2].weight):
            nn.init.normal_(weight, std=0.02)
        # adaLN and heads: zero, so that every block starts as the identity and the velocity as 0. So are P_new, O_new.
        zero = [*(block.adaLN for block in self.blocks), self.adaLN_final, self.O, self.P_new, self.O_new]
        for weight in (w for layer in zero if layer is not None for w in layer.parameters()):
            nn.init.zeros_(weight)

    def build_tables(self, device):
        """Position tables from their formulas: never saved, and the only tensors to make after loading from "meta"."""
        cfg = self.cfg
        cos, sin = rope_table(cfg.grid, cfg.E // cfg.A) if cfg.rope else (None, None)
        for name, table in {"pos_embed": sincos_table(cfg.grid, cfg.E), "rope_cos": cos, "rope_sin": sin}.items():
            self.register_buffer(name, None if table is None else table.to(device), persistent=False)

# ---------------------------------------------------------------- MMDiT

@dataclass
class MMDiTConfig:
    """Everything that fixes an MMDiT's shapes; saved with its weights. Defaults: Stable Diffusion 3.5 Medium."""
    C: int = 16                 # base channels
    D: int = 0                  # detail channels, 0 before expand_channels
    p: int = 2                  # patch side, latent pixels
    E: int = 1536               # width
    depth: int = 24             # blocks
    A: int = 24                 # attention heads
    dual: int = 13              # the first blocks, that have a second attention among image tokens
    context: int = 4096         # width of the text tokens: CLIP-L | CLIP-G | zeros, and T5
    pooled: int = 2048          # width of the pooled text vector: CLIP-L | CLIP-G
    pos_size: int = 384         # side of the position table, in tokens; an image takes a crop of its middle
    lora: int = 0               # rank of the adapters, 0: none
    alpha: float = 256.0        # their scale is alpha / rank

class Stream(nn.Module):
    """What one joint block holds for one kind of token, image or text: adaLN, attention projections, MLP."""

    def __init__(self, cfg, dual=False, last=False):
        super().__init__()
        self.mods = 2 if last else 9 if dual else 6
        self.adaLN = nn.Linear(cfg.E, self.mods * cfg.E)
        self.attn = Attention(cfg.E, cfg.A, qk_norm=True, proj=not last)
        self.attn2 = Attention(cfg.E, cfg.A, qk_norm=True) if dual else None
        self.mlp = None if last else MLP(cfg.E, 4 * cfg.E)

class JointBlock(nn.Module):
    """Image and text tokens attend to all of both, each kind with its own weights; dual blocks add image self-attention."""

    def __init__(self, cfg, dual, last):
        super().__init__()
        self.x, self.text = Stream(cfg, dual=dual), Stream(cfg, last=last)

    def modulations(self, c):
        return self.x.adaLN(c), self.text.adaLN(c)

    def forward(self, x, text, c, mods):
        """x: (B, L, E), text: (B, T, E), c: (B, E), or mods: what `modulations` makes of it -> new x and text."""
        streams, tokens = (self.x, self.text), (x, text)
        mods = [m.chunk(s.mods, dim=-1) for s, m in zip(streams, self.modulations(c) if mods is None else mods)]
        heads = [s.attn.heads(norm_modulate(n, m[0], m[1]), qknorm_rope) for s, n, m in zip(streams, tokens, mods)]
        q, k, v = (torch.cat(both, dim=2) for both in zip(*heads))                          # (B, A, L+T, K)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).split([x.shape[1], text.shape[1]], dim=1)
        return [self.update(*args) for args in zip(streams, tokens, attended, mods)]

    @staticmethod
    def update(s, x, attended, mod):
        """shift, scale, gate of attention, MLP and second attention: in the order of the checkpoint, not of their use."""
        if s.mlp is None:                          # the last block's text only gave its q, k, v: nothing reads it after
            return x
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = mod[:6]
        y = s.attn.proj(attended)
        if s.attn2 is not None:
            shift2, scale2, gate2 = mod[6:]
            y2 = s.attn2(norm_modulate(x, shift2, scale2))                                  # of the x before both updates
            x, y, gate = x + gate[:, None] * y, y2, gate2
        x, h = add_norm_modulate(x, y, gate, shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * s.mlp(h)

class MMDiT(DiT):
    """Velocity of a latent, given the time and a text.

    z_all:   (B, C+D, h, w) normalised, base channels first; h and w multiples of p, at most p * pos_size, not always equal
    t:       (B,) in [0, 1], 0 noise, 1 data
    context: (B, T, cfg.context) text tokens;  pooled: (B, cfg.pooled);  skip: blocks to leave out (skip-layer guidance)
    mods:    modulations(t, pooled), if they are known
    returns: v (B, C+D, h, w) float32
    """

    def __init__(self, cfg):
        y_embedder = nn.Sequential(nn.Linear(cfg.pooled, cfg.E), nn.SiLU(), nn.Linear(cfg.E, cfg.E))
        super().__init__(cfg, False, [JointBlock(cfg, i < cfg.dual, i == cfg.depth - 1) for i in range(cfg.depth)],
                         y_embedder=y_embedder, context_embedder=nn.Linear(cfg.context, cfg.E))
        # Saved, unlike LightningDiT's: nobody has shown that the released table is what the formula gives.
        table = torch.empty(1, cfg.pos_size**2, cfg.E)
        self.register_buffer("pos_embed", table if table.is_meta else sincos_table(cfg.pos_size, cfg.E, 64 / cfg.pos_size))
        if cfg.lora:
            add_lora(self, cfg.lora, cfg.alpha)

    def condition(self, t, pooled):
        # SD3's own time runs the other way, sigma = 1 - t, in thousandths, and it predicts noise - data: here, and in
        # the sign of `forward`'s result, and nowhere else, are the two conventions exchanged.
        return super().condition(1000 * (1 - t), pooled)

    def forward(self, z_all, t, context, pooled, skip=(), mods=None):
        cfg, (h, w) = self.cfg, z_all.shape[2:]
        if z_all.shape[1] != cfg.C + cfg.D or h % cfg.p or w % cfg.p or max(h, w) > cfg.p * cfg.pos_size:
            raise ValueError(f"z_all is {tuple(z_all.shape)}, wanted (B, {cfg.C + cfg.D}, h, w) with h and w multiples of "
                             f"{cfg.p}, up to {cfg.p * cfg.pos_size}")
        x, text = self.tokens(z_all, self.positions(h // cfg.p, w // cfg.p)), self.context_embedder(context)    # (B, T, E)
        c = self.condition(t, pooled) if mods is None else None
        for i, block in enumerate(self.blocks):
            if i not in skip:
                x, text = self.run(block, x, text, c, mods and mods[i])
        return -self.velocity(x, mods[-1] if mods else self.adaLN_final(c), h, w)

    def positions(self, rows, columns):
        """The middle rows x columns of the position table, as tokens: (1, L, E)."""
        n = self.cfg.pos_size
        top, left = (n - rows) // 2, (n - columns) // 2
        return self.pos_embed.view(1, n, n, -1)[:, top:top + rows, left:left + columns].flatten(1, 2)

# ---------------------------------------------------------------- LoRA

LORA_TARGETS = ("x.attn.qkv", "x.attn.proj", "x.attn2.qkv", "x.attn2.proj", "x.mlp.fc2", "x.adaLN")     # in every block

class LoRA(nn.Module):
    """y = W x + b + alpha/r B A x, W and b frozen (Hu et al., 2022); q, k, v, stacked in one W, each have their A and B."""

    def __init__(self, linear, r, alpha, parts):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / r
        like = dict(device=linear.weight.device, dtype=torch.float32)
        self.A = nn.Parameter(torch.randn(parts, r, linear.in_features, **like) / r)                # peft's "gaussian"
        self.B = nn.Parameter(torch.zeros(parts, linear.out_features // parts, r, **like))

    def forward(self, x):
        low = F.linear(x, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])                     # (..., parts, r)
        return self.linear(x) + self.scale * torch.einsum("...pr,por->...po", low, self.B).flatten(-2)

def add_lora(model, r=256, alpha=256.0):
    """Put adapters of rank r into an MMDiT, in place, and freeze all but them, P, P_new, O and O_new.  Sec. 4, method of SD3.5.

    B starts at zero, so nothing changes until training does. Text-side layers and the first MLP layers stay frozen.
    """
    model.requires_grad_(False)
    for layer in (model.P, model.O) + ((model.P_new, model.O_new) if model.cfg.D else ()):
        layer.requires_grad_(True)
    for block in model.blocks:
        for name, linear in [(n, m) for n, m in block.named_modules() if n in LORA_TARGETS]:
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, LoRA(linear, r, alpha, 3 if leaf == "qkv" else 1))
    model.cfg = replace(model.cfg, lora=r, alpha=float(alpha))

@torch.no_grad()
def merge_lora(model):
    """W <- W + alpha/r B A, in place, exact up to float32 rounding; the adapters are gone after it."""
    for name, m in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRA)]:
        m.linear.weight += m.scale * torch.bmm(m.B, m.A).flatten(0, 1).to(m.linear.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).add_module(leaf, m.linear)
    model.cfg = replace(model.cfg, lora=0)
    return model

@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, for every parameter that is trained."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - decay)

# ---------------------------------------------------------------- sharding: for models that do not fit on one GPU

def shard(model, device):
    """Split a model's parameters, and so its gradients and its optimizer's state, over torchrun's ranks (FSDP2), by blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    return model

def whole(state, keep=True):
    """A nested state with its sharded tensors whole, on the CPU of the ranks that `keep` it; all ranks must call this."""
    def gather(x):
        if not hasattr(x, "full_tensor"):
            return x
        x = x.full_tensor()
        return x.cpu() if keep else None
    return tree_map(gather, state)

def spread(opt_state, parameters):
    """An optimizer's state dict as `whole` made it, each tensor sharded like its parameter, if that is."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    for i, p in enumerate(parameters):
        if isinstance(p, DTensor):
            opt_state["state"][i] = {k: distribute_tensor(v.to(p.device), p.device_mesh, p.placements) if v.dim() else v
                                     for k, v in opt_state["state"][i].items()}
    return opt_state

# ---------------------------------------------------------------- weights: loading, upstream names in and out

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
