"""figures.py: grids of images, curves of a log, tables of runs."""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image
from support import data, figures


@pytest.fixture(scope="module")
def drawn():
    """Five procedural images of 64 pixels: (5, 3, 64, 64) in [-1, 1]."""
    return data.to_tensor(data.stack(data.Procedural(64, 5), range(5))[0])


# ---- grids ----

def test_save_grid_places_every_cell(tmp_path, drawn):
    x = drawn
    figures.save_grid(x, tmp_path / "grid.png", columns=3, scale=2)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * 130 + 2, 3 * 130 + 2, 3)
    cells = data.to_uint8(x).repeat(2, axis=1).repeat(2, axis=2)
    for i in range(5):
        top, left = 2 + i // 3 * 130, 2 + i % 3 * 130
        assert np.array_equal(sheet[top:top + 128, left:left + 128], cells[i])
    assert (sheet[:2] == 255).all() and (sheet[:, :2] == 255).all() and (sheet[132:, 262:] == 255).all()
    assert os.listdir(tmp_path) == ["grid.png"]


def test_two_jobs_that_write_one_grid_at_once_leave_it_whole(tmp_path, drawn, monkeypatch):
    real = Image.Image.save
    others = [tmp_path / "grid.png"]

    def meanwhile(image, *args):
        real(image, *args)
        if others:
            figures.save_grid(drawn, others.pop(), columns=5)

    monkeypatch.setattr(Image.Image, "save", meanwhile)
    figures.save_grid(drawn, tmp_path / "grid.png", columns=3)
    assert Image.open(tmp_path / "grid.png").width == 3 * 66 + 2 and os.listdir(tmp_path) == ["grid.png"]


def test_a_grid_with_two_names_is_the_same_file_twice(tmp_path, drawn):
    figures.save_grid(drawn, tmp_path / "a.png", columns=3, also=tmp_path / "b.png")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "b.png").width == 3 * 66 + 2


def test_a_grid_too_large_for_a_phone_is_scaled_down(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(figures, "LARGEST_GRID", 100)               # three columns of 64 pixels exceed it
    figures.save_grid(drawn, tmp_path / "grid.png", columns=3, labels=["drawing"] * 5)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"), dtype=float)
    assert sheet.shape == (2 * (32 + 12 + 2) + 2, 3 * 34 + 2, 3)
    wanted = data.to_uint8(drawn[:1])[0].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert abs(sheet[14:46, 2:34] - wanted).max() <= 0.5


def test_save_grid_writes_labels_above_the_cells(tmp_path, drawn):
    figures.save_grid(drawn[:2], tmp_path / "grid.png", columns=2, labels=["cat 日", ""])
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 + 64 + 12 + 2, 2 + 2 * 66, 3)
    assert (sheet[2:14, 2:66] < 128).any() and (sheet[2:14, 68:] == 255).all()
    assert np.array_equal(sheet[14:78, 2:66], data.to_uint8(drawn[:1])[0])


# ---- curves ----

def write_log(run, rows):
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def plotted(monkeypatch):
    """The panels passed to `figures.plot`, which still draws them."""
    seen, plot = [], figures.plot

    def spy(panels, *rest, **more):
        seen.extend(panels)
        plot(panels, *rest, **more)

    monkeypatch.setattr(figures, "plot", spy)
    return seen


def test_plot_draws_panels_given_as_tuples(tmp_path):
    curves = {"a": [[1, 2, 3], [1, 10, 100]], "b": [[1, 2], [4, 5]]}
    panels = [("x", "power of x", "o-", curves), ("", "", ".", {"a": [[0, 1], [1, 0]]})]
    figures.plot(panels, tmp_path / "plot.png", size=(6, 3))
    assert Image.open(tmp_path / "plot.png").size == (600, 300)


def test_powers_get_a_logarithmic_scale_and_an_embedding_gets_no_ticks(tmp_path, monkeypatch):
    axes = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure, file):
        axes.extend(figure.axes)
        savefig(figure, file)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    curves = {"a": [[1, 2, 3], [1, 10, 100]]}
    figures.plot([("x", label, "-", curves) for label in ("power of x", "y", "")], tmp_path / "a.png")
    assert [axis.get_yscale() for axis in axes] == ["log", "linear", "linear"]
    assert [len(axis.get_xticks()) > 0 for axis in axes] == [True, True, False]


