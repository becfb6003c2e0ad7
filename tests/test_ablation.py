"""experiments/ablation.py: which commands make an arm, what counts as a difference, and the report."""
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import finetune
import train_vae
from experiments import ablation
from experiments.ablation import ARMS, JUDGED, Config, commands, number, verdict
from support import config


def line(arm, seed, fd, psnr=19.0, row="samples", losses=None):
    """A cell's line with these numbers."""
    samples = {row: {"Probe-FD": fd, "Probe-KID": 0.01}, "base only, bicubic": {"Probe-FD": 1.5}}
    return {"arm": arm, "seed": seed, "seconds": 60, "setting": ablation.setting_of(Config()),
            "reconstruction": {"DA-VAE": {"psnr": psnr, "Probe-FD": 0.5},
                               "base only, bilinear": {"psnr": 16.0, "Probe-FD": 1.1}},
            "samples, cfg 1": samples, "samples, cfg 2": samples,
            "loss by time": {"base": [[0.1, 0.9], [0.2, 0.6]], "detail": [[0.1, 0.9], [0.4, 0.5]]},
            "curves": {"step": list(range(10, 90, 10)), "detail": [0.9] * 8,
                       "base": losses or [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]}}


def cells_of(**arms):
    """{arm: {seed: line}} from each arm's distances, one per seed."""
    return {name.replace("_", " "): {seed: line(name, seed, fd) for seed, fd in enumerate(values)}
            for name, values in arms.items()}


@pytest.mark.parametrize("values,said", [
    ((0.5, 0.6, 0.7), "better than paper"),                           # each 0.3 below; the range is 0.2
    ((1.1, 1.2, 1.3), "worse than paper"),
    ((0.7, 0.8, 0.9), "no difference"),                               # the same sign, but less than the range
    ((0.1, 0.2, 1.1), "no difference"),                               # large mean, but not for every seed
])
def test_a_difference_counts_if_all_seeds_agree_in_sign_and_it_exceeds_the_papers_range(values, said):
    cells = cells_of(paper=(0.8, 0.9, 1.0), no_alignment=values)
    assert verdict(cells, "no alignment").endswith(said)
    assert verdict(cells, "paper") == ""


def test_arms_are_compared_on_the_seeds_they_share():
    cells = cells_of(paper=(0.8, 0.9), no_alignment=(0.3, 0.4, 5.0))
    assert verdict(cells, "no alignment") == "-0.500, 2 of 2 below: better than paper"
    assert verdict(cells_of(paper=(0.8,), no_alignment=(0.3,)), "no alignment") == ""     # too few seeds


@pytest.mark.parametrize("values,said", [
    ((0.70, 0.82, 0.90), "better than paper"),                        # -0.093 on average; chance makes 0.05
    ((0.78, 0.88, 0.98), "no difference"),                            # the same sign, but less than chance
    ((0.60, 0.70, 1.01), "no difference"),
])
def test_the_chance_verdict_needs_a_larger_difference_than_other_seeds_on_the_same_base(values, said):
    cells = cells_of(paper=(0.8, 0.9, 1.0), no_alignment=values)
    cells["paper, again"] = cells_of(again=(0.85, 0.9, 0.96))["again"]
    assert verdict(cells, "no alignment").endswith(f"no difference; beside chance: {said}")
    assert verdict(cells, "paper, again").endswith("of 3 below: no difference")


def test_an_arm_with_the_papers_davae_is_held_against_other_seeds_of_the_transformer_alone():
    cells = cells_of(paper=(0.8, 0.9, 1.0), no_schedule=(0.77, 0.86, 0.97), no_alignment=(0.77, 0.86, 0.97))
    cells["paper, again"] = cells_of(again=(0.9, 0.8, 1.0))["again"]               # chance makes 0.1
    assert verdict(cells, "no schedule").endswith("beside chance: no difference")
    cells["paper, DiT again"] = cells_of(again=(0.81, 0.89, 1.0))["again"]         # only 0.01
    assert verdict(cells, "no schedule").endswith("beside chance: better than paper")
    assert verdict(cells, "no alignment").endswith("beside chance: no difference")
    assert verdict(cells, "paper, DiT again").endswith("of 3 below: no difference")


