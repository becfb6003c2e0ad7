"""support/text.py: SD3.5's text encoders against diffusers, the cache of what they give, dropped labels."""

import shutil

from types import SimpleNamespace

import pytest
import torch

from support import text

PROMPTS = ["a red fox, asleep", "snow"]


@torch.no_grad()
def test_text_encoding_equals_the_pipelines(sd3_folder):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    ref, ref_null, pooled, pooled_null = pipe.encode_prompt(
        PROMPTS, None, None, negative_prompt=["", ""], max_sequence_length=24
    )
    encoders = text.load_text_encoders(sd3_folder, torch.device("cpu"))
    for prompts, context, vector in ((PROMPTS, ref, pooled), (["", ""], ref_null, pooled_null)):
        ours = text.encode_text(encoders, prompts, t5_tokens=24)
        assert ours[0].shape == (2, 77 + 24, 40) and (ours[0] - context).abs().max() < 1e-6
        assert (ours[1] - vector).abs().max() < 1e-6
    without_t5 = text.encode_text([*encoders[:2], None], PROMPTS, t5_tokens=24, width=40)
    assert (without_t5[0][:, :77] == ref[:, :77]).all() and without_t5[0][:, 77:].abs().max() == 0


def test_cached_text_is_what_the_encoders_give_is_added_to_and_is_not_mixed(sd3_folder, tmp_path, capsys):
    cpu, folder = torch.device("cpu"), tmp_path / "text"
    text.cache_text(sd3_folder, ["fox", "snow", "fox"], folder, cpu, t5_tokens=24, batch_size=2, shard=2)
    assert sorted(p.name for p in folder.iterdir()) == ["text_00000.safetensors", "text_00001.safetensors"]
    stamp = (folder / "text_00000.safetensors").stat().st_mtime_ns
    (folder / "text_00001.safetensors").unlink()  # as if cut off
    text.cache_text(sd3_folder, ["fox", "snow", "owl"], folder, cpu, t5_tokens=24, batch_size=2, shard=2)
    assert (folder / "text_00000.safetensors").stat().st_mtime_ns == stamp
    cache = text.TextCache(folder)
    assert set(cache.rows) == {"", "fox", "snow", "owl"}
    encoders = text.load_text_encoders(sd3_folder, cpu)
    for ours, ref in zip(cache(["owl", "", "fox"]), text.encode_text(encoders, ["owl", "", "fox"], 24)):
        assert (ours - ref).abs().max() < 1e-6
    text.cache_text(sd3_folder, ["owl"], folder, cpu, t5_tokens=24)
    assert "holds all 4 texts already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no embedding of 'bear'"):
        cache(["fox", "bear"])
    with pytest.raises(SystemExit, match="24 T5 tokens; now .*, 16: give another --out"):
        text.cache_text(sd3_folder, ["owl"], folder, cpu, t5_tokens=16)
    other = tmp_path / "other"
    shutil.copytree(sd3_folder, other)
    weights = other / "text_encoder_3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(SystemExit, match="give another --out"):
        text.cache_text(other, ["owl"], folder, cpu, t5_tokens=24)
    with pytest.raises(SystemExit, match="no text_"):
        text.TextCache(tmp_path)


def test_no_shard_of_texts_is_ever_written_over(sd3_folder, tmp_path):
    cpu = torch.device("cpu")
    text.cache_text(sd3_folder, ["fox", "snow"], tmp_path, cpu, t5_tokens=24, shard=1)
    (tmp_path / "text_00001.safetensors").unlink()
    text.cache_text(sd3_folder, ["fox", "snow", "owl"], tmp_path, cpu, t5_tokens=24, shard=1)
    assert [p.stem for p in text.shards_of(tmp_path)] == [f"text_{n:05d}" for n in (0, 2, 3, 4)]
    assert set(text.TextCache(tmp_path).rows) == {"", "fox", "snow", "owl"}


def test_a_conditioner_gives_labels_or_the_texts_of_images_and_drops_both(sd3_folder, tmp_path):
    dit = SimpleNamespace(cfg=SimpleNamespace(num_classes=7))
    words = ["a fox", "snow", "an owl"]

    class Images:
        captions = words
        labels = [5, 5, 5]

        def __len__(self):
            return 3

    y, cpu = torch.tensor([2, 0]), torch.device("cpu")
    by_class = text.Conditioner(dit, Images(), SimpleNamespace(text=""), cpu, 0)
    assert by_class(y, 0.0)[0].tolist() == [2, 0] and by_class(y, 1.0)[0].tolist() == [7, 7]

    images = Images()
    cfg = SimpleNamespace(text=str(sd3_folder), out=tmp_path, t5_tokens=24, data_dir="photos")
    by_text = text.Conditioner(dit, images, cfg, cpu, 0)
    assert images.labels.tolist() == [0, 1, 2]  # by which captions are found
    wanted = text.TextCache(tmp_path / "text")
    for p, texts in ((0.0, ["an owl", "a fox"]), (1.0, ["", ""])):
        assert all(torch.equal(ours, ref) for ours, ref in zip(by_text(y, p), wanted(texts)))
    images.captions = None
    with pytest.raises(SystemExit, match="photos: has no captions"):
        text.Conditioner(dit, images, cfg, cpu, 0)


def test_prompts_are_read_off_a_line_or_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\n snow \n")
    assert (
        text.read_prompts(str(tmp_path / "prompts.txt"))
        == text.read_prompts("a fox| snow|")
        == ["a fox", "snow"]
    )
    with pytest.raises(SystemExit, match="wanted --out= and captions"):
        text.main_text(text.TextConfig(out=str(tmp_path)))


def test_labels_are_dropped_to_the_null_class_at_the_given_rate():
    torch.manual_seed(0)
    y = text.drop_labels(torch.zeros(20_000).long(), 7, 0.1)
    assert set(y.tolist()) == {0, 7} and abs((y == 7).float().mean() - 0.1) < 0.01
    assert (text.drop_labels(y, 9, 0.0) == y).all()
