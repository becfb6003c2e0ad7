"""support/text.py: SD3.5's text encoders against diffusers, the cache of their outputs, dropped labels."""

import builtins
import json
import os
import shutil
import threading

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from support import files, ranks, runs, text

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


def test_cached_text_equals_the_encoders_grows_and_is_never_mixed(sd3_folder, tmp_path, capsys):
    cpu, folder = torch.device("cpu"), tmp_path / "text"
    text.cache_text(sd3_folder, ["fox", "snow", "fox"], folder, cpu, t5_tokens=24, batch_size=2, shard=2)
    assert [p.stem for p in text.shards_of(folder)] == ["text_00000", "text_00001"]
    stamp = (folder / "text_00000.safetensors").stat().st_mtime_ns
    (folder / "text_00001.safetensors").unlink()  # as if interrupted
    text.cache_text(sd3_folder, ["fox", "snow", "owl"], folder, cpu, t5_tokens=24, batch_size=2, shard=2)
    assert (folder / "text_00000.safetensors").stat().st_mtime_ns == stamp
    cache = text.TextCache(folder)
    assert set(cache.rows) == {"", "fox", "snow", "owl"}
    encoders = text.load_text_encoders(sd3_folder, cpu)
    for ours, ref in zip(cache(["owl", "", "fox"]), text.encode_text(encoders, ["owl", "", "fox"], 24)):
        assert (ours - ref).abs().max() < 1e-6
    text.cache_text(sd3_folder, ["owl"], folder, cpu, t5_tokens=24)
    assert "holds all 4 prompts already" in capsys.readouterr().out
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


def test_no_shard_of_embeddings_is_ever_overwritten(sd3_folder, tmp_path):
    cpu = torch.device("cpu")
    text.cache_text(sd3_folder, ["fox", "snow"], tmp_path, cpu, t5_tokens=24, shard=1)
    (tmp_path / "text_00001.safetensors").unlink()
    text.cache_text(sd3_folder, ["fox", "snow", "owl"], tmp_path, cpu, t5_tokens=24, shard=1)
    assert [p.stem for p in text.shards_of(tmp_path)] == [f"text_{n:05d}" for n in (0, 2, 3, 4)]
    assert set(text.TextCache(tmp_path).rows) == {"", "fox", "snow", "owl"}


def test_fingerprints_depend_on_encoders_and_tokenizers_not_on_the_path(sd3_folder, tmp_path):
    before = text.fingerprint(sd3_folder)
    shutil.copytree(sd3_folder, tmp_path / "sd3", copy_function=shutil.copyfile)
    assert text.fingerprint(tmp_path / "sd3") == before
    shutil.rmtree(tmp_path / "sd3/transformer")                    # not used for text
    assert text.fingerprint(tmp_path / "sd3") == before
    for name in ("tokenizer_2/tokenizer.json", "text_encoder_3/config.json"):
        file = tmp_path / "sd3" / name
        file.write_text(file.read_text() + " ")
        assert text.fingerprint(tmp_path / "sd3") != before
        before = text.fingerprint(tmp_path / "sd3")


def test_a_whole_download_has_the_fingerprint_of_the_files_that_are_loaded(sd3_folder, tmp_path):
    shutil.copytree(sd3_folder, tmp_path / "sd3", copy_function=shutil.copyfile)
    spare = ["text_encoder/model.fp16.safetensors", "text_encoder_3/model.fp16-00001-of-00002.safetensors",
             "text_encoder_3/model.safetensors.index.fp16.json", "text_encoders/clip_l.safetensors"]
    for name in spare:
        (tmp_path / "sd3" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "sd3" / name).write_bytes(b"not read")
    assert text.fingerprint(tmp_path / "sd3") == text.fingerprint(sd3_folder)


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_encoders_saved_in_half_precision_alone_are_loaded(sd3_folder, tmp_path, size):
    shutil.copytree(sd3_folder, tmp_path / "sd3", ignore=shutil.ignore_patterns("transformer", "vae"))
    parts = text.load_text_encoders(sd3_folder, torch.device("cpu"))
    for suffix, (_, encoder) in zip(("", "_2", "_3"), parts):
        folder = tmp_path / f"sd3/text_encoder{suffix}"
        (folder / "model.safetensors").unlink()
        encoder.half().save_pretrained(folder, variant="fp16", max_shard_size=size)
        assert list(folder.glob("model.fp16*"))
    half = text.load_text_encoders(tmp_path / "sd3", torch.device("cpu"))
    for (_, encoder), (_, saved) in zip(half, parts):
        saved = saved.float().state_dict()
        assert all(torch.equal(weight, saved[name]) for name, weight in encoder.state_dict().items())


