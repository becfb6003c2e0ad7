"""support/shards.py: webdataset's layout as a data set, like a folder; damage; the index."""
import errno
import io
import json
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from support import data, files, shards

SIZE = 16


def image_bytes(seed, form="PNG", size=(20, 18)):
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


def write_tar(path, members):
    """members: {name: bytes}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i, **files):
    """{name: bytes} of sample i: an image and its other files."""
    beside = {f"{i:04d}.{ending}": content for ending, content in files.items()}
    return {f"{i:04d}.png": image_bytes(i)} | beside


@pytest.fixture
def photos(tmp_path):
    """photos(number, **files of each) -> a folder of three shards of images; {ending: f(i) -> bytes}"""
    def make(number=12, **files):
        for n, part in enumerate(np.array_split(np.arange(number), 3)):
            members = {}
            for i in part.tolist():
                members |= sample(i, **{ending: content(i) for ending, content in files.items()})
            write_tar(tmp_path / "photos" / f"{n:05d}.tar", members)
        return tmp_path / "photos"
    return make


def label(i):
    return b"%d\n" % (i % 3)


def opened(folder):
    return data.open_dataset(str(folder), SIZE)


# ---------------------------------------------------------------- as a folder


@pytest.mark.parametrize("start, rank, world", [(0, 0, 1), (7, 0, 1), (3, 1, 2)])
def test_a_step_gets_the_same_images_from_shards_as_from_a_folder(photos, tmp_path, start, rank, world):
    folder = photos(txt=lambda i: b"number %d" % i)
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "files", filter="data")
    sharded, plain = opened(folder), opened(tmp_path / "files")
    assert sharded.captions == plain.captions == [f"number {i}" for i in range(12)]
    settings = dict(batch_size=4, seed=5, start=start, rank=rank, world=world, flip=True)
    streams = data.batches(sharded, **settings), data.batches(plain, **settings)
    for _, (x, y), (x_files, y_files) in zip(range(5), *streams):
        assert np.array_equal(x, x_files) and np.array_equal(y, y_files)


def test_classes_are_numbers_or_names_and_classes_txt_names_the_numbers(photos):
    folder = photos(cls=label)
    assert opened(folder).labels.tolist() == [0, 1, 2] * 4
    assert opened(folder).classes == ["0", "1", "2"]
    (folder / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    numbered = opened(folder)
    assert numbered.classes == ["ant", "bee", "cat", "dog"] and numbered.labels.tolist() == [0, 1, 2] * 4
    photos(cls=lambda i: ["cat", "ant"][i % 2].encode())
    assert opened(folder).labels.tolist() == [2, 0] * 6            # in the order of classes.txt
    (folder / "classes.txt").unlink()
    assert opened(folder).classes == ["ant", "cat"] and opened(folder).labels.tolist() == [1, 0] * 6


def test_a_json_gives_class_and_caption_unless_separate_files_do(photos):
    def about(i):
        return json.dumps({"cls": i % 2, "caption": f"no. {i}", "url": "http://..."}).encode()
    dataset = opened(photos(json=about))
    assert dataset.labels.tolist() == [0, 1] * 6 and dataset.captions[11] == "no. 11"
    dataset = opened(photos(json=about, txt=lambda i: b"another", cls=lambda i: b"1"))
    assert set(dataset.labels) == {1} and set(dataset.captions) == {"another"}


def test_of_two_json_keys_for_one_thing_the_first_documented_counts(photos):
    both = {"label": 0, "cls": 1, "caption": "the second", "text": "the first"}
    dataset = opened(photos(json=lambda i: json.dumps(both).encode()))
    assert set(dataset.labels) == {1} and set(dataset.captions) == {"the first"}


def test_class_names_may_be_numbers(photos):
    folder = photos(cls=lambda i: [b"2001", b"1999"][i % 2])
    (folder / "classes.txt").write_text("1999\n2000\n2001\n")
    assert opened(folder).classes == ["1999", "2000", "2001"] and opened(folder).labels.tolist() == [2, 0] * 6


def test_without_labels_there_are_no_classes(photos):
    dataset = opened(photos())
    assert dataset.classes == [] and dataset.captions is None and set(dataset.labels) == {0}
    assert dataset.summary() == "12 images without classes; in 3 shards"


def test_files_are_matched_by_name_up_to_the_first_dot_in_any_order(tmp_path):
    members = {"b/1.txt": b"one", "./a.x/2.png": image_bytes(2), "b/1.PNG": image_bytes(1), "README": b"x",
               "b/1.seg.png": b"mask", "._a.png": b"of macOS", "a.x/2.txt": b"two", "b/3.txt": b"of nothing"}
    dataset = opened(write_tar(tmp_path / "s" / "0.tar", members).parent)
    assert dict(zip(dataset.paths, dataset.captions)) == {"0.tar/b/1.PNG": "one", "0.tar/a.x/2.png": "two"}
    assert dataset.left_out == {".seg.png": 1, ".txt without an image": 1, "without an ending": 1}


def test_hidden_and_system_files_and_folders_in_a_shard_are_left_out_as_in_a_folder(tmp_path):
    names = ["a/1.png", "a/.ipynb_checkpoints/1.png", "@eaDir/2.png", "__MACOSX/a/3.png", "a/._1.png",
             ".b/4.txt", "$RECYCLE.BIN/5.png", "a/Thumbs.db"]
    write_tar(tmp_path / "tar" / "0.tar", {f"./{name}": image_bytes(i) for i, name in enumerate(names)})
    with tarfile.open(tmp_path / "tar" / "0.tar") as tar:
        tar.extractall(tmp_path / "loose", filter="data")
    sharded, loose = opened(tmp_path / "tar"), opened(tmp_path / "loose")
    assert list(sharded.paths) == ["0.tar/a/1.png"]
    assert loose.paths == [str(tmp_path / "loose" / "a" / "1.png")]
    assert sharded.left_out == loose.left_out == {}


def test_whole_images_are_read_at_their_own_sizes(photos):
    dataset = opened(photos(3))
    found = [x.shape for x, _, _ in data.read(dataset, [0, 1, 2], whole=2)]
    assert found == [(1, 3, 20, 18)] * 3


def test_a_folder_of_images_with_a_tar_in_it_stays_a_folder_of_images(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    write_tar(tmp_path / "backup.tar", sample(1))
    dataset = opened(tmp_path)
    assert isinstance(dataset, data.ImageFolder) and dataset.left_out == {".tar": 1}


# ---------------------------------------------------------------- damage


def test_a_damaged_image_is_named_and_replaced_as_in_a_folder(tmp_path, capsys):
    members = {}
    for i in range(30):
        members |= sample(i, cls=b"0")
    members["0003.png"] = members["0003.png"][:60]
    members["0004.png"] = b""
    dataset = opened(write_tar(tmp_path / "s" / "0.tar", members).parent)
    assert np.array_equal(dataset.image(3)[0], dataset.image(5)[0]) and dataset.exact(4) is None
    assert list(dataset.bad) == ["0.tar/0003.png", "0.tar/0004.png"]
    err = capsys.readouterr().err
    assert "cannot read the image 0.tar/0003.png" in err and "0.tar/0004.png: the file is empty" in err


def test_the_run_ends_when_ten_images_and_one_percent_are_damaged(tmp_path):
    members = {}
    for i in range(20):
        members |= {f"{i}.png": b"no image" if i < 10 else image_bytes(i)}
    dataset = opened(write_tar(tmp_path / "s" / "0.tar", members).parent)
    with pytest.raises(ValueError, match="10 of 20 images in .* are unreadable"):
        dataset.image(0)


def test_what_the_index_left_out_does_not_count_among_the_unreadable_images(tmp_path):
    members = {}
    for i in range(36):
        members |= {f"{i}.png": b"no image" if i == 0 else image_bytes(i)}
    for i in range(36, 48):
        members |= {f"{i}.png": image_bytes(i), f"{i}.json": b"{"}
    dataset = opened(write_tar(tmp_path / "s" / "0.tar", members).parent)
    assert len(dataset) == 36 and len(dataset.bad) == 12
    assert np.array_equal(dataset.image(0)[0], dataset.image(1)[0])
    assert len(dataset.bad) == 13


@pytest.mark.parametrize("kept, images", [(0.5, 5), (1.0, 10)])
def test_a_truncated_shard_is_named_and_read_up_to_the_cut(tmp_path, capsys, kept, images):
    members = {}
    for i in range(10):
        members |= sample(i)
    path = write_tar(tmp_path / "s" / "0.tar", members)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    whole = last.offset_data + -(-last.size // 512) * 512          # without the end mark
    os.truncate(path, int(whole * kept))
    write_tar(tmp_path / "s" / "1.tar", sample(99))
    dataset = opened(tmp_path / "s")
    assert len(dataset) == images + 1 and list(dataset.bad) == ["0.tar"]
    assert f"copy it again, the {images} images before are used" in capsys.readouterr().err
    assert "1 unreadable" in dataset.summary()
    assert dataset.image(images)[0].shape == (SIZE, SIZE, 3)       # from the next shard
    again = opened(tmp_path / "s")
    assert again.bad == dataset.bad                                # the index remembers


@pytest.mark.parametrize("ending, label, caption", [("cls", "", "a red fox"), ("txt", "123", "")])
def test_the_class_or_caption_at_the_cut_is_not_taken_by_its_first_letters(tmp_path, ending, label, caption):
    members = sample(0) | {"0000.cls": b"123", "0000.txt": b"a red fox"}
    members[f"0000.{ending}"] = members.pop(f"0000.{ending}")      # the last in the file
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmembers()[-1].offset_data + 2)
    index = shards.read_index(tmp_path, [".png"])
    assert list(index.labels) == [label] and list(index.captions) == [caption]
    assert f"0000.{ending} is not whole" in index.faults["0.tar"]


def test_shards_that_change_during_a_run_are_named(photos, capsys):
    folder = photos()
    dataset = opened(folder)
    os.truncate(folder / "00001.tar", 1000)
    (folder / "00002.tar").unlink()
    assert dataset.exact(4) is None and dataset.exact(11) is None and dataset.exact(0) is not None
    assert "has become shorter since" in dataset.bad["00001.tar/0004.png"]
    assert "No such file" in dataset.bad["00002.tar/0011.png"]


def test_a_shard_is_read_again_if_the_disk_fails_for_a_moment(photos, monkeypatch):
    dataset = opened(photos())
    wanted = dataset.image(0)[0]
    opens = []

    def failing(path, *args, **options):
        opens.append(path)
        if len(opens) < 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open(path, *args, **options)

    monkeypatch.setattr(files, "PAUSES", (0, 0))
    monkeypatch.setattr(shards, "open", failing, raising=False)
    assert np.array_equal(dataset.image(0)[0], wanted)
    assert not dataset.bad and len(opens) == 3


def test_damaged_labels_and_captions_are_named_and_their_images_left_out(tmp_path, capsys):
    members = {}
    for i in range(40):
        members |= sample(i, cls=b"1")
    del members["0001.cls"]
    members |= {"0002.txt": b"\xff\xfe", "0003.cls": b"\xff", "0004.json": b"{", "0005.json": b"[1]",
                "0006.json": b'{"caption": "\\ud83d"}'}
    dataset = opened(write_tar(tmp_path / "s" / "0.tar", members).parent)
    assert dataset.bad == {
        "0.tar/0001.png": "it has no class, but others do (.cls)",
        "0.tar/0002.png": "its .txt is not UTF-8", "0.tar/0003.png": "its .cls is not UTF-8",
        "0.tar/0004.png": dataset.bad["0.tar/0004.png"],
        "0.tar/0006.png": "its .json has half a character, such as \\ud83d alone"}
    assert "its .json cannot be read" in dataset.bad["0.tar/0004.png"]
    assert len(dataset) == 35 and "5 unreadable" in dataset.summary()
    assert "and 2 more like these" in capsys.readouterr().err


def test_dropping_an_unlabelled_image_keeps_the_others_classes_and_captions(tmp_path):
    members = {}
    for i in range(30):
        members |= sample(i, cls=b"%02d" % i, txt=b"number %02d" % i)
    del members["0004.cls"]
    dataset = opened(write_tar(tmp_path / "s" / "0.tar", members).parent)
    kept = [i for i in range(30) if i != 4]
    assert dataset.labels.tolist() == kept and list(dataset.captions) == [f"number {i:02d}" for i in kept]
    for place, i in enumerate(kept):
        whole = Image.open(io.BytesIO(image_bytes(i)))
        assert np.array_equal(dataset.image(place)[0], np.asarray(data.center_crop(whole, SIZE)))


def test_of_duplicate_names_in_a_shard_the_first_image_and_caption_count(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, words in ((1, b"one"), (2, b"two"), (1, b"of another 1")):
            for ending, content in (("png", image_bytes(i)), ("txt", words)):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    dataset = opened(tmp_path)
    assert list(dataset.captions) == ["one", "two"]
    assert dataset.left_out == {".png": 1, ".txt": 1}


def test_shards_or_folders_in_them_that_seem_to_be_classes_are_pointed_out(tmp_path, capsys):
    for k, synset in enumerate(("n01440764", "n01443537")):
        write_tar(tmp_path / "own" / f"{synset}.tar", {f"{synset}_{k}.JPEG": image_bytes(k)})
    write_tar(tmp_path / "folders" / "00000.tar", {"cat/1.png": image_bytes(0), "dog/1.png": image_bytes(1)})
    write_tar(tmp_path / "plain" / "00000.tar", sample(0))
    write_tar(tmp_path / "classes" / "00000.tar", {"cat/1.png": image_bytes(0), "cat/1.cls": b"0",
                                                   "dog/1.png": image_bytes(1), "dog/1.cls": b"1"})
    for name, said in {"own": "If its 2 shards (n01440764.tar, n01443537.tar, ...) are the classes, unpack",
                       "folders": "If the 2 folders in its shards (cat, dog, ...) are the classes",
                       "plain": "", "classes": ""}.items():
        data.open_dataset(tmp_path / name, SIZE)
        found = capsys.readouterr().err
        assert said in found and ("no image has a class" in found) == bool(said)


def test_many_images_without_a_class_are_refused(photos):
    folder = photos(30, cls=label)
    write_tar(folder / "9.tar", {name: content for i in range(10) for name, content in sample(i).items()})
    with pytest.raises(ValueError, match=r"10 of 40 images have no class \(such as 9.tar/0000.png\)"):
        opened(folder)


@pytest.mark.parametrize("text, sentence", [
    (b"cat", "its class is 'cat'; wanted one of the 3 numbers from 0 on"),
    (b"-1", "its class is '-1'"), (b"99999999999", "its class is '99999999999'; wanted one of the 1000000"),
])
def test_an_invalid_label_among_class_numbers_is_named(photos, text, sentence):
    folder = photos(cls=lambda i: text if i == 7 else label(i))
    with pytest.raises(ValueError, match=f"00001.tar/0007.png: {sentence}"):
        opened(folder)
    (folder / "classes.txt").write_text("0\n1\n2\n")
    with pytest.raises(ValueError, match="wanted one of the 3 in classes.txt"):
        opened(folder)


def test_an_invalid_tar_and_shards_without_images_are_refused(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "0.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match="no images in its 1 shards"):
        opened(tmp_path / "s")
    write_tar(tmp_path / "s" / "1.tar", {"my.cat.1.jpg": b"", "my.cat.2.jpg": b""})
    with pytest.raises(ValueError, match=r"its 2 shards \(1 .cat.1.jpg, 1 .cat.2.jpg\); .*NAME without"):
        opened(tmp_path / "s")


@pytest.mark.parametrize("place", ["s3://bucket/photos", "pipe:cat x.tar", "https://a/{000..999}.tar",
                                   "photos/{000..999}.tar"])
def test_shard_urls_and_patterns_are_refused(place):
    with pytest.raises(ValueError, match="read by seeking; copy or mount it first, with tools of your own"):
        opened(place)


def test_a_single_tar_and_compressed_shards_get_advice(tmp_path):
    with pytest.raises(ValueError, match="wanted the folder that it is in"):
        opened(write_tar(tmp_path / "s" / "0.tar", sample(0)))
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "0.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="are compressed.*gunzip"):
        opened(tmp_path / "z")


# ---------------------------------------------------------------- the index


@pytest.fixture
def scans(monkeypatch):
    """A list that grows with each index that is built."""
    made = []
    scan = shards.scan

    def counted(*args):
        made.append(1)
        time.sleep(0.05)                                           # long enough for others to arrive
        return scan(*args)
    monkeypatch.setattr(shards, "scan", counted)
    return made


def test_the_index_is_built_once_and_rebuilt_when_a_shard_changes(photos, scans):
    folder = photos(cls=label)
    first = opened(folder)
    second = opened(folder)
    assert len(scans) == 1 and list(second.paths) == list(first.paths)
    assert np.array_equal(second.image(11)[0], first.image(11)[0]) and second.fingerprint == first.fingerprint
    os.utime(folder / "00001.tar", (1, 1))
    assert opened(folder).fingerprint == first.fingerprint and len(scans) == 2      # the same images
    write_tar(folder / "00003.tar", sample(50, cls=b"2"))
    assert len(opened(folder)) == 13 and len(scans) == 3
    (folder / "00000.tar").unlink()
    assert len(opened(folder)) == 9 and len(scans) == 4


def test_an_index_of_another_version_is_rebuilt(photos, scans, monkeypatch):
    folder = photos(cls=label)
    opened(folder)
    monkeypatch.setattr(shards, "VERSION", shards.VERSION + 1)
    assert len(opened(folder)) == 12 and len(scans) == 2
    opened(folder)
    assert len(scans) == 2


def test_an_index_built_for_other_image_formats_is_rebuilt(photos, scans, monkeypatch):
    folder = photos(cls=label)
    opened(folder)
    monkeypatch.setattr(data, "EXTENSIONS", (*data.EXTENSIONS, ".new"))            # as in a newer Pillow
    assert len(opened(folder)) == 12 and len(scans) == 2


@pytest.mark.parametrize("spoil", [b"", b"PK\3\4 no index", None])
def test_a_damaged_index_is_rebuilt(photos, scans, spoil):
    folder = photos(cls=label)
    opened(folder)
    index = folder / ".shards.npz"
    index.write_bytes(index.read_bytes()[:-40] if spoil is None else spoil)
    assert len(opened(folder)) == 12 and len(scans) == 2
    assert sorted(path.name for path in folder.glob("*.tmp")) == []


def test_the_index_of_a_read_only_folder_goes_into_the_cache(photos, scans, tmp_path, monkeypatch):
    folder = photos(cls=label)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened(folder)
    opened(folder)
    assert len(scans) == 1 and not (folder / ".shards.npz").exists()
    assert len(list((tmp_path / "cache" / "da-vae").glob("shards-*.npz"))) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="wanted a place for the index of .*XDG_CACHE_HOME"):
        opened(folder)


def test_the_index_and_the_lock_of_another_user_are_read_not_written(photos, scans, tmp_path, monkeypatch):
    def lock(path):
        if os.path.dirname(path) == str(folder):                   # as where its owner alone may write
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return FileLock(path)

    folder = photos(cls=label)
    opened(folder)
    monkeypatch.setattr(shards, "FileLock", lock)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(opened(folder)) == 12 and len(scans) == 1 and not (tmp_path / "cache").exists()
    os.utime(folder / "00001.tar", (1, 1))
    for _ in range(2):
        assert len(opened(folder)) == 12 and len(scans) == 2       # then there is one in the cache, too


def test_only_one_rank_builds_the_index(photos, scans):
    folder = photos(cls=label)
    with ThreadPoolExecutor(4) as pool:
        assert set(map(len, pool.map(opened, [folder] * 4))) == {12}
    assert len(scans) == 1


def test_the_fingerprint_depends_on_images_classes_and_captions(photos):
    def one(i):
        return b"x" if i == 3 else b"y"

    folder = photos(cls=label)
    prints = {opened(folder).fingerprint}
    (folder / "classes.txt").write_text("ant\nbee\ncat")
    prints.add(opened(folder).fingerprint)
    for beside in ({"cls": lambda i: b"2" if i == 3 else label(i)}, {}, {"txt": one}, {"txt": lambda i: b"y"},
                   {"json": lambda i: json.dumps({"text": "x"}).encode()}):
        photos(**beside)                                           # the same images, each with other files
        prints.add(opened(folder).fingerprint)
    assert len(prints) == 7
    moved = folder.rename(folder.with_name("moved"))
    assert opened(moved).fingerprint in prints


def test_changed_pixels_under_the_same_names_and_sizes_are_other_images(tmp_path):
    def bitmaps(seed):
        return {f"{i}.bmp": image_bytes(i if i < 3 else seed, "BMP") for i in range(4)}

    write_tar(tmp_path / "0.tar", bitmaps(50))
    before = opened(tmp_path)
    known = before.fingerprint
    write_tar(tmp_path / "0.tar", bitmaps(51))
    after = opened(tmp_path)
    assert after.index.size.tolist() == before.index.size.tolist() and after.fingerprint != known


def test_packed_strings_unpack_to_the_same_list():
    strings = ["", "a", "", "üñ", "\udcff", "x\0y", ""]
    packed = shards.Strings.pack(strings)
    assert list(packed) == [packed[i] for i in range(7)] == strings and packed[-2] == "x\0y"
    with pytest.raises(IndexError):
        packed[7]
    assert list(shards.Strings.pack([])) == []
