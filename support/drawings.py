"""The built-in data set's pictures: drawings of ten things, each described by a line of a small language.

Flat shapes tell the class at any blur: a base latent, made from the half-size image, keeps them. The textures
alternate from pixel to pixel, so bicubic halving averages them out exactly (its taps weigh odd and even
pixels alike): they are detail that the base latent lacks, but that the shapes predict. So a DA-VAE has
something to learn here, in minutes and without a download.
"""
import numpy as np
from PIL import Image, ImageDraw


# The language: a scene is its background's paint, then strokes, each drawn over those before it.
#
#   stroke    shape paint x y x y ...
#   shape     one of SHAPES: an oval or a box has two points, its upper left and lower right corner;
#             a poly (filled) or a line has a point for each of its corners
#   x y       from the centre of the scene, x to the right and y downwards, in twentieths of its radius;
#             99 is outside every picture
#   paint     #colour: flat; or texture#colour#colour: the texture says which pixels take the second colour
#   colour    one hexadecimal digit each for red, green and blue, 0 dark to f bright
#
# The donut, for example:
#
#   #6cb                                the background: turquoise
#   oval #b74 -19 -18 19 19             the dough: a brown oval that reaches, in twentieths of the radius,
#                                       19 to the left, 18 up, 19 to the right and 19 down
#   oval dots#fbc#a15 -17 -18 17 14     the icing, a little smaller and higher: pink, a quarter of it crimson
#   oval #b74 -7 -7 7 6                 the dough again, around
#   oval #6cb -6 -4 6 6                 the hole, in the paint of the background
#
# In each picture a paint's colours are shifted a little, by the same amount wherever that paint is used.
SCENES = {
    "balloon":
        "#adf; oval #fff -24 -2 -10 4; oval #fff 12 -15 24 -10; line #432 -8 2 -3 15 0 6 3 15 8 2; "
        "oval cols#c24#fc6 -14 -20 14 8; box check#642#da6 -4 14 4 19",
    "book":
        "#843; poly #347 -20 -13 0 -11 20 -13 20 15 0 17 -20 15; "
        "poly #fed -19 -15 0 -12 19 -15 19 13 0 15 -19 13; line #ba8 0 -12 0 15; "
        "box text#fed#545 -16 -10 -2 10; box text#fed#545 3 -10 17 10",
    "butterfly":
        "#cd6; line #324 -7 -20 0 -10 7 -20; oval check#739#e9d -20 -16 0 4; "
        "oval check#739#e9d 0 -16 20 4; oval rows#d59#fd9 -15 0 0 16; oval rows#d59#fd9 0 0 15 16; "
        "oval #fec -14 -10 -8 -4; oval #fec 8 -10 14 -4; oval #324 -2 -12 2 15",
    "cat":
        "#ebc; poly #b62 -16 -4 -15 -20 0 -9 15 -20 16 -4; oval rows#ea5#952 -17 -14 17 16; "
        "oval #fed -8 2 8 13; oval #595 -11 -6 -4 2; oval #595 4 -6 11 2; oval #112 -9 -5 -6 1; "
        "oval #112 6 -5 9 1; poly #c56 -2 3 2 3 0 6; line #632 0 6 0 9; line #fff 22 4 6 8 22 10; "
        "line #fff -22 4 -6 8 -22 10",
    "city":
        "#225; oval #eec 8 -18 17 -9; box dots#338#fd6 -20 -7 -8 40; box dots#448#fd6 8 -2 21 40; "
        "box cols#348#cb8 -7 -17 6 40; line #eec 0 -17 0 -25",
    "donut":
        "#6cb; oval #b74 -19 -18 19 19; oval dots#fbc#a15 -17 -18 17 14; oval #b74 -7 -7 7 6; "
        "oval #6cb -6 -4 6 6",
    "fish":
        "#27a; oval #bef -20 -17 -16 -13; oval #bef -16 -22 -14 -20; "
        "poly rows#fb4#c42 8 0 21 -12 18 0 21 12; poly #e62 -4 -8 6 -17 6 -6; "
        "oval check#fc4#c52 -19 -11 12 11; oval #fc4 -19 -8 -8 8; oval #fff -15 -5 -10 0; "
        "oval #112 -14 -4 -11 -1; line #831 -17 4 -12 4",
    "house":
        "#fd9; box #7a5 -99 16 99 99; box #889 8 -18 12 -4; poly check#335#568 -21 -2 0 -20 21 -2; "
        "box rows#b43#eca -17 -2 17 17; box #532 -3 6 3 17; box cols#fe8#67a -12 3 -6 10; "
        "box cols#fe8#67a 6 3 12 10",
    "mushroom":
        "#254; box #142 -99 16 99 99; poly cols#fed#b97 -5 0 5 0 7 19 -7 19; "
        "poly dots#d23#fee -20 0 -17 -11 -8 -18 8 -18 17 -11 20 0; oval #fee -11 -11 -4 -4; "
        "oval #fee 3 -15 11 -8",
    "tree":
        "#feb; box #da6 -99 16 99 99; box cols#742#c96 -3 4 3 19; oval dots#273#bd6 -20 -10 2 9; "
        "oval dots#273#bd6 -2 -10 20 9; oval dots#284#ce7 -12 -20 12 4; oval #d33 -10 0 -6 4; "
        "oval #d33 8 -2 12 2",
}


