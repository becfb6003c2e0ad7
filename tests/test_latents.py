"""support/latents.py: latents encoded on the fly, from the cache, and from LightningDiT's shards."""

import itertools
import json
import threading
from dataclasses import replace

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import finetune
from davae import DAVAE, AutoencoderKL, DAVAEConfig, KLConfig
from support import data, files, identity, latents, ranks
from support.weights import load_davae


def test_latents_encoded_on_the_fly_equal_cached_ones_up_to_half_precision(
    finetune_config, tiny_vae, tmp_path
):
    vae = load_davae(tiny_vae)
    cfg = finetune_config(tmp_path, flip=True)
    train_set = data.open_dataset("procedural", 64, 64, 0)
    streams = [
        latents.latent_source(vae, train_set, replace(cfg, cache=c), torch.device("cpu"), 0, 1)(5)
        for c in (True, False)
    ]
    for _ in range(3):
        (z, y), (z2, y2) = (next(s) for s in streams)
        assert torch.equal(y, y2) and (z - z2).abs().max() < 2e-3 * z.abs().max()


def test_cached_latents_are_read_one_step_ahead_in_order_and_an_error_stops_its_own_step():
    read = []
    begun = {step: threading.Event() for step in range(3, 9)}

    def batch(step):
        read.append((step, threading.current_thread() is threading.main_thread()))
        begun[step].set()
        if step == 6:
            raise SystemExit("row 5 is not finite")
        return torch.full((1, 2), float(step)), torch.tensor([step])

    cached = SimpleNamespace(plan=lambda batch_size, seed, step, *rest: (step,), batch=batch)
    stream = latents.cached_steps(cached, known_config(), torch.device("cpu"), 0, 1, start=3)
    for step in (3, 4, 5):
        z_all, y = next(stream)
        assert z_all.tolist() == [[step, step]] and y.tolist() == [step]
        assert begun[step + 1].wait(5)                     # while this step is computed
    with pytest.raises(SystemExit, match="row 5 is not finite"):
        next(stream)
    assert read == [(step, False) for step in (3, 4, 5, 6)]


def test_large_images_are_encoded_a_few_at_a_time_to_the_same_latents(finetune_config, tiny_vae, monkeypatch):
    vae = load_davae(tiny_vae)
    images, _ = data.stack(data.open_dataset("procedural", 64, 8, 0), range(8))
    cfg = finetune_config(".")
    whole = latents.encode(vae, images, cfg, torch.device("cpu"))
    sizes = []
    monkeypatch.setattr(vae, "encode", lambda x, f=vae.encode, **how: (sizes.append(len(x)), f(x, **how))[1])
    monkeypatch.setattr(ranks, "at_once", lambda most, height, width: 3)
    assert torch.allclose(latents.encode(vae, images, cfg, torch.device("cpu")), whole, atol=1e-5)
    assert sizes == [3, 3, 2]


def test_ranks_with_different_images_are_refused(
    finetune_config, tiny_vae, tmp_path, monkeypatch
):
    vae, cpu = load_davae(tiny_vae), torch.device("cpu")
    train_set = data.open_dataset("procedural", 64, 8, 0)
    monkeypatch.setattr(ranks, "from_all", lambda header: [header | {"about": "of other copies"}, header])
    with pytest.raises(SystemExit, match="process 1 has other images, .* than process 0; .*cp -p, rsync"):
        latents.write_cache(vae, train_set, finetune_config(tmp_path, data_dir="photos"), cpu, 1, 2)


def test_sampled_details_and_the_noise_of_their_step_use_different_seeds(
    finetune_config, tiny_vae, tmp_path, monkeypatch
):
    cfg = finetune_config(tmp_path, detail_sample=True, cache=False)
    seeds = []
    monkeypatch.setattr(latents, "encode", lambda vae, images, *args: seeds.append(torch.initial_seed())
                        or torch.zeros(len(images), 32, 8, 8))
    stream = latents.encoded_steps(load_davae(tiny_vae), data.open_dataset("procedural", 64, 64, 0), cfg,
                                   torch.device("cpu"), 0, 1, start=3)
    z_all, _ = next(stream)
    for _ in ranks.micro_batches(None, 2, z_all, seed=cfg.seed, step=3):
        seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 3


