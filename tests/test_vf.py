"""support/vf.py: VA-VAE's two terms, position by position; its teacher, against the transformers it wraps."""
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_vae
from davae import DAVAE, AutoencoderKL, DAVAEConfig, PlainVAE, align_loss
from support import runs, vf
from support.metrics import import_torchvision
from support.vf import Teacher, vf_loss
from train_vae import Config, adaptive_weight, vae_loss


def by_positions(s, f, m1, m2):
    """The two means by their definitions, in float64, one pair of positions at a time."""
    s, f = s.double().flatten(2), f.double().flatten(2)
    mcos, mdms = [], []
    for b in range(len(s)):
        for i in range(s.shape[2]):
            if s.shape[1] == f.shape[1]:
                mcos.append(max(0.0, 1 - m1 - cosine(s[b, :, i], f[b, :, i])))
            for j in range(s.shape[2]):
                apart = cosine(s[b, :, i], s[b, :, j]) - cosine(f[b, :, i], f[b, :, j])
                mdms.append(max(0.0, abs(apart) - m2))
    return sum(mcos) / max(1, len(mcos)), sum(mdms) / len(mdms)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.5, 0.25)])
def test_both_terms_equal_a_double_loop_over_positions(margins):
    torch.manual_seed(0)
    s, f = torch.randn(2, 6, 3, 2), torch.randn(2, 6, 3, 2)
    terms = vf_loss(s, f, *margins)
    mcos, mdms = by_positions(s, f, *margins)
    assert terms["mcos"].item() == pytest.approx(mcos, abs=1e-6)
    assert terms["mdms"].item() == pytest.approx(mdms, abs=1e-6)


def test_lengths_do_not_matter_so_a_scaled_teacher_has_no_loss():
    torch.manual_seed(0)
    s, f = torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)
    assert all(value < 1e-6 for value in vf_loss(3 * f, f, 0.0, 0.0).values())
    terms, longer = vf_loss(s, f, 0.1, 0.1), vf_loss(7 * s, f, 0.1, 0.1)
    assert all(torch.allclose(terms[name], longer[name], atol=1e-6) for name in terms)


def test_the_gradient_is_exactly_zero_where_both_margins_are_met():
    torch.manual_seed(0)
    f = torch.randn(1, 6, 3, 3)
    s = (f + 0.1 * torch.randn_like(f)).requires_grad_()
    assert sum(vf_loss(s, f, 0.0, 0.0).values()) > 0
    sum(vf_loss(s, f, 0.5, 0.25).values()).backward()
    assert not s.grad.any()


