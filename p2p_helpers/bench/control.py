"""Prompt-to-Prompt's cost per step of the UNet: plain generation, `control`, and attention matrices written out."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTokenizer

from ..attention import control
from ..edits import Edit, refine, reweight
from ..models import load, prompt_length
from ..runtime import Runtime, data_dir, detect, generator, quiet_libraries, setup
from ..sampling import alpha_bar, ddim_step, predict_noise, previous_timestep
from .timing import clock_of, exact_memory, interleaved, peak_above_start, ratio

__all__ = ["BARS", "MODELS", "VARIANTS", "ExplicitAttention", "Work", "edit_of", "make_pipe", "make_work",
           "measure_model", "measure_peak", "measure_times", "random_unet", "run", "summary", "table"]

MODELS = ("sd15", "sticker-world")
VARIANTS = ("plain", "one", "both", "explicit")
BARS = {"time_ratio_one": 1.10, "time_ratio_both": 1.25, "memory_ratio": 1.10}       # at Stable Diffusion 1.x's size
STEPS = {"sd15": 2, "sticker-world": 20}        # on a CPU; elsewhere ACCELERATED_STEPS
ACCELERATED_STEPS = 50
SOURCE, TARGET = "a cat on the beach", "a red cat on the beach in the fog"
LATENT_SCALE = 8                                # pixels by latents
SD15 = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768,
            attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
SD15_LENGTH = 77


# ---- what is run ----


@dataclass(frozen=True)
class Work:
    """A run to measure: source and target under guidance, hence a batch of four."""

    pipe: SimpleNamespace           # unet, scheduler, tokenizer
    latents: torch.Tensor           # (2, 4, h, w), twice the same noise
    embeddings: torch.Tensor        # (4, L, C), random: their content costs nothing
    steps: int


def random_unet(runtime: Runtime, config: Mapping = SD15) -> UNet2DConditionModel:
    """A UNet of random weights, made in its number format on its device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = unet.to(runtime.dtype).to_empty(device=runtime.device).eval().requires_grad_(False)
    noise = .02 * torch.randn(1_000_003, generator=generator(runtime.seed))      # a prime: rows of weights differ
    noise = noise.to(runtime.device, runtime.dtype)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            repeats = math.ceil(parameter.numel() / len(noise))
            parameter.copy_(noise.repeat(repeats)[:parameter.numel()].view_as(parameter))
        else:                                                                   # norms, and all biases
            parameter.fill_(float(name.endswith("weight")))
    return unet


def make_pipe(model: str, runtime: Runtime) -> SimpleNamespace:
    """What `control` uses of a pipeline: the bundled one's, or a random UNet of Stable Diffusion 1.x's size."""
    if model != "sd15":
        pipe = load(model, runtime=runtime)
        return SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler, tokenizer=pipe.tokenizer)
    folder = data_dir() / "models" / "sticker-world"
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=SD15_LENGTH)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    return SimpleNamespace(unet=random_unet(runtime), scheduler=scheduler, tokenizer=tokenizer)


def make_work(pipe, steps: int, size: int | None = None) -> Work:
    """Noise and embeddings for a pipe; `size` in pixels, by default the model's own."""
    side = size // LATENT_SCALE if size else pipe.unet.config.sample_size
    length, channels = prompt_length(pipe), pipe.unet.config.cross_attention_dim
    latents = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=generator(0))
    embeddings = torch.randn(4, length, channels, generator=generator(1))
    embeddings = embeddings.to(pipe.unet.device, pipe.unet.dtype)
    return Work(pipe, latents.repeat(2, 1, 1, 1).to(pipe.unet.device), embeddings, steps)


def edit_of(pipe, variant: str) -> Edit:
    """The edit of a variant, the same at all steps: u alone ("one"), or u and v at once."""
    if variant == "one":
        return refine(pipe, SOURCE, SOURCE, cross_replace_steps=1., self_replace_steps=0.)
    return reweight(refine(pipe, SOURCE, TARGET, cross_replace_steps=1., self_replace_steps=0.), {"cat": 2.})


@torch.no_grad()
def run(work: Work, variant: str) -> torch.Tensor:
    """Sample by DDIM under a variant; return the latents (2, 4, h, w)."""
    pipe, latents = work.pipe, work.latents
    pipe.scheduler.set_timesteps(work.steps)
    with _under(pipe, variant):
        for t in pipe.scheduler.timesteps:
            eps = predict_noise(pipe, latents, t, work.embeddings, 7.5)
            a_t, a_prev = (alpha_bar(pipe.scheduler, s) for s in (t, previous_timestep(pipe.scheduler, t)))
            latents = ddim_step(latents, eps, a_t, a_prev)
    return latents


@contextmanager
def _under(pipe, variant: str) -> Iterator[None]:
    if variant == "plain":
        yield
    elif variant == "explicit":
        before = dict(pipe.unet.attn_processors)
        pipe.unet.set_attn_processor(ExplicitAttention(edit_of(pipe, "both"), pipe.unet))
        try:
            yield
        finally:
            pipe.unet.set_attn_processor(before)
    else:
        with control(pipe, edit_of(pipe, variant)):
            yield


