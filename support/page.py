"""Building blocks of a single-file web page: text, pictures, curves, tables. They know nothing about runs.

Outside input goes through `text` or `attribute`, which make it safe in HTML, including inside quotes.
"""
import base64
import html
import io
import json
import math
import re

from PIL import Image

from support.measurements import HIGHER_IS_BETTER, LOWER_IS_BETTER


def fill(template, sections, places):
    """A page: the template with only these sections, and its {{places}} filled with HTML.

    sections: {id of a <section>: {place in it: HTML}, or None to leave the section out}
    places: those outside sections; {{contents}}, links to the sections that remain, is made here
    """
    left = {name: found for name, found in sections.items() if found is not None}
    places = dict(places)
    for found in left.values():
        places |= found

    def keep(section):
        return section[0] if section[1] in left else ""

    page = re.sub(r'<section id="([\w-]+)".*?</section>\n', keep, template, flags=re.S)
    heads = re.findall(r'<h2 id="([\w-]+)-title">(.*?)</h2>', page)
    places["contents"] = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in heads)
    return re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], page)


# ---------------------------------------------------------------- text


def text(words):
    """Words escaped for HTML; bytes of a folder's name that are not UTF-8 become ?."""
    return html.escape(str(words).encode("utf-8", "replace").decode())


def attribute(thing):
    """A value as JSON, for an HTML attribute."""
    return text(json.dumps(thing))


