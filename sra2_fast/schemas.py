"""The JSON files that are read back, as types: what may stand where, in one place for every format.

    index.json    of a folder of latents (data/layouts/shards.py)
    features.json of features beside latents (data/layouts/feature_shards.py)
    state.json    of a checkpoint (checkpoints/training.py)
    choices.json  of the user's cache folder (choices.py)

A file of ours also proves itself: its entry `seal` is the SHA-256 of all its others, so that a digit or a letter that
changed on the disk is noticed. Files of earlier versions have none and are read without. Unknown entries are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, Strict, TypeAdapter, ValidationError, model_validator

from .errors import InputError

SEAL = "seal"
_ALGORITHM = "sha256:"
LARGEST_JSON_BYTES = 1 << 30
LONGEST_VALUE = 60  # characters of a wrong value that a message shows

# Strict: a true is no 1, and "4" no 4; a whole number is a float. A bound keeps NaN and infinity out.
Text = Annotated[str, Strict()]
Count = Annotated[int, Strict(), Field(ge=0, le=2**48)]
Size = Annotated[int, Strict(), Field(ge=1, le=2**20)]
Classes = Annotated[int, Strict(), Field(ge=1, le=2**31 - 1)]
Sha256 = Annotated[str, Strict(), Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Strict(), Field(pattern=r"^[^/\\\x00]{1,255}$")]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
FromZero = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Shift = Annotated[float, Strict(), Field(ge=-1e9, le=1e9)]
Scale = Annotated[float, Strict(), Field(ge=1e-9, le=1e9)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1)]


class VaeEntry(BaseModel):
    """Which autoencoder latents were made with."""

    name: Text | None = None
    fingerprint: Text | None = None


class ShardEntry(BaseModel):
    """A shard's line in index.json."""

    file: FileName
    samples: Count
    bytes: Count
    checksum: Sha256
    unreadable: list[Text] = []


class Index(BaseModel):
    """index.json."""

    shape: tuple[Size, Size, Size]
    num_classes: Classes
    class_names: list[Text] | None
    vae: VaeEntry | None
    shift: list[Shift]
    scale: list[Scale]
    shards: list[ShardEntry]
    has_flips: Annotated[bool, Strict()] = False
    has_posterior: Annotated[bool, Strict()] = True
    has_labels: Annotated[bool, Strict()] = True
    precision: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _agree(self) -> Index:
        if len(self.shift) != self.shape[0] or len(self.scale) != self.shape[0]:
            raise ValueError("shape, shift and scale disagree")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError("class_names and num_classes disagree")
        return self


class FeatureEntry(BaseModel):
    """A file's line in features.json."""

    file: FileName
    samples: Count
    bytes: Count
    checksum: Sha256


class FeatureIndex(BaseModel):
    """features.json."""

    encoder: Text
    fingerprint: Text
    tokens: Size
    width: Size
    has_flips: Annotated[bool, Strict()]
    latents: Sha256  # the digest of the latents they belong to
    files: list[FeatureEntry]


class ParamGroup(BaseModel):
    """One group of the optimizer; `params` are names, numbers in the first checkpoints."""

    params: list[Text | Count]
    lr: FromZero
    betas: tuple[Share, Share]
    eps: FromZero
    weight_decay: FromZero


class OptimizerEntry(BaseModel):
    """The optimizer's numbers in state.json."""

    param_groups: Annotated[list[ParamGroup], Field(min_length=1)]


class State(BaseModel):
    """state.json; what `sra2-fast train` adds to it may be missing."""

    format: Count
    step: Count
    files: dict[FileName, Count]
    sha256: dict[FileName, Sha256] = {}
    model: dict[Text, Any] = {}
    run: dict[Text, Any] = {}
    optimizer: OptimizerEntry | None = None
    pending: list[list[Number]] = []
    choices: dict[Text, Text] = {}


class Measured(BaseModel):
    """What was the fastest, and the milliseconds of every candidate."""

    name: Text
    ms: dict[Text, FromZero]


class Choices(BaseModel):
    """choices.json; a key is what was asked, as JSON."""

    format: Literal[1]
    choices: dict[Text, Measured]


T = TypeVar("T")


class Damaged(InputError):
    """A file is not what was written: what is in it cannot be relied on."""


def read_json(path: Path) -> Any:
    """What the file holds. Raises Damaged with the reason alone: the caller knows what to do about it."""
    if not os.path.isfile(path):  # a FIFO would wait for a writer
        raise Damaged("is no regular file")
    try:
        if os.path.getsize(path) > LARGEST_JSON_BYTES:
            raise Damaged(f"has {os.path.getsize(path)} bytes")
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise Damaged("is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise Damaged(f"cannot be read ({error})") from error


def as_type(record: Any, kind: type[T]) -> T:
    """`record` as `kind`, every value checked. Raises Damaged with the reason alone."""
    try:
        checked: T = _adapter(kind).validate_python(record)  # type: ignore[arg-type]
        return checked
    except ValidationError as error:
        raise Damaged(f"is damaged ({_first_of(error)})") from error


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_of(error: ValidationError) -> str:
    """`shards[3].samples: input should be a valid integer, got 'x'`."""
    about = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in about["loc"]).removeprefix(".")
    if about["type"] == "value_error":
        return str(about["ctx"]["error"])
    if about["type"] == "missing":
        return f"{where} is missing"
    got = " ".join(repr(about["input"]).split())
    got = got if len(got) <= LONGEST_VALUE else got[:LONGEST_VALUE] + "..."
    words = about["msg"][0].lower() + about["msg"][1:]
    return f"{where}: {words}, got {got}" if where else f"{words}, got {got}"


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON gives it back, with its seal."""
    written = {name: value for name, value in json.loads(json.dumps(record)).items() if name != SEAL}
    return {**written, SEAL: _seal_of(written)}


def must_be_whole(record: Any) -> None:
    """Raises Damaged where a sealed record is not as it was written. One without a seal is of an earlier version."""
    if not isinstance(record, dict):
        raise Damaged("is damaged (no JSON object)")
    # Looked for by name and by value: a changed letter in the one leaves the other.
    is_sealed = SEAL in record or any(isinstance(x, str) and x.startswith(_ALGORITHM) for x in record.values())
    rest = {name: value for name, value in record.items() if name != SEAL}
    if is_sealed and record.get(SEAL) != _seal_of(rest):
        raise Damaged("is damaged (it is not what was written)")


def _seal_of(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return _ALGORITHM + hashlib.sha256(text.encode()).hexdigest()
