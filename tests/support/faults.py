"""Faults to inject into an engine: logits that are not finite, functions that raise."""

import math

from tiny_gpt import Letters, TinyGPT, V


class Spread(Letters):
    """Letters that can write every token of the model, and read every text."""

    def encode(self, text):
        return [4 + ord(c) % (V - 4) for c in text]


def raising(function, is_meant, error, *, after=0):
    """`function`, but raising where `is_meant(*args)`, from the `after`-th such call on."""
    calls = []

    def wrapped(*args, **kwargs):
        if is_meant(*args):
            calls.append(1)
            if len(calls) > after:
                raise error
        return function(*args, **kwargs)

    return wrapped


class Poisoned(TinyGPT):
    """Its logits behind token 39 have `value` in `columns`."""

    value, columns = math.nan, slice(3, 4)

    def forward(self, input_ids, position_ids, *args, output_processor, **kwargs):
        def poisoned(*, hidden_states, context, **rest):
            logits = output_processor(hidden_states=hidden_states, context=context, **rest)
            ids = input_ids[0] if context is None else input_ids[0][context]
            logits[ids == V - 1, ..., self.columns] = self.value
            return logits

        return super().forward(input_ids, position_ids, *args, output_processor=poisoned, **kwargs)
