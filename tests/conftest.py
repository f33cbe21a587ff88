"""Fixtures shared by the tests: a small random pipeline of the real classes, built offline."""
from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")       # small models lose more by waiting than threads save

import pytest

PROMPT_LENGTH = 32
# words that are one token each; any other word is made of several
WORDS = """a an the and of on in at with to is next big small two three cat dog horse car house castle tree
    cake ball balloon bowl apples red blue green yellow white black grass beach snow sea road table city
    forest night sunset fog rain photo drawing sketch watercolor river""".split()


def write_tokenizer(folder: Path) -> None:
    """Write the vocabulary and merges of a byte-level BPE in CLIP's format."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = alphabet + [symbol + "</w>" for symbol in alphabet]
    merges = []
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in WORDS}
    while any(len(pieces) > 1 for pieces in split.values()):
        pair = next(tuple(pieces[:2]) for pieces in split.values() if len(pieces) > 1)
        merges.append(" ".join(pair))
        vocabulary.append("".join(pair))
        split = {word: merge(pieces, pair) for word, pieces in split.items()}
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": PROMPT_LENGTH,
                "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair of neighbours."""
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_tiny_pipe(tokenizer_folder: Path):
    """A random StableDiffusionPipeline: 128-pixel images, 4x16x16 latents, attention at 16x16 and 8x8."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=PROMPT_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=4)
    vae = AutoencoderKL(
        sample_size=128, latent_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny pipeline saved in the legacy layout (fp16, checksums)."""
    from p2p_helpers.models import save_legacy

    root = tmp_path_factory.mktemp("models")
    write_tokenizer(root / "tokenizer")
    return save_legacy(build_tiny_pipe(root / "tokenizer"), root / "tiny")


@pytest.fixture(scope="session")
def tiny_pipe(tiny_folder):
    """The tiny pipeline as `load` reads it: on the CPU in float32."""
    import torch

    from p2p_helpers.models import load
    from p2p_helpers.runtime import Runtime

    return load(tiny_folder, runtime=Runtime("cpu", torch.float32, "local", 0))


@pytest.fixture(scope="session")
def sticker_pipe():
    """The bundled model: attention at 16x16 and 8x8."""
    import torch

    from p2p_helpers.models import load
    from p2p_helpers.runtime import Runtime

    return load("sticker-world", runtime=Runtime("cpu", torch.float32, "local", 0))


def sharpen(unet):
    """Strengthen a random UNet's attention, whose maps are nearly uniform and of little effect as initialised."""
    for name, layer in unet.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v")):
            layer.weight.data.mul_(2.5)
    return unet


@pytest.fixture(scope="session")
def sd_pipe(tiny_pipe):
    """A random UNet built like Stable Diffusion 1.x: attention at 16x16, 8x8 and 4x4, in the middle at 2x2."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=32, attention_head_dim=2)
    parts = {**tiny_pipe.components, "unet": sharpen(unet.eval()),
             "scheduler": DDIMScheduler.from_config(tiny_pipe.scheduler.config)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def xl_pipe(tiny_pipe):
    """A random pipeline built like Stable Diffusion XL: attention at 8x8, twice, and at 4x4, three times a block."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(2)
    settings = tiny_pipe.text_encoder.config.to_dict() | {"projection_dim": 32}
    second = CLIPTextModelWithProjection(type(tiny_pipe.text_encoder.config)(**settings)).eval()
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3), attention_head_dim=(1, 2, 2), use_linear_projection=True,
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32)
    pipe = StableDiffusionXLPipeline(
        vae=tiny_pipe.vae, text_encoder=tiny_pipe.text_encoder, text_encoder_2=second, unet=sharpen(unet.eval()),
        tokenizer=tiny_pipe.tokenizer, tokenizer_2=tiny_pipe.tokenizer, add_watermarker=False,
        scheduler=DDIMScheduler.from_config(tiny_pipe.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe
