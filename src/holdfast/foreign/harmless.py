"""The names that a pickle may hold without running anybody's code.

Each was looked at: it makes a plain value, a tensor or an array from its arguments, imports
nothing that the file chooses, and calls nothing but its own arguments' names, which must
be on this list themselves. Anything else is reported. This is a list for people's eyes
and no sandbox: Holdfast calls none of these either.
"""

from __future__ import annotations

import re

from holdfast.core.plan import ITEMSIZES

STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "U8",
}
"""PyTorch's storage classes -> what an element is."""

DTYPES = {
    "float32": "F32",
    "float": "F32",
    "float64": "F64",
    "double": "F64",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "long": "I64",
    "int32": "I32",
    "int": "I32",
    "int16": "I16",
    "short": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "complex64": "C64",
    "cfloat": "C64",
    "complex32": "complex32",
    "complex128": "complex128",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float4_e2m1fn_x2": "float4_e2m1fn_x2",
    "qint8": "qint8",
    "quint8": "quint8",
    "qint32": "qint32",
    "quint4x2": "quint4x2",
    "quint2x4": "quint2x4",
}
"""PyTorch's dtypes -> as safetensors names them, where it does."""

TORCH_NAMES = {stored: name for name, stored in reversed(DTYPES.items())}
"""The other way round; of several names the first."""

SIZES = {
    **ITEMSIZES,
    "complex32": 4,
    "complex128": 16,
    "float4_e2m1fn_x2": 1,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
    "quint4x2": 1,
    "quint2x4": 1,
}
"""Bytes of an element, by the names above."""

_BUILTINS = "set frozenset complex bytearray slice range list dict tuple int float bool str bytes"
_REBUILD = (
    "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter "
    "_rebuild_parameter_with_state _rebuild_qtensor _rebuild_sparse_tensor "
    "_rebuild_nested_tensor _rebuild_meta_tensor_no_storage _rebuild_device_tensor_from_numpy "
    "_rebuild_wrapper_subclass"
)
_TORCH = (
    "Size device Tensor per_tensor_affine per_channel_affine per_tensor_symmetric "
    "per_channel_symmetric per_channel_affine_float_qparams contiguous_format channels_last "
    "channels_last_3d preserve_format strided sparse_coo sparse_csr sparse_csc sparse_bsr "
    "sparse_bsc jagged"
)
_NUMPY = (
    "ndarray dtype bool_ bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 "
    "float32 float64 complex64 complex128 str_ bytes_ datetime64 timedelta64"
)
_GENERATORS = (
    "_pickle.__randomstate_ctor _pickle.__generator_ctor _pickle.__bit_generator_ctor "
    "_mt19937.MT19937 _pcg64.PCG64 _pcg64.PCG64DXSM _philox.Philox _sfc64.SFC64"
)
_PLAIN = (
    "collections.OrderedDict collections.Counter collections.defaultdict collections.deque "
    "_codecs.encode copyreg._reconstructor copy_reg._reconstructor builtins.object "
    "datetime.datetime datetime.date datetime.time datetime.timedelta datetime.timezone "
    "pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath "
    "pathlib.PurePosixPath pathlib.PureWindowsPath decimal.Decimal uuid.UUID "
    "argparse.Namespace types.SimpleNamespace"
)

HARMLESS = frozenset(
    [
        *_PLAIN.split(),
        *(f"builtins.{name}" for name in _BUILTINS.split()),
        *(f"torch._utils.{name}" for name in _REBUILD.split()),
        *(f"torch.{name}" for name in (*_TORCH.split(), *DTYPES, *STORAGES)),
        *(f"torch.cuda.{name}" for name in STORAGES),
        "torch._tensor._rebuild_from_type_v2",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch.serialization._get_layout",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        *(f"numpy.{name}" for name in _NUMPY.split()),
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
        *(f"numpy.random.{name}" for name in _GENERATORS.split()),
    ]
)

_NUMPY_CODE = re.compile(r"([<>|=]?)([a-zA-Z?])(\d*)")
_NUMPY_KINDS = {"f": "F", "i": "I", "u": "U", "b": "BOOL", "?": "BOOL", "c": "C"}


def numpy_dtype(code: str) -> str:
    """NumPy's code of a dtype as safetensors names it, where it does.

    >>> numpy_dtype("<f8"), numpy_dtype("|b1"), numpy_dtype("<c16"), numpy_dtype("<U5")
    ('F64', 'BOOL', 'complex128', '<U5')
    """
    match = _NUMPY_CODE.fullmatch(code)
    if match is None or match[1] == ">" or match[2] not in _NUMPY_KINDS or len(match[3]) > 3:
        return code
    kind = _NUMPY_KINDS[match[2]]
    bits = 8 * int(match[3] or 1)
    if kind == "BOOL":
        return "BOOL" if bits == 8 else code
    name = {"C128": "complex128"}.get(f"{kind}{bits}", f"{kind}{bits}")
    return name if name in SIZES else code
