"""Transformers that denoise latents, and the surgery that gives a pretrained one more channels.

The method is `widen` and `expand_channels`: the patch embedder P and the output head O get companions P_new
and O_new for the D detail channels, initialised to zero, so that the widened model starts as an exact copy
of the pretrained one (Sec. 3.2):

    tokens = P(z) + P_new(z_d) + pos          [v, v_d] = [O(x), O_new(x)]

    model = load_dit("lightningdit-xl-imagenet256-800ep.pt", weights="model")        # support/weights.py
    model.expand_channels(96)           # v, v_d = model(z_all, t, y).split([32, 96], dim=1)

Then three transformers in full: LightningDiT (Yao et al., 2025; class-conditional, pretrained on VA-VAE
latents), MMDiT (Esser et al., 2024, in the form of Stable Diffusion 3.5 Medium; text-conditional), and USiT
(DC-AE 1.5's; class-conditional); and LoRA adapters for the text-conditional ones.

Dimension key:  B batch   h w latent grid   p patch side   L tokens = h*w/p^2   T text tokens
                E width   A heads   K width per head   C base channels   D detail channels
                z_all = [z, z_d] is (B, C+D, h, w), normalised, base channels first
Time:           t = 0 is noise, t = 1 is data, x_t = t*data + (1-t)*noise
                The model predicts the velocity v = data - noise.

Norms, RoPE, SwiGLU and attention are functions in kernels/: a CPU runs the plain PyTorch there, a GPU the
fastest variant found correct for the model at hand (with KERNELS=ref, plain PyTorch as well).
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.attention import sdpa
from kernels.linear_gelu import linear_gelu
from kernels.norm_modulate import add_norm_modulate, norm_modulate, norm_modulate_twice
from kernels.patch_embed import patch_embed
from kernels.qknorm_rope import qknorm_rope
from kernels.swiglu import swiglu
from support.usit import USiTConfig

# ---------------------------------------------------------------- the method: widening


def widen(in_proj, out_proj, D, p=None):
    """Zero-initialised companions of a transformer's first and last layer, for D channels.  Sec. 3.2.

    in_proj:  the patch embedder, a Conv2d C -> E of stride p, or a Linear p*p*C -> E;  add P_new(z_d) to it
    out_proj: the head, a Linear E -> p*p*C;  unpatchify O_new(x) separately, append it along the channels
    returns:  P_new (no bias: in_proj may have one) and O_new, on the device and in the dtype of in_proj

    Zeros do not stall the training: P_new gets a gradient from the base loss, O_new from the detail loss.
    """
    like = dict(device=in_proj.weight.device, dtype=in_proj.weight.dtype)
    if isinstance(in_proj, nn.Linear):                                     # its shape does not reveal p
        P_new = nn.Linear(p * p * D, in_proj.out_features, bias=False, **like)
    else:
        p = in_proj.kernel_size[0]
        P_new = nn.Conv2d(D, in_proj.out_channels, p, stride=p, bias=False, **like)
    O_new = nn.Linear(out_proj.in_features, p * p * D, bias=out_proj.bias is not None, **like)
    for parameter in (*P_new.parameters(), *O_new.parameters()):
        nn.init.zeros_(parameter)
    return P_new, O_new


class Transformer(nn.Module):
    """What every transformer here does with its P and O and, once widened, with P_new and O_new.

    Your own model need not be a Transformer: the scripts require only `cfg`, P, O, expand_channels and
    `forward(z_all, t, *cond)` (see MODELS at the end). If it has a `modulations` method, the sampler calls
    it for many steps at once.
    """
    checkpointing = False      # True: recompute each block in the backward pass, to save memory

    def expand_channels(self, D):
        """Add D detail channels that change nothing yet: for any z_d, v is as before, and v_d is 0.

        raises: ValueError if the model already has details, or D < 1
        """
        if self.cfg.D:
            raise ValueError(f"already expanded by D={self.cfg.D} channels; start from the base model again")
        if D < 1:
            raise ValueError(f"D={D} detail channels: wanted at least 1")
        self.P_new, self.O_new = widen(self.P, self.O, D, self.cfg.p)
        self.cfg = replace(self.cfg, D=D)

    def square(self, z_all):
        """h, w of a latent; raises: ValueError unless it is (B, C+D, h, w) with h = w = cfg.grid * cfg.p."""
        side = self.cfg.grid * self.cfg.p
        wanted = (self.cfg.C + self.cfg.D, side, side)
        if z_all.shape[1:] != wanted:
            raise ValueError(f"z_all is {tuple(z_all.shape)}, wanted (B, C+D, h, w) with (C+D, h, w) = "
                             f"{wanted}")
        return side, side

    def tokens(self, z_all, pos):
        """P(z) + P_new(z_d) + pos, in P(z)'s dtype, row-major: (B, C+D, h, w), (1, L, E) -> (B, L, E)."""
        if self.cfg.D:
            z, z_d = z_all.split([self.cfg.C, self.cfg.D], dim=1)
            x = patch_embed(z, z_d, self.P.weight, self.P_new.weight, self.P.bias, pos)
        else:
            x = self.P(z_all).flatten(2).transpose(1, 2)                       # (B, L, E)
            x = (x + pos).to(x.dtype)
        return x.contiguous()                                                  # else each block copies it

    def run(self, block, *args):
        """Run one block; with `checkpointing`, it is recomputed in the backward pass."""
        if self.checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def heads(self, x, h, w):
        """[O(x), O_new(x)], each unpatchified separately: (B, L, E) -> (B, C+D, h, w) float32."""
        v = unpatchify(self.O(x), self.cfg.p, h, w)                            # (B, C, h, w)
        if self.cfg.D:
            v_d = unpatchify(self.O_new(x), self.cfg.p, h, w)                  # (B, D, h, w)
            v = torch.cat([v, v_d], dim=1)
        return v.float()


