"""Tar shards in webdataset's layout: a million images in a thousand files, each still one seek away.

    photos/00000.tar, 00001.tar, ...      files with the same name up to its first dot are one sample:
        a/0001.jpg                        the image
        a/0001.cls                        its class: a number, or a name
        a/0001.txt                        its caption
        a/0001.json                       or both: {"cls" or "label": ..., "text" or "caption": ...}
    photos/classes.txt                    the class names, one per line, if there are any

A tar file is a sequence of headers and contents. Its headers are read once, into an index of offsets and
sizes, and of the labels and captions, which are small. After that, image i is one seek and one read: any
order costs the same, a resumed run continues where it was, and ranks share the images, all as with a folder.
The index is stored next to the shards as .shards.npz, or in ~/.cache/da-vae if that cannot be written, and is
rebuilt when the size or time of a shard has changed.

Nothing is downloaded: copy or mount remote shards yourself first (`aws s3 sync`, `rclone mount`).
"""
import contextlib
import json
import math
import os
import re
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from support import files
from support.captions import read_text, shown
from support.identity import of_text

BESIDE = ".shards.npz"                     # the index, next to the shards
VERSION = 4                                # of the index; another version is rebuilt
SMALL = 1 << 20                            # bytes: larger labels, captions or jsons are ignored

# Within a tar file, the directory and name up to the first dot, and what follows it.
NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]+)")

LABELS = ("cls", "label")                  # keys of a json, preferred ones first
CAPTIONS = ("text", "caption")

# What operating systems put into folders next to the user's files, besides names that begin with a dot.
OF_SYSTEMS = (
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "lost+found", "$recycle.bin",
    "system volume information",
)

# The most classes that numeric labels may ask for.
MOST_CLASSES = 1_000_000


