"""`sra2-fast prepare`: zip archives, labels from a table, names of classes, and images without any."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from photos import COUNT, command, contents, refused

from sra2_fast.cli import main
from sra2_fast.data import open_data
from sra2_fast.errors import InputError
from sra2_fast.prepare.listing import list_images
from sra2_fast.prepare.stores import ZipStore

pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")
pytest_plugins = ["photos"]
REPA = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png"]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def packed(path: Path, **files: bytes | str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def zipped(folder: Path, path: Path, top: str = "", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{top}{file.relative_to(folder)}")
    return path


def fails(match: str, path: Path, **options: object) -> None:
    with pytest.raises(InputError, match=match) as caught:
        list_images(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# Zip archives


def test_a_zip_archive_gives_the_latents_of_the_folder(
    photos: Path, vae_path: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit; also from worker processes, which share the archive's file with their parent by default."""
    plain = zipped(photos, tmp_path / "photos.zip")
    below = zipped(photos, tmp_path / "below.zip", "photos/", zipfile.ZIP_DEFLATED)
    for archive, workers in ((plain, "2"), (below, "0")):
        out = tmp_path / archive.stem
        assert main(command(archive, vae_path, out, "--num-workers", workers)) == 0
        shards = {name: data for name, data in contents(whole).items() if name.endswith(".safetensors")}
        assert {name: data for name, data in contents(out).items() if name in shards} == shards
        assert main(command(archive, vae_path, out)) == 0
        assert "already complete, all checksums right: 14 latents" in capsys.readouterr().out
    changed = shutil.copytree(photos, tmp_path / "changed")
    shutil.copy(changed / "china" / "0.png", changed / "flower" / "0.png")
    zipped(Path(changed), plain)
    refused(capsys, command(plain, vae_path, tmp_path / "photos"), r"holds other images now \(flower/0.png was changed")


def test_what_lies_in_a_zip_archive(tmp_path: Path) -> None:
    names = {"cats/a.PNG": "", "cats/deep/b.jpg": "", "dogs/c.gif": "", "dogs/notes.txt": "", "readme.md": ""}
    hidden = {"__MACOSX/cats/._a.png": "", "cats/.hidden.png": "", ".git/x.png": ""}
    images = list_images(packed(tmp_path / "a.zip", **names, **hidden))
    assert images.files == ["cats/a.PNG", "cats/deep/b.jpg", "dogs/c.gif"] and images.labels.tolist() == [0, 0, 1]
    assert images.class_names == ["cats", "dogs"] and images.num_classes == 2
    assert images.notes == [
        "passed over 1 files in class folders that are no PNG, JPEG, WebP, GIF, BMP or TIFF by their names: 1 .txt"
    ]
    below = list_images(packed(tmp_path / "b.zip", **{f"train/{name}": "" for name in (*names, *hidden)}))
    assert (below.files, below.class_names) == (images.files, images.class_names)
    assert below.notes[0] == f"the images are those in train/ of {tmp_path / 'b.zip'}"
    one_class = list_images(packed(tmp_path / "c.zip", **{"cats/a.png": "", "cats/b.png": ""}))
    assert one_class.class_names == ["cats"] and one_class.files == ["cats/a.png", "cats/b.png"]


def test_archives_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK no archive")
    fails(r"--images .*a.zip is no zip archive that can be read \(File is not a zip file\)", tmp_path / "a.zip")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("cats/a.png", "1")
        archive.writestr("cats/a.png", "2")
    fails(r"--images .*b.zip holds cats/a.png twice; write it again", tmp_path / "b.zip")
    fails(r"--images .*c.zip is empty; it must hold a subfolder", packed(tmp_path / "c.zip"))
    fails(
        r"d.zip/a.png is in no class subfolder, like 0 others; .* --labels FILE",
        packed(tmp_path / "d.zip", **{"a.png": ""}),
    )
    with pytest.raises(FileNotFoundError, match=r"no nothing.png in .*c.zip"):
        ZipStore(tmp_path / "c.zip").read("nothing.png")


