"""dit.py against recorded outputs of the original LightningDiT, and the claims of the warm start."""
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dit
import kernels
import kernels.qknorm_rope
from dit import DiTConfig, LightningDiT, widen
from support.formats import export_lightningdit, import_lightningdit
from support.weights import load_dit
from kernels.norm_modulate import norm_modulate_ref
from support.metrics import import_torchvision
from support import formats

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
FIXTURE = HERE / "fixtures" / "lightningdit_qknorm.safetensors"     # 2 blocks, width 64, made with the original code
FULL_SIZE = HERE / "fixtures" / "full_size_keys.json"            # every key and shape of the original classes


# ---------------------------------------------------------------- helpers


def fixture():
    """(config, upstream state dict, inputs, recorded outputs)"""
    with safe_open(FIXTURE, "pt") as f:
        config = json.loads(f.metadata()["config"])
    groups = {"sd": {}, "in": {}, "out": {}}
    for key, tensor in load_file(FIXTURE).items():
        group, name = key.split("/", 1)
        groups[group][name] = tensor
    return config, groups["sd"], groups["in"], groups["out"]


def error(x, ref):
    return ((x - ref).abs().max() / ref.abs().max().clamp(min=1)).item()


def randomise(model, seed=0, names=""):
    """Random values for every parameter with `names` in its name: a fresh DiT computes 0, which would prove nothing."""
    g = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if names in name:
            param.data = torch.randn(param.shape, generator=g) * 0.15
    return model


def tiny(p=1, D=0, seed=0, **options):
    options = {"E": 32, "A": 4, "qk_norm": True, **options}
    return randomise(LightningDiT(DiTConfig(C=4, D=D, p=p, grid=4, depth=2, num_classes=5, **options)), seed).eval()


def inputs(p, channels=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, channels, 4 * p, 4 * p, generator=g), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 3, 5])


# ---------------------------------------------------------------- LightningDiT as published


@torch.no_grad()
def velocity_error():
    _, sd, given, out = fixture()
    return error(load_dit(sd)(given["x"], given["t"], given["y"]), out["velocity"])


def test_velocity_equals_the_original_lightningdit():
    assert velocity_error() < 5e-6


def test_time_in_thousandths_is_noticed(monkeypatch):
    right = dit.timestep_embedding
    monkeypatch.setattr(dit, "timestep_embedding", lambda t: right(1000 * t))
    assert velocity_error() > 1e-2


