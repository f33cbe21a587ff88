"""What the models are trained on: a stream of rendered scenes that depends on (seed, step) alone, and latents."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..runtime import atomic_write
from ..stickers import Scene, World, caption, render, sample_scene
from .loop import accelerator

__all__ = ["Captioned", "Pictures", "cached_latents", "scene_at", "stream", "to_pictures"]


@dataclass(frozen=True)
class _ByStep(Dataset):
    """The batch of every step, drawn from a generator of its own."""

    make: Callable[[np.random.Generator], dict]
    seed: int

    def __getitem__(self, step: int) -> dict:
        return self.make(np.random.default_rng((self.seed, step)))


def stream(make: Callable[[np.random.Generator], dict], first_step: int, *, seed: int, workers: int = 0) -> DataLoader:
    """Endless batches ``make(rng)`` from a step on; which process makes one does not change it."""
    return DataLoader(_ByStep(make, seed), batch_size=None, sampler=itertools.count(first_step), num_workers=workers,
                      prefetch_factor=4 if workers else None, pin_memory=torch.cuda.is_available())


@dataclass(frozen=True)
class Pictures:
    """Batches {"pictures": uint8 (B, H, W, 3)} of new scenes."""

    world: World
    batch_size: int

    def __call__(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        scenes = [sample_scene(rng, self.world) for _ in range(self.batch_size)]
        return {"pictures": np.stack([render(scene).image for scene in scenes])}


def to_pictures(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def scene_at(index: int, world: World, seed: int) -> Scene:
    """The scene with that number: made again from the seed wherever it is needed, stored nowhere."""
    return sample_scene(np.random.default_rng((seed, index)), world)


@dataclass(frozen=True)
class _Rendered(Dataset):
    world: World
    seed: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return render(scene_at(index, self.world, self.seed)).image


@torch.no_grad()
def cached_latents(autoencoder, world: World, count: int, folder: Path, *, seed: int = 0,
                   workers: int = 0) -> np.ndarray:
    """Render and encode scenes 0 ... count-1, or find them encoded by the same weights.

    Returns
    -------
    latents : float16 (count, 4, H/8, W/8), mapped from a file
        Means of the posterior times the scaling factor.
    """
    key = hashlib.sha256(save({name: tensor.contiguous() for name, tensor in autoencoder.state_dict().items()}))
    key.update(json.dumps([asdict(world), count, seed, autoencoder.config.scaling_factor]).encode())
    path = Path(folder) / f"latents-{key.hexdigest()[:16]}.npy"
    if not path.exists():
        with atomic_write(path) as new:
            _encode(autoencoder, _Rendered(world, seed, count), new, workers)
    return np.load(path, mmap_mode="r")


def _encode(autoencoder, scenes: _Rendered, file: Path, workers: int) -> None:
    latents, done = None, 0
    pictures = DataLoader(scenes, batch_size=64, num_workers=max(1, workers))
    for images in tqdm(pictures, desc="encoding scenes", unit="batch"):
        with accelerator().autocast():      # bfloat16 errs by less than the posterior's own deviation
            mean = autoencoder.encode(to_pictures(images.to(autoencoder.device))).latent_dist.mean
        mean = (mean.float() * autoencoder.config.scaling_factor).half().cpu().numpy()
        if latents is None:
            latents = np.lib.format.open_memmap(file, "w+", np.float16, (len(scenes), *mean.shape[1:]))
        latents[done:done + len(mean)] = mean
        done += len(mean)
    latents.flush()


@dataclass(frozen=True)
class Captioned:
    """Batches of cached latents, each with a caption worded anew: {"latents": float16 (B, 4, h, w), "ids": (B, L)}."""

    latents: np.ndarray
    world: World
    tokenizer: Callable
    batch_size: int
    empty_share: float
    seed: int = 0

    def __call__(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        chosen = rng.integers(len(self.latents), size=self.batch_size)
        texts = ["" if rng.random() < self.empty_share else caption(scene_at(index, self.world, self.seed), rng)
                 for index in chosen.tolist()]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="np").input_ids
        return {"latents": self.latents[chosen], "ids": ids.astype(np.int64)}
