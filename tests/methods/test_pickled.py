"""pickled.py: adapter_model.bin is read where it holds tensors by name, and everything else in it is refused unrun."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from datetime import date
from pathlib import Path

import pytest
import torch

from minipeft.errors import AdapterError
from minipeft.methods.pickled import follow, read_tensors

PATH = Path("films/adapter_model.bin")
FORMATS = pytest.mark.parametrize("archive", [True, False], ids=["archive", "before torch 1.6"])
A = torch.arange(24.0).view(4, 6)


def saved(content, archive=True, **how):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=archive, **how)
    return file.getvalue()


def parts_of(content):
    """The parts of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(parts, compression=zipfile.ZIP_STORED):
    """An archive of (name, content) pairs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, part in parts:
            archive.writestr(name, part)
    return file.getvalue()


def with_program(content, old, new):
    """The archive with some bytes of its program replaced, which have to be there."""
    parts = parts_of(content)
    assert old in parts["archive/data.pkl"]
    return archived({**parts, "archive/data.pkl": parts["archive/data.pkl"].replace(old, new, 1)}.items())


def with_claim(content, number):
    """A file of the tensor A, whose storage claims to have another number of values than 24."""
    program = parts_of(content)["archive/data.pkl"] if content[:2] == b"PK" else content
    (claim,) = re.findall(rb"(?s)(?:cpuq|h).K\x18", program)
    changed = claim[:-2] + number
    return with_program(content, claim, changed) if content[:2] == b"PK" else content.replace(claim, changed)


def refusal(content):
    """The one line that the file is refused with."""
    with pytest.raises(AdapterError) as caught:
        read_tensors(content, PATH)
    line = str(caught.value)
    assert line.startswith(f"{PATH} is ") and "\n" not in line and len(line) < 2000
    return line


# --- read -------------------------------------------------------------------------------------------------------------

@FORMATS
@pytest.mark.kind("6: tensors of every kind in adapter_model.bin are read")
def test_tensors_of_every_kind_come_back_as_they_were(archive):
    tensors = {"float32": A, "float16": A.half(), "bfloat16": A.bfloat16(), "float64": A.double(), "int64": A.long(),
               "bool": A > 3, "a row": A[1], "turned": A.t(), "every other": A[::2, 1::3], "one number": A[2, 3],
               "empty": torch.zeros(0, 3), "no values": torch.zeros(0), "repeated": A[:1].expand(5, 6),
               "parameter": torch.nn.Parameter(A + 1), "with a gradient": (A + 2).requires_grad_()}
    found = read_tensors(saved(tensors, archive), PATH)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach()) and found[name].dtype == tensor.dtype, name
        assert type(found[name]) is torch.Tensor and not found[name].requires_grad, name


@FORMATS
@pytest.mark.parametrize("table", [dict, OrderedDict])
def test_tables_that_libraries_write_are_read(archive, table):
    state = torch.nn.Linear(2, 3).state_dict()  # which carries notes of its own beside the tensors
    for content in (state, table(state.items())):
        found = read_tensors(saved(content, archive), PATH)
        assert list(found) == ["weight", "bias"] and torch.equal(found["weight"], state["weight"])


@FORMATS
def test_names_that_share_values_are_read(archive):
    found = read_tensors(saved({"a": A, "b": A, "c": A.view(-1)[5:9]}, archive), PATH)
    assert torch.equal(found["a"], A) and torch.equal(found["b"], A) and found["c"].tolist() == [5, 6, 7, 8]


@FORMATS
def test_tensors_of_another_device_are_read_on_the_cpu(archive):
    content = saved({"a": A}, archive)
    elsewhere = (with_program(content, b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:7") if archive else
                 content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:7"))
    assert elsewhere != content
    assert read_tensors(elsewhere, PATH)["a"].device.type == "cpu"


# --- refused by name --------------------------------------------------------------------------------------------------

NO_TENSORS = {
    "a number": (3, "int"), "a text": ("text", "str"), "nothing": (None, "NoneType"), "a list": ([A], "list"),
    "a table": ({"weight": A}, "dict"), "a type": (torch.float32, "torch.float32"),
    "a shape": (torch.Size([2]), "torch.Size"), "sparse": (A.to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    "complex": (A.to(torch.complex64), "torch.ComplexFloatStorage"),
    "8 bits": (A.to(torch.float8_e4m3fn), "torch._utils._rebuild_tensor_v3"),
    "without values": (A.to("meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
    "a date": (date(2024, 1, 1), "datetime.date"),
    "a module": (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"),
    "a set": ({1}, "__builtin__.set"),
}


@FORMATS
@pytest.mark.parametrize(("value", "kind"), NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.kind("6: what is no tensor in adapter_model.bin is refused by name")
def test_what_is_no_tensor_is_refused_by_name(archive, value, kind):
    if not archive and isinstance(value, torch.nn.Module):
        pytest.skip("of a module that format holds the source text, too")
    line = refusal(saved({"score.weight": A, "extra.part": value}, archive))
    assert f"refused, and nothing in it was run: extra.part is {kind}, not a tensor" in line


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch is going to drop these
@FORMATS
def test_quantized_tensors_are_refused_by_name(archive):
    line = refusal(saved({"small": torch.quantize_per_tensor(A, 0.1, 0, torch.qint8)}, archive))
    assert "small is torch._utils._rebuild_qtensor, not a tensor" in line


@pytest.mark.parametrize(("content", "kind"), [([A], "list"), (A, "a tensor"), (5, "int"), (None, "NoneType")])
def test_a_file_of_something_else_is_refused(content, kind):
    assert f"it is {kind}, not tensors by name" in refusal(saved(content))


def test_all_that_is_wrong_is_told_at_once_and_long_names_are_cut():
    line = refusal(saved({"lr": 0.1, "step": 5, "a\nb" * 1000: 1, **{str(i): i for i in range(9)}}))
    assert "lr is float, not a tensor; step is int" in line and "and 6 more" in line


@pytest.mark.parametrize("name", [0, None, ("a", "b"), 1.5])
def test_names_have_to_be_texts(name):
    assert f"a name is of type {type(name).__name__}, not a text" in refusal(saved({name: A}))


# --- never run --------------------------------------------------------------------------------------------------------

class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("write", [saved, lambda content: saved(content, archive=False), pickle.dumps,
                                   lambda content: pickle.dumps(content, protocol=2)],
                         ids=["archive", "before torch 1.6", "pickle", "pickle of protocol 2"])
@pytest.mark.parametrize("place", ["alone", "among tensors", "in a table"])
@pytest.mark.kind("6: a program in adapter_model.bin is refused by the function's name, and not run")
def test_a_function_that_a_file_calls_is_named_and_not_called(tmp_path, write, place):
    call = Runs(os.mkdir, str(tmp_path / "made"))
    content = write({"alone": call, "among tensors": {"x": call}, "in a table": {"x": {"y": call}}}[place])
    line = refusal(content)
    assert f"{os.mkdir.__module__}.mkdir" in line and "nothing in it was run" in line
    assert not (tmp_path / "made").exists()
    if write is pickle.dumps:
        pickle.loads(content)
        assert (tmp_path / "made").exists()  # it would have worked


def test_functions_that_torch_itself_would_call_are_refused():
    """torch's restricted reader calls these, and they take as much memory as they are told to."""
    for call in (Runs(bytearray, 10**15), Runs(torch.Tensor, 10**15)):
        line = refusal(saved({"x": call}))
        assert "x is __builtin__.bytearray" in line or "x is torch.Tensor" in line
    table = saved(OrderedDict(x=A))
    call = b"cbuiltins\nbytearray\nK\x05\x85Rb."
    assert "run: it calls builtins.bytearray." in refusal(with_program(table, b"s.", b"s" + call))
    assert "a tensor that is changed after it is made" in refusal(with_program(table, b"s.", call))


