"""Does it work?  The method without each of its parts, against its rivals, and against a sceptic's baseline.

An arm changes one thing about the preset tiny (with TINY, stage 1 as it was before) or photos: flags of
train_vae.py for the DA-VAE, of finetune.py for the transformer. A cell is an arm with a seed. Cells of one
seed share base VAE and base DiT, and arms with the same stage 1 flags share their DA-VAE, so arms are
compared in pairs, seed by seed.

    python experiments/ablation.py                                   # run the missing cells, then report
    python experiments/ablation.py --arms="paper|no alignment" --seeds=0
    python experiments/ablation.py --report=True                     # on the existing cells; seconds
    python experiments/ablation.py --name=short --dit_flags="--steps=140 --N=70"       # another setting
    python experiments/ablation.py photos --base=weights/taef2 --data_dir=photos/train \\
        --eval_dir=photos/eval --lpips_trunk=squeezenet1_1_features.pth

A finished cell is a line of experiments/results/<name>.jsonl: arm, seed and setting, from which its commands
follow, and what was measured. A file holds cells of one setting. The report is <name>.md there (means over
the seeds, differences to the arm `paper`) and <name>.png (curves); README.md there has all settings side by
side. The rule was fixed beforehand: a difference to `paper` counts if it has the same sign for every seed,
and its mean exceeds the range of `paper` itself over the seeds. Anything else is "no difference". That range
turned out to come from the base VAEs, so a second rule was written down after seeds 0 and 1 and before all
others: instead of the range, the largest difference that chance makes on the same base (the arm `paper,
again`). For an arm that shares `paper`'s DA-VAE, that is too much; if it was run, `paper, DiT again`, with
the same DA-VAE, takes its place.
"""
import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import finetune
from support import config, figures, files, ranks, runs
from support.config import field

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    preset: str = field("tiny", "tiny, on built-in images, or photos")
    arms: str = field("", "names in ARMS, separated by |; empty: all", text=True)
    seeds: tuple = field((0, 1, 2, 3, 4), "seeds for everything that a cell trains", at_least=0)
    n: int = field(2000, "samples per cell", within=(2, 100_000))
    out: str = field("out/ablation", "folder for the runs; those of finished cells may be deleted")
    results: str = field("", "folder for lines and report; empty: experiments/results")
    report: bool = field(False, "run nothing")
    name: str = field("", "name of the setting, for folders and results; empty: the preset's")
    train_flags: str = field("", "more flags for every training run, such as for a short trial", text=True)
    vae_flags: str = field("", "more flags for every DA-VAE", text=True)
    dit_flags: str = field("", "more flags for every DA-VAE's DiT", text=True)
    base: str = field("taef2", "photos: the base VAE")
    data_dir: str = field("", "photos: images to train on, a folder of classes")
    eval_dir: str = field("", "photos: held-out images of the same classes")
    lpips_trunk: str = field("", "photos: SqueezeNet's weights, for LPIPS and distances")


# ---------------------------------------------------------------- the arms


@dataclass
class Arm:
    """What an arm changes.   vae: flags of train_vae.py; dit: flags of finetune.py"""
    asks: str                          # the question, as printed in the report
    vae: str = ""
    dit: str = ""
    base: str = "warm"                 # warm start; scratch; scratch+: plus the base DiT's steps; none: the
                                       # base DiT itself is measured


# Only the decoder and the up block are trained, with all their losses: the same information in different
# bases.
FIXED = "--train=up --align=0 --adaptive_align=False"
UNALIGNED = "--align=0 --fit_align=0"          # neither in training nor in a closed-form start

# The preset's stage 1 when the cells were run, before its discriminator was mended (LOG.md, 2026-11-27).
TINY = "--gan=0.1 --disc_start=360 --disc_lr=1 --steps=900"

AGAIN, DIT_AGAIN = "paper, again", "paper, DiT again"