def test_rotating_halves_instead_of_adjacent_pairs_is_noticed(monkeypatch):
    def rotate_halves(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin
    monkeypatch.setattr(kernels.qknorm_rope, "rope", rotate_halves)
    assert velocity_error() > 1e-2


@torch.no_grad()
def test_time_embedding_equals_the_original():
    _, sd, given, out = fixture()
    assert error(load_dit(sd).t_embedder(dit.timestep_embedding(given["t"])), out["t_embed"]) < 5e-6


def test_position_tables_equal_the_original():
    _, sd, _, _ = fixture()
    model = load_dit(sd)
    assert error(model.pos_embed, sd["pos_embed"]) < 1e-6
    assert error(model.rope_cos, sd["feat_rope.freqs_cos"]) < 1e-6
    assert error(model.rope_sin, sd["feat_rope.freqs_sin"]) < 1e-6


@torch.no_grad()
def test_null_class_gives_the_recorded_guidance():
    """v = u + s (c - u) on channels 0..2, c and u from one batch of conditional and null labels."""
    config, sd, given, out = fixture()
    x = torch.cat([given["x"][:3]] * 2)
    v = load_dit(sd)(x, given["t_cfg"], given["y"])
    c, u = v.chunk(2)
    guided = (u + config["cfg_scale"] * (c - u))[:, :3]
    v[:, :3] = torch.cat([guided, guided])
    assert given["y"].tolist()[3:] == [config["num_classes"]] * 3
    assert error(v, out["cfg_3channel"]) < 5e-6


def test_sizes_and_options_are_read_off_the_weights():
    config, sd, _, _ = fixture()
    cfg = load_dit(sd).cfg
    assert cfg == DiTConfig(C=config["in_channels"], p=config["patch_size"], grid=config["input_size"], qk_norm=True,
                            E=config["hidden_size"], depth=config["depth"], A=config["num_heads"], num_classes=10)


def test_initialisation_zeroes_what_the_original_zeroes():
    config, sd, _, _ = fixture()
    _, cfg = import_lightningdit(sd)
    torch.manual_seed(0)
    fresh = export_lightningdit(LightningDiT(cfg))
    assert sorted(k for k, v in fresh.items() if v.abs().max() == 0) == config["zero_at_init"]
    assert fresh.keys() == sd.keys()


def test_initial_weights_have_the_published_scale():
    torch.manual_seed(0)
    model = LightningDiT(DiTConfig(E=64, A=4, depth=1, C=16, p=2, grid=4))
    for weight in (model.y_embedder.weight, model.t_embedder[0].weight, model.t_embedder[2].weight):
        assert abs(weight.std() / 0.02 - 1) < 0.05
    bound = (6 / (16 * 4 + 64)) ** 0.5                              # Xavier on the (E, C*p*p) view
    assert 0.95 * bound < model.P.weight.abs().max() <= bound
    assert all((p == 1).all() for n, p in model.named_parameters() if "norm" in n)


@pytest.mark.parametrize("size, count", [("B", 130_556_192), ("XL", 675_256_736), ("1p0B", 1_029_401_120),
                                         ("1p6B", 1_631_767_120)])
def test_full_size_models_have_the_published_number_of_parameters(size, count):
    depth, E, A = dit.SIZES[size]
    with torch.device("meta"):
        model = LightningDiT(DiTConfig(depth=depth, E=E, A=A))
    assert sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() == count     # upstream counts the table


def test_full_size_names_and_shapes_fit_without_a_remainder():
    listed = {k: v for k, v in json.loads(FULL_SIZE.read_text()).items() if k.startswith("LightningDiT")}
    assert len(listed) == 5
    for name, shapes in listed.items():
        sd = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
        E, K, grid = shapes["pos_embed"][2], shapes["feat_rope.freqs_cos"][1], 16
        sd |= dict(zip(formats.TABLES, [dit.sincos_table(grid, E), *dit.rope_table(grid, K)]))
        ours, cfg = import_lightningdit(sd)
        with torch.device("meta"):
            model = LightningDiT(cfg)
        model.load_state_dict(ours, strict=True, assign=True)
        assert {k: list(v.shape) for k, v in export_lightningdit(model).items()} == shapes, name
        assert cfg.A == E // K and cfg.hidden == DiTConfig(E=E, A=cfg.A).hidden and cfg.qk_norm == ("qknorm" in name)


def test_a_token_is_read_as_rows_columns_channels():
    p, C, g = 2, 3, 4
    tokens = torch.arange(g * g * p * p * C, dtype=torch.float32).view(1, g * g, p * p * C)
    latent = dit.unpatchify(tokens, p, g * p, g * p)
    assert latent.shape == (1, C, g * p, g * p)
    for row, col, i, j, c in [(0, 0, 0, 1, 0), (0, 1, 0, 0, 0), (3, 2, 1, 0, 2), (1, 3, 1, 1, 1)]:
        assert latent[0, c, row * p + i, col * p + j] == tokens[0, row * g + col, (i * p + j) * C + c]


def test_rms_norm_rounds_before_it_scales():
    weight, x = torch.rand(64), torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    zero = torch.zeros(1, 64).bfloat16()
    h = norm_modulate_ref(x, zero, zero, weight)
    assert torch.equal(h, (exact.float().bfloat16() * weight).bfloat16())


# ---------------------------------------------------------------- the warm start


def warm_start_difference(p, spoil=None):
    """(base channels before, base channels after, detail channels after) expanding a random model by 6 channels."""
    base, (z, t, y) = tiny(p), inputs(p)
    z_d = torch.randn(3, 6, 4 * p, 4 * p, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        before = base(z, t, y)
        base.expand_channels(6)
        if spoil:
            randomise(base, seed=3, names=spoil)
        after = base(torch.cat([z, 10 * z_d], dim=1), t, y)
    assert before.abs().max() > 0.1                                 # else equality would say nothing
    return before, *after.split([4, 6], dim=1)


@pytest.mark.parametrize("p", [1, 2])
def test_warm_start_reproduces_base_model(p):
    before, after, detail = warm_start_difference(p)
    assert torch.equal(after, before)                               # P_new = 0: details cannot leak in
    assert detail.abs().max() == 0                                  # O_new = 0: details start at zero velocity


@pytest.mark.parametrize("p", [1, 2])
def test_a_random_P_new_would_break_the_warm_start(p):
    before, after, _ = warm_start_difference(p, spoil="P_new")
    assert error(after, before) > 1e-2


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_gradients_reach_the_new_layers_from_the_first_step(p, weight):
    model, (z_all, t, y) = tiny(p), inputs(p, channels=10)
    model.expand_channels(6)
    v, v_d = model(z_all, t, y).split([4, 6], dim=1)
    (v.square().mean() + weight * (v_d - 1).square().mean()).backward()
    assert model.P_new.weight.grad.abs().max() > 1e-6               # even from a loss on base channels only
    assert (model.O_new.weight.grad.abs().max() > 0) == (weight > 0)
    assert (model.O_new.bias.grad.abs().max() > 0) == (weight > 0)


def test_widening_an_expanded_or_by_nothing_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="at least 1"):
        model.expand_channels(0)
    model.expand_channels(2)
    with pytest.raises(ValueError, match="already expanded by D=2"):
        model.expand_channels(2)
    assert model.cfg.D == 2


@pytest.mark.parametrize("kind, cfg", [(LightningDiT, DiTConfig(C=4, grid=2, E=32, A=4, depth=2)),
                                       (dit.MMDiT, dit.MMDiTConfig(C=4, E=32, A=4, depth=2, dual=1, context=8, pooled=8, pos_size=4))])
def test_a_widened_model_and_one_built_wide_have_their_parameters_in_one_order(kind, cfg):
    """The optimizer's saved state goes by it, and a resumed model is built wide; the order is that of earlier checkpoints."""
    widened, built = kind(cfg), kind(replace(cfg, D=8))
    widened.expand_channels(8)
    names = [n for n, _ in built.named_parameters()]
    assert [n for n, _ in widened.named_parameters()] == names
    assert [k for i, k in enumerate(n.split(".")[0] for n in names) if i == 0 or k != names[i - 1].split(".")[0]] == [
        "P", "t_embedder", "y_embedder", *(["context_embedder"] if kind is dit.MMDiT else []), "blocks",
        *(["norm_final"] if kind is LightningDiT else []), "adaLN_final", "O", "P_new", "O_new"]


def test_widen_serves_any_patchifier_and_head():
    P, O = torch.nn.Conv2d(3, 20, 2, stride=2, dtype=torch.bfloat16), torch.nn.Linear(20, 12, dtype=torch.bfloat16)
    P_new, O_new = widen(P, O, D=5)
    assert P_new.weight.shape == (20, 5, 2, 2) and P_new.stride == (2, 2) and P_new.bias is None
    assert O_new.weight.shape == (20, 20) and O_new.bias.shape == (20,)
    for param in (*P_new.parameters(), *O_new.parameters()):
        assert param.dtype == torch.bfloat16 and param.requires_grad and param.abs().max() == 0


def test_a_fresh_widened_model_starts_with_zero_new_layers():
    torch.manual_seed(0)
    model = LightningDiT(DiTConfig(C=4, D=6, grid=4, E=32, A=4, depth=1, num_classes=5))
    assert all(p.abs().max() == 0 for n, p in model.named_parameters() if "_new" in n)
    assert model.P.weight.abs().max() > 0


def test_a_wrong_latent_is_named():
    with pytest.raises(ValueError, match=r"\(3, 5, 4, 4\).*\(4, 4, 4\)"):
        tiny()(torch.zeros(3, 5, 4, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long))


# ---------------------------------------------------------------- weights in and out


@pytest.mark.parametrize("p", [1, 2])
@torch.no_grad()
def test_merged_export_equals_the_unmerged_model(p):
    model, (z_all, t, y) = tiny(p, D=6), inputs(p, channels=10)
    merged = load_dit(export_lightningdit(model))
    assert (merged.cfg.C, merged.cfg.D) == (10, 0)
    assert error(merged(z_all, t, y), model(z_all, t, y)) < 5e-6


@torch.no_grad()
def test_appending_detail_rows_after_all_base_rows_is_wrong_for_patches():
    model, (z_all, t, y) = tiny(p=2, D=6), inputs(2, channels=10)
    sd = export_lightningdit(model)
    sd["final_layer.linear.weight"] = torch.cat([model.O.weight, model.O_new.weight])
    sd["final_layer.linear.bias"] = torch.cat([model.O.bias, model.O_new.bias])
    assert error(load_dit(sd)(z_all, t, y), model(z_all, t, y)) > 1e-1


@pytest.mark.parametrize("options", [{}, {"qk_norm": False}, {"swiglu": False}, {"qk_norm": False, "rms_norm": False},
                                     {"rope": False}, {"rope": False, "qk_norm": False, "E": 768, "A": 12}])
@pytest.mark.parametrize("p", [1, 2])
def test_export_and_import_are_inverse(p, options):
    model, (z, t, y) = tiny(p, **options), inputs(p)
    sd = export_lightningdit(model)
    again = load_dit(sd)
    assert again.cfg == model.cfg
    back = export_lightningdit(again)
    assert sd.keys() == back.keys() and all(torch.equal(sd[k], back[k]) for k in sd)
    with torch.no_grad():
        assert torch.equal(again(z, t, y), model(z, t, y))


def test_export_of_the_original_weights_is_the_original():
    _, sd, _, _ = fixture()
    back = export_lightningdit(load_dit(sd))
    assert sd.keys() == back.keys()
    for k in sd:
        assert torch.allclose(back[k], sd[k].float(), atol=1e-6 if k in formats.TABLES else 0, rtol=0), k


def test_loading_leaves_the_source_alone():
    sd = export_lightningdit(tiny())
    before = sd["x_embedder.proj.weight"].clone()
    randomise(load_dit(sd), seed=5)
    load_dit(sd).P.weight.data.zero_()
    assert torch.equal(sd["x_embedder.proj.weight"], before)


def test_ema_is_preferred_and_the_model_can_be_insisted_on(tmp_path):
    ema, model = tiny(seed=1), tiny(seed=2)
    wrapped = {f"module._orig_mod.{k}": v for k, v in export_lightningdit(model).items()}
    torch.save({"model": wrapped, "ema": export_lightningdit(ema), "step": 3}, tmp_path / "last.pt")
    assert torch.equal(load_dit(tmp_path / "last.pt").P.weight, ema.P.weight)
    assert torch.equal(load_dit(tmp_path, weights="model").P.weight, model.P.weight)
    with pytest.raises(SystemExit, match="no 'model' weights in here"):
        load_dit(export_lightningdit(ema), weights="model")
    with pytest.raises(ValueError, match="weights='best'"):
        load_dit(tmp_path, weights="best")


def test_our_own_checkpoint_folder_loads_unmerged(tmp_path):
    ema, model, (z_all, t, y) = tiny(p=2, D=6, seed=1), tiny(p=2, D=6, seed=2), inputs(2, channels=10)
    (tmp_path / "config.json").write_text(json.dumps({"model": asdict(ema.cfg), "step": 1}))
    with pytest.raises(SystemExit, match="not ema.safetensors or model.safetensors"):
        load_dit(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(load_dit(tmp_path).O_new.weight, model.O_new.weight)
    save_file(ema.state_dict(), tmp_path / "ema.safetensors")
    with torch.no_grad():
        assert torch.equal(load_dit(str(tmp_path))(z_all, t, y), ema(z_all, t, y))
        assert torch.equal(load_dit(tmp_path, weights="model")(z_all, t, y), model(z_all, t, y))
    loaded = load_dit(tmp_path)
    assert loaded.cfg == ema.cfg and not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert not any(k in loaded.state_dict() for k in ("pos_embed", "rope_cos", "rope_sin"))     # made, not saved
    (tmp_path / "config.json").write_text(json.dumps({"model": {"C": 4, "channel_mult": [1, 2]}}))
    with pytest.raises(SystemExit, match="another model .it has channel_mult"):
        load_dit(tmp_path)


@pytest.mark.parametrize("key, said", [("first_stage_model.encoder.conv_in.weight", "an autoencoder"),
                                       ("joint_blocks.0.x_block.attn.proj.weight", "an incomplete SD3"),
                                       ("transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"),
                                       ("P.weight", "our own checkpoint"), ("conv.weight", "it holds conv.weight")])
def test_a_wrong_file_is_told_what_it_looks_like(tmp_path, key, said):
    save_file({key: torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit, match=f"weights.safetensors: .*{said}.*wanted a LightningDiT"):
        load_dit(tmp_path / "weights.safetensors")


def test_variants_we_leave_out_are_refused_by_name():
    sd = export_lightningdit(tiny())
    with pytest.raises(SystemExit, match="wo_shift"):
        load_dit(sd | {"blocks.0.adaLN_modulation.1.weight": torch.zeros(4 * 32, 32)})
    with pytest.raises(SystemExit, match="learn_sigma"):
        load_dit(sd | {"final_layer.linear.weight": torch.zeros(8, 32)})
    with pytest.raises(SystemExit, match="pos_embed .* is not the one"):
        load_dit(sd | {"pos_embed": sd["pos_embed"].roll(1, dims=2)})
    with pytest.raises(SystemExit, match="number of heads"):
        load_dit(export_lightningdit(tiny(rope=False, qk_norm=False)))
    with pytest.raises(SystemExit, match="extra.weight"):
        load_dit(sd | {"extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="multiple of"):
        DiTConfig(E=36, A=4)


def test_half_precision_files_become_float32_models():
    model = tiny()
    sd = {k: v.bfloat16() for k, v in export_lightningdit(model).items()}
    loaded = load_dit(sd)
    assert all(v.dtype == torch.float32 for v in loaded.state_dict().values())
    assert torch.equal(loaded.pos_embed, model.pos_embed)           # the table is ours, not the rounded copy


def test_under_bfloat16_autocast_the_residual_stream_is_bfloat16_and_the_output_float32():
    model, (z, t, y) = tiny(qk_norm=False), inputs(1)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.extend(tensor.dtype for tensor in (args[0], *out)))
    with torch.no_grad():
        exact = model(z, t, y)
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = model(z, t, y)
    assert seen == 8 * [torch.bfloat16] and v.dtype == torch.float32
    assert 0 < error(v, exact) < 0.1


# ---------------------------------------------------------------- what they cost, counted


def test_the_cost_of_an_xl_is_the_closed_formula():
    with torch.device("meta"):
        model = LightningDiT(DiTConfig(D=96))
        forward, step, _ = kernels.cost(model, (torch.empty(1, 128, 16, 16), torch.empty(1), torch.zeros(1, dtype=torch.long)))
    L, E, hidden = 256, 1152, 3072
    per_token = 3 * E * E + E * E + 2 * L * E + 2 * E * hidden + hidden * E     # qkv, proj, attention, w12, w3
    conditioning = 28 * 6 * E * E + 2 * E * E + 256 * E + E * E                 # adaLN of blocks and head, time embedder
    assert forward == 2 * (28 * L * per_token + conditioning + 2 * L * E * 128)
    assert forward == pytest.approx(237.4e9, rel=5e-4)
    assert step == pytest.approx(3 * forward, rel=0.005)


def test_four_times_the_tokens_cost_sd3_more_than_four_times_as_much():
    costs = []
    for side in (64, 128, 256):                    # latents of 1,024 (DA-VAE), 4,096 (native at 1024 px), 16,384 tokens
        with torch.device("meta"):
            model = dit.MMDiT(dit.MMDiTConfig(D=16))
            args = torch.empty(1, 32, side, side), torch.empty(1), torch.empty(1, 333, 4096), torch.empty(1, 2048)
            costs.append(kernels.cost(model, args)[0])
    assert costs[1] / costs[0] == pytest.approx(4.61, rel=0.01) and costs[2] / costs[1] == pytest.approx(7.95, rel=0.01)


# ---------------------------------------------------------------- MMDiT (SD3.5)


@pytest.fixture(scope="module")
def stock():
    """A small SD3Transformer2DModel with everything SD3.5-Medium has: dual blocks, QK-norm, an odd position table."""
    import_torchvision()
    from diffusers import SD3Transformer2DModel
    torch.manual_seed(0)
    model = SD3Transformer2DModel(sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=4, pos_embed_max_size=21,
                                  attention_head_dim=16, num_attention_heads=3, caption_projection_dim=48, joint_attention_dim=40,
                                  pooled_projection_dim=24, dual_attention_layers=(0, 1), qk_norm="rms_norm").eval()
    return randomise(model)


def text_inputs(B=2, channels=4, h=16, w=24, T=7, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, channels, h, w, generator=g), torch.linspace(0, 1, B), torch.randn(B, T, 40, generator=g),
            torch.randn(B, 24, generator=g))


@pytest.mark.parametrize("h, w", [(16, 16), (16, 24), (38, 2)])
@pytest.mark.parametrize("skip", [(), (1, 2)])
@torch.no_grad()
def test_mmdit_equals_diffusers_in_sd3s_own_time_and_sign(stock, h, w, skip):
    z, t, context, pooled = text_inputs(h=h, w=w)
    ref = stock(z, context, pooled, 1000 * (1 - t), skip_layers=list(skip) or None).sample
    assert ref.abs().max() > 0.5
    assert error(load_dit(stock.state_dict())(z, t, context, pooled, skip=skip), -ref) < 5e-6


@torch.no_grad()
def test_an_unflipped_time_is_noticed(stock):
    z, t, context, pooled = text_inputs()
    assert error(load_dit(stock.state_dict())(z, 1 - t, context, pooled), -stock(z, context, pooled, 1000 * (1 - t)).sample) > 1e-2


@torch.no_grad()
def test_both_formats_of_sd3_round_trip_and_a_pipeline_folder_loads(stock, tmp_path):
    theirs, inputs_ = stock.state_dict(), text_inputs()
    model = load_dit(theirs)
    v = model(*inputs_)
    for exported in (formats.export_diffusers(model), formats.export_sd3(model)):
        assert torch.equal(load_dit(exported)(*inputs_), v)
    back = formats.export_diffusers(load_dit(formats.export_sd3(model)))
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in theirs)
    stock.save_pretrained(tmp_path / "transformer")
    assert torch.equal(load_dit(tmp_path)(*inputs_), v)
    beside = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1), "text_encoders.clip_l.x": torch.zeros(1)}
    assert torch.equal(load_dit(formats.export_sd3(model) | beside)(*inputs_), v)


