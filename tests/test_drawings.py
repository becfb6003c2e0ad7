"""drawings.py: what a picture depends on, what it loses at half size, and what it keeps."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import data, drawings


def halve_and_back(x):
    half = F.interpolate(x, scale_factor=0.5, mode="bicubic", align_corners=False)
    return F.interpolate(half, scale_factor=2, mode="bicubic", align_corners=False).clamp(-1, 1)


@pytest.fixture(scope="module")
def drawn():
    """400 drawn pictures at 64 pixels: (400, 3, 64, 64) in [-1, 1], labels (400,)."""
    dataset = data.Procedural(64, 400)
    x = data.to_tensor(np.stack([dataset.image(i)[0] for i in range(400)]))
    return x, torch.from_numpy(dataset.labels)


def test_a_drawn_picture_depends_on_seed_and_index_alone():
    one, two = data.Procedural(48, 30, seed=3), data.Procedural(48, 99, seed=3)
    forward = [one.image(i)[0] for i in range(30)]
    assert all(np.array_equal(forward[i], two.image(i)[0]) for i in reversed(range(30)))
    assert not np.array_equal(forward[0], forward[10])              # same class, another picture
    assert not np.array_equal(forward[0], data.Procedural(48, 30, seed=4).image(0)[0])


def test_drawn_labels_cycle_through_ten_named_classes():
    dataset = data.Procedural(32, 25)
    assert dataset.labels.tolist() == [i % 10 for i in range(25)] == [dataset.image(i)[1] for i in range(25)]
    assert len(set(dataset.classes)) == 10 and dataset.captions is None
    assert dataset.summary().startswith("25 images in 10 classes (balloon 3, book 3,")


def test_period_two_stripes_vanish_at_half_size():
    y, x = np.mgrid[:32, :32]
    textures = drawings.make_textures(32)
    for name in ("cols", "rows", "check", "dots"):
        stripes = torch.from_numpy(textures[name] * 2.0 - 1)[None, None]
        assert stripes.std() > 0.8
        half = F.interpolate(stripes, scale_factor=0.5, mode="bicubic", align_corners=False)[..., 2:-2, 2:-2]
        assert half.std() < 1e-6 and torch.allclose(half, stripes.mean().expand_as(half))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_half_size_loses_detail_in_every_class_at_every_size(size):
    dataset = data.Procedural(size, 100)
    x = data.to_tensor(np.stack([dataset.image(i)[0] for i in range(100)]))
    psnr = 10 * torch.log10(4 / (halve_and_back(x) - x).square().mean((1, 2, 3)))
    by_class = psnr.view(10, 10).mean(0)
    assert by_class.max() < 24 and by_class.min() > 12, by_class


def test_a_16_pixel_preview_shows_the_class(drawn):
    x, y = drawn
    preview = F.interpolate(x, size=(16, 16), mode="area").flatten(1)
    means = torch.stack([preview[:200][y[:200] == k].mean(0) for k in range(10)])
    accuracy = (torch.cdist(preview[200:], means).argmin(1) == y[200:]).float().mean()
    assert accuracy > 0.95


def test_pictures_of_a_class_vary_modestly(drawn):
    x, y = drawn
    within = torch.stack([x[y == k].std(0).mean() for k in range(10)])
    assert within.min() > 0.05 and within.max() < 0.5


def test_a_scene_is_a_background_and_strokes():
    background, strokes = drawings.read_scene("#6cb; box dots#fbc#a15 -17 -18 17 14; poly #f80 0 0 1 2 -3 4")
    assert background == "#6cb"
    assert [stroke[:2] for stroke in strokes] == [("box", "dots#fbc#a15"), ("poly", "#f80")]
    assert strokes[0][2].tolist() == [[-17, -18], [17, 14]]
    assert strokes[1][2].tolist() == [[0, 0], [1, 2], [-3, 4]]


def test_a_paint_has_a_texture_and_two_colours():
    texture, colours = drawings.read_paint("dots#fbc#a15")
    assert texture == "dots" and colours.tolist() == [[255, 187, 204], [170, 17, 85]]
    texture, colours = drawings.read_paint("#f80")
    assert texture == "" and colours.tolist() == [[255, 136, 0]] * 2


def test_strokes_cover_earlier_ones_and_textures_alternate_two_colours():
    size, textures = 64, drawings.make_textures(64)
    picture = drawings.draw("#888; box #f00 -99 -99 99 99; box cols#444#ccc -10 -10 10 10", size, textures,
                            np.random.default_rng(0))
    corner, even, odd = picture[0, 0], picture[32, 32], picture[32, 33]
    assert corner[0] > 240 and corner[1:].max() < 15                # the background is wholly covered
    assert np.abs(even.astype(int) - 68).max() <= 14 and np.abs(odd.astype(int) - 204).max() <= 14
    assert np.abs(odd.astype(int) - even - 136).max() <= 1          # both colours are shifted alike


def test_a_paint_used_twice_looks_the_same():
    textures = drawings.make_textures(64)
    scene = "#888; box #484 -20 -20 -10 20; box #848 10 -20 14 20; box #484 15 -20 20 20"
    picture = drawings.draw(scene, 64, textures, np.random.default_rng(1))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 3


def test_every_stroke_in_every_scene_has_a_known_shape_and_texture():
    textures = drawings.make_textures(8)
    for scene in drawings.SCENES.values():
        background, strokes = drawings.read_scene(scene)
        assert drawings.read_paint(background)[0] == ""
        for shape, paint, points in strokes:
            assert shape in drawings.SHAPES and drawings.read_paint(paint)[0] in textures
            assert len(points) == 2 if shape in ("oval", "box") else len(points) >= 2
