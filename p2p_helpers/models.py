"""Checkpoints: a table of names, loading from disk, hub or mirror, checksums, and what a model accepts."""
from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .runtime import Runtime, atomic_folder, atomic_write, closest, data_dir, detect, quiet_libraries

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Checkpoint", "CHECKPOINTS", "load", "prompt_length", "image_size", "check_prompt", "check_size",
           "model_key", "save_legacy", "write_checksums", "verify_checksums"]


@dataclass(frozen=True)
class Checkpoint:
    """One row of the table of models."""

    name: str
    repo: str                   # id on the Hugging Face hub, a folder, or (bundled) a path inside data_dir()
    task: str                   # a key of PIPELINES
    modelscope: str | None      # id on ModelScope, where one is known
    size: int | None            # side in pixels of the images it was trained on
    bundled: bool = False


PIPELINES = {
    "text-to-image": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "instruct": "StableDiffusionInstructPix2PixPipeline",
}
UNET_CHANNELS = {"text-to-image": (4,), "inpainting": (4, 9), "instruct": (8,)}
SOURCES = ("huggingface", "modelscope")
CHECKPOINTS = {row.name: row for row in (
    Checkpoint("sticker-world", "models/sticker-world", "text-to-image", None, 128, bundled=True),
    Checkpoint("sd14", "CompVis/stable-diffusion-v1-4", "text-to-image", None, 512),
    Checkpoint("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", "text-to-image",
               "AI-ModelScope/stable-diffusion-v1-5", 512),
    Checkpoint("sd15-inpainting", "stable-diffusion-v1-5/stable-diffusion-inpainting", "inpainting", None,
               512),
    Checkpoint("instruct-pix2pix", "timbrooks/instruct-pix2pix", "instruct", None, 512),
)}


def load(name_or_path: str | os.PathLike | None = None, *, runtime: Runtime | None = None,
         task: str | None = None, low_memory: bool = False) -> DiffusionPipeline:
    """Load a pipeline, ready for editing: DDIM scheduler, no safety checker, on its device.

    Parameters
    ----------
    name_or_path : str or path, optional
        A name in `CHECKPOINTS`, a folder written by diffusers, or an id "owner/name" on the hub
        (downloaded from HF_ENDPOINT, or from ModelScope with P2P_SOURCE=modelscope). By default the
        environment variable P2P_MODEL, else "sticker-world", which is bundled and needs no network.
    runtime : Runtime, optional
        What `setup` returned; by default what `detect` finds.
    task : {"text-to-image", "inpainting", "instruct"}, optional
        By default the checkpoint's own.
    low_memory : bool
        Decode images one by one, and on cuda keep only the part of the model at work on the device.
        (Attention slicing is not used: it would replace the attention processors that the edits install.)

    Raises
    ------
    ValueError
        If the name, the task or P2P_SOURCE is unknown, the model does not fit the task, or a weight file is
        damaged.
    FileNotFoundError
        If a file of the model is missing.
    ConnectionError
        If the model has to be downloaded and cannot be.
    """
    quiet_libraries()
    runtime = runtime or detect()
    checkpoint = _find(str(name_or_path or os.environ.get("P2P_MODEL") or "sticker-world"))
    task = task or checkpoint.task
    if task not in PIPELINES:
        raise ValueError(f"task {task!r} is unknown; {closest(task, PIPELINES)}")
    folder = _locate(checkpoint, task)
    verify_weights(folder)
    pipe = _read(folder, task, runtime)
    _check_task(pipe, task, checkpoint.name)
    pipe.scheduler = _ddim(pipe.scheduler.config)
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        pipe.set_progress_bar_config(disable=True)
    return _place(pipe, runtime.device, low_memory)


def _find(name: str) -> Checkpoint:
    """The row of a name, or a row made up for a folder or a hub id."""
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    index = Path(name) / "model_index.json"
    if index.is_file():
        tasks = {pipeline: task for task, pipeline in PIPELINES.items()}
        pipeline = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
        return Checkpoint(name, name, tasks.get(pipeline, "text-to-image"), None, None)
    if Path(name).is_dir():
        raise FileNotFoundError(f"the folder {name!r} has no model_index.json: it is no pipeline that "
                                "diffusers saved")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and " " not in name:
        return Checkpoint(name, name, "text-to-image", name, None)
    raise ValueError(f"model {name!r} is neither a known name nor a folder nor a hub id 'owner/name'; "
                     + closest(name, CHECKPOINTS))


