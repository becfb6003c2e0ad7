"""support/bases.py: base VAEs beside AutoencoderKL."""
import math

import numpy as np
import torch
from PIL import Image

from support.weights import load_base_vae


@torch.no_grad()
def test_taef2_reproduces_its_published_round_trip(shared):
    vae = load_base_vae(shared("weights/taef2"))
    assert (vae.C, vae.f) == (32, 8)
    assert sum(p.numel() for p in vae.parameters()) == 1_338_528 + 1_338_499
    values = []
    for file in sorted(shared("data/kodak24").glob("*.png"))[:2]:
        pixels = torch.from_numpy(np.array(Image.open(file)))      # (H, W, 3)
        x = pixels.permute(2, 0, 1).unsqueeze(0) / 127.5 - 1       # (1, 3, H, W)
        z = vae.encode(x)
        assert 0.7 < z.std() < 1.0
        assert z.mean().abs() < 0.2
        values.append(10 * math.log10(4 / (x - vae.decode(z)).square().mean()))
    assert np.mean(values) > 27                                    # all 24: 30.19 dB
