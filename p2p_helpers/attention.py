"""Attention control under stock pipelines: the only module that touches the UNet's insides.

Because the edited layer's output is A V_t, an edit (M, u, v) needs no map of pixels x tokens:

    A V_t = softmax(Q_s K_s^T) (M diag(u) V_t) + softmax(Q_t K_t^T) (diag(v) V_t)

which is fused attention on transformed values: one call where u or v is 0, one more for the targets where both act.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps

import torch
from diffusers.models.attention_processor import (Attention, AttnProcessor, AttnProcessor2_0, AttnProcessorNPU,
                                                  XFormersAttnProcessor)
from torch.nn.functional import scaled_dot_product_attention

from .blending import Blender, LocalBlend
from .edits import Edit, empty
from .prompts import Prompt
from .recording import PLACES, AttentionMaps, Layer, Record

__all__ = ["ControlledAttention", "Controller", "attention_layers", "control", "default_resolution"]

KNOWN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, AttnProcessorNPU, XFormersAttnProcessor)


def attention_layers(unet) -> list[Layer]:
    """The attention layers of a `UNet2DConditionModel` in the order of their calls: down, mid, up."""
    coarsest = len(unet.config.block_out_channels) - 1
    layers = []
    for name in unet.attn_processors:
        block, number, *_ = name.split(".")                     # "down_blocks", "0"; of the middle "mid_block", ...
        place = block.partition("_")[0]
        halvings = {"down": lambda: int(number), "mid": lambda: coarsest, "up": lambda: coarsest - int(number)}[place]()
        layers.append(Layer(name.removesuffix(".processor"), place, cross=".attn2." in name,
                            resolution=unet.config.sample_size // 2**halvings, scale=2**halvings))
    return sorted(layers, key=lambda layer: PLACES.index(layer.place))


def default_resolution(unet, *, self_attention: bool = False) -> int:
    """The finest layers whose self-attention is injected, or that are recorded and blended by.

    A quarter of the latents' own side, as Google's 16 of 64 in Stable Diffusion 1.x. Maps of up to 16 x 16 are always
    recorded; self-attention is injected in the coarsest layers at least.
    """
    known = [layer.resolution for layer in attention_layers(unet) if layer.cross != self_attention]
    limit = max(unet.config.sample_size // 4, min(known) if self_attention else 16)
    return max((resolution for resolution in known if resolution <= limit), default=min(known))


@contextmanager
def control(pipe, edits: Edit | Sequence[Edit] = (), *, prompts: Sequence[str] = (), record: Record | None = None,
            blend: LocalBlend | None = None, self_resolution: int | None = None,
            low_memory: bool = False) -> Iterator[Controller]:
    """Edit and record attention while a pipeline runs inside the block; afterwards the UNet is as it was.

    ::

        with control(pipe, swap(pipe, source, target)):
            images = pipe([source, target], latents=latents).images

    Parameters
    ----------
    pipe : StableDiffusionPipeline, its Img2Img, Inpaint and XL kin
        With any scheduler, image size and number format. The batch is the source's prompt, then the targets';
        give all the same latents.
    edits : Edit or several of one source
        See `edits`; none to record only.
    prompts : list of str
        The batch, where there is no edit.
    record : Record, optional
        Attention maps to collect, in `Controller.maps`.
    blend : LocalBlend, optional
        Applied after each step of the pipeline's scheduler; with `sampling.generate` pass
        ``callback=controller.callback`` as well.
    self_resolution : int, optional
        The finest layers whose self-attention is injected; see `default_resolution`. Resolutions are named as for
        images of the model's own size: in Stable Diffusion 1.x the layers of "16" have 24 x 24 pixels at 768 x 768.
    low_memory : bool
        Run the two halves of guidance one after the other. This wraps the UNet's forward inside the block.

    Raises
    ------
    ValueError
        If the edits have different sources, no prompt is given, or (while running) the batch does not fit.
    TypeError
        If a layer's attention is of a kind that is not known.
    RuntimeError
        If the UNet is under control already, or (while running) not every layer ran under it.
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    if len({edit.source.text for edit in edits}) > 1:
        raise ValueError(f"edits have different sources: {sorted({edit.source.text for edit in edits})}")
    if not edits and not prompts:
        raise ValueError("control needs edits, or the prompts of the batch to record")
    if not edits:
        edits = [empty(pipe, prompts[0], prompt) for prompt in prompts[1:]]
    source = edits[0].source if edits else empty(pipe, prompts[0]).source
    controller = Controller(pipe, source, edits, record, blend, self_resolution)
    with ExitStack() as undo:
        controller.install(undo, low_memory)
        yield controller
        controller.check_blended()


