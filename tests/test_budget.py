"""experiments/budget.py: formulas by example, counts by the models' shapes, docs/paper.md by both."""
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import train_vae
from davae import DAVAE, AutoencoderKL, DAVAEConfig, KLConfig
from experiments import budget
from experiments.budget import JOBS, Config
from kernels import FLOPS
from support import plan

PAGE = Path(__file__).parent.parent / "docs/paper.md"
IMAGENET, SD1024, SD2048 = JOBS
CFG = Config(nvlink=100.0, network=10.0, latency=1e-6, peak=1000.0, dit=50.0, vae=25.0, price=2.0)


def test_every_table_on_the_page_is_what_the_script_prints():
    page = PAGE.read_text()
    for name, lines in budget.tables(Config()).items():
        found = re.search(f"<!-- experiments/budget.py: {re.escape(name)} -->\n(.*?)\n\n", page + "\n", re.S)
        assert found, f"docs/paper.md has no table {name!r}"
        assert found[1].splitlines() == lines, f"docs/paper.md: {name}"
    marked = re.findall(r"<!-- experiments/budget.py: (.*?) -->", page)
    assert marked == list(budget.tables(Config()))


def test_gpu_hours_are_flops_over_the_share_of_the_peak_reached():
    assert plan.gpu_hours(3600e12, reached=0.5, peak=2e12) == 3600e12 / 1e12 / 3600 == 1.0
    assert budget.hours(3600 * 500e12, 50, CFG) == pytest.approx(1.0)            # 500 TFLOP/s for an hour


def test_gather_times_follow_the_bandwidth_inside_and_between_machines():
    assert budget.gather(800e9, 8, CFG) == pytest.approx(700 / 100)              # 7/8 of it, at 100 GB/s
    # 2 machines: half of each GPU's eighth of 100 GB at 10 GB/s, and the same inside
    assert budget.gather(800e9, 16, CFG) == pytest.approx(50 / 10 + 700 / 100)
    assert budget.gather(800e9, 1, CFG) == 0
    assert budget.sent(800e9, 8) == 700e9


def test_ddp_hides_its_traffic_behind_the_backward_pass_but_for_the_last_bucket():
    job = replace(IMAGENET, forward=1e12, step=3e12, trained=25 * 2**18 * 100, total=25 * 2**18 * 100)
    size = 100 * budget.BUCKET                                                   # gradients of 100 buckets
    bytes_sent, seconds = budget.ddp(job, 500, 8, CFG)                           # 500 TFLOP/s: 3 s a step
    assert bytes_sent == pytest.approx(2 * size * 7 / 8)
    bucket = 2 * budget.BUCKET * 7 / 8 / 100e9
    assert seconds == pytest.approx(3 + bucket)
    # if the traffic outlasts the backward pass, the rest is waited for
    _, seconds = budget.ddp(job, 0.5, 8, CFG)                                    # 3 ms, 2 of them backward
    assert seconds == pytest.approx(3e-3 + (100 * bucket - 2e-3) + bucket)


def test_fsdp_gathers_every_parameter_twice_and_scatters_gradients_once():
    job = replace(IMAGENET, forward=1e12, step=3e12, trained=10**9, total=2 * 10**9, blocks=10)
    bytes_sent, seconds = budget.fsdp(job, 500, 8, CFG)
    assert bytes_sent == pytest.approx((2 * 8e9 + 4e9) * 7 / 8)
    assert seconds == pytest.approx(3 + 0.8e9 * 7 / 8 / 100e9)                   # hidden, but for a tenth
    _, seconds = budget.fsdp(job, 5, 8, CFG)                                     # 30 ms a step
    traffic = (2 * 8e9 + 4e9) * 7 / 8 / 100e9
    assert seconds == pytest.approx(traffic + 0.8e9 * 7 / 8 / 100e9)


def test_a_collective_waits_once_per_doubling_of_the_gpus():
    assert budget.waits(10, 64, Config(latency=20.0)) == pytest.approx(10 * 6 * 20e-6)
    assert budget.waits(10, 1, Config(latency=20.0)) == 0


def test_only_checkpointing_computes_the_forward_pass_again():
    assert (IMAGENET.again, SD1024.again) == (0, SD1024.forward)
    assert plan.work(SD1024.cfg, 2.0, 5.0) == 7.0 * 128 * 10_000
    assert plan.work(IMAGENET.cfg, 2.0, 5.0) == 5.0 * 640 * 140_000


