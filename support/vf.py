"""VA-VAE's vision-foundation (VF) loss: aligns a latent with features by cosines, with margins.

    L_mcos = mean over i     of relu(1 - m1 - cos(s_i, f_i))                 the same position in both
    L_mdms = mean over i, j  of relu(|cos(s_i, s_j) - cos(f_i, f_j)| - m2)   all pairs within an image

s: the student, a latent (perhaps projected); f: the teacher, without gradient. Where a margin is met, the
gradient is exactly zero. Cosines only see directions, so lengths are free, unlike with the squared distance
of DA-VAE's Eq. (4). The formulas and margins are those of VA-VAE's code (Yao et al., 2025).

The teacher is the base latent (ours), or a vision transformer (`Teacher`), as in VA-VAE.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from support import files, hub
from support.pretrained import import_transformers, load_pretrained

# Above MOST positions, L_mdms is over DRAWN of them, others in each step: the matrix of 4,096 takes 64 MiB an
# image.
MOST = 1024
DRAWN = 512
APART = 0x5F3759                  # seeds a separate generator, so that a step's other random numbers stay


def vf_loss(s, f, m1, m2):
    """{"mcos": L_mcos, "mdms": L_mdms}, each () float32, whatever autocast says.

    s: (B, K, h, w), f: (B, K', h, w). L_mdms works for K' != K; there is then no L_mcos.
    m1, m2: the margins, in [0, 2]
    """
    with torch.autocast(s.device.type, enabled=False):
        s = F.normalize(s.float().flatten(2), dim=1, eps=1e-12)               # (B, K, N), unit columns
        f = F.normalize(f.detach().float().flatten(2), dim=1, eps=1e-12)
        terms = {}
        if s.shape[1] == f.shape[1]:
            terms["mcos"] = F.relu(1 - m1 - (s * f).sum(dim=1)).mean()
        if s.shape[2] > MOST:
            generator = torch.Generator().manual_seed(torch.initial_seed() ^ APART)
            some = torch.randperm(s.shape[2], generator=generator)[:DRAWN].to(s.device)
            s, f = s[:, :, some], f[:, :, some]
        difference = s.mT @ s - f.mT @ f                                      # (B, N, N)
        terms["mdms"] = F.relu(difference.abs() - m2).mean()
    return terms


class Teacher(nn.Module):
    """A frozen vision transformer, DINOv2 or MAE, from a local folder; images are fed to it as in VA-VAE.

    An image is in [-1, 1], as the VAE sees it (ImageNet's mean and std are not applied), bilinearly resized
    so that the transformer's patches match the VAE's latent positions: 256 pixels at f16 to 224, 16 x 16
    patches of 14. The features are those after the final norm, without the class token. The position table is
    resized as timm does it for VA-VAE: bicubic, antialiased.

    folder: as transformers' `save_pretrained` writes it, or its name on Hugging Face
    raises: SystemExit with one sentence if it is not such a folder, or transformers is missing
    """

    def __init__(self, folder):
        super().__init__()
        self.net = load_transformer(folder).eval().requires_grad_(False)
        self.width = self.net.config.hidden_size
        self.patch = self.net.config.patch_size
        self.is_mae = self.net.config.model_type == "vit_mae"
        if self.is_mae:
            self.net.config.mask_ratio = 0.0          # it would hide most of its patches
        embeddings = self.net.embeddings
        self.table = embeddings.position_embeddings.detach().clone()          # (1, 1 + n*n, width)

    def train(self, mode=True):
        return super().train(False)                   # frozen: no dropout, even while the VAE trains

    @torch.no_grad()
    def forward(self, x, side):
        """(B, 3, H, H) in [-1, 1] -> (B, width, side, side), `side` being that of the VAE's latent."""
        self.resize_positions(side)
        pixels = side * self.patch
        if x.shape[-1] != pixels:
            x = F.interpolate(x, (pixels, pixels), mode="bilinear", align_corners=False)
        options = {}
        if self.is_mae:                               # in order, and not shuffled as in its own training
            options["noise"] = torch.linspace(0, 1, side**2, device=x.device).expand(len(x), -1)
            options["interpolate_pos_encoding"] = True
        features = self.net(x, **options).last_hidden_state                   # (B, 1 + side^2, width)
        return features[:, 1:].mT.unflatten(2, (side, side))

    def resize_positions(self, side):
        """Resize the position table to side x side patches, so that the transformer takes it as it is."""
        embeddings = self.net.embeddings
        if embeddings.position_embeddings.shape[1] == 1 + side**2:
            return
        table = self.table.to(embeddings.position_embeddings.device)
        first, grid = table[:, :1], table[:, 1:]
        n = round(grid.shape[1] ** 0.5)
        grid = F.interpolate(grid.mT.unflatten(2, (n, n)), (side, side), mode="bicubic", antialias=True)
        table = torch.cat([first, grid.flatten(2).mT], dim=1)
        embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)


def load_transformer(folder):
    """The DINOv2 or MAE in a folder, loaded by transformers.   raises: SystemExit with one sentence"""
    folder = hub.local(folder, "clip")
    config = Path(folder) / "config.json"
    if not config.exists():
        raise SystemExit(f"--teacher={folder}: has no config.json; wanted `base`, or a folder with a DINOv2 "
                         "or MAE as transformers saves it")
    kind = files.read_json(config).get("model_type")
    if kind not in ("dinov2", "vit_mae"):
        raise SystemExit(f"--teacher={folder}: holds a model of type {kind!r}; wanted dinov2 or vit_mae")
    AutoModel, = import_transformers("AutoModel")
    return load_pretrained(folder, AutoModel, "teacher")
