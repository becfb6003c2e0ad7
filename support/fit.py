"""Stage 1 in closed form: the two new blocks of a DAVAE by least squares, without a training step.

The base VAE already has what the details should hold: its own latent of the full-size image. Per position of
the small grid, and with pixels unshuffled into channels,

    z    (C)        base latent of the small image, which z_all contains anyway
    U    (r^2 C)    base latent of the full-size image, as the decoder's first convolution (the stem) sees it
    Y    (r^2 F)    the decoder's features of the full-size image: the stem's output

Y is what the up block should output, and it is linear in U, because the stem is a convolution. The details
can carry D directions of U:  z_d = U V.  Which ones? Not those in which U varies most, but those that z does
not predict and that change the decoded image most:

    R = U - (the linear prediction of U from 3x3 positions of z)
    M = J^T J, J the decoder's Jacobian at U          u^T M u: the squared change of the image due to u
    V = S Q, with M = S S^T and Q the D leading principal directions of R S;  U V then scaled to mean square 1

Of all U V with D numbers, this one predicts R with the least error in the image (Eckart and Young, 1936):
it is reduced-rank regression (Izenman, 1975) with the decoder's own measure of error.

The down block gives U V exactly: its shortcut reads a copy of the base's own head (`LatentHead`). The up
block is the least-squares map from 3x3 positions of [z, z_d] to Y. With D = r^2 C nothing is left out, and
the image is the base VAE's own at full size. Nothing is centred, so beyond the border of an image U, z_d and
the padding of convolutions are all 0.

Besides M, all that is needed of the images is second moments: G = X^T X of X = [1, patches of z, patches of
U], one row per latent pixel, summed in one pass. Each later step is a line of algebra on G.
Memory: (1 + 9C + 9 r^2 C)^2 float64, so 17 MB for C = 32, r = 2 and 190 MB for r = 4.

`align` then changes the basis of z_d so that group means predict z (Eq. 3); see `alignment`.

Differs from the paper, where both blocks start at random (`--fit=random`) and the down block's shortcut reads
the encoder's features: the training steps that this saves are too expensive on a CPU.
"""
from copy import deepcopy

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.dcae import Stem
from support.levels import importance

TAPS = 9                                               # positions of a 3x3 patch; index 4 is its centre


class LatentHead(nn.Module):
    """A trainable copy of the base VAE's head: features (B, F, r*h, r*w) -> U, as a map (B, C, r*h, r*w)."""

    def __init__(self, base):
        super().__init__()
        self.C = base.C
        self.to_moments = deepcopy(base.to_moments)
        self.before_stem = nn.Sequential(*deepcopy(stem(base)[:-1]))
        self.requires_grad_(True)

    def forward(self, x):
        return self.before_stem(self.to_moments(x)[:, :self.C])


def stem(base):
    """The layers of a base's `from_latent`; the last is the decoder's first convolution."""
    layers = base.from_latent
    return list(layers) if isinstance(layers, nn.Sequential) else [layers]


# ---------------------------------------------------------------- least squares


def solve_ridge(A, B, strength):
    """The W that minimises sum |X W - Y|^2 + strength * |W|^2 * (mean squared norm of X's columns).

    A: X^T X (in, in), B: X^T Y (in, out), float64;  returns (in, out)
    """
    penalty = strength * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)
    return torch.linalg.solve(A + penalty, B)


def ridge(pairs, strength):
    """`solve_ridge` on batches of examples X (N, in), Y (N, out), of which only moments are kept."""
    A = 0                                                          # X^T X, summed over batches
    B = 0                                                          # X^T Y
    for X, Y in pairs:
        A = A + X.T @ X
        B = B + X.T @ Y
    return solve_ridge(A, B, strength)


# ---------------------------------------------------------------- the closed form


