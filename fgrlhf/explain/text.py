"""Shows an explained record in a terminal. Marks and signs give the same information as colour."""

from fgrlhf.explain.equations import (
    Line, apart_text, loss_lines, preference_lines, show, stretches, update_lines)
from fgrlhf.explain.explained import Explained, Side

WIDTH = 92
TOKEN, NARROW = 12, 10                              # columns for a token in the two tables
BAR = 6                                             # number of signs for the largest reward
SET = {("rejected", "U1"): "U1-", ("rejected", "gap"): "U1-^", ("chosen", "U1"): "U1+",
       ("chosen", "gap"): "U1+^"}
MARKS = {("rejected", "U1"): ("[-", "-]"), ("chosen", "U1"): ("{+", "+}"),
         ("rejected", "gap"): ("(^", "^)"), ("chosen", "gap"): ("(^", "^)")}
LEGEND = {("rejected", "U1"): "[-U1-: taken out-]", ("chosen", "U1"): "{+U1+: put in+}",
          ("rejected", "gap"): "(^U1-: credited with text missing before it^)",
          ("chosen", "gap"): "(^U1+: credited with text taken out before it^)"}
ORANGE, BLUE, BOLD, PLAIN = "\x1b[38;5;208m", "\x1b[38;5;33m", "\x1b[1m", "\x1b[0m"


def explained_text(explained: Explained, colour: bool = False) -> str:
    """Returns everything about the record, in lines of about 100 columns."""
    parts = [f"id  {visible(explained.id)}", _texts(explained, colour),
             _title("Alignment and token rewards", "sections 2.1, 2.2"), _sides(explained, colour),
             _title("Rewards, margin, preference", "equations (1) to (3)"),
             _lines(preference_lines(explained)),
             _title("Loss of the reward model", "equation (4)"), _lines(loss_lines(explained))]
    if explained.update is not None:
        parts += [_title("y- as a response of the policy", "equations (5) to (7)"),
                  _tokens(explained, colour), "", _lines(update_lines(explained))]
    return "\n".join(parts) + "\n"


def visible(text: str) -> str:
    """Returns the text in one line. A control character becomes its escape sequence as text."""
    return "".join(c if c.isprintable() else "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
                   if c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _title(name: str, where: str) -> str:
    return f"\n{name} {'-' * max(2, WIDTH - len(name) - len(where) - 2)} {where}\n"


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{PLAIN}" if colour and code else text


def _texts(explained: Explained, colour: bool) -> str:
    """Returns x, y- and y+ with the changes marked, and the meaning of the marks."""
    rows, used = [f"x   {visible(explained.prompt)}"], []
    for label, kind, side, code in (("y-", "rejected", explained.rejected, ORANGE),
                                    ("y+", "chosen", explained.chosen, BLUE)):
        shown = ""
        for text, name in stretches(side):
            if name == "U0":
                shown += visible(text)
                continue
            left, right = MARKS[kind, name]
            shown += _paint(left + visible(text) + right, BOLD + code, colour)
            used.append(LEGEND[kind, name])
        rows.append(f"{label}  {shown}")
    partners = any(name == "" for side in (explained.rejected, explained.chosen)
                   for name in side.sets)               # of tokens that the gap rule took out of U0
    rest = "the rest: U0" + (", or in no set" if partners else "")
    return "\n".join([*rows, "", "    " + "   ".join([*dict.fromkeys(used), rest])])


def _bar(value: float, largest: float) -> str:
    """Returns more signs for a larger value: "+++" or "--"."""
    return ("+" if value > 0 else "-") * round(BAR * abs(value) / largest)


def _reward_code(value: float, largest: float) -> str:
    """Returns orange below 0 and blue above, in bold for more than half of the largest value."""
    strength = abs(value) / largest
    if strength < 0.1:
        return ""
    return (BOLD if strength > 0.5 else "") + (BLUE if value > 0 else ORANGE)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _sides(explained: Explained, colour: bool) -> str:
    """Returns the table of both responses. A pair of U0 shares a row."""
    largest = max(map(abs, explained.rejected.rewards + explained.chosen.rewards)) or 1.0
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
    rows += [f"{cell('rejected', explained.rejected, i)} | "
             f"{cell('chosen', explained.chosen, j)}".rstrip() for i, j in explained.rows]
    return "\n".join(rows)


def _tokens(explained: Explained, colour: bool) -> str:
    """Returns the table of equations (5) to (7), with one row per token of y-."""
    update, side = explained.update, explained.rejected
    eps, largest = update.settings.clip_eps, max(map(abs, update.advantages)) or 1.0
    columns = update.columns
    rows = [f"r_t is calibrated, (r_t - mean) / scale, with mean {show(explained.mean)} and scale "
            f"{show(explained.scale)}.{apart_text(update)}",
            "logp, rho, clip and term are after one update on this response only (Adam, learning "
            f"rate {update.settings.lr:g}).",
            "In training the policy samples the responses, and scale of A, mean and update are "
            "those of a batch.", "",
            f"{'t':>3} {'token':{NARROW}}" + "".join(f"{name:>9}" for name in columns)
            + f" {'clip':5}{'term':>8}"]
    for t, piece in enumerate(side.pieces):
        mark = "" if not update.clipped[t] else f">{1 + eps:g}" if update.ratio[t] > 1 else \
            f"<{1 - eps:g}"
        cells = {name: f"{round(values[t], 3) + 0.0:9.3f}" for name, values in columns.items()}
        cells["A_t"] = _paint(cells["A_t"], _reward_code(update.advantages[t], largest), colour)
        rows.append(f"{t:3} {_clip(visible(piece), NARROW):{NARROW}}" + "".join(cells.values())
                    + f" {mark:5}{update.objective[t]:8.3f}")
    return "\n".join(rows)


def _lines(lines: list[Line]) -> str:
    """Returns each equation on a line; a long equation has its formula and numbers on two."""
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
