"""From a dataclass to a command line: `script.py [preset] --field=value --other value`.

    @dataclass
    class Config:
        preset: str = field("tiny", "a name in PRESETS")
        lr: float = field(2e-4, "learning rate")
        distance: str = field("mse", "of the alignment", choices=("mse", "vf"))

    cfg = cli(Config, PRESETS)

The first field may be given without its name. A preset's values come first, so that flags change them.
A field's type is that of its default: str, int, float, bool or a tuple of whole numbers.
"""
import dataclasses
import difflib
import sys


def field(default, help, choices=()):
    """A dataclass field with the line that --help prints, and the `choices` that the command line takes."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def cli(Config, presets=None, argv=None):
    """Fill the dataclass `Config` from the command line.

    presets: name -> {field: value}; the first field names one, whose values are applied before the flags
    raises: SystemExit with one sentence, and the nearest names, for what is no field, no preset or no value
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print_help(Config, presets)
        raise SystemExit(0)

    fields = {f.name: f for f in dataclasses.fields(Config)}
    first = next(iter(fields))
    values = {}
    if argv and not argv[0].startswith("-"):
        values[first] = argv.pop(0)
    while argv:
        name, text = next_flag(argv)
        if name not in fields:
            raise SystemExit(f"--{name} is not a field{nearest(name, fields)}; --help lists them all")
        values[name] = parse(fields[name], text)

    if presets is None:
        return Config(**values)
    preset = values.get(first, fields[first].default)
    if preset not in presets:
        raise SystemExit(f"no preset {preset!r}{nearest(preset, presets)}; there are {', '.join(presets)}")
    return Config(**{first: preset, **presets[preset], **values})


def print_help(Config, presets):
    """The script's docstring, every field with its default, the presets."""
    fields = dataclasses.fields(Config)
    print(sys.modules[Config.__module__].__doc__)
    print(f"usage: [{fields[0].name}] --field=value ...\n")
    for f in fields:
        choices = f" [{', '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        print(f"  --{f.name}={show(f.default)}".ljust(34) + f.metadata["help"] + choices)
    if presets:
        print(f"\npresets: {', '.join(presets)}")


def next_flag(argv):
    """Take `--name=text` or `--name text` off the front of argv: (name, text)."""
    flag = argv.pop(0)
    name, equals, text = flag.removeprefix("--").partition("=")
    if not flag.startswith("--"):
        raise SystemExit(f"{flag!r} is not of the form --field=value; --help lists the fields")
    if equals:
        return name, text
    if not argv or argv[0].startswith("--"):
        raise SystemExit(f"{flag!r} has no value: wanted {flag}=value; --help lists the fields")
    return name, argv.pop(0)


def nearest(name, names):
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def parse(field, text):
    """The value that `text` means for a field.   raises: SystemExit saying what was wanted"""
    kind = type(field.default)
    choices = field.metadata["choices"]
    wanted = {bool: "True or False", int: "a whole number", float: "a number", tuple: "numbers such as 1,2,4"}
    if choices and text not in choices:
        raise SystemExit(f"--{field.name}={text!r}: wanted {' or '.join(choices)}{nearest(text, choices)}")
    try:
        if kind is bool:
            return {"True": True, "False": False}[text]
        if kind is tuple:
            numbers = text.strip("()[] ").split(",")
            return tuple(int(n) for n in numbers if n.strip())
        return kind(text)
    except (KeyError, ValueError):
        raise SystemExit(f"--{field.name}={text!r}: wanted {wanted[kind]}") from None


def show(value):
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(str(n) for n in value)
    return str(value)


def flags(cfg):
    """A Config as the flags that make it again."""
    return [f"--{f.name}={show(getattr(cfg, f.name))}" for f in dataclasses.fields(cfg)]
