"""fit"""
import torch
import torch.nn.functional as F


def ridge(pairs, strength=1e-3):
    """argmin_W of sum |X W - Y|^2 + strength * |W|^2 * mean column norm^2, from batches of X (N, in), Y (N, out); float64."""
    A = B = 0
    for X, Y in pairs:
        A, B = A + X.T @ X, B + X.T @ Y
    A.diagonal().add_(strength * A.diagonal().mean())
    return torch.linalg.solve(A, B)


@torch.no_grad()
def fit_new_blocks(vae, images):
    """Start the down and the up block where z_all carries the base VAE's own latent of the full-size image.

    That latent holds four pixels where z_all holds one: three of them become z_d, next to each other (so that group c of
    `align_loss` is channel c), and the up block finds the fourth from z, both by least squares, in closed form.
    images: batches (B, 3, H, W) of training images, about 50,000 latent pixels in all.
    Differs from the paper, where both blocks start at random: on a CPU, those are the steps that one cannot afford.
    raises: SystemExit unless D = 3C and the down block has the 1x1 convolution that takes the solution (as VA-VAE's has).
    """
    base, C, D = vae.base, vae.C, vae.D
    if D != 3 * C or vae.down.proj is None:
        raise SystemExit(f"--fit=True needs D = 3C and a down block with a 1x1 shortcut; here D={D}, C={C}: give --fit=False")

    def rows(x):                                                   # (B, c, h, w) -> (B*h*w, c)
        return x.movedim(1, -1).flatten(0, 2).double()

    features = []
    for x in images:
        h = vae.detail_encoder(x)                                  # (B, F, 2h, 2w)
        z_full = base.to_moments(h)[:, :C]                         # (B, C, 2h, 2w), raw
        details = F.pixel_unshuffle(base.normalise(z_full), 2).unflatten(1, (C, 4))[:, :, :3].flatten(1, 2)
        features.append((h, vae.encode_base(x), details, base.from_latent(z_full)))
    for weight in (vae.down.conv.weight, vae.down.conv.bias, vae.up.conv.weight, vae.up.conv.bias):
        weight.zero_()
    W = ridge((rows(F.pixel_unshuffle(h, 2)), rows(details)) for h, _, details, _ in features)
    vae.down.proj.weight[:D] = W.T[:, :, None, None]
    vae.down.conv.bias[D // 4:] = -6                               # logvar: little noise at first

    def pair(h, z, _, target):
        z_all = torch.cat([z, vae.down(h)[:, :D]], dim=1)
        patches = F.pad(rows(F.unfold(z_all, 3, padding=1).unflatten(2, z.shape[2:])), (0, 1), value=1.0)
        return patches, rows(F.pixel_unshuffle(target - vae.up(z_all), 2))

    W = ridge(pair(*f) for f in features).T                        # (4F, 9(C+D) + 1), the last column for the bias
    vae.up.conv.weight.copy_(W[:, :-1].reshape(vae.up.conv.weight.shape))
    vae.up.conv.bias.copy_(W[:, -1])
