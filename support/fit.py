"""A start for the two new blocks of a DAVAE by least squares, in closed form, instead of at random.

The base VAE's own latent of the full-size image holds four pixels where z_all holds one. Three of them
become z_d, next to each other, so that group c of the alignment is channel c;
the up block finds the fourth from z.
Differs from the paper, where both blocks start at random: on a CPU one cannot afford those steps.
"""
import torch
import torch.nn.functional as F


def ridge(pairs, strength=1e-3):
    """The W that minimises sum |X W - Y|^2 + strength * |W|^2 * (mean squared norm of X's columns); float64.

    pairs: batches of X (N, in), Y (N, out);  returns (in, out)
    """
    A = 0                                                          # X^T X, summed over batches
    B = 0                                                          # X^T Y
    for X, Y in pairs:
        A = A + X.T @ X
        B = B + X.T @ Y
    A.diagonal().add_(strength * A.diagonal().mean())
    return torch.linalg.solve(A, B)


@torch.no_grad()
def fit_new_blocks(vae, images):
    """Set the down and the up block of a DAVAE (r = 2, D = 3C) by two ridge regressions.

    images: batches (B, 3, H, W) of training images, about 50,000 latent pixels in all
    raises: SystemExit unless D = 3C, r = 2 and the down block has the 1x1 convolution that takes the solution
    """
    if vae.D != 3 * vae.C or vae.r != 2 or vae.down.proj is None:
        raise SystemExit(f"--fit=True needs D = 3C, r = 2 and a 1x1 shortcut in the down block, as VA-VAE's; "
                         f"here D={vae.D}, C={vae.C}, r={vae.r}: give --fit=False")
    examples = [example(vae, x) for x in images]
    for weight in (vae.down.conv.weight, vae.down.conv.bias, vae.up.conv.weight, vae.up.conv.bias):
        weight.zero_()

    # down block: from the encoder's features to the three pixels, by its 1x1 shortcut
    W = ridge(down_pair(e) for e in examples)                      # (4F, D)
    vae.down.proj.weight[:vae.D] = W.T[:, :, None, None]
    vae.down.conv.bias[vae.D // 4:] = -6                           # logvar: little noise at first

    # up block: from 3x3 patches of [z, z_d] to what its shortcut leaves of the decoder's features
    W = ridge(up_pair(vae, e) for e in examples).T            # (4F, 9(C+D) + 1), the last column for the bias
    vae.up.conv.weight.copy_(W[:, :-1].reshape(vae.up.conv.weight.shape))
    vae.up.conv.bias.copy_(W[:, -1])


def example(vae, x):
    """(features, z, details, target) of a batch of images: what the regressions read, and are to give."""
    base = vae.base
    features = vae.detail_encoder(x)                               # (B, F, 2h, 2w)
    z_full = base.to_moments(features)[:, :vae.C]                  # (B, C, 2h, 2w), raw
    mean = base.mean.view(1, -1, 1, 1)
    std = base.std.view(1, -1, 1, 1)
    pixels = F.pixel_unshuffle((z_full - mean) / std, 2)           # (B, 4C, h, w)
    details = pixels.unflatten(1, (vae.C, 4))[:, :, :3].flatten(1, 2)        # (B, 3C, h, w)
    return features, vae.encode_base(x), details, base.from_latent(z_full)


def down_pair(example):
    """X (B*h*w, 4F), Y (B*h*w, D) of the down block."""
    features, _, details, _ = example
    return rows(F.pixel_unshuffle(features, 2)), rows(details)


def up_pair(vae, example):
    """X (B*h*w, 9(C+D) + 1), Y (B*h*w, 4F) of the up block."""
    features, z, _, target = example
    z_all = torch.cat([z, vae.down(features)[:, :vae.D]], dim=1)
    patches = rows(F.unfold(z_all, 3, padding=1).unflatten(2, z.shape[2:]))
    return F.pad(patches, (0, 1), value=1.0), rows(F.pixel_unshuffle(target - vae.up(z_all), 2))


def rows(x):
    """(B, c, h, w) -> (B*h*w, c) float64."""
    return x.movedim(1, -1).flatten(0, 2).double()
