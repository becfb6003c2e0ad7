"""support/weights.py: public checkpoints against the code they come from, our own folders, refusals."""
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dit
from davae import Posterior
from dit import DiTConfig
from support import formats, runs, weights
from support.formats import export_kl, export_lightningdit
from support.metrics import import_torchvision
from support.weights import load_base_vae, load_davae, load_dit


# ---------------------------------------------------------------- autoencoders


@torch.no_grad()
def test_vavae_style_checkpoint_reproduces_the_original_code(golden, error):
    state, t, _ = golden("vavae_style")
    extras = ("foundation_model.x", "linear_proj.weight", "loss.logvar")
    vae = load_base_vae({"state_dict": state | {name: torch.ones(1) for name in extras}})
    assert (vae.C, vae.f, vae.cfg.attn, vae.cfg.quant) == (8, 16, (4,), True)
    posterior = vae.posterior(t["in/image"])
    std = torch.exp(0.5 * posterior.logvar)
    assert error(posterior.mean, t["out/mean"]) < 5e-6
    assert error(std, t["out/std"]) < 5e-6
    assert error(posterior.mean + std * t["in/eps"], t["out/sample"]) < 5e-6
    assert error(vae.decode(t["in/latent"]), t["out/decoded"]) < 5e-6
    assert error(Posterior(t["in/wide_moments"]).logvar, t["out/wide_logvar"]) == 0
    half_the_sum = posterior.kl() / 2 * posterior.mean[0].numel()          # as theirs is
    assert error(half_the_sum, t["out/kl"][0]) < 5e-6


@torch.no_grad()
def test_group_norm_epsilon_is_the_one_that_the_checkpoint_was_trained_with(golden, error):
    state, t, _ = golden("vavae_style")
    vae = load_base_vae(state)
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-5
    assert error(vae.decode(t["in/latent"]), t["out/decoded"]) > 1e-3      # the comparison above can fail


def with_old_names(state):
    """A diffusers state dict with the names that older versions of diffusers gave to attention."""
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new_name, old_name in old.items():
        state = {key.replace(new_name, old_name): value for key, value in state.items()}
    return state


@torch.no_grad()
@pytest.mark.parametrize("old_names", [False, True])
def test_sd3_vae_equals_diffusers(error, old_names, tmp_path):
    import_torchvision()
    from diffusers import AutoencoderKL as Theirs
    torch.manual_seed(0)
    theirs = Theirs(
        block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609).eval()
    for p in theirs.parameters():
        p.add_(0.1 * torch.randn_like(p))
    if old_names:
        vae = load_base_vae(with_old_names(theirs.state_dict()))
    else:
        theirs.save_pretrained(tmp_path)
        vae = load_base_vae(tmp_path)
    x = torch.rand(2, 3, 24, 16) * 2 - 1
    z = (theirs.encode(x).latent_dist.mode() - 0.0609) * 1.5305
    assert error(vae.encode(x), z) < 5e-6
    assert error(vae.decode(z), theirs.decode(z / 1.5305 + 0.0609).sample) < 5e-6


@pytest.mark.parametrize("name,count,f", [
    ("VA-VAE f16d32", 69_836_067, 16),
    ("SD3 VAE diffusers", 83_819_683, 8),
    ("SD3 VAE single-file", 83_819_683, 8)])
def test_full_size_checkpoints_fit_without_a_key_missing_or_left(full_size, name, count, f):
    vae = load_base_vae({key: torch.empty(shape, device="meta") for key, shape in full_size[name].items()})
    assert sum(p.numel() for p in vae.parameters()) == count
    assert vae.f == f
    back = export_kl(vae, diffusers="diffusers" in name)
    prefix = "first_stage_model." if "single" in name else ""
    assert {prefix + key: list(value.shape) for key, value in back.items()} == full_size[name]


def test_va_vaes_latent_statistics_are_read_from_the_file_beside_it_and_missed_aloud(
        golden, tmp_path, capsys):
    state, t, _ = golden("vavae_style")
    x, z = t["in/image"], t["in/latent"]
    torch.save({"state_dict": state}, tmp_path / "vavae.pt")
    plain = load_base_vae(tmp_path / "vavae.pt")
    assert "no latents_stats.pt beside it" in capsys.readouterr().out
    mean = torch.randn(1, 8, 1, 1)
    std = torch.rand(1, 8, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    vae = load_base_vae(tmp_path / "vavae.pt")
    assert capsys.readouterr().out == ""
    with torch.no_grad():
        assert torch.allclose(vae.encode(x), (plain.encode(x) - mean) / std, atol=1e-5)
        assert torch.allclose(vae.decode((z - mean) / std), plain.decode(z), atol=1e-4)


def test_files_that_are_no_autoencoder_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="not an autoencoder .it holds blocks.0.attn.qkv.weight"):
        load_base_vae({"blocks.0.attn.qkv.weight": torch.ones(1)})
    with pytest.raises(SystemExit, match="no such file"):
        load_base_vae(tmp_path / "missing.pt")


