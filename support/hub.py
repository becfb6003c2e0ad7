"""Weights by name: `org/name` on Hugging Face, wherever a file or folder of weights is accepted.

    --base=stabilityai/stable-diffusion-3.5-medium                  of a folder, the files that a load reads
    --base=hustvl/vavae-imagenet256-f16d32-dinov2/NAME.pt           one file, and what describes it
    --base=org/name@v1.0                                            a branch, a tag or a full commit hash

A path that exists on this disk is never a name. huggingface_hub does the downloads, with its cache (HF_HOME),
token (`hf auth login`, HF_TOKEN), offline mode (HF_HUB_OFFLINE=1) and address (HF_ENDPOINT). A repository may
hold 30 GB of which a load reads two files: `wanted` says which, before anything is fetched. Without a
network, files that an earlier load has fetched are found in the cache.
"""
import functools
import os
import re
import sys
from pathlib import Path

from support import files, ranks

NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^/@]+))?(/(?P<inside>.+))?")

# Small files that describe the weights next to them: diffusers' settings, VA-VAE's statistics, our checksums.
DESCRIBE = ("config.json", "latents_stats.pt", "SHA256SUMS")

TAEF2 = ("taef2_encoder.pth", "taef2_decoder.pth")             # one model in two files

# A pipeline's encoders. Not text_encoders/, where SD3.5's repository has the same ones again, for ComfyUI.
TEXT_ENCODER = re.compile(r"text_encoder(_\d+)?")


def is_name(source):
    """Is it a name on the hub?  Not if the path exists, or begins with a folder that does, or with out/.

    source: a path as it was given, or anything else that a load takes, such as a state dict
    """
    if not isinstance(source, str | os.PathLike):
        return False
    source = os.fspath(source)
    match = NAME.fullmatch(source)
    if match is None or os.path.exists(source):
        return False
    repo, inside = match["repo"], match["inside"]
    is_file = repo.rpartition(".")[2] in files.ENDINGS and not inside           # weights/model.pt, mistyped
    first = repo.split("/")[0]
    return not is_file and first != "out" and not os.path.lexists(first)


def local(source, part=""):
    """The local path of a source: the source itself, or for a name, its place in the cache.

    part: what is wanted of a diffusers pipeline: vae, transformer, or text (its encoders); or clip, a folder
          of transformers
    raises: SystemExit, one sentence, if it cannot be obtained
    """
    return fetch(os.fspath(source), part) if is_name(source) else source


@functools.cache                           # a run asks several times: to load, and for the identity
def fetch(source, part):
    """`local` for a name."""
    repo, revision, inside = NAME.fullmatch(source).group("repo", "revision", "inside")
    HfApi, snapshot_download, HTTPError = import_hub(source)
    try:
        sizes = {}
        for file in HfApi().model_info(repo, revision=revision, timeout=10, files_metadata=True).siblings:
            sizes[file.rfilename] = file.size or 0
        names, path = choose(source, list(sizes), inside or "", part)
        say(source, names, sizes, cached(repo, revision))
        return Path(snapshot_download(repo, revision=revision, allow_patterns=names)) / path
    except (HTTPError, OSError, ValueError) as error:
        reason, advice = what_failed(error, repo, revision)
    found = cached(repo, revision)
    if found is None:
        raise SystemExit(f"{source}: no such file or folder here; on the hub, {reason}: {advice}")
    if ranks.this_rank() == 0:
        print(f"{source}: taken from the cache; {reason}", file=sys.stderr)
    names = [path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()]
    _, path = choose(f"{source} (in the cache)", names, inside or "", part)
    return found / path


# ---------------------------------------------------------------- which files


def choose(source, names, inside, part):
    """`wanted`, with its ValueErrors turned into SystemExits that begin with the source."""
    try:
        return wanted(names, inside, part)
    except ValueError as error:
        raise SystemExit(f"{source}: {error}") from None


def wanted(names, inside="", part=""):
    """(the files to fetch, the file or folder that a load takes) out of all files of a repository.

    inside: a file or a folder of it; "": the repository itself.   part: see `local`
    Of a folder, only the weights that a load would take (support/files.py:weight_file): not the same ones in
    half precision, nor in another format; of a run of ours, those of its newest step.
    raises: ValueError saying what is there instead
    """
    if inside in names:
        return file_and_beside(names, inside), inside
    if inside and not any(name.startswith(f"{inside}/") for name in names):
        raise ValueError(f"there is no {inside} in it; name one of {files.some(sorted(names)) or 'no files'}")
    if part == "text":
        return text_files(names, inside), inside
    if part == "clip":
        small = [name for name in inside_of(names, inside) if name.endswith((".json", ".txt", ".model"))]
        return small + weights_of(names, inside), inside
    steps = {re.match(r"step_(\d+)/", name) for name in names} - {None}
    if steps and not inside:                                       # a run of ours
        newest = max(steps, key=lambda step: int(step[1]))[0].removesuffix("/")
        return weights_of(names, newest) + [name for name in names if name.startswith("frozen/")], inside
    own = "/".join(filter(None, (inside, part)))
    has_part = any(name.startswith(f"{own}/") for name in names)
    return weights_of(names, own if has_part else inside), inside


