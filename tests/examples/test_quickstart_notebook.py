"""The notebook's cells, at toy size."""

import ast
import json
from pathlib import Path

from tests.envs.libero_case import needs_libero, use_assets

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
SMALL = "DEMOS, NOISE, STEPS, SEED, EPISODES, HORIZON, WORKERS = 4, 0.0, 4, 200, 1, 10, 1"


def cells():
    plain = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in plain["cells"])  # outputs are not committed
    return [cell for cell in plain["cells"] if cell["cell_type"] == "code"]


def run(source, names):
    """Execute a cell as Jupyter does: the value of a last expression is what it shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


@needs_libero
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    use_assets(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    names, shown = {"__name__": "notebook"}, []
    for cell in cells():
        shown.append(run("".join(cell["source"]), names))
        if "parameters" in cell["metadata"].get("tags", ()):
            exec(SMALL, names)
    assert names["runs"]["spatial forcing"].steps == 4
    assert (tmp_path / "notebook-run" / "depth.pdf").read_bytes().startswith(b"%PDF")
    assert "model.safetensors" in shown[-1]
    charts = [value for value in shown if hasattr(value, "_repr_svg_")]
    assert [chart.title for chart in charts] == ["Action loss", "AbsRel"]
    assert all(chart._repr_svg_().startswith("<svg") for chart in charts)


def test_the_notebook_is_formatted_like_the_code():
    for cell in cells():
        lines = "".join(cell["source"]).splitlines()
        assert max(map(len, lines)) <= 110
