"""Tensors from a file of torch.save, such as adapter_model.bin: checked on paper, then read by torch.

A pickle is a program. It pushes values onto a stack and calls functions by name, and whoever wrote the file chose the
names. torch's restricted reader (`weights_only=True`) calls a short list of functions only. But it believes the sizes
that the program claims, and some functions of the list take as much memory as they are told to.

So the program is first followed on paper: each value that it would make is noted, and none is made. Whatever is no
tensor is refused by its name, every size is held against the file, and only then torch's reader gets the file.

    archive/data.pkl     the program: {"name": tensor(storage "0", offset, size, stride), ...}
    archive/data/0       the values of storage "0"

Files from before torch 1.6 have the same program, after three short ones and before the values, and no archive.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from minipeft.errors import AdapterError, first_few

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C                    # what a file from before torch 1.6 begins with
_ITEM_SIZES = {"torch.DoubleStorage": 8, "torch.LongStorage": 8, "torch.FloatStorage": 4, "torch.IntStorage": 4,
               "torch.HalfStorage": 2, "torch.BFloat16Storage": 2, "torch.ShortStorage": 2, "torch.CharStorage": 1,
               "torch.ByteStorage": 1, "torch.BoolStorage": 1}
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_TABLE = "collections.OrderedDict"
_CALLS = "it calls "
# Names may share values, which are stored once: for so many bytes beyond the file's own.
_SHARED = 1 << 28


class Name(NamedTuple):
    """A function, a class, or what it would make: nothing is known of it but its name."""

    text: str


class Storage(NamedTuple):
    """Values that lie in the file one after the other."""

    key: str
    count: int
    item_size: int


class Claim(NamedTuple):
    """A tensor that the program would make: a view of a storage. `size` and `stride` count values."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


Made = Name | Storage | Claim


def read_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, by name, on the CPU.

    Args:
        content: the file's.
        path: what to call it in an error.

    Raises:
        AdapterError: it is damaged, claims more than it holds, or holds anything but tensors by name.
    """
    try:
        found, made, sizes = _in_archive(content) if content[:4] == b"PK\x03\x04" else _before_archives(content)
        problems = _problems(found, sizes, len(content))
        problems += [problem for problem in _elsewhere(made, sizes)
                     if not any(problem.removeprefix(_CALLS) in told for told in problems)]
    except Exception as error:  # whatever zipfile, pickletools and a program of nonsense raise
        raise _damaged(path, error) from error
    if problems:
        told = first_few([_one_line(problem) for problem in problems])
        raise AdapterError(f"{path} is refused, and nothing in it was run: {told}. It should hold tensors by name and "
                           "nothing else, as peft writes it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and storage classes
            tensors = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises: RuntimeError, UnpicklingError, EOFError ...
        raise _damaged(path, error) from error
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _damaged(path: Path, error: Exception) -> AdapterError:
    reason = str(error).rpartition("WeightsUnpickler error:")[2]  # of torch's advice, the part on this file
    return AdapterError(f"{path} is truncated or not a file of torch.save: "
                        f"{_one_line(f'{type(error).__name__}: {reason}')}")


def _one_line(text: str) -> str:
    """A text that may come from the file, fit for an error's one line."""
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


# --- the file ---------------------------------------------------------------------------------------------------------

def _in_archive(content: bytes) -> tuple[Any, list[Made], dict[str, int]]:
    """(what the program leaves, all that it makes on the way, bytes that the file has of each storage).

    Raises:
        ValueError: a part that is compressed or there twice, or parts that are larger than the file together.
    """
    with zipfile.ZipFile(BytesIO(content)) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1 for part in parts):
            raise ValueError("a part is compressed or encrypted")
        if len({part.filename.lower() for part in parts}) < len(parts):
            raise ValueError("two parts have one name")
        if sum(part.file_size for part in parts) > len(content):
            raise ValueError("its parts claim more bytes than it holds")
        root = parts[0].filename.partition("/")[0] if parts else ""
        found, made = follow(BytesIO(archive.read(f"{root}/data.pkl")))
    before = f"{root}/data/"
    sizes = {part.filename.removeprefix(before): part.file_size for part in parts if part.filename.startswith(before)}
    return found, made, sizes


def _before_archives(content: bytes) -> tuple[Any, list[Made], dict[str, int]]:
    """As `_in_archive`, of a file from before torch 1.6, where a storage's claim is all that says how long it is.

    Raises:
        ValueError: the storages claim more than the file has left after its programs.
    """
    stream = BytesIO(content)
    found, made = follow(stream)
    if found != _MAGIC_NUMBER:
        return found, made, {}  # somebody's own pickle: it holds no tensor that could be read
    # The protocol's version, the machine that wrote it, what there is, and the storages' keys in their order.
    programs = [follow(stream) for _ in range(4)]
    found, made = programs[2][0], [one for _, more in programs for one in more]
    sizes = {one.key: one.count * one.item_size for one in made if isinstance(one, Storage)}
    if sum(sizes.values()) > len(content) - stream.tell():
        raise ValueError(f"its storages claim {sum(sizes.values()):,} bytes, it holds {len(content) - stream.tell():,}")
    return found, made, sizes


