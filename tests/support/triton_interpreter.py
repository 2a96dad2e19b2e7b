"""Repairs of Triton's interpreter, made at import; nothing where kernels are compiled."""

import triton

if triton.knobs.runtime.interpret:
    from triton.runtime import interpreter

    _set_attr = interpreter._LangPatchScope.set_attr
    _patch_lang = interpreter._patch_lang
    _patched = set()

    def _set_index_attr(self, owner, name, value):
        # numpy 2.5 refuses int() of a one-element array, which loop bounds are
        if name == "__index__":
            value = lambda tensor: int(tensor.handle.data.item())
        _set_attr(self, owner, name, value)

    class _Nothing:
        def restore(self):
            pass

    def _patch_once(fn):
        # the interpreter patches the language again for every nested call: most of its time
        if id(fn.__globals__) not in _patched:
            _patched.add(id(fn.__globals__))
            _patch_lang(fn)
        return _Nothing()

    interpreter._LangPatchScope.set_attr = _set_index_attr
    interpreter._patch_lang = _patch_once
