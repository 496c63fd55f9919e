"""What all tests share."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

# Scripts and ranks that tests start: tensors are small, and the workers of pytest have the cores. Where Triton is installed, each
# process that imports Inductor would start others that wait for kernels to compile, and import torch first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_WARM_POOL", "0")

from tests.gloo.pool import Pool

GLOO = Path(__file__).parent / "gloo"
# Of tests with many cases, one in so many runs by default, the same ones each time; the others are marked slow.
SAMPLED = {
    "gloo/test_apply.py::test_ahead_of_time_autograd": 3,
    "gloo/test_apply.py::test_logits_are_local_or_whole": 6,
    "gloo/test_apply.py::test_operators_along_the_tokens": 4,
    "gloo/test_apply.py::test_trains_exactly": 6,
    "gloo/test_apply.py::test_transformers_train_exactly": 2,
    "gloo/test_attention.py::test_documents_dealt_to_groups_equal_the_whole_attention": 6,
    "gloo/test_attention.py::test_equals_the_whole_attention": 8,
    "gloo/test_attention.py::test_usp_equals_the_whole_attention": 6,
    "gloo/test_attention_terms.py::test_terms_of_models": 6,
    "gloo/test_checkpoints.py::test_checkpoint_wrapper": 6,
    "gloo/test_compat_axolotl.py::test_loss_and_gradients": 8,
    "gloo/test_dropout.py::test_compiler_and_checkpoint_do_not_matter": 6,
    "gloo/test_dropout.py::test_exact_dropout_with_every_compiler_and_checkpoint": 6,
    "gloo/test_hooks.py::test_hooks_of_parameters_see_the_gradients_of_one_device": 8,
    "gloo/test_integrations.py::test_trainer": 2,
    "gloo/test_packed.py::test_mixes_of_documents": 6,
    "gloo/test_wrappers.py::test_is_found_in_a_wrapper": 3,
    "graph/test_along_tokens.py::test_exact": 16,
    "graph/test_attention_forms.py::test_a_wrong_attention_is_named_by_its_own_line": 6,
    "graph/test_attention_forms.py::test_forms_are_exact": 4,
    "graph/test_attention_on_ranges.py::test_exact": 6,
    "graph/test_capture.py::test_a_mask_made_by_vmap_is_exact": 4,
    "graph/test_chunked_losses.py::test_every_spelling_is_exact": 8,
    "graph/test_cut_hidden_rows.py::test_every_spelling": 6,
    "graph/test_cut_hidden_rows.py::test_every_strategy": 2,
    "graph/test_dropout.py::test_exact_dropout_keeps_numerics": 4,
    "graph/test_flex.py::test_mask_mods": 4,
    "graph/test_forms_of_attention.py::test_forms_are_exact_on_ranks": 2,
    "graph/test_functionalise_writes.py::test_replaces_writes_and_keeps_values_and_gradients": 4,
    "graph/test_gather_latents.py::test_keeps_numerics": 4,
    "graph/test_lift_masks.py::test_models_keep_their_numerics_without_a_dense_mask": 4,
    "graph/test_mask_spellings.py::test_a_near_miss_stays_dense_and_exact": 4,
    "graph/test_mask_spellings.py::test_operators_that_masks_are_written_with": 4,
    "graph/test_masked_scatter.py::test_images_among_words_are_exact": 6,
    "graph/test_masks.py::test_every_spelling_of_causal_as_a_float": 4,
    "graph/test_masks_of_tokens.py::test_exact": 2,
    "graph/test_noise.py::test_exact_draws_are_those_of_one_device": 6,
    "graph/test_open_masked_rows.py::test_exact": 6,
    "graph/test_open_products.py::test_einsum_of_two": 6,
    "graph/test_operators_around_tokens.py::test_exact": 6,
    "graph/test_packed_parity.py::test_sample": 6,
    "graph/test_packing.py::test_each_source_is_checked_when_the_program_runs": 6,
    "graph/test_parity.py::test_eight_ranks": 2,
    "graph/test_parity.py::test_float32_to_rounding": 3,
    "graph/test_parity.py::test_padding_on_both_sides": 4,
    "graph/test_parity.py::test_sample": 6,
    "graph/test_peers.py::test_heads_that_ranks_do_not_divide": 3,
    "graph/test_peers.py::test_masks_stay_aligned_when_several_ranks_are_short": 2,
    "graph/test_peers.py::test_no_target_is_lost_at_a_boundary": 4,
    "graph/test_rules.py::test_rule_holds_whole_and_by_rank": 12,
    "graph/test_rules_drawn.py::test_few": 6,
    "graph/test_separate_documents.py::test_each_document_is_computed_as_if_it_were_alone": 6,
    "graph/test_separate_documents.py::test_layouts_and_strategies": 8,
    "graph/test_several_sequences.py::test_two_lengths": 4,
    "graph/test_tile_rows.py::test_every_form_is_exact": 8,
    "graph/test_token_local.py::test_auxiliary_loss_is_of_all_tokens": 4,
    "graph/test_token_local.py::test_experts_that_sort_are_exact": 4,
    "graph/test_token_local.py::test_transformers_in_float64": 4,
    "graph/test_token_ranges.py::test_exact": 6,
    "graph/test_tokens_made_inside.py::test_exact": 3,
    "graph/test_verify.py::test_exact_for_every_length_and_number_of_ranks": 4,
}


@pytest.hookimpl
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark cases slow as `SAMPLED` says, by their names."""
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        one_in = SAMPLED.get(name.split("[")[0], 1)
        if zlib.crc32(name.encode()) % one_in:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the gloo ranks once the tests that need them are done: their threads take time from the others even when idle."""
    if GLOO not in item.path.parents:
        for pool in Pool.started:
            pool.stop()
