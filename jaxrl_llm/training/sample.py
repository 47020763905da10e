"""`jaxrl_llm sample`: complete one prompt with a run's model."""

from jaxrl_llm.config import Config
from jaxrl_llm.training import build
from jaxrl_llm.training.evaluate import model_directory


def run(config: Config, prompt: str, *, n: int = 1, path: str | None = None, greedy: bool = False) -> list[str]:
    """`n` completions of `prompt` (inside the chat template when that is on), with the config's sampling settings.

    Args:
      path: a Hugging Face directory; else what the run in `run.dir` exported, else `model.path`.
    Raises ValueError when there is no model, or the prompt is longer than `rollout.max_prompt`.
    """
    if n < 1:
        raise ValueError(f"-n {n}: expected at least 1")
    model = config.model.model_copy(update={"path": model_directory(config, path), "spec": None})
    config = config.model_copy(update={"model": model})
    words, mesh = build.text(config), build.mesh(config)
    tokens = words.encode_prompt(prompt)
    if len(tokens) > config.rollout.max_prompt:
        raise ValueError(
            f"rollout.max_prompt={config.rollout.max_prompt}: the prompt has {len(tokens)} tokens, expected a larger limit"
        )
    spec, params = build.model(config, mesh, words)
    engine = build.engine(config, spec, mesh, words, slots=0)
    engine.set_weights(params, 0)
    temperature = 0.0 if greedy else None
    (completions,) = engine.generate([tokens], [n], seed=config.run.seed, step=0, temperature=temperature)
    return [words.decode(c.tokens) for c in completions]
