"""experiments/ablation.py: which commands make an arm, what counts as a difference, and the report."""
import json
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

import finetune
import train_vae
from experiments import ablation
from experiments.ablation import ARMS, JUDGED, Config, commands, number, verdict
from support import config


def line(arm, seed, fd, psnr=19.0, row="samples", losses=None):
    """A cell's line with these numbers in it."""
    samples = {row: {"Probe-FD": fd, "Probe-KID": 0.01}, "base only, bicubic": {"Probe-FD": 1.5}}
    return {"arm": arm, "seed": seed, "seconds": 60, "commands": [],
            "reconstruction": {"DA-VAE": {"psnr": psnr, "Probe-FD": 0.5}},
            "samples, cfg 1": samples, "samples, cfg 2": samples,
            "loss by time": {"base": [[0.1, 0.9], [0.2, 0.6]], "detail": [[0.1, 0.9], [0.4, 0.5]]},
            "curves": {"base": [list(range(10, 90, 10)), losses or [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]],
                       "detail": [[10, 20], [0.9, 0.5]]}}


def cells_of(**arms):
    """{arm: {seed: line}} of the distances of each arm, seed by seed."""
    return {name.replace("_", " "): {seed: line(name, seed, fd) for seed, fd in enumerate(values)}
            for name, values in arms.items()}


@pytest.mark.parametrize("values,said", [
    ((0.5, 0.6, 0.7), "better than paper"),                           # each 0.3 below; the range is 0.2
    ((1.1, 1.2, 1.3), "worse than paper"),
    ((0.7, 0.8, 0.9), "no difference"),                               # the same sign, but less than the range
    ((0.1, 0.2, 1.1), "no difference"),                               # much on the mean, not with every seed
])
def test_a_difference_counts_with_the_same_sign_for_every_seed_and_beyond_the_papers_own_range(values, said):
    cells = cells_of(paper=(0.8, 0.9, 1.0), no_alignment=values)
    assert verdict(cells, "no alignment").endswith(said)
    assert verdict(cells, "paper") == ""


def test_arms_are_compared_seed_by_seed_where_both_have_the_seed():
    cells = cells_of(paper=(0.8, 0.9), no_alignment=(0.3, 0.4, 5.0))
    assert verdict(cells, "no alignment") == "-0.500, 2 of 2 below: better than paper"
    assert verdict(cells_of(paper=(0.8,), no_alignment=(0.3,)), "no alignment") == ""     # one seed is none


@pytest.mark.parametrize("values,said", [
    ((0.70, 0.82, 0.90), "better than paper"),                        # -0.093 on the mean; chance makes 0.05
    ((0.78, 0.88, 0.98), "no difference"),                            # the same sign, but less than chance
    ((0.60, 0.70, 1.01), "no difference"),
])
def test_beside_chance_a_difference_counts_where_it_is_more_than_other_seeds_on_the_same_base(values, said):
    cells = cells_of(paper=(0.8, 0.9, 1.0), no_alignment=values)
    cells["paper, again"] = cells_of(again=(0.85, 0.9, 0.96))["again"]
    assert verdict(cells, "no alignment").endswith(f"no difference; beside chance: {said}")
    assert verdict(cells, "paper, again").endswith("of 3 below: no difference")


@pytest.mark.parametrize("preset", ["tiny", "photos"])
def test_every_arm_is_a_command_line_that_the_scripts_take(preset, monkeypatch):
    cfg = Config(preset=preset, base="taef2", data_dir="my photos", eval_dir="eval", lpips_trunk="net.pth")
    scripts = {"train_vae.py": train_vae, "finetune.py": finetune}
    made = set()
    for name in ARMS:
        trained, run = commands(cfg, name, 3)
        for command in trained:
            script, *words = shlex.split(command)
            module = scripts[script]
            parsed = config.cli(module.Config, module.PRESETS, argv=words)
            assert parsed.seed == (1003 if name == "paper, again" and "--seed=1003" in command else 3)
        assert parsed.out == run                                      # the last one is measured
        made.add((run, trained[-1]))
    assert len(made) == len(ARMS)                                     # no two arms are the same run


