"""Transform: run the passes on a captured graph."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile import _torch
from cpcompile.analysis.own_backward import enclose_backwards
from cpcompile.analysis.patterns.latent_heads import expansions_of
from cpcompile.balance.layout import follows_documents
from cpcompile.capture.faults import faults_of
from cpcompile.capture.token_inputs import find_token_dims
from cpcompile.choose.attention import AttentionSite, Ranks
from cpcompile.choose.attention_sites import (
    ATTENTION_LIKE,
    attention_nodes,
    attention_site,
    numbers_of_tokens,
    rewritten_attentions,
    rows_of_products,
    whole_attentions,
)
from cpcompile.choose.choice import Choice, choose
from cpcompile.choose.kernels import likely_kernel, refuse_unable_kernel
from cpcompile.choose.machine import Machine, this_machine
from cpcompile.compile.saved_results import keep_attention, keeps_result
from cpcompile.errors import CannotFollow, CPError, InputError, NoChunks, NoRule, where
from cpcompile.ir.annotation import annotate, annotation
from cpcompile.ir.operator_call import Call
from cpcompile.ir.parameter_shard import ParameterShard
from cpcompile.ir.plan import Plan, sequences_of
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.passes import (
    ANALYSIS,
    SHARDING,
    choose_strategies,
    chunk_losses,
    find_attention,
    recompute_blocks,
    separate_documents,
    tile_rows,
    unshard_parameters,
)
from cpcompile.passes.recompute_blocks import blocks_of, num_again

cp = torch.ops.cpcompile

# Why an attention cannot be computed from a latent.
NO_LATENT = {
    "latent": "nothing narrower than its keys and values determines these token by token",
    "latent_heads": "no latent determines its keys and values head by head, or the ranks do not divide its heads",
}


@dataclass(slots=True)
class Transformed:
    """A graph before and after the passes, with the decisions between.

    Attributes:
        original: the captured graph, untouched.
        analysed: the graph with its attentions found and their masks lifted; still a single-device program.
        graph: the graph of every rank.
        plan: the decisions that all passes shared.
        sequences: the sequence that each token input holds.
        choice: the layout and strategies that were chosen, with their estimated costs.
        changes: how many places each pass changed, and behind them how many layers became calls (`outline_layers`) and how many
            values wait in host memory (`move_to_host`).
        seconds: how long each took.
    """

    original: fx.GraphModule
    analysed: fx.GraphModule
    graph: fx.GraphModule
    plan: Plan
    sequences: dict[str, int]
    choice: Choice
    changes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[Count]:
        """Note the time of what runs inside, and the places that it changed."""
        count, start = Count(), time.perf_counter()
        yield count
        self.changes[name] = count.places
        self.seconds[name] = time.perf_counter() - start


@dataclass(slots=True)
class Count:
    """How many places were changed."""

    places: int = 0


Watcher = Callable[[str, fx.GraphModule, int], None]
_log = logging.getLogger(__name__)
_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers of passes", default=())


@faults_of("the transformation")
def transform(
    captured: fx.GraphModule,
    *,
    config: Config,
    axis: Axis,
    inputs: Mapping[str, str],
    shards: Mapping[str, ParameterShard] | None = None,
    machine: Machine | None = None,
) -> Transformed:
    """Make the captured graph context parallel.

    Args:
        captured: the pre-dispatch ATen graph; it is edited.
        config: the user's options.
        axis: the ranks that share each sequence.
        inputs: the user's argument name for each placeholder that is an input of the model.
        shards: how FSDP shards each placeholder that is a parameter which it shards.
        machine: what costs are estimated for; by default this one.

    Raises:
        CPError: the graph cannot be sharded exactly.
    """
    original = program_of(captured)
    name_origins(captured)
    changes: dict[str, int] = {}
    times: dict[str, float] = {}
    token_dims = token_inputs(captured, config, inputs)
    for analysis in ANALYSIS:
        options = {"exact_dropout": config.exact_dropout} if analysis is find_attention else {}
        run_pass(captured, analysis, changes, times, **options)
    if config.documents:
        told = {
            "source": config.documents,
            "masks_labels": config.mask_labels,
            "token_local": tuple(config.token_local),
        }
        run_pass(captured, separate_documents, changes, times, token_dims=token_dims, inputs=inputs, **told)
        original = program_of(captured)
        name_origins(captured)
    analysed = copy.deepcopy(captured)
    numbers = numbers_of_tokens(captured, inputs) if not token_dims else []
    on = machine or this_machine()
    ranks = Ranks(axis.world_size, axis.inner_size, config.heads_per_message, config.transport, on)
    sites = [attention_site(node, likely_kernel(node, config.kernel)) for node in attention_nodes(captured)]
    if config.strategy in ("auto", "latent", "latent_heads"):
        found = expansions_of(attention_nodes(captured), token_dims)
        sites = [replace(site, latent=latent) for site, latent in zip(sites, found, strict=True)]
    sites = with_recomputation(captured, sites, config)
    choice = choose(sites, config.strategy, config.balancer, ranks)
    warn_of_other_strategies(captured, sites, choice, config.strategy, ranks)
    plan = Plan(
        world_size=axis.world_size,
        group=axis.group,
        layout=choice.layout,
        token_dims=token_dims,
        outputs=config.outputs,
        gradient_scale=float(axis.world_size) if config.grad_sync == "mean" else 1.0,
        exact_dropout=config.exact_dropout,
        strict=config.strict,
        token_local=tuple(config.token_local),
        num_tokens=numbers[0] if numbers else 0,
        kernel=config.kernel,
        heads_per_message=config.heads_per_message,
        inner_size=axis.inner_size,
        inner_group=axis.inner_group,
        outer_group=axis.outer_group,
    )
    try:
        shard_graph(captured, choice, plan, changes, times)
        is_followed = config.balancer != "auto" or not deals_in_chunks(captured)
    except (CannotFollow, NoRule) as error:
        is_followed = False
        may_be_the_layout = follows_documents(choice.layout) or isinstance(error, NoChunks)
        if config.balancer != "auto" or not may_be_the_layout:
            raise
    if not is_followed:
        choice = choose(sites, config.strategy, config.balancer, ranks, follow=False)
        captured, plan = copy.deepcopy(analysed), replace(plan, layout=choice.layout)
        shard_graph(captured, choice, plan, changes, times)
    for number in numbers[1:]:
        if is_sharded(captured):
            break
        captured, plan = copy.deepcopy(analysed), replace(plan, num_tokens=number)
        shard_graph(captured, choice, plan, changes, times)
    if config.loss_chunk:
        may_defer = config.logits == "auto" and config.outputs == "local" and torch.is_grad_enabled()
        chunks = {"chunk": config.loss_chunk, "may_return_logits": may_defer, "provider": config.loss_provider}
        run_pass(captured, chunk_losses, changes, times, **chunks)
    if config.tile:
        run_pass(captured, tile_rows, changes, times, tile=config.tile)
    if config.memory_budget < 1:
        run_pass(captured, recompute_blocks, changes, times, memory_budget=config.memory_budget)
    keep_attention(captured.graph, keeps_all=not config.recompute_attention)
    if shards:
        run_pass(captured, unshard_parameters, changes, times, shards=shards)
    captured.graph.eliminate_dead_code()
    captured.recompile()
    warn_of_rows(captured, config.strategy)
    warn_of_whole_attentions(captured, config.strict)
    if config.kernel != "auto":
        refuse_unable_kernel(rewritten_attentions(captured), config.kernel)
    check_legal(captured, config.strict)
    return Transformed(original, analysed, captured, plan, sequences_of(captured, plan), choice, changes, times)


def deals_in_chunks(gm: fx.GraphModule) -> bool:
    """Tell whether tokens travel because the layout follows documents and an operator needs equal chunks."""
    rearranged = gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.rearrange_tokens.default)
    return any(Call.of(node)["wanted_layout"] for node in rearranged)


def with_recomputation(gm: fx.GraphModule, sites: Sequence[AttentionSite], config: Config) -> list[AttentionSite]:
    """Return the attentions with what backward will exchange or compute of them again: of checkpoints, and of the budget."""
    blocks = blocks_of(gm) if config.memory_budget < 1 else {}
    budgeted = {x for nodes in list(blocks.values())[: num_again(config.memory_budget, len(blocks))] for x in nodes}
    found = []
    for node, site in zip(attention_nodes(gm), sites, strict=True):
        if node in budgeted or node.meta.get("recompute") is CheckpointPolicy.PREFER_RECOMPUTE:
            is_kept = keeps_result(node, keeps_all=not config.recompute_attention)
            site = replace(site, keeps_heads=not is_kept, runs_again=not is_kept)
        found.append(site)
    return found


def program_of(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph of one device that runs and computes gradients."""
    program = copy.deepcopy(gm)
    enclose_backwards(program)
    return program


