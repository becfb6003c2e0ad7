"""support/formats.py: the names of public checkpoints, in and out, without a remainder."""
import pytest
import torch

import dit
from dit import DiTConfig, LightningDiT
from support import formats
from support.formats import export_kl, export_lightningdit, import_lightningdit
from support.metrics import import_torchvision
from support.weights import load_base_vae, load_dit


def on_meta(shapes):
    """A state dict of these shapes that takes no memory."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shapes_of(state):
    return {key: list(value.shape) for key, value in state.items()}


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for key in state:
        assert torch.equal(state[key], other[key]), key


# ---------------------------------------------------------------- autoencoders


def test_export_of_a_vae_is_the_file_it_came_from(golden):
    state, _, _ = golden("vavae_style")
    back = export_kl(load_base_vae(state))
    assert_equal(back, {key: value.float() for key, value in state.items()})
    import_torchvision()
    from diffusers import AutoencoderKL as Theirs
    theirs = Theirs(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 2, use_quant_conv=False, use_post_quant_conv=False)
    back = export_kl(load_base_vae(theirs.state_dict()), diffusers=True)
    assert_equal(back, theirs.state_dict())


# ---------------------------------------------------------------- LightningDiT


def test_full_size_names_and_shapes_fit_without_a_remainder(full_size):
    listed = {name: shapes for name, shapes in full_size.items() if name.startswith("LightningDiT")}
    assert len(listed) == 5
    for name, shapes in listed.items():
        E = shapes["pos_embed"][2]
        K = shapes["feat_rope.freqs_cos"][1]
        tables = [dit.sincos_table(16, E), *dit.rope_table(16, K)]         # import compares them with its own
        ours, cfg = import_lightningdit(on_meta(shapes) | dict(zip(formats.TABLES, tables, strict=True)))
        with torch.device("meta"):
            model = LightningDiT(cfg)
        model.load_state_dict(ours, strict=True, assign=True)
        assert shapes_of(export_lightningdit(model)) == shapes, name
        assert cfg.A == E // K
        assert cfg.hidden == DiTConfig(E=E, A=cfg.A).hidden
        assert cfg.qk_norm == ("qknorm" in name)


@pytest.mark.parametrize("options", [
    {}, {"qk_norm": False}, {"swiglu": False}, {"qk_norm": False, "rms_norm": False}, {"rope": False},
    {"rope": False, "qk_norm": False, "E": 768, "A": 12}])
@pytest.mark.parametrize("p", [1, 2])
def test_export_and_import_are_inverse(make_dit, dit_inputs, p, options):
    model = make_dit(p, **options)
    exported = export_lightningdit(model)
    again = load_dit(exported)
    assert again.cfg == model.cfg
    assert_equal(export_lightningdit(again), exported)
    inputs = dit_inputs(p)
    with torch.no_grad():
        assert torch.equal(again(*inputs), model(*inputs))


def test_export_of_the_original_weights_is_the_original(golden):
    state, _, _ = golden("lightningdit_qknorm")
    back = export_lightningdit(load_dit(state))
    assert state.keys() == back.keys()
    for key in state:
        tolerance = 1e-6 if key in formats.TABLES else 0
        assert torch.allclose(back[key], state[key].float(), atol=tolerance, rtol=0), key


@pytest.mark.parametrize("p", [1, 2])
@torch.no_grad()
def test_merged_export_equals_the_unmerged_model(make_dit, dit_inputs, error, p):
    model = make_dit(p, D=6)
    merged = load_dit(export_lightningdit(model))
    assert (merged.cfg.C, merged.cfg.D) == (10, 0)
    inputs = dit_inputs(p, channels=10)
    assert error(merged(*inputs), model(*inputs)) < 5e-6


@torch.no_grad()
def test_appending_detail_rows_after_all_base_rows_is_wrong_for_patches(make_dit, dit_inputs, error):
    model = make_dit(p=2, D=6)
    exported = export_lightningdit(model)
    exported["final_layer.linear.weight"] = torch.cat([model.O.weight, model.O_new.weight])
    exported["final_layer.linear.bias"] = torch.cat([model.O.bias, model.O_new.bias])
    inputs = dit_inputs(2, channels=10)
    assert error(load_dit(exported)(*inputs), model(*inputs)) > 1e-1


# ---------------------------------------------------------------- SD3


@torch.no_grad()
def test_both_formats_of_sd3_round_trip_and_a_pipeline_folder_loads(stock, sd3_inputs, tmp_path):
    theirs = stock.state_dict()
    inputs = sd3_inputs()
    model = load_dit(theirs)
    v = model(*inputs)
    for exported in (formats.export_diffusers(model), formats.export_sd3(model)):
        assert torch.equal(load_dit(exported)(*inputs), v)
    assert_equal(formats.export_diffusers(load_dit(formats.export_sd3(model))), theirs)
    stock.save_pretrained(tmp_path / "transformer")
    assert torch.equal(load_dit(tmp_path)(*inputs), v)
    names = ("first_stage_model.encoder.conv_in.weight", "text_encoders.clip_l.x")
    beside = {name: torch.zeros(1) for name in names}
    assert torch.equal(load_dit(formats.export_sd3(model) | beside)(*inputs), v)


def test_full_size_sd3_names_and_shapes_fit_without_a_remainder_in_both_formats(full_size):
    exports = {
        "SD3.5-medium diffusers": formats.export_diffusers,
        "SD3.5-medium single-file": formats.export_sd3,
    }
    for name, export in exports.items():
        ours, cfg = formats.import_dit(on_meta(full_size[name]))
        assert cfg == dit.MMDiTConfig()
        with torch.device("meta"):
            model = dit.MMDiT(cfg)
        model.load_state_dict(ours, strict=True, assign=True)
        assert shapes_of(export(model)) == full_size[name]
        assert sum(value.numel() for value in model.state_dict().values()) == 2_469_663_936
        assert sum(p.numel() for p in model.parameters()) == 2_243_171_520


def wide_stock(stock, state):
    """diffusers' own model with 10 channels in and out, and this state dict."""
    from diffusers import SD3Transformer2DModel
    model = SD3Transformer2DModel.from_config({**stock.config, "in_channels": 10, "out_channels": 10})
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def test_a_widened_sd3_is_a_stock_diffusers_model_with_more_channels(stock, widened, sd3_inputs, error):
    model = widened(spoil="_new")
    z_all, t, context, pooled = sd3_inputs(channels=10)
    v = model(z_all, t, context, pooled)
    assert v[:, 4:].abs().max() > 0.1                        # else the interleave of the heads would not show
    theirs = wide_stock(stock, formats.export_diffusers(model))
    assert error(-theirs(z_all, context, pooled, 1000 * (1 - t)).sample, v) < 5e-6


