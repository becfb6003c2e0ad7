"""dit.py against the original LightningDiT's recorded outputs and diffusers; claims of the warm start."""
import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import dit
import kernels
import kernels.qknorm_rope
from dit import LightningDiTConfig, LightningDiT, widen
from kernels.norm_modulate import norm_modulate_ref
from support.formats import RELEASED_HEADS, export_lightningdit, lightningdit_sizes
from support.metrics import import_torchvision
from support.weights import load_dit


# ---------------------------------------------------------------- LightningDiT as published


@pytest.fixture
def velocity_error(golden, error):
    """velocity_error() -> the error of our velocity for the original's recorded weights and inputs."""
    @torch.no_grad()
    def compare():
        weights, t, _ = golden("lightningdit_qknorm")
        v = load_dit(weights)(t["in/x"], t["in/t"], t["in/y"])
        return error(v, t["out/velocity"])
    return compare


def test_velocity_equals_the_original_lightningdit(velocity_error):
    assert velocity_error() < 5e-6


def test_time_in_thousandths_is_noticed(velocity_error, monkeypatch):
    right = dit.timestep_embedding
    monkeypatch.setattr(dit, "timestep_embedding", lambda t: right(1000 * t))
    assert velocity_error() > 1e-2


def test_rotating_halves_instead_of_adjacent_pairs_is_noticed(velocity_error, monkeypatch):
    def rotate_halves(x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin
    monkeypatch.setattr(kernels.qknorm_rope, "rope", rotate_halves)
    assert velocity_error() > 1e-2


@torch.no_grad()
def test_time_embedding_equals_the_original(golden, error):
    weights, t, _ = golden("lightningdit_qknorm")
    embedded = load_dit(weights).t_embedder(dit.timestep_embedding(t["in/t"]))
    assert error(embedded, t["out/t_embed"]) < 5e-6


def test_position_tables_equal_the_original(golden, error):
    weights, _, _ = golden("lightningdit_qknorm")
    model = load_dit(weights)
    assert error(model.pos_embed, weights["pos_embed"]) < 1e-6
    assert error(model.rope_cos, weights["feat_rope.freqs_cos"]) < 1e-6
    assert error(model.rope_sin, weights["feat_rope.freqs_sin"]) < 1e-6


@torch.no_grad()
def test_null_class_gives_the_recorded_guidance(golden, error):
    """v = u + s (c - u) on channels 0..2, c and u from one batch of conditional and null labels."""
    weights, t, config = golden("lightningdit_qknorm")
    assert t["in/y"].tolist()[3:] == [config["num_classes"]] * 3
    x = torch.cat([t["in/x"][:3]] * 2)
    v = load_dit(weights)(x, t["in/t_cfg"], t["in/y"])
    c, u = v.chunk(2)
    guided = (u + config["cfg_scale"] * (c - u))[:, :3]
    v[:, :3] = torch.cat([guided, guided])
    assert error(v, t["out/cfg_3channel"]) < 5e-6


def test_initialisation_zeroes_what_the_original_zeroes(golden):
    weights, _, config = golden("lightningdit_qknorm")
    cfg = LightningDiTConfig(**lightningdit_sizes(weights))
    torch.manual_seed(0)
    fresh = export_lightningdit(LightningDiT(cfg))
    zero = sorted(key for key, value in fresh.items() if value.abs().max() == 0)
    assert zero == config["zero_at_init"]
    assert fresh.keys() == weights.keys()


def test_initial_weights_have_the_published_scale():
    torch.manual_seed(0)
    model = LightningDiT(LightningDiTConfig(E=64, A=4, depth=1, C=16, p=2, grid=4))
    for weight in (model.y_embedder.weight, model.t_embedder[0].weight, model.t_embedder[2].weight):
        assert abs(weight.std() / 0.02 - 1) < 0.05
    bound = (6 / (16 * 4 + 64)) ** 0.5                              # Xavier on the (E, C*p*p) view
    assert 0.95 * bound < model.P.weight.abs().max() <= bound
    for layer in (model.blocks[0].attn.qkv, model.blocks[0].attn.proj, model.blocks[0].mlp.w12):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() == 0
    assert all((p == 1).all() for n, p in model.named_parameters() if "norm" in n)


def test_a_lightningdit_without_swiglu_has_an_mlp_of_four_times_its_width():
    assert LightningDiTConfig(E=64, A=4, swiglu=False).hidden == 256
    assert (LightningDiTConfig().hidden, LightningDiTConfig(hidden=100).hidden) == (3072, 100)


@pytest.mark.parametrize("ModelConfig, E, A", [(LightningDiTConfig, 72, 4), (dit.MMDiTConfig, 66, 2),
                                              (dit.MMDiTConfig, 64, 3)])
def test_a_width_that_heads_or_position_tables_cannot_divide_is_refused(ModelConfig, E, A):
    with pytest.raises(ValueError, match=f"E={E} with A={A} heads: E must be a multiple of"):
        ModelConfig(E=E, A=A)


@pytest.mark.parametrize("depth, E, A, count", [                   # B, XL, 1p0B and 1p6B
    (12, 768, 12, 130_556_192), (28, 1152, 16, 675_256_736), (24, 1536, 24, 1_029_401_120),
    (28, 1792, 28, 1_631_767_120)])
def test_full_size_models_have_the_published_number_of_parameters(depth, E, A, count):
    assert RELEASED_HEADS[E] == A
    with torch.device("meta"):
        model = LightningDiT(LightningDiTConfig(depth=depth, E=E, A=A))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters + model.pos_embed.numel() == count            # upstream counts the table


def test_the_defaults_are_the_released_xl(full_size):
    shapes = full_size["LightningDiT-XL/1"]
    released = lightningdit_sizes({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert LightningDiTConfig(**released) == LightningDiTConfig()


def test_a_token_is_read_as_rows_columns_channels():
    p, C, g = 2, 3, 4
    tokens = torch.arange(g * g * p * p * C, dtype=torch.float32).view(1, g * g, p * p * C)
    latent = dit.unpatchify(tokens, p, g * p, g * p)
    assert latent.shape == (1, C, g * p, g * p)
    for row, col, i, j, c in [(0, 0, 0, 1, 0), (0, 1, 0, 0, 0), (3, 2, 1, 0, 2), (1, 3, 1, 1, 1)]:
        token = tokens[0, row * g + col]
        assert latent[0, c, row * p + i, col * p + j] == token[(i * p + j) * C + c]


def test_rms_norm_rounds_before_it_scales():
    weight = torch.rand(64)
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    zero = torch.zeros(1, 64).bfloat16()
    h = norm_modulate_ref(x, zero, zero, weight)
    assert torch.equal(h, (exact.float().bfloat16() * weight).bfloat16())


def test_a_wrong_latent_shape_is_named(make_dit):
    with pytest.raises(ValueError, match=r"\(3, 5, 4, 4\).*\(4, 4, 4\)"):
        make_dit()(torch.zeros(3, 5, 4, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(3, 4, 2, 8\).*\(4, 4, 4\)"):         # as many tokens
        make_dit()(torch.zeros(3, 4, 2, 8), torch.zeros(3), torch.zeros(3, dtype=torch.long))


def test_under_bfloat16_autocast_the_residual_stream_is_bfloat16_and_the_output_float32(
        make_dit, dit_inputs, error):
    model = make_dit(qk_norm=False)
    inputs = dit_inputs(1)
    seen = []

    def note_dtypes(module, args, out):
        seen.extend(tensor.dtype for tensor in (args[0], *out))

    with torch.no_grad():
        exact = model(*inputs)
        for block in model.blocks:
            block.register_forward_hook(note_dtypes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = model(*inputs)
    assert seen == 8 * [torch.bfloat16]
    assert v.dtype == torch.float32
    assert 0 < error(v, exact) < 0.1


# ---------------------------------------------------------------- the warm start


@pytest.fixture
def widen_by_6(make_dit, dit_inputs, randomise):
    """widen_by_6(p, spoil=None) -> (v before, v of base channels after, v of detail channels after)."""
    @torch.no_grad()
    def compare(p, spoil=None):
        model = make_dit(p)
        z, t, y = dit_inputs(p)
        z_d = torch.randn(3, 6, 4 * p, 4 * p, generator=torch.Generator().manual_seed(9))
        before = model(z, t, y)
        assert before.abs().max() > 0.1                             # else equality would say nothing
        model.expand_channels(6)
        if spoil:
            randomise(model, seed=3, names=spoil)
        after = model(torch.cat([z, 10 * z_d], dim=1), t, y)
        return before, *after.split([4, 6], dim=1)
    return compare


@pytest.mark.parametrize("p", [1, 2])
def test_warm_start_reproduces_base_model(widen_by_6, p):
    before, after, detail = widen_by_6(p)
    assert torch.equal(after, before)                               # P_new = 0: details cannot leak in
    assert detail.abs().max() == 0                                 # O_new = 0: details start at zero velocity


@pytest.mark.parametrize("p", [1, 2])
def test_a_random_P_new_would_break_the_warm_start(widen_by_6, error, p):
    before, after, _ = widen_by_6(p, spoil="P_new")
    assert error(after, before) > 1e-2


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_gradients_reach_the_new_layers_from_the_first_step(make_dit, dit_inputs, p, weight):
    model = make_dit(p)
    model.expand_channels(6)
    v, v_d = model(*dit_inputs(p, channels=10)).split([4, 6], dim=1)
    loss = v.square().mean() + weight * (v_d - 1).square().mean()
    loss.backward()
    assert model.P_new.weight.grad.abs().max() > 1e-6               # even from a loss on base channels only
    assert (model.O_new.weight.grad.abs().max() > 0) == (weight > 0)
    assert (model.O_new.bias.grad.abs().max() > 0) == (weight > 0)


@torch.no_grad()
def test_the_warm_start_check_sees_differences_of_either_sign_in_both_parts(make_dit, dit_inputs):
    z, _, y = dit_inputs(1)
    base, model = make_dit(), make_dit()
    model.expand_channels(6)
    assert dit.warm_start_difference(base, model, z, (y,)) == (0.0, 0.0)
    model.O.bias -= 3.0
    model.O_new.bias -= 2.0
    assert dit.warm_start_difference(base, model, z, (y,)) == pytest.approx((3.0, 2.0), rel=1e-4)
    wider = make_dit()
    wider.expand_channels(6)
    wider.P_new.weight[:, :, 0, 0] += 1.0                           # only random details show this one
    change, detail = dit.warm_start_difference(base, wider, z, (y,))
    assert change > 1e-2 and detail == 0


def test_widening_twice_or_by_nothing_is_refused(make_dit):
    model = make_dit()
    with pytest.raises(ValueError, match="at least 1"):
        model.expand_channels(0)
    model.expand_channels(2)
    with pytest.raises(ValueError, match="already expanded by D=2"):
        model.expand_channels(2)
    assert model.cfg.D == 2


ORDER = {
    LightningDiT: "P t_embedder y_embedder blocks norm_final adaLN_final O P_new O_new",
    dit.MMDiT: "P t_embedder y_embedder context_embedder blocks adaLN_final O P_new O_new",
}


@pytest.mark.parametrize("kind, cfg", [
    (LightningDiT, LightningDiTConfig(C=4, grid=2, E=32, A=4, depth=2)),
    (dit.MMDiT, dit.MMDiTConfig(C=4, E=32, A=4, depth=2, dual=1, context=8, pooled=8, pos_size=4))])
def test_a_widened_model_and_one_built_wide_order_their_parameters_alike(kind, cfg):
    """The optimizer's saved state depends on the order, and a resumed model is built wide.

    It is the order of earlier checkpoints.
    """
    widened = kind(cfg)
    widened.expand_channels(8)
    built = kind(replace(cfg, D=8))
    names = [name for name, _ in built.named_parameters()]
    assert [name for name, _ in widened.named_parameters()] == names
    runs = itertools.groupby(name.split(".")[0] for name in names)
    assert [layer for layer, _ in runs] == ORDER[kind].split()


def test_widen_works_with_any_patchifier_and_head():
    patchifier = torch.nn.Conv2d(3, 20, 2, stride=2, dtype=torch.bfloat16)
    head = torch.nn.Linear(20, 12, dtype=torch.bfloat16)
    P_new, O_new = widen(patchifier, head, D=5)
    assert P_new.weight.shape == (20, 5, 2, 2) and P_new.stride == (2, 2) and P_new.bias is None
    assert O_new.weight.shape == (20, 20) and O_new.bias.shape == (20,)
    for param in (*P_new.parameters(), *O_new.parameters()):
        assert param.dtype == torch.bfloat16 and param.requires_grad
        assert param.abs().max() == 0
    _, O_new = widen(patchifier, torch.nn.Linear(20, 12, bias=False), D=5)
    assert O_new.bias is None


def test_a_fresh_widened_model_starts_with_zero_new_layers():
    torch.manual_seed(0)
    model = LightningDiT(LightningDiTConfig(C=4, D=6, grid=4, E=32, A=4, depth=1, num_classes=5))
    assert all(p.abs().max() == 0 for n, p in model.named_parameters() if "_new" in n)
    assert model.P.weight.abs().max() > 0


def test_an_mmdits_position_table_is_on_the_default_device_like_its_parameters(monkeypatch):
    """Fake tensors need no GPU, but nothing can be drawn at random on one."""
    for name in ("uniform_", "normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda x, *args, **options: x)
    cfg = dit.MMDiTConfig(C=4, E=48, A=3, depth=2, dual=1, context=12, pooled=8, pos_size=6)
    with FakeTensorMode(), torch.device("cuda"):
        model = dit.MMDiT(cfg)
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"cuda"}


# ---------------------------------------------------------------- cost, counted


def test_the_cost_of_an_xl_matches_the_closed_form():
    with torch.device("meta"):
        model = LightningDiT(LightningDiTConfig(D=96))
        inputs = torch.empty(1, 128, 16, 16), torch.empty(1), torch.zeros(1, dtype=torch.long)
        forward, step, _ = kernels.cost(model, inputs)
    L, E, hidden = 256, 1152, 3072
    attention = 3 * E * E + E * E + 2 * L * E                       # qkv, projection, scores and values
    swiglu = 2 * E * hidden + hidden * E                            # w12, w3
    per_token = attention + swiglu
    conditioning = 28 * 6 * E * E + 2 * E * E + 256 * E + E * E     # adaLN of blocks and head, time embedder
    assert forward == 2 * (28 * L * per_token + conditioning + 2 * L * E * 128)
    assert forward == pytest.approx(237.4e9, rel=5e-4)
    assert step == pytest.approx(3 * forward, rel=0.005)


def test_four_times_the_tokens_cost_sd3_more_than_four_times_as_much():
    """Two kinds of blocks, each counted as what one more of it adds."""
    def cost_of_some(side, depth, dual):
        with torch.device("meta"):
            model = dit.MMDiT(dit.MMDiTConfig(D=16, depth=depth, dual=dual))
            text = torch.empty(1, 333, 4096), torch.empty(1, 2048)
            forward, _, _ = kernels.cost(model, (torch.empty(1, 32, side, side), torch.empty(1), *text))
        return forward

    def forward_cost(side):
        two = cost_of_some(side, depth=2, dual=1)
        dual_block = cost_of_some(side, depth=3, dual=2) - two
        block = cost_of_some(side, depth=3, dual=1) - two
        full = dit.MMDiTConfig()
        return two + (full.dual - 1) * dual_block + (full.depth - full.dual - 1) * block

    davae = forward_cost(64)                                        # 1,024 tokens
    native = forward_cost(128)                                    # 4,096: the same 1024 pixels without DA-VAE
    larger = forward_cost(256)                                      # 16,384
    assert native / davae == pytest.approx(4.61, rel=0.01)
    assert larger / native == pytest.approx(7.95, rel=0.01)


# ---------------------------------------------------------------- MMDiT (SD3.5)


@pytest.mark.parametrize("h, w", [(16, 16), (16, 24), (38, 2)])
@pytest.mark.parametrize("skip", [(), (1, 2)])
@torch.no_grad()
def test_mmdit_equals_diffusers_up_to_sd3s_time_and_sign(stock, sd3_inputs, error, h, w, skip):
    model = load_dit(stock.state_dict())
    z, t, context, pooled = sd3_inputs(h=h, w=w)
    ref = stock(z, context, pooled, 1000 * (1 - t), skip_layers=list(skip) or None).sample
    assert ref.abs().max() > 0.5
    assert error(model(z, t, context, pooled, skip=skip), -ref) < 5e-6


def test_a_fresh_mmdit_has_the_position_table_diffusers_gives_sd3(error):
    """SD3.5's 384 x 384 positions together span as much as 64 x 64."""
    import_torchvision()
    from diffusers.models.embeddings import get_2d_sincos_pos_embed
    cfg = dit.MMDiTConfig(E=48, A=3, depth=1, dual=1, context=8, pooled=8, pos_size=21)
    theirs = get_2d_sincos_pos_embed(48, 21, base_size=64, output_type="pt")
    assert error(dit.MMDiT(cfg).pos_embed[0], theirs) < 1e-5


@torch.no_grad()
def test_an_unflipped_time_is_noticed(stock, sd3_inputs, error):
    model = load_dit(stock.state_dict())
    z, t, context, pooled = sd3_inputs()
    ref = stock(z, context, pooled, 1000 * (1 - t)).sample
    assert error(model(z, 1 - t, context, pooled), -ref) > 1e-2


@torch.no_grad()
def test_warm_start_of_sd3_reproduces_the_base_model(stock, widened, sd3_inputs, error):
    z, t, context, pooled = sd3_inputs()
    z_d = torch.randn(2, 6, *z.shape[2:])
    base = load_dit(stock.state_dict())(z, t, context, pooled)
    v_all = widened()(torch.cat([z, 10 * z_d], dim=1), t, context, pooled)
    assert torch.equal(v_all[:, :4], base)
    assert v_all[:, 4:].abs().max() == 0
    spoilt = widened(spoil="P_new")(torch.cat([z, z_d], dim=1), t, context, pooled)
    assert error(spoilt[:, :4], base) > 1e-2


@torch.no_grad()
def test_a_block_with_two_attentions_normalises_its_tokens_once_for_both(stock, sd3_inputs):
    """Two norms for each kind of token, before attention and MLP, and one for the text of the last block."""
    model = load_dit(stock.state_dict())
    assert model.cfg.dual > 0
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(*sd3_inputs())
    norms = [event for event in found.events() if event.name == "aten::native_layer_norm"]
    assert len(norms) == 4 * model.cfg.depth - 1 + 1                # and the last norm


@pytest.mark.parametrize("kind", ["LightningDiT", "MMDiT"])
@pytest.mark.parametrize("D", [0, 6])
@torch.no_grad()
def test_blocks_take_and_return_contiguous_tokens(kind, D, make_dit, dit_inputs, stock, sd3_inputs):
    """Otherwise each operator would copy them or read them in strides."""
    if kind == "MMDiT":
        model, inputs = load_dit(stock.state_dict()), sd3_inputs(channels=4 + D)
    else:
        model, inputs = make_dit(p=2), dit_inputs(2, channels=4 + D)
    if D:
        model.expand_channels(D)
    seen = []

    def look(module, args, out):
        seen.extend([args[0], out[0] if isinstance(out, tuple) else out])

    for block in model.blocks:
        block.register_forward_hook(look)
    model(*inputs)
    assert len(seen) == 2 * model.cfg.depth and all(x.is_contiguous() for x in seen)


def test_checkpointing_changes_no_gradient(stock, sd3_inputs):
    def gradient(checkpointing):
        model = load_dit(stock.state_dict()).train()
        model.checkpointing = checkpointing
        model(*sd3_inputs()).square().sum().backward()
        return model.blocks[0].x.attn.qkv.weight.grad

    assert torch.equal(gradient(checkpointing=False), gradient(checkpointing=True))


def test_checkpointing_runs_each_block_again_in_the_backward_pass_but_only_in_training(make_dit, dit_inputs):
    model = make_dit()
    model.checkpointing = True
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for training, runs in ((True, 4), (False, 2)):
        calls.clear()
        model.train(training)(*dit_inputs(1)).square().sum().backward()
        assert len(calls) == runs


def test_a_wrong_latent_shape_for_sd3_is_named(stock, sd3_inputs):
    model = load_dit(stock.state_dict())
    _, t, context, pooled = sd3_inputs()
    for shape in ((2, 5, 16, 16), (2, 4, 15, 16), (2, 4, 16, 15), (2, 4, 16, 44), (2, 4, 44, 16)):
        with pytest.raises(ValueError, match=r"wanted \(B, 4, h, w\) with h and w multiples of 2, up to 42"):
            model(torch.zeros(shape), t, context, pooled)


# ---------------------------------------------------------------- LoRA


@torch.no_grad()
def test_lora_starts_without_effect_and_freezes_all_but_the_first_and_last_layer(widened, sd3_inputs):
    inputs = sd3_inputs(channels=10)
    model = widened()
    before = model(*inputs)
    dit.add_lora(model, r=4, alpha=4)
    assert torch.equal(model(*inputs), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"P", "P_new", "O", "O_new", "blocks"}

    def trained_in(block):
        return {name.removeprefix(f"{block}.") for name in trained if name.startswith(f"{block}.")}

    adapters = {f"{target}.{part}" for target in dit.MMDiT.lora_targets for part in "AB"}
    assert trained_in("blocks.0") == adapters
    assert trained_in("blocks.3") == {name for name in adapters if "attn2" not in name}  # no second attention
    first = model.blocks[0].x
    assert first.attn.qkv.A.shape == (3, 4, 48)
    assert first.adaLN.B.shape == (1, 9 * 48, 4)


@pytest.mark.parametrize("parts", [1, 3])
@torch.no_grad()
def test_an_adapter_adds_alpha_over_r_times_BAx_to_each_part_and_merges(parts, error):
    linear = torch.nn.Linear(10, 12)
    before = deepcopy(linear)
    lora = dit.LoRA(linear, r=4, alpha=6.0, parts=parts)
    assert lora.A.shape == (parts, 4, 10) and lora.B.shape == (parts, 12 // parts, 4)
    lora.B.normal_()
    x = torch.randn(2, 5, 10)
    change = torch.cat([x @ (1.5 * lora.B[i] @ lora.A[i]).T for i in range(parts)], dim=-1)
    assert error(lora(x), before(x) + change) < 1e-5

    model = torch.nn.Module()
    model.cfg, model.layer = dit.MMDiTConfig(lora=4), lora
    merged = dit.merge_lora(model).layer
    assert type(merged) is torch.nn.Linear and error(merged(x), before(x) + change) < 1e-5


def test_adapters_start_like_pefts_gaussian_ones():
    """A from N(0, 1 / r^2), B zero, and by default a scale of 1."""
    torch.manual_seed(0)
    lora = dit.LoRA(torch.nn.Linear(500, 12), r=8, alpha=8.0, parts=3)
    assert lora.A.std().item() == pytest.approx(1 / 8, rel=0.05) and lora.B.abs().max() == 0
    assert dit.LoRA(torch.nn.Linear(4, 4), 256, dit.MMDiTConfig().alpha, 1).scale == 1.0


@torch.no_grad()
def test_merged_lora_computes_the_same_without_adapters(widened, sd3_inputs, error):
    inputs = sd3_inputs(channels=10)
    model = widened(spoil="_new")
    dit.add_lora(model, r=4, alpha=8)
    for m in model.modules():
        if isinstance(m, dit.LoRA):
            m.B.normal_(std=0.1)
    v = model(*inputs)
    merged = dit.merge_lora(model)
    assert merged.cfg.lora == 0
    assert not any("linear" in key or key.endswith(".A") for key in merged.state_dict())
    assert error(merged(*inputs), v) < 1e-5
    assert error(widened(spoil="_new")(*inputs), v) > 1e-2          # the adapters did something
