"""Several teachers at once: every pair its teacher, projector and weight."""

import copy
import logging
import pickle

import pytest
import torch

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing, resolve_pairs
from spatial_forcing.forcing.config import Pair
from tests.fakes import FakeStudent, FakeTeacher, fake_batch


class PartialFake(FakeTeacher):
    """Says nothing of the left column of every view."""

    partial = True

    def features(self, views, layers=(-1,)):
        found = super().features(views, layers)
        return tuple(f * (torch.arange(f.shape[3]) > 0)[:, None] for f in found)


def teachers():
    return {"geometry": FakeTeacher(dim=8, depth=3), "semantics": FakeTeacher(dim=12, depth=2, resolution=16)}


def forced(teacher, student_seed=0, **options):
    torch.manual_seed(student_seed)
    return SpatialForcing(FakeStudent(), teacher, ForcingConfig(**options))


def losses(forcing):
    _, align, metrics = forcing.losses(fake_batch())
    return float(align.detach()), metrics


def test_the_loss_is_the_mean_of_what_each_teacher_alone_gives():
    both = forced(teachers())
    assert both.pairs == (Pair(3, 2, "geometry"), Pair(3, 1, "semantics"))
    align, metrics = losses(both)
    alone = []
    for label, teacher in teachers().items():
        single = forced({label: teacher})
        single.load_projector_state_dict(
            {k: v for k, v in both.projector_state_dict().items() if f".{label}." in k}
        )
        alone.append(losses(single)[0])
    assert align == pytest.approx(sum(alone) / 2, abs=1e-6)
    assert {"cosine/block3_geometry2", "cosine/block3_semantics1"} <= set(metrics)


def test_weights_are_added():
    plain = forced(teachers(), weights=(1.0, 0.0))
    other = forced(teachers(), weights=(0.0, 1.0))
    mixed = forced(teachers(), weights=(0.5, 2.0))
    for forcing in (other, mixed):
        forcing.load_projector_state_dict(plain.projector_state_dict())
    first, second = losses(plain)[0], losses(other)[0]
    assert first != second
    assert losses(mixed)[0] == pytest.approx(0.5 * first + 2 * second, rel=1e-6)


def test_a_single_teacher_is_bit_for_bit_what_it_was_and_keeps_its_keys():
    alone = forced(FakeTeacher())
    assert {k.split(".")[1] for k in alone.projector_state_dict()} == {"fc1", "fc2", "vlm_norm"}
    named = forced({"geometry": FakeTeacher()})
    named.load_projector_state_dict(
        {k.replace("projector.", "projector.geometry."): v for k, v in alone.projector_state_dict().items()}
    )
    assert losses(named)[0] == losses(alone)[0]


def test_the_gate_mixes_for_a_teacher_with_a_label_too():
    options = {"gate": True, "pairs": ((1, -1), (3, -1))}
    alone = forced(FakeTeacher(), **options)
    named = forced({"geometry": FakeTeacher()}, **options)
    state = alone.projector_state_dict()
    state["projector.gate"] = torch.tensor([2.0, -1.0])
    alone.load_projector_state_dict(state)
    named.load_projector_state_dict(
        {k.replace("projector.", "projector.geometry."): v for k, v in state.items()}
    )
    assert losses(named)[0] == losses(alone)[0]


def test_every_pair_names_its_teacher_and_layers_of_one_share_a_projector():
    forcing = forced(
        teachers(), pairs=((1, 0), (2, -1), (4, 1)), teachers=("geometry", "semantics", "geometry")
    )
    assert forcing.pairs == (Pair(1, 0, "geometry"), Pair(2, 1, "semantics"), Pair(4, 1, "geometry"))
    widths = {label: p.fc2.out_features for label, p in forcing.projector.items()}
    assert widths == {"geometry": 8, "semantics": 12}
    _, align, metrics = forcing.losses(fake_batch())
    align.backward()
    assert all(p.grad.abs().sum() > 0 for p in forcing.projector.parameters())
    cosines = [metrics[f"cosine/{n}"] for n in ("block1_geometry0", "block2_semantics1", "block4_geometry1")]
    assert float(metrics["cosine"]) == pytest.approx(float(sum(cosines)) / 3, abs=1e-6)


def test_each_teacher_is_asked_once_a_batch():
    each = teachers()
    forced(each, pairs=((1, 0), (2, -1), (4, 1)), teachers=("geometry", "semantics", "geometry")).losses(
        fake_batch()
    )
    assert [t.calls for t in each.values()] == [1, 1]