def test_two_processes_take_turns_at_the_shards_and_encode_as_one_does(sd3_folder, tmp_path, fork):
    prompts = [f"{n} foxes" for n in range(9)]
    flags = ["text", f"--encoders={sd3_folder}", "--t5_tokens=24", f"--out={tmp_path / 'two'}", "--shard=3",
             f"--prompts={'|'.join(prompts)}", "--device=cpu"]
    process = fork(f"""
import runpy, sys
sys.argv[1:] = {flags}
runpy.run_path({sample.__file__!r}, run_name="__main__")""", ranks=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    files = text.shards_of(tmp_path / "two")
    assert [path.stem for path in files] == [f"text_0000{n}" for n in range(4)]
    assert [len(text.open_shard(path)[2]) for path in files] == [3, 3, 3, 1]
    text.cache_text(sd3_folder, prompts, tmp_path / "one", torch.device("cpu"), t5_tokens=24)
    one, two = (text.TextCache(tmp_path / name)(["", *prompts]) for name in ("one", "two"))
    assert all((x - y).abs().max() < 1e-6 for x, y in zip(one, two))


def test_each_process_encodes_its_own_shards_however_few_the_prompts(sd3_folder, tmp_path, monkeypatch):
    cpu, written = torch.device("cpu"), {}
    for rank in range(3):
        monkeypatch.setattr(ranks, "this_rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "world_size", lambda: 3)
        text.cache_text(sd3_folder, ["fox", "owl", "snow"], tmp_path / str(rank), cpu, t5_tokens=24)
        for path in text.shards_of(tmp_path / str(rank)):
            written[path.stem] = text.open_shard(path)[2]
    assert written == {"text_00000": ["", "fox"], "text_00001": ["owl", "snow"]}


def test_text_is_encoded_only_if_the_disk_has_room(sd3_folder, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    free = (77 + 24) * 40 * 4 + 24 * 4                             # bytes of one text
    monkeypatch.setattr(text.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * free - 1))
    with pytest.raises(SystemExit, match="too little space; give another --out, or fewer prompts"):
        text.text_for(sd3_folder, ["fox"], tmp_path, cpu, 24)      # needs "" as well
    assert not list(tmp_path.glob("text/*.safetensors"))
    monkeypatch.setattr(text.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * free))
    text.text_for(sd3_folder, ["fox"], tmp_path, cpu, 24)          # one batch of both


def test_captions_of_a_folder_and_prompts_are_both_encoded(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    asked = []
    monkeypatch.setattr(text, "cache_text", lambda encoders, prompts, *rest: asked.append(prompts))
    text.main_text(text.TextConfig(encoders="e", out="o", data_dir=str(tmp_path), prompts="fox|owl"))
    assert asked == [["a caption", "fox", "owl"]]


@pytest.mark.parametrize("encoders, said", [
    ("", "no encoders given; wanted a diffusers folder with its text encoders, or its name on Hugging Face"),
    ("nowhere", "nowhere: has no text_encoder; wanted a diffusers folder"),
    ("photos", "photos: has no text_encoder; wanted a diffusers folder"),
])
def test_missing_encoders_are_named_before_a_folder_is_made(tmp_path, monkeypatch, encoders, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit, match=f"^{said}.*: python sample.py text ENCODERS --out=o$"):
        text.main_text(text.TextConfig(encoders=encoders, out="o", prompts="fox"))
    assert not (tmp_path / "o").exists()


def test_a_folder_with_neither_shards_nor_encoders_is_said_to_lack_both(tmp_path):
    said = f"{tmp_path}: no text_.*safetensors here, and no text_encoder/ .*; give another --text, or run: "
    with pytest.raises(SystemExit, match=said):
        text.text_for(str(tmp_path), ["a"], tmp_path / "out", "cpu")


def test_embeddings_of_another_width_than_the_model_takes_are_refused_with_both(tmp_path):
    shard(tmp_path, 0, prompts=["", "a"])                          # context of width 6, pooled of width 5
    cfg = SimpleNamespace(text=str(tmp_path), out="", t5_tokens=None)
    images = SimpleNamespace(captions=["a"])
    for takes, said in ((dict(context=6, pooled=5), ""), (dict(context=6), ""),
                        (dict(context=7, pooled=5), "context embeddings of width 6; the transformer takes 7"),
                        (dict(context=6, pooled=4), "pooled embeddings of width 5; the transformer takes 4")):
        dit = SimpleNamespace(cfg=SimpleNamespace(**takes))
        if not said:
            text.Conditioner(dit, images, cfg, torch.device("cpu"), 0)
            continue
        with pytest.raises(SystemExit, match=f"{said}: give its own encoders, or shards made by them"):
            text.Conditioner(dit, images, cfg, torch.device("cpu"), 0)


def test_kept_embeddings_are_the_same_and_say_who_made_them(tmp_path):
    made = shard(tmp_path, 0, prompts=["a", "b"], context=torch.randn(2, 8, 6), pooled=torch.randn(2, 5))
    cache = text.TextCache(tmp_path)
    cache.keep(["b"], tmp_path / "kept")
    kept = text.TextCache(tmp_path / "kept")
    assert list(kept.rows) == ["b"] and kept.made_by == cache.made_by
    assert all(torch.equal(x, y) for x, y in zip(kept(["b"]), cache(["b"])))
    assert text.has(tmp_path / "kept", ["b"]) and not text.has(tmp_path / "kept", ["a", "b"])
    assert not text.has(tmp_path / "nowhere", ["b"])
    before = made.read_bytes()
    cache.keep(["b"], tmp_path)                                    # they are there already
    assert made.read_bytes() == before


def test_two_jobs_that_encode_into_one_folder_take_turns(sd3_folder, tmp_path, monkeypatch, capsys):
    cpu, writing, second = torch.device("cpu"), threading.Event(), threading.Event()
    real = text.open_encoders

    def slow(*args):
        writing.set()
        assert second.wait(5)                                     # until the other job has found the lock
        return real(*args)

    def encode(prompts):
        text.cache_text(sd3_folder, prompts, tmp_path, cpu, t5_tokens=24)

    def said(line):
        if "another job is writing here; waiting" in line:
            second.set()

    monkeypatch.setattr(text, "open_encoders", slow)
    monkeypatch.setattr(files, "print", said, raising=False)
    first = threading.Thread(target=encode, args=(["fox"],))
    first.start()
    assert writing.wait(5)
    encode(["fox", "owl"])
    first.join()
    assert second.is_set() and len(text.shards_of(tmp_path)) == 2
    assert [text.open_shard(path)[2] for path in text.shards_of(tmp_path)] == [["", "fox"], ["owl"]]


def test_captions_in_a_batch_are_dropped_independently(tmp_path):
    shard(tmp_path, 0, prompts=["", "a"], context=torch.stack([torch.zeros(8, 6), torch.ones(8, 6)]))
    images = SimpleNamespace(captions=["a"] * 200)
    cfg = SimpleNamespace(text=str(tmp_path), out="", t5_tokens=None)
    condition = text.Conditioner(SimpleNamespace(cfg=SimpleNamespace()), images, cfg, torch.device("cpu"), 0)
    torch.manual_seed(0)
    tokens, _ = condition(torch.arange(200), 0.25)
    assert 120 < tokens[:, 0, 0].sum() < 180


def test_embeddings_are_read_a_step_ahead_and_are_the_same(tmp_path, monkeypatch):
    """Two batches later than what it trains on, as run.steps reads one ahead itself, nothing is read anew."""
    generator = torch.Generator().manual_seed(0)
    prompts = ["", *"abcdef"]
    shard(tmp_path, 0, prompts=prompts, context=torch.randn(7, 8, 6, generator=generator).bfloat16(),
          pooled=torch.randn(7, 5, generator=generator).bfloat16())
    images = SimpleNamespace(captions=list("abcdefabc"))
    cfg = SimpleNamespace(text=str(tmp_path), out="", t5_tokens=None)
    cpu, dit = torch.device("cpu"), SimpleNamespace(cfg=SimpleNamespace())
    plain, condition = (text.Conditioner(dit, images, cfg, cpu, 0) for _ in range(2))
    reads = []
    monkeypatch.setattr(condition.text, "read", lambda captions: reads.append(
        (threading.current_thread() is threading.main_thread(), set(captions))) or plain.text.read(captions))

    batches = [torch.tensor(y) for y in ([0, 1], [2, 2], [3, 7], [8, 5], [4, 0], [1, 1])]
    before = []
    for step, y in enumerate(y for _, y in condition.ahead((None, y) for y in batches)):
        before.append(y)
        if step > 0:
            for p in (0.0, 0.5):
                found = []
                for one in (condition, plain):
                    torch.manual_seed(step)
                    found.append(one(before[-2], p))
                assert all(map(torch.equal, *found)) and found[0][0].dtype == torch.float32
    wanted = ["ab", "c", "db", "cf", "ea", "b"]
    assert reads == [(False, {"", *captions}) for captions in wanted]

    assert all(map(torch.equal, condition(torch.tensor([3]), 0.0), plain(torch.tensor([3]), 0.0)))
    assert reads[-1] == (True, {"d"})                              # not near: read at once


def test_an_embedding_that_is_not_finite_ends_the_stream_with_its_sentence(tmp_path):
    shard(tmp_path, 0, prompts=["", "a"], context=torch.full((2, 8, 6), torch.nan))
    images = SimpleNamespace(captions=["a"])
    cfg = SimpleNamespace(text=str(tmp_path), out="", t5_tokens=None)
    condition = text.Conditioner(SimpleNamespace(cfg=SimpleNamespace()), images, cfg, torch.device("cpu"), 0)
    with pytest.raises(SystemExit, match="not finite; remove the shards"):
        next(condition.ahead((None, torch.tensor([0])) for _ in range(3)))


def test_a_conditioner_gives_labels_or_captions_and_can_drop_either(sd3_folder, tmp_path, capsys):
    dit = SimpleNamespace(cfg=SimpleNamespace(num_classes=7))
    words = ["a fox", "snow", "an owl"]

    class Images:
        captions = words
        labels = [5, 5, 5]
        classes = []

        def __len__(self):
            return 3

    y, cpu = torch.tensor([2, 0]), torch.device("cpu")
    by_class = text.Conditioner(dit, Images(), SimpleNamespace(text="", base="", out="run"), cpu, 0)
    assert "run: captions are not used: SimpleNamespace is conditioned on classes" in capsys.readouterr().out
    assert by_class(y, 0.0)[0].tolist() == [2, 0] and by_class(y, 1.0)[0].tolist() == [7, 7]

    images = Images()
    cfg = SimpleNamespace(text=str(sd3_folder), out=tmp_path, t5_tokens=24, data_dir="photos")
    by_text = text.Conditioner(dit, images, cfg, cpu, 0)
    wanted = text.TextCache(tmp_path / "text")
    for p, texts in ((0.0, ["an owl", "a fox"]), (1.0, ["", ""])):
        assert all(torch.equal(ours, ref) for ours, ref in zip(by_text(y, p), wanted(texts)))
    images.captions = None
    with pytest.raises(SystemExit, match="photos: has no captions"):
        text.Conditioner(dit, images, cfg, cpu, 0)

    cfg.text = str(tmp_path / "text")                              # a cache, to which nothing is added
    images.captions = [*words, "a caption of today"]
    with pytest.raises(SystemExit, match="no embedding of 'a caption of today' and 0 more"):
        text.Conditioner(dit, images, cfg, cpu, 0)


@pytest.mark.parametrize("classes,warned", [(["ant", "bee"], False), (["ant"], False), (["bee"], True),
                                            (["bee", "ant"], True)])
def test_a_base_trained_on_other_classes_is_reported_once(classes, warned, tmp_path, capsys):
    weights = {"model": {"w": torch.ones(1)}}
    runs.save_folder(tmp_path / "base/step_000001", weights, {"classes": ["ant", "bee"]})
    images = SimpleNamespace(captions=None, classes=classes)
    cfg = SimpleNamespace(text="", base=str(tmp_path / "base"))
    model = SimpleNamespace(cfg=SimpleNamespace(num_classes=2))
    text.Conditioner(model, images, cfg, torch.device("cpu"), 0)
    text.Conditioner(model, images, cfg, torch.device("cpu"), 1)
    said = capsys.readouterr()
    assert (said.out + said.err).count("learned ant, bee; these images are") == warned


@pytest.mark.parametrize("classes,said", [
    (["ant", "bee"], "knows 1000 classes, without names; these are ant, bee: each"),
    ([], "knows 1000 classes, without names; all these images are its first: each"),
    ([str(n) for n in range(1000)], None)])
def test_released_weights_with_more_classes_than_the_images_are_reported(classes, said, capsys):
    images = SimpleNamespace(captions=None, classes=classes)
    cfg = SimpleNamespace(text="", base="lightningdit.pt")
    model = SimpleNamespace(cfg=SimpleNamespace(num_classes=1000))
    text.Conditioner(model, images, cfg, torch.device("cpu"), 0)
    out, err = capsys.readouterr()
    assert (said in out + err) if said else not out + err


def test_prompts_are_read_from_a_line_or_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\n snow \n")
    assert (
        text.read_prompts(str(tmp_path / "prompts.txt"))
        == text.read_prompts("a fox| snow|")
        == ["a fox", "snow"]
    )
    with pytest.raises(SystemExit, match="wanted --out= and captions"):
        text.main_text(text.TextConfig(out=str(tmp_path)))


REAL = ["a" * 350, "a lighthouse at dusk, " * 20, "x/" * 300, "v1.0 robot", "a.i.", "node.js", "and/or",
        "a screenshot of notes.txt", "http://a.b/c", "a fox. a dog.", "a\0b", "two\nlines", "."]


@pytest.mark.parametrize("prompt", REAL)
def test_prompts_may_be_long_or_resemble_file_names(prompt):
    assert text.read_prompts(prompt) == [prompt.strip()]
    assert text.read_prompts(f"|{prompt}|| b|") == [prompt.strip(), "b"]


@pytest.mark.parametrize("prompt", ["prompt_list.txt", "prompts/list.txt", "LIST.TXT", "a.csv", "~/p.jsonl",
                                    "/home/me/my prompts.txt", "fox|prompt_list.txt"])
def test_a_missing_file_is_not_taken_as_a_prompt(prompt):
    with pytest.raises(SystemExit, match="there is no file '.*'; wanted prompts separated by |, or a file"):
        text.read_prompts(prompt)


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfa fox\n\nsnow\n", b"a fox\r\nsnow\r\n", b"a fox\rsnow",
                                 b"a fox\nsnow "])
