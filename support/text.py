"""text"""
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from support import data, ranks
from support.config import field


@dataclass
class TextConfig:
    encoders: str = field("", "a diffusers SD3.5 folder: text_encoder, _2 (CLIP) and _3 (T5; may be missing), and tokenizers")
    out: str = field("", "folder for the shards; one that is there is added to")
    data_dir: str = field("", "a folder of images with captions (name.txt, or metadata.jsonl)")
    prompts: str = field("", "texts separated by |, or a file with one a line")
    t5_tokens: int = field(256, "tokens given to T5; the authors train with 512")
    batch_size: int = field(32, "texts per forward pass")
    shard: int = field(1024, "texts per file")
    device: str = field("auto", "auto, cpu or cuda")


def read_prompts(prompts):
    """The texts of `a|b|c`, or the lines of a file of that name."""
    lines = Path(prompts).read_text("utf-8").splitlines() if prompts and Path(prompts).is_file() else prompts.split("|")
    return [line.strip() for line in lines if line.strip()]


def load_text_encoders(folder, device):
    """[(tokenizer, encoder) of CLIP-L, CLIP-G and T5] of a diffusers folder; None in place of a missing T5."""
    try:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
    except ImportError as error:
        raise SystemExit(f"encoding text needs transformers ({error}): pip install transformers") from None
    parts, dtype = [], torch.bfloat16 if device.type == "cuda" else torch.float32
    for suffix, kind in (("", CLIPTextModelWithProjection), ("_2", CLIPTextModelWithProjection), ("_3", T5EncoderModel)):
        path = Path(folder) / f"text_encoder{suffix}"
        if not path.is_dir() and suffix != "_3":
            raise SystemExit(f"{folder}: has no {path.name}; wanted a diffusers SD3.5 folder with its text encoders")
        parts.append((AutoTokenizer.from_pretrained(path.with_name(f"tokenizer{suffix}")),
                      kind.from_pretrained(path, dtype=dtype).to(device).eval()) if path.is_dir() else None)
    return parts


@torch.no_grad()
def encode_text(encoders, prompts, t5_tokens=256, width=4096):
    """SD3's text conditioning: (context (B, 77 + t5_tokens, width), pooled (B, CLIP-L + CLIP-G)).

    context: [CLIP-L | CLIP-G | zeros] of the last but one layer, then T5's tokens (zeros without T5); its width is T5's.
    """
    *clips, t5 = encoders

    def ids(tokenizer, length):
        batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return batch.input_ids.to(clips[0][1].device)

    outputs = [encoder(ids(tokenizer, tokenizer.model_max_length), output_hidden_states=True) for tokenizer, encoder in clips]
    clip = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)           # (B, 77, L + G), before the final norm
    tokens = t5[1](ids(t5[0], t5_tokens))[0] if t5 else clip.new_zeros(len(clip), t5_tokens, width)
    return (torch.cat([F.pad(clip, (0, tokens.shape[-1] - clip.shape[-1])), tokens], dim=1),
            torch.cat([o.text_embeds for o in outputs], dim=-1))


def fingerprint(folder):
    """Hash of the names, sizes and first megabytes of everything that turns text into embeddings."""
    digest = hashlib.sha256()
    for path in sorted(p for part in ("text_encoder*", "tokenizer*") for p in Path(folder).glob(f"{part}/*") if p.is_file()):
        with open(path, "rb") as f:
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}".encode() + f.read(1 << 20))
    return digest.hexdigest()[:16]