def test_the_matrix_term_needs_no_common_channels_or_axes_but_the_cosine_does():
    torch.manual_seed(0)
    s, f = torch.randn(2, 6, 3, 3), torch.randn(2, 9, 3, 3)
    terms = vf_loss(s, f, 0.5, 0.1)
    assert list(terms) == ["mdms"]
    assert terms["mdms"].item() == pytest.approx(by_positions(s, f, 0.5, 0.1)[1], abs=1e-6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    turned = torch.einsum("bkhw,kl->blhw", s, turn)
    plain, other = vf_loss(s, s, 0.0, 0.0), vf_loss(turned, s, 0.0, 0.0)
    assert other["mdms"] < 1e-5 and plain["mcos"] < 1e-6 < 0.1 < other["mcos"]


def test_the_teacher_gets_no_gradient_and_autocast_has_no_effect():
    s, f = torch.randn(1, 6, 4, 4, requires_grad=True), torch.randn(1, 6, 4, 4, requires_grad=True)
    exact = vf_loss(s, f, 0.0, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        terms = vf_loss(s, f, 0.0, 0.0)
    assert all(torch.equal(exact[name], terms[name]) for name in exact)
    sum(terms.values()).backward()
    assert f.grad is None and s.grad.any()


def test_of_many_positions_the_matrix_term_takes_the_same_part_of_both_by_a_separate_generator():
    torch.manual_seed(5)
    s, f = torch.randn(1, 4, 33, 33), torch.randn(1, 4, 33, 33)
    torch.manual_seed(6)
    plain = torch.randn(3)
    torch.manual_seed(6)
    some = vf_loss(s, f, 0.0, 0.0)
    assert torch.equal(torch.randn(3), plain)
    torch.manual_seed(6)
    again = vf_loss(s, f, 0.0, 0.0)
    torch.manual_seed(7)
    others = vf_loss(s, f, 0.0, 0.0)
    assert torch.equal(some["mdms"], again["mdms"]) and not torch.equal(some["mdms"], others["mdms"])
    assert vf_loss(2 * f, f, 0.0, 0.0)["mdms"] < 1e-6              # the same positions of both
    every = (cosines(s) - cosines(f)).abs().mean()
    assert 0 < abs(some["mdms"] - every) < 0.1
    assert torch.allclose(some["mcos"], 1 - F.cosine_similarity(s, f, dim=1).mean(), atol=1e-6)      # all


def cosines(s):
    """(B, N, N) of all pairs of positions."""
    s = F.normalize(s.flatten(2), dim=1)
    return s.mT @ s


def test_group_means_can_match_where_the_details_geometry_does_not():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)       # two channels, two positions
    z_d = z.repeat_interleave(2, dim=1)
    assert align_loss(z, z_d) == 0 and vf_loss(z_d, z, 0.0, 0.0)["mdms"] < 1e-6
    z_d[:, :2] += torch.tensor([[3.0, 3.0], [-3.0, -3.0]]).view(1, 2, 1, 2)      # adds up to 0 in its group
    assert align_loss(z, z_d) == 0
    assert vf_loss(z_d, z, 0.0, 0.0)["mdms"] > 0.1


def test_a_convolution_can_read_z_where_the_group_mean_cannot():
    torch.manual_seed(0)
    z = torch.randn(1, 2, 4, 4)
    z_d = torch.cat([z, -z], dim=1)[:, [0, 2, 1, 3]]                  # each group is z and -z: its mean is 0
    assert torch.equal(z_d.unflatten(1, (2, 2)).mean(2), torch.zeros_like(z))
    first = torch.zeros(2, 4, 1, 1)
    first[0, 0] = first[1, 2] = 1.0
    assert vf_loss(F.conv2d(z_d, first), z, 0.0, 0.0)["mcos"] < 1e-6


# ---------------------------------------------------------------- in the loss of stage 1


def losses_of(kl_config, **changes):
    """(loss, parts, vae, rec, nets) of one pass of a DA-VAE of 4 base and 12 detail channels."""
    torch.manual_seed(0)
    vae = DAVAE(AutoencoderKL(kl_config), DAVAEConfig(D=12)).train()
    cfg = replace(Config(D=12, gan=0.0, align=0.5, kl=0.0, perceptual="none"), **changes)
    nets = train_vae.LossNetworks(cfg, vae, torch.device("cpu"))
    torch.manual_seed(1)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    rec = vae(x)
    return *vae_loss(vae, rec, x, cfg, nets), vae, rec, nets


@pytest.mark.parametrize("project", ["mean", "conv", "raw"])
@pytest.mark.parametrize("distance", ["mse", "vf"])
def test_each_projection_combines_with_each_distance(kl_config, project, distance):
    if (project, distance) == ("raw", "mse"):
        pytest.skip("12 channels against 4 have no squared distance, and are refused")
    _, parts, _, rec, nets = losses_of(kl_config, project=project, distance=distance)
    student = rec.z_d
    if project == "mean":
        student = rec.z_d.unflatten(1, (4, 3)).mean(2)
    if project == "conv":
        student = nets.own["project"](rec.z_d)
        assert nets.own["project"].bias is None
    if distance == "mse":
        expected = (student - rec.z).square().mean().detach()
    else:
        expected = sum(by_positions(student.detach(), rec.z, 0.5, 0.25))
        assert {"mcos", "mdms"} & set(parts) == ({"mdms"} if project == "raw" else {"mcos", "mdms"})
    assert parts["align"].item() == pytest.approx(float(expected), abs=1e-6)


def test_the_weight_is_a_ratio_of_gradients_so_twice_lambda_is_twice_the_share(kl_config):
    def share(align):
        loss, parts, vae, rec, _ = losses_of(kl_config, distance="vf", align=align)
        layer = vae.down.conv.weight
        both, = torch.autograd.grad(loss, layer, retain_graph=True)
        alone, = torch.autograd.grad((rec.x_hat - x()).abs().mean(), layer)
        return (both - alone).norm() / alone.norm()

    def x():
        torch.manual_seed(1)
        return torch.rand(2, 3, 32, 32) * 2 - 1

    assert share(0.2).item() == pytest.approx(2 * share(0.1).item(), rel=1e-3)
    assert share(0.2).item() == pytest.approx(0.2, rel=0.05)          # except for the 1e-4 in the denominator


def test_the_weight_is_finite_where_the_alignment_has_no_gradient():
    w = torch.ones(3, requires_grad=True)
    weight = adaptive_weight(w.sum(), (0 * w).sum(), w, limit=1e8)
    assert weight.isfinite() and weight.item() == pytest.approx(3**0.5 / 1e-4, rel=1e-4)


def test_reduction_sum_sums_over_an_image_and_takes_half_of_the_kl(kl_config):
    """VA-VAE's scale: nll is a sum over 3 H W elements, KL half the sum over the latent's."""
    torch.manual_seed(0)
    vae = PlainVAE(AutoencoderKL(kl_config)).train()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    rec = vae(x)
    cfg = Config(D=0, gan=0.0, kl=1e-3, reduction="sum")
    nets = SimpleNamespace(lpips=None, teacher=None, disc=None)
    loss, _ = vae_loss(vae, rec, x, cfg, nets)
    mean, logvar = rec.posterior.mean, rec.posterior.logvar
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))
    expected = (rec.x_hat - x).abs().sum(dim=(1, 2, 3)).mean() + 1e-3 * kl.mean()
    assert torch.allclose(loss, expected, rtol=1e-6)


