"""support/latents.py: latents encoded on the fly, from the cache, and from shards of LightningDiT."""
import json

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
    train_set = data.open_dataset("procedural", 64, 64, 0)

    def stream(cache):
        cfg = finetune_config(tmp_path, flip=True, cache=cache)
        start = latents.latent_source(vae, train_set, cfg, torch.device("cpu"), 0, 1)
        return start(5)

    cached = stream(cache=True)
    fresh = stream(cache=False)
    for _ in range(3):
        z, y = next(cached)
        z2, y2 = next(fresh)
        assert torch.equal(y, y2)
        assert (z - z2).abs().max() < 2e-3 * z.abs().max()


def test_the_cache_goes_on_where_it_was_cut_off_says_what_it_holds_and_is_another_for_another_vae(
        finetune_config, tiny_vae, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latents, "SHARD", 16)
    vae = load_davae(tiny_vae)
    cfg = finetune_config(tmp_path, vae="")
    train_set = data.open_dataset("procedural", 64, 40, 0)
    encoded = []

    def encode(x):
        encoded.append(len(x))
        return vae.encode(data.to_tensor(x))

    def write():
        return latents.write_cache(vae, encode, train_set, cfg, 0, 1)

    def read(folder):
        z, _ = latents.Latents(folder, vae, 12).batch(list(range(40)), [False] * 40)
        return z

    folder = write()
    assert encoded == [16, 16, 8]
    assert "40 images to encode" in capsys.readouterr().out
    second = folder / "00001.safetensors"
    with safe_open(second, "pt") as f:
        about = json.loads(f.metadata()["about"])
        assert len(f.metadata()["vae"]) == 64
        assert about["detail"] == "mode" and about["image_size"] == 64
    whole = read(folder)
    second.rename(second.with_suffix(".tmp0"))                     # killed while it was written
    assert write() == folder
    assert encoded[3:] == [16]
    assert torch.equal(read(folder), whole)
    vae.down.conv.bias.data += 1
    assert write() != folder


def test_the_shards_that_lightningdit_extracts_are_read_and_normalised(finetune_config, tiny_vae, tmp_path):
    """Raw fp32 latents of both orientations with labels, as its extract_features.py saves them."""
    vae = load_davae(tiny_vae)
    drawn = data.open_dataset("procedural", 64, 20, 0)
    x = data.to_tensor(data.stack(drawn, range(20))[0])
    z = vae.encode(x)
    z_flip = vae.encode(x.flip(3))
    mean = torch.cat([vae.base.mean, vae.mean]).view(1, -1, 1, 1)
    std = torch.cat([vae.base.std, vae.std]).view(1, -1, 1, 1)
    for n, part in enumerate((slice(0, 12), slice(12, 20))):
        shard = {
            "latents": (z * std + mean)[part].contiguous(),
            "latents_flip": (z_flip * std + mean)[part].contiguous(),
            "labels": torch.from_numpy(drawn.labels[part]),
        }
        save_file(shard, tmp_path / f"latents_rank00_shard{n:03d}.safetensors")

    wanted = torch.stack([z[3], z_flip[15], z[19]])
    for D in (0, 12):
        read, y = latents.Latents(tmp_path, vae, D).batch([3, 15, 19], [False, True, False])
        assert torch.allclose(read, wanted[:, :4 + D], atol=1e-5)
        assert y.tolist() == [3, 5, 9]
    cfg = finetune_config(tmp_path / "run", data_dir=str(tmp_path), flip=True, steps=2)
    assert finetune.main(cfg)["warm_start"] == 0.0
    with pytest.raises(SystemExit, match="latents of 16 channels; wanted 28"):
        latents.Latents(tmp_path, vae, 24)