class DiT(Transformer):
    """A Transformer with adaLN: the base of LightningDiT and MMDiT, which add their blocks and embedders."""

    def __init__(self, cfg, rms, blocks, **embedders):
        super().__init__()     # keep the order below: a saved optimizer identifies parameters by number
        self.cfg = cfg
        self.P = nn.Conv2d(cfg.C, cfg.E, cfg.p, stride=cfg.p)
        self.t_embedder = nn.Sequential(nn.Linear(256, cfg.E), nn.SiLU(), nn.Linear(cfg.E, cfg.E))
        for name, embedder in embedders.items():
            self.add_module(name, embedder)
        self.blocks = nn.ModuleList(blocks)
        self.norm_final = Norm(cfg.E, rms)
        self.adaLN_final = nn.Linear(cfg.E, 2 * cfg.E)
        self.O = nn.Linear(cfg.E, cfg.p * cfg.p * cfg.C)
        self.P_new, self.O_new = widen(self.P, self.O, cfg.D) if cfg.D else (None, None)

    def condition(self, t, y):
        """(B, E): the input of every adaLN layer, its SiLU already applied."""
        return F.silu(self.t_embedder(timestep_embedding(t)) + self.y_embedder(y))

    def modulations(self, t, y):
        """All that adaLN computes: one entry per block, then the last norm's.

        They depend only on time and condition, not on the latent, and their layers hold a third of all
        parameters. So they are computed first; and the sampler, which knows its times in advance, gets those
        of many steps in one call (B then counts the images of all these steps) and passes them to `forward`.
        This is the only part of the model that the sampler calls on its own.
        """
        c = self.condition(t, y)
        return [*(block.modulations(c) for block in self.blocks), self.adaLN_final(c)]

    def velocity(self, x, mods, h, w):
        """Last norm, then the heads.  x: (B, L, E); mods: (B, 2E), shift and scale of the norm."""
        shift, scale = mods.chunk(2, dim=-1)
        return self.heads(norm_modulate(x, shift, scale, self.norm_final.weight), h, w)