# ---------------------------------------------------------------- the teacher


@pytest.fixture(scope="session")
def transformers_folder(tmp_path_factory):
    """transformers_folder(kind) -> (folder, model): a small random DINOv2 (patches of 14) or MAE (of 8)."""
    import_torchvision()
    from transformers import Dinov2Config, Dinov2Model, ViTMAEConfig, ViTMAEModel
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)

    def make(kind):
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp(kind)
        if kind == "dinov2":
            model = Dinov2Model(Dinov2Config(image_size=70, patch_size=14, **sizes))       # 5 x 5 patches
        else:
            model = ViTMAEModel(ViTMAEConfig(image_size=32, patch_size=8, **sizes))        # 4 x 4 patches
        model.save_pretrained(folder)
        return folder, model.eval()
    return make


def test_a_dinov2_gets_unnormalised_pixels_one_patch_per_latent_position(transformers_folder, error):
    folder, model = transformers_folder("dinov2")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    features = Teacher(folder)(x, 5)                                  # the grid of its position table
    pixels = F.interpolate(x, (70, 70), mode="bilinear", align_corners=False)
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state[:, 1:]
    assert error(features, tokens.transpose(1, 2).view(2, 24, 5, 5)) < 1e-6


def test_the_position_table_is_resized_with_antialiasing(transformers_folder, error):
    folder, model = transformers_folder("dinov2")
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(folder)
    teacher = Teacher(folder)
    x = torch.rand(1, 3, 42, 42) * 2 - 1
    features = teacher(x, 3)                                          # 42 = 3 x 14: only the table is resized
    table = model.embeddings.position_embeddings.detach()
    grid = table[:, 1:].view(1, 5, 5, 24).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (3, 3), mode="bicubic", antialias=True)       # as in timm
    smaller = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    model.embeddings.position_embeddings = torch.nn.Parameter(smaller)
    with torch.no_grad():
        tokens = model(x).last_hidden_state[:, 1:]
    assert error(features, tokens.transpose(1, 2).view(1, 24, 3, 3)) < 1e-6
    assert torch.equal(teacher(x, 3), features)
    assert teacher(F.interpolate(x, (70, 70)), 5).shape[-1] == 5      # back to the full table


