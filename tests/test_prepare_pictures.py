"""Every kind of picture: formats, depths, orientations, alpha, frames, and what is hard to read."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from photos import SIZE, command

from sra2_fast.cli import main
from sra2_fast.data import open_data
from sra2_fast.prepare import reading
from sra2_fast.prepare.convert import KINDS, UPRIGHT, summary, to_rgb
from sra2_fast.prepare.crop import MAX_ASPECT, center_crop
from sra2_fast.prepare.listing import list_images
from sra2_fast.prepare.reading import ImageChunks, read_square

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytest_plugins = ["photos"]
BROKEN_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01"  # five entries are said to follow
WHITE = np.float64([255, 255, 255])


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(96, 128, 3) uint8 of a real photograph."""
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")[200:296, 300:428]


def saved(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, **options)
    return file.getvalue()


def read(data: bytes) -> tuple[np.ndarray, list[str]]:
    """(H, W, 3) int64: what becomes of a file, before it is cropped; and how it was converted."""
    with Image.open(io.BytesIO(data)) as image:
        rgb, kinds = to_rgb(image)
    assert rgb.mode == "RGB"
    return np.asarray(rgb).astype(np.int64), kinds


# Formats


@pytest.mark.parametrize(
    ("format", "options", "error"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 3),
    ],
)
def test_formats(photo: np.ndarray, format: str, options: dict[str, object], error: float) -> None:
    got, kinds = read(saved(Image.fromarray(photo), format=format, **options))
    assert kinds == []
    assert np.abs(got - photo).mean() <= error


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_what_loses_nothing_is_not_counted(photo: np.ndarray, mode: str) -> None:
    picture = Image.fromarray(photo).convert(mode)
    got, kinds = read(saved(picture, format="PNG"))
    assert kinds == [] and (got == np.asarray(picture.convert("RGB"))).all()


