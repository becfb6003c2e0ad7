"""How much does the decoder use the details?  Fig. S2 and Tab. S3 of the paper.

Held-out images are decoded with their true details, with z_d = 0 as in detail dropout, and with noise
instead, N(0, I) in normalised units.

    python experiments/sensitivity.py out/tiny-vae --images=200

Writes sensitivity.json (PSNR, SSIM and a distance of features for each) and sensitivity_images.png.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import torch

from evaluate import image_table, load_rulers
from experiments import shared
from sample import sample_noise
from support.config import field


@dataclass
class Config(shared.Config):
    perceptual: str = field("none", "LPIPS network as a metric", choices=("none", "vgg", "squeeze"))
    lpips_trunk: str = field("", "local weight file of that network; also the trunk of --features=squeeze")
    features: str = field("auto", "network for distances; auto: what the other flags and the data allow",
                          choices=("auto", "inception", "squeeze", "probe", "none"))
    inception_weights: str = field("", "torch-fidelity's pt_inception-2015-12-05-6726825d.pth")


@torch.no_grad()
def sensitivity(vae, x, first=0):
    """{row: images (B, 3, H, W)} of x (B, 3, H, W) through the VAE, with three kinds of details.

    first: the number of the first image; each image has its own noise, whatever the batch
    """
    z, z_d = vae.encode(x).split([vae.C, vae.D], dim=1)                           # (B, C, h, w), (B, D, h, w)
    details = {
        "full": z_d,
        "zero": shared.zero_details(vae).expand_as(z_d),
        "random": sample_noise(0, range(first, first + len(x)), z_d.shape[1:]).to(x.device),
    }
    rows = {}
    for name, z_d in details.items():
        rows[f"{name} details"] = vae.decode(torch.cat([z, z_d], dim=1)).clamp(-1, 1)
    return rows


def main(cfg):
    held = shared.open_run(cfg)
    vae, device = held.run.vae, held.run.device
    rulers = load_rulers(cfg, cfg.features, held.run)
    numbers = range(len(held.x))
    batches = [(held.x[k:k + 10], numbers[k:k + 10]) for k in numbers[::10]]
    firsts = iter(numbers[::10])
    table, _, described = image_table(lambda x: sensitivity(vae, x, next(firsts)), batches, rulers, device)

    shown = held.x[:6]
    pictures = {"input": shown, **sensitivity(vae, shown.to(device))}
    return shared.write("sensitivity", cfg, held.run, table=table, pictures=pictures,
                        held_out=described, **rulers.settings())


if __name__ == "__main__":
    shared.start(main, Config)
