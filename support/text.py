"""Text conditioning: SD3.5's three encoders, the cache of their embeddings, and what a step takes from it.

    python sample.py text ENCODERS --out=out/text --data_dir=photos    # captions of a folder, or --prompts=

Prompts are encoded once (`cache_text`), into a folder of safetensors shards; training and sampling read the
shards (`TextCache`), so that T5 and the transformer never share a GPU. `Conditioner` gives a training step
what its model takes besides latent and time: labels, or text embeddings if the run's config has `text`.
Other models' encoders are in support/diffusers_text.py.
"""
import contextlib
import itertools
import json
import math
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from support import data, files, hub, identity, ranks, runs
from support.captions import read_text, shown
from support.config import field, shortened
from support.diffusers_text import PIPELINES, kind_of_pipeline
from support.measurements import run_folder
from support.pretrained import import_transformers, load_pretrained, load_tokenizer, variant_in, variant_of

# ---------------------------------------------------------------- conditions of a training step


def drop_labels(y, null, p):
    """Replace each label by `null` with probability p, so that the model also learns to do without one."""
    return torch.where(torch.rand(len(y), device=y.device) < p, null, y)


def say_if_other_classes(base, classes, count):
    """Warn if the base learned other classes, or in another order: labels are only numbers.

    count: the classes that the model has; released weights do not name theirs
    """
    trained = runs.checkpoints(run_folder(base)) if base else []
    if not trained:
        if base and max(1, len(classes)) != count:
            these = f"these are {files.some(classes, 20)}" if classes else "all these images are its first"
            tqdm.write(f"{base} knows {count} classes, without names; {these}: each class continues from the "
                       "one in its place")
        return
    known = runs.read_config(trained[-1]).get("classes") or []
    if classes and known and known[:len(classes)] != list(classes):
        tqdm.write(f"WARNING: {base} learned {files.some(known, 20)}; these images are "
                   f"{files.some(classes, 20)}: each class continues from the one in its place")


class Conditioner:
    """What a model takes after z_all and t, for images y: (labels,), or (tokens, pooled) of their captions.

    condition(y, drop): with probability `drop`, a label becomes the null class, or a caption "".
    cfg.text: a folder of shards, or of the encoders that make them; y are then image numbers, which find the
              captions. Empty: the model is class-conditional
    raises: SystemExit if text is wanted and the images have no captions, or embeddings have other widths than
    the model takes
    """

    def __init__(self, dit, train_set, cfg, device, rank):
        self.dit = dit
        self.device = device
        self.captions = train_set.captions
        self.near = deque(maxlen=2)        # {caption: embedding} of the batch at hand, and of the one after
        self.text = None
        if cfg.text:
            if not self.captions:
                raise SystemExit(f"{cfg.data_dir}: has no captions; wanted name.txt next to each image, or "
                                 "metadata.jsonl")
            self.text = text_for(cfg.text, self.captions, cfg.out, device, cfg.t5_tokens)
            self.text.need(["", *self.captions])
            self.text.check_widths(vars(dit.cfg))
        elif rank == 0:
            if self.captions:
                print(f"{cfg.out}: captions are not used: {type(dit).__name__} is conditioned on classes")
            say_if_other_classes(cfg.base, train_set.classes, dit.cfg.num_classes)

    @property
    def made_by(self):
        """Which encoders made the embeddings; None for a class-conditional model."""
        return self.text.made_by if self.text else None

    def __call__(self, y, drop):
        if self.text is None:
            return (drop_labels(y.to(self.device, non_blocking=True), self.dit.cfg.num_classes, drop),)
        dropped = torch.rand(len(y)) < drop
        captions = [self.captions[i] for i in y.tolist()]
        captions = ["" if hidden else caption for caption, hidden in zip(captions, dropped.tolist())]
        for near in self.near:
            if near.keys() >= set(captions):
                return tuple(torch.stack(rows).float() for rows in zip(*(near[c] for c in captions)))
        return self.text(captions)

    def ahead(self, batches):
        """The endless (z_all, y) of `latent_source`; meanwhile a thread reads what the next captions need.

        An SD3.5 caption has 2.7 MB. From pinned memory, a GPU copies them while Python goes on.
        """
        if self.text is None:
            yield from batches
            return

        def read(captions):
            found = self.text.read(captions)
            return [x.pin_memory() for x in found] if self.device.type == "cuda" else found

        def start(batch):
            captions = list({""} | {self.captions[i] for i in batch[1].tolist()})
            return batch, captions, pool.submit(read, captions)

        pool = ThreadPoolExecutor(1)
        try:
            for (batch, captions, reading), _ in itertools.pairwise(map(start, batches)):
                tokens, pooled = (x.to(self.device, non_blocking=True) for x in reading.result())
                self.near.append(dict(zip(captions, zip(tokens, pooled))))
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------- reading the cache


