import os
import random
import subprocess
import sys
import tomllib
import types
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from p2p_helpers import runtime
from p2p_helpers.runtime import (Runtime, atomic_folder, atomic_write, data_dir, detect, generator, measure,
                                 memory_advice, setup)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("P2P_DEVICE", "P2P_PLATFORM", "KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "MA_JOB_DIR",
                 "MA_MOUNT_PATH"):
        monkeypatch.delenv(name, raising=False)


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_setup_seeds_every_random_source():
    setup(seed=3, device="cpu")
    first = draws()
    setup(seed=3, device="cpu")
    assert draws() == first
    setup(seed=4, device="cpu")
    assert all(a != b for a, b in zip(draws(), first))


def test_detect_leaves_random_sources_alone():
    setup(seed=3, device="cpu")
    expected = draws()
    setup(seed=3, device="cpu")
    detect(seed=9)
    assert draws() == expected


def test_setup_quiets_libraries_but_not_our_warnings(capsys):
    setup()
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    diffusers_logging.get_logger("diffusers.pipelines.x").warning("noise")
    transformers_logging.get_logger("transformers.models.x").warning("noise")
    assert not transformers_logging.is_progress_bar_enabled()
    assert "noise" not in capsys.readouterr().err
    with pytest.warns(UserWarning, match="ours"):
        warnings.warn("ours")


def fake_devices(monkeypatch, **counts):
    monkeypatch.setattr(runtime, "_device_count", lambda kind: counts.get(kind, int(kind == "cpu")))


@pytest.mark.parametrize("counts, device, dtype", [
    ({}, "cpu", torch.float32), ({"mps": 1}, "mps", torch.float32),
    ({"npu": 1, "mps": 1}, "npu", torch.float16),
    ({"cuda": 1, "npu": 1}, "cuda", torch.float16)])
def test_device_is_the_first_present_and_sets_the_dtype(monkeypatch, counts, device, dtype):
    fake_devices(monkeypatch, **counts)
    assert detect(seed=5) == Runtime(device, dtype, "local", 5)


def test_npu_is_counted_through_torch_npu(monkeypatch):
    module = types.ModuleType("torch_npu")
    module.__spec__ = types.SimpleNamespace(name="torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(device_count=lambda: 2), raising=False)
    assert runtime._device_count("npu") == 2


def test_p2p_device_wins_and_is_checked(monkeypatch):
    fake_devices(monkeypatch, cuda=2)
    monkeypatch.setenv("P2P_DEVICE", "cuda:1")
    assert detect(device="cpu").device == "cuda:1"
    for wrong, message in [("cuda:2", "'cuda:2' is not present.*present: cuda, cpu"), ("npu", "not present"),
                           ("cud", "did you mean 'cuda'"), ("cuda:x", "write 'cuda' or 'cuda:0'")]:
        monkeypatch.setenv("P2P_DEVICE", wrong)
        with pytest.raises(ValueError, match=message):
            detect()


def test_dtype_can_be_said_and_is_checked():
    assert detect(device="cpu", dtype="bfloat16").dtype == detect(device="cpu", dtype=torch.bfloat16).dtype
    with pytest.raises(ValueError, match="did you mean 'float16'"):
        detect(device="cpu", dtype="flot16")


@pytest.mark.parametrize("variables, platform", [
    ({}, "local"), ({"COLAB_RELEASE_TAG": "x"}, "colab"), ({"MA_JOB_DIR": "/x"}, "modelarts"),
    ({"COLAB_RELEASE_TAG": "x", "KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "kaggle"),
    ({"COLAB_RELEASE_TAG": "x", "P2P_PLATFORM": "local"}, "local")])
def test_platform(monkeypatch, variables, platform):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert detect(device="cpu").platform == platform


def test_unknown_platform(monkeypatch):
    monkeypatch.setenv("P2P_PLATFORM", "colb")
    with pytest.raises(ValueError, match="did you mean 'colab'"):
        detect(device="cpu")


def test_generator_is_seeded_and_on_its_own():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = (torch.randn(3, generator=generator(7)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, torch.randn(3, generator=generator(8)))
    assert torch.equal(before, torch.get_rng_state())


def test_data_dir_prefers_the_installed_data(monkeypatch, tmp_path):
    (tmp_path / "p2p_helpers").mkdir()
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "p2p_helpers" / "runtime.py"))
    with pytest.raises(FileNotFoundError, match="checkout"):
        data_dir()
    (tmp_path / "data").mkdir()
    assert data_dir() == tmp_path / "data"
    (tmp_path / "p2p_helpers" / "_data").mkdir()
    assert data_dir() == tmp_path / "p2p_helpers" / "_data"


def test_measure_counts_time_and_memory_even_when_the_block_fails():
    with pytest.raises(ZeroDivisionError), measure() as cost:
        block = np.ones(64 * 2**20, dtype=np.uint8)
        1 / 0
    assert cost.seconds > 0 and cost.peak_bytes > block.nbytes
    assert cost.report().startswith(f"time {cost.seconds:.2f} s, memory {cost.peak_bytes / 2**20:.0f} MiB")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.10 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ...")])
def test_no_memory_left_says_what_to_turn_on(error):
    with pytest.raises(type(error)) as raised, memory_advice(), memory_advice():
        raise error
    said = str(raised.value)
    assert type(raised.value) is type(error) and str(error) in said
    for advice in ("low_memory=True in load and in edit_prompt", "a smaller size", "fewer prompts"):
        assert said.count(advice) == 1


def test_a_real_lack_of_memory_is_recognised():
    with pytest.raises(RuntimeError, match="What to turn on"), memory_advice():
        torch.empty(2**50)


def test_tensors_of_a_failed_block_are_let_go():
    alive = []

    def fill():
        activation = torch.zeros(8)
        alive.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError) as raised, memory_advice():
        fill()
    assert raised.value.__cause__ is not None and alive[0]() is None


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyboardInterrupt()])
def test_other_errors_get_no_advice(error):
    with pytest.raises(type(error)) as raised, memory_advice():
        raise error
    assert raised.value is error