def test_a_prompts_file_may_have_a_byte_order_mark_and_any_line_endings(tmp_path, raw):
    (tmp_path / "p").write_bytes(raw)
    assert text.read_prompts(str(tmp_path / "p")) == ["a fox", "snow"]


@pytest.mark.parametrize("encoding, line", [("cp1252", 2), ("utf-16", 1), ("utf-16-le", 1)])
def test_a_prompts_file_in_another_encoding_is_refused_with_the_line(tmp_path, encoding, line):
    (tmp_path / "p.txt").write_text("a fox\nein Füchslein" if line == 2 else "a fox", encoding)
    with pytest.raises(SystemExit, match=f"p.txt: line {line}: .*; wanted text, save it as UTF-8"):
        text.read_prompts(str(tmp_path / "p.txt"))


def test_empty_and_invalid_prompts_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text(" \n\n")
    for nothing in ("|", " ", " | ", str(tmp_path / "p.txt")):
        with pytest.raises(SystemExit, match="holds no prompt; wanted prompts separated by"):
            text.read_prompts(nothing)
    assert text.read_prompts("") == []
    with pytest.raises(SystemExit, match="is a folder; wanted prompts"):
        text.read_prompts(str(tmp_path))
    with pytest.raises(SystemExit, match="is not UTF-8"):
        text.read_prompts("\udcff fox")
    (tmp_path / "dog").mkdir()
    monkeypatch.chdir(tmp_path)
    assert text.read_prompts("dog") == ["dog"] and "the folder of that name" in capsys.readouterr().out


