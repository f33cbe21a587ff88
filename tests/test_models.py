import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from p2p_helpers import models
from p2p_helpers.models import (CHECKPOINTS, check_prompt, check_size, image_size, load, prompt_length,
                                save_legacy, verify_checksums, write_checksums)
from p2p_helpers.runtime import Runtime

CPU = Runtime("cpu", torch.float32, "local", 0)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("P2P_MODEL", "P2P_SOURCE", "P2P_DEVICE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture
def bundle(copy, tmp_path, monkeypatch):
    """The tiny model in the place of the bundled one."""
    (tmp_path / "data" / "models").mkdir(parents=True)
    copy.rename(tmp_path / "data" / "models" / "sticker-world")
    monkeypatch.setattr(models, "data_dir", lambda: tmp_path / "data")
    return tmp_path / "data" / "models" / "sticker-world"


def test_table_rows_are_consistent():
    for name, row in CHECKPOINTS.items():
        assert name == row.name and row.task in models.PIPELINES and row.size % 8 == 0
        assert row.bundled or row.repo.count("/") == 1
    assert CHECKPOINTS["sticker-world"].bundled


def test_default_is_the_bundled_model_then_p2p_model(bundle, tiny_folder, monkeypatch):
    assert load(runtime=CPU).config._name_or_path == str(bundle)
    monkeypatch.setenv("P2P_MODEL", str(tiny_folder))
    assert load(runtime=CPU).config._name_or_path == str(tiny_folder)


def test_loaded_pipeline_is_ready_for_editing(tiny_folder):
    pipe = load(tiny_folder, runtime=CPU)
    config = pipe.scheduler.config
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert config.beta_schedule == "scaled_linear" and config.prediction_type == "epsilon"
    assert pipe.safety_checker is None and pipe.config.requires_safety_checker is False
    assert not pipe.unet.training and pipe._progress_bar_config == {"disable": True}


def test_another_scheduler_becomes_ddim_and_keeps_its_schedule(copy):
    settings = {"_class_name": "PNDMScheduler", "beta_start": 0.001, "beta_end": 0.02,
                "beta_schedule": "linear", "prediction_type": "v_prediction", "skip_prk_steps": True,
                "steps_offset": 1, "set_alpha_to_one": True}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    write_checksums(copy)
    config = load(copy, runtime=CPU).scheduler.config
    assert config.beta_end == 0.02 and config.prediction_type == "v_prediction"
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for(tiny_folder, dtype):
    pipe = load(tiny_folder, runtime=Runtime("cpu", dtype, "local", 0))
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {dtype}


def test_a_dtype_that_diffusers_ignores_is_noticed(tiny_folder, monkeypatch):
    import diffusers

    monkeypatch.setattr(models, "_pipeline_class", lambda task: types.SimpleNamespace(
        from_pretrained=lambda folder, **kw: diffusers.StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, requires_safety_checker=False)))
    with pytest.raises(RuntimeError, match="ignored (torch_)?dtype=torch.bfloat16"):
        load(tiny_folder, runtime=Runtime("cpu", torch.bfloat16, "local", 0))


@pytest.mark.parametrize("version, keyword", [
    ("0.39.0", "torch_dtype"), ("0.40.0", "dtype"), ("0.42.1", "dtype")])
