"""support/held_out.py: which images are used to fit, measure and validate."""
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import data, held_out, runs
from train_vae import Config

CPU = torch.device("cpu")


@pytest.fixture
def classes(tmp_path):
    """A folder of four classes of ten 8-pixel images; those of class k have a red of 60 k."""
    for k, name in enumerate(("ant", "bee", "cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (8, 8), (60 * k, 0, 0)).save(tmp_path / name / f"{i}.png")
    return str(tmp_path)


def test_every_use_sees_all_classes_though_folders_are_read_class_by_class(classes):
    cfg = Config(data_dir=classes, image_size=8, stats=8, micro_batch=4)
    train_set = data.open_dataset(classes, 8)
    vae = SimpleNamespace(C=1, D=1, f=1)                           # 20 * 19 latent pixels, 64 in each image
    val_cfg = Config(data_dir="procedural", val_dir=classes, image_size=8)
    uses = {
        "fit": (6, [*held_out.fitting_images(cfg, vae, train_set, CPU, 0)]),
        "measure": (8, [x for rank in (0, 1)
                        for x in held_out.statistics_images(cfg, train_set, CPU, rank, 2)]),
        "validate on training images": (8, [held_out.validation_images(cfg, train_set, n=8)]),
        "validate on others": (8, [held_out.validation_images(val_cfg, None, n=8)]),
    }
    for use, (count, batches) in uses.items():
        reds = torch.cat(batches)[:, 0, 0, 0]
        assert (len(reds), len(reds.unique())) == (count, 4), use


def test_procedural_validation_images_are_new_to_the_run_and_to_its_base(tmp_path):
    runs.save_folder(tmp_path / "base" / "step_000001", {}, {"config": {"seed": 4}})
    cfg = Config(data_dir="procedural", image_size=16, images=12, seed=3, base=str(tmp_path / "base"))
    trained_on = []
    for seed in (3, 4):
        train_set = data.open_dataset("procedural", 16, 12, seed)
        trained_on.extend(data.to_tensor(data.stack(train_set, range(12))[0]))
    val = held_out.validation_images(cfg, train_set, n=12)
    assert len(val) == 12
    assert not any(torch.equal(a, b) for a in val for b in trained_on)
    assert held_out.in_words(cfg, 12) == "12 held-out images of 16 pixels"