class ExplicitAttention:
    """The usual way, for comparison: every layer's matrix of pixels x tokens (or pixels), edited, times the values."""

    def __init__(self, edit: Edit, unet):
        u, v = edit.gains(.5)                           # the same at all steps
        like = dict(device=unet.device, dtype=unet.dtype)
        self.injected, self.own = (edit.alignment.matrix * u).to(**like), v.to(**like)      # (L, L), (L,)

    def __call__(self, attn, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                 attention_mask: torch.Tensor | None = None, temb: torch.Tensor | None = None) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(x)                                            # (B heads, pixels, d)
                   for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        maps = attn.get_attention_scores(q, k, attention_mask)                          # (B heads, pixels, tokens)
        if encoder_hidden_states is not None:
            source, target = maps.chunk(4)[2:]          # of a batch: no prompt twice, the source, the target
            target.copy_(source @ self.injected + target * self.own)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(maps @ v)))


# ---- what is measured ----


def measure_times(work: Work, rounds: int, say=print) -> dict[str, list[float]]:
    """Seconds per step of every variant in every round, all in this process and in turns."""
    device = str(work.pipe.unet.device)
    _, clock = clock_of(device)
    for variant in VARIANTS if device != "cpu" else ("plain",):         # what is loaded and chosen at a first step
        run(replace(work, steps=1), variant)
    seconds = interleaved({variant: partial(run, work, variant) for variant in VARIANTS}, rounds, clock, say)
    return {variant: [whole / work.steps for whole in all_rounds] for variant, all_rounds in seconds.items()}


def measure_peak(model: str, variant: str, size: int | None = None) -> int | None:
    """Bytes at the peak of one step less those of the loaded model, in this process; it should be a fresh one."""
    quiet_libraries()
    runtime = _runtime(model, detect())
    pipe = make_pipe(model, runtime)
    work = make_work(pipe, 1, size)
    run(make_work(pipe, 1, LATENT_SCALE * pipe.unet.config.sample_size // 4), variant)      # loads the libraries' code
    with peak_above_start(runtime.device) as measurement:
        run(work, variant)
    return measurement.peak_bytes


def _peak_in_own_process(model: str, variant: str, size: int | None) -> int | None:
    command = [sys.executable, "-m", "p2p_helpers.bench", "memory", "--model", model, "--variant", variant]
    command += ["--size", str(size)] if size else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | exact_memory())
    return json.loads(done.stdout.splitlines()[-1])


def measure_model(model: str, steps: int | None, rounds: int, size: int | None, say=print) -> dict:
    """Everything about a model; memory first, while this process holds nothing."""
    peaks = {}
    for variant in VARIANTS:
        peaks[variant] = _peak_in_own_process(model, variant, size)
        say(f"{model}: memory of {variant}: {_mib(peaks[variant])} MiB above the loaded model")
    runtime = _runtime(model, setup())
    steps = steps or (STEPS[model] if runtime.device == "cpu" else ACCELERATED_STEPS)
    work = make_work(make_pipe(model, runtime), steps, size)
    seconds = measure_times(work, rounds, lambda line: say(f"{model}: {line}"))
    return summary(seconds, peaks) | {"dtype": str(runtime.dtype).removeprefix("torch."), "steps": steps,
                                      "size": LATENT_SCALE * work.latents.shape[-1]}


def summary(seconds: Mapping[str, list[float]], peaks: Mapping[str, int | None]) -> dict:
    """Ratios to plain generation, and what they were made from."""
    times = {variant: round(ratio(seconds[variant], seconds["plain"]), 3) for variant in VARIANTS}
    memory = {variant: round(peaks[variant] / peaks["plain"], 3) if peaks["plain"] else None for variant in VARIANTS}
    return {"time_ratio_one": times["one"], "time_ratio_both": times["both"], "memory_ratio": memory["both"],
            "seconds_per_step": round(median(seconds["plain"]), 4),
            "explicit": {"time_ratio": times["explicit"], "memory_ratio": memory["explicit"]},
            "seconds_per_step_by_round": {name: [round(s, 4) for s in runs] for name, runs in seconds.items()},
            "memory_mib": {name: _mib(peak) for name, peak in peaks.items()}}


def table(figures: Mapping[str, dict]) -> str:
    """The figures as text, with the bars where they apply."""
    lines = [f"{'model':16}{'':10}{'s per step':>12}{'time':>8}{'MiB':>10}{'memory':>8}"]
    for model, found in figures.items():
        ratios = {"plain": (1., 1.), "one": (found["time_ratio_one"], None),
                  "both": (found["time_ratio_both"], found["memory_ratio"]),
                  "explicit": (found["explicit"]["time_ratio"], found["explicit"]["memory_ratio"])}
        for variant, (times, memory) in ratios.items():
            seconds = median(found["seconds_per_step_by_round"][variant])
            lines.append(f"{model:16}{variant:10}{seconds:12.4g}{times:8.3f}{found['memory_mib'][variant] or '':>10}"
                         + (f"{memory:8.3f}" if memory else ""))
    for name, bar in BARS.items() if "sd15" in figures else ():
        value = figures["sd15"][name]
        verdict = "not measured" if value is None else f"{value:.3f}, {'held' if value <= bar else 'MISSED'}"
        lines.append(f"sd15 {name} <= {bar:.2f}: {verdict}")
    return "\n".join(lines)


def _runtime(model: str, runtime: Runtime) -> Runtime:
    """On a CPU Stable Diffusion's size is run in bfloat16, in half of the memory and less than half of the time."""
    return replace(runtime, dtype=torch.bfloat16) if model == "sd15" and runtime.device == "cpu" else runtime


def _mib(count: int | None) -> float | None:
    return None if count is None else round(count / 2**20, 1)
