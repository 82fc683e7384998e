"""The table of `python -m fgrlhf.checks gpu`, in Markdown, and the floors of its rows.

A row of a step is a JSON object. "name" and "result" are texts. "passed" is true or false for a
check, and absent for a measurement. A measurement may have "seconds" with "bytes" or "flops", the
bytes that must be read or the operations of its matmuls. Its floor is then

    bytes / copy bandwidth      or      flops / speed of a bfloat16 matmul

with the ceilings that the step "ceilings" has measured on the same device. "x floor" is
seconds / floor.
"""

HEAD = "| step | what | result | x floor | verdict |", "| --- | --- | --- | --- | --- |"


def floors(report: dict) -> None:
    """Adds "floor_seconds" and "ratio" to every row that has the numbers for it."""
    rows = [row for entry in report["steps"] for row in entry["rows"]]
    ceilings = {kind: next((row[kind] for row in rows if kind in row), None)
                for kind in ("bytes_per_second", "flops_per_second")}
    for row in rows:
        for amount in ("bytes", "flops"):
            ceiling = ceilings[f"{amount}_per_second"]
            if amount in row and ceiling:
                row["floor_seconds"] = row[amount] / ceiling
                row["ratio"] = row["seconds"] / row["floor_seconds"]


def step_lines(entry: dict) -> list[str]:
    """Returns the lines of one step: the step itself, then its rows."""
    took = f", {entry['seconds']:.0f} s" if entry["seconds"] else ""
    why = f": {entry['why']}" if entry["why"] else ""
    ended = "" if entry["status"] in ("done", "not run", "running") else "NOT DONE"
    lines = [_line(entry["name"], entry["about"], f"{entry['status']}{took}{why}", "", ended)]
    for row in entry["rows"]:
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        verdict = {True: "pass", False: "FAIL"}.get(row.get("passed"), "")
        lines.append(_line("", row["name"], str(row.get("result", "")), ratio, verdict))
    return lines


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def markdown(report: dict) -> str:
    """Returns the whole table. Its head names the device, the versions and the command."""
    machine = report["machine"]
    about = ", ".join(f"{name} {value}" if name != "device" else str(value)
                      for name, value in machine.items())
    rows = [row for entry in report["steps"] for row in entry["rows"]]
    failed = [row["name"] for row in rows if row.get("passed") is False]
    checks = sum("passed" in row for row in rows)
    steps = [entry["status"] for entry in report["steps"]]
    said = (f"{report['seconds']:.0f} s of {60 * report['minutes']:.0f}. Steps: "
            + ", ".join(f"{steps.count(status)} {status}" for status in dict.fromkeys(steps))
            + f". Checks: {checks - len(failed)} passed, {len(failed)} failed"
            + (f" ({'; '.join(failed)})" if failed else "") + ".")
    lines = [f"{about or 'device not known yet'}", "", f"    {report['command']}", "", said, "",
             *HEAD]
    for entry in report["steps"]:
        lines += step_lines(entry)
    return "\n".join(lines) + "\n"
