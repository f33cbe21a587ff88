"""The training loop survives kills, the optimiser is Muon, the tokenizer is CLIP's, and tiny trainings learn."""
from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
if not hasattr(torch.optim, "Muon"):
    pytest.skip("training needs torch >= 2.9", allow_module_level=True)

from p2p_helpers.models import load, verify_checksums
from p2p_helpers.stickers import agreement, caption, sample_scene, world
from p2p_helpers.stickers.oracle import load_oracle
from p2p_helpers.training import autoencoder, data, loop, oracle, presets, publish, text_to_image
from p2p_helpers.training.muon import MuonAdamW, split_parameters
from p2p_helpers.training.tokenizer import learn_tokenizer
from torch import nn

LOOP = presets.LoopSettings(steps=8, muon_lr=.02, adamw_lr=1e-2, warmup=2, ema_decay=.9, save_minutes=60.)
WORLD = world("cpu")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))


def noisy_loss(model, batch, share):
    """Depends on the batch and on torch's random numbers, as a diffusion loss does."""
    return (model(batch["x"]) - torch.randn_like(batch["x"])).square().mean(), {}


def batches(first_step):
    return data.stream(lambda rng: {"x": rng.standard_normal((4, 3, 8, 8), dtype=np.float32)}, first_step, seed=1)


def run(folder, loss_fn=noisy_loss, settings=LOOP, **options):
    model = small_model()
    progress = loop.train(model, batches, loss_fn, settings, folder, edges=("0", "2"), **options)
    return model, progress


class Killed(Exception):
    pass


def at_step(number, action):
    """The loss above that does something first, the given time that it is called."""
    calls = iter(range(10_000))

    def loss(*args):
        if next(calls) == number:
            action()
        return noisy_loss(*args)
    return loss


def kill():
    raise Killed


