"""What was measured, and what follows from it: ratios, goals, tables and a plot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from benchmarks.endpoints import Endpoint
from benchmarks.rows import ROWS, Row

#: One client or 32 in this process; or 32 connections of wrk's to a uvicorn.
Setting = Literal["1", "32", "HTTP"]
_TITLES: dict[Setting, str] = {"32": "32 at once", "1": "one at a time", "HTTP": "over HTTP"}

#: Of the endpoints in the tables.
_ORDER: tuple[Endpoint, ...] = ("/read", "/write", "/none", "/login")


class Cell(NamedTuple):
    """One thing that is measured, once in each round."""

    row: str
    endpoint: Endpoint
    setting: Setting


@dataclass(frozen=True, slots=True)
class Sample:
    """What one round saw; times in seconds."""

    per_second: float
    p50: float
    p99: float
    #: The application process's, for each request; unknown over HTTP.
    cpu: float | None = None


@dataclass
class Results:
    """What was measured so far."""

    samples: dict[Cell, list[Sample]] = field(default_factory=dict)
    #: For each request; shared ones in part.
    statements: dict[Cell, float] = field(default_factory=dict)
    #: Why a row was not measured.
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, cell: Cell, sample: Sample) -> None:
        """Take in what one round saw."""
        self.samples.setdefault(cell, []).append(sample)

    def median(self, cell: Cell, value: Callable[[Sample], float]) -> float | None:
        """Return the median of the rounds, or None if the cell was not measured."""
        samples = self.samples.get(cell)
        return median(map(value, samples)) if samples else None

    def throughput(self, cell: Cell, against: Cell) -> float | None:
        """Return how many times the requests/s of *against* there were: each round's ratio, and of these the median.

        The machine may be slower in one round than in another, but then for both.
        """
        rounds = self._rounds(cell, against)
        return median(one.per_second / other.per_second for one, other in rounds) if rounds else None

    def added_cpu(self, cell: Cell) -> float | None:
        """Return the seconds of CPU that a request takes more than without sessions."""
        added = self._added_cpu(cell)
        return median(added) if added else None

    def added_cpu_ratio(self, cell: Cell, against: Cell) -> float | None:
        """Return how many times the added CPU of *against* there was: each round's ratio, and of these the median."""
        rounds = list(zip(self._added_cpu(cell), self._added_cpu(against), strict=False))
        return median(one / other for one, other in rounds) if rounds else None

    def _added_cpu(self, cell: Cell) -> list[float]:
        rounds = self._rounds(cell, baseline(cell))
        return [one.cpu - other.cpu for one, other in rounds if one.cpu is not None and other.cpu is not None]

    def _rounds(self, cell: Cell, against: Cell) -> list[tuple[Sample, Sample]]:
        return list(zip(self.samples.get(cell, []), self.samples.get(against, []), strict=False))


def baseline(cell: Cell) -> Cell:
    """Return the cell of the same framework without sessions, measured in the same minute."""
    return cell._replace(row=ROWS[cell.row].baseline)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that *share* of the values do not exceed."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def titled(setting: Setting) -> str:
    """Return what the tables call a setting."""
    return _TITLES[setting]


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit for one row, as a multiple of another."""

    ours: Cell
    against: str
    limit: float
    #: Requests/s have to be at least the limit, the added CPU at most.
    measure: Literal["requests/s", "added CPU"] = "requests/s"

    @property
    def text(self) -> str:
        """What is asked for."""
        row, endpoint, setting = self.ours
        sign = "≥" if self.measure == "requests/s" else "≤"
        return (
            f"{ROWS[row].store} {endpoint} {titled(setting)}: {self.measure} {sign} {self.limit} x "
            f"{ROWS[self.against].title}"
        )

    def ratio(self, results: Results) -> float | None:
        """Return what it is, or None if that was not measured."""
        against = self.ours._replace(row=self.against)
        if self.measure == "requests/s":
            return results.throughput(self.ours, against)
        return results.added_cpu_ratio(self.ours, against)

    def verdict(self, results: Results) -> str:
        """Return whether the goal is met, in words."""
        ratio = self.ratio(results)
        if ratio is None:
            return "not measured"
        met = ratio >= self.limit if self.measure == "requests/s" else ratio <= self.limit
        return "met" if met else "not met"


GOALS = (
    Goal(Cell("postgresql", "/read", "32"), "asyncpg-batched", 0.95),
    Goal(Cell("postgresql", "/read", "32"), "cookie", 0.85),
    Goal(Cell("postgresql", "/write", "32"), "asyncpg-batched", 0.90),
    Goal(Cell("postgresql", "/write", "32"), "cookie", 0.70),
    Goal(Cell("postgresql", "/read", "HTTP"), "starsessions-redis", 2),
    Goal(Cell("postgresql", "/write", "HTTP"), "starsessions-redis", 2),
    Goal(Cell("postgresql", "/read", "HTTP"), "starsessions-orm", 10),
    Goal(Cell("postgresql", "/write", "HTTP"), "starsessions-orm", 10),
    Goal(Cell("postgresql", "/read", "1"), "asyncpg", 1.3, "added CPU"),
    Goal(Cell("postgresql", "/write", "1"), "asyncpg", 1.5, "added CPU"),
    Goal(Cell("sqlite", "/read", "32"), "aiosqlite", 1.0),
    Goal(Cell("sqlite", "/write", "32"), "aiosqlite", 1.2),
)


#: How to read the tables.
LEGEND = """\
Medians of all rounds; in each round every row had its turn, and ratios are taken within a round. Every session holds a
user's id, a number and a cart of 20 items: some 1.1 KB. `/read` reads the id, `/write` counts the number up, `/none`
leaves the session alone, `/login` makes a new one.