def test_full_size_sd3_names_and_shapes_fit_without_a_remainder_in_both_formats():
    listed = json.loads(FULL_SIZE.read_text())
    for name, export in (("SD3.5-medium diffusers", formats.export_diffusers), ("SD3.5-medium single-file", formats.export_sd3)):
        ours, cfg = formats.import_dit({k: torch.empty(shape, device="meta") for k, shape in listed[name].items()})
        assert cfg == dit.MMDiTConfig()
        with torch.device("meta"):
            model = dit.MMDiT(cfg)
        model.load_state_dict(ours, strict=True, assign=True)
        assert {k: list(v.shape) for k, v in export(model).items()} == listed[name]
        assert sum(v.numel() for v in model.state_dict().values()) == 2_469_663_936
        assert sum(p.numel() for p in model.parameters()) == 2_243_171_520


def widened(stock, D=6, spoil=None):
    model = load_dit(stock.state_dict())
    model.expand_channels(D)
    return randomise(model, seed=3, names=spoil) if spoil else model


@torch.no_grad()
def test_warm_start_of_sd3_reproduces_the_base_model(stock):
    z, t, context, pooled = text_inputs()
    z_d = torch.randn(2, 6, *z.shape[2:])
    base = load_dit(stock.state_dict())(z, t, context, pooled)
    v, v_d = widened(stock)(torch.cat([z, 10 * z_d], dim=1), t, context, pooled).split([4, 6], dim=1)
    assert torch.equal(v, base) and v_d.abs().max() == 0
    assert error(widened(stock, spoil="P_new")(torch.cat([z, z_d], dim=1), t, context, pooled)[:, :4], base) > 1e-2