def cache_text(encoders, prompts, out, device, t5_tokens=256, batch_size=32, shard=1024):
    """Encode the prompts that the folder `out` lacks, and "", into text_00000.safetensors ...; says how large it will be.

    Each shard holds `context`, `pooled` and, as metadata, its prompts and what made it; a run that is cut off goes on after
    its last whole shard.   raises: SystemExit if `out` was made by other encoders or with another t5_tokens.
    """
    made_by = {"encoders": fingerprint(encoders), "t5_tokens": str(t5_tokens)}
    Path(out).mkdir(parents=True, exist_ok=True)
    shards, known = sorted(Path(out).glob("text_*.safetensors")), set()
    for path in shards:
        with safe_open(path, "pt") as f:
            header = f.metadata()
        if {k: header[k] for k in made_by} != made_by:
            raise SystemExit(f"{path}: was made with {header['encoders']}, {header['t5_tokens']} T5 tokens; now "
                             f"{made_by['encoders']}, {t5_tokens}: give another --out")
        known |= set(json.loads(header["prompts"]))
    todo = [p for p in dict.fromkeys(["", *prompts]) if p not in known]
    if not todo:
        print(f"{out}: holds all {len(known)} texts already")
        return
    parts = load_text_encoders(encoders, device)
    for n, k in enumerate(tqdm(range(0, len(todo), shard), desc=f"encoding text to {out}", mininterval=1), len(shards)):
        chunk, pieces = todo[k:k + shard], []
        for j in range(0, len(chunk), batch_size):
            pieces.append([x.cpu() for x in encode_text(parts, chunk[j:j + batch_size], t5_tokens)])
            if k == j == 0:
                size, free = sum(x[0].nbytes for x in pieces[0]) * len(todo), shutil.disk_usage(out).free
                tqdm.write(f"{out}: {len(todo)} texts, {size / 1e9:.2f} GB; {free / 1e9:.0f} GB are free")
                if size > free:
                    raise SystemExit(f"{out}: too little space; give another --out, or fewer texts")
        context, pooled = (torch.cat(x) for x in zip(*pieces))
        path = Path(out) / f"text_{n:05d}.safetensors"
        save_file({"context": context, "pooled": pooled}, f"{path}.tmp", {**made_by, "prompts": json.dumps(chunk)})
        Path(f"{path}.tmp").replace(path)


class TextCache:
    """The shards of a folder: cache(prompts) -> context (B, T, W), pooled (B, P), float32, on `device`."""

    def __init__(self, folder, device="cpu"):
        self.folder, self.device, self.rows = folder, device, {}
        for path in sorted(Path(folder).glob("text_*.safetensors")):
            f = safe_open(path, "pt")
            self.rows |= {prompt: (f, i) for i, prompt in enumerate(json.loads(f.metadata()["prompts"]))}
        if not self.rows:
            raise SystemExit(f"{folder or 'no folder given (--text=)'}: no text_*.safetensors here; make them with: "
                             f"python sample.py text ENCODERS --out={folder or 'FOLDER'}")

    def __call__(self, prompts):
        missing = [p for p in prompts if p not in self.rows]
        if missing:
            raise SystemExit(f"{self.folder}: has no embedding of {missing[0]!r} and {len(missing) - 1} more; add them with: "
                             f"python sample.py text ENCODERS --out={self.folder}")
        rows = [self.rows[p] for p in prompts]
        both = (torch.cat([f.get_slice(name)[i:i + 1] for f, i in rows]) for name in ("context", "pooled"))
        return tuple(x.float().to(self.device) for x in both)


def text_for(folder, prompts, out, rank, device, t5_tokens=256):
    """The TextCache that holds the prompts; if `folder` is one of encoders, they are encoded into <out>/text first."""
    if (Path(folder) / "text_encoder").is_dir():
        if rank == 0:
            cache_text(folder, prompts, Path(out) / "text", device, t5_tokens)
        ranks.wait_for_all()
        folder = Path(out) / "text"
    return TextCache(folder, device)


def drop_labels(y, null, p):
    """Each label becomes `null` with probability p, so that one model also learns the unconditional velocity."""
    return torch.where(torch.rand(len(y), device=y.device) < p, null, y)


class Conditioner:
    """What a model takes after z_all and t, given y: (labels,), or the text embeddings of the captions of images y.
    With probability p a label becomes the null class, a caption "". Makes a captioned data set's labels its image numbers."""

    def __init__(self, dit, train_set, cfg, device, rank):
        self.dit, self.captions, self.text = dit, train_set.captions, None
        if cfg.text:
            if not self.captions:
                raise SystemExit(f"{cfg.data_dir}: has no captions; wanted name.txt beside each image, or metadata.jsonl")
            train_set.labels = np.arange(len(train_set))
            self.text = text_for(cfg.text, self.captions, cfg.out, rank, device, cfg.t5_tokens)

    def __call__(self, y, p):
        if not self.text:
            return (drop_labels(y, self.dit.cfg.num_classes, p),)
        dropped = (torch.rand(len(y)) < p).tolist()
        return self.text(["" if drop else self.captions[i] for i, drop in zip(y.tolist(), dropped)])


def main_text(cfg):
    """`sample.py text`: encode the captions of a folder and the given prompts."""
    captions = (data.open_dataset(cfg.data_dir, 64, 0, 0).captions or []) if cfg.data_dir else []
    if not cfg.out or not (captions or cfg.prompts):
        raise SystemExit("wanted --out= and captions: --data_dir= with name.txt files or metadata.jsonl, or --prompts=")
    cache_text(cfg.encoders, [*captions, *read_prompts(cfg.prompts)], cfg.out, ranks.setup(cfg.device)[2], cfg.t5_tokens,
               cfg.batch_size, cfg.shard)