@dataclass(frozen=True)
class _Change:
    """What an edit does at one step, on the device and in the number format of the UNet."""

    injected: torch.Tensor | None       # M diag(u), (L source tokens, L target tokens); None where u is 0
    own: torch.Tensor | None            # v, (L,); None where v is 0
    own_is_plain: bool                  # v is 1
    injects_self: bool

    @classmethod
    def of(cls, edit: Edit, moment: float, like: torch.Tensor) -> _Change:
        u, v = edit.gains(moment)
        return cls((edit.alignment.matrix * u).to(like) if u.any() else None, v.to(like) if v.any() else None,
                   bool((v == 1).all()), edit.injects_self(moment))


@dataclass
class _Call:
    """What holds for one call of the UNet."""

    first: int | None               # the source's row in the batch; None: the unconditional half
    step: int
    size: tuple[int, int]           # of the latents
    changes: list[_Change]          # a target each
    passes: int = 1                 # through the UNet: two where the halves of guidance run one by one
    layers: int = 0                 # that have run


class _Clock:
    """Where a run is, learned from the timesteps that the UNet is given and the scheduler's own.

    So it does not matter how often a scheduler calls the UNet in a step, or whether img2img starts late.
    """

    def __init__(self, pipe):
        self.pipe = pipe
        self.timesteps: list[float] = []        # of this run, descending
        self.t: float | None = None             # the last one seen

    def tick(self, t: float) -> bool:
        """Note a timestep; one that rises starts a new run, which is what is returned."""
        starts = self.t is None or t > self.t
        if starts:
            scheduled = torch.as_tensor(self.pipe.scheduler.timesteps).float().unique().tolist()
            self.timesteps = sorted((s for s in scheduled if s <= t), reverse=True) or [t]
        self.t = t
        return starts

    @property
    def step(self) -> int:
        """Number of the step; a timestep between two scheduled ones belongs to the later."""
        return min(sum(s > self.t for s in self.timesteps), len(self.timesteps) - 1)

    @property
    def moment(self) -> float:
        """The middle of the step, as a part of the run."""
        return (self.step + .5) / len(self.timesteps)


