"""davae.py against closed forms and the paper's claims."""
import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from davae import DAVAE, AttnBlock, BaseVAE, DAVAEConfig, DownBlock, KLConfig, PlainVAE, Posterior, UpBlock
from davae import align_loss, base_image, group_mean, half, measure_channels
from support.weights import load_base_vae


# ---------------------------------------------------------------- alignment


def test_group_mean_takes_contiguous_groups_not_strided_ones():
    z_d = torch.arange(6.0).view(1, 6, 1, 1)                    # D = 6, C = 2: groups (0, 1, 2) and (3, 4, 5)
    assert group_mean(z_d, 2).flatten().tolist() == [1.0, 4.0]     # strided groups would give (2, 3)


def test_align_loss_is_zero_when_details_repeat_the_base_and_not_when_tiled():
    z = torch.randn(2, 4, 3, 3)
    assert align_loss(z, z.repeat_interleave(3, dim=1)) < 1e-12
    assert align_loss(z, z.repeat(1, 3, 1, 1)) > 0.1               # the same channels in strided order


def test_align_loss_by_example():
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    z_d = torch.stack([z[0, 0] + 1, z[0, 0] + 3]).unsqueeze(0)     # mean is z + 2: every squared error is 4
    assert align_loss(z, z_d).item() == 4.0


def test_align_loss_gradient_reaches_only_the_details():
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


def test_down_block_shortcut_is_a_group_mean_of_pixels_if_channels_divide():
    block = DownBlock(width=16, O=8)                               # 64 unshuffled channels, groups of 8
    torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.zeros_(block.conv.bias)
    assert block.proj is None
    x = torch.randn(2, 16, 6, 6)
    pixels = x.view(2, 16, 3, 2, 3, 2)                             # (b, c, row, i, column, j)
    unshuffled = pixels.permute(0, 1, 3, 5, 2, 4).reshape(2, 64, 3, 3)     # channel c*4 + i*2 + j
    assert torch.equal(block(x), unshuffled.view(2, 8, 8, 3, 3).mean(2))


def test_if_channels_do_not_divide_the_shortcut_is_learned_from_zero():
    block = DownBlock(width=512, O=192)                            # ImageNet: 2048 % 192 = 128
    assert tuple(block.proj.weight.shape) == (192, 2048, 1, 1)
    assert block.proj.weight.abs().max() == 0 and block.proj.bias is None
    assert tuple(block.conv.weight.shape) == (48, 512, 3, 3)
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
    kernel = torch.outer(taps, taps).view(1, 1, 4, 4)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate").view(3, 1, 10, 10)
    expected = F.conv2d(padded, kernel, stride=2).view(1, 3, 4, 4)
    assert torch.allclose(half(x), expected, atol=1e-12)


# ---------------------------------------------------------------- posterior


def test_kl_is_zero_at_the_standard_normal_and_twice_the_textbook_mean_elsewhere():
    assert Posterior(torch.zeros(1, 4, 2, 2)).kl() == 0
    mean = torch.full((1, 2, 1, 1), 0.5)
    logvar = torch.full((1, 2, 1, 1), -1.0)
    q = torch.distributions.Normal(0.5, math.exp(-0.5))
    textbook = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(Posterior(torch.cat([mean, logvar], 1)).kl(), 2 * textbook)


def test_the_kl_of_bfloat16_moments_is_computed_in_float32():
    moments = torch.randn(2, 8, 4, 4).bfloat16()
    assert torch.equal(Posterior(moments).kl(), Posterior(moments.float()).kl())


def test_logvar_is_clamped_as_in_the_pretrained_code():
    moments = torch.tensor([0.0, 0.0, -1000.0, 1000.0]).view(1, 4, 1, 1)
    assert Posterior(moments).logvar.flatten().tolist() == [-30.0, 20.0]


# ---------------------------------------------------------------- DA-VAE