def test_the_wheel_carries_the_data_where_data_dir_looks_for_it():
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"data": "p2p_helpers/_data"}


def test_atomic_write_replaces_only_on_success(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_write(target) as temporary:
        assert temporary.suffix == ".txt" and not target.exists()
        temporary.write_text("first")
    with pytest.raises(RuntimeError), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "first" and os.listdir(target.parent) == ["a.txt"]


def test_atomic_folder_replaces_only_on_success(tmp_path):
    target = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(target) as new:
            (new / content).write_text(content)
        assert os.listdir(target) == [content]
    with pytest.raises(RuntimeError), atomic_folder(target) as new:
        (new / "half").write_text("half")
        raise RuntimeError
    assert os.listdir(target) == ["second"] and os.listdir(tmp_path) == ["model"]


def test_atomic_folder_puts_the_old_one_back_when_moving_fails(tmp_path, monkeypatch):
    target, replace = tmp_path / "model", os.replace
    with atomic_folder(target) as new:
        (new / "first").write_text("first")

    def fail_for_new(source, destination):
        if source.name == "new":
            raise PermissionError(13, "in use")
        replace(source, destination)
    monkeypatch.setattr(os, "replace", fail_for_new)
    with pytest.raises(PermissionError, match="cannot write 'model'"), atomic_folder(target):
        pass
    assert os.listdir(target) == ["first"] and os.listdir(tmp_path) == ["model"]


@pytest.fixture
def unwritable(tmp_path):
    """A folder that this process may not write to, also when it runs as root."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no write bit")
@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_unwritable_folder_is_named(unwritable, write):
    with pytest.raises(PermissionError, match="cannot write 'a.png'.*locked"), write(unwritable / "a.png"):
        pass


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_folder_that_is_a_file(tmp_path, write):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(OSError, match="cannot write 'a.png'.*file"), write(tmp_path / "file" / "a.png"):
        pass
    assert (tmp_path / "file").read_text() == "keep"


def test_errors_of_the_block_are_not_reworded(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine"), atomic_write(tmp_path / "a.txt"):
        raise FileNotFoundError("mine")


@pytest.mark.skipif(runtime.platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept():
    """Pages that were touched, freed and allocated again cost no second page fault."""
    code = ("import resource, sys; from p2p_helpers.runtime import keep_freed_memory\n"
            "if sys.argv[1] == 'keep': keep_freed_memory()\n"
            "for _ in range(2):\n"
            "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    bytes(bytearray(b'x') * 2 ** 26)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    faults = {how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True,
                                      check=True).stdout) for how in ("keep", "default")}
    assert faults["keep"] < .1 * faults["default"]
