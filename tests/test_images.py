import warnings
from io import BytesIO
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from p2p_helpers import images
from p2p_helpers.images import fit, load_image, save_image, size_for, to_array, to_pil, to_tensor
from p2p_helpers.runtime import data_dir


@pytest.fixture
def picture():
    """Red left, blue right, 40 high and 60 wide."""
    array = np.zeros((40, 60, 3), np.uint8)
    array[:, :30, 0] = array[:, 30:, 2] = 255
    return Image.fromarray(array)


@pytest.fixture
def photo(picture):
    """The same, large enough to be fitted: 80 high and 120 wide."""
    return picture.resize((120, 80), Image.Resampling.NEAREST)


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


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colours_keep_their_colours(channels):
    color = np.array([40, 128, 200, 0][:channels], np.uint16) * 256       # blue, green, red, as OpenCV has them
    ok, data = cv2.imencode(".png", np.broadcast_to(color, (8, 8, channels)).copy())
    assert ok and data[24] == 16                                        # bits of a channel
    expected = [200, 128, 40] if channels == 3 else [255] * 3           # transparent: white
    assert np.asarray(load_image(data.tobytes()))[0, 0].tolist() == expected


@pytest.mark.parametrize("kind, values", [("TIFF", np.float32(.5)), ("TIFF", np.int32(128)), ("PPM", np.int32(30000))])
def test_32_bits_have_no_white(kind, values):
    data = encoded(Image.fromarray(np.full((8, 8), values)), kind)
    with pytest.raises(ValueError, match="bytes given has 32 bits a pixel.*8-bit PNG"):
        load_image(data)


@pytest.mark.parametrize("color, expected", [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)),
                                             ((255, 255, 0, 0), (0, 0, 255)), ((0, 0, 0, 255), (0, 0, 0))])
def test_cmyk_becomes_rgb(color, expected):
    pixel = load_image(encoded(Image.new("CMYK", (8, 8), color), "JPEG")).getpixel((0, 0))
    assert np.allclose(pixel, expected, atol=3)         # JPEG loses some


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken_and_said(kind):
    frames = [Image.new("RGB", (80, 70), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="bytes given has 3 frames; the first one is taken"):
        pixel = load_image(data).getpixel((40, 35))
    assert np.allclose(pixel, (255, 0, 0), atol=3)


def test_the_preview_in_a_cameras_jpeg_is_no_animation():
    photo, preview = Image.new("RGB", (80, 70), "red"), Image.new("RGB", (80, 70), "blue")
    data = encoded(photo, "MPO", save_all=True, append_images=[preview])
    assert Image.open(BytesIO(data)).n_frames == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(load_image(data).getpixel((40, 35)), (255, 0, 0), atol=3)


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
    with pytest.raises(ValueError, match="the 12 bytes given is not a picture.*HEIC has to be exported as JPEG"):
        load_image(b"\0\0\0\x18ftypheic")
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


def test_fit_crops_the_centre_and_resizes(photo):
    square = np.asarray(fit(photo, 160))
    assert square.shape == (160, 160, 3)
    assert square[80, 20].tolist() == [255, 0, 0] and square[80, 140].tolist() == [0, 0, 255]
    assert np.asarray(load_image(encoded(photo), size=(32, 96))).shape == (32, 96, 3)
    # a wide picture loses its sides, nothing is squeezed: a line 4 pixels from the side is gone
    marked = photo.copy()
    marked.paste((0, 255, 0), (4, 0, 8, 80))
    assert np.asarray(fit(marked, 80))[..., 1].max() == 0
    assert np.asarray(fit(marked, (80, 112)))[..., 1].max() > 200


@pytest.mark.parametrize("sides", [(1, 1), (63, 200), (200, 63)])
def test_a_picture_too_small_to_enlarge_is_refused(sides):
    data = encoded(Image.new("RGB", sides))
    with pytest.raises(ValueError, match=f"is {sides[1]} x {sides[0]} pixels .*too small to become 128 x 128"):
        load_image(data, 128)
    assert load_image(data).size == sides               # as it is, it can be had
    assert fit(Image.new("RGB", (64, 64)), 128).size == (128, 128)


def test_a_huge_photo_is_resized_with_a_word_about_it():
    huge = Image.new("L", (8000, 6000), 90)
    huge.paste(200, (0, 0, 8000, 3000))
    data = encoded(huge, "JPEG")
    with pytest.warns(UserWarning, match="6000 x 8000 pixels .* was resized to 96 x 128"):
        array = np.asarray(load_image(data, (96, 128)))
    assert np.allclose(array[[10, 85], 64, 0], [200, 90], atol=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Image.new("L", (4000, 3000)), 128)          # what every telephone makes


@pytest.mark.parametrize("sides, side, multiple, expected", [      # sides as Pillow has them: width, height
    ((600, 400), 512, 64, (512, 768)), ((400, 600), 512, 64, (768, 512)), ((4032, 3024), 512, 64, (512, 704)),
    ((512, 512), 512, 64, (512, 512)), ((600, 400), 128, 16, (128, 192)), ((451, 300), 128, 8, (128, 192)),
    ((640, 480), 500, 8, (496, 664)), ((9000, 300), 128, 16, (128, 256)), ((300, 9000), 128, 16, (256, 128))])
def test_size_for_keeps_the_shape(sides, side, multiple, expected):
    image = Image.new("L", sides)
    size = size_for(image, side, multiple)
    assert size == expected
    assert fit(image, size, multiple).size == size[::-1]


def test_size_for_keeps_more_of_a_photo_than_a_square(photo):
    photo.paste((0, 255, 0), (1, 0, 5, 80))             # near the left side: a square has lost it
    assert np.asarray(fit(photo, size_for(photo, 80, 8)))[:, :8, 1].max() > 200
    with pytest.raises(ValueError, match="side 48 is less than the multiple 64; take 64"):
        size_for(photo, 48)


def test_bundled_photos_are_small_and_have_a_licence():
    folder = data_dir() / "photos"
    paragraphs = [" ".join(part.split()) for part in (folder / "NOTICE").read_text().split("\n\n")]
    names = {path.name for path in folder.iterdir()} - {"NOTICE"}
    assert len(names) >= 3
    for name in names:
        image = load_image(folder / name)
        (entry,) = [part for part in paragraphs if part.startswith(f"{name}, {image.width} x {image.height}: ")]
        assert " By " in entry and ("CC0" in entry or "released into the public domain" in entry)
        assert max(image.size) <= 512 and min(image.size) >= 256 and (folder / name).stat().st_size <= 100_000
        assert np.asarray(image).std() > 20             # something is on it


@pytest.mark.parametrize("size, message", [(100, "height 100 is not a multiple of 8; take 96 or 104"),
                                           ((64, 3), "width 3 .*take 8 or 16"), (0, "height 0")])
def test_fit_refuses_other_sizes(photo, size, message):
    with pytest.raises(ValueError, match=message):
        fit(photo, size)
    assert fit(photo, (10, 15), multiple=5).size == (15, 10)


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