# Depth


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_levels_keep_their_range(format: str) -> None:
    """Pillow's own conversion cuts off at 255: nearly every 16-bit picture became pure white."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got, kinds = read(saved(Image.fromarray(levels), format=format))
    assert kinds == ["16-bit"]
    assert (got == np.rint(levels / 257).astype(np.int64)[..., None]).all()


def test_sixteen_bits_as_early_versions_of_pillow_open_them() -> None:
    picture = Image.fromarray(np.array([[0, 257], [65535, 514]], np.int32))
    picture.format = "PNG"
    rgb, kinds = to_rgb(picture)
    assert kinds == ["16-bit"] and np.asarray(rgb)[..., 0].tolist() == [[0, 1], [255, 2]]


def test_twelve_bits_of_a_tiff_are_scaled_by_twelve() -> None:
    levels = np.array([[0, 4095], [2048, 1024]])
    packed = b"".join(struct.pack(">I", int(a) << 12 | int(b))[1:] for a, b in levels)
    tags = [(256, 3, 2), (257, 3, 2), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 3, 2), (279, 4, 6)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    got, kinds = read(data)
    assert kinds == ["16-bit"] and got[..., 0].tolist() == np.rint(levels * 255 / 4095).tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_deeper_levels_are_scaled_by_the_file_s_own_range(photo: np.ndarray, dtype: type) -> None:
    levels = (photo[..., 0].astype(np.float64) * 1000 - 7000).astype(dtype)
    got, kinds = read(saved(Image.fromarray(levels), format="TIFF"))
    assert kinds == ["32-bit by its own range"] and (got.min(), got.max()) == (0, 255)
    grey = photo[..., 0].astype(np.float64)
    want = (grey - grey.min()) * 255 / (grey.max() - grey.min())
    assert np.abs(got[..., 1] - want).max() <= 0.5 + 1e-3


def test_one_level_only_and_levels_that_are_no_numbers() -> None:
    got, _ = read(saved(Image.fromarray(np.full((4, 4), 7.0, np.float32)), format="TIFF"))
    assert (got == 0).all()
    with pytest.raises(ValueError, match="no finite numbers"):
        read(saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), format="TIFF"))


def test_cmyk(photo: np.ndarray) -> None:
    picture = Image.fromarray(photo).convert("CMYK")
    got, kinds = read(saved(picture, format="JPEG", quality=95, subsampling=0))
    assert kinds == ["CMYK"] and np.abs(got - np.asarray(picture.convert("RGB")).astype(int)).mean() <= 3


# Orientation


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, *UPRIGHT])
def test_photographs_stand_upright(photo: np.ndarray, format: str, orientation: int) -> None:
    """EXIF's orientation was ignored: photographs of phones were trained on lying on their side."""
    lying = {  # how a camera stores an upright scene: row 0 and column 0 of the file, in EXIF's words
        1: photo,
        2: photo[:, ::-1],
        3: photo[::-1, ::-1],
        4: photo[::-1],
        5: photo.swapaxes(0, 1),
        6: photo[:, ::-1].swapaxes(0, 1),
        7: photo[::-1, ::-1].swapaxes(0, 1),
        8: photo[::-1].swapaxes(0, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(format, {})
    data = saved(Image.fromarray(np.ascontiguousarray(lying)), format=format, exif=exif, **options)
    got, kinds = read(data)
    assert kinds == (["turned by EXIF"] if orientation > 1 else [])
    assert got.shape == photo.shape and np.abs(got - photo).mean() <= (3 if format == "JPEG" else 0)


def test_damaged_exif_is_no_reason_to_lose_a_picture(photo: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="Corrupt EXIF"):  # read_square keeps Pillow's warnings to itself
        got, kinds = read(saved(Image.fromarray(photo), format="JPEG", exif=BROKEN_EXIF))
    assert kinds == [] and got.shape == photo.shape


# Alpha


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return rgb * share + WHITE * (1 - share)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(photo: np.ndarray, mode: str) -> None:
    """Alpha was dropped: what lies under it, often black or noise, came to light."""
    alpha = np.linspace(0, 255, photo.shape[1]).astype(np.uint8)[None].repeat(photo.shape[0], axis=0)
    picture = Image.fromarray(photo).convert(mode)
    picture.putalpha(Image.fromarray(alpha))
    got, kinds = read(saved(picture, format="PNG"))
    assert kinds == ["with alpha on white"]
    assert (
        np.abs(got - on_white(np.asarray(Image.fromarray(photo).convert(mode[:-1]).convert("RGB")), alpha)).max() <= 1
    )


def test_opaque_alpha_is_not_counted(photo: np.ndarray) -> None:
    got, kinds = read(saved(Image.fromarray(photo).convert("RGBA"), format="PNG"))
    assert kinds == [] and (got == photo).all()


def test_a_palette_with_a_transparent_entry() -> None:
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for options in ({"format": "PNG", "transparency": 1}, {"format": "GIF", "transparency": 1}):
        got, kinds = read(saved(picture, **options))
        assert kinds == ["with alpha on white"]
        assert got.tolist() == [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]]


def test_a_transparent_level_of_sixteen_bits() -> None:
    levels = np.array([[0, 257], [65535, 514]], np.uint16)
    got, kinds = read(saved(Image.fromarray(levels), format="PNG", transparency=257))
    assert kinds == ["16-bit", "with alpha on white"] and got[..., 0].tolist() == [[0, 255], [255, 2]]


# Frames


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_of_several_frames(photo: np.ndarray, format: str) -> None:
    frames = [Image.fromarray(np.ascontiguousarray(photo[::step])) for step in (1, -1)]
    options = {"lossless": True} if format == "WEBP" else {}
    got, kinds = read(saved(frames[0], format=format, save_all=True, append_images=frames[1:], **options))
    assert kinds == ["first of several frames"]
    want = np.asarray(frames[0].quantize(256).convert("RGB")) if format == "GIF" else photo
    assert np.abs(got - want).mean() < (8 if format == "GIF" else 1e-9)


def test_the_previews_in_a_phone_s_jpeg_are_no_frames(photo: np.ndarray) -> None:
    data = saved(Image.fromarray(photo), format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    got, kinds = read(data)
    assert kinds == [] and got.shape == photo.shape


# What is hard to read


@pytest.mark.parametrize("format", ["PPM", "ICO", "PCX", "TGA"])
def test_no_other_format_is_opened_whatever_the_name_says(photo: np.ndarray, format: str) -> None:
    """Pillow tried all it knows, those that run a program (EPS) or read slowly among them."""
    with pytest.raises(OSError, match="cannot identify"):
        read_square(saved(Image.fromarray(photo[:64, :64]), format=format), 32)


@pytest.mark.parametrize(("width", "height"), [(1, 20_000), (20_000, 1), (3, 9_000)])
def test_an_extremely_long_picture_takes_little_memory(width: int, height: int) -> None:
    """1 x 20,000 pixels were resized to 256 x 5,120,000 (3.9 GB) before the middle was cut out."""
    code = (
        "import resource, numpy as np; from PIL import Image; from sra2_fast.prepare.crop import center_crop; "
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"square = center_crop(Image.new('RGB', ({width}, {height}), (1, 2, 3)), 256); "
        "assert square.shape == (256, 256, 3) and (square == (1, 2, 3)).all(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000  # KiB


def adm(picture: Image.Image, size: int) -> np.ndarray:
    """The crop of ADM, written again from its description, with the whole picture resized."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.BOX)
    scale = size / min(picture.size)
    pixels = np.asarray(picture.resize(tuple(round(side * scale) for side in picture.size), Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(128, 96), (33, 96), (128, 9), (128, 128 // MAX_ASPECT), (31, 30)])
@pytest.mark.parametrize("size", [16, 40])
def test_ordinary_pictures_are_cut_as_adm_cuts_them(photo: np.ndarray, width: int, height: int, size: int) -> None:
    picture = Image.fromarray(np.ascontiguousarray(np.resize(photo, (128, 128, 3))[:height, :width]))
    assert (center_crop(picture, size) == adm(picture, size)).all()


def test_too_long_pictures_show_their_middle() -> None:
    pixels = np.zeros((4, 401, 3), np.uint8)
    pixels[:, 198:203] = 255
    square = center_crop(Image.fromarray(pixels), 4)
    assert (square == 255).all()


@pytest.mark.parametrize("error", [MemoryError, OverflowError, KeyError])
def test_whatever_pillow_raises_is_an_unreadable_image(
    own_photos: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def failing(*_: object) -> None:
        raise error("of this size")

    monkeypatch.setattr(reading, "read_square", failing)
    images = list_images(own_photos)
    chunk = ImageChunks(images, [np.arange(2)], SIZE)[0]
    assert len(chunk.positions) == 0 and len(chunk.unreadable) == 2 and chunk.marks.any(dim=1).all()
    assert "of this size" in chunk.unreadable[0]


def test_a_decompression_bomb_is_unreadable(monkeypatch: pytest.MonkeyPatch, photo: np.ndarray) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="exceeds limit"):
        read_square(saved(Image.fromarray(photo), format="PNG"), SIZE)


def test_warnings_do_not_break_the_progress_bar(photo: np.ndarray, capfd: pytest.CaptureFixture[str]) -> None:
    """Pillow warns, and libtiff writes to the process's standard error, in the middle of the bar."""
    tiff = bytearray(saved(Image.fromarray(photo), format="TIFF", compression="tiff_lzw"))
    tiff[1000:3000] = b"\xff" * 2000
    with pytest.raises(OSError), Image.open(io.BytesIO(tiff)) as image:
        image.load()
    assert "tempfile.tif" in capfd.readouterr().err, "libtiff says nothing about this file"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="decoder error"):
            read_square(bytes(tiff), SIZE)
        read_square(saved(Image.fromarray(photo), format="JPEG", exif=BROKEN_EXIF), SIZE)
    print("still there", file=sys.stderr)
    assert capfd.readouterr().err == "still there\n"


# The whole command


def test_what_was_converted_is_counted_and_recorded(
    own_photos: Path, photo: np.ndarray, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(photo[..., 0].astype(np.uint16) * 257)
    clear = Image.fromarray(photo).convert("RGBA")
    clear.putalpha(100)
    for number in range(3):
        deep.save(own_photos / "china" / f"deep{number}.png")
    Image.fromarray(photo).save(own_photos / "china" / "phone.JPG", exif=exif)
    clear.save(own_photos / "flower" / "clear.webp", lossless=True)
    clear.convert("RGB").save(own_photos / "flower" / "again.gif", save_all=True, append_images=[deep.convert("L")])
    for workers, out in (("0", tmp_path / "out"), ("2", tmp_path / "workers")):
        assert main(command(own_photos, vae_path, out, "--num-workers", workers)) == 0
        line = "converted: 3 16-bit, 1 with alpha on white, 1 turned by EXIF, 1 first of several frames"
        assert line in capsys.readouterr().out.splitlines()
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["prepared_from"]["alpha_on"] == "white"
    assert index["prepared_from"]["converted"]["16-bit"] == 3
    assert open_data(tmp_path / "out").num_samples == 14 + 6


def test_the_summary_names_what_there_is() -> None:
    assert summary({}) == ""
    assert summary(dict.fromkeys(KINDS, 2)).count(" 2 ") == len(KINDS)
