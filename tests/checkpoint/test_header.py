"""Headers of safetensors files: what is refused, and agreement with safetensors on what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from peft_moe.checkpoint.header import BITS, CODES, DTYPES, MAX_HEADER, Entry, read_header
from peft_moe.checkpoint.tensor_file import TensorFile


def write(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    """A file with a header as it is given: bytes, or what JSON can say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def tensor(shape: list[Any], start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = {"a": tensor([2], 0, 8), "b": tensor([1, 2], 8, 16)}


def test_a_good_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x", GOOD | {"__metadata__": {"format": "pt"}}, bytes(16))
    start = path.stat().st_size - 16
    entries, metadata = read_header(path)
    assert entries == {"a": Entry("F32", (2,), start, start + 8), "b": Entry("F32", (1, 2), start + 8, start + 16)}
    assert metadata == {"format": "pt"} and entries["a"].nbytes == 8 and entries["a"].dtype == torch.float32


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
REFUSED: dict[str, tuple[Any, int, str]] = {
    # header, bytes of the body, what the message says
    "overlap": ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, 12, "b starts at byte .* where the one before"),
    "the same bytes twice": ({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}, 8, "b starts at byte"),
    "a hole": ({"a": tensor([2], 0, 8), "b": tensor([1], 12, 16)}, 16, "b starts at byte"),
    "a gap before the first": ({"a": tensor([2], 8, 16)}, 16, "a starts at byte"),
    "bytes left over": (GOOD, 24, "its tensors end at byte"),
    "too few bytes": (GOOD, 12, "its tensors end at byte"),
    "nothing but bytes": ({}, 4, "its tensors end at byte"),
    "an empty one inside another": ({"a": tensor([2], 0, 8), "b": tensor([0], 4, 4)}, 8, "b? ?starts at byte|starts"),
    "unknown dtype": ({"a": tensor([2], 0, 8, "F33")}, 8, "a has the dtype 'F33'"),
    "dtype that is no text": ({"a": tensor([2], 0, 8, ["F32"])}, 8, "a has the dtype"),
    "dtype of another size": ({"a": tensor([2], 0, 8, "F64")}, 8, "a needs 16 bytes as F64"),
    "half a byte": ({"a": tensor([3], 0, 1, "F4")}, 1, "a needs 1 bytes as F4"),
    "negative axis": ({"a": tensor([-2], 0, 8)}, 8, "a has the shape"),
    "two negative axes": ({"a": tensor([-2, -1], 0, 8)}, 8, "a has the shape"),
    "huge axis": ({"a": tensor([2**63], 0, 8)}, 8, "a has the shape"),
    "a product that wraps around": ({"a": tensor([2**32, 2**32], 0, 0)}, 0, "a has the shape"),
    "huge beside an empty axis": ({"a": tensor([2**40, 2**40, 0], 0, 0)}, 0, "a has the shape"),
    "an axis that is no integer": ({"a": tensor([2.0], 0, 8)}, 8, "a has the shape"),
    "an axis that is true": ({"a": tensor([True, 2], 0, 8)}, 8, "a has the shape"),
    "too many axes": ({"a": tensor([1] * 17, 0, 4)}, 4, "a has the shape"),
    "shape that is no list": ({"a": tensor([], 0, 4) | {"shape": "2"}}, 4, "a has the shape"),
    "range backwards": ({"a": tensor([2], 8, 0)}, 8, "a has the byte range"),
    "negative range": ({"a": tensor([2], -8, 0)}, 8, "a has the byte range"),
    "range of three": ({"a": tensor([2], 0, 8) | {"data_offsets": [0, 4, 8]}}, 8, "a has the byte range"),
    "range past the end": ({"a": tensor([2**40], 0, 2**42)}, 8, "its tensors end at byte"),
    "a field too many": ({"a": tensor([2], 0, 8) | {"x": 1}}, 8, "a is not described by"),
    "a field too few": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "a is not described by"),
    "no description": ({"a": 1}, 0, "a is not described by"),
    "the same name twice": (b'{"a":1,"a":1}', 0, "a name stands there twice"),
    "the same field twice": (b'{"a":{"dtype":"F32","dtype":"F32"}}', 0, "a name stands there twice"),
    "no JSON": (b"{'a': 1}", 0, "not JSON"),
    "no UTF-8": (b'{"\xff": 1}', 0, "not JSON"),
    "NaN": (b'{"a": NaN}', 0, "NaN is not a JSON number"),
    "infinity": (b'{"a": -Infinity}', 0, "-Infinity is not a JSON number"),
    "an integer of many digits": (b'{"a": ' + b"1" * 5000 + b"}", 0, "not JSON"),
    "deep nesting": (DEEP, 0, "nested too deeply"),
    "nesting that Python reads": (b'{"a":' + b"[" * 60 + b"]" * 60 + b"}", 0, "nested too deeply"),
    "a list": (b"[]", 0, "does not start with a brace"),
    "space first": (b" {}", 0, "does not start with a brace"),
    "nothing": (b"", 0, "does not start with a brace"),
    "long name": ({"a" * 1001: tensor([2], 0, 8)}, 8, "a tensor has the name"),
    "empty name": ({"": tensor([2], 0, 8)}, 8, "a tensor has the name"),
    "control character": ({"a\x00b": tensor([2], 0, 8)}, 8, "a tensor has the name"),
    "code of a terminal": ({"\x1b[2Ja": tensor([2], 0, 8)}, 8, "a tensor has the name"),
    "new line": ({"a\nb": tensor([2], 0, 8)}, 8, "a tensor has the name"),
    "half a surrogate": (b'{"\\ud800": 1}', 0, "a text in it is none"),
    "metadata of numbers": (GOOD | {"__metadata__": {"a": 1}}, 16, "its metadata is not text"),
    "metadata that is a list": (GOOD | {"__metadata__": ["a"]}, 16, "its metadata is not text"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    header, size, message = REFUSED[case]
    path = write(tmp_path / "strange.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value) and "Nothing was loaded" in str(error.value)
    with pytest.raises(ValueError):
        TensorFile(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, MAX_HEADER + 1, 10_000, 3])
def test_a_length_that_is_not_its_own(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD, bytes(16), length)
    with pytest.raises(ValueError, match="is said to have|not JSON"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 50])
