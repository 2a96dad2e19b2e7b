"""Quality of a model: likelihood, lm-eval, the report."""
