"""`tinyllm plan`: what a run will take and give, which run to make, and the law of runs made before."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyllm.backend import use_backend
from tinyllm.cli.flags import given_flags, number
from tinyllm.cli.train import SECTIONS, add_settings, resolve
from tinyllm.models import ModelConfig
from tinyllm.system.cores import physical_cores
from tinyllm.system.errors import InputError
from tinyllm.system.progress import duration
from tinyllm.system.wording import command_line, counted
from tinyllm.training import fitted_runs, planning
from tinyllm.training.config import TrainConfig
from tinyllm.training.counts import architecture_of
from tinyllm.training.memory import require_memory
from tinyllm.training.scaling import BESIROGLU, CHARACTERS_PER_LAW_TOKEN, Fit
from tinyllm.training.text_size import TextSize, text_size

SECONDS = 8.0
PROPOSED = (
    "--num-layers", "--num-heads", "--num-kv-heads", "--hidden-size", "--intermediate-size", "--head-dim", "--steps",
    "--warmup-steps",
)  # fmt: skip
UNKNOWN_VOCABULARY = {"char": 128, "byte": 256}


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `plan` to the commands of a parser."""
    parser = commands.add_parser(
        "plan",
        help="say what a run will take, propose one for a budget, or fit a scaling law",
        description="Measure this machine for some seconds and say what a run with these settings of `train` takes and "
        "what loss to expect; with --hours or --flops: which model and how many tokens make the most of them. "
        "`plan fit RUN...` fits a scaling law to runs.",
        allow_abbrev=False,
    )
    add_settings(parser)
    parser.add_argument("--hours", type=number, help="propose a model and tokens for so many hours")
    parser.add_argument("--flops", type=number, help="propose a model and tokens for so many FLOPs")
    parser.add_argument(
        "--law", metavar="FILE", help="the law of your own runs, which `plan fit --json` has written"
    )
    parser.add_argument(
        "--seconds", type=number, default=SECONDS, help=f"time to measure steps (default: {SECONDS:g})"
    )
    parser.set_defaults(command=plan_command, parser=parser)
    more = parser.add_subparsers(title="commands", metavar="fit")
    fit = more.add_parser("fit", help="fit a scaling law to runs", allow_abbrev=False)
    fit.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of runs, or .jsonl files with N, D, loss"
    )
    fit.add_argument("--json", metavar="FILE", help="keep the law, for --law")
    fit.add_argument("--out", metavar="PNG", help="draw it; needs matplotlib")
    fit.set_defaults(command=fit_command, parser=fit)


def fit_command(args: argparse.Namespace) -> None:
    """`tinyllm plan fit`."""
    if args.out is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--out needs matplotlib; install it with: pip install 'tinyllm-numpy[plot]'")
    runs, left_out = fitted_runs.read_runs(args.runs)
    fit = fitted_runs.fit_runs(runs)
    if args.json is not None:
        fitted_runs.write_fit(Path(args.json), fit)
    if args.out is not None:
        fitted_runs.draw_fit(Path(args.out), fit, runs)
    print(*left_out, *fitted_runs.in_words(fit, runs), sep="\n")


def plan_command(args: argparse.Namespace) -> None:
    """`tinyllm plan`."""
    for name in ("hours", "flops", "seconds"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} must be above 0 and finite, got {value:g}")
    if args.hours is not None and args.flops is not None:
        raise InputError("got --hours and --flops; give one of them")
    fit = None if args.law is None else fitted_runs.read_fit(Path(args.law))
    args.resume = args.overwrite = False
    model, train = resolve(args)
    use_backend(train.backend, train.precision, train.device_memory)
    text = text_size(model, train) if train.data else None
    if text is not None:
        model = replace(model, vocab_size=model.vocab_size or text.vocab_size)
    elif model.vocab_size == 0:
        model = replace(model, vocab_size=UNKNOWN_VOCABULARY.get(train.tokenizer, 4096))
    if args.hours is None and args.flops is None:
        require_memory(model, train, train.threads or physical_cores())
        print(*describe(model, train, text, fit, args.seconds), sep="\n")
        return
    _propose(args, model, train, text, fit)