def _problems(found: Any, sizes: dict[str, int], file_size: int) -> list[str]:
    """What keeps the values from being tensors that the file holds."""
    if not isinstance(found, dict):
        return [f"it is {_kind(found)}, not tensors by name"]
    problems = [f"{name} {problem}" for name, value in found.items() if (problem := _problem(value, sizes))]
    total = 0 if problems else sum(prod(claim.size) * claim.storage.item_size for claim in found.values())
    if total > file_size + _SHARED:
        problems = [f"its tensors claim {total:,} bytes together, the file holds {file_size:,}"]
    return problems


def _problem(value: Any, sizes: dict[str, int]) -> str | None:
    """What keeps one value from being a tensor within a storage that the file holds."""
    if not isinstance(value, Claim):
        return f"is {_kind(value)}, not a tensor"
    storage, offset, size, stride = value
    if not len(size) == len(stride) <= 64 or any(type(number) is not int or number < 0
                                                 for number in (storage.count, offset, *size, *stride)):
        return "is of an impossible size"  # what stands there instead may be endless
    claimed, held = storage.count * storage.item_size, sizes.get(storage.key, 0)
    if claimed != held:
        return f"claims a storage of {claimed:,} bytes, the file holds {held:,}"
    last = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride))
    if prod(size) and last > storage.count:
        return f"claims {last:,} values of a storage of {storage.count:,}"
    return None


def _elsewhere(made: list[Made], sizes: dict[str, int]) -> list[str]:
    """What is wrong with what the program makes on the way, whether or not it is there at the end."""
    problems = []
    for one in made:
        if isinstance(one, Name):
            problems.append(_CALLS + one.text)
        elif isinstance(one, Claim):
            problems.append(_problem(one, sizes))
        elif one.count * one.item_size != sizes.get(one.key, 0):
            problems.append(f"claims a storage of {one.count * one.item_size:,} bytes, the file holds "
                            f"{sizes.get(one.key, 0):,}")
    return [problem for problem in dict.fromkeys(problems) if problem]


def _kind(value: Any) -> str:
    return value.text if isinstance(value, Name) else "a tensor" if isinstance(value, Claim) else type(value).__name__


# --- the program ------------------------------------------------------------------------------------------------------

_PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING",
           "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def follow(stream: BinaryIO) -> tuple[Any, list[Made]]:
    """What a pickle would leave, where a tensor is a `Claim` and what any other function makes is its `Name`; and all
    of these that it makes on the way. No function is imported or called.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: no pickle, or one that torch.save does not write.
    """
    stack, marks, memo, made = [], [], {}, []
    for opcode, argument, _ in pickletools.genops(stream):
        code = opcode.name
        if code in _PUSHED:
            stack.append(argument)
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if code == "EMPTY_DICT" else [])
        elif code == "MARK":
            marks.append(len(stack))
        elif code in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(_taken(stack, marks.pop() if code == "TUPLE" else len(stack) - int(code[-1]))))
        elif code in ("APPEND", "APPENDS"):
            items = _taken(stack, marks.pop() if code == "APPENDS" else len(stack) - 1)
            stack[-1].extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = _taken(stack, marks.pop() if code == "SETITEMS" else len(stack) - 2)
            _put(stack[-1], items)
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            words = argument.split(" ") if code == "GLOBAL" else _taken(stack, len(stack) - 2)
            stack.append(Name(".".join(word[:100] for word in words)))  # which the program may repeat without end
        elif code in ("REDUCE", "NEWOBJ"):
            stack.append(_called(*_taken(stack, len(stack) - 2), made))
        elif code == "BUILD":
            _taken(stack, len(stack) - 1)
            if isinstance(stack[-1], Claim):  # of a table it is what torch notes beside a state_dict
                raise ValueError("a tensor that is changed after it is made")
        elif code == "BINPERSID":
            stack.append(_storage(stack.pop()))
            made.append(stack[-1])
        elif code not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"the instruction {code}, which torch.save does not write")
    return stack.pop(), made


def _taken(stack: list[Any], start: int) -> list[Any]:
    """The items from `start` on, taken off the stack.

    Raises:
        ValueError: there are fewer.
    """
    if not 0 <= start <= len(stack):
        raise ValueError("the stack is empty")
    items = stack[start:]
    del stack[start:]
    return items


def _put(table: dict[str, Any], items: list[Any]) -> None:
    """Keys and values in turn into a table."""
    for key, value in zip(items[::2], items[1::2]):
        if not isinstance(key, str):
            raise TypeError(f"a name is of type {_kind(key)}, not a text")
        table[key] = value


def _called(function: Any, arguments: Any, made: list[Made]) -> Any:
    """What a call would make; a tensor, and what is refused, is added to `made`."""
    if function == Name(_TABLE) and arguments == ():
        return {}
    if function == Name(_PARAMETER) and isinstance(arguments[0], Claim):
        return arguments[0]
    if function == Name(_TENSOR) and isinstance(arguments[0], Storage):
        made.append(Claim(*arguments[:4]))
    elif function == Name(_TENSOR) and isinstance(arguments[0], Name):  # of a kind of storage that is not read here
        made.append(arguments[0])
    else:
        made.append(Name(_kind(function)))
    return made[-1]


def _storage(identifier: Any) -> Any:
    """The storage that a persistent id means: ("storage", its class, its key, a device, how many values)."""
    word, kind, key, _, count, *view = identifier
    if word != "storage" or not isinstance(key, str) or type(count) is not int or view not in ([], [None]):
        raise ValueError("a storage that torch.save does not write")
    return Storage(key, count, _ITEM_SIZES[kind.text]) if kind.text in _ITEM_SIZES else kind
