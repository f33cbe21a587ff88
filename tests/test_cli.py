"""The command line makes what it says, and says what is wrong in one line."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from p2p_helpers import cli, inversion, prompt_to_prompt
from p2p_helpers.cli import main
from p2p_helpers.images import to_pil
from p2p_helpers.inversion import load_inversion, picture_key
from p2p_helpers.prompt_to_prompt import load_result
from p2p_helpers.runtime import data_dir
from p2p_helpers.sampling import decode, encode_image


def run(tiny_folder, *options):
    main(["edit", "--model", str(tiny_folder), "--steps", "2", *options])


def test_edit_writes_pictures_maps_and_settings(tiny_folder, tmp_path, capsys):
    run(tiny_folder, "--source", "a big red car", "--target", "a big blue horse", "--target", "a big red house",
        "--reweight", "big=2", "--blend", "car", "--seed", "3", "--out", str(tmp_path / "out"))
    result = load_result(tmp_path / "out")
    assert result.settings["targets"] == ["a big blue horse", "a big red house"]
    assert result.settings["weights"] == {"big": 2} and result.settings["seed"] == 3
    assert result.settings["blend"]["words"] == [["car"], ["horse"], ["house"]]
    assert Image.open(tmp_path / "out" / "maps.png").width > 5 * 128
    said = capsys.readouterr().out
    assert "4 car" in said and "edit-2.png" in said


@pytest.mark.parametrize("options, message", [
    (("--target", "a blue car", "--reweight", "gren=2"), "'gren' is not in the prompt"),
    (("--target", "a blue car", "--cross", "1.5"), "cross_replace_steps"),
    ((), "nothing to edit"),
])
def test_mistakes_end_with_one_line(tiny_folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        run(tiny_folder, "--source", "a red car", *options, "--out", str(tmp_path / "out"))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_weight_needs_a_number(tiny_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tiny_folder, "--source", "a red car", "--reweight", "red", "--out", str(tmp_path / "out"))
    assert "WORD=NUMBER" in capsys.readouterr().err


def test_help_holds_examples(capsys):
    with pytest.raises(SystemExit):
        main(["edit", "--help"])
    assert '--source "a big red car" --target "a big blue motorcycle"' in capsys.readouterr().out


# ---- a picture of one's own ----

CAT = ("--source", "a cat on the grass", "--target", "a dog on the grass")


@pytest.fixture
def edit_cat(tiny_folder, tmp_path):
    """Edit the bundled photo of a cat into the folder that is returned."""
    def edit(*options):
        photo = data_dir() / "photos" / "chelsea.jpg"
        run(tiny_folder, "--real", str(photo), *CAT, "--out", str(tmp_path / "out"), *options)
        return tmp_path / "out"
    return edit


@pytest.fixture
def inverted(monkeypatch):
    """The methods of the inversions that are made."""
    made, invert = [], inversion.invert

    def counted(pipe, image, prompt, method, **settings):
        made.append(method)
        return invert(pipe, image, prompt, method, **settings)
    monkeypatch.setattr(inversion, "invert", counted)
    return made


def test_a_real_picture_is_edited_in_its_own_shape(edit_cat, tiny_pipe):
    out = edit_cat("--blend", "cat", "--restore")
    assert {path.name for path in out.iterdir()} == {
        "source.png", "edit-1.png", "settings.json", "result.safetensors", "maps.png", "original.png",
        "autoencoder.png", "inversion"}
    original = Image.open(out / "original.png")
    assert original.size == (192, 128)          # the photo is 451 x 300
    through = to_pil(decode(tiny_pipe, encode_image(tiny_pipe, [original])))[0]
    assert np.abs(np.asarray(Image.open(out / "autoencoder.png"), int) - np.asarray(through, int)).max() <= 1
    result = load_result(out)
    assert result.images[0].size == result.images[1].size == (192, 128)
    assert {name: result.settings[name] for name in ("seed", "inversion", "restore", "height", "width")} == {
        "seed": None, "inversion": "direct", "restore": True, "height": 128, "width": 192}
    kept = load_inversion(out / "inversion", picture=picture_key(original), method="direct", steps=2)
    # direct inversion: what stands as the source is the picture, as far as the autoencoder goes
    assert torch.allclose(result.latents[:1], kept.trajectory[:1], atol=1e-4)
    assert np.abs(np.asarray(result.source, int) - np.asarray(through, int)).max() <= 1


def test_size_and_method_of_a_real_picture(edit_cat):
    out = edit_cat("--size", "144", "64", "--inversion", "negative-prompt")
    assert Image.open(out / "original.png").size == (64, 144)
    assert load_inversion(out / "inversion").method == "negative-prompt"
    assert json.loads((out / "settings.json").read_text())["settings"]["inversion"] == "negative-prompt"


def test_a_kept_inversion_is_used_again_only_for_the_same(edit_cat, inverted, capsys):
    first = load_result(edit_cat())
    again = load_result(edit_cat("--cross", "0.1", "--blend", "cat"))
    assert inverted == ["direct"] and "fits and is used again" in capsys.readouterr().out
    assert torch.allclose(first.latents[0], again.latents[0], atol=1e-4)
    options = []
    for changed, reason in [(["--inversion", "ddim"], "method 'direct', not 'ddim'"),
                            (["--guidance", "3"], "guidance_scale 7.5, not 3.0"), (["--steps", "3"], "steps 2, not 3"),
                            (["--source", "a cat"], "prompt 'a cat on the grass', not 'a cat'"),
                            (["--size", "64", "64"], "picture")]:
        options += changed
        count = len(inverted)
        edit_cat(*options)
        said = capsys.readouterr().out
        assert len(inverted) == count + 1 and "inverting anew" in said and f"made with {reason}" in said
    edit_cat(*options)
    assert inverted == ["direct"] + ["ddim"] * 5


def test_a_misspelt_word_costs_no_second_inversion(edit_cat, inverted, capsys):
    with pytest.raises(SystemExit):
        edit_cat("--reweight", "gras=2")
    assert "did you mean 'grass'" in capsys.readouterr().err
    assert (edit_cat("--reweight", "grass=2") / "edit-1.png").is_file()
    assert inverted == ["direct"]


@pytest.mark.parametrize("options, message", [
    (("--real", "x.png", "--seed", "0"), "--seed is of a picture to generate"),
    (("--inversion", "ddim"), "needs the picture to invert: give --real"),
    (("--restore", "--blend", "cat"), "give --real and --blend"),
    (("--real", "x.png", "--restore"), "give --real and --blend"),
    (("--real", "nowhere.png"), "there is no picture at 'nowhere.png'"),
    (("--real", __file__), "is not a picture"),
])
def test_options_that_do_not_go_together(tiny_folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        run(tiny_folder, *CAT, *options, "--out", str(tmp_path / "out"))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_method_of_inversion_can_be_chosen(capsys):
    assert cli.INVERSIONS == inversion.METHODS
    with pytest.raises(SystemExit):
        main(["edit", *CAT, "--real", "x.png", "--inversion", "nul-text", "--out", "out"])
    assert "choose from" in capsys.readouterr().err


def test_no_memory_left_is_said_with_the_options_that_help(tiny_folder, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(prompt_to_prompt, "edit_prompt", fail)
    with pytest.raises(SystemExit) as stopped:
        run(tiny_folder, *CAT, "--out", str(tmp_path / "out"))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "no memory left" in said and "--low-memory and --size" in said


def test_other_runtime_errors_keep_their_traceback(tiny_folder, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("shapes differ")
    monkeypatch.setattr(prompt_to_prompt, "edit_prompt", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(tiny_folder, *CAT, "--out", str(tmp_path / "out"))
