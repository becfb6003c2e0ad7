"""USiT (dit.py), the transformer of DC-AE 1.5: how it works, its sizes, and the names in a U-ViT's files.

It is a U-ViT (Bao et al., 2023) that predicts velocities.

A plain ViT: time and class do not modulate, as with adaLN in dit.py, but are two more tokens in front of the
image's, and every token has a learned position embedding:

    x = [label, time, P(z) + P_new(z_d)] + pos

What sets it apart are long skip connections, as in a U-Net, except that no block changes the number of
tokens. The outputs of the first half of the blocks are kept; each block of the second half first merges one
of them into its input, the newest first, with a Linear layer 2E -> E:

    in 0 ---> in 1 ---> middle ---> out 0 ---> out 1
      |         |                     |          |
      |         +---------------------+          |
      +------------------------------------------+

So the last block reads the output of the first, where each token's position and noise are still explicit.

    # DC-AE 1.5's recipe; not run. usit-vae: python train_vae.py imagenet512 --base=<DC-AE> --out=out/usit-vae
    torchrun --nproc_per_node=8 finetune.py usit-base
    torchrun --nproc_per_node=8 finetune.py usit

Dimension key:  B batch   h w latent grid   p patch side   L image tokens   E width   A heads
                C base channels   D detail channels; time and velocity are dit.py's
U-ViT is the same network, with the same names in its files, trained to predict the noise of another path.
A velocity can be computed from noise, but then the details' velocity would not be 0 at step 0: not supported.
"""
import math
from dataclasses import dataclass

from support.files import some
from support.formats import Layer, bare, count, export_layers, import_layers, merge_details, need, shape

SIZES = {                  # name: depth, width, heads
    "S": (12, 512, 8),
    "H": (28, 1152, 16),
    "2B": (28, 2048, 32),
    "3B": (56, 2048, 32),
}


@dataclass
class USiTConfig:
    """Everything that fixes a USiT's shapes; saved with its weights. Defaults: USiT-H, on f64c128."""
    C: int = 128                # base channels
    D: int = 0                  # detail channels, 0 before expand_channels
    p: int = 1                  # patch side, latent pixels
    grid: int = 8               # tokens per side: the latent is (grid * p) x (grid * p)
    E: int = 1152               # width
    depth: int = 28             # blocks in both halves; one more is in the middle
    A: int = 16                 # attention heads
    num_classes: int = 1000     # labels 0 .. num_classes-1; num_classes itself is "no class"

    def __post_init__(self):
        if self.depth % 2 or self.depth < 2:
            raise ValueError(f"depth={self.depth} of a USiT: wanted an even number, for two equal "
                             "halves of blocks")
        if self.E % self.A or self.E % 2:
            raise ValueError(f"E={self.E} with A={self.A} heads: E must be even, and a multiple of A")


# ---------------------------------------------------------------- a U-ViT's file, in and out


# ours, theirs
LAYERS = {"P": "patch_embed.proj", "y_embedder": "label_emb.embedding_table", "norm_final": "norm",
          "O": "decoder_pred"}

# within each block, the same for both
BLOCK_LAYERS = ("skip_linear", "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")

MARK = "out_blocks.0.skip_linear.weight"           # no other format has it

HEADS = {E: A for _, E, A in SIZES.values()}       # not stored in a file; known only for these widths


def is_usit(sd):
    """Does the state dict have a U-ViT's skip connections?"""
    return any(f".{key}".endswith(f".{MARK}") for key in sd)


def table(half):
    """Our blocks are one list; theirs are two halves of this length, with one block in the middle."""
    blocks = [f"in_blocks.{i}" for i in range(half)]
    blocks += ["mid_block"]
    blocks += [f"out_blocks.{i}" for i in range(half)]
    layers = [Layer(ours, (theirs,)) for ours, theirs in LAYERS.items()]
    for i, block in enumerate(blocks):
        layers += [Layer(f"blocks.{i}.{name}", (f"{block}.{name}",)) for name in BLOCK_LAYERS]
    return layers


def import_usit(sd):
    """A U-ViT's file -> (state dict in our names, fields of USiTConfig).

    Nothing shows whether it was trained to predict velocities.
    raises: ValueError with one sentence if it is a variant that is not supported here
    """
    sd = dict(bare(sd, (MARK,)))
    need(sd, "pos_embed")
    pos_embed = sd.pop("pos_embed")
    half = count(sd, "in_blocks.")
    ours = import_layers(sd, table(half)) | {"pos_embed": pos_embed}
    return ours, sizes(ours, half)


def export_usit(model):
    """Our USiT -> a U-ViT's names, for C + D channels.  The inverse of the import if D = 0."""
    ours = merge_details(model)
    pos_embed = ours.pop("pos_embed")
    return {"pos_embed": pos_embed} | export_layers(ours, table(model.cfg.depth // 2))


def sizes(ours, half):
    """The fields of USiTConfig from the names and shapes of a state dict in our names."""
    E, C, p, _ = shape(ours, "P.weight", 4)
    if shape(ours, "O.weight", 2)[0] != p * p * C:
        raise ValueError("its head does not predict as many channels as it takes in; wanted a velocity only")
    if E not in HEADS:
        raise ValueError(f"a U-ViT's file does not give its number of heads, and E={E} is not one of DC-AE's "
                         f"widths, {some(HEADS)}")
    return {
        "C": C,
        "p": p,
        "grid": math.isqrt(max(0, shape(ours, "pos_embed", 3)[1] - 2)),        # without label and time
        "E": E,
        "depth": 2 * half,
        "A": HEADS[E],
        "num_classes": shape(ours, "y_embedder.weight", 2)[0] - 1,             # the last row is "no class"
    }
