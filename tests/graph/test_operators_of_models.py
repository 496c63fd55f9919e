"""Every operator that the models of transformers call has a rule, or a reason why it has none."""

from __future__ import annotations

import pytest
import torch

from cpcompile.capture.writes.functional import functional_form
from cpcompile.rules import REASONS, RULES

aten = torch.ops.aten
# Those in the graphs of 209 architectures, before dispatch. Without tensor operands there is nothing to place.
OPERATORS = """
__and__.Tensor __or__.Tensor _assert_scalar.default _assert_tensor_metadata.default _is_all_true.default
_upsample_bilinear2d_aa.vec _weight_norm.default abs.default adaptive_avg_pool1d.default add.Tensor add_.Tensor
addmm.default alias.default amax.default arange.default arange.start arange.start_step argmax.default argsort.default
avg_pool2d.default baddbmm.default batch_norm.default bitwise_not.default bmm.default broadcast_to.default cat.default
chunk.default clamp.Tensor clamp.default clamp_.default clamp_min.default clone.default concat.default
concatenate.default contiguous.default conv1d.default conv2d.default conv2d.padding conv3d.default copy_.default
cos.default cross_entropy_loss.default cumsum.default detach.default detach_.default diff.default div.Tensor
div.Tensor_mode div_.Tensor dropout.default einsum.default embedding.default empty.memory_format empty_like.default
eq.Scalar eq.Tensor erf.default exp.default expand.default expand_as.default expm1.default exponential_.default
eye.default feature_dropout.default fft_fftn.default fill_.Scalar fill_.Tensor flatten.using_ints flip.default
floor.default floor_divide.default full.default full_like.default gather.default ge.Scalar ge.Tensor gelu.default
glu.default gt.Scalar gt.Tensor histc.default im2col.default index.Tensor index_add.default index_put_.default
index_select.default item.default layer_norm.default le.Scalar le.Tensor lift_fresh_copy.default
linalg_vector_norm.default linear.default log.default log1p.default log_sigmoid.default log_softmax.int
logical_and.default logical_not.default logical_or.default logsumexp.default lt.Scalar lt.Tensor masked_fill.Scalar
masked_fill.Tensor masked_fill_.Scalar masked_scatter.default matmul.default max.default max.dim max.other
max_pool2d.default maximum.default mean.dim meshgrid.indexing min.other minimum.default mul.Tensor mul_.Tensor
multiply.Tensor ne.Scalar ne.Tensor neg.default new_empty.default new_full.default new_ones.default new_zeros.default
nll_loss_nd.default numpy_T.default ones.default ones_like.default pad.default permute.default polar.default
pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor rand.default rand_like.default randn.default real.default
reciprocal.default relu.default remainder.Scalar repeat.default repeat_interleave.self_int reshape.default
reshape_as.default rms_norm.default rsqrt.default rsub.Scalar scalar_tensor.default
scaled_dot_product_attention.default scatter.value scatter_.src scatter_.value select.int sigmoid.default silu.default
sin.default slice.Tensor softmax.int softplus.default sort.default split.Tensor split_with_sizes.default sqrt.default
square.default squeeze.default squeeze.dim stack.default sub.Tensor sum.default sum.dim_IntList t.default tanh.default
tile.default to.device to.dtype to.dtype_layout topk.default transpose.int tril.default triu.default type_as.default
unbind.int unflatten.int unfold.default uniform_.default unsqueeze.default unsqueeze_.default view.default
view_as.default view_as_complex.default view_as_real.default where.Scalar where.ScalarOther where.ScalarSelf
where.self zeros.default zeros_like.default
"""
# Passes remove these, or put others in their place, before tokens are placed.
REMOVED = (
    aten._assert_tensor_metadata.default,
    aten.detach_.default,
    aten.fft_fftn.default,
    aten.scaled_dot_product_attention.default,
)


def forms_of(name: str) -> set[torch._ops.OpOverload]:
    """Return the operator and, of one that writes, the operator that takes its place."""
    packet, _, overload = name.partition(".")
    target = getattr(getattr(aten, packet), overload)
    form = functional_form(target) if target._schema.is_mutable else None
    return {target} if form is None else {target, form}


def reads_tensors(target: torch._ops.OpOverload) -> bool:
    return any("Tensor" in str(argument.type) for argument in target._schema.arguments)


@pytest.mark.parametrize("name", OPERATORS.split())
def test_has_a_rule_or_a_reason(name: str) -> None:
    forms = forms_of(name)
    is_known = any(form in RULES or form in REASONS or form in REMOVED for form in forms)
    assert is_known or not any(reads_tensors(form) for form in forms)