def test_prompts_too_long_for_the_encoders_are_counted_and_named(sd3_folder, tmp_path, capsys):
    encoders = text.load_text_encoders(sd3_folder, torch.device("cpu"))
    capsys.readouterr()
    text.say_what_is_cut(encoders, ["snow", "owl " * 30, "b" * 75], t5_tokens=500)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("1 of 3 prompts are cut: CLIP reads 77 tokens: 'owl owl owl ") and "(92)" in line
    text.say_what_is_cut([*encoders[:2], None], ["b" * 75], t5_tokens=5)         # 77 with start and end
    assert not capsys.readouterr().out
    text.say_what_is_cut(encoders, ["snow"] * 5, t5_tokens=4)
    assert "5 of 5 prompts are cut: T5 reads 4 tokens" in capsys.readouterr().out


# ---------------------------------------------------------------- broken parts


def without_transformers(monkeypatch, error):
    """Let every import of transformers raise an error."""
    found = builtins.__import__

    def refuse(name, *rest, **more):
        if name == "transformers":
            raise error
        return found(name, *rest, **more)
    monkeypatch.setattr(builtins, "__import__", refuse)


CAUSE = RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("error, said", [
    (ModuleNotFoundError("No module named 'transformers'", name="transformers"), "needs transformers: "),
    (ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers"), "cannot be .*'tokenizers'"),
    (CAUSE, "cannot be imported .*nms does not exist.*requirements.txt"),
    (OSError("libcudart.so.13: cannot open"), "cannot be imported .*libcudart"),
])
def test_import_errors_name_the_cause_or_the_missing_package(monkeypatch, tmp_path, error, said):
    without_transformers(monkeypatch, error)
    with pytest.raises(SystemExit, match=said):
        text.load_text_encoders(tmp_path, torch.device("cpu"))


def test_the_cause_beneath_a_transformers_error_is_named(monkeypatch, tmp_path):
    wrapped = ModuleNotFoundError("Could not import module 'CLIPTextModelWithProjection'")
    wrapped.__cause__ = CAUSE
    without_transformers(monkeypatch, wrapped)
    with pytest.raises(SystemExit, match="nms does not exist"):
        text.load_text_encoders(tmp_path, torch.device("cpu"))


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def lose_a_tensor(path):
    from safetensors.torch import load_file
    tensors = load_file(path)
    tensors.pop("text_model.final_layer_norm.weight")
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("change, name, said", [
    (shutil.rmtree, "tokenizer_2", "tokenizer_2: has no tokenizer"),
    (os.remove, "tokenizer/tokenizer.json", "tokenizer: has no tokenizer"),
    (os.remove, "tokenizer_3/tokenizer_config.json", "tokenizer_3: has no tokenizer"),
    (cut, "tokenizer_3/tokenizer.json", "tokenizer_3/tokenizer.json: is not JSON"),
    (os.remove, "text_encoder/model.safetensors", "text_encoder: this text encoder cannot be loaded"),
    (cut, "text_encoder_2/model.safetensors", "text_encoder_2: this text encoder cannot be loaded"),
    (cut, "text_encoder/config.json", "text_encoder: this text encoder cannot be loaded"),
    (lose_a_tensor, "text_encoder/model.safetensors", "lacks 1 tensors, the first text_model.final"),
    (shutil.rmtree, "text_encoder_2", "has no text_encoder_2; wanted a diffusers SD3.5 folder"),
    (shutil.rmtree, "text_encoder_3", "has no text_encoder_3; wanted a diffusers SD3.5 folder"),
])
def test_a_missing_or_broken_part_of_the_encoders_is_named(sd3_folder, tmp_path, change, name, said):
    shutil.copytree(sd3_folder, tmp_path / "sd3", ignore=shutil.ignore_patterns("transformer", "vae"))
    change(tmp_path / "sd3" / name)
    with pytest.raises(SystemExit, match=said):
        text.load_text_encoders(tmp_path / "sd3", torch.device("cpu"))


def test_a_pipeline_saved_without_t5_is_said_to_be(sd3_folder, tmp_path, capsys):
    from diffusers import StableDiffusion3Pipeline
    nothing = dict.fromkeys(("text_encoder_3", "tokenizer_3", "transformer", "vae"))
    StableDiffusion3Pipeline.from_pretrained(sd3_folder, **nothing).save_pretrained(tmp_path)
    assert text.load_text_encoders(tmp_path, torch.device("cpu"))[2] is None
    assert "has no T5; zeros take the place of its tokens" in capsys.readouterr().out


def shard(folder, n, prompts=("a", "b"), **changes):
    tensors = {"context": torch.zeros(2, 8, 6), "pooled": torch.zeros(2, 5), **changes}
    header = {} if prompts is None else {"prompts": json.dumps(prompts)}
    path = folder / f"text_{n:05d}.safetensors"
    save_file({name: x for name, x in tensors.items() if x is not None}, path, {"encoders": "e", **header})
    return path


@pytest.mark.parametrize("changes, said", [
    (dict(prompts=None), "embeddings of 0 prompts"),
    (dict(prompts=["a", "b", "c"]), "embeddings of 3 prompts"),
    (dict(pooled=None), "cannot be read as a shard of text emb"),
    (dict(pooled=torch.zeros(1, 5)), "embeddings of 2 prompts"),
    (dict(context=torch.zeros(())), "embeddings of 2 prompts"),
    (dict(context=torch.zeros(2, 9, 6)), r"\[\[9, 6\], \[5\]\], those of text_00000.* \[\[8, 6\], \[5\]\]"),
    (dict(pooled=torch.zeros(2, 7)), r"\[\[8, 6\], \[7\]\], those of text_00000"),
])
def test_an_incomplete_shard_or_one_of_another_width_is_named(tmp_path, changes, said):
    shard(tmp_path, 0)
    assert set(text.TextCache(tmp_path).rows) == {"a", "b"}
    shard(tmp_path, 1, **changes)
    with pytest.raises(SystemExit, match=f"text_00001.safetensors: .*{said}"):
        text.TextCache(tmp_path)


@pytest.mark.parametrize("bad", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_that_are_not_finite_are_refused(tmp_path, dtype, bad):
    context = torch.randn(2, 8, 6).to(dtype)
    context[1, 3, 2] = float(bad)
    shard(tmp_path, 0, context=context)
    cache = text.TextCache(tmp_path)
    tokens, _ = cache(["a"])
    assert torch.equal(tokens, context[:1].float()) and tokens.dtype == torch.float32
    with pytest.raises(SystemExit, match="the embedding of 'a' or of a prompt after it is not finite"):
        cache(["a", "b"])


def test_shards_of_other_encoders_or_token_counts_are_not_mixed(tmp_path):
    tensors = {"context": torch.zeros(1, 8, 6), "pooled": torch.zeros(1, 5)}
    for n, encoders in enumerate(("e", "other")):
        header = {"encoders": encoders, "t5_tokens": "24", "prompts": json.dumps([f"text {n}"])}
        save_file(tensors, tmp_path / f"text_{n:05d}.safetensors", header)
    with pytest.raises(SystemExit, match="text_00001.safetensors: made by encoders other, .* by encoders e,"):
        text.TextCache(tmp_path)
    (tmp_path / "text_00001.safetensors").unlink()
    assert text.TextCache(tmp_path, t5_tokens=24).made_by == "encoders e, 24 T5 tokens"
    with pytest.raises(SystemExit, match="made with 24 T5 tokens, now --t5_tokens=77"):
        text.TextCache(tmp_path, t5_tokens=77)


@pytest.mark.parametrize("length", [0, 50, -4])
def test_a_truncated_shard_is_named_before_it_is_read_or_added_to(tmp_path, length):
    shard(tmp_path, 0)
    path = shard(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SystemExit, match="text_00001.safetensors: cannot be read as a shard"):
        text.TextCache(tmp_path)
    with pytest.raises(SystemExit, match="text_00001.safetensors: cannot be read as a shard"):
        text.cached_prompts(tmp_path, {"encoders": "e"})


def test_a_renamed_shard_does_not_disturb_the_numbering_of_new_ones(tmp_path):
    shard(tmp_path, 7).with_name("text_old.safetensors").write_bytes(shard(tmp_path, 3).read_bytes())
    assert text.next_number(tmp_path) == 8


# ---------------------------------------------------------------- labels


def test_labels_are_dropped_to_the_null_class_at_the_given_rate():
    torch.manual_seed(0)
    y = text.drop_labels(torch.zeros(20_000).long(), 7, 0.1)
    assert set(y.tolist()) == {0, 7} and abs((y == 7).float().mean() - 0.1) < 0.01
    assert (text.drop_labels(y, 9, 0.0) == y).all()
