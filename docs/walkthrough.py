"""Draw the pictures of walkthrough.md and print its numbers: one image, followed through the whole method.

    python docs/walkthrough.py out/tiny --other=out/no-align

out/tiny is the run of `python finetune.py`. out/no-align is a second DA-VAE, and may be left out; it is made
by `python train_vae.py tiny --align=0 --out=out/no-align`. A minute on a CPU.
"""
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))              # the six scripts and support/ are there

import torch
import torch.nn.functional as F

from davae import align_loss, base_image, group_mean
from dit import warm_start_difference
from experiments.latents import latents
from experiments.shared import zero_details
from finetune import detail_weight
from sample import generate, sample_flow, sample_noise, settings_of, time_grid
from sample import Config as SampleConfig
from support import config, data
from support.config import field
from support.figures import plot, read_log, save_grid
from support.metrics import psnr
from support.runs import latest_checkpoint
from support.weights import load_davae, load_dit, load_run


@dataclass
class Config:
    run: str = field("out/tiny", "a run of finetune.py: a DA-VAE's, widened from a base model")
    other: str = field("", "a DA-VAE that was trained without alignment; empty: none")
    image: int = field(7, "which of the held-out drawings to follow")
    images: int = field(200, "held-out drawings that the colours and averages are made of")
    out: str = field("docs/pictures", "folder for the pictures")


def show(name, tensor):
    print(f"{name:<34}{tuple(tensor.shape)}")


def enlarged(x, size):
    """Nearest-neighbour enlargement, to see the pixels: (B, 3, h, w) -> (B, 3, size, size)."""
    return F.interpolate(x, size, mode="nearest")


# ---------------------------------------------------------------- the steps of walkthrough.md


def base_latent(vae, x, out):
    """1. What the pretrained model sees: the small image, its latent, and that decoded again."""
    small = base_image(x, vae.r)                                              # (1, 3, H/r, W/r)
    z = vae.encode_base(x)                                                    # (1, C, h, w)
    preview = vae.decode_base(z)                                              # (1, 3, H/r, W/r)
    show("x, the image", x)
    show("base_image(x, r)", small)
    show("z = vae.encode_base(x)", z)
    show("vae.decode_base(z)", preview)

    size = x.shape[2:]
    row = torch.cat([x, enlarged(small, size), enlarged(preview.clamp(-1, 1), size)])
    save_grid(row, out / "1_base.png", 3, 4, ["x", "base_image(x)", "decode_base(z)"])


def details(vae, other, x, images, out):
    """2. What it does not see: details, aligned to z, or not."""
    z_d = vae.detail_posterior(x).mean                                        # (1, D, h, w), raw
    show("z_d, the mean of its posterior", z_d)
    show("group_mean(z_d, C)", group_mean(z_d, vae.C))

    def group_means(some_vae):
        z_d = torch.cat([some_vae.detail_posterior(part).mean for part in images.split(20)])
        return group_mean(z_d, vae.C)                                         # (N, C, h, w)

    z = torch.cat([vae.encode_base(part) for part in images.split(20)])       # (N, C, h, w)
    groups = {"z": z, "group_mean(z_d)": group_means(vae)}
    if other is not None:
        groups["without alignment"] = group_means(other)
    for name, group in list(groups.items())[1:]:
        print(f"L_align, {name:<25}{align_loss(z, group).item():.3f} on {len(images)} images")

    # three principal components of all these together, so that the same colour means the same latent
    colours = latents(torch.cat(list(groups.values())), len(groups) * len(images), images.shape[2:])
    rows = {"x": images[:6]} | dict(zip(groups, [part[:6] for part in colours.split(len(images))]))
    labels = [name for name in rows for _ in range(6)]
    save_grid(torch.cat(list(rows.values())), out / "2_latents.png", 6, 2, labels)


def decoding(vae, x, images, out):
    """3. Both together, decoded; and what becomes of the image without its details."""
    z_all = vae.encode(x)                                                     # (1, C+D, h, w), normalised
    x_hat = vae.decode(z_all).clamp(-1, 1)                                    # (1, 3, H, W)
    show("z_all = vae.encode(x)", z_all)
    show("vae.decode(z_all)", x_hat)

    def versions(x):
        z_all = vae.encode(x)
        z = z_all[:, :vae.C]
        none = zero_details(vae).expand(len(x), -1, *z.shape[2:])
        base = F.interpolate(vae.decode_base(z), x.shape[2:], mode="bicubic", align_corners=False)
        without = vae.decode(torch.cat([z, none], dim=1))
        return {"base only": base, "z_d = 0": without, "DA-VAE": vae.decode(z_all)}

    shown = versions(x)
    average = {name: psnr(images, y).mean().item() for name, y in versions(images).items()}
    for name, y in shown.items():
        print(f"{name:<12}{psnr(x, y).item():.2f} dB; {average[name]:.2f} dB on {len(images)} images")
    row = {"x": x, **shown, "4x error": 4 * (x_hat - x).abs() - 1}
    save_grid(torch.cat(list(row.values())).clamp(-1, 1), out / "3_decode.png", len(row), 3, list(row))


