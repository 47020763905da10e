"""A judge behind an endpoint: verdicts, cache, retries, limits, and a key that is never written anywhere."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxrl_llm.config import Judge as Settings
from jaxrl_llm.tasks.base import RewardSpec
from jaxrl_llm.tasks.judge import Judge, JudgeError
from jaxrl_llm.tasks.workers import Scorer

KEY = "sk-very-secret"


class Endpoint:
    """A scripted chat endpoint: `answers` are used up first (status, or reply text), then every question gets "0.5"."""

    def __init__(self):
        endpoint = self
        self.answers, self.asked, self.headers, self.paths = [], [], [], []
        self.gate = threading.Event()  # requests wait for it
        self.gate.set()
        self.waiting, self.most = 0, 0
        self.lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.asked.append(body)
                    endpoint.headers.append(dict(self.headers))
                    endpoint.paths.append(self.path)
                    answer = endpoint.answers.pop(0) if endpoint.answers else "0.5"
                    endpoint.waiting += 1
                    endpoint.most = max(endpoint.most, endpoint.waiting)
                endpoint.gate.wait()
                with endpoint.lock:
                    endpoint.waiting -= 1
                status = answer if isinstance(answer, int) else 200
                sent = (
                    f"wrong key {KEY}" if status != 200 else json.dumps({"choices": [{"message": {"content": answer}}]})
                )
                if answer == "garbage":
                    sent = "<html>"
                self.send_response(status)
                if status in (301, 302, 303):
                    self.send_header("Location", endpoint.url + "/elsewhere")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent.encode())

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def judge(self, **settings):
        return Judge(**{"url": self.url, "model": "m", "timeout": 20.0, "backoff": 0.001, **settings})


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    running = Endpoint()
    yield running
    running.gate.set()
    running.server.shutdown()
    running.server.server_close()


RECORD = {"prompt": "Say hi", "answer": "hi"}


def test_the_verdict_is_the_score_in_the_reply(endpoint):
    endpoint.answers = ["I would say 0.75."]
    assert (
        endpoint.judge(prompt="Q {prompt} A {completion} R {answer}", key_env="JUDGE_KEY").score("hello", RECORD)
        == 0.75
    )
    assert endpoint.paths == ["/v1/chat/completions"]
    assert endpoint.asked[0]["model"] == "m"
    assert endpoint.asked[0]["messages"] == [{"role": "user", "content": "Q Say hi A hello R hi"}]
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_without_a_key_none_is_sent(endpoint):
    endpoint.judge(key_env="NO_SUCH_VARIABLE").score("hello", RECORD)
    assert "Authorization" not in endpoint.headers[0]


def test_equal_questions_are_asked_once(endpoint):
    judge = endpoint.judge()
    assert [judge.score(c, RECORD) for c in ("a", "a", "b", "a")] == [0.5] * 4
    assert len(endpoint.asked) == 2


def test_equal_questions_at_the_same_time_are_asked_once(endpoint):
    judge = endpoint.judge()
    endpoint.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        scores = [pool.submit(judge.score, "a", RECORD) for _ in range(4)]
        endpoint.gate.set()
        assert [s.result() for s in scores] == [0.5] * 4
    assert len(endpoint.asked) == 1


def test_verdicts_are_kept_in_a_file_and_a_line_cut_short_is_asked_again(endpoint, tmp_path):
    file = tmp_path / "deep" / "verdicts.jsonl"
    judge = endpoint.judge(cache=str(file), key_env="JUDGE_KEY")
    judge.score("a", RECORD), judge.score("b", RECORD)
    text = file.read_text()
    assert KEY not in text
    file.write_text(text[:-10])
    again = endpoint.judge(cache=str(file))
    assert [again.score(c, RECORD) for c in ("a", "b")] == [0.5, 0.5]
    assert [a["messages"][0]["content"].split()[2] for a in endpoint.asked] == ["a", "b", "b"]
    third = endpoint.judge(cache=str(file))
    assert [third.score(c, RECORD) for c in ("a", "b")] == [0.5, 0.5]
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize("trouble", [429, 500, 503, "garbage"])
def test_trouble_that_passes_is_tried_again(endpoint, trouble):
    endpoint.answers = [trouble, trouble, "0.25"]
    assert endpoint.judge(retries=2).score("a", RECORD) == 0.25
    assert len(endpoint.asked) == 3


def test_trouble_that_stays_is_given_up_after_the_retries(endpoint):
    endpoint.answers = [500] * 9
    with pytest.raises(JudgeError, match="endpoint answered 500") as error:
        endpoint.judge(retries=2).score("a", RECORD)
    assert error.value.cause == "error" and len(endpoint.asked) == 3


def test_a_failure_is_not_kept_as_a_verdict(endpoint):
    endpoint.answers = [500]
    judge = endpoint.judge(retries=0)
    with pytest.raises(JudgeError):
        judge.score("a", RECORD)
    assert judge.score("a", RECORD) == 0.5


def test_a_refusal_is_not_tried_again_and_does_not_show_the_key(endpoint, caplog):
    endpoint.answers = [401]
    options = {"url": endpoint.url, "model": "m", "key_env": "JUDGE_KEY", "backoff": 0.001}
    with caplog.at_level(logging.DEBUG), Scorer([RewardSpec("judge", "judge", 1.0, options)]) as scorer:
        assert scorer.score([("a", RECORD)]) == [{"judge": None}]
    assert len(endpoint.asked) == 1
    assert "401" in caplog.text and KEY not in caplog.text


def test_the_key_does_not_follow_a_redirect(endpoint):
    endpoint.answers = [302]
    with pytest.raises(JudgeError, match="302"):
        endpoint.judge(key_env="JUDGE_KEY").score("a", RECORD)
    assert endpoint.paths == ["/v1/chat/completions"]


def test_an_endpoint_that_does_not_answer_times_out(endpoint):
    endpoint.gate.clear()
    with pytest.raises(JudgeError, match=r"no answer in 0.2 s") as error:
        endpoint.judge(timeout=0.2, retries=1).score("a", RECORD)
    assert error.value.cause == "timeout" and len(endpoint.asked) == 2


def test_an_endpoint_that_is_not_there_is_an_error(endpoint):
    with pytest.raises(JudgeError) as error:
        endpoint.judge(url="http://127.0.0.1:9", retries=1).score("a", RECORD)
    assert error.value.cause == "error"


def test_no_more_requests_are_in_flight_than_allowed(endpoint):
    options = Settings(url=endpoint.url, model="m", concurrency=3).model_dump()
    endpoint.gate.clear()
    with Scorer([RewardSpec("judge", "judge", 1.0, options)]) as scorer:
        rows = [scorer.submit(str(i), RECORD) for i in range(12)]
        while endpoint.waiting < 3:
            pass
        endpoint.gate.set()
        assert [row.result() for row in rows] == [{"judge": 0.5}] * 12
    assert endpoint.most == 3


def test_a_judge_and_other_parts_make_one_row_in_the_order_of_the_parts(endpoint):
    endpoint.answers = ["1", "no idea"]
    options = {"url": endpoint.url, "model": "m", "concurrency": 1}
    parts = [RewardSpec("judge", "judge", 1.0, options), RewardSpec("letter_a", "letter:a")]
    with Scorer(parts) as scorer:
        assert scorer.score([("a", RECORD), ("ab", RECORD)]) == [
            {"judge": 1.0, "letter_a": 1.0},
            {"judge": None, "letter_a": 0.5},
        ]
        assert scorer.take_counts()["invalid"] == 1


def test_a_bad_address_is_refused():
    with pytest.raises(ValueError, match=r"rewards.judge.url: 'file:///etc/passwd', expected http"):
        Judge(url="file:///etc/passwd", model="m")
