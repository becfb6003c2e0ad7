"""davae.py against recorded outputs of VA-VAE's code, diffusers, closed forms, and the claims of the paper."""
import json
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from davae import DAVAE, AutoencoderKL, DownBlock, KLConfig, Posterior, UpBlock, align_loss, group_mean, half
from support.formats import export_kl
from support.weights import load_base_vae
from support import metrics, runs, weights

FULL_SIZE = json.loads((Path(__file__).parent / "fixtures" / "full_size_keys.json").read_text())


def error(x, ref):
    return ((x - ref).abs().max() / ref.abs().max().clamp(min=1)).item()


def tiny_base(C=4, seed=0):
    torch.manual_seed(seed)
    vae = AutoencoderKL(KLConfig(C=C, ch=8, ch_mult=(1, 2), blocks=1, groups=4)).eval()
    vae.mean.uniform_(-1, 1)
    vae.std.uniform_(0.5, 2)
    return vae


def tiny_davae(D=12, **options):
    vae = DAVAE(tiny_base(), D, **options).eval()
    torch.manual_seed(1)
    vae.mean.uniform_(-1, 1)
    vae.std.uniform_(0.5, 2)
    return vae


# ---------------------------------------------------------------- alignment


def test_group_mean_takes_contiguous_groups_not_strided_ones():
    z_d = torch.arange(6.0).view(1, 6, 1, 1)                       # D = 6, C = 2: groups (0, 1, 2) and (3, 4, 5)
    assert group_mean(z_d, 2).flatten().tolist() == [1.0, 4.0]     # strided groups would give (2, 3)


def test_align_loss_is_zero_when_details_repeat_the_base_and_not_when_tiled():
    z = torch.randn(2, 4, 3, 3)
    assert align_loss(z, z.repeat_interleave(3, dim=1)) < 1e-12
    assert align_loss(z, z.repeat(1, 3, 1, 1)) > 0.1               # the same channels in strided order


def test_align_loss_by_hand():
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    z_d = torch.stack([z[0, 0] + 1, z[0, 0] + 3]).unsqueeze(0)     # mean is z + 2: every squared error is 4
    assert align_loss(z, z_d).item() == 4.0


