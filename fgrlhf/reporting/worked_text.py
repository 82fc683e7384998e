"""One record worked through the method, for a terminal: marks and signs say what colour says."""

from fgrlhf.reporting.equations import (Line, loss_lines, preference_lines, show, stretches,
                                        update_lines)
from fgrlhf.worked import Side, Worked

WIDTH = 92
TOKEN, NARROW = 12, 10                              # columns for a token in the two tables
BAR = 6                                             # signs for the largest reward
SET = {("rejected", "U1"): "U1-", ("rejected", "gap"): "U1-^", ("chosen", "U1"): "U1+",
       ("chosen", "gap"): "U1+^"}
MARKS = {("rejected", "U1"): ("[-", "-]"), ("chosen", "U1"): ("{+", "+}"),
         ("rejected", "gap"): ("(^", "^)"), ("chosen", "gap"): ("(^", "^)")}
LEGEND = {("rejected", "U1"): "[-U1-: taken out-]", ("chosen", "U1"): "{+U1+: put in+}",
          ("rejected", "gap"): "(^U1-: answers for what is missing before it^)",
          ("chosen", "gap"): "(^U1+: answers for what was taken out before it^)"}
ORANGE, BLUE, BOLD, PLAIN = "\x1b[38;5;208m", "\x1b[38;5;33m", "\x1b[1m", "\x1b[0m"


def worked_text(worked: Worked, colour: bool = False) -> str:
    """Everything about the record, at most about 100 columns wide."""
    parts = [f"id  {visible(worked.id)}", _texts(worked, colour),
             _title("Alignment and token rewards", "sections 3.1, 3.2"), _sides(worked, colour),
             _title("Rewards, margin, preference", "equations (1) to (3)"),
             _lines(preference_lines(worked)),
             _title("Loss of the reward model", "equation (4)"), _lines(loss_lines(worked))]
    if worked.update is not None:
        parts += [_title("y- as a response of the policy", "equations (5) to (7)"),
                  _tokens(worked, colour), "", _lines(update_lines(worked))]
    return "\n".join(parts) + "\n"


def visible(text: str) -> str:
    """One line, no control characters: what a terminal must not act on is spelled out."""
    return "".join(c if c.isprintable() else "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
                   if c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _title(name: str, where: str) -> str:
    return f"\n{name} {'-' * max(2, WIDTH - len(name) - len(where) - 2)} {where}\n"


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{PLAIN}" if colour and code else text


def _texts(worked: Worked, colour: bool) -> str:
    """x, y- and y+ with the changed stretches marked, and what the marks mean."""
    rows, used = [f"x   {visible(worked.prompt)}"], []
    for label, kind, side, code in (("y-", "rejected", worked.rejected, ORANGE),
                                    ("y+", "chosen", worked.chosen, BLUE)):
        shown = ""
        for text, name in stretches(side):
            if name == "U0":
                shown += visible(text)
                continue
            left, right = MARKS[kind, name]
            shown += _paint(left + visible(text) + right, BOLD + code, colour)
            used.append(LEGEND[kind, name])
        rows.append(f"{label}  {shown}")
    return "\n".join([*rows, "", "    " + "   ".join([*dict.fromkeys(used), "the rest: U0"])])


def _bar(value: float, largest: float) -> str:
    """Signs in number by the size of the value: +++ or --."""
    return ("+" if value > 0 else "-") * round(BAR * abs(value) / largest)


def _reward_code(value: float, largest: float) -> str:
    """Orange below 0 and blue above, bold where it is more than half of the largest."""
    strength = abs(value) / largest
    if strength < 0.1:
        return ""
    return (BOLD if strength > 0.5 else "") + (BLUE if value > 0 else ORANGE)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _sides(worked: Worked, colour: bool) -> str:
    """Both responses beside one another, a pair of U0 on one row."""
    largest = max(map(abs, worked.rejected.rewards + worked.chosen.rewards)) or 1.0
    width = 4 + 1 + TOKEN + 1 + 4 + 10 + 1 + BAR

    def cell(kind: str, side: Side, t: int | None) -> str:
        if t is None:
            return " " * width
        name, r = side.sets[t], side.rewards[t]
        bar = _bar(r, largest)
        number = _paint(f"{show(r):>10} {bar}".rstrip(), _reward_code(r, largest), colour)
        return (f"{t:4} {_clip(visible(side.pieces[t]), TOKEN):{TOKEN}} "
                f"{SET.get((kind, name), name):4}{number}{'':{BAR - len(bar) + (not bar)}}")

    head = f"{'t':>4} {'token':{TOKEN}} {'set':4}{'r_t':>10} {'':{BAR}}"
    rows = [f"{'y-':>4}{'':{width - 4}} | {'y+':>4}", f"{head} | {head}".rstrip()]
    rows += [f"{cell('rejected', worked.rejected, i)} | "
             f"{cell('chosen', worked.chosen, j)}".rstrip() for i, j in worked.rows]
    return "\n".join(rows)


def _tokens(worked: Worked, colour: bool) -> str:
    """Equations (5)-(7), a row a token of y-."""
    update, side = worked.update, worked.rejected
    eps, largest = update.settings.clip_eps, max(map(abs, update.advantages)) or 1.0
    head = ["r_t", "logp_old", "logp_ref", "KL", "r~_t", "A_t", "logp", "rho"]
    rows = [f"r_t is calibrated, (r_t - mean) / scale, with mean {show(worked.mean)} and scale "
            f"{show(worked.scale)}.",
            f"logp, rho, clip and term: after one update on this response alone (Adam, learning "
            f"rate {update.settings.lr:g}).",
            "In training the responses are the policy's own; the scale of A, the mean and the "
            "update are a batch's.", "",
            f"{'t':>3} {'token':{NARROW}}" + "".join(f"{name:>9}" for name in head)
            + f" {'clip':5}{'term':>8}"]
    for t, piece in enumerate(side.pieces):
        mark = "" if not update.clipped[t] else f">{1 + eps:g}" if update.ratio[t] > 1 else \
            f"<{1 - eps:g}"
        values = [update.calibrated[t], update.logp_old[t], update.logp_ref[t], update.kl[t],
                  update.penalised[t], update.advantages[t], update.logp[t], update.ratio[t]]
        cells = [f"{round(value, 3) + 0.0:9.3f}" for value in values]
        cells[5] = _paint(cells[5], _reward_code(update.advantages[t], largest), colour)
        rows.append(f"{t:3} {_clip(visible(piece), NARROW):{NARROW}}" + "".join(cells)
                    + f" {mark:5}{update.objective[t]:8.3f}")
    return "\n".join(rows)


def _lines(lines: list[Line]) -> str:
    """Each equation on a line, or on two where it is long: formula, then numbers."""
    shown, previous = [], None
    for line in lines:
        label = line.equation if line.equation != previous else ""
        previous = line.equation
        parts = [line.name, *filter(None, (line.formula, line.numbers)), line.value]
        indent = " " * 12
        whole = " = ".join(parts)
        if len(whole) > WIDTH - 12 and line.formula and line.numbers:
            whole = (f"{line.name} = {line.formula}\n{indent}{'':{len(line.name)}} = "
                     f"{line.numbers} = {line.value}")
        shown.append(f"{label:10}  {whole}")
    return "\n".join(shown)
