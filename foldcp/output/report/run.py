"""Say what a run did: its inputs, stages, memory and traffic, from `foldcp_report.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_MOST_RANKS = 64  # of which each has a row
_HUGE = 1e30


def number(value: Any, form: str, unit: float = 1.0) -> str:
    """Format a number of a file; "-" for anything else.

    Args:
        value: as the file has it.
        form: of Python's `format`.
        unit: that it is divided by.
    """
    return format(value / unit, form) if _real(value) else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """Return a table.

    Args:
        head: of its columns.
        rows: of cells, which are HTML.
        text: columns that hold text.
    """

    def kind(i: int) -> str:
        return ' class="text"' if i in text else ""

    top = "".join(f'<th scope="col"{kind(i)}>{name}</th>' for i, name in enumerate(head))
    body = "".join(
        f"<tr>{''.join(f'<td{kind(i)}>{cell}</td>' for i, cell in enumerate(row))}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def section(numbers: Mapping[str, Any]) -> str:
    """Return the part of the page about the run.

    Args:
        numbers: of `foldcp_report.json`; what is missing in it is left out.
    """
    parts = [
        _facts(numbers),
        _inputs(_dict(numbers.get("inputs"))),
        _stages(numbers),
        _expected(numbers),
        _ranks(numbers),
    ]
    return f"<h2>Run</h2>{''.join(parts)}"


def _facts(numbers: Mapping[str, Any]) -> str:
    on_gpu = any(_list(numbers.get("peak_gpu_bytes")))
    peaks = _list(numbers.get("peak_gpu_bytes" if on_gpu else "peak_rss_bytes"))
    sent = _list(numbers.get("sent_bytes"))
    facts = {
        "foldcp": numbers.get("version"),
        "began": numbers.get("began"),
        "time": f"{number(numbers.get('seconds'), ',.1f')} s" if "seconds" in numbers else None,
        "mesh": numbers.get("mesh"),
        "groups": numbers.get("groups") if numbers.get("groups") != 1 else None,
        "precision": numbers.get("precision"),
        "kernels": numbers.get("kernels"),
        "transport": numbers.get("transport"),
        f"peak {'GPU ' if on_gpu else ''}memory of a rank": _largest(peaks) if peaks else None,
        "sent by all ranks": f"{number(sum(filter(_real, sent)), ',.4g', 1e9)} GB"
        if sent
        else None,
    }
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f'<dl class="facts">{cells}</dl>'


def _inputs(inputs: Mapping[str, Any]) -> str:
    rows = []
    for name, value in inputs.items():
        one = _dict(value)
        status = escape(str(one.get("status", "")))
        status = f'<span class="bad">{status}</span>' if status == "failed" else status
        chosen = ", ".join(
            f"{escape(str(op)).replace('_', ' ')}: {escape(str(how))}"
            for op, how in _dict(one.get("strategies")).items()
        )
        rows.append((escape(name), status, number(one.get("tokens"), ",.0f"),
                     escape(str(one.get("reason", ""))) or chosen))  # fmt: skip
    head = ("input", "status", "tokens", "strategies, or why it failed")
    return f"<h4>Inputs</h4>{table(head, rows, (1, 3))}" if rows else ""


def _stages(numbers: Mapping[str, Any]) -> str:
    ranks = [_dict(rank) for rank in _list(numbers.get("stages"))]
    names = list(dict.fromkeys(name for rank in ranks for name in rank))
    rows = []
    for name in names:
        found = [_dict(rank.get(name)) for rank in ranks]
        seconds = [one["seconds"] for one in found if _real(one.get("seconds"))]
        peaks = [one.get("peak_bytes") for one in found]
        spread = [number(f(seconds), ",.2f") if seconds else "-" for f in (max, min)]
        rows.append((escape(name), *spread, _largest(peaks)))
    if not rows:
        return ""
    on_gpu = any(_list(numbers.get("peak_gpu_bytes")))
    what = "peak GPU memory" if on_gpu else "peak memory so far"
    head = ("stage", "slowest rank, s", "fastest rank, s", what)
    note = "By the clock of the host; memory of the rank with most."
    return f'<h4>Stages</h4>{table(head, rows)}<p class="note">{note}</p>{_of_each(ranks, names)}'


def _expected(numbers: Mapping[str, Any]) -> str:
    """Tabulate what the planner expected of all inputs beside what it came to."""
    plans = [_dict(_dict(one).get("planned")) for one in _dict(numbers.get("inputs")).values()]
    expected = [_dict(plan.get("stages")) for plan in plans if plan]
    ranks = [_dict(rank) for rank in _list(numbers.get("stages"))]
    rows = []
    for name in dict.fromkeys(name for plan in expected for name in plan):
        found = [_dict(rank.get(name)) for rank in ranks]
        planned = [_dict(plan.get(name)) for plan in expected]
        seconds = [one["seconds"] for one in planned if _real(one.get("seconds"))]
        took = [one["seconds"] for one in found if _real(one.get("seconds"))]
        rows.append((
            escape(name),
            number(sum(seconds), ",.2f") if seconds else "-",
            number(max(took), ",.2f") if took else "-",
            _largest([one.get("peak_bytes") for one in planned]),
            _largest([one.get("peak_bytes") for one in found]),
        ))  # fmt: skip
    if not rows:
        return ""
    head = ("stage", "modelled, s", "slowest rank, s", "modelled memory", "peak memory")
    hidden: list[Any] = [plan["hidden"] for plan in plans if _real(plan.get("hidden"))]
    note = "Modelled by the planner before the run: bytes of tensors and weights, of fused kernels."
    if hidden:
        share = number(sum(hidden) / len(hidden), ".0%")
        note += f" Kernels hide {share} of the transfers, modelled."
    return f'<h4>Planned and actual</h4>{table(head, rows)}<p class="note">{note}</p>'


def _of_each(ranks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Tabulate the stages of every rank."""
    if len(ranks) < 2:
        return ""
    rows = []
    for rank, stages in enumerate(ranks[:_MOST_RANKS]):
        found = [_dict(stages.get(name)) for name in names]
        cells = [f"{number(one.get('seconds'), ',.2f')} s, {_size(one.get('peak_bytes'))}"
                 for one in found]  # fmt: skip
        rows.append((str(rank), *cells))
    left = len(ranks) - len(rows)
    more = f'<p class="note">and {left} more in foldcp_report.json</p>' if left else ""
    listed = table(("rank", *map(escape, names)), rows)
    return f"<details><summary>Stages of each rank</summary>{listed}{more}</details>"


