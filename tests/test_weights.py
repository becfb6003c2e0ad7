"""support/weights.py: public checkpoints against their code, our folders, exports, and what is refused."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dit
from davae import DAVAE, DAVAEConfig, Posterior
from dit import LightningDiTConfig
from support import formats, metrics, runs, weights
from support.formats import export_kl, export_lightningdit
from support.weights import load_base_vae, load_dit

NAN = float("nan")


# ---------------------------------------------------------------- autoencoders


@torch.no_grad()
def test_vavae_style_checkpoint_reproduces_the_original_code(error, golden):
    weights, t, _ = golden("vavae_style")
    extras = {
        "foundation_model.x": torch.ones(1),
        "linear_proj.weight": torch.ones(1),
        "loss.logvar": torch.ones(1),
    }
    vae = load_base_vae({"state_dict": {**weights, **extras}})
    assert (vae.C, vae.f, vae.cfg.attn, vae.cfg.quant) == (8, 16, (4,), True)
    posterior = vae.posterior(t["in/image"])
    assert error(posterior.mean, t["out/mean"]) < 5e-6
    std = torch.exp(0.5 * posterior.logvar)
    assert error(std, t["out/std"]) < 5e-6
    assert error(posterior.mean + std * t["in/eps"], t["out/sample"]) < 5e-6
    assert error(vae.decode(t["in/latent"]), t["out/decoded"]) < 5e-6
    assert error(Posterior(t["in/wide_moments"]).logvar, t["out/wide_logvar"]) == 0
    half_the_sum = posterior.kl() / 2 * posterior.mean[0].numel()  # theirs
    assert error(half_the_sum, t["out/kl"][0]) < 5e-6


@torch.no_grad()
def test_another_group_norm_epsilon_would_be_noticed(error, golden):
    weights, t, _ = golden("vavae_style")
    vae = load_base_vae(weights)
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-5
    assert error(vae.decode(t["in/latent"]), t["out/decoded"]) > 1e-3  # the comparison above can fail


@torch.no_grad()
@pytest.mark.parametrize("old_names", [False, True])
def test_sd3_vae_equals_diffusers(error, old_names, tmp_path):
    metrics.import_torchvision()
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    theirs = Theirs(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).eval()
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


@pytest.mark.parametrize(
    "name,count,f",
    [
        ("VA-VAE f16d32", 69_836_067, 16),
        ("SD3 VAE diffusers", 83_819_683, 8),
        ("SD3 VAE single-file", 83_819_683, 8),
    ],
)
def test_full_size_checkpoints_load_without_missing_or_extra_keys(full_size, name, count, f):
    vae = load_base_vae({k: torch.empty(shape, device="meta") for k, shape in full_size[name].items()})
    assert sum(p.numel() for p in vae.parameters()) == count and vae.f == f
    back = export_kl(vae, diffusers="diffusers" in name)
    prefix = "first_stage_model." if "single" in name else ""
    assert {prefix + k: list(v.shape) for k, v in back.items()} == full_size[name]


def test_va_vaes_latent_statistics_are_read_and_their_absence_is_reported(golden, tmp_path, capsys):
    weights, t, _ = golden("vavae_style")
    torch.save({"state_dict": weights}, tmp_path / "vavae.pt")
    plain = load_base_vae(tmp_path / "vavae.pt")
    assert "no latents_stats.pt next to it" in capsys.readouterr().out
    mean, std = torch.randn(1, 8, 1, 1), torch.rand(1, 8, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    vae = load_base_vae(tmp_path / "vavae.pt")
    assert capsys.readouterr().out == ""
    with torch.no_grad():
        assert torch.allclose(
            vae.encode(t["in/image"]), (plain.encode(t["in/image"]) - mean) / std, atol=1e-5
        )
        assert torch.allclose(
            vae.decode((t["in/latent"] - mean) / std), plain.decode(t["in/latent"]), atol=1e-4
        )


def test_files_without_an_autoencoder_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="not an autoencoder .it holds blocks.0.attn.qkv.weight"):
        load_base_vae({"blocks.0.attn.qkv.weight": torch.ones(1)})
    with pytest.raises(SystemExit, match="no such file"):
        load_base_vae(tmp_path / "missing.pt")


def test_a_saved_davae_loads_to_the_same_function(make_davae, tmp_path):
    vae, x = make_davae(), torch.rand(1, 3, 16, 16)
    runs.save_checkpoint(tmp_path / "run", 3, {"model": vae.state_dict()}, {}, {"model": vae.config()})
    loaded = weights.load_davae(tmp_path / "run")
    assert loaded.config() == vae.config()
    assert torch.equal(loaded.encode(x), vae.encode(x))
    base = load_base_vae(tmp_path / "run")
    assert torch.equal(base.encode(x), vae.base.encode(x))
    assert not any(module.training for module in (*loaded.modules(), *base.modules()))


# ---------------------------------------------------------------- names, containers and data types


@pytest.fixture
def vae_folder(make_base, tmp_path):
    """vae_folder(sd=None, name="vae", **config) -> a folder with a diffusers VAE, of weights sd if given."""

    def make(sd=None, name="vae", **config):
        known = {"_class_name": "AutoencoderKL", "norm_num_groups": 4, "scaling_factor": 1.0}
        sd = export_kl(make_base(), diffusers=True) if sd is None else sd
        (tmp_path / name).mkdir()
        torch.save(sd, tmp_path / name / "diffusion_pytorch_model.bin")
        (tmp_path / name / "config.json").write_text(json.dumps(known | config))
        return tmp_path / name

    return make


FRONTS = ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "model.", "net.",
          "model.net.", "_orig_mod.model.module."]


@pytest.mark.parametrize("front", [*FRONTS, "vae.", "model.vae.", "first_stage_model.", "module.vae.module."])
@pytest.mark.parametrize("diffusers", [False, True])
def test_a_vae_loads_whatever_wraps_it(make_base, vae_folder, front, diffusers):
    sd = export_kl(make_base(), diffusers)
    vae = load_base_vae(vae_folder({front + name: weight for name, weight in sd.items()}))
    back = export_kl(vae, diffusers)
    assert back.keys() == sd.keys() and all(torch.equal(back[k], sd[k]) for k in sd)


@pytest.mark.parametrize("front", [*FRONTS, "model.diffusion_model.", "transformer.", "module.transformer."])
@pytest.mark.parametrize("kind", ["LightningDiT", "single file", "diffusers"])
def test_a_transformer_loads_whatever_wraps_it(make_dit, stock, front, kind):
    sd = export_lightningdit(make_dit())
    if kind != "LightningDiT":
        model = load_dit(stock.state_dict())
        sd = formats.export_diffusers(model) if kind == "diffusers" else formats.export_sd3(model)
        sd = {name.removeprefix("model.diffusion_model."): weight for name, weight in sd.items()}
    plain = load_dit(sd).state_dict()
    again = load_dit({front + name: weight for name, weight in sd.items()}).state_dict()
    assert plain.keys() == again.keys() and all(torch.equal(plain[k], again[k]) for k in plain)


@pytest.mark.parametrize("inside", ["_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_wrappers_inside_a_name_are_removed_for_both_kinds(make_base, make_dit, vae_folder, inside):
    sd = {k.replace(".mid.", f".mid.{inside}"): v for k, v in export_kl(make_base()).items()}
    assert load_base_vae(vae_folder(sd)).C == 4
    sd = {k.replace("blocks.1.", f"blocks.1.{inside}"): v for k, v in export_lightningdit(make_dit()).items()}
    assert load_dit({"module." + k: v for k, v in sd.items()}).cfg == make_dit().cfg


def with_average(sd):
    """`sd` plus the LitEma that latent diffusion keeps of it."""
    names = {f"model_ema.{name.replace('.', '')}": weight + 1 for name, weight in sd.items()}
    return sd | names | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}


def test_latent_diffusions_ema_and_loss_weights_are_left_out(make_base, make_dit, vae_folder):
    assert "model_ema" in formats.DROPPED
    sd = export_kl(make_base())
    loss = {"loss.discriminator.main.3.num_batches_tracked": torch.tensor(3)}
    for name, front in (("bare", ""), ("lightning", "model.")):
        state = with_average({front + key: weight for key, weight in sd.items()}) | loss
        back = export_kl(load_base_vae(vae_folder({"state_dict": state}, name)))
        assert all(torch.equal(back[k], sd[k]) for k in sd)
    sd = export_lightningdit(make_dit())
    assert torch.equal(load_dit(with_average(sd)).P.weight, sd["x_embedder.proj.weight"])


def test_two_models_in_one_file_are_refused_naming_both(make_base, make_dit):
    for load, sd in ((load_base_vae, export_kl(make_base())), (load_dit, export_lightningdit(make_dit()))):
        both = {f"{front}.{name}": weight for front in ("model", "ema_model") for name, weight in sd.items()}
        with pytest.raises(SystemExit, match="holds 2 models, whose names begin with 'ema_model.', 'model.'"):
            load(both)


@pytest.mark.parametrize("holder", ["state_dict", "ema", "params_ema", "generator", "module", "params"])
def test_both_kinds_are_found_under_the_same_checkpoint_keys(make_base, make_dit, vae_folder, holder):
    assert load_base_vae(vae_folder({holder: export_kl(make_base()), "step": 3})).C == 4
    assert load_dit({holder: export_lightningdit(make_dit()), "step": 3}).cfg == make_dit().cfg


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_other_floats_become_float32(make_base, stock, vae_folder, dtype):
    sd = {name: weight.to(dtype) for name, weight in export_kl(make_base(), diffusers=True).items()}
    vae = load_base_vae(vae_folder(sd))
    assert torch.equal(vae.encoder.conv_in.weight, sd["encoder.conv_in.weight"].float())
    assert all(weight.dtype == torch.float32 for weight in vae.state_dict().values())
    sd = {name: weight.to(dtype) for name, weight in stock.state_dict().items()}
    q, k = (f"transformer_blocks.0.attn.to_{part}.weight" for part in "qk")
    sd[k] = sd[k].bfloat16()                                       # stacked with q, which is of another type
    qkv = load_dit(sd).blocks[0].x.attn.qkv.weight
    assert torch.equal(qkv[:48], sd[q].float()) and torch.equal(qkv[48:96], sd[k].float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.complex64])
def test_a_quantised_weight_is_refused_by_its_name_in_the_file(make_base, stock, vae_folder, dtype):
    name = "decoder.mid_block.attentions.0.to_q.weight"
    sd = export_kl(make_base(), diffusers=True)
    sd[name] = torch.ones(3, 1).to(dtype)                          # packed, so its shape differs too
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(SystemExit, match=f"vae: {name} is {kind} "):
        load_base_vae(vae_folder(sd))
    name = "pos_embed.proj.weight"
    with pytest.raises(SystemExit, match=f"{name} is {kind} "):
        load_dit(stock.state_dict() | {name: torch.ones(3, 1).to(dtype)})


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "pos_embed", "blocks.0.attn.q_norm.weight",
                                  "blocks.0.mlp.w3.weight", "final_layer.linear.weight",
                                  "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight"])
@pytest.mark.parametrize("weight", [torch.tensor(1.0), torch.ones(0)])
def test_a_weight_without_the_axes_that_give_sizes_is_named(make_dit, name, weight):
    with pytest.raises(SystemExit, match=f"{name} is .*; wanted . axes"):
        load_dit(export_lightningdit(make_dit()) | {name: weight})


def test_mismatched_parts_of_a_stacked_layer_are_named(stock):
    name = "transformer_blocks.1.attn.to_k.weight"
    with pytest.raises(SystemExit, match=f"{name}.* have the shapes"):
        load_dit(stock.state_dict() | {name: torch.ones(3, 3)})


@pytest.mark.parametrize("name", ["pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_position_table_that_is_not_finite_is_refused(make_dit, name, value):
    sd = export_lightningdit(make_dit())
    sd[name] = sd[name].clone()
    sd[name].view(-1)[3] = value
    with pytest.raises(SystemExit, match=f"the table {name} .* is not the one"):
        load_dit(sd)


# ---------------------------------------------------------------- shards, pipelines, folders


def write_shards(sd, folder, name="diffusion_pytorch_model"):
    """A state dict as three shards and an index."""
    folder.mkdir(exist_ok=True)
    keys = list(sd)
    place = {}
    for i in range(3):
        shard = f"{name}-{i + 1:05}-of-00003.safetensors"
        place |= dict.fromkeys(keys[i::3], shard)
        save_file({key: sd[key].contiguous() for key in keys[i::3]}, folder / shard)
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    return index


@torch.no_grad()
def test_a_sharded_pipeline_loads_like_an_unsharded_one(make_base, stock, sd3_inputs, tmp_path):
    sd = export_kl(make_base(), diffusers=True)
    index = write_shards(sd, tmp_path / "vae")
    config = {"_class_name": "AutoencoderKL", "norm_num_groups": 4, "scaling_factor": 1.0}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path / "vae", index):
        back = export_kl(load_base_vae(source), diffusers=True)
        assert all(torch.equal(back[k], sd[k]) for k in sd)
    stock.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    v = load_dit(stock.state_dict())(*sd3_inputs())
    for source in (tmp_path, tmp_path / "transformer", index):
        assert torch.equal(load_dit(source)(*sd3_inputs()), v)
    next((tmp_path / "transformer").glob("*00002-of*")).unlink()
    with pytest.raises(SystemExit, match="index.json: lists diffusion_pytorch_model-00002-of-.*, not found"):
        load_dit(tmp_path)


def test_a_statistics_file_is_not_taken_for_weights(golden, tmp_path):
    torch.save({"state_dict": golden("vavae_style")[0]}, tmp_path / "vavae.pt")
    std = torch.full((1, 8, 1, 1), 2.0)
    torch.save({"mean": 0 * std, "std": std}, tmp_path / "latents_stats.pt")
    assert load_base_vae(tmp_path).std.tolist() == [2.0] * 8


def test_a_run_means_its_newest_checkpoint_and_a_folder_of_runs_is_refused(make_dit, tmp_path):
    for step in (1, 2):
        model = make_dit(seed=step)
        config = {"model": asdict(model.cfg)}
        runs.save_checkpoint(tmp_path / "out" / "run", step, {"ema": model.state_dict()}, {}, config)
    assert torch.equal(load_dit(tmp_path / "out" / "run").P.weight, model.P.weight)
    for load in (load_dit, load_base_vae, weights.load_davae):
        with pytest.raises(SystemExit, match="out: holds no weight file; its folders are run: give the one"):
            load(tmp_path / "out")
    for source in ("run", "run/step_000002"):
        with pytest.raises(SystemExit, match="holds a transformer; wanted a run of train_vae.py"):
            load_base_vae(tmp_path / "out" / source)


def test_the_vae_in_an_export_is_found(make_davae, tmp_path):
    vae = make_davae()
    runs.save_folder(tmp_path / "vae", {"model": vae.state_dict()}, {"source": "x", "model": vae.config()})
    assert weights.load_davae(tmp_path).config() == vae.config()
    assert torch.equal(load_base_vae(tmp_path).mean, vae.base.mean)


# ------------------------------------------------- diffusers' VAEs of any size and statistics


@pytest.fixture
def their_vae():
    """their_vae(**changes) -> diffusers' AutoencoderKL, small, with random weights."""
    metrics.import_torchvision()
    from diffusers import AutoencoderKL as Theirs

    def make(**changes):
        widths = changes.get("block_out_channels", (16, 32))
        sizes = dict(
            block_out_channels=widths,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        torch.manual_seed(0)
        vae = Theirs(**{**sizes, **changes}).eval()
        for p in vae.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return vae

    return make


@pytest.mark.parametrize("shift", [None, 0, 0.5])
@pytest.mark.parametrize("scale", [None, 1, 2.5])
@torch.no_grad()
def test_a_stated_shift_and_scale_are_taken_as_stated(error, their_vae, tmp_path, shift, scale):
    theirs = their_vae(shift_factor=shift, scaling_factor=scale)
    theirs.save_pretrained(tmp_path)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    z = (theirs.encode(x).latent_dist.mode() - (shift or 0)) * (scale or 1)
    for source in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        vae = load_base_vae(source)
        assert error(vae.encode(x), z) < 5e-6
        assert error(vae.decode(z), theirs.decode(z / (scale or 1) + (shift or 0)).sample) < 5e-6


@torch.no_grad()
def test_sd3s_numbers_are_assumed_only_for_a_bare_16_channel_file(their_vae, tmp_path, capsys):
    theirs = their_vae(norm_num_groups=16, block_out_channels=(32, 64))
    save_file(theirs.state_dict(), tmp_path / "sd3.safetensors")
    assert load_base_vae(tmp_path / "sd3.safetensors").std[0] == torch.tensor(1 / 1.5305)
    assert "sd3.safetensors: taken for SD3's VAE" in capsys.readouterr().out
    for changes in (dict(latent_channels=8), dict(use_quant_conv=True, use_post_quant_conv=True)):
        save_file(
            their_vae(block_out_channels=(32, 64), **changes).state_dict(), tmp_path / "other.safetensors"
        )
        vae = load_base_vae(tmp_path / "other.safetensors")
        assert vae.mean.abs().max() == 0 and (vae.std == 1).all()
        assert "its latents are not normalised" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "scaling_factor": 1}))
    assert (load_base_vae(tmp_path / "sd3.safetensors").std == 1).all()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "another program's"}))
    assert load_base_vae(tmp_path / "sd3.safetensors").mean[0] == torch.tensor(0.0609)