@torch.no_grad()
def warm_start_difference(base, model, z, cond):
    """(max |v - v_base|, max |v_d|) of a widened model and its base, for random z_d and t.  Sec. 3.2.

    z: (B, C, h, w); cond: what the models take after z_all and t, a tuple of (B, ...)
    Both are 0.0 at step 0: the details do not affect the base yet, and their own velocity is 0.
    """
    B, C, h, w = z.shape
    t = torch.rand(B, device=z.device)
    z_d = torch.randn(B, model.cfg.D, h, w, device=z.device)
    v, v_d = model(torch.cat([z, z_d], dim=1), t, *cond).split([C, model.cfg.D], dim=1)
    change = v - base(z, t, *cond)
    return change.abs().max().item(), v_d.abs().max().item()


# ---------------------------------------------------------------- LightningDiT


@dataclass
class LightningDiTConfig:
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
            raise ValueError(f"E={self.E} with A={self.A} heads: E must be a multiple of 4*A, "
                             "for the position tables")
        if self.qk_norm and not self.rms_norm:
            raise ValueError("qk_norm without rms_norm is not implemented: set rms_norm=True")
        if not self.hidden:
            self.hidden = int(2 / 3 * int(4 * self.E)) if self.swiglu else 4 * self.E


class Block(nn.Module):
    """Attention, then MLP, each between adaLN's modulation and gate: adaLN-Zero (Peebles & Xie, 2023).

        x = x + gate1 * attn(norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * mlp(norm2(x) * (1 + scale2) + shift2)
    """

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = Norm(cfg.E, cfg.rms_norm)
        self.attn = Attention(cfg.E, cfg.A, cfg.qk_norm)
        self.norm2 = Norm(cfg.E, cfg.rms_norm)
        self.mlp = SwiGLU(cfg.E, cfg.hidden) if cfg.swiglu else MLP(cfg.E, cfg.hidden)
        self.adaLN = nn.Linear(cfg.E, 6 * cfg.E)

    def modulations(self, c):
        return self.adaLN(c)

    def forward(self, x, mods, cos=None, sin=None):
        """(B, L, E) -> (B, L, E); mods: (B, 6E), see `modulations`; cos, sin: RoPE's tables, if any."""
        shift1, scale1, gate1, shift2, scale2, gate2 = mods.chunk(6, dim=-1)                  # each (B, E)
        y = self.attn(norm_modulate(x, shift1, scale1, self.norm1.weight), cos, sin)
        # One kernel computes the sum x + gate1 * y and its norm, and returns both.
        x, h = add_norm_modulate(x, y, gate1, shift2, scale2, self.norm2.weight)
        return x + gate2[:, None] * self.mlp(h)


