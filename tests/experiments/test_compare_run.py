"""A whole comparison at toy size: real training, caches and rollouts, in this process."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from spatial_forcing.analysis.run_page import read_representation
from spatial_forcing.commands import report as report_command
from spatial_forcing.commands.analyse import AnalyseOptions, analyse
from spatial_forcing.commands.probe import ProbeOptions, probe
from spatial_forcing.data import Dataset
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.experiments import CompareConfig, compare
from spatial_forcing.experiments import run as module
from spatial_forcing.experiments.checks import CONFIG
from spatial_forcing.experiments.config import cells
from spatial_forcing.experiments.report import write_page
from spatial_forcing.students import FusionVLA, NanoVLA, load_student
from spatial_forcing.training import train
from spatial_forcing.training.metrics import read_metrics
from tests.analysis.rooms import write_rooms
from tests.experiments.room_env import make_room

PLAIN, FORCED, FUSED = "no alignment", "spatial forcing", "teacher as input"
SMALL = (
    'student.cameras=["front","wrist"]', "student.image_size=32", "student.width=16", "student.depth=2",
    "student.heads=2", "student.action_dim=3", "student.chunk=2", "student.vocab=64", "batch_size=4",
    "forcing.pairs=[[1,-1]]", "cpu=true", "trackers=[]", "prefetch=false", "log_every=1",
)  # fmt: skip
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("compare") / "data", episodes=4, frames=3).root


def settings(rooms, output, **changes):
    defaults = {
        "arms": ("alpha0", "sf", "fusion"), "seeds": (0, 1), "set": SMALL, "steps": 2, "checkpoints": 2,
        "tasks": ("room",), "episodes": 2, "execute": 2, "horizon": 3, "image_size": 24, "parallel": 1,
    }  # fmt: skip
    return CompareConfig(dataset=rooms, output=output, **{**defaults, **changes})


@pytest.fixture(scope="module")
def moving_rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("moving") / "data", episodes=4, frames=3, moving=True).root


@pytest.fixture
def trained(monkeypatch):
    """Trains in this process, and notes what was trained and evaluated."""
    done = []

    def here(arms, *, parallel, console):
        for name, config in arms.items():
            done.append((name, config))
            train(config)

    monkeypatch.setattr(module, "train_arms", here)
    return done


@pytest.fixture
def evaluated(monkeypatch):
    calls = []
    original = module.evaluate

    def noted(*args, **kwargs):
        calls.append(kwargs["tags"])
        return original(*args, **{**kwargs, "progress": False})

    monkeypatch.setattr(module, "evaluate", noted)
    return calls


def test_comparison_is_matched_resumes_and_grows(rooms, tmp_path, trained, evaluated):
    config = settings(rooms, tmp_path / "out")
    found = compare(config, QUIET, make_room)
    assert [name for name, _ in trained] == [cell.name for cell in cells(config)]
    assert len(evaluated) == 3 * 2 * 2
    assert found.missing == ()
    assert {row.arm: row.success.mean for row in found.rows} == dict.fromkeys((PLAIN, FORCED, FUSED), 0.5)
    assert [(c.arm, c.verdict) for c in found.contrasts] == [(FORCED, "not shown"), (FUSED, "not shown")]
    assert all(row.act_ms > 0 and row.seconds > 0 and row.peak_memory > 0 for row in found.rows)

    # Matched: same first loss, whatever the arm (the fusion arm's output starts at zero).
    losses = {c.name: read_metrics(config.output / "runs" / c.name)[0]["action_loss"] for c in cells(config)}
    assert losses["sf-seed0"] == losses["alpha0-seed0"]
    assert losses["fusion-seed0"] == pytest.approx(losses["alpha0-seed0"], rel=1e-5)
    assert losses["alpha0-seed0"] != pytest.approx(losses["alpha0-seed1"], rel=1e-6)

    # The same command does nothing again; a further arm trains only its own runs.
    trained.clear()
    evaluated.clear()
    again = compare(config, QUIET, make_room)
    assert trained == []
    assert evaluated == []
    assert again.to_json() == found.to_json()
    trained.clear()
    shuffled = settings(rooms, config.output, arms=("alpha0", "sf", "fusion", "shuffled"))
    grown = compare(shuffled, QUIET, make_room)
    assert [name for name, _ in trained] == ["shuffled-seed0", "shuffled-seed1"]
    assert {tags["arm"] for tags in evaluated} == {"shuffled"}
    assert len(grown.contrasts) == 3

    files = config.output
    assert json.loads((files / "comparison.json").read_text())["sentences"] == grown.sentences()
    assert (files / "comparison.csv").read_text().count("\n") == 5
    page = write_page(shuffled, grown).read_text()
    assert "A difference is not shown." in page
    assert "Paired differences" in page

    with pytest.raises(ConfigError, match=r"other settings \(episodes: 2 there, 3 asked for\)"):
        compare(settings(rooms, config.output, episodes=3), QUIET, make_room)


def test_a_comparison_from_before_a_setting_existed_goes_on(rooms, tmp_path, trained, evaluated):
    config = settings(rooms, tmp_path / "out", arms=("alpha0", "sf"), checkpoints=1)
    compare(config, QUIET, make_room)
    path = config.output / CONFIG
    old = json.loads(path.read_text())
    del old["held_out"]
    path.write_text(json.dumps(old))
    trained.clear()
    assert compare(config, QUIET, make_room).contrasts
    assert trained == []


def test_a_comparison_moves_with_its_demonstrations_and_goes_on(tmp_path, trained, evaluated):
    rooms = write_rooms(tmp_path / "all" / "demonstrations", episodes=4, frames=3).root
    config = settings(rooms, tmp_path / "all", arms=("alpha0", "sf"), seeds=(0,), checkpoints=1)
    compare(config, QUIET, make_room)
    trained.clear()
    moved = (tmp_path / "all").rename(tmp_path / "moved")
    grown = settings(moved / "demonstrations", moved, arms=("alpha0", "sf"), checkpoints=1)
    compare(grown, QUIET, make_room)
    assert [name for name, _ in trained] == ["alpha0-seed1", "sf-seed1"]
    written = [
        *moved.glob("*.json"),
        *moved.glob("runs/*/*.json"),
        *moved.glob("runs/*/checkpoints/*/state.json"),
    ]
    assert [path for path in written if str(tmp_path) in path.read_text()] == []


def no_environment(task, **kwargs):
    raise AssertionError("a comparison without tasks made an environment")


def test_without_a_simulator_arms_are_compared_on_held_out_demonstrations(
    moving_rooms, tmp_path, trained, monkeypatch
):
    config = settings(moving_rooms, tmp_path / "out", arms=("alpha0", "sf"), tasks=(), held_out=0.3, steps=4)
    found = compare(config, QUIET, no_environment)
    kept, held = module.hold_out(Dataset.open(moving_rooms), 0.3)
    assert len(held) == 2
    assert [run.episodes for _, run in trained] == [tuple(kept)] * 4
    # Nothing of the held-out episodes enters a run, its scales included.
    scales = Dataset.open(moving_rooms).statistics(kept)["action"]
    middle = torch.from_numpy((scales["min"] + scales["max"]) / 2).float()
    everywhere = Dataset.open(moving_rooms).statistics()["action"]
    assert not (scales["max"] == everywhere["max"]).all() or not (scales["min"] == everywhere["min"]).all()
    for _, run in trained:
        torch.testing.assert_close(load_student(run.output / "policy").action_norm.offset, middle)
    assert found.rows == ()
    assert found.held_out.episodes == 2
    assert [row.arm for row in found.held_out.rows] == [PLAIN, FORCED]
    assert [sorted(row.curve) for row in found.held_out.rows] == [[2, 4]] * 2
    assert found.held_out.contrasts[0].control == PLAIN
    assert all(row.act_ms > 0 and row.seconds > 0 and row.peak_memory > 0 for row in found.held_out.rows)
    # What a policy of another step or another seed would have.
    errors = {e for row in found.held_out.rows for e in (*row.per_seed.values(), *row.curve.values())}
    assert len(errors) == 8
    assert min(errors) > 0.2
    assert (config.output / "held-out.csv").read_text().count("\n") == 3
    assert not (config.output / "comparison.csv").exists()
    page = write_page(config, found).read_text()
    assert "Held-out error against the controls" in page
    assert "30 % of the demonstrations held out" in page

    trained.clear()
    monkeypatch.setattr(module, "open_loop_errors", no_environment)
    assert compare(config, QUIET, no_environment).to_json() == found.to_json()
    assert trained == []
    with pytest.raises(ConfigError, match=r"held_out: 0.3 there, 0.5 asked for"):
        compare(
            settings(moving_rooms, config.output, arms=("alpha0", "sf"), tasks=(), held_out=0.5, steps=4),
            QUIET,
        )


def test_the_page_shows_what_else_was_found_out_about_the_runs(moving_rooms, tmp_path, trained):
    config = settings(
        moving_rooms, tmp_path / "out", arms=("alpha0", "sf"), tasks=(), held_out=0.25, checkpoints=1,
        set=(*SMALL, "audit_every=1"),
    )  # fmt: skip
    found = compare(config, QUIET, no_environment)
    assert {row.arm for row in found.audits} == {FORCED}
    assert (
        (config.output / "audit.csv")
        .read_text()
        .startswith(f"arm,fraction,place,seeds,cosine,ratio\n{FORCED},")
    )
    page = write_page(config, found).read_text()
    assert 'id="gradients"' in page
    assert 'id="probe"' not in page

    run = config.output / "runs" / "sf-seed0"
    analyse(AnalyseOptions(run, frames=4, maps=False))
    policies = (run / "policy", config.output / "runs" / "alpha0-seed0" / "policy")
    probe(ProbeOptions(policies, moving_rooms, layers=(1,), teacher="none", output=config.output / "probe"))
    page = write_page(config, found).read_text()
    for part in ('id="probe"', "Tokens of sf-seed0", f"{policies[1]}: align layer 1"):
        assert part in page
    assert 'data-csv="tokens-sf-seed0-ranks"' in page

    # Layers that cannot be aligned lead to no suggestion, and are written all the same.
    probe(ProbeOptions(policies[:1], moving_rooms, layers=(0,), teacher="none", output=tmp_path / "zero"))
    assert json.loads((tmp_path / "zero" / "probe.json").read_text())["suggestions"] == {}

    (config.output / "probe" / "probe.json").write_text('{"metrics": [{"name": "x"}], "suggestions": {}}')
    with pytest.raises(DataError, match=r"probe\.json is not a result of the probe"):
        write_page(config, found)
    (run / "analysis.json").write_text('{"verdict": "fine"}')
    with pytest.raises(DataError, match=r"analysis\.json is not an analysis of a run"):
        read_representation(run)


def test_a_comparison_without_rollouts_may_get_them_later(moving_rooms, tmp_path, trained, evaluated):
    without = settings(moving_rooms, tmp_path / "out", tasks=(), held_out=0.25, steps=4, checkpoints=1)
    before = compare(without, QUIET, no_environment)
    trained.clear()
    later = replace(without, tasks=("room",))
    found = compare(later, QUIET, make_room)
    assert trained == []
    assert found.held_out == before.held_out
    assert found.rows
    with pytest.raises(ConfigError, match=r"episodes: 2 there, 3 asked for"):
        compare(replace(later, episodes=3), QUIET, make_room)


def test_held_out_errors_stand_beside_success(moving_rooms, tmp_path, trained, evaluated):
    config = settings(moving_rooms, tmp_path / "out", arms=("alpha0", "sf"), held_out=0.25, checkpoints=1)
    found = compare(config, QUIET, make_room)
    assert [row.success.mean for row in found.rows] == [0.5, 0.5]
    assert found.held_out.episodes == 1
    assert sum(s.startswith(f"Held-out error, {FORCED} against {PLAIN}") for s in found.sentences()) == 1
    assert len(found.tables()) == 4
    torch.testing.assert_close(
        found.held_out.contrasts[0].difference.value,
        found.held_out.rows[1].mean / found.held_out.rows[0].mean - 1,
    )
    # A file of errors that is gone is measured again, and nothing else.
    (config.output / "runs" / "sf-seed1" / module.ERRORS).unlink()
    trained.clear()
    evaluated.clear()
    assert compare(config, QUIET, make_room).to_json() == found.to_json()
    assert trained == evaluated == []


def test_the_page_is_made_again_from_a_folder_that_was_moved(
    moving_rooms, tmp_path, trained, evaluated, monkeypatch
):
    config = settings(moving_rooms, tmp_path / "out", held_out=0.25, steps=4, checkpoints=1, videos=1)
    found = compare(config, QUIET, make_room)
    before = write_page(config, found).read_bytes()
    filmed = {path.relative_to(config.output).parts[1] for path in config.output.rglob("*.mp4")}
    assert filmed == {"alpha0-seed0", "sf-seed0", "fusion-seed0"}  # of the first training seed
    moved = config.output.rename(tmp_path / "moved")
    (moved / "report.html").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in moved.rglob("*") if path.is_file()}
    trained.clear()
    evaluated.clear()
    report_command.report(moved)
    assert trained == evaluated == []
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    after = (moved / "report.html").read_bytes()
    assert after.replace(b"/moved", b"/out") == before
    seen = []
    monkeypatch.setattr("webbrowser.open", lambda address: seen.append(address) or True)
    report_command.open_page(moved)
    assert seen == [(moved / "report.html").resolve().as_uri()]

    (moved / "comparison.json").unlink()
    with pytest.raises(ConfigError, match=r"moved/comparison\.json"):
        report_command.report(moved)
    assert (moved / "report.html").read_bytes() == after
    with pytest.raises(ConfigError, match=r"compare\.json does not exist"):
        report_command.report(tmp_path)
    with pytest.raises(ConfigError, match=r"/nothing holds no page"):
        report_command.open_page(tmp_path / "nothing")


def test_a_kill_between_runs_loses_no_finished_work(rooms, tmp_path, trained, evaluated, monkeypatch):
    config = settings(rooms, tmp_path / "out", arms=("alpha0", "blind"), checkpoints=1)
    counted = module.evaluate

    def killed(*args, **kwargs):
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return counted(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(config, QUIET, make_room)
    trained_before = [name for name, _ in trained]
    assert trained_before == ["alpha0-seed0", "blind-seed0", "alpha0-seed1", "blind-seed1"]
    monkeypatch.setattr(module, "evaluate", counted)
    found = compare(config, QUIET, make_room)
    assert len(evaluated) == 4
    assert [name for name, _ in trained] == trained_before
    assert found.contrasts[0].difference.episodes == 2


def test_fusion_starts_as_the_nano_student_and_keeps_the_teacher_out_of_its_files(rooms, tmp_path):
    config = settings(rooms, tmp_path / "out", arms=("alpha0", "fusion"), seeds=(0,))
    plain, fused = module.prepare(config, Dataset.open(rooms), make_room)
    student = module.load_student(fused.train.init_from)
    base = NanoVLA(plain.train.student, seed=0)
    assert student.action_norm.scale.abs().sum() == 0  # the rooms' actions are constant
    student.action_norm.scale.fill_(1.0)
    batch = module.Frames.read(Dataset.open(rooms), [0, 5], ("front", "wrist")).observations(slice(0, 2))
    assert isinstance(student, FusionVLA)
    torch.testing.assert_close(student.act(batch), base.act(batch))
    student.fuse.out.weight.data.normal_()
    assert not torch.allclose(student.act(batch), base.act(batch))
    student.save_pretrained(tmp_path / "saved")
    assert (load_student(tmp_path / "saved").act(batch) == student.act(batch)).all()
    assert not any("aggregator" in key for key in student.state_dict())
