"""The doctor's findings: six checks, the adapter, and how they are printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["pass", "FAIL", "skipped"]


@dataclass
class Check:
    """One of the six steps.

    Attributes:
        name: of the step.
        state: how it went; skipped where an earlier one must be fixed first, or where it could not be done.
        needed: whether a model is only understood if it passes.
        lines: what was found.
        remedy: what is wrong and what fixes it; empty unless it failed.
    """

    name: str
    state: State = "skipped"
    needed: bool = True
    lines: list[str] = field(default_factory=list)
    remedy: str = ""


@dataclass
class Report:
    """All that the doctor found.

    Attributes:
        target: what was inspected.
        checks: the six steps, in order.
        adapter: the code to paste; empty where it could not be put together.
        verified: whether that code was run and passed all checks.
        facts: blocks, layer, width, views, positions, cost, for machines.
    """

    target: str
    checks: list[Check]
    adapter: str = ""
    verified: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every check that is needed passed."""
        return all(
            check.state == "pass" or (not check.needed and check.state != "FAIL") for check in self.checks
        )

    def to_plain(self) -> dict[str, Any]:
        """The findings as a JSON-able mapping."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """The findings as text."""
        lines = [f"spatial-forcing doctor {self.target}", ""]
        for number, check in enumerate(self.checks, 1):
            lines.append(f"{number}. {check.name:<14} {check.state}")
            lines += [f"     {line}" for line in check.lines]
            lines += [f"     {check.remedy}"] if check.remedy else []
        if self.adapter:
            said = (
                "run and verified as printed" if self.verified else "as far as it was found; a check failed"
            )
            lines += ["", f"Adapter to paste ({said}):", "", self.adapter]
        passed = sum(check.state == "pass" for check in self.checks)
        lines += ["", f"{passed} of {len(self.checks)} checks passed."]
        return "\n".join(lines)