def test_the_papers_own_range_covers_only_the_seeds_compared():
    cells = cells_of(paper=(0.8, 0.9, 3.0), no_alignment=(0.3, 0.4))
    assert verdict(cells, "no alignment").endswith("2 of 2 below: better than paper")


def test_every_number_in_the_table_matches_its_heading():
    """On a line whose numbers all differ."""
    def rows(first):
        names = ("samples", "base only, bilinear", "base only, bicubic")
        metrics = ("Probe-FD", "Probe-KID", "judged sharp")
        return {row: {metric: first + 3 * i + j for j, metric in enumerate(metrics)}
                for i, row in enumerate(names)}

    full = {"reconstruction": {"base only, bilinear": {"psnr": 1, "Probe-FD": 2, "Probe-KID": 3},
                               "DA-VAE": {"psnr": 4, "Probe-FD": 5, "Probe-KID": 6}},
            "samples, cfg 1": rows(10), "samples, cfg 2": rows(20),
            "loss by time": {"base": [[0.25, 0.75], [40, 42]], "detail": [[0.25, 0.75], [50, 54]]},
            "details": {"full details": {"psnr": 60, "ssim": 61}, "zero details": {"psnr": 62, "ssim": 63},
                        "random details": {"psnr": 64, "ssim": 65},
                        "base spectrum": {"lowest": 70, "highest": 71},
                        "detail spectrum": {"lowest": 72, "highest": 73}}}
    found = {metric: number(full, metric) for metric in ablation.METRICS}
    assert found == {
        "PSNR (dB)": 4, "FD, reconstructions": 5, "FD, samples": 10, "FD, cfg 2": 20,
        "FD, cfg 2, less reconstructions'": 15, "judged sharp, cfg 2": 22, "KID, cfg 2": 21,
        "FD, base only, cfg 2": 26, "base loss, held out": 41, "detail loss, held out": 52,
        "PSNR, details 0": 62, "PSNR, random details": 64, "detail power, highest ring": 73}
    for group in ("samples, cfg 1", "samples, cfg 2"):                # the base model only has enlarged ones
        del full[group]["samples"]
    assert [number(full, metric) for metric in ("FD, samples", JUDGED)] == [13, 23]
    assert number(full, "judged sharp, cfg 2") is None
    assert [number(full, metric) for metric in ("PSNR (dB)", "FD, reconstructions", ablation.ADDED)] == [
        1, 2, 21]