def test_sampled_details_differ_by_rank_and_stay_the_same_on_resume(
    make_davae, monkeypatch
):
    monkeypatch.setattr(latents, "encode", lambda *args: torch.randn(2, 16, 1, 1))
    cfg = known_config(detail_sample=True, cache=False)

    def drawn(rank, start, count):
        stream = latents.encoded_steps(make_davae(), Halves(), cfg, torch.device("cpu"), rank, 2, start)
        return torch.stack([next(stream)[0] for _ in range(count)])

    straight = drawn(0, 3, 3)
    assert torch.equal(drawn(0, 5, 1)[0], straight[2])
    assert len({step.sum().item() for step in [*straight, *drawn(1, 3, 3)]}) == 6


def test_ranks_share_the_shards_that_an_interrupted_job_left_out(make_davae, tmp_path, monkeypatch):
    """Even if those were all one rank's."""
    monkeypatch.setattr(latents, "SHARD", 1)
    vae, cfg = make_davae(), known_config(out=tmp_path, image_size=16)
    job = [vae, data.open_dataset("procedural", 16, 8, 0), cfg, torch.device("cpu")]
    folder = latents.write_cache(*job, 0, 1)
    left_out = [folder / f"{n:05d}.safetensors" for n in (1, 3, 5, 7)]
    for file in left_out:
        file.unlink()
    latents.write_cache(*job, 0, 2)
    assert sum(file.exists() for file in left_out) == 2