def test_align_loss_gradient_reaches_the_details_only():
    z = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    z_d = torch.randn(1, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    align_loss(z, z_d).backward()
    expected = 2 * (z_d.view(1, 2, 3, 2, 2).mean(2) - z).detach() / z.numel() / 3
    assert z.grad is None
    assert torch.allclose(z_d.grad, expected.repeat_interleave(3, 1), atol=1e-6)


def test_group_mean_refuses_unequal_groups():
    with pytest.raises(ValueError, match="D=7 must be a multiple of base channels C=2"):
        group_mean(torch.zeros(1, 7, 1, 1), 2)


# ---------------------------------------------------------------- down and up blocks


def test_down_block_shortcut_is_the_group_mean_of_pixels_where_it_divides():
    block = DownBlock(width=16, O=8)                               # 64 unshuffled channels, groups of 8
    torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.zeros_(block.conv.bias)
    assert block.proj is None
    x = torch.randn(2, 16, 6, 6)
    pixels = x.view(2, 16, 3, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 64, 3, 3)    # channel c*4 + i*2 + j
    assert torch.equal(block(x), pixels.view(2, 8, 8, 3, 3).mean(2))


def test_down_block_learns_a_zero_shortcut_where_it_does_not_divide():
    block = DownBlock(width=512, O=192)                            # ImageNet: 2048 % 192 = 128
    assert tuple(block.proj.weight.shape) == (192, 2048, 1, 1) and block.proj.bias is None
    assert block.proj.weight.abs().max() == 0 and tuple(block.conv.weight.shape) == (48, 512, 3, 3)
    x = torch.randn(1, 512, 4, 4)
    assert torch.equal(block(x), F.pixel_unshuffle(block.conv(x), 2))


@pytest.mark.parametrize("channels,width", [(128, 512), (32, 512), (64, 64)])
def test_up_block_shortcut_is_nearest_upsampling_of_repeated_channels(channels, width):
    block = UpBlock(channels, width)
    torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.zeros_(block.conv.bias)
    z = torch.randn(1, channels, 3, 2)
    k = torch.arange(width) // (width // channels)
    assert torch.equal(block(z), F.interpolate(z, scale_factor=2.0, mode="nearest")[:, k])


def test_half_is_the_four_tap_filter():
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    taps = torch.tensor([-3.0, 19, 19, -3], dtype=torch.float64) / 32
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    expected = F.conv2d(padded.view(3, 1, 10, 10), (taps[:, None] * taps).view(1, 1, 4, 4), stride=2).view(1, 3, 4, 4)
    assert torch.allclose(half(x), expected, atol=1e-12)


# ---------------------------------------------------------------- posterior


def test_kl_is_zero_at_the_standard_normal_and_twice_the_textbook_mean_elsewhere():
    assert Posterior(torch.zeros(1, 4, 2, 2)).kl() == 0
    mean, logvar = torch.full((1, 2, 1, 1), 0.5), torch.full((1, 2, 1, 1), -1.0)
    q = torch.distributions.Normal(0.5, math.exp(-0.5))
    textbook = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(Posterior(torch.cat([mean, logvar], 1)).kl(), 2 * textbook)


def test_logvar_is_clamped_as_in_the_pretrained_code():
    moments = torch.tensor([0.0, 0.0, -1000.0, 1000.0]).view(1, 4, 1, 1)
    assert Posterior(moments).logvar.flatten().tolist() == [-30.0, 20.0]


# ---------------------------------------------------------------- DA-VAE


def test_base_channels_equal_the_frozen_base_vae_on_the_half_size_image_bit_for_bit():
    base = tiny_base()
    reference = deepcopy(base)
    vae = DAVAE(base, 12)
    for p in vae.detail_encoder.parameters():
        torch.nn.init.normal_(p)                                   # whatever the detail path does
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        small = F.interpolate(x, scale_factor=0.5, mode="bicubic", align_corners=False)
        assert torch.equal(vae.encode(x)[:, :4], reference.encode(small))


def test_training_leaves_the_base_untouched():
    vae = tiny_davae()
    before = {k: v.clone() for k, v in vae.base.state_dict().items()}
    opt = torch.optim.SGD([p for p in vae.parameters() if p.requires_grad], lr=1.0)
    rec = vae.train()(torch.rand(2, 3, 16, 16))
    (rec.x_hat.square().mean() + align_loss(rec.z, rec.z_d) + rec.posterior.kl()).backward()
    opt.step()
    assert all(torch.equal(v, before[k]) for k, v in vae.base.state_dict().items())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.detail_encoder.parameters())


def test_detail_encoder_and_decoder_start_as_copies_of_the_base():
    vae = DAVAE(tiny_base(), 12)
    for mine, theirs in ((vae.detail_encoder, vae.base.encoder), (vae.decoder, vae.base.decoder)):
        assert all(torch.equal(a, b) and a is not b for a, b in zip(mine.parameters(), theirs.parameters()))


def test_decode_undoes_the_normalisation_of_encode():
    vae = tiny_davae()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = vae._decode(vae.encode_base(x), vae.detail_posterior(x).mean)
        assert torch.allclose(vae.decode(vae.encode(x)), raw, atol=1e-5)


def test_measured_statistics_normalise_the_details():
    vae, images = tiny_davae(), [torch.rand(8, 3, 16, 16) * 2 - 1 for _ in range(3)]
    vae.measure(images)
    z_d = torch.cat([vae.encode(x) for x in images])[:, 4:]
    assert z_d.mean((0, 2, 3)).abs().max() < 1e-5
    assert (z_d.transpose(0, 1).flatten(1).std(1) - 1).abs().max() < 1e-5


def test_decode_base_is_the_base_decoder_on_the_base_channels():
    vae, x = tiny_davae(), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        z_all = vae.encode(x)
        assert torch.equal(vae.decode_base(z_all[:, :4]), vae.base.decode(vae.base.encode(half(x))))


