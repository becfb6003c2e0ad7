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
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import attention as short
from kernels import use_triton
from kernels.norm_modulate import norm_modulate
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

    def velocity(self, x, y, gate, mods, h, w):
        """[O(x), O_new(x)] of the final norm of x + gate * y, each unpatchified by itself: -> (B, C+D, h, w) float32."""
        shift, scale = mods.chunk(2, dim=-1)
        _, x = norm_modulate(x, shift, scale, self.norm_final.weight, y, gate)              # (B, L, E), read by both heads
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
    """x += gate1 Attn(mod1(norm1(x)));  x += gate2 MLP(mod2(norm2(x))).  adaLN-Zero (Peebles & Xie, 2023).
    Each addition is left to the norm after it, the last to the next block: blocks hand on x, y, gate for x + gate * y."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn = Norm(cfg.E, cfg.rms_norm), Attention(cfg.E, cfg.A, cfg.qk_norm)
        self.norm2, self.mlp = Norm(cfg.E, cfg.rms_norm), (SwiGLU if cfg.swiglu else MLP)(cfg.E, cfg.hidden)
        self.adaLN = nn.Linear(cfg.E, 6 * cfg.E)

    def modulations(self, c):
        return self.adaLN(c)

    def forward(self, x, y, gate, c, mods, *tables):
        mods = self.modulations(c) if mods is None else mods
        shift1, scale1, gate1, shift2, scale2, gate2 = mods.chunk(6, dim=-1)              # each (B, E)
        x, h = norm_modulate(x, shift1, scale1, self.norm1.weight, y, gate)               # x + gate * y, its norm modulated
        x, h = norm_modulate(x, shift2, scale2, self.norm2.weight, self.attn(h, *tables), gate1)
        return x, self.mlp(h), gate2                                                      # (B, L, E), (B, L, E), (B, E)

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
        x, branch, gate = self.tokens(z_all, self.pos_embed), None, None                  # (B, L, E)
        c = self.condition(t, y) if mods is None else None
        for i, block in enumerate(self.blocks):
            x, branch, gate = self.run(block, x, branch, gate, c, mods and mods[i], self.rope_cos, self.rope_sin)
        return self.velocity(x, branch, gate, mods[-1] if mods else self.adaLN_final(c), *z_all.shape[2:])

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
        heads = [s.attn.heads(norm_modulate(n, m[0], m[1])[1], qknorm_rope) for s, n, m in zip(streams, tokens, mods)]
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
            y2 = s.attn2(norm_modulate(x, shift2, scale2)[1])                               # of the x before both updates
            x, y, gate = x + gate[:, None] * y, y2, gate2
        x, h = norm_modulate(x, shift_mlp, scale_mlp, None, y, gate)
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
        return -self.velocity(x, None, None, mods[-1] if mods else self.adaLN_final(c), h, w)

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

# ---------------------------------------------------------------- weights: loading, upstream names in and out

