"""From the bytes of an image file to upright RGB pixels, or to one sentence saying why not."""
import io
import math
import os
import struct

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from support import files
from support.captions import shown

ORIENTATION = ExifTags.Base.Orientation
TURNS = {                                   # EXIF value (other than 1) -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's decoders have been seen to raise on damaged files.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, EOFError, LookupError, struct.error,
    RuntimeError, OverflowError, Image.DecompressionBombError,             # RuntimeError: AVIF
)


def to_rgb(image):
    """A PIL image of any mode as 8-bit RGB: 16 bits scaled (Pillow would clip), transparency over white.

    raises: ValueError if its pixels are 32-bit numbers
    """
    pgm = image.mode == "I" and image.format == "PPM"               # 16 bits, which Pillow stores in 32
    if image.mode in ("I", "F") and not pgm:
        raise ValueError("its 32-bit pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I;16") or pgm:
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright(image):
    """A PIL image, rotated or flipped as its EXIF data says.

    Only the orientation tag is read: Pillow's own exif_transpose rewrites all tags, and fails on photos where
    any tag has a wrong type.
    """
    image.load()                            # a PNG may have its EXIF data after its pixels
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image):
    """The EXIF orientation of a PIL image, 1 to 8; None if it has none, or if its EXIF data is damaged.

    It does not decode the image: of a PNG that is not loaded, only what comes before the pixels counts.
    """
    try:
        return Image.Image.getexif(image).get(ORIENTATION)          # a PNG's own getexif would load it
    except DECODING_ERRORS:
        return None


def decoded(source):
    """An image file, or a stream of its bytes, as an upright RGB PIL image."""
    with Image.open(source) as file:
        if file.width * file.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError                      # as Pillow does above twice as many
        return to_rgb(upright(file))


def load_image(path, raw=None):
    """An image file (of an animation, the first frame) as an RGB PIL image, upright by its EXIF data.

    raw: its bytes, if it is not a file of its own
    raises: ValueError naming the file and the reason
    """
    try:
        return files.read_again(decoded, path if raw is None else io.BytesIO(raw))
    except UnidentifiedImageError:
        size = os.path.getsize(path) if raw is None else len(raw)
        reason = "its bytes are not an image" if size else "the file is empty"
    except Image.DecompressionBombError:
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        reason = f"it has more than {limit:.0f} megapixels (PIL.Image.MAX_IMAGE_PIXELS); shrink it"
    except DECODING_ERRORS as error:
        reason = str(error) or type(error).__name__
    raise ValueError(f"cannot read the image {shown(path)}: {reason}")