def test_base_channels_equal_the_frozen_base_vae_on_the_half_size_image_bit_for_bit(make_base):
    base = make_base()
    reference = deepcopy(base)
    vae = DAVAE(base, DAVAEConfig(D=12))
    for p in vae.detail_encoder.parameters():
        torch.nn.init.normal_(p)                                   # whatever the detail path does
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        small = F.interpolate(x, scale_factor=0.5, mode="bicubic", align_corners=False)
        assert torch.equal(vae.encode(x)[:, :4], reference.encode(small))


def test_training_leaves_the_base_untouched(make_davae):
    vae = make_davae()
    before = {k: v.clone() for k, v in vae.base.state_dict().items()}
    opt = torch.optim.SGD([p for p in vae.parameters() if p.requires_grad], lr=1.0)
    rec = vae.train()(torch.rand(2, 3, 16, 16))
    loss = rec.x_hat.square().mean() + align_loss(rec.z, rec.z_d) + rec.posterior.kl()
    loss.backward()
    opt.step()
    assert all(torch.equal(v, before[k]) for k, v in vae.base.state_dict().items())
    assert not any(p.requires_grad for p in vae.base.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.detail_encoder.parameters())


def test_detail_encoder_and_decoder_start_as_copies_of_the_base(make_base):
    vae = DAVAE(make_base(), DAVAEConfig(D=12))
    for mine, theirs in ((vae.detail_encoder, vae.base.encoder), (vae.decoder, vae.base.decoder)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b) and a is not b


def test_decode_undoes_the_normalisation_of_encode(make_davae):
    vae = make_davae()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = vae.decode_raw(vae.encode_base(x), vae.detail_posterior(x).mean)
        assert torch.allclose(vae.decode(vae.encode(x)), raw, atol=1e-5)


def test_encode_gives_the_details_mode_or_a_sample_and_always_the_bases_mode(make_davae):
    vae = make_davae()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    mode = vae.encode(x)
    torch.manual_seed(0)
    sampled = vae.encode(x, sample=True)
    torch.manual_seed(0)
    with torch.no_grad():
        posterior = vae.detail_posterior(x)
        deviation = (0.5 * posterior.logvar).exp() * torch.randn_like(posterior.mean)
    z_d = mode[:, 4:] + deviation / vae.std.view(1, -1, 1, 1)
    assert torch.allclose(sampled, torch.cat([mode[:, :4], z_d], dim=1), atol=1e-5)
    assert torch.equal(vae.encode(x), mode) and (sampled - mode)[:, 4:].std() > 0.1


def test_measured_statistics_normalise_the_details(make_davae):
    vae = make_davae()
    images = [torch.rand(8, 3, 16, 16) * 2 - 1 for _ in range(3)]
    vae.measure(images)
    z_d = torch.cat([vae.encode(x) for x in images])[:, 4:]
    assert z_d.mean((0, 2, 3)).abs().max() < 1e-5
    assert (z_d.transpose(0, 1).flatten(1).std(1) - 1).abs().max() < 1e-5


