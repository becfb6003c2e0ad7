"""support/diffusers_dit.py: FLUX.2's and Sana's transformers against diffusers' own, small and random."""
import inspect
import re
import sys
import types
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dit
from dit import LoRA, add_lora, merge_lora, warm_start_difference
from support import diffusers_dit, metrics, plan, weights
from support.diffusers_dit import Flux2, Flux2Config, InPipeline, Sana, SanaConfig, export_transformer
from support.weights import load_dit

FLUX2 = dict(
    in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)
SANA = dict(
    in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
    num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
    sample_size=8)


@pytest.fixture(scope="module")
def make(randomise):
    """make("Flux2Transformer2DModel", **settings) -> diffusers' model, random in every weight."""
    metrics.import_torchvision()
    diffusers = pytest.importorskip("diffusers")

    def make(kind, **settings):
        torch.manual_seed(0)
        return randomise(getattr(diffusers, kind)(**settings).eval())
    return make


@pytest.fixture(scope="module")
def theirs(make):
    return {"Flux2": make("Flux2Transformer2DModel", **FLUX2), "Sana": make("SanaTransformer2DModel", **SANA)}


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """ours("Flux2", D=0) -> the same model, loaded from its folder and wrapped; C = 4."""
    folder = tmp_path_factory.mktemp("transformers")
    for kind, net in theirs.items():
        net.save_pretrained(folder / kind)

    def load(kind, D=0):
        model = load_dit(folder / kind)
        if D:
            model.expand_channels(D)
        return model
    return load


@pytest.fixture
def inputs():
    """inputs(channels=4) -> (z, t, context, mask): two latents that are wider than high, and text."""
    def make(channels=4):
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(2, channels, 8, 12, generator=generator)
        context = torch.randn(2, 5, 12, generator=generator)
        return z, torch.tensor([0.15, 0.7]), context, torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return make


