import json
from dataclasses import asdict

import pytest

from spatial_forcing.commands import compare as command
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.evaluation.results import EpisodeResult
from spatial_forcing.experiments import CompareConfig


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The configurations that the command would run."""
    seen = []
    monkeypatch.setattr(command, "run_comparison", lambda config, console: seen.append(config))
    monkeypatch.setattr(command, "write_page", lambda config, found: tmp_path / "report.html")
    return seen


def test_arms_with_overrides_and_a_file_as_starting_point(asked, tmp_path):
    options = [
        "--dataset",
        "d",
        "--output",
        "o",
        "--arms",
        "alpha0",
        "big=sf forcing.alpha=2",
        "--seeds",
        "3",
        "4",
    ]
    command.compare(
        "spatial-forcing compare", [*options, "--set", "optim.lr=1e-4", "--fractions", "0.05", "1"]
    )
    (config,) = asked
    assert config.arms == ("alpha0", "big=sf forcing.alpha=2")
    assert (config.seeds, config.fractions, config.set) == ((3, 4), (0.05, 1.0), ("optim.lr=1e-4",))
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(config.to_plain()))
    command.compare("spatial-forcing compare", ["--config", str(path), "--seeds", "9", "--steps", "40"])
    assert isinstance(asked[1], CompareConfig)
    assert (asked[1].arms, asked[1].seeds, asked[1].steps) == (config.arms, (9,), 40)
    # What the file leaves out comes from the command line.
    path.write_text('{"seeds": [7, 8]}')
    command.compare("spatial-forcing compare", ["--config", str(path), "--dataset", "d", "--output", "o"])
    assert (asked[2].seeds, str(asked[2].dataset)) == ((7, 8), "d")
    with pytest.raises(SystemExit):
        command.compare("spatial-forcing compare", ["--config", str(path), "--dataset", "d"])
    with pytest.raises(ConfigError, match=r"gone\.json cannot be read .* give a compare\.json"):
        command.compare("spatial-forcing compare", ["--config", str(tmp_path / "gone.json")])


def test_two_checkpoints_over_identical_episodes(tmp_path, capsys):
    path = tmp_path / "episodes.jsonl"
    rows = [
        EpisodeResult("a", i, won, 1, 0.0, 0.0, tags={"arm": arm, "step": 40})
        for arm, wins in (("sf", 9), ("alpha0", 1))
        for i in range(10)
        for won in [i < wins]
    ]
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    options = command.CheckpointOptions((path,), ("arm=sf", "step=40"), ("arm=alpha0", "step=40"))
    command.checkpoints(options)
    shown = " ".join(capsys.readouterr().out.split())
    assert "only the first succeeds in 8, only the second in 0; McNemar's exact p = 0.008." in shown
    assert "90 % [60, 98]" in shown
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        command.checkpoints(command.CheckpointOptions((tmp_path / "nowhere.jsonl",), ("arm=sf",), ("arm=b",)))
    with pytest.raises(DataError, match=r"episodes\.jsonl .*\{'arm': 'sff'\}"):
        command.checkpoints(command.CheckpointOptions((path,), ("arm=sff",), ("arm=alpha0",)))


def test_sample_size_prints_a_plan(capsys):
    command.sample_size(command.SampleSizeOptions(effect=0.1, episodes=(80, 320)))
    shown = capsys.readouterr().out
    assert "To see 10 points at 80 % power" in shown
    assert " 80 " in shown
    assert " 320 " in shown