def test_the_reports_curves_average_the_seeds_over_the_steps_they_all_have():
    cells = {"paper": {seed: line("paper", seed, 0.8, losses=losses)
                       for seed, losses in enumerate(([1.0] * 8, [2.0] * 7))}}
    assert ablation.mean_curves(cells, "base") == {"paper": [list(range(10, 80, 10)), [1.5] * 7]}


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """cell(arm, **changes) -> (its line, the commands); no script runs, only its files are written."""
    def make(arm, **changes):
        cfg = Config(out=str(tmp_path / "out"), n=123, **changes)
        executed = []

        def execute(command):
            executed.append(command)
            script, *words = shlex.split(command)
            run = Path(words[0])
            flags = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
            if script == "finetune.py":
                Path(flags["out"]).mkdir(parents=True, exist_ok=True)
                rows = [{"step": k, "base": 0.5 / k, "detail": 2.0 / k, "lr": 0.1} for k in (1, 3)]
                Path(flags["out"], "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            if script == "evaluate.py":
                entries = [{"reconstruction": {"DA-VAE": {"psnr": 100.0 * old + 20.123456, "img/s": 3.0,
                                                          "images": 8, "positions": 64}},
                            "generation": {"samples": {"Probe-FD": 100.0 * old + float(flags["cfg"])}}}
                           for old in (1, 0)]                         # the later one counts
                Path(flags["out"]).write_text(json.dumps(entries))
            curves = {"base": [[0.1, 0.9], [3.0, 1.0]], "detail": [[0.1, 0.9], [7.0, 5.0]]}
            for name in ("timebins", "spectrum"):
                if script == f"experiments/{name}.py":
                    (run / f"{name}.json").write_text(json.dumps({"panels": [["x", "y", "-", curves]]}))
            if script == "experiments/sensitivity.py":
                (run / "sensitivity.json").write_text(json.dumps({"table": {"zero details": {"psnr": 17.0}}}))

        monkeypatch.setattr(ablation, "execute", execute)
        return ablation.run_cell(cfg, arm, 0), [shlex.split(command) for command in executed]
    return make


def test_a_cells_line_holds_what_evaluate_and_the_experiments_measured(cell, tmp_path):
    found, executed = cell("paper")
    run = str(tmp_path / "out/tiny/seed0/paper")
    assert all(words[1] == run for words in executed if words[0].startswith(("evaluate", "experiments")))
    assert found["curves"] == {"step": [1, 3], "base": [0.5, 0.1667], "detail": [2.0, 0.6667]}
    assert found["reconstruction"] == {"DA-VAE": {"psnr": 20.123}}    # five digits, no speed, no count
    assert [found[f"samples, cfg {k}"]["samples"] for k in (1, 2)] == [{"Probe-FD": 1.0}, {"Probe-FD": 2.0}]
    assert found["loss by time"]["detail"] == [[0.1, 0.9], [7.0, 5.0]]
    assert found["details"] == {"zero details": {"psnr": 17.0}, "base spectrum": {"lowest": 3, "highest": 1},
                                "detail spectrum": {"lowest": 7, "highest": 5}}
    assert [words[2:4] for words in executed if words[0] == "evaluate.py"] == 2 * [["--n=123", "--steps=25"]]


def test_photo_runs_are_measured_on_held_out_photos_and_the_base_has_no_details(cell, tmp_path):
    photos = dict(preset="photos", data_dir="my photos", eval_dir="others", lpips_trunk="net.pth")
    found, executed = cell("half size", **photos)
    measured = [words for words in executed if words[0].startswith(("evaluate", "experiments"))]
    assert [words[0] for words in measured] == ["evaluate.py"] and "details" not in found
    assert measured[0][1] == str(tmp_path / "out/photos/seed0/base-dit")
    _, executed = cell("no schedule", **photos)
    for words in executed:
        training = words[0] in ("train_vae.py", "finetune.py")
        assert ("--data_dir=my photos" in words, "--data_dir=others" in words) == (training, not training)


@pytest.mark.parametrize("preset,flags", [("tiny", ""), ("photos", ""), ("photos", "--steps=200 --N=133")])
def test_a_transformer_from_scratch_has_the_bases_size_and_adds_its_steps_at_equal_compute(preset, flags):
    def parsed(arm):
        made, _ = commands(Config(preset=preset, dit_flags=flags), arm, 0)
        return [config.cli(finetune.Config, finetune.PRESETS, argv=words)
                for script, *words in map(shlex.split, made) if script == "finetune.py"]

    base, paper = parsed("paper")
    for arm, steps in (("scratch", paper.steps), ("scratch, equal compute", paper.steps + base.steps)):
        scratch, = parsed(arm)
        assert (scratch.base, scratch.steps) == ("", steps)
        assert [getattr(scratch, name) for name in ("p", "E", "depth", "A")] == [
            getattr(base, name) for name in ("p", "E", "depth", "A")]


@pytest.mark.parametrize("preset", ["tiny", "photos"])
def test_every_arm_is_a_command_line_the_scripts_accept(preset, monkeypatch):
    cfg = Config(preset=preset, base="taef2", data_dir="my photos", eval_dir="eval", lpips_trunk="net.pth")
    scripts = {"train_vae.py": train_vae, "finetune.py": finetune}
    made = set()
    for name in ARMS:
        trained, run = commands(cfg, name, 3)
        for command in trained:
            script, *words = shlex.split(command)
            module = scripts[script]
            parsed = config.cli(module.Config, module.PRESETS, argv=words)
            assert parsed.seed == (1003 if name.endswith("again") and "--seed=1003" in command else 3)
        assert parsed.out == run                                      # the last one is measured
        made.add((run, trained[-1]))
    assert len(made) == len(ARMS)                                     # no two arms are the same run


def test_an_arm_changes_what_its_name_says_and_shares_the_rest():
    cfg = Config()
    paper, _ = commands(cfg, "paper", 0)
    no_schedule, _ = commands(cfg, "no schedule", 0)
    no_alignment, _ = commands(cfg, "no alignment", 0)
    scratch, _ = commands(cfg, "scratch, equal compute", 0)
    assert no_schedule[:-1] == paper[:-1] and "--N=0" in no_schedule[-1]
    assert set(paper[:2]) <= set(no_alignment) and "--align=0" in no_alignment[2]
    assert paper[2] in no_alignment                                   # the same base DiT
    presets = finetune.PRESETS
    assert f"--steps={presets['tiny']['steps'] + presets['tiny-base']['steps']}" in scratch[-1]
    assert "--base= " in scratch[-1] and not any("tiny-base --" in c and "finetune" in c for c in scratch)


@pytest.mark.parametrize("preset", ["tiny", "photos"])
@pytest.mark.parametrize("name", ["space to depth", "closed, aligned"])
def test_the_decoder_of_fixed_basis_details_trains_with_every_loss_but_alignment(preset, name):
    stage1 = []
    for arm in ("paper", name):
        trained, _ = commands(Config(preset=preset, base="taef2"), arm, 0)
        last = [shlex.split(command)[1:] for command in trained if command.startswith("train_vae.py")][-1]
        stage1.append(vars(config.cli(train_vae.Config, train_vae.PRESETS, argv=last)))
    changed = {field for field in stage1[0] if stage1[0][field] != stage1[1][field]}
    changed -= {"out", "given", "changed"}
    assert {"train", "align"} <= changed <= {"fit", "train", "align", "adaptive_align"}
    assert stage1[1]["train"] == "up"


def test_the_report_is_made_from_the_lines_alone(tmp_path, capsys):
    cells = [line("paper", 0, 0.8), line("paper", 1, 0.9), line("no schedule", 0, 0.4),
             line("no schedule", 1, 0.5), line("paper", 1, 1.0)]      # a cell that was run again
    cells[0]["details"] = {"zero details": {"psnr": 17.0}}
    half = line("half size", 0, 1.2, row="base only, bilinear")
    del half["curves"]["detail"]
    path = tmp_path / "tiny.jsonl"
    path.write_text("".join(json.dumps(cell) + "\n" for cell in [*cells, half]))
    found = ablation.main(Config(results=str(tmp_path), report=True))
    assert number(found["paper"][1], JUDGED) == 1.0
    text = (tmp_path / "tiny.md").read_text()
    assert "| paper | the method | 2 |" in text and "0.9 (0.8 to 1)" in text
    assert "17 (17 to 17; 1 of 2 seeds)" in text                      # not all cells have all numbers
    assert "-0.450, 2 of 2 below: better than paper" in text
    assert number(found["no schedule"][1], ablation.ADDED) == 0.0     # the samples' 0.5 less the decoder's
    assert "| half size |" in text and "1.2 (1.2 to 1.2)" in text
    assert Image.open(tmp_path / "tiny.png").width == 1300


def test_all_settings_stand_side_by_side_and_bold_is_what_counts(tmp_path):
    def write(name, **arms):
        text = [json.dumps(line(arm.replace("_", " "), seed, fd)) + "\n"
                for arm, values in arms.items() for seed, fd in enumerate(values)]
        (tmp_path / f"{name}.jsonl").write_text("".join(text))
    scratch = {"scratch": (0.9, 1.0, 1.12)}                           # 0.107 above
    write("long", paper=(0.8, 0.9, 1.0), no_alignment=(0.7, 0.82, 0.9), **{"paper,_again": (0.85, 0.9, 0.96)})
    write("photos", paper=(80.0, 81.0, 82.0), no_alignment=(78.0, 82.0, 75.0), SLS=(70.0, 71.0, 70.0))
    write("tiny", paper=(0.8, 0.9, 1.0), SLS=(0.4,), **scratch)
    ablation.main(Config(name="long", results=str(tmp_path), report=True))
    rows = [row.split(" | ") for row in (tmp_path / "README.md").read_text().splitlines() if row[:1] == "|"]
    table = {name.removeprefix("| "): [text.removesuffix(" |") for text in found] for name, *found in rows}
    assert table["arm"] == ["long", "photos", "tiny"]
    assert table["paper"] == ["0.9", "81", "0.9"]
    assert table["paper, again"] == ["0.05 at most", "", ""]
    assert table["no alignment"] == ["**−0.093, 3 of 3**", "−2.7, 2 of 3", ""]      # beyond chance; not all
    assert table["SLS"] == ["", "**−11, 3 of 3**", "−0.4, 1 of 1"]                  # beyond the range; one
    assert table["scratch"] == ["", "", "+0.11, 3 of 3"]                            # within the range, 0.2
    assert "VF, mean" not in table


def test_a_log_of_few_rows_is_averaged_over_those():
    cells = {"paper": {0: line("paper", 0, 0.8, losses=[0.9, 0.7])},
             "scratch": {0: line("scratch", 0, 0.8, losses=[0.9, 0.6])},
             "ADT": {0: line("ADT", 0, 0.8, losses=[0.9, 0.8])}}
    for arm in cells.values():
        arm[0]["curves"]["step"] = [10, 20]
    assert [ablation.steps_to_paper(cells, name) for name in cells] == ["20", "20", "never"]


def test_an_arm_reaches_the_papers_loss_when_its_mean_over_five_rows_does():
    fast = [0.9, 0.4, 0.4, 0.4, 0.4, 0.4, 0.3, 0.3]                   # the mean of paper's last five is 0.4
    cells = {"paper": {0: line("paper", 0, 0.8), 1: line("paper", 1, 0.8)},
             "scratch": {0: line("scratch", 0, 0.8, losses=fast),
                         1: line("scratch", 1, 0.8, losses=[0.5] * 7 + [0.1])}}
    assert ablation.steps_to_paper(cells, "paper") == "80, 80"
    assert ablation.steps_to_paper(cells, "scratch") == "60, never"


def test_another_setting_gets_its_own_folders_and_results(tmp_path):
    cfg = Config(name="short", vae_flags="--D=56", dit_flags="--D=56 --steps=140")
    made, run = commands(cfg, "no schedule", 1)
    assert run == "out/ablation/short/seed1/no-schedule"
    assert "--D=56" in made[1] and "--D=56" not in made[0]            # not the base VAE's
    assert "--D=56 --steps=140" in made[-1] and "--steps" not in made[2]
    with pytest.raises(SystemExit, match="short.jsonl: has no cells yet"):
        ablation.main(Config(name="short", report=True, results=str(tmp_path)))


def test_bad_requests_get_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"--arms: 'papers' is none of paper \| paper, again"):
        ablation.main(Config(arms="papers", results=str(tmp_path)))
    with pytest.raises(SystemExit, match="has no cells yet; run without --report=True"):
        ablation.main(Config(report=True, results=str(tmp_path)))


