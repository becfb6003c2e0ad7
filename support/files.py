"""Weight files from anywhere, and what other programs put around the weights; no layer is known by name here.

    weight_file(path)      the file to load; for a folder, the one set of weights in it
    read(path)             its contents; for an index, those of all of its shards together
    read_json(path)        a config.json or an index, a dict
    read_rows(path)        the rows of a log.jsonl
    pick_weights(state)    the state dict in a checkpoint that holds more
    unwrapped(sd)          names without what DDP, torch.compile and the like add to them
    fill(module, sd)       load the weights into a module, strictly; all must be finite
    read_again(read, ...)  read(...), again a moment later if a network disk fails
    flush(path)            wait until a file that was written is on the disk
    renamed_when_whole(path)     where to write a file that is whole or absent, whatever other jobs do
    write_text(path, text)       a text file that is whole or absent
    save_whole(tensors, ...)     a safetensors file that is whole or absent
    replace_folder(a, b)   put folder b in the place of a; mend what a killed job left of that
    FolderLock(dir, new)   for one job alone; the folder goes with it if it stays empty
    one_job_at_a_time(dir) wait until no other job writes to a folder of caches

The first bytes of a file say what it is, whatever its name: safetensors or torch.save's. Pickles are
memory-mapped, and nothing in them runs. An error is one sentence: about a file, it begins with its name
(SystemExit); about a dict, it has no name (ValueError).
"""
import argparse
import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
import uuid
import zipfile
from pathlib import Path, PosixPath

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_flatten_with_path
from tqdm import tqdm

from support.ranks import this_rank

# ---------------------------------------------------------------- which file


ENDINGS = ("safetensors", "pt", "pth", "ckpt", "bin")

SHARD = re.compile(r"-\d{5}-of-(\d{5})")                # model-00001-of-00003.safetensors

# What training saves next to the weights; and VA-VAE's statistics of latents, which another function reads
BESIDE = re.compile(r"(optimizer|optim|opt|scheduler|lr_scheduler|scaler|sampler|random_states|rng_state"
                    r"|training_args|train_state|trainer_state|latents_stats)(?![a-z])|.*_optim_states\.")

FORBIDDEN = "this user may not read it; change its permissions, or those of the folders that it is in"

# Words in the names of variants of one model (diffusion_pytorch_model.fp16.safetensors), the best first;
# "" if the name says nothing
AVERAGES = ("ema", "", "non_ema")
PRECISIONS = ("fp32", "", "bf16", "fp16", "fp8")


def weight_file(path):
    """The file at `path`; the index of the shard at `path`; or the one set of weights in the folder `path`.

    Among variants of one model, it prefers the EMA, then the most precise, then safetensors, then a single
    file over shards, and says so.
    raises: SystemExit if there is nothing, or more than one model
    """
    try:
        if not path.exists():
            raise SystemExit(f"{path}: {absent(path)}")
        if not path.is_dir():
            return index_of(path) if is_shard(path) else path
        chosen, names = one_model(sorted(path.iterdir()))
    except PermissionError:
        raise SystemExit(f"{path}: {FORBIDDEN}") from None
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None
    if chosen is None:
        raise SystemExit(f"{path}: {without_weights(path)}")
    if len(names) > 1:
        print(f"{path}: takes {chosen.name} of {', '.join(names)}; to use another, name it")
    return weight_file(chosen)                                     # it may be a link to nothing


def one_model(inside):
    """(which of a folder's files to take, names of all variants of its model); (None, []) without weights.

    raises: ValueError if there is more than one model
    """
    found = {}                                                     # {model: [(rank, file)]}
    for file in inside:
        if is_weights(file) or is_index(file):
            model, rank = variant(file.name)
            found.setdefault(model, []).append((rank, file))
    if not found:
        return None, []
    variants = sorted(next(iter(found.values())))
    names = [file.name for files in found.values() for _, file in files]
    if len(found) > 1 or len(variants) > 1 and variants[0][0] == variants[1][0]:
        raise ValueError(f"holds {len(names)} weight files {names}; name the one you mean")
    return variants[0][1], names


