"""Our code against other implementations, on this machine's CPU: same weights, same inputs, one thread.

    python -m kernels.bench --device=cpu             three minutes

A row is the ratio of CPU times, ours to the peer's: below 1 ours is faster. Both run in this process and take
turns, A B B A, so that a machine that slows down slows both; CPU time does not count waiting for other
programs. The median of the ratios and their quartiles are printed; on a busy machine they vary by 3 %.
"Apart" is the largest difference of the two results, relative to the peer's largest value.

Sizes are small. A missing peer is reported in one line; the original LightningDiT and DA-VAE are no packages.
"""
import contextlib
import resource
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

# Sections import project modules locally, because kernels/ itself does not depend on these.

SECONDS = 6                # per row, about
ROUNDS = (3, 15)           # of A B B A, at least and at most


def main():
    from support.metrics import import_torchvision
    torch.set_num_threads(1)
    begin = time.time()
    with contextlib.suppress(ImportError):
        import_torchvision()                               # which the peers import, see its docstring
    print(f"torch {torch.__version__}, one thread of a CPU; {time.strftime('%Y-%m-%d')}\n\n"
          "| what | peer | ours / peer (quartiles) | rounds | ours, ms | apart |\n|---|---|---|---|---|---|")
    slower = []
    for section, peer in SECTIONS.items():
        try:
            for what, ours, theirs in section():
                (low, median, high), rounds, ms, apart = measure(ours, theirs)
                ratio = f"{median:.2f} ({low:.2f} to {high:.2f})"
                print(f"| {what} | {peer} | {ratio} | {rounds} | {ms:.1f} | {apart} |", flush=True)
                if median > 1.02:
                    slower.append(f"{what}: {median:.2f}")
        except ImportError as missing:
            print(f"| {section.__name__} | {peer} | not installed: {missing} | | | |", flush=True)
    print(f"\nslower than a peer by more than 2 %: {'; '.join(slower) or 'nothing'}")
    print(f"{time.time() - begin:.0f} s")


# ---------------------------------------------------------------- measuring


def cpu_seconds():
    """CPU time so far, of this process and of its child processes that have ended."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(which)[:2]) for which in both)                  # user and system


def measure(ours, theirs):
    """(quartiles of ours / theirs, rounds, ms of ours, how far the results are apart)."""
    apart = difference(ours(), theirs())                   # this also warms up
    ratios = []
    seconds_of_ours = []
    begin = time.time()
    while len(ratios) < ROUNDS[0] or len(ratios) < ROUNDS[1] and time.time() - begin < SECONDS:
        first, second = (ours, theirs) if len(ratios) % 2 == 0 else (theirs, ours)
        spent = {ours: 0.0, theirs: 0.0}
        for function in (first, second, second, first):
            since = cpu_seconds()
            function()
            spent[function] += cpu_seconds() - since
        ratios.append(spent[ours] / spent[theirs])
        seconds_of_ours.append(spent[ours] / 2)
    return np.quantile(ratios, [0.25, 0.5, 0.75]), len(ratios), 1e3 * np.median(seconds_of_ours), apart


def difference(a, b):
    """'2e-07': the largest difference of two tensors or numbers, relative to b's largest; '' for None."""
    if a is None:
        return ""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return f"{(a - b).abs().max() / b.abs().max():.0e}"


def both_types(what, ours, theirs, grad=False):
    """Rows in float32 and, where the CPU has instructions for it, under bfloat16 autocast.

    grad: with the backward, from the mean square
    """
    from support import ranks

    def run(function, dtype):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16"):
            result = function()
            if grad:
                result = result.float().square().mean()
        if grad:
            result.backward()
        return result.detach()

    dtypes = ["float32"]
    if ranks.in_bfloat16("auto", torch.device("cpu")):     # others emulate it, 6 to 11 times slower
        dtypes.append("bfloat16")
    for dtype in dtypes:
        yield f"{what}, {dtype}", partial(run, ours, dtype), partial(run, theirs, dtype)


# ---------------------------------------------------------------- models
# Each section yields a row's name, our function, and the peer's.


def mmdit():
    """SD3.5's transformer, width 384: two blocks, the first of them dual."""
    from diffusers import SD3Transformer2DModel

    from support.weights import load_dit
    torch.manual_seed(0)
    peer = SD3Transformer2DModel(
        sample_size=32, in_channels=16, out_channels=16, num_layers=2, dual_attention_layers=(0,),
        attention_head_dim=64, num_attention_heads=6, caption_projection_dim=384, joint_attention_dim=512,
        pooled_projection_dim=256, pos_embed_max_size=96, qk_norm="rms_norm")
    for parameter in peer.parameters():                    # nothing is zero, so that everything counts
        nn.init.normal_(parameter, std=0.03)
    ours = load_dit(peer.state_dict()).train()

    def theirs(z, t, text, pooled):
        return -peer(z, text, pooled, 1000 * (1 - t)).sample.float()

    for B, side, grad in ((1, 32, False), (4, 32, False), (4, 16, True)):
        x = torch.randn(B, 16, side, side), torch.rand(B), torch.randn(B, 77, 512), torch.randn(B, 256)
        what = f"MMDiT, batch {B}, {side**2 // 4} + 77 tokens{', and back' if grad else ''}"
        yield from both_types(what, partial(ours, *x), partial(theirs, *x), grad)


