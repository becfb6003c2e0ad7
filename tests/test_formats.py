"""support/formats.py: importing and exporting the names of public checkpoints, with nothing left over."""

import pytest
import torch

import dit
from dit import LightningDiTConfig, LightningDiT
from support import formats, metrics
from support.formats import export_kl, export_lightningdit
from support.weights import load_base_vae, load_dit


# ---------------------------------------------------------------- autoencoders


def test_exporting_a_vae_gives_back_the_file_it_came_from(golden, tmp_path):
    weights, _, _ = golden("vavae_style")
    back = export_kl(load_base_vae(weights))
    assert back.keys() == weights.keys() and all(torch.equal(back[k], weights[k].float()) for k in weights)
    metrics.import_torchvision()
    from diffusers import AutoencoderKL as Theirs

    theirs = Theirs(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).state_dict()
    back = export_kl(load_base_vae(theirs), diffusers=True)
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in theirs)


def test_a_name_table_lists_every_layer_once():
    for quant in (False, True):
        for diffusers in (False, True):
            layers = formats.kl_layers(5, 3, quant, diffusers)
            ours = [layer.ours for layer in layers]
            theirs = [name for layer in layers for name in layer.theirs]
            assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs) > 100


def test_diffusers_counts_decoder_levels_from_the_other_end():
    names = {layer.ours: layer.theirs for layer in formats.kl_layers(4, 3, False, diffusers=True)}
    assert names["decoder.up.0.block.2.nin_shortcut"] == ("decoder.up_blocks.3.resnets.2.conv_shortcut",)
    assert names["decoder.up.3.resample.conv"] == ("decoder.up_blocks.0.upsamplers.0.conv",)
    assert names["encoder.down.0.resample.conv"] == ("encoder.down_blocks.0.downsamplers.0.conv",)


@pytest.mark.parametrize(
    "spoil, said",
    [
        ({"encoder.conv_in.weight": torch.zeros(8, 1, 3, 3)}, "images of 1 channels; wanted 3"),
        (
            {"quant_conv.weight": torch.zeros(8, 8, 1, 1)},
            "one of quant_conv and post_quant_conv; wanted both",
        ),
        ({"encoder.extra.weight": torch.zeros(1)}, "not known here: encoder.extra.weight"),
        ({"foreign.weight": torch.zeros(1)}, "not an autoencoder .it holds foreign.weight"),
        ({"encoder.mid": None, "decoder.mid": None}, "without attention in its middle"),
        ({"encoder.down.1.block.0.conv1": None}, "it lacks encoder.down.1.block.0.conv1.weight"),
    ],
)
def test_an_autoencoder_of_another_kind_is_refused_in_one_sentence(make_base, spoil, said):
    sd = export_kl(make_base())
    for key, value in spoil.items():
        if value is None:
            kept = "block" if key.endswith(".mid") else "nothing"  # from the middle, drop the attention
            sd = {k: v for k, v in sd.items() if not k.startswith(key) or kept in k}
        else:
            sd[key] = value
    with pytest.raises(ValueError, match=said) as caught:
        formats.import_vae(sd)
    assert "\n" not in str(caught.value)


def test_taef2s_layers_are_renamed_to_those_of_a_base_vae():
    given = {
        f"{half}.{i}.weight": torch.zeros(1)
        for half, n in (("encoder", 15), ("decoder", 20))
        for i in range(n)
    }
    given = {
        k: v for k, v in given.items() if k not in ("decoder.0.weight", "decoder.2.weight")
    }  # clamp and ReLU
    ours = list(formats.import_taef2(given))
    assert ours[:2] == ["encoder.1.weight", "encoder.2.weight"] and ours[13:16] == [
        "encoder.14.weight",
        "to_moments.weight",
        "from_latent.1.weight",
    ]
    assert ours[16] == "decoder.1.weight" and ours[-1] == "decoder.17.weight"
    with pytest.raises(ValueError, match="not known here: decoder.20.weight"):
        formats.import_taef2(given | {"decoder.20.weight": torch.zeros(1)})


