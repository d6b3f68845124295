import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spatial_forcing.analysis.features import Frames
from spatial_forcing.analysis.report import ReportData, render
from spatial_forcing.analysis.representation import (
    audit_curves,
    cka,
    cka_matrix,
    collapse_verdict,
    effective_rank,
    load_projector,
    pca_2d,
    projected,
    rank_report,
    tsne,
)
from spatial_forcing.analysis.run_page import audit_section, represent, representation_section
from spatial_forcing.errors import CheckpointError, DataError
from spatial_forcing.forcing import ForcingConfig, SpatialForcing, gradient_audit
from tests.analysis.rooms import SeeingStudent, write_rooms
from tests.fakes import FakeTeacher, fake_batch


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_effective_rank_by_hand():
    axes = torch.eye(4).repeat(50, 1) * torch.tensor([1.0, -1.0]).repeat(100)[:, None]
    # The reference takes the singular values themselves; the code their squares from the small product.
    values = torch.linalg.svdvals((axes - axes.mean(0)).double())
    share = values / values.sum()
    assert effective_rank(axes) == pytest.approx(float(torch.exp(-(share * share.log()).nansum())))
    line = torch.linspace(-1, 1, 20)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.ones(10, 3)) == 0.0
    assert effective_rank(noise(5000, 6)) == pytest.approx(6, abs=0.05)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_effective_rank_is_within_bounds_and_free_of_scale_rotation_and_shift(seed, scale):
    x = noise(40, 5, seed=seed)
    turn = torch.linalg.qr(noise(5, 5, seed=seed + 1))[0]
    assert 1 <= effective_rank(x) <= 5 + 1e-6
    assert effective_rank(scale * x @ turn + 3) == pytest.approx(effective_rank(x), rel=1e-3)


def test_collapse_is_found_and_named():
    varied = rank_report("target", noise(400, 16))
    flat = rank_report("tokens", noise(400, 1) @ noise(1, 16))
    alike = rank_report("tokens", 30 + noise(400, 16))
    assert "collapsed to few directions" in collapse_verdict(flat, varied)
    assert "nearly the same vector" in collapse_verdict(alike, varied)
    assert "No sign of collapse" in collapse_verdict(varied, varied)
    assert alike.constant > 0.99
    assert varied.constant < 0.05
    assert alike.cosine > 0.99
    with pytest.raises(DataError, match=r"'one' are \(1, 4\)"):
        rank_report("one", noise(1, 4))


def test_mean_cosine_is_that_of_all_pairs():
    x = noise(12, 4) + 0.5
    unit = torch.nn.functional.normalize(x, dim=1)
    pairs = (unit @ unit.T)[~torch.eye(12, dtype=torch.bool)]
    assert rank_report("x", x).cosine == pytest.approx(float(pairs.mean()), abs=1e-6)


def test_cka_is_that_of_the_gram_matrices_and_free_of_rotation():
    x, y = noise(30, 5), noise(30, 7, seed=1)
    centre = torch.eye(30) - 1 / 30
    k, m = (centre @ (t @ t.T) @ centre for t in (x, y))
    expected = float((k * m).sum() / (k.norm() * m.norm()))
    assert cka(x, y) == pytest.approx(expected, rel=1e-4)
    turn = torch.linalg.qr(noise(5, 5, seed=2))[0]
    assert cka(x, 3 * x @ turn + 1) == pytest.approx(1.0, abs=1e-6)
    assert cka(x, y) < 0.5
    with pytest.raises(DataError, match=r"30 and 4"):
        cka(x, y[:4])


def test_cka_matrix_reads_the_teacher_at_the_students_tokens():
    coarse = noise(2, 1, 3, 3, 4)
    fine = torch.nn.functional.interpolate(
        coarse[:, 0].permute(0, 3, 1, 2), (5, 5), mode="bilinear", align_corners=True
    ).permute(0, 2, 3, 1)[:, None]
    other = noise(2, 1, 5, 5, 4, seed=3)
    matrix = cka_matrix({0: coarse, 1: noise(2, 1, 3, 3, 6, seed=4)}, {0: other, 1: fine})
    assert matrix.shape == (2, 2)
    assert matrix[0, 1] == pytest.approx(1.0, abs=1e-6)
    assert matrix[0, 0] < 0.9


def test_maps_keep_clusters_apart():
    two = torch.cat([noise(30, 8), noise(30, 8, seed=1) + 12])
    for method in (pca_2d, tsne):
        points = method({"two": two})["two"]
        assert points.shape == (60, 2)
        apart = np.linalg.norm(points[:30].mean(0) - points[30:].mean(0))
        within = max(points[:30].std(), 1e-9)
        assert apart > 1.5 * within, method.__name__


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms") / "data", 4, 3)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_a_runs_projector_is_read_back(tmp_path, norm):
    forcing = SpatialForcing(SeeingStudent(), FakeTeacher(), ForcingConfig(norm=norm, gate=norm == "none"))
    save_file(forcing.projector_state_dict(), tmp_path / "projector.safetensors")
    read = load_projector(tmp_path)
    tokens = noise(2, 2, 3, 3, 16)
    expected = forcing.projector.eval()(tokens.flatten(1, 3), torch.ones(2, 18, dtype=torch.bool))
    torch.testing.assert_close(projected(read, tokens).flatten(1, 3), expected.detach())
    assert load_projector(tmp_path / "nothing") is None
    config = ForcingConfig(pairs=((1, -1), (2, -1)), norm=norm, projectors="independent")
    own = SpatialForcing(SeeingStudent(), FakeTeacher(), config)
    save_file(own.projector_state_dict(), tmp_path / "projector.safetensors")
    torch.testing.assert_close(
        projected(load_projector(tmp_path), tokens).flatten(1, 3),
        own.projector[0].eval()(tokens.flatten(1, 3), torch.ones(2, 18, dtype=torch.bool)).detach(),
    )
    save_file({"projector.fc1.weight": noise(2, 2)}, tmp_path / "projector.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)projector\.safetensors.*fc1\.bias"):
        load_projector(tmp_path)


def test_the_page_of_a_run_holds_ranks_cka_maps_and_the_audit(rooms):
    frames = Frames.read(rooms, [0, 4, 8, 11], ("front", "wrist"))
    teacher, student = FakeTeacher(), SeeingStudent()
    forcing = SpatialForcing(student, teacher)
    found, shown = represent(student, teacher, frames, aligned=3, projector=forcing.projector)
    assert (found.layers, found.teacher_layers) == ((0, 1, 2, 3, 4), (0, 1, 2))
    assert {r.name for r in found.ranks} >= {"student, layer 0", "projected tokens", "teacher"}
    assert all(0 <= v <= 1 + 1e-9 for row in found.cka for v in row)
    audits = [
        {"step": s} | {f"audit/{k if '/' in k else k + '/all'}": v for k, v in found_at.items()}
        for s, found_at in (
            (10, gradient_audit(forcing, fake_batch())),
            (20, gradient_audit(forcing, fake_batch(seed=1))),
        )
    ]
    assert {"all", "block0", "input"} <= set(audit_curves(audits)["cosine"])
    assert audit_section([{"step": 1, "loss": 0.3}]) is None
    sections = (audit_section(audits), representation_section(found, shown, frames))
    page = render(ReportData("Analysis", "", sections=sections))
    for text in ("Gradient audit", "Linear CKA", "t-SNE: teacher", "PCA: projected tokens", "effective rank"):
        assert text in page
    assert json.dumps(found.verdict)
