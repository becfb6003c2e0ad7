"""support/diffusers_text.py: text as diffusers encodes it; FLUX.2 and Sana, from captions to pipelines."""
import functools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune
import sample
from davae import DAVAE, DAVAEConfig
from finetune import PRESETS
from support import data, hub, metrics, runs, text
from support.weights import ExportConfig, load_base_vae, load_davae, load_dit, load_run, main_export

CPU = torch.device("cpu")
LETTERS = "abcdefghijklmnopqrstuvwxyz,"


@pytest.fixture(scope="module")
def diffusers():
    metrics.import_torchvision()
    return pytest.importorskip("diffusers")


def letters(special, kind, **names):
    """A tokenizer of single letters."""
    pieces = [*special, *LETTERS, "\u0120", "\u010a"]              # Qwen's space and newline
    tokenizer = kind(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], **names)
    return tokenizer, len(pieces)


@pytest.fixture(scope="module")
def klein(diffusers, randomise, tmp_path_factory):
    """A saved Flux2KleinPipeline of small random parts: Qwen3, transformer, VAE (f = 2, C = 4)."""
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    tokenizer, size = letters(
        ["<|end|>", "<|im_start|>", "<|im_end|>"], Qwen2TokenizerFast, pad_token="<|end|>",
        eos_token="<|im_end|>", unk_token="<|end|>", additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    encoder = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=27, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4))
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4)
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 2)
    pipeline = diffusers.Flux2KleinPipeline(
        transformer=randomise(transformer), vae=vae, text_encoder=encoder.eval(), tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    folder = tmp_path_factory.mktemp("klein")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sana(diffusers, randomise, tmp_path_factory):
    """A saved SanaPipeline of small random parts: Gemma 2, transformer, DC-AE (f = 4, C = 4)."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast
    torch.manual_seed(0)
    tokenizer, size = letters(["<pad>", "<eos>", "<bos>", "<unk>", "\u2581"], GemmaTokenizerFast)
    encoder = Gemma2Model(Gemma2Config(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, sliding_window=8))
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8)
    kinds = ["ResBlock", "ResBlock", "EfficientViTBlock"]
    sizes = dict(encoder_block_out_channels=(16, 32, 32), decoder_block_out_channels=(16, 32, 32))
    sizes |= dict(encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1))
    sizes |= dict(encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)))
    vae = diffusers.AutoencoderDC(
        latent_channels=4, encoder_block_types=kinds, decoder_block_types=kinds, downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41407, **sizes)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    folder = tmp_path_factory.mktemp("sana")
    diffusers.SanaPipeline(
        tokenizer, encoder.eval(), vae, randomise(transformer), scheduler).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- text


def test_klein_embeddings_are_the_pipelines_own(klein, diffusers, tmp_path, capsys):
    text.cache_text(klein, ["a fox", "snow"], tmp_path, CPU, t5_tokens=25)
    context, beside = text.TextCache(tmp_path, t5_tokens=25)(["snow", "", "a fox"])
    pipeline = diffusers.Flux2KleinPipeline.from_pretrained(klein)
    ref, _ = pipeline.encode_prompt(["snow", "", "a fox"], max_sequence_length=25)
    assert context.shape == (3, 25, 24) and len(beside) == 3
    assert (context - ref).abs().max() <= 1e-6 * ref.abs().max()           # of another batch: other last bits
    assert (ref[0] - ref[1]).abs().max() > 1e-3
    assert not text.open_encoders(klein, CPU, 25)(["a fox"])[0].requires_grad
    assert "1 of 3 prompts are cut" not in capsys.readouterr().out
    text.cache_text(klein, ["an owl"], tmp_path / "short", CPU, t5_tokens=22)
    assert "1 of 2 prompts are cut: the encoder reads 22 tokens: 'an owl'" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="made with .* 25 T5 tokens"):
        text.cache_text(klein, ["owl"], tmp_path, CPU, t5_tokens=22)


def test_sana_prompts_get_its_instructions_and_the_empty_one_none(diffusers, sana, tmp_path, monkeypatch):
    text.cache_text(sana, ["a fox"], tmp_path, CPU, t5_tokens=12)
    context, mask = text.TextCache(tmp_path)(["a fox", ""])
    pipeline = diffusers.SanaPipeline.from_pretrained(sana)

    # what the pipeline itself passes to its transformer, for a prompt and for guidance's empty one
    class Seen(Exception):
        pass

    def encode_prompt(*args, **options):
        raise Seen(type(pipeline).encode_prompt(pipeline, *args, **options))

    monkeypatch.setattr(pipeline, "encode_prompt", encode_prompt, raising=False)
    with pytest.raises(Seen) as caught:
        pipeline("a fox", max_sequence_length=12, use_resolution_binning=False, height=64, width=64)
    positive, positive_mask, negative, negative_mask = caught.value.args[0]
    assert torch.equal(context, torch.cat([positive, negative]))
    assert torch.equal(mask, torch.cat([positive_mask, negative_mask]).float())
    assert mask[1].sum() < mask[0].sum()
    assert not text.open_encoders(sana, CPU, 12)(["a fox"])[0].requires_grad


@pytest.mark.parametrize("pipeline", ["klein", "sana"])
def test_an_encoder_with_a_tensor_missing_is_refused_not_filled_at_random(pipeline, request, tmp_path):
    shutil.copytree(request.getfixturevalue(pipeline), tmp_path / "cut")
    file = tmp_path / "cut/text_encoder/model.safetensors"
    state = load_file(file)
    gone = next(name for name in state if "mlp" in name)
    del state[gone]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=f"this text encoder lacks 1 tensors, the first .*{re.escape(gone)}"):
        text.cache_text(tmp_path / "cut", ["a fox"], tmp_path / "text", CPU, t5_tokens=12)


@pytest.mark.parametrize("pipeline, missing, message", [
    ("klein", "tokenizer.json", "tokenizer: has no tokenizer; wanted tokenizer_config.json there, and"),
    ("sana", "tokenizer.json", "tokenizer: has no tokenizer; wanted tokenizer_config.json there, and"),
    ("sana", "", "tokenizer: has no tokenizer; wanted tokenizer_config.json there, and"),
    ("klein", "chat_template.jinja", "tokenizer: has no chat template; wanted chat_template.jinja"),
])
def test_without_a_whole_tokenizer_nothing_is_encoded(pipeline, missing, message, request, tmp_path):
    """transformers would make one without a vocabulary, to which all prompts are the same."""
    folder = tmp_path / "pipeline"
    shutil.copytree(request.getfixturevalue(pipeline), folder)
    if missing:
        (folder / "tokenizer" / missing).unlink()
    else:
        shutil.rmtree(folder / "tokenizer")
    with pytest.raises(SystemExit, match=message):
        text.cache_text(folder, ["a fox", "snow"], tmp_path / "text", CPU, t5_tokens=12)
    assert not list((tmp_path / "text").glob("*.safetensors"))


def test_pipelines_that_encode_prompts_in_other_ways_are_named(klein, tmp_path):
    """FLUX.2 [dev] has the transformer that klein has, but other text."""
    folder = tmp_path / "dev"
    shutil.copytree(klein, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "Flux2Pipeline"}))
    with pytest.raises(SystemExit, match="dev: is a Flux2Pipeline, which .* wanted StableDiffusion3"):
        text.cache_text(folder, ["a fox"], tmp_path / "text", CPU, t5_tokens=12)


@pytest.mark.parametrize("pipeline", ["klein", "sana"])
def test_enough_is_fetched_from_the_hub_to_encode(pipeline, request, tmp_path):
    folder = request.getfixturevalue(pipeline)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    fetched, _ = hub.wanted(names, part="text")
    for name in fetched:
        (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, tmp_path / "fetched" / name)
    found = []
    for i, source in enumerate((folder, tmp_path / "fetched")):
        text.cache_text(source, ["a fox"], tmp_path / f"text{i}", CPU, t5_tokens=12)
        found.append(text.TextCache(tmp_path / f"text{i}")(["a fox"]))
    assert all(torch.equal(x, y) for x, y in zip(*found)) and len(fetched) < len(names)


# ---------------------------------------------------------------- from captions to their own pipelines


@pytest.fixture(scope="module")
def finished(klein, sana, sd3_folder, tmp_path_factory):
    """finished("Flux2"), "Sana" or "SD3" -> the Config of a run, made once: three steps on a DA-VAE."""
    @functools.cache
    def make(model):
        pipeline, preset, own = {
            "Flux2": (klein, "klein-1024", dict(t5_tokens=16)),
            "Sana": (sana, "sd35m-1024", dict(t5_tokens=12, model="Sana", cfg=4.5)),  # as in docs/recipes.md
            "SD3": (sd3_folder, "sd35m-1024", dict(t5_tokens=12)),
        }[model]
        folder = tmp_path_factory.mktemp(model)
        torch.manual_seed(0)
        vae = DAVAE(load_base_vae(pipeline), DAVAEConfig(D=8)).eval()
        runs.save_folder(folder / "vae", {"model": vae.state_dict()}, {"model": vae.config()})
        photos = captioned(folder / "photos")
        text.main_text(text.TextConfig(
            encoders=str(pipeline), out=str(folder / "text"), data_dir=photos, t5_tokens=own["t5_tokens"]))
        values = PRESETS[preset] | dict(
            out=str(folder / "run"), vae=str(folder / "vae"), base=str(pipeline), text=str(folder / "text"),
            data_dir=photos, image_size=32, batch_size=4, micro_batch=2, D=8, lora=2, N=2, steps=3, lr=1e-2,
            save_every=100, sample_steps=2, log_every=1, dtype="float32") | own
        cfg = finetune.Config(preset=preset, **values)
        assert finetune.main(cfg)["warm_start"] == 0.0
        return cfg
    return make


def captioned(folder):
    """A folder of eight drawings of 32 pixels with captions."""
    folder.mkdir()
    drawn = data.Procedural(64, 8, 0)
    for i in range(8):
        Image.fromarray(drawn.image(i)[0]).resize((32, 32)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(["a fox", "snow"][i % 2])
    return str(folder)


@pytest.mark.parametrize("model", ["Flux2", "Sana"])
def test_checkpoints_hold_what_is_trained_and_runs_resume_bit_for_bit(
        model, finished, tmp_path, same_weights):
    run = finished(model)
    saved = load_file(runs.latest_checkpoint(run.out) / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"P", "O", "P_new", "O_new", "net"}
    assert all(name.rpartition(".")[2] in ("A", "B") for name in saved if name.startswith("net."))
    again = replace(run, out=str(tmp_path / "again"), steps=1)
    finetune.main(again)
    finetune.main(replace(again, steps=3))
    assert same_weights(run, again, ("model", "ema"))


@pytest.mark.parametrize("model", ["Flux2", "Sana"])
def test_every_weight_can_be_trained(model, finished, tmp_path):
    cfg = replace(finished(model), out=str(tmp_path / "whole"), lora=0, steps=1, checkpointing=True)
    finetune.main(cfg)
    after = load_dit(runs.latest_checkpoint(cfg.out), "model").state_dict()
    before = load_dit(cfg.base).state_dict()
    moved = [not torch.equal(weight, after[name]) for name, weight in before.items()]
    assert sum(moved) > 0.9 * len(moved)


def test_the_exported_run_draws_the_same_in_flux2s_own_pipeline(finished, tmp_path, error):
    """With the code in docs/recipes.md; the shift is what the pipeline computes from the token count."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
    run = finished("Flux2")
    noise = sample.sample_noise(0, [0], (12, 8, 12))
    theirs = by_recipe(
        "Flux2KleinPipeline", "FLUX.2-klein-base-4B", run, tmp_path, height=32, width=48,
        latents=F.pixel_unshuffle(noise, 2), max_sequence_length=16)
    mu = compute_empirical_mu(24, 3)                               # of 4 x 6 tokens
    ours = drawn(run, width=48, shift=math.exp(-mu))
    assert error(ours, theirs) < 1e-4 and theirs.std() > 0.05


def test_the_exported_run_draws_the_same_in_sanas_own_pipeline(finished, tmp_path, error):
    """With the code in docs/recipes.md, and the run's own shift, grid and guidance."""
    run = finished("Sana")
    theirs = by_recipe(
        "SanaPipeline", "Sana_1600M_1024px_diffusers", run, tmp_path, height=32, width=64,
        latents=sample.sample_noise(0, [0], (12, 4, 8)), max_sequence_length=12, use_resolution_binning=False)
    ours = drawn(run, width=64)
    assert error(ours, theirs) < 1e-4 and theirs.std() > 0.05
    assert error(drawn(run, width=64, shift=1.0), theirs) > 1e-2
    # from it, the pipeline knows how large the images are that it draws before it resizes them
    config = json.loads((tmp_path / "exported/transformer/config.json").read_text())
    assert config["sample_size"] * 32 == run.image_size


def test_the_exported_run_draws_the_same_in_sd3s_own_pipeline(finished, tmp_path, error):
    """With the run's own shift, grid and guidance; and the pipeline's default size is the run's."""
    run = finished("SD3")
    options = dict(latents=sample.sample_noise(0, [0], (12, 8, 12)), max_sequence_length=12)
    theirs = by_recipe(
        "StableDiffusion3Pipeline", "sd3.5-medium", run, tmp_path, height=32, width=48, **options)
    ours = drawn(run, width=48)
    assert error(ours, theirs) < 1e-4 and theirs.std() > 0.05
    assert error(drawn(run, width=48, shift=1.0), theirs) > 1e-2
    config = json.loads((tmp_path / "exported/transformer/config.json").read_text())
    assert config["sample_size"] * load_davae(run.vae).f == run.image_size


def by_recipe(kind, name, run, folder, **options):
    """What a pipeline in docs/recipes.md draws for "a fox" with an exported run in three steps, in [0, 1].

    name: the pipeline's folder in the recipe; options: of its call, replacing the recipe's size
    """
    main_export(ExportConfig(run=run.out, out=str(folder / "exported"), weights="model"))
    recipe = next(block for block in blocks_of_recipes() if f"{kind}.from_pretrained" in block)
    recipe = recipe.replace("exported/", f"{folder}/exported/").replace(name, run.base)
    recipe = recipe.replace('"a red fox", height=1024, width=1024', '"a fox", output_type="pt", **options')
    recipe = re.sub(r"num_inference_steps=\d+", "num_inference_steps=3", recipe)
    names = {"options": options}
    exec(recipe.partition("image.save")[0], names)
    return names["image"]


def drawn(run, **changes):
    """What sample.py draws with the run, 32 pixels high."""
    dit, vae, about = load_run(run.out, "model")
    chosen = sample.Config(prompts="a fox", steps=3, height=32, seed=0, dtype="float32", **changes)
    texts = text.text_for(run.text, [], "", CPU, run.t5_tokens)
    images, _ = sample.generate(dit, vae, [0], sample.settings_of(chosen, about, ""), texts)
    return images[0] / 2 + 0.5


def blocks_of_recipes():
    text = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    return re.findall(r"(?ms)^```python\n(.*?)^```", text)
