"""Importing large packages."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector, which walks through the millions of objects that torch and transformers make, all of which
    stay: a fifth of the time that importing them takes. Then they are left out of later collections.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()