ARMS = {
    "paper": Arm("the method"),
    AGAIN: Arm("how much is chance, on the same base?", "--seed={again}", "--seed={again}"),
    DIT_AGAIN: Arm("and on the same DA-VAE?", dit="--seed={again}"),
    "no alignment": Arm("does alignment help generation?", UNALIGNED),
    "no alignment, again": Arm("and is that chance?", f"{UNALIGNED} --seed={{again}}", "--seed={again}"),
    "no schedule": Arm("does w(n) help?", dit="--N=0"),
    "random P_new, O_new": Arm("does the zero start help?", dit="--zero_init=False"),
    "scratch": Arm("does the warm start help, at equal steps?", base="scratch"),
    "scratch, equal compute": Arm("and with the base model's steps besides?", base="scratch+"),
    "half size": Arm("do details beat the base model, enlarged (Tab. S2)?", base="none"),

    "space to depth": Arm("must details be learned?", f"--fit=pixels {FIXED}"),
    "closed, unaligned": Arm("or only chosen?", f"--fit=closed --fit_align=0 {FIXED}"),
    "closed, half aligned": Arm("or half aligned?", f"--fit=closed --fit_align=0.5 {FIXED}"),
    "closed, aligned": Arm("or aligned at no cost?", f"--fit=closed --fit_align=1 {FIXED}"),

    "align 0.1": Arm("how much alignment?", "--align=0.1 --adaptive_align=True"),
    "align 0.5": Arm("how much alignment?", "--align=0.5 --adaptive_align=True"),
    "align 2.5": Arm("how much alignment?", "--align=2.5 --adaptive_align=True"),

    "VF, mean": Arm("is it the distance?", "--distance=vf --align=0.5 --adaptive_align=True"),
    "VF, conv": Arm("or the projection?", "--distance=vf --project=conv --align=0.5 --adaptive_align=True"),
    "SLS": Arm("does an order of channels do it?", f"{UNALIGNED} --keep_levels={{levels}}", "--N=0"),
    "ADT": Arm("or hiding channels from the DiT?", UNALIGNED, "--N=0 --keep_levels={levels}"),
    "SLS + ADT": Arm("or both, as DC-AE 1.5?", f"{UNALIGNED} --keep_levels={{levels}}",
                     "--N=0 --keep_levels={levels}"),
    "paper + ADT": Arm("or hiding channels from the method's DiT?", dit="--keep_levels={levels}"),
    "all": Arm("and everything together?", "--keep_levels={levels}", "--keep_levels={levels}"),
    "paper, noise": Arm("must the decoder forgive the transformer's errors?", "--detail_noise=1"),
    "no alignment, noise": Arm("or that of details without alignment?", f"{UNALIGNED} --detail_noise=1"),
}
OF_PHOTOS = ["paper", "no alignment", "space to depth", "scratch", "SLS", "SLS + ADT", "paper + ADT",
             "paper, noise"]
SCALES = {"tiny": (1, 2), "photos": (2,)}                          # of guidance; the last one is judged
SETTING = ("preset", "n", "train_flags", "vae_flags", "dit_flags", "base", "data_dir", "eval_dir")


# ---------------------------------------------------------------- a cell


def commands(cfg, name, seed):
    """(the commands that train an arm, the run to measure then); commands of finished runs do nothing."""
    arm = ARMS[name]
    folder = f"{cfg.out}/{cfg.name or cfg.preset}/seed{seed}"
    base_vae = f"{folder}/base-vae"
    common = f"--seed={seed} {cfg.train_flags}"
    stage1 = f"{common} {TINY}"
    if cfg.preset == "photos":
        base_vae = cfg.base
        common = f"{common} --data_dir={shlex.quote(cfg.data_dir)}"
        stage1 = f"{common} --lpips_trunk={shlex.quote(cfg.lpips_trunk)}"
    vae_flags = fill(arm.vae, cfg, seed)
    vae = f"{folder}/vae-{slug(vae_flags) or 'paper'}"
    base_dit = f"{folder}/base-dit"
    plain = f"{folder}/vae-paper"                                  # the base DiT sees only its base channels

    made = []
    if cfg.preset == "tiny":
        made.append(f"train_vae.py tiny-base {common} --out={base_vae}")
    for out, flags in {plain: "", vae: vae_flags}.items():
        flags = f"{cfg.vae_flags} {flags}"
        made.append(f"train_vae.py {cfg.preset} {stage1} --base={base_vae} --out={out} {flags}")
    if not arm.base.startswith("scratch"):
        made.append(f"finetune.py {cfg.preset}-base {common} --vae={plain} --out={base_dit}")
    if arm.base == "none":
        return made, base_dit

    start = f"--base={base_dit}"
    if arm.base.startswith("scratch"):
        start = from_scratch(cfg, arm.base == "scratch+")
    run = f"{folder}/{slug(name)}"
    flags = f"{cfg.dit_flags} {start} {fill(arm.dit, cfg, seed)}"
    made.append(f"finetune.py {cfg.preset} {common} --vae={vae} --out={run} {flags}")
    return made, run