@torch.no_grad()
def test_per_channel_statistics_are_read_as_in_sdxls_pipelines(error, their_vae, tmp_path):
    mean, std = [0.1 * c for c in range(4)], [1 + 0.1 * c for c in range(4)]
    theirs = their_vae(latent_channels=4, scaling_factor=0.5, latents_mean=mean, latents_std=std)
    theirs.save_pretrained(tmp_path)
    vae, x = load_base_vae(tmp_path), torch.rand(1, 3, 16, 16) * 2 - 1
    latents_mean, latents_std = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    z = (theirs.encode(x).latent_dist.mode() - latents_mean) * theirs.config.scaling_factor / latents_std
    assert error(vae.encode(x), z) < 5e-6
    latents = z * latents_std / theirs.config.scaling_factor + latents_mean
    assert error(vae.decode(z), theirs.decode(latents).sample) < 5e-6


@pytest.mark.parametrize(
    "stated, said",
    [
        (
            dict(latents_mean=[0.0] * 3, latents_std=[1.0] * 4),
            "the mean of its latents has 3 numbers; wanted 4",
        ),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0]), "the std of its latents has 1 numbers; wanted 4"),
        (dict(latents_mean=[0.0] * 4), "without the other"),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, shift_factor=0.1), "with a shift_factor"),
        (dict(latents_mean=[0.0] * 4, latents_std=[0.0] * 4), "the std of its latents is not above 0"),
        (dict(scaling_factor=0), "scaling_factor=0.0; wanted a number above 0"),
        (dict(act_fn="relu"), "act_fn='relu'; wanted silu"),
        (dict(scaling_factor=-1.5), "scaling_factor=-1.5; wanted a number above 0"),
        (dict(scaling_factor=NAN), "scaling_factor=nan; wanted a number"),
        (dict(scaling_factor="1.5"), "scaling_factor='1.5'; wanted a number"),
        (dict(scaling_factor=True), "scaling_factor=True; wanted a number"),
        (dict(scaling_factor=1e-320), "the std of its latents is not finite"),
        (dict(shift_factor=float("inf")), "shift_factor=inf; wanted a number"),
        (dict(latents_mean=[0.0, 0.0, 0.0, NAN], latents_std=[1.0] * 4), "the mean .* is not finite"),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 1.0, NAN]), "the std .* is not finite"),
        (dict(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 1.0, None]), "latents_std that is not a list"),
        (dict(norm_num_groups=0), "norm_num_groups=0; wanted a whole number above 0"),
        (dict(norm_num_groups="8"), "norm_num_groups='8'; wanted a whole number"),
        (dict(latent_channels=16), "latent_channels=16; wanted 4, by its weights"),
        (dict(block_out_channels=[128, 256]), r"=\[128, 256\]; wanted \[16, 32\], by its weights"),
        (dict(layers_per_block=2), "layers_per_block=2; wanted 1, by its weights"),
        (dict(_class_name="AutoencoderKLWan"), "describes diffusers' AutoencoderKLWan; wanted AutoencoderKL"),
        (dict(_class_name="FluxTransformer2DModel"), "FluxTransformer2DModel; wanted AutoencoderKL"),
    ],
)
def test_invalid_or_mismatched_configs_are_refused_by_name(their_vae, tmp_path, stated, said):
    theirs = their_vae(latent_channels=4)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | stated))
    with pytest.raises(SystemExit, match=said):
        load_base_vae(tmp_path)


