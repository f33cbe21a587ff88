"""Settings of every training command, for two CPU cores and for one data-centre GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["AutoencoderSettings", "LoopSettings", "OracleSettings", "PRESETS", "Preset", "TextToImageSettings"]


@dataclass(frozen=True)
class LoopSettings:
    """What the training loop needs to know; the learning rates follow a cosine to zero."""

    steps: int                  # of the whole run; a run given minutes may end earlier
    muon_lr: float              # of matrices and kernels
    adamw_lr: float             # of everything else
    warmup: int = 100           # steps
    ema_decay: float = .9995
    seed: int = 0
    workers: int = 0            # processes that render; 0 renders in the loop
    save_minutes: float = 5.    # between two checkpoints


@dataclass(frozen=True)
class AutoencoderSettings:
    """An `AutoencoderKL` with one latent for 8 x 8 pixels."""

    world: str
    loop: LoopSettings
    widths: tuple[int, ...] = (16, 32, 96, 160)
    layers: int = 1
    groups: int = 8
    latent_channels: int = 4
    batch_size: int = 12        # pictures
    crop: int = 64              # side of the crops, two from each picture
    crop_share: float = 2 / 3   # of the run; whole pictures follow
    pictures: int = 512         # that the scaling factor is measured on


@dataclass(frozen=True)
class TextToImageSettings:
    """A `StableDiffusionPipeline` on the autoencoder's latents."""

    world: str
    loop: LoopSettings
    scenes: int                 # rendered and encoded once
    widths: tuple[int, ...] = (96, 192)
    layers: int = 1
    head_size: int = 32
    batch_size: int = 64
    captions: int = 20_000      # that the tokenizer learns from
    prompt_length: int = 32
    text_width: int = 160
    text_layers: int = 3
    text_heads: int = 5
    pair_share: float = .35     # of the scenes have two things, more than in the world: they are learned last
    empty_share: float = .1     # of the captions are replaced by "", for classifier-free guidance
    snr_gamma: float = 5.


@dataclass(frozen=True)
class OracleSettings:
    """The oracle, trained on renders alone."""

    world: str
    loop: LoopSettings
    batch_size: int = 32


@dataclass(frozen=True)
class Preset:
    """The settings of all three trainings on one kind of machine."""

    autoencoder: AutoencoderSettings
    text_to_image: TextToImageSettings
    oracle: OracleSettings


_CPU_LOOP = LoopSettings(steps=3_000, muon_lr=.015, adamw_lr=1e-3, ema_decay=.998)
_GPU_LOOP = replace(_CPU_LOOP, steps=20_000, ema_decay=.9995, workers=14)
_CPU = Preset(
    AutoencoderSettings("cpu", replace(_CPU_LOOP, steps=6_000)),
    TextToImageSettings("cpu", replace(_CPU_LOOP, steps=12_000, muon_lr=.012, ema_decay=.9995), scenes=40_000),
    OracleSettings("cpu", _CPU_LOOP),
)
_GPU = Preset(
    AutoencoderSettings("gpu", _GPU_LOOP, batch_size=64),
    TextToImageSettings("gpu", replace(_GPU_LOOP, steps=60_000), scenes=400_000, batch_size=512),
    OracleSettings("gpu", _GPU_LOOP, batch_size=128),
)
PRESETS: dict[str, Preset] = {"cpu": _CPU, "gpu": _GPU}