class Strings:
    """A list of strings in two arrays: a million take a tenth of the memory of a Python list.

    text: their UTF-8 bytes, concatenated, uint8;  ends: where each ends, int64
    """

    def __init__(self, text, ends):
        self.text = text
        self.ends = ends

    @classmethod
    def pack(cls, strings):
        raw = [string.encode("utf-8", "surrogateescape") for string in strings]
        ends = np.cumsum([len(part) for part in raw], dtype=np.int64)
        return cls(np.frombuffer(b"".join(raw), dtype=np.uint8), ends)

    def __len__(self):
        return len(self.ends)

    def __iter__(self):
        raw = self.text.tobytes()
        start = 0
        for end in self.ends.tolist():
            yield raw[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __getitem__(self, i):
        i = range(len(self))[i]                                    # IndexError past the end
        start = self.ends[i - 1] if i else 0
        return self.text[start:self.ends[i]].tobytes().decode("utf-8", "surrogateescape")


class Index:
    """Where each image of a folder of shards is, with label and caption; ordered by shard, then position.

    names      Strings: "00000.tar/a/0001.jpg"
    labels     Strings: from the .cls or json; "" if there is none
    captions   Strings; "" if there is none
    tars       names of the shards
    faults     {name: reason} for broken samples, which are not among the above
    left_out   {ending: count} of other files in the shards
    """

    def __init__(self, folder, about, arrays):
        self.folder = folder
        self.tars = [name for name, _, _ in about["tars"]]
        self.faults = about["faults"]
        self.left_out = about["left_out"]
        self.tar = arrays["tar"]                                   # (N,) which of `tars`
        self.offset = arrays["offset"]                             # (N,) bytes
        self.size = arrays["size"]
        for column in ("names", "labels", "captions"):
            setattr(self, column, Strings(arrays[column], arrays[f"{column}_ends"]))

    def __len__(self):
        return len(self.tar)

    def read(self, i, most=math.inf):
        """The first `most` bytes of image i.   raises: OSError or ValueError if they are no longer there"""
        size = min(most, self.size[i])
        path = os.path.join(self.folder, self.tars[self.tar[i]])

        def attempt():
            with open(path, "rb", buffering=0) as file:
                file.seek(self.offset[i])
                return file.read(size)

        raw = files.read_again(attempt)
        if len(raw) < size:
            raise ValueError("its shard has become shorter since the run began")
        return raw


def read_index(folder, endings):
    """The Index of a folder of shards, built now if it is missing or does not match the shards.

    endings: of images, such as ".jpg".   Only one process builds it; others wait.
    raises: ValueError saying what cannot be read
    """
    paths = sorted(path for path in Path(folder).glob("*.tar") if not path.name.startswith("."))
    tars = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    found = load(Path(folder) / BESIDE, tars, endings)
    if found is None:
        place, lock = place_to_write(folder)
        with lock:
            found = load(place, tars, endings)
            if found is None:
                found = scan(folder, tars, endings)
                try:
                    save(place, *found)
                except OSError as error:
                    print(f"{place}: the index was not saved ({error.strerror}), and is made again next time",
                          file=sys.stderr)
    return Index(folder, *found)


def is_hidden(name):
    """Is a file or folder of this name hidden, or put there by an operating system?"""
    return name.startswith(".") and name not in (".", "..") or name.lower() in OF_SYSTEMS


# ---------------------------------------------------------------- making the index


def scan(folder, tars, endings):
    """(about, arrays) of an Index, from all headers of the shards, one shard after another."""
    columns = {name: [] for name in ("tar", "offset", "size", "names", "labels", "captions")}
    faults, left_out = {}, Counter()
    title = f"{shown(folder)}: index of {len(tars)} shards, made once"
    for n, (tar, _, _) in enumerate(tqdm(tars, desc=title, mininterval=1)):
        samples = read_tar(os.path.join(folder, tar), tar, endings, faults, left_out)
        for sample in samples.values():
            if "image" not in sample:                              # a caption without an image
                left_out.update(sample["endings"])
                continue
            name, offset, size = sample["image"]
            try:
                label, caption = label_and_caption(sample)
            except ValueError as error:
                faults[f"{tar}/{name}"] = str(error)
                continue
            row = (n, offset, size, f"{tar}/{name}", label, caption)
            for column, value in zip(columns.values(), row):
                column.append(value)

    without = [name for name, label in zip(columns["names"], columns["labels"]) if not label]
    if len(without) < len(columns["names"]):
        drop_unlabelled(columns, without, faults, folder)
    arrays = {name: np.array(columns[name], dtype=np.int64) for name in ("tar", "offset", "size")}
    for name in ("names", "labels", "captions"):
        packed = Strings.pack(columns[name])
        arrays |= {name: packed.text, f"{name}_ends": packed.ends}
    about = {"version": VERSION, "tars": tars, "endings": sorted(endings), "faults": faults,
             "left_out": dict(left_out.most_common())}
    return about, arrays


def read_tar(path, tar, endings, faults, left_out):
    """{key: sample} of one shard, in the order of its images; adds to faults and left_out.

    A sample has "image", (name, offset, size), and the contents of "cls", "txt" and "json", if present; of
    duplicate names, the first counts. Hidden files, and those in hidden folders, are skipped.
    A truncated shard is read as far as it goes.
    """
    samples = {}
    try:
        with open(path, "rb") as file:
            for member in members(file):
                name = member.name.removeprefix("./")
                match = NAME.fullmatch(name)
                if any(map(is_hidden, name.split("/"))):
                    continue
                if not member.isreg() or member.issparse() or match is None:
                    if not member.isdir():
                        left_out[os.path.splitext(name)[1].lower() or "without an ending"] += 1
                    continue
                ending = match["ending"].lower()
                sample = samples.setdefault(match["key"], {"endings": []})
                if f".{ending}" in endings and "image" not in sample:
                    check_whole(file, member)
                    sample["image"] = (name, member.offset_data, member.size)
                elif ending in ("cls", "txt", "json") and ending not in sample and member.size <= SMALL:
                    check_whole(file, member)                      # half of a class is another class
                    file.seek(member.offset_data)
                    sample[ending] = file.read(member.size)
                    sample["endings"].append(f".{ending} without an image")
                else:
                    left_out[f".{ending}"] += 1
    except (tarfile.TarError, EOFError) as error:
        count = sum("image" in sample for sample in samples.values())
        faults[tar] = f"is cut off or damaged ({error}); copy it again, the {count} images before are used"
    except OSError as error:
        raise ValueError(f"cannot read the shard {shown(path)}: {error.strerror}") from None
    return samples


def members(file):
    """The headers in a tar file, one by one.   raises: TarError if it ends without an end mark"""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while True:
            member = tar.next()
            if member is None:
                break
            yield member
            tar.members.clear()                                    # else it keeps them all
    file.seek(tar.offset)
    if file.read(512) != bytes(512):                               # tarfile would ignore that
        raise tarfile.ReadError("no end mark")


def check_whole(file, member):
    """raises: EOFError if the file ends before the member does"""
    if member.offset_data + member.size > os.fstat(file.fileno()).st_size:
        raise EOFError(f"{member.name} is not whole")


def label_and_caption(sample):
    """Both as strings, "" for none.   raises: ValueError saying which file of the sample is broken"""
    both = {}
    for name, ending in (("label", "cls"), ("caption", "txt")):
        try:
            both[name] = sample.get(ending, b"").decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"its .{ending} is not UTF-8") from None
    if "json" in sample and not all(both.values()):
        try:
            found = json.loads(sample["json"])
        except ValueError as error:
            raise ValueError(f"its .json cannot be read ({error})") from None
        found = found if isinstance(found, dict) else {}
        both["label"] = both["label"] or first_of(found, LABELS)
        both["caption"] = both["caption"] or first_of(found, CAPTIONS)
    return both["label"], both["caption"]