@pytest.mark.parametrize(
    "saved, said",
    [
        ({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 8, 1, 1)}, "has 3 numbers"),
        ({"mu": torch.zeros(8)}, "latents_stats.pt next to it has no mean and std"),
        ([torch.zeros(8)], "latents_stats.pt next to it has no mean and std"),
        ({"mean": torch.zeros(8), "std": torch.tensor([1.0] * 7 + [NAN])}, "the std .* is not finite"),
        ({"mean": torch.tensor([0.0] * 7 + [NAN]), "std": torch.ones(8)}, "the mean .* is not finite"),
        ({"mean": torch.zeros(8), "std": -torch.ones(8)}, "the std of its latents is not above 0"),
        ({"mean": "0", "std": 1}, "latents_stats.pt next to it has a mean that is not a list of numbers"),
    ],
)
def test_an_unusable_statistics_file_is_refused(golden, tmp_path, saved, said):
    torch.save(golden("vavae_style")[0], tmp_path / "vavae.pt")
    torch.save(saved, tmp_path / "latents_stats.pt")
    with pytest.raises(SystemExit, match=f"vavae.pt: .*{said}"):
        load_base_vae(tmp_path / "vavae.pt")


@pytest.mark.parametrize(
    "sizes",
    [
        dict(block_out_channels=(16, 24)),  # not multiples of the first
        dict(block_out_channels=(16,)),
        dict(block_out_channels=(16, 32, 32), layers_per_block=2, latent_channels=4),
        dict(use_quant_conv=True, use_post_quant_conv=True, latent_channels=4),
        dict(
            down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        ),
    ],
)
@torch.no_grad()
def test_vaes_of_other_sizes_equal_diffusers_and_round_trip(error, their_vae, tmp_path, sizes):
    theirs, x = their_vae(scaling_factor=1.0, **sizes), torch.rand(1, 3, 16, 24) * 2 - 1
    theirs.save_pretrained(tmp_path)
    vae = load_base_vae(tmp_path)
    z = theirs.encode(x).latent_dist.mode()
    assert error(vae.encode(x), z) < 5e-6 and error(vae.decode(z), theirs.decode(z).sample) < 5e-6
    back = export_kl(vae, diffusers=True)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("content", ["", '{"scaling_factor": 1.5', "scaling_factor: 1.5", "[]", "null"])
