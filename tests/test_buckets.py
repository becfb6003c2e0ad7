"""support/buckets.py: shapes, which image gets which, the order of batches; both scripts trained on them."""
import dataclasses
import io
import itertools
import json
import math
import shutil
import tarfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save_file

import finetune
import train_vae
from dit import MMDiT, MMDiTConfig
from support import buckets, checks, data, latents, photos, runs, shards
from support.weights import load_davae

CPU = torch.device("cpu")


def settings(**changes):
    """What `buckets.sort` reads from a Config."""
    values = dict(buckets=2.0, data_dir="photos", out="out", image_size=64, batch_size=4, compile=False)
    return SimpleNamespace(**values | changes)


@pytest.fixture(autouse=True)
def work(tmp_path_factory, monkeypatch):
    """A working folder with the run's folder, out, in it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "out").mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_images_that_are_enlarged_are_counted_and_never_too_many_are_looked_at(tmp_path, capsys):
    for i in range(40):
        picture(*((64, 64), (100, 64), (20, 200), (63, 64))[i % 4]).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "00.png").write_bytes(b"not an image")
    square = settings(buckets=1)
    images = data.open_dataset(str(tmp_path), 64)
    assert buckets.sort(images, square, 8) is images and not images.bad
    assert ("photos: 20 of 39 images looked at are smaller than --image_size=64 (one has 200x20 pixels), and "
            "are enlarged") in capsys.readouterr().out
    buckets.say_if_enlarged(images, square, most=4)                # 0, 13, 26, 39
    assert "2 of 3 images" in capsys.readouterr().out
    buckets.sort(images, settings(buckets=1, image_size=16), 8)
    buckets.sort(data.open_dataset("procedural", 64), square, 8)
    assert capsys.readouterr().out == ""


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SIZES = [(40, 70)] * 9 + [(64, 64)] * 3 + [(90, 60)] * 5 + [(30, 120), (50, 47)]       # height, width


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nineteen captioned images of SIZES."""
    path = tmp_path_factory.mktemp("photos")
    for i, size in enumerate(SIZES):
        picture(*size, i).save(path / f"{i:02d}.png")
        (path / f"{i:02d}.txt").write_text(f"picture {i % 3}")
    return str(path)


@pytest.fixture
def shaped(folder):
    return buckets.sort(data.open_dataset(folder, 64), settings(), 8)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("side, multiple, most", [(1024, 32, 2), (512, 16, 3), (192, 32, 2), (64, 8, 16)])
def test_shapes_have_about_the_squares_area_and_come_in_both_orientations(side, multiple, most):
    shapes = buckets.shapes_of(side, multiple, most)
    assert (side, side) in shapes and len(shapes) > 2
    assert {(w, h) for h, w in shapes} == set(shapes)
    for h, w in shapes:
        assert h % multiple == 0 and w % multiple == 0
        assert abs(h * w / side**2 - 1) <= multiple / side / 2
        assert max(h, w) <= most * min(h, w)
    assert len({buckets.ratio(shape) for shape in shapes}) == len(shapes)


def test_every_image_goes_to_the_bucket_of_the_nearest_ratio():
    shapes = buckets.shapes_of(512, 16, 2)
    sizes = np.random.default_rng(0).integers(100, 2000, (500, 2))
    for (h, w), found in zip(sizes, buckets.nearest(shapes, sizes)):
        off = [abs(math.log(w / h) - math.log(W / H)) for H, W in shapes]
        assert off[found] == min(off)
    assert buckets.nearest(shapes, np.array([[0, 0], [10, 9000]])).tolist() == [-1, len(shapes) - 1]


def test_an_image_covers_its_shape_and_the_excess_is_cropped_on_both_sides():
    image = Image.new("RGB", (120, 40), "black")
    image.paste("white", (20, 0, 100, 40))                         # 80x40 are white: exactly 2:1
    assert np.asarray(data.center_crop(image, 32, 64))[:, 1:-1].min() > 200
    assert np.asarray(data.center_crop(image, 20, 60)).min() == 0  # 3:1: nothing is cropped
    lost = buckets.cropped_away(np.array([[40, 120], [40, 80], [80, 40]]), np.array([[32, 64]]))
    assert lost == pytest.approx([1 / 3, 0, 3 / 4])