def test_a_truncated_line_is_named_and_no_cell_is_lost_silently(tmp_path):
    path = tmp_path / "tiny.jsonl"
    whole = json.dumps(line("paper", 0, 0.8)) + "\n"
    path.write_text(whole + whole[:40])
    with pytest.raises(SystemExit, match="line 2 is damaged; delete it, and its cell is run again"):
        ablation.main(Config(results=str(tmp_path), report=True))


@pytest.mark.parametrize("preset,flags,levels", [
    ("tiny", "", "0,8,16,24"), ("tiny", "--D=56 --steps=140", "0,18,37,56"), ("photos", "", "0,32,64,96")])
def test_hidden_details_come_in_thirds_of_all_that_there_are(preset, flags, levels):
    made, _ = commands(Config(preset=preset, dit_flags=flags), "SLS + ADT", 0)
    assert f"--keep_levels={levels}" in made[-1] and f"--keep_levels={levels}" in made[-3]


def test_cells_of_another_setting_are_not_taken_for_this_ones(tmp_path):
    """The repository comes with cells: of other photos, or of more steps than are asked for."""
    path = tmp_path / "tiny.jsonl"
    path.write_text(json.dumps(line("paper", 0, 0.8)) + "\n")
    before = path.read_bytes()
    cfg = Config(arms="paper", seeds=(0,), results=str(tmp_path), n=50, dit_flags="--steps=3")
    with pytest.raises(SystemExit, match=r"another setting \(n 2000 -> 50, dit_flags '' -> '--steps=3'\)"):
        ablation.main(cfg)
    assert path.read_bytes() == before
    assert ablation.main(replace(cfg, report=True))["paper"][0]["seed"] == 0       # a report runs nothing


