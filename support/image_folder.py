"""The folder of images that sample.py writes: only whole images, and only of the same settings.

    images/000000.png ...   the images and nothing else: a folder for other programs that compute an FID
    previews/               the base channels alone, of the images that base_preview.png shows
    settings.json           what the images depend on, to refuse others
    samples.npz, grid.png, base_preview.png     made of the two folders at the end
"""
import itertools
import json
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from support import data, figures, files, ranks, runs
from support.measurements import run_folder

IMAGES, PREVIEWS = "images", "previews"


def default_folder(run):
    """<run>/samples; for a step folder, one next to it, because training removes old steps."""
    folder = run_folder(run)
    return folder / "samples" if folder == Path(run) else folder / f"samples-{Path(run).name}"


def path_of(out, i, kind=IMAGES):
    return out / kind / f"{i:06d}.png"


def refuse_other_images(out, settings, drawing=False):
    """raises: SystemExit if `out` has images of other settings or weights, or without settings.json

    drawing: this job has written its settings there: others, even without images, are those of a job that
             began at the same time
    """
    path = out / "settings.json"
    if not drawing and not [*out.glob("*.png"), *out.glob("*/*.png")]:     # an attempt failed before them
        return
    if not path.exists():
        raise SystemExit(f"{out}: holds images, but no settings.json that says how they were made; give "
                         "another --out")
    try:
        old = json.loads(path.read_text())
    except ValueError:
        raise SystemExit(f"{path}: damaged; give another --out, or remove {out}") from None
    if "texts" not in settings:                                    # they are still to be encoded
        old.pop("texts", None)
    changed = [f"{name} {brief(old.get(name))} -> {brief(settings.get(name))}"
               for name in sorted(old | settings) if old.get(name) != settings.get(name)]
    if changed and old | {"model": ""} == settings | {"model": ""}:
        raise SystemExit(f"{out} holds images of an earlier state of the run, or of another run: give "
                         "another --out, or remove it")
    if changed:
        raise SystemExit(f"{out} holds images made with other settings ({', '.join(changed)}): give "
                         "another --out, or remove it")


def brief(value):
    """A setting for a message: there may be thousands of prompts, or one of thousands of letters."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def make_folder(out, settings, rank):
    """Create the folders of images and of previews, and write settings.json.

    raises: SystemExit if another job has drawn other images there since the first look
    """
    runs.make_folder(out)
    with runs.disk_may_fail(must=True, what=out):
        for kind in (IMAGES, PREVIEWS):
            (out / kind).mkdir(exist_ok=True)
        if rank == 0:
            refuse_other_images(out, settings)
            runs.write_json(out / "settings.json", settings)
    ranks.wait_for_all()                                           # all compare with it, batch by batch


def trained_classes(about):
    """How many classes a run has trained; a transformer widened from a released one may have many more."""
    return max(1, len(about["classes"]))


def name_of(k, about):
    """The name of class k in pictures."""
    known = about["classes"] or ["image"]
    if k == about["model"]["num_classes"]:
        return "no class"
    return known[k] if k < len(known) else f"class {k}"


def overview(about, settings, n):
    """(columns, {sample: its label}) of grid.png and base_preview.png.

    Up to ten classes (or prompts), one per row, and up to eight samples of each.
    """
    if "prompts" in settings:
        names = [prompt[:24] for prompt in settings["prompts"]]
    else:
        names = [name_of(k, about) for k in settings["classes"]]

    # sample i has name i % len(names), and each row shows the samples of one name
    columns = max(1, min(8, n // len(names)))
    shown = {}
    for row, name in enumerate(names[:10]):
        for i in range(row, min(n, columns * len(names)), len(names)):
            shown[i] = name
    return columns, shown


def missing(out, n, shown):
    """Which of n samples must be drawn: those without an image or, if shown, a preview."""
    todo = []
    for i in range(n):
        kinds = (IMAGES, PREVIEWS) if i in shown else (IMAGES,)
        if not all(is_whole(path_of(out, i, kind)) for kind in kinds):
            todo.append(i)
    return todo


# The last bytes of every PNG.
PNG_ENDS = b"\0\0\0\0IEND\xaeB`\x82"


def is_whole(path):
    """Is there a PNG with its end?  Not so after a power cut, or a copy that was cut off."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_ENDS), os.SEEK_END)
            return file.read() == PNG_ENDS
    except OSError:                                                # absent, or shorter than that
        return False


def save_images(pool, out, indices, images, previews, shown):
    """Let a pool of threads write a batch in [-1, 1].  Returns their futures, to be waited for."""
    batch = zip(indices, data.to_uint8(images), data.to_uint8(previews))
    return [pool.submit(save_image, out, i, image, preview, i in shown) for i, image, preview in batch]


def save_image(out, i, image, preview, is_shown):
    """Write image i, uint8 (H, W, 3), unless a whole one is there; a shown one's preview first."""
    if is_shown:
        save_png(preview, path_of(out, i, PREVIEWS))
    if not is_whole(path_of(out, i)):
        save_png(image, path_of(out, i))


def wait_for(futures):
    """raises: what one of them has raised, such as SystemExit for a full disk"""
    for future in futures:
        future.result()


def save_png(image, path):
    """Write uint8 (H, W, 3), so that a folder holds only whole images."""
    with runs.disk_may_fail(must=True, what=path), files.renamed_when_whole(path) as temporary:
        Image.fromarray(image).save(temporary, format="png")


def put_together(out, n, columns, shown, rank):
    """Write samples.npz, grid.png and base_preview.png, by rank 0.  Returns `out`."""
    if rank == 0:
        with runs.disk_may_fail(must=True, what=out / "samples.npz"):
            write_npz(out, n)
        for file, kind in (("grid.png", IMAGES), ("base_preview.png", PREVIEWS)):
            with runs.picture_may_fail(f"{out}/{file}"):
                pixels = [np.asarray(Image.open(path_of(out, i, kind))) for i in shown]
                x = data.to_tensor(np.stack(pixels))
                figures.save_grid(x, out / file, columns, max(1, 128 // x.shape[-1]), list(shown.values()))
    return out


def order_in_npz(n):
    """The numbers of the n images in the order of samples.npz: a random one, always the same.

    guided-diffusion's Inception score is a mean over parts of 5,000, in the order of the file. Samples have
    their classes in turn: every part would have every class equally often, and the score would be up to a
    tenth above that of classes at random, which papers print.
    """
    return np.random.default_rng(0).permutation(n).tolist()


def write_npz(out, n):
    """Write samples.npz, one image at a time: 50,000 of them would not fit into memory."""
    images = (np.asarray(Image.open(path_of(out, i))) for i in order_in_npz(n))
    first = next(images)
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *first.shape)}
    with files.renamed_when_whole(out / "samples.npz") as temporary:
        archive = zipfile.ZipFile(temporary, "w")
        with archive, archive.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, header)
            for image in itertools.chain([first], images):
                f.write(image.tobytes())
