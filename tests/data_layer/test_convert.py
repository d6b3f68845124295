"""The converter protocol and its runner, on a converter of numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from spatial_forcing import cli
from spatial_forcing.data import Dataset
from spatial_forcing.data.check import check
from spatial_forcing.data.convert import (
    CONVERTERS,
    Converter,
    EpisodeSkipped,
    Schema,
    SourceEpisode,
    load_converter,
)
from spatial_forcing.data.convert.run import LOG_FILE, convert, estimated_bytes
from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError


@dataclass(frozen=True)
class Numbers:
    """Every line of `source` is an episode: its numbers are the states."""

    source: Path
    output: Path
    gain: float = 1.0
    video: bool = False

    def schema(self) -> Schema:
        return Schema(10, {"front": (8, 8)}, ("x",), ("dx",), "numbers")

    def episodes(self) -> list[SourceEpisode]:
        lines = self.source.read_text().splitlines()
        return [
            SourceEpisode(f"line {i}", len(x.split()), lambda x=x: self._read(x)) for i, x in enumerate(lines)
        ]

    def _read(self, line):
        if line.startswith("bad"):
            raise EpisodeSkipped("it failed")
        for word in line.split():
            image = np.full((8, 8, 3), 7, np.uint8)
            value = self.gain * float(word)
            yield {"images": {"front": image}, "state": [value], "action": [value]}, "count"


@pytest.fixture
def numbers(tmp_path):
    source = tmp_path / "numbers.txt"
    source.write_text("1 2 3\n4 5\n")
    return Numbers(source, tmp_path / "out")


def test_every_episode_is_written_with_statistics(numbers):
    assert isinstance(numbers, Converter)
    dataset = Dataset.open(convert(numbers, progress=False))
    assert [episode.length for episode in dataset.episodes] == [3, 2]
    assert dataset.state[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert dataset.statistics()["observation.state"]["mean"][0] == 3
    assert check(numbers.output) == []


def test_a_damaged_episode_is_named_and_the_conversion_goes_on_after_mending(numbers):
    numbers.source.write_text("1 2\nnan\n3\n")
    with pytest.raises(DataError, match=r"episode line 1: .*not finite.*1 episodes before it are kept"):
        convert(numbers, progress=False)
    numbers.source.write_text("1 2\n4\n3\n")
    dataset = Dataset.open(convert(numbers, progress=False))
    assert dataset.state[:, 0].tolist() == [1, 2, 4, 3]


def test_new_episodes_are_appended_and_a_finished_conversion_is_left_alone(numbers):
    convert(numbers, progress=False)
    before = (numbers.output / "meta/info.json").stat().st_mtime_ns
    convert(numbers, progress=False)
    assert (numbers.output / "meta/info.json").stat().st_mtime_ns == before
    numbers.source.write_text("1 2 3\n4 5\n6\n")
    assert len(Dataset.open(convert(numbers, progress=False)).episodes) == 3


def test_episodes_that_the_converter_leaves_out_are_noted_and_not_tried_again(numbers):
    numbers.source.write_text("bad\n1 2\nbad 2\n4\n")
    dataset = Dataset.open(convert(numbers, progress=False))
    assert [episode.length for episode in dataset.episodes] == [2, 1]
    log = json.loads((numbers.output / LOG_FILE).read_text())
    assert log["episodes"] == ["line 1", "line 3"]
    assert log["skipped"] == {"line 0": "it failed", "line 2": "it failed"}
    numbers.source.write_text("bad\n1 2\nbad 2\n4\n5\n")
    assert len(Dataset.open(convert(numbers, progress=False)).episodes) == 3


def test_a_source_of_which_nothing_is_left_is_an_error(numbers):
    numbers.source.write_text("bad\nbad\n")
    with pytest.raises(DataError, match=r"'line 0': 'it failed'"):
        convert(numbers, progress=False)


def test_another_conversion_in_the_folder_is_refused(numbers):
    convert(numbers, progress=False)
    with pytest.raises(ConfigError, match=r"gain: there 1\.0, asked for 2\.0"):
        convert(Numbers(numbers.source, numbers.output, gain=2.0), progress=False)
    numbers.source.write_text("1 2 3\n")
    with pytest.raises(ConfigError, match=r"episode 1 .* made from line 1, but the source's is now none"):
        convert(numbers, progress=False)
    (numbers.output / LOG_FILE).unlink()
    with pytest.raises(ConfigError, match=r"/out is not empty"):
        convert(numbers, progress=False)


def test_the_disk_estimate_comes_first(numbers, monkeypatch):
    schema = Schema(10, {"front": (480, 640)}, ("x",), ("dx",), "numbers")
    episode = SourceEpisode("huge", 10**9, lambda: iter(()))
    assert estimated_bytes(schema, [episode], video=True) < estimated_bytes(schema, [episode], video=False)
    monkeypatch.setattr(Numbers, "episodes", lambda self: [episode])
    monkeypatch.setattr(Numbers, "schema", lambda self: schema)
    with pytest.raises(EnvironmentSetupError, match=r"needs [\d,]+ MiB in .*/out"):
        convert(numbers, progress=False)


def test_the_command_line_knows_the_converters(numbers, capsys, monkeypatch):
    monkeypatch.setitem(CONVERTERS._entries, "numbers", f"{__name__}:Numbers")
    monkeypatch.setattr("spatial_forcing.commands.data.load_converter", lambda name: Numbers)
    cli.run(["data", "convert", "numbers", "--source", str(numbers.source), "--output", str(numbers.output)])
    assert "2 episodes, 5 frames" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"name of a converter first: .*numbers"):
        cli.run(["data", "convert"])
    with pytest.raises(ConfigError, match="Did you mean 'numbers'"):
        load_converter("nubmers")