def test_a_square_bucket_has_the_same_pixels_as_without_buckets(folder, shaped):
    without = data.open_dataset(folder, 64)
    for i in (9, 10, 11):
        assert np.array_equal(shaped.image(i)[0], without.image(i)[0])
    assert shaped.image(0)[0].shape == (48, 88, 3) and without.image(0)[0].shape == (64, 64, 3)


def test_every_image_in_every_bucket_keeps_its_own_label(folder):
    images = data.open_dataset(folder, 64)
    images.labels = np.arange(len(SIZES))                          # captions are looked up by label
    shaped = buckets.sort(images, settings(), 8)
    for i in range(len(SIZES)):
        pixels, label = shaped.image(i)
        shape = shaped.parts[shaped.bucket[i]].shape
        assert label == i and np.array_equal(pixels, np.asarray(data.center_crop(images.load(i), *shape)))


def test_the_fingerprint_covers_the_images_and_their_shapes(folder, tmp_path):
    def fingerprint(**changes):
        return buckets.sort(data.open_dataset(tmp_path, 64), settings(**changes), 8).fingerprint

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = fingerprint()
    assert fingerprint() == before != fingerprint(buckets=1.5)
    picture(*SIZES[3], seed=99).save(tmp_path / "03.png")
    assert fingerprint() != before


def test_the_table_lists_each_buckets_images_and_cropped_share(folder, capsys):
    buckets.sort(data.open_dataset(folder, 64), settings(batch_size=16), 8)
    lines = capsys.readouterr().out.splitlines()
    rows = {words[0]: words[1:] for words in map(str.split, lines)}
    assert "64x64 pixels, multiples of 8, sides up to 2:1" in lines[0]
    assert rows["64x64"][0] == "4" and "88x48" not in rows         # no image has that shape
    assert rows["48x88"] == ["10", "9.5%"]         # nine of 70:40 lose 1 - 1.75 / 1.833, the one of 4:1 54 %
    assert rows["cut"][-1] == "33.3%"              # overall, with squares
    assert "fewer than a batch of 16" in lines[-1] and "72x56, 64x64, 48x88" in lines[-1]


# ---------------------------------------------------------------- sizes


HOLD_EXIF = ["png", "webp", "tiff", "jpg"] + ["avif"] * features.check("avif")      # that Pillow turns by it


def turned(orientation):
    exif = Image.Exif()
    exif[photos.ORIENTATION] = orientation
    return {"exif": exif}


def test_sizes_are_of_the_upright_image_in_every_format_and_in_shards(tmp_path):
    """Files of 150 KB and more, so that only the headers of most are read."""
    upright = picture(400, 300)
    sideways = upright.rotate(90, expand=True)
    folder, tars = tmp_path / "loose", tmp_path / "shards"
    folder.mkdir()
    tars.mkdir()
    for ending in ("gif", "jp2"):
        upright.save(folder / f"{ending}.{ending}")
    for ending in HOLD_EXIF:
        sideways.save(folder / f"{ending}.{ending}", quality=100, **turned(6))
    with tarfile.open(tars / "0.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            assert path.stat().st_size > 2 * buckets.HEAD
            tar.add(path, path.name)
    for place in (folder, tars):
        images = data.open_dataset(place, 64)
        assert len(images) == 2 + len(HOLD_EXIF)
        assert buckets.read_sizes(images, "photos").tolist() == len(images) * [[400, 300]]
        assert [images.load(i).size for i in range(len(images))] == len(images) * [(300, 400)]


@pytest.mark.parametrize("ending", HOLD_EXIF)
def test_the_header_gives_the_upright_size_for_every_orientation(tmp_path, ending):
    for orientation in range(1, 9):
        picture(20, 30).save(tmp_path / f"{orientation}.{ending}", **turned(orientation))
    images = data.open_dataset(tmp_path, 64)
    sizes = buckets.read_sizes(images, "photos").tolist()
    assert sizes == [[*reversed(images.load(i).size)] for i in range(8)] == 4 * [[20, 30]] + 4 * [[30, 20]]


def test_only_the_headers_of_a_shards_images_are_read(tmp_path, monkeypatch):
    raw = io.BytesIO()
    picture(400, 300).save(raw, "png")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(raw.getvalue())
        tar.addfile(member, io.BytesIO(raw.getvalue()))
    images = data.open_dataset(tmp_path, 64)
    lengths = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            found = super().read(size)
            lengths.append(len(found))
            return found

    monkeypatch.setattr(shards, "open", lambda path, *_, **__: Counting(path), raising=False)
    monkeypatch.setattr(images, "load", lambda i: pytest.fail("the image was decoded"))
    assert buckets.size_of(images, 0) == (400, 300)
    assert lengths == [buckets.HEAD] and buckets.HEAD < member.size / 2
    assert images.index.read(0) == raw.getvalue()


def test_sizes_are_read_once_and_again_when_the_images_or_the_kept_sizes_have_changed(
        folder, work, tmp_path, monkeypatch):
    def sort():
        read.clear()
        return buckets.sort(data.open_dataset(tmp_path, 64), settings(), 8), sorted(read)

    read, size_of = [], buckets.size_of
    monkeypatch.setattr(buckets, "size_of", lambda images, i: read.append(i) or size_of(images, i))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "03.png").write_bytes(b"")
    everything = list(range(len(SIZES)))
    shaped, numbers = sort()
    assert numbers == everything
    again, numbers = sort()
    assert numbers == [3] and again.bucket.tolist() == shaped.bucket.tolist() and again.bucket[3] == -1

    picture(40, 70).save(tmp_path / "03.png")
    picture(70, 40).save(tmp_path / "04.png")                      # was 40x70
    again, numbers = sort()
    assert numbers == everything and again.bucket[3] >= 0
    height, width = again.shapes[again.bucket[4]]
    assert height > width and sort()[1] == []

    whole = (work / "out/sizes.npz").read_bytes()
    for damaged in (b"", b"no archive", whole[:-50], whole[:90] + whole[130:]):
        (work / "out/sizes.npz").write_bytes(damaged)
        assert sort()[1] == everything