def test_an_mae_masks_and_shuffles_nothing(transformers_folder, error):
    folder, model = transformers_folder("mae")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    features = Teacher(folder)(x, 4)
    patches = model.embeddings.patch_embeddings(x)
    with torch.no_grad():                                             # its parts, called in order
        tokens = patches + model.embeddings.position_embeddings[:, 1:]
        first = model.embeddings.cls_token + model.embeddings.position_embeddings[:, :1]
        tokens = torch.cat([first.expand(2, -1, -1), tokens], dim=1)
        for layer in model.layers:
            tokens = layer(tokens)
        tokens = model.layernorm(tokens)[:, 1:]
    assert error(features, tokens.transpose(1, 2).view(2, 24, 4, 4)) < 1e-6


def test_a_teacher_stays_in_eval_mode_while_the_vae_trains():
    teacher = Teacher.__new__(Teacher)                             # without a transformer to load
    torch.nn.Module.__init__(teacher)
    teacher.net = torch.nn.Dropout()
    torch.nn.ModuleList([teacher]).train()
    assert not teacher.net.training


def test_a_folder_without_a_teacher_gets_one_sentence(tmp_path, transformers_folder):
    with pytest.raises(SystemExit, match="has no config.json; wanted `base`, or a folder with a DINOv2"):
        Teacher(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="config.json: "):
        Teacher(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SystemExit, match="holds a model of type 'bert'; wanted dinov2 or vit_mae"):
        Teacher(tmp_path)
    folder, _ = transformers_folder("dinov2")
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit, match="cannot be loaded"):
        Teacher(folder)


def test_a_base_vae_trained_with_a_teacher_exports_neither_it_nor_the_projection(
        vae_config, same_weights, transformers_folder, tmp_path):
    """VA-VAE's own training at toy size: phase 2 starts from phase 1, resumes exactly, saves only a VAE."""
    folder, _ = transformers_folder("dinov2")
    own = dict(r=1, teacher=str(folder), project="conv", distance="vf", reduction="sum", align=0.5,
               adaptive_align=True)
    first = vae_config(tmp_path / "1", **own, m1=0.0, m2=0.0, steps=2)
    train_vae.main(first)
    second = replace(first, base=first.out, m1=0.5, m2=0.25)
    straight = replace(second, out=str(tmp_path / "2"), steps=4)
    broken = replace(second, out=str(tmp_path / "3"), steps=2)
    train_vae.main(straight)
    train_vae.main(broken)
    train_vae.main(replace(broken, steps=4))
    assert same_weights(straight, broken)
    step = Path(straight.out) / "step_000004"
    with pytest.raises(SystemExit, match="was started with other teacher than --teacher=base has now"):
        train_vae.main(replace(straight, teacher="base", steps=6))
    exported = load_file(step / "model.safetensors")
    assert all(name.startswith("base.") for name in exported)
    assert list(runs.read_state_dict(step / "train_state.pt")["own"]) == ["project.weight"]
    begun = load_file(Path(straight.out) / "step_000000/model.safetensors")
    ended = load_file(Path(first.out) / "step_000002/model.safetensors")
    learned = [name for name in begun if not name.endswith((".mean", ".std"))]
    assert all(torch.equal(begun[name], ended[name]) for name in learned)


def test_a_base_vaes_weight_is_taken_at_the_encoders_last_convolution(kl_config):
    plain = PlainVAE(AutoencoderKL(replace(kl_config, quant=True)))
    assert train_vae.first_conv(plain) is plain.base.to_moments[0]
    assert plain.base.to_moments[0].kernel_size == (3, 3)             # conv_out, not quant_conv


def test_the_three_va_vae_presets_are_the_released_models_phases():
    phases = [train_vae.PRESETS[name] for name in ("vavae-1", "vavae-2", "vavae")]
    assert [phase["align"] for phase in phases] == [0.5, 0.1, 0.1]
    assert [(phase["m1"], phase["m2"]) for phase in phases] == [(0.0, 0.0), (0.0, 0.0), (0.5, 0.25)]
    assert [phase.get("base") for phase in phases] == [None, phases[0]["out"], phases[1]["out"]]
    assert vf.MOST >= 16 * 16                                         # at 256 pixels all positions are used