def name_origins(gm: fx.GraphModule) -> None:
    """Let every node be compared with the node of the same name in a copy of the graph as it is."""
    for node in gm.graph.nodes:
        annotate(node, origin=node.name)


def shard_graph(
    gm: fx.GraphModule, choice: Choice, plan: Plan, changes: dict[str, int], times: dict[str, float]
) -> None:
    """Go from one device to the ranks of an axis."""
    run_pass(gm, choose_strategies, changes, times, strategies=choice.strategies, kernel=plan.kernel)
    for sharding in SHARDING:
        run_pass(gm, sharding, changes, times, plan=plan)


def run_pass(
    gm: fx.GraphModule,
    function: Callable[..., int],
    changes: dict[str, int],
    times: dict[str, float],
    **config: Any,
) -> None:
    """Run one pass with the chores around it: counts and times, and of a graph that it changed dead code, lint and recompile.

    Dead code goes while no pass keeps nodes.
    """
    start, num_nodes = time.perf_counter(), len(gm.graph.nodes)
    with faults_of(f"the pass {function.__name__}"):
        try:
            changes[function.__name__] = function(gm, **config)
        except CPError as error:
            error.see(f"passes.md#{function.__name__}")
            raise
    # The first one also clears what the capture left.
    if changes[function.__name__] or len(gm.graph.nodes) != num_nodes or function is ANALYSIS[0]:
        if function in ANALYSIS or function is separate_documents:
            gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    times[function.__name__] = time.perf_counter() - start
    name, places = function.__name__, changes[function.__name__]
    _log.debug("pass %s changed %d places in %.0f ms", name, places, times[name] * 1e3)
    if places:
        _torch.trace_artifact(f"cpcompile_after_{name}", lambda: gm.print_readable(print_output=False))
    for see in _WATCHERS.get():
        see(name, gm, places)