def test_a_broken_config_json_is_named(make_base, make_dit, vae_folder, content):
    folder = vae_folder()
    (folder / "config.json").write_text(content)
    for load in (load_base_vae, weights.load_davae, load_dit):
        with pytest.raises(SystemExit, match="vae/config.json: (not a whole JSON file|holds a )") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_a_config_json_with_a_byte_order_mark_is_read(vae_folder):
    folder = vae_folder(scaling_factor=0.5)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    assert load_base_vae(folder).std.tolist() == [2.0] * 4


@pytest.mark.parametrize("changes, said", [
    (dict(_class_name="FluxTransformer2DModel"), "FluxTransformer2DModel; wanted SD3Transformer2DModel"),
    (dict(_class_name="AutoencoderKL"), "diffusers' AutoencoderKL; wanted SD3Transformer2DModel"),
    (dict(num_layers=24), "num_layers=24; wanted 4, by its weights"),
    (dict(in_channels=16), "in_channels=16; wanted 4, by its weights"),
])
def test_a_config_json_of_another_transformer_is_refused(stock, tmp_path, changes, said):
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(SystemExit, match=said):
        load_dit(tmp_path)


@pytest.mark.parametrize("changes, said", [
    (dict(depth="2"), "config.json has depth='2'; wanted a int"),
    (dict(depth=2.0), "config.json has depth=2.0; wanted a int"),
    (dict(qk_norm=1), "config.json has qk_norm=1; wanted a bool"),
])
def test_a_value_of_the_wrong_type_in_our_config_json_is_named(make_dit, tmp_path, changes, said):
    model = make_dit()
    config = {"model": asdict(model.cfg) | changes}
    runs.save_folder(tmp_path / "own", {"ema": model.state_dict()}, config)
    with pytest.raises(SystemExit, match=said):
        load_dit(tmp_path / "own")


