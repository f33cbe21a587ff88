"""Train the oracle.

``python -m p2p_helpers.training.oracle --preset cpu --minutes 30 --autoencoder runs/ae --out runs/oracle``
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from ..models import write_checksums
from ..runtime import atomic_folder, quiet_libraries
from ..stickers import World, render, sample_scene, world
from ..stickers.oracle import Oracle
from .data import stream, to_pictures
from .loop import Progress, accelerator, arguments, note_command, train
from .oracle_targets import oracle_loss, targets
from .presets import PRESETS

__all__ = ["Questions", "main"]

HELD_OUT = 256          # pictures that the averaged oracle is measured on
HELD_OUT_SEED = 10**6   # no training seed
EDGES = ("stem", "dense", "whole", "fine")


@dataclass(frozen=True)
class Questions:
    """Batches of new renders (uint8, under "pictures") with the right answers beside them."""

    world: World
    batch_size: int

    def __call__(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        scenes = [sample_scene(rng, self.world) for _ in range(self.batch_size)]
        pictures = [render(scene) for scene in scenes]
        answers = [targets(scene, picture) for scene, picture in zip(scenes, pictures)]
        return {"pictures": np.stack([picture.image for picture in pictures]),
                **{name: np.stack([answer[name] for answer in answers]) for name in answers[0]}}


def worsen(pictures: torch.Tensor, autoencoder, share: float = .15) -> torch.Tensor:
    """Make renders (B, 3, H, W) look as pictures do that came out of a model: passed on, blurred, noisy.

    The first `share` of them goes through the autoencoder, half of all is blurred, all get noise of up to 0.1.
    """
    passed = int(share * len(pictures))
    if autoencoder is not None and passed:
        with torch.no_grad():
            pictures = torch.cat([autoencoder(pictures[:passed]).sample.float().clamp(-1, 1), pictures[passed:]])
    sigma = torch.rand(1).item() + .2
    offsets = torch.arange(-2., 3., device=pictures.device)
    line = torch.softmax(-offsets ** 2 / (2 * sigma ** 2), dim=0)
    kernel = (line[:, None] * line).expand(3, 1, 5, 5)                       # one for each channel
    blurred = F.conv2d(F.pad(pictures, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    chosen = torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    pictures = torch.where(chosen < .5, blurred, pictures)
    return pictures + .1 * torch.rand_like(chosen) * torch.randn_like(pictures)


def loss(autoencoder, model: Oracle, batch: dict[str, torch.Tensor], share: float) -> tuple[torch.Tensor, dict]:
    """The loss of the oracle's answers about worsened renders."""
    pictures = worsen(to_pictures(batch["pictures"]), autoencoder)
    return oracle_loss(model(pictures.contiguous(memory_format=torch.channels_last)), batch)


def export(folder: Path, held_out: dict[str, torch.Tensor], model: Oracle, progress: Progress) -> dict:
    """Write the oracle in float16; return its shares of right answers on held-out renders."""
    with atomic_folder(folder / "model") as new:
        copy.deepcopy(model).half().save_pretrained(new)     # a copy: the optimiser shares the weights' memory
        write_checksums(new)
    out = model(to_pictures(held_out["pictures"]).to(model.device))
    right = {name: out[name].argmax(1).cpu() == held_out[name] for name in ("kinds", "place", "time", "style")}
    asked = {"kinds": held_out["kinds"] > 0, "place": held_out["place"] >= 0}
    return {f"held_out_{name}": hits[asked.get(name, slice(None))].float().mean().item() for name, hits in right.items()}


def main(argv: list[str] | None = None) -> None:
    """Train, or go on with, the oracle."""
    quiet_libraries()
    parser = arguments(__doc__)
    parser.add_argument("--autoencoder", type=Path, help="run folder that holds vae/: some renders pass through it")
    options = parser.parse_args(argv)
    settings = PRESETS[options.preset].oracle
    loop = dataclasses.replace(settings.loop, seed=options.seed)
    note_command(options.out, "p2p_helpers.training.oracle", argv)
    torch.manual_seed(options.seed)
    of = world(settings.world)
    held_out = Questions(of, HELD_OUT)(np.random.default_rng(HELD_OUT_SEED))
    batches = partial(stream, Questions(of, settings.batch_size), seed=loop.seed, workers=loop.workers)
    autoencoder = None
    if options.autoencoder:
        autoencoder = AutoencoderKL.from_pretrained(options.autoencoder, subfolder="vae").eval().requires_grad_(False)
        autoencoder.to(accelerator().device)
    oracle = Oracle() if options.init is None else Oracle.from_pretrained(options.init).float()
    oracle = oracle.to(memory_format=torch.channels_last)            # three times faster on a CPU
    train(oracle, batches, partial(loss, autoencoder), loop, options.out, edges=EDGES, minutes=options.minutes,
          export=partial(export, options.out, {name: torch.from_numpy(value) for name, value in held_out.items()}))


if __name__ == "__main__":
    main()
