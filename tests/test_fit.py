"""support/fit.py: least squares, and new blocks that start with what the full-size latent holds."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_vae
from davae import DAVAE, AutoencoderKL, DAVAEConfig
from support import data, fit, runs
from support.metrics import psnr
from support.weights import load_davae


def test_ridge_is_least_squares_over_all_batches():
    X = torch.randn(60, 5).double()
    Y = torch.randn(60, 3).double()
    parts = list(zip(X.split(7), Y.split(7), strict=True))
    assert torch.allclose(fit.ridge(parts, 0.0), torch.linalg.lstsq(X, Y).solution)
    penalty = 0.1 * X.square().sum(0).mean() * torch.eye(5)
    assert torch.allclose(fit.ridge(parts, 0.1), torch.linalg.solve(X.T @ X + penalty, X.T @ Y))


@torch.no_grad()
def test_fitted_blocks_start_with_three_quarters_of_the_full_size_latent_and_find_the_rest(kl_config):
    torch.manual_seed(0)
    vae = DAVAE(AutoencoderKL(kl_config), DAVAEConfig(D=12)).train()
    head = vae.base.to_moments[0].weight                       # as if 1x1, so that the shortcut can be exact:
    head[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0     # all but the centre of 3x3
    x = F.interpolate(torch.rand(40, 3, 8, 8) * 2 - 1, scale_factor=4, mode="bicubic")
    z_full = vae.base.encode(x)                                     # (40, 4, 16, 16)
    target = vae.base.from_latent(vae.base.posterior(x).mean)

    def left_over(z_d):
        features = vae.up(torch.cat([vae.encode_base(x), z_d], dim=1))
        return ((features - target).square().mean() / target.var()).item()

    fit.fit_new_blocks(vae, x.split(8))
    posterior = vae.detail_posterior(x)
    corners = [z_full[:, :, 0::2, 0::2], z_full[:, :, 0::2, 1::2], z_full[:, :, 1::2, 0::2]]
    for k, corner in enumerate(corners):                            # channel c is in group c
        assert (posterior.mean[:, k::3] - corner).square().mean() < 0.01 * corner.var()
    assert (posterior.logvar == -6).all()
    assert left_over(posterior.mean) < 0.2 * left_over(torch.zeros_like(posterior.mean))
    with pytest.raises(SystemExit, match="needs D = 3C"):
        fit.fit_new_blocks(DAVAE(vae.base, DAVAEConfig(D=8)), x.split(8))


def test_a_fitted_run_resumes_without_fitting_again(davae_config, tmp_path, monkeypatch):
    cfg = davae_config(tmp_path / "a", fit=True, gan=0.0, steps=2)
    train_vae.main(cfg)
    monkeypatch.setattr(fit, "fit_new_blocks", None)
    train_vae.main(replace(cfg, steps=3))
    assert runs.step_of(cfg.out) == 3


@pytest.mark.slow
@torch.no_grad()
def test_fitted_blocks_beat_the_base_alone_on_photos_before_any_training(shared):
    def photos(folder, count):
        every = data.open_dataset(str(shared(f"data/imagenette128/{folder}")), 128, 0, 0)
        indices = torch.linspace(0, len(every) - 1, count).long().tolist()
        return data.to_tensor(data.stack(every, indices)[0])

    vae = DAVAE(load_davae(shared("weights/taef2")).base, DAVAEConfig(D=96))
    fit.fit_new_blocks(vae, photos("train", 256).split(16))
    x = photos("eval", 32)
    base, full = train_vae.reconstruct(vae.eval(), x)
    assert psnr(full, x).mean() > psnr(base, x).mean() + 0.7
