"""Prompts as diffusers' pipelines encode them, for the transformers of support/diffusers_dit.py.

    python sample.py text FLUX.2-klein-base-4B --out=out/klein-text --data_dir=captioned --t5_tokens=512

Each pipeline has its own `encode_prompt`: what it puts around a prompt, which layers of the encoder it uses,
how it pads. It is called unchanged, with only the pipeline's tokenizer and encoder loaded; its output goes
into the cache of support/text.py, like SD3.5's.
"""
import contextlib
import inspect
from pathlib import Path

import torch
from tqdm import tqdm

from support.files import read_json
from support.metrics import import_torchvision
from support.pretrained import import_transformers, load_pretrained, load_tokenizer


def class_of(name):
    """A class of diffusers.   raises: SystemExit if diffusers is not installed, or older than the class"""
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()                       # because diffusers does, if there is one
    try:
        import diffusers
        return getattr(diffusers, name)
    except (ImportError, AttributeError, RuntimeError) as error:
        cause = str(error).strip().split("\n")[-1]
        raise SystemExit(f"wanted diffusers' {name}, which cannot be imported ({cause}): install "
                         "diffusers 0.42.1 or newer, pip install diffusers") from None


class PipelineText:
    """encode(prompts) -> (context (B, T, W), beside), as `DiffusersDiT.forward` takes them.

    tokens: T, how many the encoder reads of a prompt; longer ones are cut
    raises: SystemExit if diffusers is not installed, or if the folder's encoder or tokenizer cannot be loaded
    """
    theirs = ""                # the pipeline's class in diffusers

    def __init__(self, folder, device, tokens):
        self.device = device
        self.tokens = tokens
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        Pipeline = class_of(self.theirs)
        folder = Path(folder)
        index = read_json(folder / "model_index.json")
        if not all((index.get(name) or [None])[-1] for name in ("text_encoder", "tokenizer")):
            raise SystemExit(f"{folder}: its model_index.json names no text_encoder or no tokenizer")
        Encoder, Tokenizer = import_transformers(index["text_encoder"][-1], index["tokenizer"][-1])
        encoder = load_pretrained(folder / "text_encoder", Encoder, "text encoder", dtype=dtype)
        # diffusers would make do without its files: with no vocabulary, all prompts are the same
        tokenizer = load_tokenizer(folder / "tokenizer", Tokenizer)
        unused = dict(transformer=None, vae=None, scheduler=None)
        try:
            self.pipeline = Pipeline.from_pretrained(
                folder, text_encoder=encoder.eval(), tokenizer=tokenizer, dtype=dtype, local_files_only=True,
                **unused)
        except (OSError, ValueError) as error:
            cause = str(error).strip().split("\n")[0]
            raise SystemExit(f"{folder}: its text encoder cannot be loaded ({cause})") from None
        self.pipeline.to(device)

    def say_what_is_cut(self, prompts):
        """Count and name the prompts that are longer than the encoder reads."""
        cut = [f"{prompt[:40]!r}..." for prompt in prompts if self.length(prompt) > self.tokens]
        if cut:
            more = ", ..." if len(cut) > 3 else ""
            tqdm.write(f"{len(cut)} of {len(prompts)} prompts are cut: the encoder reads {self.tokens} "
                       f"tokens: {', '.join(cut[:3])}{more}")

    def length(self, prompt):
        return len(self.pipeline.tokenizer(prompt).input_ids)


class KleinText(PipelineText):
    """FLUX.2 klein's: three concatenated layers of Qwen3, on the prompt as a chat; padding counts as text."""
    theirs = "Flux2KleinPipeline"

    def __init__(self, folder, device, tokens):
        super().__init__(folder, device, tokens)
        if not self.pipeline.tokenizer.chat_template:
            raise SystemExit(f"{folder}/tokenizer: has no chat template; wanted chat_template.jinja, or "
                             "chat_template in tokenizer_config.json")

    @torch.no_grad()                                               # their encode_prompt leaves it to us
    def __call__(self, prompts):
        context, _ = self.pipeline.encode_prompt(prompts, self.device, max_sequence_length=self.tokens)
        return context, context.new_zeros(len(prompts), 1)         # the model does not read the latter

    def length(self, prompt):
        chat = [{"role": "user", "content": prompt}]
        return len(self.pipeline.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, enable_thinking=False, return_dict=False))


class SanaText(PipelineText):
    """Sana's: Gemma 2 on instructions and prompt, and which tokens are text; "" gets no instructions."""
    theirs = "SanaPipeline"

    @torch.no_grad()
    def __call__(self, prompts):
        call = inspect.signature(type(self.pipeline).__call__)
        instructions = call.parameters["complex_human_instruction"].default
        contexts, masks = [], []
        for prompt in prompts:
            context, mask, _, _ = self.pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, device=self.device,
                max_sequence_length=self.tokens,
                complex_human_instruction=instructions if prompt else None)
            contexts.append(context)
            masks.append(mask.to(context.dtype))
        return torch.cat(contexts), torch.cat(masks)


# the class in a pipeline's model_index.json -> what encodes its prompts
PIPELINES = {Text.theirs: Text for Text in (KleinText, SanaText)}


def kind_of_pipeline(folder):
    """The class in a folder's model_index.json; None if there is none."""
    index = Path(folder) / "model_index.json"
    return read_json(index).get("_class_name") if index.is_file() else None
