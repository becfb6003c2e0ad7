"""kernels/bench.py: what it measures and how, and what is left of a run that fails, is late or is killed."""
import contextlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
import sample
from kernels import bench, goals, peers, trial


@pytest.fixture(autouse=True)
def kernels_off(monkeypatch):
    """Undoes what a section does to KERNELS."""
    monkeypatch.setattr(kernels, "KERNELS", "auto")


# ---------------------------------------------------------------- what is measured


def test_every_goal_finds_its_rows_among_those_of_the_benchmark(monkeypatch):
    """At full size, on the meta device: models are built without memory, and nothing is computed."""
    monkeypatch.setattr(sample, "time_grid", lambda *_: [0.0, 0.1, 0.2])
    rows, known = [], {}
    with torch.device("meta"):
        for section in (bench.operations, bench.training, bench.sampling):
            for what, variants, work in section(True):
                for name in variants:
                    row = {"what": what, "variant": name, "ms": [1.0, 1.0, 1.0], "GiB": 1.0}
                    rows.append(row | bench.rates(what, name, 1e-3, work, known))
    assert len({(row["what"], row["variant"]) for row in rows}) == len(rows)
    found = {row["goal"] for row in goals.verdicts(rows, "NVIDIA H100") if row["verdict"] == "not measured"}
    assert found == {"G1", "G8", "G16"}      # those that need another program, or more GPUs


@pytest.mark.parametrize("section,rows", [("operations", 24), ("training", 1), ("sampling", 9)])
def test_the_benchmarks_plain_variants_run_at_toy_size(section, rows):
    found = 0
    for _, variants, _ in getattr(bench, section)(False):
        plain = next(iter(variants.values()))
        plain()
        found += 1
    assert found == rows


def test_a_backward_pass_is_timed_with_random_gradients_that_are_made_once(monkeypatch):
    given = []
    grad = torch.autograd.grad

    def watch(outputs, inputs, douts):
        given.append(douts[0])
        return grad(outputs, inputs, douts)

    monkeypatch.setattr(torch.autograd, "grad", watch)
    x = torch.randn(40, dtype=torch.bfloat16)
    _, (_, back, _) = bench.both_ways("sin", {"ref": torch.sin}, [x], "GB/s", 1, 2)
    for _ in range(2):
        back["ref"]()
    assert given[0] is given[1] and given[0].std() > 0.5


def test_ten_recorded_calls_are_timed_at_once_and_failures_reported(monkeypatch):
    calls = []
    replays = []

    def replay():
        replays.append(1)
        time.sleep(0.01)

    def fails():
        raise RuntimeError("no kernel image")

    def no_compiler():
        raise OSError("no gcc")

    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())

    variants = {"works": lambda: calls.append(1), "fails": fails, "no compiler": no_compiler}
    rows = bench.measure(variants, True, time.time() + 60, graphs=True)
    assert len(calls) == 1 + 10                            # compiling, recording
    assert len(replays) == 10                              # ten rounds of one replay
    assert 1.0 <= rows["works"]["ms"][0] < 5               # 10 ms for ten calls
    assert "no kernel image" in rows["fails"]["error"]
    assert "no gcc" in rows["no compiler"]["error"]


def test_a_training_step_is_timed_with_what_was_chosen_from_its_forward_pass(monkeypatch, tmp_path):
    """The real choice, but in this process, without a compiler, and by interpreted kernels or none."""
    tried = []

    def in_place(calls, rows, device, compiled):
        for n, call in enumerate(calls):
            tried.append(call["op"])
            rows[n] = trial.timed(*trial.judged(call, device, compiled, {}, lambda name: None), device)
        return ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr("kernels.choose.SMALLEST", 0)
    monkeypatch.setattr("kernels.choose.try_apart", in_place)
    monkeypatch.setattr(trial, "by_compiler", lambda function: function)
    monkeypatch.setattr(bench, "backend", lambda cuda: "eager")
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    (_, variants, _), = bench.training(False)
    rows = bench.measure({"auto, compiled": variants["auto, compiled"]}, False, time.time() + 60)
    assert rows["auto, compiled"]["rounds"] == 3 and "error" not in rows["auto, compiled"]
    assert {"patch_embed", "norm_modulate", "qknorm_rope", "add_norm_modulate", "swiglu"} <= set(tried)


