"""A pytest plugin: packages that a GPU machine may do without seem to be absent (`-p missing_packages`)."""

import sys

OPTIONAL = ("lm_eval", "nemo_run", "leptonai", "hypothesis", "tilelang", "flash_attn", "transformer_engine", "datasets")

sys.modules.update(dict.fromkeys(OPTIONAL))  # an import of None fails, and find_spec answers None