def text_for(folder, prompts, out, device, t5_tokens=256):
    """The TextCache that holds the prompts; if `folder` holds encoders, they fill <out>/text first.

    All ranks must call this.   folder: may also be the encoders' name on Hugging Face
    """
    folder = hub.local(folder, "text")
    if not (Path(folder) / "text_encoder").is_dir():
        return TextCache(folder, device, t5_tokens)
    shards = Path(out) / "text"
    cache_text(folder, prompts, shards, device, t5_tokens)
    return TextCache(shards, device, t5_tokens)


class TextCache:
    """The shards of a folder: cache(prompts) -> (tokens (B, T, W), pooled (B, P)), float32, on `device`.

    t5_tokens: how many the prompts must have been encoded with; None: any
    raises: SystemExit, with the command that helps, if the folder has no shards or lacks a prompt; also if a
    shard is incomplete, differs from the first in encoders or sizes, or has other t5_tokens
    """

    def __init__(self, folder, device="cpu", t5_tokens=None):
        self.folder = folder
        self.device = device
        self.made_by = None                                        # the encoders, in words
        self.header = {}                                           # of any shard, except its prompts
        self.rows = {}                                             # prompt: (its shard, its row there)
        sizes = {}
        for path in shards_of(folder):
            shard, header, prompts = open_shard(path)
            made_by = f"encoders {header.get('encoders')}, {header.get('t5_tokens')} T5 tokens"
            if self.made_by not in (None, made_by):
                raise SystemExit(f"{path}: made by {made_by}; the shards before it by {self.made_by}: give a "
                                 "folder with shards of one kind")
            if t5_tokens is not None and header.get("t5_tokens") != str(t5_tokens):
                raise SystemExit(f"{path}: made with {header.get('t5_tokens')} T5 tokens, now --t5_tokens="
                                 f"{t5_tokens}: give the former number, or encode again")
            self.made_by = made_by
            self.header = {name: value for name, value in header.items() if name != "prompts"}
            sizes[path.name] = [shard.get_slice(name).get_shape()[1:] for name in ("context", "pooled")]
            first = next(iter(sizes))
            if sizes[path.name] != sizes[first]:
                raise SystemExit(f"{path}: context and pooled are {sizes[path.name]}, those of {first} "
                                 f"{sizes[first]}; wanted shards of the same encoders, make them again")
            self.widths = {"context": sizes[first][0][-1], "pooled": sizes[first][1][-1]}
            for row, prompt in enumerate(prompts):
                self.rows[prompt] = (shard, row)
        if not self.rows:
            raise SystemExit(f"{folder or 'no folder given (--text=)'}: no text_*.safetensors here, and no "
                             "text_encoder/ to make them with; give another --text, or run: "
                             f"python sample.py text ENCODERS --out={folder or 'FOLDER'}")

    def need(self, prompts):
        """raises: SystemExit, with the command that helps, if any of the prompts is not here"""
        missing = [prompt for prompt in prompts if prompt not in self.rows]
        if missing:
            raise SystemExit(f"{self.folder}: has no embedding of {shortened(missing[0])} and "
                             f"{len(missing) - 1} more; add them with: python sample.py text ENCODERS "
                             f"--out={self.folder}, and --data_dir= (captioned images) or --prompts=")

    def check_widths(self, model):
        """raises: SystemExit if the embeddings have other widths than a transformer with this config"""
        for name, width in self.widths.items():
            wanted = model.get(name, width)                        # some models take no pooled vector
            if width != wanted:
                raise SystemExit(f"{self.folder}: {name} embeddings of width {width}; the transformer takes "
                                 f"{wanted}: give its own encoders, or shards made by them (--text=)")

    def keep(self, prompts, folder):
        """Copy the embeddings of these prompts into another folder, as one shard."""
        if Path(folder).resolve() != Path(self.folder).resolve():
            runs.make_folder(folder)
            write_shard(Path(folder) / "text_00000.safetensors", prompts, *self(prompts), self.header)

    def __call__(self, prompts):
        self.need(prompts)
        return tuple(x.to(self.device).float() for x in self.read(prompts))

    def read(self, prompts):
        """[tokens, pooled] of the prompts, on the CPU and in the type of the shards."""
        found = []
        for name in ("context", "pooled"):
            rows = []
            for prompt in prompts:
                shard, row = self.rows[prompt]
                rows.append(shard.get_slice(name)[row:row + 1])
            found.append(torch.cat(rows))
            extremes = torch.stack(found[-1].aminmax())            # NaN if any is: faster than to ask of each
            if not torch.isfinite(extremes).all():
                raise SystemExit(f"{self.folder}: the embedding of {prompts[0]!r} or of a prompt after it is "
                                 "not finite; remove the shards, and encode the prompts again")
        return found


