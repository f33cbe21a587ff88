import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from p2p_helpers import viz


def pixels(figure):
    return np.asarray(Image.open(BytesIO(viz.png(figure, colors=None))).convert("RGB"))


def picture(seed=0, shape=(128, 128, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def contains(page, tile):
    """Whether a picture stands in the page, pixel by pixel."""
    rows, columns = np.nonzero((page[:, :, None] == tile[0, 0]).all(-1).any(-1))
    h, w = tile.shape[:2]
    return any(np.array_equal(page[y:y + h, x:x + w], tile) for y, x in zip(rows, columns))


def test_small_pictures_are_enlarged_pixel_by_pixel():
    a, b = picture(0), picture(1)
    page = pixels(viz.row([a, Image.fromarray(b)], ["a title", ""], ["PSNR 20.0 dB", ""]))
    for image in (a, b):
        assert contains(page, image.repeat(2, 0).repeat(2, 1))
    assert page.shape[1] == 2 * 256 + viz.GAP


def test_large_pictures_are_made_smaller_and_keep_their_shape():
    assert pixels(viz.row([picture(0, (512, 1024, 3))])).shape == (128, 256, 3)


def test_titles_and_captions_are_drawn_and_take_room():
    plain = pixels(viz.row([picture()]))
    page = pixels(viz.row([picture()], ["title"], ["caption"]))
    assert plain.shape == (256, 256, 3) and page.shape[0] > 256 + 2 * viz.LINE
    top = next(y for y in range(page.shape[0]) if contains(page[y:y + 1], picture()[:1].repeat(2, 1)))
    assert page[:top].min() < 120 and page[top + 256:].min() < 160
    assert page[:top, :40].min() == 255                                 # the title is centred


def test_long_titles_wrap_inside_their_column():
    title = "a cat and a dog on the beach at night in the fog " * 2
    page = pixels(viz.row([picture(), picture()], ["", title]))
    assert page[:40, :256].min() > 200 and page[:40, 264:].min() < 120


def test_grid_of_maps_masks_and_tensors():
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:8] = True
    page = pixels(viz.grid([[ramp, torch.tensor(ramp)], [mask, None]],
                           ["attention maps of the word wood", "two"], ["a", "b"], size=64))
    expected = np.zeros((64, 64, 3), np.uint8)
    expected[16:32] = 255
    assert contains(page, expected)
    assert contains(page, np.repeat(np.repeat(viz._picture(ramp), 4, 0), 4, 1))
    assert page[-64:, -64:].min() == 255                                # None leaves its place empty
    labels = page[:, :page.shape[1] - 2 * 64 - viz.GAP]
    assert labels.min() < 120 and labels[:, :2].min() == 255            # row labels are there and not clipped


def test_contact_sheet_wraps():
    images = [picture(i) for i in range(5)]
    page = pixels(viz.contact_sheet(images, columns=3))
    assert page.shape[:2] == (2 * 128 + viz.GAP, 3 * 128 + 2 * viz.GAP)
    assert all(contains(page, image) for image in images)


def test_overlay_of_a_mask_keeps_the_inside_and_dims_the_outside():
    image, mask = np.full((32, 32, 3), 100, np.uint8), np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    drawn = viz.overlay(image, mask, strength=0.5)
    assert drawn[16, 16].tolist() == [100] * 3 and drawn[0, 0].tolist() == [178] * 3
    assert drawn[8, 16].tolist() == [213, 94, 0]


def test_overlay_of_a_heat_map():
    image, heat = np.full((32, 32, 3), 100, np.uint8), torch.zeros(8, 8)
    heat[2, 5] = 0.01           # its greatest value, however small
    drawn = viz.overlay(image, heat)
    changed = np.abs(drawn.astype(int) - 100).sum(-1)
    y, x = np.unravel_index(changed.argmax(), changed.shape)
    assert 8 <= y < 12 and 20 <= x < 24 and changed[24:].max() == 0
    assert np.array_equal(viz.overlay(image, np.zeros((8, 8))), image)


def test_heatmap_and_curve_carry_labels_and_values():
    axes = viz.heatmap(torch.eye(3), list("abc"), ["one", "two", "three"], title="alignment").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two", "three"]
    assert np.array_equal(axes.images[0].get_array(), np.eye(3))
    axes = viz.curve([0, 1, 2], [[1, 2, 4], [4, 2, 1]], ["up", "down"], "step", "error", log=True).axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1, 2, 4], [4, 2, 1]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["up", "down"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "error", "log")


def test_a_curve_over_whole_numbers_has_no_ticks_between_them():
    ticks = viz.curve(range(1, 21), [range(20)]).axes[0].get_xticks()
    assert len(ticks) > 3 and (ticks == ticks.round()).all()
    assert (viz.curve([0., .5, 1.], [[1, 2, 3]]).axes[0].get_xticks() % 1).any()


def test_show_displays_one_png_and_nothing_else(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda thing: shown.append(thing))
    assert viz.show(viz.row([picture()])) is None
    [image] = shown
    assert image.data[:4] == b"\x89PNG" and image._repr_mimebundle_()[0].keys() <= {"image/png", "text/plain"}


def test_figures_are_not_pyplots():
    viz.row([picture()]), viz.curve([0, 1], [[0, 1]])
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_fewer_colours_make_a_smaller_file():
    figure = viz.row([np.asarray(Image.fromarray(picture(0, (8, 8, 3))).resize((128, 128)))])
    assert len(viz.png(figure)) < 0.6 * len(viz.png(figure, colors=None))


@pytest.mark.parametrize("call, message", [
    (lambda: viz.row([]), "no picture"),
    (lambda: viz.row([picture()], ["a", "b"]), "titles.* has 2 entries for 1"),
    (lambda: viz.grid([[picture()]], row_labels=["a", "b"]), "row_labels has 2 entries for 1 rows"),
    (lambda: viz.row([picture(0, (2, 8, 8, 3))]), "not a batch of 2"),
    (lambda: viz.overlay(picture(), np.zeros(4)), r"is \(H, W\), not \(4,\)"),
    (lambda: viz.overlay(picture(), np.full((4, 4), np.nan)), "not finite"),
    (lambda: viz.heatmap(np.eye(3), ["a"]), "xlabels has 1 entries for 3"),
    (lambda: viz.curve([0, 1], [[1, 2, 3]]), r"needs the \(2,\) values"),
    (lambda: viz.curve([0, 1], [1, 2]), r"a single line is written \[y\]")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
