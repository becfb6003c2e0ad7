"""photos.py: odd, rotated and damaged image files become RGB pixels, or an error of one sentence."""
import errno
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from support import buckets, data, files, photos
from support.photos import load_image

RED = (200, 30, 40)


@pytest.mark.parametrize("mode, name", [("RGB", "a.png"), ("P", "a.png"), ("P", "a.gif"), ("CMYK", "a.jpg"),
                                        ("CMYK", "a.tif"), ("RGBA", "a.webp"), ("RGB", "a.bmp")])
def test_every_colour_mode_becomes_the_same_rgb(tmp_path, mode, name):
    image = Image.new("RGB", (12, 10), RED)
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (12, 10)
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 4       # JPEG and WebP round colours


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_images_become_three_equal_channels(tmp_path, mode):
    Image.new("RGB", (12, 10), "white").convert(mode).save(tmp_path / "a.png")
    grey = np.asarray(load_image(tmp_path / "a.png"))
    assert grey.shape == (10, 12, 3) and (grey == 255).all()


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (4, 4), (200, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    Image.new("RGB", (4, 4), "red").quantize(2).save(tmp_path / "palette.png", transparency=0)
    for name in ("clear", "grey", "palette"):
        assert np.asarray(load_image(tmp_path / f"{name}.png")).min() == 255
    assert load_image(tmp_path / "half.png").getpixel((0, 0)) == pytest.approx((227, 127, 127), abs=1)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, extension):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"a.{extension}")
    grey = np.asarray(load_image(tmp_path / f"a.{extension}"))[..., 0]
    assert np.array_equal(grey.reshape(-1), np.arange(256))


@pytest.mark.parametrize("magic, maxval", [("P5", 65535), ("P5", 1023), ("P2", 65535)])
def test_netpbm_pixels_of_up_to_sixteen_bits_are_scaled_by_their_maximum(tmp_path, magic, maxval):
    ramp = np.linspace(0, maxval, 256).round().astype(">u2")
    pixels = ramp.tobytes() if magic == "P5" else " ".join(map(str, ramp)).encode()
    (tmp_path / "a.pgm").write_bytes(f"{magic}\n16 16\n{maxval}\n".encode() + pixels)
    grey = np.asarray(load_image(tmp_path / "a.pgm"))
    assert np.array_equal(grey, np.arange(256).reshape(16, 16, 1).repeat(3, axis=2))


def test_float_pixels_are_refused_because_their_range_is_unknown(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif.*no known range"):
        load_image(tmp_path / "a.tif")


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                    # the camera was held sideways: rotate by 270 degrees
    image = Image.new("RGB", (40, 20), "blue")
    image.paste((255, 0, 0), (0, 0, 20, 20))
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = load_image(tmp_path / "a.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200


@pytest.mark.parametrize("tag,kind,value", [
    (305, 5, struct.pack("<II", 1, 1)),                 # a software name stored as a fraction
    (271, 5, struct.pack("<II", 1, 1)), (282, 2, b"72\0\0"), (296, 2, b"2\0"), (305, 3, struct.pack("<H", 3)),
])
def test_a_photo_is_rotated_whatever_else_its_exif_data_says(tmp_path, tag, kind, value):
    """Pillow's own exif_transpose fails on these, though their pixels are intact."""
    count = {5: 1, 2: len(value), 3: 1}[kind]
    field = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 8 + 2 + 2 * 12 + 4)
    turned = struct.pack("<HHI", 274, 3, 1) + struct.pack("<HH", 6, 0)
    odd = struct.pack("<HHI", tag, kind, count) + field
    entries = [turned, odd] if tag > 274 else [odd, turned]        # tags must be in order
    tiff = b"II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + struct.pack("<I", 0) + value
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + tiff)
    assert load_image(tmp_path / "a.jpg").size == (20, 40)


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_an_image_whose_exif_data_is_damaged_is_read_as_it_lies(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (40, 20), RED).save(path, exif=b"Exif\0\0garbage!")
    image = load_image(path)
    assert image.size == (40, 20) and np.abs(np.asarray(image).astype(int) - RED).max() <= 4
    assert buckets.size_in_header(path) == (20, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_handled_as_pillow_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((40, 24), 100).convert("RGB").save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), expected)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("lime", "blue", "red")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((4, 4)) == (0, 255, 0)