def autoencoder():
    """An AutoencoderKL of half SD3's widths: in the layout of a loaded run, and in that of training."""
    from diffusers import AutoencoderKL

    from support import ranks
    from support.weights import load_base_vae
    torch.manual_seed(0)
    peer = AutoencoderKL(
        block_out_channels=(64, 128, 256, 256), down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",), layers_per_block=2, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False)
    vae = load_base_vae(peer.state_dict())
    scale = vae.std.view(1, -1, 1, 1)
    shift = vae.mean.view(1, -1, 1, 1)

    def encode(x):
        return (peer.encode(x).latent_dist.mode() - shift) / scale

    def decode(z):
        return peer.decode(z * scale + shift).sample

    vae.to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, 96, 96) * 2 - 1
    z = torch.randn(1, 16, 8, 8)
    yield from both_types("VAE, encode 96 px", partial(vae.encode, x), partial(encode, x))
    yield from both_types("VAE, decode 64 px", partial(vae.decode, z), partial(decode, z))

    vae.to(memory_format=ranks.layout(vae.width, torch.device("cpu")))
    x = x[..., :48, :48]
    z = z[..., :6, :6]
    yield from both_types("VAE and back, encode 48 px", partial(vae.encode, x), partial(encode, x), True)
    yield from both_types("VAE and back, decode 48 px", partial(vae.decode, z), partial(decode, z), True)


def tiny_autoencoder():
    """TAEF2's decoder with the layers of TAESD: three plain blocks instead of the wide ones."""
    from diffusers import AutoencoderTiny

    from support import bases
    torch.manual_seed(0)
    peer = AutoencoderTiny(latent_channels=32)
    vae = bases.TAEF2()
    for i in (1, 2, 3):
        vae.decoder[i] = bases.TinyBlock(64)
    layers = [*vae.from_latent.parameters(), *vae.decoder.parameters()]
    for ours, theirs in zip(layers, peer.decoder.parameters(), strict=True):
        ours.data.copy_(theirs)
    vae.to(memory_format=torch.channels_last)
    z = torch.randn(1, 32, 18, 18)
    yield from both_types("TAE, decode 144 px", lambda: vae.decoder(vae.from_latent(z)),
                          lambda: peer.decode(z).sample)


# ---------------------------------------------------------------- on a GPU: variants of bench.py's rows
# diffusers at SD3.5 Medium's sizes, with random bfloat16 weights.


def switch(parts, backend):
    """A function of a bool: are these modules compiled, from now on?"""
    compilers = {}
    for part in parts:
        part.compile(backend=backend, dynamic=False)
        compilers[part] = part._compiled_call_impl

    def compiled(yes):
        for part in parts:
            part._compiled_call_impl = compilers[part] if yes else None

    return compiled


def of_diffusers(build, backend):
    """{name: function}, as it is and with compiled parts.

    build: -> (parts, function). Called by the first call, so that a missing diffusers is a line in the table
    """
    from support.metrics import import_torchvision         # which diffusers imports, see its docstring
    made = []

    def run(yes):
        if not made:
            with contextlib.suppress(ImportError):
                import_torchvision()
            parts, function = build()
            made.extend([switch(parts, backend), torch.no_grad()(function)])
        compiled, function = made
        compiled(yes)
        function()

    return {"diffusers": partial(run, False), "diffusers, compiled": partial(run, True)}


def sampling(grid, noise, cond, backend):
    """Euler steps with guidance of the SD3 transformer.

    grid: times from 0, noise, up to 1;  noise (B, C, h, w);  cond: text (B, tokens, K), pooled (B, K)
    """
    def build():
        from diffusers import SD3Transformer2DModel
        text, pooled = [torch.cat([x, x]).bfloat16() for x in cond]
        heads, depth, dual = (24, 24, 13) if noise.is_cuda else (1, 2, 1)
        with noise.device:
            model = SD3Transformer2DModel(
                sample_size=128, in_channels=noise.shape[1], out_channels=noise.shape[1], num_layers=depth,
                dual_attention_layers=tuple(range(dual)), attention_head_dim=64, num_attention_heads=heads,
                caption_projection_dim=64 * heads, joint_attention_dim=text.shape[2],
                pooled_projection_dim=pooled.shape[1], pos_embed_max_size=384, qk_norm="rms_norm")
        model = model.to(noise.device, torch.bfloat16).eval()

        def run():
            x = noise.bfloat16()
            for t, t_next in pairwise(grid):
                sigma = torch.full((2 * len(x),), 1000 * (1 - t), device=x.device)
                uncond, cond = model(torch.cat([x, x]), text, pooled, sigma).sample.chunk(2)
                x = x - (t_next - t) * (uncond + 4.0 * (cond - uncond))

        return model.transformer_blocks, run

    return of_diffusers(build, backend)


