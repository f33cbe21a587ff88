"""A work file: what long measurements have found so far, a line of JSON for each piece of work."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..runtime import data_dir

__all__ = ["append", "fingerprints", "open_work"]


def fingerprints(pipe) -> dict[str, str]:
    """Short names for the weights that the figures depend on."""
    folders = {"model": Path(pipe.config._name_or_path), "oracle": data_dir() / "models" / "oracle"}
    return {name: hashlib.sha256((folder / "checksums.json").read_bytes()).hexdigest()[:16]
            for name, folder in folders.items()}


def open_work(path: Path, made_with: Mapping, key: Sequence[str]) -> dict[tuple, dict]:
    """What a work file holds, by the entries of `key`; a new file begins with what it is made with.

    A last line that was cut off is taken away.

    Raises
    ------
    ValueError
        If it was made with something else; the message names it.
    """
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, {"made_with": dict(made_with)})
    whole, _, cut_off = path.read_bytes().rpartition(b"\n")
    if cut_off:
        path.write_bytes(whole + b"\n")
    first, *lines = map(json.loads, whole.splitlines())
    for name, value in made_with.items():
        if first["made_with"].get(name) != value:
            raise ValueError(f"work: {path.name!r} was made with {name} {first['made_with'].get(name)!r}, not "
                             f"{value!r}; name another file, or delete it")
    return {tuple(line[name] for name in key): line for line in lines}


def append(path: Path, line: dict) -> None:
    """Add a line to a work file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")         # one write, so that two processes may share the file