def test_a_file_that_ends_early(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD, bytes(16))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        read_header(path)


def test_names_are_names_and_no_paths(tmp_path: Path) -> None:
    """Nothing is written under the name of a tensor; such a name is one as any other."""
    path = write(tmp_path / "x.safetensors", {"../../a": tensor([2], 0, 8), "/etc/b": tensor([0], 8, 8)}, bytes(8))
    assert set(TensorFile(path).entries) == {"../../a", "/etc/b"}


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": tensor([4], 0, 3, "F6_E2M3")}, bytes(3))
    file = TensorFile(path)
    assert file.entries["a"].dtype is None
    with pytest.raises(ValueError, match="a is stored as F6_E2M3, which this version of torch does not have"):
        file.read("a")


def test_a_file_that_is_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD, bytes(16))
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="b ends 4 bytes early"):
        file.read("b")
    with pytest.raises(ValueError, match="b ends 4 bytes early"):
        list(file.chunks("b"))


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8).filter(
    lambda one: one.isprintable()
)
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def _tensors(draw: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        dtype, shape = draw(st.sampled_from([*CODES])), draw(SHAPES)
        size = torch.Size(shape).numel() * dtype.itemsize
        data = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
        data = data % 2 if dtype == torch.bool else data
        found[name] = data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return found


@given(_tensors(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
@settings(max_examples=150, deadline=None)
def test_agreement_with_safetensors(tmp_path_factory: pytest.TempPathFactory, tensors: Any, metadata: Any) -> None:
    """Everything that safetensors writes: all dtypes, tensors without elements and without axes."""
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    save_file(tensors, path, metadata=metadata or None)
    file = TensorFile(path)
    assert file.metadata == metadata and set(file.entries) == set(tensors)
    with safe_open(path, "pt") as other:
        assert (other.metadata() or {}) == metadata
        for key, value in tensors.items():
            found, wanted = file.read(key), other.get_tensor(key)
            assert found.dtype == wanted.dtype == value.dtype and found.shape == wanted.shape == value.shape
            one, two = (x.contiguous().view(-1).view(torch.uint8) for x in (found, wanted))
            assert torch.equal(one, two)


def test_dtypes_are_those_of_safetensors() -> None:
    """Sizes in bits against torch's own, so that a range of bytes is never measured by another."""
    for code, dtype in DTYPES.items():
        assert BITS[code] == 8 * dtype.itemsize, code
    assert set(DTYPES) < set(BITS)
