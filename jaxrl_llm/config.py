"""The typed config tree: YAML in, dotted overrides, precise errors. Configs are data, not behaviour.

Every field's description is what `jaxrl_llm train --help-config` prints. `config_load` reads YAML and overrides into this
tree, `config_check` finds contradictions between fields; each error is one line: key, value, what is expected.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def described(default: Any, description: str, **kw: Any) -> Any:
    return Field(default, description=description, **kw)


class Run(Section):
    dir: str = described("runs/default", "run directory: config, metrics, samples, checkpoints; resumed when it exists")
    seed: int = described(0, "seed of everything random", ge=0)
    steps: int = described(300, "RL steps", ge=0)
    samples_every: int = described(20, "write rollout samples every this many steps; 0 never", ge=0)
    log_every: int = described(1, "write metrics every this many steps", ge=1)
    compile_cache: str | None = described(
        "auto",
        "directory where compiled programs are kept between runs; auto: the user's cache directory; none: nowhere. "
        "Several processes on CPUs keep none",
    )


class Model(Section):
    path: str | None = described(None, "Hugging Face directory to start from; none builds `spec` from random weights")
    spec: dict[str, Any] | None = described(
        None,
        "Hugging Face config.json keys of a model to build (model_type, hidden_size, ...); vocab_size from the tokenizer",
    )
    dtype: Literal["float32", "bfloat16", "float64"] = described("float32", "compute dtype")
    param_dtype: Literal["float32", "bfloat16", "float64"] = described("float32", "dtype of the master parameters")
    remat: Literal["auto", "none", "dots", "full"] = described(
        "auto",
        "what the backward pass recomputes per layer: nothing, all but products with weights and attention's output (dots), "
        "or everything; auto: dots where those fit",
    )
    head_chunk: int = described(0, "tokens per chunk of the log-prob head; 0 chooses by size", ge=0)


class Tokenizer(Section):
    path: str | None = described(None, "directory with tokenizer.json; none uses the model's directory")
    chars: str | None = described(
        None, "build a character tokenizer over these characters instead (with <pad> <bos> <eos>)"
    )
    chat: bool = described(False, "apply the tokenizer's chat template to prompts")
    system: str | None = described(None, "system message of the chat template")


class DataSet(Section):
    name: str = described(..., "reasoning-gym generator, e.g. chain_sum")
    weight: float = described(1.0, "share in the mixture", gt=0)
    config: dict[str, Any] = described({}, "the generator's own settings")


class GymTask(Section):
    """Procedural problems from reasoning-gym, with its scorers."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    datasets: list[DataSet] = described(..., "generators to mix", min_length=1)
    size: int = described(8000, "training problems to generate", ge=1)
    eval_size: int = described(512, "held-out problems, none of which occurs in training", ge=1)
    seed: int | None = described(None, "seed of the problems; none: the run's")
    question_pattern: str | None = described(
        None, "regular expression whose first group is the part of the question to use"
    )
    prompt: str = described("{question}", "prompt from {question}, {answer} and the generator's metadata")
    target: str = described("{answer}", "worked answer from the same fields, for the supervised warm start")
    answer_pattern: str | None = described(
        None, "regular expression; the first group of its last match in the completion is scored; none: all of it"
    )


class FileTask(Section):
    """Rows of jsonl or parquet files, or of a hub data set (extra `hub`)."""

    kind: Literal["file"] = "file"
    train: str = described(..., "path of a .jsonl or .parquet file, or hub:NAME[[:SUBSET]:SPLIT]")
    eval: str | None = described(None, "the same for held-out problems; none keeps `eval_size` rows of train apart")
    eval_size: int = described(512, "held-out rows (taken from train when eval is none)", ge=0)
    seed: int | None = described(None, "seed of the choice of held-out rows; none: the run's")
    prompt_field: str = described("prompt", "field with the question")
    answer_field: str | None = described("answer", "field with the reference answer; none when the reward needs none")
    target_field: str | None = described(
        None, "field with the worked answer, for the supervised warm start; none: answer_field"
    )
    chosen_field: str | None = described(
        None, "field with a preferred completion, or a list of them, for methods that train on given ones (dpo)"
    )
    rejected_field: str | None = described(None, "the same for completions that are not preferred")
    prompt: str = described("{prompt}", "prompt from the row's fields; {prompt} is prompt_field")
    answer_pattern: str | None = described(
        None, "regular expression whose first group is the final answer inside the field"
    )
    reward: str = described(
        "math",
        "math, exact, code, preferred, letter:<c>, entities, grounding, text_entropy, or module:function taking "
        "(completion, record)",
    )
    reward_options: dict[str, Any] = described({}, "options of the reward")


