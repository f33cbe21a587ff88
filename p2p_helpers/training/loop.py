"""The training loop: accelerate, Muon, EMA, a schedule by progress, checkpoints that survive a kill."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..runtime import atomic_folder, keep_freed_memory
from .muon import MuonAdamW
from .presets import PRESETS, LoopSettings

__all__ = ["COMMANDS", "Ema", "Progress", "accelerator", "arguments", "hardware", "note_command", "train"]

LOG_EVERY = 25      # steps
COMMANDS = "commands.txt"   # in a run's folder: a line for each of its sessions
CLIP = 1.           # of the gradient's norm


@dataclass
class Progress:
    """How far a run has come, over all its sessions."""

    step: int = 0
    seconds: float = 0.
    samples: int = 0

    def share(self, steps: int, minutes: float | None) -> float:
        """The part of the run that is done, by steps or by the clock, whichever is further."""
        return min(1., max(self.step / steps, self.seconds / (60 * minutes) if minutes else 0.))


class Ema:
    """An exponential moving average of a model's parameters, with diffusers' warm-up (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters; `step` counts from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        names, now = zip(*self.model.named_parameters())
        torch._foreach_lerp_([self.average[name] for name in names], list(now), weight)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Lend the model with the averaged parameters, in eval mode; the trained ones come back afterwards."""
        trained = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.load_state_dict(trained)
            self.model.train()


def accelerator() -> Accelerator:
    """An `Accelerator` with bfloat16 autocast where the processor or GPU computes in it."""
    if torch.cuda.is_available():
        brain = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        brain = not torch.backends.mps.is_available()
    return Accelerator(mixed_precision="bf16" if brain else "no")


def train(model: nn.Module, batches: Callable[[int], Iterable], loss_fn: Callable, settings: LoopSettings,
          folder: Path, *, edges: tuple[str, ...], minutes: float | None = None,
          export: Callable[[nn.Module, Progress], dict] | None = None) -> Progress:
    """Train until the steps or the minutes are over, or Ctrl-C; go on from the newest checkpoint in `folder`.

    Everything random is drawn from (seed, step) and nothing else, so a resumed run continues as if it had never
    stopped, and a checkpoint needs no state of a random generator.

    Parameters
    ----------
    model : nn.Module
        In its start state; moved to the device here.
    batches : callable
        ``batches(first_step)`` gives the batches from that step on: dicts of tensors (or of lists).
    loss_fn : callable
        ``loss_fn(model, batch, share)`` returns the loss and a dict of numbers for the log. `share` is how much of
        the run is done, in [0, 1].
    settings : LoopSettings
    folder : Path
        Takes ``checkpoint-<step>/``, ``log.jsonl`` and what `export` writes.
    edges : tuple of str
        First and last layers, see `muon.split_parameters`.
    minutes : float, optional
        Of the whole run, over all its sessions; the schedule ends with them.
    export : callable, optional
        ``export(model, progress)`` is given the averaged model at every checkpoint; it returns numbers for the log.

    Returns
    -------
    Progress
    """
    run = _Run(model, loss_fn, settings, Path(folder), edges, minutes, export)
    with _stop_signals() as stopped, tqdm(total=settings.steps, initial=run.progress.step, unit="step") as bar:
        for batch in _until(batches(run.progress.step), lambda: run.done or stopped):
            run.one_step(batch, bar)
        if run.progress.step > run.saved_step:
            run.save()
    return run.progress


class _Run:
    """The parts of a run, and what is done with them at each step."""

    def __init__(self, model, loss_fn, settings, folder, edges, minutes, export):
        self.accelerator = accelerator()
        self.model = model.to(self.accelerator.device).train()
        self.optimizer = MuonAdamW(self.model, settings.muon_lr, settings.adamw_lr, edges)
        self.ema = Ema(self.model, settings.ema_decay)
        self.loss_fn, self.settings, self.minutes, self.export = loss_fn, settings, minutes, export
        self.folder, self.progress, self.logs = folder, Progress(), []
        self._resume()
        self.saved_step = self.progress.step
        self.clock = self.last_save = time.perf_counter()

    @property
    def share(self) -> float:
        return self.progress.share(self.settings.steps, self.minutes)

    @property
    def done(self) -> bool:
        return self.share >= 1

    def one_step(self, batch: dict, bar: tqdm) -> None:
        step, device = self.progress.step, self.accelerator.device
        batch = {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                 for name, value in batch.items()}
        torch.manual_seed(hash((self.settings.seed, step)))
        self.optimizer.scale(self._schedule())
        with self.accelerator.autocast():
            loss, logs = self.loss_fn(self.model, batch, self.share)
        self.accelerator.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.optimizer.parameters, CLIP)
        self.optimizer.step()
        self.ema.update(step)
        self.progress.samples += len(next(iter(batch.values())))
        self.progress.step += 1
        self._tick()
        self.logs.append({"loss": loss.item(), "gradient": norm.item(), **logs})
        self._after_step(bar)

    def _after_step(self, bar: tqdm) -> None:
        bar.update()
        bar.set_postfix(loss=f"{self.logs[-1]['loss']:.4f}", samples=self.progress.samples, refresh=False)
        if self.progress.step % LOG_EVERY == 0:
            self._log({name: sum(logs[name] for logs in self.logs) / len(self.logs) for name in self.logs[-1]})
            self.logs.clear()
        if time.perf_counter() - self.last_save > 60 * self.settings.save_minutes and not self.done:
            self.save()

    def save(self) -> None:
        """Write a checkpoint under its own name, then drop the older ones; export the averaged model."""
        tensors = {"model": self.model.state_dict(), "ema": self.ema.average, "optimizer": self.optimizer.tensors()}
        path = self.folder / f"checkpoint-{self.progress.step:08d}"
        with atomic_folder(path) as new:
            for name, state in tensors.items():
                save_file({key: value.contiguous() for key, value in state.items()}, new / f"{name}.safetensors")
            (new / "progress.json").write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
        for old in _checkpoints(self.folder):
            if old != path:
                shutil.rmtree(old)
        if self.export:
            with self.ema.applied() as model, torch.no_grad():
                self._log(self.export(model, self.progress))
        self._tick()
        self.saved_step, self.last_save = self.progress.step, time.perf_counter()

    def _resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".checkpoint-*"):      # of a save that was killed
            shutil.rmtree(leftover)
        checkpoints = _checkpoints(self.folder)
        if checkpoints:
            state = {name: load_file(checkpoints[-1] / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}
            self.model.load_state_dict(state["model"])
            for name, tensor in self.ema.average.items():
                tensor.copy_(state["ema"][name])
            self.optimizer.load_tensors(state["optimizer"])
            self.progress = Progress(**json.loads((checkpoints[-1] / "progress.json").read_text(encoding="utf-8")))
        _forget_after(self.folder / "log.jsonl", self.progress.step)

    def _schedule(self) -> float:
        """Linear warm-up by steps times a cosine to zero by progress."""
        warm = min(1., (self.progress.step + 1) / self.settings.warmup)
        return warm * .5 * (1 + math.cos(math.pi * self.share))

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now

    def _log(self, numbers: dict) -> None:
        line = {**asdict(self.progress), "lr": self._schedule(), **numbers}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({name: float(f"{value:.6g}") for name, value in line.items()}) + "\n")


def _checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first: a folder has its name only once it is complete."""
    return sorted(folder.glob("checkpoint-*"))


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again."""
    if log.exists():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True)
                 if line.endswith("\n") and json.loads(line)["step"] <= step]
        log.write_text("".join(lines), encoding="utf-8")


def _until(items: Iterable, over: Callable[[], bool]) -> Iterator:
    """Yield items until `over()`, asked before each one."""
    source = iter(items)
    while not over():
        yield next(source)


@contextmanager
def _stop_signals() -> Iterator[list]:
    """Turn Ctrl-C and SIGTERM into an entry of the list, so that a step is never cut in two."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: received.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what the three commands share ----------------------------------------------------------------------------------


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line of every training: preset, minutes, seed and folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--minutes", type=float, help="stop by the clock, all sessions of the run together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run found there goes on")
    parser.add_argument("--init", type=Path, help="published model to start from, with a fresh optimiser and warm-up")
    keep_freed_memory()
    return parser


def note_command(folder: Path, module: str, argv: list[str] | None) -> list[str]:
    """Add the command of this session to a run's folder; return those of all its sessions."""
    command = shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / COMMANDS).open("a", encoding="utf-8") as commands:
        commands.write(command + "\n")
    return (folder / COMMANDS).read_text(encoding="utf-8").splitlines()


def hardware() -> str:
    """The machine in a few words, for a model card."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"