@torch.no_grad()
def test_a_widened_sd3_is_a_stock_diffusers_model_with_more_channels(stock):
    from diffusers import SD3Transformer2DModel
    model, (z, t, context, pooled) = widened(stock, spoil="_new"), text_inputs(channels=10)
    wide = SD3Transformer2DModel.from_config({**stock.config, "in_channels": 10, "out_channels": 10})
    wide.load_state_dict(formats.export_diffusers(model), strict=True)
    v = model(z, t, context, pooled)
    assert v[:, 4:].abs().max() > 0.1                               # else the interleave of the heads would not show
    assert error(-wide.eval()(z, context, pooled, 1000 * (1 - t)).sample, v) < 5e-6


def test_checkpointing_changes_no_gradient(stock):
    z, t, context, pooled = text_inputs()
    grads = []
    for on in (False, True):
        model = load_dit(stock.state_dict()).train()
        model.checkpointing = on
        model(z, t, context, pooled).square().sum().backward()
        grads.append(model.blocks[0].x.attn.qkv.weight.grad)
    assert torch.equal(*grads)


def test_a_wrong_latent_for_sd3_is_named(stock):
    model, (_, t, context, pooled) = load_dit(stock.state_dict()), text_inputs()
    for shape in ((2, 5, 16, 16), (2, 4, 15, 16), (2, 4, 16, 44)):
        with pytest.raises(ValueError, match=r"wanted \(B, 4, h, w\) with h and w multiples of 2, up to 42"):
            model(torch.zeros(shape), t, context, pooled)


