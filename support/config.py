"""config"""
import dataclasses
import difflib
import sys


def cli(Config, presets=None, argv=None):
    """Fill the dataclass `Config` from `script.py [first field] --field=value ...`.
    With `presets` (name -> {field: value}) the first field names one, whose values are applied before the flags."""
    argv, fields = list(sys.argv[1:] if argv is None else argv), {f.name: f for f in dataclasses.fields(Config)}
    first = next(iter(fields))
    if "-h" in argv or "--help" in argv:
        print(f"{sys.modules[Config.__module__].__doc__}\nusage: [{first}] --field=value ...\n",
              *(f"  --{f.name}={f.default}".ljust(34) + f.metadata["help"] for f in fields.values()),
              f"\npresets: {', '.join(presets)}" if presets else "", sep="\n")
        raise SystemExit(0)
    values = {first: argv.pop(0)} if argv and not argv[0].startswith("-") else {}
    for arg in argv:
        name, eq, text = arg.removeprefix("--").partition("=")
        if not (arg.startswith("--") and eq):
            raise SystemExit(f"{arg!r} is not of the form --field=value; --help lists the fields")
        if name not in fields:
            raise SystemExit(f"--{name} is not a field{_nearest(name, fields)}; --help lists them all")
        values[name] = _parse(name, text, type(fields[name].default))
    if presets is None:
        return Config(**values)
    preset = values.get(first, fields[first].default)
    if preset not in presets:
        raise SystemExit(f"no preset {preset!r}{_nearest(preset, presets)}; there are {', '.join(presets)}")
    return Config(**{first: preset, **presets[preset], **values})


def _nearest(name, names):
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _parse(name, text, kind):
    special = {bool: {"True": True, "False": False}.__getitem__, tuple: lambda t: tuple(int(n) for n in t.split(",") if n)}
    try:
        return special.get(kind, kind)(text)
    except (KeyError, ValueError):
        wanted = {bool: "True or False", tuple: "whole numbers such as 1,2,4", int: "a whole number", float: "a number"}
        raise SystemExit(f"--{name}={text!r}: wanted {wanted[kind]}") from None


def field(default, help, choices=None):
    """A dataclass field with its one-line explanation, which --help prints."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})
