import json
from dataclasses import replace
from pathlib import Path

import pytest

from spatial_forcing.errors import ConfigError
from spatial_forcing.experiments import ARMS, CompareConfig, parse_arm
from spatial_forcing.experiments.config import cells, evaluated_steps, teacher_layers, train_config

STUDY = Path(__file__).parents[2] / "studies" / "compare"


def config(tmp_path, **changes):
    return CompareConfig(dataset=tmp_path / "data", output=tmp_path / "out", **changes)


def test_arms_are_presets_with_any_override():
    arm = parse_arm("strong=sf forcing.alpha=2 forcing.norm=batch 'forcing.pairs=[[1,-1]]'")
    assert arm.name == "strong"
    assert arm.target == "teacher"
    assert arm.overrides == {"forcing.alpha": 2, "forcing.norm": "batch", "forcing.pairs": [[1, -1]]}
    assert parse_arm("sf forcing.alpha=2").name == "sf(alpha=2)"
    assert parse_arm("sf") is ARMS["sf"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sff", "Did you mean 'sf'"),
        ("sf alpha", "not of the form"),
        ("", "empty"),
        ("x=nothing", "unknown arm"),
    ],
)
def test_wrong_arms_are_explained(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_arm(text)


def test_every_arm_is_a_valid_training_run_and_differs_only_as_it_says(tmp_path):
    compared = config(tmp_path, arms=tuple(ARMS), seeds=(3,), fractions=(0.2,), steps=40)
    runs = {cell.arm.name: train_config(compared, cell) for cell in cells(compared)}
    assert {run.seed for run in runs.values()} == {3}
    assert {run.fraction for run in runs.values()} == {0.2}
    assert {run.steps for run in runs.values()} == {40}
    assert {name for name, run in runs.items() if not run.forces} == {"alpha0", "blind", "fusion"}
    assert runs["blind"].student.blank_images
    assert runs["standardised"].forcing.standardise
    assert runs["multi"].forcing.pairs == ((1, -1), (2, -1), (3, -1))
    assert runs["multi"].forcing.projectors == "shared"
    assert runs["independent"].forcing.pairs == runs["multi"].forcing.pairs
    assert runs["independent"].forcing.projectors == "independent"
    assert runs["gated"].forcing.gate
    assert runs["shuffled"].teacher == "shuffled:vggt-nano"
    assert runs["random"].teacher == "random:vggt-nano"
    assert runs["2d"].teacher == "facebook/dinov2-base"
    assert teacher_layers(list(runs.values())) == {
        "vggt-nano": (-1,),
        "random:vggt-nano": (-1,),
        "facebook/dinov2-base": (-1,),
    }


def test_arms_may_have_teachers_of_their_own(tmp_path):
    compared = config(
        tmp_path,
        arms=(
            "alpha0",
            "sf",
            "da3=sf teacher=depth-anything/DA3-SMALL",
            """two=sf 'teachers={"geometry":"vggt-nano","semantics":"facebook/dinov2-base"}'"""
            """ 'forcing.pairs=[[3,-2],[3,-1]]' 'forcing.teachers=["geometry","semantics"]'""",
        ),
        seeds=(0,),
        steps=40,
    )
    built = {"vggt-nano": tmp_path / "v", "facebook/dinov2-base": tmp_path / "d"}
    runs = {cell.arm.name: train_config(compared, cell, built) for cell in cells(compared)}
    named = {name: [(s.label, s.teacher, s.cache) for s in run.sources] for name, run in runs.items()}
    assert named == {
        "alpha0": [],
        "sf": [("", "vggt-nano", tmp_path / "v")],
        "da3": [("", "depth-anything/DA3-SMALL", None)],
        "two": [
            ("geometry", "vggt-nano", tmp_path / "v"),
            ("semantics", "facebook/dinov2-base", tmp_path / "d"),
        ],
    }
    assert teacher_layers(list(runs.values())) == {
        "vggt-nano": (-2, -1),
        "depth-anything/DA3-SMALL": (-1,),
        "facebook/dinov2-base": (-1,),
    }


def test_settings_reach_every_arm_and_the_arms_own_win(tmp_path):
    compared = config(
        tmp_path, arms=("alpha0", "b=sf optim.lr=5e-4"), set=("optim.lr=1e-4", "batch_size=8"), steps=8
    )
    runs = {cell.arm.name: train_config(compared, cell) for cell in cells(compared)[:2]}
    assert {run.batch_size for run in runs.values()} == {8}
    assert (runs["alpha0"].optim.lr, runs["b"].optim.lr) == (1e-4, 5e-4)
    with pytest.raises(ConfigError, match="unknown setting"):
        train_config(config(tmp_path, set=("optim.lrr=1",)), cells(compared)[0])


def test_an_arm_may_train_longer_and_keeps_every_evaluated_checkpoint(tmp_path):
    compared = config(tmp_path, arms=("alpha0", "long=alpha0 steps=80"), set=("steps=30",), steps=40)
    short, long = (train_config(compared, cell) for cell in cells(compared)[:2])
    assert (short.steps, short.save_every, short.keep) == (40, 10, 4)
    assert (long.steps, long.save_every, long.keep) == (80, 20, 4)


def test_runs_have_distinct_names_and_come_seed_by_seed(tmp_path):
    compared = config(tmp_path, arms=("alpha0", "sf forcing.alpha=2"), seeds=(1, 0), fractions=(0.05, 1.0))
    names = [cell.name for cell in cells(compared)]
    assert len(set(names)) == 8
    assert names[:4] == ["alpha0-5%-seed1", "sf(alpha=2)-5%-seed1", "alpha0-seed1", "sf(alpha=2)-seed1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("sf", "sf")}, "each once"),
        ({"arms": ("sf", "sf=alpha0"), "controls": ("sf",)}, "same name"),
        ({"controls": ("blind",)}, "no arms"),
        ({"fractions": (0.0,)}, r"\(0, 1\]"),
        ({"seeds": ()}, "one or more"),
        ({"episodes": 0}, "at least 1"),
        ({"threshold": 2.0}, "threshold"),
    ],
)
def test_wrong_settings_stop_at_once(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **changes)


