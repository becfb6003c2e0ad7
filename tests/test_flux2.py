"""support/flux2.py: FLUX.2's VAE against diffusers', and TAEF2 as another base with the same latents."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from davae import DAVAE, DAVAEConfig
from support import checks, metrics
from support.bases import TAEF2
from support.fit import fit_new_blocks
from support.flux2 import import_flux2, is_flux2
from support.formats import export_layers, import_kl, kl_layers
from support.weights import build_vae, load_base_vae, load_davae, save_base_vae


@pytest.fixture(scope="module")
def theirs():
    """diffusers' AutoencoderKLFlux2, small and random; each pixel of a block has its own statistics."""
    metrics.import_torchvision()
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=8, norm_num_groups=4,
        batch_norm_eps=1e-2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.1, 4)
    return vae.eval()


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux2")
    theirs.save_pretrained(folder)
    return load_base_vae(folder)


def pipeline():
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
    return Flux2KleinPipeline


def packed_by_pipeline(vae, x):
    """The tokens that FLUX.2's pipeline makes from images: (B, L, 4C)."""
    fake = type("Fake", (), {"vae": vae, "_patchify_latents": staticmethod(pipeline()._patchify_latents)})()
    return pipeline()._pack_latents(pipeline()._encode_vae_image(fake, x, None))


def packed(z):
    """The tokens that a transformer with 2x2 patches reads: channel c of pixel i, j is number 4c + 2i + j."""
    return F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


@torch.no_grad()
def test_flux2_latents_are_those_the_pipeline_gives_its_transformer(theirs, ours, error):
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    z = ours.encode(x)
    assert z.shape == (2, 8, 8, 12) and (ours.C, ours.f) == (8, 8)
    assert error(packed(z), packed_by_pipeline(theirs, x)) < 1e-5

    # as the pipeline decodes
    mean, std = theirs.bn.running_mean, (theirs.bn.running_var + 1e-2).sqrt()
    raw = F.pixel_unshuffle(z, 2) * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    image = theirs.decode(pipeline()._unpatchify_latents(raw)).sample
    assert error(ours.decode(z), image) < 1e-5


@torch.no_grad()
def test_flux2_posterior_is_that_of_the_normalised_latent(theirs, ours, error):
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    raw, posterior = theirs.encode(x).latent_dist, ours.posterior(x)
    std = (theirs.bn.running_var + 1e-2).sqrt().view(1, -1, 1, 1)
    wanted = F.pixel_shuffle(F.pixel_unshuffle(raw.std, 2) / std, 2)
    assert error(torch.exp(0.5 * posterior.logvar), wanted) < 1e-5


@torch.no_grad()
def test_taef2_and_flux2_share_one_latent_layout(ours, theirs):
    """TAEF2's author runs it in FLUX.2's pipeline as the VAE, with a BatchNorm that does nothing."""
    taef2 = TAEF2().eval()
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    latent = type("Latent", (), {"latents": taef2.encode(x)})()
    stand_in = type("StandIn", (), {})()
    stand_in.bn = torch.nn.BatchNorm2d(128, affine=False, eps=0.0).eval()
    stand_in.config = type("Config", (), {"batch_norm_eps": 0.0})()
    stand_in.encode = lambda x: latent
    assert torch.equal(packed(taef2.encode(x)), packed_by_pipeline(stand_in, x))
    assert (taef2.f, taef2.C) == (8, 32) and ours.f == 8
    assert torch.equal(ours.mean, torch.zeros(8)) and torch.equal(taef2.mean, torch.zeros(32))


def test_the_authors_file_is_read_like_diffusers_folder(theirs):
    theirs = theirs.state_dict()
    kl = {key: weight for key, weight in theirs.items() if not key.startswith("bn.")}
    single = export_layers(import_kl(kl), kl_layers(4, 2, True, diffusers=False))
    for half, name in (("encoder", "quant_conv"), ("decoder", "post_quant_conv")):
        for part in ("weight", "bias"):
            single[f"{half}.{name}.{part}"] = single.pop(f"{name}.{part}")
    single |= {key: theirs[key] for key in theirs if key.startswith("bn.")}
    assert is_flux2(single) and "quant_conv.weight" not in single
    a, sizes = import_flux2(single, 1e-2)
    b, same_sizes = import_flux2(theirs, 1e-2)
    assert sizes == same_sizes and a.keys() == b.keys()
    assert all(torch.equal(a[key].flatten(), b[key].flatten()) for key in a)


@torch.no_grad()
def test_the_closed_form_on_flux2_can_equal_the_base_itself(ours, error):
    """With all r^2 C details nothing is lost: the image is the base VAE's at full size."""
    torch.manual_seed(1)
    vae = DAVAE(ours, DAVAEConfig(D=32, latent_shortcut=True)).eval()
    images = [torch.rand(4, 3, 128, 128) * 2 - 1 for _ in range(3)]
    found = fit_new_blocks(vae, images)
    assert found["kept"] > 0.999
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    x_hat = vae.decode_raw(vae.encode_base(x), vae.detail_posterior(x).mean)
    assert error(x_hat, ours.decode(ours.encode(x))) < 1e-3


def test_a_davae_on_flux2_takes_only_images_of_whole_latent_blocks(ours):
    vae = DAVAE(ours, DAVAEConfig(D=16))
    side = checks.multiple(SimpleNamespace(D=16), vae)
    assert side == 2 * vae.f
    vae.encode(torch.zeros(1, 3, side, 3 * side))
    with pytest.raises(ValueError, match="made of 2x2 blocks"):
        vae.encode(torch.zeros(1, 3, vae.f, side))


@torch.no_grad()
def test_flux2_can_be_saved_loaded_and_measured_as_a_plain_vae(ours, tmp_path):
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    save_base_vae(ours, tmp_path / "flux2")
    again = load_base_vae(tmp_path / "flux2")
    assert torch.equal(again.encode(x), ours.encode(x)) and type(again) is type(ours)
    vae = DAVAE(load_base_vae(tmp_path / "flux2"), DAVAEConfig(D=16))
    assert build_vae(vae.config()).state_dict().keys() == vae.state_dict().keys()

    plain = load_davae(tmp_path / "flux2")
    plain.measure([x])
    z = plain.encode(x)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert (plain.decode(z) - ours.decode(ours.encode(x))).abs().max() < 1e-4


def test_odd_sizes_and_damaged_flux2_weights_are_refused(theirs, tmp_path):
    with pytest.raises(ValueError, match="both sides of the base image must be multiples of 2 f"):
        load_davae(save(theirs, tmp_path / "odd")).encode(torch.zeros(1, 3, 40, 32))
    sd = theirs.state_dict() | {"bn.running_var": torch.ones(5)}
    with pytest.raises(SystemExit, match=r"to_moments.2.std is \(5,\); wanted \(32,\)"):
        load_base_vae(save(theirs, tmp_path / "sizes", sd))
    sd = {key: weight for key, weight in theirs.state_dict().items() if key != "bn.running_var"}
    with pytest.raises(SystemExit, match="not a whole checkpoint .it lacks bn.running_var"):
        load_base_vae(save(theirs, tmp_path / "lacks", sd))


def save(theirs, folder, sd=None):
    """A diffusers folder; its weights are replaced by `sd` if given."""
    theirs.save_pretrained(folder)
    if sd is not None:
        save_file(sd, folder / "diffusion_pytorch_model.safetensors")
    return folder
