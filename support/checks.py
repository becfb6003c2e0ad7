"""Settings that conflict with each other or with the models: one sentence each, before the first step."""
import os
from pathlib import Path

from support import buckets, config, levels, metrics, plan, runs
from support.measurements import check_writable


def check_images(cfg):
    """raises: SystemExit if a number of built-in images is given, not by a preset, and a folder is read"""
    given = "images" in getattr(cfg, "given", ()) and runs.step_of(cfg.out) < 1
    if given and cfg.data_dir not in ("", "procedural") and os.path.isdir(cfg.data_dir):
        raise SystemExit(f"--images={cfg.images} is a number of built-in images, and all images of "
                         f"{cfg.data_dir} are used: leave out --images, or --data_dir")


# ---------------------------------------------------------------- train_vae.py

# The smallest image side, in pixels, of which these networks' layers leave anything.
SMALLEST = {"PatchGAN": 24, "vgg": 16, "squeeze": 17, "none": 1}

# Flags without effect where there are no details; and those of the alignment, which a base VAE has too if a
# teacher is named. Not among them: `r` and `keep_levels`, which a base VAE also follows.
OF_DETAILS = ("train", "detail_dropout", "detail_noise", "rescale", "fit", "fit_align")
OF_ALIGNMENT = ("align", "adaptive_align", "project", "distance", "m1", "m2")
OF_INITIAL_WEIGHTS = ("C", "widths", "blocks", "groups", "attn", "quant")         # without effect with a base


def before_loading(cfg):
    """raises: SystemExit with one sentence, before anything is loaded; a run that resumes is not checked"""
    if runs.step_of(cfg.out) > 0:
        return
    if cfg.D and not cfg.base:
        raise SystemExit(f"--base= is empty, and --D={cfg.D} adds details to a base VAE: give one by "
                         "--base=, or --D=0 to train one")
    changed = getattr(cfg, "changed", ())
    for name in OF_DETAILS + OF_ALIGNMENT:
        unused = not (cfg.D if name in OF_DETAILS else is_aligned(cfg))
        if unused and name in changed:
            instead = "--D=" if name in OF_DETAILS else "--D= or --teacher="
            raise SystemExit(f"--{name}={getattr(cfg, name)} changes nothing in a base VAE, which has no "
                             f"details (D = 0): leave out --{name}, or give {instead}")
    for name in OF_INITIAL_WEIGHTS:
        if cfg.base and name in changed:
            raise SystemExit(f"--{name}={config.show(getattr(cfg, name))} is for a base VAE from initial "
                             f"weights, and {cfg.base} is used as it is: leave out --{name}, or give "
                             "--D=0 --base=")
    for name in ("m1", "m2"):
        if cfg.distance != "vf" and name in changed:
            raise SystemExit(f"--{name}={getattr(cfg, name)} is a margin of VA-VAE's distance, and the "
                             f"alignment's is {cfg.distance}: leave out --{name}, or give --distance=vf")


def before_training(cfg, vae):
    """raises: SystemExit with one sentence, about the first conflict found"""
    check_sizes(cfg, vae)
    check_alignment(cfg, vae)
    levels.check(cfg.keep_levels, vae.C, vae.D)
    if cfg.D and cfg.train == "blocks" and is_judged(cfg):
        raise SystemExit("--train=blocks freezes the layer whose gradients weight the GAN; give --gan=0")
    if cfg.D and cfg.train == "up" and cfg.adaptive_align:
        raise SystemExit("--train=up freezes the layer whose gradients weight the alignment; give "
                         "--adaptive_align=False")
    if cfg.D and cfg.rescale and cfg.detail_dropout == 1:
        raise SystemExit("--rescale=True divides by 1 - detail_dropout: wanted --detail_dropout below 1")


def is_aligned(cfg):
    """Is there anything to align, and to what?  Without details (D = 0), only if a teacher is named."""
    return cfg.D > 0 or cfg.teacher != "base"


def is_judged(cfg):
    """Does the discriminator ever start?"""
    return cfg.gan > 0 and cfg.disc_start < cfg.steps


