"""`sra2-fast convert`: checkpoints of the public repositories into a run of ours, and models of ours into their files.

What it writes as ours is what `sra2-fast train` writes, a folder with `checkpoints/step-XXXXXXXX/`, so that everything
that opens a run opens it. Averages come along, and of REPA, REPA-E and SRA the optimizer's state, so that their runs go
on with `--resume`; `--init` starts a new one from any of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .checkpoints import OpenedWeights
    from .checkpoints.configuration import Told

SOURCES = ("auto", "sit", "repa", "sra", "repa-e", "lightningdit", "sra2_fast")
LAYOUTS = ("sra2_fast", "sit", "repa")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sra2-fast convert`."""
    parser.add_argument("checkpoint", metavar="FILE", help="a .pt or .safetensors file, or a run or checkpoint of ours")
    parser.add_argument("--out", metavar="PATH", required=True, help="a new folder; with --to sit or repa a new file")
    parser.add_argument("--to", choices=LAYOUTS, default="sra2_fast", help="whose it becomes [%(default)s]")
    parser.add_argument("--source", choices=SOURCES, default="auto", help="whose it is [%(default)s: by looking]")
    parser.add_argument("--num-heads", type=int, metavar="INT", help="where the sizes are not public ones")
    parser.add_argument("--num-classes", type=int, metavar="INT", help="without the null label, where not recorded")
    parser.add_argument("--input-size", metavar="H,W", help="of a latent that is not square")
    parser.add_argument("--align-depth", type=int, metavar="INT", help="block the projector reads, where not recorded")


def run(args: argparse.Namespace) -> int:
    """Write --out and say what it is. 0; raises InputError for bad input, and then nothing is left of --out."""
    from .checkpoints.configuration import Told

    told = Told(args.num_heads, args.num_classes, _input_size(args.input_size), args.align_depth)
    if args.to == "sra2_fast":
        print(_to_ours(Path(args.checkpoint), Path(args.out), args.source, told))
    else:
        print(_to_public(Path(args.checkpoint), Path(args.out), args.source, told, args.to))
    return 0


def _to_ours(file: Path, out: Path, source: str, told: Told) -> str:
    from . import backends
    from .checkpoints import list_checkpoints, save_checkpoint
    from .checkpoints.configuration import registry_name
    from .checkpoints.converting import convert_optimizer
    from .checkpoints.opening import convert_weights
    from .checkpoints.reading import read_public

    if list_checkpoints(out / "checkpoints"):
        raise InputError(f"convert: --out {out} already holds a run; choose another folder")
    if file.is_dir() and any((file / name).exists() for name in ("checkpoints", "state.json", "config.json")):
        raise InputError(f"convert: {file} is of ours already; give --to sit or --to repa")
    checkpoint = read_public(file)
    opened = {name: convert_weights(checkpoint, file, name, source, told) for name in checkpoint.weights}
    about = opened.get("model") or opened["ema"]
    config = about.config
    notes = list(about.notes)
    state: dict[str, Any] = {
        "model": config,
        "run": {
            "model": registry_name(config),
            "num_classes": config["num_classes"],
            "qk_norm": config["qk_norm"],
            "label_dropout": config["class_dropout_prob"],
            "align_depth": config.get("align_depth"),
            **({} if about.path is None else {"path": about.path}),
        },
        "latents": opened.get("ema", about).latents,  # REPA-E's statistics, as its own sampler takes them
        "converted_from": {"file": file.name, "source": about.source},
        "versions": backends.versions(),
    }
    optimizer = None
    if checkpoint.optimizer is not None and "model" in opened and about.source in ("repa", "repa-e", "sra"):
        try:
            optimizer, rest = convert_optimizer(checkpoint.optimizer, checkpoint.weights["model"], f"checkpoint {file}")
            state |= {"optimizer": rest, "pending": []}
        except InputError as error:
            notes.append(f"without the optimizer's state ({str(error).removeprefix(f'checkpoint {file}: ')})")
    elif checkpoint.optimizer is not None:
        notes.append(f"without the optimizer's state, whose second moments of {about.source} have no exact conversion")
    ema = opened["ema"].state if "ema" in opened and "model" in opened else None
    written = save_checkpoint(
        out / "checkpoints", about.step, model=about.state, ema=ema, optimizer=optimizer, state=state
    )
    return _report(written, about, notes)


def _to_public(file: Path, out: Path, source: str, told: Told, layout: str) -> str:
    from .checkpoints.converting import from_ours
    from .checkpoints.opening import open_weights
    from .checkpoints.writing import PUBLIC_SUFFIXES, write_public

    if out.suffix not in PUBLIC_SUFFIXES:
        raise InputError(f"convert: --out {out} must end in {' or '.join(PUBLIC_SUFFIXES)} for --to {layout}")
    if out.exists():
        raise InputError(f"convert: --out {out} exists; choose another file")
    averaged = open_weights(file, "ema", source, told)
    trained = open_weights(file, "model", source, told)
    left_out = [name for name in averaged.state if name.startswith("projector.")]
    weights = {"model": from_ours(trained.state, layout), "ema": from_ours(averaged.state, layout)}
    kept = any(name.startswith("projectors.") for name in weights["ema"])
    notes = [*averaged.notes, *(["without its projector"] if left_out and not kept else [])]
    write_public(out, weights, averaged.step)
    return _report(out, averaged, notes)


def _report(written: Path, about: OpenedWeights, notes: list[str]) -> str:
    from .checkpoints.configuration import registry_name

    config = about.config
    size = config["input_size"]
    sides = (size, size) if isinstance(size, int) else size
    latent = "x".join(map(str, (config["in_channels"], *sides)))
    what = f"{registry_name(config)} of {about.source}, {config['num_classes']} classes, latents {latent}"
    return "\n".join([f"{written}: {what}, step {about.step}", *notes])


def _input_size(text: str | None) -> list[int] | None:
    if text is None:
        return None
    sides = text.split(",")
    if len(sides) not in (1, 2) or not all(side.strip().isdecimal() for side in sides):
        raise InputError(f"convert: --input-size must be a number, or height,width such as 32,64, got {text}")
    return [int(side) for side in sides]


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
