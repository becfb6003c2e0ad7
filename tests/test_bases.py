"""support/bases.py: base VAEs beside AutoencoderKL."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from davae import DAVAE, BaseVAE, DAVAEConfig, PlainVAE, half
from support.bases import BASES, TAEF2
from support.weights import build_vae, load_base_vae, load_davae, save_base_vae


@torch.no_grad()
@pytest.mark.slow
def test_taef2_reproduces_its_published_round_trip(shared):
    vae, values = load_base_vae(shared("weights/taef2")), []
    assert (vae.C, vae.f) == (32, 8) and sum(p.numel() for p in vae.parameters()) == 1_338_528 + 1_338_499
    for file in sorted(shared("data/kodak24").glob("*.png"))[:2]:
        x = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 127.5 - 1
        z = vae.encode(x)
        values.append(10 * math.log10(4 / (x - vae.decode(z)).square().mean()))
        assert 0.7 < z.std() < 1.0 and z.mean().abs() < 0.2
    assert np.mean(values) > 27  # all 24: 30.19 dB


def test_taef2_keeps_the_names_that_its_checkpoints_have():
    names = list(TAEF2().state_dict())
    some = [
        "encoder.1.weight",
        "encoder.2.conv.4.bias",
        "encoder.3.weight",
        "encoder.12.pool.0.weight",
        "encoder.14.conv.0.weight",
        "to_moments.bias",
        "from_latent.1.weight",
        "decoder.1.pool.1.bias",
        "decoder.3.conv.0.weight",
        "decoder.5.weight",
        "decoder.16.conv.2.weight",
        "decoder.17.bias",
    ]
    assert set(some) < set(names) and len(names) == 160
    # the hash of a cache of latents goes by the order
    assert names.index("encoder.12.pool.3.weight") < names.index("encoder.12.conv.0.weight")


def test_taef2_is_read_from_its_two_files_and_from_the_one_on_hugging_face():
    two, one = {}, {}
    for key, weight in TAEF2().state_dict().items():
        if key in ("mean", "std"):
            continue
        weight = torch.randn_like(weight)
        theirs = key.replace("to_moments", "encoder.15").replace("from_latent", "decoder")
        half, number, *rest = theirs.split(".")
        number = int(number) + {"encoder": -1, "decoder": 0 if "latent" in key else 2}[half]
        two[".".join([half, str(number), *rest])] = weight
        one[".".join([half, "layers", str(number - (half == "decoder")), *rest])] = weight
    a, b = load_base_vae(two).state_dict(), load_base_vae(one).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(SystemExit, match="layers that are not known here: encoder.layers.x.weight"):
        load_base_vae(one | {"encoder.layers.x.weight": torch.ones(1)})


@torch.no_grad()
def test_taef2_is_a_base_but_not_a_plain_vae_to_train():
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    base = TAEF2().eval()
    vae = DAVAE(base, DAVAEConfig(D=32)).eval()
    assert (
        torch.equal(vae.encode(x)[:, :32], base.encode(half(x)))
        and vae.decode(vae.encode(x)).shape == x.shape
    )
    plain = PlainVAE(base)
    assert plain.decode(plain.encode(x)).abs().max() <= 1
    with pytest.raises(SystemExit, match="TAEF2 has no posterior"):
        plain(x)


def test_a_taef2_of_an_older_config_without_sizes_is_built():
    vae = build_vae({"base": {"kind": "TAEF2"}, "D": 32, "detail_dropout": 0.1, "rescale": False})
    assert (vae.C, vae.D, vae.f, vae.base.width) == (32, 32, 16, 64)
    assert build_vae(vae.config()).config() == vae.config()


def test_taef2_is_cut_before_the_decoders_first_non_linearity():
    base = TAEF2()
    assert isinstance(base.from_latent[-1], torch.nn.Conv2d) and isinstance(base.decoder[0], torch.nn.ReLU)


# ---------------------------------------------------------------- a base of one's own


class Toy(BaseVAE):
    """Two layers and no posterior: f = 4, C channels."""

    def __init__(self, C=3):
        super().__init__(C, f=4, width=8)
        self.encoder = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.to_moments = torch.nn.Conv2d(8, 2 * C, 1)
        self.from_latent = torch.nn.Conv2d(C, 8, 1)
        self.decoder = torch.nn.ConvTranspose2d(8, 3, 4, stride=4)

    def config(self):
        return {"C": self.C}


@torch.no_grad()
def test_a_base_of_ones_own_goes_through_every_door(tmp_path, monkeypatch):
    monkeypatch.setitem(BASES, "Toy", Toy)
    toy, x = Toy(C=5).eval(), torch.rand(1, 3, 16, 16)
    toy.mean.uniform_(-1, 1)
    save_base_vae(toy, tmp_path / "toy")
    assert torch.equal(load_base_vae(tmp_path / "toy").encode(x), toy.encode(x))
    assert torch.equal(load_davae(tmp_path / "toy").encode(x), toy.encode(x))
    vae = DAVAE(load_base_vae(tmp_path / "toy"), DAVAEConfig(D=10))
    assert vae.decode(vae.encode(x)).shape == x.shape
    again = build_vae(vae.config())
    assert type(again.base) is Toy and again.base.C == 5 and again.config() == vae.config()


def test_a_base_that_is_not_in_the_dict_is_named_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.setitem(BASES, "Toy", Toy)
    save_base_vae(Toy(), tmp_path / "toy")
    monkeypatch.delitem(BASES, "Toy")
    with pytest.raises(SystemExit, match="toy: its base VAE is a 'Toy'; BASES has AutoencoderKL, .*TAEF2"):
        load_base_vae(tmp_path / "toy")