def say_if_never_judged(cfg, rank):
    """Print, on rank 0, that the run ends before its discriminator starts."""
    if rank == 0 and cfg.gan and not is_judged(cfg):
        print(f"{cfg.out}: the discriminator starts at step {cfg.disc_start}, after this run's {cfg.steps} "
              "steps: give --disc_start, more --steps, or --gan=0")


def multiple(cfg, vae):
    """What an image's sides must be multiples of; a plain VAE trains mostly on images shrunk by r."""
    side = vae.f * vae.base.block
    return side if cfg.D else side * cfg.r


def check_base_vae(cfg, vae):
    """raises: SystemExit if the VAE that cfg.base leads to is a DA-VAE: all that it learned would be lost;
    or VA-VAE without its statistics
    """
    if vae.D == 0:
        check_vavae(cfg, vae.base)
        return
    own = ""
    if runs.checkpoints(cfg.base):
        own = f", {runs.read_config(runs.latest_checkpoint(cfg.base))['config']['base']}"
    raise SystemExit(f"{cfg.base}: a DA-VAE, of which only its own base would be used, and nothing that it "
                     f"learned; wanted a base VAE, such as the one that it was trained on{own}")


def check_vavae(cfg, base):
    """raises: SystemExit if details are to be trained on VA-VAE's public file without its statistics

    Alignment and decoder see normalised latents: once trained without, the DA-VAE could not take the numbers
    in, and the pretrained LightningDiT would never see the latents that it knows.
    """
    is_kl = type(base).__name__ == "AutoencoderKL"
    is_vavae = is_kl and (base.C, base.f, base.cfg.quant) == (32, 16, True)
    if cfg.D and is_vavae and not base.mean.any() and (base.std == 1).all():
        raise SystemExit(f"{cfg.base}: has no latents_stats.pt next to it, and a DA-VAE trained without will "
                         "not fit the pretrained LightningDiT; put that file there, too")


def check_sizes(cfg, vae):
    """raises: SystemExit with one sentence if images, or crops of them, do not fit the VAE."""
    if cfg.halvings and not cfg.crop and not runs.checkpoints(cfg.out):
        raise SystemExit(f"--halvings={cfg.halvings} halves only images that are then cropped; give sides of "
                         "crops by --crop=, or --halvings=0")
    if cfg.r & (cfg.r - 1):                        # of a DA-VAE, DAVAEConfig says so
        raise SystemExit(f"--r={cfg.r}: wanted 1, 2, 4, 8, ...: the base image is made by repeated halving")
    side = multiple(cfg, vae)
    for name, pixels in [("image_size", cfg.image_size)] + [("crop", side) for side in cfg.crop]:
        if pixels % side:
            fits = max(1, round(pixels / side)) * side
            raise SystemExit(f"--{name}={pixels}: this VAE takes multiples of {side}; give --{name}={fits}")
    shrunk = 1 if cfg.D else cfg.r
    shortest = buckets.shortest(cfg, side)
    seen = shortest // shrunk
    if cfg.crop and max(cfg.crop) > seen:
        what = f"--image_size={shortest}"
        if cfg.buckets > 1:
            what = f"the shortest side of a bucket, {shortest}"
        raise SystemExit(f"--crop={max(cfg.crop)} is larger than {what}"
                         f"{f' / {shrunk}' if shrunk > 1 else ''}; give less")
    seen = min([seen, *cfg.crop])
    smallest = max(SMALLEST[cfg.perceptual], SMALLEST["PatchGAN"] if is_judged(cfg) else 1)
    if seen < smallest:
        raise SystemExit(f"--image_size={cfg.image_size}, --crop: images of {seen} pixels; wanted "
                         f"{smallest} or more, or --gan=0 and --perceptual=none")


def check_alignment(cfg, vae):
    """raises: SystemExit if projection, distance and teacher, or teacher and buckets, do not fit together"""
    if not is_aligned(cfg):
        return
    if cfg.project == "mean" and cfg.teacher != "base":
        raise SystemExit("--project=mean groups details by the base's channels, and --teacher= names another "
                         "teacher; give --project=conv, or --project=raw with --distance=vf")
    if cfg.project == "raw" and cfg.distance != "vf" and (cfg.teacher != "base" or vae.C != vae.D):
        raise SystemExit("--project=raw keeps the details' channels, which are not the teacher's, and "
                         f"--distance={cfg.distance} compares channel by channel; give --distance=vf")
    if cfg.teacher != "base" and cfg.buckets > 1:
        raise SystemExit(f"--buckets={cfg.buckets:g}: the teacher takes square images; leave it out, or give "
                         "--teacher=base")


