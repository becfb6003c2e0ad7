"""support/dcae.py and support/dcae_names.py: DC-AE 1.0, Sana's and 1.5 as a base VAE, against diffusers."""
import json
import re

import pytest
import torch

from davae import DAVAE, DAVAEConfig, PlainVAE, half
from support import dcae, dcae_names, metrics
from support.bases import DCAE
from support.fit import fit_new_blocks
from support.weights import build_vae, load_base_vae, load_davae, save_base_vae

RES, VIT = "ResBlock", "EfficientViTBlock"
WIDTHS = (128, 256, 512, 512, 1024, 1024, 2048, 2048)


@pytest.fixture(scope="module")
def theirs():
    """diffusers' module with AutoencoderDC and its blocks."""
    metrics.import_torchvision()
    from diffusers.models.autoencoders import autoencoder_dc
    return autoencoder_dc


def randomised(module, seed=0):
    """In eval mode, with random parameters and statistics, including the norms', which begin as 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for x in [*module.parameters(), *module.buffers()]:
        if x.is_floating_point():
            x.data = x + 0.1 * torch.randn(x.shape, generator=generator)
    for name, x in module.named_buffers():
        if name.endswith("running_var"):
            x.data = x.abs() + 0.1
    return module.eval()


# ---------------------------------------------------------------- block by block


def in_our_names(block):
    """The weights of one of diffusers' blocks under our names, found by placing it in an encoder."""
    place = "encoder.down_blocks.1.0."
    sd = {place + key: weight for key, weight in block.state_dict().items() if "num_batches" not in key}
    sd = {dcae_names.our_name(key): weight for key, weight in dcae_names.joined(sd).items()}
    like = "encoder.stages.1.0."
    return {k.removeprefix(like): w[:, :, None, None] if w.ndim == 2 else w for k, w in sd.items()}


@torch.no_grad()
def same_block(error, block, ours, x):
    randomised(block)
    ours.load_state_dict(in_our_names(block))
    difference = error(ours.eval()(x), block(x))
    assert difference < 1e-5, difference
    return difference


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_res_block_equals_diffusers_with_either_norm(error, theirs, batch_norm):
    norm, act = ("batch_norm", "relu") if batch_norm else ("rms_norm", "silu")
    block = theirs.ResBlock(48, 48, norm_type=norm, act_fn=act)
    same_block(error, block, dcae.ResBlock(48, batch_norm), torch.randn(2, 48, 6, 10))


@pytest.mark.parametrize("nearby", [False, True])
@pytest.mark.parametrize("side", [4, 9])                # diffusers computes all scores up to 32 positions
def test_an_efficientvit_block_equals_diffusers_with_and_without_neighbourhoods(error, theirs, nearby, side):
    scales = (5,) if nearby else ()
    block = theirs.EfficientViTBlock(
        64, attention_head_dim=32, qkv_multiscales=scales, norm_type="rms_norm")
    same_block(error, block, dcae.EViTBlock(64, nearby), torch.randn(2, 64, side, side))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
def test_every_kind_of_down_block_equals_diffusers(error, theirs, strided, shortcut):
    block = theirs.DCDownBlock2d(16, 32, downsample=not strided, shortcut=shortcut)
    same_block(error, block, dcae.Down(16, 32, strided, shortcut), torch.randn(2, 16, 8, 12))


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
def test_every_kind_of_up_block_equals_diffusers(error, theirs, nearest, shortcut):
    block = theirs.DCUpBlock2d(32, 16, interpolate=nearest, shortcut=shortcut)
    same_block(error, block, dcae.Up(32, 16, nearest, shortcut), torch.randn(2, 32, 8, 12))


def test_attention_over_positions_zeroed_by_relu_is_zero_with_zero_gradients():
    qkv = (-torch.rand(1, 96, 3, 3)).requires_grad_()
    y = dcae.relu_attention(qkv)
    y.sum().backward()
    assert y.abs().max() == 0 and qkv.grad.abs().max() == 0