def test_sd3_medium_a_truncated_file_and_a_foreign_layer_are_told(stock):
    sd = stock.state_dict()
    with pytest.raises(SystemExit, match="SD3-medium .its attention has no QK-norm"):
        load_dit({k: v for k, v in sd.items() if "norm_q" not in k and "norm_k" not in k and "norm_added" not in k})
    with pytest.raises(SystemExit, match="not a whole checkpoint .*blocks.2.x.mlp.fc1.weight"):
        load_dit({k: v for k, v in sd.items() if k != "transformer_blocks.2.ff.net.0.proj.weight"})
    with pytest.raises(SystemExit, match="not known here: controlnet.weight"):
        load_dit(sd | {"controlnet.weight": torch.zeros(1)})


# ---------------------------------------------------------------- LoRA


@torch.no_grad()
def test_lora_starts_as_the_model_itself_and_freezes_all_but_the_first_and_last_layer(stock):
    z_all, t, context, pooled = text_inputs(channels=10)
    model = widened(stock)
    before = model(z_all, t, context, pooled)
    dit.add_lora(model, r=4, alpha=4)
    assert torch.equal(model(z_all, t, context, pooled), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"P", "P_new", "O", "O_new", "blocks"}
    assert {n.split(".", 2)[2] for n in trained if n.startswith("blocks.0")} == {f"{t}.{ab}" for t in dit.LORA_TARGETS for ab in "AB"}
    assert {n.split(".", 2)[2] for n in trained if n.startswith("blocks.3")} == {   # no second attention there
        f"{t}.{ab}" for t in dit.LORA_TARGETS if "attn2" not in t for ab in "AB"}
    assert model.blocks[0].x.attn.qkv.A.shape == (3, 4, 48) and model.blocks[0].x.adaLN.B.shape == (1, 9 * 48, 4)