def test_a_damaged_file_in_an_archive_is_an_unreadable_image(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zipped(photos, tmp_path / "photos.zip")
    data = archive.read_bytes()
    inside = (photos / "china" / "2.png").read_bytes()
    archive.write_bytes(data.replace(inside, inside[:-20] + b"damaged!" + inside[-12:]))
    refused(
        capsys,
        command(archive, vae_path, tmp_path / "out"),
        r"1 of 14 images cannot be read: china/2.png \(Bad CRC-32 for file 'china/2.png'\)",
    )


# Labels from a table


@pytest.mark.parametrize("form", ["folder", "zip", "zip with a top folder"])
def test_repa_s_dataset_json_is_found(tmp_path: Path, form: str) -> None:
    """The folder and the archive that REPA's dataset_tools.py convert writes: the folders are no classes."""
    table = json.dumps({"labels": [[name, label] for name, label in zip(REPA, (6, 0, 6), strict=True)]})
    path = touch(tmp_path / "images", *REPA)
    (path / "dataset.json").write_text(table)
    if form != "folder":
        path = zipped(path, tmp_path / "images.zip", "" if form == "zip" else "images/")
    images = list_images(path)
    assert images.files == REPA and images.labels.tolist() == [6, 0, 6]
    assert (images.class_names, images.num_classes) == (None, 7)
    assert images.notes[-1].startswith("labels from ") and images.notes[-1].endswith("dataset.json: 2 classes")
    assert images.class_called(6) == f"class 6 of {path}"


def test_a_dataset_json_without_labels_is_one_class(tmp_path: Path) -> None:
    touch(tmp_path, *REPA)
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    images = list_images(tmp_path)
    assert images.labels.tolist() == [0, 0, 0] and images.num_classes == 1
    assert images.notes == [f"{tmp_path / 'dataset.json'} has no labels: all images are of one class, label 0"]


def test_latents_of_labelled_and_of_unlabelled_images(
    photos: Path, vae_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """End to end: labels, number and names of classes arrive at training; others later are refused."""
    flat = tmp_path / "flat"
    flat.mkdir()
    files = [file for file in sorted(photos.rglob("*")) if file.is_file()]
    for number, file in enumerate(files):
        shutil.copy(file, flat / f"{number:02d}{file.suffix}")
    table = tmp_path / "labels.csv"
    table.write_text(
        "file_name,split,label\n" + "".join(f"{path.name},train,{3 * (path.name >= '07')}\n" for path in flat.iterdir())
    )
    names = tmp_path / "names.csv"
    names.write_text('class,name\n0,sky\n1,"a, b"\n2,c\n3,petals\n4,unused\n')
    arguments = command(flat, vae_path, tmp_path / "out", "--labels", str(table), "--class-names", str(names))
    assert main(arguments) == 0
    assert "4 classes" in capsys.readouterr().out
    source = open_data(tmp_path / "out")
    assert (source.num_classes, source.class_names) == (4, ["sky", "a, b", "c", "petals"])
    assert sorted(source.read(np.arange(COUNT))[1].tolist()) == [0] * 7 + [3] * 7
    assert main(arguments) == 0
    before = contents(tmp_path / "out")
    for path, old, new in ((names, "sky", "cloud"), (table, "train,3", "train,2")):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        match = r"out is finished, with other labels or class names; give another --out, or remove .*index.json to"
        refused(capsys, arguments, match)
        path.write_text(text)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "index.json").unlink()
    names.write_text(names.read_text().replace("sky", "cloud"))
    assert main(arguments) == 0
    assert open_data(tmp_path / "out").class_names == ["cloud", "a, b", "c", "petals"]
    refused(
        capsys,
        command(flat, vae_path, tmp_path / "flat-out"),
        r"flat/00.* is in no class subfolder, like 13 others; .* or --ignore-labels to make one class of all",
    )
    assert main(command(flat, vae_path, tmp_path / "flat-out", "--ignore-labels")) == 0
    source = open_data(tmp_path / "flat-out")
    assert (source.num_samples, source.num_classes, source.class_names) == (COUNT, 1, None)
    refused(
        capsys, [*arguments, "--ignore-labels"], "--labels .* and --ignore-labels exclude each other; leave one out"
    )


@pytest.mark.parametrize(
    ("text", "labels", "class_names"),
    [
        ("a.png,dog\nb/c.png,cat\n", [1, 0], ["cat", "dog"]),
        ("\ufefffile,class\r\na.png,dog\r\nb\\c.png, cat\r\n", [1, 0], ["cat", "dog"]),
        ("class,path\n2,a.png\n\n0,b/c.png\n", [2, 0], None),
        ("a.png,2\nb/c.png,x\n", [0, 1], ["2", "x"]),
    ],
)
def test_csvs_of_labels(tmp_path: Path, text: str, labels: list[int], class_names: list[str] | None) -> None:
    images = touch(tmp_path / "images", "a.png", "b/c.png")
    (tmp_path / "l.csv").write_text(text, newline="")
    found = list_images(images, labels=tmp_path / "l.csv")
    assert found.files == ["a.png", "b/c.png"] and found.labels.tolist() == labels and found.class_names == class_names


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.png,0\n", "b.png has no label in .*l.csv, like 0 others of 2; add it there or remove it"),
        ("a.png,0\nb.png,0\nc.png,1\n", r"l.csv names c.png, which is no image in .*images \(like 0 others of 3\)"),
        ("a.png,0\na.png,1\nb.png,0\n", "--labels .*l.csv names a.png twice; write it once"),
        ("a.png,0\nb.png\n", "--labels .*l.csv, line 2: must be `file,class`, got 'b.png'"),
        ("a.png,0\nb.png, \n", "--labels .*l.csv, line 2: must be `file,class`, got 'b.png, '"),
        ("file,class\n", "--labels .*l.csv is empty; it must have lines `file,class`"),
        ("", "--labels .*l.csv is empty"),
        ('a.png,"0\n', "--labels .*l.csv is no CSV in UTF-8 .*; write it again"),
    ],
)
def test_bad_csvs_of_labels(tmp_path: Path, text: str, match: str) -> None:
    images = touch(tmp_path / "images", "a.png", "b.png")
    (tmp_path / "l.csv").write_text(text)
    fails(match, images, labels=tmp_path / "l.csv")


