"""docs/walkthrough.ipynb runs, does what it says and copies nothing; walkthrough.md is printed from it."""
import ast
import base64
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def tool():
    """docs/walkthrough.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("walkthrough", DOCS / "walkthrough.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def notebook():
    return json.loads((DOCS / "walkthrough.ipynb").read_text())


def code(notebook):
    """{cell's id: its source} of the cells with code."""
    return {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"}


def defined(source):
    """Names of all functions and classes in a source, at any depth."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}


# ---------------------------------------------------------------- as it is stored


def test_the_page_and_its_pictures_are_printed_from_the_notebook(tool, notebook):
    again = "run: python docs/walkthrough.py --execute=False"
    assert (DOCS / "walkthrough.md").read_text() == tool.page(notebook), again
    shown = {cell["id"]: tool.picture(cell) for cell in notebook["cells"] if tool.picture(cell)}
    assert len(shown) > 10
    for name, png in shown.items():
        assert (DOCS / f"pictures/{name}.png").read_bytes() == png, again


def test_the_notebook_was_run_from_top_to_bottom_without_errors(notebook):
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"stream", "execute_result"}
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_the_notebook_is_small_and_contains_no_machine_paths():
    text = (DOCS / "walkthrough.ipynb").read_text()
    assert len(text) < 1_000_000
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.findall(r"[\s'\"](?:/\w+){2,}", words)


def test_each_cell_is_short_plain_python_and_copies_no_function_of_the_project(notebook):
    sources = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("experiments/*.py")]
    theirs = set().union(*(defined(path.read_text()) for path in sources))
    assert {"align_loss", "spectrum", "detail_weight"} <= theirs
    for name, source in code(notebook).items():
        assert not defined(source) & theirs, name                   # ast fails on magics such as "%time"
        lines = [line for line in source.splitlines() if line.strip()]
        assert len(lines) <= 15 and max(map(len, lines)) <= 110, name


def test_each_step_has_a_where_line_and_names_or_imports_its_function(notebook):
    steps = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        heading = re.match(r"## (\d)\. ", source)
        if heading:
            step = heading[1]
            steps[step] = set(re.findall(r"`\w+\.py:([\w.]+)`", source))
            assert "\nWhere: " in source, source
        elif cell["cell_type"] == "code" and steps:
            tree = ast.parse(source)
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
            steps[step] |= {alias.name for node in imports for alias in node.names}
    assert list(steps) == list("123456")
    used = {"1": "base_image", "2": "align_loss", "3": "reconstruct", "4": "warm_start_difference",
            "5": "finetune", "6": "sample_flow"}
    assert all(name in steps[step] for step, name in used.items())


def test_five_exercises_have_a_question_a_start_and_a_hidden_solution_and_answer(notebook):
    cells = notebook["cells"]
    starts = [i for i, cell in enumerate(cells) if "".join(cell["source"]).startswith("### Exercise ")]
    assert len(starts) == 5
    for i in starts:
        question, start, solution, answer = cells[i:i + 4]
        assert "?" in "".join(question["source"])
        assert start["cell_type"] == solution["cell_type"] == "code"
        assert "solution" in solution["metadata"]["tags"] and solution["metadata"]["jupyter"]["source_hidden"]
        assert "".join(answer["source"]).startswith("<details>\n<summary>Answer</summary>\n\n")


# ---------------------------------------------------------------- how it is run and printed


def cells_of(*sources):
    """A notebook of code cells; the first has the tag "parameters"."""
    cells = []
    for i, source in enumerate(sources):
        tags = ["parameters"] if i == 0 else []
        lines = source.splitlines(keepends=True)
        cells.append({"cell_type": "code", "id": f"cell{i}", "metadata": {"tags": tags}, "source": lines})
    return {"cells": cells}


def test_cells_share_variables_and_keep_their_printed_text_and_last_picture(tool):
    show = "from PIL import Image\nImage.new('RGB', (3, 2), 'red')\n# a red box"
    notebook = cells_of("N = 1", "print(N)\nprint(2 * N)", show, "None")
    tool.execute(notebook, {"N": 5})
    first, second, third, fourth = notebook["cells"]
    assert second["outputs"][0]["text"] == ["5\n", "10\n"]
    image = third["outputs"][0]["data"]["image/png"]
    assert base64.b64decode(image) == tool.picture(third)
    assert not first["outputs"] and not fourth["outputs"] and fourth["execution_count"] == 4
    page = tool.page(notebook)
    assert "```python\nprint(N)\nprint(2 * N)\n```\n\n```\n5\n10\n```" in page
    assert "![a red box](pictures/cell2.png)" in page


def test_a_failing_cell_stops_the_run_and_is_named(tool, tmp_path, monkeypatch):
    (tmp_path / "walkthrough.ipynb").write_text(json.dumps(cells_of("N = 1", "1 / 0", "print(N)")))
    monkeypatch.setattr(tool, "NOTEBOOK", tmp_path / "walkthrough.ipynb")
    with pytest.raises(ZeroDivisionError) as failed:
        tool.main(tool.Config(out=str(tmp_path / "new")))
    assert str(failed.traceback[-1].path).endswith("<cell cell1>")
    assert not (tmp_path / "new").exists()


def test_a_missing_run_gives_the_command_that_makes_it(tool, notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=r"^out/none is not there: run `python finetune.py` in "):
        tool.execute(notebook, {"RUN": "out/none"})


# ---------------------------------------------------------------- all of it, at toy size


@pytest.fixture(scope="module")
def toy(tool, tiny_run, tmp_path_factory):
    """(folder, {cell's id: cell}) of the whole notebook, run on models trained for a few steps."""
    folder = tmp_path_factory.mktemp("walkthrough")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        tool.main(tool.Config(run=tiny_run, images=12, steps=2, out="printed"))
    done = json.loads((folder / "printed/walkthrough.ipynb").read_text())
    return folder, {cell["id"]: cell for cell in done["cells"]}


@pytest.mark.slow
def test_the_whole_notebook_runs_and_draws_every_picture(toy, tool, notebook):
    folder, cells = toy
    names = {cell["id"] for cell in notebook["cells"] if tool.picture(cell)}
    assert names == {path.stem for path in (folder / "printed/pictures").glob("*.png")}
    for name in names:
        assert len(Image.open(folder / f"printed/pictures/{name}.png").convert("RGB").getcolors(10**6)) > 20
    assert {path.name for path in (folder / "out/walkthrough").iterdir() if path.is_dir()} == {
        "aligned", "free", "directed"}
    page = (folder / "printed/walkthrough.md").read_text()
    assert all(f"pictures/{name}.png)" in page for name in names)


@pytest.mark.slow
def test_the_warm_start_is_exact_and_only_p_new_breaks_it(toy, tool):
    _, cells = toy
    assert tool.printed(cells["warm-start"]) == "max |v - v_base| = 0.0, max |v_d| = 0.0\n"
    rows = tool.printed(cells["exercise_2"]).splitlines()
    assert len(rows) == 3
    found = {}
    for row in rows:
        change, detail = re.findall(r"= ([\d.e+-]+)", row)
        moved = re.search(r"moved by ([\d.e+-]+)", row)[1]
        found[row.split("  ")[0]] = (float(change), float(detail), float(moved))
    assert found["O_new"][0] == found["O_new"][2] == 0 < found["O_new"][1]
    assert found["P_new"][1] == 0 < min(found["P_new"][0], found["P_new"][2])
    assert min(found["P_new + O_new"]) > 0


@pytest.mark.slow
def test_the_exercises_trainings_differ_only_in_the_alignment(toy, read_log):
    import train_vae
    from davae import align_loss
    from support import runs
    folder = toy[0] / "out/walkthrough"
    settings, last = {}, {}
    for name in ("aligned", "free", "directed"):
        settings[name] = runs.read_config(runs.latest_checkpoint(folder / name))["config"]
        last[name] = read_log(folder / name)[-1]
        assert last[name]["step"] == 2
    changed = {key for key in settings["free"] if settings["free"][key] != settings["aligned"][key]}
    assert changed == {"out", "align"} and settings["free"]["align"] == 0
    assert settings["directed"] | {"out": ""} == settings["aligned"] | {"out": ""}
    assert len({row["l1"] for row in last.values()}) == 3           # and yet the results differ
    assert 0 < last["directed"]["align"] <= 2
    assert train_vae.align_loss is align_loss                       # restored