def decoding(h, device, backend):
    """The decoder of SD3's autoencoder, for one latent (1, 16, h, h)."""
    def build():
        from diffusers import AutoencoderKL
        widths = (128, 256, 512, 512) if device.type == "cuda" else (32, 32, 32, 32)
        with device:
            vae = AutoencoderKL(
                block_out_channels=widths, down_block_types=4 * ("DownEncoderBlock2D",),
                up_block_types=4 * ("UpDecoderBlock2D",), layers_per_block=2, latent_channels=16,
                use_quant_conv=False, use_post_quant_conv=False)
            z = torch.randn(1, 16, h, h, dtype=torch.bfloat16)
        vae = vae.bfloat16().eval()
        return [vae.decoder], partial(vae.decode, z)

    return of_diffusers(build, backend)


# ---------------------------------------------------------------- metrics


def frechet():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    from support import metrics
    a = torch.randn(1000, 512)
    b = 1.2 * torch.randn(1000, 512) + 0.1

    def theirs():
        statistics = [fid_features_to_statistics(features) for features in (a, b)]
        return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    yield ("Frechet distance, 2 x 1,000 features of 512",
           lambda: metrics.frechet_distance(metrics.moments(a), metrics.moments(b)), theirs)


def image_metrics():
    """Theirs computes in float32."""
    from torchmetrics.functional import image as peer

    from support import metrics
    x = torch.rand(8, 3, 256, 256) * 2 - 1
    y = (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)

    def ours():
        return torch.stack([metrics.psnr(x, y).double(), metrics.ssim(x, y)])

    def theirs():
        psnr = peer.peak_signal_noise_ratio(y, x, data_range=2.0, reduction="none", dim=(1, 2, 3))
        ssim = peer.structural_similarity_index_measure(y, x, data_range=2.0, reduction="none")
        return torch.stack([psnr.double(), ssim.double()])

    yield "PSNR and SSIM, 8 x 256 px", ours, theirs


# ---------------------------------------------------------------- around a training step


def update():
    """Clipping, AdamW and EMA of 14 million parameters, against the loops of most training scripts."""
    import dit
    from finetune import ema_update

    def prepared(fused):
        torch.manual_seed(0)
        model = dit.LightningDiT(dit.LightningDiTConfig(E=384, A=6, depth=6))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return model, deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step(average, model, ema, optimizer):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            average(ema, model, 0.999)
        return model.O.weight + ema.O.weight               # both start at zero

    def one_by_one(ema, model, decay):
        newest = dict(model.named_parameters())
        for name, parameter in ema.named_parameters():
            parameter.mul_(decay).add_(newest[name], alpha=1 - decay)

    ours = partial(step, ema_update, *prepared(fused=True))
    yield "clipping, AdamW and EMA, 14 M parameters", ours, partial(step, one_by_one, *prepared(fused=None))


def start():
    root = Path(__file__).parent.parent

    def python_imports(name):
        subprocess.run([sys.executable, "-c", f"import {name}"], cwd=root, check=True)

    version("diffusers")                                   # ImportError if it is not installed
    yield ("start: import of finetune, of diffusers",
           partial(python_imports, "finetune"), partial(python_imports, "diffusers"))


def images():
    """JPEG files to batches of 32, with our threads, and with a DataLoader in this process."""
    from PIL import Image
    from torchvision import datasets, transforms

    from support import data
    crop = partial(data.center_crop, height=128)           # as the original's
    to_tensor = transforms.Compose([crop, transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    with tempfile.TemporaryDirectory() as folder:
        drawings = data.open_dataset("procedural", 384, 64)
        (Path(folder) / "class").mkdir()
        for i in range(64):
            Image.fromarray(drawings.image(i)[0]).resize((500, 375)).save(f"{folder}/class/{i:02d}.jpg")
        our_files = data.open_dataset(folder, 128)
        their_files = datasets.ImageFolder(folder, to_tensor)

        def ours():
            parts = (data.stack(our_files, range(i, i + 32))[0] for i in (0, 32))
            return torch.cat([data.to_tensor(part) for part in parts])

        def theirs():
            return torch.cat([x for x, _ in torch.utils.data.DataLoader(their_files, batch_size=32)])

        yield "64 JPEG files of 500x375 to batches of 128 px", ours, theirs


SECTIONS = {                                               # and what it needs
    mmdit: "diffusers",
    autoencoder: "diffusers",
    tiny_autoencoder: "diffusers",
    start: "diffusers",
    frechet: "torch-fidelity",
    image_metrics: "torchmetrics",
    images: "torchvision",
    update: "plain loops",
}