def bomb(path, side):
    """A PNG whose header promises side x side pixels, but which holds none."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def damaged_files(folder):
    noise = Image.effect_noise((64, 64), 100).convert("RGB")
    noise.save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    noise.save(folder / "whole.png")
    (folder / "truncated.png").write_bytes((folder / "whole.png").read_bytes()[:5000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not found\n")
    bomb(folder / "bomb.png", 20_000)
    os.remove(folder / "whole.jpg"), os.remove(folder / "whole.png")
    return sorted(folder.iterdir())


def test_damaged_files_are_refused_in_one_sentence_with_name_and_reason(tmp_path):
    reasons = {"truncated.jpg": "truncated", "truncated.png": "truncated", "empty.png": "the file is empty",
               "text.png": "not an image", "bomb.png": "more than 89 megapixels"}
    for path in damaged_files(tmp_path):
        with pytest.raises(ValueError) as error:
            load_image(path)
        assert path.name in str(error.value) and reasons.pop(path.name) in str(error.value)
        assert "\n" not in str(error.value)
    assert not reasons


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_above_pillows_pixel_limit_is_refused_with_the_limit_in_megapixels(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("1", (4000, 3000)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12_000_000)
    assert load_image(path).size == (4000, 3000)
    for limit, shown in ((11_900_000, 12), (5_000_000, 5)):         # Pillow warns; at twice the limit, raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=rf"a.png: it has more than {shown} megapixels .*; shrink it$"):
            load_image(path)


# ---------------------------------------------------------------- disks that fail for a moment


@pytest.fixture
def attempts(tmp_path, monkeypatch):
    """attempts(errors) -> the list of the files opened by Pillow, where the first attempts raise `errors`."""
    Image.new("RGB", (12, 10), RED).save(tmp_path / "a.png")
    Image.new("RGB", (12, 10), "black").save(tmp_path / "b.png")
    monkeypatch.setattr(files, "PAUSES", (0, 0))
    opened, usual = [], Image.open

    def make(errors):
        def failing(source):
            opened.append(os.path.basename(source))
            if len(opened) <= len(errors):
                raise OSError(errors[len(opened) - 1], "the disk fails")
            return usual(source)

        monkeypatch.setattr(photos.Image, "open", failing)
        return opened
    return make


@pytest.mark.parametrize("errors", [[errno.EIO], [errno.EIO, errno.ESTALE], [errno.ETIMEDOUT] * 2])
def test_an_image_is_read_again_if_the_disk_fails_for_a_moment(attempts, tmp_path, errors):
    opened = attempts(errors)
    images = data.open_dataset(tmp_path, 8)
    assert images.image(0)[0][0, 0].tolist() == [*RED] and not images.bad
    assert opened == ["a.png"] * (len(errors) + 1)


@pytest.mark.parametrize("errors, times", [([errno.EIO] * 3, 3), ([errno.EACCES], 1)])
def test_an_image_that_the_disk_does_not_give_is_named_and_replaced(
        attempts, tmp_path, errors, times, capsys):
    opened = attempts(errors)
    images = data.open_dataset(tmp_path, 8)
    assert images.image(0)[0][0, 0].tolist() == [0, 0, 0]
    assert opened == ["a.png"] * times + ["b.png"]
    assert "a.png: " in capsys.readouterr().err


def test_a_damaged_image_is_not_read_again(attempts, tmp_path):
    opened = attempts([])
    whole = (tmp_path / "a.png").read_bytes()
    for raw in (b"", b"no image", whole[:45]):
        (tmp_path / "a.png").write_bytes(raw)
        with pytest.raises(ValueError, match="a.png"):
            load_image(tmp_path / "a.png")
    assert len(opened) == 3