def test_each_of_many_curves_has_a_look_of_its_own_even_in_a_panel_that_lacks_an_earlier_one(
        tmp_path, monkeypatch):
    drawn = {}
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure, file):
        for n, axis in enumerate(figure.axes):
            drawn.update({(n, line.get_label()): (line.get_color(), line.get_linestyle())
                          for line in axis.get_lines()})
        savefig(figure, file)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    names = [f"arm {k}" for k in range(23)]                           # more than there are colours
    curve = [[1, 2], [1, 2]]
    panels = [("x", "y", "-", dict.fromkeys(names, curve)), ("x", "z", "-", dict.fromkeys(names[1:], curve))]
    figures.plot(panels, tmp_path / "plot.png")
    assert all(drawn[1, name] == drawn[0, name] for name in names[1:])
    assert len({drawn[0, name] for name in names}) == 23


def test_a_metric_logged_every_other_row_has_a_panel(tmp_path, plotted, plot_losses):
    rows = [{"step": step, "loss": 1 / step, "lr": 1.0, "w": 0.5, "img/s": 9.0} for step in range(1, 8)]
    for row in rows[1::2]:
        row["fid"] = 100.0 / row["step"]                            # not in the last row, of step 7
    plot_losses(write_log(tmp_path, rows))
    assert [panel[:3] for panel in plotted] == [("step", "loss", "-"), ("step", "fid", "-")]
    steps, values = plotted[1][3]["fid"]
    assert list(steps) == [2, 4, 6] and list(values) == [50.0, 25.0, pytest.approx(100 / 6)]
    assert list(plotted[0][3]["loss"][0]) == list(range(1, 8))
    assert Image.open(tmp_path / "loss.png").size == (560, 260)


def test_a_metric_that_starts_or_stops_mid_run_has_a_panel(tmp_path, plotted, plot_losses):
    plot_losses(write_log(tmp_path, [{"step": 1, "a": 1.0}, {"step": 2, "b": 2.0}]))
    assert [panel[3] for panel in plotted] == [{"a": ([1], [1.0])}, {"b": ([2], [2.0])}]


def test_the_later_of_two_rows_for_one_step_wins(tmp_path):
    rows = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (2, 20.0), (3, 30.0)]
    write_log(tmp_path, [{"step": step, "loss": loss} for step, loss in rows])
    assert figures.read_log(tmp_path)["loss"] == ([1, 2, 3, 4], [1.0, 20.0, 30.0, 4.0])


def test_a_run_that_logged_nothing_gets_no_plot_and_no_error(tmp_path, plot_losses):
    plot_losses(tmp_path)
    plot_losses(write_log(tmp_path, []))
    plot_losses(write_log(tmp_path, [{"step": 1, "lr": 0.1}]))
    assert os.listdir(tmp_path) == ["log.jsonl"]


# ---- tables ----