def has(folder, prompts):
    """Does a folder have shards with embeddings of all these prompts?"""
    return bool(shards_of(folder)) and TextCache(folder).rows.keys() >= set(prompts)


def shards_of(folder):
    return sorted(Path(folder).glob("text_*.safetensors"))


def open_shard(path):
    """(the open file, its metadata, its prompts) of a shard.   raises: SystemExit if it is not a shard"""
    try:
        shard = safe_open(path, "pt")
        header = shard.metadata() or {}
        prompts = json.loads(header.get("prompts", "null"))
        rows = [shard.get_slice(name).get_shape()[:1] for name in ("context", "pooled")]
    except (OSError, ValueError, SafetensorError) as error:
        raise SystemExit(f"{path}: cannot be read as a shard of text embeddings ({error}); remove it and run "
                         "sample.py text again") from None
    if prompts is None or rows != [[len(prompts)]] * 2:
        raise SystemExit(f"{path}: has {rows[0]} and {rows[1]} embeddings of {len(prompts or [])} prompts; "
                         "wanted a shard that sample.py text wrote, remove this one")
    return shard, header, prompts


# ---------------------------------------------------------------- writing the cache


def cache_text(encoders, prompts, out, device, t5_tokens=256, batch_size=32, shard=1024):
    """Encode the prompts that the folder `out` lacks, and "", into text_00000.safetensors ...

    Each shard holds `context`, `pooled` and, as metadata, its prompts and encoders; if interrupted, this
    resumes with the shards that are not there. A second job that adds to the same folder waits for the first.
    All ranks must call this; they take turns at the shards.
    encoders: a diffusers folder with text encoders, SD3.5's or one of PIPELINES, or its name on Hugging Face
    shard:    prompts per file
    raises:   SystemExit if there are no encoders, if `out` was made by other ones or with other t5_tokens,
              or the disk is too small
    """
    encoders = hub.local(encoders, "text")
    if not encoders or not (Path(encoders) / "text_encoder").is_dir():
        given = f"{encoders}: has no text_encoder" if encoders else "no encoders given"
        raise SystemExit(f"{given}; wanted a diffusers folder with its text encoders, or its name on Hugging "
                         f"Face: python sample.py text ENCODERS --out={out}")
    made_by = {"encoders": fingerprint(encoders), "t5_tokens": str(t5_tokens)}
    rank, world = ranks.this_rank(), ranks.world_size()
    runs.make_folder(out)
    with files.one_job_at_a_time(out) if rank == 0 else contextlib.nullcontext():
        ranks.wait_for_all()                                       # until rank 0 has its turn
        known = cached_prompts(out, made_by)
        wanted = dict.fromkeys(["", *prompts])                     # each prompt once, in order
        todo = [prompt for prompt in wanted if prompt not in known]
        if not todo and rank == 0:
            print(f"{out}: holds all {len(known)} prompts already")
        size = max(1, min(shard, math.ceil(len(todo) / world)))
        chunks = {}                                                # number of a shard: its prompts
        for n, start in enumerate(range(0, len(todo), size), next_number(out)):
            chunks[n] = todo[start:start + size]
        mine = dict(list(chunks.items())[rank::world])
        ranks.must_agree(f"{out}, prompts to encode", len(todo))   # and all have seen what is missing

        if mine:
            encode = open_encoders(encoders, device, t5_tokens)
            if rank == 0:
                encode.say_what_is_cut(todo)
            write_shards(encode, mine, len(todo), out, made_by, batch_size)
        ranks.wait_for_all()                                       # until all have written


