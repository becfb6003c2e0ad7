"""support/bases.py: base VAEs other than AutoencoderKL."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from davae import DAVAE, AutoencoderKL, BaseVAE, DAVAEConfig, PlainVAE, half
from support.bases import BASES, TAEF2, AutoencoderKLFlux2
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


def layer(sd, name, x):
    """The convolution of TAEF2 with this name, or a block's three, in float64."""
    if name.endswith(".conv"):
        for i in (0, 2, 4):
            x = layer(sd, f"{name}.{i}", x.relu() if i else x)
        return x
    weight = sd[f"{name}.weight"].double()
    bias = sd[f"{name}.bias"].double() if f"{name}.bias" in sd else None
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def block(sd, name, x):
    if f"{name}.pool.0.weight" in sd:
        h = layer(sd, f"{name}.pool.0", x)
        groups = h.unflatten(1, (4, -1))
        groups = groups - groups.mean((2, 3, 4), keepdim=True)
        groups = groups / (groups.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()
        h = groups.flatten(1, 2) * sd[f"{name}.pool.1.weight"].double().view(1, -1, 1, 1)
        h = h + sd[f"{name}.pool.1.bias"].double().view(1, -1, 1, 1)
        x = x + layer(sd, f"{name}.pool.3", h.relu())
    return (x + layer(sd, f"{name}.conv", x)).relu()


@torch.no_grad()
def test_taef2_equals_its_authors_network_written_out_in_float64(error, randomise):
    torch.manual_seed(0)
    vae = randomise(TAEF2(C=4, width=8), names="pool.1").eval()
    vae.decoder[17].weight *= 8                                        # so that some pixels are clipped
    vae.decoder[17].bias.fill_(0.5)
    sd = vae.state_dict()
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    h = layer(sd, "encoder.1", x.double() / 2 + 0.5)
    for i in range(2, 15):
        if i in (3, 7, 11):                                            # a stride of 2 keeps every other value
            h = layer(sd, f"encoder.{i}", h)[:, :, ::2, ::2]
        else:
            h = block(sd, f"encoder.{i}", h)
    assert error(vae.encode(x), layer(sd, "to_moments", h)) < 1e-5

    z = 4 * torch.randn(2, 4, 4, 6)
    h = layer(sd, "from_latent.1", 3 * torch.tanh(z.double() / 3)).relu()
    for i in (*range(1, 4), *range(5, 9), *range(10, 14), 15, 16):
        if i in (5, 10, 15):
            h = layer(sd, f"decoder.{i}", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        else:
            h = block(sd, f"decoder.{i}", h)
    y = 2 * layer(sd, "decoder.17", h) - 1
    assert 0.02 < (y.abs() > 1).double().mean() < 0.9
    assert error(vae.decode(z), y.clamp(-1, 1)) < 1e-5


@pytest.mark.parametrize("kind, eps", [(AutoencoderKL, 1e-6), (AutoencoderKLFlux2, 1e-6), (TAEF2, 1e-5)])
def test_every_group_norm_has_the_epsilon_the_public_weights_were_trained_with(kind, eps, kl_config):
    vae = kind() if kind is TAEF2 else kind(replace(kl_config, attn=(1,)))
    for part in (vae.encoder, vae.decoder):
        norms = [layer for layer in part.modules() if isinstance(layer, torch.nn.GroupNorm)]
        assert len(norms) >= 3 and {norm.eps for norm in norms} == {eps}


def test_taef2_keeps_the_names_in_its_checkpoints():
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
    # the hash of a latent cache depends on the order
    assert names.index("encoder.12.pool.3.weight") < names.index("encoder.12.conv.0.weight")


def test_taef2_loads_from_its_two_files_and_from_the_one_on_hugging_face():
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


@pytest.mark.parametrize("files, given, said", [
    (["taef2_encoder.pth"], "", "a: has no taef2_decoder.pth"),
    (["taef2_decoder.pth"], "", "a: has no taef2_encoder.pth"),
    (["taef2_encoder.pth", "taef2_decoder.pth"], "taef2_encoder.pth", "encoder.pth: one half of TAEF2"),
])
def test_half_of_taef2_is_refused_with_the_two_files_that_are_wanted(tmp_path, files, given, said):
    (tmp_path / "a").mkdir()
    for file in files:
        torch.save({"1.weight": torch.ones(1)}, tmp_path / "a" / file)
    with pytest.raises(SystemExit, match=f"{said}; wanted a folder .* taef2_encoder.pth and taef2_decoder.p"):
        load_base_vae(tmp_path / "a" / given)


@torch.no_grad()
def test_taef2_can_be_a_base_but_not_train_as_a_plain_vae():
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


def test_an_older_taef2_config_without_sizes_still_builds():
    vae = build_vae({"base": {"kind": "TAEF2"}, "D": 32, "detail_dropout": 0.1, "rescale": False})
    assert (vae.C, vae.D, vae.f, vae.base.width) == (32, 32, 16, 64)
    assert build_vae(vae.config()).config() == vae.config()


def test_taef2_is_split_before_its_decoders_first_nonlinearity():
    base = TAEF2()
    assert isinstance(base.from_latent[-1], torch.nn.Conv2d) and isinstance(base.decoder[0], torch.nn.ReLU)


# ---------------------------------------------------------------- a custom base


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
def test_a_custom_base_saves_loads_and_carries_a_davae(tmp_path, monkeypatch):
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


def test_an_unregistered_base_is_named_with_the_registered_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(BASES, "Toy", Toy)
    save_base_vae(Toy(), tmp_path / "toy")
    monkeypatch.delitem(BASES, "Toy")
    with pytest.raises(SystemExit, match="toy: its base VAE is a 'Toy'; BASES has AutoencoderKL, .*TAEF2"):
        load_base_vae(tmp_path / "toy")
