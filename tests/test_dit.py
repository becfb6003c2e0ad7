"""dit.py against recorded outputs of the original LightningDiT, and the claims of the warm start."""
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dit
from dit import DiTConfig, LightningDiT, export_lightningdit, import_lightningdit, load_dit, widen

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
    monkeypatch.setattr(dit, "rope", rotate_halves)
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
        sd |= dict(zip(dit.TABLES, [dit.sincos_table(grid, E), *dit.rope_table(grid, K)]))
        ours, cfg = import_lightningdit(sd)
        with torch.device("meta"):
            model = LightningDiT(cfg)
        model.load_state_dict(ours, strict=True, assign=True)
        assert {k: list(v.shape) for k, v in export_lightningdit(model).items()} == shapes, name
        assert cfg.A == E // K and cfg.hidden == DiTConfig(E=E, A=cfg.A).hidden and cfg.qk_norm == ("qknorm" in name)


def test_a_token_is_read_as_rows_columns_channels():
    p, C, g = 2, 3, 4
    tokens = torch.arange(g * g * p * p * C, dtype=torch.float32).view(1, g * g, p * p * C)
    latent = dit.unpatchify(tokens, p)
    assert latent.shape == (1, C, g * p, g * p)
    for row, col, i, j, c in [(0, 0, 0, 1, 0), (0, 1, 0, 0, 0), (3, 2, 1, 0, 2), (1, 3, 1, 1, 1)]:
        assert latent[0, c, row * p + i, col * p + j] == tokens[0, row * g + col, (i * p + j) * C + c]


def test_rms_norm_rounds_before_it_scales():
    norm, x = randomise(dit.RMSNorm(64)), torch.randn(5, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == torch.float32 and torch.equal(norm(x), exact.float().bfloat16() * norm.weight)


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
        assert torch.allclose(back[k], sd[k].float(), atol=1e-6 if k in dit.TABLES else 0, rtol=0), k


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
                                       ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "an SD3"),
                                       ("transformer_blocks.0.attn.to_q.weight", "an SD3"),
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
    with pytest.raises(RuntimeError, match="extra.weight"):
        load_dit(sd | {"extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="multiple of"):
        DiTConfig(E=36, A=4)


def test_half_precision_files_become_float32_models():
    model = tiny()
    sd = {k: v.bfloat16() for k, v in export_lightningdit(model).items()}
    loaded = load_dit(sd)
    assert all(v.dtype == torch.float32 for v in loaded.state_dict().values())
    assert torch.equal(loaded.pos_embed, model.pos_embed)           # the table is ours, not the rounded copy


def test_bfloat16_autocast_keeps_the_residual_stream_and_the_output_in_float32():
    model, (z, t, y) = tiny(qk_norm=False), inputs(1)
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.no_grad():
        exact = model(z, t, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = model(z, t, y)
    assert seen == [torch.float32, torch.float32] and v.dtype == torch.float32
    assert 0 < error(v, exact) < 0.1
