"""Train the pipeline on an autoencoder's latents.

``python -m p2p_helpers.training.text_to_image --preset cpu --minutes 60 --autoencoder runs/ae --out runs/t2i``
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from torch import nn

from ..images import to_tensor
from ..models import save_legacy, write_checksums
from ..runtime import atomic_folder, generator, quiet_libraries
from ..stickers import caption, sample_scene, world
from .autoencoder import save_sheet
from .data import Captioned, cached_latents, stream
from .loop import Progress, accelerator, arguments, hardware, note_command, train
from .presets import PRESETS, TextToImageSettings
from .tokenizer import learn_tokenizer

__all__ = ["CARD", "SHEET", "TextToImage", "build", "main", "pipeline", "scheduler"]

CARD = "card.json"      # in a trained pipeline's folder: how it was made
EDGES = ("conv_in", "conv_out")
SHEET = ("a photo of a horse on the grass", "a photo of a zebra on the grass", "a red car on the road",
         "a blue car on the road", "a castle in the mountains at night", "a cat and a dog on the beach",
         "a pencil sketch of a house in the mountains", "a bowl of strawberries on a table",
         "a watercolor of a tree next to a river", "a motorcycle in the city in heavy rain",
         "a big elephant in the desert at sunset", "pixel art of a boat on the sea", "two balls in the snow",
         "a children's drawing of a bear in the forest", "a house in thick fog", "a cake to the left of a chair")


class TextToImage(nn.Module):
    """The two networks that are trained together, and what the loss needs of the others."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The noise in latents (B, 4, h, w) at timesteps (B,), given token ids (B, L)."""
        return self.unet(noisy, timesteps, self.text_encoder(ids)[0]).sample


def scheduler():
    """Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1)


def build(settings: TextToImageSettings, vocabulary: int) -> TextToImage:
    """New networks: cross-attention at 16 x 16 and 8 x 8; `vocabulary` counts tokens.

    The last two tokens are the start and end marks.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=settings.text_width, intermediate_size=4 * settings.text_width,
        num_hidden_layers=settings.text_layers, num_attention_heads=settings.text_heads,
        max_position_embeddings=settings.prompt_length, projection_dim=settings.text_width,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1))
    levels = len(settings.widths)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=settings.widths,
        layers_per_block=settings.layers, norm_num_groups=16, cross_attention_dim=settings.text_width,
        down_block_types=("CrossAttnDownBlock2D",) * levels, up_block_types=("CrossAttnUpBlock2D",) * levels,
        attention_head_dim=tuple(width // settings.head_size for width in settings.widths))    # diffusers: heads
    return TextToImage(unet, text_encoder)


def loss(settings: TextToImageSettings, noises, model: TextToImage, batch: dict, share: float):
    """Error of the predicted noise, weighted by min-SNR (arXiv:2303.09556, for epsilon: min(SNR, gamma) / SNR)."""
    latents = batch["latents"].float()
    noise = torch.randn_like(latents)
    timesteps = torch.randint(noises.config.num_train_timesteps, (len(latents),), device=latents.device)
    predicted = model(noises.add_noise(latents, noise, timesteps), timesteps, batch["ids"])
    error = (predicted.float() - noise).square().mean((1, 2, 3))    # (B,)
    snr = compute_snr(noises, timesteps)
    return (error * snr.clamp(max=settings.snr_gamma) / snr).mean(), {"error": error.mean().item()}


def pipeline(model: TextToImage, tokenizer, autoencoder):
    """Put the parts into a `StableDiffusionPipeline`."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=autoencoder, text_encoder=model.text_encoder, tokenizer=tokenizer, unet=model.unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(folder: Path, tokenizer, autoencoder, card: dict, model: TextToImage, progress: Progress) -> dict:
    """Write the whole pipeline with its card, and a sheet of samples."""
    pipe = pipeline(model, tokenizer, autoencoder)
    card = {**card, "minutes": round(card["minutes"] + progress.seconds / 60, 1),
            "samples_seen": card["samples_seen"] + progress.samples, "steps": card["steps"] + progress.step}
    with atomic_folder(folder / "model") as new:
        save_legacy(pipe, new)
        (new / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        write_checksums(new)
    with accelerator().autocast():
        images = pipe(list(SHEET), num_inference_steps=30, guidance_scale=5., generator=generator(0)).images
    save_sheet(folder / f"sheet-{progress.step:08d}.png", to_tensor(images), columns=8)
    return {"samples_seen": card["samples_seen"]}


def start(settings: TextToImageSettings, init: Path | None, autoencoder: Path | None):
    """Return (model, tokenizer, autoencoder, card of the past): new networks, or a trained pipeline's."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    vae = AutoencoderKL.from_pretrained(autoencoder or init, subfolder="vae").float().eval().requires_grad_(False)
    if init is None:
        of, rng = world("gpu"), np.random.default_rng(0)    # every word there is, so that all presets share it
        texts = [caption(sample_scene(rng, of), rng) for _ in range(settings.captions)]
        tokenizer = learn_tokenizer(texts, settings.prompt_length)
        return build(settings, len(tokenizer)), tokenizer, vae, {"minutes": 0., "samples_seen": 0, "steps": 0}
    pipe = StableDiffusionPipeline.from_pretrained(init, local_files_only=True)
    card = json.loads((init / CARD).read_text(encoding="utf-8"))
    kept = ("commands", "minutes", "samples_seen", "steps", "autoencoder")
    past = {name: card[name] for name in kept if name in card}
    return TextToImage(pipe.unet.float(), pipe.text_encoder.float()), pipe.tokenizer, vae, past


def main(argv: list[str] | None = None) -> None:
    """Train, or go on with, the pipeline."""
    quiet_libraries()
    parser = arguments(__doc__)
    parser.add_argument("--autoencoder", type=Path, help="run folder that holds vae/; default: that of --init")
    options = parser.parse_args(argv)
    if not (options.autoencoder or options.init):
        parser.error("--autoencoder is needed to train a new pipeline: the --out folder of the autoencoder's training")
    settings = PRESETS[options.preset].text_to_image
    loop = dataclasses.replace(settings.loop, seed=options.seed)
    torch.manual_seed(options.seed)
    model, tokenizer, autoencoder, past = start(settings, options.init, options.autoencoder)
    of = dataclasses.replace(world(settings.world), pair_share=settings.pair_share)
    device = accelerator().device
    if device.type == "cpu":        # the backward pass of fused attention is slow there: a step takes 1.3 times longer
        model.unet.set_attn_processor(AttnProcessor())
    latents = cached_latents(autoencoder.to(device), of, settings.scenes, options.out, seed=options.seed,
                             workers=loop.workers)
    make = Captioned(latents, of, tokenizer, settings.batch_size, settings.empty_share, seed=options.seed)
    commands = [*past.pop("commands", []), *note_command(options.out, "p2p_helpers.training.text_to_image", argv)]
    card = {"commands": commands, "preset": options.preset, "seed": options.seed, "hardware": hardware(),
            "kinds": list(of.kinds), **past}
    batches = partial(stream, make, seed=loop.seed, workers=loop.workers)
    train(model, batches, partial(loss, settings, scheduler()), loop, options.out, edges=EDGES, minutes=options.minutes,
          export=partial(export, options.out, tokenizer, autoencoder, card))


if __name__ == "__main__":
    main()
