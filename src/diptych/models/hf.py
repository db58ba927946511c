"""What the adapters around transformers' models share."""

from __future__ import annotations

import inspect

from transformers import LlamaModel

# transformers 5.24 renamed the argument of every decoder's forward
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