# ---------------------------------------------------------------- finetune.py


def before_finetuning(cfg, world):
    """raises: SystemExit with one sentence, before anything is loaded or trained"""
    if not cfg.vae:
        raise SystemExit("--vae= is empty: wanted a run of train_vae.py, or the weights of a base VAE")
    if cfg.shard and world == 1:
        raise SystemExit("--shard=True splits the model over several processes: start it with torchrun")
    for name in ("model", "p", "E", "depth", "A", "qk_norm"):
        if cfg.base and name in getattr(cfg, "given", ()):
            raise SystemExit(f"--{name}={getattr(cfg, name)} is for a model from scratch, and {cfg.base} is "
                             f"widened as it is: leave out --{name}, or give --base=")
    if not cfg.base and (cfg.lora or not cfg.zero_init) and not runs.checkpoints(cfg.out):
        flag, instead = "--zero_init=False", "--zero_init=True"
        if cfg.lora:
            flag, instead = f"--lora={cfg.lora}", "--lora=0"
        raise SystemExit(f"{flag} is for a pretrained model, and there is none: give --base=, or {instead}")
    needed = {                                     # flag: (what gives it an effect, the flag for that)
        "N": (cfg.D, "--D="), "detail_sample": (cfg.D, "--D="), "zero_init": (cfg.D, "--D="),
        "keep_mean": (cfg.keep_levels, "--keep_levels="), "t5_tokens": (cfg.text, "--text="),
        "base_weights": (cfg.base, "--base="),
    }
    for name, (there, flag) in needed.items():
        if not there and name in getattr(cfg, "changed", ()) and runs.step_of(cfg.out) < 1:
            raise SystemExit(f"--{name}={getattr(cfg, name)} changes nothing without {flag}: leave out "
                             f"--{name}, or give {flag}")


def say_if_details_hardly_count(cfg, w, rank):
    """Print, on rank 0, that the details' weight stays near 0.   w: what it is at the run's last step"""
    if rank == 0 and cfg.D and w < 0.1:
        print(f"{cfg.out}: the details' weight w(n) rises only to {w:.3f} in this run's {cfg.steps} steps, "
              f"and to 1 at step {cfg.N}: give --N, or more --steps")


def check_base(cfg, vae, base, num_classes):
    """raises: SystemExit with one sentence if the base model does not fit the VAE, the images or flags."""
    if (base.cfg.C, base.cfg.D) != (vae.C, 0):
        raise SystemExit(f"{cfg.base}: takes {base.cfg.C} base and {base.cfg.D} detail channels; wanted a "
                         f"base model of {cfg.vae}'s {vae.C} channels")
    check_text(cfg, f"{cfg.base}: a {type(base).__name__}", type(base.cfg))
    if not cfg.text and base.cfg.num_classes < num_classes:
        raise SystemExit(f"{cfg.base}: has {base.cfg.num_classes} classes; {cfg.data_dir} has {num_classes}")
    p, side = base.cfg.p, cfg.image_size // vae.f
    only = getattr(base.cfg, "grid", None)                         # None: any, as in text to image
    grid = only or side // p
    if side != grid * p:
        takes = f"{grid}x{grid} tokens" if only else "whole tokens"
        raise SystemExit(f"--image_size={cfg.image_size}: {cfg.base} takes {takes} of {p}x{p} latent pixels; "
                         f"with {cfg.vae} give --image_size={grid * p * vae.f}")


def check_text(cfg, what, ModelConfig):
    """raises: SystemExit if a text-conditioned transformer gets no text, or another gets text or adapters."""
    takes_text = plan.takes_text(ModelConfig)
    if takes_text and not cfg.text:
        raise SystemExit(f"{what} is conditioned on text; give it with --text=")
    if not takes_text and (cfg.text or cfg.lora):
        raise SystemExit(f"{what} takes neither text nor adapters; leave out --text= and --lora=")