def test_bad_tables(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "a.png")
    (tmp_path / "latin.csv").write_bytes(b"a.png,\xe9\n")
    fails("--labels .*latin.csv is no CSV in UTF-8", images, labels=tmp_path / "latin.csv")
    fails(r"--labels .*none.csv cannot be read \(No such file", images, labels=tmp_path / "none.csv")
    (tmp_path / "l.json").write_text("[")
    fails("l.json cannot be read", images, labels=tmp_path / "l.json")
    (tmp_path / "l.json").write_text('{"labels": [["a.png", -1]]}')
    fails("l.json: label out of range: .*'a.png', -1", images, labels=tmp_path / "l.json")
    fails("--images .*empty holds no PNG", touch(tmp_path / "empty", "x.txt"), ignore_labels=True)


# Names of classes


def test_folders_get_the_names_of_a_csv(tmp_path: Path) -> None:
    """Labels stay in the order of the folders."""
    images = touch(tmp_path / "images", "n02/a.png", "n01/b.png")
    names = tmp_path / "names.csv"
    names.write_text('n02,snail\nn01,"tench, Tinca tinca"\nn03,other\n')
    found = list_images(images, class_names=names)
    assert found.files == ["n01/b.png", "n02/a.png"] and found.class_names == ["tench, Tinca tinca", "snail"]
    assert found.class_called(1) == f"class folder {images / 'n02'}"
    names.write_text("n02,snail\n")
    fails(
        "--class-names .*names.csv has no name for 1 of the 2 classes, such as n01; add a line `n01,NAME`",
        images,
        class_names=names,
    )
    names.write_text("n02,snail\nn02,slug\nn01,x\n")
    fails("--class-names .*names.csv names class n02 twice; write it once", images, class_names=names)
    fails("--class-names .*names.csv has nothing to name", images, class_names=names, ignore_labels=True)