def saved(folder, name):
    [checkpoint] = folder.glob("checkpoint-*")
    return loop.load_file(checkpoint / f"{name}.safetensors")


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_killed_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    whole, _ = run(tmp_path / "whole")
    _, progress = run(tmp_path / "cut", at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert progress.step == 3                               # the step in progress is finished, then saved
    with pytest.raises(Killed):
        run(tmp_path / "cut", at_step(2, kill))             # two more steps that no checkpoint holds
    resumed, progress = run(tmp_path / "cut")
    assert (progress.step, progress.samples) == (8, 32)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for part in ("ema", "optimizer"):
        for name, tensor in saved(tmp_path / "whole", part).items():
            assert torch.equal(tensor, saved(tmp_path / "cut", part)[name]), (part, name)


def test_a_save_that_is_cut_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = saved(tmp_path, "model")
    save_file = loop.save_file
    monkeypatch.setattr(loop, "save_file", lambda state, path: kill() if path.stem == "ema" else save_file(state, path))
    with pytest.raises(Killed):
        run(tmp_path)
    after = saved(tmp_path, "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.undo()
    assert run(tmp_path)[1].step == 8


def test_what_a_killed_save_leaves_behind_is_removed(tmp_path):
    (tmp_path / ".checkpoint-00000005-x" / "new").mkdir(parents=True)
    run(tmp_path)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-00000008"]


def test_log_holds_each_step_once_and_loses_the_lines_of_steps_done_again(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"step": 25, "loss": 1}\n{"step": 50, "lo')
    loop._forget_after(log, 25)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 25]


def test_schedule_ends_with_the_minutes_when_they_end_first():
    assert loop.Progress(step=10, seconds=45.).share(steps=100, minutes=1) == .75
    assert loop.Progress(step=90, seconds=45.).share(steps=100, minutes=1) == .9
    assert loop.Progress(step=10, seconds=45.).share(steps=100, minutes=None) == .1
    assert loop.Progress(step=10, seconds=120.).share(steps=100, minutes=1) == 1


def test_a_run_stops_by_the_clock(tmp_path):
    _, progress = run(tmp_path, settings=dataclasses.replace(LOOP, steps=10**6), minutes=.5 / 60)
    assert 0 < progress.step < 10**6 and progress.seconds >= .5


def test_ema_follows_its_formula_and_gives_the_weights_back():
    model = small_model()
    start = model[1].weight.detach().clone()
    ema = loop.Ema(model, decay=.5)
    with torch.no_grad():
        model[1].weight.add_(1.)
    ema.update(0)                                           # warm-up: decay 1/10
    torch.testing.assert_close(ema.average["1.weight"], .1 * start + .9 * (start + 1))
    with ema.applied():
        assert torch.equal(model[1].weight, ema.average["1.weight"])
    assert torch.equal(model[1].weight, start + 1)


# ---- the optimiser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kernels_move_as_torch_muon_moves_the_reshaped_matrix(memory_format):
    model = small_model().to(memory_format=memory_format)
    kernel, edge = model[1].weight, model[0].weight
    matrix = nn.Parameter(kernel.detach().clone().reshape(8, 72))       # (out, in*kh*kw)
    reference = torch.optim.Muon([matrix], lr=.02, weight_decay=0.)
    optimizer = MuonAdamW(model, .02, 1e-3, edges=("0", "2"))
    start, edge_start = kernel.detach().clone(), edge.detach().clone()
    for seed in range(3):
        torch.manual_seed(seed)
        kernel.grad, edge.grad = torch.randn(8, 8, 3, 3), torch.ones_like(edge)
        matrix.grad = kernel.grad.reshape(8, 72)
        optimizer.step()
        reference.step()
    moved = kernel.detach().reshape(8, 72)
    assert (kernel - start).abs().max() > 1e-3
    tolerance = 0. if memory_format == torch.contiguous_format else 2e-3    # sums in bfloat16, in another order
    torch.testing.assert_close(moved, matrix.detach(), rtol=0, atol=tolerance)
    assert (edge_start - edge - 3e-3).abs().max() < 1e-5                # AdamW: lr times the sign of the gradient
    assert kernel.grad is None and edge.grad is None


def test_embeddings_norms_biases_and_edges_are_not_muons():
    model = text_to_image.build(TINY.text_to_image, 40)
    hidden, others = split_parameters(model, text_to_image.EDGES)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {id(parameter) for parameter in hidden + others} == set(names)
    assert all(parameter.ndim in (2, 4) for parameter in hidden)
    others = {names[id(parameter)] for parameter in others}
    assert {"unet.conv_in.weight", "unet.conv_out.weight", "unet.time_embedding.linear_1.bias"} <= others
    assert any("token_embedding" in name for name in others) and any("norm" in name for name in others)
    assert not any("to_q" in name or "resnets.0.conv1.weight" in name for name in others)


# ---- the tokenizer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    return learn_tokenizer([caption(sample_scene(rng, world("gpu")), rng) for _ in range(3000)])


def test_tokenizer_has_clips_conventions(tokenizer):
    ids = tokenizer("A Photo of a CAT", padding="max_length").input_ids
    end = len(tokenizer) - 1
    assert ids == tokenizer("a photo of a cat", padding="max_length").input_ids
    assert len(ids) == 32 and ids[0] == end - 1 and ids[6:] == [end] * 26 and end not in ids[:6]
    assert tokenizer.convert_ids_to_tokens(ids[:7]) == [
        "<|startoftext|>", "a</w>", "photo</w>", "of</w>", "a</w>", "cat</w>", "<|endoftext|>"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == end
    assert sorted(tokenizer.get_vocab().values()) == list(range(end + 1))


@pytest.mark.parametrize("word", ["strawberries", "motorcycle", "watercolor", "mountains", "children's"])
def test_long_words_are_two_or_three_tokens(tokenizer, word):
    assert 2 <= len(tokenizer.tokenize(word)) <= 3


def test_unknown_words_are_spelled_and_come_back(tokenizer):
    ids = tokenizer("quetzalcoatl, 7 Ω").input_ids
    assert ids.count(tokenizer.unk_token_id) == 1           # the end mark alone
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "quetzalcoatl,7ω"


# ---- data -----------------------------------------------------------------------------------------------------------


def test_a_step_has_its_batch_wherever_the_stream_starts():
    steps = [batch for batch, _ in zip(batches(0), range(4))]
    later = next(iter(batches(3)))
    assert torch.equal(steps[3]["x"], later["x"]) and not torch.equal(steps[2]["x"], later["x"])


def test_latents_are_encoded_once_for_the_same_weights_and_seed(tmp_path, monkeypatch):
    vae = autoencoder.build(TINY.autoencoder).eval()
    first = np.array(data.cached_latents(vae, WORLD, 3, tmp_path))
    picture = data.to_pictures(torch.from_numpy(data.render(data.scene_at(2, WORLD, 0)).image)[None])
    means = [vae.encode(picture).latent_dist.mean.detach() for picture in (picture, picture.flip(-1))]
    errors = [(torch.from_numpy(first[2:]).float() - mean).abs().mean() / mean.std() for mean in means]
    assert errors[0] < .05 < errors[1], errors                # bfloat16's rounding against another picture
    monkeypatch.setattr(data, "_encode", lambda *args: kill())
    assert np.array_equal(data.cached_latents(vae, WORLD, 3, tmp_path), first)
    with pytest.raises(Killed):
        data.cached_latents(vae, WORLD, 3, tmp_path, seed=1)
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    with pytest.raises(Killed):
        data.cached_latents(vae, WORLD, 3, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1               # a cut encoding leaves nothing


def test_latents_come_with_the_caption_of_their_scene(tokenizer):
    latents = np.arange(5, dtype=np.float16).reshape(5, 1, 1, 1) * np.ones((1, 4, 2, 2), np.float16)
    batch = data.Captioned(latents, WORLD, tokenizer, 64, .25)(np.random.default_rng(0))
    texts = tokenizer.batch_decode(batch["ids"], skip_special_tokens=True)
    empty = 0
    for latent, text in zip(batch["latents"][:, 0, 0, 0], texts):
        scene = data.scene_at(int(latent), WORLD, 0)
        empty += not text
        noun = scene.things[0].kind.split()[-1].rstrip("s")
        assert not text or noun in text.replace(" ", "") or scene.things[0].count > 1, (text, scene)
    assert 4 < empty < 30


# ---- the trainings --------------------------------------------------------------------------------------------------

TINY = presets.Preset(
    presets.AutoencoderSettings("cpu", dataclasses.replace(LOOP, steps=2), widths=(8, 8, 8, 8), batch_size=2,
                                pictures=2),
    presets.TextToImageSettings("cpu", dataclasses.replace(LOOP, steps=2), scenes=4, widths=(32, 32), batch_size=4,
                                head_size=16, captions=300, text_width=32, text_layers=1, text_heads=2),
    presets.OracleSettings("cpu", dataclasses.replace(LOOP, steps=2), batch_size=2))


def losses(model, batch, loss_fn, steps, edges):
    torch.manual_seed(0)
    optimizer = MuonAdamW(model, .02, 3e-3, edges)
    values = []
    for _ in range(steps):
        value, _ = loss_fn(model, batch, 0.)
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


def test_autoencoder_learns_a_batch():
    torch.manual_seed(0)
    batch = {name: torch.from_numpy(value) for name, value in data.Pictures(WORLD, 4)(np.random.default_rng(0)).items()}
    values = losses(autoencoder.build(TINY.autoencoder), batch, partial(autoencoder.loss, TINY.autoencoder), 25,
                    autoencoder.EDGES)
    assert np.mean(values[-5:]) < .85 * np.mean(values[:3]), values


def test_text_to_image_learns_a_batch():
    torch.manual_seed(0)
    batch = {"latents": torch.randn(1, 4, 16, 16).repeat(8, 1, 1, 1), "ids": torch.randint(40, (8, 32))}
    values = losses(text_to_image.build(TINY.text_to_image, 40), batch,
                    partial(text_to_image.loss, TINY.text_to_image, text_to_image.scheduler()), 20, text_to_image.EDGES)
    assert np.mean(values[-5:]) < .6 * np.mean(values[:3]), values


def test_min_snr_weights_the_error_of_each_timestep(monkeypatch):
    noises = text_to_image.scheduler()
    batch = {"latents": torch.zeros(2, 4, 2, 2), "ids": None}
    monkeypatch.setattr(torch, "randint", lambda *args, **options: torch.tensor([0, 900]))
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    value, logs = text_to_image.loss(TINY.text_to_image, noises, lambda x, t, ids: torch.zeros_like(x), batch, 0.)
    alpha = noises.alphas_cumprod[0].item()
    weight = 5 / (alpha / (1 - alpha))                      # high SNR: gamma / SNR; low SNR: 1
    assert value.item() == pytest.approx((weight + 1) / 2, rel=1e-4) and logs["error"] == 1


def test_reconstruction_loss_sees_colour_before_brightness():
    target = torch.zeros(1, 3, 32, 32)
    gray, red = target + .2, target.clone()
    red[:, 0] = .2 * math.sqrt(3)                           # the same squared error, in one channel
    assert autoencoder.reconstruction_loss(target, target) == 0
    more = autoencoder.reconstruction_loss(red, target) - autoencoder.reconstruction_loss(gray, target)
    assert more > .2                                        # of the absolute error, which is .2 for gray


def test_commands_make_a_pipeline_and_go_on_from_it(tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "cpu", TINY)
    monkeypatch.setattr(text_to_image, "SHEET", ("a cat",) * 8)
    monkeypatch.setattr(autoencoder, "HELD_OUT", 2)
    monkeypatch.setattr(oracle, "HELD_OUT", 2)
    autoencoder.main(["--out", str(tmp_path / "ae")])
    text_to_image.main(["--autoencoder", str(tmp_path / "ae"), "--out", str(tmp_path / "t2i")])
    model = tmp_path / "t2i" / "model"
    verify_checksums(model)
    card = json.loads((model / text_to_image.CARD).read_text())
    assert (card["samples_seen"], card["preset"], card["seed"]) == (8, "cpu", 0)
    last = json.loads((tmp_path / "ae" / "log.jsonl").read_text().splitlines()[-1])
    config = json.loads((tmp_path / "ae" / "vae" / "config.json").read_text())
    assert last["step"] == 2 and config["scaling_factor"] == pytest.approx(last["scaling_factor"], rel=1e-4)
    text_to_image.main(["--init", str(model), "--out", str(tmp_path / "more"), "--seed", "1"])
    more = json.loads((tmp_path / "more" / "model" / text_to_image.CARD).read_text())
    assert more["samples_seen"] == 16 and more["commands"][0] == card["commands"][0] and len(more["commands"]) == 2
    assert len(list((tmp_path / "more").glob("sheet-*.png"))) == 1
    monkeypatch.setattr(publish, "data_dir", lambda: tmp_path / "data")
    oracle.main(["--out", str(tmp_path / "oracle"), "--autoencoder", str(tmp_path / "ae")])
    publish.main(["--text-to-image", str(tmp_path / "t2i"), "--autoencoder", str(tmp_path / "ae"),
                  "--oracle", str(tmp_path / "oracle")])
    published = tmp_path / "data" / "models" / "sticker-world"
    verify_checksums(published)
    card = json.loads((published / text_to_image.CARD).read_text())
    assert card["autoencoder"]["samples_seen"] == 4 and "training.autoencoder" in card["autoencoder"]["commands"][0]
    assert "training.text_to_image" in (published / "README.md").read_text()
    assert agreement.knows(load(str(published)))
    load_oracle(str(tmp_path / "data" / "models" / "oracle"))
    oracle.main(["--out", str(tmp_path / "longer"), "--init", str(tmp_path / "data" / "models" / "oracle")])
    publish.main(["--oracle", str(tmp_path / "longer")])
    card = json.loads((tmp_path / "data" / "models" / "oracle" / text_to_image.CARD).read_text())
    assert card["samples_seen"] == 8 and len(card["commands"]) == 2
    check_publishing_of_an_autoencoder_alone(tmp_path, published)


def check_publishing_of_an_autoencoder_alone(tmp_path, published):
    """It takes its place and nothing else changes, if its latents are those that the UNet knows."""
    before = {part: weights(published / part) for part in ("unet", "vae")}
    autoencoder.main(["--init", str(published), "--decoder-only", "--seed", "3", "--out", str(tmp_path / "decoder")])
    publish.main(["--autoencoder", str(tmp_path / "decoder")])
    verify_checksums(published)
    assert weights(published / "unet") == before["unet"] and weights(published / "vae") != before["vae"]
    card = json.loads((published / text_to_image.CARD).read_text())
    assert card["autoencoder"]["samples_seen"] == 8
    autoencoder.main(["--out", str(tmp_path / "stranger"), "--seed", "4"])
    with pytest.raises(ValueError, match="encoder of 'stranger' is not the published one"):
        publish.main(["--autoencoder", str(tmp_path / "stranger")])


def weights(folder) -> bytes:
    return (folder / "diffusion_pytorch_model.safetensors").read_bytes()


def test_decoder_only_keeps_the_latents(tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "cpu", TINY)
    monkeypatch.setattr(autoencoder, "HELD_OUT", 2)
    autoencoder.main(["--out", str(tmp_path / "ae")])
    autoencoder.main(["--init", str(tmp_path / "ae"), "--decoder-only", "--out", str(tmp_path / "more")])
    before, after = (loop.load_file(tmp_path / run / "vae" / "diffusion_pytorch_model.safetensors") for run in ("ae", "more"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_no_start_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        text_to_image.main(["--out", str(tmp_path)])
    assert "--autoencoder is needed" in capsys.readouterr().err


def test_bundled_pipeline_fits_its_budget():
    settings = presets.PRESETS["cpu"]
    with torch.device("meta"):
        parts = [autoencoder.build(settings.autoencoder), text_to_image.build(settings.text_to_image, 987)]
    assert sum(parameter.numel() for part in parts for parameter in part.parameters()) <= 18_000_000
