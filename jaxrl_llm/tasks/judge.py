"""A language model as a reward, behind an OpenAI-compatible endpoint (`POST URL/chat/completions`)."""

import hashlib
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from jaxrl_llm.tasks.base import Record, fill
from jaxrl_llm.tasks.rewards import last_match

_MAX_WAIT = 30.0  # seconds between two tries at most


class JudgeError(Exception):
    """No verdict. `cause` is "timeout", "error" (the endpoint) or "invalid" (a reply without a score)."""

    def __init__(self, cause: str, detail: str):
        super().__init__(detail)
        self.cause = cause


class Judge:
    """Asks for verdicts; equal questions are asked once, also at the same time, and kept in `cache` (jsonl) when named.

    The fields are those of `config.Judge`. The key is read from the environment at every request and appears in no error,
    log or file; redirects are refused because they would carry it elsewhere. `concurrency` is the caller's to keep.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str = "{prompt}\n\n{completion}\n\nScore from 0 to 1:",
        pattern: str = r"([01](?:\.\d+)?)",
        key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        retries: int = 3,
        timeout: float = 60.0,
        cache: str | None = None,
        backoff: float = 1.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"rewards.judge.url: {url!r}, expected http://... or https://...")
        self.concurrency = concurrency
        self._url, self._model, self._prompt = url.rstrip("/") + "/chat/completions", model, prompt
        self._pick = last_match(pattern)
        self._key_env, self._retries, self._timeout, self._backoff = key_env, retries, timeout, backoff
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._lock = threading.Lock()
        self._replies: dict[str, Future[str]] = {}
        self._cache = Path(cache).expanduser() if cache else None
        if self._cache and self._cache.exists():
            for key, reply in _read_cache(self._cache):
                self._replies[key] = Future()
                self._replies[key].set_result(reply)

    def score(self, completion: str, record: Record) -> float:
        """The verdict on a completion: the first group of the last match of `pattern` in the reply. Raises JudgeError."""
        reply = self._reply(fill("rewards.judge.prompt", self._prompt, {**record, "completion": completion}))
        try:
            number = float(self._pick(reply))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise JudgeError("invalid", f"no score in the reply {reply[:80]!r}")
        return number

    def _reply(self, question: str) -> str:
        key = hashlib.sha256(json.dumps([self._url, self._model, question]).encode()).hexdigest()
        with self._lock:
            mine = key not in self._replies
            future = self._replies.setdefault(key, Future())
        if not mine:
            return future.result()
        try:
            reply = self._ask(question)
        except BaseException as error:
            with self._lock:
                del self._replies[key]  # a failure is not a verdict: asked again next time
            future.set_exception(error)
            raise
        if self._cache:
            with self._lock:
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                with self._cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reply": reply}) + "\n")
        future.set_result(reply)
        return reply

    def _ask(self, question: str) -> str:
        """One question with retries: after lost connections, timeouts, 429 and 5xx, waiting longer each time."""
        body = {"model": self._model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        problem = JudgeError("error", "was not asked")
        for attempt in range(self._retries + 1):
            wait = min(_MAX_WAIT, self._backoff * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                # The body is left unread: endpoints repeat keys in it.
                problem = JudgeError("error", f"endpoint answered {error.code} {error.reason}")
                if error.code != 429 and error.code < 500:
                    break
                asked = error.headers.get("Retry-After", "")
                wait = min(_MAX_WAIT, float(asked)) if asked.isdigit() else wait
            except TimeoutError:
                problem = JudgeError("timeout", f"no answer in {self._timeout:g} s")
            except (OSError, ValueError, LookupError, TypeError) as error:
                late = isinstance(getattr(error, "reason", None), TimeoutError)
                problem = JudgeError("timeout" if late else "error", f"{type(error).__name__} at the endpoint")
            if attempt < self._retries:
                time.sleep(wait)
        raise problem

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(self._key_env):
            headers["Authorization"] = f"Bearer {secret}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with self._open(request, timeout=self._timeout) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def _read_cache(path: Path) -> list[tuple[str, str]]:
    """Verdicts kept before; a last line cut short by a kill is no verdict, and is ended for the next one."""
    kept = []
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            kept.append((entry["key"], entry["reply"]))
        except (ValueError, LookupError, TypeError):
            continue
    return kept
