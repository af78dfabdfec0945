"""Archives that mean harm: what two programs would read differently is refused."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign import zips
from holdfast.foreign.source import BytesSource
from tests.foreign import hostile
from tests.foreign.test_files import look, npy, saved


def whole() -> bytes:
    return saved({"x": torch.zeros(4)})


def test_an_encrypted_entry() -> None:
    with pytest.raises(DamagedObject, match=r"data\.pkl' is encrypted"):
        look(hostile.encrypted_zip(whole()))


def test_two_entries_of_one_name() -> None:
    out = io.BytesIO(hostile.torch_zip(b"N."))
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", hostile.SYSTEM)
    with pytest.raises(DamagedObject, match="two of its entries are named"):
        look(out.getvalue())


def test_overlapping_entries() -> None:
    """As in bombs that list the same bytes under thousands of names."""
    data = bytearray(hostile.torch_zip(b"N.", a=b"1" * 100, b=b"2" * 100))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first = archive.getinfo("archive/a").header_offset
    at = data.rfind(b"PK\1\2")
    data[at + 42 : at + 46] = struct.pack("<I", first)
    with pytest.raises(DamagedObject, match="overlaps"):
        look(bytes(data))


def test_a_header_that_tells_another_name() -> None:
    """Readers that go by the headers would see another file."""
    data = hostile.torch_zip(b"N.").replace(b"archive/data.pkl", b"archive/data.xyz", 1)
    with pytest.raises(DamagedObject, match="is not what its list says"):
        look(data)


def test_bytes_before_and_after_an_archive() -> None:
    file = look(b"PK\3\4" + b"x" * 10 + hostile.torch_zip(b"N."))
    assert file.notes == ("14 bytes lie before the archive",)
    file = look(hostile.SYSTEM + hostile.torch_zip(b"N."))
    assert file.kind == "pickle", "as torch.load and pickle.load take it"
    assert file.runs == ("os.system",)
    assert "programs disagree about what it is" in file.notes[1]
    with pytest.raises(DamagedObject, match="more bytes follow"):
        look(whole() + b"more")
    with pytest.raises(DamagedObject, match="without its end"):
        look(whole()[:-22])
    # A second end inside of the first one's comment: some readers would take that.
    data = bytearray(whole())
    inner = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 9)
    data[-2:] = struct.pack("<H", len(inner) + 1)
    with pytest.raises(DamagedObject, match="more bytes follow"):
        look(bytes(data) + inner + b"x")


def test_the_pickle_in_other_letters() -> None:
    """PyTorch's zip reader does not tell upper from lower case, and would run it."""
    data = hostile.torch_zip(hostile.SYSTEM).replace(b"/data.pkl", b"/DATA.PKL")
    with pytest.raises(pickle.UnpicklingError, match="system"):
        torch.load(io.BytesIO(data), weights_only=True)
    assert look(data).runs == ("os.system",)
    out = io.BytesIO(hostile.torch_zip(b"N."))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("archive/Data.pkl", hostile.SYSTEM)
    with pytest.raises(DamagedObject, match=r"2 entries named data\.pkl"):
        look(out.getvalue())


def test_a_pickle_that_is_a_tar_archive() -> None:
    """torch.load tries tar first: an old header is a name, which can be a pickle, and sums."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in (("x", b""), ("pickle", hostile.SYSTEM)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    for start in (b"\x80\x02N.", b"\x02\0\0\0\0\0\0\0{}"):
        data = bytearray(out.getvalue())
        data[: len(start)] = start
        data[257:265] = bytes(8)  # without the newer mark
        data[148:156] = b" " * 8
        unsigned = sum(data[:512])
        signed = unsigned - 256 * sum(byte > 127 for byte in data[:512])
        binary = b"\x80" + unsigned.to_bytes(7, "big")
        for field in (b"%06o\0 " % unsigned, b"%06o\0 " % signed, binary):
            data[148:156] = field
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                assert archive.getnames()[1] == "pickle"
            file = look(bytes(data))
            assert file.runs == ("os.system",)
            assert "it is a tar archive, too: programs disagree about what it is" in file.notes


def test_a_file_for_two_programs() -> None:
    out = io.BytesIO(hostile.torch_zip(b"N."))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("x.npy", npy(np.zeros(1)))
    assert look(out.getvalue()).notes == (
        "it has NumPy's arrays, too: programs disagree about what it is",
    )


def test_an_array_is_known_by_its_bytes() -> None:
    """numpy.load takes an entry for an array whatever its name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.npy", npy(np.zeros(1)))
        archive.writestr("b.txt", npy(np.array([hostile.Calls(eval, "1")], dtype=object)))
        archive.writestr("A.npy", npy(np.zeros(2)))
        archive.writestr("c.txt", b"text")
    file = look(out.getvalue())
    assert file.runs == ("builtins.eval",)
    assert [leaf.path for leaf in file.leaves] == ["a", "b.txt", "A"]
    assert file.values == (("c.txt", "<4 bytes>"),)


def test_many_pickles_get_no_more_time_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.foreign.contents.MAX_OPERATIONS", 100)
    array = npy(np.array([0], dtype=object))
    start = array.index(b"\x80")
    long = array[:start] + b"\x80\x02" + b"N0" * 40 + hostile.SYSTEM
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("a.npy", "b.npy"):
            archive.writestr(name, long)
    assert look(out.getvalue()).runs == (
        "os.system",
        "<unknown: its pickle has more than 13 operations: the rest was not looked at>",
    )


def test_a_dtype_of_later_times() -> None:
    """A format that has grown is no damage."""
    body = b'{"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    with pytest.raises(UnknownFile, match="with an unknown dtype 'F4'"):
        look(len(body).to_bytes(8, "little") + body + b"x")


def test_an_archive_with_a_list_too_long_to_be_real() -> None:
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 1 << 46, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 4, 1)  # the large end is at 4
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with pytest.raises(DamagedObject, match="longer than any real one"):
        look(b"PK\3\4" + end + locator + last)


def test_an_archive_with_two_large_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """One right before the locator, one where that says: two readers, two lists."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    data = bytearray(hostile.torch_zip(hostile.pickled({"a": 1})))
    assert look(bytes(data)).problems == ()
    locator = data.rindex(b"PK\6\7")
    real = struct.unpack_from("<Q", data, locator + 8)[0]
    data[locator + 8 : locator + 16] = struct.pack("<Q", real - 1)
    with pytest.raises(DamagedObject, match="lies outside of it"):
        look(bytes(data))


def test_a_large_archive_in_the_wide_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and offsets as 64-bit numbers, which others write from 4 GiB on."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    data = hostile.torch_zip(hostile.pickled({"a": 1}), byteorder=b"big")
    file = look(data)
    assert file.values == (("a", "1"),)
    assert file.notes == ("its numbers are big-endian",)
    archive = zips.read_archive(BytesSource(data))
    assert archive.entries["archive/version"].nbytes == 2


def test_a_packed_entry_that_is_damaged() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", hostile.pickled(list(range(1000))))
    assert look(out.getvalue()).values[0][1].endswith("(1,000 in all)]")
    data = bytearray(out.getvalue())
    data[50:60] = b"\xff" * 10
    with pytest.raises(DamagedObject, match="cannot be unpacked"):
        look(bytes(data))