def test_a_function_s_name_that_is_very_long_is_cut_where_it_is_made():
    """A program could repeat it without end."""
    word = b"X\xe8\x03\x00\x00" + b"a" * 1000
    found, _ = follow(io.BytesIO(b"\x80\x04" + word + word + b"\x93."))
    assert found.text == f"{'a' * 100}.{'a' * 100}"


# --- sizes ------------------------------------------------------------------------------------------------------------

def nested(depth):
    """Instructions that make a tuple of twice a tuple of twice a tuple: small in memory, endless when written out."""
    return b")" + b"".join(b"r%bj%b\x86" % (2 * (struct.pack("<I", 1000 + level),)) for level in range(depth))


NUMBER = {"a billion": b"J\x00\xca\x9a;", "10**15": b"\x8a\x07\x00\x80\xc6\xa4~\x8d\x03",
          "-1": b"J\xff\xff\xff\xff", "0": b"K\x00"}


@pytest.mark.parametrize("claimed", ["a billion", "10**15", "-1", "0"])
@pytest.mark.kind("6: a storage that claims more than adapter_model.bin holds is refused before it is allocated")
def test_a_storage_that_claims_another_size_than_the_file_holds_is_refused(claimed):
    line = refusal(with_claim(saved({"a": A}), NUMBER[claimed]))
    assert re.search(r"a claims a storage of [\d,]+ bytes, the file holds 96|a is of an impossible size", line)


