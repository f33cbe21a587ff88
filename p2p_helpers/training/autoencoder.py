"""Train the autoencoder: ``python -m p2p_helpers.training.autoencoder --preset cpu --minutes 25 --out runs/ae``."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F

from ..runtime import atomic_folder, atomic_write, quiet_libraries
from ..stickers import World, world
from .data import Pictures, stream, to_pictures
from .loop import Progress, arguments, note_command, train
from .presets import PRESETS, AutoencoderSettings

__all__ = ["build", "main", "reconstruction_loss"]

HELD_OUT = 64           # pictures that PSNR is measured on
HELD_OUT_SEED = 10**6   # no training seed
EDGES = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")


def build(settings: AutoencoderSettings) -> AutoencoderKL:
    """A new `AutoencoderKL` with narrow layers at full resolution and no attention."""
    levels = len(settings.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.widths, layers_per_block=settings.layers, norm_num_groups=settings.groups,
        latent_channels=settings.latent_channels, sample_size=128, scaling_factor=1., mid_block_add_attention=False)


def reconstruction_loss(picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that sees colour, large shapes and edges, not only single pixels.

    L1 of luma plus twice that of chroma (BT.601), L2 after pooling by 2, 4 and 8, 16 times the L2 of pixels (which
    is what PSNR counts), and 0.3 times the L1 of gradients.

    Parameters
    ----------
    picture, target : (B, 3, H, W) in [-1, 1]
    """
    difference = picture.float() - target
    luma = torch.einsum("bchw,c->bhw", difference, difference.new_tensor([.299, .587, .114]))   # (B, H, W)
    chroma = difference[:, [0, 2]] - luma[:, None]                                              # (B, 2, H, W)
    pooled = sum(F.avg_pool2d(difference, size).square().mean() for size in (2, 4, 8))
    gradient = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return luma.abs().mean() + 2 * chroma.abs().mean() + pooled + 16 * difference.square().mean() + .3 * gradient


def loss(settings: AutoencoderSettings, model, batch: dict, share: float) -> tuple[torch.Tensor, dict]:
    """Reconstruction plus a tiny pull of the posterior to the normal distribution (1e-6 of its sum, as SD's)."""
    pictures = to_pictures(batch["pictures"])
    if share < settings.crop_share:
        pictures = torch.cat([_crops(pictures, settings.crop) for _ in range(2)])
    with torch.set_grad_enabled(model.encoder.conv_in.weight.requires_grad):
        posterior = model.encode(pictures).latent_dist
    reconstruction = reconstruction_loss(model.decode(posterior.sample()).sample, pictures)
    divergence = posterior.kl().mean()
    return reconstruction + 1e-6 * divergence, {"reconstruction": reconstruction.item(), "kl": divergence.item()}


def _crops(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """One random crop of every picture: (B, 3, H, W) to (B, 3, size, size)."""
    ys, xs = torch.randint(pictures.shape[-1] - size + 1, (2, len(pictures))).tolist()
    return torch.stack([picture[:, y:y + size, x:x + size] for picture, y, x in zip(pictures, ys, xs)])


def pictures_of(of: World, count: int, seed: int) -> torch.Tensor:
    """Renders (count, 3, H, W) in [-1, 1] that depend on the seed alone."""
    return to_pictures(torch.from_numpy(Pictures(of, count)(np.random.default_rng(seed))["pictures"]))


def _in_batches(function, pictures: torch.Tensor, device) -> torch.Tensor:
    return torch.cat([function(batch.to(device)).float().cpu() for batch in pictures.split(32)])


def export(folder: Path, held_out: torch.Tensor, measured: torch.Tensor, model, progress: Progress) -> dict:
    """Write the model with its scaling factor, and a sheet of reconstructions; return the PSNR in dB."""
    latents = _in_batches(lambda batch: model.encode(batch).latent_dist.mean, measured, model.device)
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    with atomic_folder(folder / "vae") as new:
        model.save_pretrained(new)
    decoded = _in_batches(lambda batch: model(batch).sample, held_out, model.device).clamp(-1, 1)
    error = ((decoded - held_out) / 2).square().mean((1, 2, 3))     # (B,) of pictures in [0, 1]
    save_sheet(folder / f"sheet-{progress.step:08d}.png", torch.cat([held_out[:8], decoded[:8]]),
               columns=len(held_out[:8]))
    return {"psnr": (-10 * error.log10()).mean().item(), "scaling_factor": model.config.scaling_factor}


def save_sheet(path: Path, pictures: torch.Tensor, columns: int) -> None:
    """Save pictures (B, 3, H, W) in [-1, 1] in full rows of so many."""
    side = pictures.shape[-1]
    rows = len(pictures) // columns
    grid = pictures.clamp(-1, 1).reshape(rows, columns, 3, side, side)
    grid = grid.permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)     # from (rows, H, columns, W, 3)
    with atomic_write(path) as new:
        Image.fromarray(((grid + 1) * 127.5).round().byte().numpy()).save(new, format="PNG")


def main(argv: list[str] | None = None) -> None:
    """Train, or go on with, the autoencoder."""
    quiet_libraries()
    parser = arguments(__doc__)
    parser.add_argument("--decoder-only", action="store_true",
                        help="leave the encoder of --init as it is, and with it the latents that other models learned")
    options = parser.parse_args(argv)
    if options.decoder_only and not options.init:
        parser.error("--decoder-only needs --init: the encoder to keep")
    settings = PRESETS[options.preset].autoencoder
    if options.init:
        settings = dataclasses.replace(settings, crop_share=0.)      # whole pictures from the start
    loop = dataclasses.replace(settings.loop, seed=options.seed)
    note_command(options.out, "p2p_helpers.training.autoencoder", argv)
    torch.manual_seed(options.seed)
    of = world(settings.world)
    held_out = pictures_of(of, HELD_OUT, HELD_OUT_SEED)
    measured = pictures_of(of, settings.pictures, HELD_OUT_SEED + 1)
    batches = partial(stream, Pictures(of, settings.batch_size), seed=loop.seed, workers=loop.workers)
    model = build(settings) if options.init is None else AutoencoderKL.from_pretrained(
        options.init, subfolder="vae").float()
    if options.decoder_only:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    train(model, batches, partial(loss, settings), loop, options.out, edges=EDGES,
          minutes=options.minutes, export=partial(export, options.out, held_out, measured))


if __name__ == "__main__":
    main()
