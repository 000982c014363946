"""Blind comparison of two models: people, or a language model as judge, say which of two answers is better.

preference/trial-17-vs-trial-0/     in the study's folder, or --out
  comparison.json    who is compared, the questions, how answers are generated
  answers.jsonl      one answer per contestant and question
  votes.db           what people said: SQLite, one row per vote, nothing is ever changed or removed
  judge.jsonl        what a language model said; never mixed with the above

questions.py    Question, read_questions: Vicuna's JSONL, one's own JSONL or text
contestants.py  choose: "tuned", "default", "base", "trial:17" or a folder -> Contestant
answers.py      write_answers: generation, once, resumable
votes.py        Votes: the SQLite file
server.py       create_app: the page and its four requests; guard.py: who may send them; connections.py: for how long
judge.py        ask_judge: any OpenAI-compatible endpoint, both orders
analysis.py     win rate, sign test, agreement, position bias: votes in, numbers out
comparison.py   Comparison, PreferenceRecord, read_preferences, find_comparisons: the folder as data; needs no web framework
summary_lines.py  the same as rows of a table and sentences
"""

from loratune.preference.comparison import Comparison, PreferenceRecord, find_comparisons, read_preferences
from loratune.preference.summary_lines import summary_text

__all__ = ["Comparison", "PreferenceRecord", "find_comparisons", "read_preferences", "summary_text"]