def flux2_by_pipeline(net, z, t, context, guidance=None):
    """v as FLUX.2's pipeline computes it, by its own helpers for packing and positions."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline as pipeline
    patches = pipeline._patchify_latents(z)
    ids = pipeline._prepare_latent_ids(patches)
    noise_pred = net(
        hidden_states=pipeline._pack_latents(patches), encoder_hidden_states=context, timestep=1 - t,
        img_ids=ids, txt_ids=pipeline._prepare_text_ids(context), guidance=guidance, return_dict=False)[0]
    return -pipeline._unpatchify_latents(pipeline._unpack_latents_with_ids(noise_pred, ids))


def sana_by_pipeline(net, z, t, context, mask):
    return -net(z, context, 1000 * (1 - t), encoder_attention_mask=mask, return_dict=False)[0]


def velocity(net, kind, z, t, context, mask):
    if kind == "Flux2":
        return flux2_by_pipeline(net, z, t, context)
    return sana_by_pipeline(net, z, t, context, mask)


# ---------------------------------------------------------------- the same as diffusers'


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Flux2", "Sana"])
def test_the_wrapped_model_equals_diffusers_bit_for_bit(kind, theirs, ours, inputs):
    v = velocity(theirs[kind], kind, *inputs())
    assert torch.equal(ours(kind)(*inputs()), v) and v.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Flux2", "Sana"])
def test_the_warm_start_is_exact(kind, theirs, ours, inputs):
    z, t, *cond = inputs()
    base, model = ours(kind), ours(kind, D=8)
    assert warm_start_difference(base, model, z, cond) == (0.0, 0.0)
    z_all = torch.cat([z, torch.randn(2, 8, 8, 12)], dim=1)
    v, v_d = model(z_all, t, *cond).split([4, 8], dim=1)
    assert torch.equal(v, velocity(theirs[kind], kind, z, t, *cond)) and v_d.abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["channels fastest", "columns first", "time not flipped", "time in 1000"])
def test_a_wrong_convention_would_be_noticed(wrong, theirs, ours, inputs, monkeypatch, error):
    """The comparison above can fail: each of these gives another velocity of the same shape."""
    def packed(model, z):
        patches = F.pixel_unshuffle(z, 2)
        if wrong == "channels fastest":
            patches = patches.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)
        if wrong == "columns first":
            patches = patches.transpose(2, 3)
        return patches.flatten(2).transpose(1, 2)

    z, t, context, mask = inputs()
    right = flux2_by_pipeline(theirs["Flux2"], z, t, context)
    monkeypatch.setattr(Flux2, "packed", packed)
    if wrong == "time not flipped":
        t = 1 - t
    if wrong == "time in 1000":
        t = 1 - 1000 * (1 - t)
    assert error(ours("Flux2")(z, t, context, mask), right) > 1e-2


@torch.no_grad()
def test_sana_respects_the_text_mask(ours, inputs, error):
    z, t, context, mask = inputs()
    model = ours("Sana")
    v = model(z, t, context, mask)
    context[0, 3:] = 7.0                                           # padding
    assert error(model(z, t, context, mask), v) < 1e-6
    assert error(model(z, t, context, torch.ones(2, 5)), v) > 1e-3


@torch.no_grad()
def test_a_guidance_distilled_flux2_is_given_its_scale(make, inputs):
    net = make("Flux2Transformer2DModel", **FLUX2 | {"guidance_embeds": True})
    z, t, context, mask = inputs()
    model = Flux2(Flux2Config(C=4, context=12, net=dict(net.config), guidance=2.5))
    _, sd = export_transformer(model)
    assert sd.keys() == net.state_dict().keys()
    model.net.load_state_dict({k: v for k, v in net.state_dict().items() if k in model.net.state_dict()})
    model.P.load_state_dict(net.x_embedder.state_dict())
    model.O.load_state_dict(net.proj_out.state_dict())
    v = flux2_by_pipeline(net, z, t, context, torch.full((2,), 2.5))
    assert torch.equal(model.eval()(z, t, context, mask), v)


@torch.no_grad()
def test_sanas_time_is_scaled_as_in_its_config(make, inputs):
    net = make("SanaTransformer2DModel", **SANA | {"timestep_scale": 0.25})
    model = Sana(SanaConfig(C=4, context=12, net=dict(net.config)))
    model.net.load_state_dict({k: v for k, v in net.state_dict().items() if k in model.net.state_dict()})
    model.P.load_state_dict(net.patch_embed.proj.state_dict())
    model.O.load_state_dict(net.proj_out.state_dict())
    z, t, context, mask = inputs()
    v = -net(z, context, 250 * (1 - t), encoder_attention_mask=mask, return_dict=False)[0]
    assert torch.equal(model.eval()(z, t, context, mask), v)


def test_a_distilled_flux2_gets_its_pipelines_default_guidance():
    metrics.import_torchvision()
    from diffusers import Flux2Pipeline
    wanted = inspect.signature(Flux2Pipeline.__call__).parameters["guidance_scale"].default
    assert Flux2Config().guidance == wanted


@torch.no_grad()
def test_a_davae_in_a_pipeline_decodes_latents_as_they_are(make_davae):
    """Using the lines of FLUX.2's and Sana's pipelines between their last step and the VAE."""
    davae = make_davae()
    vae = InPipeline(davae)
    z_all = torch.randn(2, 16, 4, 6)
    wanted = davae.decode(z_all)
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
    patches = F.pixel_unshuffle(z_all, 2) * std + vae.bn.running_mean.view(1, -1, 1, 1)
    assert torch.equal(vae.decode(F.pixel_shuffle(patches, 2), return_dict=False)[0], wanted)
    latents = z_all.to(vae.dtype) / vae.config.scaling_factor
    assert torch.equal(vae.decode(latents, return_dict=False)[0], wanted)
    assert torch.equal(vae.decode(z_all.double())[0], wanted)


@torch.no_grad()
def test_a_davae_in_a_pipeline_can_be_moved_and_offloaded(make_davae, error):
    davae = make_davae()
    z_all = torch.randn(2, 16, 4, 6)
    wanted = davae.decode(z_all)
    vae = InPipeline(davae).to(torch.bfloat16)                     # as `pipeline.to(torch.bfloat16)`
    assert vae.dtype == torch.bfloat16 and error(vae.decode(z_all)[0].float(), wanted) < 0.1

    # accelerate's hook moves a module before its forward, or where a decoder calls it
    vae._hf_hook = types.SimpleNamespace(pre_forward=lambda module: module.double())
    assert vae.decode(z_all)[0].dtype == torch.float64


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["Flux2", "Sana"])
def test_gradients_reach_both_zero_initialised_layers(kind, ours, inputs):
    model = ours(kind, D=8).train()
    v, v_d = model(*inputs(12)).split([4, 8], dim=1)
    (v.square().mean() + (v_d - 1).square().mean()).backward()
    assert model.P_new.weight.grad.abs().max() > 0 and model.O_new.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["Flux2", "Sana"])
def test_checkpointing_changes_no_gradient(kind, ours, inputs, monkeypatch):
    calls = []
    gradients = []
    for checkpointing in (False, True):
        model = ours(kind, D=8).train()
        model.checkpointing = checkpointing
        original = model.net._gradient_checkpointing_func
        model.net._gradient_checkpointing_func = lambda *x, original=original: calls.append(1) or original(*x)
        model(*inputs(12)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert len(calls) == (len(model.blocks) if checkpointing else 0)
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("kind, adapted", [("Flux2", 5 + 2 * 2), ("Sana", 2 * 8)])
def test_adapters_start_without_effect_freeze_the_net_and_merge(kind, adapted, ours, inputs, error):
    model = ours(kind, D=8)
    before = model(*inputs(12))
    add_lora(model, r=2, alpha=4)
    assert torch.equal(model(*inputs(12)), before)
    adapters = [layer for layer in model.modules() if isinstance(layer, LoRA)]
    assert len(adapters) == adapted
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith("net.") or name.rpartition(".")[2] in ("A", "B")), name

    again = type(model)(model.cfg)                                 # as when opening a run with adapters
    again.load_state_dict(model.state_dict())
    for layer in adapters:
        layer.B.normal_(std=0.1)
    v = model(*inputs(12))
    assert error(before, v) > 1e-2
    assert error(merge_lora(deepcopy(model))(*inputs(12)), v) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Flux2", "Sana"])
def test_the_widened_model_exports_as_a_stock_one(kind, ours, inputs, randomise, make, error):
    model = randomise(ours(kind, D=8), names="_new")
    config, sd = export_transformer(model)
    z, t, *cond = inputs(12)
    settings = {name: value for name, value in config.items() if name != "_class_name"}
    stock = make(config["_class_name"], **settings)
    stock.load_state_dict(sd)
    v = velocity(stock, kind, z, t, *cond)
    assert error(model(z, t, *cond), v) < 1e-5 and v[:, 4:].abs().max() > 1e-2


# ---------------------------------------------------------------- what is refused, in one sentence


def test_mismatches_get_one_sentence(ours, inputs, theirs, tmp_path, make):
    model = ours("Flux2")
    z, *others = inputs()
    with pytest.raises(ValueError, match=r"z_all is \(2, 4, 7, 12\), wanted \(B, 4, h, w\) with h and w"):
        model(z[:, :, :7], *others)
    with pytest.raises(ValueError, match="skip-layer guidance is for SD3.5"):
        model(z, *others, skip=(1,))
    with pytest.raises(ValueError, match="already expanded by D=8"):
        ours("Flux2", D=8).expand_channels(8)
    with pytest.raises(SystemExit, match="weights of diffusers' Flux2Transformer2DModel alone; wanted its"):
        load_dit(theirs["Flux2"].state_dict())
    make("SanaTransformer2DModel", **SANA | {"out_channels": 8}).save_pretrained(tmp_path / "sigma")
    with pytest.raises(SystemExit, match="sigma: this SanaTransformer2DModel takes 4 .* and predicts 8"):
        load_dit(tmp_path / "sigma")
    make("SanaTransformer2DModel", **SANA | {"guidance_embeds": True}).save_pretrained(tmp_path / "sprint")
    with pytest.raises(SystemExit, match="a guidance input .Sprint."):
        load_dit(tmp_path / "sprint")
    theirs["Flux2"].save_pretrained(tmp_path / "flux2")
    (tmp_path / "flux2" / "config.json").write_text('{"_class_name": "Flux2Transformer2DModel"}')
    with pytest.raises(SystemExit, match="config.json lacks in_channels, num_layers"):
        load_dit(tmp_path / "flux2")


def test_missing_diffusers_gets_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="wanted diffusers' Flux2Transformer2DModel, which cannot"):
        Flux2(Flux2Config())


# ---------------------------------------------------------------- at full size, without memory


def test_the_defaults_are_klein_4b_and_sana_1600m(make):
    with torch.device("meta"):
        klein = Flux2(replace(Flux2Config(), D=96))
        sana = Sana(SanaConfig())
    assert sum(p.numel() for p in klein.net.parameters()) + klein.P.weight.numel() * 2 == 3_875_544_576
    assert klein.P.weight.shape == (3072, 128) and klein.P_new.weight.shape == (3072, 4 * 96)
    assert (klein.cfg.E, klein.cfg.depth, len(klein.blocks)) == (3072, 25, 25)
    assert sum(p.numel() for p in sana.parameters()) == 1_604_462_752
    assert (sana.cfg.E, sana.cfg.depth, sana.cfg.C) == (2240, 20, 32)


# ---------------------------------------------------------------- a third model, from docs/recipes.md


@torch.no_grad()
def test_flux1_as_in_the_recipes_equals_diffusers_bit_for_bit(make, inputs, tmp_path, monkeypatch):
    source = next(block for block in blocks_of_recipes() if "class Flux1(" in block)
    monkeypatch.setattr(dit, "MODELS", dict(dit.MODELS))
    monkeypatch.setattr(diffusers_dit, "KINDS", dict(diffusers_dit.KINDS))
    monkeypatch.setattr(weights, "MODELS", dit.MODELS)
    monkeypatch.setattr(weights, "KINDS", diffusers_dit.KINDS)
    module = types.ModuleType("flux1")
    monkeypatch.setitem(sys.modules, "flux1", module)
    exec(compile(source, "flux1.py", "exec"), module.__dict__)

    net = make(
        "FluxTransformer2DModel", in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=6, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6))
    net.save_pretrained(tmp_path)
    from diffusers import FluxPipeline
    z, t, context, _ = inputs()
    pooled = torch.randn(2, 6)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, z.device, z.dtype)
    v = -net(FluxPipeline._pack_latents(z, 2, 4, 8, 12), context, pooled, 1 - t, ids, torch.zeros(5, 3),
             torch.full((2,), 4.0), return_dict=False)[0]
    v = FluxPipeline._unpack_latents(v, 8 * 8, 12 * 8, 8)
    model = load_dit(tmp_path)
    assert torch.equal(model(z, t, context, pooled), v)
    model.expand_channels(4)
    assert warm_start_difference(load_dit(tmp_path), model, z, (context, pooled)) == (0.0, 0.0)
    add_lora(model, r=2)
    assert sum(isinstance(layer, LoRA) for layer in model.modules()) == 5 + 3 + 1
    tokens, vector = plan.text_inputs("Flux1", module.Flux1Config(), 512)      # a dry run's text
    assert (tokens.shape, vector.shape) == ((1, 512, 4096), (1, 768))


def blocks_of_recipes():
    text = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    return re.findall(r"(?ms)^```python\n(.*?)^```", text)