def warm_start(base, vae, settings, noise, cond, uncond, out):
    """4. The widened transformer at step 0 is the base transformer."""
    model = deepcopy(base)
    model.expand_channels(vae.D)
    show("P.weight", model.P.weight)
    show("P_new.weight, zeros", model.P_new.weight)
    show("O.weight", model.O.weight)
    show("O_new.weight, zeros", model.O_new.weight)
    change, detail = warm_start_difference(base, model, noise[:, :vae.C], cond)
    print(f"max |v - v_base| = {change}, max |v_d| = {detail}")

    ts = time_grid(settings["steps"], settings["shift"])
    small = sample_flow(base, noise[:, :vae.C], ts, cond, uncond, settings["cfg"])
    wide = sample_flow(model, noise, ts, cond, uncond, settings["cfg"])
    rows = torch.cat([vae.decode_base(small), vae.decode_base(wide[:, :vae.C])]).clamp(-1, 1)
    labels = ["base model"] * len(noise) + ["widened, step 0"] * len(noise)
    save_grid(rows, out / "4_warm_start.png", len(noise), 3, labels)


def schedule(run, N, steps, out):
    """5. Both losses, and the weight of the details."""
    log = read_log(run)
    weights = [detail_weight(n, N) for n in range(steps)]
    panels = [
        ("step", "mean (v - v*)^2", "-", {"base": log["base"], "detail": log["detail"]}),
        ("step n", "w(n)", "-", {"w(n)": [list(range(steps)), weights]}),
    ]
    plot(panels, out / "5_losses.png", size=(8, 2.8))


def sampling(dit, vae, settings, noise, cond, uncond, one, out):
    """6. From noise to an image of class `one`, and all classes with and without their details."""
    ts = time_grid(settings["steps"], settings["shift"])
    y = cond[0][one:one + 1]
    null = uncond[0][one:one + 1]
    path, labels = [], []
    for n in range(0, settings["steps"] + 1, max(1, settings["steps"] // 5)):
        x_t = sample_flow(dit, noise[one:one + 1], ts[:n + 1], (y,), (null,), settings["cfg"])
        path.append(vae.decode(x_t))
        labels.append(f"t = {ts[n]:.2f}")
    save_grid(torch.cat(path).clamp(-1, 1), out / "6_flow.png", len(path), 2, labels)

    full, base = generate(dit, vae, range(len(noise)), settings)
    base = F.interpolate(base, full.shape[2:], mode="bicubic", align_corners=False).clamp(-1, 1)
    labels = ["base only"] * len(full) + ["with details"] * len(full)
    save_grid(torch.cat([base, full]), out / "6_samples.png", len(full), 2, labels)


@torch.no_grad()
def main(cfg):
    dit, vae, about = load_run(cfg.run)
    own = about["config"]
    base = load_dit(latest_checkpoint(own["base"]))
    other = load_davae(cfg.other) if cfg.other else None
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)

    # the image to follow, the first of a few hundred that the run has not seen
    held_out = data.open_dataset("procedural", own["image_size"], cfg.image + cfg.images, own["seed"] + 1)
    pixels, _ = data.stack(held_out, range(cfg.image, cfg.image + cfg.images))
    images = data.to_tensor(pixels)                                           # (N, 3, H, W) in [-1, 1]
    x = images[:1]

    # a sample of each class, made as the run's own pictures are
    settings = settings_of(SampleConfig(steps=own["sample_steps"], seed=own["seed"]), about, "")
    y = torch.arange(dit.cfg.num_classes)
    side = own["image_size"] // vae.f
    noise = sample_noise(own["seed"], range(len(y)), (vae.C + vae.D, side, side))
    cond = (y,)
    uncond = (torch.full_like(y, dit.cfg.num_classes),)

    base_latent(vae, x, out)
    details(vae, other, x, images, out)
    decoding(vae, x, images, out)
    warm_start(base, vae, settings, noise, cond, uncond, out)
    schedule(cfg.run, own["N"], own["steps"], out)
    sampling(dit, vae, settings, noise, cond, uncond, cfg.image % len(y), out)
    print(f"wrote {len(list(out.glob('[1-6]_*.png')))} pictures into {out}")


if __name__ == "__main__":
    main(config.cli(Config))
