"""figures"""
import json
import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from support import runs
from support.data import to_uint8


def save_grid(x, path, columns, scale=1, labels=None):
    """(B, 3, H, W) in [-1, 1] as one PNG, `scale` times larger, with `labels` (B strings) above the cells; atomic."""
    images, head = to_uint8(x).repeat(scale, axis=1).repeat(scale, axis=2), 12 if labels else 0
    height, width = images.shape[1] + head + 2, images.shape[2] + 2
    sheet = Image.new("RGB", (2 + columns * width, 2 + -(-len(images) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default_imagefont()      # Latin-1, 6 pixels a letter
    for i, image in enumerate(images):
        left, top = 2 + i % columns * width, 2 + i // columns * height
        sheet.paste(Image.fromarray(image), (left, top + head))
        draw.text((left, top), labels[i].encode("latin-1", "replace")[:width // 6] if labels else "", "black", font)
    sheet.save(f"{path}.part", "PNG")
    os.replace(f"{path}.part", path)


def plot(panels, path, size=(9, 4.2)):
    """A PNG of panels (x label, y label, line style, {curve: [x, y]}), which share a legend; power on a logarithmic scale."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(1, len(panels), figsize=size, dpi=100, layout="constrained", squeeze=False)
    for axis, (xlabel, ylabel, style, curves) in zip(axes[0], panels):
        for name, (x, y) in curves.items():
            axis.plot(x, y, style, label=name)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if ylabel.startswith("power") else "linear")
        axis.set(**{} if ylabel else dict(xticks=[], yticks=[]))            # the axes of an embedding have no meaning
        axis.grid(alpha=0.3)
    if len(panels[0][3]) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path)
    plt.close(figure)


def plot_losses(out):
    """loss.png: every number of log.jsonl against the step, one panel each."""
    if (Path(out) / "log.jsonl").exists():                         # a run shorter than log_every has none
        rows = [json.loads(line) for line in open(Path(out) / "log.jsonl")]
        names = [k for k in rows[-1] if k not in ("step", "img/s", "lr", "w")]
        points = {n: [(r["step"], r[n]) for r in rows if n in r] for n in names}
        plot([("step", n, "-", {n: list(zip(*points[n]))}) for n in names], Path(out) / "loss.png", (2.8 * len(names), 2.6))


def final_table(folders):
    """Print the summaries of runs of this script or finetune.py, and of a DA-VAE's base before it, one aligned line each."""
    bases = {run: runs.read_config(runs.checkpoints(run)[-1])["config"]["base"] for run in folders if runs.checkpoints(run)}
    folders = [name for run in folders for name in dict.fromkeys([bases.get(run, ""), run]) if name not in folders or name == run]
    print(f"\n{'stage':<12}{'folder':<22}{'steps':>8}{'seconds':>9}  result")
    for run in (run for run in folders if run and (Path(run) / "summary.json").exists()):
        s = json.loads((Path(run) / "summary.json").read_text())
        more = f", base only {s['psnr_base']:.2f} dB" if s['stage'] == "DA-VAE" else ""
        more += f", detail {s['detail']:.3f}; warm start off by {s['warm_start']}" if "warm_start" in s else ""
        result = (f"{s['psnr']:.2f} dB" if "psnr" in s else f"loss base {s['base']:.3f}") + more
        print(f"{s['stage']:<12}{run:<22}{s['steps']:>8}{s['seconds']:>9.0f}  {result}")


def print_table(title, table):
    columns = {c: max(8, len(c)) + 2 for c in sorted({c for row in table.values() for c in row})}
    print(f"\n{title:<34}" + "".join(f"{c:>{width}}" for c, width in columns.items()) if table else "")
    for name, row in table.items():
        print(f"{name:<34}" + "".join(f"{row[c]:>{width}.4g}" if c in row else " " * width for c, width in columns.items()))