class CustomTask(Section):
    """A user's `module:function` that returns a jaxrl_llm.tasks.base.Task."""

    kind: Literal["custom"] = "custom"
    function: str = described(..., "module:function called with `options`, returning a Task")
    options: dict[str, Any] = described({}, "keyword arguments of the function")


Task = Annotated[GymTask | FileTask | CustomTask, Field(discriminator="kind")]


class RewardPart(Section):
    reward: str = described(
        ...,
        "math, exact, code, letter:<c>, entities, grounding:<measure>, text_entropy, judge, length_penalty, or "
        "module:function taking (completion, record)",
    )
    weight: float = described(1.0, "factor of this part in the total reward")
    options: dict[str, Any] = described({}, "options of the part")


class Judge(Section):
    url: str = described(..., "OpenAI-compatible endpoint, e.g. http://127.0.0.1:8000/v1")
    model: str = described(..., "model name to ask for")
    prompt: str = described("{prompt}\n\n{completion}\n\nScore from 0 to 1:", "the question put to the judge")
    pattern: str = described(r"([01](?:\.\d+)?)", "regular expression; the first group of its last match is the score")
    key_env: str = described("OPENAI_API_KEY", "environment variable with the key")
    concurrency: int = described(8, "requests in flight", ge=1)
    retries: int = described(3, "tries after the first", ge=0)
    timeout: float = described(60.0, "seconds per request", gt=0)
    cache: str | None = described(None, "jsonl file that keeps verdicts; none caches in memory")


class Rewards(Section):
    parts: list[RewardPart] = described([], "reward parts added to the task's own", max_length=16)
    workers: int = described(1, "worker processes; 0 scores in this process, without time limits", ge=0)
    timeout: float = described(
        10.0, "seconds a row may take before its worker is killed and the row left unscored", gt=0
    )
    judge: Judge | None = described(None, "judge for parts named `judge`")
    env: list[str] = described([], "environment variables that reward functions may see, besides PATH, HOME and locale")
    overlong_cache: int = described(0, "soft overlong penalty over the last this many tokens (DAPO); 0 off", ge=0)


class Rollout(Section):
    prompts: int = described(64, "prompts per step", ge=1)
    group_size: int = described(8, "completions per prompt", ge=1)
    max_prompt: int = described(64, "longest prompt in tokens", ge=1)
    max_new: int = described(64, "longest completion in tokens", ge=1)
    overlong: Literal["drop", "error"] = described("drop", "prompts over max_prompt: dropped and counted, or refused")
    temperature: float = described(1.0, "sampling temperature; the learner scores at it too", ge=0)
    top_k: int = described(0, "keep the k most likely tokens; 0 all", ge=0)
    top_p: float = described(1.0, "keep the smallest set with this mass", gt=0, le=1)
    min_p: float = described(0.0, "drop tokens below this share of the most likely one's probability", ge=0, lt=1)
    stop: list[str] = described([], "stop strings, besides the end-of-sequence ids", max_length=16)
    slots: int = described(0, "rows decoded at once; 0 chooses by device and number of completions", ge=0)
    dtype: Literal["same", "float32", "bfloat16"] = described("same", "compute dtype of generation")
    batch_invariant: bool = described(False, "one compiled size: bitwise replays, slower tails")


class Optimizer(Section):
    name: Literal["adamw", "sgd"] = described("adamw", "optimizer")
    lr: float = described(1e-6, "peak learning rate", ge=0)
    schedule: Literal["constant", "cosine", "linear"] = described("constant", "after warm-up")
    warmup: int = described(0, "optimizer steps of linear warm-up", ge=0)
    total: int | None = described(None, "optimizer steps until the schedule ends; none: those of the run")
    final: float = described(0.0, "learning rate at the end as a share of the peak", ge=0, le=1)
    b1: float = described(0.9, "first moment decay", ge=0, lt=1)
    b2: float = described(0.999, "second moment decay", ge=0, lt=1)
    eps: float = described(1e-8, "denominator floor", gt=0)
    weight_decay: float = described(0.0, "decoupled, on matrices only", ge=0)
    clip_norm: float = described(1.0, "global gradient norm limit; 0 off", ge=0)
    moment_dtype: Literal["float32", "bfloat16"] = described("float32", "dtype of the first moment")


class Importance(Section):
    mode: Literal["none", "truncate", "mask"] = described(
        "none", "sampler/learner mismatch weights exp(old_logp - sampler_logp)"
    )
    cap: float = described(2.0, "truncate: upper limit; mask: weights outside [1/cap, cap] become 0", gt=1)


