"""support/latents.py: latents encoded on the fly, from the cache, and from the shards of LightningDiT's code."""
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import finetune
from support import data, latents
from support.weights import load_davae


def test_latents_encoded_on_the_fly_equal_the_cached_ones_but_for_half_precision(
        finetune_config, tiny_vae, tmp_path):
    vae = load_davae(tiny_vae)
    cfg = finetune_config(tmp_path, flip=True)
    train_set = data.open_dataset("procedural", 64, 64, 0)
    streams = [latents.latent_source(vae, train_set, replace(cfg, cache=c), torch.device("cpu"), 0, 1)(5) for c in (True, False)]
    for _ in range(3):
        (z, y), (z2, y2) = (next(s) for s in streams)
        assert torch.equal(y, y2) and (z - z2).abs().max() < 2e-3 * z.abs().max()


def test_the_cache_goes_on_where_it_was_cut_off_says_what_it_holds_and_is_another_for_another_vae(
        finetune_config, tiny_vae, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latents, "SHARD", 16)
    vae, cfg = load_davae(tiny_vae), finetune_config(tmp_path, vae="")
    train_set, encoded = data.open_dataset("procedural", 64, 40, 0), []

    def encode(x):
        encoded.append(len(x))
        return vae.encode(data.to_tensor(x))

    folder = latents.write_cache(vae, encode, train_set, cfg, 0, 1)
    assert encoded == [16, 16, 8] and "40 images to encode" in capsys.readouterr().out
    with safe_open(folder / "00001.safetensors", "pt") as f:
        about = json.loads(f.metadata()["about"])
        assert len(f.metadata()["vae"]) == 64 and about["detail"] == "mode" and about["image_size"] == 64
    whole = latents.Latents(folder, vae, 12).batch(list(range(40)), [False] * 40)[0]
    (folder / "00001.safetensors").rename(folder / "00001.tmp0")                                # killed while it was written
    assert latents.write_cache(vae, encode, train_set, cfg, 0, 1) == folder and encoded[3:] == [16]
    assert torch.equal(latents.Latents(folder, vae, 12).batch(list(range(40)), [False] * 40)[0], whole)
    vae.down.conv.bias.data += 1
    assert latents.write_cache(vae, encode, train_set, cfg, 0, 1) != folder


def test_the_shards_that_lightningdit_extracts_are_read_and_normalised(finetune_config, tiny_vae, tmp_path):
    """Raw fp32 latents of both orientations with labels, as its extract_features.py saves them."""
    vae, drawn = load_davae(tiny_vae), data.open_dataset("procedural", 64, 20, 0)
    x = data.to_tensor(data.stack(drawn, range(20))[0])
    mean, std = (torch.cat([getattr(vae.base, name), getattr(vae, name)]).view(1, -1, 1, 1) for name in ("mean", "std"))
    both = [vae.encode(v) for v in (x, x.flip(3))]
    for n, part in enumerate((slice(0, 12), slice(12, 20))):
        save_file({"latents": (both[0] * std + mean)[part].contiguous(), "latents_flip": (both[1] * std + mean)[part].contiguous(),
                   "labels": torch.from_numpy(drawn.labels[part])}, tmp_path / f"latents_rank00_shard{n:03d}.safetensors")
    cfg = finetune_config(tmp_path / "run", data_dir=str(tmp_path), flip=True, steps=2)
    for D in (0, 12):
        kept = latents.Latents(tmp_path, vae, D)
        z, y = kept.batch([3, 15, 19], [False, True, False])
        wanted = torch.stack([both[0][3], both[1][15], both[0][19]])[:, :4 + D]
        assert torch.allclose(z, wanted, atol=1e-5) and y.tolist() == [3, 5, 9]
    assert finetune.main(cfg)["warm_start"] == 0.0
    with pytest.raises(SystemExit, match="latents of 16 channels; wanted 28"):
        latents.Latents(tmp_path, vae, 24)
