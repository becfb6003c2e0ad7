"""From a dataclass to a command line: `script.py [preset] --field=value --other value`.

    @dataclass
    class Config:
        preset: str = field("tiny", "a name in PRESETS")
        lr: float = field(2e-4, "learning rate", at_least=0)
        distance: str = field("mse", "of the alignment", choices=("mse", "vf"))

    cfg = cli(Config, PRESETS)

The first field may be given without its name. A preset's values come first, so that flags change them.
A field's type is that of its default: str, int, float, bool or a tuple of whole numbers. Its declaration says
which values it takes; values from the command line or a preset are checked against it.
A comment on its own line above a field becomes a heading in --help.
"""
import dataclasses
import difflib
import inspect
import os
import re
import shlex
import sys

# Unless a field says otherwise, a number may be as large as this.
LARGEST = 1_000_000_000

# Limits of a path, in bytes: what file systems take, less what is appended to it (step_000100.davae-new/...).
LONGEST_NAME = 240
LONGEST_PATH = 3800

# What other programs call fields of ours; a script that lacks the field suggests the nearest names instead.
ELSEWHERE = {
    "cfg_scale": "cfg", "guidance_scale": "cfg", "ckpt": "run", "checkpoint": "run", "output_dir": "out",
    "learning_rate": "lr", "num_samples": "n", "num_steps": "steps", "num_inference_steps": "steps",
    "max_train_steps": "steps", "resolution": "image_size", "train_batch_size": "batch_size",
}
# Other programs' flags that nothing here replaces, and what to do instead.
INSTEAD = {
    "resume": "to go on with a run, give the same command again",
    "resume_from_checkpoint": "to go on with a run, give the same command again",
    "dry_run": "finetune.py has it: python finetune.py PRESET --dry_run=True",
}


def field(default, help, choices=(), at_least=-LARGEST, within=None, count=None, text=False):
    """A dataclass field with the line that --help prints, and the values that the command line takes for it.

    choices: the only values of a str
    at_least, within: the smallest number, or (smallest, largest); for a tuple, of each of its numbers
    count: (fewest, most) numbers of a tuple; None: any
    text: whether a str is free text; else it is a name, most often of a file or folder, and not as long
    """
    limits = {"range": within or (at_least, LARGEST), "count": count, "text": text}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices} | limits)


def cli(Config, presets=None, argv=None):
    """Fill the dataclass `Config` from the command line.

    presets: name -> {field: value}; the first field names one, whose values are applied before the flags
    returns it with two more attributes, sets of names: `given`, the fields set on the command line, and
    `changed`, those of them that are then not as in the preset
    raises: SystemExit with one sentence, and the nearest names, for an unknown field or preset, a missing
    value, or one that the field does not take
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        preset = "" if argv[0].startswith("-") else argv[0]
        try:
            print_help(Config, presets, preset)
            sys.stdout.flush()
        except BrokenPipeError:                                    # `--help | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)

    fields = {f.name: f for f in dataclasses.fields(Config)}
    first = next(iter(fields))
    values = {}
    if argv and not argv[0].startswith("-"):
        values[first] = argv.pop(0)
        check(fields[first], values[first], values[first])
    while argv:
        name, text = next_flag(argv, fields)
        values[name] = parse(fields[name], text)
        check(fields[name], values[name], text)

    given = set(values)
    usual = {}
    if presets is not None:
        preset = values.get(first, fields[first].default)
        if preset not in presets:
            raise SystemExit(f"no preset {shortened(preset)}{nearest(preset, presets)}; "
                             f"there are {', '.join(presets)}")
        for name, value in presets[preset].items():
            check(fields[name], value, show(value))
        usual = {first: preset, **presets[preset]}
    cfg = Config(**{**usual, **values})
    before = Config(**usual)
    cfg.given = given
    cfg.changed = {name for name in given if getattr(cfg, name) != getattr(before, name)}
    return cfg


def print_help(Config, presets, preset):
    """Print the script's docstring, every field with its value in the preset (or its default) and the values
    it takes, and the names of the presets.
    """
    fields = dataclasses.fields(Config)
    chosen = (presets or {}).get(preset, {})
    heads = headings(Config)
    print(sys.modules[Config.__module__].__doc__)
    print(f"usage: [{fields[0].name}] --field=value ...\n")
    for f in fields:
        if f.name in heads:
            print(f"\n{heads[f.name]}")
        taken = ", ".join(choice or "nothing" for choice in f.metadata["choices"]) or range_of(f)
        low, _, high = taken.rpartition(" to ")
        if low and float(high) >= LARGEST:
            taken = f"{low} or more"
        taken = f" [{taken}]" if taken else ""
        named = f is fields[0] and preset in (presets or {})
        value = preset if named else chosen.get(f.name, f.default)
        print(f"  --{f.name}={show(value)} ".ljust(34) + f.metadata["help"] + taken)
    if presets:
        print(f"\npresets: {', '.join(presets)}; PRESET --help shows the values of one")


def headings(Config):
    """{field: the comment on the line above it}, for fields that have one in the dataclass's source."""
    found = {}
    for kind in reversed([kind for kind in Config.__mro__[:-1] if "__annotations__" in vars(kind)]):
        lines = [line.strip() for line in inspect.getsource(kind).splitlines()]
        for above, line in zip(lines, lines[1:]):
            if above.startswith("# "):
                found[line.partition(":")[0]] = above.removeprefix("# ")
    return found