@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make_run(name, base, **summary) makes a run with one checkpoint; without a summary, no summary.json."""
    def make(name, trained_on="", /, **summary):
        folder = Path(name) / "step_000003"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"config": {"base": trained_on}}))
        if summary:
            (Path(name) / "summary.json").write_text(json.dumps(summary))

    monkeypatch.chdir(tmp_path)
    return make


def lines_of(capsys):
    return capsys.readouterr().out.rstrip("\n").split("\n")


def test_the_final_table_lists_each_run_after_its_bases(make_run, capsys):
    make_run("base-vae", stage="base VAE", steps=300, seconds=12.4, psnr=20.126)
    make_run("vae", "base-vae", stage="DA-VAE", steps=600, seconds=99.6, psnr=24.5, psnr_base=19.25)
    make_run("base", stage="base DiT", steps=400, seconds=1.0, base=0.8125)
    make_run("run", "base", stage="DA-VAE DiT", steps=900, seconds=7.0, base=0.75, detail=0.5, warm_start=0.0)
    figures.final_table(["vae", "base", "run"])
    expected = [
        "",
        "stage       folder                   steps  seconds  result",
        "base VAE    base-vae                   300       12  20.13 dB",
        "DA-VAE      vae                        600      100  24.50 dB, base only 19.25 dB",
        "base DiT    base                       400        1  loss base 0.812",
        "DA-VAE DiT  run                        900        7  "
        "loss base 0.750, detail 0.500; warm start off by 0.0",
    ]
    assert lines_of(capsys) == expected
    figures.final_table(["vae", "", "run"])                         # the base is found without being named
    assert lines_of(capsys) == expected


def test_a_missing_number_is_a_dash_in_the_final_table(make_run, capsys):
    make_run("base-vae", stage="base VAE", steps=3, seconds=1.0)
    make_run("vae", "base-vae", stage="DA-VAE", steps=3, seconds=1.0, psnr=None, psnr_base=19.25)
    make_run("base", stage="base DiT", steps=3, seconds=1.0)
    make_run("run", "base", stage="DA-VAE DiT", warm_start=0.0)
    figures.final_table(["vae", "base", "run"])
    assert lines_of(capsys)[2:] == [
        "base VAE    base-vae                     3        1  - dB",
        "DA-VAE      vae                          3        1  - dB, base only 19.25 dB",
        "base DiT    base                         3        1  loss base -",
        "DA-VAE DiT  run                          -        -  loss base -, detail -; warm start off by 0.0",
    ]


def test_a_base_shared_by_two_runs_is_listed_once(make_run, capsys):
    make_run("base-vae", stage="base VAE", steps=3, seconds=1.0, psnr=20.0)
    for name in ("one", "two"):
        make_run(name, "base-vae", stage="DA-VAE", steps=3, seconds=1.0, psnr=24.0, psnr_base=19.0)
    figures.final_table(["one", "two"])
    assert [line.split()[2] for line in lines_of(capsys)[2:]] == ["base-vae", "3", "3"]


def test_folders_without_a_summary_are_not_in_the_final_table(make_run, capsys):
    make_run("cut-off")
    make_run("vae", "taef2", stage="DA-VAE", steps=3, seconds=1.0, psnr=24.0, psnr_base=19.0)
    figures.final_table(["vae", "cut-off", "nowhere"])
    assert len(lines_of(capsys)) == 3


def test_report_vae_gives_both_psnrs_and_zero_is_printed_as_a_number(tmp_path, capsys):
    summary = {"seconds": 12.6, "psnr": 24.5, "psnr_base": 0.0}
    stage = SimpleNamespace(out=str(tmp_path), D=12, needed_by="out/dit")
    figures.report_vae(stage, summary, "8 images", [])
    stage.D = 0
    figures.report_vae(stage, summary | {"psnr": 0}, "8 images", [])
    said = [line.partition("; ")[2].partition(";")[0] for line in lines_of(capsys)]
    assert said == ["base only 0.00 dB, DA-VAE 24.50 dB on 8 images", "base VAE 0.00 dB on 8 images"]
    figures.print_table("t", {"row": {"KID": 0.0}})
    assert lines_of(capsys)[2].split() == ["row", "0"]


def test_stage_1_ends_with_the_next_commands_unless_it_is_a_stage_of_another_run(tmp_path, capsys):
    def end(**changes):
        values = dict(out=str(tmp_path), D=12, data_dir="procedural", lpips_trunk="", perceptual="vgg")
        figures.report_vae(SimpleNamespace(**values | changes), {"seconds": 1.0}, "8 images", ["follow"])
        return lines_of(capsys)[1:]

    measure = f"next: python evaluate.py {tmp_path}"
    assert end() == [measure, "      follow"]
    assert end(needed_by="out/dit") == []
    assert end(data_dir="photos", val_dir="eval")[0] == f"{measure} --data_dir=eval"
    assert (end(data_dir="photos", val_dir="", lpips_trunk="vgg.pth")[0]
            == f"{measure} --data_dir=HELD_OUT_IMAGES --perceptual=vgg --lpips_trunk=vgg.pth")


def test_print_table_aligns_its_columns_and_leaves_missing_values_blank(capsys):
    figures.print_table("held-out", {"one": {"psnr": 23.456, "a long metric": 1e-9}, "two": {"psnr": 3}})
    assert lines_of(capsys) == [
        "",
        "held-out" + " " * 26 + "  a long metric" + "      psnr",
        "one" + " " * 31 + "          1e-09" + "     23.46",
        "two" + " " * 31 + " " * 15 + "         3",
    ]
    figures.print_table("odd", {"row": {"FD": float("nan"), "IS": None, "KID": float("inf")}})
    assert lines_of(capsys)[2].split() == ["row", "nan", "-", "inf"]
    figures.print_table("nothing", {})
    assert capsys.readouterr().out == "\n"