@pytest.mark.parametrize(("old", "new", "told"), [
    (b"K\x04K\x06\x86", b"K\x04" + NUMBER["10**15"] + b"\x86", "a claims .* values of a storage of 24"),      # size
    (b"K\x06K\x01\x86", NUMBER["10**15"] + b"K\x01\x86", "a claims .* values of a storage of 24"),            # stride
    (b"K\x06K\x01\x86", b"K\x00K\x00\x86", None),                                             # one value, 24 times
    (b"K\x06K\x01\x86", NUMBER["-1"] + b"K\x01\x86", "a is of an impossible size"),
    (b"QK\x00K\x04", b"QK\x01K\x04", "a claims 25 values of a storage of 24"),                                # offset
    (b"K\x04K\x06\x86", NUMBER["10**15"] * 2 + b"\x86", "a claims .* values of a storage"),
    (b"K\x06K\x01\x86", b"K\x06\x85", "a is of an impossible size"),
    (b"K\x04K\x06\x86", b"K\x04N\x86", "a is of an impossible size"),
    (b"K\x04K\x06\x86", b"K\x04X\x01\x00\x00\x00b\x86", "a is of an impossible size"),
    (b"K\x04K\x06\x86", nested(25), "a is of an impossible size"),
    (b"X\x07\x00\x00\x00storage", nested(25), "ValueError: a storage that torch.save does not write")], ids=range(11))
def test_a_view_that_leaves_its_storage_is_refused(old, new, told):
    content = with_program(saved({"a": A}), old, new)
    if told is None:
        assert torch.equal(read_tensors(content, PATH)["a"], torch.zeros(4, 6))
    else:
        assert re.search(told, refusal(content))


def test_views_that_repeat_values_without_end_are_refused():
    """2 ** 40 copies of one value would take four terabytes where they are made whole."""
    assert "claim 4,398,046,511,104 bytes together" in refusal(saved({"a": torch.zeros(1).expand(1 << 40)}))


def test_a_storage_of_an_old_file_that_claims_more_than_is_left_is_refused():
    content = saved({"a": A}, archive=False)
    for number in ("a billion", "10**15"):
        assert re.search(r"its storages claim [\d,]+ bytes, it holds [\d,]+", refusal(
            with_claim(content, NUMBER[number])))


