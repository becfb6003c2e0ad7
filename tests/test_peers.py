"""kernels/peers.py: both sides of a row compute the same, and whatever slows both down cancels out."""
import subprocess
import sys
import time

import pytest
import torch

from kernels import peers
from support import metrics

metrics.import_torchvision()                       # as peers.main does; the peers import it


@pytest.fixture
def clock(monkeypatch):
    """clock(work) -> a function that takes this much CPU time, plus 5 % of it per call so far."""
    now = [0.0]
    calls = [0]
    monkeypatch.setattr(peers, "cpu_seconds", lambda: now[0])

    def make(work):
        def run():
            calls[0] += 1
            now[0] += work * (1 + 0.05 * calls[0])
        return run
    return make


def test_a_ratio_is_unaffected_by_a_machine_that_slows_down(clock, monkeypatch):
    monkeypatch.setattr(peers, "SECONDS", 0)
    for ours, theirs in ((3, 2), (2, 3), (1, 1)):
        (low, median, high), rounds, _, apart = peers.measure(clock(ours), clock(theirs))
        assert low == pytest.approx(ours / theirs) and high == pytest.approx(ours / theirs)
        assert median == pytest.approx(ours / theirs)
        assert rounds == peers.ROUNDS[0] and apart == ""


def test_cpu_time_includes_child_processes_and_excludes_waiting():
    since = peers.cpu_seconds()
    time.sleep(0.2)
    assert peers.cpu_seconds() - since < 0.1
    subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)
    assert peers.cpu_seconds() - since > 0.1


def test_slower_rows_and_missing_packages_are_reported(clock, monkeypatch, capsys):
    def slow():
        yield "as fast", clock(101), clock(100)
        yield "slow", clock(11), clock(10)

    def missing():
        import nothing_of_this_name
        yield nothing_of_this_name

    monkeypatch.setattr(peers, "SECONDS", 0)
    monkeypatch.setattr(peers, "SECTIONS", {missing: "nothing", slow: "a peer"})
    threads = torch.get_num_threads()
    peers.main()
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "| missing | nothing | not installed: No module named 'nothing_of_this_name' |" in said
    assert "| slow | a peer | 1.10 (1.10 to 1.10) |" in said
    assert "slower than a peer by more than 2 %: slow: 1.10\n" in said


slow = pytest.mark.slow
SECTIONS = [
    ("frechet", "torch_fidelity", 1e-6, 1e-6),
    ("image_metrics", "torchmetrics", 1e-3, 1e-3),         # theirs has a border and uses float32
    ("images", "torchvision", 1e-6, 1e-6),
    ("update", "torch", 1e-5, 1e-5),
    pytest.param("mmdit", "diffusers", 1e-5, 0.02, marks=slow),
    pytest.param("autoencoder", "diffusers", 5e-5, 0.1, marks=slow),
    ("tiny_autoencoder", "diffusers", 1e-5, 0.02),
]


@pytest.mark.parametrize("section,peer,float32,bfloat16", SECTIONS)
def test_both_sides_of_a_row_compute_the_same(section, peer, float32, bfloat16):
    pytest.importorskip(peer)
    for what, ours, theirs in getattr(peers, section)():
        most = bfloat16 if what.endswith("bfloat16") else float32
        assert float(peers.difference(ours(), theirs())) <= most, what