@pytest.mark.parametrize("script,said,passed", [
    ("echo 5 passed", "5 passed", True),
    ("echo FAILED tests/test_x.py::test_y; echo 1 failed; exit 1", "1 failed", False),
    ("echo half of them; sleep 9 & echo $! > worker; sleep 9", "not finished in 1 s: half of them", False),
])
def test_the_tests_are_a_row_with_their_last_line_even_if_they_do_not_end(
        script, said, passed, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(bench, "ENDS", {"tests": 1})
    since = time.time()
    row = bench.run_tests()
    assert time.time() - since < 3                         # does not wait for what the tests have started
    assert (row["error"], row["passed"]) == (said, passed)
    assert row["failed"] == (["FAILED tests/test_x.py::test_y"] if "FAILED" in script else [])
    if "worker" in script:                                 # which would go on to use the GPU
        worker = Path(f"/proc/{(tmp_path / 'worker').read_text().strip()}")
        while worker.exists() and time.time() - since < 8:
            time.sleep(0.1)                                # a killed process takes a moment
        assert time.time() - since < 8                     # and did not sleep on


# ---------------------------------------------------------------- a whole run


def test_without_a_gpu_one_sentence_names_what_a_cpu_can_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="^no GPU .*: give --device=cpu .*, or --rehearse "):
        bench.main()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(section, ...) -> bench.json's rows, of a rehearsal of these instead of the three sections."""
    def run(*sections):
        for name, section in zip(("operations", "training", "sampling"), sections, strict=True):
            section.__name__ = name
            monkeypatch.setattr(bench, name, section)
        monkeypatch.setattr(sys, "argv", ["bench", "--rehearse", f"--out={tmp_path / 'bench.json'}"])
        with contextlib.suppress(KeyboardInterrupt):
            bench.main()
        return json.loads((tmp_path / "bench.json").read_text())["rows"]
    return run


def nothing(cuda):
    yield from ()


def one(cuda):
    yield "one", {"plain": lambda: None}, {}


def test_a_run_that_is_killed_leaves_the_rows_it_has_measured(run, capsys):
    def killed(cuda):
        yield "first", {"plain": lambda: None}, {}
        raise KeyboardInterrupt

    rows = run(one, killed, nothing)
    assert [row["what"] for row in rows] == ["one", "first"]
    assert "| first | plain | 0." in capsys.readouterr().out


def test_a_model_that_cannot_be_built_is_a_line_and_the_next_section_runs(run):
    def fails(cuda):
        yield "first", {"plain": lambda: None}, {}
        raise torch.OutOfMemoryError("tried to allocate 90 GiB")

    rows = run(fails, one, nothing)
    assert [row["what"] for row in rows] == ["first", "the rest of operations", "one"]
    assert rows[1]["error"] == "OutOfMemoryError: 'tried to allocate 90 GiB'"


def test_after_a_sections_deadline_no_model_is_built(run, monkeypatch):
    def late(cuda):
        yield "first", {"plain": lambda: None}, {}
        pytest.fail("built")

    clock = iter([0, 1, *[10_000] * 100])       # seconds
    monkeypatch.setattr(bench, "time", SimpleNamespace(
        time=lambda: next(clock), strftime=time.strftime, perf_counter=time.perf_counter))
    rows = run(late, one, nothing)
    assert [row["what"] for row in rows] == ["first"] + [
        f"the rest of {name}" for name in ("operations", "training", "sampling")]
    assert {row["error"] for row in rows} == {"skipped: out of time"}


def test_bench_on_a_cpu_runs_the_peers_and_rehearses_only_on_request(monkeypatch, tmp_path):
    called = []

    def training(cuda):
        called.append(("training", cuda))
        yield "a step", {"plain": lambda: None}, {}

    monkeypatch.setattr(peers, "main", lambda: called.append("peers"))
    monkeypatch.setattr(bench, "training", training)
    out = tmp_path / "bench.json"
    for arguments in (["--device=cpu"], ["--rehearse", "--only=training", f"--out={out}"]):
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        bench.main()
    assert called == ["peers", ("training", False)]
    found = json.loads(out.read_text())
    assert "a rehearsal" in found["machine"] and [row["what"] for row in found["rows"]] == ["a step"]
