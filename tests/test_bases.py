"""support/bases.py: base VAEs beside AutoencoderKL."""
import math

import numpy as np
import torch
from PIL import Image

from support.weights import load_base_vae


@torch.no_grad()
def test_taef2_reproduces_its_published_round_trip(shared):
    vae, values = load_base_vae(shared("weights/taef2")), []
    assert (vae.C, vae.f) == (32, 8) and sum(p.numel() for p in vae.parameters()) == 1_338_528 + 1_338_499
    for file in sorted(shared("data/kodak24").glob("*.png"))[:2]:
        x = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 127.5 - 1
        z = vae.encode(x)
        values.append(10 * math.log10(4 / (x - vae.decode(z)).square().mean()))
        assert 0.7 < z.std() < 1.0 and z.mean().abs() < 0.2
    assert np.mean(values) > 27                                    # all 24: 30.19 dB