def test_ranks_share_the_shards_and_a_cache_too_large_for_the_disk_is_refused(
    make_davae, tmp_path, monkeypatch
):
    monkeypatch.setattr(latents, "SHARD", 1)
    vae, cfg = make_davae(), known_config(out=tmp_path, image_size=16)
    monkeypatch.setattr(ranks, "from_all", lambda header: [header] * 2)
    size = 3 * 2 * 16 * 4 * 4 * 2                      # images, orientations, channels, pixels, bytes

    def write(rank, free):
        monkeypatch.setattr(latents.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        return latents.write_cache(vae, Halves(), cfg, torch.device("cpu"), rank, 2)

    with pytest.raises(SystemExit, match="GB free, .* GB of latents to write; give --cache=False"):
        write(0, size - 1)
    folder = write(1, size)
    assert [path.name for path in folder.glob("0*")] == ["00001.safetensors"]
    kept = (folder / "00001.safetensors").stat().st_mtime_ns
    write(0, 2 * size // 3)                            # its half of what is still missing
    write(0, size // 3)
    assert sorted(path.name for path in folder.glob("0*")) == [f"0000{n}.safetensors" for n in range(3)]
    assert (folder / "00001.safetensors").stat().st_mtime_ns == kept
    assert latents.Latents(folder, vae, 12).labels.tolist() == [0, 1, 2]


def test_a_second_job_waits_for_the_cache_that_the_first_is_writing(make_davae, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    vae, cfg = make_davae(), known_config(out=tmp_path, image_size=16)
    writing, waiting, encoded, encode = threading.Event(), threading.Event(), [], latents.encode_shard

    def slow(*args):
        writing.set()
        assert waiting.wait(5)                            # until the second job has said that it waits
        encoded.append(args[3])
        return encode(*args)

    monkeypatch.setattr(latents, "encode_shard", slow)
    monkeypatch.setattr(files, "print", lambda line: waiting.set(), raising=False)
    job = [vae, Halves(), cfg, torch.device("cpu"), 0, 1]
    first = threading.Thread(target=latents.write_cache, args=job)
    first.start()
    assert writing.wait(5)
    folder = latents.write_cache(*job)
    first.join()
    assert encoded == [0, 1]                               # each shard once
    assert latents.Latents(folder, vae, 12).labels.tolist() == [0, 1, 2]


def test_an_interrupted_cache_resumes_describes_itself_and_belongs_to_one_vae(
    finetune_config, tiny_vae, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(latents, "SHARD", 16)
    vae, cfg = load_davae(tiny_vae), finetune_config(tmp_path, vae="")
    train_set, encoded = data.open_dataset("procedural", 64, 40, 0), []

    cpu, encode = torch.device("cpu"), latents.encode

    def counted(vae, images, *rest):
        encoded.append(len(images))
        return encode(vae, images, *rest)

    monkeypatch.setattr(latents, "encode", counted)
    folder = latents.write_cache(vae, train_set, cfg, cpu, 0, 1)
    assert encoded == [16, 16, 8] and "40 images to encode" in capsys.readouterr().out
    with safe_open(folder / "00001.safetensors", "pt") as f:
        about = json.loads(f.metadata()["about"])
        assert len(f.metadata()["vae"]) == 16 and about["detail"] == "mode" and about["image_size"] == 64
    whole = latents.Latents(folder, vae, 12).batch(list(range(40)), [False] * 40)[0]
    (folder / "00001.safetensors").rename(folder / "00001.tmp0")  # as if killed during the write
    assert latents.write_cache(vae, train_set, cfg, cpu, 0, 1) == folder and encoded[3:] == [16]
    assert torch.equal(latents.Latents(folder, vae, 12).batch(list(range(40)), [False] * 40)[0], whole)
    vae.down.conv.bias.data += 1
    assert latents.write_cache(vae, train_set, cfg, cpu, 0, 1) != folder


def test_shards_extracted_by_lightningdit_are_read_and_normalised(finetune_config, tiny_vae, tmp_path):
    """Raw fp32 latents of both orientations with labels, as its extract_features.py saves them."""
    vae, drawn = load_davae(tiny_vae), data.open_dataset("procedural", 64, 20, 0)
    x = data.to_tensor(data.stack(drawn, range(20))[0])
    mean, std = (
        torch.cat([getattr(vae.base, name), getattr(vae, name)]).view(1, -1, 1, 1) for name in ("mean", "std")
    )
    both = [vae.encode(v) for v in (x, x.flip(3))]
    for n, part in enumerate((slice(0, 12), slice(12, 20))):
        save_file(
            {
                "latents": (both[0] * std + mean)[part].contiguous(),
                "latents_flip": (both[1] * std + mean)[part].contiguous(),
                "labels": torch.from_numpy(drawn.labels[part]),
            },
            tmp_path / f"latents_rank00_shard{n:03d}.safetensors",
        )
    cfg = finetune_config(tmp_path / "run", data_dir=str(tmp_path), flip=True, steps=2)
    for D in (0, 12):
        kept = latents.Latents(tmp_path, vae, D)
        z, y = kept.batch([3, 15, 19], [False, True, False])
        wanted = torch.stack([both[0][3], both[1][15], both[0][19]])[:, : 4 + D]
        assert torch.allclose(z, wanted, atol=1e-5) and y.tolist() == [3, 5, 9]
    assert finetune.main(cfg)["warm_start"] == 0.0
    with pytest.raises(SystemExit, match="latents of 16 channels; wanted 28"):
        latents.Latents(tmp_path, vae, 24)


# ---------------------------------------------------------------- what identifies a cache


def known_vae():
    """A DAVAE with f = 4, C = 4, D = 12 whose every number is known: no random generator is used."""
    vae = DAVAE(AutoencoderKL(KLConfig(C=4, widths=(8, 16), blocks=1, groups=4)), DAVAEConfig(D=12)).eval()
    for tensor in vae.state_dict().values():
        tensor.copy_((torch.arange(tensor.numel()) % 7 / 8).view(tensor.shape))
    return vae


def known_config(**changes):
    values = dict(
        vae="",
        base="",
        p=1,
        out="out",
        D=12,
        keep_levels=(),
        data_dir="procedural",
        image_size=64,
        buckets=1.0,
        flip=True,
        seed=3,
        cache=True,
        detail_sample=False,
        text="",
        batch_size=4,
        dtype="float32",
    )
    return SimpleNamespace(**{**values, **changes})


def test_a_cache_of_an_older_version_is_found_again():
    """The name has not changed since caches were first named by their images' contents."""
    cpu = torch.device("cpu")
    cfg, train_set = known_config(), data.open_dataset("procedural", 64, 5, 3)
    folder = latents.cache_folder(cfg, latents.describe(known_vae(), train_set, cfg, cpu))
    assert str(folder) == "out/latents-e6d515fe6e63"
    names = {folder}
    for change in (
        dict(image_size=32),
        dict(flip=False),
        dict(detail_sample=True),
        dict(detail_sample=True, seed=4),
        dict(text="out/text"),
        dict(text="out/text", dtype="bfloat16"),
    ):
        other = known_config(**change)
        names.add(latents.cache_folder(other, latents.describe(known_vae(), train_set, other, cpu)))
    assert len(names) == 7                                         # all differ
    assert latents.describe(known_vae(), data.open_dataset("procedural", 64, 5, 4), cfg, cpu) != (
        latents.describe(known_vae(), train_set, cfg, cpu))


def test_labels_that_a_fork_makes_otherwise_have_a_cache_of_their_own(tmp_path):
    for name in ("ant/a.png", "ant/b.png", "bee/c.png", "bee/d.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / name)
    vae, cfg = known_vae(), known_config(out=tmp_path, image_size=16)

    def written(labels):
        images = data.open_dataset(tmp_path / "photos", 16)
        images.labels[:] = labels
        folder = latents.write_cache(vae, images, cfg, torch.device("cpu"), 0, 1)
        assert latents.Latents(folder, vae, 12).labels.tolist() == labels
        return folder

    by_folder = data.open_dataset(tmp_path / "photos", 16)
    assert by_folder.fingerprint == identity.of_files(by_folder.paths, by_folder.root)     # as it always was
    assert len({written([0, 0, 1, 1]), written([0, 1, 1, 0]), written([1, 1, 0, 0])}) == 3


class Halves(data.Dataset):
    """Images whose left half is black and whose right half is white."""

    labels, classes = np.arange(3), []

    def image(self, i):
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[:, 8:] = 255
        return picture, i


def test_a_resumed_cache_of_sampled_details_draws_the_same_samples(
    make_davae, tmp_path, monkeypatch
):
    monkeypatch.setattr(latents, "SHARD", 1)
    vae, cpu = make_davae(), torch.device("cpu")

    def written(**changes):
        cfg = known_config(out=tmp_path, image_size=16, **changes)
        folder = latents.write_cache(vae, Halves(), cfg, cpu, 0, 1)
        both = [latents.Latents(folder, vae, 12).batch([0, 1, 2], [flip] * 3)[0] for flip in (False, True)]
        return folder, torch.cat(both)

    folder, sampled = written(detail_sample=True)
    (folder / "00001.safetensors").unlink()
    assert torch.equal(written(detail_sample=True)[1], sampled)
    mode, other = written()[1], written(detail_sample=True, seed=4)[1]
    assert torch.equal(sampled[:, :4], mode[:, :4])
    draws = [*(sampled - mode)[:3, 4:], *(other - mode)[:3, 4:]]               # of three equal images
    for a, b in itertools.combinations(draws, 2):
        assert (a - b).std() > 0.1


def test_mirrored_latents_come_from_images_mirrored_left_to_right(tmp_path):
    class Pixels(torch.nn.Module):
        """A VAE whose latent is the image."""

        C, D, f = 3, 0, 1

        def encode(self, x, sample=False):
            return x

    cfg = known_config(out=tmp_path, image_size=16, D=0)
    folder = latents.write_cache(Pixels(), Halves(), cfg, torch.device("cpu"), 0, 1)
    z, y = latents.Latents(folder, Pixels(), 0).batch([1, 2], [False, True])
    assert z[0, :, :, :8].max() == -1 and z[0, :, :, 8:].min() == 1
    assert z[1, :, :, :8].min() == 1 and z[1, :, :, 8:].max() == -1 and y.tolist() == [1, 2]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(D=24), "--D=24, but the VAE has 12 detail channels"),
        (dict(image_size=62), "--image_size=62: the VAE takes multiples of 4; give --image_size=64"),
        (dict(image_size=36, p=2), "the VAE takes multiples of 8, with --p=2; give --image_size=32"),
    ],
)
def test_sizes_that_do_not_fit_the_vae_are_refused(change, said):
    train_set = data.open_dataset("procedural", 64, 5, 3)
    with pytest.raises(SystemExit, match=said):
        latents.check_sizes(known_vae(), train_set, known_config(**change))


def test_a_latent_made_of_blocks_needs_whole_blocks_and_whole_patches():
    vae, train_set = known_vae(), data.open_dataset("procedural", 64, 5, 3)
    latents.check_sizes(vae, train_set, known_config(image_size=36))
    vae.base.block = 2                                             # FLUX.2's
    with pytest.raises(SystemExit, match="--image_size=36: the VAE takes multiples of 8; give"):
        latents.check_sizes(vae, train_set, known_config(image_size=36))
    assert [latents.sides(vae, p) for p in (1, 2, 3)] == [8, 8, 24]            # of images, also in buckets


ZEROS = torch.zeros(3, 16, 8, 8)
GOOD = {"latents": ZEROS, "latents_flip": ZEROS.clone(), "labels": torch.arange(3)}
NAN = ZEROS.clone()
NAN[1, 3, 0, 0] = float("nan")


def shards(folder, header=None, **changes):
    """A good shard a, and a shard b that differs in `changes`; None leaves a tensor out."""
    save_file(GOOD, folder / "a.safetensors")
    tensors = {name: x.contiguous() for name, x in {**GOOD, **changes}.items() if x is not None}
    save_file(tensors, folder / "b.safetensors", header)
    return folder


@pytest.mark.parametrize("changes, said", [
    (dict(latents=ZEROS[..., :4], latents_flip=None), r"\(16, 8, 4\), 'raw'.*wanted \(\(16, 8, 8\), 'raw'\)"),
    (dict(latents=ZEROS[:, :9], latents_flip=None), r"\(9, 8, 8\), 'raw'\); wanted \(\(16, 8, 8\), 'raw'\)"),
    (dict(header={"vae": "0f3"}), r"\(16, 8, 8\), '0f3'\); wanted \(\(16, 8, 8\), 'raw'\), as in a.safe"),
    (dict(labels=torch.arange(4)), r"latents \(3, 16, 8, 8\) .*labels \(4,\); wan"),
    (dict(labels=torch.zeros(3, 10)), r"labels \(3, 10\); wanted .*labels \(n,\)"),
    (dict(labels=None), "holds latents, latents_flip; wanted .*labels"),
    (dict(latents=None, latents_flip=None, labels=None, weight=torch.zeros(2)), "holds weight; wanted lat"),
    (dict(latents=ZEROS.byte()), "of U8, .*wanted .* of floating point"),
    (dict(latents_flip=torch.zeros(3, 16, 4, 4)), r"latents_flip \(3, 16, 4, 4\)"),
    (dict(latents=torch.zeros(0, 16, 8, 8), latents_flip=None, labels=torch.arange(0)), "n > 0"),
    (dict(labels=torch.tensor([0, -1, 2])), "labels from -1 to 2; wanted whole numbers"),
    (dict(labels=torch.tensor([0, 0.5, 2])), "labels from 0.0 to 2.0; wanted whole numbers"),
])
def test_an_invalid_or_mismatched_shard_is_named(tmp_path, changes, said):
    with pytest.raises(SystemExit, match=f"b.safetensors: .*{said}"):
        latents.Latents(shards(tmp_path, **changes), known_vae(), 12)


def test_shards_may_differ_in_precision_and_in_unused_tensors(tmp_path):
    kept = latents.Latents(shards(tmp_path, latents=ZEROS.half(), latents_flip=None), known_vae(), 12)
    latents.check_sizes(known_vae(), kept, known_config(image_size=32, flip=False))
    with pytest.raises(SystemExit, match="b.safetensors: has no mirrored latents .*--flip=False"):
        latents.check_sizes(known_vae(), kept, known_config(image_size=32, flip=True))


@pytest.mark.parametrize("length", [0, 60, 4000, -1])
def test_a_truncated_shard_is_named_and_its_folder_still_holds_latents(tmp_path, length):
    path = shards(tmp_path) / "b.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    for _ in range(2):
        assert latents.Latents.are_in(str(tmp_path))
        with pytest.raises(SystemExit, match="b.safetensors: is truncated"):
            latents.Latents(tmp_path, known_vae(), 12)
        (tmp_path / "a.safetensors").unlink(missing_ok=True)       # now b is the only one


def test_folders_of_images_are_not_listed_and_one_whole_shard_suffices(tmp_path, monkeypatch):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "cat" / "a.png")
    save_file({"lora.up": torch.zeros(2)}, tmp_path / "photos" / "lora.safetensors")
    (tmp_path / "latents").mkdir()
    shards(tmp_path / "latents")
    read, names_in = [], latents.names_in
    monkeypatch.setattr(latents, "names_in", lambda path: read.append(path) or names_in(path))
    monkeypatch.setattr(data, "find_files", lambda folder: pytest.fail(f"{folder} was listed"))
    assert not latents.Latents.are_in(str(tmp_path / "photos"))
    assert latents.Latents.are_in(str(tmp_path / "latents")) and len(read) == 2


def test_non_finite_latents_stop_the_batch_that_holds_them(tmp_path):
    kept = latents.Latents(shards(tmp_path, latents=NAN), known_vae(), 12)
    assert kept.batch([0, 4, 5], [False, True, False])[1].tolist() == [0, 1, 2]   # row 1 mirrored is finite
    with pytest.raises(SystemExit, match="b.safetensors: latents of row 1 are not finite"):
        kept.batch([0, 4], [False, False])


@pytest.mark.parametrize("foreign", [{"latents_1x8x8_float32": ZEROS}, {"lora.up": torch.zeros(2)}, None])
def test_photos_next_to_a_foreign_file_are_read_and_the_file_is_counted(tmp_path, foreign):
    for k in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
    path = tmp_path / "cache.safetensors"
    save_file(foreign, path) if foreign else path.write_bytes(b"broken")
    cfg = known_config(data_dir=str(tmp_path), images=5)
    found = finetune.open_training_set(cfg, known_vae())
    assert found.summary() == "2 images without classes; left out: 1 .safetensors"


def test_a_folder_of_shards_is_read_as_latents_and_other_files_are_counted(tmp_path):
    Image.new("RGB", (8, 8)).save(shards(tmp_path) / "preview.png")
    found = finetune.open_training_set(known_config(data_dir=str(tmp_path)), known_vae())
    assert found.summary() == "6 images in 3 classes (0 2, 1 2, 2 2); left out: 1 .png"


def test_a_cache_given_as_the_data_is_refused_with_another_vae_than_made_it(tmp_path):
    vae, train_set = known_vae(), data.open_dataset("procedural", 64, 2, 3)
    folder = latents.write_cache(vae, train_set, known_config(out=str(tmp_path)), torch.device("cpu"), 0, 1)
    cfg = known_config(data_dir=str(folder), vae="mine")
    assert len(finetune.open_training_set(cfg, vae)) == 2
    vae.mean += 1
    with pytest.raises(SystemExit, match="these latents were made by another VAE than mine; give theirs by"):
        finetune.open_training_set(cfg, vae)


def test_shards_in_the_working_folder_do_not_replace_the_drawings(tmp_path, monkeypatch):
    monkeypatch.chdir(shards(tmp_path))
    for name in ("", "procedural"):
        assert len(finetune.open_training_set(known_config(data_dir=name, images=7), known_vae())) == 7
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty: has no shards of latents"):
        latents.Latents(tmp_path / "empty", known_vae(), 12)


def test_latents_of_the_wrong_size_or_without_mirrored_ones_are_refused(tmp_path):
    vae, cpu = known_vae(), torch.device("cpu")
    shard = {"latents": torch.zeros(2, 16, 8, 8), "labels": torch.tensor([0, 1])}
    save_file(shard, tmp_path / "a.safetensors")
    kept = latents.Latents(tmp_path, vae, 12)
    with pytest.raises(SystemExit, match="latents of 8x8; wanted 16x16"):
        latents.check_sizes(vae, kept, known_config())
    with pytest.raises(SystemExit, match="has no mirrored latents .*--flip=False"):
        latents.check_sizes(vae, kept, known_config(image_size=32))
    z_all, y = next(latents.latent_source(vae, kept, known_config(image_size=32, flip=False), cpu, 0, 1)(0))
    assert z_all.shape == (4, 16, 8, 8) and y.shape == (4,)
