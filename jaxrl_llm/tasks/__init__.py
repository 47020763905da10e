"""Where prompts and rewards come from. Nothing here imports jax: reward workers start in a moment."""

from jaxrl_llm.config import CustomTask, FileTask, GymTask, Rewards
from jaxrl_llm.tasks.base import RewardSpec, Task, reward_name


def load(
    task: CustomTask | FileTask | GymTask, rewards: Rewards | None = None, seed: int = 0, max_new: int = 0
) -> Task:
    """The problems of a config and every part of their reward: the task's own, then those of `rewards`.

    Args:
      seed: of the problems generated or held out, unless the task names its own.
      max_new: longest completion in tokens, which rewards of length refer to.
    Raises ValueError, in one line, for whatever the config gets wrong.
    """
    from jaxrl_llm.tasks import files, gym

    if isinstance(task, CustomTask):
        loaded = files.custom(task)
    else:
        seed = seed if task.seed is None else task.seed
        loaded = gym.load(task, seed) if isinstance(task, GymTask) else files.load(task, seed)
    shared = {r["prompt"] for r in loaded.train} & {r["prompt"] for r in loaded.eval}
    if shared:
        raise ValueError(f"task: {loaded.name} has {len(shared)} prompts both in train and in eval, expected none")
    parts = loaded.rewards + _extra_parts(rewards or Rewards(), max_new)
    names = [p.name for p in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards.parts: {names} name a part twice, expected different ones")
    programs = [p for p in parts if p.spec == "code"]
    if programs:
        from jaxrl_llm.tasks import code

        for name, records in (("train", loaded.train), ("eval", loaded.eval)):
            for i, record in enumerate(records):
                code.check_problem(record, f"task: {name} problem {i + 1}")
        for part in programs:  # a machine without a sandbox is found out now, not after the first rollout
            code.code(**part.options)
    return loaded._replace(rewards=parts)


def _extra_parts(rewards: Rewards, max_new: int) -> tuple[RewardSpec, ...]:
    parts = []
    for part in rewards.parts:
        options = dict(part.options)
        if part.reward == "judge":
            if rewards.judge is None:
                raise ValueError(
                    "rewards.judge: is missing, expected a section with url and model for the part `judge`"
                )
            options = rewards.judge.model_dump() | options
        elif part.reward == "length_penalty":
            options = {"max_new": max_new} | options
        parts.append(RewardSpec(reward_name(part.reward), part.reward, part.weight, options))
    if rewards.overlong_cache:
        parts.append(RewardSpec("overlong", "overlong", 1.0, {"max_new": max_new, "cache": rewards.overlong_cache}))
    return tuple(parts)
