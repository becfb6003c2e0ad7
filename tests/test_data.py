"""data.py: folders, custom data sets, batches that resume, pixels to tensors and back."""
import io
import itertools
import json
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image, features
from support import data


RED = (200, 30, 40)


def save(path, colour=RED, size=(12, 10), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def take(generator, n):
    return list(itertools.islice(generator, n))


# ---- one image ----

def test_center_crop_halves_by_box_means_then_scales_bicubic():
    image = noise(101, 163)
    halved = image.resize((81, 50), Image.BOX)          # floors of the halves; 50 < 2 * 32 ends it
    scaled = halved.resize((round(81 * 32 / 50), 32), Image.BICUBIC)
    expected = np.asarray(scaled)[:, (52 - 32) // 2:(52 - 32) // 2 + 32]
    assert np.array_equal(np.asarray(data.center_crop(image, 32)), expected)


@pytest.mark.parametrize("width, height", [(64, 64), (64, 90), (45, 32), (100, 61), (61, 100), (31, 47)])
def test_center_crop_equals_adms_at_exactly_twice_the_side_and_with_rounded_halves(width, height):
    image = ours = noise(height, width)
    while min(image.size) >= 2 * 32:                    # guided_diffusion/image_datasets.py:center_crop_arr
        image = image.resize(tuple(x // 2 for x in image.size), Image.BOX)
    scale = 32 / min(image.size)
    array = np.array(image.resize(tuple(round(x * scale) for x in image.size), Image.BICUBIC))
    top, left = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    assert np.array_equal(np.asarray(data.center_crop(ours, 32)), array[top:top + 32, left:left + 32])


def test_center_crop_of_an_exact_size_changes_nothing():
    image = noise(32, 32)
    assert np.array_equal(np.asarray(data.center_crop(image, 32)), np.asarray(image))


def test_center_crop_keeps_the_middle_of_tall_and_wide_images():
    strip = np.zeros((20, 60, 3), np.uint8)
    strip[:, 20:40] = 255
    for array in (strip, strip.transpose(1, 0, 2)):
        assert np.asarray(data.center_crop(Image.fromarray(array), 20)).min() == 255


def test_center_crop_refuses_an_image_too_thin_to_enlarge():
    with pytest.raises(ValueError, match="1x9000 pixels are too thin"):
        data.center_crop(Image.new("RGB", (1, 9000)), 256)


# ---- folders ----

def test_sub_folders_are_classes_in_sorted_order(tmp_path):
    for name in ("n02/b.png", "n02/a.jpg", "n10/x/deep.png", "n1/c.JPEG", "B/d.PNG", "a/e.webp"):
        save(tmp_path / name)
    dataset = data.ImageFolder(tmp_path, 8)
    assert dataset.classes == ["B", "a", "n02", "n1", "n10"]        # capitals first, n1 before n10
    names = [os.path.relpath(path, tmp_path) for path in dataset.paths]
    assert names == ["B/d.PNG", "a/e.webp", "n02/a.jpg", "n02/b.png", "n1/c.JPEG", "n10/x/deep.png"]
    assert dataset.labels.tolist() == [0, 1, 2, 2, 3, 4] and dataset.labels.dtype == np.int64
    assert dataset.captions is None
    assert dataset.summary() == "6 images in 5 classes (B 1, a 1, n02 2, n1 1, n10 1)"
    image, label = dataset.image(4)
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and label == 3
    assert np.abs(image.astype(int) - RED).max() < 6


def test_a_flat_folder_has_no_classes(tmp_path):
    for name in ("b.png", "a.gif", "c.TIFF", "notes.md", "model.bin"):
        save(tmp_path / name, format="PNG")
    dataset = data.ImageFolder(str(tmp_path), 8)
    assert dataset.classes == [] and dataset.labels.tolist() == [0, 0, 0]
    assert dataset.summary() == "3 images without classes; left out: 1 .bin, 1 .md"
    assert dataset.image(1)[1] == 0


def test_hidden_files_and_folders_are_ignored(tmp_path):
    for name in ("cat/a.png", "cat/._a.png", "cat/.ipynb_checkpoints/a.png", ".git/b.png", "__MACOSX/c.png",
                 ".ipynb_checkpoints/d.png", "cat/__MACOSX/e.png"):
        save(tmp_path / name)
    dataset = data.ImageFolder(tmp_path, 8)
    assert dataset.classes == ["cat"] and dataset.paths == [str(tmp_path / "cat" / "a.png")]


def test_links_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "elsewhere" / "far.png")
    save(tmp_path / "root" / "cat" / "a.png")
    save(tmp_path / "root" / "dog" / "b.png")
    (tmp_path / "root" / "cat" / "self").symlink_to(tmp_path / "root" / "cat")
    (tmp_path / "root" / "cat" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "fox").symlink_to(tmp_path / "elsewhere")
    dataset = data.ImageFolder(tmp_path / "root", 8)
    assert dataset.classes == ["cat", "dog", "fox"] and len(dataset) == 3


def test_names_with_spaces_and_letters_of_any_language_are_read(tmp_path):
    save(tmp_path / "Füchse & Hunde" / "日本 写真 1.png")
    (tmp_path / "Füchse & Hunde" / "日本 写真 1.txt").write_text("ein Fuchs 🦊\n", "utf-8")
    dataset = data.ImageFolder(tmp_path, 8)
    assert dataset.classes == ["Füchse & Hunde"] and dataset.captions == ["ein Fuchs 🦊"]
    assert dataset.image(0)[0][0, 0].tolist() == list(RED)


def test_an_empty_class_an_empty_folder_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder; give a folder"):
        data.ImageFolder(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match="no images .*add some"):
        data.ImageFolder(tmp_path, 8)
    save(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="no images .*'dog'"):
        data.ImageFolder(tmp_path, 8)


def test_images_next_to_class_folders_are_left_out_with_a_warning(tmp_path, capsys):
    save(tmp_path / "preview.png"), save(tmp_path / "cat" / "a.png")
    assert len(data.ImageFolder(tmp_path, 8)) == 1
    assert "1 images next to its class folders are left out" in capsys.readouterr().err


def test_captions_come_from_text_files(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.one.jpg"), save(tmp_path / "c.png")
    (tmp_path / "a.txt").write_text("a red page\n")
    (tmp_path / "b.one.txt").write_text("another")
    dataset = data.ImageFolder(tmp_path, 8)
    assert dataset.captions == ["a red page", "another", ""]
    assert dataset.summary() == "3 images without classes, 2 captions"


def test_captions_come_from_metadata_jsonl(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        save(tmp_path / name)
    rows = [{"file_name": "dog/c.png", "caption": "a dog"},
            {"file_name": "./cat/a.png", "text": "one\u2028line"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "metadata.jsonl").write_text(lines + "\n", "utf-8")
    assert data.ImageFolder(f"{tmp_path}/", 8).captions == ["one\u2028line", "", "a dog"]


def test_an_images_text_file_overrides_metadata(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    lines = [json.dumps({"file_name": f"{name}.png", "text": "of the list"}) for name in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("its own")
    assert data.ImageFolder(tmp_path, 8).captions == ["of the list", "its own"]


@pytest.mark.parametrize("line", [
    '{"file_name": "a.png"', '{"text": "nameless"}', '["a.png"]', '{"file_name": "a.png"}',
])
def test_broken_metadata_is_named(tmp_path, line):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match="metadata.jsonl: .*wanted text, or lines of {file_name, text}"):
        data.ImageFolder(tmp_path, 8)


def test_an_unreadable_file_is_named_once_and_the_next_takes_its_place(tmp_path, capsys):
    for k in range(4):
        save(tmp_path / f"class{k}" / "a.png", (60 * k, 0, 0))
    for k in (1, 2):
        (tmp_path / f"class{k}" / "a.png").write_text("gone")
    dataset = data.ImageFolder(tmp_path, 8)
    for _ in range(2):
        image, label = dataset.image(1)
        assert label == 3 and image[0, 0].tolist() == [180, 0, 0]   # both of the next readable file
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "class1" in warnings[0] and "not an image" in warnings[0]
    assert list(dataset.bad) == [str(tmp_path / f"class{k}" / "a.png") for k in (1, 2)]
    assert dataset.summary().endswith(", 2 unreadable")


def damaged(ending):
    """A file of which a few bytes have changed, so that its decoder raises another error than most do."""
    file = io.BytesIO()
    if ending == "avif":                                            # a RuntimeError
        Image.new("RGB", (12, 10)).save(file, "AVIF")
        return file.getvalue().replace(b"pitm", b"pitx", 1)
    Image.new("RGB", (12, 10)).save(file, "TIFF", big_tiff=True)    # an OverflowError
    raw = file.getvalue()
    place = raw.index(struct.pack("<HH", 273, 4))                   # the offset of its pixels, in 4 bytes
    return raw[:place] + struct.pack("<HHQq", 273, 16, 1, -1) + raw[place + 20:]


@pytest.mark.parametrize("ending", [
    "tif",
    pytest.param("avif", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")),
])
def test_a_damaged_avif_or_tiff_is_named_and_replaced_like_any_other_file(tmp_path, ending):
    (tmp_path / f"a.{ending}").write_bytes(damaged(ending))
    save(tmp_path / "b.png")
    dataset = data.ImageFolder(tmp_path, 8)
    assert dataset.image(0)[0][0, 0].tolist() == list(RED)
    assert list(dataset.bad) == [str(tmp_path / f"a.{ending}")]


def test_an_image_too_thin_to_crop_is_named_and_replaced_too(tmp_path, capsys):
    save(tmp_path / "a.png", size=(1, 9000))
    save(tmp_path / "b.png")
    dataset = data.ImageFolder(tmp_path, 256)
    assert dataset.image(0)[0][0, 0].tolist() == list(RED)
    assert "a.png" in dataset.bad[str(tmp_path / "a.png")]
    assert "a.png: 1x9000 pixels are too thin" in capsys.readouterr().err


def test_the_last_file_is_replaced_by_the_first(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    assert data.ImageFolder(tmp_path, 8).image(1)[0][0, 0].tolist() == list(RED)


def test_ten_unreadable_files_stop_a_small_set_and_one_percent_a_large_one(tmp_path):
    save(tmp_path / "z.png")
    for k in range(10):
        (tmp_path / f"bad{k}.png").write_bytes(b"")
    dataset = data.ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match=r"10 of 11 images in .* are unreadable.*bad0.png.*bad1.png"):
        dataset.image(0)
    dataset = data.ImageFolder(tmp_path, 8)
    dataset.paths = dataset.paths * 200                             # 10 of 2200 are below 1 %
    dataset.labels = np.tile(dataset.labels, 200)
    assert dataset.image(0)[0][0, 0].tolist() == list(RED) and len(dataset.bad) == 10
    dataset.bad |= {f"more{k}": "truncated" for k in range(11)}     # 21
    assert dataset.image(0)[0][0, 0].tolist() == list(RED)
    dataset.bad["one more"] = "truncated"                           # 22 are 1 %
    with pytest.raises(ValueError, match="22 of 2200 images"):
        dataset.image(0)


def test_a_set_with_nothing_readable_stops_at_once(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 3 images in .* are unreadable"):
        data.ImageFolder(tmp_path, 8).image(0)


def test_a_one_pixel_image_is_enlarged(tmp_path):
    save(tmp_path / "a.png", size=(1, 1))
    image = data.ImageFolder(tmp_path, 16).image(0)[0]
    assert image.shape == (16, 16, 3) and (image == RED).all()


FORMATS = {"jpe": "JPEG", "JFIF": "JPEG", "pjpeg": "JPEG", "mpo": "JPEG", "AVIF": "AVIF", "apng": "PNG",
           "jp2": "JPEG2000", "tga": "TGA", "ppm": "PPM", "pgm": "PPM", "qoi": "QOI", "Tif": "TIFF"}


def test_every_photo_extension_pillow_reads_is_an_image_in_any_case(tmp_path):
    for ending, kind in FORMATS.items():
        save(tmp_path / f"a.{ending}", format=kind, mode="L" if ending == "pgm" else "RGB")
    dataset = data.ImageFolder(tmp_path, 8)
    found = [dataset.exact(i) for i in range(len(dataset))]
    assert len(found) == len(FORMATS) and dataset.bad == dataset.left_out == {}
    for path, (image, _) in zip(dataset.paths, found, strict=True):
        wanted = RED if not path.endswith("pgm") else (82, 82, 82)      # its luma
        assert np.abs(image.astype(int) - wanted).max() <= 6


def test_files_without_an_image_extension_are_counted_in_the_summary(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "deep" / "b.HEIC", format="PNG")
    for k in range(20):
        (tmp_path / f"{k}.heic").write_bytes(b"")
    for name in ("lora.safetensors", "photo.img", "scan", "deep/other"):
        save(tmp_path / name, format="PNG")                             # images with a wrong ending, or none
    summary = data.ImageFolder(tmp_path, 8).summary()
    assert summary.startswith("1 images without classes; left out: 21 .heic (convert to .jpg), 2 without an ")
    assert "1 .safetensors" in summary and "1 .img" in summary


def test_system_files_and_folders_are_neither_classes_nor_counted(tmp_path):
    for name in ("cat/a.png", "cat/Thumbs.db", "cat/.DS_Store", "cat/desktop.ini", "@eaDir/a.png/thumb.jpg",
                 "lost+found/x.png", "cat/@eaDir/b.png"):
        save(tmp_path / name, format="PNG")
    dataset = data.ImageFolder(tmp_path, 8)
    assert dataset.classes == ["cat"] and len(dataset) == 1 and dataset.left_out == {}


def test_a_class_without_images_is_named_with_its_contents(tmp_path):
    save(tmp_path / "cat" / "a.png")
    for k in range(3):
        save(tmp_path / "dog" / f"{k}.HEIC", format="PNG")
    save(tmp_path / "dog" / "deep" / "raw", format="PNG")
    with pytest.raises(ValueError, match=r"in 'dog' \(3 .heic \(conv.*, 1 without an ending\); add some"):
        data.ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match=r"in '.*dog' \(3 .heic .*, 1 without an ending\); add some"):
        data.ImageFolder(tmp_path / "dog", 8)


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar.gz", "photo.png", "list.txt"])
def test_a_file_given_as_a_folder_is_refused_with_advice_to_unpack_archives(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"{name} is a file, not a folder; .*unpack an archive"):
        data.open_dataset(str(tmp_path / name), 8)


def test_classes_that_hold_only_folders_get_a_hint_about_the_folders_below(tmp_path, capsys):
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png"):
        save(tmp_path / name)
    assert data.ImageFolder(tmp_path, 8).classes == ["train", "val"]
    assert f"if those are the classes, give {tmp_path}/train" in capsys.readouterr().err
    save(tmp_path / "val" / "d.png")
    data.ImageFolder(f"{tmp_path}/", 8)
    assert not capsys.readouterr().err


def test_names_with_newlines_or_invalid_bytes_are_printed_on_one_line(tmp_path, capsys):
    names = [b"new\nline.png", b"\xff.png", b"a.\xfe"]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"no image")
    save(tmp_path / "z.png")
    dataset = data.ImageFolder(tmp_path, 8)
    assert all(dataset.image(i)[0][0, 0].tolist() == list(RED) for i in range(3))
    print(dataset.summary())
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 2 and r"\n" in said.err and r"\udcff" in said.err
    assert said.out == "3 images without classes, 2 unreadable; left out: 1 '.\\udcfe'\n"


def test_a_folder_without_read_permission_is_named(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=f"cannot read the folder {tmp_path}: Permission denied"):
        data.ImageFolder(tmp_path, 8)


# ---- custom data sets, and which one is meant ----

class Greys(data.Dataset):
    """A minimal data set: image i has grey value i."""

    def __init__(self, length):
        self.labels = np.zeros(length, np.int64)

    def image(self, i):
        return np.full((4, 4, 3), i, np.uint8), int(self.labels[i])


def test_a_custom_data_set_needs_only_labels_and_images():
    dataset = Greys(30)
    assert len(dataset) == 30 and dataset.summary() == "30 images without classes"
    assert (dataset.classes, dataset.captions, dataset.bad) == ([], None, {})
    x, y = take(data.batches(dataset, 6, seed=0), 1)[0]
    assert x[:, 0, 0, 0].tolist() == data.batch_plan(30, 6, 0, 0)[0].tolist() and y.tolist() == [0] * 6
    read = torch.cat([x for x, _, _ in data.read(dataset, range(30))])
    assert np.array_equal(data.to_uint8(read)[:, 0, 0, 0], np.arange(30))
    with pytest.raises(ValueError, match="read from files, but Greys has none"):
        next(data.read(dataset, [0], whole=8))


def test_a_custom_data_sets_fingerprint_covers_its_labels_and_images_from_first_to_last():
    class Changed(Greys):
        other = -1

        def image(self, i):
            pixels, label = super().image(i)
            return pixels + (i == self.other), label

    prints = {Changed(16).fingerprint}
    for other in range(16):
        dataset = Changed(16)
        dataset.other = other
        prints.add(dataset.fingerprint)
    relabelled = Changed(16)
    relabelled.labels[5] = 1
    assert len(prints | {relabelled.fingerprint}) == 18


def test_custom_classes_and_captions_are_in_the_summary():
    dataset = Greys(3)
    dataset.classes, dataset.captions, dataset.labels = ["a", "b", "c"], ["", "x", "y"], np.array([2, 0, 2])
    assert dataset.summary() == "3 images in 3 classes (a 1, b 0, c 2), 2 captions"


def test_a_data_set_without_image_says_so():
    with pytest.raises(NotImplementedError, match=r"Dataset has no image\(i\)"):
        data.Dataset().image(0)


def test_open_dataset_knows_the_built_in_set_and_folders(tmp_path):
    save(tmp_path / "a.png")
    for name in ("", "procedural"):
        dataset = data.open_dataset(name, 32, 7, 5)
        assert len(dataset) == 7
        assert np.array_equal(dataset.image(3)[0], data.Procedural(32, 7, 5).image(3)[0])
    assert isinstance(data.open_dataset(str(tmp_path), 8), data.ImageFolder)


# ---- batches ----

def test_stack_reads_images_in_the_order_asked_for():
    dataset = data.Procedural(32, 23)
    x, y = data.stack(dataset, range(23))
    assert x.dtype == torch.uint8 and y.dtype == torch.int64 and y.tolist() == dataset.labels.tolist()
    assert all(np.array_equal(x[i].numpy(), dataset.image(i)[0]) for i in range(23))


def test_an_epoch_holds_every_image_once_and_epochs_differ():
    rows = [i for step in range(6) for i in data.batch_plan(20, 10, 0, step)[0]]
    assert sorted(rows[:20]) == sorted(rows[20:40]) == list(range(20))
    assert rows[:20] != rows[20:40] and rows[:20] != data.batch_plan(20, 20, 1, 0)[0].tolist()


def test_a_set_smaller_than_the_batch_wraps_around():
    rows = [i for step in (0, 1) for i in data.batch_plan(3, 8, 0, step)[0]]
    assert all(sorted(rows[k:k + 3]) == [0, 1, 2] for k in range(0, 15, 3))


def test_batches_resumed_at_a_step_equal_uninterrupted_ones():
    dataset = data.Procedural(32, 20)
    straight = take(data.batches(dataset, 6, seed=1, flip=True), 7)
    resumed = take(data.batches(dataset, 6, seed=1, flip=True, start=4, threads=1), 3)
    for (x, y), (x2, y2) in zip(straight[4:], resumed, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2) and x.dtype == torch.uint8 and y.dtype == torch.int64


def test_two_ranks_together_read_what_one_rank_reads():
    dataset = data.Procedural(32, 20)
    alone = take(data.batches(dataset, 6, seed=1, flip=True), 4)
    ranks = [take(data.batches(dataset, 6, seed=1, flip=True, rank=r, world=2), 4) for r in (0, 1)]
    for step, (x, y) in enumerate(alone):
        for r in (0, 1):
            assert torch.equal(x.chunk(2)[r], ranks[r][step][0])
            assert torch.equal(y.chunk(2)[r], ranks[r][step][1])


def test_a_batch_that_does_not_split_over_the_ranks_is_refused():
    with pytest.raises(ValueError, match="batch_size 6 does not split over 4 ranks"):
        next(data.batches(data.Procedural(32, 20), 6, seed=0, world=4))


def test_flip_mirrors_about_half_of_the_images_and_keeps_the_rest():
    dataset = data.Procedural(32, 200)
    plain, flipped = (next(data.batches(dataset, 200, seed=0, flip=flip))[0] for flip in (False, True))
    mirrored = torch.tensor([torch.equal(a.flip(1), b) for a, b in zip(plain, flipped, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)])
    assert (mirrored ^ same).all() and 70 < mirrored.sum() < 130


def test_each_step_and_seed_mirrors_different_images():
    plans = [data.batch_plan(50, 50, seed, step, flip=True) for seed in (0, 1) for step in (0, 1)]
    assert len({flips.tobytes() for _, flips in plans}) == 4
    once = np.zeros((50, 2), bool)
    for step in range(40):                              # one epoch each: every image comes both ways round
        indices, flipped = data.batch_plan(50, 50, 0, step, flip=True)
        once[indices, flipped.astype(int)] = True
    assert once.all()


def test_batches_raise_what_reading_raises(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 1 images"):
        next(data.batches(data.ImageFolder(tmp_path, 8), 2, seed=0))


def test_whole_images_are_only_cropped_to_a_multiple(tmp_path):
    for name, size in (("a", (21, 17)), ("b", (16, 40))):
        noise(*reversed(size)).save(tmp_path / f"{name}.png")
    (a, y, _), (b, _, _) = data.read(data.ImageFolder(tmp_path, 8), [0, 1], whole=8)
    assert a.shape == (1, 3, 16, 16) and b.shape == (1, 3, 40, 16) and y.tolist() == [0]
    assert torch.equal(a, data.to_tensor(np.array(noise(17, 21))[None, :16, 2:18]))        # 1 and 5 too many
    assert torch.equal(b, data.to_tensor(np.array(noise(40, 16))[None]))


def numbered(folder, count, bad):
    """`count` images, each of a different grey; those in `bad` cannot be decoded."""
    for i in range(count):
        save(folder / f"{i:02d}.png", (i, i, i), (16, 16))
    for i in bad:
        (folder / f"{i:02d}.png").write_bytes(b"gone")


@pytest.mark.parametrize("whole", [0, 8])
@pytest.mark.parametrize("bad", [[0], [4, 5], [13], [*range(10), 13]])
def test_measurements_leave_out_unreadable_images_and_count_none_twice(tmp_path, capsys, bad, whole):
    numbered(tmp_path, 14, bad)
    batches = list(data.read(data.ImageFolder(tmp_path, 16), range(14), whole))
    greys = [grey for x, _, _ in batches for grey in data.to_uint8(x)[:, 0, 0, 0].tolist()]
    numbers = [i for _, _, numbers in batches for i in numbers]
    assert greys == numbers == [i for i in range(14) if i not in bad]
    assert all(len(x) == len(y) == len(numbers) > 0 for x, y, numbers in batches)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"left out of 14 images to look at or measure: {len(bad)}"
    assert sorted(line.split(".png")[0][-2:] for line in lines[:-1]) == [f"{i:02d}" for i in bad]


@pytest.mark.parametrize("size", [(96, 8), (5, 5), (10, 300), (15, 15)])
def test_whole_images_smaller_than_the_multiple_or_ssims_window_are_left_out(tmp_path, capsys, size):
    noise(32, 32).save(tmp_path / "a.png"), noise(*size).save(tmp_path / "b.png")
    noise(40, 16).save(tmp_path / "c.png")
    batches = list(data.read(data.ImageFolder(tmp_path, 8), [0, 1, 2], whole=8))
    assert [numbers for _, _, numbers in batches] == [[0], [2]]
    named, counted = capsys.readouterr().err.splitlines()
    said = f"b.png: {size[1]}x{size[0]} pixels are too small, the smallest image that is measured has 16x16"
    assert said in named and counted == "left out of 3 images to look at or measure: 1"


# ---- pixels ----

def test_to_uint8_inverts_to_tensor_for_every_value():
    u = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = data.to_tensor(u)
    assert x.min() == -1 and x.max() == 1 and x.shape == (1, 3, 16, 16) and x.dtype == torch.float32
    assert np.array_equal(data.to_uint8(x), u)
    assert torch.equal(data.to_tensor(torch.from_numpy(u)), x)


def test_to_uint8_truncates_and_clamps_like_guided_diffusion():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.99, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert data.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 254, 255, 255]  # 127.5 * 0.99 + 128 = 254.2


def test_random_crop_takes_one_window_per_image():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    images = torch.stack([y, x, 0 * x]).expand(16, 3, 20, 30)
    crops = data.random_crop(images, 8, torch.Generator().manual_seed(0))
    assert crops.shape == (16, 3, 8, 8)
    tops, lefts = crops[:, 0, 0, 0], crops[:, 1, 0, 0]
    assert torch.equal(crops[:, :2], images[:, :2, :8, :8] + torch.stack([tops, lefts], 1)[..., None, None])
    assert len(set(tops.tolist())) > 3 and len(set(lefts.tolist())) > 3
    assert torch.equal(crops, data.random_crop(images, 8, torch.Generator().manual_seed(0)))
    torch.manual_seed(0)                                # without a generator: torch's own, reseeded each step
    assert torch.equal(crops, data.random_crop(images, 8))


def test_a_crop_of_the_full_size_is_the_image():
    x = data.to_tensor(data.stack(data.Procedural(64, 4), range(4))[0])
    assert torch.equal(data.random_crop(x, 64, torch.Generator()), x)


def test_the_built_in_images_do_not_depend_on_their_list_of_classes():
    drawn, bare = data.open_dataset("procedural", 16, 12), data.open_dataset("procedural", 16, 12)
    bare.classes = []
    assert all(np.array_equal(drawn.image(i)[0], bare.image(i)[0]) for i in range(12))
    assert not np.array_equal(drawn.image(0)[0], drawn.image(1)[0])


def test_dangling_and_looping_links_are_files_and_links_to_folders_are_followed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "a.png").write_bytes(b"")
    for name, target in (("loop", "loop"), ("gone", "nowhere"), ("back", "."), ("others", "../beside")):
        (tmp_path / "photos" / name).symlink_to(target)
    root = str(tmp_path / "photos")
    assert data.find_files(root) == {
        "": [f"{root}/gone", f"{root}/loop"], "others": [f"{root}/others/a.png"]}
