"""Let people judge blindly which of two models answers better: tuned, default, base, trial:NUMBER, or an adapter's folder.

Answers are generated once and kept; then a page opens in the browser, and every vote is stored at once. After
Ctrl-C the same command continues. A language model can judge too, separately from people (--judge)."""

import argparse
import datetime
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.cli.parser import add_no_browser, add_trust, open_browser
from loratune.errors import DataError, MissingExtraError, SpecError, StorageError

if TYPE_CHECKING:
    from loratune.preference.comparison import Comparison
    from loratune.preference.contestants import Tuned
    from loratune.preference.questions import Question
    from loratune.record import StudyRecord
    from loratune.work import ModelRecipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "first",
        metavar="A",
        help="tuned (the choice of select, else the lowest loss), default (trial 0), base, trial:17, or an adapter's folder",
    )
    parser.add_argument("second", metavar="B", help="likewise")
    add_trust(parser)
    parser.add_argument("--study", metavar="FOLDER", type=Path, help="default: the current folder, if it is a study")
    parser.add_argument(
        "--questions", metavar="FILE", type=Path, help="JSON Lines (Vicuna's format, or one question each), or text, one question per line"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="default: preference/A-vs-B in the study's folder")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of sampling (default: 0); sides and order are random and secret"
    )

    answers = parser.add_argument_group("answers")
    answers.add_argument("--model", metavar="NAME", help="base model, when no study names it")
    answers.add_argument("--prompt", choices=("auto", "alpaca", "chat"), help="default: the study's own, else auto, by the tokenizer")
    answers.add_argument("--max-new-tokens", metavar="N", type=_positive, default=512, help="length limit of an answer (default: 512)")
    answers.add_argument("--temperature", metavar="T", type=_temperature, default=0.0, help="default: 0, the likeliest token each time")
    answers.add_argument("--batch-size", metavar="N", type=_positive, default=8, help="questions per batch (default: 8)")
    answers.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")

    page = parser.add_argument_group("page")
    page.add_argument("--no-page", action="store_true", help="only generate, judge and print the results")
    add_no_browser(page)
    page.add_argument("--port", metavar="N", type=int, help="default: 8652, or any free one")
    page.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all, with --token")
    page.add_argument("--token", metavar="TEXT", nargs="?", const="", help="require a token; without TEXT, a new one at every start")
    page.add_argument("--raters", metavar="NAME", nargs="+", default=[], help="raters who may vote (default: anyone who opens the page)")

    page.add_argument(
        "--readmit", metavar="NAME", nargs="+", default=[], help="let these raters vote from a new browser, for example after a lost cookie"
    )

    judge = parser.add_argument_group("language model as judge")
    judge.add_argument("--judge", metavar="URL", help="an OpenAI-compatible endpoint, up to /v1")
    judge.add_argument("--judge-model", metavar="NAME", help="the model to ask there")
    judge.add_argument(
        "--judge-key", metavar="VARIABLE", default="OPENAI_API_KEY", help="environment variable with the key (default: OPENAI_API_KEY)"
    )


def main(args: argparse.Namespace) -> int:
    if args.judge and not args.judge_model:
        raise SpecError("--judge needs --judge-model, the name of the model to ask there.")
    from loratune.preference import read_preferences, summary_text
    from loratune.preference.answers import write_answers
    from loratune.preference.comparison import settle

    study = _study(args.study, args.trust_remote_code)
    comparison = _comparison(args, study)
    folder = args.out or _default_folder(comparison, study)
    page = None if args.no_page else _open_port(args)  # its errors come before minutes of generation
    try:
        comparison = settle(comparison, folder)
        write_answers(comparison, folder, device=args.device)
        if args.judge:
            _judge(args, folder)
        if page is not None:
            _vote(args, folder, page)
    finally:
        if page is not None:
            page.close()
    print(summary_text(read_preferences(folder)))
    args.facts |= {"folder": folder, "summary": summary_text(read_preferences(folder))}
    print(f"Stored in {folder}")
    return 0


def _study(given: Path | None, trusted: bool) -> "StudyRecord | None":
    from loratune.record import read
    from loratune.record.paths import StudyPaths

    folder = given if given is not None else Path()
    return read(folder, trust_remote_code=trusted) if given is not None or StudyPaths(folder).spec.is_file() else None


def _comparison(args: argparse.Namespace, study: "StudyRecord | None") -> "Comparison":
    from loratune.preference import Comparison
    from loratune.preference.answers import Generation
    from loratune.preference.contestants import base_of, contestant_of
    from loratune.work import ModelRecipe

    tuned = _tuned(study) if study is not None and "tuned" in (args.first, args.second) else None
    first, second = (contestant_of(given, study, tuned) for given in (args.first, args.second))
    if (first.adapter, first.weights) == (second.adapter, second.weights):
        raise SpecError(f"{args.first} and {args.second} are the same model ({first.label}); there is nothing to compare.")
    model = study.base_model if study is not None else base_of(first, second) if not args.model else None
    if args.model or model is None:
        model = ModelRecipe(name_or_path=args.model)
    used = study.prompt if study is not None else {}
    return Comparison(
        first=first,
        second=second,
        model=model,
        prompt=args.prompt or used.get("template") or used.get("kind", "auto"),
        date=used.get("date") or datetime.date.today().isoformat(),
        thinking=used.get("thinking", False),
        questions=_questions(args.questions, model),
        generation=Generation(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed, batch_size=args.batch_size),
    )