@torch.no_grad()
def test_lora_file_under_pefts_names_gives_the_same_velocity_in_diffusers(stock, widened, sd3_inputs, error):
    """Each q, k, v gets its own pair, W + alpha/r B A, added by hand to the stock weights of that name."""
    model = widened(spoil="_new")
    adapted = formats.export_diffusers(model)
    dit.add_lora(model, r=4, alpha=8)
    for m in model.modules():
        if isinstance(m, dit.LoRA):
            m.B.normal_(std=0.1)
    file = {key.removeprefix("base_model.model."): value for key, value in formats.export_lora(model).items()}
    layers = {key.removesuffix(".lora_A.weight") for key in file if key.endswith(".lora_A.weight")}
    for layer in layers:
        A = file[f"{layer}.lora_A.weight"]
        B = file[f"{layer}.lora_B.weight"]
        adapted[f"{layer}.weight"] = adapted[f"{layer}.weight"] + 8 / 4 * B @ A
    adapted |= {key: value for key, value in file.items() if "lora" not in key}

    projections = {f"{attention}.{name}" for attention in ("attn", "attn2")
                   for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert {layer.split(".", 2)[2] for layer in layers} == projections | {"ff.net.2", "norm1.linear"}
    z_all, t, context, pooled = sd3_inputs(channels=10)
    theirs = -wide_stock(stock, adapted)(z_all, context, pooled, 1000 * (1 - t)).sample
    assert error(theirs, model(z_all, t, context, pooled)) < 1e-5
