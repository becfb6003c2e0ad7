"""support/text.py: SD3.5's text encoders against diffusers, the cache of what they give, dropped labels."""
import shutil

import pytest
import torch

from support import text

PROMPTS = ["a red fox, asleep", "snow"]
CPU = torch.device("cpu")


@torch.no_grad()
def test_text_encoding_equals_the_pipelines(sd3_folder):
    from diffusers import StableDiffusion3Pipeline
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    ref, ref_null, pooled, pooled_null = pipe.encode_prompt(
        PROMPTS, None, None, negative_prompt=["", ""], max_sequence_length=24)
    encoders = text.load_text_encoders(sd3_folder, CPU)
    for prompts, wanted, wanted_pooled in ((PROMPTS, ref, pooled), (["", ""], ref_null, pooled_null)):
        context, vector = text.encode_text(encoders, prompts, t5_tokens=24)
        assert context.shape == (2, 77 + 24, 40)
        assert (context - wanted).abs().max() < 1e-6
        assert (vector - wanted_pooled).abs().max() < 1e-6
    without_t5, _ = text.encode_text([*encoders[:2], None], PROMPTS, t5_tokens=24, width=40)
    assert (without_t5[:, :77] == ref[:, :77]).all()
    assert without_t5[:, 77:].abs().max() == 0


def test_cached_text_is_what_the_encoders_give_is_added_to_and_is_not_mixed(sd3_folder, tmp_path, capsys):
    folder = tmp_path / "text"
    text.cache_text(sd3_folder, ["fox", "snow", "fox"], folder, CPU, t5_tokens=24, batch_size=2, shard=2)
    assert sorted(p.name for p in folder.iterdir()) == ["text_00000.safetensors", "text_00001.safetensors"]
    first = folder / "text_00000.safetensors"
    written = first.stat().st_mtime_ns
    (folder / "text_00001.safetensors").unlink()                   # as if cut off
    text.cache_text(sd3_folder, ["fox", "snow", "owl"], folder, CPU, t5_tokens=24, batch_size=2, shard=2)
    assert first.stat().st_mtime_ns == written
    cache = text.TextCache(folder)
    assert set(cache.rows) == {"", "fox", "snow", "owl"}
    words = ["owl", "", "fox"]
    encoders = text.load_text_encoders(sd3_folder, CPU)
    for ours, ref in zip(cache(words), text.encode_text(encoders, words, 24), strict=True):
        assert (ours - ref).abs().max() < 1e-6
    text.cache_text(sd3_folder, ["owl"], folder, CPU, t5_tokens=24)
    assert "holds all 4 texts already" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="no embedding of 'bear'"):
        cache(["fox", "bear"])
    with pytest.raises(SystemExit, match="24 T5 tokens; now .*, 16: give another --out"):
        text.cache_text(sd3_folder, ["owl"], folder, CPU, t5_tokens=16)
    other = shutil.copytree(sd3_folder, tmp_path / "other")
    weights = other / "text_encoder_3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(SystemExit, match="give another --out"):
        text.cache_text(other, ["owl"], folder, CPU, t5_tokens=24)
    with pytest.raises(SystemExit, match="no text_"):
        text.TextCache(tmp_path)


def test_labels_are_dropped_to_the_null_class_at_the_given_rate():
    torch.manual_seed(0)
    y = text.drop_labels(torch.zeros(20_000).long(), 7, 0.1)
    assert set(y.tolist()) == {0, 7}
    assert abs((y == 7).float().mean() - 0.1) < 0.01
    assert (text.drop_labels(y, 9, 0.0) == y).all()
