"""Explanations that are exact predicates on tokens, found without a language model, scored on other documents."""