@torch.no_grad()
def test_merged_lora_equals_the_adapters_and_is_gone(stock):
    z_all, t, context, pooled = text_inputs(channels=10)
    model = widened(stock, spoil="_new")
    dit.add_lora(model, r=4, alpha=8)
    for m in model.modules():
        if isinstance(m, dit.LoRA):
            m.B.normal_(std=0.1)
    v = model(z_all, t, context, pooled)
    merged = dit.merge_lora(model)
    assert merged.cfg.lora == 0 and not any("linear" in k or k.endswith(".A") for k in merged.state_dict())
    assert error(merged(z_all, t, context, pooled), v) < 1e-5
    assert error(widened(stock, spoil="_new")(z_all, t, context, pooled), v) > 1e-2          # the adapters did something


@torch.no_grad()
def test_lora_file_under_pefts_names_gives_the_same_velocity_in_diffusers(stock):
    """Each q, k, v gets its own pair, W + alpha/r B A, added by hand to the stock weights that the name says."""
    from diffusers import SD3Transformer2DModel
    z_all, t, context, pooled = text_inputs(channels=10)
    model = widened(stock, spoil="_new")
    plain = formats.export_diffusers(model)
    dit.add_lora(model, r=4, alpha=8)
    for m in model.modules():
        if isinstance(m, dit.LoRA):
            m.B.normal_(std=0.1)
    file = {k.removeprefix("base_model.model."): v for k, v in formats.export_lora(model).items()}
    adapted = {k.removesuffix(".lora_A.weight") for k in file if k.endswith(".lora_A.weight")}
    for layer in adapted:
        plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + 8 / 4 * file[f"{layer}.lora_B.weight"] @ file[f"{layer}.lora_A.weight"]
    plain |= {k: v for k, v in file.items() if "lora" not in k}
    suffixes = {layer.split(".", 2)[2] for layer in adapted}
    assert suffixes == {f"{a}.{q}" for a in ("attn", "attn2") for q in ("to_q", "to_k", "to_v", "to_out.0")} | {"ff.net.2", "norm1.linear"}
    wide = SD3Transformer2DModel.from_config({**stock.config, "in_channels": 10, "out_channels": 10}).eval()
    wide.load_state_dict(plain, strict=True)
    assert error(-wide(z_all, context, pooled, 1000 * (1 - t)).sample, model(z_all, t, context, pooled)) < 1e-5