def test_summed_statistics_of_shares_equal_those_of_all_images_and_zero_variance_is_harmless(make_davae):
    images = [torch.rand(4, 3, 16, 16) * 2 - 1 for _ in range(3)]
    whole, shared = make_davae(), make_davae()
    whole.measure(images)
    totals = []
    for share in (images[:1], images[1:], []):                     # of three processes, one without images
        shared.measure(share, total=lambda sums: totals.append(sums.clone()) or sums)
    shared.measure([], total=lambda _: sum(totals))
    assert torch.equal(shared.mean, whole.mean) and torch.equal(shared.std, whole.std)

    plain = PlainVAE(make_davae().base)
    for weight in plain.base.to_moments.parameters():
        torch.nn.init.zeros_(weight)                               # latents without any variance
    plain.measure(images)
    assert torch.isfinite(plain.encode(images[0])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_exact_even_of_latents_far_from_zero(make_base, dtype):
    """Sums in float32, or squares in the latents' own dtype, would lose a std far below the mean."""
    base = make_base()
    raw = (300 + 3 * torch.randn(6, 4, 8, 8)).to(dtype)
    measure_channels(base, raw.split(2), lambda sums: sums)
    channels = raw.double().transpose(0, 1).flatten(1)
    assert torch.allclose(base.mean.double(), channels.mean(1), rtol=1e-7)
    assert torch.allclose(base.std.double(), channels.std(1), rtol=1e-6)


def test_decode_base_is_the_base_decoder_on_the_base_channels(make_davae):
    vae = make_davae()
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        z = vae.encode(x)[:, :4]
        assert torch.equal(vae.decode_base(z), vae.base.decode(vae.base.encode(half(x))))


@pytest.mark.parametrize("rescale,scale", [(False, 1.0), (True, 4 / 3)])
def test_detail_dropout_drops_whole_images_and_rescales_only_when_asked(make_davae, rescale, scale):
    vae = make_davae(detail_dropout=0.25, rescale=rescale).train()
    seen = []

    def decode(z, z_d):
        seen.append(z_d)
        return torch.zeros(len(z), 3, 16, 16)

    vae.decode_raw = decode
    torch.manual_seed(0)
    rec = vae(torch.rand(64, 3, 16, 16))
    decoded = seen[0]
    dropped = decoded.abs().amax((1, 2, 3)) == 0
    assert 4 < dropped.sum() < 32
    assert torch.equal(decoded[~dropped], rec.z_d[~dropped] * scale)
    assert rec.z_d.abs().amax((1, 2, 3)).min() > 0                 # alignment sees what was dropped


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_detail_dropout_of_zero_or_one_has_no_exceptions(make_davae, monkeypatch, probability):
    vae = make_davae(detail_dropout=probability).train()
    vae.decode_raw = lambda z, z_d: z_d
    x = torch.rand(2, 3, 16, 16)
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.zeros(size))    # the least it can draw
    rec = vae(x)
    assert torch.equal(rec.x_hat, rec.z_d * (1 - probability))


def test_detail_noise_is_uniform_in_strength_and_scales_with_each_channels_std(make_davae):
    """Only the decoder sees it, and only in training passes: aligned details and latents have none."""
    vae = make_davae(detail_noise=2.0, detail_dropout=0.0).train()
    scales = torch.logspace(-1, 1, 12).view(12, 1, 1)
    details = torch.randn(256, 12, 4, 4) * scales
    vae.detail_posterior = lambda x: SimpleNamespace(sample=lambda: details, mean=details)
    seen = []
    vae.decode_raw = lambda z, z_d: seen.append(z_d)
    x = torch.rand(256, 3, 16, 16)
    torch.manual_seed(0)
    assert torch.equal(vae(x).z_d, details)

    noise = (seen[0] - details) / details.std(dim=(0, 2, 3), correction=0, keepdim=True)
    strength = noise.std(dim=(1, 2, 3))                            # of each image, over its 192 numbers
    assert strength.min() < 0.1 and 1.9 < strength.max() < 2.3
    assert strength.mean().item() == pytest.approx(1.0, abs=0.1)
    assert strength.std().item() == pytest.approx(2 / 12**0.5, abs=0.05)
    of_channels = noise.std(dim=(0, 2, 3))                         # E[s^2] = 4/3, whatever their scale
    assert torch.allclose(of_channels, torch.full((12,), (4 / 3)**0.5), rtol=0.1)
    encoded = (details - vae.mean[:, None, None]) / vae.std[:, None, None]
    assert torch.equal(vae.encode(x)[:, 4:], encoded)


def test_details_get_no_gradient_from_the_strength_of_their_noise(make_davae):
    """Else they would shrink to lower the noise, instead of standing out from it."""
    vae = make_davae(detail_noise=2.0, detail_dropout=0.0).train()
    details = torch.randn(4, 12, 4, 4, requires_grad=True)
    vae.detail_posterior = lambda x: SimpleNamespace(sample=lambda: details)
    vae.decode_raw = lambda z, z_d: z_d
    vae(torch.rand(4, 3, 16, 16)).x_hat.sum().backward()
    assert torch.equal(details.grad, torch.ones_like(details))


def test_a_plain_vae_is_the_base_vae_and_trains(make_base):
    base = make_base()
    vae = PlainVAE(base)
    x = torch.rand(1, 3, 8, 8)
    assert vae.f == 2
    assert all(p.requires_grad for p in vae.parameters())
    with torch.no_grad():
        z = base.encode(x)
        assert torch.equal(vae.encode(x), z)
        assert torch.equal(vae.decode(z), base.decode(z))


