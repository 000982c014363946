"""A comparison's results as lines of text."""

import math

from loratune.preference.analysis import JudgeSummary, PositionBias, Tally, VoteSummary
from loratune.preference.comparison import PreferenceRecord


def summary_text(record: PreferenceRecord) -> str:
    """Who is compared and what people and judges said; people and judges apart."""
    first, second = record.comparison.first.label, record.comparison.second.label
    asked = len(record.comparison.questions)
    lines = [f"{first} against {second}, {asked} question{'s' if asked != 1 else ''}"]
    if record.identical:
        lines.append(f"{record.identical} with identical answers: nobody is asked, and they are in no number below.")
    cut = [sum(not pair.answer(side).ended for pair in record.pairs) for side in ("first", "second")]
    if any(cut):
        lines.append(f"Answers cut at {record.comparison.generation.max_new_tokens} tokens: {first} {cut[0]}, {second} {cut[1]}.")
    people = record.people
    lines += ["", *(_people(people, first, second, len(record.pairs)) if people else ["People: no votes yet."])]
    for name, judge in record.judges.items():
        lines += ["", *_judge(name, judge, first, second)]
    return "\n".join(lines)


def _people(found: VoteSummary, first: str, second: str, pairs: int) -> list[str]:
    names = list(found.raters)
    who = "1 rater" if len(names) == 1 else f"{len(names)} raters"
    rows = [("votes", found.votes), ("questions, net", found.questions)]
    if len(names) > 1:
        rows += [(f"  {name} ({tally.total}/{pairs})", tally) for name, tally in found.raters.items()]
    rows += [(f"  {name}", tally) for name, tally in found.categories.items()]
    lines = [f"People: {found.votes.total} vote{'s' if found.votes.total != 1 else ''} of {who}", *_rows(rows)]
    lines.append(_sign(found.questions, first, second))
    if found.agreeing is not None:
        alpha = "undefined, all votes are the same" if found.alpha is None else f"{found.alpha:.2f}"
        lines.append(
            f"  Agreement between raters: Krippendorff's alpha {alpha}; the same verdict in {found.agreeing:.0%} of pairs of votes."
        )
    return [*lines, _position(found.position)]


def _judge(name: str, found: JudgeSummary, first: str, second: str) -> list[str]:
    lines = [f"Judge {name}: {found.questions.total} questions, each in both orders", *_rows([("questions", found.questions)])]
    lines.append(_sign(found.questions, first, second))
    lines.append(
        f"  The two orders contradict each other on {found.inconsistent} (counted as ties); no verdict to be read on {found.unreadable}."
    )
    return [*lines, _position(found.position)]


def _rows(rows: list[tuple[str, Tally]]) -> list[str]:
    width = max(24, *(len(name) for name, _ in rows))
    head = f"  {'':<{width}} {'wins':>5} {'losses':>6} {'ties':>5} {'bad':>5}  win rate, 95 % interval"
    return [head, *(f"  {name:<{width}} {t.first:>5} {t.second:>6} {t.ties:>5} {t.neither:>5}  {_rate(t)}" for name, t in rows)]


def _rate(tally: Tally) -> str:
    if not tally.total:
        return "–"
    low, high = tally.interval()
    text = f"{tally.win_rate:.1%} ({low:.1%} to {high:.1%})"
    if tally.decided and tally.decided < tally.total:
        low, high = tally.interval_decided()
        text += f"; without ties {tally.win_rate_decided:.1%} ({low:.1%} to {high:.1%})"
    return text


def _sign(tally: Tally, first: str, second: str) -> str:
    leader = first if tally.first > tally.second else second if tally.second > tally.first else "neither"
    return (
        f"  Sign test over questions: {tally.first} for {first}, {tally.second} for {second}, p = {tally.sign_test():.3g}; ahead: {leader}."
    )


def _position(bias: PositionBias) -> str:
    if math.isnan(bias.share):
        return "  Position: no decided vote."
    return f"  Position: the answer shown as A won {bias.left} of {bias.left + bias.right} ({bias.share:.0%}), p = {bias.p_value:.3g}."