# ---------------------------------------------------------------- LightningDiT


def test_full_size_names_and_shapes_fit_exactly(full_size):
    listed = {k: v for k, v in full_size.items() if k.startswith("LightningDiT")}
    assert len(listed) == 5
    for name, shapes in listed.items():
        sd = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
        E, K, grid = shapes["pos_embed"][2], shapes["feat_rope.freqs_cos"][1], 16
        kind, ours, sizes, tables = formats.import_dit(sd)
        cfg = LightningDiTConfig(**sizes)
        assert kind == "LightningDiT" and list(tables) == formats.TABLES and cfg.grid == grid
        with torch.device("meta"):
            model = LightningDiT(cfg)
        model.load_state_dict(ours, strict=True, assign=True)
        assert {k: list(v.shape) for k, v in export_lightningdit(model).items()} == shapes, name
        assert (
            cfg.A == E // K
            and cfg.hidden == LightningDiTConfig(E=E, A=cfg.A).hidden
            and cfg.qk_norm == ("qknorm" in name)
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": False},
        {"swiglu": False},
        {"qk_norm": False, "rms_norm": False},
        {"rope": False},
        {"rope": False, "qk_norm": False, "E": 768, "A": 12},
    ],
)
@pytest.mark.parametrize("p", [1, 2])
def test_export_and_import_are_inverses(make_dit, dit_inputs, p, options):
    model, (z, t, y) = make_dit(p, **options), dit_inputs(p)
    sd = export_lightningdit(model)
    again = load_dit(sd)
    assert again.cfg == model.cfg
    back = export_lightningdit(again)
    assert sd.keys() == back.keys() and all(torch.equal(sd[k], back[k]) for k in sd)
    with torch.no_grad():
        assert torch.equal(again(z, t, y), model(z, t, y))


def test_exporting_the_original_weights_reproduces_them(golden):
    sd, _, _ = golden("lightningdit_qknorm")
    back = export_lightningdit(load_dit(sd))
    assert sd.keys() == back.keys()
    for k in sd:
        assert torch.allclose(back[k], sd[k].float(), atol=1e-6 if k in formats.TABLES else 0, rtol=0), k


@pytest.mark.parametrize("p", [1, 2])
@torch.no_grad()
def test_merged_export_equals_the_unmerged_model(error, make_dit, dit_inputs, p):
    model, (z_all, t, y) = make_dit(p, D=6), dit_inputs(p, channels=10)
    merged = load_dit(export_lightningdit(model))
    assert (merged.cfg.C, merged.cfg.D) == (10, 0)
    assert error(merged(z_all, t, y), model(z_all, t, y)) < 5e-6


@torch.no_grad()
def test_appending_detail_rows_after_all_base_rows_is_wrong_for_patches(error, make_dit, dit_inputs):
    model, (z_all, t, y) = make_dit(p=2, D=6), dit_inputs(2, channels=10)
    sd = export_lightningdit(model)
    sd["final_layer.linear.weight"] = torch.cat([model.O.weight, model.O_new.weight])
    sd["final_layer.linear.bias"] = torch.cat([model.O.bias, model.O_new.bias])
    assert error(load_dit(sd)(z_all, t, y), model(z_all, t, y)) > 1e-1


# ---------------------------------------------------------------- SD3


def test_a_missing_part_of_a_stacked_layer_is_named(stock):
    sd = stock.state_dict()
    del sd["transformer_blocks.1.attn.add_k_proj.bias"]
    with pytest.raises(ValueError, match="it lacks transformer_blocks.1.attn.add_k_proj.bias"):
        formats.import_dit(sd)


