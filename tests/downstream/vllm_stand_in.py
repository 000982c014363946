"""A small server with vLLM's protocol, for tests: plain Transformers and PEFT, greedy, one request at a time.

/v1/models, /v1/completions with token ids and prompt_logprobs, /v1/load_lora_adapter and its inverse; refusals and errors have the
status codes and the words of vLLM 0.33.

    with StandIn(model, max_lora_rank=8) as server: ...            in this process, on a free port
    python -m vllm.entrypoints.cli.main serve MODEL ...             as a program, with stand_in/ on PYTHONPATH

As a program it dies after STAND_IN_DIES_AFTER requests for completions, and answers each of them SLOW seconds later.
"""

import argparse
import contextlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StandIn:
    def __init__(self, model: Path, *, max_lora_rank: int = 16, name: str = "base", length: int = 512, port: int = 0) -> None:
        torch.set_num_threads(1)
        self.base: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.model, self.name, self.length, self.max_lora_rank, self.root = self.base, name, length, max_lora_rank, str(model)
        self.adapters: dict[str, str] = {}
        self.lock, self.fail, self.asked, self.seen = threading.Lock(), 0, 0, list[dict[str, Any]]()
        self.dies_after, self.slow = int(os.environ.get("STAND_IN_DIES_AFTER", 10**9)), float(os.environ.get("STAND_IN_SLOW", 0))
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(lambda _: stand_in.get(self.path))

            def do_POST(self) -> None:
                self._reply(lambda body: stand_in.post(self.path, json.loads(body)))

            def _reply(self, answer: Any) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    status, found = 200, answer(body)
                except RefusedError as error:
                    status, found = error.status, {"error": {"message": str(error), "code": error.status}}
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def get(self, path: str) -> dict[str, Any]:
        if path != "/v1/models":
            raise RefusedError(404, "Not Found")
        base = {"id": self.name, "root": self.root, "parent": None, "max_model_len": self.length}
        return {"data": [base, *({"id": name, "root": root, "parent": self.name} for name, root in self.adapters.items())]}

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            if path == "/v1/load_lora_adapter":
                self.load(body["lora_name"], body["lora_path"])
                return {}
            if path == "/v1/unload_lora_adapter":
                del self.adapters[body["lora_name"]]
                return {}
            if path != "/v1/completions":
                raise RefusedError(404, "Not Found")
            self.asked += 1
            self.seen.append(body)
            if self.asked > self.dies_after:
                print("RuntimeError: the stand-in was told to die", flush=True)
                os._exit(1)
            if self.fail > 0:
                self.fail -= 1
                raise RefusedError(500, "EngineCore encountered an issue.")
            time.sleep(self.slow)
            choices = [self.complete(body, ids) for ids in body["prompt"]]
        return {"choices": [{"index": number, "text": "", **choice} for number, choice in enumerate(choices)]}

    def load(self, name: str, folder: str) -> None:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        if name in self.adapters:
            raise RefusedError(400, f"The lora adapter '{name}' has already been loaded.")
        if config["use_dora"]:
            raise RefusedError(500, "vLLM does not yet support DoRA.")
        if config["r"] > self.max_lora_rank:
            raise RefusedError(500, f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}.")
        key = f"k{abs(hash((name, folder, time.time())))}"  # PEFT takes no dots and no dashes at some places
        if self.model is self.base:
            self.model = peft.PeftModel.from_pretrained(self.base, folder, adapter_name=key).eval()
        else:
            self.model.load_adapter(folder, adapter_name=key)
        self.adapters[name] = folder
        self.keys = {**getattr(self, "keys", {}), name: key}

    def complete(self, body: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        name, most = body["model"], body["max_tokens"]
        if name != self.name and name not in self.adapters:
            raise RefusedError(404, f"The model `{name}` does not exist.")
        if len(ids) + most > self.length:
            raise RefusedError(400, f"This model's maximum context length is {self.length} tokens; {len(ids)} + {most} were asked for.")
        if most < 1:
            raise RefusedError(400, "max_tokens must be at least 1")
        off: Any = contextlib.nullcontext()
        if name != self.name:
            self.model.set_adapter(self.keys[name])
        elif self.model is not self.base:
            off = self.model.disable_adapter()
        with torch.inference_mode(), off:
            return self.run(ids, most, set(body.get("stop_token_ids", ())), body.get("prompt_logprobs"))

    def run(self, ids: list[int], most: int, ends: set[int], prompt_logprobs: int | None) -> dict[str, Any]:
        cache, given, tokens, said = transformers.DynamicCache(), torch.tensor([ids]), list[int](), None
        while len(tokens) < most and not ends & set(tokens[-1:]):
            logits = self.model(input_ids=given, past_key_values=cache, use_cache=True).logits[0].float()
            if not tokens and prompt_logprobs is not None:
                likely = logits[:-1].log_softmax(-1).gather(1, given[0, 1:, None])[:, 0].tolist()
                said = [None, *({str(t): {"logprob": value, "rank": 1}} for t, value in zip(ids[1:], likely, strict=True))]
            tokens.append(int(logits[-1].argmax()))
            given = torch.tensor([tokens[-1:]])
        return {"token_ids": tokens, "finish_reason": "stop" if ends & set(tokens[-1:]) else "length", "prompt_logprobs": said}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model", type=Path)
    for name in ("host", "served-model-name", "dtype", "generation-config", "seed", "max-loras", "max-cpu-loras", "max-num-seqs"):
        parser.add_argument(f"--{name}")
    for name, default in (("port", 0), ("max-model-len", 512), ("max-lora-rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--lora-modules", nargs="*", default=[])
    args = parser.parse_args()
    if args.max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
        parser.error(f"argument --max-lora-rank: invalid choice: {args.max_lora_rank}")
    server = StandIn(args.model, max_lora_rank=args.max_lora_rank, name=args.served_model_name, length=args.max_model_len, port=args.port)
    for module in map(json.loads, args.lora_modules):
        server.load(module["name"], module["path"])
    print(f"stand-in: {len(server.adapters)} adapters of rank up to {args.max_lora_rank}, pid {os.getpid()}", flush=True)
    server.http.serve_forever()