def _locate(checkpoint: Checkpoint, task: str) -> Path:
    """The folder that holds a checkpoint on this machine, downloaded if need be."""
    if checkpoint.bundled:
        return data_dir() / checkpoint.repo
    if Path(checkpoint.repo).is_dir():
        return Path(checkpoint.repo)
    source = os.environ.get("P2P_SOURCE") or "huggingface"
    if source not in SOURCES:
        raise ValueError(f"P2P_SOURCE is {source!r}; {closest(source, SOURCES)}")
    return _from_modelscope(checkpoint) if source == "modelscope" else _from_hub(checkpoint, task)


def _from_hub(checkpoint: Checkpoint, task: str) -> Path:
    from huggingface_hub import constants

    try:
        return Path(_pipeline_class(task).download(checkpoint.repo, use_safetensors=True,
                                                   safety_checker=None))
    except Exception as error:      # the hub raises the errors of its HTTP client, another one by version
        raise _unreachable(checkpoint, constants.ENDPOINT, error) from error


def _from_modelscope(checkpoint: Checkpoint) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ImportError("P2P_SOURCE=modelscope needs a package: pip install modelscope") from error
    if checkpoint.modelscope is None:
        known = [row.name for row in CHECKPOINTS.values() if row.modelscope]
        raise ValueError(f"no ModelScope id is known for {checkpoint.name!r} (only for: {', '.join(known)}); "
                         "give the id 'owner/name' itself, or unset P2P_SOURCE")
    try:
        return Path(snapshot_download(checkpoint.modelscope))
    except Exception as error:      # modelscope raises whatever its HTTP client and its API raise
        raise _unreachable(checkpoint, "ModelScope", error) from error


def _unreachable(checkpoint: Checkpoint, where: str, error: BaseException) -> ConnectionError:
    while error.__cause__ is not None:      # what happened first says most
        error = error.__cause__
    cause = " ".join([type(error).__name__ + ":", *str(error).split()])
    return ConnectionError(
        f"cannot download {checkpoint.repo!r} from {where} ({cause}). Three ways out:\n"
        "  1. the bundled model, which needs no network: load('sticker-world')\n"
        "  2. a mirror: set HF_ENDPOINT (for instance https://hf-mirror.com) or P2P_SOURCE=modelscope before "
        "the first import, and restart the kernel\n"
        "  3. a folder that you copied here: load('path/to/folder') or P2P_MODEL=path/to/folder")


def _pipeline_class(task: str):
    import diffusers

    return getattr(diffusers, PIPELINES[task])


def _read(folder: Path, task: str, runtime: Runtime) -> DiffusionPipeline:
    """Read a folder without network and without unpickling anything."""
    import diffusers
    from packaging.version import Version

    # diffusers before 0.40 ignores `dtype` silently, later ones deprecate `torch_dtype`
    keyword = "dtype" if Version(diffusers.__version__) >= Version("0.40.0") else "torch_dtype"
    pipe = _pipeline_class(task).from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, safety_checker=None,
        requires_safety_checker=False, **{keyword: runtime.dtype})
    if pipe.unet.dtype != runtime.dtype:
        raise RuntimeError(f"diffusers {diffusers.__version__} ignored {keyword}={runtime.dtype}: the UNet "
                           f"is {pipe.unet.dtype}")
    return pipe


def _check_task(pipe: DiffusionPipeline, task: str, name: str) -> None:
    channels = pipe.unet.config.in_channels
    if channels not in UNET_CHANNELS[task]:
        fitting = [other for other, counts in UNET_CHANNELS.items() if channels in counts]
        raise ValueError(f"model {name!r} cannot do task {task!r}: its UNet takes {channels} channels; "
                         "it can do " + (" or ".join(fitting) or "none of the tasks known here"))


def _ddim(config):
    """Stable Diffusion's settings of DDIM, whatever scheduler the checkpoint came with."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _place(pipe: DiffusionPipeline, device: str, low_memory: bool) -> DiffusionPipeline:
    if low_memory:
        pipe.vae.enable_slicing()
    if low_memory and device.startswith("cuda"):
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


# ---- weights on disk ----


def verify_weights(folder: Path) -> None:
    """Check a model's folder before it is read: its checksums, or at least that no weights are cut short."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder / 'model_index.json'} is missing: the model is not complete here")
    if (folder / "checksums.json").is_file():
        verify_checksums(folder)
        return
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"the weight file {file} is damaged or cut short ({error}); "
                             "copy or download it again") from error


def model_key(pipe: DiffusionPipeline) -> str:
    """A short name for a pipeline: that of its folder, and some digits of its UNet's weights as float16."""
    ends = (pipe.unet.conv_in.weight, pipe.unet.conv_out.weight)
    weights = b"".join(end.detach().cpu().half().numpy().tobytes() for end in ends)
    return f"{Path(pipe.config._name_or_path).name}:{hashlib.sha256(weights).hexdigest()[:8]}"