def inside_of(names, folder):
    """The files of a folder, without those in its sub-folders."""
    return [name for name in names if os.path.dirname(name) == folder]


def weights_of(names, folder):
    """The weights of a folder that a load would take, and what describes them."""
    beside = inside_of(names, folder)
    by_name = {os.path.basename(name): name for name in beside}
    describing = [by_name[name] for name in DESCRIBE if name in by_name]
    if "SHA256SUMS" in by_name:                                    # a checkpoint of ours: model and ema
        return describing + [name for name in beside if name.endswith(".safetensors")]
    if all(name in by_name for name in TAEF2):
        return describing + [by_name[name] for name in TAEF2]
    chosen, _ = files.one_model([Path(name) for name in beside])
    if chosen is None:
        folders = sorted({name.partition("/")[0] for name in names if "/" in name})
        raise ValueError(f"no weights in {folder or 'it'}, but {files.some(sorted(by_name)) or '-'}; "
                         f"its folders are {files.some(folders) or 'none'}")
    return describing + with_shards(beside, chosen.as_posix())


def file_and_beside(names, file):
    """A file, the other shards if it is one of several, and what describes it."""
    beside = inside_of(names, os.path.dirname(file))
    describing = [name for name in beside if os.path.basename(name) in DESCRIBE and name != file]
    index = file
    if files.is_shard(Path(file)):
        words = shard_words(file)
        for name in beside:
            if files.is_index(Path(name)) and shard_words(name) == words:
                index = name
    return describing + with_shards(beside, index)


def with_shards(beside, file):
    """A file, and if it is an index, the shards of its name."""
    if not files.is_index(Path(file)):
        return [file]
    return [file] + [name for name in beside
                     if files.is_shard(Path(name)) and shard_words(name) == shard_words(file)]


def shard_words(name):
    """The words that shards and their index share: {"model", "fp16", "safetensors"} of
    model.fp16-00001-of-00002.safetensors and of model.safetensors.index.fp16.json.
    """
    words = set(files.SHARD.sub("", os.path.basename(name)).split("."))
    return words - {"index", "json"}


def text_files(names, folder):
    """Tokenizers, weights and settings of each text encoder, and the file that names their pipeline."""
    start = f"{folder}/" if folder else ""
    fetch = [name for name in inside_of(names, folder) if name == f"{start}model_index.json"]
    parts = sorted({name.removeprefix(start).partition("/")[0] for name in names if name.startswith(start)})
    for part in parts:
        if TEXT_ENCODER.fullmatch(part):
            fetch += weights_of(names, start + part)
        elif part.startswith("tokenizer"):
            fetch += inside_of(names, start + part)
    if not any(TEXT_ENCODER.fullmatch(part) for part in parts):
        raise ValueError(f"there is no text_encoder; it has {files.some(parts) or 'no files'}")
    return fetch


# ---------------------------------------------------------------- the hub


def import_hub(source):
    """HfApi, snapshot_download and the base class of network errors.   raises: SystemExit"""
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        raise SystemExit(f"{source}: no such file or folder here; to fetch it by name from Hugging Face, "
                         f"pip install huggingface_hub ({error})") from None
    return HfApi, snapshot_download, HTTPError


def cached(repo, revision):
    """The folder with a repository's files in the hub's cache; None if there is none."""
    from huggingface_hub import constants
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    found = folder / "snapshots" / (commit or "none")
    return found if found.is_dir() else None


def say(source, names, sizes, there):
    """Print what will be downloaded, by rank 0."""
    missing = [name for name in names if there is None or not (there / name).exists()]
    if missing and ranks.this_rank() == 0:
        from huggingface_hub import constants
        size = sum(sizes[name] for name in missing) / 1e6
        print(f"{source}: fetches {files.some(missing)}, {size:,.1f} MB, to {constants.HF_HUB_CACHE}")


def what_failed(error, repo, revision):
    """(what went wrong, what to do), for a sentence."""
    from huggingface_hub import constants, errors
    page = f"{constants.ENDPOINT}/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (f"it is gated ({status})",
                f"agree to its terms on {page}, then run  hf auth login  or set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no branch, tag or commit {revision!r}", f"look at {page}"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (f"there is no {repo}, or you may not see it",
                "check the name; for a private one, run  hf auth login  or set HF_TOKEN")
    if status in (401, 403):
        return f"your token is refused ({status})", f"run  hf auth login  with one that may read {page}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking", "fetch it once without that, or give a local path"
    while error.__cause__ is not None:                             # the hub's own words are about its cache
        error = error.__cause__
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return f"{page} cannot be fetched ({reason})", "try again, or give a local path"
