"""README.md, CONTRIBUTING.md, docs/: what they name exists, what they list is the code's, their examples compile."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import FENCED, PAGES, QUOTED, blocks, quoted, rows_of, text_of
from repository import ROOT
from test_structure import ANYONE, IMPORTS, tracked

from sra2_fast import cli
from sra2_fast.checkpoints import training as checkpoints
from sra2_fast.data.layouts import shards
from sra2_fast.train import TrainOptions
from sra2_fast.train.options import fixed_on_resume

sys.path.insert(0, str(ROOT / "benchmarks"))

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
COMMAND = re.compile(r"(sra2-fast [a-z-]+|python benchmarks/\w+\.py|pytest benchmarks/)([^|&;]*)")
TOPS = {name.split("/")[0] for name in tracked()}
WRITTEN_BY_RUNS = ("runs/", "build/", "step-", "checkpoints/step-")
OTHERS_OPTIONS = {"--mixed-precision", "--version", "--help"}  # accelerate's, and those of every command


def missing_paths(text: str, folder: Path = ROOT) -> list[str]:
    """The relative links, headings included, and the quoted paths of a page that do not exist."""
    text = FENCED.sub("", text)
    links = [link for link in LINK.findall(text) if "://" not in link]
    named = [word for word in QUOTED.findall(text) if looks_like_a_path(word)]
    return [link for link in links if not is_there(folder, *link.split("#"))] + [
        path for path in named if not (ROOT / path).exists()
    ]


def is_there(folder: Path, path: str, heading: str = "") -> bool:
    """Whether a file exists and has a heading whose anchor is this."""
    if not (folder / path).exists() or not heading:
        return (folder / path).exists()
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", (folder / path).read_text()), re.M)
    return heading in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]


def looks_like_a_path(word: str) -> bool:
    """A file or folder of the repository, by its first part or its ending; `train.py` alone is another repository's."""
    if re.search(r"[\s<>*{}()=,:]", word) or word.startswith(WRITTEN_BY_RUNS):
        return False
    first, _, rest = word.partition("/")
    if first in TOPS:
        return bool(rest or "." in first)
    return word.endswith(".md") or bool(rest and word.endswith((".py", ".toml", ".cpp", ".h", ".cu")))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page: str) -> None:
    assert not missing_paths(text_of(page), (ROOT / page).parent)


def test_the_check_of_paths_can_fail() -> None:
    wrong = "[a](docs/nothing.md), [b](docs/data.md#nothing) and `sra2_fast/nothing.py`, `nothing.md`"
    assert missing_paths(wrong) == ["docs/nothing.md", "docs/data.md#nothing", "sra2_fast/nothing.py", "nothing.md"]
    right = (
        "`B / N`, `runs/a.png`, [b](https://x.org/y.md), [c](docs/data.md#the-format), `docs/data.md`, `sra2_fast.ops`"
    )
    assert missing_paths(right) == []


def test_every_page_is_linked_from_the_readme() -> None:
    readme = text_of("README.md")
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in readme, f"README.md has no link to {page}"


def cited(text: str) -> list[str]:
    """Paths of the repository in the comments and words of code, and pages that lie outside of it."""
    paths = r"(?<![\w/.{<-])(?:sra2_fast|kernels|csrc|tests|benchmarks|configs|docs)/[\w/-]+\.(?:py|cpp|cu|h|md|toml)\b"
    return re.findall(rf"{paths}|\bDESIGN\b|\bSTYLE\.md|\bFIELD\.md", text)


def test_nothing_cites_what_is_not_in_the_repository() -> None:
    """Comments used to cite a design page that lay outside of it, and a file that had moved."""
    plant = {"tests/test_docs.py", "tests/test_structure.py"}
    for name in set(tracked("*.py", "*.cpp", "*.cu", "*.h", "*.md", "*.toml", "Makefile")) - plant:
        for found in cited(text_of(name)):
            assert (ROOT / found).is_file(), f"{name} cites {found}"
    assert cited("see sra2_fast/nothing.py, DESIGN section 1") == ["sra2_fast/nothing.py", "DESIGN"]


def python_blocks() -> Iterator[Any]:
    for page in PAGES:
        for number, body in enumerate(blocks(page, "python"), start=1):
            yield pytest.param(body, id=f"{page}-{number}")


