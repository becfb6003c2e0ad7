"""metrics.json, the list of a run's measurements; and the comparison of two runs side by side.

An entry is {"settings": everything that the numbers depend on, "reconstruction": {row: {metric: number}},
"generation": likewise, if samples were drawn}.
"""
import itertools
import json
import math
import os
import re
import tempfile
from pathlib import Path

from filelock import FileLock

from support import config, runs

# ---------------------------------------------------------------- of which run and checkpoint


def run_folder(path):
    """The run that a step folder belongs to; a run folder itself."""
    path = Path(path)
    return path.parent if re.fullmatch(r"step_\d+", path.name) else path


def state_of(checkpoint):
    """SHA-256 of a checkpoint's SHA256SUMS, which changes if that step is retrained; None if missing."""
    sums = checkpoint / "SHA256SUMS"
    return runs.sha256(sums) if sums.exists() else None


# ---------------------------------------------------------------- of which images


def davae_settings(own):
    """The settings that the VAE of a run of finetune.py was trained with; `own` if they are not known.

    own: the "config" in the run's config.json; for a run of train_vae.py, these are the VAE's own settings
    """
    trained = runs.checkpoints(run_folder(own["vae"])) if own.get("vae") else []
    return runs.read_config(trained[-1])["config"] if trained else own


def lineage(own):
    """The settings of a run and of every run that it was made from: its VAE, its base, and theirs.

    own: as above; a run whose folder is gone is left out
    """
    found, todo = [], [own]
    while todo:
        settings = todo.pop(0)
        if settings in found:
            continue
        found.append(settings)
        for folder in (settings.get("vae"), settings.get("base")):
            trained = runs.checkpoints(run_folder(folder)) if folder else []
            if trained:                                    # images and seed are the same at every step
                todo.append(runs.read_config(trained[-1])["config"])
    return found


def seen_in_training(data_dir, own):
    """Was a run, or one that it was made from, trained on the images of this folder?

    Yes if data_dir is the training folder, by its real path, or lies inside it; a copy is not recognised. The
    built-in drawings ("" or procedural) are measured with an `unseen_seed`.
    """
    drawings = ("", "procedural")
    if data_dir in drawings:
        return False
    here = Path(data_dir).resolve()
    for settings in lineage(own):
        trained_on = settings.get("data_dir", "")
        if trained_on not in drawings and here.is_relative_to(Path(trained_on).resolve()):
            return True
    return False


def unseen_seed(own):
    """A seed whose drawings are new to a run and to all that it was made from: 1, or the first after it."""
    seen = {settings["seed"] for settings in lineage(own)}
    return next(seed for seed in itertools.count(1) if seed not in seen)


# ---------------------------------------------------------------- the file

# Settings that do not tell one measurement from another: locations. Hashes identify the contents.
PLACES = ("run", "out", "checkpoint", "weights_sha256", "data_dir", "keep_reference", "lpips_trunk",
          "inception_weights")


def read_entries(path):
    """The measurements in a JSON file, [] if it is missing.   raises: SystemExit if it holds anything else"""
    try:
        entries = json.loads(path.read_text()) if path.exists() else []
        good = isinstance(entries, list) and all(isinstance(entry["settings"], dict) for entry in entries)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error})") from None
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise SystemExit(f"{path}: not a list of measurements, maybe damaged, and not overwritten: repair "
                         "it, move it away, or give another --out=")
    return entries


def identity(entry):
    """The settings that identify a measurement: two with the same ones replace each other."""
    return {name: value for name, value in entry["settings"].items() if name not in PLACES}


def add_entry(path, entry):
    """Add a measurement to the list in `path`, replacing an earlier one with the same settings.

    Sections that the new entry lacks are kept from the old one. If the disk refuses, the entry is printed.
    """
    entry = json.loads(json.dumps(entry))                      # tuples become lists, as when read back
    try:
        # Two jobs that measure one run take turns. Not the run's own lock, which training holds to its end.
        with FileLock(path.with_name(f".{path.name}.lock"), mode=0o666):
            runs.write_json(path, replaced(read_entries(path), entry))
    except OSError as error:
        print(json.dumps(entry))
        raise SystemExit(f"{path}: not written ({error}); the measurement is printed above") from None
    print(f"\nadded to {path}")
    if path.name == "metrics.json" and Path(path.parent, "report.html").exists():
        print(f"python evaluate.py report {path.parent}  puts it into {path.parent}/report.html")


def replaced(entries, entry):
    """The entries, with `entry` at the end in the place of those of the same settings."""
    others = []
    for old in entries:
        if identity(old) == identity(entry):
            entry = old | entry
        else:
            others.append(old)
    return [*others, entry]


def check_writable(path):
    """Create the folder of a file.   raises: SystemExit if the file cannot be written"""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("not a regular file; wanted a file name")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error})") from None


# ---------------------------------------------------------------- compare two runs

HIGHER_IS_BETTER = ("psnr", "ssim", "IS", "precision", "recall", "judged sharp", "class recognised", "CLIP")
LOWER_IS_BETTER = ("lpips", "FD", "FID", "KID")
NOT_COMPARED = ("img/s", "images", "positions")

