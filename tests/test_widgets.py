"""The control of an edit makes it again when a knob moves; photos are uploaded, masks are drawn."""
import struct
from datetime import UTC, datetime
from io import BytesIO

import ipywidgets as W
import numpy as np
import pytest
from PIL import Image

from p2p_helpers import widgets
from p2p_helpers.images import load_image
from p2p_helpers.runtime import data_dir
from p2p_helpers.widgets import draw_mask, edit_control, upload_control


@pytest.fixture
def box(tiny_pipe):
    return edit_control(tiny_pipe, "a cat on the grass", "a dog on the grass", steps=2, weight_of="dog",
                        measure=lambda result: f"seed {result.settings['seed']}")


def knob(box, description):
    return next(child for child in box.children if getattr(child, "description", None) == description)


def message(box):
    return next(child for child in box.children if isinstance(child, W.HTML)).value


def pictures(box):
    return [picture.value for picture in box.children[-1].children]


def test_it_starts_with_an_edit(box):
    source, edited = pictures(box)
    assert source[:4] == edited[:4] == b"\x89PNG" and source != edited
    assert message(box) == "seed 0"


@pytest.mark.parametrize("description, value, source_changes", [
    ("seed", 5, True), ("weight", 4., False), ("cross τ", 0., False), ("self τ", 1., False),
    ("target", "a big dog on the grass", False)])
def test_every_knob_makes_it_again(box, description, value, source_changes):
    before = pictures(box)
    knob(box, description).value = value
    after = pictures(box)
    assert before[1] != after[1]
    assert (before[0] != after[0]) == source_changes


def test_a_wrong_word_is_said_and_the_pictures_stay(box):
    before = pictures(box)
    knob(box, "word").value = "dgo"
    assert "did you mean &#x27;dog&#x27;" in message(box)
    assert pictures(box) == before


# ---- a photo to upload ----


def upload(box, name, content):
    """What the browser's side does when a person has chosen a file."""
    button = box.children[0]
    if hasattr(button, "data"):         # ipywidgets 7
        button.metadata, button.data = [{"name": name}], [content]
        button._counter += 1
    else:
        button.value = ({"name": name, "type": "", "size": len(content), "content": memoryview(content),
                         "last_modified": datetime.now(UTC)},)


def test_both_layouts_of_an_upload_are_read():
    seven = {"a.png": {"metadata": {"name": "a.png"}, "content": b"one"}}
    eight = ({"name": "a.png", "type": "image/png", "size": 3, "content": memoryview(b"one"), "last_modified": 0},)
    assert widgets._uploaded(seven) == widgets._uploaded(eight) == ("a.png", b"one")


def test_an_uploaded_photo_is_handed_on():
    pictures_seen, path = [], data_dir() / "photos" / "coffee.jpg"
    box = upload_control(pictures_seen.append, size=128)
    assert not pictures_seen and box.children[2].layout.display == "none"
    upload(box, "coffee.jpg", path.read_bytes())
    (picture,) = pictures_seen
    assert np.array_equal(picture, load_image(path, 128))
    assert box.children[2].value[:4] == b"\x89PNG" and box.children[2].layout.display is None
    assert message(box) == "coffee.jpg: 128 x 128 pixels"
    upload(box, "chelsea.jpg", (path.parent / "chelsea.jpg").read_bytes())
    assert len(pictures_seen) == 2 and "chelsea.jpg" in message(box)