@contextlib.contextmanager
def watching_passes(see: Watcher) -> Iterator[None]:
    """Call `see` with the name of each pass inside, the graph that it left, and how many places it changed."""
    token = _WATCHERS.set((*_WATCHERS.get(), see))
    try:
        yield
    finally:
        _WATCHERS.reset(token)


def warn_of_other_strategies(
    gm: fx.GraphModule, sites: Sequence[AttentionSite], choice: Choice, asked: str, ranks: Ranks
) -> None:
    """Say, once, which attentions cannot be computed as asked, and why."""
    others: dict[str, list[fx.Node]] = {}
    for node, site, strategy in zip(attention_nodes(gm), sites, choice.strategies, strict=True):
        if asked not in ("auto", strategy):
            obstacle = site.obstacle(asked, ranks)
            others.setdefault(obstacle.reason if obstacle else NO_LATENT[asked], []).append(node)
    for reason, nodes in others.items():
        warn_of_gathers(nodes, asked, reason)


def warn_of_rows(gm: fx.GraphModule, asked: str) -> None:
    """Say, once, which attentions gather their keys although another strategy was asked for."""
    gathers = gm.graph.find_nodes(op="call_function", target=cp.gather_attention.default)
    others = [node for node in gathers if annotation(node).strategy == asked != "gather"]
    warn_of_gathers(others, asked, "each rank computes the rows of its mask for its own queries only")


def warn_of_whole_attentions(gm: fx.GraphModule, strict: bool) -> None:
    """Say, once, which attentions every rank computes whole, so that nothing is gained by the ranks.

    In strict mode these never meet the tokens (images beside a text): the log says so. Otherwise, they may have been gathered.
    """
    whole = whole_attentions(gm)
    if not whole:
        return
    lines = "\n".join(where(node) for node in whole)
    said = f"{len(whole)} attention(s) run whole on every rank, since what they read is not sharded along its tokens"
    if strict:
        _log.warning("%s.\n%s", said, lines)
    else:
        warnings.warn(f"{said} (strict=False allows it).\n{lines}", stacklevel=3)


def warn_of_gathers(nodes: list[fx.Node], asked: str, reason: str) -> None:
    """Warn that attentions use gather in place of what was asked for, if there are any."""
    if nodes:
        lines = "\n".join(where(node) for node in nodes)
        warnings.warn(f"{len(nodes)} attention(s) use gather in place of {asked}: {reason}.\n{lines}", stacklevel=3)


def token_inputs(gm: fx.GraphModule, config: Config, inputs: Mapping[str, str]) -> dict[str, int]:
    """Return the token dims of the inputs; none for a model that makes its tokens itself."""
    try:
        return find_token_dims(gm, inputs, config.token_dims)
    except InputError:
        makes_tokens = any(node.target in ATTENTION_LIKE for node in gm.graph.nodes)
        makes_tokens = makes_tokens or bool(rows_of_products(gm, inputs))
        if config.token_dims or (config.strict and not makes_tokens):
            raise
        return {}


def is_sharded(gm: fx.GraphModule) -> bool:
    """Tell whether any operator runs on local tokens."""
    return bool(gm.graph.find_nodes(op="call_function", target=cp.shard_tokens.default))


def check_legal(gm: fx.GraphModule, strict: bool) -> None:
    """Check what every transformed graph must satisfy; warn when every rank computes the whole model.

    Raises:
        CPError: no attention or other operator runs on local tokens.
    """
    if is_sharded(gm):
        return
    (output,) = gm.graph.find_nodes(op="output")
    if strict and not output.all_input_nodes:
        raise CPError("the model returns no tensor, so that there is nothing to shard: return the loss or the logits.")
    nothing = "nothing in this model could be sharded: no embedding or product meets an input with tokens."
    if strict:
        raise CPError(f"{nothing} Name the inputs and the dims of their tokens with token_dims={{'name': dim}}.")
    warnings.warn(f"{nothing} Every rank computes the whole model.", stacklevel=2)
