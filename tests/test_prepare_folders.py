"""What lies in a folder of images: links, names, files that are no images, classes nobody can read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from photos import command, refused

from sra2_fast.cli import main
from sra2_fast.data import open_data
from sra2_fast.errors import InputError
from sra2_fast.prepare.listing import list_images, name_some

pytest.importorskip("PIL.Image")
pytest_plugins = ["photos"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of two images each, and a pool beside them; empty files, which listing does not open."""
    for name in ("cats/a.png", "cats/deep/b.JPEG", "dogs/c.gif", "dogs/d.Tif"):
        touch(tmp_path / "images" / name)
    touch(tmp_path / "pool" / "p.png")
    touch(tmp_path / "pool" / "inner" / "q.webp")
    return tmp_path / "images"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


ALL = ["cats/a.png", "cats/deep/b.JPEG", "dogs/c.gif", "dogs/d.Tif"]


def test_every_image_once_by_class_then_path(images: Path) -> None:
    touch(images / "cats" / ".hidden.png")
    touch(images / "cats" / ".hidden" / "x.png")
    found = list_images(images)
    assert found.files == ALL and found.labels.tolist() == [0, 0, 1, 1]
    assert found.class_names == ["cats", "dogs"] and found.notes == []


# Links


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("cats/loop", "."),
        ("cats/deep/up", ".."),
        ("cats/all", ".."),
        ("cats/world", "../.."),
        ("cats/dogs", "../dogs"),
        ("dogs/deep", "../cats/deep"),
        ("again", "."),
        ("above", ".."),
        ("puppies", "dogs"),
    ],
)
def test_a_link_to_what_is_read_anyway_is_not_followed(images: Path, link: str, target: str) -> None:
    """A loop made 124 latents of 4 images, and a link upwards gave the images of one class to another."""
    os.symlink(target, images / link)
    found = list_images(images)
    assert found.files == ALL and found.class_names == ["cats", "dogs"]
    (note,) = found.notes
    assert note.startswith("did not follow 1 links to folders that are read anyway") and note.endswith(f": {link}")


def test_links_to_other_folders_are_followed_once(images: Path) -> None:
    os.symlink("../../pool", images / "cats" / "pool")
    os.symlink("../../pool", images / "dogs" / "pool")
    os.symlink("../../pool/inner", images / "dogs" / "inner")
    found = list_images(images)
    assert [file for file in found.files if file not in ALL] == ["cats/pool/inner/q.webp", "cats/pool/p.png"]
    followed, refused_ones = found.notes
    assert followed == "followed 1 links to folders, each once: cats/pool"
    assert refused_ones.endswith(": dogs/inner, dogs/pool")


def test_a_class_may_be_a_link(images: Path) -> None:
    os.symlink("../pool", images / "birds")
    os.symlink("../../pool/inner", images / "cats" / "inner")  # the class has it first
    found = list_images(images)
    assert found.class_names == ["birds", "cats", "dogs"]
    assert found.files == ["birds/inner/q.webp", "birds/p.png", *ALL]
    assert found.notes[0].endswith(": birds") and found.notes[1].endswith(": cats/inner")


def test_links_behind_links_and_a_part_that_was_reached_before(images: Path) -> None:
    os.symlink("../../pool/inner", images / "cats" / "a_first")
    os.symlink("../../pool", images / "cats" / "pool")
    os.symlink("..", images.parent / "pool" / "inner" / "back")
    touch(images.parent / "far" / "f.bmp")
    os.symlink("../far", images.parent / "pool" / "far")
    found = list_images(images)
    assert [file for file in found.files if file not in ALL] == [
        "cats/a_first/q.webp",
        "cats/pool/far/f.bmp",
        "cats/pool/p.png",
    ]
    assert found.notes[0].endswith("each once: cats/a_first, cats/pool, cats/pool/far")
    assert found.notes[1].endswith(": cats/pool/inner, cats/a_first/back")


def test_links_to_images_are_images(images: Path) -> None:
    os.symlink("../../pool/p.png", images / "cats" / "p.png")
    assert list_images(images).files == ["cats/a.png", "cats/deep/b.JPEG", "cats/p.png", "dogs/c.gif", "dogs/d.Tif"]


def test_a_link_to_nothing(
    own_photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dangling link was a traceback of os.path.getsize."""
    os.symlink("nowhere.png", own_photos / "china" / "gone.png")
    os.symlink("nowhere", own_photos / "china" / "gone")
    os.symlink("round.png", own_photos / "china" / "round.png")
    refused(
        capsys,
        command(own_photos, vae_path, tmp_path / "out"),
        r"2 of 16 images cannot be read: .*china/gone.png \(.*No such file or directory.*; repair or remove them",
    )
    assert main(command(own_photos, vae_path, tmp_path / "out", "--skip-unreadable")) == 0
    out = capsys.readouterr().out
    assert "passed over 1 links to nothing: china/gone" in out and "left out 2 unreadable images" in out
    assert open_data(tmp_path / "out").num_samples == 14
    assert main(command(own_photos, vae_path, tmp_path / "out", "--skip-unreadable")) == 0
    assert "already complete" in capsys.readouterr().out
    os.symlink("nowhere", own_photos / "class")
    refused(capsys, command(own_photos, vae_path, tmp_path / "out"), "photos/class is a link to nothing; repair or")


# Names


@pytest.mark.parametrize("name", [b"cats/\xff.png", b"cats/\xff/a.png", b"\xff/a.png", b"\xff.png"])
def test_a_name_that_is_no_utf8(images: Path, name: bytes) -> None:
    """It was a traceback of str.encode."""
    path = os.path.join(os.fsencode(images), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb"):
        pass
    with pytest.raises(InputError, match=r"1 names in .*images are no UTF-8, such as (cats/)?\\xff.*; rename them"):
        list_images(images)


def test_files_that_are_no_images_are_counted(images: Path) -> None:
    """ "Passed over" was never said: half of a data set could be missing, as WebP or GIF, without a word."""
    for name in ("cats/x.txt", "cats/deep/y.TXT", "dogs/z.heic", "dogs/README", "notes.txt"):
        touch(images / name)
    os.mkfifo(images / "cats" / "pipe.png")
    found = list_images(images)
    assert found.files == ALL
    (note,) = found.notes
    assert note.startswith(
        "passed over 5 files in class folders that are no PNG, JPEG, WebP, GIF, BMP or TIFF by their"
    )
    assert all(part in note for part in ("names: 2 .txt, ", "1 .heic", "1 without a suffix", "1 .png"))


def test_a_folder_that_cannot_be_listed(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: Path) -> object:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"images/cats/deep cannot be listed \(Permission denied\); make it readable"):
        list_images(images)


def test_some_of_many_names() -> None:
    assert name_some(list("abc")) == "a, b, c"
    assert name_some(list("abcde")) == "a, b, c and 2 more"


# Classes


@pytest.mark.parametrize("more", [(), ("--skip-unreadable",)])
def test_a_class_nobody_can_read_is_refused(
    own_photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    """With --skip-unreadable it became a class without samples, which the model learns nothing about."""
    (own_photos / "birds").mkdir()
    for number in range(3):
        (own_photos / "birds" / f"{number}.png").write_text("no image")
    match = r"none of the 3 images in class folder .*photos/birds can be read \(birds/0.png: cannot identify .*; repair"
    refused(capsys, command(own_photos, vae_path, tmp_path / "out", *more), match)
    assert not (tmp_path / "out" / "index.json").exists()