@torch.no_grad()
def test_both_formats_of_sd3_round_trip_and_a_pipeline_folder_loads(sd3_inputs, stock, tmp_path):
    theirs, inputs_ = stock.state_dict(), sd3_inputs()
    model = load_dit(theirs)
    v = model(*inputs_)
    for exported in (formats.export_diffusers(model), formats.export_sd3(model)):
        assert torch.equal(load_dit(exported)(*inputs_), v)
    back = formats.export_diffusers(load_dit(formats.export_sd3(model)))
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in theirs)
    stock.save_pretrained(tmp_path / "transformer")
    assert torch.equal(load_dit(tmp_path)(*inputs_), v)
    beside = {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(1),
        "text_encoders.clip_l.x": torch.zeros(1),
    }
    assert torch.equal(load_dit(formats.export_sd3(model) | beside)(*inputs_), v)


def test_full_size_sd3_names_and_shapes_fit_both_formats_exactly(full_size):
    listed = full_size
    for name, export in (
        ("SD3.5-medium diffusers", formats.export_diffusers),
        ("SD3.5-medium single-file", formats.export_sd3),
    ):
        sd = {k: torch.empty(shape, device="meta") for k, shape in listed[name].items()}
        kind, ours, sizes, tables = formats.import_dit(sd)
        cfg = dit.MMDiTConfig(**sizes)
        assert kind == "MMDiT" and cfg == dit.MMDiTConfig() and not tables
        with torch.device("meta"):
            model = dit.MMDiT(cfg)
        model.load_state_dict(ours, strict=True, assign=True)
        assert {k: list(v.shape) for k, v in export(model).items()} == listed[name]
        assert sum(v.numel() for v in model.state_dict().values()) == 2_469_663_936
        assert sum(p.numel() for p in model.parameters()) == 2_243_171_520


@torch.no_grad()
def test_a_widened_sd3_is_a_stock_diffusers_model_with_more_channels(error, sd3_inputs, widened, stock):
    from diffusers import SD3Transformer2DModel

    model, (z, t, context, pooled) = widened(spoil="_new"), sd3_inputs(channels=10)
    wide = SD3Transformer2DModel.from_config({**stock.config, "in_channels": 10, "out_channels": 10})
    wide.load_state_dict(formats.export_diffusers(model), strict=True)
    v = model(z, t, context, pooled)
    assert v[:, 4:].abs().max() > 0.1  # else the interleave of the heads would not show
    assert error(-wide.eval()(z, context, pooled, 1000 * (1 - t)).sample, v) < 5e-6


@torch.no_grad()
def test_a_lora_file_with_peft_names_gives_the_same_velocity_in_diffusers(error, sd3_inputs, widened, stock):
    """Each q, k, v has its own pair A, B; alpha/r B A is added here to the stock weights of that name."""
    from diffusers import SD3Transformer2DModel

    z_all, t, context, pooled = sd3_inputs(channels=10)
    model = widened(spoil="_new")
    plain = formats.export_diffusers(model)
    dit.add_lora(model, r=4, alpha=8)
    for m in model.modules():
        if isinstance(m, dit.LoRA):
            m.B.normal_(std=0.1)
    file = {k.removeprefix("base_model.model."): v for k, v in formats.export_lora(model).items()}
    adapted = {k.removesuffix(".lora_A.weight") for k in file if k.endswith(".lora_A.weight")}
    for layer in adapted:
        plain[f"{layer}.weight"] = (
            plain[f"{layer}.weight"] + 8 / 4 * file[f"{layer}.lora_B.weight"] @ file[f"{layer}.lora_A.weight"]
        )
    plain |= {k: v for k, v in file.items() if "lora" not in k}
    suffixes = {layer.split(".", 2)[2] for layer in adapted}
    assert suffixes == {
        f"{a}.{q}" for a in ("attn", "attn2") for q in ("to_q", "to_k", "to_v", "to_out.0")
    } | {"ff.net.2", "norm1.linear"}
    wide = SD3Transformer2DModel.from_config({**stock.config, "in_channels": 10, "out_channels": 10}).eval()
    wide.load_state_dict(plain, strict=True)
    assert (
        error(-wide(z_all, context, pooled, 1000 * (1 - t)).sample, model(z_all, t, context, pooled)) < 1e-5
    )
