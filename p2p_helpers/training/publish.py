"""Put trained models where the course finds them, with their model cards.

``python -m p2p_helpers.training.publish --text-to-image runs/t2i --autoencoder runs/ae --oracle runs/oracle``

An autoencoder alone, trained with ``--decoder-only``, takes its place in the published pipeline. What was measured on
the model before goes with it: run ``python -m p2p_helpers.stickers.benchmark`` next.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..models import load, save_legacy, write_checksums
from ..runtime import atomic_folder, data_dir, detect, quiet_libraries
from .loop import COMMANDS, hardware
from .text_to_image import CARD

__all__ = ["main", "run_facts"]

_CARD_TEXT = """\
# {title}

{what}

{table}

Trained on renders of Sticker World (`p2p_helpers.stickers`), captions included; the drawings are Noto Emoji
(Apache-2.0) and Fluent Emoji (MIT), see `data/stickers/NOTICE`. No photograph and no picture of a person was used.
Licence of the weights: Apache-2.0.

{limits}
"""
_PIPELINE_TEXT = dict(
    title="Sticker World, a small latent diffusion model",
    what="A complete `StableDiffusionPipeline` (`CLIPTokenizer`, `CLIPTextModel`, `UNet2DConditionModel`, "
         "`AutoencoderKL`, `DDIMScheduler`) for pictures of 128 x 128, in the layout that older versions of diffusers "
         "and transformers read too. `benchmark.json` holds what it can do, measured by "
         "`python -m p2p_helpers.stickers.benchmark`; `samples.png` shows the first ten pictures of each of its sets.",
    limits="Limits: it knows the words of Sticker World's captions and nothing else: {kinds}. It does not draw people, "
           "text or photographs, and it counts badly. Unlike Stable Diffusion it reads 32 tokens "
           "instead of 77, has 16 x 16 latents with cross-attention at 16 x 16 and 8 x 8, and was trained on pictures "
           "whose layout does not depend on the caption.")
_ORACLE_TEXT = dict(
    title="The oracle of Sticker World",
    what="A small convolutional network that tells what a picture of Sticker World shows "
         "(`p2p_helpers.stickers.oracle`). It measures; it takes no part in generating or training what it measures.",
    limits="Limits: it reads pictures in the styles of Sticker World only; on anything else its answers mean nothing.")


def run_facts(run: Path, published: dict) -> dict:
    """What the log of a run tells: its commands, minutes, steps and samples, with those before its --init."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max(lines, key=lambda line: line["step"])
    commands = (run / COMMANDS).read_text(encoding="utf-8").splitlines()
    past = published if any("--init" in command for command in commands) else {}
    return {"commands": [*past.get("commands", []), *commands], "hardware": hardware(),
            "minutes": round(past.get("minutes", 0) + last["seconds"] / 60, 1),
            "steps": past.get("steps", 0) + int(last["step"]),
            "samples_seen": past.get("samples_seen", 0) + int(last["samples"])}


def _published(folder: Path) -> dict:
    card = folder / CARD
    return json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}


def _table(facts: dict, prefix: str = "") -> list[str]:
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += _table(value, f"{name}: ")
        else:
            text = "<br>".join(f"`{command}`" for command in value) if isinstance(value, list) else value
            rows.append(f"| {prefix}{name} | {text} |")
    return rows


def _publish(source: Path, target: Path, facts: dict, text: dict) -> None:
    with atomic_folder(target) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)
        (new / CARD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        table = "\n".join(["| | |", "|---|---|", *_table({name: facts[name] for name in facts if name != "kinds"})])
        (new / "README.md").write_text(_CARD_TEXT.format(**text, table=table), encoding="utf-8")
        for file in new.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        write_checksums(new)


def _with_autoencoder(folder: Path, run: Path, new: Path) -> dict:
    """Write the published pipeline with the autoencoder of a run to a new folder; return its facts."""
    pipe, autoencoder = load(str(folder), runtime=detect(device="cpu")), AutoencoderKL.from_pretrained(run / "vae")
    known = pipe.vae.state_dict()
    if not all(torch.allclose(weight, known[name], atol=1e-3) for name, weight in autoencoder.state_dict().items()
               if name.startswith(("encoder", "quant_conv"))):
        raise ValueError(f"the encoder of {run.name!r} is not the published one, whose latents the other models know; "
                         "train with --decoder-only, or train and publish the text-to-image model with it")
    autoencoder.register_to_config(scaling_factor=pipe.vae.config.scaling_factor)
    pipe.vae = autoencoder
    save_legacy(pipe, new)
    facts = _published(folder)
    return facts | {"autoencoder": run_facts(run, facts.get("autoencoder", {}))}


def _pipeline_text(facts: dict) -> dict:
    return _PIPELINE_TEXT | {"limits": _PIPELINE_TEXT["limits"].format(kinds=", ".join(facts["kinds"]))}


def main(argv: list[str] | None = None) -> None:
    """Copy the models of finished runs to data/models and write their cards."""
    quiet_libraries()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("text-to-image", "autoencoder", "oracle"):
        parser.add_argument(f"--{name}", type=Path, help="folder of the run")
    options = parser.parse_args(argv)
    models = data_dir() / "models"
    if options.text_to_image:
        source = options.text_to_image / "model"
        facts = _published(source)
        if options.autoencoder:
            past = _published(models / "sticker-world").get("autoencoder", {})
            facts["autoencoder"] = run_facts(options.autoencoder, past)
        _publish(source, models / "sticker-world", facts, _pipeline_text(facts))
    elif options.autoencoder:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "model"
            facts = _with_autoencoder(models / "sticker-world", options.autoencoder, source)
            _publish(source, models / "sticker-world", facts, _pipeline_text(facts))
    if options.oracle:
        facts = run_facts(options.oracle, _published(models / "oracle"))
        _publish(options.oracle / "model", models / "oracle", facts, _ORACLE_TEXT)


if __name__ == "__main__":
    main()
