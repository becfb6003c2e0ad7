"""Which details does the decoder use?  One group of Eq. 3 is knocked out at a time, or only the first k kept.

Group c is the D/C detail channels that are aligned to base channel c. A channel that is left out is set to
the raw z_d = 0 of detail dropout. This takes 2C + 1 decodings of each image.

    python experiments/knockout.py out/tiny-vae --images=200

Writes knockout.json and knockout.png: the PSNR lost without each group, and the PSNR with only the first k of
the D channels.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import torch
import torch.nn.functional as F

from experiments import shared
from support.metrics import psnr


@torch.no_grad()
def knockout(vae, x, z_all, zero, device="cpu"):
    """(kept, lost), in dB: PSNR with the first 0, 1, ..., C groups; PSNR lost without group 0, ..., C - 1.

    x: (N, 3, H, W) in [-1, 1], z_all: (N, C+D, h, w).
    zero: (1, D, 1, 1), the values for detail channels that are left out.
    """
    zero = F.pad(zero, (0, 0, 0, 0, vae.C, 0)).to(device)                          # (1, C+D, 1, 1)
    group = torch.arange(-vae.C, vae.D, device=device) // (vae.D // vae.C)    # (C+D,); below 0: base channels

    def score(left_out):                                                           # (C+D,) bool
        left_out = left_out.view(1, -1, 1, 1)
        scores = []
        for images, z in zip(x.split(10), z_all.split(10)):
            decoded = vae.decode(torch.where(left_out, zero, z.to(device)))
            scores.append(psnr(images, decoded.cpu()))
        return torch.cat(scores).mean().item()

    kept = [score(group >= k) for k in range(vae.C + 1)]
    lost = [kept[-1] - score(group == c) for c in range(vae.C)]
    return kept, lost


def main(cfg):
    held = shared.open_run(cfg)
    vae, device = held.run.vae, held.run.device
    width = vae.D // vae.C
    kept, lost = knockout(vae, held.x, held.z_all, shared.zero_details(vae), device)

    worst = max(range(vae.C), key=lambda c: lost[c])
    table = {
        "all details": {"psnr": kept[-1]},
        "none": {"psnr": kept[0]},
        f"all but group {worst}, the worst": {"psnr": kept[-1] - lost[worst]},
    }
    groups = list(range(vae.C))
    channels = list(range(0, vae.D + 1, width))
    panels = [
        (f"group of {width} detail channels left out", "PSNR lost [dB]", "o", {"one group": [groups, lost]}),
        (f"first k of {vae.D} detail channels kept", "PSNR [dB]", "o-", {"k": [channels, kept]}),
    ]
    return shared.write("knockout", cfg, held.run, table, panels)


if __name__ == "__main__":
    shared.start(main)
