"""What comes from elsewhere (weights, tokenizers, checkpoints, configs) is data and runs nothing; secrets are written nowhere."""

import ast
import json
import logging
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import jaxrl_llm
from jaxrl_llm import cli, config_load, redaction
from jaxrl_llm.config import Tokenizer
from jaxrl_llm.models import hf
from jaxrl_llm.tasks.base import RewardSpec
from jaxrl_llm.tasks.text import load_text
from jaxrl_llm.tasks.workers import Scorer
from jaxrl_llm.training import host_state, rundir

PACKAGE = Path(jaxrl_llm.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
QUICKSTART = PACKAGE.parent / "configs" / "quickstart.yaml"
SECRET = "sk-0123456789abcdef"

# ---------------------------------------------------------------------------------------- nothing in the package runs data

RUN_OBJECTS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
MAY_RUN_TEXT = {"tasks/sandbox_main.py"}  # which has no right left by then


def dangers(source: str, name: str = "x.py") -> list[str]:
    """What in a source file could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {m}" for m in modules if m.split(".")[0] in RUN_OBJECTS]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in RUN_TEXT and name not in MAY_RUN_TEXT:
            found.append(called)
        if called in ("os.system", "os.popen", "torch.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(called)
        if called == "yaml.load" and [ast.unparse(a) for a in node.args[1:]] != ["_Loader"]:  # a SafeLoader
            found.append(called)
        if called in ("np.load", "numpy.load", "jnp.load") and given.get("allow_pickle") != "False":
            found.append(called)
        if called.endswith(".from_pretrained") and given.get("trust_remote_code") != "False":
            found.append(called)
        found += [f"{k}={v}" for k, v in given.items() if (k, v) in (("shell", "True"), ("allow_pickle", "True"))]
        found += [f"{k}={v}" for k, v in given.items() if k == "trust_remote_code" and v != "False"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_source_file_can_run_what_it_reads(path):
    assert dangers(path.read_text(), str(path.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(x)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "torch.load(x)",
        "yaml.load(x, yaml.Loader)",
        "AutoTokenizer.from_pretrained(x)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=config.trust)",
        "load_dataset(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
    ],
)
def test_what_could_run_data_is_found(source):
    assert dangers(source)


def test_the_configs_loader_is_a_safe_one():
    import yaml

    assert issubclass(config_load._Loader, yaml.SafeLoader)


def test_no_config_field_lets_a_model_bring_code():
    assert not [key for key, _ in config_load.fields() if "trust" in key or "remote" in key]


# -------------------------------------------------------------------------------------------------------- malicious files


@pytest.fixture
def marker(tmp_path):
    """Where a payload would leave its mark; nothing may be there after the test."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["json", "a0"])
def test_an_object_in_a_checkpoints_host_state_is_refused(marker, tmp_path, name):
    content = {"json": np.frombuffer(b'{"x": {"__array__": "a0"}}', np.uint8), "a0": np.zeros(2)}
    content[name] = np.array([Payload(marker)], object)
    np.savez(tmp_path / "state.npz", allow_pickle=True, **content)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        host_state.decode((tmp_path / "state.npz").read_bytes())


def test_a_pickle_in_the_place_of_an_array_is_refused(marker, tmp_path):
    with zipfile.ZipFile(tmp_path / "state.npz", "w") as file:
        file.writestr("json.npy", pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match="no array 'json'"):
        host_state.decode((tmp_path / "state.npz").read_bytes())


SPEC = {
    "model_type": "qwen3",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 8,
    "tie_word_embeddings": True,
}


def directory_with(path, weights: bytes, **config):
    (path / "config.json").write_text(json.dumps({**SPEC, **config}))
    (path / "model.safetensors").write_bytes(weights)
    return path


def safetensors(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(start, end, shape=(1,), dtype="F32"):
    return {"model.norm.weight": {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}}


CRAFTED = {
    "empty": b"",
    "a header longer than the file": safetensors({}, length=2**40),
    "a header of 2^64 bytes": safetensors({}, length=2**64 - 1),
    "no json": safetensors(b"\x80\x04cos\nsystem\n"),
    "offsets beyond the file": safetensors(tensor(0, 2**40, (2**38,))),
    "offsets backwards": safetensors(tensor(8, 4), bytes(8)),
    "a shape that overflows": safetensors(tensor(0, 4, (2**62, 2**62)), bytes(4)),
    "a shape of other size": safetensors(tensor(0, 4, (7,)), bytes(4)),
    "an unknown dtype": safetensors(tensor(0, 4, dtype="OBJECT"), bytes(4)),
    "overlapping tensors": safetensors({**tensor(0, 4), "x": tensor(2, 6)["model.norm.weight"]}, bytes(6)),
    "deep nesting": safetensors(b'{"a":' + b"[" * 100_000),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_safetensors_file_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(ValueError, match="damaged, expected a safetensors file") as error:
        hf.load(directory_with(tmp_path, CRAFTED[name]))
    assert "\n" not in str(error.value)


def test_a_pickle_named_safetensors_is_refused(marker, tmp_path):
    with pytest.raises(ValueError, match="damaged, expected a safetensors file"):
        hf.load(directory_with(tmp_path, pickle.dumps(Payload(marker))))


def test_torch_pickles_are_not_looked_at(marker, tmp_path):
    directory_with(tmp_path, b"")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        hf.load(tmp_path)


def test_an_index_names_only_files_of_its_directory(tmp_path):
    directory_with(tmp_path, b"").joinpath("model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys([t.name for t in hf.tensors(hf.load_spec(tmp_path))], "../other.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '\.\./other\.safetensors', expected files beside it"):
        hf.load(tmp_path)


def code_in(directory, marker, name):
    (directory / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")


def test_a_models_own_code_is_not_run(marker, tmp_path):
    auto = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    code_in(tmp_path, marker, "modeling_evil")
    directory_with(tmp_path, b"", auto_map=auto, trust_remote_code=True)
    assert hf.load_spec(tmp_path).embed == 4
    directory_with(tmp_path, b"", auto_map=auto, trust_remote_code=True, model_type="evil")
    with pytest.raises(ValueError, match="evil"):
        hf.load_spec(tmp_path)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Evil"])
def test_a_tokenizers_own_code_is_not_run(marker, tmp_path, monkeypatch, name):
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # what transformers would ask
    load_text(Tokenizer(chars="abc")).save(tmp_path)
    code_in(tmp_path, marker, "tokenization_evil")
    evil = {"auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}, "tokenizer_class": name}
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**told, **evil, "trust_remote_code": True}))
    try:
        assert load_text(Tokenizer(path=str(tmp_path))).vocab == 6
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    assert "tokenization_evil" not in " ".join(sys.modules)


def test_a_chat_template_cannot_reach_python(tmp_path):
    load_text(Tokenizer(chars="abc")).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    words = load_text(Tokenizer(path=str(tmp_path), chat=True))
    with pytest.raises(Exception, match=r"unsafe|SecurityError"):
        words.encode_prompt({"prompt": "a"})


def test_yaml_cannot_name_python_objects(marker, tmp_path):
    (tmp_path / "evil.yaml").write_text(f"task: !!python/object/apply:builtins.open [{marker}, w]\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        config_load.load_unchecked(tmp_path / "evil.yaml")
    with pytest.raises(ValueError, match="not valid YAML"):
        config_load.load_unchecked(QUICKSTART, [f"run.dir=!!python/object/apply:builtins.open [{marker}, w]"])


# ---------------------------------------------------------------------------------------------------------------- secrets


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("MY_JUDGE_API_KEY", SECRET)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"run.dir=runs/{SECRET}", r"^run\.dir: holds the value of MY_JUDGE_API_KEY"),
        ("rewards.judge={url: 'https://me:pa55@host/v1', model: m}", r"^rewards\.judge\.url: a URL with a user"),
        (
            "rewards.parts=[{reward: 'm:f', options: {api_key: x}}]",
            r"^rewards\.parts\.0\.options\.api_key: is named like",
        ),
        ("rewards.parts=[{reward: 'm:f', options: {a: {password: x}}}]", r"^rewards\.parts\.0\.options\.a\.password"),
    ],
)
def test_a_secret_in_a_config_is_refused_without_repeating_it(secret, override, message, capsys):
    with pytest.raises(ValueError, match=message) as error:
        config_load.load(QUICKSTART, [override])
    assert SECRET not in str(error.value) and "pa55" not in str(error.value) and "\n" not in str(error.value)
    assert cli.main(["train", str(QUICKSTART), override]) == 2
    assert not {SECRET, "pa55"} & set(capsys.readouterr().err.replace("/", " ").replace(":", " ").split())


def test_names_of_variables_and_tokens_of_a_vocabulary_are_no_secrets(secret):
    redaction.check(
        {
            "rewards": {
                "env": ["MY_JUDGE_API_KEY"],
                "judge": {"key_env": "MY_JUDGE_API_KEY", "url": "http://host:8000/v1"},
            },
            "model": {"spec": {"eos_token": "</s>", "path": "gs://bucket/a@b"}},
            "task": {"reward_options": {"key": "answer"}},
        }
    )


def test_a_run_directory_holds_no_secret_of_the_environment(secret, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxrl_llm", "train", f"a={SECRET}", "rewards.judge.url=https://me:pa55@host"])
    with rundir.claim(tmp_path / "run", {"task": {}, "rewards": {"env": ["MY_JUDGE_API_KEY"]}}) as run:
        about = json.loads((run.path / rundir.ABOUT).read_text())
        texts = "".join(path.read_text() for path in run.path.iterdir())
    assert about["argv"] == ["jaxrl_llm", "train", "a=[MY_JUDGE_API_KEY]", "rewards.judge.url=https://[...]@host"]
    assert SECRET not in texts and "pa55" not in texts


def test_a_reward_that_raises_with_a_secret_does_not_log_it(secret, tmp_path, monkeypatch, caplog):
    (tmp_path / "leaking_rewards.py").write_text(
        "import os\ndef leak(completion, record):\n    raise OSError('no access with ' + os.environ['MY_JUDGE_API_KEY'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        caplog.at_level(logging.WARNING),
        Scorer([RewardSpec("leak", "leaking_rewards:leak")], timeout=60.0, env=["MY_JUDGE_API_KEY"]) as scorer,
    ):
        assert scorer.score([("", {})]) == [{"leak": None}]
    assert "no access with [MY_JUDGE_API_KEY]" in caplog.text and SECRET not in caplog.text