def write_shards(encode, chunks, count, out, made_by, batch_size):
    """Encode this rank's part, {number of a shard: prompts}, of `count` prompts.  made_by: their metadata"""
    rank = ranks.this_rank()
    title = f"encoding text to {out}"
    for i, (n, chunk) in enumerate(tqdm(chunks.items(), desc=title, mininterval=1, disable=rank > 0)):
        context, pooled = [], []
        for k in range(0, len(chunk), batch_size):
            tokens, vector = encode(chunk[k:k + batch_size])
            context.append(tokens.cpu())
            pooled.append(vector.cpu())
            if rank == 0 and i == 0 and k == 0:
                check_space(out, count, context[0][0].nbytes + pooled[0][0].nbytes)
        path = Path(out) / f"text_{n:05d}.safetensors"
        write_shard(path, chunk, torch.cat(context), torch.cat(pooled), made_by)


def write_shard(path, prompts, context, pooled, header):
    """Write a shard.   raises: SystemExit if the disk refuses it"""
    tensors = {"context": context.cpu(), "pooled": pooled.cpu()}
    header = {**header, "prompts": json.dumps(prompts)}
    with runs.disk_may_fail(must=True, what=path):
        files.save_whole(tensors, path, path.with_name(f"{path.name}.tmp"), header)


def next_number(out):
    """The number of the next shard: existing files are never overwritten."""
    names = [path.stem.removeprefix("text_") for path in shards_of(out)]
    return max([int(name) + 1 for name in names if name.isdecimal()], default=0)


def cached_prompts(out, made_by):
    """The prompts in the shards of a folder.   raises: SystemExit if other encoders made them"""
    known = set()
    for path in shards_of(out):
        _, header, prompts = open_shard(path)
        found = {name: header.get(name, "unknown") for name in made_by}
        if found != made_by:
            raise SystemExit(f"{path}: was made with {found['encoders']}, {found['t5_tokens']} T5 tokens; "
                             f"now {made_by['encoders']}, {made_by['t5_tokens']}: give another --out")
        known |= set(prompts)
    return known


def check_space(out, texts, bytes_of_first):
    """Print the cache's size, judging by its first text.   raises: SystemExit if the disk is too small"""
    size = bytes_of_first * texts
    free = shutil.disk_usage(out).free
    tqdm.write(f"{out}: {texts} prompts, {size / 1e9:.2f} GB; {free / 1e9:.0f} GB free")
    if size > free:
        raise SystemExit(f"{out}: too little space; give another --out, or fewer prompts")


def fingerprint(folder):
    """A digest of everything that turns text into embeddings; of several variants, only of the one loaded."""
    found = []
    for part in Path(folder).iterdir():
        if hub.TEXT_ENCODER.fullmatch(part.name) or part.name.startswith("tokenizer"):
            loaded = (None, variant_in(part))                      # None: settings and vocabularies
            found += [file for file in part.glob("*") if file.is_file() and variant_of(file.name) in loaded]
    return identity.of_files(sorted(found), folder)


# ---------------------------------------------------------------- the encoders


