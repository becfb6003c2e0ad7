"""support/captions.py: which caption an image gets, whatever machine its name was written on."""
import json
import unicodedata

import pytest
from PIL import Image
from support import captions, data


def images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")


def metadata(folder, *rows, name="metadata.jsonl"):
    """Write a list of (file name, caption) to a folder, as jsonl or csv."""
    lines = [json.dumps({"file_name": file, "text": text}) for file, text in rows]
    if name.endswith(".csv"):
        lines = ["file_name,text"] + [f'"{file}","{text}"' for file, text in rows]
    (folder / name).write_text("\n".join(lines) + "\n", "utf-8")


def of(folder):
    """{name: caption} of the images in a folder."""
    dataset = data.ImageFolder(folder, 8)
    names = [path.removeprefix(f"{folder}/") for path in dataset.paths]
    return dict(zip(names, dataset.captions or [""] * len(names)))


def composed(name):
    return unicodedata.normalize("NFC", name)


def decomposed(name):
    return unicodedata.normalize("NFD", name)


# ---- names ----

@pytest.mark.parametrize("name", ["café.png", "ÅÄÖ/über.png", "パグ.png"])
@pytest.mark.parametrize("ours, theirs", [(composed, decomposed), (decomposed, composed)])
def test_accents_match_however_they_are_encoded(tmp_path, name, ours, theirs):
    assert ours(name) != theirs(name)
    images(tmp_path, ours(name))
    metadata(tmp_path, (theirs(name), "in the list"))
    assert list(of(tmp_path).values()) == ["in the list"]
    image = tmp_path / ours(name)
    image.with_name(theirs(image.stem) + ".txt").write_text("beside")
    assert list(of(tmp_path).values()) == ["beside"]


def test_names_that_differ_only_in_unicode_form_have_a_caption_each(tmp_path):
    images(tmp_path, composed("é.png"), decomposed("é.png"))
    metadata(tmp_path, (decomposed("é.png"), "two characters"), (composed("é.png"), "one"))
    assert of(tmp_path) == {composed("é.png"): "one", decomposed("é.png"): "two characters"}


@pytest.mark.parametrize("written", ["./sub/b.png", ".\\sub\\b.png", "sub\\b.png", "sub//b.png",
                                     "sub/../sub/b.png", "sub/b", "SUB/B.PNG", "sub\\B"])
def test_a_name_matches_with_backslashes_dots_other_case_or_no_ending(tmp_path, written):
    images(tmp_path, "sub/b.png", "other/b.png")
    metadata(tmp_path, (written, "found"))
    assert of(tmp_path) == {"sub/b.png": "found", "other/b.png": ""}