def test_json_round_trip_and_even_checkpoints(tmp_path):
    compared = config(tmp_path, arms=("alpha0", "sf forcing.alpha=2"), threshold=0.4)
    named = replace(compared, teacher="vggt-nano")  # the file names the preset's
    assert CompareConfig.from_plain(compared.to_plain()) == named
    assert evaluated_steps(720, 4) == (180, 360, 540, 720)
    with pytest.raises(ConfigError, match=r"100.*\(3\)"):
        evaluated_steps(100, 3)


STUDIES = sorted(STUDY.parent.glob("*/*.json"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_configuration_of_the_studies_is_valid(path):
    compared = CompareConfig.from_plain(json.loads(path.read_text()))
    assert compared.output.name.endswith(path.stem)
    for cell in cells(compared):
        run = train_config(compared, cell)
        assert evaluated_steps(run.steps, compared.checkpoints)[-1] == run.steps


def test_tasks_may_be_empty_only_where_demonstrations_are_held_out(tmp_path):
    assert config(tmp_path, tasks=(), held_out=0.2).tasks == ()
    with pytest.raises(ConfigError, match=r"Without a simulator give compare\.held_out"):
        config(tmp_path, tasks=())
    with pytest.raises(ConfigError, match=r"held_out is 1.0; expected a share"):
        config(tmp_path, held_out=1.0)


def test_held_out_and_chosen_episodes_exclude_each_other(tmp_path):
    chosen = config(tmp_path, held_out=0.2, set=("episodes=[0,1]",))
    cell = cells(chosen)[0]
    with pytest.raises(ConfigError, match="held_out chooses the episodes"):
        train_config(chosen, cell, episodes=[0, 2])
    assert train_config(config(tmp_path, held_out=0.2), cell, episodes=[0, 2]).episodes == (0, 2)


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.json")), ids=lambda path: path.stem)
def test_the_studys_configurations_are_valid(path):
    compared = CompareConfig.from_plain(json.loads(path.read_text()))
    assert compared.output == Path("runs/compare") / path.stem
    for cell in cells(compared):
        run = train_config(compared, cell)
        assert run.steps % compared.checkpoints == 0
