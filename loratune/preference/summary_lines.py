"""A comparison's results as rows of a table, and the sentences under it. People and judges stay apart."""

import math
from dataclasses import dataclass

from loratune.preference.analysis import PositionBias, Tally
from loratune.preference.comparison import PreferenceRecord
from loratune.system.formatting import plural


@dataclass(frozen=True, kw_only=True)
class PreferenceRow:
    name: str
    tally: Tally
    main: bool = False  # everything people said
    judge: bool = False  # a language model


def rows_of(record: PreferenceRecord) -> list[PreferenceRow]:
    """All votes, the questions net of raters, raters where there are several, categories, judges."""
    people, rows = record.people, []
    if people is not None:
        rows = [PreferenceRow(name="all votes", tally=people.votes, main=True)]
        if len(people.raters) > 1:
            rows.append(PreferenceRow(name="questions, net", tally=people.questions, main=True))
            rows += [PreferenceRow(name=f"rater {name}", tally=tally) for name, tally in people.raters.items()]
        rows += [PreferenceRow(name=name, tally=tally) for name, tally in people.categories.items()] if len(people.categories) > 1 else []
    return rows + [PreferenceRow(name=f"judge {name}", tally=judge.questions, judge=True) for name, judge in record.judges.items()]


def sentences(record: PreferenceRecord) -> list[str]:
    """What the table does not say: the sign test, agreement, position, what was not asked."""
    first, second = record.comparison.first.label, record.comparison.second.label
    people, said = record.people, []
    if people is None:
        said.append("No person has voted yet.")
    else:
        said.append(f"People, over questions: {_sign(people.questions, first, second)}")
        if people.agreeing is not None:
            alpha = "undefined, all votes being the same" if people.alpha is None else f"{people.alpha:.2f}"
            said.append(
                f"Raters agree in {people.agreeing:.0%} of pairs of votes on the same question; Krippendorff’s alpha {alpha} "
                "(1: always, 0: as chance would)."
            )
        said.append(_position(people.position))
    for name, judge in record.judges.items():
        said.append(f"Judge {name}, each question in both orders: {_sign(judge.questions, first, second)}")
        said.append(
            f"Its two orders contradict each other on {judge.inconsistent} (counted as ties), and {judge.unreadable} "
            f"{'was' if judge.unreadable == 1 else 'were'} left out as unreadable. {_position(judge.position)}"
        )
    if record.identical:
        said.append(
            f"On {plural(record.identical, 'question')} both answers were the same; raters are not shown them, and no number includes them."
        )
    cut = [(label, sum(not pair.answer(side).ended for pair in record.pairs)) for label, side in ((first, "first"), (second, "second"))]
    if any(number for _, number in cut):
        told = ", ".join(f"{label} {number}" for label, number in cut)
        said.append(f"Answers cut at {record.comparison.generation.max_new_tokens} tokens: {told}.")
    return said


def _sign(tally: Tally, first: str, second: str) -> str:
    if not tally.decided:
        return f"not one of {plural(tally.total, 'question')} is decided."
    p = tally.sign_test()
    told = f"{tally.first} for {first}, {tally.second} for {second}; sign test p = {p:.2g}"
    if p > 0.05:
        return f"{told}, so that they cannot be told apart."
    return f"{told}: {first if tally.first > tally.second else second} is preferred."


def _position(bias: PositionBias) -> str:
    if math.isnan(bias.share):
        return "No vote was decided, so nothing is known of a preference for a side."
    lean = "" if bias.p_value > 0.05 else ", more than chance explains"
    return f"The answer shown as A won {bias.left} of {bias.left + bias.right} (p = {bias.p_value:.2g}{lean})."


def summary_text(record: PreferenceRecord) -> str:
    """Who is compared and what people and judges said, for a terminal."""
    comparison, rows = record.comparison, rows_of(record)
    lines = [f"{comparison.first.label} against {comparison.second.label}, {plural(len(comparison.questions), 'question')}", ""]
    if rows:
        width = max(24, *(len(row.name) for row in rows))
        lines.append(f"  {'':<{width}} {'wins':>5} {'losses':>6} {'ties':>5} {'bad':>5}  win rate, 95 % interval")
        for row in rows:
            t = row.tally
            lines.append(f"  {row.name:<{width}} {t.first:>5} {t.second:>6} {t.ties:>5} {t.neither:>5}  {_rate(t)}")
    return "\n".join([*lines, *(f"  {line}" for line in sentences(record))])


def _rate(tally: Tally) -> str:
    if not tally.total:
        return "–"
    low, high = tally.interval()
    text = f"{tally.win_rate:.1%} ({low:.1%} to {high:.1%})"
    if tally.decided and tally.decided < tally.total:
        low, high = tally.interval_decided()
        text += f"; without ties {tally.win_rate_decided:.1%} ({low:.1%} to {high:.1%})"
    return text