def test_a_lora_checkpoint_folder_finds_its_frozen_weights_beside_it(stock, tmp_path):
    model = widened(stock, spoil="_new")
    dit.add_lora(model, r=4, alpha=8)
    sd = model.state_dict()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    (tmp_path / "frozen").mkdir(), (tmp_path / "step_000001").mkdir()
    save_file({k: v.contiguous() for k, v in sd.items() if k not in trained}, tmp_path / "frozen" / "model.safetensors")
    save_file({k: v.contiguous() for k, v in sd.items() if k in trained}, tmp_path / "step_000001" / "ema.safetensors")
    (tmp_path / "step_000001" / "config.json").write_text(json.dumps({"model": asdict(model.cfg)}))
    again = load_dit(tmp_path / "step_000001")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    assert torch.equal(again(*text_inputs(channels=10)), model(*text_inputs(channels=10)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pt", "bfloat16.safetensors"])
def test_a_file_is_never_in_memory_twice(kind, tmp_path):
    with torch.device("meta"):
        model = dit.MMDiT(dit.MMDiTConfig(E=320, depth=10, A=5, dual=5, pos_size=48))
    model.load_state_dict({k: torch.randn(v.shape) for k, v in model.state_dict().items()}, assign=True)
    dtype, file = torch.bfloat16 if "b" in kind else torch.float32, tmp_path / f"model.{kind}"
    sd = {k: v.to(dtype).contiguous() for k, v in formats.export_sd3(model).items()}
    torch.save(sd, file) if kind == "pt" else save_file(sd, file)
    code = f"""if True:
        import threading, torch; from support import weights
        anonymous = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024
        before, peak, done = anonymous(), [0.0], threading.Event()
        def watch():
            while not done.wait(0.002): peak.append(anonymous())
        thread = threading.Thread(target=watch); thread.start()
        model = weights.load_dit({str(file)!r})
        done.set(); thread.join()
        print(max(peak) - before)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True, check=True, timeout=120)
    size = sum(v.numel() for v in sd.values()) * 4 / 2**20                       # in float32, as it is held
    assert size > 100 and float(done.stdout) < 1.25 * size
