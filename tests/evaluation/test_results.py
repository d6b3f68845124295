import io
import json

import pytest
from rich.console import Console

from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.results import (
    EpisodeError,
    EpisodeResult,
    EvaluationResult,
    ResultsFile,
    read_results,
    success_table,
)


def episode(task="reach-v3", seed=0, success=True, **tags):
    return EpisodeResult(task, seed, success, 10, -1.5, 0.2, tags=tags)


def text_of(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "new" / "episodes.jsonl"
    rows = [episode(seed=i, success=i % 2 == 0, arm="sf", step=500) for i in range(4)]
    file = ResultsFile(path)
    for row in rows:
        file.append(row)
    assert read_results(path) == rows
    assert read_results(path, {"arm": "base"}) == []
    assert read_results(tmp_path / "absent.jsonl") == []


def test_a_line_cut_by_a_kill_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "episodes.jsonl"
    ResultsFile(path).append(episode(seed=0))
    with path.open("a") as file:
        file.write('{"task": "reach-v3", "se')
    assert [r.seed for r in read_results(path)] == [0]
    ResultsFile(path).append(episode(seed=1))
    assert [r.seed for r in read_results(path)] == [0, 1]


@pytest.mark.parametrize("line", ["{", "[]", '{"task": "reach-v3"}'])
def test_another_broken_line_is_named(tmp_path, line):
    path = tmp_path / "episodes.jsonl"
    ResultsFile(path).append(episode())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_results(path)


def test_fields_of_a_later_version_are_ignored(tmp_path):
    path = tmp_path / "episodes.jsonl"
    ResultsFile(path).append(episode())
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"later": 1}) + "\n")
    assert read_results(path) == [episode()]


def test_table_has_every_task_arm_and_mean():
    arms = {
        "base": [episode("a", i, success=i < 1) for i in range(4)],
        "sf": [episode("a", i, success=i < 3) for i in range(4)] + [episode("b")],
    }
    text = text_of(success_table(arms, title="After 500 steps"))
    assert "After 500 steps" in text
    mean = next(line for line in text.splitlines() if "mean" in line and "25 %" in line)
    assert "88 %" in mean  # (75 + 100) / 2
    row = next(line for line in text.splitlines() if "│ b " in line)
    assert "- " in row
    assert "100 % [21, 100]" in row


def test_table_tells_of_episodes_that_failed():
    result = EvaluationResult((episode(),), (EpisodeError("reach-v3", 1, "worker died"),))
    assert "not counted: 1." in " ".join(text_of(result.table()).split())
    assert result.success.trials == 1
