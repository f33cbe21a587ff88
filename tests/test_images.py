from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from p2p_helpers import images
from p2p_helpers.images import fit, load_image, save_image, to_array, to_pil, to_tensor


@pytest.fixture
def picture():
    """Red left, blue right, 40 high and 60 wide."""
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, :30, 0] = array[:, 30:, 2] = 255
    return Image.fromarray(array)


def encoded(image, kind="PNG", **options):
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_file_path_url_and_bytes_are_the_same(picture, tmp_path):
    data = encoded(picture)
    (tmp_path / "a.png").write_bytes(data)
    with fsspec.open("memory://a.png", "wb") as stream:
        stream.write(data)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), "memory://a.png", data):
        loaded = load_image(source)
        assert loaded.mode == "RGB" and np.array_equal(loaded, picture)


def test_rotated_photo_stands_upright(picture):
    exif = Image.Exif()
    exif[0x0112] = 6        # the camera was turned: rotate by 90 degrees clockwise to see it upright
    upright = np.asarray(load_image(encoded(picture, exif=exif)))
    assert upright.shape == (60, 40, 3)
    assert upright[5, 20].tolist() == [255, 0, 0] and upright[55, 20].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode, color, expected", [
    ("RGBA", (255, 0, 0, 0), 255), ("RGBA", (0, 0, 0, 128), 127), ("LA", (0, 0), 255)])
def test_transparent_is_white(mode, color, expected):
    pixel = np.asarray(load_image(encoded(Image.new(mode, (8, 8), color))))[0, 0]
    assert pixel.tolist() == [expected] * 3


def test_transparent_palette_is_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 1)
    array = np.asarray(load_image(encoded(image, "GIF", transparency=0)))
    assert array[4, 4].tolist() == [255, 255, 255] and array[0, 0].tolist() == [0, 255, 0]


def test_16_bit_grey_keeps_its_greys():
    data = encoded(Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)))
    assert np.asarray(load_image(data))[0, 0].tolist() == [128] * 3


def test_cmyk_becomes_rgb():
    data = encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert load_image(data).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_picture(tmp_path, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    (tmp_path / "half.png").write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="half.png' is a damaged picture or cut short"):
        load_image(tmp_path / "half.png")


def test_corrupt_picture(picture):
    data = bytearray(encoded(picture))
    data[45] ^= 255
    with pytest.raises(ValueError, match="the .* bytes given is a damaged picture"):
        load_image(bytes(data))


def test_not_a_picture_missing_or_a_folder(tmp_path):
    (tmp_path / "a.png").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="a.png' is not a picture"):
        load_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="the 0 bytes given is not a picture"):
        load_image(b"")
    with pytest.raises(FileNotFoundError, match="there is no picture at .*b.png"):
        load_image(tmp_path / "b.png")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("size, message", [((9000, 9000), "81 megapixels .9000x9000.; make it smaller"),
                                           ((20000, 20000), "too large a picture")])
def test_huge_picture_is_refused_before_it_is_decoded(size, message, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)
    header = encoded_header(*size)
    with pytest.raises(ValueError, match=message):
        load_image(header)


def encoded_header(width, height):
    """A PNG that claims a size and has no pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_fit_crops_the_centre_and_resizes(picture):
    square = np.asarray(fit(picture, 80))
    assert square.shape == (80, 80, 3)
    assert square[40, 10].tolist() == [255, 0, 0] and square[40, 70].tolist() == [0, 0, 255]
    assert np.asarray(load_image(encoded(picture), size=(16, 48))).shape == (16, 48, 3)
    # a wide picture loses its sides, nothing is squeezed: a line 2 pixels from the side is gone
    marked = picture.copy()
    marked.paste((0, 255, 0), (2, 0, 4, 40))
    assert np.asarray(fit(marked, 40))[..., 1].max() == 0
    assert np.asarray(fit(marked, (40, 56)))[..., 1].max() > 200


@pytest.mark.parametrize("size, message", [(100, "height 100 is not a multiple of 8; take 96 or 104"),
                                           ((64, 3), "width 3 .*take 8 or 16"), (0, "height 0")])
def test_fit_refuses_other_sizes(picture, size, message):
    with pytest.raises(ValueError, match=message):
        fit(picture, size)
    assert fit(picture, (10, 15), multiple=5).size == (15, 10)


def test_tensor_range_shape_and_way_back(picture):
    tensor = to_tensor(picture)
    assert tensor.shape == (1, 3, 40, 60) and tensor.dtype == torch.float32
    assert tensor[0, :, 0, 0].tolist() == [1, -1, -1] and tensor[0, :, 0, 59].tolist() == [-1, -1, 1]
    values = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    assert np.array_equal(to_array(to_tensor(values)), values)
    assert np.array_equal(to_array(to_tensor(list(values))[1]), values[1])


def test_to_array_takes_every_kind(picture):
    array = np.asarray(picture)
    for same in (picture, array, array / 255.0, to_tensor(picture)[0], picture.convert("RGBA")):
        assert np.array_equal(to_array(same), array)
    assert to_array([picture, array]).shape == (2, 40, 60, 3)
    assert to_array(torch.full((3, 8, 8), 1.5)).max() == 255      # decoders overshoot
    assert isinstance(to_pil(picture), Image.Image)
    assert [i.size for i in to_pil([picture] * 2)] == [(60, 40)] * 2


@pytest.mark.parametrize("wrong, message", [
    (np.zeros((8, 8), np.uint8), "three colours"),
    (np.zeros((8, 8, 3), np.int64), "uint8 or float, not int64"),
    (np.full((8, 8, 3), 1.2), r"lies in \[0, 1\]"), (np.full((8, 8, 3), np.nan), "from nan"),
    (torch.full((3, 8, 8), float("nan")), "from nan"), ([], "pictures of one size"),
    ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "pictures of one size")])
def test_wrong_arrays(wrong, message):
    with pytest.raises(ValueError, match=message):
        to_array(wrong)


def test_save_image_is_lossless_and_makes_folders(picture, tmp_path):
    saved = save_image(to_tensor(picture)[0], tmp_path / "new" / "a.png")
    assert saved == tmp_path / "new" / "a.png" and np.array_equal(Image.open(saved), picture)
    assert [f.name for f in saved.parent.iterdir()] == ["a.png"]


def test_failed_saving_keeps_the_old_picture(picture, tmp_path, monkeypatch):
    path = save_image(picture, tmp_path / "a.png")

    def fail(self, name, **options):
        Path(name).write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(to_tensor(picture)[0], path)
    assert np.array_equal(Image.open(path), picture) and len(list(tmp_path.iterdir())) == 1


def test_save_image_refuses(picture, tmp_path):
    with pytest.raises(ValueError, match="name the file 'a.png', not 'a.jpg'"):
        save_image(picture, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="not a batch of 2"):
        save_image([picture] * 2, tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write 'a.png'"):
        save_image(picture, tmp_path / "file" / "a.png")
    assert images.MAX_MEGAPIXELS == 64