def test_means_and_scales_belong_to_a_teacher():
    forcing = forced(teachers(), subtract_cell_mean=True, standardise=True).train()
    forcing.losses(fake_batch())
    state = forcing.projector_state_dict()
    assert state["cell_mean.geometry.total"].shape[-1] == 8
    assert state["cell_mean.semantics.total"].shape[-1] == 12
    again = forced(teachers(), student_seed=1, subtract_cell_mean=True, standardise=True)
    again.load_projector_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in again.projector_state_dict().items())


def test_what_one_teacher_leaves_out_another_still_aligns():
    partial = {"depth": PartialFake(), "semantics": FakeTeacher(dim=12)}
    forcing = forced(partial)
    _, metrics = losses(forcing)
    alone = forced({"semantics": FakeTeacher(dim=12)})
    alone.load_projector_state_dict(
        {k: v for k, v in forcing.projector_state_dict().items() if ".semantics." in k}
    )
    key = "cosine/block3_semantics2"
    assert float(metrics[key]) == pytest.approx(float(losses(alone)[1][key]), abs=1e-6)
    with pytest.raises(ConfigError, match=r"fake.*standardise"):
        forced(partial, standardise=True)


def test_independent_projectors_warn_only_where_a_teacher_has_several(caplog):
    caplog.set_level(logging.WARNING)
    forcing = forced(teachers(), projectors="independent")
    assert [p.fc2.out_features for p in forcing.projector] == [8, 12]
    assert "98.2" not in caplog.text
    forced(
        teachers(), projectors="independent", pairs=((1, 0), (2, 0), (3, 0)),
        teachers=("geometry", "geometry", "semantics"),
    )  # fmt: skip
    assert "98.2" in caplog.text


def test_copies_share_the_teachers_and_pickles_leave_them_out():
    each = teachers()
    forcing = forced(each)
    copy.deepcopy(forcing).losses(fake_batch())
    assert [t.calls for t in each.values()] == [1, 1]
    loaded = pickle.loads(pickle.dumps(forcing))
    with pytest.raises(ConfigError, match="never pickled"):
        loaded.losses(fake_batch())


def test_a_state_of_other_teachers_is_refused():
    with pytest.raises(CheckpointError, match=r"missing.*projector\.geometry\.fc1\.weight"):
        forced(teachers()).load_projector_state_dict(forced(FakeTeacher()).projector_state_dict())


DEPTHS = {"geometry": 3, "semantics": 2}


@pytest.mark.parametrize(
    ("options", "depths", "message"),
    [
        ({"pairs": ((1, 0),)}, DEPTHS, "geometry, semantics.*forcing.teachers"),
        ({"teachers": ("geometry",)}, DEPTHS, "leaves out semantics"),
        ({"teachers": ("geometry", "texture")}, DEPTHS, "names texture.*geometry, semantics"),
        ({"teachers": ("geometry",)}, {"": 3}, "one without a label"),
        (
            {"pairs": ((1, 0), (1, 2)), "teachers": ("geometry", "semantics")},
            DEPTHS,
            "layer 2 of teacher sem",
        ),
        ({"weights": (1.0, 1.0, 1.0)}, DEPTHS, "weights has 3 entries for 2 pairs"),
        ({"gate": True}, DEPTHS, "forcing.gate"),
    ],
)
def test_what_cannot_be_resolved_is_named(options, depths, message):
    with pytest.raises(ConfigError, match=message):
        resolve_pairs(ForcingConfig(**options), 4, depths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": ((1, 0),), "teachers": ("a", "b")}, "teachers has 2 entries for 1 pairs"),
        ({"teachers": ("a", "a")}, "twice"),
        ({"pairs": ((1, 0), (1, 0)), "teachers": ("a", "a")}, "twice"),
        ({"weights": (-1.0,)}, "weights is -1.0"),
        ({"weights": (0.0, 0.0)}, "aligns nothing"),
        ({"weights": (1.0, 1.0), "gate": True, "pairs": ((1, 0), (2, 0))}, "forcing.weights"),
        ({"teachers": ("a", "b"), "gate": True}, "forcing.gate"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ForcingConfig(**options)
    # The same pair for two teachers is none that is named twice.
    assert ForcingConfig(pairs=((1, 0), (1, 0)), teachers=("a", "b")).teachers == ("a", "b")


@pytest.mark.parametrize("label", ["0", "a.b", "items", "two words"])
def test_a_label_is_a_name(label):
    with pytest.raises(ConfigError, match=label):
        forced({label: FakeTeacher()})
