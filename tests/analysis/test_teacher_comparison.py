"""`teacher compare`: several teachers on the same frames."""

import json

import pytest
import torch

from spatial_forcing.analysis.teachers import compare_teachers, content_rows, cost_rows, teachers_page
from spatial_forcing.cli import main
from spatial_forcing.data import Dataset
from spatial_forcing.errors import CheckpointError, ConfigError
from tests.analysis.rooms import write_rooms
from tests.data_layer.conftest import write_dataset
from tests.fakes import FakeTeacher


class Constant(FakeTeacher):
    """Nearly the same vector everywhere."""

    name, licence = "constant", "CC-BY-NC-4.0"

    def features(self, views, layers=(-1,)):
        return tuple(100 + 0.01 * f for f in super().features(views, layers))


class Blind(FakeTeacher):
    """Noise."""

    name, licence = "blind", "LicenseRef-x"

    def features(self, views, layers=(-1,)):
        return tuple(torch.randn(f.shape) for f in super().features(views, layers))


TEACHERS = {"fake": FakeTeacher, "constant": Constant, "blind": Blind}


def load(name):
    if name not in TEACHERS:
        raise CheckpointError(f"no {name} here")
    return TEACHERS[name](resolution=24)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms") / "data", episodes=8, frames=4)


def test_measures_tell_teachers_apart(rooms):
    found = compare_teachers(["fake", "constant", "blind"], load, rooms, frames=32)
    fake, constant, blind = found.measures
    assert [m.commercial for m in found.measures] == ["yes", "no", "ask"]
    assert (fake.channels, fake.grid, fake.frame) == (8, (6, 6), 2 * 2 * 36 * 8)
    assert fake.milliseconds > 0
    assert fake.peak >= 0
    assert constant.tokens.constant > 0.99 > fake.tokens.constant
    # The colour of a patch is its depth here: features that hold it beat the floor, noise does not.
    assert fake.depth.abs_rel < 0.5 * found.floor.abs_rel
    assert blind.depth.abs_rel > 0.8 * found.floor.abs_rel
    assert fake.agreement is None
    assert any("agreement between views" in each for each in found.without)
    assert {name: p.shape for name, p in found.pictures.items()} == dict.fromkeys(TEACHERS, (3, 6, 6, 3))
    rows = content_rows(found)
    assert [row[0].text for row in rows] == ["fake", "constant", "blind", "mean depth image (floor)"]
    assert len(cost_rows(found)) == 3


def test_a_teacher_that_fails_is_named_and_the_others_are_measured(rooms):
    found = compare_teachers(["gone", "fake"], load, rooms, frames=8, cameras=("wrist",))
    assert [m.name for m in found.measures] == ["fake"]
    assert found.failed == {"gone": "no gone here"}
    assert found.cameras == ("wrist",)
    page = teachers_page(found, "rooms", "command")
    assert any("gone" in sentence for sentence in page.sections[0].text)
    with pytest.raises(CheckpointError, match="no gone here"):
        compare_teachers(["gone", "lost"], load, rooms, frames=8)


def test_without_depth_or_with_few_episodes_the_rest_is_measured(tmp_path):
    plain = Dataset.open(write_dataset(tmp_path / "plain"))
    with pytest.raises(ConfigError, match=r"differ in size: .*--cameras"):
        compare_teachers(["fake"], load, plain, frames=4)
    found = compare_teachers(["fake"], load, plain, frames=4, cameras=plain.cameras[:1])
    assert found.floor is None
    assert found.measures[0].depth is None
    assert any("depth: none is recorded" in each for each in found.without)
    few = write_rooms(tmp_path / "few", episodes=2, frames=2)
    found = compare_teachers(["fake"], load, few, frames=4)
    assert found.frames == 4
    assert any("there are 2" in each for each in found.without)


def test_the_command_writes_page_and_numbers(rooms, tmp_path, capsys):
    main(
        [
            *("teacher", "compare", "--dataset", str(rooms.root), "--frames", "8"),
            *("--teachers", "vggt-nano", "random:vggt-nano", "--output", str(tmp_path / "out")),
        ]
    )
    said = capsys.readouterr().out
    assert "1  vggt-nano\n2  random:vggt-nano\n3  mean depth image (floor)\n" in said
    assert all(len(line) <= 80 for line in said.splitlines() if line.startswith("│"))
    numbers = json.loads((tmp_path / "out" / "teachers.json").read_text())
    assert [m["name"] for m in numbers["measures"]] == ["vggt-nano", "random:vggt-nano"]
    page = (tmp_path / "out" / "teachers.html").read_text()
    assert "spatial-forcing teacher compare --dataset" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teachers", "vggt-nano", "vggt-nano"], "each once"),
        (["--teachers", "vggt-nano", "--frames", "0"], "frames is 0"),
    ],
)
def test_wrong_options_stop_before_any_work(rooms, tmp_path, arguments, message, capsys):
    with pytest.raises((SystemExit, ConfigError)) as stopped:
        main(
            ["teacher", "compare", "--dataset", str(rooms.root), "--output", str(tmp_path / "o"), *arguments]
        )
    assert message in str(stopped.value) + capsys.readouterr().err
    assert not (tmp_path / "o").exists()