def test_dtype_keyword_follows_the_version(tiny_folder, monkeypatch, version, keyword):
    import diffusers

    seen = {}
    pipe = types.SimpleNamespace(unet=types.SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr(diffusers, "__version__", version)
    monkeypatch.setattr(models, "_pipeline_class", lambda task: types.SimpleNamespace(
        from_pretrained=lambda folder, **kw: seen.update(kw) or pipe))
    models._read(tiny_folder, "text-to-image", CPU)
    assert seen[keyword] == torch.float32 and not {"dtype", "torch_dtype"} - {keyword} & seen.keys()
    assert seen["use_safetensors"] and seen["local_files_only"]


def test_loading_prints_nothing(tiny_folder, capfd):
    load(tiny_folder, runtime=CPU)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_tasks(tiny_folder):
    pipe = load(tiny_folder, runtime=CPU, task="inpainting")
    assert type(pipe).__name__ == "StableDiffusionInpaintPipeline"
    with pytest.raises(ValueError, match="cannot do task 'instruct': its UNet takes 4 .* it can do text"):
        load(tiny_folder, runtime=CPU, task="instruct")
    with pytest.raises(ValueError, match="did you mean 'inpainting'"):
        load(tiny_folder, runtime=CPU, task="inpaint")


def test_a_folder_tells_its_task(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionInpaintPipeline"
    (copy / "model_index.json").write_text(json.dumps(index))
    write_checksums(copy)
    assert type(load(copy, runtime=CPU)).__name__ == "StableDiffusionInpaintPipeline"


def test_low_memory_slices_the_vae_and_leaves_attention_alone(tiny_folder):
    plain, low = load(tiny_folder, runtime=CPU), load(tiny_folder, runtime=CPU, low_memory=True)
    assert low.vae.use_slicing and not plain.vae.use_slicing
    kinds = [{type(p) for p in pipe.unet.attn_processors.values()} for pipe in (plain, low)]
    assert kinds[0] == kinds[1]


def test_low_memory_on_cuda_offloads_instead_of_moving():
    calls = []
    pipe = types.SimpleNamespace(vae=types.SimpleNamespace(enable_slicing=lambda: calls.append("slicing")),
                                 enable_model_cpu_offload=lambda device: calls.append(device),
                                 to=lambda device: calls.append("moved"))
    models._place(pipe, "cuda:1", low_memory=True)
    assert calls == ["slicing", "cuda:1"]


@pytest.mark.parametrize("name, message", [
    ("sticker-wrld", "did you mean 'sticker-world'.*known: sticker-world, sd14"),
    ("no/such/folder", "neither a known name nor a folder"), ("", "sticker-world")])
def test_unknown_name(name, message, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "data_dir", lambda: tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(name, runtime=CPU)


def test_folder_without_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        load(tmp_path, runtime=CPU)


# ---- damaged weights ----

UNET = "unet/diffusion_pytorch_model.safetensors"


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def tamper(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage, error", [(truncate, ValueError), (tamper, ValueError),
                                           (Path.unlink, FileNotFoundError)])
@pytest.mark.parametrize("name", [UNET, "tokenizer/merges.txt"])
def test_damaged_bundled_files_are_named(bundle, damage, error, name):
    damage(bundle / name)
    with pytest.raises(error, match=name):
        load(runtime=CPU)


def test_damaged_folder_without_checksums(copy):
    (copy / "checksums.json").unlink()
    load(copy, runtime=CPU)
    truncate(copy / UNET)
    with pytest.raises(ValueError, match=f"{UNET} is damaged or cut short"):
        load(copy, runtime=CPU)
    (copy / UNET).unlink()
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors.*unet"):
        load(copy, runtime=CPU)


def test_pickled_weights_are_never_read(copy):
    (copy / "checksums.json").unlink()
    weights = load_file(copy / UNET)
    (copy / UNET).unlink()
    torch.save(weights, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(copy, runtime=CPU)


def test_checksums_cover_every_file(copy):
    (copy / "extra.txt").write_text("x")
    table = json.loads(write_checksums(copy).read_text())
    files = {f.relative_to(copy).as_posix() for f in copy.rglob("*") if f.is_file()}
    assert set(table) == files - {"checksums.json"}
    assert table["extra.txt"] == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    verify_checksums(copy)


# ---- the hub and its mirrors ----

def test_unreachable_hub_tells_three_ways_out():
    with pytest.raises(ConnectionError, match="(?s)v1-5.*sticker-world.*HF_ENDPOINT.*path/to/folder"):
        load("sd15", runtime=CPU)      # tests/conftest.py sets HF_HUB_OFFLINE


def test_hf_endpoint_is_asked(tmp_path):
    seen = []

    class Mirror(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", "from p2p_helpers.models import load; load('owner/name')"],
                         env=environment, cwd=Path(models.__file__).parents[1], capture_output=True,
                         text=True)
    server.shutdown()
    assert "/api/models/owner/name" in seen
    assert run.returncode == 1 and f"cannot download 'owner/name' from {endpoint}" in run.stderr


def test_modelscope(tiny_folder, monkeypatch):
    monkeypatch.setenv("P2P_SOURCE", "modelscope")
    asked = []
    fake = types.ModuleType("modelscope")
    fake.snapshot_download = lambda name: asked.append(name) or str(tiny_folder)
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    load("sd15", runtime=CPU)
    load("owner/name", runtime=CPU)
    assert asked == ["AI-ModelScope/stable-diffusion-v1-5", "owner/name"]
    with pytest.raises(ValueError, match="no ModelScope id is known for 'sd14' .only for: sd15"):
        load("sd14", runtime=CPU)

    def fail(name):
        raise OSError("no route")
    fake.snapshot_download = fail
    with pytest.raises(ConnectionError, match="(?s)from ModelScope .OSError: no route.*sticker-world"):
        load("sd15", runtime=CPU)


def test_modelscope_missing_and_unknown_source(monkeypatch):
    monkeypatch.setenv("P2P_SOURCE", "modelscope")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ImportError, match="pip install modelscope"):
        load("sd15", runtime=CPU)
    monkeypatch.setenv("P2P_SOURCE", "modelscop")
    with pytest.raises(ValueError, match="did you mean 'modelscope'"):
        load("sd15", runtime=CPU)


# ---- saving ----

def test_legacy_layout(tiny_folder):
    names = load_file(tiny_folder / "text_encoder" / "model.safetensors")
    assert names and all(name.startswith("text_model.") for name in names)
    for file in tiny_folder.rglob("*.safetensors"):
        dtypes = {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()}
        assert dtypes == {torch.float16}
    tokenizer = {file.name for file in (tiny_folder / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= tokenizer
    verify_checksums(tiny_folder)
    for file in tiny_folder.rglob("*.json"):
        assert str(tiny_folder.parent) not in file.read_text() and "name_or_path" not in file.read_text()


def test_old_tokenizer_files_say_the_same(tiny_pipe, tiny_folder, tmp_path):
    """Without tokenizer.json, as transformers 4 reads it."""
    from transformers import CLIPTokenizer

    old = Path(shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tokenizer"))
    (old / "tokenizer.json").unlink()
    text = "a cat on the beach and strawberries"
    assert CLIPTokenizer.from_pretrained(old)(text).input_ids == tiny_pipe.tokenizer(text).input_ids


def test_saving_again_changes_nothing(tiny_pipe, tiny_folder, tmp_path):
    before = {k: v.clone() for k, v in tiny_pipe.text_encoder.state_dict().items()}
    again = save_legacy(tiny_pipe, tmp_path / "again")
    assert tiny_pipe.unet.dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in tiny_pipe.text_encoder.state_dict().items())
    assert not any(str(tiny_folder) in file.read_text() for file in again.rglob("*.json"))
    old, new = (json.loads((folder / "checksums.json").read_text()) for folder in (tiny_folder, again))
    weights = [name for name in old if name.endswith("safetensors")]
    assert len(weights) == 3 and all(old[name] == new[name] for name in weights)


def test_failed_saving_keeps_the_old_model(tiny_pipe, copy, monkeypatch):
    def fail(folder):
        raise OSError("disk full")
    monkeypatch.setattr(models, "write_checksums", fail)
    with pytest.raises(OSError, match="disk full"):
        save_legacy(tiny_pipe, copy)
    verify_checksums(copy)
    assert [f.name for f in copy.parent.iterdir()] == ["copy"]


# ---- what a model accepts ----

def test_lengths_and_sizes(tiny_pipe):
    assert prompt_length(tiny_pipe) == 32 and image_size(tiny_pipe) == 128
    assert check_size(tiny_pipe) == (128, 128) and check_size(tiny_pipe, 96) == (96, 128)


@pytest.mark.parametrize("height, width, message", [
    (100, 128, "height 100 is not a multiple of 8.*take 96 or 104"), (128, 4, "width 4 .*take 8 or 16"),
    (-8, 128, "height -8"), (0, 128, "height 0")])
def test_wrong_size(tiny_pipe, height, width, message):
    with pytest.raises(ValueError, match=message):
        check_size(tiny_pipe, height, width)


def test_prompt_too_long_tells_the_words_that_are_cut(tiny_pipe):
    check_prompt(tiny_pipe, " ".join(["cat"] * 30))
    with pytest.raises(ValueError, match="has 33 tokens and the model reads 30; .* be cut: 'a red dog'"):
        check_prompt(tiny_pipe, " ".join(["cat"] * 30) + " a red dog")
    # "zebra" is five tokens here: the word that does not fit whole is cut whole
    with pytest.raises(ValueError, match="would be cut: 'zebra dog'"):
        check_prompt(tiny_pipe, " ".join(["cat"] * 28) + " zebra dog")


def test_empty_prompt(tiny_pipe):
    check_prompt(tiny_pipe, "", allow_empty=True)
    for prompt in ("", "  "):
        with pytest.raises(ValueError, match="the prompt is empty"):
            check_prompt(tiny_pipe, prompt)
    with pytest.raises(TypeError, match="a prompt is a string, not int"):
        check_prompt(tiny_pipe, 3)