def test_davae_refuses_channels_and_sizes_that_do_not_divide(make_base, make_davae):
    with pytest.raises(ValueError, match="D=10 must be a multiple of base channels C=4"):
        DAVAE(make_base(), DAVAEConfig(D=10))
    vae, plain = make_davae(), PlainVAE(make_base())
    for model, W, H, f in ((vae, 18, 16, 4), (vae, 16, 18, 4), (plain, 8, 9, 2)):
        with pytest.raises(ValueError, match=f"image of {W}x{H} pixels: both sides must be multiples of {f}"):
            model.encode(torch.zeros(1, 3, H, W))


def test_attention_at_a_level_that_does_not_exist_is_refused():
    assert KLConfig(widths=(32, 64), attn=(0, 1)).attn == (0, 1)
    for level in (2, -1):
        with pytest.raises(ValueError, match=f"attn={level}: wanted 0 to 1, a level for each width"):
            KLConfig(widths=(32, 64), attn=(0, level))


def test_a_davae_on_full_size_bases_has_the_papers_shapes(full_size):
    sizes = {"VA-VAE f16d32": (96, (48, 512), (2048, 128)), "SD3 VAE diffusers": (16, (8, 512), (2048, 32))}
    for name, (D, down, up) in sizes.items():
        state = {key: torch.empty(shape, device="meta") for key, shape in full_size[name].items()}
        base = load_base_vae(state)
        vae = DAVAE(base, DAVAEConfig(D=D)).to("meta")
        assert tuple(vae.down.conv.weight.shape[:2]) == down
        assert tuple(vae.up.conv.weight.shape[:2]) == up
        assert (vae.down.proj is None) == (D == 16)
        assert vae.up.proj is None


# ---------------------------------------------------------------- attention of the base VAE