def open_encoders(folder, device, tokens):
    """encode(prompts) -> (context (B, T, W), pooled (B, P)), on `device`, with the encoders of a folder.

    raises: SystemExit if they are of a pipeline whose way with prompts is not known
    """
    kind = kind_of_pipeline(folder)
    if kind in PIPELINES:
        return PIPELINES[kind](folder, device, tokens)
    if kind and not kind.startswith("StableDiffusion3"):           # None: from a folder of encoders alone
        known = ", ".join(["StableDiffusion3Pipeline", *PIPELINES])
        raise SystemExit(f"{folder}: is a {kind}, which encodes prompts in another way; wanted {known}")
    return SD3Text(folder, device, tokens)


class SD3Text:
    """SD3.5's three encoders as one call."""

    def __init__(self, folder, device, t5_tokens):
        self.parts = load_text_encoders(folder, device)
        self.t5_tokens = t5_tokens

    def __call__(self, prompts):
        return encode_text(self.parts, prompts, self.t5_tokens)

    def say_what_is_cut(self, prompts):
        say_what_is_cut(self.parts, prompts, self.t5_tokens)


def load_text_encoders(folder, device):
    """[(tokenizer, encoder) of CLIP-L, CLIP-G and T5] of a diffusers folder; None if it was saved without T5.

    raises: SystemExit saying what is missing or broken: transformers, or a part of the folder
    """
    AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel = import_transformers(
        "AutoTokenizer", "CLIPTextModelWithProjection", "T5EncoderModel")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kinds = {"": CLIPTextModelWithProjection, "_2": CLIPTextModelWithProjection, "_3": T5EncoderModel}
    parts = []
    for suffix, kind in kinds.items():
        path = Path(folder) / f"text_encoder{suffix}"
        if path.is_dir():
            tokenizer = load_tokenizer(Path(folder) / f"tokenizer{suffix}", AutoTokenizer)
            encoder = load_pretrained(path, kind, "text encoder", dtype=dtype)
            parts.append((tokenizer, encoder.to(device).eval()))
        elif suffix == "_3" and not has_t5(folder):
            if ranks.this_rank() == 0:
                tqdm.write(f"{folder}: has no T5; zeros take the place of its tokens")
            parts.append(None)
        else:
            raise SystemExit(f"{folder}: has no {path.name}; wanted a diffusers SD3.5 folder with its text "
                             "encoders")
    return parts


def has_t5(folder):
    """Does a folder's model_index.json name a T5?  One saved without has [null, null] there."""
    index = Path(folder) / "model_index.json"
    named = files.read_json(index).get("text_encoder_3") if index.is_file() else None
    return bool(named and named[0])


@torch.no_grad()
def encode_text(encoders, prompts, t5_tokens=256, width=4096):
    """SD3's text conditioning: (context (B, 77 + t5_tokens, width), pooled (B, CLIP-L + CLIP-G)).

    context: 77 tokens [CLIP-L | CLIP-G | zeros] from the penultimate layer, then T5's tokens. The width is
    T5's; without T5 it is `width`, and zeros take the place of T5's tokens.
    """
    clip_l, clip_g, t5 = encoders

    # both CLIPs, side by side
    outputs = []
    for tokenizer, encoder in (clip_l, clip_g):
        ids = token_ids(tokenizer, prompts, tokenizer.model_max_length, encoder.device)
        outputs.append(encoder(ids, output_hidden_states=True))
    hidden = [output.hidden_states[-2] for output in outputs]                  # before the final norm
    clip = torch.cat(hidden, dim=-1)                                           # (B, 77, L + G)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)     # (B, L + G)

    # T5, below them
    if t5:
        tokenizer, encoder = t5
        tokens = encoder(token_ids(tokenizer, prompts, t5_tokens, encoder.device))[0]
    else:
        tokens = clip.new_zeros(len(clip), t5_tokens, width)                   # (B, t5_tokens, W)
    clip = F.pad(clip, (0, tokens.shape[-1] - clip.shape[-1]))                 # (B, 77, W)
    return torch.cat([clip, tokens], dim=1), pooled


def token_ids(tokenizer, prompts, length, device):
    """Token ids of the prompts, truncated or padded to `length`: (B, length)."""
    batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids.to(device)


