"""The private parts of torch that cpcompile needs, each behind one function. Checked on torch 2.11 to 2.14.

In: values of torch. Out: what its public interface does not say or do. May import nothing of cpcompile.
"""

from cpcompile._torch.autograd import CustomOpDef, assert_on_device, backward_number, recording_gradients, run_backward
from cpcompile._torch.checkpoints import NoPolicyError, Policy, PolicyFailedError
from cpcompile._torch.data_parallel import bytes_of_buckets
from cpcompile._torch.distributed import (
    SymmetricMemory,
    Work,
    all_reduce_together,
    group_names,
    group_store,
    resolve_group,
    shares_gpus,
    twin_group,
)
from cpcompile._torch.division import divide
from cpcompile._torch.dynamo import (
    CONTROL_FLOW,
    DATA_DEPENDENT,
    break_frames,
    dynamo_break_reason,
    forget_dynamic,
    global_hooks,
    guard_on_hooks,
    has_backward_hooks,
    is_new_leaf,
    recompilation_reason,
    source_name,
    tracing_one_graph,
    when_tracing,
)
from cpcompile._torch.flight_recorder import unfinished_collectives
from cpcompile._torch.functorch import TransformError
from cpcompile._torch.inductor import (
    cache_folder,
    compile_by_rows,
    floating_point_operations,
    inner_compiler,
    known_options,
    option_fits,
    options_of_mode,
    trace_for_inductor,
)
from cpcompile._torch.joint_graph import HalvesPass, JointPass, is_computed_again
from cpcompile._torch.known_values import known_value, known_values
from cpcompile._torch.layer_marks import BACKWARD, LayerMarks
from cpcompile._torch.modules import holdings, inner_tensors, num_writes
from cpcompile._torch.overlap import OverlapPass
from cpcompile._torch.own_backward import is_own_function
from cpcompile._torch.repeated_calls import rename_sizes
from cpcompile._torch.trace import is_profiled, trace_artifact
from cpcompile._torch.tracing import (
    fake_inputs,
    fake_static_input,
    is_data,
    is_only_traced,
    quiet_fake_tensors,
    symbolic_operators,
    this_compilation,
    trace_pre_dispatch,
    trial_on_fake_tensors,
)

__all__ = [
    "BACKWARD",
    "CONTROL_FLOW",
    "DATA_DEPENDENT",
    "CustomOpDef",
    "HalvesPass",
    "JointPass",
    "LayerMarks",
    "NoPolicyError",
    "OverlapPass",
    "Policy",
    "PolicyFailedError",
    "SymmetricMemory",
    "TransformError",
    "Work",
    "all_reduce_together",
    "assert_on_device",
    "backward_number",
    "break_frames",
    "bytes_of_buckets",
    "cache_folder",
    "compile_by_rows",
    "divide",
    "dynamo_break_reason",
    "fake_inputs",
    "fake_static_input",
    "floating_point_operations",
    "forget_dynamic",
    "global_hooks",
    "group_names",
    "group_store",
    "guard_on_hooks",
    "has_backward_hooks",
    "holdings",
    "inner_compiler",
    "inner_tensors",
    "is_computed_again",
    "is_data",
    "is_new_leaf",
    "is_only_traced",
    "is_own_function",
    "is_profiled",
    "known_options",
    "known_value",
    "known_values",
    "num_writes",
    "option_fits",
    "options_of_mode",
    "quiet_fake_tensors",
    "recompilation_reason",
    "recording_gradients",
    "rename_sizes",
    "resolve_group",
    "run_backward",
    "shares_gpus",
    "source_name",
    "symbolic_operators",
    "this_compilation",
    "trace_artifact",
    "trace_for_inductor",
    "trace_pre_dispatch",
    "tracing_one_graph",
    "trial_on_fake_tensors",
    "twin_group",
    "unfinished_collectives",
    "when_tracing",
]