def test_unsupported_vaes_get_one_sentence(their_vae, tmp_path):
    theirs = their_vae(block_out_channels=(16, 24))
    save_file(theirs.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(
        SystemExit, match=r"bare.safetensors: its levels of \[16, 24\] channels do not divide into 32"
    ):
        load_base_vae(tmp_path / "bare.safetensors")
    for changes, said in (
        (dict(mid_block_add_attention=False), "without attention in its middle"),
        (dict(in_channels=1, out_channels=1), "images of 1 channels; wanted 3"),
        (dict(use_quant_conv=True), "one of quant_conv and post_quant_conv"),
    ):
        their_vae(**changes).save_pretrained(tmp_path / said)
        with pytest.raises(SystemExit, match=said) as caught:
            load_base_vae(tmp_path / said)
        assert "\n" not in str(caught.value)


def test_missing_unknown_misshapen_and_broken_vae_weights_are_named(make_base):
    sd = export_kl(make_base())
    for change, said in (
        ({"decoder.norm_out.bias": None}, "it lacks decoder.norm_out.bias"),
        ({"decoder.extra.bias": torch.zeros(1)}, "not known here: decoder.extra.bias"),
        ({"decoder.conv_out.bias": torch.zeros(4)}, r"decoder.conv_out.bias is \(4,\); wanted \(3,\)"),
        (
            {"decoder.conv_out.bias": torch.tensor([0, float("nan"), 0])},
            "decoder.conv_out.bias is not finite",
        ),
    ):
        spoiled = {k: v for k, v in (sd | change).items() if v is not None}
        with pytest.raises(SystemExit, match=said) as caught, pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "groups_of", lambda widths, config: 4)
            load_base_vae(spoiled)
        assert str(caught.value).startswith("the given state dict: ") and "\n" not in str(caught.value)