@torch.no_grad()
def fit_new_blocks(vae, images, align=1.0, pixels=False, strength=1e-6):
    """Set the down and up blocks of a DAVAE with `latent_shortcut`.

    images: batches (B, 3, H, W) of training images; some 20 latent pixels for each of the 9 (C+D) unknowns
    align:  0: the directions of reduced-rank regression, strongest first in the order of support/levels.py;
            1: group means are the best linear prediction of z; or in between
    pixels: the baseline: z_d is D/C of every r^2 pixels of U, only scaled (space to depth); with `align` 0
    strength: of the ridge, for what the images leave undetermined
    Every rank may fit the same images: DistributedDataParallel then uses rank 0's result.
    returns {"kept": of the features' energy that z does not predict, the fraction that [z, z_d] predict;
             "told": the fraction of z's energy that the details predict linearly}
    raises: ValueError for too few images, or what `check_fit` refuses
    """
    check_fit(vae)
    C = vae.C
    G, M = moments(vae, images)                                    # square, 1 + 9C + 9 r^2 C and r^2 C wide
    K = features_of_patches(vae)                                   # Y = X K; needs no images
    inputs = 1 + TAPS * C                                          # 1 and the patches of z
    check_count(int(G[0, 0]), inputs + TAPS * vae.D)
    G = G / G[0, 0]                                                # means over positions, not sums
    z = slice(1 + TAPS // 2, inputs, TAPS)                         # the columns of X that hold z itself,
    U = slice(inputs + TAPS // 2, None, TAPS)                      # and U

    # what z does not predict of X's columns: R = X - X[:, :inputs] W, and its moments R^T R
    W = solve_ridge(G[:inputs, :inputs], G[:inputs], strength)
    R = G - G[:, :inputs] @ W

    # the D directions of U that matter most to the decoder
    V = some_pixels(C, vae.r**2, vae.D // C).to(M) if pixels else reduced_rank(R[U, U], M, vae.D)
    V = V / (V.T @ G[U, U] @ V).diagonal().sqrt()
    own = V.T @ G[U, U] @ V                                        # moments of z_d: z_d^T z_d, with ones
    with_z = V.T @ G[U, z]                                         # on the diagonal, and z_d^T z

    # up block: from X A = [1, patches of z, patches of z_d] to Y
    A = torch.block_diag(torch.eye(inputs).to(V), on_patches(V))
    W = solve_ridge(A.T @ G @ A, A.T @ G @ K, strength)
    left = K - A @ W                                               # Y - X A W = X left
    kept = 1 - (left * (G @ left)).sum() / (K * (R @ K)).sum()
    told = (with_z * solve_ridge(own, with_z, strength)).sum() / G[z, z].trace()

    # change the basis of the details, to be aligned or strongest first; the up block undoes it
    if align or not pixels:
        T = alignment(own, with_z, align) if align else torch.eye(vae.D).to(V)[:, importance(C, vae.D)]
        V = V @ T
        W[inputs:] = on_patches(torch.linalg.inv(T)) @ W[inputs:]

    set_down_block(vae.down, V)
    set_up_block(vae.up, W)
    return {"kept": kept.item(), "told": told.item()}


def check_fit(vae):
    """raises: ValueError if this DAVAE cannot start in closed form"""
    copy, original = vae.detail_encoder.state_dict(), vae.base.encoder.state_dict()
    if copy.keys() != original.keys() or not all(torch.equal(copy[name], original[name]) for name in copy):
        raise ValueError("the closed form reads the base's own features, but the detail encoder is no copy "
                         "of the base's encoder; give --fit=random")
    last = stem(vae.base)[-1]
    conv = last.conv if isinstance(last, Stem) else last           # DC-AE's stem also has a shortcut
    if not isinstance(conv, nn.Conv2d) or max(conv.kernel_size) > 2 * vae.r + 1:
        raise ValueError(f"{type(vae.base).__name__}.from_latent ends in {last}: wanted a convolution of at "
                         f"most {2 * vae.r + 1} pixels (davae.py:BaseVAE says where to cut), or --fit=random")
    most = vae.r**2 * vae.C
    if vae.D > most:
        raise ValueError(f"--D={vae.D}: details in closed form are directions of the full-size latent, which "
                         f"has r^2 C = {most} numbers per position; give --D={most} or less, or --fit=random")


def check_count(positions, unknowns):
    """raises: ValueError if there are too few latent pixels to fit this many unknowns per feature"""
    if positions < unknowns:
        raise ValueError(f"the closed form has {unknowns} unknowns per feature, but the images have only "
                         f"{positions} latent pixels: wanted about {20 * unknowns}; give more or larger "
                         "images, or --fit=random")


# ---------------------------------------------------------------- the moments of the images


def moments(vae, images):
    """(G, M), summed over all positions; float64.

    G: X^T X of X = [1, patches of z, patches of U];  M: J^T J, on up to four 256-pixel crops per batch
    """
    G = 0
    M = 0
    for seed, x in enumerate(images):
        z = vae.encode_base(x)                                                       # (B, C, h, w)
        U = F.pixel_unshuffle(vae.down.head(vae.detail_encoder(x)), vae.r)           # (B, r^2 C, h, w)
        X = torch.cat([patches(z), patches(U)], dim=1).double()
        X = F.pad(X, (1, 0), value=1.0)
        G = G + X.T @ X
        M = M + what_shows(vae, x[:4, :, :256, :256], seed)
    return G, M


def what_shows(vae, x, seed):
    """J^T J (r^2 C, r^2 C) at images x, J the Jacobian of the decoded image in U, summed over positions.

    Estimated by one random projection (Hutchinson): for unit noise e, J^T e has the moments J^T J.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    U = vae.down.head(vae.detail_encoder(x))                                         # (B, C, r*h, r*w)
    with torch.enable_grad():
        U.requires_grad_()
        image = vae.base.decoder(stem(vae.base)[-1](U))
        g, = torch.autograd.grad(image, U, noise)
    g = F.pixel_unshuffle(g, vae.r).movedim(1, -1).flatten(0, 2).double()            # (B*h*w, r^2 C)
    return g.T @ g


def patches(x):
    """3x3 neighbourhoods, zero beyond the border: (B, c, h, w) -> (B*h*w, 9c), channel by channel."""
    return F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)


def on_patches(V):
    """A map of channels, extended to their 3x3 patches: (c, d) -> (9c, 9d)."""
    return torch.kron(V.contiguous(), torch.eye(TAPS).to(V))


def features_of_patches(vae):
    """K (1 + 9C + 9 r^2 C, r^2 F) with Y = X K: the stem as a matrix on 3x3 patches of U.

    Its rows for U are the stem's outputs, less the bias, for patches that are 1 in one place, else 0.
    """
    conv = deepcopy(stem(vae.base)[-1]).double()
    n = TAPS * vae.r**2 * vae.C

    def features(patch):
        """(n, 9 r^2 C) -> (n, r^2 F): Y at the centre of the patch."""
        U = F.pixel_shuffle(patch.unflatten(1, (-1, 3, 3)), vae.r)                   # (n, C, 3r, 3r)
        return F.pixel_unshuffle(conv(U), vae.r)[:, :, 1, 1]

    units = torch.eye(n, dtype=torch.float64, device=vae.mean.device)
    bias = features(torch.zeros_like(units[:1]))                                     # (1, r^2 F)
    of_U = torch.cat([features(part) for part in units.split(256)]) - bias
    of_z = bias.new_zeros(TAPS * vae.C, bias.shape[1])
    return torch.cat([bias, of_z, of_U])


# ---------------------------------------------------------------- the directions of the details


def reduced_rank(RR, M, D):
    """The V of the best map of rank D, R -> R V -> R, where an error e costs e^T M e.

    RR: R^T R (n, n), M: (n, n), D <= n;  returns (n, D), the directions that explain most first
    """
    little = 1e-4 * M.diagonal().mean() * torch.eye(len(M)).to(M)  # so that no direction has zero weight
    S = torch.linalg.cholesky(M + little)
    _, Q = torch.linalg.eigh(S.T @ RR @ S)                         # the largest come last
    return S @ Q.flip(1)[:, :D]


def some_pixels(C, pixels, group):
    """V (pixels * C, group * C); U V is the last `group` of every `pixels` pixels of each channel of U."""
    of_one = torch.eye(pixels)[:, pixels - group:]
    return torch.kron(torch.eye(C), of_one)


def alignment(moments, with_z, amount):
    """T (D, D): z_d T holds the same details in another basis, in which group means predict z.

    moments: mean z_d^T z_d (D, D);  with_z: mean z_d^T z (D, C);  amount: in [0, 1], how far
    At 1, each channel of group c is z_hat_c, the best linear prediction of z_c from the details, plus a part
    that sums to 0 over the group: the other D - C dimensions of the details, in the basis nearest to that at
    amount 0. (Which of them share a group made no difference on 11 photos and TAEF2, 2026-11-25.) So the
    alignment loss (Eq. 4) is what the details cannot predict of z. As T is invertible, the mode of z_d loses
    nothing; a sample does where a direction has less energy than its noise, as some have at 1 if D = C.
    """
    C = with_z.shape[1]
    energy, axes = torch.linalg.eigh(moments)
    white = axes / energy.sqrt() @ axes.T                          # the moments of z_d @ white are 1
    M = white @ with_z                                             # (D, C): z_hat = z_d @ white @ M
    groups = torch.eye(C).to(M).repeat_interleave(len(M) // C, dim=0)            # (D, C): group membership
    rest = complement(M)                                           # (D, D-C): what is not in z_hat
    apart = complement(groups)                                     # (D, D-C): what sums to 0 in each group
    T = white @ (M @ groups.T + rest @ nearest_rotation(rest.T @ apart) @ apart.T)

    sign = torch.ones(len(M), 1).to(M)                             # V's signs are free: avoid a reflection
    sign[-1] = torch.linalg.slogdet(T).sign                        # the determinant itself may underflow
    return sign * part_of_the_way(sign * T, amount)


def complement(A):
    """An orthonormal basis (D, D-C) of all that is orthogonal to the columns of A (D, C)."""
    return torch.linalg.qr(A, mode="complete").Q[:, A.shape[1]:]


def nearest_rotation(A):
    """The orthogonal matrix nearest to a square one."""
    left, _, right = torch.linalg.svd(A)
    return left @ right


def part_of_the_way(T, amount):
    """From the identity (0) to T (1), invertible all the way: T = stretch @ turn, each raised to `amount`."""
    turn = nearest_rotation(T)
    stretch = T @ turn.T                                           # symmetric, positive
    sizes, axes = torch.linalg.eigh((stretch + stretch.T) / 2)
    angles, planes = torch.linalg.eig(turn)                        # e^(i angle) of each plane that it turns
    turn = planes * angles**amount @ torch.linalg.inv(planes)
    return axes * sizes**amount @ axes.T @ turn.real


# ---------------------------------------------------------------- into the blocks


def set_down_block(down, V):
    """Make it output the moments of z_d: mean U V, a small constant variance."""
    for parameter in (*down.conv.parameters(), *down.proj.parameters()):
        parameter.zero_()
    D = V.shape[1]
    down.proj.weight[:D] = V.T[:, :, None, None]
    down.proj.bias[D:] = -6                                        # logvar: little noise at first


def set_up_block(up, W):
    """W (1 + 9(C+D), r^2 F): the bias, then the sum of convolution and shortcut."""
    channels = up.conv.in_channels
    units = torch.eye(channels)[:, :, None, None].to(up.conv.weight)
    shortcut = up.shortcut(units)[:, :, 0, 0].T                    # (r^2 F, C+D)
    up.conv.bias.copy_(W[0])
    up.conv.weight.copy_(W[1:].T.unflatten(1, (channels, 3, 3)))
    up.conv.weight[:, :, 1, 1] -= shortcut
