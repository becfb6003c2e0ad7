"""support/fit.py: least squares, and new blocks that start out from the full-size latent."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_vae
from davae import DAVAE, AutoencoderKL, DAVAEConfig, KLConfig, align_loss
from support import data, fit, levels, ranks, runs
from support.bases import TAEF2, AutoencoderKLFlux2
from support.metrics import psnr
from support.weights import load_davae

# Small versions of the two public configurations; VA-VAE's has attention, and 1x1 convolutions at the latent.
VAVAE = KLConfig(C=4, widths=(8, 16), blocks=1, groups=4, attn=(1,), quant=True)
SD3 = KLConfig(C=4, widths=(8, 16), blocks=1, groups=4)


def make(config, D, r=2, kind=AutoencoderKL):
    """A DAVAE with random weights and statistics, in float64."""
    torch.manual_seed(0)
    base = kind(config)
    for module in base.modules():
        if hasattr(module, "std"):                                      # the base; FLUX.2's also has layers
            module.mean.uniform_(-1, 1)
            module.std.uniform_(0.5, 2)
    return DAVAE(base, DAVAEConfig(D=D, r=r, latent_shortcut=True)).double().eval()


def images(n=16, size=32):
    """Smooth noise (n, 3, size, size)."""
    torch.manual_seed(1)
    small = torch.rand(n, 3, size // 4, size // 4, dtype=torch.float64) * 2 - 1
    return F.interpolate(small, scale_factor=4, mode="bicubic")


@torch.no_grad()
def features(vae, x):
    """The features of images: (from the up block, from the base's stem at full size)."""
    z_all = torch.cat([vae.encode_base(x), vae.detail_posterior(x).mean], dim=1)
    return vae.up(z_all), vae.base.from_latent(vae.base.posterior(x).mean)


# ---------------------------------------------------------------- least squares


def test_ridge_is_least_squares_over_all_batches():
    X = torch.randn(60, 5).double()
    Y = torch.randn(60, 3).double()
    parts = list(zip(X.split(7), Y.split(7), strict=True))
    assert torch.allclose(fit.ridge(parts, 0.0), torch.linalg.lstsq(X, Y).solution)
    penalty = 0.1 * X.square().sum(0).mean() * torch.eye(5)
    assert torch.allclose(fit.ridge(parts, 0.1), torch.linalg.solve(X.T @ X + penalty, X.T @ Y))


@pytest.mark.parametrize("D", [1, 3, 6])
def test_reduced_rank_is_as_good_as_the_best_map_of_that_rank(D):
    R = torch.randn(200, 6).double() @ torch.randn(6, 6).double()
    J = torch.randn(9, 6).double()                                      # an error e costs |J e|^2
    M = J.T @ J
    V = fit.reduced_rank(R.T @ R, M, D)
    through_V = R @ V @ torch.linalg.lstsq(R @ V, R).solution

    left, sizes, right = torch.linalg.svd(R @ J.T, full_matrices=False)
    best = left[:, :D] * sizes[:D] @ right[:D]                          # the best of rank D
    assert torch.allclose(through_V @ J.T, best, atol=1e-3 * sizes[0])  # up to the small ridge on M
    least = sizes[D:6].square().sum()
    assert ((R - through_V) @ J.T).square().sum() == pytest.approx(least.item(), rel=1e-5, abs=1e-6)


def test_what_shows_estimates_the_decoders_squared_jacobian():
    vae = make(SD3, D=8)
    x = images(1, 8)                                                    # one position of a 4x4 map of U
    U = vae.down.head(vae.detail_encoder(x)).detach()
    J = torch.autograd.functional.jacobian(lambda u: vae.base.decoder(vae.base.from_latent(u)), U)
    J = F.pixel_unshuffle(J.flatten(0, 4), 2)                           # (3*8*8, 16, 2, 2)
    exact = torch.einsum("iahw,ibhw->ab", J, J)
    with torch.no_grad():
        found = sum(fit.what_shows(vae, x, seed) for seed in range(400)) / 400
    assert (found - exact).norm() < 0.2 * exact.norm()


def test_the_matrix_on_patches_equals_the_stem():
    vae = make(VAVAE, D=16)
    x = images(4)
    U = F.pixel_unshuffle(vae.down.head(vae.detail_encoder(x)), 2)
    X = torch.cat([torch.ones(4 * 64, 1), torch.randn(4 * 64, 36), fit.patches(U)], dim=1)
    Y = F.pixel_unshuffle(features(vae, x)[1], 2).movedim(1, -1).flatten(0, 2)
    assert torch.allclose(X @ fit.features_of_patches(vae), Y)          # at the borders too


def test_moments_do_not_depend_on_the_batches():
    vae = make(SD3, D=12)
    x = images(12)
    with torch.no_grad():
        assert torch.allclose(fit.moments(vae, x.split(5))[0], fit.moments(vae, [x])[0])


# ---------------------------------------------------------------- the fitted blocks


@pytest.mark.parametrize("kind, config, r", [
    (AutoencoderKL, VAVAE, 2), (AutoencoderKL, VAVAE, 4), (AutoencoderKL, SD3, 2), (AutoencoderKL, SD3, 4),
    (AutoencoderKLFlux2, VAVAE, 2)])
def test_with_all_directions_decoding_equals_the_base_at_full_size(kind, config, r):
    vae = make(config, D=r * r * 4, r=r, kind=kind)
    fit.fit_new_blocks(vae, images(16, 16 * r).split(8), strength=1e-13)
    x = images(4, 16 * r)
    found, target = features(vae, x)
    assert torch.allclose(found, target, atol=1e-6 * target.abs().max())
    with torch.no_grad():
        assert torch.allclose(vae.decode(vae.encode(x)), vae.base.decode(vae.base.encode(x)), atol=1e-5)


def test_too_many_details_and_a_nonlinear_stem_are_refused():
    vae = make(SD3, D=20)
    with pytest.raises(ValueError, match="--D=20: .* r.2 C = 16 .*; give --D=16 or less, or --fit=random"):
        fit.fit_new_blocks(vae, [images(1)])
    vae.base.from_latent.append(torch.nn.ReLU())
    with pytest.raises(ValueError, match=r"AutoencoderKL.from_latent ends in ReLU.*, or --fit=random"):
        fit.fit_new_blocks(vae, [images(1)])


@pytest.mark.parametrize("r", [2, 4])
def test_a_stem_that_reads_beyond_the_neighbouring_positions_is_refused(r):
    vae = make(SD3, D=8, r=r)
    largest = 2 * r + 1                                                 # r pixels of a neighbour on each side
    vae.base.from_latent[-1] = torch.nn.Conv2d(4, 16, largest, padding=r)
    fit.check_fit(vae)
    vae.base.from_latent[-1] = torch.nn.Conv2d(4, 16, (1, largest + 2), padding=(0, r + 1))
    with pytest.raises(ValueError, match=f"wanted a convolution of at most {largest} pixels"):
        fit.check_fit(vae)


@torch.no_grad()
def test_a_detail_encoder_that_is_no_copy_of_the_bases_is_refused():
    changed = make(SD3, D=8)
    next(changed.detail_encoder.parameters()).add_(0.1)
    other = make(SD3, D=8)
    other.detail_encoder = torch.nn.Conv2d(3, 16, 2, stride=2).double()     # images -> as many features
    for vae in (changed, other):
        with pytest.raises(ValueError, match="is no copy of the base's encoder; give --fit=random"):
            fit.fit_new_blocks(vae, images().split(8))


def test_more_directions_keep_more_of_the_features():
    left = []
    for D in (4, 8, 12, 16):
        vae = make(SD3, D)
        kept = fit.fit_new_blocks(vae, images().split(8))["kept"]
        found, target = features(vae, images())
        left.append((found - target).square().sum().item())
        assert 0.3 < kept <= 1
    assert left[0] > 1.2 * left[1] > 1.44 * left[2] > 1.728 * left[3]


def test_without_alignment_the_strongest_directions_come_first_in_level_order(monkeypatch):
    found = []
    search = fit.reduced_rank

    def remembered(*args):
        found.append(search(*args))
        return found[0]

    monkeypatch.setattr(fit, "reduced_rank", remembered)
    vae = make(VAVAE, D=12)
    fit.fit_new_blocks(vae, [images()], align=0.0)
    places = levels.seen(4, 4, 12).flatten().nonzero().flatten()      # the first level's channels,
    directions = vae.down.proj.weight[places, :, 0, 0]
    strongest = found[0][:, :4].T                                      # up to their length
    cosines = F.cosine_similarity(directions[:, None], strongest[None], dim=2)
    assert torch.allclose(cosines.diagonal(), torch.ones(4).double(), atol=1e-6)


@torch.no_grad()
def test_with_pixels_the_details_are_three_in_four_of_the_full_size_latent():
    """Space to depth, up to the scale of each channel; a group belongs to one base channel."""
    vae = make(SD3, D=12)
    x = images()
    found = fit.fit_new_blocks(vae, [x], align=0.0, pixels=True)
    z_d = vae.detail_posterior(x).mean                                 # (B, 12, h, w)
    full = F.pixel_unshuffle(vae.base.posterior(x).mean, 2).unflatten(1, (4, 4))[:, :, 1:].flatten(1, 2)
    scale = full.square().mean((0, 2, 3), keepdim=True).sqrt()
    assert torch.allclose(z_d, full / scale, atol=1e-9)
    best = fit.fit_new_blocks(make(SD3, D=12), [x], align=0.0)
    assert 0 < found["kept"] < best["kept"] <= 1


def test_the_details_have_unit_mean_square_and_low_noise_and_leave_z_unchanged():
    vae = make(VAVAE, D=8)
    x = images()
    before = vae.encode(x)[:, :4]
    fit.fit_new_blocks(vae, x.split(8), align=0)
    posterior = vae.detail_posterior(x)
    assert torch.allclose(posterior.mean.square().mean((0, 2, 3)), torch.ones(8).double())
    assert (posterior.logvar == -6).all()
    assert torch.equal(vae.encode(x)[:, :4], before)


def make_taef2():
    torch.manual_seed(0)
    return DAVAE(TAEF2(C=4, width=4), DAVAEConfig(D=8, latent_shortcut=True)).double().eval()


@pytest.mark.parametrize("make_one", [lambda: make(VAVAE, D=8), make_taef2], ids=["VA-VAE", "TAEF2"])
@torch.no_grad()
def test_new_blocks_treat_a_crop_alone_as_they_do_within_the_image(make_one):
    """Except for two positions at its border, one per convolution. The base's norms and attention see the
    whole image, so the crop is taken from the latents and features that they produced.
    """
    vae = make_one()
    fit.fit_new_blocks(vae, images(4, 8 * vae.f).split(2))
    x = images(1, 12 * vae.f)
    z = vae.encode_base(x)                                              # (1, 4, 12, 12)
    h = vae.detail_encoder(x)                                           # (1, width, 24, 24)

    def up(z, h):
        return vae.up(torch.cat([z, vae.down(h)[:, :vae.D]], dim=1))

    whole = up(z, h)
    crop = up(z[:, :, 1:9, 3:11], h[:, :, 2:18, 6:22])                  # 8 of 12 positions, 16 of 24 features
    inside = whole[:, :, 6:14, 10:18]
    assert torch.allclose(crop[:, :, 4:12, 4:12], inside, rtol=0, atol=1e-10 * inside.abs().max())
    assert not torch.allclose(crop[:, :, :2], whole[:, :, 2:4, 6:22])   # the zero padding shows


@torch.no_grad()
def test_the_details_best_explain_what_z_does_not_and_kept_is_their_share():
    vae = make(SD3, D=4)
    x = images(8)
    kept = fit.fit_new_blocks(vae, [x], align=0.0)["kept"]
    U = F.pixel_unshuffle(vae.down.head(vae.detail_encoder(x)), 2).movedim(1, -1).flatten(0, 2)
    Y = F.pixel_unshuffle(features(vae, x)[1], 2).movedim(1, -1).flatten(0, 2)
    z = F.pad(fit.patches(vae.encode_base(x)), (1, 0), value=1.0)
    z_all = torch.cat([z, fit.patches(vae.detail_posterior(x).mean)], dim=1)

    def lacks(X, Y):
        return Y - X @ torch.linalg.lstsq(X, Y).solution

    R = lacks(z, U)
    J = torch.linalg.cholesky(fit.moments(vae, [x])[1])
    V = vae.down.proj.weight[:4, :, 0, 0].T
    least = torch.linalg.svdvals(R @ J)[4:].square().sum()
    assert (lacks(R @ V, R) @ J).square().sum() == pytest.approx(least.item(), rel=1e-6)
    part = lacks(z_all, Y).square().sum() / lacks(z, Y).square().sum()
    assert kept == pytest.approx(1 - part.item(), abs=1e-4)


# ---------------------------------------------------------------- alignment


@pytest.mark.parametrize("D", [4, 12])
def test_fit_align_lowers_the_alignment_loss_and_keeps_the_psnr(D):
    losses = []
    scores = []
    x = images()
    for amount in (0, 0.25, 0.5, 0.75, 1):
        vae = make(SD3, D)
        fit.fit_new_blocks(vae, x.split(8), amount)
        with torch.no_grad():
            losses.append(align_loss(vae.encode_base(x), vae.detail_posterior(x).mean).item())
            scores.append(psnr(vae.decode(vae.encode(x)), x).mean().item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]
    assert max(scores) - min(scores) < 1e-4


def test_aligned_group_means_best_predict_z_linearly_from_the_details():
    x = images()
    vae = make(SD3, D=12)
    told = fit.fit_new_blocks(vae, x.split(8), align=1)["told"]
    with torch.no_grad():
        z = vae.encode_base(x).movedim(1, -1).flatten(0, 2)
        z_d = vae.detail_posterior(x).mean.movedim(1, -1).flatten(0, 2)
    guess = z_d @ torch.linalg.lstsq(z_d, z).solution
    assert torch.allclose(z_d.unflatten(1, (4, 3)).mean(2), guess, atol=1e-6)
    assert told == pytest.approx((guess.square().sum() / z.square().sum()).item())
    assert torch.linalg.cond(z_d.T @ z_d) < 1e4                         # no dimension is lost


def test_alignment_loses_no_dimension_where_the_determinant_underflows():
    """512 channels, as DC-AE's f128 has; of a basis scaled by 0.2, the determinant is 1e-358, or 0."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(512, 512).double()).Q
    T = fit.alignment(torch.eye(512).double(), 0.2 * basis, 1.0)
    assert torch.det(T) == 0
    assert torch.allclose(torch.linalg.svdvals(T), torch.tensor(0.2).double())


@pytest.mark.parametrize("seed", range(8))
def test_half_an_alignment_loses_no_dimension_though_half_of_all_bases_are_reflections(seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(200, 6, generator=generator).double()
    with_z = torch.randn(6, 2, generator=generator).double()
    T = fit.alignment(X.T @ X / 200, with_z, 0.5)
    sizes = torch.linalg.svdvals(T)
    assert sizes[-1] > 0.05 * sizes[0]


def test_part_of_the_way_is_continuous_and_never_singular():
    torch.manual_seed(0)
    T = torch.randn(8, 8).double()
    if torch.det(T) < 0:
        T[0] = -T[0]
    assert torch.allclose(fit.part_of_the_way(T, 0.0), torch.eye(8).double())
    assert torch.allclose(fit.part_of_the_way(T, 1.0), T)
    steps = [fit.part_of_the_way(T, k / 100) for k in range(101)]
    assert max((b - a).norm() for a, b in zip(steps, steps[1:])) < 0.1 * T.norm()
    assert min(torch.det(step) for step in steps) >= min(1, torch.det(T)) * 0.999


# ---------------------------------------------------------------- in train_vae.py


def test_a_fitted_run_says_so_and_resumes_without_fitting_again(davae_config, tmp_path, monkeypatch, capsys):
    cfg = davae_config(tmp_path / "a", fit="closed", gan=0.0, steps=2)
    train_vae.main(cfg)
    assert "a: new blocks start in closed form (docs/closed_form.md); the details" in capsys.readouterr().out
    monkeypatch.setattr(train_vae, "fit_new_blocks", None)
    train_vae.main(replace(cfg, steps=3))
    assert runs.step_of(cfg.out) == 3
    assert load_davae(cfg.out).cfg.latent_shortcut


def test_a_larger_fit_align_aligns_a_runs_closed_form_more(davae_config, tmp_path):
    losses = []
    for amount in (0.0, 0.5, 1.0):
        cfg = davae_config(tmp_path, fit="closed", fit_align=amount)
        vae = train_vae.initial_vae(cfg)
        train_set = data.open_dataset("procedural", 64, 32, cfg.seed)
        train_vae.start_in_closed_form(cfg, vae, train_set, torch.device("cpu"), 0)
        x = data.to_tensor(data.stack(train_set, range(8))[0])
        with torch.no_grad():
            losses.append(align_loss(vae.encode_base(x), vae.detail_posterior(x).mean).item())
    assert losses[0] > 1.1 * losses[1] > 1.21 * losses[2], losses


def test_more_details_than_the_closed_form_makes_are_refused_before_a_step_is_timed(davae_config, tmp_path):
    cfg = davae_config(tmp_path / "a", fit="closed", D=20)
    with pytest.raises(ValueError, match="--D=20: .*; give --D=16 or less, or --fit=random"):
        train_vae.trial(cfg, 1, torch.device("cpu"), {}, 0)


def test_too_few_images_are_refused_rather_than_memorised(kl_config):
    vae = DAVAE(AutoencoderKL(kl_config), DAVAEConfig(D=12, latent_shortcut=True))
    with pytest.raises(ValueError, match="145 unknowns per feature, but the images have only 128 latent"):
        fit.fit_new_blocks(vae, [torch.rand(2, 3, 32, 32)])


@pytest.mark.slow
@torch.no_grad()
def test_fitted_blocks_beat_the_base_alone_on_photos_before_any_training(shared):
    def photos(folder, count):
        every = data.open_dataset(str(shared(f"data/imagenette128/{folder}")), 128, 0, 0)
        indices = torch.linspace(0, len(every) - 1, count).long().tolist()
        return data.to_tensor(data.stack(every, indices)[0])

    vae = DAVAE(load_davae(shared("weights/taef2")).base, DAVAEConfig(D=96, latent_shortcut=True)).eval()
    fit.fit_new_blocks(vae, photos("train", 256).split(16))
    x = photos("eval", 32)
    base, full = train_vae.reconstruct(vae, x)
    assert psnr(full, x).mean() > psnr(base, x).mean() + 2.5


@pytest.mark.slow
@torch.no_grad()
def test_fitted_blocks_trail_full_size_as_much_on_512_pixel_photos_as_on_their_crops(shared):
    every = data.open_dataset(str(shared("data/cid512/train")), 512, 0, 0)

    def photos(first, last, count):
        indices = torch.linspace(first, last, count).long().tolist()
        return data.to_tensor(data.stack(every, indices)[0])

    def behind(x):
        scores = []
        for part in x.split(16 if x.shape[-1] < 512 else 1):
            full = vae.base.decode(vae.base.encode(part)).float()
            scores.append(psnr(full, part) - psnr(vae.decode(vae.encode(part)).float(), part))
        return torch.cat(scores).mean().item()

    vae = DAVAE(load_davae(shared("weights/taef2")).base, DAVAEConfig(D=96, latent_shortcut=True)).eval()
    x = photos(165, 204, 3)
    crops = x.unflatten(3, (4, 128)).unflatten(2, (4, 128)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    with ranks.autocast("auto", x.device):
        fit.fit_new_blocks(vae, photos(0, 160, 8).split(2))
        assert abs(behind(x) - behind(crops)) < 0.3
        assert behind(crops) < 1.5