def test_a_saved_davae_loads_to_the_same_function(make_davae, tmp_path):
    vae = make_davae()
    x = torch.rand(1, 3, 16, 16)
    runs.save_checkpoint(tmp_path / "run", 3, {"model": vae.state_dict()}, {}, {"model": vae.config()})
    loaded = load_davae(tmp_path / "run")
    assert loaded.config() == vae.config()
    assert torch.equal(loaded.encode(x), vae.encode(x))
    assert torch.equal(load_base_vae(tmp_path / "run").encode(x), vae.base.encode(x))


# ---------------------------------------------------------------- transformers


def test_sizes_and_options_are_read_off_the_weights(golden):
    state, _, config = golden("lightningdit_qknorm")
    assert load_dit(state).cfg == DiTConfig(
        C=config["in_channels"], p=config["patch_size"], grid=config["input_size"], E=config["hidden_size"],
        depth=config["depth"], A=config["num_heads"], num_classes=10, qk_norm=True)


def test_loading_leaves_the_source_alone(make_dit, randomise):
    source = export_lightningdit(make_dit())
    before = source["x_embedder.proj.weight"].clone()
    randomise(load_dit(source), seed=5)
    load_dit(source).P.weight.data.zero_()
    assert torch.equal(source["x_embedder.proj.weight"], before)


def test_ema_is_preferred_and_the_model_can_be_insisted_on(make_dit, tmp_path):
    ema = make_dit(seed=1)
    model = make_dit(seed=2)
    wrapped = {f"module._orig_mod.{key}": value for key, value in export_lightningdit(model).items()}
    torch.save({"model": wrapped, "ema": export_lightningdit(ema), "step": 3}, tmp_path / "last.pt")
    assert torch.equal(load_dit(tmp_path / "last.pt").P.weight, ema.P.weight)
    assert torch.equal(load_dit(tmp_path, weights="model").P.weight, model.P.weight)
    with pytest.raises(SystemExit, match="no 'model' weights in here"):
        load_dit(export_lightningdit(ema), weights="model")
    with pytest.raises(ValueError, match="weights='best'"):
        load_dit(tmp_path, weights="best")


def test_our_own_checkpoint_folder_loads_unmerged(make_dit, dit_inputs, tmp_path):
    ema = make_dit(p=2, D=6, seed=1)
    model = make_dit(p=2, D=6, seed=2)
    inputs = dit_inputs(2, channels=10)
    (tmp_path / "config.json").write_text(json.dumps({"model": asdict(ema.cfg), "step": 1}))
    with pytest.raises(SystemExit, match="not ema.safetensors or model.safetensors"):
        load_dit(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(load_dit(tmp_path).O_new.weight, model.O_new.weight)
    save_file(ema.state_dict(), tmp_path / "ema.safetensors")
    with torch.no_grad():
        assert torch.equal(load_dit(str(tmp_path))(*inputs), ema(*inputs))
        assert torch.equal(load_dit(tmp_path, weights="model")(*inputs), model(*inputs))
    loaded = load_dit(tmp_path)
    assert loaded.cfg == ema.cfg and not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys().isdisjoint({"pos_embed", "rope_cos", "rope_sin"})      # made, not saved
    (tmp_path / "config.json").write_text(json.dumps({"model": {"C": 4, "channel_mult": [1, 2]}}))
    with pytest.raises(SystemExit, match="another model .it has channel_mult"):
        load_dit(tmp_path)


def test_a_lora_checkpoint_folder_finds_its_frozen_weights_beside_it(widened, sd3_inputs, tmp_path):
    model = widened(spoil="_new")
    dit.add_lora(model, r=4, alpha=8)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = tmp_path / "frozen"
    step = tmp_path / "step_000001"
    frozen.mkdir()
    step.mkdir()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    ema = {key: state.pop(key) for key in trained}
    save_file(ema, step / "ema.safetensors")
    save_file(state, frozen / "model.safetensors")
    (step / "config.json").write_text(json.dumps({"model": asdict(model.cfg)}))
    again = load_dit(step)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    inputs = sd3_inputs(channels=10)
    assert torch.equal(again(*inputs), model(*inputs))


def test_half_precision_files_become_float32_models(make_dit):
    model = make_dit()
    loaded = load_dit({key: value.bfloat16() for key, value in export_lightningdit(model).items()})
    assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())
    assert torch.equal(loaded.pos_embed, model.pos_embed)           # the table is ours, not the rounded copy