def variant(name):
    """("diffusion_pytorch_model", rank) of diffusion_pytorch_model.fp16.safetensors: the lowest rank wins."""
    words = name.removeprefix("pytorch_").split(".")               # pytorch_model.bin is model.safetensors
    average = [word for word in words if word in AVERAGES]
    precision = [word for word in words if word in PRECISIONS]
    rank = (
        AVERAGES.index(average[0] if average else ""),
        PRECISIONS.index(precision[0] if precision else ""),
        "safetensors" not in words,
        "index" in words,
    )
    known = (*AVERAGES, *PRECISIONS, *ENDINGS, "index", "json")
    return ".".join(word for word in words if word not in known), rank


def is_weights(file):
    """Does its name say so?  It may be a broken link: that is reported when it is read."""
    named = file.name.rpartition(".")[2] in ENDINGS and not file.name.startswith(".")
    return named and not file.is_dir() and not is_shard(file) and not BESIDE.match(file.name)


def is_shard(file):
    many = SHARD.search(file.name)
    return bool(many) and int(many[1]) > 1 and not is_index(file)


def is_index(file):
    return file.name.endswith(".json") and ".index." in file.name and not file.name.startswith(".")


def index_of(shard):
    """The index next to a shard, which lists it."""
    for index in sorted(shard.parent.glob("*.index.*json")):
        if shard.name in weight_map(index).values():
            return index
    raise SystemExit(f"{shard}: one of several shards; wanted their *.index.json next to it, which lists "
                     "the weights in each of them")


def without_weights(folder):
    """Half a sentence about a folder without weight files."""
    inside = sorted(folder.iterdir())
    if not inside:
        return "an empty folder, wanted one with weights"
    shards = [file.name for file in inside if is_shard(file)]
    if shards:
        return f"holds the shards {some(shards)} without their *.index.json; wanted that, too"
    folders = [file.name for file in inside if file.is_dir()]
    if folders:
        return f"holds no weight file; its folders are {some(folders)}: give the one with the weights"
    return f"holds no weight file ({some(file.name for file in inside)}); wanted {endings()}"


def absent(path):
    """Half a sentence about a path that does not exist."""
    if path.is_symlink():
        return f"a link to {os.readlink(path)}, which does not exist; copy the file itself"
    if re.match(r"(https?|hf|s3|gs):/", str(path)):
        return "an address, wanted a local file or folder: download it first"
    return ("no such file or folder; give the path of weights, or their name on Hugging Face, org/name "
            "(docs/recipes.md has some)")


def endings():
    return ", ".join(f".{ending}" for ending in ENDINGS[:-1]) + f" or .{ENDINGS[-1]}"


def some(names, most=3):
    """The first of many names, for a sentence."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------- what it holds


# First bytes of other things that are found under a weight file's name
STRANGE = {
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself; run  git lfs pull  where it is",
    b"<": "a web page, not weights (an error, or a request to log in?); download it again",
    b"{": "JSON, not weights",
    b"GGUF": "a GGUF file of quantised weights, which are not read here; wanted floating point",
    b"\x89PNG": "a picture, not weights",
}

# What is known to be harmless in the settings and results that people save with their weights
HARMLESS = [argparse.Namespace, PosixPath, np.ndarray, np.dtype]
HARMLESS += [type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "uint8", "float32", "float64")]
for number in (np.float64(0), np.zeros(0)):
    make = number.__reduce__()[0]                                  # the function that a pickle calls for it
    for core in ("core", "_core"):                                 # in NumPy 1 and in NumPy 2
        HARMLESS.append((make, f"numpy.{core}.multiarray.{make.__name__}"))


# What torch, zipfile and safetensors raise for files with bytes that are missing or changed
DAMAGED = (EOFError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
           AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile, SafetensorError)


def read(path):
    """The contents of a weight file, on the CPU.   raises: SystemExit saying what is wrong with it"""
    if is_index(path):
        return read_shards(path)
    try:
        kind = kind_of(path)
        if kind == "safetensors":
            return load_file(path)
        if kind == "torch" and path.suffix == ".safetensors":      # torch.load goes by the name
            kind = "written by torch.save, not safetensors; rename it to end in .pt"
        if kind != "torch":
            raise SystemExit(f"{path}: {kind}")
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError:
        raise SystemExit(f"{path}: {FORBIDDEN}") from None
    except pickle.UnpicklingError:
        raise SystemExit(f"{path}: holds more than tensors (a pickle that may run code), or is damaged, and "
                         "is not opened; save its state dict as safetensors where it is trusted") from None
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SystemExit(f"{path}: not a whole {path.suffix} file ({reason}); copy it again") from None


def kind_of(path):
    """"safetensors", "torch", or half a sentence that says what else the file is."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return "an empty file; copy it again"
    if head[4:9] == b"\0\0\0\0{":                 # the header, after eight bytes for its length
        return "safetensors"
    if head.startswith(b"\x80"):
        return "torch"
    if head.startswith(b"PK\3\4"):
        return kind_of_archive(path)
    for first, what in STRANGE.items():
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(first):
            return what
    return f"neither safetensors nor a file of torch.save (it begins with {head[:8]}); wanted {endings()}"


