"""Channels in order of importance: what DC-AE 1.5 calls structured latents and augmented training.

Training hides the last channels of that order at random: from the decoder in stage 1, so that the first
channels learn to do without them (Eq. 1); from the transformer's input, output and target in stage 2, so that
it also learns the first channels by themselves (Eq. 2). A level is a number of channels that are shown. Each
image draws its own, uniformly from a list; a level that is listed twice comes twice as often.

In a DA-VAE only details are hidden, and levels count only these: (0, 32, 64, 96) for D = 96. The order goes
through the groups of Eq. (3) in turn: the first detail of every group, then the second of every group, and so
on. Without details (D = 0, the pure form), levels count the latent's channels, in the order that they have.

Differs from DC-AE 1.5, where one level is drawn for a whole step: drawing per image has the same mean and
less noise. Also, their scripts keep a level's weights by slicing, which is right only for patches of one
latent pixel; hiding is equivalent, and right for any patch.
"""
import torch
import torch.nn.functional as F

# An arbitrary number that gives these draws their own generator: with or without them, the images, noise and
# times of a step are the same.
APART = 0x1E7E15


def importance(groups, channels):
    """The place of each channel in the order, 0 first: (channels,), for `groups` equal groups of them."""
    index = torch.arange(channels)
    size = channels // groups
    return index % size * groups + index // size


def seen(keep, groups, channels):
    """1 where a channel is among the first `keep` of the order, 0 where it is hidden.

    keep: an int, or (B,);  returns (B, channels, 1, 1) float32, B = 1 for an int
    """
    keep = torch.as_tensor(keep).view(-1, 1)
    mask = importance(groups, channels).to(keep.device) < keep
    return mask.float()[:, :, None, None]


def seen_of_all(keep, C, D):
    """The same for z_all: C base channels, always seen, and D details; D = 0: for C channels."""
    if D == 0:
        return seen(keep, C, C)
    return F.pad(seen(keep, C, D), (0, 0, 0, 0, C, 0), value=1.0)             # (B, C+D, 1, 1)


def draw(levels, B, device):
    """(B,) levels, drawn independently and uniformly; the generator of everything else is left untouched."""
    generator = torch.Generator().manual_seed(torch.initial_seed() ^ APART)
    chosen = torch.randint(len(levels), (B,), generator=generator)
    return torch.tensor(levels)[chosen].to(device)


def masked(model, mask):
    """A transformer whose input and output are multiplied by `mask` (B, C+D, 1, 1): it neither sees nor
    predicts hidden channels.
    """
    def hide(x_t, t, *cond, **options):
        return model(x_t * mask, t, *cond, **options) * mask
    return hide


def hide_some(model, target, weight, w, cfg):
    """flow_loss's (model, target, weight) with some channels of each image hidden (Eq. 2), and their mask."""
    channels = target.shape[1]
    mask = seen_of_all(draw(cfg.keep_levels, len(target), target.device), channels - cfg.D, cfg.D)
    if cfg.keep_mean == "shown":
        weight = weight * share(mask, cfg.D, w)
    return masked(model, mask), target * mask, weight, mask


def means_of_shown(parts, mask, C):
    """flow_loss's "base" and "detail" errors as means over the channels that are shown; 0 if none is.

    parts: their means over all channels; mask: (B, C+D, 1, 1), 0 where a channel, and so its error, is hidden
    """
    channels = {"base": mask[:, :C], "detail": mask[:, C:]}
    return {name: parts[name] / channels[name].mean().clamp_min(1e-9) for name in channels if name in parts}


def share(mask, D, w):
    """(B, 1, 1, 1): times this, a mean over all channels becomes one over those that are shown.

    With weight w on details, as in Eq. (13). DC-AE 1.5's code divides like this; its Eq. 2 does not.
    """
    weights = mask.new_ones(1, mask.shape[1], 1, 1)
    if D:
        weights[:, -D:] = w
    return weights.sum() / (weights * mask).sum(dim=1, keepdim=True)


def check(levels, C, D, flag="--keep_levels"):
    """The levels.   raises: SystemExit with one sentence if a latent of C + D channels has no such level"""
    least, most = (0, D) if D else (1, C)
    for k in levels:
        if not least <= k <= most:
            what = "detail channels" if D else "channels"
            given = ",".join(map(str, levels))
            raise SystemExit(f"{flag}={given}: wanted numbers of {what}, {least} to {most}; "
                             f"{k} is out of range")
    return levels