def test_cells_run_once_seed_by_seed_and_survive_a_later_failure(tmp_path, monkeypatch):
    ran = []

    def run_cell(cfg, name, seed):
        ran.append((seed, name))
        if len(ran) == 3:
            raise SystemExit("the disk is full")
        return line(name, seed, 0.5 + seed)

    monkeypatch.setattr(ablation, "run_cell", run_cell)
    monkeypatch.setattr(ablation.figures, "plot", lambda *_, **__: None)
    cfg = Config(arms="paper|no schedule", seeds=(0, 1), results=str(tmp_path / "new"))
    with pytest.raises(SystemExit, match="the disk is full"):
        ablation.main(cfg)
    assert ran == [(0, "paper"), (0, "no schedule"), (1, "paper")]
    found = ablation.main(replace(cfg, seeds=(0, 1, 2)))
    assert ran[3:] == [(1, "paper"), (1, "no schedule"), (2, "paper"), (2, "no schedule")]
    assert ablation.main(replace(cfg, report=True)) == found and len(ran) == 7
    assert {arm: sorted(cells) for arm, cells in found.items()} == {"paper": [0, 1, 2],
                                                                    "no schedule": [0, 1, 2]}
    assert "0.1 hours of cells in all" in (tmp_path / "new/tiny.md").read_text()      # six of a minute each


@pytest.mark.slow
def test_two_arms_run_from_nothing_and_finished_cells_do_not_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--steps=2 --images=16 --batch_size=4 --micro_batch=4 --log_every=1 --save_every=0 --device=cpu "
             "--dtype=float32")
    cfg = Config(arms="paper|space to depth", seeds=(0,), n=20, results=str(tmp_path / "results"),
                 train_flags=flags)
    found = ablation.main(cfg)
    assert set(found) == {"paper", "space to depth"} and "loss by time" in found["paper"][0]
    lines = Path("results/tiny.jsonl").read_text()
    monkeypatch.setattr(ablation, "execute", lambda command: pytest.fail("run again"))
    ablation.main(cfg)
    assert Path("results/tiny.jsonl").read_text() == lines