@pytest.mark.parametrize("rescale,scale", [(False, 1.0), (True, 2.0)])
def test_detail_dropout_drops_whole_images_and_rescales_only_when_asked(rescale, scale):
    vae, seen = tiny_davae(detail_dropout=0.5, rescale=rescale).train(), []
    vae._decode = lambda z, z_d: seen.append(z_d) or torch.zeros(len(z), 3, 16, 16)
    torch.manual_seed(0)
    rec = vae(torch.rand(64, 3, 16, 16))
    dropped = seen[0].abs().amax((1, 2, 3)) == 0
    assert 16 < dropped.sum() < 48
    assert torch.equal(seen[0][~dropped], rec.z_d[~dropped] * scale)
    assert rec.z_d.abs().amax((1, 2, 3)).min() > 0                 # alignment sees what was dropped


def test_without_detail_channels_it_is_the_base_vae_and_trains():
    base = tiny_base()
    vae, x = DAVAE(base, 0), torch.rand(1, 3, 8, 8)
    assert vae.f == 2 and all(p.requires_grad for p in vae.parameters())
    with torch.no_grad():
        assert torch.equal(vae.encode(x), base.encode(x)) and torch.equal(vae.decode(vae.encode(x)), base.decode(base.encode(x)))


def test_davae_refuses_channels_and_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="D=10 must be a multiple of base channels C=4"):
        DAVAE(tiny_base(), 10)
    with pytest.raises(ValueError, match="image of 18x16 pixels: both sides must be multiples of 4"):
        tiny_davae().encode(torch.zeros(1, 3, 16, 18))


def test_a_saved_davae_loads_to_the_same_function(tmp_path):
    vae, x = tiny_davae(), torch.rand(1, 3, 16, 16)
    runs.save_checkpoint(tmp_path / "run", 3, {"model": vae.state_dict()}, {}, {"model": vae.config()})
    loaded = weights.load_davae(tmp_path / "run")
    assert loaded.config() == vae.config()
    assert torch.equal(loaded.encode(x), vae.encode(x))
    assert torch.equal(load_base_vae(tmp_path / "run").encode(x), vae.base.encode(x))


# ---------------------------------------------------------------- foreign weights


@torch.no_grad()
def test_vavae_style_checkpoint_reproduces_the_original_code(golden):
    weights, t, _ = golden("vavae_style")
    extras = {"foundation_model.x": torch.ones(1), "linear_proj.weight": torch.ones(1), "loss.logvar": torch.ones(1)}
    vae = load_base_vae({"state_dict": {**weights, **extras}})
    assert (vae.C, vae.f, vae.cfg.attn, vae.cfg.quant) == (8, 16, (4,), True)
    posterior = vae.posterior(t["in/image"])
    assert error(posterior.mean, t["out/mean"]) < 5e-6
    std = torch.exp(0.5 * posterior.logvar)
    assert error(std, t["out/std"]) < 5e-6
    assert error(posterior.mean + std * t["in/eps"], t["out/sample"]) < 5e-6
    assert error(vae.decode(t["in/latent"]), t["out/decoded"]) < 5e-6
    assert error(Posterior(t["in/wide_moments"]).logvar, t["out/wide_logvar"]) == 0
    assert error(posterior.kl() / 2 * posterior.mean[0].numel(), t["out/kl"][0]) < 5e-6   # theirs: half the sum


@torch.no_grad()
def test_group_norm_epsilon_is_the_one_that_the_checkpoint_was_trained_with(golden):
    weights, t, _ = golden("vavae_style")
    vae = load_base_vae(weights)
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-5
    assert error(vae.decode(t["in/latent"]), t["out/decoded"]) > 1e-3      # the comparison above can fail