class Controller:
    """The state of one `control` block: which step it is, and what each layer does with its batch."""

    def __init__(self, pipe, source: Prompt, edits: Sequence[Edit], record: Record | None, local: LocalBlend | None,
                 self_resolution: int | None):
        finest = default_resolution(pipe.unet)
        self.pipe, self.unet, self.edits = pipe, pipe.unet, edits
        self.prompts = (source, *(edit.target for edit in edits))
        self.layers = attention_layers(pipe.unet)
        self.self_resolution = self_resolution or default_resolution(pipe.unet, self_attention=True)
        self.record_resolution = (record and record.resolution) or finest
        self.maps = AttentionMaps(self.prompts, record) if record else None
        self.blender = Blender(local, self.prompts, finest) if local else None
        self._clock = _Clock(pipe)
        self._call: _Call | None = None
        self._check_resolutions()

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask (P, 1, h, w) of the last local blend."""
        return self.blender and self.blender.mask

    def _check_resolutions(self) -> None:
        have = sorted({layer.resolution for layer in self.layers if layer.cross})
        if self.blender and self.blender.selectors is not None and self.blender.resolution not in have:
            raise ValueError(f"LocalBlend resolution {self.blender.resolution}: no cross-attention layer has it; there "
                             f"are {have}")

    # ---- under the pipeline ----

    def install(self, undo: ExitStack, low_memory: bool) -> None:
        """Put processors and hooks in place; what undoes each goes on the stack."""
        before = dict(self.unet.attn_processors)
        _check_layers(self.unet, before)
        undo.callback(lambda: self.unet.set_attn_processor(dict(before)))
        self.unet.set_attn_processor({f"{layer.name}.processor": ControlledAttention(layer, self)
                                      for layer in self.layers})
        undo.callback(self.unet.register_forward_pre_hook(self._before_unet, with_kwargs=True).remove)
        undo.callback(self.unet.register_forward_hook(self._after_unet).remove)
        if low_memory:
            undo.enter_context(_replaced(self.unet, "forward", self._halves(self.unet.forward)))
        if self.blender:
            undo.enter_context(_replaced(self.pipe.scheduler, "step", self._blending(self.pipe.scheduler.step)))

    def _before_unet(self, unet, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if self._clock.tick(float(torch.as_tensor(timestep).float().flatten()[0])) and self.blender:
            self.blender.restart()
        count = len(self.prompts)
        if len(sample) not in (count, 2 * count):
            texts = [prompt.text for prompt in self.prompts]
            raise ValueError(f"the UNet is given a batch of {len(sample)} for {count} prompts {texts}; call the "
                             "pipeline with these prompts, in this order, one image each")
        changes = [_Change.of(edit, self._clock.moment, like=sample) for edit in self.edits]
        self._call = _Call(len(sample) - count, self._clock.step, tuple(sample.shape[-2:]), changes)
        if self._call.step == 0:
            _check_same_noise(sample[-count:], changes)

    def _after_unet(self, unet, args, output) -> None:
        ran, expected = self._call.layers, len(self.layers) * self._call.passes
        if ran != expected:
            raise RuntimeError(f"{ran} of {expected} attention layers ran under control: something replaced processors "
                               "or skips layers inside the block (attention slicing, xformers, a cache of features?)")

    def _halves(self, forward):
        def run(*args, **kwargs):
            batch = self._call.first + len(self.prompts)
            if batch == len(self.prompts):
                return forward(*args, **kwargs)
            outputs, self._call.passes = [], 2
            for half, first in enumerate((None, 0)):
                self._call.first = first
                outputs.append(forward(*_half_of(args, batch, half), **_half_of(kwargs, batch, half)))
            return _joined(*outputs)
        return run

    def _blending(self, step):
        @wraps(step)        # pipelines look at its signature for eta and generator
        def run(model_output, timestep, sample, *args, **kwargs):
            output = step(model_output, timestep, sample, *args, **kwargs)
            if isinstance(output, tuple):
                return (self.blend(output[0]), *output[1:])
            output.prev_sample = self.blend(output.prev_sample)
            return output
        return run

    def blend(self, latents: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
        """The local blend, if there is one, of the latents (P, C, H, W) that follow the UNet's last call.

        The source is row 0, or (1, C, H, W) at the same noise level, for instance from an inversion's trajectory.
        """
        return self.blender(latents, self._clock.moment, source) if self.blender else latents

    def callback(self, i: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """`blend` as a callback of `sampling.generate`."""
        return self.blend(latents)

    def check_blended(self) -> None:
        """Raise if a run is over in which a local blend was wanted and never made."""
        if self.blender and self._clock.t is not None and not self.blender.was_asked:
            raise RuntimeError("the local blend was never applied: with sampling.generate pass "
                               "callback=controller.callback")

    # ---- one layer ----

    def attend(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The layer's output for all heads (B, heads, pixels, d), edited; q, k and v belong to the caller no more."""
        self._call.layers += 1
        if self._call.first is None:
            return scaled_dot_product_attention(q, k, v)
        if self._records(layer):
            self._record(layer, q, k)
        edited = self._cross if layer.cross else self._self
        if layer.cross and self._blends_by(layer):
            self._add_word_maps(layer, edited(layer, q, k, self._selector_values(v)))
        return edited(layer, q, k, v)

    def _cross(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        source, both = self._call.first, {}
        for row, change in enumerate(self._call.changes, start=source + 1):
            injected = None if change.injected is None else change.injected @ v[row]            # (heads, L, d)
            if change.own is None:
                q[row], k[row], v[row] = q[source], k[source], injected
            elif not change.own_is_plain:
                v[row] *= change.own[:, None]
            if change.own is not None and injected is not None:
                both[row] = injected
        output = scaled_dot_product_attention(q, k, v)
        if both:
            from_source = (x[source].expand(len(both), -1, -1, -1) for x in (q, k))
            added = scaled_dot_product_attention(*from_source, torch.stack(list(both.values())))
            output = output.index_add(0, torch.tensor(list(both), device=output.device), added)
        return output

    def _self(self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        source = self._call.first
        for row, change in enumerate(self._call.changes, start=source + 1):
            if change.injects_self and layer.resolution <= self.self_resolution:
                q[row], k[row] = q[source], k[source]
        return scaled_dot_product_attention(q, k, v)

    def _records(self, layer: Layer) -> bool:
        if self.maps is None or layer.resolution > self.record_resolution:
            return False
        return self.maps.settings.cross if layer.cross else self.maps.settings.self_attention

    def _record(self, layer: Layer, q: torch.Tensor, k: torch.Tensor) -> None:
        rows = slice(self._call.first, None)
        scores = q[rows].float() @ k[rows].float().transpose(-1, -2) / math.sqrt(q.shape[-1])
        maps = scores.softmax(-1)                                       # (P, heads, pixels, tokens or pixels)
        if self.maps.settings.edited:
            maps = self._edited_maps(layer, maps)
        self.maps.add(layer, self._call.step, self._grid(layer, q.shape[2]), maps)

    def _edited_maps(self, layer: Layer, maps: torch.Tensor) -> torch.Tensor:
        """A of every prompt, (P, heads, pixels, tokens): the formula written out."""
        edited = [maps[0]]
        for own, change in zip(maps[1:], self._call.changes):
            if layer.cross:
                parts = [] if change.injected is None else [maps[0] @ change.injected.to(maps)]
                parts += [] if change.own is None else [own * change.own.to(maps)]
                edited.append(sum(parts))
            else:
                injects = change.injects_self and layer.resolution <= self.self_resolution
                edited.append(maps[0] if injects else own)
        return torch.stack(edited)

    def _blends_by(self, layer: Layer) -> bool:
        blender = self.blender
        return blender is not None and blender.selectors is not None and layer.resolution == blender.resolution

    def _selector_values(self, v: torch.Tensor) -> torch.Tensor:
        """Values (B, heads, L, d) whose first two columns pick the words to blend and to subtract."""
        values = torch.zeros_like(v)
        values[self._call.first:, :, :, :2] = self.blender.selectors.to(v)[:, None]      # (P, 1, L, 2)
        return values

    def _add_word_maps(self, layer: Layer, output: torch.Tensor) -> None:
        maps = output[self._call.first:, :, :, :2].float().mean(1)                              # (P, pixels, 2)
        maps = maps.transpose(1, 2).unflatten(-1, self._grid(layer, output.shape[2]))           # (P, 2, h, w)
        self.blender.add(maps)

    def _grid(self, layer: Layer, pixels: int) -> tuple[int, int]:
        """Height and width of a layer's map, from the latents' size."""
        height, width = (-(-side // layer.scale) for side in self._call.size)
        if height * width != pixels:
            raise RuntimeError(f"layer {layer.name} has {pixels} pixels, not {height} x {width}: this UNet does not "
                               "halve its maps from block to block")
        return height, width


class ControlledAttention:
    """The attention processor of one layer: stock attention, with a `Controller` in its middle."""

    def __init__(self, layer: Layer, controller: Controller):
        self.layer, self.controller = layer, controller

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                 attention_mask: torch.Tensor | None = None, temb: torch.Tensor | None = None) -> torch.Tensor:
        if attention_mask is not None:
            raise NotImplementedError("control does not take attention masks")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))     # (B, heads, pixels, d)
        output = self.controller.attend(self.layer, q, k, v)
        output = output.transpose(1, 2).flatten(2)                                          # (B, pixels, heads d)
        return attn.to_out[1](attn.to_out[0](output))


# ---- checks and small tools -----------------------------------------------------------------------------------------


def _check_layers(unet, processors: dict) -> None:
    """Raise where the UNet's attention is not plain transformer attention."""
    if not processors:
        raise ValueError(f"{type(unet).__name__} has no attention layer to control")
    if any(isinstance(processor, ControlledAttention) for processor in processors.values()):
        raise RuntimeError("this UNet is under control already: leave the first `with control(...)` block first")
    for name, processor in processors.items():
        attn = unet.get_submodule(name.removesuffix(".processor"))
        if type(processor) not in KNOWN_PROCESSORS:
            raise TypeError(f"layer {name} has a {type(processor).__name__}; control knows "
                            f"{', '.join(kind.__name__ for kind in KNOWN_PROCESSORS)} (call "
                            "pipe.disable_attention_slicing() and unload adapters first)")
        extras = [attn.group_norm, attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attn.added_kv_proj_dim,
                  attn.residual_connection, ".attn1." in name and attn.is_cross_attention]
        if any(extra is not None and extra is not False for extra in extras):
            raise TypeError(f"layer {name} is no plain attention as in Stable Diffusion: it normalises, adds keys, or "
                            "its self-attention looks at the prompt")


def _check_same_noise(samples: torch.Tensor, changes: Sequence[_Change]) -> None:
    editing = any(change.injects_self or change.injected is not None for change in changes)
    if editing and not torch.equal(samples, samples[:1].expand_as(samples)):
        warnings.warn("the prompts of this edit start from different noise: give all the same latents, for example "
                      "latents=initial_latents(pipe, [seed] * len(prompts))", stacklevel=3)


@contextmanager
def _replaced(owner, name: str, value) -> Iterator[None]:
    """Set an attribute of one object, and put back what it had of its own."""
    missing = object()
    before = owner.__dict__.get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _half_of(value, batch: int, half: int):
    """One half of every tensor with the batch's length, inside tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return value.chunk(2)[half] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _half_of(entry, batch, half) for name, entry in value.items()}
    return tuple(_half_of(entry, batch, half) for entry in value) if isinstance(value, tuple) else value


def _joined(first, second):
    """The outputs of the two halves as one."""
    if isinstance(first, tuple):
        return (torch.cat([first[0], second[0]]), *first[1:])
    return type(first)(sample=torch.cat([first.sample, second.sample]))