# The settings that a number depends on: two numbers are ranked only if these are known and equal.
OF_SECTION = {"reconstruction": ("image_size", "held_out"), "generation": ("image_size", "n", "reference")}
OF_DRAWING = ("height", "width", "prompts", "classes")         # and these, where either entry has them
OF_METRIC = {"psnr": (), "ssim": (), "lpips": ("perceptual", "lpips_hash"), "CLIP": ("clip", "prompts")}
OF_FEATURES = ("features",)                                    # of all other metrics


def compare(a, b):
    """Print the latest entries of two runs side by side.  Returns the lines.

    a, b: runs, or step folders; for a step folder, the latest entry of that step.
    * marks the better value, if everything that it depends on is known and equal. The last line lists every
    setting in which the two differ; lines before it say which run was trained after it was measured.
    raises: SystemExit if the two are the same, or one was not measured
    """
    for run in (a, b):
        config.check_name("compare ", run)
    if os.path.realpath(a) == os.path.realpath(b):
        raise SystemExit(f"{a} twice: wanted two runs, or two step folders of one")
    one, two = latest_entry(a), latest_entry(b)
    lines = [f"{'':<52}{a[-14:]:>14}  {b[-14:]:>14}"]
    for section, of_section in OF_SECTION.items():
        if section == "generation":
            of_section += tuple(name for name in OF_DRAWING if name in one["settings"] | two["settings"])
        values, others = metrics_of(one, section), metrics_of(two, section)
        for (row, metric), x in values.items():
            if (row, metric) not in others or metric in NOT_COMPARED:
                continue
            y = others[row, metric]
            differ = differing(one, two, of_section + OF_METRIC.get(metric, OF_FEATURES))
            if not metric.endswith(HIGHER_IS_BETTER + LOWER_IS_BETTER):        # one of your own
                differ = ["whether more of it is better"]
            stars = "  " if differ else better(metric, x, y)
            line = f"{row:<34}{metric:>18}{x:>14.4g}{stars[0]} {y:>14.4g}{stars[1]}"
            lines.append(line + (f"  not ranked: {', '.join(differ)}" if differ else ""))
    lines += filter(None, (out_of_date(a, one), out_of_date(b, two)))
    everything = sorted({*one["settings"], *two["settings"]})
    lines.append(f"they differ in: {'; '.join(differing(one, two, everything))}")
    print(*lines, sep="\n")
    return lines


def better(metric, x, y):
    """"* " if x is the better value of a metric, " *" if y is, two spaces if they are equal or one is NaN."""
    if x == y or math.isnan(x + y):
        return "  "
    return "* " if (x > y) == metric.endswith(HIGHER_IS_BETTER) else " *"


def entries_of(run):
    """The measurements in a run's metrics.json; for a step folder, those of that step."""
    entries = read_entries(run_folder(run) / "metrics.json")
    if run_folder(run) != Path(run):
        entries = [entry for entry in entries if step_measured(entry) == Path(run).name]
    return entries


def latest_entry(run):
    """The last of `entries_of` a run.   raises: SystemExit if there is none"""
    entries = entries_of(run)
    if not entries:
        raise SystemExit(f"{run_folder(run)}/metrics.json: no measurement of {run}; measure it with: "
                         f"python evaluate.py {run}")
    return entries[-1]


def step_measured(entry):
    """The name of the step folder that an entry is about."""
    return Path(entry["settings"].get("checkpoint", "")).name


def out_of_date(run, entry):
    """A line saying that a run's newest checkpoint (or the given step folder) was not measured; else ""."""
    steps = runs.checkpoints(run_folder(run))
    if run_folder(run) != Path(run):
        steps = [Path(run)]
    measured = step_measured(entry)
    if not steps or not measured:
        return ""
    newest = steps[-1]
    if measured != newest.name:
        return f"{run}: measured at {in_words(measured)}; its newest checkpoint is {in_words(newest.name)}"
    known = entry["settings"].get("weights_sha256")
    if known and state_of(newest) not in (None, known):
        return f"{run}: {in_words(measured)} was trained again since it was measured"
    return ""


def in_words(step):
    """"step 300" for the folder step_000300."""
    return re.sub(r"^step_0*(?=\d)", "step ", step)


def metrics_of(entry, section):
    """{(row, metric): number} of a section of an entry. FID@n and FID-50k are both FID: n is a setting."""
    values = {}
    for row, found in entry.get(section, {}).items():
        for metric, value in found.items():
            if value is None:                      # how others write NaN
                value = math.nan
            values[row, re.sub(r"FID(@\d+|-50k)", "FID", metric)] = value
    return values


def differing(one, two, names):
    """["name x / y"] for the settings in which two entries differ, or that one of them lacks."""
    found = []
    for name in names:
        x = one["settings"].get(name, "unknown")
        y = two["settings"].get(name, "unknown")
        if x != y or x == "unknown":
            found.append(f"{name} {str(x):.80} / {str(y):.80}")
    return found
