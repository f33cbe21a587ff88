"""Train the oracle: ``python -m p2p_helpers.training.oracle --preset cpu --minutes 30 --out runs/oracle``."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..models import write_checksums
from ..runtime import atomic_folder, quiet_libraries
from ..stickers import World, render, sample_scene, world
from ..stickers.oracle import Oracle
from .data import stream, to_pictures
from .loop import Progress, arguments, train
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


def loss(model: Oracle, batch: dict[str, torch.Tensor], share: float) -> tuple[torch.Tensor, dict]:
    """The loss of the oracle's answers."""
    return oracle_loss(model(to_pictures(batch["pictures"])), batch)


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
    options = arguments(__doc__).parse_args(argv)
    settings = PRESETS[options.preset].oracle
    loop = dataclasses.replace(settings.loop, seed=options.seed)
    torch.manual_seed(options.seed)
    of = world(settings.world)
    held_out = Questions(of, HELD_OUT)(np.random.default_rng(HELD_OUT_SEED))
    batches = partial(stream, Questions(of, settings.batch_size), seed=loop.seed, workers=loop.workers)
    train(Oracle(), batches, loss, loop, options.out, edges=EDGES, minutes=options.minutes,
          export=partial(export, options.out, {name: torch.from_numpy(value) for name, value in held_out.items()}))


if __name__ == "__main__":
    main()
