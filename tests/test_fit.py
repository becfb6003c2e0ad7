"""support/fit.py: least squares, and new blocks that start with what the full-size latent holds."""
from dataclasses import replace

import pytest
import torch

import train_vae
from davae import DAVAE, AutoencoderKL
from support import data, fit, runs
from support.metrics import psnr
from support.weights import load_davae


def test_ridge_is_least_squares_over_all_batches():
    X, Y = torch.randn(60, 5).double(), torch.randn(60, 3).double()
    parts = list(zip(X.split(7), Y.split(7)))
    assert torch.allclose(fit.ridge(parts, 0.0), torch.linalg.lstsq(X, Y).solution)
    l = 0.1 * X.square().sum(0).mean()
    assert torch.allclose(fit.ridge(parts, 0.1), torch.linalg.solve(X.T @ X + l * torch.eye(5), X.T @ Y))


@torch.no_grad()
def test_fitted_blocks_start_with_three_quarters_of_the_full_size_latent_and_find_the_rest(kl_config):
    torch.manual_seed(0)
    vae = DAVAE(AutoencoderKL(kl_config), 12).train()
    head = vae.base.to_moments[0]
    head.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0       # a 1x1 head: the shortcut can be exact
    x = torch.nn.functional.interpolate(torch.rand(40, 3, 8, 8) * 2 - 1, scale_factor=4, mode="bicubic")
    z_full = vae.base.encode(x)                                                      # (40, 4, 16, 16)
    target = vae.base.from_latent(vae.base.posterior(x).mean)

    def left_over(z_d):
        return ((vae.up(torch.cat([vae.encode_base(x), z_d], dim=1)) - target).square().mean() / target.var()).item()

    fit.fit_new_blocks(vae, x.split(8))
    posterior, corners = vae.detail_posterior(x), [z_full[:, :, 0::2, 0::2], z_full[:, :, 0::2, 1::2], z_full[:, :, 1::2, 0::2]]
    for k, corner in enumerate(corners):                                             # channel c is in group c
        assert (posterior.mean[:, k::3] - corner).square().mean() < 0.01 * corner.var()
    assert (posterior.logvar == -6).all()
    assert left_over(posterior.mean) < 0.2 * left_over(torch.zeros_like(posterior.mean))
    with pytest.raises(SystemExit, match="needs D = 3C"):
        fit.fit_new_blocks(DAVAE(vae.base, 8), x.split(8))


def test_a_fitted_run_resumes_without_fitting_again(davae_config, tmp_path, monkeypatch):
    run = davae_config(tmp_path / "a", fit=True, gan=0.0, steps=2)
    train_vae.main(run)
    monkeypatch.setattr(fit, "fit_new_blocks", None)
    train_vae.main(replace(run, steps=3))
    assert runs.step_of(run.out) == 3


@pytest.mark.slow
@torch.no_grad()
def test_fitted_blocks_beat_the_base_alone_on_photos_before_any_training(shared):
    photos = data.open_dataset(str(shared("data/imagenette128/train")), 128, 0, 0)
    held_out = data.open_dataset(str(shared("data/imagenette128/eval")), 128, 0, 0)
    vae = DAVAE(load_davae(shared("weights/taef2")).base, 96)
    pick = lambda d, n: data.to_tensor(data.stack(d, torch.linspace(0, len(d) - 1, n).long().tolist())[0])
    fit.fit_new_blocks(vae, pick(photos, 256).split(16))
    x = pick(held_out, 32)
    base, full = train_vae.reconstruct(vae.eval(), x)
    assert psnr(full, x).mean() > psnr(base, x).mean() + 0.7
