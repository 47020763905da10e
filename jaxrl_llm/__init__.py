"""RL post-training of language models in JAX/Flax.

Importing this package imports nothing heavy; take what you need from its modules:
`jaxrl_llm.algorithms` (the methods), `jaxrl_llm.objectives` and `jaxrl_llm.advantages` (pure functions of arrays).
"""

__version__ = "0.1.0"