def first_of(found, keys):
    """The string or whole number under the first of these keys, as a string; "" if there is none.

    raises: ValueError if it is not valid Unicode
    """
    for key in keys:
        value = found.get(key)
        if isinstance(value, str) or type(value) is int:
            text = str(value).strip()
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError("its .json has half a character, such as \\ud83d alone") from None
            return text
    return ""


def drop_unlabelled(columns, without, faults, folder):
    """Remove images without a class from the columns, if others have one.

    raises: ValueError if there are 10 or more of them, and they make up at least 1 % of all images
    """
    total = len(columns["names"])
    if len(without) >= max(10, total / 100):
        raise ValueError(f"{shown(folder)}: {len(without)} of {total} images have no class (such as "
                         f"{without[0]}) but others do: add their .cls, or remove them")
    keep = [i for i, label in enumerate(columns["labels"]) if label]
    for name, column in columns.items():
        columns[name] = [column[i] for i in keep]
    faults |= dict.fromkeys(without, "it has no class, but others do (.cls)")


# ---------------------------------------------------------------- storing the index


def place_to_write(folder):
    """(index file, its lock, held by this process): next to the shards, or in the user's cache.

    raises: ValueError if neither works
    """
    if os.access(folder, os.W_OK):
        place = Path(folder) / BESIDE
        with contextlib.suppress(OSError):                         # the lock may be another user's
            return place, FileLock(f"{place}.lock").acquire()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "da-vae"
    place = cache / f"shards-{of_text(os.path.realpath(folder))}.npz"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return place, FileLock(f"{place}.lock").acquire()
    except OSError as error:
        raise ValueError(f"{cache}: {error.strerror}; wanted a place for the index of {shown(folder)}, give "
                         "one with XDG_CACHE_HOME") from None


def save(place, about, arrays):
    """Write the index to a temporary file and rename it: it is whole or absent."""
    aside = f"{place}.{os.getpid()}.tmp"
    try:
        with open(aside, "wb") as file:
            np.savez(file, about=json.dumps(about), **arrays)
        os.replace(aside, place)
    finally:
        Path(aside).unlink(missing_ok=True)


def load(place, tars, endings):
    """(about, arrays) of an index; None if it is damaged, or of other shards, endings or another version."""
    try:
        with np.load(place) as file:
            about = json.loads(str(file["about"]))
            if (about["version"], about["tars"], about["endings"]) != (VERSION, tars, sorted(endings)):
                return None
            return about, {name: file[name] for name in file.files if name != "about"}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


# ---------------------------------------------------------------- classes


def classes_of(index):
    """(labels (N,) int64, class names) of the images; names are [] if no image has a class.

    Numeric labels are used as they are; their names come from classes.txt, in order, or are the numbers
    themselves. Labels that are names are numbered in the order of classes.txt, or else alphabetically.
    raises: ValueError naming a label that is not in classes.txt, or not a number where others are
    """
    texts = list(index.labels)
    if not any(texts):
        return np.zeros(len(index), dtype=np.int64), []
    beside = os.path.join(index.folder, "classes.txt")
    names = [line.strip() for line in read_text(beside).strip().split("\n")] if os.path.exists(beside) else []
    number = {text: int(text) for text in set(texts) if text.isascii() and text.isdecimal()}
    if not number or set(texts) <= set(names):                     # names: words, or numbers such as years
        names = names or sorted(set(texts))
        number = {name: k for k, name in enumerate(names)}
    elif not names:
        names = [str(k) for k in range(min(MOST_CLASSES, max(number.values()) + 1))]
    for i, text in enumerate(texts):
        if number.get(text, len(names)) >= len(names):
            raise ValueError(f"{index.names[i]}: its class is {text[:40]!r}; wanted one of the {len(names)} "
                             f"{'in classes.txt' if os.path.exists(beside) else 'numbers from 0 on'}")
    return np.array([number[text] for text in texts], dtype=np.int64), names