def test_an_absolute_path_is_found_via_the_folder_or_a_link_to_it(tmp_path, monkeypatch):
    images(tmp_path / "photos", "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    metadata(tmp_path / "photos", (str(tmp_path / "photos" / "a.png"), "found"))
    monkeypatch.chdir(tmp_path)
    for root in ("photos", "./photos/", "link", str(tmp_path / "link")):
        assert data.ImageFolder(root, 8).captions == ["found"]


def test_an_ambiguous_name_matches_no_image_but_an_exact_one_does(tmp_path, capsys):
    images(tmp_path, "a.png", "a.jpg", "b.png", "B.png")
    metadata(tmp_path, ("a", "which?"), ("b.PNG", "which?"), ("B.png", "exact"), ("gone.png", "lost"))
    assert of(tmp_path) == {"B.png": "exact", "a.jpg": "", "a.png": "", "b.png": ""}
    said = capsys.readouterr().err
    assert "3 of 4 rows found no image, or several; the first: 'a', 'b.PNG', 'gone.png'" in said


def test_rows_without_an_image_are_counted_and_the_first_three_named_in_one_line(tmp_path, capsys):
    images(tmp_path, "a.png")
    metadata(tmp_path, ("a.png", "x"), *[(f"{k}.png", "x") for k in range(20)], ("/elsewhere/a.png", "x"))
    data.ImageFolder(tmp_path, 8)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("21 of 22 rows found no image, or several; the first: '0.png', '1.png', '2.png'")


def test_the_last_of_two_captions_counts_with_a_warning_only_if_they_differ(tmp_path, capsys):
    images(tmp_path, "a.png", "b.png")
    metadata(tmp_path, ("a.png", "same"), ("./a.png", "same"), ("b.png", "first"), ("b.png", "last"))
    assert of(tmp_path) == {"a.png": "same", "b.png": "last"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 4 rows give an image another caption; the last one counts; the first: 'b.png'" in line


# ---- lists ----

def test_a_csv_is_read_too_and_lists_may_be_in_sub_folders(tmp_path):
    images(tmp_path, "cat/a.png", "dog/a.png", "dog/b.png")
    metadata(tmp_path, ("dog/b.png", "one, two"), ("cat/a.png", "a cat\nof two lines"), name="metadata.csv")
    metadata(tmp_path / "dog", ("a.png", "a dog"))
    assert of(tmp_path) == {"cat/a.png": "a cat\nof two lines", "dog/a.png": "a dog", "dog/b.png": "one, two"}
    assert data.ImageFolder(tmp_path, 8).left_out == {}


def test_jsonl_overrides_csv_and_the_text_column_overrides_caption(tmp_path):
    images(tmp_path, "a.png", "b.png")
    metadata(tmp_path, ("a.png", "of the csv"), ("b.png", "of the csv"), name="metadata.csv")
    row = {"caption": "of the column caption", "file_name": "a.png", "text": " of the column text\n"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert of(tmp_path) == {"a.png": "of the column text", "b.png": "of the csv"}


BROKEN = [
    '{"file_name": "a.png", "text": null}', '["a.png", "text"]', '"a.png"', "null", '{"text": "nameless"}',
    '{"file_name": 3, "text": "x"}', '{"file_name": "a.png", "text": ["x"]}', '{"file_name": "a.png", ',
    '{"file_name": "a.png", "text": "\\ud83d"}',
]


@pytest.mark.parametrize("row", BROKEN)
def test_a_broken_row_is_refused_with_file_and_line(tmp_path, row):
    images(tmp_path, "a.png")
    fine = '{"file_name": "a.png", "text": "fine"}'
    (tmp_path / "metadata.jsonl").write_text(f"{fine}\n\n{row}\n{fine}\n")
    with pytest.raises(ValueError, match="metadata.jsonl: line 3: .*; wanted text, or lines of {file_name"):
        data.ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("text, line", [
    ("file_name;text\na.png;x\n", 2), ("file_name,text\na.png,x\na.png\n", 3),
    ('file_name,text\na.png,"open\n', 2),
])
def test_a_broken_csv_is_refused_with_file_and_line(tmp_path, text, line):
    images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=f"metadata.csv: line {line}: "):
        data.ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("name, start", [("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n'),
                                         ("metadata.csv", "file_name,text\n"), ("a.txt", "two lines\n")])
@pytest.mark.parametrize("encoding, line", [("cp1252", 2), ("utf-16", 1), ("utf-16-le", 2)])
def test_an_encoding_other_than_utf_8_is_refused_with_file_and_line(tmp_path, name, start, encoding, line):
    images(tmp_path, "a.png")
    (tmp_path / name).write_text(f"{start}schön", encoding)
    with pytest.raises(ValueError, match=f"{name}: line {line}: .*save it as UTF-8"):
        data.ImageFolder(tmp_path, 8)
    (tmp_path / name).write_text("\ufefftext" if name == "a.txt" else f"\ufeff{start}", "utf-8")
    assert data.ImageFolder(tmp_path, 8).captions in ([["text"], ["x"], None])


def test_utf_16_of_plain_letters_is_recognised_by_its_zero_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("plain\nletters", "utf-16-le")
    with pytest.raises(ValueError, match="a.txt: line 1: a zero byte, as in UTF-16"):
        captions.read_text(tmp_path / "a.txt")


# ---- text files ----

def test_a_text_file_serves_all_images_of_its_name_and_an_empty_one_hides_no_caption(tmp_path):
    images(tmp_path, "a.png", "a.webp", "b.png")
    metadata(tmp_path, ("b.png", "of the list"))
    (tmp_path / "a.TXT").write_bytes(b"both\r\n")
    (tmp_path / "b.txt").write_text(" \n")
    assert of(tmp_path) == {"a.png": "both", "a.webp": "both", "b.png": "of the list"}


def test_text_files_without_an_image_are_counted_but_not_read(tmp_path):
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    for name in ("README.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    summary = data.ImageFolder(tmp_path, 8).summary()
    assert summary == "1 images without classes, 1 captions; left out: 2 .txt without an image"


def test_a_caption_file_that_cannot_be_opened_is_named(tmp_path):
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot read .*a.txt: No such file"):
        data.ImageFolder(tmp_path, 8)