def _ranks(numbers: Mapping[str, Any]) -> str:
    keys = ("peak_rss_bytes", "peak_gpu_bytes", "sent_bytes", "received_bytes")
    columns = [_list(numbers.get(key)) for key in keys]
    count = max(map(len, columns))
    if count < 2:
        return ""
    rows = [
        (str(rank), *(_size(column[rank]) if rank < len(column) else "-" for column in columns))
        for rank in range(min(count, _MOST_RANKS))
    ]
    head = ("rank", "peak host memory", "peak GPU memory", "sent", "received")
    total: dict[str, float] = {}
    for one in map(_dict, _list(numbers.get("exchanged"))):
        for label, moved in one.items():
            if _real(moved):
                total[label] = total.get(label, 0) + moved
    largest = sorted(total.items(), key=lambda item: -item[1])
    moved_by = table(("exchange", "received by all ranks"),
                     [(escape(label), _size(moved)) for label, moved in largest])  # fmt: skip
    return (
        f"<details><summary>Memory and bytes moved of each rank</summary>{table(head, rows)}"
        f"{moved_by if largest else ''}</details>"
    )


def _largest(values: Sequence[Any]) -> str:
    return _size(max(filter(_real, values), default=None))


def _size(value: Any) -> str:
    return f"{number(value, ',.3g', 1e9)} GB" if _real(value) else "-"


def _real(value: Any) -> bool:
    """Tell a number that can be added up from anything else that a file may hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
