"""Captions of a folder of images, and text files as people save them.

Captions are in metadata.jsonl or metadata.csv, in any folder, or in `name.txt` next to an image `name.png`.
Lists and images often come from different machines: macOS writes an accent as a separate character, Windows
writes \\ for /. So names are compared in several forms, the strictest first (`forms`).
"""
import csv
import io
import json
import os
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path


LISTS = ("metadata.csv", "metadata.jsonl")              # if both name an image, the latter counts


# ---------------------------------------------------------------- texts and names


def shown(name):
    """A name that fits on a printed line: in Python's notation if it has newlines or invalid bytes."""
    name = os.fspath(name)
    return name if name.isprintable() else repr(name)


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark; all line ends become newlines.

    raises: ValueError naming file and line if it has another encoding
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {shown(path)}: {error.strerror}") from None
    reason = ""
    try:
        text = raw.decode("utf-8-sig")
        place = text.find("\0")
        line = text.count("\n", 0, place) + 1
        if place >= 0:                                  # UTF-16 without its mark, or not text at all
            reason = "a zero byte, as in UTF-16"
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        reason = f"byte {raw[error.start]:#x} is not UTF-8"
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            reason = "it is UTF-16"
    if reason:
        raise ValueError(f"{shown(path)}: line {line}: {reason}; wanted text, save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def forms(name):
    """The forms in which names are compared: as is; accents and slashes unified; also in lower case."""
    alike = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return name, alike, unicodedata.normalize("NFC", alike.casefold())


def by_forms(names):
    """From {file: its name}, one table {form: files} for each of `forms`."""
    tables = [defaultdict(list) for _ in range(3)]
    for path, name in names.items():
        for table, form in zip(tables, forms(name)):
            table[form].append(path)
    return tables


def find(tables, name):
    """The files with a name, in the strictest form in which there is any."""
    for table, form in zip(tables, forms(name)):
        if form in table:
            return table[form]
    return []


def within(root, folder, name):
    """A name in a list, relative to `root`.   folder: the list's, also relative to it

    The name may be absolute, begin with ./ and have backslashes.
    """
    name = name.replace("\\", "/")
    if os.path.isabs(name):
        name = forms(name)[1]
        for top in (os.path.abspath(root), os.path.realpath(root)):
            name = name.removeprefix(forms(top)[1] + "/")
        return os.path.normpath(name)
    return os.path.normpath(os.path.join(folder, name))


# ---------------------------------------------------------------- captions


def read_captions(root, paths, files):
    """Captions of the images `paths` below `root`: (one for each, "" = none; the files they came from).

    If both a list and a text file next to the image have one, the text file counts. Rows that match no image,
    and captions that replace others, are counted on stderr.
    files: all files below `root`
    raises: ValueError naming the file and line that hold something else
    """
    lists = [path for name in LISTS for path in files if os.path.basename(path) == name]
    texts = [path for path in files if path.lower().endswith(".txt")]
    if not lists and not texts:
        return [""] * len(paths), set()
    names = {path: os.path.relpath(path, root) for path in paths}
    stems = {path: os.path.splitext(name)[0] for path, name in names.items()}
    names, of_stem = by_forms(names), by_forms(stems)

    captions = {}
    for source in lists:
        captions |= match(source, read_list(source), root, names, of_stem)
    used = set(lists)
    for source in texts:
        found = find(of_stem, os.path.splitext(os.path.relpath(source, root))[0])
        if len({stems[path] for path in found}) == 1:                       # name.png and name.jpg share one
            used.add(source)
            text = read_text(source).strip()
            if text:
                captions |= dict.fromkeys(found, text)
    return [captions.get(path, "") for path in paths], used


def match(source, rows, root, names, of_stem):
    """{image: caption} from a list's rows [(name, caption)], the last row of each; prints what does not fit.

    names, of_stem: the images by their names, and by their names without endings
    """
    folder = os.path.relpath(os.path.dirname(source), root)
    captions, lost, replaced = {}, [], []
    for name, caption in rows:
        inside = within(root, folder, name)
        found = find(names, inside) or find(of_stem, inside)
        if len(found) != 1:
            lost.append(name)
            continue
        if captions.get(found[0], caption) != caption:
            replaced.append(name)
        captions[found[0]] = caption
    say(source, rows, lost, "found no image, or several")
    say(source, rows, replaced, "give an image another caption; the last one counts")
    return captions


def say(source, rows, some, what):
    """Print to stderr how many of a list's rows `some` are, and name the first."""
    if some:
        first = ", ".join(map(repr, some[:3]))
        print(f"{shown(source)}: {len(some)} of {len(rows)} rows {what}; the first: {first}", file=sys.stderr)


def read_list(path):
    """[(file name, caption)] of a metadata.jsonl, its lines {"file_name": ..., "text": ...}, or metadata.csv.

    "caption" is accepted in place of "text".
    raises: ValueError naming the file and line that hold something else
    """
    text = read_text(path)
    if path.endswith(".csv"):
        return read_csv(path, text)
    rows = []
    for n, line in enumerate(text.split("\n"), 1):      # splitlines would also split at U+2028
        try:
            if line.strip():
                rows.append(name_and_caption(json.loads(line)))
        except ValueError as error:
            raise refused(path, n, error) from None
    return rows


def read_csv(path, text):
    """As `read_list`, for a csv whose first line names its columns."""
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    try:
        return [name_and_caption(row) for row in reader]
    except (ValueError, csv.Error) as error:
        raise refused(path, reader.reader.line_num, error) from None


def refused(path, line, error):
    reason = str(error).replace(": line 1 column", " at column")         # json sees one line only
    return ValueError(f"captions in {shown(path)}: line {line}: {reason}; "
                      "wanted text, or lines of {file_name, text}")


def name_and_caption(row):
    """(name, caption) of a list's row.   raises: ValueError if one of them is missing or not text"""
    columns = row if isinstance(row, dict) else {}
    name = columns.get("file_name")
    caption = columns["text"] if "text" in columns else columns.get("caption")
    if not isinstance(name, str) or not isinstance(caption, str):
        raise ValueError(f"found {repr(row)[:100]}")
    caption.encode()                                    # half a character, such as \\ud83d alone, is not text
    return name, caption.strip()
