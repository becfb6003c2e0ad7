"""The promises to the reader: small files, imports that run one way, no broad excepts, a README whose facts are right."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = {"davae.py": 700, "dit.py": 700, "train_vae.py": 500, "finetune.py": 500, "sample.py": 500, "evaluate.py": 500,
         "data.py": 250, "common.py": 250}
LAYER = {"kernels": 0, "common": 0, "data": 0, "davae": 1, "dit": 1, "train_vae": 2, "sample": 2, "finetune": 3, "evaluate": 3}
SOURCES = sorted(p for p in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")])


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: p.name)
def test_files_and_functions_stay_small(file):
    source = file.read_text()
    assert source.count("\n") <= LINES.get(file.name, 300)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (200 if node.name == "main" else 60), f"{node.name} has {length} lines"
    assert max(map(len, source.splitlines())) <= 128


def test_the_whole_source_stays_under_five_thousand_lines():
    assert sum(p.read_text().count("\n") for p in SOURCES) <= 5000


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: p.name)
def test_imports_run_one_way(file):
    me = file.parent.name if file.parent != ROOT else file.stem
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for other in (name.split(".")[0] for name in names):
            if other in LAYER and other != me:
                # evaluate draws its own samples, so it may read sample.py's layer; nobody reads their own or a higher one
                assert LAYER[other] < LAYER[me], f"{me} imports {other}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: p.name)
def test_nothing_is_swallowed_and_nothing_is_left_lying_about(file):
    banned = r"except Exception|except:|strict=False|weights_only=False|0\.18215|/(root|home|tmp)/|\bTODO\b|\.cuda\(\)"
    assert not [line for line in file.read_text().splitlines() if re.search(banned, line)]


@pytest.mark.parametrize("name", [p.stem for p in SOURCES if p.parent == ROOT])
def test_importing_a_script_does_nothing_and_needs_none_of_the_optional_packages(name):
    code = (f"import sys; import {name}; "
            "print([m for m in ('triton', 'torchvision', 'lpips', 'torch_fidelity', 'diffusers', 'matplotlib') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def test_importing_everything_takes_a_moment_beside_torch():
    scripts = ", ".join(p.stem for p in SOURCES if p.parent == ROOT)
    code = f"import time, torch; since = time.perf_counter(); import {scripts}; print(time.perf_counter() - since)"
    seconds = sorted(float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)
                     for _ in range(3))
    assert seconds[1] < 0.9                        # 0.3 s is the goal; a busy machine takes longer


def test_every_file_and_function_that_the_readme_names_exists_and_its_line_counts_are_right():
    readme = (ROOT / "README.md").read_text()
    references = re.findall(r"`(\w+\.py):([\w.]+)`", readme)
    assert len(references) > 10
    for file, name in references:
        tree = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            tree = next(node for node in tree.body if getattr(node, "name", "") == part)
    for file, count in re.findall(r"^(\w+\.py) +(\d+)  ", readme, re.M):
        assert (ROOT / file).read_text().count("\n") == int(count), f"{file} has other than {count} lines"
    for picture in re.findall(r"\]\((tests/[^)]+)\)", readme):
        assert (ROOT / picture).exists()