def test_an_unreadable_image_has_no_bucket_and_a_truncated_one_is_replaced_within_its_bucket(
        folder, tmp_path, capsys):
    for path in Path(folder).glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "03.png").write_bytes(b"")
    whole = (tmp_path / "13.png").read_bytes()
    (tmp_path / "13.png").write_bytes(whole[:len(whole) // 2])     # its header is intact
    shaped = buckets.sort(data.open_dataset(tmp_path, 64), settings(), 8)
    assert "1 unreadable images are in none" in capsys.readouterr().out
    assert shaped.bucket[3] == -1 and shaped.bucket[13] >= 0
    for step in range(40):
        assert 3 not in shaped.plan(4, 0, step)[0]
    assert np.array_equal(shaped.image(13)[0], shaped.image(14)[0])
    assert "13.png" in capsys.readouterr().err


def test_a_bucket_whose_only_image_is_damaged_gets_others_in_its_shape(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    picture(70, 40).save(tmp_path / "alone.png")                   # upright: no other image is
    whole = (tmp_path / "alone.png").read_bytes()
    (tmp_path / "alone.png").write_bytes(whole[:len(whole) // 2])  # its header is intact
    images = data.open_dataset(tmp_path, 64)
    images.labels = np.arange(len(images))
    shaped = buckets.sort(images, settings(), 8)
    alone, (height, width) = len(SIZES), shaped.shapes[0]
    assert shaped.parts[0].members.tolist() == [alone] and height > width
    shapes = Counter(x.shape[1:] for x, _ in itertools.islice(data.batches(shaped, 4, 0), 40))
    assert shapes[height, width, 3] == 2                           # 40 batches, 20 images
    pixels, label = shaped.image(alone)                            # after the last image comes the first
    assert label == 0 and np.array_equal(pixels, data.center_crop(images.load(0), height, width))
    assert capsys.readouterr().err.count("alone.png") == 1


class Few(data.Dataset):
    """Two thousand images of which the first `damaged` cannot be read."""

    labels = np.zeros(2000, np.int64)
    paths = [str(i) for i in range(2000)]

    def __init__(self, damaged):
        self.damaged = damaged

    def load(self, i):
        if i < self.damaged:
            raise ValueError(f"cannot read the image {i}: it is empty")
        return picture(16, 16)


def test_damaged_images_are_counted_among_all_images_whatever_their_bucket():
    which = np.arange(2000) // 15 % 2                              # fifteen in turn
    goes_on, stops = [buckets.Buckets(Few(n), [(8, 16), (16, 8)], which, "photos") for n in (19, 20)]
    assert goes_on.image(0)[0].shape == (8, 16, 3) and goes_on.image(15)[0].shape == (16, 8, 3)
    assert len(goes_on.images.bad) == 19
    with pytest.raises(ValueError, match="20 of 2000 images in photos are unreadable.*the first: cannot"):
        [stops.image(i) for i in (0, 15)]


@pytest.mark.parametrize("unreadable, of, refused", [
    (9, 20, False), (10, 20, True), (4, 5, False), (5, 5, True), (19, 2000, False), (20, 2000, True)])
def test_ten_unreadable_images_that_are_one_in_a_hundred_or_all_there_are_refused(
        unreadable, of, refused, monkeypatch):
    monkeypatch.setattr(buckets, "size_of", lambda images, i: (0, 0) if i < unreadable else (30, 40))
    with pytest.raises(ValueError, match=f"{unreadable} of {of}") if refused else nullcontext():
        assert (buckets.read_sizes([None] * of, "photos")[:, 0] == 0).sum() == unreadable


def test_a_set_with_too_many_unreadable_images_is_refused(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="20 of 20 images in photos are unreadable"):
        buckets.sort(data.open_dataset(tmp_path, 64), settings(), 8)


# ---------------------------------------------------------------- the order


def read_in(counts, batch_size, seed, steps):
    """[(bucket, batch)] of the first steps."""
    return [buckets.batch_at(counts, batch_size, seed, step) for step in range(steps)]


@pytest.mark.parametrize("counts", [(9, 4, 5, 1), (40,), (3, 2), (1000, 7, 130)])
def test_each_buckets_epochs_come_in_order_and_hold_every_full_batch(counts):
    batch_size = 8
    steps = read_in(counts, batch_size, 0, 400)
    for bucket, count in enumerate(counts):
        numbers = [number for b, number in steps if b == bucket]
        assert len(set(numbers)) == len(numbers)
        for epoch in range(30):                                    # whole epochs of the bucket, each shuffled
            first, last = epoch * count // batch_size, (epoch + 1) * count // batch_size
            if last <= len(numbers):
                assert sorted(numbers[first:last]) == list(range(first, last))
    shares = Counter(bucket for bucket, _ in steps)
    for bucket, count in enumerate(counts):
        even = 400 * count / sum(counts)
        most = count / batch_size + 2 + len(counts)                # the steps may end inside an epoch
        assert abs(shares[bucket] - even) <= most


def test_an_epoch_has_every_image_once_but_for_less_than_a_batch(shaped):
    counts = [len(part) for part in shaped.parts]
    seen = Counter()
    for epoch in range(1, 40):
        start, end = (buckets.start_of(counts, 4, e) for e in (epoch - 1, epoch))
        for step in range(start, end):
            seen.update(shaped.plan(4, 0, step)[0].tolist())
        for part, count in zip(shaped.parts, counts):
            times = [seen[i] for i in part.members.tolist()]
            rest = epoch * count - sum(times)
            assert 0 <= rest < 4                                   # left for the next epoch
            assert max(times) - min(times) <= 1                    # none comes more often
    assert set(seen) == set(range(len(SIZES)))


def test_every_batch_is_from_one_bucket_and_epochs_and_seeds_differ(shaped):
    batches = [shaped.plan(4, 0, step)[0] for step in range(60)]
    for indices in batches:
        assert len(set(shaped.bucket[indices].tolist())) == 1
    counts = [len(part) for part in shaped.parts]
    mixed = 0
    for epoch in range(10):
        steps = range(buckets.start_of(counts, 4, epoch), buckets.start_of(counts, 4, epoch + 1))
        order = [shaped.bucket[batches[step][0]] for step in steps]
        mixed += order != sorted(order)
    assert mixed > 5                                               # not one bucket after another
    other = [shaped.plan(4, 1, step)[0].tolist() for step in range(60)]
    assert other != [indices.tolist() for indices in batches]


def test_buckets_come_in_a_different_order_in_each_epoch_and_with_each_seed():
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        orders.add(tuple(bucket for bucket, _ in buckets.mixed((80, 80), 4, seed, epoch)))
    assert len(orders) == 3


def test_ranks_share_one_bucket_and_together_read_what_one_process_reads(shaped):
    for step in range(30):
        indices, flips = shaped.plan(4, 0, step, flip=True)
        parts = [shaped.plan(4, 0, step, rank, 2, flip=True) for rank in (0, 1)]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), indices)
        assert np.array_equal(np.concatenate([part[1] for part in parts]), flips)
    with pytest.raises(ValueError, match="batch_size 4 does not split over 3 ranks"):
        shaped.plan(4, 0, 0, 0, 3)


def test_batches_resumed_at_any_step_equal_uninterrupted_ones(shaped):
    straight = data.batches(shaped, 4, 3, flip=True)
    images = [next(straight) for _ in range(12)]
    for start in (1, 5, 11):
        x, y = next(data.batches(shaped, 4, 3, start=start, flip=True))
        assert torch.equal(x, images[start][0]) and torch.equal(y, images[start][1])
    assert len({x.shape for x, _ in images}) > 2


def test_without_the_flag_the_data_set_and_its_order_are_unchanged(folder):
    images = data.open_dataset(folder, 64)
    assert buckets.sort(images, settings(buckets=1.0), 8) is images
    assert train_vae.Config().buckets == finetune.Config().buckets == 1.0
    for step in (0, 7):
        assert np.array_equal(images.plan(4, 0, step)[0], data.batch_plan(len(SIZES), 4, 0, step)[0])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("change, said", [
    (dict(buckets=1.1), "--buckets=1.1: in multiples of 8, the square is the only shape"),
    (dict(compile=True), "--compile=True compiles for one shape"),
    (dict(data_dir="procedural"), "the images of --data_dir=procedural have one shape; give a folder"),
])
def test_impossible_buckets_get_one_sentence(change, said, folder):
    cfg = settings(**change)
    images = data.open_dataset("procedural" if "data_dir" in change else folder, 64, 8)
    with pytest.raises(SystemExit, match=said):
        buckets.sort(images, cfg, 8)


def test_a_class_conditional_model_refuses_buckets(finetune_config, folder, tmp_path):
    cfg = finetune_config(tmp_path / "run", data_dir=folder, buckets=2.0)
    with pytest.raises(SystemExit, match="--buckets=2: a class-conditional model.* leave it out"):
        finetune.main(cfg)


def test_crops_larger_than_the_shortest_side_are_refused(make_davae):
    cfg = train_vae.Config(D=12, image_size=64, crop=(48,), buckets=2.0, perceptual="none", gan=0.0)
    checks.check_sizes(cfg, make_davae())
    with pytest.raises(SystemExit, match="--crop=64 is larger than the shortest side of a bucket, 48"):
        checks.check_sizes(replace(cfg, crop=(64,)), make_davae())
    checks.check_sizes(replace(cfg, crop=(64,), buckets=1.0), make_davae())


# ---------------------------------------------------------------- stage 1


def recorded(monkeypatch, script, name, place):
    """A list of the height and width of argument `place` in each call of script.<name>."""
    shapes = []
    original = getattr(script, name)

    def record(*args):
        shapes.append(tuple(args[place].shape[2:]))
        return original(*args)

    monkeypatch.setattr(script, name, record)
    return shapes


def killed(cfg, out):
    """The Config of a copy of a finished run, put back to its previous save."""
    shutil.copytree(cfg.out, out)
    shutil.rmtree(out / f"step_{cfg.steps:06d}")
    (out / "summary.json").unlink()
    return replace(cfg, out=str(out))


def test_stage_1_trains_on_buckets_and_resumes_bit_for_bit(
        davae_config, folder, same_weights, tmp_path, monkeypatch):
    shapes = recorded(monkeypatch, train_vae, "training_batch", 0)
    cfg = davae_config(
        tmp_path / "run", data_dir=folder, buckets=2.0, image_size=32, gan=0.0, steps=4, save_every=2)
    train_vae.main(cfg)
    resumed = killed(cfg, tmp_path / "resumed")
    train_vae.main(resumed)
    assert same_weights(cfg, resumed)
    assert len(set(shapes)) > 1 and shapes[2:4] == shapes[4:]
    assert set(shapes) <= set(buckets.shapes_of(32, 4, 2))


def test_crops_of_a_bucket_are_squares_that_fit_its_shorter_side():
    cfg = train_vae.Config(D=12, crop=(16,), halvings=2)
    x = torch.arange(48 * 96).view(1, 1, 48, 96).expand(2, 3, 48, 96).float()
    torch.manual_seed(0)
    for step in range(30):                                         # 96 / 4 would hold one, 48 / 4 does not
        assert train_vae.training_batch(x, step, cfg).shape == (2, 3, 16, 16)
        assert train_vae.training_batch(x.transpose(2, 3), step, cfg).shape == (2, 3, 16, 16)


# ---------------------------------------------------------------- stage 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Random embeddings of the captions."""
    path = tmp_path_factory.mktemp("text")
    prompts = ["", *(f"picture {i}" for i in range(3))]
    torch.manual_seed(0)
    tensors = {"context": torch.randn(4, 5, 12), "pooled": torch.randn(4, 6)}
    save_file(tensors, path / "text_00000.safetensors",
              {"encoders": "random", "t5_tokens": "5", "prompts": json.dumps(prompts)})
    return str(path)


@pytest.fixture(scope="module")
def text_base(tmp_path_factory, randomise):
    """The folder of a small random MMDiT with C = 4."""
    path = tmp_path_factory.mktemp("base") / "mmdit"
    sizes = MMDiTConfig(C=4, p=2, E=24, depth=2, A=2, dual=1, context=12, pooled=6, pos_size=24)
    weights = randomise(MMDiT(sizes)).state_dict()
    about = {"script": "finetune.py", "model": {"kind": "MMDiT"} | dataclasses.asdict(sizes)}
    runs.save_folder(path, {"model": weights, "ema": weights}, about)
    return str(path)


@pytest.fixture
def text_config(finetune_config, folder, texts, text_base):
    """text_config(out, **changes) -> finetune's Config that widens `text_base` on images in buckets."""
    def make(out, **changes):
        values = dict(data_dir=folder, text=texts, t5_tokens=5, base=text_base, buckets=2.0, batch_size=4,
                      micro_batch=2, p=2, steps=4, save_every=2)
        return finetune_config(out, **values | changes)
    return make


def test_a_text_model_trains_on_buckets_and_resumes_bit_for_bit(
        text_config, same_weights, tmp_path, monkeypatch, capsys):
    shapes = recorded(monkeypatch, finetune, "flow_loss", 1)
    monkeypatch.setattr(finetune, "draw_samples", lambda *args: None)      # would take the longest
    cfg = text_config(tmp_path / "run")
    assert finetune.main(cfg)["warm_start"] == 0.0
    assert "buckets of about 64x64 pixels, multiples of 16" in capsys.readouterr().out
    resumed = killed(cfg, tmp_path / "resumed")
    finetune.main(resumed)
    assert same_weights(cfg, resumed, ("model", "ema"))
    assert len(set(shapes)) > 1 and shapes[4:8] == shapes[8:]      # two micro-batches a step
    with pytest.raises(SystemExit, match="was started with buckets=2.0, now buckets=3.0"):
        finetune.main(replace(resumed, buckets=3.0, steps=5))


def test_bucketed_latents_are_cached_with_their_shapes_and_match_those_encoded_on_the_fly(
        text_config, tiny_vae, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 4)
    vae = load_davae(tiny_vae)
    cfg = text_config(tmp_path / "run", flip=True, vae="")
    (tmp_path / "run").mkdir()
    images = latents.open_training_set(cfg, vae)
    shaped = buckets.sort(images, cfg, 8)
    cached = latents.latent_source(vae, shaped, cfg, CPU, 0, 1)(5)
    live = latents.latent_source(vae, shaped, replace(cfg, cache=False), CPU, 0, 1)(5)
    shapes = set()
    for _ in range(8):
        (z, y), (z2, y2) = next(cached), next(live)
        assert torch.equal(y, y2) and (z - z2).abs().max() < 2e-3 * z2.abs().max()
        assert {shaped.bucket[i] for i in y.tolist()} == {shaped.bucket[y[0]]}
        shapes.add(z.shape[2:])
    assert len(shapes) > 2

    folders = [path for path in (tmp_path / "run").glob("latents-*/*") if path.is_dir()]
    assert {path.name for path in folders} == {part.name for part in shaped.parts}
    again = latents.write_cache(vae, shaped, cfg, CPU, 0, 1)
    assert again == folders[0].parent
    other = replace(cfg, buckets=1.5)
    assert latents.write_cache(vae, buckets.sort(images, other, 8), other, CPU, 0, 1) != again


@pytest.mark.slow
def test_two_processes_train_on_buckets_like_one(text_config, launch, read_log, tmp_path):
    one = text_config(tmp_path / "one", flip=True)                 # no other test has written this cache
    two = replace(one, out=str(tmp_path / "two"))
    process = launch(finetune.main, two, ranks=2)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert out.count("buckets of about 64x64") == 1                # rank 0 prints
    finetune.main(one)
    for a, b in zip(read_log(one.out), read_log(two.out), strict=True):
        for name in ("loss", "base", "detail", "gnorm"):
            assert math.isclose(a[name], b[name], rel_tol=1e-4), (name, a, b)