@torch.no_grad()
@pytest.mark.parametrize("old_names", [False, True])
def test_sd3_vae_equals_diffusers(old_names, tmp_path):
    metrics.import_torchvision()
    from diffusers import AutoencoderKL as Theirs
    torch.manual_seed(0)
    theirs = Theirs(block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=2,
                    up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=16, use_quant_conv=False,
                    use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609).eval()
    for p in theirs.parameters():
        p.add_(0.1 * torch.randn_like(p))
    if old_names:
        new = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
        source = {k: v for k, v in theirs.state_dict().items()}
        for a, b in new.items():
            source = {k.replace(a, b): v for k, v in source.items()}
    else:
        theirs.save_pretrained(tmp_path)
        source = tmp_path
    vae = load_base_vae(source)
    x = torch.rand(2, 3, 24, 16) * 2 - 1
    z = (theirs.encode(x).latent_dist.mode() - 0.0609) * 1.5305
    assert error(vae.encode(x), z) < 5e-6
    assert error(vae.decode(z), theirs.decode(z / 1.5305 + 0.0609).sample) < 5e-6


@pytest.mark.parametrize("name,count,f", [("VA-VAE f16d32", 69_836_067, 16), ("SD3 VAE diffusers", 83_819_683, 8),
                                          ("SD3 VAE single-file", 83_819_683, 8)])
def test_full_size_checkpoints_fit_without_a_key_missing_or_left(name, count, f):
    vae = load_base_vae({k: torch.empty(shape, device="meta") for k, shape in FULL_SIZE[name].items()})
    assert sum(p.numel() for p in vae.parameters()) == count and vae.f == f
    back = export_kl(vae, diffusers="diffusers" in name)
    prefix = "first_stage_model." if "single" in name else ""
    assert {prefix + k: list(v.shape) for k, v in back.items()} == FULL_SIZE[name]


def test_export_of_a_vae_is_the_file_it_came_from(golden, tmp_path):
    weights, _, _ = golden("vavae_style")
    back = export_kl(load_base_vae(weights))
    assert back.keys() == weights.keys() and all(torch.equal(back[k], weights[k].float()) for k in weights)
    metrics.import_torchvision()
    from diffusers import AutoencoderKL as Theirs
    theirs = Theirs(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=16,
                    up_block_types=("UpDecoderBlock2D",) * 2, use_quant_conv=False, use_post_quant_conv=False).state_dict()
    back = export_kl(load_base_vae(theirs), diffusers=True)
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in theirs)


def test_va_vaes_latent_statistics_are_read_from_the_file_beside_it_and_missed_aloud(golden, tmp_path, capsys):
    weights, t, _ = golden("vavae_style")
    torch.save({"state_dict": weights}, tmp_path / "vavae.pt")
    plain = load_base_vae(tmp_path / "vavae.pt")
    assert "no latents_stats.pt beside it" in capsys.readouterr().out
    mean, std = torch.randn(1, 8, 1, 1), torch.rand(1, 8, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    vae = load_base_vae(tmp_path / "vavae.pt")
    assert capsys.readouterr().out == ""
    with torch.no_grad():
        assert torch.allclose(vae.encode(t["in/image"]), (plain.encode(t["in/image"]) - mean) / std, atol=1e-5)
        assert torch.allclose(vae.decode((t["in/latent"] - mean) / std), plain.decode(t["in/latent"]), atol=1e-4)


def test_davae_of_the_full_size_bases_has_the_papers_shapes():
    for name, D, down, up in (("VA-VAE f16d32", 96, (48, 512), (2048, 128)), ("SD3 VAE diffusers", 16, (8, 512), (2048, 32))):
        base = load_base_vae({k: torch.empty(s, device="meta") for k, s in FULL_SIZE[name].items()})
        vae = DAVAE(base, D).to("meta")
        assert tuple(vae.down.conv.weight.shape[:2]) == down and tuple(vae.up.conv.weight.shape[:2]) == up
        assert (vae.down.proj is None) == (D == 16) and vae.up.proj is None


def test_files_that_are_no_autoencoder_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="not an autoencoder .it holds blocks.0.attn.qkv.weight"):
        load_base_vae({"blocks.0.attn.qkv.weight": torch.ones(1)})
    with pytest.raises(SystemExit, match="no such file"):
        load_base_vae(tmp_path / "missing.pt")


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