def _tuned(study: "StudyRecord") -> "Tuned | None":
    """The trial and adapter that `loratune select` chose; None for the lowest loss. Says which it is."""
    from loratune import selection  # scipy: a second of import
    from loratune.preference.contestants import Tuned
    from loratune.record.adapters import find_adapter
    from loratune.record.paths import MAIN

    made = selection.read_selection(study.folder)
    if made is not None and made.holds_for(study):
        trial = made.trial_of(study)
        adapter = find_adapter(study, trial, made.shipped.run)
        if adapter is None:
            raise StorageError(
                f"the adapter that `loratune select` chose, of trial {trial.number}, is not on disk; the command trains it again, "
                "or name another contestant."
            )
        again = "" if made.shipped.run == MAIN else f", trained with another seed ({made.shipped.run}): the adapter that is handed over"
        print(f"tuned is trial {trial.number}, which `loratune select` chose{again}", flush=True)
        return Tuned(trial=trial, adapter=adapter, run=made.shipped.run)
    if study.best is not None:
        why = "no selection was made" if made is None else "the selection is out of date"
        print(f"tuned is trial {study.best.number}, the lowest validation loss ({why}: loratune select {study.folder})", flush=True)
    return None


def _questions(given: Path | None, model: "ModelRecipe") -> "tuple[Question, ...]":
    from loratune.preference.questions import demo_questions, read_questions

    if given is not None:
        return read_questions(given)
    from loratune.demo import model_folder

    if Path(model.name_or_path).expanduser().resolve() == model_folder().resolve():
        return demo_questions()
    raise DataError(
        "no questions: give --questions with a file, one question per line, or JSON Lines such as Vicuna's question.jsonl (FastChat) "
        'or {"question": "Why is the sky blue?", "category": "science"}.'
    )


def _default_folder(comparison: "Comparison", study: "StudyRecord | None") -> Path:
    home = study.paths.preference if study is not None else Path("preference")
    return home / f"{comparison.first.name}-vs-{comparison.second.name}"


def _judge(args: argparse.Namespace, folder: Path) -> None:
    from loratune.preference import read_preferences
    from loratune.preference.judge import Judge, ask_judge

    judge = Judge(url=args.judge, model=args.judge_model, key=os.environ.get(args.judge_key, ""))
    ask_judge(judge, read_preferences(folder).pairs, folder)


# --- the page ---------------------------------------------------------------------------------------------------------


def _open_port(args: argparse.Namespace) -> Any:
    try:
        from loratune.preference.server import listen
    except ImportError as error:
        raise MissingExtraError("the voting page's web server", "compare", str(error)) from error
    if args.token == "":
        args.token = secrets.token_urlsafe(16)
    if args.token is not None and not re.fullmatch(r"[\w-]{8,200}", args.token, re.ASCII):
        raise SpecError(
            "--token: use at least 8 letters, digits, '-' or '_', because it becomes part of a link. Without TEXT one is generated."
        )
    return listen(args.host, args.port, args.token)


def _vote(args: argparse.Namespace, folder: Path, listening: Any) -> None:
    from loratune.preference import read_preferences
    from loratune.preference.server import create_app, serve_page
    from loratune.preference.votes import NAME, Votes

    record = read_preferences(folder)
    if not record.pairs:
        print("Both models gave the same answer to every question; there is nothing to vote on.")
        return
    with Votes(folder / NAME) as votes:
        for name in args.readmit:
            if not votes.readmit(name):
                print(f"--readmit: nobody has entered as {name} yet.")
        app = create_app(record.pairs, votes, seed=record.comparison.seed, raters=args.raters, token=args.token)
        address = _address(args, listening.getsockname()[1])
        print(
            f"Vote at {address}\nEvery vote is stored at once. Ctrl-C closes the page and shows the results; the same command continues.",
            flush=True,
        )
        open_browser(args, address)
        try:
            serve_page(app, listening)
        except KeyboardInterrupt:  # uvicorn raises the signal again when it has closed
            print()


def _address(args: argparse.Namespace, port: int) -> str:
    import socket

    anywhere = args.host in ("0.0.0.0", "::")
    host = socket.gethostname() if anywhere else f"[{args.host}]" if ":" in args.host else args.host
    return f"http://{host}:{port}/" + (f"?token={args.token}" if args.token else "")


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; needed: a whole number >= 1")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"got {text!r}; needed: a number from 0 to 10")
    return value
