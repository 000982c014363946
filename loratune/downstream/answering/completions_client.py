"""What is asked of a vLLM server: OpenAI's completions with token ids, vLLM's additions to them, and its adapters. Standard library."""

import contextlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loratune.errors import EvaluationError

KEY = "VLLM_API_KEY"  # vLLM's own name for it: a server that we start reads it too
_TIMEOUT = 600.0  # seconds for one reply, whatever waits before it in the server
_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}  # each one said: a server may have defaults of its own
_PLAIN = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to wherever the server points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class CompletionsClient:
    """Asks the server at `url`, from any number of threads. All methods raise EvaluationError, saying what the server said.

    alive: raises where the server is known to have ended, so that nobody waits for it. note: said with every error.
    own: the server is ours, on this machine, and no proxy stands before it.
    """

    def __init__(
        self, url: str, *, alive: Callable[[], None] = lambda: None, note: Callable[[], str] = lambda: "", own: bool = False
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise EvaluationError(f"--server: got {url!r}; it is an address such as http://localhost:8000.")
        self.url, self._alive, self._note, self.closed = url.rstrip("/").removesuffix("/v1"), alive, note, threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if own else []))

    def models(self, *, patient: bool = True) -> list[dict[str, Any]]:
        """The models and adapters that are served: `id`, `root` (a path or hub id), `parent` (of an adapter)."""
        found = self._asked("/v1/models", None, patient)
        if not isinstance(models := found.get("data"), list) or not all(isinstance(model, dict) and "id" in model for model in models):
            raise self._error(f"{self.url}/v1/models does not speak OpenAI's protocol")
        return models

    def write(
        self, model: str, ids: Sequence[int], *, most: int, ends: Sequence[int], temperature: float, seed: int
    ) -> tuple[list[int], bool]:
        """At most `most` tokens behind `ids`, the one that ends the answer included or not; and whether there was such a one."""
        sampled = {"temperature": temperature, "seed": seed} if temperature else {}
        body = {"max_tokens": most, "stop_token_ids": list(ends), "return_token_ids": True, **sampled}
        (choice,) = self._completions(model, [ids], body)
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list):
            raise self._error(f"{self.url} returns no token ids; vLLM does from version 0.10.2 on")
        return tokens, choice.get("finish_reason") == "stop"

    def log_probabilities(self, model: str, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of each sequence [T], the natural logarithm of each token's probability behind those before it [T - 1]."""
        found = []
        choices = self._completions(model, sequences, {"max_tokens": 1, "prompt_logprobs": 0})
        for ids, choice in zip(sequences, choices, strict=True):
            given = choice.get("prompt_logprobs") or []
            try:
                found.append([float(at[str(token)]["logprob"]) for token, at in zip(ids[1:], given[1:], strict=True)])
            except (TypeError, KeyError, ValueError, IndexError) as error:
                raise self._error(f"{self.url} returns no prompt_logprobs; is it a vLLM server?") from error
        return found

    def load(self, name: str, adapter: Path) -> None:
        """Have the server read an adapter from a folder that it can see, under that name."""
        self._asked("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter.resolve())}, patient=False)

    def unload(self, name: str) -> None:
        self._asked("/v1/unload_lora_adapter", {"lora_name": name}, patient=False)

    def _completions(self, model: str, prompts: Sequence[Sequence[int]], body: dict[str, Any]) -> list[dict[str, Any]]:
        asked = {"model": model, "prompt": [list(map(int, ids)) for ids in prompts], **_GREEDY, **_PLAIN, **body}
        choices = self._asked("/v1/completions", asked, patient=True).get("choices")
        if not isinstance(choices, list) or len(choices) != len(prompts):
            raise self._error(f"{self.url}/v1/completions does not speak OpenAI's protocol")
        return sorted(choices, key=lambda choice: choice["index"])

    def _asked(self, path: str, body: dict[str, Any] | None, patient: bool) -> dict[str, Any]:
        """The reply as JSON. patient: ask again, a few times, where the server is busy, fails or does not answer."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {})
        request = urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode(), headers)
        waits = [0.0, *(_WAITS if patient else ())]
        for wait in waits:
            time.sleep(wait)
            self._alive()
            if self.closed.is_set():
                raise InterruptedError
            try:
                with self._opener.open(request, timeout=_TIMEOUT) as reply:
                    text = reply.read().decode()
                return dict(json.loads(text)) if text.startswith("{") else {}
            except urllib.error.HTTPError as error:
                with error:
                    said = f"HTTP {error.code}: {_message(error.read(20_000).decode(errors='replace'))}"
                if error.code != 429 and error.code < 500:
                    raise self._error(f"{self.url}{path} refuses. {said}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                said = str(getattr(error, "reason", error)) or type(error).__name__
        self._alive()
        tries = f"did not answer after {len(waits)} tries. Last" if patient else "failed"
        raise self._error(f"{self.url}{path} {tries}: {said}")

    def _error(self, text: str) -> EvaluationError:
        return EvaluationError(f"{text.rstrip('.')}. The answers so far are kept; the same command goes on.{self._note()}")


def _message(text: str) -> str:
    """What an error's body says: of OpenAI's `error.message`, else all of it, in one line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(str(text).split())[:500]