def test_attention_is_summed_in_float32_under_autocast():
    qkv = torch.rand(1, 192, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dcae.relu_attention(qkv), dcae.relu_attention(qkv.float()))
    positions = qkv.flatten(2).unflatten(1, (2, 3, 32))
    q, k, v = positions.unbind(2)
    scores = q.transpose(-1, -2) @ k                                  # by definition: all pairs
    y = (scores @ v.transpose(-1, -2)) / scores.sum(-1, keepdim=True)
    ours = dcae.relu_attention(qkv).flatten(2).unflatten(1, (2, 32))
    assert (ours - y.transpose(-1, -2)).abs().max() < 1e-6


# ---------------------------------------------------------------- whole autoencoders, small


def stages(n, res, vits, norms=("rms_norm", "rms_norm")):
    """diffusers' settings with one entry per stage: n stages, the first `res` with ResBlocks."""
    def per_stage(first, other):
        return [first] * res + [other] * (n - res)
    scales = per_stage((), (5,) if vits == "nearby" else ())
    return dict(
        encoder_block_types=per_stage(RES, VIT), decoder_block_types=per_stage(RES, VIT),
        encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        decoder_norm_types=per_stage(*norms),
        decoder_act_fns=per_stage("relu" if norms[0] == "batch_norm" else "silu", "silu"))


def sizes(widths, encoder, decoder, C):
    return dict(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=C,
        encoder_layers_per_block=encoder, decoder_layers_per_block=decoder)


RESIDUAL_ONLY = dict(encoder_out_shortcut=False, decoder_in_shortcut=False, decoder_conv_act_fn="silu")
SANA = dict(downsample_block_type="conv", upsample_block_type="interpolate")
LITE = dict(
    downsample_block_type="conv", decoder_conv_act_fn="silu", decoder_block_types=RES,
    decoder_qkv_multiscales=((),) * 4)


def family(name, widths=(16, 32, 32, 64), C=8):
    """The settings that make diffusers' AutoencoderDC a DC-AE of this family, with few blocks."""
    n = len(widths)
    if name == "1.0":
        norms = ("batch_norm", "rms_norm")
        return sizes(widths, (0, 2, 1, 1), (0, 1, 2, 1), C) | stages(n, 2, "plain", norms)
    if name == "sana":
        return sizes(widths, (1, 1, 1, 2), (2, 1, 1, 1), C) | stages(n, 2, "nearby") | SANA
    if name == "lite":
        return sizes(widths, (1, 1, 1, 2), (0, 1, 2, 1), C) | stages(n, 2, "nearby") | LITE
    return sizes(widths, (0, 1, 2, 1), (0, 1, 2, 1), C) | stages(n, n, "none") | RESIDUAL_ONLY


FAMILIES = ["1.0", "sana", "lite", "1.5"]


@pytest.fixture(scope="module")
def small(theirs):
    """small(name, **changes) -> diffusers' small AutoencoderDC of that family, with random weights."""
    def make(name, **changes):
        torch.manual_seed(0)
        return randomised(theirs.AutoencoderDC(**family(name) | changes))
    return make


def original_names(sd, ends=True, strided=False):
    """diffusers' names -> those of the authors' own files."""
    found = {}
    blocks = {
        "attn.to_qkv_multiscale.0.proj_in": "context_module.main.aggreg.0.0",
        "attn.to_qkv_multiscale.0.proj_out": "context_module.main.aggreg.0.1",
        "attn.to_out": "context_module.main.proj.conv", "attn.norm_out": "context_module.main.proj.norm",
        "attn.to_q": "context_module.main.qkv.conv",
        "conv_out.conv_inverted": "local_module.main.inverted_conv.conv",
        "conv_out.conv_depth": "local_module.main.depth_conv.conv",
        "conv_out.conv_point": "local_module.main.point_conv.conv",
        "conv_out.norm": "local_module.main.point_conv.norm",
        "conv1": "main.conv1.conv", "conv2": "main.conv2.conv", "norm": "main.conv2.norm",
    }
    outside = {
        "encoder.conv_in": "encoder.project_in.conv", "encoder.conv_in.conv": "encoder.project_in.conv.conv",
        "encoder.conv_out": f"encoder.project_out.{'main.' if ends else ''}op_list.0.conv",
        "decoder.conv_in": f"decoder.project_in.{'main.' if ends else ''}conv",
        "decoder.norm_out": "decoder.project_out.op_list.0",
        "decoder.conv_out": "decoder.project_out.op_list.2.conv",
        "decoder.conv_out.conv": "decoder.project_out.op_list.2.conv.conv",
    }
    for key, weight in sd.items():
        layer, _, part = key.rpartition(".")
        if layer in outside:
            found[f"{outside[layer]}.{part}"] = weight
            continue
        if layer.endswith(("to_k", "to_v")):
            continue
        if layer.endswith("to_q"):
            weight = torch.cat([sd[key.replace("to_q", f"to_{x}")] for x in "qkv"])
        half_, _, stage, block, *rest = layer.split(".")
        down = "main.conv" if strided and half_ == "encoder" else "main.conv.conv"
        layer = (blocks | {"conv": down})[".".join(rest)]
        if layer.endswith(("qkv.conv", "proj.conv")):
            weight = weight[:, :, None, None]
        found[f"{half_}.stages.{stage}.op_list.{block}.{layer}.{part}"] = weight
    return found