def say_what_is_cut(parts, prompts, t5_tokens):
    """Count and name the prompts that are too long for CLIP or T5."""
    clip, _, t5 = parts
    limits = {"CLIP": (clip, clip[0].model_max_length), "T5": (t5, t5_tokens)}
    for name, (part, most) in limits.items():
        cut = []
        for prompt in prompts if part else []:
            length = len(part[0](prompt, verbose=False).input_ids)
            if length > most:
                cut.append(f"{prompt[:40]!r}... ({length})")
        if cut:
            more = ", ..." if len(cut) > 3 else ""
            tqdm.write(f"{len(cut)} of {len(prompts)} prompts are cut: {name} reads {most} tokens: "
                       f"{', '.join(cut[:3])}{more}")


# ---------------------------------------------------------------- sample.py text


@dataclass
class TextConfig:
    encoders: str = field("", "a diffusers folder of SD3.5 (text_encoder, _2, perhaps _3), klein or Sana")
    out: str = field("", "folder for the shards; an existing one is added to")
    data_dir: str = field("", "a folder of images with captions (name.txt, or metadata.jsonl)")
    prompts: str = field("", "prompts separated by |, or a file with one per line", text=True)
    t5_tokens: int = field(256, "tokens for T5 (or Qwen3, Gemma); the authors train with 512",
                           within=(1, 4096))
    batch_size: int = field(32, "prompts per forward pass", at_least=1)
    shard: int = field(1024, "prompts per file", at_least=1)
    device: str = field("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))


# A word with such an ending, or a path, is taken for a file name and not for a prompt.
ENDINGS = (".txt", ".text", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml")


def read_prompts(prompts):
    """The prompts in `a|b|c`, or the lines of a UTF-8 file of that name; [] for "".

    raises: SystemExit if there are none, or if this looks like a file that is missing or cannot be read
    """
    wanted = "wanted prompts separated by |, or a file with one per line"
    is_path = prompts.strip().startswith(("/", "./", "../", "~/"))
    if os.path.isfile(prompts):                                    # False, too, for an impossible file name
        try:
            texts = read_text(prompts).split("\n")
        except ValueError as error:
            raise SystemExit(f"--prompts: {error}") from None
    elif os.path.isdir(prompts) and "/" in prompts:
        raise SystemExit(f"--prompts={shown(prompts)}: is a folder; {wanted}")
    else:
        if os.path.isdir(prompts):
            print(f"--prompts={prompts}: is taken as a prompt; the folder of that name is not read")
        texts = prompts.split("|")
        for text in texts:
            if text.strip().lower().endswith(ENDINGS) and (is_path or len(text.split()) == 1):
                raise SystemExit(f"--prompts={shown(prompts)}: there is no file {text.strip()!r}; {wanted}")
            if text.encode(errors="ignore").decode() != text:
                raise SystemExit(f"--prompts={shown(prompts)}: is not UTF-8, which is required")
    texts = [text.strip() for text in texts if text.strip()]
    if prompts and not texts:
        raise SystemExit(f"--prompts={shown(prompts)}: holds no prompt; {wanted}")
    return texts


def main_text(cfg):
    """`sample.py text`: encode the captions of a folder and the given prompts."""
    rank, _, device = ranks.setup(cfg.device)
    captions = []
    if cfg.data_dir:
        images = data.open_dataset(cfg.data_dir, 64, 0, 0)
        if rank == 0:
            print(f"{cfg.data_dir}: {images.summary()}")
        captions = images.captions or []
        if not captions:
            raise SystemExit(f"{cfg.data_dir}: has no captions; wanted name.txt next to each image, or "
                             "metadata.jsonl or metadata.csv with them")
    if not cfg.out or not (captions or cfg.prompts):
        raise SystemExit("wanted --out= and captions: --data_dir= with name.txt files or metadata.jsonl, or "
                         "--prompts=")
    prompts = [*captions, *read_prompts(cfg.prompts)]
    cache_text(cfg.encoders, prompts, cfg.out, device, cfg.t5_tokens, cfg.batch_size, cfg.shard)