class Largest(TorchDispatchMode):
    """How many numbers the largest result of any operator has, and the operators' names."""

    def __init__(self):
        super().__init__()
        self.numbers = 0
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        self.names.add(func.overloadpacket.__name__)
        return out


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_attention_never_materialises_the_scores_of_all_pairs(layout, bfloat16):
    block = AttnBlock(width=8, groups=4)
    x = torch.randn(1, 8, 48, 64).to(memory_format=layout).requires_grad_()
    with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        block(x).sum().backward()
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert {flash, f"{flash}_backward"} <= largest.names
    assert largest.numbers < (48 * 64) ** 2 / 50


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 16, 6, 6), (1, 8, 5, 9), (3, 32, 1, 4), (2, 8, 1, 1)])
def test_attention_equals_explicit_softmax_attention(layout, shape, error):
    torch.manual_seed(0)
    block = AttnBlock(width=shape[1], groups=4)
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    out = block(x)
    out.square().sum().backward()

    exact = deepcopy(block).double()
    exact.zero_grad()
    x64 = x.detach().double().requires_grad_()
    y = exact.norm(x64)
    q, k, v = (conv(y).flatten(2) for conv in (exact.q, exact.k, exact.v))        # (B, width, h*w)
    scores = torch.einsum("bci,bcj->bij", q, k) / shape[1] ** 0.5
    y = torch.einsum("bij,bcj->bci", scores.softmax(-1), v).view(shape)
    wanted = x64 + exact.proj_out(y)
    wanted.square().sum().backward()

    assert error(out, wanted) < 1e-6 and error(x.grad, x64.grad) < 2e-6
    assert out.is_contiguous(memory_format=layout)                  # and stays in that layout
    for ours, theirs in zip(block.parameters(), exact.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 5e-6


# ---------------------------------------------------------------- the ratio r


def test_the_quarter_size_base_image_is_the_image_halved_twice():
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    assert torch.equal(base_image(x, 2), half(x))
    assert torch.equal(base_image(x, 4), half(half(x)))


def test_at_r_4_base_channels_equal_the_base_vae_on_the_quarter_size_image_bit_for_bit(make_base):
    base = make_base()
    reference = deepcopy(base)
    vae = DAVAE(base, DAVAEConfig(D=16, r=4)).eval()
    x = torch.rand(2, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        z_all = vae.encode(x)
        assert vae.f == 4 * base.f and tuple(z_all.shape) == (2, 20, 4, 2)
        assert torch.equal(z_all[:, :4], reference.encode(half(half(x))))
        assert vae.decode(z_all).shape == x.shape
        assert torch.equal(vae.decode_base(z_all[:, :4]), reference.decode(z_all[:, :4]))


def test_the_blocks_shortcuts_at_r_4_are_group_means_of_pixels_and_repeated_channels():
    down = DownBlock(width=8, O=32, r=4)                           # 128 unshuffled channels, groups of 4
    up = UpBlock(channels=8, width=4, r=4)                         # 64 channels before the shuffle, 8 of each
    for block in (down, up):
        torch.nn.init.zeros_(block.conv.weight)
        torch.nn.init.zeros_(block.conv.bias)
    x = torch.randn(2, 8, 8, 12)
    pixels = x.view(2, 8, 2, 4, 3, 4).permute(0, 1, 3, 5, 2, 4).reshape(2, 128, 2, 3)
    assert torch.equal(down(x), pixels.view(2, 32, 4, 2, 3).mean(2))

    z = torch.randn(1, 8, 3, 2)
    before = z[:, torch.arange(64) // 8].view(1, 4, 4, 4, 3, 2)    # feature, row, column of its 4x4 pixels
    assert torch.equal(up(z), before.permute(0, 1, 4, 2, 5, 3).reshape(1, 4, 12, 8))


def test_r_is_a_power_of_two_and_D_fits_the_down_block(make_base):
    for r in (0, 1, 3, 6):
        with pytest.raises(ValueError, match=f"r={r}: wanted 2, 4, 8"):
            DAVAEConfig(D=12, r=r)
    with pytest.raises(ValueError, match="makes 24 channels by pixel-unshuffle: wanted a multiple of 16"):
        DAVAE(make_base(), DAVAEConfig(D=12, r=4))


def test_batch_statistics_and_dropout_of_the_frozen_base_are_off_in_training_and_on_in_the_copies():
    class Noisy(BaseVAE):
        def __init__(self):
            super().__init__(C=4, f=2, width=8)
            self.encoder = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 2, stride=2), torch.nn.BatchNorm2d(8), torch.nn.Dropout(0.5))
            self.to_moments = torch.nn.Conv2d(8, 8, 1)
            self.from_latent = torch.nn.Conv2d(4, 8, 1)
            self.decoder = torch.nn.ConvTranspose2d(8, 3, 2, stride=2)

    base = Noisy().eval()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        z = base.encode(half(x))
    vae = DAVAE(base, DAVAEConfig(D=4)).eval().train()
    assert torch.equal(vae(x).z, z) and torch.equal(vae(x).z, z)
    assert (base.encoder[1].running_mean == 0).all() and base.encoder[1].num_batches_tracked == 0
    assert vae.detail_encoder[1].num_batches_tracked == 2
    assert not torch.equal(vae.detail_encoder(x), vae.detail_encoder(x))


def test_a_custom_base_needs_four_parts_and_nothing_else():
    class Pixels(BaseVAE):
        """Averages of 2x2 pixels as the latent."""

        def __init__(self):
            super().__init__(C=3, f=2, width=12)
            self.encoder = torch.nn.PixelUnshuffle(2)
            self.to_moments = torch.nn.Conv2d(12, 6, 1)
            self.from_latent = torch.nn.Conv2d(3, 12, 1)
            self.decoder = torch.nn.Sequential(torch.nn.ConvTranspose2d(12, 3, 2, stride=2))

    vae = DAVAE(Pixels(), DAVAEConfig(D=6))
    x = torch.rand(2, 3, 8, 8)
    rec = vae(x)
    assert rec.x_hat.shape == x.shape and rec.z.shape == (2, 3, 2, 2) and rec.z_d.shape == (2, 6, 2, 2)
    assert vae.config()["base"] == {"kind": "Pixels"}
