"""Models and tokenizers of transformers: imported on demand, and rejected if incomplete."""
import json
import re
from pathlib import Path

from safetensors import SafetensorError

from support import files
from support.captions import read_text
from support.metrics import import_torchvision

# What transformers and safetensors have been seen to raise on broken installations and folders.
LOADING_ERRORS = (
    ImportError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError,
)

# The names that transformers gives to weights, to shards of them, and to the index of these: the variant
# (fp16) comes before the ending of the former, and before that of the latter.
WEIGHTS = re.compile(r"(pytorch_)?model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(safetensors|bin)")
INDEX = re.compile(r"(pytorch_)?model\.(safetensors|bin)\.index(\.(?P<variant>\w+))?\.json")


def import_transformers(*names):
    """Classes of transformers.   raises: SystemExit with the cause"""
    try:
        import_torchvision()                       # because transformers will import it
        import transformers
        return [getattr(transformers, name) for name in names]     # transformers imports these lazily
    except LOADING_ERRORS as error:
        cause = error
    while cause.__cause__:                         # transformers wraps the cause in errors of its own
        cause = cause.__cause__
    if isinstance(cause, ModuleNotFoundError) and cause.name in ("torchvision", "transformers"):
        raise SystemExit(f"this needs {cause.name}: pip install {cause.name}")
    raise SystemExit(f"transformers cannot be imported ({first_line(cause)}); install the versions that "
                     "requirements.txt names")


def variant_of(name):
    """"fp16" for the name model.fp16.safetensors, "" for model.safetensors; None if it is not of weights."""
    match = WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)
    return match and (match["variant"] or "")


def variant_in(folder):
    """The variant that is loaded from a folder: "" if that is there, else the most precise one."""
    found = {variant_of(file.name) for file in Path(folder).glob("*")}
    return next((variant for variant in ("", *files.PRECISIONS) if variant in found), "")


def load_pretrained(path, kind, what, **options):
    """A model from a folder, by a class of transformers.   raises: SystemExit if it is incomplete

    what: what the error message calls it;  options: passed to `from_pretrained`
    """
    options["variant"] = variant_in(path) or None  # transformers would not take another by itself
    try:
        model, found = kind.from_pretrained(path, local_files_only=True, output_loading_info=True, **options)
    except LOADING_ERRORS as error:
        raise SystemExit(f"{path}: this {what} cannot be loaded ({first_line(error)})") from None
    missing = sorted(found["missing_keys"])
    if missing:                                    # transformers would only warn, and use random numbers
        raise SystemExit(f"{path}: this {what} lacks {len(missing)} tensors, the first {missing[0]}")
    return model


def load_tokenizer(path, AutoTokenizer):
    """The tokenizer in a folder.   raises: SystemExit if it is incomplete"""
    found = [name for name in ("tokenizer.json", "vocab.json", "spiece.model") if (path / name).is_file()]
    if not found or not (path / "tokenizer_config.json").is_file():        # transformers would do without
        raise SystemExit(f"{path}: has no tokenizer; wanted tokenizer_config.json there, and tokenizer.json, "
                         "vocab.json or spiece.model")
    for file in sorted(path.glob("*.json")):
        try:
            json.loads(read_text(file))            # transformers would not say which file is broken
        except ValueError as error:
            raise SystemExit(f"{file}: is not JSON ({error}); wanted the whole file") from None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except LOADING_ERRORS as error:
        raise SystemExit(f"{path}: this tokenizer cannot be loaded ({first_line(error)})") from None


def first_line(error):
    return f"{type(error).__name__}: {error}".split("\n")[0]
