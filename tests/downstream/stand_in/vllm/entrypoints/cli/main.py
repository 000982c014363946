"""Where vLLM's own command is: `python -m vllm.entrypoints.cli.main serve ...` starts the stand-in of tests/downstream."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from vllm_stand_in import main

if __name__ == "__main__":
    main()