def from_scratch(cfg, longer):
    """Flags for a DiT of the base DiT's sizes, without a base; if `longer`, also with its steps added."""
    base = finetune.PRESETS[f"{cfg.preset}-base"]
    sizes = " ".join(f"--{key}={base[key]}" for key in ("p", "E", "depth", "A") if key in base)
    steps = f"--steps={dit_settings(cfg).steps + base['steps']}" if longer else ""
    return f"--base= {sizes} {steps}"


def dit_settings(cfg):
    """The settings that the DiT of every arm starts from."""
    return config.cli(finetune.Config, finetune.PRESETS, [cfg.preset, *shlex.split(cfg.dit_flags)])


def fill(flags, cfg, seed):
    """{levels}: none, a third, two thirds and all of the details; {again}: another seed."""
    D = dit_settings(cfg).D
    return flags.format(levels=",".join(str(D * k // 3) for k in range(4)), again=seed + 1000)


def slug(text):
    """A name or flags as part of a folder's name."""
    words = "".join(c if c.isalnum() or c in ".+" else " " for c in text).split()
    return "-".join(words)


def run_cell(cfg, name, seed):
    """Train an arm with a seed, and measure it.  Returns its line for the results."""
    since = time.time()
    made, run = commands(cfg, name, seed)
    for command in made:
        execute(command)

    held_out, features = "", "--features=probe"
    if cfg.preset == "photos":
        held_out = f"--data_dir={shlex.quote(cfg.eval_dir)}"
        features = f"--features=squeeze --perceptual=squeeze --lpips_trunk={shlex.quote(cfg.lpips_trunk)}"
    line = {"arm": name, "seed": seed, "setting": setting_of(cfg), "curves": curves(run)}
    for scale in SCALES[cfg.preset]:
        out = f"{run}/cfg{scale}.json"
        execute(f"evaluate.py {run} {held_out} --n={cfg.n} --steps=25 --cfg={scale} {features} --out={out}")
        entry = json.loads(Path(out).read_text())[-1]
        line["reconstruction"] = rounded(entry["reconstruction"])
        line[f"samples, cfg {scale}"] = rounded(entry["generation"])
    if ARMS[name].base != "none":
        execute(f"experiments/timebins.py {run} {held_out} --images=500 --bins=5")
        by_time = json.loads(Path(run, "timebins.json").read_text())["panels"][0][3]
        line["loss by time"] = {part: [times, [float(f"{loss:.5g}") for loss in losses]]
                                for part, (times, losses) in by_time.items()}
        line["details"] = use_of_details(run, f"{held_out} --images=500", features)
    return line | {"seconds": round(time.time() - since)}


def setting_of(cfg):
    """What all cells of a results file have in common."""
    return {name: getattr(cfg, name) for name in SETTING}


def refuse_another_setting(cells, cfg, path):
    """raises: SystemExit if a results file holds cells of another setting, such as of other images"""
    for line in (line for arm in cells.values() for line in arm.values()):
        old = line.get("setting", {})
        changed = [f"{name} {old.get(name)!r} -> {value!r}" for name, value in setting_of(cfg).items()
                   if value != old.get(name)]
        if changed:
            raise SystemExit(f"{path} holds cells of another setting ({', '.join(changed)}): give this one a "
                             "--name= of its own")


def use_of_details(run, held_out, features):
    """Scores of a run's decoder with other details, and the power at the lowest and highest frequency."""
    execute(f"experiments/sensitivity.py {run} {held_out} {features}")
    execute(f"experiments/spectrum.py {run} {held_out}")
    found = rounded(json.loads(Path(run, "sensitivity.json").read_text())["table"])
    curves_of = json.loads(Path(run, "spectrum.json").read_text())["panels"][0][3]
    powers = {f"{name} spectrum": {"lowest": power[0], "highest": power[-1]}
              for name, (_, power) in curves_of.items()}
    return found | rounded(powers)


def execute(command):
    """Run a script of this repository.   raises: SystemExit with the end of its output if it fails"""
    print(f"python {command}", flush=True)
    script, *words = shlex.split(command)
    done = subprocess.run([sys.executable, str(ROOT / script), *words], text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-1000:]}{done.stderr[-3000:]}\nthis failed: python {command}")


def rounded(table):
    """{row: {metric: number}} of metrics.json, rounded to five digits, without speeds and counts."""
    found = {}
    for row, metrics in table.items():
        found[row] = {name: float(f"{value:.5g}") for name, value in metrics.items()
                      if name not in ("img/s", "images", "positions")}
    return found


def curves(run):
    """{"step", "base", "detail": a list} of a run's log; a base model has no "detail"."""
    found = {}
    for name, (steps, losses) in figures.read_log(run).items():
        if name in ("base", "detail"):
            found["step"] = steps
            found[name] = [round(loss, 4) for loss in losses]
    return found


# ---------------------------------------------------------------- the report


def number(line, metric):
    """One number of a cell; None if it has none.   metric: a key of METRICS"""
    if metric == ADDED:
        return number(line, JUDGED) - number(line, "FD, reconstructions")
    group, rows, name = METRICS[metric]
    if group == "reconstruction" and "samples" not in line["samples, cfg 2"]:          # a base model
        rows = SAMPLES
    found = next((line[group][row] for row in rows if row in line.get(group, {})), None)
    if found is None:
        return None
    if group == "loss by time":
        return sum(found[1]) / len(found[1])
    return next((value for key, value in found.items() if key.endswith(name)), None)


# The table's columns: the group in a line, its rows (the first that exists), how the metric's name ends. The
# base model has no samples at full size; its enlarged images take their place.
SAMPLES = ("samples", "base only, bilinear")
ADDED = "FD, cfg 2, less reconstructions'"                         # what the transformer adds
METRICS = {
    "PSNR (dB)": ("reconstruction", ("DA-VAE",), "psnr"),
    "FD, reconstructions": ("reconstruction", ("DA-VAE",), "-FD"),
    "FD, samples": ("samples, cfg 1", SAMPLES, "-FD"),
    "FD, cfg 2": ("samples, cfg 2", SAMPLES, "-FD"),
    ADDED: (),
    "judged sharp, cfg 2": ("samples, cfg 2", ("samples",), "judged sharp"),       # built-in images only
    "KID, cfg 2": ("samples, cfg 2", SAMPLES, "-KID"),
    "FD, base only, cfg 2": ("samples, cfg 2", ("base only, bicubic",), "-FD"),
    "base loss, held out": ("loss by time", ("base",), ""),        # means over five intervals of time
    "detail loss, held out": ("loss by time", ("detail",), ""),
    "PSNR, details 0": ("details", ("zero details",), "psnr"),
    "PSNR, random details": ("details", ("random details",), "psnr"),
    "detail power, highest ring": ("details", ("detail spectrum",), "highest"),
}
JUDGED = "FD, cfg 2"                                               # decides whether an arm is better or worse


def read(path):
    """{arm: {seed: line}} of a results file; if a cell occurs twice, the later line.

    raises: SystemExit for a damaged line: a cell takes hours, so none is dropped silently
    """
    cells = {}
    for n, text in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
        except ValueError:
            raise SystemExit(f"{path}: line {n} is damaged; delete it, and its cell is run again") from None
        cells.setdefault(line["arm"], {})[line["seed"]] = line
    return cells


def verdict(cells, name):
    """An arm's differences to `paper` in FD (lower is better), called by the rules in the docstring."""
    found = differences(cells, name).values()
    if name == "paper" or len(found) < 2:
        return ""
    below = sum(d < 0 for d in found)
    said = f"{statistics.mean(found):+.3f}, {below} of {len(found)} below: "
    said += called(found, own_range(cells, name))
    if name not in (AGAIN, DIT_AGAIN) and chance(cells, name) is not None:
        said += f"; beside chance: {called(found, chance(cells, name))}"
    return said


def own_range(cells, name):
    """The range of `paper` over the seeds that the arm has, too."""
    own = [number(cells["paper"][seed], JUDGED) for seed in differences(cells, name)]
    return max(own) - min(own)


def chance(cells, name):
    """The largest difference to `paper` that another seed makes; None if that was not run."""
    same_vae = not ARMS[name].vae and DIT_AGAIN in cells
    found = differences(cells, DIT_AGAIN if same_vae else AGAIN).values()
    return max(map(abs, found), default=None)


def differences(cells, name):
    """{seed: FD of an arm's samples minus `paper`'s} for the seeds that both have."""
    seeds = sorted(set(cells.get(name, {})) & set(cells.get("paper", {})))
    return {seed: number(cells[name][seed], JUDGED) - number(cells["paper"][seed], JUDGED) for seed in seeds}


def called(found, limit):
    """Better or worse, if all differences in a list have the same sign and their mean exceeds the limit."""
    mean = statistics.mean(found)
    if abs(mean) <= limit or not (all(d < 0 for d in found) or all(d > 0 for d in found)):
        return "no difference"
    return f"{'better' if mean < 0 else 'worse'} than paper"


def steps_to_paper(cells, name):
    """The steps after which an arm reaches the base loss that `paper` ends with, seed by seed; or "never".

    Losses are means of five rows of the log, because a row is a single step's.
    """
    found = []
    for seed in sorted(set(cells[name]) & set(cells.get("paper", {}))):
        _, losses = smooth(cells["paper"][seed])
        reached = [step for step, loss in zip(*smooth(cells[name][seed])) if loss <= losses[-1]]
        found.append(str(reached[0]) if reached else "never")
    return ", ".join(found)


def smooth(line):
    """(steps, base loss averaged over each row and the four before it, or fewer if there are) of a cell."""
    steps, losses = line["curves"]["step"], line["curves"]["base"]
    n = min(5, len(losses))
    means = [sum(losses[k - n:k]) / n for k in range(n, len(losses) + 1)]
    return steps[n - 1:], means


def report(cells, folder, title):
    """Write <title>.md and <title>.png, and print the table."""
    heads = ["arm", "asks", "seeds", *METRICS, "steps to paper's base loss", f"{JUDGED}, to paper"]
    lines = [f"# {title}: {sum(map(len, cells.values()))} cells\n",
             f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in [name for name in ARMS if name in cells]:
        found = []
        for metric in METRICS:
            values = [number(line, metric) for line in cells[name].values()]
            values = [value for value in values if value is not None]
            found.append(spread(values, len(cells[name])) if values else "")
        row = [name, ARMS[name].asks, str(len(cells[name])), *found, steps_to_paper(cells, name),
               verdict(cells, name)]
        lines.append(f"| {' | '.join(row)} |")
    hours = sum(line["seconds"] for arm in cells.values() for line in arm.values()) / 3600
    lines.append("\nMean over the seeds (smallest to largest); differences: of seeds that both arms have. "
                 f"{hours:.1f} hours of cells in all.\n")
    text = "\n".join(lines)
    files.write_text(folder / f"{title}.md", text)
    print(text)

    points = {name: [[number(line, metric) for line in arm.values()] for metric in ("PSNR (dB)", JUDGED)]
              for name, arm in cells.items()}
    panels = [("PSNR of reconstructions (dB)", "FD of samples", "o", points)]
    for loss in ("base", "detail"):
        panels.append(("step", f"{loss} loss", "-", mean_curves(cells, loss)))
    figures.plot(panels, folder / f"{title}.png", size=(13, 5))


def side_by_side(folder):
    """Write README.md: the differences of all arms to `paper`, in every setting with cells in `folder`."""
    settings = {path.stem: read(path) for path in sorted(folder.glob("*.jsonl"))}
    lines = ["# FD of samples: the method's (`paper`), and what every other arm's is above it\n",
             f"| arm | {' | '.join(settings)} |", "|---" * (1 + len(settings)) + "|"]
    for name in ARMS:
        row = [difference(cells, name) for cells in settings.values()]
        if any(row):
            lines.append(f"| {name} | {' | '.join(row)} |")
    lines.append("\nMean over the seeds, and how many of them have its sign. Bold counts: all seeds have it, "
                 "and the mean exceeds what\nanother seed makes (`paper, again`; with `paper`'s DA-VAE, "
                 "`paper, DiT again`), or if neither was run, `paper`'s\nrange. More in each setting's "
                 "<name>.md.\n")
    files.write_text(folder / "README.md", "\n".join(lines))


def difference(cells, name):
    """An arm's cell in the table of all settings; empty if there is nothing to compare."""
    found = differences(cells, name).values()
    if not found:
        return ""
    if name == "paper":
        return f"{statistics.mean(number(line, JUDGED) for line in cells[name].values()):.3g}"
    if name in (AGAIN, DIT_AGAIN):
        return f"{max(map(abs, found)):.2g} at most"
    mean = statistics.mean(found)
    said = f"{mean:+.2g}, {sum(d * mean > 0 for d in found)} of {len(found)}".replace("-", "−")
    limit = chance(cells, name)
    limit = own_range(cells, name) if limit is None else limit
    counts = len(found) > 1 and called(found, limit) != "no difference"
    return f"**{said}**" if counts else said


def spread(values, seeds):
    of = "" if len(values) == seeds else f"; {len(values)} of {seeds} seeds"
    return f"{sum(values) / len(values):.4g} ({min(values):.4g} to {max(values):.4g}{of})"


def mean_curves(cells, loss):
    """{arm: [steps, losses]}, means over its seeds."""
    found = {}
    for name, arm in cells.items():
        logged = [line["curves"] for line in arm.values() if loss in line["curves"]]
        if logged:
            values = [sum(at) / len(at) for at in zip(*[curves[loss] for curves in logged])]
            found[name] = [logged[0]["step"][:len(values)], values]
    return found


# ---------------------------------------------------------------- the script


def main(cfg):
    if cfg.preset not in SCALES:
        raise SystemExit(f"{cfg.preset}: wanted {' or '.join(SCALES)}")
    folder = Path(cfg.results or ROOT / "experiments/results")
    name = cfg.name or cfg.preset
    path = folder / f"{name}.jsonl"
    arms = cfg.arms.split("|") if cfg.arms else list(ARMS if cfg.preset == "tiny" else OF_PHOTOS)
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise SystemExit(f"--arms: {unknown[0]!r} is none of {' | '.join(ARMS)}")

    cells = read(path)
    wanted = []
    if not cfg.report:
        refuse_another_setting(cells, cfg, path)
        wanted = [(seed, arm) for seed in cfg.seeds for arm in arms]
    for seed, arm in wanted:
        if seed not in cells.get(arm, {}):
            line = run_cell(cfg, arm, seed)
            runs.make_folder(folder)
            with open(path, "a") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
            cells = read(path)
            print(f"seed {seed}, {arm}: {line['seconds']} s, {JUDGED} {number(line, JUDGED)}", flush=True)
    if not cells:
        raise SystemExit(f"{path}: has no cells yet; run without --report=True")
    report(cells, folder, name)
    side_by_side(folder)
    return cells


if __name__ == "__main__":
    ranks.launch(main, config.cli(Config, {"tiny": {}, "photos": {}}))