@FORMATS
def test_what_lies_beside_the_tensors_is_checked_as_they_are(archive):
    """torch makes these tensors, too, before it throws them away."""
    state = OrderedDict(zeros=torch.zeros(3))
    state._metadata = {"hidden": A}
    content = saved(state, archive)
    assert list(read_tensors(content, PATH)) == ["zeros"]
    assert "claim" in refusal(with_claim(content, NUMBER["10**15"]))


MEMORY = """
import resource, sys
from pathlib import Path
from minipeft.errors import AdapterError
from minipeft.methods.pickled import read_tensors
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_tensors(path.read_bytes(), path)
except AdapterError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("archive", [True, False])
def test_nothing_is_allocated_for_a_claim(tmp_path, archive):
    (tmp_path / "hostile.bin").write_bytes(with_claim(saved({"a": A}, archive), NUMBER["a billion"]))
    taken = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "hostile.bin")], capture_output=True,
                           text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(taken.stdout) * unit < 50 << 20  # of the four gigabytes


# --- damaged ----------------------------------------------------------------------------------------------------------

def test_archives_that_two_readers_could_read_differently_are_refused():
    parts = parts_of(saved({"a": A}))
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = archived([*parts.items(), ("archive/data.pkl", parts["archive/data.pkl"])])
    assert "two parts have one name" in refusal(twice)
    assert "two parts have one name" in refusal(archived([*parts.items(), ("archive/DATA/0", bytes(96))]))
    assert "compressed" in refusal(archived(parts.items(), zipfile.ZIP_DEFLATED))
    assert torch.equal(read_tensors(archived(parts.items()), PATH)["a"], A)


def test_parts_that_lie_in_one_place_are_refused():
    """A small file whose list of contents names the same bytes a hundred times."""
    content = archived(parts_of(saved({"a": A})).items())
    start = content.index(b"PK\x01\x02")
    length = 46 + struct.unpack("<H", content[start + 28:start + 30])[0]
    entry, end = bytearray(content[start:start + length]), bytearray(content[-22:])
    more = b"".join(bytes(entry[:-2]) + b"%02d" % i for i in range(50))
    listed = content[start:-22] + more
    end[8:12] = struct.pack("<HH", *[struct.unpack("<H", end[8:10])[0] + 50] * 2)
    end[12:16] = struct.pack("<I", len(listed))
    assert "claim more bytes than it holds" in refusal(content[:start] + listed + bytes(end))


@FORMATS
@pytest.mark.parametrize("kept", [0, 1, 3, 4, 100, 0.5, 0.9, -60, -1], ids=str)
def test_a_file_that_is_cut_off_is_named(archive, kept):
    content = saved({"a": A, "b": A + 1}, archive)
    line = refusal(content[:int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "is truncated or not a file of torch.save" in line


@pytest.mark.parametrize("content", [b"not a pickle" * 50, b"PK\x03\x04" + bytes(200), b"\x80\x02.", b"\x80\x02(((((.",
                                     b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", b"h\x05.", b"\x80\x02}K\x01u.",
                                     b"\x80\x02" + b"\x85" * 5, b"\x80\x02)" + b"\x85" * 200_000 + b"}q\x00h\x00s.",
                                     archived([("archive/data.pkl", b"")]), archived([]),
                                     archived([("archive/constants.pkl", b"x")])],
                         ids=range(12))
def test_what_torch_did_not_write_is_named(content):
    assert "is truncated or not a file of torch.save" in refusal(content)


def test_tables_within_tables_without_end_do_not_overflow_the_stack():
    deep = b"\x80\x02}X\x01\x00\x00\x00a)" + b"\x85" * 300_000 + b"s."
    assert "a is tuple, not a tensor" in refusal(deep)


@FORMATS
def test_a_file_with_changed_bytes_is_read_or_refused_in_one_line(archive):
    content, random_bytes, refused = saved({"a": A, "b": A.half()}, archive), random.Random(0), 0
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(random_bytes.randrange(1, 4)):
            changed[random_bytes.randrange(len(changed))] = random_bytes.randrange(256)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in read_tensors(bytes(changed), PATH).values())
        except AdapterError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50