def _propose(
    args: argparse.Namespace, model: ModelConfig, train: TrainConfig, text: TextSize | None, fit: Fit | None
) -> None:
    """Print the best models for a budget, and the command that makes the first."""
    law = BESIROGLU if fit is None else fit.law
    proposals: list[planning.Proposal] = []
    rate = 0.0
    # The rate grows with the size of the model, so that of the first proposal is measured too.
    for measured_model in (planning.family(model)[3], None):
        chosen = measured_model or proposals[0].model
        measured = planning.measure(chosen, train, args.seconds / 2)
        rate = planning.flops_a_second(chosen, train, measured)
        proposals = planning.propose(model, train, rate, text, args.hours, args.flops, law)
    best = proposals[0]
    print(f"{rate / 1e9:,.1f} GFLOP/s in such steps here; {duration(best.seconds)} of steps are enough for:")
    for proposal in sorted(proposals[:4], key=lambda proposal: proposal.model.num_parameters):
        N = architecture_of(proposal.model).weights_in_products
        D = proposal.train.steps * planning.tokens_a_step(proposal.model, proposal.train)
        print(
            f"  width {proposal.model.hidden_size:>4}, {proposal.model.num_layers:>2} blocks, {N:>12,} weights, "
            f"{D:>14,} tokens, {D / N:8.1f} a weight{'   <- best by the law' if proposal is best else ''}"
        )
    print(*_learning(best.model, best.train, text, fit), sep="\n")
    print(command_line("train", *_given(args), *planning.as_flags(best.model, best.train)))


def _given(args: argparse.Namespace) -> list[str]:
    """The flags of settings that were given, but for those that a proposal sets."""
    words = ["--preset", args.preset, *(["--config", args.config] if args.config else [])]
    for name, value in [item for config in SECTIONS.values() for item in given_flags(args, config).items()]:
        flag = "--" + name.replace("_", "-")
        if flag in PROPOSED:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words += [flag, "none" if value is None else str(value)]
    return words


def describe(
    model: ModelConfig, train: TrainConfig, text: TextSize | None, fit: Fit | None, seconds: float
) -> list[str]:
    """What a run takes and gives, line by line, after measuring it."""
    measured = planning.measure(model, train, seconds)
    costs = planning.costs(model, train, measured, text)
    step = planning.tokens_a_step(model, train)
    others = "" if text else ", evaluations besides (no --data)"
    return [
        f"{model.num_parameters:,} parameters; a step of {step:,} tokens takes {measured.step:.3g} s, "
        f"{step / measured.step:,.0f} tokens/s",
        f"time: about {duration(costs.seconds)}: {train.steps:,} steps {duration(costs.training)}, "
        f"{counted(costs.num_evaluations, 'evaluation')} {duration(costs.evaluations)}, "
        f"{costs.num_checkpoints} checkpoints {duration(costs.checkpoints)}{others}",
        f"memory: about {_size(costs.memory)}, {'measured' if measured.memory is not None else 'estimated'}",
        f"disk: about {_size(costs.disk)}",
        *_learning(model, train, text, fit),
    ]


def _learning(model: ModelConfig, train: TrainConfig, text: TextSize | None, fit: Fit | None) -> list[str]:
    """Tokens, passes, overfitting and the loss to expect."""
    N = architecture_of(model).weights_in_products
    D = train.steps * planning.tokens_a_step(model, train)
    lines = [f"tokens: {D:,}, {D / N:.3g} for each of {N:,} weights in products"]
    unique, ratio = D, CHARACTERS_PER_LAW_TOKEN
    if text is None:
        lines.append("passes: the text is not known (no --data); taken for so much that none is seen twice")
    else:
        unique, ratio = max(1, text.train_tokens), text.characters_per_token
        first, surely = planning.overfitting_passes(N, unique)
        about = "" if text.exact else "about "
        passes = D / unique
        when = "not before the end" if passes <= first else "before the end"
        lines.append(
            f"passes: {passes:.2f} over {about}{unique:,} tokens; with such a model on this text overfitting is to be "
            f"expected after {first:.1f} passes, surely after {surely:.1f}: {when}"
        )
    expected = planning.expected_loss(N, D, min(unique, D), model.vocab_size, ratio, fit)
    if expected is None:
        lines.append(
            "loss: the published laws, fitted to models of 44 million parameters and more, say nothing of a run so "
            f"small; `{command_line('plan', 'fit')}` fits a law to your own small runs"
        )
    else:
        lines.append(
            f"loss: about {expected.loss:.2f} nats a token, {expected.low:.2f} to {expected.high:.2f}, by "
            f"{expected.basis}; it depends on the text and the tokenizer"
        )
    return lines


def _size(number: int) -> str:
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{-(-number // 2**20)} MiB"
