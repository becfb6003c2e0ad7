"""support/levels.py: which channels a level shows, in the VAE, the flow loss, samples and decoding."""
import itertools
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import finetune
import sample
import train_vae
from davae import AutoencoderKL, PlainVAE
from dit import LightningDiTConfig, LightningDiT, warm_start_difference
from finetune import Config, flow_loss
from support import levels


# ---------------------------------------------------------------- the order


def test_base_channels_are_always_seen_and_the_last_level_shows_everything():
    mask = levels.seen_of_all(torch.tensor([0, 5, 12]), 4, 12).flatten(1)
    assert mask[:, :4].eq(1).all()
    assert mask.sum(1).tolist() == [4, 9, 16]


def test_the_first_level_keeps_one_detail_of_every_group_not_every_detail_of_one():
    mask = levels.seen(4, 4, 12).flatten()                            # four groups of three
    assert mask.tolist() == [1, 0, 0] * 4
    assert levels.seen(8, 4, 12).flatten().tolist() == [1, 1, 0] * 4
    contiguous = (torch.arange(12) < 4).float()
    assert not torch.equal(mask, contiguous)


def test_with_one_detail_per_group_or_no_groups_the_order_is_the_channels():
    assert levels.importance(6, 6).tolist() == list(range(6))
    assert levels.seen_of_all(2, 6, 0).flatten().tolist() == [1, 1, 0, 0, 0, 0]


def test_each_image_draws_its_own_level_and_repeated_entries_are_likelier():
    torch.manual_seed(0)
    drawn = levels.draw((0, 8, 8, 8), 4000, "cpu")
    assert set(drawn.tolist()) == {0, 8}
    assert abs((drawn == 8).float().mean() - 0.75) < 0.03


def test_levels_use_their_own_generator_which_follows_the_steps_seed():
    torch.manual_seed(1)
    plain = torch.randn(3)
    torch.manual_seed(1)
    first = levels.draw(range(100), 8, "cpu")
    assert torch.equal(torch.randn(3), plain)
    torch.manual_seed(1)
    assert torch.equal(levels.draw(range(100), 8, "cpu"), first)
    torch.manual_seed(2)
    assert not torch.equal(levels.draw(range(100), 8, "cpu"), first)


@pytest.mark.parametrize("given,C,D,sentence", [
    ((0, 13), 4, 12, "--keep_levels=0,13: wanted numbers of detail channels, 0 to 12; 13 is out of range"),
    ((0, 4), 4, 0, "--keep_levels=0,4: wanted numbers of channels, 1 to 4; 0 is out of range"),
])
def test_levels_out_of_range_are_refused(given, C, D, sentence):
    with pytest.raises(SystemExit, match=sentence):
        levels.check(given, C, D)


# ---------------------------------------------------------------- how much each channel learns


def weights(given, C, D, shown):
    """The exact weight of each channel in the expected loss; without levels it is 1."""
    channels = C + D
    total = [Fraction(0)] * channels
    for keep in given:
        mask = levels.seen_of_all(keep, C, D).flatten()
        factor = Fraction(channels, int(mask.sum())) if shown else 1
        for c in range(channels):
            total[c] += int(mask[c]) * factor / len(given)
    return [float(w) for w in total]


def test_channel_weights_match_the_papers_equation_and_its_code():
    """DC-AE 1.5's levels 16, 20, ..., 128 of a latent without details, by enumeration."""
    given = tuple(range(16, 129, 4))
    eq2, code = weights(given, 128, 0, shown=False), weights(given, 128, 0, shown=True)
    at = [0, 31, 32, 63, 95, 127]
    assert [round(eq2[c], 2) for c in at[:-1]] == [1.00, 0.86, 0.83, 0.59, 0.31]
    assert [round(code[c], 2) for c in at[:-1]] == [2.46, 1.62, 1.48, 0.82, 0.36]
    assert round(eq2[127], 3) == round(code[127], 3) == 0.034