SHAPES = {
    "oval": ImageDraw.ImageDraw.ellipse,
    "box": ImageDraw.ImageDraw.rectangle,
    "poly": ImageDraw.ImageDraw.polygon,
    "line": ImageDraw.ImageDraw.line,
}


LETTERS = [                             # a page of a book, 6 rows of 14 pixels, repeated
    "# #  #  ###   ",
    "# # # # #     ",
    "# # ### ##    ",
    "# # # # #     ",
    " #  # # ###   ",
    "              ",
]


def make_textures(size):
    """{name: (size, size) of 0 and 1}: the pixels that take a paint's first and second colour; "" is flat."""
    y, x = np.mgrid[:size, :size]
    letters = np.array([list(row) for row in LETTERS])              # (6, 14)
    return {
        "": 0 * x,
        "cols": x % 2,
        "rows": y % 2,
        "check": (x + y) % 2,
        "dots": x * y % 2,
        "text": (letters == "#")[y % 6, x % 14].astype(int),
    }


def read_scene(scene):
    """A scene in the language -> the background's paint, and the strokes: [(shape, paint, points (n, 2))]."""
    background, *rest = scene.split(";")
    strokes = []
    for stroke in rest:
        shape, paint, *points = stroke.split()
        strokes.append((shape, paint, np.array(points).astype(int).reshape(-1, 2)))
    return background.strip(), strokes


def read_colour(colour):
    """"f80" -> [255, 136, 0]."""
    return [17 * int(digit, 16) for digit in colour]


def read_paint(paint):
    """A paint -> the name of its texture ("" if it is flat) and its two colours, (2, 3), in 0 to 255."""
    texture, *colours = paint.split("#")                            # "dots#fbc#a15" -> "dots", ["fbc", "a15"]
    first = read_colour(colours[0])
    second = read_colour(colours[-1])                               # a flat paint has one colour, twice
    return texture, np.array([first, second])


def draw(scene, size, textures, rng):
    """A picture of a scene as uint8 (size, size, 3).

    textures: those of `make_textures(size)`, made once for a data set
    rng: numpy Generator, which decides the scene's size and place, and how far its colours are shifted
    """
    radius = size * rng.uniform(0.33, 0.45)
    centre = size * rng.uniform(0.44, 0.56, 2)                      # x, y
    background, strokes = read_scene(scene)

    # the shapes: on a canvas whose pixels hold the number of their paint; the background's is 0
    paints = [background]
    canvas = Image.new("L", (size, size))
    brush = ImageDraw.Draw(canvas)
    for shape, paint, points in strokes:
        if paint not in paints:
            paints.append(paint)
        points = centre + radius * points / 20                      # (n, 2), in pixels
        SHAPES[shape](brush, points.flatten().tolist(), fill=paints.index(paint))
    canvas = np.asarray(canvas)

    # the colours: both of a paint's are shifted alike
    palette = []
    patterns = []
    for paint in paints:
        texture, colours = read_paint(paint)
        palette.append(colours + rng.uniform(-14, 14, 3))
        patterns.append(textures[texture])
    palette = np.stack(palette).clip(0, 255).astype(np.uint8)       # (paints, 2, 3)

    # the texture of a pixel's paint says which of that paint's two colours the pixel takes
    second = np.choose(canvas, patterns)                            # (size, size), 0 or 1
    return palette[canvas, second]                                  # (size, size, 3)