class Learner(Section):
    epochs: int = described(1, "passes over a batch", ge=1)
    minibatches: int = described(1, "optimizer steps per pass", ge=1)
    microbatch_rows: int = described(0, "rows per forward/backward; 0: a whole minibatch, on a CPU 2,048 tokens", ge=0)
    old_logp: Literal["rescore", "sampler"] = described(
        "rescore",
        "old_logp from an extra forward of the learner, or the sampler's own (saves it; same numbers in float32)",
    )
    route: Literal["auto", "joint", "fused"] = described(
        "auto", "joint is exact for every loss; fused only for row or block coupling"
    )
    layout: Literal["padded", "packed", "shared"] = described(
        "shared", "how rows are executed; the gradient is the same. shared: a prompt once for all its completions"
    )
    importance: Importance = Importance()
    routing_replay: Literal["none", "old", "rollout"] = described(
        "none",
        "models with experts: updates use those a token went to in the old policy's forward (old), or in generation (rollout)",
    )
    max_nonfinite: int = described(5, "stop after this many skipped updates in a row", ge=1)


class Reference(Section):
    mode: Literal["none", "resident", "host"] = described("none", "where the frozen reference policy lives")
    sync_every: int = described(0, "copy the policy into the reference every this many steps; 0 never", ge=0)


class Guide(Section):
    path: str = described(
        ..., "Hugging Face directory of a frozen model built like the policy, such as another run's export"
    )


class WarmStartOptimizer(Optimizer):
    lr: float = described(1e-3, "peak learning rate", ge=0)


class WarmStart(Section):
    seconds: float | None = described(None, "wall-clock limit", gt=0)
    steps: int = described(0, "supervised steps on worked answers before RL; 0 none", ge=0)
    batch: int = described(64, "rows per step", ge=1)
    optimizer: WarmStartOptimizer = WarmStartOptimizer()
    until: float | None = described(None, "stop when held-out greedy accuracy reaches this", gt=0, le=1)
    eval_every: int = described(50, "steps between accuracy checks when `until` is set", ge=1)


class Eval(Section):
    every: int = described(0, "evaluate every this many steps; 0: only before and after", ge=0)
    size: int = described(512, "held-out problems", ge=0)
    k: list[int] = described([1], "pass@k and maj@k", min_length=1)
    samples: int = described(1, "completions per problem; at least max(k)", ge=1)
    temperature: float = described(0.0, "0: greedy", ge=0)


class Checkpoint(Section):
    dir: str | None = described(
        None,
        "directory that holds checkpoints instead of run.dir, which other processes then need not see: of a file system that "
        "all share, or gs://BUCKET/PATH (extra gcs)",
    )
    every: int = described(50, "steps between checkpoints; 0: only at the end and on signals", ge=0)
    keep: int = described(2, "latest checkpoints to keep", ge=1)
    keep_best: bool = described(False, "also keep the one with the best held-out score")
    export: bool = described(True, "write a Hugging Face directory at the end")


class Mesh(Section):
    dp: int = described(1, "data-parallel replicas; -1: the devices the others leave", ge=-1)
    fsdp: int = described(-1, "shards of parameters and batch; -1: the devices the others leave", ge=-1)
    tp: int = described(1, "tensor parallel", ge=-1)
    ep: int = described(1, "expert parallel", ge=-1)
    sp: int = described(1, "sequence parallel", ge=-1)


class Distributed(Section):
    coordinator: str | None = described(
        None,
        "HOST:PORT of process 0; auto: as the environment of a TPU, GKE, Slurm or Open MPI says; none: a single process",
    )
    processes: int | None = described(None, "number of processes; none with auto", ge=1)
    process: int | None = described(None, "number of this process, from 0; none with auto", ge=0)
    start_timeout: int = described(300, "seconds in which all processes must have started", ge=1)
    heartbeat_timeout: int = described(100, "seconds without a sign of life after which a process is dead", ge=1)
    wait_timeout: float = described(
        1800.0, "seconds a process waits on the host for another one, such as for rewards; the run ends then", gt=0
    )


class Config(Section):
    run: Run = Run()
    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    task: Task
    rewards: Rewards = Rewards()
    rollout: Rollout = Rollout()
    algorithm: dict[str, Any] = described({"name": "grpo"}, "name and the method's own fields (jaxrl_llm list NAME)")
    learner: Learner = Learner()
    optimizer: Optimizer = Optimizer()
    critic: Optimizer | None = described(None, "optimizer of the critic; none uses `optimizer`")
    reference: Reference = Reference()
    guide: Guide | None = described(None, "frozen model whose log-probs guide methods such as tgdpo")
    warmstart: WarmStart = WarmStart()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    mesh: Mesh = Mesh()
    distributed: Distributed = Distributed()