def plural(count, noun):
    """"1 class", "10 classes"."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}" + (ending if count != 1 else "")


def duration(seconds):
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def definitions(values, style):
    """{name: value} as a definition list."""
    rows = [f'<div><dt>{text(name)}</dt><dd class="number">{text(value)}</dd></div>'
            for name, value in values.items()]
    return f'<dl class="{style}">{"".join(rows)}</dl>'


# ---------------------------------------------------------------- pictures


def picture(pixels, quality):
    """uint8 (H, W, 3) as a data URI.   quality: WebP's, 100: lossless"""
    file = io.BytesIO()
    if quality == 100:                             # for lossless, quality is effort; 100 takes 3x the time
        Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=50)
    else:
        Image.fromarray(pixels).save(file, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def img(pixels, quality, alt):
    """uint8 (H, W, 3) as an <img>.   alt: what it shows, in words"""
    H, W = pixels.shape[:2]
    return f'<img src="{picture(pixels, quality)}" width="{W}" height="{H}" alt="{text(alt)}">'


# ---------------------------------------------------------------- curves


def chart(title, curves, wide=False, note=""):
    """A <figure> of curves {name: (steps, values)} on one axis that starts at 0; "" if there are none.

    note: what the curves are, in words, below them
    The drawing stretches to fill its box; its labels are HTML text, outside the drawing. The page's script
    reads off values.
    """
    drawn = []
    for hue, (name, (steps, values)) in enumerate(curves.items()):
        points = [(step, value) for step, value in zip(steps, values) if math.isfinite(value)]
        if points:
            drawn.append({"name": name, "hue": hue, "steps": [step for step, _ in points],
                          "values": [float(f"{value:.5g}") for _, value in points]})
    if not drawn:
        return ""
    last = max(curve["steps"][-1] for curve in drawn)
    top = max(max(curve["values"]) for curve in drawn)
    top = top if top > 0 else 1.0

    lines, labels = [], []
    for y in ticks(top):
        lines.append(f'<path class="grid" d="M0 {100 - 100 * y / top:.2f} H100"/>')
        labels.append(f'<span class="y" style="bottom:{100 * y / top:.2f}%">{y:g}</span>')
    for x in ticks(last):
        labels.append(f'<span class="x" style="left:{100 * x / last:.2f}%">{x:,g}</span>')
    ends = apart([100 * curve["values"][-1] / top for curve in drawn], least=8)
    for curve, end in zip(drawn, ends):
        spots = [f"{100 * step / last:.2f} {100 - 100 * value / top:.2f}"
                 for step, value in zip(curve["steps"], curve["values"])]
        style = f"c{curve['hue']}"
        lines.append(f'<path class="{style}" d="M{" L".join(spots)}"/>')
        labels.append(f'<span class="name {style}" style="bottom:{end:.2f}%">{text(curve["name"])}</span>')
        labels.append(f'<span class="mark {style}" hidden></span>')

    first = min(curve["steps"][0] for curve in drawn)
    latest = [f"{curve['name']} {curve['values'][-1]:.3g}" for curve in drawn]
    read = text(f"step {last} · {' · '.join(latest)}")
    data = attribute({"curves": drawn, "last": last, "top": top})
    return f"""<figure class="chart{" wide" if wide else ""}" data-chart="{data}">
<figcaption>{text(title)}</figcaption>
<div class="plot" role="slider" tabindex="0" aria-label="{text(title)}; step" aria-valuemin="{first}"
aria-valuemax="{last}" aria-valuenow="{last}" aria-valuetext="{read}">
<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(lines)}</svg>
{"".join(labels)}<span class="cursor" hidden></span></div>
<div class="read">{read}</div>
<p class="note">{text(note)}</p>
</figure>"""


def ticks(top):
    """0 and round numbers up to `top`: two to six of them."""
    power = 10.0**math.floor(math.log10(top))
    step = next(step for step in (power / 5, power / 2, power, 2 * power) if top / step < 5.5)
    return [round(k * step, 10) for k in range(int(top / step + 1e-9) + 1)]


def apart(heights, least):
    """Heights in per cent, moved up where two are closer than `least`."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=lambda k: moved[k])
    for low, high in zip(order, order[1:]):
        moved[high] = max(moved[high], moved[low] + least)
    return moved


# ---------------------------------------------------------------- tables


def table(title, heads, rows):
    """A <table> of heads {column: its head} and rows {row: {column: (text, is it the best?)}}.

    On a narrow page each number repeats its column's head, so every cell carries that too.
    """
    columns = "".join(f'<th scope="col">{text(head)}</th>' for head in heads.values())
    lines = []
    for name, row in rows.items():
        cells = []
        for column, head in heads.items():
            written, best = row.get(column, ("", False))
            style = ' class="best"' if best else ""
            cells.append(f'<td{style} data-name="{text(head)}">{text(written)}</td>')
        lines.append(f'<tr><th scope="row">{text(name)}</th>{"".join(cells)}</tr>')
    return (f'<table><caption>{text(title)}</caption>\n<thead><tr><th scope="col">variant</th>{columns}</tr>'
            f"</thead>\n<tbody>{''.join(lines)}</tbody></table>")


HEADS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "positions": "latent positions"}


def scores(title, rows):
    """A <table> of {row: {metric: number}}; the best of each metric is highlighted."""
    metrics = dict.fromkeys(metric for row in rows.values() for metric in row)
    heads, best = {}, {}
    for metric in metrics:
        if metric in ("images", "img/s"):
            continue
        heads[metric] = HEADS.get(metric, metric)
        values = {row[metric] for row in rows.values() if row.get(metric) is not None}
        if metric.endswith(HIGHER_IS_BETTER):
            heads[metric] += " ↑"
            best[metric] = max(values, default=None)
        elif re.sub(r"@\d+|-50k", "", metric).endswith(LOWER_IS_BETTER):
            heads[metric] += " ↓"
            best[metric] = min(values, default=None)
        if len(values) < 2:                        # the same in all rows, so none of them is the best
            best.pop(metric, None)

    written = {}
    for name, row in rows.items():
        numbers = {metric: row[metric] for metric in heads if row.get(metric) is not None}
        written[name] = {metric: (as_text(metric, value), value == best.get(metric))
                         for metric, value in numbers.items()}
    return table(title, heads, written)


def as_text(metric, value):
    """A measured number, formatted for a table."""
    forms = {"positions": ",.0f", "psnr": ".2f"}
    return format(value, forms.get(metric, ".3g"))