# ---------------------------------------------------------------- evaluate.py

# Flags of evaluate.py that only samples depend on. Not among them: device and dtype.
OF_SAMPLES = (
    "n", "batch_size", "seed", "classes", "prompts", "negative", "text", "height", "width", "steps", "shift",
    "grid", "cfg", "cfg_start", "cfg_end", "keep", "cfg_channels", "slg", "compile", "graph", "weights",
    "clip", "reference",
)


def before_measuring(cfg, run, rulers, images, draws, out):
    """raises: SystemExit if flags ask for what will fail, with `images` held-out images, or have no effect"""
    counts = {"images": images, "n": cfg.n} if draws else {"images": images}
    least = 2 if rulers.features.name else 1
    for name, count in counts.items():
        if count < least:
            raise SystemExit(f"--{name}: {count}, wanted at least {least}; distances are between sets, "
                             "--features=none omits them")
        if count < run.world:
            raise SystemExit(f"{run.world} processes, {count} {name}: wanted at least one for each process")
    if (cfg.reference or cfg.keep_reference) and not rulers.features.name:
        raise SystemExit("--reference and --keep_reference: wanted a network to measure distances with: give "
                         "--inception_weights= or --features=, and not --whole=True")
    refuse_unused_networks(cfg, rulers)
    if not draws:
        refuse_flags_of_samples(cfg, why_none_are_drawn(cfg, run))
    if cfg.whole and "images" in getattr(cfg, "given", ()):
        raise SystemExit(f"--images={cfg.images}: --whole=True measures all images of {cfg.data_dir}; leave "
                         "out one of the two")
    size = run.config["config"]["image_size"]
    if not cfg.whole and size < rulers.least():
        raise SystemExit(f"{cfg.run}: images of {size}x{size} pixels; these metrics need {rulers.least()}x"
                         f"{rulers.least()}: try without --perceptual and --lpips_trunk")
    if cfg.keep_reference:
        metrics.check_kept(cfg.keep_reference, rulers.features, images, size)
    if run.rank == 0:
        for path in filter(None, (out, cfg.keep_reference)):
            check_writable(Path(path))
        if draws and rulers.features.name and not cfg.reference and images < 500:
            print(f"only {images} images: a distance to so few only compares runs, on the same images")
        if not draws and run.dit is not None and not cfg.whole:
            print(f"no samples are drawn, because {why_none_are_drawn(cfg, run)}")


def why_none_are_drawn(cfg, run):
    """Why a run is only reconstructed, for the end of a sentence about its samples."""
    if run.dit is None:
        return f"{cfg.run} is a run of train_vae.py"
    if cfg.whole:
        return "--whole=True only reconstructs"
    return ("no network measures them: give --lpips_trunk= (SqueezeNet-FD) or --inception_weights= (FID), or "
            "--features=none to draw for img/s alone")


def refuse_flags_of_samples(cfg, why):
    """raises: SystemExit if flags are given that only samples depend on; why: none are drawn, a clause"""
    given = [name for name in OF_SAMPLES if name in getattr(cfg, "given", ())]
    if given:
        raise SystemExit(f"leave out --{', --'.join(given)}: no samples are drawn, because {why}")


def refuse_unused_networks(cfg, rulers):
    """raises: SystemExit if a flag asks for a network, or gives its file, and no metric here uses it"""
    name = rulers.features.name
    instead = f"the distances here are of {name}" if name else "no distances are computed here"
    if cfg.whole:
        instead = "--whole=True computes no distances"
        if cfg.features not in ("auto", "none"):
            raise SystemExit(f"--features={cfg.features}: {instead}; leave out one of the two")
    if cfg.inception_weights and name != "Inception":
        raise SystemExit(f"--inception_weights={cfg.inception_weights}: {instead}; leave it out, or give "
                         "--features=inception, without --whole=True")
    if cfg.lpips_trunk and rulers.lpips is None and name != "SqueezeNet":
        raise SystemExit(f"--lpips_trunk={cfg.lpips_trunk}: {instead}; leave it out, or give --perceptual= "
                         "for LPIPS")
