"""Tasks that need no download; lm-eval reads the YAML files of this folder."""