@pytest.mark.parametrize("body", list(python_blocks()))
def test_examples_compile_and_their_imports_work(body: str) -> None:
    tree = ast.parse(body)
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    compile(body, "example", "exec")
    exec(compile(tree, "imports", "exec"), {})


def test_what_may_change_on_resume_is_the_codes_list() -> None:
    told = {name for row in rows_of("docs/guide.md", "Going on") for name in QUOTED.findall(row[0])}
    names = TrainOptions.__dataclass_fields__
    assert told == {"--" + name.replace("_", "-") for name in names if not fixed_on_resume(name)}


def test_formats_have_the_versions_that_are_told() -> None:
    told = {row[0]: row[1] for row in rows_of("docs/versions.md", "Formats")}
    assert told["checkpoint of a run"] == str(checkpoints.FORMAT)
    assert told["latents"] == str(shards.VERSION)


def test_the_diagram_of_rooms_is_the_import_order() -> None:
    (diagram,) = blocks("docs/architecture.md", "mermaid")
    drawn = {}
    for line in diagram.splitlines()[1:]:
        room, _, others = line.partition("-->")
        drawn[room.strip()] = {other.strip() for other in others.split("&")}
    held = {room: others for room, others in IMPORTS.items() if others and room not in (*ANYONE, "__init__")}
    assert drawn == held
    for room in ANYONE:
        assert f"`{room}`" in text_of("docs/architecture.md")


def test_adding_an_op_names_every_file_of_the_one_it_walks_through() -> None:
    op = "layer_norm_modulate"
    named = text_of("CONTRIBUTING.md")
    files = [name for name in tracked() if re.search(rf"(?<!residual_){op}", name) and "/results/" not in name]
    assert len(files) >= 8
    assert not [name for name in files if f"`{name}`" not in named]


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """(program, options) of every command in a block or in backticks, such as `sra2-fast train --lr 1`."""
    for text in blocks(page, "sh") + quoted(page):
        for line in text.splitlines():
            for program, rest in COMMAND.findall(line.partition("   #")[0]):
                yield program, OPTION.findall(rest)


@functools.cache
def options_of(program: str) -> set[str]:
    """Every option that a program takes, asked of its own parser."""
    if program.startswith("sra2-fast "):
        parser = argparse.ArgumentParser()
        importlib.import_module(cli.COMMANDS[program.removeprefix("sra2-fast ")][0]).add_arguments(parser)
        return {name for action in parser._actions for name in action.option_strings}
    if program.startswith("pytest "):
        return set(re.findall(r'addoption\("(--[a-z-]+)"', text_of("benchmarks/conftest.py")))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        importlib.import_module(Path(program).stem).main(["--help"])
    return set(OPTION.findall(printed.getvalue()))


def test_every_option_that_is_named_exists() -> None:
    known: dict[str, set[str]] = {f"sra2-fast {name}": options_of(f"sra2-fast {name}") for name in cli.COMMANDS}
    seen = 0
    for page in PAGES:
        for program, options in commands(page):
            if program not in known:
                known[program] = options_of(program)
            unknown = set(options) - known[program] - OTHERS_OPTIONS
            assert not unknown, f"{page}: {program} has no {unknown}"
            seen += len(options)
    assert seen > 10
    anywhere = set().union(*known.values(), OTHERS_OPTIONS)
    for page in PAGES:
        for word in quoted(page):
            if word.startswith("--"):
                assert set(OPTION.findall(word)) <= anywhere, f"{page}: no command has {word}"


def test_every_target_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M))
    named = {
        target
        for page in PAGES
        for text in blocks(page, "sh") + quoted(page)
        for target in re.findall(r"^make ([a-z-]+)", text, re.M)
    }
    assert {"check", "test", "demo"} <= named <= targets


PLANTED = ("`sra2-fast train --wrong 1`", "```sh\npython benchmarks/plot.py --wrong\n```\n", "`--wrong`")


@pytest.mark.parametrize("wrong", PLANTED)
def test_the_check_of_options_can_fail(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setitem(globals(), "PAGES", ["planted.md"])
    monkeypatch.setattr("pages.text_of", lambda page: wrong + "`sra2-fast info --json`" * 11)
    with pytest.raises(AssertionError, match=r"planted\.md: .*--wrong"):
        test_every_option_that_is_named_exists()
