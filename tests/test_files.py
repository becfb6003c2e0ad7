"""support/files.py: which file is meant, what is wrong with an invalid one, and the state dict inside."""
import argparse
import contextlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support import files, runs

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(4), "c.bias": torch.zeros(1)}


def save(path, state=WEIGHTS):
    """Write a weight file in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


def save_shards(folder, name="model", ending="safetensors", variant=""):
    """WEIGHTS as two shards and their index, named as diffusers and transformers name them."""
    place = {}
    for i, keys in enumerate((["a.weight"], ["b.bias", "c.bias"]), 1):
        shard = f"{name}{variant}-{i:05}-of-00002.{ending}"
        save(folder / shard, {key: WEIGHTS[key] for key in keys})
        place |= dict.fromkeys(keys, shard)
    index = folder / f"{name}.{ending}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": place}))
    return index


def same(a, b=WEIGHTS):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def refused(path):
    """The error message for a file or folder that is refused."""
    with pytest.raises(SystemExit) as caught:
        runs.read_state_dict(path)
    sentence = str(caught.value)
    assert sentence.startswith(str(path)[:-1]) and "\n" not in sentence
    return sentence


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_weights_without_permission_to_read_them_are_not_called_damaged():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        folder = Path(folder)
        save(folder / "a.pt"), save(folder / "closed" / "a.pt")
        (folder / "config.json").write_text("{}")
        folder.chmod(0o755)                                        # pytest's own are closed to others
        for name in ("a.pt", "config.json", "closed"):
            (folder / name).chmod(0)
        if os.geteuid() == 0:                                      # root may read all
            stack.callback(os.seteuid, 0)
            os.seteuid(65534)
        for name in ("a.pt", "closed/a.pt", "closed"):
            assert refused(folder / name).endswith(f"{name}: {files.FORBIDDEN}")
        with pytest.raises(SystemExit, match="config.json: this user may not read it; change its perm"):
            files.read_json(folder / "config.json")
        stack.close()
        (folder / "closed").chmod(0o700)                           # so that it can be removed


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("name, ending", [
    ("diffusion_pytorch_model", "safetensors"),
    ("pytorch_model", "bin"),
    ("model", "safetensors"),
])
def test_a_folder_an_index_or_any_shard_gives_the_whole_state_dict(tmp_path, name, ending):
    index = save_shards(tmp_path, name, ending)
    for source in (tmp_path, index, *tmp_path.glob(f"*-of-*.{ending}")):
        assert same(runs.read_state_dict(source))


def test_shards_of_a_variant_are_read_with_its_index(tmp_path):
    index = save_shards(tmp_path, "diffusion_pytorch_model", variant=".fp16")
    assert index.name == "diffusion_pytorch_model.safetensors.index.fp16.json"
    for source in (tmp_path, tmp_path / "diffusion_pytorch_model.fp16-00002-of-00002.safetensors"):
        assert same(runs.read_state_dict(source))


def test_mismatches_between_shards_and_index_are_named(tmp_path):
    index = save_shards(tmp_path)
    first, second = sorted(tmp_path.glob("model-*"))
    place = json.loads(index.read_text())["weight_map"]

    def sentence(**changes):
        index.write_text(json.dumps({"weight_map": place | changes}))
        return refused(tmp_path)

    assert f"{second}: lacks d.bias, which {index.name} names there" in sentence(**{"d.bias": second.name})
    assert f"{first}: lacks b.bias" in sentence(**{"b.bias": first.name})
    assert f"{index}: lists model-00003-of-00003.safetensors, not found" in sentence(
        d="model-00003-of-00003.safetensors")
    assert "lists '../model.safetensors'; wanted a file next to it" in sentence(d="../model.safetensors")
    del place["c.bias"]
    assert f"{second}: holds c.bias, which {index.name} does not name there" in sentence()


def test_a_missing_or_extra_shard_or_a_missing_index_is_named(tmp_path):
    index = save_shards(tmp_path)
    extra = tmp_path / "model-00003-of-00003.safetensors"
    save(extra)
    assert f"{index}: does not list {extra.name} next to it" in refused(tmp_path)
    assert f"{extra}: one of several shards; wanted their *.index.json" in refused(extra)
    extra.unlink()
    first, second = sorted(tmp_path.glob("model-*"))
    index.rename(tmp_path / "elsewhere.json")
    assert f"holds the shards {first.name}, {second.name} without their *.index.json" in refused(tmp_path)
    (tmp_path / "elsewhere.json").rename(index)
    first.unlink()
    assert f"{index}: lists {first.name}, not found next to it" in refused(index)


@pytest.mark.parametrize("text, said", [
    ("", "not a whole JSON file"),
    ("[]", "holds a list"),
    ("{}", "has no weight_map"),
    ('{"weight_map": {"a": 3}}', "lists 3; wanted a file next to it"),
])
def test_an_invalid_index_is_refused(tmp_path, text, said):
    index = save_shards(tmp_path)
    index.write_text(text)
    assert said in refused(index)


# ---------------------------------------------------------------- one of several files


@pytest.mark.parametrize("names", [
    # the first should be taken
    ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
    ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"],
    ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"],
    ["model.ema.safetensors", "model.safetensors", "model.fp16.safetensors"],
    ["model.fp32.safetensors", "model.bf16.safetensors"],
    ["model.bf16.safetensors", "model.fp16.safetensors"],
    ["model.bin", "model.fp16.safetensors"],
    ["model.safetensors", "pytorch_model.bin"],
    ["vavae.safetensors", "vavae.pt"],
])
def test_the_best_variant_of_a_model_is_taken_and_named(tmp_path, capsys, names):
    for name in names:
        save(tmp_path / name, {"which": torch.full((1,), float(name == names[0]))})
    assert runs.read_state_dict(tmp_path)["which"] == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"takes {names[0]}" in said and all(name in said for name in names)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.non_ema.bin", "a-00001-of-00001.bin"])
def test_a_lone_variant_is_taken_silently(tmp_path, capsys, name):
    save(tmp_path / name)
    assert same(runs.read_state_dict(tmp_path))
    assert capsys.readouterr().out == ""


def test_a_single_file_is_preferred_to_shards(tmp_path, capsys):
    save_shards(tmp_path, "model", variant=".fp16")
    save(tmp_path / "model.safetensors", {"whole": torch.ones(1)})
    assert runs.read_state_dict(tmp_path).keys() == {"whole"}
    assert "takes model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("names", [
    ["vae.safetensors", "transformer.safetensors"],
    ["0080000.pt", "0160000.pt"],
    ["model.pt", "model.ckpt"],
    ["model.safetensors", "model.fp16.safetensors", "pytorch_lora_weights.safetensors"],
])
def test_several_models_in_a_folder_are_refused(tmp_path, names):
    for name in names:
        save(tmp_path / name)
    sentence = refused(tmp_path)
    assert f"holds {len(names)} weight files" in sentence and "name the one you mean" in sentence
    assert all(name in sentence for name in names)


@pytest.mark.parametrize("leftover", [
    "optimizer.pt", "optimizer.bin", "optimizer_1.bin", "scheduler.pt", "scheduler.bin", "scaler.pt",
    "sampler.bin", "random_states_0.pkl", "rng_state.pth", "rng_state_0.pth", "training_args.bin",
    "train_state.pt", "latents_stats.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "._model.safetensors", "model.safetensors.tmp",
])
def test_other_training_files_next_to_the_weights_are_ignored(tmp_path, leftover):
    save(tmp_path / "anything.pt")
    torch.save({}, tmp_path / leftover)
    (tmp_path / "optimizer.safetensors").mkdir()                   # a folder is not a file, whatever its name
    assert same(runs.read_state_dict(tmp_path))
    (tmp_path / "anything.pt").rename(tmp_path / "schedulers.pt")             # a name that a model may have
    assert same(runs.read_state_dict(tmp_path))


# ---------------------------------------------------------------- paths without weights


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "an empty folder" in refused(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"1")
    assert "holds no weight file (optimizer.pt)" in refused(tmp_path)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "refs").mkdir()
    assert "its folders are refs, snapshots: give the one with the weights" in refused(tmp_path)


def test_a_broken_link_is_distinguished_from_a_missing_file(tmp_path):
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "blobs" / "123")
    assert refused(tmp_path) == refused(link) == (
        f"{link}: a link to {tmp_path}/blobs/123, which does not exist; copy the file itself")
    assert refused(tmp_path / "other.pt").startswith(f"{tmp_path}/other.pt: no such file or folder; give ")


def test_a_url_is_not_a_path():
    for address in ("https://huggingface.co/org/model/resolve/main/model.safetensors", "hf://org/model"):
        assert "an address, wanted a local file" in refused(Path(address))


def archive(*names):
    """A zip file in bytes."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return memory.getvalue()


