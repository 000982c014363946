"""Run segments in a process of its own, or in each of torchrun's: ROOT OUTCOMES SEGMENT...

The outcomes are appended to the file OUTCOMES, one JSON per line. With LORATUNE_STOP_AT set, process 0 asks to stop
once it has seen a report of that step. With LORATUNE_SHARDS_OF set, each process must hold that part of the layers.
"""

import os
import sys
import threading
from pathlib import Path

from loratune.finetune.distributed import broadcast
from loratune.finetune.engines import load_engine, run_segments
from loratune.work import Progress, Recipe, Segment


def main(root: Path, outcomes: Path, *segments: str) -> None:
    engine = load_engine(Recipe.from_json((root / "recipe.json").read_text()), root)
    stop = threading.Event()
    stop_at = int(os.environ.get("LORATUNE_STOP_AT", "-1"))

    def report(progress: Progress) -> None:
        if progress.step == stop_at:
            stop.set()

    if shards := int(os.environ.get("LORATUNE_SHARDS_OF", "0")):
        held = sum(p.to_local().numel() for p in engine.base.model.parameters() if hasattr(p, "to_local"))
        assert held == sum(p.numel() for p in engine.base.model.parameters() if hasattr(p, "to_local")) / shards > 0
    for text in segments:
        assert broadcast(text) == text
        (outcome,) = run_segments(engine, [Segment.from_json(text)], tell=report, stop=stop)
        if os.environ.get("RANK", "0") == "0":
            with open(outcomes, "a") as file:
                file.write(outcome.to_json() + "\n")
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
