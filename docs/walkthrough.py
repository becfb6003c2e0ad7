"""Run the notebook walkthrough.ipynb and print it as the page walkthrough.md.

    python docs/walkthrough.py                      # of out/tiny, the run of `python finetune.py`
    python docs/walkthrough.py --execute=False      # print only: after editing the text

The notebook is the only source. Its cells run here one after the other, as in Jupyter. Their output is stored
in the notebook, from which the page and pictures/ are made.
80 CPU-seconds on one thread (AMD EPYC, Zen 4; 2026-11-26).
"""
import ast
import base64
import contextlib
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

from PIL import Image

from support import config
from support.config import field

NOTEBOOK = Path(__file__).with_suffix(".ipynb")
HEAD = "<!-- printed by walkthrough.py from walkthrough.ipynb: change it there -->"


@dataclass
class Config:
    run: str = field("out/tiny", "RUN of the notebook: a run of finetune.py, widened from a base model")
    image: int = field(7, "IMAGE of the notebook: the held-out drawing to follow", at_least=0)
    images: int = field(200, "IMAGES: held-out drawings to average over", at_least=6)
    steps: int = field(200, "STEPS of each short training run in the exercises", at_least=1)
    execute: bool = field(True, "run the cells; False: print the page from their stored output")
    out: str = field("docs", "folder for notebook, page and pictures")


# ---------------------------------------------------------------- running the cells, as Jupyter would


def execute(notebook, given):
    """Run all code cells and store their output in the notebook, in place.

    given: {name: value}, set after the cell with the tag "parameters"
    Exceptions in a cell propagate; the traceback names the cell.
    """
    names = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, start=1):
        start = time.time()
        said, value = run_cell("".join(cell["source"]), names, f"<cell {cell['id']}>")
        cell["execution_count"] = count
        cell["outputs"] = outputs(said, value, count)
        if "parameters" in tags(cell):
            names |= given
        print(f"{cell['id']:<16}{time.time() - start:6.1f} s")


def run_cell(source, names, title):
    """Run one cell: (what it printed, the value of its last expression or None)."""
    body = ast.parse(source, title).body
    last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(ast.Module(body, []), title, "exec"), names)
        if last:
            value = eval(compile(last, title, "eval"), names)
    return said.getvalue(), value


def outputs(said, value, count):
    """A cell's output, in the notebook format."""
    found = []
    if said:
        found.append({"name": "stdout", "output_type": "stream", "text": said.splitlines(keepends=True)})
    if value is not None:
        shown = {"text/plain": [repr(value)]}
        if isinstance(value, Image.Image):
            shown = {"image/png": png(value), "text/plain": [f"<image of {value.width}x{value.height}>"]}
        found.append({"data": shown, "execution_count": count, "metadata": {},
                      "output_type": "execute_result"})
    return found


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------- the printed page


def page(notebook):
    """The notebook as Markdown: text unchanged, code and printed output in fences, links to the pictures."""
    parts = [HEAD]
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        shown = [f"```python\n{source}\n```"]
        if printed(cell):
            shown.append(f"```\n{printed(cell).rstrip()}\n```")
        if picture(cell):
            shown.append(f"![{caption(source)}](pictures/{cell['id']}.png)")
        if "solution" in tags(cell):
            shown = ["<details>\n<summary>A solution and its output</summary>", *shown, "</details>"]
        parts += shown
    return "\n\n".join(parts) + "\n"


def printed(cell):
    """What a cell printed. Jupyter stores it in parts, next to stderr, which has progress bars."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


def picture(cell):
    """The PNG that a cell showed, as bytes; None if it showed none."""
    for output in cell.get("outputs", []):
        if "image/png" in output.get("data", {}):
            return base64.b64decode(output["data"]["image/png"])
    return None


def caption(source):
    """A picture's caption: the comment in the last line of its cell."""
    return source.splitlines()[-1].removeprefix("# ")


def tags(cell):
    return cell["metadata"].get("tags", [])


def main(cfg):
    notebook = json.loads(NOTEBOOK.read_text())
    if cfg.execute:
        execute(notebook, {"RUN": cfg.run, "IMAGE": cfg.image, "IMAGES": cfg.images, "STEPS": cfg.steps})
    folder = Path(cfg.out) / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    shown = [cell for cell in notebook["cells"] if picture(cell)]
    for cell in shown:
        (folder / f"{cell['id']}.png").write_bytes(picture(cell))
    text = json.dumps(notebook, indent=1, ensure_ascii=False)      # as Jupyter writes it
    (Path(cfg.out) / NOTEBOOK.name).write_text(text + "\n")
    (Path(cfg.out) / "walkthrough.md").write_text(page(notebook))
    print(f"wrote walkthrough.ipynb, walkthrough.md and {len(shown)} pictures into {cfg.out}")


if __name__ == "__main__":
    main(config.cli(Config))