@pytest.fixture
def small_original(small):
    """small_original(name) -> the state dict of that autoencoder in the authors' names."""
    def make(name):
        return original_names(small(name).state_dict(), name != "1.5", name in ("sana", "lite"))
    return make


@pytest.mark.parametrize("name", ["1.0", "sana", "1.5"])            # diffusers takes lite for Sana's
def test_the_original_names_in_these_tests_are_those_diffusers_converts(small, small_original, name):
    from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
    back = convert_autoencoder_dc_checkpoint_to_diffusers(small_original(name))
    wanted = small(name).state_dict()
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key].squeeze(), wanted[key].squeeze()) for key in wanted)


@torch.no_grad()
@pytest.mark.parametrize("form", ["folder", "diffusers", "original"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_equals_diffusers_from_each_kind_of_file(
        error, small, small_original, tmp_path, name, form):
    model = small(name, scaling_factor=0.4)
    scale = 0.4 if form == "folder" else 1
    source = model.state_dict()
    if form == "folder":
        model.save_pretrained(tmp_path)
        source = tmp_path
    if form == "original":
        source = small_original(name)
    vae = load_base_vae(source)
    assert vae.f == 8 and vae.C == 8 and not vae.training

    x = torch.rand(2, 3, 64, 96) * 2 - 1
    raw = model.encode(x).latent
    z = vae.encode(x)
    assert error(z, scale * raw) < 1e-5
    assert error(vae.decode(z), model.decode(raw).sample) < 1e-5


@torch.no_grad()
def test_stated_settings_override_published_ones(error, small, tmp_path):
    model = small("1.0", **RESIDUAL_ONLY)                            # 1.0 without shortcuts: not published
    model.save_pretrained(tmp_path)
    z = torch.randn(1, 8, 8, 8)
    assert error(load_base_vae(tmp_path).decode(z), model.decode(z).sample) < 1e-5

    model = small("1.5", encoder_out_shortcut=True, decoder_in_shortcut=True)   # nor is 1.5 with them
    vae = load_base_vae(original_names(model.state_dict(), ends=True))
    assert error(vae.decode(z), model.decode(z).sample) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("spoil", ["ends", "relu", "nearby"])
def test_settings_invisible_in_shapes_matter(error, small, spoil):
    name = "sana" if spoil == "nearby" else "1.0"
    model = small(name)
    vae = load_base_vae(model.state_dict())
    z = torch.randn(1, 8, 8, 8)
    if spoil == "nearby":                                            # the two halves of the heads swapped
        for block in vae.modules():
            if isinstance(block, dcae.LinearAttention):
                block.proj.weight.data = block.proj.weight.data.roll(64, 1)
    if spoil == "relu":
        vae.decoder.act = torch.nn.SiLU()
    if spoil == "ends":
        vae.from_latent.shortcut = False
    assert error(vae.decode(z), model.decode(z).sample) > 1e-3       # the comparisons above can fail


def test_the_latents_stem_is_linear_so_a_davae_enters_before_any_nonlinearity(small):
    stem = load_base_vae(small("1.0").state_dict()).from_latent
    a, b = torch.randn(2, 1, 8, 4, 4)
    zero = stem(torch.zeros_like(a))
    assert torch.allclose(stem(a + b) - zero, stem(a) - zero + stem(b) - zero, atol=1e-5)


@pytest.mark.parametrize("name", ["1.0", "1.5"])
def test_the_closed_form_with_all_directions_equals_the_bases_full_size_decode(small, name):
    base = load_base_vae(small(name).state_dict()).double()
    vae = DAVAE(base, DAVAEConfig(D=4 * base.C, latent_shortcut=True)).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 3, 8 * vae.f, 8 * vae.f, generator=generator, dtype=torch.float64) * 2 - 1
    fit_new_blocks(vae, x.split(4), strength=1e-13)
    with torch.no_grad():
        assert torch.allclose(vae.decode(vae.encode(x[:2])), base.decode(base.encode(x[:2])), atol=1e-5)


# ---------------------------------------------------------------- the published sizes


def full_size(name):
    """Settings of diffusers' AutoencoderDC for a published file."""
    if name == "f32c32-sana":
        return sizes(WIDTHS[:6], (2, 2, 2, 3, 3, 3), (3,) * 6, 32) | stages(6, 3, "nearby") | SANA
    if name == "lite-f32c32-sana":
        lite = sizes(WIDTHS[:6], (2, 2, 2, 3, 3, 3), (0, 3, 5, 4, 4, 4), 32) | stages(6, 3, "nearby")
        return lite | LITE | dict(decoder_qkv_multiscales=((),) * 6)
    if name.startswith("1.5"):
        n = 6 if "f32" in name else 7
        blocks = (0, 5, 10) + (4,) * (n - 3)
        widths = WIDTHS[:6] + (1024,) * (n - 6)
        return sizes(widths, blocks, blocks, 128) | stages(n, n, "none") | RESIDUAL_ONLY
    n, C = {"f32c32": (6, 32), "f64c128": (7, 128), "f128c512": (8, 512)}[name]
    vits = (2,) * (n - 3)
    blocks = sizes(WIDTHS[:n], (0, 4, 8, *vits), (0, 5, 10, *vits), C)
    return blocks | stages(n, 3, "plain", ("batch_norm", "rms_norm"))


@pytest.mark.parametrize("name, f, encoder, decoder", [
    ("f32c32", 32, 123_172_384, 200_184_076),
    ("f64c128", 64, 264_550_528, 412_345_612),
    ("f128c512", 128, 415_661_056, 705_021_196),
    ("f32c32-sana", 32, 153_027_104, 159_223_171),
    ("lite-f32c32-sana", 32, 153_027_104, 268_154_124),
    ("1.5-f32c128", 32, 228_609_408, 295_000_332),
    ("1.5-f64c128", 64, 306_478_720, 408_262_924),
])
def test_the_published_sizes_load_with_no_key_missing_or_left_over(theirs, name, f, encoder, decoder):
    settings = full_size(name)
    with torch.device("meta"):
        sd = theirs.AutoencoderDC(**settings).state_dict()
    ends = settings.get("encoder_out_shortcut", True)
    strided = settings.get("downsample_block_type") == "conv"
    for weights in (sd, original_names(sd, ends, strided)):
        vae = load_base_vae(weights)
        assert vae.f == f and vae.C == settings["latent_channels"] and vae.cfg.ends == ends
        assert sum(p.numel() for m in (vae.encoder, vae.to_moments) for p in m.parameters()) == encoder
        assert sum(p.numel() for m in (vae.decoder, vae.from_latent) for p in m.parameters()) == decoder


# ---------------------------------------------------------------- the scale of the latents


def published(model_name, f, C, vit, nearby):
    settings = {"C": C, "widths": [0] * (f.bit_length()), "encoder_vit": [3] if vit else [], "nearby": nearby}
    return dcae_names.published_scales(settings).get(model_name)


def test_published_scales_are_found_by_sizes_and_name():
    assert published("dc-ae-f32c32-mix-1.0", 32, 32, True, False) == 0.4552
    assert published("dc-ae-f64c128-in-1.0", 64, 128, True, False) == 0.2889
    assert published("dc-ae-f32c32-sana-1.1", 32, 32, True, True) == 0.41407
    assert published("dc-ae-1.5-f64c128", 64, 128, False, False) == 0.5935
    assert published("dc-ae-f32c32-in-1.0", 64, 128, True, False) is None        # a name of other sizes


@pytest.mark.parametrize("config, std, said", [
    ({"_class_name": "AutoencoderDC", "scaling_factor": 0.5}, 2.0, ""),
    ({"model_name": "b"}, 4.0, ""),
    ({"model_name": "c"}, 1.0, r"states its scaling_factor \(0.5 \(a\) or 0.25 \(b\)\); its latents are not"),
    (None, 1.0, r"states its scaling_factor \(0.5 \(a\) or 0.25 \(b\)\); its latents are not"),
])
def test_the_scale_is_stated_or_published_or_warned_about(
        small_original, tmp_path, monkeypatch, capsys, config, std, said):
    from safetensors.torch import save_file
    monkeypatch.setattr(dcae_names, "SCALES", {("1.0", 8, 8): {"a": 0.5, "b": 0.25}})
    save_file(small_original("1.0"), tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    vae = load_base_vae(tmp_path)
    assert vae.std.tolist() == [std] * 8 and vae.mean.tolist() == [0.0] * 8
    out = capsys.readouterr().out
    assert bool(out) == bool(said) and re.search(said, out)


def test_a_scale_shared_by_all_files_of_these_sizes_needs_no_name(small, monkeypatch, capsys):
    monkeypatch.setattr(dcae_names, "SCALES", {("Sana", 8, 8): {"a": 0.25, "b": 0.25}})
    assert load_base_vae(small("sana").state_dict()).std.tolist() == [4.0] * 8
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- as the base of a DA-VAE


@pytest.mark.parametrize("name", ["1.0", "sana", "1.5"])
def test_a_davae_on_a_dcae_keeps_the_base_and_has_gradients_elsewhere(small, name):
    base = load_base_vae(small(name).state_dict())
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    z = base.encode(half(x))
    vae = DAVAE(base, DAVAEConfig(D=8, detail_dropout=0.0)).train()
    assert vae.f == 16
    assert torch.equal(vae.encode(x)[:, :8], z)                    # in training too: no batch statistics
    out = vae(x)
    (out.x_hat.square().mean() + out.posterior.kl()).backward()
    without = [key for key, p in vae.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
    assert without == [] and all(p.grad is None for p in base.parameters())


@torch.no_grad()
def test_batch_norm_uses_the_files_statistics_in_training_and_keeps_them(small):
    base = load_base_vae(small("1.0").state_dict())
    z = torch.randn(2, 8, 4, 4)
    before = {key: x.clone() for key, x in base.state_dict().items()}
    still = base.decode(z)
    assert any("running_mean" in key for key in before)
    assert torch.equal(base.train().decode(z), still)
    assert all(torch.equal(x, before[key]) for key, x in base.state_dict().items())


def test_train_vae_on_a_dcae_trains_the_new_parts_and_the_run_reloads(small, vae_config, tmp_path):
    import train_vae
    base = load_base_vae(small("1.0").state_dict())
    save_base_vae(base, tmp_path / "base")
    train_vae.main(vae_config(
        tmp_path / "run", preset="tiny", base=str(tmp_path / "base"), D=8, image_size=64, images=8, stats=4,
        fit="random", steps=1, batch_size=2))
    vae = load_davae(tmp_path / "run")
    assert type(vae.base) is DCAE and vae.f == 16 and build_vae(vae.config()).config() == vae.config()
    assert all(torch.equal(x, base.state_dict()[key]) for key, x in vae.base.state_dict().items())
    trained = dict(vae.decoder.named_parameters())
    assert not any(torch.equal(p, trained[key]) for key, p in base.decoder.named_parameters())
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(vae.encode(x)[:, :8], base.encode(half(x)))
    assert vae.decode(vae.encode(x)).shape == x.shape and vae.std.min() > 0 and vae.std.max() != 1


def test_a_dcae_itself_is_not_trained(small):
    plain = PlainVAE(load_base_vae(small("1.5").state_dict()))
    x = torch.rand(1, 3, 32, 32)
    assert plain.decode(plain.encode(x)).shape == x.shape
    with pytest.raises(SystemExit, match="DC-AE has no posterior: it can be the base of a DA-VAE, but"):
        plain(x)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name, change, said", [
    ("1.0", {"encoder.extra.weight": 1}, "layers that are not known here: encoder.extra.weight"),
    ("1.0", {"encoder.down_blocks.1.0.conv9.weight": 1}, "not known here: encoder.down_blocks.1.0.conv9"),
    ("1.0", {"encoder.down_blocks.3.0.attn.to_k.weight": None}, "lacks encoder.down_blocks.3.0.attn.to_k"),
    ("1.0", {"encoder.down_blocks.3.0.attn.to_q.weight": None}, "lacks encoder.down_blocks.3.0.attn.to_q"),
    ("1.0", {"encoder.down_blocks.1.0.conv1.bias": None}, "lacks encoder.stages.1.0.conv1.bias"),
    ("1.0", {"encoder.down_blocks.9.0.conv2.weight": 1}, r"the stages \[1, 2, 3, 9\]; wanted two at least"),
    ("1.0", {"encoder.project_out.op_list.0.conv.weight": 1}, "holds to_moments.conv.weight twice"),
    ("1.5", {"decoder.conv_in.weight": torch.zeros(64, 8, 3, 3, 3)}, "wanted 4 axes"),
    ("1.5", {"encoder.conv_in.conv.weight": torch.zeros(8, 1, 3, 3)}, r"\(8, 1, 3, 3\); wanted \(8, 3, 3"),
    ("1.5", {"decoder.norm_out.bias": torch.full((32,), float("nan"))}, "norm_out.bias is not finite"),
])
def test_incomplete_or_foreign_dc_ae_files_are_refused_in_one_sentence(small, name, change, said):
    sd = dict(small(name).state_dict())
    for key, weight in change.items():
        if weight is None:
            sd.pop(key, None)
        else:
            sd[key] = torch.zeros(1) if isinstance(weight, int) else weight
    with pytest.raises(SystemExit, match=said) as caught:
        load_base_vae(sd)
    assert "\n" not in str(caught.value)


def test_a_shortcut_on_only_one_side_of_the_latent_is_refused(small):
    sd = original_names(small("1.5").state_dict(), ends=False)
    key = "decoder.project_in.{}conv.weight"
    sd[key.format("main.")] = sd.pop(key.format(""))
    with pytest.raises(SystemExit, match="a shortcut next to the latent in its decoder only"):
        load_base_vae(sd)


@pytest.mark.parametrize("change, said", [
    (dict(_class_name="AutoencoderKL"), "diffusers' AutoencoderKL; wanted AutoencoderDC"),
    (dict(attention_head_dim=64), "attention_head_dim=64; wanted 32"),
    (dict(latent_channels=4), "latent_channels=4; wanted 8, by its weights"),
    (dict(decoder_layers_per_block=[0, 5, 10, 2]), r"decoder_layers_per_block=\[0, 5, 10, 2\]; wanted \[0"),
    (dict(decoder_act_fns="silu"), "decoder_act_fns='silu'; wanted relu in stage 1"),
    (dict(decoder_norm_types="layer_norm"), "decoder_norm_types='layer_norm'; wanted batch_norm in stage 1"),
    (dict(decoder_act_fns=["relu"]), r"decoder_act_fns=\['relu'\]; wanted relu in stage 1"),
    (dict(encoder_out_shortcut=False), "encoder_out_shortcut=False; wanted true or false, and the same for"),
    (dict(decoder_conv_act_fn="gelu"), "decoder_conv_act_fn='gelu'; wanted relu or silu"),
    (dict(scaling_factor=0), "scaling_factor=0.0; wanted a number above 0"),
])
def test_a_contradictory_config_json_is_refused_naming_the_field(small, tmp_path, change, said):
    small("1.0").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SystemExit, match=said) as caught:
        load_base_vae(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, said", [
    (dict(widths=(0, 32, 64)), "an encoder of 6 stages, a decoder of 6, 3 widths"),
    (dict(encoder_blocks=(0, 4, 0, 2, 2, 2)), "a stage without blocks; only the one at full size"),
    (dict(widths=(0, 256, 512, 768, 1024, 1024)), "a stage of 512 channels before one of 768"),
    (dict(C=48), "1024 channels does not divide into C=48 groups"),
    (dict(C=16, widths=(0, 256, 512, 512, 1024, 16)), "16 channels does not divide into heads of 32"),
])
def test_sizes_that_do_not_fit_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dcae.DCAEConfig(**change)
