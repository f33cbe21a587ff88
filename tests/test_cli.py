"""The command line makes what it says, and says what is wrong in one line."""
import pytest
from PIL import Image

from p2p_helpers.cli import main
from p2p_helpers.prompt_to_prompt import load_result


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