def kind_of_archive(path):
    if not zipfile.is_zipfile(path):
        return "torch"                                             # cut off: torch will say so
    with zipfile.ZipFile(path) as archive:
        inside = {name.rpartition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in inside:
        return "a TorchScript program, not weights; save its state_dict() where it is trusted"
    if "data.pkl" not in inside:
        return "a zip archive, not weights; unpack it, and give the file inside"
    return "torch"


def read_shards(index):
    """One state dict of all the shards that an index names.

    raises: SystemExit naming a shard or a weight that is missing, or that the index does not name
    """
    place = weight_map(index)
    shards = sorted(set(place.values()))
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        raise SystemExit(f"{index}: lists {some(missing)}, not found next to it; download all its shards")
    family = {SHARD.sub("", shard) for shard in shards}
    beside = [file.name for file in index.parent.iterdir() if is_shard(file)]
    extra = [name for name in sorted(beside) if SHARD.sub("", name) in family and name not in shards]
    if extra:
        raise SystemExit(f"{index}: does not list {some(extra)} next to it; download shards and index again")
    state = {}
    for shard in shards:
        part = read(index.parent / shard)
        named = {name for name, file in place.items() if file == shard}
        for name in sorted(named ^ set(part)):
            verb = "lacks" if name in named else "holds"
            there = "names there" if name in named else "does not name there"
            raise SystemExit(f"{index.parent / shard}: {verb} {name}, which {index.name} {there}")
        state |= part
    return state


def weight_map(index):
    """{weight: shard} of an index.   raises: SystemExit if it is not one"""
    place = read_json(index).get("weight_map")
    if not isinstance(place, dict) or not place:
        raise SystemExit(f"{index}: has no weight_map of names and shards")
    for shard in place.values():
        if not isinstance(shard, str) or os.path.basename(shard) != shard:
            raise SystemExit(f"{index}: lists {shard!r}; wanted a file next to it")
    return place


def read_json(path):
    """The dict in a JSON file, with or without a byte order mark.   raises: SystemExit if there is none"""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except PermissionError:
        raise SystemExit(f"{path}: {FORBIDDEN}") from None
    except (OSError, ValueError) as error:                 # bad encoding and syntax: ValueErrors
        raise SystemExit(f"{path}: not a whole JSON file ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{path}: holds a {type(found).__name__}, wanted names and their values: {{...}}")
    return found


def read_rows(path):
    """The readable rows of a log.jsonl: a power cut leaves half a line, or NULs."""
    rows = []
    lines = Path(path).read_text(errors="replace").splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    if len(rows) < len(lines):
        tqdm.write(f"{path}: {len(lines) - len(rows)} damaged lines left out", file=sys.stderr)
    return rows


def check_diffusers_config(config, found):
    """raises: ValueError if a config.json contradicts `found`, what the weights show: {name in it: value}"""
    for name, value in found.items():
        if config.get(name, value) != value:
            raise ValueError(f"its config.json has {name}={config[name]!r}; wanted {value}, by its weights")


def refuse_not_finite(state, path):
    """raises: SystemExit naming the first tensor in a nested state that is not finite"""
    for place, x in tree_flatten_with_path(state)[0]:
        if isinstance(x, torch.Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
            name = ".".join(str(step).strip("[]'.") for step in place)
            raise SystemExit(f"{path}: {name} is not finite: the file is damaged, or training diverged")


# ---------------------------------------------------------------- the state dict in it


# The names under which checkpoints hold their weights: averaged, or as trained
HOLDERS = {
    "ema": ("ema", "params_ema", "ema_state_dict", "model_ema", "ema_model"),
    "model": ("model", "state_dict", "model_state_dict", "module", "generator", "params", "net"),
}


def pick_weights(state, weights=None, name="the checkpoint"):
    """The state dict in a checkpoint: the entry under a name of HOLDERS, or `state` itself.

    weights: "ema" or "model" to insist on one of them; None takes the EMA if there is one, and says so
    name:    what a printed line calls the checkpoint
    raises:  ValueError if there is none, or more than one of a kind
    """
    if not isinstance(state, dict):
        raise ValueError(f"holds one {type(state).__name__}, wanted a state dict")
    held = {kind: [key for key in HOLDERS[kind] if holds_tensors(state.get(key))] for kind in HOLDERS}
    for kind in [weights] if weights else HOLDERS:
        found = held[kind]
        if len(found) > 1:
            raise ValueError(f"holds weights under {' and '.join(found)}; wanted one: save it by itself")
        if found:
            if not weights and kind == "ema" and held["model"] and this_rank() == 0:
                print(f"{name}: takes {found[0]!r} of {', '.join(found + held['model'])}")
            return pick_weights(state[found[0]], name=name)
    if weights:
        raise ValueError(f"no {weights!r} weights in here, the file holds {some(state)}; to take what there "
                         "is, leave that open (finetune.py: --base_weights=)")
    strange = [name for name, weight in state.items()
               if not isinstance(name, str) or not isinstance(weight, torch.Tensor)]
    if strange:
        raise ValueError(f"holds {some(strange)}, not names of tensors; wanted a state dict")
    return state


def holds_tensors(x):
    """Is it a dict with a tensor in it, at any depth?"""
    if not isinstance(x, dict):
        return False
    return any(isinstance(value, torch.Tensor) or holds_tensors(value) for value in x.values())


WRAPPERS = {                 # components of names, in any place: what wrapped the module below them
    "module": "DistributedDataParallel, DataParallel, DeepSpeed",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}


def unwrapped(sd):
    """Names without WRAPPERS.   raises: ValueError if two of them become one"""
    found = {}
    for key, weight in sd.items():
        name = ".".join(word for word in key.split(".") if word not in WRAPPERS)
        if name in found:
            raise ValueError(f"it holds {name} twice, with and without a wrapper's name in it")
        found[name] = weight
    return found


# One-byte floats are taken as they are. Integers, and two floats packed into a byte, would mean nothing
# without scales and code of their own.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def check_types(sd):
    """raises: ValueError naming a weight that is not in floating point"""
    for name, weight in sd.items():
        if weight.dtype not in FLOATS:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(f"{name} is {kind} (quantised?); wanted weights in floating point")


# ---------------------------------------------------------------- into a module


def fill(module, sd):
    """Fill a module made on "meta" with copies of its weights, in float32 on the CPU.

    Each copy replaces its source in `sd`, one by one, so that a file is never in memory twice.
    raises: ValueError naming weights that are missing, left over, of another shape, or not finite, or buffers
            that no file holds
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in sd]
    unknown = [name for name in sd if name not in wanted]
    if missing:
        raise ValueError(f"not a whole checkpoint (it lacks {some(missing)})")
    if unknown:
        raise ValueError(f"it has layers that are not known here: {some(unknown)}")
    for name, like in wanted.items():
        sd[name] = own(name, sd[name], like)
    module.load_state_dict(sd, strict=True, assign=True)
    unmade = [name for name, buffer in module.named_buffers() if name not in wanted and buffer.is_meta]
    if unmade and not hasattr(module, "build_tables"):
        raise ValueError(f"{type(module).__name__} has buffers that are not saved, so nobody fills them: "
                         f"{some(unmade)}; give them persistent=True, or make them in build_tables(device)")


def own(name, weight, like):
    """A copy of a weight, of the shape that `like` has in the module, and float32 if that is a float."""
    if weight.shape != like.shape:
        raise ValueError(f"{name} is {tuple(weight.shape)}; wanted {tuple(like.shape)}, by the shapes of "
                         "other layers")
    if not like.is_floating_point():                               # a counter of BatchNorm
        return weight.to("cpu", like.dtype, copy=True)
    check_types({name: weight})
    if weight.is_meta:
        return weight
    weight = weight.to("cpu", torch.float32, copy=True)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} is not finite: the file is damaged, or training diverged")
    return weight


# ---------------------------------------------------------------- on the disk


UMASK = os.umask(0)                                # can only be read by setting it
os.umask(UMASK)

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)       # what a network disk says that fails for a moment
PAUSES = (1, 5)                                            # seconds, before the second attempt and the third


def read_again(read, *args):
    """read(*args), and up to two more times if it fails with one of PASSING; decoders' errors are none."""
    for pause in PAUSES:
        try:
            return read(*args)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(pause)
    return read(*args)


def flush(path):
    """Wait until a file is on the disk: renamed after that, it is whole or absent, even after a power cut.

    Others may read it as the umask says: safetensors makes files that only their owner can read.
    """
    os.chmod(path, 0o666 & ~UMASK)
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def renamed_when_whole(path):
    """A name next to `path` that no other job writes to; what the block wrote there is renamed to `path`.

    With one name for all, a job could rename what another has half written. Not the process id: in containers
    on two machines, both are often 1.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                      # a full disk needs its bytes


def write_text(path, text):
    """Write a text file next to `path` and rename it: it is whole or absent, even after a power cut."""
    with renamed_when_whole(path) as temporary, open(temporary, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def save_whole(tensors, path, temporary, header):
    """Write a safetensors file as `temporary`, then rename it: it is whole or absent after a power cut."""
    try:
        save_file(tensors, temporary, header)
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)                      # a full disk needs its bytes


# What our saves append to a folder's name, while they write it and while they replace it. Nobody else names
# folders like this, so a killed save's leftovers may be removed; a user's own copy.tmp or copy.old stays.
NEW = ".davae-new"
FORMER = ".davae-old"


def replace_folder(final, new):
    """Put the folder `new` in the place of `final`: whatever happens, one of the two exists; see `mend`."""
    aside = Path(f"{final}{FORMER}")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    os.replace(new, final)
    shutil.rmtree(aside, ignore_errors=True)


def mend(run):
    """Repair step folders that a killed job left half replaced."""
    for aside in Path(run).glob(f"step_*{FORMER}"):
        if aside.with_suffix("").exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.replace(aside.with_suffix(""))


class FolderLock:
    """A folder's .lock, held from `acquire` until `release`, or while this object lives.

    new: whether this job made the folder: if it then leaves nothing in it, as a refused command does, the
         folder goes too, while the lock is still held
    """

    def __init__(self, folder, new):
        self.folder = Path(folder)
        self.new = new
        self.lock = FileLock(self.folder / ".lock", blocking=False)

    def acquire(self):
        self.lock.acquire()

    def release(self):
        with contextlib.suppress(OSError):                     # it is gone, or another job uses it
            if self.new and self.lock.is_locked and os.listdir(self.folder) == [".lock"]:
                (self.folder / ".lock").unlink()
                self.folder.rmdir()
        self.lock.release()

    def __del__(self):
        self.release()


@contextlib.contextmanager
def one_job_at_a_time(folder):
    """While one job is in this block, another that comes to it with the same folder waits, and says so."""
    lock = FileLock(os.path.join(folder, ".lock"), mode=0o666)         # also for other users of the folder
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        print(f"{folder}: another job is writing here; waiting until it has finished")
        held = lock.acquire()
    with held:
        yield
