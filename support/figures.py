"""What a run shows: grids of images, curves, and aligned tables."""
import io
import shutil
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from support import files, identity, runs
from support.data import to_uint8
from support.measurements import davae_settings, run_folder


# ---------------------------------------------------------------- images


LARGEST_GRID = 4096                # pixels a side: phones still open it


def save_grid(x, path, columns, scale=1, labels=None, also=None):
    """(B, 3, H, W) in [-1, 1] as a PNG with `columns` cells a row, each image `scale` times larger; atomic.

    A grid that would be larger than LARGEST_GRID shows its images smaller, by an integer factor.
    labels: B strings, written above the cells;  also: a second path for the same picture
    """
    gap = 2                                                         # white pixels around the cells
    head = 12 if labels else 0                                      # and above an image, for its label
    rows = -(-len(x) // columns)                                    # rounded up
    side = scale * max(columns * x.shape[3], rows * x.shape[2])
    images = to_uint8(x).repeat(scale, axis=1).repeat(scale, axis=2)        # (B, scale * H, scale * W, 3)
    images = [Image.fromarray(image).reduce(-(-side // LARGEST_GRID)) for image in images]
    height = images[0].height + head + gap
    width = images[0].width + gap
    sheet = Image.new("RGB", (gap + columns * width, gap + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default_imagefont()                       # Latin-1, 6 pixels a letter
    for i, image in enumerate(images):
        left = gap + i % columns * width
        top = gap + i // columns * height
        sheet.paste(image, (left, top + head))
        if labels:
            text = labels[i].encode("latin-1", "replace")
            pen.text((left, top), text[:width // 6], "black", font)
    with files.renamed_when_whole(path) as temporary:
        sheet.save(temporary, "PNG")
        if also:
            with files.renamed_when_whole(also) as copy:
                shutil.copyfile(temporary, copy)


def draw_reconstructions(out, done, D, x, base, full):
    """recon.png and recon_<done>.png in `out`: rows of inputs, base only, full reconstructions, their errors.

    x, base, full: (N, 3, H, W);  D: without details, there is no row of base only
    """
    shown = min(len(x), 8, max(1, 2048 // x.shape[-1]))            # 8, or as many as fit in 2,048 pixels
    rows = {"input": x}
    if D:
        rows["base only"] = base
    rows["DA-VAE" if D else "VAE"] = full
    rows["4x error"] = 4 * (full - x).abs() - 1                  # 4 * |error / 2| on [0, 1], shown on [-1, 1]
    strip = torch.cat([images[:shown] for images in rows.values()])
    labels = [name for name in rows for _ in range(shown)]
    save_grid(strip, Path(out) / f"recon_{done:06d}.png", shown, max(1, 96 // x.shape[-1]), labels,
              also=Path(out) / "recon.png")


# ---------------------------------------------------------------- curves


def plot(panels, path, size=(9, 4.2)):
    """A PNG of panels side by side, which share the legend of the first; size in hundreds of pixels.

    A panel is (x label, y label, matplotlib line style, {curve: [x, y]}). Two rules about its y label: one
    that begins with "power" asks for a logarithmic scale, and "" says that the axes have no meaning, as in
    an embedding.
    """
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")                                       # needs no display
    figure, axes = plt.subplots(1, len(panels), figsize=size, dpi=100, layout="constrained", squeeze=False)
    place = {name: k for k, name in enumerate(panels[0][3])}        # in the legend
    colours = plt.get_cmap("tab10" if len(place) <= 10 else "tab20").colors
    others = {"-": "--", "o": "^"}                                  # styles once every colour is taken
    for axis, (xlabel, ylabel, style, curves) in zip(axes[0], panels, strict=True):
        for k, (name, (x, y)) in enumerate(curves.items()):
            again, colour = divmod(place.get(name, k), len(colours))
            axis.plot(x, y, others.get(style, style) if again else style, label=name, color=colours[colour])
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if ylabel.startswith("power") else "linear")
        if not ylabel:
            axis.set(xticks=[], yticks=[])
        axis.grid(alpha=0.3)
    _, _, _, curves = panels[0]
    if len(curves) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    drawn = io.BytesIO()
    figure.savefig(drawn)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)      # a third of the bytes


def read_log(run):
    """The numbers in all rows of a run's log.jsonl as curves: {name: ([steps], [values])}, steps ascending.

    A run that was interrupted and resumed may log a step twice: the later value of each number counts.
    """
    at_step = {}
    for row in files.read_rows(Path(run) / "log.jsonl"):
        at_step.setdefault(row["step"], {}).update(row)
    curves = {}
    for step in sorted(at_step):
        for name, value in at_step[step].items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return curves


def plot_losses(run):
    """<run>/loss.png: every number in log.jsonl against the step, one panel each.

    Speed and what the settings determine (the learning rate, w) are left out. A run that logged nothing gets
    no plot.
    """
    if not (Path(run) / "log.jsonl").exists():
        return
    panels = []
    for name, points in read_log(run).items():
        if name not in ("step", "img/s", "lr", "w"):
            panels.append(("step", name, "-", {name: points}))
    if panels:
        plot(panels, Path(run) / "loss.png", size=(2.8 * len(panels), 2.6))


# ---------------------------------------------------------------- tables


def number(numbers, name, form):
    """A number of a dict as text, in a form such as ".2f"; "-" if it is missing."""
    value = numbers.get(name)
    return "-" if value is None else format(value, form)


def stages_of(folders):
    """These runs, each preceded by the base it was trained on; every folder once, "" left out."""
    stages = []
    for run in filter(None, folders):
        steps = runs.checkpoints(run_folder(run))
        base = runs.read_config(steps[-1])["config"]["base"] if steps else ""
        if base and base not in folders:                            # else it has its own place among them
            stages.append(base)
        stages.append(run)
    return list(dict.fromkeys(stages))


def result_of(summary):
    """A stage's result in words: a VAE's PSNR, a DiT's losses; "-" for what was not measured."""
    stage = summary["stage"]
    if stage.endswith("VAE"):
        result = f"{number(summary, 'psnr', '.2f')} dB"
        if stage == "DA-VAE":
            result += f", base only {number(summary, 'psnr_base', '.2f')} dB"
        return result
    result = f"loss base {number(summary, 'base', '.3f')}"
    if "warm_start" in summary:
        result += f", detail {number(summary, 'detail', '.3f')}; warm start off by {summary['warm_start']}"
    return result


def final_table(folders):
    """Print the summaries of runs of both stages, and of their bases, one aligned line each.

    A folder without a summary.json (a public checkpoint, or an interrupted run) has no line.
    """
    folders = stages_of(folders)
    width = max(22, *(len(run) + 2 for run in folders))
    print(f"\n{'stage':<12}{'folder':<{width}}{'steps':>8}{'seconds':>9}  result")
    for run in folders:
        summary = runs.read_summary(run)
        if summary:
            steps = number(summary, "steps", "d")
            seconds = number(summary, "seconds", ".0f")
            print(f"{summary['stage']:<12}{run:<{width}}{steps:>8}{seconds:>9}  {result_of(summary)}")


def report_vae(cfg, summary, shown, follow):
    """The end of train_vae.py: plot the losses, print the result on the images `shown`, and what is next.

    follow: commands of runs to train on this one; what is next is not printed for a stage of another run
    """
    out = cfg.out
    with runs.picture_may_fail(f"{out}: loss.png"):
        plot_losses(out)
    what = "base VAE"
    if cfg.D:
        what = f"base only {number(summary, 'psnr_base', '.2f')} dB, DA-VAE"
    print(f"{out}: done in {summary['seconds']:.0f} s; {what} {number(summary, 'psnr', '.2f')} dB on "
          f"{shown}; look at {out}/recon.png")
    if not getattr(cfg, "needed_by", ""):
        print("\n      ".join([f"next: python evaluate.py {out}{flags_to_measure(cfg)}", *follow]))


def report(cfg):
    """The end of finetune.py: print the table of all stages, the pictures to see, and the next commands."""
    out = cfg.out
    final_table([cfg.vae, cfg.base, out])
    pictures = sorted(path.name for path in Path(out).glob("*.png") if not path.stem[-6:].isdigit())
    print(f"\npictures in {out}: {', '.join(pictures)}\n"
          f"next: python sample.py {out}{folder_of_samples(out)}\n"
          f"      python evaluate.py {out}{flags_to_measure(cfg)}")
    if cfg.data_dir == "procedural" or cfg.lpips_trunk:             # else nothing would measure samples
        print("      (draws 1,000 samples, which takes most of the time; --n= sets how many)")
    if Path(out, "report.html").exists():
        print(f"the run on one page: {out}/report.html")


def flags_to_measure(cfg):
    """evaluate.py's flags for a run: held-out images, and the network of LPIPS if its file was given."""
    flags = ""
    if cfg.data_dir != "procedural":
        flags = f" --data_dir={getattr(cfg, 'val_dir', '') or 'HELD_OUT_IMAGES'}"
    if cfg.lpips_trunk:
        network = davae_settings(vars(cfg)).get("perceptual", "squeeze")
        flags += f" --perceptual={network} --lpips_trunk={cfg.lpips_trunk}"
    return flags


def folder_of_samples(out):
    """The flag that keeps sample.py apart from samples of an earlier state of a run; "" if there are none."""
    settings = Path(out, "samples", "settings.json")
    if not settings.exists():
        return ""
    drawn_by = files.read_json(settings).get("model")
    if drawn_by == identity.of_run(runs.latest_checkpoint(out)):
        return ""
    return f" --out={out}/samples_{runs.step_of(out)}"


def print_table(title, table):
    """Print {row: {column: number}} aligned, columns in alphabetical order, blank where a row has none.

    A number that is None is "-".
    """
    if not table:
        print()
        return
    columns = sorted(set().union(*table.values()))
    widths = {column: max(8, len(column)) + 2 for column in columns}
    heads = [f"{column:>{widths[column]}}" for column in columns]
    print(f"\n{title:<34}{''.join(heads)}")
    for name, row in table.items():
        cells = []
        for column in columns:
            cell = number(row, column, ".4g") if column in row else ""
            cells.append(f"{cell:>{widths[column]}}")
        print(f"{name:<34}{''.join(cells)}")