def test_a_da_vaes_channel_weights_fall_in_level_order():
    """C = 32, D = 96: the paper's steps of four channels; four groups, also with every other step whole."""
    fine = weights(tuple(range(0, 97, 4)), 32, 96, shown=False)
    order = [32 + d for d in torch.argsort(levels.importance(32, 96)).tolist()]
    assert [round(fine[order[k]], 2) for k in (0, 31, 63, 95)] == [0.96, 0.68, 0.36, 0.04]
    groups = weights((0, 32, 64, 96), 32, 96, shown=False)
    assert [groups[c] for c in (0, 32, 33, 34)] == [1.0, 0.75, 0.5, 0.25]
    whole = weights((0, 32, 64, 96, 96, 96, 96, 96), 32, 96, shown=False)
    assert [whole[c] for c in (32, 33, 34)] == [0.875, 0.75, 0.625]
    assert weights((0, 96), 32, 96, shown=False)[40] == 0.5


# ---------------------------------------------------------------- while the VAE trains


def test_the_decoder_sees_only_the_details_that_each_image_keeps(make_davae):
    vae = make_davae().train()
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    keep = torch.tensor([0, 5, 12])
    torch.manual_seed(0)
    rec = vae(x, keep)
    for i, k in enumerate(keep.tolist()):
        hidden = levels.importance(4, 12) >= k
        z_d = rec.z_d[i:i + 1].clone()
        z_d[:, hidden] = 0
        assert torch.allclose(rec.x_hat[i:i + 1], vae.decode_raw(rec.z[i:i + 1], z_d), atol=1e-5)
    torch.manual_seed(0)
    whole = vae(x, torch.full((3,), 12))
    assert torch.equal(whole.z_d, rec.z_d)                            # alignment and KL see all details


def test_detail_dropout_equals_the_levels_none_and_all(make_davae):
    vae = make_davae(detail_dropout=0.5).train()
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    torch.manual_seed(0)
    rec = vae(x)
    torch.manual_seed(0)
    vae.encode_base(x), vae.detail_posterior(x).sample()
    kept = torch.rand(8) >= 0.5
    assert 0 < kept.sum() < 8
    keep = 12 * kept.long()
    shown = levels.seen(keep, 4, 12)
    assert torch.equal(rec.x_hat, vae.decode_raw(rec.z, rec.z_d * shown))


def test_without_details_levels_hide_base_channels(kl_config):
    vae = PlainVAE(AutoencoderKL(kl_config)).train()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    rec = vae(x, torch.tensor([1, 4]))
    z = rec.z_d.clone()
    z[0, 1:] = 0
    assert torch.allclose(rec.x_hat, vae.base.decoder(vae.base.from_latent(z)), atol=1e-6)


def test_levels_change_the_reconstruction_but_not_the_images_or_noise(
        davae_config, tmp_path, monkeypatch):
    seen = {}
    plain = train_vae.vae_loss

    def recording(vae, rec, x, *rest):
        seen.setdefault(name, []).append((x.clone(), rec.z_d.detach().clone(), rec.x_hat.detach().clone()))
        return plain(vae, rec, x, *rest)

    monkeypatch.setattr(train_vae, "vae_loss", recording)
    for name, given in (("whole", ()), ("levels", (0, 4, 8))):
        train_vae.main(davae_config(tmp_path / name, steps=1, gan=0.0, detail_dropout=0.0, keep_levels=given))
    (x, z_d, x_hat), = seen["whole"]
    (x2, z_d2, x_hat2), = seen["levels"]
    assert torch.equal(x, x2) and torch.equal(z_d, z_d2) and not torch.equal(x_hat, x_hat2)


# ---------------------------------------------------------------- in the flow loss