def next_flag(argv, fields):
    """Take `--name=text` or `--name text` off the front of argv: (name, text).

    raises: SystemExit if it is neither, or not the name of a field
    """
    flag = argv.pop(0)
    name, equals, text = flag.removeprefix("--").partition("=")
    if not flag.startswith("--"):
        raise SystemExit(f"{shortened(flag)} is not of the form --field=value; --help lists the fields")
    if name not in fields:
        raise SystemExit(unknown(name, fields))
    if equals:
        return name, text
    if not argv or argv[0].startswith("--"):
        raise SystemExit(f"{shortened(flag)} has no value: wanted {flag[:80]}=value; --help lists the fields")
    return name, argv.pop(0)


def unknown(name, fields):
    """The sentence about a flag that is not among the fields of a script."""
    plain = name.replace("-", "_")
    if plain in INSTEAD:
        return f"--{name} is not a field: {INSTEAD[plain]}"
    ours = ELSEWHERE.get(plain)
    meant = f" (did you mean {ours}?)" if ours in fields else nearest(name, fields)
    return f"--{name[:80]} is not a field{meant}; --help lists them all"


def nearest(name, names):
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def parse(field, text):
    """The value that `text` stands for in a field.   raises: SystemExit saying what was wanted"""
    kind = type(field.default)
    if field.metadata["choices"] and text not in field.metadata["choices"]:
        refuse(field, text)
    try:
        if kind is bool:
            return {"True": True, "False": False}[text]
        if kind is tuple:
            numbers = text.strip("()[] ").split(",")
            return tuple(int(n) for n in numbers if n.strip())
        return kind(text)
    except (KeyError, ValueError):
        refuse(field, text)


def check(field, value, text):
    """raises: SystemExit if a field does not take `value`, which has its type and was given as `text`"""
    if isinstance(value, str):
        check_str = check_text if field.metadata["text"] else check_name
        check_str(f"--{field.name}=", value)
        return
    low, high = field.metadata["range"]
    numbers = value
    if isinstance(value, tuple):
        fewest, most = field.metadata["count"] or (0, len(value))
        if not fewest <= len(value) <= most:
            refuse(field, text)
    else:
        numbers = (value,)
    if not all(low <= number <= high for number in numbers):       # nan is in no range
        refuse(field, text)


def check_name(given, value):
    """raises: SystemExit that begins with `given`, if a str cannot be the name of a file"""
    written = value.encode(errors="replace")
    if written.decode() != value or re.search("[\x00-\x1f\x7f]", value):
        raise SystemExit(f"{given}{shortened(value)}: wanted a name in UTF-8, without control characters")
    if len(written) > LONGEST_PATH or max(map(len, written.split(b"/"))) > LONGEST_NAME:
        raise SystemExit(f"{given}{shortened(value)}: wanted a path of at most {LONGEST_PATH} bytes, "
                         f"each name in it of at most {LONGEST_NAME}")


def check_text(given, value):
    """raises: SystemExit that begins with `given`, if a str is not text that can be saved"""
    if "\0" in value or value.encode(errors="replace").decode() != value:
        raise SystemExit(f"{given}{shortened(value)}: wanted text in UTF-8, without zero bytes")


def refuse(field, text):
    """raises: SystemExit saying what was given for a field, and what was wanted"""
    choices = field.metadata["choices"]
    if choices:
        wanted = " or ".join(choice or "nothing" for choice in choices) + nearest(text, choices)
    else:
        kinds = {bool: "True or False", int: "a whole number", float: "a number", tuple: "whole numbers"}
        wanted = kinds[type(field.default)]
        if range_of(field):
            wanted += f", {range_of(field)}"
        if isinstance(field.default, tuple):
            wanted += ", such as 1,2,4"
    raise SystemExit(f"--{field.name}={shortened(text)}: wanted {wanted}")


def range_of(field):
    """The range of a field's number, or numbers, as the command line takes them; "" of other types."""
    if type(field.default) not in (int, float, tuple):
        return ""
    low, high = field.metadata["range"]
    text = f"{low:_} to {high:_}"
    if field.metadata["count"]:
        fewest, most = field.metadata["count"]
        text = f"{fewest} to {most} of them, each {text}"
    return text


def shortened(text):
    """A text in quotes, cut to its first 80 characters for use in a sentence."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."


def show(value):
    """A value of a Config, or from JSON, as the command line takes it."""
    if isinstance(value, tuple | list):
        return ",".join(str(n) for n in value)
    return str(value)


def flags(cfg):
    """The flags that recreate a Config."""
    return [f"--{f.name}={show(getattr(cfg, f.name))}" for f in dataclasses.fields(cfg)]


def command(script, cfg, presets):
    """The command that recreates a Config of `script`: its preset, and the flags that differ from it."""
    usual = flags(type(cfg)(**{"preset": cfg.preset} | presets.get(cfg.preset, {})))
    changed = [flag for flag, before in zip(flags(cfg), usual) if flag != before]
    return shlex.join(["python", script, cfg.preset, *changed])
