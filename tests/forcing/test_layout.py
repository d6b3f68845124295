"""Layouts: builders, padding, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.errors import LayoutError
from spatial_forcing.forcing import TokenLayout, layout_from_input_ids, layout_from_offset, tokens_valid
from spatial_forcing.forcing.layout import check_layout, gather_tokens, grid_sizes, shifted

IMAGE = 7


def test_contiguous_views_are_view_major_and_row_major():
    layout = layout_from_offset(2, 2, (2, 3), start=4)
    assert layout.index[1].flatten().tolist() == list(range(4, 16))
    assert bool(layout.valid.all())


def test_stride_leaves_room_for_separators():
    layout = layout_from_offset(1, 2, (1, 2), start=1, stride=5, valid=torch.tensor([[True, False]]))
    assert layout.index.flatten().tolist() == [1, 2, 6, 7]
    assert layout.valid.flatten().tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views": 0}, "no view tokens"),
        ({"grid": (0, 3)}, "no view tokens"),
        ({"start": -1}, "start >= 0"),
        ({"stride": 5}, "stride >= 6"),
        ({"valid": torch.ones(2, 2)}, "expected bool"),
    ],
)
def test_impossible_offsets(arguments, message):
    good = {"batch_size": 1, "views": 2, "grid": (2, 3), "start": 1}
    with pytest.raises(LayoutError, match=message):
        layout_from_offset(**{**good, **arguments})


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_input_ids_with_variable_grids(data):
    """Wherever the image tokens are, the layout finds them in order and pads the rest with -1."""
    side = st.integers(1, 3)
    grids = data.draw(
        st.lists(st.lists(st.tuples(side, side), min_size=1, max_size=3), min_size=1, max_size=3)
    )
    rows = []
    for sample in grids:
        row = []
        for h, w in sample:
            row += [1] * data.draw(st.integers(0, 2)) + [IMAGE] * (h * w)
        rows.append(row)
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    layout = layout_from_input_ids(ids, IMAGE, grids)
    sizes = grid_sizes(layout)
    for b, sample in enumerate(grids):
        real = layout.index[b][layout.valid[b]]
        assert real.tolist() == (ids[b] == IMAGE).nonzero().flatten().tolist()
        assert [tuple(s) for s in sizes[b, : len(sample)].tolist()] == sample
        assert int(sizes[b, len(sample) :].sum()) == 0
    assert bool((layout.index[~layout.valid] == -1).all())


def test_input_ids_with_one_grid():
    ids = torch.tensor([[1, IMAGE, IMAGE, 2, IMAGE, IMAGE], [1, IMAGE, IMAGE, 2, 3, 0]])
    layout = layout_from_input_ids(ids, IMAGE, (1, 2))
    assert layout.index.tolist() == [[[[1, 2]], [[4, 5]]], [[[1, 2]], [[-1, -1]]]]
    assert layout_from_input_ids(ids, IMAGE, (1, 2), views=3).index.shape == (2, 3, 1, 2)


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([[1, 2]], (1, 2), "no token of input_ids is the image token 7"),
        ([[IMAGE, IMAGE, IMAGE]], (1, 2), r"3 image tokens.* 1 x 2"),
        ([[IMAGE, IMAGE]], (0, 2), "no view tokens"),
        ([[IMAGE, IMAGE]], [[(1, 2)], [(1, 2)]], "2 entries for a batch of 1"),
        ([[IMAGE, IMAGE]], [[(2, 2)]], "has 2 image tokens.*need 4"),
    ],
)
def test_ids_that_do_not_fit(ids, grids, message):
    with pytest.raises(LayoutError, match=message):
        layout_from_input_ids(torch.tensor(ids), IMAGE, grids)


def test_more_grids_than_views():
    with pytest.raises(LayoutError, match=r"views: 1"):
        layout_from_input_ids(torch.tensor([[IMAGE, IMAGE]]), IMAGE, [[(1, 1), (1, 1)]], views=1)


def test_pixel_mask_is_read_at_each_tokens_top_left():
    mask = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    # 2 x 3 tokens start at rows 0, 2 and columns 0, 2, 4.
    mask[0, 0, 2, 4] = True
    assert tokens_valid(mask, (2, 3)).nonzero().tolist() == [[0, 0, 1, 2]]


def test_shift_moves_real_tokens_only():
    layout = TokenLayout(torch.tensor([[[[3, -1]]]]), torch.tensor([[[[True, False]]]]))
    assert shifted(layout, 1).index.flatten().tolist() == [4, -1]
    assert shifted(layout, 0) is layout


class TestChecks:
    good = layout_from_offset(2, 2, (2, 2), start=1)

    def test_gathers_in_order(self):
        hidden = torch.arange(10.0)[None, :, None].expand(2, 10, 1)
        assert gather_tokens(hidden, self.good)[0, :, 0].tolist() == list(range(1, 9))

    def test_past_the_end(self):
        with pytest.raises(LayoutError, match="position 8 of a sequence of 8 tokens"):
            gather_tokens(torch.zeros(2, 8, 3), self.good)

    def test_another_batch_size(self):
        with pytest.raises(LayoutError, match="batch size 3, the layout 2"):
            gather_tokens(torch.zeros(3, 20, 3), self.good)

    @pytest.mark.parametrize(
        ("index", "valid", "message"),
        [
            (torch.zeros(2, 0, 2, 2).long(), torch.ones(2, 0, 2, 2).bool(), "no view tokens"),
            (torch.full((2, 2, 2, 2), -1), torch.zeros(2, 2, 2, 2).bool(), "no view tokens"),
            (torch.zeros(2, 3, 2, 2).long(), torch.ones(2, 3, 2, 2).bool(), "2 samples x 3 views.*2 x 2"),
            (torch.zeros(2, 2, 4).long(), torch.ones(2, 2, 4).bool(), "expected long and bool"),
            (torch.zeros(2, 2, 2, 2), torch.ones(2, 2, 2, 2).bool(), "expected long and bool"),
            (torch.zeros(2, 2, 2, 2).long(), torch.ones(2, 2, 2, 3).bool(), "expected long and bool"),
            (torch.arange(-1, 15).view(2, 2, 2, 2), torch.ones(2, 2, 2, 2).bool(), "padding"),
        ],
    )
    def test_malformed(self, index, valid, message):
        with pytest.raises(LayoutError, match=message):
            check_layout(TokenLayout(index, valid), batch_size=2, views=2)