def a_dit(D=0, p=1):
    torch.manual_seed(0)
    model = LightningDiT(LightningDiTConfig(C=4, p=p, grid=4 // p, E=48, depth=2, A=2, num_classes=3)).eval()
    for parameter in model.parameters():                              # as in a released model, none is zero
        torch.nn.init.normal_(parameter, std=0.1)
    base = deepcopy(model)
    if D:
        model.expand_channels(D)
    return base, model


def loss_of(model, cfg, w=1.0, C=4, seed=3):
    torch.manual_seed(7)
    z_all, y = torch.randn(4, C + cfg.D, 4, 4), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(seed)
    return flow_loss(model, z_all, (y,), w, cfg)


@pytest.mark.parametrize("trained", [False, True])
def test_at_level_zero_the_widened_model_computes_the_base_models_velocities_bit_for_bit(trained):
    base, model = a_dit(D=12)
    if trained:                                                       # as after some training steps
        torch.nn.init.normal_(model.P_new.weight)
        torch.nn.init.normal_(model.O_new.weight)
    assert model.P_new.bias is None
    torch.manual_seed(1)
    x_t, t, y = torch.randn(4, 16, 4, 4), torch.rand(4), torch.tensor([0, 1, 2, 3])
    mask = levels.seen_of_all(0, 4, 12)
    with torch.no_grad():
        v = levels.masked(model, mask)(x_t, t, y)
        assert torch.equal(v[:, :4], base(x_t[:, :4], t, y))
        assert not v[:, 4:].any()


def test_a_bias_in_P_new_would_change_the_base_velocities():
    base, model = a_dit(D=12)
    model.P.bias.data += torch.randn(48)                              # as a bias of P_new would
    x_t, t, y = torch.randn(2, 16, 4, 4), torch.rand(2), torch.tensor([0, 1])
    with torch.no_grad():
        v = levels.masked(model, levels.seen_of_all(0, 4, 12))(x_t, t, y)
        assert not torch.allclose(v[:, :4], base(x_t[:, :4], t, y), atol=1e-3)


def test_at_level_zero_the_loss_is_the_base_models_up_to_its_share_of_channels():
    base, model = a_dit(D=12)
    cfg = Config(D=12, cosine=0.0, keep_levels=(0,), keep_mean="shown")

    def base_alone(x_t, t, y):
        return F.pad(base(x_t[:, :4], t, y), (0, 0, 0, 0, 0, 12))

    _, parts = loss_of(base_alone, replace(cfg, keep_levels=()))      # the mean over C channels
    shown, _ = loss_of(model, cfg)
    of_all, _ = loss_of(model, replace(cfg, keep_mean="all"))
    assert torch.allclose(shown, parts["base"], rtol=1e-6)
    assert torch.allclose(of_all, parts["base"] * 4 / 16, rtol=1e-6)


@pytest.mark.parametrize("mean", ["all", "shown"])
def test_the_full_level_gives_the_plain_loss_bit_for_bit(mean):
    _, model = a_dit(D=12)
    plain, parts = loss_of(model, Config(D=12), w=0.3)
    full, same = loss_of(model, Config(D=12, keep_levels=(12,), keep_mean=mean), w=0.3)
    assert torch.equal(full, plain) and all(torch.equal(same[name], parts[name]) for name in parts)


@pytest.mark.parametrize("mean", ["all", "shown"])
@pytest.mark.parametrize("w", [0.0, 0.25, 1.0])
def test_levels_combine_with_the_detail_weight(mean, w):
    """The weighted errors summed over shown channels, divided by the weights of all or of shown channels."""
    cfg = Config(D=12, cosine=0.0, keep_levels=(0, 4, 12), keep_mean=mean)
    v = torch.randn(4, 16, 4, 4)
    loss, _ = loss_of(lambda x, t, y: v, cfg, w)
    torch.manual_seed(7)
    z_all = torch.randn(4, 16, 4, 4)
    torch.manual_seed(3)
    mask = levels.seen_of_all(levels.draw(cfg.keep_levels, 4, "cpu"), 4, 12)
    assert len(set(mask.sum(1).flatten().tolist())) > 1               # images have different levels
    torch.randn(4)
    error = (v - (z_all - torch.randn_like(z_all))).square() * mask
    weight = torch.tensor([1.0] * 4 + [w] * 12).view(1, 16, 1, 1)
    K = (weight * mask).sum(1).flatten() if mean == "shown" else torch.full((4,), weight.sum().item())
    expected = ((weight * error).sum((1, 2, 3)) / 16 / K).mean()
    assert torch.allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("D, given", [(12, (0, 4, 12)), (12, (4,)), (0, (1, 3))])
def test_logged_errors_are_means_over_the_channels_that_were_shown(D, given):
    """With levels a model logs the same numbers as without; here it is off by 3 everywhere."""
    cfg = Config(D=D, keep_levels=given)

    def off_by_three(x, t, y):
        torch.manual_seed(7)
        z_all = torch.randn(4, 4 + D, 4, 4)
        torch.manual_seed(3)
        torch.randn(4)
        return z_all - torch.randn_like(z_all) + 3

    for levels_given in (given, ()):
        _, parts = loss_of(off_by_three, replace(cfg, keep_levels=levels_given))
        assert {name: part.item() for name, part in parts.items() if name != "loss"} == {
            name: pytest.approx(9, rel=1e-5) for name in (("base", "detail") if D else ("base",))}


def test_without_any_shown_detail_the_logged_error_is_zero_not_nan():
    _, parts = loss_of(lambda x, t, y: x, Config(D=12, keep_levels=(0,)))
    assert parts["detail"] == 0 and parts["base"] > 0


def test_neither_model_nor_cosine_sees_hidden_channels_or_their_noise():
    given = {}

    def model(x, t, y):
        given["x"] = x
        return torch.ones_like(x)

    loss, _ = loss_of(model, Config(D=12, cosine=1.0, keep_levels=(4,)))
    mask = levels.seen_of_all(4, 4, 12)
    assert not (given["x"] * (1 - mask)).any() and (given["x"] * mask).any()
    without, _ = loss_of(model, Config(D=12, cosine=0.0, keep_levels=(4,)))
    torch.manual_seed(7)
    z_all = torch.randn(4, 16, 4, 4)
    torch.manual_seed(3)
    torch.randn(4)
    target = (z_all - torch.randn_like(z_all)) * mask
    cosine = 1 - F.cosine_similarity(mask.expand_as(target), target, dim=1, eps=0.1).mean()
    assert torch.allclose(loss - without, cosine, atol=1e-6)


def test_levels_leave_times_and_noise_unchanged():
    seen = []

    def model(x, t, y):
        seen.append((t, x[:, :4]))
        return x

    loss_of(model, Config(D=12))
    loss_of(model, Config(D=12, keep_levels=(0, 12)))
    assert all(torch.equal(a, b) for a, b in zip(*seen))


# ---------------------------------------------------------------- hiding channels or slicing weights


@pytest.mark.parametrize("p,equal", [(1, True), (2, False)])
def test_hiding_equals_slicing_the_weights_at_both_ends_only_for_one_pixel_patches(p, equal):
    """DC-AE 1.5's code keeps the first p^2 k rows of its head, which are ordered position by position."""
    torch.manual_seed(0)
    C, k, width = 8, 3, 16
    x = torch.randn(2, C, 4, 4)
    P = torch.nn.Conv2d(C, width, p, stride=p)
    O = torch.nn.Linear(width, p * p * C)                             # rows: (position, channel)
    mask = levels.seen_of_all(k, C, 0)

    def head(tokens, weight, bias, channels):
        out = F.linear(tokens, weight, bias).view(2, 4 // p, 4 // p, p, p, channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(2, channels, 4, 4)

    with torch.no_grad():
        hidden = P(x * mask)
        sliced = F.conv2d(x[:, :k], P.weight[:, :k], P.bias, stride=p)
        assert torch.allclose(hidden, sliced, atol=1e-6)
        tokens = hidden.movedim(1, -1)
        masked = head(tokens, O.weight, O.bias, C)[:, :k]
        cut = head(tokens, O.weight[:p * p * k], O.bias[:p * p * k], k)
    assert torch.allclose(masked, cut, atol=1e-6) == equal


# ---------------------------------------------------------------- decoding and samples


def test_decoding_some_details_sets_the_others_to_raw_zero_not_to_their_mean(make_davae):
    vae = make_davae()
    torch.nn.init.normal_(vae.mean)
    vae.std.fill_(2.0)
    z_all = torch.randn(2, 16, 8, 8)
    z_d = z_all[:, 4:] * 2 + vae.mean.view(1, -1, 1, 1)
    z_d[:, levels.importance(4, 12) >= 4] = 0
    with torch.no_grad():
        assert torch.allclose(vae.decode(z_all, keep=4), vae.decode_raw(z_all[:, :4], z_d), atol=1e-6)
        assert torch.equal(vae.decode(z_all, keep=12), vae.decode(z_all))
        hidden = z_all * levels.seen_of_all(4, 4, 12)
        assert not torch.allclose(vae.decode(z_all, keep=4), vae.decode(hidden), atol=1e-3)


def test_a_base_vae_hides_channels_in_raw_units_too(kl_config):
    base = AutoencoderKL(kl_config).eval()
    base.mean.fill_(0.5)
    z = torch.randn(1, 4, 4, 4)
    raw = z + 0.5
    raw[:, 2:] = 0
    with torch.no_grad():
        expected = base.decoder(base.from_latent(raw))
        assert torch.allclose(PlainVAE(base).decode(z, keep=2), expected, atol=1e-6)


def test_samples_of_some_details_keep_the_others_at_zero_throughout():
    _, model = a_dit(D=12)
    torch.nn.init.normal_(model.P_new.weight)
    torch.nn.init.normal_(model.O_new.weight)
    noise = torch.randn(2, 16, 4, 4)
    mask = levels.seen_of_all(4, 4, 12)
    y, null = torch.tensor([0, 1]), torch.tensor([3, 3])
    ts = sample.time_grid(4)
    got = sample.sample_flow(model, noise, ts, (y,), (null,), 2.0, mask=mask)
    again = sample.sample_flow(model, noise, ts, (y,), (null,), 2.0, mask=mask, ahead=8)
    expected = sample.sample_flow(levels.masked(model, mask), noise * mask, ts, (y,), (null,), 2.0)
    assert torch.allclose(got, expected, atol=1e-5) and torch.allclose(got, again, atol=1e-5)
    assert not (got * (1 - mask)).any() and got.any()


def test_samples_at_level_zero_are_the_base_models():
    base, model = a_dit(D=12)
    torch.nn.init.normal_(model.O_new.weight)
    torch.nn.init.normal_(model.P_new.weight)
    noise = torch.randn(2, 16, 4, 4)
    y = (torch.tensor([0, 1]),)
    ts = sample.time_grid(4)
    got = sample.sample_flow(model, noise, ts, y, mask=levels.seen_of_all(0, 4, 12))
    assert torch.equal(got[:, :4], sample.sample_flow(base, noise[:, :4], ts, y))
    assert warm_start_difference(base, model, noise[:, :4], y)[0] > 0     # P_new is no longer zero


def test_sample_takes_keep_and_refuses_an_invalid_level():
    about = {"config": {"cfg": 1.0, "shift": 1.0, "grid": "plain", "text": "",
                        "image_size": 32},
             "model": {"C": 4, "D": 12, "kind": "LightningDiT"}, "classes": ["a"]}
    about["model"]["num_classes"] = 1
    with pytest.raises(SystemExit, match="--keep=13: wanted numbers of detail channels, 0 to 12; 13 is out"):
        sample.settings_of(sample.Config(keep=13), about, "")
    assert sample.settings_of(sample.Config(keep=4), about, "")["keep"] == 4
    assert "keep" not in sample.settings_of(sample.Config(), about, "")


def test_fine_tuning_with_levels_resumes_exactly(finetune_config, same_weights, tmp_path):
    given = dict(keep_levels=(0, 4, 12), keep_mean="shown")
    straight = finetune_config(tmp_path / "a", steps=4, **given)
    broken = finetune_config(tmp_path / "b", steps=2, **given)
    finetune.main(straight)
    finetune.main(broken)
    finetune.main(replace(broken, steps=4))
    assert same_weights(straight, broken)
    with pytest.raises(SystemExit, match="--keep_levels=16: wanted numbers of detail channels, 0 to 12"):
        finetune.main(finetune_config(tmp_path / "c", keep_levels=(16,)))


def test_presets_have_levels_within_their_latents():
    for preset in itertools.chain(train_vae.PRESETS.values(), finetune.PRESETS.values()):
        given = SimpleNamespace(**{"keep_levels": (), "D": 96, **preset})
        levels.check(given.keep_levels, 32, given.D)
