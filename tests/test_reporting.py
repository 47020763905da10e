"""metrics.jsonl, samples and tensorboard events of a run, and what people see while it goes."""

import io
import json

import numpy as np
import pytest

from jaxrl_llm.reporting import samples
from jaxrl_llm.reporting.progress import Progress, clock_time
from jaxrl_llm.reporting.samples import Sample
from jaxrl_llm.reporting.writers import Writers
from jaxrl_llm.rollout.rows import Row
from jaxrl_llm.tasks.base import Prompt


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def a_sample(**changes):
    fields = {
        "prompt": "1+1=",
        "completion": "2\n# not a heading",
        "reward": 1.0,
        "parts": {"exact": 1.0},
        "advantage": 0.5,
        "stop": "stop",
        "group": 3,
        "prompt_id": 8,
    }
    return Sample(**{**fields, **changes})


def test_a_step_is_a_line_on_disk_as_soon_as_it_is_written(tmp_path):
    writers = Writers(tmp_path)
    writers.scalars(1, {"reward/mean": np.float32(0.5), "updates": 2})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "reward/mean": 0.5, "updates": 2}]
    writers.close()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    writers = Writers(tmp_path)
    writers.scalars(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    writers.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": 1.0}]


def test_after_a_resume_every_step_appears_once(tmp_path):
    writers = Writers(tmp_path)
    writers.scalars(1, {"x": 1.0})
    writers.samples(1, [a_sample()])
    position = json.loads(json.dumps(writers.position()))
    writers.scalars(2, {"x": 2.0})
    writers.scalars(3, {"x": 3.0})
    writers.samples(3, [a_sample()])
    writers.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x"')  # the process was killed here
    writers = Writers(tmp_path, position)
    writers.scalars(2, {"x": 20.0})
    writers.close()
    assert [(m["step"], m["x"]) for m in lines(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 20.0)]
    assert [s["step"] for s in lines(tmp_path / "samples.jsonl")] == [1]


def test_a_new_run_does_not_keep_what_an_unsaved_one_wrote(tmp_path):
    writers = Writers(tmp_path)
    writers.scalars(1, {"x": 1.0})
    writers.close()
    Writers(tmp_path).close()
    assert lines(tmp_path / "metrics.jsonl") == []


def test_metrics_shorter_than_the_checkpoint_knows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: 0 bytes, expected at least the 10"):
        Writers(tmp_path, {"metrics": 10, "samples": 0, "step": 3})


def read_events(directory):
    """Scalars and text of the tensorboard files: the records framed by length and checksums, in time order."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(directory.glob("events*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            events.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return events


def test_tensorboard_has_scalars_and_text_and_forgets_what_a_resume_repeats(tmp_path):
    writers = Writers(tmp_path)
    writers.scalars(1, {"reward/mean": 0.25, "broken": float("nan")})
    writers.samples(1, [a_sample()], tag="eval")
    writers.text(0, "config", "run:")
    position = writers.position()
    writers.close()
    Writers(tmp_path, position).close()
    events = read_events(tmp_path / "tensorboard")
    values = {v.tag: (e.step, v) for e in events for v in e.summary.value}
    step, value = values["reward/mean"]
    assert (step, value.simple_value) == (1, 0.25)
    assert "broken" not in values
    assert b"reward 1" in values["eval/text_summary"][1].tensor.string_val[0]
    assert b"run:" in values["config/text_summary"][1].tensor.string_val[0]
    assert [e.step for e in events if e.HasField("session_log")] == [2]  # hides steps from 2 on


def test_samples_keep_text_and_numbers(tmp_path):
    writers = Writers(tmp_path)
    writers.samples(7, [a_sample(completion="é\u2028 <b>", reward=None, parts={"x": float("nan")})])
    writers.close()
    (line,) = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().split("\n") if x]
    assert line["completion"] == "é\u2028 <b>"
    assert (line["step"], line["reward"], line["parts"], line["group"]) == (7, None, {"x": None}, 3)


def test_sample_text_is_shown_literally():
    text = samples.as_text([a_sample(completion="<b>\n# x"), a_sample(reward=None, advantage=None)])
    assert "\n    <b>\n    # x" in text
    assert "reward 1, exact 1, advantage +0.5, stop" in text
    assert "unscored" in text


def test_samples_are_made_from_rows():
    row = Row(
        prompt=Prompt(4, np.array([1, 2], np.int32), {}),
        context=np.array([1, 2], np.int32),
        tokens=np.array([5, 6], np.int32),
        mask=np.array([False, True]),
        sampler_logp=np.zeros(2),
        policy_logp=np.zeros(2),
        group=9,
        truncated=True,
        reward=np.array([1.0, -0.5], np.float32),
        parts={"exact": 1.0, "short": -1.0},
    )
    decode = lambda tokens: "".join(map(str, tokens))  # noqa: E731
    (s,) = samples.from_rows([row, row], np.array([[np.nan, 2.0], [0, 0]]), decode, 1)
    assert s == Sample("12", "56", 0.5, {"exact": 1.0, "short": -1.0}, 2.0, "length", 9, 4)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def follow(stream, steps, every=2, done=0, first=60):
    """Progress of steps of 3 seconds after one of `first` seconds, which compiles."""
    now = [0.0]
    with Progress(stream, every=every, clock=lambda: now[0]) as progress:
        progress.phase("train", steps, done)
        for step in range(done + 1, steps + 1):
            now[0] += first if step == done + 1 else 3
            progress.activity("update")
            progress.step(step, {"reward/mean": 0.5, "accuracy": 0.25, "tokens_per_second": 1234.0, "unknown": 1.0})
        progress.note("metrics runs/x [not markup]")
    return stream.getvalue()


def test_a_slow_step_is_a_plain_line_when_half_a_minute_has_passed_since_the_last():
    now, stream = [0.0], io.StringIO()
    with Progress(stream, every=1000, clock=lambda: now[0]) as progress:
        progress.phase("train", 100)
        for step in range(1, 10):
            now[0] += 12
            progress.step(step, {})
    assert [line.split()[1] for line in stream.getvalue().splitlines()[1:]] == ["1/100", "4/100", "7/100"]


def test_plain_progress_is_the_first_the_last_and_every_nth_step_with_time_left():
    said = follow(io.StringIO(), 5).splitlines()
    assert said[0] == "train: 5 steps"
    assert [line.split("  ")[0] for line in said[1:-1]] == ["train 1/5", "train 2/5", "train 4/5", "train 5/5"]
    assert said[1] == "train 1/5  reward 0.500  accuracy 0.250  tokens/s 1,234"
    assert said[2] == "train 2/5  reward 0.500  accuracy 0.250  tokens/s 1,234  0:09 left"
    assert said[-1] == "metrics runs/x [not markup]"


def test_time_left_counts_only_the_steps_made_since_a_resume():
    said = follow(io.StringIO(), 100, every=92, done=90).splitlines()
    assert said[0] == "train: 100 steps, going on from 90"
    assert said[2].startswith("train 92/100")
    assert said[2].endswith("0:24 left")


def test_a_terminal_shows_phase_step_metrics_and_time_left():
    said = follow(Terminal(), 2)
    for part in ("train 2/2", "reward", "0.500", "accuracy", "1,234", "0:00 left", "metrics runs/x [not markup]"):
        assert part in said


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_times_read_like_a_clock(seconds, text):
    assert clock_time(seconds) == text