@pytest.mark.parametrize("content, said", [
    (b"<html>", "&lt;b&gt;.png: the 6 bytes given is not a picture"),
    (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR", "&lt;b&gt;.png: the 16 bytes given is"),
])
def test_what_is_no_picture_is_said_not_raised(content, said):
    box = upload_control(lambda picture: pytest.fail("was called"), size=128)
    upload(box, "<b>.png", content)
    assert said in message(box)


def test_the_next_photo_replaces_the_message_of_the_last():
    seen, stream = [], BytesIO()
    frames = [Image.new("RGB", (100, 80), color) for color in ("red", "blue")]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    box = upload_control(seen.append, size=64)
    upload(box, "tiny.png", b"")
    upload(box, "two.gif", stream.getvalue())
    assert "2 frames; the first one is taken" in message(box) and "tiny" not in message(box)
    assert seen[0].getpixel((32, 32)) == (255, 0, 0)


def test_errors_of_the_callback_are_not_taken_for_those_of_the_photo():
    def fail(picture):
        raise ValueError("mine")
    box = upload_control(fail)
    with pytest.raises(ValueError, match="mine"):
        upload(box, "coffee.jpg", (data_dir() / "photos" / "coffee.jpg").read_bytes())


# ---- a mask to draw ----


@pytest.fixture
def drawing():
    """On a grey picture, 100 high and 200 wide."""
    return draw_mask(np.full((100, 200, 3), 128, np.uint8))


def press(drawing, name, **settings):
    for label, value in settings.items():
        knob(drawing, {"x": "centre x %", "y": "centre y %", "width": "width %", "height": "height %"}.get(label, label)
             ).value = value
    buttons = next(child for child in drawing.children if isinstance(child, W.HBox)).children
    next(button for button in buttons if button.description == name).click()


def preview(drawing):
    data = next(child for child in drawing.children if isinstance(child, W.Image)).value
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def test_nothing_is_drawn_at_first(drawing):
    assert drawing.mask.dtype == bool and drawing.mask.shape == (100, 200) and not drawing.mask.any()
    assert "press add" in message(drawing)


def test_a_rectangle_covers_exactly_its_pixels(drawing):
    press(drawing, "add", shape="rectangle", x=25, y=50, width=50, height=20)
    expected = np.zeros((100, 200), bool)
    expected[40:60, :100] = True
    assert np.array_equal(drawing.mask, expected)
    assert message(drawing) == "10.0% of the picture"


def test_an_ellipse_is_pi_quarters_of_its_box_and_round(drawing):
    press(drawing, "add", x=50, y=50, width=80, height=60)
    mask, x, y = drawing.mask, (np.arange(200) + .5 - 100) / 80, (np.arange(100) + .5 - 50) / 30
    for row in range(100):
        for column in range(200):
            assert mask[row, column] == (x[column] ** 2 + y[row] ** 2 <= 1)
    assert mask.mean() == pytest.approx(.8 * .6 * np.pi / 4, rel=.01)


def test_shapes_are_added_removed_and_cleared(drawing):
    press(drawing, "add", shape="rectangle", x=50, y=50, width=100, height=100)
    assert drawing.mask.all()
    press(drawing, "remove", x=0, y=0, width=100, height=100)       # beyond the picture's edge: a quarter of it
    assert not drawing.mask[:50, :100].any() and drawing.mask.mean() == .75
    press(drawing, "remove")
    assert drawing.mask.mean() == .75       # what is gone stays gone
    press(drawing, "add", shape="ellipse", x=25, y=25, width=10, height=10)
    assert drawing.mask[25, 50] and not drawing.mask[10, 20] and drawing.mask[80, 150]
    press(drawing, "clear")
    assert not drawing.mask.any()


def test_the_preview_follows_knobs_and_mask(drawing):
    before = preview(drawing)
    assert before.shape == (128, 256, 3)
    knob(drawing, "centre x %").value = 20
    moved = preview(drawing)
    assert not np.array_equal(before, moved) and not drawing.mask.any()
    press(drawing, "add")
    drawn = preview(drawing)
    assert moved[5, 250].tolist() == [128] * 3 and drawn[5, 250, 0] > 180      # outside the mask the picture is dimmed
    assert drawn[64, 51].tolist() == [128] * 3


def test_the_mask_given_out_is_a_copy(drawing):
    drawing.mask[:] = True
    assert not drawing.mask.any()


def test_a_mask_is_drawn_on_one_picture():
    assert draw_mask(Image.new("RGB", (30, 50))).mask.shape == (50, 30)
    with pytest.raises(ValueError, match="one picture, not a batch of 2"):
        draw_mask(np.zeros((2, 8, 8, 3), np.uint8))