def test_an_arm_changes_what_it_says_and_shares_the_rest_of_its_seed():
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
def test_details_in_a_fixed_basis_are_decoded_with_all_losses_of_the_method_but_alignment(preset, name):
    stage1 = []
    for arm in ("paper", name):
        trained, _ = commands(Config(preset=preset, base="taef2"), arm, 0)
        last = [shlex.split(command)[1:] for command in trained if command.startswith("train_vae.py")][-1]
        stage1.append(vars(config.cli(train_vae.Config, train_vae.PRESETS, argv=last)))
    changed = {field for field in stage1[0] if stage1[0][field] != stage1[1][field]}
    assert {"train", "align"} <= changed - {"out", "given"} <= {"fit", "train", "align", "adaptive_align"}
    assert stage1[1]["train"] == "up"


def test_the_report_is_made_from_the_lines_alone(tmp_path, capsys):
    cells = [line("paper", 0, 0.8), line("paper", 1, 0.9), line("no schedule", 0, 0.4),
             line("no schedule", 1, 0.5), line("paper", 1, 1.0)]      # a cell that was run once more
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
    assert number(found["no schedule"][1], ablation.ADDED) == 0.0     # 0.5 of the samples, and of the decoder
    assert "| half size |" in text and "1.2 (1.2 to 1.2)" in text
    assert Image.open(tmp_path / "tiny.png").width == 1600


def test_an_arm_has_reached_the_papers_loss_where_the_mean_of_five_rows_has():
    fast = [0.9, 0.4, 0.4, 0.4, 0.4, 0.4, 0.3, 0.3]                   # paper's last five: a mean of 0.4
    cells = {"paper": {0: line("paper", 0, 0.8), 1: line("paper", 1, 0.8)},
             "scratch": {0: line("scratch", 0, 0.8, losses=fast),
                         1: line("scratch", 1, 0.8, losses=[0.5] * 7 + [0.1])}}
    assert ablation.steps_to_paper(cells, "paper") == "80, 80"
    assert ablation.steps_to_paper(cells, "scratch") == "60, never"


def test_another_setting_has_folders_and_results_of_its_own(tmp_path):
    cfg = Config(name="short", vae_flags="--D=56", dit_flags="--D=56 --steps=140")
    made, run = commands(cfg, "no schedule", 1)
    assert run == "out/ablation/short/seed1/no-schedule"
    assert "--D=56" in made[1] and "--D=56" not in made[0]            # not the base VAE's
    assert "--D=56 --steps=140" in made[-1] and "--steps" not in made[2]
    with pytest.raises(SystemExit, match="short.jsonl: has no cells yet"):
        ablation.main(Config(name="short", report=True, results=str(tmp_path)))


def test_what_cannot_be_run_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"--arms: 'papers' is none of paper \| paper, again"):
        ablation.main(Config(arms="papers", results=str(tmp_path)))
    with pytest.raises(SystemExit, match="has no cells yet; run without --report=True"):
        ablation.main(Config(report=True, results=str(tmp_path)))


def test_a_line_that_is_cut_off_is_named_and_no_cell_is_lost_in_silence(tmp_path):
    path = tmp_path / "tiny.jsonl"
    whole = json.dumps(line("paper", 0, 0.8)) + "\n"
    path.write_text(whole + whole[:40])
    with pytest.raises(SystemExit, match="line 2 is damaged; delete it, and its cell is run again"):
        ablation.main(Config(results=str(tmp_path), report=True))


def test_levels_of_the_arms_are_those_of_the_presets():
    for preset, given in ablation.LEVELS.items():
        known = {f.name: f.default for f in fields(train_vae.Config)} | train_vae.PRESETS[preset]
        assert given.endswith(f",{known['D']}") and len(given.split(",")) == 4


@pytest.mark.slow
def test_two_arms_run_from_nothing_and_only_what_is_missing_runs_again(tmp_path, monkeypatch):
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
