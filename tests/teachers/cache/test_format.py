import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.errors import DataError
from spatial_forcing.teachers.cache.codec import DTYPES, columns, decode, encode, leading
from spatial_forcing.teachers.cache.encode import EpisodeChecksums
from spatial_forcing.teachers.cache.format import (
    CacheHeader,
    TeacherFacts,
    checksum,
    decode_present,
    encode_rows,
)

FACTS = TeacherFacts("fake", "0" * 64, "Apache-2.0", 8, 3, 4, 20)


def header_of(views, layers, grid, channels, dtype):
    names = tuple(f"camera{i}" for i in range(views))
    return CacheHeader(FACTS, names, layers, grid, channels, dtype, frame_size=(8, 8), dataset="demo")


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(1, 17),
    st.sampled_from([(0,), (2, 0), (1, 2, 0)]),
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    st.floats(1e-6, 1e4),
)
def test_rows_round_trip(frames, views, layers, grid, channels, dtype, magnitude):
    header = header_of(views, layers, grid, channels, dtype)
    generator = torch.Generator().manual_seed(views)
    present = torch.rand(frames, views, generator=generator) > 0.3
    keep = present[:, :, None, None, None]
    features = [
        magnitude * torch.randn(frames, views, *grid, channels, generator=generator) * keep for _ in layers
    ]
    rows = encode_rows(header, features, present.numpy())
    assert rows.dtype == header.row
    assert np.array_equal(decode_present(header, rows["present"]), present.numpy())
    for layer, exact in zip(layers, features, strict=True):
        names = columns(dtype, channels)
        parts = {name: np.ascontiguousarray(rows[f"{name}{layer}"]) for name in names}
        decoded = decode(dtype, parts)
        if dtype == "bf16":
            assert torch.equal(decoded, exact.bfloat16().float())
        else:
            within(exact, decoded, channels if dtype == "int8" else leading(channels))
        assert (decoded[~present] == 0).all()


def within(exact, decoded, whole):
    """Half a step of the largest number: of 127 in the first `whole` channels, of 7 in the others."""
    for part, top in ((slice(whole), 127), (slice(whole, None), 7)):
        if exact[..., part].shape[-1]:
            largest = exact[..., part].abs().amax(-1, keepdim=True)
            # The scale of int4 is a bfloat16: the largest number may lie beyond the largest code.
            step = largest * (0.5 / top + (2**-8 if whole < exact.shape[-1] else 1e-5))
            assert ((decoded - exact)[..., part].abs() <= step).all()


@pytest.mark.parametrize("channels", range(1, 30))
def test_int4_keeps_its_layout(channels):
    lead = leading(channels)
    assert 0 < lead <= channels
    assert (channels - lead) % 2 == 0
    values = torch.randn(3, channels)
    parts = encode("int4", values)
    assert {name: part.shape[1:] for name, part in parts.items()} == {
        name: shape for name, (_, shape) in columns("int4", channels).items()
    }


def bytes_of(dtype, channels):
    return sum(
        np.dtype(kind).itemsize * math.prod(shape) for kind, shape in columns(dtype, channels).values()
    )


def test_a_sixteenth_holds_more_in_int4_than_in_int8():
    """Channels whose spread falls off, as in a basis: in the same bytes int4 keeps more of the angles."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 48, generator=generator) * torch.arange(1, 49) ** -1.0
    size = {dtype: bytes_of(dtype, channels) for dtype, channels in (("int8", 28), ("int4", 48))}
    assert size["int4"] <= size["int8"]
    few = torch.cat([decode("int8", encode("int8", values[:, :28])), torch.zeros(500, 20)], 1)
    lost = {
        name: 1 - torch.cosine_similarity(kept, values, dim=-1).mean()
        for name, kept in (("int8", few), ("int4", decode("int4", encode("int4", values))))
    }
    assert lost["int4"] < 0.6 * lost["int8"]


def test_unknown_storage_is_refused(tmp_path):
    header_of(1, (0,), (2, 2), 4, "int8").save(tmp_path)
    path = tmp_path / "header.json"
    path.write_text(path.read_text().replace('"int8"', '"int2"'))
    with pytest.raises(DataError, match="stores its numbers as 'int2'"):
        CacheHeader.load(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 9))
def test_checksums_do_not_depend_on_the_batches(lengths, batch):
    rows = np.random.default_rng(0).integers(0, 255, sum(lengths) * 3, dtype=np.uint8).view(np.dtype("V3"))
    running = EpisodeChecksums(lengths)
    for start in range(0, len(rows), batch):
        running.add(rows[start : start + batch])
    stops = np.cumsum(lengths)
    expected = [checksum(rows[stop - n : stop]) for stop, n in zip(stops, lengths, strict=True)]
    assert running.values == expected


def test_headers_survive_the_file(tmp_path):
    header = header_of(3, (1, 0), (2, 5), 7, "int8")
    header.save(tmp_path)
    assert CacheHeader.load(tmp_path) == header
    assert [path.name for path in tmp_path.iterdir()] == ["header.json"]