PRINTS_THE_MIB_IT_TAKES_TO_LOAD = """
import threading
from support import weights

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

before, seen, done = anonymous(), [0.0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = weights.load_dit({file!r})
done.set()
thread.join()
print(max(seen) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pt", "bfloat16.safetensors"])
def test_a_file_is_never_in_memory_twice(kind, tmp_path):
    with torch.device("meta"):
        model = dit.MMDiT(dit.MMDiTConfig(E=320, depth=10, A=5, dual=5, pos_size=48))
    model.load_state_dict({k: torch.randn(v.shape) for k, v in model.state_dict().items()}, assign=True)
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    state = {key: value.to(dtype).contiguous() for key, value in formats.export_sd3(model).items()}
    file = tmp_path / f"model.{kind}"
    if kind == "pt":
        torch.save(state, file)
    else:
        save_file(state, file)
    program = PRINTS_THE_MIB_IT_TAKES_TO_LOAD.format(file=str(file))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        check=True, timeout=120)
    size = sum(value.numel() for value in state.values()) * 4 / 2**20      # in float32, as it is held
    assert size > 100
    assert float(done.stdout) < 1.25 * size


# ---------------------------------------------------------------- transformers that are refused


@pytest.mark.parametrize("key, said", [
    ("first_stage_model.encoder.conv_in.weight", "an autoencoder"),
    ("joint_blocks.0.x_block.attn.proj.weight", "an incomplete SD3"),
    ("transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"),
    ("P.weight", "our own checkpoint"),
    ("conv.weight", "it holds conv.weight")])
def test_a_wrong_file_is_told_what_it_looks_like(tmp_path, key, said):
    save_file({key: torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(SystemExit, match=f"weights.safetensors: .*{said}.*wanted a LightningDiT"):
        load_dit(tmp_path / "weights.safetensors")


def test_variants_we_leave_out_are_refused_by_name(make_dit):
    state = export_lightningdit(make_dit())
    with pytest.raises(SystemExit, match="wo_shift"):
        load_dit(state | {"blocks.0.adaLN_modulation.1.weight": torch.zeros(4 * 32, 32)})
    with pytest.raises(SystemExit, match="learn_sigma"):
        load_dit(state | {"final_layer.linear.weight": torch.zeros(8, 32)})
    with pytest.raises(SystemExit, match="pos_embed .* is not the one"):
        load_dit(state | {"pos_embed": state["pos_embed"].roll(1, dims=2)})
    with pytest.raises(SystemExit, match="number of heads"):
        load_dit(export_lightningdit(make_dit(rope=False, qk_norm=False)))
    with pytest.raises(SystemExit, match="extra.weight"):
        load_dit(state | {"extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="multiple of"):
        DiTConfig(E=36, A=4)


def test_sd3_medium_a_truncated_file_and_a_foreign_layer_are_told(stock):
    state = stock.state_dict()
    norms = ("norm_q", "norm_k", "norm_added")
    without_norms = {key: value for key, value in state.items() if not any(norm in key for norm in norms)}
    with pytest.raises(SystemExit, match="SD3-medium .its attention has no QK-norm"):
        load_dit(without_norms)
    missing = "transformer_blocks.2.ff.net.0.proj.weight"
    truncated = {key: value for key, value in state.items() if key != missing}
    with pytest.raises(SystemExit, match="not a whole checkpoint .*blocks.2.x.mlp.fc1.weight"):
        load_dit(truncated)
    with pytest.raises(SystemExit, match="not known here: controlnet.weight"):
        load_dit(state | {"controlnet.weight": torch.zeros(1)})


# ---------------------------------------------------------------- export


def test_lightningdit_exports_under_its_original_names(tiny_run, tmp_path):
    weights.main_export(weights.ExportConfig(run=tiny_run, out=str(tmp_path / "exported")))
    again = load_dit(tmp_path / "exported" / "lightningdit.pt")
    ours = load_dit(runs.latest_checkpoint(tiny_run))
    assert (again.cfg.C, again.cfg.D) == (ours.cfg.C + ours.cfg.D, 0)
    side = again.cfg.grid * again.cfg.p
    z_all = torch.randn(2, again.cfg.C, side, side)
    t = torch.tensor([0.2, 0.7])
    y = torch.tensor([0, 1])
    with torch.no_grad():
        assert (again(z_all, t, y) - ours(z_all, t, y)).abs().max() < 5e-6