# ---------------------------------------------------------------- our own autoencoders


@torch.no_grad()
def test_a_saved_r_of_4_is_kept(make_base, tmp_path):
    vae, x = DAVAE(make_base(), DAVAEConfig(D=8, r=4)).eval(), torch.rand(1, 3, 16, 16)
    runs.save_checkpoint(tmp_path, 1, {"model": vae.state_dict()}, {}, {"model": vae.config()})
    loaded = weights.load_davae(tmp_path)
    assert (loaded.r, loaded.f) == (4, 8) and torch.equal(loaded.encode(x), vae.encode(x))


def test_our_folders_without_a_valid_vae_get_one_sentence(make_davae, make_dit, tmp_path):
    vae, sd = make_davae(), make_davae().state_dict()
    bad = sd | {"down.conv.bias": sd["down.conv.bias"] / 0}
    model, config = make_dit(), vae.config()
    for name, state, described, said in (
        ("dit", model.state_dict(), asdict(model.cfg), "holds a transformer; wanted a run of train_vae.py"),
        ("nan", bad, config, "down.conv.bias is not finite"),
        ("cut", {k: v for k, v in sd.items() if "up." not in k}, config, "it lacks "),
        ("D", sd, config | {"D": 10}, "D=10 must be a multiple of base channels C=4"),
        ("E", sd, config | {"mystery": 1}, "config.json describes another model .it has mystery"),
        ("F", sd, config | {"base": config["base"] | {"mystery": 1}}, "another AutoencoderKL .*mystery"),
        (
            "G",
            sd,
            config | {"base": config["base"] | {"kind": "VQGAN"}},
            "a 'VQGAN'; BASES has AutoencoderKL, .*TAEF2, DCAE",
        ),
    ):
        runs.save_checkpoint(tmp_path / name, 1, {"model": state}, {}, {"model": described})
        with pytest.raises(SystemExit, match=said) as caught:
            weights.load_davae(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_a_vae_whose_latents_are_not_measured_yet_cannot_be_trained_on(make_davae, tmp_path):
    vae = make_davae()
    for name, about in (("unfinished", {"measured": False}), ("finished", {"measured": True}), ("older", {})):
        described = {"model": vae.config()} | about
        runs.save_checkpoint(tmp_path / name, 7, {"model": vae.state_dict()}, {}, described)
        weights.load_davae(tmp_path / name)
    for name in ("finished", "older"):
        assert torch.equal(weights.load_measured(tmp_path / name).mean, vae.mean)
    said = "the statistics of its latents are measured at the end .*--steps=7"
    with pytest.raises(SystemExit, match=said) as caught:
        weights.load_measured(tmp_path / "unfinished")
    assert str(caught.value).startswith(str(tmp_path / "unfinished")) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- transformers


def test_a_transformers_kind_is_read_from_its_config_or_inferred_if_older(make_dit, widened, tmp_path):
    class Own(dit.LightningDiT):
        pass

    for name, model in (("LightningDiT", make_dit()), ("MMDiT", widened())):
        for config in (asdict(model.cfg), {"kind": name} | asdict(model.cfg)):
            runs.save_folder(tmp_path / name, {"ema": model.state_dict()}, {"model": config})
            loaded = load_dit(tmp_path / name)
            assert type(loaded).__name__ == name and loaded.cfg == model.cfg
    config = {"kind": "Own"} | asdict(make_dit().cfg)
    runs.save_folder(tmp_path / "own", {"ema": make_dit().state_dict()}, {"model": config})
    with pytest.raises(SystemExit, match="own: its transformer is a 'Own'; MODELS has LightningDiT, MMDiT"):
        load_dit(tmp_path / "own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dit.MODELS, "Own", (LightningDiTConfig, Own))
        assert type(load_dit(tmp_path / "own")) is Own


def test_a_weight_that_is_not_finite_is_named(make_dit, tmp_path):
    sd = export_lightningdit(make_dit())
    sd["blocks.1.attn.qkv.bias"] = sd["blocks.1.attn.qkv.bias"] / 0
    torch.save(sd, tmp_path / "diverged.pt")
    with pytest.raises(SystemExit, match="diverged.pt: blocks.1.attn.qkv.bias is not finite"):
        load_dit(tmp_path / "diverged.pt")


def test_sizes_and_options_are_read_off_the_weights(golden):
    sd, _, config = golden("lightningdit_qknorm")
    cfg = load_dit(sd).cfg
    assert cfg == LightningDiTConfig(
        C=config["in_channels"],
        p=config["patch_size"],
        grid=config["input_size"],
        qk_norm=True,
        E=config["hidden_size"],
        depth=config["depth"],
        A=config["num_heads"],
        num_classes=10,
    )


def test_loading_leaves_the_source_alone(randomise, make_dit):
    sd = export_lightningdit(make_dit())
    before = sd["x_embedder.proj.weight"].clone()
    randomise(load_dit(sd), seed=5)
    load_dit(sd).P.weight.data.zero_()
    assert torch.equal(sd["x_embedder.proj.weight"], before)


def test_ema_is_preferred_and_the_model_can_be_requested(make_dit, tmp_path):
    ema, model = make_dit(seed=1), make_dit(seed=2)
    wrapped = {f"module._orig_mod.{k}": v for k, v in export_lightningdit(model).items()}
    torch.save({"model": wrapped, "ema": export_lightningdit(ema), "step": 3}, tmp_path / "last.pt")
    assert torch.equal(load_dit(tmp_path / "last.pt").P.weight, ema.P.weight)
    assert torch.equal(load_dit(tmp_path, weights="model").P.weight, model.P.weight)
    with pytest.raises(SystemExit, match="no 'model' weights in here.* --base_weights="):
        load_dit(export_lightningdit(ema), weights="model")
    with pytest.raises(ValueError, match="weights='best'"):
        load_dit(tmp_path, weights="best")


def test_our_own_checkpoint_folder_loads_unmerged(make_dit, dit_inputs, tmp_path):
    ema, model, (z_all, t, y) = (
        make_dit(p=2, D=6, seed=1),
        make_dit(p=2, D=6, seed=2),
        dit_inputs(2, channels=10),
    )
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
    assert not any(k in loaded.state_dict() for k in ("pos_embed", "rope_cos", "rope_sin"))  # not saved
    (tmp_path / "config.json").write_text(json.dumps({"model": {"C": 4, "channel_mult": [1, 2]}}))
    with pytest.raises(SystemExit, match="another model .it has channel_mult"):
        load_dit(tmp_path)


def test_a_lora_checkpoint_finds_the_frozen_weights_next_to_it(sd3_inputs, widened, tmp_path):
    model = widened(spoil="_new")
    dit.add_lora(model, r=4, alpha=8)
    sd = model.state_dict()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    (tmp_path / "frozen").mkdir(), (tmp_path / "step_000001").mkdir()
    save_file(
        {k: v.contiguous() for k, v in sd.items() if k not in trained},
        tmp_path / "frozen" / "model.safetensors",
    )
    save_file(
        {k: v.contiguous() for k, v in sd.items() if k in trained},
        tmp_path / "step_000001" / "ema.safetensors",
    )
    (tmp_path / "step_000001" / "config.json").write_text(json.dumps({"model": asdict(model.cfg)}))
    again = load_dit(tmp_path / "step_000001")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    assert torch.equal(again(*sd3_inputs(channels=10)), model(*sd3_inputs(channels=10)))


def test_half_precision_files_become_float32_models(make_dit):
    model = make_dit()
    sd = {k: v.bfloat16() for k, v in export_lightningdit(model).items()}
    loaded = load_dit(sd)
    assert all(v.dtype == torch.float32 for v in loaded.state_dict().values())
    assert torch.equal(loaded.pos_embed, model.pos_embed)  # our table, not the rounded copy


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pt", "bfloat16.safetensors", "shards"])
def test_a_file_is_never_in_memory_twice(kind, tmp_path, fork):
    with torch.device("meta"):
        model = dit.MMDiT(dit.MMDiTConfig(E=320, depth=10, A=5, dual=5, pos_size=48))
    model.load_state_dict({k: torch.randn(v.shape) for k, v in model.state_dict().items()}, assign=True)
    dtype, file = torch.bfloat16 if "b" in kind else torch.float32, tmp_path / f"model.{kind}"
    sd = {k: v.to(dtype).contiguous() for k, v in formats.export_sd3(model).items()}
    if kind == "shards":
        file = write_shards(sd, tmp_path)
    else:
        torch.save(sd, file) if kind == "pt" else save_file(sd, file)
    code = f"""if True:
        import threading, torch; from support import weights
        def anonymous():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
        before, peak, done = anonymous(), [0.0], threading.Event()
        def watch():
            while not done.wait(0.002): peak.append(anonymous())
        thread = threading.Thread(target=watch); thread.start()
        model = weights.load_dit({str(file)!r})
        done.set(); thread.join()
        print(max(peak) - before)"""
    out, err = fork(code).communicate(timeout=120)
    size = sum(v.numel() for v in sd.values()) * 4 / 2**20  # in float32, as in memory
    assert size > 100 and float(out or "inf") < 1.25 * size, err


# ---------------------------------------------------------------- refused transformers


@pytest.mark.parametrize(
    "key, said",
    [
        ("first_stage_model.encoder.conv_in.weight", "an autoencoder"),
        ("joint_blocks.0.x_block.attn.proj.weight", "an incomplete SD3"),
        ("transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"),
        ("P.weight", "our own checkpoint"),
        ("conv.weight", "it holds conv.weight"),
    ],
)
def test_an_error_says_what_a_wrong_file_looks_like(tmp_path, key, said):
    save_file({key: torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit, match=f"weights.safetensors: .*{said}.*wanted a LightningDiT"):
        load_dit(tmp_path / "weights.safetensors")


def test_unsupported_variants_are_refused_by_name(make_dit):
    sd = export_lightningdit(make_dit())
    with pytest.raises(SystemExit, match="wo_shift"):
        load_dit(sd | {"blocks.0.adaLN_modulation.1.weight": torch.zeros(4 * 32, 32)})
    with pytest.raises(SystemExit, match="learn_sigma"):
        load_dit(sd | {"final_layer.linear.weight": torch.zeros(8, 32)})
    with pytest.raises(SystemExit, match="pos_embed .* is not the one"):
        load_dit(sd | {"pos_embed": sd["pos_embed"].roll(1, dims=2)})
    with pytest.raises(SystemExit, match="number of heads"):
        load_dit(export_lightningdit(make_dit(rope=False, qk_norm=False)))
    with pytest.raises(SystemExit, match="extra.weight"):
        load_dit(sd | {"extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="multiple of"):
        LightningDiTConfig(E=36, A=4)


def test_sd3_medium_missing_and_unknown_layers_are_named(stock):
    sd = stock.state_dict()
    with pytest.raises(SystemExit, match="SD3-medium .its attention has no QK-norm"):
        load_dit({
            k: v for k, v in sd.items() if "norm_q" not in k and "norm_k" not in k and "norm_added" not in k
        })
    with pytest.raises(SystemExit, match="not a whole checkpoint .*blocks.2.x.mlp.fc1.weight"):
        load_dit({k: v for k, v in sd.items() if k != "transformer_blocks.2.ff.net.0.proj.weight"})
    with pytest.raises(SystemExit, match="not known here: controlnet.weight"):
        load_dit(sd | {"controlnet.weight": torch.zeros(1)})


# ---------------------------------------------------------------- export


def test_exported_adapters_state_their_rank_and_scale(tmp_path):
    """peft scales them by lora_alpha / r."""
    cfg = dit.MMDiTConfig(
        C=4, D=4, E=24, A=2, depth=2, dual=1, context=12, pooled=6, pos_size=8, lora=2, alpha=6.0)
    weights.write_lora(dit.MMDiT(cfg), tmp_path / "lora", {})
    stated = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (stated["peft_type"], stated["bias"]) == ("LORA", "none")
    assert (stated["r"], stated["lora_alpha"]) == (2, 6.0)


def test_an_export_of_no_run_says_how_to_name_one(tmp_path):
    with pytest.raises(SystemExit, match="^no run given; wanted .* python sample.py export RUN --out=FOLDER"):
        weights.main_export(weights.ExportConfig(out=str(tmp_path / "exported")))


def test_lightningdit_exports_under_its_original_names(tiny_run, tmp_path):
    weights.main_export(weights.ExportConfig(run=tiny_run, out=str(tmp_path / "exported")))
    again, ours = (
        load_dit(tmp_path / "exported" / "lightningdit.pt"),
        load_dit(runs.latest_checkpoint(tiny_run)),
    )
    assert (again.cfg.C, again.cfg.D) == (ours.cfg.C + ours.cfg.D, 0)
    z_all, t, y = (
        torch.randn(2, again.cfg.C, *[again.cfg.grid * again.cfg.p] * 2),
        torch.tensor([0.2, 0.7]),
        torch.tensor([0, 1]),
    )
    with torch.no_grad():
        assert (again(z_all, t, y) - ours(z_all, t, y)).abs().max() < 5e-6
