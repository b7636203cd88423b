"""Write the tensors of an adapter_model.bin, which peft pickled, as adapter_model.safetensors:

    minipeft convert downloaded/films checkpoints/films

The .bin is read as loading reads it: nothing in it is run, and a file with anything but tensors is refused. Neither the
.bin nor any other file is changed, replaced or deleted. Converting is not needed for loading: every command reads both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minipeft.commands.options import new_parser
from minipeft.methods.folder import convert


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    parser.add_argument("folder", type=Path, help="an adapter's: adapter_config.json and adapter_model.bin")
    parser.add_argument("output", type=Path, nargs="?", help="where to write; default: into the same folder")
    return parser.parse_args(words)


def main(words: Sequence[str], program: str) -> None:
    arguments = parse(words, program)
    for path in convert(arguments.folder, arguments.output or arguments.folder):
        print(f"wrote {path}, {path.stat().st_size:,} bytes")
