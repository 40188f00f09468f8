"""A server that speaks SGLang's protocol over loopback, with a tiny block-causal model inside, so
that tokens, versions and faults are real. A row's draws follow from its seed alone.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.models.checkpoint import load_denoiser, save_model
from unmaskrl.models.loading import random_tiny
from unmaskrl.models.tokenizer import build_byte_tokenizer

# the confidence above which the server reveals, at which the tiny model's blocks take 1 to 4 calls
THRESHOLD = 0.9
Edit = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


class Stub:
    """``faults``: what befalls the next requests for samples, one each: a status, ``drop``,
    ``hang``, ``die``, or a function that edits the answer.
    """

    def __init__(self, folder: Path, *, threshold: float = THRESHOLD) -> None:
        self.folder = folder
        tiny_model(folder)
        self.port = 0
        self.told: dict[str, Any] = {}  # in place of the truth in /model_info
        self.faults: deque[int | str | Edit] = deque()
        self.updates: deque[dict[str, Any]] = deque()  # answers to updates that are not made
        self.greedy = False
        self.step_maps = True
        self.logps = True
        self.trims = True  # what stands behind an end token in its block, as SGLang does
        self.ignores_seeds = False
        self.keeps_cache = False
        self.wrong_version = False
        self.broken = False  # decodes with other numbers than those of the weights that it loads
        self.bodies: list[dict[str, Any]] = []
        self.loaded: list[str] = []
        self.algorithm = folder.parent / "algorithm.yaml"
        self.algorithm.write_text(f"{{block_size: 4, threshold: {threshold}}}\n")
        self.threshold = threshold
        self.lock = threading.Lock()
        self.server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """With the weights that it is started with."""
        self.denoiser = load_denoiser(self.folder)
        self.version: str | None = "default"
        self.cached: set[tuple[int, ...]] = set()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.answer(self, None)

            def do_POST(self) -> None:
                stub.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing is printed."""

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """As a kill does: nobody listens any more."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        path = handler.path
        if path == "/generate":
            self.bodies.append(body)
            fault = self.faults.popleft() if self.faults else None
            if fault in ("drop", "hang", "die"):
                if fault == "hang":
                    time.sleep(4)
                if fault == "die":
                    self.stop()
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(fault, int):
                reply(handler, fault, {"error": {"message": "the stub fails"}})
                return
            with self.lock:
                rows = self.generate(body)
            reply(handler, 200, fault(rows) if callable(fault) else rows)
        elif path == "/update_weights_from_disk":
            reply(handler, *self.update(body))
        elif path == "/model_info":
            info = {"model_path": str(self.folder), "model_type": "sdar"}
            reply(handler, 200, info | {"weight_version": self.version} | self.told)
        elif path == "/server_info":
            reply(handler, 200, {"dllm_algorithm_config": str(self.algorithm)})
        else:
            reply(handler, 200 if path == "/abort_request" else 404, {})

    def update(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.updates:
            return 400, self.updates.popleft()
        with self.lock:
            self.denoiser = load_denoiser(body["model_path"])
            if self.broken:
                self.denoiser.model.state_dict()["lm_head.weight"].neg_()
            self.loaded.append(body["weight_version"])
            if not self.wrong_version:
                self.version = body["weight_version"]
            if body["flush_cache"] and not self.keeps_cache:
                self.cached.clear()
        return 200, {"success": True, "message": "Succeeded to update model weights."}

    def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        params = body["sampling_params"]
        temperature = 0.0 if self.greedy else params[0]["temperature"]
        den = replace(self.denoiser, end_ids=tuple(params[0]["stop_token_ids"]))
        seeds = [p["sampling_seed"] for p in params]
        if self.ignores_seeds:
            seeds = [seed + 1000 * len(self.bodies) for seed in seeds]
        rollout = decode(
            den,
            blank_canvas(
                body["input_ids"],
                gen_length=max(p["max_new_tokens"] for p in params),
                denoiser=den,
                row_ids=seeds if temperature else list(range(len(seeds))),
            ),
            block_length=4,
            steps=1,
            select="confidence_threshold",
            gamma=self.threshold,
            temperature=temperature,
            top_k=None if params[0]["top_k"] == -1 else params[0]["top_k"],
            top_p=params[0]["top_p"],
            stop_at_eos=False,  # blocks are decoded whole
            generator=torch.Generator().manual_seed(0),
        )
        start = rollout.ids.shape[1] - rollout.gen_length
        rows = []
        for i, prompt in enumerate(body["input_ids"]):
            ids = rollout.ids[i, start : start + params[i]["max_new_tokens"]].tolist()
            stop = set() if params[i]["ignore_eos"] else set(params[i]["stop_token_ids"])
            end = next((at for at, one in enumerate(ids, 1) if one in stop), len(ids))
            end += 0 if self.trims else -(len(prompt) + end) % 4
            part = slice(start, start + end)
            meta = {
                "id": body["rid"][i],
                "prompt_tokens": len(prompt),
                "cached_tokens": len(prompt) if tuple(prompt) in self.cached else 0,
                "weight_version": self.version,
                "finish_reason": {"type": "stop" if end < len(ids) else "length"},
            }
            if body.get("return_step_maps") and self.step_maps:
                meta["step_maps"] = rollout.local_step[i, part].tolist()
            if body.get("return_logprob") and self.logps:
                logps = rollout.behavior_logps[i, part].tolist()
                meta["output_token_logprobs"] = [
                    [logp, one, None] for logp, one in zip(logps, ids[:end], strict=True)
                ]
            rows.append({"text": "", "output_ids": ids[:end], "meta_info": meta})
        self.cached |= {tuple(prompt) for prompt in body["input_ids"]}
        return rows


def tiny_model(folder: Path) -> None:
    """Random weights with confident and less confident tokens, and an end token now and then."""
    module = random_tiny("JetLM/SDAR-8B-Chat", torch.Generator().manual_seed(1))
    with torch.no_grad():
        head = module.state_dict()["lm_head.weight"]
        head.mul_(20)
        head[module.config.eos_token_id] = 1.05 * head[131]  # a frequent token
    save_model(module, folder)
    build_byte_tokenizer(folder)


def reply(handler: BaseHTTPRequestHandler, status: int, data: Any) -> None:
    text = json.dumps(data).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    with suppress(BrokenPipeError, ConnectionResetError):  # it was given up
        handler.wfile.write(text)
