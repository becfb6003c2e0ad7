"""support/usit.py against a second U-ViT, in float64, with the names and weights of a file."""
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import finetune
import kernels
import sample
from dit import USiT, warm_start_difference
from support import runs, usit
from support.config import cli
from support.usit import SIZES, USiTConfig, export_usit, import_usit
from support.weights import ExportConfig, load_dit, main_export


@pytest.fixture
def make_usit(randomise, monkeypatch):
    """make_usit(p=1, D=0, seed=0, **options) -> a random USiT of C = 4, 4x4 tokens and 5 classes."""
    monkeypatch.setitem(usit.HEADS, 32, 4)

    def make(p=1, D=0, seed=0, **options):
        sizes = {"E": 32, "A": 4, "depth": 4} | options
        return randomise(USiT(USiTConfig(C=4, D=D, p=p, grid=4, num_classes=5, **sizes)), seed).eval()
    return make


# ---------------------------------------------------------------- the network, implemented again


def linear(sd, name, x):
    return x @ sd[f"{name}.weight"].T + sd.get(f"{name}.bias", 0)


def norm(sd, name, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * sd[f"{name}.weight"] + sd[f"{name}.bias"]


def block(sd, name, x, A):
    B, N, E = x.shape
    q, k, v = linear(sd, f"{name}.attn.qkv", norm(sd, f"{name}.norm1", x)).view(B, N, 3, A, E // A).unbind(2)
    weights = torch.einsum("bnak,bmak->banm", q, k).div((E // A)**0.5).softmax(-1)
    x = x + linear(sd, f"{name}.attn.proj", torch.einsum("banm,bmak->bnak", weights, v).flatten(2))
    h = linear(sd, f"{name}.mlp.fc1", norm(sd, f"{name}.norm2", x))
    return x + linear(sd, f"{name}.mlp.fc2", h * 0.5 * (1 + torch.erf(h / 2**0.5)))


def uvit(sd, z, t, y, A, p, mirrored=lambda i, half: half - 1 - i):
    """U-ViT's velocity in float64; `mirrored`: which in-block's output goes to out-block i."""
    sd = {name: weight.double() for name, weight in sd.items()}
    E = len(sd["norm.weight"])
    half = len({name.split(".")[1] for name in sd if name.startswith("in_blocks.")})
    angle = t.double()[:, None] * 10000 ** (-torch.arange(E // 2, dtype=torch.float64) / (E // 2))
    time = torch.cat([angle.cos(), angle.sin()], dim=1)
    patches = F.conv2d(z.double(), sd["patch_embed.proj.weight"], sd["patch_embed.proj.bias"], stride=p)
    label = sd["label_emb.embedding_table.weight"][y]
    x = torch.cat([label[:, None], time[:, None], patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + sd["pos_embed"]

    kept = []
    for i in range(half):
        x = block(sd, f"in_blocks.{i}", x, A)
        kept.append(x)
    x = block(sd, "mid_block", x, A)
    for i in range(half):
        x = linear(sd, f"out_blocks.{i}.skip_linear", torch.cat([x, kept[mirrored(i, half)]], dim=-1))
        x = block(sd, f"out_blocks.{i}", x, A)
    x = linear(sd, "decoder_pred", norm(sd, "norm", x)[:, 2:])
    h, w = z.shape[2] // p, z.shape[3] // p
    return torch.einsum("bhwijc->bchiwj", x.view(len(z), h, w, p, p, -1)).reshape(len(z), -1, h * p, w * p)


@pytest.mark.parametrize("p", [1, 2])
@torch.no_grad()
def test_velocities_equal_uvit_reimplemented_in_float64(make_usit, dit_inputs, error, p):
    model, inputs = make_usit(p), dit_inputs(p)
    ref = uvit(export_usit(model), *inputs, A=4, p=p)
    assert ref.abs().max() > 0.5
    assert error(model(*inputs), ref) < 5e-6


@pytest.mark.parametrize("wrong", [lambda i, half: i, lambda i, half: 0, lambda i, half: half - 1])
@torch.no_grad()
def test_skips_wired_to_the_wrong_block_would_be_noticed(make_usit, dit_inputs, error, wrong):
    model, inputs = make_usit(), dit_inputs(1)
    assert error(model(*inputs), uvit(export_usit(model), *inputs, A=4, p=1, mirrored=wrong)) > 1e-2


@pytest.mark.parametrize("size, count", [("S", 44.8e6), ("H", 500.9e6), ("2B", 1.580e9), ("3B", 3.108e9)])
def test_full_size_models_have_the_published_number_of_parameters(size, count):
    depth, E, A = SIZES[size]
    with torch.device("meta"):
        model = USiT(USiTConfig(depth=depth, E=E, A=A))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=1e-3)
    assert len(model.blocks) == depth + 1


def test_weights_are_initialised_as_published():
    torch.manual_seed(0)
    model = USiT(USiTConfig(C=4, D=6, grid=8, E=64, A=4, depth=2, num_classes=500))
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.O_new]
    for weight in (model.pos_embed, *(m.weight for m in linear)):              # the head's too
        assert abs(weight.std() / 0.02 - 1) < 0.1
    assert all(m.bias is None or m.bias.abs().max() == 0 for m in linear)
    assert abs(model.y_embedder.weight.std() - 1) < 0.02
    assert model.P.weight.abs().max() > 0
    assert model.P_new.weight.abs().max() == 0 and model.O_new.weight.abs().max() == 0


@pytest.mark.parametrize("changes, sentence", [
    (dict(depth=13), "depth=13 of a USiT: wanted an even number"),
    (dict(depth=0), "depth=0 of a USiT"),
    (dict(E=33, A=3), "E=33 with A=3 heads: E must be even"),
    (dict(A=5), "E=1152 with A=5 heads")])
def test_impossible_sizes_get_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        USiTConfig(**changes)


def test_a_wrong_latent_is_named(make_usit):
    with pytest.raises(ValueError, match=r"\(3, 5, 4, 4\).*\(4, 4, 4\)"):
        make_usit()(torch.zeros(3, 5, 4, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long))


@torch.no_grad()
def test_under_autocast_tokens_are_contiguous_bfloat16_and_the_output_float32(make_usit, dit_inputs, error):
    model, inputs = make_usit(D=6), dit_inputs(1, channels=10)
    exact = model(*inputs)
    seen = []
    for part in model.blocks:
        part.register_forward_hook(lambda module, args, out: seen.extend([*args, out]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = model(*inputs)
    assert len(seen) == 2 * 5 + 2                                              # and two skips
    assert all(x.dtype == torch.bfloat16 and x.is_contiguous() for x in seen)
    assert v.dtype == torch.float32 and 0 < error(v, exact) < 0.1


def test_checkpointing_changes_no_gradient(make_usit, dit_inputs):
    def gradients(checkpointing):
        model = make_usit().train()
        model.checkpointing = checkpointing
        model(*dit_inputs(1)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(checkpointing=False), gradients(checkpointing=True), strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0                         # and every parameter has one


# ---------------------------------------------------------------- the warm start


@pytest.mark.parametrize("p", [1, 2])
@torch.no_grad()
def test_the_widened_model_equals_the_base_bit_for_bit(make_usit, dit_inputs, randomise, p):
    base, model = make_usit(p), make_usit(p)
    z, _, y = dit_inputs(p)
    model.expand_channels(6)
    assert warm_start_difference(base, model, z, (y,)) == (0.0, 0.0)
    change, detail = warm_start_difference(base, randomise(model, seed=3, names="P_new"), z, (y,))
    assert change > 1e-2 and detail == 0


def test_gradients_reach_the_new_layers_from_the_first_step(make_usit, dit_inputs):
    model = make_usit()
    model.expand_channels(6)
    v, v_d = model(*dit_inputs(1, channels=10)).split([4, 6], dim=1)
    (v.square().mean() + (v_d - 1).square().mean()).backward()
    assert model.P_new.weight.grad.abs().max() > 1e-6 and model.O_new.weight.grad.abs().max() > 1e-6


def test_a_widened_model_has_the_parameter_order_of_one_built_wide(make_usit):
    widened = make_usit()
    widened.expand_channels(6)
    names = [name for name, _ in make_usit(D=6).named_parameters()]
    assert [name for name, _ in widened.named_parameters()] == names
    layers = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert layers == ["pos_embed", "P", "y_embedder", "blocks", "norm_final", "O", "P_new", "O_new"]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("front", ["", "uvit.", "diffusion_model."])
@torch.no_grad()
def test_a_uvit_file_imports_as_a_usit_and_exports_unchanged(make_usit, dit_inputs, front):
    model = make_usit(p=2)
    theirs = export_usit(model)
    loaded = load_dit({front + name: weight for name, weight in theirs.items()})
    assert loaded.cfg == model.cfg
    assert torch.equal(loaded(*dit_inputs(2)), model(*dit_inputs(2)))
    back = export_usit(loaded)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)


@torch.no_grad()
def test_merging_details_into_a_wider_model_changes_nothing(make_usit, dit_inputs, error):
    model, inputs = make_usit(p=2, D=6), dit_inputs(2, channels=10)
    merged = load_dit(export_usit(model))
    assert (merged.cfg.C, merged.cfg.D) == (10, 0)
    assert error(merged(*inputs), model(*inputs)) < 1e-5


def test_the_released_sizes_are_read_off_the_shapes():
    for depth, E, A in SIZES.values():
        cfg = USiTConfig(depth=depth, E=E, A=A)
        with torch.device("meta"):
            _, sizes = import_usit(export_usit(USiT(cfg)))
        assert USiTConfig(**sizes) == cfg


@pytest.mark.parametrize("spoil, sentence", [
    (lambda sd: sd.update({"final_layer.weight": sd["norm.weight"]}), "not known here: final_layer.weight"),
    (lambda sd: sd.update({"time_embed.0.bias": sd["norm.bias"]}), "not known here: time_embed.0.bias"),
    (lambda sd: sd.pop("out_blocks.1.skip_linear.bias"), "it lacks blocks.4.skip_linear.bias"),
    (lambda sd: sd.pop("mid_block.norm1.bias"), "it lacks blocks.2.norm1.bias"),
    (lambda sd: sd.pop("pos_embed"), "it lacks pos_embed"),
    (lambda sd: sd.update(pos_embed=sd["pos_embed"][:, :12]), r"pos_embed is \(1, 12, 32\); wanted \(1, 11"),
    (lambda sd: sd.update({"decoder_pred.weight": sd["decoder_pred.weight"][1:]}), "its head does not"),
    (lambda sd: usit.HEADS.pop(32), "number of heads, and E=32 is not one of DC-AE's widths, 512, 1152")])
def test_a_broken_uvit_file_gets_one_sentence(make_usit, spoil, sentence):
    sd = export_usit(make_usit())
    spoil(sd)
    with pytest.raises(SystemExit, match=f"the given state dict: .*{sentence}"):
        load_dit(sd)


# ---------------------------------------------------------------- training, sampling, export


@pytest.fixture(scope="module")
def runs_of_usit(finetune_config, tmp_path_factory):
    """(base, wide): the Configs of a USiT of three steps on the base channels, and of one widened from it."""
    folder = tmp_path_factory.mktemp("usit")
    base = finetune_config(
        folder / "base", model="USiT", base="", D=0, E=32, depth=4, A=4, p=2, weighting="uniform", cosine=0.0,
        warmup=2, beta1=0.99, beta2=0.99)
    wide = finetune_config(folder / "wide", base=base.out, checkpointing=True)
    finetune.main(base)
    finetune.main(wide)
    return base, wide


def test_a_usit_trains_widens_exactly_resumes_and_draws(runs_of_usit, same_weights, tmp_path, read_log):
    base, wide = runs_of_usit
    assert runs.read_summary(wide.out)["warm_start"] == 0.0
    assert [row["lr"] for row in read_log(base.out)] == [0.0005, 0.001, 0.001]

    halves = replace(wide, out=str(tmp_path / "halves"))
    finetune.main(replace(halves, steps=1))
    finetune.main(halves)
    assert same_weights(wide, halves, names=("model", "ema"))

    drawn = sample.main(sample.Config(run=wide.out, n=2, steps=2, cfg=2.0, cfg_start=0.3, batch_size=2))
    assert len(list(drawn.glob("images/*"))) == 2


@torch.no_grad()
def test_guidance_pushes_away_from_the_null_class(make_usit, dit_inputs):
    model = make_usit()
    z, _, y = dit_inputs(1)
    null = torch.full_like(y, 5)
    ts = sample.time_grid(2)
    plain = sample.sample_flow(model, z, ts, (y,))
    guided = sample.sample_flow(model, z, ts, (y,), (null,), scale=3.0)
    x = z
    for t, after in zip(ts, ts[1:]):
        at = torch.full((3,), t)
        c, u = model(x, at, y), model(x, at, null)
        x = x + (after - t) * (u + 3 * (c - u))
    assert (guided - x).abs().max() < 1e-5
    assert (guided - plain)[:2].abs().max() > 1e-3
    assert (guided - plain)[2].abs().max() < 1e-5                # the third has the null class


@torch.no_grad()
def test_a_run_is_exported_under_uvits_names(runs_of_usit, tmp_path, monkeypatch, dit_inputs, error):
    monkeypatch.setitem(usit.HEADS, 32, 4)
    _, wide = runs_of_usit
    main_export(ExportConfig(run=wide.out, out=str(tmp_path / "exported")))
    exported = load_dit(tmp_path / "exported" / "usit.pt")
    saved = load_file(runs.latest_checkpoint(wide.out) / "ema.safetensors")
    ours = load_dit(wide.out)
    assert asdict(exported.cfg) == asdict(ours.cfg) | {"C": 16, "D": 0}
    assert torch.equal(exported.P.weight[:, :4], saved["P.weight"])
    inputs = dit_inputs(2, channels=16)
    assert error(exported(*inputs), ours(*inputs)) < 1e-5


def test_uniform_times_are_uniform_with_equal_weights():
    torch.manual_seed(0)
    t, weight = finetune.draw_time(100_000, "uniform", torch.device("cpu"))
    assert (weight == 1).all() and 0 <= t.min() and t.max() < 1
    counts = torch.histc(t, 10, 0, 1)
    assert (counts / 10_000 - 1).abs().max() < 0.05


def test_the_learning_rate_rises_over_the_warmup_and_is_then_unchanged():
    cfg = finetune.Config(lr=2.0, warmup=4, steps=100, cooldown=0.2)
    assert [finetune.learning_rate(n, cfg) for n in (0, 1, 3, 4, 80, 90, 100)] == [0.5, 1, 2, 2, 2, 1, 0]


def test_dry_run_costs_match_the_closed_form(capsys):
    numbers = finetune.main(cli(finetune.Config, finetune.PRESETS, ["usit", "--dry_run=True"]))
    E, N = 1152, 64 + 2
    per_token = 4 * E * E + 2 * N * E + 8 * E * E              # attention's layers, scores and values, MLP
    expected = 2 * (29 * N * per_token + 14 * N * 2 * E * E + 2 * 64 * E * 128)
    assert numbers["forward"] == pytest.approx(expected, rel=1e-6)
    assert numbers["parameters"] == pytest.approx(500.9e6, rel=1e-3)
    assert numbers["tokens"] == 64 and "USiT" in capsys.readouterr().out
    assert math.isclose(numbers["step"], 3 * numbers["forward"], rel_tol=0.02)


def test_kernels_and_specifications_agree_on_a_usit(make_usit, dit_inputs, error):
    model, inputs = make_usit(D=6), dit_inputs(1, channels=10)
    with kernels.specifications():
        exact = model(*inputs)
    assert error(model(*inputs), exact) < 1e-5