@pytest.mark.parametrize("content, said", [
    (b"", "an empty file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 335306212\n", "git lfs pull"),
    (b"<!DOCTYPE html>\n<html>Sign in</html>", "a web page"),
    (b"\xef\xbb\xbf\n <html></html>", "a web page"),
    (b'{"error":"Repository not found"}', "JSON, not weights"),
    (b'{"code":{"a":1}}', "JSON, not weights"),
    (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture"),
    (b"GGUF\3\0\0\0" + bytes(50), "quantised"),
    (bytes(1000), "neither safetensors nor a file of torch.save"),
    (archive("readme.txt"), "a zip archive"),
    (archive("m/data.pkl", "m/constants.pkl"), "a TorchScript program"),
])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "picture.png", "config.json"])
def test_a_file_of_another_kind_is_identified_by_its_contents(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    assert said in refused(file)
    if file.suffix in (".safetensors", ".pt"):
        assert said in refused(tmp_path)


def test_a_misnamed_file_is_read_by_its_contents_or_must_be_renamed(tmp_path):
    for written, named in (("a.safetensors", "a.ckpt"), ("a.safetensors", "a.bin"), ("a.pt", "a.pth.tar")):
        save(tmp_path / written)
        (tmp_path / written).rename(tmp_path / named)
        assert same(runs.read_state_dict(tmp_path / named))
    (tmp_path / "a.ckpt").unlink()
    torch.save(WEIGHTS, tmp_path / "a.safetensors")                # torch.load goes by the name and fails
    assert "written by torch.save, not safetensors; rename it" in refused(tmp_path / "a.safetensors")


def test_a_buffer_that_no_file_holds_is_named_unless_the_module_makes_it():
    class Model(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("table", torch.ones(3), persistent=False)

    with torch.device("meta"):
        model = Model()
    sd = torch.nn.Linear(2, 2).state_dict()
    with pytest.raises(ValueError, match="Model has buffers that are not saved.* table; give them"):
        files.fill(model, dict(sd))
    Model.build_tables = lambda self, device: None
    files.fill(model, sd)


def test_a_file_damaged_anywhere_loads_or_is_refused_in_one_sentence(tmp_path):
    file = tmp_path / "model.pt"
    for zipped in (True, False):
        torch.save(WEIGHTS, file, _use_new_zipfile_serialization=zipped)
        whole = file.read_bytes()
        for at in range(4, len(whole), max(1, len(whole) // 60)):
            for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:]):
                file.write_bytes(content)
                try:
                    runs.read_state_dict(file)                     # some bytes do not matter or are numbers
                except SystemExit as error:
                    assert str(error).startswith(f"{file}: ") and "\n" not in str(error)


@pytest.mark.parametrize("beside", [
    argparse.Namespace(lr=1e-4, sizes=[1, 2]), np.float32(0.5), np.arange(3), {"loss": [np.float64(1)]},
    Path("out/a"),
])
def test_harmless_objects_next_to_the_weights_are_accepted(tmp_path, beside):
    save(tmp_path / "last.pt", {"model": WEIGHTS, "beside": beside})
    assert same(files.pick_weights(runs.read_state_dict(tmp_path)))


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("content, said", [
    (b"", "not a whole JSON file"),
    (b'{"a": 1', "not a whole JSON file"),
    (b"model: 3", "not a whole JSON file"),
    ('{"a": "\xe9"}'.encode("utf-16"), "not a whole JSON file"),
    (b"[1, 2]", "holds a list"),
    (b"3", "holds a int"),
])
def test_a_json_file_without_settings_is_named(tmp_path, content, said):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=said) as caught:
        files.read_json(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "config.json") == {"a": 1}


# ---------------------------------------------------------------- the state dict inside


OTHER = {"a.weight": torch.zeros(1)}


@pytest.mark.parametrize("name", ["ema", "params_ema", "model", "state_dict", "model_state_dict", "module",
                                  "generator", "params"])
def test_weights_are_found_under_the_usual_names(name):
    assert files.pick_weights({name: WEIGHTS, "optimizer": {"state": {0: OTHER}}, "step": 3}) is WEIGHTS
    assert files.pick_weights({"checkpoint": 1, name: {"state_dict": WEIGHTS}}) is WEIGHTS


def test_the_ema_is_taken_unless_the_trained_weights_are_requested_and_the_choice_is_printed(capsys):
    for ema, model in (("ema", "model"), ("params_ema", "params"), ("ema", "state_dict")):
        state = {model: OTHER, ema: WEIGHTS}
        assert files.pick_weights(state, name="a.pt") is WEIGHTS
        assert capsys.readouterr().out == f"a.pt: takes {ema!r} of {ema}, {model}\n"
        assert files.pick_weights(state, "model") is OTHER
        assert files.pick_weights({"step": 1, ema: WEIGHTS}) is WEIGHTS
        assert capsys.readouterr().out == ""                       # as requested; no choice
    with pytest.raises(ValueError, match="no 'ema' weights in here, the file holds model"):
        files.pick_weights({"model": OTHER}, "ema")


@pytest.mark.parametrize("state, said", [
    ({"model": WEIGHTS, "generator": OTHER}, "holds weights under model and generator; wanted one"),
    ({"ema": WEIGHTS, "params_ema": OTHER}, "holds weights under ema and params_ema; wanted one"),
    ({"params": WEIGHTS, "state_dict": OTHER}, "holds weights under state_dict and params; wanted one"),
    ({"a.weight": torch.ones(1), "epoch": 3}, "holds epoch, not names of tensors"),
    ({0: torch.ones(1)}, "holds 0, not names of tensors"),
    ({"vae": WEIGHTS}, "holds vae, not names of tensors"),
    ([WEIGHTS], "holds one list"),
])
def test_a_checkpoint_with_ambiguous_or_invalid_weights_is_refused(state, said):
    with pytest.raises(ValueError, match=said):
        files.pick_weights(state)


def test_settings_under_a_weights_name_are_not_taken_for_weights():
    assert files.pick_weights({"model": {"depth": 3, "widths": [1]}, "state_dict": WEIGHTS}) is WEIGHTS


@pytest.mark.parametrize("name", [
    "module.blocks.0.x", "_orig_mod.module.blocks.0.x", "blocks.0._orig_mod.x",
    "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.x",
    "blocks._orig_mod.0.module.x",
])
def test_wrapper_names_are_removed_wherever_they_occur(name):
    assert files.unwrapped({name: 1, "modules.x": 2}) == {"blocks.0.x": 1, "modules.x": 2}


def test_a_weight_with_and_without_a_wrapper_is_refused():
    with pytest.raises(ValueError, match="it holds a.b twice"):
        files.unwrapped({"a.b": 1, "a._orig_mod.b": 2})


def test_public_checkpoints_contain_no_wrapper_names(full_size):
    words = {word for names in full_size.values() for name in names for word in name.split(".")}
    assert len(words) > 100 and not words & set(files.WRAPPERS)


# ---------------------------------------------------------------- into a module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                                   torch.float8_e5m2])
def test_floats_of_every_size_are_copied_to_float32(dtype):
    sd = {"weight": torch.tensor([[0.5, -2.0]]).to(dtype), "bias": torch.tensor([1.0])}
    given = dict(sd)
    with torch.device("meta"):
        module = torch.nn.Linear(2, 1)
    files.fill(module, dict(sd))
    assert module.weight.dtype == torch.float32 and module.weight.tolist() == [[0.5, -2.0]]
    module.bias.data.zero_()
    assert given["bias"] == 1


@pytest.mark.parametrize("weight, said", [
    (torch.ones(1, 2, dtype=torch.int8), "weight is int8 .quantised"),
    (torch.ones(1, 2, dtype=torch.uint8), "weight is uint8"),
    (torch.ones(1, 2, dtype=torch.int64), "weight is int64"),
    (torch.ones(1, 2, dtype=torch.bool), "weight is bool"),
    (torch.ones(1, 2, dtype=torch.complex64), "weight is complex64"),
    (torch.tensor([[1.0, float("nan")]]), "weight is not finite"),
    (torch.tensor([[float("inf"), 1.0]]).half(), "weight is not finite"),
    (torch.tensor([[1e300, 1.0]], dtype=torch.float64), "weight is not finite"),
    (torch.tensor([[float("nan"), 1.0]]).to(torch.float8_e4m3fn), "weight is not finite"),
    (torch.ones(2, 1), r"weight is \(2, 1\); wanted \(1, 2\)"),
])
def test_a_weight_of_the_wrong_type_shape_or_value_is_named(weight, said):
    with torch.device("meta"):
        module = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=said):
        files.fill(module, {"weight": weight, "bias": torch.ones(1)})


def test_counters_stay_integers():
    module = torch.nn.BatchNorm2d(3)
    files.fill(module, module.state_dict() | {"num_batches_tracked": torch.tensor(2**40)})
    assert module.num_batches_tracked.item() == 2**40 and module.num_batches_tracked.dtype == torch.int64


def test_a_non_finite_tensor_in_a_nested_state_is_named(tmp_path):
    state = {"opt": {"state": {3: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.tensor([1, float("inf")])}}}}
    files.refuse_not_finite(state | {"opt": [torch.ones(1)], "rng": torch.ones(1, dtype=torch.uint8)}, "file")
    with pytest.raises(SystemExit, match="train_state.pt: opt.state.3.exp_avg_sq is not finite"):
        files.refuse_not_finite(state, "train_state.pt")
