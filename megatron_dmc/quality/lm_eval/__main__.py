"""lm-eval's own command line, with `--model megatron-dmc` known to it:

python -m megatron_dmc.quality.lm_eval --model megatron-dmc --model_args pretrained=PATH --tasks ...
"""

from lm_eval.__main__ import cli_evaluate

import megatron_dmc.quality.lm_eval.model  # noqa: F401  (registers the model)

if __name__ == "__main__":
    cli_evaluate()
