"""What is promised of every family, for Emu3.5: the same tests, on a toy in the release's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_control_tokens
from test_admission import test_no_text_has_more_tokens_than_the_bound_says  # noqa: F401
from test_control_tokens import (  # noqa: F401
    test_a_question_about_a_tag_is_a_prompt,
    test_a_thousand_documents_have_the_control_tokens_of_their_templates_alone,
    test_half_characters_are_refused_with_their_place,
    test_no_spelling_of_a_control_token_becomes_one,
    test_what_spells_a_token_is_read_as_its_characters,
)
from test_families import (  # noqa: F401
    test_a_batch_may_have_rows_without_pictures,
    test_examples_train_the_answer_and_dropped_captions_are_the_unconditional_branch,
    test_greedy_rows_do_not_depend_on_prefill_and_compaction,
    test_more_pictures_than_the_context_holds,
    test_only_legal_tokens_are_sampled_and_pictures_are_whole,
    test_pictures_of_any_mode_and_shape_are_read,
    test_rows_do_not_depend_on_their_batch,
    test_text_comes_back_and_makes_no_special_tokens,
    test_the_picture_branch_of_three_way_guidance_holds_the_pictures_and_no_words,
    test_weights_load_in_the_dtype_that_was_asked_for,
    test_what_was_sampled_is_what_is_scored,
)
from test_family_training import (  # noqa: F401
    _own_rewards,
    records,
    test_4_bit_weights_take_adapters_only,
    test_a_killed_warm_up_resumes_to_the_same_weights,
    test_a_step_changes_all_that_should_train_and_nothing_else,
    test_adapters_save_load_merge_and_fit_their_home_code,
    test_adapters_train_alone_and_the_reference_is_the_model_without_them,
    test_gradient_checkpointing_changes_no_gradient,
    test_the_command_line_trains_and_generates,
    test_the_reference_is_the_model_from_which_the_run_started,
)
from test_forms import (  # noqa: F401
    test_a_document_does_not_depend_on_what_else_is_in_the_batch,
    test_a_given_beginning_leaves_the_rest_of_the_answer_what_it_was,
    test_a_sampled_picture_is_the_example_that_teaches_it,
    test_all_forms_in_one_batch_are_scored_as_they_were_sampled,
    test_texts_begin_pictures_at_their_greatest_length,
)
from test_layouts import (  # noqa: F401
    test_a_cache_with_holes_selected_rows_and_several_blocks_equal_each_sequence_alone,
    test_packed_states_and_gradients_equal_those_of_each_sequence_alone,
)
from toy_checkpoints import make_emu3_5

from diptych.models import UnifiedModel, load_model


@pytest.fixture(autouse=True)
def _tokens_that_are_in_use(monkeypatch):
    """Of the 205 tokens that are written alike, those that mean something, and one that does not."""
    unused = {f"<|extra_{i}|>" for i in range(1, 205)} - {f"<|extra_{i}|>" for i in (50, 51, 60, 61, 100, 101, 200, 203, 204)}
    every = test_control_tokens.some_tokens
    monkeypatch.setattr(test_control_tokens, "some_tokens", lambda model: [token for token in every(model) if token not in unused])


@pytest.fixture
def family() -> str:
    return "emu3_5"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {"emu3_5": make_emu3_5(tmp_path_factory.mktemp("toys") / "emu3_5")}


@pytest.fixture(scope="module")
def models(folders) -> dict[str, UnifiedModel]:
    return {"emu3_5": load_model(folders["emu3_5"])}


@pytest.fixture
def model(models) -> UnifiedModel:
    """Its head likes to begin pictures and to end by itself (`make_emu3_5`)."""
    return models["emu3_5"]