def write_checksums(folder: str | os.PathLike) -> Path:
    """Write `checksums.json`: the SHA-256 of every file of a folder, by its path in it."""
    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / "checksums.json")
    table = {file.relative_to(folder).as_posix(): _sha256(file) for file in files}
    with atomic_write(folder / "checksums.json") as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return folder / "checksums.json"


def verify_checksums(folder: str | os.PathLike) -> None:
    """Compare a folder with its `checksums.json`.

    Raises
    ------
    FileNotFoundError
        If a listed file is missing.
    ValueError
        If a file differs; the message names it.
    """
    folder = Path(folder)
    for name, digest in json.loads((folder / "checksums.json").read_text(encoding="utf-8")).items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; restore it: git checkout, or install again")
        if _sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} does not match its checksum: it is cut short or was changed; "
                             "restore it (git checkout, or install again), or run write_checksums if the "
                             "change is yours")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_legacy(pipe: DiffusionPipeline, folder: str | os.PathLike) -> Path:
    """Save a pipeline so that every supported and most older versions of diffusers and transformers read it.

    Weights are float16 safetensors, the text encoder's keys start with `text_model.` as before
    transformers 5, vocab.json and merges.txt stand next to tokenizer.json, and checksums.json lists every
    file. The folder is replaced as a whole or not at all; `pipe` itself stays as it is.
    """
    quiet_libraries()
    folder = Path(folder)
    with atomic_folder(folder) as new:
        pipe.save_pretrained(new, safe_serialization=True)
        for file in new.rglob("*.safetensors"):
            _rewrite_weights(file, prefix="text_model." if file.parent.name == "text_encoder" else "")
        pipe.tokenizer.backend_tokenizer.model.save(str(new / "tokenizer"))     # vocab.json, merges.txt
        for file in new.rglob("*.json"):
            _rewrite_settings(file)
        write_checksums(new)
    return folder


def _rewrite_weights(file: Path, prefix: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = {name if name.startswith(prefix) else prefix + name:
               tensor.half() if tensor.is_floating_point() else tensor
               for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _rewrite_settings(file: Path) -> None:
    """Drop the names of folders on the machine that saved the model, and tell the weights' number format."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not {"_name_or_path", "name_or_path", "dtype", "torch_dtype"} & settings.keys():
        return
    for key in ("_name_or_path", "name_or_path", "local_files_only", "is_local"):
        settings.pop(key, None)
    for key in {"dtype", "torch_dtype"} & settings.keys():
        settings[key] = "float16"
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- what a model accepts ----


def prompt_length(model) -> int:
    """How many tokens a pipeline (or a tokenizer) reads, start and end marks included: 77 in Stable Diffusion."""
    limit = getattr(model, "tokenizer", model).model_max_length
    return min(limit, model.text_encoder.config.max_position_embeddings) if hasattr(model, "text_encoder") else limit


def image_size(pipe: DiffusionPipeline) -> int:
    """The side in pixels of the square images that the model was trained on."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def check_prompt(model, prompt: str, *, allow_empty: bool = False) -> None:
    """Raise a ValueError for a prompt that is empty or too long; say which words would be cut.

    `model` is a pipeline, or its tokenizer.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a string, not {type(prompt).__name__}: {prompt!r}")
    words = prompt.split()
    if not words and not allow_empty:
        raise ValueError("the prompt is empty; describe a picture, for instance 'a cat on the beach'")
    room = prompt_length(model) - 2      # without the start and end marks
    if _token_count(model, prompt) <= room:
        return
    fit = next(n for n in reversed(range(len(words))) if _token_count(model, " ".join(words[:n])) <= room)
    raise ValueError(f"the prompt has {_token_count(model, prompt)} tokens and the model reads {room}; "
                     f"these words would be cut: {' '.join(words[fit:])!r}. Shorten the prompt {prompt!r}")


def _token_count(model, text: str) -> int:
    return len(getattr(model, "tokenizer", model)(text, add_special_tokens=False).input_ids)


def check_size(pipe: DiffusionPipeline, height: int | None = None,
               width: int | None = None) -> tuple[int, int]:
    """The size of image to make, None being the model's own; raise a ValueError for one it cannot make."""
    factor = pipe.vae_scale_factor
    sizes = {"height": height, "width": width}
    for name, side in sizes.items():
        if side is None:
            sizes[name] = image_size(pipe)
        elif side < factor or side % factor:
            below = max(side // factor, 1) * factor
            raise ValueError(f"{name} {side} is not a multiple of {factor}, the pixels of one latent; "
                             f"take {below} or {below + factor}")
    return sizes["height"], sizes["width"]