class LightningDiT(DiT):
    """Velocity of a latent, given the time and a class.

    z_all:   (B, C+D, h, w) normalised, base channels first; h = w = cfg.grid * cfg.p
    t:       (B,) in [0, 1], 0 noise, 1 data
    y:       (B,) int64 in 0 .. num_classes; num_classes is the null class. The caller drops labels
    mods:    modulations(t, y), if already computed
    returns: v (B, C+D, h, w) float32
    raises:  ValueError for a latent of another shape
    """

    def __init__(self, cfg):
        blocks = [Block(cfg) for _ in range(cfg.depth)]
        super().__init__(cfg, cfg.rms_norm, blocks, y_embedder=nn.Embedding(cfg.num_classes + 1, cfg.E))
        self.init_weights()
        self.build_tables(self.P.weight.device)

    def forward(self, z_all, t, y, mods=None):
        h, w = self.square(z_all)
        if mods is None:
            mods = self.modulations(t, y)
        *block_mods, final_mods = mods

        x = self.tokens(z_all, self.pos_embed)                                                # (B, L, E)
        for block, m in zip(self.blocks, block_mods):
            x = self.run(block, x, m, self.rope_cos, self.rope_sin)
        return self.velocity(x, final_mods, h, w)

    def init_weights(self):
        # Linear layers, and the patch embedder, viewed as a Linear (C p p) -> E:
        # Xavier-uniform, zero bias.
        for m in self.modules():
            if isinstance(m, nn.Linear) or m is self.P:
                nn.init.xavier_uniform_(m.weight.view(len(m.weight), -1))
                nn.init.zeros_(m.bias)
        # Conditioning: small, so that no time or class starts out special.
        for weight in (self.y_embedder.weight, self.t_embedder[0].weight, self.t_embedder[2].weight):
            nn.init.normal_(weight, std=0.02)
        # adaLN and heads: zero, so that every block starts as the identity and the velocity as 0; P_new, too.
        zero = [block.adaLN for block in self.blocks] + [self.adaLN_final, self.O]
        if self.cfg.D:
            zero += [self.P_new, self.O_new]
        for layer in zero:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def build_tables(self, device):
        """Position tables from their formulas.

        They are never saved: for a model created on "meta", they are computed while all else is loaded.
        """
        cfg = self.cfg
        cos, sin = rope_table(cfg.grid, cfg.E // cfg.A) if cfg.rope else (None, None)
        tables = {"pos_embed": sincos_table(cfg.grid, cfg.E), "rope_cos": cos, "rope_sin": sin}
        for name, table in tables.items():
            self.register_buffer(name, None if table is None else table.to(device), persistent=False)


# ---------------------------------------------------------------- MMDiT


@dataclass
class MMDiTConfig:
    """Everything that fixes an MMDiT's shapes; saved with its weights. Defaults: SD3.5 Medium."""
    C: int = 16                 # base channels
    D: int = 0                  # detail channels, 0 before expand_channels
    p: int = 2                  # patch side, latent pixels
    E: int = 1536               # width
    depth: int = 24             # blocks
    A: int = 24                 # attention heads
    dual: int = 13              # number of first blocks with a second attention, among image tokens
    context: int = 4096         # width of the text tokens: CLIP-L | CLIP-G | zeros, and T5
    pooled: int = 2048          # width of the pooled text vector: CLIP-L | CLIP-G
    pos_size: int = 384         # side of the position table, in tokens; an image uses a central crop of it
    lora: int = 0               # rank of the adapters, 0: none
    alpha: float = 256.0        # the adapters are scaled by alpha / rank

    def __post_init__(self):
        if self.E % self.A or self.E % 4:
            raise ValueError(f"E={self.E} with A={self.A} heads: E must be a multiple of A, and of 4")


class Stream(nn.Module):
    """A joint block's layers for one kind of token, image or text: adaLN, attention projections, MLP.

    adaLN gives shift, scale and gate for the attention, for the MLP and, if `dual`, for the second attention:
    the checkpoint's order, not the order of use. The `last` block needs only q, k, v of the text, so there
    the text's adaLN gives just shift and scale.
    """

    def __init__(self, cfg, dual=False, last=False):
        super().__init__()
        self.chunks = 6
        if dual:
            self.chunks = 9
        if last:
            self.chunks = 2
        self.adaLN = nn.Linear(cfg.E, self.chunks * cfg.E)
        self.attn = Attention(cfg.E, cfg.A, qk_norm=True, proj=not last)
        self.attn2 = Attention(cfg.E, cfg.A, qk_norm=True) if dual else None
        self.mlp = None if last else MLP(cfg.E, 4 * cfg.E)

    def normed(self, x, mods):
        """(h, h2): x as read by the joint attention, and by the second one (None if there is none)."""
        shift, scale = mods[:2]
        if self.attn2 is None:
            return norm_modulate(x, shift, scale), None
        shift2, scale2, _ = mods[6:]
        return norm_modulate_twice(x, shift, scale, shift2, scale2)

    def update(self, x, attended, h2, mods):
        """x after attention (attended: (B, L, E), before its projection), second attention, and MLP."""
        if self.mlp is None:                       # the last block's text: nothing reads it any more
            return x
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = mods[:6]
        y = self.attn.proj(attended)

        # add_norm_modulate: the sum x + gate * y, and its modulated norm, which the MLP reads
        if self.attn2 is None:
            x, h = add_norm_modulate(x, y, gate, shift_mlp, scale_mlp)
        else:
            _, _, gate2 = mods[6:]
            x = x + gate[:, None] * y
            x, h = add_norm_modulate(x, self.attn2(h2), gate2, shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * self.mlp(h)


class JointBlock(nn.Module):
    """All image and text tokens attend to each other, each kind with its own weights; dual: see Stream."""

    def __init__(self, cfg, dual, last):
        super().__init__()
        self.x = Stream(cfg, dual=dual)
        self.text = Stream(cfg, last=last)

    def modulations(self, c):
        return self.x.adaLN(c), self.text.adaLN(c)

    def forward(self, x, text, mods):
        """x: (B, L, E), text: (B, T, E), mods: from `modulations` -> new x and text."""
        x_mods = mods[0].chunk(self.x.chunks, dim=-1)                          # each (B, E)
        text_mods = mods[1].chunk(self.text.chunks, dim=-1)

        # one attention over image and text tokens
        h, h2 = self.x.normed(x, x_mods)                                       # each (B, L, E)
        h_text, _ = self.text.normed(text, text_mods)                          # (B, T, E)
        q, k, v = self.x.attn.heads(h)                                         # each (B, A, L, K)
        q_text, k_text, v_text = self.text.attn.heads(h_text)                  # each (B, A, T, K)
        q = torch.cat([q, q_text], dim=2)                                      # (B, A, L+T, K)
        k = torch.cat([k, k_text], dim=2)
        v = torch.cat([v, v_text], dim=2)
        y = sdpa(q, k, v).flatten(2)                                           # (B, L+T, E)
        x_attended, text_attended = y.split([x.shape[1], text.shape[1]], dim=1)

        x = self.x.update(x, x_attended, h2, x_mods)
        text = self.text.update(text, text_attended, None, text_mods)
        return x, text


class MMDiT(DiT):
    """Velocity of a latent, given the time and a text prompt.

    z_all:   (B, C+D, h, w) normalised, base channels first; h and w multiples of p, at most p * pos_size
    t:       (B,) in [0, 1], 0 noise, 1 data
    context: (B, T, cfg.context) text tokens;  pooled: (B, cfg.pooled)
    skip:    indices of blocks to leave out (skip-layer guidance)
    mods:    modulations(t, pooled), if already computed
    returns: v (B, C+D, h, w) float32
    raises:  ValueError for a latent of another shape
    """
    lora_targets = ("x.attn.qkv", "x.attn.proj", "x.attn2.qkv", "x.attn2.proj", "x.mlp.fc2", "x.adaLN")

    def __init__(self, cfg):
        blocks = [JointBlock(cfg, dual=i < cfg.dual, last=i == cfg.depth - 1) for i in range(cfg.depth)]
        y_embedder = nn.Sequential(nn.Linear(cfg.pooled, cfg.E), nn.SiLU(), nn.Linear(cfg.E, cfg.E))
        super().__init__(cfg, False, blocks, y_embedder=y_embedder,
                         context_embedder=nn.Linear(cfg.context, cfg.E))
        # Saved, unlike LightningDiT's: it is not known whether the released table matches the formula.
        table = torch.empty(1, cfg.pos_size**2, cfg.E)
        if not table.is_meta:
            spacing = 64 / cfg.pos_size                                # 64 tokens: 1024 pixels
            table = sincos_table(cfg.pos_size, cfg.E, spacing=spacing).to(table.device)
        self.register_buffer("pos_embed", table)
        if cfg.lora:
            add_lora(self, cfg.lora, cfg.alpha)

    def condition(self, t, pooled):
        # SD3's own time runs the other way, sigma = 1 - t, in thousandths, and it predicts noise - data.
        # The conventions are converted only here and in the sign of `forward`'s result.
        return super().condition(1000 * (1 - t), pooled)

    def forward(self, z_all, t, context, pooled, skip=(), mods=None):
        B, channels, h, w = z_all.shape
        p, limit = self.cfg.p, self.cfg.p * self.cfg.pos_size
        if channels != self.cfg.C + self.cfg.D or h % p or w % p or max(h, w) > limit:
            raise ValueError(f"z_all is {tuple(z_all.shape)}, wanted (B, {self.cfg.C + self.cfg.D}, h, w) "
                             f"with h and w multiples of {p}, up to {limit}")
        if mods is None:
            mods = self.modulations(t, pooled)
        *block_mods, final_mods = mods

        x = self.tokens(z_all, self.positions(h // p, w // p))                 # (B, L, E)
        text = self.context_embedder(context)                                  # (B, T, E)
        for i, (block, m) in enumerate(zip(self.blocks, block_mods)):
            if i not in skip:
                x, text = self.run(block, x, text, m)
        return -self.velocity(x, final_mods, h, w)

    def positions(self, rows, columns):
        """The central rows x columns of the position table, as tokens: (1, L, E)."""
        n = self.cfg.pos_size
        top = (n - rows) // 2
        left = (n - columns) // 2
        table = self.pos_embed.view(1, n, n, -1)
        return table[:, top:top + rows, left:left + columns].flatten(1, 2)


# ---------------------------------------------------------------- USiT


class SkipBlock(nn.Module):
    """Attention, then MLP, each after a LayerNorm; in the second half, a skip connection is merged first.

        x = skip_linear([x, kept])
        x = x + attn(norm1(x))
        x = x + mlp(norm2(x))
    """

    def __init__(self, cfg, skip=False):
        super().__init__()
        self.skip_linear = nn.Linear(2 * cfg.E, cfg.E) if skip else None
        self.norm1 = nn.LayerNorm(cfg.E)
        self.attn = Attention(cfg.E, cfg.A, qk_norm=False, bias=False)
        self.norm2 = nn.LayerNorm(cfg.E)
        self.mlp = MLP(cfg.E, 4 * cfg.E, gelu="none")

    def forward(self, x, kept=None):
        """(B, 2+L, E) -> (B, 2+L, E); kept: the output of the mirrored block of the first half."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, kept], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class USiT(Transformer):
    """Velocity of a latent, given the time and a class, as in LightningDiT.  Diagram: support/usit.py."""

    def __init__(self, cfg):
        super().__init__()     # keep the order below: a saved optimizer identifies parameters by number
        self.cfg = cfg
        half = cfg.depth // 2
        blocks = [SkipBlock(cfg, skip=i > half) for i in range(cfg.depth + 1)]
        self.pos_embed = nn.Parameter(torch.empty(1, 2 + cfg.grid**2, cfg.E))
        self.P = nn.Conv2d(cfg.C, cfg.E, cfg.p, stride=cfg.p)
        self.y_embedder = nn.Embedding(cfg.num_classes + 1, cfg.E)
        self.blocks = nn.ModuleList(blocks)
        self.norm_final = nn.LayerNorm(cfg.E)
        self.O = nn.Linear(cfg.E, cfg.p * cfg.p * cfg.C)
        self.init_weights()
        self.P_new, self.O_new = widen(self.P, self.O, cfg.D) if cfg.D else (None, None)

    def forward(self, z_all, t, y):
        h, w = self.square(z_all)

        # tokens: label, time and image, each with a position added
        image = self.tokens(z_all, self.pos_embed[:, 2:])                      # (B, L, E)
        time = timestep_embedding(t, self.cfg.E)
        front = torch.stack([self.y_embedder(y), time], dim=1) + self.pos_embed[:, :2]
        x = torch.cat([front.to(image.dtype), image], dim=1)                   # (B, 2+L, E)

        # the first half of the blocks keeps its outputs, the second half consumes them in reverse
        half = self.cfg.depth // 2
        kept = []
        for block in self.blocks[:half]:
            x = self.run(block, x)
            kept.append(x)
        x = self.run(self.blocks[half], x)
        for block in self.blocks[half + 1:]:
            x = self.run(block, x, kept.pop())

        return self.heads(self.norm_final(x[:, 2:]), h, w)

    def init_weights(self):
        # Linear layers and positions: a normal of std 0.02 truncated at +-2, zero bias; else PyTorch's own.
        # Unlike LightningDiT's, neither the blocks nor the head start at zero.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)


# ---------------------------------------------------------------- shared parts, one equation each


def Norm(E, rms=True):
    """Holds `weight`, a scale, for the functions in kernels/, and is never called. LayerNorm's is None."""
    return nn.RMSNorm(E) if rms else nn.LayerNorm(E, elementwise_affine=False)


class Attention(nn.Module):
    """Self-attention with A heads, q and k optionally normalised; a joint attention uses its parts."""

    def __init__(self, E, A, qk_norm, proj=True, bias=True):
        super().__init__()
        self.A = A
        self.qkv = nn.Linear(E, 3 * E, bias=bias)
        self.q_norm = Norm(E // A, qk_norm)        # without qk_norm: no weight; q and k are left as they are
        self.k_norm = Norm(E // A, qk_norm)
        self.proj = nn.Linear(E, E) if proj else None

    def heads(self, x, cos=None, sin=None):
        """(B, L, E) -> q, k, v, each (B, A, L, K), q and k normalised, and rotated by RoPE's tables."""
        qkv = self.qkv(x).unflatten(-1, (3, self.A, -1))                       # (B, L, 3, A, K)
        return qknorm_rope(qkv, self.q_norm.weight, self.k_norm.weight, cos, sin)

    def forward(self, x, cos=None, sin=None):
        """softmax(q k^T / sqrt(K)) v: (B, L, E) -> (B, L, E)."""
        return self.proj(sdpa(*self.heads(x, cos, sin)).flatten(2))


class SwiGLU(nn.Module):
    """w3(SiLU(a) * b), where w12 computes a and b side by side (Shazeer, 2020)."""

    def __init__(self, E, hidden):
        super().__init__()
        self.w12 = nn.Linear(E, 2 * hidden)
        self.w3 = nn.Linear(hidden, E)

    def forward(self, x):
        return self.w3(swiglu(x, self.w12.weight, self.w12.bias))


class MLP(nn.Module):
    """fc2(GELU(fc1(x))); GELU by its tanh approximation, or exact with gelu="none"."""

    def __init__(self, E, hidden, gelu="tanh"):
        super().__init__()
        self.gelu = gelu
        self.fc1 = nn.Linear(E, hidden)
        self.fc2 = nn.Linear(hidden, E)

    def forward(self, x):
        h = linear_gelu(x, self.fc1.weight, self.fc1.bias) if self.gelu == "tanh" else F.gelu(self.fc1(x))
        return self.fc2(h)


def timestep_embedding(t, width=256):
    """[cos(t f_k), sin(t f_k)] with f_k = 10000^(-k / (width/2)).  (B,) -> (B, width) float32.

    LightningDiT passes t in [0, 1] as it is; most DiTs, including SD3's, multiply it by 1000 first.
    """
    k = torch.arange(width // 2, dtype=torch.float32, device=t.device)
    f = torch.exp(-2 * math.log(10000) / width * k)
    angle = t.float()[:, None] * f                                             # (B, width/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def unpatchify(x, p, h, w):
    """Tokens back to a latent.  (B, L, p*p*C), channel fastest -> (B, C, h, w)."""
    x = x.view(len(x), h // p, w // p, p, p, -1)   # row, column, row in patch, column in patch, channel
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, h, w)


def grid_positions(grid):
    """Row and column of each token, row-major: two (L,), float64, so only the finished tables are rounded."""
    i = torch.arange(grid, dtype=torch.float64, device="cpu")
    return i.repeat_interleave(grid), i.repeat(grid)


def sincos_table(grid, E, spacing=1.0):
    """The fixed position embedding, (1, L, E).

    [sin(col w), cos(col w), sin(row w), cos(row w)] with w_j = 10000^(-j / (E/4))
    """
    row, col = grid_positions(grid)
    w = 10000 ** (-torch.arange(E // 4, dtype=torch.float64, device="cpu") / (E // 4))
    col = torch.outer(spacing * col, w)                                        # (L, E/4)
    row = torch.outer(spacing * row, w)
    return torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], dim=1).float()[None]


def rope_table(grid, K):
    """cos and sin of the rotary angles, (L, K) each.

    The row rotates the first K/2 channels, the column the rest: the opposite order to that of `sincos_table`,
    and LightningDiT uses both.
    Frequencies are 10000^(-2j / (K/2)), one per pair of channels.
    """
    j = torch.arange(K // 4, dtype=torch.float64, device="cpu")
    f = 10000 ** (-2 * j / (K // 2))
    f = f.repeat_interleave(2)                                         # (K/2,): one for each pair of channels
    row, col = grid_positions(grid)
    angle = torch.cat([torch.outer(row, f), torch.outer(col, f)], dim=1)       # (L, K)
    return angle.cos().float(), angle.sin().float()


# ---------------------------------------------------------------- LoRA adapters, for text-conditional models


class LoRA(nn.Module):
    """y = W x + b + alpha/r B A x, with W and b frozen (Hu et al., 2022).

    parts: 3 if W stacks q, k and v, each of which then has its own A and B; else 1
    """

    def __init__(self, linear, r, alpha, parts):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = alpha / r
        like = dict(device=linear.weight.device, dtype=torch.float32)
        self.A = nn.Parameter(torch.randn(parts, r, linear.in_features, **like) / r)       # peft's "gaussian"
        self.B = nn.Parameter(torch.zeros(parts, linear.out_features // parts, r, **like))

    def forward(self, x):
        low = F.linear(x, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])              # (..., parts, r)
        change = torch.einsum("...pr,por->...po", low, self.B).flatten(-2)                    # (..., out)
        return self.linear(x) + self.scale * change


def add_lora(model, r=256, alpha=256.0):
    """Add adapters of rank r to a model, in place; freeze all but these and P, P_new, O, O_new.  Sec. 4.

    They go into those layers of each block that `lora_targets` names, as in the authors' code for SD3.5: the
    text-side layers and each MLP's first layer stay frozen. B starts at zero, so nothing changes at first.
    """
    model.requires_grad_(False)
    for layer in (model.P, model.O, model.P_new, model.O_new):
        if layer is not None:
            layer.requires_grad_(True)
    for block in model.blocks:
        layers = [(name, layer) for name, layer in block.named_modules() if name in model.lora_targets]
        targets = [(name, layer) for name, layer in layers if isinstance(layer, nn.Linear)]
        for name, linear in targets:
            parent, _, leaf = name.rpartition(".")
            parts = 3 if leaf == "qkv" else 1
            setattr(block.get_submodule(parent), leaf, LoRA(linear, r, alpha, parts))
    model.cfg = replace(model.cfg, lora=r, alpha=float(alpha))


@torch.no_grad()
def merge_lora(model):
    """W <- W + alpha/r B A, in place, exact up to float32 rounding; removes the adapters."""
    adapters = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRA)]
    for name, lora in adapters:
        change = lora.scale * torch.bmm(lora.B, lora.A).flatten(0, 1)
        lora.linear.weight += change.to(lora.linear.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).add_module(leaf, lora.linear)
    model.cfg = replace(model.cfg, lora=0)
    return model


# The transformers of this file (support/weights.py adds others): name -> (config class, model class). The
# name is "kind" in a run's config.json. Add your own from your own file: MODELS["ViT"] = (ViTConfig, ViT).
# The config has C, D and p, and num_classes if the model is class-conditional. The model is an nn.Module
# with `cfg`, P, O, expand_channels(D) and forward(z_all, t, *cond).
# All scripts open runs through support/weights.py, so import your file there (docs/recipes.md).
MODELS = {
    "LightningDiT": (LightningDiTConfig, LightningDiT),
    "MMDiT": (MMDiTConfig, MMDiT),
    "USiT": (USiTConfig, USiT),
}


def kind_of(model):
    """The name in MODELS of a transformer's class, which FSDP2 replaces by a subclass of its own."""
    return next(cls.__name__ for cls in type(model).__mro__ if cls.__name__ in MODELS)
