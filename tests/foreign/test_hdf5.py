"""HDF5 files and Keras's archives, as h5py and Keras write them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from holdfast.errors import DamagedObject, HoldfastError
from holdfast.foreign import hdf5, open_foreign
from holdfast.foreign.opened import objects_in
from tests.foreign.values import same, values_in

_KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy as np
model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
model.compile("adam", "mse")
model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
model.save("m.keras")
model.save_weights("m.weights.h5")
np.savez("expected.npz", *[np.asarray(v) for v in model.get_weights()])
model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(4, dtype="bfloat16")])
model.save_weights("half.weights.h5")
keras.Sequential([keras.layers.Input((3,)), keras.layers.Lambda(lambda x: x)]).save("lambda.keras")
"""


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Keras itself writes, in a process of its own: it takes seconds to import."""
    folder = tmp_path_factory.mktemp("keras")
    subprocess.run([sys.executable, "-W", "ignore", "-c", _KERAS], check=True, cwd=folder)
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.h5"


def checked(path: Path) -> list[str]:
    with open_foreign(str(path)) as foreign:
        return foreign.check()


@pytest.mark.slow
def test_weights_by_keras(keras: Path) -> None:
    expected = list(np.load(keras / "expected.npz").values())
    with open_foreign(str(keras / "m.weights.h5")) as foreign:
        assert foreign.file.kind == "Keras weights (HDF5)"
        assert foreign.check() == []
        leaves = {leaf.path: (leaf.dtype, leaf.shape) for leaf in foreign.file.leaves}
        assert leaves["layers/dense/vars/0"] == ("F32", (3, 4))
    layers = values_in(keras / "m.weights.h5")["layers"]
    found = [layers[name]["vars"][n] for name in ("dense", "dense_1") for n in ("0", "1")]
    assert same(found, expected)


@pytest.mark.slow
def test_an_archive_by_keras(keras: Path) -> None:
    with open_foreign(str(keras / "m.keras")) as foreign:
        assert (foreign.file.kind, foreign.file.runs) == ("Keras model (zip)", ())
        assert foreign.check() == []
        values = dict(foreign.file.values)
    assert values["config.json/config/layers/1/config/units"] == "4"
    found = values_in(keras / "m.keras")
    weights = values_in(keras / "m.weights.h5")
    assert same(found["weights"]["layers"], weights["layers"])
    assert found["config"]["class_name"] == "Sequential"


@pytest.mark.slow
def test_bfloat16_by_keras(keras: Path) -> None:
    [kernel, _] = values_in(keras / "half.weights.h5")["layers"]["dense"]["vars"].values()
    assert f"{kernel.dtype}" == "torch.bfloat16"
    with h5py.File(keras / "half.weights.h5") as file:
        saved: Any = file["layers/dense/vars/0"]
        assert saved[()].tobytes() == kernel.view(torch.uint8).numpy().tobytes()


@pytest.mark.slow
def test_code_in_an_archive_by_keras(keras: Path) -> None:
    with open_foreign(str(keras / "lambda.keras")) as foreign:
        assert foreign.file.runs == (hdf5._LAMBDA,)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.slow
def test_a_bit_in_an_archive_is_found(keras: Path, tmp_path: Path) -> None:
    data = bytearray((keras / "m.keras").read_bytes())
    kernel = np.load(keras / "expected.npz")["arr_0"].tobytes()
    data[data.index(kernel)] ^= 1
    (tmp_path / "m.keras").write_bytes(data)
    assert checked(tmp_path / "m.keras") == [
        "its entry 'model.weights.h5' does not have its CRC-32"
    ]


# -- any HDF5 file ----------------------------------------------------------------


def test_every_layout(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5, "_BLOCK_BYTES", 64)
    arrays: dict[str, Any] = {
        "contiguous": np.arange(60.0).reshape(3, 4, 5),
        "packed": np.arange(1000, dtype=np.int16).reshape(10, 100),
        "checked": np.arange(300).reshape(100, 3),
        "swapped": np.arange(4, dtype=">f8"),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3)),
        "wide": np.arange(40, dtype=np.uint8).reshape(1, 1, 40),
        "complex": np.array([1 + 2j]),
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            how: dict[str, Any] = {}
            if name == "packed":
                how = {"chunks": (3, 7), "compression": "gzip", "shuffle": True}
            if name == "checked":
                how = {"chunks": (10, 3), "fletcher32": True}
            file.create_group(f"a/{name}").create_dataset("0", data=array, **how)
        file["a"].attrs["text"] = "ü"
    found = values_in(path)["a"]
    arrays["swapped"] = arrays["swapped"].astype("<f8")
    arrays["scalar"] = np.array(arrays["scalar"])
    assert same({name: found[name]["0"] for name in arrays}, arrays)
    assert checked(path) == []


def test_a_bit_in_a_dataset_with_checksums(path: Path) -> None:
    array = np.full(1000, 7, np.int64)
    for fletcher in (True, False):
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=array, chunks=(1000,), fletcher32=fletcher)
        data = bytearray(path.read_bytes())
        data[data.index(array.tobytes()) + 80] ^= 1
        path.write_bytes(data)
        assert bool(checked(path)) is fletcher, "without a checksum nothing can tell"


def test_nothing_outside_of_the_file_is_read(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(80)))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.arange(4.0)
    with h5py.File(path, "w") as file:
        file["external"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
        file["soft"] = h5py.SoftLink("/real")
        file["real"] = np.arange(3.0)
        file["again"] = file["real"]
        file["loop"] = file["/"]
        layout = h5py.VirtualLayout((4,), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", shape=(4,))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("stored", (10,), "f8", external=[(str(secret), 0, 80)])
    with open_foreign(str(path)) as foreign:
        assert set(dict(objects_in(foreign.tree()))) >= {"external", "soft", "virtual", "stored"}
        notes = {leaf.path: leaf.note for leaf in foreign.file.leaves}
        assert notes["virtual"] == notes["stored"] == "whose data are in other files"
        assert foreign.tree()["again"].shape == (3,), "the first of its two names"
        assert foreign.check() == []


def test_objects_and_texts_are_named(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["text"] = "hello"
        file["record"] = np.zeros(2, [("a", "f4"), ("b", "i2")])
        file["null"] = h5py.Empty("f4")
    with open_foreign(str(path)) as foreign:
        assert set(dict(objects_in(foreign.tree()))) == {"text", "record", "null"}


def test_a_shape_without_its_data(path: Path) -> None:
    """HDF5 gives zeros for what was never written: a few bytes that claim petabytes."""
    with h5py.File(path, "w") as file:
        file.create_dataset("chunked", (1 << 40, 1 << 10), "f8", chunks=(1024, 1024))
        file.create_dataset("small", (10,), "f8")
    with open_foreign(str(path)) as foreign:
        assert foreign.file.problems[0].endswith("bytes, of which 0 are stored")
        with pytest.raises(DamagedObject):
            foreign.tree()


def test_a_packed_bomb_is_bounded(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "x",
            (1 << 24,),
            "u1",
            chunks=(1 << 24,),
            compression="gzip",
            data=np.zeros(1 << 24, "u1"),
        )
    assert path.stat().st_size < 40_000
    assert checked(path) == [], "a thousand times is what deflate can do"


def test_deep_and_many_groups(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("/".join("a" * 200))
    assert checked(path) == ["it has more in it than is looked at"]
    monkeypatch.setattr(hdf5, "MAX_LEAVES", 3)
    with h5py.File(path, "w") as file:
        for n in range(9):
            file[f"{n}"] = np.zeros(1)
    assert checked(path) == ["it has more in it than is looked at"]


def test_without_h5py(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(hdf5.MAGIC)
    monkeypatch.setitem(sys.modules, "h5py", None)
    error = ModuleNotFoundError(name="h5py")
    monkeypatch.setattr("builtins.__import__", _refusing(error))
    with pytest.raises(HoldfastError, match="not installed") as caught:
        open_foreign(str(path))
    assert caught.value.hint == "pip install 'holdfast[h5]'"


def _refusing(error: ModuleNotFoundError) -> Any:
    real = __import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "h5py":
            raise error
        return real(name, *args, **kwargs)

    return importing


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{" * 100, "is malformed"),
        ("config.json", b"[" * 1_000_001, "more parts"),
        ("config.json", b"[" * 100_000, "is malformed"),
        ("model.weights.h5", b"no", "HDF5 cannot open it"),
    ],
)
def test_malformed_archives(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    inner = io.BytesIO()
    with h5py.File(inner, "w") as file:
        file["x"] = np.zeros(1)
    entries = {"model.weights.h5": inner.getvalue(), "config.json": b"{}", name: content}
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    with pytest.raises(DamagedObject, match=says):
        open_foreign(str(tmp_path / "x.keras"))


_FUZZ = """
import random, resource, sys
from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign import open_foreign
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
whole, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
chance, told = random.Random(1), 0
for _ in range(150):
    data = bytearray(whole)
    for _ in range(chance.randint(1, 6)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)):]
    path.write_bytes(data)
    try:
        with open_foreign(str(path)) as foreign:
            told += bool(foreign.check())
    except (DamagedObject, UnknownFile):
        told += 1
print(told)
"""


def test_any_damage_is_told_by_an_error_of_ours(path: Path, tmp_path: Path) -> None:
    """In a process of its own: libhdf5 is C, and reads what it is told to."""
    with h5py.File(path, "w") as file:
        file.create_dataset("a/b", data=np.arange(100), chunks=(10,), compression="gzip")
        file["a/c"] = np.arange(5.0)
        file["a"].attrs["name"] = "layer"
    done = subprocess.run(
        [sys.executable, "-c", _FUZZ, path, tmp_path / "damaged.h5"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 20