def test_latents_and_text_take_the_bytes_that_the_caches_write():
    assert IMAGENET.latent_bytes() == 2 * 2 * 128 * 16 * 16                      # float16, mirrored too
    assert SD1024.latent_bytes() == 2 * 32 * 64 * 64
    assert SD2048.latent_bytes() == 4 * SD1024.latent_bytes()
    assert SD1024.text_bytes == 2 * (333 * 4096 + 2048)


def test_the_prompts_of_an_evaluation_are_encoded_and_stored_like_captions():
    for job in JOBS:
        found = {what: rest for what, *rest in budget.stages(job, CFG)}
        of_a_prompt = [job.text, 0, job.text_bytes]
        assert ("`evaluate.py`, prompts" in found) == (job is SD1024)
        if job is SD1024:
            assert found["`evaluate.py`, prompts"] == [30_000, *(30_000 * x for x in of_a_prompt)]
            assert found["`sample.py text`"] == [100_000, *(100_000 * x for x in of_a_prompt)]


def test_sampling_an_image_takes_the_passes_of_the_papers_grid_and_interval():
    ts = [k / 249 for k in range(249)]
    shifted = [0.3 * t / (1 - 0.7 * t) for t in ts]
    assert IMAGENET.passes == 249 + sum(t >= 0.2 for t in shifted)
    assert SD1024.passes == 30 * 2


def test_dollars_and_days_follow_from_the_images_and_the_price():
    assert budget.days(24 * 3600, CFG) == "3,600, 172,800"                       # at 2 dollars an hour
    job = replace(IMAGENET, encode=250e12 * 36, step=500e12 * 360)               # 36 s and 360 s an image
    row = budget.data_sets(job, replace(CFG, images=(2400,), storage=1e6))[-1]
    once, month, on_the_fly, train = row.strip("| ").split(" | ")[-4:]
    assert once == "2.00, 96"                                                    # mirrored too
    assert month == f"{2400 * job.latent_bytes() / 1e6:,.0f}"
    assert on_the_fly == "1.00, 48" and train == "10.0, 480"


class Features(nn.Sequential):
    """VGG16's convolutions, as LPIPS runs them on both images."""

    def __init__(self):
        layers, width = [], 3
        for out, times in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(times):
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
                width = out
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers[:-1])
        self.requires_grad_(False)

    def forward(self, x, y):
        return (super().forward(x) - super().forward(y)).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.preset)
def test_the_autoencoders_counts_follow_from_their_shapes(job):
    cfg = job.vae_cfg
    kl = KLConfig()
    if job.vae == "imagenet512":
        kl = KLConfig(C=32, widths=(128, 128, 256, 256, 512), attn=(4,), quant=True)
    side = job.cfg.image_size
    with torch.device("meta"):
        vae = DAVAE(AutoencoderKL(kl), DAVAEConfig(D=cfg.D, detail_dropout=0.0)).train()
        x = torch.empty(1, 3, side, side)
        with torch.no_grad():
            encode = flops(lambda: vae.encode(x))
            z_all = vae.encode(x)
            decode = flops(lambda: vae.decode(z_all))
        assert (encode, decode) == pytest.approx((job.encode, job.decode), rel=0.005)
        assert sum(p.numel() for p in vae.parameters()) == job.vae_total
        assert sum(p.numel() for p in vae.parameters() if p.requires_grad) == job.vae_trained

        x = torch.empty(1, 3, cfg.image_size, cfg.image_size)
        disc = train_vae.PatchGAN(cfg.disc_width).requires_grad_(False)
        nets = SimpleNamespace(lpips=Features(), disc=disc, teacher=None, own={})
        step = flops(lambda: vae_step(vae, x, cfg, nets)) + flops(lambda: judge(disc.requires_grad_(True), x))
    assert step == pytest.approx(job.vae_step, rel=0.01)


def vae_step(vae, x, cfg, nets):
    rec = vae(x)
    train_vae.vae_loss(vae, rec, x, cfg, nets, gan_on=True)[0].backward()


def judge(disc, x):
    train_vae.hinge_loss(disc(x), disc(x)).backward()


def flops(run):
    from torch.utils.flop_counter import FlopCounterMode
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    with counter:
        run()
    return counter.get_total_flops()