- *One at a time*, *32 at once*: clients in the application's own process (uvloop), each with a session of its own.
- *Over HTTP*: one uvicorn worker (uvloop, httptools) under wrk with 32 connections.
- *x no session*: of the requests/s that the same framework serves without sessions.
- *Added CPU*: what the application's process takes more than without sessions, all threads together.
- *Statements*: what the server was sent for each request, BEGIN and COMMIT included, as pg_stat_statements, Redis'
  commandstats and SQLite's own trace tell. What several requests share counts for each in part.
- *Raw* rows: a cookie, its HMAC, one SELECT, JSON and one upsert, as fast as the driver can do it, and nothing else."""


def goals(results: Results) -> str:
    """Return the goals as a table in Markdown."""
    lines = [[goal.text, _number(goal.ratio(results), ".2f"), goal.verdict(results)] for goal in GOALS]
    return _table(["goal", "is", ""], lines)


def tables(results: Results) -> str:
    """Return everything measured in Markdown: a table for each setting and endpoint."""
    measured = {(cell.setting, cell.endpoint) for cell in results.samples}
    wanted = [(setting, endpoint) for setting in _TITLES for endpoint in _ORDER if (setting, endpoint) in measured]
    return "\n\n".join(
        f"## {endpoint}, {titled(setting)}\n\n{_of(results, setting, endpoint)}" for setting, endpoint in wanted
    )


def _of(results: Results, setting: Setting, endpoint: Endpoint) -> str:
    head = ["", "requests/s", "x no session", "added CPU, µs", "p50, ms", "p99, ms", "statements"]
    return _table(head, [line for row in ROWS.values() if (line := _line(results, row, endpoint, setting))])


def _line(results: Results, row: Row, endpoint: Endpoint, setting: Setting) -> list[str]:
    """Return one line, or an empty list for a row that was not asked for."""
    if row.key in results.skipped:
        return [row.title, f"skipped: {results.skipped[row.key]}", "", "", "", "", ""]
    cell = Cell(row.key, endpoint, setting)
    if cell not in results.samples:
        return []
    return [
        f"**{row.title}**" if row.is_ours else row.title,
        _number(results.median(cell, lambda sample: sample.per_second), ",.0f"),
        _number(results.throughput(cell, baseline(cell)), ".3f"),
        _number(results.added_cpu(cell), ",.0f", 1e6),
        _number(results.median(cell, lambda sample: sample.p50), ".2f", 1e3),
        _number(results.median(cell, lambda sample: sample.p99), ".2f", 1e3),
        _number(results.statements.get(cell), ".2g"),
    ]


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else format(value * factor, form)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown that is legible as it stands: text to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]

    def aligned(line: Sequence[str]) -> str:
        others = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return f"| {' | '.join([line[0].ljust(widths[0]), *others])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([aligned(head), f"|{rule}|", *map(aligned, lines)])


def plot(results: Results, path: Path) -> None:
    """Draw the throughput of reads and writes, 32 at once, as a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - the rest of the report does without

    measured = [row for row in ROWS.values() if Cell(row.key, "/read", "32") in results.samples]
    rows = [row for row in reversed(measured) if not row.is_baseline]
    figure = Figure(figsize=(11, 0.32 * len(rows) + 1.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, endpoint in zip(panels, _ORDER[:2], strict=True):
        cells = [Cell(row.key, endpoint, "32") for row in rows]
        shares = [results.throughput(cell, baseline(cell)) or 0 for cell in cells]
        colors = ["#d1495b" if row.is_ours else "#9aa5b1" for row in rows]
        bars = panel.barh([row.title for row in rows], shares, color=colors)
        rates = [_number(results.median(cell, lambda sample: sample.per_second), ",.0f") for cell in cells]
        labels = [f"{share:.2f}  ({rate}/s)" for share, rate in zip(shares, rates, strict=True)]
        panel.bar_label(bars, labels, padding=4, fontsize=8)
        panel.set_title(endpoint)
        panel.set_xlim(0, 1)
        panel.margins(y=0.01)
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "requests/s, as a share of what the same framework serves without sessions; 32 at once", fontsize=9
    )
    figure.savefig(path, dpi=140)
